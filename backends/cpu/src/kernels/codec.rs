//! Encodings as vectors of rows: the product of one segment with one token, straight from packed bytes, and the decode of a
//! segment into a [`Panel`] for several.

use super::activations::{BLOCKS, Segment};
use super::lanes::{Lanes, Wide};
use super::panel::Panel;

/// `2^(−e)` and `2^(−e')` of a segment of each row: what takes an f16 scale to the contract's integer. The contract shifts
/// `m · 2^8` down by `e* − e_j`, which for f16 exponents is at most 29, so that its clamp at 31 never acts and rounding the
/// product down is the same.
#[derive(Clone, Copy)]
pub(super) struct Powers<L: Lanes> {
    pub(super) scale: L::F,
    pub(super) min: L::F,
    /// `e`, for scales that are no f16.
    pub(super) exponent: L::V,
}

/// `m_a · I` and `m_a · J`.
pub(super) struct Product<V> {
    pub(super) i: Wide<V>,
    pub(super) j: Wide<V>,
}

/// How a codec's panels are to be read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Form {
    /// Dots that fit 16 bits; 0 if weights are signed bytes.
    pub(super) dots: usize,
    /// What unsigned weights are too large by.
    pub(super) zero: i32,
    /// Whether scales and mins are of half blocks.
    pub(super) halves: bool,
    /// Whether there are mins.
    pub(super) mins: bool,
    /// Whether scales are small integers under a super-block's scale.
    pub(super) sub_scales: bool,
    /// Power of two that makes sub-scales and weights integers, in the exponent of a super-block's scale.
    pub(super) shift: i32,
}

/// A part's accumulated dots: in one vector, or in two where the second half of the part would not fit 16 bits any more.
pub(super) type Acc<V> = (V, V);

impl Form {
    /// Four-weight words of a part that has a scale of its own: a block or half block.
    pub(super) const fn quads(&self) -> usize {
        if self.halves { 4 } else { 8 }
    }

    /// Whether a whole part's dots do not fit one 16-bit accumulator.
    pub(super) const fn splits<L: Lanes>(&self) -> bool {
        L::NARROW && self.dots < self.quads() && self.dots != 0
    }

    /// Dots of part `part` of a block: weights and activations, four in each word.
    #[inline(always)]
    pub(super) fn dots<L: Lanes>(&self, l: L, w: &[L::V; 8], q: &[u32; 8], part: usize) -> Acc<L::V> {
        if self.halves {
            self.fixed_dots::<L, 4>(l, w, q, part)
        } else {
            self.fixed_dots::<L, 8>(l, w, q, part)
        }
    }

    /// A number of words that is known in time for the loop to be unrolled.
    #[inline(always)]
    fn fixed_dots<L: Lanes, const N: usize>(
        &self,
        l: L,
        w: &[L::V; 8],
        q: &[u32; 8],
        part: usize,
    ) -> Acc<L::V> {
        let mut acc = (l.splat(0), l.splat(0));
        for i in 0..N {
            let (w, q) = (w[N * part + i], q[N * part + i]);
            if self.dots == 0 {
                acc.0 = l.dot_signed(acc.0, l.prepare_signed(w), q);
            } else if self.splits::<L>() && i >= N / 2 {
                acc.1 = l.dot(acc.1, w, q);
            } else {
                acc.0 = l.dot(acc.0, w, q);
            }
        }
        acc
    }

    /// Dots of unsigned weights times a factor.
    #[inline(always)]
    pub(super) fn end<L: Lanes>(&self, l: L, acc: Acc<L::V>, factor: L::V) -> L::V {
        let first = l.dot_end(acc.0, factor);
        if self.splits::<L>() {
            l.add(first, l.dot_end(acc.1, factor))
        } else {
            first
        }
    }

