//! A decode program as launches of kernels, checked against the index and the workspace, so that running it cannot go
//! wrong but for what tokens and weights do.

use hoist_backend::{
    ActivationKind, DecodeProgram, Encoding, Error, KvDtype, Op, OpKind, OpName, Result, RopeStyle, Shape,
    TableId, UnsupportedWhat, ValueId, ValueKind, WeightClass, WeightIndex, WeightRef, WorkspaceDims,
};
use wgpu::{BindGroup, Buffer, BufferUsages, ComputePipeline};

use crate::device::Gpu;
use crate::pipelines::{Bindings, PARAMETER_BYTES, Pipelines};
use crate::residency::{Part, Residency, Resident};
use crate::shaders::{Kernel, MAX_HEAD_DIM, THREADS};
use crate::workspace::{Workspace, attention_words, keys_words, value_words};

/// No bias, no window, no soft cap.
const NONE: u32 = u32::MAX;

/// Vectors that a matrix product takes at a time when there are several.
const TILE: u32 = 4;

/// How many workgroups a launch has, as a function of the tokens in hand.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Groups {
    /// `(x, y)` for each token.
    Tokens(u32, u32),
    /// So many, spread over two dimensions, for each token or each tile of so many.
    Spread(u64, u32),
    /// So many, spread over two dimensions, for each of so many choices of a token.
    Choices(u64, u32),
    /// One for 64 elements, so many of them a token.
    Elements(u64),
    /// Splits of attention, in so many heads, of a window.
    Attention(u32, Option<u32>),
    /// Heads; nothing if every token sees one split.
    Merge(u32, Option<u32>),
    /// So many, once.
    Once(u32),
}

/// One kernel with all it reads.
#[derive(Debug)]
pub(crate) struct Launch {
    /// For several vectors at a time, where that is another pipeline.
    pub(crate) several: Option<ComputePipeline>,
    pub(crate) pipeline: ComputePipeline,
    pub(crate) bindings: BindGroup,
    pub(crate) groups: Groups,
}

/// A program ready to run.
#[derive(Debug)]
pub(crate) struct Compiled {
    pub(crate) body: Vec<Launch>,
    /// Moves the tail's tokens to the front.
    pub(crate) gather: Vec<Launch>,
    pub(crate) tail: Vec<Launch>,
    /// What each step is, for errors; the last is the arg-max's look at the logits.
    pub(crate) steps: Vec<(OpName, Option<u32>)>,
    pub(crate) vocab: u32,
    pub(crate) logits: usize,
    /// Tokens that run together.
    pub(crate) tokens: usize,
    _parameters: Buffer,
}

/// A launch before its buffers are bound.
#[derive(Debug)]
struct Draft {
    kernel: Kernel,
    several: Option<Kernel>,
    parameters: [u32; 32],
    weights: Option<usize>,
    second: Option<usize>,
    tables: Tables,
    cache: Option<usize>,
    groups: Groups,
    in_tail: bool,
}

#[derive(Clone, Copy, Debug)]
enum Tables {
    None,
    Rope,
    Grids,
}

impl Draft {
    fn new(kernel: Kernel, groups: Groups, parameters: &[u32]) -> Self {
        let mut all = [0; 32];
        all[..parameters.len()].copy_from_slice(parameters);
        Self {
            kernel,
            several: None,
            parameters: all,
            weights: None,
            second: None,
            tables: Tables::None,
            cache: None,
            groups,
            in_tail: false,
        }
    }
}

/// What an operation reads and writes.
fn operands(kind: &OpKind) -> (Vec<ValueId>, Vec<ValueId>) {
    match *kind {
        OpKind::Embed { out, .. } | OpKind::EmbedPosition { out, .. } => (vec![], vec![out]),
        OpKind::RmsNorm { input, out, .. }
        | OpKind::LayerNorm { input, out, .. }
        | OpKind::Quantise { input, out }
        | OpKind::MatMul { input, out, .. }
        | OpKind::Logits { input, out, .. }
        | OpKind::Activation { input, out, .. }
        | OpKind::Scale { input, out, .. }
        | OpKind::SoftCap { input, out, .. } => (vec![input], vec![out]),
        OpKind::Rope { value, .. } => (vec![value], vec![value]),
        OpKind::StoreKv { key, value } => (vec![key, value], vec![]),
        OpKind::Attention { query, out, .. } => (vec![query], vec![out]),
        OpKind::Mul { a, b, out } | OpKind::Add { a, b, out } => (vec![a, b], vec![out]),
        OpKind::RouterTopK {
            logits,
            experts,
            weights,
            ..
        } => (vec![logits], vec![experts, weights]),
        OpKind::ExpertMatMul {
            input, experts, out, ..
        } => (vec![input, experts], vec![out]),
        OpKind::WeightedSum {
            input,
            experts,
            weights,
            out,
        } => (vec![input, experts, weights], vec![out]),
        // Unknown to this version: refused when it is compiled.
        _ => (vec![], vec![]),
    }
}

