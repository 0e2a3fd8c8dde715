//! Large code books, whose entries are gathered: IQ3_S, IQ3_XXS, IQ2_S, IQ2_XS, IQ2_XXS and IQ1_S.

use hoist_quant::iq_grids;

use super::codec::{Form, Panelled, nibbles};
use super::lanes::Lanes;
use super::super_blocks::{SuperBlock, each, interleaved, moved, word};

/// Entries of four levels, a byte each.
const fn of_four<const N: usize>(packed: &[u16; N], levels: &[i8; 8]) -> [u32; N] {
    let mut grid = [0; N];
    let mut entry = 0;
    while entry < N {
        let mut i = 0;
        while i < 4 {
            let index = packed[entry] as usize >> (4 * i) & 15;
            grid[entry] |= (levels[index] as u8 as u32) << (8 * i);
            i += 1;
        }
        entry += 1;
    }
    grid
}

/// Entries of eight numbers of levels: the first four in the low nibbles of bytes, the others in the high ones.
const fn of_eight<const N: usize>(packed: &[u16; N]) -> [u32; N] {
    let mut grid = [0; N];
    let mut entry = 0;
    while entry < N {
        let mut i = 0;
        while i < 8 {
            grid[entry] |= (packed[entry] as u32 >> (2 * i) & 3) << (8 * (i % 4) + 4 * (i / 4));
            i += 1;
        }
        entry += 1;
    }
    grid
}

static IQ3_S: [u32; 512] = of_four(&iq_grids::IQ3_S, &iq_grids::IQ3_S_LEVELS);
static IQ3_XXS: [u32; 256] = of_four(&iq_grids::IQ3_XXS, &iq_grids::IQ3_XXS_LEVELS);
static IQ2_S: [u32; 1024] = of_eight(&iq_grids::IQ2_S);
static IQ2_XS: [u32; 512] = of_eight(&iq_grids::IQ2_XS);
static IQ2_XXS: [u32; 256] = of_eight(&iq_grids::IQ2_XXS);
static IQ1_S: [u32; 2048] = of_eight(&iq_grids::IQ1_S);

/// The three levels of a code book of eight numbers an entry.
const fn three_levels(levels: &[i8; 3]) -> [u8; 16] {
    let mut table = [0; 16];
    let mut i = 0;
    while i < 3 {
        table[i] = levels[i] as u8;
        i += 1;
    }
    table
}

/// `8 · grid + 1`, and from the fourth on `8 · grid − 1`.
const IQ1_LEVELS: [u8; 16] = {
    let mut table = [0; 16];
    let mut i = 0;
    while i < 3 {
        let level = 8 * iq_grids::IQ1_S_LEVELS[i];
        table[i] = (level + 1) as u8;
        table[4 + i] = (level - 1) as u8;
        i += 1;
    }
    table
};

const fn form(shift: i32, halves: bool) -> Form {
    Form {
        dots: 0,
        zero: 0,
        halves,
        mins: false,
        sub_scales: true,
        shift,
    }
}

/// Byte `i` of words, with other bits above it.
#[inline(always)]
fn byte<L: Lanes>(l: L, v: L::V, i: usize) -> L::V {
    match i {
        0 => v,
        1 => l.shr::<8>(v),
        2 => l.shr::<16>(v),
        _ => l.shr::<24>(v),
    }
}

/// Byte `i` of words under bits that stand from bit 8 on.
#[inline(always)]
fn index<L: Lanes>(l: L, low: L::V, i: usize, high: L::V) -> L::V {
    l.or(l.and(byte(l, low, i), l.splat(0xff)), high)
}

/// Signs of a block whose sign of each eighth weight makes the number of negative ones even; what stood in those signs'
/// places is dropped.
#[inline(always)]
fn even_signs<L: Lanes>(l: L, signs: L::V) -> L::V {
    let signs = l.and(signs, l.splat(0x55ff_ffff));
    // Of four weights in each bit, then of eight in each odd bit.
    let fours = l.xor(signs, l.shr::<8>(signs));
    let fours = l.xor(fours, l.shr::<16>(fours));
    let eights = l.xor(fours, l.shl::<1>(fours));
    l.or(signs, l.shl::<24>(l.and(eights, l.splat(0xaa))))
}

/// What stands in the places of the signs of each eighth weight, as the lowest four bits.
#[inline(always)]
fn fourth_bits<L: Lanes>(l: L, signs: L::V) -> L::V {
    let bits = l.and(l.shr::<25>(signs), l.splat(0x55));
    let bits = l.and(l.or(bits, l.shr::<1>(bits)), l.splat(0x33));
    l.and(l.or(bits, l.shr::<2>(bits)), l.splat(0x0f))
}

/// `2s + 1` of bytes below 128.
#[inline(always)]
fn odd<L: Lanes>(l: L, s: L::V) -> L::V {
    l.or(l.shl::<1>(s), l.splat(0x0101_0101))
}

