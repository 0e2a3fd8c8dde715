use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use hoist_core::backend::{
    ActivationKind, Capacity, DecodeProgram, Encoding, Error as BackendError, FloatLayout, IndexEntry,
    IndexLayout, KvDtype, LoadPlan, Mapping, MemoryByClass, Op as ProgramOp, OpKind, Outputs, Role, Run,
    SequenceId, Shape, Slot, SourceFile, TokenBatch, Unwatched, ValueChange, ValueId, ValueKind, ValueSpec,
    Want, WeightBackend, WeightClass, WeightId, WeightPlan, WeightRef, WeightSource, WorkspaceDims,
};

use crate::args::DeviceArgs;
use crate::backends;
use crate::exit::{Code, Usage};
use crate::output::Output;
use crate::report::{print_json, print_text};

/// Run one operation of the numerics contract over raw little-endian files, so that anyone can check it with tools of
/// their own.
///
/// Vectors are f32 [vectors, elements]; weights are the encoding's own bytes, row by row.
#[derive(Args, Debug)]
pub(crate) struct Op {
    #[command(subcommand)]
    name: Name,
}

#[derive(Debug, Subcommand)]
#[command(rename_all = "snake_case")]
enum Name {
    /// Y = W · X: weights [rows, cols], vectors [n, cols] to [n, rows]
    Matmul(Matmul),
    /// Values of rows of weights, as the operation embed yields them
    Dequantize(Dequantize),
    /// x / sqrt(mean(x²) + eps) · g
    RmsNorm(Norm),
    /// (x − mean) / sqrt(var + eps) · g + b
    LayerNorm(Norm),
    /// x · sigmoid(x)
    Silu(Unary),
    /// GELU by its tanh approximation
    GeluTanh(Unary),
    /// cap · tanh(x / cap)
    SoftCap(SoftCap),
    /// e^x, element by element; the CPU reference's own
    Exp(Elementary),
    /// The hyperbolic tangent, element by element; the CPU reference's own
    Tanh(Elementary),
}

#[derive(Args, Debug)]
struct Matmul {
    /// Encoding of the weights
    #[arg(long, value_name = "NAME", value_parser = parse_encoding)]
    encoding: Encoding,
    /// Output dimension
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(1..))]
    rows: u32,
    /// Input dimension
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    cols: u32,
    /// Weights
    #[arg(long, value_name = "PATH")]
    weights: PathBuf,
    #[command(flatten)]
    io: InOut,
}

#[derive(Args, Debug)]
struct Dequantize {
    /// Encoding of the weights
    #[arg(long, value_name = "NAME", value_parser = parse_encoding)]
    encoding: Encoding,
    /// Weights of a row [default: one block, or 256]
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    cols: Option<u32>,
    #[command(flatten)]
    io: InOut,
}

#[derive(Args, Debug)]
struct Norm {
    /// Elements of a vector
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    cols: u32,
    /// Added to the mean square or the variance
    #[arg(long, value_name = "X", default_value_t = 1e-5)]
    eps: f32,
    /// Gains, f32 [cols]; ones if not given
    #[arg(long, value_name = "PATH")]
    weights: Option<PathBuf>,
    /// Biases of a layer norm, f32 [cols]; zeros if not given
    #[arg(long, value_name = "PATH")]
    bias: Option<PathBuf>,
    #[command(flatten)]
    io: InOut,
}

#[derive(Args, Debug)]
struct Unary {
    #[command(flatten)]
    io: InOut,
}

#[derive(Args, Debug)]
struct SoftCap {
    /// The cap
    #[arg(long, value_name = "X")]
    cap: f32,
    #[command(flatten)]
    io: InOut,
}

#[derive(Args, Debug)]
struct Elementary {
    /// Input
    #[arg(long, value_name = "PATH")]
    input: PathBuf,
    /// Output
    #[arg(long, value_name = "PATH")]
    output: PathBuf,
    /// Use portable scalar code only
    #[arg(long)]
    force_scalar: bool,
}

#[derive(Args, Debug)]
struct InOut {
    /// Input
    #[arg(long, value_name = "PATH")]
    input: PathBuf,
    /// Output, f32
    #[arg(long, value_name = "PATH")]
    output: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
}

fn parse_encoding(name: &str) -> Result<Encoding, String> {
    Encoding::from_name(name)
        .filter(|e| e.is_float() || e.is_quantized())
        .ok_or_else(|| format!("`{name}` is no encoding of weights"))
}

/// Rows of one tile: what stays small beside the weights of a model.
const TILE: usize = 4096;

