//! The CPU backend against the oracle of the numerics contract, bit for bit, on random programs.
//!
//! `HOIST_SEED` repeats a run, `HOIST_CASES` makes it longer.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::HashMap;

use hoist_backend::*;
use hoist_conformance::operands::{self, Magnitudes, Random, Scales};
use hoist_conformance::oracle::{self, Interpreter, Weights};
use hoist_cpu::CpuProvider;

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |v| v.parse().unwrap())
}

/// Calls `case` with seeds, and says which one failed.
fn for_seeds(count: u64, case: impl Fn(&mut Random)) {
    let first = from_environment("HOIST_SEED", 1);
    for seed in first..first + from_environment("HOIST_CASES", count) {
        println!("HOIST_SEED={seed} HOIST_CASES=1");
        case(&mut Random::new(seed));
    }
}

struct Weight {
    class: WeightClass,
    encoding: Encoding,
    shape: Shape,
    bytes: Vec<u8>,
}

type Place = (Option<u32>, Role);

/// A program under construction, with its weights.
struct Model {
    program: DecodeProgram,
    weights: Vec<(Place, Weight)>,
    by_place: HashMap<Place, usize>,
    layer: Option<u32>,
}

impl Weights for Model {
    fn weight(&self, at: WeightRef) -> Option<oracle::Weight<'_>> {
        let weight = &self.weights[*self.by_place.get(&(at.layer, at.role))?].1;
        Some(oracle::Weight {
            encoding: weight.encoding,
            shape: weight.shape,
            bytes: weight.bytes.as_slice().into(),
        })
    }
}

impl Model {
    fn new(vocab: u32, max_context: u32) -> Self {
        Self {
            program: DecodeProgram {
                vocab,
                max_context,
                kv: vec![],
                values: vec![],
                ops: vec![],
                tail: 0,
                tables: vec![],
                logits: ValueId(0),
            },
            weights: vec![],
            by_place: HashMap::new(),
            layer: None,
        }
    }

    fn value(&mut self, width: u32, kind: ValueKind) -> ValueId {
        let id = ValueId(self.program.values.len() as u32);
        self.program.values.push(ValueSpec {
            name: format!("v{}", id.0),
            width,
            kind,
        });
        id
    }

    fn f32(&mut self, width: u32) -> ValueId {
        self.value(width, ValueKind::F32)
    }

    fn width(&self, id: ValueId) -> u32 {
        self.program.values[id.0 as usize].width
    }

    fn op(&mut self, kind: OpKind) {
        let layer = self.layer;
        self.program.ops.push(Op { layer, kind });
    }

    fn put(&mut self, role: Role, weight: Weight) -> WeightRef {
        let place = (self.layer, role);
        self.by_place.insert(place, self.weights.len());
        self.weights.push((place, weight));
        WeightRef {
            layer: self.layer,
            role,
        }
    }

    fn matrix(
        &mut self,
        random: &mut Random,
        role: Role,
        encoding: Encoding,
        shape: Shape,
        scales: Scales,
    ) -> WeightRef {
        let bytes = operands::weight(random, encoding, shape, scales).unwrap();
        let class = WeightClass::of_matrix(encoding);
        self.put(
            role,
            Weight {
                class,
                encoding,
                shape,
                bytes,
            },
        )
    }

