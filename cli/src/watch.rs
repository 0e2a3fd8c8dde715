//! Progress on a terminal, and Ctrl-C.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use hoist_core::backend::{LoadWatch, Phase, Progress};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::exit::Code;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Makes the first Ctrl-C, or SIGTERM, a request to stop, and the second one the end.
pub(crate) fn catch_interrupts() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(Code::Cancelled as i32);
        }
    })?;
    Ok(())
}

/// Whether the user asked to stop.
pub(crate) fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Shows the phases of a load as a bar on standard error, if that is a terminal.
pub(crate) struct Bar {
    bar: ProgressBar,
    phase: Mutex<Option<Phase>>,
}

impl Bar {
    /// A bar that shows nothing yet.
    pub(crate) fn new() -> Self {
        // Hidden by itself where standard error is no terminal.
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template(
            "{prefix:9} {wide_bar} {binary_bytes:>11} of {binary_total_bytes} {binary_bytes_per_sec:>13}",
        ) {
            bar.set_style(style);
        }
        Self {
            bar,
            phase: Mutex::new(None),
        }
    }

    /// Takes the bar off the terminal.
    pub(crate) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Counts steps as a bar on standard error, if that is a terminal.
pub(crate) struct Steps(ProgressBar);

impl Steps {
    /// A bar of so many steps.
    pub(crate) fn new(what: &'static str, steps: u64) -> Self {
        let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{prefix:9} {wide_bar} {pos} of {len}") {
            bar.set_style(style);
        }
        bar.set_prefix(what);
        Self(bar)
    }

    /// One step more is done.
    pub(crate) fn done(&self) {
        self.0.inc(1);
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

impl LoadWatch for Bar {
    fn progress(&self, progress: Progress) {
        if self.bar.is_hidden() {
            return;
        }
        let mut phase = self.phase.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if *phase != Some(progress.phase) {
            *phase = Some(progress.phase);
            self.bar.set_prefix(match progress.phase {
                Phase::Open => "open",
                Phase::Plan => "plan",
                Phase::Upload => "upload",
                Phase::Index => "index",
                Phase::Verify => "verify",
                Phase::Workspace => "workspace",
            });
            self.bar.reset();
            self.bar.set_length(progress.total);
        }
        // Threads report out of order.
        if progress.done > self.bar.position() {
            self.bar.set_position(progress.done);
        }
    }

    fn cancelled(&self) -> bool {
        interrupted()
    }
}
