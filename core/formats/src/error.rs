/// Result of reading a header.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model file was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each variant's message names its fields")]
pub enum Error {
    /// The file cannot be opened or read.
    #[error("cannot read `{path}`: {error}")]
    Io { path: String, error: std::io::Error },
}
