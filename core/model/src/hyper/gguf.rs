//! Hyper-parameters from GGUF keys, named as llama.cpp names them.

use std::collections::BTreeMap;

use hoist_backend::ActivationKind;
use hoist_formats::{MetaArray, MetaValue};

use super::{
    Draft, ExpertParameters, HyperParameters, LayerAttention, RopeParameters, RopeScaling, attention_scale,
    check_layers, windows,
};
use crate::host::HostTables;
use crate::{Architecture, Error, Lineage, Result};

const PLACE: &str = "GGUF metadata";

/// What the tensors say that the keys need not.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    /// Number of tensors: a bound on layers.
    pub(crate) tensors: usize,
    /// Rows of the token embedding, if there is one.
    pub(crate) embedding_rows: Option<u64>,
    /// RoPE factors read from host tensors.
    pub(crate) host: HostTables,
}

struct Keys<'a> {
    map: &'a BTreeMap<String, MetaValue>,
    prefix: &'static str,
}

impl Keys<'_> {
    /// `{architecture}.{key}`, or the key as it is if it is a general one.
    fn full(&self, key: &str) -> String {
        if key.starts_with("tokenizer.") {
            key.into()
        } else {
            format!("{}.{key}", self.prefix)
        }
    }

    fn missing(&self, key: &str) -> Error {
        Error::MissingKey {
            place: PLACE,
            key: self.full(key),
            tried: Vec::new(),
        }
    }

    fn wrong_type(&self, key: &str, expected: &'static str, found: &MetaValue) -> Error {
        Error::WrongType {
            place: PLACE,
            key: self.full(key),
            expected,
            found: type_name(found).into(),
        }
    }

    fn bad(&self, key: &str, expected: impl ToString, found: impl ToString) -> Error {
        Error::BadValue {
            place: PLACE,
            key: self.full(key),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    /// An unsigned number. An array whose values are all the same counts as that value: some converters write one value
    /// for each layer.
    fn u32(&self, key: &str) -> Result<Option<u32>> {
        let Some(value) = self.map.get(&self.full(key)) else {
            return Ok(None);
        };
        let wide = match value {
            MetaValue::Array(array) => {
                let Some(all) = integers(array) else {
                    return Err(self.wrong_type(key, "an unsigned number", value));
                };
                let Some((first, rest)) = all.split_first() else {
                    return Err(self.bad(key, "at least one value", "an empty array"));
                };
                if let Some(other) = rest.iter().find(|n| *n != first) {
                    return Err(self.bad(
                        key,
                        "the same value for every layer",
                        format!("{first} and {other}"),
                    ));
                }
                *first
            }
            scalar => integer(scalar).ok_or_else(|| self.wrong_type(key, "an unsigned number", value))?,
        };
        u32::try_from(wide)
            .map(Some)
            .map_err(|_| self.bad(key, "a number from 0 to 2^32 − 1", wide))
    }

    fn required_u32(&self, key: &str) -> Result<u32> {
        self.u32(key)?.ok_or_else(|| self.missing(key))
    }

    fn f64(&self, key: &str) -> Result<Option<f64>> {
        let value = match self.map.get(&self.full(key)) {
            None => return Ok(None),
            Some(MetaValue::F32(x)) => f64::from(*x),
            Some(MetaValue::F64(x)) => *x,
            Some(other) => return Err(self.wrong_type(key, "a floating-point number", other)),
        };
        if value.is_finite() {
            Ok(Some(value))
        } else {
            Err(self.bad(key, "a finite number", value))
        }
    }

    /// A positive number, or `None` if the key is missing or zero, which means *not used*.
    fn positive_f64(&self, key: &str) -> Result<Option<f64>> {
        match self.f64(key)? {
            None => Ok(None),
            Some(0.0) => Ok(None),
            Some(x) if x > 0.0 => Ok(Some(x)),
            Some(x) => Err(self.bad(key, "a positive number", x)),
        }
    }

    fn bool(&self, key: &str) -> Result<Option<bool>> {
        match self.map.get(&self.full(key)) {
            None => Ok(None),
            Some(MetaValue::Bool(b)) => Ok(Some(*b)),
            Some(other) => Err(self.wrong_type(key, "a bool", other)),
        }
    }

    fn string(&self, key: &str) -> Result<Option<&str>> {
        match self.map.get(&self.full(key)) {
            None => Ok(None),
            Some(MetaValue::String(s)) => Ok(Some(s)),
            Some(other) => Err(self.wrong_type(key, "a string", other)),
        }
    }
}

/// Reads the hyper-parameters of a GGUF file.
///
/// # Errors
/// [`Error::MissingKey`], [`Error::WrongType`], [`Error::BadValue`], [`Error::Unsupported`].
pub(crate) fn read(
    architecture: Architecture,
    lineage: Lineage,
    map: &BTreeMap<String, MetaValue>,
    facts: &Facts,
    defaults: &mut Vec<(String, String)>,
) -> Result<HyperParameters> {
    use Architecture::*;
    let keys = Keys {
        map,
        prefix: architecture.name(),
    };
    let mut default = |key: &str, value: String| defaults.push((keys.full(key), value));

    let layers = keys.required_u32("block_count")?;
    check_layers(PLACE, &keys.full("block_count"), layers, facts.tensors)?;
    let hidden = keys.required_u32("embedding_length")?;
    let context_length = keys.required_u32("context_length")?;
    let heads = keys.required_u32("attention.head_count")?;
    let kv_heads = match keys.u32("attention.head_count_kv")? {
        Some(n) => n,
        None => {
            default("attention.head_count_kv", heads.to_string());
            heads
        }
    };
    let head_dim = match keys.u32("attention.key_length")? {
        Some(n) => n,
        None => {
            if heads == 0 || hidden % heads != 0 {
                return Err(keys.bad(
                    "attention.head_count",
                    format!("a divisor of {hidden}, without attention.key_length"),
                    heads,
                ));
            }
            default("attention.key_length", (hidden / heads).to_string());
            hidden / heads
        }
    };
    if let Some(value) = keys.u32("attention.value_length")?.filter(|v| *v != head_dim) {
        return Err(Error::Unsupported {
            place: PLACE,
            architecture: architecture.name(),
            what: format!("value heads of {value} elements beside key heads of {head_dim}"),
        });
    }
    let vocab = vocabulary(&keys, facts)?;

    let experts = if architecture == Qwen3Moe {
        if let Some(scale) = keys
            .f64("expert_weights_scale")?
            .filter(|s| *s != 0.0 && *s != 1.0)
        {
            return Err(Error::Unsupported {
                place: PLACE,
                architecture: architecture.name(),
                what: format!("expert weights scaled by {scale}"),
            });
        }
        if keys.u32("expert_shared_count")?.is_some_and(|n| n > 0) {
            return Err(Error::Unsupported {
                place: PLACE,
                architecture: architecture.name(),
                what: "shared experts".into(),
            });
        }
        Some(ExpertParameters {
            count: keys.required_u32("expert_count")?,
            used: keys.required_u32("expert_used_count")?,
            // llama.cpp's qwen3moe graph always normalises.
            normalise: match keys.bool("expert_weights_norm")? {
                Some(b) => b,
                None => {
                    default("expert_weights_norm", true.to_string());
                    true
                }
            },
        })
    } else {
        if keys.u32("expert_count")?.is_some_and(|n| n > 0) {
            return Err(Error::Unsupported {
                place: PLACE,
                architecture: architecture.name(),
                what: "experts".into(),
            });
        }
        None
    };
    let ffn = match (experts, keys.u32("expert_feed_forward_length")?) {
        (Some(_), Some(n)) if n > 0 => n,
        (Some(experts), _) => {
            // llama.cpp: n_ff_exp = n_ff / n_expert_used
            let n = keys.required_u32("feed_forward_length")? / experts.used.max(1);
            default("expert_feed_forward_length", n.to_string());
            n
        }
        (None, _) => keys.required_u32("feed_forward_length")?,
    };

    let eps_key = if architecture == Gpt2 {
        "attention.layer_norm_epsilon"
    } else {
        "attention.layer_norm_rms_epsilon"
    };
    let norm_eps = keys.f64(eps_key)?.ok_or_else(|| keys.missing(eps_key))?;

    let (ropes, attention) = if let Some(style) = architecture.rope_style(lineage) {
        let base = match keys.f64("rope.freq_base")? {
            Some(base) => base,
            None if architecture == Gemma3 => {
                return Err(keys.missing("rope.freq_base"));
            }
            None => {
                default("rope.freq_base", "10000".into());
                10_000.0
            }
        };
        let n_rot = match keys.u32("rope.dimension_count")? {
            Some(n) => n,
            None => {
                default("rope.dimension_count", head_dim.to_string());
                head_dim
            }
        };
        let global = RopeParameters {
            style,
            n_rot,
            base,
            scaling: scaling(&keys, architecture, context_length, &facts.host, &mut default)?,
            frequency_divisors: facts.host.rope_freqs.clone(),
        };
        let pattern = sliding(&keys, architecture, layers, &mut default)?;
        let mut ropes = vec![global];
        if architecture == Gemma3 {
            // llama.cpp keeps the base of local layers in its code, and scales only the global ones.
            let base = match keys.f64("rope.freq_base_swa")? {
                Some(base) => base,
                None => {
                    default("rope.freq_base_swa", "10000".into());
                    10_000.0
                }
            };
            ropes.push(RopeParameters {
                style,
                n_rot,
                base,
                scaling: RopeScaling::None,
                frequency_divisors: None,
            });
        }
        let local = ropes.len() - 1;
        let attention = pattern
            .into_iter()
            .map(|window| LayerAttention {
                window,
                rope: Some(if window.is_some() { local } else { 0 }),
            })
            .collect();
        (ropes, attention)
    } else {
        let none = LayerAttention {
            window: None,
            rope: None,
        };
        (Vec::new(), vec![none; layers as usize])
    };

    let (attention_soft_cap, final_soft_cap) = match architecture {
        Gemma2 => {
            // Defaults of llama.cpp's gemma2.
            let mut cap = |key: &str, value: f64| -> Result<Option<f64>> {
                if keys.map.contains_key(&keys.full(key)) {
                    return keys.positive_f64(key);
                }
                default(key, value.to_string());
                Ok(Some(value))
            };
            (
                cap("attn_logit_softcapping", 50.0)?,
                cap("final_logit_softcapping", 30.0)?,
            )
        }
        Gemma3 => (
            keys.positive_f64("attn_logit_softcapping")?,
            keys.positive_f64("final_logit_softcapping")?,
        ),
        _ => (None, None),
    };
    // The 27B models divide by √(hidden / heads), which their files do not say: llama.cpp tells them by their layers.
    let query_scalar = match (architecture, layers) {
        (Gemma2, 46) | (Gemma3, 62) => f64::from(hidden) / f64::from(heads.max(1)),
        _ => f64::from(head_dim),
    };
    Draft {
        place: PLACE,
        hyper: HyperParameters {
            layers,
            vocab,
            hidden,
            context_length,
            heads,
            kv_heads,
            head_dim,
            ffn,
            experts,
            norm_eps: norm_eps as f32,
            activation: if architecture.is_gemma() || architecture == Gpt2 {
                ActivationKind::GeluTanh
            } else {
                ActivationKind::Silu
            },
            embedding_scale: architecture.is_gemma().then(|| (hidden as f32).sqrt()),
            attention_scale: attention_scale(query_scalar),
            attention_soft_cap: attention_soft_cap.map(|x| x as f32),
            final_soft_cap: final_soft_cap.map(|x| x as f32),
            ropes,
            attention,
            learned_positions: (architecture == Gpt2).then_some(context_length),
            attention_bias: None,
            mlp_bias: None,
            tied_output: None,
        },
    }
    .check()
}

fn vocabulary(keys: &Keys<'_>, facts: &Facts) -> Result<u32> {
    let tokens = match keys.map.get("tokenizer.ggml.tokens") {
        Some(MetaValue::Array(MetaArray::String(tokens))) => Some(tokens.len() as u64),
        Some(other) => return Err(keys.wrong_type("tokenizer.ggml.tokens", "an array of strings", other)),
        None => None,
    };
    let size = keys.u32("vocab_size")?.map(u64::from);
    let vocab = tokens
        .or(size)
        .or(facts.embedding_rows)
        .ok_or_else(|| keys.missing("vocab_size"))?;
    u32::try_from(vocab).map_err(|_| keys.bad("vocab_size", "below 2^32", vocab))
}

/// The window of each layer.
fn sliding(
    keys: &Keys<'_>,
    architecture: Architecture,
    layers: u32,
    default: &mut impl FnMut(&str, String),
) -> Result<Vec<Option<u32>>> {
    use Architecture::*;
    let window = match (keys.u32("attention.sliding_window")?, architecture) {
        // Zero means none.
        (Some(0), _) => None,
        (Some(n), _) => Some(n),
        (None, Gemma2) => {
            default("attention.sliding_window", "4096".into());
            Some(4096)
        }
        (None, Gemma3) => return Err(keys.missing("attention.sliding_window")),
        (None, _) => None,
    };
    let key = "attention.sliding_window_pattern";
    if let Some(value @ MetaValue::Array(array)) = keys.map.get(&keys.full(key)) {
        let MetaArray::Bool(flags) = array else {
            return Err(keys.wrong_type(key, "a number or an array of bools", value));
        };
        if flags.len() != layers as usize {
            return Err(keys.bad(key, format!("{layers} flags"), flags.len()));
        }
        return Ok(flags.iter().map(|f| window.filter(|_| *f)).collect());
    }
    let period = match (keys.u32(key)?, architecture) {
        (Some(n), _) => n,
        // Constants of llama.cpp's code.
        (None, Gemma2) => 2,
        (None, Gemma3) => 6,
        (None, _) => 0,
    };
    Ok(windows(layers, window, period))
}

fn scaling(
    keys: &Keys<'_>,
    architecture: Architecture,
    context_length: u32,
    host: &HostTables,
    default: &mut impl FnMut(&str, String),
) -> Result<RopeScaling> {
    // llama.cpp reads the older key if the newer is missing or zero.
    let factor = match keys.positive_f64("rope.scaling.factor")? {
        Some(f) => f,
        None => keys.positive_f64("rope.scale_linear")?.unwrap_or(1.0),
    };
    let original = |default: &mut dyn FnMut(&str, String)| -> Result<u32> {
        Ok(match keys.u32("rope.scaling.original_context_length")? {
            Some(n) => n,
            None => {
                default("rope.scaling.original_context_length", context_length.to_string());
                context_length
            }
        })
    };
    let attention = keys.positive_f64("rope.scaling.attn_factor")?;
    let kind = keys.string("rope.scaling.type")?;
    if let (Some(short), Some(long)) = (&host.short, &host.long) {
        let attention_factor = match attention {
            Some(f) => f,
            None => {
                default("rope.scaling.attn_factor", "1".into());
                1.0
            }
        };
        let wide = |v: &[f32]| v.iter().map(|x| f64::from(*x)).collect();
        return Ok(RopeScaling::LongRope {
            short: wide(short),
            long: wide(long),
            original: original(default)?,
            attention_factor,
        });
    }
    match kind {
        None | Some("linear") if factor == 1.0 => Ok(RopeScaling::None),
        None | Some("linear") => Ok(RopeScaling::Linear { factor }),
        Some("none") => Ok(RopeScaling::None),
        Some("yarn") => {
            let mut or = |key: &str, value: f64| -> Result<f64> {
                Ok(match keys.positive_f64(key)? {
                    Some(x) => x,
                    None => {
                        default(key, value.to_string());
                        value
                    }
                })
            };
            let beta_fast = or("rope.scaling.yarn_beta_fast", 32.0)?;
            let beta_slow = or("rope.scaling.yarn_beta_slow", 1.0)?;
            let mscale = if factor > 1.0 {
                0.1 * libm::log(factor) + 1.0
            } else {
                1.0
            };
            Ok(RopeScaling::Yarn {
                factor,
                original: original(default)?,
                beta_fast,
                beta_slow,
                truncate: true,
                attention_factor: mscale * attention.unwrap_or(1.0),
            })
        }
        Some(other) => Err(Error::Unsupported {
            place: PLACE,
            architecture: architecture.name(),
            what: format!("RoPE scaling of type `{other}`"),
        }),
    }
}

fn integer(value: &MetaValue) -> Option<i128> {
    Some(match value {
        MetaValue::U8(n) => (*n).into(),
        MetaValue::I8(n) => (*n).into(),
        MetaValue::U16(n) => (*n).into(),
        MetaValue::I16(n) => (*n).into(),
        MetaValue::U32(n) => (*n).into(),
        MetaValue::I32(n) => (*n).into(),
        MetaValue::U64(n) => (*n).into(),
        MetaValue::I64(n) => (*n).into(),
        _ => return None,
    })
}

fn integers(array: &MetaArray) -> Option<Vec<i128>> {
    fn wide<T: Copy + Into<i128>>(values: &[T]) -> Vec<i128> {
        values.iter().map(|n| (*n).into()).collect()
    }
    Some(match array {
        MetaArray::U8(v) => wide(v),
        MetaArray::I8(v) => wide(v),
        MetaArray::U16(v) => wide(v),
        MetaArray::I16(v) => wide(v),
        MetaArray::U32(v) => wide(v),
        MetaArray::I32(v) => wide(v),
        MetaArray::U64(v) => wide(v),
        MetaArray::I64(v) => wide(v),
        _ => return None,
    })
}

fn type_name(value: &MetaValue) -> &'static str {
    match value {
        MetaValue::U8(_) => "u8",
        MetaValue::I8(_) => "i8",
        MetaValue::U16(_) => "u16",
        MetaValue::I16(_) => "i16",
        MetaValue::U32(_) => "u32",
        MetaValue::I32(_) => "i32",
        MetaValue::U64(_) => "u64",
        MetaValue::I64(_) => "i64",
        MetaValue::F32(_) => "f32",
        MetaValue::F64(_) => "f64",
        MetaValue::Bool(_) => "a bool",
        MetaValue::String(_) => "a string",
        MetaValue::Array(_) => "an array",
    }
}
