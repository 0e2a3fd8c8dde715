use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use hoist_core::backend::{Error as BackendError, Outputs, Run, SequenceId, TokenBatch, Want};
use hoist_core::text::{EncodeOptions, Tokenizer};
use serde_json::{Value, json};

use crate::args::{ContextArgs, DeviceArgs, ModelArg};
use crate::exit::Code;
use crate::output::Output;
use crate::report::table::{self, Align};
use crate::report::{self, print_json, print_text};
use crate::watch::{catch_interrupts, interrupted};
use crate::{decoding, digests, models};

/// How many of the largest logits are shown.
const TOP: usize = 5;

/// Print what a model makes of given tokens: for each position the arg-max, the five largest logits, and a BLAKE3 digest of
/// all of them as little-endian f32.
#[derive(Args, Debug)]
pub(crate) struct Logits {
    #[command(flatten)]
    model: ModelArg,

    /// Token ids, separated by commas
    #[arg(
        long,
        value_name = "IDS",
        value_delimiter = ',',
        required_unless_present = "prompt"
    )]
    tokens: Vec<u32>,

    /// A text, instead of tokens; `-` reads standard input
    #[arg(
        short,
        long,
        value_name = "TEXT",
        conflicts_with = "tokens",
        allow_hyphen_values = true
    )]
    prompt: Option<String>,

    /// Tokens of one batch; changes no bit
    #[arg(long, value_name = "K", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    chunk: u32,

    /// Sequences in the batch: the first one is shown, the others run other tokens beside it; changes no bit
    #[arg(long, value_name = "B", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    batch: u32,

    /// Run everything once before, and again after a reset; changes no bit
    #[arg(long)]
    twice: bool,

    /// Write all logits to a file, as little-endian f32 [positions, vocabulary]
    #[arg(long, value_name = "PATH")]
    dump: Option<PathBuf>,

    #[command(flatten)]
    device: DeviceArgs,

    #[command(flatten)]
    context: ContextArgs,
}

struct Position {
    argmax: u32,
    top: Vec<(u32, f32)>,
    digest: blake3::Hash,
}

impl Logits {
    pub(crate) fn run(&self, json: bool) -> Result<Code> {
        let prompt = self.prompt.as_deref().map(decoding::typed).transpose()?;
        // Not earlier: a request to stop is heeded at once while the prompt is being typed.
        catch_interrupts()?;
        let mut dump = self.dump.as_deref().map(Output::create).transpose()?;
        let opened = models::open(&self.model)?;
        let tokens = match &prompt {
            Some(text) => {
                let tokenizer = Tokenizer::from_manifest(&opened.manifest)?;
                let options = EncodeOptions {
                    add_special: true,
                    parse_special: false,
                };
                decoding::encode(&tokenizer, text, options)?
            }
            None => self.tokens.clone(),
        };
        let mut decode = self.context.decode_options();
        decode.sequences = self.batch;
        decode.batch_tokens = Some(self.chunk.saturating_mul(self.batch));
        decoding::widen(&mut decode, &opened, tokens.len());
        let mut loaded = decoding::load(opened, &self.device, decode)?;
        let vocab = loaded.program.as_ref().map_or(0, |(program, _)| program.vocab);
        let backend = report::plan::backend_json(loaded.backend.info());
        let model = report::model::json(&loaded.manifest, &loaded.model);
        let decoder = loaded.prepare()?;
        if self.twice {
            self.forward(decoder, &tokens, vocab, |_| Ok(()))?;
            for sequence in 0..self.batch {
                decoder.truncate(SequenceId(sequence), 0)?;
            }
        }
        let mut positions = Vec::with_capacity(tokens.len());
        self.forward(decoder, &tokens, vocab, |logits| {
            if let Some(dump) = &mut dump {
                let bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
                dump.append(&bytes)?;
            }
            let top = largest(logits);
            positions.push(Position {
                argmax: top.first().map_or(0, |(id, _)| *id),
                top,
                digest: digests::of_logits(logits),
            });
            Ok(())
        })?;
        if let Some(dump) = dump {
            dump.keep()?;
        }
        if json {
            print_json(&json!({
                "schema": "hoist.logits/1",
                "model": model,
                "backend": backend,
                "vocab": vocab,
                "tokens": tokens,
                "chunk": self.chunk,
                "batch": self.batch,
                "positions": positions.iter().enumerate().map(|(i, p)| p.json(i)).collect::<Vec<_>>(),
                "digest": of_all(&positions).to_hex().as_str(),
            }))?;
        } else {
            print_text(&text(&positions))?;
        }
        Ok(Code::Ok)
    }

