use crate::{
    Batch, Chunk, ErrorRecord, Host, IndexLayout, IndexReceipt, LoadCallbacks, LoadReceipt, Outputs,
    PlanReport, PlanV, Program, Status, WorkspaceBytes, WorkspaceDims,
};

/// A device, load or model of the plugin; 0 is never valid.
pub type Handle = u64;

/// A device the plugin found.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DeviceInfo {
    pub struct_size: u32,
    pub ordinal: u32,
    /// Strings are UTF-8 and NUL-terminated.
    pub id: [u8; 32],
    pub name: [u8; 128],
    pub total_memory: u64,
}

/// Weights may be used in place where the host offers it.
pub const OPTION_IMPORT: u32 = 1;
/// Only portable scalar code, for comparison.
pub const OPTION_FORCE_SCALAR: u32 = 2;

/// How a device is opened.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    pub struct_size: u32,
    /// `OPTION_*`; an unknown bit is `INVALID_ARGUMENT`, a known one that cannot be honoured `UNSUPPORTED`.
    pub flags: u32,
    /// Most bytes the plugin may own on the device; 0: no limit but the device's.
    pub memory_budget: u64,
    /// Host threads; 0: the plugin's choice.
    pub threads: u32,
    pub reserved: u32,
}

/// What an open device is and wants.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Caps {
    pub struct_size: u32,
    /// 0: exact; 1: bounded.
    pub numerics: u32,
    /// Bit `n % 64` of word `n / 64`: encoding number `n` can be held, and can be computed with.
    pub stored: [u64; 4],
    pub computed: [u64; 4],
    /// Bit `n`: operation number `n` can be run. 0 for a plugin that only holds weights.
    pub ops: u64,
    /// Layout wanted for float matmul weights: 0 `[out, in]`, 1 `[in, out]`.
    pub float_layout: u32,
    /// Limits; 0: none.
    pub max_batch_tokens: u32,
    pub max_sequences: u32,
    pub max_context: u32,
    pub max_weight_bytes: u64,
    /// How the host computes resident bytes; see `Sizing` of the Rust contract. The alignment is a power of two.
    pub weight_alignment: u64,
    pub quantized_row_bytes: u64,
    pub quantized_segment_bytes: u64,
    pub index_entry_bytes: u64,
    /// Most canonical bytes of one row of a weight, a vector being one row; 0: no limit. Since minor 2.
    pub max_row_bytes: u64,
}

/// Memory of one device, in bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct DeviceMemory {
    pub struct_size: u32,
    pub reserved: u32,
    pub total: u64,
    pub free: u64,
    /// The budget it was opened with; 0: none.
    pub budget: u64,
    /// Owned: quantised, float, gamma, bias, index, kv, workspace.
    pub resident: [u64; 7],
    /// Imported weight bytes, not owned.
    pub imported: u64,
}

