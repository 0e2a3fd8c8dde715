//! Goldens against the oracle.

use hoist_backend::{ActivationKind, Encoding, Error, KvDtype, KvSpec, RopeStyle};

use super::{Case, F32s, Golden};
use crate::oracle::{self, AttentionSpec, KvCache, Matrix};

/// A golden whose result differs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{golden}: {difference}")]
pub struct Mismatch {
    /// Operation and name.
    pub golden: String,
    /// Where, what is expected and what was found.
    pub difference: String,
}

impl std::fmt::Display for Golden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.case.op(), self.name)
    }
}

impl Case {
    /// Name of the operation, as in the files.
    pub fn op(&self) -> &'static str {
        match self {
            Case::Quantise { .. } => "quantise",
            Case::MatMul { .. } => "matmul",
            Case::Embed { .. } => "embed",
            Case::RmsNorm { .. } => "rms_norm",
            Case::LayerNorm { .. } => "layer_norm",
            Case::Rope { .. } => "rope",
            Case::StoreKv { .. } => "store_kv",
            Case::Attention { .. } => "attention",
            Case::Activation { .. } => "activation",
            Case::Mul { .. } => "mul",
            Case::Add { .. } => "add",
            Case::Scale { .. } => "scale",
            Case::SoftCap { .. } => "soft_cap",
            Case::RouterTopK { .. } => "router_top_k",
            Case::WeightedSum { .. } => "weighted_sum",
            Case::ArgMax { .. } => "arg_max",
            Case::Exp { .. } => "exp",
            Case::Tanh { .. } => "tanh",
        }
    }
}

impl Golden {
    /// Compares the oracle's result with the golden's, bit for bit.
    ///
    /// # Errors
    /// [`Mismatch`]
    pub fn check(&self) -> Result<(), Mismatch> {
        difference(&self.case).map_or(Ok(()), |difference| {
            Err(Mismatch {
                golden: self.to_string(),
                difference,
            })
        })
    }
}

