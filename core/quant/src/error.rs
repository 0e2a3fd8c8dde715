use hoist_backend::{Encoding, Shape};

/// Result of every call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What is wrong with bytes, sizes or an encoding.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each variant's message names its fields")]
pub enum Error {
    // ---- the file ----
    /// A scale or a value is NaN or infinite; `offset` counts from the first byte that was given.
    #[error("{encoding} data holds a NaN or infinity at byte {offset}")]
    NonFinite { encoding: Encoding, offset: u64 },

    // ---- the caller ----
    /// F64 and the integers are never weights and have no decode to f32 here.
    #[error("{encoding} has no decode to f32")]
    NotDecodable { encoding: Encoding },
    /// Integer views are of weight quantisations only.
    #[error("{encoding} is no weight quantisation and has no integer view")]
    NotQuantized { encoding: Encoding },
    /// A slice of another length than the encoding and the shape give.
    #[error("{what} of {encoding} data: expected {expected}, found {found}")]
    Length {
        encoding: Encoding,
        what: &'static str,
        expected: u64,
        found: u64,
    },
    /// Bytes that end within a block.
    #[error("{encoding} data of {found} bytes is no multiple of its {block}-byte block")]
    PartialBlock {
        encoding: Encoding,
        block: u64,
        found: u64,
    },
    /// An input dimension that the numerics contract refuses.
    #[error(
        "input dimension of a {encoding} matrix: expected a positive multiple of {multiple} up to {limit}, found {cols}"
    )]
    InputDimension {
        encoding: Encoding,
        multiple: u64,
        limit: u64,
        cols: u64,
    },
    /// A shape whose rows split a block, or whose size exceeds 2^64 bytes.
    #[error("{encoding} cannot hold the shape {shape}")]
    Shape { encoding: Encoding, shape: Shape },
    /// A row past the last.
    #[error("row {row} of a matrix of {rows} rows")]
    RowOutOfRange { row: u64, rows: u64 },
    /// A segment past the last.
    #[error("segment {segment} of a row of {segments} segments")]
    SegmentOutOfRange { segment: usize, segments: usize },
}

impl Error {
    /// The contract's error for bytes of that weight. `base` is where in its canonical bytes the given ones started.
    pub fn for_weight(self, weight: &str, base: u64) -> hoist_backend::Error {
        match self {
            Error::NonFinite { offset, .. } => hoist_backend::Error::NonFiniteWeight {
                weight: weight.to_owned(),
                offset: base.saturating_add(offset),
            },
            other => hoist_backend::Error::InvalidArgument {
                what: format!("weight `{weight}`"),
                expected: "bytes that match its encoding and shape".to_owned(),
                found: other.to_string(),
            },
        }
    }
}
