//! The fast path of a load: threads read pieces, check them, and hand them to the device through a belt of mapped buffers.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use hoist_backend::{Error, LoadPlan, LoadWatch, Phase, Progress, Result, WeightId, WeightSource};
use wgpu::{Buffer, MapMode};

use crate::device::Gpu;
use crate::residency::{Residency, Resident};

/// Bytes of a piece, about.
const PIECE: u64 = 8 << 20;

/// Bytes that are read at a time, about: they stay in a processor's cache while they are checked and handed on.
const CACHED: u64 = 256 << 10;

/// Staging buffers beyond one for each thread: those that the device copies from.
const ON_THEIR_WAY: usize = 4;

/// How long a thread sleeps before it looks for a buffer again.
const PATIENCE: Duration = Duration::from_millis(1);

/// Canonical bytes that are moved together.
struct Piece {
    weight: WeightId,
    offset: u64,
    len: u64,
    arena: usize,
    at: u64,
}

/// Whole blocks of a weight, and whole words of a buffer: as many as make up about so many bytes.
fn whole(weight: &Resident, bytes: u64) -> u64 {
    let block = weight.encoding.block_bytes();
    let granule = if block.is_multiple_of(4) { block } else { 4 * block };
    (bytes / granule).max(1) * granule
}

fn pieces(weight: &Resident, id: WeightId) -> Vec<Piece> {
    let step = whole(weight, PIECE);
    let mut pieces = Vec::new();
    for part in &weight.parts {
        let mut done = 0;
        while done < part.nbytes {
            let len = step.min(part.nbytes - done);
            pieces.push(Piece {
                weight: id,
                offset: part.start + done,
                len,
                arena: part.arena,
                at: part.at + done,
            });
            done += len;
        }
    }
    pieces
}

/// Buffers that are mapped and empty.
#[derive(Default)]
struct Belt {
    free: Mutex<Vec<Buffer>>,
    returned: Condvar,
}

impl Belt {
    fn lock(&self) -> MutexGuard<'_, Vec<Buffer>> {
        self.free.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn take(&self, gpu: &Gpu, stop: &AtomicBool) -> Result<Buffer> {
        loop {
            if let Some(buffer) = self.lock().pop() {
                return Ok(buffer);
            }
            // Buffers come back in callbacks, which a poll runs.
            gpu.look("uploads", PIECE)?;
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
            let free = self.lock();
            if free.is_empty() {
                drop(self.returned.wait_timeout(free, PATIENCE));
            }
        }
    }

    fn give(&self, buffer: Buffer) {
        self.lock().push(buffer);
        self.returned.notify_one();
    }
}

struct Shared<'a> {
    gpu: &'a Gpu,
    residency: &'a Residency,
    plan: &'a LoadPlan,
    source: &'a dyn WeightSource,
    watch: &'a dyn LoadWatch,
    belt: Arc<Belt>,
    done: AtomicU64,
    stop: AtomicBool,
    error: Mutex<Option<Error>>,
}

impl Shared<'_> {
    fn fail(&self, error: Error) {
        self.stop.store(true, Ordering::Relaxed);
        self.error
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .get_or_insert(error);
    }

    fn run(&self, piece: &Piece, scratch: &mut Vec<u8>) -> Result<()> {
        let weight = self.residency.weight(piece.weight)?;
        let buffer = self.belt.take(self.gpu, &self.stop)?;
        let padded = piece.len.next_multiple_of(4);
        let mut view = buffer
            .get_mapped_range_mut(..padded)
            .map_err(|e| Error::internal(crate::NAME, format!("mapping: {e}")))?;
        let step = whole(weight, CACHED);
        for done in (0..piece.len).step_by(step as usize) {
            let len = step.min(piece.len - done) as usize;
            // The last bytes of a weight are padded to a word. Mapped memory may be slow to read: what is checked is not
            // what is mapped.
            scratch.resize(len.next_multiple_of(4), 0);
            scratch[len..].fill(0);
            self.source
                .read_at(piece.weight, piece.offset + done, &mut scratch[..len])?;
            weight.inspect(piece.offset + done, &scratch[..len])?;
            let at = done as usize;
            view.slice(at..at + scratch.len()).copy_from_slice(scratch);
            if self.stop.load(Ordering::Relaxed) {
                return Err(Error::Cancelled);
            }
        }
        drop(view);
        buffer.unmap();
        let mut encoder = self.gpu.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(&buffer, 0, &self.residency.arenas[piece.arena], piece.at, padded);
        self.gpu.queue.submit([encoder.finish()]);
        let (belt, returned) = (Arc::clone(&self.belt), buffer.clone());
        buffer.map_async(MapMode::Write, .., move |mapped| {
            if mapped.is_ok() {
                belt.give(returned);
            }
        });
        let done = self.done.fetch_add(piece.len, Ordering::Relaxed) + piece.len;
        self.watch.progress(Progress {
            phase: Phase::Upload,
            weight: Some(piece.weight),
            done,
            total: self.plan.nbytes,
        });
        if self.watch.cancelled() || self.stop.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        Ok(())
    }
}

/// Reads, checks and uploads every weight with `threads` threads.
pub(crate) fn run(
    gpu: &Gpu,
    residency: &Residency,
    plan: &LoadPlan,
    source: &dyn WeightSource,
    watch: &dyn LoadWatch,
    threads: usize,
) -> Result<()> {
    let all: Vec<Piece> = residency
        .weights
        .iter()
        .zip(&plan.weights)
        .flat_map(|(resident, weight)| pieces(resident, weight.id))
        .collect();
    let largest = all.iter().map(|p| p.len).max().unwrap_or(0).next_multiple_of(4);
    let belt = Arc::new(Belt::default());
    for _ in 0..(threads + ON_THEIR_WAY).min(all.len()) {
        belt.give(gpu.mapped_buffer("the staging belt", largest)?);
    }
    let queue = Mutex::new(all.iter());
    let shared = Shared {
        gpu,
        residency,
        plan,
        source,
        watch,
        belt,
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
            let Some(piece) = next else { return };
            if let Err(error) = shared.run(piece, &mut scratch) {
                return shared.fail(error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(all.len()) {
            // A thread that cannot be started is one fewer.
            let _ = std::thread::Builder::new()
                .name("hoist-load".into())
                .spawn_scoped(scope, work);
        }
        work();
    });
    let error = shared.error.lock().unwrap_or_else(|e| e.into_inner()).take();
    let waited = gpu.wait("uploads");
    match error {
        Some(error) => Err(error),
        None => waited,
    }
}