    /// What unsigned weights are too large by, times `v`. It is a power of two where there are sub-scales.
    #[inline(always)]
    pub(super) fn times_zero<L: Lanes>(&self, l: L, v: L::V) -> L::V {
        match self.zero {
            32 => l.shl::<5>(v),
            4 => l.shl::<2>(v),
            _ => v,
        }
    }
}

/// Whatever fills panels of one form.
pub(super) trait Panelled {
    const FORM: Form;
}

/// A packed encoding. `unit` is a packed segment of [`Lanes::ROWS`] rows.
pub(super) trait Codec: Panelled {
    fn product<L: Lanes>(lanes: L, unit: &[u8], x: &Segment, powers: Powers<L>) -> Product<L::V>;

    fn fill<L: Lanes>(lanes: L, unit: &[u8], powers: Powers<L>, panel: &mut Panel);
}

/// Low and high nibbles.
#[inline(always)]
pub(super) fn nibbles<L: Lanes>(l: L, w: L::V) -> (L::V, L::V) {
    let mask = l.splat(0x0f0f_0f0f);
    (l.and(w, mask), l.and(l.shr::<4>(w), mask))
}

/// Bit `at` of each byte, as bit 4.
#[inline(always)]
fn fifth<L: Lanes>(l: L, bits: L::V, at: usize) -> L::V {
    let moved = match at {
        0 => l.shl::<4>(bits),
        1 => l.shl::<3>(bits),
        2 => l.shl::<2>(bits),
        3 => l.shl::<1>(bits),
        4 => bits,
        5 => l.shr::<1>(bits),
        6 => l.shr::<2>(bits),
        _ => l.shr::<3>(bits),
    };
    l.and(moved, l.splat(0x1010_1010))
}

/// Q4_0, Q4_1, Q5_0 and Q5_1: nibbles, perhaps fifth bits, perhaps mins, or else a zero point.
pub(super) struct Nibbles<const FIFTHS: bool, const MINS: bool>;

impl<const FIFTHS: bool, const MINS: bool> Nibbles<FIFTHS, MINS> {
    const ZERO: i32 = match (MINS, FIFTHS) {
        (true, _) => 0,
        (false, false) => 8,
        (false, true) => 16,
    };
    const BLOCK: usize = 18 + if FIFTHS { 4 } else { 0 } + if MINS { 2 } else { 0 };

    /// Scales, mins, fifth bits and nibbles.
    #[inline(always)]
    fn split<L: Lanes>(unit: &[u8]) -> [&[u8]; 4] {
        let n = unit.len() / Self::BLOCK;
        let (scales, rest) = unit.split_at(2 * n);
        let (mins, rest) = rest.split_at(if MINS { 2 * n } else { 0 });
        let (fifths, nibbles) = rest.split_at(if FIFTHS { 4 * n } else { 0 });
        [scales, mins, fifths, nibbles]
    }

    /// Weights `4g …` and `16 + 4g …` of a block.
    #[inline(always)]
    fn weights<L: Lanes>(l: L, word: &[u8], bits: L::V, g: usize) -> (L::V, L::V) {
        let (low, high) = nibbles(l, l.load(word));
        if FIFTHS {
            (l.or(low, fifth(l, bits, g)), l.or(high, fifth(l, bits, 4 + g)))
        } else {
            (low, high)
        }
    }
}

impl<const FIFTHS: bool, const MINS: bool> Panelled for Nibbles<FIFTHS, MINS> {
    const FORM: Form = Form {
        dots: if FIFTHS { 4 } else { 8 },
        zero: Self::ZERO,
        halves: false,
        mins: MINS,
        sub_scales: false,
        shift: 0,
    };
}

