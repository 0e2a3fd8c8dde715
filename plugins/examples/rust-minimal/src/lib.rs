//! The least a Rust author writes: a backend that holds weights in host memory and gives them back.
//!
//! Start here, and replace `Vec<u8>` by memory of your device.
#![forbid(unsafe_op_in_unsafe_fn)]

use hoist_plugin_sdk::hoist_backend::{
    BackendInfo, Chunk, DeviceInfo, DeviceMemory, EncodingSet, Error, FloatLayout, IndexLayout, IndexReceipt,
    Lifecycle, Limits, LoadPlan, LoadReceipt, MemoryByClass, MemoryInfo, NumericsClass, OpSet, OpenOptions,
    Provider, Result, Sizing, State, UnsupportedWhat, UploadLedger, WeightBackend, WeightId, WorkspaceBytes,
    WorkspaceDims,
};

hoist_plugin_sdk::export_backend! {
    provider: HostMemory,
    name: "rust-minimal",
    vendor: "Hoist",
    decodes: false,
}

/// What this device claims to have, in bytes: a real device would be asked.
const TOTAL: u64 = 64 << 30;

struct HostMemory;

impl Provider for HostMemory {
    fn name(&self) -> &str {
        "rust-minimal"
    }

    fn devices(&self) -> Result<Vec<DeviceInfo>> {
        Ok(vec![DeviceInfo {
            ordinal: 0,
            id: "rust-minimal:0".into(),
            name: "host memory".into(),
            total_memory: TOTAL,
            details: Vec::new(),
        }])
    }

    fn open(&self, ordinal: u32, options: &OpenOptions) -> Result<Box<dyn WeightBackend>> {
        if ordinal != 0 {
            return Err(Error::invalid("device", 0, ordinal));
        }
        Ok(Box::new(Holder::new(options)))
    }
}

/// A loaded model: for each weight its bytes and its block.
struct Holder {
    info: BackendInfo,
    budget: Option<u64>,
    lifecycle: Lifecycle,
    ledger: Option<UploadLedger>,
    weights: Vec<(Vec<u8>, u64)>,
    resident: MemoryByClass,
}

impl Holder {
    fn new(options: &OpenOptions) -> Self {
        let info = BackendInfo {
            name: "rust-minimal".into(),
            device: "rust-minimal:0".into(),
            device_name: "host memory".into(),
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
                index_entry_bytes: 0,
            },
            memory: MemoryInfo { devices: Vec::new() },
        };
        Self {
            info,
            budget: options.memory_budget,
            lifecycle: Lifecycle::default(),
            ledger: None,
            weights: Vec::new(),
            resident: MemoryByClass::default(),
        }
    }

    fn upload(&mut self, chunk: Chunk<'_>) -> Result<()> {
        let (bytes, _) = &mut self.weights[chunk.weight.index()];
        // The ledger has checked that the chunk lies inside the weight.
        let start = chunk.offset as usize;
        bytes[start..start + chunk.bytes.len()].copy_from_slice(chunk.bytes);
        Ok(())
    }

    fn ledger(&mut self, call: &'static str) -> Result<&mut UploadLedger> {
        self.lifecycle.expect(call, State::Loading)?;
        self.ledger
            .as_mut()
            .ok_or_else(|| Error::internal("rust-minimal", "a load without a ledger"))
    }

    fn empty(&mut self) {
        self.ledger = None;
        self.weights = Vec::new();
        self.resident = MemoryByClass::default();
        self.lifecycle.enter(State::Empty);
    }
}

impl WeightBackend for Holder {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn memory(&self) -> Result<MemoryInfo> {
        let used = self.resident.total();
        Ok(MemoryInfo {
            devices: vec![DeviceMemory {
                device: self.info.device.clone(),
                total: TOTAL,
                free: self.budget.unwrap_or(TOTAL).saturating_sub(used),
                budget: self.budget,
                resident: self.resident,
                mapped: 0,
            }],
        })
    }

