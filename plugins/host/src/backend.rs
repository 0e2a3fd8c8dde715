//! A device of a plugin, as a backend. Whatever crosses back is checked here.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};
use std::time::Duration;

use hoist_backend::{
    BackendInfo, Chunk, DecodeBackend, DecodeProgram, DeviceInfo, Error, FloatLayout, IndexLayout,
    IndexReceipt, Lifecycle, LoadPlan, LoadReceipt, LoadWatch, Mapping, MemoryByClass, MemoryInfo, OpName,
    OpenOptions, Outputs, Phase, Progress, Result, SequenceId, State, TokenBatch, UnsupportedWhat,
    UploadLedger, Want, WeightBackend, WeightClass, WeightId, WeightSource, WorkspaceBytes, WorkspaceDims,
    check_read_back, push_all,
};
use hoist_plugin_abi as abi;
use hoist_plugin_abi::{Handle, Status};

use crate::convert::{self, DimsArrays, ProgramArrays};
use crate::header::{shown, text};
use crate::library::{Failure, Loaded};
use crate::parting;

/// One open device of a plugin.
pub(crate) struct PluginBackend {
    loaded: Arc<Loaded>,
    info: BackendInfo,
    device: Handle,
    load: Handle,
    model: Handle,
    lifecycle: Lifecycle,
    /// Set once the plugin lost its device or unwound: every later call but the destroying ones says so again.
    poisoned: OnceLock<String>,
    import: bool,
    weights: Vec<WeightFacts>,
    /// What arrived, as the host saw it; a plugin's own account is checked against it.
    ledger: Option<UploadLedger>,
    /// Whether `load_from` of the plugin moved the bytes, so that the ledger saw none.
    pulled: bool,
    /// Mappings that imported weights live in.
    imports: Vec<Arc<dyn Mapping>>,
    decode: Decode,
}

struct WeightFacts {
    name: String,
    nbytes: u64,
    granule: u64,
}

/// What the host keeps for decoding: lengths, and buffers so that a step allocates nothing.
#[derive(Default)]
struct Decode {
    vocab: u32,
    max_context: u32,
    max_batch_tokens: u32,
    lengths: Vec<u32>,
    seen: Vec<bool>,
    runs: Vec<abi::Run>,
    wants: Vec<u8>,
}

// SAFETY: the raw pointers in `Decode::runs` are dead between calls; everything else is `Send`. The interface allows a
// device's calls to come from changing threads.
unsafe impl Send for PluginBackend {}

macro_rules! required {
    ($self:ident, $entry:ident) => {
        match $self.loaded.table.$entry {
            Some(f) => f,
            None => return Err($self.unsupported(stringify!($entry))),
        }
    };
}

impl PluginBackend {
    pub(crate) fn open(
        loaded: Arc<Loaded>,
        provider: &str,
        device: &DeviceInfo,
        options: &OpenOptions,
    ) -> Result<Self> {
        let refuse = |what: &str| Error::Unsupported {
            backend: provider.to_owned(),
            what: UnsupportedWhat::Other(what.to_owned()),
        };
        if options.memory_budget == Some(0) {
            return Err(Error::invalid("memory budget", "at least 1 byte", 0));
        }
        let mut flags = 0;
        if options.import {
            flags |= abi::OPTION_IMPORT;
        }
        if options.force_scalar {
            flags |= abi::OPTION_FORCE_SCALAR;
        }
        let c_options = abi::OpenOptions {
            struct_size: size_of::<abi::OpenOptions>() as u32,
            flags,
            memory_budget: options.memory_budget.map_or(0, |b| b),
            threads: options.threads.map_or(0, |t| t),
            reserved: 0,
        };
        let mut handle = 0;
        let f = loaded.table.device_open.ok_or_else(|| refuse("`device_open`"))?;
        loaded
            // SAFETY: all pointers are valid for the call.
            .call(|record| unsafe { f(device.ordinal, &c_options, &mut handle, record) })
            .map_err(|failure| match failure.status {
                Status::UNSUPPORTED => refuse(&failure.explain()),
                Status::OUT_OF_DEVICE_MEMORY | Status::OUT_OF_HOST_MEMORY => {
                    out_of_memory(&device.id, "opening", &failure)
                }
                _ => Error::Unavailable {
                    backend: provider.to_owned(),
                    reason: format!("`device_open`: {}", failure.explain()),
                    hint: None,
                },
            })?;
        if handle == 0 {
            return Err(Error::internal(
                provider,
                "`device_open` returned OK and the invalid handle 0",
            ));
        }
        let close = |loaded: &Loaded| {
            if let Some(f) = loaded.table.device_close {
                // SAFETY: the handle is open. A failure to close changes nothing in what is reported.
                let _ = loaded.call(|record| unsafe { f(handle, record) });
            }
        };
        match Self::ask(&loaded, provider, device, handle) {
            Ok(info)
                if options
                    .float_layout
                    .is_some_and(|wanted| wanted != info.float_layout) =>
            {
                close(&loaded);
                Err(refuse("another layout of float matrices than its own"))
            }
            Ok(info) => Ok(Self {
                loaded,
                info,
                device: handle,
                load: 0,
                model: 0,
                lifecycle: Lifecycle::default(),
                poisoned: OnceLock::new(),
                import: options.import,
                weights: Vec::new(),
                ledger: None,
                pulled: false,
                imports: Vec::new(),
                decode: Decode::default(),
            }),
            Err(e) => {
                close(&loaded);
                Err(e)
            }
        }
    }

