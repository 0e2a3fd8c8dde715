use std::sync::Arc;
use std::thread::JoinHandle;

use bytemuck::{Pod, Zeroable};
use hoist_backend::{
    BackendInfo, Chunk, DecodeBackend, DecodeProgram, DeviceMemory, EncodingSet, Error, FloatLayout,
    IndexLayout, IndexReceipt, Lifecycle, Limits, LoadPlan, LoadReceipt, LoadWatch, MemoryByClass,
    MemoryInfo, NumericsClass, OpSet, OpenOptions, Outputs, PhaseTime, Result, Role, SequenceId, Shape,
    State, TokenBatch, UnsupportedWhat, UploadLedger, WeightBackend, WeightId, WeightIndex, WeightSource,
    WorkspaceBytes, WorkspaceDims,
};

use crate::decode::{self, DeviceWeight, Engine, OneLaunch, Settings};
use crate::digest::Hasher;
use crate::driver::{self, DeviceBuffer, Stream};
use crate::layout::{Finisher, Mover, finish_bytes, transposing_pieces};
use crate::load::{self, Equipment, Job, Preparation, Prepared};
use crate::measure;
use crate::residency::{EXPONENT_BYTES, INDEX_ENTRY_BYTES, Residency, SIZING};
use crate::shared::{Acquired, SharedDevice};

/// Bytes of a pushed chunk of a transposed weight that are on the device at a time, and of canonical bytes made at a time
/// for reading back.
const SCRATCH_BYTES: u64 = 4 << 20;
/// Room behind them for the table of pieces.
const SCRATCH_TABLE_BYTES: u64 = 1 << 20;

/// A row of the device's index, `[1 + layers, roles]`: row 0 is the whole model, row `1 + l` layer `l`. All zero where
/// nothing stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct IndexRow {
    pub(crate) ptr: u64,
    pub(crate) nbytes: u64,
    /// i16 for each row; 0 if the weight is not quantised.
    pub(crate) exponents: u64,
    pub(crate) matrices: u64,
    pub(crate) rows: u64,
    pub(crate) cols: u64,
    /// `Encoding::index` + 1; 0 where nothing stands.
    pub(crate) encoding: u32,
    /// 1 if the weight stands at another entry too.
    pub(crate) tied: u32,
    pub(crate) reserved: u64,
}

const _: () = assert!(size_of::<IndexRow>() as u64 == INDEX_ENTRY_BYTES);

/// What a thread of the backend works on. It is waited for when this is dropped, since it holds the context.
#[derive(Debug)]
struct Aside<T>(Option<JoinHandle<T>>);

impl<T> Aside<T> {
    /// What came of it; `None` if it panicked, which has been printed.
    fn wait(mut self) -> Option<T> {
        self.0.take().and_then(|thread| thread.join().ok())
    }
}

impl<T> Drop for Aside<T> {
    fn drop(&mut self) {
        // A panic there has been printed, and left nothing to do here.
        let _ = self.0.take().map(JoinHandle::join);
    }
}

/// Makes what a load needs beside what the caller does meanwhile, for whoever loads first; `None` if there can be no thread
/// for it.
fn equip(device: &Arc<SharedDevice>, prepared: Preparation, shape: load::Shape) -> Option<Aside<()>> {
    let device = Arc::clone(device);
    std::thread::Builder::new()
        .name("hoist-equip".into())
        .spawn(move || {
            let (prepared, books) = prepared.wait();
            device.keep_books(books);
            // What goes wrong here goes wrong again in a load, and says so.
            if let Ok(equipment) = Equipment::new(&device.context, &device.modules, prepared, shape) {
                device.keep_equipment(equipment);
            }
        })
        .ok()
        .map(|thread| Aside(Some(thread)))
}

/// What has arrived by uploads; all of it once a load of its own has `finished`.
fn books<'a>(
    residency: &Residency,
    ledger: &'a mut Option<UploadLedger>,
    finished: bool,
) -> Result<&'a mut UploadLedger> {
    if ledger.is_none() {
        let mut empty = residency.ledger();
        if finished {
            record_all(residency, &mut empty)?;
        }
        *ledger = Some(empty);
    }
    ledger
        .as_mut()
        .ok_or_else(|| Error::internal(crate::NAME, "a ledger that was made is not there"))
}

