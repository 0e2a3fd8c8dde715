//! Cases of the `device` suite.

use crate::Case;

/// The cases.
pub fn cases() -> Vec<Case> {
    Vec::new()
}
