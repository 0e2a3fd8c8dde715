//! Golden vectors: operands and results of every operation, from a second implementation.
//!
//! `scripts/oracle/goldens.py` writes them (`cargo xtask goldens`); `conformance/golden/README.md` describes the files.

mod check;
mod hex;

use std::collections::BTreeMap;

use hoist_backend::NUMERICS_CONTRACT;
use serde::Deserialize;
use serde_json::Value;

pub use check::Mismatch;
pub use hex::{Bytes, F16s, F32s};

/// File names and contents.
const FILES: &[(&str, &str)] = &[
    ("quantise", include_str!("../golden/quantise.json")),
    ("matmul", include_str!("../golden/matmul.json")),
    ("embed", include_str!("../golden/embed.json")),
    ("ops", include_str!("../golden/ops.json")),
    ("attention", include_str!("../golden/attention.json")),
    ("elementary", include_str!("../golden/elementary.json")),
];

const SCHEMA: &str = "hoist.goldens/1";

/// One operation with operands and result.
#[derive(Clone, Debug, Deserialize)]
pub struct Golden {
    /// Name, unique for its operation.
    pub name: String,
    /// Operands and result.
    #[serde(flatten)]
    pub case: Case,
}

/// Operands and result of one operation. `y: None` stands for a result that holds a NaN or infinity.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
#[allow(missing_docs, reason = "fields are the operands of docs/numerics.md")]
pub enum Case {
    /// §1.1
    Quantise { x: F32s, segments: Vec<Segment> },
    /// §1.3 and §2
    #[serde(rename = "matmul")]
    MatMul {
        encoding: String,
        rows: usize,
        cols: usize,
        weights: Bytes,
        x: F32s,
        bias: Option<F32s>,
        y: Option<F32s>,
    },
    /// §1.4, of a matrix with one row; `y` has every `every`-th element.
    Embed {
        encoding: String,
        cols: usize,
        weights: Bytes,
        y: F32s,
        every: usize,
    },
    /// §4
    RmsNorm {
        x: F32s,
        gamma: F32s,
        eps: F32s,
        y: Option<F32s>,
    },
    /// §4
    LayerNorm {
        x: F32s,
        gamma: F32s,
        bias: F32s,
        eps: F32s,
        y: Option<F32s>,
    },
    /// §4
    Rope {
        style: String,
        heads: usize,
        n_rot: usize,
        value: F32s,
        table: F32s,
        y: Option<F32s>,
    },
    /// §4: what the cache holds of `x`, widened.
    StoreKv { x: F32s, y: Option<F32s> },
    /// §4, of the last position; keys and values as stored, `[positions, kv_heads * head_dim]`.
    Attention {
        heads: usize,
        kv_heads: u32,
        head_dim: u32,
        scale: F32s,
        window: Option<u32>,
        soft_cap: Option<F32s>,
        keys: F16s,
        values: F16s,
        query: F32s,
        y: Option<F32s>,
    },
    /// §4
    Activation { kind: String, x: F32s, y: Option<F32s> },
    /// §4
    Mul { a: F32s, b: F32s, y: Option<F32s> },
    /// §4
    Add { a: F32s, b: F32s, y: Option<F32s> },
    /// §4
    Scale { factor: F32s, x: F32s, y: Option<F32s> },
    /// §4
    SoftCap { cap: F32s, x: F32s, y: Option<F32s> },
    /// §4
    RouterTopK {
        logits: F32s,
        k: usize,
        normalise: bool,
        experts: Vec<u32>,
        weights: F32s,
    },
    /// §4; `inputs`: `[experts, width]`.
    WeightedSum {
        experts: Vec<u32>,
        weights: F32s,
        inputs: F32s,
        y: Option<F32s>,
    },
    /// §4
    ArgMax { logits: F32s, y: u32 },
    /// §5
    Exp { x: F32s, y: F32s },
    /// §5
    Tanh { x: F32s, y: F32s },
}

/// A quantised segment.
#[derive(Clone, Debug, Deserialize)]
pub struct Segment {
    /// `m_a`
    pub m: i64,
    /// `e_a`
    pub e: i32,
    /// `u_j`
    pub u: Vec<i64>,
    /// `q_i` as i8.
    pub q: Bytes,
}

