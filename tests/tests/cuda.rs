//! The CUDA backend on an emulated device (backends/cuda/emulator): the same host code and the same kernel sources as on a
//! GPU, so that bits, faults and waits are judged where there is none. Nothing here says anything about speed.
//!
//! A sample runs by default. With `HOIST_CUDA_EXHAUSTIVE` set, every file, encoding, seed and fault is asked. Without a C++
//! compiler there is no device and every test is ignored, visibly; where the variable CI is set, that is a failure.
#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use hoist_backend::*;
use hoist_core::orchestrator::{self, DecodeOptions, LoadedModel, OpenedModel, SessionOptions};
use hoist_cpu::CpuProvider;
use hoist_cuda::{CudaBackend, CudaProvider};
use hoist_cuda_emulator::{Emulator, Report};
use hoist_tests::suite;
use libtest_mimic::{Arguments, Failed, Trial};

type Outcome = std::result::Result<(), Failed>;

/// A child of this test answers instead of testing: what the provider finds on its machine.
const CHILD: &str = "HOIST_CUDA_CHILD";

/// A test and its name.
type Test = (&'static str, fn() -> Outcome);

const TESTS: &[Test] = &[
    ("every_driver_call_is_emulated", every_symbol),
    ("architectures_decode_to_the_references_bits", architectures),
    ("encodings_decode_to_the_references_bits", encodings),
    (
        "one_launch_decodes_to_the_references_bits_in_any_order",
        one_launch,
    ),
    ("long_sequences_decode_to_the_references_bits", long_sequences),
    ("attention_in_parts_has_the_references_bits", attention_in_parts),
    ("products_in_parts_have_the_references_bits", products_in_parts),
    ("a_driver_that_will_not_do_is_unavailable", unavailable),
    (
        "an_outline_is_what_an_open_device_says",
        an_outline_is_a_devices_word,
    ),
    // Some hundred sessions: too long for a sample.
    (
        "a_call_that_fails_is_a_typed_error_and_leaves_nothing",
        failing_calls,
    ),
    ("a_device_lost_at_any_launch_is_a_typed_error", lost),
    (
        "a_second_backend_makes_no_context_and_no_equipment",
        second_backend,
    ),
    ("backends_of_a_process_share_one_context", two_share),
    (
        "a_lost_context_is_replaced_once_nobody_holds_it",
        lost_while_shared,
    ),
    (
        "a_context_lost_behind_its_back_is_replaced_on_opening",
        lost_unseen,
    ),
    ("equipment_is_used_again_after_loads_that_failed", equipment_again),
    ("memory_that_does_not_suffice_is_a_typed_error", short_memory),
    ("refused_tokens_leave_a_session_as_it_was", refused_tokens),
    ("suite_device", || {
        conforms(&["device", "!device::place::weights_are_where_it_says"])
    }),
    ("suite_residency", || {
        conforms(&["residency::*[encoding=f16]", "residency::*[encoding=q6_k]"])
    }),
    ("suite_index", || conforms(&["index"])),
    ("suite_encodings", || {
        conforms(&[
            "encodings::*[encoding=bf16*",
            "encodings::*[encoding=q4_k*",
            "encodings::*[encoding=iq2_s*",
        ])
    }),
    ("suite_ops", || {
        conforms(if exhaustive() { &["ops"] } else { OPS })
    }),
    ("suite_decode", || conforms(&["decode::*[architecture=llama*"])),
    ("suite_lifecycle", || conforms(&["lifecycle"])),
    (
        "suite_whole",
        || if exhaustive() { conforms(&[]) } else { Ok(()) },
    ),
];

/// What is asked only where everything is; ignored, visibly, in a sample.
const TOO_LONG: &[&str] = &[
    "a_call_that_fails_is_a_typed_error_and_leaves_nothing",
    "suite_whole",
];

/// Of each operation, the cases that say most.
const OPS: &[&str] = &[
    "ops::activation",
    "ops::add",
    "ops::attention",
    "ops::layer_norm",
    "ops::logits",
    "ops::mul",
    "ops::non_finite",
    "ops::quantise",
    "ops::rms_norm",
    "ops::rope",
    "ops::router",
    "ops::scale",
    "ops::soft_cap",
    "ops::store_kv",
    "ops::*[encoding=q4_k]",
    "ops::*[encoding=bf16]",
];

fn main() {
    if std::env::var_os(CHILD).is_some() {
        return answer();
    }
    let mut arguments = Arguments::from_args();
    // One device, whose settings tests change.
    arguments.test_threads = Some(1);
    let missing = hoist_cuda_emulator::load().is_none();
    let in_ci = std::env::var_os("CI").is_some_and(|v| !v.is_empty() && v != "false");
    if missing {
        eprintln!("no C++ compiler, so that there is no emulated device");
    }
    let trials = TESTS
        .iter()
        .map(|(name, test)| {
            Trial::test(*name, move || {
                if missing {
                    return Err("no emulated device".into());
                }
                configure("");
                let outcome = test();
                configure("");
                outcome
            })
            .with_ignored_flag(missing && !in_ci || !exhaustive() && TOO_LONG.contains(name))
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit();
}

fn emulator() -> &'static Emulator {
    hoist_cuda_emulator::load().expect("an emulated device")
}

/// Changes the device's settings, and counts anew. What was kept of the old device goes first.
fn configure(settings: &str) {
    hoist_cuda::release_unused();
    emulator().configure(settings);
}

fn exhaustive() -> bool {
    std::env::var_os("HOIST_CUDA_EXHAUSTIVE").is_some()
}

/// What is alive on the device; all of it is to be given back by the end of a test, but for what the process keeps for the next
/// backend.
fn alive(report: &Report) -> BTreeMap<&str, u64> {
    [
        "allocations",
        "streams",
        "events",
        "modules",
        "graphs",
        "executables",
        "page_locked",
        "registered",
        "contexts",
        "leaked",
    ]
    .into_iter()
    .map(|key| (key, report.count(key)))
    .filter(|(_, n)| *n > 0)
    .collect()
}

/// What is alive once threads that were on their way out have ended, and nothing is kept any more.
fn settled() -> Report {
    hoist_cuda::release_unused();
    let mut report = emulator().report();
    for _ in 0..100 {
        if alive(&report).is_empty() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
        report = emulator().report();
    }
    report
}

fn nothing_is_left(after: &str) {
    hoist_cuda::release_unused();
    nothing_is_kept(after);
}

/// As [`nothing_is_left`], where nothing is to be kept either.
fn nothing_is_kept(after: &str) {
    let report = emulator().report();
    let alive = alive(&report);
    assert!(alive.is_empty(), "left after {after}: {alive:?}");
}

/// How often a call was made since the device was last configured.
fn calls(name: &str) -> u64 {
    emulator().report().count(&format!("calls.{name}"))
}

/// How many calls were made since then.
fn all_calls() -> u64 {
    let report = emulator().report();
    let calls = report.counts.iter().filter(|(k, _)| k.starts_with("calls."));
    calls.map(|(_, n)| n).sum()
}

// ---- models ----

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .map(|folder| folder.join("data/architectures"))
        .find(|folder| folder.exists())
        .or_else(|| std::env::var_os("HOIST_TEST_DATA").map(Into::into))
        .expect("the test's data")
}

fn synthetic(shape: &str, mix: &str, folder: &Path) -> PathBuf {
    let path = folder.join(format!("{shape}.{mix}.gguf"));
    let options = hoist_synth::Options {
        shape: hoist_synth::shape(shape).expect("a shape"),
        mix: hoist_synth::Mix::from_name(mix).expect("a mix"),
        container: hoist_synth::Container::Gguf,
        seed: 11,
    };
    hoist_synth::write(options, &path, &|_, _| {}).unwrap();
    path
}

/// How a model is asked.
#[derive(Clone, Copy, Debug)]
struct How {
    kv: KvDtype,
    /// Tokens of the first batch; 0: as the others.
    prompt: usize,
    /// Tokens of a batch and sequence.
    chunk: usize,
    sequences: u32,
    context: u32,
}

impl How {
    fn session(self) -> SessionOptions<'static> {
        SessionOptions {
            decode: Some(DecodeOptions {
                context: Some(self.context),
                sequences: self.sequences,
                batch_tokens: Some(self.chunk.max(self.prompt) as u32 * self.sequences),
                kv: self.kv,
            }),
            verify: false,
            import: false,
            watch: &Unwatched,
        }
    }
}

