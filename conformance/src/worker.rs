//! A group of cases in its own process: what the parent asks, what the child answers, and the child's part.

use std::fs::{File, OpenOptions as FileOptions};
use std::io::{self, Write as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use hoist_backend::{BackendInfo, OpenOptions};
use serde::{Deserialize, Serialize};

use crate::context::Measurement;
use crate::mutation::{Rule, holds};
use crate::report::BackendFacts;
use crate::{Case, Context, Failure, Outcome, Target, suites};

/// What a child is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Stands in every line of the answer: a library that ends the process with 0, or writes to a file it found, does
    /// not know it.
    pub nonce: String,
    /// The target, as the user named it.
    pub target: String,
    /// SHA-256 of the library that was judged; the child refuses another.
    pub sha256: Option<String>,
    /// The run's seed.
    pub seed: u64,
    /// Cases, in order.
    pub cases: Vec<String>,
    /// Where answers go.
    pub results: PathBuf,
}

/// One line of the answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Line {
    pub(crate) nonce: String,
    #[serde(flatten)]
    pub(crate) event: Event,
}

/// What happened in the child.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Event {
    /// The target is open, and this is what it is.
    Opened { backend: BackendFacts },
    /// The target does not open.
    Refused { error: String },
    /// A case begins.
    Begin { case: String },
    /// A case has ended.
    End {
        case: String,
        outcome: Outcome,
        measurements: Vec<Measurement>,
        micros: u64,
    },
    /// All cases have ended; the process ends next.
    Done,
}

impl Job {
    /// Reads a job.
    ///
    /// # Errors
    /// If the file cannot be read or is no job.
    pub fn read(path: &Path) -> io::Result<Self> {
        serde_json::from_slice(&std::fs::read(path)?).map_err(io::Error::from)
    }

    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        std::fs::write(path, serde_json::to_vec(self)?)
    }
}

struct Answers<'a> {
    job: &'a Job,
    file: File,
}

impl Answers<'_> {
    fn say(&mut self, event: Event) -> io::Result<()> {
        let mut line = serde_json::to_vec(&Line {
            nonce: self.job.nonce.clone(),
            event,
        })?;
        line.push(b'\n');
        // One write, so that the parent never sees half a line from a process that ends.
        self.file.write_all(&line)
    }
}

/// What a child process does: opens the target by `open`, asks the job's cases, writes the answers.
///
/// # Errors
/// If the answers cannot be written.
pub fn run(job: &Job, open: impl FnOnce() -> Result<Box<dyn Target>, String>) -> io::Result<()> {
    keep_panics_quiet();
    let file = FileOptions::new().append(true).open(&job.results)?;
    let mut answers = Answers { job, file };
    let target = match open() {
        Ok(target) => target,
        Err(error) => return answers.say(Event::Refused { error }),
    };
    let info = match first_look(&*target) {
        Ok(info) => info,
        Err(error) => return answers.say(Event::Refused { error }),
    };
    answers.say(Event::Opened {
        backend: BackendFacts::of(&info),
    })?;
    let cases = suites::all();
    for id in &job.cases {
        answers.say(Event::Begin { case: id.clone() })?;
        let started = Instant::now();
        let (outcome, measurements) = match cases.iter().find(|c| c.id() == *id) {
            Some(case) => ask(case, &*target, &info, job.seed, true),
            None => {
                let reason = "this program has no such case".to_owned();
                (Outcome::Skip { reason }, Vec::new())
            }
        };
        answers.say(Event::End {
            case: id.clone(),
            outcome,
            measurements,
            micros: u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX),
        })?;
    }
    drop(target);
    answers.say(Event::Done)
}

/// Opens the target once, to learn what it declares.
pub(crate) fn first_look(target: &dyn Target) -> Result<BackendInfo, String> {
    let opened = catch_unwind(AssertUnwindSafe(|| target.open(&OpenOptions::default())));
    match opened {
        Ok(Ok(backend)) => Ok(backend.info().clone()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("opening panicked: {}", last_panic())),
    }
}

/// Asks one case.
pub(crate) fn ask(
    case: &Case,
    target: &dyn Target,
    info: &BackendInfo,
    seed: u64,
    isolated: bool,
) -> (Outcome, Vec<Measurement>) {
    let mut cx = Context::new(target, info, seed, &case.id(), isolated);
    if let Some(stop) = case.needs.iter().find_map(|need| cx.check(*need).err()) {
        return (Err(stop).into(), Vec::new());
    }
    let outcome = match catch_unwind(AssertUnwindSafe(|| case.ask(&mut cx))) {
        Ok(verdict) => verdict.into(),
        Err(_) if !holds(Rule::PanicIsAFailure) => Outcome::Pass,
        Err(_) => Outcome::Fail {
            failure: Failure::new("a call into the backend", "", "no panic", last_panic()),
        },
    };
    (outcome, cx.into_measurements())
}

static LAST_PANIC: Mutex<String> = Mutex::new(String::new());

fn last_panic() -> String {
    LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Panics of this process go into outcomes instead of stderr, where what a library prints is looked for.
pub(crate) fn keep_panics_quiet() {
    std::panic::set_hook(Box::new(|panic| {
        *LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner) = panic.to_string();
    }));
}
