//! What is read in which order, and where it goes: pure arithmetic over a plan and an arena.
//!
//! Chunks follow the bytes of the files, never tensors: neighbouring tensors share a chunk. A chunk of a few whole runs is
//! copied to their places at once; one of many small tensors, or of values that change, goes to a staging buffer on the
//! device together with a table of pieces, which a kernel then moves.
//!
//! Nothing is read before the schedule is there, so that it holds no more than the sorted runs and where they are cut:
//! each reader makes the table of the chunk in its hands.

use hoist_backend::{
    Encoding, Error, FloatLayout, LoadPlan, Result, SourceFile, SourceView, ValueChange, WeightId, WeightPlan,
};

use crate::layout::{element_bytes, transposing_pieces};
use crate::residency::{Resident, TOUCHED_WEIGHTS};
use crate::tables::{ADD_ONE, Piece, PieceKind};

/// Pages that direct I/O reads; offsets in the file and in the ring agree modulo this.
pub(crate) const PAGE: u64 = 4096;
/// Most bytes of a chunk: a slot of 4 MiB less a page before and after and a table. At 4 MiB a copy reaches 94 % of the
/// rate of the largest ones. (One slot of 8 MiB a thread instead of two of these was slower on an H100: 37 to 40 GB/s for
/// 45.)
pub(crate) const CHUNK_BYTES: u64 = (4 << 20) - 2 * PAGE - TABLE_BYTES;
/// Bytes that chunks shrink to where readers end.
const LAST_CHUNK_BYTES: u64 = 1 << 20;
/// Most bytes that are read through the source at a time.
pub(crate) const STEP_BYTES: u64 = 3 << 20;
/// Most pieces of a staged chunk: small tensors of 4 KiB still fill it.
pub(crate) const MAX_PIECES: usize = 1024;
/// Bytes of a table of pieces.
pub(crate) const TABLE_BYTES: u64 = (MAX_PIECES * size_of::<Piece>()) as u64;
/// Most copies that a chunk is worth without staging.
const MAX_COPIES: usize = 4;
/// Bytes between two runs that are rather read than skipped.
const MAX_GAP: u64 = 64 << 10;
/// Rows of a fused tensor below this are not worth a run each.
const MIN_ROW_RUN: u64 = 512;
/// Most matrices of a transposed weight in one chunk: three pieces each.
const MAX_MATRICES: u64 = 256;

/// What becomes of a run's bytes on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// They stay as they are.
    Kept,
    /// Values of `from` bytes become values of 4: the kernel's kind.
    Changed { kind: u32, from: u8 },
    /// Values of so many bytes change places.
    Transposed { element: u8 },
}

impl Way {
    /// Canonical bytes for so many source bytes.
    fn canonical(self, source: u64) -> u64 {
        match self {
            Way::Changed { from, .. } => source / u64::from(from) * 4,
            Way::Kept | Way::Transposed { .. } => source,
        }
    }

    /// Source bytes that are not cut.
    fn element(self) -> u64 {
        match self {
            Way::Kept => 1,
            Way::Changed { from, .. } => from.into(),
            Way::Transposed { element } => element.into(),
        }
    }
}

/// Contiguous source bytes of one weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    file: u32,
    weight: u32,
    offset: u64,
    nbytes: u64,
    /// Canonical bytes before it.
    at: u64,
    way: Way,
}

/// What is in a chunk, and how it gets to its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// Runs that are copied to their places.
    Copied(Runs),
    /// Runs that are staged, then moved by a kernel.
    Staged(Runs),
    /// Lines of a view of single values with gaps, staged too: an index into [`Schedule::strided`].
    Strided(u32),
}

/// Neighbouring runs, as many of their bytes as lie in a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Runs {
    first: u32,
    count: u32,
    /// Bytes of the first that lie in chunks before.
    skipped: u64,
}

/// Bytes `start..end` of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) file: u32,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) what: What,
}

impl Chunk {
    pub(crate) fn nbytes(&self) -> u64 {
        self.end - self.start
    }

    pub(crate) fn is_staged(&self) -> bool {
        !matches!(self.what, What::Copied(_))
    }
}

/// The piece of a strided chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Strided {
    weight: u32,
    /// Canonical bytes it yields.
    nbytes: u64,
    piece: Piece,
}

