//! Each operation of a program as launches.

use std::ops::Range;

use hoist_backend::{
    ActivationKind, Error, FloatLayout, KvDtype, OpName, ResolvedProgram, Result, RopeStyle, Step, StepKind,
    Table, UnsupportedWhat, WeightClass, WeightId,
};

use super::attention::{self, AttentionRows, AttentionSplits};
use super::fused::{self, Fused};
use super::params::{
    ArgMax, Attention, Elements, Embed, FloatMatMul, Gated, Gather, Integers, MatMul, Merged, Norm, Normed,
    PartedTiled, Quantise, Rope, Router, Store, Tiled, Turned, WeightedSum,
};
use super::prefill::{self, Held, Packed, Product};
use super::profile::Marks;
use super::workspace::{ARG_MAX_PARTS, Place, SPLIT, Workspace};
use super::{DeviceWeight, kernels};
use crate::driver::{Device, Stream};
use crate::modules::{Function, Launch, Modules};

/// Blocks of an elementwise kernel, each of which takes as many elements as there are.
const ELEMENT_BLOCKS: u64 = 2048;
/// The largest second and third dimension of a grid.
const GRID_LIMIT: u32 = 65_535;

/// A weight's address and shape.
#[derive(Clone, Copy, Debug)]
struct Matrix {
    ptr: u64,
    exponents: u64,
    rows: u32,
    cols: u32,
    row_bytes: u64,
    matrix_bytes: u64,
    quantised: bool,
    layout: FloatLayout,
}

impl Matrix {
    fn new(weight: &DeviceWeight<'_>) -> Result<Self> {
        let DeviceWeight { shape, encoding, .. } = *weight;
        let narrow = |n: u64| {
            u32::try_from(n).map_err(|_| Error::Unsupported {
                backend: crate::NAME.into(),
                what: UnsupportedWhat::Limit {
                    what: "rows or columns of a matrix",
                    limit: u32::MAX.into(),
                    found: n,
                },
            })
        };
        let row_bytes = encoding.row_bytes(shape.cols)?;
        Ok(Self {
            ptr: weight.ptr,
            exponents: weight.exponents,
            rows: narrow(shape.rows)?,
            cols: narrow(shape.cols)?,
            row_bytes,
            // The whole weight has a size, so each of its matrices has.
            matrix_bytes: shape.rows * row_bytes + encoding.matrix_prefix_bytes(),
            quantised: weight.class == WeightClass::Quantized,
            layout: weight.layout,
        })
    }
}

/// An operation with its kernel and the addresses of what it reads beside values.
#[derive(Debug)]
struct Launchable {
    function: Function,
    /// Of attention, the merge of its splits.
    second: Option<Function>,
    matrix: Option<Matrix>,
    /// Of a product, the kernels for many tokens.
    tiled: Option<Product>,
    /// Of attention, the kernel for single tokens.
    splits: Option<AttentionSplits>,
    /// Of attention, the kernel for many tokens that follow each other.
    rows_at_once: Option<AttentionRows>,
    /// Bias of a matmul, weight of a norm.
    vector: u64,
    /// Bias of a LayerNorm.
    bias: u64,
    /// Vectors of a token that are normed.
    rows: u32,
}

/// A program ready to run.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) resolved: ResolvedProgram,
    steps: Vec<Launchable>,
    /// For each step, what begins there for many tokens.
    fused: Vec<Option<Fused>>,
    /// Addresses of tables.
    pub(super) tables: Vec<u64>,
    keep: Function,
    arg_max: [Function; 2],
    /// The step that yields the logits.
    logits_step: u32,
}

/// What `launch` needs everywhere.
struct Machine<'a> {
    stream: &'a Stream,
    work: &'a Workspace,
    tokens: u32,
    /// Splits of attention to launch.
    splits: u32,
    /// Runs of tokens that follow each other.
    runs: u32,
    /// What is packed.
    held: Held,
}

