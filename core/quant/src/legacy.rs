//! One f16 scale, and for some an f16 min, for each 32 weights: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0. Layouts are those of the
//! `block_*` structs in ggml.

use crate::codec::{ScaledBlock, u16_at, u32_at};
use crate::scale::Scale;

/// f16 scale; 16 bytes of nibbles: byte `j` holds weight `j` low and weight `j + 16` high.
pub(crate) struct Q4_0;

/// f16 scale; f16 min; nibbles as in Q4_0.
pub(crate) struct Q4_1;

/// f16 scale; u32 of fifth bits, bit `i` for weight `i`; nibbles as in Q4_0.
pub(crate) struct Q5_0;

/// f16 scale; f16 min; fifth bits and nibbles as in Q5_0.
pub(crate) struct Q5_1;

/// f16 scale; 32 × i8.
pub(crate) struct Q8_0;

/// The negation of an f16, by its sign bit: GGML adds a min, the contract subtracts it.
#[inline]
fn negated(bits: u16) -> Scale {
    Scale::from_f16(bits ^ 0x8000)
}

/// Nibbles of 16 bytes at `at`, low ones first, less `zero`.
#[inline]
fn nibbles(bytes: &[u8], at: usize, zero: i8, out: &mut [i8; 32]) {
    let (low, high) = out.split_at_mut(16);
    for ((q, low), high) in bytes[at..at + 16].iter().zip(low).zip(high) {
        *low = (q & 15) as i8 - zero;
        *high = (q >> 4) as i8 - zero;
    }
}

/// Nibbles of 16 bytes at `at` with fifth bits from the u32 in front of them, less `zero`.
#[inline]
fn five_bits(bytes: &[u8], at: usize, zero: i8, out: &mut [i8; 32]) {
    let fifth = u32_at(bytes, at - 4);
    nibbles(bytes, at, 0, out);
    for (i, code) in out.iter_mut().enumerate() {
        // Within −16 … 31; an overflow check would keep this loop from becoming SIMD code.
        *code = (*code & 15 | ((fifth >> i & 1) << 4) as i8).wrapping_sub(zero);
    }
}

impl ScaledBlock<18, 32, 1> for Q4_0 {
    #[inline]
    fn scales(block: &[u8; 18]) -> [Scale; 1] {
        [Scale::from_f16(u16_at(block, 0))]
    }

    #[inline]
    fn codes(block: &[u8; 18], out: &mut [i8; 32]) {
        nibbles(block, 2, 8, out);
    }
}

impl ScaledBlock<20, 32, 1> for Q4_1 {
    const MINS: bool = true;

    #[inline]
    fn scales(block: &[u8; 20]) -> [Scale; 1] {
        [Scale::from_f16(u16_at(block, 0))]
    }

    #[inline]
    fn min(block: &[u8; 20]) -> Scale {
        negated(u16_at(block, 2))
    }

    #[inline]
    fn codes(block: &[u8; 20], out: &mut [i8; 32]) {
        nibbles(block, 4, 0, out);
    }
}

impl ScaledBlock<22, 32, 1> for Q5_0 {
    #[inline]
    fn scales(block: &[u8; 22]) -> [Scale; 1] {
        [Scale::from_f16(u16_at(block, 0))]
    }

    #[inline]
    fn codes(block: &[u8; 22], out: &mut [i8; 32]) {
        five_bits(block, 6, 16, out);
    }
}

impl ScaledBlock<24, 32, 1> for Q5_1 {
    const MINS: bool = true;

    #[inline]
    fn scales(block: &[u8; 24]) -> [Scale; 1] {
        [Scale::from_f16(u16_at(block, 0))]
    }

    #[inline]
    fn min(block: &[u8; 24]) -> Scale {
        negated(u16_at(block, 2))
    }

    #[inline]
    fn codes(block: &[u8; 24], out: &mut [i8; 32]) {
        five_bits(block, 8, 0, out);
    }
}

impl ScaledBlock<34, 32, 1> for Q8_0 {
    #[inline]
    fn scales(block: &[u8; 34]) -> [Scale; 1] {
        [Scale::from_f16(u16_at(block, 0))]
    }

    #[inline]
    fn codes(block: &[u8; 34], out: &mut [i8; 32]) {
        for (q, code) in block[2..].iter().zip(out) {
            *code = *q as i8;
        }
    }
}
