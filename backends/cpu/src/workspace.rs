//! All memory that decoding takes: nothing is allocated after it.

use std::sync::Mutex;

use hoist_backend::{Error, Result, TokenRow, ValueKind, WorkspaceBytes, WorkspaceDims};

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
    pub(crate) rows: Vec<TokenRow>,
    pub(crate) spans: Vec<Span>,
    pub(crate) choices: Vec<Choice>,
    /// Tokens of each sequence.
    pub(crate) lengths: Vec<u32>,
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

/// The error for values without a size: past 2^63 bytes, or of no vectors.
fn no_size(dims: &WorkspaceDims) -> Error {
    let vectorless = dims
        .values
        .iter()
        .position(|(kind, _)| matches!(kind, ValueKind::Quantized { vectors: 0 }));
    match vectorless {
        Some(value) => Error::invalid(format!("vectors of value {value}"), "at least 1", 0),
        None => Error::invalid(
            "workspace",
            "a size below 2^63 bytes",
            format!("{:?}", dims.capacity),
        ),
    }
}

impl Workspace {
    /// What [`Workspace::new`] takes; `None` past 2^64.
    fn count(dims: &WorkspaceDims, threads: usize) -> Option<WorkspaceBytes> {
        let tokens = u64::from(dims.capacity.max_batch_tokens);
        let mut token = (size_of::<TokenRow>() + size_of::<Span>()) as u64;
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
            .checked_add(u64::from(dims.capacity.max_sequences).checked_mul(4)?)?
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
        Self::count(dims, threads)
            .filter(fits)
            .ok_or_else(|| no_size(dims))
    }

    /// Allocates it; the caller has checked that [`Workspace::bytes`] can be had.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if it has no size; [`Error::Unavailable`] if a thread cannot be started.
    pub(crate) fn new(dims: &WorkspaceDims, threads: usize) -> Result<Self> {
        let tokens = dims.capacity.max_batch_tokens as usize;
        let sequences = dims.capacity.max_sequences as usize;
        let values = dims
            .values
            .iter()
            .map(|(kind, width)| match kind {
                ValueKind::F32 => Ok(Buffer::F32(vec![0.0; *width as usize * tokens])),
                ValueKind::Experts => Ok(Buffer::Experts(vec![0; *width as usize * tokens])),
                ValueKind::Quantized { vectors } => {
                    let segments = segments(*width, *vectors).ok_or_else(|| no_size(dims))? as usize;
                    Ok(Buffer::Quantized(vec![
                        bytemuck::Zeroable::zeroed();
                        segments * tokens
                    ]))
                }
            })
            .collect::<Result<_>>()?;
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
            threads: (0..threads).map(|_| scratch()).collect(),
            pool: Pool::new(threads)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use hoist_backend::{Capacity, KvDtype};

    use super::*;

    fn dims(vectors: u32) -> WorkspaceDims {
        WorkspaceDims {
            vocab: 8,
            capacity: Capacity {
                max_context: 4,
                max_sequences: 1,
                max_batch_tokens: 2,
                kv: KvDtype::F16,
            },
            kv: Vec::new(),
            values: vec![(ValueKind::F32, 64), (ValueKind::Quantized { vectors }, 64)],
            table_bytes: 0,
        }
    }

    #[test]
    fn a_quantised_value_of_no_vectors_is_refused_by_name() {
        let (bytes, new) = (Workspace::bytes(&dims(0), 1), Workspace::new(&dims(0), 1));
        for error in [bytes.map(drop).unwrap_err(), new.map(drop).unwrap_err()] {
            assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
            assert!(error.to_string().contains("vectors of value 1"), "{error}");
        }
        // The control differs in the number only.
        let work = Workspace::new(&dims(2), 1).unwrap();
        assert!(matches!(&work.values[1], Buffer::Quantized(x) if !x.is_empty()));
        assert!(Workspace::bytes(&dims(2), 1).unwrap().workspace > 0);
    }

    #[test]
    fn a_workspace_past_the_address_space_is_refused() {
        let mut huge = dims(2);
        huge.values[0].1 = u32::MAX;
        huge.capacity.max_batch_tokens = u32::MAX;
        let error = Workspace::bytes(&huge, 1).unwrap_err();
        assert!(error.to_string().contains("2^63"), "{error}");
    }
}
