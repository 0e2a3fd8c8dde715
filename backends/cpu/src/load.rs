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
    Error, FloatLayout, LoadPlan, LoadWatch, Mapping, Phase, Progress, Result, ValueChange, WeightId,
    WeightPlan, WeightSource,
};

use crate::finite;
use crate::residency::{Place, Residency, Resident, is_aligned, split_ascending};
use crate::transpose;

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
    /// Read into the arena.
    Copy { bytes: &'a mut [u8] },
    /// Read one float matrix and transpose it.
    Transpose { bytes: &'a mut [u8] },
    /// Check what is mapped.
    Check { bytes: &'a [u8] },
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

/// Pieces of a weight's canonical bytes, in order.
fn pieces(weight: &Resident) -> impl Iterator<Item = Range<usize>> + use<> {
    let nbytes = weight.nbytes();
    let step = match weight.layout {
        FloatLayout::InOut => weight.matrix_bytes(),
        FloatLayout::OutIn => {
            let granule = weight.encoding.block_bytes() as usize;
            (PIECE / granule).max(1) * granule
        }
    };
    (0..nbytes)
        .step_by(step)
        .map(move |start| start..(start + step).min(nbytes))
}

/// Makes the tasks of a load; the arena's pieces go to them.
fn tasks<'a>(
    weights: &[Resident],
    mapped: &'a [Option<Arc<dyn Mapping>>],
    arena: &'a mut [u8],
) -> Vec<Task<'a>> {
    let mut tasks = Vec::new();
    // Pieces in the order of the arena, and the weights they are of.
    let mut owned: Vec<(Range<usize>, usize, usize)> = Vec::new();
    for (i, weight) in weights.iter().enumerate() {
        match (&weight.place, &mapped[i]) {
            (Place::Mapped { range, .. }, Some(mapping)) => {
                let run = &mapping.bytes()[range.clone()];
                let checks = pieces(weight).map(|piece| Task {
                    weight: i,
                    at: piece.start,
                    work: Work::Check { bytes: &run[piece] },
                });
                tasks.extend(checks);
            }
            _ => {
                let start = weight.bytes.start;
                owned.extend(pieces(weight).map(|p| (start + p.start..start + p.end, i, p.start)));
            }
        }
    }
    owned.sort_by_key(|(range, _, _)| range.start);
    let ranges: Vec<_> = owned.iter().map(|(range, _, _)| range.clone()).collect();
    for (bytes, (_, weight, at)) in split_ascending(arena, &ranges).into_iter().zip(owned) {
        let work = match weights[weight].layout {
            FloatLayout::OutIn => Work::Copy { bytes },
            FloatLayout::InOut => Work::Transpose { bytes },
        };
        tasks.push(Task { weight, at, work });
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
            Work::Copy { bytes } => {
                self.read(plan, task.at, bytes)?;
                finite::check(weight, task.at, bytes)?;
                self.progress(plan.id, bytes.len())
            }
            Work::Check { bytes } => {
                finite::check(weight, task.at, bytes)?;
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
    Ok(())
}
