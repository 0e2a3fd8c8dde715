//! The CPU backend behind what can be wrong in a backend itself: where bytes go, what is computed with, what is kept.

use std::thread::ThreadId;

use hoist_cpu::CpuProvider;
use hoist_plugin_sdk::hoist_backend::{
    BackendInfo, Chunk, DecodeBackend, DecodeProgram, DeviceInfo, Encoding, EncodingSet, Error, IndexLayout,
    IndexReceipt, LoadPlan, LoadReceipt, LoadWatch, MemoryInfo, OpKind, OpSet, OpenOptions, Outputs,
    Provider, Result, Role, SequenceId, TokenBatch, UnsupportedWhat, Want, WeightBackend, WeightClass,
    WeightId, WeightPlan, WeightSource, WorkspaceBytes, WorkspaceDims, push_all,
};

use crate::is;

/// Faults that change bytes on their way, or what is computed with: for them the bytes are collected, and loaded once
/// more when all are there.
const COLLECTING: &[&str] = &[
    "ignores-offset",
    "truncates-offset",
    "drops-chunk",
    "drops-last",
    "swaps-chunks",
    "wrong-tensor",
    "accepts-overlap",
    "accepts-short",
    "commits-incomplete",
    "keeps-pointer",
    "gamma-quantised",
    "transposes-wrongly",
    "wrong-last-block",
    "wrong-lane",
    "wrong-row",
];

/// Of these, those that read back what arrived.
const READS_BACK_RIGHTLY: &[&str] = &["wrong-last-block", "wrong-lane", "wrong-row"];

const GPU: &str = "NVIDIA H100 80GB HBM3";

/// The CPU's provider.
pub(crate) struct FaultyProvider;

impl Provider for FaultyProvider {
    fn name(&self) -> &str {
        "faulty"
    }

    fn devices(&self) -> Result<Vec<DeviceInfo>> {
        let mut devices = CpuProvider.devices()?;
        for device in devices.iter_mut().filter(|_| is("host-fallback")) {
            device.id = "cuda:0".into();
            device.name = GPU.into();
            device.total_memory = 80 << 30;
        }
        Ok(devices)
    }

    fn open(&self, ordinal: u32, options: &OpenOptions) -> Result<Box<dyn WeightBackend>> {
        let inner = CpuProvider.open(ordinal, options)?;
        let mut info = inner.info().clone();
        if is("no") {
            info.stored = EncodingSet::EMPTY;
            info.computed = EncodingSet::EMPTY;
            info.ops = OpSet::EMPTY;
        }
        Ok(Box::new(FaultyBackend {
            inner,
            info,
            opened_by: std::thread::current().id(),
            threads: options.threads,
            collects: COLLECTING.iter().any(|id| is(id)),
            plan: None,
            images: Vec::new(),
            held: None,
            last_chunk: Vec::new(),
            kept: Vec::new(),
            leaked: 0,
            grown: Vec::new(),
            max_batch_tokens: 0,
            program: None,
            lengths: Vec::new(),
            fed: Vec::new(),
            steps: 0,
            last_logit: None,
        }))
    }
}

struct FaultyBackend {
    inner: Box<dyn WeightBackend>,
    info: BackendInfo,
    opened_by: ThreadId,
    threads: Option<u32>,
    collects: bool,
    plan: Option<LoadPlan>,
    /// Canonical bytes of each weight, as they are taken to be.
    images: Vec<Vec<u8>>,
    /// The chunk that waits for its partner of `swaps-chunks`.
    held: Option<(WeightId, usize, Vec<u8>)>,
    /// The last chunk of each weight, for `drops-chunk`: offset, and how many there were.
    last_chunk: Vec<(usize, u32)>,
    /// Chunks of `keeps-pointer`.
    kept: Vec<(WeightId, usize, *const u8, usize)>,
    /// Bytes that `leaks-device` has kept.
    leaked: u64,
    /// Buffers of `allocates-in-forward`.
    grown: Vec<Vec<u8>>,
    max_batch_tokens: usize,
    program: Option<DecodeProgram>,
    /// Tokens that the caller believes each sequence to hold; and how many more it holds, for `stale-kv`.
    lengths: Vec<(u32, u32)>,
    /// The first token of each sequence, for `fixed-inputs`.
    fed: Vec<Option<u32>>,
    steps: u64,
    last_logit: Option<f32>,
}

// SAFETY: the pointers of `keeps-pointer` are the fault; nothing else here is bound to a thread.
unsafe impl Send for FaultyBackend {}

