use std::path::{Path, PathBuf};

use hoist_backend::Encoding;

use super::{Layout, Tensor, place};
use crate::gguf::{DEFAULT_ALIGNMENT, MAGIC, MAX_DIMS, SplitName};
use crate::{Error, MetaArray, MetaValue, Result};

/// Builds a GGUF file: metadata and tensors in the order they are given.
#[derive(Clone, Debug)]
pub struct GgufBuilder {
    version: u32,
    alignment: u64,
    metadata: Vec<(String, MetaValue)>,
    tensors: Vec<Tensor>,
}

impl GgufBuilder {
    /// A version 3 file whose `general.architecture` is `architecture`.
    pub fn new(architecture: &str) -> Self {
        Self {
            version: 3,
            alignment: DEFAULT_ALIGNMENT,
            metadata: vec![(
                "general.architecture".into(),
                MetaValue::String(architecture.into()),
            )],
            tensors: Vec::new(),
        }
    }

    /// Sets the version: 2 or 3, which differ in nothing else here.
    #[must_use]
    pub fn version(mut self, version: u32) -> Self {
        self.version = version;
        self
    }

    /// Sets the alignment, a power of two, and writes it as `general.alignment`.
    #[must_use]
    pub fn alignment(mut self, alignment: u32) -> Self {
        self.alignment = alignment.into();
        self.meta("general.alignment", MetaValue::U32(alignment))
    }

    /// Adds a metadata pair, or replaces the one of that key.
    #[must_use]
    pub fn meta(mut self, key: impl Into<String>, value: impl Into<MetaValue>) -> Self {
        let (key, value) = (key.into(), value.into());
        match self.metadata.iter_mut().find(|(k, _)| *k == key) {
            Some((_, old)) => *old = value,
            None => self.metadata.push((key, value)),
        }
        self
    }

    /// Adds a tensor; `shape` has the slowest dimension first.
    #[must_use]
    pub fn tensor(mut self, name: impl Into<String>, encoding: Encoding, shape: impl Into<Vec<u64>>) -> Self {
        self.tensors.push(Tensor {
            name: name.into(),
            encoding,
            shape: shape.into(),
        });
        self
    }

    /// The header with its padding: the bytes that precede the first tensor.
    ///
    /// # Errors
    /// As [`GgufBuilder::layout`].
    pub fn header_bytes(&self) -> Result<Vec<u8>> {
        self.layout().map(|layout| layout.header)
    }

    /// The header and the place of every tensor.
    ///
    /// # Errors
    /// [`Error::CannotWrite`] for what GGUF cannot hold: a version other than 2 and 3, an alignment that is no power of
    /// two, an encoding without a GGML id, ranks other than 1 to 4; the shape errors of reading.
    pub fn layout(&self) -> Result<Layout> {
        let cannot = |what: String, expected: &str, found: String| Error::CannotWrite {
            what,
            expected: expected.into(),
            found,
        };
        if !matches!(self.version, 2 | 3) {
            return Err(cannot(
                "the GGUF version".into(),
                "2 or 3",
                self.version.to_string(),
            ));
        }
        if !self.alignment.is_power_of_two() {
            return Err(cannot(
                "the alignment".into(),
                "a power of two",
                self.alignment.to_string(),
            ));
        }
        let mut out = Vec::new();
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&self.version.to_le_bytes());
        put_len(&mut out, self.tensors.len());
        put_len(&mut out, self.metadata.len());
        for (key, value) in &self.metadata {
            put_str(&mut out, key);
            put_value(&mut out, value);
        }
        let (relative, _) = place(&self.tensors, 0, self.alignment)?;
        for tensor in &relative {
            let rank = u32::try_from(tensor.shape.len()).unwrap_or(u32::MAX);
            if rank == 0 || rank > MAX_DIMS {
                return Err(cannot(
                    format!("the rank of tensor `{}`", tensor.name),
                    "1 to 4",
                    rank.to_string(),
                ));
            }
            let Some(id) = tensor.encoding.ggml_id() else {
                return Err(cannot(
                    format!("the encoding of tensor `{}`", tensor.name),
                    "one that GGML has",
                    tensor.encoding.to_string(),
                ));
            };
            put_str(&mut out, &tensor.name);
            out.extend_from_slice(&rank.to_le_bytes());
            for dim in tensor.shape.iter().rev() {
                out.extend_from_slice(&dim.to_le_bytes());
            }
            out.extend_from_slice(&id.to_le_bytes());
            out.extend_from_slice(&tensor.offset.to_le_bytes());
        }
        let too_large = || {
            cannot(
                "the alignment".into(),
                "one that fits the header",
                self.alignment.to_string(),
            )
        };
        let start = (out.len() as u64)
            .checked_next_multiple_of(self.alignment)
            .ok_or_else(too_large)?;
        out.resize(usize::try_from(start).map_err(|_| too_large())?, 0);
        let (slots, file_len) = place(&self.tensors, start, self.alignment)?;
        Ok(Layout {
            header: out,
            slots,
            file_len,
        })
    }

    /// Splits the model into `count` files of about equal numbers of tensors, named `PREFIX-00001-of-0000N.gguf`. The
    /// first carries the metadata; all carry the `split.*` keys.
    ///
    /// # Errors
    /// [`Error::CannotWrite`] unless `count` is from 1 to 65535; as [`GgufBuilder::layout`].
    pub fn split(&self, prefix: &Path, count: u16) -> Result<Vec<(PathBuf, Layout)>> {
        if count == 0 {
            return Err(Error::CannotWrite {
                what: "the number of files".into(),
                expected: "1 to 65535".into(),
                found: count.to_string(),
            });
        }
        let tensors = i32::try_from(self.tensors.len()).map_err(|_| Error::CannotWrite {
            what: "the number of tensors".into(),
            expected: "below 2^31".into(),
            found: self.tensors.len().to_string(),
        })?;
        let per_file = self.tensors.len().div_ceil(count.into()).max(1);
        let mut chunks = self.tensors.chunks(per_file);
        (0..count)
            .map(|i| {
                let mut file = self.clone();
                if i > 0 {
                    file.metadata.retain(|(key, _)| key == "general.alignment");
                }
                file.tensors = chunks.next().unwrap_or_default().to_vec();
                let file = file
                    .meta("split.no", MetaValue::U16(i))
                    .meta("split.tensors.count", MetaValue::I32(tensors))
                    .meta("split.count", MetaValue::U16(count));
                let mut path = prefix.as_os_str().to_owned();
                path.push(SplitName::suffix(u64::from(i) + 1, count.into()));
                path.push(".gguf");
                Ok((path.into(), file.layout()?))
            })
            .collect()
    }
}

