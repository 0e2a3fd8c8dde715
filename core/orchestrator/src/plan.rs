use hoist_backend::{
    BackendInfo, Capacity, DecodeProgram, Encoding, FloatLayout, IndexLayout, LoadPlan, MemoryByClass,
    MemoryInfo, Outline, Role, Shape, Sizing, SourceView, ValueChange, WeightBackend, WeightClass, WeightId,
    WeightIndex, WeightPlan, WorkspaceBytes, WorkspaceDims,
};
use hoist_model::{ResolvedModel, ResolvedWeight};

/// Weights of a row that share one sidecar entry: [`Sizing::quantized_segment_bytes`].
const SEGMENT_WEIGHTS: u64 = 256;

/// Why a model gets no plan for a backend.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each variant's message names its fields")]
pub enum PlanError {
    /// The backend cannot hold this encoding.
    #[error(
        "weight `{weight}` is {encoding}, which backend `{backend}` cannot hold; it holds {}",
        stored.iter().map(|e| e.name()).collect::<Vec<_>>().join(", ")
    )]
    Encoding {
        weight: String,
        encoding: Encoding,
        backend: String,
        stored: Vec<Encoding>,
    },
    /// A size above a limit of the backend.
    #[error("{what} is {found}, and the limit of backend `{backend}` is {limit}")]
    Limit {
        what: String,
        backend: String,
        limit: u64,
        found: u64,
    },
    /// A sum or product of sizes does not fit 64 bits.
    #[error("{what} exceeds 2^64 bytes")]
    Overflow { what: String },
    /// A weight whose parts contradict each other; resolving should have refused it.
    #[error("weight `{weight}`: {what} should be {expected} and is {found}")]
    Inconsistent {
        weight: String,
        what: &'static str,
        expected: String,
        found: String,
    },
    /// The index or the workspace refused its dimensions.
    #[error(transparent)]
    Contract(#[from] hoist_backend::Error),
}

type Result<T, E = PlanError> = std::result::Result<T, E>;

/// Plans the load of a model on a backend; with a program and a capacity, keys, values and workspace too.
///
/// Pure: reads no file and asks no device. The workspace is what [`WorkspaceDims`] says; [`plan_for`] asks the backend for
/// its own figure.
///
/// # Errors
/// [`PlanError`]: an encoding or a size that the backend cannot hold, or sizes past 2^64.
pub fn plan(
    model: &ResolvedModel,
    info: &BackendInfo,
    decode: Option<(&DecodeProgram, Capacity)>,
) -> Result<LoadPlan> {
    let workspace = decode
        .map(|(program, capacity)| {
            let dims = workspace_dims(info, program, capacity)?;
            dims.kv_bytes()
                .zip(dims.value_bytes())
                .map(|(kv, workspace)| WorkspaceBytes { kv, workspace })
                .ok_or_else(|| PlanError::Overflow {
                    what: "the workspace".into(),
                })
        })
        .transpose()?;
    build(Parts::of(model), info, workspace.unwrap_or_default())
}

/// [`plan`], with the workspace that this open backend would take, scratch of its own included.
///
/// # Errors
/// As [`plan`].
pub fn plan_for(
    backend: &dyn WeightBackend,
    model: &ResolvedModel,
    decode: Option<(&DecodeProgram, Capacity)>,
) -> Result<LoadPlan> {
    with_workspace(backend.info(), model, decode, |dims| {
        backend.workspace_bytes(dims)
    })
}

/// [`plan_for`], for a device that is not there.
///
/// # Errors
/// As [`plan`].
pub fn plan_outlined(
    outline: &Outline,
    model: &ResolvedModel,
    decode: Option<(&DecodeProgram, Capacity)>,
) -> Result<LoadPlan> {
    with_workspace(&outline.info, model, decode, outline.workspace_bytes)
}

fn with_workspace(
    info: &BackendInfo,
    model: &ResolvedModel,
    decode: Option<(&DecodeProgram, Capacity)>,
    bytes: impl FnOnce(&WorkspaceDims) -> hoist_backend::Result<WorkspaceBytes>,
) -> Result<LoadPlan> {
    let workspace = decode
        .map(|(program, capacity)| {
            let dims = workspace_dims(info, program, capacity)?;
            Ok::<_, PlanError>(bytes(&dims)?)
        })
        .transpose()?;
    build(Parts::of(model), info, workspace.unwrap_or_default())
}

/// What a plan needs of a model.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a> {
    pub(crate) architecture: &'a str,
    pub(crate) layers: u32,
    pub(crate) weights: &'a [ResolvedWeight],
    pub(crate) index: &'a IndexLayout,
}

