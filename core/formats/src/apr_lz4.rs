//! The LZ4 layout of APR files: header, then the decompressed size in 4 bytes, then one LZ4 block
//! (`lz4_Block_format.md` of LZ4) to the end of the file.
//!
//! The block is walked before anything is allocated for what it decompresses to, so that a broken one costs nothing; the
//! decompression proper is `lz4_flex`'s.

use std::sync::Arc;

use crate::apr::HEADER;
use crate::header::{HeaderReader, to_usize};
use crate::{Error, Result, Shard};

/// First byte of the block.
const BLOCK: u64 = HEADER + 4;

/// Most bytes that a byte of an LZ4 block can stand for.
const MAX_RATIO: u64 = 255;

/// Shortest match.
const MIN_MATCH: u64 = 4;

/// Bytes taken at a time.
const STEP: u64 = 64 << 10;

/// The size that precedes the block, if the block can possibly have it.
pub(crate) fn declared_size(shard: &Shard) -> Result<u64> {
    let mut reader = HeaderReader::new(shard, HEADER);
    let size = u64::from(reader.u32("the decompressed size")?);
    let max = reader.remaining().saturating_mul(MAX_RATIO);
    if size > max {
        return Err(Error::CountTooLarge {
            file: shard.name(),
            what: "the decompressed size".into(),
            at: HEADER,
            found: size,
            max,
        });
    }
    Ok(size)
}

fn invalid(reader: &HeaderReader<'_>, expected: String, found: u64) -> Error {
    Error::InvalidField {
        file: reader.file().into(),
        what: "the LZ4 block".into(),
        at: reader.pos(),
        expected,
        found: found.to_string(),
    }
}

/// A length: a nibble, and if it is full, bytes up to one that is not 255.
fn length(reader: &mut HeaderReader<'_>, nibble: u8) -> Result<u64> {
    let mut length = u64::from(nibble);
    if nibble == 15 {
        loop {
            let [byte] = reader.array("a length in the LZ4 block")?;
            // Cannot overflow: the file would need 2^56 bytes.
            length += u64::from(byte);
            if byte != 255 {
                break;
            }
        }
    }
    Ok(length)
}

/// Offset and length of a match behind `written` bytes.
fn read_match(reader: &mut HeaderReader<'_>, nibble: u8, written: u64) -> Result<(u64, u64)> {
    let offset = u64::from(u16::from_le_bytes(reader.array("an offset in the LZ4 block")?));
    if offset == 0 || offset > written {
        return Err(invalid(reader, format!("an offset from 1 to {written}"), offset));
    }
    Ok((offset, MIN_MATCH + length(reader, nibble)?))
}

/// Walks the block and checks that it is whole and decompresses to `size` bytes.
pub(crate) fn check(shard: &Shard, size: u64) -> Result<()> {
    let mut reader = HeaderReader::new(shard, BLOCK);
    let mut written = 0u64;
    loop {
        let [token] = reader.array("a token of the LZ4 block")?;
        let literals = length(&mut reader, token >> 4)?;
        reader.skip(literals, "literals of the LZ4 block")?;
        written += literals;
        if reader.remaining() == 0 {
            break;
        }
        let (_, matched) = read_match(&mut reader, token & 15, written)?;
        written += matched;
        if written > size {
            break;
        }
    }
    if written != size {
        return Err(invalid(&reader, format!("{size} decompressed bytes"), written));
    }
    Ok(())
}

/// Decompresses until `out` has `len` bytes; it holds the file's header already.
pub(crate) fn decode_prefix(shard: &Shard, len: usize, out: &mut Vec<u8>) -> Result<()> {
    let mut reader = HeaderReader::new(shard, BLOCK);
    let header = out.len();
    while out.len() < len {
        let [token] = reader.array("a token of the LZ4 block")?;
        let mut literals = length(&mut reader, token >> 4)?.min((len - out.len()) as u64);
        while literals > 0 {
            let step = literals.min(STEP);
            out.extend_from_slice(reader.take(step, "literals of the LZ4 block")?);
            literals -= step;
        }
        if out.len() == len {
            break;
        }
        let (offset, matched) = read_match(&mut reader, token & 15, (out.len() - header) as u64)?;
        let offset = to_usize(offset, reader.file())?;
        for _ in 0..matched.min((len - out.len()) as u64) {
            // May read what it has just written: that is how LZ4 repeats.
            out.push(out[out.len() - offset]);
        }
    }
    Ok(())
}

/// Decompresses the whole file, header in front. [`check`] has passed.
pub(crate) fn decode(shard: &Shard, size: u64) -> Result<Arc<[u8]>> {
    let file = shard.name();
    let block_start = to_usize(BLOCK, &file)?;
    let header = to_usize(HEADER, &file)?;
    let block_len = to_usize(shard.source.len.saturating_sub(BLOCK), &file)?;
    let len = to_usize(HEADER + size, &file)?;
    // An allocation that fails ends the program; asking first does not.
    let both = len.saturating_add(block_len);
    Vec::<u8>::new().try_reserve_exact(both).map_err(|_| {
        let reason = format!("decompressing it takes {both} bytes of memory, which are not there");
        let error = std::io::Error::new(std::io::ErrorKind::OutOfMemory, reason);
        crate::source::io_error(&shard.source.path, error)
    })?;
    let from_file;
    let block = match &shard.memory {
        Some(memory) => &memory[block_start..],
        None => {
            let mut block = vec![0; block_len];
            shard.read_at(BLOCK, &mut block)?;
            from_file = block;
            &from_file
        }
    };
    let mut bytes: Arc<[u8]> = std::iter::repeat_n(0, len).collect();
    let failed = |reason: String| Error::InvalidField {
        file: file.clone(),
        what: "the LZ4 block".into(),
        at: BLOCK,
        expected: format!("{size} decompressed bytes"),
        found: reason,
    };
    let Some(out) = Arc::get_mut(&mut bytes) else {
        return Err(failed("a buffer in use".into()));
    };
    shard.read_at(0, &mut out[..header])?;
    let found =
        lz4_flex::block::decompress_into(block, &mut out[header..]).map_err(|e| failed(e.to_string()))?;
    if found as u64 != size {
        return Err(failed(found.to_string()));
    }
    Ok(bytes)
}
