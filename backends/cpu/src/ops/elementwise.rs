//! Mul, Add, Scale, SoftCap, biases, and sums of experts (§4).

use crate::ops::elementary::soft_cap;
use crate::simd::Kernel;

/// `out = a · b`
pub(crate) struct Mul<'a> {
    pub(crate) a: &'a [f32],
    pub(crate) b: &'a [f32],
    pub(crate) out: &'a mut [f32],
}

impl Kernel for Mul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const F16C: bool>(self) {
        for ((y, a), b) in self.out.iter_mut().zip(self.a).zip(self.b) {
            *y = a * b;
        }
    }
}

/// `out = a + b`
pub(crate) struct Add<'a> {
    pub(crate) a: &'a [f32],
    pub(crate) b: &'a [f32],
    pub(crate) out: &'a mut [f32],
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const F16C: bool>(self) {
        for ((y, a), b) in self.out.iter_mut().zip(self.a).zip(self.b) {
            *y = a + b;
        }
    }
}

/// `y = y + x`, for each vector of `x.len()` elements: addition commutes, so that it serves `a + b` in place and biases.
pub(crate) struct AddTo<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) y: &'a mut [f32],
}

impl Kernel for AddTo<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const F16C: bool>(self) {
        for y in self.y.chunks_exact_mut(self.x.len()) {
            for (y, x) in y.iter_mut().zip(self.x) {
                *y += x;
            }
        }
    }
}

/// `y = 2 y`: Add with both inputs and the output the same.
pub(crate) struct Double<'a> {
    pub(crate) y: &'a mut [f32],
}

impl Kernel for Double<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const F16C: bool>(self) {
        for y in self.y {
            *y += *y;
        }
    }
}

/// `out = x · factor`
pub(crate) struct Scale<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) factor: f32,
    pub(crate) out: &'a mut [f32],
}

impl Kernel for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const F16C: bool>(self) {
        for (y, x) in self.out.iter_mut().zip(self.x) {
            *y = x * self.factor;
        }
    }
}

/// `out = cap · tanh(x / cap)`
pub(crate) struct SoftCap<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) cap: f32,
    pub(crate) out: &'a mut [f32],
}

impl Kernel for SoftCap<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const F16C: bool>(self) {
        for (y, x) in self.out.iter_mut().zip(self.x) {
            *y = soft_cap(*x, self.cap);
        }
    }
}

/// One token's chosen experts, summed in ascending order of their numbers.
pub(crate) struct WeightedSum<'a> {
    /// `[k, n]`
    pub(crate) x: &'a [f32],
    /// `[k]`, all different
    pub(crate) experts: &'a [u32],
    /// `[k]`
    pub(crate) weights: &'a [f32],
    /// `[n]`
    pub(crate) out: &'a mut [f32],
}

impl Kernel for WeightedSum<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const F16C: bool>(self) {
        let n = self.out.len();
        let mut before: Option<u32> = None;
        while let Some((slot, expert)) = next_expert(self.experts, before) {
            let x = &self.x[slot * n..(slot + 1) * n];
            let w = self.weights[slot];
            if before.is_none() {
                for (y, x) in self.out.iter_mut().zip(x) {
                    *y = w * x;
                }
            } else {
                for (y, x) in self.out.iter_mut().zip(x) {
                    *y = w.mul_add(*x, *y);
                }
            }
            before = Some(expert);
        }
    }
}

/// The slot of the lowest expert above `before`.
#[inline(always)]
fn next_expert(experts: &[u32], before: Option<u32>) -> Option<(usize, u32)> {
    let above = experts
        .iter()
        .copied()
        .enumerate()
        .filter(|(_, e)| before.is_none_or(|b| *e > b));
    above.min_by_key(|(_, e)| *e)
}

/// Whether all values are numbers: no exponent is 255.
pub(crate) struct AllFinite<'a>(pub(crate) &'a [f32]);

impl Kernel for AllFinite<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<const F16C: bool>(self) -> bool {
        // A maximum rather than an early exit, so that it vectorises.
        let largest = self
            .0
            .iter()
            .fold(0, |max, x| (x.to_bits() & 0x7fff_ffff).max(max));
        largest < f32::INFINITY.to_bits()
    }
}
