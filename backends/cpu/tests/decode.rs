//! The same bits, whatever the instruction set, the threads, the chunks and the company; and no allocation in a step.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use hoist_backend::*;
use hoist_cpu::CpuBackend;
use support::{Weight, *};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: it does what the system's allocator does, and counts.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const VOCAB: u32 = 97;
const CONTEXT: u32 = 700;

/// What a test model is made of.
#[derive(Clone, Copy, Debug)]
struct Kind {
    encoding: Encoding,
    hidden: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    experts: bool,
    window: Option<u32>,
    soft_cap: Option<f32>,
    style: RopeStyle,
    layout: FloatLayout,
}

const DENSE: Kind = Kind {
    encoding: Encoding::Q4_K,
    hidden: 256,
    heads: 6,
    kv_heads: 2,
    head_dim: 48,
    experts: false,
    window: None,
    soft_cap: None,
    style: RopeStyle::HalfSplit,
    layout: FloatLayout::OutIn,
};

fn kinds() -> Vec<(&'static str, Kind)> {
    vec![
        ("q4_k", DENSE),
        (
            "q4_1, small window",
            Kind {
                encoding: Encoding::Q4_1,
                hidden: 96,
                window: Some(5),
                ..DENSE
            },
        ),
        (
            "q8_0, wide window, soft cap",
            Kind {
                encoding: Encoding::Q8_0,
                window: Some(300),
                soft_cap: Some(2.0),
                style: RopeStyle::Interleaved,
                ..DENSE
            },
        ),
        (
            "q6_k experts",
            Kind {
                encoding: Encoding::Q6_K,
                experts: true,
                ..DENSE
            },
        ),
        (
            "apr_q8 experts",
            Kind {
                encoding: Encoding::APR_Q8,
                experts: true,
                hidden: 64,
                ..DENSE
            },
        ),
        (
            "f32",
            Kind {
                encoding: Encoding::F32,
                hidden: 72,
                head_dim: 20,
                ..DENSE
            },
        ),
        (
            "f32 in-out",
            Kind {
                encoding: Encoding::F32,
                hidden: 72,
                head_dim: 20,
                layout: FloatLayout::InOut,
                ..DENSE
            },
        ),
        (
            "f16, one head",
            Kind {
                encoding: Encoding::F16,
                heads: 1,
                kv_heads: 1,
                ..DENSE
            },
        ),
        (
            "bf16 experts",
            Kind {
                encoding: Encoding::BF16,
                experts: true,
                heads: 8,
                kv_heads: 2,
                head_dim: 64,
                ..DENSE
            },
        ),
    ]
}

const LAYERS: u32 = 2;
const EXPERTS: u32 = 5;
const CHOSEN: u32 = 2;

/// Builds weights and the program over them.
struct Builder {
    kind: Kind,
    random: Random,
    weights: Vec<Weight>,
    values: Vec<ValueSpec>,
    ops: Vec<Op>,
}

impl Builder {
    fn value(&mut self, name: &str, width: u32, kind: ValueKind) -> ValueId {
        self.values.push(ValueSpec {
            name: name.into(),
            width,
            kind,
        });
        ValueId(self.values.len() as u32 - 1)
    }

    fn f32(&mut self, name: &str, width: u32) -> ValueId {
        self.value(name, width, ValueKind::F32)
    }

    fn op(&mut self, layer: Option<u32>, kind: OpKind) {
        self.ops.push(Op { layer, kind });
    }

    fn matrix(&mut self, layer: Option<u32>, role: Role, matrices: u32, rows: u32, cols: u32) -> WeightRef {
        let shape = Shape {
            matrices: matrices.into(),
            rows: rows.into(),
            cols: cols.into(),
        };
        let mut w = Weight::matrix(layer, role, self.kind.encoding, shape, &mut self.random);
        if w.class == WeightClass::Float && role != Role::TokenEmbd {
            w.layout = self.kind.layout;
        }
        self.weights.push(w);
        WeightRef { layer, role }
    }

    fn vector(&mut self, layer: Option<u32>, role: Role, class: WeightClass, n: u32) -> WeightRef {
        let values: Vec<f32> = (0..n).map(|_| 1.0 + 0.1 * self.random.unit()).collect();
        self.weights.push(Weight::vector(layer, role, class, &values));
        WeightRef { layer, role }
    }

