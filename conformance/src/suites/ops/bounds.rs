//! How far a *bounded* backend may be from the contract: an error bound carried through a program beside each value.
//!
//! Every operation gets what its own arithmetic can lose in f32, in whatever order it sums, plus what its inputs bring
//! along. Roundings are taken as independent, so that they add as their squares do, with a margin where they are new; what
//! all elements share (a norm's factor, a score) adds as it is. Three places may lose more, since that is what a bounded backend is for: quantised activations may be off by one
//! step of the contract's own 8-bit quantisation; activations for a float matrix may be rounded to the matrix's precision;
//! and keys, values and attention weights to f16. Subnormal results may be flushed.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use hoist_backend::{
    DecodeProgram, Encoding, Error, KvDtype, Op, OpKind, OpName, Result, SequenceId, Shape, ValueId,
    ValueKind, WeightRef,
};

use crate::oracle::{self, AttentionSpec, KvCache, Matrix, QuantizedVector, Weights};

/// Half a unit in the last place of f32, relative.
const U: f64 = 1.0 / (1u64 << 24) as f64;
/// Half a unit of f16 and of bf16.
const HALF_F16: f64 = 1.0 / 2048.0;
const HALF_BF16: f64 = 1.0 / 256.0;
/// The smallest normal f32: what flushing subnormals can lose.
const FLUSHED: f64 = f32::MIN_POSITIVE as f64;
/// The largest magnitude that the contract's zero segments drop: 2032 · 2^-126.
const ZERO_SEGMENT: f64 = 2032.0 * FLUSHED;

/// Margin for a sum of roundings that are new: each is a bound already, about two standard deviations.
const NEW: f64 = 3.0;
/// Margin for a sum of errors that were brought along, and have their margin.
const BROUGHT: f64 = 1.25;

/// See [`crate::judge::Bounds::row`]: a row whose errors are on average beyond half their bounds is not rounded but wrong.
pub(crate) const ROW: f64 = 0.5;

/// The largest normalised mean square error that goes with element bounds.
pub(crate) fn nmse(y: &[f32], bounds: &[f64]) -> f64 {
    let power: f64 = y.iter().map(|v| f64::from(*v).powi(2)).sum();
    let allowed: f64 = bounds.iter().map(|b| b * b).sum::<f64>() * ROW * ROW;
    if power > 0.0 { allowed / power } else { allowed }
}

/// A value with its bounds.
#[derive(Clone, Debug)]
struct Near {
    y: Vec<f32>,
    e: Vec<f64>,
}

impl Near {
    fn abs(&self, i: usize) -> f64 {
        f64::from(self.y[i]).abs()
    }
}

/// A vector as the contract has it, the values it stands for, how far they were off before, and how far another quantisation
/// may be.
#[derive(Clone, Debug)]
struct Quantized {
    codes: QuantizedVector,
    x: Vec<f64>,
    brought: Vec<f64>,
    steps: Vec<f64>,
}

#[derive(Clone, Debug)]
enum Value {
    Float(Near),
    Quantized(Vec<Quantized>),
    Experts(Vec<u32>),
}

struct Layer {
    cache: KvCache,
    keys: Vec<Vec<f64>>,
    values: Vec<Vec<f64>>,
}

#[derive(Default)]
struct Sequence {
    length: u32,
    layers: Vec<Layer>,
    /// The first position whose choice of experts was too close to call.
    open_from: Option<u32>,
}

/// Runs a program as [`crate::oracle::Interpreter`] does, with bounds.
pub(crate) struct Bounding<'a> {
    program: &'a DecodeProgram,
    weights: &'a dyn Weights,
    sequences: HashMap<SequenceId, Sequence>,
    /// Rows of matrices as f32, by place and matrix.
    rows: HashMap<(WeightRef, u32), Vec<Vec<f32>>>,
}

/// Ends a token: an error, or a choice that is too close to call.
enum Stop {
    Open,
    Error(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Error(error)
    }
}

type Step<T> = std::result::Result<T, Stop>;

impl<'a> Bounding<'a> {
    pub(crate) fn new(program: &'a DecodeProgram, weights: &'a dyn Weights) -> Self {
        Self {
            program,
            weights,
            sequences: HashMap::new(),
            rows: HashMap::new(),
        }
    }

