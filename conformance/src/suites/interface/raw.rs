//! A plugin's table, called as C would call it: nothing of the host stands between.
//!
//! Each case works on a copy of the library, which the dynamic linker takes for another one: with constructors, state and
//! handles of its own, beside the one that the host has open.
#![expect(
    unsafe_code,
    reason = "functions of a C table are called, wrongly on purpose where the interface says that they survive it"
)]

use std::ffi::c_void;
use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hoist_backend::{Encoding, FloatLayout, LoadPlan, WeightClass};
use hoist_plugin_abi as abi;
use hoist_plugin_abi::{ErrorRecord, Handle, Host, OPEN_SYMBOL, OpenV1, Plugin, Status};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::guard::{ReadOnly, Writable};
use crate::{Context, Failure, Stop, audit, judge};

/// What the host's side of the interface saw.
#[derive(Debug, Default)]
pub(super) struct Log {
    pub(super) messages: AtomicU64,
    /// Set when `shutdown` has returned; a message after it is counted.
    over: AtomicBool,
    pub(super) late: AtomicU64,
}

unsafe extern "C" fn log(context: *mut c_void, _level: u32, _message: *const u8, _len: u64) {
    // SAFETY: the context is the leaked `Log` of the library.
    if let Some(log) = unsafe { context.cast::<Log>().as_ref() } {
        log.messages.fetch_add(1, Ordering::Relaxed);
        if log.over.load(Ordering::SeqCst) {
            log.late.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A loaded copy of the plugin, not opened yet.
pub(super) struct Loaded {
    entry: OpenV1,
    minor: u32,
    ordinal: u32,
}

/// An opened copy.
pub(super) struct Raw {
    pub(super) table: Plugin,
    /// Bytes of the table that the plugin says it has.
    pub(super) table_size: usize,
    pub(super) log: &'static Log,
    ordinal: u32,
}

/// A status and what the record says of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answer {
    pub(super) status: Status,
    pub(super) record: ErrorRecord,
}

impl Answer {
    pub(super) fn name(&self) -> String {
        self.status
            .name()
            .map_or_else(|| format!("undocumented status {}", self.status.0), str::to_owned)
    }

    /// Demands one of some statuses.
    pub(super) fn is(&self, what: &str, expected: &[Status]) -> Result<(), Failure> {
        if expected.contains(&self.status) {
            return Ok(());
        }
        let names: Vec<_> = expected.iter().filter_map(|s| s.name()).collect();
        Err(Failure::new(what, "", names.join(" or "), self.name()))
    }

    pub(super) fn ok(&self, what: &str) -> Result<(), Failure> {
        self.is(what, &[Status::OK])
    }
}

/// The shape of a table's entry, for calls that differ only in their arguments.
macro_rules! entry {
    ($raw:expr, $name:ident) => {
        $raw.table.$name.ok_or_else(|| {
            Failure::new(
                concat!("entry `", stringify!($name), "`"),
                "",
                "a function",
                "NULL",
            )
        })?
    };
}

impl Loaded {
    /// Copies the library and loads the copy.
    pub(super) fn new(cx: &Context<'_>) -> Result<Self, Stop> {
        let plugin = cx.plugin()?;
        let fail = |e: std::io::Error| Failure::new("a copy of the library", "", "to be made", e);
        let folder = tempfile::tempdir().map_err(fail)?;
        let path = folder.path().join("copy.so");
        std::fs::copy(&plugin.path, &path).map_err(fail)?;
        // SAFETY: runs the constructors of the library under test, in the process made for that.
        let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_LOCAL) }
            .map_err(|e| Failure::new("loading a copy of the library", "", "success", e))?;
        // SAFETY: the header, whose rules this library declares to follow, says that this name is an `OpenV1`.
        let entry = unsafe { library.get::<OpenV1>(OPEN_SYMBOL.as_bytes()) }
            .map(|symbol| *symbol)
            .map_err(|e| Failure::new("the library's entry", "", OPEN_SYMBOL, e))?;
        // Never unloaded, as the host never unloads it: its threads could outlive it.
        std::mem::forget(library);
        Ok(Self {
            entry,
            minor: plugin.minor,
            ordinal: plugin.ordinal,
        })
    }

    /// Calls the entry with what it is given.
    pub(super) fn call_entry(&self, with_host: bool, minor: u32, with_out: bool) -> Result<Answer, Failure> {
        let (host, _) = host(minor);
        let mut table: *const Plugin = std::ptr::null();
        let host = if with_host { host } else { std::ptr::null() };
        let out = if with_out {
            &raw mut table
        } else {
            std::ptr::null_mut()
        };
        // SAFETY: NULL is what the entry must survive; the rest is valid for the call, and the host for ever.
        answer("hoist_plugin_open_v1", |record| unsafe {
            (self.entry)(host, minor, out, record)
        })
    }

    /// Opens the copy.
    pub(super) fn open(self) -> Result<Raw, Failure> {
        let (host, log) = host(self.minor);
        let mut table: *const Plugin = std::ptr::null();
        answer("hoist_plugin_open_v1", |record| {
            // SAFETY: all four are valid for the call, and the host for ever.
            unsafe { (self.entry)(host, self.minor, &mut table, record) }
        })?
        .ok("hoist_plugin_open_v1")?;
        if table.is_null() || !table.is_aligned() {
            let found = format!("{table:p}");
            return Err(Failure::new("the table", "", "an aligned address", found));
        }
        // SAFETY: a table begins with its size.
        let size = unsafe { table.cast::<u32>().read() } as usize;
        let least = offset_of!(Plugin, build_index);
        judge::holds(
            "struct_size of the table",
            size >= least,
            format!("at least {least}"),
            size,
        )?;
        let mut own = std::mem::MaybeUninit::<Plugin>::zeroed();
        // SAFETY: copies at most what the plugin says it wrote, into room for as much.
        unsafe {
            std::ptr::copy_nonoverlapping(
                table.cast::<u8>(),
                own.as_mut_ptr().cast::<u8>(),
                size.min(size_of::<Plugin>()),
            );
        }
        // SAFETY: zeros and addresses are valid for `Option<fn>` and integers, which is all it holds.
        let table = unsafe { own.assume_init() };
        Ok(Raw {
            table,
            table_size: size,
            log,
            ordinal: self.ordinal,
        })
    }
}

