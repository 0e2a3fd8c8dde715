//! Hyper-parameters from a Hugging Face `config.json` and from APR metadata, which share their keys.

use hoist_backend::ActivationKind;
use serde_json::{Map, Value};

use super::gguf::Facts;
use super::{
    Draft, ExpertParameters, HyperParameters, LayerAttention, RopeParameters, RopeScaling, attention_scale,
    check_layers, windows,
};
use crate::{Architecture, Error, Lineage, Result};

/// Where the metadata came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    HuggingFace,
    Apr,
}

impl Source {
    fn place(self) -> &'static str {
        match self {
            Source::HuggingFace => "config.json",
            Source::Apr => "APR metadata",
        }
    }
}

// Each list: the names of one parameter, `transformers`' first; gpt2 and APR files spell several in their own way.
const HIDDEN: &[&str] = &["hidden_size", "hidden_dim", "d_model", "n_embd"];
const LAYERS: &[&str] = &["num_hidden_layers", "num_layers", "n_layers", "n_layer"];
const HEADS: &[&str] = &["num_attention_heads", "num_heads", "n_heads", "n_head"];
const KV_HEADS: &[&str] = &["num_key_value_heads", "num_kv_heads", "n_kv_heads"];
const VOCAB: &[&str] = &["vocab_size", "n_vocab"];
const FFN: &[&str] = &["intermediate_size", "ffn_dim", "intermediate_dim", "n_inner"];
const CONTEXT: &[&str] = &[
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "context_length",
    "n_ctx",
];
const RMS_EPS: &[&str] = &["rms_norm_eps", "layer_norm_eps", "norm_eps"];
const LAYER_NORM_EPS: &[&str] = &["layer_norm_epsilon", "layer_norm_eps", "norm_eps", "rms_norm_eps"];
const HEAD_DIM: &[&str] = &["head_dim"];
const EXPERTS: &[&str] = &["num_experts", "num_local_experts"];
const EXPERTS_USED: &[&str] = &["num_experts_per_tok"];
const EXPERT_FFN: &[&str] = &["moe_intermediate_size"];

/// The names by which the metadata calls its architecture, best first.
///
/// # Errors
/// [`Error::MissingKey`], [`Error::WrongType`].
pub(crate) fn architecture_names(map: &Map<String, Value>, source: Source) -> Result<Vec<String>> {
    let object = Object {
        place: source.place(),
        prefix: String::new(),
        map,
    };
    let keys: &[&str] = match source {
        Source::HuggingFace => &["model_type"],
        Source::Apr => &["architecture", "hf_model_type", "hf_architecture", "model_type"],
    };
    let mut names = Vec::new();
    for key in keys {
        names.extend(object.string(key)?.filter(|s| !s.is_empty()).map(str::to_owned));
    }
    if let Some((key, value)) = object.find(&["architectures"]) {
        let list = value
            .as_array()
            .ok_or_else(|| object.wrong_type(key, "an array of strings", value))?;
        names.extend(list.iter().filter_map(Value::as_str).map(str::to_owned));
    }
    if names.is_empty() {
        return Err(object.missing(keys));
    }
    Ok(names)
}

