use std::path::Path;
use std::process::Stdio;

use hoist_core::formats::Encoding;
use hoist_tests::files::{ModelFiles, TinyLlama};
use serde_json::Value;

use crate::support::{Ran, hoist, json, on_disk, run};

fn tiny(encoding: Encoding) -> ModelFiles {
    ModelFiles::single("tiny.gguf", TinyLlama::wide().gguf(encoding))
}

fn load(arguments: &[&str], path: &Path) -> Value {
    json("hoist.load/1", &[&["load"], arguments].concat(), path)
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn the_report_has_its_documented_keys() {
    let (_folder, path) = on_disk(&tiny(Encoding::Q8_0));
    let report = load(&["--verify"], &path);
    for (key, inner) in [
        ("model", &["path", "format", "architecture", "layers"][..]),
        ("backend", &["name", "device", "numerics"]),
        ("weights", &["quantized", "float", "gamma", "bias", "bytes"]),
        ("index", &["layers", "entries"]),
        ("workspace", &["bytes"]),
        ("verified", &["weights", "bytes", "mismatches"]),
        (
            "timing",
            &[
                "open_ms",
                "plan_ms",
                "upload_ms",
                "index_ms",
                "workspace_ms",
                "verify_ms",
                "total_ms",
                "upload_gb_s",
            ],
        ),
    ] {
        let found = keys(&report[key]);
        assert!(inner.iter().all(|k| found.contains(k)), "{key}: {found:?}");
    }
    assert_eq!(report["model"]["path"], path.to_str().unwrap());
    assert_eq!(report["model"]["format"], "gguf");
    assert_eq!(report["model"]["architecture"], "llama");
    assert_eq!(report["model"]["layers"], 2);
    assert_eq!(report["backend"]["name"], "cpu");
    assert_eq!(report["backend"]["numerics"], "exact");
    assert_eq!(report["verified"]["bytes"], report["weights"]["bytes"]);
    for (_, time) in report["timing"].as_object().unwrap() {
        assert!(time.as_f64().unwrap() > 0.0, "{}", report["timing"]);
    }
    let bare = load(&["--no-workspace"], &path);
    assert!(bare["workspace"].is_null() && bare["verified"].is_null());
    assert_eq!(bare["timing"]["verify_ms"], 0.0);
}

#[test]
fn a_plan_says_exactly_what_a_load_then_takes() {
    for encoding in [Encoding::F32, Encoding::Q8_0, Encoding::Q6_K] {
        let (_folder, path) = on_disk(&tiny(encoding));
        for capacity in [
            &[][..],
            &["--context", "17", "--sequences", "3"],
            &["--no-workspace"],
            &["--batch-tokens", "5"],
        ] {
            let plan = json("hoist.plan/1", &[&["plan"], capacity].concat(), &path);
            let report = load(capacity, &path);
            assert_eq!(plan["resident"], report["resident"], "{encoding} {capacity:?}");
            assert_eq!(plan["weights"]["bytes"], report["weights"]["bytes"]);
            assert_eq!(plan["memory"]["needed"], report["resident"]["total"]);
        }
    }
}

#[test]
fn a_device_that_is_not_here_is_planned_for_where_its_backend_knows_enough() {
    let (_folder, path) = on_disk(&tiny(Encoding::Q4_K));
    // No machine has so many.
    let plan = json(
        "hoist.plan/1",
        &["plan", "--backend", "cuda:99", "--memory", "80GB"],
        &path,
    );
    assert_eq!(plan["assumed"]["memory"], 80_000_000_000u64);
    assert!(
        plan["assumed"]["because"]
            .as_str()
            .unwrap()
            .contains("unavailable")
    );
    assert_eq!(plan["memory"]["available"], 80_000_000_000u64);
    assert_eq!(plan["memory"]["needed"], plan["resident"]["total"]);
    let path = path.to_str().unwrap();
    let told = run(&["plan", "--backend", "cuda:99", "--memory", "80GB", path]);
    assert!(
        told.stdout.contains("\nassumed: a device with 74.5 GiB free"),
        "{}",
        told.stdout
    );
    let narrow = run(&["plan", "--backend", "cuda:99", "--memory", "1KB", path]);
    assert_eq!(narrow.code, Some(1), "{}", narrow.stderr);
    assert!(narrow.stdout.contains("does not fit"), "{}", narrow.stdout);
    // Nobody says how much memory it has; what it can hold depends on it; a load needs the device itself.
    for (arguments, hint) in [
        (&["plan", "--backend", "cuda:99"][..], "--memory"),
        (
            &["plan", "--backend", "wgpu:99", "--memory", "80GB"],
            "depends on its device",
        ),
        (&["load", "--backend", "cuda:99", "--memory", "80GB"], ""),
    ] {
        let ran = run(&[arguments, &[path]].concat());
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(4), ""), "{arguments:?}");
        let hints = ran.stderr.split_once("\nhint: ").map_or("", |(_, hints)| hints);
        assert!(hints.contains(hint), "{arguments:?}: {}", ran.stderr);
    }
    let here = json("hoist.plan/1", &["plan"], Path::new(path));
    assert!(here["assumed"].is_null());
}

