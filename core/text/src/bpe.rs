//! Byte-pair encoding over GPT-2's byte alphabet: GGUF's `gpt2` tokenizers.

use tokenizers::Tokenizer as Library;
use tokenizers::models::bpe::{BPE, Vocab};

use crate::pretokenizer::Scheme;
use crate::vocabulary::byte_alphabet;
use crate::{Error, Result};

/// A byte-pair tokenizer without special tokens.
#[derive(Debug)]
pub(crate) struct BytePairs {
    library: Library,
    /// Bytes that the vocabulary cannot express: the library would drop them without a word.
    missing: Vec<u8>,
}

impl BytePairs {
    pub(crate) fn new(tokens: &[String], merges: &[String], scheme: &Scheme) -> Result<Self> {
        let vocab: Vocab = (0u32..)
            .zip(tokens)
            .filter(|(_, text)| !text.is_empty())
            .map(|(id, text)| (text.clone(), id))
            .collect();
        let missing = (0u8..=255)
            .zip(byte_alphabet())
            .filter(|(_, c)| !vocab.contains_key(c.encode_utf8(&mut [0; 4]) as &str))
            .map(|(byte, _)| byte)
            .collect();

        let mut pairs = Vec::with_capacity(merges.len());
        for (index, merge) in merges.iter().enumerate() {
            let bad = |reason| Error::BadMerge {
                index,
                merge: merge.chars().take(80).collect(),
                reason,
            };
            // The separator is the first space that is not the first character.
            let (at, _) = merge
                .char_indices()
                .skip(1)
                .find(|&(_, c)| c == ' ')
                .ok_or_else(|| bad("should be two tokens with a space between them"))?;
            let (left, right) = (&merge[..at], &merge[at + 1..]);
            if !vocab.contains_key(left) || !vocab.contains_key(right) {
                return Err(bad("one of the two is not in the vocabulary"));
            }
            if !vocab.contains_key(format!("{left}{right}").as_str()) {
                return Err(bad("what it makes is not in the vocabulary"));
            }
            pairs.push((left.to_owned(), right.to_owned()));
        }
        let model = BPE::builder()
            .vocab_and_merges(vocab, pairs)
            .ignore_merges(scheme.ignore_merges)
            .build()
            .map_err(|error| Error::Unsupported {
                what: format!("byte-pair model: {error}"),
            })?;
        let mut library = Library::new(model);
        library.with_pre_tokenizer(Some(scheme.build()?));
        Ok(BytePairs { library, missing })
    }

    /// Appends the tokens of a text without special tokens.
    pub(crate) fn encode(&self, text: &str, out: &mut Vec<u32>) -> Result<()> {
        if !self.missing.is_empty()
            && let Some(byte) = text.bytes().find(|b| self.missing.contains(b))
        {
            return Err(Error::NoTokenForByte { byte });
        }
        let encoding = self
            .library
            .encode_fast(text, false)
            .map_err(|error| Error::Encode {
                reason: error.to_string(),
            })?;
        out.extend_from_slice(encoding.get_ids());
        Ok(())
    }
}
