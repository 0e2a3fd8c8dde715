//! Super-blocks by their parts: Q2_K, Q3_K and IQ4_XS, each a description from which the product with one token and the
//! panel for several both follow.

use std::marker::PhantomData;

use super::activations::{BLOCKS, Segment};
use super::codec::{Codec, Form, Panelled, Powers, Product, nibbles};
use super::lanes::Lanes;
use super::panel::Panel;

/// Where in a packed super-block of `r` rows things are, and how they become integers.
pub(super) trait SuperBlock: Panelled {
    /// Whether sub-scales are signed bytes.
    const SIGNED: bool;
    /// Bytes of a row's block in front of `d`.
    const D: usize;

    /// Weights of block `B`, four in each word; bytes as [`Form`] says.
    fn weights<L: Lanes, const B: usize>(l: L, unit: &[u8]) -> [L::V; 8];

    /// Sub-scales of half blocks `4i …`, or of blocks, a byte each.
    fn sub_scales<L: Lanes>(l: L, unit: &[u8]) -> [L::V; 4];

    /// Mins of half blocks, likewise; `dmin` follows `d`.
    fn mins<L: Lanes>(l: L, _unit: &[u8]) -> [L::V; 4] {
        [l.splat(0); 4]
    }
}

/// A [`SuperBlock`] as a codec.
pub(super) struct Super<C>(PhantomData<C>);

/// Evaluates an expression for every block `B` of a segment.
macro_rules! each_block {
    ($b:ident => $body:expr) => {{
        macro_rules! block {
            ($number:literal) => {{
                const $b: usize = $number;
                $body
            }};
        }
        block!(0);
        block!(1);
        block!(2);
        block!(3);
        block!(4);
        block!(5);
        block!(6);
        block!(7);
    }};
}
pub(super) use each_block;

/// An array of vectors, each an expression of its place. No closure: those would not take on their caller's instructions.
macro_rules! each {
    ($l:ident, $i:ident => $body:expr) => {{
        let mut all = [$l.splat(0); _];
        for ($i, v) in all.iter_mut().enumerate() {
            *v = $body;
        }
        all
    }};
}
pub(super) use each;

/// Word `i` of a packed field.
#[inline(always)]
pub(super) fn word<L: Lanes>(l: L, field: &[u8], i: usize) -> L::V {
    let n = 4 * L::ROWS;
    l.load(&field[n * i..n * (i + 1)])
}

/// `v` moved to the right by `n` bits, or to the left by `−n`.
#[inline(always)]
pub(super) fn moved<L: Lanes>(l: L, v: L::V, n: isize) -> L::V {
    match n {
        -8 => l.shl::<8>(v),
        -7 => l.shl::<7>(v),
        -6 => l.shl::<6>(v),
        -5 => l.shl::<5>(v),
        -4 => l.shl::<4>(v),
        -3 => l.shl::<3>(v),
        -2 => l.shl::<2>(v),
        -1 => l.shl::<1>(v),
        1 => l.shr::<1>(v),
        2 => l.shr::<2>(v),
        3 => l.shr::<3>(v),
        4 => l.shr::<4>(v),
        5 => l.shr::<5>(v),
        6 => l.shr::<6>(v),
        _ => v,
    }
}

/// The sub-scale of part `part`, ready for [`Lanes::times`].
#[inline(always)]
fn sub_scale<L: Lanes, C: SuperBlock>(l: L, subs: &[L::V; 4], part: usize) -> L::V {
    let word = subs[part / 4];
    match (C::SIGNED, part % 4) {
        (false, 0) => l.sub_scale::<0>(word),
        (false, 1) => l.sub_scale::<1>(word),
        (false, 2) => l.sub_scale::<2>(word),
        (false, _) => l.sub_scale::<3>(word),
        (true, 0) => l.signed_sub_scale::<0>(word),
        (true, 1) => l.signed_sub_scale::<1>(word),
        (true, 2) => l.signed_sub_scale::<2>(word),
        (true, _) => l.signed_sub_scale::<3>(word),
    }
}

