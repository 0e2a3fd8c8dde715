//! A plugin in a process of its own. The interface is the same: [`proxy`] is a table of functions whose calls are answered
//! by [`serve`] in the worker, so that everything the host checks of a plugin in its own process is checked here too.
//!
//! Control messages go over a socket, which is the worker's standard input; bytes of weights and logits through shared
//! memory. A worker that ends, or does not answer in time, is a lost device: it is killed and waited for.

mod proxy;
mod serve;
mod shared;
mod wire;

use std::cell::Cell;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hoist_plugin_abi::{ErrorRecord, Plugin, Status};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

pub use serve::serve;

use crate::policy::Candidate;
use crate::probe::describe;
use crate::{Error, Result, parting};
use shared::Shared;
use wire::{Decoder, Encoder, Silence};

/// How a worker process is started.
#[derive(Clone, Debug)]
pub struct Isolation {
    /// The program, normally this one; called as `program arguments… PATH SHA256`. It must call [`serve`].
    pub program: PathBuf,
    /// Arguments before the path.
    pub arguments: Vec<String>,
    /// How long one call may take.
    pub limit: Duration,
}

/// Shared memory at the start; grows with the largest chunk.
const SHARED_BYTES: usize = 4 << 20;

/// A worker process, and the library in it.
pub(crate) struct Worker {
    path: PathBuf,
    state: Mutex<WorkerState>,
    limit: Duration,
    /// Bit `n`: the plugin has the function of entry number `n`.
    entries: u32,
}

struct WorkerState {
    child: Child,
    stream: UnixStream,
    shared: Shared,
    request: Encoder,
    reply: Vec<u8>,
    /// Why it is gone.
    lost: Option<String>,
}

thread_local! {
    /// The worker that the functions of [`proxy`] speak to during a call: they get no context by the interface.
    static CURRENT: Cell<*const Worker> = const { Cell::new(std::ptr::null()) };
}

impl Worker {
    /// Starts a worker, which loads and opens the plugin.
    pub(crate) fn start(candidate: &Candidate, isolation: &Isolation) -> Result<Self> {
        let fail = |reason: String| Error::Worker {
            path: candidate.path.clone(),
            reason,
        };
        let io = |e: std::io::Error| fail(e.to_string());
        let (stream, theirs) = UnixStream::pair().map_err(io)?;
        let shared = Shared::new(SHARED_BYTES).map_err(io)?;
        let child = Command::new(&isolation.program)
            .args(&isolation.arguments)
            .arg(&candidate.path)
            .arg(&candidate.sha256)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            // An interrupt from the terminal is the host's to handle.
            .process_group(0)
            .spawn()
            .map_err(|e| fail(format!("`{}` does not start: {e}", isolation.program.display())))?;
        let mut state = WorkerState {
            child,
            stream,
            shared,
            request: Encoder::default(),
            reply: Vec::new(),
            lost: None,
        };
        let deadline = Some(Instant::now() + isolation.limit);
        if let Err(e) = send_file(&state.stream, &state.shared) {
            return Err(fail(
                state.give_up(&Silence::Gone, isolation.limit) + ": " + &e.to_string(),
            ));
        }
        if let Err(silence) = wire::receive(&state.stream, &mut state.reply, deadline) {
            return Err(fail(state.give_up(&silence, isolation.limit)));
        }
        let mut decoder = Decoder(&state.reply);
        let answer = decoder.take::<u32>().zip(decoder.take_all::<u8>());
        match answer {
            Some((entries, problem)) if problem.is_empty() => Ok(Self {
                path: candidate.path.clone(),
                state: Mutex::new(state),
                limit: isolation.limit,
                entries,
            }),
            Some((_, problem)) => Err(fail(String::from_utf8_lossy(&problem).into_owned())),
            None => Err(fail(state.give_up(&Silence::Nonsense, isolation.limit))),
        }
    }

    /// The table of functions that speak to a worker: those that this one's plugin has.
    pub(crate) fn table(&self) -> Plugin {
        proxy::table(self.entries)
    }

    /// Runs a call of the table with this worker at the other end.
    pub(crate) fn enter<T>(&self, call: impl FnOnce() -> T) -> T {
        struct Leave(*const Worker);
        impl Drop for Leave {
            fn drop(&mut self) {
                CURRENT.set(self.0);
            }
        }
        let _leave = Leave(CURRENT.replace(self));
        call()
    }