impl<const FIFTHS: bool, const MINS: bool> Codec for Nibbles<FIFTHS, MINS> {
    #[inline(always)]
    fn product<L: Lanes>(l: L, unit: &[u8], x: &Segment, powers: Powers<L>) -> Product<L::V> {
        let r = L::ROWS;
        let [scales, mins, fifths, nibbles] = Self::split::<L>(unit);
        let (mut mins, mut fifths) = (mins.chunks_exact(2 * r), fifths.chunks_exact(4 * r));
        // A min is added by the file and subtracted by the contract.
        let min_power = l.negate(powers.min);
        let (mut i, mut j) = (l.zero_wide(), l.zero_wide());
        let blocks = scales.chunks_exact(2 * r).zip(nibbles.chunks_exact(16 * r));
        let activations = x.q.as_chunks::<8>().0.iter().zip(&x.um_twice).zip(&x.mus);
        for ((scale, nibbles), ((q, um), mus)) in blocks.zip(activations) {
            let bits = match fifths.next() {
                Some(bits) => l.load(bits),
                None => l.splat(0),
            };
            let (mut low, mut high) = (l.splat(0), l.splat(0));
            for (g, word) in nibbles.chunks_exact(4 * r).enumerate().take(4) {
                let (w_low, w_high) = Self::weights(l, word, bits, g);
                low = l.dot(low, w_low, q[g]);
                high = l.dot(high, w_high, q[4 + g]);
            }
            let um = l.factor(*um);
            let mut dot = if FIFTHS && L::NARROW {
                l.add(l.dot_end(low, um), l.dot_end(high, um))
            } else {
                l.dot_end(l.dot_add(low, high), um)
            };
            if Self::ZERO != 0 {
                dot = l.sub(dot, l.splat((Self::ZERO * mus) as u32));
            }
            i = l.mul_add_wide(i, dot, l.mul_floor(l.load_f16(scale), powers.scale));
            if let Some(min) = mins.next() {
                let min = l.mul_floor(l.load_f16(min), min_power);
                j = l.mul_add_splat(
                    j,
                    *mus,
                    Wide {
                        even: min,
                        odd: l.odd(min),
                    },
                );
            }
        }
        Product { i, j }
    }

    #[inline(always)]
    fn fill<L: Lanes>(l: L, unit: &[u8], powers: Powers<L>, panel: &mut Panel) {
        let r = L::ROWS;
        let [scales, mins, fifths, nibbles] = Self::split::<L>(unit);
        let (mut mins, mut fifths) = (mins.chunks_exact(2 * r), fifths.chunks_exact(4 * r));
        let min_power = l.negate(powers.min);
        let blocks = scales.chunks_exact(2 * r).zip(nibbles.chunks_exact(16 * r));
        for (b, (scale, nibbles)) in blocks.enumerate() {
            let bits = match fifths.next() {
                Some(bits) => l.load(bits),
                None => l.splat(0),
            };
            for (g, word) in nibbles.chunks_exact(4 * r).enumerate().take(4) {
                let (low, high) = Self::weights(l, word, bits, g);
                panel.set_weights(l, 8 * b + g, low);
                panel.set_weights(l, 8 * b + 4 + g, high);
            }
            panel.set_wide_scales(l, b, l.mul_floor(l.load_f16(scale), powers.scale));
            if let Some(min) = mins.next() {
                panel.set_wide_mins(l, b, l.mul_floor(l.load_f16(min), min_power));
            }
        }
    }
}

/// Q8_0: signed bytes.
pub(super) struct Bytes;

impl Panelled for Bytes {
    const FORM: Form = Form {
        dots: 0,
        zero: 0,
        halves: false,
        mins: false,
        sub_scales: false,
        shift: 0,
    };
}

