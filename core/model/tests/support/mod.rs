//! A plain f64 interpreter of decode programs over float weights, for comparing architectures with other engines.

use hoist_backend::{
    ActivationKind, DecodeProgram, Encoding, OpKind, RopeStyle, ValueId, ValueKind, WeightIndex, WeightRef,
};
use hoist_formats::Manifest;
use hoist_model::{ResolvedModel, ResolvedWeight};

/// Canonical bytes of a weight, from its views and value change.
pub(crate) fn canonical(manifest: &Manifest, weight: &ResolvedWeight) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut source = Vec::new();
    for view in &weight.views {
        let file = manifest.shards[view.file as usize].source.file.as_ref().unwrap();
        for r in 0..view.rows {
            for c in 0..view.cols {
                let mut unit = vec![0; view.unit as usize];
                file.read_exact_at(&mut unit, view.offset + r * view.row_stride + c * view.col_stride)
                    .unwrap();
                source.extend(unit);
            }
        }
    }
    match weight.change {
        hoist_backend::ValueChange::Keep => source,
        hoist_backend::ValueChange::Widen { from } => widen(&source, from, 0.0),
        hoist_backend::ValueChange::WidenAddOne { from } => widen(&source, from, 1.0),
    }
}

fn widen(source: &[u8], from: Encoding, add: f32) -> Vec<u8> {
    assert_eq!(from, Encoding::F32, "the tiny models are f32");
    floats(source)
        .iter()
        .flat_map(|x| (x + add).to_le_bytes())
        .collect()
}

pub(crate) fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect()
}

/// Runs programs over f32 weights, one token after the other, in f64.
pub(crate) struct Interpreter<'a> {
    program: &'a DecodeProgram,
    model: &'a ResolvedModel,
    index: WeightIndex,
    weights: Vec<Vec<f64>>,
    values: Vec<Vec<f64>>,
    /// Keys and values of each layer, position by position.
    cache: Vec<Vec<(Vec<f64>, Vec<f64>)>>,
}

impl<'a> Interpreter<'a> {
    pub(crate) fn new(manifest: &Manifest, model: &'a ResolvedModel, program: &'a DecodeProgram) -> Self {
        let weights = model
            .weights
            .iter()
            .map(|w| {
                assert_eq!(w.encoding, Encoding::F32, "{}", w.name);
                let values = floats(&canonical(manifest, w));
                assert_eq!(Some(values.len() as u64), w.shape.elements(), "{}", w.name);
                values.into_iter().map(f64::from).collect()
            })
            .collect();
        Self {
            program,
            model,
            index: WeightIndex::new(&model.index, model.weights.len()).unwrap(),
            weights,
            values: program
                .values
                .iter()
                .map(|v| vec![f64::NAN; v.width as usize])
                .collect(),
            cache: vec![Vec::new(); model.layers as usize],
        }
    }

    /// Appends a token; returns its logits.
    pub(crate) fn step(&mut self, token: u32, position: usize) -> Vec<f64> {
        for op in &self.program.ops {
            let layer = op.layer.map(|l| l as usize);
            self.run(&op.kind, layer, token as usize, position);
        }
        self.get(self.program.logits).to_vec()
    }

    fn get(&self, id: ValueId) -> &[f64] {
        &self.values[id.0 as usize]
    }

    fn set(&mut self, id: ValueId, values: Vec<f64>) {
        assert_eq!(values.len(), self.values[id.0 as usize].len());
        self.values[id.0 as usize] = values;
    }

    /// Values and columns of a weight.
    fn weight(&self, weight: WeightRef) -> (&[f64], usize) {
        let id = self.index.lookup(weight.layer, weight.role).unwrap();
        let cols = self.model.weights[id.index()].shape.cols as usize;
        (&self.weights[id.index()], cols)
    }

    fn matmul(&self, weight: WeightRef, x: &[f64], bias: Option<WeightRef>) -> Vec<f64> {
        let (w, cols) = self.weight(weight);
        assert_eq!(x.len(), cols);
        let mut out: Vec<f64> = w.chunks(cols).map(|row| dot(row, x)).collect();
        if let Some(bias) = bias {
            for (y, b) in out.iter_mut().zip(self.weight(bias).0) {
                *y += b;
            }
        }
        out
    }

