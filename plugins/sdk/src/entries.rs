//! The functions of the table. Each checks what C passed, finds the device, catches what unwinds, and fills the record.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hoist_backend::{
    Chunk, DeviceInfo, Error, LoadWatch, Mapping, Outputs, Progress, Provider, Run, SequenceId, SourceFile,
    State, TokenBatch, Want, WeightClass, WeightId, WeightSource,
};
use hoist_plugin_abi as abi;
use hoist_plugin_abi::{ErrorRecord, Handle, Host, Plugin, Status};

use crate::convert::{self, Checked, check_place, read_struct, slice, write_if_wanted, write_struct};
use crate::device::{Device, DeviceState, no_decoder};
use crate::handles::{Kind, Table, decode, encode};
use crate::report::Problem;
use crate::{notes, panics};

/// The author's provider, made by `open` and dropped by `shutdown`.
static PROVIDER: Mutex<Option<Arc<dyn Provider>>> = Mutex::new(None);
static DEVICES: Table<Device> = Table::new();

static TABLE: Plugin = Plugin {
    struct_size: size_of::<Plugin>() as u32,
    reserved: 0,
    device_count: Some(device_count),
    device_info: Some(device_info),
    device_open: Some(device_open),
    caps: Some(caps),
    memory_info: Some(memory_info),
    plan_check: Some(plan_check),
    load_begin: Some(load_begin),
    upload: Some(upload),
    load_commit: Some(load_commit),
    load_abort: Some(load_abort),
    readback: Some(readback),
    model_destroy: Some(model_destroy),
    device_close: Some(device_close),
    shutdown: Some(shutdown),
    build_index: Some(build_index),
    workspace_bytes: Some(workspace_bytes),
    workspace_create: Some(workspace_create),
    prepare: Some(prepare),
    forward: Some(forward),
    truncate: Some(truncate),
    load_from: Some(load_from),
    digest: Some(digest),
    cancel: Some(cancel),
    stats: Some(stats),
};

/// The table of a backend that only holds weights: a plugin claims `forward` exactly if it can be called.
static RESIDENCY_TABLE: Plugin = Plugin {
    workspace_bytes: None,
    workspace_create: None,
    prepare: None,
    forward: None,
    truncate: None,
    ..TABLE
};

