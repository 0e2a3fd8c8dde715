use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hoist_backend::{
    Capacity, DecodeBackend, DecodeProgram, Error as ContractError, KvDtype, LoadPlan, LoadWatch,
    OpenOptions, Phase, Progress, Provider, UnsupportedWhat, WeightBackend, WeightIndex, WorkspaceDims,
};
use hoist_formats::Manifest;
use hoist_model::{ResolvedModel, build_program, resolve};

use crate::{
    Error, FileSource, LoadOptions, LoadReport, Result, WeightTrace, fits, importable_bytes, load, plan_for,
    trace_weight,
};

/// Positions of a sequence where nothing else is asked for, if the model was made for as many.
const DEFAULT_CONTEXT: u32 = 4096;
/// Tokens of one batch where nothing else is asked for: enough to keep a matrix multiplication busy, few enough that the
/// logits of a large vocabulary take less memory than its embedding.
const DEFAULT_BATCH_TOKENS: u32 = 128;

/// A model file whose header is read and whose tensors have their meaning; no weight byte is read yet.
#[derive(Debug)]
pub struct OpenedModel {
    /// The header.
    pub manifest: Manifest,
    /// What its tensors mean.
    pub model: ResolvedModel,
    /// How long it took.
    pub open: Duration,
}

/// How much is to be decoded at once; `None` asks for a default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeOptions {
    /// Positions of a sequence; by default 4096, or what the model was made for if that is less.
    pub context: Option<u32>,
    /// Sequences.
    pub sequences: u32,
    /// Tokens of one batch; by default 128, or all positions of all sequences if that is less.
    pub batch_tokens: Option<u32>,
    /// How keys and values are stored.
    pub kv: KvDtype,
}

impl Default for DecodeOptions {
    fn default() -> Self {
        Self {
            context: None,
            sequences: 1,
            batch_tokens: None,
            kv: KvDtype::F16,
        }
    }
}

/// How a model is loaded.
#[derive(Clone, Copy)]
pub struct SessionOptions<'a> {
    /// Prepare a workspace and a program for decoding.
    pub decode: Option<DecodeOptions>,
    /// Compare what is resident with the file.
    pub verify: bool,
    /// Whether the backend was opened to import: what it maps need not fit its memory.
    pub import: bool,
    /// Sees progress and can cancel.
    pub watch: &'a dyn LoadWatch,
}

/// How long the steps before a load took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionTiming {
    /// Reading headers and giving tensors their meaning.
    pub open: Duration,
    /// Building the program and the plan.
    pub plan: Duration,
}

/// A model that is resident on a backend.
pub struct LoadedModel {
    /// The header.
    pub manifest: Manifest,
    /// What its tensors mean.
    pub model: ResolvedModel,
    /// What was planned.
    pub plan: LoadPlan,
    /// The forward pass and its capacity, if a workspace was asked for.
    pub program: Option<(DecodeProgram, Capacity)>,
    /// Where its weights are.
    pub backend: Box<dyn WeightBackend>,
    /// Where they came from.
    pub source: FileSource,
    /// What the load did.
    pub report: LoadReport,
    /// How long the steps before it took.
    pub timing: SessionTiming,
}

impl OpenedModel {
    /// Opens a file or a folder.
    ///
    /// # Errors
    /// [`Error::Format`], [`Error::Model`]
    pub fn open(path: &Path) -> Result<Self> {
        let started = Instant::now();
        Self::of_manifest(hoist_formats::open(path)?, started)
    }

    /// Opens a model that is in memory as a whole; `name` stands for its path.
    ///
    /// # Errors
    /// As [`OpenedModel::open`].
    pub fn from_bytes(name: &str, bytes: Arc<[u8]>) -> Result<Self> {
        let started = Instant::now();
        Self::of_manifest(hoist_formats::open_bytes(name, bytes)?, started)
    }

    fn of_manifest(manifest: Manifest, started: Instant) -> Result<Self> {
        let model = resolve(&manifest)?;
        Ok(Self {
            manifest,
            model,
            open: started.elapsed(),
        })
    }

    /// The capacity that options ask for.
    pub fn capacity(&self, options: &DecodeOptions) -> Capacity {
        let max_context = options
            .context
            .unwrap_or_else(|| self.model.hyper.context_length.min(DEFAULT_CONTEXT));
        let positions = max_context.saturating_mul(options.sequences);
        Capacity {
            max_context,
            max_sequences: options.sequences,
            max_batch_tokens: options
                .batch_tokens
                .unwrap_or_else(|| positions.min(DEFAULT_BATCH_TOKENS)),
            kv: options.kv,
        }
    }

