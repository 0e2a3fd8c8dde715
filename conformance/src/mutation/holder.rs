//! A backend that holds bytes in vectors, and misbehaves on request.

use std::sync::Mutex;

use hoist_backend::{
    BackendInfo, Chunk, DeviceInfo, DeviceMemory, Encoding, EncodingSet, Error, FloatLayout, IndexLayout,
    IndexReceipt, Lifecycle, Limits, LoadPlan, LoadReceipt, LoadWatch, MemoryByClass, MemoryInfo,
    NumericsClass, OpSet, OpenOptions, Result, Sizing, State, UnsupportedWhat, UploadLedger, WeightBackend,
    WeightId, WeightSource, WorkspaceBytes, WorkspaceDims, push_all,
};

use crate::context::{PluginFacts, Target};

/// One misbehaviour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// Flips a bit of the last byte it gives back.
    FlipsABit,
    /// Puts every chunk at the start.
    IgnoresOffsets,
    /// Writes in front of what it gives back.
    WritesInFront,
    /// A digest of something else.
    WrongDigest,
    /// Says that nothing is resident.
    MemoryLies,
    /// Takes the same bytes twice.
    TakesOverlaps,
    /// Finishes a load with bytes missing.
    FinishesEarly,
    /// Refuses with an error of another kind.
    WrongError,
    /// Takes calls in any order.
    AnyOrder,
    /// Takes no notice of its budget.
    IgnoresBudget,
    /// Goes on when it is told to stop.
    IgnoresCancel,
    /// Counts one entry of its index too many.
    MiscountsIndex,
    /// Panics when it reads back.
    Panics,
    /// Claims less than it can.
    ClaimsLess,
    /// Claims an encoding that it refuses.
    ClaimsMore,
    /// Leaves a thread behind each time it is opened.
    LeavesAThread,
    /// Leaves a descriptor behind.
    LeavesADescriptor,
    /// Leaks 64 KiB with each load.
    Leaks,
    /// Answers as if a load succeeded, and holds nothing.
    SaysYes,
    /// Supports nothing.
    SaysNo,
}

pub(crate) struct HolderTarget(pub(crate) Fault);

/// The encoding that a fault is about.
pub(crate) const SPECIAL: Encoding = Encoding::Q5_1;

/// What was left behind, until the tests end.
static LEFT: Mutex<Vec<std::fs::File>> = Mutex::new(Vec::new());

const TOTAL: u64 = 64 << 30;

impl Target for HolderTarget {
    fn name(&self) -> &str {
        "holder"
    }

    fn devices(&self) -> Result<Vec<DeviceInfo>> {
        Ok(vec![DeviceInfo {
            ordinal: 0,
            id: "holder:0".into(),
            name: "vectors".into(),
            total_memory: TOTAL,
            details: Vec::new(),
        }])
    }

    fn open(&self, options: &OpenOptions) -> Result<Box<dyn WeightBackend>> {
        self.open_ordinal(0, options)
    }

    fn open_ordinal(&self, ordinal: u32, options: &OpenOptions) -> Result<Box<dyn WeightBackend>> {
        let unsupported = |what: &str| Error::Unsupported {
            backend: "holder".into(),
            what: UnsupportedWhat::Other(what.into()),
        };
        if ordinal != 0 {
            return Err(Error::invalid("device", 0, ordinal));
        }
        if options.import {
            return Err(unsupported("import"));
        }
        if options.float_layout == Some(FloatLayout::InOut) {
            return Err(unsupported("a layout"));
        }
        match self.0 {
            Fault::LeavesAThread => {
                std::thread::spawn(|| std::thread::sleep(std::time::Duration::from_secs(20)));
            }
            Fault::LeavesADescriptor => {
                LEFT.lock()
                    .unwrap()
                    .push(std::fs::File::open("/proc/self/stat").unwrap());
            }
            _ => {}
        }
        Ok(Box::new(Holder::new(self.0, options)))
    }

    fn plugin(&self) -> Option<&PluginFacts> {
        None
    }
}

