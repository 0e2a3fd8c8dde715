//! A decode program resolved against the index and checked against the workspace, so that running it cannot go wrong
//! but for what tokens and weights do. Every backend that decodes needs this; none has to write it.

use std::ops::Range;

use crate::{
    ActivationKind, DecodeProgram, Encoding, Error, FloatLayout, OpKind, OpName, Result, RopeStyle, Shape,
    TableId, UnsupportedWhat, ValueId, ValueKind, WeightClass, WeightId, WeightIndex, WeightRef,
    WorkspaceDims,
};

/// The largest input dimension of a matrix under the numerics contract.
pub const MAX_COLS: u64 = 131_072;

/// A value, by its place in [`DecodeProgram::values`].
pub type Value = usize;
/// A weight, by its place in [`crate::LoadPlan::weights`].
pub type Weight = usize;

/// What [`ResolvedProgram::new`] asks about a resident weight.
#[derive(Clone, Copy, Debug)]
pub struct WeightFacts<'a> {
    /// Its name, for messages.
    pub name: &'a str,
    /// Memory class.
    pub class: WeightClass,
    /// Encoding of its canonical bytes.
    pub encoding: Encoding,
    /// Canonical shape.
    pub shape: Shape,
    /// Where the input dimension of a float matrix runs on the device.
    pub layout: FloatLayout,
}

/// An operation with everything looked up.
#[derive(Clone, Debug)]
pub struct Step {
    /// Layer, or `None` outside of layers.
    pub layer: Option<u32>,
    /// Its name, for messages.
    pub op: OpName,
    /// What it does, and with what.
    pub kind: StepKind,
}

/// An operation and its operands, as [`OpKind`] documents them; Logits is a MatMul here.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "fields are the operands that OpKind documents")]
pub enum StepKind {
    Embed {
        weight: Weight,
        out: Value,
    },
    EmbedPosition {
        weight: Weight,
        out: Value,
    },
    RmsNorm {
        input: Value,
        weight: Weight,
        eps: f32,
        out: Value,
    },
    LayerNorm {
        input: Value,
        weight: Weight,
        bias: Weight,
        eps: f32,
        out: Value,
    },
    Quantise {
        input: Value,
        cols: usize,
        out: Value,
    },
    MatMul {
        input: Value,
        weight: Weight,
        bias: Option<Weight>,
        out: Value,
    },
    Rope {
        value: Value,
        table: usize,
        style: RopeStyle,
        head_dim: usize,
        n_rot: usize,
    },
    StoreKv {
        key: Value,
        value: Value,
        layer: usize,
    },
    Attention {
        query: Value,
        heads: usize,
        scale: f32,
        window: Option<u32>,
        soft_cap: Option<f32>,
        out: Value,
        layer: usize,
    },
    Activation {
        input: Value,
        kind: ActivationKind,
        out: Value,
    },
    Mul {
        a: Value,
        b: Value,
        out: Value,
    },
    Add {
        a: Value,
        b: Value,
        out: Value,
    },
    Scale {
        input: Value,
        factor: f32,
        out: Value,
    },
    SoftCap {
        input: Value,
        cap: f32,
        out: Value,
    },
    RouterTopK {
        logits: Value,
        normalise: bool,
        experts: Value,
        weights: Value,
    },
    ExpertMatMul {
        input: Value,
        shared: bool,
        experts: Value,
        weight: Weight,
        out: Value,
    },
    WeightedSum {
        input: Value,
        experts: Value,
        weights: Value,
        out: Value,
    },
}

impl StepKind {
    /// Canonical bytes of weights that the operation reads for a token, each counted once; `facts` are a weight's bytes and
    /// shape, `chosen` is how many experts a value names.
    pub fn weight_bytes(&self, facts: impl Fn(Weight) -> (u64, Shape), chosen: impl Fn(Value) -> u64) -> u64 {
        match *self {
            StepKind::MatMul { weight, .. } => facts(weight).0,
            StepKind::ExpertMatMul { weight, experts, .. } => {
                let (nbytes, shape) = facts(weight);
                nbytes / shape.matrices.max(1) * chosen(experts).min(shape.matrices)
            }
            StepKind::Embed { weight, .. } | StepKind::EmbedPosition { weight, .. } => {
                let (nbytes, shape) = facts(weight);
                nbytes / shape.rows.max(1)
            }
            _ => 0,
        }
    }
}

