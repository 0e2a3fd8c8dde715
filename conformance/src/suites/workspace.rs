//! Cases of the `workspace` suite.

use crate::Case;

/// The cases.
pub fn cases() -> Vec<Case> {
    Vec::new()
}
