//! A decode program as launches of kernels.

use std::collections::HashSet;
use std::ops::Range;

use hoist_backend::{
    ActivationKind, DecodeProgram, Encoding, Error, FloatLayout, KvDtype, OpName, ResolvedProgram, Result,
    RopeStyle, StepKind, UnsupportedWhat, Want, WeightFacts, WeightIndex,
};
use wgpu::{BindGroup, Buffer, BufferUsages, CommandBuffer, ComputePipeline};

use crate::device::Gpu;
use crate::fusion::{Fused, MOST_PARTS, fuse};
use crate::pipelines::{Bindings, PARAMETER_BYTES};
use crate::residency::{Part, Residency, Resident};
use crate::shaders::{Kernel, MAX_HEAD_DIM, PAIRS, PART_LOGITS, THREADS};
use crate::workspace::{Workspace, attention_words, keys_words, value_words};

/// No bias, no window, no soft cap, nothing to add.
const NONE: u32 = u32::MAX;

/// Vectors that a matrix product takes at a time when there are several.
const TILE: u32 = 4;

/// Words of a kernel's parameters.
const PARAMETER_WORDS: usize = (PARAMETER_BYTES / 4) as usize;

/// Where the parameters of parts of matrices start, and how many words each has; `matmul_parameters.wgsl` says the same.
const FIRST_PART: usize = 16;
const PART_WORDS: usize = 8;

const _: () = assert!(FIRST_PART + PART_WORDS * MOST_PARTS <= PARAMETER_WORDS);

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

/// Commands for a step of one token.
#[derive(Debug)]
pub(crate) struct Ahead {
    pub(crate) want: Want,
    /// Splits that it sees in each of the program's windows.
    pub(crate) splits: Vec<u32>,
    pub(crate) commands: CommandBuffer,
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
    /// Windows of attention, each once.
    pub(crate) windows: Vec<Option<u32>>,
    /// The next step of one token, recorded while the one before it ran.
    pub(crate) ahead: Option<Ahead>,
    /// Tokens that run together.
    pub(crate) tokens: usize,
    _parameters: Buffer,
}

/// A launch before its buffers are bound.
#[derive(Debug)]
struct Draft {
    kernel: Kernel,
    several: Option<Kernel>,
    parameters: [u32; PARAMETER_WORDS],
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
        let mut all = [0; PARAMETER_WORDS];
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

/// A matrix to multiply with: weight, bias, where the result goes, and the step that it is.
#[derive(Clone, Copy)]
struct Factor {
    weight: usize,
    bias: Option<usize>,
    out: usize,
    step: usize,
}

/// Choices of experts that a product follows.
#[derive(Clone, Copy)]
struct Choices {
    experts: usize,
    shared: bool,
}

/// Parts of matrices that one launch multiplies with.
struct Batch {
    encoding: Encoding,
    common: [u32; FIRST_PART],
    arena: usize,
    biases: Option<usize>,
    /// Workgroups.
    groups: u64,
    parts: Vec<[u32; PART_WORDS]>,
}

struct Compiler<'a> {
    resolved: &'a ResolvedProgram,
    residency: &'a Residency,
    work: &'a Workspace,
    table_at: Vec<u64>,
    context: u32,
    /// Of the workgroups of quantised products.
    threads: u32,
    in_tail: bool,
    drafts: Vec<Draft>,
    windows: Vec<Option<u32>>,
    /// Tokens that can run together.
    tokens: u64,
}

