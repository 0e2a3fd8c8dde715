//! What a case is given.

use std::path::PathBuf;

use hoist_backend::{BackendInfo, DeviceInfo, NumericsClass, OpenOptions, Result, WeightBackend};
use serde::{Deserialize, Serialize};

use crate::judge::{self, Bounds};
use crate::operands::Random;
use crate::{Failure, Need, Stop};

/// The backend under test, as the program reaches it.
pub trait Target: Send + Sync {
    /// As the user named it, such as `cpu` or `./libvendor.so`.
    fn name(&self) -> &str;

    /// The devices it finds.
    ///
    /// # Errors
    /// As [`hoist_backend::Provider::devices`].
    fn devices(&self) -> Result<Vec<DeviceInfo>>;

    /// Opens the device under test anew.
    ///
    /// # Errors
    /// As [`hoist_backend::Provider::open`].
    fn open(&self, options: &OpenOptions) -> Result<Box<dyn WeightBackend>>;

    /// Opens a device by number.
    ///
    /// # Errors
    /// As [`hoist_backend::Provider::open`].
    fn open_ordinal(&self, ordinal: u32, options: &OpenOptions) -> Result<Box<dyn WeightBackend>>;

    /// What is known of the shared library, if it is one.
    fn plugin(&self) -> Option<&PluginFacts>;
}

/// A shared library, as its file says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluginFacts {
    /// Absolute path.
    pub path: PathBuf,
    /// SHA-256 in lower-case hexadecimal.
    pub sha256: String,
    /// Name, vendor, version and build, as its header gives them.
    pub name: String,
    /// Who made it.
    pub vendor: String,
    /// Its version.
    pub version: String,
    /// Its build.
    pub build_id: String,
    /// Target triple it was built for.
    pub target: String,
    /// Major version of the interface, oldest and newest minor.
    pub abi: (u32, u32, u32),
    /// The minor both sides speak.
    pub minor: u32,
    /// A panic ends the process.
    pub panic_abort: bool,
    /// It says that it starts threads.
    pub spawns_threads: bool,
    /// Names it exports.
    pub exports: Vec<String>,
    /// Ordinal of the device under test.
    pub ordinal: u32,
}

/// A number that a report shows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// What it is, such as `upload`.
    pub name: String,
    /// The number.
    pub value: f64,
    /// Its unit, such as `GB/s`.
    pub unit: String,
}

/// What a case works with.
pub struct Context<'t> {
    target: &'t dyn Target,
    info: &'t BackendInfo,
    seed: u64,
    isolated: bool,
    /// Numbers for this case, drawn from the run's seed and the case's id.
    pub random: Random,
    measurements: Vec<Measurement>,
}

impl<'t> Context<'t> {
    /// A context for the case of that id. `isolated`: the process is the case's group's own.
    pub fn new(target: &'t dyn Target, info: &'t BackendInfo, seed: u64, id: &str, isolated: bool) -> Self {
        Self {
            target,
            info,
            seed,
            isolated,
            random: Random::new(case_seed(seed, id)),
            measurements: Vec::new(),
        }
    }

    /// The backend under test.
    pub fn target(&self) -> &'t dyn Target {
        self.target
    }

    /// What the backend said of itself when the group began.
    pub fn info(&self) -> &'t BackendInfo {
        self.info
    }

    /// The run's seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The plugin's facts.
    ///
    /// # Errors
    /// [`Stop::Unsupported`] for a built-in backend.
    pub fn plugin(&self) -> std::result::Result<&'t PluginFacts, Stop> {
        self.target
            .plugin()
            .ok_or_else(|| Stop::Unsupported("it is no shared library".into()))
    }

    /// Opens a fresh backend on the device under test.
    ///
    /// # Errors
    /// A failure if it does not open.
    pub fn open(&self) -> std::result::Result<Box<dyn WeightBackend>, Failure> {
        self.open_with(&OpenOptions::default())
    }

    /// As [`Context::open`], with options.
    ///
    /// # Errors
    /// A failure if it does not open.
    pub fn open_with(&self, options: &OpenOptions) -> std::result::Result<Box<dyn WeightBackend>, Failure> {
        self.target
            .open(options)
            .map_err(|e| Failure::new("opening the device", format!("{options:?}"), "success", e))
    }

    /// Whether a need is met; if not, what to report.
    ///
    /// # Errors
    /// [`Stop::Unsupported`] or [`Stop::Skip`].
    pub fn check(&self, need: Need) -> std::result::Result<(), Stop> {
        let declared = |yes: bool, what: String| {
            if yes { Ok(()) } else { Err(Stop::Unsupported(what)) }
        };
        match need {
            Need::Decode => declared(
                self.info.ops.iter().next().is_some(),
                "it declares no operation: it only holds weights".into(),
            ),
            Need::Stored(e) => declared(self.info.stored.contains(e), format!("it does not hold {e}")),
            Need::Computed(e) => declared(
                self.info.computed.contains(e),
                format!("it does not compute with {e}"),
            ),
            Need::Op(op) => declared(self.info.ops.contains(op), format!("it does not run {op}")),
            Need::Plugin => self.plugin().map(|_| ()),
            Need::Process if self.isolated => Ok(()),
            Need::Process => Err(Stop::Skip("needs a process of its own".into())),
        }
    }

    /// Records a number for the report.
    pub fn measure(&mut self, name: impl Into<String>, value: f64, unit: impl Into<String>) {
        self.measurements.push(Measurement {
            name: name.into(),
            value,
            unit: unit.into(),
        });
    }

    /// What was measured.
    pub fn into_measurements(self) -> Vec<Measurement> {
        self.measurements
    }

    /// Judges f32 results of `width` columns by the backend's class: *exact* bit for bit, *bounded* by `bounds`. Records
    /// the worst error.
    ///
    /// # Errors
    /// The first or worst element that is wrong.
    pub fn judge(
        &mut self,
        what: &str,
        expected: &[f32],
        found: &[f32],
        width: usize,
        bounds: &Bounds<'_>,
    ) -> std::result::Result<(), Failure> {
        match self.info.numerics {
            NumericsClass::Exact => judge::exact(what, expected, found),
            NumericsClass::Bounded => {
                let errors = judge::bounded(what, expected, found, width, bounds)?;
                self.measure("worst element error", errors.element, "of bound");
                self.measure("worst row error", errors.row, "of bound");
                self.measure("NMSE", errors.nmse, "");
                Ok(())
            }
        }
    }
}

/// The seed of a case: the run's, and the case's id, so that a case draws the same numbers whatever else is run.
fn case_seed(seed: u64, id: &str) -> u64 {
    let hash = blake3::hash(id.as_bytes());
    let word = hash
        .as_bytes()
        .iter()
        .take(8)
        .fold(0u64, |w, b| w << 8 | u64::from(*b));
    word ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
