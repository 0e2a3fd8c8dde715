use std::collections::HashMap;

use anyhow::Result;
use clap::Args;
use hoist_core::formats::{Manifest, TensorInfo};
use hoist_core::model::{self, ResolvedModel, dump};
use hoist_core::orchestrator::OpenedModel;
use serde_json::{Value, json};

use crate::args::{CapacityArgs, ModelArg};
use crate::exit::{Code, Usage};
use crate::models;
use crate::report::table::{self, Align};
use crate::report::{self, print_json, print_text, units};
use crate::say::say;

/// Show what a model file holds: metadata, tensors and their roles.
#[derive(Args, Debug)]
pub(crate) struct Inspect {
    #[command(flatten)]
    model: ModelArg,

    /// Show the decode program instead: the forward pass as a list of operations
    #[arg(long)]
    program: bool,

    #[command(flatten)]
    capacity: CapacityArgs,

    /// Give arrays of metadata in full
    #[arg(long, conflicts_with = "program")]
    full: bool,
}

impl Inspect {
    pub(crate) fn run(&self, json: bool) -> Result<Code> {
        if self.program {
            return self.show_program(json);
        }
        if self.capacity.is_given() {
            return Err(Usage("--context, --sequences and --batch-tokens are for --program".into()).into());
        }
        let manifest = models::manifest(&self.model)?;
        // A file that is no model Hoist knows can still be looked at.
        let resolved = model::resolve(&manifest);
        if json {
            print_json(&self.json(&manifest, &resolved))?;
        } else {
            print_text(&text(&manifest, resolved.as_ref().ok()))?;
        }
        if let Err(error) = resolved {
            say("warning", error);
        }
        Ok(Code::Ok)
    }

    fn show_program(&self, json: bool) -> Result<Code> {
        let opened = models::open(&self.model)?;
        let capacity = opened.capacity(&self.capacity.decode_options());
        let program = opened.program(capacity)?;
        let dump = dump(&program);
        if json {
            let OpenedModel { manifest, model, .. } = &opened;
            print_json(&json!({
                "schema": "hoist.program/1",
                "model": report::model::json(manifest, model),
                "context": program.max_context,
                "vocab": program.vocab,
                "operations": program.ops.len(),
                "tail": program.tail,
                "values": program.values.len(),
                "tables": program.tables.iter().map(|t| json!([t.name, t.rows, t.cols])).collect::<Vec<_>>(),
                "lines": dump.lines().collect::<Vec<_>>(),
            }))?;
        } else {
            print_text(&dump)?;
        }
        Ok(Code::Ok)
    }

    fn json(&self, manifest: &Manifest, resolved: &model::Result<ResolvedModel>) -> Value {
        let roles = resolved.as_ref().map(Roles::of).unwrap_or_default();
        let tensors: Vec<_> = manifest
            .tensors
            .iter()
            .map(|tensor| {
                json!({
                    "name": tensor.name,
                    "encoding": tensor.encoding.name(),
                    "shape": tensor.shape,
                    "bytes": tensor.nbytes,
                    "file": tensor.shard,
                    "offset": tensor.offset,
                    "roles": roles.json(&tensor.name),
                })
            })
            .collect();
        let (model, error) = match resolved {
            Ok(model) => (report::model::json(manifest, model), None),
            Err(error) => (report::model::file_json(manifest), Some(error.to_string())),
        };
        json!({
            "schema": "hoist.inspect/1",
            "model": model,
            "not_resolved": error,
            "metadata": report::metadata::json(&manifest.metadata, self.full),
            "encodings": encodings(manifest)
                .into_iter()
                .map(|(name, tensors, bytes)| json!({ "encoding": name, "tensors": tensors, "bytes": bytes }))
                .collect::<Vec<_>>(),
            "tensors": tensors,
            "unclaimed": resolved.as_ref().map(|m| m.unclaimed.clone()).unwrap_or_default(),
            "defaults": resolved.as_ref().map(|m| m.defaults_used.clone()).unwrap_or_default(),
        })
    }
}