/// Part of a run: what one chunk holds of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) weight: u32,
    /// From the chunk's first byte.
    pub(crate) from: u64,
    pub(crate) nbytes: u64,
    /// Canonical bytes before it.
    pub(crate) at: u64,
    way: Way,
}

impl Part {
    /// Canonical bytes that it yields.
    pub(crate) fn canonical(&self) -> u64 {
        self.way.canonical(self.nbytes)
    }
}

/// Memory of the host that a schedule is made in, kept from load to load: see [`crate::residency::Books`].
#[derive(Debug, Default)]
pub(crate) struct Desk {
    /// In the order of the plan.
    planned: Vec<Run>,
    /// In the order of the files.
    sorted: Vec<Run>,
    /// File, offset and number of each planned run.
    keys: Vec<u128>,
}

impl Desk {
    /// Memory that has been touched.
    pub(crate) fn touched() -> Self {
        let nothing = Run {
            file: 0,
            weight: 0,
            offset: 0,
            nbytes: 0,
            at: 0,
            way: Way::Kept,
        };
        let mut desk = Self {
            planned: vec![nothing; TOUCHED_WEIGHTS],
            sorted: vec![nothing; TOUCHED_WEIGHTS],
            keys: vec![1; TOUCHED_WEIGHTS],
        };
        desk.clear();
        desk
    }

    fn clear(&mut self) {
        self.planned.clear();
        self.sorted.clear();
        self.keys.clear();
    }

    /// Puts the planned runs into the order of the files.
    fn sort(&mut self) -> Result<()> {
        // Keys are sorted several times as fast as runs.
        for (number, run) in self.planned.iter().enumerate() {
            let number: u32 = small(number as u64)?;
            self.keys
                .push(u128::from(run.file) << 96 | u128::from(run.offset) << 32 | u128::from(number));
        }
        self.keys.sort_unstable();
        let runs = self.keys.iter().map(|key| self.planned[*key as u32 as usize]);
        self.sorted.extend(runs);
        Ok(())
    }
}

/// Everything that is read.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    /// In the order of the files.
    pub(crate) chunks: Vec<Chunk>,
    desk: Desk,
    strided: Vec<Strided>,
    /// Weights that only the source can read: views that no rule here covers.
    pub(crate) through_source: Vec<WeightId>,
}

/// The kernel's kind for values that change; `None` if they do not.
fn change_kind(plan: &WeightPlan) -> Option<u32> {
    let widen = |from| match from {
        Encoding::F16 => PieceKind::WidenF16 as u32,
        Encoding::BF16 => PieceKind::WidenBf16 as u32,
        _ => PieceKind::Unit4 as u32,
    };
    match plan.change {
        ValueChange::Keep | ValueChange::Widen { from: Encoding::F32 } => None,
        ValueChange::Widen { from } => Some(widen(from)),
        ValueChange::WidenAddOne { from } => Some(widen(from) | ADD_ONE),
    }
}

/// Canonical bytes for so many source bytes.
fn canonical_bytes(plan: &WeightPlan, source: u64) -> u64 {
    match plan.change.source_encoding() {
        Some(from) => source / from.block_bytes() * 4,
        None => source,
    }
}

/// Builds the schedule.
///
/// # Errors
/// [`Error::InvalidArgument`] for a view of a file that is not there, or past its end.
pub(crate) fn schedule(
    plan: &LoadPlan,
    residents: &[Resident],
    files: &[SourceFile],
    mut desk: Desk,
) -> Result<Schedule> {
    desk.clear();
    let mut schedule = Schedule::default();
    for (weight, resident) in plan.weights.iter().zip(residents) {
        check_views(weight, files)?;
        let before = (desk.planned.len(), schedule.chunks.len(), schedule.strided.len());
        if !add_weight(weight, resident, &mut desk.planned, &mut schedule)? {
            desk.planned.truncate(before.0);
            schedule.chunks.truncate(before.1);
            schedule.strided.truncate(before.2);
            schedule.through_source.push(weight.id);
        }
    }
    desk.sort()?;
    let strided = !schedule.chunks.is_empty();
    pack(residents, &desk.sorted, &mut schedule.chunks)?;
    if strided {
        schedule.chunks.sort_by_key(|chunk| (chunk.file, chunk.start));
    }
    schedule.desk = desk;
    Ok(schedule)
}

