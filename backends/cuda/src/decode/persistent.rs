//! One token through a decoder of the llama kind in one launch: `kernels/step.cu`.
//!
//! A program qualifies if its operations follow the pattern of llama and qwen2, its matrices are of encodings that the
//! kernel streams, and every input dimension is a multiple of 256. Any other program runs operation by operation; the bits
//! are the same.

use std::sync::Arc;

use hoist_backend::{
    ActivationKind, Encoding, KvDtype, ResolvedProgram, Result, RopeStyle, Step, StepKind, WeightClass,
    WeightId, WorkspaceDims,
};

use super::DeviceWeight;
use super::params::CacheLayer;
use super::workspace::{SPLIT, Workspace};
use crate::driver::{Context, Stream};
use crate::modules::{Function, Launch, Modules, arguments};

const CONSUMERS: u32 = 512;
const THREADS: u32 = CONSUMERS + 32;
const SLOT: u32 = 4640;
const CODES: u32 = 272;
const META: u32 = 80;
/// Room for stored values on their way.
const VALUES: u32 = 32_768;
/// Consumer warps. The ring holds a multiple of as many slots, so that every use of a slot is the same warp's: a barrier's
/// parity tells only whether the fill before or the one at hand is complete, and fills complete in any order, so that a
/// warp which comes to another's slot could take the fill before last for its own.
const WARPS: u32 = CONSUMERS / 32;
/// Phases of a layer, and of the logits.
const LAYER_PHASES: u64 = 5;

const NORM: u32 = 0;
const PLAIN: u32 = 1;
const MERGE: u32 = 2;
const STORE: u32 = 0;
const RESIDUAL: u32 = 1;
const SILU: u32 = 2;
const GELU: u32 = 3;

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
    input: u64,
    norm: u64,
    residual: u64,
    prologue: u32,
    epilogue: u32,
    matrices: u32,
    segments: u32,
    magic: u32,
    eps: f32,
    quantise_step: u32,
    pad: u32,
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

const PHASE_BYTES: usize = 216;

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

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct StepParams {
    phases: u64,
    row: u64,
    arrived: u64,
    fault: u64,
    sums: u64,
    partial: u64,
    times: u64,
    count: u32,
    splits: u32,
    slots: u32,
    row_limit: u32,
    segment_limit: u32,
    pad: u32,
}

const _: () = {
    assert!(size_of::<StepMatrix>() == 48);
    assert!(size_of::<Product>() == 200);
    assert!(size_of::<Attention>() == 96);
    assert!(size_of::<StepParams>() == 80);
};

/// Bytes that a workspace keeps for the barrier's counter, descriptors and times.
pub(super) fn control_bytes(dims: &WorkspaceDims) -> Option<u64> {
    let phases = phase_limit(dims)?;
    phases
        .checked_mul(PHASE_BYTES as u64 + 8 * POINTS)?
        .checked_add(COUNTER_BYTES + 16)
}

const COUNTER_BYTES: u64 = 256;
/// Points of a phase whose clock is kept.
const POINTS: u64 = 4;

fn phase_limit(dims: &WorkspaceDims) -> Option<u64> {
    (dims.kv.len() as u64).checked_mul(LAYER_PHASES)?.checked_add(1)
}

/// A program that runs in one launch.
#[derive(Debug)]
pub(super) struct Persistent {
    function: Function,
    launch: Launch,
    params: StepParams,
    /// Steps before the launch: the embedding.
    pub(super) before: usize,
}

