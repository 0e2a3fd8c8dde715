use hoist_backend::{
    BackendInfo, Chunk, DecodeBackend, DecodeProgram, DeviceMemory, EncodingSet, Error, FloatLayout,
    IndexLayout, IndexReceipt, Lifecycle, Limits, LoadPlan, LoadReceipt, LoadWatch, MemoryByClass,
    MemoryInfo, NumericsClass, OpSet, OpenOptions, Outputs, PhaseTime, Result, Role, SequenceId, Sizing,
    Slot, State, TokenBatch, UploadLedger, WeightBackend, WeightId, WeightIndex, WeightSource,
    WorkspaceBytes, WorkspaceDims, check_read_back,
};

use crate::decode::{self, Instructions};
use crate::memory::{ALIGNMENT, SystemMemory};
use crate::program::{self, Compiled};
use crate::provider::{device_name, parallelism};
use crate::residency::Residency;
use crate::workspace::Workspace;
use crate::{finite, kernels, load};

/// Bytes that a digest reads at a time where private layouts have to be undone.
const DIGEST_BYTES: usize = 256 << 10;

/// From here on several threads hash one weight.
const DIGEST_IN_PARALLEL_FROM: usize = 1 << 20;

/// The CPU backend.
#[derive(Debug)]
pub struct CpuBackend {
    info: BackendInfo,
    options: OpenOptions,
    threads: usize,
    lifecycle: Lifecycle,
    residency: Option<Residency>,
    ledger: Option<UploadLedger>,
    /// Whether room was found for copies of weights that were to be mapped.
    copies_admitted: bool,
    index: Option<WeightIndex>,
    index_bytes: u64,
    on: Instructions,
    workspace: Option<Workspace>,
    workspace_bytes: WorkspaceBytes,
    program: Option<Compiled>,
}

impl CpuBackend {
    /// Opens the CPU.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the system does not say how much memory it has; [`Error::InvalidArgument`] for 0 threads.
    pub fn open(options: &OpenOptions) -> Result<Self> {
        let threads = match options.threads {
            Some(0) => return Err(Error::invalid("threads", "at least 1", 0)),
            Some(n) => n as usize,
            None => parallelism(),
        };
        let mut backend = Self {
            info: BackendInfo {
                name: crate::NAME.into(),
                device: crate::NAME.into(),
                device_name: device_name(),
                numerics: NumericsClass::Exact,
                stored: EncodingSet::weights(),
                computed: EncodingSet::weights(),
                ops: OpSet::all(),
                float_layout: options.float_layout.unwrap_or(FloatLayout::OutIn),
                limits: Limits::default(),
                sizing: Sizing {
                    weight_alignment: ALIGNMENT as u64,
                    quantized_row_bytes: kernels::SIDE_ROW_BYTES as u64,
                    quantized_segment_bytes: kernels::SIDE_SEGMENT_BYTES as u64,
                    index_entry_bytes: size_of::<Option<Slot>>() as u64,
                },
                memory: MemoryInfo { devices: Vec::new() },
            },
            options: options.clone(),
            threads,
            lifecycle: Lifecycle::default(),
            residency: None,
            ledger: None,
            copies_admitted: false,
            index: None,
            index_bytes: 0,
            on: Instructions::choose(options.force_scalar),
            workspace: None,
            workspace_bytes: WorkspaceBytes::default(),
            program: None,
        };
        backend.info.memory = backend.memory()?;
        Ok(backend)
    }

    /// The weights, once all have arrived.
    pub(crate) fn resident(&self) -> Option<&Residency> {
        self.lifecycle.expect_resident("weights").ok()?;
        self.residency.as_ref()
    }

    fn expect_resident(&self, call: &'static str) -> Result<&Residency> {
        self.lifecycle.expect_resident(call)?;
        self.residency
            .as_ref()
            .ok_or_else(|| Error::internal(crate::NAME, "no weights in a loaded backend"))
    }

