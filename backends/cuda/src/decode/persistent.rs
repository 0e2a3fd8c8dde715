//! One token through a decoder of the llama kind in one launch: `kernels/step.cu` and its `step_*.cuh`.
//!
//! A program qualifies if its operations follow the pattern of llama and qwen2, its matrices are of encodings that the
//! kernel streams, and every input dimension is a multiple of 256. Any other program runs operation by operation; the bits
//! are the same.

use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hoist_backend::{
    ActivationKind, Encoding, Error, FloatLayout, KvDtype, PhaseTime, ResolvedProgram, Result, RopeStyle,
    Step, StepKind, ValueKind, WeightClass, WeightId, WorkspaceDims,
};

use super::DeviceWeight;
use super::params::{CacheLayer, Row};
use super::workspace::{SPLIT, Workspace};
use crate::driver::{Context, Stream};
use crate::modules::{Function, Launch, Modules, arguments};

const THREADS: u32 = 512;
const SLOT: u32 = 4640;
const CODES: u32 = 272;
const META: u32 = 80;
/// Room for stored values on their way.
const VALUES: u32 = 32_768;
/// The ring holds a multiple of as many slots, so that within a phase every use of a slot is the same warps': a barrier's
/// parity tells only whether the fill before or the one at hand is complete, and fills complete in any order, so that a
/// warp which comes to another's slot could take the fill before last for its own.
const WARPS: u32 = THREADS / 32;
/// Bytes of a run in shared memory.
const RUN: u32 = 32;
/// Descriptors of phases in shared memory.
const DESCRIPTORS: u32 = 4;
/// Where room for values begins in shared memory: behind descriptors, a scratch of 320 words, a number and the warps' cursors.
const VALUES_AT: u32 = DESCRIPTORS * PHASE_BYTES as u32 + 320 * 4 + 16 + WARPS * 16;
/// Phases of a layer, and of the logits.
const LAYER_PHASES: u64 = 5;