impl Machine<'_> {
    fn run<P>(&self, function: &Function, launch: Launch, params: &P) -> Result<()> {
        let mut arguments = [std::ptr::from_ref(params).cast_mut().cast::<std::ffi::c_void>()];
        // SAFETY: each kernel takes one struct, whose twin in `params` is given; its addresses are of weights, which stay
        // while the engine lives, and of the workspace, which only this stream uses; resolving has checked that every
        // shape fits what it addresses.
        unsafe { function.launch(self.stream, launch, &mut arguments) }
    }

    fn value(&self, value: usize) -> Place {
        self.work.values[value]
    }

    fn elements(
        &self,
        function: &Function,
        a: usize,
        b: Option<usize>,
        out: usize,
        factor: f32,
    ) -> Result<()> {
        let n = u64::from(self.value(out).width) * u64::from(self.tokens);
        let params = Elements {
            a: self.value(a).ptr,
            b: b.map_or(0, |b| self.value(b).ptr),
            out: self.value(out).ptr,
            n,
            factor,
        };
        let blocks = n.div_ceil(256).min(ELEMENT_BLOCKS) as u32;
        self.run(function, Launch::linear(blocks, 256), &params)
    }
}

fn grid(x: u32, y: u32, z: u32, threads: u32, shared: u32) -> Launch {
    Launch {
        grid: (x, y, z),
        shared,
        ..Launch::linear(1, threads)
    }
}