impl Codec for Bytes {
    #[inline(always)]
    fn product<L: Lanes>(l: L, unit: &[u8], x: &Segment, powers: Powers<L>) -> Product<L::V> {
        let r = L::ROWS;
        let (scales, weights) = unit.split_at(2 * (unit.len() / 34));
        let mut i = l.zero_wide();
        let blocks = scales.chunks_exact(2 * r).zip(weights.chunks_exact(32 * r));
        let activations = x.q.as_chunks::<8>().0.iter().zip(&x.um_twice).zip(&x.mus);
        for ((scale, weights), ((q, um), mus)) in blocks.zip(activations) {
            let (mut even, mut odd) = (l.splat(0), l.splat(0));
            for (words, q) in weights.chunks_exact(8 * r).zip(q.as_chunks::<2>().0) {
                let (a, b) = words.split_at(4 * r);
                even = l.dot_signed(even, l.prepare_signed(l.load(a)), q[0]);
                odd = l.dot_signed(odd, l.prepare_signed(l.load(b)), q[1]);
            }
            let dot = l.dot_signed_end(l.add(even, odd), *um, *mus);
            i = l.mul_add_wide(i, dot, l.mul_floor(l.load_f16(scale), powers.scale));
        }
        Product { i, j: l.zero_wide() }
    }

    #[inline(always)]
    fn fill<L: Lanes>(l: L, unit: &[u8], powers: Powers<L>, panel: &mut Panel) {
        let r = L::ROWS;
        let (scales, weights) = unit.split_at(2 * (unit.len() / 34));
        for (i, word) in weights.chunks_exact(4 * r).enumerate() {
            panel.set_weights(l, i, l.load(word));
        }
        for (b, scale) in scales.chunks_exact(2 * r).enumerate() {
            panel.set_wide_scales(l, b, l.mul_floor(l.load_f16(scale), powers.scale));
        }
    }
}

/// Sub-scales and mins of Q4_K and Q5_K: bytes `j % 4` of words `j / 4`.
struct SixBit<V> {
    scales: [V; 2],
    mins: [V; 2],
}

/// Twelve bytes of each row. Sub-scales 0 … 3 are the low six bits of the first word, mins those of the second; later ones
/// have their low nibbles in the third and their upper two bits on top of the first two.
#[inline(always)]
fn six_bit<L: Lanes>(l: L, packed: &[u8]) -> SixBit<L::V> {
    let r = L::ROWS;
    let [w0, w1, w2] = [
        l.load(&packed[..4 * r]),
        l.load(&packed[4 * r..8 * r]),
        l.load(&packed[8 * r..12 * r]),
    ];
    let (six, top) = (l.splat(0x3f3f_3f3f), l.splat(0x3030_3030));
    let (low, high) = nibbles(l, w2);
    SixBit {
        scales: [l.and(w0, six), l.or(low, l.and(l.shr::<2>(w0), top))],
        mins: [l.and(w1, six), l.or(high, l.and(l.shr::<2>(w1), top))],
    }
}

/// Sub-scale `j` of bytes `j % 4` of words `j / 4`.
#[inline(always)]
fn sub_scale<L: Lanes>(l: L, words: &[L::V; 2], j: usize) -> L::V {
    let word = words[j / 4];
    match j % 4 {
        0 => l.sub_scale::<0>(word),
        1 => l.sub_scale::<1>(word),
        2 => l.sub_scale::<2>(word),
        _ => l.sub_scale::<3>(word),
    }
}

/// Bytes `2p` and `2p + 1` of words.
#[inline(always)]
fn pair<L: Lanes>(l: L, words: &[L::V; 2], p: usize) -> L::V {
    let word = words[p / 2];
    if p.is_multiple_of(2) {
        l.pair::<0>(word)
    } else {
        l.pair::<2>(word)
    }
}

/// Q4_K and Q5_K.
pub(super) struct SuperNibbles<const FIFTHS: bool>;

/// Fields of a packed super-block of Q4_K or Q5_K.
struct SuperFields<'a> {
    d: &'a [u8],
    dmin: &'a [u8],
    six_bit: &'a [u8],
    fifths: &'a [u8],
    nibbles: &'a [u8],
}

