use hoist_backend::{Encoding, Shape, SourceView};
use hoist_formats::TensorInfo;

use crate::{Error, Result};

/// Cuts source tensors into the views that a weight is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cutter<'a> {
    tensor: &'a TensorInfo,
    /// As the role sees it: `[matrices, rows, cols]` of the whole source tensor.
    shape: Shape,
    /// Bytes of one row.
    row_bytes: u64,
}

impl<'a> Cutter<'a> {
    /// A cutter for a tensor whose shape has been checked to be `shape`.
    ///
    /// # Errors
    /// [`Error::Layout`] if its encoding cannot store rows of that length, [`Error::WrongSize`] if it has another size.
    pub(crate) fn new(tensor: &'a TensorInfo, shape: Shape) -> Result<Self> {
        let layout = |error| Error::Layout {
            tensor: tensor.name.clone(),
            error,
        };
        let row_bytes = tensor.encoding.row_bytes(shape.cols).map_err(layout)?;
        // APR_Q8 has one scale for the whole tensor, canonical bytes have one for each matrix.
        let one = Shape {
            matrices: 1,
            rows: shape.rows,
            cols: shape.cols,
        };
        let prefix = tensor.encoding.matrix_prefix_bytes();
        let matrix = tensor.encoding.nbytes(one).map_err(layout)? - prefix;
        let expected = matrix
            .checked_mul(shape.matrices)
            .and_then(|n| n.checked_add(prefix))
            .filter(|n| tensor.offset.checked_add(*n).is_some())
            .ok_or_else(|| Error::TooLarge {
                what: format!("tensor `{}`", tensor.name),
                found: u64::MAX,
                limit: u64::MAX - 1,
            })?;
        if expected != tensor.nbytes {
            return Err(Error::WrongSize {
                tensor: tensor.name.clone(),
                expected,
                found: tensor.nbytes,
            });
        }
        Ok(Self {
            tensor,
            shape,
            row_bytes,
        })
    }

    /// Views of rows `first .. first + rows` of matrix `matrix`; inside the shape given to `new`.
    pub(crate) fn rows(&self, matrix: u64, first: u64, rows: u64, out: &mut Vec<SourceView>) {
        let t = self.tensor;
        let prefix = t.encoding.matrix_prefix_bytes();
        if prefix > 0 {
            out.push(SourceView::contiguous(t.shard, t.offset, prefix));
        }
        let start = t.offset + prefix + (matrix * self.shape.rows + first) * self.row_bytes;
        out.push(SourceView::contiguous(t.shard, start, rows * self.row_bytes));
    }

    /// The view of all of it.
    pub(crate) fn all(&self, out: &mut Vec<SourceView>) {
        if self.tensor.encoding.matrix_prefix_bytes() == 0 || self.shape.matrices == 1 {
            out.push(SourceView::contiguous(
                self.tensor.shard,
                self.tensor.offset,
                self.tensor.nbytes,
            ));
        } else {
            for matrix in 0..self.shape.matrices {
                self.rows(matrix, 0, self.shape.rows, out);
            }
        }
    }

    /// The view of columns `first .. first + columns` of a float matrix, read as `[columns, rows]`: what a Conv1D's
    /// `[in, out]` is as `[out, in]`. The caller has checked that the encoding is a float one and the range inside.
    pub(crate) fn columns_transposed(&self, first: u64, columns: u64, out: &mut Vec<SourceView>) {
        let unit = self.tensor.encoding.block_bytes();
        out.push(SourceView {
            file: self.tensor.shard,
            offset: self.tensor.offset + first * unit,
            rows: columns,
            cols: self.shape.rows,
            unit,
            row_stride: unit,
            col_stride: self.row_bytes,
        });
    }
}

/// A shape as errors print it.
pub(crate) fn dims(shape: &[u64]) -> String {
    format!("{shape:?}")
}

/// Whether an encoding may hold a matrix.
pub(crate) fn is_matrix_encoding(encoding: Encoding) -> bool {
    encoding.is_float() || encoding.is_quantized()
}