impl Op {
    pub(crate) fn run(&self, json: bool) -> Result<Code> {
        let (name, device, out, values) = match &self.name {
            Name::Matmul(op) => ("matmul", &op.io.device.backend, &op.io.output, op.run()?),
            Name::Dequantize(op) => ("dequantize", &op.io.device.backend, &op.io.output, op.run()?),
            Name::RmsNorm(op) => ("rms_norm", &op.io.device.backend, &op.io.output, op.run(false)?),
            Name::LayerNorm(op) => ("layer_norm", &op.io.device.backend, &op.io.output, op.run(true)?),
            Name::Silu(op) => {
                let f = |input, out| OpKind::Activation {
                    input,
                    kind: ActivationKind::Silu,
                    out,
                };
                ("silu", &op.io.device.backend, &op.io.output, unary(&op.io, f)?)
            }
            Name::GeluTanh(op) => {
                let f = |input, out| OpKind::Activation {
                    input,
                    kind: ActivationKind::GeluTanh,
                    out,
                };
                (
                    "gelu_tanh",
                    &op.io.device.backend,
                    &op.io.output,
                    unary(&op.io, f)?,
                )
            }
            Name::SoftCap(op) => {
                let f = |input, out| OpKind::SoftCap {
                    input,
                    cap: op.cap,
                    out,
                };
                (
                    "soft_cap",
                    &op.io.device.backend,
                    &op.io.output,
                    unary(&op.io, f)?,
                )
            }
            Name::Exp(op) => return op.run("exp", hoist_cpu::exp, json),
            Name::Tanh(op) => return op.run("tanh", hoist_cpu::tanh, json),
        };
        write_f32(out, &values)?;
        done(json, name, device, out, &values)
    }
}

fn done(json: bool, name: &str, backend: &str, out: &Path, values: &[f32]) -> Result<Code> {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let digest = blake3::hash(&bytes).to_hex();
    if json {
        print_json(&serde_json::json!({
            "schema": "hoist.op/1",
            "op": name,
            "backend": backend,
            "output": out.display().to_string(),
            "values": values.len(),
            "blake3": digest.as_str(),
        }))?;
    } else {
        print_text(&format!(
            "{name} on {backend}: {} values in {}\nBLAKE3 {digest}\n",
            values.len(),
            out.display()
        ))?;
    }
    Ok(Code::Ok)
}

impl Matmul {
    fn run(&self) -> Result<Vec<f32>> {
        let (rows, cols) = (self.rows as usize, self.cols as usize);
        let weights = read(&self.weights)?;
        let row_bytes = self.encoding.row_bytes(self.cols.into())? as usize;
        let prefix = self.encoding.matrix_prefix_bytes() as usize;
        let expected = rows.checked_mul(row_bytes).and_then(|n| n.checked_add(prefix));
        expect_len(&self.weights, weights.len(), expected.unwrap_or(usize::MAX))?;
        let x = read_f32(&self.io.input, cols)?;
        let n = x.len() / cols;
        let mut y = vec![0f32; n * rows];
        for first in (0..rows).step_by(TILE) {
            let height = TILE.min(rows - first);
            let mut tile = weights[..prefix].to_vec();
            tile.extend_from_slice(&weights[prefix + first * row_bytes..][..height * row_bytes]);
            let class = WeightClass::of_matrix(self.encoding);
            let matrix = Weight::new(
                Role::Output,
                class,
                self.encoding,
                Shape::matrix(height as u64, cols as u64),
                tile,
            );
            let values = [
                value("x", cols, ValueKind::F32),
                value("q", cols, ValueKind::Quantized { vectors: 1 }),
                value("y", height, ValueKind::F32),
            ];
            let input = if self.encoding.is_quantized() {
                ValueId(1)
            } else {
                ValueId(0)
            };
            let mut ops = vec![];
            if self.encoding.is_quantized() {
                ops.push(OpKind::Quantise {
                    input: ValueId(0),
                    out: ValueId(1),
                });
            }
            ops.push(OpKind::Logits {
                input,
                weight: global(Role::Output),
                bias: None,
                out: ValueId(2),
            });
            // As many vectors at a time as the tile has rows: the table of inputs is as long as the output is wide.
            for (i, x) in x.chunks(height * cols).enumerate() {
                let table = f32_table(x, height, cols)?;
                let part = run_program(
                    &self.io.device,
                    table,
                    vec![matrix.clone()],
                    &values,
                    &ops,
                    x.len() / cols,
                )?;
                for (j, row) in part.chunks_exact(height).enumerate() {
                    let at = (i * height + j) * rows + first;
                    y[at..at + height].copy_from_slice(row);
                }
            }
        }
        Ok(y)
    }
}

