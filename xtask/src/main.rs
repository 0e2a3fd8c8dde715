//! Developer tasks: `cargo xtask --help`.
#![forbid(unsafe_code)]

mod conformance_matrix;
mod goldens;
mod header;

use std::path::Path;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

/// Developer tasks of Hoist.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Write `docs/conformance-matrix.md` from reports of `hoist conform --json-file`.
    ConformanceMatrix(conformance_matrix::Arguments),
    /// Regenerate the golden vectors of the numerics contract (needs python3 with gguf 0.19.0 and numpy).
    Goldens(goldens::Arguments),
    /// Generate `include/hoist_plugin.h` from the Rust crate `hoist-plugin-abi`.
    Header(header::Arguments),
}

fn main() -> Result<()> {
    match Arguments::parse().task {
        Task::ConformanceMatrix(arguments) => conformance_matrix::run(&arguments),
        Task::Goldens(arguments) => goldens::run(&arguments),
        Task::Header(arguments) => header::run(&arguments),
    }
}

/// The workspace's root: the folder above this package.
fn root() -> Result<&'static Path> {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("xtask has no folder above it")
}
