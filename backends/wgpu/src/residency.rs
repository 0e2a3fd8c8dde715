//! Where each weight is: canonical bytes in a few large buffers, split by rows where a binding cannot hold them.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use hoist_backend::{
    Encoding, Error, FloatLayout, LoadPlan, MemoryByClass, Result, Shape, UnsupportedWhat, WeightClass,
    WeightId, WeightPlan,
};
use wgpu::{Buffer, BufferUsages};

use crate::device::Gpu;

/// Every weight starts at a multiple of this.
pub(crate) const ALIGNMENT: u64 = 64;

/// Bytes kept beside each row of a quantised matrix: its largest exponent, or the scale of an AprQ8 matrix.
pub(crate) const ROW_BYTES: u64 = 4;

/// What stands in front of a matrix at most: the scale of an AprQ8 one.
const PREFIX_BYTES: u64 = 4;

/// Most bytes that are read back at a time.
const READ_BYTES: u64 = 16 << 20;

/// A run of rows of a weight, counted over all of its matrices, in one buffer.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    /// Which buffer.
    pub(crate) arena: usize,
    /// Where its bytes start there.
    pub(crate) at: u64,
    /// Where the words beside its rows start there.
    pub(crate) constants: u64,
    pub(crate) first: u64,
    pub(crate) rows: u64,
    /// Where it starts in the weight's canonical bytes, and how many there are.
    pub(crate) start: u64,
    pub(crate) nbytes: u64,
}

impl Part {
    fn end(&self) -> u64 {
        self.start + self.nbytes
    }

    /// Bytes it takes.
    fn footprint(&self, beside: u64) -> u64 {
        (self.nbytes.next_multiple_of(4) + self.rows * beside).next_multiple_of(ALIGNMENT)
    }
}

/// One weight.
#[derive(Debug)]
pub(crate) struct Resident {
    pub(crate) name: String,
    pub(crate) class: WeightClass,
    pub(crate) encoding: Encoding,
    pub(crate) shape: Shape,
    pub(crate) nbytes: u64,
    pub(crate) parts: Vec<Part>,
    /// Whether the words beside its rows are there.
    pub(crate) constants_done: bool,
    /// What stands in front of its matrices, as it arrives.
    prefixes: Mutex<Vec<u8>>,
}

impl Resident {
    /// Canonical bytes of a row; without the prefix of its matrix.
    pub(crate) fn row_bytes(&self) -> u64 {
        self.shape.cols / self.encoding.block_weights() * self.encoding.block_bytes()
    }

    fn matrix_bytes(&self) -> u64 {
        self.shape.rows * self.row_bytes() + self.encoding.matrix_prefix_bytes()
    }

    /// Where row `flat` starts in canonical bytes, with the prefix in front of it if it has one.
    fn row_start(&self, flat: u64) -> u64 {
        flat * self.row_bytes() + flat.div_ceil(self.shape.rows) * self.encoding.matrix_prefix_bytes()
    }

    fn prefixes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.prefixes.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn refuse(&self, at: u64, error: &hoist_quant::Error) -> Error {
        match error {
            hoist_quant::Error::NonFinite { offset, .. } => Error::NonFiniteWeight {
                weight: self.name.clone(),
                offset: at + offset,
            },
            other => Error::internal(crate::NAME, format!("`{}`: {other}", self.name)),
        }
    }