    /// Cuts a sequence back.
    ///
    /// # Errors
    /// If it is shorter.
    pub(crate) fn truncate(&mut self, sequence: SequenceId, length: u32) -> Result<()> {
        let state = self.sequences.entry(sequence).or_default();
        if length > state.length {
            return Err(Error::invalid("length to truncate to", state.length, length));
        }
        cut(state, length);
        Ok(())
    }

    /// Appends a token: its logits and their bounds; `None` if anything will do.
    ///
    /// # Errors
    /// As [`crate::oracle::Interpreter::step`].
    pub(crate) fn step(&mut self, sequence: SequenceId, token: u32) -> Result<Option<(Vec<f32>, Vec<f64>)>> {
        let mut state = self.sequences.remove(&sequence).unwrap_or_default();
        if state.layers.is_empty() {
            state.layers = self
                .program
                .kv
                .iter()
                .map(|spec| Layer {
                    cache: KvCache::new(*spec, KvDtype::F16),
                    keys: Vec::new(),
                    values: Vec::new(),
                })
                .collect();
        }
        let position = state.length;
        let program = self.program;
        let mut frame = Frame {
            bounding: self,
            values: HashMap::new(),
            token,
            position,
        };
        let mut outcome = Ok(());
        let mut open = state.open_from.is_some_and(|p| p <= position);
        for op in &program.ops {
            if let Err(stop) = frame.run(op, &mut state) {
                match stop {
                    Stop::Open => open = true,
                    Stop::Error(e) => outcome = Err(e),
                }
                break;
            }
        }
        let logits = frame.values.remove(&program.logits);
        if open && outcome.is_ok() {
            state.open_from.get_or_insert(position);
            // What is missing in the caches is filled, so that positions stay in step.
            for layer in &mut state.layers {
                while layer.keys.len() <= position as usize {
                    let width = layer.cache.at(0).map_or(0, |(k, _)| k.len());
                    if width == 0 {
                        break;
                    }
                    layer.cache.store(&vec![0.0; width], &vec![0.0; width])?;
                    layer.keys.push(vec![0.0; width]);
                    layer.values.push(vec![0.0; width]);
                }
            }
        }
        let length = if outcome.is_ok() { position + 1 } else { position };
        state.length = length;
        if outcome.is_err() {
            cut(&mut state, length);
        }
        self.sequences.insert(sequence, state);
        outcome?;
        match logits {
            _ if open => Ok(None),
            Some(Value::Float(near)) => Ok(Some((near.y, near.e))),
            _ => Err(Error::invalid("logits", "f32 that were written", "none")),
        }
    }
}

fn cut(state: &mut Sequence, length: u32) {
    state.length = length;
    if state.open_from.is_some_and(|p| p >= length) {
        state.open_from = None;
    }
    for layer in &mut state.layers {
        layer.cache.truncate(length as usize);
        layer.keys.truncate(length as usize);
        layer.values.truncate(length as usize);
    }
}

struct Frame<'i, 'a> {
    bounding: &'i mut Bounding<'a>,
    values: HashMap<ValueId, Value>,
    token: u32,
    position: u32,
}

