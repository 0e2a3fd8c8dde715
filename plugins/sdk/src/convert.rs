//! What C passed, as the contract's types: every pointer, count and number checked.

use hoist_backend::{
    ActivationKind, BackendInfo, Capacity, DecodeProgram, Encoding, EncodingSet, FloatLayout, IndexEntry,
    IndexLayout, KvDtype, KvSpec, LoadPlan, MemoryByClass, NumericsClass, Op, OpKind, OpName, OpenOptions,
    Role, RopeStyle, Shape, Slot, Table, TableId, ValueChange, ValueId, ValueKind, ValueSpec, WeightClass,
    WeightId, WeightPlan, WeightRef, WorkspaceDims,
};
use hoist_plugin_abi as abi;
use hoist_plugin_abi::Status;

use crate::report::Problem;

pub(crate) type Checked<T> = Result<T, Problem>;

/// A struct of C's, by the rule of sizes: as many bytes as both sides know, into zeros.
///
/// # Safety
/// `source` is NULL or begins with a `u32` size and is valid for as many bytes; `T` is a `repr(C)` struct that begins with
/// that size and for which zeros are valid.
pub(crate) unsafe fn read_struct<T: Copy>(source: *const T, what: &str) -> Checked<T> {
    if source.is_null() || !source.is_aligned() {
        return Err(Problem::invalid(format!("`{what}` is NULL or misaligned")));
    }
    // SAFETY: as the caller vouches.
    let size = unsafe { source.cast::<u32>().read() } as usize;
    if size < 8 {
        return Err(Problem::invalid(format!("`struct_size` of `{what}` is {size}")));
    }
    let mut own = std::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: no more than either side's size.
    unsafe {
        std::ptr::copy_nonoverlapping(
            source.cast::<u8>(),
            own.as_mut_ptr().cast::<u8>(),
            size.min(size_of::<T>()),
        );
    }
    // SAFETY: zeros are valid, and so is what the caller wrote.
    Ok(unsafe { own.assume_init() })
}

/// Writes a struct back, no further than the caller's size.
///
/// # Safety
/// As [`read_struct`], for writing.
pub(crate) unsafe fn write_struct<T: Copy>(target: *mut T, own: &T, what: &str) -> Checked<()> {
    if target.is_null() || !target.is_aligned() {
        return Err(Problem::invalid(format!("`{what}` is NULL or misaligned")));
    }
    // SAFETY: as the caller vouches.
    let size = unsafe { target.cast::<u32>().read() } as usize;
    let header = size_of::<u32>();
    let len = size.min(size_of::<T>()).saturating_sub(header);
    // SAFETY: the struct begins with its size, so that what follows is inside it.
    let from = unsafe { std::ptr::from_ref(own).cast::<u8>().add(header) };
    // SAFETY: as above, for the caller's.
    let to = unsafe { target.cast::<u8>().add(header) };
    // SAFETY: leaves the caller's `struct_size` as it is and writes no further than it says.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len) };
    Ok(())
}

/// As [`write_struct`], unless the caller wants none.
///
/// # Safety
/// As [`write_struct`], or `target` is NULL.
pub(crate) unsafe fn write_if_wanted<T: Copy>(target: *mut T, own: &T, what: &str) -> Checked<()> {
    if target.is_null() {
        return Ok(());
    }
    // SAFETY: passed on.
    unsafe { write_struct(target, own, what) }
}

/// Demands a place for a result, before anything is done that would yield one.
pub(crate) fn check_place<T>(place: *mut T, what: &str) -> Checked<()> {
    if place.is_null() || !place.is_aligned() {
        return Err(Problem::invalid(format!("`{what}` is NULL or misaligned")));
    }
    Ok(())
}

/// An array of C's.
///
/// # Safety
/// `data` is valid for `count` elements as long as the result is used.
pub(crate) unsafe fn slice<'a, T>(data: *const T, count: u64, what: &str) -> Checked<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    let too_large = || Problem::invalid(format!("`{what}` has {count} elements, more than memory"));
    let count = usize::try_from(count).map_err(|_| too_large())?;
    let bytes = count
        .checked_mul(size_of::<T>())
        .filter(|b| isize::try_from(*b).is_ok())
        .ok_or_else(too_large)?;
    let _ = bytes;
    if data.is_null() || !data.is_aligned() {
        return Err(Problem::invalid(format!("`{what}` is NULL or misaligned")));
    }
    // SAFETY: as the caller vouches.
    Ok(unsafe { std::slice::from_raw_parts(data, count) })
}

