//! Options that several commands share.

use std::path::PathBuf;

use clap::Args;
use hoist_core::backend::{FloatLayout, KvDtype, OpenOptions};
use hoist_core::orchestrator::DecodeOptions;

/// Where weights go.
#[derive(Args, Clone, Debug)]
pub(crate) struct DeviceArgs {
    /// Backend, or one of its devices, as `hoist devices` lists them; plugin:PATH, or plugin:NAME of a trusted one, for a
    /// backend in a shared library (#1 behind it: its second device)
    #[arg(long, value_name = "BACKEND", default_value = "cpu")]
    pub(crate) backend: String,

    /// Most memory to own on the device, such as 4GiB or 500000000
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub(crate) memory: Option<u64>,

    /// Threads on the host [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) threads: Option<u32>,

    /// Map weights from the file instead of copying them; nobody may change the file meanwhile
    #[arg(long)]
    pub(crate) import: bool,

    /// Use portable scalar code only, to compare with
    #[arg(long)]
    pub(crate) force_scalar: bool,

    /// Run a plugin in a process of its own, where its crashes and hangs stay
    #[arg(long)]
    pub(crate) isolate: bool,

    /// Longest time for one call of an isolated plugin
    #[arg(long, value_name = "SECONDS", default_value_t = 60, requires = "isolate",
          value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) isolate_limit: u64,

    /// Longest time for trying out a plugin given by path, in a process that is thrown away [default: 30]
    #[arg(long, value_name = "SECONDS", conflicts_with = "isolate",
          value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) probe_limit: Option<u64>,

    /// Layout of float matrices, whatever the backend prefers; a test switch
    #[arg(long, value_name = "LAYOUT", value_enum, hide = true)]
    pub(crate) float_layout: Option<Layout>,
}

/// A layout of float matrices.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
pub(crate) enum Layout {
    /// `[out, in]`
    OutIn,
    /// `[in, out]`
    InOut,
}

impl DeviceArgs {
    /// As the contract names them.
    pub(crate) fn open_options(&self) -> OpenOptions {
        OpenOptions {
            memory_budget: self.memory,
            threads: self.threads,
            import: self.import,
            force_scalar: self.force_scalar,
            float_layout: self.float_layout.map(|layout| match layout {
                Layout::OutIn => FloatLayout::OutIn,
                Layout::InOut => FloatLayout::InOut,
            }),
        }
    }
}

/// How long a sequence may be, for commands that say themselves how many there are.
#[derive(Args, Clone, Debug)]
pub(crate) struct ContextArgs {
    /// Positions of a sequence [default: 4096, or the model's own if that is less]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) context: Option<u32>,

    /// How keys and values are stored; f32 is a test switch outside the contract
    #[arg(long, value_name = "DTYPE", value_enum, default_value = "f16", hide = true)]
    pub(crate) kv: Kv,
}

/// How keys and values are stored.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
pub(crate) enum Kv {
    /// f16
    F16,
    /// f32
    F32,
}

impl ContextArgs {
    /// As the orchestrator names them: one sequence.
    pub(crate) fn decode_options(&self) -> DecodeOptions {
        DecodeOptions {
            context: self.context,
            sequences: 1,
            batch_tokens: None,
            kv: match self.kv {
                Kv::F16 => KvDtype::F16,
                Kv::F32 => KvDtype::F32,
            },
        }
    }
}

/// As [`ContextArgs`], and how many tokens are taken at once.
#[derive(Args, Clone, Debug)]
pub(crate) struct BatchArgs {
    #[command(flatten)]
    context: ContextArgs,

    /// Most tokens of one batch [default: 128, or all positions if that is less]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    batch_tokens: Option<u32>,
}

impl BatchArgs {
    /// As the orchestrator names them: one sequence.
    pub(crate) fn decode_options(&self) -> DecodeOptions {
        DecodeOptions {
            batch_tokens: self.batch_tokens,
            ..self.context.decode_options()
        }
    }
}

/// How much is to be decoded at once.
#[derive(Args, Clone, Debug)]
pub(crate) struct CapacityArgs {
    #[command(flatten)]
    batch: BatchArgs,

    /// Sequences
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    sequences: u32,
}

impl CapacityArgs {
    /// Whether anything but the defaults is asked for.
    pub(crate) fn is_given(&self) -> bool {
        let defaults = DecodeOptions::default();
        let DecodeOptions {
            context,
            sequences,
            batch_tokens,
            ..
        } = self.decode_options();
        (context, sequences, batch_tokens) != (defaults.context, defaults.sequences, defaults.batch_tokens)
    }

    /// As the orchestrator names them.
    pub(crate) fn decode_options(&self) -> DecodeOptions {
        DecodeOptions {
            sequences: self.sequences,
            ..self.batch.decode_options()
        }
    }
}

/// A model, or the one that is part of the program.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModelArg {
    /// A GGUF, SafeTensors or APR file, or a Hugging Face folder; without it, the model that is part of this program
    #[arg(value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
}

/// A number of bytes, with a decimal or binary unit.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        other => {
            return Err(format!(
                "`{other}` is no unit; known are KB, MB, GB, TB, KiB, MiB, GiB, TiB"
            ));
        }
    };
    let number = digits.trim_end();
    if let Ok(whole) = number.parse::<u64>() {
        return whole
            .checked_mul(unit)
            .ok_or_else(|| "more than 2^64 bytes".into());
    }
    let fraction: f64 = number.parse().map_err(|_| format!("`{number}` is no number"))?;
    let bytes = fraction * unit as f64;
    if !(0.0..u64::MAX as f64).contains(&bytes) {
        return Err("out of range".into());
    }
    Ok(bytes as u64)
}

/// A range of layers: `A-B`, or one.
pub(crate) fn parse_layers(text: &str) -> Result<(u32, u32), String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let number = |part: &str| {
        part.parse::<u32>()
            .map_err(|_| format!("`{part}` is no layer number"))
    };
    let (first, last) = (number(first)?, number(last)?);
    if first > last {
        return Err(format!("{first} comes after {last}"));
    }
    Ok((first, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_decimal_and_binary_units() {
        for (text, bytes) in [
            ("0", 0),
            ("12345", 12345),
            ("1KB", 1000),
            ("1k", 1024),
            ("2GiB", 2 << 30),
            ("1.5 MiB", 3 << 19),
            ("16 TB", 16_000_000_000_000),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "GiB",
            "-1",
            "1e30",
            "3 parsecs",
            "99999999999999999999",
            "20000000T",
            "NaN",
        ] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn layers_are_one_or_a_range() {
        assert_eq!(parse_layers("3"), Ok((3, 3)));
        assert_eq!(parse_layers("0-29"), Ok((0, 29)));
        for text in ["", "-", "1-", "5-4", "a-b", "-1"] {
            assert!(parse_layers(text).is_err(), "{text}");
        }
    }
}