struct Compiler<'a> {
    program: &'a DecodeProgram,
    index: &'a WeightIndex,
    residency: &'a Residency,
    work: &'a Workspace,
    table_at: Vec<u64>,
    /// The operation in hand.
    op: OpName,
    layer: Option<u32>,
    step: u32,
    in_tail: bool,
    written: Vec<bool>,
    written_in_tail: Vec<bool>,
    carried: Vec<usize>,
    /// For values of experts: how many there are to choose from.
    experts: Vec<u64>,
    stored: Vec<bool>,
    multiplied: Vec<usize>,
    drafts: Vec<Draft>,
    /// Tokens that can run together.
    tokens: u64,
}

fn unsupported(what: UnsupportedWhat) -> Error {
    Error::Unsupported {
        backend: crate::NAME.into(),
        what,
    }
}

/// A size that other checks have bounded.
fn word(n: u64) -> Result<u32> {
    u32::try_from(n).map_err(|_| Error::internal(crate::NAME, format!("a place of {n} words")))
}

impl Compiler<'_> {
    fn refuse(&self, what: &str, expected: impl std::fmt::Display, found: impl std::fmt::Display) -> Error {
        let layer = self.layer.map(|l| format!(" of layer {l}")).unwrap_or_default();
        Error::invalid(format!("{what} of {}{layer}", self.op), expected, found)
    }

    fn kind(&self, id: ValueId) -> Result<(ValueKind, u64)> {
        self.program
            .value(id)
            .map(|v| (v.kind, v.width.into()))
            .ok_or_else(|| self.refuse("a value", "one of the program's", id.0))
    }

    /// Where a value lies, in words.
    fn place(&self, value: usize) -> Result<u32> {
        word(self.work.places.values[value])
    }

    fn read(&mut self, id: ValueId) -> Result<usize> {
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

    fn write(&mut self, id: ValueId) -> usize {
        let value = id.0 as usize;
        self.written[value] = true;
        self.written_in_tail[value] |= self.in_tail;
        value
    }

    /// Reads f32; their place and width.
    fn float(&mut self, id: ValueId) -> Result<(u32, u64)> {
        match self.kind(id)? {
            (ValueKind::F32, width) => {
                let value = self.read(id)?;
                Ok((self.place(value)?, width))
            }
            (kind, _) => Err(self.refuse("an input", "f32 values", format!("{kind:?}"))),
        }
    }

    fn float_of(&mut self, id: ValueId, width: u64) -> Result<u32> {
        let (place, found) = self.float(id)?;
        if found == width {
            Ok(place)
        } else {
            Err(self.refuse("width of an input", width, found))
        }
    }

    /// Writes f32 of that width over no input; its place.
    fn float_out(&mut self, id: ValueId, width: u64, inputs: &[ValueId]) -> Result<u32> {
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
        if inputs.contains(&id) {
            return Err(self.refuse(
                "the output",
                "a value that is no input",
                format!("value {}", id.0),
            ));
        }
        let value = self.write(id);
        self.place(value)
    }

    fn experts_of(&mut self, id: ValueId) -> Result<(u32, u64, usize)> {
        match self.kind(id)? {
            (ValueKind::Experts, k) => {
                let value = self.read(id)?;
                Ok((self.place(value)?, k, value))
            }
            (kind, _) => Err(self.refuse("an input", "experts", format!("{kind:?}"))),
        }
    }

    fn weight(&self, weight: WeightRef) -> Result<(usize, &Resident)> {
        let id = self.index.lookup(weight.layer, weight.role).ok_or_else(|| {
            let layer = weight.layer.map(|l| format!(" of layer {l}")).unwrap_or_default();
            self.refuse(
                "a weight",
                "one that the index holds",
                format!("{}{layer}", weight.role),
            )
        })?;
        Ok((id.index(), self.residency.weight(id)?))
    }

    /// An f32 vector of that length: its buffer, and its place there in words.
    fn vector(&self, weight: WeightRef, len: u64) -> Result<(usize, u32)> {
        let (_, resident) = self.weight(weight)?;
        let is_vector = matches!(resident.class, WeightClass::Gamma | WeightClass::Bias);
        match resident.parts.as_slice() {
            [part] if is_vector && resident.shape == Shape::vector(len) => {
                Ok((part.arena, word(part.at / 4)?))
            }
            _ => Err(self.refuse(
                &format!("`{}`", resident.name),
                format!("an f32 vector of {len}"),
                format!("{} {} {:?}", resident.encoding, resident.shape, resident.class),
            )),
        }
    }

    fn push(&mut self, mut draft: Draft) {
        draft.in_tail = self.in_tail;
        self.drafts.push(draft);
    }

    fn embed(&mut self, weight: WeightRef, out: ValueId, rows: u64, positions: bool) -> Result<()> {
        let width = self.kind(out)?.1;
        let (id, resident) = self.weight(weight)?;
        let shape = resident.shape;
        if shape.matrices != 1 || shape.rows < rows || shape.cols != width {
            return Err(self.refuse(
                &format!("`{}`", resident.name),
                format!("[≥ {rows}, {width}]"),
                shape,
            ));
        }
        let (encoding, parts) = (resident.encoding, resident.parts.clone());
        let mut common = self.matrix_parameters(id)?;
        common[1] = self.float_out(out, width, &[])?;
        common[14] = positions.into();
        let each = if encoding.is_float() { 1 } else { 4 };
        let groups = Groups::Spread(width.div_ceil(each).div_ceil(THREADS), 1);
        for part in &parts {
            let mut parameters = common;
            part_parameters(&mut parameters, part)?;
            let mut draft = Draft::new(Kernel::Embed(encoding), groups, &parameters);
            draft.weights = Some(part.arena);
            draft.tables = tables_of(encoding);
            self.push(draft);
        }
        Ok(())
    }

    /// Parameters that say what a matrix is.
    fn matrix_parameters(&self, weight: usize) -> Result<[u32; 18]> {
        let resident = &self.residency.weights[weight];
        let mut p = [0; 18];
        p[2] = word(resident.row_bytes())?;
        p[3] = word(resident.shape.rows)?;
        p[4] = word(resident.shape.cols)?;
        p[11] = word(resident.shape.cols.div_ceil(256))?;
        p[12] = NONE;
        p[13] = self.step;
        p[17] = word(resident.encoding.matrix_prefix_bytes())?;
        Ok(p)
    }

    /// Checks a matrix against its input: its number, shape, and how many vectors the input holds.
    fn matrix(&mut self, weight: WeightRef, input: ValueId) -> Result<(usize, Shape, u64)> {
        let (kind, width) = self.kind(input)?;
        let (id, resident) = self.weight(weight)?;
        let (shape, encoding) = (resident.shape, resident.encoding);
        let what = format!("the input for `{}`", resident.name);
        let vectors = match (resident.class, kind) {
            (WeightClass::Quantized, ValueKind::Quantized { vectors }) => {
                hoist_quant::check_input_dimension(encoding, shape.cols).map_err(|_| {
                    unsupported(UnsupportedWhat::Encoding {
                        encoding,
                        usage: "an input dimension of that size",
                    })
                })?;
                if !self.multiplied.contains(&id) {
                    self.multiplied.push(id);
                }
                u64::from(vectors)
            }
            (WeightClass::Float, ValueKind::F32) => {
                if shape.cols > hoist_quant::MAX_COLS {
                    return Err(unsupported(UnsupportedWhat::Limit {
                        what: "an input dimension",
                        limit: hoist_quant::MAX_COLS,
                        found: shape.cols,
                    }));
                }
                width / shape.cols
            }
            (class, kind) => {
                return Err(self.refuse(
                    &what,
                    "quantised values for a quantised matrix, f32 for a float one",
                    format!("{kind:?} for {class:?}"),
                ));
            }
        };
        if vectors == 0 || vectors.checked_mul(shape.cols) != Some(width) {
            return Err(self.refuse(&what, format!("vectors of {}", shape.cols), width));
        }
        Ok((id, shape, vectors))
    }

    /// A product with every part of a weight. `experts`: place of the choices, how many a token, whether they share input.
    fn product(
        &mut self,
        weight: usize,
        input: ValueId,
        bias: Option<WeightRef>,
        out: (ValueId, u64),
        experts: Option<(u32, u64, bool)>,
    ) -> Result<()> {
        let resident = &self.residency.weights[weight];
        let (encoding, shape) = (resident.encoding, resident.shape);
        let parts = resident.parts.clone();
        let bias = bias.map(|b| self.vector(b, shape.rows)).transpose()?;
        let mut common = self.matrix_parameters(weight)?;
        let value = self.read(input)?;
        common[0] = self.place(value)?;
        common[1] = self.float_out(out.0, out.1, &[input])?;
        common[10] = word(out.1)?;
        if let Some((_, at)) = bias {
            common[12] = at;
        }
        if let Some((place, k, shared)) = experts {
            common[14] = word(k)?;
            common[15] = place;
            common[16] = shared.into();
        }
        let lanes_log2 = u64::from(common[11]).next_power_of_two().trailing_zeros().min(6);
        common[9] = lanes_log2;
        for part in &parts {
            let mut parameters = common;
            part_parameters(&mut parameters, part)?;
            let rows = if experts.is_some() { shape.rows } else { part.rows };
            let quantised = encoding.is_quantized();
            let groups = if quantised {
                rows.div_ceil(THREADS >> lanes_log2)
            } else {
                rows
            };
            let (groups, several) = match experts {
                Some((_, k, _)) => (Groups::Choices(groups, word(k)?), None),
                None if quantised => (Groups::Spread(groups, TILE), Some(Kernel::MatMul(encoding, TILE))),
                None => (Groups::Spread(groups, 1), None),
            };
            let mut draft = Draft::new(Kernel::MatMul(encoding, 1), groups, &parameters);
            draft.several = several;
            draft.weights = Some(part.arena);
            draft.second = bias.map(|(arena, _)| arena);
            draft.tables = tables_of(encoding);
            self.push(draft);
        }
        Ok(())
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

    /// Parameters that say where a layer's keys and values are.
    fn cache_parameters(&self, parameters: &mut [u32], layer: usize) -> Result<()> {
        let dims = &self.work.dims;
        let kv = dims.kv[layer];
        parameters[16] = (dims.capacity.kv == KvDtype::F32).into();
        parameters[17] = dims.capacity.max_context;
        parameters[18] = kv.kv_heads;
        parameters[19] = kv.head_dim;
        parameters[20] = word(keys_words(dims, kv).unwrap_or(u64::MAX))?;
        Ok(())
    }

    /// Where a RoPE table starts, in words.
    fn table(&self, id: TableId, n_rot: u32) -> Result<u32> {
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
        word(self.table_at[id.0 as usize])
    }

    /// One input, one output, element by element.
    fn unary(&mut self, kernel: Kernel, input: ValueId, out: ValueId, number: f32) -> Result<()> {
        let (place, width) = self.float(input)?;
        let out = self.float_out(out, width, &[input])?;
        let parameters = [place, place, out, word(width)?, number.to_bits()];
        self.push(Draft::new(kernel, Groups::Elements(width), &parameters));
        Ok(())
    }

    /// Whether only the operation at `at + 1` reads what the one at `at` writes to `value`.
    fn read_once(&self, at: usize, value: ValueId) -> bool {
        if value == self.program.logits {
            return false;
        }
        for op in self.program.ops.iter().skip(at + 2) {
            let (reads, writes) = operands(&op.kind);
            if reads.contains(&value) {
                return false;
            }
            if writes.contains(&value) {
                return true;
            }
        }
        true
    }

    /// An activation whose result only the multiplication after it reads, as one kernel; whether that was done.
    fn gate(&mut self, at: usize) -> Result<bool> {
        let (Some(first), Some(second)) = (self.program.ops.get(at), self.program.ops.get(at + 1)) else {
            return Ok(false);
        };
        let (OpKind::Activation { input, kind, out }, OpKind::Mul { a, b, out: product }) =
            (&first.kind, &second.kind)
        else {
            return Ok(false);
        };
        let (input, out, product) = (*input, *out, *product);
        let other = if *a == out { *b } else { *a };
        let fits =
            (*a == out || *b == out) && other != out && product != input && at + 1 != self.program.tail;
        if !fits || !self.read_once(at, out) {
            return Ok(false);
        }
        let (x, width) = self.float(input)?;
        // Checked as if it were written, so that both ways refuse the same programs.
        self.float_out(out, width, &[input])?;
        self.op = OpName::Mul;
        let y = self.float_of(other, width)?;
        let to = self.float_out(product, width, &[out, other])?;
        let kernel = match kind {
            ActivationKind::Silu => Kernel::SiluMul,
            ActivationKind::GeluTanh => Kernel::GeluTanhMul,
        };
        let parameters = [x, y, to, word(width)?];
        self.push(Draft::new(kernel, Groups::Elements(width), &parameters));
        Ok(true)
    }

    fn compile(&mut self, op: &Op) -> Result<()> {
        match op.kind {
            OpKind::Embed { weight, out } => self.embed(weight, out, self.program.vocab.into(), false),
            OpKind::EmbedPosition { weight, out } => {
                self.embed(weight, out, self.program.max_context.into(), true)
            }
            OpKind::RmsNorm {
                input,
                weight,
                eps,
                rows,
                out,
            } => {
                let width = self.kind(input)?.1;
                if rows == 0 || width % u64::from(rows) != 0 {
                    return Err(self.refuse("rows", format!("a divisor of {width}"), rows));
                }
                self.norm(Kernel::RmsNorm, input, out, eps, rows, weight, None)
            }
            OpKind::LayerNorm {
                input,
                weight,
                bias,
                eps,
                out,
            } => self.norm(Kernel::LayerNorm, input, out, eps, 1, weight, Some(bias)),
            OpKind::Quantise { input, out } => self.quantise(input, out),
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
                self.product(weight, input, bias, (out, shape.rows), None)
            }
            OpKind::Rope {
                value,
                table,
                style,
                heads,
                n_rot,
            } => {
                let (place, width) = self.float(value)?;
                let head_dim = width.checked_div(heads.into()).unwrap_or(0);
                let whole = head_dim.checked_mul(heads.into()) == Some(width);
                if head_dim == 0 || !whole || u64::from(n_rot) > head_dim || !n_rot.is_multiple_of(2) {
                    let found = format!("{heads} heads of {width} in all, {n_rot} turned");
                    return Err(self.refuse("heads", "equal heads, an even part of which is turned", found));
                }
                let table = self.table(table, n_rot)?;
                self.write(value);
                if n_rot == 0 {
                    return Ok(());
                }
                let half_split = style == RopeStyle::HalfSplit;
                let parameters = [
                    place,
                    word(width)?,
                    word(head_dim)?,
                    n_rot,
                    table,
                    half_split.into(),
                ];
                let pairs = u64::from(heads) * u64::from(n_rot / 2);
                let groups = Groups::Tokens(word(pairs.div_ceil(THREADS))?, 1);
                let mut draft = Draft::new(Kernel::Rope, groups, &parameters);
                draft.tables = Tables::Rope;
                self.push(draft);
                Ok(())
            }
            OpKind::StoreKv { key, value } => {
                let (layer, kv_heads, head_dim) = self.kv()?;
                if self.in_tail {
                    return Err(self.refuse("its place", "before the tail", "in the tail"));
                }
                self.stored[layer] = true;
                let width = kv_heads * head_dim;
                let mut parameters = [0; 21];
                parameters[0] = self.float_of(key, width)?;
                parameters[1] = self.float_of(value, width)?;
                parameters[2] = self.step;
                self.cache_parameters(&mut parameters, layer)?;
                let dims = &self.work.dims;
                let words = crate::workspace::position_words(dims.kv[layer], dims.capacity.kv) * kv_heads;
                let groups = Groups::Tokens(word(words.div_ceil(THREADS))?, 1);
                let mut draft = Draft::new(Kernel::StoreKv, groups, &parameters);
                draft.cache = Some(layer);
                self.push(draft);
                Ok(())
            }
            OpKind::Attention {
                query,
                heads,
                scale,
                window,
                soft_cap,
                out,
            } => self.attention(query, heads, scale, window, soft_cap, out),
            OpKind::Activation { input, kind, out } => {
                let kernel = match kind {
                    ActivationKind::Silu => Kernel::Silu,
                    ActivationKind::GeluTanh => Kernel::GeluTanh,
                };
                self.unary(kernel, input, out, 0.0)
            }
            OpKind::Scale { input, factor, out } => self.unary(Kernel::Scale, input, out, factor),
            OpKind::SoftCap { input, cap, out } => self.unary(Kernel::SoftCap, input, out, cap),
            OpKind::Mul { a, b, out } => self.binary(Kernel::Mul, a, b, out, &[a, b]),
            OpKind::Add { a, b, out } => self.binary(Kernel::Add, a, b, out, &[]),
            OpKind::RouterTopK {
                logits,
                k,
                normalise,
                experts,
                weights,
            } => self.router(logits, k, normalise, experts, weights),
            OpKind::ExpertMatMul {
                input,
                experts,
                weight,
                out,
            } => {
                let (place, k, value) = self.experts_of(experts)?;
                let (weight, shape, vectors) = self.matrix(weight, input)?;
                if vectors != 1 && vectors != k {
                    return Err(self.refuse("the input", format!("1 or {k} vectors"), vectors));
                }
                if shape.matrices < self.experts[value] {
                    return Err(self.refuse(
                        "experts",
                        format!("at most {}", shape.matrices),
                        self.experts[value],
                    ));
                }
                let width = k.saturating_mul(shape.rows);
                self.product(weight, input, None, (out, width), Some((place, k, vectors == 1)))
            }
            OpKind::WeightedSum {
                input,
                experts,
                weights,
                out,
            } => {
                let (place, k, _) = self.experts_of(experts)?;
                let (x, width) = self.float(input)?;
                let chosen = self.float_of(weights, k)?;
                if k == 0 || width % k != 0 {
                    return Err(self.refuse("width of the input", format!("a multiple of {k}"), width));
                }
                let out = self.float_out(out, width / k, &[input, weights])?;
                let parameters = [x, word(width / k)?, word(k)?, 0, place, chosen, out];
                let groups = Groups::Tokens(word((width / k).div_ceil(THREADS))?, 1);
                self.push(Draft::new(Kernel::WeightedSum, groups, &parameters));
                Ok(())
            }
            _ => Err(unsupported(UnsupportedWhat::Op(op.kind.name()))),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the operands of one operation")]
    fn norm(
        &mut self,
        kernel: Kernel,
        input: ValueId,
        out: ValueId,
        eps: f32,
        rows: u32,
        gamma: WeightRef,
        beta: Option<WeightRef>,
    ) -> Result<()> {
        let (x, width) = self.float(input)?;
        let n = width / u64::from(rows);
        let gamma = self.vector(gamma, n)?;
        let beta = beta.map(|b| self.vector(b, n)).transpose()?;
        let out = self.float_out(out, width, &[input])?;
        let parameters = [
            x,
            out,
            word(n)?,
            (n as f32).to_bits(),
            eps.to_bits(),
            gamma.1,
            beta.map_or(0, |b| b.1),
            rows,
        ];
        let mut draft = Draft::new(kernel, Groups::Tokens(rows, 1), &parameters);
        draft.weights = Some(gamma.0);
        draft.second = beta.map(|b| b.0);
        self.push(draft);
        Ok(())
    }

    fn quantise(&mut self, input: ValueId, out: ValueId) -> Result<()> {
        let (x, width) = self.float(input)?;
        let (ValueKind::Quantized { vectors }, found) = self.kind(out)? else {
            return Err(self.refuse("the output", "quantised values", "another kind"));
        };
        let cols = width.checked_div(vectors.into()).unwrap_or(0);
        let whole = cols.checked_mul(vectors.into()) == Some(width) && cols.is_multiple_of(32);
        if found != width || cols == 0 || !whole || cols > hoist_quant::MAX_COLS {
            let expected = format!(
                "{width} in vectors of a multiple of 32, up to {}",
                hoist_quant::MAX_COLS
            );
            return Err(self.refuse("the output", expected, format!("{found} in {vectors} vectors")));
        }
        let value = self.write(out);
        let parameters = [x, self.place(value)?, word(cols)?, vectors, self.step];
        let groups = Groups::Tokens(word(cols.div_ceil(256))?, vectors);
        self.push(Draft::new(Kernel::Quantise, groups, &parameters));
        Ok(())
    }

    fn binary(
        &mut self,
        kernel: Kernel,
        a: ValueId,
        b: ValueId,
        out: ValueId,
        kept: &[ValueId],
    ) -> Result<()> {
        let (x, width) = self.float(a)?;
        let y = self.float_of(b, width)?;
        let out = self.float_out(out, width, kept)?;
        let parameters = [x, y, out, word(width)?];
        self.push(Draft::new(kernel, Groups::Elements(width), &parameters));
        Ok(())
    }

    fn attention(
        &mut self,
        query: ValueId,
        heads: u32,
        scale: f32,
        window: Option<u32>,
        soft_cap: Option<f32>,
        out: ValueId,
    ) -> Result<()> {
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
        if head_dim > MAX_HEAD_DIM {
            return Err(unsupported(UnsupportedWhat::Limit {
                what: "elements of a head",
                limit: MAX_HEAD_DIM,
                found: head_dim,
            }));
        }
        let width = u64::from(heads) * head_dim;
        let q = self.float_of(query, width)?;
        let out = self.float_out(out, width, &[query])?;
        let context = self.program.max_context;
        let token = attention_words(heads.into(), head_dim, context.into()).unwrap_or(u64::MAX);
        let together = self.work.places.scratch_words / token.max(1);
        if together == 0 {
            return Err(unsupported(UnsupportedWhat::Limit {
                what: "words of attention's scratch",
                limit: self.work.places.scratch_words,
                found: token,
            }));
        }
        self.tokens = self.tokens.min(together);
        let mut parameters = [0; 21];
        parameters[..8].copy_from_slice(&[
            q,
            out,
            heads,
            scale.to_bits(),
            window.unwrap_or(NONE),
            soft_cap.map_or(NONE, f32::to_bits),
            word(self.work.places.scratch)?,
            context.div_ceil(crate::shaders::SPLIT as u32) + 1,
        ]);
        self.cache_parameters(&mut parameters, layer)?;
        for (kernel, groups) in [
            (Kernel::Attend, Groups::Attention(heads, window)),
            (Kernel::Merge, Groups::Merge(heads, window)),
        ] {
            let mut draft = Draft::new(kernel, groups, &parameters);
            draft.cache = Some(layer);
            self.push(draft);
        }
        Ok(())
    }

    fn router(
        &mut self,
        logits: ValueId,
        k: u32,
        normalise: bool,
        experts: ValueId,
        weights: ValueId,
    ) -> Result<()> {
        let (x, n) = self.float(logits)?;
        let (ValueKind::Experts, found) = self.kind(experts)? else {
            return Err(self.refuse("the output", "experts", "another kind"));
        };
        if found != u64::from(k) || k == 0 || u64::from(k) > n {
            return Err(self.refuse("k", format!("1 … {n}, as many as the output holds ({found})"), k));
        }
        let together = self.work.places.scratch_words / n.max(1);
        if together == 0 {
            return Err(unsupported(UnsupportedWhat::Limit {
                what: "experts",
                limit: self.work.places.scratch_words,
                found: n,
            }));
        }
        self.tokens = self.tokens.min(together);
        self.experts[experts.0 as usize] = n;
        let value = self.write(experts);
        let chosen = self.float_out(weights, k.into(), &[logits])?;
        let parameters = [
            x,
            word(n)?,
            k,
            normalise.into(),
            self.place(value)?,
            chosen,
            word(self.work.places.scratch)?,
        ];
        self.push(Draft::new(Kernel::RouterTopK, Groups::Tokens(1, 1), &parameters));
        Ok(())
    }
}

fn part_parameters(parameters: &mut [u32; 18], part: &Part) -> Result<()> {
    parameters[5] = word(part.at)?;
    parameters[6] = word(part.first)?;
    parameters[7] = word(part.rows)?;
    parameters[8] = word(part.constants / 4)?;
    Ok(())
}

fn tables_of(encoding: Encoding) -> Tables {
    match encoding {
        Encoding::IQ1_S
        | Encoding::IQ1_M
        | Encoding::IQ2_XXS
        | Encoding::IQ2_XS
        | Encoding::IQ2_S
        | Encoding::IQ3_XXS
        | Encoding::IQ3_S => Tables::Grids,
        _ => Tables::None,
    }
}

/// What compiling needs besides the program.
pub(crate) struct Context<'a> {
    pub(crate) gpu: &'a Gpu,
    pub(crate) pipelines: &'a mut Pipelines,
    pub(crate) grids: &'a Buffer,
    pub(crate) index: &'a WeightIndex,
    pub(crate) residency: &'a mut Residency,
    pub(crate) work: &'a Workspace,
}

/// Resolves and checks a program, and makes everything that running it takes.
pub(crate) fn compile(program: &DecodeProgram, context: Context<'_>) -> Result<Compiled> {
    let Context {
        gpu,
        pipelines,
        grids,
        index,
        residency,
        work,
    } = context;
    let dims = &work.dims;
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
    let table_at = program.tables.iter().scan(0u64, |at, table| {
        let here = *at;
        *at += table.data.len() as u64;
        Some(here)
    });
    let mut compiler = Compiler {
        program,
        index,
        residency,
        work,
        table_at: table_at.collect(),
        op: OpName::Embed,
        layer: None,
        step: 0,
        in_tail: false,
        written: vec![false; values],
        written_in_tail: vec![false; values],
        carried: Vec::new(),
        experts: vec![0; values],
        stored: vec![false; program.kv.len()],
        multiplied: Vec::new(),
        drafts: Vec::new(),
        tokens: work.places.tokens,
    };
    let mut steps: Vec<_> = program.ops.iter().map(|op| (op.kind.name(), op.layer)).collect();
    let mut at = 0;
    while let Some(op) = program.ops.get(at) {
        compiler.op = op.kind.name();
        compiler.layer = op.layer;
        compiler.step = word(at as u64)?;
        compiler.in_tail = at >= program.tail;
        if compiler.gate(at)? {
            at += 2;
        } else {
            compiler.compile(op)?;
            at += 1;
        }
    }
    compiler.op = OpName::Logits;
    compiler.layer = None;
    compiler.in_tail = true;
    let logits = compiler.float_of(program.logits, program.vocab.into())?;
    let layer = program
        .ops
        .iter()
        .rfind(|op| op.kind.name() == OpName::Logits)
        .and_then(|op| op.layer);
    steps.push((OpName::Logits, layer));
    let arg_max = [
        logits,
        program.vocab,
        word(work.places.arg_max)?,
        word(program.ops.len() as u64)?,
    ];
    compiler.push(Draft::new(Kernel::ArgMax, Groups::Tokens(1, 1), &arg_max));
    let mut gathers = Vec::new();
    for value in &compiler.carried {
        let (kind, width) = dims.values[*value];
        let width = value_words(kind, width).unwrap_or(0);
        let parameters = [compiler.place(*value)?, word(width)?];
        let groups = Groups::Once(word(width.div_ceil(THREADS))?);
        let mut draft = Draft::new(Kernel::Gather, groups, &parameters);
        draft.in_tail = true;
        gathers.push(draft);
    }
    let Compiler {
        drafts,
        multiplied,
        tokens,
        ..
    } = compiler;
    for weight in multiplied {
        row_constants(gpu, pipelines, grids, residency, work, weight)?;
    }
    let mut data = Vec::with_capacity(program.tables.iter().map(|t| t.data.len()).sum());
    for table in &program.tables {
        data.extend_from_slice(&table.data);
    }
    if !data.is_empty() {
        gpu.queue
            .write_buffer(&work.tables, 0, bytemuck::cast_slice(&data));
    }
    let bound = Bound {
        gpu,
        pipelines,
        grids,
        residency,
        work,
        parameters: parameters(gpu, drafts.iter().chain(&gathers))?,
    };
    let mut body = Vec::new();
    let mut tail = Vec::new();
    let mut gather = Vec::new();
    let mut bound = bound;
    for (i, draft) in drafts.iter().enumerate() {
        let launch = bound.launch(draft, i)?;
        if draft.in_tail {
            tail.push(launch);
        } else {
            body.push(launch);
        }
    }
    for (i, draft) in gathers.iter().enumerate() {
        gather.push(bound.launch(draft, drafts.len() + i)?);
    }
    let parameters = bound.parameters;
    gpu.queue.submit([]);
    gpu.check("preparing a program", 0)?;
    Ok(Compiled {
        body,
        gather,
        tail,
        steps,
        vocab: program.vocab,
        logits: program.logits.0 as usize,
        tokens: tokens.max(1) as usize,
        _parameters: parameters,
    })
}

/// Bytes from one launch's parameters to the next one's: what every device allows bindings to start at.
const PARAMETER_STRIDE: u64 = 256;

const _: () = assert!(PARAMETER_BYTES <= PARAMETER_STRIDE);

/// One buffer with the parameters of all launches.
fn parameters<'a>(gpu: &Gpu, drafts: impl Iterator<Item = &'a Draft>) -> Result<Buffer> {
    let mut words = Vec::new();
    for draft in drafts {
        words.extend_from_slice(&draft.parameters);
        words.resize(words.len().next_multiple_of(PARAMETER_STRIDE as usize / 4), 0u32);
    }
    let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
    let buffer = gpu.buffer("parameters", 4 * words.len() as u64, usage)?;
    gpu.queue.write_buffer(&buffer, 0, bytemuck::cast_slice(&words));
    Ok(buffer)
}

