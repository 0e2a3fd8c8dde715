//! A whole decode program, one token at a time.

use std::borrow::Cow;
use std::collections::HashMap;

use hoist_backend::{
    DecodeProgram, Encoding, Error, KvDtype, Op, OpKind, OpName, Result, SequenceId, Shape, TableId, ValueId,
    ValueKind, WeightRef,
};

use super::activation::{QuantizedVector, quantise};
use super::attention::{AttentionSpec, KvCache, attention, rope};
use super::elementary::{activate, add, mul, scale, soft_cap};
use super::matmul::{Matrix, matmul, matmul_quantized};
use super::norm::{layer_norm, rms_norm};
use super::router::{router_top_k, weighted_sum};
use super::weight::embed_row;
use super::{finite, same_length};

/// A weight in canonical bytes.
#[derive(Clone, Debug)]
pub struct Weight<'a> {
    /// Encoding of the bytes.
    pub encoding: Encoding,
    /// `[matrices, rows, cols]`
    pub shape: Shape,
    /// As many as encoding and shape say.
    pub bytes: Cow<'a, [u8]>,
}

/// Where the interpreter finds weights: any function from a place in the index to a weight.
pub trait Weights {
    /// The weight at that place, if there is one.
    fn weight(&self, at: WeightRef) -> Option<Weight<'_>>;
}

impl<F: Fn(WeightRef) -> Option<Weight<'static>>> Weights for F {
    fn weight(&self, at: WeightRef) -> Option<Weight<'_>> {
        self(at)
    }
}

impl Weights for HashMap<(Option<u32>, hoist_backend::Role), Weight<'static>> {
    fn weight(&self, at: WeightRef) -> Option<Weight<'_>> {
        self.get(&(at.layer, at.role)).cloned()
    }
}

/// What a buffer holds for the token in hand.
#[derive(Clone, Debug)]
enum Value {
    F32(Vec<f32>),
    Quantized(Vec<QuantizedVector>),
    Experts(Vec<u32>),
}

/// Caches of one sequence, by layer.
#[derive(Clone, Debug)]
struct Sequence {
    length: u32,
    layers: Vec<KvCache>,
}

/// Runs a decode program over canonical weights, token after token.
pub struct Interpreter<'a> {
    program: &'a DecodeProgram,
    weights: &'a dyn Weights,
    kv: KvDtype,
    sequences: HashMap<SequenceId, Sequence>,
}

impl<'a> Interpreter<'a> {
    /// An interpreter without any sequence.
    pub fn new(program: &'a DecodeProgram, weights: &'a dyn Weights, kv: KvDtype) -> Self {
        Self {
            program,
            weights,
            kv,
            sequences: HashMap::new(),
        }
    }

    /// Tokens that a sequence holds; 0 for one that has not been used.
    pub fn length(&self, sequence: SequenceId) -> u32 {
        self.sequences.get(&sequence).map_or(0, |s| s.length)
    }

    /// Cuts a sequence back to `length` tokens; 0 resets it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if it is shorter.
    pub fn truncate(&mut self, sequence: SequenceId, length: u32) -> Result<()> {
        let have = self.length(sequence);
        if length > have {
            return Err(Error::invalid(
                "length to truncate to",
                format!("at most {have}"),
                length,
            ));
        }
        if let Some(s) = self.sequences.get_mut(&sequence) {
            s.length = length;
            s.layers.iter_mut().for_each(|kv| kv.truncate(length as usize));
        }
        Ok(())
    }

