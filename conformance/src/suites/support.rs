//! What several suites build on: random models of one encoding, and a small model that decodes.

use std::sync::Arc;

use hoist_backend::{
    ActivationKind, Capacity, DecodeProgram, Encoding, Error, IndexEntry, KvDtype, KvSpec, Op, OpKind,
    OpenOptions, Outputs, Role, RopeStyle, Run, SequenceId, Shape, Slot, Table, TableId, TokenBatch, ValueId,
    ValueKind, ValueSpec, Want, WeightBackend, WeightClass, WeightRef, WorkspaceDims,
};

use crate::fixture::{Model, Weight};
use crate::guard::WritableF32;
use crate::operands::{self, Random, Scales};
use crate::oracle::{self, Interpreter, Weights};
use crate::{Context, Expect, Failure, Stop};

/// Roles of matrices, for models whose weights mean nothing.
const MATRICES: [Role; 7] = [
    Role::AttnQ,
    Role::AttnK,
    Role::AttnV,
    Role::AttnOutput,
    Role::FfnGate,
    Role::FfnUp,
    Role::FfnDown,
];

/// Every encoding that a weight can have.
pub(super) fn encodings() -> impl Iterator<Item = Encoding> {
    Encoding::all().filter(|e| e.is_float() || e.is_quantized())
}

/// Shapes that reveal how blocks and segments are counted: one block, odd rows, a last segment that is not whole, a
/// stack of matrices.
pub(super) fn shapes(random: &mut Random, encoding: Encoding) -> Vec<Shape> {
    let block = encoding.block_weights();
    let odd = |random: &mut Random| 2 * random.below(4) + 3;
    let partial = |random: &mut Random| {
        // More than one segment, and the last one partial wherever blocks are smaller than a segment.
        let blocks =
            256u64.div_ceil(block) * (1 + random.below(2)) + 1 + random.below(256u64.div_ceil(block));
        blocks * block
    };
    vec![
        Shape::matrix(1, block),
        Shape::matrix(odd(random), block * (1 + random.below(3))),
        Shape::matrix(odd(random), partial(random)),
        Shape::matrix(
            1 + random.below(4),
            256u64.next_multiple_of(block) * (1 + random.below(2)),
        ),
        Shape {
            matrices: 2 + random.below(2),
            rows: odd(random),
            cols: block * (1 + random.below(4)),
        },
    ]
}

/// A random matrix at a place of its own.
pub(super) fn matrix(
    random: &mut Random,
    place: usize,
    encoding: Encoding,
    shape: Shape,
    scales: Scales,
) -> Result<Weight, Error> {
    let bytes = operands::weight(random, encoding, shape, scales)?;
    let layer = Some((place / MATRICES.len()) as u32);
    Ok(Weight::matrix(
        layer,
        MATRICES[place % MATRICES.len()],
        encoding,
        shape,
        bytes,
    ))
}

/// Layers that [`matrix`] needs for so many places.
pub(super) fn layers(places: usize) -> u32 {
    places.div_ceil(MATRICES.len()).max(1) as u32
}

/// A random norm vector or bias.
pub(super) fn vector(
    random: &mut Random,
    layer: Option<u32>,
    role: Role,
    class: WeightClass,
    n: usize,
) -> Weight {
    let values: Vec<f32> = (0..n).map(|_| random.bell()).collect();
    Weight::vector(layer, role, class, &values)
}

/// A model of random matrices of one encoding, in all of [`shapes`], and a norm vector.
pub(super) fn model_of(cx: &mut Context<'_>, encoding: Encoding) -> Result<Model, Stop> {
    let random = &mut cx.random;
    let scales = random.choose([Scales::Ordinary, Scales::Spread, Scales::Subnormal]);
    let mut weights = Vec::new();
    for (place, shape) in shapes(random, encoding).into_iter().enumerate() {
        weights.push(matrix(random, place, encoding, shape, scales)?);
    }
    let layers = layers(weights.len());
    let n = 1 + random.below(300) as usize;
    weights.push(vector(random, None, Role::OutputNorm, WeightClass::Gamma, n));
    Ok(Model::new(cx.info(), layers, weights, Vec::new())?)
}

