//! Runs compiled programs.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use half::{bf16, f16};
use std::time::Instant;

use hoist_backend::{
    Encoding, Error, FloatLayout, KvDtype, OpName, Outputs, PhaseTime, Result, Shape, Step, StepKind,
    TokenBatch, Want, WeightClass, WeightId, admit,
};

use crate::cache::Stored;
use crate::kernels::{self, Isa};
use crate::ops::activation::Activation;
use crate::ops::attention::{Attention, Query, TILE};
use crate::ops::element::{Element, LANES};
use crate::ops::elementwise::{Add, AddTo, AllFinite, Double, Mul, Scale, SoftCap, WeightedSum};
use crate::ops::float_matmul::{Columns, Rows};
use crate::ops::norm::{LayerNorm, RmsNorm};
use crate::ops::rope::Rope;
use crate::ops::router::RouterTopK;
use crate::pool::{Disjoint, Pool};
use crate::program::Compiled;
use crate::residency::{Residency, Resident};
use crate::simd::Level;
use crate::workspace::{Buffer, Span, ThreadScratch, Workspace};

/// Below so many elements an operation is done before other threads would have noticed.
const WORTH_SHARING: usize = 1 << 14;

/// Instruction sets in use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Instructions {
    pub(crate) isa: Isa,
    pub(crate) level: Level,
}

impl Instructions {
    pub(crate) fn choose(force_scalar: bool) -> Self {
        if force_scalar {
            Self {
                isa: Isa::scalar(),
                level: Level::PORTABLE,
            }
        } else {
            Self {
                isa: Isa::detect(),
                level: Level::detect(),
            }
        }
    }
}

fn bug(what: &str) -> Error {
    Error::internal(crate::NAME, what)
}

/// Locks what only one thread uses at a time.
fn lock(scratch: &std::sync::Mutex<ThreadScratch>) -> std::sync::MutexGuard<'_, ThreadScratch> {
    scratch.lock().unwrap_or_else(|e| e.into_inner())
}

fn float(values: &[Buffer], value: usize) -> Result<&[f32]> {
    match &values[value] {
        Buffer::F32(x) => Ok(x),
        _ => Err(bug("a value of another kind")),
    }
}

fn float_mut(values: &mut [Buffer], value: usize) -> Result<&mut [f32]> {
    match &mut values[value] {
        Buffer::F32(x) => Ok(x),
        _ => Err(bug("a value of another kind")),
    }
}

/// `N` values at once; the compiler has checked that those which are written differ from all others.
fn several<const N: usize>(values: &mut [Buffer], places: [usize; N]) -> Result<[&mut Buffer; N]> {
    values
        .get_disjoint_mut(places)
        .map_err(|_| bug("values that alias"))
}

macro_rules! buffers {
    ($values:expr, [$($kind:ident $name:ident = $place:expr),*]) => {
        let [$(Buffer::$kind($name)),*] = several($values, [$($place),*])? else {
            return Err(bug("values of other kinds"));
        };
    };
}

/// Values of a resident f32 vector.
fn vector(residency: &Residency, weight: usize) -> Result<&[f32]> {
    bytemuck::try_cast_slice(residency.bytes(&residency.weights[weight]))
        .map_err(|_| bug("a misaligned vector"))
}

/// One matrix of a quantised weight, or the rows `rows` of it: groups of rows lie one after the other, packed or not.
fn quantised<'a>(
    residency: &'a Residency,
    weight: &'a Resident,
    matrix: usize,
    rows: Range<usize>,
) -> kernels::QuantMatrix<'a> {
    let all = residency.bytes(weight);
    let all = &all[matrix * weight.matrix_bytes()..(matrix + 1) * weight.matrix_bytes()];
    let (prefix, bytes) = all.split_at(weight.encoding.matrix_prefix_bytes() as usize);
    let (row, beside) = (weight.row_bytes(), weight.side_row_bytes());
    let first = matrix * weight.shape.rows as usize;
    kernels::QuantMatrix {
        encoding: weight.encoding,
        rows: rows.len(),
        cols: weight.shape.cols as usize,
        bytes: &bytes[rows.start * row..rows.end * row],
        side: &residency.side(weight)[(first + rows.start) * beside..(first + rows.end) * beside],
        packed: weight.packed,
        scale: prefix.first_chunk().map(|b| f32::from_le_bytes(*b)),
    }
}