struct Holder {
    fault: Fault,
    info: BackendInfo,
    budget: Option<u64>,
    lifecycle: Lifecycle,
    ledger: Option<UploadLedger>,
    weights: Vec<(Vec<u8>, u64)>,
    resident: MemoryByClass,
}

impl Holder {
    fn new(fault: Fault, options: &OpenOptions) -> Self {
        let stored: EncodingSet = match fault {
            Fault::SaysNo => EncodingSet::EMPTY,
            Fault::ClaimsLess => EncodingSet::weights().iter().filter(|e| *e != SPECIAL).collect(),
            _ => EncodingSet::weights(),
        };
        Self {
            fault,
            info: BackendInfo {
                name: "holder".into(),
                device: "holder:0".into(),
                device_name: "vectors".into(),
                numerics: NumericsClass::Exact,
                stored,
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
                memory: memory(MemoryByClass::default(), options.memory_budget),
            },
            budget: options.memory_budget,
            lifecycle: Lifecycle::default(),
            ledger: None,
            weights: Vec::new(),
            resident: MemoryByClass::default(),
        }
    }

    fn expect(&self, call: &'static str, state: State) -> Result<()> {
        if self.fault == Fault::AnyOrder && self.lifecycle.state() >= State::Loaded {
            return Ok(());
        }
        self.lifecycle.expect(call, state)
    }

    fn empty(&mut self) {
        self.ledger = None;
        self.weights.clear();
        self.resident = MemoryByClass::default();
        self.lifecycle.enter(State::Empty);
    }

    fn take(
        &mut self,
        chunk: Chunk<'_>,
        record: fn(&mut UploadLedger, WeightId, u64, u64) -> Result<()>,
    ) -> Result<()> {
        self.expect("upload", State::Loading)?;
        if self.fault == Fault::SaysYes {
            return Ok(());
        }
        if let Some(ledger) = &mut self.ledger {
            let recorded = record(ledger, chunk.weight, chunk.offset, chunk.bytes.len() as u64);
            match (self.fault, recorded) {
                (Fault::TakesOverlaps, Err(Error::InvalidChunk { reason, .. }))
                    if reason.contains("arrived already") => {}
                (Fault::WrongError, Err(error)) => return Err(Error::internal("holder", error)),
                (_, recorded) => recorded?,
            }
        }
        let place = &mut self.weights[chunk.weight.index()].0;
        let at = if self.fault == Fault::IgnoresOffsets {
            0
        } else {
            chunk.offset as usize
        };
        let len = chunk.bytes.len().min(place.len() - at);
        place[at..at + len].copy_from_slice(&chunk.bytes[..len]);
        Ok(())
    }
}

fn memory(resident: MemoryByClass, budget: Option<u64>) -> MemoryInfo {
    MemoryInfo {
        devices: vec![DeviceMemory {
            device: "holder:0".into(),
            total: TOTAL,
            free: budget.unwrap_or(TOTAL).saturating_sub(resident.total()),
            budget,
            resident,
            mapped: 0,
        }],
    }
}

impl WeightBackend for Holder {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn memory(&self) -> Result<MemoryInfo> {
        let resident = match self.fault {
            Fault::MemoryLies => MemoryByClass::default(),
            _ => self.resident,
        };
        Ok(memory(resident, self.budget))
    }

    fn begin_load(&mut self, plan: &LoadPlan) -> Result<()> {
        self.expect("begin_load", State::Empty)?;
        let refused = |e: Encoding| match self.fault {
            Fault::SaysNo => true,
            Fault::ClaimsMore => e == SPECIAL,
            _ => !(e.is_float() || e.is_quantized()),
        };
        if let Some(w) = plan.weights.iter().find(|w| refused(w.encoding)) {
            return Err(Error::Unsupported {
                backend: "holder".into(),
                what: UnsupportedWhat::Encoding {
                    encoding: w.encoding,
                    usage: "weights",
                },
            });
        }
        let (needed, available) = (plan.resident.weights(), self.budget.unwrap_or(TOTAL));
        if needed > available && self.fault != Fault::IgnoresBudget {
            return Err(Error::OutOfMemory {
                device: "holder:0".into(),
                what: "the weights".into(),
                needed,
                available,
            });
        }
        if self.fault == Fault::Leaks {
            std::mem::forget(std::hint::black_box(vec![1u8; 64 << 10]));
        }
        for w in &plan.weights {
            self.weights.push((vec![0; w.nbytes as usize], w.granule()));
            *self.resident.class_mut(w.class) += w.nbytes;
        }
        self.ledger = Some(UploadLedger::new(plan));
        self.lifecycle.enter(State::Loading);
        Ok(())
    }

