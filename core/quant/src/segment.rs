//! Quantised rows as the integers of `docs/numerics.md` §1.

use hoist_backend::Encoding;

use crate::codec::{ScaledBlock, SuperBlock, Visitor, visit};
use crate::finite::check_finite_blocks;
use crate::scale::{Scale, f16_exponent};
use crate::{Error, Result, apr};

/// Weights of a segment; the last one of a row may have fewer.
pub const SEGMENT_WEIGHTS: usize = 256;

/// The largest input dimension of a quantised matrix under the numerics contract.
pub const MAX_COLS: u64 = 131_072;

/// A segment's weights as integers: `value_i = 2^e · c_h · w_i − 2^e_min · k_h`, where `h = i / 16`.
///
/// `c` and `k` are given for half blocks of 16 in every encoding, so that one loop reads them all; unless `halves`, those
/// of a block's two halves are equal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentView {
    /// Weights in this segment: 256, or fewer, a multiple of 32, at the end of a row.
    pub len: usize,
    /// `w_i`; zero from `len` on.
    pub weights: [i8; SEGMENT_WEIGHTS],
    /// Exponent of scales.
    pub e: i16,
    /// `c`, of 16 weights each; zero past `len`.
    pub c: [i32; 16],
    /// Exponent of mins, written `e'` in the contract; equal to `e` where there are none.
    pub e_min: i16,
    /// `k`, of 16 weights each; zero past `len`, and where there are no mins.
    pub k: [i32; 16],
    /// Whether the halves of a block have scales (and mins) of their own.
    pub halves: bool,
    /// Whether the encoding has mins.
    pub has_mins: bool,
}

impl Default for SegmentView {
    fn default() -> Self {
        Self {
            len: 0,
            weights: [0; SEGMENT_WEIGHTS],
            e: 0,
            c: [0; 16],
            e_min: 0,
            k: [0; 16],
            halves: false,
            has_mins: false,
        }
    }
}

impl SegmentView {
    /// The value of weight `i` as the contract reads it, in f64: exact without mins, otherwise rounded once.
    pub fn value(&self, i: usize) -> f64 {
        let half = i / 16;
        let scaled = f64::from(self.c[half]) * f64::from(self.weights[i]);
        scaled * 2f64.powi(self.e.into()) - f64::from(self.k[half]) * 2f64.powi(self.e_min.into())
    }
}

/// Segments of a row of `cols` weights.
pub fn segments(cols: usize) -> usize {
    cols.div_ceil(SEGMENT_WEIGHTS)
}

/// Whether the contract multiplies with quantised matrices of that input dimension: a positive multiple of 32 and of the
/// encoding's block, up to [`MAX_COLS`].
///
/// # Errors
/// [`Error::NotQuantized`], [`Error::InputDimension`].
pub fn check_input_dimension(encoding: Encoding, cols: u64) -> Result<()> {
    if !encoding.is_quantized() {
        return Err(Error::NotQuantized { encoding });
    }
    // Blocks are powers of two, so that the larger number is a multiple of the smaller.
    let multiple = encoding.block_weights().max(32);
    if cols == 0 || !cols.is_multiple_of(multiple) || cols > MAX_COLS {
        return Err(Error::InputDimension {
            encoding,
            multiple,
            limit: MAX_COLS,
            cols,
        });
    }
    Ok(())
}

/// Reads segment `segment` of a row into `view`, all of whose fields are set.
///
/// `row` are the row's bytes, all of them and no others: without the prefix in front of an [`Encoding::APR_Q8`] matrix,
/// whose scale multiplies results at the end ([`crate::matrix_scale`]).
///
/// # Errors
/// [`Error::NotQuantized`], [`Error::PartialBlock`], [`Error::InputDimension`], [`Error::SegmentOutOfRange`];
/// [`Error::NonFinite`] for a scale of this segment that is NaN or infinite, with its offset in `row`.
pub fn read_segment(encoding: Encoding, row: &[u8], segment: usize, view: &mut SegmentView) -> Result<()> {
    let cols = cols_of(encoding, row)?;
    if segment >= segments(cols) {
        return Err(Error::SegmentOutOfRange {
            segment,
            segments: segments(cols),
        });
    }
    let block_weights = encoding.block_weights() as usize;
    let first = segment * SEGMENT_WEIGHTS;
    let len = (cols - first).min(SEGMENT_WEIGHTS);
    // Segments are whole blocks: no block is longer, and all are powers of two.
    let at = |weights: usize| weights / block_weights * encoding.block_bytes() as usize;
    let blocks = &row[at(first)..at(first + len)];
    check_finite_blocks(encoding, blocks, at(first) as u64)?;

    *view = SegmentView {
        len,
        ..SegmentView::default()
    };
    if encoding == Encoding::APR_Q8 {
        view.c[..len.div_ceil(16)].fill(1);
        for (w, q) in view.weights.iter_mut().zip(blocks) {
            *w = *q as i8;
        }
        return Ok(());
    }
    visit(encoding, ReadSegment { blocks, view }).ok_or(Error::NotQuantized { encoding })
}

/// `E_w` of a row: the largest `e` or `e_min` of its segments. `row` is as for [`read_segment`].
///
/// # Errors
/// As [`read_segment`].
pub fn row_exponent(encoding: Encoding, row: &[u8]) -> Result<i16> {
    cols_of(encoding, row)?;
    check_finite_blocks(encoding, row, 0)?;
    if encoding == Encoding::APR_Q8 {
        return Ok(0);
    }
    visit(encoding, RowExponent { row }).ok_or(Error::NotQuantized { encoding })
}

