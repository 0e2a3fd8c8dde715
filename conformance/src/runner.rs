//! Chooses cases, runs them in child processes, judges what comes back.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::expectation::{self, Expectation};
use crate::mutation::{Rule as Mutated, holds};
use crate::profile::{Profile, Rule};
use crate::report::{BackendFacts, CaseReport, Report};
use crate::worker::{self, Event, Job, Line};
use crate::{Case, Outcome, Target, pattern, suites};

/// What to run, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// What is demanded.
    pub profile: Profile,
    /// Only cases that match one of these, and none of those with `!` in front; all of the profile if there is none.
    pub filters: Vec<String>,
    /// Failures that are known.
    pub expectations: Vec<Expectation>,
    /// What random numbers are drawn from.
    pub seed: u64,
    /// Child processes at a time.
    pub jobs: usize,
    /// Longest time for one case, whatever the case allows itself.
    pub limit: Option<Duration>,
}

/// How a child is started: `program arguments… JOB`. It must call [`worker::run`] with the [`Job`] it reads from there.
#[derive(Clone, Debug)]
pub struct Launcher {
    /// The program, normally this one.
    pub program: PathBuf,
    /// Arguments before the job's path.
    pub arguments: Vec<String>,
    /// The target, as the user named it.
    pub target: String,
    /// SHA-256 of the library that was judged.
    pub sha256: Option<String>,
}

/// Why there is no run at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing is selected.
    #[error("nothing is selected: profile `{profile}` has no case that matches {}", filters.iter().map(|f| format!("`{f}`")).collect::<Vec<_>>().join(" or "))]
    EmptySelection {
        /// The profile.
        profile: String,
        /// The filters.
        filters: Vec<String>,
    },
    /// The children have nowhere to answer.
    #[error("running cases: {0}")]
    Io(#[from] io::Error),
}

/// How long a child may take to open the target, and to end.
const OPEN_LIMIT: Duration = Duration::from_secs(30);
/// How often a child is looked at.
const POLL: Duration = Duration::from_millis(2);
/// After so many cases of a group that did not come back, the rest is not tried.
const MOST_TIMEOUTS: usize = 3;

/// The cases that a run would ask, in order.
///
/// # Errors
/// [`Error::EmptySelection`]
pub fn select(options: &Options) -> Result<Vec<Case>, Error> {
    let selected: Vec<Case> = suites::all()
        .into_iter()
        .filter(|case| {
            let id = case.id();
            options.profile.rule(&id).is_some() && passes(&options.filters, &id)
        })
        .collect();
    if selected.is_empty() {
        return Err(Error::EmptySelection {
            profile: options.profile.name.clone(),
            filters: options.filters.clone(),
        });
    }
    Ok(selected)
}

/// Whether filters let a case pass.
fn passes(filters: &[String], id: &str) -> bool {
    let (mut wanted, mut found) = (false, false);
    for filter in filters {
        match filter.strip_prefix('!') {
            Some(unwanted) if pattern::matches(unwanted, id) => return false,
            Some(_) => {}
            None => {
                wanted = true;
                found |= pattern::matches(filter, id);
            }
        }
    }
    found || !wanted
}

