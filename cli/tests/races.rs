//! The kernels that the program embeds, on the emulated device that looks for races of shared memory: the CPU's bits, and no
//! race. Without a C++ compiler the tests are shown as ignored, or fail if `CI` is set.

use std::path::Path;
use std::process::Command;

use libtest_mimic::{Arguments, Failed, Trial};

/// Files, tokens, and what is asked: one launch a token, operation by operation, batches, and a prompt at once.
const CASES: &[(&str, &str, usize, &[&str], &str)] = &[
    ("tiny-llama", "q4_k_m", 5, &["--chunk", "1"], "1"),
    ("tiny-qwen2", "q5_k", 4, &["--chunk", "1"], "1"),
    ("tiny-mistral", "q8_0", 4, &["--chunk", "1"], "1"),
    ("tiny-llama", "q4_k_m", 3, &["--chunk", "1"], "0"),
    ("tiny-llama", "q4_k_m", 9, &["--chunk", "3", "--batch", "3"], "1"),
    ("tiny-llama", "q4_k_m", 70, &["--chunk", "70"], "1"),
    ("tiny-llama", "q8_0", 70, &["--chunk", "70"], "1"),
];

fn hoist(configure: impl FnOnce(&mut Command) -> &mut Command) -> Result<String, Failed> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hoist"));
    let output = configure(&mut command).output()?;
    if output.status.success() {
        return Ok(String::from_utf8(output.stdout)?);
    }
    Err(String::from_utf8_lossy(&output.stderr).into_owned().into())
}

fn digest(text: &str) -> Result<String, Failed> {
    let logits: serde_json::Value = serde_json::from_str(text)?;
    Ok(logits["digest"].as_str().ok_or("no digest")?.to_owned())
}

fn no_race(
    driver: &Path,
    (shape, encoding, tokens, how, one_launch): (&str, &str, usize, &[&str], &str),
    seed: u32,
) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("model.gguf");
    hoist(|c| {
        c.args(["synth", shape, "--encoding", encoding, "--seed", "3"])
            .arg(&file)
    })?;
    let tokens: Vec<String> = (0..tokens).map(|i| ((i * 37 + 5) % 250).to_string()).collect();
    let tokens = tokens.join(",");
    let asked = ["logits", "--json", "--tokens", &tokens];
    let expected = digest(&hoist(|c| c.args(asked).arg(&file))?)?;
    let found = digest(&hoist(|c| {
        c.args(asked)
            .args(how)
            .args(["--backend", "cuda"])
            .arg(&file)
            .env("LD_LIBRARY_PATH", driver)
            .env("HOIST_EMULATED_CUDA", format!("seed={seed};memory=700MiB"))
            .env("HOIST_CUDA_ONE_LAUNCH", one_launch)
    })?)?;
    if found == expected {
        return Ok(());
    }
    Err(format!("the CPU's digest is {expected}, this one {found}").into())
}

fn main() {
    let driver = hoist_cuda_emulator::races_folder();
    let missing = driver.is_none();
    let driver = driver.unwrap_or_default();
    let mut trials = Vec::new();
    for (i, case) in CASES.iter().enumerate() {
        let (shape, encoding, tokens, how, one_launch) = *case;
        let name = format!(
            "{shape}_{encoding}_{tokens}_tokens_{}_{}",
            how.join("_").replace("--", ""),
            if one_launch == "1" {
                "one_launch"
            } else {
                "operations"
            }
        );
        let driver = driver.clone();
        trials.push(
            Trial::test(name, move || {
                if driver.as_os_str().is_empty() {
                    return Err("no C++ compiler, so that there is no emulated device".into());
                }
                no_race(&driver, *case, i as u32 + 1)
            })
            .with_ignored_flag(missing && std::env::var_os("CI").is_none()),
        );
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
