//! The contract between Hoist and a compute backend.
//!
//! This crate holds every type that crosses that border and depends on nothing else of Hoist's, so that it is the only
//! crate a backend author needs. A backend is found by a [`Provider`], owns weights as a [`WeightBackend`], and, when
//! it can run them, decodes as a [`DecodeBackend`].
//!
//! # Order of calls
//!
//! ```text
//!            begin_load        finish_load       build_index        init_workspace       prepare
//!   Empty ───────────▶ Loading ──────────▶ Loaded ─────────▶ Indexed ────────────▶ Ready ──────▶ Ready (decoding)
//!     ▲                   │                   │                 │                    │
//!     └── abort_load ◀────┘                   └───── unload ◀───┴────────────────────┘
//! ```
//!
//! * `upload_*` and `load_from` are legal only in `Loading`; `digest` and `read_back` from `Loaded` on; `forward` and
//!   `truncate` only after `prepare`. A call out of order returns [`Error::BadState`] and changes nothing.
//!   [`Lifecycle`] implements the rule; a backend keeps one and asks it first.
//! * Between `finish_load` and `build_index` a fast backend may still be transforming on the device. Every call that
//!   observes a weight waits for what it observes.
//!
//! # Ownership
//!
//! * Bytes given to an upload are borrowed for that call only: the backend has copied or enqueued them from memory of its
//!   own when the call returns.
//! * A [`LoadPlan`] is borrowed by `begin_load`; what a backend needs later it copies. `begin_load` sees the whole plan
//!   before the first byte arrives, so that there is one arena and no allocation per tensor.
//! * After `init_workspace` a backend allocates nothing, on the device or the host: a decode step that would need memory
//!   is a bug.
//!
//! # Threads
//!
//! A backend is `Send`, not `Sync`: one thread at a time, any thread. [`WeightSource`] and [`LoadWatch`] are `Sync`: a
//! backend's own reader threads call them concurrently. Callbacks never unwind into a backend.
//!
//! # Who validates
//!
//! The caller validates what can be known from the plan: shapes, encodings against [`BackendInfo`], sizes against the
//! budget. A backend reports what only it can know: out of memory, device lost, unsupported, internal. It still refuses
//! chunks that are out of range, misaligned or overlapping ([`UploadLedger`] does that arithmetic), because a swallowed
//! upload is the one error nobody finds later.
//!
//! # Canonical bytes
//!
//! The *canonical bytes* of a weight are its values in the plan's encoding, `[matrices, rows, cols]` row-major (rows =
//! output dimension), after value changes (norm vectors and biases widened to f32, one added to Hugging Face gemma norms,
//! a strided view taken of a fused or Conv1D tensor) and before any private layout. Uploads carry canonical bytes,
//! [`WeightBackend::read_back`] returns them and [`WeightBackend::digest`] hashes them. Where the bytes live and how they
//! are packed or transposed is the backend's business, as long as read-back undoes it.
//!
//! # Streaming
//!
//! Nothing here requires that all weights stay resident at once: uploads are by chunk, the index speaks of
//! [`WeightId`]s, and a program's operations are tagged with their layer. Streaming layers on demand is not implemented
//! by any backend today.
#![forbid(unsafe_code)]

mod batch;
mod device;
mod encoding;
mod error;
mod index;
mod ledger;
mod lifecycle;
mod memory;
mod plan;
mod profile;
mod program;
mod push;
mod resolved;
mod role;
mod source;
mod traits;
mod workspace;

pub use batch::{Outputs, Run, SequenceId, TokenBatch, TokenRow, Want, admit};
pub use device::{
    BackendInfo, BrokenLimit, DeviceInfo, EncodingSet, FloatLayout, Limits, NumericsClass, OpSet,
    OpenOptions, Outline, Sizing,
};
pub use encoding::{Encoding, EncodingKind};
pub use error::{Error, Result, UnsupportedWhat};
pub use index::{IndexEntry, IndexLayout, IndexReceipt, Slot, WeightIndex};
pub use ledger::UploadLedger;
pub use lifecycle::{Lifecycle, State};
pub use memory::{DeviceMemory, MemoryByClass, MemoryInfo};
pub use plan::{
    LoadPlan, Shape, SourceView, ValueChange, WeightClass, WeightId, WeightPlan, check_read_back,
};
pub use profile::PhaseTime;
pub use program::{
    ActivationKind, DecodeProgram, KvSpec, Op, OpKind, OpName, RopeStyle, Table, TableId, ValueId, ValueKind,
    ValueSpec, WeightRef,
};
pub use push::push_all;
pub use resolved::{MAX_COLS, ResolvedProgram, Step, StepKind, Value, Weight, WeightFacts};
pub use role::Role;
pub use source::{
    FileIdentity, LoadReceipt, LoadWatch, Mapping, Phase, Progress, SourceFile, Unwatched, WeightSource,
};
pub use traits::{Chunk, DecodeBackend, Provider, WeightBackend};
pub use workspace::{Capacity, KvDtype, WorkspaceBytes, WorkspaceDims};

/// The numerics contract that an *exact* backend of this version implements; see `docs/numerics.md`.
pub const NUMERICS_CONTRACT: &str = "hoist-num/1-draft";