impl Schedule {
    /// The parts of runs in a chunk; none of a strided one.
    pub(crate) fn parts(&self, chunk: &Chunk) -> impl Iterator<Item = Part> + '_ {
        let (Chunk { start, end, .. }, runs) = (*chunk, chunk.runs());
        let first = runs.first as usize;
        let cut = self
            .desk
            .sorted
            .get(first..first + runs.count as usize)
            .unwrap_or(&[]);
        cut.iter().enumerate().map(move |(i, run)| {
            let done = if i == 0 { runs.skipped } else { 0 };
            let from = run.offset + done - start;
            Part {
                weight: run.weight,
                from,
                nbytes: (run.nbytes - done).min(end - start - from),
                at: run.at + run.way.canonical(done),
                way: run.way,
            }
        })
    }

    /// Canonical bytes of weights that are in place once a chunk has arrived.
    pub(crate) fn arrivals(&self, chunk: &Chunk) -> impl Iterator<Item = (u32, u64)> + '_ {
        let strided = match chunk.what {
            What::Strided(index) => self.strided.get(index as usize).map(|s| (s.weight, s.nbytes)),
            What::Copied(_) | What::Staged(_) => None,
        };
        let parts = self.parts(chunk).map(|part| (part.weight, part.canonical()));
        parts.chain(strided)
    }

    /// Writes a staged chunk's pieces, which count from its first byte; how many there are.
    ///
    /// # Errors
    /// [`Error::Internal`] if there is no room for them.
    pub(crate) fn pieces(&self, chunk: &Chunk, residents: &[Resident], out: &mut [Piece]) -> Result<usize> {
        let mut count = 0;
        let mut push = |piece| {
            let place = out.get_mut(count).ok_or_else(too_many_pieces)?;
            *place = piece;
            count += 1;
            Ok::<_, Error>(())
        };
        if let What::Strided(index) = chunk.what {
            let strided = self.strided.get(index as usize).ok_or_else(too_many_pieces)?;
            push(strided.piece)?;
        }
        for part in self.parts(chunk) {
            let resident = &residents[part.weight as usize];
            let to = resident.ptr + part.at;
            match part.way {
                Way::Kept => push(Piece::bytes(part.from, to, part.nbytes as u32))?,
                Way::Changed { kind, from } => push(Piece {
                    from: part.from,
                    from_row: 0,
                    from_col: from.into(),
                    to,
                    to_row: 0,
                    to_col: element_bytes(resident.encoding),
                    rows: 1,
                    cols: (part.nbytes / u64::from(from)) as u32,
                    kind,
                    pad: 0,
                })?,
                Way::Transposed { .. } => transposing_pieces(resident, part.at, part.nbytes, part.from)
                    .into_iter()
                    .try_for_each(&mut push)?,
            }
        }
        Ok(count)
    }

    /// The memory it was made in.
    pub(crate) fn into_desk(self) -> Desk {
        self.desk
    }

    /// The `weights` weights in the order in which they become whole, about.
    pub(crate) fn order(&self, weights: usize) -> Vec<u32> {
        let mut seen = vec![false; weights];
        let mut order = Vec::with_capacity(weights);
        let through_source = self.through_source.iter().map(|w| w.0);
        let arriving = self
            .chunks
            .iter()
            .flat_map(|chunk| self.arrivals(chunk).map(|(weight, _)| weight));
        for weight in arriving.chain(through_source) {
            if !std::mem::replace(&mut seen[weight as usize], true) {
                order.push(weight);
            }
        }
        order
    }
}

impl Chunk {
    fn runs(&self) -> Runs {
        match self.what {
            What::Copied(runs) | What::Staged(runs) => runs,
            What::Strided(_) => Runs {
                first: 0,
                count: 0,
                skipped: 0,
            },
        }
    }
}

pub(super) fn too_many_pieces() -> Error {
    Error::internal(crate::NAME, "a chunk of too many pieces")
}

