//! A plugin whose author's code panics: the CPU reference, written against the safe traits and exported by the SDK as any
//! other, with a panic in one call. What the SDK makes of it is what tests look at.
//!
//! The environment variable `HOIST_PANIC` names the function of the interface whose safe counterpart panics, `open` and
//! every entry of the table that reaches the author's code; a program that has opened the library can choose anew by
//! calling `hoist_panic_in`. Unset or empty, nothing panics.
#![allow(clippy::panic, reason = "panicking is what it is for")]

use std::sync::{Mutex, OnceLock, PoisonError};

use hoist_cpu::{CpuBackend, CpuProvider};
use hoist_plugin_sdk::hoist_backend::{
    BackendInfo, Chunk, DecodeBackend, DecodeProgram, DeviceInfo, Error, IndexLayout, IndexReceipt, LoadPlan,
    LoadReceipt, LoadWatch, MemoryInfo, OpenOptions, Outputs, Provider, Result, SequenceId, TokenBatch,
    WeightBackend, WeightId, WeightSource, WorkspaceBytes, WorkspaceDims,
};

hoist_plugin_sdk::export_backend! {
    provider: Panicking::new(),
    name: "panicking",
    vendor: "Hoist",
    decodes: true,
}

/// The entry that panics, and how often it is spared before.
fn chosen() -> &'static Mutex<(String, u32)> {
    static CHOSEN: OnceLock<Mutex<(String, u32)>> = OnceLock::new();
    CHOSEN.get_or_init(|| Mutex::new((std::env::var("HOIST_PANIC").unwrap_or_default(), 0)))
}

/// Chooses the entry that panics: a name of `len` bytes, or none.
///
/// # Safety
/// `name` is valid for reading `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hoist_panic_in(name: *const u8, len: u64) {
    let name = if len == 0 {
        String::new()
    } else {
        // SAFETY: as the caller vouches.
        let bytes = unsafe { std::slice::from_raw_parts(name, len as usize) };
        String::from_utf8_lossy(bytes).into_owned()
    };
    *chosen().lock().unwrap_or_else(PoisonError::into_inner) = (name, 0);
}

fn is(entry: &str) -> bool {
    chosen().lock().unwrap_or_else(PoisonError::into_inner).0 == entry
}

/// Panics if it is `entry`'s turn.
fn panic_in(entry: &str) {
    if is(entry) {
        panic!("the author's `{entry}` gives up");
    }
}

/// As [`panic_in`], of two entries that ask the same of the author: the second is asked after the first.
fn panic_in_one_of(first: &str, second: &str) {
    panic_in(first);
    let mut chosen = chosen().lock().unwrap_or_else(PoisonError::into_inner);
    if chosen.0 == second {
        chosen.1 += 1;
        let asked = chosen.1;
        drop(chosen);
        if asked > 1 {
            panic!("the author's `{second}` gives up");
        }
    }
}

struct Panicking;

impl Panicking {
    fn new() -> Self {
        panic_in("open");
        Self
    }
}

impl Drop for Panicking {
    fn drop(&mut self) {
        panic_in("shutdown");
    }
}

impl Provider for Panicking {
    fn name(&self) -> &str {
        "panicking"
    }

    fn devices(&self) -> Result<Vec<DeviceInfo>> {
        panic_in_one_of("device_count", "device_info");
        CpuProvider.devices()
    }

    fn open(&self, _: u32, options: &OpenOptions) -> Result<Box<dyn WeightBackend>> {
        panic_in("device_open");
        Ok(Box::new(Device {
            inner: CpuBackend::open(options)?,
        }))
    }
}

struct Device {
    inner: CpuBackend,
}

impl Drop for Device {
    fn drop(&mut self) {
        panic_in("device_close");
    }
}

impl Device {
    /// A load that fails, so that it is aborted.
    fn fail_before_abort(&self) -> Result<()> {
        if is("load_abort") {
            return Err(Error::internal("panicking", "the load is to be aborted"));
        }
        Ok(())
    }
}

impl WeightBackend for Device {
    fn info(&self) -> &BackendInfo {
        panic_in_one_of("caps", "plan_check");
        self.inner.info()
    }

    fn memory(&self) -> Result<MemoryInfo> {
        panic_in("memory_info");
        self.inner.memory()
    }

    fn begin_load(&mut self, plan: &LoadPlan) -> Result<()> {
        panic_in("load_begin");
        self.inner.begin_load(plan)
    }

    fn upload_quantized(&mut self, chunk: Chunk<'_>) -> Result<()> {
        panic_in("upload");
        self.fail_before_abort()?;
        self.inner.upload_quantized(chunk)
    }

    fn upload_f32(&mut self, chunk: Chunk<'_>) -> Result<()> {
        panic_in("upload");
        self.fail_before_abort()?;
        self.inner.upload_f32(chunk)
    }

    fn upload_gamma(&mut self, chunk: Chunk<'_>) -> Result<()> {
        panic_in("upload");
        self.fail_before_abort()?;
        self.inner.upload_gamma(chunk)
    }

    fn load_from(&mut self, plan: &LoadPlan, source: &dyn WeightSource, watch: &dyn LoadWatch) -> Result<()> {
        panic_in("load_from");
        self.fail_before_abort()?;
        self.inner.load_from(plan, source, watch)
    }

    fn finish_load(&mut self) -> Result<LoadReceipt> {
        panic_in("load_commit");
        self.inner.finish_load()
    }

    fn abort_load(&mut self) -> Result<()> {
        panic_in("load_abort");
        self.inner.abort_load()
    }

    fn build_index(&mut self, layout: &IndexLayout) -> Result<IndexReceipt> {
        panic_in("build_index");
        self.inner.build_index(layout)
    }

    fn digest(&mut self, weight: WeightId) -> Result<Option<[u8; 32]>> {
        panic_in("digest");
        if is("readback") {
            // Then weights are verified by reading them back.
            return Ok(None);
        }
        self.inner.digest(weight)
    }

    fn read_back(&mut self, weight: WeightId, offset: u64, out: &mut [u8]) -> Result<()> {
        panic_in("readback");
        self.inner.read_back(weight, offset, out)
    }

    fn workspace_bytes(&self, dims: &WorkspaceDims) -> Result<WorkspaceBytes> {
        panic_in("workspace_bytes");
        self.inner.workspace_bytes(dims)
    }

    fn init_workspace(&mut self, dims: &WorkspaceDims) -> Result<WorkspaceBytes> {
        panic_in("workspace_create");
        self.inner.init_workspace(dims)
    }

    fn as_decode(&mut self) -> Option<&mut dyn DecodeBackend> {
        Some(self)
    }

    fn unload(&mut self) -> Result<()> {
        panic_in("model_destroy");
        self.inner.unload()
    }
}

impl DecodeBackend for Device {
    fn prepare(&mut self, program: &DecodeProgram) -> Result<()> {
        panic_in("prepare");
        self.inner.prepare(program)
    }

    fn forward(&mut self, batch: &TokenBatch<'_>, out: &mut Outputs<'_>) -> Result<()> {
        panic_in("forward");
        self.inner.forward(batch, out)
    }

    fn truncate(&mut self, sequence: SequenceId, length: u32) -> Result<()> {
        panic_in("truncate");
        self.inner.truncate(sequence, length)
    }

    fn sequence_length(&self, sequence: SequenceId) -> Result<u32> {
        self.inner.sequence_length(sequence)
    }
}
