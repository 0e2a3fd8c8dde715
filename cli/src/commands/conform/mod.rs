//! `hoist conform`: judges a backend by the conformance suite.

mod target;

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use hoist_conformance::expectation::{self, Expectation};
use hoist_conformance::profile::Profile;
use hoist_conformance::report::{CaseReport, Report, html, junit, summary, table as suite_table};
use hoist_conformance::runner::{self, Launcher, Options};
use hoist_conformance::worker::{self, Job};
use serde_json::json;

use crate::exit::{Code, Usage};
use crate::output::Output;
use crate::report::table::{self, Align};
use crate::report::{print_data, print_json, print_text};
use crate::say::{line, say, visible_lines};

/// Judge a backend by the conformance suite: interface, exactness, faults, hygiene
///
/// TARGET is a backend or device as `hoist devices` lists them, or the path of a shared library (#1 behind it: its second
/// device). Exit code 0: it conforms; 1: it does not; 6: the library was refused before anything could be asked.
#[derive(Args, Debug)]
pub(crate) struct Conform {
    /// Backend, device, or path of a shared library
    #[arg(value_name = "TARGET")]
    target: String,

    /// What is demanded: residency, decode, full, or a file of your own
    #[arg(long, value_name = "PROFILE", default_value = "full")]
    profile: String,

    /// Only cases whose id matches: a prefix such as residency::roundtrip, or a pattern with *; may be given again
    #[arg(long, value_name = "PATTERN")]
    filter: Vec<String>,

    /// A file of failures that are known: lines `fail PATTERN because REASON`
    #[arg(long, value_name = "FILE")]
    expect: Option<PathBuf>,

    /// What random inputs are drawn from [default: another one each time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// Ask with so many seeds, one after the other from --seed on; needs --in-process
    #[arg(long, value_name = "N", default_value_t = 1, requires = "in_process",
          value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,

    /// Ask in this process: quick, and a crash of the backend ends it
    #[arg(long)]
    in_process: bool,

    /// Processes (with --in-process: threads) at a time [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    jobs: Option<u32>,

    /// Longest time for one case, whatever the case allows itself
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,

    /// List the selected cases and ask nothing
    #[arg(long)]
    list: bool,

    /// Write the report as JSON
    #[arg(long, value_name = "FILE")]
    json_file: Option<PathBuf>,

    /// Write the report as JUnit XML
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,

    /// Write the report as one HTML page
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

impl Conform {
    pub(crate) fn run(&self, json: bool) -> Result<Code> {
        let options = Options {
            profile: profile(&self.profile)?,
            filters: self.filter.clone(),
            expectations: self.expectations()?,
            seed: self.seed.unwrap_or_else(fresh_seed),
            jobs: self.jobs.map_or_else(cores, |n| n as usize),
            limit: self.limit.map(Duration::from_secs),
        };
        if self.list {
            return list(&options, json);
        }
        // What cannot be written is said before the backend is asked anything.
        for path in [&self.json_file, &self.junit, &self.html].into_iter().flatten() {
            Output::check(path)?;
        }
        let report = match self.judge(&options) {
            Err(error) => match error.downcast::<runner::Error>() {
                Ok(error @ runner::Error::EmptySelection { .. }) => {
                    say("error", error);
                    return Ok(Code::No);
                }
                Ok(error) => return Err(error.into()),
                Err(error) => return Err(error),
            },
            Ok(report) => report,
        };
        let files = [
            (&self.json_file, report.json()?),
            (&self.junit, junit(&report)),
            (&self.html, html(&report)),
        ];
        for (path, text) in files {
            if let Some(path) = path {
                Output::write_whole(path, text.as_bytes())?;
            }
        }
        if json {
            print_data(&report.json()?)?;
        } else {
            print_text(&rendered(&report))?;
        }
        Ok(if report.conforms { Code::Ok } else { Code::No })
    }

