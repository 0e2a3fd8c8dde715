//! Which format a file is of, by its first bytes.

use std::path::Path;
use std::sync::Arc;

use crate::source::io_error;
use crate::{Error, Manifest, Result, Shard, apr, apr_shards, gguf, hugging_face, json, safetensors};

/// Opens a model: a GGUF file (or any file of a split one), a SafeTensors file, a `*.index.json` of SafeTensors shards,
/// an APR file or the JSON manifest of APR shards, or a Hugging Face folder. The format is told by content, not by name.
///
/// Only headers are read, with one exception: an LZ4-compressed APR file is decompressed into memory. Each file is
/// opened once and stays open in [`Shard::source`].
///
/// # Errors
/// Every way in which the bytes can be wrong has a variant of [`Error`]. A refused file takes less than 64 MiB of memory
/// and no time that depends on the numbers in it.
pub fn open(path: &Path) -> Result<Manifest> {
    if std::fs::metadata(path).map_err(|e| io_error(path, e))?.is_dir() {
        return hugging_face::open_folder(path);
    }
    open_shard(path, Shard::open(path)?)
}

/// Opens a model that is in memory as a whole, such as one embedded in a program. `name` stands for its path.
///
/// # Errors
/// As [`open`].
pub fn open_bytes(name: &str, bytes: Arc<[u8]>) -> Result<Manifest> {
    let path = Path::new(name);
    open_shard(path, Shard::in_memory(path, bytes))
}

fn open_shard(path: &Path, shard: Shard) -> Result<Manifest> {
    not_empty(&shard)?;
    let (head, len) = head(&shard)?;
    let head = &head[..len];
    if head.starts_with(gguf::MAGIC) {
        return gguf::open(path, shard);
    }
    if head.starts_with(apr::MAGIC) {
        return apr::open(path, shard);
    }
    if apr::OLD_MAGICS.iter().any(|magic| head.starts_with(*magic)) {
        return Err(Error::UnsupportedVersion {
            file: shard.name(),
            format: "APR",
            expected: "2.0, with the magic `APR\\0`",
            found: show(&head[..4]),
        });
    }
    if safetensors::looks_like(head) {
        return safetensors::open(path, shard);
    }
    let is_json = head.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'{');
    if is_json && shard.memory.is_none() {
        const MAX_JSON: u64 = 16 << 20;
        let file = shard.name();
        let what = "the index of shards";
        return if json::has_key(&shard.read_all(MAX_JSON, what)?, &file, what, "shards")? {
            apr_shards::open(path, &shard)
        } else {
            hugging_face::open_index(path, &shard)
        };
    }
    Err(Error::WrongMagic {
        file: shard.name(),
        expected: match path.extension().and_then(|e| e.to_str()) {
            Some("gguf") => "the magic `GGUF`",
            Some("apr") => "the magic `APR\\0`",
            Some("safetensors") => "the length of a JSON header, and `{` at byte 8",
            _ => "the magic of GGUF or APR, or the start of a SafeTensors file",
        },
        found: show(head),
    })
}

/// Refuses a file of no bytes.
pub(crate) fn not_empty(shard: &Shard) -> Result<()> {
    if shard.source.len == 0 {
        return Err(Error::Empty { file: shard.name() });
    }
    Ok(())
}

/// The first 16 bytes, or fewer if there are no more.
fn head(shard: &Shard) -> Result<([u8; 16], usize)> {
    let mut head = [0; 16];
    let len = usize::try_from(shard.source.len).map_or(head.len(), |len| len.min(head.len()));
    shard.read_at(0, &mut head[..len])?;
    Ok((head, len))
}

/// Checks the magic of a shard whose format is known.
pub(crate) fn expect_magic(shard: &Shard, magic: &[u8], expected: &'static str) -> Result<()> {
    not_empty(shard)?;
    let (head, len) = head(shard)?;
    if head[..len].starts_with(magic) {
        return Ok(());
    }
    Err(Error::WrongMagic {
        file: shard.name(),
        expected,
        found: show(&head[..len]),
    })
}

/// Bytes as text where they are text.
fn show(bytes: &[u8]) -> String {
    format!("\"{}\"", bytes.escape_ascii())
}
