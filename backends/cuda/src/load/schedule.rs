//! What is read in which order, and where it goes: pure arithmetic over a plan and an arena.
//!
//! Chunks follow the bytes of the files, never tensors: neighbouring tensors share a chunk. A chunk of a few whole runs is
//! copied to their places at once; one of many small tensors, or of values that change, goes to a staging buffer on the
//! device together with a table of pieces, which a kernel then moves.

use hoist_backend::{
    Encoding, Error, FloatLayout, LoadPlan, Result, SourceFile, SourceView, ValueChange, WeightId, WeightPlan,
};

use crate::layout::{element_bytes, transposing_pieces};
use crate::residency::Resident;
use crate::tables::{ADD_ONE, Piece, PieceKind};

/// Pages that direct I/O reads; offsets in the file and in the ring agree modulo this.
pub(crate) const PAGE: u64 = 4096;
/// Most bytes of a chunk: a slot of 4 MiB less a page before and after and a table. At 4 MiB a copy reaches 94 % of the
/// rate of the largest ones. (One slot of 8 MiB a thread instead of two of these was slower on an H100: 37 to 40 GB/s for
/// 45.)
pub(crate) const CHUNK_BYTES: u64 = (4 << 20) - 2 * PAGE - TABLE_BYTES;
/// Most bytes of a chunk that is staged on the device, so that all threads' staging stays below 50 MiB.
pub(crate) const STAGED_BYTES: u64 = 3 << 20;
/// Most pieces of a staged chunk: small tensors of 3 KiB still fill it.
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

/// Contiguous bytes of a chunk that go to their place as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Copy {
    /// From the chunk's first byte.
    pub(crate) from: u64,
    /// Device address.
    pub(crate) to: u64,
    pub(crate) nbytes: u64,
}

/// How a chunk's bytes get to their places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// Copied there.
    Copies(Vec<Copy>),
    /// Staged, then moved by a kernel; `from` counts from the chunk's first byte.
    Staged(Vec<Piece>),
}

/// Bytes `start..end` of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) file: u32,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) how: How,
    /// Canonical bytes of weights that are in place once it has arrived.
    pub(crate) arrivals: Vec<(u32, u64)>,
}

impl Chunk {
    pub(crate) fn nbytes(&self) -> u64 {
        self.end - self.start
    }
}

/// Everything that is read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Schedule {
    /// In the order of the files.
    pub(crate) chunks: Vec<Chunk>,
    /// Weights that only the source can read: views that no rule here covers.
    pub(crate) through_source: Vec<WeightId>,
    /// Weights in the order in which they become whole, about.
    pub(crate) order: Vec<u32>,
}

/// Contiguous source bytes of one weight.
#[derive(Clone, Copy, Debug)]
struct Run {
    file: u32,
    offset: u64,
    nbytes: u64,
    weight: u32,
    /// Canonical bytes before it.
    at: u64,
}

