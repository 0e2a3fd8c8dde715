//! How byte-pair tokenizers cut text into words before they merge: the schemes that GGUF names in `tokenizer.ggml.pre`.
//!
//! Each scheme is a list of regular expressions, taken from the `tokenizer.json` of the model it is named after. They apply
//! one after the other, each within the pieces that the ones before it left; text between matches is a piece of its own.

use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use crate::{Error, Result};

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const PUNCTUATION: &str = r"[\p{P}\$\+<=>\^~\|]+";
const DIGIT: &str = r"\p{N}";
const DIGITS: &str = r"\p{N}+";
const THREE_DIGITS: &str = "[0-9][0-9][0-9]";
/// Llama 3: up to three digits.
const LLAMA3: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2: Llama 3's with single digits.
const QWEN2: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-4o: words also end where capitals begin.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Tekken, Mistral's: GPT-4o's with single digits and without contractions.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A named way to cut text, and what its name implies when the metadata says nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scheme {
    names: &'static [&'static str],
    patterns: &'static [&'static str],
    /// A word that is a token is not merged from its parts.
    pub(crate) ignore_merges: bool,
    /// Whether text begins with the bos token unless `add_bos_token` says otherwise.
    pub(crate) add_bos: bool,
}

const fn scheme(names: &'static [&'static str], patterns: &'static [&'static str]) -> Scheme {
    Scheme {
        names,
        patterns,
        ignore_merges: false,
        add_bos: false,
    }
}

const SCHEMES: &[Scheme] = &[
    scheme(&["default"], &[PUNCTUATION, GPT2, DIGITS, THREE_DIGITS]),
    scheme(
        &[
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "exaone4",
            "gigachat",
            "mellum",
            "modern-bert",
            "trillion",
            "granite-docling",
            "a.x-4.0",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
        ],
        &[GPT2],
    ),
    scheme(
        &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
        ],
        &[DIGIT, GPT2],
    ),
    scheme(&["falcon"], &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, THREE_DIGITS]),
    Scheme {
        ignore_merges: true,
        add_bos: true,
        ..scheme(
            &[
                "llama-bpe",
                "llama3",
                "llama-v3",
                "falcon3",
                "falcon-h1",
                "pixtral",
                "midm-2.0",
                "lfm2",
            ],
            &[LLAMA3],
        )
    },
    scheme(&["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"], &[LLAMA3]),
    scheme(
        &[
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "megrez",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "grok-2",
        ],
        &[QWEN2],
    ),
    scheme(
        &["qwen35"],
        &[
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
    ),
    scheme(
        &["seed-coder"],
        &[
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
    ),
    scheme(&["gpt-4o", "llama4", "kanana2", "minimax-m2"], &[GPT4O]),
    Scheme {
        ignore_merges: true,
        add_bos: true,
        ..scheme(&["tekken"], &[TEKKEN])
    },
];

/// The scheme of that name.
///
/// # Errors
/// [`Error::UnknownPreTokenizer`], with the known ones: words cut wrongly give other tokens than the model was trained on.
pub(crate) fn find(name: &str) -> Result<&'static Scheme> {
    SCHEMES
        .iter()
        .find(|s| s.names.contains(&name))
        .ok_or_else(|| Error::UnknownPreTokenizer {
            found: name.chars().take(80).collect(),
            known: SCHEMES
                .iter()
                .flat_map(|s| s.names)
                .copied()
                .collect::<Vec<_>>()
                .join(", "),
        })
}

impl Scheme {
    /// The scheme, followed by the spelling of bytes as characters.
    pub(crate) fn build(&self) -> Result<PreTokenizerWrapper> {
        let mut steps: Vec<PreTokenizerWrapper> = Vec::with_capacity(self.patterns.len() + 1);
        for pattern in self.patterns {
            let split = Split::new(
                SplitPattern::Regex((*pattern).to_owned()),
                SplitDelimiterBehavior::Isolated,
                false,
            )
            .map_err(|error| Error::Unsupported {
                what: format!("regular expression `{pattern}`: {error}"),
            })?;
            steps.push(split.into());
        }
        steps.push(ByteLevel::new(false, false, false).into());
        Ok(Sequence::new(steps).into())
    }
}

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::*;

    fn words(name: &str, text: &str) -> Vec<String> {
        let mut pre = PreTokenizedString::from(text);
        find(name)
            .unwrap()
            .build()
            .unwrap()
            .pre_tokenize(&mut pre)
            .unwrap();
        pre.get_splits(OffsetReferential::Original, OffsetType::Byte)
            .iter()
            .map(|s| text[s.1.0..s.1.1].to_owned())
            .collect()
    }

    #[test]
    fn every_scheme_compiles_and_names_are_unique() {
        let mut names: Vec<_> = SCHEMES.iter().flat_map(|s| s.names).collect();
        for name in &names {
            words(name, "It's 1234 o'clock,\n\n  Ünïcode… ");
        }
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn schemes_differ_where_their_models_do() {
        assert_eq!(words("gpt-2", "a 1234\n b"), ["a", " 1234", "\n", " b"]);
        assert_eq!(words("smollm", "a 123"), ["a", " ", "1", "2", "3"]);
        assert_eq!(words("llama-bpe", "a 1234"), ["a", " ", "123", "4"]);
        assert_eq!(words("qwen2", "I'LL 12"), ["I", "'LL", " ", "1", "2"]);
        assert_eq!(words("gpt-4o", "fooBar"), ["foo", "Bar"]);
        assert_eq!(words("default", "x=12345"), ["x", "=", "123", "45"]);
    }

    #[test]
    fn an_unknown_scheme_is_refused_with_the_known_ones() {
        let message = find("llama-9").unwrap_err().to_string();
        assert!(
            message.contains("`llama-9`") && message.contains("smollm"),
            "{message}"
        );
    }
}
