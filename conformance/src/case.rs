//! A case: one question with a stable id.

use std::fmt;
use std::time::Duration;

use hoist_backend::{Encoding, OpName};

use crate::{Context, Verdict};

/// What a case needs the backend to declare, or the run to offer. A capability that is not declared makes the case
/// *unsupported*; something that this run does not offer makes it a *skip*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// It decodes: it declares at least one operation.
    Decode,
    /// It can hold weights of this encoding.
    Stored(Encoding),
    /// It can multiply with, and embed from, this encoding.
    Computed(Encoding),
    /// It can run this operation.
    Op(OpName),
    /// It is a plugin, whose interface can be called directly.
    Plugin,
    /// The case runs in a process of its own group, whose output, memory and threads it may audit.
    Process,
}

type Run = Box<dyn Fn(&mut Context<'_>) -> Verdict + Send + Sync>;

/// One question put to a backend.
pub struct Case {
    /// The suite, such as `residency`.
    pub suite: &'static str,
    /// The group: its cases share a child process, one after the other.
    pub group: &'static str,
    /// The case's own name.
    pub name: &'static str,
    /// Fixed parameters, in the order they stand in the id. What is drawn at random does not belong here: ids are stable.
    pub parameters: Vec<(&'static str, String)>,
    /// What it needs.
    pub needs: Vec<Need>,
    /// How long it may take.
    pub limit: Duration,
    /// Whether it depends on the seed, and so is worth repeating with another.
    pub seeded: bool,
    run: Run,
}

/// How long a case may take unless it says otherwise.
pub const LIMIT: Duration = Duration::from_secs(20);

impl Case {
    /// A case without parameters or needs, that depends on the seed and may take [`LIMIT`].
    pub fn new(
        suite: &'static str,
        group: &'static str,
        name: &'static str,
        run: impl Fn(&mut Context<'_>) -> Verdict + Send + Sync + 'static,
    ) -> Self {
        Self {
            suite,
            group,
            name,
            parameters: Vec::new(),
            needs: Vec::new(),
            limit: LIMIT,
            seeded: true,
            run: Box::new(run),
        }
    }

    /// Adds a parameter to the id.
    #[must_use]
    pub fn with(mut self, parameter: &'static str, value: impl fmt::Display) -> Self {
        self.parameters.push((parameter, value.to_string()));
        self
    }

    /// Adds a need.
    #[must_use]
    pub fn needs(mut self, need: Need) -> Self {
        self.needs.push(need);
        self
    }

    /// Sets how long it may take, in seconds.
    #[must_use]
    pub fn limit_s(mut self, seconds: u64) -> Self {
        self.limit = Duration::from_secs(seconds);
        self
    }

    /// Says that the seed changes nothing: many seeds run it once.
    #[must_use]
    pub fn unseeded(mut self) -> Self {
        self.seeded = false;
        self
    }

    /// `suite::group::name[parameter=value,…]`
    pub fn id(&self) -> String {
        self.to_string()
    }

    /// `suite::group`
    pub fn group_id(&self) -> String {
        format!("{}::{}", self.suite, self.group)
    }

    /// The value of a parameter.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters
            .iter()
            .find(|(n, _)| *n == name)
            .map(|(_, v)| v.as_str())
    }

    /// Asks the question.
    pub(crate) fn ask(&self, cx: &mut Context<'_>) -> Verdict {
        (self.run)(cx)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}::{}::{}", self.suite, self.group, self.name)?;
        for (i, (name, value)) in self.parameters.iter().enumerate() {
            write!(f, "{}{name}={value}", if i == 0 { "[" } else { "," })?;
        }
        if !self.parameters.is_empty() {
            f.write_str("]")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Case({self})")
    }
}
