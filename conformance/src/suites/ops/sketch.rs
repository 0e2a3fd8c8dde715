//! Programs made for cases, with their weights: one operation, or a whole transformer of random shape.

use std::collections::HashMap;

use hoist_backend::{
    ActivationKind, DecodeProgram, Encoding, IndexEntry, KvSpec, Op, OpKind, OpName, Role, RopeStyle, Shape,
    Slot, Table, TableId, ValueId, ValueKind, ValueSpec, WeightClass, WeightId, WeightRef,
};

use crate::fixture::{Model, Weight};
use crate::operands::{self, Magnitudes, Random, Scales};
use crate::oracle;
use crate::{Context, Failure};

type Place = (Option<u32>, Role);

/// A program under construction, with its weights.
pub(crate) struct Sketch {
    pub(crate) program: DecodeProgram,
    pub(crate) weights: Vec<Weight>,
    /// Index entries beyond one for each weight.
    pub(crate) more: Vec<IndexEntry>,
    by_place: HashMap<Place, usize>,
    layer: Option<u32>,
}

impl oracle::Weights for Sketch {
    fn weight(&self, at: WeightRef) -> Option<oracle::Weight<'_>> {
        let weight = &self.weights[*self.by_place.get(&(at.layer, at.role))?];
        Some(oracle::Weight {
            encoding: weight.encoding,
            shape: weight.shape,
            bytes: weight.canonical.as_slice().into(),
        })
    }
}

