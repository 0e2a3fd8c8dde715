/// First bytes of a [`HeaderV1`].
pub const HEADER_MAGIC: [u8; 16] = *b"HOIST PLUGIN V1\n";
/// Size of a [`HeaderV1`], in bytes, for ever.
pub const HEADER_SIZE: u32 = 512;
/// The exported name of the header.
pub const HEADER_SYMBOL: &str = "HOIST_PLUGIN_HEADER_V1";
/// The exported name of the entry.
pub const OPEN_SYMBOL: &str = "hoist_plugin_open_v1";

/// Major version of this interface. 0 is unstable: it promises nothing across commits, and must be equal.
pub const ABI_MAJOR: u32 = 0;
/// Oldest minor this crate can speak.
pub const ABI_MINOR_MIN: u32 = 1;
/// Newest minor this crate can speak. Minors only append: 2 has `Caps::max_row_bytes`.
pub const ABI_MINOR_MAX: u32 = 2;

/// A panic or exception in the plugin ends the process.
pub const FLAG_PANIC_ABORT: u32 = 1;
/// The plugin starts threads of its own.
pub const FLAG_SPAWNS_THREADS: u32 = 2;

/// What a plugin says of itself before any of its code runs. Its layout never changes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct HeaderV1 {
    /// [`HEADER_MAGIC`]
    pub magic: [u8; 16],
    /// [`HEADER_SIZE`]
    pub header_size: u32,
    pub abi_major: u32,
    /// Oldest and newest minor it can speak.
    pub abi_minor_min: u32,
    pub abi_minor_max: u32,
    /// `FLAG_*`
    pub flags: u32,
    /// Bits of a pointer.
    pub pointer_width: u32,
    /// Target triple such as `x86_64-unknown-linux-gnu`. All strings are UTF-8 and NUL-terminated.
    pub target: [u8; 64],
    pub name: [u8; 64],
    pub vendor: [u8; 64],
    pub version: [u8; 32],
    pub build_id: [u8; 64],
    /// Zeros.
    pub reserved: [u8; 184],
}

const _: () = assert!(size_of::<HeaderV1>() == HEADER_SIZE as usize);

/// The minor that host and plugin will speak: the newest that both know, if it is not older than either allows.
///
/// Majors must be equal; that is checked before.
pub const fn negotiate(host: (u32, u32), plugin: (u32, u32)) -> Option<u32> {
    let agreed = if host.1 < plugin.1 { host.1 } else { plugin.1 };
    let ranges_are_ranges = host.0 <= host.1 && plugin.0 <= plugin.1;
    if ranges_are_ranges && agreed >= host.0 && agreed >= plugin.0 {
        Some(agreed)
    } else {
        None
    }
}
