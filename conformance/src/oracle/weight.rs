//! §1.2 and §1.4: weights as integers, and embedding rows.

use hoist_backend::{Encoding, Error, Result, UnsupportedWhat};

use super::activation::{BLOCK, SEGMENT};
use super::arithmetic::{f16_to_f32, shift_right, times_power_of_two};
use super::deviation::by_contract;
use super::encoding::{Group, Reading, decode_row};
use super::matmul::Matrix;

/// 16 or 32 weights that share their integers: `value_i = 2^e · c · w_i − 2^e' · k`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightPart {
    /// `c_j`
    pub c: i64,
    /// `k_j`; 0 for encodings without mins.
    pub k: i64,
    /// `w_i`
    pub w: Vec<i64>,
}

/// Up to 256 weights of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightSegment {
    /// `e`
    pub e: i32,
    /// `e'`; `None` for encodings without mins.
    pub e_min: Option<i32>,
    /// Blocks of 32, or half blocks of 16.
    pub parts: Vec<WeightPart>,
}

/// A row of a quantised matrix in integers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightRow {
    /// Segments of 256, the last perhaps shorter.
    pub segments: Vec<WeightSegment>,
}

impl WeightRow {
    /// `E_w`: the largest `e` or `e'`.
    pub fn largest_exponent(&self) -> i32 {
        let segments = by_contract!(
            self.segments.as_slice(),
            LargestWeightExponentOfFirstSegment => &self.segments[..1]
        );
        segments
            .iter()
            .flat_map(|s| {
                [
                    Some(s.e),
                    by_contract!(s.e_min, LargestWeightExponentIgnoresMins => None),
                ]
            })
            .flatten()
            .max()
            .unwrap_or(0)
    }
}

/// §1.2: one row of a quantised matrix, in integers.
///
/// # Errors
/// [`Error::InvalidArgument`] for a row that the matrix does not have or a shape its encoding does not allow;
/// [`Error::NonFiniteWeight`] for a scale that is NaN or infinite; [`Error::Unsupported`] for an encoding that is no
/// weight quantisation.
pub fn weight_row(matrix: &Matrix<'_>, row: usize) -> Result<WeightRow> {
    let (reading, groups) =
        decode_row(matrix.encoding, matrix.row_bytes(row)?).map_err(|at| matrix.bad_scale(row, at))?;
    let mut segments = Vec::new();
    let mut rest = groups.as_slice();
    while !rest.is_empty() {
        let mut taken = 0;
        let count = rest
            .iter()
            .take_while(|g| {
                taken += g.w.len();
                taken <= SEGMENT
            })
            .count();
        let (segment, tail) = rest.split_at(count);
        segments.push(match reading {
            Reading::SuperBlock { shift } => super_block(segment, shift),
            Reading::Aligned => aligned(segment),
            Reading::PerMatrix => WeightSegment {
                e: 0,
                e_min: None,
                parts: segment
                    .iter()
                    .map(|g| WeightPart {
                        c: 1,
                        k: 0,
                        w: g.w.clone(),
                    })
                    .collect(),
            },
        });
        rest = tail;
    }
    Ok(WeightRow { segments })
}

/// One `d` for the segment, perhaps a `dmin`: integers multiply.
fn super_block(groups: &[Group], shift: i32) -> WeightSegment {
    WeightSegment {
        e: groups[0].scale.e + shift,
        e_min: groups[0].min.as_ref().map(|min| min.scale.e),
        parts: groups
            .iter()
            .map(|g| WeightPart {
                c: g.scale.m * g.sub_scale,
                k: g.min.as_ref().map_or(0, |min| min.scale.m * min.sub_min),
                w: g.w.clone(),
            })
            .collect(),
    }
}

/// Scales of their own: aligned to the largest exponent of the segment, eight bits below it.
fn aligned(groups: &[Group]) -> WeightSegment {
    let headroom = by_contract!(8, AlignedWithSevenBits => 7);
    let counts = |m: i64| by_contract!(true, AlignmentIgnoresZeroScales => m != 0);
    let largest = |scales: &[(i64, i32)]| {
        let of_all = scales.iter().map(|s| s.1).max();
        let of_those = scales.iter().filter(|s| counts(s.0)).map(|s| s.1).max();
        of_those.or(of_all).unwrap_or(0)
    };
    let align = |m: i64, e: i32, largest: i32| {
        let apart = (largest - e).unsigned_abs();
        let by = by_contract!(apart.min(31), AlignmentShiftWraps => apart & 31);
        let by = if largest < e { 0 } else { by };
        shift_right(i128::from(m) << headroom, by) as i64
    };

    let scales: Vec<_> = groups.iter().map(|g| (g.scale.m, g.scale.e)).collect();
    let e_star = largest(&scales);
    // The file's min is added, the contract's k is subtracted.
    let mins: Vec<_> = groups
        .iter()
        .filter_map(|g| g.min.as_ref().map(|min| (-min.scale.m, min.scale.e)))
        .collect();
    let e_star_min = largest(&mins);
    let align_min = |m: i64, e: i32| {
        by_contract!(
            align(m, e, e_star_min),
            AlignedMinsNotFloored => -align(-m, e, e_star_min)
        )
    };
    WeightSegment {
        e: e_star - headroom,
        e_min: (!mins.is_empty()).then_some(e_star_min - headroom),
        parts: groups
            .iter()
            .map(|g| WeightPart {
                c: align(g.scale.m, g.scale.e, e_star),
                k: g.min
                    .as_ref()
                    .map_or(0, |min| align_min(-min.scale.m, min.scale.e)),
                w: g.w.clone(),
            })
            .collect(),
    }
}

