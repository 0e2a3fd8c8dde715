//! The wgpu backend on the first adapter there is: Mesa's lavapipe where there is no GPU.
//!
//! A sample of the conformance suite: `hoist conform wgpu` asks all of it, which takes a software adapter long.
//!
//! Without an adapter every test is ignored, visibly; where the variable CI is set, that is a failure.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use hoist_backend::*;
use hoist_conformance::operands::{self, Magnitudes, Random, Scales};
use hoist_cpu::CpuProvider;
use hoist_tests::suite;
use hoist_wgpu::{AsIf, WgpuBackend, WgpuProvider};
use libtest_mimic::{Arguments, Failed, Trial};

/// Asks the first adapter every case that matches one of `filters`.
fn conforms(filters: &[&str]) -> Result<(), Failed> {
    Ok(suite::conforms(&WgpuProvider, filters)?)
}

/// The first adapter, as if it had no larger bindings.
fn limited(bytes: u64) -> AsIf {
    AsIf {
        binding_limit: Some(bytes),
        ..AsIf::default()
    }
}

/// A matrix behind a table of inputs: logits of token `t` are the matrix times row `t` of the table.
struct Product {
    plan: LoadPlan,
    layout: IndexLayout,
    program: DecodeProgram,
    bytes: Vec<Vec<u8>>,
}

impl Product {
    fn new(encoding: Encoding, rows: u32, cols: u32) -> Self {
        let mut random = Random::new(3);
        let shape = Shape::matrix(rows.into(), cols.into());
        let table: Vec<f32> = (0..rows)
            .flat_map(|_| operands::vector(&mut random, cols as usize, Magnitudes::Outliers))
            .collect();
        let bytes = vec![
            table.iter().flat_map(|x| x.to_le_bytes()).collect(),
            operands::weight(&mut random, encoding, shape, Scales::Ordinary).unwrap(),
        ];
        let parts = [(Role::TokenEmbd, Encoding::F32), (Role::Output, encoding)];
        let weights: Vec<WeightPlan> = (0u32..)
            .zip(parts)
            .map(|(i, (role, encoding))| {
                let nbytes = bytes[i as usize].len() as u64;
                WeightPlan {
                    id: WeightId(i),
                    name: role.to_string(),
                    layer: None,
                    role,
                    class: WeightClass::of_matrix(encoding),
                    encoding,
                    shape,
                    nbytes,
                    views: vec![SourceView::contiguous(0, 0, nbytes)],
                    change: ValueChange::Keep,
                    layout: FloatLayout::OutIn,
                    resident_bytes: nbytes,
                }
            })
            .collect();
        let entries = weights
            .iter()
            .map(|w| IndexEntry {
                layer: None,
                role: w.role,
                slot: Slot::Present(w.id),
            })
            .collect();
        let value = |name: &str, width, kind| ValueSpec {
            name: name.into(),
            width,
            kind,
        };
        let at = |role| WeightRef { layer: None, role };
        let op = |kind| Op { layer: None, kind };
        let program = DecodeProgram {
            vocab: rows,
            max_context: 16,
            kv: vec![],
            values: vec![
                value("x", cols, ValueKind::F32),
                value("q", cols, ValueKind::Quantized { vectors: 1 }),
                value("logits", rows, ValueKind::F32),
            ],
            ops: vec![
                op(OpKind::Embed {
                    weight: at(Role::TokenEmbd),
                    out: ValueId(0),
                }),
                op(OpKind::Quantise {
                    input: ValueId(0),
                    out: ValueId(1),
                }),
                op(OpKind::Logits {
                    input: ValueId(1),
                    weight: at(Role::Output),
                    bias: None,
                    out: ValueId(2),
                }),
            ],
            tail: 0,
            tables: vec![],
            logits: ValueId(2),
        };
        let nbytes = weights.iter().map(|w| w.nbytes).sum();
        Self {
            plan: LoadPlan {
                architecture: "product".into(),
                layers: 0,
                weights,
                resident: MemoryByClass::default(),
                nbytes,
                source_bytes: nbytes,
            },
            layout: IndexLayout { layers: 0, entries },
            program,
            bytes,
        }
    }