    /// What this backend owns now, by class, and what it maps.
    fn owned(&self) -> (MemoryByClass, u64) {
        let (mut owned, mapped) = self
            .residency
            .as_ref()
            .map_or_else(Default::default, Residency::memory);
        owned.index = self.index_bytes;
        owned.kv = self.workspace_bytes.kv;
        owned.workspace = self.workspace_bytes.workspace;
        (owned, mapped)
    }

    /// Demands room for `needed` bytes more than `held`.
    fn admit(&self, what: &str, held: u64, needed: u64) -> Result<()> {
        let machine = SystemMemory::read()?.available;
        let budget = self.options.memory_budget.map(|b| b.saturating_sub(held));
        let available = budget.map_or(machine, |b| b.min(machine));
        if needed <= available {
            return Ok(());
        }
        Err(Error::OutOfMemory {
            device: crate::NAME.into(),
            what: what.into(),
            needed,
            available,
        })
    }

    fn upload(
        &mut self,
        call: &'static str,
        chunk: Chunk<'_>,
        record: fn(&mut UploadLedger, WeightId, u64, u64) -> Result<()>,
    ) -> Result<()> {
        self.lifecycle.expect(call, State::Loading)?;
        let Some(residency) = &self.residency else {
            return Err(Error::internal(crate::NAME, "a load without weights"));
        };
        let weight = residency.weight(chunk.weight)?;
        // Before it is booked: a chunk that is refused must stay missing.
        finite::check_chunk(weight, chunk.offset, chunk.bytes)?;
        if weight.importable && !self.copies_admitted {
            let copies = residency.importable_bytes();
            self.admit(
                "copies of weights that were to be mapped",
                residency.owned_always(),
                copies,
            )?;
            self.copies_admitted = true;
        }
        let Some(ledger) = &mut self.ledger else {
            return Err(Error::internal(crate::NAME, "a load without a ledger"));
        };
        record(ledger, chunk.weight, chunk.offset, chunk.bytes.len() as u64)?;
        match &mut self.residency {
            Some(residency) => residency.write(chunk.weight, chunk.offset as usize, chunk.bytes),
            None => Ok(()),
        }
    }

    fn clear(&mut self) {
        self.program = None;
        self.workspace = None;
        self.workspace_bytes = WorkspaceBytes::default();
        self.index = None;
        self.index_bytes = 0;
        self.residency = None;
        self.ledger = None;
        self.copies_admitted = false;
        self.lifecycle.enter(State::Empty);
    }
}

impl WeightBackend for CpuBackend {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn memory(&self) -> Result<MemoryInfo> {
        let machine = SystemMemory::read()?;
        let (resident, mapped) = self.owned();
        Ok(MemoryInfo {
            devices: vec![DeviceMemory {
                device: crate::NAME.into(),
                total: machine.total,
                free: machine.available,
                budget: self.options.memory_budget,
                resident,
                mapped,
            }],
        })
    }

    fn begin_load(&mut self, plan: &LoadPlan) -> Result<()> {
        self.lifecycle.expect("begin_load", State::Empty)?;
        let residency = Residency::new(plan, self.options.import, |needed| {
            self.admit("the arena of weights", 0, needed)
        })?;
        self.residency = Some(residency);
        self.ledger = Some(UploadLedger::new(plan));
        self.lifecycle.enter(State::Loading);
        Ok(())
    }

    fn upload_quantized(&mut self, chunk: Chunk<'_>) -> Result<()> {
        self.upload("upload_quantized", chunk, UploadLedger::record_quantized)
    }

    fn upload_f32(&mut self, chunk: Chunk<'_>) -> Result<()> {
        self.upload("upload_f32", chunk, UploadLedger::record_f32)
    }

    fn upload_gamma(&mut self, chunk: Chunk<'_>) -> Result<()> {
        self.upload("upload_gamma", chunk, UploadLedger::record_gamma)
    }

