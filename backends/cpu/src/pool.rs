//! Threads for steps that are too short for a general pool: workers spin between jobs and sleep when none comes.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use hoist_backend::{Error, Result};

/// Turns of a worker's loop before it sleeps: a fraction of a millisecond, longer than what lies between two operations.
const SPINS: u32 = 1 << 14;

/// As [`SPINS`] where there are more threads than processors: whoever spins keeps another from working.
const SPINS_CROWDED: u32 = 1 << 6;

/// What every thread runs, given its number.
struct Job<'a>(&'a (dyn Fn(usize) + Sync));

struct Shared {
    /// Counts jobs; a worker that sees it change runs `job`.
    epoch: AtomicU64,
    /// The job of this epoch, on the stack of the thread that waits for it.
    job: AtomicPtr<Job<'static>>,
    /// Workers that have not finished it.
    running: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    /// Workers that sleep, or are about to.
    sleeping: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
    spins: u32,
}

/// Threads that run one job together, the caller's among them. They end with the pool.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
    }
}

/// Waits for workers even if the caller's own part unwinds: they still read what it lent them.
struct Wait<'a>(&'a Shared);

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        let mut turns = 0u32;
        while self.0.running.load(Ordering::Acquire) != 0 {
            turns = turns.saturating_add(1);
            if turns < self.0.spins {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

impl Pool {
    /// Starts `threads − 1` workers.
    pub(crate) fn new(threads: usize) -> Result<Self> {
        let crowded = threads > crate::provider::parallelism();
        let shared = Arc::new(Shared {
            epoch: AtomicU64::new(0),
            job: AtomicPtr::new(std::ptr::null_mut()),
            running: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleeping: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            spins: if crowded { SPINS_CROWDED } else { SPINS },
        });
        let mut pool = Self {
            shared,
            workers: Vec::with_capacity(threads - 1),
        };
        for number in 1..threads {
            let shared = pool.shared.clone();
            let worker = std::thread::Builder::new()
                .name(format!("hoist-cpu-{number}"))
                .spawn(move || shared.work(number))
                .map_err(|e| Error::Unavailable {
                    backend: crate::NAME.into(),
                    reason: format!("thread {number} of {threads} cannot be started: {e}"),
                    hint: Some("ask for fewer threads".into()),
                })?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads that run a job.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `job(0)` here and `job(1) …` on the workers; returns when all are done. `&mut`: one job at a time.
    pub(crate) fn run(&mut self, job: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() {
            return job(0);
        }
        let shared = &*self.shared;
        let lent = Job(job);
        shared
            .job
            .store((&raw const lent).cast_mut().cast(), Ordering::Relaxed);
        shared.running.store(self.workers.len(), Ordering::Relaxed);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        if shared.sleeping.load(Ordering::SeqCst) != 0 {
            drop(shared.lock.lock().unwrap_or_else(|e| e.into_inner()));
            shared.wake.notify_all();
        }
        {
            let _wait = Wait(shared);
            job(0);
        }
        #[expect(
            clippy::panic,
            reason = "a worker's panic goes on in the thread that asked for the work"
        )]
        if shared.panicked.swap(false, Ordering::Relaxed) {
            panic!("a worker of the CPU backend panicked");
        }
    }

    /// Runs `part` on pieces of `0..n` of `grain` each (the last may be shorter), whoever is free taking the next; gives it
    /// the thread's number.
    pub(crate) fn split(
        &mut self,
        n: usize,
        grain: usize,
        part: &(dyn Fn(usize, std::ops::Range<usize>) + Sync),
    ) {
        let grain = grain.max(1);
        if n <= grain || self.workers.is_empty() {
            if n > 0 {
                part(0, 0..n);
            }
            return;
        }
        let next = AtomicUsize::new(0);
        self.run(&|thread| {
            loop {
                let start = next.fetch_add(grain, Ordering::Relaxed);
                if start >= n {
                    return;
                }
                part(thread, start..(start + grain).min(n));
            }
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        drop(self.shared.lock.lock().unwrap_or_else(|e| e.into_inner()));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches panics of jobs; there is nothing else to report.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn work(&self, number: usize) {
        let mut seen = 0;
        loop {
            seen = self.next_epoch(seen);
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let job = self.job.load(Ordering::Relaxed);
            // SAFETY: `run` stored a pointer to a live job before it raised the epoch, and keeps the job alive until
            // `running` is 0, which this thread's share of it is not yet.
            let job = unsafe { &*job };
            if catch_unwind(AssertUnwindSafe(|| (job.0)(number))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.running.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits until the epoch is not `seen`.
    fn next_epoch(&self, seen: u64) -> u64 {
        for _ in 0..self.spins {
            let epoch = self.epoch.load(Ordering::Acquire);
            if epoch != seen {
                return epoch;
            }
            std::hint::spin_loop();
        }
        let mut guard = self.lock.lock().unwrap_or_else(|e| e.into_inner());
        // Either `run` sees this count and wakes, or the load below sees its epoch: both are SeqCst.
        self.sleeping.fetch_add(1, Ordering::SeqCst);
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            if epoch != seen {
                self.sleeping.fetch_sub(1, Ordering::SeqCst);
                return epoch;
            }
            guard = self.wake.wait(guard).unwrap_or_else(|e| e.into_inner());
        }
    }
}

/// A slice that several threads write disjoint parts of.
pub(crate) struct Disjoint<'a, T> {
    base: *mut T,
    len: usize,
    values: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: threads get disjoint `&mut [T]` out of it, as the callers of `part` uphold.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(values: &'a mut [T]) -> Self {
        Self {
            base: values.as_mut_ptr(),
            len: values.len(),
            values: std::marker::PhantomData,
        }
    }

    /// A part of it.
    ///
    /// # Safety
    /// Parts that are alive at the same time do not overlap.
    #[expect(clippy::mut_from_ref, reason = "the caller keeps parts disjoint")]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: `start ≤ len`, as just asserted.
        let at = unsafe { self.base.add(start) };
        // SAFETY: in bounds; nobody else has these elements, which the caller upholds.
        unsafe { std::slice::from_raw_parts_mut(at, len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_runs_every_job_once() {
        for threads in [1, 2, 7] {
            let mut pool = Pool::new(threads).unwrap();
            let counts: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            for round in 0..300 {
                pool.run(&|thread| {
                    counts[thread].fetch_add(1, Ordering::Relaxed);
                });
                if round % 100 == 99 {
                    // Long enough for workers to fall asleep.
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
            }
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 300));
        }
    }

    #[test]
    fn pieces_cover_the_range_once() {
        let mut pool = Pool::new(3).unwrap();
        for (n, grain) in [(0, 4), (1, 4), (4, 4), (5, 4), (1000, 7), (10, 0)] {
            let mut hits = vec![0u8; n];
            let out = Disjoint::new(&mut hits);
            pool.split(n, grain, &|_, range| {
                // SAFETY: pieces are disjoint.
                for hit in unsafe { out.part(range.start, range.len()) } {
                    *hit += 1;
                }
            });
            assert!(hits.iter().all(|h| *h == 1), "{n} by {grain}");
        }
    }

    #[test]
    fn a_panic_in_a_worker_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(2).unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| pool.run(&|thread| assert_eq!(thread, 0))));
        assert!(result.is_err());
        let count = AtomicUsize::new(0);
        pool.run(&|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 2);
    }
}