impl Dequantize {
    fn run(&self) -> Result<Vec<f32>> {
        let bytes = read(&self.io.input)?;
        let prefix = self.encoding.matrix_prefix_bytes() as usize;
        let body = bytes
            .len()
            .checked_sub(prefix)
            .ok_or_else(|| Usage("the input is empty".into()))?;
        let block = self.encoding.block_weights() as usize;
        let cols = self
            .cols
            .map_or(if block > 1 { block } else { 256 }, |c| c as usize);
        let row_bytes = self.encoding.row_bytes(cols as u64)? as usize;
        if body == 0 || !body.is_multiple_of(row_bytes) {
            return Err(Usage(format!(
                "`{}` has {body} bytes of {} weights, which is no multiple of a row of {row_bytes}; see --cols",
                self.io.input.display(),
                self.encoding
            ))
            .into());
        }
        let mut out = Vec::with_capacity(body / row_bytes * cols);
        // As many rows at a time as a row is wide: the table is as long as the output is wide.
        let table_bytes = table_len(cols, row_bytes)?;
        for rows in bytes[prefix..].chunks(table_bytes) {
            let n = rows.len() / row_bytes;
            let mut table = bytes[..prefix].to_vec();
            table.extend_from_slice(rows);
            table.resize(prefix + table_bytes, 0);
            let class = WeightClass::of_matrix(self.encoding);
            let shape = Shape::matrix(cols as u64, cols as u64);
            let table = Weight::new(Role::TokenEmbd, class, self.encoding, shape, table);
            let values = [value("x", cols, ValueKind::F32)];
            out.extend(run_program(&self.io.device, table, vec![], &values, &[], n)?);
        }
        Ok(out)
    }
}

impl Norm {
    fn run(&self, layer: bool) -> Result<Vec<f32>> {
        let cols = self.cols as usize;
        if self.bias.is_some() && !layer {
            return Err(Usage("an RMS norm has no bias".into()).into());
        }
        // Before anything is made as wide as --cols says.
        let x = read_f32(&self.io.input, cols)?;
        let vector = |path: &Option<PathBuf>, fill: f32| -> Result<Vec<f32>> {
            let Some(path) = path else {
                return Ok(vec![fill; cols]);
            };
            let v = read_f32(path, cols)?;
            expect_len(path, v.len() * 4, cols * 4)?;
            Ok(v)
        };
        let gains = vector(&self.weights, 1.0)?;
        let shape = Shape::vector(cols as u64);
        let gains = Weight::new(
            Role::OutputNorm,
            WeightClass::Gamma,
            Encoding::F32,
            shape,
            le_bytes(&gains),
        );
        let values = [value("x", cols, ValueKind::F32), value("y", cols, ValueKind::F32)];
        let (input, out, weight) = (ValueId(0), ValueId(1), global(Role::OutputNorm));
        let (op, weights) = if layer {
            let bias = vector(&self.bias, 0.0)?;
            let bias = Weight::new(
                Role::OutputNormBias,
                WeightClass::Bias,
                Encoding::F32,
                shape,
                le_bytes(&bias),
            );
            let bias_ref = global(Role::OutputNormBias);
            (
                OpKind::LayerNorm {
                    input,
                    weight,
                    bias: bias_ref,
                    eps: self.eps,
                    out,
                },
                vec![gains, bias],
            )
        } else {
            (
                OpKind::RmsNorm {
                    input,
                    weight,
                    eps: self.eps,
                    rows: 1,
                    out,
                },
                vec![gains],
            )
        };
        tiles(&self.io.device, &x, cols, &values, &[op], &weights)
    }
}

/// Elements of a vector of an element-wise operation.
const UNARY_COLS: usize = 256;

fn unary(io: &InOut, op: impl Fn(ValueId, ValueId) -> OpKind) -> Result<Vec<f32>> {
    let x = read_f32(&io.input, 1)?;
    let mut padded = x.clone();
    padded.resize(x.len().next_multiple_of(UNARY_COLS), 0.0);
    let values = [
        value("x", UNARY_COLS, ValueKind::F32),
        value("y", UNARY_COLS, ValueKind::F32),
    ];
    let mut y = tiles(
        &io.device,
        &padded,
        UNARY_COLS,
        &values,
        &[op(ValueId(0), ValueId(1))],
        &[],
    )?;
    y.truncate(x.len());
    Ok(y)
}

