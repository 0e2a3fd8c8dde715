//! Reads byte runs of the source: through the page cache where it holds them, past it where it does not.

use std::fs::File;
use std::io::{ErrorKind, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hoist_backend::{Error, Mapping, Result, SourceFile, WeightSource};
use rustix::fs::{Mode, OFlags};
use rustix::io::ReadWriteFlags;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::schedule::PAGE;

/// Times a read is tried again after EIO, which network file systems return for a moment.
const EIO_RETRIES: u32 = 3;
/// Times a read is tried again after EINTR without a byte of progress.
const EINTR_RETRIES: u32 = 100;
const EIO: i32 = 5;
const EINVAL: i32 = 22;

/// Which way bytes were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// `pread` through the page cache.
    Cache,
    /// `pread` with O_DIRECT.
    Direct,
    /// A copy from memory: the source is no file.
    Memory,
}

/// A file of the source.
pub(crate) struct Input {
    path: PathBuf,
    bytes: Bytes,
}

enum Bytes {
    File {
        file: Arc<File>,
        /// The same file, opened to go past the page cache; `None` if its file system cannot.
        direct: Option<File>,
        /// Cleared when a direct read is refused after all.
        direct_works: AtomicBool,
        /// Whether the page cache held what was asked for last, so that it is read without asking.
        cached: AtomicBool,
    },
    Memory(Arc<dyn Mapping>),
}

impl Input {
    /// A file of the source; `None` if its bytes can only be had through [`WeightSource::read_at`].
    pub(crate) fn new(source: &dyn WeightSource, number: u32, file: &SourceFile) -> Option<Self> {
        let bytes = match &file.file {
            Some(open) => Bytes::File {
                direct: open_direct(open),
                direct_works: AtomicBool::new(true),
                cached: AtomicBool::new(false),
                file: Arc::clone(open),
            },
            None => Bytes::Memory(
                source
                    .share(number)
                    .filter(|m| m.bytes().len() as u64 == file.len)?,
            ),
        };
        Some(Self {
            path: file.path.clone(),
            bytes,
        })
    }

    /// Its path, for messages.
    pub(crate) fn path(&self) -> String {
        self.path.display().to_string()
    }

    /// Whether direct reads are possible.
    pub(crate) fn is_direct(&self) -> bool {
        matches!(&self.bytes, Bytes::File { direct: Some(_), direct_works, .. } if direct_works.load(Ordering::Relaxed))
    }

    /// Reads bytes `start..end` to a slot, so that they start `start % PAGE` into it.
    ///
    /// # Errors
    /// [`Error::SourceIo`]
    pub(crate) fn read(&self, start: u64, end: u64, slot: &mut [u8]) -> Result<Path> {
        let head = (start % PAGE) as usize;
        let len = (end - start) as usize;
        match &self.bytes {
            Bytes::Memory(mapping) => {
                let from = &mapping.bytes()[start as usize..end as usize];
                slot[head..head + len].copy_from_slice(from);
                Ok(Path::Memory)
            }
            Bytes::File {
                file,
                direct,
                direct_works,
                cached,
            } => {
                let direct = direct.as_ref().filter(|_| direct_works.load(Ordering::Relaxed));
                if direct.is_some() && cached.load(Ordering::Relaxed) {
                    if read_cached(file, start, &mut slot[head..head + len]) {
                        return Ok(Path::Cache);
                    }
                    cached.store(false, Ordering::Relaxed);
                }
                if let Some(direct) = direct
                    && !is_cached(file, start, end)
                {
                    let first = start - head as u64;
                    let whole = (head + len).next_multiple_of(PAGE as usize);
                    // A file ends where it ends: only what was asked for must come.
                    match self.fill(direct, first, &mut slot[..whole], head + len) {
                        Ok(()) => return Ok(Path::Direct),
                        Err(Error::SourceIo { error, .. }) if error.raw_os_error() == Some(EINVAL) => {
                            direct_works.store(false, Ordering::Relaxed);
                        }
                        Err(error) => return Err(error),
                    }
                }
                self.fill(file, start, &mut slot[head..head + len], len)?;
                cached.store(true, Ordering::Relaxed);
                Ok(Path::Cache)
            }
        }
    }

    /// Reads at least `least` bytes of `out`.
    fn fill(&self, file: &File, offset: u64, out: &mut [u8], least: usize) -> Result<()> {
        read_at_least(|out, at| file.read_at(out, at), offset, out, least).map_err(|(done, error)| {
            Error::SourceIo {
                file: self.path(),
                offset: offset + done as u64,
                len: (least - done) as u64,
                error,
            }
        })
    }
}

