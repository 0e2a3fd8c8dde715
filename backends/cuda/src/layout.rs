//! What becomes of bytes on the device: pieces to their places, and private layouts made and undone.
//!
//! [`Finisher`] is called when weights are whole; [`Mover::canonical`] gives canonical bytes again. A layout that only
//! decoding needs is made after [`Finisher::launch`] on the same stream, and undone where [`Mover::canonical`] undoes the
//! transposition.

use std::ops::Range;
use std::sync::Arc;

use hoist_backend::{Encoding, Error, FloatLayout, Result, WeightClass};

use crate::driver::{DeviceBuffer, Stream};
use crate::modules::{Function, Launch, Modules, arguments};
use crate::residency::{Residency, Resident};
use crate::tables::{ITEM_BYTES, Item, Piece, PieceKind, Weight, scale_rule};

const THREADS: u32 = 256;

/// A rectangle of one matrix, part of a run of its elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rectangle {
    pub(crate) matrix: u64,
    pub(crate) row: u64,
    pub(crate) col: u64,
    pub(crate) rows: u64,
    pub(crate) cols: u64,
    /// Where in the run it starts, in elements.
    pub(crate) at: u64,
}

/// Cuts a run of elements of `[matrices, rows, cols]` into rectangles: at most the rest of a row, whole rows and the start
/// of a row for each matrix.
pub(crate) fn rectangles(rows: u64, cols: u64, run: Range<u64>) -> Vec<Rectangle> {
    let mut found = Vec::new();
    let mut at = run.start;
    while at < run.end {
        let (row_of_all, col) = (at / cols, at % cols);
        let (matrix, row) = (row_of_all / rows, row_of_all % rows);
        let left = run.end - at;
        let (n_rows, n_cols) = if col != 0 || left < cols {
            (1, left.min(cols - col))
        } else {
            ((left / cols).min(rows - row), cols)
        };
        found.push(Rectangle {
            matrix,
            row,
            col,
            rows: n_rows,
            cols: n_cols,
            at: at - run.start,
        });
        at += n_rows * n_cols;
    }
    found
}

/// Bytes of a float encoding's element.
pub(crate) fn element_bytes(encoding: Encoding) -> u64 {
    encoding.block_bytes()
}

fn unit_kind(encoding: Encoding) -> PieceKind {
    if element_bytes(encoding) == 2 {
        PieceKind::Unit2
    } else {
        PieceKind::Unit4
    }
}

/// Pieces that carry canonical bytes `offset..offset + len` of a weight that is kept `[in, out]`, from `from` in the source
/// on. Both are whole elements.
pub(crate) fn transposing_pieces(weight: &Resident, offset: u64, len: u64, from: u64) -> Vec<Piece> {
    let element = element_bytes(weight.encoding);
    let (rows, cols) = (weight.shape.rows, weight.shape.cols);
    rectangles(rows, cols, offset / element..(offset + len) / element)
        .into_iter()
        .map(|r| Piece {
            from: from + r.at * element,
            from_row: cols * element,
            from_col: element,
            to: weight.ptr + (r.matrix * rows * cols + r.col * rows + r.row) * element,
            to_row: element,
            to_col: rows * element,
            rows: r.rows as u32,
            cols: r.cols as u32,
            kind: unit_kind(weight.encoding) as u32,
            pad: 0,
        })
        .collect()
}

/// Pieces that carry canonical bytes of such a weight back, to the device address `to`; their source is the weight.
fn gathering_pieces(weight: &Resident, offset: u64, len: u64, to: u64) -> Vec<Piece> {
    let element = element_bytes(weight.encoding);
    let (rows, cols) = (weight.shape.rows, weight.shape.cols);
    rectangles(rows, cols, offset / element..(offset + len) / element)
        .into_iter()
        .map(|r| Piece {
            from: (r.matrix * rows * cols + r.col * rows + r.row) * element,
            from_row: element,
            from_col: rows * element,
            to: to + r.at * element,
            to_row: cols * element,
            to_col: element,
            rows: r.rows as u32,
            cols: r.cols as u32,
            kind: unit_kind(weight.encoding) as u32,
            pad: 0,
        })
        .collect()
}

/// Moves pieces on the device.
#[derive(Clone, Debug)]
pub(crate) struct Mover {
    move_pieces: Function,
}

impl Mover {
    pub(crate) fn new(modules: &Modules) -> Result<Self> {
        Ok(Self {
            move_pieces: modules.function("residency", "move_pieces")?,
        })
    }

