//! The contract's types as C sees them. Everything here borrows: arrays live in the caller until the call returns.

use hoist_backend::{
    ActivationKind, BackendInfo, DecodeProgram, DeviceMemory, Encoding, EncodingSet, FloatLayout,
    IndexLayout, KvDtype, Limits, LoadPlan, MemoryByClass, MemoryInfo, NumericsClass, Op, OpKind, OpName,
    OpSet, RopeStyle, Sizing, Slot, ValueKind, WeightClass, WeightRef, WorkspaceDims,
};
use hoist_plugin_abi as abi;

/// The number of an encoding: GGML's, or APR's own.
pub(crate) fn encoding_number(encoding: Encoding) -> u32 {
    match encoding {
        Encoding::APR_Q4 => 128,
        Encoding::APR_Q8 => 129,
        other => other.ggml_id().unwrap_or(u32::MAX),
    }
}

fn layer(layer: Option<u32>) -> u32 {
    layer.unwrap_or(abi::NO_LAYER)
}

pub(crate) fn class_number(class: WeightClass) -> u32 {
    match class {
        WeightClass::Quantized => 0,
        WeightClass::Float => 1,
        WeightClass::Gamma => 2,
        WeightClass::Bias => 3,
    }
}

/// A plan's tensors.
pub(crate) fn tensors(plan: &LoadPlan) -> Vec<abi::Tensor> {
    plan.weights
        .iter()
        .map(|w| abi::Tensor {
            struct_size: size_of::<abi::Tensor>() as u32,
            id: w.id.0,
            layer: layer(w.layer),
            role: w.role.id(),
            class: class_number(w.class),
            encoding: encoding_number(w.encoding),
            layout: match w.layout {
                FloatLayout::OutIn => 0,
                FloatLayout::InOut => 1,
            },
            granule: w.granule() as u32,
            matrices: w.shape.matrices,
            rows: w.shape.rows,
            cols: w.shape.cols,
            nbytes: w.nbytes,
            resident_bytes: w.resident_bytes,
            name: w.name.as_ptr(),
            name_len: w.name.len() as u64,
        })
        .collect()
}

/// A plan over such tensors.
pub(crate) fn plan(plan: &LoadPlan, tensors: &[abi::Tensor]) -> abi::PlanV {
    abi::PlanV {
        struct_size: size_of::<abi::PlanV>() as u32,
        layers: plan.layers,
        tensors: tensors.as_ptr(),
        tensor_count: tensors.len() as u64,
        tensor_size: size_of::<abi::Tensor>() as u64,
        nbytes: plan.nbytes,
        resident_bytes: plan.resident.weights(),
    }
}

/// An index's entries.
pub(crate) fn index_entries(layout: &IndexLayout) -> Vec<abi::IndexEntry> {
    layout
        .entries
        .iter()
        .map(|e| {
            let (slot, tensor) = match e.slot {
                Slot::Present(id) => (abi::SLOT_PRESENT, id.0),
                Slot::Tied(id) => (abi::SLOT_TIED, id.0),
                Slot::Absent => (abi::SLOT_ABSENT, 0),
            };
            abi::IndexEntry {
                layer: layer(e.layer),
                role: e.role.id(),
                slot,
                tensor,
            }
        })
        .collect()
}

fn value(kind: ValueKind, width: u32) -> abi::ValueSpec {
    let (kind, vectors) = match kind {
        ValueKind::F32 => (0, 0),
        ValueKind::Quantized { vectors } => (1, vectors),
        ValueKind::Experts => (2, 0),
    };
    abi::ValueSpec {
        kind,
        width,
        vectors,
        reserved: 0,
    }
}

/// Arrays that a workspace's dimensions point to.
pub(crate) struct DimsArrays {
    kv: Vec<abi::KvSpec>,
    values: Vec<abi::ValueSpec>,
}

impl DimsArrays {
    pub(crate) fn new(dims: &WorkspaceDims) -> Self {
        Self {
            kv: dims
                .kv
                .iter()
                .map(|k| abi::KvSpec {
                    kv_heads: k.kv_heads,
                    head_dim: k.head_dim,
                })
                .collect(),
            values: dims
                .values
                .iter()
                .map(|(kind, width)| value(*kind, *width))
                .collect(),
        }
    }

    pub(crate) fn dims(&self, dims: &WorkspaceDims) -> abi::WorkspaceDims {
        let c = &dims.capacity;
        abi::WorkspaceDims {
            struct_size: size_of::<abi::WorkspaceDims>() as u32,
            vocab: dims.vocab,
            capacity: abi::Capacity {
                max_context: c.max_context,
                max_sequences: c.max_sequences,
                max_batch_tokens: c.max_batch_tokens,
                kv_dtype: match c.kv {
                    KvDtype::F16 => 0,
                    KvDtype::F32 => 1,
                },
            },
            kv: self.kv.as_ptr(),
            kv_count: self.kv.len() as u64,
            values: self.values.as_ptr(),
            value_count: self.values.len() as u64,
            table_bytes: dims.table_bytes,
        }
    }
}

