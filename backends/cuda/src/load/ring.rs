//! The host memory that bytes pass through: small, of huge pages, registered with the driver.
//!
//! `cuMemHostAlloc` takes 0.6 s a GiB and gives pages of 4 KiB, through which copies are a third slower. An anonymous
//! mapping of huge pages is touched by all processors, which needs no context yet, and registered lane by lane: a reader
//! whose lane is registered sends while those of the others still are.

use std::ffi::c_void;
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys::{self, CUresult};
use hoist_backend::{Error, Result};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use super::schedule::{CHUNK_BYTES, PAGE, TABLE_BYTES};
use crate::driver::Context;

/// Bytes of a slot: a chunk, up to a page before and after it, and a table of pieces.
pub(crate) const SLOT_BYTES: usize = (PAGE + CHUNK_BYTES + PAGE + TABLE_BYTES) as usize;
/// Slots of a lane: one is read into while the other's copy is under way.
pub(crate) const SLOTS: usize = 2;
/// Bytes of a lane.
const LANE_BYTES: usize = SLOTS * SLOT_BYTES;
const HUGE_PAGE: usize = 2 << 20;

/// Lanes of two slots each.
#[derive(Debug)]
pub(crate) struct Ring {
    base: *mut u8,
    len: usize,
    /// For each lane, whether the driver has locked it, once that was tried.
    locked: Vec<OnceLock<bool>>,
    context: OnceLock<Arc<Context>>,
    /// The driver is made to refuse bytes past this; for tests.
    pin_limit: Option<usize>,
}

// SAFETY: plain memory, owned by this value; who writes to which slot is up to its users.
unsafe impl Send for Ring {}
// SAFETY: as above.
unsafe impl Sync for Ring {}

impl Ring {
    /// Touched memory that is not locked yet.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the host has no memory for it.
    pub(crate) fn new(lanes: usize, pin_limit: Option<usize>) -> Result<Self> {
        let len = lanes * LANE_BYTES;
        // Room to start at a huge page.
        let mapped = len + HUGE_PAGE;
        // SAFETY: a new private mapping wherever the system likes.
        let map = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                mapped,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }
        .map_err(|_| Error::OutOfMemory {
            device: "the host".into(),
            what: "the ring that bytes pass through".into(),
            needed: mapped as u64,
            available: 0,
        })?;
        let skipped = map.align_offset(HUGE_PAGE).min(HUGE_PAGE);
        // SAFETY: within the mapping.
        let base = unsafe { map.add(skipped) };
        // SAFETY: the mapping's own start, which nothing refers to.
        let _ = unsafe { munmap(map, skipped) };
        // SAFETY: within the mapping, or one past it.
        let end = unsafe { base.add(len) };
        // SAFETY: the mapping's own end, which nothing refers to.
        let _ = unsafe { munmap(end, HUGE_PAGE - skipped) };
        // SAFETY: the mapping is this value's. Only an advice: without huge pages the ring is slower and no less right.
        let _ = unsafe { madvise(base, len, Advice::LinuxHugepage) };
        let ring = Self {
            base: base.cast(),
            len,
            locked: (0..lanes).map(|_| OnceLock::new()).collect(),
            context: OnceLock::new(),
            pin_limit,
        };
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

    /// Locks a lane, once; the context must be current. `false` if the driver refuses: copies from the lane work all the
    /// same, on the driver's own slow way.
    pub(crate) fn lock(&self, context: &Arc<Context>, lane: usize) -> bool {
        let _ = self.context.get_or_init(|| Arc::clone(context));
        let Some(locked) = self.locked.get(lane) else {
            return false;
        };
        *locked.get_or_init(|| {
            if self
                .pin_limit
                .is_some_and(|limit| (lane + 1) * LANE_BYTES > limit)
            {
                return false;
            }
            // SAFETY: within the mapping.
            let start = unsafe { self.base.add(lane * LANE_BYTES) };
            // SAFETY: the mapping is this value's and outlives the registration.
            let code = unsafe { sys::cuMemHostRegister_v2(start.cast::<c_void>(), LANE_BYTES, 0) };
            code == CUresult::CUDA_SUCCESS
        })
    }

    /// Number of lanes.
    pub(crate) fn lanes(&self) -> usize {
        self.locked.len()
    }

    /// Bytes of all lanes.
    pub(crate) fn nbytes(&self) -> usize {
        self.len
    }

    /// Bytes that the driver has locked.
    pub(crate) fn locked_bytes(&self) -> usize {
        self.locked.iter().filter(|l| l.get() == Some(&true)).count() * LANE_BYTES
    }

    /// Whether the driver has refused to lock a lane.
    pub(crate) fn was_refused(&self) -> bool {
        self.locked.iter().any(|l| l.get() == Some(&false))
    }

    /// A slot's memory.
    ///
    /// # Safety
    /// No other reference to that slot may exist, and no copy from it may be in flight.
    #[expect(
        clippy::mut_from_ref,
        reason = "slots are handed out to threads, one owner each"
    )]
    pub(crate) unsafe fn slot(&self, lane: usize, side: usize) -> &mut [u8] {
        assert!(lane < self.lanes() && side < SLOTS, "a slot of the ring");
        // SAFETY: within the mapping.
        let start = unsafe { self.base.add(lane * LANE_BYTES + side * SLOT_BYTES) };
        // SAFETY: initialised memory within the mapping; the caller upholds exclusivity.
        unsafe { std::slice::from_raw_parts_mut(start, SLOT_BYTES) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if let Some(context) = self.context.get() {
            let _ = context.bind();
        }
        for (lane, locked) in self.locked.iter().enumerate() {
            if locked.get() == Some(&true) {
                // SAFETY: within the mapping.
                let start = unsafe { self.base.add(lane * LANE_BYTES) };
                // SAFETY: registered once, unregistered once.
                let _ = unsafe { sys::cuMemHostUnregister(start.cast()) };
            }
        }
        // SAFETY: mapped once, unmapped once; every reference borrowed from this value.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_are_whole_huge_pages_and_slots_hold_the_largest_chunk() {
        assert_eq!(LANE_BYTES % HUGE_PAGE, 0);
        assert!(SLOT_BYTES as u64 >= PAGE - 1 + CHUNK_BYTES + PAGE + TABLE_BYTES);
        assert_eq!(SLOT_BYTES % PAGE as usize, 0);
    }

    #[test]
    fn slots_are_apart_and_writable_before_any_context() {
        let ring = Ring::new(2, None).unwrap();
        assert_eq!((ring.lanes(), ring.locked_bytes()), (2, 0));
        let all = (0..2).flat_map(|lane| (0..SLOTS).map(move |side| (lane, side)));
        for (i, (lane, side)) in all.enumerate() {
            // SAFETY: one slot at a time, and no copies.
            let slot = unsafe { ring.slot(lane, side) };
            assert_eq!(slot.as_ptr() as usize % SLOT_BYTES % PAGE as usize, 0);
            assert!(slot.iter().all(|b| *b == 0), "{lane} {side}");
            slot.fill(i as u8 + 1);
        }
    }
}