fn source_element(plan: &WeightPlan) -> u64 {
    plan.change
        .source_encoding()
        .map_or(plan.granule(), Encoding::block_bytes)
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
pub(crate) fn schedule(plan: &LoadPlan, residents: &[Resident], files: &[SourceFile]) -> Result<Schedule> {
    let mut runs = Vec::new();
    let mut schedule = Schedule::default();
    for (weight, resident) in plan.weights.iter().zip(residents) {
        check_views(weight, files)?;
        let before = (runs.len(), schedule.chunks.len());
        if !add_weight(weight, resident, &mut runs, &mut schedule.chunks) {
            runs.truncate(before.0);
            schedule.chunks.truncate(before.1);
            schedule.through_source.push(weight.id);
        }
    }
    runs.sort_by_key(|run| (run.file, run.offset));
    pack(plan, residents, &runs, &mut schedule.chunks)?;
    schedule.chunks.sort_by_key(|chunk| (chunk.file, chunk.start));

    let mut seen = vec![false; plan.weights.len()];
    let arrivals = schedule.chunks.iter().flat_map(|c| &c.arrivals).map(|(w, _)| *w);
    for weight in arrivals.chain(schedule.through_source.iter().map(|w| w.0)) {
        if !std::mem::replace(&mut seen[weight as usize], true) {
            schedule.order.push(weight);
        }
    }
    Ok(schedule)
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
    chunks: &mut Vec<Chunk>,
) -> bool {
    let changes = change_kind(weight).is_some();
    if changes && resident.layout == FloatLayout::InOut {
        return false;
    }
    let element = source_element(weight);
    let mut at = 0;
    for view in &weight.views {
        let mut run = |offset, nbytes, at| {
            runs.push(Run {
                file: view.file,
                offset,
                nbytes,
                weight: weight.id.0,
                at,
            });
        };
        let row_bytes = view.cols * view.unit;
        let rows_are_runs = view.cols == 1 || view.col_stride == view.unit;
        if let Some((offset, nbytes)) = view.as_contiguous() {
            // A run is cut between elements, wherever it starts.
            if (changes || resident.layout == FloatLayout::InOut) && nbytes % element != 0 {
                return false;
            }
            run(offset, nbytes, at);
        } else if rows_are_runs && row_bytes >= MIN_ROW_RUN && row_bytes % element == 0 {
            for r in 0..view.rows {
                let before = canonical_bytes(weight, r * row_bytes);
                run(view.offset + r * view.row_stride, row_bytes, at + before);
            }
        } else if !add_strided(weight, resident, view, at, chunks) {
            return false;
        }
        at += canonical_bytes(weight, view.nbytes());
    }
    true
}

/// Chunks of a view of single elements with gaps: whole lines along its larger stride.
fn add_strided(
    weight: &WeightPlan,
    resident: &Resident,
    view: &SourceView,
    at: u64,
    chunks: &mut Vec<Chunk>,
) -> bool {
    let element = source_element(weight);
    let to_element = weight.encoding.block_bytes();
    if !weight.encoding.is_float() || view.unit != element {
        return false;
    }
    let whole = weight.views.len() == 1 && weight.shape.matrices == 1;
    let fits = view.rows == weight.shape.rows && view.cols == weight.shape.cols;
    if resident.layout == FloatLayout::InOut && !(whole && fits) {
        return false;
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
    if span > STAGED_BYTES || view.rows > u64::from(u32::MAX) || view.cols > u64::from(u32::MAX) {
        return false;
    }
    // So many that the last one's span still fits.
    let step = ((STAGED_BYTES - span) / stride.max(1) + 1).min(1 << 20);
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
        chunks.push(Chunk {
            file: view.file,
            start,
            end: start + (n - 1) * stride + span,
            how: How::Staged(vec![Piece {
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
            }]),
            arrivals: vec![(weight.id.0, rows * cols * to_element)],
        });
        first += n;
    }
    true
}

/// A place among the sorted runs.
#[derive(Clone, Copy)]
struct Cursor {
    run: usize,
    /// Bytes of that run that are scheduled.
    done: u64,
}

/// Part of a run.
#[derive(Clone, Copy)]
struct Part {
    run: Run,
    done: u64,
    nbytes: u64,
}

/// Takes what follows the cursor, up to `limit` bytes from the page of its first byte on and `most` parts.
fn take(
    plan: &LoadPlan,
    residents: &[Resident],
    runs: &[Run],
    cursor: Cursor,
    limit: u64,
    most: usize,
) -> (Vec<Part>, Cursor) {
    let mut parts: Vec<Part> = Vec::new();
    let mut at = cursor;
    let Some(first) = runs.get(cursor.run) else {
        return (parts, at);
    };
    let start = first.offset + cursor.done;
    let limit = start / PAGE * PAGE + limit;
    let mut end = start;
    let mut pieces = 0;
    while let Some(run) = runs.get(at.run) {
        let position = run.offset + at.done;
        if run.file != first.file || position < end || position > end + MAX_GAP || position >= limit {
            break;
        }
        let left = run.nbytes - at.done;
        let mut nbytes = left.min(limit - position);
        let resident = &residents[run.weight as usize];
        let weight = &plan.weights[run.weight as usize];
        let transposed = resident.layout == FloatLayout::InOut;
        pieces += if transposed { 3 * MAX_MATRICES as usize } else { 1 };
        if !parts.is_empty() && pieces > most {
            break;
        }
        if transposed {
            nbytes = nbytes.min(MAX_MATRICES.saturating_sub(2).max(1) * resident.matrix_bytes());
        }
        if nbytes < left && (transposed || change_kind(weight).is_some()) {
            nbytes -= nbytes % source_element(weight);
            if nbytes == 0 {
                break;
            }
        }
        parts.push(Part {
            run: *run,
            done: at.done,
            nbytes,
        });
        end = position + nbytes;
        at = if nbytes == left {
            Cursor {
                run: at.run + 1,
                done: 0,
            }
        } else {
            Cursor {
                run: at.run,
                done: at.done + nbytes,
            }
        };
        if nbytes < left {
            break;
        }
    }
    (parts, at)
}

/// Cuts the sorted runs into chunks.
fn pack(plan: &LoadPlan, residents: &[Resident], runs: &[Run], chunks: &mut Vec<Chunk>) -> Result<()> {
    let plain = |part: &Part| {
        let weight = part.run.weight as usize;
        residents[weight].layout == FloatLayout::OutIn && change_kind(&plan.weights[weight]).is_none()
    };
    let mut cursor = Cursor { run: 0, done: 0 };
    while cursor.run < runs.len() {
        let (mut parts, mut next) = take(plan, residents, runs, cursor, CHUNK_BYTES, MAX_COPIES + 1);
        if parts.len() > MAX_COPIES || !parts.iter().all(plain) {
            (parts, next) = take(plan, residents, runs, cursor, STAGED_BYTES, MAX_PIECES);
        }
        let (Some(first), Some(last)) = (parts.first(), parts.last()) else {
            return Err(Error::internal(crate::NAME, "a run that no chunk takes"));
        };
        let start = first.run.offset + first.done;
        let end = last.run.offset + last.done + last.nbytes;
        let copied = parts.len() <= MAX_COPIES && parts.iter().all(plain);
        let mut arrivals: Vec<(u32, u64)> = Vec::with_capacity(parts.len());
        let (mut copies, mut pieces) = (Vec::new(), Vec::new());
        for part in &parts {
            let weight = &plan.weights[part.run.weight as usize];
            let resident = &residents[part.run.weight as usize];
            let from = part.run.offset + part.done - start;
            let at = part.run.at + canonical_bytes(weight, part.done);
            let to = resident.ptr + at;
            let canonical = canonical_bytes(weight, part.nbytes);
            match arrivals.last_mut() {
                Some((w, n)) if *w == weight.id.0 => *n += canonical,
                _ => arrivals.push((weight.id.0, canonical)),
            }
            if copied {
                copies.push(Copy {
                    from,
                    to,
                    nbytes: part.nbytes,
                });
            } else if resident.layout == FloatLayout::InOut {
                pieces.extend(transposing_pieces(resident, at, canonical, from));
            } else if let Some(kind) = change_kind(weight) {
                let element = source_element(weight);
                pieces.push(Piece {
                    from,
                    from_row: 0,
                    from_col: element,
                    to,
                    to_row: 0,
                    to_col: element_bytes(weight.encoding),
                    rows: 1,
                    cols: (part.nbytes / element) as u32,
                    kind,
                    pad: 0,
                });
            } else {
                pieces.push(Piece::bytes(from, to, part.nbytes as u32));
            }
        }
        if pieces.len() > MAX_PIECES {
            return Err(Error::internal(crate::NAME, "a chunk of too many pieces"));
        }
        chunks.push(Chunk {
            file: first.run.file,
            start,
            end,
            how: if copied {
                How::Copies(copies)
            } else {
                How::Staged(pieces)
            },
            arrivals,
        });
        cursor = next;
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
                    name: w.name.clone(),
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
    fn execute(schedule: &Schedule, source: &[u8], arena: u64) -> Vec<u8> {
        let mut to = vec![0xee; arena as usize];
        for chunk in &schedule.chunks {
            assert!(chunk.start < chunk.end && chunk.end <= source.len() as u64);
            let bytes = &source[chunk.start as usize..chunk.end as usize];
            match &chunk.how {
                How::Copies(copies) => {
                    assert!(chunk.end - chunk.start / PAGE * PAGE <= CHUNK_BYTES);
                    assert!(copies.len() <= MAX_COPIES);
                    for c in copies {
                        let (to_at, from, n) = (c.to as usize, c.from as usize, c.nbytes as usize);
                        to[to_at..to_at + n].copy_from_slice(&bytes[from..from + n]);
                    }
                }
                How::Staged(pieces) => {
                    assert!(chunk.nbytes() <= STAGED_BYTES + PAGE && pieces.len() <= MAX_PIECES);
                    pieces.iter().for_each(|p| apply(p, bytes, &mut to));
                }
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
        let schedule = schedule(plan, &residents, &[file(len)]).unwrap();
        let arena = execute(&schedule, &source, arena);
        let mut arrived = vec![0; plan.weights.len()];
        for (w, n) in schedule.chunks.iter().flat_map(|c| &c.arrivals) {
            arrived[*w as usize] += n;
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
        let mut order = schedule.order.clone();
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
                .all(|c| matches!(&c.how, How::Copies(c) if c.len() == 1))
        );
        assert!(schedule.chunks[1..].iter().all(|c| c.start % PAGE == 0));
        assert_eq!(schedule.chunks.len(), 3);
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
        assert!(schedule.chunks.len() <= 4, "{}", schedule.chunks.len());
    }

    #[test]
    fn a_view_past_the_end_of_its_file_is_refused() {
        let w = planned(0, Encoding::F32, Shape::vector(100), 10);
        let plan = plan_of(vec![w]);
        let (residents, _) = residents(&plan);
        assert!(schedule(&plan, &residents, &[file(409)]).is_err());
        assert!(schedule(&plan, &residents, &[]).is_err());
        schedule(&plan, &residents, &[file(410)]).unwrap();
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