    /// Refuses NaN and infinity among whole blocks that stand `at` bytes into the weight; keeps what is a prefix. What
    /// splits a block is passed: the ledger refuses it.
    pub(crate) fn inspect(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let prefix = self.encoding.matrix_prefix_bytes();
        if prefix == 0 {
            if !(bytes.len() as u64).is_multiple_of(self.encoding.block_bytes()) {
                return Ok(());
            }
            return hoist_quant::check_finite(self.encoding, bytes).map_err(|e| self.refuse(at, &e));
        }
        let Some(end) = at.checked_add(bytes.len() as u64).filter(|e| *e <= self.nbytes) else {
            return Ok(());
        };
        let matrix = self.matrix_bytes();
        let mut kept = self.prefixes();
        for m in at / matrix..end.div_ceil(matrix) {
            let (low, high) = ((m * matrix).max(at), (m * matrix + prefix).min(end));
            if low < high {
                let to = (m * prefix + low - m * matrix) as usize;
                let from = (low - at) as usize;
                let n = (high - low) as usize;
                kept[to..to + n].copy_from_slice(&bytes[from..from + n]);
            }
        }
        Ok(())
    }
}

/// All weights of a model.
#[derive(Debug)]
pub(crate) struct Residency {
    pub(crate) weights: Vec<Resident>,
    pub(crate) arenas: Vec<Buffer>,
    /// Words of which only some bytes have arrived, by buffer and place: value and mask.
    edges: HashMap<(usize, u64), ([u8; 4], u8)>,
    reader: Option<Buffer>,
}

/// Checks what this backend relies on; the caller has validated the model.
fn check(plan: &WeightPlan, place: usize) -> Result<()> {
    plan.check(crate::NAME, place)?;
    if plan.layout != FloatLayout::OutIn {
        return Err(Error::Unsupported {
            backend: crate::NAME.into(),
            what: UnsupportedWhat::Other(format!("the layout of `{}`, {:?}", plan.name, plan.layout)),
        });
    }
    Ok(())
}

/// Most bytes of a row whose weight can be split over buffers of `limit` bytes: a part has four rows at least, since four
/// end at a word.
pub(crate) fn most_row_bytes(limit: u64) -> u64 {
    (limit.saturating_sub(2 * ALIGNMENT) / 4).saturating_sub(ROW_BYTES + PREFIX_BYTES)
}

/// Demands that no size exceeds what the device can have.
pub(crate) fn within(what: &'static str, found: u64, limit: u64) -> Result<u64> {
    if found <= limit {
        return Ok(found);
    }
    Err(Error::Unsupported {
        backend: crate::NAME.into(),
        what: UnsupportedWhat::Limit { what, limit, found },
    })
}

fn beside(class: WeightClass) -> u64 {
    if class == WeightClass::Quantized {
        ROW_BYTES
    } else {
        0
    }
}

impl Residency {
    /// Lays the plan's weights out; `admit` sees the bytes before they are allocated. No buffer exceeds `limit`.
    pub(crate) fn new(
        plan: &LoadPlan,
        gpu: &Gpu,
        limit: u64,
        admit: impl FnOnce(u64) -> Result<()>,
    ) -> Result<Self> {
        let mut weights = Vec::with_capacity(plan.weights.len());
        let mut sizes: Vec<u64> = Vec::new();
        for (place, weight) in plan.weights.iter().enumerate() {
            check(weight, place)?;
            let mut resident = Resident {
                name: weight.name.clone(),
                class: weight.class,
                encoding: weight.encoding,
                shape: weight.shape,
                nbytes: weight.nbytes,
                parts: Vec::new(),
                constants_done: false,
                prefixes: Mutex::default(),
            };
            // The bytes of all rows fit 64 bits.
            let total = weight.shape.matrices * weight.shape.rows;
            within("rows of a weight", total, u32::MAX.into())?;
            within(
                "bytes of a row of a weight",
                resident.row_bytes(),
                most_row_bytes(limit),
            )?;
            if weight.encoding.matrix_prefix_bytes() > 0 {
                // Bounded by the weight's own bytes, which fit the plan's arena.
                *resident.prefixes() =
                    vec![0; (weight.shape.matrices * weight.encoding.matrix_prefix_bytes()) as usize];
            }
            lay_out(&mut resident, total, limit, &mut sizes);
            weights.push(resident);
        }
        admit(sizes.iter().fold(0, |sum: u64, n| sum.saturating_add(*n)))?;
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
        let arenas = sizes
            .iter()
            .map(|n| gpu.buffer("weights", *n, usage))
            .collect::<Result<_>>()?;
        Ok(Self {
            weights,
            arenas,
            edges: HashMap::new(),
            reader: None,
        })
    }