    /// How `pieces` are moved.
    pub(crate) fn launch_of(&self, pieces: &[Piece]) -> Result<Launch> {
        let count = u32::try_from(pieces.len())
            .map_err(|_| Error::internal(crate::NAME, "more than 2^32 pieces in a chunk"))?;
        let blocks = pieces.iter().map(Piece::blocks).max().unwrap_or(0);
        Ok(Launch {
            grid: (count, blocks, 1),
            ..Launch::linear(count, THREADS)
        })
    }

    /// Moves the pieces that lie at the device address `table`, from the device address `base` on.
    ///
    /// # Safety
    /// `launch` is [`Mover::launch_of`] those pieces. What they name is device memory: the source from `base` on, the
    /// destinations theirs alone until the stream has passed.
    pub(crate) unsafe fn launch(&self, stream: &Stream, launch: Launch, table: u64, base: u64) -> Result<()> {
        // SAFETY: the kernel takes these two addresses; the caller upholds what they point to.
        unsafe {
            self.move_pieces
                .launch(stream, launch, &mut arguments![table, base])
        }
    }

    /// Where canonical bytes `offset..offset + len` of a weight are: where they lie, or in `scratch`, which has room for
    /// them and for the table behind them, once `stream` has passed. The range is checked.
    pub(crate) fn canonical(
        &self,
        stream: &Stream,
        weight: &Resident,
        offset: u64,
        len: u64,
        scratch: &DeviceBuffer,
    ) -> Result<u64> {
        if weight.layout == FloatLayout::OutIn {
            return Ok(weight.ptr + offset);
        }
        let pieces = gathering_pieces(weight, offset, len, scratch.ptr());
        let table_at = len.next_multiple_of(16);
        let table = scratch.ptr() + table_at;
        let bytes: &[u8] = bytemuck::cast_slice(&pieces);
        if table_at + bytes.len() as u64 > scratch.nbytes() {
            return Err(Error::internal(
                crate::NAME,
                "scratch is too small to gather a transposed weight",
            ));
        }
        // SAFETY: pageable memory, and the scratch is this call's alone.
        unsafe { stream.copy_htod(table, bytes)? };
        // SAFETY: the pieces cover whole elements of the weight and the first `len` bytes of the scratch.
        unsafe { self.launch(stream, self.launch_of(&pieces)?, table, weight.ptr)? };
        Ok(scratch.ptr())
    }
}

/// Computes what is known only once a weight is whole: its rows' exponents, and that every scale and value is a number.
#[derive(Debug)]
pub(crate) struct Finisher {
    finish_weights: Function,
    /// Device addresses of [`Weight`]s, of [`Item`]s and, for each weight, of a u64: the offset of the first NaN or infinity,
    /// all ones if there is none.
    weights: u64,
    items: u64,
    first_bad: u64,
    /// Where the items of the weight of each rank end; they start where those before end.
    ends: Vec<u32>,
    /// What the tables lie in.
    _memory: Arc<DeviceBuffer>,
}

/// The entry of a weight.
fn entry(w: &Resident) -> Result<Weight> {
    let rule = scale_rule(w.encoding)
        .ok_or_else(|| Error::internal(crate::NAME, format!("no scales of {}", w.encoding)))?;
    Ok(Weight {
        ptr: w.ptr,
        nbytes: w.nbytes,
        exponents: w.exponents,
        rows: w.rows(),
        rows_per_matrix: w.shape.rows,
        row_bytes: w.row_bytes(),
        rows_per_item: rows_per_item(w) as u32,
        block_bytes: w.encoding.block_bytes() as u32,
        prefix: w.encoding.matrix_prefix_bytes() as u32,
        scales: rule.scales as u32,
        at: rule.at,
        at2: rule.at2,
        shift: rule.shift,
        pad: 0,
    })
}

/// Rows of a quantised weight that one block of threads finishes; at most 2^16.
fn rows_per_item(w: &Resident) -> u64 {
    (ITEM_BYTES / w.row_bytes().max(1)).clamp(1, 1 << 16)
}

/// Parts that a weight is finished in.
fn parts(w: &Resident) -> u64 {
    if w.class == WeightClass::Quantized {
        w.rows().div_ceil(rows_per_item(w))
    } else {
        w.nbytes.div_ceil(ITEM_BYTES)
    }
}

/// Bytes of a [`Finisher`]'s tables on the device.
pub(crate) fn finish_bytes(residents: &[Resident]) -> u64 {
    let items = residents.iter().fold(0u64, |sum, w| sum.saturating_add(parts(w)));
    let of_weights = (size_of::<Weight>() + size_of::<u64>()) * residents.len();
    items
        .saturating_mul(size_of::<Item>() as u64)
        .saturating_add(of_weights as u64)
}

