//! Models, plans and a backend made for tests: the backend holds bytes in vectors and misbehaves on request.

use std::collections::BTreeMap;

use hoist_backend::{
    BackendInfo, Chunk, DeviceMemory, Encoding, EncodingSet, Error, FloatLayout, IndexEntry, IndexLayout,
    IndexReceipt, Lifecycle, Limits, LoadPlan, LoadReceipt, MemoryByClass, MemoryInfo, NumericsClass, OpSet,
    Result, Role, Shape, Sizing, Slot, SourceFile, SourceView, State, UploadLedger, ValueChange,
    WeightBackend, WeightClass, WeightId, WeightPlan, WorkspaceBytes, WorkspaceDims,
};
use hoist_formats::{Format, Manifest, Metadata, Shard};
use hoist_model::ResolvedWeight;

pub(crate) fn info() -> BackendInfo {
    BackendInfo {
        name: "fake".into(),
        device: "fake".into(),
        device_name: "vectors".into(),
        numerics: NumericsClass::Exact,
        stored: EncodingSet::weights(),
        computed: EncodingSet::EMPTY,
        ops: OpSet::EMPTY,
        float_layout: FloatLayout::OutIn,
        limits: Limits::default(),
        sizing: Sizing {
            weight_alignment: 1,
            quantized_row_bytes: 0,
            quantized_segment_bytes: 0,
            index_entry_bytes: 8,
        },
        memory: memory(&MemoryByClass::default()),
    }
}

fn memory(resident: &MemoryByClass) -> MemoryInfo {
    MemoryInfo {
        devices: vec![DeviceMemory {
            device: "fake".into(),
            total: 1 << 40,
            free: 1 << 40,
            budget: None,
            resident: *resident,
            mapped: 0,
        }],
    }
}

/// One entry for each weight, in roles and layers that do not repeat.
pub(crate) fn index(layers: u32, weights: &[ResolvedWeight]) -> IndexLayout {
    entries(layers, weights.len())
}

pub(crate) fn index_of(plan: &LoadPlan) -> IndexLayout {
    entries(plan.layers, plan.weights.len())
}

fn entries(layers: u32, weights: usize) -> IndexLayout {
    assert!(weights <= Role::COUNT);
    IndexLayout {
        layers,
        entries: Role::all()
            .zip(0u32..)
            .take(weights)
            .map(|(role, id)| IndexEntry {
                layer: Some(0),
                role,
                slot: Slot::Present(WeightId(id)),
            })
            .collect(),
    }
}

/// A plan of byte-sized weights (`apr_q8` without use of its prefix) that lie one after the other in one file.
pub(crate) fn plan(weights: &[(&str, WeightClass, u64)]) -> LoadPlan {
    let mut offset = 0;
    let weights: Vec<_> = weights
        .iter()
        .zip(0..)
        .map(|(&(name, class, nbytes), id)| {
            let view = SourceView::contiguous(0, offset, nbytes);
            offset += nbytes;
            WeightPlan {
                id: WeightId(id),
                name: name.into(),
                layer: Some(0),
                role: Role::AttnQ,
                class,
                encoding: Encoding::APR_Q8,
                shape: Shape::vector(nbytes),
                nbytes,
                views: vec![view],
                change: ValueChange::Keep,
                layout: FloatLayout::OutIn,
                resident_bytes: nbytes,
            }
        })
        .collect();
    let mut resident = MemoryByClass::default();
    for w in &weights {
        *resident.class_mut(w.class) += w.nbytes;
    }
    LoadPlan {
        architecture: "llama".into(),
        layers: 1,
        nbytes: offset,
        source_bytes: offset,
        weights,
        resident,
    }
}

pub(crate) fn manifest_in_memory(bytes: Vec<u8>) -> Manifest {
    Manifest {
        path: "memory".into(),
        format: Format::Gguf { version: 3 },
        metadata: Metadata::Gguf(BTreeMap::new()),
        tensors: vec![],
        shards: vec![Shard {
            source: SourceFile {
                path: "memory".into(),
                len: bytes.len() as u64,
                file: None,
                identity: None,
            },
            memory: Some(bytes.into()),
        }],
        folder: None,
    }
}

/// What a [`Backend`] does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Flips a bit of this weight when it arrives.
    Corrupt(WeightId),
    /// Refuses this upload.
    Upload(WeightId),
    /// Forgets this upload.
    Swallow(WeightId),
    Index,
    IndexReceipt,
    WeightReceipt,
    Workspace,
    ReadBack,
    /// Cannot give back what it holds.
    Unload,
}

pub(crate) struct Backend {
    info: BackendInfo,
    lifecycle: Lifecycle,
    plan: Option<(LoadPlan, UploadLedger)>,
    weights: Vec<Vec<u8>>,
    pub(crate) faults: Vec<Fault>,
    /// Hash on the device instead of leaving it to the caller.
    pub(crate) digests: bool,
}