/// A host block and its log. Both are leaked: a plugin may use them until `shutdown`, and a wrong one after it.
fn host(minor: u32) -> (*const Host, &'static Log) {
    let seen: &'static Log = Box::leak(Box::default());
    let host = Box::leak(Box::new(Host {
        struct_size: size_of::<Host>() as u32,
        minor,
        context: std::ptr::from_ref(seen).cast_mut().cast(),
        log: Some(log),
    }));
    (host, seen)
}

/// Bytes behind an output struct that belong to nobody.
const CANARY: u8 = 0xA7;

/// Calls with a record, and judges what every answer must be: a documented status, a record that says the same, a message
/// that ends, nothing written behind the record, and the floating-point mode as it was.
pub(super) fn answer(what: &str, call: impl FnOnce(*mut ErrorRecord) -> Status) -> Result<Answer, Failure> {
    #[repr(C)]
    struct Guarded {
        record: ErrorRecord,
        canary: [u8; 64],
    }
    let mut guarded = Guarded {
        record: ErrorRecord::new(),
        canary: [CANARY; 64],
    };
    let mode = audit::float_mode();
    let status = call(&mut guarded.record);
    judge::equal(
        &format!("floating-point mode after `{what}`"),
        mode,
        audit::float_mode(),
    )?;
    let record = guarded.record;
    if guarded.canary != [CANARY; 64] {
        return Err(Failure::new(
            what,
            "behind the error record",
            "nothing written",
            "other bytes",
        ));
    }
    if status.name().is_none() {
        return Err(Failure::new(what, "", "a documented status", status.0));
    }
    if status != Status::OK {
        judge::equal(&format!("code in the record of `{what}`"), status.0, record.code)?;
        let end = record.message.iter().position(|b| *b == 0);
        let text = end.and_then(|end| std::str::from_utf8(&record.message[..end]).ok());
        judge::holds(
            &format!("message of `{what}`"),
            text.is_some_and(|t| !t.is_empty()),
            "some UTF-8 that ends with a NUL",
            format!("{text:?}"),
        )?;
    }
    Ok(Answer { status, record })
}

/// An output struct with room behind it that must stay as it is.
#[repr(C)]
struct Out<T> {
    value: T,
    canary: [u8; 64],
}

impl<T> Out<T> {
    fn new(value: T) -> Self {
        Self {
            value,
            canary: [CANARY; 64],
        }
    }

