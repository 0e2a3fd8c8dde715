//! APR v2, by the `apr-format` crate where it is strict and by our own checks where it is not: it takes names that are
//! not UTF-8, tensors that reach past the end, sizes that are not those of type and shape, and never looks at the footer.

use std::path::Path;

use apr_format::v2::{
    ALIGNMENT, AprV2Flags, AprV2Header, HEADER_SIZE_V2, MAX_METADATA_SIZE, MAX_TENSOR_NAME_LEN,
    MIN_INDEX_ENTRY_BYTES, TensorDType, TensorIndexEntry, V2FormatError, VERSION_V2, required_file_len,
};
use hoist_backend::Encoding;
use serde_json::{Map, Value};

use crate::header::{Budget, HeaderReader, to_usize};
use crate::layout::{Gaps, MAX_DIMS, check_extents, tensor_bytes, tensor_cost};
use crate::{Error, Format, Manifest, Metadata, Result, Shard, TensorInfo, apr_lz4, json};

pub(crate) const MAGIC: &[u8; 4] = b"APR\0";

/// Magics of what came before v2.
pub(crate) const OLD_MAGICS: [&[u8; 4]; 3] = [b"APRN", b"APR1", b"APR2"];

pub(crate) const HEADER: u64 = HEADER_SIZE_V2 as u64;

/// CRC32 of everything before it, in the last bytes of a file; some writers leave it out.
pub(crate) const FOOTER: u64 = 4;

/// A file's content.
pub(crate) struct Apr {
    pub(crate) metadata: Map<String, Value>,
    pub(crate) tensors: Vec<TensorInfo>,
    /// The file, or its decompressed bytes.
    pub(crate) shard: Shard,
}

/// Reads a model of one file.
pub(crate) fn open(path: &Path, shard: Shard) -> Result<Manifest> {
    let apr = read(shard, 0, &mut Budget::new())?;
    if let Some((_, count)) = place_in_set(&apr.metadata)
        && count > 1
    {
        return Err(Error::OneShardOfMany {
            file: apr.shard.name(),
            shards: count,
            instead: "the JSON manifest of the set",
        });
    }
    Ok(Manifest {
        path: path.to_owned(),
        format: Format::Apr,
        metadata: Metadata::Apr(apr.metadata),
        tensors: apr.tensors,
        shards: vec![apr.shard],
        folder: None,
    })
}

/// Index and count that a shard's own metadata gives.
pub(crate) fn place_in_set(metadata: &Map<String, Value>) -> Option<(u64, u64)> {
    let sharding = metadata.get("sharding")?;
    Some((
        sharding.get("shard_index")?.as_u64()?,
        sharding.get("shard_count")?.as_u64()?,
    ))
}

/// Reads one file. The magic has been seen by the caller.
pub(crate) fn read(shard: Shard, index: u32, budget: &mut Budget) -> Result<Apr> {
    let file = shard.name();
    let mut reader = HeaderReader::new(&shard, 0);
    let bytes: [u8; HEADER_SIZE_V2] = reader.array("the header")?;
    let header = AprV2Header::from_bytes(&bytes).map_err(|e| crate_error(&file, "the header", 0, &e))?;
    if header.version != VERSION_V2 {
        return Err(Error::UnsupportedVersion {
            file,
            format: "APR",
            expected: "2.0",
            found: format!("{}.{}", header.version.0, header.version.1),
        });
    }
    if !header.verify_checksum() {
        return Err(Error::Checksum {
            file,
            what: "the header",
            expected: header.checksum,
            found: header.compute_checksum(),
        });
    }
    if header.flags.is_encrypted() {
        return Err(Error::Encrypted { file });
    }
    if header.flags.is_zstd_compressed() {
        return Err(Error::UnsupportedCompression {
            file,
            found: "Zstandard",
        });
    }
    if header.flags.is_column_major() {
        return Err(Error::InvalidField {
            file,
            what: "the flags".into(),
            at: 6,
            expected: "row-major tensors".into(),
            found: format!(
                "{:#06x}, with column-major ({:#06x})",
                header.flags.bits(),
                AprV2Flags::LAYOUT_COLUMN_MAJOR
            ),
        });
    }
    if !header.flags.is_lz4_compressed() {
        return read_raw(&shard, &header, index, budget);
    }
    // `apr-format` sets the flag over raw data; realizar compressed all that follows the header into one block.
    let spare = budget.clone();
    let as_raw = match read_raw(&shard, &header, index, budget) {
        Ok(apr) => return Ok(apr),
        Err(error) => error,
    };
    *budget = spare;
    read_block(&shard, &header, index, budget).map_err(|as_block| match as_block {
        // No fault of the file.
        Error::Io { .. } => as_block,
        as_block => Error::Lz4 {
            file,
            as_raw: Box::new(as_raw),
            as_block: Box::new(as_block),
        },
    })
}

