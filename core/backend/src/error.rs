use crate::{Encoding, OpName, State, WeightId};

/// Result of every call of the contract.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, grouped by who must act.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each variant's message names its fields")]
pub enum Error {
    // ---- the environment ----
    /// The backend cannot run on this machine: no driver, no device, a version that does not suffice.
    #[error("backend `{backend}` is unavailable: {reason}")]
    Unavailable {
        backend: String,
        reason: String,
        hint: Option<String>,
    },
    /// The device or the budget has no room.
    #[error("{device} is out of memory: {what} needs {needed} bytes and {available} are available")]
    OutOfMemory {
        device: String,
        what: String,
        needed: u64,
        available: u64,
    },
    /// The device stopped answering; everything resident on it is gone.
    #[error("{device} was lost: {reason}")]
    DeviceLost { device: String, reason: String },

    // ---- the file ----
    /// Reading the source failed.
    #[error("reading {len} bytes at {offset} of `{file}` failed: {error}")]
    SourceIo {
        file: String,
        offset: u64,
        len: u64,
        error: std::io::Error,
    },
    /// The file is no longer the one that was opened.
    #[error("`{file}` changed while it was being loaded: {what} was {expected} and is {found}")]
    SourceChanged {
        file: String,
        what: &'static str,
        expected: String,
        found: String,
    },
    /// A scale of a quantised weight, or a value of a float weight, is NaN or infinite.
    #[error("weight `{weight}` holds a NaN or infinity at byte {offset} of its canonical bytes")]
    NonFiniteWeight { weight: String, offset: u64 },

    // ---- the caller ----
    /// A call out of order.
    #[error("`{call}` needs a backend that is {expected}, this one is {state}")]
    BadState {
        call: &'static str,
        state: State,
        expected: &'static str,
    },
    /// An argument that no backend could accept.
    #[error("{what}: expected {expected}, found {found}")]
    InvalidArgument {
        what: String,
        expected: String,
        found: String,
    },
    /// A chunk that does not fit its weight, splits a block, or covers bytes that have arrived already.
    #[error("chunk {start}..{end} of `{weight}`: {reason}")]
    InvalidChunk {
        weight: String,
        start: u64,
        end: u64,
        reason: String,
    },
    /// `finish_load` found bytes that never arrived.
    #[error("`{weight}` is incomplete: bytes {start}..{end} of {nbytes} never arrived")]
    Incomplete {
        weight: String,
        start: u64,
        end: u64,
        nbytes: u64,
    },
    /// A [`WeightId`] that the plan does not have.
    #[error("no weight {weight:?} in a plan of {weights}")]
    UnknownWeight { weight: WeightId, weights: usize },
    /// A token id outside the vocabulary.
    #[error("token {token} is outside the vocabulary of {vocab}")]
    TokenOutOfRange { token: u32, vocab: u32 },
    /// A sequence would outgrow its context.
    #[error("sequence {sequence} holds {length} tokens; {adding} more exceed the context of {capacity}")]
    ContextExceeded {
        sequence: u32,
        length: u32,
        adding: u32,
        capacity: u32,
    },
    /// The load was cancelled; nothing stayed resident.
    #[error("cancelled")]
    Cancelled,

    // ---- the model's arithmetic ----
    /// An activation became NaN or infinite.
    #[error("{op} produced a NaN or infinity{}", layer.map(|l| format!(" in layer {l}")).unwrap_or_default())]
    NonFinite { op: OpName, layer: Option<u32> },

    // ---- ourselves ----
    /// The backend does not do this.
    #[error("backend `{backend}` does not support {what}")]
    Unsupported { backend: String, what: UnsupportedWhat },
    /// A bug, with what is known of it.
    #[error("internal error in {backend}: {what}")]
    Internal { backend: String, what: String },
}

/// The thing that is not supported.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each variant's message names its fields")]
pub enum UnsupportedWhat {
    /// An encoding in that use, such as `matrix multiplication`.
    #[error("{encoding} for {usage}")]
    Encoding { encoding: Encoding, usage: &'static str },
    /// An operation of the decode program.
    #[error("operation {0}")]
    Op(OpName),
    /// A call of the contract.
    #[error("`{0}`")]
    Call(&'static str),
    /// A size above a limit.
    #[error("{what} of {found} (the limit is {limit})")]
    Limit {
        what: &'static str,
        limit: u64,
        found: u64,
    },
    /// Anything else, in words.
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// An [`Error::InvalidArgument`].
    pub fn invalid(
        what: impl Into<String>,
        expected: impl std::fmt::Display,
        found: impl std::fmt::Display,
    ) -> Self {
        Error::InvalidArgument {
            what: what.into(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    /// An [`Error::Internal`].
    pub fn internal(backend: impl Into<String>, what: impl std::fmt::Display) -> Self {
        Error::Internal {
            backend: backend.into(),
            what: what.to_string(),
        }
    }
}