/// Arrays that a program points to.
pub(crate) struct ProgramArrays {
    kv: Vec<abi::KvSpec>,
    values: Vec<abi::ValueSpec>,
    ops: Vec<abi::Op>,
    tables: Vec<abi::Table>,
}

impl ProgramArrays {
    pub(crate) fn new(program: &DecodeProgram) -> Self {
        Self {
            kv: program
                .kv
                .iter()
                .map(|k| abi::KvSpec {
                    kv_heads: k.kv_heads,
                    head_dim: k.head_dim,
                })
                .collect(),
            values: program.values.iter().map(|v| value(v.kind, v.width)).collect(),
            ops: program.ops.iter().map(op).collect(),
            tables: program
                .tables
                .iter()
                .map(|t| abi::Table {
                    rows: t.rows,
                    cols: t.cols,
                    data: t.data.as_ptr(),
                })
                .collect(),
        }
    }

    pub(crate) fn program(&self, program: &DecodeProgram) -> abi::Program {
        abi::Program {
            struct_size: size_of::<abi::Program>() as u32,
            vocab: program.vocab,
            max_context: program.max_context,
            logits: program.logits.0,
            kv: self.kv.as_ptr(),
            kv_count: self.kv.len() as u64,
            values: self.values.as_ptr(),
            value_count: self.values.len() as u64,
            ops: self.ops.as_ptr(),
            op_count: self.ops.len() as u64,
            op_size: size_of::<abi::Op>() as u64,
            tail: program.tail as u64,
            tables: self.tables.as_ptr(),
            table_count: self.tables.len() as u64,
        }
    }
}

const ABSENT: abi::WeightRef = abi::WeightRef {
    layer: abi::NO_LAYER,
    role: u32::MAX,
};

fn weight(w: WeightRef) -> abi::WeightRef {
    abi::WeightRef {
        layer: layer(w.layer),
        role: w.role.id(),
    }
}

fn optional(w: Option<WeightRef>) -> abi::WeightRef {
    w.map_or(ABSENT, weight)
}

/// One operation, by the table in [`abi::Op`]'s documentation.
fn op(op: &Op) -> abi::Op {
    let mut c = abi::Op {
        struct_size: size_of::<abi::Op>() as u32,
        op: op.kind.name().id(),
        layer: layer(op.layer),
        reserved: 0,
        inputs: [0; 3],
        outputs: [0; 3],
        weights: [ABSENT; 2],
        integers: [0; 4],
        floats: [0.0; 4],
    };
    match &op.kind {
        OpKind::Embed { weight: w, out } | OpKind::EmbedPosition { weight: w, out } => {
            c.outputs[0] = out.0;
            c.weights[0] = weight(*w);
        }
        OpKind::RmsNorm {
            input,
            weight: w,
            eps,
            rows,
            out,
        } => {
            c.inputs[0] = input.0;
            c.outputs[0] = out.0;
            c.weights[0] = weight(*w);
            c.integers[0] = *rows;
            c.floats[0] = *eps;
        }
        OpKind::LayerNorm {
            input,
            weight: w,
            bias,
            eps,
            out,
        } => {
            c.inputs[0] = input.0;
            c.outputs[0] = out.0;
            c.weights = [weight(*w), weight(*bias)];
            c.floats[0] = *eps;
        }
        OpKind::Quantise { input, out } => {
            c.inputs[0] = input.0;
            c.outputs[0] = out.0;
        }
        OpKind::MatMul {
            input,
            weight: w,
            bias,
            out,
        }
        | OpKind::Logits {
            input,
            weight: w,
            bias,
            out,
        } => {
            c.inputs[0] = input.0;
            c.outputs[0] = out.0;
            c.weights = [weight(*w), optional(*bias)];
        }
        OpKind::Rope {
            value,
            table,
            style,
            heads,
            n_rot,
        } => {
            c.inputs[0] = value.0;
            c.outputs[0] = value.0;
            let style = match style {
                RopeStyle::Interleaved => 0,
                RopeStyle::HalfSplit => 1,
            };
            c.integers = [table.0, style, *heads, *n_rot];
        }
        OpKind::StoreKv { key, value } => {
            c.inputs[0] = key.0;
            c.inputs[1] = value.0;
        }
        OpKind::Attention {
            query,
            heads,
            scale,
            window,
            soft_cap,
            out,
        } => {
            c.inputs[0] = query.0;
            c.outputs[0] = out.0;
            c.integers[0] = *heads;
            // A window or a cap of 0 would mean nothing, so that 0 can say "none".
            c.integers[1] = window.map_or(0, |w| w);
            c.floats[0] = *scale;
            c.floats[1] = soft_cap.map_or(0.0, |cap| cap);
        }
        OpKind::Activation { input, kind, out } => {
            c.inputs[0] = input.0;
            c.outputs[0] = out.0;
            c.integers[0] = match kind {
                ActivationKind::Silu => 0,
                ActivationKind::GeluTanh => 1,
            };
        }
        OpKind::Mul { a, b, out } | OpKind::Add { a, b, out } => {
            c.inputs[0] = a.0;
            c.inputs[1] = b.0;
            c.outputs[0] = out.0;
        }
        OpKind::Scale {
            input,
            factor: parameter,
            out,
        }
        | OpKind::SoftCap {
            input,
            cap: parameter,
            out,
        } => {
            c.inputs[0] = input.0;
            c.outputs[0] = out.0;
            c.floats[0] = *parameter;
        }
        OpKind::RouterTopK {
            logits,
            k,
            normalise,
            experts,
            weights,
        } => {
            c.inputs[0] = logits.0;
            c.outputs[0] = experts.0;
            c.outputs[1] = weights.0;
            c.integers = [*k, u32::from(*normalise), 0, 0];
        }
        OpKind::ExpertMatMul {
            input,
            experts,
            weight: w,
            out,
        } => {
            c.inputs[0] = input.0;
            c.inputs[1] = experts.0;
            c.outputs[0] = out.0;
            c.weights[0] = weight(*w);
        }
        OpKind::WeightedSum {
            input,
            experts,
            weights,
            out,
        } => {
            c.inputs = [input.0, experts.0, weights.0];
            c.outputs[0] = out.0;
        }
        // An operation that this interface has no form for: its number is unknown to every plugin, so that it is
        // refused in `prepare`.
        _ => c.op = u32::MAX,
    }
    c
}