    fn vector(&mut self, role: Role, class: WeightClass, values: &[f32]) -> WeightRef {
        let shape = match class {
            WeightClass::Float => Shape::matrix(
                self.program.vocab.into(),
                values.len() as u64 / u64::from(self.program.vocab),
            ),
            _ => Shape::vector(values.len() as u64),
        };
        let weight = Weight {
            class,
            encoding: Encoding::F32,
            shape,
            bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        self.put(role, weight)
    }

    fn bells(&mut self, random: &mut Random, role: Role, class: WeightClass, n: u32) -> WeightRef {
        let values: Vec<f32> = (0..n).map(|_| random.bell()).collect();
        self.vector(role, class, &values)
    }

    /// A table of f32 rows, one for each token: how operands come into a program.
    fn input(&mut self, random: &mut Random, role: Role, width: u32, magnitudes: Magnitudes) -> ValueId {
        let rows: Vec<f32> = (0..self.program.vocab)
            .flat_map(|_| operands::vector(random, width as usize, magnitudes))
            .collect();
        let weight = self.vector(role, WeightClass::Float, &rows);
        let out = self.f32(width);
        self.op(OpKind::Embed { weight, out });
        out
    }

    /// `input` as the encoding wants it.
    fn operand(&mut self, input: ValueId, encoding: Encoding, vectors: u32) -> ValueId {
        if !encoding.is_quantized() {
            return input;
        }
        let out = self.value(self.width(input), ValueKind::Quantized { vectors });
        self.op(OpKind::Quantise { input, out });
        out
    }

    fn linear(
        &mut self,
        random: &mut Random,
        input: ValueId,
        role: Role,
        bias: Option<Role>,
        rows: u32,
    ) -> ValueId {
        let cols = self.width(input);
        let encoding = some_encoding(random, cols);
        let weight = self.matrix(
            random,
            role,
            encoding,
            Shape::matrix(rows.into(), cols.into()),
            Scales::Ordinary,
        );
        let bias = bias
            .filter(|_| random.below(2) == 0)
            .map(|role| self.bells(random, role, WeightClass::Bias, rows));
        let input = self.operand(input, encoding, 1);
        let out = self.f32(rows);
        self.op(OpKind::MatMul {
            input,
            weight,
            bias,
            out,
        });
        out
    }

    fn experts(
        &mut self,
        random: &mut Random,
        input: ValueId,
        experts: ValueId,
        role: Role,
        (n, rows): (u32, u32),
        shared: bool,
    ) -> ValueId {
        let k = self.width(experts);
        let cols = self.width(input) / if shared { 1 } else { k };
        let encoding = some_encoding(random, cols);
        let shape = Shape {
            matrices: n.into(),
            rows: rows.into(),
            cols: cols.into(),
        };
        let weight = self.matrix(random, role, encoding, shape, Scales::Ordinary);
        let input = self.operand(input, encoding, if shared { 1 } else { k });
        let out = self.f32(rows * k);
        self.op(OpKind::ExpertMatMul {
            input,
            experts,
            weight,
            out,
        });
        out
    }

    fn norm(
        &mut self,
        random: &mut Random,
        input: ValueId,
        role: Role,
        bias: Option<Role>,
        rows: u32,
    ) -> ValueId {
        let width = self.width(input);
        let weight = self.bells(random, role, WeightClass::Gamma, width / rows);
        let out = self.f32(width);
        let eps = random.choose([1e-5, 1e-6]);
        match bias.filter(|_| rows == 1 && random.below(2) == 0) {
            Some(bias) => {
                let bias = self.bells(random, bias, WeightClass::Bias, width);
                self.op(OpKind::LayerNorm {
                    input,
                    weight,
                    bias,
                    eps,
                    out,
                });
            }
            None => self.op(OpKind::RmsNorm {
                input,
                weight,
                eps,
                rows,
                out,
            }),
        }
        out
    }

    fn add(&mut self, a: ValueId, b: ValueId) -> ValueId {
        let out = self.f32(self.width(a));
        self.op(OpKind::Add { a, b, out });
        out
    }

    fn finish(mut self, logits: ValueId) -> Self {
        self.program.logits = logits;
        let stores = |op: &Op| matches!(op.kind, OpKind::StoreKv { .. });
        self.program.tail = self.program.ops.iter().rposition(stores).map_or(0, |i| i + 1);
        self
    }

    fn plan(&self, sizing: &Sizing) -> LoadPlan {
        let mut resident = MemoryByClass::default();
        let mut offset = 0;
        let weights: Vec<_> = self
            .weights
            .iter()
            .enumerate()
            .map(|(i, ((layer, role), w))| {
                let rows = w.shape.matrices * w.shape.rows;
                let beside = match w.class {
                    WeightClass::Quantized => {
                        sizing.quantized_row_bytes
                            + w.shape.cols.div_ceil(256) * sizing.quantized_segment_bytes
                    }
                    _ => 0,
                };
                let nbytes = w.bytes.len() as u64;
                let resident_bytes = (nbytes + rows * beside).next_multiple_of(sizing.weight_alignment);
                *resident.class_mut(w.class) += resident_bytes;
                let view = SourceView::contiguous(0, offset, nbytes);
                offset += nbytes;
                WeightPlan {
                    id: WeightId(i as u32),
                    name: format!("{layer:?} {role}"),
                    layer: *layer,
                    role: *role,
                    class: w.class,
                    encoding: w.encoding,
                    shape: w.shape,
                    nbytes,
                    views: vec![view],
                    change: ValueChange::Keep,
                    layout: FloatLayout::OutIn,
                    resident_bytes,
                }
            })
            .collect();
        LoadPlan {
            architecture: "random".into(),
            layers: self.layers(),
            weights,
            resident,
            nbytes: offset,
            source_bytes: offset,
        }
    }

    fn layers(&self) -> u32 {
        self.program.kv.len() as u32
    }

    /// A CPU backend that is ready to decode.
    fn on_cpu(&self, options: &OpenOptions, capacity: Capacity) -> Box<dyn WeightBackend> {
        let mut backend = CpuProvider.open(0, options).unwrap();
        let plan = self.plan(&backend.info().sizing);
        backend.begin_load(&plan).unwrap();
        for (i, (_, w)) in self.weights.iter().enumerate() {
            let chunk = Chunk {
                weight: WeightId(i as u32),
                offset: 0,
                bytes: &w.bytes,
            };
            match w.class {
                WeightClass::Quantized => backend.upload_quantized(chunk),
                WeightClass::Float | WeightClass::Bias => backend.upload_f32(chunk),
                WeightClass::Gamma => backend.upload_gamma(chunk),
            }
            .unwrap();
        }
        backend.finish_load().unwrap();
        let entries = self
            .weights
            .iter()
            .enumerate()
            .map(|(i, ((layer, role), _))| IndexEntry {
                layer: *layer,
                role: *role,
                slot: Slot::Present(WeightId(i as u32)),
            })
            .collect();
        let layout = IndexLayout {
            layers: self.layers(),
            entries,
        };
        backend.build_index(&layout).unwrap();
        backend
            .init_workspace(&WorkspaceDims::new(&self.program, capacity).unwrap())
            .unwrap();
        backend.as_decode().unwrap().prepare(&self.program).unwrap();
        backend
    }

    /// Feeds batches of runs to the CPU and to the oracle, and compares every token's logits.
    fn compare(&self, batches: &[Vec<(u32, Vec<u32>)>], options: &OpenOptions) {
        let most = batches
            .iter()
            .map(|b| b.iter().map(|r| r.1.len()).sum::<usize>())
            .max()
            .unwrap_or(1);
        let capacity = Capacity {
            max_context: self.program.max_context,
            max_sequences: 4,
            max_batch_tokens: most as u32,
            kv: KvDtype::F16,
        };
        let mut backend = self.on_cpu(options, capacity);
        let cpu = backend.as_decode().unwrap();
        let mut interpreter = Interpreter::new(&self.program, self, KvDtype::F16);
        for batch in batches {
            let wants: Vec<Vec<Want>> = batch
                .iter()
                .map(|(_, tokens)| vec![Want::Logits; tokens.len()])
                .collect();
            let runs: Vec<Run<'_>> = batch
                .iter()
                .zip(&wants)
                .map(|((sequence, tokens), want)| Run {
                    sequence: SequenceId(*sequence),
                    tokens,
                    want,
                })
                .collect();
            let tokens: usize = batch.iter().map(|r| r.1.len()).sum();
            let mut logits = vec![f32::NAN; tokens * self.program.vocab as usize];
            let found = cpu.forward(
                &TokenBatch { runs: &runs },
                &mut Outputs {
                    argmax: &mut [],
                    logits: &mut logits,
                },
            );
            let before: Vec<u32> = batch
                .iter()
                .map(|(s, _)| interpreter.length(SequenceId(*s)))
                .collect();
            let expected: Result<Vec<Vec<f32>>> = batch
                .iter()
                .flat_map(|(s, tokens)| tokens.iter().map(move |t| (*s, *t)))
                .map(|(s, token)| interpreter.step(SequenceId(s), token, true).map(|y| y.unwrap()))
                .collect();
            match (expected, found) {
                (Ok(expected), Ok(())) => {
                    for (token, (e, f)) in expected
                        .iter()
                        .zip(logits.chunks(self.program.vocab as usize))
                        .enumerate()
                    {
                        for (i, (e, f)) in e.iter().zip(f).enumerate() {
                            assert_eq!(
                                e.to_bits(),
                                f.to_bits(),
                                "token {token}, logit {i}: oracle {e:e}, cpu {f:e}"
                            );
                        }
                    }
                }
                (Err(Error::NonFinite { .. }), Err(Error::NonFinite { .. })) => {
                    println!("not finite, for both");
                    for ((s, _), length) in batch.iter().zip(before) {
                        interpreter.truncate(SequenceId(*s), length).unwrap();
                        assert_eq!(cpu.sequence_length(SequenceId(*s)).unwrap(), length);
                    }
                }
                (expected, found) => panic!("oracle {:?}, cpu {found:?}", expected.map(|y| y.len())),
            }
        }
    }
}

/// An encoding that rows of `cols` can have.
fn some_encoding(random: &mut Random, cols: u32) -> Encoding {
    let fitting: Vec<_> = EncodingSet::weights()
        .iter()
        .filter(|e| {
            e.is_float() || (cols.is_multiple_of(32) && u64::from(cols).is_multiple_of(e.block_weights()))
        })
        .collect();
    fitting[random.below(fitting.len() as u64) as usize]
}

fn options(random: &mut Random) -> OpenOptions {
    OpenOptions {
        threads: Some(random.choose([1, 2, 3])),
        force_scalar: random.below(3) == 0,
        ..OpenOptions::default()
    }
}

/// All tokens of the vocabulary, in one batch.
fn every_token(model: &Model) -> Vec<Vec<(u32, Vec<u32>)>> {
    vec![vec![(0, (0..model.program.vocab).collect())]]
}

#[test]
fn products_of_every_encoding_are_the_oracles() {
    for_seeds(2, |random| {
        for encoding in EncodingSet::weights().iter() {
            for scales in [Scales::Ordinary, Scales::Spread, Scales::Subnormal] {
                for magnitudes in Magnitudes::ALL {
                    let block = encoding
                        .block_weights()
                        .max(if encoding.is_quantized() { 32 } else { 1 });
                    let cols = (block * (1 + random.below(800 / block + 1))) as u32;
                    let rows = 1 + random.below(23) as u32;
                    println!("{encoding} [{rows}, {cols}] {scales:?} {magnitudes:?}");
                    let mut model = Model::new(rows, 64);
                    let x = model.input(random, Role::TokenEmbd, cols, magnitudes);
                    let shape = Shape::matrix(rows.into(), cols.into());
                    let weight = model.matrix(random, Role::Output, encoding, shape, scales);
                    let bias = (random.below(3) == 0)
                        .then(|| model.bells(random, Role::OutputBias, WeightClass::Bias, rows));
                    let input = model.operand(x, encoding, 1);
                    let out = model.f32(rows);
                    model.op(OpKind::Logits {
                        input,
                        weight,
                        bias,
                        out,
                    });
                    let model = model.finish(out);
                    let tokens = (0..rows).map(|t| vec![(0, vec![t])]);
                    // One batch first: if a token overflows it is refused as a whole; then token by token.
                    let batches: Vec<_> = every_token(&model).into_iter().chain(tokens).collect();
                    model.compare(&batches, &options(random));
                }
            }
        }
    });
}

#[test]
fn embedding_rows_of_every_encoding_are_the_oracles() {
    for_seeds(1, |random| {
        for encoding in EncodingSet::weights().iter() {
            for scales in [Scales::Ordinary, Scales::Spread, Scales::Subnormal] {
                println!("{encoding} {scales:?}");
                let width = encoding.block_weights().max(64) as u32;
                let mut model = Model::new(width, 512);
                let shape = Shape::matrix(width.into(), width.into());
                let weight = model.matrix(random, Role::TokenEmbd, encoding, shape, scales);
                let out = model.f32(width);
                model.op(OpKind::Embed { weight, out });
                let model = model.finish(out);
                model.compare(&every_token(&model), &options(random));
            }
        }
    });
}

/// A transformer of random shape with every operation that one can have.
fn transformer(random: &mut Random, context: u32) -> Model {
    let vocab = 20 + random.below(30) as u32;
    let hidden = random.choose([64, 96, 160, 256]);
    let mut model = Model::new(vocab, context);
    let encoding = some_encoding(random, hidden);
    let shape = Shape::matrix(vocab.into(), hidden.into());
    let weight = model.matrix(random, Role::TokenEmbd, encoding, shape, Scales::Ordinary);
    let mut x = model.f32(hidden);
    model.op(OpKind::Embed { weight, out: x });
    if random.below(2) == 0 {
        let out = model.f32(hidden);
        model.op(OpKind::Scale {
            input: x,
            factor: 5.3,
            out,
        });
        x = out;
    }
    if random.below(2) == 0 {
        let shape = Shape::matrix(context.into(), hidden.into());
        let encoding = random.choose([Encoding::F32, Encoding::F16]);
        let weight = model.matrix(random, Role::PositionEmbd, encoding, shape, Scales::Ordinary);
        let out = model.f32(hidden);
        model.op(OpKind::EmbedPosition { weight, out });
        x = model.add(x, out);
    }
    let head_dim = random.choose([8, 16, 20, 32, 64]);
    let kv_heads = 1 + random.below(3) as u32;
    let heads = kv_heads * (1 + random.below(3) as u32);
    let n_rot = random.choose([head_dim, head_dim, head_dim / 2]);
    let data: Vec<f32> = (0..context)
        .flat_map(|p| (0..n_rot / 2).map(move |j| p as f32 * 0.9 / (1.0 + j as f32)))
        .flat_map(|angle| [angle.cos(), angle.sin()])
        .collect();
    model.program.tables.push(Table {
        name: "rope".into(),
        rows: context,
        cols: n_rot,
        data: data.into(),
    });
    let style = random.choose([RopeStyle::Interleaved, RopeStyle::HalfSplit]);
    let soft_cap = random.choose([None, Some(1.5)]);
    for layer in 0..1 + random.below(2) as u32 {
        model.program.kv.push(KvSpec { kv_heads, head_dim });
        model.layer = Some(layer);
        let h = model.norm(random, x, Role::AttnNorm, Some(Role::AttnNormBias), 1);
        let mut q = model.linear(random, h, Role::AttnQ, Some(Role::AttnQBias), heads * head_dim);
        let mut k = model.linear(random, h, Role::AttnK, Some(Role::AttnKBias), kv_heads * head_dim);
        let v = model.linear(random, h, Role::AttnV, Some(Role::AttnVBias), kv_heads * head_dim);
        if random.below(2) == 0 {
            q = model.norm(random, q, Role::AttnQNorm, None, heads);
            k = model.norm(random, k, Role::AttnKNorm, None, kv_heads);
        }
        for (value, heads) in [(q, heads), (k, kv_heads)] {
            model.op(OpKind::Rope {
                value,
                table: TableId(0),
                style,
                heads,
                n_rot,
            });
        }
        model.op(OpKind::StoreKv { key: k, value: v });
        let a = model.f32(heads * head_dim);
        model.op(OpKind::Attention {
            query: q,
            heads,
            scale: 0.31,
            window: random.choose([None, Some(3), Some(260)]),
            soft_cap,
            out: a,
        });
        let o = model.linear(random, a, Role::AttnOutput, Some(Role::AttnOutputBias), hidden);
        x = model.add(x, o);
        let h = model.norm(random, x, Role::FfnNorm, Some(Role::FfnNormBias), 1);
        let f = if random.below(2) == 0 {
            feed_forward(&mut model, random, h, hidden)
        } else {
            mixture(&mut model, random, h, hidden)
        };
        let f = model.norm(random, f, Role::PostFfnNorm, None, 1);
        x = model.add(x, f);
    }
    model.layer = None;
    let h = model.norm(random, x, Role::OutputNorm, Some(Role::OutputNormBias), 1);
    let encoding = some_encoding(random, hidden);
    let shape = Shape::matrix(vocab.into(), hidden.into());
    let weight = model.matrix(random, Role::Output, encoding, shape, Scales::Ordinary);
    let input = model.operand(h, encoding, 1);
    let mut logits = model.f32(vocab);
    model.op(OpKind::Logits {
        input,
        weight,
        bias: None,
        out: logits,
    });
    if random.below(2) == 0 {
        let out = model.f32(vocab);
        model.op(OpKind::SoftCap {
            input: logits,
            cap: 3.7,
            out,
        });
        logits = out;
    }
    model.finish(logits)
}

fn gated(model: &mut Model, random: &mut Random, gate: ValueId, up: ValueId) -> ValueId {
    let width = model.width(gate);
    let (a, out) = (model.f32(width), model.f32(width));
    let kind = random.choose([ActivationKind::Silu, ActivationKind::GeluTanh]);
    model.op(OpKind::Activation {
        input: gate,
        kind,
        out: a,
    });
    model.op(OpKind::Mul { a, b: up, out });
    out
}

fn feed_forward(model: &mut Model, random: &mut Random, h: ValueId, hidden: u32) -> ValueId {
    let n_ff = random.choose([96, 256, 320]);
    let gate = model.linear(random, h, Role::FfnGate, Some(Role::FfnGateBias), n_ff);
    let up = model.linear(random, h, Role::FfnUp, Some(Role::FfnUpBias), n_ff);
    let f = gated(model, random, gate, up);
    model.linear(random, f, Role::FfnDown, Some(Role::FfnDownBias), hidden)
}

fn mixture(model: &mut Model, random: &mut Random, h: ValueId, hidden: u32) -> ValueId {
    let n = 3 + random.below(6) as u32;
    let k = 1 + random.below(3) as u32;
    let n_ff = random.choose([32, 256]);
    let logits = model.linear(random, h, Role::Router, None, n);
    let experts = model.value(k, ValueKind::Experts);
    let weights = model.f32(k);
    let normalise = random.below(2) == 0;
    model.op(OpKind::RouterTopK {
        logits,
        k,
        normalise,
        experts,
        weights,
    });
    let gate = model.experts(random, h, experts, Role::FfnGateExps, (n, n_ff), true);
    let up = model.experts(random, h, experts, Role::FfnUpExps, (n, n_ff), true);
    let f = gated(model, random, gate, up);
    let down = model.experts(random, f, experts, Role::FfnDownExps, (n, hidden), false);
    let out = model.f32(hidden);
    model.op(OpKind::WeightedSum {
        input: down,
        experts,
        weights,
        out,
    });
    out
}

#[test]
fn random_transformers_decode_as_the_oracle_does() {
    for_seeds(24, |random| {
        let model = transformer(random, 40);
        let mut lengths = [0u32; 3];
        let mut batches = Vec::new();
        for _ in 0..5 {
            let mut batch = Vec::new();
            for (s, length) in lengths.iter_mut().enumerate() {
                let n = random.below(6).min(u64::from(40 - *length)) as u32;
                if n > 0 {
                    let tokens = (0..n)
                        .map(|_| random.below(model.program.vocab.into()) as u32)
                        .collect();
                    batch.push((s as u32, tokens));
                    *length += n;
                }
            }
            if !batch.is_empty() {
                batches.push(batch);
            }
        }
        model.compare(&batches, &options(random));
    });
}

#[test]
fn a_long_context_decodes_as_the_oracle_does() {
    for_seeds(1, |random| {
        let context = 300;
        let model = transformer(random, context);
        let tokens: Vec<u32> = (0..context)
            .map(|_| random.below(model.program.vocab.into()) as u32)
            .collect();
        let batches: Vec<_> = [tokens[..97].to_vec(), tokens[97..290].to_vec()]
            .into_iter()
            .chain(tokens[290..].iter().map(|t| vec![*t]))
            .map(|tokens| vec![(0, tokens)])
            .collect();
        model.compare(&batches, &options(random));
    });
}
