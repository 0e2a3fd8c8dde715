//! Host buffers that notice misuse: bytes end at a page that nobody may touch, inputs cannot be written to, and what
//! stands in front of an output is checked afterwards.
#![expect(
    unsafe_code,
    reason = "pages are mapped and protected by system calls, and seen as slices"
)]

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ops::{Deref, DerefMut};
use std::ptr::{NonNull, null_mut};
use std::sync::{Mutex, PoisonError};

use hoist_backend::Mapping;
use rustix::mm::{
    MapFlags, MprotectFlags, MremapFlags, ProtFlags, mmap_anonymous, mprotect, mremap_fixed, munmap,
};

use crate::Failure;

/// What fills a buffer around the bytes that belong to the backend.
const CANARY: u8 = 0xC5;

/// What fills a buffer that was given back: whoever kept a pointer finds this there.
const GONE: u8 = 0x9B;

/// Regions of up to so many bytes are kept for the next buffer of their size, …
const KEPT_REGION_BYTES: usize = 4 << 20;
/// … as long as all that are kept have no more than this.
const KEPT_BYTES: usize = 64 << 20;

/// The same pages twice, once to be read and once to be written, each with a page before and after it that nobody may
/// touch. Changing what may be done to pages costs a system call that halts every thread of the process, and the suite
/// makes thousands of buffers a second: two views make those calls once a region instead of once a buffer.
#[derive(Debug)]
struct Region {
    read: NonNull<u8>,
    write: NonNull<u8>,
    /// Bytes of each view between its guards: whole pages.
    usable: usize,
}

// SAFETY: the pages belong to this value alone, like a `Box<[u8]>`.
unsafe impl Send for Region {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Region {}

fn failed(found: impl std::fmt::Display) -> Failure {
    Failure::new("a guarded buffer of the suite", "", "memory", found)
}

/// Addresses for `usable` bytes between two pages, none of which may be touched. Returns where the first guard begins.
fn reserve(usable: usize) -> Result<NonNull<u8>, Failure> {
    let mapped = usable
        .checked_add(2 * rustix::param::page_size())
        .ok_or_else(|| failed(format!("no room for {usable} bytes")))?;
    // SAFETY: asks for new pages anywhere; nothing that exists is replaced.
    let base = unsafe { mmap_anonymous(null_mut(), mapped, ProtFlags::empty(), MapFlags::PRIVATE) }
        .map_err(failed)?;
    NonNull::new(base.cast::<u8>()).ok_or_else(|| failed("address 0"))
}

/// Gives back what [`reserve`] gave.
fn release(base: NonNull<u8>, usable: usize) {
    let mapped = usable + 2 * rustix::param::page_size();
    // SAFETY: the whole reservation belongs to the caller, who drops the last value that names it.
    let unmapped = unsafe { munmap(base.as_ptr().cast::<c_void>(), mapped) };
    debug_assert!(unmapped.is_ok());
}

impl Region {
    fn map(usable: usize) -> Result<Self, Failure> {
        let read = reserve(usable)?;
        let write = match reserve(usable) {
            Ok(write) => write,
            Err(e) => {
                release(read, usable);
                return Err(e);
            }
        };
        // From here on what goes wrong is unmapped by `drop`.
        let region = Self { read, write, usable };
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: replaces pages of the reservation that was just made and nothing points to.
        let made = unsafe {
            mmap_anonymous(
                region.write_at(0).cast::<c_void>(),
                usable,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )
        };
        let made = made.map_err(failed)?;
        // SAFETY: an old size of 0 asks for a second view of shared pages; it takes the place of pages of the other
        // reservation, which nothing points to.
        unsafe {
            mremap_fixed(
                made,
                0,
                usable,
                MremapFlags::MAYMOVE,
                region.read_at(0).cast_mut().cast::<c_void>(),
            )
        }
        .map_err(failed)?;
        region.protect(MprotectFlags::READ)?;
        Ok(region)
    }