    fn begin_load(&mut self, plan: &LoadPlan) -> Result<()> {
        self.lifecycle.expect("begin_load", State::Empty)?;
        let available = self.budget.unwrap_or(TOTAL);
        let needed = plan.resident.weights();
        let no_room = || Error::OutOfMemory {
            device: "rust-minimal:0".into(),
            what: "the weights".into(),
            needed,
            available,
        };
        if needed > available {
            return Err(no_room());
        }
        for w in &plan.weights {
            let len = usize::try_from(w.nbytes).map_err(|_| no_room())?;
            let mut bytes = Vec::new();
            let allocated = bytes.try_reserve_exact(len);
            if allocated.is_err() {
                self.empty();
                return Err(no_room());
            }
            bytes.resize(len, 0);
            self.weights.push((bytes, w.granule()));
            *self.resident.class_mut(w.class) += w.nbytes;
        }
        self.ledger = Some(UploadLedger::new(plan));
        self.lifecycle.enter(State::Loading);
        Ok(())
    }

    fn upload_quantized(&mut self, chunk: Chunk<'_>) -> Result<()> {
        let ledger = self.ledger("upload_quantized")?;
        ledger.record_quantized(chunk.weight, chunk.offset, chunk.bytes.len() as u64)?;
        self.upload(chunk)
    }

    fn upload_f32(&mut self, chunk: Chunk<'_>) -> Result<()> {
        let ledger = self.ledger("upload_f32")?;
        ledger.record_f32(chunk.weight, chunk.offset, chunk.bytes.len() as u64)?;
        self.upload(chunk)
    }

    fn upload_gamma(&mut self, chunk: Chunk<'_>) -> Result<()> {
        let ledger = self.ledger("upload_gamma")?;
        ledger.record_gamma(chunk.weight, chunk.offset, chunk.bytes.len() as u64)?;
        self.upload(chunk)
    }

    fn finish_load(&mut self) -> Result<LoadReceipt> {
        self.ledger("finish_load")?.check_complete()?;
        self.ledger = None;
        self.lifecycle.enter(State::Loaded);
        let weights = self.weights.len() as u32;
        Ok(LoadReceipt {
            weights,
            resident: self.resident,
            mapped: 0,
            notes: Vec::new(),
        })
    }

    fn abort_load(&mut self) -> Result<()> {
        self.lifecycle.expect("abort_load", State::Loading)?;
        self.empty();
        Ok(())
    }

    fn build_index(&mut self, layout: &IndexLayout) -> Result<IndexReceipt> {
        self.lifecycle.expect("build_index", State::Loaded)?;
        if let Some(weight) = layout
            .entries
            .iter()
            .filter_map(|e| e.slot.weight())
            .find(|w| w.index() >= self.weights.len())
        {
            return Err(Error::UnknownWeight {
                weight,
                weights: self.weights.len(),
            });
        }
        self.lifecycle.enter(State::Indexed);
        Ok(IndexReceipt {
            layers: layout.layers,
            entries: layout.present() as u32,
            bytes: 0,
        })
    }

    fn read_back(&mut self, weight: WeightId, offset: u64, out: &mut [u8]) -> Result<()> {
        self.lifecycle.expect_resident("read_back")?;
        let weights = self.weights.len();
        let (bytes, granule) = self
            .weights
            .get(weight.index())
            .ok_or(Error::UnknownWeight { weight, weights })?;
        let len = out.len() as u64;
        let end = offset.checked_add(len).filter(|end| *end <= bytes.len() as u64);
        let whole = offset.is_multiple_of(*granule) && len.is_multiple_of(*granule);
        let Some(end) = end.filter(|_| whole) else {
            return Err(Error::invalid(
                "range to read back",
                format!("whole blocks of {granule} bytes within {}", bytes.len()),
                format!("{len} bytes at {offset}"),
            ));
        };
        out.copy_from_slice(&bytes[offset as usize..end as usize]);
        Ok(())
    }

    fn init_workspace(&mut self, _: &WorkspaceDims) -> Result<WorkspaceBytes> {
        Err(Error::Unsupported {
            backend: "rust-minimal".into(),
            what: UnsupportedWhat::Call("init_workspace"),
        })
    }

    fn unload(&mut self) -> Result<()> {
        self.empty();
        Ok(())
    }
}