const NORM: u32 = 0;
const PLAIN: u32 = 1;
const MERGE: u32 = 2;
const STORE: u32 = 0;
const RESIDUAL: u32 = 1;
const SILU: u32 = 2;
const GELU: u32 = 3;
const LOGITS: u32 = 4;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
struct StepMatrix {
    weight: u64,
    exponents: u64,
    bias: u64,
    out: u64,
    rows: u32,
    coding: u32,
    step: u32,
    pad: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
struct Product {
    mail: u64,
    norm: u64,
    prologue: u32,
    epilogue: u32,
    matrices: u32,
    segments: u32,
    magic: u32,
    eps: f32,
    quantise_step: u32,
    stream: u32,
    pad: [u32; 2],
    matrix: [StepMatrix; 3],
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
struct Attention {
    query: u64,
    key: u64,
    value: u64,
    table: u64,
    out: u64,
    cache: u64,
    kv_heads: u32,
    head_dim: u32,
    padded: u32,
    positions: u32,
    heads: u32,
    n_rot: u32,
    half_split: u32,
    window: u32,
    scale: f32,
    cap: f32,
    capped: u32,
    store_step: u32,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Product(Product),
    Attention(Attention),
}

const PHASE_BYTES: usize = 224;

impl Phase {
    fn bytes(&self) -> [u8; PHASE_BYTES] {
        let mut bytes = [0; PHASE_BYTES];
        let (kind, body): (u32, &[u8]) = match self {
            Phase::Product(p) => (0, bytemuck::bytes_of(p)),
            Phase::Attention(a) => (1, bytemuck::bytes_of(a)),
        };
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[16..16 + body.len()].copy_from_slice(body);
        bytes
    }
}

/// A matrix as it is streamed.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
struct MatrixStream {
    weight: u64,
    rows: u32,
    row_bytes: u32,
    piece_bytes: u32,
    pad: u32,
}

/// Where the parts of a block's shared memory begin that depend on the program, and where all ends.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Places {
    runs: u32,
    full: u32,
    sums: u32,
    exponents: u32,
    own: u32,
    codes: u32,
    meta: u32,
    ring: u32,
    end: u32,
    pad: u32,
}

/// What shared memory is divided by.
#[derive(Clone, Copy, Debug)]
struct Extents {
    streams: u32,
    rows: u32,
    exponents: u32,
    own: u32,
    segments: u32,
}

impl Places {
    fn new(extents: Extents, slots: u32) -> Self {
        let mut at = VALUES_AT + VALUES;
        let mut part = |bytes: u32| {
            let here = at;
            at += bytes.next_multiple_of(16);
            here
        };
        let mut places = Self {
            runs: part(extents.streams * RUN),
            full: part(slots * 8),
            sums: part(extents.rows * 8),
            exponents: part(extents.exponents * 2),
            own: part(extents.own * 4),
            codes: part(extents.segments * CODES),
            meta: part(extents.segments * META),
            ..Self::default()
        };
        places.ring = at.next_multiple_of(128);
        places.end = places.ring + slots * SLOT;
        places
    }
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct StepParams {
    phases: u64,
    streams: u64,
    counters: u64,
    fault: u64,
    sums: u64,
    partial: u64,
    segments: u64,
    residual: u64,
    bests: u64,
    embedding: u64,
    embedding_row_bytes: u64,
    results: u64,
    done: u64,
    times: u64,
    count: u32,
    stream_count: u32,
    splits: u32,
    slots: u32,
    row_limit: u32,
    exponent_limit: u32,
    width: u32,
    embedding_coding: u32,
    token: u32,
    sequence: u32,
    position: u32,
    step: u32,
    at: Places,
}

const _: () = {
    assert!(size_of::<StepMatrix>() == 48);
    assert!(size_of::<Product>() == 200);
    assert!(size_of::<Attention>() == 96);
    assert!(size_of::<MatrixStream>() == 24);
    assert!(size_of::<StepParams>() == 200);
};

/// Where the parts of a workspace's control memory begin.
#[derive(Clone, Copy, Debug)]
struct Control {
    phases: u64,
    streams: u64,
    times: u64,
    /// Mail of each F32 value in turn, then of the residual stream a second time.
    mail: u64,
    sums: u64,
    partial: u64,
    segments: u64,
    bests: u64,
    end: u64,
}

/// Words of a quantised segment's mail.
const SEGMENT_WORDS: u64 = 84;
/// Most blocks, each of which sends its best logit in two words.
const MOST_BLOCKS: u32 = 1024;

/// Bytes of the counters, which come first.
const COUNTER_BYTES: u64 = 256;
/// Points of a phase whose clock is kept.
const POINTS: u64 = 4;
/// Most matrices of a layer.
const LAYER_MATRICES: u64 = 7;

impl Control {
    /// `None` past 2^64.
    fn new(dims: &WorkspaceDims) -> Option<Self> {
        let layers = dims.kv.len() as u64;
        let phases = layers.checked_mul(LAYER_PHASES)?.checked_add(1)?;
        let streams = layers.checked_mul(LAYER_MATRICES)?.checked_add(1)?;
        let widths = || {
            dims.values
                .iter()
                .filter(|(kind, _)| *kind == ValueKind::F32)
                .map(|(_, width)| *width)
        };
        let widest = u64::from(widths().max().unwrap_or(0));
        let mail = widths().try_fold(widest, |sum, width| sum.checked_add(width.into()))?;
        let splits = u64::from(dims.capacity.max_context.div_ceil(SPLIT));
        let head_dim = dims.kv.iter().map(|kv| kv.head_dim).min().unwrap_or(1).max(1);
        let heads = widest / u64::from(head_dim);
        let mut at = 0u64;
        let mut part = |bytes: Option<u64>| {
            let here = at;
            at = at.checked_add(bytes?)?.checked_next_multiple_of(16)?;
            Some(here)
        };
        part(Some(COUNTER_BYTES))?;
        Some(Self {
            phases: part(phases.checked_mul(PHASE_BYTES as u64))?,
            streams: part(streams.checked_mul(size_of::<MatrixStream>() as u64))?,
            times: part(phases.checked_mul(8 * POINTS).and_then(|n| n.checked_add(32)))?,
            mail: part(mail.checked_mul(8))?,
            sums: part(heads.checked_mul(splits).and_then(|n| n.checked_mul(16)))?,
            partial: part(widest.checked_mul(splits).and_then(|n| n.checked_mul(8)))?,
            segments: part(Some(widest.div_ceil(256) * SEGMENT_WORDS * 8))?,
            bests: part(Some(u64::from(MOST_BLOCKS) * 16))?,
            end: part(Some(0))?,
        })
    }
}

/// Bytes that a workspace keeps for the one-launch step.
pub(super) fn control_bytes(dims: &WorkspaceDims) -> Option<u64> {
    Control::new(dims).map(|control| control.end)
}

/// Looks at a step's last word between looks at the clock.
const SPINS: u32 = 64;
/// How long it is looked at before the driver is asked to wait: longer than most steps take.
const PATIENCE: Duration = Duration::from_millis(20);

/// Steps after which mail is emptied and numbers start again, long before they come round.
const NUMBERED_STEPS: u32 = 1 << 20;

/// A program that runs in one launch.
#[derive(Debug)]
pub(super) struct Persistent {
    function: Function,
    launch: Launch,
    params: StepParams,
    /// Where numbers and mail lie, and their bytes.
    numbered: [(u64, usize); 2],
    /// Steps since mail was emptied.
    steps: Cell<u32>,
    /// What each phase is: its name, its layer, the bytes of its weights.
    described: Vec<(&'static str, Option<u32>, u64)>,
}

/// Where a token's first values come from.
#[derive(Clone, Copy, Debug)]
struct Embedding {
    ptr: u64,
    row_bytes: u64,
    coding: u32,
}

/// Walks over the operations of a program.
struct Matcher<'a, W> {
    steps: &'a [Step],
    at: usize,
    work: &'a Workspace,
    tables: &'a [u64],
    weight: W,
    blocks: u32,
    control: Control,
    phases: Vec<Phase>,
    streams: Vec<MatrixStream>,
    described: Vec<(&'static str, Option<u32>, u64)>,
    /// The layer in hand.
    layer: Option<u32>,
    /// Most rows of a block in a phase of a layer, its rows of the logits, most segments of an input, and most bytes for
    /// attention.
    rows: u32,
    logits_rows: u32,
    segments: u32,
    attention_bytes: u32,
    /// The residual stream, which the embedding writes.
    embedded: usize,
}

/// The kernel's number of an encoding.
fn coding(encoding: Encoding) -> Option<u32> {
    Some(match encoding {
        Encoding::Q4_K => 0,
        Encoding::Q5_K => 1,
        Encoding::Q6_K => 2,
        Encoding::Q8_0 => 3,
        _ => return None,
    })
}

/// Bytes of a segment of an encoding, and segments of a piece.
const PIECES: [(u32, u32); 4] = [(144, 32), (176, 26), (210, 21), (272, 17)];

/// A vector as integers: the value it came from and the step that made it.
struct Quantised {
    input: usize,
    value: usize,
    cols: usize,
    step: u32,
}

impl<'w, W: Fn(WeightId) -> Result<DeviceWeight<'w>>> Matcher<'_, W> {
    fn next(&mut self) -> Option<(u32, &StepKind)> {
        let step = self.steps.get(self.at)?;
        self.at += 1;
        Some((self.at as u32 - 1, &step.kind))
    }

