use anyhow::Result;
use clap::Args;
use hoist_core::orchestrator::{WeightCounts, fits, importable_bytes};
use serde_json::json;

use crate::args::{CapacityArgs, DeviceArgs, ModelArg};
use crate::exit::Code;
use crate::report::{self, print_json, print_text};
use crate::{backends, models};

/// Show what a load would make resident, and whether it fits; reads no weight.
#[derive(Args, Debug)]
pub(crate) struct Plan {
    #[command(flatten)]
    model: ModelArg,

    #[command(flatten)]
    device: DeviceArgs,

    #[command(flatten)]
    capacity: CapacityArgs,

    /// Plan weights only: no keys, values or scratch
    #[arg(long, conflicts_with_all = ["context", "sequences", "batch_tokens"])]
    no_workspace: bool,

    /// List every weight
    #[arg(long)]
    weights: bool,
}

impl Plan {
    pub(crate) fn run(&self, json: bool) -> Result<Code> {
        let opened = models::open(&self.model)?;
        let planned = backends::planned_for(&self.device)?;
        let info = planned.info();
        let capacity = (!self.no_workspace).then(|| opened.capacity(&self.capacity.decode_options()));
        let program = capacity.map(|capacity| opened.program(capacity)).transpose()?;
        let plan = planned.plan(&opened.model, program.as_ref().zip(capacity))?;
        let import = self.device.import;
        let mapped = if import { importable_bytes(&plan) } else { 0 };
        let fit = fits(&plan, mapped, &planned.memory()?);
        let counts = WeightCounts::of(&plan);

        if json {
            let mut value = json!({
                "schema": "hoist.plan/1",
                "model": report::model::json(&opened.manifest, &opened.model),
                "backend": report::plan::backend_json(info),
                "assumed": planned.assumed().map(|missing| json!({
                    "memory": self.device.memory,
                    "because": missing.to_string(),
                })),
                "weights": {
                    "quantized": counts.quantized,
                    "float": counts.float,
                    "gamma": counts.gamma,
                    "bias": counts.bias,
                    "bytes": plan.nbytes,
                    "source_bytes": plan.source_bytes,
                },
                "capacity": capacity.map(|c| json!({
                    "context": c.max_context,
                    "sequences": c.max_sequences,
                    "batch_tokens": c.max_batch_tokens,
                })),
                "resident": report::plan::memory_json(&plan.resident),
                "mapped_bytes": mapped,
                "memory": report::plan::fit_json(fit),
                "unclaimed": opened.model.unclaimed,
            });
            if self.weights {
                value["plan"] = plan
                    .weights
                    .iter()
                    .map(|w| report::plan::weight_json(w, import))
                    .collect();
            }
            print_json(&value)?;
        } else {
            let mut text = report::model::line(&opened);
            text.push_str("\n\n");
            if self.weights {
                text.push_str(&report::plan::weights_table(&plan));
                text.push('\n');
            }
            text.push_str(&report::plan::memory_table(&plan.resident, &counts));
            text.push('\n');
            if mapped > 0 {
                text.push_str(&format!(
                    "{} of it mapped from the file, not owned\n",
                    report::units::bytes(mapped)
                ));
            }
            text.push_str(&report::plan::fit_line(fit, &info.device));
            if let Some(missing) = planned.assumed() {
                text.push_str(&format!(
                    "assumed: a device with {} free, since {missing}\n",
                    report::units::bytes(fit.available)
                ));
            }
            print_text(&text)?;
        }
        Ok(if fit.is_ok() { Code::Ok } else { Code::No })
    }
}
