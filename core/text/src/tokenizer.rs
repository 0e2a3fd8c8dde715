use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use hoist_formats::{Manifest, Metadata};

use crate::bpe::BytePairs;
use crate::huggingface::HuggingFace;
use crate::metadata::{self, Gguf};
use crate::pretokenizer;
use crate::sentencepiece::SentencePiece;
use crate::special::{Fragment, SpecialTokens};
use crate::stream::{DecodeOptions, DecodeStream};
use crate::vocabulary::{MAX_TOKENS, Spelling, TokenKind, Vocabulary};
use crate::{Error, Result};

/// Most bytes of text that one call encodes.
pub const MAX_TEXT_BYTES: usize = 1 << 28;

const MODELS: &str = "gpt2, llama";

/// Tokens whose text says that a generation ends there, whatever else the metadata says: those of llama.cpp.
const END_OF_GENERATION: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
    // Markers of infilling that end a file.
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|file_sep|>",
];

/// The end of a turn, of which the first that exists is the one.
const END_OF_TURN: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
];

/// How to encode a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Add the tokens that the model wants around a text (bos, eos), as its metadata says.
    pub add_special: bool,
    /// Take the text of control tokens (`<|im_start|>`) for those tokens. For templates, not for what a user wrote.
    pub parse_special: bool,
}

/// The tokens with a meaning of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialIds {
    /// Begin of sequence.
    pub bos: Option<u32>,
    /// End of sequence.
    pub eos: Option<u32>,
    /// End of turn.
    pub eot: Option<u32>,
    /// Stands for what cannot be expressed.
    pub unknown: Option<u32>,
    /// Padding.
    pub padding: Option<u32>,
    /// All tokens after which a generation is over.
    pub end_of_generation: BTreeSet<u32>,
}

/// Turns text into a model's tokens and back.
#[derive(Debug)]
pub struct Tokenizer {
    engine: Engine,
    pub(crate) vocabulary: Vocabulary,
    ids: SpecialIds,
    add_bos: bool,
    add_eos: bool,
    /// SentencePiece's leading space: added to text, taken off again from whole sequences.
    space_prefix: bool,
}

#[derive(Debug)]
enum Engine {
    BytePairs(Box<BytePairs>, SpecialTokens),
    SentencePiece(Box<SentencePiece>, SpecialTokens),
    HuggingFace(Box<HuggingFace>),
}

impl Tokenizer {
    /// The tokenizer of a model: from a GGUF file's metadata, or from the `tokenizer.json` of a Hugging Face folder.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`] if the model has none; else what is wrong with the one it has.
    pub fn from_manifest(manifest: &Manifest) -> Result<Tokenizer> {
        match (&manifest.metadata, &manifest.folder) {
            (Metadata::Gguf(map), _) => {
                if !map.contains_key("tokenizer.ggml.model") {
                    return Err(Error::NoTokenizer {
                        path: manifest.path.clone(),
                        reason: "its metadata has no `tokenizer.ggml.model`",
                    });
                }
                Tokenizer::from_gguf(map)
            }
            (_, Some(folder)) => Tokenizer::from_folder(folder),
            (_, None) => Err(Error::NoTokenizer {
                path: manifest.path.clone(),
                reason: "only GGUF files and folders with a `tokenizer.json` carry one",
            }),
        }
    }

