//! Comparison of what was found with what the contract demands.

use crate::Failure;
use crate::mutation::{Rule, holds as rule};

/// Demands equal bytes.
///
/// # Errors
/// The first byte that differs, and how many do.
pub fn bytes(what: &str, expected: &[u8], found: &[u8]) -> Result<(), Failure> {
    if expected == found {
        return Ok(());
    }
    if expected.len() != found.len() && rule(Rule::BytesAreAsMany) {
        return Err(Failure::new(
            what,
            "",
            format!("{} bytes", expected.len()),
            format!("{} bytes", found.len()),
        ));
    }
    let mut wrong = expected
        .iter()
        .zip(found)
        .enumerate()
        .filter(|(_, (e, f))| e != f && rule(Rule::BytesAreEqual));
    let (at, (e, f)) = match wrong.next() {
        Some(first) => first,
        None => return Ok(()),
    };
    let more = wrong.count();
    Err(Failure::new(
        what,
        format!("byte {at} of {}, {} wrong in all", expected.len(), more + 1),
        format!("{e:#04x}"),
        format!("{f:#04x}"),
    ))
}

/// Demands equal bits; one NaN is as good as another nowhere in the contract, since results are finite.
///
/// # Errors
/// The first element that differs, and how many do.
pub fn exact(what: &str, expected: &[f32], found: &[f32]) -> Result<(), Failure> {
    if expected.len() != found.len() {
        return Err(Failure::new(
            what,
            "",
            format!("{} values", expected.len()),
            format!("{} values", found.len()),
        ));
    }
    let mut wrong = expected
        .iter()
        .zip(found)
        .enumerate()
        .filter(|(_, (e, f))| e.to_bits() != f.to_bits() && rule(Rule::BitsAreEqual));
    let Some((at, (e, f))) = wrong.next() else {
        return Ok(());
    };
    let more = wrong.count();
    Err(Failure::new(
        what,
        format!("element {at} of {}, {} wrong in all", expected.len(), more + 1),
        format!("{e:e} ({:#010x})", e.to_bits()),
        format!("{f:e} ({:#010x})", f.to_bits()),
    ))
}

/// How far a *bounded* backend may be off, derived from the computation, never from a backend's name.
#[derive(Clone, Copy, Debug)]
pub struct Bounds<'a> {
    /// Largest absolute error of each element.
    pub element: &'a [f64],
    /// Largest root of the sum of squared errors of a row, as a part of the same of the element bounds: errors that all
    /// reach their bounds are no rounding errors.
    pub row: f64,
    /// Largest normalised mean square error: the sum of squared errors over the sum of squared results.
    pub nmse: f64,
}

/// How far off results were.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Errors {
    /// The worst element's error as a part of its bound.
    pub element: f64,
    /// The worst row's error as a part of its bound.
    pub row: f64,
    /// Normalised mean square error.
    pub nmse: f64,
}

/// Judges rows of `width` results by worst element, worst row, NMSE and arg-max together.
///
/// The arg-max of a row may differ only if the two elements are as close as the root of the sum of their squared bounds.
///
/// # Errors
/// The worst offender.
pub fn bounded(
    what: &str,
    expected: &[f32],
    found: &[f32],
    width: usize,
    bounds: &Bounds<'_>,
) -> Result<Errors, Failure> {
    let n = expected.len();
    if found.len() != n || bounds.element.len() != n || width == 0 || !n.is_multiple_of(width) {
        return Err(Failure::new(
            what,
            "",
            format!("{n} values in rows of {width}, with as many bounds"),
            format!("{} values, {} bounds", found.len(), bounds.element.len()),
        ));
    }
    let mut errors = Errors::default();
    let (mut total, mut power) = (0.0, 0.0);
    for (row, at) in (0..n).step_by(width).enumerate() {
        let (mut square, mut allowed) = (0.0, 0.0);
        for i in at..at + width {
            let (e, f, bound) = (f64::from(expected[i]), f64::from(found[i]), bounds.element[i]);
            let error = (e - f).abs();
            let too_far = error > bound && rule(Rule::WorstElement);
            if too_far || (!f.is_finite() && rule(Rule::BoundedIsFinite)) {
                return Err(Failure::new(
                    what,
                    format!("row {row}, element {} of {width}", i - at),
                    format!("{e:e} ± {bound:e}"),
                    format!("{f:e}"),
                ));
            }
            if bound > 0.0 {
                errors.element = errors.element.max(error / bound);
            }
            square += error * error;
            allowed += bound * bound;
            power += e * e;
        }
        total += square;
        let limit = bounds.row * allowed.sqrt();
        if square.sqrt() > limit && rule(Rule::WorstRow) {
            return Err(Failure::new(
                what,
                format!("row {row}"),
                format!("an error of at most {limit:e}"),
                format!("{:e}", square.sqrt()),
            ));
        }
        if limit > 0.0 {
            errors.row = errors.row.max(square.sqrt() / limit);
        }
        let (best, chosen) = (
            first_largest(&expected[at..at + width]),
            first_largest(&found[at..at + width]),
        );
        let gap = f64::from(expected[at + best]) - f64::from(expected[at + chosen]);
        // Both off by all that they may be, in opposite directions, is no rounding either.
        let slack = bounds.element[at + best].hypot(bounds.element[at + chosen]);
        if gap > slack && rule(Rule::ArgMax) {
            return Err(Failure::new(
                what,
                format!("arg-max of row {row}"),
                format!("{best}, which is larger by {gap:e} (bounds allow {slack:e})"),
                chosen,
            ));
        }
    }
    errors.nmse = if power > 0.0 { total / power } else { total };
    if errors.nmse > bounds.nmse && rule(Rule::MeanSquare) {
        return Err(Failure::new(
            what,
            "normalised mean square error",
            format!("at most {:e}", bounds.nmse),
            format!("{:e}", errors.nmse),
        ));
    }
    Ok(errors)
}

fn first_largest(row: &[f32]) -> usize {
    row.iter()
        .enumerate()
        .fold(0, |best, (i, v)| if *v > row[best] { i } else { best })
}

/// Demands equality of anything that can be shown.
///
/// # Errors
/// Both values.
pub fn equal<T: PartialEq + std::fmt::Debug>(what: &str, expected: T, found: T) -> Result<(), Failure> {
    if expected == found || !rule(Rule::ValuesAreEqual) {
        return Ok(());
    }
    Err(Failure::new(
        what,
        "",
        format!("{expected:?}"),
        format!("{found:?}"),
    ))
}

/// Demands that something holds.
///
/// # Errors
/// `found`, if it does not.
pub fn holds(
    what: &str,
    holds: bool,
    expected: impl std::fmt::Display,
    found: impl std::fmt::Display,
) -> Result<(), Failure> {
    if holds {
        Ok(())
    } else {
        Err(Failure::new(what, "", expected, found))
    }
}