fn cpu() -> Box<dyn WeightBackend> {
    let options = OpenOptions {
        threads: Some(2),
        ..OpenOptions::default()
    };
    CpuProvider.open(0, &options).unwrap()
}

fn options() -> OpenOptions {
    OpenOptions {
        // Fewer lanes are ready sooner.
        threads: Some(2),
        ..OpenOptions::default()
    }
}

/// Operation by operation: what runs in one launch has tests of its own.
fn cuda() -> Box<dyn WeightBackend> {
    let mut backend = CudaBackend::open(0, &options()).unwrap();
    backend.decode_by_operations();
    Box::new(backend)
}

/// Bits of the logits of all tokens; each sequence has them rotated by its number.
fn logits(
    backend: Box<dyn WeightBackend>,
    path: &Path,
    tokens: &[u32],
    how: How,
) -> std::result::Result<Vec<u32>, orchestrator::Error> {
    let mut loaded = OpenedModel::open(path)?.load(backend, &how.session())?;
    let vocab = vocabulary(&loaded);
    let decoder = loaded.prepare()?;
    let mut all = Vec::new();
    let mut start = 0;
    while start < tokens.len() {
        let n = if start == 0 { how.prompt } else { 0 };
        let n = if n == 0 { how.chunk } else { n }.min(tokens.len() - start);
        let rows: Vec<Vec<u32>> = (0..how.sequences as usize)
            .map(|s| {
                (start..start + n)
                    .map(|i| tokens[(i + s) % tokens.len()] % vocab as u32)
                    .collect()
            })
            .collect();
        let want = vec![Want::Logits; n];
        let runs: Vec<Run<'_>> = (0..)
            .zip(&rows)
            .map(|(s, tokens)| Run {
                sequence: SequenceId(s),
                tokens,
                want: &want,
            })
            .collect();
        let mut found = vec![f32::NAN; rows.len() * n * vocab];
        let mut out = Outputs {
            argmax: &mut [],
            logits: &mut found,
        };
        decoder.forward(&TokenBatch { runs: &runs }, &mut out)?;
        all.extend(found.iter().map(|y| y.to_bits()));
        start += n;
    }
    Ok(all)
}

/// Entries of the vocabulary.
fn vocabulary(loaded: &LoadedModel) -> usize {
    loaded.program.as_ref().expect("a program").0.vocab as usize
}

fn compare(what: &str, path: &Path, tokens: &[u32], how: How) {
    let expected = logits(cpu(), path, tokens, how).unwrap_or_else(|e| panic!("{what} on the CPU: {e}"));
    let found = logits(cuda(), path, tokens, how).unwrap_or_else(|e| panic!("{what} {how:?}: {e}"));
    same(what, how, &found, &expected);
}

fn same(what: &str, how: How, found: &[u32], expected: &[u32]) {
    assert_eq!(found.len(), expected.len(), "{what} {how:?}");
    let at = found.iter().zip(expected).position(|(a, b)| a != b);
    assert!(
        at.is_none(),
        "{what} {how:?}: logits differ at {at:?} of {}",
        found.len()
    );
}