    fn check(&self, what: &str) -> Result<(), Failure> {
        judge::holds(
            &format!("bytes behind the output of `{what}`"),
            self.canary == [CANARY; 64],
            "nothing written",
            "other bytes",
        )
    }
}

/// What is passed for a device's options.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Opening {
    pub(super) flags: u32,
    pub(super) budget: u64,
}

impl Raw {
    /// Loads and opens a copy.
    pub(super) fn new(cx: &Context<'_>) -> Result<Self, Stop> {
        Ok(Loaded::new(cx)?.open()?)
    }

    pub(super) fn device_count(&self, with_out: bool) -> Result<(Answer, u32), Failure> {
        let f = entry!(self, device_count);
        let mut count = u32::MAX;
        let out = if with_out {
            &raw mut count
        } else {
            std::ptr::null_mut()
        };
        // SAFETY: NULL, or room for a number.
        let answer = answer("device_count", |record| unsafe { f(out, record) })?;
        Ok((answer, count))
    }

    pub(super) fn device_info(
        &self,
        ordinal: u32,
        with_out: bool,
    ) -> Result<(Answer, abi::DeviceInfo), Failure> {
        let f = entry!(self, device_info);
        let mut out = Out::new(abi::DeviceInfo {
            struct_size: size_of::<abi::DeviceInfo>() as u32,
            ordinal: 0,
            id: [0xFF; 32],
            name: [0xFF; 128],
            total_memory: 0,
        });
        let place = if with_out {
            &raw mut out.value
        } else {
            std::ptr::null_mut()
        };
        // SAFETY: NULL, or room for the struct.
        let answer = answer("device_info", |record| unsafe { f(ordinal, place, record) })?;
        out.check("device_info")?;
        Ok((answer, out.value))
    }

    pub(super) fn open(&self, opening: Opening) -> Result<(Answer, Handle), Failure> {
        let f = entry!(self, device_open);
        let options = abi::OpenOptions {
            struct_size: size_of::<abi::OpenOptions>() as u32,
            flags: opening.flags,
            memory_budget: opening.budget,
            threads: 0,
            reserved: 0,
        };
        let mut handle = 0;
        // SAFETY: all are valid for the call.
        let answer = answer("device_open", |record| unsafe {
            f(self.ordinal, &options, &mut handle, record)
        })?;
        Ok((answer, handle))
    }

    /// Opens the device under test, or fails.
    pub(super) fn device(&self) -> Result<Handle, Failure> {
        let (answer, handle) = self.open(Opening::default())?;
        answer.ok("device_open")?;
        judge::holds("handle of a device", handle != 0, "not 0", handle)?;
        Ok(handle)
    }

    pub(super) fn open_with_null(&self, options: bool) -> Result<Answer, Failure> {
        let f = entry!(self, device_open);
        let own = abi::OpenOptions {
            struct_size: size_of::<abi::OpenOptions>() as u32,
            ..abi::OpenOptions::default()
        };
        let mut handle = 0;
        let (options, out) = if options {
            (std::ptr::null(), &raw mut handle)
        } else {
            (&raw const own, std::ptr::null_mut())
        };
        // SAFETY: one of them is NULL, which the call must survive.
        answer("device_open", |record| unsafe {
            f(self.ordinal, options, out, record)
        })
    }

    /// `struct_size` is what the caller says it has room for.
    pub(super) fn caps(&self, device: Handle, struct_size: usize) -> Result<(Answer, abi::Caps), Failure> {
        let f = entry!(self, caps);
        let mut room = Writable::new(size_of::<abi::Caps>().max(struct_size))?;
        room.fill(CANARY);
        let own = u32::try_from(struct_size).unwrap_or(u32::MAX);
        room[..4].copy_from_slice(&own.to_ne_bytes());
        let place = room.as_mut_ptr().cast::<abi::Caps>();
        // SAFETY: room for the whole struct, of which the size claims a part; it ends at a page, so it is aligned.
        let answer = answer("caps", |record| unsafe { f(device, place, record) })?;
        judge::holds(
            "bytes of `caps` past the caller's struct_size",
            room[struct_size..].iter().all(|b| *b == CANARY),
            "nothing written",
            "other bytes",
        )?;
        room[struct_size..].fill(0);
        // SAFETY: any bytes are valid for a struct of integers, and there are enough.
        let caps = unsafe { room.as_ptr().cast::<abi::Caps>().read_unaligned() };
        Ok((answer, caps))
    }