/// One JSON object, and where it stands.
#[derive(Clone)]
struct Object<'a> {
    place: &'static str,
    /// Path of the object with a trailing dot, for messages.
    prefix: String,
    map: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    /// The first of `keys` that is there; an explicit null counts as absent.
    fn find<'k>(&self, keys: &[&'k str]) -> Option<(&'k str, &'a Value)> {
        keys.iter()
            .find_map(|k| self.map.get(*k).filter(|v| !v.is_null()).map(|v| (*k, v)))
    }

    /// Whether the key stands there, even as null.
    fn mentions(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    fn missing(&self, keys: &[&str]) -> Error {
        let mut names = keys.iter().map(|k| format!("{}{k}", self.prefix));
        Error::MissingKey {
            place: self.place,
            key: names.next().unwrap_or_default(),
            tried: names.collect(),
        }
    }

    fn wrong_type(&self, key: &str, expected: &'static str, found: &Value) -> Error {
        Error::WrongType {
            place: self.place,
            key: format!("{}{key}", self.prefix),
            expected,
            found: match found {
                Value::Null => "null".into(),
                Value::Bool(b) => b.to_string(),
                Value::Number(n) => n.to_string(),
                Value::String(_) => "a string".into(),
                Value::Array(_) => "an array".into(),
                Value::Object(_) => "an object".into(),
            },
        }
    }

    fn bad(&self, key: &str, expected: impl ToString, found: impl ToString) -> Error {
        Error::BadValue {
            place: self.place,
            key: format!("{}{key}", self.prefix),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    fn u32(&self, keys: &[&str]) -> Result<Option<u32>> {
        let Some((key, value)) = self.find(keys) else {
            return Ok(None);
        };
        let wide = value
            .as_u64()
            .ok_or_else(|| self.wrong_type(key, "an unsigned number", value))?;
        u32::try_from(wide)
            .map(Some)
            .map_err(|_| self.bad(key, "a number from 0 to 2^32 − 1", wide))
    }

    fn required_u32(&self, keys: &[&str]) -> Result<u32> {
        self.u32(keys)?.ok_or_else(|| self.missing(keys))
    }

    fn f64(&self, keys: &[&str]) -> Result<Option<f64>> {
        let Some((key, value)) = self.find(keys) else {
            return Ok(None);
        };
        value
            .as_f64()
            .map(Some)
            .ok_or_else(|| self.wrong_type(key, "a number", value))
    }

    fn required_f64(&self, keys: &[&str]) -> Result<f64> {
        self.f64(keys)?.ok_or_else(|| self.missing(keys))
    }

    fn bool(&self, key: &str) -> Result<Option<bool>> {
        let Some((key, value)) = self.find(&[key]) else {
            return Ok(None);
        };
        value
            .as_bool()
            .map(Some)
            .ok_or_else(|| self.wrong_type(key, "a bool", value))
    }

    fn string(&self, key: &str) -> Result<Option<&'a str>> {
        let Some((key, value)) = self.find(&[key]) else {
            return Ok(None);
        };
        value
            .as_str()
            .map(Some)
            .ok_or_else(|| self.wrong_type(key, "a string", value))
    }

    fn object(&self, key: &str) -> Result<Option<Object<'a>>> {
        let Some((key, value)) = self.find(&[key]) else {
            return Ok(None);
        };
        let map = value
            .as_object()
            .ok_or_else(|| self.wrong_type(key, "an object", value))?;
        Ok(Some(Object {
            place: self.place,
            prefix: format!("{}{key}.", self.prefix),
            map,
        }))
    }

    fn numbers(&self, key: &str) -> Result<Vec<f64>> {
        let (key, value) = self.find(&[key]).ok_or_else(|| self.missing(&[key]))?;
        value
            .as_array()
            .and_then(|list| list.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>())
            .ok_or_else(|| self.wrong_type(key, "an array of numbers", value))
    }
}

/// Reads one file's parameters.
struct Reader<'a, 'd> {
    architecture: Architecture,
    source: Source,
    config: Object<'a>,
    defaults: &'d mut Vec<(String, String)>,
}

/// Reads the hyper-parameters of a Hugging Face folder or of an APR file.
///
/// # Errors
/// [`Error::MissingKey`], [`Error::WrongType`], [`Error::BadValue`], [`Error::Unsupported`].
pub(crate) fn read(
    architecture: Architecture,
    lineage: Lineage,
    source: Source,
    map: &Map<String, Value>,
    facts: &Facts,
    defaults: &mut Vec<(String, String)>,
) -> Result<HyperParameters> {
    let outer = Object {
        place: source.place(),
        prefix: String::new(),
        map,
    };
    // Models that also see keep the language model's parameters in an object of its own.
    let config = outer.object("text_config")?.unwrap_or(outer);
    Reader {
        architecture,
        source,
        config,
        defaults,
    }
    .read(lineage, facts)
}

