//! Float matrices kept as `[in, out]`.

use crate::residency::Resident;

/// Where element `e` of a canonical `[rows, cols]` matrix stands in its `[cols, rows]` transposition.
fn place(rows: usize, cols: usize, e: usize) -> usize {
    (e % cols) * rows + e / cols
}

/// Writes canonical bytes, `at` bytes into a matrix, to their places in the transposed `matrix`.
pub(crate) fn scatter(weight: &Resident, at: usize, bytes: &[u8], matrix: &mut [u8]) {
    let (rows, cols) = (weight.shape.rows as usize, weight.shape.cols as usize);
    let element = weight.encoding.block_bytes() as usize;
    for (i, value) in bytes.chunks_exact(element).enumerate() {
        let to = place(rows, cols, at / element + i) * element;
        matrix[to..to + element].copy_from_slice(value);
    }
}

/// Collects canonical bytes, `at` bytes into a matrix, from the transposed `matrix`.
pub(crate) fn gather(weight: &Resident, at: usize, out: &mut [u8], matrix: &[u8]) {
    let (rows, cols) = (weight.shape.rows as usize, weight.shape.cols as usize);
    let element = weight.encoding.block_bytes() as usize;
    for (i, value) in out.chunks_exact_mut(element).enumerate() {
        let from = place(rows, cols, at / element + i) * element;
        value.copy_from_slice(&matrix[from..from + element]);
    }
}
