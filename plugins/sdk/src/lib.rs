//! Ships a Rust backend as a Hoist plugin.
//!
//! Implement [`Provider`](hoist_backend::Provider), [`WeightBackend`](hoist_backend::WeightBackend) and, if it decodes,
//! [`DecodeBackend`](hoist_backend::DecodeBackend); make the crate a `cdylib`; and write
//!
//! ```ignore
//! hoist_plugin_sdk::export_backend! {
//!     provider: MyProvider::new(),
//!     name: "my-accelerator",
//!     vendor: "Me",
//!     decodes: true,
//! }
//! ```
//!
//! The macro exports the header and the entry. This crate does the rest: handles with generations, the state machine, every
//! check of a pointer or a number that C could get wrong, and `catch_unwind` around each call, after which the device is
//! poisoned. The author's code stays safe Rust.
//!
//! What a plan seen through the interface does not have: source views and value changes. The host applies them; the backend
//! gets canonical bytes, pushed or pulled through `WeightSource::read_at`.

mod convert;
mod device;
mod entries;
mod handles;
mod notes;
mod panics;
mod report;

use hoist_plugin_abi::{ABI_MAJOR, ABI_MINOR_MAX, ABI_MINOR_MIN, HEADER_MAGIC, HEADER_SIZE, HeaderV1};

#[doc(hidden)]
pub use entries::open;
pub use hoist_backend;
pub use hoist_plugin_abi as abi;

/// The header of a plugin. Strings longer than their fields are a compile-time error.
pub const fn header(name: &str, vendor: &str, version: &str) -> HeaderV1 {
    HeaderV1 {
        magic: HEADER_MAGIC,
        header_size: HEADER_SIZE,
        abi_major: ABI_MAJOR,
        abi_minor_min: ABI_MINOR_MIN,
        abi_minor_max: ABI_MINOR_MAX,
        flags: if cfg!(panic = "abort") {
            hoist_plugin_abi::FLAG_PANIC_ABORT
        } else {
            0
        },
        pointer_width: usize::BITS,
        target: field(env!("HOIST_TARGET")),
        name: field(name),
        vendor: field(vendor),
        version: field(version),
        build_id: [0; 64],
        reserved: [0; 184],
    }
}

const fn field<const N: usize>(text: &str) -> [u8; N] {
    let bytes = text.as_bytes();
    assert!(
        bytes.len() < N,
        "a string of the plugin's header is too long for its field"
    );
    let mut field = [0; N];
    let mut i = 0;
    while i < bytes.len() {
        field[i] = bytes[i];
        i += 1;
    }
    field
}

/// Exports a [`Provider`](hoist_backend::Provider) as the backend of this library. Once per `cdylib`.
///
/// `decodes` says whether its backends have an `as_decode`: a plugin claims `forward` exactly if it can be called.
#[macro_export]
macro_rules! export_backend {
    (provider: $provider:expr, name: $name:expr, vendor: $vendor:expr, decodes: $decodes:expr $(,)?) => {
        /// What this plugin says of itself, read from the file.
        #[unsafe(no_mangle)]
        pub static HOIST_PLUGIN_HEADER_V1: $crate::abi::HeaderV1 =
            $crate::header($name, $vendor, env!("CARGO_PKG_VERSION"));

        /// The plugin's entry.
        ///
        /// # Safety
        /// As `hoist_plugin.h` says: pointers are valid for the call, `host` until `shutdown` returns.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn hoist_plugin_open_v1(
            host: *const $crate::abi::Host,
            minor: u32,
            plugin: *mut *const $crate::abi::Plugin,
            error: *mut $crate::abi::ErrorRecord,
        ) -> $crate::abi::Status {
            fn provider() -> Box<dyn $crate::hoist_backend::Provider> {
                Box::new($provider)
            }
            // SAFETY: passes on what the caller vouches for.
            unsafe { $crate::open(provider, $decodes, host, minor, plugin, error) }
        }
    };
}
