//! The `hoist` program.
//!
//! Standard output is data; messages, hints and progress go to standard error. Exit codes are those of [`exit::Code`].

mod args;
mod backends;
mod commands;
mod decoding;
mod digests;
mod exit;
mod models;
mod output;
mod report;
mod say;
mod watch;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let code = match commands::Program::try_parse() {
        Ok(program) => program.run().unwrap_or_else(|error| exit::report(&error)),
        Err(answer) => exit::answer(&answer),
    };
    exit::report_parting(code).into()
}