/// Sub-scales of four bits on top of the words of signs of blocks `4i …`.
#[inline(always)]
fn top_sub_scales<L: Lanes>(l: L, signs: &[u8], step: usize, i: usize) -> L::V {
    let s: [L::V; 4] = each!(l, j => fourth_bits(l, word(l, signs, step * (4 * i + j) + step - 1)));
    let low = l.or(s[0], l.shl::<8>(s[1]));
    let high = l.or(l.shl::<16>(s[2]), l.shl::<24>(s[3]));
    odd(l, l.or(low, high))
}

/// Words of four entries of eight weights each as their levels, with signs if there are any.
#[inline(always)]
fn eights<L: Lanes>(l: L, entries: [L::V; 4], levels: &[u8; 16], signs: Option<L::V>) -> [L::V; 8] {
    let table = l.table(levels);
    let mut w = [l.splat(0); 8];
    for (i, entry) in entries.into_iter().enumerate() {
        let (low, high) = nibbles(l, entry);
        for (half, codes) in [low, high].into_iter().enumerate() {
            let levels = l.look_up(table, codes);
            w[2 * i + half] = match signs {
                Some(signs) => l.flip(levels, moved(l, signs, (2 * i + half) as isize - 7)),
                None => levels,
            };
        }
    }
    w
}

/// `d`, low index bytes of four weights each, ninth bits, signs, nibbles of sub-scales.
pub(super) struct Iq3S;

impl Panelled for Iq3S {
    const FORM: Form = form(0, false);
}

impl SuperBlock for Iq3S {
    const SIGNED: bool = false;
    const D: usize = 0;

    #[inline(always)]
    fn weights<L: Lanes, const B: usize>(l: L, unit: &[u8]) -> [L::V; 8] {
        let unit = &unit[2 * L::ROWS..];
        let ninths = byte(l, word(l, unit, 16 + B / 4), B % 4);
        let signs = word(l, unit, 18 + B);
        each!(l, g => {
            let ninth = l.and(moved(l, ninths, g as isize - 8), l.splat(0x100));
            let at = index(l, word(l, unit, 2 * B + g / 4), g % 4, ninth);
            l.flip(l.gather(&IQ3_S, at), moved(l, signs, g as isize - 7))
        })
    }

    #[inline(always)]
    fn sub_scales<L: Lanes>(l: L, unit: &[u8]) -> [L::V; 4] {
        let (even, high) = nibbles(l, word(l, &unit[106 * L::ROWS..], 0));
        interleaved(l, odd(l, even), odd(l, high))
    }
}

/// `d`, index bytes of four weights each, signs under sub-scales.
pub(super) struct Iq3Xxs;

impl Panelled for Iq3Xxs {
    const FORM: Form = form(-2, false);
}

impl SuperBlock for Iq3Xxs {
    const SIGNED: bool = false;
    const D: usize = 0;

    #[inline(always)]
    fn weights<L: Lanes, const B: usize>(l: L, unit: &[u8]) -> [L::V; 8] {
        let unit = &unit[2 * L::ROWS..];
        let signs = even_signs(l, word(l, unit, 16 + B));
        each!(l, g => {
            let at = byte(l, word(l, unit, 2 * B + g / 4), g % 4);
            l.flip(l.gather(&IQ3_XXS, at), moved(l, signs, g as isize - 7))
        })
    }

    #[inline(always)]
    fn sub_scales<L: Lanes>(l: L, unit: &[u8]) -> [L::V; 4] {
        let signs = &unit[66 * L::ROWS..];
        let (low, high) = (top_sub_scales(l, signs, 1, 0), top_sub_scales(l, signs, 1, 1));
        [low, high, low, high]
    }
}

/// Nibbles of sub-scales of half blocks, in eight bytes.
#[inline(always)]
fn half_sub_scales<L: Lanes>(l: L, packed: &[u8]) -> [L::V; 4] {
    let mut subs = [l.splat(0); 4];
    for i in 0..2 {
        let (even, high) = nibbles(l, word(l, packed, i));
        let words = interleaved(l, odd(l, even), odd(l, high));
        subs[2 * i] = words[0];
        subs[2 * i + 1] = words[1];
    }
    subs
}

/// `d`, low index bytes of eight weights each, signs, pairs of high bits, nibbles of sub-scales.
pub(super) struct Iq2S;

impl Panelled for Iq2S {
    const FORM: Form = form(-3, true);
}

impl SuperBlock for Iq2S {
    const SIGNED: bool = false;
    const D: usize = 0;

    #[inline(always)]
    fn weights<L: Lanes, const B: usize>(l: L, unit: &[u8]) -> [L::V; 8] {
        let unit = &unit[2 * L::ROWS..];
        let low = word(l, unit, B);
        let pairs = byte(l, word(l, unit, 16 + B / 4), B % 4);
        let entries: [L::V; 4] = each!(l, i => {
            let high = l.and(moved(l, pairs, 2 * i as isize - 8), l.splat(0x300));
            l.gather(&IQ2_S, index(l, low, i, high))
        });
        let levels = const { &three_levels(&iq_grids::IQ2_S_LEVELS) };
        eights(l, entries, levels, Some(word(l, unit, 8 + B)))
    }