const TOKENS: [u32; 11] = [3, 17, 1, 90, 2, 44, 31, 7, 7, 60, 5];

const DEFAULT: How = How {
    kv: KvDtype::F16,
    prompt: 0,
    chunk: 5,
    sequences: 1,
    context: 64,
};

/// Batches, single tokens through a recorded graph, several sequences.
fn ways() -> Vec<How> {
    let mut ways = vec![
        DEFAULT,
        How { chunk: 1, ..DEFAULT },
        How {
            chunk: 1,
            sequences: 8,
            ..DEFAULT
        },
    ];
    if exhaustive() {
        ways.extend([
            How {
                kv: KvDtype::F32,
                ..DEFAULT
            },
            How {
                kv: KvDtype::F32,
                chunk: 1,
                ..DEFAULT
            },
            How {
                chunk: 11,
                sequences: 7,
                ..DEFAULT
            },
        ]);
    }
    ways
}

fn every_symbol() -> Outcome {
    let source = include_str!("../../backends/cuda/src/driver.rs");
    let list = source
        .split_once("SYMBOLS: &[&str] = &[")
        .and_then(|(_, rest)| rest.split_once("];"))
        .expect("the list of symbols")
        .0;
    let symbols: Vec<&str> = list.split('"').skip(1).step_by(2).collect();
    assert!(symbols.len() > 40, "{symbols:?}");
    for symbol in symbols {
        assert!(emulator().has(symbol), "`{symbol}` is not emulated");
    }
    assert!(!emulator().has("cuNoSuchCall"));
    Ok(())
}

fn architectures() -> Outcome {
    let mut files: Vec<PathBuf> = std::fs::read_dir(data())?
        .map(|e| e.unwrap().path())
        .filter(|p| p.is_dir() || p.extension().is_some_and(|e| e == "gguf"))
        .collect();
    files.sort();
    let all = files.len();
    if !exhaustive() {
        // Folders where the file is not in GGUF too.
        files.retain(|p| p.extension().is_some() || !p.with_extension("gguf").exists());
    }
    assert!(files.len() > 15, "{} of {all} files", files.len());
    for (i, path) in files.iter().enumerate() {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let ways = ways();
        for (j, how) in ways.iter().enumerate() {
            if exhaustive() || i % ways.len() == j {
                compare(&name, path, &TOKENS, *how);
            }
        }
    }
    nothing_is_left("all architectures");
    Ok(())
}

fn encodings() -> Outcome {
    let folder = tempfile::tempdir()?;
    let mut cases: Vec<(&str, String)> = [
        ("tiny-llama", "q4_k_m"),
        ("tiny-qwen2", "q5_k"),
        ("tiny-gemma3", "q5_0"),
        ("tiny-qwen3moe", "q4_k_m"),
        ("tiny-gpt2", "q8_0"),
        ("tiny-phi3", "iq4_xs"),
        ("tiny-gemma2", "bf16"),
    ]
    .map(|(shape, mix)| (shape, mix.to_owned()))
    .to_vec();
    // The others on one model each: its shape does not matter to them.
    for (i, encoding) in EncodingSet::weights().iter().enumerate() {
        let mix = encoding.to_string().to_lowercase();
        if hoist_synth::Mix::from_name(&mix).is_none() {
            continue;
        }
        if exhaustive() {
            for shape in [
                "tiny-llama",
                "tiny-mistral",
                "tiny-qwen2",
                "tiny-qwen3",
                "tiny-qwen3moe",
                "tiny-gemma2",
                "tiny-gemma3",
                "tiny-phi3",
                "tiny-gpt2",
            ] {
                cases.push((shape, mix.clone()));
            }
        } else if i % 3 == 0 {
            cases.push(("tiny-mistral", mix));
        }
    }
    for (i, (shape, mix)) in cases.iter().enumerate() {
        let path = synthetic(shape, mix, folder.path());
        let ways = ways();
        for (j, how) in ways.iter().enumerate() {
            if exhaustive() && j < 3 || i % 3 == j {
                compare(&format!("{shape} {mix}"), &path, &TOKENS[..6], *how);
            }
        }
        std::fs::remove_file(path)?;
    }
    nothing_is_left("all encodings");
    Ok(())
}

/// The step in one launch: small rings, and orders drawn from many seeds.
///
/// A phase must have more pieces than the ring has slots for a slot to be used twice in it: hence the wide inner dimension and
/// the few multiprocessors. A ring that is not a multiple of the consumer warps fails here under every seed.
fn one_launch() -> Outcome {
    let folder = tempfile::tempdir()?;
    let how = How { chunk: 1, ..DEFAULT };
    let (seeds, mixes): (u64, &[&str]) = if exhaustive() {
        (200, &["q4_k_m", "q4_k", "q5_k", "q6_k", "q8_0"])
    } else {
        (3, &["q4_k_m", "q8_0"])
    };
    for (i, mix) in mixes.iter().enumerate() {
        for shape in ["tiny-llama", "tiny-qwen2"] {
            // All seeds for the first model, few for the others.
            let seeds = if i == 0 && shape == "tiny-llama" {
                seeds
            } else {
                seeds.min(10)
            };
            let wide = hoist_synth::ModelShape {
                n_ff: 2048,
                ..*hoist_synth::shape(shape).expect("a shape")
            };
            let path = folder.path().join("wide.gguf");
            let options = hoist_synth::Options {
                shape: &wide,
                mix: hoist_synth::Mix::from_name(mix).expect("a mix"),
                container: hoist_synth::Container::Gguf,
                seed: 3,
            };
            hoist_synth::write(options, &path, &|_, _| {})?;
            let tokens = &TOKENS[..3];
            let expected = logits(cpu(), &path, tokens, how)?;
            for seed in 0..seeds {
                for slots in [16, 37] {
                    configure(&format!("seed={seed};multiprocessors={}", 1 + (seed + 1) % 3));
                    let mut backend = CudaBackend::open(0, &self::options())?;
                    backend.decode_in_one_launch(Some(slots));
                    let what = format!("{shape} {mix} seed {seed} slots {slots}");
                    let found = logits(Box::new(backend), &path, tokens, how)
                        .unwrap_or_else(|e| panic!("{what}: {e}; {}", emulator().report().fault));
                    same(&what, how, &found, &expected);
                    // One launch a token, and what loading takes.
                    let launches = emulator().report().count("launches");
                    assert!(launches < 30, "{what}: {launches} launches");
                }
            }
        }
    }
    nothing_is_left("one launch");
    Ok(())
}