/// A program whose operands are looked up and checked.
#[derive(Clone, Debug)]
pub struct ResolvedProgram {
    /// Operations in order.
    pub steps: Vec<Step>,
    /// First step of those that only tokens with an output need.
    pub tail: usize,
    /// Values that steps of the tail read and earlier ones wrote.
    pub carried: Vec<Value>,
    /// Vocabulary.
    pub vocab: usize,
    /// The value that holds the logits.
    pub logits: Value,
    /// Quantised weights that are multiplied with, each once.
    pub multiplied: Vec<Weight>,
}

struct Resolver<'a, F> {
    backend: &'a str,
    program: &'a DecodeProgram,
    index: &'a WeightIndex,
    facts: F,
    /// The operation in hand, for messages.
    op: OpName,
    layer: Option<u32>,
    written: Vec<bool>,
    /// Written by an operation of the tail.
    written_in_tail: Vec<bool>,
    in_tail: bool,
    carried: Vec<Value>,
    /// For values of experts: how many there are to choose from.
    experts: Vec<u64>,
    /// Layers whose keys and values this program has stored.
    stored: Vec<bool>,
    multiplied: Vec<Weight>,
}

impl<'w, F: Fn(WeightId) -> Result<WeightFacts<'w>>> Resolver<'_, F> {
    fn refuse(&self, what: &str, expected: impl std::fmt::Display, found: impl std::fmt::Display) -> Error {
        let layer = self.layer.map(|l| format!(" of layer {l}")).unwrap_or_default();
        Error::invalid(format!("{what} of {}{layer}", self.op), expected, found)
    }

    fn kind(&self, id: ValueId) -> Result<(ValueKind, u64)> {
        let value = self
            .program
            .value(id)
            .ok_or_else(|| self.refuse("a value", "one of the program's", id.0))?;
        Ok((value.kind, value.width.into()))
    }

    fn read(&mut self, id: ValueId) -> Result<Value> {
        let value = id.0 as usize;
        if !self.written.get(value).copied().unwrap_or(false) {
            return Err(self.refuse(
                "an input",
                "a value that an earlier operation writes",
                format!("value {value}"),
            ));
        }
        if self.in_tail && !self.written_in_tail[value] && !self.carried.contains(&value) {
            self.carried.push(value);
        }
        Ok(value)
    }

    fn write(&mut self, id: ValueId) -> Value {
        let value = id.0 as usize;
        self.written[value] = true;
        if self.in_tail {
            self.written_in_tail[value] = true;
        }
        value
    }

    /// Reads f32, of that width if one is given.
    fn float(&mut self, id: ValueId) -> Result<(Value, u64)> {
        match self.kind(id)? {
            (ValueKind::F32, width) => Ok((self.read(id)?, width)),
            (kind, _) => Err(self.refuse("an input", "f32 values", format!("{kind:?}"))),
        }
    }

    fn float_of(&mut self, id: ValueId, width: u64) -> Result<Value> {
        let (value, found) = self.float(id)?;
        if found == width {
            Ok(value)
        } else {
            Err(self.refuse("width of an input", width, found))
        }
    }

    /// Writes f32 of that width; `inputs` must not be written over.
    fn float_out(&mut self, id: ValueId, width: u64, inputs: &[Value]) -> Result<Value> {
        match self.kind(id)? {
            (ValueKind::F32, found) if found == width => {}
            (kind, found) => {
                return Err(self.refuse(
                    "the output",
                    format!("{width} f32"),
                    format!("{found} of {kind:?}"),
                ));
            }
        }
        if inputs.contains(&(id.0 as usize)) {
            return Err(self.refuse(
                "the output",
                "a value that is no input",
                format!("value {}", id.0),
            ));
        }
        Ok(self.write(id))
    }

    fn weight(&self, weight: WeightRef) -> Result<(Weight, WeightFacts<'w>)> {
        let id = self.index.lookup(weight.layer, weight.role).ok_or_else(|| {
            let layer = weight.layer.map(|l| format!(" of layer {l}")).unwrap_or_default();
            self.refuse(
                "a weight",
                "one that the index holds",
                format!("{}{layer}", weight.role),
            )
        })?;
        Ok((id.index(), (self.facts)(id)?))
    }

    /// An f32 vector of that length.
    fn vector(&self, weight: WeightRef, len: u64) -> Result<Weight> {
        let (id, resident) = self.weight(weight)?;
        let is_vector = resident.class == WeightClass::Gamma || resident.class == WeightClass::Bias;
        if is_vector && resident.shape == Shape::vector(len) {
            return Ok(id);
        }
        let found = format!("{} {} {:?}", resident.encoding, resident.shape, resident.class);
        Err(self.refuse(
            &format!("`{}`", resident.name),
            format!("an f32 vector of {len}"),
            found,
        ))
    }

    /// One matrix with rows of `width` that can be read one by one, at least `rows` of them.
    fn rows_of(&self, weight: WeightRef, rows: u64, width: u64) -> Result<Weight> {
        let (id, resident) = self.weight(weight)?;
        let shape = resident.shape;
        if resident.layout != FloatLayout::OutIn
            || shape.matrices != 1
            || shape.rows < rows
            || shape.cols != width
        {
            let found = format!("{shape}, {:?}", resident.layout);
            return Err(self.refuse(
                &format!("`{}`", resident.name),
                format!("[≥ {rows}, {width}], OutIn"),
                found,
            ));
        }
        Ok(id)
    }

    /// Checks a matrix against its input: whose `cols` it multiplies, in how many vectors.
    fn matrix(&mut self, weight: WeightRef, input: ValueId) -> Result<(Weight, Shape, u64)> {
        let (kind, width) = self.kind(input)?;
        let (id, resident) = self.weight(weight)?;
        let WeightFacts {
            shape,
            name,
            encoding,
            ..
        } = resident;
        let vectors = match (resident.class, kind) {
            (WeightClass::Quantized, ValueKind::Quantized { vectors }) => {
                let multiple = encoding.block_weights().max(32);
                if shape.cols == 0 || !shape.cols.is_multiple_of(multiple) || shape.cols > MAX_COLS {
                    return Err(Error::Unsupported {
                        backend: self.backend.into(),
                        what: UnsupportedWhat::Encoding {
                            encoding,
                            usage: "an input dimension of that size",
                        },
                    });
                }
                u64::from(vectors)
            }
            (WeightClass::Float, ValueKind::F32) => {
                if shape.cols > MAX_COLS {
                    return Err(Error::Unsupported {
                        backend: self.backend.into(),
                        what: UnsupportedWhat::Limit {
                            what: "an input dimension",
                            limit: MAX_COLS,
                            found: shape.cols,
                        },
                    });
                }
                width / shape.cols
            }
            (class, kind) => {
                return Err(self.refuse(
                    &format!("the input for `{name}`"),
                    "quantised values for a quantised matrix, f32 for a float one",
                    format!("{kind:?} for {class:?}"),
                ));
            }
        };
        if vectors == 0 || vectors.checked_mul(shape.cols) != Some(width) {
            return Err(self.refuse(
                &format!("the input for `{name}`"),
                format!("vectors of {}", shape.cols),
                width,
            ));
        }
        if resident_is_quantised(kind) && !self.multiplied.contains(&id) {
            self.multiplied.push(id);
        }
        Ok((id, shape, vectors))
    }

    fn kv(&self) -> Result<(usize, u64, u64)> {
        let layer = self
            .layer
            .map(|l| l as usize)
            .filter(|l| *l < self.program.kv.len());
        let Some(layer) = layer else {
            return Err(self.refuse(
                "the layer",
                format!("below {}", self.program.kv.len()),
                format!("{:?}", self.layer),
            ));
        };
        let kv = self.program.kv[layer];
        Ok((layer, kv.kv_heads.into(), kv.head_dim.into()))
    }

    fn table(&self, id: TableId, n_rot: u32) -> Result<usize> {
        let table = self
            .program
            .table(id)
            .ok_or_else(|| self.refuse("the table", "one of the program's", id.0))?;
        let values = u64::from(table.rows) * u64::from(table.cols);
        if table.rows < self.program.max_context || table.cols != n_rot || table.data.len() as u64 != values {
            return Err(self.refuse(
                &format!("table `{}`", table.name),
                format!("[≥ {}, {n_rot}]", self.program.max_context),
                format!(
                    "[{}, {}] with {} values",
                    table.rows,
                    table.cols,
                    table.data.len()
                ),
            ));
        }
        Ok(id.0 as usize)
    }

    fn experts(&mut self, id: ValueId) -> Result<(Value, u64)> {
        match self.kind(id)? {
            (ValueKind::Experts, k) => Ok((self.read(id)?, k)),
            (kind, _) => Err(self.refuse("an input", "experts", format!("{kind:?}"))),
        }
    }

    fn step(&mut self, kind: &OpKind) -> Result<StepKind> {
        Ok(match *kind {
            OpKind::Embed { weight, out } => {
                let width = self.kind(out)?.1;
                let weight = self.rows_of(weight, self.program.vocab.into(), width)?;
                StepKind::Embed {
                    weight,
                    out: self.float_out(out, width, &[])?,
                }
            }
            OpKind::EmbedPosition { weight, out } => {
                let width = self.kind(out)?.1;
                let weight = self.rows_of(weight, self.program.max_context.into(), width)?;
                StepKind::EmbedPosition {
                    weight,
                    out: self.float_out(out, width, &[])?,
                }
            }
            OpKind::RmsNorm {
                input,
                weight,
                eps,
                rows,
                out,
            } => {
                let (input, width) = self.float(input)?;
                if rows == 0 || width % u64::from(rows) != 0 {
                    return Err(self.refuse("rows", format!("a divisor of {width}"), rows));
                }
                let weight = self.vector(weight, width / u64::from(rows))?;
                StepKind::RmsNorm {
                    input,
                    weight,
                    eps,
                    out: self.float_out(out, width, &[input])?,
                }
            }
            OpKind::LayerNorm {
                input,
                weight,
                bias,
                eps,
                out,
            } => {
                let (input, width) = self.float(input)?;
                let (weight, bias) = (self.vector(weight, width)?, self.vector(bias, width)?);
                StepKind::LayerNorm {
                    input,
                    weight,
                    bias,
                    eps,
                    out: self.float_out(out, width, &[input])?,
                }
            }
            OpKind::Quantise { input, out } => {
                let (input, width) = self.float(input)?;
                let (ValueKind::Quantized { vectors }, found) = self.kind(out)? else {
                    return Err(self.refuse("the output", "quantised values", "another kind"));
                };
                let cols = if vectors == 0 {
                    0
                } else {
                    width / u64::from(vectors)
                };
                let whole = cols.checked_mul(vectors.into()) == Some(width) && cols.is_multiple_of(32);
                if found != width || cols == 0 || !whole || cols > MAX_COLS {
                    let expected = format!("{width} in vectors of a multiple of 32, up to {}", MAX_COLS);
                    return Err(self.refuse("the output", expected, format!("{found} in {vectors} vectors")));
                }
                StepKind::Quantise {
                    input,
                    cols: cols as usize,
                    out: self.write(out),
                }
            }
            OpKind::MatMul {
                input,
                weight,
                bias,
                out,
            }
            | OpKind::Logits {
                input,
                weight,
                bias,
                out,
            } => {
                let (weight, shape, vectors) = self.matrix(weight, input)?;
                if vectors != 1 || shape.matrices != 1 {
                    return Err(self.refuse(
                        "operands",
                        "one matrix and one vector",
                        format!("{shape} and {vectors}"),
                    ));
                }
                let bias = bias.map(|b| self.vector(b, shape.rows)).transpose()?;
                let input = self.read(input)?;
                StepKind::MatMul {
                    input,
                    weight,
                    bias,
                    out: self.float_out(out, shape.rows, &[input])?,
                }
            }
            OpKind::Rope {
                value,
                table,
                style,
                heads,
                n_rot,
            } => {
                let (value, width) = self.float(value)?;
                let head_dim = if heads == 0 { 0 } else { width / u64::from(heads) };
                let whole = head_dim.checked_mul(heads.into()) == Some(width);
                if head_dim == 0 || !whole || u64::from(n_rot) > head_dim || !n_rot.is_multiple_of(2) {
                    let found = format!("{heads} heads of {width} in all, {n_rot} turned");
                    return Err(self.refuse("heads", "equal heads, an even part of which is turned", found));
                }
                let table = self.table(table, n_rot)?;
                self.write(ValueId(value as u32));
                StepKind::Rope {
                    value,
                    table,
                    style,
                    head_dim: head_dim as usize,
                    n_rot: n_rot as usize,
                }
            }
            OpKind::StoreKv { key, value } => {
                let (layer, kv_heads, head_dim) = self.kv()?;
                if self.in_tail {
                    return Err(self.refuse("its place", "before the tail", "in the tail"));
                }
                self.stored[layer] = true;
                let width = kv_heads * head_dim;
                StepKind::StoreKv {
                    key: self.float_of(key, width)?,
                    value: self.float_of(value, width)?,
                    layer,
                }
            }
            OpKind::Attention {
                query,
                heads,
                scale,
                window,
                soft_cap,
                out,
            } => {
                let (layer, kv_heads, head_dim) = self.kv()?;
                if !self.stored[layer] {
                    return Err(self.refuse("its place", "after the layer's store_kv", "before it"));
                }
                if kv_heads == 0 || head_dim == 0 || heads == 0 || u64::from(heads) % kv_heads != 0 {
                    return Err(self.refuse(
                        "heads",
                        format!("a multiple of {kv_heads} key/value heads"),
                        heads,
                    ));
                }
                if window == Some(0) {
                    return Err(self.refuse("window", "at least 1", 0));
                }
                let width = u64::from(heads) * head_dim;
                let query = self.float_of(query, width)?;
                let out = self.float_out(out, width, &[query])?;
                StepKind::Attention {
                    query,
                    heads: heads as usize,
                    scale,
                    window,
                    soft_cap,
                    out,
                    layer,
                }
            }
            OpKind::Activation { input, kind, out } => {
                let (input, width) = self.float(input)?;
                StepKind::Activation {
                    input,
                    kind,
                    out: self.float_out(out, width, &[input])?,
                }
            }
            OpKind::Mul { a, b, out } => {
                let (a, width) = self.float(a)?;
                let b = self.float_of(b, width)?;
                StepKind::Mul {
                    a,
                    b,
                    out: self.float_out(out, width, &[a, b])?,
                }
            }
            OpKind::Add { a, b, out } => {
                let (a, width) = self.float(a)?;
                let b = self.float_of(b, width)?;
                StepKind::Add {
                    a,
                    b,
                    out: self.float_out(out, width, &[])?,
                }
            }
            OpKind::Scale { input, factor, out } => {
                let (input, width) = self.float(input)?;
                StepKind::Scale {
                    input,
                    factor,
                    out: self.float_out(out, width, &[input])?,
                }
            }
            OpKind::SoftCap { input, cap, out } => {
                let (input, width) = self.float(input)?;
                StepKind::SoftCap {
                    input,
                    cap,
                    out: self.float_out(out, width, &[input])?,
                }
            }
            OpKind::RouterTopK {
                logits,
                k,
                normalise,
                experts,
                weights,
            } => {
                let (logits, n) = self.float(logits)?;
                let (ValueKind::Experts, found) = self.kind(experts)? else {
                    return Err(self.refuse("the output", "experts", "another kind"));
                };
                if found != u64::from(k) || k == 0 || u64::from(k) > n {
                    return Err(self.refuse(
                        "k",
                        format!("1 … {n}, as many as the output holds ({found})"),
                        k,
                    ));
                }
                self.experts[experts.0 as usize] = n;
                let experts = self.write(experts);
                StepKind::RouterTopK {
                    logits,
                    normalise,
                    experts,
                    weights: self.float_out(weights, k.into(), &[logits])?,
                }
            }
            OpKind::ExpertMatMul {
                input,
                experts,
                weight,
                out,
            } => {
                let (experts, k) = self.experts(experts)?;
                let (weight, shape, vectors) = self.matrix(weight, input)?;
                if vectors != 1 && vectors != k {
                    return Err(self.refuse("the input", format!("1 or {k} vectors"), vectors));
                }
                if shape.matrices < self.experts[experts] {
                    return Err(self.refuse(
                        "experts",
                        format!("at most {}", shape.matrices),
                        self.experts[experts],
                    ));
                }
                let input = self.read(input)?;
                let width = k.saturating_mul(shape.rows);
                let out = self.float_out(out, width, &[input])?;
                StepKind::ExpertMatMul {
                    input,
                    shared: vectors == 1,
                    experts,
                    weight,
                    out,
                }
            }
            OpKind::WeightedSum {
                input,
                experts,
                weights,
                out,
            } => {
                let (experts, k) = self.experts(experts)?;
                let (input, width) = self.float(input)?;
                let weights = self.float_of(weights, k)?;
                if k == 0 || width % k != 0 {
                    return Err(self.refuse("width of the input", format!("a multiple of {k}"), width));
                }
                StepKind::WeightedSum {
                    input,
                    experts,
                    weights,
                    out: self.float_out(out, width / k, &[input, weights])?,
                }
            }
        })
    }
}