impl Sketch {
    /// An empty program.
    pub(crate) fn new(vocab: u32, max_context: u32) -> Self {
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
            more: vec![],
            by_place: HashMap::new(),
            layer: None,
        }
    }

    /// A program that was made elsewhere, with its weights.
    pub(crate) fn of(program: DecodeProgram, weights: Vec<Weight>, more: Vec<IndexEntry>) -> Self {
        let own = weights.iter().enumerate().map(|(i, w)| ((w.layer, w.role), i));
        let others = more
            .iter()
            .filter_map(|e| Some(((e.layer, e.role), e.slot.weight()?.index())));
        let by_place = own.chain(others).collect();
        Self {
            program,
            weights,
            more,
            by_place,
            layer: None,
        }
    }

    /// Layers of the model: those that have keys and values, at least one if a weight belongs to one.
    pub(crate) fn layers(&self) -> u32 {
        let named = self.weights.iter().filter_map(|w| w.layer).max();
        (self.program.kv.len() as u32).max(named.map_or(0, |l| l + 1))
    }

    /// The model as the backend under test is to load it.
    ///
    /// # Errors
    /// A failure of the suite itself.
    pub(crate) fn model(&self, cx: &Context<'_>) -> Result<Model, Failure> {
        Model::new(cx.info(), self.layers(), self.weights.clone(), self.more.clone())
            .map_err(|e| Failure::new("a model of the suite", "", "one that can be planned", e))
    }

    /// Whether what a token yields depends on nothing but the token.
    pub(crate) fn is_stateless(&self) -> bool {
        !self.program.ops.iter().any(|op| {
            matches!(
                op.kind,
                OpKind::StoreKv { .. } | OpKind::EmbedPosition { .. } | OpKind::Rope { .. }
            )
        })
    }

    pub(crate) fn value(&mut self, width: u32, kind: ValueKind) -> ValueId {
        let id = ValueId(self.program.values.len() as u32);
        self.program.values.push(ValueSpec {
            name: format!("v{}", id.0),
            width,
            kind,
        });
        id
    }

    pub(crate) fn f32(&mut self, width: u32) -> ValueId {
        self.value(width, ValueKind::F32)
    }

    fn width(&self, id: ValueId) -> u32 {
        self.program.values[id.0 as usize].width
    }

    pub(crate) fn op(&mut self, kind: OpKind) {
        let layer = self.layer;
        self.program.ops.push(Op { layer, kind });
    }

    pub(crate) fn put(&mut self, weight: Weight) -> WeightRef {
        let at = WeightRef {
            layer: weight.layer,
            role: weight.role,
        };
        self.by_place.insert((at.layer, at.role), self.weights.len());
        self.weights.push(weight);
        at
    }

    /// A second place for the weight at the first one.
    pub(crate) fn tie(&mut self, role: Role, to: WeightRef) -> WeightRef {
        let weight = self.by_place[&(to.layer, to.role)];
        self.by_place.insert((self.layer, role), weight);
        self.more.push(IndexEntry {
            layer: self.layer,
            role,
            slot: Slot::Tied(WeightId(weight as u32)),
        });
        WeightRef {
            layer: self.layer,
            role,
        }
    }

    pub(crate) fn matrix(
        &mut self,
        random: &mut Random,
        role: Role,
        encoding: Encoding,
        shape: Shape,
        scales: Scales,
    ) -> Result<WeightRef, Failure> {
        let bytes = operands::weight(random, encoding, shape, scales)
            .map_err(|e| Failure::new("a weight of the suite", "", "a shape that the encoding has", e))?;
        Ok(self.put(Weight::matrix(self.layer, role, encoding, shape, bytes)))
    }

    /// A matrix whose bytes are given.
    pub(crate) fn matrix_of(
        &mut self,
        role: Role,
        encoding: Encoding,
        shape: Shape,
        bytes: Vec<u8>,
    ) -> WeightRef {
        self.put(Weight::matrix(self.layer, role, encoding, shape, bytes))
    }

    /// A matrix of f32 values.
    pub(crate) fn f32_matrix(&mut self, role: Role, rows: u32, values: &[f32]) -> WeightRef {
        let shape = Shape::matrix(rows.into(), values.len() as u64 / u64::from(rows.max(1)));
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.matrix_of(role, Encoding::F32, shape, bytes)
    }

    pub(crate) fn vector(&mut self, role: Role, class: WeightClass, values: &[f32]) -> WeightRef {
        self.put(Weight::vector(self.layer, role, class, values))
    }

    pub(crate) fn bells(&mut self, random: &mut Random, role: Role, class: WeightClass, n: u32) -> WeightRef {
        let values: Vec<f32> = (0..n).map(|_| random.bell()).collect();
        self.vector(role, class, &values)
    }

    /// Rows of f32, one for each token: how operands come into a program.
    pub(crate) fn input_of(&mut self, width: u32, rows: &[f32]) -> ValueId {
        let vocab = self.program.vocab;
        let weight = self.f32_matrix(Role::TokenEmbd, vocab, rows);
        let out = self.f32(width);
        self.op(OpKind::Embed { weight, out });
        out
    }

    /// Random rows of f32, one for each token.
    pub(crate) fn input(&mut self, random: &mut Random, width: u32, magnitudes: Magnitudes) -> ValueId {
        let rows: Vec<f32> = (0..self.program.vocab)
            .flat_map(|_| operands::vector(random, width as usize, magnitudes))
            .collect();
        self.input_of(width, &rows)
    }

    /// Random rows of f32, one for each position.
    pub(crate) fn position_input(
        &mut self,
        random: &mut Random,
        width: u32,
        magnitudes: Magnitudes,
    ) -> ValueId {
        let positions = self.program.max_context;
        let rows: Vec<f32> = (0..positions)
            .flat_map(|_| operands::vector(random, width as usize, magnitudes))
            .collect();
        let weight = self.f32_matrix(Role::PositionEmbd, positions, &rows);
        let out = self.f32(width);
        self.op(OpKind::EmbedPosition { weight, out });
        out
    }

    /// `input` as the encoding wants it.
    pub(crate) fn operand(&mut self, input: ValueId, encoding: Encoding, vectors: u32) -> ValueId {
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
        of: &Allowed,
        input: ValueId,
        (role, bias): (Role, Option<Role>),
        rows: u32,
    ) -> Result<ValueId, Failure> {
        let cols = self.width(input);
        let encoding = of.encoding(random, cols);
        let shape = Shape::matrix(rows.into(), cols.into());
        let weight = self.matrix(random, role, encoding, shape, Scales::Ordinary)?;
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
        Ok(out)
    }

    pub(crate) fn experts(
        &mut self,
        random: &mut Random,
        encoding: Encoding,
        (input, experts): (ValueId, ValueId),
        role: Role,
        (n, rows): (u32, u32),
        shared: bool,
    ) -> Result<ValueId, Failure> {
        let k = self.width(experts);
        let cols = self.width(input) / if shared { 1 } else { k };
        let shape = Shape {
            matrices: n.into(),
            rows: rows.into(),
            cols: cols.into(),
        };
        let weight = self.matrix(random, role, encoding, shape, Scales::Ordinary)?;
        let input = self.operand(input, encoding, if shared { 1 } else { k });
        let out = self.f32(rows * k);
        self.op(OpKind::ExpertMatMul {
            input,
            experts,
            weight,
            out,
        });
        Ok(out)
    }

    fn norm(
        &mut self,
        random: &mut Random,
        of: &Allowed,
        input: ValueId,
        (role, bias): (Role, Option<Role>),
        rows: u32,
    ) -> ValueId {
        let width = self.width(input);
        let weight = self.bells(random, role, WeightClass::Gamma, width / rows);
        let out = self.f32(width);
        let eps = random.choose([1e-5, 1e-6]);
        let plain = random.below(2) == 0 || !of.has(OpName::LayerNorm);
        match bias.filter(|_| rows == 1 && !plain) {
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

    /// Operations and weights that follow belong to that layer.
    pub(crate) fn in_layer(&mut self, layer: Option<u32>) {
        self.layer = layer;
    }

    /// The program with that value as its logits.
    pub(crate) fn finish(mut self, logits: ValueId) -> Self {
        self.program.logits = logits;
        let stores = |op: &Op| matches!(op.kind, OpKind::StoreKv { .. });
        self.program.tail = self.program.ops.iter().rposition(stores).map_or(0, |i| i + 1);
        self
    }
}

/// What the backend under test declares: programs keep to it.
pub(crate) struct Allowed {
    encodings: Vec<Encoding>,
    ops: hoist_backend::OpSet,
}

impl Allowed {
    pub(crate) fn of(cx: &Context<'_>) -> Self {
        Self {
            encodings: cx.info().computed.iter().collect(),
            ops: cx.info().ops,
        }
    }

    pub(crate) fn has(&self, op: OpName) -> bool {
        self.ops.contains(op)
    }

    /// An encoding that rows of `cols` can have; F32 if no other.
    pub(crate) fn encoding(&self, random: &mut Random, cols: u32) -> Encoding {
        let fits = |e: &Encoding| {
            e.is_float() || (cols.is_multiple_of(32) && u64::from(cols).is_multiple_of(e.block_weights()))
        };
        let fitting: Vec<Encoding> = self.encodings.iter().copied().filter(fits).collect();
        match fitting.len() as u64 {
            0 => Encoding::F32,
            n => fitting[random.below(n) as usize],
        }
    }
}

/// A RoPE table: any angles do, as long as they differ.
pub(crate) fn rope_table(rows: u32, n_rot: u32) -> Table {
    let data: Vec<f32> = (0..rows)
        .flat_map(|p| (0..n_rot / 2).map(move |j| f64::from(p) * 0.9 / (1.0 + f64::from(j))))
        .flat_map(|angle| [angle.cos() as f32, angle.sin() as f32])
        .collect();
    Table {
        name: "rope".into(),
        rows,
        cols: n_rot,
        data: data.into(),
    }
}

/// A transformer of random shape with every operation that one can have and the backend declares.
///
/// # Errors
/// A failure of the suite itself.
pub(crate) fn transformer(cx: &mut Context<'_>, context: u32) -> Result<Sketch, Failure> {
    let of = Allowed::of(cx);
    let random = &mut cx.random;
    let vocab = 20 + random.below(30) as u32;
    let hidden = random.choose([64, 96, 160, 256]);
    let mut sketch = Sketch::new(vocab, context);
    let encoding = of.encoding(random, hidden);
    let shape = Shape::matrix(vocab.into(), hidden.into());
    let embedding = sketch.matrix(random, Role::TokenEmbd, encoding, shape, Scales::Ordinary)?;
    let mut x = sketch.f32(hidden);
    sketch.op(OpKind::Embed {
        weight: embedding,
        out: x,
    });
    if random.below(2) == 0 && of.has(OpName::Scale) {
        let out = sketch.f32(hidden);
        sketch.op(OpKind::Scale {
            input: x,
            factor: 5.3,
            out,
        });
        x = out;
    }
    if random.below(2) == 0 && of.has(OpName::EmbedPosition) {
        let positions = sketch.position_input(random, hidden, Magnitudes::Ordinary);
        x = sketch.add(x, positions);
    }
    let layers = 1 + random.below(2) as u32;
    let head_dim = random.choose([8, 16, 20, 32, 64]);
    let kv_heads = 1 + random.below(3) as u32;
    let heads = kv_heads * (1 + random.below(3) as u32);
    let n_rot = random.choose([head_dim, head_dim, head_dim / 2]);
    let attention = AttentionShape {
        heads,
        kv_heads,
        head_dim,
        n_rot,
        style: random.choose([RopeStyle::Interleaved, RopeStyle::HalfSplit]),
        soft_cap: random.choose([None, Some(1.5)]),
    };
    sketch.program.tables.push(rope_table(context, n_rot));
    for layer in 0..layers {
        sketch.program.kv.push(KvSpec { kv_heads, head_dim });
        sketch.layer = Some(layer);
        x = layer_of(&mut sketch, random, &of, &attention, x)?;
    }
    sketch.layer = None;
    let output_norm = (Role::OutputNorm, Some(Role::OutputNormBias));
    let h = sketch.norm(random, &of, x, output_norm, 1);
    let tied = random.below(3) == 0;
    let (weight, encoding) = if tied {
        (sketch.tie(Role::Output, embedding), encoding)
    } else {
        let encoding = of.encoding(random, hidden);
        let weight = sketch.matrix(random, Role::Output, encoding, shape, Scales::Ordinary)?;
        (weight, encoding)
    };
    let input = sketch.operand(h, encoding, 1);
    let mut logits = sketch.f32(vocab);
    sketch.op(OpKind::Logits {
        input,
        weight,
        bias: None,
        out: logits,
    });
    if random.below(2) == 0 && of.has(OpName::SoftCap) {
        let out = sketch.f32(vocab);
        sketch.op(OpKind::SoftCap {
            input: logits,
            cap: 3.7,
            out,
        });
        logits = out;
    }
    Ok(sketch.finish(logits))
}

struct AttentionShape {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    n_rot: u32,
    style: RopeStyle,
    soft_cap: Option<f32>,
}

fn layer_of(
    sketch: &mut Sketch,
    random: &mut Random,
    of: &Allowed,
    shape: &AttentionShape,
    x: ValueId,
) -> Result<ValueId, Failure> {
    let hidden = sketch.width(x);
    let (heads, kv_heads, head_dim) = (shape.heads, shape.kv_heads, shape.head_dim);
    let h = sketch.norm(random, of, x, (Role::AttnNorm, Some(Role::AttnNormBias)), 1);
    let mut q = sketch.linear(
        random,
        of,
        h,
        (Role::AttnQ, Some(Role::AttnQBias)),
        heads * head_dim,
    )?;
    let kv = kv_heads * head_dim;
    let mut k = sketch.linear(random, of, h, (Role::AttnK, Some(Role::AttnKBias)), kv)?;
    let v = sketch.linear(random, of, h, (Role::AttnV, Some(Role::AttnVBias)), kv)?;
    if random.below(2) == 0 {
        q = sketch.norm(random, of, q, (Role::AttnQNorm, None), heads);
        k = sketch.norm(random, of, k, (Role::AttnKNorm, None), kv_heads);
    }
    for (value, heads) in [(q, heads), (k, kv_heads)] {
        sketch.op(OpKind::Rope {
            value,
            table: TableId(0),
            style: shape.style,
            heads,
            n_rot: shape.n_rot,
        });
    }
    sketch.op(OpKind::StoreKv { key: k, value: v });
    let a = sketch.f32(heads * head_dim);
    sketch.op(OpKind::Attention {
        query: q,
        heads,
        scale: 0.31,
        window: random.choose([None, Some(3), Some(260)]),
        soft_cap: shape.soft_cap,
        out: a,
    });
    let output = (Role::AttnOutput, Some(Role::AttnOutputBias));
    let o = sketch.linear(random, of, a, output, hidden)?;
    let x = sketch.add(x, o);
    let h = sketch.norm(random, of, x, (Role::FfnNorm, Some(Role::FfnNormBias)), 1);
    let mixes = [OpName::RouterTopK, OpName::ExpertMatMul, OpName::WeightedSum];
    let f = if random.below(2) == 0 || !mixes.iter().all(|op| of.has(*op)) {
        feed_forward(sketch, random, of, h)?
    } else {
        mixture(sketch, random, of, h)?
    };
    let f = sketch.norm(random, of, f, (Role::PostFfnNorm, None), 1);
    Ok(sketch.add(x, f))
}

fn gated(sketch: &mut Sketch, random: &mut Random, gate: ValueId, up: ValueId) -> ValueId {
    let width = sketch.width(gate);
    let (a, out) = (sketch.f32(width), sketch.f32(width));
    let kind = random.choose([ActivationKind::Silu, ActivationKind::GeluTanh]);
    sketch.op(OpKind::Activation {
        input: gate,
        kind,
        out: a,
    });
    sketch.op(OpKind::Mul { a, b: up, out });
    out
}

fn feed_forward(
    sketch: &mut Sketch,
    random: &mut Random,
    of: &Allowed,
    h: ValueId,
) -> Result<ValueId, Failure> {
    let hidden = sketch.width(h);
    let n_ff = random.choose([96, 256, 320]);
    let gate = sketch.linear(random, of, h, (Role::FfnGate, Some(Role::FfnGateBias)), n_ff)?;
    let up = sketch.linear(random, of, h, (Role::FfnUp, Some(Role::FfnUpBias)), n_ff)?;
    let f = gated(sketch, random, gate, up);
    sketch.linear(random, of, f, (Role::FfnDown, Some(Role::FfnDownBias)), hidden)
}

fn mixture(sketch: &mut Sketch, random: &mut Random, of: &Allowed, h: ValueId) -> Result<ValueId, Failure> {
    let hidden = sketch.width(h);
    let n = 3 + random.below(6) as u32;
    let k = 1 + random.below(3) as u32;
    let n_ff = random.choose([32, 256]);
    let logits = sketch.linear(random, of, h, (Role::Router, None), n)?;
    let experts = sketch.value(k, ValueKind::Experts);
    let weights = sketch.f32(k);
    let normalise = random.below(2) == 0;
    sketch.op(OpKind::RouterTopK {
        logits,
        k,
        normalise,
        experts,
        weights,
    });
    let into = of.encoding(random, hidden);
    let gate = sketch.experts(random, into, (h, experts), Role::FfnGateExps, (n, n_ff), true)?;
    let up = sketch.experts(random, into, (h, experts), Role::FfnUpExps, (n, n_ff), true)?;
    let f = gated(sketch, random, gate, up);
    let back = of.encoding(random, n_ff);
    let down = sketch.experts(random, back, (f, experts), Role::FfnDownExps, (n, hidden), false)?;
    let out = sketch.f32(hidden);
    sketch.op(OpKind::WeightedSum {
        input: down,
        experts,
        weights,
        out,
    });
    Ok(out)
}
