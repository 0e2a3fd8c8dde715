//! GGUF v2 and v3, little-endian. Layout: magic, version, counts, key-value pairs, tensor entries, padding to
//! `general.alignment`, tensor data, each tensor padded to the alignment too (`docs/gguf.md` of ggml).

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};

use hoist_backend::Encoding;

use crate::header::{Budget, HeaderReader, to_usize};
use crate::hugging_face::missing_shard;
use crate::layout::{Gaps, check_extents, check_unique, tensor_bytes, tensor_cost};
use crate::{Error, Format, Manifest, MetaArray, MetaValue, Metadata, Result, Shard, TensorInfo};

pub(crate) const MAGIC: &[u8; 4] = b"GGUF";

/// `GGUF_DEFAULT_ALIGNMENT` of ggml.
pub(crate) const DEFAULT_ALIGNMENT: u64 = 32;

/// `GGML_MAX_DIMS`.
pub(crate) const MAX_DIMS: u32 = 4;

/// Smallest key-value pair: the length of an empty key, a type, one byte.
const MIN_PAIR: u64 = 8 + 4 + 1;

/// Smallest tensor entry: the length of an empty name, a rank, one dimension, a type, an offset.
const MIN_TENSOR: u64 = 8 + 4 + 8 + 4 + 8;

/// One file of a model.
struct Gguf {
    version: u32,
    metadata: BTreeMap<String, MetaValue>,
    tensors: Vec<TensorInfo>,
}

/// Reads the model that `first` is, or is a shard of.
pub(crate) fn open(path: &Path, first: Shard) -> Result<Manifest> {
    let mut budget = Budget::new();
    let file = first.name();
    let gguf = read(&first, 0, &mut budget)?;
    let metadata = Metadata::Gguf(gguf.metadata);
    let count = metadata.get_u64("split.count")?.unwrap_or(1);
    if count > 1 {
        return open_split(path, count, &metadata, first, gguf.tensors, gguf.version);
    }
    check_unique(&file, &gguf.tensors)?;
    Ok(Manifest {
        path: path.to_owned(),
        format: Format::Gguf {
            version: gguf.version,
        },
        metadata,
        tensors: gguf.tensors,
        shards: vec![first],
        folder: None,
    })
}

/// Reads all files of a split model, whichever of them was given.
///
/// `split.no` counts from 0, names from 1; the first file carries the model's metadata, the others only the `split.*`
/// keys (`llama_split_path` and `gguf-split` of llama.cpp).
fn open_split(
    path: &Path,
    count: u64,
    given_metadata: &Metadata,
    given: Shard,
    given_tensors: Vec<TensorInfo>,
    version: u32,
) -> Result<Manifest> {
    let file = given.name();
    if given.memory.is_some() {
        return Err(Error::OneShardOfMany {
            file,
            shards: count,
            instead: "its first file by path",
        });
    }
    let number = given_metadata.require_u64("split.no")?;
    let named = SplitName::parse(path).filter(|n| n.count == count && n.number == number + 1);
    let Some(named) = named else {
        return Err(Error::ShardMismatch {
            file,
            what: "the file's name".into(),
            expected: format!("one that ends in {}", SplitName::suffix(number + 1, count)),
            found: path
                .file_name()
                .map_or_else(String::new, |n| n.to_string_lossy().into_owned()),
        });
    };
    let total = given_metadata.get_u64("split.tensors.count")?;
    let mut given = Some((given, given_tensors));
    let mut budget = Budget::new();
    let mut first_metadata = None;
    let mut tensors = Vec::new();
    let mut shards = Vec::new();
    for i in 0..count {
        let shard_path = named.sibling(i + 1);
        let shard_file = shard_path.display().to_string();
        let index = u32::try_from(i).map_err(|_| Error::InvalidField {
            file: file.clone(),
            what: "`split.count`".into(),
            at: 0,
            expected: "at most 65535".into(),
            found: count.to_string(),
        })?;
        let (shard, mut found) = match given.take_if(|_| i == number) {
            Some((shard, found)) => {
                budget.charge(
                    found.iter().map(|t| tensor_cost(t.name.len() as u64)).sum(),
                    &shard_file,
                    "its tensors",
                )?;
                if i == 0 {
                    first_metadata = Some(given_metadata.clone());
                }
                (shard, found)
            }
            None => {
                let shard = Shard::open(&shard_path).map_err(|e| missing_shard(e, &file, &shard_path))?;
                crate::detect::expect_magic(&shard, MAGIC, "the magic `GGUF`")?;
                let gguf = read(&shard, index, &mut budget)?;
                let metadata = Metadata::Gguf(gguf.metadata);
                let expect = |key: &str, expected: u64| -> Result<()> {
                    let found = metadata.require_u64(key)?;
                    if found == expected {
                        return Ok(());
                    }
                    Err(Error::ShardMismatch {
                        file: shard_file.clone(),
                        what: format!("`{key}`"),
                        expected: expected.to_string(),
                        found: found.to_string(),
                    })
                };
                expect("split.no", i)?;
                expect("split.count", count)?;
                if let Some(total) = total {
                    expect("split.tensors.count", total)?;
                }
                if i == 0 {
                    first_metadata = Some(metadata);
                }
                (shard, gguf.tensors)
            }
        };
        for tensor in &mut found {
            tensor.shard = index;
        }
        tensors.append(&mut found);
        shards.push(shard);
    }
    if let Some(total) = total
        && total != tensors.len() as u64
    {
        return Err(Error::ShardMismatch {
            file,
            what: "tensors in all shards, `split.tensors.count`".into(),
            expected: total.to_string(),
            found: tensors.len().to_string(),
        });
    }
    check_unique(&file, &tensors)?;
    Ok(Manifest {
        path: path.to_owned(),
        format: Format::Gguf { version },
        metadata: first_metadata.unwrap_or_else(|| Metadata::Gguf(BTreeMap::new())),
        tensors,
        shards,
        folder: None,
    })
}