    fn ptr(&self, value: usize) -> u64 {
        self.work.values[value].ptr
    }

    /// Where a value's mail lies.
    fn mail(&self, value: usize) -> u64 {
        let dims = &self.work.dims.values;
        let before = dims
            .iter()
            .take(value)
            .filter(|(kind, _)| *kind == ValueKind::F32);
        let words: u64 = before.map(|(_, width)| u64::from(*width)).sum();
        self.work.control + self.control.mail + 8 * words
    }

    /// Where the residual stream's second mailbox lies: behind all values' mail.
    fn second_mail(&self) -> u64 {
        self.mail(self.work.dims.values.len())
    }

    fn quantise(&mut self, of: usize) -> Option<Quantised> {
        let width = self.work.values[of].width;
        match self.next()? {
            (step, StepKind::Quantise { input, cols, out }) if *input == of && *cols == width as usize => {
                Some(Quantised {
                    input: of,
                    value: *out,
                    cols: *cols,
                    step,
                })
            }
            _ => None,
        }
    }

    /// A product with `from`; yields its output.
    fn product(&mut self, from: &Quantised) -> Option<(usize, StepMatrix)> {
        let (step, kind) = self.next()?;
        let StepKind::MatMul {
            input,
            weight,
            bias,
            out,
        } = *kind
        else {
            return None;
        };
        let matrix = (self.weight)(WeightId(weight as u32)).ok()?;
        let bias = bias.map(|b| (self.weight)(WeightId(b as u32))).transpose().ok()?;
        if input != from.value
            || matrix.class != WeightClass::Quantized
            || matrix.shape.matrices != 1
            || matrix.shape.cols != from.cols as u64
            || !matrix.shape.cols.is_multiple_of(256)
        {
            return None;
        }
        Some((
            out,
            StepMatrix {
                weight: matrix.ptr,
                exponents: matrix.exponents,
                bias: bias.map_or(0, |b| b.ptr),
                out: self.mail(out),
                rows: u32::try_from(matrix.shape.rows).ok()?,
                coding: coding(matrix.encoding)?,
                step,
                pad: 0,
            },
        ))
    }