fn resident_is_quantised(kind: ValueKind) -> bool {
    matches!(kind, ValueKind::Quantized { .. })
}

impl ResolvedProgram {
    /// Resolves and checks a program: against the workspace's dimensions, the index, and what `facts` tells of each
    /// weight.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if operands do not fit each other, the workspace or the index; [`Error::Unsupported`] for
    /// an input dimension outside the numerics contract; what `facts` returns.
    pub fn new<'w>(
        backend: &str,
        program: &DecodeProgram,
        dims: &WorkspaceDims,
        index: &WeightIndex,
        facts: impl Fn(WeightId) -> Result<WeightFacts<'w>>,
    ) -> Result<Self> {
        let wanted = WorkspaceDims::new(program, dims.capacity)?;
        if wanted.values != dims.values
            || wanted.kv != dims.kv
            || wanted.vocab != dims.vocab
            || wanted.table_bytes > dims.table_bytes
        {
            return Err(Error::invalid(
                "program",
                "the one whose dimensions the workspace has",
                "another",
            ));
        }
        if program.tail > program.ops.len() {
            return Err(Error::invalid(
                "tail of the program",
                format!("at most {}", program.ops.len()),
                program.tail,
            ));
        }
        let values = program.values.len();
        let mut resolver = Resolver {
            backend,
            program,
            index,
            facts,
            op: OpName::Embed,
            layer: None,
            written: vec![false; values],
            written_in_tail: vec![false; values],
            in_tail: false,
            carried: Vec::new(),
            experts: vec![0; values],
            stored: vec![false; program.kv.len()],
            multiplied: Vec::new(),
        };
        let mut steps = Vec::with_capacity(program.ops.len());
        for (i, op) in program.ops.iter().enumerate() {
            resolver.op = op.kind.name();
            resolver.layer = op.layer;
            resolver.in_tail = i >= program.tail;
            steps.push(Step {
                layer: op.layer,
                op: op.kind.name(),
                kind: resolver.step(&op.kind)?,
            });
        }
        resolver.op = OpName::Logits;
        resolver.layer = None;
        resolver.in_tail = true;
        let logits = resolver.float_of(program.logits, program.vocab.into())?;
        Ok(Self {
            steps,
            tail: program.tail,
            carried: resolver.carried,
            vocab: program.vocab as usize,
            logits,
            multiplied: resolver.multiplied,
        })
    }

    /// The steps before the tail, and those of it.
    pub fn parts(&self) -> [Range<usize>; 2] {
        [0..self.tail, self.tail..self.steps.len()]
    }
}
