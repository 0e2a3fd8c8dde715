use hoist_backend::{
    DecodeProgram, Encoding, KvSpec, Op, OpKind, Role, Table, TableId, ValueId, ValueKind, ValueSpec,
    WeightIndex, WeightRef,
};

use crate::{Error, ResolvedModel, Result};

/// Most input columns of a quantised matrix: `docs/numerics.md` §1.
const MAX_QUANTIZED_COLUMNS: u64 = 131_072;

/// Writes a program down, operation by operation.
///
/// Values are named: asking twice for one name gives one buffer, so that all layers share theirs.
pub(super) struct Builder<'m> {
    model: &'m ResolvedModel,
    index: WeightIndex,
    /// The layer that operations are tagged with.
    layer: Option<u32>,
    values: Vec<ValueSpec>,
    ops: Vec<Op>,
    tables: Vec<Table>,
    /// Values whose quantised form is at hand: (value, quantised, vectors).
    quantised: Vec<(ValueId, ValueId, u32)>,
}

impl<'m> Builder<'m> {
    pub(super) fn new(model: &'m ResolvedModel) -> Result<Self> {
        Ok(Self {
            model,
            index: WeightIndex::new(&model.index, model.weights.len()).map_err(Error::Index)?,
            layer: None,
            values: Vec::new(),
            ops: Vec::new(),
            tables: Vec::new(),
            quantised: Vec::new(),
        })
    }

    /// Operations from here on belong to that layer.
    pub(super) fn enter(&mut self, layer: Option<u32>) {
        self.layer = layer;
    }

    /// The f32 value of that name.
    pub(super) fn f32(&mut self, name: &str, width: u64) -> Result<ValueId> {
        self.value(name, width, ValueKind::F32)
    }

    pub(super) fn value(&mut self, name: &str, width: u64, kind: ValueKind) -> Result<ValueId> {
        let width = narrow(|| format!("the width of `{name}`"), width)?;
        let known = self
            .values
            .iter()
            .position(|v| v.name == name && v.width == width && v.kind == kind);
        let at = known.unwrap_or_else(|| {
            self.values.push(ValueSpec {
                name: name.into(),
                width,
                kind,
            });
            self.values.len() - 1
        });
        Ok(ValueId(narrow(|| "the number of values".into(), at as u64)?))
    }

    pub(super) fn table(&mut self, table: Table) -> Result<TableId> {
        self.tables.push(table);
        let id = self.tables.len() as u64 - 1;
        Ok(TableId(narrow(|| "the number of tables".into(), id)?))
    }

    pub(super) fn op(&mut self, kind: OpKind) {
        let written = written(&kind);
        self.quantised
            .retain(|(value, out, _)| !written.contains(&Some(*value)) && !written.contains(&Some(*out)));
        self.ops.push(Op {
            layer: self.layer,
            kind,
        });
    }

    /// The role in the layer at hand.
    pub(super) fn weight(&self, role: Role) -> WeightRef {
        WeightRef {
            layer: self.layer,
            role,
        }
    }

    /// The role in the layer at hand, if the file has it.
    pub(super) fn optional(&self, role: Role) -> Option<WeightRef> {
        self.index.lookup(self.layer, role).map(|_| self.weight(role))
    }

    fn is_quantized(&self, weight: WeightRef) -> Result<bool> {
        let found = self
            .index
            .lookup(weight.layer, weight.role)
            .and_then(|id| self.model.weights.get(id.index()))
            .ok_or_else(|| Error::MissingRole {
                role: weight.role,
                layer: weight.layer,
                architecture: self.model.architecture,
                tried: Vec::new(),
            })?;
        let cols = found.shape.cols;
        let quantized = found.encoding.is_quantized();
        if quantized && (!cols.is_multiple_of(32) || cols > MAX_QUANTIZED_COLUMNS) {
            return Err(Error::QuantizedColumns {
                role: weight.role,
                layer: weight.layer,
                found: cols,
            });
        }
        debug_assert!(found.encoding != Encoding::F64, "resolve refuses such weights");
        Ok(quantized)
    }

    fn width(&self, value: ValueId) -> u64 {
        self.values.get(value.0 as usize).map_or(0, |v| v.width.into())
    }