    fn push(
        &mut self,
        name: &'static str,
        from: &Quantised,
        matrices: &[StepMatrix],
        base: Product,
    ) -> Option<()> {
        let segments = u32::try_from(from.cols / 256).ok()?;
        let rows: u32 = matrices.iter().map(|m| m.rows.div_ceil(self.blocks)).sum();
        // A segment's number is divided by multiplication, exact as long as the product stays below 2^32.
        if u64::from(rows) * u64::from(segments) * u64::from(segments) >= 1 << 32 {
            return None;
        }
        // The norm is taken of a vector that fits where values of attention lie otherwise.
        if base.prologue == NORM && from.cols * 4 > VALUES as usize {
            return None;
        }
        let mut bytes = 0;
        let stream = u32::try_from(self.streams.len()).ok()?;
        for matrix in matrices {
            let (segment_bytes, piece) = PIECES[matrix.coding as usize];
            let row_bytes = segments.checked_mul(segment_bytes)?;
            matrix.rows.div_ceil(self.blocks).checked_mul(row_bytes)?;
            matrix.rows.checked_mul(self.blocks)?;
            bytes += u64::from(matrix.rows) * u64::from(row_bytes);
            self.streams.push(MatrixStream {
                weight: matrix.weight,
                rows: matrix.rows,
                row_bytes,
                piece_bytes: segment_bytes * piece,
                pad: 0,
            });
        }
        let mut product = Product {
            mail: self.mail(from.input),
            matrices: matrices.len() as u32,
            segments,
            magic: (1u64 << 32).div_ceil(segments.into()).min(u32::MAX.into()) as u32,
            quantise_step: from.step,
            stream,
            ..base
        };
        if base.mail != 0 {
            product.mail = base.mail;
        }
        product.matrix[..matrices.len()].copy_from_slice(matrices);
        self.phases.push(Phase::Product(product));
        self.described.push((name, self.layer, bytes));
        if base.epilogue == LOGITS {
            self.logits_rows = rows;
        } else {
            self.rows = self.rows.max(rows);
        }
        self.segments = self.segments.max(segments);
        Some(())
    }

    /// A norm of `x` and its integers.
    fn normed(&mut self, x: usize) -> Option<(Quantised, Product)> {
        let StepKind::RmsNorm {
            input,
            weight,
            eps,
            out,
        } = *self.next()?.1
        else {
            return None;
        };
        let gamma = (self.weight)(WeightId(weight as u32)).ok()?;
        if input != x || gamma.shape.cols != u64::from(self.work.values[x].width) {
            return None;
        }
        let mut quantised = self.quantise(out)?;
        // The kernel norms while it quantises.
        quantised.input = x;
        let base = Product {
            norm: gamma.ptr,
            eps,
            prologue: NORM,
            epilogue: STORE,
            ..Product::default()
        };
        Some((quantised, base))
    }

    /// `x = x + branch`
    fn added(&mut self, x: usize, branch: usize) -> Option<()> {
        match *self.next()?.1 {
            StepKind::Add { a, b, out } if a == x && b == branch && out == x => Some(()),
            _ => None,
        }
    }

    fn rope(&mut self, of: usize) -> Option<(usize, RopeStyle, usize, usize)> {
        match *self.next()?.1 {
            StepKind::Rope {
                value,
                table,
                style,
                head_dim,
                n_rot,
            } if value == of => Some((table, style, head_dim, n_rot)),
            _ => None,
        }
    }

