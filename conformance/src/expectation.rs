//! Expectations: failures that are known, with a reason, in a file.

use crate::mutation::{Rule, holds};
use crate::{Outcome, pattern};

/// A known failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expectation {
    /// Which cases.
    pub pattern: String,
    /// Why.
    pub reason: String,
    /// Where it stands, for messages.
    pub line: usize,
}

/// A line that is no expectation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expectations, line {line}: expected `fail PATTERN because REASON`, found `{found}`")]
pub struct BadExpectation {
    /// Line, from 1.
    pub line: usize,
    /// What stands there.
    pub found: String,
}

/// Reads a file of lines `fail PATTERN because REASON`; comments begin with `#`.
///
/// # Errors
/// [`BadExpectation`]
pub fn parse(text: &str) -> Result<Vec<Expectation>, BadExpectation> {
    let mut expectations = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let parts = line
            .strip_prefix("fail ")
            .and_then(|rest| rest.split_once(" because "))
            .map(|(pattern, reason)| (pattern.trim(), reason.trim()))
            .filter(|(pattern, reason)| !pattern.is_empty() && !reason.is_empty());
        let Some((pattern, reason)) = parts else {
            return Err(BadExpectation {
                line: i + 1,
                found: line.to_owned(),
            });
        };
        expectations.push(Expectation {
            pattern: pattern.to_owned(),
            reason: reason.to_owned(),
            line: i + 1,
        });
    }
    Ok(expectations)
}

/// What an outcome becomes: a failure that was expected is one no longer, and a pass that was not expected becomes one.
/// What was not executed stays as it is.
pub fn apply(expectations: &[Expectation], id: &str, outcome: Outcome) -> Outcome {
    let Some(expectation) = expectations.iter().find(|e| pattern::matches(&e.pattern, id)) else {
        return outcome;
    };
    let reason = expectation.reason.clone();
    match outcome {
        Outcome::Pass if holds(Rule::UnexpectedPassFails) => Outcome::UnexpectedPass { reason },
        wrong if wrong.went_wrong() => Outcome::ExpectedFail {
            reason,
            found: wrong.detail(),
        },
        other => other,
    }
}

/// Expectations that match no case at all: what they spoke of is gone.
pub fn stale<'a>(expectations: &'a [Expectation], ids: &[String]) -> Vec<&'a Expectation> {
    expectations
        .iter()
        .filter(|_| holds(Rule::StaleExpectationFails))
        .filter(|e| !ids.iter().any(|id| pattern::matches(&e.pattern, id)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Failure;

    fn failed() -> Outcome {
        Outcome::Fail {
            failure: Failure::new("a", "b", "c", "d"),
        }
    }

    #[test]
    fn a_known_failure_passes_and_an_unexpected_pass_fails() {
        let known = parse("# why\nfail a::b because the device rounds\n").unwrap();
        assert!(!apply(&known, "a::b::c", failed()).is_failure());
        assert!(apply(&known, "a::b::c", Outcome::Pass).is_failure());
        // The control: another case.
        assert!(apply(&known, "a::c", failed()).is_failure());
        assert!(!apply(&known, "a::c", Outcome::Pass).is_failure());
        let skip = Outcome::Skip { reason: "x".into() };
        assert_eq!(apply(&known, "a::b", skip.clone()), skip);
    }

    #[test]
    fn an_expectation_of_nothing_is_stale() {
        let known = parse("fail a::b because x\nfail a::d because y").unwrap();
        let stale = stale(&known, &["a::b::c".into()]);
        assert_eq!(stale.len(), 1);
        assert_eq!(stale[0].line, 2);
    }

    #[test]
    fn a_failure_without_a_reason_is_not_expected() {
        for text in [
            "fail a",
            "fail a because ",
            "fail  because x",
            "pass a because x",
            "a",
        ] {
            assert_eq!(parse(&format!("\n{text}")).unwrap_err().line, 2, "{text}");
        }
    }
}
