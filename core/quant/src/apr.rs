//! APR v2's own encodings: AprQ4 and AprQ8.
//!
//! AprQ8 is no block encoding: one f32 scale stands in front of a matrix, and then one i8 for each weight.
#![expect(
    non_camel_case_types,
    reason = "encodings are spelled as the contract spells them"
)]

use crate::codec::{ScaledBlock, u16_at, u32_at};
use crate::scale::Scale;

/// f16 scale; 16 bytes of nibbles: byte `j` holds weight `2j` low and weight `2j + 1` high, each plus 8. Blocks follow one
/// another through the flattened tensor, so that rows are whole blocks only where columns are a multiple of 32.
pub(crate) struct APR_Q4;

impl ScaledBlock<18, 32, 1> for APR_Q4 {
    #[inline]
    fn scales(block: &[u8; 18]) -> [Scale; 1] {
        [Scale::from_f16(u16_at(block, 0))]
    }

    #[inline]
    fn codes(block: &[u8; 18], out: &mut [i8; 32]) {
        for (q, pair) in block[2..].iter().zip(out.as_chunks_mut::<2>().0) {
            *pair = [(q & 15) as i8 - 8, (q >> 4) as i8 - 8];
        }
    }
}

/// Bytes of AprQ8's scale, in front of a matrix.
pub(crate) const APR_Q8_PREFIX: usize = 4;

/// AprQ8's scale, from the 4 bytes in front of a matrix.
#[inline]
pub(crate) fn apr_q8_scale(matrix: &[u8]) -> f32 {
    f32::from_bits(u32_at(matrix, 0))
}

/// `i8 · scale` for each code; `out` is as long as `codes`.
#[inline]
pub(crate) fn dequantize_apr_q8(scale: f32, codes: &[u8], out: &mut [f32]) {
    for (q, y) in codes.iter().zip(out) {
        *y = f32::from(*q as i8) * scale;
    }
}