    fn layer(&mut self, x: usize) -> Option<()> {
        let (input, base) = self.normed(x)?;
        let [(q, wq), (k, wk), (v, wv)] = [
            self.product(&input)?,
            self.product(&input)?,
            self.product(&input)?,
        ];
        self.push("query, key, value", &input, &[wq, wk, wv], base)?;
        let turned = self.rope(q)?;
        if self.rope(k)? != turned {
            return None;
        }
        let (table, style, head_dim, n_rot) = turned;
        let (store_step, stored) = self.next()?;
        let StepKind::StoreKv { key, value, layer } = *stored else {
            return None;
        };
        let StepKind::Attention {
            query,
            heads,
            scale,
            window,
            soft_cap,
            out: attended,
            layer: of,
        } = *self.next()?.1
        else {
            return None;
        };
        if (key, value, query, of) != (k, v, q, layer) {
            return None;
        }
        let CacheLayer {
            base: cache,
            kv_heads,
            head_dim: cached,
            padded,
            positions,
        } = self.work.cache[layer];
        if cached as usize != head_dim || !head_dim.is_multiple_of(8) || head_dim > THREADS as usize {
            return None;
        }
        self.described.push(("attention", self.layer, 0));
        self.phases.push(Phase::Attention(Attention {
            query: self.mail(q),
            key: self.mail(k),
            value: self.mail(v),
            table: *self.tables.get(table)?,
            out: self.mail(attended),
            cache,
            kv_heads,
            head_dim: cached,
            padded,
            positions,
            heads: u32::try_from(heads).ok()?,
            n_rot: u32::try_from(n_rot).ok()?,
            half_split: (style == RopeStyle::HalfSplit).into(),
            window: window.unwrap_or(0),
            scale,
            cap: soft_cap.unwrap_or(0.0),
            capped: soft_cap.is_some().into(),
            store_step,
        }));
        self.attention_bytes = self.attention_bytes.max((4 * cached + 4 * SPLIT) * 4);
        let input = self.quantise(attended)?;
        let (branch, wo) = self.product(&input)?;
        self.added(x, branch)?;
        let residual = |prologue| Product {
            prologue,
            epilogue: RESIDUAL,
            ..Product::default()
        };
        let to = |matrix, out| StepMatrix { out, ..matrix };
        // The residual stream has two mailboxes, for before and after the gated product.
        let between = self.second_mail();
        self.push("attention output", &input, &[to(wo, between)], residual(MERGE))?;
        let (input, base) = self.normed(x)?;
        let [(gate, wg), (up, wu)] = [self.product(&input)?, self.product(&input)?];
        let StepKind::Activation {
            input: of,
            kind,
            out: active,
        } = *self.next()?.1
        else {
            return None;
        };
        let StepKind::Mul { a, b, out: inner } = *self.next()?.1 else {
            return None;
        };
        if of != gate || (a, b) != (active, up) || wg.rows != wu.rows {
            return None;
        }
        let epilogue = match kind {
            ActivationKind::Silu => SILU,
            ActivationKind::GeluTanh => GELU,
        };
        let at_inner = self.mail(inner);
        let gated = Product {
            epilogue,
            mail: between,
            ..base
        };
        self.push("gate, up", &input, &[to(wg, at_inner), wu], gated)?;
        let input = self.quantise(inner)?;
        let (branch, wd) = self.product(&input)?;
        self.added(x, branch)?;
        let at_x = self.mail(x);
        self.push("down", &input, &[to(wd, at_x)], residual(PLAIN))
    }

