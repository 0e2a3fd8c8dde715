//! What the interface costs: a decode step through it, and through a process of its own, beside the same step built in.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hoist_core::backend::{
    DecodeBackend, Encoding, OpenOptions, Outputs, Provider, Run, SequenceId, TokenBatch, Unwatched, Want,
};
use hoist_core::orchestrator::{DecodeOptions, LoadedModel, SessionOptions, open};
use hoist_cpu::CpuProvider;
use hoist_plugin_host::{Candidate, Isolation, PluginProvider, Probe};
use hoist_synth::{Arch, Container, Mix, ModelShape, Options};
use serde_json::{Value, json};

use crate::support::{cargo_built, root};

/// A model so small that a step takes a few microseconds: what is added to it shows.
const SMALLEST: ModelShape = ModelShape {
    name: "smallest",
    arch: Arch::Llama,
    layers: 1,
    hidden: 32,
    heads: 1,
    kv_heads: 1,
    head_dim: 32,
    n_ff: 32,
    vocab: 260,
    context: 64,
    rope_base: 10_000.0,
    eps: 1e-5,
    tied: true,
    window: None,
    experts: None,
};

/// Positions that a sequence has in these tests.
const CONTEXT: u32 = 64;

fn smallest(folder: &Path) -> PathBuf {
    let path = folder.join("smallest.gguf");
    let options = Options {
        shape: &SMALLEST,
        mix: Mix::All(Encoding::Q8_0),
        container: Container::Gguf,
        seed: 1,
    };
    hoist_synth::write(options, &path, &|_, _| ()).expect("a model is written");
    path
}

fn candidate() -> Candidate {
    Candidate::open(&cargo_built("hoist-plugin-cpu")).expect("a plugin")
}

fn in_process() -> PluginProvider {
    hoist_plugin_host::open(&candidate(), &Probe::Skip).expect("a plugin")
}

fn isolated() -> PluginProvider {
    let isolation = Isolation {
        program: env!("CARGO_BIN_EXE_hoist").into(),
        arguments: vec!["plugin-worker".into()],
        limit: Duration::from_secs(60),
    };
    hoist_plugin_host::open_isolated(&candidate(), &isolation).expect("a plugin")
}

/// A model on a device, ready to decode. One thread: how threads meet on a busy machine is not what is measured.
fn loaded(provider: &dyn Provider, model: &Path) -> LoadedModel {
    let options = SessionOptions {
        decode: Some(DecodeOptions {
            context: Some(CONTEXT),
            ..DecodeOptions::default()
        }),
        verify: false,
        import: false,
        watch: &Unwatched,
    };
    let device = OpenOptions {
        threads: Some(1),
        ..OpenOptions::default()
    };
    let mut loaded = open(model, provider, 0, &device, &options).expect("it loads");
    loaded.prepare().expect("it decodes");
    loaded
}

/// One step, timed.
fn step(decoder: &mut dyn DecodeBackend, token: u32) -> (u32, Duration) {
    let (tokens, mut argmax) = ([token], [0]);
    let runs = [Run {
        sequence: SequenceId(0),
        tokens: &tokens,
        want: &[Want::ArgMax],
    }];
    let batch = TokenBatch { runs: &runs };
    let mut out = Outputs {
        argmax: &mut argmax,
        logits: &mut [],
    };
    let started = Instant::now();
    decoder.forward(&batch, &mut out).expect("a step");
    let time = started.elapsed();
    (argmax[0], time)
}

/// Times of the same steps by each model, taken in turns, step by step.
fn steps_in_turns(models: &mut [LoadedModel], steps: u32) -> Vec<Vec<Duration>> {
    let mut times = vec![Vec::with_capacity(steps as usize); models.len()];
    let mut token = 1;
    for number in 0..steps {
        let mut next = None;
        for turn in 0..models.len() {
            // Who comes first changes, too.
            let which = (turn + number as usize) % models.len();
            let decoder = models[which].backend.as_decode().expect("it decodes");
            if number % CONTEXT == 0 {
                decoder.truncate(SequenceId(0), 0).expect("a reset");
            }
            let (argmax, time) = step(decoder, token);
            assert_eq!(
                *next.get_or_insert(argmax),
                argmax,
                "the same bits, whoever computes"
            );
            times[which].push(time);
        }
        token = next.expect("a step");
    }
    times
}

/// The value below which that part of the times lies, in percent.
fn quantile(times: &[Duration], percent: usize) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted[(sorted.len() - 1) * percent / 100]
}

/// What a step through the interface takes more than the built-in one, in nanoseconds: the difference of low quantiles, which
/// a machine that is busy with other things moves least.
fn added(built_in: &[Duration], through: &[Duration]) -> f64 {
    let nanoseconds = |times| quantile(times, 20).as_nanos() as f64;
    nanoseconds(through) - nanoseconds(built_in)
}

