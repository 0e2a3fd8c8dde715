//! Blocks with scales of their own, by their parts: IQ4_NL, MXFP4, NVFP4, TQ1_0, TQ2_0, Q1_0, Q2_0 and AprQ8, each a
//! description from which the product with one token and the panel for several both follow.

use std::marker::PhantomData;

use super::activations::{BLOCKS, Segment};
use super::codec::{Codec, Form, Panelled, Powers, Product, nibbles};
use super::lanes::Lanes;
use super::panel::Panel;
use super::super_blocks::{bit_pair, each, each_block, iq4_weights, levels, moved, word};

/// How a packed segment becomes integers. Its blocks of 32 weights are those of the contract; the encoding's own may be
/// larger.
pub(super) trait Blocks: Panelled {
    /// Bytes of 256 weights of one row.
    const SEGMENT_BYTES: usize;
    /// Weights that share a scale.
    const SHARE: usize;

    /// Weights of block `B`, four in each word; bytes as [`Form`] says.
    fn weights<L: Lanes, const B: usize>(l: L, unit: &[u8]) -> [L::V; 8];

    /// `c` of the `i`th scale.
    fn scale<L: Lanes>(l: L, unit: &[u8], i: usize, powers: &Powers<L>) -> L::V;
}

/// [`Blocks`] as a codec.
pub(super) struct Scaled<C>(PhantomData<C>);

/// Blocks of 32 weights that a packed segment has.
#[inline(always)]
fn blocks<L: Lanes>(unit: &[u8], segment_bytes: usize) -> usize {
    unit.len() * BLOCKS / (segment_bytes * L::ROWS)
}

/// The integer of the `i`th f16 of a packed field.
#[inline(always)]
fn f16<L: Lanes>(l: L, field: &[u8], i: usize, powers: &Powers<L>) -> L::V {
    let n = 2 * L::ROWS;
    l.mul_floor(l.load_f16(&field[n * i..n * (i + 1)]), powers.scale)
}

impl<C: Blocks> Panelled for Scaled<C> {
    const FORM: Form = C::FORM;
}

impl<C: Blocks> Scaled<C> {
    /// Dots of part `part` of block `B` times `u · m_a`.
    #[inline(always)]
    fn dot<L: Lanes, const B: usize>(l: L, w: &[L::V; 8], x: &Segment, part: usize) -> L::V {
        let form = C::FORM;
        let acc = form.dots(l, w, &x.q.as_chunks::<8>().0[B], part);
        let sum = if form.halves {
            x.mus_half[2 * B + part]
        } else {
            x.mus[B]
        };
        if form.dots == 0 {
            return l.dot_signed_end(acc.0, x.um_twice[B], sum);
        }
        let dot = form.end(l, acc, l.factor(x.um_twice[B]));
        l.sub(dot, l.splat((form.zero * sum) as u32))
    }
}

impl<C: Blocks> Codec for Scaled<C> {
    #[inline(always)]
    fn product<L: Lanes>(l: L, unit: &[u8], x: &Segment, powers: Powers<L>) -> Product<L::V> {
        let blocks = blocks::<L>(unit, C::SEGMENT_BYTES);
        let mut i = l.zero_wide();
        // Sums of blocks of small weights that share a scale fit 32 bits: 256 · 127 · 3 · 16 · 255.
        let mut shared = l.splat(0);
        each_block!(B => if B < blocks {
            let w = C::weights::<L, B>(l, unit);
            for part in 0..8 / C::FORM.quads() {
                shared = l.add(shared, Self::dot::<L, B>(l, &w, x, part));
                let end = 32 * B + 4 * C::FORM.quads() * (part + 1);
                if end.is_multiple_of(C::SHARE) {
                    i = l.mul_add_wide(i, shared, C::scale(l, unit, end / C::SHARE - 1, &powers));
                    shared = l.splat(0);
                }
            }
        });
        Product { i, j: l.zero_wide() }
    }

    #[inline(always)]
    fn fill<L: Lanes>(l: L, unit: &[u8], powers: Powers<L>, panel: &mut Panel) {
        let blocks = blocks::<L>(unit, C::SEGMENT_BYTES);
        let quads = C::FORM.quads();
        for part in 0..blocks * 8 / quads {
            let c = C::scale(l, unit, 4 * quads * part / C::SHARE, &powers);
            panel.set_wide_scales(l, part, c);
        }
        each_block!(B => if B < blocks {
            for (g, w) in C::weights::<L, B>(l, unit).into_iter().enumerate() {
                panel.set_weights(l, 8 * B + g, w);
            }
        });
    }
}

/// A form of blocks without mins.
const fn form(dots: usize, zero: i32) -> Form {
    Form {
        dots,
        zero,
        halves: false,
        mins: false,
        sub_scales: false,
        shift: 0,
    }
}

/// f16 scales, then 16 bytes of nibbles of each block, which name levels of a code book.
pub(super) struct Iq4Nl;

impl Panelled for Iq4Nl {
    const FORM: Form = form(0, 0);
}

impl Blocks for Iq4Nl {
    const SEGMENT_BYTES: usize = 144;
    const SHARE: usize = 32;

