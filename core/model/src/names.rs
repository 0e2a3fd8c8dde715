use hoist_backend::Role;

use crate::Architecture;

/// Who names tensors that way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Convention {
    /// `model.layers.N.self_attn.q_proj.weight`, with or without the `model.`.
    HuggingFace,
    /// `transformer.h.N.attn.c_attn.weight`, with or without the `transformer.`.
    Gpt2,
    /// `blk.N.attn_q.weight`.
    Gguf,
}

/// What a source tensor holds: one role, several fused ones, or something for the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// All of one role.
    One(Role),
    /// Rows of q, then k, then v.
    Qkv,
    /// Biases of q, then k, then v.
    QkvBias,
    /// Rows of gate, then up.
    GateUp,
    /// One expert's matrix of a stacked role; the number stands in the name.
    Expert(Role, u32),
    /// For each expert, rows of gate, then up.
    ExpertsGateUp,
    /// Divisors of RoPE frequencies.
    RopeFreqs,
    /// Long-rope divisors for long contexts.
    RopeFactorsLong,
    /// Long-rope divisors for short contexts.
    RopeFactorsShort,
    /// Known and never needed: masks and tables that follow from the configuration.
    Redundant,
}

/// A tensor's name, understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Meaning {
    pub(crate) convention: Convention,
    pub(crate) layer: Option<u32>,
    pub(crate) part: Part,
}

use Convention::{Gguf, Gpt2, HuggingFace};
use Part::*;

type Names = &'static [(&'static str, Part)];

/// Prefixes that Hugging Face models put in front of the same names; a bare export has none.
const HF_PREFIXES: &[&str] = &[
    "model.language_model.",
    "language_model.model.",
    "language_model.",
    "model.",
    "transformer.",
];

const HF_MODEL: Names = &[
    ("embed_tokens.weight", One(Role::TokenEmbd)),
    ("norm.weight", One(Role::OutputNorm)),
    ("lm_head.weight", One(Role::Output)),
    ("lm_head.bias", One(Role::OutputBias)),
    ("rotary_emb.inv_freq", Redundant),
];

const HF_LAYER: Names = &[
    ("self_attn.q_proj.weight", One(Role::AttnQ)),
    ("self_attn.q_proj.bias", One(Role::AttnQBias)),
    ("self_attn.k_proj.weight", One(Role::AttnK)),
    ("self_attn.k_proj.bias", One(Role::AttnKBias)),
    ("self_attn.v_proj.weight", One(Role::AttnV)),
    ("self_attn.v_proj.bias", One(Role::AttnVBias)),
    ("self_attn.qkv_proj.weight", Qkv),
    ("self_attn.qkv_proj.bias", QkvBias),
    ("self_attn.o_proj.weight", One(Role::AttnOutput)),
    ("self_attn.o_proj.bias", One(Role::AttnOutputBias)),
    ("self_attn.q_norm.weight", One(Role::AttnQNorm)),
    ("self_attn.k_norm.weight", One(Role::AttnKNorm)),
    ("self_attn.rotary_emb.inv_freq", Redundant),
    ("input_layernorm.weight", One(Role::AttnNorm)),
    ("mlp.gate_proj.weight", One(Role::FfnGate)),
    ("mlp.gate_proj.bias", One(Role::FfnGateBias)),
    ("mlp.up_proj.weight", One(Role::FfnUp)),
    ("mlp.up_proj.bias", One(Role::FfnUpBias)),
    ("mlp.gate_up_proj.weight", GateUp),
    ("mlp.down_proj.weight", One(Role::FfnDown)),
    ("mlp.down_proj.bias", One(Role::FfnDownBias)),
    ("mlp.gate.weight", One(Role::Router)),
    ("mlp.experts.gate_up_proj", ExpertsGateUp),
    ("mlp.experts.down_proj", One(Role::FfnDownExps)),
];

/// Names below `mlp.experts.E.`.
const HF_EXPERT: &[(&str, Role)] = &[
    ("gate_proj.weight", Role::FfnGateExps),
    ("up_proj.weight", Role::FfnUpExps),
    ("down_proj.weight", Role::FfnDownExps),
];

/// Where nothing follows the blocks, the norm *after* attention is the one *before* the feed-forward block.
const HF_PRE_NORMS: Names = &[("post_attention_layernorm.weight", One(Role::FfnNorm))];