/// Several splits of attention, which the next product merges, or a phase of their own.
fn long_sequences() -> Outcome {
    let folder = tempfile::tempdir()?;
    let shape = hoist_synth::ModelShape {
        context: 4096,
        ..*hoist_synth::shape("tiny-llama").expect("a shape")
    };
    let path = folder.path().join("long.gguf");
    let options = hoist_synth::Options {
        shape: &shape,
        mix: hoist_synth::Mix::Q4KM,
        container: hoist_synth::Container::Gguf,
        seed: 12,
    };
    hoist_synth::write(options, &path, &|_, _| {})?;
    let prompts: &[usize] = if exhaustive() {
        &[255, 511, 2047, 2303]
    } else {
        &[255]
    };
    for &prompt in prompts {
        let tokens: Vec<u32> = (0..prompt as u32 + 3).map(|i| i * 37 % 500).collect();
        let how = How {
            prompt,
            chunk: 1,
            context: 4096,
            ..DEFAULT
        };
        let expected = logits(cpu(), &path, &tokens, how)?;
        for one_launch in [false, true] {
            let mut backend = CudaBackend::open(0, &self::options())?;
            if !one_launch {
                backend.decode_by_operations();
            }
            let found = logits(Box::new(backend), &path, &tokens, how)?;
            same(
                &format!("{prompt} tokens and three, in one launch {one_launch}"),
                how,
                &found,
                &expected,
            );
        }
    }
    nothing_is_left("long sequences");
    Ok(())
}

/// Batches whose attention has not the scratch to run at once: queries of several heads, a window, a soft cap, and batches
/// that several sequences share.
fn attention_in_parts() -> Outcome {
    let folder = tempfile::tempdir()?;
    let tokens: Vec<u32> = (0..40).map(|i| i * 37 % 250).collect();
    for (name, sequences, at_once) in [
        ("tiny-llama", 1, &[1, 19][..]),
        ("tiny-gemma2", 1, &[7]),
        ("tiny-llama", 3, &[39]),
    ] {
        let path = synthetic(name, "q4_k_m", folder.path());
        let how = How {
            chunk: 40,
            sequences,
            ..DEFAULT
        };
        let expected = logits(cpu(), &path, &tokens, how)?;
        for most in at_once {
            let mut backend = CudaBackend::open(0, &self::options())?;
            backend.attend_at_most(std::num::NonZeroU32::new(*most).expect("not 0"));
            let found = logits(Box::new(backend), &path, &tokens, how)?;
            same(&format!("{name}, {most} tokens at once"), how, &found, &expected);
        }
    }
    nothing_is_left("attention in parts");
    Ok(())
}

/// A prompt whose last product has two tiles for the device's three multiprocessors, which share them out: of Q4_K and Q6_K, one
/// prompt after another.
fn products_in_parts() -> Outcome {
    let folder = tempfile::tempdir()?;
    let wide = hoist_synth::ModelShape {
        n_ff: 4096,
        ..*hoist_synth::shape("tiny-llama").expect("a shape")
    };
    for mix in ["q4_k_m", "q6_k"] {
        let path = folder.path().join(format!("{mix}.gguf"));
        let options = hoist_synth::Options {
            shape: &wide,
            mix: hoist_synth::Mix::from_name(mix).expect("a mix"),
            container: hoist_synth::Container::Gguf,
            seed: 4,
        };
        hoist_synth::write(options, &path, &|_, _| {})?;
        let tokens: Vec<u32> = (0..124).map(|i| i * 37 % 250).collect();
        let how = How {
            chunk: 62,
            context: 128,
            ..DEFAULT
        };
        compare(mix, &path, &tokens, how);
    }
    nothing_is_left("products in parts");
    Ok(())
}

// ---- faults ----

/// What a child is asked: whether the backend is available.
fn answer() {
    let found = CudaProvider
        .devices()
        .and_then(|_| CudaBackend::open(0, &options()).map(|_| ()));
    match found {
        Ok(()) => println!("available"),
        Err(Error::Unavailable { reason, hint, .. }) => {
            println!("unavailable: {reason}; hint: {}", hint.unwrap_or_default());
        }
        Err(other) => println!("other: {other:?}"),
    }
}

fn unavailable() -> Outcome {
    let whole = hoist_cuda_emulator::folder().expect("a folder");
    let incomplete = hoist_cuda_emulator::incomplete_folder().expect("a folder");
    for (folder, settings, expected) in [
        (&whole, "", "available"),
        (&whole, "capability=8.0", "available"),
        (
            &whole,
            "driver=12040",
            "unavailable: the driver supports CUDA 12.4",
        ),
        (
            &whole,
            "devices=0",
            "unavailable: cuInit returned CUDA_ERROR_NO_DEVICE",
        ),
        (
            &whole,
            "capability=7.5",
            "unavailable: cuda:0 (emulated device) has compute capability 7.5",
        ),
        (&whole, "fail=cuInit:1:3", "unavailable: cuInit returned"),
        (
            &whole,
            "fail=cuDevicePrimaryCtxRetain:1:101",
            "unavailable: cuda:0: cuDevicePrimaryCtxRetain",
        ),
        (
            &incomplete,
            "",
            "unavailable: the CUDA driver has no `cuGraphUpload`",
        ),
    ] {
        let done = Command::new(std::env::current_exe()?)
            .env(CHILD, "1")
            .env("LD_LIBRARY_PATH", folder)
            .env("HOIST_EMULATED_CUDA", settings)
            .output()?;
        let text = String::from_utf8_lossy(&done.stdout);
        assert!(
            done.status.success() && text.starts_with(expected),
            "`{settings}`: {text} {}",
            String::from_utf8_lossy(&done.stderr)
        );
        let hint = text.trim().split_once("hint: ").map_or("", |(_, hint)| hint);
        assert!(
            expected == "available" || !hint.is_empty(),
            "`{settings}`: {text}"
        );
    }
    Ok(())
}

