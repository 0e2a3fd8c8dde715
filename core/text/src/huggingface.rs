//! The tokenizer of a Hugging Face folder.

use std::collections::BTreeSet;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::OnceLock;

use serde_json::Value;
use tokenizers::Tokenizer as Library;

use crate::tokenizer::{EncodeOptions, SpecialIds};
use crate::vocabulary::{MAX_TOKENS, Spelling, TokenKind, Vocabulary, parse_byte_token};
use crate::{Error, Result};

/// Largest `tokenizer.json` that is read; the largest known ones have about 35 MiB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// Largest of the small files beside it.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

#[derive(Debug)]
pub(crate) struct HuggingFace {
    library: Library,
    /// The same tokenizer, to which the text of special tokens is text: made when it is first needed.
    plain: OnceLock<Library>,
}

pub(crate) struct Loaded {
    pub(crate) engine: HuggingFace,
    pub(crate) vocabulary: Vocabulary,
    pub(crate) ids: SpecialIds,
    pub(crate) strips_space: bool,
}

pub(crate) fn load(folder: &Path, end: &[&str], turn: &[&str]) -> Result<Loaded> {
    let path = folder.join("tokenizer.json");
    let Some(bytes) = read_limited(&path, MAX_TOKENIZER_BYTES)? else {
        return Err(Error::NoTokenizer {
            path: folder.to_owned(),
            reason: "the folder has no `tokenizer.json`",
        });
    };
    let malformed = |reason: String| Error::Malformed {
        path: path.clone(),
        reason,
    };
    let json: Value = serde_json::from_slice(&bytes).map_err(|e| malformed(e.to_string()))?;
    let decoder = json.get("decoder").cloned().unwrap_or(Value::Null);
    drop(json);
    let library = guarded(|| Library::from_bytes(&bytes).map_err(|e| e.to_string())).map_err(&malformed)?;
    drop(bytes);
    let (spelling, strips_space) = spelling_of(&decoder)?;
    let vocabulary = vocabulary_of(&library, spelling)?;

    let id_of = |text: &str| library.token_to_id(text).filter(|&id| id < vocabulary.len());
    let config = read_json(&folder.join("tokenizer_config.json"))?;
    let named = |key: &str| id_of(token_text(config.as_ref()?.get(key)?)?);
    let mut ids = SpecialIds {
        bos: named("bos_token"),
        eos: named("eos_token"),
        eot: turn.iter().find_map(|t| id_of(t)),
        unknown: named("unk_token"),
        padding: named("pad_token"),
        end_of_generation: BTreeSet::new(),
    };
    for file in ["generation_config.json", "config.json"] {
        let Some(config) = read_json(&folder.join(file))? else {
            continue;
        };
        let listed = match config.get("eos_token_id") {
            Some(Value::Array(items)) => items.iter().filter_map(Value::as_u64).collect(),
            Some(one) => one.as_u64().into_iter().collect(),
            None => Vec::new(),
        };
        for id in listed {
            match u32::try_from(id) {
                Ok(id) if id < vocabulary.len() => {
                    ids.eos = ids.eos.or(Some(id));
                    ids.end_of_generation.insert(id);
                }
                _ => {
                    return Err(Error::SpecialOutOfRange {
                        key: "eos_token_id",
                        id,
                        vocab: vocabulary.len(),
                    });
                }
            }
        }
    }
    ids.end_of_generation.extend(ids.eos);
    for id in end.iter().filter_map(|t| id_of(t)) {
        if vocabulary.kind(id)? == TokenKind::Control {
            ids.end_of_generation.insert(id);
        }
    }
    Ok(Loaded {
        engine: HuggingFace {
            library,
            plain: OnceLock::new(),
        },
        vocabulary,
        ids,
        strips_space,
    })
}

impl HuggingFace {
    pub(crate) fn encode(&self, text: &str, options: EncodeOptions, out: &mut Vec<u32>) -> Result<()> {
        let library = match options.parse_special {
            true => &self.library,
            false => self.plain.get_or_init(|| {
                let mut plain = self.library.clone();
                plain.set_encode_special_tokens(true);
                plain
            }),
        };
        let encoding = guarded(|| {
            library
                .encode_fast(text, options.add_special)
                .map_err(|e| e.to_string())
        })
        .map_err(|reason| Error::Encode { reason })?;
        out.extend_from_slice(encoding.get_ids());
        Ok(())
    }
}

