//! All memory that decoding takes on the device.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use hoist_backend::{Error, KvDtype, KvSpec, Result, TokenRow, ValueKind, WorkspaceBytes, WorkspaceDims};
use wgpu::{Buffer, BufferUsages};

use crate::device::Gpu;
use crate::residency::within;
use crate::shaders::{PART_LOGITS, RECORD_WORDS, SPLIT};

/// Tokens that run together at most; larger batches are cut, which moves no bit.
const TOKENS: u64 = 64;

/// Bytes of scratch above which fewer tokens run together.
const SCRATCH_BYTES: u64 = 64 << 20;

/// Bytes of logits that are read back at a time.
const LOGITS_BYTES: u64 = 4 << 20;

/// From more than so many on, values as wide as the vocabulary are taken to be logits, not queries.
const VOCABULARY: u32 = 16_384;

/// Experts that a router is sure to have scratch for.
const EXPERTS: u64 = 4096;

/// Where everything lies in the one buffer of values, in words.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// Tokens that run together.
    pub(crate) tokens: u64,
    pub(crate) values: Vec<u64>,
    pub(crate) scratch: u64,
    pub(crate) scratch_words: u64,
    pub(crate) arg_max: u64,
    pub(crate) words: u64,
    /// Rows of logits that are read back at a time.
    pub(crate) logits_rows: u64,
}

/// Words of a value for one token; `None` past 2^64.
pub(crate) fn value_words(kind: ValueKind, width: u32) -> Option<u64> {
    match kind {
        ValueKind::F32 | ValueKind::Experts => Some(width.into()),
        ValueKind::Quantized { vectors } => {
            let cols = width.checked_div(vectors)?;
            u64::from(cols.div_ceil(256))
                .checked_mul(vectors.into())?
                .checked_mul(RECORD_WORDS)
        }
    }
}

/// Words of scratch for a token's attention with so many heads.
pub(crate) fn attention_words(heads: u64, head_dim: u64, context: u64) -> Option<u64> {
    // A window may straddle one split more than its length fills.
    heads
        .checked_mul(context.div_ceil(SPLIT) + 1)?
        .checked_mul(head_dim.checked_add(2)?)
}

/// Words of a position's key, or value, in one head.
pub(crate) fn position_words(kv: KvSpec, dtype: KvDtype) -> u64 {
    match dtype {
        // A position starts with a whole word.
        KvDtype::F16 => u64::from(kv.head_dim).div_ceil(2),
        KvDtype::F32 => kv.head_dim.into(),
    }
}

/// Words of a layer's keys; its values take as many.
pub(crate) fn keys_words(dims: &WorkspaceDims, kv: KvSpec) -> Option<u64> {
    position_words(kv, dims.capacity.kv)
        .checked_mul(kv.kv_heads.into())?
        .checked_mul(dims.capacity.max_context.into())?
        .checked_mul(dims.capacity.max_sequences.into())
}

/// Bytes of a layer's keys and values.
fn cache_bytes(dims: &WorkspaceDims, kv: KvSpec) -> Option<u64> {
    keys_words(dims, kv)?.checked_mul(2 * 4)
}

/// Words of a batch's list of `tokens` rows, so that another may follow it.
fn batch_words(tokens: u64) -> u64 {
    (4 + 4 * tokens).next_multiple_of(64)
}

/// Words of a list of `tokens` rows on its way to the device.
pub(crate) fn list_words(tokens: usize) -> usize {
    4 + 4 * tokens
}

/// Bytes of the lists of a whole batch: two for each set of tokens that run together, at worst one token each.
fn lists_bytes(dims: &WorkspaceDims) -> u64 {
    4 * 2 * list_words(1) as u64 * u64::from(dims.capacity.max_batch_tokens)
}

impl Places {
    /// For as many tokens together as a binding and the scratch allow.
    fn new(dims: &WorkspaceDims, limit: u64) -> Option<Self> {
        let mut token = 0u64;
        for (kind, width) in &dims.values {
            token = token.checked_add(value_words(*kind, *width)?)?;
        }
        let floats = || dims.values.iter().filter(|(kind, _)| *kind == ValueKind::F32);
        let head_dim = dims.kv.iter().map(|kv| kv.head_dim).filter(|d| *d > 0);
        // Queries are no wider than the widest value, logits of a real vocabulary aside.
        let widest = floats()
            .map(|(_, w)| *w)
            .filter(|w| *w != dims.vocab || *w <= VOCABULARY)
            .max();
        let widest = widest.or_else(|| floats().map(|(_, w)| *w).max()).unwrap_or(0);
        let mut scratch = 0;
        if let (Some(narrow), Some(wide)) = (head_dim.clone().min(), head_dim.max()) {
            let heads = u64::from(widest / narrow);
            scratch = attention_words(heads, wide.into(), dims.capacity.max_context.into())?;
        }
        let routes = dims.values.iter().any(|(kind, _)| *kind == ValueKind::Experts);
        if routes {
            scratch = scratch.max(EXPERTS);
        }
        scratch = scratch.max(2 * u64::from(dims.vocab).div_ceil(PART_LOGITS));
        let batch = u64::from(dims.capacity.max_batch_tokens).min(TOKENS);
        let by_scratch = SCRATCH_BYTES / 4 / scratch.max(1);
        let by_limit = limit / 4 / (token.checked_add(scratch)?.checked_add(65)?);
        let tokens = batch.min(by_scratch.max(1)).min(by_limit.max(1));
        let mut at = 0u64;
        let mut values = Vec::with_capacity(dims.values.len());
        for (kind, width) in &dims.values {
            values.push(at);
            let words = value_words(*kind, *width)?.checked_mul(tokens)?;
            // Values start where a cache line does.
            at = at.checked_add(words)?.checked_next_multiple_of(32)?;
        }
        let scratch_words = scratch.checked_mul(tokens)?;
        let arg_max = at.checked_add(scratch_words)?;
        let rows = LOGITS_BYTES / (4 * u64::from(dims.vocab).max(1));
        Some(Self {
            tokens,
            values,
            scratch: at,
            scratch_words,
            arg_max,
            // Kernels read vectors of four.
            words: arg_max.checked_add(tokens)?.checked_next_multiple_of(4)?,
            logits_rows: rows.clamp(1, tokens),
        })
    }

