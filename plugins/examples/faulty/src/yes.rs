//! The plugin that says yes to everything and does nothing.

use std::sync::atomic::{AtomicU32, Ordering};

use hoist_plugin_sdk::abi::{
    Batch, Caps, Chunk, DeviceInfo, DeviceMemory, ErrorRecord, Handle, IndexLayout, IndexReceipt,
    LoadCallbacks, LoadReceipt, OpenOptions, Outputs, PlanReport, PlanV, Plugin, Program, SLOT_ABSENT,
    Status, WorkspaceBytes, WorkspaceDims,
};

/// Tensors of the plan that was begun last: what the receipt vouches for.
static TENSORS: AtomicU32 = AtomicU32::new(0);

pub(crate) fn table() -> *const Plugin {
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
        load_abort: Some(done),
        readback: Some(readback),
        model_destroy: Some(done),
        device_close: Some(done),
        shutdown: Some(shutdown),
        build_index: Some(build_index),
        workspace_bytes: Some(workspace),
        workspace_create: Some(workspace),
        prepare: Some(prepare),
        forward: Some(forward),
        truncate: Some(truncate),
        load_from: Some(load_from),
        digest: None,
        cancel: None,
        stats: None,
    };
    &TABLE
}

type Error = *mut ErrorRecord;

/// Writes what the caller asked for.
fn put<T>(place: *mut T, value: T) -> Status {
    if !place.is_null() {
        // SAFETY: the caller vouches for the place.
        unsafe { place.write(value) };
    }
    Status::OK
}

unsafe extern "C" fn device_count(count: *mut u32, _: Error) -> Status {
    put(count, 1)
}

unsafe extern "C" fn device_info(ordinal: u32, info: *mut DeviceInfo, _: Error) -> Status {
    let mut own = DeviceInfo {
        struct_size: size_of::<DeviceInfo>() as u32,
        ordinal,
        id: [0; 32],
        name: [0; 128],
        total_memory: 1 << 40,
    };
    own.id[..3].copy_from_slice(b"yes");
    own.name[..3].copy_from_slice(b"Yes");
    put(info, own)
}

unsafe extern "C" fn device_open(_: u32, _: *const OpenOptions, device: *mut Handle, _: Error) -> Status {
    put(device, 1)
}

unsafe extern "C" fn caps(_: Handle, caps: *mut Caps, _: Error) -> Status {
    let own = Caps {
        struct_size: size_of::<Caps>() as u32,
        stored: [u64::MAX; 4],
        computed: [u64::MAX; 4],
        ops: u64::MAX,
        weight_alignment: 64,
        ..Caps::default()
    };
    put(caps, own)
}

unsafe extern "C" fn memory_info(_: Handle, memory: *mut DeviceMemory, _: Error) -> Status {
    let own = DeviceMemory {
        struct_size: size_of::<DeviceMemory>() as u32,
        total: 1 << 40,
        free: 1 << 40,
        ..DeviceMemory::default()
    };
    put(memory, own)
}

unsafe extern "C" fn plan_check(_: Handle, _: *const PlanV, report: *mut PlanReport, _: Error) -> Status {
    // SAFETY: the caller vouches for the report.
    unsafe { (*report).refusal_count = 0 };
    Status::OK
}

unsafe extern "C" fn load_begin(_: Handle, plan: *const PlanV, load: *mut Handle, _: Error) -> Status {
    // SAFETY: the caller vouches for the plan.
    TENSORS.store(unsafe { (*plan).tensor_count } as u32, Ordering::Relaxed);
    put(load, 1)
}

unsafe extern "C" fn upload(_: Handle, _: *const Chunk, _: Error) -> Status {
    Status::OK
}

unsafe extern "C" fn load_commit(
    _: Handle,
    model: *mut Handle,
    receipt: *mut LoadReceipt,
    _: Error,
) -> Status {
    let own = LoadReceipt {
        struct_size: size_of::<LoadReceipt>() as u32,
        tensors: TENSORS.load(Ordering::Relaxed),
        ..LoadReceipt::default()
    };
    put(receipt, own);
    put(model, 1)
}

unsafe extern "C" fn done(_: Handle, _: Error) -> Status {
    Status::OK
}

unsafe extern "C" fn shutdown(_: Error) -> Status {
    Status::OK
}

unsafe extern "C" fn readback(_: Handle, _: u32, _: u64, _: *mut u8, _: u64, _: Error) -> Status {
    Status::OK
}

unsafe extern "C" fn build_index(
    _: Handle,
    layout: *const IndexLayout,
    receipt: *mut IndexReceipt,
    _: Error,
) -> Status {
    // SAFETY: the caller vouches for the layout.
    let layout = unsafe { &*layout };
    // SAFETY: the caller vouches for the entries.
    let entries = unsafe { std::slice::from_raw_parts(layout.entries, layout.entry_count as usize) };
    let own = IndexReceipt {
        struct_size: size_of::<IndexReceipt>() as u32,
        layers: layout.layers,
        entries: entries.iter().filter(|e| e.slot != SLOT_ABSENT).count() as u32,
        ..IndexReceipt::default()
    };
    put(receipt, own)
}

unsafe extern "C" fn workspace(
    _: Handle,
    _: *const WorkspaceDims,
    bytes: *mut WorkspaceBytes,
    _: Error,
) -> Status {
    let own = WorkspaceBytes {
        struct_size: size_of::<WorkspaceBytes>() as u32,
        ..WorkspaceBytes::default()
    };
    put(bytes, own)
}

unsafe extern "C" fn prepare(_: Handle, _: *const Program, _: Error) -> Status {
    Status::OK
}

unsafe extern "C" fn forward(_: Handle, _: *const Batch, _: *mut Outputs, _: Error) -> Status {
    Status::OK
}

unsafe extern "C" fn truncate(_: Handle, _: u32, _: u32, _: Error) -> Status {
    Status::OK
}

unsafe extern "C" fn load_from(_: Handle, _: *const LoadCallbacks, _: Error) -> Status {
    Status::OK
}
