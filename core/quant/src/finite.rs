//! A scan for NaNs and infinities that reads scales only.

use hoist_backend::{Encoding, EncodingKind, Shape};

use crate::codec::{u16_at, u32_at};
use crate::i_quants::iq1_m_d;
use crate::{Error, Result};

/// Looks for the first value (F32, F16, BF16) or scale that is NaN or infinite.
///
/// `bytes` are whole blocks; for [`Encoding::APR_Q8`] they start with a matrix's scale, and what follows is of no matter.
/// F16 exponents of 31 and MXFP4's scale 255 are refused; every NVFP4 scale is a number.
///
/// # Errors
/// [`Error::NonFinite`] with the offset of the first byte of that value or scale (of the lowest of the four u16 that hold
/// an IQ1_M scale), [`Error::PartialBlock`], [`Error::NotDecodable`] for encodings that are no weights.
pub fn check_finite(encoding: Encoding, bytes: &[u8]) -> Result<()> {
    if encoding == Encoding::APR_Q8 {
        return crate::matrix_scale(encoding, bytes).map(|_| ());
    }
    let found = bytes.len() as u64;
    if !found.is_multiple_of(encoding.block_bytes()) {
        return Err(Error::PartialBlock {
            encoding,
            block: encoding.block_bytes(),
            found,
        });
    }
    check_finite_blocks(encoding, bytes, 0)
}

/// As [`check_finite`], of a weight's whole canonical bytes: every matrix of an [`Encoding::APR_Q8`] weight is looked at.
///
/// # Errors
/// As [`check_finite`]; [`Error::Shape`], [`Error::Length`].
pub fn check_finite_weight(encoding: Encoding, shape: Shape, bytes: &[u8]) -> Result<()> {
    let expected = encoding
        .nbytes(shape)
        .map_err(|_| Error::Shape { encoding, shape })?;
    if expected != bytes.len() as u64 {
        return Err(Error::Length {
            encoding,
            what: "bytes",
            expected,
            found: bytes.len() as u64,
        });
    }
    if encoding != Encoding::APR_Q8 {
        return check_finite(encoding, bytes);
    }
    let matrices = usize::try_from(shape.matrices).map_err(|_| Error::Shape { encoding, shape })?;
    if matrices == 0 {
        return Ok(());
    }
    let matrix_bytes = bytes.len() / matrices;
    for (i, matrix) in bytes.chunks_exact(matrix_bytes).enumerate() {
        if crate::matrix_scale(encoding, matrix).is_err() {
            let offset = (i * matrix_bytes) as u64;
            return Err(Error::NonFinite { encoding, offset });
        }
    }
    Ok(())
}