fn check_views(weight: &WeightPlan, files: &[SourceFile]) -> Result<()> {
    let mut total = 0u64;
    for view in &weight.views {
        let len = files.get(view.file as usize).map(|f| f.len);
        let end = (|| {
            let down = view.rows.checked_sub(1)?.checked_mul(view.row_stride)?;
            let right = view.cols.checked_sub(1)?.checked_mul(view.col_stride)?;
            view.offset
                .checked_add(down)?
                .checked_add(right)?
                .checked_add(view.unit)
        })();
        let nbytes = view
            .rows
            .checked_mul(view.cols)
            .and_then(|n| n.checked_mul(view.unit));
        match (len, end, nbytes.and_then(|n| total.checked_add(n))) {
            (Some(len), Some(end), Some(sum)) if end <= len => total = sum,
            _ => {
                return Err(Error::invalid(
                    format!("a view of `{}`", weight.name),
                    "within its file",
                    format!("{view:?}"),
                ));
            }
        }
    }
    if canonical_bytes(weight, total) != weight.nbytes {
        return Err(Error::invalid(
            format!("bytes that the views of `{}` yield", weight.name),
            weight.nbytes,
            canonical_bytes(weight, total),
        ));
    }
    Ok(())
}

/// Adds a weight's runs and strided chunks; `false` if a view is neither.
fn add_weight(
    weight: &WeightPlan,
    resident: &Resident,
    runs: &mut Vec<Run>,
    schedule: &mut Schedule,
) -> Result<bool> {
    let way = match change_kind(weight) {
        Some(_) if resident.layout == FloatLayout::InOut => return Ok(false),
        Some(kind) => Way::Changed {
            kind,
            from: small(source_element(weight))?,
        },
        None if resident.layout == FloatLayout::InOut => Way::Transposed {
            element: small(source_element(weight))?,
        },
        None => Way::Kept,
    };
    let mut at = 0;
    for view in &weight.views {
        let mut run = |offset, nbytes, at| {
            runs.push(Run {
                file: view.file,
                weight: weight.id.0,
                offset,
                nbytes,
                at,
                way,
            });
        };
        let row_bytes = view.cols * view.unit;
        let rows_are_runs = view.cols == 1 || view.col_stride == view.unit;
        if let Some((offset, nbytes)) = view.as_contiguous() {
            // A run is cut between elements, wherever it starts.
            if nbytes % way.element() != 0 {
                return Ok(false);
            }
            run(offset, nbytes, at);
        } else if rows_are_runs && row_bytes >= MIN_ROW_RUN && row_bytes % source_element(weight) == 0 {
            for r in 0..view.rows {
                let before = canonical_bytes(weight, r * row_bytes);
                run(view.offset + r * view.row_stride, row_bytes, at + before);
            }
        } else if !add_strided(weight, resident, view, at, schedule)? {
            return Ok(false);
        }
        at += canonical_bytes(weight, view.nbytes());
    }
    Ok(true)
}

fn source_element(plan: &WeightPlan) -> u64 {
    plan.change
        .source_encoding()
        .map_or(plan.granule(), Encoding::block_bytes)
}

fn small<T: TryFrom<u64>>(n: u64) -> Result<T> {
    T::try_from(n).map_err(|_| Error::internal(crate::NAME, format!("{n} is too many for a schedule")))
}

