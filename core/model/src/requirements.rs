//! Which roles an architecture has, with which shapes.

use hoist_backend::{Role, Shape};

use crate::{Architecture, HyperParameters};

/// Whether a role must be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    Required,
    Optional,
    /// The output matrix: the token embedding stands in for it.
    OrTied,
}

/// What a role's values are, and so how they are stored when resident.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Looked up by row, never transposed.
    Embedding,
    /// Multiplied with.
    Matrix,
    /// Norm weights; in Hugging Face gemma files one is to be added to them.
    Norm,
    Bias,
}

/// One role of an architecture.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Requirement {
    pub(crate) role: Role,
    pub(crate) kind: Kind,
    pub(crate) shape: Shape,
    pub(crate) need: Need,
}

fn embedding(role: Role, rows: u64, cols: u64) -> Requirement {
    Requirement {
        role,
        kind: Kind::Embedding,
        shape: Shape::matrix(rows, cols),
        need: Need::Required,
    }
}

fn matrix(role: Role, rows: u64, cols: u64) -> Requirement {
    Requirement {
        role,
        kind: Kind::Matrix,
        shape: Shape::matrix(rows, cols),
        need: Need::Required,
    }
}

fn norm(role: Role, n: u64) -> Requirement {
    Requirement {
        role,
        kind: Kind::Norm,
        shape: Shape::vector(n),
        need: Need::Required,
    }
}

fn bias(role: Role, n: u64, need: Need) -> Requirement {
    Requirement {
        role,
        kind: Kind::Bias,
        shape: Shape::vector(n),
        need,
    }
}

/// Roles of the whole model.
pub(crate) fn of_model(architecture: Architecture, h: &HyperParameters) -> Vec<Requirement> {
    let (vocab, hidden) = (u64::from(h.vocab), u64::from(h.hidden));
    let mut roles = vec![embedding(Role::TokenEmbd, vocab, hidden)];
    if let Some(positions) = h.learned_positions {
        roles.push(embedding(Role::PositionEmbd, positions.into(), hidden));
    }
    roles.push(norm(Role::OutputNorm, hidden));
    if architecture == Architecture::Gpt2 {
        roles.push(bias(Role::OutputNormBias, hidden, Need::Required));
    }
    roles.push(Requirement {
        need: match h.tied_output {
            Some(false) => Need::Required,
            _ => Need::OrTied,
        },
        ..matrix(Role::Output, vocab, hidden)
    });
    // phi3 has an output bias in some Hugging Face classes, none in the released models.
    if architecture == Architecture::Phi3 {
        roles.push(bias(Role::OutputBias, vocab, Need::Optional));
    }
    roles
}

/// Roles of a layer.
pub(crate) fn of_layer(architecture: Architecture, h: &HyperParameters) -> Vec<Requirement> {
    use Architecture::*;
    use Need::*;
    let hidden = u64::from(h.hidden);
    let (q, kv, ffn) = (h.q_width(), h.kv_width(), u64::from(h.ffn));
    let head_dim = u64::from(h.head_dim);
    let gpt2 = architecture == Gpt2;
    // The metadata decides where it speaks; a bias that it rules out is no role.
    let by_flag = |flag: Option<bool>| match flag {
        Some(true) => Some(Required),
        Some(false) => None,
        None => Some(Optional),
    };
    let qkv_bias = match architecture {
        Qwen2 | Gpt2 => Some(Required),
        _ => by_flag(h.attention_bias),
    };
    let output_bias = match architecture {
        Gpt2 => Some(Required),
        Qwen2 => Some(Optional),
        _ => by_flag(h.attention_bias),
    };
    let ffn_bias = match architecture {
        Gpt2 => Some(Required),
        Llama | Mistral => by_flag(h.mlp_bias),
        _ => None,
    };

    let mut roles = vec![norm(Role::AttnNorm, hidden)];
    if gpt2 {
        roles.push(bias(Role::AttnNormBias, hidden, Required));
    }
    for (weight, weight_bias, rows) in [
        (Role::AttnQ, Role::AttnQBias, q),
        (Role::AttnK, Role::AttnKBias, kv),
        (Role::AttnV, Role::AttnVBias, kv),
    ] {
        roles.push(matrix(weight, rows, hidden));
        roles.extend(qkv_bias.map(|need| bias(weight_bias, rows, need)));
    }
    if matches!(architecture, Qwen3 | Qwen3Moe | Gemma3) {
        roles.push(norm(Role::AttnQNorm, head_dim));
        roles.push(norm(Role::AttnKNorm, head_dim));
    }
    roles.push(matrix(Role::AttnOutput, hidden, q));
    roles.extend(output_bias.map(|need| bias(Role::AttnOutputBias, hidden, need)));
    if architecture.is_gemma() {
        roles.push(norm(Role::PostAttnNorm, hidden));
    }

    roles.push(norm(Role::FfnNorm, hidden));
    if gpt2 {
        roles.push(bias(Role::FfnNormBias, hidden, Required));
    }
    if let Some(experts) = h.experts {
        let count = u64::from(experts.count);
        let stacked = |role, rows, cols| Requirement {
            shape: Shape {
                matrices: count,
                rows,
                cols,
            },
            ..matrix(role, rows, cols)
        };
        roles.push(matrix(Role::Router, count, hidden));
        roles.push(stacked(Role::FfnGateExps, ffn, hidden));
        roles.push(stacked(Role::FfnUpExps, ffn, hidden));
        roles.push(stacked(Role::FfnDownExps, hidden, ffn));
    } else {
        if !gpt2 {
            roles.push(matrix(Role::FfnGate, ffn, hidden));
            roles.extend(ffn_bias.map(|need| bias(Role::FfnGateBias, ffn, need)));
        }
        roles.push(matrix(Role::FfnUp, ffn, hidden));
        roles.extend(ffn_bias.map(|need| bias(Role::FfnUpBias, ffn, need)));
        roles.push(matrix(Role::FfnDown, hidden, ffn));
        roles.extend(ffn_bias.map(|need| bias(Role::FfnDownBias, hidden, need)));
    }
    if architecture.is_gemma() {
        roles.push(norm(Role::PostFfnNorm, hidden));
    }
    roles
}