/// A small model of encodings that the backend holds, F32 among them where it can be.
pub(super) fn mixed_model(cx: &mut Context<'_>, places: usize) -> Result<Model, Stop> {
    let stored: Vec<Encoding> = cx.info().stored.iter().collect();
    let random = &mut cx.random;
    let mut weights = Vec::new();
    for place in 0..places {
        let Some(encoding) = stored.get(random.below(stored.len().max(1) as u64) as usize) else {
            return Err(Failure::new("encodings it holds", "", "at least one", "none").into());
        };
        let shape = Shape::matrix(
            1 + random.below(5),
            encoding.block_weights() * (1 + random.below(3)),
        );
        weights.push(matrix(random, place, *encoding, shape, Scales::Ordinary)?);
    }
    let n = 1 + random.below(64) as usize;
    weights.push(vector(random, None, Role::OutputNorm, WeightClass::Gamma, n));
    Ok(Model::new(cx.info(), layers(places), weights, Vec::new())?)
}

/// A model of two layers in F32 that decodes, with grouped heads, a bias that only one layer has, and a gate.
pub(super) struct Small {
    pub(super) model: Model,
    pub(super) program: DecodeProgram,
    pub(super) capacity: Capacity,
}

pub(super) const VOCAB: u32 = 13;
const HIDDEN: u32 = 8;
const HEADS: u32 = 2;
const HEAD_DIM: u32 = 4;
const FFN: u32 = 12;

impl Small {
    /// The model for the backend of a case; unsupported if it lacks an operation or F32.
    pub(super) fn new(cx: &mut Context<'_>, capacity: Capacity) -> Result<Self, Stop> {
        let (program, weights, more) = Builder::new(&mut cx.random, capacity.max_context).build();
        let model = Model::new(cx.info(), 2, weights, more)?;
        cx.check(crate::Need::Computed(Encoding::F32))?;
        for op in &program.ops {
            cx.check(crate::Need::Op(op.kind.name()))?;
        }
        Ok(Self {
            model,
            program,
            capacity,
        })
    }

    /// A capacity within what backends of any size have.
    pub(super) fn capacity(max_context: u32, max_sequences: u32, max_batch_tokens: u32) -> Capacity {
        Capacity {
            max_context,
            max_sequences,
            max_batch_tokens,
            kv: KvDtype::F16,
        }
    }

    pub(super) fn dims(&self) -> Result<WorkspaceDims, Stop> {
        Ok(WorkspaceDims::new(&self.program, self.capacity)?)
    }

    /// Brings a backend from *empty* to *indexed*.
    pub(super) fn index(&self, backend: &mut dyn WeightBackend) -> Result<(), Stop> {
        self.model.load(backend)?;
        backend.build_index(&self.model.index).succeeds("build_index")?;
        Ok(())
    }

    /// Brings a backend from *empty* to *prepared*.
    pub(super) fn prepare(&self, backend: &mut dyn WeightBackend) -> Result<(), Stop> {
        self.index(backend)?;
        backend.init_workspace(&self.dims()?).succeeds("init_workspace")?;
        decoder(backend)?.prepare(&self.program).succeeds("prepare")?;
        Ok(())
    }

    /// A fresh backend that is prepared.
    pub(super) fn prepared(
        &self,
        cx: &Context<'_>,
        options: &OpenOptions,
    ) -> Result<Box<dyn WeightBackend>, Stop> {
        let mut backend = cx.open_with(options)?;
        self.prepare(&mut *backend)?;
        Ok(backend)
    }

    /// Logits of every token of a sequence, by the oracle.
    pub(super) fn expected(&self, tokens: &[u32]) -> Result<Vec<f32>, Stop> {
        let mut oracle = Interpreter::new(&self.program, self, self.capacity.kv);
        let mut logits = Vec::new();
        for token in tokens {
            logits.extend(oracle.step(SequenceId(0), *token, true)?.unwrap_or_default());
        }
        Ok(logits)
    }

