//! GGML's formats for quantised activations, Q8_1 and Q8_K. They are no weights and have no integer view; files that
//! carry them can still be looked into.

use crate::codec::{u16_at, u32_at};
use crate::scale::f16_to_f32;

/// 32 weights in 36 bytes: f16 scale; f16 of scale times the sum of codes, which plays no part in decoding; 32 × i8.
#[inline]
pub(crate) fn q8_1(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<36>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        let d = f16_to_f32(u16_at(block, 0));
        for (q, y) in block[4..].iter().zip(out) {
            *y = d * f32::from(*q as i8);
        }
    }
}

/// 256 weights in 292 bytes: f32 scale; 256 × i8; 16 × i16 sums of codes, which play no part in decoding.
#[inline]
pub(crate) fn q8_k(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes
        .as_chunks::<292>()
        .0
        .iter()
        .zip(out.as_chunks_mut::<256>().0)
    {
        let d = f32::from_bits(u32_at(block, 0));
        for (q, y) in block[4..260].iter().zip(out) {
            *y = d * f32::from(*q as i8);
        }
    }
}
