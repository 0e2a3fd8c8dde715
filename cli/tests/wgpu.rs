//! The program on the wgpu backend, with a real model: the same bits as on the CPU. `scripts/fetch-models.sh` fetches the
//! model. Without it, or without an adapter, tests are shown as ignored, or fail if `CI` is set.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;

const MODEL: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// Prompts of the long comparison.
const PROMPTS: [&str; 5] = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "The three laws of motion say that",
];

fn model() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default());
    let folder =
        std::env::var_os("HOIST_MODELS").map_or_else(|| home().join(".cache/hoist/models"), PathBuf::from);
    folder.join(MODEL)
}

fn hoist(arguments: &[&str]) -> Result<Output, Failed> {
    Ok(Command::new(env!("CARGO_BIN_EXE_hoist"))
        .args(arguments)
        .output()?)
}

fn json(backend: &str, arguments: &[&str]) -> Result<Value, Failed> {
    let path = model();
    let path = path.to_str().ok_or("a path that is no text")?;
    let all = [arguments, &["--json", "--backend", backend, path]].concat();
    let output = hoist(&all)?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn same(what: &str, found: &Value, expected: &Value) -> Result<(), Failed> {
    if found == expected && !found.is_null() {
        return Ok(());
    }
    Err(format!("{what}: on the CPU {expected}, on wgpu {found}").into())
}

fn every_weight_is_resident_and_verified() -> Result<(), Failed> {
    let report = json("wgpu", &["load", "--verify", "--context", "64"])?;
    same("verified", &report["verified"]["weights"], &272.into())?;
    same("mismatches", &report["verified"]["mismatches"], &0.into())
}

fn logits_are_the_cpus() -> Result<(), Failed> {
    let arguments = [
        "logits",
        "-p",
        "The capital of France",
        "--context",
        "64",
        "--chunk",
        "3",
    ];
    let (expected, found) = (json("cpu", &arguments)?, json("wgpu", &arguments)?);
    same("digest", &found["digest"], &expected["digest"])?;
    same("positions", &found["positions"], &expected["positions"])
}

fn text(prompts: &[&str], tokens: &str) -> Result<(), Failed> {
    for prompt in prompts {
        let arguments = [
            "generate",
            "-p",
            prompt,
            "-n",
            tokens,
            "--ignore-end",
            "--context",
            "256",
        ];
        let (expected, found) = (json("cpu", &arguments)?, json("wgpu", &arguments)?);
        same(prompt, &found["tokens"], &expected["tokens"])?;
        same(prompt, &found["text"], &expected["text"])?;
    }
    Ok(())
}

fn some_text_is_the_cpus() -> Result<(), Failed> {
    text(&PROMPTS[..1], "4")
}

fn long_texts_are_the_cpus() -> Result<(), Failed> {
    text(&PROMPTS, "64")
}

/// Exit code 4, and a hint, where no driver is installed.
fn no_adapter_is_a_backend_that_is_unavailable() -> Result<(), Failed> {
    let output = Command::new(env!("CARGO_BIN_EXE_hoist"))
        .args(["load", "--backend", "wgpu"])
        // Where the loader of Vulkan looks for drivers, by its old name and its new one.
        .env("VK_ICD_FILENAMES", "/nowhere/driver.json")
        .env("VK_DRIVER_FILES", "/nowhere/driver.json")
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.code() == Some(4) && said.contains("adapter was found") && said.contains("hint:") {
        return Ok(());
    }
    Err(format!("{}: {said}", output.status).into())
}

fn an_adapter_past_the_last_is_unavailable() -> Result<(), Failed> {
    let output = hoist(&["load", "--backend", "wgpu:99"])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.code() == Some(4) && said.contains("no such device") {
        return Ok(());
    }
    Err(format!("{}: {said}", output.status).into())
}

/// The suite asks this in a process of its own, which only the program starts.
fn loads_that_are_given_up_hold_nothing() -> Result<(), Failed> {
    let case = "resources::abort::loads_that_are_given_up";
    let output = hoist(&["conform", "wgpu:0", "--filter", case, "--seed", "1", "--json"])?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    same("passed cases", &report["counts"]["pass"], &1.into())
}

/// Name, whether it needs the model, whether it takes minutes, and the test.
type Test = (&'static str, bool, bool, fn() -> Result<(), Failed>);

const TESTS: &[Test] = &[
    (
        "every_weight_is_resident_and_verified",
        true,
        false,
        every_weight_is_resident_and_verified,
    ),
    ("logits_are_the_cpus", true, false, logits_are_the_cpus),
    ("some_text_is_the_cpus", true, false, some_text_is_the_cpus),
    ("long_texts_are_the_cpus", true, true, long_texts_are_the_cpus),
    (
        "an_adapter_past_the_last_is_unavailable",
        false,
        false,
        an_adapter_past_the_last_is_unavailable,
    ),
    (
        "loads_that_are_given_up_hold_nothing",
        false,
        false,
        loads_that_are_given_up_hold_nothing,
    ),
];

/// What is missing to run them, if anything is.
fn missing(needs_model: bool, adapter: bool) -> Option<String> {
    if !adapter {
        return Some("there is no adapter".into());
    }
    let path: &Path = &model();
    (needs_model && !path.exists()).then(|| {
        format!(
            "{} is not there; scripts/fetch-models.sh fetches it",
            path.display()
        )
    })
}

fn main() {
    let adapter = hoist(&["devices"]).is_ok_and(|o| String::from_utf8_lossy(&o.stdout).contains("wgpu:0"));
    let required = std::env::var_os("CI").is_some_and(|v| !v.is_empty() && v != "false");
    let mut trials: Vec<Trial> = TESTS
        .iter()
        .map(|&(name, needs_model, is_long, test)| {
            let missing = missing(needs_model, adapter);
            let ignored = is_long || (missing.is_some() && !required);
            Trial::test(name, move || {
                missing.map_or_else(test, |reason| Err(reason.into()))
            })
            .with_ignored_flag(ignored)
        })
        .collect();
    trials.push(Trial::test(
        "no_adapter_is_a_backend_that_is_unavailable",
        no_adapter_is_a_backend_that_is_unavailable,
    ));
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