    /// Appends tokens to a sequence and returns all their logits.
    pub(super) fn forward(
        &self,
        backend: &mut dyn WeightBackend,
        sequence: u32,
        tokens: &[u32],
    ) -> Result<Vec<f32>, Stop> {
        let want = vec![Want::Logits; tokens.len()];
        let mut logits = WritableF32::new(tokens.len() * self.program.vocab as usize)?;
        let batch = TokenBatch {
            runs: &[Run {
                sequence: SequenceId(sequence),
                tokens,
                want: &want,
            }],
        };
        let mut outputs = Outputs {
            argmax: &mut [],
            logits: &mut logits,
        };
        decoder(backend)?
            .forward(&batch, &mut outputs)
            .succeeds("forward")?;
        logits.check("logits of forward")?;
        Ok(logits.to_vec())
    }

    /// Judges logits: bit for bit, or, of a bounded backend, to a thousandth of the largest one: what this model is used
    /// for is told by far larger differences.
    pub(super) fn judge(
        &self,
        cx: &Context<'_>,
        what: &str,
        expected: &[f32],
        found: &[f32],
    ) -> Result<(), Failure> {
        if cx.info().numerics == hoist_backend::NumericsClass::Exact {
            return crate::judge::exact(what, expected, found);
        }
        let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let bound = f64::from(largest) / 1000.0;
        let wrong = expected
            .iter()
            .zip(found)
            .position(|(e, f)| !f.is_finite() || (f64::from(*e) - f64::from(*f)).abs() > bound);
        match wrong {
            None if expected.len() == found.len() => Ok(()),
            None => Err(Failure::new(what, "", expected.len(), found.len())),
            Some(i) => Err(Failure::new(
                what,
                format!("element {i}"),
                format!("{:e} ± {bound:e}", expected[i]),
                format!("{:e}", found[i]),
            )),
        }
    }
}

/// The decoding side of a backend that declares one.
pub(super) fn decoder(
    backend: &mut dyn WeightBackend,
) -> Result<&mut dyn hoist_backend::DecodeBackend, Failure> {
    backend
        .as_decode()
        .ok_or_else(|| Failure::new("as_decode", "", "a decoder, since it declares operations", "none"))
}

impl Weights for Small {
    fn weight(&self, at: WeightRef) -> Option<oracle::Weight<'_>> {
        let entry = self
            .model
            .index
            .entries
            .iter()
            .find(|e| (e.layer, e.role) == (at.layer, at.role))?;
        let id = entry.slot.weight()?;
        let plan = self.model.plan.weights.get(id.index())?;
        Some(oracle::Weight {
            encoding: plan.encoding,
            shape: plan.shape,
            bytes: self.model.canonical.get(id.index())?.as_slice().into(),
        })
    }
}

/// Builds the program of [`Small`].
struct Builder<'r> {
    random: &'r mut Random,
    program: DecodeProgram,
    weights: Vec<Weight>,
    layer: Option<u32>,
}

impl<'r> Builder<'r> {
    fn new(random: &'r mut Random, max_context: u32) -> Self {
        // Angles of any size; a table is data.
        let table: Vec<f32> = (0..max_context)
            .flat_map(|position| {
                (0..HEAD_DIM / 2).flat_map(move |pair| {
                    let angle = f64::from(position) / 10f64.powi(pair as i32);
                    [angle.cos() as f32, angle.sin() as f32]
                })
            })
            .collect();
        Self {
            random,
            program: DecodeProgram {
                vocab: VOCAB,
                max_context,
                kv: vec![
                    KvSpec {
                        kv_heads: 1,
                        head_dim: HEAD_DIM,
                    };
                    2
                ],
                values: Vec::new(),
                ops: Vec::new(),
                tail: 0,
                tables: vec![Table {
                    name: "rope".into(),
                    rows: max_context,
                    cols: HEAD_DIM,
                    data: Arc::from(table),
                }],
                logits: ValueId(0),
            },
            weights: Vec::new(),
            layer: None,
        }
    }

    fn value(&mut self, width: u32) -> ValueId {
        let id = ValueId(self.program.values.len() as u32);
        self.program.values.push(ValueSpec {
            name: format!("v{}", id.0),
            width,
            kind: ValueKind::F32,
        });
        id
    }

    fn op(&mut self, kind: OpKind) {
        self.program.ops.push(Op {
            layer: self.layer,
            kind,
        });
    }

    fn put(&mut self, role: Role, rows: u32, cols: u32) -> WeightRef {
        let values: Vec<f32> = (0..rows * cols).map(|_| self.random.bell() * 0.4).collect();
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let shape = Shape::matrix(rows.into(), cols.into());
        self.weights
            .push(Weight::matrix(self.layer, role, Encoding::F32, shape, bytes));
        WeightRef {
            layer: self.layer,
            role,
        }
    }

