//! The contract's elementary functions over slices, for those who want to check them by themselves.

use crate::ops::elementary;
use crate::simd::{Kernel, Level};

/// Replaces every `x` by `e^x`, as §5 of the contract defines it; `force_scalar`: by portable code.
pub fn exp(values: &mut [f32], force_scalar: bool) {
    level(force_scalar).run(Each {
        values,
        f: elementary::exp,
    });
}

/// Replaces every `x` by its hyperbolic tangent, as §5 of the contract defines it; `force_scalar`: by portable code.
pub fn tanh(values: &mut [f32], force_scalar: bool) {
    level(force_scalar).run(Each {
        values,
        f: elementary::tanh,
    });
}

fn level(force_scalar: bool) -> Level {
    if force_scalar {
        Level::PORTABLE
    } else {
        Level::detect()
    }
}

struct Each<'a, F> {
    values: &'a mut [f32],
    f: F,
}

impl<F: Fn(f32) -> f32> Kernel for Each<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<const F16C: bool>(self) {
        for x in self.values {
            *x = (self.f)(*x);
        }
    }
}
