//! Exact scalar decode to f32.

use hoist_backend::{Encoding, Shape};

use crate::codec::{ScaledBlock, SuperBlock, Visitor, visit};
use crate::scale::{exp2, f16_to_f32};
use crate::{Error, Result, activation, apr, float};

/// Decodes whole blocks to f32, as GGML computes them.
///
/// `bytes` are blocks of `encoding`, one after the other; for [`Encoding::APR_Q8`] one matrix, its scale in front. `out`
/// has one place for each weight. The result equals, bit for bit, that of the Python package `gguf`; non-finite scales
/// give what IEEE arithmetic gives (use [`crate::check_finite`] to refuse them).
///
/// # Errors
/// [`Error::NotDecodable`], [`Error::PartialBlock`], [`Error::Length`] if `out` is of another length.
pub fn dequantize(encoding: Encoding, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    let weights = weights_in(encoding, bytes)?;
    if out.len() as u64 != weights {
        return Err(Error::Length {
            encoding,
            what: "decoded values",
            expected: weights,
            found: out.len() as u64,
        });
    }
    decode(encoding, bytes, out)
}

/// Decodes a whole weight, `[matrices, rows, cols]`, to f32; see [`dequantize`].
///
/// # Errors
/// [`Error::NotDecodable`], [`Error::Shape`], [`Error::Length`] if `bytes` or `out` are not the shape's.
pub fn dequantize_matrix(encoding: Encoding, shape: Shape, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    let nbytes = shape_bytes(encoding, shape)?;
    check_length(encoding, "bytes", nbytes, bytes.len())?;
    let weights = shape.elements().ok_or(Error::Shape { encoding, shape })?;
    check_length(encoding, "decoded values", weights, out.len())?;
    if out.is_empty() {
        return Ok(());
    }
    if encoding != Encoding::APR_Q8 {
        return decode(encoding, bytes, out);
    }
    // Every matrix has a scale of its own in front. There is a weight, so there is a matrix.
    let matrices = usize::try_from(shape.matrices).map_err(|_| Error::Shape { encoding, shape })?;
    let (matrix_bytes, matrix_weights) = (bytes.len() / matrices, out.len() / matrices);
    for (bytes, out) in bytes
        .chunks_exact(matrix_bytes)
        .zip(out.chunks_exact_mut(matrix_weights))
    {
        decode(encoding, bytes, out)?;
    }
    Ok(())
}

/// Decodes one row of a `[rows, cols]` matrix to f32, without allocating; see [`dequantize`].
///
/// `matrix` are the canonical bytes of one matrix, prefix included. `out` has `cols` places.
///
/// # Errors
/// [`Error::NotDecodable`], [`Error::Shape`], [`Error::RowOutOfRange`], [`Error::Length`].
pub fn dequantize_row(
    encoding: Encoding,
    matrix: &[u8],
    rows: u64,
    cols: u64,
    row: u64,
    out: &mut [f32],
) -> Result<()> {
    let nbytes = shape_bytes(encoding, Shape::matrix(rows, cols))?;
    check_length(encoding, "matrix bytes", nbytes, matrix.len())?;
    check_length(encoding, "decoded values", cols, out.len())?;
    if row >= rows {
        return Err(Error::RowOutOfRange { row, rows });
    }
    // Rows follow the prefix; the one asked for ends within `matrix`, so that nothing here overflows or truncates.
    let row_bytes = (nbytes - encoding.matrix_prefix_bytes()) / rows;
    let start = (encoding.matrix_prefix_bytes() + row_bytes * row) as usize;
    let row_bytes = row_bytes as usize;
    let bytes = &matrix[start..start + row_bytes];
    if encoding == Encoding::APR_Q8 {
        apr::dequantize_apr_q8(apr::apr_q8_scale(matrix), bytes, out);
        return Ok(());
    }
    decode(encoding, bytes, out)
}

/// Weights in whole blocks of `encoding`.
fn weights_in(encoding: Encoding, bytes: &[u8]) -> Result<u64> {
    let len = bytes.len() as u64;
    let blocks = len
        .checked_sub(encoding.matrix_prefix_bytes())
        .ok_or(Error::PartialBlock {
            encoding,
            block: encoding.matrix_prefix_bytes(),
            found: len,
        })?;
    if !blocks.is_multiple_of(encoding.block_bytes()) {
        return Err(Error::PartialBlock {
            encoding,
            block: encoding.block_bytes(),
            found: len,
        });
    }
    Ok(blocks / encoding.block_bytes() * encoding.block_weights())
}

fn shape_bytes(encoding: Encoding, shape: Shape) -> Result<u64> {
    encoding
        .nbytes(shape)
        .map_err(|_| Error::Shape { encoding, shape })
}

fn check_length(encoding: Encoding, what: &'static str, expected: u64, found: usize) -> Result<()> {
    if expected == found as u64 {
        return Ok(());
    }
    Err(Error::Length {
        encoding,
        what,
        expected,
        found: found as u64,
    })
}

/// Decodes; lengths have been compared.
fn decode(encoding: Encoding, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    match encoding {
        Encoding::F32 => float::f32(bytes, out),
        Encoding::F16 => float::f16(bytes, out),
        Encoding::BF16 => float::bf16(bytes, out),
        Encoding::Q8_1 => activation::q8_1(bytes, out),
        Encoding::Q8_K => activation::q8_k(bytes, out),
        Encoding::APR_Q8 => {
            apr::dequantize_apr_q8(apr::apr_q8_scale(bytes), &bytes[apr::APR_Q8_PREFIX..], out);
        }
        _ => return visit(encoding, Dequantize { bytes, out }).ok_or(Error::NotDecodable { encoding }),
    }
    Ok(())
}

