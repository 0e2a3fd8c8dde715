use anyhow::Result;
use clap::Args;
use hoist_core::backend::{DeviceInfo, Error};
use serde_json::{Map, Value, json};

use crate::backends;
use crate::exit::Code;
use crate::report::table::{self, Align};
use crate::report::{print_json, print_text, units};

/// List backends and their devices.
#[derive(Args, Debug)]
pub(crate) struct Devices {}

impl Devices {
    pub(crate) fn run(&self, json: bool) -> Result<Code> {
        let backends = backends::devices();
        if json {
            let backends: Vec<_> = backends
                .iter()
                .map(|(name, found)| backend_json(name, found))
                .collect();
            print_json(&json!({ "schema": "hoist.devices/1", "backends": backends }))?;
        } else {
            let rows = backends
                .iter()
                .flat_map(|(name, found)| backend_rows(name, found));
            print_text(&table::render(
                &[
                    ("device", Align::Left),
                    ("memory", Align::Right),
                    ("name", Align::Left),
                    ("", Align::Left),
                ],
                rows,
            ))?;
        }
        Ok(Code::Ok)
    }
}

fn backend_json(name: &str, found: &Result<Vec<DeviceInfo>, Error>) -> Value {
    let device = |d: &DeviceInfo| {
        let details: Map<_, _> = d.details.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
        json!({ "id": d.id, "name": d.name, "total_memory": d.total_memory, "details": details })
    };
    match found {
        Ok(devices) => {
            json!({ "name": name, "devices": devices.iter().map(device).collect::<Vec<_>>(), "unavailable": null })
        }
        Err(error) => json!({ "name": name, "devices": [], "unavailable": error.to_string() }),
    }
}

fn backend_rows(name: &str, found: &Result<Vec<DeviceInfo>, Error>) -> Vec<Vec<String>> {
    match found {
        Ok(devices) => devices
            .iter()
            .map(|d| {
                let details: Vec<_> = d.details.iter().map(|(k, v)| format!("{k}: {v}")).collect();
                vec![
                    d.id.clone(),
                    units::bytes(d.total_memory),
                    d.name.clone(),
                    details.join(", "),
                ]
            })
            .collect(),
        Err(error) => vec![vec![
            name.to_owned(),
            String::new(),
            error.to_string(),
            String::new(),
        ]],
    }
}