    fn run(&mut self, kind: &OpKind, layer: Option<usize>, token: usize, position: usize) {
        match *kind {
            OpKind::Embed { weight, out } => {
                let (w, cols) = self.weight(weight);
                self.set(out, w[token * cols..][..cols].to_vec());
            }
            OpKind::EmbedPosition { weight, out } => {
                let (w, cols) = self.weight(weight);
                self.set(out, w[position * cols..][..cols].to_vec());
            }
            OpKind::RmsNorm {
                input,
                weight,
                eps,
                rows,
                out,
            } => {
                let x = self.get(input);
                let n = x.len() / rows as usize;
                let gamma = self.weight(weight).0;
                let normed = x
                    .chunks(n)
                    .flat_map(|row| {
                        let scale = 1.0 / (dot(row, row) / n as f64 + f64::from(eps)).sqrt();
                        row.iter().zip(gamma).map(move |(x, g)| x * scale * g)
                    })
                    .collect();
                self.set(out, normed);
            }
            OpKind::LayerNorm {
                input,
                weight,
                bias,
                eps,
                out,
            } => {
                let x = self.get(input);
                let n = x.len() as f64;
                let mean = x.iter().sum::<f64>() / n;
                let var = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
                let scale = 1.0 / (var + f64::from(eps)).sqrt();
                let (gamma, beta) = (self.weight(weight).0, self.weight(bias).0);
                let normed = x
                    .iter()
                    .zip(gamma.iter().zip(beta))
                    .map(|(x, (g, b))| (x - mean) * scale * g + b)
                    .collect();
                self.set(out, normed);
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
            } => self.set(out, self.matmul(weight, self.get(input), bias)),
            OpKind::Rope {
                value,
                table,
                style,
                heads,
                n_rot,
            } => {
                let (n_rot, table) = (n_rot as usize, self.program.table(table).unwrap());
                let turns = &table.data[position * n_rot..][..n_rot];
                let mut x = self.get(value).to_vec();
                let head_dim = x.len() / heads as usize;
                for head in x.chunks_mut(head_dim) {
                    for j in 0..n_rot / 2 {
                        let (a, b) = match style {
                            RopeStyle::Interleaved => (2 * j, 2 * j + 1),
                            RopeStyle::HalfSplit => (j, j + n_rot / 2),
                        };
                        let (cos, sin) = (f64::from(turns[2 * j]), f64::from(turns[2 * j + 1]));
                        (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
                    }
                }
                self.set(value, x);
            }
            OpKind::StoreKv { key, value } => {
                let entry = (self.get(key).to_vec(), self.get(value).to_vec());
                let cache = &mut self.cache[layer.unwrap()];
                assert_eq!(cache.len(), position);
                cache.push(entry);
            }
            OpKind::Attention {
                query,
                heads,
                scale,
                window,
                soft_cap,
                out,
            } => {
                let kv = self.program.kv[layer.unwrap()];
                let head_dim = kv.head_dim as usize;
                let group = (heads / kv.kv_heads) as usize;
                let cache = &self.cache[layer.unwrap()];
                let first = window.map_or(0, |w| cache.len().saturating_sub(w as usize));
                let mut attended = Vec::new();
                for (head, q) in self.get(query).chunks(head_dim).enumerate() {
                    let at = head / group * head_dim;
                    let scores: Vec<f64> = cache[first..]
                        .iter()
                        .map(|(k, _)| {
                            let s = dot(q, &k[at..][..head_dim]) * f64::from(scale);
                            soft_cap.map_or(s, |cap| f64::from(cap) * (s / f64::from(cap)).tanh())
                        })
                        .collect();
                    let probabilities = softmax(&scores);
                    attended.extend((0..head_dim).map(|i| {
                        cache[first..]
                            .iter()
                            .zip(&probabilities)
                            .map(|((_, v), p)| v[at + i] * p)
                            .sum::<f64>()
                    }));
                }
                self.set(out, attended);
            }
            OpKind::Activation { input, kind, out } => {
                let f = |x: f64| match kind {
                    ActivationKind::Silu => x / (1.0 + (-x).exp()),
                    ActivationKind::GeluTanh => {
                        let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                        0.5 * x * (1.0 + inner.tanh())
                    }
                };
                self.set(out, self.get(input).iter().map(|x| f(*x)).collect());
            }
            OpKind::Mul { a, b, out } => {
                let product = self.get(a).iter().zip(self.get(b)).map(|(a, b)| a * b).collect();
                self.set(out, product);
            }
            OpKind::Add { a, b, out } => {
                let sum = self.get(a).iter().zip(self.get(b)).map(|(a, b)| a + b).collect();
                self.set(out, sum);
            }
            OpKind::Scale { input, factor, out } => {
                let scaled = self.get(input).iter().map(|x| x * f64::from(factor)).collect();
                self.set(out, scaled);
            }
            OpKind::SoftCap { input, cap, out } => {
                let cap = f64::from(cap);
                let capped = self.get(input).iter().map(|x| cap * (x / cap).tanh()).collect();
                self.set(out, capped);
            }
            OpKind::RouterTopK {
                logits,
                k,
                normalise,
                experts,
                weights,
            } => {
                let probabilities = softmax(self.get(logits));
                let mut order: Vec<usize> = (0..probabilities.len()).collect();
                // Stable: equal ones stay in ascending order.
                order.sort_by(|a, b| probabilities[*b].total_cmp(&probabilities[*a]));
                order.truncate(k as usize);
                let sum: f64 = order.iter().map(|e| probabilities[*e]).sum();
                let divisor = if normalise { sum } else { 1.0 };
                self.set(
                    weights,
                    order.iter().map(|e| probabilities[*e] / divisor).collect(),
                );
                self.set(experts, order.into_iter().map(|e| e as f64).collect());
            }
            OpKind::ExpertMatMul {
                input,
                experts,
                weight,
                out,
            } => {
                let (w, cols) = self.weight(weight);
                let x = self.get(input);
                let chosen = self.get(experts);
                let rows = self.get(out).len() / chosen.len();
                let mut y = Vec::new();
                for (slot, expert) in chosen.iter().enumerate() {
                    let x = if x.len() == cols {
                        x
                    } else {
                        &x[slot * cols..][..cols]
                    };
                    let matrix = &w[*expert as usize * rows * cols..][..rows * cols];
                    y.extend(matrix.chunks(cols).map(|row| dot(row, x)));
                }
                self.set(out, y);
            }
            OpKind::WeightedSum {
                input, weights, out, ..
            } => {
                let x = self.get(input);
                let width = self.get(out).len();
                let mut sum = vec![0.0; width];
                for (row, weight) in x.chunks(width).zip(self.get(weights)) {
                    for (s, x) in sum.iter_mut().zip(row) {
                        *s += weight * x;
                    }
                }
                self.set(out, sum);
            }
            ref other => panic!("{} is not for float weights", other.name()),
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.iter().map(|e| e / sum).collect()
}

/// No value of a program over float weights is quantised.
pub(crate) fn has_no_quantised_value(program: &DecodeProgram) -> bool {
    program
        .values
        .iter()
        .all(|v| !matches!(v.kind, ValueKind::Quantized { .. }))
}