/// Chunks of a view of single elements with gaps: whole lines along its larger stride.
fn add_strided(
    weight: &WeightPlan,
    resident: &Resident,
    view: &SourceView,
    at: u64,
    schedule: &mut Schedule,
) -> Result<bool> {
    let element = source_element(weight);
    let to_element = weight.encoding.block_bytes();
    if !weight.encoding.is_float() || view.unit != element {
        return Ok(false);
    }
    let whole = weight.views.len() == 1 && weight.shape.matrices == 1;
    let fits = view.rows == weight.shape.rows && view.cols == weight.shape.cols;
    if resident.layout == FloatLayout::InOut && !(whole && fits) {
        return Ok(false);
    }
    let kind = change_kind(weight).unwrap_or(if element == 2 {
        PieceKind::Unit2 as u32
    } else {
        PieceKind::Unit4 as u32
    });
    let by_cols = view.col_stride > view.row_stride;
    let (lines, stride, along, along_stride) = if by_cols {
        (view.cols, view.col_stride, view.rows, view.row_stride)
    } else {
        (view.rows, view.row_stride, view.cols, view.col_stride)
    };
    let span = (along - 1) * along_stride + view.unit;
    if span > CHUNK_BYTES || view.rows > u64::from(u32::MAX) || view.cols > u64::from(u32::MAX) {
        return Ok(false);
    }
    // So many that the last one's span still fits.
    let step = ((CHUNK_BYTES - span) / stride.max(1) + 1).min(1 << 20);
    let (to_row, to_col) = match resident.layout {
        FloatLayout::OutIn => (view.cols * to_element, to_element),
        FloatLayout::InOut => (to_element, view.rows * to_element),
    };
    let mut first = 0;
    while first < lines {
        let n = step.min(lines - first);
        let start = view.offset + first * stride;
        let (rows, cols, row, col) = if by_cols {
            (view.rows, n, 0, first)
        } else {
            (n, view.cols, first, 0)
        };
        schedule.chunks.push(Chunk {
            file: view.file,
            start,
            end: start + (n - 1) * stride + span,
            what: What::Strided(small(schedule.strided.len() as u64)?),
        });
        schedule.strided.push(Strided {
            weight: weight.id.0,
            nbytes: rows * cols * to_element,
            piece: Piece {
                from: 0,
                from_row: view.row_stride,
                from_col: view.col_stride,
                to: resident.ptr + at + row * to_row + col * to_col,
                to_row,
                to_col,
                rows: rows as u32,
                cols: cols as u32,
                kind,
                pad: 0,
            },
        });
        first += n;
    }
    Ok(true)
}

/// A place among the sorted runs.
#[derive(Clone, Copy)]
struct Cursor {
    run: usize,
    /// Bytes of that run that are scheduled.
    done: u64,
}

/// What is taken into one chunk.
struct Taken {
    start: u64,
    end: u64,
    runs: usize,
    /// Whether all of it stays as it is.
    plain: bool,
    next: Cursor,
}

/// Takes what follows the cursor, up to `limit` bytes from the page of its first byte on and `most` pieces; `None` behind the
/// last run.
fn take(residents: &[Resident], runs: &[Run], cursor: Cursor, limit: u64, most: usize) -> Option<Taken> {
    let first = runs.get(cursor.run)?;
    let start = first.offset + cursor.done;
    let limit = start / PAGE * PAGE + limit;
    let mut taken = Taken {
        start,
        end: start,
        runs: 0,
        plain: true,
        next: cursor,
    };
    let mut pieces = 0;
    while let Some(run) = runs.get(taken.next.run) {
        let position = run.offset + taken.next.done;
        let end = taken.end;
        if run.file != first.file || position < end || position > end + MAX_GAP || position >= limit {
            break;
        }
        let left = run.nbytes - taken.next.done;
        let mut nbytes = left.min(limit - position);
        let transposed = matches!(run.way, Way::Transposed { .. });
        pieces += if transposed { 3 * MAX_MATRICES as usize } else { 1 };
        if taken.runs > 0 && pieces > most {
            break;
        }
        if transposed {
            let matrix = residents[run.weight as usize].matrix_bytes();
            nbytes = nbytes.min(MAX_MATRICES.saturating_sub(2).max(1) * matrix);
        }
        if nbytes < left {
            nbytes -= nbytes % run.way.element();
            if nbytes == 0 {
                break;
            }
        }
        taken.runs += 1;
        taken.plain &= run.way == Way::Kept;
        taken.end = position + nbytes;
        if nbytes < left {
            taken.next.done += nbytes;
            break;
        }
        taken.next = Cursor {
            run: taken.next.run + 1,
            done: 0,
        };
    }
    Some(taken)
}

/// Bytes of the chunk that follows `chunks` others and has `left` bytes behind its start.
///
/// The first ones are of different sizes, so that copies start soon and the readers do not go in step. The last ones are
/// small, so that all readers end at about the same time.
fn limit(chunks: usize, left: u64) -> u64 {
    const READERS: u64 = super::MAX_THREADS as u64;
    let early = (chunks as u64 + 1).saturating_mul(CHUNK_BYTES / READERS);
    let late = (left / (2 * READERS)).max(LAST_CHUNK_BYTES);
    early.min(late).min(CHUNK_BYTES).next_multiple_of(PAGE)
}