/// The tables of a [`Finisher`], for weights that arrive about in `order`: entries in the weights' own order and behind them
/// items in the order of arrival, in words; and where each rank's items end.
fn finish_tables(residents: &[Resident], order: &[u32]) -> Result<(Vec<u64>, Vec<u32>)> {
    let too_many = || Error::internal(crate::NAME, "more than 2^32 parts to finish");
    let mut words: Vec<u64> = Vec::with_capacity((finish_bytes(residents) / 8) as usize);
    for w in residents {
        words.extend_from_slice(bytemuck::cast_slice(&[entry(w)?]));
    }
    let mut ends = Vec::with_capacity(order.len());
    let mut end = 0u32;
    for &weight in order {
        let parts = u32::try_from(parts(&residents[weight as usize])).map_err(|_| too_many())?;
        for part in 0..parts {
            words.extend_from_slice(bytemuck::cast_slice(&[Item { weight, part }]));
        }
        end = end.checked_add(parts).ok_or_else(too_many)?;
        ends.push(end);
    }
    Ok((words, ends))
}

impl Finisher {
    /// For all weights, with tables of [`finish_bytes`] at the device address `at` of `memory`; ranks are places in `order`,
    /// so that weights that arrive one after the other have neighbouring ranks and are finished by one launch.
    pub(crate) fn new(
        modules: &Modules,
        stream: &Stream,
        residency: &Residency,
        order: &[u32],
        memory: Arc<DeviceBuffer>,
        at: u64,
    ) -> Result<Self> {
        let (words, ends) = finish_tables(&residency.weights, order)?;
        let tables: &[u8] = bytemuck::cast_slice(&words);
        let items = at + (residency.weights.len() * size_of::<Weight>()) as u64;
        let first_bad = at + tables.len() as u64;
        let checks = residency.weights.len() * size_of::<u64>();
        if at < memory.ptr() || first_bad + checks as u64 > memory.ptr() + memory.nbytes() {
            return Err(Error::internal(crate::NAME, "no room for the tables of a load"));
        }
        // SAFETY: pageable memory; that part of the buffer is this value's.
        unsafe { stream.copy_htod(at, tables)? };
        // SAFETY: as above.
        unsafe { stream.fill(first_bad, 0xff, checks)? };
        Ok(Self {
            finish_weights: modules.function("residency", "finish_weights")?,
            weights: at,
            items,
            first_bad,
            ends,
            _memory: memory,
        })
    }

    /// Finishes the weights of those ranks, which must have arrived; sorts the list.
    pub(crate) fn launch(&self, stream: &Stream, ranks: &mut [u32]) -> Result<()> {
        ranks.sort_unstable();
        let mut pending = 0..0;
        for &rank in ranks.iter() {
            let end = *self
                .ends
                .get(rank as usize)
                .ok_or_else(|| Error::internal(crate::NAME, "a rank without a weight"))?;
            let start = rank.checked_sub(1).map_or(0, |before| self.ends[before as usize]);
            if pending.end != start {
                self.launch_items(stream, &pending)?;
                pending.start = start;
            }
            pending.end = end;
        }
        self.launch_items(stream, &pending)
    }

    fn launch_items(&self, stream: &Stream, range: &Range<u32>) -> Result<()> {
        let items = self.items + u64::from(range.start) * size_of::<Item>() as u64;
        let (weights, first_bad) = (self.weights, self.first_bad);
        let launch = Launch::linear(range.end - range.start, THREADS);
        // SAFETY: the kernel takes these three addresses: tables of this value, whose weights lie in the arena.
        unsafe {
            self.finish_weights
                .launch(stream, launch, &mut arguments![items, weights, first_bad])
        }
    }

    /// Waits for the stream, and demands that no scale and no value was a NaN or an infinity.
    ///
    /// # Errors
    /// [`Error::NonFiniteWeight`] for the first such weight.
    pub(crate) fn check(&self, stream: &Stream, residency: &Residency) -> Result<()> {
        let mut first_bad = vec![0u64; residency.weights.len()];
        // SAFETY: the vector outlives the synchronisation that follows.
        unsafe { stream.copy_dtoh(bytemuck::cast_slice_mut(&mut first_bad), self.first_bad)? };
        stream.synchronize()?;
        for (place, (weight, stored)) in residency.weights.iter().zip(first_bad).enumerate() {
            if stored != u64::MAX {
                return Err(Error::NonFiniteWeight {
                    weight: residency.names.at(place).into(),
                    offset: canonical_offset(weight, stored),
                });
            }
        }
        Ok(())
    }
}

/// The canonical offset of what lies at an offset of a weight.
fn canonical_offset(weight: &Resident, stored: u64) -> u64 {
    if weight.layout == FloatLayout::OutIn {
        return stored;
    }
    let element = element_bytes(weight.encoding);
    let (rows, cols) = (weight.shape.rows, weight.shape.cols);
    let (matrix, within) = (stored / element / (rows * cols), stored / element % (rows * cols));
    let (col, row) = (within / rows, within % rows);
    (matrix * rows * cols + row * cols + col) * element
}

