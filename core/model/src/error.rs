/// Result of resolving a model.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a manifest is no model that Hoist knows.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each variant's message names its fields")]
pub enum Error {
    /// The architecture is none that this version knows.
    #[error("architecture `{found}` is unknown; known are {}", known.join(", "))]
    UnknownArchitecture { found: String, known: Vec<&'static str> },
}
