//! The report as one HTML page: nothing is fetched, no script is needed, and it reads on a phone.

use std::fmt::Write as _;

use super::junit::escape;
use super::{CaseReport, Cell, Report, problem};

/// Short enough for a table's cell, and told apart without colour.
fn sign(cell: Option<&Cell>) -> (&'static str, &'static str, &'static str) {
    match cell {
        None => ("none", "", "not asked"),
        Some(Cell::Pass) => ("pass", "✓", "pass"),
        Some(Cell::Fail) => ("fail", "✗", "fail"),
        Some(Cell::Expected) => ("known", "!", "expected fail"),
        Some(Cell::Unsupported) => ("unsupported", "–", "unsupported"),
        Some(Cell::Skip) => ("skip", "…", "skip"),
    }
}

const STYLE: &str = "
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#5b6570;--line:#d5dae0;--card:#f5f7f9;--good:#176b34;--bad:#b3261e;--warn:#8a5a00;--goodbg:#e2f3e7;--badbg:#fbe4e2;--warnbg:#fbf0d9}
@media(prefers-color-scheme:dark){:root{--bg:#14181d;--fg:#e6e9ed;--soft:#9aa5b1;--line:#333b45;--card:#1d232a;--good:#7ad79a;--bad:#ff9a91;--warn:#f0c36a;--goodbg:#173524;--badbg:#45201d;--warnbg:#3c3015}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:68rem;padding:1rem;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.35rem;margin:.2rem 0}h2{font-size:1.1rem;margin:2rem 0 .6rem}
.verdict{border-left:.4rem solid;padding:.7rem 1rem;border-radius:.3rem;font-weight:600;font-size:1.1rem}
.yes{border-color:var(--good);background:var(--goodbg);color:var(--good)}.no{border-color:var(--bad);background:var(--badbg);color:var(--bad)}
.soft{color:var(--soft)}dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;margin:.5rem 0}dt{color:var(--soft)}dd{margin:0;min-width:0}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.9rem}th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:left;white-space:nowrap}
th{font-weight:600}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.matrix th.c{writing-mode:vertical-rl;transform:rotate(180deg);padding:.5rem .2rem;font-weight:400}.matrix td.s{text-align:center;padding:.2rem .45rem}
.matrix th:first-child{position:sticky;left:0;background:var(--bg)}
.pass{color:var(--good)}.fail{color:var(--bad);background:var(--badbg);font-weight:700}.known{color:var(--warn);background:var(--warnbg)}.unsupported,.skip,.none{color:var(--soft)}
.card{background:var(--card);border:1px solid var(--line);border-left:.3rem solid var(--bad);border-radius:.3rem;padding:.6rem .8rem;margin:.6rem 0}
.card h3{font-size:.95rem;margin:0 0 .3rem;font-weight:600}.card p{margin:.2rem 0}
code{font:.85em/1.4 ui-monospace,monospace;background:var(--card)}pre{font:.82rem/1.4 ui-monospace,monospace;background:var(--bg);border:1px solid var(--line);border-radius:.3rem;padding:.5rem;margin:.4rem 0 0;white-space:pre-wrap}
details{margin:.4rem 0}summary{cursor:pointer;padding:.3rem 0}";

/// Failures that are shown without a touch.
const OPEN_FAILURES: usize = 12;

/// The whole report.
pub fn html(report: &Report) -> String {
    let mut page = String::new();
    // Writing to a string cannot fail.
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <title>{} — hoist conform</title><style>{STYLE}\n</style></head><body>\n",
        escape(&report.target)
    );
    head(&mut page, report);
    failures(&mut page, report);
    suites(&mut page, report);
    matrix(&mut page, report);
    measurements(&mut page, report);
    every_case(&mut page, report);
    page.push_str("</body></html>\n");
    page
}