/// Records that every weight arrives whole.
fn record_all(residency: &Residency, ledger: &mut UploadLedger) -> Result<()> {
    let mut weights = residency.weights.iter().zip(0..);
    weights.try_for_each(|(w, id)| ledger.record(WeightId(id), 0, w.nbytes, &[w.class]))
}

/// The CUDA backend, on one device.
#[derive(Debug)]
pub struct CudaBackend {
    info: BackendInfo,
    options: OpenOptions,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) residency: Option<Residency>,
    /// Of uploads, from the first one on; a load of its own counts what arrives itself.
    ledger: Option<UploadLedger>,
    /// Whether a load of its own has finished every weight already.
    finished: bool,
    notes: Vec<(String, String)>,
    pub(crate) index: Option<WeightIndex>,
    /// [`IndexRow`]s, `[1 + layers, Role::COUNT]`.
    pub(crate) device_index: Option<DeviceBuffer>,
    pub(crate) workspace_bytes: WorkspaceBytes,
    pub(crate) engine: Option<Engine>,
    /// Makes what the first load of a new context needs, while headers are read.
    equipping: Option<Aside<()>>,
    /// Gives back what the last load needed, and the next one does not.
    clearing: Option<Aside<()>>,
    /// Whether decoding has failed, and may have left something under way.
    unsettled: bool,
    /// Bytes past which the driver is made to refuse page locking.
    pin_limit: Option<usize>,
    settings: Settings,
    hasher: Hasher,
    mover: Mover,
    // Handles last: they must outlive what is made of them.
    stream: Stream,
    device: Arc<SharedDevice>,
}

/// What a backend says of itself: devices hold weights and run steps alike, and differ by name and memory.
pub(crate) fn describe(
    device: &str,
    device_name: &str,
    options: &OpenOptions,
    memory: Vec<DeviceMemory>,
) -> BackendInfo {
    BackendInfo {
        name: crate::NAME.into(),
        device: device.into(),
        device_name: device_name.into(),
        numerics: NumericsClass::Exact,
        stored: EncodingSet::weights(),
        computed: EncodingSet::weights()
            .iter()
            .filter(|e| decode::computes(*e))
            .collect(),
        ops: OpSet::all(),
        float_layout: options.float_layout.unwrap_or(FloatLayout::OutIn),
        limits: Limits {
            max_batch_tokens: Some(decode::MAX_BATCH_TOKENS),
            ..Limits::default()
        },
        sizing: SIZING,
        memory: MemoryInfo { devices: memory },
    }
}

impl CudaBackend {
    /// Opens a device. The first backend of a process makes its context; later ones share it, each with a stream and memory
    /// of its own.
    ///
    /// # Errors
    /// [`Error::Unavailable`]; [`Error::Unsupported`] for `import`; [`Error::InvalidArgument`] for 0 threads or a value of
    /// `HOIST_CUDA_ONE_LAUNCH` that is neither 0 nor 1; [`Error::DeviceLost`] while another backend holds the device's lost
    /// context.
    pub fn open(ordinal: u32, options: &OpenOptions) -> Result<Self> {
        if options.import {
            return Err(Error::Unsupported {
                backend: crate::NAME.into(),
                what: UnsupportedWhat::Other("mapping weights from files instead of copying them".into()),
            });
        }
        if options.threads == Some(0) {
            return Err(Error::invalid("threads", "at least 1", 0));
        }
        let settings = Settings::from_environment()?;
        driver::probe()?;
        let shape = load::Shape::new(options.threads, None);
        let acquire = || {
            let mut prepared = None;
            // Before there is a context, which takes a third of a second.
            let Acquired { device, fresh } =
                SharedDevice::acquire(ordinal, || prepared = Some(Preparation::start(shape)))?;
            // Only now and then does a later load need another ring than is kept, and makes it then.
            let equipping = prepared.and_then(|prepared| equip(&device, prepared, shape));
            Ok::<_, Error>((device, equipping, fresh))
        };
        let (device, equipping, fresh) = acquire()?;
        match Self::on(device, equipping, options, settings) {
            // Lost while nobody looked: the context that was kept is not any more.
            Err(Error::DeviceLost { .. }) if !fresh => {
                let (device, equipping, _) = acquire()?;
                Self::on(device, equipping, options, settings)
            }
            opened => opened,
        }
    }