/// Runs the selected cases, each group in a child process. `seen` is told of each case as it ends.
///
/// # Errors
/// [`Error`]
pub fn run(
    launcher: &Launcher,
    options: &Options,
    seen: &(dyn Fn(&CaseReport) + Sync),
) -> Result<Report, Error> {
    let started = Instant::now();
    let cases = select(options)?;
    let folder = tempfile::tempdir()?;
    let mut groups: Vec<(String, Vec<&Case>)> = Vec::new();
    for case in &cases {
        let group = case.group_id();
        match groups.last_mut() {
            Some((last, members)) if *last == group => members.push(case),
            _ => groups.push((group, vec![case])),
        }
    }
    let run = Run {
        launcher,
        options,
        folder: folder.path(),
        seen,
        backend: Mutex::new(None),
        reports: Mutex::new(BTreeMap::new()),
        error: Mutex::new(None),
        files: AtomicUsize::new(0),
    };
    // What is timed runs when nothing else does.
    let (timed, others): (Vec<_>, Vec<_>) = groups.iter().partition(|(g, _)| g.starts_with("performance::"));
    for (groups, jobs) in [(others, options.jobs.max(1)), (timed, 1)] {
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..jobs.min(groups.len()) {
                scope.spawn(|| {
                    while let Some((_, members)) = groups.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if let Err(error) = run.group(members) {
                            *lock(&run.error) = Some(error);
                            return;
                        }
                    }
                });
            }
        });
    }
    if let Some(error) = lock(&run.error).take() {
        return Err(error.into());
    }
    let mut reports = std::mem::take(&mut *lock(&run.reports));
    let in_order = cases
        .iter()
        .filter_map(|case| reports.remove(&case.id()))
        .collect();
    let backend = lock(&run.backend).take();
    Ok(Report::judge(
        options,
        &launcher.target,
        backend,
        in_order,
        1,
        started.elapsed(),
    ))
}

/// Runs the seeded cases of the selection in this process, with each of `seeds` seeds from [`Options::seed`] on, in
/// [`Options::jobs`] threads. A case reports the first seed with which it went wrong. A crash ends the process.
///
/// # Errors
/// [`Error::EmptySelection`]
pub fn run_in_process(
    target: &dyn Target,
    options: &Options,
    seeds: u64,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Report, Error> {
    let started = Instant::now();
    let mut cases = select(options)?;
    if seeds > 1 {
        cases.retain(|case| case.seeded);
    }
    worker::keep_panics_quiet();
    let info = worker::first_look(target).map_err(io::Error::other)?;
    let next = AtomicU64::new(0);
    let reports: Mutex<BTreeMap<String, CaseReport>> = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..(options.jobs.max(1) as u64).min(seeds) {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= seeds {
                        return;
                    }
                    let seed = options.seed.wrapping_add(n);
                    for case in &cases {
                        let began = Instant::now();
                        let (outcome, measurements) = worker::ask(case, target, &info, seed, false);
                        let took = began.elapsed();
                        let report = case_report(
                            options,
                            &target_name(target),
                            case,
                            seed,
                            outcome,
                            measurements,
                            took,
                        );
                        let mut reports = lock(&reports);
                        match reports.get_mut(&report.id) {
                            None => {
                                reports.insert(report.id.clone(), report);
                            }
                            Some(first) if report.outcome.is_failure() && !first.outcome.is_failure() => {
                                *first = report;
                            }
                            Some(first) => first.micros += report.micros,
                        }
                    }
                    progress(n + 1);
                }
            });
        }
    });
    let mut reports = std::mem::take(&mut *lock(&reports));
    let in_order = cases
        .iter()
        .filter_map(|case| reports.remove(&case.id()))
        .collect();
    Ok(Report::judge(
        options,
        target.name(),
        Some(BackendFacts::of(&info)),
        in_order,
        seeds,
        started.elapsed(),
    ))
}

fn target_name(target: &dyn Target) -> String {
    target.name().to_owned()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn case_report(
    options: &Options,
    target: &str,
    case: &Case,
    seed: u64,
    outcome: Outcome,
    measurements: Vec<crate::context::Measurement>,
    took: Duration,
) -> CaseReport {
    let id = case.id();
    let rule = options.profile.rule(&id).unwrap_or(Rule::May);
    let outcome = expectation::apply(&options.expectations, &id, outcome);
    CaseReport {
        suite: case.suite.to_owned(),
        group: case.group.to_owned(),
        parameters: case
            .parameters
            .iter()
            .map(|(n, v)| ((*n).to_owned(), v.clone()))
            .collect(),
        replay: crate::report::replay(target, &options.profile.name, seed, &id),
        id,
        rule,
        outcome,
        seed,
        measurements,
        micros: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
    }
}

/// What the threads of a run share.
struct Run<'a> {
    launcher: &'a Launcher,
    options: &'a Options,
    folder: &'a Path,
    seen: &'a (dyn Fn(&CaseReport) + Sync),
    backend: Mutex<Option<BackendFacts>>,
    reports: Mutex<BTreeMap<String, CaseReport>>,
    error: Mutex<Option<io::Error>>,
    files: AtomicUsize,
}