struct Bound<'a> {
    gpu: &'a Gpu,
    pipelines: &'a mut Pipelines,
    grids: &'a Buffer,
    residency: &'a Residency,
    work: &'a Workspace,
    parameters: Buffer,
}

impl Bound<'_> {
    fn launch(&mut self, draft: &Draft, place: usize) -> Result<Launch> {
        let work = self.work;
        let [read, written] = &work.nothing;
        let arena = |a: Option<usize>| a.map_or(read, |a| &self.residency.arenas[a]);
        let bindings = Bindings {
            parameters: (&self.parameters, place as u64 * PARAMETER_STRIDE),
            batch: (
                &work.batch,
                if draft.in_tail { work.tail_at } else { 0 },
                work.tail_at,
            ),
            work: &work.work,
            weights: arena(draft.weights),
            second: arena(draft.second),
            tables: match draft.tables {
                Tables::None => read,
                Tables::Rope => &work.tables,
                Tables::Grids => self.grids,
            },
            cache: draft.cache.map_or(written, |layer| &work.caches[layer]),
            status: &work.status,
        };
        let bindings = self.pipelines.bind(self.gpu, &bindings)?;
        Ok(Launch {
            several: draft
                .several
                .map(|kernel| self.pipelines.kernel(self.gpu, kernel))
                .transpose()?,
            pipeline: self.pipelines.kernel(self.gpu, draft.kernel)?,
            bindings,
            groups: draft.groups,
        })
    }
}