    /// Changes what may be done through the view for reading.
    fn protect(&self, flags: MprotectFlags) -> Result<(), Failure> {
        let at = self.read_at(0).cast_mut().cast::<c_void>();
        // SAFETY: the range is whole pages of this region, which the callers do not lend at the time.
        unsafe { mprotect(at, self.usable, flags) }
            .map_err(|e| Failure::new("a guarded buffer of the suite", "", "mprotect", e))
    }

    fn read_at(&self, offset: usize) -> *const u8 {
        self.read
            .as_ptr()
            .wrapping_add(rustix::param::page_size() + offset)
    }

    fn write_at(&self, offset: usize) -> *mut u8 {
        self.write
            .as_ptr()
            .wrapping_add(rustix::param::page_size() + offset)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        release(self.read, self.usable);
        release(self.write, self.usable);
    }
}

/// Regions that no buffer uses, by their size.
static KEPT: Mutex<(usize, BTreeMap<usize, Vec<Region>>)> = Mutex::new((0, BTreeMap::new()));

/// Bytes of a region, which end where its second guard begins.
#[derive(Debug)]
struct Pages {
    /// There until the value is dropped.
    region: Option<Region>,
    /// Where the bytes begin.
    start: usize,
    len: usize,
    /// Nobody may touch the bytes any more.
    retired: bool,
}

impl Pages {
    /// The bytes are what a buffer before this one left.
    fn new(len: usize) -> Result<Self, Failure> {
        let usable = len
            .max(1)
            .checked_next_multiple_of(rustix::param::page_size())
            .ok_or_else(|| failed(format!("no room for {len} bytes")))?;
        let kept = {
            let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
            let region = kept.1.get_mut(&usable).and_then(Vec::pop);
            kept.0 -= region.as_ref().map_or(0, |r| r.usable);
            region
        };
        let region = match kept {
            Some(region) => region,
            None => Region::map(usable)?,
        };
        Ok(Self {
            region: Some(region),
            start: usable - len,
            len,
            retired: false,
        })
    }

    /// `len` bytes from `offset` on, to be read; none once the region is gone.
    fn slice(&self, offset: usize, len: usize) -> &[u8] {
        let Some(region) = &self.region else { return &[] };
        // SAFETY: the range lies in the view, is initialised (anonymous pages are zero), and readable unless retired,
        // when nothing hands out slices; it is written to only through `slice_mut`, which borrows exclusively.
        unsafe { std::slice::from_raw_parts(region.read_at(offset), len) }
    }

    /// As `slice`, to be written.
    fn slice_mut(&mut self, offset: usize, len: usize) -> &mut [u8] {
        let Some(region) = &self.region else {
            return &mut [];
        };
        // SAFETY: as in `slice`; the borrow is exclusive, so no slice of the other view exists.
        unsafe { std::slice::from_raw_parts_mut(region.write_at(offset), len) }
    }

    fn bytes(&self) -> &[u8] {
        self.slice(self.start, self.len)
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.slice_mut(self.start, self.len)
    }

    fn front_bytes(&self) -> &[u8] {
        self.slice(0, self.start)
    }

    fn front_mut(&mut self) -> &mut [u8] {
        self.slice_mut(0, self.start)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        self.bytes_mut().fill(GONE);
        let Some(region) = self.region.take() else { return };
        if self.retired || region.usable > KEPT_REGION_BYTES {
            return;
        }
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.0 + region.usable <= KEPT_BYTES {
            kept.0 += region.usable;
            kept.1.entry(region.usable).or_default().push(region);
        }
    }
}

/// Bytes for a backend to read: writing to them, or reading past their end, ends the process.
#[derive(Debug)]
pub struct ReadOnly(Pages);

impl ReadOnly {
    /// A copy of `bytes`.
    ///
    /// # Errors
    /// A failure of the suite itself, if there is no memory.
    pub fn new(bytes: &[u8]) -> Result<Self, Failure> {
        let mut pages = Pages::new(bytes.len())?;
        pages.bytes_mut().copy_from_slice(bytes);
        Ok(Self(pages))
    }

