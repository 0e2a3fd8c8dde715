use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use hoist_backend::{
    Error, LoadPlan, LoadWatch, Phase, Progress, Result, WeightBackend, WeightId, WeightPlan, WeightSource,
};

/// Bytes that are read and hashed at a time: enough for BLAKE3 to use its widest vectors, small enough to stay in a
/// second-level cache.
const CHUNK_BYTES: u64 = 512 << 10;
/// Most threads that hash the source: BLAKE3 is faster than any disk, and every thread has a chunk of its own.
const MAX_THREADS: usize = 16;

/// The outcome of comparing what is resident with the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verification {
    /// Weights compared.
    pub weights: u32,
    /// Their canonical bytes.
    pub bytes: u64,
    /// Names of weights that differ, in the plan's order.
    pub mismatches: Vec<String>,
    /// Weights whose digest the device computed itself; the others were read back.
    pub on_device: u32,
}

type Digest = [u8; 32];

/// Compares every weight with its source, by BLAKE3 of the canonical bytes.
///
/// The device hashes where the bytes are, or else they are read back in chunks. The source is read and hashed meanwhile
/// by threads, in chunks too: memory beyond a chunk for each thread is not needed.
///
/// # Errors
/// What the backend and the source return, and [`Error::Cancelled`]. A difference is no error.
pub fn verify(
    backend: &mut dyn WeightBackend,
    plan: &LoadPlan,
    source: &dyn WeightSource,
    watch: &dyn LoadWatch,
) -> Result<Verification> {
    let expected: Vec<OnceLock<Digest>> = plan.weights.iter().map(|_| OnceLock::new()).collect();
    let (next, stop, done) = (AtomicUsize::new(0), AtomicBool::new(false), AtomicU64::new(0));
    let stopped = || stop.load(Ordering::Relaxed) || watch.cancelled();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);

    let hash_sources = || -> Result<()> {
        let mut buffer = Vec::new();
        loop {
            let Some(weight) = plan.weights.get(next.fetch_add(1, Ordering::Relaxed)) else {
                return Ok(());
            };
            let digest = hash(weight, &mut buffer, &stopped, |offset, out| {
                source.read_at(weight.id, offset, out)?;
                let before = done.fetch_add(out.len() as u64, Ordering::Relaxed);
                watch.progress(Progress {
                    phase: Phase::Verify,
                    weight: Some(weight.id),
                    done: before + out.len() as u64,
                    total: plan.nbytes,
                });
                Ok(())
            })
            .inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
            if let Some(place) = expected.get(weight.id.index()) {
                // Each weight is hashed once.
                let _ = place.set(digest);
            }
        }
    };

    let mut errors = Vec::new();
    let resident = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.saturating_sub(1).clamp(1, MAX_THREADS))
            .map(|_| scope.spawn(hash_sources))
            .collect();
        let resident = hash_resident(backend, plan, &stopped)
            // With the device done, this thread helps with the rest of the source.
            .and_then(|resident| hash_sources().map(|()| resident))
            .map_err(|error| {
                stop.store(true, Ordering::Relaxed);
                errors.push(error);
            });
        for worker in workers {
            let outcome = worker
                .join()
                .unwrap_or_else(|_| Err(Error::internal("verification", "a thread panicked")));
            errors.extend(outcome.err());
        }
        resident.ok()
    });
    // The cause, rather than the cancellations that it led to in other threads.
    errors.sort_by_key(|error| matches!(error, Error::Cancelled));
    let (resident, on_device) = match errors.into_iter().next() {
        Some(error) => return Err(error),
        None => resident.ok_or(Error::Cancelled)?,
    };

    let mismatches = plan
        .weights
        .iter()
        .zip(&resident)
        .zip(&expected)
        .filter(|((_, resident), expected)| expected.get() != Some(resident))
        .map(|((weight, _), _)| weight.name.clone())
        .collect();
    Ok(Verification {
        weights: u32::try_from(resident.len()).unwrap_or(u32::MAX),
        bytes: plan.nbytes,
        mismatches,
        on_device,
    })
}

/// Digests of all weights where they are resident, and how many of them the device computed.
fn hash_resident(
    backend: &mut dyn WeightBackend,
    plan: &LoadPlan,
    stopped: &dyn Fn() -> bool,
) -> Result<(Vec<Digest>, u32)> {
    let mut buffer = Vec::new();
    let mut on_device = 0;
    let mut digests = Vec::with_capacity(plan.weights.len());
    for weight in &plan.weights {
        if stopped() {
            return Err(Error::Cancelled);
        }
        let digest = match backend.digest(weight.id)? {
            Some(digest) => {
                on_device += 1;
                digest
            }
            None => hash(weight, &mut buffer, stopped, |offset, out| {
                read_back(backend, weight.id, offset, out)
            })?,
        };
        digests.push(digest);
    }
    Ok((digests, on_device))
}

fn read_back(backend: &mut dyn WeightBackend, weight: WeightId, offset: u64, out: &mut [u8]) -> Result<()> {
    // A backend that writes less than it says must not pass with what the buffer held before.
    out.fill(0xa5);
    backend.read_back(weight, offset, out)
}

/// BLAKE3 of a weight's canonical bytes, read in chunks of whole blocks.
fn hash(
    weight: &WeightPlan,
    buffer: &mut Vec<u8>,
    stopped: &dyn Fn() -> bool,
    mut read: impl FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    for_each_chunk(weight, CHUNK_BYTES, |offset, len| {
        if stopped() {
            return Err(Error::Cancelled);
        }
        buffer.resize(len, 0);
        read(offset, buffer)?;
        hasher.update(buffer);
        Ok(())
    })?;
    Ok(*hasher.finalize().as_bytes())
}

/// Calls `visit` with offset and length of each chunk of a weight: about `chunk_bytes` of whole blocks.
pub(crate) fn for_each_chunk(
    weight: &WeightPlan,
    chunk_bytes: u64,
    mut visit: impl FnMut(u64, usize) -> Result<()>,
) -> Result<()> {
    let granule = weight.granule();
    let step = (chunk_bytes / granule).max(1) * granule;
    let mut offset = 0;
    while offset < weight.nbytes {
        let len = step.min(weight.nbytes - offset);
        let host =
            usize::try_from(len).map_err(|_| Error::internal("verification", "a chunk exceeds memory"))?;
        visit(offset, host)?;
        offset += len;
    }
    Ok(())
}