impl FaultyBackend {
    fn check_thread(&self) -> Result<()> {
        if is("thread-bound") && std::thread::current().id() != self.opened_by {
            return Err(Error::internal("faulty", "called from another thread"));
        }
        Ok(())
    }

    fn upload(
        &mut self,
        chunk: Chunk<'_>,
        through: fn(&mut dyn WeightBackend, Chunk<'_>) -> Result<()>,
    ) -> Result<()> {
        self.check_thread()?;
        let (data, len) = (chunk.bytes.as_ptr(), chunk.bytes.len());
        if is("reads-past") {
            // SAFETY: none: it is one past the chunk.
            let past = unsafe { data.add(len) };
            // SAFETY: as above.
            std::hint::black_box(unsafe { past.read_volatile() });
        }
        if is("writes-input") {
            let first = chunk.bytes[0];
            // SAFETY: none: the bytes are the caller's, and borrowed shared.
            unsafe { data.cast_mut().write_volatile(first) };
        }
        let mut done = through(self.inner.as_mut(), chunk);
        if is("non-finite-accepted") && matches!(done, Err(Error::NonFiniteWeight { .. })) {
            let zeros = vec![0; len];
            done = through(
                self.inner.as_mut(),
                Chunk {
                    bytes: &zeros,
                    ..chunk
                },
            );
        }
        if !self.collects {
            return done;
        }
        match &done {
            Ok(()) => {}
            Err(Error::InvalidChunk { reason, .. }) => {
                let overlap = reason.contains("arrived already") && is("accepts-overlap");
                let short = reason.contains("splits a block") && is("accepts-short");
                if !overlap && !short {
                    return done;
                }
            }
            Err(_) => return done,
        }
        self.collect(chunk);
        Ok(())
    }

    /// Puts a chunk where the fault says.
    fn collect(&mut self, chunk: Chunk<'_>) {
        let at = chunk.weight.index();
        let mut offset = chunk.offset as usize;
        let last = &mut self.last_chunk[at];
        *last = (last.0.max(offset), last.1 + 1);
        match crate::chosen() {
            "ignores-offset" => offset = 0,
            "truncates-offset" => offset &= u32::MAX as usize,
            "keeps-pointer" => {
                let kept = (chunk.weight, offset, chunk.bytes.as_ptr(), chunk.bytes.len());
                return self.kept.push(kept);
            }
            "swaps-chunks" => match self.held.take() {
                Some((weight, other, bytes))
                    if weight == chunk.weight && bytes.len() == chunk.bytes.len() =>
                {
                    self.put(weight.index(), offset, &bytes);
                    return self.put(at, other, chunk.bytes);
                }
                other => {
                    if let Some((weight, offset, bytes)) = other {
                        self.put(weight.index(), offset, &bytes);
                    }
                    self.held = Some((chunk.weight, offset, chunk.bytes.to_vec()));
                    return;
                }
            },
            "wrong-tensor" if at > 0 && self.images[at - 1].len() == self.images[at].len() => {
                return self.put(at - 1, offset, chunk.bytes);
            }
            "drops-last" => return self.put(at, offset, &chunk.bytes[..chunk.bytes.len() - 1]),
            _ => {}
        }
        self.put(at, offset, chunk.bytes);
    }

    fn put(&mut self, weight: usize, offset: usize, bytes: &[u8]) {
        let image = &mut self.images[weight];
        let end = image.len().min(offset.saturating_add(bytes.len()));
        if offset < end {
            image[offset..end].copy_from_slice(&bytes[..end - offset]);
        }
    }

    /// What is computed with instead of the image, for faults that read back rightly and for those that do not.
    fn image_on_device(&self, weight: &WeightPlan) -> Vec<u8> {
        let mut image = self.images[weight.id.index()].clone();
        let matrix = weight.shape.rows > 1
            && weight.shape.cols > 1
            && !matches!(weight.role, Role::TokenEmbd | Role::PositionEmbd);
        let row = weight.encoding.row_bytes(weight.shape.cols).unwrap() as usize;
        let block = weight.encoding.block_bytes() as usize;
        let first = weight.encoding.matrix_prefix_bytes() as usize;
        let one = first + row * weight.shape.rows as usize;
        match crate::chosen() {
            "drops-chunk" => {
                let (offset, chunks) = self.last_chunk[weight.id.index()];
                if chunks > 1 {
                    image[offset..].fill(0);
                }
            }
            "gamma-quantised" if weight.class == WeightClass::Gamma => {
                for value in image.chunks_exact_mut(4) {
                    value[..2].fill(0);
                }
            }
            "transposes-wrongly" if matrix && weight.class == WeightClass::Float => {
                let (rows, cols) = (weight.shape.rows as usize, weight.shape.cols as usize);
                let right = image.clone();
                for i in 0..right.len() / block {
                    let (r, c) = (i % (rows * cols) / cols, i % cols);
                    let to = i / (rows * cols) * rows * cols + c * rows + r;
                    image[to * block..(to + 1) * block].copy_from_slice(&right[i * block..(i + 1) * block]);
                }
            }
            "wrong-last-block" if matrix && !weight.shape.cols.is_multiple_of(256) => {
                for matrix in image.chunks_mut(one) {
                    for row in matrix[first..].chunks_mut(row) {
                        let last = row.len() - block;
                        row[last..].fill(0);
                    }
                }
            }
            // Encodings whose elements are bytes of their own.
            "wrong-lane" if matrix && weight.encoding.is_float() => {
                for row in image.chunks_mut(row) {
                    for element in row.chunks_mut(block).skip(7).step_by(64) {
                        element.fill(0);
                    }
                }
            }
            "wrong-lane" if matrix && weight.encoding == Encoding::Q8_0 => {
                for block in image.chunks_mut(block) {
                    block[2 + 7] = 0;
                }
            }
            "wrong-row" if matrix && weight.shape.rows % 2 == 1 => {
                for matrix in image.chunks_mut(one) {
                    let last = matrix.len() - row;
                    matrix.copy_within(last - row..last, last);
                }
            }
            _ => {}
        }
        image
    }

    /// Loads what was collected in place of what arrived.
    fn load_images(&mut self) -> Result<LoadReceipt> {
        if let Some((weight, offset, bytes)) = self.held.take() {
            self.put(weight.index(), offset, &bytes);
        }
        for (weight, offset, data, len) in std::mem::take(&mut self.kept) {
            // SAFETY: none: the bytes were the caller's, for that call only.
            let bytes = unsafe { std::slice::from_raw_parts(data, len) };
            self.put(weight.index(), offset, bytes);
        }
        let plan = self
            .plan
            .clone()
            .ok_or_else(|| Error::internal("faulty", "no plan"))?;
        self.inner.unload()?;
        self.inner.begin_load(&plan)?;
        for weight in &plan.weights {
            let image = self.image_on_device(weight);
            let zeros;
            let mut bytes = &image;
            if self.upload_whole(weight, bytes).is_err() {
                zeros = vec![0; image.len()];
                bytes = &zeros;
                self.upload_whole(weight, bytes)?;
            }
        }
        self.inner.finish_load()
    }

    fn upload_whole(&mut self, weight: &WeightPlan, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let chunk = Chunk {
            weight: weight.id,
            offset: 0,
            bytes,
        };
        match weight.class {
            WeightClass::Quantized => self.inner.upload_quantized(chunk),
            WeightClass::Float | WeightClass::Bias => self.inner.upload_f32(chunk),
            WeightClass::Gamma => self.inner.upload_gamma(chunk),
        }
    }

    fn reads_images(&self) -> bool {
        READS_BACK_RIGHTLY.iter().any(|id| is(id))
    }

    fn forget(&mut self) {
        self.plan = None;
        self.images = Vec::new();
        self.held = None;
        self.kept = Vec::new();
        self.grown = Vec::new();
        self.program = None;
    }
}

fn unsupported(what: UnsupportedWhat) -> Error {
    Error::Unsupported {
        backend: "faulty".into(),
        what,
    }
}

fn encoding_for(encoding: Encoding, usage: &'static str) -> Error {
    unsupported(UnsupportedWhat::Encoding { encoding, usage })
}

impl WeightBackend for FaultyBackend {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn memory(&self) -> Result<MemoryInfo> {
        let mut memory = self.inner.memory()?;
        for device in &mut memory.devices {
            device.resident.float += self.leaked;
            device.resident.workspace += self.grown.iter().map(|b| b.len() as u64).sum::<u64>();
            if is("host-fallback") {
                device.total = 80 << 30;
                device.free = 80 << 30;
            }
        }
        Ok(memory)
    }

