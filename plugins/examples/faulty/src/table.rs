//! The table of the SDK with each entry wrapped: what can be wrong at the boundary itself.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hoist_plugin_sdk::abi::{
    Batch, Caps, Chunk, DeviceInfo, DeviceMemory, ErrorRecord, Handle, IndexLayout, IndexReceipt,
    LoadCallbacks, LoadReceipt, LogFn, OpenOptions, Outputs, PlanReport, PlanV, Plugin, Program, Status,
    WorkspaceBytes, WorkspaceDims,
};

use crate::crash::{hand_out, misbehave, swallows};
use crate::{is, is_of, yes};

static BASE: OnceLock<&'static Plugin> = OnceLock::new();
static LOG: OnceLock<Option<LogFn>> = OnceLock::new();
/// Whether DEVICE_LOST was returned, for `lost-then-ok`.
static LOST: AtomicBool = AtomicBool::new(false);

fn base() -> &'static Plugin {
    BASE.get().unwrap()
}

/// The table that misbehaves. It stays for the life of the process.
pub(crate) fn make(base: &'static Plugin, log: Option<LogFn>) -> *const Plugin {
    let _ = BASE.set(base);
    let _ = LOG.set(log);
    if is("yes") {
        return yes::table();
    }
    let mut table = wrapped(base);
    match crate::chosen() {
        "size-zero" => table.struct_size = 0,
        "size-short" => table.struct_size = 64,
        "size-huge" => table.struct_size = u32::MAX,
        _ => {}
    }
    Box::leak(Box::new(table))
}

/// Defines a function for each entry: it misbehaves, calls the SDK's, lets `after` look at what that did, and swallows its
/// failure. They may unwind: that is `throw`.
macro_rules! entries {
    ($($name:ident($($arg:ident: $type:ty),*) $after:expr;)*) => {
        $(
            unsafe extern "C-unwind" fn $name($($arg: $type,)* error: *mut ErrorRecord) -> Status {
                if let Some(status) = misbehave(stringify!($name), error) {
                    return status;
                }
                let function = base().$name.unwrap();
                // SAFETY: passes on what the caller vouches for.
                let status = unsafe { function($($arg,)* error) };
                #[allow(clippy::redundant_closure_call, reason = "one form for all entries")]
                let status = ($after)(status, error);
                if swallows(stringify!($name), status) { Status::OK } else { status }
            }
        )*

        fn wrapped(base: &Plugin) -> Plugin {
            let mut table = *base;
            $(
                if is_of("null", stringify!($name)) {
                    table.$name = None;
                } else if base.$name.is_some() {
                    let function: unsafe extern "C-unwind" fn($($type,)* *mut ErrorRecord) -> Status = $name;
                    // SAFETY: the types differ in nothing but whether a call may unwind. The host's does not expect it.
                    let function = unsafe {
                        std::mem::transmute::<
                            unsafe extern "C-unwind" fn($($type,)* *mut ErrorRecord) -> Status,
                            unsafe extern "C" fn($($type,)* *mut ErrorRecord) -> Status,
                        >(function)
                    };
                    table.$name = Some(function);
                }
            )*
            table
        }
    };
}

type Error = *mut ErrorRecord;

fn nothing(status: Status, _: Error) -> Status {
    status
}

