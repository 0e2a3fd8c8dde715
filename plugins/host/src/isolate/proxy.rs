//! The table of functions that send their arguments to the worker of the running call.
//!
//! Pointers are those that `PluginBackend` passes: valid for the call, with the sizes of this crate's own structs.

use hoist_plugin_abi as abi;
use hoist_plugin_abi::{ErrorRecord, Handle, Plugin, Status};

use super::shared::Shared;
use super::wire::{Decoder, Encoder, Plain};
use super::{CURRENT, Entry, refuse};

/// The functions whose bits are set.
pub(super) fn table(entries: u32) -> Plugin {
    macro_rules! present {
        ($entry:ident $f:ident) => {
            if entries >> Entry::$entry as u32 & 1 == 1 {
                Some($f as _)
            } else {
                None
            }
        };
    }
    Plugin {
        struct_size: size_of::<Plugin>() as u32,
        reserved: 0,
        device_count: present!(DeviceCount device_count),
        device_info: present!(DeviceInfo device_info),
        device_open: present!(DeviceOpen device_open),
        caps: present!(Caps caps),
        memory_info: present!(MemoryInfo memory_info),
        plan_check: present!(PlanCheck plan_check),
        load_begin: present!(LoadBegin load_begin),
        upload: present!(Upload upload),
        load_commit: present!(LoadCommit load_commit),
        load_abort: present!(LoadAbort load_abort),
        readback: present!(Readback readback),
        model_destroy: present!(ModelDestroy model_destroy),
        device_close: present!(DeviceClose device_close),
        shutdown: present!(Shutdown shutdown),
        build_index: present!(BuildIndex build_index),
        workspace_bytes: present!(WorkspaceBytes workspace_bytes),
        workspace_create: present!(WorkspaceCreate workspace_create),
        prepare: present!(Prepare prepare),
        forward: present!(Forward forward),
        truncate: present!(Truncate truncate),
        // The host pushes: a worker has no files of ours.
        load_from: None,
        digest: present!(Digest digest),
        // Pushed chunks are short, and between them the host stops by itself.
        cancel: None,
        stats: present!(Stats stats),
    }
}