/// Reads a file whose offsets count in itself.
fn read_raw(shard: &Shard, header: &AprV2Header, index: u32, budget: &mut Budget) -> Result<Apr> {
    let file = shard.name();
    let file_len = shard.source.len;
    let start = front(&file, header, file_len, budget)?;
    let mut bytes = vec![0; start];
    shard.read_at(0, &mut bytes)?;
    let parsed = parse(&file, header, &bytes, file_len, index, budget)?;
    budget.release(start as u64);
    if shard.memory.is_some() {
        check_footer(shard, parsed.required)?;
    }
    Ok(Apr {
        metadata: parsed.metadata,
        tensors: parsed.tensors,
        shard: shard.clone(),
    })
}

/// Reads a file whose bytes after the header are one LZ4 block, into memory. Nothing is allocated for it before its
/// header has been decompressed and checked and the block has been walked to its end.
fn read_block(shard: &Shard, header: &AprV2Header, index: u32, budget: &mut Budget) -> Result<Apr> {
    let file = shard.name();
    let size = apr_lz4::declared_size(shard)?;
    let len = HEADER + size;
    let start = front(&file, header, len, budget)?;
    let mut bytes = Vec::with_capacity(start);
    bytes.extend_from_slice(&header.to_bytes());
    apr_lz4::decode_prefix(shard, start, &mut bytes)?;
    let parsed = parse(&file, header, &bytes, len, index, budget)?;
    budget.release(start as u64);
    drop(bytes);
    apr_lz4::check(shard, size)?;
    let shard = Shard::in_memory(&shard.source.path, apr_lz4::decode(shard, size)?);
    check_footer(&shard, parsed.required)?;
    Ok(Apr {
        metadata: parsed.metadata,
        tensors: parsed.tensors,
        shard,
    })
}

/// Checks where the sections lie and returns the length of all that precedes the data.
fn front(file: &str, header: &AprV2Header, file_len: u64, budget: &mut Budget) -> Result<usize> {
    let metadata_end = header.metadata_offset.saturating_add(header.metadata_size.into());
    let sections = [
        ("the metadata", 12, HEADER, header.metadata_offset),
        ("the tensor index", 24, metadata_end, header.tensor_index_offset),
        (
            "the tensor data",
            32,
            header.tensor_index_offset,
            header.data_offset,
        ),
    ];
    for (what, at, after, start) in sections {
        if start < after {
            return Err(Error::InvalidField {
                file: file.into(),
                what: format!("the offset of {what}"),
                at,
                expected: format!("at least {after}, the end of what precedes it"),
                found: start.to_string(),
            });
        }
    }
    if header.data_offset > file_len {
        return Err(Error::Truncated {
            file: file.into(),
            what: "metadata and tensor index".into(),
            at: HEADER,
            needed: header.data_offset - HEADER,
            file_len,
        });
    }
    if !header.data_offset.is_multiple_of(ALIGNMENT as u64) {
        return Err(Error::InvalidField {
            file: file.into(),
            what: "the offset of the tensor data".into(),
            at: 32,
            expected: format!("a multiple of {ALIGNMENT}"),
            found: header.data_offset.to_string(),
        });
    }
    if header.metadata_size as usize > MAX_METADATA_SIZE {
        return Err(Error::HeaderTooLarge {
            file: file.into(),
            what: "the JSON metadata".into(),
            needed: header.metadata_size.into(),
            limit: MAX_METADATA_SIZE as u64,
        });
    }
    let max = (header.data_offset - header.tensor_index_offset) / MIN_INDEX_ENTRY_BYTES as u64;
    if u64::from(header.tensor_count) > max {
        return Err(Error::CountTooLarge {
            file: file.into(),
            what: "the number of tensors".into(),
            at: 8,
            found: header.tensor_count.into(),
            max,
        });
    }
    budget.charge(header.data_offset, file, "metadata and tensor index")?;
    to_usize(header.data_offset, file)
}

struct Parsed {
    metadata: Map<String, Value>,
    tensors: Vec<TensorInfo>,
    /// Length of the file without footer.
    required: u64,
}

