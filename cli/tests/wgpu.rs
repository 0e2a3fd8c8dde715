//! The program on the wgpu backend, with a real model: the same bits as on the CPU. `scripts/fetch-models.sh` fetches the
//! model. Without it, or without an adapter, tests are shown as ignored, or fail if `CI` is set.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use hoist_tests::libraries::cargo_built;
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

/// The program on an adapter that has such faults: through a Vulkan layer (backends/wgpu/faults).
fn on_faulty(faults: &str, arguments: &[&str]) -> Result<Output, Failed> {
    let library = cargo_built("hoist-wgpu-faults")?;
    let folder = tempfile::tempdir()?;
    let manifest = hoist_wgpu_faults::manifest(&library);
    std::fs::write(folder.path().join("faults.json"), manifest)?;
    Ok(Command::new(env!("CARGO_BIN_EXE_hoist"))
        .args(arguments)
        .env("VK_LAYER_PATH", folder.path())
        .env("VK_INSTANCE_LAYERS", hoist_wgpu_faults::NAME)
        .env("HOIST_VULKAN_FAULTS", faults)
        .output()?)
}

/// Demands a code, no data, and one line of error that says all of these, and of a loss not twice.
fn refused(what: &str, output: &Output, code: i32, says: &[&str]) -> Result<(), Failed> {
    let said = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = said.lines().collect();
    let error = lines.first().copied().unwrap_or_default();
    let is_told = error.starts_with("error: ")
        && lines[1..].iter().all(|line| line.starts_with("hint: "))
        && says.iter().all(|words| error.contains(words))
        && error.matches("was lost").count() <= 1;
    if output.status.code() == Some(code) && is_told && output.stdout.is_empty() {
        return Ok(());
    }
    Err(format!("{what}: {}: {said}", output.status).into())
}

fn succeeded(what: &str, output: &Output) -> Result<(), Failed> {
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{what}: {}: {said}", output.status).into())
}

fn an_adapter_that_lacks_what_kernels_need_is_unavailable() -> Result<(), Failed> {
    let load = |faults| on_faulty(faults, &["load", "--verify", "--backend", "wgpu"]);
    succeeded("enough", &load("storage_buffers=7")?)?;
    let says = [
        "`wgpu` is unavailable",
        "it has 6 storage buffers",
        "7 are needed",
    ];
    refused("too few", &load("storage_buffers=6")?, 4, &says)
}

/// At the first submission, amid a load, and amid decoding.
fn a_device_that_is_lost_is_told() -> Result<(), Failed> {
    let load = ["load", "--verify", "--backend", "wgpu", "--context", "64"];
    succeeded("a load", &on_faulty("submits=1000000", &load)?)?;
    for submits in ["submits=0", "submits=7"] {
        refused(submits, &on_faulty(submits, &load)?, 4, &["wgpu:0 was lost: "])?;
    }
    let generate = [
        "generate",
        "-p",
        "In the",
        "-n",
        "200",
        "--ignore-end",
        "--backend",
        "wgpu",
        "--json",
    ];
    refused(
        "decoding",
        &on_faulty("submits=150", &generate)?,
        4,
        &["wgpu:0 was lost: "],
    )
}

fn memory_that_the_driver_refuses_is_told() -> Result<(), Failed> {
    let load = ["load", "--backend", "wgpu"];
    refused(
        "no memory",
        &on_faulty("allocations=1", &load)?,
        5,
        &["wgpu:0 is out of memory", "bytes"],
    )
}

/// What no binding could hold whole is split, and nobody sees that.
fn split_weights_are_verified_and_decode() -> Result<(), Failed> {
    let faults = "storage_range=65536";
    let load = [
        "load",
        "--verify",
        "--context",
        "64",
        "--backend",
        "wgpu",
        "--json",
    ];
    let output = on_faulty(faults, &load)?;
    succeeded("a load", &output)?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    same("mismatches", &report["verified"]["mismatches"], &0.into())?;
    let notes = report["notes"].as_array().ok_or("no notes")?;
    let split = notes
        .iter()
        .find(|note| note[0] == "split weights")
        .ok_or("no note")?;
    if split[1] == "0" {
        return Err("nothing was split".into());
    }
    let logits = ["logits", "--tokens", "1,2,3,4,5", "--context", "64", "--json"];
    let on_cpu: Value = serde_json::from_slice(&hoist(&logits)?.stdout)?;
    let output = on_faulty(faults, &[&logits[..], &["--backend", "wgpu"]].concat())?;
    succeeded("logits", &output)?;
    let found: Value = serde_json::from_slice(&output.stdout)?;
    same("digest", &found["digest"], &on_cpu["digest"])
}

