//! One file a command.

mod bench;
mod bench_decode;
mod bench_load;
mod bench_load_cuda;
mod compare;
mod completions;
mod conform;
mod devices;
mod generate;
mod inspect;
mod load;
mod logits;
mod op;
mod perplexity;
mod plan;
mod plugin;
mod synth;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::exit::Code;

/// Makes a language model's weights resident on a compute device, proves that they are what the file holds, and decodes
/// from them.
#[derive(Debug, Parser)]
#[command(name = "hoist", version, after_help = AFTER_HELP, max_term_width = 110)]
pub(crate) struct Program {
    /// Print one JSON object with a stable "schema"
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Exit codes: 0 done · 1 the answer is no (does not fit, differs) · 2 usage · 3 bad model file · \
4 backend or device unavailable · 5 out of memory · 6 plugin rejected · 7 reading or writing failed · 70 a bug · \
130 interrupted";

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what a model file holds: metadata, tensors and their roles
    Inspect(inspect::Inspect),
    /// Show what a load would make resident, and whether it fits; reads no weight
    ///
    /// With --memory, a device that is not here is planned for where its backend knows enough without it, as cuda does.
    Plan(plan::Plan),
    /// Make a model resident, index it, and report what was done
    Load(load::Load),
    /// Continue a text, or answer in a chat
    Generate(generate::Generate),
    /// Print what a model makes of given tokens, position by position
    Logits(logits::Logits),
    Compare(compare::Compare),
    /// Measure how well a model predicts a text
    Perplexity(perplexity::Perplexity),
    /// Run one operation of the numerics contract over raw files
    Op(op::Op),
    /// Measure
    Bench(bench::Bench),
    /// Write a random-weight model of a real shape
    Synth(synth::Synth),
    /// List backends and their devices
    Devices(devices::Devices),
    /// Look at backends in shared libraries, and trust them
    Plugin(plugin::Plugin),
    #[command(hide = true)]
    PluginProbe(plugin::PluginProbe),
    #[command(hide = true)]
    PluginWorker(plugin::PluginWorker),
    Conform(conform::Conform),
    #[command(hide = true)]
    ConformWorker(conform::ConformWorker),
    /// Print completions for a shell
    Completions(completions::Completions),
}

impl Program {
    /// Runs the command that was given.
    pub(crate) fn run(&self) -> Result<Code> {
        let json = self.json;
        match &self.command {
            Command::Inspect(inspect) => inspect.run(json),
            Command::Plan(plan) => plan.run(json),
            Command::Load(load) => load.run(json),
            Command::Generate(generate) => generate.run(json),
            Command::Logits(logits) => logits.run(json),
            Command::Compare(compare) => compare.run(json),
            Command::Perplexity(perplexity) => perplexity.run(json),
            Command::Op(op) => op.run(json),
            Command::Bench(bench) => bench.run(json),
            Command::Synth(synth) => synth.run(json),
            Command::Devices(devices) => devices.run(json),
            Command::Plugin(plugin) => plugin.run(json),
            Command::PluginProbe(probe) => probe.run(),
            Command::PluginWorker(worker) => worker.run(),
            Command::Conform(conform) => conform.run(json),
            Command::ConformWorker(worker) => worker.run(),
            Command::Completions(completions) => completions.run(json),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_contradicts_itself_nowhere() {
        super::Program::command().debug_assert();
    }
}
