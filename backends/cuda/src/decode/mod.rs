//! Decoding: programs as kernels over the resident weights.
//!
//! | module | what it knows |
//! |---|---|
//! | `workspace` | what lies where on the device beside the weights |
//! | `kernels` | which kernel serves which encoding |
//! | `params` | what kernels take |
//! | `steps` | each operation as launches |
//! | `prefill` | products with many tokens, on tensor cores |
//! | `attention` | attention of many tokens at once |
//! | `fused` | operations of many tokens that one kernel does together |
//! | `persistent` | a whole token of a llama-like program as one launch, where that is asked for |
//! | `profile` | where the time of a step goes |
//! | `graph` | a step recorded once |
//!
//! Every operation runs for any number of tokens. A batch of one token that wants something is recorded as a graph when a
//! program is prepared: a step then uploads a token and a position, launches once, and brings back a fault word and an
//! arg-max.

mod attention;
mod fused;
mod graph;
mod kernels;
mod params;
mod persistent;
mod prefill;
mod profile;
mod steps;
mod workspace;

use std::sync::Arc;

use hoist_backend::{
    DecodeProgram, Encoding, Error, FloatLayout, OpName, Outputs, PhaseTime, ResolvedProgram, Result,
    SequenceId, Shape, TokenBatch, Want, WeightClass, WeightFacts, WeightId, WeightIndex, WorkspaceBytes,
    WorkspaceDims, admit,
};

use self::graph::Graph;
use self::params::Row;
use self::persistent::Persistent;
use self::profile::Marks;
use self::steps::Prepared;
use self::workspace::Workspace;
use crate::driver::{Context, Stream};
use crate::modules::Modules;

pub(crate) use self::kernels::computes;
pub(crate) use self::workspace::MAX_BATCH_TOKENS;

/// A resident weight as decoding sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeviceWeight<'a> {
    /// Its name, for messages.
    pub(crate) name: &'a str,
    /// Memory class.
    pub(crate) class: WeightClass,
    /// Encoding of its bytes.
    pub(crate) encoding: Encoding,
    /// Canonical shape.
    pub(crate) shape: Shape,
    /// Where the input dimension of a float matrix runs.
    pub(crate) layout: FloatLayout,
    /// Its bytes.
    pub(crate) ptr: u64,
    /// `E_w` of each row of all matrices, i16; 0 unless quantised.
    pub(crate) exponents: u64,
}

impl<'a> DeviceWeight<'a> {
    fn facts(&self) -> WeightFacts<'a> {
        WeightFacts {
            name: self.name,
            class: self.class,
            encoding: self.encoding,
            shape: self.shape,
            layout: self.layout,
        }
    }
}

/// Whether a token of a program of the llama kind runs in one launch; any other program does not, whatever is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OneLaunch {
    /// Operation by operation.
    Off,
    /// In one launch, with a ring of at most so many slots.
    On {
        /// Slots; `u32::MAX`: as many as shared memory holds.
        most_slots: u32,
    },
}

impl OneLaunch {
    /// The variable of the environment that turns it off, or on as it is by default, for everything that is opened.
    pub(crate) const VARIABLE: &str = "HOIST_CUDA_ONE_LAUNCH";

    /// What the environment asks for.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless the variable is 0 or 1, or not set.
    pub(crate) fn from_environment() -> Result<Self> {
        match std::env::var_os(Self::VARIABLE) {
            Some(value) if value == "0" => Ok(Self::Off),
            None => Ok(Self::On { most_slots: u32::MAX }),
            Some(value) if value == "1" => Ok(Self::On { most_slots: u32::MAX }),
            Some(value) => Err(Error::invalid(Self::VARIABLE, "0 or 1", value.to_string_lossy())),
        }
    }
}

/// How programs run; no bit depends on it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub(crate) one_launch: OneLaunch,
    /// Most tokens of a batch whose attention runs at once.
    pub(crate) most_attended: u32,
}

impl Settings {
    /// What the environment asks for.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`], as [`OneLaunch::from_environment`].
    pub(crate) fn from_environment() -> Result<Self> {
        Ok(Self {
            one_launch: OneLaunch::from_environment()?,
            most_attended: u32::MAX,
        })
    }
}

/// What no step has reported.
const NO_FAULT: u32 = u32::MAX;

/// The decoding half of a backend.
#[derive(Debug)]
pub(crate) struct Engine {
    // Before what its kernels and memory belong to.
    graph: Option<Graph>,
    persistent: Option<Persistent>,
    program: Option<Prepared>,
    one_launch: OneLaunch,
    workspace: Workspace,
    stream: Stream,
    context: Arc<Context>,
}

impl Engine {
    /// Bytes that [`Engine::new`] takes on the device.
    pub(crate) fn workspace_bytes(dims: &WorkspaceDims) -> Result<WorkspaceBytes> {
        workspace::bytes(dims)
    }

    /// Takes all memory that decoding needs.
    pub(crate) fn new(context: &Arc<Context>, dims: &WorkspaceDims, settings: Settings) -> Result<Self> {
        context.bind()?;
        Ok(Self {
            graph: None,
            persistent: None,
            program: None,
            one_launch: settings.one_launch,
            workspace: Workspace::new(context, dims, settings.most_attended)?,
            stream: Stream::new(context)?,
            context: Arc::clone(context),
        })
    }