/// The f32 that results of a multiplication with this matrix are multiplied with at the end: the scale in front of an
/// [`Encoding::APR_Q8`] matrix; `None` for every other encoding.
///
/// # Errors
/// [`Error::PartialBlock`] if the matrix is too short for it, [`Error::NonFinite`].
pub fn matrix_scale(encoding: Encoding, matrix: &[u8]) -> Result<Option<f32>> {
    if encoding != Encoding::APR_Q8 {
        return Ok(None);
    }
    if matrix.len() < apr::APR_Q8_PREFIX {
        return Err(Error::PartialBlock {
            encoding,
            block: apr::APR_Q8_PREFIX as u64,
            found: matrix.len() as u64,
        });
    }
    let scale = apr::apr_q8_scale(matrix);
    if scale.is_finite() {
        Ok(Some(scale))
    } else {
        Err(Error::NonFinite { encoding, offset: 0 })
    }
}

/// Columns of a row of that many bytes, if the contract accepts them.
fn cols_of(encoding: Encoding, row: &[u8]) -> Result<usize> {
    if !encoding.is_quantized() {
        return Err(Error::NotQuantized { encoding });
    }
    let (block, len) = (encoding.block_bytes(), row.len() as u64);
    if !len.is_multiple_of(block) {
        return Err(Error::PartialBlock {
            encoding,
            block,
            found: len,
        });
    }
    let cols = (len / block).saturating_mul(encoding.block_weights());
    check_input_dimension(encoding, cols)?;
    Ok(cols as usize)
}

/// Room below the largest scale of a segment: other scales are exact while they are within 2^8 of it.
const ALIGNED_BITS: i16 = 8;

/// `(m · 2^8) >> min(e* − e, 31)`, rounding down: `scale` as an integer multiple of `2^(e* − 8)`.
fn aligned(scale: Scale, largest: i16) -> i32 {
    (i32::from(scale.m) << ALIGNED_BITS) >> (largest - scale.e).min(31)
}

struct ReadSegment<'a> {
    /// The segment's blocks.
    blocks: &'a [u8],
    view: &'a mut SegmentView,
}

impl Visitor for ReadSegment<'_> {
    type Output = ();

    fn scaled<C: ScaledBlock<B, W, S>, const B: usize, const W: usize, const S: usize>(self) {
        let (blocks, view) = (self.blocks.as_chunks::<B>().0, self.view);
        view.halves = W / S < 32;
        view.has_mins = C::MINS;

        let scales = || blocks.iter().flat_map(|block| C::scales(block));
        let e_star = scales().map(|scale| scale.e).max().unwrap_or_default();
        view.e = e_star - ALIGNED_BITS;
        view.e_min = view.e;
        for (scale, c) in scales().zip(view.c.chunks_exact_mut(W / S / 16)) {
            c.fill(aligned(scale, e_star));
        }
        if C::MINS {
            let mins = || blocks.iter().map(|block| C::min(block));
            let e_star = mins().map(|min| min.e).max().unwrap_or_default();
            view.e_min = e_star - ALIGNED_BITS;
            for (min, k) in mins().zip(view.k.chunks_exact_mut(W / 16)) {
                k.fill(aligned(min, e_star));
            }
        }
        for (block, codes) in blocks.iter().zip(view.weights.as_chunks_mut::<W>().0) {
            C::codes(block, codes);
        }
    }

    fn super_block<C: SuperBlock<B>, const B: usize>(self) {
        let view = self.view;
        let Some(block) = self.blocks.as_chunks::<B>().0.first() else {
            return;
        };
        view.halves = C::HALVES;
        view.has_mins = C::MINS;

        let d = Scale::from_f16(C::d(block));
        view.e = d.e + C::SHIFT;
        view.c = C::subs(block).map(|sub| i32::from(d.m) * i32::from(sub));
        view.e_min = view.e;
        if C::MINS {
            let dmin = Scale::from_f16(C::dmin(block));
            view.e_min = dmin.e;
            view.k = C::mins(block).map(|min| i32::from(dmin.m) * i32::from(min));
        }
        C::codes(block, &mut view.weights);
    }
}

struct RowExponent<'a> {
    row: &'a [u8],
}

impl Visitor for RowExponent<'_> {
    type Output = i16;

    fn scaled<C: ScaledBlock<B, W, S>, const B: usize, const W: usize, const S: usize>(self) -> i16 {
        let of_block = |block| {
            let scales = C::scales(block).iter().fold(i16::MIN, |e, scale| e.max(scale.e));
            if C::MINS {
                scales.max(C::min(block).e)
            } else {
                scales
            }
        };
        let blocks = self.row.as_chunks::<B>().0.iter();
        blocks.map(of_block).max().unwrap_or_default() - ALIGNED_BITS
    }

    fn super_block<C: SuperBlock<B>, const B: usize>(self) -> i16 {
        let of_block = |block| {
            let e = f16_exponent(C::d(block)) + C::SHIFT;
            if C::MINS {
                e.max(f16_exponent(C::dmin(block)))
            } else {
                e
            }
        };
        let blocks = self.row.as_chunks::<B>().0.iter();
        blocks.map(of_block).max().unwrap_or_default()
    }
}
