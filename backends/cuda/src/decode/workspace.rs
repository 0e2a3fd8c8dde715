//! Everything a step needs beside the weights: values, keys and values, tables, scratch, and page-locked staging. Taken once
//! by `init_workspace`; a step takes nothing.

use std::cell::Cell;
use std::sync::Arc;

use hoist_backend::{Error, Result, TokenRow, UnsupportedWhat, ValueKind, WorkspaceBytes, WorkspaceDims};

use super::params::{CacheLayer, Parted, Row, SEGMENT_BYTES};
use super::persistent;
use super::prefill;
use crate::driver::{Context, DeviceBuffer, PinnedBuffer, Stream};

/// Positions that share a maximum (`docs/numerics.md` §4).
pub(super) const SPLIT: u32 = 256;
/// Contexts are rounded up to whole blocks of keys.
const KEY_BLOCK: u64 = 64;
/// Parts of the vocabulary that a row of logits is searched in.
pub(super) const ARG_MAX_PARTS: u32 = 64;
/// Most tokens of a batch: bounds the grids of all kernels.
pub(crate) const MAX_BATCH_TOKENS: u32 = 8192;
/// Scratch of attention that several tokens share out among them; one token gets what it needs in any case.
const ATTENTION_SCRATCH: u64 = 64 << 20;
const ALIGNMENT: u64 = 256;

/// One value on the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) ptr: u64,
    /// Elements of a token.
    pub(super) width: u32,
    /// Bytes of a token.
    pub(super) token_bytes: u64,
}

/// Sizes of the parts of a workspace, in the order in which they lie in its arena.
#[derive(Debug)]
struct Layout {
    values: Vec<u64>,
    rows: u64,
    kept: u64,
    /// The fault word and the arg-max of each token.
    results: u64,
    parts: u64,
    tables: u64,
    sums: u64,
    partial: u64,
    /// What the persistent kernel keeps.
    control: u64,
    /// Vectors packed for products with many tokens.
    packed: u64,
    /// What blocks of a product in parts have handed over.
    handed: u64,
    kv: Vec<u64>,
}

fn segments(width: u32, vectors: u32) -> Option<u64> {
    let cols = width.checked_div(vectors)?;
    u64::from(cols.div_ceil(256)).checked_mul(vectors.into())
}

fn token_bytes(kind: ValueKind, width: u32) -> Option<u64> {
    match kind {
        ValueKind::F32 | ValueKind::Experts => u64::from(width).checked_mul(4),
        ValueKind::Quantized { vectors } => segments(width, vectors)?.checked_mul(SEGMENT_BYTES),
    }
}

/// Room for the vectors of one value, the widest that is packed.
fn packed(dims: &WorkspaceDims) -> Option<u64> {
    let tokens = dims.capacity.max_batch_tokens;
    let widths = dims.values.iter().filter_map(|(kind, width)| {
        let packs = *kind == ValueKind::Quantized { vectors: 1 } && width.is_multiple_of(256);
        packs.then_some(width / 256)
    });
    match widths.max() {
        Some(segments) if tokens >= prefill::FEWEST_TOKENS => prefill::packed_bytes(segments.into(), tokens),
        _ => Some(0),
    }
}

/// Elements of a head in the cache: a multiple of 8, so that they are read 16 bytes at a time.
fn padded(head_dim: u32) -> Option<u32> {
    head_dim.checked_next_multiple_of(8)
}

