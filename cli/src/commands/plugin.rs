use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};
use hoist_plugin_host::{Candidate, Header, Lockfile, Trusted, probe_here, probe_line, serve};
use serde_json::{Value, json};

use crate::backends::{self, absolute};
use crate::exit::Code;
use crate::report::table::{self, Align};
use crate::report::{print_data, print_json, print_text};

/// Look at backends in shared libraries, and trust them.
#[derive(Args, Debug)]
pub(crate) struct Plugin {
    #[command(subcommand)]
    command: PluginCommand,
}

#[derive(Debug, Subcommand)]
enum PluginCommand {
    /// Show what a library says of itself; runs none of its code
    Inspect(Inspect),
    /// List the plugins that were trusted, and whether their files are still the same
    List,
    /// Probe a library and put it into the lockfile: `--backend plugin:NAME` then finds it
    Trust(Trust),
}

#[derive(Args, Debug)]
struct Inspect {
    /// A shared library
    #[arg(value_name = "PATH")]
    path: PathBuf,
}

#[derive(Args, Debug)]
struct Trust {
    /// A shared library
    #[arg(value_name = "PATH")]
    path: PathBuf,
}

impl Plugin {
    pub(crate) fn run(&self, json: bool) -> Result<Code> {
        match &self.command {
            PluginCommand::Inspect(inspect) => inspect.run(json),
            PluginCommand::List => list(json),
            PluginCommand::Trust(trust) => trust.run(json),
        }
    }
}

impl Inspect {
    fn run(&self, json: bool) -> Result<Code> {
        let candidate = Candidate::open(&absolute(&self.path)?)?;
        let header = Header::read(&candidate.path, &candidate.file)?;
        let agreed = header.agree(&candidate.path);
        if json {
            print_json(&json!({
                "schema": "hoist.plugin.inspect/1",
                "path": candidate.path.display().to_string(),
                "sha256": candidate.sha256,
                "header": header_json(&header),
                "exports": header.exports,
                "agreed_minor": agreed.as_ref().ok(),
                "refused": agreed.as_ref().err().map(ToString::to_string),
            }))?;
        } else {
            let yes = |flag| if flag { "yes" } else { "no" }.to_owned();
            let rows = [
                ("path", candidate.path.display().to_string()),
                ("sha256", candidate.sha256.clone()),
                ("name", header.name.clone()),
                ("vendor", header.vendor.clone()),
                ("version", header.version.clone()),
                ("build", header.build_id.clone()),
                ("target", header.target.clone()),
                (
                    "interface",
                    format!(
                        "{}, minors {} to {}",
                        header.abi_major, header.abi_minor_min, header.abi_minor_max
                    ),
                ),
                (
                    "agreed minor",
                    match &agreed {
                        Ok(minor) => minor.to_string(),
                        Err(error) => format!("none: {error}"),
                    },
                ),
                ("panics abort", yes(header.panic_abort)),
                ("starts threads", yes(header.spawns_threads)),
                ("exports", header.exports.join(", ")),
            ];
            let rows = rows.map(|(name, value)| vec![name.to_owned(), value]);
            print_text(&table::render(&[("", Align::Left), ("", Align::Left)], rows))?;
        }
        Ok(Code::Ok)
    }
}

fn header_json(header: &Header) -> Value {
    json!({
        "name": header.name,
        "vendor": header.vendor,
        "version": header.version,
        "build_id": header.build_id,
        "target": header.target,
        "abi_major": header.abi_major,
        "abi_minor_min": header.abi_minor_min,
        "abi_minor_max": header.abi_minor_max,
        "panic_abort": header.panic_abort,
        "spawns_threads": header.spawns_threads,
    })
}

impl Trust {
    fn run(&self, json: bool) -> Result<Code> {
        let candidate = Candidate::open(&absolute(&self.path)?)?;
        let header = Header::read(&candidate.path, &candidate.file)?;
        let minor = header.agree(&candidate.path)?;
        backends::probe(backends::PROBE_LIMIT)?.check(&candidate)?;
        let path = backends::lockfile()?;
        let mut lockfile = Lockfile::read(&path)?;
        let trusted = Trusted {
            path: candidate.path,
            sha256: candidate.sha256,
            minor,
        };
        // Written before it is told.
        lockfile.plugins.insert(header.name.clone(), trusted.clone());
        lockfile.write(&path)?;
        if json {
            print_json(&json!({
                "schema": "hoist.plugin.trust/1",
                "name": header.name,
                "path": trusted.path.display().to_string(),
                "sha256": trusted.sha256,
                "minor": minor,
                "lockfile": path.display().to_string(),
            }))?;
        } else {
            print_text(&format!(
                "trusted plugin:{} ({}, SHA-256 {})\n",
                header.name,
                trusted.path.display(),
                trusted.sha256
            ))?;
        }
        Ok(Code::Ok)
    }
}

fn list(json: bool) -> Result<Code> {
    let path = backends::lockfile()?;
    let lockfile = Lockfile::read(&path)?;
    let plugins = lockfile.plugins.iter().map(|(name, trusted)| {
        let problem = lockfile.open(name, &path).err().map(|e| e.to_string());
        (name, trusted, problem)
    });
    if json {
        let plugins: Vec<_> = plugins
            .map(|(name, t, problem)| {
                json!({
                    "name": name,
                    "path": t.path.display().to_string(),
                    "sha256": t.sha256,
                    "minor": t.minor,
                    "refused": problem,
                })
            })
            .collect();
        print_json(
            &json!({ "schema": "hoist.plugin.list/1", "lockfile": path.display().to_string(), "plugins": plugins }),
        )?;
    } else {
        let rows = plugins.map(|(name, t, problem)| {
            vec![
                format!("plugin:{name}"),
                t.path.display().to_string(),
                t.sha256.chars().take(12).collect(),
                problem.unwrap_or_else(|| "unchanged".to_owned()),
            ]
        });
        let columns = [
            ("plugin", Align::Left),
            ("path", Align::Left),
            ("sha256", Align::Left),
            ("", Align::Left),
        ];
        print_text(&table::render(&columns, rows))?;
    }
    Ok(Code::Ok)
}

/// What the program does as the child that tries an unknown library out.
#[derive(Args, Debug)]
pub(crate) struct PluginProbe {
    path: PathBuf,
    sha256: String,
    nonce: String,
}

impl PluginProbe {
    pub(crate) fn run(&self) -> Result<Code> {
        let candidate = Candidate::open(&self.path)?;
        same(&candidate, &self.sha256)?;
        let devices = probe_here(&candidate)?;
        print_data(&format!("{}\n", probe_line(&self.nonce, devices)))?;
        Ok(Code::Ok)
    }
}

/// What the program does as the process that a plugin lives in.
#[derive(Args, Debug)]
pub(crate) struct PluginWorker {
    path: PathBuf,
    sha256: String,
}

impl PluginWorker {
    pub(crate) fn run(&self) -> Result<Code> {
        serve(&self.path, &self.sha256)?;
        Ok(Code::Ok)
    }
}

fn same(candidate: &Candidate, sha256: &str) -> Result<(), hoist_plugin_host::Error> {
    if candidate.sha256 == sha256 {
        return Ok(());
    }
    Err(hoist_plugin_host::Error::Changed {
        path: candidate.path.clone(),
        expected: sha256.to_owned(),
        found: candidate.sha256.clone(),
    })
}
