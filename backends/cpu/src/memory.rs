//! What the machine has, and memory of our own.

use hoist_backend::{Error, Result};
use memmap2::{Advice, MmapMut};

/// Every weight starts at a multiple of this: a cache line, and the widest vector register.
pub(crate) const ALIGNMENT: usize = 64;

/// Below this a huge page would hold mostly nothing.
const HUGE_PAGES_FROM: usize = 4 << 20;

/// `n` rounded up to [`ALIGNMENT`].
pub(crate) fn align_up(n: u64) -> Option<u64> {
    n.checked_next_multiple_of(ALIGNMENT as u64)
}

/// Memory of the machine in bytes, as Linux counts it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SystemMemory {
    pub(crate) total: u64,
    /// What can be had without swapping: the page cache counts as free.
    pub(crate) available: u64,
}

impl SystemMemory {
    pub(crate) fn read() -> Result<Self> {
        let text = std::fs::read_to_string("/proc/meminfo").map_err(|e| Error::Unavailable {
            backend: crate::NAME.into(),
            reason: format!("/proc/meminfo cannot be read: {e}"),
            hint: Some("the CPU backend runs on Linux with /proc mounted".into()),
        })?;
        Self::parse(&text).ok_or_else(|| Error::Unavailable {
            backend: crate::NAME.into(),
            reason: "/proc/meminfo has no MemTotal or no MemAvailable".into(),
            hint: None,
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix(name))?;
            let kib: u64 = line
                .trim_start_matches(':')
                .trim()
                .strip_suffix("kB")?
                .trim()
                .parse()
                .ok()?;
            kib.checked_mul(1024)
        };
        Some(Self {
            total: field("MemTotal")?,
            available: field("MemAvailable")?,
        })
    }
}

/// One run of zeroed memory, page-aligned. A page is taken from the machine when it is first touched.
pub(crate) struct Arena {
    map: Option<MmapMut>,
}

impl std::fmt::Debug for Arena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arena").field("len", &self.bytes().len()).finish()
    }
}

impl Arena {
    /// Memory of `len` bytes; the caller has checked that they can be had.
    pub(crate) fn new(what: &str, len: u64) -> Result<Self> {
        let refuse = || Error::OutOfMemory {
            device: crate::NAME.into(),
            what: what.into(),
            needed: len,
            available: SystemMemory::read().map_or(0, |m| m.available),
        };
        let len = usize::try_from(len).map_err(|_| refuse())?;
        if len == 0 {
            return Ok(Self { map: None });
        }
        let map = MmapMut::map_anon(len).map_err(|_| refuse())?;
        if len >= HUGE_PAGES_FROM {
            // Only an advice: a kernel without huge pages is slower and no less right.
            let _ = map.advise(Advice::HugePage);
        }
        Ok(Self { map: Some(map) })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or(&[])
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        self.map.as_deref_mut().unwrap_or(&mut [])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let m = SystemMemory::parse("MemTotal:       24 kB\nMemFree: 1 kB\nMemAvailable:    7 kB\n").unwrap();
        assert_eq!((m.total, m.available), (24 * 1024, 7 * 1024));
        assert!(SystemMemory::parse("MemTotal: 24 kB\n").is_none());
        assert!(SystemMemory::parse("MemTotal: x kB\nMemAvailable: 7 kB\n").is_none());
        let here = SystemMemory::read().unwrap();
        assert!(here.available <= here.total && here.available > 0);
    }

    #[test]
    fn an_arena_is_aligned_zeroed_and_may_be_empty() {
        assert!(Arena::new("weights", 0).unwrap().bytes().is_empty());
        let mut arena = Arena::new("weights", 5 << 20).unwrap();
        assert_eq!(arena.bytes().as_ptr() as usize % ALIGNMENT, 0);
        assert!(arena.bytes().iter().all(|b| *b == 0));
        arena.bytes_mut()[77] = 1;
        assert_eq!(arena.bytes()[77], 1);
    }
}
