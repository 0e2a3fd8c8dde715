//! IQ1, IQ2 and IQ3: weights by eights or fours from a grid.

use super::{BadScale, Group, Scale, bits, groups_of, u16_at, u32_at};

type Groups = Result<Vec<Group>, BadScale>;

/// The grids: each entry is 16 bits, 8 fields of 2 bits or 4 of 4 bits, the first lowest; written by
/// `scripts/oracle/grids.py` from the Python package `gguf`.
const ENTRIES: &[u8; 2 * (256 + 512 + 1024 + 256 + 512 + 2048)] = include_bytes!("grids.bin");

struct Grid {
    /// Number of the first entry.
    start: usize,
    levels: &'static [i64],
}

const IQ2_LEVELS: &[i64] = &[8, 25, 43];
const IQ2_XXS: Grid = Grid {
    start: 0,
    levels: IQ2_LEVELS,
};
const IQ2_XS: Grid = Grid {
    start: 256,
    levels: IQ2_LEVELS,
};
const IQ2_S: Grid = Grid {
    start: 768,
    levels: IQ2_LEVELS,
};
const IQ3_XXS: Grid = Grid {
    start: 1792,
    levels: &[4, 12, 20, 28, 36, 44, 52, 62],
};
const IQ3_S: Grid = Grid {
    start: 2048,
    levels: &[1, 3, 5, 7, 9, 11, 13, 15],
};
const IQ1: Grid = Grid {
    start: 2560,
    levels: &[-1, 0, 1],
};

impl Grid {
    /// Entry `index`: 8 weights where fields are 2 bits wide, 4 where they are 4.
    fn entry(&self, index: usize) -> Vec<i64> {
        let width = if self.levels.len() == 3 { 2 } else { 4 };
        let word = u16_at(ENTRIES, 2 * (self.start + index));
        (0..16 / width)
            .map(|i| self.levels[usize::from(word >> (width * i) & ((1 << width) - 1))])
            .collect()
    }
}

/// Eight sign bits from seven: the eighth makes their number even.
fn even_signs(seven: u32) -> u8 {
    let seven = (seven & 0x7f) as u8;
    seven | ((seven.count_ones() % 2) as u8) << 7
}

/// Negates each weight whose bit of `signs` is set.
fn signed(weights: Vec<i64>, signs: u8) -> Vec<i64> {
    weights
        .into_iter()
        .enumerate()
        .map(|(i, w)| if signs >> i & 1 == 1 { -w } else { w })
        .collect()
}

/// Two entries of four as one of eight.
fn pair(grid: &Grid, first: usize, second: usize) -> Vec<i64> {
    let mut eight = grid.entry(first);
    eight.extend(grid.entry(second));
    eight
}

fn odd(scale: i64) -> i64 {
    1 + 2 * scale
}

/// f16 d; for each 32: four grid indices of 8 bits, then four signs of 7 bits and a scale of 4.
pub(super) fn iq2_xxs(b: &[u8]) -> Groups {
    let mut w = Vec::new();
    let mut sub_scales = Vec::new();
    for j in 0..8 {
        let at = 2 + 8 * j;
        let word = u32_at(b, at + 4);
        for l in 0..4 {
            let eight = IQ2_XXS.entry(b[at + l].into());
            w.extend(signed(eight, even_signs(word >> (7 * l))));
        }
        sub_scales.push(odd((word >> 28).into()));
    }
    Ok(groups_of(&w, Scale::f16(b, 0)?, &sub_scales, None))
}

/// f16 d; qs[32] of 16 bits (9 of index, 7 of signs); scales[8], a nibble for each 16 weights.
pub(super) fn iq2_xs(b: &[u8]) -> Groups {
    let mut w = Vec::new();
    for i in 0..32 {
        let word = u16_at(b, 2 + 2 * i);
        let eight = IQ2_XS.entry((word & 511).into());
        w.extend(signed(eight, even_signs((word >> 9).into())));
    }
    let sub_scales = nibble_scales(&b[66..74]);
    Ok(groups_of(&w, Scale::f16(b, 0)?, &sub_scales, None))
}

fn nibble_scales(scales: &[u8]) -> Vec<i64> {
    scales
        .iter()
        .flat_map(|s| [odd(bits(*s, 0, 4)), odd(bits(*s, 4, 4))])
        .collect()
}

