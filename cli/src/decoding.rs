//! What the commands that decode share: text to tokens, a model ready to run, tokens through it in chunks.

use std::io::Read;
use std::path::Path;

use anyhow::{Context as _, Result};
use hoist_core::backend::{DecodeBackend, Outputs, Run, SequenceId, TokenBatch, Want};
use hoist_core::orchestrator::{DecodeOptions, LoadedModel, OpenedModel, SessionOptions};
use hoist_core::text::{EncodeOptions, Tokenizer};

use crate::args::DeviceArgs;
use crate::backends;
use crate::exit::Usage;
use crate::watch::{Bar, interrupted};

/// Loads a model so that it can decode.
pub(crate) fn load(opened: OpenedModel, device: &DeviceArgs, decode: DecodeOptions) -> Result<LoadedModel> {
    let bar = Bar::new();
    let backend = backends::select(device)?.open(&device.open_options())?;
    let options = SessionOptions {
        decode: Some(decode),
        verify: false,
        import: device.import,
        watch: &bar,
    };
    Ok(opened.load(backend, &options)?)
}

/// Longest prompt that is read: no model's context holds more.
pub(crate) const MAX_PROMPT: u64 = 16 << 20;

/// A prompt as it was typed; `-` stands for standard input.
pub(crate) fn typed(prompt: &str) -> Result<String> {
    if prompt == "-" {
        return text_of(&mut std::io::stdin().lock(), "standard input", MAX_PROMPT);
    }
    Ok(prompt.to_owned())
}

/// A text file, of at most `limit` bytes.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String> {
    let what = format!("`{}`", path.display());
    let mut file = std::fs::File::open(path).with_context(|| format!("reading {what}"))?;
    text_of(&mut file, &what, limit)
}

/// All that can be read, if it is UTF-8 and at most `limit` bytes.
pub(crate) fn text_of(from: &mut dyn Read, what: &str, limit: u64) -> Result<String> {
    let mut bytes = Vec::new();
    from.take(limit.saturating_add(1))
        .read_to_end(&mut bytes)
        .with_context(|| format!("reading {what}"))?;
    if bytes.len() as u64 > limit {
        return Err(Usage(format!(
            "{what} is no text for this: it has more than {limit} bytes"
        ))
        .into());
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Usage(format!(
            "{what} is no UTF-8 text: at byte {at} there is no character"
        ))
        .into()
    })
}

/// The tokens of a prompt; at least one.
pub(crate) fn encode(tokenizer: &Tokenizer, text: &str, options: EncodeOptions) -> Result<Vec<u32>> {
    let tokens = tokenizer.encode(text, options)?;
    if tokens.is_empty() {
        return Err(
            Usage("the prompt is empty, and this model begins with no token of its own".into()).into(),
        );
    }
    Ok(tokens)
}

/// Makes room for `tokens` positions where the user asked for no context: the model's own limit stays one.
pub(crate) fn widen(decode: &mut DecodeOptions, opened: &OpenedModel, tokens: usize) {
    let wanted = u32::try_from(tokens).unwrap_or(u32::MAX);
    let default = opened.capacity(decode).max_context;
    if decode.context.is_none() && wanted > default {
        decode.context = Some(wanted.min(opened.model.hyper.context_length));
    }
}

/// Appends tokens to a sequence, `chunk` at a time. The last one yields what `want` says; the others nothing.
pub(crate) fn prefill(
    decoder: &mut dyn DecodeBackend,
    sequence: SequenceId,
    tokens: &[u32],
    chunk: usize,
    want: Want,
    out: &mut Outputs<'_>,
) -> Result<()> {
    let mut wants = vec![Want::Nothing; chunk.min(tokens.len())];
    let chunks = tokens.len().div_ceil(chunk);
    for (i, tokens) in tokens.chunks(chunk).enumerate() {
        if interrupted() {
            return Err(hoist_core::backend::Error::Cancelled.into());
        }
        let wants = &mut wants[..tokens.len()];
        let last = i + 1 == chunks;
        wants[tokens.len() - 1] = if last { want } else { Want::Nothing };
        let runs = [Run {
            sequence,
            tokens,
            want: wants,
        }];
        let mut nothing = Outputs {
            argmax: &mut [],
            logits: &mut [],
        };
        decoder.forward(
            &TokenBatch { runs: &runs },
            if last { &mut *out } else { &mut nothing },
        )?;
        wants[tokens.len() - 1] = Want::Nothing;
    }
    Ok(())
}

/// One token through a sequence.
pub(crate) fn step(
    decoder: &mut dyn DecodeBackend,
    sequence: SequenceId,
    token: u32,
    want: Want,
    out: &mut Outputs<'_>,
) -> Result<(), hoist_core::backend::Error> {
    let (tokens, want) = ([token], [want]);
    let runs = [Run {
        sequence,
        tokens: &tokens,
        want: &want,
    }];
    decoder.forward(&TokenBatch { runs: &runs }, out)
}

/// A well-mixed number of two (the finaliser of SplitMix64).
pub(crate) fn pseudo_random(a: u32, b: u32) -> u32 {
    let mut z = (u64::from(a) << 32 | u64::from(b)).wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (z >> 33) as u32
}

/// The place of the largest logit; the lowest one if several are equal.
pub(crate) fn argmax(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (i, logit) in (0u32..).zip(logits) {
        if *logit > best.1 {
            best = (i, *logit);
        }
    }
    best.0
}

/// Seconds of a list of runs as a rate: median, least and most, in `tokens` a second.
pub(crate) struct Rate {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Rate {
    pub(crate) fn of(seconds: &[f64], tokens: f64) -> Self {
        let mut rates: Vec<f64> = seconds.iter().map(|s| tokens / s.max(1e-9)).collect();
        rates.sort_by(f64::total_cmp);
        let at = |i: usize| rates.get(i).copied().unwrap_or(f64::NAN);
        let n = rates.len();
        Self {
            median: (at(n.saturating_sub(1) / 2) + at(n / 2)) / 2.0,
            min: at(0),
            max: at(n.saturating_sub(1)),
        }
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        let r = |x| crate::report::units::rounded(x, 3);
        serde_json::json!({ "median": r(self.median), "min": r(self.min), "max": r(self.max) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_has_a_median_and_its_extremes() {
        let odd = Rate::of(&[0.5, 0.1, 0.25], 1.0);
        assert_eq!((odd.median, odd.min, odd.max), (4.0, 2.0, 10.0));
        let even = Rate::of(&[0.5, 0.1, 0.25, 0.5], 1.0);
        assert_eq!(even.median, 3.0);
    }
}