impl<'a> Parts<'a> {
    fn of(model: &'a ResolvedModel) -> Self {
        Self {
            architecture: model.architecture,
            layers: model.layers,
            weights: &model.weights,
            index: &model.index,
        }
    }
}

/// Dimensions of a workspace, within the backend's limits.
fn workspace_dims(info: &BackendInfo, program: &DecodeProgram, capacity: Capacity) -> Result<WorkspaceDims> {
    let limits = [
        ("the context", capacity.max_context, info.limits.max_context),
        (
            "the number of sequences",
            capacity.max_sequences,
            info.limits.max_sequences,
        ),
        (
            "the number of tokens in a batch",
            capacity.max_batch_tokens,
            info.limits.max_batch_tokens,
        ),
    ];
    for (what, found, limit) in limits {
        if let Some(limit) = limit.filter(|limit| found > *limit) {
            return Err(PlanError::Limit {
                what: what.into(),
                backend: info.name.clone(),
                limit: limit.into(),
                found: found.into(),
            });
        }
    }
    Ok(WorkspaceDims::new(program, capacity)?)
}

pub(crate) fn build(model: Parts<'_>, info: &BackendInfo, workspace: WorkspaceBytes) -> Result<LoadPlan> {
    if u32::try_from(model.weights.len()).is_err() {
        return Err(PlanError::Overflow {
            what: "the number of weights".into(),
        });
    }
    WeightIndex::new(model.index, model.weights.len())?;

    let mut weights = Vec::with_capacity(model.weights.len());
    let mut resident = MemoryByClass::default();
    let (mut nbytes, mut source_bytes) = (0u64, 0u64);
    for (id, weight) in (0..).map(WeightId).zip(model.weights) {
        let (planned, source) = plan_weight(id, weight, model.layers, info)?;
        let class = resident.class_mut(planned.class);
        *class = total(*class, planned.resident_bytes, "resident weights")?;
        nbytes = total(nbytes, planned.nbytes, "the weights")?;
        source_bytes = total(source_bytes, source, "the weights' source bytes")?;
        weights.push(planned);
    }
    // The table is dense: a row for the whole model and one for each layer.
    resident.index = (u64::from(model.layers) + 1)
        .checked_mul(Role::COUNT as u64)
        .and_then(|n| n.checked_mul(info.sizing.index_entry_bytes))
        .ok_or_else(|| PlanError::Overflow {
            what: "the index".into(),
        })?;
    resident.kv = workspace.kv;
    resident.workspace = workspace.workspace;
    // Reports add the classes up: make sure that they can.
    [
        resident.float,
        resident.gamma,
        resident.bias,
        resident.index,
        resident.kv,
        resident.workspace,
    ]
    .iter()
    .try_fold(resident.quantized, |sum, n| {
        total(sum, *n, "all that is resident")
    })?;
    Ok(LoadPlan {
        architecture: model.architecture.to_owned(),
        layers: model.layers,
        weights,
        resident,
        nbytes,
        source_bytes,
    })
}

fn total(sum: u64, more: u64, what: &str) -> Result<u64> {
    sum.checked_add(more)
        .ok_or_else(|| PlanError::Overflow { what: what.into() })
}

