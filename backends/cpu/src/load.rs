//! Pulls a plan into the arena: threads take pieces of it, read each from its file, and check it while it is in the
//! cache.

use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hoist_backend::{
    Error, FloatLayout, LoadPlan, LoadWatch, Mapping, Phase, Progress, Result, ValueChange, WeightClass,
    WeightId, WeightPlan, WeightSource,
};

use crate::finite;
use crate::residency::{Place, Residency, Resident, is_aligned, split_ascending};
use crate::{side, transpose};

/// Bytes of a piece: small enough to be checked in the cache it was read into and for a cancel to be quick, large
/// enough that a system call costs nothing.
const PIECE: usize = 512 << 10;

/// Attempts to read bytes that the system reports as an I/O error.
const ATTEMPTS: u32 = 3;

/// A piece of work on one weight, `at` bytes into its canonical bytes.
struct Task<'a> {
    weight: usize,
    at: usize,
    work: Work<'a>,
}

enum Work<'a> {
    /// Read into the arena. `side`: beside the whole rows that are read.
    Copy {
        bytes: &'a mut [u8],
        side: Option<&'a mut [u8]>,
    },
    /// Read one float matrix and transpose it.
    Transpose { bytes: &'a mut [u8] },
    /// Check what is mapped.
    Check {
        bytes: &'a [u8],
        side: Option<&'a mut [u8]>,
    },
}

/// The run of an open file that holds a weight as it is needed.
fn direct<'a>(plan: &WeightPlan, source: &'a dyn WeightSource) -> Option<(&'a Path, &'a File, u64)> {
    let [view] = plan.views.as_slice() else {
        return None;
    };
    let (offset, len) = view.as_contiguous()?;
    if plan.change != ValueChange::Keep || len != plan.nbytes {
        return None;
    }
    let file = source.files().get(view.file as usize)?;
    Some((&file.path, file.file.as_deref()?, offset))
}