/// The table of functions. Entries marked optional may be NULL; the host then answers UNSUPPORTED for them.
///
/// States of a device: OPEN → (`load_begin`) LOADING → (`load_commit`) LOADED → (`build_index`) INDEXED →
/// (`workspace_create`) READY → (`prepare`) PREPARED. One load or model a device at a time. A call in another state is
/// `BAD_STATE` and changes nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Plugin {
    pub struct_size: u32,
    pub reserved: u32,

    // ---- residency profile: all required ----
    /// `[any]` Devices this machine has; 0 is an answer.
    pub device_count: Option<unsafe extern "C" fn(count: *mut u32, error: *mut ErrorRecord) -> Status>,
    /// `[any]`
    pub device_info:
        Option<unsafe extern "C" fn(ordinal: u32, info: *mut DeviceInfo, error: *mut ErrorRecord) -> Status>,
    /// `[any]`
    pub device_open: Option<
        unsafe extern "C" fn(
            ordinal: u32,
            options: *const OpenOptions,
            device: *mut Handle,
            error: *mut ErrorRecord,
        ) -> Status,
    >,
    /// `[any]`
    pub caps:
        Option<unsafe extern "C" fn(device: Handle, caps: *mut Caps, error: *mut ErrorRecord) -> Status>,
    /// `[any]`
    pub memory_info: Option<
        unsafe extern "C" fn(device: Handle, memory: *mut DeviceMemory, error: *mut ErrorRecord) -> Status,
    >,
    /// `[serial: device]` Dry run: allocates nothing, changes nothing.
    pub plan_check: Option<
        unsafe extern "C" fn(
            device: Handle,
            plan: *const PlanV,
            report: *mut PlanReport,
            error: *mut ErrorRecord,
        ) -> Status,
    >,
    /// `[serial: device]` OPEN → LOADING. May allocate one arena.
    pub load_begin: Option<
        unsafe extern "C" fn(
            device: Handle,
            plan: *const PlanV,
            load: *mut Handle,
            error: *mut ErrorRecord,
        ) -> Status,
    >,
    /// `[serial: device]` Any order, any multiple of the granule. Empty, out of range, block-splitting and overlapping
    /// chunks are `INVALID_ARGUMENT` and change nothing.
    pub upload:
        Option<unsafe extern "C" fn(load: Handle, chunk: *const Chunk, error: *mut ErrorRecord) -> Status>,
    /// `[serial: device]` LOADING → LOADED. `INVALID_ARGUMENT` with tensor and byte offset of the first missing range.
    pub load_commit: Option<
        unsafe extern "C" fn(
            load: Handle,
            model: *mut Handle,
            receipt: *mut LoadReceipt,
            error: *mut ErrorRecord,
        ) -> Status,
    >,
    /// `[serial: device]` LOADING → OPEN; nothing stays resident.
    pub load_abort: Option<unsafe extern "C" fn(load: Handle, error: *mut ErrorRecord) -> Status>,
    /// `[serial: device]` Canonical bytes, private layouts undone.
    pub readback: Option<
        unsafe extern "C" fn(
            model: Handle,
            tensor: u32,
            offset: u64,
            out: *mut u8,
            len: u64,
            error: *mut ErrorRecord,
        ) -> Status,
    >,
    /// `[serial: device]` Any state from LOADED on → OPEN.
    pub model_destroy: Option<unsafe extern "C" fn(model: Handle, error: *mut ErrorRecord) -> Status>,
    /// `[serial: device]` Destroys what is left on it, too.
    pub device_close: Option<unsafe extern "C" fn(device: Handle, error: *mut ErrorRecord) -> Status>,
    /// `[any]` Once, when no device is open. All threads are joined when it returns.
    pub shutdown: Option<unsafe extern "C" fn(error: *mut ErrorRecord) -> Status>,

    // ---- index and workspace: optional; without them the host's table serves ----
    /// `[serial: device]` LOADED → INDEXED.
    pub build_index: Option<
        unsafe extern "C" fn(
            model: Handle,
            layout: *const IndexLayout,
            receipt: *mut IndexReceipt,
            error: *mut ErrorRecord,
        ) -> Status,
    >,
    /// `[any]` What `workspace_create` would take.
    pub workspace_bytes: Option<
        unsafe extern "C" fn(
            device: Handle,
            dims: *const WorkspaceDims,
            bytes: *mut WorkspaceBytes,
            error: *mut ErrorRecord,
        ) -> Status,
    >,
    /// `[serial: device]` INDEXED → READY. After it addresses are fixed and nothing is allocated.
    pub workspace_create: Option<
        unsafe extern "C" fn(
            model: Handle,
            dims: *const WorkspaceDims,
            bytes: *mut WorkspaceBytes,
            error: *mut ErrorRecord,
        ) -> Status,
    >,

    // ---- decode profile: all or none ----
    /// `[serial: device]` READY or PREPARED → PREPARED. Resets every sequence.
    pub prepare: Option<
        unsafe extern "C" fn(model: Handle, program: *const Program, error: *mut ErrorRecord) -> Status,
    >,
    /// `[serial: device]` On any error sequence lengths are unchanged.
    pub forward: Option<
        unsafe extern "C" fn(
            model: Handle,
            batch: *const Batch,
            outputs: *mut Outputs,
            error: *mut ErrorRecord,
        ) -> Status,
    >,
    /// `[serial: device]` Cuts a sequence to `length` tokens; 0 resets it.
    pub truncate: Option<
        unsafe extern "C" fn(model: Handle, sequence: u32, length: u32, error: *mut ErrorRecord) -> Status,
    >,

    // ---- optional ----
    /// `[serial: device]` Pulls the whole plan through the host's callbacks.
    pub load_from: Option<
        unsafe extern "C" fn(
            load: Handle,
            callbacks: *const LoadCallbacks,
            error: *mut ErrorRecord,
        ) -> Status,
    >,
    /// `[serial: device]` BLAKE3 (32 bytes) of a tensor's canonical bytes.
    pub digest: Option<
        unsafe extern "C" fn(model: Handle, tensor: u32, digest: *mut u8, error: *mut ErrorRecord) -> Status,
    >,
    /// `[any]` Asks the `load_from` that is running on a device to return `CANCELLED` soon; for plugins that spend long
    /// stretches of it without asking the host's `progress`. Called from another thread, again and again until `load_from`
    /// has returned; without one running it changes nothing.
    pub cancel: Option<unsafe extern "C" fn(device: Handle, error: *mut ErrorRecord) -> Status>,
    /// `[serial: device]` LOADED or later. Choices that a load report should show, such as which path bytes took: one flat
    /// JSON object of strings, UTF-8, of at most `STATS_MAX_BYTES`. `needed` tells its length; if `capacity` is less,
    /// nothing is written and the host asks again.
    pub stats: Option<
        unsafe extern "C" fn(
            device: Handle,
            out: *mut u8,
            capacity: u64,
            needed: *mut u64,
            error: *mut ErrorRecord,
        ) -> Status,
    >,
}

/// Longest text of `stats`, in bytes.
pub const STATS_MAX_BYTES: u64 = 65536;

/// Hands over the table, which stays valid until `shutdown`. `minor` is the agreed one.
pub type OpenV1 = unsafe extern "C" fn(
    host: *const Host,
    minor: u32,
    plugin: *mut *const Plugin,
    error: *mut ErrorRecord,
) -> Status;