    #[inline(always)]
    fn weights<L: Lanes, const B: usize>(l: L, unit: &[u8]) -> [L::V; 8] {
        let codes = &unit[unit.len() / 9..];
        iq4_weights(l, &codes[16 * B * L::ROWS..16 * (B + 1) * L::ROWS])
    }

    #[inline(always)]
    fn scale<L: Lanes>(l: L, unit: &[u8], i: usize, powers: &Powers<L>) -> L::V {
        f16(l, unit, i, powers)
    }
}

/// E2M1 values times two, plus twelve.
const E2M1_RAISED: [i8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

/// E8M0 scales, a byte each, then 16 bytes of nibbles of each block.
pub(super) struct Mxfp4;

impl Panelled for Mxfp4 {
    const FORM: Form = form(5, 12);
}

impl Blocks for Mxfp4 {
    const SEGMENT_BYTES: usize = 136;
    const SHARE: usize = 32;

    #[inline(always)]
    fn weights<L: Lanes, const B: usize>(l: L, unit: &[u8]) -> [L::V; 8] {
        let codes = &unit[unit.len() / 17..];
        levels(l, &E2M1_RAISED, &codes[16 * B * L::ROWS..16 * (B + 1) * L::ROWS])
    }

    /// `1 · 2^(byte − 128)`. The largest exponent is `e + 8`.
    #[inline(always)]
    fn scale<L: Lanes>(l: L, unit: &[u8], i: usize, powers: &Powers<L>) -> L::V {
        let byte = l.load_u8(&unit[L::ROWS * i..L::ROWS * (i + 1)]);
        let below = l.sub(l.add(powers.exponent, l.splat(8 + 128)), byte);
        l.shr_by(l.splat(1 << 8), below)
    }
}

/// Of each 64 weights, four UE4M3 scales and four times 8 bytes of nibbles.
pub(super) struct Nvfp4;

impl Panelled for Nvfp4 {
    const FORM: Form = Form {
        halves: true,
        ..form(5, 12)
    };
}

impl Blocks for Nvfp4 {
    const SEGMENT_BYTES: usize = 144;
    const SHARE: usize = 16;

    #[inline(always)]
    fn weights<L: Lanes, const B: usize>(l: L, unit: &[u8]) -> [L::V; 8] {
        let table = l.table(&E2M1_RAISED.map(|level| level as u8));
        let block = &unit[36 * (B / 2) * L::ROWS..36 * (B / 2 + 1) * L::ROWS];
        each!(l, g => {
            let (low, high) = nibbles(l, word(l, block, 1 + 4 * (B % 2) + 2 * (g / 4) + g % 2));
            l.look_up(table, if g % 4 < 2 { low } else { high })
        })
    }

    /// `m · 2^(max(E, 1) − 11)` with `m` of three bits, and a fourth for normal numbers; 0x7F is 0.
    #[inline(always)]
    fn scale<L: Lanes>(l: L, unit: &[u8], i: usize, powers: &Powers<L>) -> L::V {
        let word = word(l, &unit[36 * (i / 4) * L::ROWS..], 0);
        let byte = l.and(
            match i % 4 {
                0 => word,
                1 => l.shr::<8>(word),
                2 => l.shr::<16>(word),
                _ => l.shr::<24>(word),
            },
            l.splat(0xff),
        );
        let one = l.splat(1);
        let exponent = l.and(l.shr::<3>(byte), l.splat(15));
        let normal = l.min(exponent, one);
        let m = l.or(l.and(byte, l.splat(7)), l.shl::<3>(normal));
        // All bits, unless the byte is 0x7F.
        let counts = l.sub(l.splat(0), l.min(l.xor(byte, l.splat(0x7f)), one));
        // `max(E, 1)` is `E + 1 − min(E, 1)`.
        let exponent = l.add(exponent, l.sub(one, normal));
        let below = l.sub(l.add(powers.exponent, l.splat(8 + 11)), exponent);
        l.shr_by(l.shl::<8>(l.and(m, counts)), below)
    }
}

/// 64 bytes of 2-bit codes, f16 scale.
pub(super) struct Tq2;

impl Panelled for Tq2 {
    const FORM: Form = form(43, 1);
}

impl Blocks for Tq2 {
    const SEGMENT_BYTES: usize = 66;
    const SHARE: usize = 256;

    #[inline(always)]
    fn weights<L: Lanes, const B: usize>(l: L, unit: &[u8]) -> [L::V; 8] {
        each!(l, g => bit_pair(l, unit, B, g))
    }

    #[inline(always)]
    fn scale<L: Lanes>(l: L, unit: &[u8], i: usize, powers: &Powers<L>) -> L::V {
        f16(l, &unit[64 * L::ROWS..], i, powers)
    }
}

/// 48 bytes of five base-3 digits each and four of four, f16 scale.
pub(super) struct Tq1;

impl Tq1 {
    /// Three times fractions of 256 that were multiplied by a power.
    #[inline(always)]
    fn tripled<L: Lanes>(l: L, fractions: L::V, power: L::V) -> L::V {
        let moved = l.and(l.mul16(fractions, power), l.splat(0x00ff_00ff));
        l.mul16(moved, l.splat(0x3_0003))
    }

    /// Digit `n` of each byte: multiplying by 3^n modulo 256 brings it to the top, and three times that, over 256, is it.
    #[inline(always)]
    fn digit<L: Lanes>(l: L, bytes: L::V, n: usize) -> L::V {
        let power = l.splat(0x1_0001 * [1, 3, 9, 27, 81][n]);
        let low = l.splat(0x00ff_00ff);
        let even = Self::tripled(l, l.and(bytes, low), power);
        let odd = Self::tripled(l, l.and(l.shr::<8>(bytes), low), power);
        l.or(l.and(l.shr::<8>(even), low), l.and(odd, l.splat(0xff00_ff00)))
    }
}

impl Panelled for Tq1 {
    const FORM: Form = form(64, 1);
}

impl Blocks for Tq1 {
    const SEGMENT_BYTES: usize = 54;
    const SHARE: usize = 256;

    /// All first digits of the first 32 bytes, all second ones, and so on; then those of the next 16 and of the last four.
    #[inline(always)]
    fn weights<L: Lanes, const B: usize>(l: L, unit: &[u8]) -> [L::V; 8] {
        each!(l, g => {
            let (at, digit) = match 8 * B + g {
                i @ 0..40 => (i % 8, i / 8),
                i @ 40..60 => (8 + i % 4, (i - 40) / 4),
                i => (12, i - 60),
            };
            Self::digit(l, word(l, unit, at), digit)
        })
    }

    #[inline(always)]
    fn scale<L: Lanes>(l: L, unit: &[u8], i: usize, powers: &Powers<L>) -> L::V {
        f16(l, &unit[52 * L::ROWS..], i, powers)
    }
}

/// f16 scales of 128 weights, then their bits, transposed by packing.
pub(super) struct Q1;

impl Panelled for Q1 {
    const FORM: Form = form(64, 1);
}

impl Blocks for Q1 {
    const SEGMENT_BYTES: usize = 36;
    const SHARE: usize = 128;

    #[inline(always)]
    fn weights<L: Lanes, const B: usize>(l: L, unit: &[u8]) -> [L::V; 8] {
        let bits = word(l, &unit[unit.len() / 9..], B);
        each!(l, g => l.and(moved(l, bits, g as isize - 1), l.splat(0x0202_0202)))
    }

    #[inline(always)]
    fn scale<L: Lanes>(l: L, unit: &[u8], i: usize, powers: &Powers<L>) -> L::V {
        f16(l, unit, i, powers)
    }
}

/// f16 scales of 64 weights, then their 2-bit codes, transposed by packing.
pub(super) struct Q2;

impl Panelled for Q2 {
    const FORM: Form = form(43, 1);
}

impl Blocks for Q2 {
    const SEGMENT_BYTES: usize = 72;
    const SHARE: usize = 64;

    #[inline(always)]
    fn weights<L: Lanes, const B: usize>(l: L, unit: &[u8]) -> [L::V; 8] {
        let codes = &unit[unit.len() / 9..];
        each!(l, g => {
            let codes = word(l, codes, 2 * B + g / 4);
            l.and(moved(l, codes, 2 * (g % 4) as isize), l.splat(0x0303_0303))
        })
    }

    #[inline(always)]
    fn scale<L: Lanes>(l: L, unit: &[u8], i: usize, powers: &Powers<L>) -> L::V {
        f16(l, unit, i, powers)
    }
}

/// AprQ8: signed bytes whose scale is the matrix's, so that sub-scales and `m` are 1.
pub(super) struct AprBytes;

impl Panelled for AprBytes {
    const FORM: Form = Form {
        sub_scales: true,
        ..form(0, 0)
    };
}

impl Codec for AprBytes {
    #[inline(always)]
    fn product<L: Lanes>(l: L, unit: &[u8], x: &Segment, _: Powers<L>) -> Product<L::V> {
        let one = l.factor(0x1_0001);
        let mut sum = l.splat(0);
        for (b, block) in unit.chunks_exact(32 * L::ROWS).enumerate().take(BLOCKS) {
            let w: [L::V; 8] = each!(l, g => word(l, block, g));
            let acc = Self::FORM.dots(l, &w, &x.q.as_chunks::<8>().0[b], 0);
            sum = l.add(sum, l.dot_signed_scaled(acc.0, one, x.u_twice[b], x.us(false, b)));
        }
        let i = l.mul_add_wide(l.zero_wide(), sum, l.splat(x.m as u32));
        Product { i, j: l.zero_wide() }
    }

    #[inline(always)]
    fn fill<L: Lanes>(l: L, unit: &[u8], _: Powers<L>, panel: &mut Panel) {
        for (i, word) in unit.chunks_exact(4 * L::ROWS).enumerate() {
            panel.set_weights(l, i, l.load(word));
        }
        for b in 0..BLOCKS {
            panel.set_scales(l, b, l.factor(0x1_0001));
        }
        panel.set_super_scales(l, 0, l.splat(1));
    }
}
