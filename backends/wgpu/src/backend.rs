use std::sync::Arc;

use hoist_backend::{
    BackendInfo, Chunk, DecodeBackend, DecodeProgram, DeviceMemory, EncodingSet, Error, FloatLayout,
    IndexLayout, IndexReceipt, Lifecycle, Limits, LoadPlan, LoadReceipt, LoadWatch, MemoryByClass,
    MemoryInfo, NumericsClass, OpSet, OpenOptions, Outputs, Result, Role, SequenceId, Sizing, Slot, State,
    TokenBatch, UnsupportedWhat, UploadLedger, WeightBackend, WeightId, WeightIndex, WeightSource,
    WorkspaceBytes, WorkspaceDims, check_read_back,
};

use crate::decode;
use crate::device::{self, Gpu};
use crate::load;
use crate::program::{self, Compiled, Context};
use crate::residency::{ALIGNMENT, ROW_BYTES, Residency, most_row_bytes};
use crate::shaders::{NARROW, WIDE};
use crate::workspace::{self, Workspace};

/// Threads of a load beyond which nothing is gained.
const MOST_THREADS: usize = 16;

/// What an adapter is taken for.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, Default)]
pub struct AsIf {
    /// Most bytes of a binding.
    pub binding_limit: Option<u64>,
    /// Whether it is a processor.
    pub is_cpu: Option<bool>,
}

/// A backend on one adapter.
#[derive(Debug)]
pub struct WgpuBackend {
    info: BackendInfo,
    budget: Option<u64>,
    threads: usize,
    /// Most bytes of a buffer that kernels bind.
    limit: u64,
    /// Whether operations share launches.
    fuses: bool,
    /// Threads of the workgroups of quantised products.
    threads_together: u32,
    gpu: Arc<Gpu>,
    lifecycle: Lifecycle,
    residency: Option<Residency>,
    ledger: Option<UploadLedger>,
    index: Option<WeightIndex>,
    index_bytes: u64,
    workspace: Option<Workspace>,
    workspace_bytes: WorkspaceBytes,
    program: Option<Compiled>,
}

fn unsupported(what: &str) -> Error {
    Error::Unsupported {
        backend: crate::NAME.into(),
        what: UnsupportedWhat::Other(what.into()),
    }
}

fn missing(what: &str) -> Error {
    Error::internal(crate::NAME, format!("no {what} in this state"))
}

impl WgpuBackend {
    /// Opens adapter `ordinal`, in the order that [`crate::WgpuProvider`] lists them. Portable scalar code, as an option
    /// asks for, is a kernel for each operation, nothing fused, of workgroups whose threads work alone.
    ///
    /// # Errors
    /// [`Error::Unavailable`] without such an adapter; [`Error::Unsupported`] for importing and transposed float matrices; [`Error::InvalidArgument`] for 0 threads.
    pub fn open(ordinal: u32, options: &OpenOptions) -> Result<Self> {
        Self::open_as_if(ordinal, options, AsIf::default())
    }

    /// As [`WgpuBackend::open`], as if the adapter were another one: what tests of other adapters' paths need.
    ///
    /// # Errors
    /// As [`WgpuBackend::open`].
    #[doc(hidden)]
    pub fn open_as_if(ordinal: u32, options: &OpenOptions, adapter: AsIf) -> Result<Self> {
        if options.import {
            return Err(unsupported("mapping weights from files"));
        }
        if options.float_layout == Some(FloatLayout::InOut) {
            return Err(unsupported("transposed float matrices"));
        }
        let threads = match options.threads {
            Some(0) => return Err(Error::invalid("threads", "at least 1", 0)),
            Some(n) => n as usize,
            None => std::thread::available_parallelism().map_or(1, |n| n.get().min(MOST_THREADS)),
        };
        let gpu = Gpu::shared(ordinal)?;
        gpu.check("opening", 0)?;
        let limit = gpu.binding_limit.min(adapter.binding_limit.unwrap_or(u64::MAX));
        let mut backend = Self {
            info: BackendInfo {
                name: crate::NAME.into(),
                device: gpu.id.clone(),
                device_name: gpu.adapter.get_info().name,
                numerics: NumericsClass::Exact,
                stored: EncodingSet::weights(),
                computed: EncodingSet::weights(),
                ops: OpSet::all(),
                float_layout: FloatLayout::OutIn,
                limits: Limits {
                    max_row_bytes: Some(most_row_bytes(limit)),
                    ..Limits::default()
                },
                sizing: Sizing {
                    weight_alignment: ALIGNMENT,
                    quantized_row_bytes: ROW_BYTES,
                    quantized_segment_bytes: 0,
                    index_entry_bytes: size_of::<Option<Slot>>() as u64,
                },
                memory: MemoryInfo { devices: Vec::new() },
            },
            budget: options.memory_budget,
            threads,
            limit,
            fuses: !options.force_scalar,
            threads_together: match options.force_scalar || adapter.is_cpu.unwrap_or(gpu.is_cpu) {
                true => NARROW,
                false => WIDE,
            },
            gpu,
            lifecycle: Lifecycle::default(),
            residency: None,
            ledger: None,
            index: None,
            index_bytes: 0,
            workspace: None,
            workspace_bytes: WorkspaceBytes::default(),
            program: None,
        };
        backend.info.memory = backend.memory()?;
        Ok(backend)
    }