#[test]
fn a_decode_step_through_the_interface_costs_at_most_a_microsecond_more() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = smallest(folder.path());
    let plugin = in_process();
    let mut models = [loaded(&CpuProvider, &path), loaded(&plugin, &path)];
    let mut seen = Vec::new();
    for _ in 0..20 {
        let times = steps_in_turns(&mut models, 4000);
        let added = added(&times[0], &times[1]);
        seen.push(added);
        eprintln!(
            "a decode step: built in {:?}, plugin {:?}, {added} ns more",
            quantile(&times[0], 20),
            quantile(&times[1], 20)
        );
        if added <= 1000.0 {
            return;
        }
    }
    panic!("in nanoseconds: {seen:?}");
}

/// Processes that wanted to run, on average: over 1, 5 and 15 minutes.
fn load_average() -> Value {
    let text = std::fs::read_to_string("/proc/loadavg").expect("Linux");
    text.split(' ')
        .take(3)
        .map(|n| json!(n.parse::<f64>().ok()))
        .collect()
}

fn numbers(times: &[Duration]) -> Value {
    let us = |d: Duration| d.as_nanos() as f64 / 1e3;
    json!({
        "min": us(quantile(times, 0)), "p10": us(quantile(times, 10)), "p20": us(quantile(times, 20)),
        "median": us(quantile(times, 50)), "p90": us(quantile(times, 90)),
    })
}

/// Writes what was measured to the file that `HOIST_REPORT` names: decode steps of the smallest model and loads and decodes
/// of a real one (`HOIST_MODEL`, or the program's own), by the built-in backend, the plugin, and the plugin in its own
/// process, in turns.
#[test]
#[ignore = "measures; run it alone, with HOIST_REPORT"]
fn report_costs() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = smallest(folder.path());
    let before = load_average();
    let providers: [(&str, Box<dyn Provider>); 3] = [
        ("built_in", Box::new(CpuProvider)),
        ("plugin", Box::new(in_process())),
        ("isolated", Box::new(isolated())),
    ];
    let mut models: Vec<_> = providers.iter().map(|(_, p)| loaded(p.as_ref(), &path)).collect();
    let mut pair: Vec<_> = models.drain(..2).collect();
    let times = steps_in_turns(&mut pair, 20_000);
    let mut small = json!({
        "model": "hoist-synth, 1 layer, hidden 32, vocabulary 260, Q8_0", "threads": 1, "steps": times[0].len(),
        "built_in_us": numbers(&times[0]), "plugin_us": numbers(&times[1]),
        "added_by_plugin_ns_p20": added(&times[0], &times[1]),
    });
    pair.append(&mut models);
    let times = steps_in_turns(&mut pair, 2_000);
    small["beside_isolated"] = json!({
        "steps": times[0].len(),
        "built_in_us": numbers(&times[0]), "plugin_us": numbers(&times[1]), "isolated_us": numbers(&times[2]),
    });
    drop(pair);

    let model = std::env::var_os("HOIST_MODEL")
        .map(PathBuf::from)
        .unwrap_or_else(|| root().join("cli/assets/tiny-kjv.gguf"));
    let rounds = 5;
    let mut loads = vec![Vec::new(); providers.len()];
    let mut decodes = vec![Vec::new(); providers.len()];
    let mut nbytes = 0;
    for round in 0..rounds {
        for turn in 0..providers.len() {
            let which = (turn + round) % providers.len();
            let mut loaded = loaded(providers[which].1.as_ref(), &model);
            nbytes = loaded.plan.nbytes;
            loads[which].push(loaded.report.timing.upload);
            let decoder = loaded.backend.as_decode().expect("it decodes");
            let mut token = 1;
            for _ in 0..24 {
                let (argmax, time) = step(decoder, token);
                token = argmax;
                decodes[which].push(time);
            }
        }
    }
    let real: serde_json::Map<_, _> = providers
        .iter()
        .zip(loads.iter().zip(&decodes))
        .map(|((name, _), (loads, decodes))| {
            let upload = quantile(loads, 50).as_secs_f64();
            let numbers = json!({
                "upload_s_median": upload, "upload_gib_per_s": nbytes as f64 / upload / f64::from(1 << 30),
                "step_us": numbers(decodes), "tok_s_median": 1.0 / quantile(decodes, 50).as_secs_f64(),
            });
            ((*name).to_owned(), numbers)
        })
        .collect();
    let report = json!({
        "schema": "hoist.evidence.plugin-cost/1",
        "processors": std::thread::available_parallelism().map_or(0, usize::from),
        "load_average": { "before": before, "after": load_average() },
        "smallest": small,
        "real": {
            "model": model.file_name().map(|f| f.to_string_lossy()), "canonical_bytes": nbytes, "threads": 1,
            "rounds": rounds, "steps_a_round": 24, "backends": real,
        },
    });
    let text = serde_json::to_string_pretty(&report).expect("JSON");
    match std::env::var_os("HOIST_REPORT") {
        Some(path) => std::fs::write(path, text + "\n").expect("written"),
        None => eprintln!("{text}"),
    }
}
