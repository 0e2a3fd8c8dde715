//! SafeTensors: an 8-byte length, a JSON header, and tensor data without holes that ends with the file.
//!
//! The `safetensors` crate has the last word on what a valid header is, but it is asked last: it takes names that are
//! there twice and headers of 100 MB, and its errors do not say where.

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use std::collections::HashSet;
use std::path::Path;

use hoist_backend::Encoding;

use crate::header::{Budget, HeaderReader, string_cost};
use crate::json::{self, Context};
use crate::layout::{Gaps, MAX_DIMS, check_extents, tensor_bytes, tensor_cost};
use crate::{Error, Format, Manifest, Metadata, Result, Shard, TensorInfo};

/// Longest header that is read. A file of 20,000 tensors has one of 3 MB.
pub(crate) const MAX_HEADER: u64 = 8 << 20;

/// Bytes in front of the header.
const LENGTH_BYTES: u64 = 8;

/// What the `safetensors` crate needs for a tensor while it checks the header, its name aside.
const CRATE_COST: u64 = 600;

const SUPPORTED: &str = "F32, F16, BF16, F64, I8 to I64, U8 to U64 or BOOL";

/// Whether these first bytes are those of a SafeTensors file, which has no magic: the ninth opens a JSON object.
pub(crate) fn looks_like(head: &[u8]) -> bool {
    head.len() > LENGTH_BYTES as usize && head[LENGTH_BYTES as usize] == b'{'
}

/// Reads a single file. With a `config.json` beside it, it is the model of that folder.
pub(crate) fn open(path: &Path, shard: Shard) -> Result<Manifest> {
    let mut budget = Budget::new();
    let tensors = read(&shard, 0, &mut budget)?;
    let (metadata, folder) = match (&shard.memory, path.parent()) {
        (None, Some(folder)) if folder.join("config.json").is_file() => (
            crate::hugging_face::read_config(folder, &mut budget)?,
            Some(folder.to_owned()),
        ),
        _ => (serde_json::Map::new(), None),
    };
    Ok(Manifest {
        path: path.to_owned(),
        format: Format::SafeTensors,
        metadata: Metadata::HuggingFace(metadata),
        tensors,
        shards: vec![shard],
        folder,
    })
}

/// Reads the header of one file: its tensors in the order of their offsets, names unique within the file.
pub(crate) fn read(shard: &Shard, index: u32, budget: &mut Budget) -> Result<Vec<TensorInfo>> {
    let file = shard.name();
    let file_len = shard.source.len;
    let mut reader = HeaderReader::new(shard, 0);
    let header_len = reader.u64("the length of the header")?;
    if header_len > reader.remaining() {
        return Err(Error::CountTooLarge {
            file,
            what: "the length of the header".into(),
            at: 0,
            found: header_len,
            max: reader.remaining(),
        });
    }
    if header_len > MAX_HEADER {
        return Err(Error::HeaderTooLarge {
            file,
            what: "the JSON header".into(),
            needed: header_len,
            limit: MAX_HEADER,
        });
    }
    budget.charge(header_len, &file, "the JSON header")?;
    let header = reader.take(header_len, "the JSON header")?;
    if header.first() != Some(&b'{') {
        return Err(Error::WrongMagic {
            file,
            expected: "a JSON object at byte 8",
            found: header.first().map_or_else(
                || "an empty header".into(),
                |b| format!("\"{}\"", b.escape_ascii()),
            ),
        });
    }

    let context = Context::new(&file, "the JSON header", budget);
    let entries = json::parse(header, context, |context, json| {
        json.deserialize_map(HeaderVisitor(context))
    })?;

    let data_start = LENGTH_BYTES + header_len;
    let mut crate_cost = 0;
    let mut tensors = Vec::with_capacity(entries.len());
    for (i, (name, entry)) in entries.into_iter().enumerate() {
        crate_cost += CRATE_COST + string_cost(name.len() as u64);
        tensors.push(entry.into_tensor(&file, name, i as u64, index, data_start)?);
    }
    tensors.sort_by_key(|t| t.offset);
    check_extents(&file, file_len, 1, Gaps::Refused { data_start }, &tensors)?;
    let end = tensors.last().map_or(data_start, |t| t.offset + t.nbytes);
    if end != file_len {
        return Err(Error::TrailingBytes {
            file,
            expected: end,
            found: file_len - end,
        });
    }

    budget.charge(crate_cost, &file, "the JSON header")?;
    serde_json::from_slice::<safetensors::tensor::Metadata>(header).map_err(|e| Error::Json {
        file: file.clone(),
        what: "the JSON header",
        reason: e.to_string(),
    })?;
    budget.release(crate_cost + header_len);
    Ok(tensors)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Dims,
    data_offsets: (u64, u64),
}

