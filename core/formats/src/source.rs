//! Opening of files, once each, and reading from them.

use std::fs::File;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use hoist_backend::{FileIdentity, SourceFile};

use crate::header::to_usize;
use crate::{Error, Manifest, Result, Shard, TensorInfo};

pub(crate) fn io_error(path: &Path, error: std::io::Error) -> Error {
    Error::Io {
        path: path.display().to_string(),
        error,
    }
}

impl Shard {
    /// Opens a regular file, which is never opened again: its identity is that of the open file.
    pub(crate) fn open(path: &Path) -> Result<Shard> {
        // Looked at before it is opened, since opening a pipe waits for a writer.
        let kind = std::fs::metadata(path)
            .map_err(|e| io_error(path, e))?
            .file_type();
        if !kind.is_file() {
            return Err(Error::NotAFile {
                file: path.display().to_string(),
                found: if kind.is_dir() {
                    "a folder"
                } else if kind.is_fifo() {
                    "a pipe"
                } else if kind.is_socket() {
                    "a socket"
                } else {
                    "a device"
                },
            });
        }
        let file = File::open(path).map_err(|e| io_error(path, e))?;
        let meta = file.metadata().map_err(|e| io_error(path, e))?;
        Ok(Shard {
            source: SourceFile {
                path: path.to_owned(),
                len: meta.len(),
                file: Some(Arc::new(file)),
                identity: Some(FileIdentity {
                    device: meta.dev(),
                    inode: meta.ino(),
                    len: meta.len(),
                    modified_ns: i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec()),
                }),
            },
            memory: None,
        })
    }

    /// Bytes in memory that stand for a file.
    pub(crate) fn in_memory(name: &Path, bytes: Arc<[u8]>) -> Shard {
        Shard {
            source: SourceFile {
                path: name.to_owned(),
                len: bytes.len() as u64,
                file: None,
                identity: None,
            },
            memory: Some(bytes),
        }
    }

    /// The path or name, for messages.
    pub(crate) fn name(&self) -> String {
        self.source.path.display().to_string()
    }

    /// Fills `out` with the bytes from `offset` on.
    ///
    /// # Errors
    /// [`Error::Truncated`] if the file ends before `out` is full, [`Error::Io`].
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let needed = out.len() as u64;
        let truncated = |file_len: u64| Error::Truncated {
            file: self.name(),
            what: "a read".into(),
            at: offset,
            needed,
            file_len,
        };
        if let Some(memory) = &self.memory {
            let found = usize::try_from(offset)
                .ok()
                .and_then(|start| memory.get(start..start.checked_add(out.len())?));
            let Some(found) = found else {
                return Err(truncated(memory.len() as u64));
            };
            out.copy_from_slice(found);
            return Ok(());
        }
        let Some(file) = &self.source.file else {
            return Err(truncated(0));
        };
        file.read_exact_at(out, offset).map_err(|error| {
            if error.kind() == std::io::ErrorKind::UnexpectedEof {
                truncated(file.metadata().map_or(0, |m| m.len()))
            } else {
                io_error(&self.source.path, error)
            }
        })
    }

    /// The whole file, which must not be longer than `limit`.
    pub(crate) fn read_all(&self, limit: u64, what: &str) -> Result<Vec<u8>> {
        if self.source.len > limit {
            return Err(Error::HeaderTooLarge {
                file: self.name(),
                what: what.into(),
                needed: self.source.len,
                limit,
            });
        }
        let mut out = vec![0; to_usize(self.source.len, &self.name())?];
        self.read_at(0, &mut out)?;
        Ok(out)
    }
}

impl Manifest {
    /// The bytes of a small tensor that the host needs, such as rope factors, as they are in the file.
    ///
    /// # Errors
    /// [`Error::TensorTooLarge`] above `limit` bytes; as [`Shard::read_at`]. The tensor must be one of this manifest's.
    pub fn read_tensor(&self, tensor: &TensorInfo, limit: u64) -> Result<Vec<u8>> {
        let too_large = || Error::TensorTooLarge {
            name: tensor.name.clone(),
            nbytes: tensor.nbytes,
            limit,
        };
        if tensor.nbytes > limit {
            return Err(too_large());
        }
        let Some(shard) = self.shards.get(tensor.shard as usize) else {
            return Err(Error::MissingShard {
                file: self.path.display().to_string(),
                shard: tensor.shard.to_string(),
            });
        };
        let mut out = vec![0; usize::try_from(tensor.nbytes).map_err(|_| too_large())?];
        shard.read_at(tensor.offset, &mut out)?;
        Ok(out)
    }
}