    /// The weight of that id.
    pub(crate) fn weight(&self, id: WeightId) -> Result<&Resident> {
        self.weights.get(id.index()).ok_or(Error::UnknownWeight {
            weight: id,
            weights: self.weights.len(),
        })
    }

    /// Bytes owned by class, padding included.
    pub(crate) fn memory(&self) -> MemoryByClass {
        let mut owned = MemoryByClass::default();
        for weight in &self.weights {
            *owned.class_mut(weight.class) += weight
                .parts
                .iter()
                .map(|p| p.footprint(beside(weight.class)))
                .sum::<u64>();
        }
        owned
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
                        && p.nbytes == w.nbytes
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
    pub(crate) fn write(&mut self, gpu: &Gpu, id: WeightId, at: u64, bytes: &[u8]) -> Result<()> {
        let runs: Vec<_> = runs(self.weight(id)?, at, bytes.len() as u64).collect();
        let mut rest = bytes;
        for (arena, to, n) in runs {
            let (now, later) = rest.split_at(n as usize);
            rest = later;
            self.put(gpu, arena, to, now);
        }
        gpu.check("an upload", bytes.len() as u64)
    }

    fn put(&mut self, gpu: &Gpu, arena: usize, at: u64, bytes: &[u8]) {
        let head = ((4 - at % 4) % 4).min(bytes.len() as u64) as usize;
        let (first, rest) = bytes.split_at(head);
        let (words, last) = rest.split_at(rest.len() / 4 * 4);
        let middle = at + head as u64;
        self.put_edge(gpu, arena, at, first);
        if !words.is_empty() {
            gpu.queue.write_buffer(&self.arenas[arena], middle, words);
        }
        self.put_edge(gpu, arena, middle + words.len() as u64, last);
    }

    /// Writes bytes of one word; the word goes out when all four are there.
    fn put_edge(&mut self, gpu: &Gpu, arena: usize, at: u64, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let place = (arena, at / 4 * 4);
        let (word, mask) = self.edges.entry(place).or_default();
        for (i, byte) in bytes.iter().enumerate() {
            let i = (at % 4) as usize + i;
            word[i] = *byte;
            *mask |= 1 << i;
        }
        if *mask == 15 {
            gpu.queue.write_buffer(&self.arenas[arena], place.1, word);
            self.edges.remove(&place);
        }
    }

    /// Ends a load: what is known only once everything has arrived.
    pub(crate) fn complete(&mut self, gpu: &Gpu) -> Result<()> {
        // What is left of these words is padding.
        for ((arena, at), (word, _)) in self.edges.drain() {
            gpu.queue.write_buffer(&self.arenas[arena], at, &word);
        }
        for weight in &mut self.weights {
            if weight.encoding.matrix_prefix_bytes() == 0 {
                continue;
            }
            let scales: Vec<[u8; 4]> = weight.prefixes().as_chunks::<4>().0.to_vec();
            for (m, scale) in scales.iter().enumerate() {
                hoist_quant::check_finite(weight.encoding, scale)
                    .map_err(|e| weight.refuse(m as u64 * weight.matrix_bytes(), &e))?;
            }
            for part in &weight.parts {
                let words: Vec<u8> = (part.first..part.first + part.rows)
                    .flat_map(|flat| scales[(flat / weight.shape.rows) as usize])
                    .collect();
                gpu.queue
                    .write_buffer(&self.arenas[part.arena], part.constants, &words);
            }
            weight.constants_done = true;
        }
        gpu.queue.submit([]);
        gpu.wait("uploads")
    }

    /// Copies canonical bytes to the host.
    pub(crate) fn read(&mut self, gpu: &Gpu, id: WeightId, offset: u64, out: &mut [u8]) -> Result<()> {
        let runs: Vec<_> = runs(self.weight(id)?, offset, out.len() as u64).collect();
        if self.reader.is_none() {
            let usage = BufferUsages::MAP_READ | BufferUsages::COPY_DST;
            self.reader = Some(gpu.buffer("what is read back", READ_BYTES + 8, usage)?);
        }
        let Some(reader) = &self.reader else {
            return Err(Error::internal(crate::NAME, "nothing to read back through"));
        };
        let mut rest = out;
        for (arena, at, n) in runs {
            for done in (0..n).step_by(READ_BYTES as usize) {
                let len = READ_BYTES.min(n - done);
                let (now, later) = std::mem::take(&mut rest).split_at_mut(len as usize);
                rest = later;
                let (from, to) = ((at + done) / 4 * 4, (at + done + len).next_multiple_of(4));
                let mut encoder = gpu.device.create_command_encoder(&Default::default());
                encoder.copy_buffer_to_buffer(&self.arenas[arena], from, reader, 0, to - from);
                gpu.queue.submit([encoder.finish()]);
                let skip = (at + done - from) as usize;
                read_mapped(gpu, reader, to - from, |bytes| {
                    now.copy_from_slice(&bytes[skip..skip + now.len()]);
                })?;
            }
        }
        Ok(())
    }
}

/// Maps the first `len` bytes of a buffer, shows them, and unmaps it.
pub(crate) fn read_mapped(gpu: &Gpu, buffer: &Buffer, len: u64, show: impl FnOnce(&[u8])) -> Result<()> {
    let slice = buffer.slice(..len);
    slice.map_async(wgpu::MapMode::Read, |_| {});
    gpu.wait("reading back")?;
    let view = slice
        .get_mapped_range()
        .map_err(|e| Error::internal(crate::NAME, format!("mapping: {e}")))?;
    show(&view);
    drop(view);
    buffer.unmap();
    Ok(())
}

/// Where a range of canonical bytes lies: buffer, place, length.
fn runs(weight: &Resident, at: u64, len: u64) -> impl Iterator<Item = (usize, u64, u64)> {
    let end = at.saturating_add(len);
    weight.parts.iter().filter_map(move |part| {
        let (low, high) = (part.start.max(at), part.end().min(end));
        (low < high).then(|| (part.arena, part.at + low - part.start, high - low))
    })
}

/// Gives a weight its parts, in the last buffer or in new ones.
fn lay_out(weight: &mut Resident, total: u64, limit: u64, sizes: &mut Vec<u64>) {
    let beside = beside(weight.class);
    let mut first = 0;
    while first < total {
        let span = |rows: u64| {
            let start = weight.row_start(first);
            let end = if first + rows == total {
                weight.nbytes
            } else {
                weight.row_start(first + rows)
            };
            (start, end - start)
        };
        let footprint = |rows: u64| {
            let bytes = span(rows).1.next_multiple_of(4);
            (bytes + rows * beside).next_multiple_of(ALIGNMENT)
        };
        let mut rows = total - first;
        if footprint(rows) > limit {
            // Prefixes are counted once too often, and padding once too much.
            let each = weight.row_bytes() + beside + weight.encoding.matrix_prefix_bytes();
            // A multiple of four rows ends at a word, and four fit: see `most_row_bytes`.
            rows = limit.saturating_sub(2 * ALIGNMENT) / each / 4 * 4;
        }
        let needed = footprint(rows);
        let arena = match sizes.last() {
            Some(last) if *last + needed <= limit => sizes.len() - 1,
            _ => {
                sizes.push(0);
                sizes.len() - 1
            }
        };
        let (start, nbytes) = span(rows);
        let at = sizes[arena];
        weight.parts.push(Part {
            arena,
            at,
            constants: at + nbytes.next_multiple_of(4),
            first,
            rows,
            start,
            nbytes,
        });
        sizes[arena] += needed;
        first += rows;
    }
}
