//! Who may import whom: the arrows of ARCHITECTURE.md, read from `cargo metadata` and enforced.
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends with the first error"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// For every package of the workspace, the packages of the workspace it may depend on. Development dependencies count:
/// a test that needs a forbidden crate belongs into `hoist-tests`.
const ALLOWED: &[(&str, &[&str])] = &[
    ("hoist-backend", &[]),
    ("hoist-quant", &["hoist-backend"]),
    ("hoist-formats", &["hoist-backend", "hoist-quant"]),
    ("hoist-model", &["hoist-backend", "hoist-quant", "hoist-formats"]),
    ("hoist-text", &["hoist-formats"]),
    (
        "hoist-orchestrator",
        &["hoist-backend", "hoist-quant", "hoist-formats", "hoist-model"],
    ),
    (
        "hoist-core",
        &[
            "hoist-backend",
            "hoist-quant",
            "hoist-formats",
            "hoist-model",
            "hoist-text",
            "hoist-orchestrator",
        ],
    ),
    ("hoist-cpu", &["hoist-backend", "hoist-quant"]),
    ("hoist-wgpu", &["hoist-backend", "hoist-quant"]),
    // The emulated device is of its tests only.
    (
        "hoist-cuda",
        &["hoist-backend", "hoist-quant", "hoist-cuda-emulator"],
    ),
    ("hoist-cuda-emulator", &[]),
    ("hoist-wgpu-faults", &[]),
    ("hoist-synth", &["hoist-backend", "hoist-formats"]),
    ("hoist-plugin-abi", &[]),
    ("hoist-plugin-host", &["hoist-backend", "hoist-plugin-abi"]),
    ("hoist-plugin-sdk", &["hoist-backend", "hoist-plugin-abi"]),
    ("hoist-plugin-cpu", &["hoist-plugin-sdk", "hoist-cpu"]),
    ("hoist-plugin-faulty", &["hoist-plugin-sdk", "hoist-cpu"]),
    ("hoist-plugin-panicking", &["hoist-plugin-sdk", "hoist-cpu"]),
    ("hoist-plugin-rust-minimal", &["hoist-plugin-sdk"]),
    // The oracle shares no code with a backend, nor with the decoder that a backend uses.
    (
        "hoist-conformance",
        &[
            "hoist-backend",
            "hoist-formats",
            "hoist-model",
            "hoist-plugin-abi",
            "hoist-synth",
        ],
    ),
];

/// Packages that may depend on anything.
const TOP: &[&str] = &["hoist", "hoist-tests", "xtask"];

fn metadata() -> serde_json::Value {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version=1",
            "--no-deps",
            "--offline",
            "--manifest-path",
            manifest,
        ])
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("cargo prints JSON")
}

fn arrows() -> BTreeMap<String, BTreeSet<String>> {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().expect("packages");
    let names: BTreeSet<&str> = packages
        .iter()
        .map(|p| p["name"].as_str().expect("name"))
        .collect();
    packages
        .iter()
        .map(|p| {
            let dependencies = p["dependencies"].as_array().expect("dependencies");
            let ours = dependencies
                .iter()
                .map(|d| d["name"].as_str().expect("name"))
                .filter(|d| names.contains(d))
                .map(str::to_owned)
                .collect();
            (p["name"].as_str().expect("name").to_owned(), ours)
        })
        .collect()
}

#[test]
fn every_arrow_is_allowed() {
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    for (package, dependencies) in arrows() {
        if TOP.contains(&package.as_str()) {
            continue;
        }
        let allowed = allowed
            .get(package.as_str())
            .unwrap_or_else(|| panic!("package `{package}` has no row in ALLOWED: say whom it may import"));
        for dependency in dependencies {
            assert!(
                allowed.contains(&dependency.as_str()),
                "`{package}` must not depend on `{dependency}`; it may on {allowed:?}"
            );
        }
    }
}

#[test]
fn every_row_names_a_package() {
    let arrows = arrows();
    for package in ALLOWED.iter().map(|(p, _)| p).chain(TOP) {
        assert!(
            arrows.contains_key(*package),
            "`{package}` is in the table and not in the workspace"
        );
    }
}
