//! gpt2: learned positions, layer norms with bias, a feed-forward block without gate.

use hoist_backend::{DecodeProgram, OpKind, Role};

use super::builder::Builder;
use crate::{ResolvedModel, Result};

pub(super) fn build(model: &ResolvedModel, max_context: u32) -> Result<DecodeProgram> {
    let h = &model.hyper;
    let (hidden, q_width, kv_width) = (u64::from(h.hidden), h.q_width(), h.kv_width());
    let mut b = Builder::new(model)?;

    let x = b.f32("x", hidden)?; // [hidden], the residual stream
    let position = b.f32("position", hidden)?; // [hidden]
    let normed = b.f32("normed", hidden)?; // [hidden]
    let q = b.f32("q", q_width)?; // [heads · head_dim]
    let k = b.f32("k", kv_width)?; // [heads · head_dim]
    let v = b.f32("v", kv_width)?; // [heads · head_dim]
    let attended = b.f32("attended", q_width)?; // [heads · head_dim]
    let up = b.f32("up", h.ffn.into())?; // [n_ff]
    let active = b.f32("active", h.ffn.into())?; // [n_ff]
    let branch = b.f32("branch", hidden)?; // [hidden], what a block adds
    let logits = b.f32("logits", h.vocab.into())?; // [vocab]

    b.op(OpKind::Embed {
        weight: b.weight(Role::TokenEmbd),
        out: x,
    });
    b.op(OpKind::EmbedPosition {
        weight: b.weight(Role::PositionEmbd),
        out: position,
    });
    b.op(OpKind::Add {
        a: x,
        b: position,
        out: x,
    });

    for layer in 0..h.layers {
        b.enter(Some(layer));

        b.op(OpKind::LayerNorm {
            input: x,
            weight: b.weight(Role::AttnNorm),
            bias: b.weight(Role::AttnNormBias),
            eps: h.norm_eps,
            out: normed,
        });
        b.matmuls(
            normed,
            &[
                (Role::AttnQ, Some(Role::AttnQBias), q),
                (Role::AttnK, Some(Role::AttnKBias), k),
                (Role::AttnV, Some(Role::AttnVBias), v),
            ],
        )?;
        b.op(OpKind::StoreKv { key: k, value: v });
        b.op(OpKind::Attention {
            query: q,
            heads: h.heads,
            scale: h.attention_scale,
            window: None,
            soft_cap: None,
            out: attended,
        });
        b.matmuls(
            attended,
            &[(Role::AttnOutput, Some(Role::AttnOutputBias), branch)],
        )?;
        b.op(OpKind::Add {
            a: x,
            b: branch,
            out: x,
        });

        b.op(OpKind::LayerNorm {
            input: x,
            weight: b.weight(Role::FfnNorm),
            bias: b.weight(Role::FfnNormBias),
            eps: h.norm_eps,
            out: normed,
        });
        b.matmuls(normed, &[(Role::FfnUp, Some(Role::FfnUpBias), up)])?;
        b.op(OpKind::Activation {
            input: up,
            kind: h.activation,
            out: active,
        });
        b.matmuls(active, &[(Role::FfnDown, Some(Role::FfnDownBias), branch)])?;
        b.op(OpKind::Add {
            a: x,
            b: branch,
            out: x,
        });
    }

    b.enter(None);
    b.op(OpKind::LayerNorm {
        input: x,
        weight: b.weight(Role::OutputNorm),
        bias: b.weight(Role::OutputNormBias),
        eps: h.norm_eps,
        out: normed,
    });
    b.logits(normed, logits)?;
    Ok(b.finish(max_context, logits))
}
