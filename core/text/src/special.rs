//! Finding special tokens in text.

use std::collections::{BTreeMap, HashMap};

/// A stretch of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fragment<'t> {
    Text(&'t str),
    Token(u32),
}

/// The special tokens of a vocabulary, by length.
#[derive(Debug, Default)]
pub(crate) struct SpecialTokens {
    by_length: BTreeMap<usize, Group>,
}

#[derive(Debug)]
struct Group {
    /// Which bytes a token of this length starts with.
    first: Box<[bool; 256]>,
    tokens: HashMap<Vec<u8>, (u32, Always)>,
}

/// Whether a token is found even when special tokens are not to be parsed: those added as text are.
type Always = bool;

impl SpecialTokens {
    pub(crate) fn insert(&mut self, text: &str, token: u32, always: bool) {
        let bytes = text.as_bytes();
        let Some(&first) = bytes.first() else { return };
        let group = self.by_length.entry(bytes.len()).or_insert_with(|| Group {
            first: Box::new([false; 256]),
            tokens: HashMap::new(),
        });
        group.first[usize::from(first)] = true;
        group.tokens.insert(bytes.to_vec(), (token, always));
    }

    /// Cuts `text` at its special tokens: the longest ones first wherever they stand, then the next shorter ones in what
    /// remains, from left to right. This is llama.cpp's order; leftmost-longest differs where tokens overlap.
    pub(crate) fn split<'t>(&self, text: &'t str, parse_special: bool) -> Vec<Fragment<'t>> {
        let mut fragments = Vec::new();
        if !text.is_empty() {
            fragments.push(Fragment::Text(text));
        }
        for (&length, group) in self.by_length.iter().rev() {
            if length > text.len() {
                continue;
            }
            let mut cut = Vec::with_capacity(fragments.len());
            for fragment in fragments {
                match fragment {
                    Fragment::Text(text) => group.cut(text, length, parse_special, &mut cut),
                    token @ Fragment::Token(_) => cut.push(token),
                }
            }
            fragments = cut;
        }
        fragments
    }
}

impl Group {
    fn cut<'t>(&self, text: &'t str, length: usize, parse_special: bool, out: &mut Vec<Fragment<'t>>) {
        let bytes = text.as_bytes();
        let mut start = 0;
        let mut at = 0;
        while at + length <= bytes.len() {
            if self.first[usize::from(bytes[at])]
                && let Some(&(token, always)) = self.tokens.get(&bytes[at..at + length])
                && (always || parse_special)
            {
                if start < at {
                    out.push(Fragment::Text(&text[start..at]));
                }
                out.push(Fragment::Token(token));
                at += length;
                start = at;
            } else {
                at += 1;
            }
        }
        if start < bytes.len() {
            out.push(Fragment::Text(&text[start..]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> SpecialTokens {
        let mut special = SpecialTokens::default();
        special.insert("<a>", 1, false);
        special.insert("a><bcd>", 2, true);
        special.insert("é", 3, true);
        special
    }

    #[test]
    fn longer_tokens_win_over_earlier_ones() {
        let split = tokens().split("x<a><bcd>y", true);
        assert_eq!(
            split,
            [Fragment::Text("x<"), Fragment::Token(2), Fragment::Text("y")]
        );
    }

    #[test]
    fn control_tokens_are_text_unless_asked_for() {
        let special = tokens();
        assert_eq!(special.split("<a>", false), [Fragment::Text("<a>")]);
        assert_eq!(special.split("<a>", true), [Fragment::Token(1)]);
        assert_eq!(
            special.split("éé<a>", false),
            [Fragment::Token(3), Fragment::Token(3), Fragment::Text("<a>")]
        );
        assert_eq!(special.split("", true), []);
    }
}