/// Computes what is kept beside the rows of a quantised weight, once.
fn row_constants(
    gpu: &Gpu,
    pipelines: &mut Pipelines,
    grids: &Buffer,
    residency: &mut Residency,
    work: &Workspace,
    weight: usize,
) -> Result<()> {
    let resident = &residency.weights[weight];
    if resident.constants_done {
        return Ok(());
    }
    let kernel = Kernel::Exponents(resident.encoding);
    let pipeline = pipelines.kernel(gpu, kernel)?;
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    for part in &resident.parts {
        let mut p = [0; 18];
        p[2] = word(resident.row_bytes())?;
        p[3] = word(resident.shape.rows)?;
        p[4] = word(resident.shape.cols)?;
        p[11] = word(resident.shape.cols.div_ceil(256))?;
        p[17] = word(resident.encoding.matrix_prefix_bytes())?;
        part_parameters(&mut p, part)?;
        let groups = Groups::Spread(part.rows.div_ceil(THREADS), 1);
        let draft = Draft::new(kernel, groups, &p);
        let parameters = parameters(gpu, std::iter::once(&draft))?;
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC;
        let found = gpu.buffer("row constants", 4 * part.rows, usage)?;
        let [read, written] = &work.nothing;
        let bindings = pipelines.bind(
            gpu,
            &Bindings {
                parameters: (&parameters, 0),
                batch: (&work.batch, 0, work.tail_at),
                work: &found,
                weights: &residency.arenas[part.arena],
                second: read,
                tables: grids,
                cache: written,
                status: &work.status,
            },
        )?;
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &bindings, &[]);
        let (x, y) = spread(part.rows.div_ceil(THREADS), gpu.most_groups);
        pass.dispatch_workgroups(x, y, 1);
        drop(pass);
        let arena = &residency.arenas[part.arena];
        encoder.copy_buffer_to_buffer(&found, 0, arena, part.constants, 4 * part.rows);
    }
    gpu.queue.submit([encoder.finish()]);
    gpu.check("row constants", 0)?;
    residency.weights[weight].constants_done = true;
    Ok(())
}

/// At least `n` workgroups over two dimensions of at most `most`.
pub(crate) fn spread(n: u64, most: u32) -> (u32, u32) {
    let rows = n.div_ceil(most.into()).max(1);
    let columns = n.div_ceil(rows).max(1);
    // Both are below `most` for anything that fits a buffer's 2^32 bytes.
    (columns as u32, rows.min(most.into()) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_groups_are_enough_and_within_the_limit() {
        for n in [1, 2, 65535, 65536, 65537, 262_144, 1 << 30] {
            let (x, y) = spread(n, 65535);
            assert!(x <= 65535 && y <= 65535, "{n}");
            assert!(u64::from(x) * u64::from(y) >= n, "{n}");
            assert!(u64::from(x) * u64::from(y) < n + u64::from(y), "{n}");
        }
    }
}
