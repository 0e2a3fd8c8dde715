//! What went wrong while plugins gave back what they held: found when values are dropped, where no error can be returned.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::Error;

/// A plugin that fails more often than this has made its point.
const MOST: usize = 64;

static PROBLEMS: Mutex<Vec<Error>> = Mutex::new(Vec::new());

/// Keeps a failure for [`take_parting_errors`].
pub(crate) fn record(path: &Path, call: &'static str, reason: String) {
    let error = Error::GivingBack {
        path: path.to_owned(),
        call,
        reason,
    };
    tracing::warn!("{error}");
    let mut problems = PROBLEMS.lock().unwrap_or_else(PoisonError::into_inner);
    if problems.len() < MOST {
        problems.push(error);
    }
}

/// Failures of `model_destroy`, `device_close` and `shutdown`, and of worker processes to end well, that happened in this
/// process while backends and providers were dropped, each an [`Error::GivingBack`]. Each is handed out once.
pub fn take_parting_errors() -> Vec<Error> {
    std::mem::take(&mut *PROBLEMS.lock().unwrap_or_else(PoisonError::into_inner))
}