impl Frame<'_, '_> {
    fn run(&mut self, op: &Op, state: &mut Sequence) -> Step<()> {
        match &op.kind {
            OpKind::Embed { weight, out } => self.embed(*weight, self.token, *out),
            OpKind::EmbedPosition { weight, out } => self.embed(*weight, self.position, *out),
            OpKind::RmsNorm {
                input,
                weight,
                eps,
                rows,
                out,
            } => {
                let (x, g) = (self.float(*input)?, self.vector(*weight)?);
                let n = x.y.len() / (*rows).max(1) as usize;
                let (mut y, mut e) = (Vec::new(), Vec::new());
                for at in (0..x.y.len()).step_by(n.max(1)) {
                    let part = Near {
                        y: x.y[at..at + n].to_vec(),
                        e: x.e[at..at + n].to_vec(),
                    };
                    let result = oracle::rms_norm(&part.y, &g, *eps)?;
                    e.extend(norm_bounds(&part, &part, &g, *eps, &result, 0.0));
                    y.extend(result);
                }
                self.set(*out, Near { y, e })
            }
            OpKind::LayerNorm {
                input,
                weight,
                bias,
                eps,
                out,
            } => {
                let (x, g, b) = (self.float(*input)?, self.vector(*weight)?, self.vector(*bias)?);
                let y = oracle::layer_norm(&x.y, &g, &b, *eps)?;
                let n = x.y.len() as f64;
                let mean = x.y.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
                let size = x.y.iter().map(|v| f64::from(*v).abs()).sum::<f64>() / n;
                let shift = x.e.iter().sum::<f64>() / n + (n + 2.0) * U * size;
                let centred = Near {
                    y: x.y.iter().map(|v| (f64::from(*v) - mean) as f32).collect(),
                    e: (0..x.y.len())
                        .map(|i| x.e[i] + shift + 2.0 * U * (x.abs(i) + mean.abs()))
                        .collect(),
                };
                let mut e = norm_bounds(&x, &centred, &g, *eps, &y, shift);
                for (e, b) in e.iter_mut().zip(&b) {
                    *e += U * f64::from(*b).abs();
                }
                self.set(*out, Near { y, e })
            }
            OpKind::Quantise { input, out } => {
                let x = self.float(*input)?;
                let vectors = match self.bounding.program.value(*out).map(|v| v.kind) {
                    Some(ValueKind::Quantized { vectors }) => vectors.max(1) as usize,
                    other => {
                        return Err(
                            Error::invalid("output of quantise", "quantised", format!("{other:?}")).into(),
                        );
                    }
                };
                let n = x.y.len() / vectors;
                let quantised = (0..vectors)
                    .map(|v| quantised(&x.y[v * n..(v + 1) * n], &x.e[v * n..(v + 1) * n]))
                    .collect::<Result<Vec<_>>>()?;
                self.values.insert(*out, Value::Quantized(quantised));
                Ok(())
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
                let bias = bias.map(|b| self.vector(b)).transpose()?;
                let near = self.product(*weight, 0, *input, 0, bias.as_deref())?;
                self.set(*out, near)
            }
            OpKind::Rope {
                value,
                table,
                style,
                heads,
                n_rot,
            } => {
                let x = self.float(*value)?;
                let program = self.bounding.program;
                let table = program
                    .table(*table)
                    .ok_or_else(|| Error::invalid("table", "one of the program's", "none"))?;
                let at = self.position as usize * table.cols as usize;
                let row = &table.data[at..at + table.cols as usize];
                let y = oracle::rope(&x.y, row, *style, *heads as usize, *n_rot as usize)?;
                // A turn keeps lengths: each element's error is at most that of its pair, times the table's largest value.
                let largest = row.iter().fold(1.0, |m: f64, t| m.max(f64::from(*t).abs()));
                let head = x.y.len() / *heads as usize;
                let e = (0..x.y.len())
                    .map(|i| {
                        let from = i / head * head;
                        let (at, n_rot) = (i - from, *n_rot as usize);
                        if at >= n_rot {
                            return x.e[i];
                        }
                        let pair = match style {
                            hoist_backend::RopeStyle::Interleaved => at ^ 1,
                            hoist_backend::RopeStyle::HalfSplit => (at + n_rot / 2) % n_rot,
                        };
                        let pair = from + pair;
                        largest * (x.e[i] + x.e[pair] + 4.0 * U * (x.abs(i) + x.abs(pair))) + FLUSHED
                    })
                    .collect();
                self.set(*value, Near { y, e })
            }
            OpKind::StoreKv { key, value } => {
                let (key, value) = (self.float(*key)?, self.float(*value)?);
                let layer = layer_of(op, state)?;
                layer.cache.store(&key.y, &value.y)?;
                layer.keys.push(stored(&key));
                layer.values.push(stored(&value));
                Ok(())
            }
            OpKind::Attention {
                query,
                heads,
                scale,
                window,
                soft_cap,
                out,
            } => {
                let q = self.float(*query)?;
                let spec = AttentionSpec {
                    heads: *heads as usize,
                    scale: *scale,
                    window: *window,
                    soft_cap: *soft_cap,
                };
                let layer = layer_of(op, state)?;
                let y = oracle::attention(&spec, &q.y, &layer.cache)?;
                let e = attention_bounds(&spec, &q, layer);
                self.set(*out, Near { y, e })
            }
            OpKind::Activation { input, kind, out } => {
                let x = self.float(*input)?;
                let y = oracle::activate(*kind, &x.y);
                // Neither function is steeper than 1.13 anywhere.
                let e = (0..y.len())
                    .map(|i| {
                        1.13 * x.e[i] + 16.0 * U * f64::from(y[i]).abs() + U * x.abs(i).min(1.0) + FLUSHED
                    })
                    .collect();
                self.set(*out, Near { y, e })
            }
            OpKind::Mul { a, b, out } => {
                let (a, b) = (self.float(*a)?, self.float(*b)?);
                let y = oracle::mul(&a.y, &b.y)?;
                let e = (0..y.len())
                    .map(|i| {
                        a.abs(i) * b.e[i]
                            + b.abs(i) * a.e[i]
                            + a.e[i] * b.e[i]
                            + U * f64::from(y[i]).abs()
                            + FLUSHED
                    })
                    .collect();
                self.set(*out, Near { y, e })
            }
            OpKind::Add { a, b, out } => {
                let (a, b) = (self.float(*a)?, self.float(*b)?);
                let y = oracle::add(&a.y, &b.y)?;
                let e = (0..y.len())
                    .map(|i| a.e[i] + b.e[i] + U * f64::from(y[i]).abs() + FLUSHED)
                    .collect();
                self.set(*out, Near { y, e })
            }
            OpKind::Scale { input, factor, out } => {
                let x = self.float(*input)?;
                let y = oracle::scale(&x.y, *factor);
                let f = f64::from(*factor).abs();
                let e = (0..y.len())
                    .map(|i| f * x.e[i] + U * f64::from(y[i]).abs() + FLUSHED)
                    .collect();
                self.set(*out, Near { y, e })
            }
            OpKind::SoftCap { input, cap, out } => {
                let x = self.float(*input)?;
                let y = oracle::soft_cap(&x.y, *cap);
                let cap = f64::from(*cap).abs();
                let e = (0..y.len())
                    .map(|i| x.e[i] + 8.0 * U * f64::from(y[i]).abs() + U * x.abs(i).min(cap) + FLUSHED)
                    .collect();
                self.set(*out, Near { y, e })
            }
            OpKind::RouterTopK {
                logits,
                k,
                normalise,
                experts,
                weights,
            } => {
                let x = self.float(*logits)?;
                let (chosen, p) = oracle::router_top_k(&x.y, *k as usize, *normalise)?;
                let all = oracle::router_top_k(&x.y, x.y.len(), false)?;
                let worst = x.e.iter().fold(0.0, |m: f64, e| m.max(*e));
                let relative = (2.0 * worst).exp_m1() + (x.y.len() as f64 + 16.0) * U;
                // Any two neighbours in the order of choice, up to the first that is not chosen, must be told apart.
                let apart = all.1.windows(2).take(*k as usize).all(|pair| {
                    let (a, b) = (f64::from(pair[0]), f64::from(pair[1]));
                    a == b && relative < 64.0 * U || a - b > 2.0 * relative * a
                });
                if !apart {
                    return Err(Stop::Open);
                }
                let factor = if *normalise { 2.0 } else { 1.0 };
                let e = p
                    .iter()
                    .map(|p| f64::from(*p) * (factor * relative + 8.0 * U) + FLUSHED)
                    .collect();
                self.values.insert(*experts, Value::Experts(chosen));
                self.set(*weights, Near { y: p, e })
            }
            OpKind::ExpertMatMul {
                input,
                experts,
                weight,
                out,
            } => {
                let mut all = Near {
                    y: Vec::new(),
                    e: Vec::new(),
                };
                for (slot, expert) in self.experts(*experts)?.into_iter().enumerate() {
                    let near = self.product(*weight, expert, *input, slot, None)?;
                    all.y.extend(near.y);
                    all.e.extend(near.e);
                }
                self.set(*out, all)
            }
            OpKind::WeightedSum {
                input,
                experts,
                weights,
                out,
            } => {
                let (x, experts, w) = (
                    self.float(*input)?,
                    self.experts(*experts)?,
                    self.float(*weights)?,
                );
                let n = x.y.len() / experts.len().max(1);
                let vectors: Vec<&[f32]> = x.y.chunks(n.max(1)).collect();
                let y = oracle::weighted_sum(&vectors, &experts, &w.y)?;
                let e = (0..n)
                    .map(|i| {
                        (0..experts.len())
                            .map(|s| {
                                let at = s * n + i;
                                w.abs(s) * x.e[at]
                                    + x.abs(at) * w.e[s]
                                    + x.e[at] * w.e[s]
                                    + (experts.len() as f64 + 1.0) * U * w.abs(s) * x.abs(at)
                            })
                            .sum::<f64>()
                            + FLUSHED
                    })
                    .collect();
                self.set(*out, Near { y, e })
            }
            other => Err(Error::invalid("operation", "one that the suite knows", other.name()).into()),
        }
    }

