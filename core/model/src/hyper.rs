use hoist_backend::{ActivationKind, RopeStyle};

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