    fn load_from(&mut self, plan: &LoadPlan, source: &dyn WeightSource, watch: &dyn LoadWatch) -> Result<()> {
        self.lifecycle.expect("load_from", State::Loading)?;
        let (Some(residency), Some(ledger)) = (&mut self.residency, &self.ledger) else {
            return Err(Error::internal(crate::NAME, "a load without a ledger"));
        };
        residency.check_is(plan)?;
        // The books are replaced only when everything has arrived.
        let mut complete = ledger.clone();
        for weight in &plan.weights {
            complete.record(weight.id, 0, weight.nbytes, &[weight.class])?;
        }
        load::import(residency, plan, source)?;
        let copies = residency.importable_bytes();
        let held = residency.owned_always();
        if copies > 0 {
            self.admit("copies of weights that cannot be mapped", held, copies)?;
        }
        let threads = self.threads;
        let Some(residency) = &mut self.residency else {
            return Ok(());
        };
        load::run(residency, plan, source, watch, threads)?;
        self.ledger = Some(complete);
        Ok(())
    }

    fn finish_load(&mut self) -> Result<LoadReceipt> {
        self.lifecycle.expect("finish_load", State::Loading)?;
        let (Some(residency), Some(ledger)) = (&self.residency, &self.ledger) else {
            return Err(Error::internal(crate::NAME, "a load without a ledger"));
        };
        ledger.check_complete()?;
        residency.complete()?;
        let (resident, mapped) = residency.memory();
        let imported = residency.weights.iter().filter(|w| w.is_mapped()).count();
        let weights = u32::try_from(residency.weights.len())
            .map_err(|_| Error::invalid("weights", "below 2^32", residency.weights.len()))?;
        let mut notes = vec![
            ("threads".to_string(), self.threads.to_string()),
            ("instructions".to_string(), self.on.isa.name().to_string()),
        ];
        if self.options.import {
            notes.push(("mapped weights".into(), imported.to_string()));
            notes.push((
                "copied weights".into(),
                (residency.weights.len() - imported).to_string(),
            ));
        }
        self.ledger = None;
        self.lifecycle.enter(State::Loaded);
        Ok(LoadReceipt {
            weights,
            resident,
            mapped,
            notes,
        })
    }

    fn abort_load(&mut self) -> Result<()> {
        self.lifecycle.expect("abort_load", State::Loading)?;
        self.clear();
        Ok(())
    }

    fn build_index(&mut self, layout: &IndexLayout) -> Result<IndexReceipt> {
        self.lifecycle.expect("build_index", State::Loaded)?;
        let weights = self.expect_resident("build_index")?.weights.len();
        let index = WeightIndex::new(layout, weights)?;
        let slots = (u64::from(index.layers()) + 1) * Role::COUNT as u64;
        let bytes = slots * size_of::<Option<Slot>>() as u64;
        let receipt = IndexReceipt {
            layers: index.layers(),
            entries: index.entries(),
            bytes,
        };
        self.index = Some(index);
        self.index_bytes = bytes;
        self.lifecycle.enter(State::Indexed);
        Ok(receipt)
    }

    fn digest(&mut self, weight: WeightId) -> Result<Option<[u8; 32]>> {
        let (threads, isa) = (self.threads, self.on.isa);
        let residency = self.expect_resident("digest")?;
        let weight = residency.weight(weight)?;
        let mut hasher = blake3::Hasher::new();
        if let Some(bytes) = residency.canonical(weight) {
            if threads > 1 && bytes.len() >= DIGEST_IN_PARALLEL_FROM {
                hasher.update_rayon(bytes);
            } else {
                hasher.update(bytes);
            }
        } else {
            let mut piece = vec![0; DIGEST_BYTES.min(weight.nbytes())];
            for at in (0..weight.nbytes()).step_by(DIGEST_BYTES) {
                let piece = &mut piece[..DIGEST_BYTES.min(weight.nbytes() - at)];
                residency.read_back(isa, weight, at, piece)?;
                hasher.update(piece);
            }
        }
        Ok(Some(hasher.finalize().into()))
    }