/// Results that each thread takes a share of.
struct Shared<'a>(kernels::Results<'a>);

// SAFETY: threads only call `share`, whose callers keep rows apart.
unsafe impl Sync for Shared<'_> {}

/// Rows of a matrix that a thread takes at a time.
fn row_grain(rows: usize, threads: usize, group: usize) -> usize {
    (rows / (threads * 6)).max(16).next_multiple_of(group)
}

/// Everything an operation runs with.
struct Machine<'a> {
    on: Instructions,
    residency: &'a Residency,
    program: &'a Compiled,
    work: &'a mut Workspace,
}

/// Which (out) token a float product's result belongs to, as `token · stride + row`.
#[derive(Clone, Copy)]
struct Target {
    first: usize,
    stride: usize,
}

/// Rows of one float matrix × vectors; the results go to `out`.
fn float_rows<E: Element>(
    level: Level,
    bytes: &[u8],
    cols: usize,
    rows: Range<usize>,
    x: &[f32],
    out: &Disjoint<'_, f32>,
    to: Target,
) {
    let w: &[E] = bytemuck::cast_slice(bytes);
    level.run(Rows {
        w: &w[rows.start * cols..rows.end * cols],
        cols,
        x,
        out: |vector: usize, row: usize, y: f32| {
            let at = to.first + vector * to.stride + rows.start + row;
            // SAFETY: each (vector, row) is one element, and threads have different rows.
            let place = unsafe { out.part(at, 1) };
            place[0] = y;
        },
    });
}

/// Outputs of one transposed float matrix × vectors.
fn float_columns<E: Element>(
    level: Level,
    bytes: &[u8],
    shape: (usize, usize),
    rows: Range<usize>,
    x: &[f32],
    out: &Disjoint<'_, f32>,
    to: Target,
) {
    let (all_rows, cols) = shape;
    let w: &[E] = bytemuck::cast_slice(bytes);
    for (vector, x) in x.chunks_exact(cols).enumerate() {
        for first in rows.clone().step_by(LANES) {
            let n = LANES.min(rows.end - first);
            let y = level.run(Columns {
                w,
                rows: all_rows,
                first,
                n,
                x,
            });
            // SAFETY: as in `float_rows`.
            let out = unsafe { out.part(to.first + vector * to.stride + first, n) };
            out.copy_from_slice(&y[..n]);
        }
    }
}

/// One matrix of a float weight.
#[derive(Clone, Copy)]
struct FloatMatrix<'a> {
    bytes: &'a [u8],
    encoding: Encoding,
    layout: FloatLayout,
    /// Rows and columns.
    shape: (usize, usize),
}

impl<'a> FloatMatrix<'a> {
    fn of(residency: &'a Residency, weight: &'a Resident, matrix: usize) -> Self {
        let n = weight.matrix_bytes();
        Self {
            bytes: &residency.bytes(weight)[matrix * n..(matrix + 1) * n],
            encoding: weight.encoding,
            layout: weight.layout,
            shape: (weight.shape.rows as usize, weight.shape.cols as usize),
        }
    }

    /// Multiplies `rows` of it with vectors.
    fn product(self, level: Level, rows: Range<usize>, x: &[f32], out: &Disjoint<'_, f32>, to: Target) {
        let Self { bytes, shape, .. } = self;
        match (self.layout, self.encoding) {
            (FloatLayout::OutIn, Encoding::F16) => float_rows::<f16>(level, bytes, shape.1, rows, x, out, to),
            (FloatLayout::OutIn, Encoding::BF16) => {
                float_rows::<bf16>(level, bytes, shape.1, rows, x, out, to);
            }
            (FloatLayout::OutIn, _) => float_rows::<f32>(level, bytes, shape.1, rows, x, out, to),
            (FloatLayout::InOut, Encoding::F16) => {
                float_columns::<f16>(level, bytes, shape, rows, x, out, to);
            }
            (FloatLayout::InOut, Encoding::BF16) => {
                float_columns::<bf16>(level, bytes, shape, rows, x, out, to);
            }
            (FloatLayout::InOut, _) => float_columns::<f32>(level, bytes, shape, rows, x, out, to),
        }
    }
}