fn put_len(out: &mut Vec<u8>, len: usize) {
    out.extend_from_slice(&(len as u64).to_le_bytes());
}

fn put_str(out: &mut Vec<u8>, s: &str) {
    put_len(out, s.len());
    out.extend_from_slice(s.as_bytes());
}

/// Writes type id and value (`gguf_type`).
fn put_value(out: &mut Vec<u8>, value: &MetaValue) {
    let mut typed = |id: u32, bytes: &[u8]| {
        out.extend_from_slice(&id.to_le_bytes());
        out.extend_from_slice(bytes);
    };
    match value {
        MetaValue::U8(v) => typed(0, &v.to_le_bytes()),
        MetaValue::I8(v) => typed(1, &v.to_le_bytes()),
        MetaValue::U16(v) => typed(2, &v.to_le_bytes()),
        MetaValue::I16(v) => typed(3, &v.to_le_bytes()),
        MetaValue::U32(v) => typed(4, &v.to_le_bytes()),
        MetaValue::I32(v) => typed(5, &v.to_le_bytes()),
        MetaValue::F32(v) => typed(6, &v.to_le_bytes()),
        MetaValue::Bool(v) => typed(7, &[u8::from(*v)]),
        MetaValue::String(v) => {
            typed(8, &[]);
            put_str(out, v);
        }
        MetaValue::Array(v) => {
            typed(9, &[]);
            put_array(out, v);
        }
        MetaValue::U64(v) => typed(10, &v.to_le_bytes()),
        MetaValue::I64(v) => typed(11, &v.to_le_bytes()),
        MetaValue::F64(v) => typed(12, &v.to_le_bytes()),
    }
}

fn put_array(out: &mut Vec<u8>, array: &MetaArray) {
    fn put<const N: usize, T: Copy>(out: &mut Vec<u8>, id: u32, v: &[T], encode: fn(T) -> [u8; N]) {
        out.extend_from_slice(&id.to_le_bytes());
        put_len(out, v.len());
        out.extend(v.iter().flat_map(|&v| encode(v)));
    }
    match array {
        MetaArray::U8(v) => put(out, 0, v, u8::to_le_bytes),
        MetaArray::I8(v) => put(out, 1, v, i8::to_le_bytes),
        MetaArray::U16(v) => put(out, 2, v, u16::to_le_bytes),
        MetaArray::I16(v) => put(out, 3, v, i16::to_le_bytes),
        MetaArray::U32(v) => put(out, 4, v, u32::to_le_bytes),
        MetaArray::I32(v) => put(out, 5, v, i32::to_le_bytes),
        MetaArray::F32(v) => put(out, 6, v, f32::to_le_bytes),
        MetaArray::Bool(v) => put(out, 7, v, |b| [u8::from(b)]),
        MetaArray::String(v) => {
            out.extend_from_slice(&8u32.to_le_bytes());
            put_len(out, v.len());
            for s in v {
                put_str(out, s);
            }
        }
        MetaArray::U64(v) => put(out, 10, v, u64::to_le_bytes),
        MetaArray::I64(v) => put(out, 11, v, i64::to_le_bytes),
        MetaArray::F64(v) => put(out, 12, v, f64::to_le_bytes),
    }
}
