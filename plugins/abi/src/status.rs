/// What a call returns: 0 or a negative class.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Status(pub i32);

impl Status {
    pub const OK: Self = Self(0);
    /// An argument no plugin could accept: NULL, a size, a range, an unknown input flag.
    pub const INVALID_ARGUMENT: Self = Self(-1);
    /// A call out of order; nothing changed.
    pub const BAD_STATE: Self = Self(-2);
    /// A handle that is 0, stale, foreign or of another kind.
    pub const BAD_HANDLE: Self = Self(-3);
    /// An encoding, operation, option or size that this plugin does not do.
    pub const UNSUPPORTED: Self = Self(-4);
    pub const OUT_OF_DEVICE_MEMORY: Self = Self(-5);
    pub const OUT_OF_HOST_MEMORY: Self = Self(-6);
    /// Poisons the device: every later call but the destroying ones returns it again.
    pub const DEVICE_LOST: Self = Self(-7);
    pub const TIMEOUT: Self = Self(-8);
    pub const CANCELLED: Self = Self(-9);
    /// The host's `read_at` failed; pass on what it returned.
    pub const IO: Self = Self(-10);
    pub const INTERNAL: Self = Self(-11);
    /// The plugin's language unwound and caught it. Poisons the device.
    pub const PANIC: Self = Self(-12);
    /// The minors do not overlap.
    pub const VERSION: Self = Self(-13);
    /// An activation or a weight is NaN or infinite.
    pub const NON_FINITE: Self = Self(-14);
    /// A token outside the vocabulary.
    pub const TOKEN_OUT_OF_RANGE: Self = Self(-15);
    /// A sequence would outgrow its context.
    pub const CONTEXT_EXCEEDED: Self = Self(-16);

    /// Every status of this version with its name.
    pub const ALL: &'static [(Self, &'static str)] = &[
        (Self::OK, "OK"),
        (Self::INVALID_ARGUMENT, "INVALID_ARGUMENT"),
        (Self::BAD_STATE, "BAD_STATE"),
        (Self::BAD_HANDLE, "BAD_HANDLE"),
        (Self::UNSUPPORTED, "UNSUPPORTED"),
        (Self::OUT_OF_DEVICE_MEMORY, "OUT_OF_DEVICE_MEMORY"),
        (Self::OUT_OF_HOST_MEMORY, "OUT_OF_HOST_MEMORY"),
        (Self::DEVICE_LOST, "DEVICE_LOST"),
        (Self::TIMEOUT, "TIMEOUT"),
        (Self::CANCELLED, "CANCELLED"),
        (Self::IO, "IO"),
        (Self::INTERNAL, "INTERNAL"),
        (Self::PANIC, "PANIC"),
        (Self::VERSION, "VERSION"),
        (Self::NON_FINITE, "NON_FINITE"),
        (Self::TOKEN_OUT_OF_RANGE, "TOKEN_OUT_OF_RANGE"),
        (Self::CONTEXT_EXCEEDED, "CONTEXT_EXCEEDED"),
    ];

    /// The name, if the status is documented.
    pub fn name(self) -> Option<&'static str> {
        Self::ALL.iter().find(|(s, _)| *s == self).map(|(_, n)| *n)
    }
}

/// [`ErrorRecord::tensor`] when no tensor is meant.
pub const NO_TENSOR: u32 = u32::MAX;
/// [`ErrorRecord::byte_offset`] when no byte is meant.
pub const NO_OFFSET: u64 = u64::MAX;

/// What went wrong: owned by the caller, filled by the callee.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ErrorRecord {
    pub struct_size: u32,
    /// The returned status again.
    pub code: i32,
    /// The device's own code, such as a `CUresult`; 0 if there is none.
    pub native_code: i64,
    /// No flag is defined yet.
    pub flags: u32,
    /// The tensor concerned, or [`NO_TENSOR`].
    pub tensor: u32,
    /// The byte concerned in the tensor's canonical bytes, or [`NO_OFFSET`].
    pub byte_offset: u64,
    /// Bytes the call needed and had, for the out-of-memory classes; 0 otherwise.
    pub needed: u64,
    pub available: u64,
    /// UTF-8, NUL-terminated.
    pub message: [u8; 256],
}

impl ErrorRecord {
    /// An empty record, ready to be passed to a call.
    pub const fn new() -> Self {
        Self {
            struct_size: size_of::<Self>() as u32,
            code: 0,
            native_code: 0,
            flags: 0,
            tensor: NO_TENSOR,
            byte_offset: NO_OFFSET,
            needed: 0,
            available: 0,
            message: [0; 256],
        }
    }
}

impl Default for ErrorRecord {
    fn default() -> Self {
        Self::new()
    }
}