impl Prepared {
    /// Looks up every kernel and address; the workspace is the one that the program will run in.
    pub(super) fn new<'w>(
        modules: &Modules,
        device: &Device,
        resolved: ResolvedProgram,
        tables: &[Table],
        work: &Workspace,
        weight: impl Fn(WeightId) -> Result<DeviceWeight<'w>>,
    ) -> Result<Self> {
        let at = |place: usize| weight(WeightId(place as u32));
        let decode = |kernel| modules.function("decode", kernel);
        let f16 = work.dims.capacity.kv == KvDtype::F16;
        let mut steps = Vec::with_capacity(resolved.steps.len());
        for step in &resolved.steps {
            let plain = |kernel| -> Result<Launchable> {
                Ok(Launchable {
                    function: decode(kernel)?,
                    second: None,
                    matrix: None,
                    tiled: None,
                    splits: None,
                    rows_at_once: None,
                    vector: 0,
                    bias: 0,
                    rows: 1,
                })
            };
            let product = |matrix: usize, bias: Option<usize>| -> Result<Launchable> {
                let weight = at(matrix)?;
                let (file, kernel) = kernels::matmul(weight.encoding, weight.layout)?;
                Ok(Launchable {
                    function: modules.function(file, kernel)?,
                    second: None,
                    tiled: None,
                    splits: None,
                    rows_at_once: None,
                    matrix: Some(Matrix::new(&weight)?),
                    vector: bias.map(at).transpose()?.map_or(0, |b| b.ptr),
                    bias: 0,
                    rows: 1,
                })
            };
            steps.push(match &step.kind {
                StepKind::Embed { weight, .. } | StepKind::EmbedPosition { weight, .. } => {
                    let weight = at(*weight)?;
                    Launchable {
                        matrix: Some(Matrix::new(&weight)?),
                        ..plain(kernels::embed(weight.encoding)?)?
                    }
                }
                StepKind::RmsNorm { input, weight, .. } => {
                    let weight = at(*weight)?;
                    // Resolving has checked that the weight's length divides the value.
                    let rows = u64::from(work.values[*input].width) / weight.shape.cols.max(1);
                    Launchable {
                        vector: weight.ptr,
                        rows: rows as u32,
                        ..plain("rms_norm")?
                    }
                }
                StepKind::LayerNorm { weight, bias, .. } => Launchable {
                    vector: at(*weight)?.ptr,
                    bias: at(*bias)?.ptr,
                    ..plain("layer_norm")?
                },
                StepKind::Quantise { .. } => plain("quantise")?,
                StepKind::MatMul {
                    input, weight, bias, ..
                } => {
                    let tiled = Self::tiled(modules, device, work, *input, &at(*weight)?)?;
                    Launchable {
                        tiled,
                        ..product(*weight, *bias)?
                    }
                }
                StepKind::ExpertMatMul { weight, experts, .. } => {
                    let choices = work.values[*experts].width;
                    let tokens = work.dims.capacity.max_batch_tokens;
                    if choices.checked_mul(tokens).is_none_or(|n| n > GRID_LIMIT) {
                        return Err(limit(
                            "tokens of a batch times experts of a token",
                            GRID_LIMIT,
                            u64::from(choices) * u64::from(tokens),
                        ));
                    }
                    product(*weight, None)?
                }
                StepKind::Rope { .. } => plain("rope")?,
                StepKind::StoreKv { .. } => plain(if f16 { "store_kv_f16" } else { "store_kv_f32" })?,
                StepKind::Attention { heads, layer, .. } => {
                    Self::check_attention(work, *heads, *layer)?;
                    let cache = &work.cache[*layer];
                    let one = plain(if f16 { "attention_f16" } else { "attention_f32" })?;
                    Launchable {
                        splits: Some(AttentionSplits::new(
                            &one.function,
                            device,
                            cache,
                            work.dims.capacity.kv,
                        )?),
                        rows_at_once: AttentionRows::new(
                            modules,
                            device,
                            cache,
                            *heads as u32,
                            work.dims.capacity.kv,
                        )?,
                        second: Some(decode("attention_merge")?),
                        ..one
                    }
                }
                StepKind::Activation { kind, .. } => plain(match kind {
                    ActivationKind::Silu => "elements_silu",
                    ActivationKind::GeluTanh => "elements_gelu_tanh",
                })?,
                StepKind::Mul { .. } => plain("elements_mul")?,
                StepKind::Add { .. } => plain("elements_add")?,
                StepKind::Scale { .. } => plain("elements_scale")?,
                StepKind::SoftCap { .. } => plain("elements_soft_cap")?,
                StepKind::RouterTopK { .. } => plain("router_top_k")?,
                StepKind::WeightedSum { .. } => plain("weighted_sum")?,
            });
        }
        let mut next = work.tables;
        let tables = tables
            .iter()
            .map(|table| {
                let at = next;
                next += table.data.len() as u64 * 4;
                at
            })
            .collect();
        let logits_step = resolved.steps.iter().rposition(|s| s.op == OpName::Logits);
        let fused = fused::find(
            modules,
            &resolved,
            work,
            |weight| Ok(at(weight)?.shape.cols),
            |step: usize| steps[step].tiled.as_ref().map(|product| product.form),
        )?;
        Ok(Self {
            steps,
            fused,
            tables,
            keep: decode("keep_tokens")?,
            arg_max: [decode("arg_max_parts")?, decode("arg_max_all")?],
            logits_step: logits_step.map_or(u32::MAX - 1, |at| at as u32),
            resolved,
        })
    }

    /// The kernels for many tokens of a product, where there are such and the input can be packed.
    fn tiled(
        modules: &Modules,
        device: &Device,
        work: &Workspace,
        input: usize,
        weight: &DeviceWeight<'_>,
    ) -> Result<Option<Product>> {
        let most = work.dims.capacity.max_batch_tokens;
        let segments = u64::from(work.values[input].width) / 256;
        let fits = prefill::packed_bytes(segments, most).is_some_and(|n| n <= work.packed_bytes);
        if weight.class != WeightClass::Quantized || most < prefill::FEWEST_TOKENS || !fits {
            return Ok(None);
        }
        let Ok(rows) = u32::try_from(weight.shape.rows) else {
            return Ok(None);
        };
        Product::new(modules, device, weight.encoding, rows, work.values[input].width)
    }

    fn check_attention(work: &Workspace, heads: usize, layer: usize) -> Result<()> {
        let cache = &work.cache[layer];
        if cache.padded > attention::WIDEST_HEAD {
            return Err(limit(
                "head dimension",
                attention::WIDEST_HEAD,
                cache.head_dim.into(),
            ));
        }
        if heads > GRID_LIMIT as usize {
            return Err(limit("heads", GRID_LIMIT, heads as u64));
        }
        let splits = work.dims.capacity.max_context.div_ceil(SPLIT);
        if work.attended(splits, heads as u64, cache.head_dim) == 0 {
            return Err(Error::internal(
                crate::NAME,
                "attention that does not fit the workspace",
            ));
        }
        Ok(())
    }

    /// Enqueues a range of steps for the first `tokens` rows. `splits` is how many attention needs to look at; without it,
    /// all of the context.
    pub(super) fn launch(
        &self,
        stream: &Stream,
        work: &Workspace,
        steps: Range<usize>,
        tokens: u32,
        splits: Option<u32>,
        marks: Option<&Marks>,
    ) -> Result<()> {
        let all = work.dims.capacity.max_context.div_ceil(SPLIT);
        let machine = Machine {
            stream,
            work,
            tokens,
            splits: splits.unwrap_or(all).min(all),
            runs: match &work.batch {
                batch if batch.len() == tokens as usize => attention::runs(batch),
                // Kept tokens, which attend no more, or none yet.
                _ => tokens,
            },
            held: Held::default(),
        };
        let mut at = steps.start;
        while at < steps.end {
            let first = at;
            let fused = self.fused[at].as_ref();
            if let Some(fused) = fused.filter(|f| tokens >= prefill::FEWEST_TOKENS && f.last < steps.end) {
                self.fused(&machine, at, fused)?;
                at = fused.last + 1;
            } else {
                self.step(&machine, at, &self.resolved.steps[at], &self.steps[at])?;
                at += 1;
            }
            if let Some(marks) = marks {
                marks.pass(stream, first..at)?;
            }
        }
        Ok(())
    }

    /// Several operations in one kernel.
    fn fused(&self, on: &Machine<'_>, at: usize, fused: &Fused) -> Result<()> {
        let Some(quantised) = &fused.integers else {
            return self.turned(on, at, fused);
        };
        let (cols, segments, tokens) = (quantised.cols, quantised.cols.div_ceil(256), on.tokens);
        let plain = quantised.forms.is_empty();
        on.held.written(quantised.out);
        let to = Integers {
            out: if plain { on.value(quantised.out).ptr } else { 0 },
            tiles: prefill::tiles(on.work.packed, &quantised.forms, segments, tokens),
            fault: on.work.fault,
            step: fused.last as u32,
            cols,
            segments,
            tokens,
        };
        // Tiles are written as a whole.
        let blocks = if plain {
            tokens
        } else {
            prefill::whole_tiles(tokens)
        };
        match fused.kind {
            fused::Kind::Normed { input, plus, eps, .. } => {
                let (plus, sum) = plus.map_or((0, 0), |(b, sum)| (on.value(b).ptr, on.value(sum).ptr));
                // The norm's weight is that of the operation before the last.
                let params = Normed {
                    x: on.value(input).ptr,
                    plus,
                    sum,
                    weight: self.steps[fused.last - 1].vector,
                    to,
                    eps,
                };
                on.run(&fused.function, Launch::linear(blocks, 512), &params)?;
            }
            fused::Kind::Gated { gate, up } => {
                let params = Gated {
                    gate: on.value(gate).ptr,
                    up: on.value(up).ptr,
                    to,
                };
                on.run(&fused.function, Launch::linear(blocks, 1024), &params)?;
            }
            fused::Kind::Attended => {
                self.attend(on, at, |attention, n| {
                    let last = attention.first_token + n == tokens;
                    let blocks = if last { n + blocks - tokens } else { n };
                    let params = Merged { attention, to };
                    on.run(&fused.function, Launch::linear(blocks, 256), &params)
                })?;
            }
            fused::Kind::Turned => {
                return Err(Error::internal(crate::NAME, "integers of nothing"));
            }
        }
        for form in &quantised.forms {
            on.held.hold(*form, quantised.out);
        }
        Ok(())
    }

    /// Rope of queries and of keys, and StoreKv.
    fn turned(&self, on: &Machine<'_>, at: usize, fused: &Fused) -> Result<()> {
        let rope = |at: usize| self.rope(on, at);
        let (Some(query), Some(key), Some(store)) = (rope(at), rope(at + 1), self.store(on, at + 2)) else {
            return Err(Error::internal(crate::NAME, "operations that were others"));
        };
        let params = Turned { query, key, store };
        on.run(&fused.function, Launch::linear(on.tokens, 256), &params)
    }

    fn rope(&self, on: &Machine<'_>, at: usize) -> Option<Rope> {
        match self.resolved.steps[at].kind {
            StepKind::Rope {
                value,
                table,
                style,
                head_dim,
                n_rot,
            } => Some(Rope {
                value: on.value(value).ptr,
                table: self.tables[table],
                rows: on.work.rows,
                width: on.value(value).width,
                head_dim: head_dim as u32,
                n_rot: n_rot as u32,
                half_split: (style == RopeStyle::HalfSplit).into(),
            }),
            _ => None,
        }
    }

    fn store(&self, on: &Machine<'_>, at: usize) -> Option<Store> {
        match self.resolved.steps[at].kind {
            StepKind::StoreKv { key, value, layer } => Some(Store {
                cache: on.work.cache[layer],
                key: on.value(key).ptr,
                value: on.value(value).ptr,
                rows: on.work.rows,
                fault: on.work.fault,
                step: at as u32,
            }),
            _ => None,
        }
    }

    /// Attention's splits, for as many tokens at a time as there is scratch, each time followed by what merges them.
    fn attend(
        &self,
        on: &Machine<'_>,
        at: usize,
        merge: impl Fn(Attention, u32) -> Result<()>,
    ) -> Result<()> {
        let (work, tokens, l) = (on.work, on.tokens, &self.steps[at]);
        let StepKind::Attention {
            query,
            heads,
            scale,
            window,
            soft_cap,
            out,
            layer,
        } = self.resolved.steps[at].kind
        else {
            return Err(Error::internal(crate::NAME, "attention that is none"));
        };
        let cache = work.cache[layer];
        let Some(single) = &l.splits else {
            return Err(Error::internal(crate::NAME, "attention without its kernels"));
        };
        let rows = l.rows_at_once.as_ref().filter(|r| r.suits(tokens, on.runs));
        // `check_attention` has seen that one of the whole context fits.
        let room = work.attended(on.splits, heads as u64, cache.head_dim).max(1);
        let at_once = rows.map_or(room, |rows| rows.whole_tiles(room));
        for first_token in (0..tokens).step_by(at_once as usize) {
            let n = at_once.min(tokens - first_token);
            let params = Attention {
                cache,
                query: on.value(query).ptr,
                out: on.value(out).ptr,
                rows: work.rows,
                sums: work.sums,
                partial: work.partial,
                first_token,
                heads: heads as u32,
                splits: on.splits,
                window: window.unwrap_or(0),
                scale,
                cap: soft_cap.unwrap_or(0.0),
                capped: soft_cap.is_some().into(),
                tokens: n,
                staged: single.staged.into(),
                unused: 0,
            };
            if let Some(rows) = rows {
                let (function, launch) = rows.launch(on.splits, cache.kv_heads, n);
                on.run(function, launch, &params)?;
            } else {
                let launch = single.launch(on.splits, &cache, heads as u32, n);
                on.run(&l.function, launch, &params)?;
            }
            merge(params, n)?;
        }
        Ok(())
    }

    fn step(&self, on: &Machine<'_>, at: usize, step: &Step, l: &Launchable) -> Result<()> {
        let (work, tokens) = (on.work, on.tokens);
        let number = at as u32;
        match step.kind {
            StepKind::Embed { out, .. } => embed(on, l, out, 0),
            StepKind::EmbedPosition { out, .. } => embed(on, l, out, 1),
            StepKind::RmsNorm { input, eps, out, .. } => {
                norm(on, l, input, out, eps, on.value(input).width / l.rows)
            }
            StepKind::LayerNorm { input, eps, out, .. } => {
                norm(on, l, input, out, eps, on.value(input).width)
            }
            StepKind::Quantise { input, cols, out } => {
                on.held.written(out);
                let cols = cols as u32;
                let vectors = on.value(input).width / cols * tokens;
                let segments = cols.div_ceil(256);
                let params = Quantise {
                    x: on.value(input).ptr,
                    out: on.value(out).ptr,
                    fault: work.fault,
                    step: number,
                    cols,
                    segments,
                    vectors,
                };
                let blocks = (u64::from(segments) * u64::from(vectors)).div_ceil(4);
                on.run(&l.function, Launch::linear(blocks as u32, 128), &params)
            }
            StepKind::MatMul { input, out, .. } => matmul(on, l, number, input, out, None),
            StepKind::ExpertMatMul {
                input,
                shared,
                experts,
                out,
                ..
            } => matmul(on, l, number, input, out, Some((experts, shared))),
            StepKind::Rope { .. } => match self.rope(on, at) {
                Some(params) => on.run(&l.function, Launch::linear(tokens, 256), &params),
                None => Ok(()),
            },
            StepKind::StoreKv { .. } => match self.store(on, at) {
                Some(params) => on.run(&l.function, Launch::linear(tokens, 256), &params),
                None => Ok(()),
            },
            StepKind::Attention { heads, .. } => {
                let Some(merge) = &l.second else {
                    return Err(Error::internal(crate::NAME, "attention without its merge"));
                };
                // A warp a head, four of them a block.
                self.attend(on, at, |params, n| {
                    on.run(merge, grid((heads as u32).div_ceil(4), n, 1, 128, 0), &params)
                })
            }
            StepKind::Activation { input, out, .. } => on.elements(&l.function, input, None, out, 0.0),
            StepKind::Mul { a, b, out } | StepKind::Add { a, b, out } => {
                on.elements(&l.function, a, Some(b), out, 0.0)
            }
            StepKind::Scale { input, factor, out } => on.elements(&l.function, input, None, out, factor),
            StepKind::SoftCap { input, cap, out } => on.elements(&l.function, input, None, out, cap),
            StepKind::RouterTopK {
                logits,
                normalise,
                experts,
                weights,
            } => {
                let params = Router {
                    logits: on.value(logits).ptr,
                    experts: on.value(experts).ptr,
                    weights: on.value(weights).ptr,
                    n: on.value(logits).width,
                    k: on.value(experts).width,
                    normalise: normalise.into(),
                };
                on.run(&l.function, Launch::linear(tokens, 256), &params)
            }
            StepKind::WeightedSum {
                input,
                experts,
                weights,
                out,
            } => {
                let n = on.value(out).width;
                let params = WeightedSum {
                    x: on.value(input).ptr,
                    experts: on.value(experts).ptr,
                    weights: on.value(weights).ptr,
                    out: on.value(out).ptr,
                    k: on.value(experts).width,
                    n,
                };
                on.run(&l.function, grid(n.div_ceil(256), tokens, 1, 256, 0), &params)
            }
        }
    }

    /// Moves the kept tokens' rows and values, of those that the tail reads, to the front.
    pub(super) fn keep(&self, stream: &Stream, work: &Workspace, count: u32) -> Result<()> {
        let machine = Machine {
            stream,
            work,
            tokens: count,
            splits: 0,
            runs: 0,
            held: Held::default(),
        };
        let carried = self
            .resolved
            .carried
            .iter()
            .map(|v| (work.values[*v].ptr, work.values[*v].token_bytes));
        for (value, token_bytes) in carried.chain([(work.rows, 16)]) {
            let params = Gather {
                value,
                kept: work.kept,
                token_bytes,
                count,
            };
            machine.run(
                &self.keep,
                Launch::linear((token_bytes / 4).div_ceil(256) as u32, 256),
                &params,
            )?;
        }
        Ok(())
    }

    /// Finds each row's largest logit, and whether all are numbers.
    pub(super) fn arg_max(&self, stream: &Stream, work: &Workspace, tokens: u32) -> Result<()> {
        let machine = Machine {
            stream,
            work,
            tokens,
            splits: 0,
            runs: 0,
            held: Held::default(),
        };
        let params = ArgMax {
            logits: work.values[self.resolved.logits].ptr,
            parts: work.parts,
            out: work.argmax,
            fault: work.fault,
            step: self.logits_step,
            vocab: self.resolved.vocab as u32,
        };
        machine.run(&self.arg_max[0], grid(ARG_MAX_PARTS, tokens, 1, 256, 0), &params)?;
        machine.run(&self.arg_max[1], Launch::linear(tokens, ARG_MAX_PARTS), &params)
    }
}

