//! Whether it pays to share work with other threads: not while others want the processors.
//!
//! Threads that work hand in hand must run at the same time, which the system does not know. When processes compete, each
//! run waits until every thread that joined it has had its turn, and two threads get less done than one. The thread that
//! asks for work therefore watches itself: over windows of a few milliseconds it compares the time that passed with the
//! time it computed. If too much was lost, it works alone for many times what was lost, and then tries again: losses stay
//! a small part of the time, and two threads come back soon after the processors do.

use std::time::{Duration, Instant};

/// Runs of a window, as far as they take no longer than [`WINDOW`].
const RUNS: u32 = 64;
const WINDOW: Duration = Duration::from_millis(20);

/// Between runs that lie further apart something else was done, or nothing: that time is not the pool's.
const GAP: Duration = Duration::from_millis(1);

/// Of the time of a window, what may be lost: in percent. Two threads that lose half their time are one.
const TOLERATED: u32 = 40;

/// After a window in which too much was lost, work is done alone for so many times what was lost.
const ALONE: u32 = 16;
const ALONE_AT_MOST: Duration = Duration::from_secs(2);

/// Runs so far.
#[derive(Clone, Copy, Debug)]
struct Window {
    started: Instant,
    /// This thread's processor time then, if the system tells.
    processor: Option<Duration>,
    /// When the last run ended.
    ended: Instant,
    runs: u32,
    /// Spent turning in circles until others were done.
    spun: Duration,
    /// Spent asleep until others were done.
    slept: Duration,
    /// Between runs that lie far apart.
    idle: Duration,
}

impl Window {
    fn new(started: Instant, processor: Option<Duration>) -> Self {
        Self {
            started,
            processor,
            ended: started,
            runs: 0,
            spun: Duration::ZERO,
            slept: Duration::ZERO,
            idle: Duration::ZERO,
        }
    }
}

/// What a pool knows of those who compete with it.
#[derive(Debug, Default)]
pub(crate) struct Contention {
    window: Option<Window>,
    alone_until: Option<Instant>,
}

impl Contention {
    /// Whether to leave the others out of the run that begins now.
    pub(crate) fn is_alone(&mut self) -> bool {
        let alone = self.alone_until.is_some_and(|until| Instant::now() < until);
        if !alone {
            self.alone_until = None;
        }
        alone
    }

    /// A run ended now; it started then, this thread had nothing left to do after `worked`, and waited, maybe asleep.
    pub(crate) fn account(&mut self, started: Instant, worked: Instant, slept: bool) {
        let now = Instant::now();
        let Some(window) = &mut self.window else {
            // This run is not counted, its start is past; others follow.
            self.window = Some(Window::new(now, processor_time()));
            return;
        };
        let gap = started.saturating_duration_since(window.ended);
        if gap > GAP {
            window.idle += gap;
        }
        let waited = now.saturating_duration_since(worked);
        if slept {
            window.slept += waited;
        } else {
            window.spun += waited;
        }
        window.ended = now;
        window.runs += 1;
        let passed = now
            .saturating_duration_since(window.started)
            .saturating_sub(window.idle);
        if window.runs < RUNS && passed < WINDOW {
            return;
        }
        let processor = processor_time();
        let computed = processor
            .zip(window.processor)
            .map(|(now, then)| now.saturating_sub(then));
        let lost = lost(passed, computed, window.spun, window.slept);
        if lost > passed * TOLERATED / 100 {
            self.window = None;
            self.alone_until = Some(now + (lost * ALONE).min(ALONE_AT_MOST));
        } else {
            *window = Window::new(now, processor);
        }
    }
}

/// Time without progress: what the system took away (asleep or not), and what was spent turning in circles.
fn lost(passed: Duration, computed: Option<Duration>, spun: Duration, slept: Duration) -> Duration {
    let away = computed.map_or(slept, |computed| passed.saturating_sub(computed));
    (away + spun).min(passed)
}

#[cfg(target_os = "linux")]
fn processor_time() -> Option<Duration> {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Some(Duration::new(
        time.tv_sec.try_into().ok()?,
        time.tv_nsec.try_into().ok()?,
    ))
}

#[cfg(not(target_os = "linux"))]
fn processor_time() -> Option<Duration> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn what_is_lost_is_counted_once() {
        assert_eq!(lost(10 * MS, Some(10 * MS), MS, Duration::ZERO), MS);
        // Asleep is away from the processor already.
        assert_eq!(lost(10 * MS, Some(4 * MS), MS, 5 * MS), 7 * MS);
        assert_eq!(lost(10 * MS, None, MS, 5 * MS), 6 * MS);
        assert_eq!(lost(10 * MS, Some(Duration::ZERO), 5 * MS, 5 * MS), 10 * MS);
    }

    /// Windows of runs in which this thread sleeps for most of the time, as if others had the processor.
    #[test]
    fn losing_time_leaves_the_others_out_for_a_while() {
        let mut contention = Contention::default();
        let started = Instant::now();
        while !contention.is_alone() {
            assert!(started.elapsed() < Duration::from_secs(20), "it never notices");
            let run = Instant::now();
            let worked = Instant::now();
            std::thread::sleep(MS / 2);
            contention.account(run, worked, true);
        }
        let until = contention.alone_until;
        assert!(until.is_some_and(|until| until > Instant::now()));
        while contention.is_alone() {
            assert!(
                started.elapsed() < Duration::from_secs(20),
                "it never tries again"
            );
            std::thread::sleep(MS);
        }
        assert!(contention.window.is_none());
    }

    #[test]
    fn time_between_runs_is_not_lost() {
        let mut contention = Contention::default();
        for _ in 0..3 * RUNS {
            let run = Instant::now();
            contention.account(run, Instant::now(), false);
            std::thread::sleep(3 * MS);
        }
        assert!(!contention.is_alone());
    }
}