/// `PREFIX-00001-of-00003.gguf`
pub(crate) struct SplitName {
    prefix: PathBuf,
    extension: String,
    pub(crate) number: u64,
    pub(crate) count: u64,
}

impl SplitName {
    pub(crate) fn suffix(number: u64, count: u64) -> String {
        format!("-{number:05}-of-{count:05}")
    }

    pub(crate) fn parse(path: &Path) -> Option<Self> {
        let extension = path.extension()?.to_str()?.to_owned();
        let stem = path.file_stem()?.to_str()?;
        let (rest, count) = stem.rsplit_once("-of-")?;
        let (prefix, number) = rest.rsplit_once('-')?;
        let number_of =
            |s: &str| (s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit())).then(|| s.parse().ok());
        Some(Self {
            prefix: path.with_file_name(prefix),
            extension,
            number: number_of(number)??,
            count: number_of(count)??,
        })
    }

    fn sibling(&self, number: u64) -> PathBuf {
        let mut name = self.prefix.clone().into_os_string();
        name.push(Self::suffix(number, self.count));
        name.push(".");
        name.push(&self.extension);
        name.into()
    }
}

/// Reads one file's header. The magic has been seen by the caller.
fn read(shard: &Shard, index: u32, budget: &mut Budget) -> Result<Gguf> {
    let mut reader = HeaderReader::new(shard, MAGIC.len() as u64);
    let file = shard.name();
    let version = reader.u32("the version")?;
    match version {
        2 | 3 => {}
        // A big-endian file has its version's bytes reversed.
        _ if version.swap_bytes() < 0x1_0000 && version >= 0x1_0000 => {
            return Err(Error::BigEndian { file, found: version });
        }
        _ => {
            return Err(Error::UnsupportedVersion {
                file,
                format: "GGUF",
                expected: "2 or 3",
                found: version.to_string(),
            });
        }
    }
    // Both counts come first; the tensors' is checked against the file before the pairs are read.
    let tensor_count = reader.count(MIN_TENSOR, "the number of tensors")?;
    let pair_count = reader.count(MIN_PAIR, "the number of metadata pairs")?;
    let metadata = read_pairs(&mut reader, pair_count, budget)?;

    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(value) => value.as_u64().ok_or_else(|| Error::WrongMetaType {
            key: "general.alignment".into(),
            expected: "an unsigned integer",
            found: value.describe(),
        })?,
    };
    if !alignment.is_power_of_two() {
        return Err(Error::InvalidAlignment {
            file,
            found: alignment,
        });
    }

    let mut tensors = Vec::new();
    for i in 0..tensor_count {
        tensors.push(read_tensor(&mut reader, i, index, alignment, budget)?);
    }
    let data_start = reader
        .pos()
        .checked_next_multiple_of(alignment)
        .unwrap_or(u64::MAX);
    for tensor in &mut tensors {
        tensor.offset = match data_start.checked_add(tensor.offset) {
            Some(offset) => offset,
            None => {
                return Err(Error::TensorOutOfBounds {
                    file,
                    name: tensor.name.clone(),
                    start: tensor.offset,
                    end: u64::MAX,
                    file_len: shard.source.len,
                });
            }
        };
    }
    check_extents(&file, shard.source.len, alignment, Gaps::Allowed, &tensors)?;
    Ok(Gguf {
        version,
        metadata,
        tensors,
    })
}

