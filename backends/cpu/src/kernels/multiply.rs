//! Rows × tokens, a group of rows at a time.

use std::marker::PhantomData;
use std::ops::Range;

use hoist_backend::Encoding;
use hoist_quant::SegmentView;

use super::activations::{SEGMENT, Segment};
use super::blocks::{AprBytes, Iq4Nl, Mxfp4, Nvfp4, Q1, Q2, Scaled, Tq1, Tq2};
use super::codec::{Bytes, Codec, Form, Nibbles, Panelled, Powers, SixBits, SuperNibbles};
use super::grids::{Iq1S, Iq2S, Iq2Xs, Iq2Xxs, Iq3S, Iq3Xxs};
use super::lanes::{Job, Lanes, MAX_ROWS, Sums, Wide};
use super::matrix::{QuantMatrix, Results};
use super::pack::{MAX_SEGMENT_BYTES, pack_segment, pack_side, segment_bytes};
use super::panel::Panel;
use super::side::{SIDE_ROW_BYTES, SIDE_SEGMENT_BYTES, row_bytes, side_row_bytes};
use super::super_blocks::{Iq4Xs, Q2K, Q3K, Super};
use super::tokens::{self, Dots};
use super::{NonFinite, round};

/// Tokens that share one decode of a segment: few enough for their activations to stay in the second-level cache.
const TILE: usize = 64;

/// Groups of rows that a panel's product takes together, so that what is read of the activations serves both.
pub(super) const PANELS: usize = 2;

/// What a call needs besides its operands.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct Buffers {
    /// A segment of a group that is not packed, packed.
    unit: [u8; MAX_SEGMENT_BYTES * MAX_ROWS],
    /// What stands beside groups that are not packed, packed.
    side: [[u8; side_row_bytes(hoist_quant::MAX_COLS as usize) * MAX_ROWS]; PANELS],
    panels: [Panel; PANELS],
    dots: Dots,
    sums: [[Sums; PANELS]; TILE],
    view: SegmentView,
}

impl Buffers {
    pub(super) fn new() -> Self {
        Self {
            unit: [0; MAX_SEGMENT_BYTES * MAX_ROWS],
            side: [[0; side_row_bytes(hoist_quant::MAX_COLS as usize) * MAX_ROWS]; PANELS],
            panels: [Panel::ZERO; PANELS],
            dots: Dots::ZERO,
            sums: [[Sums::ZERO; PANELS]; TILE],
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
        Encoding::Q2_K => packed::<L, Super<Q2K>>(lanes, call),
        Encoding::Q3_K => packed::<L, Super<Q3K>>(lanes, call),
        Encoding::IQ4_XS => packed::<L, Super<Iq4Xs>>(lanes, call),
        Encoding::IQ4_NL => packed::<L, Scaled<Iq4Nl>>(lanes, call),
        Encoding::MXFP4 => packed::<L, Scaled<Mxfp4>>(lanes, call),
        Encoding::NVFP4 => packed::<L, Scaled<Nvfp4>>(lanes, call),
        Encoding::TQ1_0 => packed::<L, Scaled<Tq1>>(lanes, call),
        Encoding::TQ2_0 => packed::<L, Scaled<Tq2>>(lanes, call),
        Encoding::Q1_0 => packed::<L, Scaled<Q1>>(lanes, call),
        Encoding::Q2_0 => packed::<L, Scaled<Q2>>(lanes, call),
        // Packing gives it Q4_0's nibbles.
        Encoding::APR_Q4 => packed::<L, Nibbles<false, false>>(lanes, call),
        Encoding::APR_Q8 => packed::<L, AprBytes>(lanes, call),
        Encoding::IQ3_S => packed::<L, Super<Iq3S>>(lanes, call),
        Encoding::IQ3_XXS => packed::<L, Super<Iq3Xxs>>(lanes, call),
        Encoding::IQ2_S => packed::<L, Super<Iq2S>>(lanes, call),
        Encoding::IQ2_XS => packed::<L, Super<Iq2Xs>>(lanes, call),
        Encoding::IQ2_XXS => packed::<L, Super<Iq2Xxs>>(lanes, call),
        Encoding::IQ1_S => packed::<L, Super<Iq1S>>(lanes, call),
        _ => lanes.vectorise(Tokens::<Plain>::of(call)),
    }
}

fn packed<L: Lanes, C: Codec>(lanes: L, call: Call<'_, '_, '_>) -> Result<(), NonFinite> {
    if call.x.len() == call.w.segments() {
        lanes.vectorise(OneToken::<C>::of(call))
    } else {
        lanes.vectorise(Tokens::<Packed<C>>::of(call))
    }
}

/// A group of rows.
struct Group<'a> {
    /// The first row.
    row: usize,
    /// Rows that there are: [`Lanes::ROWS`], or fewer at the matrix's end.
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
        let packed = w.packed && rows == L::ROWS;
        Self {
            row,
            rows,
            bytes,
            packed,
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
    fn unit<'s, L: Lanes>(&self, l: L, w: &QuantMatrix<'_>, segment: usize, buffer: &'s mut [u8]) -> &'s [u8]
    where
        'a: 's,
    {
        let at = segment_bytes(w.encoding, w.cols, segment);
        let packed = L::ROWS * at.start..L::ROWS * at.end;
        if self.packed {
            return &self.bytes[packed];
        }
        // A processor does not foresee which row's segment comes next: an equal share of the next group is asked for.
        let row_bytes = row_bytes(w.encoding, w.cols);
        let next = (self.row + L::ROWS) * row_bytes;
        if let Some(share) = w.bytes.get(next + packed.start..next + packed.end) {
            share.chunks(64).for_each(|line| l.prefetch(line));
        }
        let buffer = &mut buffer[..packed.len()];
        pack_segment(w.encoding, L::ROWS, self.bytes, row_bytes, at, buffer);
        buffer
    }
}

/// `E_w`, and `E_w − e` and `E_w − e'` of each segment, of a group of rows.
struct Exponents<'a> {
    rows: &'a [u8],
    segments: &'a [u8],
}