/// What `hoist_plugin_open_v1` does.
///
/// # Safety
/// As `hoist_plugin.h` says of the entry.
#[doc(hidden)]
pub unsafe fn open(
    make: fn() -> Box<dyn Provider>,
    decodes: bool,
    host: *const Host,
    minor: u32,
    plugin: *mut *const Plugin,
    error: *mut ErrorRecord,
) -> Status {
    guard(error, || {
        // SAFETY: passed on.
        let host = unsafe { read_struct(host, "host") }?;
        check_place(plugin, "plugin")?;
        if !(abi::ABI_MINOR_MIN..=abi::ABI_MINOR_MAX).contains(&minor) {
            return Err(Problem::new(
                Status::VERSION,
                format!(
                    "minor {minor} is not in {}..={}",
                    abi::ABI_MINOR_MIN,
                    abi::ABI_MINOR_MAX
                ),
            ));
        }
        panics::tell(&host);
        *lock(&PROVIDER) = Some(make().into());
        let table = if decodes { &TABLE } else { &RESIDENCY_TABLE };
        // SAFETY: checked above; the caller vouches for the rest.
        unsafe { plugin.write(table) };
        Ok(())
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a call: its problem, or its panic, becomes a status and a record.
fn guard(error: *mut ErrorRecord, call: impl FnOnce() -> Checked<()>) -> Status {
    let problem = match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(())) => return Status::OK,
        Ok(Err(problem)) => problem,
        Err(panic) => Problem::new(Status::PANIC, panics::message(&*panic)),
    };
    // SAFETY: NULL, or a record of the caller's.
    unsafe { problem.write(error) };
    problem.status
}

fn provider() -> Checked<Arc<dyn Provider>> {
    lock(&PROVIDER)
        .clone()
        .ok_or_else(|| Problem::new(Status::BAD_STATE, "the plugin is shut down"))
}

fn find(handle: Handle) -> Checked<Arc<Device>> {
    let parts = decode(handle, Kind::Device).map_err(stale)?;
    DEVICES.find(parts).map_err(stale)
}

fn stale(status: Status) -> Problem {
    Problem::new(status, "the handle is 0, stale, or of another kind")
}

/// Runs a serial call on a device. What unwinds poisons it.
fn serial<T>(device: &Device, call: impl FnOnce(&mut DeviceState) -> Checked<T>) -> Checked<T> {
    let mut state = device.enter()?;
    match catch_unwind(AssertUnwindSafe(|| call(&mut state))) {
        Ok(result) => result,
        Err(panic) => {
            let message = panics::message(&*panic);
            state.poisoned = Some((Status::PANIC, message.clone()));
            Err(Problem::new(Status::PANIC, message))
        }
    }
}

/// Runs a serial call on the device of a load or model, if the handle is the current one.
fn on_child<T>(
    handle: Handle,
    kind: Kind,
    call: impl FnOnce(&Device, &mut DeviceState) -> Checked<T>,
) -> Checked<T> {
    let child = decode(handle, kind).map_err(stale)?;
    let generation = Device::parts_of_device(child);
    let device = DEVICES
        .find_by_low_generation(child.index, generation)
        .map_err(stale)?;
    serial(&device, |state| {
        let is_load = state.state == State::Loading;
        let exists = if kind == Kind::Load {
            is_load
        } else {
            state.state >= State::Loaded
        };
        if !exists || device.child(state) != child {
            return Err(stale(Status::BAD_HANDLE));
        }
        call(&device, state)
    })
}

fn string<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    let mut end = text.len().min(N - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    field[..end].copy_from_slice(&text.as_bytes()[..end]);
    field
}

fn devices() -> Checked<Vec<DeviceInfo>> {
    match provider()?.devices() {
        Ok(devices) => Ok(devices),
        Err(Error::Unavailable { .. }) => Ok(Vec::new()),
        Err(e) => Err(Problem::of(&e, None)),
    }
}

unsafe extern "C" fn device_count(count: *mut u32, error: *mut ErrorRecord) -> Status {
    guard(error, || {
        check_place(count, "count")?;
        let n = u32::try_from(devices()?.len())
            .map_err(|_| Problem::new(Status::INTERNAL, "too many devices"))?;
        // SAFETY: checked above; the caller vouches for the rest.
        unsafe { count.write(n) };
        Ok(())
    })
}

unsafe extern "C" fn device_info(
    ordinal: u32,
    info: *mut abi::DeviceInfo,
    error: *mut ErrorRecord,
) -> Status {
    guard(error, || {
        let devices = devices()?;
        let device = devices
            .get(ordinal as usize)
            .ok_or_else(|| Problem::invalid(format!("device {ordinal} of {}", devices.len())))?;
        let own = abi::DeviceInfo {
            struct_size: size_of::<abi::DeviceInfo>() as u32,
            ordinal,
            id: string(&device.id),
            name: string(&device.name),
            total_memory: device.total_memory,
        };
        // SAFETY: passed on.
        unsafe { write_struct(info, &own, "info") }
    })
}

unsafe extern "C" fn device_open(
    ordinal: u32,
    options: *const abi::OpenOptions,
    device: *mut Handle,
    error: *mut ErrorRecord,
) -> Status {
    guard(error, || {
        check_place(device, "device")?;
        // SAFETY: passed on.
        let options = unsafe { convert::open_options(options) }?;
        let backend = provider()?
            .open(ordinal, &options)
            .map_err(|e| Problem::of(&e, None))?;
        let parts = DEVICES
            .insert(|parts| Device::new(parts, backend))
            .map_err(|s| Problem::new(s, "too many devices"))?;
        // SAFETY: checked above; the caller vouches for the rest.
        unsafe { device.write(encode(Kind::Device, parts)) };
        Ok(())
    })
}

unsafe extern "C" fn caps(device: Handle, caps: *mut abi::Caps, error: *mut ErrorRecord) -> Status {
    guard(error, || {
        let own = serial(&*find(device)?, |state| Ok(convert::caps(state.backend.info())))?;
        // SAFETY: passed on.
        unsafe { write_struct(caps, &own, "caps") }
    })
}

unsafe extern "C" fn memory_info(
    device: Handle,
    memory: *mut abi::DeviceMemory,
    error: *mut ErrorRecord,
) -> Status {
    guard(error, || {
        let info = serial(&*find(device)?, |state| {
            state.check_poison()?;
            state.ask(|b| b.memory())
        })?;
        let mut own = abi::DeviceMemory::default();
        for d in &info.devices {
            let r = d.resident;
            own.total = own.total.saturating_add(d.total);
            own.free = own.free.saturating_add(d.free);
            own.budget = own.budget.saturating_add(d.budget.map_or(0, |b| b));
            own.imported = own.imported.saturating_add(d.mapped);
            let classes = [r.quantized, r.float, r.gamma, r.bias, r.index, r.kv, r.workspace];
            for (sum, n) in own.resident.iter_mut().zip(classes) {
                *sum = sum.saturating_add(n);
            }
        }
        // SAFETY: passed on.
        unsafe { write_struct(memory, &own, "memory") }
    })
}

unsafe extern "C" fn plan_check(
    device: Handle,
    plan: *const abi::PlanV,
    report: *mut abi::PlanReport,
    error: *mut ErrorRecord,
) -> Status {
    guard(error, || {
        // SAFETY: passed on.
        let (plan, mut refused) = unsafe { convert::plan(plan) }?;
        // SAFETY: passed on.
        let mut own = unsafe { read_struct(report.cast_const(), "report") }?;
        serial(&*find(device)?, |state| {
            state.expect("plan_check", State::Empty)?;
            let info = state.backend.info();
            for w in &plan.weights {
                if !info.stored.contains(w.encoding) {
                    refused.push((w.id.0, format!("{} is not stored", w.encoding)));
                } else if let Some(broken) = info.limits.broken_by(w.encoding, w.shape, w.nbytes) {
                    refused.push((w.id.0, broken.to_string()));
                }
            }
            Ok(())
        })?;
        own.bytes = convert::four(&plan.resident);
        own.refusal_count = refused.len() as u64;
        let room = usize::try_from(own.refusal_capacity).map_or(usize::MAX, |n| n);
        if !own.refusals.is_null() && own.refusals.is_aligned() {
            for (i, (tensor, reason)) in refused.iter().take(room).enumerate() {
                let refusal = abi::Refusal {
                    tensor: *tensor,
                    code: Status::UNSUPPORTED.0,
                    reason: string(reason),
                };
                // SAFETY: `i` is below the capacity that the caller vouches for.
                let place = unsafe { own.refusals.add(i) };
                // SAFETY: as above.
                unsafe { place.write(refusal) };
            }
        }
        // SAFETY: passed on.
        unsafe { write_struct(report, &own, "report") }
    })
}

unsafe extern "C" fn load_begin(
    device: Handle,
    plan: *const abi::PlanV,
    load: *mut Handle,
    error: *mut ErrorRecord,
) -> Status {
    guard(error, || {
        check_place(load, "load")?;
        // SAFETY: passed on.
        let (plan, refused) = unsafe { convert::plan(plan) }?;
        if let Some((tensor, reason)) = refused.into_iter().next() {
            return Err(Problem {
                tensor,
                ..Problem::new(Status::UNSUPPORTED, reason)
            });
        }
        let device = find(device)?;
        let handle = serial(&device, |state| {
            state.expect("load_begin", State::Empty)?;
            state
                .backend
                .begin_load(&plan)
                .map_err(|e| Problem::of(&e, Some(&plan)))?;
            state.plan = Some(plan);
            state.state = State::Loading;
            state.epoch = state.epoch.wrapping_add(1);
            Ok(device.handle(Kind::Load, state))
        })?;
        // SAFETY: checked above; the caller vouches for the rest.
        unsafe { load.write(handle) };
        Ok(())
    })
}

unsafe extern "C" fn upload(load: Handle, chunk: *const abi::Chunk, error: *mut ErrorRecord) -> Status {
    guard(error, || {
        // SAFETY: passed on.
        let c = unsafe { read_struct(chunk, "chunk") }?;
        // The bytes may be copied even where they could be used in place.
        if c.semantics > abi::UPLOAD_IMPORT_UNTIL_RELEASE {
            return Err(Problem::invalid(format!("semantics {} are unknown", c.semantics)));
        }
        // SAFETY: passed on.
        let bytes = unsafe { slice(c.data, c.len, "data") }?;
        on_child(load, Kind::Load, |_, state| {
            state.check_poison()?;
            let class = state
                .plan
                .as_ref()
                .and_then(|p| p.weights.get(c.tensor as usize))
                .map(|w| w.class);
            let class =
                class.ok_or_else(|| Problem::invalid(format!("tensor {} is not in the plan", c.tensor)))?;
            let chunk = Chunk {
                weight: WeightId(c.tensor),
                offset: c.offset,
                bytes,
            };
            state.ask(|b| match class {
                WeightClass::Quantized => b.upload_quantized(chunk),
                WeightClass::Float | WeightClass::Bias => b.upload_f32(chunk),
                WeightClass::Gamma => b.upload_gamma(chunk),
            })
        })
    })
}

/// The host's callbacks as a source and a watch.
struct Callbacks<'a> {
    c: abi::LoadCallbacks,
    /// Set by `cancel`.
    cancelled: &'a AtomicBool,
}