struct Dequantize<'a> {
    bytes: &'a [u8],
    out: &'a mut [f32],
}

impl Visitor for Dequantize<'_> {
    type Output = ();

    fn scaled<C: ScaledBlock<B, W, S>, const B: usize, const W: usize, const S: usize>(self) {
        let blocks = self.bytes.as_chunks::<B>().0;
        let mut codes = [0; W];
        for (block, out) in blocks.iter().zip(self.out.as_chunks_mut::<W>().0) {
            C::codes(block, &mut codes);
            let min = C::min(block).value;
            for (s, scale) in C::scales(block).iter().enumerate() {
                let part = s * (W / S)..(s + 1) * (W / S);
                for (w, y) in codes[part.clone()].iter().zip(&mut out[part]) {
                    let product = scale.value * f32::from(*w);
                    *y = if C::MINS { product - min } else { product };
                }
            }
        }
    }

    fn super_block<C: SuperBlock<B>, const B: usize>(self) {
        let blocks = self.bytes.as_chunks::<B>().0;
        let mut codes = [0; 256];
        for (block, out) in blocks.iter().zip(self.out.as_chunks_mut::<256>().0) {
            C::codes(block, &mut codes);
            // Exact: sub-scales and mins have at most 8 bits, an f16 has 11, and no power of two here leaves f32's range.
            let d = f16_to_f32(C::d(block)) * exp2(C::SHIFT);
            let dmin = f16_to_f32(C::dmin(block));
            let (subs, mins) = (C::subs(block), C::mins(block));
            for (half, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let scale = d * f32::from(subs[half]);
                let min = dmin * f32::from(mins[half]);
                for (w, y) in codes[16 * half..16 * half + 16].iter().zip(out) {
                    let product = scale * f32::from(*w);
                    *y = if C::MINS { product - min } else { product };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partial_block_is_refused_and_a_whole_one_is_not() {
        let mut out = [0.0; 256];
        assert_eq!(
            dequantize(Encoding::Q4_K, &[0; 143], &mut out),
            Err(Error::PartialBlock {
                encoding: Encoding::Q4_K,
                block: 144,
                found: 143
            })
        );
        dequantize(Encoding::Q4_K, &[0; 144], &mut out).unwrap();
    }

    #[test]
    fn output_of_another_length_is_refused() {
        for found in [31, 33] {
            assert_eq!(
                dequantize(Encoding::Q8_0, &[0; 34], &mut vec![0.0; found]),
                Err(Error::Length {
                    encoding: Encoding::Q8_0,
                    what: "decoded values",
                    expected: 32,
                    found: found as u64
                })
            );
        }
    }

    #[test]
    fn integers_have_no_decode() {
        for encoding in [
            Encoding::F64,
            Encoding::I8,
            Encoding::I16,
            Encoding::I32,
            Encoding::I64,
        ] {
            let bytes = vec![0; encoding.block_bytes() as usize];
            assert_eq!(
                dequantize(encoding, &bytes, &mut [0.0]),
                Err(Error::NotDecodable { encoding })
            );
        }
    }

    #[test]
    fn every_encoding_of_weights_and_activations_decodes_nothing_from_nothing() {
        for encoding in Encoding::all().filter(|e| e.kind() != hoist_backend::EncodingKind::Other) {
            let prefix = vec![0; encoding.matrix_prefix_bytes() as usize];
            dequantize(encoding, &prefix, &mut []).unwrap();
        }
    }

    #[test]
    fn rows_of_apr_q8_use_the_scale_in_front_of_their_matrix() {
        let mut bytes = Vec::new();
        for (scale, codes) in [(0.5f32, [1i8, -2, 3, -128]), (2.0, [4, 5, -6, 127])] {
            bytes.extend(scale.to_le_bytes());
            bytes.extend(codes.map(|c| c as u8));
        }
        let shape = Shape {
            matrices: 2,
            rows: 2,
            cols: 2,
        };
        let mut all = [0.0; 8];
        dequantize_matrix(Encoding::APR_Q8, shape, &bytes, &mut all).unwrap();
        assert_eq!(all, [0.5, -1.0, 1.5, -64.0, 8.0, 10.0, -12.0, 254.0]);
        let mut row = [0.0; 2];
        dequantize_row(Encoding::APR_Q8, &bytes[8..], 2, 2, 1, &mut row).unwrap();
        assert_eq!(row, all[6..]);
        assert_eq!(
            dequantize_row(Encoding::APR_Q8, &bytes[8..], 2, 2, 2, &mut row),
            Err(Error::RowOutOfRange { row: 2, rows: 2 })
        );
        assert!(dequantize_row(Encoding::APR_Q8, &bytes[7..], 2, 2, 1, &mut row).is_err());
    }

    #[test]
    fn shapes_whose_size_overflows_are_refused() {
        let shape = Shape::matrix(u64::MAX, 32);
        assert_eq!(
            dequantize_matrix(Encoding::Q4_0, shape, &[], &mut []),
            Err(Error::Shape {
                encoding: Encoding::Q4_0,
                shape
            })
        );
        assert!(dequantize_row(Encoding::F32, &[], u64::MAX, u64::MAX, 0, &mut []).is_err());
        let none = Shape {
            matrices: 0,
            rows: 7,
            cols: 4,
        };
        dequantize_matrix(Encoding::APR_Q8, none, &[], &mut []).unwrap();
    }
}