    /// All phases; the embedding.
    fn program(&mut self, layers: usize, logits: usize) -> Option<Embedding> {
        let StepKind::Embed { weight, out: x, .. } = *self.next()?.1 else {
            return None;
        };
        let matrix = (self.weight)(WeightId(weight as u32)).ok()?;
        let width = self.work.values[x].width;
        let embedding = Embedding {
            ptr: matrix.ptr,
            row_bytes: matrix.encoding.row_bytes(matrix.shape.cols).ok()?,
            coding: coding(matrix.encoding).or(match matrix.encoding {
                Encoding::F16 => Some(4),
                Encoding::BF16 => Some(5),
                Encoding::F32 => Some(6),
                _ => None,
            })?,
        };
        let fits = matrix.shape.matrices == 1
            && matrix.shape.cols == u64::from(width)
            && (matrix.class == WeightClass::Quantized || matrix.layout == FloatLayout::OutIn);
        if !fits || !width.is_multiple_of(32) {
            return None;
        }
        for layer in 0..layers {
            self.layer = u32::try_from(layer).ok();
            self.layer(x)?;
        }
        self.layer = None;
        let (input, base) = self.normed(x)?;
        let (out, matrix) = self.product(&input)?;
        if out != logits || self.at != self.steps.len() || layers == 0 {
            return None;
        }
        let matrix = StepMatrix {
            out: self.ptr(out),
            ..matrix
        };
        self.push(
            "logits",
            &input,
            &[matrix],
            Product {
                epilogue: LOGITS,
                ..base
            },
        )?;
        self.embedded = x;
        Some(embedding)
    }
}

impl Persistent {
    /// The program as phases, written to the workspace; `None` if it is not of the kind. The ring has at most `most_slots`
    /// slots.
    #[expect(clippy::too_many_arguments, reason = "all that decoding has, and a limit")]
    pub(super) fn new<'w>(
        context: &Arc<Context>,
        modules: &Modules,
        stream: &Stream,
        resolved: &ResolvedProgram,
        tables: &[u64],
        work: &Workspace,
        most_slots: u32,
        weight: impl Fn(WeightId) -> Result<DeviceWeight<'w>>,
    ) -> Result<Option<Self>> {
        if context.device.capability < (9, 0) || work.dims.capacity.kv != KvDtype::F16 {
            return Ok(None);
        }
        let blocks = context.device.multiprocessors.min(MOST_BLOCKS);
        let control = Control::new(&work.dims)
            .ok_or_else(|| Error::internal(crate::NAME, "a workspace past 2^64 bytes was taken"))?;
        let mut matcher = Matcher {
            steps: &resolved.steps,
            at: 0,
            work,
            tables,
            weight,
            blocks,
            control,
            phases: Vec::new(),
            streams: Vec::new(),
            described: Vec::new(),
            layer: None,
            rows: 0,
            logits_rows: 0,
            segments: 0,
            attention_bytes: 0,
            embedded: 0,
        };
        let Some(embedding) = matcher.program(work.dims.kv.len(), resolved.logits) else {
            return Ok(None);
        };
        let segment_limit = matcher.segments.max(matcher.attention_bytes.div_ceil(CODES));
        // Phases of layers take turns with two halves.
        let row_limit = (2 * matcher.rows.next_multiple_of(4))
            .max(matcher.logits_rows)
            .next_multiple_of(8);
        // Exponents are copied in pairs, of up to three matrices; each of four phases has a place, the logits one and a half.
        let exponent_limit = (matcher.rows + 6)
            .max(matcher.logits_rows + 2)
            .next_multiple_of(2);
        let stream_count = matcher.streams.len() as u32;
        let embedded = work.values[matcher.embedded];
        let residual = matcher.mail(matcher.embedded);
        let own_limit = embedded.width.div_ceil(blocks).next_multiple_of(4);
        let extents = Extents {
            streams: stream_count,
            rows: row_limit,
            exponents: 4 * exponent_limit + 4,
            own: own_limit,
            segments: segment_limit,
        };
        // The kernel's own static shared memory counts too.
        let shared = context.device.shared_memory_optin.saturating_sub(256);
        let left = shared.saturating_sub(Places::new(extents, 0).end);
        let fitting = |slots: &u32| Places::new(extents, *slots).end <= shared;
        let most = (left / SLOT).min(most_slots) / WARPS * WARPS;
        let slots = (0..=most)
            .rev()
            .step_by(WARPS as usize)
            .find(fitting)
            .unwrap_or(0);
        if slots == 0 {
            return Ok(None);
        }
        let function = modules.function("step", "decode_step")?;
        let places = Places::new(extents, slots);
        let bytes = places.end;
        function.allow_shared(bytes)?;
        if function.blocks_per_multiprocessor(THREADS, bytes)? == 0 {
            return Ok(None);
        }
        let descriptors: Vec<u8> = matcher.phases.iter().flat_map(Phase::bytes).collect();
        let base = work.control;
        // SAFETY: pageable memory; `Control` has counted the most phases that a program of so many layers has.
        unsafe { stream.copy_htod(base + control.phases, &descriptors) }?;
        // SAFETY: as above, for matrices.
        unsafe { stream.copy_htod(base + control.streams, bytemuck::cast_slice(&matcher.streams)) }?;
        let this = Self {
            function,
            launch: Launch {
                shared: bytes,
                cooperative: true,
                ..Launch::linear(blocks, THREADS)
            },
            params: StepParams {
                phases: base + control.phases,
                streams: base + control.streams,
                counters: base,
                fault: work.fault,
                sums: base + control.sums,
                partial: base + control.partial,
                segments: base + control.segments,
                residual,
                bests: base + control.bests,
                embedding: embedding.ptr,
                embedding_row_bytes: embedding.row_bytes,
                results: work.results.as_ptr() as u64,
                done: work.done_address(),
                times: base + control.times,
                count: matcher.phases.len() as u32,
                stream_count,
                splits: work.dims.capacity.max_context.div_ceil(SPLIT),
                slots,
                row_limit,
                exponent_limit,
                width: embedded.width,
                embedding_coding: embedding.coding,
                token: 0,
                sequence: 0,
                position: 0,
                step: 0,
                at: places,
            },
            numbered: [
                (base, COUNTER_BYTES as usize),
                (base + control.mail, (control.end - control.mail) as usize),
            ],
            steps: Cell::new(0),
            described: matcher.described,
        };
        this.empty(stream)?;
        // SAFETY: the fault word is in the workspace's arena, which only this stream uses.
        unsafe { stream.fill(work.fault, 0xff, 4) }?;
        stream.synchronize()?;
        work.forget_done();
        Ok(Some(this))
    }

