//! Host buffers that notice misuse: bytes end at a page that nobody may touch, inputs cannot be written to, and what
//! stands in front of an output is checked afterwards.
#![expect(
    unsafe_code,
    reason = "pages are mapped and protected by system calls, and seen as slices"
)]

use std::ffi::c_void;
use std::ops::{Deref, DerefMut};
use std::ptr::{NonNull, null_mut};

use hoist_backend::Mapping;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

use crate::Failure;

/// What fills a buffer around the bytes that belong to the backend.
const CANARY: u8 = 0xC5;

/// Pages with one that may not be touched before and after them; the bytes end where the last one begins.
#[derive(Debug)]
struct Pages {
    base: NonNull<u8>,
    /// Bytes of the whole mapping.
    mapped: usize,
    /// Where the accessible pages begin.
    front: usize,
    /// Where the bytes begin.
    start: usize,
    len: usize,
}

// SAFETY: the pages belong to this value alone, like a `Box<[u8]>`.
unsafe impl Send for Pages {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Pages {}

impl Pages {
    fn new(len: usize) -> Result<Self, Failure> {
        let page = rustix::param::page_size();
        let failed = |found: String| Failure::new("a guarded buffer of the suite", "", "memory", found);
        let usable = len.max(1).checked_next_multiple_of(page);
        let mapped = usable
            .and_then(|n| n.checked_add(2 * page))
            .ok_or_else(|| failed(format!("no room for {len} bytes")))?;
        // SAFETY: asks for new pages anywhere; nothing that exists is replaced.
        let base = unsafe { mmap_anonymous(null_mut(), mapped, ProtFlags::empty(), MapFlags::PRIVATE) }
            .map_err(|e| failed(e.to_string()))?;
        let Some(base) = NonNull::new(base.cast::<u8>()) else {
            return Err(failed("address 0".into()));
        };
        let usable = mapped - 2 * page;
        let mut pages = Self {
            base,
            mapped,
            front: page,
            start: page + usable - len,
            len,
        };
        pages.protect(MprotectFlags::READ | MprotectFlags::WRITE)?;
        pages.front_mut().fill(CANARY);
        Ok(pages)
    }

    fn protect(&mut self, flags: MprotectFlags) -> Result<(), Failure> {
        let len = self.mapped - 2 * self.front;
        // SAFETY: the offset lies inside the mapping.
        let at = unsafe { self.base.as_ptr().add(self.front) };
        // SAFETY: the range is whole pages of this mapping, which nothing borrows (`&mut self`).
        unsafe { mprotect(at.cast::<c_void>(), len, flags) }
            .map_err(|e| Failure::new("a guarded buffer of the suite", "", "mprotect", e))
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: the offset lies inside the mapping.
        let at = unsafe { self.base.as_ptr().add(self.start) };
        // SAFETY: `len` bytes from there are mapped, initialised (anonymous pages are zero) and readable whenever a
        // value that hands out slices exists.
        unsafe { std::slice::from_raw_parts(at, self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the offset lies inside the mapping.
        let at = unsafe { self.base.as_ptr().add(self.start) };
        // SAFETY: as in `bytes`, and writable: only `Writable`, and `ReadOnly` before it is sealed, call this.
        unsafe { std::slice::from_raw_parts_mut(at, self.len) }
    }

    fn front_bytes(&self) -> &[u8] {
        // SAFETY: the offset lies inside the mapping.
        let at = unsafe { self.base.as_ptr().add(self.front) };
        // SAFETY: from there to `start` is mapped and readable.
        unsafe { std::slice::from_raw_parts(at, self.start - self.front) }
    }

    fn front_mut(&mut self) -> &mut [u8] {
        // SAFETY: the offset lies inside the mapping.
        let at = unsafe { self.base.as_ptr().add(self.front) };
        // SAFETY: from there to `start` is mapped and writable, and disjoint from `bytes`.
        unsafe { std::slice::from_raw_parts_mut(at, self.start - self.front) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the whole mapping belongs to this value; a backend that kept a pointer breaks the contract, and this
        // is how it is found.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast::<c_void>(), self.mapped) };
        debug_assert!(unmapped.is_ok());
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
        pages.protect(MprotectFlags::READ)?;
        Ok(Self(pages))
    }

    /// Takes the bytes away without freeing their addresses: whoever kept a pointer and uses it ends the process.
    ///
    /// # Errors
    /// A failure of the suite itself.
    pub fn retire(self) -> Result<Retired, Failure> {
        let mut pages = self.0;
        pages.protect(MprotectFlags::empty())?;
        Ok(Retired(pages))
    }

    /// Overwrites the bytes: whoever kept a pointer finds others there.
    ///
    /// # Errors
    /// A failure of the suite itself.
    pub fn scribble(self) -> Result<Self, Failure> {
        let mut pages = self.0;
        pages.protect(MprotectFlags::READ | MprotectFlags::WRITE)?;
        let change = if crate::mutation::holds(crate::mutation::Rule::BytesChangeAfterUpload) {
            0xFF
        } else {
            0
        };
        for byte in pages.bytes_mut() {
            *byte ^= change;
        }
        pages.protect(MprotectFlags::READ)?;
        Ok(Self(pages))
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
            let buffer = buffer.scribble().unwrap();
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
