//! SentencePiece's merging by score, as GGUF's `llama` tokenizers mean it.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use crate::vocabulary::parse_byte_token;
use crate::{Error, Result};

/// A vocabulary with a score for each token.
#[derive(Debug)]
pub(crate) struct SentencePiece {
    ids: HashMap<Box<str>, u32>,
    scores: Vec<f32>,
    /// The token of each byte, for characters that have none.
    byte_tokens: [Option<u32>; 256],
    unknown: Option<u32>,
}

/// A run of characters that is, or may become, a token: part of a doubly linked list over the text.
struct Symbol {
    start: u32,
    /// 0 once it is merged into its left neighbour.
    len: u32,
    prev: Option<u32>,
    next: Option<u32>,
}

/// Two neighbours that together are a token.
struct Pair {
    score: f32,
    left: u32,
    right: u32,
    /// Length of both when the pair was found: a pair whose parts have grown since is stale.
    len: u32,
}

impl Ord for Pair {
    /// The greatest pair has the highest score and, among equals, is the leftmost.
    fn cmp(&self, other: &Self) -> Ordering {
        // -0 and +0 are equal scores, so this is not `total_cmp`; NaN is refused when the vocabulary is read.
        self.score
            .partial_cmp(&other.score)
            .unwrap_or(Ordering::Equal)
            .then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

impl SentencePiece {
    pub(crate) fn new(tokens: &[String], scores: &[f32], unknown: Option<u32>) -> Result<Self> {
        let mut ids = HashMap::with_capacity(tokens.len());
        let mut byte_tokens = [None; 256];
        for (id, (text, score)) in (0u32..).zip(tokens.iter().zip(scores)) {
            if score.is_nan() {
                return Err(Error::BadScore { token: id });
            }
            if let Some(byte) = parse_byte_token(text) {
                byte_tokens[usize::from(byte)] = Some(id);
            }
            if !text.is_empty() {
                ids.insert(text.as_str().into(), id);
            }
        }
        Ok(SentencePiece {
            ids,
            scores: scores.to_vec(),
            byte_tokens,
            unknown,
        })
    }

    /// Appends the tokens of a text without special tokens. Spaces have become `▁` already; the text is shorter than
    /// 4 GiB.
    pub(crate) fn encode(&self, text: &str, out: &mut Vec<u32>) -> Result<()> {
        let mut symbols = symbols_of(text)?;
        let mut queue = BinaryHeap::new();
        for right in 1..symbols.len() {
            self.consider(text, &symbols, right - 1, right, &mut queue);
        }

        while let Some(pair) = queue.pop() {
            let (left, right) = (pair.left as usize, pair.right as usize);
            let (left_len, right_len) = (symbols[left].len, symbols[right].len);
            if left_len == 0 || right_len == 0 || left_len + right_len != pair.len {
                continue;
            }
            symbols[left].len = pair.len;
            symbols[right].len = 0;
            let next = symbols[right].next;
            symbols[left].next = next;
            if let Some(next) = next {
                symbols[next as usize].prev = Some(pair.left);
                self.consider(text, &symbols, left, next as usize, &mut queue);
            }
            if let Some(prev) = symbols[left].prev {
                self.consider(text, &symbols, prev as usize, left, &mut queue);
            }
        }

        for symbol in symbols.iter().filter(|s| s.len > 0) {
            let piece = &text[symbol.start as usize..(symbol.start + symbol.len) as usize];
            match self.ids.get(piece) {
                Some(&id) => out.push(id),
                None => self.encode_bytes(piece, out)?,
            }
        }
        Ok(())
    }

    fn consider(
        &self,
        text: &str,
        symbols: &[Symbol],
        left: usize,
        right: usize,
        queue: &mut BinaryHeap<Pair>,
    ) {
        let start = symbols[left].start as usize;
        let len = symbols[left].len + symbols[right].len;
        let Some(&id) = self.ids.get(&text[start..start + len as usize]) else {
            return;
        };
        queue.push(Pair {
            score: self.scores[id as usize],
            // `symbols_of` made every index fit.
            left: left as u32,
            right: right as u32,
            len,
        });
    }

    fn encode_bytes(&self, piece: &str, out: &mut Vec<u32>) -> Result<()> {
        let start = out.len();
        for byte in piece.bytes() {
            match (self.byte_tokens[usize::from(byte)], self.unknown) {
                (Some(id), _) => out.push(id),
                (None, Some(unknown)) => {
                    // One unknown token for the whole character.
                    out.truncate(start);
                    out.push(unknown);
                    break;
                }
                (None, None) => return Err(Error::NoTokenForByte { byte }),
            }
        }
        Ok(())
    }
}

/// One symbol for each character.
fn symbols_of(text: &str) -> Result<Vec<Symbol>> {
    if u32::try_from(text.len()).is_err() {
        return Err(Error::TextTooLong {
            len: text.len(),
            limit: u32::MAX as usize,
        });
    }
    let mut symbols = Vec::new();
    for (index, (start, c)) in (0u32..).zip(text.char_indices()) {
        symbols.push(Symbol {
            start: start as u32,
            len: c.len_utf8() as u32,
            prev: index.checked_sub(1),
            next: Some(index + 1),
        });
    }
    if let Some(last) = symbols.last_mut() {
        last.next = None;
    }
    Ok(symbols)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(tokens: &[(&str, f32)], unknown: Option<u32>) -> SentencePiece {
        let texts: Vec<String> = tokens.iter().map(|t| t.0.to_owned()).collect();
        let scores: Vec<f32> = tokens.iter().map(|t| t.1).collect();
        SentencePiece::new(&texts, &scores, unknown).unwrap()
    }

    fn encode(model: &SentencePiece, text: &str) -> Vec<u32> {
        let mut out = Vec::new();
        model.encode(text, &mut out).unwrap();
        out
    }

    #[test]
    fn the_higher_score_merges_first_and_ties_go_left() {
        let m = model(
            &[("a", 0.0), ("b", 0.0), ("ab", -2.0), ("ba", -1.0), ("aa", -3.0)],
            None,
        );
        // `ba` outranks `ab`.
        assert_eq!(encode(&m, "aba"), [0, 3]);
        // Of three equal pairs the leftmost merges first.
        assert_eq!(encode(&m, "aaa"), [4, 0]);
    }

    #[test]
    fn characters_without_a_token_fall_back_to_bytes_then_to_unknown() {
        let bytes = model(&[("<0xC3>", 0.0), ("<0xA9>", 0.0), ("<unk>", 0.0)], Some(2));
        assert_eq!(encode(&bytes, "é"), [0, 1]);
        // The second byte has no token: the whole character is unknown.
        assert_eq!(encode(&bytes, "è"), [2]);
        let none = model(&[("a", 0.0)], None);
        let error = none.encode("b", &mut Vec::new()).unwrap_err();
        assert!(matches!(error, Error::NoTokenForByte { byte: b'b' }));
    }

    #[test]
    fn a_nan_score_is_refused() {
        let error = SentencePiece::new(&["a".into()], &[f32::NAN], None).unwrap_err();
        assert!(matches!(error, Error::BadScore { token: 0 }));
    }
}