fn limit(what: &'static str, limit: u32, found: u64) -> Error {
    Error::Unsupported {
        backend: crate::NAME.into(),
        what: UnsupportedWhat::Limit {
            what,
            limit: limit.into(),
            found,
        },
    }
}

fn embed(on: &Machine<'_>, l: &Launchable, out: usize, by_position: u32) -> Result<()> {
    let matrix = matrix_of(l)?;
    let params = Embed {
        weight: matrix.ptr,
        out: on.value(out).ptr,
        rows: on.work.rows,
        row_bytes: matrix.row_bytes,
        cols: matrix.cols,
        by_position,
    };
    on.run(&l.function, Launch::linear(on.tokens, 128), &params)
}

fn norm(on: &Machine<'_>, l: &Launchable, input: usize, out: usize, eps: f32, n: u32) -> Result<()> {
    let params = Norm {
        x: on.value(input).ptr,
        weight: l.vector,
        bias: l.bias,
        y: on.value(out).ptr,
        n,
        eps,
    };
    on.run(&l.function, Launch::linear(l.rows * on.tokens, 256), &params)
}

fn matrix_of(l: &Launchable) -> Result<&Matrix> {
    l.matrix
        .as_ref()
        .ok_or_else(|| Error::internal(crate::NAME, "an operation without its matrix"))
}

