//! What a load did, in JSON and for people.

use std::fmt::Write as _;
use std::time::Duration;

use hoist_core::orchestrator::{LoadReport, LoadedModel, Statistics, WeightTrace};
use serde_json::{Value, json};

use super::table::{self, Align};
use super::{model, plan, units};

/// Shows so many names of tensors that no role claims; JSON has them all.
const UNCLAIMED_SHOWN: usize = 8;

/// The report of `hoist load --json`, schema `hoist.load/1`.
pub(crate) fn json(loaded: &LoadedModel, total: Duration, traces: &[WeightTrace]) -> Value {
    let report = &loaded.report;
    let timing = &report.timing;
    let mut value = json!({
        "schema": "hoist.load/1",
        "model": model::json(&loaded.manifest, &loaded.model),
        "backend": plan::backend_json(loaded.backend.info()),
        "weights": weights_json(report),
        "index": {
            "layers": report.device_index.layers,
            "entries": report.device_index.entries,
            "bytes": report.device_index.bytes,
        },
        "workspace": report.workspace.map(|w| json!({
            "bytes": w.kv.saturating_add(w.workspace),
            "kv": w.kv,
            "scratch": w.workspace,
            "context": loaded.program.as_ref().map(|(_, c)| c.max_context),
            "sequences": loaded.program.as_ref().map(|(_, c)| c.max_sequences),
        })),
        "verified": report.verified.as_ref().map(|v| json!({
            "weights": v.weights,
            "bytes": v.bytes,
            "mismatches": v.mismatches.len(),
            "on_device": v.on_device,
        })),
        "unclaimed": loaded.model.unclaimed,
        "timing": {
            "open_ms": units::ms(loaded.timing.open),
            "plan_ms": units::ms(loaded.timing.plan),
            "upload_ms": units::ms(timing.upload),
            "index_ms": units::ms(timing.index),
            "workspace_ms": units::ms(timing.workspace),
            "verify_ms": units::ms(timing.verify),
            "total_ms": units::ms(total),
            "upload_gb_s": units::rounded(report.upload_gb_s(), 3),
        },
        "resident": plan::memory_json(&resident(loaded)),
        "mapped_bytes": report.receipt.mapped,
        "host_tensors": loaded.model.host_tensors,
        "redundant": loaded.model.redundant,
        "defaults": loaded.model.defaults_used.iter().map(|(k, v)| json!([k, v])).collect::<Vec<_>>(),
        "notes": loaded.report.receipt.notes.iter().map(|(k, v)| json!([k, v])).collect::<Vec<_>>(),
        "peak_rss_bytes": peak_rss(),
    });
    if !traces.is_empty() {
        value["trace"] = traces.iter().map(trace_json).collect();
    }
    value
}

/// `weights` of the report: how many of each class, and their canonical bytes.
pub(crate) fn weights_json(report: &LoadReport) -> Value {
    json!({
        "quantized": report.counts.quantized,
        "float": report.counts.float,
        "gamma": report.counts.gamma,
        "bias": report.counts.bias,
        "bytes": report.nbytes,
    })
}

/// What the backend owns, by its own count where it can tell.
fn resident(loaded: &LoadedModel) -> hoist_core::backend::MemoryByClass {
    let devices = loaded.backend.memory().map(|m| m.devices).unwrap_or_default();
    match devices.as_slice() {
        [device] => device.resident,
        _ => loaded.report.receipt.resident,
    }
}

/// The most memory that this process has had, page cache of mapped files included, as Linux counts it.
fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The report for people.
pub(crate) fn text(loaded: &LoadedModel, total: Duration, traces: &[WeightTrace]) -> String {
    let report = &loaded.report;
    let info = loaded.backend.info();
    let mut text = model::line_of(&loaded.manifest, &loaded.model);
    let _ = writeln!(
        text,
        "\non {} ({}), numerics {}\n",
        info.device, info.device_name, info.numerics
    );
    text.push_str(&plan::memory_table(&resident(loaded), &report.counts));
    text.push('\n');

    let mut facts: Vec<(String, String)> = vec![];
    let mut fact = |name: &str, value: String| facts.push((name.into(), value));
    if report.receipt.mapped > 0 {
        fact("mapped", units::bytes(report.receipt.mapped));
    }
    fact(
        "index",
        format!(
            "{} layers, {} entries",
            report.device_index.layers, report.device_index.entries
        ),
    );
    if let Some((_, capacity)) = &loaded.program {
        fact(
            "workspace",
            format!(
                "{} positions of {} sequence(s)",
                capacity.max_context, capacity.max_sequences
            ),
        );
    }
    if let Some(verified) = &report.verified {
        fact(
            "verified",
            format!(
                "{} weights, {} bytes, {} mismatches",
                verified.weights,
                units::count(verified.bytes),
                verified.mismatches.len()
            ),
        );
    }
    fact(
        "upload",
        format!(
            "{} at {:.2} GB/s",
            units::time(report.timing.upload),
            report.upload_gb_s()
        ),
    );
    if report.verified.is_some() {
        fact("verification", units::time(report.timing.verify));
    }
    fact("in all", units::time(total));
    text.push_str(&table::facts(facts));

    let unclaimed = &loaded.model.unclaimed;
    if !unclaimed.is_empty() {
        let _ = writeln!(text, "\n{} tensors that no role claims:", unclaimed.len());
        for name in unclaimed.iter().take(UNCLAIMED_SHOWN) {
            let _ = writeln!(text, "  {name}");
        }
        if unclaimed.len() > UNCLAIMED_SHOWN {
            let _ = writeln!(text, "  and {} more", unclaimed.len() - UNCLAIMED_SHOWN);
        }
    }
    for trace in traces {
        text.push('\n');
        text.push_str(&trace_text(trace));
    }
    text
}

fn trace_json(trace: &WeightTrace) -> Value {
    let statistics = |s: &Statistics| json!({ "count": s.count, "mean": s.mean, "min": s.min, "max": s.max, "first": s.first });
    json!({
        "name": trace.name,
        "layer": trace.layer,
        "role": trace.role.name(),
        "source_encoding": trace.source_encoding.name(),
        "encoding": trace.encoding.name(),
        "before": statistics(&trace.before),
        "after": statistics(&trace.after),
    })
}

fn trace_text(trace: &WeightTrace) -> String {
    let row = |when: &str, encoding: String, s: &Statistics| {
        let first: Vec<_> = s.first.iter().map(|v| format!("{v:.5}")).collect();
        vec![
            when.to_owned(),
            encoding,
            s.count.to_string(),
            format!("{:.6}", s.mean),
            format!("{:.6}", s.min),
            format!("{:.6}", s.max),
            first.join(" "),
        ]
    };
    let layer = trace.layer.map(|l| format!(", layer {l}")).unwrap_or_default();
    let table = table::render(
        &[
            ("", Align::Left),
            ("encoding", Align::Left),
            ("count", Align::Right),
            ("mean", Align::Right),
            ("min", Align::Right),
            ("max", Align::Right),
            ("first values", Align::Left),
        ],
        [
            row("before", trace.source_encoding.to_string(), &trace.before),
            row("after", trace.encoding.to_string(), &trace.after),
        ],
    );
    format!("{} ({}{layer})\n{table}", trace.name, trace.role)
}