/// Loads a model and decodes, on both ways; everything is given back whatever happens.
fn whole_session(path: &Path, one_launch: bool) -> std::result::Result<Vec<u32>, Error> {
    let mut backend = CudaBackend::open(0, &options())?;
    if !one_launch {
        backend.decode_by_operations();
    }
    let how = How { chunk: 1, ..DEFAULT };
    logits(Box::new(backend), path, &TOKENS[..3], how).map_err(typed)
}

/// The contract's error behind one of the orchestrator's.
fn typed(error: orchestrator::Error) -> Error {
    match error {
        orchestrator::Error::Backend(error) => error,
        orchestrator::Error::NotGivenBack { error, .. } => typed(*error),
        orchestrator::Error::DoesNotFit { device, fit } => Error::OutOfMemory {
            device,
            what: "the plan".into(),
            needed: fit.needed,
            available: fit.available,
        },
        other => Error::internal("another", other),
    }
}

/// Parts of the names of calls that give something back.
const RELEASES: &[&str] = &["Destroy", "Free", "Unload", "Unregister", "SetCurrent"];

/// Every call that a session makes fails once: as one that found no memory, and as one that lost the device.
fn failing_calls() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = synthetic("tiny-llama", "q4_k_m", folder.path());
    configure("delays=0");
    let expected = whole_session(&path, true)?;
    nothing_is_left("a session");
    let calls = emulator().report();
    let (mut asked, mut left) = (0, Vec::new());
    for (call, times) in calls
        .counts
        .iter()
        .filter_map(|(k, n)| Some((k.strip_prefix("calls.")?, *n)))
    {
        // These are asked for in `unavailable`: a process asks them once.
        if matches!(call, "cuInit" | "cuDriverGetVersion" | "cuDeviceGetCount") {
            continue;
        }
        let mut which: Vec<u64> = if exhaustive() {
            (1..=times).collect()
        } else {
            vec![1, times.div_ceil(2), times]
        };
        which.dedup();
        for n in which {
            for (code, name) in [(2, "out of memory"), (719, "lost")] {
                asked += 1;
                configure(&format!("delays=0;fail={call}:{n}:{code}"));
                let what = format!("{call}, time {n}, {name}");
                match whole_session(&path, true) {
                    // Some failures have a way around: memory that is not locked, something not given back.
                    Ok(found) => assert!(found == expected, "{what}: other logits"),
                    Err(Error::OutOfMemory { .. }) => assert_eq!(code, 2, "{what}"),
                    Err(Error::DeviceLost { .. }) => assert_eq!(code, 719, "{what}"),
                    Err(Error::Unavailable { .. }) => assert!(call.starts_with("cuDevice"), "{what}"),
                    Err(other) => panic!("{what}: {other}"),
                }
                // What a failed release leaves is the driver's, and so is all where no context can be made current.
                let excused = code == 2 && RELEASES.iter().any(|r| call.contains(r))
                    || call == "cuDevicePrimaryCtxRelease_v2";
                let report = settled();
                if !alive(&report).is_empty() {
                    if !excused {
                        left.push(format!("{what}: {:?}", alive(&report)));
                    }
                    emulator().reset();
                }
            }
        }
    }
    assert!(left.is_empty(), "left after {}", left.join("; "));
    assert!(asked > 100, "{asked} failures");
    println!("{asked} failures");
    Ok(())
}

fn lost() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = synthetic("tiny-llama", "q4_k_m", folder.path());
    for one_launch in [false, true] {
        configure("delays=0");
        let expected = whole_session(&path, one_launch)?;
        let launches = emulator().report().count("launches");
        let step = if exhaustive() { 1 } else { launches / 6 + 1 };
        for n in (1..=launches).step_by(step as usize) {
            for code in [719, 700, 214] {
                configure(&format!("lost={n}:{code}"));
                match whole_session(&path, one_launch) {
                    Err(Error::DeviceLost { device, reason }) => {
                        assert_eq!(device, "cuda:0");
                        assert!(reason.contains("CUDA_ERROR"), "{reason}");
                    }
                    other => panic!("lost at launch {n}: {other:?}"),
                }
                nothing_is_kept(&format!("a loss at launch {n}"));
            }
        }
        // The device is as good as new for the next session.
        configure("");
        assert!(whole_session(&path, one_launch)? == expected, "after a loss");
    }
    // A session that lost its device says so from then on.
    let how = How { chunk: 1, ..DEFAULT };
    configure("");
    with_decoder(cuda(), &path, how, |decoder, vocab| {
        let before = step(decoder, 5, vocab).unwrap();
        emulator().configure("lost=3");
        for _ in 0..3 {
            match step(decoder, 5, vocab) {
                Err(Error::DeviceLost { .. }) => {}
                other => panic!("{other:?} where the first step gave {}", before.len()),
            }
        }
    });
    nothing_is_kept("a lost session");
    Ok(())
}