    fn embed(&mut self, at: WeightRef, row: u32, out: ValueId) -> Step<()> {
        let y = with_matrix(self.bounding.weights, at, 0, |m| {
            oracle::embed_row(m, row as usize)
        })?;
        let e = y
            .iter()
            .map(|v| 4.0 * U * f64::from(*v).abs() + FLUSHED)
            .collect();
        self.set(out, Near { y, e })
    }

    /// A product with one matrix, and its bounds.
    fn product(
        &mut self,
        at: WeightRef,
        expert: u32,
        input: ValueId,
        slot: usize,
        bias: Option<&[f32]>,
    ) -> Step<Near> {
        let value = self.get(input)?.clone();
        let weights = self.bounding.weights;
        let rows = match self.bounding.rows.entry((at, expert)) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => place.insert(with_matrix(weights, at, expert, |m| {
                (0..m.rows)
                    .map(|r| oracle::embed_row(m, r))
                    .collect::<Result<Vec<_>>>()
            })?),
        };
        let cols = rows.first().map_or(0, Vec::len);
        let (y, x, brought, new, encoding) = match &value {
            Value::Quantized(vectors) => {
                let slot = if vectors.len() == 1 { 0 } else { slot };
                let q = vectors
                    .get(slot)
                    .ok_or_else(|| Error::invalid("slot of an expert", vectors.len(), slot))?;
                let (y, encoding) = with_matrix(weights, at, expert, |m| {
                    Ok((oracle::matmul_quantized(m, &q.codes, bias)?, m.encoding))
                })?;
                (y, q.x.clone(), q.brought.clone(), q.steps.clone(), encoding)
            }
            Value::Float(near) => {
                let from = if near.y.len() == cols { 0 } else { slot * cols };
                let part = near
                    .y
                    .get(from..from + cols)
                    .ok_or_else(|| Error::invalid("input of a matrix", from + cols, near.y.len()))?;
                let (y, encoding) = with_matrix(weights, at, expert, |m| {
                    Ok((oracle::matmul(m, part, bias)?, m.encoding))
                })?;
                let rounding = match encoding {
                    Encoding::F16 => HALF_F16,
                    Encoding::BF16 => HALF_BF16,
                    _ => U,
                };
                let x: Vec<f64> = part.iter().map(|v| f64::from(*v)).collect();
                let new = x.iter().map(|x| rounding * x.abs()).collect();
                (y, x, near.e[from..from + cols].to_vec(), new, encoding)
            }
            Value::Experts(_) => {
                return Err(Error::invalid("input of a matrix", "activations", "experts").into());
            }
        };
        let n = cols as f64;
        let e = rows
            .iter()
            .enumerate()
            .map(|(r, row)| {
                let (mut exact, mut size) = (0.0, 0.0);
                let (mut old, mut fresh) = (Sum::default(), Sum::default());
                for (i, w) in row.iter().enumerate() {
                    let w = f64::from(*w);
                    exact += w * x[i];
                    size += (w * x[i]).abs();
                    old.add(w * brought[i]);
                    fresh.add(w * new[i]);
                }
                let carried = old.bound(BROUGHT) + fresh.bound(NEW);
                let b = bias.map_or(0.0, |b| f64::from(b[r]));
                // What the contract itself drops where it aligns scales and segments.
                let dropped = if encoding.is_quantized() {
                    (f64::from(y[r]) - (exact + b)).abs()
                } else {
                    0.0
                };
                carried
                    + dropped
                    + (n + 8.0) * U * size
                    + 2.0 * U * (f64::from(y[r]).abs() + b.abs())
                    + FLUSHED
            })
            .collect();
        Ok(Near { y, e })
    }

    fn get(&self, id: ValueId) -> Result<&Value> {
        self.values
            .get(&id)
            .ok_or_else(|| Error::invalid("a value", "written before it is read", format!("{id:?}")))
    }

    fn float(&self, id: ValueId) -> Result<Near> {
        match self.get(id)? {
            Value::Float(near) => Ok(near.clone()),
            _ => Err(Error::invalid("a value", "f32", "another kind")),
        }
    }

    fn experts(&self, id: ValueId) -> Result<Vec<u32>> {
        match self.get(id)? {
            Value::Experts(e) => Ok(e.clone()),
            _ => Err(Error::invalid("a value", "experts", "another kind")),
        }
    }

    fn vector(&self, at: WeightRef) -> Result<Vec<f32>> {
        with_matrix(self.bounding.weights, at, 0, |m| oracle::embed_row(m, 0))
    }

    /// There is no bound of what an infinity becomes: it ends a token at once, whose answer may then be anything finite.
    fn set(&mut self, id: ValueId, near: Near) -> Step<()> {
        if near.y.iter().any(|v| !v.is_finite()) {
            let (op, layer) = (OpName::Quantise, None);
            return Err(Error::NonFinite { op, layer }.into());
        }
        self.values.insert(id, Value::Float(near));
        Ok(())
    }
}

