pub(crate) mod gguf;
pub(crate) mod json;

use hoist_backend::{ActivationKind, RopeStyle};

use crate::{Error, Result};

/// The numbers of an architecture that its forward pass uses: read from the file, checked against each other.
#[derive(Clone, Debug, PartialEq)]
pub struct HyperParameters {
    /// Number of layers.
    pub layers: u32,
    /// Tokens: rows of the embedding.
    pub vocab: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Positions that the model was made for.
    pub context_length: u32,
    /// Query heads.
    pub heads: u32,
    /// Key/value heads; divides `heads`.
    pub kv_heads: u32,
    /// Elements of a head; need not be `hidden / heads`.
    pub head_dim: u32,
    /// Inner width of the feed-forward block; of one expert, if there are experts.
    pub ffn: u32,
    /// Experts, if the feed-forward block has them.
    pub experts: Option<ExpertParameters>,
    /// Epsilon of all norms.
    pub norm_eps: f32,
    /// Non-linearity of the feed-forward block.
    pub activation: ActivationKind,
    /// What the embedding is multiplied with: √hidden in gemma.
    pub embedding_scale: Option<f32>,
    /// What `q · k` is multiplied with.
    pub attention_scale: f32,
    /// `cap · tanh(score / cap)` of attention scores.
    pub attention_soft_cap: Option<f32>,
    /// `cap · tanh(logit / cap)` of logits.
    pub final_soft_cap: Option<f32>,
    /// RoPE parameters; empty for learned positions. gemma3 has a second set for its local layers.
    pub ropes: Vec<RopeParameters>,
    /// Attention of each layer; `layers` of them.
    pub attention: Vec<LayerAttention>,
    /// Learned positions: rows of the position embedding.
    pub learned_positions: Option<u32>,
    /// Whether q, k, v and attention output have biases, where the file's metadata says so.
    pub attention_bias: Option<bool>,
    /// Whether gate, up and down have biases, where the file's metadata says so.
    pub mlp_bias: Option<bool>,
    /// Whether the output matrix is the token embedding, where the file's metadata says so.
    pub tied_output: Option<bool>,
}

/// Mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertParameters {
    /// Experts of a layer.
    pub count: u32,
    /// Experts that a token uses.
    pub used: u32,
    /// Whether the probabilities of the used ones are divided by their sum.
    pub normalise: bool,
}

/// What differs from layer to layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerAttention {
    /// Positions seen, the token's own included; all if `None`.
    pub window: Option<u32>,
    /// Index into [`HyperParameters::ropes`].
    pub rope: Option<usize>,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeParameters {
    /// Which elements are turned together.
    pub style: RopeStyle,
    /// Elements of a head that are turned; even, at most `head_dim`.
    pub n_rot: u32,
    /// Frequency base: pair `j` turns by `base^(-2j / n_rot)` a position.
    pub base: f64,
    /// How frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
    /// Divisors of the frequencies from a GGUF file's `rope_freqs.weight`; `n_rot / 2` of them.
    pub frequency_divisors: Option<Vec<f32>>,
}

/// How RoPE frequencies are stretched for long contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by one factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, those between interpolated.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original / low` are low frequencies.
        low: f64,
        /// Wavelengths below `original / high` are high frequencies.
        high: f64,
        /// Context before stretching.
        original: u32,
    },
    /// YaRN (Peng et al., 2023, arXiv:2309.00071).
    Yarn {
        /// Divisor of low frequencies.
        factor: f64,
        /// Context before stretching.
        original: u32,
        /// Turns within the original context above which a frequency is kept.
        beta_fast: f64,
        /// Turns below which it is divided.
        beta_slow: f64,
        /// Whether the bounds of the ramp are rounded outwards to whole pairs.
        truncate: bool,
        /// Multiplies cos and sin.
        attention_factor: f64,
    },
    /// Long-rope (Ding et al., 2024, arXiv:2402.13753): a divisor for each pair.
    LongRope {
        /// Divisors for contexts up to `original`; `n_rot / 2` of them.
        short: Vec<f64>,
        /// Divisors for longer ones.
        long: Vec<f64>,
        /// Context before stretching.
        original: u32,
        /// Multiplies cos and sin.
        attention_factor: f64,
    },
}

impl HyperParameters {
    /// Rows of the query matrix: `heads · head_dim`.
    pub fn q_width(&self) -> u64 {
        u64::from(self.heads) * u64::from(self.head_dim)
    }

    /// Rows of the key and of the value matrix: `kv_heads · head_dim`.
    pub fn kv_width(&self) -> u64 {
        u64::from(self.kv_heads) * u64::from(self.head_dim)
    }
}

/// `1 / √scalar`, in f32: what attention scores are multiplied with.
pub(crate) fn attention_scale(scalar: f64) -> f32 {
    1.0 / (scalar as f32).sqrt()
}

/// The window of each layer, where all but every `period`th slide; all of them for a period of 0.
pub(crate) fn windows(layers: u32, window: Option<u32>, period: u32) -> Vec<Option<u32>> {
    (0..layers)
        .map(|layer| window.filter(|_| period == 0 || layer % period < period - 1))
        .collect()
}

/// A model has several tensors a layer, so a layer count is bounded by what the file was checked to hold.
pub(crate) fn check_layers(place: &'static str, key: &str, layers: u32, tensors: usize) -> Result<()> {
    if layers == 0 || layers as usize > tensors {
        return Err(Error::BadValue {
            place,
            key: key.into(),
            expected: format!("a number from 1 to the file's {tensors} tensors"),
            found: layers.to_string(),
        });
    }
    Ok(())
}