impl Run<'_> {
    /// Runs a group: one child, and another for what is left when one ends early.
    fn group(&self, members: &[&Case]) -> io::Result<()> {
        let mut left = members;
        let mut timeouts = 0;
        while !left.is_empty() {
            if timeouts >= MOST_TIMEOUTS {
                for case in left {
                    let how = format!("not asked: {timeouts} cases of its group did not come back");
                    self.report(case, Outcome::NoResult { how }, Vec::new(), Duration::ZERO);
                }
                return Ok(());
            }
            let answered = self.child(left, &mut timeouts)?;
            // At least one case gets its outcome from each child.
            left = &left[answered.clamp(1, left.len())..];
        }
        Ok(())
    }

    /// Runs one child for cases, and returns how many of them have an outcome now.
    fn child(&self, cases: &[&Case], timeouts: &mut usize) -> io::Result<usize> {
        let number = self.files.fetch_add(1, Ordering::Relaxed);
        let path = |what: &str| self.folder.join(format!("{number}.{what}"));
        let job = Job {
            nonce: nonce(),
            target: self.launcher.target.clone(),
            sha256: self.launcher.sha256.clone(),
            seed: self.options.seed,
            cases: cases.iter().map(|c| c.id()).collect(),
            results: path("results"),
        };
        job.write(&path("job"))?;
        File::create(&job.results)?;
        let stderr = path("stderr");
        let mut child = Command::new(&self.launcher.program)
            .args(&self.launcher.arguments)
            .arg(path("job"))
            .stdin(Stdio::null())
            .stdout(File::create(path("stdout"))?)
            .stderr(File::create(&stderr)?)
            .spawn()?;
        let mut answers = Answers::new(&job)?;
        let mut state = GroupState::new(cases);
        let ended = loop {
            let status = child.try_wait()?;
            for event in answers.read()? {
                self.take(&mut state, event);
            }
            if let Some(status) = status {
                break Ended::By(status);
            }
            let limit = self.limit(&state);
            if state.since.elapsed() > limit {
                kill(&mut child)?;
                break Ended::Late(limit);
            }
            std::thread::sleep(POLL);
        };
        // What was written between the last look and the end.
        for event in answers.read()? {
            self.take(&mut state, event);
        }
        let last_words = tail(&stderr);
        for file in ["job", "results", "stdout", "stderr"] {
            // They go with the folder at the latest.
            let _ = std::fs::remove_file(path(file));
        }
        Ok(self.settle(cases, state, ended, &last_words, timeouts))
    }

    /// Gives outcomes to what a child left open.
    fn settle(
        &self,
        cases: &[&Case],
        state: GroupState<'_>,
        ended: Ended,
        last_words: &str,
        timeouts: &mut usize,
    ) -> usize {
        let how = |when: &str| match &ended {
            Ended::By(status) => format!("{} {when}{last_words}", describe(*status)),
            Ended::Late(limit) => format!("no answer within {} ms {when}", limit.as_millis()),
        };
        let outcome = |when: &str| match &ended {
            Ended::Late(limit) => Outcome::Timeout {
                limit_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
            },
            Ended::By(status) if status.success() && !holds(Mutated::ExitZeroIsNoResult) => Outcome::Pass,
            Ended::By(status) if status.success() => Outcome::NoResult { how: how(when) },
            Ended::By(_) => Outcome::Crash { how: how(when) },
        };
        if let Some(error) = &state.refused {
            for case in cases {
                let failure = crate::Failure::new("opening the device", "", "success", error);
                self.report(case, Outcome::Fail { failure }, Vec::new(), Duration::ZERO);
            }
            return cases.len();
        }
        if let Some(running) = state.running {
            *timeouts += usize::from(matches!(ended, Ended::Late(_)));
            self.report(
                running,
                outcome("during the case"),
                Vec::new(),
                state.since.elapsed(),
            );
            return state.answered + 1;
        }
        if state.done || state.answered == cases.len() {
            let clean = state.done && matches!(&ended, Ended::By(status) if status.success())
                || !holds(Mutated::EndIsWatched);
            if !clean && let Some(last) = cases.last() {
                let outcome = match outcome("while the process was ending, after the last case of the group")
                {
                    Outcome::Timeout { .. } => Outcome::Crash {
                        how: how("while the process was ending, after the last case of the group"),
                    },
                    other => other,
                };
                self.report(last, outcome, Vec::new(), Duration::ZERO);
            }
            return cases.len();
        }
        if state.answered > 0 {
            // Between two cases: the next one is blamed, since it was about to begin.
            if let Some(next) = cases.get(state.answered) {
                self.report(next, outcome("before the case began"), Vec::new(), Duration::ZERO);
            }
            return state.answered + 1;
        }
        for case in cases {
            self.report(
                case,
                outcome("while the device was opened"),
                Vec::new(),
                Duration::ZERO,
            );
        }
        cases.len()
    }

    fn limit(&self, state: &GroupState<'_>) -> Duration {
        let limit = state.running.map_or(OPEN_LIMIT, |case| case.limit);
        self.options.limit.map_or(limit, |cap| limit.min(cap))
    }

    fn take(&self, state: &mut GroupState<'_>, event: Event) {
        state.since = Instant::now();
        match event {
            Event::Opened { backend } => {
                lock(&self.backend).get_or_insert(backend);
            }
            Event::Refused { error } => state.refused = Some(error),
            Event::Begin { case } => {
                state.running = state
                    .cases
                    .get(state.answered)
                    .copied()
                    .filter(|c| c.id() == case);
            }
            Event::End {
                case,
                outcome,
                measurements,
                micros,
            } => {
                if let Some(running) = state.running.filter(|c| c.id() == case) {
                    self.report(running, outcome, measurements, Duration::from_micros(micros));
                    state.answered += 1;
                    state.running = None;
                }
            }
            Event::Done => state.done = true,
        }
    }

    /// Records an outcome; the last one of a case counts.
    fn report(
        &self,
        case: &Case,
        outcome: Outcome,
        measurements: Vec<crate::context::Measurement>,
        took: Duration,
    ) {
        let report = case_report(
            self.options,
            &self.launcher.target,
            case,
            self.options.seed,
            outcome,
            measurements,
            took,
        );
        (self.seen)(&report);
        lock(&self.reports).insert(report.id.clone(), report);
    }
}