    fn on(
        device: Arc<SharedDevice>,
        equipping: Option<Aside<()>>,
        options: &OpenOptions,
        settings: Settings,
    ) -> Result<Self> {
        let stream = Stream::new(&device.context)?;
        let (hasher, mover) = (Hasher::new(&device.modules)?, Mover::new(&device.modules)?);
        let mut backend = Self {
            info: describe(
                device.context.id(),
                &device.context.device.name,
                options,
                Vec::new(),
            ),
            options: options.clone(),
            lifecycle: Lifecycle::default(),
            residency: None,
            ledger: None,
            finished: false,
            notes: Vec::new(),
            index: None,
            device_index: None,
            workspace_bytes: WorkspaceBytes::default(),
            engine: None,
            equipping,
            clearing: None,
            unsettled: false,
            pin_limit: None,
            settings,
            hasher,
            mover,
            stream,
            device,
        };
        backend.info.memory = backend.memory()?;
        Ok(backend)
    }

    /// What a load needs: what was made ahead or kept, or is made now.
    fn equipment(&mut self) -> Result<Equipment> {
        // One that panicked has said so, and left nothing.
        let _ = self.equipping.take().and_then(Aside::wait);
        let shape = load::Shape::new(self.options.threads, self.pin_limit);
        match self.device.take_equipment(shape) {
            Some(equipment) => Ok(equipment),
            None => Equipment::new(
                &self.device.context,
                &self.device.modules,
                Prepared::default(),
                shape,
            ),
        }
    }

    /// The weights, once all have arrived.
    ///
    /// # Errors
    /// [`Error::BadState`]
    pub(crate) fn resident(&self, call: &'static str) -> Result<&Residency> {
        self.lifecycle.expect_resident(call)?;
        self.residency
            .as_ref()
            .ok_or_else(|| Error::internal(crate::NAME, "no weights in a loaded backend"))
    }

    /// What this backend owns now, by class.
    fn owned(&self) -> MemoryByClass {
        let mut owned = self.residency.as_ref().map(|r| r.by_class).unwrap_or_default();
        owned.index = self.device_index.as_ref().map_or(0, DeviceBuffer::nbytes);
        owned.kv = self.workspace_bytes.kv;
        owned.workspace = self.workspace_bytes.workspace;
        owned
    }

