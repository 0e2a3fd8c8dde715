//! The shapes of real models, from their published configurations, and tiny ones of every architecture.

/// An architecture, as GGUF and Hugging Face name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each variant is the architecture of that name")]
pub enum Arch {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Qwen3Moe,
    Gemma2,
    Gemma3,
    Phi3,
    Gpt2,
}

impl Arch {
    /// `general.architecture` in GGUF. Mistral models call themselves llama there.
    pub fn gguf(self) -> &'static str {
        match self {
            Arch::Llama | Arch::Mistral => "llama",
            Arch::Qwen2 => "qwen2",
            Arch::Qwen3 => "qwen3",
            Arch::Qwen3Moe => "qwen3moe",
            Arch::Gemma2 => "gemma2",
            Arch::Gemma3 => "gemma3",
            Arch::Phi3 => "phi3",
            Arch::Gpt2 => "gpt2",
        }
    }

    /// `model_type` and `architectures[0]` in `config.json`.
    pub fn hugging_face(self) -> (&'static str, &'static str) {
        match self {
            Arch::Llama => ("llama", "LlamaForCausalLM"),
            Arch::Mistral => ("mistral", "MistralForCausalLM"),
            Arch::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
            Arch::Qwen3 => ("qwen3", "Qwen3ForCausalLM"),
            Arch::Qwen3Moe => ("qwen3_moe", "Qwen3MoeForCausalLM"),
            Arch::Gemma2 => ("gemma2", "Gemma2ForCausalLM"),
            Arch::Gemma3 => ("gemma3_text", "Gemma3ForCausalLM"),
            Arch::Phi3 => ("phi3", "Phi3ForCausalLM"),
            Arch::Gpt2 => ("gpt2", "GPT2LMHeadModel"),
        }
    }
}

/// Experts of a mixture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    /// Experts a layer.
    pub count: u32,
    /// Experts a token uses.
    pub used: u32,
    /// Feed-forward width of one.
    pub n_ff: u32,
}

/// The dimensions of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModelShape {
    /// Name on the command line.
    pub name: &'static str,
    /// Architecture.
    pub arch: Arch,
    /// Layers.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Query heads.
    pub heads: u32,
    /// Key/value heads.
    pub kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Feed-forward width.
    pub n_ff: u32,
    /// Vocabulary.
    pub vocab: u32,
    /// Positions it was made for.
    pub context: u32,
    /// Base of the RoPE frequencies.
    pub rope_base: f32,
    /// Epsilon of the norms.
    pub eps: f32,
    /// Whether the output matrix is the token embedding.
    pub tied: bool,
    /// Sliding window, if there is one.
    pub window: Option<u32>,
    /// Experts, if it is a mixture.
    pub experts: Option<Experts>,
}

const TINY: ModelShape = ModelShape {
    name: "tiny-llama",
    arch: Arch::Llama,
    layers: 2,
    hidden: 256,
    heads: 4,
    kv_heads: 2,
    head_dim: 64,
    n_ff: 512,
    vocab: 512,
    context: 1024,
    rope_base: 10_000.0,
    eps: 1e-5,
    tied: false,
    window: None,
    experts: None,
};

/// Every shape, real ones first. Sources: the models' `config.json`.
pub const SHAPES: &[ModelShape] = &[
    ModelShape {
        name: "llama-3.1-8b",
        layers: 32,
        hidden: 4096,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        n_ff: 14_336,
        vocab: 128_256,
        context: 131_072,
        rope_base: 500_000.0,
        ..TINY
    },
    ModelShape {
        name: "llama-3.2-1b",
        layers: 16,
        hidden: 2048,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        n_ff: 8192,
        vocab: 128_256,
        context: 131_072,
        rope_base: 500_000.0,
        tied: true,
        ..TINY
    },
    ModelShape {
        name: "qwen2.5-7b",
        arch: Arch::Qwen2,
        layers: 28,
        hidden: 3584,
        heads: 28,
        kv_heads: 4,
        head_dim: 128,
        n_ff: 18_944,
        vocab: 152_064,
        context: 32_768,
        rope_base: 1_000_000.0,
        eps: 1e-6,
        ..TINY
    },
    ModelShape {
        name: "qwen2.5-1.5b",
        arch: Arch::Qwen2,
        layers: 28,
        hidden: 1536,
        heads: 12,
        kv_heads: 2,
        head_dim: 128,
        n_ff: 8960,
        vocab: 151_936,
        context: 32_768,
        rope_base: 1_000_000.0,
        eps: 1e-6,
        tied: true,
        ..TINY
    },
    ModelShape {
        name: "qwen3-30b-a3b",
        arch: Arch::Qwen3Moe,
        layers: 48,
        hidden: 2048,
        heads: 32,
        kv_heads: 4,
        head_dim: 128,
        n_ff: 6144,
        vocab: 151_936,
        context: 40_960,
        rope_base: 1_000_000.0,
        eps: 1e-6,
        experts: Some(Experts {
            count: 128,
            used: 8,
            n_ff: 768,
        }),
        ..TINY
    },
    ModelShape {
        name: "gemma-3-1b",
        arch: Arch::Gemma3,
        layers: 26,
        hidden: 1152,
        heads: 4,
        kv_heads: 1,
        head_dim: 256,
        n_ff: 6912,
        vocab: 262_144,
        context: 32_768,
        rope_base: 1_000_000.0,
        eps: 1e-6,
        tied: true,
        window: Some(512),
        ..TINY
    },
    ModelShape {
        name: "gemma-3-270m",
        arch: Arch::Gemma3,
        layers: 18,
        hidden: 640,
        heads: 4,
        kv_heads: 1,
        head_dim: 256,
        n_ff: 2048,
        vocab: 262_144,
        context: 32_768,
        rope_base: 1_000_000.0,
        eps: 1e-6,
        tied: true,
        window: Some(512),
        ..TINY
    },
    ModelShape {
        name: "smollm2-135m",
        layers: 30,
        hidden: 576,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        n_ff: 1536,
        vocab: 49_152,
        context: 8192,
        rope_base: 100_000.0,
        tied: true,
        ..TINY
    },
    TINY,
    ModelShape {
        name: "tiny-mistral",
        arch: Arch::Mistral,
        ..TINY
    },
    ModelShape {
        name: "tiny-qwen2",
        arch: Arch::Qwen2,
        tied: true,
        ..TINY
    },
    ModelShape {
        name: "tiny-qwen3",
        arch: Arch::Qwen3,
        head_dim: 96,
        ..TINY
    },
    ModelShape {
        name: "tiny-qwen3moe",
        arch: Arch::Qwen3Moe,
        experts: Some(Experts {
            count: 8,
            used: 2,
            n_ff: 256,
        }),
        ..TINY
    },
    ModelShape {
        name: "tiny-gemma2",
        arch: Arch::Gemma2,
        tied: true,
        window: Some(64),
        ..TINY
    },
    ModelShape {
        name: "tiny-gemma3",
        arch: Arch::Gemma3,
        layers: 7,
        tied: true,
        window: Some(64),
        ..TINY
    },
    ModelShape {
        name: "tiny-phi3",
        arch: Arch::Phi3,
        kv_heads: 4,
        ..TINY
    },
    ModelShape {
        name: "tiny-gpt2",
        arch: Arch::Gpt2,
        kv_heads: 4,
        n_ff: 1024,
        tied: true,
        ..TINY
    },
];

/// The shape of that name.
pub fn shape(name: &str) -> Option<&'static ModelShape> {
    SHAPES.iter().find(|s| s.name == name)
}