entries! {
    device_count(count: *mut u32) |status, _: Error| {
        // SAFETY: the caller vouches for the place.
        let set = |n| unsafe { count.write(n) };
        match crate::chosen() {
            "devices-none" => set(0),
            "devices-huge" => set(u32::MAX),
            _ => {}
        }
        status
    };
    device_info(ordinal: u32, info: *mut DeviceInfo) |status, _: Error| {
        if is("strings") {
            // SAFETY: the caller vouches for the place.
            unsafe { (*info).name = [b'x'; 128] };
        }
        status
    };
    device_open(ordinal: u32, options: *const OpenOptions, device: *mut Handle) |status, _: Error| {
        hand_out("device_open", device);
        status
    };
    caps(device: Handle, caps: *mut Caps) |status, _: Error| {
        if status == Status::OK {
            // SAFETY: the caller vouches for the place.
            lie(unsafe { &mut *caps });
        }
        status
    };
    memory_info(device: Handle, memory: *mut DeviceMemory) |status, _: Error| {
        if is("memory-lies") {
            // SAFETY: the caller vouches for the place.
            unsafe { (*memory).resident = [0; 7] };
        }
        status
    };
    plan_check(device: Handle, plan: *const PlanV, report: *mut PlanReport) nothing;
    load_begin(device: Handle, plan: *const PlanV, load: *mut Handle) |status, _: Error| {
        hand_out("load_begin", load);
        status
    };
    upload(load: Handle, chunk: *const Chunk) nothing;
    load_commit(load: Handle, model: *mut Handle, receipt: *mut LoadReceipt) |status, _: Error| {
        hand_out("load_commit", model);
        if is("receipt-tensors") && status == Status::OK && !receipt.is_null() {
            // SAFETY: the caller vouches for the place.
            unsafe { (*receipt).tensors -= 1 };
        }
        status
    };
    load_abort(load: Handle) |status, _: Error| twice(status);
    readback(model: Handle, tensor: u32, offset: u64, out: *mut u8, len: u64) |status, _: Error| {
        if status == Status::OK && is("readback-wrong") {
            // SAFETY: the call worked, so that there is a byte.
            unsafe { *out ^= 1 };
        }
        if status == Status::OK && is("readback-overrun") {
            // SAFETY: none: it is one past the caller's buffer.
            unsafe { out.wrapping_add(len as usize).write_volatile(1) };
        }
        status
    };
    model_destroy(model: Handle) |status, _: Error| twice(status);
    device_close(device: Handle) |status, _: Error| twice(status);
    shutdown() |status, _: Error| {
        if is("callback-late") {
            std::thread::spawn(call_late);
        }
        status
    };
    build_index(model: Handle, layout: *const IndexLayout, receipt: *mut IndexReceipt) nothing;
    workspace_bytes(device: Handle, dims: *const WorkspaceDims, bytes: *mut WorkspaceBytes) |status, _: Error| {
        if is("workspace-lies") && status == Status::OK {
            // SAFETY: the caller vouches for the place.
            unsafe { (*bytes).workspace /= 2 };
        }
        status
    };
    workspace_create(model: Handle, dims: *const WorkspaceDims, bytes: *mut WorkspaceBytes) nothing;
    prepare(model: Handle, program: *const Program) nothing;
    forward(model: Handle, batch: *const Batch, outputs: *mut Outputs) |status, error: Error| {
        if is("lost-then-ok") {
            if LOST.swap(true, Ordering::Relaxed) {
                return Status::OK;
            }
            return crate::crash::fail(error, Status::DEVICE_LOST, "the device fell off");
        }
        // SAFETY: the caller vouches for the outputs.
        let out = unsafe { &*outputs };
        if is("logits-overrun") && status == Status::OK && out.logits_count > 0 {
            // SAFETY: none: it is one past the caller's logits.
            unsafe { out.logits.wrapping_add(out.logits_count as usize).write_volatile(1.0) };
        }
        if is("argmax-overrun") && status == Status::OK && out.argmax_count > 0 {
            // SAFETY: none: it is one past the caller's arg-maxima.
            unsafe { out.argmax.wrapping_add(out.argmax_count as usize).write_volatile(1) };
        }
        status
    };
    truncate(model: Handle, sequence: u32, length: u32) nothing;
    load_from(load: Handle, callbacks: *const LoadCallbacks) nothing;
    digest(model: Handle, tensor: u32, digest: *mut u8) |status, _: Error| {
        if is("digest-wrong") && status == Status::OK {
            // SAFETY: the caller vouches for 32 bytes.
            unsafe { *digest ^= 1 };
        }
        status
    };
}

/// Q4_1's number.
const Q4_1: u32 = 3;

fn lie(caps: &mut Caps) {
    if crate::bounded() {
        caps.numerics = 1;
    }
    match crate::chosen() {
        "caps-numerics" => caps.numerics = 7,
        "caps-alignment" => caps.weight_alignment = 3,
        "caps-operations" => caps.ops = 1 << 40,
        "unclaimed-encoding" => {
            caps.stored[0] &= !(1 << Q4_1);
            caps.computed[0] &= !(1 << Q4_1);
        }
        _ => {}
    }
}

fn twice(status: Status) -> Status {
    if status == Status::BAD_HANDLE && is("double-destroy-aborts") {
        std::process::abort();
    }
    status
}

fn call_late() {
    std::thread::sleep(Duration::from_millis(50));
    let message = "still here";
    if let Some(Some(log)) = LOG.get() {
        // SAFETY: none: the host is not there any more.
        unsafe { log(std::ptr::null_mut(), 3, message.as_ptr(), message.len() as u64) };
    }
    std::thread::sleep(Duration::from_secs(2));
}