/// Most bytes of a binding of the first adapter.
fn binding_limit() -> Result<u64, Failed> {
    let report: Value = serde_json::from_slice(&hoist(&["devices", "--json"])?.stdout)?;
    let backends = report["backends"].as_array().ok_or("no backends")?;
    let wgpu = backends.iter().find(|b| b["name"] == "wgpu").ok_or("no wgpu")?;
    let limit = wgpu["devices"][0]["details"]["binding limit"].as_str();
    Ok(limit.ok_or("no binding limit")?.parse()?)
}

/// Writes a model with that many channels, whose weights are a hole in the file; the folder.
fn hollow_model(channels: u64) -> Result<tempfile::TempDir, Failed> {
    const HEAD: u64 = 2;
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let mut tensors = vec![
        ("model.embed_tokens.weight".into(), vec![8, channels]),
        ("model.norm.weight".into(), vec![channels]),
        (layer("input_layernorm"), vec![channels]),
        (layer("post_attention_layernorm"), vec![channels]),
        (layer("self_attn.o_proj"), vec![channels, HEAD]),
        (layer("mlp.down_proj"), vec![channels, HEAD]),
    ];
    for name in [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    ] {
        tensors.push((layer(name), vec![HEAD, channels]));
    }
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<u64>();
        let tensor = serde_json::json!({ "dtype": "BF16", "shape": shape, "data_offsets": [start, end] });
        header.insert(name, tensor);
    }
    let header = serde_json::to_vec(&header)?;
    let folder = tempfile::tempdir()?;
    let mut file = std::fs::File::create(folder.path().join("model.safetensors"))?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    file.set_len(8 + header.len() as u64 + end)?;
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": channels, "head_dim": HEAD,
        "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": HEAD, "num_hidden_layers": 1,
        "vocab_size": 8, "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true,
    });
    std::fs::write(folder.path().join("config.json"), config.to_string())?;
    Ok(folder)
}

/// A weight that could not even be split is refused from the header alone, by plans and by loads.
fn a_row_above_every_binding_is_refused_unread() -> Result<(), Failed> {
    // Rows of two bytes a weight, of which a binding must hold four.
    let channels = (binding_limit()? / 8).next_multiple_of(32);
    let folder = hollow_model(channels)?;
    let path = folder.path().to_str().ok_or("a path that is no text")?;
    let row = format!(" is {}", 2 * channels);
    let says = ["a row of weight `", &row, "the limit of backend `wgpu` is "];
    for command in ["plan", "load"] {
        let started = Instant::now();
        let output = hoist(&[command, path, "--no-workspace", "--backend", "wgpu"])?;
        refused(command, &output, 4, &says)?;
        // All of it would take longer to read, not to speak of the device's memory.
        if started.elapsed() > Duration::from_secs(5) {
            return Err(format!("{command} took {:?}", started.elapsed()).into());
        }
    }
    refused(
        "a workspace",
        &hoist(&["load", path, "--backend", "wgpu"])?,
        4,
        &["`wgpu`", "limit"],
    )?;
    // It is the adapter that refuses, not the file.
    let planned = hoist(&["plan", path, "--no-workspace", "--memory", "1TiB"])?;
    if planned.status.code().is_some_and(|code| code < 2) {
        return Ok(());
    }
    Err(format!("on the CPU: {}", String::from_utf8_lossy(&planned.stderr)).into())
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
        "an_adapter_that_lacks_what_kernels_need_is_unavailable",
        false,
        false,
        an_adapter_that_lacks_what_kernels_need_is_unavailable,
    ),
    (
        "a_device_that_is_lost_is_told",
        false,
        false,
        a_device_that_is_lost_is_told,
    ),
    (
        "memory_that_the_driver_refuses_is_told",
        false,
        false,
        memory_that_the_driver_refuses_is_told,
    ),
    (
        "split_weights_are_verified_and_decode",
        false,
        false,
        split_weights_are_verified_and_decode,
    ),
    (
        "a_row_above_every_binding_is_refused_unread",
        false,
        false,
        a_row_above_every_binding_is_refused_unread,
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
