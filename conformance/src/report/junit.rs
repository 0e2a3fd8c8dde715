//! The report as JUnit XML, which CI systems read.

use std::fmt::Write as _;

use super::{CaseReport, Report, problem};

/// The whole report, one `testsuite` a suite.
pub fn junit(report: &Report) -> String {
    let mut suites: Vec<&str> = report.cases.iter().map(|c| c.suite.as_str()).collect();
    suites.dedup();
    let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    // Writing to a string cannot fail.
    let _ = writeln!(
        xml,
        "<testsuites name=\"hoist conform {}\" tests=\"{}\" failures=\"{}\" time=\"{:.3}\">",
        escape(&report.target),
        report.cases.len(),
        report.failures().count(),
        report.millis as f64 / 1e3
    );
    for suite in suites {
        let cases: Vec<&CaseReport> = report.cases.iter().filter(|c| c.suite == suite).collect();
        let failed = cases
            .iter()
            .filter(|c| problem(&report.profile, c).is_some())
            .count();
        let skipped = cases.iter().filter(|c| is_skipped(report, c)).count();
        let seconds = cases.iter().map(|c| c.micros).sum::<u64>() as f64 / 1e6;
        let _ = writeln!(
            xml,
            "  <testsuite name=\"{suite}\" tests=\"{}\" failures=\"{failed}\" errors=\"0\" skipped=\"{skipped}\" time=\"{seconds:.6}\">",
            cases.len()
        );
        for case in cases {
            test_case(&mut xml, report, case);
        }
        xml.push_str("  </testsuite>\n");
    }
    xml.push_str("</testsuites>\n");
    xml
}

fn is_skipped(report: &Report, case: &CaseReport) -> bool {
    problem(&report.profile, case).is_none() && case.outcome != crate::Outcome::Pass
}

fn test_case(xml: &mut String, report: &Report, case: &CaseReport) {
    let _ = write!(
        xml,
        "    <testcase classname=\"{}::{}\" name=\"{}\" time=\"{:.6}\"",
        case.suite,
        case.group,
        escape(&case.id),
        case.micros as f64 / 1e6
    );
    match problem(&report.profile, case) {
        Some(problem) => {
            let _ = write!(
                xml,
                ">\n      <failure type=\"{}\" message=\"{}\">{}\n{}</failure>\n    </testcase>\n",
                case.outcome.name(),
                escape(&problem),
                escape(&problem),
                escape(&case.replay)
            );
        }
        None if is_skipped(report, case) => {
            let _ = write!(
                xml,
                ">\n      <skipped message=\"{}: {}\"/>\n    </testcase>\n",
                case.outcome.name(),
                escape(&case.outcome.detail())
            );
        }
        None => xml.push_str("/>\n"),
    }
}

/// XML 1.0 text: the five characters escaped, and control characters, which have no place in XML, replaced.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            c if c.is_control() || matches!(c, '\u{FFFE}' | '\u{FFFF}') => out.push('\u{FFFD}'),
            c => out.push(c),
        }
    }
    out
}