    #[inline(always)]
    fn sub_scales<L: Lanes>(l: L, unit: &[u8]) -> [L::V; 4] {
        half_sub_scales(l, &unit[74 * L::ROWS..])
    }
}

/// `d`, of each block low index bytes of eight weights each and signs under ninth bits, nibbles of sub-scales.
pub(super) struct Iq2Xs;

impl Panelled for Iq2Xs {
    const FORM: Form = form(-3, true);
}

impl SuperBlock for Iq2Xs {
    const SIGNED: bool = false;
    const D: usize = 0;

    #[inline(always)]
    fn weights<L: Lanes, const B: usize>(l: L, unit: &[u8]) -> [L::V; 8] {
        let unit = &unit[2 * L::ROWS..];
        let (low, signs) = (word(l, unit, 2 * B), word(l, unit, 2 * B + 1));
        let ninths = fourth_bits(l, signs);
        let entries: [L::V; 4] = each!(l, i => {
            let ninth = l.and(moved(l, ninths, i as isize - 8), l.splat(0x100));
            l.gather(&IQ2_XS, index(l, low, i, ninth))
        });
        let levels = const { &three_levels(&iq_grids::IQ2_XS_LEVELS) };
        eights(l, entries, levels, Some(even_signs(l, signs)))
    }

    #[inline(always)]
    fn sub_scales<L: Lanes>(l: L, unit: &[u8]) -> [L::V; 4] {
        half_sub_scales(l, &unit[66 * L::ROWS..])
    }
}

/// `d`, of each block index bytes of eight weights each and signs under its sub-scale.
pub(super) struct Iq2Xxs;

impl Panelled for Iq2Xxs {
    const FORM: Form = form(-3, false);
}

impl SuperBlock for Iq2Xxs {
    const SIGNED: bool = false;
    const D: usize = 0;

    #[inline(always)]
    fn weights<L: Lanes, const B: usize>(l: L, unit: &[u8]) -> [L::V; 8] {
        let unit = &unit[2 * L::ROWS..];
        let low = word(l, unit, 2 * B);
        let entries: [L::V; 4] = each!(l, i => {
            l.gather(&IQ2_XXS, byte(l, low, i))
        });
        let levels = const { &three_levels(&iq_grids::IQ2_XXS_LEVELS) };
        eights(l, entries, levels, Some(even_signs(l, word(l, unit, 2 * B + 1))))
    }

    #[inline(always)]
    fn sub_scales<L: Lanes>(l: L, unit: &[u8]) -> [L::V; 4] {
        let blocks = &unit[2 * L::ROWS..];
        let (low, high) = (top_sub_scales(l, blocks, 2, 0), top_sub_scales(l, blocks, 2, 1));
        [low, high, low, high]
    }
}

/// `d`, low index bytes of eight weights each, sixteen bits for each block: four times three high bits, a sub-scale, the
/// offset's sign.
pub(super) struct Iq1S;

impl Iq1S {
    /// The sixteen bits of block `b`, perhaps with others above them.
    #[inline(always)]
    fn high<L: Lanes>(l: L, unit: &[u8], b: usize) -> L::V {
        byte(l, word(l, &unit[34 * L::ROWS..], b / 2), 2 * (b % 2))
    }
}

impl Panelled for Iq1S {
    const FORM: Form = form(-3, false);
}

impl SuperBlock for Iq1S {
    const SIGNED: bool = false;
    const D: usize = 0;

    #[inline(always)]
    fn weights<L: Lanes, const B: usize>(l: L, unit: &[u8]) -> [L::V; 8] {
        let low = word(l, &unit[2 * L::ROWS..], B);
        let bits = Self::high(l, unit, B);
        // Levels with the other offset are four further.
        let negative = l.and(l.shr::<15>(bits), l.splat(1));
        let offset = l.and(l.sub(l.splat(0), negative), l.splat(0x4444_4444));
        let entries: [L::V; 4] = each!(l, i => {
            let high = l.and(moved(l, bits, 3 * i as isize - 8), l.splat(0x700));
            l.or(l.gather(&IQ1_S, index(l, low, i, high)), offset)
        });
        eights(l, entries, &IQ1_LEVELS, None)
    }

    #[inline(always)]
    fn sub_scales<L: Lanes>(l: L, unit: &[u8]) -> [L::V; 4] {
        let mut words = [l.splat(0); 4];
        for b in 0..8 {
            let s = l.and(l.shr::<12>(Self::high(l, unit, b)), l.splat(7));
            let placed = match b % 4 {
                0 => s,
                1 => l.shl::<8>(s),
                2 => l.shl::<16>(s),
                _ => l.shl::<24>(s),
            };
            words[b / 4] = l.or(words[b / 4], placed);
        }
        each!(l, i => odd(l, words[i]))
    }
}
