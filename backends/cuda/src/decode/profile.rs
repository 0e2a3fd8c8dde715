//! Where the time of a step goes: events between launches, or the one-launch step's own clocks.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use hoist_backend::{PhaseTime, ResolvedProgram, Result, Shape};

use crate::driver::{Context, Event, Stream};

/// Events between the steps of a program.
#[derive(Debug)]
pub(super) struct Marks {
    context: Arc<Context>,
    start: Event,
    /// Steps that ran as one, and the event behind them.
    passed: RefCell<Vec<(Range<usize>, Event)>>,
}

impl Marks {
    /// Nothing has passed; [`Marks::begin`] starts the clock.
    pub(super) fn new(context: &Arc<Context>) -> Result<Self> {
        Ok(Self {
            context: Arc::clone(context),
            start: Event::timed(context)?,
            passed: RefCell::default(),
        })
    }

    /// Starts the clock.
    pub(super) fn begin(&self, stream: &Stream) -> Result<()> {
        self.start.record(stream)
    }

    /// Marks the end of steps that ran as one.
    pub(super) fn pass(&self, stream: &Stream, steps: Range<usize>) -> Result<()> {
        let event = Event::timed(&self.context)?;
        event.record(stream)?;
        self.passed.borrow_mut().push((steps, event));
        Ok(())
    }

    /// The time of each step; the stream must have passed all marks. `facts` are a weight's bytes and shape, `chosen` is how
    /// many experts a value names.
    pub(super) fn phases(
        &self,
        program: &ResolvedProgram,
        facts: impl Fn(usize) -> (u64, Shape),
        chosen: impl Fn(usize) -> u64,
        phases: &mut Vec<PhaseTime>,
    ) -> Result<()> {
        let passed = self.passed.borrow();
        let mut before = &self.start;
        for (steps, event) in passed.iter() {
            let steps = program.steps.get(steps.clone()).unwrap_or_default();
            let names: Vec<String> = steps.iter().map(|s| s.op.to_string()).collect();
            phases.push(PhaseTime {
                name: names.join(" + "),
                layer: steps.first().and_then(|s| s.layer),
                time: Duration::from_secs_f32(event.elapsed_ms(before)?.max(0.0) / 1e3),
                weight_bytes: steps.iter().map(|s| s.kind.weight_bytes(&facts, &chosen)).sum(),
            });
            before = event;
        }
        Ok(())
    }
}