fn head(page: &mut String, report: &Report) {
    let class = if report.conforms { "yes" } else { "no" };
    let _ = write!(
        page,
        "<h1>{}</h1>\n<p class=\"verdict {class}\">{}</p>\n",
        escape(&report.target),
        escape(&report.verdict())
    );
    let mut facts: Vec<(String, String)> = Vec::new();
    let mut fact = |name: &str, value: String| facts.push((name.to_owned(), value));
    if let Some(backend) = &report.backend {
        fact("backend", format!("{} ({})", backend.name, backend.numerics));
        fact("device", format!("{} — {}", backend.device, backend.device_name));
        fact(
            "memory",
            format!("{:.1} GiB", backend.total_memory as f64 / (1u64 << 30) as f64),
        );
        fact(
            "declares",
            format!(
                "{} encodings held, {} computed with, {} operations",
                backend.stored.len(),
                backend.computed.len(),
                backend.ops.len()
            ),
        );
    }
    for (name, value) in &report.device_details {
        fact(name, value.clone());
    }
    if let Some(plugin) = &report.plugin {
        fact(
            "library",
            format!("{} {} by {}", plugin.name, plugin.version, plugin.vendor),
        );
        fact("path", plugin.path.display().to_string());
        fact("SHA-256", plugin.sha256.clone());
        let (major, least, most) = plugin.abi;
        fact("interface", format!("major {major}, minors {least} to {most}"));
    }
    fact(
        "suite",
        format!("{}, numerics {}", report.suite_version, report.numerics_contract),
    );
    if let Some(hash) = &report.suite_hash {
        fact("suite hash", hash.clone());
    }
    fact(
        "seed",
        if report.seeds == 1 {
            report.seed.to_string()
        } else {
            format!("{} seeds from {}", report.seeds, report.seed)
        },
    );
    fact(
        "run",
        format!(
            "{} cases in {:.1} s",
            report.cases.len(),
            report.millis as f64 / 1e3
        ),
    );
    page.push_str("<dl>");
    for (name, value) in facts {
        let _ = write!(page, "<dt>{}</dt><dd>{}</dd>", escape(&name), escape(&value));
    }
    page.push_str("</dl>\n");
}

fn failures(page: &mut String, report: &Report) {
    let failed: Vec<&CaseReport> = report.failures().collect();
    let others: Vec<&String> = report
        .problems
        .iter()
        .filter(|p| !failed.iter().any(|c| p.contains(&c.id)))
        .collect();
    if failed.is_empty() && others.is_empty() {
        return;
    }
    let _ = writeln!(page, "<h2>What speaks against it: {}</h2>", report.problems.len());
    for problem in others {
        let _ = writeln!(page, "<div class=\"card\"><p>{}</p></div>", escape(problem));
    }
    let more = failed.len().saturating_sub(OPEN_FAILURES);
    for (i, case) in failed.into_iter().enumerate() {
        if i == OPEN_FAILURES {
            let _ = writeln!(page, "<details><summary>{more} more failures</summary>");
        }
        let _ = write!(
            page,
            "<div class=\"card\"><h3>{}</h3><p><b>{}</b>{}</p>",
            escape(&case.id),
            case.outcome.name(),
            match &case.outcome {
                crate::Outcome::Fail { failure } => format!(
                    ": {}{}<br>expected <code>{}</code><br>found <code>{}</code>",
                    escape(&failure.what),
                    if failure.at.is_empty() {
                        String::new()
                    } else {
                        format!(", {}", escape(&failure.at))
                    },
                    escape(&failure.expected),
                    escape(&failure.found)
                ),
                other => format!(": {}", escape(&other.detail())),
            }
        );
        let _ = writeln!(page, "<pre>{}</pre></div>", escape(&case.replay));
    }
    if more > 0 {
        page.push_str("</details>\n");
    }
}