/// Walks over the operations of a program.
struct Matcher<'a, W> {
    steps: &'a [Step],
    at: usize,
    work: &'a Workspace,
    tables: &'a [u64],
    weight: W,
    blocks: u32,
    phases: Vec<Phase>,
    /// Most rows of a block in a phase, most segments of an input, and most bytes for attention.
    rows: u32,
    segments: u32,
    attention_bytes: u32,
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
                out: self.ptr(out),
                rows: u32::try_from(matrix.shape.rows).ok()?,
                coding: coding(matrix.encoding)?,
                step,
                pad: 0,
            },
        ))
    }

    fn push(&mut self, from: &Quantised, matrices: &[StepMatrix], base: Product) -> Option<()> {
        let segments = u32::try_from(from.cols / 256).ok()?;
        let rows: u32 = matrices.iter().map(|m| m.rows.div_ceil(self.blocks)).sum();
        // A segment's number is divided by multiplication, exact as long as the product stays below 2^32.
        if u64::from(rows) * u64::from(segments) * u64::from(segments) >= 1 << 32 {
            return None;
        }
        let mut product = Product {
            input: self.ptr(from.input),
            matrices: matrices.len() as u32,
            segments,
            magic: (1u64 << 32).div_ceil(segments.into()).min(u32::MAX.into()) as u32,
            quantise_step: from.step,
            ..base
        };
        product.matrix[..matrices.len()].copy_from_slice(matrices);
        self.phases.push(Phase::Product(product));
        self.rows = self.rows.max(rows);
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
        self.push(&input, &[wq, wk, wv], base)?;
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
        if cached as usize != head_dim || !head_dim.is_multiple_of(8) || 2 * head_dim > CONSUMERS as usize {
            return None;
        }
        self.phases.push(Phase::Attention(Attention {
            query: self.ptr(q),
            key: self.ptr(k),
            value: self.ptr(v),
            table: *self.tables.get(table)?,
            out: self.ptr(attended),
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
        self.attention_bytes = self.attention_bytes.max((4 * cached + 2 * SPLIT) * 4);
        let input = self.quantise(attended)?;
        let (branch, wo) = self.product(&input)?;
        self.added(x, branch)?;
        let residual = |prologue| Product {
            residual: 0,
            prologue,
            epilogue: RESIDUAL,
            ..Product::default()
        };
        let to_x = |matrix, ptr| StepMatrix { out: ptr, ..matrix };
        let at_x = self.ptr(x);
        self.push(
            &input,
            &[to_x(wo, at_x)],
            Product {
                residual: at_x,
                ..residual(MERGE)
            },
        )?;
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
        let at_inner = self.ptr(inner);
        self.push(&input, &[to_x(wg, at_inner), wu], Product { epilogue, ..base })?;
        let input = self.quantise(inner)?;
        let (branch, wd) = self.product(&input)?;
        self.added(x, branch)?;
        self.push(
            &input,
            &[to_x(wd, at_x)],
            Product {
                residual: at_x,
                ..residual(PLAIN)
            },
        )
    }

    /// All phases; the number of steps before them.
    fn program(&mut self, layers: usize, logits: usize) -> Option<usize> {
        let StepKind::Embed { out: x, .. } = *self.next()?.1 else {
            return None;
        };
        for _ in 0..layers {
            self.layer(x)?;
        }
        let (input, base) = self.normed(x)?;
        let (out, matrix) = self.product(&input)?;
        if out != logits || self.at != self.steps.len() {
            return None;
        }
        self.push(&input, &[matrix], base)?;
        Some(1)
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
        let blocks = context.device.multiprocessors;
        let mut matcher = Matcher {
            steps: &resolved.steps,
            at: 0,
            work,
            tables,
            weight,
            blocks,
            phases: Vec::new(),
            rows: 0,
            segments: 0,
            attention_bytes: 0,
        };
        let Some(before) = matcher.program(work.dims.kv.len(), resolved.logits) else {
            return Ok(None);
        };
        let segment_limit = matcher.segments.max(matcher.attention_bytes.div_ceil(CODES));
        let row_limit = matcher.rows.next_multiple_of(8);
        // Everything but the ring and its barriers, as the kernel lays it out; 128 for its alignment.
        let fixed = 2 * 224 + 320 * 4 + row_limit * 10 + segment_limit * (CODES + META) + VALUES + 128 + 32;
        // The kernel's own static shared memory counts too.
        let shared = context.device.shared_memory_optin.saturating_sub(256);
        let slots = (shared.saturating_sub(fixed) / (SLOT + 16)).min(most_slots) / WARPS * WARPS;
        if slots == 0 {
            return Ok(None);
        }
        let function = modules.function("step", "decode_step")?;
        let bytes = fixed + slots * (SLOT + 16);
        function.allow_shared(bytes)?;
        if function.blocks_per_multiprocessor(THREADS, bytes)? == 0 {
            return Ok(None);
        }
        let descriptors: Vec<u8> = matcher.phases.iter().flat_map(Phase::bytes).collect();
        let at = work.control + COUNTER_BYTES;
        // SAFETY: pageable memory; `control_bytes` has counted the most phases that a program of so many layers has.
        unsafe { stream.copy_htod(at, &descriptors) }?;
        // SAFETY: the counter is the workspace's, which only this stream uses.
        unsafe { stream.fill(work.control, 0, COUNTER_BYTES as usize) }?;
        stream.synchronize()?;
        Ok(Some(Self {
            function,
            launch: Launch {
                shared: bytes,
                cooperative: true,
                ..Launch::linear(blocks, THREADS)
            },
            params: StepParams {
                phases: at,
                row: work.rows,
                arrived: work.control,
                fault: work.fault,
                sums: work.sums,
                partial: work.partial,
                times: at + descriptors.len() as u64,
                count: matcher.phases.len() as u32,
                splits: work.dims.capacity.max_context.div_ceil(SPLIT),
                slots,
                row_limit,
                segment_limit,
                pad: 0,
            },
            before,
        }))
    }

    /// Enqueues everything behind the embedding.
    pub(super) fn launch(&self, stream: &Stream) -> Result<()> {
        let params = self.params;
        let mut arguments = arguments![params];
        // SAFETY: the kernel takes this struct; its addresses are of weights, which stay while the engine lives, and of
        // the workspace, which only this stream uses; the matcher has checked that shapes fit each other.
        unsafe { self.function.launch(stream, self.launch, &mut arguments) }
    }
}