/// Reads at least `least` bytes of `out`; tries interrupted and failed reads again a bounded number of times.
fn read_at_least(
    read: impl Fn(&mut [u8], u64) -> std::io::Result<usize>,
    offset: u64,
    out: &mut [u8],
    least: usize,
) -> Result<(), (usize, std::io::Error)> {
    let (mut done, mut interrupted, mut failed) = (0, 0, 0);
    while done < least {
        match read(&mut out[done..], offset + done as u64) {
            Ok(0) => return Err((done, ErrorKind::UnexpectedEof.into())),
            Ok(n) => {
                done += n;
                interrupted = 0;
            }
            Err(e) if e.kind() == ErrorKind::Interrupted && interrupted < EINTR_RETRIES => interrupted += 1,
            Err(e) if e.raw_os_error() == Some(EIO) && failed < EIO_RETRIES => {
                failed += 1;
                std::thread::sleep(Duration::from_millis(5 << (2 * failed)));
            }
            Err(e) => return Err((done, e)),
        }
    }
    Ok(())
}

/// Reads a run if the page cache holds all of it; what `out` holds otherwise is not said. Where it does, that spares the
/// question; where it does not, the system may read a little ahead, so that it is tried only after a run that was there.
fn read_cached(file: &File, start: u64, out: &mut [u8]) -> bool {
    let len = out.len();
    let read = rustix::io::preadv2(file, &mut [IoSliceMut::new(out)], start, ReadWriteFlags::NOWAIT);
    read.is_ok_and(|n| n == len)
}

/// The same open file, once more and past the page cache.
pub(crate) fn open_direct(file: &File) -> Option<File> {
    // By its number, so that it is the same inode whatever has happened to its path.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).ok().map(File::from)
}

/// Whether the page cache holds at least half of a run; `true` if the system does not tell.
pub(crate) fn is_cached(file: &File, start: u64, end: u64) -> bool {
    let first = start / PAGE * PAGE;
    let pages = (end - first).div_ceil(PAGE);
    cached_pages(file, first, pages).is_none_or(|cached| 2 * cached >= pages)
}

/// Bytes of a file's first `len` that the page cache holds, in whole pages; `None` if the system does not tell.
pub(crate) fn cached_bytes(file: &File, len: u64) -> Option<u64> {
    cached_pages(file, 0, len.div_ceil(PAGE)).map(|pages| pages * PAGE)
}

/// Pages of a run that the page cache holds, by `cachestat`, or by `mincore` before Linux 6.5.
fn cached_pages(file: &File, first: u64, pages: u64) -> Option<u64> {
    static NO_CACHESTAT: AtomicBool = AtomicBool::new(false);
    if !NO_CACHESTAT.load(Ordering::Relaxed) {
        match cachestat(file, first, pages * PAGE) {
            Some(cached) => return Some(cached),
            None => NO_CACHESTAT.store(true, Ordering::Relaxed),
        }
    }
    mincore(file, first, pages)
}

/// `struct cachestat_range` and `struct cachestat` of linux/mman.h.
#[repr(C)]
struct CachestatRange {
    offset: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct Cachestat {
    cache: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

fn cachestat(file: &File, offset: u64, len: u64) -> Option<u64> {
    /// The same on every architecture: include/uapi/asm-generic/unistd.h.
    const SYS_CACHESTAT: libc::c_long = 451;
    let range = CachestatRange { offset, len };
    let mut found = Cachestat::default();
    // SAFETY: both structs are the kernel's and outlive the call.
    let result = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            &raw const range,
            &raw mut found,
            0u32,
        )
    };
    (result == 0).then_some(found.cache)
}