    /// Bytes of the buffer that results are read back through.
    fn results_bytes(&self, vocab: u32) -> u64 {
        16 + 4 * self.tokens + 4 * u64::from(vocab) * self.logits_rows
    }
}

/// Buffers of a workspace.
#[derive(Debug)]
pub(crate) struct Workspace {
    pub(crate) dims: WorkspaceDims,
    pub(crate) places: Places,
    pub(crate) work: Buffer,
    /// Keys and values of each layer.
    pub(crate) caches: Vec<Buffer>,
    pub(crate) tables: Buffer,
    /// The rows that run, then those of the tail.
    pub(crate) batch: Buffer,
    /// Where the tail's rows start, in bytes.
    pub(crate) tail_at: u64,
    pub(crate) status: Buffer,
    /// What the status is before anything has run.
    pub(crate) clean: Buffer,
    pub(crate) results: Buffer,
    /// Bound where a kernel reads, or writes, nothing.
    pub(crate) nothing: [Buffer; 2],
    /// Lists of rows on their way to `batch`; mapped while `lists_mapped`.
    pub(crate) lists: Buffer,
    pub(crate) lists_mapped: Arc<AtomicBool>,
    /// Host side of `lists`.
    pub(crate) words: Vec<u32>,
    pub(crate) rows: Vec<TokenRow>,
    pub(crate) lengths: Vec<u32>,
}

fn too_large(dims: &WorkspaceDims) -> Error {
    Error::invalid(
        "workspace",
        "a size below 2^64 bytes",
        format!("{:?}", dims.capacity),
    )
}

/// Bytes of a workspace, none of whose buffers exceeds `limit`.
pub(crate) fn bytes(dims: &WorkspaceDims, limit: u64) -> Result<WorkspaceBytes> {
    let mut kv = Some(0u64);
    for spec in &dims.kv {
        let layer = cache_bytes(dims, *spec).ok_or_else(|| too_large(dims))?;
        within("bytes of a layer's keys and values", layer, limit)?;
        kv = kv.and_then(|sum| sum.checked_add(layer.max(16)));
    }
    within("bytes of tables", dims.table_bytes, limit)?;
    let places = Places::new(dims, limit).ok_or_else(|| too_large(dims))?;
    within("bytes of activations", places.words.saturating_mul(4), limit)?;
    let count = || -> Option<WorkspaceBytes> {
        let workspace = places
            .words
            .checked_mul(4)?
            .checked_add(dims.table_bytes.max(16))?
            .checked_add(8 * batch_words(places.tokens))?
            .checked_add(lists_bytes(dims))?
            .checked_add(places.results_bytes(dims.vocab))?
            .checked_add(4 * 16)?;
        Some(WorkspaceBytes { kv: kv?, workspace })
    };
    count().ok_or_else(|| too_large(dims))
}

impl Workspace {
    /// Allocates it; the caller has asked [`bytes`], and checked that they can be had.
    pub(crate) fn new(dims: &WorkspaceDims, gpu: &Gpu, limit: u64) -> Result<Self> {
        let places = Places::new(dims, limit).ok_or_else(|| too_large(dims))?;
        let storage = BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
        let mut caches = Vec::with_capacity(dims.kv.len());
        for kv in &dims.kv {
            let nbytes = cache_bytes(dims, *kv).ok_or_else(|| too_large(dims))?;
            caches.push(gpu.buffer("keys and values", nbytes, storage)?);
        }
        let tail_at = 4 * batch_words(places.tokens);
        let clean = gpu.buffer("clean status", 16, storage)?;
        gpu.queue.write_buffer(&clean, 0, &[0xff; 16]);
        Ok(Self {
            work: gpu.buffer("activations", 4 * places.words, storage)?,
            caches,
            tables: gpu.buffer("tables", dims.table_bytes, storage)?,
            batch: gpu.buffer("batch", 2 * tail_at, storage)?,
            tail_at,
            status: gpu.buffer("status", 16, storage)?,
            clean,
            results: gpu.buffer(
                "results",
                places.results_bytes(dims.vocab),
                BufferUsages::MAP_READ | BufferUsages::COPY_DST,
            )?,
            nothing: [
                gpu.buffer("nothing to read", 16, storage)?,
                gpu.buffer("nothing to write", 16, storage)?,
            ],
            lists: gpu.mapped_buffer("lists of rows", lists_bytes(dims))?,
            lists_mapped: Arc::new(AtomicBool::new(true)),
            words: Vec::with_capacity((lists_bytes(dims) / 4) as usize),
            rows: Vec::with_capacity(dims.capacity.max_batch_tokens as usize),
            lengths: vec![0; dims.capacity.max_sequences as usize],
            dims: dims.clone(),
            places,
        })
    }
}