    /// One call: sends what `encode` writes and gives `decode` the reply of a success.
    fn exchange(
        &self,
        entry: Entry,
        record: *mut ErrorRecord,
        encode: impl FnOnce(&mut Encoder, &mut Shared) -> std::io::Result<()>,
        decode: impl FnOnce(&mut Decoder<'_>, &Shared) -> Option<()>,
    ) -> Status {
        let mut guard = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let state = &mut *guard;
        if let Some(reason) = &state.lost {
            return if entry.gives_back() {
                // Everything went with the worker, and the call that lost it has said so.
                Status::OK
            } else {
                refuse(record, Status::DEVICE_LOST, reason)
            };
        }
        // The entry and the size of the shared memory stand at the end: `encode` may make it grow.
        let mut body = std::mem::take(&mut state.request);
        body.clear();
        if let Err(e) = encode(&mut body, &mut state.shared) {
            return refuse(
                record,
                Status::OUT_OF_HOST_MEMORY,
                &format!("sharing memory: {e}"),
            );
        }
        body.put(state.shared.len() as u64);
        body.put(entry as u32);
        let deadline = Some(Instant::now() + self.limit);
        let sent = wire::send(&state.stream, &body, deadline);
        state.request = body;
        let received = sent.and_then(|()| wire::receive(&state.stream, &mut state.reply, deadline));
        if let Err(silence) = received {
            let reason = state.give_up(&silence, self.limit);
            state.lost = Some(format!("`{}`: {reason}", entry.name()));
            return refuse(record, Status::DEVICE_LOST, &reason);
        }
        let mut decoder = Decoder(&state.reply);
        let understood = (|| {
            let status: Status = decoder.take()?;
            if status == Status::OK {
                decode(&mut decoder, &state.shared)?;
            } else {
                let theirs: ErrorRecord = decoder.take()?;
                if !record.is_null() {
                    // SAFETY: a record of the host's own.
                    unsafe { record.write(theirs) };
                }
            }
            Some(status)
        })();
        understood.unwrap_or_else(|| {
            let reason = format!(
                "`{}`: {}",
                entry.name(),
                state.give_up(&Silence::Nonsense, self.limit)
            );
            state.lost = Some(reason.clone());
            refuse(record, Status::DEVICE_LOST, &reason)
        })
    }
}

impl WorkerState {
    /// Ends the worker, waits for it, and says why.
    fn give_up(&mut self, silence: &Silence, limit: Duration) -> String {
        let reason = match silence {
            Silence::TimedOut => format!(
                "no answer within {} ms; its worker process was ended",
                limit.as_millis()
            ),
            Silence::Nonsense => "its worker process answered nonsense and was ended".to_owned(),
            // It is ending: how, it tells itself.
            Silence::Gone => match wait(&mut self.child, END_LIMIT) {
                Some(status) => describe(status),
                None => "its worker process closed its end and was ended".to_owned(),
            },
        };
        end(&mut self.child);
        reason
    }
}

/// How long a worker that says goodbye may take to end.
const END_LIMIT: Duration = Duration::from_secs(5);

fn wait(child: &mut Child, limit: Duration) -> Option<std::process::ExitStatus> {
    let started = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if started.elapsed() < limit => std::thread::sleep(Duration::from_millis(1)),
            Ok(None) | Err(_) => return None,
        }
    }
}

/// Kills and reaps; one that has ended already only is reaped.
fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

impl Drop for Worker {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if state.lost.is_some() {
            return;
        }
        // The worker sees the end of the stream, and ends: what the plugin does then is part of its conduct.
        let _ = state.stream.shutdown(std::net::Shutdown::Both);
        let reason = match wait(&mut state.child, END_LIMIT) {
            Some(status) if status.success() => return,
            Some(status) => describe(status),
            None => format!(
                "its worker process did not end within {} ms and was ended",
                END_LIMIT.as_millis()
            ),
        };
        parting::record(&self.path, "exit", reason);
    }
}

impl Drop for WorkerState {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        end(&mut self.child);
    }
}

/// Fills the host's record.
fn refuse(record: *mut ErrorRecord, status: Status, reason: &str) -> Status {
    let mut own = ErrorRecord::new();
    own.code = status.0;
    let mut end = reason.len().min(own.message.len() - 1);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    own.message[..end].copy_from_slice(&reason.as_bytes()[..end]);
    if !record.is_null() {
        // SAFETY: a record of the host's own.
        unsafe { record.write(own) };
    }
    status
}

/// Hands the shared memory over.
fn send_file(stream: &UnixStream, shared: &Shared) -> rustix::io::Result<()> {
    let file = shared.file();
    let files = [file.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&files));
    sendmsg(stream, &[IoSlice::new(&[0])], &mut control, SendFlags::empty())?;
    Ok(())
}

macro_rules! entries {
    ($($variant:ident $name:ident),* $(,)?) => {
        /// Functions of the table, by number.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        enum Entry { $($variant),* }

        impl Entry {
            const ALL: &[Self] = &[$(Self::$variant),*];

            fn name(self) -> &'static str {
                match self { $(Self::$variant => stringify!($name)),* }
            }

            fn is_in(self, table: &Plugin) -> bool {
                match self { $(Self::$variant => table.$name.is_some()),* }
            }
        }
    };
}

entries! {
    DeviceCount device_count, DeviceInfo device_info, DeviceOpen device_open, Caps caps, MemoryInfo memory_info,
    PlanCheck plan_check, LoadBegin load_begin, Upload upload, LoadCommit load_commit, LoadAbort load_abort,
    Readback readback, ModelDestroy model_destroy, DeviceClose device_close, Shutdown shutdown, BuildIndex build_index,
    WorkspaceBytes workspace_bytes, WorkspaceCreate workspace_create, Prepare prepare, Forward forward,
    Truncate truncate, Digest digest, Stats stats,
}

impl Entry {
    fn gives_back(self) -> bool {
        matches!(
            self,
            Self::LoadAbort | Self::ModelDestroy | Self::DeviceClose | Self::Shutdown
        )
    }

    fn bits(table: &Plugin) -> u32 {
        Self::ALL
            .iter()
            .filter(|e| e.is_in(table))
            .fold(0, |bits, e| bits | 1 << *e as u32)
    }
}
