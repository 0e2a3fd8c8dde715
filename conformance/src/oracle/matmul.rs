//! §1.3 and §2: matrix times vector.

use hoist_backend::{Encoding, Error, OpName, Result};

use super::activation::{BLOCK, QuantizedSegment, QuantizedVector, quantise};
use super::arithmetic::{integer_to_f32, round_to_f32, shift_right, times_power_of_two};
use super::deviation::by_contract;
use super::float::dot64;
use super::weight::{WeightRow, WeightSegment, embed_row, weight_row};
use super::{finite, same_length};

/// One matrix in canonical bytes.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// Encoding: F32, F16, BF16 or a weight quantisation.
    pub encoding: Encoding,
    /// Output dimension.
    pub rows: usize,
    /// Input dimension.
    pub cols: usize,
    /// `[rows, cols]` row-major, with the prefix of encodings that have one.
    pub bytes: &'a [u8],
}

/// The operation MatMul on f32 activations: quantises them first where the weights are quantised. `x`: `[cols]`, `bias`
/// and the result: `[rows]`.
///
/// # Errors
/// [`Error::InvalidArgument`] for shapes that do not fit; [`Error::NonFinite`]; [`Error::NonFiniteWeight`];
/// [`Error::Unsupported`] for encodings that are no weights.
pub fn matmul(matrix: &Matrix<'_>, x: &[f32], bias: Option<&[f32]>) -> Result<Vec<f32>> {
    matrix.check()?;
    same_length("input", matrix.cols, x.len())?;
    if matrix.encoding.is_quantized() {
        return matmul_quantized(matrix, &quantise(x)?, bias);
    }
    let y = (0..matrix.rows)
        .map(|row| Ok(dot64(&embed_row(matrix, row)?, x)))
        .collect::<Result<Vec<_>>>()?;
    add_bias(y, bias)
}

/// The operation MatMul of a quantised matrix on quantised activations.
///
/// # Errors
/// As [`matmul`].
pub fn matmul_quantized(matrix: &Matrix<'_>, x: &QuantizedVector, bias: Option<&[f32]>) -> Result<Vec<f32>> {
    matrix.check()?;
    if !matrix.encoding.is_quantized() {
        return Err(Error::invalid(
            "encoding of a matrix for quantised activations",
            "a quantised one",
            matrix.encoding,
        ));
    }
    same_length("input", matrix.cols, x.len())?;
    let mut y = Vec::with_capacity(matrix.rows);
    for row in 0..matrix.rows {
        let sum = sum_of_row(&weight_row(matrix, row)?, x);
        y.push(match matrix.encoding {
            Encoding::APR_Q8 => by_contract!(sum * matrix.scale()?, AprScaleAfterBias => sum),
            _ => sum,
        });
    }
    // What overflows is refused before a bias could bring it back.
    let y = finite(OpName::MatMul, y)?;
    Ok(
        by_contract!(add_bias(y, bias)?, BiasBeforeRounding => bias_before_rounding(matrix, x, bias)?,
        AprScaleAfterBias => {
            let scale = if matrix.encoding == Encoding::APR_Q8 { matrix.scale()? } else { 1.0 };
            add_bias(y, bias)?.iter().map(|y| y * scale).collect()
        }),
    )
}

fn add_bias(mut y: Vec<f32>, bias: Option<&[f32]>) -> Result<Vec<f32>> {
    if let Some(bias) = bias {
        same_length("bias", y.len(), bias.len())?;
        for (y, b) in y.iter_mut().zip(bias) {
            *y += b;
        }
    }
    Ok(y)
}

/// §1.3 for one row: exact until `acc` becomes f32.
fn sum_of_row(row: &WeightRow, x: &QuantizedVector) -> f32 {
    let (acc, exponent) = accumulate(row, x);
    by_contract!(
        times_power_of_two(integer_to_f32(acc), exponent),
        RoundedOnceAtTheEnd => round_to_f32(acc < 0, acc.unsigned_abs().into(), exponent),
    )
}

/// `acc` and `E_w + E_a`.
fn accumulate(row: &WeightRow, x: &QuantizedVector) -> (i64, i32) {
    let (e_w, e_a) = (row.largest_exponent(), x.largest_exponent());
    let mut acc: i128 = 0;
    for (weights, activations) in row.segments.iter().zip(&x.segments) {
        let (i, j) = inner_sums(weights, activations);
        let m_a = i128::from(activations.m);
        let delta = (e_w - weights.e) + (e_a - activations.e);
        let delta_min = weights.e_min.map(|e| (e_w - e) + (e_a - activations.e));
        let t_i = shift_right(m_a * i, clamped(delta));
        let t_j = delta_min.map_or(0, |delta| shift_right(m_a * j, clamped(delta)));
        acc += by_contract!(
            t_i - t_j,
            TermShiftPastClampIsZero => if delta > 63 { 0 } else { t_i } - if delta_min > Some(63) { 0 } else { t_j },
            MinsSubtractedBeforeTheShift => if delta_min == Some(delta) {
                shift_right(m_a * (i - j), clamped(delta))
            } else {
                t_i - t_j
            },
        );
    }
    // |acc| ≤ 2^61.98 by the contract's bounds.
    (acc as i64, e_w + e_a)
}

fn clamped(delta: i32) -> u32 {
    let delta = u32::try_from(delta).unwrap_or(0); // never negative: E_w and E_a are maxima
    by_contract!(delta.min(63), TermShiftWraps => delta & 63)
}

/// `I` and `J`. A part is a block of 32 or half a block; `u` is the block's.
fn inner_sums(weights: &WeightSegment, activations: &QuantizedSegment) -> (i128, i128) {
    let (mut i, mut j) = (0i128, 0i128);
    let mut at = 0;
    for part in &weights.parts {
        let q = &activations.q[at..at + part.w.len()];
        let u = activations.u[at / BLOCK];
        let dot: i64 = part.w.iter().zip(q).map(|(w, q)| w * q).sum();
        let s: i64 = q.iter().sum();
        i += i128::from(u * part.c) * i128::from(dot);
        j += i128::from(by_contract!(u, MinsWithoutMultiplier => 1) * part.k) * i128::from(s);
        at += part.w.len();
    }
    (i, j)
}

/// A deviation: `acc · 2^E + b` with one rounding fewer.
fn bias_before_rounding(matrix: &Matrix<'_>, x: &QuantizedVector, bias: Option<&[f32]>) -> Result<Vec<f32>> {
    (0..matrix.rows)
        .map(|row| {
            let (acc, exponent) = accumulate(&weight_row(matrix, row)?, x);
            let b = bias.map_or(0.0, |b| b[row]);
            Ok((f64::from(integer_to_f32(acc)) * 2f64.powi(exponent) + f64::from(b)) as f32)
        })
        .collect()
}