/// Why a golden file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum GoldenError {
    /// It is not JSON of this schema.
    #[error("golden file `{file}`: {error}")]
    Json {
        /// The file.
        file: &'static str,
        /// What serde says.
        error: serde_json::Error,
    },
    /// It says something else than expected.
    #[error("golden file `{file}`: {what} is {found}, expected {expected}")]
    Unexpected {
        /// The file.
        file: &'static str,
        /// What is unexpected.
        what: String,
        /// What should stand there.
        expected: String,
        /// What stands there.
        found: String,
    },
}

#[derive(Deserialize)]
struct File {
    schema: String,
    contract: String,
    f32: BTreeMap<String, String>,
    f16: BTreeMap<String, String>,
    cases: Vec<Value>,
}

/// Every golden vector of the contract.
///
/// # Errors
/// [`GoldenError`] if a file is not what this version reads.
pub fn all() -> Result<Vec<Golden>, GoldenError> {
    let mut goldens = Vec::new();
    for (file, text) in FILES {
        let content: File = serde_json::from_str(text).map_err(|error| GoldenError::Json { file, error })?;
        for (what, expected, found) in [
            ("schema", SCHEMA, &content.schema),
            ("contract", NUMERICS_CONTRACT, &content.contract),
        ] {
            if found != expected {
                return Err(GoldenError::Unexpected {
                    file,
                    what: what.into(),
                    expected: expected.into(),
                    found: found.clone(),
                });
            }
        }
        for mut case in content.cases.clone() {
            resolve(file, &content, &mut case)?;
            goldens.push(serde_json::from_value(case).map_err(|error| GoldenError::Json { file, error })?);
        }
    }
    Ok(goldens)
}

/// Replaces each operand `"@name:count"` by the first `count` elements of the vector of that name.
fn resolve(file: &'static str, content: &File, case: &mut Value) -> Result<(), GoldenError> {
    let Value::Object(fields) = case else {
        return Ok(());
    };
    for (field, value) in fields {
        let Value::String(text) = value else { continue };
        let Some(reference) = text.strip_prefix('@') else {
            continue;
        };
        let target = reference.split_once(':').and_then(|(name, count)| {
            let (words, digits) = match content.f32.get(name) {
                Some(words) => (words, 8),
                None => (content.f16.get(name)?, 4),
            };
            words.get(..digits * count.parse::<usize>().ok()?)
        });
        *value = match target {
            Some(words) => Value::String(words.to_owned()),
            None => {
                return Err(GoldenError::Unexpected {
                    file,
                    what: format!("operand `{field}`"),
                    expected: "the name of a vector and a count within it".into(),
                    found: text.clone(),
                });
            }
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::deviation::{Deviation, with_deviation};

    #[test]
    fn the_oracle_equals_every_golden() {
        let goldens = all().unwrap();
        assert!(goldens.len() > 250, "{}", goldens.len());
        let wrong: Vec<String> = goldens
            .iter()
            .filter_map(|g| g.check().err())
            .map(|m| m.to_string())
            .collect();
        assert!(
            wrong.is_empty(),
            "{} of {}:\n{}",
            wrong.len(),
            goldens.len(),
            wrong.join("\n")
        );
    }

    #[test]
    fn every_deviation_from_the_contract_is_noticed() {
        let goldens = all().unwrap();
        let unnoticed: Vec<_> = Deviation::ALL
            .iter()
            .filter(|d| with_deviation(**d, || goldens.iter().all(|g| g.check().is_ok())))
            .collect();
        assert!(unnoticed.is_empty(), "{unnoticed:?}");
    }

    #[test]
    fn names_are_unique() {
        let goldens = all().unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for g in &goldens {
            assert!(seen.insert(g.to_string()), "{g}");
        }
    }

    #[test]
    fn every_weight_encoding_has_goldens() {
        let goldens = all().unwrap();
        for encoding in hoist_backend::EncodingSet::weights().iter() {
            let has = |op: &str| {
                goldens
                    .iter()
                    .any(|g| g.to_string().starts_with(&format!("{op} {encoding}/")))
            };
            assert!(has("matmul") && has("embed"), "{encoding}");
        }
    }
}