/// How far a child is.
struct GroupState<'a> {
    cases: &'a [&'a Case],
    answered: usize,
    running: Option<&'a Case>,
    refused: Option<String>,
    done: bool,
    /// When it last said something.
    since: Instant,
}

impl<'a> GroupState<'a> {
    fn new(cases: &'a [&'a Case]) -> Self {
        Self {
            cases,
            answered: 0,
            running: None,
            refused: None,
            done: false,
            since: Instant::now(),
        }
    }
}

enum Ended {
    By(ExitStatus),
    Late(Duration),
}

/// The answers of a child, as they are written.
struct Answers {
    file: File,
    nonce: String,
    /// What was read of a line that is not whole yet.
    rest: Vec<u8>,
}

impl Answers {
    fn new(job: &Job) -> io::Result<Self> {
        Ok(Self {
            file: File::open(&job.results)?,
            nonce: job.nonce.clone(),
            rest: Vec::new(),
        })
    }

    /// New events; lines without the nonce are nobody's.
    fn read(&mut self) -> io::Result<Vec<Event>> {
        self.file.read_to_end(&mut self.rest)?;
        let mut events = Vec::new();
        while let Some(end) = self.rest.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            match serde_json::from_slice::<Line>(&line) {
                Ok(line) if line.nonce == self.nonce || !holds(Mutated::NonceIsChecked) => {
                    events.push(line.event);
                }
                Ok(_) | Err(_) => {}
            }
        }
        Ok(events)
    }
}