/// f16 d; qs[32], signs[32], qh[8] (2 high bits of each index), scales[8], a nibble for each 16 weights.
pub(super) fn iq2_s(b: &[u8]) -> Groups {
    let (qs, signs, qh) = (&b[2..34], &b[34..66], &b[66..74]);
    let mut w = Vec::new();
    for i in 0..32 {
        let index = usize::from(qs[i]) | (bits(qh[i / 4], 2 * (i % 4), 2) as usize) << 8;
        w.extend(signed(IQ2_S.entry(index), signs[i]));
    }
    let sub_scales = nibble_scales(&b[74..82]);
    Ok(groups_of(&w, Scale::f16(b, 0)?, &sub_scales, None))
}

/// f16 d; qs[64], an index for each four weights; for each 32: four signs of 7 bits and a scale of 4.
pub(super) fn iq3_xxs(b: &[u8]) -> Groups {
    let qs = &b[2..66];
    let mut w = Vec::new();
    let mut sub_scales = Vec::new();
    for j in 0..8 {
        let word = u32_at(b, 66 + 4 * j);
        for l in 0..4 {
            let at = 8 * j + 2 * l;
            let eight = pair(&IQ3_XXS, qs[at].into(), qs[at + 1].into());
            w.extend(signed(eight, even_signs(word >> (7 * l))));
        }
        sub_scales.push(odd((word >> 28).into()));
    }
    Ok(groups_of(&w, Scale::f16(b, 0)?, &sub_scales, None))
}

/// f16 d; qs[64], qh[8] (the high bit of each index), signs[32], scales[4], a nibble for each 32 weights.
pub(super) fn iq3_s(b: &[u8]) -> Groups {
    let (qs, qh, signs) = (&b[2..66], &b[66..74], &b[74..106]);
    let index = |i: usize| usize::from(qs[i]) | (bits(qh[i / 8], i % 8, 1) as usize) << 8;
    let mut w = Vec::new();
    for (i, signs) in signs.iter().enumerate() {
        w.extend(signed(pair(&IQ3_S, index(2 * i), index(2 * i + 1)), *signs));
    }
    let sub_scales = nibble_scales(&b[106..110]);
    Ok(groups_of(&w, Scale::f16(b, 0)?, &sub_scales, None))
}

/// `8 · grid ± 1`: the grid's value and an eighth, in eighths.
fn with_delta(eight: Vec<i64>, negative: bool) -> Vec<i64> {
    let delta = if negative { -1 } else { 1 };
    eight.into_iter().map(|g| 8 * g + delta).collect()
}

/// f16 d; qs[32]; qh[8] of 16 bits: four times 3 high bits of an index, 3 bits of scale, the sign of the delta.
pub(super) fn iq1_s(b: &[u8]) -> Groups {
    let mut w = Vec::new();
    let mut sub_scales = Vec::new();
    for j in 0..8 {
        let qh = u16_at(b, 34 + 2 * j);
        for l in 0..4 {
            let index = usize::from(b[2 + 4 * j + l]) | usize::from(qh >> (3 * l) & 7) << 8;
            w.extend(with_delta(IQ1.entry(index), qh >> 15 == 1));
        }
        sub_scales.push(odd((qh >> 12 & 7).into()));
    }
    Ok(groups_of(&w, Scale::f16(b, 0)?, &sub_scales, None))
}

/// qs[32]; qh[16], a nibble for each eight: 3 high bits of its index, the sign of its delta; scales[4] of 16 bits: 3 bits
/// for each 16 weights, and a quarter of the f16 d on top.
pub(super) fn iq1_m(b: &[u8]) -> Groups {
    let words: Vec<u16> = (0..4).map(|i| u16_at(b, 48 + 2 * i)).collect();
    let d_bits = (0..4).fold(0, |d, i| d | (words[i] >> 12) << (4 * i));
    let d = Scale::from_f16_bits(d_bits).ok_or(48usize)?;
    let mut w = Vec::new();
    for i in 0..32 {
        let nibble = bits(b[32 + i / 2], 4 * (i % 2), 4) as usize;
        let index = usize::from(b[i]) | (nibble & 7) << 8;
        w.extend(with_delta(IQ1.entry(index), nibble >> 3 == 1));
    }
    let sub_scales: Vec<_> = (0..16)
        .map(|g| odd((words[g / 4] >> (3 * (g % 4)) & 7).into()))
        .collect();
    Ok(groups_of(&w, d, &sub_scales, None))
}