    fn begin_load(&mut self, plan: &LoadPlan) -> Result<()> {
        if is("no") {
            return Err(unsupported(UnsupportedWhat::Call("begin_load")));
        }
        if is("claims-encoding") && plan.weights.iter().any(|w| w.encoding == Encoding::Q5_1) {
            return Err(encoding_for(Encoding::Q5_1, "storage"));
        }
        self.inner.begin_load(plan)?;
        if self.collects {
            self.images = plan.weights.iter().map(|w| vec![0; w.nbytes as usize]).collect();
            self.last_chunk = vec![(0, 0); plan.weights.len()];
        }
        self.plan = Some(plan.clone());
        Ok(())
    }

    fn upload_quantized(&mut self, chunk: Chunk<'_>) -> Result<()> {
        self.upload(chunk, |inner, chunk| inner.upload_quantized(chunk))
    }

    fn upload_f32(&mut self, chunk: Chunk<'_>) -> Result<()> {
        self.upload(chunk, |inner, chunk| inner.upload_f32(chunk))
    }

    fn upload_gamma(&mut self, chunk: Chunk<'_>) -> Result<()> {
        self.upload(chunk, |inner, chunk| inner.upload_gamma(chunk))
    }

    fn load_from(&mut self, plan: &LoadPlan, source: &dyn WeightSource, watch: &dyn LoadWatch) -> Result<()> {
        self.check_thread()?;
        if self.collects {
            return push_all(self, plan, source, watch);
        }
        self.inner.load_from(plan, source, watch)
    }

