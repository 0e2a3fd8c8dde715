use std::sync::Arc;

use crate::Role;

/// A buffer of a program: an index into [`DecodeProgram::values`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub u32);

/// A table of a program: an index into [`DecodeProgram::tables`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TableId(pub u32);

/// A weight by its place in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WeightRef {
    /// Layer, or `None` for weights of the whole model.
    pub layer: Option<u32>,
    /// Role.
    pub role: Role,
}

/// What a value holds, for each token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueKind {
    /// `width` f32.
    F32,
    /// `width` activations quantised as `docs/numerics.md` §1 says, in `vectors` vectors of `width / vectors` each (a
    /// vector has its own segments and its own largest exponent).
    Quantized {
        /// Vectors a token.
        vectors: u32,
    },
    /// `width` expert numbers, u32.
    Experts,
}

/// A value: one buffer, written and read by operations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValueSpec {
    /// Name in dumps.
    pub name: String,
    /// Elements per token.
    pub width: u32,
    /// What they are.
    pub kind: ValueKind,
}

/// Data that the model crate computed on the host, in f64 rounded once to f32.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// Name in dumps.
    pub name: String,
    /// Positions: the program's `max_context`.
    pub rows: u32,
    /// Values a position: `n_rot` for a RoPE table.
    pub cols: u32,
    /// `[rows, cols]`. A RoPE table holds, for pair `j`, cos at `2j` and sin at `2j + 1`, attention factors included.
    pub data: Arc<[f32]>,
}

/// Keys and values of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvSpec {
    /// Key/value heads.
    pub kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
}

/// Which elements of a head RoPE turns together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// Pairs `(2j, 2j + 1)`: llama in GGUF files.
    Interleaved,
    /// Pairs `(j, j + n_rot / 2)`: Hugging Face files, and NEOX-style architectures.
    HalfSplit,
}

/// A gate's non-linearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivationKind {
    /// `x · sigmoid(x)`
    Silu,
    /// GELU by its tanh approximation.
    GeluTanh,
}

/// One operation, applied to every token of a batch.
///
/// Each operation names all it reads and writes. An output never aliases an input, except that [`OpKind::Rope`] works in
/// place and [`OpKind::Add`] may write over either input. Definitions to the bit are in `docs/numerics.md`.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
#[allow(
    missing_docs,
    reason = "fields are the operands named in each variant's formula"
)]
pub enum OpKind {
    /// `out = dequantise(weight[token])`
    Embed { weight: WeightRef, out: ValueId },
    /// `out = weight[position]`
    EmbedPosition { weight: WeightRef, out: ValueId },
    /// `out = x / sqrt(mean(x²) + eps) · weight`, for each of `rows` vectors of `width / rows` elements.
    RmsNorm {
        input: ValueId,
        weight: WeightRef,
        eps: f32,
        rows: u32,
        out: ValueId,
    },
    /// `out = (x − mean(x)) / sqrt(var(x) + eps) · weight + bias`
    LayerNorm {
        input: ValueId,
        weight: WeightRef,
        bias: WeightRef,
        eps: f32,
        out: ValueId,
    },
    /// Quantises activations; `out` is [`ValueKind::Quantized`] and says in how many vectors.
    Quantise { input: ValueId, out: ValueId },
    /// `out = weight · input + bias`. `input` is quantised for a quantised weight, F32 for a float weight.
    MatMul {
        input: ValueId,
        weight: WeightRef,
        bias: Option<WeightRef>,
        out: ValueId,
    },
    /// Turns each of `heads` heads in place by the token's position; elements past `n_rot` stay.
    Rope {
        value: ValueId,
        table: TableId,
        style: RopeStyle,
        heads: u32,
        n_rot: u32,
    },
    /// Stores keys and values of the token at its position of its sequence, in the tagged layer's cache.
    StoreKv { key: ValueId, value: ValueId },
    /// Causal attention of `heads` query heads over the tagged layer's cache. `window`: only the last so many positions,
    /// the token's own included. `soft_cap`: `s = cap · tanh(s / cap)` after scaling.
    Attention {
        query: ValueId,
        heads: u32,
        scale: f32,
        window: Option<u32>,
        soft_cap: Option<f32>,
        out: ValueId,
    },
    /// `out = f(input)`
    Activation {
        input: ValueId,
        kind: ActivationKind,
        out: ValueId,
    },
    /// `out = a · b`, element by element.
    Mul { a: ValueId, b: ValueId, out: ValueId },
    /// `out = a + b`; `out` may be `a` or `b`.
    Add { a: ValueId, b: ValueId, out: ValueId },
    /// `out = input · factor`
    Scale {
        input: ValueId,
        factor: f32,
        out: ValueId,
    },
    /// `out = cap · tanh(input / cap)`
    SoftCap { input: ValueId, cap: f32, out: ValueId },
    /// Softmax over all experts, then the `k` most probable in descending order (ties: lowest number first); `normalise`
    /// divides their probabilities by their sum.
    RouterTopK {
        logits: ValueId,
        k: u32,
        normalise: bool,
        experts: ValueId,
        weights: ValueId,
    },
    /// For each chosen expert `s`: `out[s] = weight[experts[s]] · input[s]`; all slots read the same input if it holds one
    /// vector.
    ExpertMatMul {
        input: ValueId,
        experts: ValueId,
        weight: WeightRef,
        out: ValueId,
    },
    /// `out = Σ weights[s] · input[s]`, in ascending order of expert number.
    WeightedSum {
        input: ValueId,
        experts: ValueId,
        weights: ValueId,
        out: ValueId,
    },
    /// As `MatMul`, of the output matrix. Only tokens that want logits or an arg-max need it.
    Logits {
        input: ValueId,
        weight: WeightRef,
        bias: Option<WeightRef>,
        out: ValueId,
    },
}