/// §1.4: one row of any weight matrix as f32, with GGML's roundings. `[cols]`
///
/// # Errors
/// As [`weight_row`]; float encodings are supported too, and their NaN or infinity is [`Error::NonFiniteWeight`].
pub fn embed_row(matrix: &Matrix<'_>, row: usize) -> Result<Vec<f32>> {
    let bytes = matrix.row_bytes(row)?;
    if matrix.encoding.is_float() {
        return widen(matrix.encoding, bytes).map_err(|at| matrix.bad_scale(row, at));
    }
    let (reading, groups) = decode_row(matrix.encoding, bytes).map_err(|at| matrix.bad_scale(row, at))?;
    let mut values = Vec::with_capacity(matrix.cols);
    for g in &groups {
        for w in &g.w {
            let w = *w as f32;
            let value = match reading {
                // Products of few bits are exact, so that only the subtraction rounds.
                Reading::SuperBlock { shift } => {
                    let scaled = times_power_of_two(g.scale.value * g.sub_scale as f32, shift) * w;
                    match &g.min {
                        Some(min) => scaled - min.scale.value * min.sub_min as f32,
                        None => scaled,
                    }
                }
                Reading::Aligned => match &g.min {
                    Some(min) => g.scale.value * w + min.scale.value,
                    None => g.scale.value * w,
                },
                Reading::PerMatrix => w * matrix.scale()?,
            };
            values.push(by_contract!(value, EmbedLosesNegativeZero => value + 0.0));
        }
    }
    Ok(values)
}

/// F32, F16 or BF16 to f32, exactly; the byte of the first value that is NaN or infinite otherwise.
pub(super) fn widen(encoding: Encoding, bytes: &[u8]) -> std::result::Result<Vec<f32>, usize> {
    let values: Vec<f32> = match encoding {
        Encoding::F32 => bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect(),
        Encoding::F16 => bytes
            .chunks_exact(2)
            .map(|b| f16_to_f32(u16::from_le_bytes([b[0], b[1]])))
            .collect(),
        _ => bytes
            .chunks_exact(2)
            .map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16))
            .collect(),
    };
    match values.iter().position(|v| !v.is_finite()) {
        Some(at) => Err(at * bytes.len() / values.len()),
        None => Ok(values),
    }
}

impl<'a> Matrix<'a> {
    /// Checks a matrix: its bytes are as many as its shape needs, and its columns suit its encoding.
    pub(super) fn check(&self) -> Result<()> {
        if !self.encoding.is_float() && !self.encoding.is_quantized() {
            return Err(Error::Unsupported {
                backend: "oracle".into(),
                what: UnsupportedWhat::Encoding {
                    encoding: self.encoding,
                    usage: "a weight",
                },
            });
        }
        if self.cols == 0 || self.cols > 131_072 {
            return Err(Error::invalid("columns of a matrix", "1 to 131072", self.cols));
        }
        if self.encoding.is_quantized() && !self.cols.is_multiple_of(BLOCK) {
            return Err(Error::invalid(
                "columns of a quantised matrix",
                "a multiple of 32",
                self.cols,
            ));
        }
        let nbytes = self
            .encoding
            .nbytes(hoist_backend::Shape::matrix(self.rows as u64, self.cols as u64))?;
        if nbytes != self.bytes.len() as u64 {
            return Err(Error::invalid("bytes of a matrix", nbytes, self.bytes.len()));
        }
        Ok(())
    }

    fn prefix(&self) -> usize {
        self.encoding.matrix_prefix_bytes() as usize
    }

    fn row_bytes(&self, row: usize) -> Result<&'a [u8]> {
        self.check()?;
        if row >= self.rows {
            return Err(Error::invalid(
                "row of a matrix",
                format!("below {}", self.rows),
                row,
            ));
        }
        let len = (self.bytes.len() - self.prefix()) / self.rows;
        Ok(&self.bytes[self.prefix() + row * len..][..len])
    }

    fn bad_scale(&self, row: usize, at: usize) -> Error {
        let len = (self.bytes.len() - self.prefix()) / self.rows;
        Error::NonFiniteWeight {
            weight: format!("{} matrix", self.encoding),
            offset: (self.prefix() + row * len + at) as u64,
        }
    }

    /// The one f32 scale of an APR Q8 matrix.
    pub(super) fn scale(&self) -> Result<f32> {
        let scale = match self.bytes {
            [a, b, c, d, ..] => f32::from_le_bytes([*a, *b, *c, *d]),
            _ => {
                return Err(Error::invalid(
                    "bytes of a matrix",
                    "at least 4",
                    self.bytes.len(),
                ));
            }
        };
        if scale.is_finite() {
            Ok(scale)
        } else {
            Err(Error::NonFiniteWeight {
                weight: format!("{} matrix", self.encoding),
                offset: 0,
            })
        }
    }
}