/// `E_w − e` and `E_w − e'` of one segment.
#[derive(Clone, Copy)]
pub(super) struct Below<V> {
    scale: V,
    min: V,
}

impl<V: Copy> Below<V> {
    #[inline(always)]
    fn powers<L: Lanes<V = V>>(&self, l: L, e_w: V, shift: i32) -> Powers<L> {
        Powers {
            scale: l.pow2(l.add(l.sub(self.scale, e_w), l.splat(shift as u32))),
            min: l.pow2(l.sub(self.min, e_w)),
            exponent: l.sub(e_w, self.scale),
        }
    }

    /// `acc + T_I − T_J`, from `m_a · I` and `m_a · J`.
    #[inline(always)]
    pub(super) fn shifted<L: Lanes<V = V>>(
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

    /// Rounds a token's sums and writes them; keeps the bits of the largest magnitude in `largest`.
    #[inline(always)]
    fn finish<L: Lanes>(
        &self,
        l: L,
        (w, group): (&QuantMatrix<'_>, &Group<'_>),
        acc: Wide<L::V>,
        (token, x): (usize, &Segment),
        out: &mut Results<'_>,
        largest: &mut u32,
    ) {
        let mut y = [0f32; MAX_ROWS];
        let y = &mut y[..L::ROWS];
        let exponents = l.add(l.load_i16(self.rows), l.splat(x.e_max as u32));
        if w.scale.is_some() || !l.round(acc, exponents, y) {
            let mut sums = Sums::ZERO;
            l.store_wide(acc, &mut sums);
            for (row, (y, e)) in y.iter_mut().zip(self.rows.as_chunks::<2>().0).enumerate() {
                let exponent = i32::from(i16::from_le_bytes(*e)) + x.e_max;
                *y = round::finish(sums.row(row, L::ROWS), exponent, w.scale);
            }
        }
        // Rows that are missing have sums of 0.
        *largest = y
            .iter()
            .fold(*largest, |most, y| most.max(y.to_bits() & 0x7fff_ffff));
        if group.rows == L::ROWS {
            out.write(token, group.row, y);
        } else {
            out.write(token, group.row, &y[..group.rows]);
        }
    }
}

/// Whether results whose largest magnitude has these bits are finite.
fn check(largest: u32) -> Result<(), NonFinite> {
    if largest < f32::INFINITY.to_bits() {
        Ok(())
    } else {
        Err(NonFinite)
    }
}

/// One token, straight from the packed bytes.
struct OneToken<'a, 'm, 'o, C> {
    call: Call<'a, 'm, 'o>,
    codec: PhantomData<C>,
}

impl<'a, 'm, 'o, C: Codec> OneToken<'a, 'm, 'o, C> {
    fn of(call: Call<'a, 'm, 'o>) -> Self {
        Self {
            call,
            codec: PhantomData,
        }
    }
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
        let mut largest = 0;
        for row in rows.step_by(L::ROWS) {
            let group = Group::new::<L>(w, row);
            let side = Exponents::new::<L>(group.side::<L>(w, &mut buffers.side[0]));
            let e_w = l.load_i16(side.rows);
            let mut acc = l.zero_wide();
            for (segment, x) in x.iter().enumerate() {
                let unit = group.unit::<L>(l, w, segment, &mut buffers.unit);
                let below = side.below(l, segment);
                let product = C::product(l, unit, x, below.powers(l, e_w, C::FORM.shift));
                acc = below.shifted(l, acc, product.i, C::FORM.mins.then_some(product.j), x);
            }
            side.finish(l, (w, &group), acc, (0, &x[0]), out, &mut largest);
        }
        check(largest)
    }
}