/// Runs `part` on ranges of tokens, on several threads if it is worth it.
fn each_token(pool: &mut Pool, tokens: usize, width: usize, part: &(dyn Fn(usize, Range<usize>) + Sync)) {
    let grain = if tokens * width < WORTH_SHARING {
        tokens
    } else {
        tokens.div_ceil(pool.threads() * 4)
    };
    pool.split(tokens, grain, part);
}

impl Machine<'_> {
    fn token_width(&self, value: usize) -> usize {
        self.work.dims.values[value].1 as usize
    }

    /// The f32 values of the batch's tokens.
    fn live(&self, value: usize) -> usize {
        self.token_width(value) * self.work.rows.len()
    }

    fn step(&mut self, step: &Step) -> Result<()> {
        let tokens = self.work.rows.len();
        let level = self.on.level;
        let residency = self.residency;
        match step.kind {
            StepKind::Embed { weight, out } => {
                for row in 0..tokens {
                    self.embed(weight, out, row, self.work.rows[row].token as usize)?;
                }
            }
            StepKind::EmbedPosition { weight, out } => {
                for row in 0..tokens {
                    self.embed(weight, out, row, self.work.rows[row].position as usize)?;
                }
            }
            StepKind::RmsNorm {
                input,
                weight,
                eps,
                out,
            } => {
                let weight = vector(residency, weight)?;
                self.map(input, out, |x, out| level.run(RmsNorm { x, weight, eps, out }))?;
            }
            StepKind::LayerNorm {
                input,
                weight,
                bias,
                eps,
                out,
            } => {
                let (weight, bias) = (vector(residency, weight)?, vector(residency, bias)?);
                self.map(input, out, |x, out| {
                    level.run(LayerNorm {
                        x,
                        weight,
                        bias,
                        eps,
                        out,
                    });
                })?;
            }
            StepKind::Quantise { input, cols, out } => self.quantise(step, input, cols, out)?,
            StepKind::MatMul {
                input,
                weight,
                bias,
                out,
            } => self.matmul(step, input, weight, bias, out)?,
            StepKind::Rope {
                value,
                table,
                style,
                head_dim,
                n_rot,
            } => {
                let width = self.token_width(value);
                let live = self.live(value);
                let Workspace {
                    values, rows, pool, ..
                } = &mut *self.work;
                let table = &self.program.tables[table].data;
                let value = Disjoint::new(&mut float_mut(values, value)?[..live]);
                each_token(pool, tokens, width, &|_, range| {
                    for t in range {
                        // SAFETY: one token's part each.
                        let value = unsafe { value.part(t * width, width) };
                        let at = rows[t].position as usize * n_rot;
                        level.run(Rope {
                            value,
                            head_dim,
                            table: &table[at..at + n_rot],
                            style,
                        });
                    }
                });
            }
            StepKind::StoreKv { key, value, layer } => match self.work.cache.dtype {
                KvDtype::F16 => self.store_kv::<f16>(step, key, value, layer)?,
                KvDtype::F32 => self.store_kv::<f32>(step, key, value, layer)?,
            },
            StepKind::Attention { .. } => match self.work.cache.dtype {
                KvDtype::F16 => self.attention::<f16>(&step.kind)?,
                KvDtype::F32 => self.attention::<f32>(&step.kind)?,
            },
            StepKind::Activation { input, kind, out } => {
                self.map(input, out, |x, out| level.run(Activation { kind, x, out }))?;
            }
            StepKind::Mul { a, b, out } if a == b => {
                self.map(a, out, |x, out| level.run(Mul { a: x, b: x, out }))?;
            }
            StepKind::Mul { a, b, out } => {
                self.map_two(a, b, out, |a, b, out| level.run(Mul { a, b, out }))?;
            }
            StepKind::Add { a, b, out } if a == b && b == out => {
                let live = self.live(out);
                level.run(Double {
                    y: &mut float_mut(&mut self.work.values, out)?[..live],
                });
            }
            StepKind::Add { a, b, out } if a == out => {
                self.map(b, out, |x, y| level.run(AddTo { x, y }))?;
            }
            StepKind::Add { a, b, out } if b == out => {
                self.map(a, out, |x, y| level.run(AddTo { x, y }))?;
            }
            StepKind::Add { a, b, out } if a == b => {
                self.map(a, out, |x, out| level.run(Add { a: x, b: x, out }))?;
            }
            StepKind::Add { a, b, out } => {
                self.map_two(a, b, out, |a, b, out| level.run(Add { a, b, out }))?;
            }
            StepKind::Scale { input, factor, out } => {
                self.map(input, out, |x, out| level.run(Scale { x, factor, out }))?;
            }
            StepKind::SoftCap { input, cap, out } => {
                self.map(input, out, |x, out| level.run(SoftCap { x, cap, out }))?;
            }
            StepKind::RouterTopK {
                logits,
                normalise,
                experts,
                weights,
            } => {
                let (n, k) = (self.token_width(logits), self.token_width(experts));
                let Workspace { values, threads, .. } = &mut *self.work;
                buffers!(values, [F32 logits = logits, Experts experts = experts, F32 weights = weights]);
                let mut scratch = lock(&threads[0]);
                for t in 0..tokens {
                    let probabilities = &mut scratch.probabilities[..n];
                    probabilities.copy_from_slice(&logits[t * n..(t + 1) * n]);
                    level.run(RouterTopK {
                        logits: probabilities,
                        normalise,
                        experts: &mut experts[t * k..(t + 1) * k],
                        weights: &mut weights[t * k..(t + 1) * k],
                    });
                }
            }
            StepKind::ExpertMatMul {
                input,
                shared,
                experts,
                weight,
                out,
            } => {
                self.expert_matmul(step, input, shared, experts, weight, out)?;
            }
            StepKind::WeightedSum {
                input,
                experts,
                weights,
                out,
            } => {
                let (n, k) = (self.token_width(out), self.token_width(experts));
                let Workspace { values, .. } = &mut *self.work;
                buffers!(values, [F32 x = input, Experts experts = experts, F32 weights = weights, F32 out = out]);
                for t in 0..tokens {
                    level.run(WeightedSum {
                        x: &x[t * k * n..(t + 1) * k * n],
                        experts: &experts[t * k..(t + 1) * k],
                        weights: &weights[t * k..(t + 1) * k],
                        out: &mut out[t * n..(t + 1) * n],
                    });
                }
            }
        }
        Ok(())
    }

    /// `out = f(input)`, token by token. Widths may differ; `f` sees whole tokens.
    fn map(&mut self, input: usize, out: usize, f: impl Fn(&[f32], &mut [f32]) + Sync) -> Result<()> {
        let (width_in, width) = (self.token_width(input), self.token_width(out));
        let tokens = self.work.rows.len();
        let Workspace { values, pool, .. } = &mut *self.work;
        buffers!(values, [F32 x = input, F32 out = out]);
        let out = Disjoint::new(out);
        each_token(pool, tokens, width, &|_, range| {
            let x = &x[range.start * width_in..range.end * width_in];
            // SAFETY: ranges of tokens are disjoint.
            f(x, unsafe { out.part(range.start * width, range.len() * width) });
        });
        Ok(())
    }

    /// `out = f(a, b)`, all of one width.
    fn map_two(
        &mut self,
        a: usize,
        b: usize,
        out: usize,
        f: impl Fn(&[f32], &[f32], &mut [f32]) + Sync,
    ) -> Result<()> {
        let width = self.token_width(out);
        let tokens = self.work.rows.len();
        let Workspace { values, pool, .. } = &mut *self.work;
        buffers!(values, [F32 a = a, F32 b = b, F32 out = out]);
        let out = Disjoint::new(out);
        each_token(pool, tokens, width, &|_, range| {
            let here = range.start * width..range.end * width;
            // SAFETY: ranges of tokens are disjoint.
            f(&a[here.clone()], &b[here.clone()], unsafe {
                out.part(here.start, here.len())
            });
        });
        Ok(())
    }

    /// Row `index` of a matrix to token `row` of `out`.
    fn embed(&mut self, weight: usize, out: usize, row: usize, index: usize) -> Result<()> {
        let width = self.token_width(out);
        let weight = &self.residency.weights[weight];
        let out = &mut float_mut(&mut self.work.values, out)?[row * width..(row + 1) * width];
        let shape = weight.shape;
        let bytes = self.residency.bytes(weight);
        if !weight.packed {
            return hoist_quant::dequantize_row(
                weight.encoding,
                bytes,
                shape.rows,
                shape.cols,
                index as u64,
                out,
            )
            .map_err(|e| bug(&e.to_string()));
        }
        // 256 weights are whole blocks of every encoding that is packed; the last piece of a row may be shorter.
        const PIECE: usize = 256;
        let row_bytes = weight.row_bytes();
        let per_piece =
            PIECE / weight.encoding.block_weights() as usize * weight.encoding.block_bytes() as usize;
        let (prefix, bytes) = bytes.split_at(weight.encoding.matrix_prefix_bytes() as usize);
        let mut canonical = [0u8; 4 * PIECE];
        canonical[..prefix.len()].copy_from_slice(prefix);
        for (i, out) in out.chunks_mut(PIECE).enumerate() {
            let start = index * row_bytes + i * per_piece;
            let end = (start + per_piece).min((index + 1) * row_bytes);
            let canonical = &mut canonical[..prefix.len() + end - start];
            kernels::unpack(
                self.on.isa,
                weight.encoding,
                shape.cols as usize,
                bytes,
                start..end,
                &mut canonical[prefix.len()..],
            );
            hoist_quant::dequantize(weight.encoding, canonical, out).map_err(|e| bug(&e.to_string()))?;
        }
        Ok(())
    }

    fn quantise(&mut self, step: &Step, input: usize, cols: usize, out: usize) -> Result<()> {
        let isa = self.on.isa;
        let vectors = self.live(input) / cols;
        let segments = kernels::segments(cols);
        let Workspace { values, pool, .. } = &mut *self.work;
        buffers!(values, [F32 x = input, Quantized q = out]);
        let q = Disjoint::new(q);
        let failed = AtomicBool::new(false);
        each_token(pool, vectors, cols, &|_, range| {
            for v in range {
                // SAFETY: one vector's part each.
                let q = unsafe { q.part(v * segments, segments) };
                if kernels::quantise(isa, &x[v * cols..(v + 1) * cols], q).is_err() {
                    failed.store(true, Ordering::Relaxed);
                }
            }
        });
        finite(!failed.into_inner(), step)
    }

    fn matmul(
        &mut self,
        step: &Step,
        input: usize,
        weight: usize,
        bias: Option<usize>,
        out: usize,
    ) -> Result<()> {
        let Instructions { isa, level } = self.on;
        let residency = self.residency;
        let weight = &residency.weights[weight];
        let (rows, cols) = (weight.shape.rows as usize, weight.shape.cols as usize);
        let tokens = self.work.rows.len();
        let live = self.live(out);
        let Workspace {
            values,
            pool,
            threads,
            ..
        } = &mut *self.work;
        let grain = row_grain(rows, pool.threads(), isa.group());
        let failed = AtomicBool::new(false);
        if weight.class == WeightClass::Quantized {
            buffers!(values, [Quantized x = input, F32 out = out]);
            let x = &x[..tokens * kernels::segments(cols)];
            let matrix = quantised(residency, weight, 0, 0..rows);
            let out = Shared(kernels::Results::new(&mut out[..live], rows));
            let out = &out;
            pool.split(rows, grain, &|thread, range| {
                let scratch = &mut lock(&threads[thread]).matmul;
                // SAFETY: ranges of rows are disjoint.
                let mut out = unsafe { out.0.share() };
                if kernels::matmul(isa, &matrix, range, x, &mut out, scratch).is_err() {
                    failed.store(true, Ordering::Relaxed);
                }
            });
        } else {
            buffers!(values, [F32 x = input, F32 out = out]);
            let x = &x[..tokens * cols];
            let out = Disjoint::new(&mut out[..live]);
            let matrix = FloatMatrix::of(residency, weight, 0);
            let to = Target {
                first: 0,
                stride: rows,
            };
            pool.split(rows, grain.next_multiple_of(LANES), &|_, range| {
                matrix.product(level, range, x, &out, to);
            });
        }
        finite(!failed.into_inner(), step)?;
        if let Some(bias) = bias {
            let x = vector(residency, bias)?;
            level.run(AddTo {
                x,
                y: &mut float_mut(&mut self.work.values, out)?[..live],
            });
        }
        Ok(())
    }

    fn expert_matmul(
        &mut self,
        step: &Step,
        input: usize,
        shared: bool,
        experts: usize,
        weight: usize,
        out: usize,
    ) -> Result<()> {
        let Instructions { isa, level } = self.on;
        let residency = self.residency;
        let weight = &residency.weights[weight];
        let (rows, cols) = (weight.shape.rows as usize, weight.shape.cols as usize);
        let k = self.token_width(experts);
        let tokens = self.work.rows.len();
        let live = self.live(out);
        let Workspace {
            values,
            pool,
            threads,
            choices,
            ..
        } = &mut *self.work;
        choices.clear();
        let Buffer::Experts(chosen) = &values[experts] else {
            return Err(bug("a value of another kind"));
        };
        for t in 0..tokens {
            for slot in 0..k {
                let expert = chosen[t * k + slot];
                if u64::from(expert) >= weight.shape.matrices {
                    return Err(bug("an expert that the weight does not have"));
                }
                choices.push((expert, t as u32, slot as u32));
            }
        }
        // One expert's rows after the other's, so that each is read from memory once.
        choices.sort_unstable();
        let choices = &*choices;
        // The vector that a choice reads, among all of the batch.
        let vector_of = |t: u32, slot: u32| {
            if shared {
                t as usize
            } else {
                t as usize * k + slot as usize
            }
        };
        let grain = row_grain(rows, pool.threads(), isa.group());
        let failed = AtomicBool::new(false);
        if weight.class == WeightClass::Quantized {
            let segments = kernels::segments(cols);
            buffers!(values, [Quantized x = input, F32 out = out]);
            let out = Disjoint::new(&mut out[..live]);
            pool.split(rows, grain, &|thread, range| {
                let scratch = &mut lock(&threads[thread]).matmul;
                for &(expert, t, slot) in choices {
                    let matrix = quantised(residency, weight, expert as usize, range.clone());
                    let x = &x[vector_of(t, slot) * segments..][..segments];
                    let at = (t as usize * k + slot as usize) * rows + range.start;
                    // SAFETY: ranges of rows are disjoint, and so are choices.
                    let out = unsafe { out.part(at, range.len()) };
                    let mut out = kernels::Results::new(out, range.len());
                    if kernels::matmul(isa, &matrix, 0..range.len(), x, &mut out, scratch).is_err() {
                        failed.store(true, Ordering::Relaxed);
                    }
                }
            });
        } else {
            buffers!(values, [F32 x = input, F32 out = out]);
            let out = Disjoint::new(&mut out[..live]);
            pool.split(rows, grain.next_multiple_of(LANES), &|_, range| {
                for &(expert, t, slot) in choices {
                    let x = &x[vector_of(t, slot) * cols..][..cols];
                    let to = Target {
                        first: (t as usize * k + slot as usize) * rows,
                        stride: rows,
                    };
                    let matrix = FloatMatrix::of(residency, weight, expert as usize);
                    matrix.product(level, range.clone(), x, &out, to);
                }
            });
        }
        finite(!failed.into_inner(), step)
    }

    fn store_kv<E: Stored>(&mut self, step: &Step, key: usize, value: usize, layer: usize) -> Result<()> {
        let width = self.token_width(key);
        let Workspace {
            values,
            cache,
            rows,
            dims,
            ..
        } = &mut *self.work;
        let (keys, values) = (float(values, key)?, float(values, value)?);
        let head_dim = dims.kv[layer].head_dim as usize;
        let mut all_finite = true;
        for (t, row) in rows.iter().enumerate() {
            for head in 0..width / head_dim {
                let at = t * width + head * head_dim;
                let place = cache.place(layer, row.sequence as usize, head);
                let (key, value) = (&keys[at..at + head_dim], &values[at..at + head_dim]);
                all_finite &= cache.store::<E>(&place, row.position as usize, key, value);
            }
        }
        finite(all_finite, step)
    }

    fn attention<E: Stored>(&mut self, kind: &StepKind) -> Result<()> {
        let StepKind::Attention {
            query,
            heads,
            scale,
            window,
            soft_cap,
            out,
            layer,
        } = *kind
        else {
            return Err(bug("not an attention"));
        };
        let level = self.on.level;
        let live = self.live(out);
        let Workspace {
            values,
            cache,
            rows,
            spans,
            dims,
            threads,
            pool,
            ..
        } = &mut *self.work;
        let kv = dims.kv[layer];
        let (kv_heads, head_dim) = (kv.kv_heads as usize, kv.head_dim as usize);
        let group = heads / kv_heads;
        spans.clear();
        for (t, row) in rows.iter().enumerate() {
            match spans.last_mut() {
                Some(span) if rows[span.first].sequence == row.sequence => span.len += 1,
                _ => spans.push(Span { first: t, len: 1 }),
            }
        }
        // Queries that share keys and values are taken together, but not so many that a thread has none.
        let share = (rows.len() * heads).div_ceil(pool.threads());
        let tile = share.clamp(1, TILE);
        let tiles = |span: &Span| (span.len * group).div_ceil(tile);
        let tasks: usize = spans.iter().map(|s| tiles(s) * kv_heads).sum();
        buffers!(values, [F32 q = query, F32 out = out]);
        let out = Disjoint::new(&mut out[..live]);
        let (cache, rows, spans) = (&*cache, &*rows, &*spans);
        let elements: &[E] = cache.elements();
        pool.split(tasks, 1, &|thread, range| {
            for task in range {
                let mut left = task;
                let Some(span) = spans.iter().find(|span| {
                    let here = tiles(span) * kv_heads;
                    let found = left < here;
                    if !found {
                        left -= here;
                    }
                    found
                }) else {
                    return;
                };
                // Late tokens see most: they come first, so that no thread ends with a long one.
                let (index, kv_head) = (tiles(span) - 1 - left / kv_heads, left % kv_heads);
                let first = index * tile;
                let n = tile.min(span.len * group - first);
                let mut queries: [Query<'_>; TILE] = std::array::from_fn(|i| {
                    if i >= n {
                        return Query {
                            q: &[],
                            first: 0,
                            last: 0,
                            out: &mut [],
                        };
                    }
                    let row = span.first + (first + i) / group;
                    let head = kv_head * group + (first + i) % group;
                    let last = rows[row].position as usize;
                    let seen = window.map_or(last + 1, |w| (w as usize).min(last + 1));
                    let at = (row * heads + head) * head_dim;
                    Query {
                        q: &q[at..at + head_dim],
                        first: last + 1 - seen,
                        last,
                        // SAFETY: each (token, head) belongs to one tile.
                        out: unsafe { out.part(at, head_dim) },
                    }
                });
                let place = cache.place(layer, rows[span.first].sequence as usize, kv_head);
                level.run(Attention {
                    keys: &elements[place.keys],
                    values: &elements[place.values],
                    head_dim,
                    scale,
                    soft_cap,
                    queries: &mut queries[..n],
                    scratch: &mut lock(&threads[thread]).attention,
                });
            }
        });
        Ok(())
    }

    /// Keeps only tokens that want something: their values move up, in order.
    fn compact(&mut self) {
        let Workspace {
            values, rows, dims, ..
        } = &mut *self.work;
        let total = rows.len();
        let mut kept = 0;
        for t in 0..total {
            if rows[t].want == Want::Nothing {
                continue;
            }
            if kept != t {
                rows[kept] = rows[t];
                for value in &self.program.carried {
                    match &mut values[*value] {
                        Buffer::F32(x) => move_token(x, dims.values[*value].1 as usize, t, kept),
                        Buffer::Experts(x) => move_token(x, dims.values[*value].1 as usize, t, kept),
                        Buffer::Quantized(x) => {
                            let per_token = x.len() / dims.capacity.max_batch_tokens as usize;
                            move_token(x, per_token, t, kept);
                        }
                    }
                }
            }
            kept += 1;
        }
        rows.truncate(kept);
    }
}

