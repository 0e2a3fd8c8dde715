//! Which tensors a shape has, under the names of each convention.

use crate::blocks::Spread;
use crate::shape::{Arch, ModelShape};

/// What a tensor is for: enough to name it and to choose its encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    TokenEmbd,
    PositionEmbd,
    OutputNorm,
    Output,
    AttnNorm,
    AttnQ,
    AttnK,
    AttnV,
    AttnQkv,
    AttnOutput,
    AttnQNorm,
    AttnKNorm,
    PostAttnNorm,
    FfnNorm,
    FfnGate,
    FfnUp,
    FfnDown,
    PostFfnNorm,
    Router,
    FfnGateExps,
    FfnUpExps,
    FfnDownExps,
}

/// A tensor: `[matrices, rows, cols]`, or `[cols]` for vectors.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tensor {
    pub(crate) part: Part,
    pub(crate) layer: Option<u32>,
    /// A bias beside the part's weight.
    pub(crate) bias: bool,
    pub(crate) matrices: u32,
    pub(crate) rows: u32,
    pub(crate) cols: u32,
}

impl Tensor {
    pub(crate) fn is_vector(&self) -> bool {
        self.rows == 1 && self.matrices == 1
    }

    pub(crate) fn is_norm(&self) -> bool {
        use Part as P;
        matches!(
            self.part,
            P::OutputNorm
                | P::AttnNorm
                | P::AttnQNorm
                | P::AttnKNorm
                | P::PostAttnNorm
                | P::FfnNorm
                | P::PostFfnNorm
        )
    }

    /// Deviations that keep activations near one: `1/sqrt(in)` for matrices.
    pub(crate) fn spread(&self, shape: &ModelShape, hugging_face: bool) -> Spread {
        let stores_minus_one = hugging_face && matches!(shape.arch, Arch::Gemma2 | Arch::Gemma3);
        let deviation = match self.part {
            _ if self.is_norm() && !self.bias && !stores_minus_one => return Spread::AroundOne,
            _ if self.is_norm() || self.bias => 0.1,
            // A tied embedding is an output matrix too; gemma multiplies its rows by sqrt(hidden).
            Part::TokenEmbd if shape.tied => 1.0 / (shape.hidden as f32).sqrt(),
            Part::TokenEmbd | Part::PositionEmbd => 0.5,
            _ => 1.0 / (self.cols as f32).sqrt(),
        };
        Spread::Centred { deviation }
    }
}

/// Every tensor of a shape, in the order they are written.
pub(crate) fn tensors(s: &ModelShape) -> Vec<Tensor> {
    use Part as P;
    let mut list = Vec::new();
    let mut add = |part, layer, rows, cols| {
        list.push(Tensor {
            part,
            layer,
            bias: false,
            matrices: 1,
            rows,
            cols,
        });
    };
    let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
    let gemma = matches!(s.arch, Arch::Gemma2 | Arch::Gemma3);
    let fused = matches!(s.arch, Arch::Phi3 | Arch::Gpt2);
    add(P::TokenEmbd, None, s.vocab, s.hidden);
    if s.arch == Arch::Gpt2 {
        add(P::PositionEmbd, None, s.context, s.hidden);
    }
    for l in 0..s.layers {
        let l = Some(l);
        add(P::AttnNorm, l, 1, s.hidden);
        if fused {
            add(P::AttnQkv, l, q + 2 * kv, s.hidden);
        } else {
            add(P::AttnQ, l, q, s.hidden);
            add(P::AttnK, l, kv, s.hidden);
            add(P::AttnV, l, kv, s.hidden);
        }
        if matches!(s.arch, Arch::Qwen3 | Arch::Qwen3Moe | Arch::Gemma3) {
            add(P::AttnQNorm, l, 1, s.head_dim);
            add(P::AttnKNorm, l, 1, s.head_dim);
        }
        add(P::AttnOutput, l, s.hidden, q);
        if gemma {
            add(P::PostAttnNorm, l, 1, s.hidden);
        }
        add(P::FfnNorm, l, 1, s.hidden);
        match (s.experts, s.arch) {
            (Some(e), _) => add(P::Router, l, e.count, s.hidden),
            (None, Arch::Phi3) => add(P::FfnUp, l, 2 * s.n_ff, s.hidden),
            (None, Arch::Gpt2) => add(P::FfnUp, l, s.n_ff, s.hidden),
            (None, _) => {
                add(P::FfnGate, l, s.n_ff, s.hidden);
                add(P::FfnUp, l, s.n_ff, s.hidden);
            }
        }
        match s.experts {
            Some(e) => {
                add(P::FfnGateExps, l, e.n_ff, s.hidden);
                add(P::FfnUpExps, l, e.n_ff, s.hidden);
                add(P::FfnDownExps, l, s.hidden, e.n_ff);
            }
            None => add(P::FfnDown, l, s.hidden, s.n_ff),
        }
        if gemma {
            add(P::PostFfnNorm, l, 1, s.hidden);
        }
    }
    add(P::OutputNorm, None, 1, s.hidden);
    if !s.tied {
        add(P::Output, None, s.vocab, s.hidden);
    }
    for t in &mut list {
        if matches!(t.part, P::FfnGateExps | P::FfnUpExps | P::FfnDownExps) {
            t.matrices = s.experts.map_or(1, |e| e.count);
        }
    }
    list.into_iter()
        .flat_map(|t| {
            let bias = has_bias(s.arch, t.part).then(|| Tensor {
                bias: true,
                rows: 1,
                cols: if t.is_norm() { t.cols } else { t.rows },
                ..t.clone()
            });
            std::iter::once(t).chain(bias)
        })
        .collect()
}