    /// Quantises if the model's matrices are quantised.
    fn input(&mut self, layer: Option<u32>, x: ValueId, vectors: u32) -> ValueId {
        if self.kind.encoding.is_float() {
            return x;
        }
        let width = self.values[x.0 as usize].width;
        let out = self.value("quantised", width, ValueKind::Quantized { vectors });
        self.op(layer, OpKind::Quantise { input: x, out });
        out
    }

    fn matmul(
        &mut self,
        layer: u32,
        role: Role,
        input: ValueId,
        rows: u32,
        cols: u32,
        bias: Option<Role>,
    ) -> ValueId {
        let layer = Some(layer);
        let weight = self.matrix(layer, role, 1, rows, cols);
        let bias = bias.map(|role| self.vector(layer, role, WeightClass::Bias, rows));
        let out = self.f32(role.name(), rows);
        self.op(
            layer,
            OpKind::MatMul {
                input,
                weight,
                bias,
                out,
            },
        );
        out
    }

    fn build(kind: Kind) -> (Model, DecodeProgram) {
        let mut b = Self {
            kind,
            random: Random(7),
            weights: vec![],
            values: vec![],
            ops: vec![],
        };
        let Kind {
            hidden,
            heads,
            kv_heads,
            head_dim,
            ..
        } = kind;
        let (q_width, kv_width, n_ff) = (heads * head_dim, kv_heads * head_dim, 2 * hidden);
        let embd = b.matrix(None, Role::TokenEmbd, 1, VOCAB, hidden);
        let x = b.f32("x", hidden);
        b.op(None, OpKind::Embed { weight: embd, out: x });
        let scaled = b.f32("scaled", hidden);
        b.op(
            None,
            OpKind::Scale {
                input: x,
                factor: 3.5,
                out: scaled,
            },
        );
        b.op(
            None,
            OpKind::Add {
                a: scaled,
                b: x,
                out: x,
            },
        );
        let mut tail = 0;
        for l in 0..LAYERS {
            let layer = Some(l);
            let norm = b.vector(layer, Role::AttnNorm, WeightClass::Gamma, hidden);
            let h = b.f32("h", hidden);
            if l == 0 {
                b.op(
                    layer,
                    OpKind::RmsNorm {
                        input: x,
                        weight: norm,
                        eps: 1e-5,
                        rows: 1,
                        out: h,
                    },
                );
            } else {
                let bias = b.vector(layer, Role::AttnNormBias, WeightClass::Bias, hidden);
                b.op(
                    layer,
                    OpKind::LayerNorm {
                        input: x,
                        weight: norm,
                        bias,
                        eps: 1e-5,
                        out: h,
                    },
                );
            }
            let hq = b.input(layer, h, 1);
            let q = b.matmul(l, Role::AttnQ, hq, q_width, hidden, Some(Role::AttnQBias));
            let k = b.matmul(l, Role::AttnK, hq, kv_width, hidden, None);
            let v = b.matmul(l, Role::AttnV, hq, kv_width, hidden, None);
            let norm = b.vector(layer, Role::AttnQNorm, WeightClass::Gamma, head_dim);
            let qn = b.f32("qn", q_width);
            b.op(
                layer,
                OpKind::RmsNorm {
                    input: q,
                    weight: norm,
                    eps: 1e-6,
                    rows: heads,
                    out: qn,
                },
            );
            for (value, heads) in [(qn, heads), (k, kv_heads)] {
                b.op(
                    layer,
                    OpKind::Rope {
                        value,
                        table: TableId(0),
                        style: kind.style,
                        heads,
                        n_rot: 16,
                    },
                );
            }
            b.op(layer, OpKind::StoreKv { key: k, value: v });
            tail = b.ops.len();
            let a = b.f32("attention", q_width);
            b.op(
                layer,
                OpKind::Attention {
                    query: qn,
                    heads,
                    scale: 0.3,
                    window: kind.window,
                    soft_cap: kind.soft_cap,
                    out: a,
                },
            );
            // Where heads are no whole blocks, a float matrix leads back.
            let block = kind.encoding.block_weights().max(32) as u32;
            let o = if kind.encoding.is_quantized() && !q_width.is_multiple_of(block) {
                b.kind.encoding = Encoding::F16;
                let o = b.matmul(
                    l,
                    Role::AttnOutput,
                    a,
                    hidden,
                    q_width,
                    Some(Role::AttnOutputBias),
                );
                b.kind.encoding = kind.encoding;
                o
            } else {
                let aq = b.input(layer, a, 1);
                b.matmul(
                    l,
                    Role::AttnOutput,
                    aq,
                    hidden,
                    q_width,
                    Some(Role::AttnOutputBias),
                )
            };
            b.op(layer, OpKind::Add { a: x, b: o, out: x });
            let norm = b.vector(layer, Role::FfnNorm, WeightClass::Gamma, hidden);
            let h = b.f32("h", hidden);
            b.op(
                layer,
                OpKind::RmsNorm {
                    input: x,
                    weight: norm,
                    eps: 1e-5,
                    rows: 1,
                    out: h,
                },
            );
            let hq = b.input(layer, h, 1);
            let act = if l == 0 {
                ActivationKind::Silu
            } else {
                ActivationKind::GeluTanh
            };
            let down = if kind.experts {
                b.kind.encoding = Encoding::F32;
                let logits = b.matmul(l, Role::Router, h, EXPERTS, hidden, None);
                b.kind.encoding = kind.encoding;
                let experts = b.value("experts", CHOSEN, ValueKind::Experts);
                let weights = b.f32("weights", CHOSEN);
                b.op(
                    layer,
                    OpKind::RouterTopK {
                        logits,
                        k: CHOSEN,
                        normalise: l == 0,
                        experts,
                        weights,
                    },
                );
                let weight = b.matrix(layer, Role::FfnGateExps, EXPERTS, n_ff, hidden);
                let gate = b.f32("gate", CHOSEN * n_ff);
                b.op(
                    layer,
                    OpKind::ExpertMatMul {
                        input: hq,
                        experts,
                        weight,
                        out: gate,
                    },
                );
                let g = b.f32("act", CHOSEN * n_ff);
                b.op(
                    layer,
                    OpKind::Activation {
                        input: gate,
                        kind: act,
                        out: g,
                    },
                );
                let gq = b.input(layer, g, CHOSEN);
                let weight = b.matrix(layer, Role::FfnDownExps, EXPERTS, hidden, n_ff);
                let each = b.f32("each", CHOSEN * hidden);
                b.op(
                    layer,
                    OpKind::ExpertMatMul {
                        input: gq,
                        experts,
                        weight,
                        out: each,
                    },
                );
                let out = b.f32("sum", hidden);
                b.op(
                    layer,
                    OpKind::WeightedSum {
                        input: each,
                        experts,
                        weights,
                        out,
                    },
                );
                out
            } else {
                let gate = b.matmul(l, Role::FfnGate, hq, n_ff, hidden, None);
                let up = b.matmul(l, Role::FfnUp, hq, n_ff, hidden, None);
                let g = b.f32("act", n_ff);
                b.op(
                    layer,
                    OpKind::Activation {
                        input: gate,
                        kind: act,
                        out: g,
                    },
                );
                let m = b.f32("mul", n_ff);
                b.op(layer, OpKind::Mul { a: g, b: up, out: m });
                let mq = b.input(layer, m, 1);
                b.matmul(l, Role::FfnDown, mq, hidden, n_ff, None)
            };
            b.op(
                layer,
                OpKind::Add {
                    a: down,
                    b: x,
                    out: x,
                },
            );
        }
        let norm = b.vector(None, Role::OutputNorm, WeightClass::Gamma, hidden);
        let h = b.f32("h", hidden);
        b.op(
            None,
            OpKind::RmsNorm {
                input: x,
                weight: norm,
                eps: 1e-5,
                rows: 1,
                out: h,
            },
        );
        let hq = b.input(None, h, 1);
        let raw = b.f32("raw", VOCAB);
        // Tied: the embedding is multiplied with too, so that it may be packed. A transposed one could not be embedded from.
        b.op(
            None,
            OpKind::Logits {
                input: hq,
                weight: embd,
                bias: None,
                out: raw,
            },
        );
        let logits = b.f32("logits", VOCAB);
        b.op(
            None,
            OpKind::SoftCap {
                input: raw,
                cap: 30.0,
                out: logits,
            },
        );
        let table = (0..CONTEXT)
            .flat_map(|p| (0..8).map(move |j| f64::from(p) * 100f64.powf(-f64::from(j) / 8.0)))
            .flat_map(|angle| [angle.cos() as f32, angle.sin() as f32])
            .collect();
        let program = DecodeProgram {
            vocab: VOCAB,
            max_context: CONTEXT,
            kv: vec![KvSpec { kv_heads, head_dim }; LAYERS as usize],
            values: b.values,
            ops: b.ops,
            tail,
            tables: vec![Table {
                name: "rope".into(),
                rows: CONTEXT,
                cols: 16,
                data: table,
            }],
            logits,
        };
        (Model::new(b.weights, 0), program)
    }
}