    fn judge(&self, options: &Options) -> Result<Report> {
        let limit = options.limit.unwrap_or(target::PROBE_LIMIT);
        let judged = target::judge(&self.target, limit)?;
        line(format_args!("seed {}", options.seed));
        let mut report = if self.in_process {
            let opened = judged.open()?;
            let seeds = self.seeds;
            let step = (seeds / 20).max(1);
            runner::run_in_process(&opened, options, seeds, &|done| {
                if seeds > 1 && done % step == 0 {
                    line(format_args!("{done} of {seeds} seeds"));
                }
            })?
        } else {
            let launcher = Launcher {
                program: std::env::current_exe()?,
                arguments: vec!["conform-worker".into()],
                target: self.target.clone(),
                sha256: judged.sha256(),
            };
            let terminal = std::io::stderr().is_terminal();
            runner::run(&launcher, options, &|case| tell(case, terminal))?
        };
        report.plugin = judged.facts();
        report.device_details = judged.details();
        report.suite_hash = Some(hash_of_this_program()?);
        Ok(report)
    }

    fn expectations(&self) -> Result<Vec<Expectation>> {
        let Some(path) = &self.expect else {
            return Ok(Vec::new());
        };
        let text = read(path)?;
        expectation::parse(&text).map_err(|e| Usage(format!("`{}`: {e}", path.display())).into())
    }
}

/// Failures are told as they happen.
fn tell(case: &CaseReport, terminal: bool) {
    if case.outcome.is_failure() {
        let detail = case.outcome.detail();
        line(format_args!(
            "{}: {}: {}",
            case.outcome.name(),
            case.id,
            visible_lines(&detail)
        ));
    } else if terminal && case.micros > 2_000_000 {
        line(format_args!(
            "{}: {} ({:.1} s)",
            case.outcome.name(),
            case.id,
            case.micros as f64 / 1e6
        ));
    }
}

fn rendered(report: &Report) -> String {
    let mut rows = suite_table(report);
    let header = rows.remove(0);
    let columns: Vec<(&str, Align)> = header
        .iter()
        .enumerate()
        .map(|(i, name)| (name.as_str(), if i == 0 { Align::Left } else { Align::Right }))
        .collect();
    format!("{}\n{}", table::render(&columns, rows), summary(report))
}

fn list(options: &Options, json: bool) -> Result<Code> {
    let cases = match runner::select(options) {
        Ok(cases) => cases,
        Err(error) => {
            say("error", error);
            return Ok(Code::No);
        }
    };
    let ids: Vec<String> = cases.iter().map(|c| c.id()).collect();
    if json {
        let cases: Vec<_> = ids
            .iter()
            .map(|id| json!({ "id": id, "rule": options.profile.rule(id) }))
            .collect();
        print_json(&json!({
            "schema": "hoist.conform.list/1",
            "suite_version": hoist_conformance::SUITE_VERSION,
            "profile": options.profile.name,
            "cases": cases,
        }))?;
    } else {
        print_text(&(ids.join("\n") + "\n"))?;
    }
    Ok(Code::Ok)
}

fn profile(name: &str) -> Result<Profile> {
    let bad = |e: hoist_conformance::profile::BadProfile| anyhow::Error::from(Usage(e.to_string()));
    if let Some(profile) = Profile::built_in(name).map_err(bad)? {
        return Ok(profile);
    }
    let path = Path::new(name);
    if !path.is_file() {
        let known: Vec<_> = Profile::names().collect();
        return Err(Usage(format!(
            "`{name}` is no profile and no file; profiles are {}",
            known.join(", ")
        ))
        .into());
    }
    Profile::parse(name, &read(path)?).map_err(bad)
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("reading `{}`", path.display()))
}

/// A seed nobody could prepare for. Small enough to be typed.
fn fresh_seed() -> u64 {
    RandomState::new().build_hasher().finish() % 1_000_000_000
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn hash_of_this_program() -> Result<String> {
    let path = std::env::current_exe()?;
    let mut hasher = blake3::Hasher::new();
    let file = std::fs::File::open(&path).with_context(|| format!("reading `{}`", path.display()))?;
    hasher.update_reader(file)?;
    Ok(format!("blake3:{}", hasher.finalize().to_hex()))
}

/// What the program does as the process of a group of cases.
#[derive(Args, Debug)]
pub(crate) struct ConformWorker {
    job: PathBuf,
}

impl ConformWorker {
    pub(crate) fn run(&self) -> Result<Code> {
        let job = Job::read(&self.job)?;
        worker::run(&job, || {
            target::reopen(&job.target, job.sha256.as_deref())
                .map(|opened| Box::new(opened) as Box<dyn hoist_conformance::Target>)
                .map_err(|e| format!("{e:#}"))
        })?;
        Ok(Code::Ok)
    }
}
