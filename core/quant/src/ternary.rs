//! Codes of one or two bits, or of base-3 digits, under one f16 scale: TQ1_0 and TQ2_0 (256 weights), Q1_0 (128), Q2_0
//! (64). Layouts are those of the `block_*` structs in ggml.

use crate::codec::{ScaledBlock, u16_at};
use crate::k_quants::{bit_pairs, field};
use crate::scale::Scale;

/// 48 bytes of five and 4 bytes of four base-3 digits each; f16 scale. A byte is the digits' fixed-point fraction, rounded
/// up: multiplying by 3^n modulo 256 brings digit `n` to the top, and three times that, over 256, is the digit.
pub(crate) struct TQ1_0;

/// 64 bytes of 2-bit codes; f16 scale.
pub(crate) struct TQ2_0;

/// f16 scale; 128 sign bits, lowest first: 1 is plus.
pub(crate) struct Q1_0;

/// f16 scale; 64 2-bit codes, lowest first: −1, 0, 1, 2.
pub(crate) struct Q2_0;

const POWERS_OF_3: [u8; 5] = [1, 3, 9, 27, 81];

/// Digits 0, 1, … of each of `bytes`, less 1: all first digits, then all second ones, until `out` is full.
#[inline]
fn trits(bytes: &[u8], out: &mut [i8]) {
    for (power, out) in POWERS_OF_3.iter().zip(out.chunks_exact_mut(bytes.len())) {
        for (q, code) in bytes.iter().zip(out) {
            let fraction = u16::from(q.wrapping_mul(*power));
            *code = ((fraction * 3) >> 8) as i8 - 1;
        }
    }
}

impl ScaledBlock<54, 256, 1> for TQ1_0 {
    #[inline]
    fn scales(block: &[u8; 54]) -> [Scale; 1] {
        [Scale::from_f16(u16_at(block, 52))]
    }

    #[inline]
    fn codes(block: &[u8; 54], out: &mut [i8; 256]) {
        let (first, rest) = out.split_at_mut(160);
        let (second, third) = rest.split_at_mut(80);
        trits(&block[..32], first);
        trits(&block[32..48], second);
        trits(&block[48..52], third);
    }
}

impl ScaledBlock<66, 256, 1> for TQ2_0 {
    #[inline]
    fn scales(block: &[u8; 66]) -> [Scale; 1] {
        [Scale::from_f16(u16_at(block, 64))]
    }

    #[inline]
    fn codes(block: &[u8; 66], out: &mut [i8; 256]) {
        bit_pairs(field(block, 0), out);
        for code in out {
            *code = (*code & 3) - 1;
        }
    }
}

impl ScaledBlock<18, 128, 1> for Q1_0 {
    #[inline]
    fn scales(block: &[u8; 18]) -> [Scale; 1] {
        [Scale::from_f16(u16_at(block, 0))]
    }

    #[inline]
    fn codes(block: &[u8; 18], out: &mut [i8; 128]) {
        for (q, out) in block[2..].iter().zip(out.as_chunks_mut::<8>().0) {
            for (i, code) in out.iter_mut().enumerate() {
                *code = 2 * (q >> i & 1) as i8 - 1;
            }
        }
    }
}

impl ScaledBlock<18, 64, 1> for Q2_0 {
    #[inline]
    fn scales(block: &[u8; 18]) -> [Scale; 1] {
        [Scale::from_f16(u16_at(block, 0))]
    }

    #[inline]
    fn codes(block: &[u8; 18], out: &mut [i8; 64]) {
        for (q, out) in block[2..].iter().zip(out.as_chunks_mut::<4>().0) {
            for (i, code) in out.iter_mut().enumerate() {
                *code = (q >> (2 * i) & 3) as i8 - 1;
            }
        }
    }
}