    fn read_back(&mut self, weight: WeightId, offset: u64, out: &mut [u8]) -> Result<()> {
        let residency = self.expect_resident("read_back")?;
        let weight = residency.weight(weight)?;
        let (nbytes, block) = (weight.nbytes() as u64, weight.encoding.block_bytes());
        check_read_back(&weight.name, nbytes, block, offset, out.len() as u64)?;
        residency.read_back(self.on.isa, weight, offset as usize, out)
    }

    fn workspace_bytes(&self, dims: &WorkspaceDims) -> Result<WorkspaceBytes> {
        Workspace::bytes(dims, self.threads)
    }

    fn init_workspace(&mut self, dims: &WorkspaceDims) -> Result<WorkspaceBytes> {
        self.lifecycle.expect("init_workspace", State::Indexed)?;
        let bytes = self.workspace_bytes(dims)?;
        self.admit(
            "keys, values and workspace",
            self.owned().0.total(),
            bytes.kv + bytes.workspace,
        )?;
        self.workspace = Some(Workspace::new(dims, self.threads)?);
        self.workspace_bytes = bytes;
        self.lifecycle.enter(State::Ready);
        Ok(bytes)
    }

    fn as_decode(&mut self) -> Option<&mut dyn DecodeBackend> {
        Some(self)
    }

    fn unload(&mut self) -> Result<()> {
        self.clear();
        Ok(())
    }
}

impl CpuBackend {
    fn run(
        &mut self,
        batch: &TokenBatch<'_>,
        out: &mut Outputs<'_>,
        phases: Option<&mut Vec<PhaseTime>>,
    ) -> Result<()> {
        self.lifecycle.expect("forward", State::Prepared)?;
        let (Some(residency), Some(program), Some(workspace)) =
            (&self.residency, &self.program, &mut self.workspace)
        else {
            return Err(Error::internal(
                crate::NAME,
                "a prepared backend without a program",
            ));
        };
        decode::forward(self.on, residency, program, workspace, batch, out, phases)
    }
}

impl DecodeBackend for CpuBackend {
    fn prepare(&mut self, program: &DecodeProgram) -> Result<()> {
        self.lifecycle.expect_ready("prepare")?;
        let (Some(residency), Some(index), Some(workspace)) =
            (&mut self.residency, &self.index, &mut self.workspace)
        else {
            return Err(Error::internal(
                crate::NAME,
                "a ready backend without a workspace",
            ));
        };
        let compiled = program::compile(program, &workspace.dims, index, residency)?;
        for weight in &compiled.multiplied {
            residency.ready_to_multiply(*weight, self.on.isa, &mut workspace.pool)?;
        }
        workspace.lengths.fill(0);
        self.program = Some(compiled);
        self.lifecycle.enter(State::Prepared);
        Ok(())
    }

    fn forward(&mut self, batch: &TokenBatch<'_>, out: &mut Outputs<'_>) -> Result<()> {
        self.run(batch, out, None)
    }

    fn profile(
        &mut self,
        batch: &TokenBatch<'_>,
        out: &mut Outputs<'_>,
        phases: &mut Vec<PhaseTime>,
    ) -> Result<()> {
        self.run(batch, out, Some(phases))
    }

    fn truncate(&mut self, sequence: SequenceId, length: u32) -> Result<()> {
        self.lifecycle.expect("truncate", State::Prepared)?;
        let lengths = self.workspace.as_mut().map_or(&mut [][..], |w| &mut w.lengths);
        *sequence.cut_in(lengths, length)? = length;
        Ok(())
    }

    fn sequence_length(&self, sequence: SequenceId) -> Result<u32> {
        let lengths = self.workspace.as_ref().map_or(&[][..], |w| &w.lengths);
        sequence.length_in(lengths)
    }
}
