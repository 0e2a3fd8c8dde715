//! Element-wise floats: F32, F16, BF16.

use crate::scale::f16_to_f32;

#[inline]
pub(crate) fn f32(bytes: &[u8], out: &mut [f32]) {
    for (x, y) in bytes.as_chunks::<4>().0.iter().zip(out) {
        *y = f32::from_le_bytes(*x);
    }
}

#[inline]
pub(crate) fn f16(bytes: &[u8], out: &mut [f32]) {
    for (x, y) in bytes.as_chunks::<2>().0.iter().zip(out) {
        *y = f16_to_f32(u16::from_le_bytes(*x));
    }
}

/// The upper half of an f32.
#[inline]
pub(crate) fn bf16(bytes: &[u8], out: &mut [f32]) {
    for (x, y) in bytes.as_chunks::<2>().0.iter().zip(out) {
        *y = f32::from_bits(u32::from(u16::from_le_bytes(*x)) << 16);
    }
}