fn move_token<T: Copy>(x: &mut [T], width: usize, from: usize, to: usize) {
    x.copy_within(from * width..(from + 1) * width, to * width);
}

fn finite(is: bool, step: &Step) -> Result<()> {
    if is {
        Ok(())
    } else {
        Err(Error::NonFinite {
            op: step.op,
            layer: step.layer,
        })
    }
}

/// The lowest index of the largest value.
fn arg_max(x: &[f32]) -> u32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (m, x) in lanes.iter_mut().zip(chunk) {
            *m = if *x > *m { *x } else { *m };
        }
    }
    let max = lanes
        .iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |m, x| if *x > m { *x } else { m });
    x.iter().position(|x| *x == max).unwrap_or(0) as u32
}

/// Bytes and shape of a weight; nothing of one that is not there, which resolving has refused.
fn weight_facts(residency: &Residency, weight: usize) -> (u64, Shape) {
    let weight = u32::try_from(weight)
        .ok()
        .and_then(|id| residency.weight(WeightId(id)).ok());
    weight.map_or((0, Shape::matrix(0, 0)), |w| (w.nbytes() as u64, w.shape))
}

/// Runs a batch. Lengths change only when all has succeeded; what lies in the cache beyond them is scratch.
///
/// With `phases`, each operation is timed.
pub(crate) fn forward(
    on: Instructions,
    residency: &Residency,
    program: &Compiled,
    work: &mut Workspace,
    batch: &TokenBatch<'_>,
    out: &mut Outputs<'_>,
    mut phases: Option<&mut Vec<PhaseTime>>,
) -> Result<()> {
    // A program's vocabulary is a u32.
    admit(
        batch,
        out,
        program.vocab as u32,
        &work.dims.capacity,
        &work.lengths,
        &mut work.rows,
    )?;
    let mut machine = Machine {
        on,
        residency,
        program,
        work,
    };
    let (body, tail) = program.steps.split_at(program.tail);
    let mut run = |machine: &mut Machine<'_>, step: &Step| {
        let Some(phases) = &mut phases else {
            return machine.step(step);
        };
        let started = Instant::now();
        machine.step(step)?;
        phases.push(PhaseTime {
            name: step.op.to_string(),
            layer: step.layer,
            time: started.elapsed(),
            weight_bytes: step.kind.weight_bytes(
                |weight| weight_facts(residency, weight),
                |experts| machine.token_width(experts) as u64,
            ),
        });
        Ok(())
    };
    body.iter().try_for_each(|step| run(&mut machine, step))?;
    machine.compact();
    if !machine.work.rows.is_empty() {
        tail.iter().try_for_each(|step| run(&mut machine, step))?;
        let vocab = program.vocab;
        let live = machine.live(program.logits);
        let logits = &float(&machine.work.values, program.logits)?[..live];
        if !on.level.run(AllFinite(logits)) {
            let step = program.steps.iter().rfind(|s| s.op == OpName::Logits);
            return Err(Error::NonFinite {
                op: OpName::Logits,
                layer: step.and_then(|s| s.layer),
            });
        }
        let mut argmax = out.argmax.iter_mut();
        let mut wanted = out.logits.chunks_exact_mut(vocab);
        for (row, logits) in machine.work.rows.iter().zip(logits.chunks_exact(vocab)) {
            match row.want {
                Want::Nothing => {}
                Want::ArgMax => {
                    if let Some(out) = argmax.next() {
                        *out = arg_max(logits);
                    }
                }
                Want::Logits => {
                    if let Some(out) = wanted.next() {
                        out.copy_from_slice(logits);
                    }
                }
            }
        }
    }
    for run in batch.runs {
        machine.work.lengths[run.sequence.0 as usize] += run.tokens.len() as u32;
    }
    Ok(())
}
