//! The C interface between Hoist and a backend in a shared library: types only.
//!
//! `include/hoist_plugin.h` is generated from this crate. A plugin exports two names:
//!
//! * [`HeaderV1`] under `HOIST_PLUGIN_HEADER_V1`: 512 bytes of data without pointers, read from the file before any of the
//!   plugin's code runs.
//! * [`OpenV1`] under `hoist_plugin_open_v1`: hands over the table of functions, [`Plugin`].
//!
//! # Rules
//!
//! * Integers have fixed widths, sizes are `u64`, padding is explicit. Every struct that may grow begins with `struct_size`:
//!   the writer stores its own size, the reader copies `min(struct_size, its own)` bytes into zeros and never tests for
//!   equality. Arrays of such structs come with the element's size as their stride.
//! * Every function returns a [`Status`]; 0 is success. A failing call fills the caller's [`ErrorRecord`], if there is one.
//!   Nothing is handed over that the other side would have to free.
//! * Handles are `u64`, made by the plugin; 0 is never valid. A stale or foreign handle is [`Status::BAD_HANDLE`].
//! * `[any]` functions may be called from any thread at any time. `[serial: device]` functions are never called at the
//!   same time for one device, but the thread may change between calls.
//! * Output flags and capability bits that the host does not know are ignored; input flags that the plugin does not know
//!   are refused with [`Status::INVALID_ARGUMENT`]. Operation, role and encoding numbers are open registries: an unknown one
//!   is [`Status::UNSUPPORTED`] in `plan_check`, `load_begin` or `prepare`.
//! * A plugin writes nothing to stdout or stderr (it has [`Host::log`]), installs no signal handler, changes no locale,
//!   working directory, environment or floating-point mode, and has joined its threads when `shutdown` returns.
#![no_std]
#![forbid(unsafe_code)]
#![allow(
    missing_docs,
    reason = "fields are documented where their name and type do not say it all"
)]

mod header;
mod host;
mod load;
mod model;
mod plugin;
mod program;
mod status;

pub use header::{
    ABI_MAJOR, ABI_MINOR_MAX, ABI_MINOR_MIN, FLAG_PANIC_ABORT, FLAG_SPAWNS_THREADS, HEADER_MAGIC,
    HEADER_SIZE, HEADER_SYMBOL, HeaderV1, OPEN_SYMBOL, negotiate,
};
pub use host::{Host, LOG_DEBUG, LOG_ERROR, LOG_INFO, LOG_WARN, LogFn};
pub use load::{
    Chunk, LoadCallbacks, LoadReceipt, PlanReport, PlanV, ReadAtFn, Refusal, ReportProgressFn, Tensor,
    UPLOAD_COPY_IN_CALL, UPLOAD_IMPORT_UNTIL_RELEASE,
};
pub use model::{
    Capacity, IndexEntry, IndexLayout, IndexReceipt, KvSpec, SLOT_ABSENT, SLOT_PRESENT, SLOT_TIED, ValueSpec,
    WorkspaceBytes, WorkspaceDims,
};
pub use plugin::{
    Caps, DeviceInfo, DeviceMemory, Handle, OPTION_FORCE_SCALAR, OPTION_IMPORT, OpenOptions, OpenV1, Plugin,
    STATS_MAX_BYTES,
};
pub use program::{
    Batch, Op, Outputs, Program, Run, Table, WANT_ARGMAX, WANT_LOGITS, WANT_NOTHING, WeightRef,
};
pub use status::{ErrorRecord, NO_OFFSET, NO_TENSOR, Status};

/// `layer` of weights and operations that belong to the whole model.
pub const NO_LAYER: u32 = u32::MAX;
