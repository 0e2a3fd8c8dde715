//! §5 and the element-wise operations of §4.

use hoist_backend::{ActivationKind, Result};

use super::arithmetic::times_power_of_two;
use super::deviation::by_contract;
use super::same_length;

/// An f32 written as in C: `significand` holds the hexadecimal digits without the point, `2^exponent` its unit.
const fn hex(significand: i32, exponent: i32) -> f32 {
    let mut x = significand as f32;
    let mut n = exponent;
    while n < 0 {
        x /= 2.0;
        n += 1;
    }
    x
}

const EXP_LOWEST: f32 = -104.0;
const EXP_HIGHEST: f32 = hex(0x162e42e, 6 - 24); // 0x1.62e42ep+6
const LOG2_E: f32 = hex(0x1715476, -24); // 0x1.715476p+0
const ROUNDING: f32 = 12_582_912.0; // 1.5 · 2^23
const LN_2_HIGH: f32 = hex(0x162e430, -1 - 24); // 0x1.62e430p-1
const LN_2_LOW: f32 = hex(0x105c610, -29 - 24); // 0x1.05c610p-29
/// Highest power first.
const EXP_POLYNOMIAL: [f32; 5] = [
    hex(0x16a2352, -10 - 24), // 0x1.6a2352p-10
    hex(0x1123a6c, -7 - 24),  // 0x1.123a6cp-7
    hex(0x15558f4, -5 - 24),  // 0x1.5558f4p-5
    hex(0x1555490, -3 - 24),  // 0x1.555490p-3
    hex(0x1fffffc, -2 - 24),  // 0x1.fffffcp-2
];
/// Highest power first.
const TANH_POLYNOMIAL: [f32; 5] = [
    -hex(0x16e1a18, -8 - 24), // −0x1.6e1a18p-8
    hex(0x150701e, -6 - 24),  // 0x1.50701ep-6
    -hex(0x1b7fa90, -5 - 24), // −0x1.b7fa90p-5
    hex(0x111053c, -3 - 24),  // 0x1.11053cp-3
    -hex(0x155552a, -2 - 24), // −0x1.55552ap-2
];
const GELU_C0: f32 = hex(0x1988454, -24); // 0x1.988454p+0
const GELU_C1: f32 = hex(0x12444f2, -4 - 24); // 0x1.2444f2p-4

/// `a · b + c`, rounded once.
fn fma(a: f32, b: f32, c: f32) -> f32 {
    a.mul_add(b, c)
}

fn horner(coefficients: [f32; 5], x: f32, step: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let [first, rest @ ..] = coefficients;
    rest.into_iter().fold(first, |p, c| step(p, x, c))
}

/// e to the `x`.
pub fn exp(x: f32) -> f32 {
    let x = by_contract!(x.clamp(EXP_LOWEST, EXP_HIGHEST), ExpWithoutClamp => x);
    if x.is_nan() {
        return x;
    }
    let n = by_contract!(
        fma(x, LOG2_E, ROUNDING) - ROUNDING,
        ExpByNearestInteger => (x * LOG2_E).round()
    );
    let r = fma(n, -LN_2_HIGH, x);
    let r = by_contract!(fma(n, LN_2_LOW, r), ExpReducedOnce => r);
    let p = by_contract!(
        horner(EXP_POLYNOMIAL, r, fma),
        ExpHornerWithoutFma => horner(EXP_POLYNOMIAL, r, |a, b, c| a * b + c)
    );
    let y = fma(r * r, p, r) + 1.0;
    let n = n as i32;
    by_contract!(
        (y * power_of_two(n >> 1)) * power_of_two(n - (n >> 1)),
        ExpScaledOnce => y * power_of_two(n)
    )
}

fn power_of_two(n: i32) -> f32 {
    times_power_of_two(1.0, n)
}

/// The hyperbolic tangent.
pub fn tanh(x: f32) -> f32 {
    let a = x.abs();
    let t = if a < by_contract!(0.625, TanhThresholdAtHalf => 0.5) {
        let z = a * a;
        let q = by_contract!(
            horner(TANH_POLYNOMIAL, z, fma),
            TanhHornerWithoutFma => horner(TANH_POLYNOMIAL, z, |a, b, c| a * b + c)
        );
        fma(a * z, q, a)
    } else {
        1.0 - 2.0 / (exp(a + a) + 1.0)
    };
    by_contract!(t.copysign(x), TanhWithoutSign => t)
}

/// The operation Activation.
pub fn activate(kind: ActivationKind, x: &[f32]) -> Vec<f32> {
    let f = match kind {
        ActivationKind::Silu => silu,
        ActivationKind::GeluTanh => gelu_tanh,
    };
    x.iter().map(|x| f(*x)).collect()
}

fn silu(x: f32) -> f32 {
    by_contract!(
        x / (1.0 + exp(-x)),
        SiluByReciprocal => x * (1.0 / (1.0 + exp(-x)))
    )
}

fn gelu_tanh(x: f32) -> f32 {
    let inner = by_contract!(
        fma(x * x, GELU_C1, GELU_C0),
        GeluWithoutFma => x * x * GELU_C1 + GELU_C0
    );
    let u = x * inner;
    x / (1.0 + exp(-u))
}

/// The operation Mul.
///
/// # Errors
/// [`hoist_backend::Error::InvalidArgument`] for unequal lengths.
pub fn mul(a: &[f32], b: &[f32]) -> Result<Vec<f32>> {
    same_length("second factor", a.len(), b.len())?;
    Ok(a.iter().zip(b).map(|(a, b)| a * b).collect())
}

/// The operation Add.
///
/// # Errors
/// As [`mul`].
pub fn add(a: &[f32], b: &[f32]) -> Result<Vec<f32>> {
    same_length("second term", a.len(), b.len())?;
    Ok(a.iter().zip(b).map(|(a, b)| a + b).collect())
}

/// The operation Scale.
pub fn scale(x: &[f32], factor: f32) -> Vec<f32> {
    x.iter().map(|x| x * factor).collect()
}

/// The operation SoftCap.
pub fn soft_cap(x: &[f32], cap: f32) -> Vec<f32> {
    x.iter().map(|x| capped(*x, cap)).collect()
}

/// `cap · tanh(x / cap)`
pub(super) fn capped(x: f32, cap: f32) -> f32 {
    by_contract!(
        cap * tanh(x / cap),
        SoftCapByReciprocal => cap * tanh(x * (1.0 / cap))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_and_tanh_are_near_f64s() {
        assert_eq!(exp(0.0), 1.0);
        let mut worst = 0.0f64;
        for i in -870_000..887_000 {
            let x = i as f32 / 1e4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / exact - 1.0).abs());
        }
        assert!(worst < 1.2e-7, "exp: {worst:e}");
        let mut worst = 0.0f64;
        for i in 1..200_000 {
            let x = i as f32 / 2e4;
            let exact = f64::from(x).tanh();
            worst = worst.max((f64::from(tanh(x)) / exact - 1.0).abs());
            assert_eq!(tanh(-x), -tanh(x));
        }
        assert!(worst < 2.5e-7, "tanh: {worst:e}");
    }

    #[test]
    fn a_nan_is_never_clamped_away() {
        assert!(exp(f32::NAN).is_nan());
        assert!(tanh(f32::NAN).is_nan());
        assert!(exp(f32::INFINITY).is_finite());
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }
}
