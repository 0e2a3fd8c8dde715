use std::time::Instant;

use anyhow::Result;
use clap::Args;
use hoist_core::backend::{
    DecodeBackend, DecodeProgram, Error as BackendError, OpKind, Outputs, Run, SequenceId, TokenBatch, Want,
    WeightRef,
};
use hoist_core::orchestrator::LoadedModel;
use serde_json::json;

use crate::args::{BatchArgs, DeviceArgs, ModelArg};
use crate::decoding::{self, Rate};
use crate::exit::{Code, Usage};
use crate::models;
use crate::report::profile::Profile;
use crate::report::table::{self, Align};
use crate::report::{self, print_json, print_text, units};
use crate::watch::{catch_interrupts, interrupted};

/// Tokens a second: of a prompt, and of what is decoded after it.
///
/// Each run starts from an empty sequence; the prompt's tokens are pseudo-random, and what follows is greedy. One unmeasured
/// run comes first. Unless --batch-tokens says otherwise, up to 512 tokens of the prompt are one batch.
#[derive(Args, Debug)]
pub(crate) struct BenchDecode {
    #[command(flatten)]
    model: ModelArg,

    /// Tokens of the prompt
    #[arg(short, long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    prompt: u32,

    /// Tokens to decode
    #[arg(short, long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    n: u32,

    /// Sequences decoded side by side; tokens a second count all of them
    #[arg(long, value_name = "B", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: u32,

    /// Measured runs
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,

    /// Tell where the time of a decoding step goes on the device
    #[arg(long)]
    profile: bool,

    #[command(flatten)]
    device: DeviceArgs,

    #[command(flatten)]
    capacity: BatchArgs,
}

impl BenchDecode {
    pub(crate) fn run(&self, json: bool) -> Result<Code> {
        catch_interrupts()?;
        let opened = models::open(&self.model)?;
        let mut decode = self.capacity.decode_options();
        decode.sequences = self.batch;
        decode
            .batch_tokens
            .get_or_insert(self.prompt.min(PROMPT_CHUNK).max(self.batch));
        let positions = self.prompt.saturating_add(self.n);
        decode.context = Some(decode.context.unwrap_or(positions));
        let mut loaded = decoding::load(opened, &self.device, decode)?;
        let Some((program, capacity)) = loaded.program.clone() else {
            return Err(Usage("the model was loaded without a workspace".into()).into());
        };
        if positions > capacity.max_context {
            return Err(Usage(format!(
                "-p and -n need {positions} positions and the context has {}",
                capacity.max_context
            ))
            .into());
        }
        let weight_bytes = weight_bytes(&program, &loaded);
        let kv_bytes = kv_bytes(&program, capacity.kv.bytes(), self.prompt + self.n / 2);
        let backend = report::plan::backend_json(loaded.backend.info());
        let model = report::model::json(&loaded.manifest, &loaded.model);
        let threads = match self.device.threads {
            Some(threads) => threads as usize,
            None => std::thread::available_parallelism().map_or(1, usize::from),
        };
        let decoder = loaded.prepare()?;
        let chunk = (capacity.max_batch_tokens as usize).min(self.prompt as usize);
        let (mut prompts, mut decodes) = (vec![], vec![]);
        let mut bandwidth = Bandwidth::new(threads);
        for run in 0..=self.runs {
            let (prompt, decode) = self.one(decoder, program.vocab, chunk)?;
            // A device that measures its own memory is compared with that.
            match decoder.read_rate()? {
                Some(rate) => bandwidth.seen(rate / 1e9),
                None => bandwidth.measure(),
            }
            if run > 0 {
                prompts.push(prompt);
                decodes.push(decode);
            }
        }
        let profile = match self.profile {
            true => Some(self.profile(decoder, program.vocab, chunk)?),
            false => None,
        };
        let batch = f64::from(self.batch);
        let prompt = Rate::of(&prompts, batch * f64::from(self.prompt));
        // The first token comes with the prompt.
        let decode = Rate::of(&decodes, batch * f64::from(self.n));
        let bytes_per_step = weight_bytes + u64::from(self.batch) * kv_bytes;
        let steps_per_second = decode.median / batch;
        let read = bytes_per_step as f64 * steps_per_second / 1e9;
        let share = read / bandwidth.best();
        if json {
            print_json(&json!({
                "schema": "hoist.bench.decode/1",
                "model": model,
                "backend": backend,
                "threads": threads,
                "batch": self.batch,
                "runs": self.runs,
                "prompt": { "tokens": self.prompt, "tok_s": prompt.json() },
                "decode": { "tokens": self.n, "tok_s": decode.json() },
                "bytes_per_token": bytes_per_step / u64::from(self.batch),
                "weight_bytes_per_step": weight_bytes,
                "kv_bytes_per_token": kv_bytes,
                "read_gb_s": units::rounded(read, 3),
                "bandwidth_gb_s": units::rounded(bandwidth.best(), 3),
                "bandwidth_share": units::rounded(share, 4),
                "profile": profile.as_ref().map(|p| p.json(bandwidth.best())),
            }))?;
        } else {
            let row = |name: String, r: &Rate| {
                let rate = |r: f64| format!("{r:.1}");
                vec![name, rate(r.median), rate(r.min), rate(r.max)]
            };
            let table = table::render(
                &[
                    ("tok/s", Align::Left),
                    ("median", Align::Right),
                    ("min", Align::Right),
                    ("max", Align::Right),
                ],
                [
                    row(format!("prompt {}", self.prompt), &prompt),
                    row(format!("decode {}", self.n), &decode),
                ],
            );
            print_text(&format!(
                "{}, batch {}, {} runs\n\n{table}\ndecode reads {} a step: {read:.1} GB/s, {:.0} % of {:.1} GB/s measured beside it\n",
                backend["device_name"].as_str().unwrap_or("device"),
                self.batch,
                self.runs,
                units::bytes(bytes_per_step),
                100.0 * share,
                bandwidth.best(),
            ))?;
            if let Some(profile) = &profile {
                print_text(&format!("\n{}", profile.table(bandwidth.best())))?;
            }
        }
        Ok(Code::Ok)
    }