const HF_POST_NORMS: Names = &[
    ("post_attention_layernorm.weight", One(Role::PostAttnNorm)),
    ("pre_feedforward_layernorm.weight", One(Role::FfnNorm)),
    ("post_feedforward_layernorm.weight", One(Role::PostFfnNorm)),
];

const GPT2_MODEL: Names = &[
    ("wte.weight", One(Role::TokenEmbd)),
    ("wpe.weight", One(Role::PositionEmbd)),
    ("ln_f.weight", One(Role::OutputNorm)),
    ("ln_f.bias", One(Role::OutputNormBias)),
    ("lm_head.weight", One(Role::Output)),
];

const GPT2_LAYER: Names = &[
    ("ln_1.weight", One(Role::AttnNorm)),
    ("ln_1.bias", One(Role::AttnNormBias)),
    ("attn.c_attn.weight", Qkv),
    ("attn.c_attn.bias", QkvBias),
    ("attn.c_proj.weight", One(Role::AttnOutput)),
    ("attn.c_proj.bias", One(Role::AttnOutputBias)),
    ("attn.bias", Redundant),
    ("attn.masked_bias", Redundant),
    ("ln_2.weight", One(Role::FfnNorm)),
    ("ln_2.bias", One(Role::FfnNormBias)),
    ("mlp.c_fc.weight", One(Role::FfnUp)),
    ("mlp.c_fc.bias", One(Role::FfnUpBias)),
    ("mlp.c_proj.weight", One(Role::FfnDown)),
    ("mlp.c_proj.bias", One(Role::FfnDownBias)),
];

const GGUF_MODEL: Names = &[
    ("token_embd.weight", One(Role::TokenEmbd)),
    ("position_embd.weight", One(Role::PositionEmbd)),
    ("output_norm.weight", One(Role::OutputNorm)),
    ("output_norm.bias", One(Role::OutputNormBias)),
    ("output.weight", One(Role::Output)),
    ("output.bias", One(Role::OutputBias)),
    ("rope_freqs.weight", RopeFreqs),
    ("rope_factors_long.weight", RopeFactorsLong),
    ("rope_factors_short.weight", RopeFactorsShort),
];

const GGUF_LAYER: Names = &[
    ("attn_norm.weight", One(Role::AttnNorm)),
    ("attn_norm.bias", One(Role::AttnNormBias)),
    ("attn_q.weight", One(Role::AttnQ)),
    ("attn_q.bias", One(Role::AttnQBias)),
    ("attn_k.weight", One(Role::AttnK)),
    ("attn_k.bias", One(Role::AttnKBias)),
    ("attn_v.weight", One(Role::AttnV)),
    ("attn_v.bias", One(Role::AttnVBias)),
    ("attn_qkv.weight", Qkv),
    ("attn_qkv.bias", QkvBias),
    ("attn_output.weight", One(Role::AttnOutput)),
    ("attn_output.bias", One(Role::AttnOutputBias)),
    ("attn_q_norm.weight", One(Role::AttnQNorm)),
    ("attn_k_norm.weight", One(Role::AttnKNorm)),
    ("post_attention_norm.weight", One(Role::PostAttnNorm)),
    ("ffn_norm.weight", One(Role::FfnNorm)),
    ("ffn_norm.bias", One(Role::FfnNormBias)),
    ("ffn_gate.weight", One(Role::FfnGate)),
    ("ffn_gate.bias", One(Role::FfnGateBias)),
    ("ffn_up.bias", One(Role::FfnUpBias)),
    ("ffn_down.weight", One(Role::FfnDown)),
    ("ffn_down.bias", One(Role::FfnDownBias)),
    ("post_ffw_norm.weight", One(Role::PostFfnNorm)),
    ("ffn_gate_inp.weight", One(Role::Router)),
    ("ffn_gate_exps.weight", One(Role::FfnGateExps)),
    ("ffn_up_exps.weight", One(Role::FfnUpExps)),
    ("ffn_down_exps.weight", One(Role::FfnDownExps)),
    // Masks that old converters left in.
    ("attn.bias", Redundant),
    ("attn.masked_bias", Redundant),
];

const GGUF_UP: Names = &[("ffn_up.weight", One(Role::FfnUp))];

/// phi3's `ffn_up` holds gate and up.
const GGUF_GATE_UP: Names = &[("ffn_up.weight", GateUp)];