impl Compiler<'_> {
    fn width(&self, value: usize) -> u64 {
        self.work.dims.values[value].1.into()
    }

    /// Where a value lies, in words.
    fn place(&self, value: usize) -> Result<u32> {
        word(self.work.places.values[value])
    }

    fn kind(&self, step: usize) -> &StepKind {
        &self.resolved.steps[step].kind
    }

    /// A vector's buffer, and its place there in words.
    fn vector(&self, weight: usize) -> Result<(usize, u32)> {
        match self.residency.weights[weight].parts.as_slice() {
            [part] => Ok((part.arena, word(part.at / 4)?)),
            // A vector is one row, which is never split.
            parts => Err(Error::internal(
                crate::NAME,
                format!("a vector in {} parts", parts.len()),
            )),
        }
    }

    fn push(&mut self, mut draft: Draft) {
        draft.in_tail = self.in_tail;
        self.drafts.push(draft);
    }

    fn unfit(&self, step: usize) -> Error {
        Error::internal(crate::NAME, format!("step {step} is not what was fused"))
    }

    fn compile(&mut self, fused: &Fused) -> Result<()> {
        match *fused {
            Fused::Alone(step) => self.step(step),
            Fused::NormAdd { norm, add } => {
                let (StepKind::RmsNorm { out, .. }, StepKind::Add { a, b, out: sum }) =
                    (self.kind(norm), self.kind(add))
                else {
                    return Err(self.unfit(norm));
                };
                let (other, sum) = (if a == out { *b } else { *a }, *sum);
                self.norm(norm, Some((other, sum)), None)
            }
            Fused::NormQuantise { norm, quantise } => {
                let (&StepKind::RmsNorm { out, weight, .. }, &StepKind::Quantise { cols, .. }) =
                    (self.kind(norm), self.kind(quantise))
                else {
                    return Err(self.unfit(norm));
                };
                let width = self.width(out);
                if self.residency.weights[weight].shape.cols == width && cols as u64 == width {
                    return self.norm(norm, None, Some(quantise));
                }
                // Several vectors: a workgroup for each of them normalises, one for each segment quantises.
                self.step(norm)?;
                self.step(quantise)
            }
            Fused::Products(ref steps) => {
                let mut factors = Vec::with_capacity(steps.len());
                let mut from = None;
                for step in steps.clone() {
                    let &StepKind::MatMul {
                        input,
                        weight,
                        bias,
                        out,
                    } = self.kind(step)
                    else {
                        return Err(self.unfit(step));
                    };
                    from = Some(input);
                    factors.push(Factor {
                        weight,
                        bias,
                        out,
                        step,
                    });
                }
                from.map_or(Ok(()), |input| self.products(input, &factors, None, None))
            }
            Fused::ProductAdd { product, add } => {
                let (
                    &StepKind::MatMul {
                        input,
                        weight,
                        bias,
                        out,
                    },
                    &StepKind::Add { a, b, out: sum },
                ) = (self.kind(product), self.kind(add))
                else {
                    return Err(self.unfit(product));
                };
                let factor = Factor {
                    weight,
                    bias,
                    out: sum,
                    step: product,
                };
                self.products(input, &[factor], Some(if a == out { b } else { a }), None)
            }
            Fused::Gate { activation, mul } => self.gate(activation, mul, None),
            Fused::GateQuantise {
                activation,
                mul,
                quantise,
            } => self.gate(activation, mul, Some(quantise)),
            Fused::RopeStoreKv { query, store } => self.store(store, Some(query)),
        }
    }

    fn step(&mut self, step: usize) -> Result<()> {
        match *self.kind(step) {
            StepKind::Embed { weight, out } => self.embed(weight, out, false),
            StepKind::EmbedPosition { weight, out } => self.embed(weight, out, true),
            StepKind::RmsNorm { .. } | StepKind::LayerNorm { .. } => self.norm(step, None, None),
            StepKind::Quantise { input, cols, out } => {
                let x = self.place(input)?;
                self.quantise(Kernel::Quantise, x, 0, cols, out, step)
            }
            StepKind::MatMul {
                input,
                weight,
                bias,
                out,
            } => {
                let factor = Factor {
                    weight,
                    bias,
                    out,
                    step,
                };
                self.products(input, &[factor], None, None)
            }
            StepKind::Rope { value, .. } => {
                let mut parameters = [0; 6];
                if self.rope_parameters(&mut parameters, step)? == 0 {
                    return Ok(());
                }
                let pairs = self.pairs(step, value);
                let groups = Groups::Tokens(word(pairs.div_ceil(THREADS))?, 1);
                let mut draft = Draft::new(Kernel::Rope, groups, &parameters);
                draft.tables = Tables::Rope;
                self.push(draft);
                Ok(())
            }
            StepKind::StoreKv { .. } => self.store(step, None),
            StepKind::Attention { .. } => self.attention(step),
            StepKind::Activation { input, kind, out } => {
                let kernel = match kind {
                    ActivationKind::Silu => Kernel::Silu,
                    ActivationKind::GeluTanh => Kernel::GeluTanh,
                };
                self.elementwise(kernel, input, input, out, 0.0)
            }
            StepKind::Scale { input, factor, out } => {
                self.elementwise(Kernel::Scale, input, input, out, factor)
            }
            StepKind::SoftCap { input, cap, out } => {
                self.elementwise(Kernel::SoftCap, input, input, out, cap)
            }
            StepKind::Mul { a, b, out } => self.elementwise(Kernel::Mul, a, b, out, 0.0),
            StepKind::Add { a, b, out } => self.elementwise(Kernel::Add, a, b, out, 0.0),
            StepKind::RouterTopK {
                logits,
                normalise,
                experts,
                weights,
            } => self.router(logits, normalise, experts, weights),
            StepKind::ExpertMatMul {
                input,
                shared,
                experts,
                weight,
                out,
            } => {
                let factor = Factor {
                    weight,
                    bias: None,
                    out,
                    step,
                };
                self.products(input, &[factor], None, Some(Choices { experts, shared }))
            }
            StepKind::WeightedSum {
                input,
                experts,
                weights,
                out,
            } => {
                let width = self.width(out);
                let parameters = [
                    self.place(input)?,
                    word(width)?,
                    word(self.width(experts))?,
                    0,
                    self.place(experts)?,
                    self.place(weights)?,
                    self.place(out)?,
                ];
                let groups = Groups::Tokens(word(width.div_ceil(THREADS))?, 1);
                self.push(Draft::new(Kernel::WeightedSum, groups, &parameters));
                Ok(())
            }
        }
    }

    fn embed(&mut self, weight: usize, out: usize, positions: bool) -> Result<()> {
        let resident = &self.residency.weights[weight];
        let (encoding, width) = (resident.encoding, resident.shape.cols);
        let parts = resident.parts.clone();
        let mut common = matrix_parameters(resident)?;
        common[12] = positions.into();
        let each = if encoding.is_float() { 1 } else { 4 };
        let groups = Groups::Spread(width.div_ceil(each).div_ceil(THREADS), 1);
        for part in &parts {
            let mut draft = Draft::new(Kernel::Embed(encoding), groups, &common);
            let of_part = part_parameters(part, self.place(out)?, word(width)?, NONE, 0)?;
            draft.parameters[FIRST_PART..FIRST_PART + PART_WORDS].copy_from_slice(&of_part);
            draft.weights = Some(part.arena);
            draft.tables = tables_of(encoding);
            self.push(draft);
        }
        Ok(())
    }

    /// Products of one input with every part of some weights; those that can be run as one launch.
    fn products(
        &mut self,
        input: usize,
        factors: &[Factor],
        add: Option<usize>,
        choices: Option<Choices>,
    ) -> Result<()> {
        let mut batches: Vec<Batch> = Vec::new();
        for factor in factors {
            let resident = &self.residency.weights[factor.weight];
            let (encoding, shape) = (resident.encoding, resident.shape);
            let bias = factor.bias.map(|b| self.vector(b)).transpose()?;
            let width = word(self.width(factor.out))?;
            let common = matrix_parameters(resident)?;
            // What stands in front of matrices, and experts, is found by the rows of one matrix.
            let alone = choices.is_some() || encoding.matrix_prefix_bytes() > 0;
            for part in &resident.parts {
                let rows = if choices.is_some() { shape.rows } else { part.rows };
                let each = if encoding.is_quantized() {
                    PAIRS >> lanes_log2(shape.cols)
                } else {
                    1
                };
                let groups = rows.div_ceil(each);
                let parameters = part_parameters(
                    part,
                    self.place(factor.out)?,
                    width,
                    bias.map_or(NONE, |(_, at)| at),
                    word(factor.step as u64)?,
                )?;
                let biases = bias.map(|(arena, _)| arena);
                let fits = batches.iter_mut().find(|b| {
                    !alone
                        && b.encoding == encoding
                        && b.common[3] == common[3]
                        && b.arena == part.arena
                        && (b.biases.is_none() || biases.is_none() || b.biases == biases)
                        && b.parts.len() < MOST_PARTS
                });
                if let Some(batch) = fits {
                    batch.biases = batch.biases.or(biases);
                    batch.groups += groups;
                    batch.parts.push(parameters);
                } else {
                    batches.push(Batch {
                        encoding,
                        common,
                        arena: part.arena,
                        biases,
                        groups,
                        parts: vec![parameters],
                    });
                }
            }
        }
        for batch in batches {
            let (encoding, mut common) = (batch.encoding, batch.common);
            common[0] = self.place(input)?;
            common[10] = add.map_or(Ok(NONE), |other| self.place(other))?;
            common[11] = word(batch.parts.len() as u64)?;
            let mut k = 0;
            if let Some(Choices { experts, shared }) = choices {
                k = word(self.width(experts))?;
                common[7] = k;
                common[8] = self.place(experts)?;
                common[9] = shared.into();
            }
            let groups = match choices {
                Some(_) => Groups::Choices(batch.groups, k),
                None if encoding.is_quantized() => Groups::Spread(batch.groups, TILE),
                None => Groups::Spread(batch.groups, 1),
            };
            let mut draft = Draft::new(Kernel::MatMul(encoding, 1, self.threads), groups, &common);
            for (i, part) in batch.parts.iter().enumerate() {
                let at = FIRST_PART + i * PART_WORDS;
                draft.parameters[at..at + PART_WORDS].copy_from_slice(part);
            }
            if choices.is_none() && encoding.is_quantized() && self.work.places.tokens > 1 {
                draft.several = Some(Kernel::MatMul(encoding, TILE, self.threads));
            }
            draft.weights = Some(batch.arena);
            draft.second = batch.biases;
            draft.tables = tables_of(encoding);
            self.push(draft);
        }
        Ok(())
    }

    /// RmsNorm or LayerNorm; `add`: what is added to the result, and where the sum goes.
    fn norm(&mut self, step: usize, add: Option<(usize, usize)>, quantise: Option<usize>) -> Result<()> {
        let (input, out, eps, gamma, beta, mut kernel) = match *self.kind(step) {
            StepKind::RmsNorm {
                input,
                weight,
                eps,
                out,
            } => (input, out, eps, weight, None, Kernel::RmsNorm),
            StepKind::LayerNorm {
                input,
                weight,
                bias,
                eps,
                out,
            } => (input, out, eps, weight, Some(bias), Kernel::LayerNorm),
            _ => return Err(self.unfit(step)),
        };
        let width = self.width(input);
        let n = self.residency.weights[gamma].shape.cols;
        let rows = word(width / n.max(1))?;
        let gamma = self.vector(gamma)?;
        let beta = beta.map(|b| self.vector(b)).transpose()?;
        let mut parameters = [
            self.place(input)?,
            self.place(add.map_or(out, |(_, sum)| sum))?,
            word(n)?,
            (n as f32).to_bits(),
            eps.to_bits(),
            gamma.1,
            beta.map_or(0, |b| b.1),
            rows,
            add.map_or(Ok(NONE), |(other, _)| self.place(other))?,
            0,
            0,
        ];
        if let Some(quantise) = quantise {
            let &StepKind::Quantise { out, .. } = self.kind(quantise) else {
                return Err(self.unfit(quantise));
            };
            kernel = Kernel::NormQuantise;
            parameters[9] = self.place(out)?;
            parameters[10] = word(quantise as u64)?;
        }
        let mut draft = Draft::new(kernel, Groups::Tokens(rows, 1), &parameters);
        draft.weights = Some(gamma.0);
        draft.second = beta.map(|b| b.0);
        self.push(draft);
        Ok(())
    }

    fn quantise(
        &mut self,
        kernel: Kernel,
        x: u32,
        y: u32,
        cols: usize,
        out: usize,
        step: usize,
    ) -> Result<()> {
        let cols = cols as u64;
        let vectors = word(self.width(out) / cols.max(1))?;
        let parameters = [x, self.place(out)?, word(cols)?, vectors, word(step as u64)?, y];
        let groups = Groups::Tokens(word(cols.div_ceil(256))?, vectors);
        self.push(Draft::new(kernel, groups, &parameters));
        Ok(())
    }

    fn gate(&mut self, activation: usize, mul: usize, quantise: Option<usize>) -> Result<()> {
        let (&StepKind::Activation { input, kind, out }, &StepKind::Mul { a, b, out: product }) =
            (self.kind(activation), self.kind(mul))
        else {
            return Err(self.unfit(activation));
        };
        let other = if a == out { b } else { a };
        let Some(quantise) = quantise else {
            let kernel = match kind {
                ActivationKind::Silu => Kernel::SiluMul,
                ActivationKind::GeluTanh => Kernel::GeluTanhMul,
            };
            return self.elementwise(kernel, input, other, product, 0.0);
        };
        let &StepKind::Quantise { cols, out, .. } = self.kind(quantise) else {
            return Err(self.unfit(quantise));
        };
        let kernel = match kind {
            ActivationKind::Silu => Kernel::SiluMulQuantise,
            ActivationKind::GeluTanh => Kernel::GeluTanhMulQuantise,
        };
        let (x, y) = (self.place(input)?, self.place(other)?);
        self.quantise(kernel, x, y, cols, out, quantise)
    }

    fn elementwise(&mut self, kernel: Kernel, a: usize, b: usize, out: usize, number: f32) -> Result<()> {
        let width = self.width(out);
        let parameters = [
            self.place(a)?,
            self.place(b)?,
            self.place(out)?,
            word(width)?,
            number.to_bits(),
        ];
        self.push(Draft::new(kernel, Groups::Elements(width), &parameters));
        Ok(())
    }

    /// Pairs of a value that a Rope turns.
    fn pairs(&self, rope: usize, value: usize) -> u64 {
        match *self.kind(rope) {
            StepKind::Rope { head_dim, n_rot, .. } => {
                self.width(value) / (head_dim as u64).max(1) * (n_rot as u64 / 2)
            }
            _ => 0,
        }
    }

    /// The first six parameters of a Rope; how much of a head it turns.
    fn rope_parameters(&self, parameters: &mut [u32], step: usize) -> Result<usize> {
        let StepKind::Rope {
            value,
            table,
            style,
            head_dim,
            n_rot,
        } = *self.kind(step)
        else {
            return Err(self.unfit(step));
        };
        let half_split = style == RopeStyle::HalfSplit;
        parameters[..6].copy_from_slice(&[
            self.place(value)?,
            word(self.width(value))?,
            word(head_dim as u64)?,
            word(n_rot as u64)?,
            word(self.table_at[table])?,
            half_split.into(),
        ]);
        Ok(n_rot)
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

    /// StoreKv, and what turns its keys and the queries if that is fused.
    fn store(&mut self, step: usize, rope: Option<usize>) -> Result<()> {
        let StepKind::StoreKv { key, value, layer } = *self.kind(step) else {
            return Err(self.unfit(step));
        };
        let mut parameters = [0; 21];
        let mut threads = 0;
        if let Some(rope) = rope {
            self.rope_parameters(&mut parameters, rope)?;
            if let StepKind::Rope { value, .. } = *self.kind(rope) {
                threads = self.pairs(rope, value);
            }
        }
        parameters[6] = self.place(key)?;
        parameters[7] = self.place(value)?;
        parameters[8] = word(step as u64)?;
        self.cache_parameters(&mut parameters, layer)?;
        let dims = &self.work.dims;
        let kv = dims.kv[layer];
        threads += crate::workspace::position_words(kv, dims.capacity.kv) * u64::from(kv.kv_heads);
        let groups = Groups::Tokens(word(threads.div_ceil(THREADS))?, 1);
        let kernel = if rope.is_some() {
            Kernel::RopeStoreKv
        } else {
            Kernel::StoreKv
        };
        let mut draft = Draft::new(kernel, groups, &parameters);
        draft.cache = Some(layer);
        if rope.is_some() {
            draft.tables = Tables::Rope;
        }
        self.push(draft);
        Ok(())
    }

    fn attention(&mut self, step: usize) -> Result<()> {
        let StepKind::Attention {
            query,
            heads,
            scale,
            window,
            soft_cap,
            out,
            layer,
        } = *self.kind(step)
        else {
            return Err(self.unfit(step));
        };
        let head_dim = u64::from(self.work.dims.kv[layer].head_dim);
        if head_dim > MAX_HEAD_DIM {
            return Err(unsupported(UnsupportedWhat::Limit {
                what: "elements of a head",
                limit: MAX_HEAD_DIM,
                found: head_dim,
            }));
        }
        let token = attention_words(heads as u64, head_dim, self.context.into()).unwrap_or(u64::MAX);
        self.needs_scratch("words of attention's scratch", token)?;
        let heads = word(heads as u64)?;
        let mut parameters = [0; 21];
        parameters[..8].copy_from_slice(&[
            self.place(query)?,
            self.place(out)?,
            heads,
            scale.to_bits(),
            window.unwrap_or(NONE),
            soft_cap.map_or(NONE, f32::to_bits),
            word(self.work.places.scratch)?,
            self.context.div_ceil(crate::shaders::SPLIT as u32) + 1,
        ]);
        self.cache_parameters(&mut parameters, layer)?;
        if !self.windows.contains(&window) {
            self.windows.push(window);
        }
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

    /// Lets no more tokens run together than have `words` of scratch each.
    fn needs_scratch(&mut self, what: &'static str, words: u64) -> Result<()> {
        let limit = self.work.places.scratch_words;
        let together = limit / words.max(1);
        if together == 0 {
            return Err(unsupported(UnsupportedWhat::Limit {
                what,
                limit,
                found: words,
            }));
        }
        self.tokens = self.tokens.min(together);
        Ok(())
    }

    fn router(&mut self, logits: usize, normalise: bool, experts: usize, weights: usize) -> Result<()> {
        let n = self.width(logits);
        self.needs_scratch("experts", n)?;
        let parameters = [
            self.place(logits)?,
            word(n)?,
            word(self.width(experts))?,
            normalise.into(),
            self.place(experts)?,
            self.place(weights)?,
            word(self.work.places.scratch)?,
        ];
        self.push(Draft::new(Kernel::RouterTopK, Groups::Tokens(1, 1), &parameters));
        Ok(())
    }

    /// The look at the logits that follows the last operation.
    fn arg_max(&mut self) -> Result<()> {
        let vocab = self.resolved.vocab as u64;
        let parts = vocab.div_ceil(PART_LOGITS);
        self.needs_scratch("words of the arg-max's scratch", 2 * parts)?;
        let parameters = [
            self.place(self.resolved.logits)?,
            word(vocab)?,
            word(self.work.places.arg_max)?,
            word(self.resolved.steps.len() as u64)?,
            word(self.work.places.scratch)?,
            word(parts)?,
        ];
        let groups = Groups::Tokens(word(parts)?, 1);
        self.push(Draft::new(Kernel::ArgMaxOfPart, groups, &parameters));
        self.push(Draft::new(Kernel::ArgMax, Groups::Tokens(1, 1), &parameters));
        Ok(())
    }

    /// Moves what the tail reads of earlier values to its tokens.
    fn gathers(&self) -> Result<Vec<Draft>> {
        let gather = |value: &usize| {
            let (kind, width) = self.work.dims.values[*value];
            let width = value_words(kind, width).unwrap_or(0);
            let parameters = [self.place(*value)?, word(width)?];
            let groups = Groups::Once(word(width.div_ceil(THREADS))?);
            let mut draft = Draft::new(Kernel::Gather, groups, &parameters);
            draft.in_tail = true;
            Ok(draft)
        };
        self.resolved.carried.iter().map(gather).collect()
    }
}

/// Threads of a quantised product that share a row, as a power of two.
fn lanes_log2(cols: u64) -> u32 {
    cols.div_ceil(256)
        .clamp(1, PAIRS)
        .next_power_of_two()
        .trailing_zeros()
}

/// Parameters that say what a matrix is.
fn matrix_parameters(resident: &Resident) -> Result<[u32; FIRST_PART]> {
    let cols = resident.shape.cols;
    let mut p = [0; FIRST_PART];
    p[1] = word(resident.row_bytes())?;
    p[2] = word(resident.shape.rows)?;
    p[3] = word(cols)?;
    p[4] = word(cols.div_ceil(256))?;
    p[5] = lanes_log2(cols);
    p[6] = word(resident.encoding.matrix_prefix_bytes())?;
    p[10] = NONE;
    p[11] = 1;
    Ok(p)
}

fn part_parameters(part: &Part, out: u32, width: u32, bias: u32, step: u32) -> Result<[u32; PART_WORDS]> {
    Ok([
        word(part.at)?,
        word(part.first)?,
        word(part.rows)?,
        word(part.constants / 4)?,
        out,
        width,
        bias,
        step,
    ])
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
    pub(crate) grids: &'a Buffer,
    pub(crate) fuses: bool,
    pub(crate) threads: u32,
    pub(crate) index: &'a WeightIndex,
    pub(crate) residency: &'a mut Residency,
    pub(crate) work: &'a Workspace,
}

/// Resolves and checks a program, and makes everything that running it takes.
pub(crate) fn compile(program: &DecodeProgram, context: Context<'_>) -> Result<Compiled> {
    let Context {
        gpu,
        grids,
        fuses,
        threads,
        index,
        residency,
        work,
    } = context;
    let resolved = ResolvedProgram::new(crate::NAME, program, &work.dims, index, |id| {
        let weight = residency.weight(id)?;
        Ok(WeightFacts {
            name: &weight.name,
            class: weight.class,
            encoding: weight.encoding,
            shape: weight.shape,
            layout: FloatLayout::OutIn,
        })
    })?;
    let table_at = program.tables.iter().scan(0u64, |at, table| {
        let here = *at;
        *at += table.data.len() as u64;
        Some(here)
    });
    let mut compiler = Compiler {
        resolved: &resolved,
        residency,
        work,
        table_at: table_at.collect(),
        context: program.max_context,
        threads,
        in_tail: false,
        drafts: Vec::new(),
        windows: Vec::new(),
        tokens: work.places.tokens,
    };
    let [body, tail] = resolved.parts();
    let fuse = |part: Range<usize>| match fuses {
        true => fuse(&resolved, part),
        false => part.map(Fused::Alone).collect(),
    };
    for fused in fuse(body) {
        compiler.compile(&fused)?;
    }
    compiler.in_tail = true;
    for fused in fuse(tail) {
        compiler.compile(&fused)?;
    }
    compiler.arg_max()?;
    let gathers = compiler.gathers()?;
    let Compiler {
        drafts,
        windows,
        tokens,
        ..
    } = compiler;
    let mut kernels: HashSet<Kernel> = drafts
        .iter()
        .chain(&gathers)
        .flat_map(|draft| [Some(draft.kernel), draft.several])
        .flatten()
        .collect();
    let pending = |weight: &&usize| !residency.weights[**weight].constants_done;
    let constants = resolved.multiplied.iter().filter(pending);
    kernels.extend(constants.map(|w| Kernel::Exponents(residency.weights[*w].encoding)));
    gpu.pipelines.prepare(gpu, kernels)?;
    for weight in &resolved.multiplied {
        row_constants(gpu, grids, residency, work, *weight)?;
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
        grids,
        residency,
        work,
        parameters: parameters(gpu, drafts.iter().chain(&gathers))?,
    };
    let mut launches = Vec::with_capacity(drafts.len());
    for (i, draft) in drafts.iter().enumerate() {
        launches.push(bound.launch(draft, i)?);
    }
    let tail = launches.split_off(drafts.iter().take_while(|d| !d.in_tail).count());
    let mut gather = Vec::new();
    for (i, draft) in gathers.iter().enumerate() {
        gather.push(bound.launch(draft, drafts.len() + i)?);
    }
    let parameters = bound.parameters;
    gpu.queue.submit([]);
    gpu.check("preparing a program", 0)?;
    let mut steps: Vec<_> = resolved.steps.iter().map(|s| (s.op, s.layer)).collect();
    let layer = resolved
        .steps
        .iter()
        .rfind(|s| s.op == OpName::Logits)
        .and_then(|s| s.layer);
    steps.push((OpName::Logits, layer));
    Ok(Compiled {
        body: launches,
        gather,
        tail,
        steps,
        vocab: program.vocab,
        logits: resolved.logits,
        windows,
        ahead: None,
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
    grids: &'a Buffer,
    residency: &'a Residency,
    work: &'a Workspace,
    parameters: Buffer,
}

impl Bound<'_> {
    fn launch(&self, draft: &Draft, place: usize) -> Result<Launch> {
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
        let bindings = self.gpu.pipelines.bind(self.gpu, &bindings)?;
        Ok(Launch {
            several: draft
                .several
                .map(|kernel| self.gpu.pipelines.kernel(self.gpu, kernel))
                .transpose()?,
            pipeline: self.gpu.pipelines.kernel(self.gpu, draft.kernel)?,
            bindings,
            groups: draft.groups,
        })
    }
}

/// Computes what is kept beside the rows of a quantised weight, once.
fn row_constants(
    gpu: &Gpu,
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
    let pipeline = gpu.pipelines.kernel(gpu, kernel)?;
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    for part in &resident.parts {
        let common = matrix_parameters(resident)?;
        let groups = Groups::Spread(part.rows.div_ceil(THREADS), 1);
        let mut draft = Draft::new(kernel, groups, &common);
        let of_part = part_parameters(part, 0, 0, NONE, 0)?;
        draft.parameters[FIRST_PART..FIRST_PART + PART_WORDS].copy_from_slice(&of_part);
        let parameters = parameters(gpu, std::iter::once(&draft))?;
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC;
        let found = gpu.buffer("row constants", 4 * part.rows, usage)?;
        let [read, written] = &work.nothing;
        let bindings = gpu.pipelines.bind(
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
