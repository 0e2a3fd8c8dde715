use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use hoist_core::backend::{Error as BackendError, Outputs, SequenceId, Want};
use hoist_core::text::{
    ChatMessage, ChatTemplate, DecodeOptions, EncodeOptions, RenderOptions, Sampler, SamplerOptions,
    Tokenizer,
};
use serde_json::json;

use crate::args::{BatchArgs, DeviceArgs, ModelArg};
use crate::exit::{Code, Usage};
use crate::report::{self, print_json, print_prose, units};
use crate::say::say;
use crate::watch::{catch_interrupts, interrupted};
use crate::{decoding, models};

/// Continue a text, or answer in a chat.
#[derive(Args, Debug)]
pub(crate) struct Generate {
    #[command(flatten)]
    model: ModelArg,

    /// The text to continue; `-` reads standard input
    #[arg(
        short,
        long,
        value_name = "TEXT",
        required_unless_present = "prompt_file",
        allow_hyphen_values = true
    )]
    prompt: Option<String>,

    /// A file with the text to continue
    #[arg(long, value_name = "PATH", conflicts_with = "prompt")]
    prompt_file: Option<PathBuf>,

    /// Most tokens to write
    #[arg(short, long, value_name = "N", default_value_t = 128)]
    n: u32,

    /// Take the text as a message and answer it, by the model's chat template
    #[arg(long)]
    chat: bool,

    /// System message of the chat
    #[arg(long, value_name = "TEXT", requires = "chat", allow_hyphen_values = true)]
    system: Option<String>,

    /// Go on after the model ended its text
    #[arg(long)]
    ignore_end: bool,

    /// 0 takes the most likely token always; larger evens chances out
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    temp: f64,

    /// Draw from the so many most likely tokens only; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,

    /// Draw from the most likely tokens that together have this probability only
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f64,

    /// Draw only from tokens at least this share as likely as the most likely one
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    min_p: f64,

    /// Makes recent tokens less likely; 1 for no penalty
    #[arg(long, value_name = "X", default_value_t = 1.0, allow_negative_numbers = true)]
    repeat_penalty: f64,

    /// How many tokens count as recent
    #[arg(long, value_name = "N", default_value_t = 64)]
    repeat_window: usize,

    /// Key of the random numbers
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    #[command(flatten)]
    device: DeviceArgs,

    #[command(flatten)]
    capacity: BatchArgs,
}

/// Why no more tokens came.
#[derive(Clone, Copy)]
enum Stop {
    Length,
    End,
    Context,
}

impl Stop {
    fn name(self) -> &'static str {
        match self {
            Stop::Length => "length",
            Stop::End => "end",
            Stop::Context => "context",
        }
    }
}