/// Runs operations that keep the width, as many vectors at a time as a vector is wide.
fn tiles(
    device: &DeviceArgs,
    x: &[f32],
    cols: usize,
    values: &[ValueSpec],
    ops: &[OpKind],
    weights: &[Weight],
) -> Result<Vec<f32>> {
    let mut y = Vec::with_capacity(x.len());
    for x in x.chunks(cols * cols) {
        let table = f32_table(x, cols, cols)?;
        y.extend(run_program(
            device,
            table,
            weights.to_vec(),
            values,
            ops,
            x.len() / cols,
        )?);
    }
    Ok(y)
}

impl Elementary {
    fn run(&self, name: &str, f: impl Fn(&mut [f32], bool), json: bool) -> Result<Code> {
        let mut values = read_f32(&self.input, 1)?;
        f(&mut values, self.force_scalar);
        write_f32(&self.output, &values)?;
        done(json, name, "cpu", &self.output, &values)
    }
}

fn global(role: Role) -> WeightRef {
    WeightRef { layer: None, role }
}

fn value(name: &str, width: usize, kind: ValueKind) -> ValueSpec {
    ValueSpec {
        name: name.to_owned(),
        width: width as u32,
        kind,
    }
}

/// A weight in memory.
#[derive(Clone)]
struct Weight {
    role: Role,
    class: WeightClass,
    encoding: Encoding,
    shape: Shape,
    bytes: Vec<u8>,
}

impl Weight {
    fn new(role: Role, class: WeightClass, encoding: Encoding, shape: Shape, bytes: Vec<u8>) -> Self {
        Self {
            role,
            class,
            encoding,
            shape,
            bytes,
        }
    }
}

/// Vectors as an embedding table of `rows` rows, padded with zeros.
fn f32_table(x: &[f32], rows: usize, cols: usize) -> Result<Weight> {
    let len = table_len(rows, 4 * cols)?;
    let mut bytes = le_bytes(x);
    bytes.resize(len, 0);
    let shape = Shape::matrix(rows as u64, cols as u64);
    Ok(Weight::new(
        Role::TokenEmbd,
        WeightClass::Float,
        Encoding::F32,
        shape,
        bytes,
    ))
}

/// Bytes of a table of inputs.
fn table_len(rows: usize, row_bytes: usize) -> Result<usize> {
    /// The table is as long as it is wide, however few vectors there are.
    const MAX: usize = 2 << 30;
    let len = rows.checked_mul(row_bytes).filter(|len| *len <= MAX);
    len.ok_or_else(|| {
        Usage(format!(
            "{rows} rows of {row_bytes} bytes are a table of more than {MAX} bytes, the most that an operation takes; see --cols"
        ))
        .into()
    })
}

/// Runs a program of one step: rows 0 to `n` of a table, through operations, out as if they were logits.
///
/// The last value is the output; the table has as many rows as it is wide.
fn run_program(
    device: &DeviceArgs,
    table: Weight,
    mut weights: Vec<Weight>,
    values: &[ValueSpec],
    ops: &[OpKind],
    n: usize,
) -> Result<Vec<f32>> {
    let output = ValueId(values.len() as u32 - 1);
    let width = values[output.0 as usize].width;
    weights.insert(0, table);
    let mut backend = backends::select(device)?.open(&device.open_options())?;
    let embed = OpKind::Embed {
        weight: global(Role::TokenEmbd),
        out: ValueId(0),
    };
    let program = DecodeProgram {
        vocab: width,
        max_context: n as u32,
        kv: vec![],
        values: values.to_vec(),
        ops: std::iter::once(&embed)
            .chain(ops)
            .map(|kind| ProgramOp {
                layer: None,
                kind: kind.clone(),
            })
            .collect(),
        tail: 0,
        tables: vec![],
        logits: output,
    };
    let capacity = Capacity {
        max_context: n as u32,
        max_sequences: 1,
        max_batch_tokens: n as u32,
        kv: KvDtype::F16,
    };
    let dims = WorkspaceDims::new(&program, capacity)?;
    let plan = plan(backend.as_ref(), &weights);
    let entries = plan
        .weights
        .iter()
        .map(|w| IndexEntry {
            layer: None,
            role: w.role,
            slot: Slot::Present(w.id),
        })
        .collect();
    let source = InMemory(weights);
    backend.begin_load(&plan)?;
    backend.load_from(&plan, &source, &Unwatched)?;
    backend.finish_load()?;
    backend.build_index(&IndexLayout { layers: 0, entries })?;
    backend.init_workspace(&dims)?;
    let name = backend.info().name.clone();
    let decoder = backend.as_decode().ok_or(BackendError::Unsupported {
        backend: name,
        what: hoist_core::backend::UnsupportedWhat::Call("forward"),
    })?;
    decoder.prepare(&program)?;
    let tokens: Vec<u32> = (0..n as u32).collect();
    let want = vec![Want::Logits; n];
    let mut logits = vec![0f32; n * width as usize];
    let runs = [Run {
        sequence: SequenceId(0),
        tokens: &tokens,
        want: &want,
    }];
    decoder.forward(
        &TokenBatch { runs: &runs },
        &mut Outputs {
            argmax: &mut [],
            logits: &mut logits,
        },
    )?;
    backend.unload()?;
    Ok(logits)
}

