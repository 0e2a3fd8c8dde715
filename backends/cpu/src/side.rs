//! What is kept beside the rows of a quantised matrix.

use hoist_backend::{Error, Result};

use crate::residency::Resident;

/// Bytes kept beside each row.
pub(crate) const ROW: u64 = 2;
/// Bytes kept beside each 256-weight segment of a row.
pub(crate) const SEGMENT: u64 = 0;

/// Bytes kept beside a row of `cols` weights.
pub(crate) fn row_bytes(cols: u64) -> usize {
    (ROW + cols.div_ceil(256) * SEGMENT) as usize
}

/// Fills in `side`, what is kept beside the whole rows in `rows`; no matrix prefix may be among them. A matrix that the
/// contract does not multiply with (an embedding of an odd width, say) has nothing to keep.
pub(crate) fn prepare(weight: &Resident, rows: &[u8], side: &mut [u8]) -> Result<()> {
    if hoist_quant::check_input_dimension(weight.encoding, weight.shape.cols).is_err() {
        return Ok(());
    }
    let row = weight.row_bytes();
    for (bytes, side) in rows
        .chunks_exact(row)
        .zip(side.chunks_exact_mut(weight.side_row_bytes()))
    {
        let exponent = hoist_quant::row_exponent(weight.encoding, bytes)
            .map_err(|e| Error::internal(crate::NAME, format!("`{}`: {e}", weight.name)))?;
        side.copy_from_slice(&exponent.to_le_bytes());
    }
    Ok(())
}

/// [`prepare`] for a whole weight, prefixes skipped.
pub(crate) fn prepare_weight(weight: &Resident, bytes: &[u8], side: &mut [u8]) -> Result<()> {
    let prefix = weight.encoding.matrix_prefix_bytes() as usize;
    let beside = weight.shape.rows as usize * weight.side_row_bytes();
    for (matrix, side) in bytes
        .chunks_exact(weight.matrix_bytes())
        .zip(side.chunks_exact_mut(beside))
    {
        prepare(weight, &matrix[prefix..], side)?;
    }
    Ok(())
}