const SEQUENCES: u32 = 8;
const BATCH: u32 = 600;

fn ready(model: &Model, program: &DecodeProgram, options: &OpenOptions) -> CpuBackend {
    let mut backend = load(model, options);
    let capacity = Capacity {
        max_context: CONTEXT,
        max_sequences: SEQUENCES,
        max_batch_tokens: BATCH,
        kv: KvDtype::F16,
    };
    let dims = WorkspaceDims::new(program, capacity).unwrap();
    let expected = backend.workspace_bytes(&dims).unwrap();
    assert_eq!(backend.init_workspace(&dims).unwrap(), expected);
    let memory = backend.memory().unwrap().devices.remove(0).resident;
    assert_eq!((memory.kv, memory.workspace), (expected.kv, expected.workspace));
    backend.prepare(program).unwrap();
    backend
}

fn tokens(n: usize, seed: u64) -> Vec<u32> {
    let mut random = Random(seed);
    (0..n).map(|_| random.below(VOCAB as usize) as u32).collect()
}

/// Logits of every position, fed in chunks.
fn logits(backend: &mut CpuBackend, sequence: u32, tokens: &[u32], chunk: usize) -> Vec<u32> {
    let mut all = Vec::new();
    for tokens in tokens.chunks(chunk) {
        let want = vec![Want::Logits; tokens.len()];
        let mut out = vec![0.0; tokens.len() * VOCAB as usize];
        let run = Run {
            sequence: SequenceId(sequence),
            tokens,
            want: &want,
        };
        backend
            .forward(
                &TokenBatch { runs: &[run] },
                &mut Outputs {
                    argmax: &mut [],
                    logits: &mut out,
                },
            )
            .unwrap();
        all.extend(out.iter().map(|x| x.to_bits()));
    }
    all
}