fn with_decoder(
    backend: Box<dyn WeightBackend>,
    path: &Path,
    how: How,
    act: impl FnOnce(&mut dyn DecodeBackend, usize),
) {
    let mut loaded = OpenedModel::open(path)
        .unwrap()
        .load(backend, &how.session())
        .unwrap();
    let vocab = vocabulary(&loaded);
    act(loaded.prepare().unwrap(), vocab);
}

fn step(decoder: &mut dyn DecodeBackend, token: u32, vocab: usize) -> Result<Vec<u32>> {
    let mut logits = vec![0.0; vocab];
    let run = Run {
        sequence: SequenceId(0),
        tokens: &[token],
        want: &[Want::Logits],
    };
    let mut out = Outputs {
        argmax: &mut [],
        logits: &mut logits,
    };
    decoder.forward(&TokenBatch { runs: &[run] }, &mut out)?;
    Ok(logits.iter().map(|y| y.to_bits()).collect())
}

// ---- what the backends of a process share ----

/// Weights of a session that has only loaded.
fn load_only(path: &Path, watch: &dyn LoadWatch) -> std::result::Result<LoadedModel, orchestrator::Error> {
    let options = SessionOptions {
        decode: None,
        verify: false,
        import: false,
        watch,
    };
    OpenedModel::open(path)?.load(cuda(), &options)
}

fn second_backend() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = synthetic("tiny-llama", "q4_k_m", folder.path());
    configure("");
    let expected = whole_session(&path, false)?;
    let first = all_calls();
    assert_eq!(calls("cuDevicePrimaryCtxRetain"), 1);
    assert!(calls("cuModuleLoadData") > 3 && calls("cuMemHostRegister_v2") > 2);
    // Opened and dropped: nothing but a stream.
    emulator().configure("");
    drop(cuda());
    let report = emulator().report();
    let made = [
        "cuDevicePrimaryCtxRetain",
        "cuDeviceGetAttribute",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuEventCreate",
        "cuMemAlloc_v2",
        "cuMemHostAlloc",
        "cuMemHostRegister_v2",
        "cuMemHostUnregister",
    ];
    for call in made {
        assert_eq!(calls(call), 0, "{call}: {report:?}");
    }
    assert_eq!(calls("cuStreamCreateWithPriority"), 1, "{report:?}");
    println!("{} calls to open and drop, of {first} for a session", all_calls());
    assert!(all_calls() <= 12, "{report:?}");
    // A whole session: its weights and workspace, and nothing that the first one had made for good.
    emulator().configure("");
    assert!(whole_session(&path, false)? == expected, "the second session");
    for call in [
        "cuDevicePrimaryCtxRetain",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuFuncSetAttribute",
        "cuMemHostRegister_v2",
        "cuMemHostUnregister",
    ] {
        assert_eq!(calls(call), 0, "{call}");
    }
    // Its own, and its workspace's.
    assert_eq!(calls("cuStreamCreateWithPriority"), 2);
    // A load with another number of threads has equipment of its own, and only one set is kept.
    let locked = emulator().report().count("page_locked_bytes");
    let four = OpenOptions {
        threads: Some(4),
        ..OpenOptions::default()
    };
    let session = SessionOptions {
        decode: None,
        verify: true,
        import: false,
        watch: &Unwatched,
    };
    let backend = CudaBackend::open(0, &four)?;
    drop(OpenedModel::open(&path)?.load(Box::new(backend), &session)?);
    let other = emulator().report().count("page_locked_bytes");
    // Lanes of two and of four readers, and one more of each.
    assert!(
        locked > 0 && other * 3 == locked * 5,
        "{locked} and {other} bytes"
    );
    nothing_is_left("a second session");
    Ok(())
}

/// Two at once, one of whose kernels needs less shared memory than the other's.
fn two_share() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = synthetic("tiny-llama", "q4_k_m", folder.path());
    let how = How { chunk: 1, ..DEFAULT };
    let expected = logits(cpu(), &path, &TOKENS[..4], how)?;
    configure("");
    let session = |slots| {
        let mut backend = CudaBackend::open(0, &options()).unwrap();
        backend.decode_in_one_launch(slots);
        OpenedModel::open(&path).and_then(|model| model.load(Box::new(backend), &how.session()))
    };
    let (mut wide, mut narrow) = (session(None)?, session(Some(16))?);
    let report = emulator().report();
    assert_eq!(report.count("contexts"), 1);
    let modules = report.count("modules");
    let vocab = vocabulary(&wide);
    let (wide_decoder, narrow_decoder) = (wide.prepare()?, narrow.prepare()?);
    let (mut of_wide, mut of_narrow) = (Vec::new(), Vec::new());
    for token in &TOKENS[..4] {
        of_wide.extend(step(wide_decoder, *token, vocab)?);
        of_narrow.extend(step(narrow_decoder, *token, vocab)?);
    }
    same("the wide one", how, &of_wide, &expected);
    same("the narrow one", how, &of_narrow, &expected);
    let report = emulator().report();
    assert_eq!(report.count("calls.cuDevicePrimaryCtxRetain"), 1);
    // Every file of kernels once, however many use it.
    assert_eq!(report.count("modules"), report.count("calls.cuModuleLoadData"));
    assert!(report.count("modules") >= modules);
    // What one gives back is not the other's.
    drop(wide);
    let more = step(narrow.prepare()?, TOKENS[0], vocab)?;
    assert!(more == expected[..vocab], "after the other one has gone");
    assert_eq!(hoist_cuda::release_unused(), 0, "a context in use was given up");
    drop(narrow);
    assert_eq!(hoist_cuda::release_unused(), 1);
    nothing_is_kept("two that shared");
    // One may load and unload while the other records.
    let mut recording = session(None)?;
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let loading = scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let mut loaded = load_only(&path, &Unwatched).unwrap();
                loaded.backend.unload().unwrap();
            }
        });
        for _ in 0..if exhaustive() { 200 } else { 20 } {
            let again = recording
                .prepare()
                .map_err(typed)
                .and_then(|d| step(d, TOKENS[0], vocab));
            assert!(again.unwrap() == expected[..vocab], "recorded beside a load");
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        loading.join().unwrap();
    });
    drop(recording);
    // Opened by many threads at once, it is made once.
    configure("");
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| drop(cuda()));
        }
    });
    assert_eq!(calls("cuDevicePrimaryCtxRetain"), 1);
    nothing_is_left("eight at once");
    Ok(())
}