/// Runs the library over untrusted input; parts of it assert what a hostile file need not keep.
fn guarded<T>(run: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err("the tokenizer library panicked".to_owned()))
}

/// How tokens spell bytes, and whether a leading space is taken off: read from the decoder, which is what it is for.
fn spelling_of(decoder: &Value) -> Result<(Spelling, bool)> {
    let kind = |v: &Value| v.get("type").and_then(Value::as_str).map(str::to_owned);
    let steps: Vec<&Value> = match decoder {
        Value::Null => Vec::new(),
        Value::Object(_) => match decoder.get("decoders").and_then(Value::as_array) {
            Some(steps) if kind(decoder).as_deref() == Some("Sequence") => steps.iter().collect(),
            _ => vec![decoder],
        },
        _ => {
            return Err(Error::Unsupported {
                what: "a decoder that is not an object".to_owned(),
            });
        }
    };
    let mut spelling = Spelling::Plain;
    let mut strips_space = false;
    for step in steps {
        match kind(step).as_deref() {
            Some("ByteLevel") => spelling = Spelling::ByteLevel,
            Some("ByteFallback") => spelling = Spelling::SentencePiece,
            Some("Metaspace") => {
                spelling = Spelling::SentencePiece;
                strips_space = step.get("prepend_scheme").and_then(Value::as_str) != Some("never");
            }
            Some("Replace") => {
                let pattern = step.pointer("/pattern/String").and_then(Value::as_str);
                let content = step.get("content").and_then(Value::as_str);
                if (pattern, content) != (Some("▁"), Some(" ")) {
                    return Err(Error::Unsupported {
                        what: format!("decoder `Replace` of {pattern:?} by {content:?}"),
                    });
                }
                spelling = Spelling::SentencePiece;
            }
            Some("Strip") => {
                strips_space = step.get("start").and_then(Value::as_u64).unwrap_or(0) > 0;
            }
            Some("Fuse") => {}
            other => {
                return Err(Error::Unsupported {
                    what: format!("decoder `{}`", other.unwrap_or("without a type")),
                });
            }
        }
    }
    Ok((spelling, strips_space))
}

fn vocabulary_of(library: &Library, spelling: Spelling) -> Result<Vocabulary> {
    let texts = library.get_vocab(true);
    let added = library.get_added_tokens_decoder();
    let count = texts
        .values()
        .chain(added.keys())
        .max()
        .map_or(0, |&max| u64::from(max) + 1);
    if count == 0 || count > u64::from(MAX_TOKENS) {
        return Err(Error::VocabularySize {
            found: count,
            limit: u64::from(MAX_TOKENS),
        });
    }
    // Ids that no token has stay unused and empty.
    let mut tokens = vec![(String::new(), TokenKind::Unused); count as usize];
    for (text, id) in texts {
        let kind = match spelling {
            Spelling::SentencePiece if parse_byte_token(&text).is_some() => TokenKind::Byte,
            _ => TokenKind::Normal,
        };
        tokens[id as usize] = (text, kind);
    }
    for (id, token) in added {
        let kind = match token.special {
            true => TokenKind::Control,
            false => TokenKind::UserDefined,
        };
        let text = match spelling {
            Spelling::SentencePiece if !token.special => token.content.replace('▁', " "),
            _ => token.content,
        };
        tokens[id as usize] = (text, kind);
    }
    Vocabulary::new(tokens.iter().map(|(t, k)| (t.as_str(), *k)), spelling)
}

/// A token in a config: its text, or an object with it.
fn token_text(value: &Value) -> Option<&str> {
    value
        .as_str()
        .or_else(|| value.get("content").and_then(Value::as_str))
}

/// A JSON file, or `None` if there is none.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>> {
    let Some(bytes) = read_limited(path, MAX_CONFIG_BYTES)? else {
        return Ok(None);
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| Error::Malformed {
            path: path.to_owned(),
            reason: error.to_string(),
        })
}

/// A file of at most `limit` bytes, or `None` if there is none.
pub(crate) fn read_limited(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let io = |error| Error::Io {
        path: path.to_owned(),
        error,
    };
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    let mut bytes = Vec::new();
    // The length that the system reports need not be the one that is read.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(io)?;
    let len = bytes.len() as u64;
    if len > limit {
        return Err(Error::FileTooLarge {
            path: path.to_owned(),
            len,
            limit,
        });
    }
    Ok(Some(bytes))
}