fn read_tensor(
    reader: &mut HeaderReader<'_>,
    i: u64,
    shard: u32,
    alignment: u64,
    budget: &mut Budget,
) -> Result<TensorInfo> {
    budget.charge(tensor_cost(0), reader.file(), "a tensor entry")?;
    let name = reader.string(budget, format_args!("the name of tensor {i}"))?;
    let file = reader.file().to_owned();
    if name.is_empty() {
        return Err(Error::EmptyName { file, index: i });
    }
    let rank = reader.u32(format_args!("the rank of tensor `{name}`"))?;
    if rank == 0 || rank > MAX_DIMS {
        return Err(Error::InvalidRank {
            file,
            name,
            expected: "1 to 4",
            found: rank.into(),
        });
    }
    let mut shape = Vec::with_capacity(MAX_DIMS as usize);
    for _ in 0..rank {
        shape.push(reader.u64(format_args!("the dimensions of tensor `{name}`"))?);
    }
    // The file has the fastest dimension first.
    shape.reverse();
    let id = reader.u32(format_args!("the type of tensor `{name}`"))?;
    let encoding = match Encoding::from_ggml_id(id) {
        Some(encoding) => encoding,
        None if Encoding::is_removed_ggml_id(id) => {
            return Err(Error::RemovedEncoding {
                file,
                name,
                found: id,
            });
        }
        None => {
            return Err(Error::UnknownEncoding {
                file,
                name,
                format: "GGML",
                found: id,
                expected: "a type from 0 to 42 that GGML has",
            });
        }
    };
    let offset = reader.u64(format_args!("the offset of tensor `{name}`"))?;
    if offset % alignment != 0 {
        return Err(Error::Misaligned {
            file,
            name,
            alignment,
            offset,
        });
    }
    let nbytes = tensor_bytes(&file, &name, encoding, &shape)?;
    Ok(TensorInfo {
        name,
        encoding,
        shape,
        shard,
        offset,
        nbytes,
    })
}

fn read_pairs(
    reader: &mut HeaderReader<'_>,
    count: u64,
    budget: &mut Budget,
) -> Result<BTreeMap<String, MetaValue>> {
    let mut pairs = BTreeMap::new();
    for i in 0..count {
        // A pair in a B-tree node that may be half empty.
        budget.charge(
            2 * size_of::<(String, MetaValue)>() as u64,
            reader.file(),
            "a metadata pair",
        )?;
        let key = reader.string(budget, format_args!("metadata key {i}"))?;
        let at = reader.pos();
        let kind = reader.u32(format_args!("the type of metadata `{key}`"))?;
        let value = read_value(reader, &key, kind, at, budget)?;
        match pairs.entry(key) {
            Entry::Vacant(slot) => {
                slot.insert(value);
            }
            Entry::Occupied(slot) => {
                return Err(Error::DuplicateKey {
                    file: reader.file().into(),
                    key: slot.key().clone(),
                });
            }
        }
    }
    Ok(pairs)
}

/// Ids of `gguf_type`.
const ARRAY: u32 = 9;
const STRING: u32 = 8;
const BOOL: u32 = 7;

fn read_value(
    reader: &mut HeaderReader<'_>,
    key: &str,
    kind: u32,
    at: u64,
    budget: &mut Budget,
) -> Result<MetaValue> {
    let what = format_args!("the value of metadata `{key}`");
    Ok(match kind {
        0 => MetaValue::U8(u8::from_le_bytes(reader.array(what)?)),
        1 => MetaValue::I8(i8::from_le_bytes(reader.array(what)?)),
        2 => MetaValue::U16(u16::from_le_bytes(reader.array(what)?)),
        3 => MetaValue::I16(i16::from_le_bytes(reader.array(what)?)),
        4 => MetaValue::U32(u32::from_le_bytes(reader.array(what)?)),
        5 => MetaValue::I32(i32::from_le_bytes(reader.array(what)?)),
        6 => MetaValue::F32(f32::from_le_bytes(reader.array(what)?)),
        BOOL => {
            let at = reader.pos();
            let [byte] = reader.array(what)?;
            MetaValue::Bool(bool_of(reader.file(), key, at, byte)?)
        }
        STRING => MetaValue::String(reader.string(budget, what)?),
        ARRAY => MetaValue::Array(read_array(reader, key, budget)?),
        10 => MetaValue::U64(u64::from_le_bytes(reader.array(what)?)),
        11 => MetaValue::I64(i64::from_le_bytes(reader.array(what)?)),
        12 => MetaValue::F64(f64::from_le_bytes(reader.array(what)?)),
        _ => {
            return Err(Error::UnknownMetaType {
                file: reader.file().into(),
                key: key.into(),
                at,
                found: kind,
            });
        }
    })
}

