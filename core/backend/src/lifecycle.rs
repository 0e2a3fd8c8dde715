use crate::{Error, Result};

/// Where a backend is in the order of calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// Nothing is resident.
    #[default]
    Empty,
    /// Between `begin_load` and `finish_load`.
    Loading,
    /// Weights are resident.
    Loaded,
    /// The index is built.
    Indexed,
    /// The workspace exists.
    Ready,
    /// A program is prepared.
    Prepared,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            State::Empty => "empty",
            State::Loading => "loading",
            State::Loaded => "loaded",
            State::Indexed => "indexed",
            State::Ready => "ready",
            State::Prepared => "prepared",
        })
    }
}

/// The order of calls as a value: asked before each call, told after it succeeded.
#[derive(Clone, Debug, Default)]
pub struct Lifecycle {
    state: State,
}

impl Lifecycle {
    /// The state now.
    pub fn state(&self) -> State {
        self.state
    }

    /// Demands that `call` is made in `state`.
    ///
    /// # Errors
    /// [`Error::BadState`]
    pub fn expect(&self, call: &'static str, state: State) -> Result<()> {
        if self.state == state {
            return Ok(());
        }
        let expected = match state {
            State::Empty => "empty",
            State::Loading => "loading",
            State::Loaded => "loaded",
            State::Indexed => "indexed",
            State::Ready => "ready",
            State::Prepared => "prepared",
        };
        Err(Error::BadState {
            call,
            state: self.state,
            expected,
        })
    }

    /// Demands that weights are resident: `Loaded` or later.
    ///
    /// # Errors
    /// [`Error::BadState`]
    pub fn expect_resident(&self, call: &'static str) -> Result<()> {
        self.expect_at_least(call, State::Loaded, "loaded")
    }

    /// Demands a workspace: `Ready` or later (a program may be replaced by another).
    ///
    /// # Errors
    /// [`Error::BadState`]
    pub fn expect_ready(&self, call: &'static str) -> Result<()> {
        self.expect_at_least(call, State::Ready, "ready")
    }

    fn expect_at_least(&self, call: &'static str, least: State, expected: &'static str) -> Result<()> {
        if self.state >= least {
            Ok(())
        } else {
            Err(Error::BadState {
                call,
                state: self.state,
                expected,
            })
        }
    }

    /// Records that a call succeeded and led here.
    pub fn enter(&mut self, state: State) {
        self.state = state;
    }
}
