//! Rates that no load exceeds, measured: the link's, and the source's.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hoist_backend::{Error, Result};

use crate::driver::{Context, DeviceBuffer, Event, PinnedBuffer, Stream};
use crate::load::{cached_bytes, open_direct};
use crate::modules::{Launch, Modules, arguments};

/// Bytes of one copy: from 64 MiB on larger ones are no faster.
const COPY_BYTES: usize = 64 << 20;
/// Copies that are timed together.
const COPIES: usize = 32;
/// Bytes that a reader takes at a time, as a load does.
const READ_BYTES: u64 = 4 << 20;
const PAGE: u64 = 4096;

/// Bytes and the time they took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// Bytes.
    pub bytes: u64,
    /// The time.
    pub time: Duration,
}

impl Rate {
    /// In 10^9 bytes a second.
    pub fn gb_s(self) -> f64 {
        self.bytes as f64 / self.time.as_secs_f64().max(1e-9) / 1e9
    }
}

/// Copies page-locked memory to a device, 64 MiB at a time: what the link can do.
///
/// # Errors
/// [`Error::Unavailable`], [`Error::OutOfMemory`].
pub fn link(ordinal: u32) -> Result<Rate> {
    let context = Context::open(ordinal)?;
    let pinned = PinnedBuffer::new(&context, "a measurement", COPY_BYTES)?;
    let target = DeviceBuffer::new(&context, "a measurement", COPY_BYTES as u64)?;
    let stream = Stream::new(&context)?;
    let (start, end) = (Event::timed(&context)?, Event::timed(&context)?);
    // SAFETY: both buffers outlive the synchronisation below.
    unsafe { stream.copy_htod(target.ptr(), pinned.bytes())? };
    start.record(&stream)?;
    for _ in 0..COPIES {
        // SAFETY: as above; copies on one stream follow each other.
        unsafe { stream.copy_htod(target.ptr(), pinned.bytes())? };
    }
    end.record(&stream)?;
    stream.synchronize()?;
    Ok(Rate {
        bytes: (COPY_BYTES * COPIES) as u64,
        time: Duration::from_secs_f32(end.elapsed_ms(&start)? / 1e3),
    })
}

/// Bytes that are read to measure a device's own memory: far beyond its second-level cache.
const DEVICE_BYTES: u64 = 4 << 30;
/// The least that says anything.
const LEAST_DEVICE_BYTES: u64 = 16 << 20;
/// Times they are read; the quickest counts.
const DEVICE_READS: usize = 8;

/// Reads a device's memory with all its multiprocessors, 16 bytes a thread at a time.
///
/// # Errors
/// [`Error::OutOfMemory`] if not even 16 MiB are free.
pub(crate) fn read_rate(context: &Arc<Context>, modules: &Modules) -> Result<Rate> {
    context.bind()?;
    let mut bytes = DEVICE_BYTES;
    let memory = loop {
        match DeviceBuffer::new(context, "a measurement", bytes) {
            Ok(memory) => break memory,
            Err(Error::OutOfMemory { .. }) if bytes > LEAST_DEVICE_BYTES => bytes /= 2,
            Err(error) => return Err(error),
        }
    };
    let stream = Stream::new(context)?;
    // SAFETY: the buffer outlives the last synchronisation below.
    unsafe { stream.fill(memory.ptr(), 0, bytes as usize) }?;
    let kernel = modules.function("residency", "read_all")?;
    let units = bytes / 16;
    let launch = Launch::linear(context.device.multiprocessors * 8, 512);
    let (start, end) = (Event::timed(context)?, Event::timed(context)?);
    let mut best = f32::INFINITY;
    for _ in 0..DEVICE_READS {
        start.record(&stream)?;
        let from = memory.ptr();
        let mut arguments = arguments![from, units];
        // SAFETY: the kernel takes an address and a number of 16-byte units there; it writes only if a word is not 0.
        unsafe { kernel.launch(&stream, launch, &mut arguments) }?;
        end.record(&stream)?;
        stream.synchronize()?;
        best = best.min(end.elapsed_ms(&start)?);
    }
    Ok(Rate {
        bytes,
        time: Duration::from_secs_f32(best.max(1e-6) / 1e3),
    })
}

/// Reads a file with `threads` threads, 4 MiB at a time, through the page cache or past it; at most `limit` bytes.
///
/// # Errors
/// [`Error::SourceIo`]; [`Error::Unsupported`] if the file system cannot go past the page cache.
pub fn read(path: &std::path::Path, direct: bool, threads: usize, limit: u64) -> Result<Rate> {
    use std::os::unix::fs::FileExt as _;

    let failed = |error| Error::SourceIo {
        file: path.display().to_string(),
        offset: 0,
        len: 0,
        error,
    };
    let mut file = File::open(path).map_err(failed)?;
    let bytes = file.metadata().map_err(failed)?.len().min(limit);
    if direct {
        file = open_direct(&file).ok_or_else(|| Error::Unsupported {
            backend: crate::NAME.into(),
            what: hoist_backend::UnsupportedWhat::Other(format!("direct reads of `{}`", path.display())),
        })?;
    }
    let (next, bad) = (AtomicU64::new(0), AtomicBool::new(false));
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                let mut memory = vec![0u8; (READ_BYTES + PAGE) as usize];
                let skip = memory.as_ptr().align_offset(PAGE as usize);
                let buffer = &mut memory[skip..skip + READ_BYTES as usize];
                loop {
                    let at = next.fetch_add(READ_BYTES, Ordering::Relaxed);
                    if at >= bytes || bad.load(Ordering::Relaxed) {
                        return;
                    }
                    let wanted = (bytes - at).min(READ_BYTES) as usize;
                    if !matches!(file.read_at(buffer, at), Ok(n) if n >= wanted) {
                        bad.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let time = started.elapsed();
    if bad.into_inner() {
        return Err(failed(std::io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(Rate { bytes, time })
}

/// Asks the system to forget a file's pages, and tells how many of its bytes are still cached.
///
/// # Errors
/// [`Error::SourceIo`]
pub fn forget_pages(path: &std::path::Path) -> Result<u64> {
    let failed = |error| Error::SourceIo {
        file: path.display().to_string(),
        offset: 0,
        len: 0,
        error,
    };
    let file = File::open(path).map_err(failed)?;
    file.sync_all().map_err(failed)?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).map_err(|e| failed(e.into()))?;
    Ok(cached_bytes(&file, file.metadata().map_err(failed)?.len()).unwrap_or(0))
}

/// Bytes of a file that the page cache holds; `None` if the system does not tell.
///
/// # Errors
/// [`Error::SourceIo`]
pub fn cached(path: &std::path::Path) -> Result<Option<u64>> {
    let failed = |error| Error::SourceIo {
        file: path.display().to_string(),
        offset: 0,
        len: 0,
        error,
    };
    let file = File::open(path).map_err(failed)?;
    let len = file.metadata().map_err(failed)?.len();
    Ok(cached_bytes(&file, len))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_file_is_read_whole_and_its_pages_are_counted() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![7; (9 << 20) + 5]).unwrap();
        let rate = read(file.path(), false, 3, u64::MAX).unwrap();
        assert_eq!(rate.bytes, (9 << 20) + 5);
        assert!(rate.gb_s() > 0.0);
        assert_eq!(read(file.path(), false, 3, 1 << 20).unwrap().bytes, 1 << 20);
        if let Some(cached) = cached(file.path()).unwrap() {
            assert!(cached >= 9 << 20);
        }
        assert!(read(std::path::Path::new("/no/such/file"), false, 1, 1).is_err());
    }
}
