//! Where each weight is: the layout of the arena, and the table of what lies in it.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use hoist_backend::{
    Encoding, Error, FloatLayout, LoadPlan, Mapping, MemoryByClass, Result, Shape, ValueChange, WeightClass,
    WeightId, WeightPlan,
};

use crate::kernels::{self, Isa};
use crate::memory::{ALIGNMENT, Arena, align_up};
use crate::pool::{Disjoint, Pool};
use crate::{finite, transpose};

/// Bytes that are rearranged at a time.
const MULTIPLY_PIECE: usize = 256 << 10;

/// Where a weight's bytes are.
pub(crate) enum Place {
    /// Its reserved place in the arena.
    Arena,
    /// A run of a file's mapping.
    Mapped {
        mapping: Arc<dyn Mapping>,
        range: Range<usize>,
    },
}

/// One weight.
pub(crate) struct Resident {
    pub(crate) name: String,
    pub(crate) class: WeightClass,
    pub(crate) encoding: Encoding,
    pub(crate) shape: Shape,
    pub(crate) layout: FloatLayout,
    /// Its canonical bytes in the arena, or their transposition; reserved, and untouched if it is mapped.
    pub(crate) bytes: Range<usize>,
    /// What is kept beside the rows of a quantised matrix; always in the arena.
    pub(crate) side: Range<usize>,
    pub(crate) place: Place,
    /// Whether it may be served from a mapping: one run of the file, unchanged.
    pub(crate) importable: bool,
    /// Whether `side` is filled in, and the kernels had their say.
    pub(crate) side_done: bool,
    /// Whether the matrix kernels have rearranged it.
    pub(crate) packed: bool,
}

impl Resident {
    pub(crate) fn nbytes(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn is_mapped(&self) -> bool {
        matches!(self.place, Place::Mapped { .. })
    }

    /// Canonical bytes of a row; without the prefix of its matrix.
    pub(crate) fn row_bytes(&self) -> usize {
        let blocks = self.shape.cols / self.encoding.block_weights();
        (blocks * self.encoding.block_bytes()) as usize
    }

    /// Canonical bytes of one matrix, prefix included.
    pub(crate) fn matrix_bytes(&self) -> usize {
        self.nbytes() / self.shape.matrices as usize
    }

    pub(crate) fn side_row_bytes(&self) -> usize {
        if self.class == WeightClass::Quantized {
            kernels::side_row_bytes(self.shape.cols as usize)
        } else {
            0
        }
    }
}

/// All weights of a model.
pub(crate) struct Residency {
    pub(crate) weights: Vec<Resident>,
    arena: Arena,
    /// The arena up to here holds what is never imported; after it lie the places of importable weights, whose pages
    /// stay untouched if they are.
    owned_always: u64,
}

impl std::fmt::Debug for Residency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Residency")
            .field("weights", &self.weights.len())
            .field("arena", &self.arena)
            .finish()
    }
}

/// Checks what this backend relies on; the caller has validated the model.
fn check(plan: &WeightPlan, place: usize) -> Result<()> {
    plan.check(crate::NAME, place)?;
    let name = &plan.name;
    if plan.layout != FloatLayout::OutIn && plan.class != WeightClass::Float {
        return Err(Error::invalid(
            format!("layout of `{name}`"),
            "OutIn for all but float matrices",
            format!("{:?}", plan.layout),
        ));
    }
    Ok(())
}

/// Whether a weight stands in its file as it is needed. Whether the run is aligned is known only once it is mapped.
fn importable(plan: &WeightPlan) -> bool {
    let one_run = matches!(plan.views.as_slice(), [view] if view.as_contiguous().is_some());
    one_run && plan.change == ValueChange::Keep && plan.layout == FloatLayout::OutIn
}