/// A product with many tokens; its input is packed unless the product before has done so.
fn tiled_matmul(
    on: &Machine<'_>,
    l: &Launchable,
    matrix: &Matrix,
    tiled: &Product,
    step: u32,
    input: usize,
    out: usize,
) -> Result<()> {
    let segments = matrix.cols / 256;
    let packed = Packed::at(on.work.packed, tiled.form, segments, on.tokens);
    if !on.held.holds(tiled.form, input) {
        let (function, launch, params) =
            tiled.packing(on.value(input).ptr, on.work.packed, segments, on.tokens);
        on.run(function, launch, &params)?;
        on.held.hold(tiled.form, input);
    }
    let params = Tiled {
        weight: matrix.ptr,
        exponents: matrix.exponents,
        x: packed.tiles,
        vector_exponents: packed.vector_exponents,
        bias: l.vector,
        y: on.value(out).ptr,
        fault: on.work.fault,
        row_bytes: matrix.row_bytes,
        step,
        rows: matrix.rows,
        segments,
        tokens: on.tokens,
    };
    if let Some((function, launch, own)) = tiled.launch_parted(&params, on.work.scratch.1) {
        let params = PartedTiled {
            product: params,
            // Attention has merged, and does not begin while this runs.
            parted: on.work.parted(own),
        };
        return on.run(function, launch, &params);
    }
    let (function, launch) = tiled.launch(&params);
    on.run(function, launch, &params)
}