    /// The tokenizer of a GGUF file's metadata (`tokenizer.ggml.*`).
    ///
    /// # Errors
    /// What is missing, of the wrong type or length, out of range, or unknown.
    pub fn from_gguf(
        map: &std::collections::BTreeMap<String, hoist_formats::MetaValue>,
    ) -> Result<Tokenizer> {
        const MODEL: &str = "tokenizer.ggml.model";
        const TOKENS: &str = "tokenizer.ggml.tokens";
        const TYPES: &str = "tokenizer.ggml.token_type";

        let model = metadata::string(map, MODEL)?.ok_or(Error::MissingKey { key: MODEL })?;
        let tokens = metadata::strings(map, TOKENS)?.ok_or(Error::MissingKey { key: TOKENS })?;
        let vocab = u32::try_from(tokens.len())
            .ok()
            .filter(|n| (1..=MAX_TOKENS).contains(n))
            .ok_or(Error::VocabularySize {
                found: tokens.len() as u64,
                limit: u64::from(MAX_TOKENS),
            })?;
        let mut kinds = match metadata::integers(map, TYPES)? {
            None => vec![TokenKind::Normal; tokens.len()],
            Some(types) => {
                check_length(TYPES, tokens.len(), types.len())?;
                (0u32..)
                    .zip(types)
                    .map(|(token, value)| TokenKind::from_gguf(token, value))
                    .collect::<Result<_>>()?
            }
        };

        let texts: HashMap<&str, u32> = tokens.iter().map(String::as_str).zip(0u32..).collect();
        let by_text = |text: &&str| texts.get(*text).copied();
        let mut ids = special_ids(map, vocab)?;
        ids.eot = ids.eot.or_else(|| END_OF_TURN.iter().find_map(by_text));
        ids.end_of_generation
            .extend(END_OF_GENERATION.iter().filter_map(by_text));
        for &id in &ids.end_of_generation {
            kinds[id as usize] = TokenKind::Control;
        }
        ids.end_of_generation.extend(ids.eos);
        ids.end_of_generation.extend(ids.eot);
        // Where calls end a turn, `<|end|>` only ends a message.
        if let (Some(end), true) = (
            by_text(&"<|end|>"),
            ["<|return|>", "<|call|>"].iter().all(|t| by_text(t).is_some()),
        ) {
            ids.end_of_generation.remove(&end);
        }

        let mut special = SpecialTokens::default();
        for ((text, kind), id) in tokens.iter().zip(&kinds).zip(0u32..) {
            match kind {
                TokenKind::Control | TokenKind::Unknown => special.insert(text, id, false),
                TokenKind::UserDefined => special.insert(text, id, true),
                _ => {}
            }
        }

        let (engine, spelling, add_bos, space_prefix) = match model {
            "gpt2" => {
                const MERGES: &str = "tokenizer.ggml.merges";
                let name = metadata::string(map, "tokenizer.ggml.pre")?.unwrap_or("default");
                let scheme = pretokenizer::find(name)?;
                let merges = metadata::strings(map, MERGES)?.ok_or(Error::MissingKey { key: MERGES })?;
                let pairs = BytePairs::new(tokens, merges, scheme)?;
                (
                    Engine::BytePairs(Box::new(pairs), special),
                    Spelling::ByteLevel,
                    scheme.add_bos,
                    false,
                )
            }
            "llama" => {
                const SCORES: &str = "tokenizer.ggml.scores";
                let scores = metadata::floats(map, SCORES)?.ok_or(Error::MissingKey { key: SCORES })?;
                check_length(SCORES, tokens.len(), scores.len())?;
                // Where the metadata names none, the texts that SentencePiece gives them do.
                ids.unknown = ids.unknown.or_else(|| by_text(&"<unk>"));
                ids.bos = ids.bos.or_else(|| by_text(&"<s>"));
                ids.eos = ids.eos.or_else(|| by_text(&"</s>"));
                let model = SentencePiece::new(tokens, scores, ids.unknown)?;
                (
                    Engine::SentencePiece(Box::new(model), special),
                    Spelling::SentencePiece,
                    true,
                    metadata::flag(map, "tokenizer.ggml.add_space_prefix")?.unwrap_or(true),
                )
            }
            other => {
                return Err(Error::UnknownModel {
                    found: other.chars().take(80).collect(),
                    known: MODELS.to_owned(),
                });
            }
        };
        let add_bos = metadata::flag(map, "tokenizer.ggml.add_bos_token")?.unwrap_or(add_bos);
        let add_eos = metadata::flag(map, "tokenizer.ggml.add_eos_token")?.unwrap_or(false);
        let missing = |flag, token| Err(Error::NoTokenToAdd { flag, token });
        if add_bos && ids.bos.is_none() {
            return missing("add_bos_token", "bos");
        }
        if add_eos && ids.eos.is_none() {
            return missing("add_eos_token", "eos");
        }

        let pairs = tokens.iter().map(String::as_str).zip(kinds);
        Ok(Tokenizer {
            engine,
            vocabulary: Vocabulary::new(pairs, spelling)?,
            ids,
            add_bos,
            add_eos,
            space_prefix,
        })
    }

    /// The tokenizer of a Hugging Face folder: `tokenizer.json`, with the special tokens that `tokenizer_config.json` and
    /// `generation_config.json` name.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`] without a `tokenizer.json`; else what is wrong with one of the files.
    pub fn from_folder(folder: &Path) -> Result<Tokenizer> {
        let loaded = crate::huggingface::load(folder, END_OF_GENERATION, END_OF_TURN)?;
        Ok(Tokenizer {
            engine: Engine::HuggingFace(Box::new(loaded.engine)),
            vocabulary: loaded.vocabulary,
            ids: loaded.ids,
            // The post-processor in `tokenizer.json` adds them.
            add_bos: false,
            add_eos: false,
            space_prefix: loaded.strips_space,
        })
    }

