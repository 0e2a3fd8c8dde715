use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use hoist_core::backend::{Error as BackendError, Outputs, Run, SequenceId, TokenBatch, Want};
use hoist_core::text::{EncodeOptions, MAX_TEXT_BYTES, Tokenizer};
use serde_json::json;

use crate::args::{ContextArgs, DeviceArgs};
use crate::exit::{Code, Usage};
use crate::report::{self, print_json, print_text, units};
use crate::watch::{catch_interrupts, interrupted};
use crate::{decoding, models};

/// Measure how well a model predicts a text: the exponential of the mean negative log-likelihood a token.
///
/// The text is cut into windows of the context, each of which starts anew; the first token of a window is given, the others
/// are predicted.
#[derive(Args, Debug)]
pub(crate) struct Perplexity {
    /// A GGUF, SafeTensors or APR file, or a Hugging Face folder
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// A text file
    #[arg(value_name = "TEXT")]
    text: PathBuf,

    /// Most windows to measure; all if not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    windows: Option<u32>,

    /// Tokens of one batch; changes no bit
    #[arg(long, value_name = "K", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    chunk: u32,

    #[command(flatten)]
    device: DeviceArgs,

    #[command(flatten)]
    context: ContextArgs,
}

/// Positions of a window where nothing else is asked for.
const DEFAULT_WINDOW: u32 = 512;
/// Longest text that is read.
const MAX_TEXT: u64 = MAX_TEXT_BYTES as u64;

impl Perplexity {
    pub(crate) fn run(&self, json: bool) -> Result<Code> {
        catch_interrupts()?;
        let text = decoding::read_text(&self.text, MAX_TEXT)?;
        let opened = models::open(&crate::args::ModelArg {
            file: Some(self.file.clone()),
        })?;
        let tokenizer = Tokenizer::from_manifest(&opened.manifest)?;
        let options = EncodeOptions {
            add_special: true,
            parse_special: false,
        };
        let tokens = tokenizer.encode(&text, options)?;
        let mut decode = self.context.decode_options();
        let window = decode
            .context
            .unwrap_or(DEFAULT_WINDOW.min(opened.model.hyper.context_length));
        if window < 2 {
            return Err(Usage(format!(
                "a context of {window} leaves nothing to predict: the first token of a window is given"
            ))
            .into());
        }
        decode.context = Some(window);
        decode.batch_tokens = Some(self.chunk);
        let windows: Vec<&[u32]> = tokens
            .chunks(window as usize)
            .filter(|w| w.len() > 1)
            .take(self.windows.map_or(usize::MAX, |n| n as usize))
            .collect();
        if windows.is_empty() {
            return Err(
                Usage("the text has fewer than two tokens: there is nothing to predict".into()).into(),
            );
        }
        let mut loaded = decoding::load(opened, &self.device, decode)?;
        let vocab = loaded.program.as_ref().map_or(0, |(program, _)| program.vocab) as usize;
        let model = report::model::json(&loaded.manifest, &loaded.model);
        let backend = report::plan::backend_json(loaded.backend.info());
        let decoder = loaded.prepare()?;
        let chunk = self.chunk as usize;
        let wants = vec![Want::Logits; chunk];
        let mut logits = vec![0f32; chunk.min(window as usize) * vocab];
        let (mut sum, mut predicted) = (0f64, 0u64);
        let started = Instant::now();
        for window in &windows {
            decoder.truncate(SequenceId(0), 0)?;
            // The last token is only predicted.
            let given = &window[..window.len() - 1];
            for (i, tokens) in given.chunks(chunk).enumerate() {
                if interrupted() {
                    return Err(BackendError::Cancelled.into());
                }
                let runs = [Run {
                    sequence: SequenceId(0),
                    tokens,
                    want: &wants[..tokens.len()],
                }];
                let logits = &mut logits[..tokens.len() * vocab];
                decoder.forward(
                    &TokenBatch { runs: &runs },
                    &mut Outputs {
                        argmax: &mut [],
                        logits,
                    },
                )?;
                let next = &window[i * chunk + 1..];
                for (logits, token) in logits.chunks_exact(vocab).zip(next) {
                    sum += negative_log_likelihood(logits, *token);
                    predicted += 1;
                }
            }
        }
        let seconds = started.elapsed();
        let mean = sum / predicted as f64;
        if json {
            print_json(&json!({
                "schema": "hoist.perplexity/1",
                "model": model,
                "backend": backend,
                "text": self.text.display().to_string(),
                "tokens": tokens.len(),
                "window": window,
                "windows": windows.len(),
                "predicted": predicted,
                "mean_nll": mean,
                "perplexity": mean.exp(),
                "seconds": units::rounded(seconds.as_secs_f64(), 3),
            }))?;
        } else {
            print_text(&format!(
                "perplexity {:.4} over {predicted} tokens in {} windows of {window} ({})\n",
                mean.exp(),
                windows.len(),
                units::time(seconds)
            ))?;
        }
        Ok(Code::Ok)
    }
}

/// `ln Σ exp(logit) − logit[token]`, in f64.
fn negative_log_likelihood(logits: &[f32], token: u32) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - largest).exp()).sum();
    sum.ln() + f64::from(largest) - f64::from(logits[token as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_odds_cost_the_logarithm_of_their_number() {
        let nll = negative_log_likelihood(&[3.0; 8], 5);
        assert!((nll - 8f64.ln()).abs() < 1e-12);
        assert!(negative_log_likelihood(&[0.0, 50.0], 1) < 1e-12);
    }
}
