//! The file formats' blocks, taken apart into integers. One file for each family.
//!
//! Facts: the `block_*` structs and `dequantize_row_*` of GGML, and the Python package `gguf`.

mod four_bit_float;
mod grid;
mod k_quant;
mod per_block;
mod ternary;

use hoist_backend::Encoding;

use super::arithmetic::{f16_to_f32, round_to_f32};
use super::deviation::by_contract;

/// A scale as the file holds it: `m · 2^e`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale {
    pub(super) m: i64,
    pub(super) e: i32,
    /// The same as f32, which keeps the sign of a zero.
    pub(super) value: f32,
}

/// Byte within a row at which a scale is NaN or infinite.
pub(super) type BadScale = usize;

impl Scale {
    /// The f16 at `block[at..at + 2]`.
    fn f16(block: &[u8], at: usize) -> Result<Self, BadScale> {
        Self::from_f16_bits(u16_at(block, at)).ok_or(at)
    }

    /// `|m| < 2^11`, `e = max(E, 1) − 25`: subnormals are not normalised. `None` for exponent field 31.
    fn from_f16_bits(bits: u16) -> Option<Self> {
        let field = i32::from(bits >> 10 & 0x1f);
        if field == 31 {
            return None;
        }
        let fraction = i64::from(bits & 0x3ff);
        let magnitude = if field == 0 { fraction } else { fraction | 1 << 10 };
        let m = if bits >> 15 == 1 { -magnitude } else { magnitude };
        let e = by_contract!(field.max(1), SubnormalScalesOneExponentLow => field) - 25;
        let value = f16_to_f32(bits);
        let normalised = || {
            let up = if m == 0 {
                0
            } else {
                m.unsigned_abs().leading_zeros() as i32 - 53
            };
            Self {
                m: m << up,
                e: e - up,
                value,
            }
        };
        Some(by_contract!(Self { m, e, value }, SubnormalScalesNormalised => normalised()))
    }

    /// A positive scale that is no f16.
    fn new(m: u8, e: i32) -> Self {
        Self {
            m: m.into(),
            e,
            value: round_to_f32(false, m.into(), e),
        }
    }
}

/// A min: subtracted times its integer in super-blocks, added as it is in Q4_1 and Q5_1.
#[derive(Clone, Debug)]
pub(super) struct Min {
    pub(super) scale: Scale,
    pub(super) sub_min: i64,
}

/// 16 or 32 weights with one scale.
#[derive(Clone, Debug)]
pub(super) struct Group {
    pub(super) scale: Scale,
    pub(super) sub_scale: i64,
    pub(super) min: Option<Min>,
    pub(super) w: Vec<i64>,
}

/// How a family's scales become `c_j`, `k_j`, `e`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// `c = m · sub_scale`, `e = e_d + shift`.
    SuperBlock { shift: i32 },
    /// Scales aligned to the segment's largest exponent.
    Aligned,
    /// APR Q8: `c = 1`, `e = 0`.
    PerMatrix,
}

type DecodeBlock = fn(&[u8]) -> Result<Vec<Group>, BadScale>;

/// A row's bytes as groups, in order. The caller has checked that the row is whole blocks.
pub(super) fn decode_row(encoding: Encoding, row: &[u8]) -> Result<(Reading, Vec<Group>), BadScale> {
    use Encoding::*;
    let super_block = |shift| Reading::SuperBlock { shift };
    let (reading, decode): (_, DecodeBlock) = match encoding {
        Q4_0 => (Reading::Aligned, per_block::q4_0),
        Q4_1 => (Reading::Aligned, per_block::q4_1),
        Q5_0 => (Reading::Aligned, per_block::q5_0),
        Q5_1 => (Reading::Aligned, per_block::q5_1),
        Q8_0 => (Reading::Aligned, per_block::q8_0),
        Q1_0 => (Reading::Aligned, per_block::q1_0),
        Q2_0 => (Reading::Aligned, per_block::q2_0),
        IQ4_NL => (Reading::Aligned, per_block::iq4_nl),
        APR_Q4 => (Reading::Aligned, per_block::apr_q4),
        MXFP4 => (Reading::Aligned, four_bit_float::mxfp4),
        NVFP4 => (Reading::Aligned, four_bit_float::nvfp4),
        Q2_K => (super_block(0), k_quant::q2_k),
        Q3_K => (super_block(0), k_quant::q3_k),
        Q4_K => (super_block(0), k_quant::q4_k),
        Q5_K => (super_block(0), k_quant::q5_k),
        Q6_K => (super_block(0), k_quant::q6_k),
        IQ4_XS => (super_block(0), k_quant::iq4_xs),
        IQ3_S => (super_block(0), grid::iq3_s),
        IQ3_XXS => (super_block(-2), grid::iq3_xxs),
        IQ2_XXS => (super_block(-3), grid::iq2_xxs),
        IQ2_XS => (super_block(-3), grid::iq2_xs),
        IQ2_S => (super_block(-3), grid::iq2_s),
        IQ1_S => (super_block(-3), grid::iq1_s),
        IQ1_M => (super_block(-3), grid::iq1_m),
        TQ1_0 => (super_block(-8), ternary::tq1_0),
        TQ2_0 => (super_block(-8), ternary::tq2_0),
        // APR Q8, the only weight quantisation that is left: a row of i8.
        _ => return Ok((Reading::PerMatrix, per_block::apr_q8_row(row))),
    };
    let mut groups = Vec::new();
    for (i, block) in row.chunks(encoding.block_bytes() as usize).enumerate() {
        let start = i * encoding.block_bytes() as usize;
        groups.extend(decode(block).map_err(|at| start + at)?);
    }
    Ok((reading, groups))
}

/// Sixteen code-book values shared by IQ4_NL and IQ4_XS.
const IQ4_CODE_BOOK: [i64; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Nibble `i` of bytes whose low nibbles come first as a run, then the high ones.
fn split_nibble(bytes: &[u8], i: usize) -> i64 {
    let n = bytes.len();
    i64::from(if i < n { bytes[i] & 15 } else { bytes[i - n] >> 4 })
}

/// Bits `width` wide at `bit` of a byte.
fn bits(byte: u8, bit: usize, width: u32) -> i64 {
    i64::from(byte >> bit & ((1 << width) - 1))
}

/// The groups of a super-block: consecutive runs of equal length with a sub-scale each, and a sub-min each if there is a
/// `dmin`.
fn groups_of(w: &[i64], d: Scale, sub_scales: &[i64], mins: Option<(Scale, &[i64])>) -> Vec<Group> {
    w.chunks(w.len() / sub_scales.len())
        .enumerate()
        .map(|(g, w)| Group {
            scale: d,
            sub_scale: sub_scales[g],
            min: mins.map(|(scale, sub_mins)| Min {
                scale,
                sub_min: sub_mins[g],
            }),
            w: w.to_vec(),
        })
        .collect()
}