fn exchange(
    entry: Entry,
    record: *mut ErrorRecord,
    encode: impl FnOnce(&mut Encoder, &mut Shared) -> std::io::Result<()>,
    decode: impl FnOnce(&mut Decoder<'_>, &Shared) -> Option<()>,
) -> Status {
    let worker = CURRENT.get();
    if worker.is_null() {
        return refuse(record, Status::INTERNAL, "a call without a worker");
    }
    // SAFETY: set by `Worker::enter` on this thread, which has not returned yet.
    unsafe { &*worker }.exchange(entry, record, encode, decode)
}

/// A call whose arguments are numbers and whose result is one struct.
fn simple<T: Plain>(entry: Entry, record: *mut ErrorRecord, numbers: &[u64], out: *mut T) -> Status {
    exchange(
        entry,
        record,
        |e, _| {
            numbers.iter().for_each(|n| e.put(*n));
            Ok(())
        },
        |d, _| {
            let own = d.take()?;
            // SAFETY: the caller's struct, as the module says.
            unsafe { out.write(own) };
            Some(())
        },
    )
}

/// A call whose arguments are numbers, and that has no result.
fn plain(entry: Entry, record: *mut ErrorRecord, numbers: &[u64]) -> Status {
    exchange(
        entry,
        record,
        |e, _| {
            numbers.iter().for_each(|n| e.put(*n));
            Ok(())
        },
        |_, _| Some(()),
    )
}

/// # Safety
/// `data` holds `count` elements, as the module says.
unsafe fn array<'a, T>(data: *const T, count: u64) -> &'a [T] {
    if count == 0 {
        return &[];
    }
    // SAFETY: passed on; the count comes from a slice of this process.
    unsafe { std::slice::from_raw_parts(data, count as usize) }
}

unsafe extern "C" fn device_count(count: *mut u32, error: *mut ErrorRecord) -> Status {
    simple(Entry::DeviceCount, error, &[], count)
}

unsafe extern "C" fn device_info(
    ordinal: u32,
    info: *mut abi::DeviceInfo,
    error: *mut ErrorRecord,
) -> Status {
    simple(Entry::DeviceInfo, error, &[ordinal.into()], info)
}

unsafe extern "C" fn device_open(
    ordinal: u32,
    options: *const abi::OpenOptions,
    device: *mut Handle,
    error: *mut ErrorRecord,
) -> Status {
    // SAFETY: the caller's struct, as the module says.
    let options = unsafe { options.read() };
    if options.flags & abi::OPTION_IMPORT != 0 {
        return refuse(
            error,
            Status::UNSUPPORTED,
            "a plugin in its own process cannot import mappings",
        );
    }
    exchange(
        Entry::DeviceOpen,
        error,
        |e, _| {
            e.put(ordinal);
            e.put(options);
            Ok(())
        },
        |d, _| {
            let own = d.take()?;
            // SAFETY: the caller's, as the module says.
            unsafe { device.write(own) };
            Some(())
        },
    )
}

unsafe extern "C" fn caps(device: Handle, caps: *mut abi::Caps, error: *mut ErrorRecord) -> Status {
    simple(Entry::Caps, error, &[device], caps)
}

unsafe extern "C" fn memory_info(
    device: Handle,
    memory: *mut abi::DeviceMemory,
    error: *mut ErrorRecord,
) -> Status {
    simple(Entry::MemoryInfo, error, &[device], memory)
}

/// # Safety
/// `plan` as the module says.
unsafe fn put_plan(e: &mut Encoder, plan: *const abi::PlanV) {
    // SAFETY: passed on.
    let plan = unsafe { plan.read() };
    // SAFETY: passed on; the stride is this crate's own.
    let tensors = unsafe { array(plan.tensors, plan.tensor_count) };
    e.put(plan);
    e.put_all(tensors);
    for t in tensors {
        // SAFETY: passed on.
        e.put_all(unsafe { array(t.name, t.name_len) });
    }
}

unsafe extern "C" fn plan_check(
    device: Handle,
    plan: *const abi::PlanV,
    report: *mut abi::PlanReport,
    error: *mut ErrorRecord,
) -> Status {
    // SAFETY: the caller's struct, as the module says.
    let mut own = unsafe { report.read() };
    let capacity = own.refusal_capacity;
    exchange(
        Entry::PlanCheck,
        error,
        |e, _| {
            e.put(device);
            // SAFETY: passed on.
            unsafe { put_plan(e, plan) };
            e.put(capacity);
            Ok(())
        },
        |d, _| {
            let theirs: abi::PlanReport = d.take()?;
            let refusals: Vec<abi::Refusal> = d.take_all()?;
            (own.bytes, own.refusal_count) = (theirs.bytes, theirs.refusal_count);
            let room = usize::try_from(capacity).ok()?;
            for (i, refusal) in refusals.into_iter().take(room).enumerate() {
                // SAFETY: below the capacity of the caller's array.
                let place = unsafe { own.refusals.add(i) };
                // SAFETY: as above.
                unsafe { place.write(refusal) };
            }
            // SAFETY: the caller's struct.
            unsafe { report.write(own) };
            Some(())
        },
    )
}

unsafe extern "C" fn load_begin(
    device: Handle,
    plan: *const abi::PlanV,
    load: *mut Handle,
    error: *mut ErrorRecord,
) -> Status {
    exchange(
        Entry::LoadBegin,
        error,
        |e, _| {
            e.put(device);
            // SAFETY: passed on.
            unsafe { put_plan(e, plan) };
            Ok(())
        },
        |d, _| {
            let own = d.take()?;
            // SAFETY: the caller's, as the module says.
            unsafe { load.write(own) };
            Some(())
        },
    )
}

unsafe extern "C" fn upload(load: Handle, chunk: *const abi::Chunk, error: *mut ErrorRecord) -> Status {
    // SAFETY: the caller's struct, as the module says.
    let chunk = unsafe { chunk.read() };
    exchange(
        Entry::Upload,
        error,
        |e, shared| {
            let len = chunk.len as usize;
            shared.grow(len)?;
            // SAFETY: the caller's bytes into shared memory that is as long. The worker reads them only after the
            // message that follows.
            unsafe { std::ptr::copy_nonoverlapping(chunk.data, shared.start(), len) };
            [load, chunk.tensor.into(), chunk.offset, chunk.len]
                .iter()
                .for_each(|n| e.put(*n));
            Ok(())
        },
        |_, _| Some(()),
    )
}

unsafe extern "C" fn load_commit(
    load: Handle,
    model: *mut Handle,
    receipt: *mut abi::LoadReceipt,
    error: *mut ErrorRecord,
) -> Status {
    exchange(
        Entry::LoadCommit,
        error,
        |e, _| {
            e.put(load);
            Ok(())
        },
        |d, _| {
            let (own, theirs) = (d.take()?, d.take()?);
            // SAFETY: the caller's, as the module says.
            unsafe { model.write(own) };
            // SAFETY: as above.
            unsafe { receipt.write(theirs) };
            Some(())
        },
    )
}

unsafe extern "C" fn load_abort(load: Handle, error: *mut ErrorRecord) -> Status {
    plain(Entry::LoadAbort, error, &[load])
}

unsafe extern "C" fn readback(
    model: Handle,
    tensor: u32,
    offset: u64,
    out: *mut u8,
    len: u64,
    error: *mut ErrorRecord,
) -> Status {
    exchange(
        Entry::Readback,
        error,
        |e, shared| {
            shared.grow(len as usize)?;
            [model, tensor.into(), offset, len].iter().for_each(|n| e.put(*n));
            Ok(())
        },
        |_, shared| {
            // SAFETY: the shared memory was grown to `len`, which the caller's buffer holds too.
            unsafe { std::ptr::copy_nonoverlapping(shared.start(), out, len as usize) };
            Some(())
        },
    )
}

unsafe extern "C" fn model_destroy(model: Handle, error: *mut ErrorRecord) -> Status {
    plain(Entry::ModelDestroy, error, &[model])
}

unsafe extern "C" fn device_close(device: Handle, error: *mut ErrorRecord) -> Status {
    plain(Entry::DeviceClose, error, &[device])
}

unsafe extern "C" fn shutdown(error: *mut ErrorRecord) -> Status {
    plain(Entry::Shutdown, error, &[])
}

unsafe extern "C" fn build_index(
    model: Handle,
    layout: *const abi::IndexLayout,
    receipt: *mut abi::IndexReceipt,
    error: *mut ErrorRecord,
) -> Status {
    // SAFETY: the caller's struct, as the module says.
    let layout = unsafe { layout.read() };
    exchange(
        Entry::BuildIndex,
        error,
        |e, _| {
            e.put(model);
            e.put(layout);
            // SAFETY: as above.
            e.put_all(unsafe { array(layout.entries, layout.entry_count) });
            Ok(())
        },
        |d, _| {
            let own = d.take()?;
            // SAFETY: the caller's, as the module says.
            unsafe { receipt.write(own) };
            Some(())
        },
    )
}

fn workspace(
    entry: Entry,
    handle: Handle,
    dims: *const abi::WorkspaceDims,
    bytes: *mut abi::WorkspaceBytes,
    error: *mut ErrorRecord,
) -> Status {
    // SAFETY: the caller's struct, as the module says.
    let dims = unsafe { dims.read() };
    exchange(
        entry,
        error,
        |e, _| {
            e.put(handle);
            e.put(dims);
            // SAFETY: as above.
            e.put_all(unsafe { array(dims.kv, dims.kv_count) });
            // SAFETY: as above.
            e.put_all(unsafe { array(dims.values, dims.value_count) });
            Ok(())
        },
        |d, _| {
            let own = d.take()?;
            // SAFETY: the caller's, as the module says.
            unsafe { bytes.write(own) };
            Some(())
        },
    )
}

unsafe extern "C" fn workspace_bytes(
    device: Handle,
    dims: *const abi::WorkspaceDims,
    bytes: *mut abi::WorkspaceBytes,
    error: *mut ErrorRecord,
) -> Status {
    workspace(Entry::WorkspaceBytes, device, dims, bytes, error)
}

unsafe extern "C" fn workspace_create(
    model: Handle,
    dims: *const abi::WorkspaceDims,
    bytes: *mut abi::WorkspaceBytes,
    error: *mut ErrorRecord,
) -> Status {
    workspace(Entry::WorkspaceCreate, model, dims, bytes, error)
}

unsafe extern "C" fn prepare(model: Handle, program: *const abi::Program, error: *mut ErrorRecord) -> Status {
    // SAFETY: the caller's struct, as the module says.
    let p = unsafe { program.read() };
    exchange(
        Entry::Prepare,
        error,
        |e, _| {
            e.put(model);
            e.put(p);
            // SAFETY: as above.
            e.put_all(unsafe { array(p.kv, p.kv_count) });
            // SAFETY: as above.
            e.put_all(unsafe { array(p.values, p.value_count) });
            // SAFETY: as above; the stride is this crate's own.
            e.put_all(unsafe { array(p.ops, p.op_count) });
            // SAFETY: as above.
            let tables = unsafe { array(p.tables, p.table_count) };
            e.put_all(tables);
            for t in tables {
                // SAFETY: as above.
                e.put_all(unsafe { array(t.data, u64::from(t.rows) * u64::from(t.cols)) });
            }
            Ok(())
        },
        |_, _| Some(()),
    )
}

unsafe extern "C" fn forward(
    model: Handle,
    batch: *const abi::Batch,
    outputs: *mut abi::Outputs,
    error: *mut ErrorRecord,
) -> Status {
    // SAFETY: the caller's structs, as the module says.
    let batch = unsafe { batch.read() };
    // SAFETY: as above.
    let out = unsafe { outputs.read() };
    exchange(
        Entry::Forward,
        error,
        |e, shared| {
            shared.grow(out.logits_count as usize * size_of::<f32>())?;
            e.put(model);
            // SAFETY: as above.
            let runs = unsafe { array(batch.runs, batch.run_count) };
            e.put(runs.len() as u64);
            for run in runs {
                e.put(run.sequence);
                // SAFETY: as above.
                e.put_all(unsafe { array(run.tokens, run.token_count.into()) });
                // SAFETY: as above.
                e.put_all(unsafe { array(run.want, run.token_count.into()) });
            }
            e.put(out.argmax_count);
            e.put(out.logits_count);
            Ok(())
        },
        |d, shared| {
            for i in 0..out.argmax_count as usize {
                let id: u32 = d.take()?;
                // SAFETY: below the count of the caller's array.
                let place = unsafe { out.argmax.add(i) };
                // SAFETY: as above.
                unsafe { place.write(id) };
            }
            let from = shared.start().cast::<f32>();
            if out.logits_count != 0 {
                // SAFETY: the shared memory was grown to as many floats and is aligned to pages.
                unsafe { std::ptr::copy_nonoverlapping(from, out.logits, out.logits_count as usize) };
            }
            Some(())
        },
    )
}

unsafe extern "C" fn truncate(model: Handle, sequence: u32, length: u32, error: *mut ErrorRecord) -> Status {
    plain(Entry::Truncate, error, &[model, sequence.into(), length.into()])
}

unsafe extern "C" fn digest(model: Handle, tensor: u32, digest: *mut u8, error: *mut ErrorRecord) -> Status {
    exchange(
        Entry::Digest,
        error,
        |e, _| {
            e.put(model);
            e.put(u64::from(tensor));
            Ok(())
        },
        |d, _| {
            let own: Vec<u8> = d.take_all().filter(|d: &Vec<u8>| d.len() == 32)?;
            // SAFETY: the caller's buffer holds the 32 bytes that the interface says.
            unsafe { std::ptr::copy_nonoverlapping(own.as_ptr(), digest, 32) };
            Some(())
        },
    )
}

unsafe extern "C" fn stats(
    device: Handle,
    out: *mut u8,
    capacity: u64,
    needed: *mut u64,
    error: *mut ErrorRecord,
) -> Status {
    exchange(
        Entry::Stats,
        error,
        |e, shared| {
            shared.grow(capacity as usize)?;
            e.put(device);
            e.put(capacity);
            Ok(())
        },
        |d, shared| {
            let own: u64 = d.take()?;
            // SAFETY: the caller's, as the module says.
            unsafe { needed.write(own) };
            if own <= capacity {
                // SAFETY: the shared memory was grown to `capacity`, which the caller's buffer holds too.
                unsafe { std::ptr::copy_nonoverlapping(shared.start(), out, own as usize) };
            }
            Some(())
        },
    )
}