    /// Asks an open device for its capabilities and memory.
    fn ask(loaded: &Loaded, provider: &str, device: &DeviceInfo, handle: Handle) -> Result<BackendInfo> {
        let bad = |what: String| Error::internal(provider, what);
        let mut caps = abi::Caps {
            struct_size: size_of::<abi::Caps>() as u32,
            ..abi::Caps::default()
        };
        let f = loaded.table.caps.ok_or_else(|| bad("`caps` is NULL".into()))?;
        loaded
            // SAFETY: all pointers are valid for the call.
            .call(|record| unsafe { f(handle, &mut caps, record) })
            .map_err(|failure| lost_or_internal(provider, &device.id, "caps", &failure))?;
        let memory = Self::ask_memory(loaded, provider, device, handle)?;
        let info = convert::backend_info(&caps, provider, &device.id, &device.name, memory)
            .map_err(|what| bad(format!("`caps`: {what}")))?;
        let decodes = loaded.table.forward.is_some();
        if decodes == info.ops.iter().next().is_none() {
            return Err(bad(if decodes {
                "it has a `forward` and claims no operation".into()
            } else {
                "it claims operations and has no `forward`".into()
            }));
        }
        Ok(info)
    }

    fn ask_memory(
        loaded: &Loaded,
        provider: &str,
        device: &DeviceInfo,
        handle: Handle,
    ) -> Result<MemoryInfo> {
        let mut memory = abi::DeviceMemory {
            struct_size: size_of::<abi::DeviceMemory>() as u32,
            ..abi::DeviceMemory::default()
        };
        let f = loaded
            .table
            .memory_info
            .ok_or_else(|| Error::internal(provider, "`memory_info` is NULL"))?;
        loaded
            // SAFETY: all pointers are valid for the call.
            .call(|record| unsafe { f(handle, &mut memory, record) })
            .map_err(|failure| lost_or_internal(provider, &device.id, "memory_info", &failure))?;
        Ok(convert::memory(&device.id, &memory))
    }

    fn unsupported(&self, call: &'static str) -> Error {
        Error::Unsupported {
            backend: self.info.name.clone(),
            what: UnsupportedWhat::Call(call),
        }
    }

    fn check_poison(&self) -> Result<()> {
        match self.poisoned.get() {
            None => Ok(()),
            Some(reason) => Err(Error::DeviceLost {
                device: self.info.device.clone(),
                reason: reason.clone(),
            }),
        }
    }

    /// Remembers that the device was lost.
    fn note(&self, error: &Error) {
        if let Error::DeviceLost { reason, .. } = error {
            self.poisoned.get_or_init(|| reason.clone());
        }
    }

    fn weight_name(&self, tensor: u32) -> String {
        self.weights
            .get(tensor as usize)
            .map_or_else(|| format!("tensor {tensor}"), |w| w.name.clone())
    }

    /// A failed call as a typed error; poisons the device where the interface says so.
    fn error(&self, call: &'static str, failure: &Failure) -> Error {
        let explained = format!("`{call}`: {}", failure.explain());
        let record = &failure.record;
        match failure.status {
            Status::DEVICE_LOST | Status::PANIC => {
                let reason = format!("`{call}` of {}: {}", self.info.name, failure.explain());
                // The first reason stands.
                let reason = self.poisoned.get_or_init(|| reason).clone();
                Error::DeviceLost {
                    device: self.info.device.clone(),
                    reason,
                }
            }
            Status::OUT_OF_DEVICE_MEMORY | Status::OUT_OF_HOST_MEMORY => {
                out_of_memory(&self.info.device, call, failure)
            }
            Status::UNSUPPORTED => Error::Unsupported {
                backend: self.info.name.clone(),
                what: UnsupportedWhat::Other(explained),
            },
            Status::CANCELLED => Error::Cancelled,
            Status::NON_FINITE if record.tensor != abi::NO_TENSOR => Error::NonFiniteWeight {
                weight: self.weight_name(record.tensor),
                offset: record.byte_offset,
            },
            // For `forward` the native code is the operation's number, and above it its layer plus one.
            Status::NON_FINITE if call == "forward" => {
                let op = u32::try_from(record.native_code & 0xFFFF_FFFF)
                    .ok()
                    .and_then(OpName::from_id);
                let layer = u32::try_from(record.native_code >> 32)
                    .ok()
                    .and_then(|l| l.checked_sub(1));
                Error::NonFinite {
                    op: op.unwrap_or(OpName::Logits),
                    layer,
                }
            }
            Status::INVALID_ARGUMENT if call == "load_commit" && record.tensor != abi::NO_TENSOR => {
                let nbytes = self.weights.get(record.tensor as usize).map_or(0, |w| w.nbytes);
                Error::Incomplete {
                    weight: self.weight_name(record.tensor),
                    start: record.byte_offset,
                    end: nbytes,
                    nbytes,
                }
            }
            // What only the plugin could see to be wrong: the host checks chunks, ranges and batches before it calls.
            Status::INVALID_ARGUMENT if ["build_index", "workspace_create", "prepare"].contains(&call) => {
                Error::invalid(
                    format!("what `{call}` of {} was given", self.info.name),
                    "arguments that fit what is resident",
                    failure.explain(),
                )
            }
            _ => Error::internal(&self.info.name, explained),
        }
    }