#[test]
fn imported_weights_are_mapped_and_told_from_owned_ones() {
    let (_folder, path) = on_disk(&tiny(Encoding::Q8_0));
    let plan = json("hoist.plan/1", &["plan", "--import"], &path);
    let owned = load(&[], &path);
    let report = load(&["--import", "--verify"], &path);
    let mapped = report["mapped_bytes"].as_u64().unwrap();
    assert_eq!(
        mapped,
        report["weights"]["bytes"].as_u64().unwrap(),
        "all of this file can be mapped"
    );
    assert_eq!(plan["mapped_bytes"], mapped);
    assert_eq!(owned["mapped_bytes"], 0);
    let quantized = |r: &Value| r["resident"]["quantized"].as_u64().unwrap();
    assert!(
        quantized(&report) * 4 < quantized(&owned),
        "{} {}",
        report["resident"],
        owned["resident"]
    );
}

#[test]
fn more_context_and_sequences_take_more_memory() {
    let (_folder, path) = on_disk(&tiny(Encoding::F32));
    let kv = |arguments: &[&str]| load(arguments, &path)["workspace"]["kv"].as_u64().unwrap();
    // 2 layers, keys and values, 2 heads of 64 f16 each.
    let position = 2 * 2 * 2 * 64 * 2;
    assert_eq!(kv(&["--context", "128"]), position * 128);
    assert_eq!(kv(&["--context", "256", "--sequences", "3"]), position * 256 * 3);
    assert!(kv(&["--context", "10"]) >= position * 10);
    assert_eq!(
        kv(&[]),
        kv(&["--context", "64"]),
        "the model's own context is the default"
    );
}

#[test]
fn traced_layers_show_values_before_and_after() {
    let (_folder, path) = on_disk(&tiny(Encoding::F16));
    let report = load(&["--trace-layers", "1"], &path);
    let trace = report["trace"].as_array().unwrap();
    assert_eq!(trace.len(), 9);
    for weight in trace {
        assert_eq!(weight["layer"], 1);
        assert_eq!(weight["before"], weight["after"]);
        assert_eq!(weight["after"]["first"].as_array().unwrap().len(), 10);
    }
    let q = trace.iter().find(|w| w["role"] == "attn_q").unwrap();
    let tensor = TinyLlama::wide()
        .tensors()
        .into_iter()
        .find(|t| t.gguf_name == "blk.1.attn_q.weight")
        .unwrap();
    let values = tensor.gguf_values();
    let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
    assert_eq!(q["after"]["count"], values.len());
    assert!((q["after"]["mean"].as_f64().unwrap() - mean).abs() < 1e-12);
    assert_eq!(
        q["after"]["max"],
        f64::from(values.iter().copied().fold(f32::MIN, f32::max))
    );
    for (shown, value) in q["after"]["first"].as_array().unwrap().iter().zip(&values) {
        assert_eq!(shown.as_f64().unwrap(), f64::from(*value));
    }
    assert!(load(&[], &path).get("trace").is_none());
    let ran: Ran = hoist()
        .args(["load", "--trace-layers", "0-1"])
        .arg(&path)
        .output()
        .unwrap()
        .into();
    assert_eq!(ran.stdout.matches("\nbefore").count(), 18, "{}", ran.stdout);
}