/// Cuts the sorted runs into chunks.
fn pack(residents: &[Resident], runs: &[Run], chunks: &mut Vec<Chunk>) -> Result<()> {
    let mut left = runs.iter().fold(0u64, |sum, run| sum.saturating_add(run.nbytes));
    let mut cursor = Cursor { run: 0, done: 0 };
    let before = chunks.len();
    while cursor.run < runs.len() {
        let limit = limit(chunks.len() - before, left);
        let mut taken = take(residents, runs, cursor, limit, MAX_COPIES + 1);
        let copied = taken.as_ref().is_some_and(|t| t.plain && t.runs <= MAX_COPIES);
        if !copied {
            taken = take(residents, runs, cursor, limit, MAX_PIECES);
        }
        let Some(taken) = taken.filter(|t| t.runs > 0) else {
            return Err(Error::internal(crate::NAME, "a run that no chunk takes"));
        };
        let of = Runs {
            first: small(cursor.run as u64)?,
            count: small(taken.runs as u64)?,
            skipped: cursor.done,
        };
        chunks.push(Chunk {
            file: runs[cursor.run].file,
            start: taken.start,
            end: taken.end,
            what: if taken.plain && taken.runs <= MAX_COPIES {
                What::Copied(of)
            } else {
                What::Staged(of)
            },
        });
        left = left.saturating_sub(taken.end - taken.start);
        cursor = taken.next;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use hoist_backend::{Shape, WeightClass};
    use proptest::prelude::*;

    use super::*;
    use crate::residency::tests::{plan_of, planned};

    fn file(len: u64) -> SourceFile {
        SourceFile {
            path: "m".into(),
            len,
            file: None,
            identity: None,
        }
    }

    fn residents(plan: &LoadPlan) -> (Vec<Resident>, u64) {
        let mut at = 0;
        let weights = plan
            .weights
            .iter()
            .map(|w| {
                let resident = Resident {
                    class: w.class,
                    encoding: w.encoding,
                    shape: w.shape,
                    layout: w.layout,
                    ptr: at,
                    nbytes: w.nbytes,
                    exponents: 0,
                };
                at += w.nbytes.next_multiple_of(256);
                resident
            })
            .collect();
        (weights, at)
    }

    /// Executes a schedule on the host, as the ring and the kernel do.
    fn execute(schedule: &Schedule, residents: &[Resident], source: &[u8], arena: u64) -> Vec<u8> {
        let mut to = vec![0xee; arena as usize];
        let mut table = vec![Piece::bytes(0, 0, 0); MAX_PIECES];
        for chunk in &schedule.chunks {
            assert!(chunk.start < chunk.end && chunk.end <= source.len() as u64);
            assert!(chunk.end - chunk.start / PAGE * PAGE <= PAGE + CHUNK_BYTES);
            let bytes = &source[chunk.start as usize..chunk.end as usize];
            if chunk.is_staged() {
                let count = schedule.pieces(chunk, residents, &mut table).unwrap();
                table[..count].iter().for_each(|p| apply(p, bytes, &mut to));
                continue;
            }
            assert!(schedule.parts(chunk).count() <= MAX_COPIES);
            for part in schedule.parts(chunk) {
                let to_at = (residents[part.weight as usize].ptr + part.at) as usize;
                let (from, n) = (part.from as usize, part.nbytes as usize);
                to[to_at..to_at + n].copy_from_slice(&bytes[from..from + n]);
            }
        }
        to
    }

    fn apply(p: &Piece, source: &[u8], to: &mut [u8]) {
        if p.kind == PieceKind::Bytes as u32 {
            let (at, from, n) = (p.to as usize, p.from as usize, p.cols as usize);
            to[at..at + n].copy_from_slice(&source[from..from + n]);
            return;
        }
        for r in 0..u64::from(p.rows) {
            for c in 0..u64::from(p.cols) {
                let s = &source[(p.from + r * p.from_row + c * p.from_col) as usize..];
                let d = (p.to + r * p.to_row + c * p.to_col) as usize;
                let two = u16::from_le_bytes([s[0], s[1]]);
                match p.kind & 0xff {
                    1 => to[d..d + 2].copy_from_slice(&s[..2]),
                    k => {
                        let mut value = match k {
                            2 => f32::from_le_bytes([s[0], s[1], s[2], s[3]]),
                            4 => f32::from_bits(u32::from(two) << 16),
                            other => panic!("kind {other}"),
                        };
                        if p.kind & ADD_ONE != 0 {
                            value += 1.0;
                        }
                        to[d..d + 4].copy_from_slice(&value.to_le_bytes());
                    }
                }
            }
        }
    }

    /// Canonical bytes of a weight, straight from its definition.
    fn canonical(w: &WeightPlan, source: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for v in &w.views {
            for r in 0..v.rows {
                for c in 0..v.cols {
                    let at = (v.offset + r * v.row_stride + c * v.col_stride) as usize;
                    bytes.extend_from_slice(&source[at..at + v.unit as usize]);
                }
            }
        }
        match w.change {
            ValueChange::Keep => bytes,
            ValueChange::Widen { .. } | ValueChange::WidenAddOne { .. } => bytes
                .chunks_exact(2)
                .map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16))
                .map(|x| {
                    if matches!(w.change, ValueChange::WidenAddOne { .. }) {
                        x + 1.0
                    } else {
                        x
                    }
                })
                .flat_map(f32::to_le_bytes)
                .collect(),
        }
    }

    fn stored(w: &WeightPlan, canonical: &[u8]) -> Vec<u8> {
        if w.layout == FloatLayout::OutIn {
            return canonical.to_vec();
        }
        let e = w.encoding.block_bytes() as usize;
        let (rows, cols) = (w.shape.rows as usize, w.shape.cols as usize);
        let mut out = vec![0; canonical.len()];
        for (i, value) in canonical.chunks_exact(e).enumerate() {
            let (m, r, c) = (i / (rows * cols), i / cols % rows, i % cols);
            let at = (m * rows * cols + c * rows + r) * e;
            out[at..at + e].copy_from_slice(value);
        }
        out
    }

    fn check(plan: &LoadPlan, len: u64) -> Schedule {
        let source: Vec<u8> = (0..len)
            .map(|i| ((i * 2_654_435_761) >> 13) as u8 & 0x3f)
            .collect();
        let (residents, arena) = residents(plan);
        let schedule = schedule(plan, &residents, &[file(len)], Desk::default()).unwrap();
        let arena = execute(&schedule, &residents, &source, arena);
        let mut arrived = vec![0; plan.weights.len()];
        for (w, n) in schedule.chunks.iter().flat_map(|c| schedule.arrivals(c)) {
            arrived[w as usize] += n;
        }
        for (w, r) in plan.weights.iter().zip(&residents) {
            if schedule.through_source.contains(&w.id) {
                continue;
            }
            let at = r.ptr as usize;
            assert_eq!(arrived[w.id.index()], w.nbytes, "{}", w.name);
            assert!(
                arena[at..at + w.nbytes as usize] == stored(w, &canonical(w, &source)),
                "{}",
                w.name
            );
        }
        let mut order = schedule.order(plan.weights.len());
        order.sort_unstable();
        assert_eq!(order, (0..plan.weights.len() as u32).collect::<Vec<_>>());
        schedule
    }

    #[test]
    fn a_large_tensor_goes_by_pages_and_whole_chunks() {
        let w = planned(0, Encoding::BF16, Shape::matrix(4096, 1501), 4096 + 10);
        let len = w.nbytes + 9000;
        let schedule = check(&plan_of(vec![w]), len);
        assert!(
            schedule
                .chunks
                .iter()
                .all(|c| !c.is_staged() && schedule.parts(c).count() == 1)
        );
        assert!(schedule.chunks[1..].iter().all(|c| c.start % PAGE == 0));
    }

    #[test]
    fn chunks_grow_to_a_slot_and_shrink_to_the_end() {
        let w = planned(0, Encoding::BF16, Shape::matrix(256 << 10, 1024), 0);
        let plan = plan_of(vec![w]);
        let (residents, len) = residents(&plan);
        let chunks = schedule(&plan, &residents, &[file(len)], Desk::default())
            .unwrap()
            .chunks;
        let sizes: Vec<u64> = chunks.iter().map(Chunk::nbytes).collect();
        let largest = sizes.iter().position(|n| *n == CHUNK_BYTES).unwrap();
        assert_eq!(largest, super::super::MAX_THREADS - 1);
        assert!(sizes[..=largest].is_sorted_by(|a, b| a < b), "{sizes:?}");
        assert!(sizes[largest..].is_sorted_by(|a, b| a >= b), "{sizes:?}");
        assert!(
            sizes[sizes.len() - 2] == LAST_CHUNK_BYTES && sizes.len() < 200,
            "{sizes:?}"
        );
    }

    #[test]
    fn thousands_of_small_tensors_share_chunks() {
        let mut at = 100;
        let weights: Vec<_> = (0..3000)
            .map(|i| {
                let w = planned(i, Encoding::F32, Shape::vector(700 + u64::from(i) % 3), at);
                at += w.nbytes + u64::from(i % 2) * 4;
                w
            })
            .collect();
        let schedule = check(&plan_of(weights), at + 50);
        // The largest that they may be, at the end of a load.
        let least = at.div_ceil(LAST_CHUNK_BYTES) as usize;
        assert!(schedule.chunks.len() <= least + 4, "{}", schedule.chunks.len());
    }

    #[test]
    fn a_view_past_the_end_of_its_file_is_refused() {
        let w = planned(0, Encoding::F32, Shape::vector(100), 10);
        let plan = plan_of(vec![w]);
        let (residents, _) = residents(&plan);
        assert!(schedule(&plan, &residents, &[file(409)], Desk::default()).is_err());
        assert!(schedule(&plan, &residents, &[], Desk::default()).is_err());
        schedule(&plan, &residents, &[file(410)], Desk::default()).unwrap();
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_kind_of_view_arrives_where_its_definition_says(
            kinds in prop::collection::vec((0u32..7, 1u64..40, 1u64..300, 0u64..70), 1..24),
            shuffle in any::<u64>(),
        ) {
            let mut at = 7;
            let mut weights = Vec::new();
            for (i, (kind, rows, cols, gap)) in kinds.iter().copied().enumerate() {
                at += gap;
                let id = i as u32;
                let mut w = planned(id, Encoding::BF16, Shape::matrix(rows, cols), at);
                match kind {
                    0 => {}
                    1 => w = planned(id, Encoding::Q8_0, Shape::matrix(rows, 32 * (cols / 32 + 1)), at),
                    2 | 3 => {
                        w = planned(id, Encoding::F32, Shape::vector(rows * cols), at);
                        w.class = WeightClass::Gamma;
                        w.change = if kind == 2 {
                            ValueChange::Widen { from: Encoding::BF16 }
                        } else {
                            ValueChange::WidenAddOne { from: Encoding::BF16 }
                        };
                        w.views = vec![SourceView::contiguous(0, at, rows * cols * 2)];
                    }
                    4 => w.layout = FloatLayout::InOut,
                    5 => {
                        // A column range of an [in, out] matrix, read as [out, in].
                        w.views = vec![SourceView {
                            file: 0, offset: at + 6, rows, cols, unit: 2, row_stride: 2, col_stride: (rows + 5) * 2,
                        }];
                        w.layout = if gap % 2 == 0 { FloatLayout::OutIn } else { FloatLayout::InOut };
                    }
                    _ => {
                        // Every other row of a fused tensor.
                        w.views = vec![SourceView {
                            file: 0, offset: at, rows, cols: 1, unit: cols * 2, row_stride: cols * 4, col_stride: cols * 2,
                        }];
                    }
                }
                at = w.views.iter().map(|v| {
                    v.offset + (v.rows - 1) * v.row_stride + (v.cols - 1) * v.col_stride + v.unit
                }).max().unwrap();
                weights.push(w);
            }
            // The plan's order is not the file's.
            let n = weights.len();
            for i in 0..n {
                weights.swap(i, (shuffle.rotate_left(i as u32) % n as u64) as usize);
            }
            for (i, w) in weights.iter_mut().enumerate() {
                w.id = WeightId(i as u32);
            }
            check(&plan_of(weights), at + 3);
        }
    }
}