/// Elements of an array of growing structs, by its stride.
///
/// # Safety
/// As [`slice`], and `T` as in [`read_struct`].
unsafe fn strided<T: Copy>(data: *const T, count: u64, stride: u64, what: &str) -> Checked<Vec<T>> {
    let stride =
        usize::try_from(stride).map_err(|_| Problem::invalid(format!("stride of `{what}` is {stride}")))?;
    if stride < 8 || !stride.is_multiple_of(align_of::<T>()) {
        return Err(Problem::invalid(format!("stride of `{what}` is {stride}")));
    }
    let bytes = count
        .checked_mul(stride as u64)
        .ok_or_else(|| Problem::invalid(format!("`{what}` has {count} elements")))?;
    // SAFETY: as the caller vouches.
    let bytes = unsafe { slice(data.cast::<u8>(), bytes, what) }?;
    bytes
        .chunks_exact(stride)
        // SAFETY: each chunk is one element, which begins with its size; alignment is checked there.
        .map(|element| unsafe { read_struct(element.as_ptr().cast::<T>(), what) })
        .collect()
}

fn layer(layer: u32) -> Option<u32> {
    (layer != abi::NO_LAYER).then_some(layer)
}

fn encoding(number: u32) -> Option<Encoding> {
    match number {
        128 => Some(Encoding::APR_Q4),
        129 => Some(Encoding::APR_Q8),
        other => Encoding::from_ggml_id(other).filter(|e| e.is_float() || e.is_quantized()),
    }
}

fn encoding_number(encoding: Encoding) -> Option<u32> {
    match encoding {
        Encoding::APR_Q4 => Some(128),
        Encoding::APR_Q8 => Some(129),
        other => other.ggml_id(),
    }
}

/// A plan, and the tensors of it that cannot be understood.
///
/// # Safety
/// `plan` as `hoist_plugin.h` says.
pub(crate) unsafe fn plan(plan: *const abi::PlanV) -> Checked<(LoadPlan, Vec<(u32, String)>)> {
    // SAFETY: passed on.
    let c = unsafe { read_struct(plan, "plan") }?;
    // SAFETY: passed on.
    let tensors = unsafe { strided(c.tensors, c.tensor_count, c.tensor_size, "tensors") }?;
    let mut refused = Vec::new();
    let mut weights = Vec::with_capacity(tensors.len());
    let mut resident = MemoryByClass::default();
    for (i, t) in tensors.iter().enumerate() {
        if t.id as usize != i {
            return Err(Problem::invalid(format!("tensor {i} has id {}", t.id)));
        }
        // SAFETY: passed on.
        let name = unsafe { slice(t.name, t.name_len, "tensor name") }?;
        let name = std::str::from_utf8(name)
            .map_err(|_| Problem::invalid(format!("the name of tensor {i} is no UTF-8")))?
            .to_owned();
        let (encoding, role) = match (encoding(t.encoding), Role::from_id(t.role)) {
            (Some(encoding), Some(role)) => (encoding, role),
            (None, _) => {
                refused.push((t.id, format!("encoding number {} is unknown", t.encoding)));
                continue;
            }
            (_, None) => {
                refused.push((t.id, format!("role number {} is unknown", t.role)));
                continue;
            }
        };
        let class = match t.class {
            0 => WeightClass::Quantized,
            1 => WeightClass::Float,
            2 => WeightClass::Gamma,
            3 => WeightClass::Bias,
            other => return Err(Problem::invalid(format!("class of tensor {i} is {other}"))),
        };
        let layout = match t.layout {
            0 => FloatLayout::OutIn,
            1 => FloatLayout::InOut,
            other => return Err(Problem::invalid(format!("layout of tensor {i} is {other}"))),
        };
        let shape = Shape {
            matrices: t.matrices,
            rows: t.rows,
            cols: t.cols,
        };
        let nbytes = encoding
            .nbytes(shape)
            .map_err(|e| Problem::invalid(format!("tensor {i}: {e}")))?;
        if nbytes != t.nbytes || u64::from(t.granule) != encoding.block_bytes() || nbytes == 0 {
            return Err(Problem::invalid(format!(
                "tensor {i} of {encoding} {shape} has {} bytes in blocks of {}; it should have {nbytes} in blocks of {}",
                t.nbytes,
                t.granule,
                encoding.block_bytes()
            )));
        }
        *resident.class_mut(class) = resident.class_mut(class).saturating_add(t.resident_bytes);
        weights.push(WeightPlan {
            id: WeightId(t.id),
            name,
            layer: layer(t.layer),
            role,
            class,
            encoding,
            shape,
            nbytes,
            views: Vec::new(),
            change: ValueChange::Keep,
            layout,
            resident_bytes: t.resident_bytes,
        });
    }
    let nbytes = weights.iter().map(|w| w.nbytes).try_fold(0u64, u64::checked_add);
    let nbytes = nbytes.ok_or_else(|| Problem::invalid("the plan's bytes exceed 2^64"))?;
    let plan = LoadPlan {
        architecture: String::new(),
        layers: c.layers,
        weights,
        resident,
        nbytes,
        source_bytes: nbytes,
    };
    Ok((plan, refused))
}