/// The bytes of the two half blocks of block `j`.
#[inline(always)]
fn pair<L: Lanes>(l: L, signed: bool, bytes: &[L::V; 4], j: usize) -> L::V {
    let word = bytes[j / 2];
    match (signed, j % 2) {
        (false, 0) => l.pair::<0>(word),
        (false, _) => l.pair::<2>(word),
        (true, 0) => l.signed_pair::<0>(word),
        (true, _) => l.signed_pair::<2>(word),
    }
}

/// Sum over half blocks of a byte times `u · s`.
#[inline(always)]
fn times_sums<L: Lanes>(l: L, signed: bool, bytes: &[L::V; 4], x: &Segment) -> L::V {
    let mut sum = l.splat(0);
    for (j, us) in x.us_halves.iter().enumerate() {
        sum = l.add(sum, l.madd16(pair(l, signed, bytes, j), l.splat(*us)));
    }
    sum
}

/// Block `B`'s dots times their sub-scales and `u`.
#[inline(always)]
fn block_dot<L: Lanes, C: SuperBlock, const B: usize>(
    l: L,
    unit: &[u8],
    subs: &[L::V; 4],
    x: &Segment,
) -> L::V {
    let form = C::FORM;
    let w = C::weights::<L, B>(l, unit);
    let q = &x.q.as_chunks::<8>().0[B];
    let parts = 8 / form.quads();
    let mut sum = l.splat(0);
    for part in 0..parts {
        let acc = form.dots(l, &w, q, part);
        let part = parts * B + part;
        let sub = sub_scale::<L, C>(l, subs, part);
        let u = x.u_twice[B];
        let dot = if form.dots == 0 {
            l.dot_signed_scaled(acc.0, sub, u, x.us(form.halves, part))
        } else {
            form.end(l, acc, l.times(sub, u))
        };
        sum = l.add(sum, dot);
    }
    sum
}

impl<C: SuperBlock> Super<C> {
    /// `m` of `d`, or of `dmin`.
    #[inline(always)]
    fn m<L: Lanes>(l: L, unit: &[u8], power: L::F, min: usize) -> L::V {
        let at = L::ROWS * (C::D + 2 * min);
        l.mul_floor(l.load_f16(&unit[at..at + 2 * L::ROWS]), power)
    }
}

impl<C: SuperBlock> Panelled for Super<C> {
    const FORM: Form = C::FORM;
}

impl<C: SuperBlock> Codec for Super<C> {
    #[inline(always)]
    fn product<L: Lanes>(l: L, unit: &[u8], x: &Segment, powers: Powers<L>) -> Product<L::V> {
        let form = C::FORM;
        let subs = C::sub_scales(l, unit);
        let mut sum = l.splat(0);
        each_block!(B => sum = l.add(sum, block_dot::<L, C, B>(l, unit, &subs, x)));
        if form.zero != 0 {
            sum = l.sub(sum, form.times_zero(l, times_sums(l, C::SIGNED, &subs, x)));
        }
        let m_a = l.splat(x.m as u32);
        let m = l.madd16(Self::m(l, unit, powers.scale, 0), m_a);
        let i = l.mul_add_wide(l.zero_wide(), sum, m);
        let j = if form.mins {
            let min_sum = times_sums(l, false, &C::mins(l, unit), x);
            let m_min = l.madd16(Self::m(l, unit, powers.min, 1), m_a);
            l.mul_add_wide(l.zero_wide(), min_sum, m_min)
        } else {
            l.zero_wide()
        };
        Product { i, j }
    }

