use anyhow::Result;
use clap::Args;
use hoist_core::backend::{
    DecodeBackend, Error as BackendError, NumericsClass, Outputs, Run, SequenceId, TokenBatch, Want,
};
use hoist_core::orchestrator::{DecodeOptions, LoadedModel};
use hoist_core::text::{EncodeOptions, Tokenizer};
use serde_json::{Value, json};

use crate::args::{DeviceArgs, ModelArg};
use crate::exit::Code;
use crate::report::table::{self, Align};
use crate::report::{self, print_json, print_text};
use crate::say::say;
use crate::watch::{Steps, catch_interrupts, interrupted};
use crate::{decoding, digests, models};

/// Prove that a backend computes another one's bits for a model, whatever runs beside what.
///
/// The backend of --with decodes some tokens first. Then the backend of --backend decodes them in every batch and every chunk
/// that is asked for, so many times, and every logit is compared by its bits: once where logits are wanted, and once more
/// where only arg-maxima are, which many devices compute by another path. In a batch of several sequences every second one
/// runs the tokens in another order and is compared as well. Exit code 0: all are equal; 1: some are not.
#[derive(Args, Debug)]
pub(crate) struct Compare {
    #[command(flatten)]
    model: ModelArg,

    /// The backend whose bits are the right ones
    #[arg(long, value_name = "BACKEND", default_value = "cpu")]
    with: String,

    /// Pseudo-random tokens of a sequence
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    positions: u32,

    /// Token ids, separated by commas, instead of pseudo-random ones
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with = "positions")]
    tokens: Vec<u32>,

    /// A text, instead of pseudo-random tokens; `-` reads it from standard input
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true, conflicts_with_all = ["positions", "tokens"])]
    prompt: Option<String>,

    /// Tokens of a sequence in one batch, separated by commas; more than there are stand for all
    #[arg(long, value_name = "K", value_delimiter = ',', default_value = "1,5,512",
          value_parser = clap::value_parser!(u32).range(1..))]
    chunks: Vec<u32>,

    /// Sequences side by side, separated by commas
    #[arg(long, value_name = "B", value_delimiter = ',', default_value = "1,2,7,8",
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    batches: Vec<u32>,

    /// How often each of these is run
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    runs: u32,

    #[command(flatten)]
    device: DeviceArgs,
}

/// What a model makes of one position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Made {
    argmax: u32,
    digest: blake3::Hash,
}

/// Tokens of a sequence, and what the backend of `--with` makes of each.
struct Expected {
    tokens: Vec<u32>,
    made: Vec<Made>,
}

/// Where two backends part.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Parting {
    run: u32,
    sequence: u32,
    position: usize,
    expected: Made,
    /// The digest is missing where only the arg-max was asked for.
    found: (u32, Option<blake3::Hash>),
}

/// What became of one batch and chunk.
struct Case {
    batch: u32,
    chunk: u32,
    compared: u64,
    differing: u64,
    first: Option<Parting>,
}

impl Compare {
    pub(crate) fn run(&self, json: bool) -> Result<Code> {
        let prompt = self.prompt.as_deref().map(decoding::typed).transpose()?;
        // Not earlier: a request to stop is heeded at once while the prompt is being typed.
        catch_interrupts()?;
        let most = self.batches.iter().copied().max().unwrap_or(1);
        let (mut reference, tokens) = self.reference(prompt.as_deref())?;
        let vocab = vocab(&reference);
        // A batch of one has no second order of tokens.
        let orders = usize::from(most > 1) + 1;
        let with = report::plan::backend_json(reference.backend.info());
        let class = reference.backend.info().numerics;
        let decoder = reference.prepare()?;
        let expected: Vec<Expected> = (0..orders)
            .map(|order| {
                let mut tokens = tokens.clone();
                let half = tokens.len() / 2;
                tokens.rotate_left(order * half);
                Expected::of(decoder, tokens, vocab)
            })
            .collect::<Result<_>>()?;
        drop(reference);

        let opened = models::open(&self.model)?;
        let n = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
        let chunk = self.chunks.iter().copied().max().unwrap_or(1).min(n);
        let decode = DecodeOptions {
            context: Some(n),
            sequences: most,
            batch_tokens: Some(most.saturating_mul(chunk)),
            ..DecodeOptions::default()
        };
        let mut loaded = decoding::load(opened, &self.device, decode)?;
        let backend = report::plan::backend_json(loaded.backend.info());
        let model = report::model::json(&loaded.manifest, &loaded.model);
        let exact = class == NumericsClass::Exact && loaded.backend.info().numerics == NumericsClass::Exact;
        let decoder = loaded.prepare()?;
        let mut cases = Vec::new();
        let steps = Steps::new(
            "compare",
            (self.batches.len() * self.chunks.len()) as u64 * u64::from(self.runs),
        );
        for &batch in &self.batches {
            for &chunk in &self.chunks {
                let mut case = Case {
                    batch,
                    chunk,
                    compared: 0,
                    differing: 0,
                    first: None,
                };
                for run in 0..self.runs {
                    for want in [Want::Logits, Want::ArgMax] {
                        case.ask(decoder, &expected, vocab, run, want)?;
                    }
                    steps.done();
                }
                cases.push(case);
            }
        }
        drop(steps);
        let equal = cases.iter().all(|case| case.differing == 0);
        let digest = digests::of_all(expected[0].made.iter().map(|made| &made.digest));
        if json {
            print_json(&json!({
                "schema": "hoist.compare/1",
                "model": model,
                "backend": backend,
                "with": with,
                "vocab": vocab,
                "tokens": tokens,
                "runs": self.runs,
                "cases": cases.iter().map(Case::json).collect::<Vec<_>>(),
                "digest": digest.to_hex().as_str(),
                "equal": equal,
            }))?;
        } else {
            print_text(&text(&cases, equal, &digest))?;
        }
        if !equal {
            say(
                "hint",
                if exact {
                    "`hoist logits --dump` writes the logits of one backend to a file"
                } else {
                    "one of these backends does not claim exact results; `hoist conform` holds it to its bounds"
                },
            );
        }
        Ok(if equal { Code::Ok } else { Code::No })
    }

