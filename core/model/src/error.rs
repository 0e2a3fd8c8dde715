use hoist_backend::{Encoding, Role};

/// Result of resolving a model or building its program.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a manifest is no model that Hoist knows, or why no program could be built for it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each variant's message names its fields")]
pub enum Error {
    // ---- the file ----
    /// No tensor has a name that any transformer convention uses.
    #[error(
        "`{path}` holds no transformer that Hoist knows: none of its {tensors} tensors has a known name{}",
        example.as_ref().map(|e| format!(" (the first is `{e}`)")).unwrap_or_default()
    )]
    NotATransformer {
        path: String,
        tensors: usize,
        example: Option<String>,
    },
    /// The architecture is none that this version knows.
    #[error("architecture `{found}` is unknown; known are {}", known.join(", "))]
    UnknownArchitecture { found: String, known: Vec<&'static str> },
    /// A bare SafeTensors file says nothing of its hyper-parameters.
    #[error("`{path}` has no config.json beside it, which says what its {tensors} tensors mean")]
    MissingConfig { path: String, tensors: usize },
    /// A hyper-parameter that has no default in its format.
    #[error("{place} lacks `{key}`{}", also(tried))]
    MissingKey {
        place: &'static str,
        key: String,
        tried: Vec<String>,
    },
    /// A hyper-parameter of another type.
    #[error("`{key}` in {place} must be {expected}, found {found}")]
    WrongType {
        place: &'static str,
        key: String,
        expected: &'static str,
        found: String,
    },
    /// A hyper-parameter out of its range, or in conflict with another.
    #[error("`{key}` in {place}: expected {expected}, found {found}")]
    BadValue {
        place: &'static str,
        key: String,
        expected: String,
        found: String,
    },
    /// A variation of a known architecture that Hoist does not do.
    #[error("{place} asks for {what}, which Hoist does not support for {architecture}")]
    Unsupported {
        place: &'static str,
        architecture: &'static str,
        what: String,
    },
    /// A weight without which the architecture cannot run.
    #[error(
        "{architecture} requires {role}{}, and the file has none of {}",
        of_layer(*layer),
        quoted(tried)
    )]
    MissingRole {
        role: Role,
        layer: Option<u32>,
        architecture: &'static str,
        tried: Vec<String>,
    },
    /// Two tensors that mean the same.
    #[error("{role}{} is given twice: by `{first}` and by `{second}`", of_layer(*layer))]
    AmbiguousRole {
        role: String,
        layer: Option<u32>,
        first: String,
        second: String,
    },
    /// A tensor of another shape than the hyper-parameters ask for.
    #[error("tensor `{tensor}` ({role}{}) must have shape {expected}, found {found}", of_layer(*layer))]
    WrongShape {
        tensor: String,
        role: String,
        layer: Option<u32>,
        expected: String,
        found: String,
    },
    /// A tensor stored in a way that its role does not allow.
    #[error("tensor `{tensor}` ({role}{}) is {found}, expected {expected}", of_layer(*layer))]
    WrongEncoding {
        tensor: String,
        role: String,
        layer: Option<u32>,
        expected: String,
        found: Encoding,
    },
    /// A tensor whose bytes cannot be cut into its matrices' rows.
    #[error("tensor `{tensor}`: {error}")]
    Layout {
        tensor: String,
        error: hoist_backend::Error,
    },
    /// A tensor's size disagrees with its encoding and shape.
    #[error("tensor `{tensor}` needs {expected} bytes and has {found}")]
    WrongSize {
        tensor: String,
        expected: u64,
        found: u64,
    },
    /// A parameter that is read on the host, such as RoPE factors, cannot be read.
    #[error("reading host parameter `{tensor}` failed: {reason}")]
    HostParameter { tensor: String, reason: String },

    // ---- the caller ----
    /// A context that no program can be built for.
    #[error("a context of {asked} positions is out of range: {architecture} here takes 1 to {limit}")]
    ContextOutOfRange {
        asked: u32,
        limit: u32,
        architecture: &'static str,
    },

    // ---- arithmetic ----
    /// A dimension of the program that does not fit its type.
    #[error("{what} is {found}, above the limit of {limit}")]
    TooLarge { what: String, found: u64, limit: u64 },
    /// A quantised matrix whose input dimension the numerics contract does not define.
    #[error(
        "{role}{} has {found} input columns: a quantised matrix needs a multiple of 32, at most 131072",
        of_layer(*layer)
    )]
    QuantizedColumns {
        role: Role,
        layer: Option<u32>,
        found: u64,
    },

    // ---- ourselves ----
    /// A program that contradicts itself or its model.
    #[error("program operation {op}: {reason}")]
    InvalidProgram { op: usize, reason: String },
    /// The index of a resolved model contradicts its weights.
    #[error(transparent)]
    Index(hoist_backend::Error),
}

fn of_layer(layer: Option<u32>) -> String {
    layer.map(|l| format!(" of layer {l}")).unwrap_or_default()
}

fn quoted(names: &[String]) -> String {
    names
        .iter()
        .map(|n| format!("`{n}`"))
        .collect::<Vec<_>>()
        .join(", ")
}

fn also(tried: &[String]) -> String {
    if tried.is_empty() {
        String::new()
    } else {
        format!(" (nor has it {})", quoted(tried))
    }
}