    #[inline(always)]
    fn fill<L: Lanes>(l: L, unit: &[u8], powers: Powers<L>, panel: &mut Panel) {
        let form = C::FORM;
        let subs = C::sub_scales(l, unit);
        let mins = C::mins(l, unit);
        for part in 0..64 / form.quads() {
            panel.set_scales(l, part, sub_scale::<L, C>(l, &subs, part));
        }
        for j in 0..BLOCKS {
            if form.zero != 0 {
                panel.set_pairs(l, j, pair(l, C::SIGNED, &subs, j));
            }
            if form.mins {
                panel.set_mins(l, j, pair(l, false, &mins, j));
            }
        }
        panel.set_super_scales(l, 0, Self::m(l, unit, powers.scale, 0));
        if form.mins {
            panel.set_super_scales(l, 1, Self::m(l, unit, powers.min, 1));
        }
        each_block!(B => {
            for (g, w) in C::weights::<L, B>(l, unit).into_iter().enumerate() {
                panel.set_weights(l, 8 * B + g, w);
            }
        });
    }
}

/// Bytes of `even` and of `odd` in turn: two words, whatever follows.
#[inline(always)]
pub(super) fn interleaved<L: Lanes>(l: L, even: L::V, odd: L::V) -> [L::V; 4] {
    let bytes = 0x00ff_00ff;
    let half = 0xffff;
    // Bytes 0 1 4 5 and 2 3 6 7.
    let low = l.or(
        l.and(even, l.splat(bytes)),
        l.and(l.shl::<8>(odd), l.splat(!bytes)),
    );
    let high = l.or(
        l.and(l.shr::<8>(even), l.splat(bytes)),
        l.and(odd, l.splat(!bytes)),
    );
    [
        l.or(l.and(low, l.splat(half)), l.shl::<16>(high)),
        l.or(l.shr::<16>(low), l.and(high, l.splat(!half))),
        low,
        high,
    ]
}

/// Sixteen bytes of sub-scales and mins, 64 bytes of 2-bit codes, `d`, `dmin`.
pub(super) struct Q2K;

impl Panelled for Q2K {
    const FORM: Form = Form {
        dots: 43,
        zero: 0,
        halves: true,
        mins: true,
        sub_scales: true,
        shift: 0,
    };
}

/// Two bits of each byte of word `g` of a half's 2-bit codes: weights `4g …` of block `b`.
#[inline(always)]
pub(super) fn bit_pair<L: Lanes>(l: L, codes: &[u8], b: usize, g: usize) -> L::V {
    let codes = word(l, codes, 8 * (b / 4) + g);
    l.and(moved(l, codes, 2 * (b % 4) as isize), l.splat(0x0303_0303))
}

impl SuperBlock for Q2K {
    const SIGNED: bool = false;
    const D: usize = 80;

    #[inline(always)]
    fn weights<L: Lanes, const B: usize>(l: L, unit: &[u8]) -> [L::V; 8] {
        let codes = &unit[16 * L::ROWS..80 * L::ROWS];
        each!(l, g => bit_pair(l, codes, B, g))
    }

    #[inline(always)]
    fn sub_scales<L: Lanes>(l: L, unit: &[u8]) -> [L::V; 4] {
        each!(l, i => nibbles(l, word(l, unit, i)).0)
    }

    #[inline(always)]
    fn mins<L: Lanes>(l: L, unit: &[u8]) -> [L::V; 4] {
        each!(l, i => nibbles(l, word(l, unit, i)).1)
    }
}

/// 32 bytes of third bits, 64 bytes of 2-bit codes, twelve bytes of sub-scales, `d`.
pub(super) struct Q3K;

impl Q3K {
    /// Nibbles with bit pairs on top, less 32.
    #[inline(always)]
    fn sub<L: Lanes>(l: L, nibbles: L::V, pairs: L::V) -> L::V {
        lowered(l, l.or(nibbles, l.and(pairs, l.splat(0x3030_3030))))
    }
}

/// Bytes less 32.
#[inline(always)]
fn lowered<L: Lanes>(l: L, six: L::V) -> L::V {
    l.sub8(six, l.splat(0x2020_2020))
}

impl Panelled for Q3K {
    const FORM: Form = Form {
        dots: 18,
        zero: 4,
        halves: true,
        mins: false,
        sub_scales: true,
        shift: 0,
    };
}

impl SuperBlock for Q3K {
    const SIGNED: bool = true;
    const D: usize = 108;