// SAFETY: the host's callbacks may be called from any thread, concurrently.
unsafe impl Sync for Callbacks<'_> {}

impl WeightSource for Callbacks<'_> {
    fn read_at(&self, weight: WeightId, offset: u64, out: &mut [u8]) -> hoist_backend::Result<()> {
        let len = out.len() as u64;
        let fail = |what: String| Error::SourceIo {
            file: "the host".into(),
            offset,
            len,
            error: std::io::Error::other(what),
        };
        let f = self.c.read_at.ok_or_else(|| fail("`read_at` is NULL".into()))?;
        // SAFETY: `out` holds the bytes that are written; the context is the host's own.
        match unsafe { f(self.c.context, weight.0, offset, out.as_mut_ptr(), len) } {
            Status::OK => Ok(()),
            Status::CANCELLED => Err(Error::Cancelled),
            status => Err(fail(format!(
                "`read_at` returned {}",
                status.name().unwrap_or("an unknown status")
            ))),
        }
    }

    fn files(&self) -> &[SourceFile] {
        &[]
    }

    fn share(&self, _: u32) -> Option<Arc<dyn Mapping>> {
        None
    }

    fn check_unchanged(&self) -> hoist_backend::Result<()> {
        Ok(())
    }
}

impl LoadWatch for Callbacks<'_> {
    fn progress(&self, progress: Progress) {
        if let Some(f) = self.c.progress {
            // SAFETY: the context is the host's own. Whether to stop is asked in `cancelled`.
            let _ = unsafe { f(self.c.context, progress.done) };
        }
    }

    fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
            || self
                .c
                .progress
                // SAFETY: as above.
                .is_some_and(|f| unsafe { f(self.c.context, 0) } == Status::CANCELLED)
    }
}

