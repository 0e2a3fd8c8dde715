use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use hoist_core::backend::Error as BackendError;
use hoist_synth::{Container, Mix, Options, SHAPES};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use crate::exit::{Code, Usage};
use crate::report::{print_json, print_text, units};
use crate::say::visible;
use crate::watch::{catch_interrupts, interrupted};

/// Write a random-weight model of a real shape: for benchmarks and tests, not for talking.
///
/// The same shape, encoding and seed give the same bytes on every machine.
#[derive(Args, Debug)]
pub(crate) struct Synth {
    /// Which dimensions: see --list
    #[arg(value_name = "SHAPE", required_unless_present = "list")]
    shape: Option<String>,

    /// A GGUF file, or a folder for SafeTensors
    #[arg(value_name = "OUT", required_unless_present = "list")]
    out: Option<PathBuf>,

    /// Encoding of the matrices: q4_k_m (llama.cpp's mix), or one for all, such as q8_0 or bf16
    #[arg(long, value_name = "NAME", default_value = "q4_k_m")]
    encoding: String,

    /// Kind of file
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "gguf")]
    format: Format,

    /// Seed of the weights
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// List the shapes
    #[arg(long, conflicts_with_all = ["shape", "out"])]
    list: bool,
}

/// A kind of file.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum Format {
    /// One GGUF file
    Gguf,
    /// A Hugging Face folder
    Safetensors,
}

impl Synth {
    pub(crate) fn run(&self, json: bool) -> Result<Code> {
        let (Some(name), Some(out), false) = (&self.shape, &self.out, self.list) else {
            return list(json);
        };
        let shape = hoist_synth::shape(name).ok_or_else(|| {
            let known: Vec<&str> = SHAPES.iter().map(|s| s.name).collect();
            Usage(format!(
                "no shape is called `{name}`; known are {}",
                known.join(", ")
            ))
        })?;
        let mix = Mix::from_name(&self.encoding).ok_or_else(|| {
            Usage(format!(
                "`{}` is no encoding that files of weights have; try q4_k_m, q8_0, f16",
                self.encoding
            ))
        })?;
        let container = match self.format {
            Format::Gguf => Container::Gguf,
            Format::Safetensors => Container::SafeTensors,
        };
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        bar.set_style(ProgressStyle::with_template(
            "{wide_bar} {binary_bytes:>11} of {binary_total_bytes} {binary_bytes_per_sec:>13}",
        )?);
        catch_interrupts()?;
        let started = Instant::now();
        let summary = hoist_synth::write_unless(
            Options {
                shape,
                mix,
                container,
                seed: self.seed,
            },
            out,
            &|done, total| {
                bar.set_length(total);
                bar.set_position(done);
            },
            &interrupted,
        );
        bar.finish_and_clear();
        let summary = summary.map_err(|error| match error {
            hoist_synth::Error::Io { path, error } => {
                anyhow::Error::new(error).context(format!("writing `{}`", path.display()))
            }
            hoist_synth::Error::Cancelled => BackendError::Cancelled.into(),
            other => Usage(other.to_string()).into(),
        })?;
        let seconds = started.elapsed().as_secs_f64();
        let digest = blake3::Hash::from_bytes(summary.blake3).to_hex();
        let rate = units::rounded(summary.bytes as f64 / seconds / 1e9, 3);
        if json {
            print_json(&json!({
                "schema": "hoist.synth/1",
                "shape": shape.name,
                "encoding": self.encoding,
                "seed": self.seed,
                "path": summary.path.display().to_string(),
                "bytes": summary.bytes,
                "tensors": summary.tensors,
                "blake3": digest.as_str(),
                "seconds": units::rounded(seconds, 3),
                "gb_s": rate,
            }))?;
        } else {
            print_text(&format!(
                "{}: {} in {} tensors, {rate} GB/s\nBLAKE3 {digest}\n",
                visible(&summary.path.display().to_string()),
                units::bytes(summary.bytes),
                summary.tensors,
            ))?;
        }
        Ok(Code::Ok)
    }
}

fn list(json: bool) -> Result<Code> {
    if json {
        let shapes: Vec<_> = SHAPES
            .iter()
            .map(|s| json!({ "name": s.name, "architecture": s.arch.gguf(), "layers": s.layers, "hidden": s.hidden, "vocab": s.vocab }))
            .collect();
        print_json(&json!({ "schema": "hoist.synth.list/1", "shapes": shapes }))?;
    } else {
        for s in SHAPES {
            print_text(&format!(
                "{:16} {:10} {} layers of {}\n",
                s.name,
                s.arch.gguf(),
                s.layers,
                s.hidden
            ))?;
        }
    }
    Ok(Code::Ok)
}
