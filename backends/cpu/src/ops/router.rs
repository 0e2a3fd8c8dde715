//! RouterTopK (§4).

use crate::ops::elementary::exp;
use crate::ops::reduce::sum256;
use crate::simd::Kernel;

/// Chooses one token's experts. `logits` is overwritten with probabilities.
pub(crate) struct RouterTopK<'a> {
    /// `[n]`; becomes the probabilities.
    pub(crate) logits: &'a mut [f32],
    pub(crate) normalise: bool,
    /// `[k]`, `k ≤ n`
    pub(crate) experts: &'a mut [u32],
    /// `[k]`
    pub(crate) weights: &'a mut [f32],
}

impl Kernel for RouterTopK<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const F16C: bool>(self) {
        let p = self.logits;
        let max = p.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
        for p in p.iter_mut() {
            *p = exp(*p - max);
        }
        let sum = sum256(p);
        for p in p.iter_mut() {
            *p /= sum;
        }
        for chosen in 0..self.experts.len() {
            let (taken, _) = self.experts.split_at(chosen);
            // Strictly larger, so that the lowest of equals stays.
            let mut best: Option<(usize, f32)> = None;
            for (e, p) in p.iter().enumerate() {
                let larger = best.is_none_or(|(_, b)| *p > b);
                if larger && !taken.contains(&(e as u32)) {
                    best = Some((e, *p));
                }
            }
            if let Some((e, p)) = best {
                self.experts[chosen] = e as u32;
                self.weights[chosen] = p;
            }
        }
        if self.normalise {
            let sum = self.weights.iter().fold(0.0, |sum, w| sum + w);
            for w in self.weights.iter_mut() {
                *w /= sum;
            }
        }
    }
}
