//! The worker's side: calls the plugin with what the host sent.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use hoist_plugin_abi as abi;
use hoist_plugin_abi::{ErrorRecord, Plugin, Status};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::Entry;
use super::shared::Shared;
use super::wire::{self, Decoder, Encoder};
use crate::header::Header;
use crate::library::Loaded;
use crate::policy::Candidate;
use crate::{Error, Result};

/// What a worker process does: loads the plugin of that hash and answers the calls that arrive on standard input, until
/// the host is gone.
///
/// # Errors
/// [`Error::Worker`] if standard input is no host's; all else is told to the host.
pub fn serve(path: &Path, sha256: &str) -> Result<()> {
    let fail = |what: &str, e: &dyn std::fmt::Display| Error::Worker {
        path: path.to_owned(),
        reason: format!("{what}: {e}"),
    };
    let stream = take_stdin().map_err(|e| fail("standard input", &e))?;
    let shared = receive_file(&stream).map_err(|e| fail("shared memory", &e))?;
    end_with_the_host(&stream).map_err(|e| fail("watching the host", &e))?;
    let mut hello = Encoder::default();
    match load(path, sha256) {
        Ok(loaded) => {
            hello.put(Entry::bits(&loaded.table));
            hello.put_all::<u8>(&[]);
            if wire::send(&stream, &hello, None).is_ok() {
                answer(&loaded.table, &stream, shared);
            }
            // `shutdown` was the host's to call; once is enough.
            std::mem::forget(loaded);
        }
        Err(error) => {
            hello.put(0u32);
            hello.put_all(error.to_string().as_bytes());
            // A host that is gone needs no answer.
            let _ = wire::send(&stream, &hello, None);
        }
    }
    Ok(())
}

fn load(path: &Path, sha256: &str) -> Result<std::sync::Arc<Loaded>> {
    let candidate = Candidate::open(path)?;
    if candidate.sha256 != sha256 {
        return Err(Error::Changed {
            path: path.to_owned(),
            expected: sha256.to_owned(),
            found: candidate.sha256,
        });
    }
    let header = Header::read(path, &candidate.file)?;
    let minor = header.agree(path)?;
    Loaded::open(&candidate, header, minor)
}

/// The control socket, out of the plugin's way: what reads standard input finds it empty.
fn take_stdin() -> std::io::Result<UnixStream> {
    let stream = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let nothing = std::fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&nothing)?;
    Ok(stream)
}

fn receive_file(stream: &UnixStream) -> std::io::Result<Shared> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(
        stream,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let file: Option<OwnedFd> = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    Shared::open(file.ok_or_else(|| std::io::Error::other("none was sent"))?)
}

