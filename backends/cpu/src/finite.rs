//! Refuses NaN and infinity while a weight is loaded.

use hoist_backend::{Encoding, Error, Result};

use crate::residency::Resident;

fn refuse(weight: &Resident, at: usize, error: &hoist_quant::Error) -> Error {
    match error {
        hoist_quant::Error::NonFinite { offset, .. } => Error::NonFiniteWeight {
            weight: weight.name.clone(),
            offset: at as u64 + offset,
        },
        other => Error::internal(crate::NAME, format!("`{}`: {other}", weight.name)),
    }
}

/// Checks whole blocks that stand `at` bytes into a weight's canonical bytes. The scale in front of each AprQ8 matrix is
/// left to [`check_prefixes`]: a piece may hold half of one.
pub(crate) fn check(weight: &Resident, at: usize, bytes: &[u8]) -> Result<()> {
    if weight.encoding == Encoding::APR_Q8 {
        return Ok(());
    }
    hoist_quant::check_finite(weight.encoding, bytes).map_err(|e| refuse(weight, at, &e))
}

/// [`check`] of a pushed chunk. What splits a block is passed: the ledger refuses it.
pub(crate) fn check_chunk(weight: &Resident, offset: u64, bytes: &[u8]) -> Result<()> {
    match usize::try_from(offset) {
        Ok(at) if bytes.len().is_multiple_of(weight.encoding.block_bytes() as usize) => {
            check(weight, at, bytes)
        }
        _ => Ok(()),
    }
}

/// Checks what stands in front of each matrix of a whole weight.
pub(crate) fn check_prefixes(weight: &Resident, bytes: &[u8]) -> Result<()> {
    if weight.encoding != Encoding::APR_Q8 {
        return Ok(());
    }
    let matrix = weight.matrix_bytes();
    for at in (0..bytes.len()).step_by(matrix) {
        hoist_quant::check_finite(weight.encoding, &bytes[at..at + matrix])
            .map_err(|e| refuse(weight, at, &e))?;
    }
    Ok(())
}
