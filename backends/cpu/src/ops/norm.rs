//! RmsNorm and LayerNorm (§4).

use crate::ops::reduce::{sum256, sum256_squares};
use crate::simd::Kernel;

/// RmsNorm of each vector of `weight.len()` elements.
pub(crate) struct RmsNorm<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
    pub(crate) out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const F16C: bool>(self) {
        let n = self.weight.len();
        for (x, out) in self.x.chunks_exact(n).zip(self.out.chunks_exact_mut(n)) {
            let ss = sum256_squares(x);
            let inv = 1.0 / (ss / n as f32 + self.eps).sqrt();
            for ((y, x), g) in out.iter_mut().zip(x).zip(self.weight) {
                *y = (x * inv) * g;
            }
        }
    }
}

/// LayerNorm of each vector of `weight.len()` elements.
pub(crate) struct LayerNorm<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) bias: &'a [f32],
    pub(crate) eps: f32,
    pub(crate) out: &'a mut [f32],
}

impl Kernel for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const F16C: bool>(self) {
        let n = self.weight.len();
        for (x, out) in self.x.chunks_exact(n).zip(self.out.chunks_exact_mut(n)) {
            let mean = sum256(x) / n as f32;
            for (c, x) in out.iter_mut().zip(x) {
                *c = x - mean;
            }
            let var = sum256_squares(out) / n as f32;
            let inv = 1.0 / (var + self.eps).sqrt();
            for ((y, g), b) in out.iter_mut().zip(self.weight).zip(self.bias) {
                *y = (*y * inv).mul_add(*g, *b);
            }
        }
    }
}
