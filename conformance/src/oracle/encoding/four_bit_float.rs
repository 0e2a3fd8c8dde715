//! MXFP4 and NVFP4: E2M1 values, doubled to be integers, under scales that are no f16.

use super::{BadScale, Group, Scale, split_nibble};
use crate::oracle::deviation::by_contract;

type Groups = Result<Vec<Group>, BadScale>;

/// Twice the value of each E2M1 code.
const E2M1: [i64; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

fn group(scale: Scale, nibbles: &[u8]) -> Group {
    Group {
        scale,
        sub_scale: 1,
        min: None,
        w: (0..2 * nibbles.len())
            .map(|i| E2M1[split_nibble(nibbles, i) as usize])
            .collect(),
    }
}

/// An E8M0 scale, 16 bytes of nibbles. Half of `2^(byte − 127)` stands before the doubled values; 255 is NaN.
pub(super) fn mxfp4(b: &[u8]) -> Groups {
    if b[0] == 255 {
        return Err(0);
    }
    Ok(vec![group(Scale::new(1, i32::from(b[0]) - 128), &b[1..17])])
}

/// Four UE4M3 scales, then 8 bytes of nibbles for each 16 weights.
pub(super) fn nvfp4(b: &[u8]) -> Groups {
    Ok((0..4).map(|s| group(ue4m3(b[s]), &b[4 + 8 * s..][..8])).collect())
}

/// Half of a UE4M3 value: exponent bias 7, three bits of fraction; bit 7 is ignored and 0x7F is 0.
fn ue4m3(byte: u8) -> Scale {
    let field = byte >> 3 & 15;
    let fraction = byte & 7;
    let m = match (byte, field) {
        (0x7f, _) => 0,
        (_, 0) => fraction,
        _ => fraction | 8,
    };
    let field = by_contract!(field.max(1), SubnormalScalesOneExponentLow => field);
    Scale::new(m, i32::from(field) - 11)
}