#[cfg(test)]
mod tests {
    use hoist_backend::Shape;
    use proptest::prelude::*;

    use super::*;

    fn resident(encoding: Encoding, shape: Shape, layout: FloatLayout) -> Resident {
        Resident {
            class: WeightClass::of_matrix(encoding),
            encoding,
            shape,
            layout,
            ptr: 1 << 20,
            nbytes: encoding.nbytes(shape).unwrap(),
            exponents: 0,
        }
    }

    /// What the kernel does with a piece, on the host.
    fn apply(piece: &Piece, source: &[u8], to: &mut [u8], to_base: u64) {
        let unit = if piece.kind == PieceKind::Unit2 as u32 {
            2
        } else {
            4
        };
        for r in 0..u64::from(piece.rows) {
            for c in 0..u64::from(piece.cols) {
                let from = (piece.from + r * piece.from_row + c * piece.from_col) as usize;
                let at = (piece.to + r * piece.to_row + c * piece.to_col - to_base) as usize;
                to[at..at + unit].copy_from_slice(&source[from..from + unit]);
            }
        }
    }

    proptest! {
        #[test]
        fn transposing_and_gathering_are_inverses(
            matrices in 1u64..3, rows in 1u64..9, cols in 1u64..9, f32s: bool,
            cut in 0u64..100, start in 0u64..100, len in 0u64..100,
        ) {
            let encoding = if f32s { Encoding::F32 } else { Encoding::BF16 };
            let weight = resident(encoding, Shape { matrices, rows, cols }, FloatLayout::InOut);
            let element = element_bytes(encoding);
            let elements = matrices * rows * cols;
            let canonical: Vec<u8> = (0..weight.nbytes).map(|i| i as u8).collect();
            let mut stored = vec![0xee; canonical.len()];
            // In two chunks, cut anywhere.
            let cut = cut % (elements + 1) * element;
            for (offset, n) in [(0, cut), (cut, weight.nbytes - cut)] {
                for piece in transposing_pieces(&weight, offset, n, 0) {
                    apply(&piece, &canonical[offset as usize..], &mut stored, weight.ptr);
                }
            }
            for i in 0..elements {
                let (m, r, c) = (i / (rows * cols), i / cols % rows, i % cols);
                let at = ((m * rows * cols + c * rows + r) * element) as usize;
                prop_assert_eq!(stored[at], canonical[(i * element) as usize]);
                prop_assert_eq!(canonical_offset(&weight, at as u64), i * element);
            }
            let start = start % elements;
            let len = len % (elements - start) + 1;
            let mut back = vec![0; (len * element) as usize];
            for piece in gathering_pieces(&weight, start * element, len * element, 77) {
                apply(&piece, &stored, &mut back, 77);
            }
            prop_assert_eq!(&back[..], &canonical[(start * element) as usize..((start + len) * element) as usize]);
        }
    }

    #[test]
    fn items_cover_every_row_and_byte_once_in_the_order_asked_for() {
        let weights = [
            resident(
                Encoding::Q4_K,
                Shape {
                    matrices: 2,
                    rows: 1000,
                    cols: 4096,
                },
                FloatLayout::OutIn,
            ),
            resident(Encoding::BF16, Shape::matrix(1000, 777), FloatLayout::OutIn),
            resident(Encoding::APR_Q8, Shape::matrix(3, 32), FloatLayout::OutIn),
        ];
        let (words, ends) = finish_tables(&weights, &[2, 0, 1]).unwrap();
        assert_eq!(words.len() as u64 * 8 + 3 * 8, finish_bytes(&weights));
        let (table, items) = words.split_at(3 * size_of::<Weight>() / 8);
        let (table, items): (&[Weight], &[Item]) = (bytemuck::cast_slice(table), bytemuck::cast_slice(items));
        let parts = |rank: usize| {
            let start = rank.checked_sub(1).map_or(0, |before| ends[before]);
            items[start as usize..ends[rank] as usize].to_vec()
        };
        assert!(parts(1).iter().enumerate().all(|(i, item)| *item
            == Item {
                weight: 0,
                part: i as u32
            }));
        let rows: u64 = parts(1).len() as u64 * u64::from(table[0].rows_per_item);
        assert!(rows >= 2000 && rows - u64::from(table[0].rows_per_item) < 2000);
        assert_eq!(parts(0), [Item { weight: 2, part: 0 }]);
        assert_eq!(parts(2).len() as u64, (1000 * 777 * 2u64).div_ceil(ITEM_BYTES));
        assert_eq!(ends[2] as usize, items.len());
    }
}
