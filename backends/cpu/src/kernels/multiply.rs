//! Rows × tokens, a group of rows at a time.

use std::marker::PhantomData;
use std::ops::Range;

use hoist_backend::Encoding;
use hoist_quant::SegmentView;

use super::activations::Segment;
use super::codec::{Bytes, Codec, Nibbles, Panelled, Plain, Powers, SixBits, SuperNibbles};
use super::lanes::{Job, Lanes, MAX_ROWS, Sums, Wide};
use super::matrix::{QuantMatrix, Results};
use super::pack::{MAX_SEGMENT_BYTES, pack_segment, pack_side, segment_bytes};
use super::panel::Panel;
use super::side::{SIDE_ROW_BYTES, SIDE_SEGMENT_BYTES, row_bytes, side_row_bytes};
use super::{NonFinite, round};

/// Tokens that share one decode of a segment: few enough for their activations to stay in the second-level cache.
const TILE: usize = 64;

/// Tokens that a step of a panel's product takes together.
const STEP: usize = 4;

/// What a call needs besides its operands.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct Buffers {
    /// A segment of a group that is not packed, packed.
    unit: [u8; MAX_SEGMENT_BYTES * MAX_ROWS],
    /// What stands beside a group that is not packed, packed.
    side: [u8; side_row_bytes(hoist_quant::MAX_COLS as usize) * MAX_ROWS],
    panel: Panel,
    sums: [Sums; TILE],
    view: SegmentView,
}

impl Buffers {
    pub(super) fn new() -> Self {
        Self {
            unit: [0; MAX_SEGMENT_BYTES * MAX_ROWS],
            side: [0; side_row_bytes(hoist_quant::MAX_COLS as usize) * MAX_ROWS],
            panel: Panel::ZERO,
            sums: [Sums::ZERO; TILE],
            view: SegmentView::default(),
        }
    }
}

/// The operands of a call.
pub(super) struct Call<'a, 'm, 'o> {
    pub(super) w: &'a QuantMatrix<'m>,
    pub(super) rows: Range<usize>,
    pub(super) x: &'a [Segment],
    pub(super) out: &'a mut Results<'o>,
    pub(super) buffers: &'a mut Buffers,
}

/// Multiplies with the kernels of an instruction set.
pub(super) fn matmul<L: Lanes>(lanes: L, call: Call<'_, '_, '_>) -> Result<(), NonFinite> {
    match call.w.encoding {
        Encoding::Q4_0 => packed::<L, Nibbles<false, false>>(lanes, call),
        Encoding::Q4_1 => packed::<L, Nibbles<false, true>>(lanes, call),
        Encoding::Q5_0 => packed::<L, Nibbles<true, false>>(lanes, call),
        Encoding::Q5_1 => packed::<L, Nibbles<true, true>>(lanes, call),
        Encoding::Q8_0 => packed::<L, Bytes>(lanes, call),
        Encoding::Q4_K => packed::<L, SuperNibbles<false>>(lanes, call),
        Encoding::Q5_K => packed::<L, SuperNibbles<true>>(lanes, call),
        Encoding::Q6_K => packed::<L, SixBits>(lanes, call),
        Encoding::Q2_K => lanes.vectorise(Decoded::<true>(call)),
        _ => lanes.vectorise(Decoded::<false>(call)),
    }
}

fn packed<L: Lanes, C: Codec>(lanes: L, call: Call<'_, '_, '_>) -> Result<(), NonFinite> {
    if call.x.len() == call.w.segments() {
        lanes.vectorise(OneToken::<C> {
            call,
            codec: PhantomData,
        })
    } else {
        lanes.vectorise(Tokens::<C> {
            call,
            codec: PhantomData,
        })
    }
}

/// A group of rows: where they are and what stands beside them.
struct Group<'a> {
    /// The first row.
    row: usize,
    /// Rows that there are; [`Lanes::ROWS`] but at the matrix's end.
    rows: usize,
    /// Their bytes.
    bytes: &'a [u8],
    /// Whether those are packed.
    packed: bool,
}

impl<'a> Group<'a> {
    #[inline(always)]
    fn new<L: Lanes>(w: &QuantMatrix<'a>, row: usize) -> Self {
        let rows = L::ROWS.min(w.rows - row);
        let row_bytes = row_bytes(w.encoding, w.cols);
        let bytes = &w.bytes[row * row_bytes..(row + rows) * row_bytes];
        Self {
            row,
            rows,
            bytes,
            packed: w.packed && rows == L::ROWS,
        }
    }

