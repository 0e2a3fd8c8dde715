//! Prompts of every kind.

use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::bad_input::refused;
use crate::support::{Ran, hoist, run};

/// What the embedded model makes of a prompt in a file.
fn from_file(bytes: &[u8]) -> Ran {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    run(&[
        "generate",
        "-n",
        "0",
        "--json",
        "--prompt-file",
        file.path().to_str().unwrap(),
    ])
}

#[test]
fn a_prompt_that_is_no_text_says_where() {
    refused(&from_file(b"abc\xff\xfe"), 2, &["no UTF-8 text", "at byte 3"]);
    assert_eq!(from_file(b"abc\0\x1b").code, Some(0));
}

#[test]
fn a_prompt_without_an_end_is_refused_and_a_long_one_counted() {
    let started = Instant::now();
    let endless = run(&["generate", "-n", "1", "--prompt-file", "/dev/zero"]);
    refused(&endless, 2, &["/dev/zero", "more than 16777216 bytes"]);
    let long = "In the beginning ".repeat(60_000);
    refused(
        &from_file(long.as_bytes()),
        2,
        &["tokens and the context holds 512"],
    );
    refused(
        &from_file(&[b'a'; 1 << 20]),
        2,
        &["tokens and the context holds 512"],
    );
    assert!(
        started.elapsed() < Duration::from_secs(20),
        "{:?}",
        started.elapsed()
    );
}

#[test]
fn what_was_not_decoded_has_no_speed() {
    let ran = from_file(b"In the");
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(report["text"], "");
    assert!(report["timing"]["prompt_tok_s"].is_null(), "{}", report["timing"]);
    assert!(report["timing"]["decode_tok_s"].is_null(), "{}", report["timing"]);
}

#[test]
fn a_dash_reads_standard_input_and_begins_a_text() {
    let piped = |arguments: &[&str]| -> Ran {
        let mut child = hoist()
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(b"And God").unwrap();
        child.wait_with_output().unwrap().into()
    };
    for command in [&["generate", "-n", "3"][..], &["logits"]] {
        let typed = run(&[command, &["-p", "And God"]].concat());
        let read = piped(&[command, &["-p", "-"]].concat());
        assert_eq!(
            (read.code, read.stdout),
            (Some(0), typed.stdout),
            "{}",
            read.stderr
        );
        let dashed = run(&[command, &["-p", "- And"]].concat());
        assert_eq!(dashed.code, Some(0), "{}", dashed.stderr);
    }
}

#[test]
fn a_prompt_that_is_still_being_typed_can_be_interrupted() {
    for command in ["generate", "logits"] {
        let mut child = hoist()
            .args([command, "-p", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(300));
        // Not INT, which a child ignores where the tests are a shell's background job.
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                child.kill().unwrap();
                break child.wait().unwrap();
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        assert_eq!(
            status.signal(),
            Some(Signal::TERM.as_raw()),
            "{command}: {status}"
        );
    }
}
