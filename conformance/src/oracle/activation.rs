//! §1.1: activations as integers.

use hoist_backend::{Error, OpName, Result};

use super::arithmetic::nearest_integer;
use super::deviation::by_contract;

/// Elements of a segment.
pub(super) const SEGMENT: usize = 256;
/// Elements of a block.
pub(super) const BLOCK: usize = 32;

/// Up to 256 activations: element `i` is about `q[i] · u[i / 32] · m · 2^e`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantizedSegment {
    /// `m_a`: 128 … 255, or 0 in a zero segment.
    pub m: i64,
    /// `e_a`
    pub e: i32,
    /// `u_j`: 1 … 16, one for each block of 32.
    pub u: Vec<i64>,
    /// `q_i`: −127 … 127.
    pub q: Vec<i64>,
}

/// A vector of activations, quantised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantizedVector {
    /// Segments of 256, the last perhaps shorter.
    pub segments: Vec<QuantizedSegment>,
}

impl QuantizedVector {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.segments.iter().map(|s| s.q.len()).sum()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// `E_a`: the largest `e_a`.
    pub fn largest_exponent(&self) -> i32 {
        let segments = by_contract!(
            self.segments.as_slice(),
            LargestActivationExponentOfFirstSegment => &self.segments[..1]
        );
        segments
            .iter()
            .map(|s| s.e)
            .max()
            .unwrap_or(ZERO_SEGMENT_EXPONENT)
    }
}

/// `e_a` of a zero segment: that of the smallest `d` there is, `128 · 2^-133 = 2^-126`.
const ZERO_SEGMENT_EXPONENT: i32 = -133;

/// The operation Quantise, of one vector.
///
/// # Errors
/// [`Error::InvalidArgument`] unless its length is a positive multiple of 32; [`Error::NonFinite`].
pub fn quantise(x: &[f32]) -> Result<QuantizedVector> {
    if x.is_empty() || !x.len().is_multiple_of(BLOCK) {
        return Err(Error::invalid(
            "elements of a vector to quantise",
            "a positive multiple of 32",
            x.len(),
        ));
    }
    if x.iter().any(|v| !v.is_finite()) {
        return Err(Error::NonFinite {
            op: OpName::Quantise,
            layer: None,
        });
    }
    Ok(QuantizedVector {
        segments: x.chunks(SEGMENT).map(quantise_segment).collect(),
    })
}

fn quantise_segment(x: &[f32]) -> QuantizedSegment {
    let magnitude = |v: f32| by_contract!(v.abs(), MaximumWithoutSign => v.max(0.0));
    let block_maxima: Vec<f32> = x
        .chunks(BLOCK)
        .map(|block| block.iter().fold(0.0, |a: f32, v| a.max(magnitude(*v))))
        .collect();
    let largest = block_maxima.iter().fold(0.0, |a: f32, v| a.max(*v));

    let d0 = by_contract!(largest / 2032.0, SegmentScaleByReciprocal => largest * (1.0 / 2032.0));
    let smallest = f32::MIN_POSITIVE; // 2^-126
    if by_contract!(d0 < smallest, ZeroSegmentAtTheBound => d0 <= smallest) {
        return QuantizedSegment {
            m: 0,
            e: by_contract!(ZERO_SEGMENT_EXPONENT, ZeroSegmentHasExponentZero => 0),
            u: vec![1; block_maxima.len()],
            q: vec![0; x.len()],
        };
    }
    let bits = by_contract!(d0.to_bits() + 0xffff, SegmentScaleNotRoundedUp => d0.to_bits()) & 0xffff_0000;
    let d = f32::from_bits(bits);
    // Eight significant bits: the hidden one and seven of the fraction.
    let m = i64::from(bits >> 16 & 0x7f | 0x80);
    let e = (bits >> 23) as i32 - 127 - 7;

    let u: Vec<i64> = block_maxima.iter().map(|a| multiplier(*a, d)).collect();
    let q = x
        .iter()
        .enumerate()
        .map(|(i, x)| {
            let ud = u[i / BLOCK] as f32 * d;
            let r = 1.0 / ud;
            let p = by_contract!(x * r, QuantByDivision => x / ud);
            nearest_integer(p)
        })
        .collect();
    QuantizedSegment { m, e, u, q }
}

/// `u_j`: the smallest integer in 1 … 16 with `a ≤ (u · 127) · d`.
fn multiplier(a: f32, d: f32) -> i64 {
    let suffices = |u: &i64| {
        let reach = (u * 127) as f32 * d;
        by_contract!(a <= reach, MultiplierBelowInsteadOfAtMost => a < reach)
    };
    by_contract!(
        (1..16).find(suffices).unwrap_or(16),
        MultiplierByReciprocal => ((a * (1.0 / (127.0 * d))).ceil() as i64).clamp(1, 16)
    )
}