    /// Uploads everything, in chunks of an odd number of blocks.
    fn load(&self, backend: &mut dyn WeightBackend) {
        backend.begin_load(&self.plan).unwrap();
        for (weight, bytes) in self.plan.weights.iter().zip(&self.bytes) {
            let step = 37 * weight.granule() as usize;
            for (i, bytes) in bytes.chunks(step).enumerate() {
                let chunk = Chunk {
                    weight: weight.id,
                    offset: (i * step) as u64,
                    bytes,
                };
                match weight.class {
                    WeightClass::Quantized => backend.upload_quantized(chunk).unwrap(),
                    _ => backend.upload_f32(chunk).unwrap(),
                }
            }
        }
        backend.finish_load().unwrap();
    }

    /// Logits of some tokens: six together, then the same one by one, every other one of them asked for its arg-max.
    fn run(&self, backend: &mut dyn WeightBackend) -> Vec<u32> {
        backend.build_index(&self.layout).unwrap();
        let capacity = Capacity {
            max_context: 16,
            max_sequences: 1,
            max_batch_tokens: 6,
            kv: KvDtype::F16,
        };
        backend
            .init_workspace(&WorkspaceDims::new(&self.program, capacity).unwrap())
            .unwrap();
        let decode = backend.as_decode().unwrap();
        decode.prepare(&self.program).unwrap();
        let tokens = [0, 1, 77, self.program.vocab - 1, 5, 2];
        let want = [Want::Logits; 6];
        let mut logits = vec![0.0; tokens.len() * self.program.vocab as usize];
        let run = Run {
            sequence: SequenceId(0),
            tokens: &tokens,
            want: &want,
        };
        decode
            .forward(
                &TokenBatch { runs: &[run] },
                &mut Outputs {
                    argmax: &mut [],
                    logits: &mut logits,
                },
            )
            .unwrap();
        let vocab = self.program.vocab as usize;
        for (i, token) in tokens.iter().enumerate() {
            let wants_logits = i % 2 == 0;
            let mut one = vec![0.0; if wants_logits { vocab } else { 0 }];
            let mut id = vec![0; usize::from(!wants_logits)];
            let run = Run {
                sequence: SequenceId(0),
                tokens: &[*token],
                want: &[if wants_logits { Want::Logits } else { Want::ArgMax }],
            };
            let mut outputs = Outputs {
                argmax: &mut id,
                logits: &mut one,
            };
            decode
                .forward(&TokenBatch { runs: &[run] }, &mut outputs)
                .unwrap();
            let together = &logits[i * vocab..(i + 1) * vocab];
            if wants_logits {
                assert!(one == together, "token {token} alone and among others");
            } else {
                let largest = together.iter().copied().fold(f32::MIN, f32::max);
                let first = together.iter().position(|y| *y == largest).unwrap();
                assert_eq!(id, [first as u32], "arg-max of token {token}");
            }
        }
        logits.iter().map(|y| y.to_bits()).collect()
    }
}

/// Kernels for adapters that run threads side by side, and those for processors, multiply as the CPU backend does: each
/// way that encodings have of reading slices, rows of few segments and of more than a workgroup's pairs, segments that
/// are not full.
fn both_shapes_of_workgroups_multiply_alike() -> Result<(), Failed> {
    let cases = [
        (Encoding::Q4_K, 2304),
        (Encoding::Q4_K, 35 * 256),
        (Encoding::Q5_K, 512),
        (Encoding::Q6_K, 768),
        (Encoding::Q2_K, 512),
        (Encoding::IQ3_S, 256),
        (Encoding::Q4_0, 576),
        (Encoding::Q4_1, 33 * 256 + 32),
        (Encoding::Q8_0, 288),
        (Encoding::NVFP4, 320),
        (Encoding::Q1_0, 384),
        (Encoding::APR_Q8, 352),
    ];
    for (encoding, cols) in cases {
        let model = Product::new(encoding, 101, cols);
        let mut cpu = CpuProvider.open(0, &OpenOptions::default())?;
        model.load(&mut *cpu);
        let expected = model.run(&mut *cpu);
        for is_cpu in [false, true] {
            let adapter = AsIf {
                is_cpu: Some(is_cpu),
                ..AsIf::default()
            };
            let mut backend = WgpuBackend::open_as_if(0, &OpenOptions::default(), adapter)?;
            model.load(&mut backend);
            assert!(
                model.run(&mut backend) == expected,
                "{encoding}, {cols} columns, is_cpu {is_cpu}"
            );
        }
    }
    Ok(())
}

