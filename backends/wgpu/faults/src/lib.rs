//! A Vulkan layer for tests: the adapter below it with less than it has, or one that is lost.
//!
//! The variable `HOIST_VULKAN_FAULTS` holds `key=number` pairs between semicolons:
//!
//! | key | |
//! |---|---|
//! | `storage_buffers` | most storage buffers of a shader stage |
//! | `storage_range` | most bytes of a storage buffer that a shader sees |
//! | `allocations` | allocations of memory until the next one is refused |
//! | `submits` | submissions until the device is lost |
//!
//! The loader finds the layer by a manifest in a folder that `VK_LAYER_PATH` names, and enables it where
//! `VK_INSTANCE_LAYERS` is [`NAME`]. [`manifest`] writes it. One instance and one driver at a time.
#![cfg(not(target_vendor = "apple"))]

mod faults;
mod layer;

use std::path::Path;

/// The layer's name.
pub const NAME: &str = "VK_LAYER_HOIST_faults";

/// The manifest of the layer in that library.
pub fn manifest(library: &Path) -> String {
    format!(
        r#"{{
  "file_format_version": "1.1.2",
  "layer": {{
    "name": "{NAME}",
    "type": "GLOBAL",
    "library_path": {:?},
    "api_version": "1.3.0",
    "implementation_version": "1",
    "description": "faults for tests"
  }}
}}
"#,
        library.display().to_string()
    )
}