/// The tables of an architecture: (convention, names of the whole model, names of a layer).
fn tables(architecture: Architecture) -> [(Convention, [Names; 1], [Names; 2]); 3] {
    let norms = if architecture.is_gemma() {
        HF_POST_NORMS
    } else {
        HF_PRE_NORMS
    };
    let up = if architecture == Architecture::Phi3 {
        GGUF_GATE_UP
    } else {
        GGUF_UP
    };
    [
        (HuggingFace, [HF_MODEL], [HF_LAYER, norms]),
        (Gpt2, [GPT2_MODEL], [GPT2_LAYER, &[]]),
        (Gguf, [GGUF_MODEL], [GGUF_LAYER, up]),
    ]
}

/// Splits `N.rest`; a number is digits without a leading zero.
fn numbered(name: &str) -> Option<(u32, &str)> {
    let (number, rest) = name.split_once('.')?;
    let canonical = number == "0" || !number.starts_with('0');
    (canonical && number.bytes().all(|b| b.is_ascii_digit()))
        .then(|| number.parse().ok().map(|n| (n, rest)))
        .flatten()
}

/// Splits a name into convention (if the shape of the name tells), layer and what is left.
fn split(name: &str) -> (Option<Convention>, Option<u32>, &str) {
    if let Some((layer, rest)) = name.strip_prefix("blk.").and_then(numbered) {
        return (Some(Gguf), Some(layer), rest);
    }
    let bare = HF_PREFIXES
        .iter()
        .find_map(|prefix| name.strip_prefix(prefix))
        .unwrap_or(name);
    if let Some((layer, rest)) = bare.strip_prefix("layers.").and_then(numbered) {
        return (Some(HuggingFace), Some(layer), rest);
    }
    if let Some((layer, rest)) = bare.strip_prefix("h.").and_then(numbered) {
        return (Some(Gpt2), Some(layer), rest);
    }
    (None, None, bare)
}

/// What a tensor of that name holds in that architecture; `None` if no convention uses the name.
pub(crate) fn parse(architecture: Architecture, name: &str) -> Option<Meaning> {
    let (found, layer, rest) = split(name);
    for (convention, model, layers) in tables(architecture) {
        if found.is_some_and(|c| c != convention) {
            continue;
        }
        // GGUF names carry no prefix: `model.output.weight` is not one.
        let rest = if convention == Gguf && layer.is_none() {
            name
        } else {
            rest
        };
        let mut names = if layer.is_some() {
            layers.iter()
        } else {
            model.iter()
        };
        let part = names
            .find_map(|table| table.iter().find(|(n, _)| *n == rest))
            .map(|(_, part)| *part)
            .or_else(|| {
                let (expert, rest) = rest.strip_prefix("mlp.experts.").and_then(numbered)?;
                let (_, role) = HF_EXPERT.iter().find(|(n, _)| *n == rest)?;
                (found == Some(HuggingFace)).then_some(Expert(*role, expert))
            });
        if let Some(part) = part {
            return Some(Meaning {
                convention,
                layer,
                part,
            });
        }
    }
    None
}

/// Whether a name is one that some transformer convention uses for a weight, whatever the architecture.
pub(crate) fn is_transformer(name: &str) -> bool {
    [Architecture::Llama, Architecture::Gemma3, Architecture::Phi3]
        .into_iter()
        .any(|a| parse(a, name).is_some_and(|m| m.layer.is_some() || m.part == One(Role::TokenEmbd)))
}

/// Whether a tensor of `part` can yield `role`.
fn yields(part: Part, role: Role) -> bool {
    match part {
        One(r) => r == role,
        Qkv => matches!(role, Role::AttnQ | Role::AttnK | Role::AttnV),
        QkvBias => matches!(role, Role::AttnQBias | Role::AttnKBias | Role::AttnVBias),
        GateUp => matches!(role, Role::FfnGate | Role::FfnUp),
        ExpertsGateUp => matches!(role, Role::FfnGateExps | Role::FfnUpExps),
        Expert(r, _) => r == role,
        RopeFreqs | RopeFactorsLong | RopeFactorsShort | Redundant => false,
    }
}

