//! Gates' non-linearities (§4).

use hoist_backend::ActivationKind;

use crate::ops::elementary::exp;
use crate::simd::Kernel;

/// 2 · sqrt(2 / π): 0x1.988454p+0.
const GELU_C0: f32 = f32::from_bits(0x3fcc_422a);
/// 2 · sqrt(2 / π) · 0.044715, rounded once: 0x1.2444f2p-4.
const GELU_C1: f32 = f32::from_bits(0x3d92_2279);

/// `x · sigmoid(x)`
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// GELU by its tanh approximation, written with exp.
#[inline(always)]
pub(crate) fn gelu_tanh(x: f32) -> f32 {
    let u = x * (x * x).mul_add(GELU_C1, GELU_C0);
    x / (1.0 + exp(-u))
}

/// `out = f(x)`
pub(crate) struct Activation<'a> {
    pub(crate) kind: ActivationKind,
    pub(crate) x: &'a [f32],
    pub(crate) out: &'a mut [f32],
}

impl Kernel for Activation<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const F16C: bool>(self) {
        let pairs = self.out.iter_mut().zip(self.x);
        match self.kind {
            ActivationKind::Silu => pairs.for_each(|(y, x)| *y = silu(*x)),
            ActivationKind::GeluTanh => pairs.for_each(|(y, x)| *y = gelu_tanh(*x)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_constants_are_what_they_are_said_to_be() {
        let c0 = 2.0 * (2.0 / std::f64::consts::PI).sqrt();
        assert_eq!(GELU_C0, c0 as f32);
        assert_eq!(GELU_C1, (c0 * 0.044715) as f32);
    }

    #[test]
    fn gates_are_near_their_definitions() {
        for i in -2000..2000 {
            let x = f64::from(i) / 100.0;
            let silu64 = x / (1.0 + (-x).exp());
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            let gelu64 = 0.5 * x * (1.0 + inner.tanh());
            assert!(
                (f64::from(silu(x as f32)) - silu64).abs() <= 3e-6 * silu64.abs().max(1e-3),
                "{x}"
            );
            assert!(
                (f64::from(gelu_tanh(x as f32)) - gelu64).abs() <= 3e-6 * gelu64.abs().max(1e-1),
                "{x}"
            );
        }
        assert_eq!(silu(0.0), 0.0);
        // Far out the gate is closed, without NaN.
        assert_eq!(
            gelu_tanh(-1e30).abs(),
            (1e30f32 / (1.0 + exp(f32::INFINITY))).abs()
        );
        assert!(silu(f32::NAN).is_nan());
    }
}