impl Residency {
    /// Lays the plan's weights out; `admit` sees the bytes that must be owned before they are allocated.
    pub(crate) fn new(plan: &LoadPlan, import: bool, admit: impl FnOnce(u64) -> Result<()>) -> Result<Self> {
        let too_large = || Error::OutOfMemory {
            device: crate::NAME.into(),
            what: "weights".into(),
            needed: u64::MAX,
            available: usize::MAX as u64,
        };
        let mut weights = Vec::with_capacity(plan.weights.len());
        for (place, weight) in plan.weights.iter().enumerate() {
            check(weight, place)?;
            weights.push(Resident {
                name: weight.name.clone(),
                class: weight.class,
                encoding: weight.encoding,
                shape: weight.shape,
                layout: weight.layout,
                bytes: 0..0,
                side: 0..0,
                place: Place::Arena,
                importable: import && importable(weight),
                side_done: false,
                packed: false,
            });
        }
        // First what is owned in any case, then the places of importable weights.
        let mut end = 0u64;
        for (resident, weight) in weights.iter_mut().zip(&plan.weights) {
            let side = if resident.class == WeightClass::Quantized {
                weight
                    .shape
                    .matrices
                    .checked_mul(weight.shape.rows)
                    .and_then(|rows| {
                        rows.checked_mul(kernels::side_row_bytes(weight.shape.cols as usize) as u64)
                    })
                    .ok_or_else(too_large)?
            } else {
                0
            };
            let bytes = if resident.importable { 0 } else { weight.nbytes };
            let side_start = end.checked_add(bytes).ok_or_else(too_large)?;
            let side_end = side_start.checked_add(side).ok_or_else(too_large)?;
            resident.bytes = to_range(end, side_start).ok_or_else(too_large)?;
            resident.side = to_range(side_start, side_end).ok_or_else(too_large)?;
            end = align_up(side_end).ok_or_else(too_large)?;
        }
        let owned_always = end;
        for (resident, weight) in weights
            .iter_mut()
            .zip(&plan.weights)
            .filter(|(r, _)| r.importable)
        {
            let bytes_end = end.checked_add(weight.nbytes).ok_or_else(too_large)?;
            resident.bytes = to_range(end, bytes_end).ok_or_else(too_large)?;
            end = align_up(bytes_end).ok_or_else(too_large)?;
        }
        admit(owned_always)?;
        Ok(Self {
            weights,
            arena: Arena::new("weights", end)?,
            owned_always,
        })
    }

    /// The weight of that id.
    pub(crate) fn weight(&self, id: WeightId) -> Result<&Resident> {
        self.weights.get(id.index()).ok_or(Error::UnknownWeight {
            weight: id,
            weights: self.weights.len(),
        })
    }

    /// Its bytes as they lie in memory: canonical unless transposed or packed.
    pub(crate) fn bytes<'a>(&'a self, weight: &'a Resident) -> &'a [u8] {
        match &weight.place {
            Place::Arena => &self.arena.bytes()[weight.bytes.clone()],
            Place::Mapped { mapping, range } => &mapping.bytes()[range.clone()],
        }
    }

    /// The weights, and the arena to write their bytes to.
    pub(crate) fn parts_mut(&mut self) -> (&mut [Resident], &mut [u8]) {
        (&mut self.weights, self.arena.bytes_mut())
    }

    /// Bytes owned by class, padding included, and bytes mapped.
    pub(crate) fn memory(&self) -> (MemoryByClass, u64) {
        let mut owned = MemoryByClass::default();
        let mut mapped = 0;
        for weight in &self.weights {
            let bytes = weight.nbytes() as u64;
            let side = weight.side.len() as u64;
            let resident = if weight.is_mapped() {
                mapped += bytes;
                side
            } else {
                bytes + side
            };
            *owned.class_mut(weight.class) += align_up(resident).unwrap_or(resident);
        }
        (owned, mapped)
    }

    /// Bytes that are owned even if every importable weight is imported.
    pub(crate) fn owned_always(&self) -> u64 {
        self.owned_always
    }

    /// Bytes of importable weights that are not mapped: what copying them takes.
    pub(crate) fn importable_bytes(&self) -> u64 {
        let copied = self.weights.iter().filter(|w| w.importable && !w.is_mapped());
        copied
            .map(|w| align_up(w.nbytes() as u64).unwrap_or(u64::MAX))
            .fold(0, u64::saturating_add)
    }