    /// Compiles a program; sequences are empty then. The weights must stay where they are as long as this lives.
    pub(crate) fn prepare<'w>(
        &mut self,
        modules: &Modules,
        program: &DecodeProgram,
        index: &WeightIndex,
        weight: impl Fn(WeightId) -> Result<DeviceWeight<'w>>,
    ) -> Result<()> {
        self.context.bind()?;
        let resolved = ResolvedProgram::new(crate::NAME, program, &self.workspace.dims, index, |id| {
            Ok(weight(id)?.facts())
        })?;
        let prepared = Prepared::new(
            modules,
            &self.context.device,
            resolved,
            &program.tables,
            &self.workspace,
            &weight,
        )?;
        // From here on the old program is gone.
        self.graph = None;
        self.persistent = None;
        self.program = None;
        let mut at = self.workspace.tables;
        for table in &program.tables {
            let bytes: &[u8] = bytemuck::cast_slice(&table.data);
            // SAFETY: the table is pageable memory; the workspace has room for all tables, as resolving has checked.
            unsafe { self.stream.copy_htod(at, bytes) }?;
            at += bytes.len() as u64;
        }
        self.workspace.forget_parts(&self.stream)?;
        self.stream.synchronize()?;
        let persistent = match self.one_launch {
            OneLaunch::Off => None,
            OneLaunch::On { most_slots } => Persistent::new(
                &self.context,
                modules,
                &self.stream,
                &prepared.resolved,
                &prepared.tables,
                &self.workspace,
                most_slots,
                &weight,
            )?,
        };
        self.graph = match persistent {
            Some(_) => None,
            None => Some(Graph::record(&self.stream, || {
                self.upload_rows(1)?;
                self.body(&prepared, 1, None, None)?;
                self.tail(&prepared, 1, None)?;
                self.download(1)
            })?),
        };
        self.persistent = persistent;
        self.program = Some(prepared);
        self.workspace.lengths.fill(0);
        Ok(())
    }

    /// Enqueues the batch's rows and kept tokens, and clears the fault word.
    fn upload_rows(&self, tokens: usize) -> Result<()> {
        let work = &self.workspace;
        let most = work.dims.capacity.max_batch_tokens as usize;
        let (rows, kept) = work.staging.bytes().split_at(most * size_of::<Row>());
        // SAFETY: staging is page-locked and changes only between steps, each of which ends with a wait.
        unsafe {
            self.stream
                .copy_htod(work.rows, &rows[..tokens * size_of::<Row>()])
        }?;
        if tokens > 1 {
            // SAFETY: as above.
            unsafe { self.stream.copy_htod(work.kept, &kept[..tokens * 4]) }?;
        }
        // SAFETY: the fault word is in the workspace's arena, which only this stream uses.
        unsafe { self.stream.fill(work.fault, 0xff, 4) }
    }

    fn body(
        &self,
        program: &Prepared,
        tokens: u32,
        splits: Option<u32>,
        marks: Option<&Marks>,
    ) -> Result<()> {
        let [body, _] = program.resolved.parts();
        program.launch(&self.stream, &self.workspace, body, tokens, splits, marks)
    }

    fn tail(&self, program: &Prepared, tokens: u32, marks: Option<&Marks>) -> Result<()> {
        let [_, tail] = program.resolved.parts();
        program.launch(&self.stream, &self.workspace, tail, tokens, None, marks)?;
        program.arg_max(&self.stream, &self.workspace, tokens)
    }

    /// Enqueues the copy of the fault word and of arg-max ids.
    fn download(&self, tokens: usize) -> Result<()> {
        let work = &self.workspace;
        let len = (tokens + 1) * 4;
        // SAFETY: the buffer is page-locked, at least that long, and read only after a wait.
        let to = unsafe { std::slice::from_raw_parts_mut(work.results.as_ptr(), len) };
        // SAFETY: as above; the fault word and the ids lie together.
        unsafe { self.stream.copy_dtoh(to, work.fault) }
    }

    /// Runs a batch. Lengths change only when all has succeeded; what lies in the cache beyond them is scratch.
    pub(crate) fn forward(&mut self, batch: &TokenBatch<'_>, out: &mut Outputs<'_>) -> Result<()> {
        self.run(batch, out, None)
    }

    /// Does the same and tells where the time went; `facts` are a weight's bytes and shape.
    pub(crate) fn profile(
        &mut self,
        batch: &TokenBatch<'_>,
        out: &mut Outputs<'_>,
        facts: impl Fn(usize) -> (u64, Shape),
        phases: &mut Vec<PhaseTime>,
    ) -> Result<()> {
        self.context.bind()?;
        let marks = Marks::new(&self.context)?;
        self.run(batch, out, Some(&marks))?;
        let one = batch.runs.iter().map(|run| run.tokens.len()).sum::<usize>() == 1;
        match (&self.persistent, &self.program) {
            (Some(persistent), _) if one && out.logits.len() + out.argmax.len() > 0 => {
                persistent.phases(&self.stream, phases)
            }
            (_, Some(program)) => {
                let dims = &self.workspace.dims.values;
                let chosen = |value: usize| dims.get(value).map_or(0, |(_, width)| u64::from(*width));
                marks.phases(&program.resolved, facts, chosen, phases)
            }
            _ => Ok(()),
        }
    }

    fn run(&mut self, batch: &TokenBatch<'_>, out: &mut Outputs<'_>, marks: Option<&Marks>) -> Result<()> {
        let Some(program) = &self.program else {
            return Err(Error::internal(crate::NAME, "a step without a program"));
        };
        let work = &mut self.workspace;
        let vocab = program.resolved.vocab;
        let vocab_u32 = u32::try_from(vocab).unwrap_or(u32::MAX);
        admit(
            batch,
            out,
            vocab_u32,
            &work.dims.capacity,
            &work.lengths,
            &mut work.batch,
        )?;
        self.context.bind()?;
        let most = work.dims.capacity.max_batch_tokens as usize;
        let (rows, kept) = work.staging.bytes_mut().split_at_mut(most * size_of::<Row>());
        let rows: &mut [Row] = bytemuck::cast_slice_mut(rows);
        let kept: &mut [u32] = bytemuck::cast_slice_mut(kept);
        let (mut wanted, mut last) = (0, 0);
        for (t, row) in work.batch.iter().enumerate() {
            let wants = row.want != Want::Nothing;
            rows[t] = Row {
                token: row.token,
                sequence: row.sequence,
                position: row.position,
                wanted: wants.into(),
            };
            if wants {
                kept[wanted] = t as u32;
                wanted += 1;
            }
            last = last.max(row.position);
        }
        let tokens = work.batch.len();
        let recorded = self.graph.as_ref().filter(|_| marks.is_none());
        if let (1, 1, Some(persistent)) = (tokens, wanted, &self.persistent) {
            let row = rows[0];
            persistent.run(&self.stream, &self.workspace, row)?;
        } else if let (1, 1, Some(graph)) = (tokens, wanted, recorded) {
            graph.launch(&self.stream)?;
        } else {
            self.upload_rows(tokens)?;
            if let Some(marks) = marks {
                marks.begin(&self.stream)?;
            }
            self.body(program, tokens as u32, Some(last / workspace::SPLIT + 1), marks)?;
            if wanted > 0 {
                if wanted < tokens {
                    program.keep(&self.stream, &self.workspace, wanted as u32)?;
                }
                self.tail(program, wanted as u32, marks)?;
            }
            self.download(wanted)?;
        }
        if !(tokens == 1 && wanted == 1 && self.persistent.is_some()) {
            self.stream.synchronize()?;
        }
        let results: &[u32] = bytemuck::cast_slice(self.workspace.results.bytes());
        let (fault, ids) = (results[0], &results[1..=wanted]);
        if fault != NO_FAULT {
            // SAFETY: the fault word is in the workspace's arena, which only this stream uses.
            unsafe { self.stream.fill(self.workspace.fault, 0xff, 4) }?;
            let step = program.resolved.steps.get(fault as usize);
            return Err(Error::NonFinite {
                op: step.map_or(OpName::Logits, |s| s.op),
                layer: step.and_then(|s| s.layer),
            });
        }
        let mut argmax = out.argmax.iter_mut();
        let mut logits = out.logits.chunks_exact_mut(vocab);
        let value = self.workspace.values[program.resolved.logits];
        let wants = self
            .workspace
            .batch
            .iter()
            .map(|r| r.want)
            .filter(|w| *w != Want::Nothing);
        for (t, (want, id)) in wants.zip(ids).enumerate() {
            match want {
                Want::Nothing => {}
                Want::ArgMax => {
                    if let Some(out) = argmax.next() {
                        *out = *id;
                    }
                }
                Want::Logits => {
                    if let Some(out) = logits.next() {
                        let from = value.ptr + t as u64 * value.token_bytes;
                        // SAFETY: pageable memory of the row's length; the copy has ended when the call returns.
                        unsafe { self.stream.copy_dtoh(bytemuck::cast_slice_mut(out), from) }?;
                    }
                }
            }
        }
        if !out.logits.is_empty() {
            self.stream.synchronize()?;
        }
        for run in batch.runs {
            self.workspace.lengths[run.sequence.0 as usize] += run.tokens.len() as u32;
        }
        Ok(())
    }

    /// Cuts a sequence back.
    pub(crate) fn truncate(&mut self, sequence: SequenceId, length: u32) -> Result<()> {
        *sequence.cut_in(&mut self.workspace.lengths, length)? = length;
        Ok(())
    }

    /// Whether a step of one token is one launch beside its embedding and arg-max.
    pub(crate) fn in_one_launch(&self) -> bool {
        self.persistent.is_some()
    }

    /// Tokens that a sequence holds.
    pub(crate) fn sequence_length(&self, sequence: SequenceId) -> Result<u32> {
        sequence.length_in(&self.workspace.lengths)
    }
}