impl Entry {
    fn into_tensor(
        self,
        file: &str,
        name: String,
        i: u64,
        shard: u32,
        data_start: u64,
    ) -> Result<TensorInfo> {
        let file_name = || file.to_owned();
        if name.is_empty() {
            return Err(Error::EmptyName {
                file: file_name(),
                index: i,
            });
        }
        let Dims(shape) = self.shape;
        if shape.len() > MAX_DIMS {
            return Err(Error::InvalidRank {
                file: file_name(),
                name,
                expected: "at most 8",
                found: shape.len() as u64,
            });
        }
        let Some(encoding) = encoding_of(&self.dtype) else {
            return Err(Error::UnsupportedDtype {
                file: file_name(),
                name,
                found: self.dtype,
                expected: SUPPORTED,
            });
        };
        let nbytes = tensor_bytes(file, &name, encoding, &shape)?;
        let (start, end) = self.data_offsets;
        let found = end.checked_sub(start).ok_or_else(|| Error::InvalidField {
            file: file_name(),
            what: format!("`data_offsets` of tensor `{name}`"),
            at: data_start,
            expected: "an end that is not before the start".into(),
            found: format!("[{start}, {end}]"),
        })?;
        if found != nbytes {
            return Err(Error::SizeMismatch {
                file: file_name(),
                name,
                encoding,
                shape,
                expected: nbytes,
                found,
            });
        }
        let Some(offset) = data_start.checked_add(start) else {
            return Err(Error::TensorOutOfBounds {
                file: file_name(),
                name,
                start,
                end,
                file_len: 0,
            });
        };
        Ok(TensorInfo {
            name,
            encoding,
            shape,
            shard,
            offset,
            nbytes,
        })
    }
}

fn encoding_of(dtype: &str) -> Option<Encoding> {
    Some(match dtype {
        "F32" => Encoding::F32,
        "F16" => Encoding::F16,
        "BF16" => Encoding::BF16,
        "F64" => Encoding::F64,
        "I8" => Encoding::I8,
        "I16" => Encoding::I16,
        "I32" => Encoding::I32,
        "I64" => Encoding::I64,
        "U8" => Encoding::U8,
        "U16" => Encoding::U16,
        "U32" => Encoding::U32,
        "U64" => Encoding::U64,
        "BOOL" => Encoding::Bool,
        _ => return None,
    })
}

/// Dimensions, kept only as far as a check needs to see that there are too many.
struct Dims(Vec<u64>);

impl<'de> Deserialize<'de> for Dims {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DimsVisitor;
        impl<'de> Visitor<'de> for DimsVisitor {
            type Value = Dims;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list of dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Dims, A::Error> {
                let mut dims = Vec::with_capacity(MAX_DIMS + 1);
                while let Some(dim) = seq.next_element()? {
                    if dims.len() <= MAX_DIMS {
                        dims.push(dim);
                    }
                }
                Ok(Dims(dims))
            }
        }
        deserializer.deserialize_seq(DimsVisitor)
    }
}

/// The top-level object.
struct HeaderVisitor<'c, 'a>(&'c Context<'a>);

impl<'de> Visitor<'de> for HeaderVisitor<'_, '_> {
    type Value = Vec<(String, Entry)>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let context = self.0;
        let mut entries = Vec::new();
        let mut seen = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            let len = name.len() as u64;
            // The entry, its name here and in the set, both in containers that have just doubled.
            context.charge(2 * (tensor_cost(len) + string_cost(len)))?;
            if !seen.insert(name.clone()) {
                return Err(context.fail(if name == METADATA {
                    Error::DuplicateKey {
                        file: context.file.into(),
                        key: name,
                    }
                } else {
                    Error::DuplicateTensor {
                        file: context.file.into(),
                        name,
                    }
                }));
            }
            if name == METADATA {
                map.next_value_seed(TextMap(context))?;
            } else {
                entries.push((name, map.next_value()?));
            }
        }
        Ok(entries)
    }
}

/// The one key that is not a tensor.
const METADATA: &str = "__metadata__";

/// An object of texts without a key that is there twice; its content is of no use here.
struct TextMap<'c, 'a>(&'c Context<'a>);

impl<'de> DeserializeSeed<'de> for TextMap<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TextMap<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object of texts")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = HashSet::new();
        while let Some((key, value)) = map.next_entry::<String, String>()? {
            // Once here, once more when the `safetensors` crate parses it.
            self.0
                .charge(4 * (string_cost(key.len() as u64) + string_cost(value.len() as u64)))?;
            if !seen.insert(key.clone()) {
                return Err(self.0.fail(Error::DuplicateKey {
                    file: self.0.file.into(),
                    key,
                }));
            }
        }
        Ok(())
    }
}
