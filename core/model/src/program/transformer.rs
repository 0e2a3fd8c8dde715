//! The llama family: RMS norms, rotary positions, a gated feed-forward block or experts. gemma adds norms after its blocks,
//! scales the embedding and caps scores and logits; qwen3 and gemma3 norm each head of q and k.

use hoist_backend::{DecodeProgram, OpKind, Role, Table, TableId, ValueId, ValueKind};

use super::builder::{Builder, narrow};
use crate::{ExpertParameters, ResolvedModel, Result, rope};

pub(super) fn build(model: &ResolvedModel, max_context: u32) -> Result<DecodeProgram> {
    let h = &model.hyper;
    let (hidden, q_width, kv_width) = (u64::from(h.hidden), h.q_width(), h.kv_width());
    let mut b = Builder::new(model)?;
    let tables = rope_tables(model, max_context, &mut b)?;

    let mut x = b.f32("x", hidden)?; // [hidden], the residual stream
    b.op(OpKind::Embed {
        weight: b.weight(Role::TokenEmbd),
        out: x,
    });
    if let Some(factor) = h.embedding_scale {
        let scaled = b.f32("x.scaled", hidden)?; // [hidden]
        b.op(OpKind::Scale {
            input: x,
            factor,
            out: scaled,
        });
        x = scaled;
    }
    let normed = b.f32("normed", hidden)?; // [hidden]
    let branch = b.f32("branch", hidden)?; // [hidden], what a block adds

    for (layer, attention) in (0..h.layers).zip(&h.attention) {
        b.enter(Some(layer));

        // Attention.
        rms_norm(&mut b, model, x, Role::AttnNorm, 1, normed);
        let mut q = b.f32("q", q_width)?; // [heads · head_dim]
        let mut k = b.f32("k", kv_width)?; // [kv_heads · head_dim]
        let v = b.f32("v", kv_width)?; // [kv_heads · head_dim]
        b.matmuls(
            normed,
            &[
                (Role::AttnQ, Some(Role::AttnQBias), q),
                (Role::AttnK, Some(Role::AttnKBias), k),
                (Role::AttnV, Some(Role::AttnVBias), v),
            ],
        )?;
        if b.optional(Role::AttnQNorm).is_some() {
            let normed_q = b.f32("q.normed", q_width)?;
            rms_norm(&mut b, model, q, Role::AttnQNorm, h.heads, normed_q); // weight [head_dim]
            q = normed_q;
        }
        if b.optional(Role::AttnKNorm).is_some() {
            let normed_k = b.f32("k.normed", kv_width)?;
            rms_norm(&mut b, model, k, Role::AttnKNorm, h.kv_heads, normed_k); // weight [head_dim]
            k = normed_k;
        }
        let rope = attention
            .rope
            .and_then(|at| Some((h.ropes.get(at)?, *tables.get(at)?)));
        if let Some((rope, table)) = rope {
            for (value, heads) in [(q, h.heads), (k, h.kv_heads)] {
                b.op(OpKind::Rope {
                    value,
                    table,
                    style: rope.style,
                    heads,
                    n_rot: rope.n_rot,
                });
            }
        }
        b.op(OpKind::StoreKv { key: k, value: v });
        let attended = b.f32("attended", q_width)?; // [heads · head_dim]
        b.op(OpKind::Attention {
            query: q,
            heads: h.heads,
            scale: h.attention_scale,
            window: attention.window,
            soft_cap: h.attention_soft_cap,
            out: attended,
        });
        b.matmuls(
            attended,
            &[(Role::AttnOutput, Some(Role::AttnOutputBias), branch)],
        )?;
        add_branch(&mut b, model, x, branch, Role::PostAttnNorm)?;

        // Feed-forward.
        rms_norm(&mut b, model, x, Role::FfnNorm, 1, normed);
        match h.experts {
            None => gated_ffn(&mut b, model, normed, branch)?,
            Some(experts) => expert_ffn(&mut b, model, experts, normed, branch)?,
        }
        add_branch(&mut b, model, x, branch, Role::PostFfnNorm)?;
    }

    b.enter(None);
    rms_norm(&mut b, model, x, Role::OutputNorm, 1, normed);
    let mut logits = b.f32("logits", h.vocab.into())?; // [vocab]
    b.logits(normed, logits)?;
    if let Some(cap) = h.final_soft_cap {
        let capped = b.f32("logits.capped", h.vocab.into())?; // [vocab]
        b.op(OpKind::SoftCap {
            input: logits,
            cap,
            out: capped,
        });
        logits = capped;
    }
    Ok(b.finish(max_context, logits))
}