    /// For each of some weights that multiply one input: the value it reads. The input is quantised if any weight is, once
    /// as long as it does not change; float weights read it as it is.
    fn inputs(&mut self, input: ValueId, vectors: u32, weights: &[WeightRef]) -> Result<Vec<ValueId>> {
        let quantized = weights
            .iter()
            .map(|w| self.is_quantized(*w))
            .collect::<Result<Vec<bool>>>()?;
        let mut rounded = self
            .quantised
            .iter()
            .find(|(value, _, n)| *value == input && *n == vectors)
            .map(|(_, out, _)| *out);
        if quantized.contains(&true) && rounded.is_none() {
            let name = self
                .values
                .get(input.0 as usize)
                .map(|v| format!("{}.quantised", v.name))
                .unwrap_or_default();
            let out = self.value(&name, self.width(input), ValueKind::Quantized { vectors })?;
            self.op(OpKind::Quantise { input, out });
            self.quantised.push((input, out, vectors));
            rounded = Some(out);
        }
        Ok(quantized
            .into_iter()
            .map(|q| rounded.filter(|_| q).unwrap_or(input))
            .collect())
    }

    /// `out = weight · input + bias` for each (weight, bias, out).
    pub(super) fn matmuls(
        &mut self,
        input: ValueId,
        outputs: &[(Role, Option<Role>, ValueId)],
    ) -> Result<()> {
        let weights: Vec<WeightRef> = outputs.iter().map(|(role, ..)| self.weight(*role)).collect();
        let inputs = self.inputs(input, 1, &weights)?;
        for ((weight, input), (_, bias, out)) in weights.into_iter().zip(inputs).zip(outputs) {
            self.op(OpKind::MatMul {
                input,
                weight,
                bias: bias.and_then(|role| self.optional(role)),
                out: *out,
            });
        }
        Ok(())
    }

    /// `out[s] = weight[experts[s]] · input[s]` for each (weight, out); the input holds `vectors` vectors.
    pub(super) fn expert_matmuls(
        &mut self,
        input: ValueId,
        vectors: u32,
        experts: ValueId,
        outputs: &[(Role, ValueId)],
    ) -> Result<()> {
        let weights: Vec<WeightRef> = outputs.iter().map(|(role, _)| self.weight(*role)).collect();
        let inputs = self.inputs(input, vectors, &weights)?;
        for ((weight, input), (_, out)) in weights.into_iter().zip(inputs).zip(outputs) {
            self.op(OpKind::ExpertMatMul {
                input,
                experts,
                weight,
                out: *out,
            });
        }
        Ok(())
    }

    /// The output matrix: `out` holds the logits.
    pub(super) fn logits(&mut self, input: ValueId, out: ValueId) -> Result<()> {
        let weight = self.weight(Role::Output);
        let inputs = self.inputs(input, 1, &[weight])?;
        let bias = self.optional(Role::OutputBias);
        self.op(OpKind::Logits {
            input: inputs.first().copied().unwrap_or(input),
            weight,
            bias,
            out,
        });
        Ok(())
    }

    /// Closes the program.
    pub(super) fn finish(self, max_context: u32, logits: ValueId) -> DecodeProgram {
        let hyper = &self.model.hyper;
        let tail = self
            .ops
            .iter()
            .rposition(|op| matches!(op.kind, OpKind::StoreKv { .. }))
            .map_or(0, |at| at + 1);
        let kv = KvSpec {
            kv_heads: hyper.kv_heads,
            head_dim: hyper.head_dim,
        };
        DecodeProgram {
            vocab: hyper.vocab,
            max_context,
            kv: vec![kv; hyper.layers as usize],
            values: self.values,
            ops: self.ops,
            tail,
            tables: self.tables,
            logits,
        }
    }
}

/// Narrows a dimension to the program's 32 bits.
pub(super) fn narrow(what: impl FnOnce() -> String, n: u64) -> Result<u32> {
    u32::try_from(n).map_err(|_| Error::TooLarge {
        what: what(),
        found: n,
        limit: u32::MAX.into(),
    })
}

/// The values that an operation writes.
fn written(kind: &OpKind) -> [Option<ValueId>; 2] {
    match *kind {
        OpKind::Embed { out, .. }
        | OpKind::EmbedPosition { out, .. }
        | OpKind::RmsNorm { out, .. }
        | OpKind::LayerNorm { out, .. }
        | OpKind::Quantise { out, .. }
        | OpKind::MatMul { out, .. }
        | OpKind::Attention { out, .. }
        | OpKind::Activation { out, .. }
        | OpKind::Mul { out, .. }
        | OpKind::Add { out, .. }
        | OpKind::Scale { out, .. }
        | OpKind::SoftCap { out, .. }
        | OpKind::ExpertMatMul { out, .. }
        | OpKind::WeightedSum { out, .. }
        | OpKind::Logits { out, .. } => [Some(out), None],
        OpKind::Rope { value, .. } => [Some(value), None],
        OpKind::RouterTopK { experts, weights, .. } => [Some(experts), Some(weights)],
        // What else there may be is not written by this builder.
        _ => [None, None],
    }
}