impl<const FIFTHS: bool> SuperNibbles<FIFTHS> {
    #[inline(always)]
    fn split<L: Lanes>(unit: &[u8]) -> SuperFields<'_> {
        let r = L::ROWS;
        let (d, rest) = unit.split_at(2 * r);
        let (dmin, rest) = rest.split_at(2 * r);
        let (six_bit, rest) = rest.split_at(12 * r);
        let (fifths, nibbles) = rest.split_at(if FIFTHS { 32 * r } else { 0 });
        SuperFields {
            d,
            dmin,
            six_bit,
            fifths,
            nibbles: &nibbles[..128 * r],
        }
    }

    /// Weights `4g …` of blocks `2c` and `2c + 1`.
    #[inline(always)]
    fn weights<L: Lanes>(l: L, word: &[u8], fifths: &[u8], c: usize, g: usize) -> (L::V, L::V) {
        let (low, high) = nibbles(l, l.load(word));
        if FIFTHS {
            let bits = l.load(&fifths[4 * L::ROWS * g..4 * L::ROWS * (g + 1)]);
            (
                l.or(low, fifth(l, bits, 2 * c)),
                l.or(high, fifth(l, bits, 2 * c + 1)),
            )
        } else {
            (low, high)
        }
    }

    /// Sum of two blocks' dots times their sub-scales, added to `sum`.
    #[inline(always)]
    fn two_blocks<L: Lanes>(
        l: L,
        fields: &SuperFields<'_>,
        sub: &[L::V; 2],
        x: &Segment,
        c: usize,
        sum: L::V,
    ) -> L::V {
        let r = L::ROWS;
        let words = &fields.nibbles[32 * r * c..32 * r * (c + 1)];
        let q: &[u32; 16] = &x.q.as_chunks::<16>().0[c];
        let factors = [
            l.times(sub_scale(l, sub, 2 * c), x.u_twice[2 * c]),
            l.times(sub_scale(l, sub, 2 * c + 1), x.u_twice[2 * c + 1]),
        ];
        let (mut low, mut high) = (l.splat(0), l.splat(0));
        let mut sum = sum;
        for (g, word) in words.chunks_exact(4 * r).enumerate().take(8) {
            let (w_low, w_high) = Self::weights(l, word, fields.fifths, c, g);
            low = l.dot(low, w_low, q[g]);
            high = l.dot(high, w_high, q[8 + g]);
            if FIFTHS && L::NARROW && g == 3 {
                sum = l.add(
                    sum,
                    l.add(l.dot_end(low, factors[0]), l.dot_end(high, factors[1])),
                );
                (low, high) = (l.splat(0), l.splat(0));
            }
        }
        l.add(
            sum,
            l.add(l.dot_end(low, factors[0]), l.dot_end(high, factors[1])),
        )
    }
}

impl<const FIFTHS: bool> Panelled for SuperNibbles<FIFTHS> {
    const FORM: Form = Form {
        dots: if FIFTHS { 4 } else { 8 },
        zero: 0,
        halves: false,
        mins: true,
        sub_scales: true,
        shift: 0,
    };
}

impl<const FIFTHS: bool> Codec for SuperNibbles<FIFTHS> {
    #[inline(always)]
    fn product<L: Lanes>(l: L, unit: &[u8], x: &Segment, powers: Powers<L>) -> Product<L::V> {
        let fields = Self::split::<L>(unit);
        let six_bit = six_bit(l, fields.six_bit);
        let mut sum = l.splat(0);
        sum = Self::two_blocks(l, &fields, &six_bit.scales, x, 0, sum);
        sum = Self::two_blocks(l, &fields, &six_bit.scales, x, 1, sum);
        sum = Self::two_blocks(l, &fields, &six_bit.scales, x, 2, sum);
        sum = Self::two_blocks(l, &fields, &six_bit.scales, x, 3, sum);
        let mut min_sum = l.splat(0);
        for p in 0..4 {
            let u_mins = l.mul16(pair(l, &six_bit.mins, p), l.splat(x.u_pair[p]));
            min_sum = l.add(min_sum, l.madd16(u_mins, l.splat(x.s_pair[p])));
        }
        let m_a = l.splat(x.m as u32);
        let m = l.madd16(l.mul_floor(l.load_f16(fields.d), powers.scale), m_a);
        let m_min = l.madd16(l.mul_floor(l.load_f16(fields.dmin), powers.min), m_a);
        Product {
            i: l.mul_add_wide(l.zero_wide(), sum, m),
            j: l.mul_add_wide(l.zero_wide(), min_sum, m_min),
        }
    }

