//! The tokens themselves: what each one is, and the bytes that it stands for.

use crate::{Error, Result};

/// Most tokens that a vocabulary may have. Real ones stay under 300,000; the bound keeps the tables of a hostile
/// `tokenizer.json`, which may number its tokens as it likes, small.
pub(crate) const MAX_TOKENS: u32 = 1 << 23;

/// What a token is for: `tokenizer.ggml.token_type` of a GGUF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TokenKind {
    /// Not said.
    Undefined,
    /// A piece of text.
    Normal,
    /// Stands for text that the vocabulary cannot express.
    Unknown,
    /// A marker with no text of its own, such as the end of a turn.
    Control,
    /// Added by hand: found in text before anything else is done to it.
    UserDefined,
    /// A place that no text uses.
    Unused,
    /// A single byte.
    Byte,
}

impl TokenKind {
    pub(crate) fn from_gguf(token: u32, value: i64) -> Result<TokenKind> {
        Ok(match value {
            0 => TokenKind::Undefined,
            1 => TokenKind::Normal,
            2 => TokenKind::Unknown,
            3 => TokenKind::Control,
            4 => TokenKind::UserDefined,
            5 => TokenKind::Unused,
            6 => TokenKind::Byte,
            found => return Err(Error::UnknownTokenType { token, found }),
        })
    }

    /// Whether the token is a marker rather than text.
    pub fn is_special(self) -> bool {
        matches!(self, TokenKind::Control | TokenKind::Unknown)
    }
}

/// How a token's text in the file stands for bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spelling {
    /// One printable character for each byte, as GPT-2 writes them.
    ByteLevel,
    /// `▁` for a space, `<0xHH>` for a byte token.
    SentencePiece,
    /// As it is.
    Plain,
}

/// Kinds and pieces of all tokens.
#[derive(Debug)]
pub(crate) struct Vocabulary {
    kinds: Vec<TokenKind>,
    /// All pieces, one after the other.
    bytes: Vec<u8>,
    /// `ends[i]` is where token i's piece ends in `bytes`.
    ends: Vec<u32>,
}

impl Vocabulary {
    /// Builds the table from `(text, kind)` of every token, in order of id.
    pub(crate) fn new<'t>(
        tokens: impl Iterator<Item = (&'t str, TokenKind)>,
        spelling: Spelling,
    ) -> Result<Vocabulary> {
        let mut table = Vocabulary {
            kinds: Vec::new(),
            bytes: Vec::new(),
            ends: Vec::new(),
        };
        for (text, kind) in tokens {
            match (kind, spelling) {
                (TokenKind::Control | TokenKind::Unknown | TokenKind::UserDefined, _)
                | (_, Spelling::Plain) => table.bytes.extend_from_slice(text.as_bytes()),
                (_, Spelling::ByteLevel) => push_byte_level(text, &mut table.bytes),
                (_, Spelling::SentencePiece) => push_sentencepiece(text, kind, &mut table.bytes),
            }
            let size = |found: usize| Error::VocabularySize {
                found: found as u64,
                limit: u64::from(MAX_TOKENS),
            };
            let end = u32::try_from(table.bytes.len()).map_err(|_| size(table.bytes.len()))?;
            if table.kinds.len() >= MAX_TOKENS as usize {
                return Err(size(table.kinds.len() + 1));
            }
            table.kinds.push(kind);
            table.ends.push(end);
        }
        if table.kinds.is_empty() {
            return Err(Error::VocabularySize {
                found: 0,
                limit: u64::from(MAX_TOKENS),
            });
        }
        Ok(table)
    }

    pub(crate) fn len(&self) -> u32 {
        u32::try_from(self.kinds.len()).unwrap_or(u32::MAX)
    }

    pub(crate) fn kind(&self, token: u32) -> Result<TokenKind> {
        self.kinds
            .get(token as usize)
            .copied()
            .ok_or(Error::TokenOutOfRange {
                token,
                vocab: self.len(),
            })
    }

    pub(crate) fn piece(&self, token: u32) -> Result<&[u8]> {
        self.kind(token)?;
        let at = token as usize;
        let start = match at {
            0 => 0,
            _ => self.ends[at - 1] as usize,
        };
        Ok(&self.bytes[start..self.ends[at] as usize])
    }
}

/// The byte that GPT-2's alphabet writes as `c`. Printable Latin-1 characters stand for themselves; the other 68 bytes,
/// in ascending order, are U+0100 onwards.
fn byte_of(c: char) -> Option<u8> {
    let code = u32::from(c);
    let printable = |code: u32| matches!(code, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if printable(code) {
        return u8::try_from(code).ok();
    }
    let nth = code.checked_sub(0x100)?;
    (0u8..=255)
        .filter(|&b| !printable(u32::from(b)))
        .nth(usize::try_from(nth).ok()?)
}

/// GPT-2's character for each byte.
pub(crate) fn byte_alphabet() -> [char; 256] {
    let mut alphabet = ['\0'; 256];
    for c in (0x21..0x180).filter_map(char::from_u32) {
        if let Some(byte) = byte_of(c) {
            alphabet[usize::from(byte)] = c;
        }
    }
    alphabet
}

fn push_byte_level(text: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for c in text.chars() {
        match byte_of(c) {
            Some(byte) => out.push(byte),
            // Outside the alphabet: a token that was added as plain text.
            None => {
                out.truncate(start);
                out.extend_from_slice(text.as_bytes());
                return;
            }
        }
    }
}

fn push_sentencepiece(text: &str, kind: TokenKind, out: &mut Vec<u8>) {
    if kind == TokenKind::Byte
        && let Some(byte) = parse_byte_token(text)
    {
        out.push(byte);
        return;
    }
    let mut rest = text;
    while let Some(at) = rest.find('▁') {
        out.extend_from_slice(&rest.as_bytes()[..at]);
        out.push(b' ');
        rest = &rest[at + '▁'.len_utf8()..];
    }
    out.extend_from_slice(rest.as_bytes());
}

/// The byte of a token written `<0xHH>`.
pub(crate) fn parse_byte_token(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit()))
        .then(|| u8::from_str_radix(digits, 16).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_is_a_bijection() {
        let alphabet = byte_alphabet();
        for (byte, &c) in alphabet.iter().enumerate() {
            assert_eq!(byte_of(c), Some(byte as u8));
        }
        // Known points of GPT-2's table.
        assert_eq!(alphabet[b' ' as usize], 'Ġ');
        assert_eq!(alphabet[b'\n' as usize], 'Ċ');
        assert_eq!(alphabet[0xad], 'Ń');
        assert_eq!(byte_of('\u{144}'), None);
    }

    #[test]
    fn byte_tokens_are_two_hexadecimal_digits() {
        assert_eq!(parse_byte_token("<0x0A>"), Some(10));
        for bad in ["<0x+A>", "<0xA>", "<0x0A", "0x0A", "<0x00A>"] {
            assert_eq!(parse_byte_token(bad), None, "{bad}");
        }
    }
}
