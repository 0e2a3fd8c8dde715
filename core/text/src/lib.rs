//! Text in and out of a model.
//!
//! * [`Tokenizer`] turns text into tokens and back: byte-pair (`gpt2`) and SentencePiece (`llama`) tokenizers from GGUF
//!   metadata, with the same token ids as llama.cpp, and any `tokenizer.json` of a Hugging Face folder.
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
mod error;
mod huggingface;
mod metadata;
mod pretokenizer;
mod sentencepiece;
mod special;
mod stream;
mod tokenizer;
mod vocabulary;

pub use error::{Error, Result};
pub use stream::{DecodeOptions, DecodeStream};
pub use tokenizer::{EncodeOptions, MAX_TEXT_BYTES, SpecialIds, Tokenizer};
pub use vocabulary::TokenKind;