fn assert_same(a: &[u32], b: &[u32], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    if let Some(at) = a.iter().zip(b).position(|(a, b)| a != b) {
        panic!(
            "{what}: position {} logit {}: {} and {}",
            at / VOCAB as usize,
            at % VOCAB as usize,
            f32::from_bits(a[at]),
            f32::from_bits(b[at])
        );
    }
}

#[test]
fn bits_do_not_depend_on_instructions_threads_or_chunks() {
    #[cfg(target_arch = "x86_64")]
    if !std::arch::is_x86_feature_detected!("avx512f") {
        use std::io::Write as _;
        // Past the test runner's capture: a skip is to be seen.
        writeln!(std::io::stderr(), "skipped: AVX-512, which this machine lacks").unwrap();
    }
    for (name, kind) in kinds() {
        let (model, program) = Builder::build(kind);
        let n = if name == "q4_k" || name.starts_with("q8_0") {
            600
        } else {
            90
        };
        let tokens = tokens(n, 5);
        let scalar = OpenOptions {
            force_scalar: true,
            threads: Some(1),
            ..Default::default()
        };
        let mut backend = ready(&model, &program, &scalar);
        let expected = logits(&mut backend, 0, &tokens, 32);
        let distinct: std::collections::HashSet<_> = expected.iter().collect();
        assert!(
            distinct.len() > expected.len() / 4,
            "{name}: {} different logits",
            distinct.len()
        );
        for threads in [1, 2, 7] {
            let mut backend = ready(
                &model,
                &program,
                &OpenOptions {
                    threads: Some(threads),
                    ..Default::default()
                },
            );
            for chunk in [1, 5, 512] {
                backend.truncate(SequenceId(0), 0).unwrap();
                // A step of one token at a time over all positions is only needed once.
                let n = if chunk == 1 && threads != 2 { 40 } else { n };
                let found = logits(&mut backend, 0, &tokens[..n], chunk);
                assert_same(
                    &expected[..n * VOCAB as usize],
                    &found,
                    &format!("{name}, {threads} threads, chunks of {chunk}"),
                );
            }
            for p in &model.plan.weights {
                let mut out = vec![0; p.nbytes as usize];
                backend.read_back(p.id, 0, &mut out).unwrap();
                assert!(
                    out == model.weights[p.id.index()].bytes,
                    "{name}: {} after packing",
                    p.name
                );
                let digest = backend.digest(p.id).unwrap().unwrap();
                assert_eq!(digest, *blake3::hash(&out).as_bytes());
            }
        }
        let imported = OpenOptions {
            import: true,
            ..Default::default()
        };
        let mut backend = ready(&model, &program, &imported);
        let found = logits(&mut backend, 0, &tokens, 512);
        assert_same(&expected, &found, &format!("{name}, imported"));
    }
}