fn matmul(
    on: &Machine<'_>,
    l: &Launchable,
    step: u32,
    input: usize,
    out: usize,
    experts: Option<(usize, bool)>,
) -> Result<()> {
    let matrix = matrix_of(l)?;
    if let (Some(tiled), None, true) = (&l.tiled, experts, on.tokens >= prefill::FEWEST_TOKENS) {
        return tiled_matmul(on, l, matrix, tiled, step, input, out);
    }
    let (chosen, choices, shared) = match experts {
        None => (0, 1, 0),
        Some((experts, shared)) => (on.value(experts).ptr, on.value(experts).width, shared.into()),
    };
    if matrix.quantised {
        let params = MatMul {
            weight: matrix.ptr,
            exponents: matrix.exponents,
            x: on.value(input).ptr,
            bias: l.vector,
            y: on.value(out).ptr,
            experts: chosen,
            fault: on.work.fault,
            row_bytes: matrix.row_bytes,
            matrix_bytes: matrix.matrix_bytes,
            step,
            rows: matrix.rows,
            cols: matrix.cols,
            tokens: on.tokens,
            choices,
            shared,
        };
        let y = if experts.is_some() {
            on.tokens * choices
        } else {
            on.tokens.div_ceil(4)
        };
        return on.run(&l.function, grid(matrix.rows.div_ceil(4), y, 1, 128, 0), &params);
    }
    let params = FloatMatMul {
        weight: matrix.ptr,
        x: on.value(input).ptr,
        bias: l.vector,
        y: on.value(out).ptr,
        experts: chosen,
        matrix_elements: u64::from(matrix.rows) * u64::from(matrix.cols),
        rows: matrix.rows,
        cols: matrix.cols,
        tokens: on.tokens,
        choices,
        shared,
    };
    let rows_of_block = if matrix.layout == FloatLayout::InOut {
        128
    } else {
        16
    };
    let y = if experts.is_some() {
        on.tokens * choices
    } else {
        on.tokens
    };
    on.run(
        &l.function,
        grid(matrix.rows.div_ceil(rows_of_block), y, 1, 128, 0),
        &params,
    )
}