impl Layout {
    /// `None` past 2^64.
    fn new(dims: &WorkspaceDims) -> Option<Self> {
        let tokens = u64::from(dims.capacity.max_batch_tokens);
        let values = dims
            .values
            .iter()
            .map(|(kind, width)| token_bytes(*kind, *width)?.checked_mul(tokens))
            .collect::<Option<Vec<u64>>>()?;
        let splits = u64::from(dims.capacity.max_context.div_ceil(SPLIT));
        // No query is wider than the widest value: the logits are none, unless another value is as wide as they.
        let floats = || {
            dims.values
                .iter()
                .filter(|(kind, _)| *kind == ValueKind::F32)
                .map(|(_, width)| *width)
        };
        let as_wide = floats().filter(|width| *width == dims.vocab).count();
        let widest = floats()
            .filter(|width| *width != dims.vocab || as_wide > 1)
            .max()
            .unwrap_or(0);
        let head_dim = dims.kv.iter().map(|kv| kv.head_dim).min().unwrap_or(1).max(1);
        let sums = u64::from(widest / head_dim).checked_mul(8)?.checked_mul(splits)?;
        let partial = u64::from(widest).checked_mul(4)?.checked_mul(splits)?;
        let of_token = sums.checked_add(partial)?.max(1);
        // Of the whole context: with fewer splits, or narrower queries, there is room for more.
        let attended = (ATTENTION_SCRATCH / of_token).clamp(1, tokens.max(1));
        let positions = u64::from(dims.capacity.max_context).checked_next_multiple_of(KEY_BLOCK)?;
        let kv = dims
            .kv
            .iter()
            .map(|kv| {
                u64::from(kv.kv_heads)
                    .checked_mul(2)?
                    .checked_mul(padded(kv.head_dim)?.into())?
                    .checked_mul(positions)?
                    .checked_mul(dims.capacity.max_sequences.into())?
                    .checked_mul(dims.capacity.kv.bytes())?
                    .checked_next_multiple_of(ALIGNMENT)
            })
            .collect::<Option<Vec<u64>>>()?;
        Some(Self {
            values,
            rows: tokens.checked_mul(size_of::<Row>() as u64)?,
            kept: tokens.checked_mul(4)?,
            results: tokens.checked_add(1)?.checked_mul(4)?,
            parts: tokens.checked_mul(8 * u64::from(ARG_MAX_PARTS))?,
            tables: dims.table_bytes,
            sums: sums.checked_mul(attended)?,
            partial: partial.checked_mul(attended)?,
            control: persistent::control_bytes(dims)?,
            packed: packed(dims)?,
            handed: u64::from(prefill::MOST_PARTS) * 8,
            kv,
        })
    }

    /// Bytes of each part in turn.
    fn parts(&self) -> impl Iterator<Item = u64> + '_ {
        let rest = [
            self.rows,
            self.kept,
            self.results,
            self.parts,
            self.tables,
            self.sums,
            self.partial,
            self.control,
            self.packed,
            self.handed,
        ];
        self.values.iter().copied().chain(rest)
    }

    fn bytes(&self) -> Option<WorkspaceBytes> {
        let workspace = self.parts().try_fold(0u64, |sum, n| {
            sum.checked_add(n.checked_next_multiple_of(ALIGNMENT)?)
        })?;
        let kv = self.kv.iter().try_fold(0u64, |sum, n| sum.checked_add(*n))?;
        kv.checked_add(workspace)?;
        Some(WorkspaceBytes { kv, workspace })
    }
}

fn layout(dims: &WorkspaceDims) -> Result<(Layout, WorkspaceBytes)> {
    if dims.capacity.max_batch_tokens > MAX_BATCH_TOKENS {
        return Err(Error::Unsupported {
            backend: crate::NAME.into(),
            what: UnsupportedWhat::Limit {
                what: "a batch",
                limit: MAX_BATCH_TOKENS.into(),
                found: dims.capacity.max_batch_tokens.into(),
            },
        });
    }
    if let Some((_, width)) = dims
        .values
        .iter()
        .find(|(kind, width)| token_bytes(*kind, *width).is_none_or(|n| n == 0))
    {
        return Err(Error::invalid(
            "width of a value",
            "whole vectors of at least one element",
            width,
        ));
    }
    let found = Layout::new(dims).and_then(|layout| {
        let bytes = layout.bytes()?;
        Some((layout, bytes))
    });
    found.ok_or_else(|| {
        Error::invalid(
            "workspace",
            "a size below 2^64 bytes",
            format!("{:?}", dims.capacity),
        )
    })
}