    /// The model on the backend whose bits are the right ones, and the tokens.
    fn reference(&self, prompt: Option<&str>) -> Result<(LoadedModel, Vec<u32>)> {
        let plugin = self.with.starts_with("plugin:");
        let device = DeviceArgs {
            backend: self.with.clone(),
            isolate: self.device.isolate && plugin,
            probe_limit: self.device.probe_limit.filter(|_| plugin),
            memory: None,
            import: false,
            force_scalar: false,
            float_layout: None,
            ..self.device.clone()
        };
        let opened = models::open(&self.model)?;
        let given = match prompt {
            Some(text) => encode(&Tokenizer::from_manifest(&opened.manifest)?, text)?,
            None => self.tokens.clone(),
        };
        let positions = if given.is_empty() {
            self.positions as usize
        } else {
            given.len()
        };
        let mut decode = DecodeOptions::default();
        decoding::widen(&mut decode, &opened, positions);
        let loaded = decoding::load(opened, &device, decode)?;
        let tokens = if given.is_empty() {
            // A model without tokens is refused before it is loaded.
            let vocab = vocab(&loaded).max(1);
            (0..self.positions)
                .map(|i| decoding::pseudo_random(0, i) % vocab)
                .collect()
        } else {
            given
        };
        Ok((loaded, tokens))
    }
}

fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let options = EncodeOptions {
        add_special: true,
        parse_special: false,
    };
    decoding::encode(tokenizer, text, options)
}

fn vocab(loaded: &LoadedModel) -> u32 {
    loaded.program.as_ref().map_or(0, |(program, _)| program.vocab)
}

impl Expected {
    /// Decodes the tokens alone, some at a time.
    fn of(decoder: &mut dyn DecodeBackend, tokens: Vec<u32>, vocab: u32) -> Result<Self> {
        decoder.truncate(SequenceId(0), 0)?;
        let mut made = Vec::with_capacity(tokens.len());
        let mut logits = vec![0f32; REFERENCE_CHUNK.min(tokens.len()) * vocab as usize];
        for tokens in tokens.chunks(REFERENCE_CHUNK) {
            if interrupted() {
                return Err(BackendError::Cancelled.into());
            }
            let logits = &mut logits[..tokens.len() * vocab as usize];
            let runs = [Run {
                sequence: SequenceId(0),
                tokens,
                want: &[Want::Logits; REFERENCE_CHUNK][..tokens.len()],
            }];
            decoder.forward(
                &TokenBatch { runs: &runs },
                &mut Outputs {
                    argmax: &mut [],
                    logits,
                },
            )?;
            made.extend(logits.chunks_exact(vocab as usize).map(|logits| Made {
                argmax: decoding::argmax(logits),
                digest: digests::of_logits(logits),
            }));
        }
        Ok(Self { tokens, made })
    }
}

/// Tokens of a batch of the reference: as many as `hoist logits` takes.
const REFERENCE_CHUNK: usize = 32;

