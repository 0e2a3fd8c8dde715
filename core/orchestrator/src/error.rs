use crate::{Fit, LoadReport, PlanError};

/// Result of planning, loading and opening.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model did not become resident. Nothing of it is, then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each variant's message names its fields")]
pub enum Error {
    /// The file is refused.
    #[error(transparent)]
    Format(#[from] hoist_formats::Error),
    /// The file is no model that Hoist knows.
    #[error(transparent)]
    Model(#[from] hoist_model::Error),
    /// The model gets no plan for this backend.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The backend or the source failed.
    #[error(transparent)]
    Backend(#[from] hoist_backend::Error),
    /// The backend has too little memory for the plan; nothing was read.
    #[error(
        "the model does not fit {device}: it needs {} bytes, {} are available, {} are missing",
        fit.needed, fit.available, fit.short_by
    )]
    DoesNotFit { device: String, fit: Fit },
    /// A receipt that contradicts the plan: a bug of the backend.
    #[error("backend `{backend}` made {what} {found}, and the plan has {expected}")]
    Receipt {
        backend: String,
        what: &'static str,
        expected: u64,
        found: u64,
    },
    /// What is resident is not what the file holds. Everything was unloaded.
    #[error(
        "{} of {} weights differ from the file after the upload: {}",
        report.mismatches().len(), report.counts.weights(), first_names(report.mismatches())
    )]
    Mismatch { report: Box<LoadReport> },
    /// A load failed, and so did giving back what it had taken.
    #[error("{error}; then giving back what was resident failed: {cleanup}")]
    NotGivenBack {
        error: Box<Error>,
        cleanup: hoist_backend::Error,
    },
}

/// A few names, and how many more there are.
fn first_names(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let shown: Vec<_> = names.iter().take(SHOWN).map(|n| format!("`{n}`")).collect();
    match names.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