    pub(super) fn caps_null(&self, device: Handle) -> Result<Answer, Failure> {
        let f = entry!(self, caps);
        // SAFETY: NULL is what the call must survive.
        answer("caps", |record| unsafe {
            f(device, std::ptr::null_mut(), record)
        })
    }

    pub(super) fn memory(&self, device: Handle) -> Result<(Answer, abi::DeviceMemory), Failure> {
        let f = entry!(self, memory_info);
        let mut out = Out::new(abi::DeviceMemory {
            struct_size: size_of::<abi::DeviceMemory>() as u32,
            ..abi::DeviceMemory::default()
        });
        // SAFETY: room for the struct.
        let answer = answer("memory_info", |record| unsafe {
            f(device, &mut out.value, record)
        })?;
        out.check("memory_info")?;
        Ok((answer, out.value))
    }

    pub(super) fn plan_check(&self, device: Handle, plan: &Plan) -> Result<(Answer, u64), Failure> {
        let f = entry!(self, plan_check);
        let mut refusals = [abi::Refusal {
            tensor: u32::MAX,
            code: 0,
            reason: [0; 120],
        }; 4];
        let mut out = Out::new(abi::PlanReport {
            struct_size: size_of::<abi::PlanReport>() as u32,
            reserved: 0,
            bytes: [0; 4],
            refusals: refusals.as_mut_ptr(),
            // One less than there is, so that one too many is seen.
            refusal_capacity: refusals.len() as u64 - 1,
            refusal_count: 0,
        });
        let c_plan = plan.c();
        // SAFETY: all are valid for the call.
        let answer = answer("plan_check", |record| unsafe {
            f(device, &c_plan, &mut out.value, record)
        })?;
        out.check("plan_check")?;
        judge::equal(
            "the refusal past the caller's capacity",
            u32::MAX,
            refusals[3].tensor,
        )?;
        Ok((answer, out.value.refusal_count))
    }

    pub(super) fn load_begin(&self, device: Handle, plan: &Plan) -> Result<(Answer, Handle), Failure> {
        let f = entry!(self, load_begin);
        let (c_plan, mut load) = (plan.c(), 0);
        // SAFETY: all are valid for the call.
        let answer = answer("load_begin", |record| unsafe {
            f(device, &c_plan, &mut load, record)
        })?;
        Ok((answer, load))
    }

    pub(super) fn load_begin_null(&self, device: Handle, plan: Option<&Plan>) -> Result<Answer, Failure> {
        let f = entry!(self, load_begin);
        let c_plan = plan.map(Plan::c);
        let mut load = 0;
        let (plan, out) = match &c_plan {
            Some(plan) => (std::ptr::from_ref(plan), std::ptr::null_mut()),
            None => (std::ptr::null(), &raw mut load),
        };
        // SAFETY: one of them is NULL, which the call must survive.
        answer("load_begin", |record| unsafe { f(device, plan, out, record) })
    }

    /// Uploads `len` bytes as the chunk says, from a guarded buffer of `bytes`; `None`: from NULL.
    pub(super) fn upload(
        &self,
        load: Handle,
        tensor: u32,
        offset: u64,
        bytes: Option<&[u8]>,
        semantics: u32,
    ) -> Result<Answer, Failure> {
        let f = entry!(self, upload);
        let buffer = bytes.map(ReadOnly::new).transpose()?;
        let chunk = abi::Chunk {
            struct_size: size_of::<abi::Chunk>() as u32,
            tensor,
            offset,
            data: buffer.as_ref().map_or(std::ptr::null(), |b| b.as_ptr()),
            len: buffer.as_ref().map_or(8, |b| b.len() as u64),
            semantics,
            reserved: 0,
        };
        // SAFETY: the bytes are valid for the call, or NULL, which it must survive.
        let answer = answer("upload", |record| unsafe { f(load, &chunk, record) })?;
        if let Some(buffer) = buffer {
            drop(buffer.scribble());
        }
        Ok(answer)
    }

    pub(super) fn upload_null(&self, load: Handle) -> Result<Answer, Failure> {
        let f = entry!(self, upload);
        // SAFETY: NULL is what the call must survive.
        answer("upload", |record| unsafe { f(load, std::ptr::null(), record) })
    }

