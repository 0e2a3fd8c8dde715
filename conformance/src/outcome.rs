//! What comes of a case.

use std::fmt::Display;

use hoist_backend::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::mutation::{Rule, holds};

/// What was wrong, where, and what should have been.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{what}{}: expected {expected}, found {found}", if at.is_empty() { String::new() } else { format!(" ({at})") })]
pub struct Failure {
    /// What was looked at, such as `read_back of `blk.0.attn_q.weight``.
    pub what: String,
    /// Where in it, such as `byte 7 of 576`; may be empty.
    pub at: String,
    /// What the contract demands.
    pub expected: String,
    /// What the backend did.
    pub found: String,
}

impl Failure {
    /// A failure.
    pub fn new(
        what: impl Into<String>,
        at: impl Into<String>,
        expected: impl Display,
        found: impl Display,
    ) -> Self {
        Self {
            what: what.into(),
            at: at.into(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }
}

/// Why a case ended early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The backend broke a rule.
    Fail(Failure),
    /// The backend declares that it does not do this.
    Unsupported(String),
    /// Something that the case needs is not there; names it.
    Skip(String),
}

/// Result of a case.
pub type Verdict = std::result::Result<(), Stop>;

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Stop::Fail(failure)
    }
}

impl From<Error> for Stop {
    /// An error where the contract promises success.
    fn from(error: Error) -> Self {
        Stop::Fail(Failure::new("a call that must succeed", "", "success", error))
    }
}

/// Judges the result of one call.
pub trait Expect<T> {
    /// Demands success; `call` names what was called.
    ///
    /// # Errors
    /// A [`Failure`] with the error.
    fn succeeds(self, call: impl Into<String>) -> std::result::Result<T, Failure>;

    /// Demands an error that `is_it` accepts; `expected` describes it.
    ///
    /// # Errors
    /// A [`Failure`] with the other error, or with the success.
    fn fails(
        self,
        call: impl Into<String>,
        expected: &str,
        is_it: impl FnOnce(&Error) -> bool,
    ) -> std::result::Result<Error, Failure>;
}

impl<T> Expect<T> for Result<T> {
    fn succeeds(self, call: impl Into<String>) -> std::result::Result<T, Failure> {
        self.map_err(|error| Failure::new(call, "", "success", error))
    }

    fn fails(
        self,
        call: impl Into<String>,
        expected: &str,
        is_it: impl FnOnce(&Error) -> bool,
    ) -> std::result::Result<Error, Failure> {
        match self {
            Err(error) if is_it(&error) || !holds(Rule::ErrorIsTheRightOne) => Ok(error),
            Err(error) => Err(Failure::new(call, "", expected, error)),
            Ok(_) if !holds(Rule::CallFails) => Ok(Error::Cancelled),
            Ok(_) => Err(Failure::new(call, "", expected, "success")),
        }
    }
}

/// What came of a case, after expectations were looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// The backend does it right.
    Pass,
    /// The backend declares that it does not do this.
    Unsupported {
        /// What it does not do.
        reason: String,
    },
    /// Something that the case needs is not there.
    Skip {
        /// What.
        reason: String,
    },
    /// It failed, and an expectation says that it would.
    ExpectedFail {
        /// The expectation's reason.
        reason: String,
        /// What happened.
        found: String,
    },
    /// It passed, and an expectation says that it would fail. Counts as a failure.
    UnexpectedPass {
        /// The expectation's reason.
        reason: String,
    },
    /// The backend broke a rule.
    Fail {
        /// Which.
        failure: Failure,
    },
    /// It did not come back in time.
    Timeout {
        /// The limit in milliseconds.
        limit_ms: u64,
    },
    /// The process ended.
    Crash {
        /// How.
        how: String,
    },
    /// The process ended as if all were well, without a result. Counts as a crash.
    NoResult {
        /// What is known.
        how: String,
    },
}

impl Outcome {
    /// The outcome's name in reports.
    pub fn name(&self) -> &'static str {
        match self {
            Outcome::Pass => "pass",
            Outcome::Unsupported { .. } => "unsupported",
            Outcome::Skip { .. } => "skip",
            Outcome::ExpectedFail { .. } => "expected fail",
            Outcome::UnexpectedPass { .. } => "unexpected pass",
            Outcome::Fail { .. } => "fail",
            Outcome::Timeout { .. } => "timeout",
            Outcome::Crash { .. } => "crash",
            Outcome::NoResult { .. } => "no result",
        }
    }

    /// Whether the backend was asked and answered wrongly, expected or not.
    pub fn went_wrong(&self) -> bool {
        matches!(
            self,
            Outcome::Fail { .. } | Outcome::Timeout { .. } | Outcome::Crash { .. } | Outcome::NoResult { .. }
        )
    }

    /// Whether this alone makes a run fail.
    pub fn is_failure(&self) -> bool {
        self.went_wrong() || matches!(self, Outcome::UnexpectedPass { .. })
    }

    /// Whether the backend was asked the question at all.
    pub fn was_executed(&self) -> bool {
        !matches!(self, Outcome::Unsupported { .. } | Outcome::Skip { .. })
    }

    /// What a report says beside the name; empty for a pass.
    pub fn detail(&self) -> String {
        match self {
            Outcome::Pass => String::new(),
            Outcome::Unsupported { reason } | Outcome::Skip { reason } => reason.clone(),
            Outcome::ExpectedFail { reason, found } => format!("{found} (expected: {reason})"),
            Outcome::UnexpectedPass { reason } => format!("an expectation says that it fails: {reason}"),
            Outcome::Fail { failure } => failure.to_string(),
            Outcome::Timeout { limit_ms } => format!("no answer within {limit_ms} ms"),
            Outcome::Crash { how } | Outcome::NoResult { how } => how.clone(),
        }
    }
}

impl From<Verdict> for Outcome {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Ok(()) => Outcome::Pass,
            Err(Stop::Fail(failure)) => Outcome::Fail { failure },
            Err(Stop::Unsupported(reason)) => Outcome::Unsupported { reason },
            Err(Stop::Skip(reason)) => Outcome::Skip { reason },
        }
    }
}