    fn finish_load(&mut self) -> Result<LoadReceipt> {
        let receipt = match self.inner.finish_load() {
            Err(Error::Incomplete { .. }) if is("commits-incomplete") => LoadReceipt::default(),
            other => other?,
        };
        if self.collects {
            return self.load_images();
        }
        Ok(receipt)
    }

    fn abort_load(&mut self) -> Result<()> {
        self.forget();
        self.inner.abort_load()
    }

    fn build_index(&mut self, layout: &IndexLayout) -> Result<IndexReceipt> {
        let mut layout = layout.clone();
        match crate::chosen() {
            "index-layer" => {
                let right = layout.clone();
                for entry in &mut layout.entries {
                    let Some(layer) = entry.layer else { continue };
                    let from = Some((layer + 1) % right.layers);
                    let other = right
                        .entries
                        .iter()
                        .find(|e| (e.layer, e.role) == (from, entry.role));
                    entry.slot = other.map_or(entry.slot, |e| e.slot);
                }
            }
            "gate-up-swapped" => {
                for entry in &mut layout.entries {
                    entry.role = match entry.role {
                        Role::FfnGate => Role::FfnUp,
                        Role::FfnUp => Role::FfnGate,
                        Role::FfnGateExps => Role::FfnUpExps,
                        Role::FfnUpExps => Role::FfnGateExps,
                        other => other,
                    };
                }
            }
            _ => {}
        }
        self.inner.build_index(&layout)
    }

    fn digest(&mut self, weight: WeightId) -> Result<Option<[u8; 32]>> {
        if self.reads_images() {
            return Ok(None);
        }
        self.inner.digest(weight)
    }

    fn read_back(&mut self, weight: WeightId, offset: u64, out: &mut [u8]) -> Result<()> {
        self.check_thread()?;
        self.inner.read_back(weight, offset, out)?;
        if self.reads_images() {
            let offset = offset as usize;
            out.copy_from_slice(&self.images[weight.index()][offset..offset + out.len()]);
        }
        Ok(())
    }

    fn workspace_bytes(&self, dims: &WorkspaceDims) -> Result<WorkspaceBytes> {
        self.inner.workspace_bytes(dims)
    }

    fn init_workspace(&mut self, dims: &WorkspaceDims) -> Result<WorkspaceBytes> {
        self.max_batch_tokens = dims.capacity.max_batch_tokens as usize;
        self.lengths = vec![(0, 0); dims.capacity.max_sequences as usize];
        self.fed = vec![None; dims.capacity.max_sequences as usize];
        self.inner.init_workspace(dims)
    }

    fn as_decode(&mut self) -> Option<&mut dyn DecodeBackend> {
        (!is("no")).then_some(self as &mut dyn DecodeBackend)
    }

    fn unload(&mut self) -> Result<()> {
        if is("leaks-device") {
            let bytes = self.plan.as_ref().map_or(0, |p| p.nbytes);
            std::hint::black_box(Box::leak(vec![1u8; bytes as usize].into_boxed_slice()));
            self.leaked += bytes;
        }
        self.forget();
        self.inner.unload()
    }
}

impl DecodeBackend for FaultyBackend {
    fn prepare(&mut self, program: &DecodeProgram) -> Result<()> {
        let mut program = program.clone();
        if is("claims-operation")
            && program
                .ops
                .iter()
                .any(|o| matches!(o.kind, OpKind::SoftCap { .. }))
        {
            return Err(unsupported(UnsupportedWhat::Other("soft caps".into())));
        }
        let weights = self.plan.iter().flat_map(|p| &p.weights);
        if is("computes-less") && weights.clone().any(|w| w.encoding == Encoding::Q4_K) {
            return Err(encoding_for(Encoding::Q4_K, "matrix multiplication"));
        }
        if is("bias-omitted") {
            for op in &mut program.ops {
                if let OpKind::MatMul { bias, .. } | OpKind::Logits { bias, .. } = &mut op.kind {
                    *bias = None;
                }
            }
        }
        self.lengths.fill((0, 0));
        self.fed.fill(None);
        self.steps = 0;
        let decode = self.inner.as_decode();
        decode
            .ok_or_else(|| Error::internal("faulty", "no decoder"))?
            .prepare(&program)?;
        self.program = Some(program);
        Ok(())
    }