fn kill(child: &mut Child) -> io::Result<()> {
    // It may have ended by now, which is what is wanted.
    let _ = child.kill();
    child.wait().map(|_| ())
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    let signal = |n| match n {
        4 => "an illegal instruction (signal 4)".to_owned(),
        6 => "an abort (signal 6)".to_owned(),
        7 => "a bus error (signal 7)".to_owned(),
        8 => "an arithmetic error (signal 8)".to_owned(),
        9 => "being killed (signal 9)".to_owned(),
        11 => "a segmentation fault (signal 11)".to_owned(),
        n => format!("signal {n}"),
    };
    match (status.code(), status.signal()) {
        (_, Some(n)) => format!("the process ended by {}", signal(n)),
        (Some(code), None) => format!("the process exited with {code} and no result"),
        (None, None) => "the process ended".to_owned(),
    }
}

/// The last line of a file, as a suffix to a message.
fn tail(path: &Path) -> String {
    const MOST: u64 = 64 << 10;
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MOST).read_to_end(&mut bytes));
    let text = String::from_utf8_lossy(&bytes);
    match (read, text.lines().rfind(|line| !line.trim().is_empty())) {
        (Ok(_), Some(line)) => format!(": {}", line.chars().take(300).collect::<String>()),
        _ => String::new(),
    }
}