    /// Demands that `plan` is the one that was laid out.
    pub(crate) fn check_is(&self, plan: &LoadPlan) -> Result<()> {
        let same = plan.weights.len() == self.weights.len()
            && plan
                .weights
                .iter()
                .zip(&self.weights)
                .enumerate()
                .all(|(i, (p, w))| {
                    p.id.index() == i
                        && p.encoding == w.encoding
                        && p.shape == w.shape
                        && p.class == w.class
                        && p.layout == w.layout
                        && p.nbytes == w.nbytes() as u64
                });
        if same {
            Ok(())
        } else {
            Err(Error::invalid(
                "plan of load_from",
                "the plan that begin_load saw",
                "another",
            ))
        }
    }

    /// Writes a chunk that the ledger has accepted.
    pub(crate) fn write(&mut self, id: WeightId, at: usize, bytes: &[u8]) -> Result<()> {
        let (weights, arena) = self.parts_mut();
        let weight = weights.get(id.index()).ok_or(Error::UnknownWeight {
            weight: id,
            weights: weights.len(),
        })?;
        let place = &mut arena[weight.bytes.clone()];
        match weight.layout {
            FloatLayout::OutIn => place[at..at + bytes.len()].copy_from_slice(bytes),
            FloatLayout::InOut => {
                for (matrix, range, part) in by_matrix(weight, at, bytes.len()) {
                    let stored =
                        &mut place[matrix * weight.matrix_bytes()..(matrix + 1) * weight.matrix_bytes()];
                    transpose::scatter(weight, range.start, &bytes[part], stored);
                }
            }
        }
        Ok(())
    }

    /// Checks what is known only once a whole weight has arrived.
    pub(crate) fn complete(&self) -> Result<()> {
        self.weights
            .iter()
            .try_for_each(|w| finite::check_prefixes(w, self.bytes(w)))
    }

    /// What is kept beside a quantised matrix's rows; nothing meaningful until [`Residency::ready_to_multiply`].
    pub(crate) fn side(&self, weight: &Resident) -> &[u8] {
        &self.arena.bytes()[weight.side.clone()]
    }