    fn forward(&mut self, batch: &TokenBatch<'_>, out: &mut Outputs<'_>) -> Result<()> {
        self.check_thread()?;
        if is("allocates-in-forward") {
            self.grown.push(vec![1; 64 << 10]);
        }
        let decode = self
            .inner
            .as_decode()
            .ok_or_else(|| Error::internal("faulty", "no decoder"))?;
        match decode.forward(batch, out) {
            Err(Error::NonFinite { .. }) if is("non-finite-ok") => {
                out.logits.fill(0.0);
                out.argmax.fill(0);
            }
            other => other?,
        }
        self.steps += 1;
        for run in batch.runs {
            let at = run.sequence.0 as usize;
            self.lengths[at].0 += run.tokens.len() as u32;
            self.fed[at].get_or_insert(run.tokens[0]);
        }
        self.distort(batch, out);
        Ok(())
    }

    fn truncate(&mut self, sequence: SequenceId, length: u32) -> Result<()> {
        let decode = self
            .inner
            .as_decode()
            .ok_or_else(|| Error::internal("faulty", "no decoder"))?;
        let at = sequence.0 as usize;
        if is("stale-kv") && length == 0 && self.lengths.get(at).is_some_and(|l| l.0 > 0) {
            decode.truncate(sequence, 1)?;
            self.lengths[at] = (0, 1);
            return Ok(());
        }
        decode.truncate(sequence, length)?;
        if is("sequences-mixed") {
            for other in 0..self.lengths.len() as u32 {
                let holds = decode.sequence_length(SequenceId(other))?;
                decode.truncate(SequenceId(other), holds.min(length))?;
            }
        }
        self.lengths[at].0 = length;
        if length == 0 {
            self.fed[at] = None;
        }
        Ok(())
    }

    fn sequence_length(&self, sequence: SequenceId) -> Result<u32> {
        match self.lengths.get(sequence.0 as usize) {
            Some((length, _)) => Ok(*length),
            None => Err(Error::invalid("sequence", self.lengths.len(), sequence.0)),
        }
    }
}

impl FaultyBackend {
    /// Changes outputs that are right.
    fn distort(&mut self, batch: &TokenBatch<'_>, out: &mut Outputs<'_>) {
        let vocab = self.program.as_ref().map_or(1, |p| p.vocab as usize);
        let several = self.threads.is_none_or(|t| t > 1);
        let (steps, max_batch_tokens) = (self.steps, self.max_batch_tokens);
        let tokens = batch.tokens();
        if is("argmax-wrong") {
            for id in out.argmax.iter_mut() {
                *id = (*id + 1) % vocab as u32;
            }
        }
        for ((place, sequence), row) in wanting_logits(batch).zip(out.logits.chunks_mut(vocab)) {
            let wrong = match crate::chosen() {
                "claims-exact" => {
                    for logit in row.iter_mut() {
                        *logit = f32::from_bits(logit.to_bits() ^ 1);
                    }
                    false
                }
                "workspace-short" => tokens > 1 && tokens == max_batch_tokens && place + 1 == tokens,
                "wrong-batch" => place > 0,
                "wrong-later" => steps > 1,
                "wrong-threads" => several,
                "fixed-inputs" => self.fed[sequence.0 as usize] != Some(1),
                _ => false,
            };
            if wrong {
                row[vocab / 2] = row[vocab / 2] * 0.5 + 1.0;
            }
        }
        if let Some(first) = out.logits.first_mut() {
            let before = self.last_logit.replace(*first);
            if is("stale-workspace") && steps > 1 {
                *first = before.unwrap_or(*first);
            }
        }
    }
}

/// Each token of a batch that wants logits: its place in the batch, and its sequence.
fn wanting_logits<'b>(batch: &TokenBatch<'b>) -> impl Iterator<Item = (usize, SequenceId)> + use<'b> {
    let tokens = batch
        .runs
        .iter()
        .flat_map(|run| run.want.iter().map(|want| (*want, run.sequence)));
    tokens
        .enumerate()
        .filter(|(_, (want, _))| *want == Want::Logits)
        .map(|(place, (_, sequence))| (place, sequence))
}
