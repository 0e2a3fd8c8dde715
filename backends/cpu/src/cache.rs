//! Keys and values of all sequences.

use std::ops::Range;

use half::f16;
use hoist_backend::{Error, KvDtype, Result, WorkspaceDims};

use crate::memory::Arena;
use crate::ops::attention::POSITIONS;
use crate::ops::element::{Element, LANES};

/// A float that keys and values are stored as.
pub(crate) trait Stored: Element {
    /// Rounds to nearest even; `None` if the result is no number.
    fn narrow(x: f32) -> Option<Self>;
}

impl Stored for f16 {
    fn narrow(x: f32) -> Option<Self> {
        Some(f16::from_f32(x)).filter(|x| x.is_finite())
    }
}

impl Stored for f32 {
    fn narrow(x: f32) -> Option<Self> {
        Some(x).filter(|x| x.is_finite())
    }
}

#[derive(Debug)]
struct Layer {
    /// First element of the layer's part of the arena.
    start: usize,
    kv_heads: usize,
    head_dim: usize,
}

/// One arena: `[layer][sequence][kv_head]`, keys then values of each (see [`crate::ops::attention`] for their layouts).
#[derive(Debug)]
pub(crate) struct Cache {
    arena: Arena,
    layers: Vec<Layer>,
    /// Positions of a sequence, rounded up to whole blocks.
    positions: usize,
    pub(crate) dtype: KvDtype,
}

/// Where one head of one sequence of one layer has its keys and values, in elements.
pub(crate) struct Place {
    pub(crate) keys: Range<usize>,
    pub(crate) values: Range<usize>,
}

/// Positions that memory is taken for.
fn positions(dims: &WorkspaceDims) -> Option<u64> {
    u64::from(dims.capacity.max_context).checked_next_multiple_of(POSITIONS as u64)
}

impl Cache {
    /// Bytes of the arena; `None` past 2^64.
    pub(crate) fn bytes(dims: &WorkspaceDims) -> Option<u64> {
        let elements = dims.kv.iter().try_fold(0u64, |sum, kv| {
            sum.checked_add(
                2u64.checked_mul(kv.kv_heads.into())?
                    .checked_mul(kv.head_dim.into())?,
            )
        })?;
        elements
            .checked_mul(positions(dims)?)?
            .checked_mul(dims.capacity.max_sequences.into())?
            .checked_mul(dims.capacity.kv.bytes())
    }

    pub(crate) fn new(dims: &WorkspaceDims) -> Result<Self> {
        let overflow = || {
            Error::invalid(
                "keys and values",
                "a size below 2^64 bytes",
                format!("{:?}", dims.capacity),
            )
        };
        let arena = Arena::new("keys and values", Self::bytes(dims).ok_or_else(overflow)?)?;
        let positions = positions(dims)
            .and_then(|p| usize::try_from(p).ok())
            .ok_or_else(overflow)?;
        let mut start = 0;
        let mut layers = Vec::with_capacity(dims.kv.len());
        for kv in &dims.kv {
            let (kv_heads, head_dim) = (kv.kv_heads as usize, kv.head_dim as usize);
            layers.push(Layer {
                start,
                kv_heads,
                head_dim,
            });
            // It is a part of the arena, whose size did not overflow.
            start += 2 * kv_heads * head_dim * positions * dims.capacity.max_sequences as usize;
        }
        Ok(Self {
            arena,
            layers,
            positions,
            dtype: dims.capacity.kv,
        })
    }

    pub(crate) fn place(&self, layer: usize, sequence: usize, head: usize) -> Place {
        let layer = &self.layers[layer];
        let len = layer.head_dim * self.positions;
        let start = layer.start + (sequence * layer.kv_heads + head) * 2 * len;
        Place {
            keys: start..start + len,
            values: start + len..start + 2 * len,
        }
    }

    pub(crate) fn elements<E: Stored>(&self) -> &[E] {
        bytemuck::cast_slice(self.arena.bytes())
    }

    /// Stores one head's key and value at a position; whether all are numbers.
    pub(crate) fn store<E: Stored>(
        &mut self,
        place: &Place,
        position: usize,
        key: &[f32],
        value: &[f32],
    ) -> bool {
        let head_dim = key.len();
        let elements: &mut [E] = bytemuck::cast_slice_mut(self.arena.bytes_mut());
        let block =
            &mut elements[place.keys.clone()][position / LANES * head_dim * LANES..][..head_dim * LANES];
        let mut finite = true;
        for (k, out) in key.iter().zip(block.as_chunks_mut::<LANES>().0) {
            let k = E::narrow(*k);
            finite &= k.is_some();
            // Not a number that nobody meant, but what was there: a failed step must leave numbers in the cache.
            if let Some(k) = k {
                out[position % LANES] = k;
            }
        }
        let row = &mut elements[place.values.clone()][position * head_dim..][..head_dim];
        for (v, out) in value.iter().zip(row) {
            let v = E::narrow(*v);
            finite &= v.is_some();
            if let Some(v) = v {
                *out = v;
            }
        }
        finite
    }
}
