use std::time::{Duration, Instant};

use hoist_backend::{
    IndexLayout, IndexReceipt, LoadPlan, LoadReceipt, LoadWatch, Phase, Progress, WeightBackend, WeightClass,
    WeightIndex, WeightSource, WorkspaceBytes, WorkspaceDims,
};

use crate::{Error, Result, Verification, verify};

/// What a load does beyond making weights resident.
#[derive(Clone, Copy)]
pub struct LoadOptions<'a> {
    /// Compare what is resident with the file.
    pub verify: bool,
    /// Prepare a workspace of these dimensions.
    pub workspace: Option<&'a WorkspaceDims>,
    /// Sees progress and can cancel.
    pub watch: &'a dyn LoadWatch,
}

/// Weights by class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WeightCounts {
    /// Quantised matrices.
    pub quantized: u32,
    /// F32, F16 and BF16 matrices.
    pub float: u32,
    /// Norm vectors.
    pub gamma: u32,
    /// Biases.
    pub bias: u32,
}

impl WeightCounts {
    /// Counts the weights of a plan.
    pub fn of(plan: &LoadPlan) -> Self {
        let mut counts = Self::default();
        for weight in &plan.weights {
            *match weight.class {
                WeightClass::Quantized => &mut counts.quantized,
                WeightClass::Float => &mut counts.float,
                WeightClass::Gamma => &mut counts.gamma,
                WeightClass::Bias => &mut counts.bias,
            } += 1;
        }
        counts
    }

    /// Weights of all classes.
    pub fn weights(&self) -> u32 {
        self.quantized + self.float + self.gamma + self.bias
    }
}

/// How long each phase of a load took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadTiming {
    /// From before `begin_load` until `finish_load` vouched for every byte.
    pub upload: Duration,
    /// Building the device's index and the host's.
    pub index: Duration,
    /// Comparing with the file.
    pub verify: Duration,
    /// Preparing the workspace.
    pub workspace: Duration,
    /// All of it.
    pub total: Duration,
}

/// What a load did.
#[derive(Clone, Debug)]
pub struct LoadReport {
    /// Weights by class.
    pub counts: WeightCounts,
    /// Canonical bytes of all weights.
    pub nbytes: u64,
    /// What the backend vouches for.
    pub receipt: LoadReceipt,
    /// The host's index.
    pub index: WeightIndex,
    /// The device's index.
    pub device_index: IndexReceipt,
    /// The comparison with the file, if it was asked for.
    pub verified: Option<Verification>,
    /// The workspace, if it was asked for.
    pub workspace: Option<WorkspaceBytes>,
    /// How long it took.
    pub timing: LoadTiming,
}

impl LoadReport {
    /// Names of weights that differ from the file.
    pub fn mismatches(&self) -> &[String] {
        self.verified.as_ref().map_or(&[], |v| &v.mismatches)
    }

    /// Canonical bytes a second of the upload, in units of 10^9.
    pub fn upload_gb_s(&self) -> f64 {
        self.nbytes as f64 / self.timing.upload.as_secs_f64().max(1e-9) / 1e9
    }
}

/// Executes a plan: upload, index, verification, workspace. All or nothing.
///
/// The source is checked to be unchanged before the first byte is read and after the last.
///
/// # Errors
/// What the backend and the source return; [`Error::Receipt`]; [`Error::Mismatch`]. On any error, and when the watch
/// cancels, everything taken is given back and the backend is empty. Only a backend that refuses `begin_load` is left as
/// it was.
pub fn load(
    backend: &mut dyn WeightBackend,
    index: &IndexLayout,
    plan: &LoadPlan,
    source: &dyn WeightSource,
    options: &LoadOptions<'_>,
) -> Result<LoadReport> {
    let started = Instant::now();
    source.check_unchanged()?;
    stop_if_cancelled(options.watch)?;
    backend.begin_load(plan)?;

    let mut uploaded = false;
    let result = steps(backend, index, plan, source, options, started, &mut uploaded);
    let error = match result {
        Ok(report) if report.mismatches().is_empty() => return Ok(report),
        Ok(report) => Error::Mismatch {
            report: Box::new(report),
        },
        // Bytes that could not be read because the file was cut or replaced: say that.
        Err(Error::Backend(error @ hoist_backend::Error::SourceIo { .. })) => {
            source.check_unchanged().err().unwrap_or(error).into()
        }
        Err(error) => error,
    };
    let given_back = if uploaded {
        backend.unload()
    } else {
        backend.abort_load()
    };
    match given_back {
        Ok(()) => Err(error),
        // What was on a lost device is gone with it: a failure to give it back is the same loss, told once more.
        Err(cleanup) if is_loss_of_one_device(&error, &cleanup) => Err(error),
        Err(cleanup) => Err(Error::NotGivenBack {
            error: Box::new(error),
            cleanup,
        }),
    }
}

