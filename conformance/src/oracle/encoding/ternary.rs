//! TQ1_0 and TQ2_0: one f16 scale for 256 weights, read as `m · 2^8` with eight bits of exponent taken off.

use super::k_quant::two_bits;
use super::{BadScale, Group, Scale, groups_of};

type Groups = Result<Vec<Group>, BadScale>;

const SUB_SCALES: [i64; 8] = [1 << 8; 8];

/// Ternary digit `n` of a byte that holds its digits as a fraction of 256, the first digit highest.
fn trit(byte: u8, n: usize) -> i64 {
    let shifted = byte.wrapping_mul([1, 3, 9, 27, 81][n]);
    i64::from((u16::from(shifted) * 3) >> 8)
}

/// qs[48] (32 bytes, then 16 bytes, five digits each), qh[4] (four digits each), f16 d.
pub(super) fn tq1_0(b: &[u8]) -> Groups {
    let w: Vec<_> = (0..256)
        .map(|i| {
            let (at, width, bytes) = match i {
                0..160 => (i, 32, &b[..32]),
                160..240 => (i - 160, 16, &b[32..48]),
                _ => (i - 240, 4, &b[48..52]),
            };
            trit(bytes[at % width], at / width) - 1
        })
        .collect();
    Ok(groups_of(&w, Scale::f16(b, 52)?, &SUB_SCALES, None))
}

/// qs[64] of 2-bit codes, f16 d; value `(code − 1) · d`.
pub(super) fn tq2_0(b: &[u8]) -> Groups {
    let w: Vec<_> = (0..256).map(|i| two_bits(&b[..64], i) - 1).collect();
    Ok(groups_of(&w, Scale::f16(b, 64)?, &SUB_SCALES, None))
}
