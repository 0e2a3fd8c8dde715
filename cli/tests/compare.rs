//! `hoist compare`: equal backends are equal, and a backend that errs in one way is not.
#![expect(clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

fn compare(fault: &str, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hoist"))
        .arg("compare")
        .args([
            "--positions",
            "12",
            "--batches",
            "1,3",
            "--chunks",
            "1,5,512",
            "--json",
        ])
        .args(arguments)
        .env("HOIST_FAULT", fault)
        .output()
        .expect("it starts")
}

/// The library that cargo has built for the development dependency, beside this program.
fn faulty() -> String {
    let path: PathBuf = std::env::current_exe()
        .expect("this program")
        .with_file_name("libhoist_plugin_faulty.so");
    assert!(path.is_file(), "no `{}`", path.display());
    format!("plugin:{}", path.display())
}

fn report(output: &Output, code: i32) -> Value {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn scalar_code_and_a_plugin_have_the_references_bits() {
    let plugin = faulty();
    for arguments in [
        &["--force-scalar", "--threads", "1", "--runs", "2"][..],
        &["--backend", &plugin],
    ] {
        let report = report(&compare("", arguments), 0);
        assert_eq!(report["equal"], true);
        let compared: Vec<u64> = report["cases"]
            .as_array()
            .expect("cases")
            .iter()
            .map(|case| {
                assert_eq!((&case["differing"], &case["first"]), (&0.into(), &Value::Null));
                case["compared"].as_u64().expect("a number")
            })
            .collect();
        // Twelve positions of one sequence, and of two more those that end a batch: for logits, and for arg-maxima.
        let once = [24, 24, 24, 72, 36, 28];
        assert_eq!(
            compared,
            once.map(|n| n * report["runs"].as_u64().expect("a number"))
        );
    }
}

#[test]
fn the_digest_is_the_one_of_the_logits() {
    let tokens = ["--tokens", "5,9,1,7"];
    let output = Command::new(env!("CARGO_BIN_EXE_hoist"))
        .args(["compare", "--json", "--batches", "1"])
        .args(tokens)
        .output()
        .expect("it starts");
    let compared = report(&output, 0);
    let output = Command::new(env!("CARGO_BIN_EXE_hoist"))
        .args(["logits", "--json"])
        .args(tokens)
        .output()
        .expect("it starts");
    assert_eq!(compared["digest"], report(&output, 0)["digest"]);
}

/// What a fault changes: whether cases of `[batch 1, 3] × [chunk 1, 5, 512]` differ.
const FAULTS: &[(&str, [bool; 6])] = &[
    ("claims-exact", [true; 6]),
    ("argmax-wrong", [true; 6]),
    ("wrong-later", [true; 6]),
    // Tokens after the first of a batch.
    ("wrong-batch", [false, true, true, true, true, true]),
    // The last token of a batch as large as the workspace.
    ("workspace-short", [false, false, false, false, false, true]),
];

#[test]
fn a_backend_that_errs_differs_where_it_errs() {
    let plugin = faulty();
    for (fault, differs) in FAULTS {
        let report = report(&compare(fault, &["--backend", &plugin]), 1);
        assert_eq!(report["equal"], false, "{fault}");
        let found: Vec<bool> = report["cases"]
            .as_array()
            .expect("cases")
            .iter()
            .map(|case| {
                assert_eq!(case["differing"] == 0, case["first"].is_null(), "{fault}");
                case["differing"] != 0
            })
            .collect();
        assert_eq!(found, differs, "{fault}");
    }
}

#[test]
fn what_cannot_be_compared_is_an_error() {
    for (arguments, code) in [
        (&["--batches", "0"][..], 2),
        (&["--chunks", ""], 2),
        (&["--tokens", "1", "--prompt", "a"], 2),
        (&["--with", "nothing"], 4),
        (&["--tokens", "4000000000"], 2),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_hoist"))
            .arg("compare")
            .args(arguments)
            .output()
            .expect("it starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
}
