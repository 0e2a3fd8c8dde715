//! Runs an unknown library once in a child process, so that what it does to a process it does not do to ours.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::header::shown;
use crate::policy::Candidate;
use crate::{Error, Result};

/// How an unknown library is tried out.
#[derive(Clone, Debug)]
pub enum Probe {
    /// In a child process: `program arguments… PATH SHA256 NONCE`. It must call [`crate::probe_here`] and print
    /// [`probe_line`] on success.
    Child {
        /// The program, normally this one.
        program: PathBuf,
        /// Arguments before the path.
        arguments: Vec<String>,
        /// How long it may take.
        limit: Duration,
    },
    /// Not at all: the library is known, or this is the child.
    Skip,
}

/// What a probing child prints when the library survived: a result bound to the nonce, since a constructor that calls
/// `exit(0)` looks like success otherwise.
pub fn probe_line(nonce: &str, devices: u32) -> String {
    format!("hoist-probe {nonce} {devices}")
}

/// How often a child is looked at.
const POLL: Duration = Duration::from_millis(2);
/// More output than this is not read.
const MAX_OUTPUT: u64 = 64 << 10;

impl Probe {
    /// Tries a library out.
    ///
    /// # Errors
    /// [`Error::Probe`]
    pub fn check(&self, candidate: &Candidate) -> Result<()> {
        let Self::Child {
            program,
            arguments,
            limit,
        } = self
        else {
            return Ok(());
        };
        let fail = |reason: String| Error::Probe {
            path: candidate.path.clone(),
            reason,
        };
        let nonce = nonce();
        let mut child = Command::new(program)
            .args(arguments)
            .arg(&candidate.path)
            .args([&candidate.sha256, &nonce])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| fail(format!("`{}` does not start: {e}", program.display())))?;
        // Both pipes are drained beside the wait, so that a child that prints a lot neither blocks nor fills memory.
        let stdout = child.stdout.take().map(drain);
        let stderr = child.stderr.take().map(drain);
        let started = Instant::now();
        let status = loop {
            match child.try_wait().map_err(|e| fail(e.to_string()))? {
                Some(status) => break Some(status),
                None if started.elapsed() > *limit => {
                    // It may have ended by now, which is what is wanted.
                    let _ = child.kill();
                    child.wait().map_err(|e| fail(e.to_string()))?;
                    break None;
                }
                None => std::thread::sleep(POLL),
            }
        };
        // A process that the library left behind may hold the pipes open for ever: it is not waited for. A reader that is gone
        // has nothing to tell.
        let collect = |reader: Option<mpsc::Receiver<String>>| {
            let left = limit.saturating_sub(started.elapsed()).max(POLL);
            match reader.map(|r| r.recv_timeout(left)) {
                Some(Err(mpsc::RecvTimeoutError::Timeout)) => Err(fail(format!(
                    "it left a process behind that kept its output open for {} ms",
                    limit.as_millis()
                ))),
                Some(Ok(text)) => Ok(text),
                Some(Err(mpsc::RecvTimeoutError::Disconnected)) | None => Ok(String::new()),
            }
        };
        let Some(status) = status else {
            return Err(fail(format!(
                "it did not come back within {} ms and was ended",
                limit.as_millis()
            )));
        };
        let (stdout, stderr) = (collect(stdout)?, collect(stderr)?);
        let answered = stdout
            .lines()
            .any(|line| line.split(' ').take(2).eq(["hoist-probe", nonce.as_str()]));
        if status.success() && answered {
            return Ok(());
        }
        let said = stderr
            .lines()
            .last()
            .map(|l| format!(": {}", shown(l)))
            .unwrap_or_else(String::new);
        Err(fail(match status.code() {
            Some(0) => "the process that loaded it exited with 0 and no result".to_owned(),
            _ => format!("{}{said}", describe(status)),
        }))
    }
}

fn drain(pipe: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (told, text) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let mut pipe = pipe;
        // What could not be read is missing from a message, no more.
        let _ = pipe.by_ref().take(MAX_OUTPUT).read_to_end(&mut bytes);
        let _ = std::io::copy(&mut pipe, &mut std::io::sink());
        // Whoever asked may have gone on.
        let _ = told.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    text
}

pub(crate) fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("the process that loaded it exited with {code}"),
        (None, Some(6)) => "the process that loaded it aborted (signal 6)".to_owned(),
        (None, Some(11)) => "the process that loaded it crashed (signal 11)".to_owned(),
        (None, signal) => format!("the process that loaded it ended by signal {signal:?}"),
    }
}

fn nonce() -> String {
    use std::hash::{BuildHasher, Hasher};
    // Two randomly keyed hashes: unguessable enough for a library that does not expect the question.
    let word = || {
        std::collections::hash_map::RandomState::new()
            .build_hasher()
            .finish()
    };
    format!("{:016x}{:016x}", word(), word())
}