#[test]
fn bits_do_not_depend_on_company_or_on_what_is_wanted() {
    for (name, kind) in kinds() {
        let (model, program) = Builder::build(kind);
        let mut backend = ready(&model, &program, &OpenOptions::default());
        let sequences: Vec<Vec<u32>> = (0..8).map(|s| tokens(20 + 7 * s, s as u64)).collect();
        let alone: Vec<Vec<u32>> = sequences
            .iter()
            .map(|tokens| {
                backend.truncate(SequenceId(3), 0).unwrap();
                logits(&mut backend, 3, tokens, 64)
            })
            .collect();
        backend.truncate(SequenceId(3), 0).unwrap();
        // All together, in pieces of different sizes; the last token of each piece wants logits, some of the others an
        // arg-max.
        let mut at = [0usize; 8];
        let mut round = 0usize;
        while at.iter().zip(&sequences).any(|(at, s)| at < &s.len()) {
            let mut wants: Vec<Vec<Want>> = Vec::new();
            let mut pieces = Vec::new();
            for s in 0..8 {
                let n = (1 + (s + round) % 5).min(sequences[s].len() - at[s]);
                if n == 0 {
                    continue;
                }
                let mut want = vec![Want::Nothing; n];
                want[0] = Want::ArgMax;
                want[n - 1] = Want::Logits;
                wants.push(want);
                pieces.push((s, at[s]..at[s] + n));
                at[s] += n;
            }
            let runs: Vec<Run<'_>> = pieces
                .iter()
                .zip(&wants)
                .map(|((s, range), want)| Run {
                    sequence: SequenceId(*s as u32),
                    tokens: &sequences[*s][range.clone()],
                    want,
                })
                .collect();
            let batch = TokenBatch { runs: &runs };
            let mut argmax = vec![0; batch.wanting(Want::ArgMax)];
            let mut out = vec![0.0f32; pieces.len() * VOCAB as usize];
            backend
                .forward(
                    &batch,
                    &mut Outputs {
                        argmax: &mut argmax,
                        logits: &mut out,
                    },
                )
                .unwrap();
            let mut argmax = argmax.into_iter();
            for ((s, range), found) in pieces.iter().zip(out.chunks(VOCAB as usize)) {
                let row = |position: usize| &alone[*s][position * VOCAB as usize..][..VOCAB as usize];
                let found: Vec<u32> = found.iter().map(|x| x.to_bits()).collect();
                assert_same(
                    row(range.end - 1),
                    &found,
                    &format!("{name}, sequence {s} at {}", range.end - 1),
                );
                if range.len() > 1 {
                    let logits: Vec<f32> = row(range.start).iter().map(|b| f32::from_bits(*b)).collect();
                    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let first = logits.iter().position(|x| *x == max).unwrap();
                    assert_eq!(argmax.next(), Some(first as u32));
                }
            }
            round += 1;
        }
    }
}