/// A tensor that no binding could hold whole reads back and multiplies as on the CPU.
fn split_tensors_are_whole() -> Result<(), Failed> {
    for encoding in [Encoding::Q4_K, Encoding::Q6_K, Encoding::Q8_0, Encoding::APR_Q8] {
        let model = Product::new(encoding, 301, 512);
        let mut backend = WgpuBackend::open_as_if(0, &OpenOptions::default(), limited(48 << 10))?;
        model.load(&mut backend);
        for (weight, bytes) in model.plan.weights.iter().zip(&model.bytes) {
            let mut found = vec![0; bytes.len()];
            backend.read_back(weight.id, 0, &mut found)?;
            assert!(found == *bytes, "{encoding}: `{}` read back", weight.name);
            let block = weight.granule() as usize;
            let (start, end) = (3 * block, bytes.len() - 2 * block);
            let mut part = vec![0; end - start];
            backend.read_back(weight.id, start as u64, &mut part)?;
            assert!(
                part == bytes[start..end],
                "{encoding}: a part of `{}`",
                weight.name
            );
        }
        let mut cpu = CpuProvider.open(0, &OpenOptions::default())?;
        model.load(&mut *cpu);
        assert!(
            model.run(&mut backend) == model.run(&mut *cpu),
            "{encoding}: logits"
        );
    }
    Ok(())
}

/// Launches of a program whose operations share them, and of the same one by one.
fn fewer_launches_give_the_same_logits() -> Result<(), Failed> {
    let model = Product::new(Encoding::Q4_K, 96, 512);
    let plain = OpenOptions {
        force_scalar: true,
        ..OpenOptions::default()
    };
    let mut one_by_one = WgpuBackend::open(0, &plain)?;
    let mut fused = WgpuBackend::open(0, &OpenOptions::default())?;
    model.load(&mut one_by_one);
    model.load(&mut fused);
    assert!(model.run(&mut one_by_one) == model.run(&mut fused));
    assert!(fused.launches() <= one_by_one.launches() && fused.launches().is_some());
    Ok(())
}

/// What cannot be held is refused by name, with numbers, before anything is resident.
fn a_row_beyond_every_binding_is_refused() -> Result<(), Failed> {
    let model = Product::new(Encoding::Q8_0, 64, 4096);
    let mut backend = WgpuBackend::open_as_if(0, &OpenOptions::default(), limited(16 << 10))?;
    match backend.begin_load(&model.plan) {
        Err(Error::Unsupported {
            what: UnsupportedWhat::Limit { limit, found, .. },
            ..
        }) => assert!(found > limit),
        other => panic!("{other:?}"),
    }
    assert_eq!(backend.memory()?.devices[0].resident.total(), 0);
    let mut backend = WgpuBackend::open_as_if(0, &OpenOptions::default(), limited(128 << 10))?;
    model.load(&mut backend);
    Ok(())
}

/// Set where a test runs in a process of its own.
const ALONE: &str = "HOIST_TEST_ALONE";

/// Runs the test of that name in a process of its own: what it does to the device it does to every backend that shares it.
fn alone(name: &str) -> Result<(), Failed> {
    let output = std::process::Command::new(std::env::current_exe()?)
        .args(["--exact", name])
        .env(ALONE, "1")
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    let text = [output.stdout, output.stderr].concat();
    Err(String::from_utf8_lossy(&text).into_owned().into())
}

/// Every call after it says so, and a device that is opened later works.
fn a_lost_device_is_reported_by_every_call() -> Result<(), Failed> {
    if std::env::var_os(ALONE).is_none() {
        return alone("a_lost_device_is_reported_by_every_call");
    }
    let is_lost = |result: Result<()>| match result {
        Err(Error::DeviceLost { device, reason }) => assert!(device == "wgpu:0" && !reason.is_empty()),
        other => panic!("{other:?}"),
    };
    let model = Product::new(Encoding::Q8_0, 96, 256);
    let open = || WgpuBackend::open(0, &OpenOptions::default());
    // While decoding.
    let mut backend = open()?;
    model.load(&mut backend);
    let expected = model.run(&mut backend);
    // While loading.
    let mut loading = open()?;
    loading.begin_load(&model.plan)?;
    backend.lose_device();
    for _ in 0..2 {
        let run = Run {
            sequence: SequenceId(0),
            tokens: &[1],
            want: &[Want::ArgMax],
        };
        let mut outputs = Outputs {
            argmax: &mut [0],
            logits: &mut [],
        };
        is_lost(backend.forward(&TokenBatch { runs: &[run] }, &mut outputs));
        assert_eq!(backend.sequence_length(SequenceId(0))?, 12);
    }
    is_lost(backend.read_back(WeightId(0), 0, &mut [0; 16]));
    is_lost(backend.memory().map(|_| ()));
    is_lost(backend.unload());
    let chunk = Chunk {
        weight: WeightId(0),
        offset: 0,
        bytes: &model.bytes[0],
    };
    is_lost(loading.upload_f32(chunk).and_then(|()| loading.abort_load()));
    is_lost(loading.unload());
    // The next one is another device.
    let mut backend = open()?;
    model.load(&mut backend);
    assert!(model.run(&mut backend) == expected);
    Ok(())
}

