use anyhow::Result;
use clap::{Args, CommandFactory as _};
use clap_complete::Shell;
use serde_json::json;

use super::Program;
use crate::exit::Code;
use crate::report::{print_data, print_json};

/// Print completions for a shell.
#[derive(Args, Debug)]
pub(crate) struct Completions {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

impl Completions {
    pub(crate) fn run(&self, json: bool) -> Result<Code> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Program::command(), "hoist", &mut script);
        let script = String::from_utf8_lossy(&script);
        if json {
            print_json(&json!({
                "schema": "hoist.completions/1",
                "shell": self.shell.to_string(),
                "script": script,
            }))?;
        } else {
            print_data(&script)?;
        }
        Ok(Code::Ok)
    }
}