    fn put_vector(&mut self, role: Role, class: WeightClass, n: u32) -> WeightRef {
        let weight = vector(self.random, self.layer, role, class, n as usize);
        self.weights.push(weight);
        WeightRef {
            layer: self.layer,
            role,
        }
    }

    fn linear(&mut self, input: ValueId, role: Role, bias: Option<Role>, rows: u32) -> ValueId {
        let cols = self.program.values[input.0 as usize].width;
        let weight = self.put(role, rows, cols);
        let bias = bias.map(|role| self.put_vector(role, WeightClass::Bias, rows));
        let out = self.value(rows);
        self.op(OpKind::MatMul {
            input,
            weight,
            bias,
            out,
        });
        out
    }

    fn norm(&mut self, input: ValueId, role: Role) -> ValueId {
        let width = self.program.values[input.0 as usize].width;
        let weight = self.put_vector(role, WeightClass::Gamma, width);
        let out = self.value(width);
        self.op(OpKind::RmsNorm {
            input,
            weight,
            eps: 1e-5,
            rows: 1,
            out,
        });
        out
    }

    fn add(&mut self, a: ValueId, b: ValueId) -> ValueId {
        let out = self.value(HIDDEN);
        self.op(OpKind::Add { a, b, out });
        out
    }

    fn build(mut self) -> (DecodeProgram, Vec<Weight>, Vec<IndexEntry>) {
        let weight = self.put(Role::TokenEmbd, VOCAB, HIDDEN);
        let mut x = self.value(HIDDEN);
        self.op(OpKind::Embed { weight, out: x });
        for layer in 0..2 {
            self.layer = Some(layer);
            let normed = self.norm(x, Role::AttnNorm);
            let q = self.linear(
                normed,
                Role::AttnQ,
                (layer == 0).then_some(Role::AttnQBias),
                HEADS * HEAD_DIM,
            );
            let k = self.linear(normed, Role::AttnK, None, HEAD_DIM);
            let v = self.linear(normed, Role::AttnV, None, HEAD_DIM);
            for (value, heads) in [(q, HEADS), (k, 1)] {
                self.op(OpKind::Rope {
                    value,
                    table: TableId(0),
                    style: RopeStyle::HalfSplit,
                    heads,
                    n_rot: HEAD_DIM,
                });
            }
            self.op(OpKind::StoreKv { key: k, value: v });
            self.program.tail = self.program.ops.len();
            let attended = self.value(HEADS * HEAD_DIM);
            self.op(OpKind::Attention {
                query: q,
                heads: HEADS,
                scale: 0.5,
                window: None,
                soft_cap: None,
                out: attended,
            });
            let projected = self.linear(attended, Role::AttnOutput, None, HIDDEN);
            x = self.add(x, projected);
            let normed = self.norm(x, Role::FfnNorm);
            let gate = self.linear(normed, Role::FfnGate, None, FFN);
            let up = self.linear(normed, Role::FfnUp, None, FFN);
            let active = self.value(FFN);
            self.op(OpKind::Activation {
                input: gate,
                kind: ActivationKind::Silu,
                out: active,
            });
            let product = self.value(FFN);
            self.op(OpKind::Mul {
                a: active,
                b: up,
                out: product,
            });
            let down = self.linear(product, Role::FfnDown, None, HIDDEN);
            x = self.add(x, down);
        }
        self.layer = None;
        let normed = self.norm(x, Role::OutputNorm);
        let weight = self.put(Role::Output, VOCAB, HIDDEN);
        let out = self.value(VOCAB);
        self.op(OpKind::Logits {
            input: normed,
            weight,
            bias: None,
            out,
        });
        self.program.logits = out;
        let absent = IndexEntry {
            layer: Some(1),
            role: Role::AttnQBias,
            slot: Slot::Absent,
        };
        (self.program, self.weights, vec![absent])
    }
}

/// Random tokens of [`Small`].
pub(super) fn tokens(random: &mut Random, n: usize) -> Vec<u32> {
    (0..n).map(|_| random.below(VOCAB.into()) as u32).collect()
}