fn an_adapter_that_is_not_there_is_unavailable() -> Result<(), Failed> {
    let none = u32::try_from(WgpuProvider.devices()?.len())?;
    match WgpuProvider.open(none, &OpenOptions::default()).map(|_| ()) {
        Err(Error::Unavailable { hint: Some(_), .. }) => Ok(()),
        other => panic!("{other:?}"),
    }
}

fn options_that_it_cannot_honour_are_refused() -> Result<(), Failed> {
    for options in [
        OpenOptions {
            import: true,
            ..OpenOptions::default()
        },
        OpenOptions {
            float_layout: Some(FloatLayout::InOut),
            ..OpenOptions::default()
        },
    ] {
        let opened = WgpuProvider.open(0, &options).map(|_| ());
        assert!(
            matches!(opened, Err(Error::Unsupported { .. })),
            "{options:?}: {opened:?}"
        );
    }
    Ok(())
}

type Test = (&'static str, fn() -> Result<(), Failed>);

const TESTS: &[Test] = &[
    ("split_tensors_are_whole", split_tensors_are_whole),
    (
        "both_shapes_of_workgroups_multiply_alike",
        both_shapes_of_workgroups_multiply_alike,
    ),
    (
        "fewer_launches_give_the_same_logits",
        fewer_launches_give_the_same_logits,
    ),
    (
        "a_row_beyond_every_binding_is_refused",
        a_row_beyond_every_binding_is_refused,
    ),
    (
        "a_lost_device_is_reported_by_every_call",
        a_lost_device_is_reported_by_every_call,
    ),
    (
        "an_adapter_that_is_not_there_is_unavailable",
        an_adapter_that_is_not_there_is_unavailable,
    ),
    (
        "options_that_it_cannot_honour_are_refused",
        options_that_it_cannot_honour_are_refused,
    ),
    ("suite_device", || {
        // That case needs a process of its own.
        conforms(&["device", "!device::place::weights_are_where_it_says"])
    }),
    ("suite_residency", || {
        conforms(&["residency::*[encoding=f16]", "residency::*[encoding=q6_k]"])
    }),
    ("suite_index", || conforms(&["index"])),
    ("suite_encodings", || {
        conforms(&[
            "encodings::*[encoding=f16*",
            "encodings::*[encoding=q8_0*",
            "encodings::*[encoding=q4_k*",
            "encodings::*[encoding=q6_k*",
        ])
    }),
    ("suite_ops", || conforms(&["ops"])),
    ("suite_decode", || conforms(&["decode::*[architecture=llama*"])),
    ("suite_scalar", || conforms(&["determinism::code::scalar"])),
    ("suite_lifecycle", || conforms(&["lifecycle"])),
];

fn main() {
    let arguments = Arguments::from_args();
    let missing = match WgpuProvider.devices() {
        Ok(_) => None,
        Err(error) => Some(error.to_string()),
    };
    let in_ci = std::env::var_os("CI").is_some_and(|v| !v.is_empty() && v != "false");
    if let Some(reason) = &missing {
        eprintln!("no adapter: {reason}");
    }
    let trials = TESTS
        .iter()
        .map(|(name, test)| {
            let missing = missing.clone();
            Trial::test(*name, move || match missing {
                Some(reason) => Err(reason.into()),
                None => test(),
            })
        })
        .map(|trial| trial.with_ignored_flag(missing.is_some() && !in_ci))
        .collect();
    libtest_mimic::run(&arguments, trials).exit();
}