/// An operation's name: what backends declare and reports print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
#[repr(u8)]
#[allow(missing_docs, reason = "one for each variant of OpKind")]
pub enum OpName {
    Embed,
    EmbedPosition,
    RmsNorm,
    LayerNorm,
    Quantise,
    MatMul,
    Rope,
    StoreKv,
    Attention,
    Activation,
    Mul,
    Add,
    Scale,
    SoftCap,
    RouterTopK,
    ExpertMatMul,
    WeightedSum,
    Logits,
}

const OP_NAMES: &[(OpName, &str)] = &[
    (OpName::Embed, "embed"),
    (OpName::EmbedPosition, "embed_position"),
    (OpName::RmsNorm, "rms_norm"),
    (OpName::LayerNorm, "layer_norm"),
    (OpName::Quantise, "quantise"),
    (OpName::MatMul, "matmul"),
    (OpName::Rope, "rope"),
    (OpName::StoreKv, "store_kv"),
    (OpName::Attention, "attention"),
    (OpName::Activation, "activation"),
    (OpName::Mul, "mul"),
    (OpName::Add, "add"),
    (OpName::Scale, "scale"),
    (OpName::SoftCap, "soft_cap"),
    (OpName::RouterTopK, "router_top_k"),
    (OpName::ExpertMatMul, "expert_matmul"),
    (OpName::WeightedSum, "weighted_sum"),
    (OpName::Logits, "logits"),
];

impl OpName {
    /// Every operation, in id order.
    pub fn all() -> impl ExactSizeIterator<Item = OpName> + Clone {
        OP_NAMES.iter().map(|(op, _)| *op)
    }

    /// The number plugins see, below 32. Never reused.
    pub fn id(self) -> u32 {
        self as u32
    }

    /// The operation of that number.
    pub fn from_id(id: u32) -> Option<Self> {
        OP_NAMES.get(usize::try_from(id).ok()?).map(|(op, _)| *op)
    }

    /// The snake-case name.
    pub fn name(self) -> &'static str {
        OP_NAMES[self as usize].1
    }
}

impl std::fmt::Display for OpName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl OpKind {
    /// Its name.
    pub fn name(&self) -> OpName {
        match self {
            OpKind::Embed { .. } => OpName::Embed,
            OpKind::EmbedPosition { .. } => OpName::EmbedPosition,
            OpKind::RmsNorm { .. } => OpName::RmsNorm,
            OpKind::LayerNorm { .. } => OpName::LayerNorm,
            OpKind::Quantise { .. } => OpName::Quantise,
            OpKind::MatMul { .. } => OpName::MatMul,
            OpKind::Rope { .. } => OpName::Rope,
            OpKind::StoreKv { .. } => OpName::StoreKv,
            OpKind::Attention { .. } => OpName::Attention,
            OpKind::Activation { .. } => OpName::Activation,
            OpKind::Mul { .. } => OpName::Mul,
            OpKind::Add { .. } => OpName::Add,
            OpKind::Scale { .. } => OpName::Scale,
            OpKind::SoftCap { .. } => OpName::SoftCap,
            OpKind::RouterTopK { .. } => OpName::RouterTopK,
            OpKind::ExpertMatMul { .. } => OpName::ExpertMatMul,
            OpKind::WeightedSum { .. } => OpName::WeightedSum,
            OpKind::Logits { .. } => OpName::Logits,
        }
    }
}

/// An operation and the layer it belongs to.
#[derive(Clone, Debug, PartialEq)]
pub struct Op {
    /// Layer, or `None` before the first and after the last.
    pub layer: Option<u32>,
    /// What is done.
    pub kind: OpKind,
}

/// A model's forward pass as data: made once from the architecture, run by any backend.
///
/// `ops[..tail]` run for every token. `ops[tail..]` (everything after the last `StoreKv`) matter only to tokens that want
/// an arg-max or logits; a backend may skip them for the others.
#[derive(Clone, Debug, PartialEq)]
pub struct DecodeProgram {
    /// Vocabulary: the width of `logits`, and the bound of token ids.
    pub vocab: u32,
    /// Most positions of a sequence: the rows of every table.
    pub max_context: u32,
    /// The cache of each layer.
    pub kv: Vec<KvSpec>,
    /// Buffers.
    pub values: Vec<ValueSpec>,
    /// Operations, in order.
    pub ops: Vec<Op>,
    /// First operation that only tokens with an output need.
    pub tail: usize,
    /// Tables.
    pub tables: Vec<Table>,
    /// The value that holds the logits when all operations have run.
    pub logits: ValueId,
}

impl DecodeProgram {
    /// The value of that id, if the program has it.
    pub fn value(&self, id: ValueId) -> Option<&ValueSpec> {
        self.values.get(id.0 as usize)
    }

    /// The table of that id, if the program has it.
    pub fn table(&self, id: TableId) -> Option<&Table> {
        self.tables.get(id.0 as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_are_in_the_order_of_the_enum() {
        for (i, (op, name)) in OP_NAMES.iter().enumerate() {
            assert_eq!(*op as usize, i, "{name}");
            assert_eq!(OpName::from_id(op.id()), Some(*op));
        }
        assert!(OP_NAMES.len() <= 32, "OpSet is a u32");
    }
}