fn plan(backend: &dyn WeightBackend, weights: &[Weight]) -> LoadPlan {
    let sizing = backend.info().sizing;
    let mut resident = MemoryByClass::default();
    let planned: Vec<WeightPlan> = weights
        .iter()
        .enumerate()
        .map(|(i, w)| {
            let nbytes = w.bytes.len() as u64;
            let rows = w.shape.rows * w.shape.matrices;
            let beside = if w.class == WeightClass::Quantized {
                rows * (sizing.quantized_row_bytes
                    + w.shape.cols.div_ceil(256) * sizing.quantized_segment_bytes)
            } else {
                0
            };
            let resident_bytes = (nbytes + beside).next_multiple_of(sizing.weight_alignment);
            *resident.class_mut(w.class) += resident_bytes;
            WeightPlan {
                id: WeightId(i as u32),
                name: w.role.name().to_owned(),
                layer: None,
                role: w.role,
                class: w.class,
                encoding: w.encoding,
                shape: w.shape,
                nbytes,
                views: vec![],
                change: ValueChange::Keep,
                layout: FloatLayout::OutIn,
                resident_bytes,
            }
        })
        .collect();
    let nbytes = planned.iter().map(|w| w.nbytes).sum();
    LoadPlan {
        architecture: "op".into(),
        layers: 0,
        weights: planned,
        resident,
        nbytes,
        source_bytes: nbytes,
    }
}

/// Weights that are in memory already.
struct InMemory(Vec<Weight>);

impl WeightSource for InMemory {
    fn read_at(&self, weight: WeightId, offset: u64, out: &mut [u8]) -> hoist_core::backend::Result<()> {
        let weights = self.0.len();
        let bytes = &self
            .0
            .get(weight.index())
            .ok_or(BackendError::UnknownWeight { weight, weights })?
            .bytes;
        let from = usize::try_from(offset).ok();
        let part = from.and_then(|from| bytes.get(from..from.checked_add(out.len())?));
        let part = part.ok_or_else(|| BackendError::invalid("bytes of a weight", bytes.len(), offset))?;
        out.copy_from_slice(part);
        Ok(())
    }

    fn files(&self) -> &[SourceFile] {
        &[]
    }

    fn share(&self, _: u32) -> Option<Arc<dyn Mapping>> {
        None
    }

    fn check_unchanged(&self) -> hoist_core::backend::Result<()> {
        Ok(())
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    /// Of what is no file, such as a pipe: a device gives bytes for ever.
    const MAX: u64 = 1 << 30;
    let file = || -> std::io::Result<Vec<u8>> {
        let file = std::fs::File::open(path)?;
        let mut bytes = Vec::new();
        let known = file.metadata()?.is_file();
        file.take(if known { u64::MAX } else { MAX + 1 })
            .read_to_end(&mut bytes)?;
        if !known && bytes.len() as u64 > MAX {
            return Err(std::io::Error::other(format!(
                "it is no file and gives more than {MAX} bytes"
            )));
        }
        Ok(bytes)
    };
    file().with_context(|| format!("reading `{}`", path.display()))
}

fn read_f32(path: &Path, cols: usize) -> Result<Vec<f32>> {
    let bytes = read(path)?;
    if bytes.is_empty() || !bytes.len().is_multiple_of(4 * cols) {
        return Err(Usage(format!(
            "`{}` has {} bytes, which is no multiple of a vector of {cols} f32",
            path.display(),
            bytes.len()
        ))
        .into());
    }
    Ok(bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect())
}

fn expect_len(path: &Path, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Usage(format!(
        "`{}` has {found} bytes, it should have {expected}",
        path.display()
    ))
    .into())
}

fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn write_f32(path: &Path, values: &[f32]) -> Result<()> {
    Output::write_whole(path, &le_bytes(values))
}
