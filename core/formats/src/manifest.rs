use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use hoist_backend::{Encoding, SourceFile};

/// Which format a model came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// GGUF, with its version (2 or 3).
    Gguf {
        /// Version in the header.
        version: u32,
    },
    /// SafeTensors: one file, shards, or a Hugging Face folder.
    SafeTensors,
    /// APR v2.
    Apr,
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Format::Gguf { .. } => "gguf",
            Format::SafeTensors => "safetensors",
            Format::Apr => "apr",
        })
    }
}

/// One tensor of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name in the file.
    pub name: String,
    /// How its values are stored.
    pub encoding: Encoding,
    /// Row-major, slowest dimension first: a matrix is `[out, in]` (GGUF's order reversed).
    pub shape: Vec<u64>,
    /// Index into [`Manifest::shards`].
    pub shard: u32,
    /// First byte in the shard. Checked: `offset + nbytes` is within it.
    pub offset: u64,
    /// Bytes: what encoding and shape ask for, which the file was checked to hold.
    pub nbytes: u64,
}

/// A file of a model, or a buffer that stands for one.
#[derive(Clone, Debug)]
pub struct Shard {
    /// Path, length, open file and identity.
    pub source: SourceFile,
    /// The bytes, if they are in memory: a decompressed APR file or an embedded model.
    pub memory: Option<Arc<[u8]>>,
}

/// A metadata value of a GGUF file.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "each variant holds the type of that name")]
pub enum MetaValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array(MetaArray),
}

/// An array in a GGUF file's metadata. Arrays of arrays are refused: nothing uses them.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "each variant holds the type of that name")]
pub enum MetaArray {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    String(Vec<String>),
}

/// What a model says of itself, as its format says it.
#[derive(Clone, Debug, PartialEq)]
pub enum Metadata {
    /// Key-value pairs of a GGUF file.
    Gguf(BTreeMap<String, MetaValue>),
    /// `config.json` of a Hugging Face folder; empty for a bare SafeTensors file.
    HuggingFace(serde_json::Map<String, serde_json::Value>),
    /// The JSON metadata of an APR file.
    Apr(serde_json::Map<String, serde_json::Value>),
}

/// A model's header: everything but the weights.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// What was opened: a file or a folder.
    pub path: PathBuf,
    /// Format.
    pub format: Format,
    /// Metadata.
    pub metadata: Metadata,
    /// Tensors in file order; names are unique.
    pub tensors: Vec<TensorInfo>,
    /// Files, in shard order.
    pub shards: Vec<Shard>,
    /// The folder of a Hugging Face model, where `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`
    /// stand; `None` for GGUF and APR.
    pub folder: Option<PathBuf>,
}

impl Manifest {
    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|t| t.name == name)
    }
}