    /// Takes the bytes away without freeing their addresses: whoever kept a pointer and uses it ends the process.
    ///
    /// # Errors
    /// A failure of the suite itself.
    pub fn retire(self) -> Result<Retired, Failure> {
        let mut pages = self.0;
        pages.retired = true;
        if let Some(region) = &pages.region {
            region.protect(MprotectFlags::empty())?;
        }
        Ok(Retired(pages))
    }

    /// Overwrites the bytes: whoever kept a pointer finds others there.
    #[must_use]
    pub fn scribble(self) -> Self {
        let mut pages = self.0;
        let change = if crate::mutation::holds(crate::mutation::Rule::BytesChangeAfterUpload) {
            0xFF
        } else {
            0
        };
        for byte in pages.bytes_mut() {
            *byte ^= change;
        }
        Self(pages)
    }
}

impl Deref for ReadOnly {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.bytes()
    }
}

impl Mapping for ReadOnly {
    fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }
}

/// The addresses of a buffer that is gone, kept so that nothing else takes them.
#[derive(Debug)]
pub struct Retired(#[expect(dead_code, reason = "held for its addresses")] Pages);

/// Bytes for a backend to fill: writing past their end ends the process, writing in front of them is found by
/// [`Writable::check`].
#[derive(Debug)]
pub struct Writable(Pages);

impl Writable {
    /// `len` bytes that hold no result yet.
    ///
    /// # Errors
    /// A failure of the suite itself, if there is no memory.
    pub fn new(len: usize) -> Result<Self, Failure> {
        let mut pages = Pages::new(len)?;
        pages.front_mut().fill(CANARY);
        pages.bytes_mut().fill(CANARY);
        Ok(Self(pages))
    }

    /// Demands that nothing in front of the bytes was written to.
    ///
    /// # Errors
    /// Where it was.
    pub fn check(&self, what: &str) -> Result<(), Failure> {
        let front = self.0.front_bytes();
        let written = |b: &u8| *b != CANARY && crate::mutation::holds(crate::mutation::Rule::FrontOfOutput);
        match front.iter().rposition(written) {
            None => Ok(()),
            Some(at) => Err(Failure::new(
                what,
                format!("{} bytes before the buffer", front.len() - at),
                "bytes that stay as they were",
                format!("{:#04x}", front[at]),
            )),
        }
    }

    /// Whether the bytes still hold what they held before anybody wrote to them.
    pub fn is_untouched(&self) -> bool {
        self.0.bytes().iter().all(|b| *b == CANARY)
    }
}

impl Deref for Writable {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.bytes()
    }
}

impl DerefMut for Writable {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.0.bytes_mut()
    }
}

/// f32 results for a backend to fill, guarded as [`Writable`].
#[derive(Debug)]
pub struct WritableF32(Writable);

impl WritableF32 {
    /// `len` values, each a NaN that no operation makes.
    ///
    /// # Errors
    /// A failure of the suite itself, if there is no memory.
    pub fn new(len: usize) -> Result<Self, Failure> {
        let bytes = len
            .checked_mul(4)
            .ok_or_else(|| Failure::new("a guarded buffer of the suite", "", "memory", len))?;
        let mut buffer = Self(Writable::new(bytes)?);
        buffer.fill(f32::from_bits(0x7FC5_C5C5));
        Ok(buffer)
    }

    /// As [`Writable::check`].
    ///
    /// # Errors
    /// Where something was written.
    pub fn check(&self, what: &str) -> Result<(), Failure> {
        self.0.check(what)
    }
}

impl Deref for WritableF32 {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: any four bytes are an f32; the bytes end at a page and are a multiple of 4, so they are aligned.
        let (_, values, _) = unsafe { self.0.align_to::<f32>() };
        values
    }
}

impl DerefMut for WritableF32 {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `deref`.
        let (_, values, _) = unsafe { self.0.align_to_mut::<f32>() };
        values
    }
}

