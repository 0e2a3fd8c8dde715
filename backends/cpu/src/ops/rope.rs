//! Rope (§4).

use hoist_backend::RopeStyle;

use crate::simd::Kernel;

/// Turns each head of one token in place.
pub(crate) struct Rope<'a> {
    /// `[heads, head_dim]`
    pub(crate) value: &'a mut [f32],
    pub(crate) head_dim: usize,
    /// Cos and sin of each pair at the token's position, one after the other; `n_rot` values.
    pub(crate) table: &'a [f32],
    pub(crate) style: RopeStyle,
}

#[inline(always)]
fn turn(x0: f32, x1: f32, c: f32, s: f32) -> (f32, f32) {
    (x0.mul_add(c, -(x1 * s)), x0.mul_add(s, x1 * c))
}

impl Kernel for Rope<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const F16C: bool>(self) {
        let n_rot = self.table.len();
        let pairs = self.table.as_chunks::<2>().0;
        for head in self.value.chunks_exact_mut(self.head_dim) {
            match self.style {
                RopeStyle::Interleaved => {
                    for ([x0, x1], [c, s]) in head[..n_rot].as_chunks_mut::<2>().0.iter_mut().zip(pairs) {
                        (*x0, *x1) = turn(*x0, *x1, *c, *s);
                    }
                }
                RopeStyle::HalfSplit => {
                    let (first, second) = head[..n_rot].split_at_mut(n_rot / 2);
                    for ((x0, x1), [c, s]) in first.iter_mut().zip(second).zip(pairs) {
                        (*x0, *x1) = turn(*x0, *x1, *c, *s);
                    }
                }
            }
        }
    }
}