    /// Demands room for `needed` bytes more, on the device and in the budget.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with numbers.
    pub(crate) fn admit(&self, what: &str, needed: u64) -> Result<()> {
        let (free, _) = self.device.context.memory()?;
        let budget = self.options.memory_budget;
        let left = budget.map(|b| b.saturating_sub(self.owned().total()));
        let available = left.map_or(free, |b| b.min(free));
        if needed <= available {
            return Ok(());
        }
        Err(Error::OutOfMemory {
            device: self.info.device.clone(),
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
        self.device.context.bind()?;
        let Some(residency) = &self.residency else {
            return Err(Error::internal(crate::NAME, "a load without weights"));
        };
        let ledger = books(residency, &mut self.ledger, self.finished)?;
        let weight = residency.weight(chunk.weight)?;
        let bytes = chunk.bytes;
        record(ledger, chunk.weight, chunk.offset, bytes.len() as u64)?;
        if weight.layout == FloatLayout::OutIn {
            // SAFETY: the ledger has found the range to be within the weight, and nobody else writes to it; the borrow
            // outlives the synchronisation that follows.
            unsafe { self.stream.copy_htod(weight.ptr + chunk.offset, bytes)? };
            return self.stream.synchronize();
        }
        let scratch = DeviceBuffer::new(
            &self.device.context,
            "a chunk",
            SCRATCH_BYTES + SCRATCH_TABLE_BYTES,
        )?;
        for (i, part) in bytes.chunks(SCRATCH_BYTES as usize).enumerate() {
            let offset = chunk.offset + i as u64 * SCRATCH_BYTES;
            let pieces = transposing_pieces(weight, offset, part.len() as u64, 0);
            let table: &[u8] = bytemuck::cast_slice(&pieces);
            if table.len() as u64 > SCRATCH_TABLE_BYTES {
                return Err(Error::internal(crate::NAME, "too many pieces in a chunk"));
            }
            let table_at = scratch.ptr() + SCRATCH_BYTES;
            // SAFETY: the borrow outlives the synchronisation that follows, and the scratch is this call's.
            unsafe { self.stream.copy_htod(scratch.ptr(), part)? };
            // SAFETY: as above.
            unsafe { self.stream.copy_htod(table_at, table)? };
            // SAFETY: the pieces' sources are within the part, and their destinations within the weight.
            unsafe {
                self.mover.launch(
                    &self.stream,
                    self.mover.launch_of(&pieces)?,
                    table_at,
                    scratch.ptr(),
                )?;
            };
            self.stream.synchronize()?;
        }
        Ok(())
    }

    /// Reads every weight to its place. What the load leaves is given back beside what follows it, or at once if it failed.
    fn load(
        &mut self,
        plan: &LoadPlan,
        source: &dyn WeightSource,
        watch: &dyn LoadWatch,
    ) -> Result<Vec<(String, String)>> {
        let equipment = self.equipment()?;
        let Some(residency) = &self.residency else {
            return Err(Error::internal(crate::NAME, "a load without weights"));
        };
        let job = Job {
            context: &self.device.context,
            modules: &self.device.modules,
            residency,
            plan,
            source,
            watch,
        };
        let (loaded, remains) = load::run(job, equipment);
        let Some(remains) = remains else { return loaded };
        let device = Arc::clone(&self.device);
        let settle = move || {
            if device.context.bind().is_ok()
                && let Some(equipment) = remains.settle()
            {
                device.keep_equipment(equipment);
            }
        };
        if loaded.is_err() {
            settle();
            return loaded;
        }
        // Without a thread all of it goes, the equipment too.
        self.clearing = std::thread::Builder::new()
            .name("hoist-clear".into())
            .spawn(settle)
            .ok()
            .map(|thread| Aside(Some(thread)));
        loaded
    }

    /// Row exponents and checks of weights that were pushed.
    fn finish_pushed(&self, residency: &Residency) -> Result<()> {
        let order: Vec<u32> = (0..residency.weights.len() as u32).collect();
        let nbytes = finish_bytes(&residency.weights);
        let memory = DeviceBuffer::new(&self.device.context, "tables of checks", nbytes)?;
        let at = memory.ptr();
        let finisher = Finisher::new(
            &self.device.modules,
            &self.stream,
            residency,
            &order,
            Arc::new(memory),
            at,
        )?;
        finisher.launch(&self.stream, &mut order.clone())?;
        finisher.check(&self.stream, residency)
    }

    /// Waits for what this backend has under way. Not for its context's other streams: one on which another backend
    /// records would be spoiled.
    fn settle(&mut self) -> Result<()> {
        // A load has waited for its own, and a step that succeeded for its own too.
        self.stream.synchronize()?;
        if std::mem::take(&mut self.unsettled) {
            self.device.context.synchronize()?;
        }
        Ok(())
    }

    /// Takes note of how a call of the engine ended.
    fn noted<T>(&mut self, result: Result<T>) -> Result<T> {
        self.unsettled |= result.is_err();
        result
    }

    /// Gives the weights' memory back.
    fn forget_weights(&mut self) {
        if let Some(books) = self.residency.take().and_then(Residency::into_books) {
            self.device.keep_books(books);
        }
    }

    fn clear(&mut self) {
        self.clearing = None;
        // Its program speaks of the weights' addresses.
        self.engine = None;
        self.workspace_bytes = WorkspaceBytes::default();
        self.index = None;
        self.device_index = None;
        self.forget_weights();
        self.ledger = None;
        self.finished = false;
        self.notes.clear();
        self.hasher.forget();
        self.lifecycle.enter(State::Empty);
    }
}

impl WeightBackend for CudaBackend {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn memory(&self) -> Result<MemoryInfo> {
        self.device.context.bind()?;
        let (free, total) = self.device.context.memory()?;
        Ok(MemoryInfo {
            devices: vec![DeviceMemory {
                device: self.device.context.id().into(),
                total,
                free,
                budget: self.options.memory_budget,
                resident: self.owned(),
                mapped: 0,
            }],
        })
    }

    fn begin_load(&mut self, plan: &LoadPlan) -> Result<()> {
        self.lifecycle.expect("begin_load", State::Empty)?;
        self.device.context.bind()?;
        let books = self.device.take_books();
        let residency = Residency::new(&self.device.context, plan, books, |needed| {
            self.admit("the arena of weights", needed)
        })?;
        self.residency = Some(residency);
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
        self.device.context.bind()?;
        let Some(residency) = &self.residency else {
            return Err(Error::internal(crate::NAME, "a load without weights"));
        };
        residency.check_is(plan)?;
        // Nothing may have arrived by other ways, uploads or a load before.
        let pushed = match (&mut self.ledger, self.finished) {
            (None, false) => Ok(()),
            (ledger, finished) => {
                books(residency, ledger, finished).and_then(|books| record_all(residency, books))
            }
        };
        // Whatever comes of it, no upload before it counts any more.
        self.ledger = None;
        self.finished = false;
        self.notes = pushed.and_then(|()| self.load(plan, source, watch))?;
        self.finished = true;
        Ok(())
    }

    fn finish_load(&mut self) -> Result<LoadReceipt> {
        self.lifecycle.expect("finish_load", State::Loading)?;
        self.device.context.bind()?;
        let Some(residency) = &self.residency else {
            return Err(Error::internal(crate::NAME, "a load without weights"));
        };
        if !self.finished {
            books(residency, &mut self.ledger, false)?.check_complete()?;
            self.finish_pushed(residency)?;
        }
        let weights = u32::try_from(residency.weights.len())
            .map_err(|_| Error::invalid("weights", "below 2^32", residency.weights.len()))?;
        let receipt = LoadReceipt {
            weights,
            resident: residency.by_class,
            mapped: 0,
            notes: std::mem::take(&mut self.notes),
        };
        self.ledger = None;
        self.lifecycle.enter(State::Loaded);
        Ok(receipt)
    }

    fn abort_load(&mut self) -> Result<()> {
        self.lifecycle.expect("abort_load", State::Loading)?;
        self.unload()
    }

    fn build_index(&mut self, layout: &IndexLayout) -> Result<IndexReceipt> {
        self.lifecycle.expect("build_index", State::Loaded)?;
        self.device.context.bind()?;
        let residency = self.resident("build_index")?;
        let index = WeightIndex::new(layout, residency.weights.len())?;
        let rows = (index.layers() as usize + 1) * Role::COUNT;
        let mut table = vec![IndexRow::default(); rows];
        for entry in &layout.entries {
            let Some(id) = entry.slot.weight() else { continue };
            let weight = residency.weight(id)?;
            let row = entry.layer.map_or(0, |l| l as usize + 1);
            table[row * Role::COUNT + entry.role.index()] = IndexRow {
                ptr: weight.ptr,
                nbytes: weight.nbytes,
                exponents: weight.exponents,
                matrices: weight.shape.matrices,
                rows: weight.shape.rows,
                cols: weight.shape.cols,
                encoding: weight.encoding.index() as u32 + 1,
                tied: u32::from(matches!(entry.slot, hoist_backend::Slot::Tied(_))),
                reserved: 0,
            };
        }
        let bytes: &[u8] = bytemuck::cast_slice(&table);
        self.admit("the index", bytes.len() as u64)?;
        let buffer = DeviceBuffer::new(&self.device.context, "the index", bytes.len() as u64)?;
        // SAFETY: the table outlives the synchronisation that follows, and the buffer is new.
        unsafe { self.stream.copy_htod(buffer.ptr(), bytes)? };
        self.stream.synchronize()?;
        let receipt = IndexReceipt {
            layers: index.layers(),
            entries: index.entries(),
            bytes: buffer.nbytes(),
        };
        self.index = Some(index);
        self.device_index = Some(buffer);
        self.lifecycle.enter(State::Indexed);
        Ok(receipt)
    }

    fn digest(&mut self, weight: WeightId) -> Result<Option<[u8; 32]>> {
        self.lifecycle.expect_resident("digest")?;
        self.device.context.bind()?;
        let Some(residency) = &self.residency else {
            return Err(Error::internal(crate::NAME, "no weights in a loaded backend"));
        };
        self.hasher
            .digest(&self.device.context, &self.stream, &self.mover, residency, weight)
            .map(Some)
    }

    fn read_back(&mut self, weight: WeightId, offset: u64, out: &mut [u8]) -> Result<()> {
        let residency = self.resident("read_back")?;
        let name = residency.names.at(weight.index());
        let weight = residency.weight(weight)?;
        weight.check_range(name, offset, out.len() as u64)?;
        self.device.context.bind()?;
        if weight.layout == FloatLayout::OutIn {
            // SAFETY: the range is within the weight, and the borrow outlives the synchronisation that follows.
            unsafe { self.stream.copy_dtoh(out, weight.ptr + offset)? };
            return self.stream.synchronize();
        }
        let scratch = DeviceBuffer::new(
            &self.device.context,
            "scratch to read back",
            SCRATCH_BYTES + SCRATCH_TABLE_BYTES,
        )?;
        for (i, part) in out.chunks_mut(SCRATCH_BYTES as usize).enumerate() {
            let at = offset + i as u64 * SCRATCH_BYTES;
            let from = self
                .mover
                .canonical(&self.stream, weight, at, part.len() as u64, &scratch)?;
            // SAFETY: that many bytes are there, and the borrow outlives the synchronisation that follows.
            unsafe { self.stream.copy_dtoh(part, from)? };
            self.stream.synchronize()?;
        }
        Ok(())
    }

    fn workspace_bytes(&self, dims: &WorkspaceDims) -> Result<WorkspaceBytes> {
        Engine::workspace_bytes(dims)
    }

    fn init_workspace(&mut self, dims: &WorkspaceDims) -> Result<WorkspaceBytes> {
        self.lifecycle.expect("init_workspace", State::Indexed)?;
        self.device.context.bind()?;
        let bytes = Engine::workspace_bytes(dims)?;
        self.admit("keys, values and workspace", bytes.kv + bytes.workspace)?;
        self.engine = Some(Engine::new(&self.device.context, dims, self.settings)?);
        self.workspace_bytes = bytes;
        self.lifecycle.enter(State::Ready);
        Ok(bytes)
    }

    fn as_decode(&mut self) -> Option<&mut dyn DecodeBackend> {
        Some(self)
    }

    fn unload(&mut self) -> Result<()> {
        self.device.context.bind()?;
        // What is still in flight must not write to memory that is given back; a lost device has nothing in flight.
        let waited = if self.lifecycle.state() == State::Empty {
            Ok(())
        } else {
            self.settle()
        };
        self.clear();
        waited
    }
}

impl Drop for CudaBackend {
    fn drop(&mut self) {
        // Streams go with a current context, on whatever thread this is.
        let _ = self.device.context.bind();
        self.clearing = None;
        self.engine = None;
        self.forget_weights();
    }
}

fn no_workspace() -> Error {
    Error::internal(crate::NAME, "a ready backend without a workspace")
}

impl DecodeBackend for CudaBackend {
    fn prepare(&mut self, program: &DecodeProgram) -> Result<()> {
        self.lifecycle.expect_ready("prepare")?;
        let (Some(residency), Some(index), Some(engine)) = (&self.residency, &self.index, &mut self.engine)
        else {
            return Err(no_workspace());
        };
        let prepared = engine.prepare(&self.device.modules, program, index, |id| {
            let weight = residency.weight(id)?;
            Ok(DeviceWeight {
                name: residency.names.at(id.index()),
                class: weight.class,
                encoding: weight.encoding,
                shape: weight.shape,
                layout: weight.layout,
                ptr: weight.ptr,
                exponents: weight.exponents,
            })
        });
        self.noted(prepared)?;
        self.lifecycle.enter(State::Prepared);
        Ok(())
    }

    fn forward(&mut self, batch: &TokenBatch<'_>, out: &mut Outputs<'_>) -> Result<()> {
        self.lifecycle.expect("forward", State::Prepared)?;
        let ran = self.engine.as_mut().ok_or_else(no_workspace)?.forward(batch, out);
        self.noted(ran)
    }

    fn profile(
        &mut self,
        batch: &TokenBatch<'_>,
        out: &mut Outputs<'_>,
        phases: &mut Vec<PhaseTime>,
    ) -> Result<()> {
        self.lifecycle.expect("profile", State::Prepared)?;
        let (Some(residency), Some(engine)) = (&self.residency, &mut self.engine) else {
            return Err(no_workspace());
        };
        let facts = |weight: usize| {
            let weight = u32::try_from(weight)
                .ok()
                .and_then(|id| residency.weight(WeightId(id)).ok());
            weight.map_or((0, Shape::matrix(0, 0)), |w| (w.nbytes, w.shape))
        };
        let ran = engine.profile(batch, out, facts, phases);
        self.noted(ran)
    }

    fn read_rate(&mut self) -> Result<Option<f64>> {
        measure::read_rate(&self.device.context, &self.device.modules).map(|rate| Some(rate.gb_s() * 1e9))
    }

    fn truncate(&mut self, sequence: SequenceId, length: u32) -> Result<()> {
        self.lifecycle.expect("truncate", State::Prepared)?;
        self.engine
            .as_mut()
            .ok_or_else(no_workspace)?
            .truncate(sequence, length)
    }

    fn sequence_length(&self, sequence: SequenceId) -> Result<u32> {
        match &self.engine {
            Some(engine) => engine.sequence_length(sequence),
            None => sequence.length_in(&[]),
        }
    }
}

impl CudaBackend {
    /// Makes the driver refuse to lock more host memory than that in later loads, as one that is short of it does: a test
    /// switch.
    pub fn limit_pinned_memory(&mut self, bytes: usize) {
        self.pin_limit = Some(bytes);
    }

    /// Decodes operation by operation, from the next workspace on, as the variable `HOIST_CUDA_ONE_LAUNCH=0` makes every
    /// backend do. The bits are the same.
    pub fn decode_by_operations(&mut self) {
        self.settings.one_launch = OneLaunch::Off;
    }

    /// Decodes a token of a program of the llama kind in one launch, from the next workspace on, as it does by default. Its
    /// ring has at most `most_slots` slots, or as many as fit. The bits are the same.
    pub fn decode_in_one_launch(&mut self, most_slots: Option<u32>) {
        self.settings.one_launch = OneLaunch::On {
            most_slots: most_slots.unwrap_or(u32::MAX),
        };
    }

    /// Lets attention run for at most that many tokens of a batch at once, from the next workspace on, as where scratch is
    /// short. The bits are the same. For tests.
    pub fn attend_at_most(&mut self, tokens: std::num::NonZeroU32) {
        self.settings.most_attended = tokens.get();
    }

    /// Whether the prepared program decodes a token in one launch. For tests.
    #[must_use]
    pub fn decodes_in_one_launch(&self) -> bool {
        self.engine.as_ref().is_some_and(Engine::in_one_launch)
    }

    /// Row exponents of a quantised weight, `[matrices · rows]`: `E_w` of `docs/numerics.md` §1.2. For tests.
    ///
    /// # Errors
    /// [`Error::BadState`] unless resident; [`Error::UnknownWeight`].
    pub fn row_exponents(&self, weight: WeightId) -> Result<Vec<i16>> {
        let weight = self.resident("row_exponents")?.weight(weight)?;
        if weight.exponents == 0 {
            return Ok(Vec::new());
        }
        self.device.context.bind()?;
        debug_assert_eq!(size_of::<i16>() as u64, EXPONENT_BYTES);
        let mut exponents = vec![0i16; weight.rows() as usize];
        // SAFETY: that many lie behind the weight; the vector outlives the synchronisation that follows.
        unsafe {
            self.stream
                .copy_dtoh(bytemuck::cast_slice_mut(&mut exponents), weight.exponents)?;
        }
        self.stream.synchronize()?;
        Ok(exponents)
    }
}