/// A file mapped read-only.
#[derive(Debug)]
pub struct FileMap {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone and is only read.
unsafe impl Send for FileMap {}
// SAFETY: as above.
unsafe impl Sync for FileMap {}

impl FileMap {
    /// Maps `len` bytes of a file that nobody changes: a temporary one of the suite's own.
    ///
    /// # Errors
    /// What the system says.
    pub fn new(file: &std::fs::File, len: u64) -> std::io::Result<Self> {
        let len = usize::try_from(len).map_err(std::io::Error::other)?;
        // SAFETY: asks for new pages anywhere; nothing that exists is replaced.
        let base = unsafe { rustix::mm::mmap(null_mut(), len, ProtFlags::READ, MapFlags::SHARED, file, 0) }?;
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(|| std::io::Error::other("address 0"))?;
        Ok(Self { base, len })
    }
}

impl Deref for FileMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the whole mapping is readable, and the file is as long as it and not changed.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

impl Drop for FileMap {
    fn drop(&mut self) {
        // SAFETY: the whole mapping belongs to this value.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast::<c_void>(), self.len) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_what_was_put_in_and_end_at_a_page() {
        for len in [0, 1, 18, 4096, 5000] {
            let bytes: Vec<u8> = (0..len).map(|i| i as u8).collect();
            let buffer = ReadOnly::new(&bytes).unwrap();
            assert_eq!(&buffer[..], bytes);
            assert!((buffer.as_ptr() as usize + len).is_multiple_of(4096));
            let buffer = buffer.scribble();
            assert!(buffer.iter().zip(&bytes).all(|(a, b)| *a == !*b));
        }
    }

    #[test]
    fn a_write_in_front_of_the_buffer_is_found() {
        let mut buffer = Writable::new(18).unwrap();
        buffer.check("test").unwrap();
        assert!(buffer.is_untouched());
        buffer.0.front_mut()[4096 - 18 - 3] = 0;
        let failure = buffer.check("test").unwrap_err();
        assert_eq!(failure.at, "3 bytes before the buffer");
    }

    #[test]
    fn values_are_aligned_and_as_many_as_asked_for() {
        for len in [0, 1, 7, 2048] {
            let mut values = WritableF32::new(len).unwrap();
            assert_eq!(values.len(), len);
            values.fill(1.5);
            assert!(values.iter().all(|v| *v == 1.5));
            values.check("test").unwrap();
        }
    }

    /// What the guards do is end a process, so each runs in one: this test, called again with a variable set.
    #[test]
    fn misuse_ends_the_process() {
        const NAME: &str = "HOIST_TEST_GUARD";
        match std::env::var(NAME).as_deref() {
            Err(_) => {}
            Ok(misuse) => {
                let buffer = ReadOnly::new(&[1, 2, 3]).unwrap();
                let at = buffer.as_ptr();
                match misuse {
                    "read past the end" => {
                        let past = at.wrapping_add(3);
                        // SAFETY: none; this is the misuse that must end the process.
                        let byte = unsafe { past.read_volatile() };
                        assert_ne!(byte, 1, "not reached");
                    }
                    "write" => {
                        // SAFETY: none; this is the misuse that must end the process.
                        unsafe { at.cast_mut().write_volatile(9) };
                    }
                    "use after the call" => {
                        let _retired = buffer.retire().unwrap();
                        // SAFETY: none; this is the misuse that must end the process.
                        let byte = unsafe { at.read_volatile() };
                        assert_eq!(byte, 1, "not reached");
                    }
                    _ => {}
                }
                return;
            }
        }
        let run = |misuse: &str| {
            std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "guard::tests::misuse_ends_the_process"])
                .env(NAME, misuse)
                .output()
                .unwrap()
                .status
        };
        use std::os::unix::process::ExitStatusExt;
        assert!(run("control").success());
        for misuse in ["read past the end", "write", "use after the call"] {
            assert_eq!(run(misuse).signal(), Some(11), "{misuse}");
        }
    }
}