unsafe extern "C" fn load_from(
    load: Handle,
    callbacks: *const abi::LoadCallbacks,
    error: *mut ErrorRecord,
) -> Status {
    guard(error, || {
        // SAFETY: passed on.
        let c = unsafe { read_struct(callbacks, "callbacks") }?;
        on_child(load, Kind::Load, |device, state| {
            state.check_poison()?;
            device.cancelled.store(false, Ordering::Relaxed);
            let callbacks = Callbacks {
                c,
                cancelled: &device.cancelled,
            };
            let plan = state
                .plan
                .take()
                .ok_or_else(|| Problem::new(Status::INTERNAL, "a load without a plan"))?;
            let done = state.backend.load_from(&plan, &callbacks, &callbacks);
            state.plan = Some(plan);
            done.map_err(|e| state.problem(&e))
        })
    })
}

unsafe extern "C" fn cancel(device: Handle, error: *mut ErrorRecord) -> Status {
    guard(error, || {
        // Not entered: the call that is to end is in there.
        find(device)?.cancelled.store(true, Ordering::Relaxed);
        Ok(())
    })
}

unsafe extern "C" fn stats(
    device: Handle,
    out: *mut u8,
    capacity: u64,
    needed: *mut u64,
    error: *mut ErrorRecord,
) -> Status {
    guard(error, || {
        check_place(needed, "needed")?;
        let text = serial(&*find(device)?, |state| {
            state.expect_at_least("stats", State::Loaded)?;
            Ok(state.notes.clone())
        })?;
        let len = text.len() as u64;
        // SAFETY: checked above; the caller vouches for the rest.
        unsafe { needed.write(len) };
        if len <= capacity {
            // SAFETY: the caller vouches for `capacity` writable bytes.
            unsafe { slice_mut(out, len, "out") }?.copy_from_slice(text.as_bytes());
        }
        Ok(())
    })
}

