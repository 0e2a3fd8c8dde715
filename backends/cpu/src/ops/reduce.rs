//! Sums in the contract's written order (§2, §3).

use crate::ops::element::{Element, LANES};

/// Folds accumulators pairwise: `acc[l] += acc[l + h]` for `h` = half of them, a quarter, … 1.
#[inline(always)]
pub(crate) fn fold<const N: usize>(mut acc: [f32; N]) -> f32 {
    let mut h = N / 2;
    while h > 0 {
        for l in 0..h {
            acc[l] += acc[l + h];
        }
        h /= 2;
    }
    acc[0]
}

/// sum256 of `f(acc, x_i)`: element `i` goes to accumulator `i mod 256`.
#[inline(always)]
fn sum256_by(x: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut acc = [0.0; 256];
    let (chunks, rest) = x.as_chunks::<256>();
    for chunk in chunks {
        for (acc, x) in acc.iter_mut().zip(chunk) {
            *acc = f(*acc, *x);
        }
    }
    for (acc, x) in acc.iter_mut().zip(rest) {
        *acc = f(*acc, *x);
    }
    fold(acc)
}

/// `Σ x`
#[inline(always)]
pub(crate) fn sum256(x: &[f32]) -> f32 {
    sum256_by(x, |acc, x| acc + x)
}

/// `Σ x²`
#[inline(always)]
pub(crate) fn sum256_squares(x: &[f32]) -> f32 {
    sum256_by(x, |acc, x| x.mul_add(x, acc))
}

/// `Σ x` in dot64's order over 256 places.
#[inline(always)]
pub(crate) fn sum64(x: &[f32; 256]) -> f32 {
    let mut acc = [0.0; 64];
    for chunk in x.as_chunks::<64>().0 {
        for (acc, x) in acc.iter_mut().zip(chunk) {
            *acc += x;
        }
    }
    fold(acc)
}

/// dot64 of one row with `N` vectors of the same length.
///
/// The 64 accumulators are visited in four groups of sixteen, so that those of all vectors stay in registers.
#[inline(always)]
pub(crate) fn dot64<E: Element, const N: usize, const F16C: bool>(w: &[E], x: [&[f32]; N]) -> [f32; N] {
    let (w_chunks, w_rest) = w.as_chunks::<64>();
    let mut acc = [[0.0f32; 64]; N];
    for group in 0..64 / LANES {
        let at = group * LANES;
        let mut sums = [[0.0f32; LANES]; N];
        for (c, w) in w_chunks.iter().enumerate() {
            let w = E::widen_lanes::<F16C>(&w.as_chunks::<LANES>().0[group]);
            for (sums, x) in sums.iter_mut().zip(&x) {
                let x = &x[c * 64 + at..c * 64 + at + LANES];
                for l in 0..LANES {
                    sums[l] = w[l].mul_add(x[l], sums[l]);
                }
            }
        }
        for (acc, sums) in acc.iter_mut().zip(&sums) {
            acc[at..at + LANES].copy_from_slice(sums);
        }
    }
    for (acc, x) in acc.iter_mut().zip(&x) {
        let rest = &x[w_chunks.len() * 64..w.len()];
        for ((acc, w), x) in acc.iter_mut().zip(w_rest).zip(rest) {
            *acc = w.widen().mul_add(*x, *acc);
        }
    }
    acc.map(fold)
}