impl Backend {
    pub(crate) fn new() -> Self {
        Self {
            info: info(),
            lifecycle: Lifecycle::default(),
            plan: None,
            weights: vec![],
            faults: vec![],
            digests: false,
        }
    }

    pub(crate) fn with(fault: Fault) -> Self {
        let mut backend = Self::new();
        backend.faults.push(fault);
        backend
    }

    pub(crate) fn state(&self) -> State {
        self.lifecycle.state()
    }

    pub(crate) fn resident(&self) -> usize {
        self.weights.iter().map(Vec::len).sum()
    }

    fn fails(&self, fault: Fault) -> Result<()> {
        if self.faults.contains(&fault) {
            return Err(Error::DeviceLost {
                device: "fake".into(),
                reason: format!("{fault:?}"),
            });
        }
        Ok(())
    }

    fn take(&mut self, chunk: Chunk<'_>) -> Result<()> {
        self.lifecycle.expect("upload", State::Loading)?;
        self.fails(Fault::Upload(chunk.weight))?;
        if self.faults.contains(&Fault::Swallow(chunk.weight)) {
            return Ok(());
        }
        let (plan, ledger) = self.plan.as_mut().expect("a load has begun");
        let class = plan.weight(chunk.weight)?.class;
        ledger.record(chunk.weight, chunk.offset, chunk.bytes.len() as u64, &[class])?;
        let place = &mut self.weights[chunk.weight.index()][chunk.offset as usize..][..chunk.bytes.len()];
        place.copy_from_slice(chunk.bytes);
        if self.faults.contains(&Fault::Corrupt(chunk.weight)) {
            place[chunk.bytes.len() / 2] ^= 0x10;
        }
        Ok(())
    }
}

impl WeightBackend for Backend {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn memory(&self) -> Result<MemoryInfo> {
        Ok(memory(&MemoryByClass {
            quantized: self.resident() as u64,
            ..MemoryByClass::default()
        }))
    }

    fn begin_load(&mut self, plan: &LoadPlan) -> Result<()> {
        self.lifecycle.expect("begin_load", State::Empty)?;
        self.weights = plan.weights.iter().map(|w| vec![0; w.nbytes as usize]).collect();
        self.plan = Some((plan.clone(), UploadLedger::new(plan)));
        self.lifecycle.enter(State::Loading);
        Ok(())
    }

    fn upload_quantized(&mut self, chunk: Chunk<'_>) -> Result<()> {
        self.take(chunk)
    }

    fn upload_f32(&mut self, chunk: Chunk<'_>) -> Result<()> {
        self.take(chunk)
    }

    fn upload_gamma(&mut self, chunk: Chunk<'_>) -> Result<()> {
        self.take(chunk)
    }

    fn finish_load(&mut self) -> Result<LoadReceipt> {
        self.lifecycle.expect("finish_load", State::Loading)?;
        let (plan, ledger) = self.plan.as_ref().expect("a load has begun");
        ledger.check_complete()?;
        let receipt = LoadReceipt {
            weights: plan.weights.len() as u32 - u32::from(self.faults.contains(&Fault::WeightReceipt)),
            resident: plan.resident,
            ..LoadReceipt::default()
        };
        self.lifecycle.enter(State::Loaded);
        Ok(receipt)
    }

    fn abort_load(&mut self) -> Result<()> {
        self.lifecycle.expect("abort_load", State::Loading)?;
        self.unload()
    }

    fn build_index(&mut self, layout: &IndexLayout) -> Result<IndexReceipt> {
        self.lifecycle.expect("build_index", State::Loaded)?;
        self.fails(Fault::Index)?;
        self.lifecycle.enter(State::Indexed);
        Ok(IndexReceipt {
            layers: layout.layers,
            entries: layout.present() as u32 + u32::from(self.faults.contains(&Fault::IndexReceipt)),
            bytes: 8,
        })
    }

    fn digest(&mut self, weight: WeightId) -> Result<Option<[u8; 32]>> {
        self.lifecycle.expect_resident("digest")?;
        Ok(self
            .digests
            .then(|| *blake3::hash(&self.weights[weight.index()]).as_bytes()))
    }

    fn read_back(&mut self, weight: WeightId, offset: u64, out: &mut [u8]) -> Result<()> {
        self.lifecycle.expect_resident("read_back")?;
        self.fails(Fault::ReadBack)?;
        out.copy_from_slice(&self.weights[weight.index()][offset as usize..][..out.len()]);
        Ok(())
    }

    fn init_workspace(&mut self, _: &WorkspaceDims) -> Result<WorkspaceBytes> {
        self.lifecycle.expect("init_workspace", State::Indexed)?;
        self.fails(Fault::Workspace)?;
        self.lifecycle.enter(State::Ready);
        Ok(WorkspaceBytes::default())
    }

    fn unload(&mut self) -> Result<()> {
        self.fails(Fault::Unload)?;
        self.weights.clear();
        self.plan = None;
        self.lifecycle.enter(State::Empty);
        Ok(())
    }
}
