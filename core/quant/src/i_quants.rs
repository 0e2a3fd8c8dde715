//! Code books: IQ1 … IQ4. Layouts are those of the `block_iq*` structs in ggml; the grids are in `iq_grids.rs`.
//!
//! GGML writes scales as `d · (½ + s) / 4` and the like; here sub-scales are `2s + 1` and the powers of two go into
//! `SHIFT`, so that all are integers. Every product is exact in f32 either way.
#![expect(non_camel_case_types, reason = "encodings are spelled as GGML spells them")]

use crate::codec::{ScaledBlock, SuperBlock, twice, u16_at, u32_at};
use crate::iq_grids;
use crate::k_quants::field;
use crate::scale::Scale;

/// f16 `d`; for each 32 weights four grid indices and a u32 of four 7-bit sign patterns and a 4-bit scale.
pub(crate) struct IQ2_XXS;

/// f16 `d`; for each 8 weights a u16 of a 9-bit grid index and a 7-bit sign pattern; 4-bit scales for 16 weights each.
pub(crate) struct IQ2_XS;

/// f16 `d`; low 8 bits of grid indices for 8 weights each; sign bits; high 2 bits of indices; scales as in IQ2_XS.
pub(crate) struct IQ2_S;

/// f16 `d`; grid indices for 4 weights each; for each 32 weights a u32 as in IQ2_XXS.
pub(crate) struct IQ3_XXS;

/// f16 `d`; low 8 bits of grid indices for 4 weights each; ninth bits; sign bits; 4-bit scales for 32 weights each.
pub(crate) struct IQ3_S;

/// f16 `d`; low 8 bits of grid indices for 8 weights each; for each 32 weights a u16 of four times 3 high bits, a 3-bit
/// scale and the sign of the offset.
pub(crate) struct IQ1_S;

/// Low 8 bits of grid indices for 8 weights each; for each of those a nibble of 3 high bits and the sign of the offset;
/// four u16 of four 3-bit scales, for 16 weights each, with a nibble of the f16 `d` on top.
pub(crate) struct IQ1_M;

/// f16 scale for 32 weights; nibbles as in Q4_0, each an index into a code book of 16 levels.
pub(crate) struct IQ4_NL;

/// f16 `d`; u16 of high bit pairs and 4 bytes of low nibbles of scales for 32 weights each; nibbles as in IQ4_NL.
pub(crate) struct IQ4_XS;

/// `kvalues_iq4nl` of ggml.
const IQ4_LEVELS: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

static IQ2_XXS_GRID: [[i8; 8]; 256] = expand(&iq_grids::IQ2_XXS, &iq_grids::IQ2_XXS_LEVELS);
static IQ2_XS_GRID: [[i8; 8]; 512] = expand(&iq_grids::IQ2_XS, &iq_grids::IQ2_XS_LEVELS);
static IQ2_S_GRID: [[i8; 8]; 1024] = expand(&iq_grids::IQ2_S, &iq_grids::IQ2_S_LEVELS);
static IQ3_XXS_GRID: [[i8; 4]; 256] = expand(&iq_grids::IQ3_XXS, &iq_grids::IQ3_XXS_LEVELS);
static IQ3_S_GRID: [[i8; 4]; 512] = expand(&iq_grids::IQ3_S, &iq_grids::IQ3_S_LEVELS);
static IQ1_GRID: [[i8; 8]; 2048] = expand(&iq_grids::IQ1_S, &iq_grids::IQ1_S_LEVELS);

/// A grid's levels from packed indices: `N` a word, the first in the lowest bits.
const fn expand<const N: usize, const ENTRIES: usize>(
    packed: &[u16; ENTRIES],
    levels: &[i8],
) -> [[i8; N]; ENTRIES] {
    let bits = 16 / N;
    let mut grid = [[0; N]; ENTRIES];
    let mut entry = 0;
    while entry < ENTRIES {
        let mut i = 0;
        while i < N {
            let index = packed[entry] as usize >> (bits * i) & ((1 << bits) - 1);
            grid[entry][i] = levels[index];
            i += 1;
        }
        entry += 1;
    }
    grid
}

/// Eight sign bits from seven: the eighth makes their number even (`ksigns_iq2xs` of ggml).
#[inline]
fn even_signs(seven: u32) -> u8 {
    let seven = (seven & 127) as u8;
    seven | ((seven.count_ones() & 1) << 7) as u8
}

/// For each pattern of sign bits, −1 for set bits and 0 for clear ones.
static SIGN_MASKS: [[i8; 8]; 256] = {
    let mut masks = [[0; 8]; 256];
    let mut signs = 0;
    while signs < 256 {
        let mut i = 0;
        while i < 8 {
            masks[signs][i] = -((signs >> i & 1) as i8);
            i += 1;
        }
        signs += 1;
    }
    masks
};