unsafe extern "C" fn load_commit(
    load: Handle,
    model: *mut Handle,
    receipt: *mut abi::LoadReceipt,
    error: *mut ErrorRecord,
) -> Status {
    guard(error, || {
        check_place(model, "model")?;
        let (handle, own) = on_child(load, Kind::Load, |device, state| {
            state.check_poison()?;
            let r = state.ask(|b| b.finish_load())?;
            state.state = State::Loaded;
            state.notes = notes::json(&r.notes);
            let own = abi::LoadReceipt {
                struct_size: size_of::<abi::LoadReceipt>() as u32,
                tensors: r.weights,
                bytes: convert::four(&r.resident),
                imported: r.mapped,
            };
            Ok((device.handle(Kind::Model, state), own))
        })?;
        // SAFETY: checked above; the caller vouches for the rest.
        unsafe { model.write(handle) };
        // SAFETY: passed on.
        unsafe { write_if_wanted(receipt, &own, "receipt") }
    })
}

unsafe extern "C" fn load_abort(load: Handle, error: *mut ErrorRecord) -> Status {
    guard(error, || {
        on_child(load, Kind::Load, |_, state| {
            let done = state.backend.abort_load();
            state.emptied();
            done.map_err(|e| state.problem(&e))
        })
    })
}

unsafe extern "C" fn readback(
    model: Handle,
    tensor: u32,
    offset: u64,
    out: *mut u8,
    len: u64,
    error: *mut ErrorRecord,
) -> Status {
    guard(error, || {
        // SAFETY: passed on.
        let out = unsafe { slice_mut(out, len, "out") }?;
        on_child(model, Kind::Model, |_, state| {
            state.check_poison()?;
            state.ask(|b| b.read_back(WeightId(tensor), offset, out))
        })
    })
}

/// # Safety
/// `data` is valid for writing `count` elements, and nobody else uses them, as long as the result is used.
unsafe fn slice_mut<'a, T>(data: *mut T, count: u64, what: &str) -> Checked<&'a mut [T]> {
    if count == 0 {
        return Ok(&mut []);
    }
    // SAFETY: the checks are those of a shared slice; the caller vouches for the rest.
    let checked = unsafe { slice(data.cast_const(), count, what) }?.len();
    // SAFETY: as the caller vouches.
    Ok(unsafe { std::slice::from_raw_parts_mut(data, checked) })
}

unsafe extern "C" fn digest(model: Handle, tensor: u32, digest: *mut u8, error: *mut ErrorRecord) -> Status {
    guard(error, || {
        // SAFETY: passed on.
        let out = unsafe { slice_mut(digest, 32, "digest") }?;
        let own = on_child(model, Kind::Model, |_, state| {
            state.check_poison()?;
            state.ask(|b| b.digest(WeightId(tensor)))
        })?;
        let own = own.ok_or_else(|| Problem::new(Status::UNSUPPORTED, "the device computes no digests"))?;
        out.copy_from_slice(&own);
        Ok(())
    })
}