/// # Safety
/// `layout` as `hoist_plugin.h` says.
pub(crate) unsafe fn index_layout(layout: *const abi::IndexLayout) -> Checked<IndexLayout> {
    // SAFETY: passed on.
    let c = unsafe { read_struct(layout, "layout") }?;
    // SAFETY: passed on.
    let entries = unsafe { slice(c.entries, c.entry_count, "index entries") }?;
    let entries = entries
        .iter()
        .map(|e| {
            let role = Role::from_id(e.role).ok_or_else(|| {
                Problem::new(Status::UNSUPPORTED, format!("role number {} is unknown", e.role))
            })?;
            let slot = match e.slot {
                abi::SLOT_PRESENT => Slot::Present(WeightId(e.tensor)),
                abi::SLOT_TIED => Slot::Tied(WeightId(e.tensor)),
                abi::SLOT_ABSENT => Slot::Absent,
                other => return Err(Problem::invalid(format!("slot of an index entry is {other}"))),
            };
            Ok(IndexEntry {
                layer: layer(e.layer),
                role,
                slot,
            })
        })
        .collect::<Checked<_>>()?;
    Ok(IndexLayout {
        layers: c.layers,
        entries,
    })
}

fn value_kind(v: &abi::ValueSpec) -> Checked<ValueKind> {
    match v.kind {
        0 => Ok(ValueKind::F32),
        1 if v.vectors > 0 => Ok(ValueKind::Quantized { vectors: v.vectors }),
        2 => Ok(ValueKind::Experts),
        other => Err(Problem::invalid(format!(
            "kind of a value is {other} with {} vectors",
            v.vectors
        ))),
    }
}

fn kv(specs: &[abi::KvSpec]) -> Vec<KvSpec> {
    specs
        .iter()
        .map(|k| KvSpec {
            kv_heads: k.kv_heads,
            head_dim: k.head_dim,
        })
        .collect()
}

/// # Safety
/// `dims` as `hoist_plugin.h` says.
pub(crate) unsafe fn workspace_dims(dims: *const abi::WorkspaceDims) -> Checked<WorkspaceDims> {
    // SAFETY: passed on.
    let c = unsafe { read_struct(dims, "dims") }?;
    // SAFETY: passed on.
    let specs = unsafe { slice(c.kv, c.kv_count, "kv") }?;
    // SAFETY: passed on.
    let values = unsafe { slice(c.values, c.value_count, "values") }?;
    let capacity = Capacity {
        max_context: c.capacity.max_context,
        max_sequences: c.capacity.max_sequences,
        max_batch_tokens: c.capacity.max_batch_tokens,
        kv: match c.capacity.kv_dtype {
            0 => KvDtype::F16,
            1 => KvDtype::F32,
            other => {
                return Err(Problem::new(
                    Status::UNSUPPORTED,
                    format!("kv type {other} is unknown"),
                ));
            }
        },
    };
    if capacity.max_context == 0 || capacity.max_sequences == 0 || capacity.max_batch_tokens == 0 {
        return Err(Problem::invalid(format!("a capacity is zero: {capacity:?}")));
    }
    Ok(WorkspaceDims {
        capacity,
        kv: kv(specs),
        values: values
            .iter()
            .map(|v| Ok((value_kind(v)?, v.width)))
            .collect::<Checked<_>>()?,
        table_bytes: c.table_bytes,
        vocab: c.vocab,
    })
}