    /// The program of the forward pass at a capacity.
    ///
    /// # Errors
    /// [`Error::Model`]
    pub fn program(&self, capacity: Capacity) -> Result<DecodeProgram> {
        Ok(build_program(&self.model, capacity.max_context)?)
    }

    /// Loads the model on an empty backend.
    ///
    /// # Errors
    /// [`Error::Plan`]; [`Error::DoesNotFit`] before anything is read; as [`load`]. The backend is dropped then.
    pub fn load(
        self,
        mut backend: Box<dyn WeightBackend>,
        options: &SessionOptions<'_>,
    ) -> Result<LoadedModel> {
        let started = Instant::now();
        options.watch.progress(Progress {
            phase: Phase::Plan,
            weight: None,
            done: 0,
            total: 0,
        });
        // A backend that only holds weights has no workspace to prepare.
        let decodes = backend.info().ops.iter().next().is_some();
        let program = match options.decode.as_ref().filter(|_| decodes) {
            Some(decode) => {
                let capacity = self.capacity(decode);
                Some((self.program(capacity)?, capacity))
            }
            None => None,
        };
        let decode = program.as_ref().map(|(program, capacity)| (program, *capacity));
        let plan = plan_for(backend.as_ref(), &self.model, decode)?;
        let mapped = if options.import {
            importable_bytes(&plan)
        } else {
            0
        };
        let fit = fits(&plan, mapped, &backend.memory()?);
        if !fit.is_ok() {
            return Err(Error::DoesNotFit {
                device: backend.info().device.clone(),
                fit,
            });
        }
        let dims = decode
            .map(|(program, capacity)| WorkspaceDims::new(program, capacity))
            .transpose()?;
        let source = FileSource::new(&self.manifest, &plan)?;
        let timing = SessionTiming {
            open: self.open,
            plan: started.elapsed(),
        };
        let load_options = LoadOptions {
            verify: options.verify,
            workspace: dims.as_ref(),
            watch: options.watch,
        };
        let report = load(backend.as_mut(), &self.model.index, &plan, &source, &load_options)?;
        Ok(LoadedModel {
            manifest: self.manifest,
            model: self.model,
            plan,
            program,
            backend,
            source,
            report,
            timing,
        })
    }
}

/// The paved path: opens a model and a device at the same time, and loads the one on the other.
///
/// # Errors
/// As [`OpenedModel::open`], [`Provider::open`] and [`OpenedModel::load`].
pub fn open(
    path: &Path,
    provider: &dyn Provider,
    ordinal: u32,
    device: &OpenOptions,
    options: &SessionOptions<'_>,
) -> Result<LoadedModel> {
    let (model, backend) = std::thread::scope(|scope| {
        let backend = scope.spawn(|| provider.open(ordinal, device));
        let model = OpenedModel::open(path);
        let backend = backend.join().unwrap_or_else(|_| {
            Err(ContractError::internal(
                provider.name(),
                "opening the device panicked",
            ))
        });
        (model, backend)
    });
    model?.load(
        backend?,
        &SessionOptions {
            import: device.import,
            ..*options
        },
    )
}

impl LoadedModel {
    /// The table over (layer, role).
    pub fn index(&self) -> &WeightIndex {
        &self.report.index
    }

    /// Compiles the program and gives the decoding side of the backend.
    ///
    /// # Errors
    /// [`ContractError::Unsupported`] if the backend only holds weights; [`ContractError::BadState`] if the model was
    /// loaded without a workspace; what `prepare` returns.
    pub fn prepare(&mut self) -> Result<&mut dyn DecodeBackend> {
        let name = self.backend.info().name.clone();
        let Some(decoder) = self.backend.as_decode() else {
            return Err(ContractError::Unsupported {
                backend: name,
                what: UnsupportedWhat::Call("prepare"),
            }
            .into());
        };
        let Some((program, _)) = &self.program else {
            return Err(ContractError::invalid("decode options", "a context to decode in", "none").into());
        };
        decoder.prepare(program)?;
        Ok(decoder)
    }

    /// Values before and after the load of every weight in layers `first..=last`.
    ///
    /// # Errors
    /// [`ContractError::InvalidArgument`] for layers that the model does not have; what the backend and the source return.
    pub fn trace_layers(&mut self, first: u32, last: u32) -> Result<Vec<WeightTrace>> {
        if first > last || last >= self.plan.layers {
            return Err(ContractError::invalid(
                "traced layers",
                format!("within 0-{}", self.plan.layers.saturating_sub(1)),
                format!("{first}-{last}"),
            )
            .into());
        }
        self.plan
            .weights
            .iter()
            .filter(|w| w.layer.is_some_and(|l| (first..=last).contains(&l)))
            .map(|w| Ok(trace_weight(self.backend.as_mut(), w, &self.source)?))
            .collect()
    }
}
