//! Threads for steps that are too short for a general pool.
//!
//! A run is a number of tickets on a shared counter: whoever is there takes the next, the caller too, and each is run once. A
//! worker that the system has put aside before it joined is not waited for, since its share is nobody's in particular; one
//! that is put aside within a ticket is, and the caller sleeps until it is done. Where that happens a lot, workers are left out
//! for a while ([`Contention`]). Workers spin between runs for as long as runs lie apart within a decode step, then sleep.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Instant;

use hoist_backend::{Error, Result};

use crate::contention::Contention;

/// Turns of a waiting loop before it sleeps: a fraction of a millisecond, longer than what lies between two operations.
const SPINS: u32 = 1 << 14;

/// As [`SPINS`] where there are more threads than processors: whoever spins keeps another from working.
const SPINS_CROWDED: u32 = 1 << 6;

/// Tickets of one run, on the stack of the thread that asked for it.
struct Run<'a> {
    /// Given the thread's number and the ticket.
    job: &'a (dyn Fn(usize, usize) + Sync),
    tickets: usize,
    next: AtomicUsize,
}

impl Run<'_> {
    /// Takes tickets until there are none.
    fn work(&self, thread: usize) {
        loop {
            let ticket = self.next.fetch_add(1, Ordering::Relaxed);
            if ticket >= self.tickets {
                return;
            }
            (self.job)(thread, ticket);
        }
    }
}

struct Shared {
    /// Odd while a run is open to be joined; each run has a number of its own.
    epoch: AtomicU64,
    /// The open run.
    run: AtomicPtr<Run<'static>>,
    /// Workers that may be reading it: one counts itself, then looks again whether the run is still open.
    active: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    /// Workers that sleep, or are about to.
    sleeping: AtomicUsize,
    /// The caller sleeps until nobody is active, or is about to.
    waiting: AtomicBool,
    lock: Mutex<()>,
    opened: Condvar,
    left: Condvar,
    spins: u32,
}

/// Threads that run tickets together, the caller's among them. They end with the pool.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    contention: Contention,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
    }
}

/// Closes a run and waits for those who joined it, even if the caller's own part unwinds: they still read what it lent them.
struct Close<'a> {
    shared: &'a Shared,
    /// Told whether this thread slept.
    slept: &'a Cell<bool>,
}

impl Drop for Close<'_> {
    fn drop(&mut self) {
        let shared = self.shared;
        // Either a worker that counts itself sees this, or the loads below see its count: all are SeqCst.
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        for _ in 0..shared.spins {
            if shared.active.load(Ordering::SeqCst) == 0 {
                return;
            }
            std::hint::spin_loop();
        }
        self.slept.set(true);
        let mut guard = shared.lock();
        // Either the last worker to leave sees this and wakes, or the load below sees that it left.
        shared.waiting.store(true, Ordering::SeqCst);
        while shared.active.load(Ordering::SeqCst) != 0 {
            guard = shared.left.wait(guard).unwrap_or_else(|e| e.into_inner());
        }
        shared.waiting.store(false, Ordering::Relaxed);
    }
}

