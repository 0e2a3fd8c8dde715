use std::cell::Cell;
use std::collections::HashSet;

use hoist_backend::{DecodeProgram, OpKind, Shape, TableId, ValueId, ValueKind, WeightIndex, WeightRef};

use crate::{Error, ResolvedModel, ResolvedWeight, Result};

/// Checks that a program makes sense for a model: every value is written before it is read and read before it is written
/// again, every width fits its weights,
/// quantised weights read quantised values that are up to date, outputs alias only what they may, tables and caches have the
/// sizes used, and no weight is there for nothing.
///
/// # Errors
/// [`Error::InvalidProgram`] with the first operation that does not; [`Error::Index`].
pub fn validate_program(program: &DecodeProgram, model: &ResolvedModel) -> Result<()> {
    let mut checker = Checker {
        program,
        model,
        index: WeightIndex::new(&model.index, model.weights.len()).map_err(Error::Index)?,
        versions: vec![0; program.values.len()],
        quantised_from: vec![None; program.values.len()],
        unread: vec![Cell::new(false); program.values.len()],
        at: 0,
    };
    for at in 0..program.ops.len() {
        checker.at = at;
        checker.op()?;
    }
    checker.at = program.ops.len();
    checker.whole()
}

struct Checker<'a> {
    program: &'a DecodeProgram,
    model: &'a ResolvedModel,
    index: WeightIndex,
    /// How often each value has been written.
    versions: Vec<u64>,
    /// For each quantised value, which version of which value it was made from.
    quantised_from: Vec<Option<(ValueId, u64)>>,
    /// Whether each value's last version still waits for its first reader.
    unread: Vec<Cell<bool>>,
    at: usize,
}

impl<'a> Checker<'a> {
    fn fail<T>(&self, reason: impl Into<String>) -> Result<T> {
        Err(Error::InvalidProgram {
            op: self.at,
            reason: reason.into(),
        })
    }

    fn same(&self, what: &str, expected: u64, found: u64) -> Result<()> {
        if expected == found {
            return Ok(());
        }
        self.fail(format!("{what} is {found}, expected {expected}"))
    }

    /// A value that has been written, as (kind, width).
    fn read(&self, id: ValueId) -> Result<(ValueKind, u64)> {
        let Some(value) = self.program.value(id) else {
            return self.fail(format!("there is no value {}", id.0));
        };
        if self.version(id) == 0 {
            return self.fail(format!("`{}` is read before it is written", value.name));
        }
        if let Some((source, version)) = self.quantised_from.get(id.0 as usize).copied().flatten()
            && self.version(source) != version
        {
            return self.fail(format!(
                "`{}` is read after what it was made from has changed",
                value.name
            ));
        }
        if let Some(unread) = self.unread.get(id.0 as usize) {
            unread.set(false);
        }
        Ok((value.kind, value.width.into()))
    }

    /// The width of an f32 value that has been written.
    fn read_f32(&self, id: ValueId) -> Result<u64> {
        match self.read(id)? {
            (ValueKind::F32, width) => Ok(width),
            (kind, _) => self.fail(format!("value {} is {kind:?}, expected F32", id.0)),
        }
    }

    /// Marks a value of that kind as written; returns its width.
    fn write(&mut self, id: ValueId, kind: ValueKind, inputs: &[ValueId]) -> Result<u64> {
        let Some(value) = self.program.value(id) else {
            return self.fail(format!("there is no value {}", id.0));
        };
        if value.kind != kind {
            return self.fail(format!("`{}` is {:?}, expected {kind:?}", value.name, value.kind));
        }
        if inputs.contains(&id) {
            return self.fail(format!("`{}` is written while it is read", value.name));
        }
        if self.unread.get(id.0 as usize).is_some_and(Cell::get) {
            return self.fail(format!("`{}` is written again before it is read", value.name));
        }
        let width = value.width.into();
        self.changed(id);
        Ok(width)
    }