fn encodings(bits: [u64; 4]) -> EncodingSet {
    Encoding::all()
        .filter(|e| e.is_float() || e.is_quantized())
        .filter(|e| {
            let n = encoding_number(*e) as usize;
            bits.get(n / 64).is_some_and(|word| word >> (n % 64) & 1 == 1)
        })
        .collect()
}

/// What a device says it is and wants, if its numbers make sense; else what is wrong with them.
pub(crate) fn backend_info(
    caps: &abi::Caps,
    name: &str,
    device: &str,
    device_name: &str,
    memory: MemoryInfo,
) -> Result<BackendInfo, String> {
    /// Nothing needs more, and sums of this many rows stay far from overflow.
    const MAX_SIDE_BYTES: u64 = 1 << 20;
    let numerics = match caps.numerics {
        0 => NumericsClass::Exact,
        1 => NumericsClass::Bounded,
        other => return Err(format!("its numerics class is {other}")),
    };
    let float_layout = match caps.float_layout {
        0 => FloatLayout::OutIn,
        1 => FloatLayout::InOut,
        other => return Err(format!("its float layout is {other}")),
    };
    let alignment = caps.weight_alignment.max(1);
    if !alignment.is_power_of_two() || alignment > MAX_SIDE_BYTES {
        return Err(format!(
            "its weight alignment is {alignment}, which is no power of two up to {MAX_SIDE_BYTES}"
        ));
    }
    for (what, n) in [
        ("bytes beside a row", caps.quantized_row_bytes),
        ("bytes beside a segment", caps.quantized_segment_bytes),
        ("bytes of an index entry", caps.index_entry_bytes),
    ] {
        if n > MAX_SIDE_BYTES {
            return Err(format!("its {what} are {n}, above {MAX_SIDE_BYTES}"));
        }
    }
    let (stored, computed) = (encodings(caps.stored), encodings(caps.computed));
    if let Some(e) = computed.iter().find(|e| !stored.contains(*e)) {
        return Err(format!("it computes with {e} and cannot hold it"));
    }
    Ok(BackendInfo {
        name: name.to_owned(),
        device: device.to_owned(),
        device_name: device_name.to_owned(),
        numerics,
        stored,
        computed,
        ops: OpName::all()
            .filter(|op| caps.ops >> op.id() & 1 == 1)
            .collect::<OpSet>(),
        float_layout,
        limits: Limits {
            max_weight_bytes: nonzero(caps.max_weight_bytes),
            max_row_bytes: nonzero(caps.max_row_bytes),
            max_batch_tokens: nonzero(caps.max_batch_tokens),
            max_sequences: nonzero(caps.max_sequences),
            max_context: nonzero(caps.max_context),
        },
        sizing: Sizing {
            weight_alignment: alignment,
            quantized_row_bytes: caps.quantized_row_bytes,
            quantized_segment_bytes: caps.quantized_segment_bytes,
            index_entry_bytes: caps.index_entry_bytes,
        },
        memory,
    })
}

fn nonzero<T: Default + PartialEq>(n: T) -> Option<T> {
    (n != T::default()).then_some(n)
}

/// A device's memory.
pub(crate) fn memory(device: &str, m: &abi::DeviceMemory) -> MemoryInfo {
    let [quantized, float, gamma, bias, index, kv, workspace] = m.resident;
    MemoryInfo {
        devices: vec![DeviceMemory {
            device: device.to_owned(),
            total: m.total,
            free: m.free,
            budget: nonzero(m.budget),
            resident: MemoryByClass {
                quantized,
                float,
                gamma,
                bias,
                index,
                kv,
                workspace,
            },
            mapped: m.imported,
        }],
    }
}