/// Calls `f` with one matrix of a weight.
fn with_matrix<T>(
    weights: &dyn Weights,
    at: WeightRef,
    number: u32,
    f: impl FnOnce(&Matrix<'_>) -> Result<T>,
) -> Result<T> {
    let missing = || Error::invalid("a weight", "one that is present", format!("{at:?}"));
    let weight = weights.weight(at).ok_or_else(missing)?;
    let shape = weight.shape;
    let one = weight.encoding.nbytes(Shape::matrix(shape.rows, shape.cols))? as usize;
    let bytes = weight
        .bytes
        .get(number as usize * one..(number as usize + 1) * one)
        .ok_or_else(|| Error::invalid("matrix of a weight", shape.matrices, number))?;
    f(&Matrix {
        encoding: weight.encoding,
        rows: shape.rows as usize,
        cols: shape.cols as usize,
        bytes,
    })
}

fn layer_of<'s>(op: &Op, state: &'s mut Sequence) -> Result<&'s mut Layer> {
    op.layer
        .and_then(|l| state.layers.get_mut(l as usize))
        .ok_or_else(|| Error::invalid("layer", "one with keys and values", format!("{:?}", op.layer)))
}

/// A norm of `c` (that is `x`, or `x` without its mean) scaled by `g`: `c / rms(c) · g`. `shift`: how far all of `c` may be
/// off together.
fn norm_bounds(x: &Near, c: &Near, g: &[f32], eps: f32, y: &[f32], shift: f64) -> Vec<f64> {
    let n = c.y.len() as f64;
    let (mut squares, mut second) = (0.0, 0.0);
    let mut first = Sum::default();
    for i in 0..c.y.len() {
        let v = c.abs(i);
        squares += v * v;
        first.add(2.0 * v * c.e[i]);
        second += 2.0 * v * shift + (c.e[i] + shift).powi(2);
    }
    let off = first.bound(BROUGHT) + second;
    let mean = squares / n + f64::from(eps);
    let inverse = 1.0 / mean.sqrt();
    // Relative error of the mean square, and half of it for the root; beyond a tenth the first order does not hold.
    let relative = (off / n + (n + 4.0) * U * squares / n) / mean;
    let relative = if relative < 0.1 { 0.55 * relative } else { relative } + 4.0 * U;
    (0..c.y.len())
        .map(|i| {
            let g = f64::from(g[i]).abs();
            g * inverse * (c.e[i] * (1.0 + relative) + c.abs(i) * relative)
                + 4.0 * U * f64::from(y[i]).abs()
                + U * x.abs(i).min(1.0) * g * inverse * f64::from(u8::from(shift > 0.0))
                + FLUSHED
        })
        .collect()
}