/// # Safety
/// `program` as `hoist_plugin.h` says.
pub(crate) unsafe fn program(program: *const abi::Program) -> Checked<DecodeProgram> {
    // SAFETY: passed on.
    let c = unsafe { read_struct(program, "program") }?;
    // SAFETY: passed on.
    let specs = unsafe { slice(c.kv, c.kv_count, "kv") }?;
    // SAFETY: passed on.
    let values = unsafe { slice(c.values, c.value_count, "values") }?;
    // SAFETY: passed on.
    let ops = unsafe { strided(c.ops, c.op_count, c.op_size, "ops") }?;
    // SAFETY: passed on.
    let tables = unsafe { slice(c.tables, c.table_count, "tables") }?;
    let values = values
        .iter()
        .enumerate()
        .map(|(i, v)| {
            Ok(ValueSpec {
                name: format!("v{i}"),
                width: v.width,
                kind: value_kind(v)?,
            })
        })
        .collect::<Checked<Vec<_>>>()?;
    let tables = tables
        .iter()
        .enumerate()
        .map(|(i, t)| {
            // SAFETY: passed on.
            let data = unsafe { slice(t.data, u64::from(t.rows) * u64::from(t.cols), "table") }?;
            Ok(Table {
                name: format!("t{i}"),
                rows: t.rows,
                cols: t.cols,
                data: data.into(),
            })
        })
        .collect::<Checked<Vec<_>>>()?;
    let sizes = Sizes {
        values: values.len(),
        tables: tables.len(),
    };
    let ops = ops.iter().map(|o| op(o, sizes)).collect::<Checked<Vec<_>>>()?;
    let tail = usize::try_from(c.tail).ok().filter(|t| *t <= ops.len());
    let tail =
        tail.ok_or_else(|| Problem::invalid(format!("tail is {} of {} operations", c.tail, ops.len())))?;
    Ok(DecodeProgram {
        vocab: c.vocab,
        max_context: c.max_context,
        kv: kv(specs),
        logits: sizes.value(c.logits)?,
        values,
        ops,
        tail,
        tables,
    })
}

#[derive(Clone, Copy)]
struct Sizes {
    values: usize,
    tables: usize,
}

impl Sizes {
    fn value(self, id: u32) -> Checked<ValueId> {
        if (id as usize) < self.values {
            return Ok(ValueId(id));
        }
        Err(Problem::invalid(format!("value {id} of {}", self.values)))
    }

    fn table(self, id: u32) -> Checked<TableId> {
        if (id as usize) < self.tables {
            return Ok(TableId(id));
        }
        Err(Problem::invalid(format!("table {id} of {}", self.tables)))
    }
}

fn weight(w: abi::WeightRef) -> Checked<WeightRef> {
    let role = Role::from_id(w.role)
        .ok_or_else(|| Problem::new(Status::UNSUPPORTED, format!("role number {} is unknown", w.role)))?;
    Ok(WeightRef {
        layer: layer(w.layer),
        role,
    })
}

fn optional(w: abi::WeightRef) -> Checked<Option<WeightRef>> {
    if w.role == u32::MAX {
        Ok(None)
    } else {
        weight(w).map(Some)
    }
}

fn op(c: &abi::Op, sizes: Sizes) -> Checked<Op> {
    let name = OpName::from_id(c.op).ok_or_else(|| {
        Problem::new(
            Status::UNSUPPORTED,
            format!("operation number {} is unknown", c.op),
        )
    })?;
    let input = |i: usize| sizes.value(c.inputs[i]);
    let out = sizes.value(c.outputs[0]);
    let [int0, int1, int2, int3] = c.integers;
    let [f0, f1, ..] = c.floats;
    let kind = match name {
        OpName::Embed => OpKind::Embed {
            weight: weight(c.weights[0])?,
            out: out?,
        },
        OpName::EmbedPosition => OpKind::EmbedPosition {
            weight: weight(c.weights[0])?,
            out: out?,
        },
        OpName::RmsNorm => OpKind::RmsNorm {
            input: input(0)?,
            weight: weight(c.weights[0])?,
            eps: f0,
            rows: int0,
            out: out?,
        },
        OpName::LayerNorm => OpKind::LayerNorm {
            input: input(0)?,
            weight: weight(c.weights[0])?,
            bias: weight(c.weights[1])?,
            eps: f0,
            out: out?,
        },
        OpName::Quantise => OpKind::Quantise {
            input: input(0)?,
            out: out?,
        },
        OpName::MatMul => OpKind::MatMul {
            input: input(0)?,
            weight: weight(c.weights[0])?,
            bias: optional(c.weights[1])?,
            out: out?,
        },
        OpName::Rope => OpKind::Rope {
            value: input(0)?,
            table: sizes.table(int0)?,
            style: match int1 {
                0 => RopeStyle::Interleaved,
                1 => RopeStyle::HalfSplit,
                other => {
                    return Err(Problem::new(
                        Status::UNSUPPORTED,
                        format!("rope style {other} is unknown"),
                    ));
                }
            },
            heads: int2,
            n_rot: int3,
        },
        OpName::StoreKv => OpKind::StoreKv {
            key: input(0)?,
            value: input(1)?,
        },
        OpName::Attention => OpKind::Attention {
            query: input(0)?,
            heads: int0,
            scale: f0,
            window: (int1 != 0).then_some(int1),
            soft_cap: (f1 != 0.0).then_some(f1),
            out: out?,
        },
        OpName::Activation => OpKind::Activation {
            input: input(0)?,
            kind: match int0 {
                0 => ActivationKind::Silu,
                1 => ActivationKind::GeluTanh,
                other => {
                    return Err(Problem::new(
                        Status::UNSUPPORTED,
                        format!("activation {other} is unknown"),
                    ));
                }
            },
            out: out?,
        },
        OpName::Mul => OpKind::Mul {
            a: input(0)?,
            b: input(1)?,
            out: out?,
        },
        OpName::Add => OpKind::Add {
            a: input(0)?,
            b: input(1)?,
            out: out?,
        },
        OpName::Scale => OpKind::Scale {
            input: input(0)?,
            factor: f0,
            out: out?,
        },
        OpName::SoftCap => OpKind::SoftCap {
            input: input(0)?,
            cap: f0,
            out: out?,
        },
        OpName::RouterTopK => OpKind::RouterTopK {
            logits: input(0)?,
            k: int0,
            normalise: int1 != 0,
            experts: out?,
            weights: sizes.value(c.outputs[1])?,
        },
        OpName::ExpertMatMul => OpKind::ExpertMatMul {
            input: input(0)?,
            experts: input(1)?,
            weight: weight(c.weights[0])?,
            out: out?,
        },
        OpName::WeightedSum => OpKind::WeightedSum {
            input: input(0)?,
            experts: input(1)?,
            weights: input(2)?,
            out: out?,
        },
        OpName::Logits => OpKind::Logits {
            input: input(0)?,
            weight: weight(c.weights[0])?,
            bias: optional(c.weights[1])?,
            out: out?,
        },
        other => {
            return Err(Problem::new(
                Status::UNSUPPORTED,
                format!("operation {other} has no form here"),
            ));
        }
    };
    Ok(Op {
        layer: layer(c.layer),
        kind,
    })
}