impl Case {
    /// Decodes all tokens from empty sequences and compares: of the first sequence, which stands in the middle of the batch,
    /// every position, of others the last one of each batch.
    fn ask(
        &mut self,
        decoder: &mut dyn DecodeBackend,
        expected: &[Expected],
        vocab: u32,
        run: u32,
        want: Want,
    ) -> Result<()> {
        let mut sequences: Vec<u32> = (1..self.batch).collect();
        sequences.insert(sequences.len() / 2, 0);
        for &sequence in &sequences {
            decoder.truncate(SequenceId(sequence), 0)?;
        }
        let of = |sequence: u32| &expected[sequence as usize % expected.len()];
        let all = of(0).tokens.len();
        let chunk = (self.chunk as usize).min(all);
        let every = vec![want; chunk];
        let mut last = vec![Want::Nothing; chunk];
        last[chunk - 1] = want;
        let most = chunk + sequences.len() - 1;
        let (mut argmax, mut logits) = match want {
            Want::Logits => (vec![], vec![0f32; most * vocab as usize]),
            _ => (vec![0u32; most], vec![]),
        };
        for at in (0..all).step_by(chunk) {
            if interrupted() {
                return Err(BackendError::Cancelled.into());
            }
            let n = chunk.min(all - at);
            let runs: Vec<Run<'_>> = sequences
                .iter()
                .map(|&sequence| Run {
                    sequence: SequenceId(sequence),
                    tokens: &of(sequence).tokens[at..at + n],
                    want: if sequence == 0 {
                        &every[..n]
                    } else {
                        &last[chunk - n..]
                    },
                })
                .collect();
            let asked = n + sequences.len() - 1;
            // What a backend does not write is no result.
            logits.fill(f32::NAN);
            argmax.fill(u32::MAX);
            let (argmax, logits) = match want {
                Want::Logits => (&mut argmax[..], &mut logits[..asked * vocab as usize]),
                _ => (&mut argmax[..asked], &mut logits[..]),
            };
            decoder.forward(&TokenBatch { runs: &runs }, &mut Outputs { argmax, logits })?;
            let places = sequences.iter().flat_map(|&sequence| {
                let first = if sequence == 0 { at } else { at + n - 1 };
                (first..at + n).map(move |position| (sequence, position))
            });
            for (i, (sequence, position)) in places.enumerate() {
                let found = match want {
                    Want::Logits => {
                        let logits = &logits[i * vocab as usize..][..vocab as usize];
                        (decoding::argmax(logits), Some(digests::of_logits(logits)))
                    }
                    _ => (argmax[i], None),
                };
                self.judge(run, sequence, position, of(sequence).made[position], found);
            }
        }
        Ok(())
    }

    fn judge(
        &mut self,
        run: u32,
        sequence: u32,
        position: usize,
        expected: Made,
        found: (u32, Option<blake3::Hash>),
    ) {
        self.compared += 1;
        if found.0 == expected.argmax && found.1.is_none_or(|digest| digest == expected.digest) {
            return;
        }
        self.differing += 1;
        self.first.get_or_insert(Parting {
            run,
            sequence,
            position,
            expected,
            found,
        });
    }

    fn json(&self) -> Value {
        json!({
            "batch": self.batch,
            "chunk": self.chunk,
            "compared": self.compared,
            "differing": self.differing,
            "first": self.first.as_ref().map(|p| json!({
                "run": p.run,
                "sequence": p.sequence,
                "position": p.position,
                "expected": { "argmax": p.expected.argmax, "digest": p.expected.digest.to_hex().as_str() },
                "found": { "argmax": p.found.0, "digest": p.found.1.map(|d| d.to_hex().to_string()) },
            })),
        })
    }
}

impl std::fmt::Display for Parting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "run {}, sequence {}, position {}: ",
            self.run, self.sequence, self.position
        )?;
        match self.found.1 {
            Some(digest) => write!(
                f,
                "logits {} instead of {}",
                &digest.to_hex()[..16],
                &self.expected.digest.to_hex()[..16]
            ),
            None => write!(f, "arg-max {} instead of {}", self.found.0, self.expected.argmax),
        }
    }
}

fn text(cases: &[Case], equal: bool, digest: &blake3::Hash) -> String {
    let table = table::render(
        &[
            ("batch", Align::Right),
            ("chunk", Align::Right),
            ("compared", Align::Right),
            ("differing", Align::Right),
            ("first", Align::Left),
        ],
        cases.iter().map(|case| {
            vec![
                case.batch.to_string(),
                case.chunk.to_string(),
                case.compared.to_string(),
                case.differing.to_string(),
                case.first.as_ref().map(Parting::to_string).unwrap_or_default(),
            ]
        }),
    );
    let verdict = if equal { "equal" } else { "not equal" };
    format!("{table}\n{verdict}; all positions: {}\n", digest.to_hex())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(argmax: u32, byte: u8) -> Made {
        Made {
            argmax,
            digest: blake3::hash(&[byte]),
        }
    }

    #[test]
    fn what_differs_in_either_is_counted_and_the_first_is_kept() {
        let mut case = Case {
            batch: 1,
            chunk: 1,
            compared: 0,
            differing: 0,
            first: None,
        };
        let expected = made(3, 1);
        case.judge(0, 0, 0, expected, (3, Some(expected.digest)));
        case.judge(0, 0, 1, expected, (3, None));
        assert_eq!((case.compared, case.differing), (2, 0));
        case.judge(0, 0, 2, expected, (4, None));
        case.judge(1, 0, 3, expected, (3, Some(blake3::hash(&[2]))));
        assert_eq!((case.compared, case.differing), (4, 2));
        let first = case.first.expect("there is one");
        assert_eq!(
            first.to_string(),
            "run 0, sequence 0, position 2: arg-max 4 instead of 3"
        );
    }
}