fn quantised(x: &[f32], e: &[f64]) -> Result<Quantized> {
    let codes = oracle::quantise(x)?;
    let (mut values, mut steps) = (Vec::new(), Vec::new());
    for segment in &codes.segments {
        let d = segment.m as f64 * f64::from(segment.e).exp2();
        for (i, code) in segment.q.iter().enumerate() {
            let step = segment.u[i / 32] as f64 * d;
            values.push(*code as f64 * step);
            steps.push(if segment.m == 0 { ZERO_SEGMENT } else { step });
        }
    }
    Ok(Quantized {
        codes,
        x: values,
        brought: e.to_vec(),
        steps,
    })
}

/// Errors of a sum's terms.
#[derive(Default)]
struct Sum {
    squares: f64,
    all: f64,
}

impl Sum {
    fn add(&mut self, term: f64) {
        self.squares += term * term;
        self.all += term.abs();
    }

    /// As independent errors add, with a margin; never more than all of them at once.
    fn bound(&self, margin: f64) -> f64 {
        (margin * self.squares.sqrt()).min(self.all)
    }
}

/// Bounds of keys or values in the cache.
fn stored(x: &Near) -> Vec<f64> {
    (0..x.y.len())
        .map(|i| x.e[i] + 2.0 * HALF_F16 * (x.abs(i) + x.e[i]) + (-24f64).exp2())
        .collect()
}