/// A weight's plan, and the source bytes that it reads.
fn plan_weight(
    id: WeightId,
    weight: &ResolvedWeight,
    layers: u32,
    info: &BackendInfo,
) -> Result<(WeightPlan, u64)> {
    let inconsistent = |what, expected: &dyn ToString, found: &dyn ToString| PlanError::Inconsistent {
        weight: weight.name.clone(),
        what,
        expected: expected.to_string(),
        found: found.to_string(),
    };
    let overflow = |what: &str| PlanError::Overflow {
        what: format!("{what} of `{}`", weight.name),
    };
    if !info.stored.contains(weight.encoding) {
        return Err(PlanError::Encoding {
            weight: weight.name.clone(),
            encoding: weight.encoding,
            backend: info.name.clone(),
            stored: info.stored.iter().collect(),
        });
    }
    let expected_class = match weight.class {
        WeightClass::Gamma | WeightClass::Bias => {
            if weight.encoding != Encoding::F32 {
                return Err(inconsistent(
                    "the encoding of a vector",
                    &Encoding::F32,
                    &weight.encoding,
                ));
            }
            weight.class
        }
        WeightClass::Quantized | WeightClass::Float => WeightClass::of_matrix(weight.encoding),
    };
    if weight.class != expected_class {
        return Err(inconsistent(
            "the class",
            &format!("{expected_class:?}"),
            &format!("{:?}", weight.class),
        ));
    }
    if let Some(layer) = weight.layer.filter(|l| *l >= layers) {
        return Err(inconsistent("the layer", &format!("below {layers}"), &layer));
    }

    let nbytes = weight.encoding.nbytes(weight.shape)?;
    if nbytes == 0 {
        return Err(inconsistent("the shape", &"without zeros", &weight.shape));
    }
    if let Some(broken) = info.limits.broken_by(weight.encoding, weight.shape, nbytes) {
        return Err(PlanError::Limit {
            what: format!("{} of weight `{}` in bytes", broken.what, weight.name),
            backend: info.name.clone(),
            limit: broken.limit,
            found: broken.found,
        });
    }
    let source_bytes = source_bytes(&weight.views).ok_or_else(|| overflow("the source views"))?;
    let expected = source_size(weight, nbytes).ok_or_else(|| {
        inconsistent(
            "the value change",
            &"to f32 from f32, f16 or bf16",
            &format!("{:?}", weight.change),
        )
    })?;
    if source_bytes != expected {
        return Err(inconsistent("the bytes of its views", &expected, &source_bytes));
    }

    let layout = if weight.matmul_only && weight.class == WeightClass::Float {
        info.float_layout
    } else {
        FloatLayout::OutIn
    };
    let resident_bytes = resident_bytes(weight.class, weight.shape, nbytes, &info.sizing)
        .ok_or_else(|| overflow("the resident size"))?;
    let planned = WeightPlan {
        id,
        name: weight.name.clone(),
        layer: weight.layer,
        role: weight.role,
        class: weight.class,
        encoding: weight.encoding,
        shape: weight.shape,
        nbytes,
        views: weight.views.clone(),
        change: weight.change,
        layout,
        resident_bytes,
    };
    Ok((planned, source_bytes))
}

fn source_bytes(views: &[SourceView]) -> Option<u64> {
    views.iter().try_fold(0u64, |sum, view| {
        sum.checked_add(view.rows.checked_mul(view.cols)?.checked_mul(view.unit)?)
    })
}

/// Source bytes that make `nbytes` canonical ones; `None` if the value change is not one to f32.
fn source_size(weight: &ResolvedWeight, nbytes: u64) -> Option<u64> {
    match weight.change {
        ValueChange::Keep => Some(nbytes),
        ValueChange::Widen { from } | ValueChange::WidenAddOne { from } => {
            (weight.encoding == Encoding::F32 && from.is_float()).then(|| nbytes / 4 * from.block_bytes())
        }
    }
}

/// Bytes on the device, as [`Sizing`] says: canonical bytes, what is kept beside each row and segment of a quantised
/// matrix, and padding up to the next weight. `None` past 2^64.
fn resident_bytes(class: WeightClass, shape: Shape, nbytes: u64, sizing: &Sizing) -> Option<u64> {
    let beside = if class == WeightClass::Quantized {
        let rows = shape.matrices.checked_mul(shape.rows)?;
        let segments = shape.cols.div_ceil(SEGMENT_WEIGHTS);
        let per_row = segments
            .checked_mul(sizing.quantized_segment_bytes)?
            .checked_add(sizing.quantized_row_bytes)?;
        rows.checked_mul(per_row)?
    } else {
        0
    };
    nbytes
        .checked_add(beside)?
        .checked_next_multiple_of(sizing.weight_alignment.max(1))
}

/// Whether a backend could use a weight where it stands in the file, if it imports mappings: its canonical bytes are one
/// run of the file, in the layout wanted, and float values are aligned.
pub fn is_importable(weight: &WeightPlan) -> bool {
    let [view] = weight.views.as_slice() else {
        return false;
    };
    let alignment = if weight.encoding.is_float() {
        weight.encoding.block_bytes()
    } else {
        1
    };
    weight.change == ValueChange::Keep
        && weight.layout == FloatLayout::OutIn
        && view
            .as_contiguous()
            .is_some_and(|(offset, _)| offset % alignment == 0)
}

/// Whether a plan fits a backend's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Bytes that the plan makes resident.
    pub needed: u64,
    /// Bytes that the backend may still take: what is free, or what is left of its budget if that is less.
    pub available: u64,
    /// Bytes that are missing; 0 if the plan fits.
    pub short_by: u64,
}

impl Fit {
    /// Whether nothing is missing.
    pub fn is_ok(self) -> bool {
        self.short_by == 0
    }
}

/// Bytes that a backend opened to import would map instead of owning them.
pub fn importable_bytes(plan: &LoadPlan) -> u64 {
    plan.weights
        .iter()
        .filter(|w| is_importable(w))
        .map(|w| w.nbytes)
        .fold(0, u64::saturating_add)
}