fn is_loss_of_one_device(error: &Error, cleanup: &hoist_backend::Error) -> bool {
    use hoist_backend::Error::DeviceLost;
    match (error, cleanup) {
        (Error::Backend(DeviceLost { device: one, .. }), DeviceLost { device: other, .. }) => one == other,
        _ => false,
    }
}

/// All that follows `begin_load`; `uploaded` tells which call undoes it.
fn steps(
    backend: &mut dyn WeightBackend,
    layout: &IndexLayout,
    plan: &LoadPlan,
    source: &dyn WeightSource,
    options: &LoadOptions<'_>,
    started: Instant,
    uploaded: &mut bool,
) -> Result<LoadReport> {
    let watch = options.watch;
    let mut timing = LoadTiming::default();
    let mut lap = Lap(started);

    enter(watch, Phase::Upload, plan.nbytes)?;
    backend.load_from(plan, source, watch)?;
    let receipt = backend.finish_load()?;
    *uploaded = true;
    timing.upload = lap.time();
    // Bytes read while the file was being rewritten are whole and wrong.
    source.check_unchanged()?;
    expect_receipt(backend, "weights", plan.weights.len(), receipt.weights)?;

    enter(watch, Phase::Index, 0)?;
    lap.time();
    let index = WeightIndex::new(layout, plan.weights.len())?;
    let device_index = backend.build_index(layout)?;
    timing.index = lap.time();
    expect_receipt(
        backend,
        "index entries",
        index.entries() as usize,
        device_index.entries,
    )?;
    expect_receipt(
        backend,
        "index layers",
        index.layers() as usize,
        device_index.layers,
    )?;

    let mut report = LoadReport {
        counts: WeightCounts::of(plan),
        nbytes: plan.nbytes,
        receipt,
        index,
        device_index,
        verified: None,
        workspace: None,
        timing,
    };
    if options.verify {
        enter(watch, Phase::Verify, plan.nbytes)?;
        lap.time();
        let verified = verify(backend, plan, source, watch)?;
        source.check_unchanged()?;
        report.timing.verify = lap.time();
        report.verified = Some(verified);
    }
    if let Some(dims) = options.workspace.filter(|_| report.mismatches().is_empty()) {
        enter(watch, Phase::Workspace, 0)?;
        lap.time();
        report.workspace = Some(backend.init_workspace(dims)?);
        report.timing.workspace = lap.time();
    }
    stop_if_cancelled(watch)?;
    report.timing.total = started.elapsed();
    Ok(report)
}

fn expect_receipt(
    backend: &dyn WeightBackend,
    what: &'static str,
    expected: usize,
    found: u32,
) -> Result<()> {
    if expected as u64 == u64::from(found) {
        return Ok(());
    }
    Err(Error::Receipt {
        backend: backend.info().name.clone(),
        what,
        expected: expected as u64,
        found: found.into(),
    })
}

fn enter(watch: &dyn LoadWatch, phase: Phase, total: u64) -> Result<()> {
    stop_if_cancelled(watch)?;
    watch.progress(Progress {
        phase,
        weight: None,
        done: 0,
        total,
    });
    Ok(())
}

fn stop_if_cancelled(watch: &dyn LoadWatch) -> Result<()> {
    if watch.cancelled() {
        Err(hoist_backend::Error::Cancelled.into())
    } else {
        Ok(())
    }
}

/// Measures one phase after the other.
struct Lap(Instant);

impl Lap {
    fn time(&mut self) -> Duration {
        let now = Instant::now();
        let lap = now - self.0;
        self.0 = now;
        lap
    }
}

#[cfg(test)]
mod tests;