    /// Appends one token to a sequence; its logits if `wanted`.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`], [`Error::ContextExceeded`], [`Error::NonFinite`], [`Error::NonFiniteWeight`], and
    /// [`Error::InvalidArgument`] for a program that contradicts itself or its weights. The sequence is unchanged then.
    pub fn step(&mut self, sequence: SequenceId, token: u32, wanted: bool) -> Result<Option<Vec<f32>>> {
        let program = self.program;
        let position = self.length(sequence);
        if token >= program.vocab {
            return Err(Error::TokenOutOfRange {
                token,
                vocab: program.vocab,
            });
        }
        if position >= program.max_context {
            return Err(Error::ContextExceeded {
                sequence: sequence.0,
                length: position,
                adding: 1,
                capacity: program.max_context,
            });
        }
        let mut state = self.sequences.remove(&sequence).unwrap_or_else(|| Sequence {
            length: 0,
            layers: program
                .kv
                .iter()
                .map(|spec| KvCache::new(*spec, self.kv))
                .collect(),
        });
        let result = self.run(&mut state, token, position, wanted);
        let length = if result.is_ok() { position + 1 } else { position };
        state.length = length;
        state
            .layers
            .iter_mut()
            .for_each(|kv| kv.truncate(length as usize));
        self.sequences.insert(sequence, state);
        result
    }

    fn run(&self, state: &mut Sequence, token: u32, position: u32, wanted: bool) -> Result<Option<Vec<f32>>> {
        let ops = if wanted {
            &self.program.ops[..]
        } else {
            self.program
                .ops
                .get(..self.program.tail)
                .ok_or_else(|| Error::invalid("tail", self.program.ops.len(), self.program.tail))?
        };
        let mut frame = Frame {
            interpreter: self,
            values: vec![None; self.program.values.len()],
            token,
            position,
        };
        for op in ops {
            frame.run(op, state).map_err(|e| named(e, op))?;
        }
        match wanted {
            true => {
                let logits = frame.f32(self.program.logits)?.to_vec();
                Ok(Some(finite(OpName::Logits, logits)?))
            }
            false => Ok(None),
        }
    }
}

/// Names the operation and layer of the program in an error of its arithmetic.
fn named(error: Error, op: &Op) -> Error {
    match error {
        Error::NonFinite { .. } => Error::NonFinite {
            op: op.kind.name(),
            layer: op.layer,
        },
        other => other,
    }
}

/// One token on its way through the program.
struct Frame<'i, 'a> {
    interpreter: &'i Interpreter<'a>,
    values: Vec<Option<Value>>,
    token: u32,
    position: u32,
}