    fn upload_quantized(&mut self, chunk: Chunk<'_>) -> Result<()> {
        self.take(chunk, UploadLedger::record_quantized)
    }

    fn upload_f32(&mut self, chunk: Chunk<'_>) -> Result<()> {
        self.take(chunk, UploadLedger::record_f32)
    }

    fn upload_gamma(&mut self, chunk: Chunk<'_>) -> Result<()> {
        self.take(chunk, UploadLedger::record_gamma)
    }

    fn load_from(&mut self, plan: &LoadPlan, source: &dyn WeightSource, watch: &dyn LoadWatch) -> Result<()> {
        self.expect("load_from", State::Loading)?;
        match self.fault {
            Fault::IgnoresCancel => push_all(self, plan, source, &hoist_backend::Unwatched),
            _ => push_all(self, plan, source, watch),
        }
    }

    fn finish_load(&mut self) -> Result<LoadReceipt> {
        self.expect("finish_load", State::Loading)?;
        if let Some(ledger) = &self.ledger
            && ![Fault::FinishesEarly, Fault::SaysYes].contains(&self.fault)
        {
            ledger.check_complete()?;
        }
        self.ledger = None;
        self.lifecycle.enter(State::Loaded);
        Ok(LoadReceipt {
            weights: self.weights.len() as u32,
            resident: self.resident,
            ..LoadReceipt::default()
        })
    }

    fn abort_load(&mut self) -> Result<()> {
        self.expect("abort_load", State::Loading)?;
        self.empty();
        Ok(())
    }

    fn build_index(&mut self, layout: &IndexLayout) -> Result<IndexReceipt> {
        self.expect("build_index", State::Loaded)?;
        self.lifecycle.enter(State::Indexed);
        Ok(IndexReceipt {
            layers: layout.layers,
            entries: layout.present() as u32 + u32::from(self.fault == Fault::MiscountsIndex),
            bytes: 0,
        })
    }

    fn digest(&mut self, weight: WeightId) -> Result<Option<[u8; 32]>> {
        self.lifecycle.expect_resident("digest")?;
        let weights = self.weights.len();
        let (bytes, _) = self
            .weights
            .get(weight.index())
            .ok_or(Error::UnknownWeight { weight, weights })?;
        let mut digest = *blake3::hash(bytes).as_bytes();
        digest[31] ^= u8::from(self.fault == Fault::WrongDigest);
        Ok(Some(digest))
    }

    #[expect(unsafe_code, reason = "the misbehaviour is to write in front of the buffer")]
    fn read_back(&mut self, weight: WeightId, offset: u64, out: &mut [u8]) -> Result<()> {
        assert!(self.fault != Fault::Panics, "this backend panics");
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
            return Err(Error::invalid("range to read back", "whole blocks", offset));
        };
        out.copy_from_slice(&bytes[offset as usize..end as usize]);
        if let (Fault::FlipsABit, Some(last)) = (self.fault, out.last_mut()) {
            *last ^= 0x10;
        }
        if self.fault == Fault::WritesInFront && !out.as_ptr().addr().is_multiple_of(4096) {
            // SAFETY: the suite's buffers have bytes in front of them, up to the start of the page.
            let before = unsafe { out.as_mut_ptr().sub(1) };
            // SAFETY: as above.
            unsafe { before.write(0) };
        }
        Ok(())
    }

    fn init_workspace(&mut self, _: &WorkspaceDims) -> Result<WorkspaceBytes> {
        Err(Error::Unsupported {
            backend: "holder".into(),
            what: UnsupportedWhat::Call("init_workspace"),
        })
    }

    fn unload(&mut self) -> Result<()> {
        self.empty();
        Ok(())
    }
}