/// Reads metadata and index from `bytes`, all that precedes the data of a file of `file_len` bytes.
fn parse(
    file: &str,
    header: &AprV2Header,
    bytes: &[u8],
    file_len: u64,
    shard: u32,
    budget: &mut Budget,
) -> Result<Parsed> {
    // `front` has checked that all sections end within `bytes`.
    let metadata_start = to_usize(header.metadata_offset, file)?;
    let metadata = &bytes[metadata_start..metadata_start + header.metadata_size as usize];
    let metadata = if metadata.is_empty() {
        Map::new()
    } else {
        json::parse_object(metadata, file, "the JSON metadata", budget)?
    };

    let mut tensors: Vec<TensorInfo> = Vec::new();
    let mut pos = to_usize(header.tensor_index_offset, file)?;
    for i in 0..header.tensor_count {
        let (tensor, len) = parse_entry(file, header, i, shard, &bytes[pos..], pos as u64, budget)?;
        pos += len;
        if let Some(before) = tensors.last()
            && before.name >= tensor.name
        {
            return Err(if before.name == tensor.name {
                Error::DuplicateTensor {
                    file: file.into(),
                    name: tensor.name,
                }
            } else {
                Error::InvalidField {
                    file: file.into(),
                    what: "the tensor index".into(),
                    at: pos as u64 - len as u64,
                    expected: "names in ascending order".into(),
                    found: format!("`{}` after `{}`", tensor.name, before.name),
                }
            });
        }
        tensors.push(tensor);
    }
    check_extents(file, file_len, ALIGNMENT as u64, Gaps::Allowed, &tensors)?;

    // The crate parses the index once more.
    let cost = tensors.len() as u64 * tensor_cost(MAX_TENSOR_NAME_LEN as u64 / 2);
    budget.charge(cost, file, "the tensor index")?;
    let required = required_file_len(bytes).map_err(|e| crate_error(file, "the tensor index", 24, &e))?;
    budget.release(cost);
    match file_len.checked_sub(required) {
        Some(0 | FOOTER) => {}
        None => {
            return Err(Error::Truncated {
                file: file.into(),
                what: "the tensor data".into(),
                at: header.data_offset,
                needed: required - header.data_offset,
                file_len,
            });
        }
        Some(1..FOOTER) => {
            return Err(Error::Truncated {
                file: file.into(),
                what: "the footer".into(),
                at: required,
                needed: FOOTER,
                file_len,
            });
        }
        Some(_) => {
            return Err(Error::TrailingBytes {
                file: file.into(),
                expected: required + FOOTER,
                found: file_len - required - FOOTER,
            });
        }
    }
    Ok(Parsed {
        metadata,
        tensors,
        required,
    })
}

/// Reads the entry at the start of `bytes`, which is at `at` in the file.
fn parse_entry(
    file: &str,
    header: &AprV2Header,
    i: u32,
    shard: u32,
    bytes: &[u8],
    at: u64,
    budget: &mut Budget,
) -> Result<(TensorInfo, usize)> {
    let truncated = |what: String, needed: usize| Error::Truncated {
        file: file.into(),
        what,
        at,
        needed: needed as u64,
        file_len: header.data_offset,
    };
    let name_len = match bytes {
        [a, b, ..] => usize::from(u16::from_le_bytes([*a, *b])),
        _ => {
            return Err(truncated(
                format!("the entry of tensor {i}"),
                MIN_INDEX_ENTRY_BYTES,
            ));
        }
    };
    if name_len == 0 {
        return Err(Error::EmptyName {
            file: file.into(),
            index: i.into(),
        });
    }
    if name_len > MAX_TENSOR_NAME_LEN {
        return Err(Error::InvalidField {
            file: file.into(),
            what: format!("the length of the name of tensor {i}"),
            at,
            expected: format!("at most {MAX_TENSOR_NAME_LEN}"),
            found: name_len.to_string(),
        });
    }
    let Some((name, [dtype, rank, rest @ ..])) = bytes[2..].split_at_checked(name_len) else {
        return Err(truncated(
            format!("the entry of tensor {i}"),
            MIN_INDEX_ENTRY_BYTES + name_len,
        ));
    };
    let name = std::str::from_utf8(name).map_err(|_| Error::NotUtf8 {
        file: file.into(),
        what: format!("the name of tensor {i}"),
        at: at + 2,
    })?;
    let rank = usize::from(*rank);
    if rank > MAX_DIMS {
        return Err(Error::InvalidRank {
            file: file.into(),
            name: name.into(),
            expected: "at most 8",
            found: rank as u64,
        });
    }
    if rest.len() < 8 * rank + 16 {
        return Err(truncated(
            format!("the entry of tensor `{name}`"),
            MIN_INDEX_ENTRY_BYTES + name_len + 8 * rank,
        ));
    }
    let Some(encoding) = TensorDType::from_u8(*dtype).map(encoding_of) else {
        return Err(Error::UnknownEncoding {
            file: file.into(),
            name: name.into(),
            format: "APR",
            found: (*dtype).into(),
            expected: "0, 1, 3 to 9, 12, 14, 30, 128 or 129",
        });
    };
    budget.charge(tensor_cost(name_len as u64), file, "the tensor index")?;
    let (entry, len) =
        TensorIndexEntry::from_bytes(bytes).map_err(|e| crate_error(file, "the tensor index", at, &e))?;
    let shape: Vec<u64> = entry.shape.iter().map(|&d| d as u64).collect();
    let nbytes = tensor_bytes(file, name, encoding, &shape)?;
    if entry.size != nbytes {
        return Err(Error::SizeMismatch {
            file: file.into(),
            name: entry.name,
            encoding,
            shape,
            expected: nbytes,
            found: entry.size,
        });
    }
    if !entry.offset.is_multiple_of(ALIGNMENT as u64) {
        return Err(Error::Misaligned {
            file: file.into(),
            name: entry.name,
            alignment: ALIGNMENT as u64,
            offset: entry.offset,
        });
    }
    let Some(offset) = header.data_offset.checked_add(entry.offset) else {
        return Err(Error::TensorOutOfBounds {
            file: file.into(),
            name: entry.name,
            start: entry.offset,
            end: u64::MAX,
            file_len: header.data_offset,
        });
    };
    Ok((
        TensorInfo {
            name: entry.name,
            encoding,
            shape,
            shard,
            offset,
            nbytes,
        },
        len,
    ))
}