fn attention_bounds(spec: &AttentionSpec, q: &Near, layer: &Layer) -> Vec<f64> {
    let positions = layer.cache.len();
    let first = spec.window.map_or(0, |w| positions.saturating_sub(w as usize));
    let head_dim = q.y.len() / spec.heads.max(1);
    let kv_heads = layer.keys[0].len() / head_dim.max(1);
    let group = spec.heads / kv_heads.max(1);
    let scale = f64::from(spec.scale);
    let mut bounds = Vec::with_capacity(q.y.len());
    for head in 0..spec.heads {
        let (at, kv) = (head * head_dim, head / group.max(1) * head_dim);
        let mut scores = Vec::new();
        let mut worst = 0.0f64;
        for p in first..positions {
            let Some((key, _)) = layer.cache.at(p) else {
                continue;
            };
            let (mut dot, mut size) = (0.0, 0.0);
            let mut brought = Sum::default();
            for i in 0..head_dim {
                let (a, b) = (f64::from(q.y[at + i]), f64::from(key[kv + i]));
                let (ea, eb) = (q.e[at + i], layer.keys[p][kv + i]);
                dot += a * b;
                size += (a * b).abs();
                brought.add(a * eb);
                brought.add(b * ea);
                brought.add(ea * eb);
            }
            let mut score = dot * scale;
            let mut off = scale.abs() * (brought.bound(BROUGHT) + (head_dim as f64 + 4.0) * U * size);
            if let Some(cap) = spec.soft_cap.map(f64::from) {
                score = cap * (score / cap).tanh();
                off += 8.0 * U * cap.abs();
            }
            worst = worst.max(off);
            scores.push(score);
        }
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let count = weights.len() as f64;
        let relative = (2.0 * worst).exp_m1() + (count + 32.0) * U + 2.0 * HALF_F16;
        for i in 0..head_dim {
            let mut size = 0.0;
            let mut brought = Sum::default();
            for (w, p) in weights.iter().zip(first..positions) {
                let Some((_, value)) = layer.cache.at(p) else {
                    continue;
                };
                size += w / sum * f64::from(value[kv + i]).abs();
                brought.add(w / sum * layer.values[p][kv + i]);
            }
            bounds.push(relative * size + (1.0 + relative) * brought.bound(BROUGHT) + FLUSHED);
        }
    }
    bounds
}

#[cfg(test)]
mod tests {
    use hoist_backend::{
        BackendInfo, DeviceInfo, EncodingSet, FloatLayout, Limits, MemoryInfo, NumericsClass, OpSet,
        OpenOptions, Sizing, WeightBackend,
    };

    use super::super::sketch::{Sketch, transformer};
    use super::*;
    use crate::context::{PluginFacts, Target};
    use crate::judge::{Bounds, bounded, exact};
    use crate::oracle::Interpreter;
    use crate::oracle::deviation::{Deviation, with_deviation};
    use crate::{Context, Failure};

    /// No backend at all: the oracle stands for one.
    struct Nowhere;

    impl Target for Nowhere {
        fn name(&self) -> &str {
            "nowhere"
        }

        fn devices(&self) -> Result<Vec<DeviceInfo>> {
            Ok(Vec::new())
        }

        fn open(&self, _: &OpenOptions) -> Result<Box<dyn WeightBackend>> {
            Err(Error::internal("nowhere", "nothing to open"))
        }

        fn open_ordinal(&self, _: u32, _: &OpenOptions) -> Result<Box<dyn WeightBackend>> {
            Err(Error::internal("nowhere", "nothing to open"))
        }

        fn plugin(&self) -> Option<&PluginFacts> {
            None
        }
    }

    fn info() -> BackendInfo {
        BackendInfo {
            name: "nowhere".into(),
            device: "nowhere".into(),
            device_name: "nowhere".into(),
            numerics: NumericsClass::Bounded,
            stored: EncodingSet::weights(),
            computed: EncodingSet::weights(),
            ops: OpSet::all(),
            float_layout: FloatLayout::OutIn,
            limits: Limits::default(),
            sizing: Sizing {
                weight_alignment: 64,
                quantized_row_bytes: 0,
                quantized_segment_bytes: 0,
                index_entry_bytes: 8,
            },
            memory: MemoryInfo { devices: Vec::new() },
        }
    }

