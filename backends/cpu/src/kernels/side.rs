//! What is kept beside the rows of a quantised matrix: exponents, so that kernels need not look for the largest.
//!
//! Beside each row stand `E_w` as an i16, then for each segment `E_w − e` and `E_w − e'` as u8. No encoding's exponents lie
//! further apart than a u8 can say (MXFP4's: 254).

use hoist_backend::Encoding;
use hoist_quant::SegmentView;

use super::activations::segments;

/// Bytes kept beside each row, for every quantised encoding.
pub(crate) const SIDE_ROW_BYTES: usize = 2;

/// Bytes kept beside each segment of a row, for every quantised encoding.
pub(crate) const SIDE_SEGMENT_BYTES: usize = 2;

/// Bytes kept beside a row of `cols` weights.
pub(crate) const fn side_row_bytes(cols: usize) -> usize {
    SIDE_ROW_BYTES + segments(cols) * SIDE_SEGMENT_BYTES
}

/// Computes what is kept beside whole rows of canonical bytes, without the matrix's prefix. `rows` and `side` hold equally
/// many rows.
///
/// # Errors
/// What [`hoist_quant`] says of the rows: an encoding or dimension that the contract does not multiply, or a scale that is
/// NaN or infinite, with its offset in `rows`.
pub(crate) fn prepare_side(
    encoding: Encoding,
    cols: usize,
    rows: &[u8],
    side: &mut [u8],
) -> Result<(), hoist_quant::Error> {
    hoist_quant::check_input_dimension(encoding, cols as u64)?;
    let row_bytes = row_bytes(encoding, cols);
    let beside = side_row_bytes(cols);
    assert_eq!(rows.len() / row_bytes, side.len() / beside);
    let mut view = SegmentView::default();
    for (i, (row, side)) in rows
        .chunks_exact(row_bytes)
        .zip(side.chunks_exact_mut(beside))
        .enumerate()
    {
        let at_row = |e| offset_by(e, (i * row_bytes) as u64);
        let largest = hoist_quant::row_exponent(encoding, row).map_err(at_row)?;
        let (first, rest) = side.split_at_mut(SIDE_ROW_BYTES);
        first.copy_from_slice(&largest.to_le_bytes());
        for (segment, out) in rest.chunks_exact_mut(SIDE_SEGMENT_BYTES).enumerate() {
            hoist_quant::read_segment(encoding, row, segment, &mut view).map_err(at_row)?;
            out[0] = below(largest, view.e);
            out[1] = below(largest, view.e_min);
        }
    }
    Ok(())
}

/// `E_w − e`; a segment's exponents are at most their row's.
fn below(largest: i16, e: i16) -> u8 {
    (largest - e).clamp(0, 255) as u8
}

/// Moves the offset that an error speaks of.
fn offset_by(error: hoist_quant::Error, by: u64) -> hoist_quant::Error {
    match error {
        hoist_quant::Error::NonFinite { encoding, offset } => hoist_quant::Error::NonFinite {
            encoding,
            offset: offset + by,
        },
        other => other,
    }
}

/// Canonical bytes of a row, for dimensions that the contract multiplies.
pub(super) fn row_bytes(encoding: Encoding, cols: usize) -> usize {
    cols / encoding.block_weights() as usize * encoding.block_bytes() as usize
}
