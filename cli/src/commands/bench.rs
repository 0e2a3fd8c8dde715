use anyhow::Result;
use clap::{Args, Subcommand};

use super::bench_decode::BenchDecode;
use super::bench_load::BenchLoad;
use crate::exit::Code;

/// Measure.
#[derive(Args, Debug)]
pub(crate) struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Bytes a second of loads, beside a plain parallel copy of the same bytes
    Load(BenchLoad),
    /// Tokens a second
    Decode(BenchDecode),
}

impl Bench {
    pub(crate) fn run(&self, json: bool) -> Result<Code> {
        match &self.what {
            What::Load(load) => load.run(json),
            What::Decode(decode) => decode.run(json),
        }
    }
}