#[test]
fn a_step_allocates_nothing_and_peak_memory_is_what_was_said() {
    let (model, program) = Builder::build(Kind {
        experts: true,
        ..DENSE
    });
    let mut backend = ready(
        &model,
        &program,
        &OpenOptions {
            threads: Some(2),
            ..Default::default()
        },
    );
    let prompt = tokens(200, 1);
    let want = vec![Want::Nothing; 200];
    let mut out = vec![0.0; VOCAB as usize];
    let mut argmax = [0];
    let mut step = |backend: &mut CpuBackend, tokens: &[u32], want: &[Want]| {
        let run = Run {
            sequence: SequenceId(1),
            tokens,
            want,
        };
        let argmax = if want.contains(&Want::ArgMax) {
            &mut argmax[..]
        } else {
            &mut []
        };
        let logits = if want.contains(&Want::Logits) {
            &mut out[..]
        } else {
            &mut []
        };
        backend
            .forward(&TokenBatch { runs: &[run] }, &mut Outputs { argmax, logits })
            .unwrap();
    };
    // Other tests allocate meanwhile: a step that allocates does so every time, so one quiet attempt is proof.
    let quiet = (0..2000).any(|_| {
        backend.truncate(SequenceId(1), 0).unwrap();
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        step(&mut backend, &prompt, &want);
        step(&mut backend, &prompt[..1], &[Want::Logits]);
        step(&mut backend, &prompt[..1], &[Want::ArgMax]);
        ALLOCATIONS.load(Ordering::Relaxed) == before
    });
    assert!(quiet, "every attempt saw an allocation");
}

#[test]
fn a_refused_batch_changes_nothing() {
    let (model, program) = Builder::build(DENSE);
    let mut backend = ready(&model, &program, &OpenOptions::default());
    let prompt = tokens(690, 9);
    let expected = logits(&mut backend, 2, &prompt, 345);
    backend.truncate(SequenceId(2), 600).unwrap();
    static WANTED: [Want; 101] = [Want::Logits; 101];
    let want = |n: usize| &WANTED[..n];
    let many = vec![0; BATCH as usize + 1];
    let nothing = vec![Want::Nothing; many.len()];
    let run = |sequence, tokens, want| Run {
        sequence: SequenceId(sequence),
        tokens,
        want,
    };
    let mut out = vec![0.0; 200 * VOCAB as usize];
    let mut refuse = |runs: &[Run<'_>], logits: usize, argmax: usize| {
        let mut ids = vec![0; argmax];
        backend
            .forward(
                &TokenBatch { runs },
                &mut Outputs {
                    argmax: &mut ids,
                    logits: &mut out[..logits],
                },
            )
            .unwrap_err()
    };
    let v = VOCAB as usize;
    assert!(matches!(refuse(&[], 0, 0), Error::InvalidArgument { .. }));
    assert!(matches!(
        refuse(&[run(2, &[], &[])], 0, 0),
        Error::InvalidArgument { .. }
    ));
    assert!(matches!(
        refuse(&[run(8, &[1], want(1))], v, 0),
        Error::InvalidArgument { .. }
    ));
    assert!(matches!(
        refuse(&[run(2, &[1], want(1)), run(2, &[1], want(1))], 2 * v, 0),
        Error::InvalidArgument { .. }
    ));
    assert!(matches!(
        refuse(&[run(2, &[1, 2], want(1))], v, 0),
        Error::InvalidArgument { .. }
    ));
    assert!(matches!(
        refuse(&[run(2, &[1], want(1))], v - 1, 0),
        Error::InvalidArgument { .. }
    ));
    assert!(matches!(
        refuse(&[run(2, &[1], want(1))], v, 1),
        Error::InvalidArgument { .. }
    ));
    assert!(matches!(
        refuse(&[run(2, &[3, VOCAB], want(2))], 2 * v, 0),
        Error::TokenOutOfRange { token: VOCAB, .. }
    ));
    match refuse(&[run(2, &prompt[..101], want(101))], 101 * v, 0) {
        Error::ContextExceeded {
            length,
            adding,
            capacity,
            ..
        } => {
            assert_eq!((length, adding, capacity), (600, 101, CONTEXT));
        }
        other => panic!("{other}"),
    }
    assert!(matches!(
        refuse(&[run(3, &many, &nothing)], 0, 0),
        Error::InvalidArgument { .. }
    ));
    assert_eq!(backend.sequence_length(SequenceId(2)).unwrap(), 600);
    assert!(backend.truncate(SequenceId(2), 601).is_err());
    assert!(backend.truncate(SequenceId(8), 0).is_err());
    let found = logits(&mut backend, 2, &prompt[600..], 90);
    assert_same(&expected[600 * v..], &found, "after refusals");
}