/// What each source tensor is used for: several roles if it is fused, one of several tensors if it is an expert.
#[derive(Default)]
struct Roles<'a>(HashMap<&'a str, Vec<(Option<u32>, &'static str)>>);

impl<'a> Roles<'a> {
    fn of(model: &'a ResolvedModel) -> Self {
        let mut roles: HashMap<&str, Vec<_>> = HashMap::new();
        for weight in &model.weights {
            for source in &weight.sources {
                roles
                    .entry(source)
                    .or_default()
                    .push((weight.layer, weight.role.name()));
            }
        }
        for tensor in &model.host_tensors {
            roles
                .entry(tensor)
                .or_default()
                .push((None, "(read on the host)"));
        }
        for tensor in &model.redundant {
            roles.entry(tensor).or_default().push((None, "(not needed)"));
        }
        Self(roles)
    }

    fn of_tensor(&self, name: &str) -> &[(Option<u32>, &'static str)] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    fn json(&self, name: &str) -> Value {
        self.of_tensor(name)
            .iter()
            .map(|(layer, role)| json!({ "layer": layer, "role": role }))
            .collect()
    }

    fn text(&self, name: &str) -> String {
        let of: Vec<_> = self
            .of_tensor(name)
            .iter()
            .map(|(layer, role)| match layer {
                Some(layer) => format!("{role} {layer}"),
                None => (*role).to_owned(),
            })
            .collect();
        of.join(", ")
    }
}

/// Each encoding with its tensors and bytes, the largest first.
fn encodings(manifest: &Manifest) -> Vec<(&'static str, u64, u64)> {
    let mut found: HashMap<&str, (u64, u64)> = HashMap::new();
    for tensor in &manifest.tensors {
        let (tensors, bytes) = found.entry(tensor.encoding.name()).or_default();
        *tensors += 1;
        *bytes = bytes.saturating_add(tensor.nbytes);
    }
    let mut rows: Vec<_> = found
        .into_iter()
        .map(|(name, (tensors, bytes))| (name, tensors, bytes))
        .collect();
    rows.sort_by_key(|(name, _, bytes)| (std::cmp::Reverse(*bytes), *name));
    rows
}

fn text(manifest: &Manifest, model: Option<&ResolvedModel>) -> String {
    let roles = model.map(Roles::of).unwrap_or_default();
    let mut text = match model {
        Some(model) => report::model::line_of(manifest, model),
        None => format!("{}  ({})", report::model::path(manifest), manifest.format),
    };
    text.push_str("\n\n");
    text.push_str(&table::facts(report::metadata::rows(&manifest.metadata)));
    text.push('\n');
    text.push_str(&table::render(
        &[
            ("tensor", Align::Left),
            ("encoding", Align::Left),
            ("shape", Align::Left),
            ("size", Align::Right),
            ("role", Align::Left),
        ],
        manifest.tensors.iter().map(|tensor| {
            vec![
                tensor.name.clone(),
                tensor.encoding.to_string(),
                shape(tensor),
                units::bytes(tensor.nbytes),
                if model.is_some_and(|m| m.unclaimed.contains(&tensor.name)) {
                    "(no role)".into()
                } else {
                    roles.text(&tensor.name)
                },
            ]
        }),
    ));
    text.push('\n');
    text.push_str(&table::render(
        &[
            ("encoding", Align::Left),
            ("tensors", Align::Right),
            ("size", Align::Right),
        ],
        encodings(manifest)
            .into_iter()
            .map(|(name, tensors, bytes)| vec![name.to_owned(), tensors.to_string(), units::bytes(bytes)]),
    ));
    if let Some(model) = model.filter(|m| !m.defaults_used.is_empty()) {
        text.push_str("\nnot in the file, the format's default is used:\n");
        text.push_str(&table::facts(model.defaults_used.iter().cloned()));
    }
    text
}

fn shape(tensor: &TensorInfo) -> String {
    let dimensions: Vec<_> = tensor.shape.iter().map(u64::to_string).collect();
    format!("[{}]", dimensions.join(", "))
}