#[test]
fn text_and_json_report_the_same_load() {
    let (_folder, path) = on_disk(&tiny(Encoding::Q4_K));
    let report = load(&["--verify"], &path);
    let ran = run(&["load", "--verify", path.to_str().unwrap()]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    let verified = format!("{} weights", report["verified"]["weights"]);
    for words in [
        "gguf, llama, 2 layers",
        "numerics exact",
        &verified,
        "0 mismatches",
        "MiB",
        "GB/s",
    ] {
        assert!(ran.stdout.contains(words), "`{words}` is not in\n{}", ran.stdout);
    }
}

#[test]
fn inspect_shows_metadata_tensors_and_roles() {
    let (_folder, path) = on_disk(&tiny(Encoding::Q8_0));
    let report = json("hoist.inspect/1", &["inspect"], &path);
    assert_eq!(report["metadata"]["llama.embedding_length"], 256);
    assert_eq!(report["metadata"]["tokenizer.ggml.tokens"]["length"], 32);
    let tensors = report["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), 20);
    let q = tensors
        .iter()
        .find(|t| t["name"] == "blk.1.attn_k.weight")
        .unwrap();
    assert_eq!(q["roles"], serde_json::json!([{ "layer": 1, "role": "attn_k" }]));
    assert_eq!(q["shape"], serde_json::json!([128, 256]));
    assert_eq!(
        (&q["encoding"], &q["bytes"]),
        (&"q8_0".into(), &(128 * 8 * 34).into())
    );
    let full = json("hoist.inspect/1", &["inspect", "--full"], &path);
    assert_eq!(
        full["metadata"]["tokenizer.ggml.tokens"]
            .as_array()
            .unwrap()
            .len(),
        32
    );
    let ran: Ran = hoist().arg("inspect").arg(&path).output().unwrap().into();
    for words in [
        "llama.block_count",
        "blk.0.ffn_down.weight",
        "[256, 512]",
        "ffn_down 0",
        "q8_0",
    ] {
        assert!(ran.stdout.contains(words), "`{words}` is not in\n{}", ran.stdout);
    }
}

#[test]
fn a_program_is_shown_as_a_list_of_operations() {
    let (_folder, path) = on_disk(&tiny(Encoding::Q8_0));
    let report = json("hoist.program/1", &["inspect", "--program"], &path);
    assert_eq!(report["context"], 64);
    assert_eq!(report["vocab"], 32);
    let ran: Ran = hoist()
        .args(["inspect", "--program"])
        .arg(&path)
        .output()
        .unwrap()
        .into();
    let lines: Vec<_> = ran.stdout.lines().collect();
    assert_eq!(report["lines"].as_array().unwrap().len(), lines.len());
    assert!(
        ran.stdout.contains("rms_norm") && ran.stdout.contains("store_kv"),
        "{}",
        ran.stdout
    );
}

#[test]
fn the_embedded_model_loads_without_a_file() {
    let report: Value = serde_json::from_str(&run(&["load", "--verify", "--json"]).stdout).unwrap();
    assert_eq!(report["schema"], "hoist.load/1");
    assert_eq!(report["model"]["path"], "embedded:tiny-kjv");
    assert_eq!(report["model"]["architecture"], "llama");
    assert_eq!(report["verified"]["mismatches"], 0);
    assert!(report["verified"]["weights"].as_u64().unwrap() > 10);
}

#[test]
fn loads_are_measured_beside_a_plain_copy() {
    let (_folder, path) = on_disk(&tiny(Encoding::F16));
    let report = json("hoist.bench.load/1", &["bench", "load", "--runs", "5"], &path);
    assert_eq!(report["runs"], 5);
    for rate in ["load", "upload", "memcpy", "memcpy_warm"] {
        let of = |key: &str| report[rate]["gb_s"][key].as_f64().unwrap();
        assert!(
            0.0 < of("min") && of("min") <= of("median") && of("median") <= of("max"),
            "{rate}"
        );
    }
    let of = |rate: &str| report[rate]["gb_s"]["median"].as_f64().unwrap();
    let share = report["share"].as_f64().unwrap();
    assert!(
        (share / (of("upload") / of("memcpy")) - 1.0).abs() < 0.05,
        "{report}"
    );
}

#[test]
fn devices_are_listed_for_every_backend() {
    let ran = run(&["devices", "--json"]);
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(report["schema"], "hoist.devices/1");
    let cpu = &report["backends"][0];
    assert_eq!(
        (&cpu["name"], &cpu["devices"][0]["id"]),
        (&"cpu".into(), &"cpu".into())
    );
    assert!(cpu["devices"][0]["total_memory"].as_u64().unwrap() > 1 << 28);
    assert!(run(&["devices"]).stdout.contains("cpu"));
}

#[test]
fn a_reader_that_goes_away_is_met_with_silence() {
    let (_folder, path) = on_disk(&tiny(Encoding::F32));
    for arguments in [&["inspect"][..], &["inspect", "--json", "--full"], &["load"]] {
        let mut child = hoist()
            .args(arguments)
            .arg(&path)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let ran: Ran = child.wait_with_output().unwrap().into();
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{arguments:?}");
    }
}
