use std::time::Instant;

use anyhow::Result;
use clap::Args;
use hoist_core::orchestrator::{Error, SessionOptions};
use serde_json::json;

use crate::args::{CapacityArgs, DeviceArgs, ModelArg, parse_layers};
use crate::exit::{Code, Usage};
use crate::report::{self, print_json, print_text};
use crate::watch::{Bar, catch_interrupts};
use crate::{backends, models};

/// Make a model resident, index it, and report what was done.
#[derive(Args, Debug)]
pub(crate) struct Load {
    #[command(flatten)]
    model: ModelArg,

    #[command(flatten)]
    device: DeviceArgs,

    /// Compare every weight where it is resident with the file
    #[arg(long)]
    verify: bool,

    #[command(flatten)]
    capacity: CapacityArgs,

    /// Load weights only: prepare no keys, values or scratch
    #[arg(long, conflicts_with_all = ["context", "sequences", "batch_tokens"])]
    no_workspace: bool,

    /// Show mean, min, max, count and first values of the weights of layers A to B, in the file and after the load
    #[arg(long, value_name = "A-B", value_parser = parse_layers)]
    trace_layers: Option<(u32, u32)>,
}

impl Load {
    pub(crate) fn run(&self, json: bool) -> Result<Code> {
        let started = Instant::now();
        catch_interrupts()?;
        let bar = Bar::new();
        let selected = backends::select(&self.device)?;
        // At the same time: some devices take longer to open than a header to read.
        let (opened, backend) = std::thread::scope(|scope| {
            let backend = scope.spawn(|| selected.open(&self.device.open_options()));
            let opened = models::open(&self.model);
            (opened, backend.join())
        });
        let opened = opened?;
        let layers = opened.model.layers;
        if let Some((first, last)) = self.trace_layers.filter(|(_, last)| *last >= layers) {
            return Err(Usage(format!(
                "--trace-layers {first}-{last}: the model has layers 0-{}",
                layers - 1
            ))
            .into());
        }
        let options = SessionOptions {
            decode: (!self.no_workspace).then(|| self.capacity.decode_options()),
            verify: self.verify,
            import: self.device.import,
            watch: &bar,
        };
        let backend = backend.map_err(|_| anyhow::anyhow!("opening the device panicked"))??;
        let mut loaded = match opened.load(backend, &options) {
            Ok(loaded) => loaded,
            Err(Error::Mismatch { report }) => {
                bar.clear();
                return mismatch(Error::Mismatch { report }, json);
            }
            Err(error) => return Err(error.into()),
        };
        let total = started.elapsed();
        bar.clear();
        let traces = match self.trace_layers {
            Some((first, last)) => loaded.trace_layers(first, last)?,
            None => vec![],
        };
        if json {
            print_json(&report::load::json(&loaded, total, &traces))?;
        } else {
            print_text(&report::load::text(&loaded, total, &traces))?;
        }
        Ok(Code::Ok)
    }
}

/// What is resident was not what the file holds, and has been unloaded: tells which weights.
fn mismatch(error: Error, json: bool) -> Result<Code> {
    if let (true, Error::Mismatch { report }) = (json, &error) {
        let verified = report.verified.as_ref();
        print_json(&json!({
            "schema": "hoist.load/1",
            "weights": report::load::weights_json(report),
            "workspace": null,
            "verified": verified.map(|v| json!({
                "weights": v.weights,
                "bytes": v.bytes,
                "mismatches": v.mismatches.len(),
                "names": v.mismatches,
            })),
        }))?;
    }
    Err(error.into())
}