    /// Empties all mail and starts to number anew.
    fn empty(&self, stream: &Stream) -> Result<()> {
        for (at, bytes) in self.numbered {
            // SAFETY: both are the workspace's, which only this stream uses.
            unsafe { stream.fill(at, 0, bytes) }?;
        }
        self.steps.set(0);
        Ok(())
    }

    /// Where the last launch's time went, by the clock of the first block's multiprocessor. The stream must have passed it.
    pub(super) fn phases(&self, stream: &Stream, phases: &mut Vec<PhaseTime>) -> Result<()> {
        let points = POINTS as usize;
        let mut times = vec![0u64; self.described.len() * points + 3];
        // SAFETY: pageable memory; as many times as `Control` has counted.
        unsafe { stream.copy_dtoh(bytemuck::cast_slice_mut(&mut times), self.params.times) }?;
        stream.synchronize()?;
        let (clocks, ends) = times.split_at(self.described.len() * points);
        let (Some(first), Some(last)) = (clocks.first(), clocks.last()) else {
            return Ok(());
        };
        let nanos = ends[1].saturating_sub(ends[0]) as f64 / last.saturating_sub(ends[2]).max(1) as f64;
        phases.push(PhaseTime {
            name: "start".into(),
            layer: None,
            time: Duration::from_nanos((first.saturating_sub(ends[2]) as f64 * nanos) as u64),
            weight_bytes: 0,
        });
        for ((name, layer, bytes), clock) in self.described.iter().zip(clocks.chunks_exact(points)) {
            let mut add = |part: &str, from: u64, to: u64, weight_bytes: u64| {
                phases.push(PhaseTime {
                    name: format!("{name}{part}"),
                    layer: *layer,
                    time: Duration::from_nanos((to.saturating_sub(from) as f64 * nanos) as u64),
                    weight_bytes,
                });
            };
            if *bytes == 0 {
                add("", clock[0], clock[3], 0);
            } else {
                add(": input", clock[0], clock[1], 0);
                add(": product", clock[1], clock[2], *bytes);
                add(": results", clock[2], clock[3], 0);
            }
        }
        Ok(())
    }

    /// Runs a token's step. Then the workspace's results are the fault word and the arg-max.
    pub(super) fn run(&self, stream: &Stream, work: &Workspace, row: Row) -> Result<()> {
        self.launch(stream, row)?;
        // The word comes some microseconds before the driver knows that the kernel has ended.
        let (started, step) = (Instant::now(), self.steps.get());
        loop {
            if (0..SPINS).any(|_| work.done() == step) {
                return Ok(());
            }
            if started.elapsed() > PATIENCE {
                return stream.synchronize();
            }
        }
    }

    fn launch(&self, stream: &Stream, row: Row) -> Result<()> {
        if self.steps.get() == NUMBERED_STEPS {
            self.empty(stream)?;
        }
        self.steps.set(self.steps.get() + 1);
        let params = StepParams {
            token: row.token,
            sequence: row.sequence,
            position: row.position,
            step: self.steps.get(),
            ..self.params
        };
        let mut arguments = arguments![params];
        // SAFETY: the kernel takes this struct; its addresses are of weights, which stay while the engine lives, of the
        // workspace, which only this stream uses, and of the workspace's page-locked results; the matcher has checked that
        // shapes fit each other.
        unsafe { self.function.launch(stream, self.launch, &mut arguments) }
    }
}