impl Frame<'_, '_> {
    fn run(&mut self, op: &Op, state: &mut Sequence) -> Result<()> {
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
                let gamma = self.vector(*weight)?;
                let y = self
                    .split(*input, *rows as usize)?
                    .into_iter()
                    .map(|x| rms_norm(x, &gamma, *eps))
                    .collect::<Result<Vec<_>>>()?;
                self.set(*out, y.concat())
            }
            OpKind::LayerNorm {
                input,
                weight,
                bias,
                eps,
                out,
            } => {
                let (gamma, bias) = (self.vector(*weight)?, self.vector(*bias)?);
                let y = layer_norm(self.f32(*input)?, &gamma, &bias, *eps)?;
                self.set(*out, y)
            }
            OpKind::Quantise { input, out } => {
                let vectors = match self.spec(*out)?.kind {
                    ValueKind::Quantized { vectors } => vectors as usize,
                    other => {
                        return Err(Error::invalid(
                            "output of quantise",
                            "quantised",
                            format!("{other:?}"),
                        ));
                    }
                };
                let q = self
                    .split(*input, vectors)?
                    .into_iter()
                    .map(quantise)
                    .collect::<Result<Vec<_>>>()?;
                self.put(*out, Value::Quantized(q))
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
                let y = self.product(*weight, 0, *input, 0, bias.as_deref())?;
                self.set(*out, y)
            }
            OpKind::Rope {
                value,
                table,
                style,
                heads,
                n_rot,
            } => {
                let row = self.table_row(*table)?;
                let y = rope(self.f32(*value)?, row, *style, *heads as usize, *n_rot as usize)?;
                self.set(*value, y)
            }
            OpKind::StoreKv { key, value } => {
                let (key, value) = (self.f32(*key)?, self.f32(*value)?);
                self.cache(op, state)?.store(key, value)
            }
            OpKind::Attention {
                query,
                heads,
                scale,
                window,
                soft_cap,
                out,
            } => {
                let spec = AttentionSpec {
                    heads: *heads as usize,
                    scale: *scale,
                    window: *window,
                    soft_cap: *soft_cap,
                };
                let y = attention(&spec, self.f32(*query)?, self.cache(op, state)?)?;
                self.set(*out, y)
            }
            OpKind::Activation { input, kind, out } => self.set(*out, activate(*kind, self.f32(*input)?)),
            OpKind::Mul { a, b, out } => self.set(*out, mul(self.f32(*a)?, self.f32(*b)?)?),
            OpKind::Add { a, b, out } => self.set(*out, add(self.f32(*a)?, self.f32(*b)?)?),
            OpKind::Scale { input, factor, out } => self.set(*out, scale(self.f32(*input)?, *factor)),
            OpKind::SoftCap { input, cap, out } => self.set(*out, soft_cap(self.f32(*input)?, *cap)),
            OpKind::RouterTopK {
                logits,
                k,
                normalise,
                experts,
                weights,
            } => {
                let (chosen, p) = router_top_k(self.f32(*logits)?, *k as usize, *normalise)?;
                self.put(*experts, Value::Experts(chosen))?;
                self.set(*weights, p)
            }
            OpKind::ExpertMatMul {
                input,
                experts,
                weight,
                out,
            } => {
                let y = self
                    .experts(*experts)?
                    .iter()
                    .enumerate()
                    .map(|(slot, expert)| self.product(*weight, *expert, *input, slot, None))
                    .collect::<Result<Vec<_>>>()?;
                self.set(*out, y.concat())
            }
            OpKind::WeightedSum {
                input,
                experts,
                weights,
                out,
            } => {
                let experts = self.experts(*experts)?;
                let y = weighted_sum(&self.split(*input, experts.len())?, experts, self.f32(*weights)?)?;
                self.set(*out, y)
            }
            other => Err(Error::Unsupported {
                backend: "oracle".into(),
                what: hoist_backend::UnsupportedWhat::Op(other.name()),
            }),
        }
    }

    fn embed(&mut self, at: WeightRef, row: u32, out: ValueId) -> Result<()> {
        let weight = self.weight(at)?;
        let y = embed_row(&matrix(&weight, 0)?, row as usize)?;
        self.set(out, y)
    }

    /// `weight[expert] · input[slot] + bias`; slots share an input that holds one vector.
    fn product(
        &self,
        at: WeightRef,
        expert: u32,
        input: ValueId,
        slot: usize,
        bias: Option<&[f32]>,
    ) -> Result<Vec<f32>> {
        let weight = self.weight(at)?;
        let matrix = matrix(&weight, expert)?;
        match self.value(input)? {
            Value::Quantized(vectors) => {
                let vector = if vectors.len() == 1 { 0 } else { slot };
                let x = vectors.get(vector).ok_or_else(|| {
                    Error::invalid("slot of an expert", format!("below {}", vectors.len()), slot)
                })?;
                matmul_quantized(&matrix, x, bias)
            }
            Value::F32(_) if matrix.encoding.is_quantized() => Err(Error::invalid(
                format!("input of a {} matrix", matrix.encoding),
                "quantised",
                "f32",
            )),
            Value::F32(x) if x.len() == matrix.cols => matmul(&matrix, x, bias),
            Value::F32(x) => {
                let x = x
                    .get(slot * matrix.cols..(slot + 1) * matrix.cols)
                    .ok_or_else(|| Error::invalid("input of a matrix", matrix.cols * (slot + 1), x.len()))?;
                matmul(&matrix, x, bias)
            }
            Value::Experts(_) => Err(Error::invalid("input of a matrix", "activations", "experts")),
        }
    }

    fn cache<'s>(&self, op: &Op, state: &'s mut Sequence) -> Result<&'s mut KvCache> {
        let layers = state.layers.len();
        op.layer
            .and_then(|layer| state.layers.get_mut(layer as usize))
            .ok_or_else(|| {
                Error::invalid(
                    format!("layer of {}", op.kind.name()),
                    format!("below {layers}"),
                    format!("{:?}", op.layer),
                )
            })
    }

    fn table_row(&self, id: TableId) -> Result<&[f32]> {
        let missing = || Error::invalid("table", "one that the program has", format!("{id:?}"));
        let table = self.interpreter.program.table(id).ok_or_else(missing)?;
        let start = self.position as usize * table.cols as usize;
        table
            .data
            .get(start..start + table.cols as usize)
            .ok_or_else(|| Error::invalid("table position", format!("below {}", table.rows), self.position))
    }

    fn weight(&self, at: WeightRef) -> Result<Weight<'_>> {
        self.interpreter.weights.weight(at).ok_or_else(|| {
            Error::invalid(
                format!("weight {} of layer {:?}", at.role, at.layer),
                "one that is present",
                "none",
            )
        })
    }

    /// A norm vector or bias: f32.
    fn vector(&self, at: WeightRef) -> Result<Vec<f32>> {
        let weight = self.weight(at)?;
        embed_row(&matrix(&weight, 0)?, 0)
    }

    fn spec(&self, id: ValueId) -> Result<&hoist_backend::ValueSpec> {
        self.interpreter
            .program
            .value(id)
            .ok_or_else(|| Error::invalid("value", "one that the program has", format!("{id:?}")))
    }

    fn value(&self, id: ValueId) -> Result<&Value> {
        let spec = self.spec(id)?;
        self.values[id.0 as usize].as_ref().ok_or_else(|| {
            Error::invalid(
                format!("value `{}`", spec.name),
                "written before it is read",
                "unwritten",
            )
        })
    }

    fn f32(&self, id: ValueId) -> Result<&[f32]> {
        match self.value(id)? {
            Value::F32(x) => Ok(x),
            _ => Err(Error::invalid(
                format!("value `{}`", self.spec(id)?.name),
                "f32",
                "another kind",
            )),
        }
    }

    fn experts(&self, id: ValueId) -> Result<&[u32]> {
        match self.value(id)? {
            Value::Experts(e) => Ok(e),
            _ => Err(Error::invalid(
                format!("value `{}`", self.spec(id)?.name),
                "experts",
                "another kind",
            )),
        }
    }

    /// A value as `parts` vectors of equal length.
    fn split(&self, id: ValueId, parts: usize) -> Result<Vec<&[f32]>> {
        let x = self.f32(id)?;
        if parts == 0 || x.is_empty() || !x.len().is_multiple_of(parts) {
            return Err(Error::invalid(
                format!("elements of value `{}`", self.spec(id)?.name),
                format!("a positive multiple of {parts}"),
                x.len(),
            ));
        }
        Ok(x.chunks(x.len() / parts).collect())
    }

    fn set(&mut self, id: ValueId, x: Vec<f32>) -> Result<()> {
        self.put(id, Value::F32(x))
    }

    fn put(&mut self, id: ValueId, value: Value) -> Result<()> {
        let spec = self.spec(id)?;
        let len = match &value {
            Value::F32(x) => x.len(),
            Value::Quantized(vectors) => vectors.iter().map(QuantizedVector::len).sum(),
            Value::Experts(e) => e.len(),
        };
        same_length(&format!("value `{}`", spec.name), spec.width as usize, len)?;
        self.values[id.0 as usize] = Some(value);
        Ok(())
    }
}

/// One matrix of a weight.
fn matrix<'w>(weight: &'w Weight<'_>, number: u32) -> Result<Matrix<'w>> {
    let shape = weight.shape;
    let size =
        |n: u64| usize::try_from(n).map_err(|_| Error::invalid("shape", "sizes that fit memory", shape));
    let one = size(weight.encoding.nbytes(Shape::matrix(shape.rows, shape.cols))?)?;
    let range = (number as usize)
        .checked_mul(one)
        .and_then(|start| Some(start..start.checked_add(one)?));
    let bytes = range
        .filter(|_| u64::from(number) < shape.matrices)
        .and_then(|range| weight.bytes.get(range))
        .ok_or_else(|| {
            Error::invalid(
                "matrix of a weight",
                format!("below {} and within {} bytes", shape.matrices, weight.bytes.len()),
                number,
            )
        })?;
    Ok(Matrix {
        encoding: weight.encoding,
        rows: size(shape.rows)?,
        cols: size(shape.cols)?,
        bytes,
    })
}