    /// Seconds of the prompt, and of the tokens after it.
    fn one(&self, decoder: &mut dyn DecodeBackend, vocab: u32, chunk: usize) -> Result<(f64, f64)> {
        let started = Instant::now();
        let (sequences, mut next) = self.start(decoder, vocab, chunk)?;
        let prompt = started.elapsed().as_secs_f64();
        let mut tokens = next.clone();
        let started = Instant::now();
        for _ in 0..self.n {
            if interrupted() {
                return Err(BackendError::Cancelled.into());
            }
            let runs = runs(&sequences, &tokens);
            decoder.forward(
                &TokenBatch { runs: &runs },
                &mut Outputs {
                    argmax: &mut next,
                    logits: &mut [],
                },
            )?;
            tokens.copy_from_slice(&next);
        }
        Ok((prompt, started.elapsed().as_secs_f64()))
    }

    /// Empties the sequences and gives each its prompt; them, and their next tokens.
    fn start(
        &self,
        decoder: &mut dyn DecodeBackend,
        vocab: u32,
        chunk: usize,
    ) -> Result<(Vec<SequenceId>, Vec<u32>)> {
        let sequences: Vec<SequenceId> = (0..self.batch).map(SequenceId).collect();
        for sequence in &sequences {
            decoder.truncate(*sequence, 0)?;
        }
        let mut next = vec![0u32; sequences.len()];
        for (sequence, next) in sequences.iter().zip(&mut next) {
            let tokens: Vec<u32> = (0..self.prompt)
                .map(|i| decoding::pseudo_random(sequence.0, i) % vocab)
                .collect();
            let mut out = Outputs {
                argmax: std::slice::from_mut(next),
                logits: &mut [],
            };
            decoding::prefill(decoder, *sequence, &tokens, chunk, Want::ArgMax, &mut out)?;
        }
        Ok((sequences, next))
    }

    /// Where the time of steps after a prompt goes.
    fn profile(&self, decoder: &mut dyn DecodeBackend, vocab: u32, chunk: usize) -> Result<Profile> {
        let (sequences, mut next) = self.start(decoder, vocab, chunk)?;
        let mut tokens = next.clone();
        let mut steps = Vec::new();
        for _ in 0..self.n.min(PROFILED_STEPS) {
            if interrupted() {
                return Err(BackendError::Cancelled.into());
            }
            let mut phases = Vec::new();
            let runs = runs(&sequences, &tokens);
            decoder.profile(
                &TokenBatch { runs: &runs },
                &mut Outputs {
                    argmax: &mut next,
                    logits: &mut [],
                },
                &mut phases,
            )?;
            steps.push(phases);
            tokens.copy_from_slice(&next);
        }
        Ok(Profile::of(&steps))
    }
}

