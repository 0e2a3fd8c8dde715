//! The end of §1.3: from the exact sum to f32.

use super::NonFinite;

/// `acc` rounded to f32, times `2^exponent`, rounded once more; then times the matrix's scale, if it has one.
#[inline(always)]
pub(super) fn finish(acc: i64, exponent: i32, scale: Option<f32>) -> f32 {
    let y = scaled(acc, exponent);
    match scale {
        Some(scale) => y * scale,
        None => y,
    }
}

/// The product is exact in f64, whose exponents reach far past any sum of ours (`|exponent| < 400`), so that only the
/// narrowing rounds: to nearest even, with gradual underflow. A sum of 0 gives +0.
#[inline(always)]
fn scaled(acc: i64, exponent: i32) -> f32 {
    let power = f64::from_bits(((1023 + exponent) as u64) << 52);
    (f64::from(acc as f32) * power) as f32
}

/// Whether all are finite.
#[inline(always)]
pub(super) fn check(values: &[f32]) -> Result<(), NonFinite> {
    if values.iter().all(|y| y.is_finite()) {
        Ok(())
    } else {
        Err(NonFinite)
    }
}