fn lost_while_shared() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = synthetic("tiny-llama", "q4_k_m", folder.path());
    configure("");
    let how = How { chunk: 1, ..DEFAULT };
    let opened = || OpenedModel::open(&path).and_then(|model| model.load(cuda(), &how.session()));
    let (mut first, mut second) = (opened()?, opened()?);
    let vocab = vocabulary(&first);
    let expected = step(first.prepare()?, 5, vocab)?;
    let is_lost = |outcome: Result<Vec<u32>>, whose: &str| {
        assert!(
            matches!(outcome, Err(Error::DeviceLost { .. })),
            "{whose}: {outcome:?}"
        );
    };
    emulator().configure("lost=3");
    is_lost(step(first.prepare()?, 5, vocab), "the one that lost it");
    // It was the other's too.
    let prepared = second.prepare().map(|_| ()).map_err(typed);
    assert!(matches!(prepared, Err(Error::DeviceLost { .. })), "{prepared:?}");
    // The driver has no other as long as somebody holds it.
    let another = CudaBackend::open(0, &options()).map(|_| ());
    assert!(matches!(another, Err(Error::DeviceLost { .. })), "{another:?}");
    drop(first);
    let another = CudaBackend::open(0, &options()).map(|_| ());
    assert!(matches!(another, Err(Error::DeviceLost { .. })), "{another:?}");
    let memory = second.backend.memory().map(|_| ());
    assert!(matches!(memory, Err(Error::DeviceLost { .. })), "{memory:?}");
    drop(second);
    nothing_is_kept("a loss");
    emulator().configure("");
    assert!(step(opened()?.prepare()?, 5, vocab)? == expected, "after a loss");
    assert_eq!(calls("cuDevicePrimaryCtxRetain"), 1);
    nothing_is_left("after a loss");
    Ok(())
}

/// The context is lost while no backend is open, or by a call whose error nobody is told.
fn lost_unseen() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = synthetic("tiny-llama", "q4_k_m", folder.path());
    configure("");
    let expected = whole_session(&path, false)?;
    for settings in [
        // Asked when it is opened again, and when its stream is made.
        "fail=cuMemGetInfo_v2:1:719",
        "fail=cuStreamCreateWithPriority:1:700",
        // By what was given back.
        "fail=cuStreamDestroy_v2:1:719",
    ] {
        drop(cuda());
        emulator().configure(settings);
        drop(cuda());
        assert!(whole_session(&path, false)? == expected, "{settings}");
        assert_eq!(calls("cuDevicePrimaryCtxRetain"), 1, "{settings}");
        nothing_is_left(settings);
    }
    Ok(())
}

/// Stops a load once some bytes have arrived.
struct StopAt(u64, std::sync::atomic::AtomicBool);

