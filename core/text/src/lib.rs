//! Text in and out of a model.
//!
//! * [`Tokenizer`] turns text into tokens and back: byte-pair (`gpt2`) and SentencePiece (`llama`) tokenizers from GGUF
//!   metadata, with the same token ids as llama.cpp, and any `tokenizer.json` of a Hugging Face folder.
//! * [`ChatTemplate`] writes a conversation as the model was trained to read it.
//! * [`Sampler`] chooses the next token: greedy, or by chance with a seed, the same on every machine.
//!
//! Everything a model file says is untrusted: wrong types, lengths and ids are typed errors.
//!
//! ```no_run
//! # fn run(manifest: &hoist_formats::Manifest) -> hoist_text::Result<()> {
//! use hoist_text::{DecodeOptions, EncodeOptions, Tokenizer};
//!
//! let tokenizer = Tokenizer::from_manifest(manifest)?;
//! let options = EncodeOptions { add_special: true, parse_special: false };
//! let tokens = tokenizer.encode("In the beginning", options)?;
//!
//! let mut text = String::new();
//! let mut stream = tokenizer.decode_stream(DecodeOptions::default());
//! for token in tokens {
//!     stream.push(token, &mut text)?;
//! }
//! stream.finish(&mut text);
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod bpe;
mod calendar;
mod chat;
mod error;
mod huggingface;
mod metadata;
mod philox;
mod pretokenizer;
mod sampler;
mod sentencepiece;
mod special;
mod stream;
mod tokenizer;
mod vocabulary;

pub use chat::{ChatMessage, ChatTemplate, MAX_PROMPT_BYTES, RenderOptions, TEMPLATE_FUEL};
pub use error::{Error, Result};
pub use sampler::{MAX_REPETITION_WINDOW, Sampler, SamplerOptions, arg_max};
pub use stream::{DecodeOptions, DecodeStream};
pub use tokenizer::{EncodeOptions, MAX_TEXT_BYTES, SpecialIds, Tokenizer};
pub use vocabulary::TokenKind;