    /// Runs the tokens through the first sequence, and rotations of them through the others, in chunks; gives each
    /// position's logits to `each`.
    fn forward(
        &self,
        decoder: &mut dyn hoist_core::backend::DecodeBackend,
        tokens: &[u32],
        vocab: u32,
        mut each: impl FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        let others: Vec<Vec<u32>> = (1..self.batch as usize)
            .map(|i| {
                let mut rotated = tokens.to_vec();
                rotated.rotate_left(i % tokens.len());
                rotated
            })
            .collect();
        let chunk = self.chunk as usize;
        let all = vec![Want::Logits; chunk];
        let none = vec![Want::Nothing; chunk];
        let mut logits = vec![0f32; chunk.min(tokens.len()) * vocab as usize];
        let mut at = 0;
        while at < tokens.len() {
            if interrupted() {
                return Err(BackendError::Cancelled.into());
            }
            let end = tokens.len().min(at + chunk);
            let n = end - at;
            // The shown sequence stands in the middle, so that its place in the batch is nothing special.
            let mut runs: Vec<Run<'_>> = others
                .iter()
                .enumerate()
                .map(|(i, tokens)| Run {
                    sequence: SequenceId(i as u32 + 1),
                    tokens: &tokens[at..end],
                    want: &none[..n],
                })
                .collect();
            let shown = Run {
                sequence: SequenceId(0),
                tokens: &tokens[at..end],
                want: &all[..n],
            };
            runs.insert(runs.len() / 2, shown);
            let logits = &mut logits[..n * vocab as usize];
            decoder.forward(
                &TokenBatch { runs: &runs },
                &mut Outputs {
                    argmax: &mut [],
                    logits,
                },
            )?;
            logits.chunks_exact(vocab as usize).try_for_each(&mut each)?;
            at = end;
        }
        Ok(())
    }
}

/// The largest logits, in descending order; of equal ones the lower token first.
fn largest(logits: &[f32]) -> Vec<(u32, f32)> {
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(TOP + 1);
    for (id, logit) in (0u32..).zip(logits) {
        let place = top.partition_point(|(_, other)| other >= logit);
        if place < TOP {
            top.insert(place, (id, *logit));
            top.truncate(TOP);
        }
    }
    top
}

/// One word for a whole run.
fn of_all(positions: &[Position]) -> blake3::Hash {
    digests::of_all(positions.iter().map(|p| &p.digest))
}

impl Position {
    fn json(&self, position: usize) -> Value {
        json!({
            "position": position,
            "argmax": self.argmax,
            "top": self.top.iter().map(|(id, logit)| json!([id, logit])).collect::<Vec<_>>(),
            "digest": self.digest.to_hex().as_str(),
        })
    }
}

fn text(positions: &[Position]) -> String {
    let rows = positions.iter().enumerate().map(|(i, p)| {
        let mut top = String::new();
        for (id, logit) in &p.top {
            // Writing to a String does not fail.
            let _ = write!(top, "{id}:{logit:.4}  ");
        }
        vec![
            i.to_string(),
            p.argmax.to_string(),
            top.trim_end().to_owned(),
            p.digest.to_hex()[..16].to_owned(),
        ]
    });
    let table = table::render(
        &[
            ("position", Align::Right),
            ("arg-max", Align::Right),
            ("largest", Align::Left),
            ("BLAKE3", Align::Left),
        ],
        rows,
    );
    format!("{table}\nall positions: {}\n", of_all(positions).to_hex())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_come_first_and_equal_ones_by_id() {
        let logits = [1.0, 7.0, -3.0, 7.0, 0.0, 2.0, 9.0, 1.0];
        assert_eq!(
            largest(&logits),
            [(6, 9.0), (1, 7.0), (3, 7.0), (5, 2.0), (0, 1.0)]
        );
        assert_eq!(largest(&[0.5]), [(0, 0.5)]);
    }
}