    fn version(&self, id: ValueId) -> u64 {
        self.versions.get(id.0 as usize).copied().unwrap_or(0)
    }

    fn changed(&mut self, id: ValueId) {
        if let Some(version) = self.versions.get_mut(id.0 as usize) {
            *version += 1;
        }
        if let Some(unread) = self.unread.get(id.0 as usize) {
            unread.set(true);
        }
    }

    fn write_f32(&mut self, id: ValueId, width: u64, inputs: &[ValueId]) -> Result<()> {
        let found = self.write(id, ValueKind::F32, inputs)?;
        self.same("the output's width", width, found)
    }

    fn weight(&self, weight: WeightRef) -> Result<&'a ResolvedWeight> {
        match self
            .index
            .lookup(weight.layer, weight.role)
            .and_then(|id| self.model.weights.get(id.index()))
        {
            Some(found) => Ok(found),
            None => self.fail(format!(
                "{} of layer {:?} is not there",
                weight.role, weight.layer
            )),
        }
    }

    fn vector(&self, weight: WeightRef, n: u64) -> Result<()> {
        let shape = self.weight(weight)?.shape;
        if shape == Shape::vector(n) {
            return Ok(());
        }
        self.fail(format!("{} is {shape}, expected [{n}]", weight.role))
    }

    fn table(&self, id: TableId, n_rot: u32) -> Result<()> {
        let Some(table) = self.program.table(id) else {
            return self.fail(format!("there is no table {}", id.0));
        };
        self.same(
            "the table's positions",
            self.program.max_context.into(),
            table.rows.into(),
        )?;
        self.same("the table's columns", n_rot.into(), table.cols.into())?;
        let cells = u64::from(table.rows) * u64::from(table.cols);
        self.same("the table's number of values", cells, table.data.len() as u64)
    }

    /// The width that a matrix yields from that input, once they fit.
    fn matmul(&self, input: ValueId, weight: WeightRef, bias: Option<WeightRef>) -> Result<u64> {
        let found = self.weight(weight)?;
        let (kind, width) = self.read(input)?;
        let expected = if found.encoding.is_quantized() {
            ValueKind::Quantized { vectors: 1 }
        } else {
            ValueKind::F32
        };
        if kind != expected {
            return self.fail(format!(
                "{} is {} and reads {kind:?}, expected {expected:?}",
                weight.role, found.encoding
            ));
        }
        self.same("the input's width", found.shape.cols, width)?;
        self.same("the number of matrices", 1, found.shape.matrices)?;
        if let Some(bias) = bias {
            self.vector(bias, found.shape.rows)?;
        }
        Ok(found.shape.rows)
    }

    fn op(&mut self) -> Result<()> {
        let Some(op) = self.program.ops.get(self.at) else {
            return Ok(());
        };
        if op.layer.is_some_and(|layer| layer >= self.model.layers) {
            return self.fail("its layer is out of range");
        }
        let kv = op.layer.and_then(|layer| self.program.kv.get(layer as usize));
        match op.kind {
            OpKind::Embed { weight, out } => {
                let shape = self.weight(weight)?.shape;
                self.same("the embedding's rows", self.program.vocab.into(), shape.rows)?;
                self.write_f32(out, shape.cols, &[])
            }
            OpKind::EmbedPosition { weight, out } => {
                let shape = self.weight(weight)?.shape;
                if shape.rows < self.program.max_context.into() {
                    return self.fail("it has fewer positions than the context");
                }
                self.write_f32(out, shape.cols, &[])
            }
            OpKind::RmsNorm {
                input,
                weight,
                rows,
                out,
                ..
            } => {
                let width = self.read_f32(input)?;
                if rows == 0 || !width.is_multiple_of(rows.into()) {
                    return self.fail(format!("a width of {width} is no multiple of {rows} rows"));
                }
                self.vector(weight, width / u64::from(rows))?;
                self.write_f32(out, width, &[input])
            }
            OpKind::LayerNorm {
                input,
                weight,
                bias,
                out,
                ..
            } => {
                let width = self.read_f32(input)?;
                self.vector(weight, width)?;
                self.vector(bias, width)?;
                self.write_f32(out, width, &[input])
            }
            OpKind::Quantise { input, out } => {
                let width = self.read_f32(input)?;
                let Some(ValueKind::Quantized { vectors }) = self.program.value(out).map(|v| v.kind) else {
                    return self.fail("its output is not quantised");
                };
                if vectors == 0 || !width.is_multiple_of(u64::from(vectors) * 32) {
                    return self.fail(format!(
                        "a width of {width} is not {vectors} vectors of blocks of 32"
                    ));
                }
                let found = self.write(out, ValueKind::Quantized { vectors }, &[input])?;
                let from = (input, self.version(input));
                if let Some(slot) = self.quantised_from.get_mut(out.0 as usize) {
                    *slot = Some(from);
                }
                self.same("the output's width", width, found)
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
                let rows = self.matmul(input, weight, bias)?;
                self.write_f32(out, rows, &[input])
            }
            OpKind::Rope {
                value,
                table,
                heads,
                n_rot,
                ..
            } => {
                let width = self.read_f32(value)?;
                self.table(table, n_rot)?;
                let head_dim = self.model.hyper.head_dim;
                self.same("the value's width", u64::from(heads) * u64::from(head_dim), width)?;
                if n_rot > head_dim {
                    return self.fail("it turns more than a head");
                }
                self.changed(value);
                Ok(())
            }
            OpKind::StoreKv { key, value } => {
                let Some(kv) = kv else {
                    return self.fail("its layer has no cache");
                };
                let width = u64::from(kv.kv_heads) * u64::from(kv.head_dim);
                let key = self.read_f32(key)?;
                self.same("the key's width", width, key)?;
                let value = self.read_f32(value)?;
                self.same("the value's width", width, value)
            }
            OpKind::Attention {
                query, heads, out, ..
            } => {
                let Some(kv) = kv else {
                    return self.fail("its layer has no cache");
                };
                let width = self.read_f32(query)?;
                self.same(
                    "the query's width",
                    u64::from(heads) * u64::from(kv.head_dim),
                    width,
                )?;
                if !heads.is_multiple_of(kv.kv_heads) {
                    return self.fail("its heads are no multiple of the cache's");
                }
                self.write_f32(out, width, &[query])
            }
            OpKind::Activation { input, out, .. }
            | OpKind::Scale { input, out, .. }
            | OpKind::SoftCap { input, out, .. } => {
                let width = self.read_f32(input)?;
                self.write_f32(out, width, &[input])
            }
            OpKind::Mul { a, b, out } => {
                let width = self.read_f32(a)?;
                let other = self.read_f32(b)?;
                self.same("the second factor's width", width, other)?;
                self.write_f32(out, width, &[a, b])
            }
            OpKind::Add { a, b, out } => {
                let width = self.read_f32(a)?;
                let other = self.read_f32(b)?;
                self.same("the second summand's width", width, other)?;
                self.write_f32(out, width, &[])
            }
            OpKind::RouterTopK {
                logits,
                k,
                experts,
                weights,
                ..
            } => {
                let count = self.read_f32(logits)?;
                if k == 0 || u64::from(k) > count {
                    return self.fail(format!("it chooses {k} of {count}"));
                }
                let chosen = self.write(experts, ValueKind::Experts, &[])?;
                self.same("the experts' width", k.into(), chosen)?;
                self.write_f32(weights, k.into(), &[logits])
            }
            OpKind::ExpertMatMul {
                input,
                experts,
                weight,
                out,
            } => {
                let slots = self.experts(experts)?;
                let found = self.weight(weight)?;
                let (kind, width) = self.read(input)?;
                let vectors = width / found.shape.cols.max(1);
                if vectors * found.shape.cols != width || !(vectors == 1 || vectors == slots) {
                    return self.fail(format!(
                        "a width of {width} is neither 1 nor {slots} vectors of {}",
                        found.shape.cols
                    ));
                }
                let expected = if found.encoding.is_quantized() {
                    ValueKind::Quantized {
                        vectors: u32::try_from(vectors).unwrap_or(u32::MAX),
                    }
                } else {
                    ValueKind::F32
                };
                if kind != expected {
                    return self.fail(format!("it reads {kind:?}, expected {expected:?}"));
                }
                self.write_f32(out, slots * found.shape.rows, &[input])
            }
            OpKind::WeightedSum {
                input,
                experts,
                weights,
                out,
            } => {
                let slots = self.experts(experts)?;
                let given = self.read_f32(weights)?;
                self.same("the number of weights", slots, given)?;
                let width = self.read_f32(input)?;
                if !width.is_multiple_of(slots) {
                    return self.fail(format!("a width of {width} is no multiple of {slots}"));
                }
                self.write_f32(out, width / slots, &[input, weights])
            }
            ref other => self.fail(format!("{} is unknown to this version", other.name())),
        }
    }

    /// How many experts a token uses.
    fn experts(&self, id: ValueId) -> Result<u64> {
        match self.read(id)? {
            (ValueKind::Experts, width) if width > 0 => Ok(width),
            (kind, width) => self.fail(format!("value {} is {kind:?} of {width}, expected Experts", id.0)),
        }
    }

    fn whole(&self) -> Result<()> {
        let program = self.program;
        let logits = self.read_f32(program.logits)?;
        self.same("the width of the logits", program.vocab.into(), logits)?;
        if let Some((value, _)) = program
            .values
            .iter()
            .zip(&self.unread)
            .find(|(_, unread)| unread.get())
        {
            return self.fail(format!("`{}` is written and never read", value.name));
        }
        self.same(
            "the number of caches",
            self.model.layers.into(),
            program.kv.len() as u64,
        )?;
        let stores = |op: &hoist_backend::Op| matches!(op.kind, OpKind::StoreKv { .. });
        let tail = program.ops.iter().rposition(stores).map_or(0, |at| at + 1);
        self.same("the start of the tail", tail as u64, program.tail as u64)?;
        let mut stores_of = vec![0u64; program.kv.len()];
        let mut read = HashSet::new();
        for op in &program.ops {
            if let Some(count) = op
                .layer
                .and_then(|l| stores_of.get_mut(l as usize))
                .filter(|_| stores(op))
            {
                *count += 1;
            }
            read.extend(weights_of(&op.kind).into_iter().flatten());
        }
        for (layer, count) in stores_of.into_iter().enumerate() {
            self.same(&format!("the number of stores of layer {layer}"), 1, count)?;
        }
        // A present weight that no operation reads would be resident for nothing.
        for entry in self
            .model
            .index
            .entries
            .iter()
            .filter(|e| e.slot.weight().is_some())
        {
            let weight = WeightRef {
                layer: entry.layer,
                role: entry.role,
            };
            if !read.contains(&weight) {
                return self.fail(format!("{} of layer {:?} is never read", entry.role, entry.layer));
            }
        }
        Ok(())
    }
}

/// The weights that an operation reads.
fn weights_of(op: &OpKind) -> [Option<WeightRef>; 2] {
    match *op {
        OpKind::Embed { weight, .. }
        | OpKind::EmbedPosition { weight, .. }
        | OpKind::RmsNorm { weight, .. }
        | OpKind::ExpertMatMul { weight, .. } => [Some(weight), None],
        OpKind::LayerNorm { weight, bias, .. } => [Some(weight), Some(bias)],
        OpKind::MatMul { weight, bias, .. } | OpKind::Logits { weight, bias, .. } => [Some(weight), bias],
        _ => [None, None],
    }
}
