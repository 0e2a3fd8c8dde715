//! Memory that the host and a worker share: the bytes of uploads, read-backs and logits.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, SealFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// One end's mapping.
pub(super) struct Shared {
    file: OwnedFd,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread.
unsafe impl Send for Shared {}

impl Shared {
    /// New memory of `len` bytes. It can grow and cannot shrink, so that no end takes it away from the other.
    pub(super) fn new(len: usize) -> io::Result<Self> {
        let file = memfd_create("hoist-plugin", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, len as u64)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK)?;
        Self::map(file, len)
    }

    /// The other end's memory.
    pub(super) fn open(file: OwnedFd) -> io::Result<Self> {
        let len = File::from(file.try_clone()?).metadata()?.len();
        Self::map(file, usize::try_from(len).map_err(io::Error::other)?)
    }

    fn map(file: OwnedFd, len: usize) -> io::Result<Self> {
        Ok(Self {
            start: map(&file, len)?,
            file,
            len,
        })
    }

    pub(super) fn file(&self) -> impl AsFd + '_ {
        self.file.as_fd()
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Makes it at least `len` bytes long; the other end maps it anew.
    pub(super) fn grow(&mut self, len: usize) -> io::Result<()> {
        if len > self.len {
            ftruncate(&self.file, len as u64)?;
            self.remap(len)?;
        }
        Ok(())
    }

    /// Maps it anew after the other end has made it longer.
    pub(super) fn remap(&mut self, len: usize) -> io::Result<()> {
        let start = map(&self.file, len)?;
        let old = (
            std::mem::replace(&mut self.start, start),
            std::mem::replace(&mut self.len, len),
        );
        unmap(old.0, old.1);
        Ok(())
    }

    /// Where it starts in this process.
    pub(super) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

fn map(file: &OwnedFd, len: usize) -> io::Result<NonNull<u8>> {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping, at an address of the system's choice.
    let start = unsafe { mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, file, 0) }?;
    NonNull::new(start.cast()).ok_or_else(|| io::Error::other("a mapping at address 0"))
}

fn unmap(start: NonNull<u8>, len: usize) {
    // SAFETY: a mapping of ours that nothing points into any more. It cannot fail for a mapping that exists.
    let _ = unsafe { munmap(start.as_ptr().cast(), len) };
}

impl Drop for Shared {
    fn drop(&mut self) {
        unmap(self.start, self.len);
    }
}