    const TOKENS: u32 = 8;

    /// A random transformer, with what the contract says and how far one may be off; `None`: too close to call.
    type Expected = Vec<Option<(Vec<f32>, Vec<f64>)>>;

    fn drawn(seed: u64) -> (Sketch, Vec<u32>, Expected) {
        let info = info();
        let mut cx = Context::new(&Nowhere, &info, seed, "bounds", false);
        let sketch = transformer(&mut cx, TOKENS).unwrap();
        let tokens: Vec<u32> = (0..TOKENS)
            .map(|_| cx.random.below(sketch.program.vocab.into()) as u32)
            .collect();
        let mut bounding = Bounding::new(&sketch.program, &sketch);
        let expected = tokens
            .iter()
            .map(|t| bounding.step(SequenceId(0), *t).unwrap())
            .collect();
        (sketch, tokens, expected)
    }

    /// The oracle's logits, with one deviation.
    fn found(sketch: &Sketch, tokens: &[u32], deviation: Option<Deviation>) -> Vec<Vec<f32>> {
        let run = || {
            let mut interpreter = Interpreter::new(&sketch.program, sketch, KvDtype::F16);
            let step = |t: &u32| interpreter.step(SequenceId(0), *t, true).unwrap().unwrap();
            tokens.iter().map(step).collect()
        };
        match deviation {
            Some(deviation) => with_deviation(deviation, run),
            None => run(),
        }
    }

    fn verdict(expected: &Expected, found: &[Vec<f32>]) -> std::result::Result<f64, Failure> {
        let mut worst = 0.0f64;
        for (expected, found) in expected.iter().zip(found) {
            let Some((y, bounds)) = expected else { continue };
            let allowed = Bounds {
                element: bounds,
                row: ROW,
                nmse: nmse(y, bounds),
            };
            worst = worst.max(bounded("logits", y, found, y.len(), &allowed)?.element);
        }
        Ok(worst)
    }

    #[test]
    fn what_is_bounded_is_what_the_interpreter_says() {
        let mut judged = 0;
        for seed in 0..12 {
            let (sketch, tokens, expected) = drawn(seed);
            for (expected, found) in expected.iter().zip(found(&sketch, &tokens, None)) {
                let Some((y, _)) = expected else { continue };
                exact("logits", y, &found).unwrap();
                judged += 1;
            }
        }
        assert!(judged >= 3 * TOKENS, "{judged}");
    }

    #[test]
    fn another_rounding_is_within_bounds() {
        use Deviation as D;
        let roundings = [
            D::TiesAwayFromZero,
            D::UnderflowFlushed,
            D::SegmentScaleByReciprocal,
            D::MultiplierByReciprocal,
            D::QuantByDivision,
            D::QuantTiesAway,
            D::DotInThirtyTwoLanes,
            D::DotInOneAccumulator,
            D::DotWithoutFma,
            D::DotFoldsNeighbours,
            D::SumInSixtyFourLanes,
            D::SquaresWithoutFma,
            D::RmsGammaFirst,
            D::RmsMeanByReciprocal,
            D::LayerNormWithoutFma,
            D::LayerNormOnePass,
            D::RopeWithoutFma,
            D::RopeFusesTheOtherProduct,
            D::KvNotRounded,
            D::ScoreWithoutFma,
            D::QueryScaledFirst,
            D::AttentionDividesBySum,
            D::SiluByReciprocal,
            D::GeluWithoutFma,
            D::SoftCapByReciprocal,
            D::RouterNormalisesAscending,
            D::WeightedSumInSlotOrder,
            D::ExpByNearestInteger,
        ];
        let mut worst = 0.0f64;
        for seed in 0..24 {
            let (sketch, tokens, expected) = drawn(seed);
            for deviation in roundings {
                let found = found(&sketch, &tokens, Some(deviation));
                match verdict(&expected, &found) {
                    Ok(error) => worst = worst.max(error),
                    Err(failure) => panic!("seed {seed}, {deviation:?}: {failure}"),
                }
            }
        }
        eprintln!("worst rounding: {worst} of its bound");
        assert!(worst > 0.0);
    }
}