/// Levels with signs: a set bit negates.
#[inline]
fn signed(levels: [i8; 8], signs: u8) -> [i8; 8] {
    let masks = &SIGN_MASKS[usize::from(signs)];
    // Negation in two's complement. Levels are positive and below 64.
    std::array::from_fn(|i| (levels[i] ^ masks[i]).wrapping_sub(masks[i]))
}

/// Two entries of a grid of four levels each.
#[inline]
fn joined(first: [i8; 4], second: [i8; 4]) -> [i8; 8] {
    std::array::from_fn(|i| if i < 4 { first[i] } else { second[i - 4] })
}

/// `2s + 1` of the 4-bit scale `i` among packed nibbles, low ones first.
#[inline]
fn odd_nibble(bytes: &[u8], i: usize) -> i16 {
    i16::from(bytes[i / 2] >> (4 * (i % 2)) & 15) * 2 + 1
}

/// `2s + 1` of the scale on top of a u32 of sign patterns.
#[inline]
fn odd_top(aux: u32) -> i16 {
    (aux >> 28) as i16 * 2 + 1
}

/// Indices of 16 bytes at `at` into [`IQ4_LEVELS`], low nibbles first.
#[inline]
fn iq4_codes(bytes: &[u8; 16], out: &mut [i8; 32]) {
    for (j, q) in bytes.iter().enumerate() {
        out[j] = IQ4_LEVELS[usize::from(q & 15)];
        out[j + 16] = IQ4_LEVELS[usize::from(q >> 4)];
    }
}

/// `8 · grid ± 1`: GGML's offset of an eighth, times eight.
#[inline]
fn iq1_codes(index: usize, negative: bool, out: &mut [i8; 8]) {
    let offset = if negative { -1 } else { 1 };
    for (level, code) in IQ1_GRID[index & 2047].iter().zip(out) {
        *code = level.wrapping_mul(8).wrapping_add(offset);
    }
}

impl SuperBlock<66> for IQ2_XXS {
    const SHIFT: i16 = -3;
    const HALVES: bool = false;

    #[inline]
    fn d(block: &[u8; 66]) -> u16 {
        u16_at(block, 0)
    }

    #[inline]
    fn subs(block: &[u8; 66]) -> [i16; 16] {
        twice(|j| odd_top(u32_at(block, 2 + 8 * j + 4)))
    }

    #[inline]
    fn codes(block: &[u8; 66], out: &mut [i8; 256]) {
        for (j, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let at = 2 + 8 * j;
            let aux = u32_at(block, at + 4);
            for (l, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let levels = IQ2_XXS_GRID[usize::from(block[at + l])];
                *out = signed(levels, even_signs(aux >> (7 * l)));
            }
        }
    }
}

impl SuperBlock<74> for IQ2_XS {
    const SHIFT: i16 = -3;
    const HALVES: bool = true;

    #[inline]
    fn d(block: &[u8; 74]) -> u16 {
        u16_at(block, 0)
    }

    #[inline]
    fn subs(block: &[u8; 74]) -> [i16; 16] {
        std::array::from_fn(|half| odd_nibble(&block[66..], half))
    }

    #[inline]
    fn codes(block: &[u8; 74], out: &mut [i8; 256]) {
        for (l, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let q = u16_at(block, 2 + 2 * l);
            let levels = IQ2_XS_GRID[usize::from(q & 511)];
            *out = signed(levels, even_signs(u32::from(q >> 9)));
        }
    }
}

impl SuperBlock<82> for IQ2_S {
    const SHIFT: i16 = -3;
    const HALVES: bool = true;

    #[inline]
    fn d(block: &[u8; 82]) -> u16 {
        u16_at(block, 0)
    }

    #[inline]
    fn subs(block: &[u8; 82]) -> [i16; 16] {
        std::array::from_fn(|half| odd_nibble(&block[74..], half))
    }

    #[inline]
    fn codes(block: &[u8; 82], out: &mut [i8; 256]) {
        for (l, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let high = block[66 + l / 4] >> (2 * (l % 4)) & 3;
            let index = usize::from(block[2 + l]) | usize::from(high) << 8;
            *out = signed(IQ2_S_GRID[index], block[34 + l]);
        }
    }
}

impl SuperBlock<98> for IQ3_XXS {
    const SHIFT: i16 = -2;
    const HALVES: bool = false;

    #[inline]
    fn d(block: &[u8; 98]) -> u16 {
        u16_at(block, 0)
    }