unsafe extern "C" fn model_destroy(model: Handle, error: *mut ErrorRecord) -> Status {
    guard(error, || {
        on_child(model, Kind::Model, |_, state| {
            let done = state.backend.unload();
            state.emptied();
            done.map_err(|e| state.problem(&e))
        })
    })
}

unsafe extern "C" fn device_close(device: Handle, error: *mut ErrorRecord) -> Status {
    guard(error, || {
        let parts = decode(device, Kind::Device).map_err(stale)?;
        // Entered first, so that a call that is still running keeps its device.
        let open = DEVICES.find(parts).map_err(stale)?;
        let state = open.enter()?;
        DEVICES.remove(parts).map_err(stale)?;
        drop(state);
        Ok(())
    })
}

unsafe extern "C" fn shutdown(error: *mut ErrorRecord) -> Status {
    guard(error, || {
        if !DEVICES.is_empty() {
            return Err(Problem::new(Status::BAD_STATE, "a device is open"));
        }
        // The host's log must not be called after this, however it ends.
        let _quiet = panics::Untell;
        let provider = lock(&PROVIDER).take();
        provider
            .map(drop)
            .ok_or_else(|| Problem::new(Status::BAD_STATE, "the plugin is shut down"))
    })
}

unsafe extern "C" fn build_index(
    model: Handle,
    layout: *const abi::IndexLayout,
    receipt: *mut abi::IndexReceipt,
    error: *mut ErrorRecord,
) -> Status {
    guard(error, || {
        // SAFETY: passed on.
        let layout = unsafe { convert::index_layout(layout) }?;
        let own = on_child(model, Kind::Model, |_, state| {
            state.expect("build_index", State::Loaded)?;
            let r = state.ask(|b| b.build_index(&layout))?;
            state.state = State::Indexed;
            Ok(abi::IndexReceipt {
                struct_size: size_of::<abi::IndexReceipt>() as u32,
                layers: r.layers,
                entries: r.entries,
                reserved: 0,
                bytes: r.bytes,
            })
        })?;
        // SAFETY: passed on.
        unsafe { write_if_wanted(receipt, &own, "receipt") }
    })
}

fn c_bytes(b: hoist_backend::WorkspaceBytes) -> abi::WorkspaceBytes {
    abi::WorkspaceBytes {
        struct_size: size_of::<abi::WorkspaceBytes>() as u32,
        reserved: 0,
        kv: b.kv,
        workspace: b.workspace,
    }
}

unsafe extern "C" fn workspace_bytes(
    device: Handle,
    dims: *const abi::WorkspaceDims,
    bytes: *mut abi::WorkspaceBytes,
    error: *mut ErrorRecord,
) -> Status {
    guard(error, || {
        // SAFETY: passed on.
        let dims = unsafe { convert::workspace_dims(dims) }?;
        let own = serial(&*find(device)?, |state| {
            state.check_poison()?;
            state.ask(|b| b.workspace_bytes(&dims))
        })?;
        // SAFETY: passed on.
        unsafe { write_struct(bytes, &c_bytes(own), "bytes") }
    })
}

unsafe extern "C" fn workspace_create(
    model: Handle,
    dims: *const abi::WorkspaceDims,
    bytes: *mut abi::WorkspaceBytes,
    error: *mut ErrorRecord,
) -> Status {
    guard(error, || {
        // SAFETY: passed on.
        let dims = unsafe { convert::workspace_dims(dims) }?;
        let own = on_child(model, Kind::Model, |_, state| {
            state.expect("workspace_create", State::Indexed)?;
            let own = state.ask(|b| b.init_workspace(&dims))?;
            state.step.wants = Vec::with_capacity(dims.capacity.max_batch_tokens as usize);
            state.step.runs = Vec::with_capacity(dims.capacity.max_sequences as usize);
            state.state = State::Ready;
            Ok(own)
        })?;
        // SAFETY: passed on.
        unsafe { write_if_wanted(bytes, &c_bytes(own), "bytes") }
    })
}