    pub(super) fn commit(&self, load: Handle) -> Result<(Answer, Handle, abi::LoadReceipt), Failure> {
        let f = entry!(self, load_commit);
        let mut model = 0;
        let mut out = Out::new(abi::LoadReceipt {
            struct_size: size_of::<abi::LoadReceipt>() as u32,
            ..abi::LoadReceipt::default()
        });
        // SAFETY: all are valid for the call.
        let answer = answer("load_commit", |record| unsafe {
            f(load, &mut model, &mut out.value, record)
        })?;
        out.check("load_commit")?;
        Ok((answer, model, out.value))
    }

    pub(super) fn abort(&self, load: Handle) -> Result<Answer, Failure> {
        let f = entry!(self, load_abort);
        // SAFETY: a number and a record; the number may be no handle, which the call must survive.
        answer("load_abort", |record| unsafe { f(load, record) })
    }

    pub(super) fn destroy(&self, model: Handle) -> Result<Answer, Failure> {
        let f = entry!(self, model_destroy);
        // SAFETY: as in `abort`.
        answer("model_destroy", |record| unsafe { f(model, record) })
    }

    pub(super) fn close(&self, device: Handle) -> Result<Answer, Failure> {
        let f = entry!(self, device_close);
        // SAFETY: as in `abort`.
        answer("device_close", |record| unsafe { f(device, record) })
    }

    pub(super) fn shutdown(&self) -> Result<Answer, Failure> {
        let f = entry!(self, shutdown);
        // SAFETY: a record.
        let answer = answer("shutdown", |record| unsafe { f(record) })?;
        self.log.over.store(answer.status == Status::OK, Ordering::SeqCst);
        Ok(answer)
    }

    pub(super) fn read_back(
        &self,
        model: Handle,
        tensor: u32,
        offset: u64,
        len: usize,
    ) -> Result<(Answer, Vec<u8>), Failure> {
        let f = entry!(self, readback);
        let mut out = Writable::new(len)?;
        // SAFETY: room for `len` bytes.
        let answer = answer("readback", |record| unsafe {
            f(model, tensor, offset, out.as_mut_ptr(), len as u64, record)
        })?;
        out.check("readback")?;
        Ok((answer, out.to_vec()))
    }

    pub(super) fn read_back_null(&self, model: Handle) -> Result<Answer, Failure> {
        let f = entry!(self, readback);
        // SAFETY: NULL is what the call must survive.
        answer("readback", |record| unsafe {
            f(model, 0, 0, std::ptr::null_mut(), 8, record)
        })
    }

    /// A call that fails, with no record to fill.
    pub(super) fn close_without_record(&self, device: Handle) -> Result<Status, Failure> {
        let f = entry!(self, device_close);
        // SAFETY: NULL stands for no record.
        Ok(unsafe { f(device, std::ptr::null_mut()) })
    }

    /// A failing call with a record of which the caller says it has only so many bytes. Whether anything behind them was
    /// written to.
    pub(super) fn close_with_short_record(
        &self,
        device: Handle,
        size: usize,
    ) -> Result<(Status, bool), Failure> {
        let f = entry!(self, device_close);
        let mut room = Writable::new(size_of::<ErrorRecord>())?;
        room.fill(CANARY);
        room[..4].copy_from_slice(&u32::try_from(size).unwrap_or(u32::MAX).to_ne_bytes());
        let record = room.as_mut_ptr().cast::<ErrorRecord>();
        // SAFETY: room for a whole record, of which the size claims a part; it ends at a page, so it is aligned.
        let status = unsafe { f(device, record) };
        room.check("device_close")?;
        Ok((status, room[size.max(4)..].iter().all(|b| *b == CANARY)))
    }

    /// The entries of models that are optional, with handles that are none. Those that are NULL are left out.
    pub(super) fn optional_on(&self, model: Handle) -> Result<Vec<(&'static str, Answer)>, Failure> {
        let mut answers = Vec::new();
        if let Some(f) = self.table.digest {
            let mut digest = [0u8; 32];
            // SAFETY: room for the digest.
            let given = answer("digest", |record| unsafe {
                f(model, 0, digest.as_mut_ptr(), record)
            })?;
            answers.push(("digest", given));
        }
        if let Some(f) = self.table.build_index {
            let layout = abi::IndexLayout {
                struct_size: size_of::<abi::IndexLayout>() as u32,
                layers: 0,
                entries: std::ptr::null(),
                entry_count: 0,
            };
            let mut receipt = abi::IndexReceipt {
                struct_size: size_of::<abi::IndexReceipt>() as u32,
                ..abi::IndexReceipt::default()
            };
            let given =
                // SAFETY: both are valid for the call; an empty array may be NULL.
                answer("build_index", |record| unsafe { f(model, &layout, &mut receipt, record) })?;
            answers.push(("build_index", given));
        }
        if let Some(f) = self.table.truncate {
            // SAFETY: numbers and a record.
            answers.push((
                "truncate",
                answer("truncate", |record| unsafe { f(model, 0, 0, record) })?,
            ));
        }
        if let Some(f) = self.table.forward {
            let batch: abi::Batch = empty_batch();
            let mut outputs = empty_outputs();
            // SAFETY: both are valid for the call, and empty.
            let given = answer("forward", |record| unsafe {
                f(model, &batch, &mut outputs, record)
            })?;
            answers.push(("forward", given));
        }
        Ok(answers)
    }
}