/// Tokens of a prompt that are one batch: enough to fill the largest devices.
const PROMPT_CHUNK: u32 = 512;

/// Steps that a profile takes the median of, at most.
const PROFILED_STEPS: u32 = 64;

fn runs<'a>(sequences: &[SequenceId], tokens: &'a [u32]) -> Vec<Run<'a>> {
    sequences
        .iter()
        .zip(tokens)
        .map(|(sequence, token)| Run {
            sequence: *sequence,
            tokens: std::slice::from_ref(token),
            want: &[Want::ArgMax],
        })
        .collect()
}

/// Canonical bytes of weights that one step reads: every matrix it multiplies with, the chosen share of experts, and one row
/// of each embedding.
fn weight_bytes(program: &DecodeProgram, loaded: &LoadedModel) -> u64 {
    let index = loaded.index();
    let nbytes = |w: &WeightRef| {
        let id = index.lookup(w.layer, w.role)?;
        let weight = loaded.plan.weights.get(id.index())?;
        Some((weight.nbytes, weight.shape))
    };
    let mut total = 0;
    let mut chosen = 1;
    for op in &program.ops {
        total += match &op.kind {
            OpKind::MatMul { weight, .. } | OpKind::Logits { weight, .. } => {
                nbytes(weight).map_or(0, |(n, _)| n)
            }
            OpKind::RouterTopK { k, .. } => {
                chosen = u64::from(*k);
                0
            }
            OpKind::ExpertMatMul { weight, .. } => {
                nbytes(weight).map_or(0, |(n, s)| n / s.matrices.max(1) * chosen)
            }
            OpKind::Embed { weight, .. } | OpKind::EmbedPosition { weight, .. } => {
                nbytes(weight).map_or(0, |(n, s)| n / s.rows.max(1))
            }
            _ => 0,
        };
    }
    total
}

/// Bytes of keys and values that one token reads when its sequence has `length` tokens.
fn kv_bytes(program: &DecodeProgram, element: u64, length: u32) -> u64 {
    let windows = program.ops.iter().filter_map(|op| match &op.kind {
        OpKind::Attention { window, .. } => Some(window.unwrap_or(u32::MAX)),
        _ => None,
    });
    program
        .kv
        .iter()
        .zip(windows)
        .map(|(kv, window)| {
            2 * element * u64::from(kv.kv_heads) * u64::from(kv.head_dim) * u64::from(length.min(window))
        })
        .sum()
}

/// How fast the device reads its memory, or this host, measured between the runs.
struct Bandwidth {
    threads: usize,
    buffer: Vec<u64>,
    best: f64,
}

/// Far beyond any last-level cache that a benchmark on a host would meet.
const BUFFER_BYTES: usize = 256 << 20;

impl Bandwidth {
    fn new(threads: usize) -> Self {
        Self {
            threads,
            buffer: vec![1; BUFFER_BYTES / 8],
            best: 0.0,
        }
    }

    /// Reads the buffer once with every thread.
    fn measure(&mut self) {
        let part = self.buffer.len().div_ceil(self.threads);
        let started = Instant::now();
        let sum = std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .buffer
                .chunks(part)
                .map(|part| scope.spawn(|| part.iter().fold(0u64, |sum, x| sum.wrapping_add(*x))))
                .collect();
            threads
                .into_iter()
                .map(|t| t.join().unwrap_or(0))
                .fold(0u64, u64::wrapping_add)
        });
        std::hint::black_box(sum);
        let rate = BUFFER_BYTES as f64 / started.elapsed().as_secs_f64() / 1e9;
        self.best = self.best.max(rate);
    }

    /// Counts a rate that somebody else has measured, in 10^9 bytes a second.
    fn seen(&mut self, rate: f64) {
        self.best = self.best.max(rate);
    }

    /// The best rate seen, in 10^9 bytes a second.
    fn best(&self) -> f64 {
        self.best
    }
}