/// # Safety
/// `options` as `hoist_plugin.h` says.
pub(crate) unsafe fn open_options(options: *const abi::OpenOptions) -> Checked<OpenOptions> {
    // SAFETY: passed on.
    let c = unsafe { read_struct(options, "options") }?;
    let unknown = c.flags & !(abi::OPTION_IMPORT | abi::OPTION_FORCE_SCALAR);
    if unknown != 0 {
        return Err(Problem::invalid(format!("option flags {unknown:#x} are unknown")));
    }
    if c.flags & abi::OPTION_IMPORT != 0 {
        return Err(Problem::new(
            Status::UNSUPPORTED,
            "this plugin copies weights and does not import them",
        ));
    }
    Ok(OpenOptions {
        memory_budget: (c.memory_budget != 0).then_some(c.memory_budget),
        threads: (c.threads != 0).then_some(c.threads),
        import: false,
        force_scalar: c.flags & abi::OPTION_FORCE_SCALAR != 0,
        float_layout: None,
    })
}

fn bits(set: EncodingSet) -> [u64; 4] {
    let mut bits = [0; 4];
    for n in set.iter().filter_map(encoding_number) {
        bits[n as usize / 64] |= 1 << (n % 64);
    }
    bits
}

pub(crate) fn caps(info: &BackendInfo) -> abi::Caps {
    let limit = |n: Option<u32>| n.map_or(0, |n| n);
    abi::Caps {
        struct_size: size_of::<abi::Caps>() as u32,
        numerics: match info.numerics {
            NumericsClass::Exact => 0,
            NumericsClass::Bounded => 1,
        },
        stored: bits(info.stored),
        computed: bits(info.computed),
        ops: info.ops.iter().fold(0, |bits, op| bits | 1 << op.id()),
        float_layout: match info.float_layout {
            FloatLayout::OutIn => 0,
            FloatLayout::InOut => 1,
        },
        max_batch_tokens: limit(info.limits.max_batch_tokens),
        max_sequences: limit(info.limits.max_sequences),
        max_context: limit(info.limits.max_context),
        max_weight_bytes: info.limits.max_weight_bytes.map_or(0, |n| n),
        weight_alignment: info.sizing.weight_alignment,
        quantized_row_bytes: info.sizing.quantized_row_bytes,
        quantized_segment_bytes: info.sizing.quantized_segment_bytes,
        index_entry_bytes: info.sizing.index_entry_bytes,
        max_row_bytes: info.limits.max_row_bytes.map_or(0, |n| n),
    }
}

pub(crate) fn four(m: &MemoryByClass) -> [u64; 4] {
    [m.quantized, m.float, m.gamma, m.bias]
}
