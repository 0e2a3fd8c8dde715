//! Real models, where the machine has them: `scripts/fetch-models.sh` fetches them. Without them these tests are shown
//! as ignored, or fail if `CI` is set.

use std::path::{Path, PathBuf};
use std::process::Command;

use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;

const SMOLLM2: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const GEMMA3: &str = "gemma-3-270m-q4_k_m.gguf";

fn models() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default());
    std::env::var_os("HOIST_MODELS").map_or_else(|| home().join(".cache/hoist/models"), PathBuf::from)
}

type Test = fn(&Path) -> Result<(), Failed>;

fn main() {
    let tests: &[(&str, &str, Test)] = &[
        (
            "every_weight_of_smollm2_is_resident_and_verified",
            SMOLLM2,
            smollm2,
        ),
        ("every_weight_of_gemma3_is_resident_and_verified", GEMMA3, gemma3),
        ("imported_weights_of_smollm2_are_verified", SMOLLM2, imported),
        ("a_plan_of_gemma3_is_what_its_load_takes", GEMMA3, planned),
    ];
    let required = std::env::var_os("CI").is_some();
    let trials = tests
        .iter()
        .map(|&(name, model, test)| {
            let path = models().join(model);
            let missing = !path.exists();
            Trial::test(name, move || {
                if missing {
                    return Err(format!(
                        "{} is not there; scripts/fetch-models.sh fetches it",
                        path.display()
                    )
                    .into());
                }
                test(&path)
            })
            .with_ignored_flag(missing && !required)
        })
        .collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

fn json(arguments: &[&str], path: &Path) -> Result<Value, Failed> {
    let output = Command::new(env!("CARGO_BIN_EXE_hoist"))
        .args(arguments)
        .arg("--json")
        .arg(path)
        .output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn expect(what: &str, found: &Value, expected: impl Into<Value>) -> Result<(), Failed> {
    let expected = expected.into();
    if *found == expected {
        return Ok(());
    }
    Err(format!("{what}: expected {expected}, found {found}").into())
}

/// No memory beyond what is resident and 64 MiB.
fn expect_peak(report: &Value) -> Result<(), Failed> {
    let resident = report["resident"]["total"].as_u64().unwrap_or(0);
    match report["peak_rss_bytes"].as_u64() {
        Some(peak) if peak > resident / 2 && peak <= resident + (64 << 20) => Ok(()),
        peak => Err(format!("peak of {peak:?} bytes with {resident} resident").into()),
    }
}

fn smollm2(path: &Path) -> Result<(), Failed> {
    let report = json(&["load", "--verify"], path)?;
    expect("architecture", &report["model"]["architecture"], "llama")?;
    expect("layers", &report["model"]["layers"], 30)?;
    expect("quantised", &report["weights"]["quantized"], 211)?;
    expect("float", &report["weights"]["float"], 0)?;
    expect("gamma", &report["weights"]["gamma"], 61)?;
    expect("bias", &report["weights"]["bias"], 0)?;
    expect("index layers", &report["index"]["layers"], 30)?;
    expect("verified", &report["verified"]["weights"], 272)?;
    expect("mismatches", &report["verified"]["mismatches"], 0)?;
    expect("unclaimed", &report["unclaimed"], Vec::<Value>::new())?;
    expect_peak(&report)
}

fn gemma3(path: &Path) -> Result<(), Failed> {
    let report = json(&["load", "--verify", "--context", "512"], path)?;
    expect("architecture", &report["model"]["architecture"], "gemma3")?;
    expect("layers", &report["model"]["layers"], 18)?;
    // 7 matrices a layer and the embedding, which is the output too; 6 norms a layer and the last.
    let matrices = report["weights"]["quantized"].as_u64().unwrap_or(0)
        + report["weights"]["float"].as_u64().unwrap_or(0);
    expect("matrices", &matrices.into(), 18 * 7 + 1)?;
    expect("gamma", &report["weights"]["gamma"], 18 * 6 + 1)?;
    expect("verified", &report["verified"]["weights"], 18 * 13 + 2)?;
    expect("mismatches", &report["verified"]["mismatches"], 0)?;
    expect("unclaimed", &report["unclaimed"], Vec::<Value>::new())?;
    expect_peak(&report)
}

fn imported(path: &Path) -> Result<(), Failed> {
    let report = json(&["load", "--verify", "--import"], path)?;
    expect("verified", &report["verified"]["weights"], 272)?;
    expect("mismatches", &report["verified"]["mismatches"], 0)?;
    expect(
        "mapped",
        &report["mapped_bytes"],
        report["weights"]["bytes"].clone(),
    )
}

fn planned(path: &Path) -> Result<(), Failed> {
    let capacity = ["--context", "777", "--sequences", "2"];
    let plan = json(&[&["plan"][..], &capacity].concat(), path)?;
    let report = json(&[&["load"][..], &capacity].concat(), path)?;
    expect("resident", &report["resident"], plan["resident"].clone())
}