impl Pool {
    /// Starts `threads − 1` workers.
    pub(crate) fn new(threads: usize) -> Result<Self> {
        let crowded = threads > crate::provider::parallelism();
        let shared = Arc::new(Shared {
            epoch: AtomicU64::new(0),
            run: AtomicPtr::new(std::ptr::null_mut()),
            active: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleeping: AtomicUsize::new(0),
            waiting: AtomicBool::new(false),
            lock: Mutex::new(()),
            opened: Condvar::new(),
            left: Condvar::new(),
            spins: if crowded { SPINS_CROWDED } else { SPINS },
        });
        let mut pool = Self {
            shared,
            workers: Vec::with_capacity(threads - 1),
            contention: Contention::default(),
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

    /// Threads that take tickets.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `job(thread, ticket)` once for each of `0..tickets`, on whatever threads are free, this one (number 0) among
    /// them; returns when all are done. `&mut`: one run at a time.
    pub(crate) fn run(&mut self, tickets: usize, job: &(dyn Fn(usize, usize) + Sync)) {
        if tickets <= 1 || self.workers.is_empty() || self.contention.is_alone() {
            return (0..tickets).for_each(|ticket| job(0, ticket));
        }
        let shared = &*self.shared;
        let run = Run {
            job,
            tickets,
            next: AtomicUsize::new(0),
        };
        shared
            .run
            .store((&raw const run).cast_mut().cast(), Ordering::Relaxed);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        if shared.sleeping.load(Ordering::SeqCst) != 0 {
            drop(shared.lock());
            shared.opened.notify_all();
        }
        let started = Instant::now();
        let slept = Cell::new(false);
        let close = Close {
            shared,
            slept: &slept,
        };
        run.work(0);
        let worked = Instant::now();
        drop(close);
        self.contention.account(started, worked, slept.get());
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
        self.run(n.div_ceil(grain), &|thread, ticket| {
            let start = ticket * grain;
            part(thread, start..n.min(start + grain));
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(self.shared.lock());
        self.shared.opened.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches panics of jobs; there is nothing else to report.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn work(&self, thread: usize) {
        let mut seen = 0;
        while let Some(epoch) = self.next_open(seen) {
            self.active.fetch_add(1, Ordering::SeqCst);
            // It may be closed by now, or another one be open: then that is the one to join.
            seen = self.epoch.load(Ordering::SeqCst);
            if is_open(seen) {
                let run = self.run.load(Ordering::Relaxed);
                // SAFETY: `Pool::run` stored a pointer to a live run before it opened this epoch, and keeps the run alive
                // until it has closed the epoch and then seen nobody active, which this thread is.
                let run = unsafe { &*run };
                if catch_unwind(AssertUnwindSafe(|| run.work(thread))).is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
            } else {
                seen = epoch;
            }
            if self.active.fetch_sub(1, Ordering::SeqCst) == 1 && self.waiting.load(Ordering::SeqCst) {
                drop(self.lock());
                self.left.notify_one();
            }
        }
    }

    /// Waits until a run other than `seen` is open; `None` to end.
    fn next_open(&self, seen: u64) -> Option<u64> {
        let news = || {
            let epoch = self.epoch.load(Ordering::SeqCst);
            if self.stop.load(Ordering::SeqCst) {
                Some(None)
            } else {
                (is_open(epoch) && epoch != seen).then_some(Some(epoch))
            }
        };
        for _ in 0..self.spins {
            if let Some(news) = news() {
                return news;
            }
            std::hint::spin_loop();
        }
        let mut guard = self.lock();
        // Either `run` sees this count and wakes, or `news` sees its epoch: both are SeqCst.
        self.sleeping.fetch_add(1, Ordering::SeqCst);
        loop {
            if let Some(news) = news() {
                self.sleeping.fetch_sub(1, Ordering::SeqCst);
                return news;
            }
            guard = self.opened.wait(guard).unwrap_or_else(|e| e.into_inner());
        }
    }
}

fn is_open(epoch: u64) -> bool {
    epoch % 2 == 1
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
    use std::sync::atomic::AtomicU8;
    use std::time::Duration;

    use super::*;

    /// Long enough for workers to fall asleep.
    fn let_them_sleep() {
        std::thread::sleep(Duration::from_millis(20));
    }

    #[test]
    fn every_ticket_is_run_once() {
        for threads in [1, 2, 7] {
            let mut pool = Pool::new(threads).unwrap();
            for round in 0..300usize {
                let tickets = round % 23;
                let counts: Vec<AtomicU8> = (0..tickets).map(|_| AtomicU8::new(0)).collect();
                pool.run(tickets, &|thread, ticket| {
                    assert!(thread < threads);
                    counts[ticket].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
                if round % 100 == 99 {
                    let_them_sleep();
                }
            }
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

    /// Runs so short that workers come late, join the one after, sleep and wake at every point of a run's life.
    #[test]
    fn many_short_runs_lose_and_repeat_no_ticket() {
        for threads in [2, 3, 8] {
            let mut pool = Pool::new(threads).unwrap();
            let mut values = vec![0u64; 64];
            let mut random = 1u64;
            let mut expected = values.clone();
            for round in 0..20_000u64 {
                random = random
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                let tickets = (random >> 33) as usize % 9;
                let out = Disjoint::new(&mut values);
                // Others are let in only by what the pool itself decides: no time alone is carried over.
                pool.contention = Contention::default();
                pool.run(tickets, &|_, ticket| {
                    // SAFETY: one element a ticket. It is read by the caller, without an atomic, after the run.
                    let value = &mut unsafe { out.part(ticket * 7, 1) }[0];
                    *value = value.wrapping_mul(31).wrapping_add(round);
                });
                for ticket in 0..tickets {
                    expected[ticket * 7] = expected[ticket * 7].wrapping_mul(31).wrapping_add(round);
                }
                assert_eq!(values, expected, "round {round}");
                match random >> 40 & 0x3FF {
                    0 => std::thread::sleep(Duration::from_micros(300)),
                    1..100 => std::thread::yield_now(),
                    _ => {}
                }
            }
        }
    }

    #[test]
    fn a_worker_that_is_held_up_holds_up_only_its_ticket() {
        let mut pool = Pool::new(2).unwrap();
        let held = AtomicBool::new(false);
        let by_caller = AtomicUsize::new(0);
        pool.run(1000, &|thread, _| {
            if thread == 0 {
                by_caller.fetch_add(1, Ordering::Relaxed);
                while !held.load(Ordering::Relaxed) {
                    std::thread::yield_now();
                }
            } else if !held.swap(true, Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(30));
            }
        });
        assert!(by_caller.into_inner() > 900);
    }

    #[test]
    fn a_panic_reaches_the_caller_whoever_has_it_and_the_pool_lives_on() {
        for threads in [1, 2, 5] {
            let mut pool = Pool::new(threads).unwrap();
            for round in 0..200usize {
                let bad = round % 16;
                let result = catch_unwind(AssertUnwindSafe(|| {
                    pool.run(16, &|_, ticket| assert_ne!(ticket, bad, "on purpose"));
                }));
                assert!(result.is_err());
                let count = AtomicUsize::new(0);
                pool.run(16, &|_, _| {
                    count.fetch_add(1, Ordering::Relaxed);
                });
                assert_eq!(count.into_inner(), 16);
            }
        }
    }

    #[test]
    fn a_pool_ends_whatever_its_workers_do() {
        for idle in [
            Duration::ZERO,
            Duration::from_micros(50),
            Duration::from_millis(20),
        ] {
            for used in [false, true] {
                for _ in 0..20 {
                    let mut pool = Pool::new(4).unwrap();
                    if used {
                        pool.run(8, &|_, _| {});
                    }
                    std::thread::sleep(idle);
                    let shared = pool.shared.clone();
                    drop(pool);
                    // Each worker held one.
                    assert_eq!(Arc::strong_count(&shared), 1);
                }
            }
        }
    }
}
