//! What a run found, and how it is told.

mod html;
mod junit;
mod text;

use std::collections::BTreeMap;
use std::time::Duration;

use hoist_backend::BackendInfo;
use serde::{Deserialize, Serialize};

use crate::context::Measurement;
use crate::mutation::{Rule as Mutated, holds};
use crate::profile::Rule;
use crate::runner::Options;
use crate::{Outcome, PluginFacts, SUITE_VERSION, expectation, suites};

pub use html::html;
pub use junit::junit;
pub use text::{summary, table};

/// Name and version of the JSON report.
pub const SCHEMA: &str = "hoist.conform/1";

/// What a backend declares of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendFacts {
    /// The backend's name.
    pub name: String,
    /// The device's id.
    pub device: String,
    /// The device's product name.
    pub device_name: String,
    /// `exact` or `bounded`.
    pub numerics: String,
    /// Encodings it holds.
    pub stored: Vec<String>,
    /// Encodings it computes with.
    pub computed: Vec<String>,
    /// Operations it runs.
    pub ops: Vec<String>,
    /// Memory of its devices in bytes.
    pub total_memory: u64,
}

impl BackendFacts {
    /// The facts that reports show.
    pub fn of(info: &BackendInfo) -> Self {
        let names = |set: hoist_backend::EncodingSet| set.iter().map(|e| e.name().to_owned()).collect();
        Self {
            name: info.name.clone(),
            device: info.device.clone(),
            device_name: info.device_name.clone(),
            numerics: info.numerics.to_string(),
            stored: names(info.stored),
            computed: names(info.computed),
            ops: info.ops.iter().map(|op| op.name().to_owned()).collect(),
            total_memory: info
                .memory
                .devices
                .iter()
                .fold(0, |sum, d| u64::saturating_add(sum, d.total)),
        }
    }
}

/// One case of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CaseReport {
    /// The case's id.
    pub id: String,
    /// Its suite.
    pub suite: String,
    /// Its group.
    pub group: String,
    /// Its fixed parameters.
    pub parameters: BTreeMap<String, String>,
    /// What the profile demands.
    pub rule: Rule,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// The seed.
    pub seed: u64,
    /// What was measured.
    pub measurements: Vec<Measurement>,
    /// How long it took.
    pub micros: u64,
    /// A command that asks it again, with the same numbers.
    pub replay: String,
}

/// A run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`]
    pub schema: String,
    /// Version of the suite.
    pub suite_version: String,
    /// Hash of the program that holds the suite, for instance BLAKE3.
    pub suite_hash: Option<String>,
    /// The numerics contract that exact backends are judged by.
    pub numerics_contract: String,
    /// The target, as the user named it.
    pub target: String,
    /// What it declares; `None` if it never opened.
    pub backend: Option<BackendFacts>,
    /// The library, if it is one.
    pub plugin: Option<PluginFacts>,
    /// Facts of the device, such as its driver, as (name, value).
    pub device_details: Vec<(String, String)>,
    /// The profile.
    pub profile: String,
    /// Filters, if only a part of the profile was run.
    pub filters: Vec<String>,
    /// The first seed.
    pub seed: u64,
    /// How many seeds.
    pub seeds: u64,
    /// Milliseconds of the whole run.
    pub millis: u64,
    /// Whether nothing speaks against it. A claim needs no filters besides.
    pub conforms: bool,
    /// What speaks against it, a line each.
    pub problems: Vec<String>,
    /// Cases by outcome.
    pub counts: BTreeMap<String, usize>,
    /// The cases, in order.
    pub cases: Vec<CaseReport>,
}

impl Report {
    /// Judges the outcomes of a run.
    pub(crate) fn judge(
        options: &Options,
        target: &str,
        backend: Option<BackendFacts>,
        cases: Vec<CaseReport>,
        seeds: u64,
        took: Duration,
    ) -> Self {
        let mut problems = Vec::new();
        let ids: Vec<String> = suites::all().iter().map(crate::Case::id).collect();
        for stale in expectation::stale(&options.expectations, &ids) {
            problems.push(format!(
                "stale expectation: line {} expects `{}` to fail, and there is no such case",
                stale.line, stale.pattern
            ));
        }
        for stale in options.profile.stale(&ids) {
            problems.push(format!(
                "stale profile: `{}` names `{stale}`, and there is no such case",
                options.profile.name
            ));
        }
        for case in &cases {
            if let Some(problem) = problem(&options.profile.name, case) {
                problems.push(problem);
            }
        }
        if !cases.iter().any(|c| c.outcome.was_executed()) && holds(Mutated::NothingExecutedFails) {
            problems.push(format!(
                "nothing was executed: all {} selected cases are unsupported or skipped",
                cases.len()
            ));
        }
        let mut counts = BTreeMap::new();
        for case in &cases {
            *counts.entry(case.outcome.name().to_owned()).or_default() += 1;
        }
        Self {
            schema: SCHEMA.into(),
            suite_version: SUITE_VERSION.into(),
            suite_hash: None,
            numerics_contract: hoist_backend::NUMERICS_CONTRACT.into(),
            target: target.to_owned(),
            backend,
            plugin: None,
            device_details: Vec::new(),
            profile: options.profile.name.clone(),
            filters: options.filters.clone(),
            seed: options.seed,
            seeds,
            millis: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
            conforms: problems.is_empty(),
            problems,
            counts,
            cases,
        }
    }

