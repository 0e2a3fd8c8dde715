//! What a plan says, in JSON and for people.

use hoist_core::backend::{
    BackendInfo, FloatLayout, LoadPlan, MemoryByClass, NUMERICS_CONTRACT, ValueChange, WeightPlan,
};
use hoist_core::orchestrator::{Fit, WeightCounts, is_importable};
use serde_json::{Value, json};

use super::table::{self, Align};
use super::units;

/// `backend` of every JSON report.
pub(crate) fn backend_json(info: &BackendInfo) -> Value {
    json!({
        "name": info.name,
        "device": info.device,
        "device_name": info.device_name,
        "numerics": info.numerics.to_string(),
        "contract": NUMERICS_CONTRACT,
    })
}

/// Bytes by class.
pub(crate) fn memory_json(memory: &MemoryByClass) -> Value {
    json!({
        "quantized": memory.quantized,
        "float": memory.float,
        "gamma": memory.gamma,
        "bias": memory.bias,
        "index": memory.index,
        "kv": memory.kv,
        "workspace": memory.workspace,
        "total": memory.total(),
    })
}

/// A table of bytes by class, with the counts of weights.
pub(crate) fn memory_table(memory: &MemoryByClass, counts: &WeightCounts) -> String {
    let weights = [
        ("quantized", memory.quantized, counts.quantized),
        ("float", memory.float, counts.float),
        ("gamma", memory.gamma, counts.gamma),
        ("bias", memory.bias, counts.bias),
    ];
    let rest = [
        ("index", memory.index),
        ("keys and values", memory.kv),
        ("workspace", memory.workspace),
    ];
    let row = |name: &str, count: String, bytes: u64| {
        vec![name.to_owned(), count, units::bytes(bytes), units::count(bytes)]
    };
    let rows = weights
        .iter()
        .filter(|(_, _, count)| *count > 0)
        .map(|(name, bytes, count)| row(name, count.to_string(), *bytes))
        .chain(
            rest.iter()
                .filter(|(_, bytes)| *bytes > 0)
                .map(|(name, bytes)| row(name, String::new(), *bytes)),
        )
        .chain([row("total", counts.weights().to_string(), memory.total())]);
    table::render(
        &[
            ("resident", Align::Left),
            ("weights", Align::Right),
            ("size", Align::Right),
            ("bytes", Align::Right),
        ],
        rows,
    )
}

/// One weight of a plan.
pub(crate) fn weight_json(weight: &WeightPlan, import: bool) -> Value {
    json!({
        "name": weight.name,
        "layer": weight.layer,
        "role": weight.role.name(),
        "encoding": weight.encoding.name(),
        "shape": [weight.shape.matrices, weight.shape.rows, weight.shape.cols],
        "bytes": weight.nbytes,
        "resident_bytes": weight.resident_bytes,
        "views": weight.views.len(),
        "change": change(weight),
        "layout": layout(weight),
        "mapped": import && is_importable(weight),
    })
}

fn change(weight: &WeightPlan) -> String {
    match weight.change {
        ValueChange::Keep => "keep".into(),
        ValueChange::Widen { from } => format!("widen {from}"),
        ValueChange::WidenAddOne { from } => format!("widen {from}, add one"),
    }
}

fn layout(weight: &WeightPlan) -> &'static str {
    match weight.layout {
        FloatLayout::OutIn => "[out, in]",
        FloatLayout::InOut => "[in, out]",
    }
}

/// A table of all weights of a plan.
pub(crate) fn weights_table(plan: &LoadPlan) -> String {
    table::render(
        &[
            ("weight", Align::Left),
            ("layer", Align::Right),
            ("role", Align::Left),
            ("encoding", Align::Left),
            ("shape", Align::Left),
            ("resident", Align::Right),
            ("change", Align::Left),
            ("layout", Align::Left),
        ],
        plan.weights.iter().map(|w| {
            vec![
                w.name.clone(),
                w.layer.map(|l| l.to_string()).unwrap_or_default(),
                w.role.to_string(),
                w.encoding.to_string(),
                w.shape.to_string(),
                units::bytes(w.resident_bytes),
                change(w),
                layout(w).into(),
            ]
        }),
    )
}

/// `fits` of a plan.
pub(crate) fn fit_json(fit: Fit) -> Value {
    json!({
        "fits": fit.is_ok(),
        "needed": fit.needed,
        "available": fit.available,
        "short_by": fit.short_by,
    })
}

/// Whether it fits, in a sentence.
pub(crate) fn fit_line(fit: Fit, device: &str) -> String {
    if fit.is_ok() {
        format!(
            "fits {device}: {} of {} available\n",
            units::bytes(fit.needed),
            units::bytes(fit.available)
        )
    } else {
        format!(
            "does not fit {device}: {} needed, {} available, {} missing ({} bytes)\n",
            units::bytes(fit.needed),
            units::bytes(fit.available),
            units::bytes(fit.short_by),
            units::count(fit.short_by)
        )
    }
}