    /// Fills in what the matrix kernels keep beside rows, and lets them rearrange what is owned.
    pub(crate) fn ready_to_multiply(&mut self, weight: usize, isa: Isa, pool: &mut Pool) -> Result<()> {
        let weights = &mut self.weights;
        let Some(weight) = weights
            .get_mut(weight)
            .filter(|w| w.class == WeightClass::Quantized && !w.side_done)
        else {
            return Ok(());
        };
        let (bytes, side) = (weight.bytes.clone(), weight.side.clone());
        let (cols, rows) = (weight.shape.cols as usize, weight.shape.rows as usize);
        let (row, beside) = (weight.row_bytes(), weight.side_row_bytes());
        let prefix = weight.encoding.matrix_prefix_bytes() as usize;
        let mapping = match &weight.place {
            Place::Mapped { mapping, range } => Some((mapping.clone(), range.clone())),
            Place::Arena => None,
        };
        let mapped = mapping
            .as_ref()
            .map(|(mapping, range)| &mapping.bytes()[range.clone()]);
        let mut ranges = [bytes, side];
        ranges.sort_by_key(|r| r.start);
        let bytes_first = ranges[0] == weight.bytes;
        let mut parts = split_ascending(self.arena.bytes_mut(), &ranges).into_iter();
        let (Some(first), Some(second)) = (parts.next(), parts.next()) else {
            return Ok(());
        };
        let (bytes, side) = if bytes_first {
            (first, second)
        } else {
            (second, first)
        };
        let (owned, side) = (Disjoint::new(bytes), Disjoint::new(side));
        let failure = Mutex::new(None);
        let packed = AtomicBool::new(false);
        for matrix in 0..weight.shape.matrices as usize {
            let matrix_at = matrix * weight.matrix_bytes() + prefix;
            let grain = (MULTIPLY_PIECE / row.max(1)).max(1).next_multiple_of(isa.group());
            pool.split(rows, grain, &|_, range| {
                let at = matrix_at + range.start * row;
                let len = range.len() * row;
                // SAFETY: ranges of rows are disjoint.
                let side = unsafe { side.part((matrix * rows + range.start) * beside, range.len() * beside) };
                let result = match mapped {
                    Some(mapped) => kernels::prepare_side(weight.encoding, cols, &mapped[at..at + len], side),
                    None => {
                        // SAFETY: as above.
                        let bytes = unsafe { owned.part(at, len) };
                        kernels::prepare_side(weight.encoding, cols, bytes, side).map(|()| {
                            if kernels::pack(isa, weight.encoding, cols, bytes, side) {
                                packed.store(true, Ordering::Relaxed);
                            }
                        })
                    }
                };
                if let Err(error) = result {
                    failure
                        .lock()
                        .unwrap_or_else(|e| e.into_inner())
                        .get_or_insert(error);
                }
            });
        }
        // Nothing that was checked when it arrived can fail here.
        if let Some(error) = failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
            return Err(Error::internal(
                crate::NAME,
                format!("`{}`: {error}", weight.name),
            ));
        }
        weight.side_done = true;
        weight.packed = packed.into_inner();
        Ok(())
    }

    /// Canonical bytes where they lie, if that is how they lie.
    pub(crate) fn canonical<'a>(&'a self, weight: &'a Resident) -> Option<&'a [u8]> {
        (weight.layout == FloatLayout::OutIn && !weight.packed).then(|| self.bytes(weight))
    }

    /// Copies canonical bytes; the range is within the weight and splits no block.
    pub(crate) fn read_back(&self, isa: Isa, weight: &Resident, at: usize, out: &mut [u8]) -> Result<()> {
        if let Some(bytes) = self.canonical(weight) {
            out.copy_from_slice(&bytes[at..at + out.len()]);
            return Ok(());
        }
        let stored = self.bytes(weight);
        for (matrix, range, part) in by_matrix(weight, at, out.len()) {
            let stored = &stored[matrix * weight.matrix_bytes()..(matrix + 1) * weight.matrix_bytes()];
            if weight.packed {
                let cols = weight.shape.cols as usize;
                let (first, rows) = stored.split_at(weight.encoding.matrix_prefix_bytes() as usize);
                let in_first = range.start.min(first.len())..range.end.min(first.len());
                let (out_first, out_rows) = out[part].split_at_mut(in_first.len());
                let in_rows =
                    range.start.max(first.len()) - first.len()..range.end.max(first.len()) - first.len();
                out_first.copy_from_slice(&first[in_first]);
                kernels::unpack(isa, weight.encoding, cols, rows, in_rows, out_rows);
                continue;
            }
            transpose::gather(weight, range.start, &mut out[part], stored);
        }
        Ok(())
    }
}

/// Cuts `len` bytes from `at` on at the borders of matrices: the matrix, the range within it, the range of the bytes.
fn by_matrix(
    weight: &Resident,
    at: usize,
    len: usize,
) -> impl Iterator<Item = (usize, Range<usize>, Range<usize>)> + use<> {
    let matrix_bytes = weight.matrix_bytes();
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let (matrix, start) = ((at + done) / matrix_bytes, (at + done) % matrix_bytes);
        let n = (matrix_bytes - start).min(len - done);
        done += n;
        Some((matrix, start..start + n, done - n..done))
    })
}

fn to_range(start: u64, end: u64) -> Option<Range<usize>> {
    Some(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
}

/// Splits the arena into the disjoint pieces of `ranges`, which must ascend.
pub(crate) fn split_ascending<'a>(mut arena: &'a mut [u8], ranges: &[Range<usize>]) -> Vec<&'a mut [u8]> {
    let mut at = 0;
    let mut pieces = Vec::with_capacity(ranges.len());
    for range in ranges {
        let (_, rest) = arena.split_at_mut(range.start - at);
        let (piece, rest) = rest.split_at_mut(range.len());
        pieces.push(piece);
        arena = rest;
        at = range.end;
    }
    pieces
}

/// Whether a run of a mapping can be used as values of that encoding.
pub(crate) fn is_aligned(bytes: &[u8], encoding: Encoding) -> bool {
    let element = if encoding.is_float() {
        encoding.block_bytes() as usize
    } else {
        1
    };
    debug_assert!(element <= ALIGNMENT);
    (bytes.as_ptr() as usize).is_multiple_of(element)
}