fn difference(case: &Case) -> Option<String> {
    match case {
        Case::Quantise { x, segments } => {
            let found = match oracle::quantise(x) {
                Ok(found) => found,
                Err(e) => return Some(e.to_string()),
            };
            if segments.len() != found.segments.len() {
                return Some(format!(
                    "{} segments, expected {}",
                    found.segments.len(),
                    segments.len()
                ));
            }
            segments
                .iter()
                .zip(&found.segments)
                .enumerate()
                .find_map(|(n, (e, f))| {
                    let q: Vec<i64> = e.q.iter().map(|q| i64::from(*q as i8)).collect();
                    let same = (e.m, e.e, &e.u, &q) == (f.m, f.e, &f.u, &f.q);
                    (!same).then(|| format!("segment {n}: expected {e:?}, found {f:?}"))
                })
        }
        Case::MatMul {
            encoding,
            rows,
            cols,
            weights,
            x,
            bias,
            y,
        } => with_matrix(encoding, *rows, *cols, weights, |matrix| {
            compare(y.as_ref(), oracle::matmul(matrix, x, bias.as_deref()))
        }),
        Case::Embed {
            encoding,
            cols,
            weights,
            y,
            every,
        } => with_matrix(encoding, 1, *cols, weights, |matrix| {
            let found = oracle::embed_row(matrix, 0).map(|v| v.into_iter().step_by(*every).collect());
            compare(Some(y), found)
        }),
        Case::RmsNorm { x, gamma, eps, y } => compare(y.as_ref(), oracle::rms_norm(x, gamma, eps[0])),
        Case::LayerNorm {
            x,
            gamma,
            bias,
            eps,
            y,
        } => compare(y.as_ref(), oracle::layer_norm(x, gamma, bias, eps[0])),
        Case::Rope {
            style,
            heads,
            n_rot,
            value,
            table,
            y,
        } => {
            let style = match style.as_str() {
                "interleaved" => RopeStyle::Interleaved,
                "half_split" => RopeStyle::HalfSplit,
                other => return Some(format!("unknown style `{other}`")),
            };
            compare(y.as_ref(), oracle::rope(value, table, style, *heads, *n_rot))
        }
        Case::StoreKv { x, y } => {
            let mut cache = cache(1, x.len() as u32, KvDtype::F16);
            let found = cache
                .store(x, x)
                .map(|()| cache.at(0).map(|(k, _)| k.to_vec()).unwrap_or_default());
            compare(y.as_ref(), found)
        }
        Case::Attention {
            heads,
            kv_heads,
            head_dim,
            scale,
            window,
            soft_cap,
            keys,
            values,
            query,
            y,
        } => {
            let spec = AttentionSpec {
                heads: *heads,
                scale: scale[0],
                window: *window,
                soft_cap: soft_cap.as_ref().map(|c| c[0]),
            };
            let mut cache = cache(*kv_heads, *head_dim, KvDtype::F16);
            let width = (kv_heads * head_dim) as usize;
            let widened = |words: &[u16]| words.iter().map(|w| oracle::f16_to_f32(*w)).collect::<Vec<_>>();
            for (k, v) in keys.chunks(width).zip(values.chunks(width)) {
                if let Err(e) = cache.store(&widened(k), &widened(v)) {
                    return Some(e.to_string());
                }
            }
            compare(y.as_ref(), oracle::attention(&spec, query, &cache))
        }
        Case::Activation { kind, x, y } => {
            let kind = match kind.as_str() {
                "silu" => ActivationKind::Silu,
                "gelu_tanh" => ActivationKind::GeluTanh,
                other => return Some(format!("unknown kind `{other}`")),
            };
            compare(y.as_ref(), Ok(oracle::activate(kind, x)))
        }
        Case::Mul { a, b, y } => compare(y.as_ref(), oracle::mul(a, b)),
        Case::Add { a, b, y } => compare(y.as_ref(), oracle::add(a, b)),
        Case::Scale { factor, x, y } => compare(y.as_ref(), Ok(oracle::scale(x, factor[0]))),
        Case::SoftCap { cap, x, y } => compare(y.as_ref(), Ok(oracle::soft_cap(x, cap[0]))),
        Case::RouterTopK {
            logits,
            k,
            normalise,
            experts,
            weights,
        } => match oracle::router_top_k(logits, *k, *normalise) {
            Ok((found, _)) if found != *experts => Some(format!("experts {found:?}, expected {experts:?}")),
            found => compare(Some(weights), found.map(|(_, w)| w)),
        },
        Case::WeightedSum {
            experts,
            weights,
            inputs,
            y,
        } => {
            let width = inputs.len() / experts.len().max(1);
            let vectors: Vec<&[f32]> = inputs.chunks(width.max(1)).collect();
            compare(y.as_ref(), oracle::weighted_sum(&vectors, experts, weights))
        }
        Case::ArgMax { logits, y } => {
            let found = oracle::arg_max(logits);
            (found != *y).then(|| format!("expected {y}, found {found}"))
        }
        Case::Exp { x, y } => compare(Some(y), Ok(x.iter().map(|x| oracle::exp(*x)).collect())),
        Case::Tanh { x, y } => compare(Some(y), Ok(x.iter().map(|x| oracle::tanh(*x)).collect())),
    }
}

fn cache(kv_heads: u32, head_dim: u32, dtype: KvDtype) -> KvCache {
    KvCache::new(KvSpec { kv_heads, head_dim }, dtype)
}

fn with_matrix(
    encoding: &str,
    rows: usize,
    cols: usize,
    bytes: &[u8],
    f: impl FnOnce(&Matrix<'_>) -> Option<String>,
) -> Option<String> {
    match Encoding::from_name(encoding) {
        Some(encoding) => f(&Matrix {
            encoding,
            rows,
            cols,
            bytes,
        }),
        None => Some(format!("unknown encoding `{encoding}`")),
    }
}

/// The first difference in bits; `None` expected is a result that is not finite.
fn compare(expected: Option<&F32s>, found: hoist_backend::Result<Vec<f32>>) -> Option<String> {
    match (expected, found) {
        (None, Err(Error::NonFinite { .. })) => None,
        (None, Ok(found)) if found.iter().any(|y| !y.is_finite()) => None,
        (None, Ok(_)) => Some("expected a NaN or infinity, found finite values".into()),
        (_, Err(e)) => Some(format!("unexpected error: {e}")),
        (Some(expected), Ok(found)) if expected.len() != found.len() => Some(format!(
            "expected {} values, found {}",
            expected.len(),
            found.len()
        )),
        (Some(expected), Ok(found)) => expected.iter().zip(&found).enumerate().find_map(|(i, (e, f))| {
            (e.to_bits() != f.to_bits()).then(|| {
                format!(
                    "element {i}: expected {e:e} ({:08x}), found {f:e} ({:08x})",
                    e.to_bits(),
                    f.to_bits()
                )
            })
        }),
    }
}
