//! Model files as data: reads the header of a GGUF, SafeTensors or APR v2 file, or of a folder or set of shards, into a
//! [`Manifest`], and touches no weight byte.
//!
//! Every byte is untrusted: nothing here panics, and no allocation is sized by a number that was not checked against the
//! length of the file first.
#![forbid(unsafe_code)]

mod apr;
mod apr_lz4;
mod apr_shards;
mod detect;
mod error;
mod gguf;
mod header;
mod hugging_face;
mod json;
mod layout;
mod manifest;
mod metadata;
mod safetensors;
mod source;
pub mod write;

pub use detect::{open, open_bytes};
pub use error::{Error, Result};
pub use hoist_backend::Encoding;
pub use manifest::{Format, Manifest, MetaArray, MetaValue, Metadata, Shard, TensorInfo};