    fn call(&self, name: &'static str, f: impl FnOnce(&mut abi::ErrorRecord) -> Status) -> Result<()> {
        self.check_poison()?;
        self.loaded.call(f).map_err(|failure| self.error(name, &failure))
    }

    fn upload(&mut self, chunk: Chunk<'_>, classes: &[WeightClass], semantics: u32) -> Result<()> {
        self.check_poison()?;
        self.lifecycle.expect("upload", State::Loading)?;
        if let Some(ledger) = &mut self.ledger {
            ledger.record(chunk.weight, chunk.offset, chunk.bytes.len() as u64, classes)?;
        }
        let c = abi::Chunk {
            struct_size: size_of::<abi::Chunk>() as u32,
            tensor: chunk.weight.0,
            offset: chunk.offset,
            data: chunk.bytes.as_ptr(),
            len: chunk.bytes.len() as u64,
            semantics,
            reserved: 0,
        };
        let (f, load) = (required!(self, upload), self.load);
        // SAFETY: the bytes outlive the call, or for imports the load (`self.imports`).
        self.call("upload", |record| unsafe { f(load, &c, record) })
    }

    /// Imports what stands in a mapping as it is needed, and pushes the rest.
    fn load_importing(
        &mut self,
        plan: &LoadPlan,
        source: &dyn WeightSource,
        watch: &dyn LoadWatch,
    ) -> Result<()> {
        let mut maps: Vec<Option<Option<Arc<dyn Mapping>>>> = vec![None; source.files().len()];
        let mut rest = plan.clone();
        rest.weights.clear();
        let mut done = 0;
        for weight in &plan.weights {
            if watch.cancelled() {
                return Err(Error::Cancelled);
            }
            let run = match weight.views.as_slice() {
                [view]
                    if weight.change.source_encoding().is_none() && weight.layout == FloatLayout::OutIn =>
                {
                    view.as_contiguous().map(|(offset, len)| (view.file, offset, len))
                }
                _ => None,
            };
            let mapping = run.and_then(|(file, _, _)| {
                maps.get_mut(file as usize)?
                    .get_or_insert_with(|| source.share(file))
                    .clone()
            });
            let bytes = run.zip(mapping.as_ref()).and_then(|((_, offset, len), mapping)| {
                let start = usize::try_from(offset).ok()?;
                mapping
                    .bytes()
                    .get(start..start.checked_add(usize::try_from(len).ok()?)?)
            });
            let (Some(bytes), Some(mapping)) = (bytes, mapping.clone()) else {
                rest.weights.push(weight.clone());
                continue;
            };
            let chunk = Chunk {
                weight: weight.id,
                offset: 0,
                bytes,
            };
            self.upload(chunk, &[weight.class], abi::UPLOAD_IMPORT_UNTIL_RELEASE)?;
            self.imports.push(mapping);
            done += weight.nbytes;
            watch.progress(Progress {
                phase: Phase::Upload,
                weight: Some(weight.id),
                done,
                total: plan.nbytes,
            });
        }
        push_all(self, &rest, source, watch)
    }

    /// Runs `load_from`, and beside it a thread that calls `cancel`, if the plugin has one, once the watch says so. A plugin
    /// may ask `progress` seldom; then this is how it learns of it.
    fn while_watching<T>(&self, watch: &dyn LoadWatch, load: impl FnOnce() -> T) -> T {
        let Some(cancel) = self.loaded.table.cancel else {
            return load();
        };
        let (loaded, device) = (&*self.loaded, self.device);
        std::thread::scope(|scope| {
            let (done, is_done) = mpsc::channel::<()>();
            let watcher = std::thread::Builder::new().spawn_scoped(scope, move || {
                while is_done.recv_timeout(WATCH) == Err(mpsc::RecvTimeoutError::Timeout) {
                    if !watch.cancelled() {
                        continue;
                    }
                    // SAFETY: the device is open; the function may be called from any thread.
                    if let Err(failure) = loaded.call(|record| unsafe { cancel(device, record) }) {
                        // The load still learns of it when it asks `progress`.
                        tracing::warn!("`cancel`: {}", failure.explain());
                        return;
                    }
                }
            });
            if let Err(e) = watcher {
                tracing::warn!("`cancel` will not be called: {e}");
            }
            let result = load();
            drop(done);
            result
        })
    }

