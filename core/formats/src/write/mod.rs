//! Small writers: a builder makes the whole header first, with every tensor's offset known, then the caller streams the
//! tensors' bytes in that order, or writes them at their offsets in any order. The same input gives the same bytes.
//!
//! ```
//! use hoist_formats::write::GgufBuilder;
//! use hoist_formats::{Encoding, MetaValue};
//!
//! # fn main() -> hoist_formats::Result<()> {
//! let layout = GgufBuilder::new("llama")
//!     .meta("llama.block_count", MetaValue::U32(1))
//!     .tensor("output_norm.weight", Encoding::F32, [8])
//!     .layout()?;
//! let mut file = Vec::new();
//! layout.write(&mut file, |_tensor, out| out.write_all(&[0; 32]))?;
//! assert_eq!(file.len() as u64, layout.file_len);
//! # Ok(())
//! # }
//! ```

mod gguf;
mod safetensors;

use std::io::{self, Write};

use hoist_backend::Encoding;

use crate::{Error, Result};

pub use gguf::GgufBuilder;
pub use safetensors::SafeTensorsBuilder;

/// A tensor to be written, with its place in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSlot {
    /// Name.
    pub name: String,
    /// How its values are stored.
    pub encoding: Encoding,
    /// Row-major, slowest dimension first.
    pub shape: Vec<u64>,
    /// First byte in the file.
    pub offset: u64,
    /// Bytes, padding aside.
    pub nbytes: u64,
}

/// A file of which all but the tensors' bytes is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The bytes that precede the first tensor, padding included.
    pub header: Vec<u8>,
    /// Tensors in the order of their bytes.
    pub slots: Vec<TensorSlot>,
    /// Length of the whole file.
    pub file_len: u64,
}

impl Layout {
    /// Writes the whole file. `fill` is called for each tensor in order and must write exactly its bytes; padding is
    /// added here, as zeros.
    ///
    /// # Errors
    /// [`Error::CannotWrite`] if `fill` wrote more or fewer bytes, [`Error::Io`] if writing failed.
    pub fn write<W: Write>(
        &self,
        out: W,
        mut fill: impl FnMut(&TensorSlot, &mut dyn Write) -> io::Result<()>,
    ) -> Result<W> {
        let failed = |error| Error::Io {
            path: "the output".into(),
            error,
        };
        let mut counted = Counted { out, written: 0 };
        counted.write_all(&self.header).map_err(failed)?;
        for (i, slot) in self.slots.iter().enumerate() {
            fill(slot, &mut counted).map_err(failed)?;
            let found = counted.written - slot.offset;
            if found != slot.nbytes {
                return Err(Error::CannotWrite {
                    what: format!("the bytes of tensor `{}`", slot.name),
                    expected: slot.nbytes.to_string(),
                    found: found.to_string(),
                });
            }
            let next = self.slots.get(i + 1).map_or(self.file_len, |next| next.offset);
            io::copy(
                &mut io::Read::take(io::repeat(0), next - counted.written),
                &mut counted,
            )
            .map_err(failed)?;
        }
        counted.flush().map_err(failed)?;
        Ok(counted.out)
    }
}

/// Counts what passes through.
struct Counted<W> {
    out: W,
    written: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.written += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// A tensor before it has a place.
#[derive(Clone, Debug)]
struct Tensor {
    name: String,
    encoding: Encoding,
    shape: Vec<u64>,
}

/// Gives each tensor its place from `start` on, at multiples of `alignment`; returns where the last one ends, padded.
fn place(tensors: &[Tensor], start: u64, alignment: u64) -> Result<(Vec<TensorSlot>, u64)> {
    const FILE: &str = "the output";
    let mut end = start;
    let mut names = std::collections::HashSet::new();
    let mut slots = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        if !names.insert(tensor.name.as_str()) {
            return Err(Error::DuplicateTensor {
                file: FILE.into(),
                name: tensor.name.clone(),
            });
        }
        let nbytes = crate::layout::tensor_bytes(FILE, &tensor.name, tensor.encoding, &tensor.shape)?;
        let offset = end;
        end = offset
            .checked_add(nbytes)
            .and_then(|end| end.checked_next_multiple_of(alignment))
            .ok_or_else(|| Error::CannotWrite {
                what: "the size of the file".into(),
                expected: "below 2^64".into(),
                found: format!("more, with tensor `{}`", tensor.name),
            })?;
        slots.push(TensorSlot {
            name: tensor.name.clone(),
            encoding: tensor.encoding,
            shape: tensor.shape.clone(),
            offset,
            nbytes,
        });
    }
    Ok((slots, end))
}
