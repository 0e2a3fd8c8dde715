//! One open device: the author's backend behind a lock, and where it is in the order of calls.

use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, TryLockError};

use hoist_backend::{DecodeBackend, LoadPlan, Run, State, Want, WeightBackend};
use hoist_plugin_abi::Status;

use crate::handles::{Kind, Parts, encode};
use crate::report::Problem;

/// A device's state, reached by one call at a time.
pub(crate) struct Device {
    parts: Parts,
    state: Mutex<DeviceState>,
    /// Whether the load that is running should stop.
    pub(crate) cancelled: AtomicBool,
}

pub(crate) struct DeviceState {
    pub(crate) backend: Box<dyn WeightBackend>,
    pub(crate) state: State,
    pub(crate) plan: Option<LoadPlan>,
    /// Counts loads, so that handles of an earlier load or model are stale.
    pub(crate) epoch: u32,
    /// Why the device is poisoned.
    pub(crate) poisoned: Option<(Status, String)>,
    pub(crate) step: Step,
    /// What `stats` says.
    pub(crate) notes: String,
}

/// Buffers of a decode step, so that it allocates nothing.
#[derive(Default)]
pub(crate) struct Step {
    pub(crate) wants: Vec<Want>,
    /// Empty between calls; within one, its runs borrow the caller's arrays.
    pub(crate) runs: Vec<Run<'static>>,
}

impl Device {
    pub(crate) fn new(parts: Parts, backend: Box<dyn WeightBackend>) -> Self {
        let state = DeviceState {
            backend,
            state: State::Empty,
            plan: None,
            epoch: 0,
            poisoned: None,
            step: Step::default(),
            notes: String::new(),
        };
        Self {
            parts,
            state: Mutex::new(state),
            cancelled: AtomicBool::new(false),
        }
    }

    /// Enters a serial call. A second one at the same time breaks the host's promise.
    pub(crate) fn enter(&self) -> Result<MutexGuard<'_, DeviceState>, Problem> {
        match self.state.try_lock() {
            Ok(guard) => Ok(guard),
            // A call that unwound has poisoned the device by its own word.
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(Problem::new(
                Status::BAD_STATE,
                "another call is running on this device",
            )),
        }
    }

    /// The handle of the load or model that is there now: the device's index, and its own count of loads.
    pub(crate) fn handle(&self, kind: Kind, state: &DeviceState) -> u64 {
        encode(kind, self.child(state))
    }

    /// Generations of loads and models mix the device's with the count of its loads.
    pub(crate) fn child(&self, state: &DeviceState) -> Parts {
        Parts {
            generation: self.parts.generation << 16 | state.epoch & 0xFFFF,
            index: self.parts.index,
        }
    }

    pub(crate) fn parts_of_device(child: Parts) -> u32 {
        child.generation >> 16
    }
}

impl DeviceState {
    pub(crate) fn expect(&self, call: &str, wanted: State) -> Result<(), Problem> {
        self.check_poison()?;
        if self.state == wanted {
            return Ok(());
        }
        Err(Problem::new(
            Status::BAD_STATE,
            format!(
                "`{call}` needs a device that is {wanted}, this one is {}",
                self.state
            ),
        ))
    }

    pub(crate) fn expect_at_least(&self, call: &str, least: State) -> Result<(), Problem> {
        self.check_poison()?;
        if self.state >= least {
            return Ok(());
        }
        Err(Problem::new(
            Status::BAD_STATE,
            format!(
                "`{call}` needs a device that is at least {least}, this one is {}",
                self.state
            ),
        ))
    }

    pub(crate) fn check_poison(&self) -> Result<(), Problem> {
        match &self.poisoned {
            None => Ok(()),
            Some((status, reason)) => Err(Problem::new(*status, format!("the device is poisoned: {reason}"))),
        }
    }

    /// An error of the backend, which poisons the device if it lost it.
    pub(crate) fn problem(&mut self, error: &hoist_backend::Error) -> Problem {
        let problem = Problem::of(error, self.plan.as_ref());
        if problem.status == Status::DEVICE_LOST {
            self.poisoned = Some((Status::DEVICE_LOST, problem.message.clone()));
        }
        problem
    }

    /// A call of the backend, whose error becomes a problem.
    pub(crate) fn ask<T>(
        &mut self,
        call: impl FnOnce(&mut dyn WeightBackend) -> hoist_backend::Result<T>,
    ) -> Result<T, Problem> {
        let answer = call(self.backend.as_mut());
        answer.map_err(|e| self.problem(&e))
    }

    /// As [`DeviceState::ask`], of the backend's decoding side.
    pub(crate) fn ask_decoder<T>(
        &mut self,
        call: impl FnOnce(&mut dyn DecodeBackend) -> hoist_backend::Result<T>,
    ) -> Result<T, Problem> {
        let answer = call(self.backend.as_decode().ok_or_else(no_decoder)?);
        answer.map_err(|e| self.problem(&e))
    }

    /// Back to OPEN: what was loaded is gone, and so are its handles.
    pub(crate) fn emptied(&mut self) {
        self.state = State::Empty;
        self.plan = None;
        self.step = Step::default();
        self.notes = String::new();
    }
}

pub(crate) fn no_decoder() -> Problem {
    Problem::new(Status::UNSUPPORTED, "this backend only holds weights")
}
