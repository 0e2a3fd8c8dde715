//! One file a command.

mod bench;
mod bench_load;
mod completions;
mod devices;
mod inspect;
mod load;
mod plan;

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
Exit codes: 0 done · 1 the answer is no (does not fit, differs) · 2 usage · 3 bad model file · 4 backend or device
unavailable · 5 out of memory · 6 plugin rejected · 7 reading or writing failed · 70 a bug · 130 interrupted";

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what a model file holds: metadata, tensors and their roles
    Inspect(inspect::Inspect),
    /// Show what a load would make resident, and whether it fits; reads no weight
    Plan(plan::Plan),
    /// Make a model resident, index it, and report what was done
    Load(load::Load),
    /// Measure
    Bench(bench::Bench),
    /// List backends and their devices
    Devices(devices::Devices),
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
            Command::Bench(bench) => bench.run(json),
            Command::Devices(devices) => devices.run(json),
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