    /// The tokens of a text.
    ///
    /// # Errors
    /// [`Error::NoTokenForByte`] for a character that the vocabulary cannot express, [`Error::TextTooLong`] above
    /// [`MAX_TEXT_BYTES`].
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(Error::TextTooLong {
                len: text.len(),
                limit: MAX_TEXT_BYTES,
            });
        }
        let mut out = Vec::new();
        if options.add_special && self.add_bos {
            out.extend(self.ids.bos);
        }
        match &self.engine {
            Engine::BytePairs(model, special) => {
                for fragment in special.split(text, options.parse_special) {
                    match fragment {
                        Fragment::Token(id) => out.push(id),
                        Fragment::Text(text) => model.encode(text, &mut out)?,
                    }
                }
            }
            Engine::SentencePiece(model, special) => {
                let mut after_special = true;
                let mut spaced = String::new();
                for fragment in special.split(text, options.parse_special) {
                    match fragment {
                        Fragment::Token(id) => {
                            out.push(id);
                            after_special = true;
                        }
                        Fragment::Text(text) => {
                            spaced.clear();
                            if self.space_prefix && after_special {
                                spaced.push('▁');
                            }
                            spaced.extend(text.chars().map(|c| if c == ' ' { '▁' } else { c }));
                            model.encode(&spaced, &mut out)?;
                            after_special = false;
                        }
                    }
                }
            }
            Engine::HuggingFace(model) => model.encode(text, options, &mut out)?,
        }
        if options.add_special && self.add_eos {
            out.extend(self.ids.eos);
        }
        Ok(out)
    }

    /// The text of a whole sequence; bytes that are not UTF-8 become U+FFFD. The space that some tokenizers put before a text
    /// is taken off again.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`].
    pub fn decode(&self, tokens: &[u32], options: DecodeOptions) -> Result<String> {
        let mut text = String::new();
        let mut stream = self.decode_stream(options);
        for &token in tokens {
            stream.push(token, &mut text)?;
        }
        stream.finish(&mut text);
        if self.space_prefix
            && text.starts_with(' ')
            && let Some(&first) = tokens
                .iter()
                .find(|&&t| !(options.skip_special && self.is_special(t)))
            && self.vocabulary.piece(first)?.first() == Some(&b' ')
        {
            text.remove(0);
        }
        Ok(text)
    }

    /// Decodes tokens one at a time, as a continuation of text that came before.
    pub fn decode_stream(&self, options: DecodeOptions) -> DecodeStream<'_> {
        DecodeStream::new(self, options)
    }

    /// The bytes of a token, which need not be whole characters; for special tokens, their names.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`].
    pub fn token_to_piece(&self, token: u32) -> Result<&[u8]> {
        self.vocabulary.piece(token)
    }

    /// What a token is for.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`].
    pub fn token_kind(&self, token: u32) -> Result<TokenKind> {
        self.vocabulary.kind(token)
    }

    /// Number of tokens. A model may compute logits for more, as padding.
    pub fn vocabulary_size(&self) -> u32 {
        self.vocabulary.len()
    }

    /// The tokens with a meaning of their own.
    pub fn special_ids(&self) -> &SpecialIds {
        &self.ids
    }

    /// Whether a generation is over after this token.
    pub fn is_end_of_generation(&self, token: u32) -> bool {
        self.ids.end_of_generation.contains(&token)
    }

    /// The text of the bos token, for templates.
    pub fn bos_text(&self) -> Option<&str> {
        self.text_of(self.ids.bos)
    }

    /// The text of the eos token, for templates.
    pub fn eos_text(&self) -> Option<&str> {
        self.text_of(self.ids.eos)
    }

    fn text_of(&self, token: Option<u32>) -> Option<&str> {
        std::str::from_utf8(self.vocabulary.piece(token?).ok()?).ok()
    }

    fn is_special(&self, token: u32) -> bool {
        self.vocabulary.kind(token).is_ok_and(TokenKind::is_special)
    }
}

fn check_length(key: &'static str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::WrongLength { key, expected, found })
}

fn special_ids(map: &Gguf, vocab: u32) -> Result<SpecialIds> {
    let token = |key| metadata::token(map, key, vocab);
    let mut ids = SpecialIds {
        bos: token("tokenizer.ggml.bos_token_id")?,
        eos: token("tokenizer.ggml.eos_token_id")?,
        eot: token("tokenizer.ggml.eot_token_id")?,
        unknown: token("tokenizer.ggml.unknown_token_id")?,
        padding: token("tokenizer.ggml.padding_token_id")?,
        end_of_generation: BTreeSet::new(),
    };
    for key in [
        "tokenizer.ggml.eom_token_id",
        "tokenizer.ggml.fim_pad_token_id",
        "tokenizer.ggml.fim_rep_token_id",
        "tokenizer.ggml.fim_sep_token_id",
    ] {
        ids.end_of_generation.extend(token(key)?);
    }
    Ok(ids)
}