unsafe extern "C" fn prepare(model: Handle, program: *const abi::Program, error: *mut ErrorRecord) -> Status {
    guard(error, || {
        // SAFETY: passed on.
        let program = unsafe { convert::program(program) }?;
        on_child(model, Kind::Model, |_, state| {
            state.expect_at_least("prepare", State::Ready)?;
            state.ask_decoder(|d| d.prepare(&program))?;
            state.state = State::Prepared;
            Ok(())
        })
    })
}

unsafe extern "C" fn forward(
    model: Handle,
    batch: *const abi::Batch,
    outputs: *mut abi::Outputs,
    error: *mut ErrorRecord,
) -> Status {
    guard(error, || {
        // SAFETY: passed on.
        let batch = unsafe { read_struct(batch, "batch") }?;
        // SAFETY: passed on.
        let out = unsafe { read_struct(outputs.cast_const(), "outputs") }?;
        // SAFETY: passed on.
        let c_runs = unsafe { slice(batch.runs, batch.run_count, "runs") }?;
        // SAFETY: passed on.
        let argmax = unsafe { slice_mut(out.argmax, out.argmax_count, "argmax") }?;
        // SAFETY: passed on.
        let logits = unsafe { slice_mut(out.logits, out.logits_count, "logits") }?;
        on_child(model, Kind::Model, |_, state| {
            state.expect("forward", State::Prepared)?;
            let DeviceState { backend, step, .. } = &mut *state;
            let mut wants = std::mem::take(&mut step.wants);
            let mut runs = std::mem::take(&mut step.runs);
            // SAFETY: the caller vouches for the arrays of the batch during this call; `runs` is emptied before it ends.
            let done = unsafe { lay_out(c_runs, &mut wants, &mut runs) }.map(|()| {
                let decoder = backend.as_decode();
                decoder.map(|d| d.forward(&TokenBatch { runs: &runs }, &mut Outputs { argmax, logits }))
            });
            runs.clear();
            wants.clear();
            (step.wants, step.runs) = (wants, runs);
            done?.ok_or_else(no_decoder)?.map_err(|e| state.problem(&e))
        })
    })
}

/// Lays a batch of C's out for the contract, in buffers that exist.
///
/// # Safety
/// The arrays of `c_runs` are valid, and `wants` is not touched, until `runs` is emptied.
unsafe fn lay_out(c_runs: &[abi::Run], wants: &mut Vec<Want>, runs: &mut Vec<Run<'static>>) -> Checked<()> {
    wants.clear();
    runs.clear();
    let tokens = c_runs
        .iter()
        .map(|r| r.token_count as usize)
        .try_fold(0, usize::checked_add);
    let room = tokens.is_some_and(|t| t <= wants.capacity()) && c_runs.len() <= runs.capacity();
    if !room {
        return Err(Problem::invalid(format!(
            "a batch of {} runs and {tokens:?} tokens exceeds the workspace",
            c_runs.len()
        )));
    }
    for run in c_runs {
        // SAFETY: passed on.
        for want in unsafe { slice(run.want, u64::from(run.token_count), "want") }? {
            wants.push(match *want {
                abi::WANT_NOTHING => Want::Nothing,
                abi::WANT_ARGMAX => Want::ArgMax,
                abi::WANT_LOGITS => Want::Logits,
                other => return Err(Problem::invalid(format!("want {other} is unknown"))),
            });
        }
    }
    let mut at = 0;
    for run in c_runs {
        // SAFETY: passed on.
        let tokens = unsafe { slice(run.tokens, u64::from(run.token_count), "tokens") }?;
        let want = wants[at..at + tokens.len()].as_ptr();
        // SAFETY: within `wants`, which has all tokens of all runs and does not move until `runs` is emptied.
        let want = unsafe { std::slice::from_raw_parts(want, tokens.len()) };
        at += tokens.len();
        runs.push(Run {
            sequence: SequenceId(run.sequence),
            tokens,
            want,
        });
    }
    Ok(())
}

unsafe extern "C" fn truncate(model: Handle, sequence: u32, length: u32, error: *mut ErrorRecord) -> Status {
    guard(error, || {
        on_child(model, Kind::Model, |_, state| {
            state.expect("truncate", State::Prepared)?;
            state.ask_decoder(|d| d.truncate(SequenceId(sequence), length))
        })
    })
}