    /// What the plugin has to say of a load, as (name, value).
    fn stats(&self) -> Result<Vec<(String, String)>> {
        let Some(f) = self.loaded.table.stats else {
            return Ok(Vec::new());
        };
        let bad = |what: String| Error::internal(&self.info.name, format!("`stats`: {what}"));
        let mut text = vec![0; 1024];
        loop {
            let (mut needed, capacity) = (0, text.len() as u64);
            let called = self
                .loaded
                // SAFETY: the buffer holds the bytes that `capacity` says, and the rest is valid for the call.
                .call(|record| unsafe { f(self.device, text.as_mut_ptr(), capacity, &mut needed, record) });
            match called {
                Ok(()) => {}
                Err(failure) if failure.status == Status::UNSUPPORTED => return Ok(Vec::new()),
                Err(failure) => return Err(self.error("stats", &failure)),
            }
            if needed > abi::STATS_MAX_BYTES {
                return Err(bad(format!(
                    "it needs {needed} bytes, more than {}",
                    abi::STATS_MAX_BYTES
                )));
            }
            text.resize(needed as usize, 0);
            if needed <= capacity {
                break;
            }
        }
        let notes: BTreeMap<String, String> = serde_json::from_slice(&text)
            .map_err(|e| bad(format!("its text is no flat JSON object of strings: {e}")))?;
        Ok(notes
            .iter()
            .map(|(name, value)| (shown(name), shown(value)))
            .collect())
    }

    /// Ends a load or destroys a model, whatever the plugin makes of it: nothing of it is used again.
    fn give_back(&mut self) -> std::result::Result<(), (&'static str, Failure)> {
        let (load, model) = (self.load, self.model);
        let table = &self.loaded.table;
        // The table has every required entry: it would have been refused otherwise.
        let (call, f, handle) = match self.lifecycle.state() {
            State::Empty => return Ok(()),
            State::Loading => ("load_abort", table.load_abort, load),
            _ => ("model_destroy", table.model_destroy, model),
        };
        let called = f.map_or(Ok(()), |f| {
            // SAFETY: the handle is a load's or a model's, as the function wants, and not used again.
            self.loaded.call(|record| unsafe { f(handle, record) })
        });
        self.forget_model();
        called.map_err(|failure| (call, failure))
    }

    fn forget_model(&mut self) {
        self.model = 0;
        self.load = 0;
        self.weights.clear();
        self.ledger = None;
        self.imports.clear();
        self.decode = Decode::default();
        self.lifecycle.enter(State::Empty);
    }
}

/// How often a running load is asked whether to stop.
const WATCH: Duration = Duration::from_millis(20);

/// A failed call of which nothing but the loss of the device is expected.
fn lost_or_internal(backend: &str, device: &str, call: &str, failure: &Failure) -> Error {
    match failure.status {
        Status::DEVICE_LOST | Status::PANIC => Error::DeviceLost {
            device: device.to_owned(),
            reason: format!("`{call}` of {backend}: {}", failure.explain()),
        },
        _ => Error::internal(backend, format!("`{call}`: {}", failure.explain())),
    }
}

fn out_of_memory(device: &str, call: &str, failure: &Failure) -> Error {
    Error::OutOfMemory {
        device: device.to_owned(),
        what: format!("`{call}` ({})", failure.explain()),
        needed: failure.record.needed,
        available: failure.record.available,
    }
}

/// What the callbacks of a pulled load see.
struct Pull<'a> {
    source: &'a dyn WeightSource,
    watch: &'a dyn LoadWatch,
    weights: &'a [WeightFacts],
    total: u64,
    /// The first error of the source, to be returned instead of the plugin's account of it.
    error: Mutex<Option<Error>>,
}

