//! Messages between the host and a worker: numbers and structs of the interface as they lie in memory, since both ends are
//! the same program.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use hoist_plugin_abi as abi;

/// A message longer than this is taken for nonsense.
const MAX_MESSAGE: usize = 1 << 30;

/// A struct without padding, for which any bytes are valid. Pointers in it mean nothing to the other end.
///
/// # Safety
/// As said; then its bytes may be read and made up.
pub(super) unsafe trait Plain: Copy + 'static {}

macro_rules! plain {
    ($($t:ty)*) => {
        $(
            // SAFETY: a `repr(C)` struct of fixed-width numbers and raw pointers whose padding is explicit, which the
            // golden layout checks.
            unsafe impl Plain for $t {}
        )*
    };
}

plain! {
    u8 u32 i32 u64 f32 abi::Status abi::ErrorRecord abi::DeviceInfo abi::OpenOptions abi::Caps abi::DeviceMemory abi::Tensor
    abi::PlanV abi::PlanReport abi::Refusal abi::LoadReceipt abi::IndexEntry abi::IndexLayout abi::IndexReceipt abi::KvSpec
    abi::ValueSpec abi::WorkspaceDims abi::WorkspaceBytes abi::Op abi::Table abi::Program
}

fn bytes_of<T: Plain>(items: &[T]) -> &[u8] {
    // SAFETY: a plain struct has no padding, so that all its bytes are initialised.
    unsafe { std::slice::from_raw_parts(items.as_ptr().cast(), size_of_val(items)) }
}

/// Writes a message.
#[derive(Default)]
pub(super) struct Encoder(Vec<u8>);

impl Encoder {
    /// Starts over.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    pub(super) fn put<T: Plain>(&mut self, item: T) {
        self.0.extend_from_slice(bytes_of(&[item]));
    }

    pub(super) fn put_all<T: Plain>(&mut self, items: &[T]) {
        self.put(items.len() as u64);
        self.0.extend_from_slice(bytes_of(items));
    }
}

/// Reads a message; `None` if it ends too soon.
pub(super) struct Decoder<'a>(pub(super) &'a [u8]);

impl Decoder<'_> {
    pub(super) fn take<T: Plain>(&mut self) -> Option<T> {
        let (item, rest) = self.0.split_at_checked(size_of::<T>())?;
        self.0 = rest;
        // SAFETY: as many bytes as the struct has, and any are valid.
        Some(unsafe { item.as_ptr().cast::<T>().read_unaligned() })
    }

    pub(super) fn take_all<T: Plain>(&mut self) -> Option<Vec<T>> {
        let count = usize::try_from(self.take::<u64>()?).ok()?;
        let (items, rest) = self.0.split_at_checked(count.checked_mul(size_of::<T>())?)?;
        self.0 = rest;
        let mut all = Vec::<T>::with_capacity(count);
        // SAFETY: the vector has room for `count` structs, which is what `items` holds.
        unsafe { std::ptr::copy_nonoverlapping(items.as_ptr(), all.as_mut_ptr().cast(), items.len()) };
        // SAFETY: they were just written, and any bytes are valid.
        unsafe { all.set_len(count) };
        Some(all)
    }
}

/// Why no message came.
pub(super) enum Silence {
    /// The other end is gone.
    Gone,
    /// It took too long.
    TimedOut,
    /// It is no message.
    Nonsense,
}

fn silence(error: &std::io::Error) -> Silence {
    match error.kind() {
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => Silence::TimedOut,
        _ => Silence::Gone,
    }
}

/// Sends a message by a deadline, if there is one.
pub(super) fn send(
    mut stream: &UnixStream,
    message: &Encoder,
    deadline: Option<Instant>,
) -> Result<(), Silence> {
    let len = u32::try_from(message.0.len()).map_err(|_| Silence::Nonsense)?;
    let frame = len.to_ne_bytes();
    for mut part in [frame.as_slice(), &message.0] {
        while !part.is_empty() {
            stream
                .set_write_timeout(remaining(deadline)?)
                .map_err(|e| silence(&e))?;
            match stream.write(part) {
                Ok(0) => return Err(Silence::Gone),
                Ok(n) => part = &part[n..],
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(silence(&e)),
            }
        }
    }
    Ok(())
}

/// Receives a message into `buffer` by a deadline, if there is one.
pub(super) fn receive(
    stream: &UnixStream,
    buffer: &mut Vec<u8>,
    deadline: Option<Instant>,
) -> Result<(), Silence> {
    let mut frame = [0; 4];
    read_exact(stream, &mut frame, deadline)?;
    let len = u32::from_ne_bytes(frame) as usize;
    if len > MAX_MESSAGE {
        return Err(Silence::Nonsense);
    }
    buffer.clear();
    while buffer.len() < len {
        // In steps, so that a length alone takes no memory.
        let start = buffer.len();
        buffer.resize(len.min(start + (1 << 20)), 0);
        read_exact(stream, &mut buffer[start..], deadline)?;
    }
    Ok(())
}

fn read_exact(mut stream: &UnixStream, mut out: &mut [u8], deadline: Option<Instant>) -> Result<(), Silence> {
    while !out.is_empty() {
        stream
            .set_read_timeout(remaining(deadline)?)
            .map_err(|e| silence(&e))?;
        match stream.read(out) {
            Ok(0) => return Err(Silence::Gone),
            Ok(n) => out = &mut out[n..],
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(silence(&e)),
        }
    }
    Ok(())
}

fn remaining(deadline: Option<Instant>) -> Result<Option<Duration>, Silence> {
    match deadline {
        None => Ok(None),
        Some(deadline) => match deadline.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => Ok(Some(left)),
            _ => Err(Silence::TimedOut),
        },
    }
}