impl<'a> Reader<'a, '_> {
    fn unsupported(&self, what: impl Into<String>) -> Error {
        Error::Unsupported {
            place: self.config.place,
            architecture: self.architecture.name(),
            what: what.into(),
        }
    }

    fn default<T: ToString>(&mut self, key: &str, value: T) -> T {
        self.defaults.push((key.into(), value.to_string()));
        value
    }

    /// Refuses what would change the forward pass in a way that Hoist does not do.
    fn refuse_variations(&self) -> Result<()> {
        let c = &self.config;
        if c.find(&["quantization_config"]).is_some() && self.source == Source::HuggingFace {
            return Err(self.unsupported("a `quantization_config`"));
        }
        for flag in [
            "use_bidirectional_attention",
            "add_cross_attention",
            "scale_attn_by_inverse_layer_idx",
        ] {
            if c.find(&[flag]).is_some_and(|(_, v)| v != &Value::Bool(false)) {
                return Err(self.unsupported(format!("`{flag}`")));
            }
        }
        if c.bool("scale_attn_weights")? == Some(false) {
            return Err(self.unsupported("`scale_attn_weights` of false"));
        }
        if self.architecture == Architecture::Qwen3Moe {
            if c.u32(&["decoder_sparse_step"])?.is_some_and(|n| n != 1) {
                return Err(self.unsupported("a `decoder_sparse_step` other than 1"));
            }
            if c.find(&["mlp_only_layers"])
                .is_some_and(|(_, v)| v.as_array().is_none_or(|list| !list.is_empty()))
            {
                return Err(self.unsupported("`mlp_only_layers`"));
            }
        }
        Ok(())
    }

    fn read(mut self, lineage: Lineage, facts: &Facts) -> Result<HyperParameters> {
        use Architecture::*;
        self.refuse_variations()?;
        let architecture = self.architecture;
        let c = self.config.clone();

        let layers = c.required_u32(LAYERS)?;
        check_layers(c.place, LAYERS[0], layers, facts.tensors)?;
        let hidden = c.required_u32(HIDDEN)?;
        let vocab = c.required_u32(VOCAB)?;
        let context_length = c.required_u32(CONTEXT)?;
        let heads = c.required_u32(HEADS)?;
        let kv_heads = match c.u32(KV_HEADS)? {
            Some(n) => n,
            None => self.default(KV_HEADS[0], heads),
        };
        let head_dim = match c.u32(HEAD_DIM)? {
            Some(n) => n,
            None => {
                if heads == 0 || !hidden.is_multiple_of(heads) {
                    return Err(c.bad(
                        HEADS[0],
                        format!("a divisor of {hidden}, without head_dim"),
                        heads,
                    ));
                }
                // These classes have a default of their own, which no file relies on.
                if self.source == Source::HuggingFace
                    && matches!(architecture, Qwen3 | Qwen3Moe | Gemma2 | Gemma3)
                {
                    return Err(c.missing(HEAD_DIM));
                }
                self.default(HEAD_DIM[0], hidden / heads)
            }
        };
        let experts = if architecture == Qwen3Moe {
            Some(ExpertParameters {
                count: c.required_u32(EXPERTS)?,
                used: c.required_u32(EXPERTS_USED)?,
                normalise: match (c.bool("norm_topk_prob")?, self.source) {
                    (Some(b), _) => b,
                    // APR has no such key, and every released model of this architecture normalises.
                    (None, Source::Apr) => self.default("norm_topk_prob", true),
                    (None, Source::HuggingFace) => return Err(c.missing(&["norm_topk_prob"])),
                },
            })
        } else {
            None
        };
        let ffn = match (experts, c.u32(FFN)?) {
            (Some(_), _) => c.required_u32(EXPERT_FFN)?,
            (None, Some(n)) => n,
            (None, None) if architecture == Gpt2 => {
                let n = hidden
                    .checked_mul(4)
                    .ok_or_else(|| c.bad(HIDDEN[0], "below 2^30", hidden))?;
                self.default("n_inner", n)
            }
            (None, None) => return Err(c.missing(FFN)),
        };
        let norm_eps = c.required_f64(if architecture == Gpt2 {
            LAYER_NORM_EPS
        } else {
            RMS_EPS
        })?;
        let activation = self.activation()?;
        let attention = self.layers(layers)?;
        let ropes = self.ropes(lineage, head_dim, context_length)?;
        let local = ropes.len().saturating_sub(1);
        let attention = attention
            .into_iter()
            .map(|(window, slides)| LayerAttention {
                window,
                rope: (!ropes.is_empty()).then_some(if slides { local } else { 0 }),
            })
            .collect();

        let (attention_soft_cap, final_soft_cap) = match architecture {
            Gemma2 => (
                self.soft_cap("attn_logit_softcapping", Some(50.0))?,
                self.soft_cap("final_logit_softcapping", Some(30.0))?,
            ),
            Gemma3 => (
                self.soft_cap("attn_logit_softcapping", None)?,
                self.soft_cap("final_logit_softcapping", None)?,
            ),
            _ => (None, None),
        };
        let query_scalar = match c.f64(&["query_pre_attn_scalar"])? {
            Some(x) if architecture.is_gemma() => x,
            None if architecture.is_gemma() && self.source == Source::HuggingFace => {
                return Err(c.missing(&["query_pre_attn_scalar"]));
            }
            _ => f64::from(head_dim),
        };
        let tied_output = match (c.bool("tie_word_embeddings")?, self.source) {
            (Some(b), _) => Some(b),
            (None, Source::Apr) => None,
            // Files leave the key out where it has their class's default; a file with its own matrix says it anyway.
            (None, Source::HuggingFace) if architecture.is_gemma() || architecture == Gpt2 => {
                Some(self.default("tie_word_embeddings", true))
            }
            (None, Source::HuggingFace) => None,
        };
        Draft {
            place: c.place,
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
                activation,
                embedding_scale: architecture.is_gemma().then(|| (hidden as f32).sqrt()),
                attention_scale: attention_scale(query_scalar),
                attention_soft_cap,
                final_soft_cap,
                ropes,
                attention,
                learned_positions: (architecture == Gpt2).then_some(context_length),
                attention_bias: c.bool("attention_bias")?,
                mlp_bias: c.bool("mlp_bias")?,
                tied_output,
            },
        }
        .check()
    }

    /// A cap; an explicit null means none.
    fn soft_cap(&mut self, key: &str, default: Option<f64>) -> Result<Option<f32>> {
        if self.config.mentions(key) {
            return Ok(self.config.f64(&[key])?.map(|x| x as f32));
        }
        Ok(default.map(|x| self.default(key, x) as f32))
    }

    fn activation(&mut self) -> Result<ActivationKind> {
        let keys: &[&str] = match self.architecture {
            // gemma's older files say `hidden_act: gelu` and mean the tanh form, as `hidden_activation` then says.
            Architecture::Gemma2 | Architecture::Gemma3 => &["hidden_activation", "hidden_act"],
            Architecture::Gpt2 => &["activation_function", "hidden_act"],
            _ => &["hidden_act"],
        };
        let mut found = None;
        for key in keys {
            found = self.config.string(key)?;
            if found.is_some() {
                break;
            }
        }
        match found {
            Some("silu" | "swish") => Ok(ActivationKind::Silu),
            Some("gelu_pytorch_tanh" | "gelu_new") => Ok(ActivationKind::GeluTanh),
            Some(other) => Err(self.unsupported(format!(
                "the activation `{}`",
                other.chars().take(40).collect::<String>()
            ))),
            None if self.architecture.is_gemma() => {
                self.default(keys[0], "gelu_pytorch_tanh");
                Ok(ActivationKind::GeluTanh)
            }
            None if self.architecture == Architecture::Gpt2 => {
                self.default(keys[0], "gelu_new");
                Ok(ActivationKind::GeluTanh)
            }
            None => {
                self.default(keys[0], "silu");
                Ok(ActivationKind::Silu)
            }
        }
    }

    /// For each layer its window, and whether it is one of the sliding kind.
    fn layers(&mut self, layers: u32) -> Result<Vec<(Option<u32>, bool)>> {
        use Architecture::*;
        let c = self.config.clone();
        let qwen = matches!(self.architecture, Qwen2 | Qwen3 | Qwen3Moe);
        let window = match c.u32(&["sliding_window"])? {
            _ if self.architecture == Gpt2 => None,
            _ if qwen && c.bool("use_sliding_window")? != Some(true) => None,
            Some(n) => Some(n),
            None if self.architecture == Mistral
                && self.source == Source::HuggingFace
                && !c.mentions("sliding_window") =>
            {
                Some(self.default("sliding_window", 4096))
            }
            None if self.architecture.is_gemma() || qwen => return Err(c.missing(&["sliding_window"])),
            None => None,
        };
        if let Some((key, value)) = c.find(&["layer_types"])
            && self.architecture != Gpt2
        {
            let kinds = value
                .as_array()
                .ok_or_else(|| c.wrong_type(key, "an array of strings", value))?;
            if kinds.len() != layers as usize {
                return Err(c.bad(key, format!("{layers} layers"), kinds.len()));
            }
            return kinds
                .iter()
                .map(|kind| match kind.as_str() {
                    Some("full_attention") => Ok((None, false)),
                    Some("sliding_attention") => Ok((window, true)),
                    Some(other) => Err(self.unsupported(format!(
                        "layers of type `{}`",
                        other.chars().take(40).collect::<String>()
                    ))),
                    None => Err(c.wrong_type(key, "an array of strings", kind)),
                })
                .collect();
        }
        let windows = match self.architecture {
            Gemma2 => windows(layers, window, 2),
            Gemma3 => {
                let period = match c.u32(&["sliding_window_pattern", "_sliding_window_pattern"])? {
                    Some(n) => n,
                    None => self.default("sliding_window_pattern", 6),
                };
                windows(layers, window, period)
            }
            Qwen2 | Qwen3 if window.is_some() => {
                let full = c.required_u32(&["max_window_layers"])?;
                (0..layers)
                    .map(|layer| window.filter(|_| layer >= full))
                    .collect()
            }
            _ => windows(layers, window, 0),
        };
        Ok(windows.into_iter().map(|w| (w, w.is_some())).collect())
    }

    /// The RoPE parameter sets: the global one, and gemma3's local one.
    fn ropes(&mut self, lineage: Lineage, head_dim: u32, context_length: u32) -> Result<Vec<RopeParameters>> {
        let c = self.config.clone();
        let Some(mut style) = self.architecture.rope_style(lineage) else {
            return Ok(Vec::new());
        };
        if self.source == Source::Apr {
            use hoist_backend::RopeStyle::{HalfSplit, Interleaved};
            // APR says it outright: 0 for adjacent pairs, 2 for halves.
            style = match c.u32(&["rope_type"])? {
                Some(0) => Interleaved,
                Some(2) => HalfSplit,
                Some(other) => return Err(c.bad("rope_type", "0 or 2", other)),
                None => {
                    let name = if style == Interleaved { 0 } else { 2 };
                    self.default("rope_type", name);
                    style
                }
            };
        }
        let gemma3 = self.architecture == Architecture::Gemma3;
        let parameters = c.object("rope_parameters")?;
        // The newer layout has a dictionary for each type of layer where they differ.
        let by_type = match &parameters {
            Some(p) => (
                p.object_if_object("full_attention"),
                p.object_if_object("sliding_attention"),
            ),
            None => (None, None),
        };
        let global = by_type.0.or(parameters).or(c.object("rope_scaling")?);
        let mut ropes = vec![self.rope(style, global.as_ref(), gemma3, head_dim, context_length)?];
        if gemma3 {
            let local = match by_type.1 {
                Some(local) => self.rope(style, Some(&local), true, head_dim, context_length)?,
                None => RopeParameters {
                    style,
                    n_rot: ropes[0].n_rot,
                    base: match c.f64(&["rope_local_base_freq"])? {
                        Some(base) => base,
                        None => self.default("rope_local_base_freq", 10_000.0),
                    },
                    scaling: RopeScaling::None,
                    frequency_divisors: None,
                },
            };
            ropes.push(local);
        }
        Ok(ropes)
    }

    fn rope(
        &mut self,
        style: hoist_backend::RopeStyle,
        dictionary: Option<&Object<'a>>,
        theta_is_required: bool,
        head_dim: u32,
        context_length: u32,
    ) -> Result<RopeParameters> {
        let c = self.config.clone();
        let first = |key: &str| -> Result<Option<f64>> {
            match dictionary.map(|d| d.f64(&[key])).transpose()?.flatten() {
                Some(x) => Ok(Some(x)),
                None => c.f64(&[key]),
            }
        };
        let base = match first("rope_theta")? {
            Some(base) => base,
            None if theta_is_required => return Err(c.missing(&["rope_theta"])),
            None => self.default("rope_theta", 10_000.0),
        };
        let n_rot = match first("partial_rotary_factor")? {
            None => head_dim,
            Some(part) if part > 0.0 && part <= 1.0 => (f64::from(head_dim) * part) as u32,
            Some(part) => return Err(c.bad("partial_rotary_factor", "a number from 0 to 1", part)),
        };
        let scaling = match dictionary {
            Some(d) => self.scaling(d, context_length)?,
            None => RopeScaling::None,
        };
        Ok(RopeParameters {
            style,
            n_rot,
            base,
            scaling,
            frequency_divisors: None,
        })
    }

    fn scaling(&mut self, d: &Object<'a>, context_length: u32) -> Result<RopeScaling> {
        let c = self.config.clone();
        let kind = match d.string("rope_type")? {
            Some(kind) => Some(kind),
            None => d.string("type")?,
        };
        const ORIGINAL: &str = "original_max_position_embeddings";
        let original = match d.u32(&[ORIGINAL])? {
            Some(n) => Some(n),
            None => c.u32(&[ORIGINAL])?,
        };
        match kind {
            None | Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear {
                factor: d.required_f64(&["factor"])?,
            }),
            Some("llama3") => Ok(RopeScaling::Llama3 {
                factor: d.required_f64(&["factor"])?,
                low: d.required_f64(&["low_freq_factor"])?,
                high: d.required_f64(&["high_freq_factor"])?,
                original: original.ok_or_else(|| d.missing(&[ORIGINAL]))?,
            }),
            Some("yarn") => {
                let given = d.f64(&["factor"])?;
                let original = match original {
                    Some(n) => n,
                    None => self.default(ORIGINAL, context_length),
                };
                let factor = match given {
                    Some(factor) => factor,
                    None => self.default("factor", f64::from(context_length) / f64::from(original.max(1))),
                };
                let mscale = |factor: f64, m: f64| {
                    if factor > 1.0 {
                        0.1 * m * libm::log(factor) + 1.0
                    } else {
                        1.0
                    }
                };
                let attention_factor = match (
                    d.f64(&["attention_factor"])?,
                    d.f64(&["mscale"])?.filter(|m| *m != 0.0),
                    d.f64(&["mscale_all_dim"])?.filter(|m| *m != 0.0),
                ) {
                    (Some(given), _, _) => given,
                    (None, Some(m), Some(all)) => mscale(factor, m) / mscale(factor, all),
                    (None, _, _) => mscale(factor, 1.0),
                };
                Ok(RopeScaling::Yarn {
                    factor,
                    original,
                    beta_fast: match d.f64(&["beta_fast"])? {
                        Some(x) => x,
                        None => self.default("beta_fast", 32.0),
                    },
                    beta_slow: match d.f64(&["beta_slow"])? {
                        Some(x) => x,
                        None => self.default("beta_slow", 1.0),
                    },
                    truncate: d.bool("truncate")?.unwrap_or(true),
                    attention_factor,
                })
            }
            Some("longrope" | "su") => {
                let original = original.ok_or_else(|| d.missing(&[ORIGINAL]))?;
                let attention_factor = match (d.f64(&["attention_factor"])?, d.f64(&["factor"])?) {
                    (Some(given), _) => given,
                    (None, factor) => {
                        let factor = factor.unwrap_or(f64::from(context_length) / f64::from(original.max(1)));
                        if factor > 1.0 && original > 1 {
                            libm::sqrt(1.0 + libm::log(factor) / libm::log(f64::from(original)))
                        } else {
                            1.0
                        }
                    }
                };
                Ok(RopeScaling::LongRope {
                    short: d.numbers("short_factor")?,
                    long: d.numbers("long_factor")?,
                    original,
                    attention_factor,
                })
            }
            Some(other) => Err(self.unsupported(format!(
                "RoPE scaling of type `{}`",
                other.chars().take(40).collect::<String>()
            ))),
        }
    }
}

impl<'a> Object<'a> {
    /// The object under `key`, if it is one.
    fn object_if_object(&self, key: &str) -> Option<Object<'a>> {
        self.object(key).ok().flatten()
    }
}