impl LoadWatch for StopAt {
    fn progress(&self, progress: Progress) {
        if progress.done >= self.0 {
            self.1.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    }

    fn cancelled(&self) -> bool {
        self.1.load(std::sync::atomic::Ordering::Relaxed)
    }
}

fn equipment_again() -> Outcome {
    let folder = tempfile::tempdir()?;
    let (small, other) = (
        synthetic("tiny-llama", "q4_k_m", folder.path()),
        synthetic("tiny-gpt2", "q8_0", folder.path()),
    );
    // Many chunks, so that copies are under way when the load is stopped.
    let shape = hoist_synth::ModelShape {
        n_ff: 16384,
        ..*hoist_synth::shape("tiny-llama").expect("a shape")
    };
    let large = folder.path().join("large.gguf");
    let options = hoist_synth::Options {
        shape: &shape,
        mix: hoist_synth::Mix::from_name("f32").expect("a mix"),
        container: hoist_synth::Container::Gguf,
        seed: 5,
    };
    hoist_synth::write(options, &large, &|_, _| {})?;
    let total = std::fs::metadata(&large)?.len();
    assert!(total > 64 << 20, "{total} bytes");
    let verified = |path: &Path, seed: u64| {
        let session = SessionOptions {
            decode: None,
            verify: true,
            import: false,
            watch: &Unwatched,
        };
        OpenedModel::open(path)
            .and_then(|model| model.load(cuda(), &session))
            .unwrap_or_else(|e| panic!("{} with seed {seed}: {e}", path.display()));
    };
    configure("");
    verified(&small, 0);
    let mut stopped = 0;
    for seed in 0..if exhaustive() { 50 } else { 4 } {
        emulator().configure(&format!("seed={seed}"));
        // Cancelled somewhere; the next load reads other bytes to the same slots at once.
        let watch = StopAt(total / 5 * (seed % 5), false.into());
        match load_only(&large, &watch).map(|_| ()).map_err(typed) {
            Err(Error::Cancelled) => stopped += 1,
            Ok(()) => {}
            Err(other) => panic!("seed {seed}: {other}"),
        }
        verified(&other, seed);
        // A launch that is refused, for no lasting reason, in the middle of a load.
        emulator().configure(&format!("seed={seed};fail=cuLaunchKernelEx:1:701"));
        match load_only(&small, &Unwatched).map(|_| ()).map_err(typed) {
            Err(Error::Internal { .. }) => {}
            other => panic!("seed {seed}: {other:?}"),
        }
        verified(&large, seed);
        let report = emulator().report();
        assert_eq!(report.count("calls.cuMemHostRegister_v2"), 0, "seed {seed}");
        assert_eq!(report.count("calls.cuMemHostUnregister"), 0, "seed {seed}");
        assert_eq!(report.count("calls.cuDevicePrimaryCtxRetain"), 0, "seed {seed}");
    }
    assert!(stopped > 0, "no load was cancelled before its end");
    nothing_is_left("loads that failed");
    Ok(())
}

fn short_memory() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = synthetic("tiny-llama", "q4_k_m", folder.path());
    // From too little for a context to enough for everything.
    let mut seen = Vec::new();
    let mut loads = 0;
    for mebibytes in [32, 64, 65, 66, 68, 72, 80, 96, 128, 256, 512] {
        configure(&format!("memory={mebibytes}MiB"));
        match whole_session(&path, false) {
            Ok(_) => loads += 1,
            Err(Error::OutOfMemory { what, needed, .. }) => {
                assert!(needed > 0 && loads == 0, "{what} with {mebibytes} MiB");
                seen.push(what);
            }
            Err(other) => panic!("{mebibytes} MiB: {other:?}"),
        }
        nothing_is_left(&format!("{mebibytes} MiB"));
    }
    seen.dedup();
    println!("{seen:?}");
    assert!(seen.len() >= 3 && loads >= 2, "{seen:?}, {loads} loads");
    // Keys and values alone: the weights fit, their context does not.
    configure("memory=256MiB");
    let many = How {
        kv: KvDtype::F32,
        prompt: 0,
        chunk: 1,
        sequences: 4096,
        context: 1024,
    };
    let opened = OpenedModel::open(&path)?;
    match opened.load(cuda(), &many.session()).map(|_| ()).map_err(typed) {
        Err(Error::OutOfMemory {
            needed, available, ..
        }) => assert!(needed > available),
        other => panic!("{other:?}"),
    }
    nothing_is_left("no room for keys and values");
    // Page-locked memory: a load does without, decoding says so.
    let mut outcomes = BTreeMap::new();
    for limit in ["0", "1KiB", "20MiB", "1GiB"] {
        configure(&format!("pinned={limit}"));
        let outcome = match whole_session(&path, false) {
            Ok(_) => "decodes",
            Err(Error::OutOfMemory { device, .. }) => {
                assert_eq!(device, "the host");
                "refused"
            }
            Err(other) => panic!("{limit}: {other:?}"),
        };
        outcomes.insert(limit, outcome);
        nothing_is_left(limit);
    }
    assert_eq!(outcomes["0"], "refused");
    assert_eq!(outcomes["1GiB"], "decodes");
    Ok(())
}

fn refused_tokens() -> Outcome {
    let folder = tempfile::tempdir()?;
    let path = synthetic("tiny-llama", "q4_k_m", folder.path());
    let how = How {
        chunk: 1,
        context: 4,
        ..DEFAULT
    };
    let expected = logits(cpu(), &path, &TOKENS[..4], how)?;
    for one_launch in [false, true] {
        let mut backend = CudaBackend::open(0, &options())?;
        if !one_launch {
            backend.decode_by_operations();
        }
        with_decoder(Box::new(backend), &path, how, |decoder, vocab| {
            let mut found = Vec::new();
            for token in &TOKENS[..4] {
                let bad = step(decoder, vocab as u32, vocab);
                assert!(
                    matches!(
                        bad,
                        Err(Error::InvalidArgument { .. } | Error::TokenOutOfRange { .. })
                    ),
                    "{bad:?}"
                );
                found.extend(step(decoder, *token, vocab).unwrap());
            }
            let full = step(decoder, 1, vocab);
            assert!(matches!(full, Err(Error::ContextExceeded { .. })), "{full:?}");
            same("around refused tokens", how, &found, &expected);
            // Cut back, it goes on.
            decoder.truncate(SequenceId(0), 3).unwrap();
            let again = step(decoder, TOKENS[3], vocab).unwrap();
            assert!(again == expected[3 * vocab..], "after cutting back");
        });
    }
    nothing_is_left("refused tokens");
    Ok(())
}

// ---- the conformance suite ----

/// Asks every case that matches one of `filters`.
fn conforms(filters: &[&str]) -> Outcome {
    configure("delays=0");
    suite::conforms(&CudaProvider, filters)?;
    let contexts = emulator().report().count("calls.cuDevicePrimaryCtxRetain");
    println!("{contexts} contexts");
    Ok(())
}

/// What is planned for a device that is not here is what one of that size says.
fn an_outline_is_a_devices_word() -> Outcome {
    configure("delays=0");
    let options = OpenOptions {
        memory_budget: Some(1 << 29),
        ..options()
    };
    let outline = CudaProvider.outline(&options)?.ok_or("no outline")?;
    let backend = CudaProvider.open(0, &options)?;
    let as_outlined = BackendInfo {
        device: outline.info.device.clone(),
        device_name: outline.info.device_name.clone(),
        memory: outline.info.memory.clone(),
        ..backend.info().clone()
    };
    assert_eq!(outline.info, as_outlined);
    let folder = tempfile::tempdir()?;
    let model = OpenedModel::open(&synthetic("tiny-llama", "q4_k_m", folder.path()))?;
    let capacity = model.capacity(&DecodeOptions::default());
    let program = model.program(capacity)?;
    let dims = WorkspaceDims::new(&program, capacity)?;
    assert_eq!((outline.workspace_bytes)(&dims)?, backend.workspace_bytes(&dims)?);
    let import = OpenOptions {
        import: true,
        ..options
    };
    let refused = CudaProvider.outline(&import);
    assert!(matches!(refused, Err(Error::Unsupported { .. })), "{refused:?}");
    Ok(())
}
