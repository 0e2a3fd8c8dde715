use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::sync::Arc;
use std::time::Duration;

use hoist_backend::{Error, FileIdentity, Result, SourceFile};

/// Times a read is tried again after EIO, which network file systems return for a moment.
const EIO_RETRIES: u32 = 3;
/// Times a read is tried again after EINTR without a byte of progress.
const EINTR_RETRIES: u32 = 100;
/// EIO on Linux and every other Unix.
const EIO: i32 = 5;

pub(super) enum Bytes {
    File(Arc<File>),
    Memory(Arc<[u8]>),
}

impl Bytes {
    /// Fills `out` from `offset` on.
    pub(super) fn read_exact_at(&self, source: &SourceFile, offset: u64, out: &mut [u8]) -> Result<()> {
        match self {
            Bytes::Memory(memory) => {
                let range = usize::try_from(offset)
                    .ok()
                    .and_then(|start| Some(start..start.checked_add(out.len())?));
                let bytes = range.and_then(|range| memory.get(range)).ok_or_else(|| {
                    Error::internal(
                        "file source",
                        format!("a read at {offset} past its checked range"),
                    )
                })?;
                out.copy_from_slice(bytes);
                Ok(())
            }
            Bytes::File(file) => read_exact_at(
                |buffer, at| file.read_at(buffer, at),
                || file.metadata().map(|m| m.len()),
                source,
                offset,
                out,
            ),
        }
    }
}

/// Reads all of `out`, trying interrupted and failed reads again a bounded number of times.
fn read_exact_at(
    read: impl Fn(&mut [u8], u64) -> io::Result<usize>,
    length: impl Fn() -> io::Result<u64>,
    source: &SourceFile,
    offset: u64,
    out: &mut [u8],
) -> Result<()> {
    let (mut done, mut interrupted, mut failed) = (0, 0, 0);
    while done < out.len() {
        let at = offset + done as u64;
        let error = match read(&mut out[done..], at) {
            Ok(0) => return Err(ended_early(length(), source, at, out.len() - done)),
            Ok(n) => {
                done += n;
                interrupted = 0;
                continue;
            }
            Err(error) => error,
        };
        if error.kind() == io::ErrorKind::Interrupted && interrupted < EINTR_RETRIES {
            interrupted += 1;
        } else if error.raw_os_error() == Some(EIO) && failed < EIO_RETRIES {
            failed += 1;
            std::thread::sleep(Duration::from_millis(5 << (2 * failed)));
        } else {
            return Err(Error::SourceIo {
                file: source.path.display().to_string(),
                offset: at,
                len: (out.len() - done) as u64,
                error,
            });
        }
    }
    Ok(())
}

/// The file ended within bytes that its header was checked to hold.
fn ended_early(length: io::Result<u64>, source: &SourceFile, offset: u64, missing: usize) -> Error {
    match length {
        Ok(now) if now != source.len => Error::SourceChanged {
            file: source.path.display().to_string(),
            what: "its length",
            expected: source.len.to_string(),
            found: now.to_string(),
        },
        _ => Error::SourceIo {
            file: source.path.display().to_string(),
            offset,
            len: missing as u64,
            error: io::ErrorKind::UnexpectedEof.into(),
        },
    }
}

/// What tells this version of a file from another.
pub(super) fn identity(metadata: &Metadata) -> FileIdentity {
    FileIdentity {
        device: metadata.dev(),
        inode: metadata.ino(),
        len: metadata.len(),
        modified_ns: i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec()),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn source(len: u64) -> SourceFile {
        SourceFile {
            path: "model.gguf".into(),
            len,
            file: None,
            identity: None,
        }
    }

    fn eio() -> io::Error {
        io::Error::from_raw_os_error(EIO)
    }

    /// Reads 8 bytes from a reader that fails as `failures` say, then yields 3 bytes at a time.
    fn read(failures: Vec<io::Error>) -> (Result<()>, [u8; 8]) {
        let failures = Cell::new(failures);
        let mut out = [0; 8];
        let result = read_exact_at(
            |buffer, at| {
                let mut left = failures.take();
                let next = left.pop();
                failures.set(left);
                match next {
                    Some(error) => Err(error),
                    None => {
                        let n = buffer.len().min(3);
                        (0..n).for_each(|i| buffer[i] = at as u8 + i as u8);
                        Ok(n)
                    }
                }
            },
            || Ok(100),
            &source(100),
            10,
            &mut out,
        );
        (result, out)
    }

    #[test]
    fn short_reads_interruptions_and_passing_failures_are_absorbed() {
        for failures in [
            vec![],
            vec![eio(), io::ErrorKind::Interrupted.into(), eio(), eio()],
            (0..EINTR_RETRIES)
                .map(|_| io::ErrorKind::Interrupted.into())
                .collect(),
        ] {
            let (result, out) = read(failures);
            result.unwrap();
            assert_eq!(out, [10, 11, 12, 13, 14, 15, 16, 17]);
        }
    }

    #[test]
    fn lasting_failures_are_errors_that_name_the_place() {
        let (result, _) = read((0..=EIO_RETRIES).map(|_| eio()).collect());
        let message = result.unwrap_err().to_string();
        assert!(
            message.starts_with("reading 8 bytes at 10 of `model.gguf` failed:"),
            "{message}"
        );
        let (result, _) = read(
            (0..=EINTR_RETRIES)
                .map(|_| io::ErrorKind::Interrupted.into())
                .collect(),
        );
        assert!(matches!(result, Err(Error::SourceIo { .. })));
        let (result, _) = read(vec![io::ErrorKind::PermissionDenied.into()]);
        assert!(matches!(result, Err(Error::SourceIo { .. })));
    }

    #[test]
    fn a_file_that_ends_early_has_changed() {
        let ends = |length: u64| {
            read_exact_at(|_, _| Ok(0), move || Ok(length), &source(100), 10, &mut [0; 8]).unwrap_err()
        };
        assert!(matches!(ends(12), Error::SourceChanged { .. }));
        assert!(matches!(ends(100), Error::SourceIo { .. }));
    }
}
