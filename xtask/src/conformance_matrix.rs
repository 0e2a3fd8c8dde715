//! `docs/conformance-matrix.md`, from reports of `hoist conform`.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use hoist_conformance::report::{Cell, Matrix, Report, SCHEMA};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Reports that `hoist conform --json-file` wrote, in the order of the page.
    #[arg(required = true)]
    reports: Vec<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let reports = arguments
        .reports
        .iter()
        .map(|path| {
            let text =
                std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
            let report: Report =
                serde_json::from_str(&text).with_context(|| format!("{} is no report", path.display()))?;
            ensure!(
                report.schema == SCHEMA,
                "{} is of schema {}",
                path.display(),
                report.schema
            );
            Ok(report)
        })
        .collect::<Result<Vec<_>>>()?;
    let path = crate::root()?.join("docs/conformance-matrix.md");
    std::fs::write(&path, page(&reports)).with_context(|| format!("writing {}", path.display()))?;
    println!("{}", path.display());
    Ok(())
}

fn name(report: &Report) -> String {
    match (&report.plugin, &report.backend) {
        (Some(plugin), _) => format!("plugin {}", plugin.name),
        (None, Some(backend)) => backend.device.clone(),
        (None, None) => report.target.clone(),
    }
}

fn page(reports: &[Report]) -> String {
    let mut page = String::from(
        "# What conforms\n\n\
         Written by `cargo xtask conformance-matrix REPORT.json…` from reports of `hoist conform`; what the profiles guarantee is\n\
         said in [conformance/README.md](../conformance/README.md).\n\n\
         | backend | verdict | numerics | device | cases | pass | unsupported | skip | fail | seed |\n\
         |---|---|---|---|--:|--:|--:|--:|--:|--:|\n",
    );
    for report in reports {
        let count = |name: &str| report.counts.get(name).copied().unwrap_or(0);
        let backend = report.backend.as_ref();
        // Writing to a string cannot fail.
        let _ = writeln!(
            page,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            name(report),
            report.verdict(),
            backend.map_or("", |b| &b.numerics),
            backend.map_or("", |b| &b.device_name),
            report.cases.len(),
            count("pass"),
            count("unsupported"),
            count("skip"),
            report.failures().count(),
            report.seed,
        );
    }
    page.push_str(
        "\n✓ all pass · ✗ a failure · ! an expected failure · – declared unsupported · … skipped\n",
    );
    for report in reports {
        let matrix = report.matrix();
        if !matrix.rows.is_empty() {
            let _ = writeln!(page, "\n## {}: encodings\n", name(report));
            table(&mut page, &matrix);
        }
        let _ = writeln!(page, "\n## {}: suites\n", name(report));
        for (i, row) in hoist_conformance::report::table(report).iter().enumerate() {
            // Times belong to a report, not to this page.
            let columns = row.len() - 1;
            let _ = writeln!(page, "| {} |", row[..columns].join(" | "));
            if i == 0 {
                let _ = writeln!(page, "|---|{}", "--:|".repeat(columns - 1));
            }
        }
    }
    page
}

fn table(page: &mut String, matrix: &Matrix) {
    let _ = writeln!(page, "| | {} |", matrix.columns.join(" | "));
    let _ = writeln!(page, "|---|{}", ":-:|".repeat(matrix.columns.len()));
    for row in &matrix.rows {
        let cells =
            matrix
                .columns
                .iter()
                .map(|column| match matrix.cells.get(&(row.clone(), column.clone())) {
                    None => "",
                    Some(Cell::Pass) => "✓",
                    Some(Cell::Fail) => "✗",
                    Some(Cell::Expected) => "!",
                    Some(Cell::Unsupported) => "–",
                    Some(Cell::Skip) => "…",
                });
        let _ = writeln!(page, "| {row} | {} |", cells.collect::<Vec<_>>().join(" | "));
    }
}
