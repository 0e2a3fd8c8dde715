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
mod report;
mod watch;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let program = commands::Program::parse();
    let code = match program.run() {
        Ok(code) => code,
        Err(error) => exit::report(&error),
    };
    exit::report_parting(code).into()
}
