//! Float matrix × activation (§2).

use crate::ops::element::{Element, LANES};
use crate::ops::reduce::{dot64, fold};
use crate::simd::Kernel;

/// Vectors whose accumulators are in registers together.
const VECTORS: usize = 4;

/// Rows of a matrix `[rows, cols]` × vectors.
pub(crate) struct Rows<'a, E, W> {
    /// The rows, canonical: `[n, cols]`.
    pub(crate) w: &'a [E],
    pub(crate) cols: usize,
    /// `[vectors, cols]`
    pub(crate) x: &'a [f32],
    /// Takes (vector, row among these, result).
    pub(crate) out: W,
}

impl<E: Element, W: FnMut(usize, usize, f32)> Kernel for Rows<'_, E, W> {
    type Output = ();

    #[inline(always)]
    fn run<const F16C: bool>(mut self) {
        let cols = self.cols;
        // As many vectors as stay in the cache while all rows pass over them.
        let together = ((128 << 10) / (4 * cols)).next_multiple_of(VECTORS).max(VECTORS);
        for (block, x) in self.x.chunks(together * cols).enumerate() {
            for (r, w) in self.w.chunks_exact(cols).enumerate() {
                let mut t = block * together;
                let mut x = x;
                while let Some((four, rest)) = x.split_at_checked(VECTORS * cols) {
                    let y = dot64::<E, VECTORS, F16C>(
                        w,
                        std::array::from_fn(|i| &four[i * cols..(i + 1) * cols]),
                    );
                    for (i, y) in y.into_iter().enumerate() {
                        (self.out)(t + i, r, y);
                    }
                    t += VECTORS;
                    x = rest;
                }
                for x in x.chunks_exact(cols) {
                    let [y] = dot64::<E, 1, F16C>(w, [x]);
                    (self.out)(t, r, y);
                    t += 1;
                }
            }
        }
    }
}

/// Up to sixteen columns of a transposed matrix `[cols, rows]` × one vector.
pub(crate) struct Columns<'a, E> {
    /// The whole matrix.
    pub(crate) w: &'a [E],
    /// Output dimension: elements from one input's weights to the next one's.
    pub(crate) rows: usize,
    /// First output.
    pub(crate) first: usize,
    /// Outputs, up to [`LANES`].
    pub(crate) n: usize,
    pub(crate) x: &'a [f32],
}

impl<E: Element> Kernel for Columns<'_, E> {
    type Output = [f32; LANES];

    #[inline(always)]
    fn run<const F16C: bool>(self) -> [f32; LANES] {
        let mut acc = [[0.0f32; LANES]; 64];
        for (i, x) in self.x.iter().enumerate() {
            let at = i * self.rows + self.first;
            let mut w = [E::zeroed(); LANES];
            w[..self.n].copy_from_slice(&self.w[at..at + self.n]);
            let w = E::widen_lanes::<F16C>(&w);
            let acc = &mut acc[i % 64];
            for l in 0..LANES {
                acc[l] = w[l].mul_add(*x, acc[l]);
            }
        }
        std::array::from_fn(|l| fold(acc.map(|a| a[l])))
    }
}
