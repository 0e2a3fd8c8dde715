use core::ffi::c_void;

pub const LOG_ERROR: u32 = 1;
pub const LOG_WARN: u32 = 2;
pub const LOG_INFO: u32 = 3;
pub const LOG_DEBUG: u32 = 4;

/// Takes one message of `len` bytes of UTF-8. `[any]` thread. Must not be called after `shutdown`.
pub type LogFn = unsafe extern "C" fn(context: *mut c_void, level: u32, message: *const u8, len: u64);

/// What the host offers; valid until `shutdown` returns.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Host {
    pub struct_size: u32,
    /// The minor both sides speak.
    pub minor: u32,
    /// Passed back to every function of the host.
    pub context: *mut c_void,
    pub log: Option<LogFn>,
}