    /// What stands beside the group, packed; into `buffer`, unless it is already.
    #[inline(always)]
    fn side<'s, L: Lanes>(&self, w: &QuantMatrix<'s>, buffer: &'s mut [u8]) -> &'s [u8] {
        let beside = side_row_bytes(w.cols);
        let side = &w.side[self.row * beside..(self.row + self.rows) * beside];
        if self.packed {
            return side;
        }
        let buffer = &mut buffer[..L::ROWS * beside];
        pack_side(L::ROWS, w.cols, side, buffer);
        buffer
    }

    /// A segment of the group, packed; into `buffer`, unless it is already.
    #[inline(always)]
    fn unit<'s, L: Lanes>(&self, w: &QuantMatrix<'_>, segment: usize, buffer: &'s mut [u8]) -> &'s [u8]
    where
        'a: 's,
    {
        let at = segment_bytes(w.encoding, w.cols, segment);
        let packed = L::ROWS * at.start..L::ROWS * at.end;
        if self.packed {
            return &self.bytes[packed];
        }
        let buffer = &mut buffer[..packed.len()];
        pack_segment(
            w.encoding,
            L::ROWS,
            self.bytes,
            row_bytes(w.encoding, w.cols),
            at,
            buffer,
        );
        buffer
    }
}

/// `E_w`, and `E_w − e` and `E_w − e'` of each segment, of a group of rows.
struct Exponents<'a> {
    rows: &'a [u8],
    segments: &'a [u8],
}

/// Those of one segment.
struct Below<V> {
    scale: V,
    min: V,
}

impl<'a> Exponents<'a> {
    #[inline(always)]
    fn new<L: Lanes>(side: &'a [u8]) -> Self {
        let (rows, segments) = side.split_at(SIDE_ROW_BYTES * L::ROWS);
        Self { rows, segments }
    }

    #[inline(always)]
    fn below<L: Lanes>(&self, l: L, segment: usize) -> Below<L::V> {
        let n = SIDE_SEGMENT_BYTES * L::ROWS;
        let (scale, min) = self.segments[n * segment..n * (segment + 1)].split_at(L::ROWS);
        Below {
            scale: l.load_u8(scale),
            min: l.load_u8(min),
        }
    }

    #[inline(always)]
    fn row(&self, row: usize) -> i32 {
        i16::from_le_bytes([self.rows[2 * row], self.rows[2 * row + 1]]).into()
    }

    /// Rounds a token's sums and writes them.
    #[inline(always)]
    fn finish<L: Lanes>(
        &self,
        group: &Group<'_>,
        sums: &Sums,
        token: usize,
        x: &Segment,
        scale: Option<f32>,
        out: &mut Results<'_>,
    ) -> Result<(), NonFinite> {
        let mut y = [0f32; MAX_ROWS];
        for (row, y) in y[..group.rows].iter_mut().enumerate() {
            *y = round::finish(sums.row(row, L::ROWS), self.row(row) + x.e_max, scale);
        }
        let y = &y[..group.rows];
        out.write(token, group.row, y);
        round::check(y)
    }
}

impl<V: Copy> Below<V> {
    #[inline(always)]
    fn powers<L: Lanes<V = V>>(&self, l: L, e_w: V) -> Powers<L::F> {
        Powers {
            scale: l.pow2(l.sub(self.scale, e_w)),
            min: l.pow2(l.sub(self.min, e_w)),
        }
    }

    /// `T_I − T_J`, added to `acc`.
    #[inline(always)]
    fn shifted<L: Lanes<V = V>>(
        &self,
        l: L,
        acc: Wide<V>,
        i: Wide<V>,
        j: Option<Wide<V>>,
        x: &Segment,
    ) -> Wide<V> {
        let (shift, most) = (l.splat(x.shift as u32), l.splat(63));
        let acc = l.add_wide(acc, l.shift_wide(i, l.min(l.add(self.scale, shift), most)));
        match j {
            Some(j) => l.sub_wide(acc, l.shift_wide(j, l.min(l.add(self.min, shift), most))),
            None => acc,
        }
    }
}

/// One token, straight from the packed bytes.
struct OneToken<'a, 'm, 'o, C> {
    call: Call<'a, 'm, 'o>,
    codec: PhantomData<C>,
}

impl<C: Codec> Job for OneToken<'_, '_, '_, C> {
    type Output = Result<(), NonFinite>;

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) -> Self::Output {
        let Call {
            w,
            rows,
            x,
            out,
            buffers,
        } = self.call;
        for row in rows.step_by(L::ROWS) {
            let group = Group::new::<L>(w, row);
            let side = Exponents::new::<L>(group.side::<L>(w, &mut buffers.side));
            let e_w = l.load_i16(side.rows);
            let mut acc = l.zero_wide();
            for (segment, x) in x.iter().enumerate() {
                let unit = group.unit::<L>(w, segment, &mut buffers.unit);
                let below = side.below(l, segment);
                let product = C::product(l, unit, x, below.powers(l, e_w));
                acc = below.shifted(l, acc, product.i, C::FORM.mins.then_some(product.j), x);
            }
            let mut sums = Sums::ZERO;
            l.store_wide(acc, &mut sums);
            side.finish::<L>(&group, &sums, 0, &x[0], w.scale, out)?;
        }
        Ok(())
    }
}