    #[inline(always)]
    fn fill<L: Lanes>(l: L, unit: &[u8], powers: Powers<L>, panel: &mut Panel) {
        let r = L::ROWS;
        let fields = Self::split::<L>(unit);
        let six_bit = six_bit(l, fields.six_bit);
        for j in 0..BLOCKS {
            panel.set_scales(l, j, sub_scale(l, &six_bit.scales, j));
        }
        for p in 0..BLOCKS / 2 {
            panel.set_mins(l, p, pair(l, &six_bit.mins, p));
        }
        panel.set_super_scales(l, 0, l.mul_floor(l.load_f16(fields.d), powers.scale));
        panel.set_super_scales(l, 1, l.mul_floor(l.load_f16(fields.dmin), powers.min));
        for (c, words) in fields.nibbles.chunks_exact(32 * r).enumerate().take(4) {
            for (g, word) in words.chunks_exact(4 * r).enumerate().take(8) {
                let (low, high) = Self::weights(l, word, fields.fifths, c, g);
                panel.set_weights(l, 16 * c + g, low);
                panel.set_weights(l, 16 * c + 8 + g, high);
            }
        }
    }
}

/// Q6_K.
pub(super) struct SixBits;

impl SixBits {
    /// Nibbles and bit pairs, sub-scales and `d`.
    #[inline(always)]
    fn split<L: Lanes>(unit: &[u8]) -> [&[u8]; 3] {
        let r = L::ROWS;
        let (codes, rest) = unit.split_at(192 * r);
        let (subs, d) = rest.split_at(16 * r);
        [codes, subs, &d[..2 * r]]
    }

    /// Weights `4g …` of the four blocks of half `h` of a super-block.
    #[inline(always)]
    fn weights<L: Lanes>(l: L, codes: &[u8], h: usize, g: usize) -> [L::V; 4] {
        let n = 4 * L::ROWS;
        let words = &codes[3 * n * (8 * h + g)..][..3 * n];
        let (a_low, a_high) = nibbles(l, l.load(&words[..n]));
        let (b_low, b_high) = nibbles(l, l.load(&words[n..2 * n]));
        let bits = l.load(&words[2 * n..]);
        let mask = l.splat(0x3030_3030);
        [
            l.or(a_low, l.and(l.shl::<4>(bits), mask)),
            l.or(b_low, l.and(l.shl::<2>(bits), mask)),
            l.or(a_high, l.and(bits, mask)),
            l.or(b_high, l.and(l.shr::<2>(bits), mask)),
        ]
    }

    /// Signed sub-scale of half block `h`.
    #[inline(always)]
    fn sub_scale<L: Lanes>(l: L, subs: &[u8], h: usize) -> L::V {
        let n = 4 * L::ROWS;
        let word = l.load(&subs[n * (h / 4)..][..n]);
        match h % 4 {
            0 => l.signed_sub_scale::<0>(word),
            1 => l.signed_sub_scale::<1>(word),
            2 => l.signed_sub_scale::<2>(word),
            _ => l.signed_sub_scale::<3>(word),
        }
    }