fn mincore(file: &File, first: u64, pages: u64) -> Option<u64> {
    let len = (pages * PAGE) as usize;
    // SAFETY: a new mapping; it is asked about and never read, so that a file that shrinks raises no signal.
    let map = unsafe {
        mmap(
            std::ptr::null_mut(),
            len,
            ProtFlags::READ,
            MapFlags::SHARED,
            file.as_fd(),
            first,
        )
    }
    .ok()?;
    let mut resident = vec![0u8; pages as usize];
    // SAFETY: the mapping has that length and the vector a byte for each page.
    let result = unsafe { libc::mincore(map, len, resident.as_mut_ptr()) };
    // SAFETY: mapped above, unmapped once.
    let _ = unsafe { munmap(map, len) };
    (result == 0).then(|| resident.iter().filter(|r| **r & 1 == 1).count() as u64)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io::Write as _;

    use super::*;

    fn read(
        failures: Vec<std::io::Error>,
        least: usize,
        end: u64,
    ) -> (Result<(), (usize, std::io::Error)>, [u8; 8]) {
        let failures = Cell::new(failures);
        let mut out = [0; 8];
        let result = read_at_least(
            |buffer, at| {
                let mut left = failures.take();
                let next = left.pop();
                failures.set(left);
                if let Some(error) = next {
                    return Err(error);
                }
                let n = buffer.len().min(3).min((end - at) as usize);
                (0..n).for_each(|i| buffer[i] = at as u8 + i as u8);
                Ok(n)
            },
            10,
            &mut out,
            least,
        );
        (result, out)
    }

    fn eio() -> std::io::Error {
        std::io::Error::from_raw_os_error(EIO)
    }

    #[test]
    fn short_reads_and_passing_failures_are_absorbed() {
        let (result, out) = read(vec![eio(), ErrorKind::Interrupted.into(), eio(), eio()], 8, 100);
        result.unwrap();
        assert_eq!(out, [10, 11, 12, 13, 14, 15, 16, 17]);
        // A direct read of the last page ends with the file.
        read(vec![], 5, 15).0.unwrap();
    }

    #[test]
    fn lasting_failures_and_early_ends_are_errors() {
        assert_eq!(read(vec![], 8, 15).0.unwrap_err().0, 5);
        assert!(
            read((0..=EIO_RETRIES).map(|_| eio()).collect(), 8, 100)
                .0
                .is_err()
        );
        assert!(read(vec![ErrorKind::PermissionDenied.into()], 8, 100).0.is_err());
    }

    fn temporary(len: usize) -> (tempfile::NamedTempFile, Vec<u8>) {
        let bytes: Vec<u8> = (0..len).map(|i| ((i * 7) >> 3) as u8).collect();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        file.as_file().sync_all().unwrap();
        (file, bytes)
    }

    #[test]
    fn what_was_just_written_is_cached_and_both_ways_of_asking_agree() {
        let (file, bytes) = temporary(1 << 20);
        let pages = (bytes.len() as u64).div_ceil(PAGE);
        assert_eq!(mincore(file.as_file(), 0, pages), Some(pages));
        if let Some(cached) = cachestat(file.as_file(), 0, pages * PAGE) {
            assert_eq!(cached, pages);
        }
        assert!(is_cached(file.as_file(), 5000, 1 << 20));
    }

    #[test]
    fn a_run_is_read_without_asking_only_if_all_of_it_is_cached() {
        let (file, bytes) = temporary(1 << 20);
        let mut out = vec![0; 5000];
        // Some file systems cannot tell.
        if read_cached(file.as_file(), 77, &mut out) {
            assert!(out == bytes[77..5077]);
        }
        let end = bytes.len() as u64;
        assert!(!read_cached(file.as_file(), end - 4999, &mut out));
    }

    #[test]
    fn direct_and_cached_reads_yield_the_same_bytes_at_any_offset() {
        let (file, bytes) = temporary((1 << 20) + 777);
        let input = Input {
            path: "m".into(),
            bytes: Bytes::File {
                file: Arc::new(file.reopen().unwrap()),
                direct: open_direct(file.as_file()),
                direct_works: AtomicBool::new(true),
                cached: AtomicBool::new(false),
            },
        };
        let mut memory = vec![0u8; 3 << 20];
        let aligned = memory.as_ptr().align_offset(PAGE as usize);
        let slot = &mut memory[aligned..aligned + (2 << 20)];
        for (start, end) in [
            (0, 4096),
            (1, 5000),
            (4095, 4097),
            (8192, bytes.len()),
            (99, bytes.len()),
        ] {
            for _ in 0..2 {
                slot.fill(0);
                input.read(start as u64, end as u64, slot).unwrap();
                let head = start % PAGE as usize;
                assert!(slot[head..head + end - start] == bytes[start..end]);
                // Out of the cache, so that the second round goes past it where the file system allows.
                let _ = rustix::fs::fadvise(file.as_file(), 0, None, rustix::fs::Advice::DontNeed);
            }
        }
        let end = bytes.len() as u64 + 1;
        assert!(matches!(input.read(0, end, slot), Err(Error::SourceIo { .. })));
    }
}