/// Several tokens, by panels.
struct Tokens<'a, 'm, 'o, C> {
    call: Call<'a, 'm, 'o>,
    codec: PhantomData<C>,
}

impl<C: Codec> Job for Tokens<'_, '_, '_, C> {
    type Output = Result<(), NonFinite>;

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) -> Self::Output {
        let Call {
            w,
            rows,
            x,
            out,
            buffers,
        } = self.call;
        let Buffers {
            unit,
            side,
            panel,
            sums,
            ..
        } = buffers;
        let segments = w.segments();
        for (tile, x) in x.chunks(TILE * segments).enumerate() {
            let sums = &mut sums[..x.len() / segments];
            for row in rows.clone().step_by(L::ROWS) {
                let group = Group::new::<L>(w, row);
                let side = Exponents::new::<L>(group.side::<L>(w, side));
                let e_w = l.load_i16(side.rows);
                sums.fill(Sums::ZERO);
                for segment in 0..segments {
                    let unit = group.unit::<L>(w, segment, unit);
                    let below = side.below(l, segment);
                    let blocks = segment_bytes(w.encoding, w.cols, segment).len()
                        * w.encoding.block_weights() as usize
                        / (32 * w.encoding.block_bytes() as usize);
                    C::fill(l, unit, below.powers(l, e_w), panel);
                    all_tokens::<L, C>(l, panel, blocks, &below, x, segment, sums);
                }
                for (token, (x, sums)) in x.chunks_exact(segments).zip(&*sums).enumerate() {
                    side.finish::<L>(&group, sums, tile * TILE + token, &x[0], w.scale, out)?;
                }
            }
        }
        Ok(())
    }
}

/// Any encoding, by panels of rows decoded one by one.
struct Decoded<'a, 'm, 'o, const MINS: bool>(Call<'a, 'm, 'o>);

impl<const MINS: bool> Job for Decoded<'_, '_, '_, MINS> {
    type Output = Result<(), NonFinite>;

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) -> Self::Output {
        let Call {
            w,
            rows,
            x,
            out,
            buffers,
        } = self.0;
        let Buffers {
            side,
            panel,
            sums,
            view,
            ..
        } = buffers;
        let segments = w.segments();
        for (tile, x) in x.chunks(TILE * segments).enumerate() {
            let sums = &mut sums[..x.len() / segments];
            for row in rows.clone().step_by(L::ROWS) {
                let group = Group::new::<L>(w, row);
                let side = Exponents::new::<L>(group.side::<L>(w, side));
                sums.fill(Sums::ZERO);
                for segment in 0..segments {
                    for r in 0..group.rows {
                        // Rows were read once already, when what is kept beside them was computed.
                        hoist_quant::read_segment(w.encoding, w.row(row + r), segment, view)
                            .map_err(|_| NonFinite)?;
                        panel.set_row::<L>(r, view);
                    }
                    let below = side.below(l, segment);
                    all_tokens::<L, Plain<MINS>>(l, panel, view.len / 32, &below, x, segment, sums);
                }
                for (token, (x, sums)) in x.chunks_exact(segments).zip(&*sums).enumerate() {
                    side.finish::<L>(&group, sums, tile * TILE + token, &x[0], w.scale, out)?;
                }
            }
        }
        Ok(())
    }
}

/// Adds a panel's products with all tokens to their sums.
#[inline(always)]
fn all_tokens<L: Lanes, P: Panelled>(
    l: L,
    panel: &Panel,
    blocks: usize,
    below: &Below<L::V>,
    x: &[Segment],
    segment: usize,
    sums: &mut [Sums],
) {
    let segments = x.len() / sums.len();
    let (steps, rest) = sums.as_chunks_mut::<STEP>();
    let token = |t: usize| &x[t * segments + segment];
    for (step, sums) in steps.iter_mut().enumerate() {
        let t = STEP * step;
        let x = [token(t), token(t + 1), token(t + 2), token(t + 3)];
        some_tokens::<L, P, STEP>(l, panel, blocks, below, x, sums);
    }
    let done = STEP * steps.len();
    for (t, sums) in rest.as_chunks_mut::<1>().0.iter_mut().enumerate() {
        some_tokens::<L, P, 1>(l, panel, blocks, below, [token(done + t)], sums);
    }
}