#[test]
fn a_non_finite_activation_names_its_operation_and_changes_nothing() {
    let (mut model, program) = Builder::build(Kind {
        encoding: Encoding::F32,
        hidden: 64,
        ..DENSE
    });
    // Keys of one layer that no f16 can hold.
    let (i, _) = model
        .weights
        .iter()
        .enumerate()
        .find(|(_, w)| w.layer == Some(1) && w.role == Role::AttnK)
        .unwrap();
    let mut weights = std::mem::take(&mut model.weights);
    for w in weights[i].bytes.chunks_exact_mut(4) {
        w.copy_from_slice(&1e30f32.to_le_bytes());
    }
    let model = Model::new(weights, 0);
    let mut backend = ready(&model, &program, &OpenOptions::default());
    let run = Run {
        sequence: SequenceId(0),
        tokens: &[1, 2],
        want: &[Want::Nothing, Want::ArgMax],
    };
    let error = backend
        .forward(
            &TokenBatch { runs: &[run] },
            &mut Outputs {
                argmax: &mut [0],
                logits: &mut [],
            },
        )
        .unwrap_err();
    match error {
        Error::NonFinite { op, layer } => assert_eq!((op, layer), (OpName::StoreKv, Some(1))),
        other => panic!("{other}"),
    }
    assert_eq!(backend.sequence_length(SequenceId(0)).unwrap(), 0);
}

#[test]
fn a_program_that_does_not_fit_is_refused() {
    let (model, program) = Builder::build(DENSE);
    let mut backend = ready(&model, &program, &OpenOptions::default());
    type Break = fn(&mut DecodeProgram);
    let breaks: [(&str, Break); 9] = [
        ("another vocabulary", |p| p.vocab += 1),
        ("another context", |p| p.max_context -= 1),
        ("a value more", |p| p.values.push(p.values[0].clone())),
        ("logits that are no logits", |p| p.logits = ValueId(0)),
        ("a tail past the end", |p| p.tail = p.ops.len() + 1),
        ("a store in the tail", |p| p.tail = 0),
        ("an input that nothing writes", |p| {
            p.ops.remove(1);
        }),
        ("an operation twice removed", |p| {
            p.ops.remove(0);
        }),
        ("a layer that the cache lacks", |p| {
            for op in &mut p.ops {
                op.layer = op.layer.map(|l| l + 1);
            }
        }),
    ];
    for (what, change) in breaks {
        let mut bad = program.clone();
        change(&mut bad);
        assert!(
            matches!(backend.prepare(&bad), Err(Error::InvalidArgument { .. })),
            "{what}"
        );
    }
    backend.prepare(&program).unwrap();
}

#[test]
fn a_workspace_beyond_the_budget_is_refused_and_a_smaller_one_taken() {
    let (model, program) = Builder::build(DENSE);
    let budget = model.plan.resident.weights() * 2 + (8 << 20);
    let mut backend = load(
        &model,
        &OpenOptions {
            memory_budget: Some(budget),
            threads: Some(1),
            ..Default::default()
        },
    );
    let capacity = |max_sequences| Capacity {
        max_context: CONTEXT,
        max_sequences,
        max_batch_tokens: 8,
        kv: KvDtype::F32,
    };
    let dims = |n| WorkspaceDims::new(&program, capacity(n)).unwrap();
    match backend.init_workspace(&dims(1 << 20)).unwrap_err() {
        Error::OutOfMemory {
            needed, available, ..
        } => assert!(needed > available && available < budget),
        other => panic!("{other}"),
    }
    assert!(matches!(
        backend.init_workspace(&dims(u32::MAX)),
        Err(Error::OutOfMemory { .. } | Error::InvalidArgument { .. })
    ));
    backend.init_workspace(&dims(1)).unwrap();
    backend.prepare(&program).unwrap();
    logits(&mut backend, 0, &tokens(20, 1), 8);
}