fn read_exact(path: &Path, file: &File, offset: u64, out: &mut [u8]) -> Result<()> {
    let mut done = 0;
    let mut failures = 0;
    while done < out.len() {
        let at = offset + done as u64;
        let error = match file.read_at(&mut out[done..], at) {
            Ok(0) => std::io::Error::new(ErrorKind::UnexpectedEof, "the file ends there"),
            Ok(n) => {
                done += n;
                continue;
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(_) if failures + 1 < ATTEMPTS => {
                failures += 1;
                continue;
            }
            Err(e) => e,
        };
        return Err(Error::SourceIo {
            file: path.display().to_string(),
            offset: at,
            len: (out.len() - done) as u64,
            error,
        });
    }
    Ok(())
}

/// Decides which weights are served from mappings. A file that cannot be mapped, or a run that is not aligned, is copied.
pub(crate) fn import(residency: &mut Residency, plan: &LoadPlan, source: &dyn WeightSource) -> Result<()> {
    let mut mappings: Vec<Option<Option<Arc<dyn Mapping>>>> = vec![None; source.files().len()];
    let (weights, _) = residency.parts_mut();
    for (resident, weight) in weights
        .iter_mut()
        .zip(&plan.weights)
        .filter(|(r, _)| r.importable)
    {
        let Some((view, (offset, len))) = weight.views.first().and_then(|v| Some((v, v.as_contiguous()?)))
        else {
            continue;
        };
        let Some(slot) = mappings.get_mut(view.file as usize) else {
            return Err(Error::invalid(
                format!("file of `{}`", weight.name),
                "one of the source's",
                view.file,
            ));
        };
        let Some(mapping) = slot.get_or_insert_with(|| source.share(view.file)) else {
            continue;
        };
        let range = usize::try_from(offset)
            .ok()
            .zip(offset.checked_add(len).and_then(|e| usize::try_from(e).ok()));
        let Some(range) = range.map(|(start, end)| start..end) else {
            continue;
        };
        let Some(bytes) = mapping
            .bytes()
            .get(range.clone())
            .filter(|b| b.len() == resident.nbytes())
        else {
            return Err(Error::SourceChanged {
                file: source.files()[view.file as usize].path.display().to_string(),
                what: "length",
                expected: format!("at least {}", offset.saturating_add(len)),
                found: mapping.bytes().len().to_string(),
            });
        };
        if is_aligned(bytes, resident.encoding) {
            resident.place = Place::Mapped {
                mapping: mapping.clone(),
                range,
            };
        }
    }
    Ok(())
}

/// A piece of a weight's canonical bytes, and the rows in it if they are whole.
type Cut = (Range<usize>, Option<Range<usize>>);

/// The pieces of a weight, in order, and the rows that lie in each if they are whole.
fn pieces(weight: &Resident) -> Vec<Cut> {
    let nbytes = weight.nbytes();
    let row = weight.row_bytes();
    let whole_rows = weight.class == WeightClass::Quantized
        && weight.encoding.matrix_prefix_bytes() == 0
        && row <= 4 * PIECE;
    let granule = if whole_rows {
        row
    } else {
        weight.encoding.block_bytes() as usize
    };
    let step = (PIECE / granule).max(1) * granule;
    (0..nbytes)
        .step_by(step)
        .map(|start| {
            let end = (start + step).min(nbytes);
            (start..end, whole_rows.then(|| start / row..end / row))
        })
        .collect()
}

/// Makes the tasks of a load; the arena's pieces go to them.
fn tasks<'a>(
    weights: &[Resident],
    mapped: &'a [Option<Arc<dyn Mapping>>],
    arena: &'a mut [u8],
) -> Vec<Task<'a>> {
    enum Part {
        Bytes(usize),
        Side(usize),
    }
    // What is written of each weight, by place in the arena.
    let mut parts: Vec<(Range<usize>, Part)> = Vec::new();
    let mut cuts: Vec<Vec<Cut>> = Vec::with_capacity(weights.len());
    for (i, weight) in weights.iter().enumerate() {
        let cut = if weight.layout == FloatLayout::InOut {
            let matrix = weight.matrix_bytes();
            (0..weight.nbytes())
                .step_by(matrix)
                .map(|at| (at..at + matrix, None))
                .collect()
        } else {
            pieces(weight)
        };
        for (range, rows) in &cut {
            if !weight.is_mapped() {
                let start = weight.bytes.start;
                parts.push((start + range.start..start + range.end, Part::Bytes(i)));
            }
            if let Some(rows) = rows {
                let per_row = weight.side_row_bytes();
                let start = weight.side.start;
                parts.push((
                    start + rows.start * per_row..start + rows.end * per_row,
                    Part::Side(i),
                ));
            }
        }
        cuts.push(cut);
    }
    parts.sort_by_key(|(range, _)| range.start);
    let ranges: Vec<_> = parts.iter().map(|(range, _)| range.clone()).collect();
    let mut bytes: Vec<Vec<&mut [u8]>> = weights.iter().map(|_| Vec::new()).collect();
    let mut sides: Vec<Vec<&mut [u8]>> = weights.iter().map(|_| Vec::new()).collect();
    for (piece, (_, part)) in split_ascending(arena, &ranges).into_iter().zip(&parts) {
        match part {
            Part::Bytes(i) => bytes[*i].push(piece),
            Part::Side(i) => sides[*i].push(piece),
        }
    }
    let mut tasks = Vec::with_capacity(parts.len());
    for (i, weight) in weights.iter().enumerate() {
        let mut bytes = std::mem::take(&mut bytes[i]).into_iter();
        let mut sides = std::mem::take(&mut sides[i]).into_iter();
        for (range, rows) in &cuts[i] {
            let side = rows.as_ref().and_then(|_| sides.next());
            let work = match (&weight.place, bytes.next()) {
                (Place::Mapped { range: run, .. }, _) => {
                    let Some(mapping) = &mapped[i] else { continue };
                    let run = &mapping.bytes()[run.clone()];
                    Work::Check {
                        bytes: &run[range.clone()],
                        side,
                    }
                }
                (Place::Arena, Some(bytes)) if weight.layout == FloatLayout::InOut => {
                    Work::Transpose { bytes }
                }
                (Place::Arena, Some(bytes)) => Work::Copy { bytes, side },
                (Place::Arena, None) => continue,
            };
            tasks.push(Task {
                weight: i,
                at: range.start,
                work,
            });
        }
    }
    tasks
}

