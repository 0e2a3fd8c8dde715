use std::fmt::Write;

use hoist_backend::{
    ActivationKind, DecodeProgram, OpKind, RopeStyle, Table, TableId, ValueId, ValueKind, WeightRef,
};

/// A program as text: one line for each value, table and operation. Equal programs give equal text; a table is named by the
/// BLAKE3 of its values.
pub fn dump(program: &DecodeProgram) -> String {
    let mut text = String::new();
    // Writing to a String never fails.
    let _ = write_program(program, &mut text);
    text
}

fn write_program(p: &DecodeProgram, out: &mut String) -> std::fmt::Result {
    writeln!(
        out,
        "program: vocab {}, context {}, {} layers",
        p.vocab,
        p.max_context,
        p.kv.len()
    )?;
    if let Some(kv) = p.kv.first() {
        let same = p.kv.iter().all(|other| other == kv);
        writeln!(
            out,
            "kv: {} heads of {}{}",
            kv.kv_heads,
            kv.head_dim,
            if same { "" } else { " in layer 0" }
        )?;
    }
    writeln!(out, "values:")?;
    for value in &p.values {
        let kind = match value.kind {
            ValueKind::F32 => "f32".into(),
            ValueKind::Quantized { vectors: 1 } => "quantised".into(),
            ValueKind::Quantized { vectors } => format!("quantised in {vectors} vectors"),
            ValueKind::Experts => "experts".into(),
        };
        writeln!(out, "  {} [{}] {kind}", value.name, value.width)?;
    }
    if !p.tables.is_empty() {
        writeln!(out, "tables:")?;
    }
    for table in &p.tables {
        writeln!(
            out,
            "  {} [{}, {}] {}",
            table.name,
            table.rows,
            table.cols,
            digest(table)
        )?;
    }
    writeln!(out, "operations:")?;
    for (at, op) in p.ops.iter().enumerate() {
        if at == p.tail {
            writeln!(out, "  -- from here on only for tokens with an output --")?;
        }
        let layer = op.layer.map_or("-".into(), |l| l.to_string());
        writeln!(
            out,
            "  {at:>4} {layer:>3}  {:<14} {}",
            op.kind.name(),
            operands(p, &op.kind)
        )?;
    }
    writeln!(out, "logits: {}", name(p, p.logits))
}

/// The first 16 hexadecimal digits of the BLAKE3 of a table's little-endian bytes.
fn digest(table: &Table) -> String {
    let mut hasher = blake3::Hasher::new();
    for value in table.data.iter() {
        hasher.update(&value.to_le_bytes());
    }
    hasher.finalize().to_hex().chars().take(16).collect()
}

fn name(p: &DecodeProgram, id: ValueId) -> &str {
    p.value(id).map_or("?", |v| v.name.as_str())
}

fn table(p: &DecodeProgram, id: TableId) -> &str {
    p.table(id).map_or("?", |t| t.name.as_str())
}

fn weight(w: WeightRef) -> String {
    w.role.name().into()
}

fn operands(p: &DecodeProgram, kind: &OpKind) -> String {
    let v = |id: &ValueId| name(p, *id).to_owned();
    let with_bias = |bias: &Option<WeightRef>| bias.map(|b| format!(" + {}", weight(b))).unwrap_or_default();
    match kind {
        OpKind::Embed { weight: w, out } => format!("{} = {}[token]", v(out), weight(*w)),
        OpKind::EmbedPosition { weight: w, out } => format!("{} = {}[position]", v(out), weight(*w)),
        OpKind::RmsNorm {
            input,
            weight: w,
            eps,
            rows,
            out,
        } => {
            let rows = if *rows == 1 {
                String::new()
            } else {
                format!(", {rows} rows")
            };
            format!("{} = {} by {}, eps {eps:e}{rows}", v(out), v(input), weight(*w))
        }
        OpKind::LayerNorm {
            input,
            weight: w,
            bias,
            eps,
            out,
        } => format!(
            "{} = {} by {} + {}, eps {eps:e}",
            v(out),
            v(input),
            weight(*w),
            weight(*bias)
        ),
        OpKind::Quantise { input, out } => format!("{} = {}", v(out), v(input)),
        OpKind::MatMul {
            input,
            weight: w,
            bias,
            out,
        }
        | OpKind::Logits {
            input,
            weight: w,
            bias,
            out,
        } => format!("{} = {} · {}{}", v(out), weight(*w), v(input), with_bias(bias)),
        OpKind::Rope {
            value,
            table: t,
            style,
            heads,
            n_rot,
        } => {
            let style = match style {
                RopeStyle::Interleaved => "interleaved",
                RopeStyle::HalfSplit => "half-split",
            };
            format!(
                "{} by {}, {style}, {heads} heads, {n_rot} turned",
                v(value),
                table(p, *t)
            )
        }
        OpKind::StoreKv { key, value } => format!("{}, {}", v(key), v(value)),
        OpKind::Attention {
            query,
            heads,
            scale,
            window,
            soft_cap,
            out,
        } => {
            let window = window.map(|w| format!(", window {w}")).unwrap_or_default();
            let cap = soft_cap.map(|c| format!(", cap {c}")).unwrap_or_default();
            format!(
                "{} = attend {}, {heads} heads, scale {scale}{window}{cap}",
                v(out),
                v(query)
            )
        }
        OpKind::Activation { input, kind, out } => {
            let kind = match kind {
                ActivationKind::Silu => "silu",
                ActivationKind::GeluTanh => "gelu_tanh",
            };
            format!("{} = {kind}({})", v(out), v(input))
        }
        OpKind::Mul { a, b, out } => format!("{} = {} ∘ {}", v(out), v(a), v(b)),
        OpKind::Add { a, b, out } => format!("{} = {} + {}", v(out), v(a), v(b)),
        OpKind::Scale { input, factor, out } => format!("{} = {} · {factor}", v(out), v(input)),
        OpKind::SoftCap { input, cap, out } => format!("{} = {cap} · tanh({} / {cap})", v(out), v(input)),
        OpKind::RouterTopK {
            logits,
            k,
            normalise,
            experts,
            weights,
        } => format!(
            "{}, {} = top {k} of {}{}",
            v(experts),
            v(weights),
            v(logits),
            if *normalise { ", normalised" } else { "" }
        ),
        OpKind::ExpertMatMul {
            input,
            experts,
            weight: w,
            out,
        } => format!("{} = {}[{}] · {}", v(out), weight(*w), v(experts), v(input)),
        OpKind::WeightedSum {
            input,
            experts,
            weights,
            out,
        } => format!("{} = Σ {} · {} by {}", v(out), v(weights), v(input), v(experts)),
        // An operation that a later version adds still has its name in front.
        _ => String::new(),
    }
}