/// Hyper-parameters as read, before they are held against each other.
pub(crate) struct Draft {
    pub(crate) place: &'static str,
    pub(crate) hyper: HyperParameters,
}

impl Draft {
    /// Holds the numbers against each other, so that what follows can divide and multiply them.
    ///
    /// # Errors
    /// [`Error::BadValue`], naming the parameter as [`HyperParameters`] does.
    pub(crate) fn check(self) -> Result<HyperParameters> {
        let h = &self.hyper;
        let bad = |key: &str, expected: String, found: String| {
            Err(Error::BadValue {
                place: self.place,
                key: key.into(),
                expected,
                found,
            })
        };
        for (key, n) in [
            ("vocab", h.vocab),
            ("hidden", h.hidden),
            ("context_length", h.context_length),
            ("heads", h.heads),
            ("kv_heads", h.kv_heads),
            ("head_dim", h.head_dim),
            ("ffn", h.ffn),
            ("learned_positions", h.learned_positions.unwrap_or(1)),
        ] {
            if n == 0 {
                return bad(key, "at least 1".into(), "0".into());
            }
        }
        if !h.heads.is_multiple_of(h.kv_heads) {
            return bad(
                "kv_heads",
                format!("a divisor of the {} heads", h.heads),
                h.kv_heads.to_string(),
            );
        }
        for (key, width) in [
            ("heads · head_dim", h.q_width()),
            ("kv_heads · head_dim", h.kv_width()),
        ] {
            if u32::try_from(width).is_err() {
                return bad(key, "below 2^32".into(), width.to_string());
            }
        }
        if let Some(e) = h.experts
            && (e.used == 0 || e.used > e.count)
        {
            return bad(
                "experts used",
                format!("a number from 1 to {}", e.count),
                e.used.to_string(),
            );
        }
        for (key, x) in [
            ("norm_eps", Some(h.norm_eps)),
            ("attention_scale", Some(h.attention_scale)),
            ("attention_soft_cap", h.attention_soft_cap),
            ("final_soft_cap", h.final_soft_cap),
        ] {
            if let Some(x) = x.filter(|x| !(x.is_finite() && *x > 0.0)) {
                return bad(key, "a positive f32".into(), x.to_string());
            }
        }
        for attention in &h.attention {
            if attention.window == Some(0) {
                return bad("window", "at least 1".into(), "0".into());
            }
        }
        for rope in &h.ropes {
            self.check_rope(rope)?;
        }
        Ok(self.hyper)
    }

    fn check_rope(&self, rope: &RopeParameters) -> Result<()> {
        let bad = |key: &str, expected: String, found: String| {
            Err(Error::BadValue {
                place: self.place,
                key: key.into(),
                expected,
                found,
            })
        };
        let head_dim = self.hyper.head_dim;
        if rope.n_rot == 0 || !rope.n_rot.is_multiple_of(2) || rope.n_rot > head_dim {
            return bad(
                "rope dimensions",
                format!("an even number from 2 to the head's {head_dim}"),
                rope.n_rot.to_string(),
            );
        }
        if !(rope.base.is_finite() && rope.base > 1.0) {
            return bad(
                "rope base",
                "a finite number above 1".into(),
                rope.base.to_string(),
            );
        }
        let pairs = rope.n_rot as usize / 2;
        let divisors = |key: &str, values: &[f64]| {
            if values.len() != pairs {
                return bad(key, format!("{pairs} values"), values.len().to_string());
            }
            match values.iter().find(|x| !(x.is_finite() && **x > 0.0)) {
                Some(x) => bad(key, "positive numbers".into(), x.to_string()),
                None => Ok(()),
            }
        };
        if let Some(values) = &rope.frequency_divisors {
            let wide: Vec<f64> = values.iter().map(|x| f64::from(*x)).collect();
            divisors("rope_freqs", &wide)?;
        }
        let positive =
            |values: &[(&str, f64)]| match values.iter().find(|(_, x)| !(x.is_finite() && *x > 0.0)) {
                Some((key, x)) => bad(key, "a positive number".into(), x.to_string()),
                None => Ok(()),
            };
        let nonzero = |original: u32| match original {
            0 => bad("original context", "at least 1".into(), "0".into()),
            _ => Ok(()),
        };
        match &rope.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive(&[("rope scaling factor", *factor)]),
            RopeScaling::Llama3 {
                factor,
                low,
                high,
                original,
            } => {
                positive(&[
                    ("rope scaling factor", *factor),
                    ("low_freq_factor", *low),
                    ("high_freq_factor", *high),
                ])?;
                if high <= low {
                    return bad("high_freq_factor", format!("above {low}"), high.to_string());
                }
                nonzero(*original)
            }
            RopeScaling::Yarn {
                factor,
                original,
                beta_fast,
                beta_slow,
                attention_factor,
                ..
            } => {
                positive(&[
                    ("rope scaling factor", *factor),
                    ("beta_fast", *beta_fast),
                    ("beta_slow", *beta_slow),
                    ("attention_factor", *attention_factor),
                ])?;
                nonzero(*original)
            }
            RopeScaling::LongRope {
                short,
                long,
                original,
                attention_factor,
            } => {
                divisors("short factors", short)?;
                divisors("long factors", long)?;
                positive(&[("attention_factor", *attention_factor)])?;
                nonzero(*original)
            }
        }
    }
}