fn bool_of(file: &str, key: &str, at: u64, byte: u8) -> Result<bool> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Error::InvalidField {
            file: file.into(),
            what: format!("metadata `{key}`"),
            at,
            expected: "a bool of 0 or 1".into(),
            found: byte.to_string(),
        }),
    }
}

fn read_array(reader: &mut HeaderReader<'_>, key: &str, budget: &mut Budget) -> Result<MetaArray> {
    let at = reader.pos();
    let kind = reader.u32(format_args!("the element type of metadata `{key}`"))?;
    let what = format_args!("the number of elements of metadata `{key}`");
    Ok(match kind {
        0 => MetaArray::U8(numbers(reader, key, budget, u8::from_le_bytes)?),
        1 => MetaArray::I8(numbers(reader, key, budget, i8::from_le_bytes)?),
        2 => MetaArray::U16(numbers(reader, key, budget, u16::from_le_bytes)?),
        3 => MetaArray::I16(numbers(reader, key, budget, i16::from_le_bytes)?),
        4 => MetaArray::U32(numbers(reader, key, budget, u32::from_le_bytes)?),
        5 => MetaArray::I32(numbers(reader, key, budget, i32::from_le_bytes)?),
        6 => MetaArray::F32(numbers(reader, key, budget, f32::from_le_bytes)?),
        BOOL => {
            let bytes = numbers(reader, key, budget, u8::from_le_bytes)?;
            let start = reader.pos() - bytes.len() as u64;
            let bools = (start..)
                .zip(bytes)
                .map(|(at, byte)| bool_of(reader.file(), key, at, byte));
            MetaArray::Bool(bools.collect::<Result<_>>()?)
        }
        STRING => {
            let count = reader.count(8, what)?;
            // Each string is charged when it is read; `Vec` doubles as it grows, so no count is trusted in advance.
            let mut strings = Vec::new();
            for i in 0..count {
                strings.push(reader.string(budget, format_args!("element {i} of metadata `{key}`"))?);
            }
            strings.shrink_to_fit();
            MetaArray::String(strings)
        }
        ARRAY => {
            return Err(Error::NestedArray {
                file: reader.file().into(),
                key: key.into(),
                at,
            });
        }
        10 => MetaArray::U64(numbers(reader, key, budget, u64::from_le_bytes)?),
        11 => MetaArray::I64(numbers(reader, key, budget, i64::from_le_bytes)?),
        12 => MetaArray::F64(numbers(reader, key, budget, f64::from_le_bytes)?),
        _ => {
            return Err(Error::UnknownMetaType {
                file: reader.file().into(),
                key: key.into(),
                at,
                found: kind,
            });
        }
    })
}

/// Reads an array of fixed-size elements, a window at a time.
fn numbers<const N: usize, T>(
    reader: &mut HeaderReader<'_>,
    key: &str,
    budget: &mut Budget,
    decode: fn([u8; N]) -> T,
) -> Result<Vec<T>> {
    /// Bytes taken at a time: divides by every element size.
    const STEP: u64 = 64 << 10;
    let count = reader.count(
        N as u64,
        format_args!("the number of elements of metadata `{key}`"),
    )?;
    let nbytes = count * N as u64;
    budget.charge(nbytes, reader.file(), format_args!("metadata `{key}`"))?;
    let mut out = Vec::with_capacity(to_usize(count, reader.file())?);
    let mut left = nbytes;
    while left > 0 {
        let step = left.min(STEP);
        let bytes = reader.take(step, format_args!("metadata `{key}`"))?;
        let (elements, _) = bytes.as_chunks::<N>();
        out.extend(elements.iter().map(|&e| decode(e)));
        left -= step;
    }
    Ok(out)
}
