//! Rearranging a matrix in place.

use std::ops::Range;

use hoist_backend::Encoding;

use super::Isa;

/// Rearranges a matrix and what is kept beside it for the kernels of `isa`; says whether it did. Both keep their sizes.
pub(crate) fn pack(isa: Isa, encoding: Encoding, cols: usize, bytes: &mut [u8], side: &mut [u8]) -> bool {
    let _ = (isa, encoding, cols, bytes, side);
    false
}

/// Copies canonical bytes `range` of a matrix that [`pack`] rearranged for `isa` into `out`, which is as long. Any range is
/// allowed.
pub(crate) fn unpack(
    isa: Isa,
    encoding: Encoding,
    cols: usize,
    bytes: &[u8],
    range: Range<usize>,
    out: &mut [u8],
) {
    let _ = (isa, encoding, cols);
    out.copy_from_slice(&bytes[range]);
}