fn nonce() -> String {
    use std::hash::{BuildHasher, Hasher};
    // Two randomly keyed hashes: a library that does not expect the question cannot guess them.
    let word = || {
        std::collections::hash_map::RandomState::new()
            .build_hasher()
            .finish()
    };
    format!("{:016x}{:016x}", word(), word())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Runs one group of two cases in children that run a shell script instead of this program: `$0` is the job, `$n` the
    /// nonce, `$r` the file of results, `$a` and `$b` the cases. On this thread, so that rules can be switched off.
    pub(crate) fn outcomes_of(script: &str) -> Vec<Outcome> {
        let cases = select(&options(&["index::build"])).unwrap();
        let members: Vec<&Case> = cases.iter().take(2).collect();
        let folder = tempfile::tempdir().unwrap();
        let field = |name: &str| format!(r#"$(sed 's/.*"{name}":"\([^"]*\)".*/\1/' "$0")"#);
        let script = format!(
            "n={}; r={}; a={}; b={}; say() {{ printf '{{\"nonce\":\"%s\",%s}}\\n' \"$n\" \"$1\" >> \"$r\"; }}\n{script}",
            field("nonce"),
            field("results"),
            members[0].id(),
            members[1].id(),
        );
        let launcher = Launcher {
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script],
            target: "script".into(),
            sha256: None,
        };
        let options = Options {
            limit: Some(Duration::from_secs(3)),
            ..options(&["index::build"])
        };
        let run = Run {
            launcher: &launcher,
            options: &options,
            folder: folder.path(),
            seen: &|_| {},
            backend: Mutex::new(None),
            reports: Mutex::new(BTreeMap::new()),
            error: Mutex::new(None),
            files: AtomicUsize::new(0),
        };
        run.group(&members).unwrap();
        let mut reports = lock(&run.reports);
        members
            .iter()
            .map(|case| reports.remove(&case.id()).unwrap().outcome)
            .collect()
    }

    pub(crate) const BEGIN_A: &str = r#"say "\"event\":\"begin\",\"case\":\"$a\"";"#;
    pub(crate) const END_A: &str = r#"say "\"event\":\"end\",\"case\":\"$a\",\"outcome\":{\"outcome\":\"pass\"},\"measurements\":[],\"micros\":1";"#;
    pub(crate) const BEGIN_B: &str = r#"say "\"event\":\"begin\",\"case\":\"$b\"";"#;
    pub(crate) const END_B: &str = r#"say "\"event\":\"end\",\"case\":\"$b\",\"outcome\":{\"outcome\":\"pass\"},\"measurements\":[],\"micros\":1";"#;
    pub(crate) const DONE: &str = r#"say "\"event\":\"done\"";"#;

    fn names(script: &str) -> [&'static str; 2] {
        let outcomes = outcomes_of(script);
        [outcomes[0].name(), outcomes[1].name()]
    }

    #[test]
    fn a_child_that_answers_all_passes() {
        let all = [BEGIN_A, END_A, BEGIN_B, END_B, DONE].concat();
        assert_eq!(names(&all), ["pass", "pass"]);
    }

    #[test]
    fn a_child_that_ends_in_the_middle_costs_one_case() {
        // Asked again without the first case, it does well.
        let rest = format!("grep -q \"$a\" \"$0\" || {{ {BEGIN_B} {END_B} {DONE} exit 0; }};");
        for (end, name) in [
            ("kill -SEGV $$", "crash"),
            ("exit 3", "crash"),
            ("exit 0", "no result"),
            ("exec sleep 60", "timeout"),
        ] {
            assert_eq!(names(&format!("{rest} {BEGIN_A} {end}")), [name, "pass"], "{end}");
        }
        let cut = format!("{rest} {BEGIN_A} {END_A} kill -ABRT $$");
        assert_eq!(names(&cut), ["pass", "crash"]);
    }

    #[test]
    fn a_child_that_fails_at_the_end_fails_its_last_case() {
        let all = [BEGIN_A, END_A, BEGIN_B, END_B].concat();
        assert_eq!(names(&format!("{all} kill -SEGV $$")), ["pass", "crash"]);
        assert_eq!(names(&format!("{all} {DONE} exit 1")), ["pass", "crash"]);
        assert_eq!(names(&format!("{all} {DONE} exec sleep 60")), ["pass", "crash"]);
        assert_eq!(names(&format!("{all} exit 0")), ["pass", "no result"]);
    }

    #[test]
    fn answers_without_the_nonce_are_nobodys() {
        let all = [BEGIN_A, END_A, BEGIN_B, END_B, DONE].concat();
        assert_eq!(names(&format!("n=guessed; {all}")), ["no result", "no result"]);
        assert_eq!(names(&format!("echo rubbish >> $r; {all}")), ["pass", "pass"]);
    }

    #[test]
    fn a_child_that_never_opens_the_device_fails_all() {
        assert_eq!(names("kill -SEGV $$"), ["crash", "crash"]);
        let refused = r#"say "\"event\":\"refused\",\"error\":\"no\"";"#;
        assert_eq!(names(refused), ["fail", "fail"]);
    }

    fn options(filters: &[&str]) -> Options {
        Options {
            profile: Profile::parse("p", "must residency\nmust index").unwrap(),
            filters: filters.iter().map(|f| (*f).to_owned()).collect(),
            expectations: Vec::new(),
            seed: 1,
            jobs: 1,
            limit: None,
        }
    }

    #[test]
    fn filters_choose_within_the_profile() {
        let count = |filters: &[&str]| select(&options(filters)).map_or(0, |cases| cases.len());
        let all = count(&[]);
        let index = count(&["index"]);
        assert!(index > 0 && index < all);
        assert_eq!(count(&["!index"]), all - index);
        assert_eq!(
            count(&["index", "!index::build"]),
            index - count(&["index::build"])
        );
        assert_eq!(count(&["index", "residency"]), all);
        // Not in the profile, though there is such a suite.
        assert!(matches!(
            select(&options(&["lifecycle"])),
            Err(Error::EmptySelection { .. })
        ));
    }
}