/// Tokens whose attention there is scratch for: `bytes` of maxima and sums, and of unfinished results.
fn attended(bytes: (u64, u64), splits: u32, heads: u64, head_dim: u32) -> u32 {
    let of_token = u64::from(splits).saturating_mul(heads);
    let partial = of_token.saturating_mul(u64::from(head_dim) * 4);
    let tokens = (bytes.0 / of_token.saturating_mul(8).max(1)).min(bytes.1 / partial.max(1));
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

/// Bytes that [`Workspace::new`] takes on the device.
pub(super) fn bytes(dims: &WorkspaceDims) -> Result<WorkspaceBytes> {
    layout(dims).map(|(_, bytes)| bytes)
}

#[derive(Debug)]
pub(super) struct Workspace {
    pub(super) dims: WorkspaceDims,
    pub(super) values: Vec<Place>,
    pub(super) cache: Vec<CacheLayer>,
    pub(super) rows: u64,
    pub(super) kept: u64,
    /// The fault word; the arg-max ids follow it.
    pub(super) fault: u64,
    pub(super) argmax: u64,
    pub(super) parts: u64,
    pub(super) tables: u64,
    pub(super) sums: u64,
    pub(super) partial: u64,
    pub(super) control: u64,
    pub(super) packed: u64,
    pub(super) packed_bytes: u64,
    /// A word for each block of a product in parts, and the number of the last such product.
    handed: u64,
    parts_number: Cell<u32>,
    /// Bytes of `sums` and `partial`.
    pub(super) scratch: (u64, u64),
    /// Most tokens whose attention runs at once, however much scratch there is.
    most_attended: u32,
    /// Rows, then the numbers of kept tokens.
    pub(super) staging: PinnedBuffer,
    /// The fault word and arg-max ids.
    pub(super) results: PinnedBuffer,
    /// Tokens that each sequence holds.
    pub(super) lengths: Vec<u32>,
    /// The batch in hand.
    pub(super) batch: Vec<TokenRow>,
    /// What the addresses above point into.
    _memory: [DeviceBuffer; 2],
}

impl Workspace {
    /// What a product is told whose blocks share tiles out, behind those of their own. Partial results of attention lie where
    /// its sums do.
    pub(super) fn parted(&self, own: u32) -> Parted {
        // 0 is no product's. Blocks hand over in few of them: none has a word of 2^32 products ago.
        let number = self.parts_number.get().wrapping_add(1).max(1);
        self.parts_number.set(number);
        Parted {
            own,
            number,
            sums: self.partial,
            handed: self.handed,
        }
    }

    /// Makes the words of [`Workspace::parted`] nobody's.
    pub(super) fn forget_parts(&self, stream: &Stream) -> Result<()> {
        // SAFETY: the part of the arena that is theirs.
        unsafe { stream.fill(self.handed, 0, prefill::MOST_PARTS as usize * 8) }
    }

    /// Where a step in one launch says that it is over: the last word of the results.
    fn done_word(&self) -> *mut u32 {
        let words = self.results.bytes().len() / 4;
        // SAFETY: within the buffer, which has room for the fault word, an id at least and this word.
        unsafe { self.results.as_ptr().cast::<u32>().add(words - 1) }
    }

    /// Its address, for the device.
    pub(super) fn done_address(&self) -> u64 {
        self.done_word() as u64
    }

    /// What it says. What the device has written before is there too.
    pub(super) fn done(&self) -> u32 {
        // SAFETY: within the buffer and aligned; the device writes it whole.
        let done = unsafe { self.done_word().read_volatile() };
        std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
        done
    }

    /// Forgets what it says; no step may be under way.
    pub(super) fn forget_done(&self) {
        // SAFETY: as above, and nobody else writes it.
        unsafe { self.done_word().write_volatile(0) };
    }

    /// Tokens whose attention runs at once, of so many splits and query heads of such a width each; none if there is not
    /// scratch for one.
    pub(super) fn attended(&self, splits: u32, heads: u64, head_dim: u32) -> u32 {
        attended(self.scratch, splits, heads, head_dim).min(self.most_attended)
    }

    /// Takes its memory. Attention of at most `most_attended` tokens runs at once.
    pub(super) fn new(context: &Arc<Context>, dims: &WorkspaceDims, most_attended: u32) -> Result<Self> {
        let (layout, bytes) = layout(dims)?;
        let kv = DeviceBuffer::new(context, "keys and values", bytes.kv)?;
        let arena = DeviceBuffer::new(context, "the workspace", bytes.workspace)?;
        let tokens = dims.capacity.max_batch_tokens as usize;
        let staging = PinnedBuffer::new(context, "a batch", tokens * (size_of::<Row>() + 4))?;
        let results = PinnedBuffer::new(context, "arg-max ids", (tokens + 2) * 4)?;
        let mut next = arena.ptr();
        let mut places = layout.parts().map(|n| {
            let at = next;
            next += n.next_multiple_of(ALIGNMENT);
            at
        });
        let mut values = Vec::with_capacity(dims.values.len());
        for ((kind, width), ptr) in dims.values.iter().zip(&mut places) {
            values.push(Place {
                ptr,
                width: *width,
                // `layout` has computed it for every token.
                token_bytes: token_bytes(*kind, *width).unwrap_or_default(),
            });
        }
        let mut part = || {
            places
                .next()
                .ok_or_else(|| Error::internal(crate::NAME, "a workspace without a part"))
        };
        let [rows, kept, fault, parts, tables, sums, partial] =
            [part()?, part()?, part()?, part()?, part()?, part()?, part()?];
        let control = part()?;
        let (packed, handed) = (part()?, part()?);
        let positions = dims.capacity.max_context.next_multiple_of(KEY_BLOCK as u32);
        let mut base = kv.ptr();
        let mut cache = Vec::with_capacity(dims.kv.len());
        for (kv, n) in dims.kv.iter().zip(&layout.kv) {
            cache.push(CacheLayer {
                base,
                kv_heads: kv.kv_heads,
                head_dim: kv.head_dim,
                padded: padded(kv.head_dim).unwrap_or_default(),
                positions,
            });
            base += n;
        }
        Ok(Self {
            dims: dims.clone(),
            values,
            cache,
            rows,
            kept,
            fault,
            argmax: fault + 4,
            parts,
            tables,
            sums,
            partial,
            control,
            packed,
            packed_bytes: layout.packed,
            handed,
            parts_number: Cell::new(0),
            scratch: (layout.sums, layout.partial),
            most_attended,
            staging,
            results,
            lengths: vec![0; dims.capacity.max_sequences as usize],
            batch: Vec::with_capacity(tokens),
            _memory: [kv, arena],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hoist_backend::{Capacity, KvDtype, KvSpec};

    fn dims() -> WorkspaceDims {
        WorkspaceDims {
            capacity: Capacity {
                max_context: 100,
                max_sequences: 2,
                max_batch_tokens: 3,
                kv: KvDtype::F16,
            },
            kv: vec![
                KvSpec {
                    kv_heads: 2,
                    head_dim: 12
                };
                2
            ],
            values: vec![
                (ValueKind::F32, 48),
                (ValueKind::Quantized { vectors: 2 }, 640),
                (ValueKind::F32, 99),
            ],
            table_bytes: 400,
            vocab: 99,
        }
    }

    #[test]
    fn every_part_is_counted() {
        let bytes = bytes(&dims()).unwrap();
        // 2 heads × (keys and values) × 16 elements × 128 positions × 2 sequences × 2 bytes, twice.
        assert_eq!(bytes.kv, 2 * (2 * 2 * 16 * 128 * 2 * 2));
        // Values: 3 × 192, 3 × 4 × 304, 3 × 396; rows 48; kept 12; results 16; parts 3 × 512; tables; one split of
        // 4 heads × 8 bytes and of 48 × 4 bytes, for 3 tokens.
        let mut parts = vec![576, 3648, 1188, 48, 12, 16, 1536, 400, 96, 576u64];
        parts.push(persistent::control_bytes(&dims()).unwrap());
        parts.push(8192);
        let sum: u64 = parts.iter().map(|n| n.next_multiple_of(256)).sum();
        assert_eq!(bytes.workspace, sum);
    }

    #[test]
    fn scratch_for_a_whole_context_holds_more_tokens_of_fewer_splits() {
        // Query and gate of an 8B llama: the layout knows widths, not which of them attend.
        let mut dims = dims();
        dims.capacity.max_batch_tokens = 512;
        dims.values = vec![(ValueKind::F32, 4096), (ValueKind::F32, 14_336)];
        dims.kv[0].head_dim = 128;
        dims.kv.truncate(1);
        for (context, splits, tokens) in [(640, 2, 2016), (32_768, 1, 4032), (32_768, 128, 31)] {
            dims.capacity.max_context = context;
            let layout = Layout::new(&dims).unwrap();
            let scratch = (layout.sums, layout.partial);
            assert!(scratch.0 + scratch.1 <= ATTENTION_SCRATCH);
            assert_eq!(attended(scratch, splits, 32, 128), tokens, "{context} {splits}");
        }
        assert_eq!(attended((8, 511), 1, 1, 128), 0);
        assert_eq!(attended((u64::MAX, u64::MAX), u32::MAX, u64::MAX, u32::MAX), 1);
    }

    #[test]
    fn the_widest_value_of_whole_segments_is_packed() {
        let mut dims = dims();
        dims.capacity.max_batch_tokens = 9;
        dims.values.push((ValueKind::Quantized { vectors: 1 }, 512));
        dims.values.push((ValueKind::Quantized { vectors: 1 }, 544));
        assert_eq!(packed(&dims), prefill::packed_bytes(2, 9));
        dims.capacity.max_batch_tokens = 7;
        assert_eq!(packed(&dims), Some(0));
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        let mut wide = dims();
        wide.capacity.max_batch_tokens = MAX_BATCH_TOKENS + 1;
        assert!(matches!(bytes(&wide), Err(Error::Unsupported { .. })));
        let mut large = dims();
        large.capacity.max_context = u32::MAX;
        large.capacity.max_sequences = u32::MAX;
        large.kv[0] = KvSpec {
            kv_heads: u32::MAX,
            head_dim: 1 << 30,
        };
        assert!(matches!(bytes(&large), Err(Error::InvalidArgument { .. })));
        let mut none = dims();
        none.values[1] = (ValueKind::Quantized { vectors: 0 }, 640);
        assert!(matches!(bytes(&none), Err(Error::InvalidArgument { .. })));
    }
}