fn suites(page: &mut String, report: &Report) {
    page.push_str("<h2>Suites</h2>\n<div class=\"scroll\"><table>");
    for (i, row) in super::table(report).into_iter().enumerate() {
        let tag = if i == 0 { "th" } else { "td" };
        page.push_str("<tr>");
        for (column, text) in row.iter().enumerate() {
            let class = if column == 0 { "" } else { " class=\"n\"" };
            let _ = write!(page, "<{tag}{class}>{}</{tag}>", escape(text));
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</table></div>\n");
}

fn matrix(page: &mut String, report: &Report) {
    let matrix = report.matrix();
    if matrix.rows.is_empty() {
        return;
    }
    page.push_str(
        "<h2>Encodings</h2>\n<p class=\"soft\">✓ pass · ✗ fail · ! expected fail · – declared unsupported · … skipped</p>\n\
         <div class=\"scroll\"><table class=\"matrix\"><tr><th></th>",
    );
    for column in &matrix.columns {
        let _ = write!(page, "<th class=\"c\">{}</th>", escape(column));
    }
    page.push_str("</tr>\n");
    for row in &matrix.rows {
        let _ = write!(page, "<tr><th>{}</th>", escape(row));
        for column in &matrix.columns {
            let (class, sign, name) = sign(matrix.cells.get(&(row.clone(), column.clone())));
            let _ = write!(
                page,
                "<td class=\"s {class}\" title=\"{}, {}: {name}\">{sign}</td>",
                escape(row),
                escape(column)
            );
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</table></div>\n");
}

/// Errors of bounded backends worst first, then what was timed and counted.
fn measurements(page: &mut String, report: &Report) {
    let mut errors = Vec::new();
    let mut others = Vec::new();
    for case in &report.cases {
        for m in &case.measurements {
            let list = if m.unit == "of bound" {
                &mut errors
            } else {
                &mut others
            };
            list.push((case.id.as_str(), m));
        }
    }
    errors.sort_by(|a, b| b.1.value.total_cmp(&a.1.value));
    errors.truncate(20);
    for (title, list) in [("Worst errors", errors), ("Measured", others)] {
        if list.is_empty() {
            continue;
        }
        let _ = write!(
            page,
            "<h2>{title}</h2>\n<details{}><summary>{} numbers</summary><div class=\"scroll\"><table>",
            if title == "Worst errors" { " open" } else { "" },
            list.len()
        );
        for (id, m) in list {
            let value = if m.value == 0.0 || (0.01..1e6).contains(&m.value.abs()) {
                format!("{:.3}", m.value)
            } else {
                format!("{:.3e}", m.value)
            };
            let _ = writeln!(
                page,
                "<tr><td class=\"n\">{value} {}</td><td>{}</td><td>{}</td></tr>",
                escape(&m.unit),
                escape(&m.name),
                escape(id)
            );
        }
        page.push_str("</table></div></details>\n");
    }
}

fn every_case(page: &mut String, report: &Report) {
    let mut suites: Vec<&str> = report.cases.iter().map(|c| c.suite.as_str()).collect();
    suites.dedup();
    page.push_str("<h2>Every case</h2>\n");
    for suite in suites {
        let cases: Vec<&CaseReport> = report.cases.iter().filter(|c| c.suite == suite).collect();
        let _ = write!(
            page,
            "<details><summary>{suite}: {}</summary><div class=\"scroll\"><table>",
            cases.len()
        );
        for case in cases {
            let class = match (problem(&report.profile, case), &case.outcome) {
                (Some(_), _) => "fail",
                (None, crate::Outcome::Pass) => "pass",
                (None, crate::Outcome::ExpectedFail { .. }) => "known",
                (None, _) => "skip",
            };
            let _ = writeln!(
                page,
                "<tr><td class=\"{class}\">{}</td><td class=\"n\">{:.1} ms</td><td>{}</td><td class=\"soft\">{}</td></tr>",
                case.outcome.name(),
                case.micros as f64 / 1e3,
                escape(&case.id),
                escape(&case.outcome.detail())
            );
        }
        page.push_str("</table></div></details>\n");
    }
}