/// Compares a plan with memory, devices of a group taken together. `mapped` bytes of the plan are not owned: 0, or
/// [`importable_bytes`] for a backend opened to import.
pub fn fits(plan: &LoadPlan, mapped: u64, memory: &MemoryInfo) -> Fit {
    let available = memory
        .devices
        .iter()
        .map(|device| match device.budget {
            Some(budget) => device.free.min(budget.saturating_sub(device.resident.total())),
            None => device.free,
        })
        .fold(0, u64::saturating_add);
    let needed = plan.resident.total().saturating_sub(mapped);
    Fit {
        needed,
        available,
        short_by: needed.saturating_sub(available),
    }
}

#[cfg(test)]
mod tests {
    use hoist_backend::{DeviceMemory, EncodingSet};
    use proptest::prelude::*;

    use super::*;
    use crate::fake;

    fn weight(encoding: Encoding, shape: Shape) -> ResolvedWeight {
        let class = WeightClass::of_matrix(encoding);
        ResolvedWeight {
            name: "blk.0.attn_q.weight".into(),
            sources: vec!["blk.0.attn_q.weight".into()],
            layer: Some(0),
            role: Role::AttnQ,
            class,
            encoding,
            shape,
            views: vec![SourceView::contiguous(0, 0, encoding.nbytes(shape).unwrap_or(1))],
            change: ValueChange::Keep,
            matmul_only: true,
        }
    }

    fn plan(weights: Vec<ResolvedWeight>, info: &BackendInfo) -> Result<LoadPlan> {
        let index = fake::index(1, &weights);
        plan_with(&weights, &index, info)
    }

    fn plan_with(weights: &[ResolvedWeight], index: &IndexLayout, info: &BackendInfo) -> Result<LoadPlan> {
        let parts = Parts {
            architecture: "llama",
            layers: 1,
            weights,
            index,
        };
        build(parts, info, WorkspaceBytes::default())
    }

    #[test]
    fn resident_bytes_count_sidecars_and_padding() {
        let mut info = fake::info();
        info.sizing = Sizing {
            weight_alignment: 64,
            quantized_row_bytes: 2,
            quantized_segment_bytes: 1,
            index_entry_bytes: 8,
        };
        // 3 rows of 288 weights: 9 blocks of 18 bytes each, 2 segments and one row entry beside each.
        let plan = plan(vec![weight(Encoding::Q4_0, Shape::matrix(3, 288))], &info).unwrap();
        assert_eq!(plan.nbytes, 3 * 9 * 18);
        assert_eq!(
            plan.resident.quantized,
            (3 * 9 * 18 + 3 * 4u64).next_multiple_of(64)
        );
        assert_eq!(plan.resident.index, 2 * Role::COUNT as u64 * 8);
        assert_eq!(
            plan.resident.total(),
            plan.resident.quantized + plan.resident.index
        );
    }

    #[test]
    fn only_float_matmul_weights_are_asked_for_transposed() {
        let mut info = fake::info();
        info.float_layout = FloatLayout::InOut;
        let matmul = weight(Encoding::F32, Shape::matrix(4, 8));
        let mut embedding = matmul.clone();
        embedding.matmul_only = false;
        let quantized = weight(Encoding::Q8_0, Shape::matrix(4, 32));
        let plan = plan(vec![matmul, embedding, quantized], &info).unwrap();
        let layouts: Vec<_> = plan.weights.iter().map(|w| w.layout).collect();
        assert_eq!(
            layouts,
            [FloatLayout::InOut, FloatLayout::OutIn, FloatLayout::OutIn]
        );
    }

    #[test]
    fn an_encoding_the_backend_cannot_hold_is_named_with_its_weight() {
        let mut info = fake::info();
        info.stored = [Encoding::F32].into_iter().collect::<EncodingSet>();
        let refused = plan(vec![weight(Encoding::Q4_K, Shape::matrix(2, 256))], &info);
        assert_eq!(
            refused.unwrap_err().to_string(),
            "weight `blk.0.attn_q.weight` is q4_k, which backend `fake` cannot hold; it holds f32"
        );
        info.stored = [Encoding::Q4_K].into_iter().collect();
        plan(vec![weight(Encoding::Q4_K, Shape::matrix(2, 256))], &info).unwrap();
    }

    #[test]
    fn sizes_past_64_bits_are_errors() {
        let huge = weight(Encoding::F32, Shape::matrix(1 << 40, 1 << 40));
        assert!(plan(vec![huge], &fake::info()).is_err());
        // Each fits, their sum does not.
        let half = weight(Encoding::F32, Shape::matrix(1 << 31, 1 << 30));
        let sum = plan(
            vec![half.clone(), half.clone(), half.clone(), half.clone()],
            &fake::info(),
        );
        assert!(
            matches!(sum, Err(PlanError::Overflow { .. })),
            "{:?}",
            sum.map(|p| p.nbytes)
        );
        plan(vec![half], &fake::info()).unwrap();
    }

