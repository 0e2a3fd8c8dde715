//! The host memory that bytes pass through: small, of huge pages, registered with the driver.
//!
//! `cuMemHostAlloc` takes 0.6 s a GiB and gives pages of 4 KiB, through which copies are a third slower; an anonymous
//! mapping of huge pages is touched by all processors and then registered in a few milliseconds.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};
use hoist_backend::{Error, Result};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use super::schedule::{CHUNK_BYTES, PAGE, TABLE_BYTES};
use crate::driver::{Context, check};

/// Bytes of a slot: a chunk, up to a page before and after it, and a table of pieces.
pub(crate) const SLOT_BYTES: usize =
    (PAGE + CHUNK_BYTES + PAGE + TABLE_BYTES).next_multiple_of(PAGE) as usize;
const HUGE_PAGE: usize = 2 << 20;

/// How the ring's memory came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pinning {
    /// All that was asked for.
    Full,
    /// Fewer slots: page-locked memory is short.
    Reduced,
    /// None: the driver refused to lock any, and copies it on its own way.
    Pageable,
}

/// Slots of host memory.
#[derive(Debug)]
pub(crate) struct Ring {
    base: *mut u8,
    len: usize,
    slots: usize,
    pinning: Pinning,
    context: Arc<Context>,
}

// SAFETY: plain memory, owned by this value; who writes to which slot is up to its users.
unsafe impl Send for Ring {}
// SAFETY: as above.
unsafe impl Sync for Ring {}

/// Numbers of slots to try, most first, none below 2.
fn attempts(slots: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(slots), |n| (*n > 2).then(|| (n / 2).max(2)))
}

impl Ring {
    /// A ring of `slots` slots, of fewer if the driver cannot lock so much memory, or of pageable memory if it can lock
    /// none. `pin_limit` makes the driver refuse more bytes than that; for tests.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the host has no memory for it.
    pub(crate) fn new(context: &Arc<Context>, slots: usize, pin_limit: Option<usize>) -> Result<Self> {
        context.bind()?;
        for n in attempts(slots) {
            let mut ring = Self::pageable(context, n)?;
            if pin_limit.is_some_and(|limit| ring.len > limit) {
                continue;
            }
            // SAFETY: the mapping is this value's and outlives the registration.
            let code = unsafe { sys::cuMemHostRegister_v2(ring.base.cast::<c_void>(), ring.len, 0) };
            match code {
                CUresult::CUDA_SUCCESS => {
                    ring.pinning = if n == slots {
                        Pinning::Full
                    } else {
                        Pinning::Reduced
                    };
                    return Ok(ring);
                }
                CUresult::CUDA_ERROR_OUT_OF_MEMORY
                | CUresult::CUDA_ERROR_NOT_PERMITTED
                | CUresult::CUDA_ERROR_NOT_SUPPORTED
                | CUresult::CUDA_ERROR_OPERATING_SYSTEM
                | CUresult::CUDA_ERROR_INVALID_VALUE => {}
                code => check("cuMemHostRegister", code).map_err(|e| e.on(context.id()))?,
            }
        }
        Self::pageable(context, slots)
    }

    fn pageable(context: &Arc<Context>, slots: usize) -> Result<Self> {
        let len = (slots * SLOT_BYTES).next_multiple_of(HUGE_PAGE);
        // SAFETY: a new private mapping wherever the system likes.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }
        .map_err(|_| Error::OutOfMemory {
            device: "the host".into(),
            what: "the ring that bytes pass through".into(),
            needed: len as u64,
            available: 0,
        })?;
        let ring = Self {
            base: base.cast(),
            len,
            slots,
            pinning: Pinning::Pageable,
            context: Arc::clone(context),
        };
        // SAFETY: the mapping is this value's. Only an advice: without huge pages the ring is slower and no less right.
        let _ = unsafe { madvise(base, len, Advice::LinuxHugepage) };
        ring.touch();
        Ok(ring)
    }

    /// Touches every page, by several threads: the kernel zeroes pages when they are first written.
    fn touch(&self) {
        let threads = std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(16);
        let part = self.len.div_ceil(threads).next_multiple_of(HUGE_PAGE);
        std::thread::scope(|scope| {
            for start in (0..self.len).step_by(part) {
                let end = (start + part).min(self.len);
                // An address, since a pointer does not cross threads.
                let base = self.base as usize;
                let touch = move || {
                    for at in (start..end).step_by(PAGE as usize) {
                        let page = (base + at) as *mut u8;
                        // SAFETY: within the mapping, and each thread has pages of its own.
                        unsafe { page.write_volatile(0) };
                    }
                };
                // A thread that cannot be started leaves its pages to their first use.
                let _ = std::thread::Builder::new().spawn_scoped(scope, touch);
            }
        });
    }

    /// Number of slots; at least 2.
    pub(crate) fn slots(&self) -> usize {
        self.slots
    }

    /// Bytes of all slots.
    pub(crate) fn nbytes(&self) -> usize {
        self.len
    }

    /// How its memory came to be.
    pub(crate) fn pinning(&self) -> Pinning {
        self.pinning
    }

    /// A slot's memory.
    ///
    /// # Safety
    /// No other reference to that slot may exist, and no copy from it may be in flight.
    #[expect(
        clippy::mut_from_ref,
        reason = "slots are handed out to threads, one owner each"
    )]
    pub(crate) unsafe fn slot(&self, slot: usize) -> &mut [u8] {
        assert!(slot < self.slots, "a slot of the ring");
        // SAFETY: within the mapping.
        let start = unsafe { self.base.add(slot * SLOT_BYTES) };
        // SAFETY: initialised memory within the mapping; the caller upholds exclusivity.
        unsafe { std::slice::from_raw_parts_mut(start, SLOT_BYTES) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.pinning != Pinning::Pageable {
            let _ = self.context.bind();
            // SAFETY: registered once, unregistered once.
            let _ = unsafe { sys::cuMemHostUnregister(self.base.cast()) };
        }
        // SAFETY: mapped once, unmapped once; every reference borrowed from this value.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ever_fewer_slots_are_tried_down_to_two() {
        assert_eq!(attempts(34).collect::<Vec<_>>(), [34, 17, 8, 4, 2]);
        assert_eq!(attempts(2).collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn a_slot_holds_the_largest_chunk_at_any_offset_in_a_page() {
        assert!(SLOT_BYTES as u64 >= PAGE - 1 + CHUNK_BYTES + PAGE + TABLE_BYTES);
        assert_eq!(SLOT_BYTES % PAGE as usize, 0);
    }
}