    /// Signed sub-scales of the two half blocks of block `j`.
    #[inline(always)]
    fn pair<L: Lanes>(l: L, subs: &[u8], j: usize) -> L::V {
        let n = 4 * L::ROWS;
        let word = l.load(&subs[n * (j / 2)..][..n]);
        if j.is_multiple_of(2) {
            l.signed_pair::<0>(word)
        } else {
            l.signed_pair::<2>(word)
        }
    }

    /// Dots of one half block of each of the four blocks of half `h`, times their sub-scales, summed.
    #[inline(always)]
    fn scaled<L: Lanes>(l: L, acc: [L::V; 4], subs: &[u8], x: &Segment, (h, half): (usize, usize)) -> L::V {
        let mut sum = l.splat(0);
        for (b, acc) in acc.into_iter().enumerate() {
            let sub_scale = Self::sub_scale(l, subs, 8 * h + 2 * b + half);
            sum = l.add(sum, l.dot_end(acc, l.times(sub_scale, x.u_twice[4 * h + b])));
        }
        sum
    }

    /// Sum of the dots of half `h`, times their sub-scales, added to `sum`.
    #[inline(always)]
    fn four_blocks<L: Lanes>(l: L, fields: &[&[u8]; 3], x: &Segment, h: usize, sum: L::V) -> L::V {
        let [codes, subs, _] = *fields;
        let q: &[u32; 32] = &x.q.as_chunks::<32>().0[h];
        let mut sum = sum;
        for half in 0..2 {
            let mut acc = [l.splat(0); 4];
            for g in 0..4 {
                let w = Self::weights(l, codes, h, 4 * half + g);
                for b in 0..4 {
                    acc[b] = l.dot(acc[b], w[b], q[8 * b + 4 * half + g]);
                }
                if L::NARROW && g == 1 {
                    sum = l.add(sum, Self::scaled(l, acc, subs, x, (h, half)));
                    acc = [l.splat(0); 4];
                }
            }
            sum = l.add(sum, Self::scaled(l, acc, subs, x, (h, half)));
        }
        sum
    }
}

impl Panelled for SixBits {
    const FORM: Form = Form {
        dots: 2,
        zero: 32,
        halves: true,
        mins: false,
        sub_scales: true,
        shift: 0,
    };
}

impl Codec for SixBits {
    #[inline(always)]
    fn product<L: Lanes>(l: L, unit: &[u8], x: &Segment, powers: Powers<L>) -> Product<L::V> {
        let fields = Self::split::<L>(unit);
        let mut sum = l.splat(0);
        sum = Self::four_blocks(l, &fields, x, 0, sum);
        sum = Self::four_blocks(l, &fields, x, 1, sum);
        let mut zeros = l.splat(0);
        for j in 0..BLOCKS {
            zeros = l.add(
                zeros,
                l.madd16(Self::pair(l, fields[1], j), l.splat(x.us_halves[j])),
            );
        }
        let sum = l.sub(sum, l.shl::<5>(zeros));
        let m = l.madd16(
            l.mul_floor(l.load_f16(fields[2]), powers.scale),
            l.splat(x.m as u32),
        );
        Product {
            i: l.mul_add_wide(l.zero_wide(), sum, m),
            j: l.zero_wide(),
        }
    }

    #[inline(always)]
    fn fill<L: Lanes>(l: L, unit: &[u8], powers: Powers<L>, panel: &mut Panel) {
        let [codes, subs, d] = Self::split::<L>(unit);
        for h in 0..2 {
            for g in 0..8 {
                for (b, w) in Self::weights(l, codes, h, g).into_iter().enumerate() {
                    panel.set_weights(l, 32 * h + 8 * b + g, w);
                }
            }
        }
        for h in 0..2 * BLOCKS {
            panel.set_scales(l, h, Self::sub_scale(l, subs, h));
        }
        for j in 0..BLOCKS {
            panel.set_pairs(l, j, Self::pair(l, subs, j));
        }
        panel.set_super_scales(l, 0, l.mul_floor(l.load_f16(d), powers.scale));
    }
}