/// A plugin that hangs must not outlive the host: a thread waits for the other end of the socket to close.
fn end_with_the_host(stream: &UnixStream) -> std::io::Result<()> {
    let stream = stream.try_clone()?;
    std::thread::Builder::new().spawn(move || {
        let mut fds = [PollFd::new(&stream, PollFlags::empty())];
        while poll(&mut fds, None) == Err(rustix::io::Errno::INTR) {}
        // The loop of answers sees it too and may end in its own way first.
        std::thread::sleep(super::END_LIMIT);
        // It cannot fail for the process itself.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    })?;
    Ok(())
}

/// Answers calls until the host is gone or says nonsense.
fn answer(table: &Plugin, stream: &UnixStream, mut shared: Shared) {
    let (mut request, mut reply) = (Vec::new(), Encoder::default());
    while wire::receive(stream, &mut request, None).is_ok() {
        reply.clear();
        let mut record = ErrorRecord::new();
        let Some(status) = answer_one(table, &request, &mut shared, &mut record, &mut reply) else {
            return;
        };
        if status != Status::OK {
            reply.clear();
            reply.put(status);
            reply.put(record);
        }
        if wire::send(stream, &reply, None).is_err() {
            return;
        }
    }
}

/// Calls `$f`; on success the reply is the status and what follows.
macro_rules! call {
    ($table:ident.$f:ident($($argument:expr),*), $record:ident) => {{
        let f = $table.$f?;
        // SAFETY: every pointer is to a local or to shared memory of the length that is told, valid for the call.
        unsafe { f($($argument,)* $record) }
    }};
}

/// One call; `None` for a request that this program does not make.
fn answer_one(
    table: &Plugin,
    request: &[u8],
    shared: &mut Shared,
    record: &mut ErrorRecord,
    reply: &mut Encoder,
) -> Option<Status> {
    let (body, tail) = request.split_at_checked(request.len().checked_sub(12)?)?;
    let mut tail = Decoder(tail);
    let len = usize::try_from(tail.take::<u64>()?).ok()?;
    let entry = *Entry::ALL.get(tail.take::<u32>()? as usize)?;
    if len != shared.len() {
        shared.remap(len).ok()?;
    }
    let mut d = Decoder(body);
    reply.put(Status::OK);
    let status = match entry {
        Entry::DeviceCount => {
            let mut count = 0u32;
            let status = call!(table.device_count(&mut count), record);
            reply.put(count);
            status
        }
        Entry::DeviceInfo => {
            let ordinal = u32::try_from(d.take::<u64>()?).ok()?;
            let mut info = abi::DeviceInfo {
                struct_size: size_of::<abi::DeviceInfo>() as u32,
                ordinal,
                id: [0; 32],
                name: [0; 128],
                total_memory: 0,
            };
            let status = call!(table.device_info(ordinal, &mut info), record);
            reply.put(info);
            status
        }
        Entry::DeviceOpen => {
            let (ordinal, options): (u32, abi::OpenOptions) = (d.take()?, d.take()?);
            let mut device = 0u64;
            let status = call!(table.device_open(ordinal, &options, &mut device), record);
            reply.put(device);
            status
        }
        Entry::Caps => {
            let mut caps = abi::Caps {
                struct_size: size_of::<abi::Caps>() as u32,
                ..abi::Caps::default()
            };
            let status = call!(table.caps(d.take()?, &mut caps), record);
            reply.put(caps);
            status
        }
        Entry::MemoryInfo => {
            let mut memory = abi::DeviceMemory {
                struct_size: size_of::<abi::DeviceMemory>() as u32,
                ..abi::DeviceMemory::default()
            };
            let status = call!(table.memory_info(d.take()?, &mut memory), record);
            reply.put(memory);
            status
        }
        Entry::PlanCheck => {
            let device = d.take()?;
            let plan = PlanOwned::take(&mut d)?;
            let capacity: u64 = d.take()?;
            let empty = abi::Refusal {
                tensor: 0,
                code: 0,
                reason: [0; 120],
            };
            let mut refusals = vec![empty; usize::try_from(capacity).ok().filter(|n| *n <= 1 << 16)?];
            let mut report = abi::PlanReport {
                struct_size: size_of::<abi::PlanReport>() as u32,
                reserved: 0,
                bytes: [0; 4],
                refusals: refusals.as_mut_ptr(),
                refusal_capacity: capacity,
                refusal_count: 0,
            };
            let status = call!(table.plan_check(device, &plan.plan, &mut report), record);
            reply.put(report);
            reply.put_all(&refusals);
            status
        }
        Entry::LoadBegin => {
            let device = d.take()?;
            let plan = PlanOwned::take(&mut d)?;
            let mut load = 0u64;
            let status = call!(table.load_begin(device, &plan.plan, &mut load), record);
            reply.put(load);
            status
        }
        Entry::Upload => {
            let (load, tensor, offset, len): (u64, u64, u64, u64) =
                (d.take()?, d.take()?, d.take()?, d.take()?);
            if len > shared.len() as u64 {
                return None;
            }
            let chunk = abi::Chunk {
                struct_size: size_of::<abi::Chunk>() as u32,
                tensor: u32::try_from(tensor).ok()?,
                offset,
                data: shared.start(),
                len,
                semantics: abi::UPLOAD_COPY_IN_CALL,
                reserved: 0,
            };
            call!(table.upload(load, &chunk), record)
        }
        Entry::LoadCommit => {
            let mut model = 0u64;
            let mut receipt = abi::LoadReceipt {
                struct_size: size_of::<abi::LoadReceipt>() as u32,
                ..abi::LoadReceipt::default()
            };
            let status = call!(table.load_commit(d.take()?, &mut model, &mut receipt), record);
            reply.put(model);
            reply.put(receipt);
            status
        }
        Entry::LoadAbort => call!(table.load_abort(d.take()?), record),
        Entry::Readback => {
            let (model, tensor, offset, len): (u64, u64, u64, u64) =
                (d.take()?, d.take()?, d.take()?, d.take()?);
            if len > shared.len() as u64 {
                return None;
            }
            let tensor = u32::try_from(tensor).ok()?;
            call!(table.readback(model, tensor, offset, shared.start(), len), record)
        }
        Entry::ModelDestroy => call!(table.model_destroy(d.take()?), record),
        Entry::DeviceClose => call!(table.device_close(d.take()?), record),
        Entry::Shutdown => call!(table.shutdown(), record),
        Entry::BuildIndex => {
            let (model, mut layout): (u64, abi::IndexLayout) = (d.take()?, d.take()?);
            let entries: Vec<abi::IndexEntry> = d.take_all()?;
            (layout.entries, layout.entry_count) = (entries.as_ptr(), entries.len() as u64);
            let mut receipt = abi::IndexReceipt {
                struct_size: size_of::<abi::IndexReceipt>() as u32,
                ..abi::IndexReceipt::default()
            };
            let status = call!(table.build_index(model, &layout, &mut receipt), record);
            reply.put(receipt);
            status
        }
        Entry::WorkspaceBytes | Entry::WorkspaceCreate => {
            let (handle, mut dims): (u64, abi::WorkspaceDims) = (d.take()?, d.take()?);
            let kv: Vec<abi::KvSpec> = d.take_all()?;
            let values: Vec<abi::ValueSpec> = d.take_all()?;
            (dims.kv, dims.kv_count) = (kv.as_ptr(), kv.len() as u64);
            (dims.values, dims.value_count) = (values.as_ptr(), values.len() as u64);
            let mut bytes = abi::WorkspaceBytes {
                struct_size: size_of::<abi::WorkspaceBytes>() as u32,
                ..abi::WorkspaceBytes::default()
            };
            let status = if entry == Entry::WorkspaceBytes {
                call!(table.workspace_bytes(handle, &dims, &mut bytes), record)
            } else {
                call!(table.workspace_create(handle, &dims, &mut bytes), record)
            };
            reply.put(bytes);
            status
        }
        Entry::Prepare => {
            let (model, mut p): (u64, abi::Program) = (d.take()?, d.take()?);
            let kv: Vec<abi::KvSpec> = d.take_all()?;
            let values: Vec<abi::ValueSpec> = d.take_all()?;
            let ops: Vec<abi::Op> = d.take_all()?;
            let mut tables: Vec<abi::Table> = d.take_all()?;
            let data: Vec<Vec<f32>> = tables.iter().map(|_| d.take_all()).collect::<Option<_>>()?;
            for (t, data) in tables.iter_mut().zip(&data) {
                if u64::from(t.rows) * u64::from(t.cols) != data.len() as u64 {
                    return None;
                }
                t.data = data.as_ptr();
            }
            (p.kv, p.kv_count) = (kv.as_ptr(), kv.len() as u64);
            (p.values, p.value_count) = (values.as_ptr(), values.len() as u64);
            (p.ops, p.op_count) = (ops.as_ptr(), ops.len() as u64);
            (p.tables, p.table_count) = (tables.as_ptr(), tables.len() as u64);
            call!(table.prepare(model, &p), record)
        }
        Entry::Forward => forward(table, &mut d, shared, record, reply)?,
        Entry::Truncate => {
            let (model, sequence, length): (u64, u64, u64) = (d.take()?, d.take()?, d.take()?);
            let (sequence, length) = (u32::try_from(sequence).ok()?, u32::try_from(length).ok()?);
            call!(table.truncate(model, sequence, length), record)
        }
        Entry::Digest => {
            let (model, tensor): (u64, u64) = (d.take()?, d.take()?);
            let mut digest = [0u8; 32];
            let tensor = u32::try_from(tensor).ok()?;
            let status = call!(table.digest(model, tensor, digest.as_mut_ptr()), record);
            reply.put_all(&digest);
            status
        }
        Entry::Stats => {
            let (device, capacity): (u64, u64) = (d.take()?, d.take()?);
            if capacity > shared.len() as u64 {
                return None;
            }
            let mut needed = 0u64;
            let status = call!(table.stats(device, shared.start(), capacity, &mut needed), record);
            reply.put(needed);
            status
        }
    };
    Some(status)
}

fn forward(
    table: &Plugin,
    d: &mut Decoder<'_>,
    shared: &Shared,
    record: &mut ErrorRecord,
    reply: &mut Encoder,
) -> Option<Status> {
    let (model, count): (u64, u64) = (d.take()?, d.take()?);
    let arrays = (0..count)
        .map(|_| Some((d.take::<u32>()?, d.take_all::<u32>()?, d.take_all::<u8>()?)))
        .collect::<Option<Vec<_>>>()?;
    let (argmax_count, logits_count): (u64, u64) = (d.take()?, d.take()?);
    let tokens: usize = arrays.iter().map(|(_, tokens, _)| tokens.len()).sum();
    let fits = logits_count.checked_mul(4)? <= shared.len() as u64 && argmax_count <= tokens as u64;
    if !fits || arrays.iter().any(|(_, tokens, want)| tokens.len() != want.len()) {
        return None;
    }
    let runs: Vec<_> = arrays
        .iter()
        .map(|(sequence, tokens, want)| abi::Run {
            sequence: *sequence,
            token_count: tokens.len() as u32,
            tokens: tokens.as_ptr(),
            want: want.as_ptr(),
        })
        .collect();
    let batch = abi::Batch {
        struct_size: size_of::<abi::Batch>() as u32,
        reserved: 0,
        runs: runs.as_ptr(),
        run_count: count,
    };
    let mut argmax = vec![0u32; argmax_count as usize];
    let mut outputs = abi::Outputs {
        struct_size: size_of::<abi::Outputs>() as u32,
        reserved: 0,
        argmax: argmax.as_mut_ptr(),
        argmax_count,
        logits: shared.start().cast(),
        logits_count,
    };
    let status = call!(table.forward(model, &batch, &mut outputs), record);
    argmax.iter().for_each(|id| reply.put(*id));
    Some(status)
}

/// A plan with what it points to.
struct PlanOwned {
    plan: abi::PlanV,
    _tensors: Vec<abi::Tensor>,
    _names: Vec<Vec<u8>>,
}

impl PlanOwned {
    fn take(d: &mut Decoder<'_>) -> Option<Self> {
        let mut plan: abi::PlanV = d.take()?;
        let mut tensors: Vec<abi::Tensor> = d.take_all()?;
        let names: Vec<Vec<u8>> = tensors.iter().map(|_| d.take_all()).collect::<Option<_>>()?;
        for (t, name) in tensors.iter_mut().zip(&names) {
            (t.name, t.name_len) = (name.as_ptr(), name.len() as u64);
        }
        (plan.tensors, plan.tensor_count) = (tensors.as_ptr(), tensors.len() as u64);
        Some(Self {
            plan,
            _tensors: tensors,
            _names: names,
        })
    }
}
