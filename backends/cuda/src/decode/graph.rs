//! A step recorded once and launched as one.

use std::sync::Arc;

use cudarc::driver::sys;
use hoist_backend::Result;

use crate::driver::{Context, Stream, call};

/// A recorded sequence of copies and kernels.
#[derive(Debug)]
pub(super) struct Graph {
    executable: sys::CUgraphExec,
    context: Arc<Context>,
}

// SAFETY: the handle may be used from any thread, one at a time.
unsafe impl Send for Graph {}

/// What was recorded, until it is made executable.
struct Recorded(sys::CUgraph);

impl Drop for Recorded {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: made once, destroyed once; an executable does not need it.
            let _ = unsafe { sys::cuGraphDestroy(self.0) };
        }
    }
}

impl Graph {
    /// Records what `work` enqueues on the stream; nothing of it runs.
    pub(super) fn record(stream: &Stream, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let context = stream.context();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is held.
        call!(context.id(), cuStreamBeginCapture_v2(stream.raw(), mode))?;
        let worked = work();
        let mut recorded = Recorded(std::ptr::null_mut());
        // SAFETY: the out pointer is valid. A capture is ended even if the work failed, and may be a graph even then.
        let ended = call!(context.id(), cuStreamEndCapture(stream.raw(), &mut recorded.0));
        worked?;
        ended?;
        let mut executable = std::ptr::null_mut();
        // SAFETY: the out pointer is valid and the graph was just made.
        call!(
            context.id(),
            cuGraphInstantiateWithFlags(&mut executable, recorded.0, 0)
        )?;
        let graph = Self {
            executable,
            context: Arc::clone(context),
        };
        // SAFETY: both handles are held.
        call!(context.id(), cuGraphUpload(graph.executable, stream.raw()))?;
        Ok(graph)
    }

    /// Runs it once.
    pub(super) fn launch(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both handles are held.
        call!(self.context.id(), cuGraphLaunch(self.executable, stream.raw()))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: made once, destroyed once.
        let _ = unsafe { sys::cuGraphExecDestroy(self.executable) };
    }
}
