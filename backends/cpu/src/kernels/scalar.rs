//! The reference: reads like the contract.

use std::ops::Range;

use hoist_quant::SegmentView;

use super::activations::{BLOCKS, Segment};
use super::matrix::{QuantMatrix, Results};
use super::{NonFinite, round};

/// Tokens that share one decode of a segment.
const TILE: usize = 64;

pub(super) fn matmul(
    w: &QuantMatrix<'_>,
    rows: Range<usize>,
    x: &[Segment],
    out: &mut Results<'_>,
) -> Result<(), NonFinite> {
    let segments = w.segments();
    let mut view = SegmentView::default();
    for row in rows {
        let bytes = w.row(row);
        let e_w = w.row_exponent(row);
        for (tile, x) in x.chunks(TILE * segments).enumerate() {
            let mut sums = [0i64; TILE];
            for segment in 0..segments {
                // Rows were read once already, when what is kept beside them was computed.
                hoist_quant::read_segment(w.encoding, bytes, segment, &mut view).map_err(|_| NonFinite)?;
                for (x, acc) in x.chunks_exact(segments).zip(&mut sums) {
                    *acc += segment_sum(&view, &x[segment], e_w);
                }
            }
            for (token, (x, acc)) in x.chunks_exact(segments).zip(sums).enumerate() {
                let y = round::finish(acc, e_w + x[0].e_max, w.scale);
                round::check(&[y])?;
                out.write(tile * TILE + token, row, &[y]);
            }
        }
    }
    Ok(())
}

/// `T_I − T_J` of one row, token and segment.
fn segment_sum(w: &SegmentView, x: &Segment, e_w: i32) -> i64 {
    let q: &[i8] = bytemuck::cast_slice(&x.q);
    let (mut i_sum, mut j_sum) = (0i64, 0i64);
    for half in 0..2 * BLOCKS {
        let at = 16 * half..16 * half + 16;
        let dot: i32 = w.weights[at.clone()]
            .iter()
            .zip(&q[at.clone()])
            .map(|(w, q)| i32::from(*w) * i32::from(*q))
            .sum();
        let s: i32 = q[at].iter().map(|q| i32::from(*q)).sum();
        let u = i64::from(x.u_twice[half / 2] as i16);
        i_sum += u * i64::from(w.c[half]) * i64::from(dot);
        j_sum += u * i64::from(w.k[half]) * i64::from(s);
    }
    let shifted = |sum: i64, e: i16| (i64::from(x.m) * sum) >> (e_w - i32::from(e) + x.shift).min(63);
    shifted(i_sum, w.e) - shifted(j_sum, w.e_min)
}