fn has_bias(arch: Arch, part: Part) -> bool {
    match arch {
        Arch::Qwen2 => matches!(part, Part::AttnQ | Part::AttnK | Part::AttnV),
        Arch::Gpt2 => !matches!(part, Part::TokenEmbd | Part::PositionEmbd | Part::Output),
        _ => false,
    }
}

/// The name in a GGUF file.
pub(crate) fn gguf_name(t: &Tensor) -> String {
    let stem = match t.part {
        Part::TokenEmbd => "token_embd",
        Part::PositionEmbd => "position_embd",
        Part::OutputNorm => "output_norm",
        Part::Output => "output",
        Part::AttnNorm => "attn_norm",
        Part::AttnQ => "attn_q",
        Part::AttnK => "attn_k",
        Part::AttnV => "attn_v",
        Part::AttnQkv => "attn_qkv",
        Part::AttnOutput => "attn_output",
        Part::AttnQNorm => "attn_q_norm",
        Part::AttnKNorm => "attn_k_norm",
        Part::PostAttnNorm => "post_attention_norm",
        Part::FfnNorm => "ffn_norm",
        Part::FfnGate => "ffn_gate",
        Part::FfnUp => "ffn_up",
        Part::FfnDown => "ffn_down",
        Part::PostFfnNorm => "post_ffw_norm",
        Part::Router => "ffn_gate_inp",
        Part::FfnGateExps => "ffn_gate_exps",
        Part::FfnUpExps => "ffn_up_exps",
        Part::FfnDownExps => "ffn_down_exps",
    };
    let suffix = if t.bias { "bias" } else { "weight" };
    match t.layer {
        Some(l) => format!("blk.{l}.{stem}.{suffix}"),
        None => format!("{stem}.{suffix}"),
    }
}

/// The name in a Hugging Face file; `expert` numbers the tensors that GGUF stacks.
pub(crate) fn hugging_face_name(arch: Arch, t: &Tensor, expert: u32) -> String {
    use Part as P;
    let gemma = matches!(arch, Arch::Gemma2 | Arch::Gemma3);
    let suffix = if t.bias { "bias" } else { "weight" };
    if arch == Arch::Gpt2 {
        let stem = match t.part {
            P::TokenEmbd => "wte",
            P::PositionEmbd => "wpe",
            P::OutputNorm => "ln_f",
            P::AttnNorm => "ln_1",
            P::AttnQkv => "attn.c_attn",
            P::AttnOutput => "attn.c_proj",
            P::FfnNorm => "ln_2",
            P::FfnUp => "mlp.c_fc",
            P::FfnDown => "mlp.c_proj",
            _ => "lm_head",
        };
        return match t.layer {
            Some(l) => format!("transformer.h.{l}.{stem}.{suffix}"),
            None => format!("transformer.{stem}.{suffix}"),
        };
    }
    let stem = match t.part {
        P::TokenEmbd => "embed_tokens",
        P::PositionEmbd => "embed_positions",
        P::OutputNorm => "norm",
        P::Output => return format!("lm_head.{suffix}"),
        P::AttnNorm => "input_layernorm",
        P::AttnQ => "self_attn.q_proj",
        P::AttnK => "self_attn.k_proj",
        P::AttnV => "self_attn.v_proj",
        P::AttnQkv => "self_attn.qkv_proj",
        P::AttnOutput => "self_attn.o_proj",
        P::AttnQNorm => "self_attn.q_norm",
        P::AttnKNorm => "self_attn.k_norm",
        P::PostAttnNorm => "post_attention_layernorm",
        P::FfnNorm if gemma => "pre_feedforward_layernorm",
        P::FfnNorm => "post_attention_layernorm",
        P::FfnGate => "mlp.gate_proj",
        P::FfnUp if arch == Arch::Phi3 => "mlp.gate_up_proj",
        P::FfnUp => "mlp.up_proj",
        P::FfnDown => "mlp.down_proj",
        P::PostFfnNorm => "post_feedforward_layernorm",
        P::Router => "mlp.gate",
        P::FfnGateExps => return expert_name(t, expert, "gate_proj"),
        P::FfnUpExps => return expert_name(t, expert, "up_proj"),
        P::FfnDownExps => return expert_name(t, expert, "down_proj"),
    };
    match t.layer {
        Some(l) => format!("model.layers.{l}.{stem}.{suffix}"),
        None => format!("model.{stem}.{suffix}"),
    }
}

fn expert_name(t: &Tensor, expert: u32, projection: &str) -> String {
    let layer = t.layer.unwrap_or(0);
    format!("model.layers.{layer}.mlp.experts.{expert}.{projection}.weight")
}