impl Generate {
    pub(crate) fn run(&self, json: bool) -> Result<Code> {
        let mut sampler = Sampler::new(SamplerOptions {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repeat_penalty,
            repetition_window: self.repeat_window,
            seed: self.seed,
        })?;
        self.note_unused();
        // With no penalty the greedy choice is the arg-max, which a backend can make where the logits are.
        let greedy = self.temp == 0.0 && self.repeat_penalty == 1.0;
        let text = self.prompt_text()?;
        // Not earlier: a request to stop is heeded at once while the prompt is being typed.
        catch_interrupts()?;
        let started = Instant::now();
        let opened = models::open(&self.model)?;
        let tokenizer = Tokenizer::from_manifest(&opened.manifest)?;
        let prompt = self.prompt_tokens(text, &tokenizer, &opened.manifest)?;
        let mut decode = self.capacity.decode_options();
        decoding::widen(&mut decode, &opened, prompt.len().saturating_add(self.n as usize));
        let capacity = opened.capacity(&decode);
        let positions = capacity.max_context as usize;
        if prompt.len() > positions {
            return Err(Usage(format!(
                "the prompt has {} tokens and the context holds {positions}; --context makes it larger, up to {}",
                prompt.len(),
                opened.model.hyper.context_length
            ))
            .into());
        }
        let mut loaded = decoding::load(opened, &self.device, decode)?;
        let load_time = started.elapsed();

        let vocab = loaded.program.as_ref().map_or(0, |(program, _)| program.vocab) as usize;
        let backend = report::plan::backend_json(loaded.backend.info());
        let model = report::model::json(&loaded.manifest, &loaded.model);
        let decoder = loaded.prepare()?;
        let sequence = SequenceId(0);
        let (mut argmax, mut logits) = ([0u32], vec![0f32; if greedy { 0 } else { vocab }]);
        let want = if greedy { Want::ArgMax } else { Want::Logits };
        let mut out = Outputs {
            argmax: if greedy { &mut argmax } else { &mut [] },
            logits: &mut logits,
        };
        for token in &prompt {
            sampler.accept(*token);
        }
        let started = Instant::now();
        if self.n > 0 {
            decoding::prefill(
                decoder,
                sequence,
                &prompt,
                capacity.max_batch_tokens as usize,
                want,
                &mut out,
            )?;
        }
        let prompt_time = started.elapsed();

        let mut stream = tokenizer.decode_stream(DecodeOptions::default());
        let mut text = String::new();
        let mut tokens = Vec::new();
        let mut stop = Stop::Length;
        let started = Instant::now();
        // The first token comes with the prompt.
        let mut steps = 0u32;
        while (tokens.len() as u32) < self.n {
            if interrupted() {
                return Err(BackendError::Cancelled.into());
            }
            let position = prompt.len() + tokens.len();
            let token = if greedy {
                out.argmax[0]
            } else {
                sampler.sample(out.logits, position as u64)?
            };
            if tokenizer.is_end_of_generation(token) && !self.ignore_end {
                stop = Stop::End;
                break;
            }
            tokens.push(token);
            sampler.accept(token);
            let before = text.len();
            stream.push(token, &mut text)?;
            if !json {
                print_prose(&text[before..])?;
            }
            if position + 1 >= positions {
                stop = Stop::Context;
                break;
            }
            if (tokens.len() as u32) < self.n {
                decoding::step(decoder, sequence, token, want, &mut out)?;
                steps += 1;
            }
        }
        let decode_time = started.elapsed();
        let before = text.len();
        stream.finish(&mut text);
        if json {
            // Of what was not done there is no speed.
            let rate = |tokens: usize, time: Duration| {
                (tokens > 0).then(|| units::rounded(tokens as f64 / time.as_secs_f64().max(1e-9), 2))
            };
            print_json(&json!({
                "schema": "hoist.generate/1",
                "model": model,
                "backend": backend,
                "prompt_tokens": prompt.len(),
                "tokens": tokens,
                "text": text,
                "stop": stop.name(),
                "timing": {
                    "load_ms": units::ms(load_time),
                    "prompt_ms": units::ms(prompt_time),
                    "decode_ms": units::ms(decode_time),
                    "prompt_tok_s": rate(if self.n > 0 { prompt.len() } else { 0 }, prompt_time),
                    "decode_tok_s": rate(steps as usize, decode_time),
                },
            }))?;
        } else {
            print_prose(&format!("{}\n", &text[before..]))?;
            if let Stop::Context = stop {
                say(
                    "note",
                    format_args!("the context of {positions} tokens is full; --context makes it larger"),
                );
            }
        }
        Ok(Code::Ok)
    }

    fn prompt_tokens(
        &self,
        text: String,
        tokenizer: &Tokenizer,
        manifest: &hoist_core::formats::Manifest,
    ) -> Result<Vec<u32>> {
        if !self.chat {
            let options = EncodeOptions {
                add_special: true,
                parse_special: false,
            };
            return decoding::encode(tokenizer, &text, options);
        }
        let template = ChatTemplate::from_manifest(manifest)?
            .ok_or_else(|| Usage("--chat: the model has no chat template".into()))?;
        let mut messages = Vec::new();
        messages.extend(self.system.as_ref().map(|text| ChatMessage::new("system", text)));
        messages.push(ChatMessage::new("user", text));
        let rendered = template.render(&messages, &RenderOptions::for_tokenizer(tokenizer))?;
        // A template that writes the first token itself does not get it twice.
        let begins = tokenizer
            .bos_text()
            .is_some_and(|bos| !bos.is_empty() && rendered.starts_with(bos));
        let options = EncodeOptions {
            add_special: !begins,
            parse_special: true,
        };
        decoding::encode(tokenizer, &rendered, options)
    }

    /// Tells of options that change nothing beside the others.
    fn note_unused(&self) {
        let note = |unused: &[(&str, bool)], because: &str| {
            let names: Vec<&str> = unused
                .iter()
                .filter(|(_, set)| *set)
                .map(|(name, _)| *name)
                .collect();
            if !names.is_empty() {
                say(
                    "note",
                    format_args!("{} without effect: {because}", names.join(", ")),
                );
            }
        };
        if self.temp == 0.0 {
            let drawing = [
                ("--top-k", self.top_k != 0),
                ("--top-p", self.top_p != 1.0),
                ("--min-p", self.min_p != 0.0),
                ("--seed", self.seed != 0),
            ];
            note(&drawing, "nothing is drawn at a --temp of 0");
        }
        if self.repeat_penalty == 1.0 {
            note(
                &[("--repeat-window", self.repeat_window != 64)],
                "there is no --repeat-penalty",
            );
        }
    }

    fn prompt_text(&self) -> Result<String> {
        match (&self.prompt, &self.prompt_file) {
            (Some(text), _) => decoding::typed(text),
            (None, Some(path)) => decoding::read_text(path, decoding::MAX_PROMPT),
            (None, None) => Err(Usage("there is no prompt".into()).into()),
        }
    }
}