/// Adds a panel's products with `T` tokens to their sums.
#[inline(always)]
fn some_tokens<L: Lanes, P: Panelled, const T: usize>(
    l: L,
    panel: &Panel,
    blocks: usize,
    below: &Below<L::V>,
    x: [&Segment; T],
    sums: &mut [Sums; T],
) {
    let form = P::FORM;
    let parts = if form.halves { 2 * blocks } else { blocks };
    let block = |part: usize| if form.halves { part / 2 } else { part };
    let mut i = [l.zero_wide(); T];
    let mut j = [l.zero_wide(); T];
    if form.sub_scales {
        let mut dots = [l.splat(0); T];
        for part in 0..parts {
            let sub_scale = panel.scales(l, part);
            let mut factors = [sub_scale; T];
            for t in 0..T {
                factors[t] = l.times(sub_scale, x[t].u_twice[block(part)]);
            }
            let dot = dots_of::<L, P, T>(l, panel, part, &x, &factors);
            for t in 0..T {
                dots[t] = l.add(dots[t], dot[t]);
            }
        }
        if form.zero == 32 {
            let mut zeros = [l.splat(0); T];
            for b in 0..blocks {
                let pair = panel.pairs(l, b);
                for t in 0..T {
                    zeros[t] = l.add(zeros[t], l.madd16(pair, l.splat(x[t].us_halves[b])));
                }
            }
            for t in 0..T {
                dots[t] = l.sub(dots[t], l.shl::<5>(zeros[t]));
            }
        }
        let m = panel.super_scales(l, 0);
        for t in 0..T {
            i[t] = l.mul_add_wide(i[t], dots[t], l.madd16(m, l.splat(x[t].m as u32)));
        }
        if form.mins {
            let mut min_dots = [l.splat(0); T];
            for p in 0..blocks / 2 {
                let pair = panel.mins(l, p);
                for t in 0..T {
                    let u_mins = l.mul16(pair, l.splat(x[t].u_pair[p]));
                    min_dots[t] = l.add(min_dots[t], l.madd16(u_mins, l.splat(x[t].s_pair[p])));
                }
            }
            let m = panel.super_scales(l, 1);
            for t in 0..T {
                j[t] = l.mul_add_wide(j[t], min_dots[t], l.madd16(m, l.splat(x[t].m as u32)));
            }
        }
    } else {
        for part in 0..parts {
            let mut factors = [l.splat(0); T];
            for t in 0..T {
                factors[t] = l.factor(x[t].um_twice[block(part)]);
            }
            let dots = dots_of::<L, P, T>(l, panel, part, &x, &factors);
            let scale = panel.scales(l, part);
            for t in 0..T {
                let mut dot = dots[t];
                if form.zero != 0 {
                    dot = l.sub(dot, l.splat((form.zero * x[t].mus[block(part)]) as u32));
                }
                i[t] = l.mul_add_wide(i[t], dot, scale);
            }
            if form.mins {
                let min = panel.mins(l, part);
                for t in 0..T {
                    let sum = if form.halves {
                        x[t].mus_half[part]
                    } else {
                        x[t].mus[part]
                    };
                    j[t] = l.mul_add_wide(j[t], l.splat(sum as u32), min);
                }
            }
        }
    }
    for t in 0..T {
        let acc = l.load_wide(&sums[t]);
        let acc = below.shifted(l, acc, i[t], form.mins.then_some(j[t]), x[t]);
        l.store_wide(acc, &mut sums[t]);
    }
}

/// Dots of a block or half block, times their factors.
#[inline(always)]
fn dots_of<L: Lanes, P: Panelled, const T: usize>(
    l: L,
    panel: &Panel,
    part: usize,
    x: &[&Segment; T],
    factors: &[L::V; T],
) -> [L::V; T] {
    let form = P::FORM;
    let quads = if form.halves { 4 } else { 8 };
    let first = quads * part;
    let mut acc = [l.splat(0); T];
    if form.dots == 0 {
        for quad in first..first + quads {
            let w = l.prepare_signed(panel.weights(l, quad));
            for t in 0..T {
                acc[t] = l.dot_signed(acc[t], w, x[t].q[quad], factors[t]);
            }
        }
        for t in 0..T {
            let sum = if form.halves {
                x[t].mus_half[part]
            } else {
                x[t].mus[part]
            };
            acc[t] = l.dot_signed_end(acc[t], factors[t], sum);
        }
        return acc;
    }
    let run = if L::NARROW { quads.min(form.dots) } else { quads };
    let mut totals = [l.splat(0); T];
    for start in (first..first + quads).step_by(run) {
        acc = [l.splat(0); T];
        for quad in start..start + run {
            let w = panel.weights(l, quad);
            for t in 0..T {
                acc[t] = l.dot(acc[t], w, x[t].q[quad]);
            }
        }
        for t in 0..T {
            totals[t] = l.add(totals[t], l.dot_end(acc[t], factors[t]));
        }
    }
    totals
}