    #[test]
    fn views_that_yield_other_than_the_weight_are_refused() {
        let mut short = weight(Encoding::F16, Shape::matrix(4, 4));
        short.views[0].unit -= 2;
        assert!(matches!(
            plan(vec![short], &fake::info()),
            Err(PlanError::Inconsistent { .. })
        ));
    }

    #[test]
    fn a_limit_of_the_backend_is_enforced() {
        let mut info = fake::info();
        info.limits.max_weight_bytes = Some(63);
        let w = weight(Encoding::F32, Shape::matrix(4, 4));
        assert!(matches!(
            plan(vec![w.clone()], &info),
            Err(PlanError::Limit {
                limit: 63,
                found: 64,
                ..
            })
        ));
        info.limits.max_weight_bytes = Some(64);
        plan(vec![w.clone()], &info).unwrap();
        info.limits.max_row_bytes = Some(15);
        let refused = plan(vec![w.clone()], &info).unwrap_err().to_string();
        assert!(refused.contains("a row of weight"), "{refused}");
        assert!(
            refused.contains(" is 16") && refused.contains(" is 15"),
            "{refused}"
        );
        info.limits.max_row_bytes = Some(16);
        plan(vec![w], &info).unwrap();
    }

    #[test]
    fn an_index_that_names_a_missing_weight_gets_no_plan() {
        let weights = [weight(Encoding::F32, Shape::matrix(4, 4))];
        let mut index = fake::index(1, &weights);
        plan_with(&weights, &index, &fake::info()).unwrap();
        index.entries[0].slot = hoist_backend::Slot::Present(WeightId(1));
        assert!(matches!(
            plan_with(&weights, &index, &fake::info()),
            Err(PlanError::Contract(_))
        ));
    }

    #[test]
    fn a_fit_says_how_much_is_missing() {
        let plan = plan(vec![weight(Encoding::F32, Shape::matrix(4, 4))], &fake::info()).unwrap();
        let needed = plan.resident.total();
        let memory = |free, budget| MemoryInfo {
            devices: vec![DeviceMemory {
                device: "fake".into(),
                total: 1 << 30,
                free,
                budget,
                resident: MemoryByClass::default(),
                mapped: 0,
            }],
        };
        assert!(fits(&plan, 0, &memory(needed, None)).is_ok());
        assert_eq!(fits(&plan, 0, &memory(needed - 1, None)).short_by, 1);
        assert_eq!(fits(&plan, 0, &memory(u64::MAX, Some(needed - 3))).short_by, 3);
        assert_eq!(fits(&plan, 0, &memory(5, Some(needed))).available, 5);
    }

    proptest! {
        #[test]
        fn totals_are_the_sums_of_their_parts(
            shapes in prop::collection::vec((1u64..5, 1u64..40, 1u64..9, 0usize..37), 1..20),
            alignment in 0u32..9,
            row in 0u64..9,
            segment in 0u64..5,
        ) {
            let mut info = fake::info();
            info.sizing = Sizing {
                weight_alignment: 1 << alignment,
                quantized_row_bytes: row,
                quantized_segment_bytes: segment,
                index_entry_bytes: 16,
            };
            let encodings: Vec<_> = EncodingSet::weights().iter().collect();
            let weights: Vec<_> = shapes
                .iter()
                .map(|&(matrices, rows, blocks, e)| {
                    let encoding = encodings[e % encodings.len()];
                    let cols = blocks * encoding.block_weights();
                    weight(encoding, Shape { matrices, rows, cols })
                })
                .collect();
            let plan = plan(weights, &info).unwrap();
            let by_class = |class| -> u64 {
                plan.weights.iter().filter(|w| w.class == class).map(|w| w.resident_bytes).sum()
            };
            prop_assert_eq!(plan.resident.quantized, by_class(WeightClass::Quantized));
            prop_assert_eq!(plan.resident.float, by_class(WeightClass::Float));
            prop_assert_eq!(plan.nbytes, plan.weights.iter().map(|w| w.nbytes).sum::<u64>());
            prop_assert_eq!(plan.source_bytes, plan.nbytes);
            for w in &plan.weights {
                prop_assert!(w.resident_bytes >= w.nbytes);
                prop_assert_eq!(w.resident_bytes % info.sizing.weight_alignment, 0);
            }
        }
    }
}