fn empty_batch() -> abi::Batch {
    // SAFETY: a struct of integers and addresses, for all of which zeros are valid.
    let mut batch: abi::Batch = unsafe { std::mem::zeroed() };
    batch.struct_size = size_of::<abi::Batch>() as u32;
    batch
}

fn empty_outputs() -> abi::Outputs {
    // SAFETY: a struct of integers and addresses, for all of which zeros are valid.
    let mut outputs: abi::Outputs = unsafe { std::mem::zeroed() };
    outputs.struct_size = size_of::<abi::Outputs>() as u32;
    outputs
}

/// A plan as C sees it. Owns its arrays.
pub(super) struct Plan {
    tensors: Vec<abi::Tensor>,
    names: Vec<Box<str>>,
    layers: u32,
    nbytes: u64,
    resident: u64,
}

impl Plan {
    pub(super) fn new(plan: &LoadPlan) -> Self {
        let names: Vec<Box<str>> = plan.weights.iter().map(|w| w.name.as_str().into()).collect();
        let tensors = plan
            .weights
            .iter()
            .zip(&names)
            .map(|(w, name)| abi::Tensor {
                struct_size: size_of::<abi::Tensor>() as u32,
                id: w.id.0,
                layer: w.layer.unwrap_or(abi::NO_LAYER),
                role: w.role.id(),
                class: match w.class {
                    WeightClass::Quantized => 0,
                    WeightClass::Float => 1,
                    WeightClass::Gamma => 2,
                    WeightClass::Bias => 3,
                },
                encoding: encoding_number(w.encoding),
                layout: u32::from(w.layout == FloatLayout::InOut),
                granule: w.granule() as u32,
                matrices: w.shape.matrices,
                rows: w.shape.rows,
                cols: w.shape.cols,
                nbytes: w.nbytes,
                resident_bytes: w.resident_bytes,
                name: name.as_ptr(),
                name_len: name.len() as u64,
            })
            .collect();
        Self {
            tensors,
            names,
            layers: plan.layers,
            nbytes: plan.nbytes,
            resident: plan.resident.weights(),
        }
    }

    /// Changes one tensor's encoding to a number of no encoding.
    #[must_use]
    pub(super) fn with_encoding(mut self, tensor: usize, number: u32) -> Self {
        if let Some(t) = self.tensors.get_mut(tensor) {
            t.encoding = number;
        }
        self
    }

    fn c(&self) -> abi::PlanV {
        debug_assert_eq!(self.names.len(), self.tensors.len());
        abi::PlanV {
            struct_size: size_of::<abi::PlanV>() as u32,
            layers: self.layers,
            tensors: self.tensors.as_ptr(),
            tensor_count: self.tensors.len() as u64,
            tensor_size: size_of::<abi::Tensor>() as u64,
            nbytes: self.nbytes,
            resident_bytes: self.resident,
        }
    }
}

/// The number of an encoding in the interface: GGML's, or APR's own.
fn encoding_number(encoding: Encoding) -> u32 {
    match encoding {
        Encoding::APR_Q4 => 128,
        Encoding::APR_Q8 => 129,
        other => other.ggml_id().unwrap_or(u32::MAX),
    }
}

/// A table and a plan that several threads use, one at a time.
pub(super) struct Shared(pub(super) Raw, pub(super) Plan);

// SAFETY: the table's addresses are code, the plan's are names that it owns; nothing of either is written to, and the
// threads of a case take turns.
unsafe impl Sync for Shared {}

impl Shared {
    pub(super) fn raw(&self) -> &Raw {
        &self.0
    }

    pub(super) fn plan(&self) -> &Plan {
        &self.1
    }
}
