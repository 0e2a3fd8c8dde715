//! The report on a terminal.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::Report;

/// Cases by suite and outcome, as rows of text: the header first.
pub fn table(report: &Report) -> Vec<Vec<String>> {
    const OUTCOMES: [&str; 9] = [
        "pass",
        "fail",
        "crash",
        "timeout",
        "no result",
        "unexpected pass",
        "expected fail",
        "unsupported",
        "skip",
    ];
    let mut suites: Vec<&str> = Vec::new();
    let mut counts: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    let mut micros: BTreeMap<&str, u64> = BTreeMap::new();
    for case in &report.cases {
        if !suites.contains(&case.suite.as_str()) {
            suites.push(&case.suite);
        }
        *counts.entry((&case.suite, case.outcome.name())).or_default() += 1;
        *micros.entry(&case.suite).or_default() += case.micros;
    }
    let shown: Vec<&str> = OUTCOMES
        .into_iter()
        .filter(|o| *o == "pass" || report.counts.contains_key(*o))
        .collect();
    let header = std::iter::once("suite")
        .chain(shown.iter().copied())
        .chain(["seconds"])
        .map(str::to_owned);
    let rows = suites.iter().map(|suite| {
        std::iter::once((*suite).to_owned())
            .chain(shown.iter().map(|outcome| {
                counts
                    .get(&(*suite, *outcome))
                    .map_or_else(String::new, usize::to_string)
            }))
            .chain([format!(
                "{:.2}",
                micros.get(suite).copied().unwrap_or(0) as f64 / 1e6
            )])
            .collect()
    });
    std::iter::once(header.collect()).chain(rows).collect()
}

/// What speaks against the target, each with the command that asks it again; then the verdict.
pub fn summary(report: &Report) -> String {
    let mut text = String::new();
    for problem in &report.problems {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{problem}");
        if let Some(case) = report.failures().find(|c| problem.contains(&c.id)) {
            let _ = writeln!(text, "    {}", case.replay);
        }
    }
    if !report.problems.is_empty() {
        text.push('\n');
    }
    let seeds = if report.seeds == 1 {
        format!("seed {}", report.seed)
    } else {
        format!("{} seeds from {}", report.seeds, report.seed)
    };
    let _ = writeln!(text, "{}: {} ({seeds})", report.target, report.verdict());
    text
}
