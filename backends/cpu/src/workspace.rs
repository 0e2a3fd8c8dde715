//! All memory that decoding takes: nothing is allocated after it.

use std::sync::Mutex;

use hoist_backend::{Error, Result, ValueKind, Want, WorkspaceBytes, WorkspaceDims};

use crate::cache::Cache;
use crate::kernels;
use crate::ops::attention;
use crate::pool::Pool;

/// A value of a program, for every token of a batch.
#[derive(Debug)]
pub(crate) enum Buffer {
    F32(Vec<f32>),
    Quantized(Vec<kernels::Segment>),
    Experts(Vec<u32>),
}

/// A token of the batch in hand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) token: u32,
    pub(crate) sequence: usize,
    pub(crate) position: usize,
    pub(crate) want: Want,
}

/// Consecutive rows of one sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) first: usize,
    pub(crate) len: usize,
}

/// An expert chosen by a token.
pub(crate) type Choice = (u32, u32, u32); // expert, row, slot

/// Memory of one thread.
#[derive(Debug)]
pub(crate) struct ThreadScratch {
    pub(crate) attention: attention::Scratch,
    pub(crate) matmul: kernels::Scratch,
    /// A router's probabilities.
    pub(crate) probabilities: Vec<f32>,
}

#[derive(Debug)]
pub(crate) struct Workspace {
    pub(crate) dims: WorkspaceDims,
    pub(crate) values: Vec<Buffer>,
    pub(crate) cache: Cache,
    pub(crate) rows: Vec<Row>,
    pub(crate) spans: Vec<Span>,
    pub(crate) choices: Vec<Choice>,
    /// Tokens of each sequence.
    pub(crate) lengths: Vec<u32>,
    /// Sequences of the batch in hand.
    pub(crate) seen: Vec<bool>,
    pub(crate) threads: Vec<Mutex<ThreadScratch>>,
    pub(crate) pool: Pool,
}

/// Segments of a token of a quantised value.
fn segments(width: u32, vectors: u32) -> Option<u64> {
    let cols = width.checked_div(vectors)? as usize;
    (kernels::segments(cols) as u64).checked_mul(vectors.into())
}

/// Widest head of any layer.
fn head_dim(dims: &WorkspaceDims) -> u32 {
    dims.kv.iter().map(|kv| kv.head_dim).max().unwrap_or(0)
}

/// Largest number of experts a router could choose from, and of choices a token can make.
fn routing(dims: &WorkspaceDims) -> (u32, u32) {
    let choices = dims
        .values
        .iter()
        .filter(|(kind, _)| *kind == ValueKind::Experts)
        .map(|(_, k)| *k)
        .max();
    match choices {
        None => (0, 0),
        Some(k) => {
            let floats = dims.values.iter().filter(|(kind, _)| *kind == ValueKind::F32);
            (floats.map(|(_, width)| *width).max().unwrap_or(0), k)
        }
    }
}

impl Workspace {
    /// What [`Workspace::new`] takes; `None` past 2^64.
    fn count(dims: &WorkspaceDims, threads: usize) -> Option<WorkspaceBytes> {
        let tokens = u64::from(dims.capacity.max_batch_tokens);
        let mut token = (size_of::<Row>() + size_of::<Span>()) as u64;
        for (kind, width) in &dims.values {
            let bytes = match kind {
                ValueKind::F32 | ValueKind::Experts => u64::from(*width).checked_mul(4)?,
                ValueKind::Quantized { vectors } => {
                    segments(*width, *vectors)?.checked_mul(size_of::<kernels::Segment>() as u64)?
                }
            };
            token = token.checked_add(bytes)?;
        }
        let (experts, choices) = routing(dims);
        token = token.checked_add(u64::from(choices).checked_mul(size_of::<Choice>() as u64)?)?;
        let thread = attention::Scratch::bytes(dims.capacity.max_context.into(), head_dim(dims).into())?
            .checked_add(kernels::Scratch::BYTES as u64)?
            .checked_add(u64::from(experts).checked_mul(4)?)?;
        let workspace = token
            .checked_mul(tokens)?
            .checked_add(thread.checked_mul(threads as u64)?)?
            .checked_add(u64::from(dims.capacity.max_sequences).checked_mul(5)?)?
            .checked_add(dims.table_bytes)?;
        Some(WorkspaceBytes {
            kv: Cache::bytes(dims)?,
            workspace,
        })
    }

    /// Bytes of a workspace.
    pub(crate) fn bytes(dims: &WorkspaceDims, threads: usize) -> Result<WorkspaceBytes> {
        let fits = |b: &WorkspaceBytes| {
            b.kv.checked_add(b.workspace)
                .is_some_and(|n| n < isize::MAX as u64)
        };
        Self::count(dims, threads).filter(fits).ok_or_else(|| {
            Error::invalid(
                "workspace",
                "a size below 2^63 bytes",
                format!("{:?}", dims.capacity),
            )
        })
    }

    /// Allocates it; the caller has checked that [`Workspace::bytes`] can be had.
    pub(crate) fn new(dims: &WorkspaceDims, threads: usize) -> Result<Self> {
        let tokens = dims.capacity.max_batch_tokens as usize;
        let sequences = dims.capacity.max_sequences as usize;
        let values = dims
            .values
            .iter()
            .map(|(kind, width)| match kind {
                ValueKind::F32 => Buffer::F32(vec![0.0; *width as usize * tokens]),
                ValueKind::Experts => Buffer::Experts(vec![0; *width as usize * tokens]),
                ValueKind::Quantized { vectors } => {
                    let segments = segments(*width, *vectors).unwrap_or(0) as usize;
                    Buffer::Quantized(vec![bytemuck::Zeroable::zeroed(); segments * tokens])
                }
            })
            .collect();
        let (experts, choices) = routing(dims);
        let (context, head_dim) = (dims.capacity.max_context as usize, head_dim(dims) as usize);
        let scratch = || {
            Mutex::new(ThreadScratch {
                attention: attention::Scratch::new(context, head_dim),
                matmul: kernels::Scratch::new(),
                probabilities: vec![0.0; experts as usize],
            })
        };
        Ok(Self {
            dims: dims.clone(),
            values,
            cache: Cache::new(dims)?,
            rows: Vec::with_capacity(tokens),
            spans: Vec::with_capacity(tokens),
            choices: Vec::with_capacity(choices as usize * tokens),
            lengths: vec![0; sequences],
            seen: vec![false; sequences],
            threads: (0..threads).map(|_| scratch()).collect(),
            pool: Pool::new(threads)?,
        })
    }
}