/// `branch = down · (f(gate · input) ∘ (up · input))`
fn gated_ffn(b: &mut Builder<'_>, model: &ResolvedModel, input: ValueId, branch: ValueId) -> Result<()> {
    let ffn = u64::from(model.hyper.ffn);
    let gate = b.f32("gate", ffn)?; // [n_ff]
    let up = b.f32("up", ffn)?; // [n_ff]
    b.matmuls(
        input,
        &[
            (Role::FfnGate, Some(Role::FfnGateBias), gate),
            (Role::FfnUp, Some(Role::FfnUpBias), up),
        ],
    )?;
    let inner = activate(b, model, gate, up, ffn)?; // [n_ff]
    b.matmuls(inner, &[(Role::FfnDown, Some(Role::FfnDownBias), branch)])
}

/// The same in each of the `used` experts that the router chooses, then their weighted sum.
fn expert_ffn(
    b: &mut Builder<'_>,
    model: &ResolvedModel,
    experts: ExpertParameters,
    input: ValueId,
    branch: ValueId,
) -> Result<()> {
    let (used, hidden) = (u64::from(experts.used), u64::from(model.hyper.hidden));
    let ffn = used * u64::from(model.hyper.ffn);
    let scores = b.f32("router", experts.count.into())?; // [n_experts]
    let chosen = b.value("experts", used, ValueKind::Experts)?; // [used]
    let weights = b.f32("experts.weights", used)?; // [used]
    b.matmuls(input, &[(Role::Router, None, scores)])?;
    b.op(OpKind::RouterTopK {
        logits: scores,
        k: experts.used,
        normalise: experts.normalise,
        experts: chosen,
        weights,
    });
    let gate = b.f32("gate", ffn)?; // [used · n_ff]
    let up = b.f32("up", ffn)?; // [used · n_ff]
    b.expert_matmuls(
        input,
        1,
        chosen,
        &[(Role::FfnGateExps, gate), (Role::FfnUpExps, up)],
    )?;
    let inner = activate(b, model, gate, up, ffn)?; // [used · n_ff]
    let down = b.f32("down", used * hidden)?; // [used · hidden]
    b.expert_matmuls(inner, experts.used, chosen, &[(Role::FfnDownExps, down)])?;
    b.op(OpKind::WeightedSum {
        input: down,
        experts: chosen,
        weights,
        out: branch,
    });
    Ok(())
}

/// `f(gate) ∘ up`
fn activate(
    b: &mut Builder<'_>,
    model: &ResolvedModel,
    gate: ValueId,
    up: ValueId,
    width: u64,
) -> Result<ValueId> {
    let active = b.f32("active", width)?;
    let inner = b.f32("inner", width)?;
    b.op(OpKind::Activation {
        input: gate,
        kind: model.hyper.activation,
        out: active,
    });
    b.op(OpKind::Mul {
        a: active,
        b: up,
        out: inner,
    });
    Ok(inner)
}

/// `x = x + branch`, the branch normed first where the architecture has a norm there.
fn add_branch(
    b: &mut Builder<'_>,
    model: &ResolvedModel,
    x: ValueId,
    branch: ValueId,
    norm: Role,
) -> Result<()> {
    let mut added = branch;
    if b.optional(norm).is_some() {
        added = b.f32("branch.normed", model.hyper.hidden.into())?;
        rms_norm(b, model, branch, norm, 1, added);
    }
    b.op(OpKind::Add {
        a: x,
        b: added,
        out: x,
    });
    Ok(())
}

fn rms_norm(b: &mut Builder<'_>, model: &ResolvedModel, input: ValueId, norm: Role, rows: u32, out: ValueId) {
    b.op(OpKind::RmsNorm {
        input,
        weight: b.weight(norm),
        eps: model.hyper.norm_eps,
        rows,
        out,
    });
}

/// One table for each set of RoPE parameters.
fn rope_tables(model: &ResolvedModel, max_context: u32, b: &mut Builder<'_>) -> Result<Vec<TableId>> {
    let mut ids = Vec::new();
    for (at, parameters) in model.hyper.ropes.iter().enumerate() {
        let cells = u64::from(max_context) * u64::from(parameters.n_rot);
        narrow(|| "a RoPE table's number of values".into(), cells)?;
        ids.push(b.table(Table {
            name: if at == 0 { "rope" } else { "rope.local" }.into(),
            rows: max_context,
            cols: parameters.n_rot,
            data: rope::table(parameters, max_context),
        })?);
    }
    Ok(ids)
}