/// Scans whole blocks, no prefix among them. `base` is added to the offset that an error reports.
pub(crate) fn check_finite_blocks(encoding: Encoding, blocks: &[u8], base: u64) -> Result<()> {
    let found = match encoding {
        Encoding::F32 => scan::<4, 1>(blocks, [0], |b, at| f32_special(u32_at(b, at))),
        Encoding::F16 => f16_values(blocks),
        Encoding::BF16 => scan::<2, 1>(blocks, [0], |b, at| u16_at(b, at) & 0x7f80 == 0x7f80),
        Encoding::Q4_0 | Encoding::IQ4_NL | Encoding::Q1_0 | Encoding::Q2_0 | Encoding::APR_Q4 => {
            f16s::<18, 1>(blocks, [0])
        }
        Encoding::Q4_1 => f16s::<20, 2>(blocks, [0, 2]),
        Encoding::Q5_0 => f16s::<22, 1>(blocks, [0]),
        Encoding::Q5_1 => f16s::<24, 2>(blocks, [0, 2]),
        Encoding::Q8_0 => f16s::<34, 1>(blocks, [0]),
        Encoding::Q8_1 => f16s::<36, 2>(blocks, [0, 2]),
        Encoding::Q2_K => f16s::<84, 2>(blocks, [80, 82]),
        Encoding::Q3_K => f16s::<110, 1>(blocks, [108]),
        Encoding::Q4_K => f16s::<144, 2>(blocks, [0, 2]),
        Encoding::Q5_K => f16s::<176, 2>(blocks, [0, 2]),
        Encoding::Q6_K => f16s::<210, 1>(blocks, [208]),
        Encoding::Q8_K => scan::<292, 1>(blocks, [0], |b, at| f32_special(u32_at(b, at))),
        Encoding::IQ2_XXS | Encoding::TQ2_0 => {
            f16s::<66, 1>(blocks, [if encoding == Encoding::TQ2_0 { 64 } else { 0 }])
        }
        Encoding::IQ2_XS => f16s::<74, 1>(blocks, [0]),
        Encoding::IQ2_S => f16s::<82, 1>(blocks, [0]),
        Encoding::IQ3_XXS => f16s::<98, 1>(blocks, [0]),
        Encoding::IQ3_S => f16s::<110, 1>(blocks, [0]),
        Encoding::IQ1_S => f16s::<50, 1>(blocks, [0]),
        Encoding::IQ1_M => scan::<56, 1>(blocks, [48], |b, _| f16_special(iq1_m_d(b))),
        Encoding::IQ4_XS => f16s::<136, 1>(blocks, [0]),
        Encoding::TQ1_0 => f16s::<54, 1>(blocks, [52]),
        Encoding::MXFP4 => scan::<17, 1>(blocks, [0], |b, at| b[at] == 255),
        Encoding::NVFP4 | Encoding::APR_Q8 => None,
        _ => {
            debug_assert_eq!(encoding.kind(), EncodingKind::Other);
            return Err(Error::NotDecodable { encoding });
        }
    };
    match found {
        None => Ok(()),
        Some(offset) => Err(Error::NonFinite {
            encoding,
            offset: base + offset,
        }),
    }
}

#[inline]
fn f16_special(bits: u16) -> bool {
    bits & 0x7c00 == 0x7c00
}

#[inline]
fn f32_special(bits: u32) -> bool {
    bits & 0x7f80_0000 == 0x7f80_0000
}

fn f16s<const B: usize, const N: usize>(blocks: &[u8], offsets: [usize; N]) -> Option<u64> {
    scan::<B, N>(blocks, offsets, |block, at| f16_special(u16_at(block, at)))
}

/// As `f16s::<2, 1>(values, [0])`, by the largest magnitude of each group: that compiles to SIMD code, whereas a test for
/// equality is narrowed to every other byte.
fn f16_values(values: &[u8]) -> Option<u64> {
    let largest = |group: &[u8]| {
        let magnitudes = group
            .as_chunks()
            .0
            .iter()
            .map(|x| i16::from_le_bytes(*x) & 0x7fff);
        magnitudes.fold(0, i16::max)
    };
    let mut groups = values.chunks(2 * GROUP).enumerate();
    let (g, group) = groups.find(|(_, group)| largest(group) >= 0x7c00)?;
    Some((g * 2 * GROUP) as u64 + f16s::<2, 1>(group, [0])?)
}

/// Blocks that are looked at without a branch; a hit is located afterwards.
const GROUP: usize = 256;

/// The offset of the first place, among `offsets` of each block of `B` bytes, that is `refused`.
#[inline]
fn scan<const B: usize, const N: usize>(
    blocks: &[u8],
    offsets: [usize; N],
    refused: impl Fn(&[u8; B], usize) -> bool,
) -> Option<u64> {
    for (g, group) in blocks.as_chunks::<B>().0.chunks(GROUP).enumerate() {
        let mut any = false;
        for block in group {
            for at in offsets {
                any |= refused(block, at);
            }
        }
        if any {
            let (i, at) = group
                .iter()
                .enumerate()
                .flat_map(|(i, block)| offsets.map(|at| (i, at, refused(block, at))))
                .find_map(|(i, at, hit)| hit.then_some((i, at)))?;
            return Some(((g * GROUP + i) * B + at) as u64);
        }
    }
    None
}