    #[inline]
    fn subs(block: &[u8; 98]) -> [i16; 16] {
        twice(|j| odd_top(u32_at(block, 66 + 4 * j)))
    }

    #[inline]
    fn codes(block: &[u8; 98], out: &mut [i8; 256]) {
        for (j, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let aux = u32_at(block, 66 + 4 * j);
            for (l, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let [first, second] = [0, 1].map(|i| IQ3_XXS_GRID[usize::from(block[2 + 8 * j + 2 * l + i])]);
                *out = signed(joined(first, second), even_signs(aux >> (7 * l)));
            }
        }
    }
}

impl SuperBlock<110> for IQ3_S {
    const HALVES: bool = false;

    #[inline]
    fn d(block: &[u8; 110]) -> u16 {
        u16_at(block, 0)
    }

    #[inline]
    fn subs(block: &[u8; 110]) -> [i16; 16] {
        twice(|j| odd_nibble(&block[106..], j))
    }

    #[inline]
    fn codes(block: &[u8; 110], out: &mut [i8; 256]) {
        for (l, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let [first, second] = [2 * l, 2 * l + 1].map(|i| {
                let ninth = block[66 + i / 8] >> (i % 8) & 1;
                IQ3_S_GRID[usize::from(block[2 + i]) | usize::from(ninth) << 8]
            });
            *out = signed(joined(first, second), block[74 + l]);
        }
    }
}

impl SuperBlock<50> for IQ1_S {
    const SHIFT: i16 = -3;
    const HALVES: bool = false;

    #[inline]
    fn d(block: &[u8; 50]) -> u16 {
        u16_at(block, 0)
    }

    #[inline]
    fn subs(block: &[u8; 50]) -> [i16; 16] {
        twice(|j| (u16_at(block, 34 + 2 * j) >> 12 & 7) as i16 * 2 + 1)
    }

    #[inline]
    fn codes(block: &[u8; 50], out: &mut [i8; 256]) {
        for (l, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let qh = u16_at(block, 34 + 2 * (l / 4));
            let index = usize::from(block[2 + l]) | usize::from(qh >> (3 * (l % 4)) & 7) << 8;
            iq1_codes(index, qh & 0x8000 != 0, out);
        }
    }
}

impl SuperBlock<56> for IQ1_M {
    const SHIFT: i16 = -3;
    const HALVES: bool = true;

    #[inline]
    fn d(block: &[u8; 56]) -> u16 {
        iq1_m_d(block)
    }

    #[inline]
    fn subs(block: &[u8; 56]) -> [i16; 16] {
        std::array::from_fn(|half| {
            (u16_at(block, 48 + 2 * (half / 4)) >> (3 * (half % 4)) & 7) as i16 * 2 + 1
        })
    }

    #[inline]
    fn codes(block: &[u8; 56], out: &mut [i8; 256]) {
        for (l, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let qh = block[32 + l / 2] >> (4 * (l % 2)) & 15;
            let index = usize::from(block[l]) | usize::from(qh & 7) << 8;
            iq1_codes(index, qh & 8 != 0, out);
        }
    }
}

/// IQ1_M's `d`: the top nibbles of its last four u16, lowest first.
#[inline]
pub(crate) fn iq1_m_d(block: &[u8; 56]) -> u16 {
    u16_at(block, 48) >> 12
        | u16_at(block, 50) >> 12 << 4
        | u16_at(block, 52) >> 12 << 8
        | u16_at(block, 54) >> 12 << 12
}

impl ScaledBlock<18, 32, 1> for IQ4_NL {
    #[inline]
    fn scales(block: &[u8; 18]) -> [Scale; 1] {
        [Scale::from_f16(u16_at(block, 0))]
    }

    #[inline]
    fn codes(block: &[u8; 18], out: &mut [i8; 32]) {
        iq4_codes(field(block, 2), out);
    }
}

impl SuperBlock<136> for IQ4_XS {
    const HALVES: bool = false;

    #[inline]
    fn d(block: &[u8; 136]) -> u16 {
        u16_at(block, 0)
    }

    #[inline]
    fn subs(block: &[u8; 136]) -> [i16; 16] {
        let high = u16_at(block, 2);
        twice(|j| {
            let low = block[4 + j / 2] >> (4 * (j % 2)) & 15;
            i16::from(low) + ((high >> (2 * j) & 3) << 4) as i16 - 32
        })
    }

    #[inline]
    fn codes(block: &[u8; 136], out: &mut [i8; 256]) {
        for (bytes, out) in block[8..]
            .as_chunks::<16>()
            .0
            .iter()
            .zip(out.as_chunks_mut::<32>().0)
        {
            iq4_codes(bytes, out);
        }
    }
}
