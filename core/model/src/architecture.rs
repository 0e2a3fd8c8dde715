use hoist_backend::RopeStyle;
use hoist_formats::Format;

/// An architecture that Hoist knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each variant is the architecture of that name")]
pub enum Architecture {
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

/// Whose conventions the values of a file follow: GGUF converters permute llama's q and k rows and fold the one that is
/// added to gemma's norm weights; Hugging Face files do neither.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lineage {
    /// As `convert_hf_to_gguf` writes values.
    Gguf,
    /// As `transformers` saves them.
    HuggingFace,
}

use Architecture::*;

/// Architecture, name in GGUF, `model_type`s in config.json, class in config.json.
type Row = (
    Architecture,
    Option<&'static str>,
    &'static [&'static str],
    &'static str,
);

const TABLE: &[Row] = &[
    (Llama, Some("llama"), &["llama"], "LlamaForCausalLM"),
    // GGUF files of Mistral models say `llama`.
    (Mistral, None, &["mistral"], "MistralForCausalLM"),
    (Qwen2, Some("qwen2"), &["qwen2"], "Qwen2ForCausalLM"),
    (Qwen3, Some("qwen3"), &["qwen3"], "Qwen3ForCausalLM"),
    (Qwen3Moe, Some("qwen3moe"), &["qwen3_moe"], "Qwen3MoeForCausalLM"),
    (Gemma2, Some("gemma2"), &["gemma2"], "Gemma2ForCausalLM"),
    (
        Gemma3,
        Some("gemma3"),
        &["gemma3_text", "gemma3"],
        "Gemma3ForCausalLM",
    ),
    (Phi3, Some("phi3"), &["phi3"], "Phi3ForCausalLM"),
    (Gpt2, Some("gpt2"), &["gpt2"], "GPT2LMHeadModel"),
];

impl Architecture {
    /// Every architecture.
    pub fn all() -> impl ExactSizeIterator<Item = Architecture> + Clone {
        TABLE.iter().map(|row| row.0)
    }

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Llama => "llama",
            Mistral => "mistral",
            Qwen2 => "qwen2",
            Qwen3 => "qwen3",
            Qwen3Moe => "qwen3moe",
            Gemma2 => "gemma2",
            Gemma3 => "gemma3",
            Phi3 => "phi3",
            Gpt2 => "gpt2",
        }
    }

    /// The architecture that a GGUF file's `general.architecture` names.
    pub(crate) fn from_gguf(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.1 == Some(name)).map(|row| row.0)
    }

    /// The architecture of a `model_type` or of a class name in config.json.
    pub(crate) fn from_hugging_face(name: &str) -> Option<Self> {
        TABLE
            .iter()
            .find(|row| row.2.contains(&name) || row.3 == name)
            .map(|row| row.0)
    }

    /// The architecture by any of its names, in any case: APR files hold whichever their importer saw.
    pub(crate) fn from_any(name: &str) -> Option<Self> {
        let lower = name.to_ascii_lowercase();
        TABLE
            .iter()
            .find(|row| {
                row.1 == Some(lower.as_str())
                    || row.2.contains(&lower.as_str())
                    || row.3.eq_ignore_ascii_case(name)
            })
            .map(|row| row.0)
    }

    /// The names that a format knows, for errors.
    pub(crate) fn known(format: Format) -> Vec<&'static str> {
        match format {
            Format::Gguf { .. } => TABLE.iter().filter_map(|row| row.1).collect(),
            _ => TABLE.iter().flat_map(|row| row.2).copied().collect(),
        }
    }

    /// Which elements of a head RoPE turns together; `None` for learned positions.
    pub(crate) fn rope_style(self, lineage: Lineage) -> Option<RopeStyle> {
        match (self, lineage) {
            (Gpt2, _) => None,
            (Llama | Mistral, Lineage::Gguf) => Some(RopeStyle::Interleaved),
            _ => Some(RopeStyle::HalfSplit),
        }
    }

    /// Whether it scales embeddings, adds one to norm weights and has norms after its blocks.
    pub(crate) fn is_gemma(self) -> bool {
        matches!(self, Gemma2 | Gemma3)
    }
}