unsafe extern "C" fn pull_read_at(
    context: *mut c_void,
    tensor: u32,
    offset: u64,
    out: *mut u8,
    len: u64,
) -> Status {
    // SAFETY: `context` is the `Pull` of the load that is running, shared by the threads of the plugin.
    let pull = unsafe { &*context.cast::<Pull<'_>>() };
    let in_range = pull
        .weights
        .get(tensor as usize)
        .is_some_and(|w| offset.checked_add(len).is_some_and(|end| end <= w.nbytes));
    if out.is_null() || !in_range {
        return Status::INVALID_ARGUMENT;
    }
    let Ok(len) = usize::try_from(len) else {
        return Status::INVALID_ARGUMENT;
    };
    // SAFETY: the plugin vouches for `len` writable bytes that nobody else touches during the call.
    let out = unsafe { std::slice::from_raw_parts_mut(out, len) };
    let read = catch_unwind(AssertUnwindSafe(|| {
        pull.source.read_at(WeightId(tensor), offset, out)
    }));
    let error = match read {
        Ok(Ok(())) => return Status::OK,
        Ok(Err(e)) => e,
        Err(_) => Error::internal("host", "the source panicked"),
    };
    pull.error
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .get_or_insert(error);
    Status::IO
}

unsafe extern "C" fn pull_progress(context: *mut c_void, done: u64) -> Status {
    // SAFETY: as in `pull_read_at`.
    let pull = unsafe { &*context.cast::<Pull<'_>>() };
    let cancelled = catch_unwind(AssertUnwindSafe(|| {
        let done = done.min(pull.total);
        pull.watch.progress(Progress {
            phase: Phase::Upload,
            weight: None,
            done,
            total: pull.total,
        });
        pull.watch.cancelled()
    }));
    if cancelled.unwrap_or(true) {
        Status::CANCELLED
    } else {
        Status::OK
    }
}

impl WeightBackend for PluginBackend {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn memory(&self) -> Result<MemoryInfo> {
        self.check_poison()?;
        let device = DeviceInfo {
            ordinal: 0,
            id: self.info.device.clone(),
            name: self.info.device_name.clone(),
            total_memory: 0,
            details: Vec::new(),
        };
        Self::ask_memory(&self.loaded, &self.info.name, &device, self.device).inspect_err(|e| self.note(e))
    }

    fn begin_load(&mut self, plan: &LoadPlan) -> Result<()> {
        self.check_poison()?;
        self.lifecycle.expect("begin_load", State::Empty)?;
        for (place, w) in plan.weights.iter().enumerate() {
            w.check(&self.info.name, place)?;
            if let Some(broken) = self.info.limits.broken_by(w.encoding, w.shape, w.nbytes) {
                return Err(Error::invalid(
                    format!("{} of weight `{}` in bytes", broken.what, w.name),
                    format!("at most {}", broken.limit),
                    broken.found,
                ));
            }
        }
        let tensors = convert::tensors(plan);
        let c_plan = convert::plan(plan, &tensors);
        self.weights = plan
            .weights
            .iter()
            .map(|w| WeightFacts {
                name: w.name.clone(),
                nbytes: w.nbytes,
                granule: w.granule(),
            })
            .collect();
        let mut refusals = [abi::Refusal {
            tensor: 0,
            code: 0,
            reason: [0; 120],
        }; 8];
        let mut report = abi::PlanReport {
            struct_size: size_of::<abi::PlanReport>() as u32,
            reserved: 0,
            bytes: [0; 4],
            refusals: refusals.as_mut_ptr(),
            refusal_capacity: refusals.len() as u64,
            refusal_count: 0,
        };
        let (check, begin, device) = (
            required!(self, plan_check),
            required!(self, load_begin),
            self.device,
        );
        // SAFETY: all pointers are valid for the call.
        self.call("plan_check", |record| unsafe {
            check(device, &c_plan, &mut report, record)
        })?;
        if report.refusal_count != 0 {
            let what = text(&refusals[0].reason).unwrap_or_else(|| "(no readable reason)".into());
            return Err(Error::Unsupported {
                backend: self.info.name.clone(),
                what: UnsupportedWhat::Other(format!(
                    "weight `{}`: {what} ({} refused in all)",
                    self.weight_name(refusals[0].tensor),
                    report.refusal_count
                )),
            });
        }
        let mut load = 0;
        // SAFETY: all pointers are valid for the call.
        self.call("load_begin", |record| unsafe {
            begin(device, &c_plan, &mut load, record)
        })?;
        if load == 0 {
            return Err(Error::internal(
                &self.info.name,
                "`load_begin` returned OK and the invalid handle 0",
            ));
        }
        self.load = load;
        self.ledger = Some(UploadLedger::new(plan));
        self.pulled = false;
        self.lifecycle.enter(State::Loading);
        Ok(())
    }

    fn upload_quantized(&mut self, chunk: Chunk<'_>) -> Result<()> {
        self.upload(chunk, &[WeightClass::Quantized], abi::UPLOAD_COPY_IN_CALL)
    }

    fn upload_f32(&mut self, chunk: Chunk<'_>) -> Result<()> {
        self.upload(
            chunk,
            &[WeightClass::Float, WeightClass::Bias],
            abi::UPLOAD_COPY_IN_CALL,
        )
    }

    fn upload_gamma(&mut self, chunk: Chunk<'_>) -> Result<()> {
        self.upload(chunk, &[WeightClass::Gamma], abi::UPLOAD_COPY_IN_CALL)
    }

    fn load_from(&mut self, plan: &LoadPlan, source: &dyn WeightSource, watch: &dyn LoadWatch) -> Result<()> {
        self.check_poison()?;
        self.lifecycle.expect("load_from", State::Loading)?;
        if self.import {
            return self.load_importing(plan, source, watch);
        }
        let Some(f) = self.loaded.table.load_from else {
            return push_all(self, plan, source, watch);
        };
        let weights = std::mem::take(&mut self.weights);
        let pull = Pull {
            source,
            watch,
            weights: &weights,
            total: plan.nbytes,
            error: Mutex::new(None),
        };
        let callbacks = abi::LoadCallbacks {
            struct_size: size_of::<abi::LoadCallbacks>() as u32,
            reserved: 0,
            context: std::ptr::from_ref(&pull).cast_mut().cast(),
            read_at: Some(pull_read_at),
            progress: Some(pull_progress),
        };
        let load = self.load;
        let called = self.while_watching(watch, || {
            // SAFETY: the callbacks and what their context points to outlive the call, after which the plugin must not use
            // them; they share the context immutably.
            self.loaded.call(|record| unsafe { f(load, &callbacks, record) })
        });
        let source_error = pull.error.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.weights = weights;
        match (called, source_error) {
            (_, Some(error)) => Err(error),
            (Ok(()), None) => {
                self.pulled = true;
                Ok(())
            }
            (Err(failure), None) => Err(self.error("load_from", &failure)),
        }
    }

    fn finish_load(&mut self) -> Result<LoadReceipt> {
        self.check_poison()?;
        self.lifecycle.expect("finish_load", State::Loading)?;
        if let Some(ledger) = self.ledger.as_ref().filter(|_| !self.pulled) {
            ledger.check_complete()?;
        }
        let mut receipt = abi::LoadReceipt {
            struct_size: size_of::<abi::LoadReceipt>() as u32,
            ..abi::LoadReceipt::default()
        };
        let (f, load, mut model) = (required!(self, load_commit), self.load, 0);
        // SAFETY: all pointers are valid for the call.
        self.call("load_commit", |record| unsafe {
            f(load, &mut model, &mut receipt, record)
        })?;
        if model == 0 {
            return Err(Error::internal(
                &self.info.name,
                "`load_commit` returned OK and the invalid handle 0",
            ));
        }
        self.load = 0;
        self.model = model;
        self.ledger = None;
        self.lifecycle.enter(State::Loaded);
        if receipt.tensors as usize != self.weights.len() {
            let found = receipt.tensors;
            let expected = self.weights.len();
            self.unload()?;
            return Err(Error::internal(
                &self.info.name,
                format!("`load_commit` vouches for {found} tensors of {expected}"),
            ));
        }
        let notes = match self.stats() {
            Ok(notes) => notes,
            Err(error) => {
                // What the load was refused for stands; what it took goes as far as the plugin lets it.
                let _ = self.unload();
                return Err(error);
            }
        };
        let [quantized, float, gamma, bias] = receipt.bytes;
        Ok(LoadReceipt {
            weights: receipt.tensors,
            resident: MemoryByClass {
                quantized,
                float,
                gamma,
                bias,
                ..MemoryByClass::default()
            },
            mapped: receipt.imported,
            notes,
        })
    }

    fn abort_load(&mut self) -> Result<()> {
        self.lifecycle.expect("abort_load", State::Loading)?;
        self.unload()
    }

    fn build_index(&mut self, layout: &IndexLayout) -> Result<IndexReceipt> {
        self.check_poison()?;
        self.lifecycle.expect("build_index", State::Loaded)?;
        let present = layout.present() as u32;
        let Some(f) = self.loaded.table.build_index else {
            // The host's table serves a plugin that keeps none.
            self.lifecycle.enter(State::Indexed);
            return Ok(IndexReceipt {
                layers: layout.layers,
                entries: present,
                bytes: 0,
            });
        };
        let entries = convert::index_entries(layout);
        let c_layout = abi::IndexLayout {
            struct_size: size_of::<abi::IndexLayout>() as u32,
            layers: layout.layers,
            entries: entries.as_ptr(),
            entry_count: entries.len() as u64,
        };
        let mut receipt = abi::IndexReceipt {
            struct_size: size_of::<abi::IndexReceipt>() as u32,
            ..abi::IndexReceipt::default()
        };
        let model = self.model;
        // SAFETY: all pointers are valid for the call.
        self.call("build_index", |record| unsafe {
            f(model, &c_layout, &mut receipt, record)
        })?;
        if (receipt.layers, receipt.entries) != (layout.layers, present) {
            return Err(Error::internal(
                &self.info.name,
                format!(
                    "`build_index` built {} entries of {} layers instead of {present} of {}",
                    receipt.entries, receipt.layers, layout.layers
                ),
            ));
        }
        self.lifecycle.enter(State::Indexed);
        Ok(IndexReceipt {
            layers: receipt.layers,
            entries: receipt.entries,
            bytes: receipt.bytes,
        })
    }

    fn digest(&mut self, weight: WeightId) -> Result<Option<[u8; 32]>> {
        self.check_poison()?;
        self.lifecycle.expect_resident("digest")?;
        if weight.index() >= self.weights.len() {
            return Err(Error::UnknownWeight {
                weight,
                weights: self.weights.len(),
            });
        }
        let Some(f) = self.loaded.table.digest else {
            return Ok(None);
        };
        let (model, mut digest) = (self.model, [0; 32]);
        let called = self
            .loaded
            // SAFETY: `digest` holds the 32 bytes that are written.
            .call(|record| unsafe { f(model, weight.0, digest.as_mut_ptr(), record) });
        match called {
            Ok(()) => Ok(Some(digest)),
            Err(failure) if failure.status == Status::UNSUPPORTED => Ok(None),
            Err(failure) => Err(self.error("digest", &failure)),
        }
    }

    fn read_back(&mut self, weight: WeightId, offset: u64, out: &mut [u8]) -> Result<()> {
        self.check_poison()?;
        self.lifecycle.expect_resident("read_back")?;
        let facts = self.weights.get(weight.index()).ok_or(Error::UnknownWeight {
            weight,
            weights: self.weights.len(),
        })?;
        let len = out.len() as u64;
        check_read_back(&facts.name, facts.nbytes, facts.granule, offset, len)?;
        let (f, model) = (required!(self, readback), self.model);
        // SAFETY: `out` holds the `len` bytes that are written.
        self.call("readback", |record| unsafe {
            f(model, weight.0, offset, out.as_mut_ptr(), len, record)
        })
    }

    fn workspace_bytes(&self, dims: &WorkspaceDims) -> Result<WorkspaceBytes> {
        self.check_poison()?;
        let Some(f) = self.loaded.table.workspace_bytes else {
            return dims
                .kv_bytes()
                .zip(dims.value_bytes())
                .map(|(kv, workspace)| WorkspaceBytes { kv, workspace })
                .ok_or_else(|| {
                    Error::invalid(
                        "workspace",
                        "a size below 2^64 bytes",
                        format!("{:?}", dims.capacity),
                    )
                });
        };
        let arrays = DimsArrays::new(dims);
        let c_dims = arrays.dims(dims);
        let mut bytes = abi::WorkspaceBytes {
            struct_size: size_of::<abi::WorkspaceBytes>() as u32,
            ..abi::WorkspaceBytes::default()
        };
        self.loaded
            // SAFETY: all pointers are valid for the call.
            .call(|record| unsafe { f(self.device, &c_dims, &mut bytes, record) })
            .map_err(|failure| self.error("workspace_bytes", &failure))?;
        Ok(WorkspaceBytes {
            kv: bytes.kv,
            workspace: bytes.workspace,
        })
    }

    fn init_workspace(&mut self, dims: &WorkspaceDims) -> Result<WorkspaceBytes> {
        self.check_poison()?;
        self.lifecycle.expect("init_workspace", State::Indexed)?;
        let (f, model) = (required!(self, workspace_create), self.model);
        let arrays = DimsArrays::new(dims);
        let c_dims = arrays.dims(dims);
        let mut bytes = abi::WorkspaceBytes {
            struct_size: size_of::<abi::WorkspaceBytes>() as u32,
            ..abi::WorkspaceBytes::default()
        };
        // SAFETY: all pointers are valid for the call.
        self.call("workspace_create", |record| unsafe {
            f(model, &c_dims, &mut bytes, record)
        })?;
        let capacity = dims.capacity;
        let sequences = capacity.max_sequences as usize;
        self.decode = Decode {
            vocab: dims.vocab,
            max_context: capacity.max_context,
            max_batch_tokens: capacity.max_batch_tokens,
            lengths: vec![0; sequences],
            seen: vec![false; sequences],
            runs: Vec::with_capacity(sequences),
            wants: Vec::with_capacity(capacity.max_batch_tokens as usize),
        };
        self.lifecycle.enter(State::Ready);
        Ok(WorkspaceBytes {
            kv: bytes.kv,
            workspace: bytes.workspace,
        })
    }

    fn as_decode(&mut self) -> Option<&mut dyn DecodeBackend> {
        self.loaded
            .table
            .forward
            .is_some()
            .then_some(self as &mut dyn DecodeBackend)
    }

    fn unload(&mut self) -> Result<()> {
        self.give_back()
            .map_err(|(call, failure)| self.error(call, &failure))
    }
}

impl Decode {
    /// Checks what the caller could have known, and lays the batch out for C. Nothing is allocated.
    fn lay_out(&mut self, batch: &TokenBatch<'_>, out: &Outputs<'_>) -> Result<()> {
        self.runs.clear();
        self.wants.clear();
        self.seen.fill(false);
        if batch.runs.is_empty() {
            return Err(Error::invalid("runs of a batch", "at least 1", 0));
        }
        let tokens = batch.tokens();
        if tokens > self.max_batch_tokens as usize {
            return Err(Error::invalid(
                "tokens of a batch",
                format!("at most {}", self.max_batch_tokens),
                tokens,
            ));
        }
        for run in batch.runs {
            let sequence = run.sequence.0;
            let length = run.sequence.length_in(&self.lengths)?;
            if std::mem::replace(&mut self.seen[sequence as usize], true) {
                return Err(Error::invalid(
                    format!("runs of sequence {sequence}"),
                    "at most 1",
                    "more",
                ));
            }
            if run.tokens.is_empty() || run.tokens.len() != run.want.len() {
                return Err(Error::invalid(
                    format!("tokens and wants of sequence {sequence}"),
                    "as many of each, at least 1",
                    format!("{} and {}", run.tokens.len(), run.want.len()),
                ));
            }
            if let Some(token) = run.tokens.iter().find(|t| **t >= self.vocab) {
                return Err(Error::TokenOutOfRange {
                    token: *token,
                    vocab: self.vocab,
                });
            }
            // Checked against `max_batch_tokens` above.
            let adding = run.tokens.len() as u32;
            if adding > self.max_context - length {
                return Err(Error::ContextExceeded {
                    sequence,
                    length,
                    adding,
                    capacity: self.max_context,
                });
            }
        }
        let logits = batch.wanting(Want::Logits) as u64 * u64::from(self.vocab);
        if out.argmax.len() != batch.wanting(Want::ArgMax) || out.logits.len() as u64 != logits {
            return Err(Error::invalid(
                "outputs",
                format!("{} arg-maxima and {logits} logits", batch.wanting(Want::ArgMax)),
                format!("{} and {}", out.argmax.len(), out.logits.len()),
            ));
        }
        for want in batch.runs.iter().flat_map(|r| r.want) {
            self.wants.push(match want {
                Want::Nothing => abi::WANT_NOTHING,
                Want::ArgMax => abi::WANT_ARGMAX,
                Want::Logits => abi::WANT_LOGITS,
            });
        }
        let mut at = 0;
        for run in batch.runs {
            self.runs.push(abi::Run {
                sequence: run.sequence.0,
                token_count: run.tokens.len() as u32,
                tokens: run.tokens.as_ptr(),
                want: self.wants[at..].as_ptr(),
            });
            at += run.tokens.len();
        }
        Ok(())
    }
}

impl DecodeBackend for PluginBackend {
    fn prepare(&mut self, program: &DecodeProgram) -> Result<()> {
        self.check_poison()?;
        self.lifecycle.expect_ready("prepare")?;
        if let Some(op) = program
            .ops
            .iter()
            .map(|op| op.kind.name())
            .find(|op| !self.info.ops.contains(*op))
        {
            return Err(Error::Unsupported {
                backend: self.info.name.clone(),
                what: UnsupportedWhat::Op(op),
            });
        }
        let arrays = ProgramArrays::new(program);
        let c_program = arrays.program(program);
        let (f, model) = (required!(self, prepare), self.model);
        // SAFETY: the program and all it points to are valid for the call.
        self.call("prepare", |record| unsafe { f(model, &c_program, record) })?;
        self.decode.lengths.fill(0);
        self.lifecycle.enter(State::Prepared);
        Ok(())
    }

    fn forward(&mut self, batch: &TokenBatch<'_>, out: &mut Outputs<'_>) -> Result<()> {
        self.check_poison()?;
        self.lifecycle.expect("forward", State::Prepared)?;
        self.decode.lay_out(batch, out)?;
        let c_batch = abi::Batch {
            struct_size: size_of::<abi::Batch>() as u32,
            reserved: 0,
            runs: self.decode.runs.as_ptr(),
            run_count: self.decode.runs.len() as u64,
        };
        let mut outputs = abi::Outputs {
            struct_size: size_of::<abi::Outputs>() as u32,
            reserved: 0,
            argmax: out.argmax.as_mut_ptr(),
            argmax_count: out.argmax.len() as u64,
            logits: out.logits.as_mut_ptr(),
            logits_count: out.logits.len() as u64,
        };
        let (f, model) = (required!(self, forward), self.model);
        // SAFETY: the batch, the outputs and all they point to are valid for the call.
        self.call("forward", |record| unsafe {
            f(model, &c_batch, &mut outputs, record)
        })?;
        if let Some(id) = out.argmax.iter().find(|id| **id >= self.decode.vocab) {
            return Err(Error::internal(
                &self.info.name,
                format!(
                    "`forward` yields token {id} of a vocabulary of {}",
                    self.decode.vocab
                ),
            ));
        }
        for run in batch.runs {
            self.decode.lengths[run.sequence.0 as usize] += run.tokens.len() as u32;
        }
        Ok(())
    }

    fn truncate(&mut self, sequence: SequenceId, length: u32) -> Result<()> {
        self.check_poison()?;
        self.lifecycle.expect("truncate", State::Prepared)?;
        sequence.cut_in(&mut self.decode.lengths, length)?;
        let (f, model) = (required!(self, truncate), self.model);
        // SAFETY: passes numbers and a record.
        self.call("truncate", |record| unsafe {
            f(model, sequence.0, length, record)
        })?;
        self.decode.lengths[sequence.0 as usize] = length;
        Ok(())
    }

    fn sequence_length(&self, sequence: SequenceId) -> Result<u32> {
        sequence.length_in(&self.decode.lengths)
    }
}

impl Drop for PluginBackend {
    fn drop(&mut self) {
        if let Err((call, failure)) = self.give_back() {
            parting::record(&self.loaded.path, call, failure.explain());
        }
        let Some(f) = self.loaded.table.device_close else {
            return;
        };
        let device = self.device;
        // SAFETY: the handle is open, and not used again.
        if let Err(failure) = self.loaded.call(|record| unsafe { f(device, record) }) {
            parting::record(&self.loaded.path, "device_close", failure.explain());
        }
    }
}