/// Every source name that could have held a role: what an error lists as tried.
pub(crate) fn candidates(architecture: Architecture, layer: Option<u32>, role: Role) -> Vec<String> {
    let mut names = Vec::new();
    for (convention, model, layers) in tables(architecture) {
        // gpt2 is the only architecture with gpt2's names, and has no others outside GGUF.
        if (convention == Gpt2) != (architecture == Architecture::Gpt2) && convention != Gguf {
            continue;
        }
        let prefix = match (convention, layer) {
            (Gguf, Some(l)) => vec![format!("blk.{l}.")],
            (Gguf, None) => vec![String::new()],
            (HuggingFace, Some(l)) => vec![format!("model.layers.{l}."), format!("layers.{l}.")],
            (HuggingFace, None) => vec!["model.".into(), String::new()],
            (Gpt2, Some(l)) => vec![format!("transformer.h.{l}."), format!("h.{l}.")],
            (Gpt2, None) => vec!["transformer.".into(), String::new()],
        };
        let tables: Vec<Names> = match layer {
            Some(_) => layers.to_vec(),
            None => model.to_vec(),
        };
        for (name, _) in tables
            .into_iter()
            .flatten()
            .filter(|(_, part)| yields(*part, role))
        {
            // `lm_head` stands beside the model, not in it.
            let only_bare = name.starts_with("lm_head");
            names.extend(
                prefix
                    .iter()
                    .filter(|p| !only_bare || p.is_empty())
                    .map(|p| format!("{p}{name}")),
            );
        }
        if convention == HuggingFace
            && let Some(l) = layer
            && let Some((name, _)) = HF_EXPERT.iter().find(|(_, r)| *r == role)
        {
            names.push(format!("model.layers.{l}.mlp.experts.E.{name}"));
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(architecture: Architecture, name: &str) -> Option<(Convention, Option<u32>, Part)> {
        parse(architecture, name).map(|m| (m.convention, m.layer, m.part))
    }

    #[test]
    fn the_same_role_has_a_name_in_every_convention() {
        let llama = Architecture::Llama;
        let q = |c, l| Some((c, Some(l), One(Role::AttnQ)));
        assert_eq!(
            part(llama, "model.layers.7.self_attn.q_proj.weight"),
            q(HuggingFace, 7)
        );
        assert_eq!(part(llama, "layers.0.self_attn.q_proj.weight"), q(HuggingFace, 0));
        assert_eq!(part(llama, "blk.12.attn_q.weight"), q(Gguf, 12));
        assert_eq!(
            part(Architecture::Gpt2, "transformer.h.3.attn.c_attn.weight"),
            Some((Gpt2, Some(3), Qkv))
        );
        assert_eq!(
            part(Architecture::Gpt2, "h.3.attn.c_attn.bias"),
            Some((Gpt2, Some(3), QkvBias))
        );
        assert_eq!(
            part(
                Architecture::Qwen3Moe,
                "model.layers.1.mlp.experts.127.up_proj.weight"
            ),
            Some((HuggingFace, Some(1), Expert(Role::FfnUpExps, 127)))
        );
    }

    #[test]
    fn the_norm_after_attention_means_another_role_in_gemma() {
        let name = "model.layers.0.post_attention_layernorm.weight";
        assert_eq!(parse(Architecture::Llama, name).unwrap().part, One(Role::FfnNorm));
        assert_eq!(
            parse(Architecture::Gemma2, name).unwrap().part,
            One(Role::PostAttnNorm)
        );
    }

    #[test]
    fn phi3_up_holds_gate_and_up_in_gguf_only() {
        assert_eq!(
            parse(Architecture::Phi3, "blk.0.ffn_up.weight").unwrap().part,
            GateUp
        );
        assert_eq!(
            parse(Architecture::Llama, "blk.0.ffn_up.weight").unwrap().part,
            One(Role::FfnUp)
        );
    }

    #[test]
    fn malformed_layer_numbers_are_no_names() {
        for name in [
            "blk.01.attn_q.weight",
            "blk.-1.attn_q.weight",
            "blk.+1.attn_q.weight",
            "blk.4294967296.attn_q.weight",
            "blk..attn_q.weight",
            "blk.0",
            "model.output.weight",
            "",
        ] {
            assert_eq!(parse(Architecture::Llama, name), None, "{name}");
        }
        assert!(parse(Architecture::Llama, "blk.4294967295.attn_q.weight").is_some());
    }

    #[test]
    fn candidates_parse_back_to_their_role() {
        for architecture in Architecture::all() {
            for role in Role::all() {
                for layer in [None, Some(5)] {
                    for name in candidates(architecture, layer, role) {
                        let name = name.replace(".E.", ".9.");
                        let meaning = parse(architecture, &name).unwrap();
                        assert!(yields(meaning.part, role), "{architecture:?} {name}");
                        assert_eq!(meaning.layer, layer, "{name}");
                    }
                }
            }
        }
    }
}
