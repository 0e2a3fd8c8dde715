use core::ffi::c_void;

use crate::Status;

/// One weight of a plan. Read with the plan's `tensor_size` as stride.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Tensor {
    pub struct_size: u32,
    /// Its index in the plan: how uploads and read-backs name it.
    pub id: u32,
    /// Layer, or `NO_LAYER`.
    pub layer: u32,
    /// Role number, as listed in the header.
    pub role: u32,
    /// 0 quantised, 1 float, 2 gamma (norm vector, f32), 3 bias (f32).
    pub class: u32,
    /// Encoding number: GGML's `ggml_type`; 128 APR Q4, 129 APR Q8.
    pub encoding: u32,
    /// 0: `[out, in]`; 1: the plugin asked for `[in, out]` and transposes.
    pub layout: u32,
    /// Bytes of a block: uploads and read-backs start and end at multiples.
    pub granule: u32,
    /// Canonical shape `[matrices, rows, cols]`, row-major.
    pub matrices: u64,
    pub rows: u64,
    pub cols: u64,
    /// Canonical bytes.
    pub nbytes: u64,
    /// What the plan counts for it on the device, by the plugin's `Caps`.
    pub resident_bytes: u64,
    /// UTF-8, `name_len` bytes, not terminated; for messages.
    pub name: *const u8,
    pub name_len: u64,
}

/// Everything that will be resident. Valid for the call only.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PlanV {
    pub struct_size: u32,
    pub layers: u32,
    pub tensors: *const Tensor,
    pub tensor_count: u64,
    /// Stride of `tensors` in bytes.
    pub tensor_size: u64,
    /// Canonical bytes of all tensors.
    pub nbytes: u64,
    /// Resident bytes of all weights.
    pub resident_bytes: u64,
}

/// A tensor that `plan_check` cannot take, and why.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Refusal {
    pub tensor: u32,
    /// A negative status.
    pub code: i32,
    /// UTF-8, NUL-terminated.
    pub reason: [u8; 120],
}

/// What a dry run found. The caller provides `refusals` and its capacity.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PlanReport {
    pub struct_size: u32,
    pub reserved: u32,
    /// Device bytes that the weights would take: quantised, float, gamma, bias.
    pub bytes: [u64; 4],
    pub refusals: *mut Refusal,
    pub refusal_capacity: u64,
    /// How many there are; may exceed the capacity.
    pub refusal_count: u64,
}

/// The buffer is copied, or enqueued from memory of the plugin's own, before the call returns.
pub const UPLOAD_COPY_IN_CALL: u32 = 0;
/// The buffer stays valid and unchanged until the model is destroyed or the load aborted; the plugin may use it in place.
pub const UPLOAD_IMPORT_UNTIL_RELEASE: u32 = 1;

/// A run of canonical bytes. Never written to, never read past `len`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Chunk {
    pub struct_size: u32,
    pub tensor: u32,
    pub offset: u64,
    pub data: *const u8,
    pub len: u64,
    /// `UPLOAD_*`
    pub semantics: u32,
    pub reserved: u32,
}

/// What `load_commit` vouches for.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadReceipt {
    pub struct_size: u32,
    /// Tensors that are resident.
    pub tensors: u32,
    /// Device bytes owned: quantised, float, gamma, bias.
    pub bytes: [u64; 4],
    /// Bytes imported rather than owned.
    pub imported: u64,
}

/// Fills `out` with `len` canonical bytes of `tensor` from `offset`. `[any]` thread, concurrently.
pub type ReadAtFn =
    unsafe extern "C" fn(context: *mut c_void, tensor: u32, offset: u64, out: *mut u8, len: u64) -> Status;
/// Tells how many bytes have been moved; returns `CANCELLED` if the load should stop. `[any]` thread.
pub type ReportProgressFn = unsafe extern "C" fn(context: *mut c_void, done: u64) -> Status;

/// How a plugin pulls a plan by itself. Valid for the call only.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct LoadCallbacks {
    pub struct_size: u32,
    pub reserved: u32,
    pub context: *mut c_void,
    pub read_at: Option<ReadAtFn>,
    pub progress: Option<ReportProgressFn>,
}