    #[inline(always)]
    fn weights<L: Lanes, const B: usize>(l: L, unit: &[u8]) -> [L::V; 8] {
        let (thirds, codes) = unit.split_at(32 * L::ROWS);
        each!(l, g => {
            let third = moved(l, word(l, thirds, g), B as isize - 2);
            l.or(bit_pair(l, codes, B, g), l.and(third, l.splat(0x0404_0404)))
        })
    }

    /// Low nibbles in the first two words, first low ones and then high ones; upper bit pairs in the third; 32 too large.
    #[inline(always)]
    fn sub_scales<L: Lanes>(l: L, unit: &[u8]) -> [L::V; 4] {
        let packed = &unit[96 * L::ROWS..108 * L::ROWS];
        let (low, high) = (nibbles(l, word(l, packed, 0)), nibbles(l, word(l, packed, 1)));
        let pairs = word(l, packed, 2);
        [
            Self::sub(l, low.0, l.shl::<4>(pairs)),
            Self::sub(l, high.0, l.shl::<2>(pairs)),
            Self::sub(l, low.1, pairs),
            Self::sub(l, high.1, l.shr::<2>(pairs)),
        ]
    }
}

/// `d`, sixteen bits of upper pairs and four bytes of lower nibbles of sub-scales, 128 bytes of nibbles.
pub(super) struct Iq4Xs;

/// `kvalues_iq4nl` of ggml.
const IQ4_LEVELS: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// Levels of a code book of nibbles: weights `4g …` and `16 + 4g …` of a block, from its 16 bytes.
#[inline(always)]
pub(super) fn levels<L: Lanes>(l: L, levels: &[i8; 16], block: &[u8]) -> [L::V; 8] {
    let table = l.table(&levels.map(|level| level as u8));
    each!(l, g => {
        let (low, high) = nibbles(l, word(l, block, g % 4));
        l.look_up(table, if g < 4 { low } else { high })
    })
}

/// Weights of a block of IQ4_NL or IQ4_XS, from its 16 bytes.
#[inline(always)]
pub(super) fn iq4_weights<L: Lanes>(l: L, block: &[u8]) -> [L::V; 8] {
    levels(l, &IQ4_LEVELS, block)
}

impl Iq4Xs {
    /// Bit pairs 0, 2, 4 and 6 on top of bytes' nibbles.
    #[inline(always)]
    fn spread<L: Lanes>(l: L, pairs: L::V) -> L::V {
        let low = l.or(
            l.and(l.shl::<4>(pairs), l.splat(0x30)),
            l.and(l.shl::<8>(pairs), l.splat(0x3000)),
        );
        let high = l.or(
            l.and(l.shl::<12>(pairs), l.splat(0x30_0000)),
            l.and(l.shl::<16>(pairs), l.splat(0x3000_0000)),
        );
        l.or(low, high)
    }
}

impl Panelled for Iq4Xs {
    const FORM: Form = Form {
        dots: 0,
        zero: 0,
        halves: false,
        mins: false,
        sub_scales: true,
        shift: 0,
    };
}

impl SuperBlock for Iq4Xs {
    const SIGNED: bool = true;
    const D: usize = 0;

    #[inline(always)]
    fn weights<L: Lanes, const B: usize>(l: L, unit: &[u8]) -> [L::V; 8] {
        let at = (8 + 16 * B) * L::ROWS;
        iq4_weights(l, &unit[at..at + 16 * L::ROWS])
    }

    #[inline(always)]
    fn sub_scales<L: Lanes>(l: L, unit: &[u8]) -> [L::V; 4] {
        let r = L::ROWS;
        let pairs = l.load_i16(&unit[2 * r..4 * r]);
        let (even, odd) = nibbles(l, word(l, &unit[4 * r..8 * r], 0));
        let even = lowered(l, l.or(even, Self::spread(l, pairs)));
        let odd = lowered(l, l.or(odd, Self::spread(l, l.shr::<2>(pairs))));
        interleaved(l, even, odd)
    }
}
