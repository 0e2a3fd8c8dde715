//! Cases of the `interface` suite.

use crate::Case;

/// The cases.
pub fn cases() -> Vec<Case> {
    Vec::new()
}