fn encoding_of(dtype: TensorDType) -> Encoding {
    match dtype {
        TensorDType::F32 => Encoding::F32,
        TensorDType::F16 => Encoding::F16,
        TensorDType::BF16 => Encoding::BF16,
        TensorDType::F64 => Encoding::F64,
        TensorDType::I32 => Encoding::I32,
        TensorDType::I64 => Encoding::I64,
        TensorDType::I8 => Encoding::I8,
        TensorDType::U8 => Encoding::U8,
        TensorDType::AprQ4 => Encoding::APR_Q4,
        TensorDType::AprQ8 => Encoding::APR_Q8,
        TensorDType::Q4K => Encoding::Q4_K,
        TensorDType::Q6K => Encoding::Q6_K,
    }
}

fn crate_error(file: &str, what: &str, at: u64, error: &V2FormatError) -> Error {
    Error::InvalidField {
        file: file.into(),
        what: what.into(),
        at,
        expected: "what the `apr-format` crate accepts".into(),
        found: error.to_string(),
    }
}

/// Compares the footer, if there is one behind `required` bytes, with the CRC32 of what precedes it.
fn check_footer(shard: &Shard, required: u64) -> Result<()> {
    if shard.source.len < required + FOOTER {
        return Ok(());
    }
    let mut crc = crc32fast::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut pos = 0;
    while pos < required {
        let step = usize::try_from(required - pos).map_or(buffer.len(), |left| left.min(buffer.len()));
        shard.read_at(pos, &mut buffer[..step])?;
        crc.update(&buffer[..step]);
        pos += step as u64;
    }
    let mut stored = [0; 4];
    shard.read_at(required, &mut stored)?;
    let (expected, found) = (u32::from_le_bytes(stored), crc.finalize());
    if expected != found {
        return Err(Error::Checksum {
            file: shard.name(),
            what: "the footer",
            expected,
            found,
        });
    }
    Ok(())
}

impl Manifest {
    /// Reads every byte of an APR model and compares it with the checksum at its end, where there is one. Other formats
    /// have none. Returns how many files had a checksum.
    ///
    /// [`crate::open`] does this only for what it has in memory anyway.
    ///
    /// # Errors
    /// [`Error::Checksum`]; as [`Shard::read_at`].
    pub fn verify_checksums(&self) -> Result<u32> {
        if self.format != Format::Apr {
            return Ok(0);
        }
        let mut checked = 0;
        for (shard, index) in self.shards.iter().zip(0..) {
            let end = self
                .tensors
                .iter()
                .filter(|t| t.shard == index)
                .map(|t| (t.offset + t.nbytes).next_multiple_of(ALIGNMENT as u64))
                .max();
            // Opening found nothing behind the data but a footer.
            if let Some(end) = end
                && shard.source.len == end + FOOTER
            {
                check_footer(shard, end)?;
                checked += 1;
            }
        }
        Ok(checked)
    }
}
