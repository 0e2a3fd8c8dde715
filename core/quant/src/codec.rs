//! What an encoding is: how a block's bytes give integer codes and scales. Each encoding is described once, and read from
//! that description both as f32 and as integers.

use hoist_backend::Encoding;

use crate::scale::Scale;
use crate::{apr, fp4, i_quants, k_quants, legacy, ternary};

/// An encoding of `W` weights in `B` bytes with `S` scales of their own: `value = scale · code − min`.
pub(crate) trait ScaledBlock<const B: usize, const W: usize, const S: usize> {
    /// Whether blocks have a min.
    const MINS: bool = false;

    /// Scale `s` belongs to weights `s · W / S ..`.
    fn scales(block: &[u8; B]) -> [Scale; S];

    /// What is subtracted from every weight of the block: the file's own min, negated.
    fn min(_block: &[u8; B]) -> Scale {
        Scale::from_f16(0)
    }

    /// The integer code of each weight.
    fn codes(block: &[u8; B], out: &mut [i8; W]);
}

/// An encoding of 256 weights in `B` bytes with one f16 scale `d`, integer sub-scales, and perhaps one f16 scale of
/// integer mins: `value = 2^SHIFT · d · sub · code − dmin · min`.
pub(crate) trait SuperBlock<const B: usize> {
    /// Power of two that makes sub-scales and codes integers.
    const SHIFT: i16 = 0;
    /// Whether sub-scales and mins are for 16 weights; otherwise for 32.
    const HALVES: bool;
    /// Whether there are mins.
    const MINS: bool = false;

    /// `d`, as f16 bits.
    fn d(block: &[u8; B]) -> u16;

    /// `dmin`, as f16 bits.
    fn dmin(_block: &[u8; B]) -> u16 {
        0
    }

    /// The sub-scale of each 16 weights; equal in pairs unless [`SuperBlock::HALVES`].
    fn subs(block: &[u8; B]) -> [i16; 16];

    /// The min of each 16 weights, as [`SuperBlock::subs`].
    fn mins(_block: &[u8; B]) -> [i16; 16] {
        [0; 16]
    }

    /// The integer code of each weight.
    fn codes(block: &[u8; B], out: &mut [i8; 256]);
}

/// Something to do with any block encoding.
pub(crate) trait Visitor {
    type Output;

    fn scaled<C: ScaledBlock<B, W, S>, const B: usize, const W: usize, const S: usize>(self) -> Self::Output;

    fn super_block<C: SuperBlock<B>, const B: usize>(self) -> Self::Output;
}

/// Calls the visitor with the description of `encoding`; `None` for encodings that are not made of such blocks: floats,
/// integers, [`Encoding::APR_Q8`] with its one scale for a whole matrix, and the activation formats.
#[inline]
pub(crate) fn visit<V: Visitor>(encoding: Encoding, visitor: V) -> Option<V::Output> {
    Some(match encoding {
        Encoding::Q4_0 => visitor.scaled::<legacy::Q4_0, _, _, _>(),
        Encoding::Q4_1 => visitor.scaled::<legacy::Q4_1, _, _, _>(),
        Encoding::Q5_0 => visitor.scaled::<legacy::Q5_0, _, _, _>(),
        Encoding::Q5_1 => visitor.scaled::<legacy::Q5_1, _, _, _>(),
        Encoding::Q8_0 => visitor.scaled::<legacy::Q8_0, _, _, _>(),
        Encoding::Q2_K => visitor.super_block::<k_quants::Q2_K, _>(),
        Encoding::Q3_K => visitor.super_block::<k_quants::Q3_K, _>(),
        Encoding::Q4_K => visitor.super_block::<k_quants::Q4_K, _>(),
        Encoding::Q5_K => visitor.super_block::<k_quants::Q5_K, _>(),
        Encoding::Q6_K => visitor.super_block::<k_quants::Q6_K, _>(),
        Encoding::IQ2_XXS => visitor.super_block::<i_quants::IQ2_XXS, _>(),
        Encoding::IQ2_XS => visitor.super_block::<i_quants::IQ2_XS, _>(),
        Encoding::IQ2_S => visitor.super_block::<i_quants::IQ2_S, _>(),
        Encoding::IQ3_XXS => visitor.super_block::<i_quants::IQ3_XXS, _>(),
        Encoding::IQ3_S => visitor.super_block::<i_quants::IQ3_S, _>(),
        Encoding::IQ1_S => visitor.super_block::<i_quants::IQ1_S, _>(),
        Encoding::IQ1_M => visitor.super_block::<i_quants::IQ1_M, _>(),
        Encoding::IQ4_NL => visitor.scaled::<i_quants::IQ4_NL, _, _, _>(),
        Encoding::IQ4_XS => visitor.super_block::<i_quants::IQ4_XS, _>(),
        Encoding::TQ1_0 => visitor.scaled::<ternary::TQ1_0, _, _, _>(),
        Encoding::TQ2_0 => visitor.scaled::<ternary::TQ2_0, _, _, _>(),
        Encoding::Q1_0 => visitor.scaled::<ternary::Q1_0, _, _, _>(),
        Encoding::Q2_0 => visitor.scaled::<ternary::Q2_0, _, _, _>(),
        Encoding::MXFP4 => visitor.scaled::<fp4::MXFP4, _, _, _>(),
        Encoding::NVFP4 => visitor.scaled::<fp4::NVFP4, _, _, _>(),
        Encoding::APR_Q4 => visitor.scaled::<apr::APR_Q4, _, _, _>(),
        _ => return None,
    })
}

/// The little-endian u16 at byte `at`.
#[inline]
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// The little-endian u32 at byte `at`.
#[inline]
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Each of eight values twice: of blocks of 32 as of half blocks.
#[inline]
pub(crate) fn twice(of_32: impl Fn(usize) -> i16) -> [i16; 16] {
    std::array::from_fn(|half| of_32(half / 2))
}