    /// Cases that make the run fail, in order.
    pub fn failures(&self) -> impl Iterator<Item = &CaseReport> {
        self.cases.iter().filter(|c| problem(&self.profile, c).is_some())
    }

    /// One line: what may be claimed.
    pub fn verdict(&self) -> String {
        let expected = self.counts.get("expected fail").copied().unwrap_or(0);
        let part = if self.filters.is_empty() {
            String::new()
        } else {
            format!(", of which only {} were run", self.filters.join(" and "))
        };
        match (self.conforms, expected) {
            (true, 0) => format!("conforms to {} {}{part}", self.profile, self.suite_version),
            (true, n) => format!(
                "conforms to {} {} but for {n} expected failures{part}",
                self.profile, self.suite_version
            ),
            (false, _) => format!(
                "does not conform to {} {}{part}",
                self.profile, self.suite_version
            ),
        }
    }

    /// The report as JSON.
    ///
    /// # Errors
    /// As `serde_json`.
    pub fn json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self).map(|text| text + "\n")
    }

    /// For each encoding and each group that has a case of it: the worst outcome.
    pub fn matrix(&self) -> Matrix {
        let mut columns: Vec<String> = Vec::new();
        let mut rows: Vec<String> = Vec::new();
        let mut cells: BTreeMap<(String, String), Cell> = BTreeMap::new();
        for case in &self.cases {
            let Some(encoding) = case.parameters.get("encoding") else {
                continue;
            };
            let column = format!("{}::{}", case.suite, case.group);
            for (list, name) in [(&mut columns, &column), (&mut rows, encoding)] {
                if !list.contains(name) {
                    list.push(name.clone());
                }
            }
            let cell = Cell::of(case, problem(&self.profile, case).is_some());
            let entry = cells.entry((encoding.clone(), column)).or_insert(cell);
            *entry = (*entry).max(cell);
        }
        let place = |name: &String| {
            hoist_backend::Encoding::from_name(name).map_or(usize::MAX, hoist_backend::Encoding::index)
        };
        rows.sort_by_key(place);
        Matrix { rows, columns, cells }
    }
}

/// What a cell of the matrix shows, better first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cell {
    /// Skipped.
    Skip,
    /// Declared unsupported.
    Unsupported,
    /// All pass.
    Pass,
    /// A failure that was expected.
    Expected,
    /// A failure.
    Fail,
}

impl Cell {
    fn of(case: &CaseReport, failed: bool) -> Self {
        match &case.outcome {
            _ if failed => Cell::Fail,
            Outcome::Pass => Cell::Pass,
            Outcome::Skip { .. } => Cell::Skip,
            Outcome::Unsupported { .. } => Cell::Unsupported,
            Outcome::ExpectedFail { .. } => Cell::Expected,
            _ => Cell::Fail,
        }
    }
}

/// Encodings and what was asked of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// Encodings.
    pub rows: Vec<String>,
    /// `suite::group`
    pub columns: Vec<String>,
    /// By encoding and group.
    pub cells: BTreeMap<(String, String), Cell>,
}

/// What a case has against conformance, as a line.
fn problem(profile: &str, case: &CaseReport) -> Option<String> {
    let outcome = &case.outcome;
    match (outcome, case.rule) {
        (Outcome::UnexpectedPass { reason }, _) => Some(format!(
            "unexpected pass: {} was expected to fail ({reason})",
            case.id
        )),
        (Outcome::Fail { .. }, Rule::Report) => None,
        (_, Rule::Report) if !holds(Mutated::CrashOfReportedFails) => None,
        (wrong, _) if wrong.is_failure() => {
            Some(format!("{}: {}: {}", wrong.name(), case.id, wrong.detail()))
        }
        (Outcome::Unsupported { reason }, Rule::Must) if holds(Mutated::LostCapabilityFails) => {
            Some(format!(
                "lost capability: {} must pass for `{profile}`, and the backend declares: {reason}",
                case.id
            ))
        }
        (Outcome::Skip { reason }, Rule::Must) if holds(Mutated::SkippedMustFails) => Some(format!(
            "not asked: {} must pass for `{profile}`, and was skipped: {reason}",
            case.id
        )),
        _ => None,
    }
}

/// The command that asks a case again.
pub(crate) fn replay(target: &str, profile: &str, seed: u64, id: &str) -> String {
    let quote = |text: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:#".contains(c);
        if text.chars().all(plain) {
            text.to_owned()
        } else {
            format!("'{}'", text.replace('\'', r"'\''"))
        }
    };
    format!(
        "hoist conform {} --profile {} --seed {seed} --filter {}",
        quote(target),
        quote(profile),
        quote(id)
    )
}