    /// Launches that a step of one token takes, if a program is prepared: what tests of fusion ask.
    #[doc(hidden)]
    pub fn launches(&self) -> Option<usize> {
        self.program.as_ref().map(|p| p.body.len() + p.tail.len())
    }

    /// Destroys the device under this backend and all others that share it, as a driver's reset does.
    #[doc(hidden)]
    pub fn lose_device(&self) {
        self.gpu.device.destroy();
    }

    /// What this backend owns now, by class.
    fn owned(&self) -> MemoryByClass {
        let mut owned = self.residency.as_ref().map(Residency::memory).unwrap_or_default();
        owned.index = self.index_bytes;
        owned.kv = self.workspace_bytes.kv;
        owned.workspace = self.workspace_bytes.workspace;
        owned
    }

    /// Total and free bytes; where the driver does not say what is free, what we have not taken.
    fn device_memory(&self) -> (u64, u64) {
        let memory = device::memory(&self.gpu.adapter);
        let left = memory.total.saturating_sub(self.owned().total());
        (memory.total, memory.free.unwrap_or(left))
    }

    /// Demands room for `needed` bytes more than are owned.
    fn admit(&self, what: &str, needed: u64) -> Result<()> {
        let free = self.device_memory().1;
        let budget = self.budget.map(|b| b.saturating_sub(self.owned().total()));
        let available = budget.map_or(free, |b| b.min(free));
        if needed <= available {
            return Ok(());
        }
        Err(Error::OutOfMemory {
            device: self.gpu.id.clone(),
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
        let (Some(residency), Some(ledger)) = (&mut self.residency, &mut self.ledger) else {
            return Err(missing("load"));
        };
        // Before it is booked: a chunk that is refused must stay missing.
        residency
            .weight(chunk.weight)?
            .inspect(chunk.offset, chunk.bytes)?;
        record(ledger, chunk.weight, chunk.offset, chunk.bytes.len() as u64)?;
        residency.write(&self.gpu, chunk.weight, chunk.offset, chunk.bytes)
    }

    fn clear(&mut self) {
        self.program = None;
        self.workspace = None;
        self.workspace_bytes = WorkspaceBytes::default();
        self.index = None;
        self.index_bytes = 0;
        self.residency = None;
        self.ledger = None;
        self.lifecycle.enter(State::Empty);
        // What was written and not submitted is held until it is. Buffers are given back when the device has been looked
        // at; that it is lost is said by the next call.
        self.gpu.queue.submit([]);
        let _ = self.gpu.poll(wgpu::PollType::wait_indefinitely());
    }
}

impl Drop for WgpuBackend {
    fn drop(&mut self) {
        // The device stays open for others.
        self.clear();
    }
}

impl WeightBackend for WgpuBackend {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn memory(&self) -> Result<MemoryInfo> {
        self.gpu.look("memory", 0)?;
        let (total, free) = self.device_memory();
        Ok(MemoryInfo {
            devices: vec![DeviceMemory {
                device: self.gpu.id.clone(),
                total,
                free,
                budget: self.budget,
                resident: self.owned(),
                mapped: 0,
            }],
        })
    }

    fn begin_load(&mut self, plan: &LoadPlan) -> Result<()> {
        self.lifecycle.expect("begin_load", State::Empty)?;
        let residency = Residency::new(plan, &self.gpu, self.limit, |needed| {
            self.admit("weights", needed)
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
        let (Some(residency), Some(ledger)) = (&self.residency, &self.ledger) else {
            return Err(missing("load"));
        };
        residency.check_is(plan)?;
        // The books are replaced only when everything has arrived.
        let mut complete = ledger.clone();
        for weight in &plan.weights {
            complete.record(weight.id, 0, weight.nbytes, &[weight.class])?;
        }
        load::run(&self.gpu, residency, plan, source, watch, self.threads)?;
        self.ledger = Some(complete);
        Ok(())
    }

    fn finish_load(&mut self) -> Result<LoadReceipt> {
        self.lifecycle.expect("finish_load", State::Loading)?;
        let (Some(residency), Some(ledger)) = (&mut self.residency, &self.ledger) else {
            return Err(missing("load"));
        };
        ledger.check_complete()?;
        residency.complete(&self.gpu)?;
        let weights = u32::try_from(residency.weights.len())
            .map_err(|_| Error::invalid("weights", "below 2^32", residency.weights.len()))?;
        let split = residency.weights.iter().filter(|w| w.parts.len() > 1).count();
        let notes = vec![
            ("threads".to_string(), self.threads.to_string()),
            ("buffers".to_string(), residency.arenas.len().to_string()),
            ("split weights".to_string(), split.to_string()),
        ];
        let resident = residency.memory();
        self.ledger = None;
        self.lifecycle.enter(State::Loaded);
        Ok(LoadReceipt {
            weights,
            resident,
            mapped: 0,
            notes,
        })
    }

    fn abort_load(&mut self) -> Result<()> {
        self.lifecycle.expect("abort_load", State::Loading)?;
        self.clear();
        self.gpu.look("abort_load", 0)
    }

    fn build_index(&mut self, layout: &IndexLayout) -> Result<IndexReceipt> {
        self.lifecycle.expect("build_index", State::Loaded)?;
        let weights = self
            .residency
            .as_ref()
            .ok_or_else(|| missing("weights"))?
            .weights
            .len();
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
        self.lifecycle.expect_resident("digest")?;
        let residency = self.residency.as_ref().ok_or_else(|| missing("weights"))?;
        residency.weight(weight)?;
        // Hashing is the caller's, over what it reads back.
        Ok(None)
    }

    fn read_back(&mut self, weight: WeightId, offset: u64, out: &mut [u8]) -> Result<()> {
        self.lifecycle.expect_resident("read_back")?;
        let residency = self.residency.as_mut().ok_or_else(|| missing("weights"))?;
        let resident = residency.weight(weight)?;
        let block = resident.encoding.block_bytes();
        check_read_back(&resident.name, resident.nbytes, block, offset, out.len() as u64)?;
        residency.read(&self.gpu, weight, offset, out)
    }

    fn workspace_bytes(&self, dims: &WorkspaceDims) -> Result<WorkspaceBytes> {
        workspace::bytes(dims, self.limit)
    }

    fn init_workspace(&mut self, dims: &WorkspaceDims) -> Result<WorkspaceBytes> {
        self.lifecycle.expect("init_workspace", State::Indexed)?;
        let bytes = self.workspace_bytes(dims)?;
        self.admit(
            "keys, values and workspace",
            bytes.kv.saturating_add(bytes.workspace),
        )?;
        self.workspace = Some(Workspace::new(dims, &self.gpu, self.limit)?);
        self.workspace_bytes = bytes;
        self.lifecycle.enter(State::Ready);
        Ok(bytes)
    }

    fn as_decode(&mut self) -> Option<&mut dyn DecodeBackend> {
        Some(self)
    }

    fn unload(&mut self) -> Result<()> {
        self.clear();
        self.gpu.look("unload", 0)
    }
}

impl DecodeBackend for WgpuBackend {
    fn prepare(&mut self, program: &DecodeProgram) -> Result<()> {
        self.lifecycle.expect_ready("prepare")?;
        let (Some(residency), Some(index), Some(work)) =
            (&mut self.residency, &self.index, &mut self.workspace)
        else {
            return Err(missing("workspace"));
        };
        let gpu = &self.gpu;
        let compiled = program::compile(
            program,
            Context {
                gpu,
                grids: gpu.grids()?,
                fuses: self.fuses,
                threads: self.threads_together,
                index,
                residency,
                work,
            },
        )?;
        work.lengths.fill(0);
        self.program = Some(compiled);
        self.lifecycle.enter(State::Prepared);
        Ok(())
    }

    fn forward(&mut self, batch: &TokenBatch<'_>, out: &mut Outputs<'_>) -> Result<()> {
        self.lifecycle.expect("forward", State::Prepared)?;
        let (Some(program), Some(work)) = (&mut self.program, &mut self.workspace) else {
            return Err(missing("program"));
        };
        decode::forward(&self.gpu, program, work, batch, out)
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