/// Whatever decodes a segment of a group into a panel.
trait Fill: Panelled {
    fn fill<L: Lanes>(
        l: L,
        operands: (&QuantMatrix<'_>, &Group<'_>, usize),
        powers: Powers<L>,
        scratch: (&mut [u8], &mut SegmentView),
        panel: &mut Panel,
    ) -> Result<(), NonFinite>;
}

/// Packed encodings.
struct Packed<C>(PhantomData<C>);

impl<C: Codec> Panelled for Packed<C> {
    const FORM: Form = C::FORM;
}

impl<C: Codec> Fill for Packed<C> {
    #[inline(always)]
    fn fill<L: Lanes>(
        l: L,
        (w, group, segment): (&QuantMatrix<'_>, &Group<'_>, usize),
        powers: Powers<L>,
        (unit, _): (&mut [u8], &mut SegmentView),
        panel: &mut Panel,
    ) -> Result<(), NonFinite> {
        C::fill(l, group.unit::<L>(l, w, segment, unit), powers, panel);
        Ok(())
    }
}

/// Any encoding, decoded row by row to plain integers.
struct Plain;

impl Panelled for Plain {
    const FORM: Form = Form {
        dots: 0,
        zero: 0,
        halves: true,
        mins: false,
        sub_scales: false,
        shift: 0,
    };
}

impl Fill for Plain {
    #[inline(always)]
    fn fill<L: Lanes>(
        _: L,
        (w, group, segment): (&QuantMatrix<'_>, &Group<'_>, usize),
        _: Powers<L>,
        (_, view): (&mut [u8], &mut SegmentView),
        panel: &mut Panel,
    ) -> Result<(), NonFinite> {
        for r in 0..L::ROWS {
            if r < group.rows {
                // Rows were read once already, when what is kept beside them was computed.
                hoist_quant::read_segment(w.encoding, w.row(group.row + r), segment, view)
                    .map_err(|_| NonFinite)?;
            } else {
                *view = SegmentView::default();
            }
            panel.set_row::<L>(r, view);
        }
        Ok(())
    }
}

/// Any number of tokens, by panels.
struct Tokens<'a, 'm, 'o, P> {
    call: Call<'a, 'm, 'o>,
    fill: PhantomData<P>,
}

impl<'a, 'm, 'o, P: Fill> Tokens<'a, 'm, 'o, P> {
    fn of(call: Call<'a, 'm, 'o>) -> Self {
        Self {
            call,
            fill: PhantomData,
        }
    }
}

impl<P: Fill> Job for Tokens<'_, '_, '_, P> {
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
        let mut largest = 0;
        for (tile, x) in x.chunks(TILE * w.segments()).enumerate() {
            let tile = (tile * TILE, x);
            let mut row = rows.start;
            while row < rows.end {
                if rows.end - row > L::ROWS {
                    some_rows::<L, P, PANELS>(l, (w, row), tile, out, buffers, &mut largest)?;
                    row += PANELS * L::ROWS;
                } else {
                    some_rows::<L, P, 1>(l, (w, row), tile, out, buffers, &mut largest)?;
                    row += L::ROWS;
                }
            }
        }
        check(largest)
    }
}

/// `N` groups of rows from `row` on × a tile of tokens, of which the first is `first`.
#[inline(always)]
fn some_rows<L: Lanes, P: Fill, const N: usize>(
    l: L,
    (w, row): (&QuantMatrix<'_>, usize),
    (first, x): (usize, &[Segment]),
    out: &mut Results<'_>,
    buffers: &mut Buffers,
    largest: &mut u32,
) -> Result<(), NonFinite> {
    let segments = w.segments();
    let Buffers {
        unit,
        side,
        panels,
        dots,
        sums,
        view,
    } = buffers;
    let [side0, side1] = side;
    let groups = [
        Group::new::<L>(w, row),
        Group::new::<L>(w, row + (N - 1) * L::ROWS),
    ];
    let sides = [
        Exponents::new::<L>(groups[0].side::<L>(w, side0)),
        Exponents::new::<L>(groups[1].side::<L>(w, side1)),
    ];
    let sums = &mut sums[..x.len() / segments];
    sums.fill([Sums::ZERO; PANELS]);
    for segment in 0..segments {
        let below = [sides[0].below(l, segment), sides[1].below(l, segment)];
        for n in 0..N {
            let powers = below[n].powers(l, l.load_i16(sides[n].rows), P::FORM.shift);
            P::fill(
                l,
                (w, &groups[n], segment),
                powers,
                (&mut unit[..], view),
                &mut panels[n],
            )?;
        }
        let blocks = (w.cols - SEGMENT * segment).min(SEGMENT) / 32;
        tokens::add_products::<L, P, N>(l, panels, &below, blocks, (x, segment), dots, sums);
    }
    for (token, (x, sums)) in x.chunks_exact(segments).zip(&*sums).enumerate() {
        for n in 0..N {
            let acc = l.load_wide(&sums[n]);
            sides[n].finish(l, (w, &groups[n]), acc, (first + token, &x[0]), out, largest);
        }
    }
    Ok(())
}
