//! Cases of the `encodings` suite.

use crate::Case;

/// The cases.
pub fn cases() -> Vec<Case> {
    Vec::new()
}
