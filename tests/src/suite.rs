//! A sample of the conformance suite, asked of a backend's first device within this process.

use hoist_backend::{DeviceInfo, OpenOptions, Provider, Result, WeightBackend};
use hoist_conformance::profile::Profile;
use hoist_conformance::runner::{self, Options};
use hoist_conformance::{PluginFacts, Target};

struct FirstDevice<'a> {
    provider: &'a dyn Provider,
    name: String,
}

impl Target for FirstDevice<'_> {
    fn name(&self) -> &str {
        &self.name
    }

    fn devices(&self) -> Result<Vec<DeviceInfo>> {
        self.provider.devices()
    }

    fn open(&self, options: &OpenOptions) -> Result<Box<dyn WeightBackend>> {
        self.provider.open(0, options)
    }

    fn open_ordinal(&self, ordinal: u32, options: &OpenOptions) -> Result<Box<dyn WeightBackend>> {
        self.provider.open(ordinal, options)
    }

    fn plugin(&self) -> Option<&PluginFacts> {
        None
    }
}

/// Asks every case that matches one of `filters`, at least one of which must run.
///
/// # Errors
/// What failed, case by case.
pub fn conforms(provider: &dyn Provider, filters: &[&str]) -> Result<(), String> {
    let profile = Profile::built_in("full")
        .map_err(|e| e.to_string())?
        .ok_or("no profile `full`")?;
    let options = Options {
        profile,
        filters: filters.iter().map(ToString::to_string).collect(),
        expectations: Vec::new(),
        seed: 1,
        jobs: 1,
        limit: None,
    };
    let target = FirstDevice {
        provider,
        name: format!("{}:0", provider.name()),
    };
    let report = runner::run_in_process(&target, &options, 1, &|_| {}).map_err(|e| e.to_string())?;
    println!("{:?} in {} ms", report.counts, report.millis);
    let failures: Vec<String> = report
        .failures()
        .map(|c| format!("{}: {}", c.id, c.outcome.detail()))
        .collect();
    if failures.is_empty() && report.cases.iter().any(|c| c.outcome.was_executed()) {
        return Ok(());
    }
    Err(format!("{:?}\n{}", report.counts, failures.join("\n")))
}