/// What the threads of a load share.
struct Shared<'a> {
    plan: &'a LoadPlan,
    weights: &'a [Resident],
    source: &'a dyn WeightSource,
    watch: &'a dyn LoadWatch,
    done: AtomicU64,
    stop: AtomicBool,
    error: Mutex<Option<Error>>,
}

impl Shared<'_> {
    fn fail(&self, error: Error) {
        self.stop.store(true, Ordering::Relaxed);
        let mut first = self.error.lock().unwrap_or_else(|e| e.into_inner());
        first.get_or_insert(error);
    }

    fn read(&self, plan: &WeightPlan, at: usize, out: &mut [u8]) -> Result<()> {
        match direct(plan, self.source) {
            Some((path, file, offset)) => read_exact(path, file, offset + at as u64, out),
            None => self.source.read_at(plan.id, at as u64, out),
        }
    }

    fn progress(&self, weight: WeightId, bytes: usize) -> Result<()> {
        let done = self.done.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        self.watch.progress(Progress {
            phase: Phase::Upload,
            weight: Some(weight),
            done,
            total: self.plan.nbytes,
        });
        if self.watch.cancelled() {
            return Err(Error::Cancelled);
        }
        if self.stop.load(Ordering::Relaxed) {
            Err(Error::Cancelled)
        } else {
            Ok(())
        }
    }

    fn run(&self, task: Task<'_>, scratch: &mut Vec<u8>) -> Result<()> {
        let plan = &self.plan.weights[task.weight];
        let weight = &self.weights[task.weight];
        match task.work {
            Work::Copy { bytes, side } => {
                self.read(plan, task.at, bytes)?;
                finite::check(weight, task.at, bytes)?;
                if let Some(side) = side {
                    side::prepare(weight, bytes, side)?;
                }
                self.progress(plan.id, bytes.len())
            }
            Work::Check { bytes, side } => {
                finite::check(weight, task.at, bytes)?;
                if let Some(side) = side {
                    side::prepare(weight, bytes, side)?;
                }
                self.progress(plan.id, bytes.len())
            }
            Work::Transpose { bytes } => {
                let element = weight.encoding.block_bytes() as usize;
                let step = (PIECE / element).max(1) * element;
                let mut at = 0;
                while at < bytes.len() {
                    let len = step.min(bytes.len() - at);
                    scratch.resize(len, 0);
                    self.read(plan, task.at + at, scratch)?;
                    finite::check(weight, task.at + at, scratch)?;
                    transpose::scatter(weight, at, scratch, bytes);
                    at += len;
                    self.progress(plan.id, len)?;
                }
                Ok(())
            }
        }
    }
}

/// Reads and checks every weight with `threads` threads.
pub(crate) fn run(
    residency: &mut Residency,
    plan: &LoadPlan,
    source: &dyn WeightSource,
    watch: &dyn LoadWatch,
    threads: usize,
) -> Result<()> {
    let (weights, arena) = residency.parts_mut();
    let mapped: Vec<Option<Arc<dyn Mapping>>> = weights
        .iter()
        .map(|w| match &w.place {
            Place::Mapped { mapping, .. } => Some(mapping.clone()),
            Place::Arena => None,
        })
        .collect();
    let queue = Mutex::new(tasks(weights, &mapped, arena).into_iter());
    let shared = Shared {
        plan,
        weights,
        source,
        watch,
        done: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        error: Mutex::new(None),
    };
    let work = || {
        let mut scratch = Vec::new();
        loop {
            if shared.stop.load(Ordering::Relaxed) {
                return;
            }
            if watch.cancelled() {
                return shared.fail(Error::Cancelled);
            }
            let next = queue.lock().unwrap_or_else(|e| e.into_inner()).next();
            let Some(task) = next else { return };
            if let Err(error) = shared.run(task, &mut scratch) {
                return shared.fail(error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // A thread that cannot be started is one fewer.
            let _ = std::thread::Builder::new()
                .name("hoist-load".into())
                .spawn_scoped(scope, work);
        }
        work();
    });
    if let Some(error) = shared.error.into_inner().unwrap_or_else(|e| e.into_inner()) {
        return Err(error);
    }
    for weight in weights.iter_mut() {
        let (_, rows) = pieces(weight).into_iter().next().unwrap_or((0..0, None));
        weight.side_done = rows.is_some();
    }
    Ok(())
}
