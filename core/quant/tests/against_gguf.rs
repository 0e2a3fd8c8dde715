//! Every encoding against the Python package `gguf` (and, where that lacks one, against `scripts/quant/reference.py`) on
//! many random blocks, bit for bit.
//!
//! Where `python3`, numpy or `gguf` 0.19.0 are missing the comparisons are ignored, visibly; with `CI` set in the
//! environment they fail. `HOIST_QUANT_BLOCKS` and `HOIST_QUANT_SEED` override how many blocks and which.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use hoist_backend::{Encoding, EncodingKind};
use hoist_quant::dequantize;
use libtest_mimic::{Arguments, Failed, Trial};

/// The version whose decode is the definition.
const GGUF: &str = "gguf 0.19.0,";

fn main() -> ExitCode {
    let args = Arguments::from_args();
    let reference = python(&["--versions"]).and_then(|out| {
        let versions = String::from_utf8_lossy(&out).trim().to_owned();
        if versions.starts_with(GGUF) {
            Ok(versions)
        } else {
            Err(format!("needs {GGUF} found {versions}"))
        }
    });
    let skip = reference.is_err() && std::env::var_os("CI").is_none();
    match &reference {
        Ok(versions) => eprintln!("reference: {versions}"),
        Err(reason) => eprintln!("no reference: {reason}"),
    }
    let trials = Encoding::all()
        .filter(|e| e.kind() != EncodingKind::Other)
        .map(|encoding| {
            let reference = reference.clone();
            let name = format!("{encoding}_decodes_random_blocks_as_the_reference_does");
            Trial::test(name, move || {
                reference?;
                compare(encoding)
            })
            .with_ignored_flag(skip)
        })
        .collect();
    libtest_mimic::run(&args, trials).exit_code()
}

/// What `scripts/quant/compare_large.py` writes to its standard output.
fn python(args: &[&str]) -> Result<Vec<u8>, String> {
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../scripts/quant/compare_large.py");
    let output = Command::new("python3")
        // Leaves no compiled files in the source tree.
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .arg(script)
        .args(args)
        .output()
        .map_err(|e| format!("python3 cannot be started: {e}"))?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        let stderr = String::from_utf8_lossy(&output.stderr);
        Err(stderr.lines().last().unwrap_or("python3 failed").to_owned())
    }
}

fn number_from_environment(name: &str, default: u64) -> Result<u64, String> {
    match std::env::var(name) {
        Err(_) => Ok(default),
        Ok(text) => text.parse().map_err(|e| format!("{name}={text}: {e}")),
    }
}

fn compare(encoding: Encoding) -> Result<(), Failed> {
    let blocks = match encoding {
        // A block is one value.
        Encoding::F32 | Encoding::F16 | Encoding::BF16 => 1 << 20,
        _ => number_from_environment("HOIST_QUANT_BLOCKS", 20_480)?,
    };
    let seed = number_from_environment("HOIST_QUANT_SEED", 42)?;
    let output = python(&[encoding.name(), &blocks.to_string(), &seed.to_string()])?;
    let (bytes, output) = length_prefixed(&output, 1)?;
    let (values, output) = length_prefixed(output, 4)?;
    if !output.is_empty() {
        return Err("the reference wrote more than it announced".into());
    }
    let expected: Vec<u32> = values
        .as_chunks()
        .0
        .iter()
        .map(|x| u32::from_le_bytes(*x))
        .collect();
    // AprQ8 comes as many small matrices, each with its scale in front.
    let per_call = if encoding == Encoding::APR_Q8 {
        68
    } else {
        bytes.len()
    };
    if bytes.len() as u64 / encoding.block_bytes() < blocks {
        return Err("the reference made fewer blocks than asked for".into());
    }

    let mut found = vec![f32::NAN; expected.len()];
    let values_per_call = expected.len() / (bytes.len() / per_call);
    for (bytes, out) in bytes
        .chunks_exact(per_call)
        .zip(found.chunks_exact_mut(values_per_call))
    {
        dequantize(encoding, bytes, out)?;
    }
    let first = found.iter().zip(&expected).position(|(f, e)| f.to_bits() != *e);
    match first {
        None => Ok(()),
        Some(i) => Err(format!(
            "value {i} of {}: found {:#010x}, the reference has {:#010x}",
            expected.len(),
            found[i].to_bits(),
            expected[i]
        )
        .into()),
    }
}

/// A u64 count and that many items of `size` bytes; then the rest.
fn length_prefixed(bytes: &[u8], size: usize) -> Result<(&[u8], &[u8]), String> {
    let (count, rest) = bytes
        .split_first_chunk()
        .ok_or("the reference's output ends early")?;
    let len = usize::try_from(u64::from_le_bytes(*count))
        .ok()
        .and_then(|n| n.checked_mul(size))
        .ok_or("the reference's output has an absurd length")?;
    rest.split_at_checked(len)
        .ok_or_else(|| "the reference's output ends early".to_owned())
}
