use crate::{Result, Tokenizer};

/// How to decode tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DecodeOptions {
    /// Leave out control and unknown tokens, which otherwise appear by name.
    pub skip_special: bool,
}

/// Decodes tokens one at a time and gives out whole characters only: a token may end in the middle of one.
#[derive(Clone, Debug)]
pub struct DecodeStream<'t> {
    tokenizer: &'t Tokenizer,
    options: DecodeOptions,
    /// The start of a character: at most three bytes between calls.
    pending: Vec<u8>,
}

impl<'t> DecodeStream<'t> {
    pub(crate) fn new(tokenizer: &'t Tokenizer, options: DecodeOptions) -> Self {
        DecodeStream {
            tokenizer,
            options,
            pending: Vec::new(),
        }
    }

    /// Appends to `out` the characters that this token completes.
    ///
    /// # Errors
    /// [`crate::Error::TokenOutOfRange`]; the stream is as it was.
    pub fn push(&mut self, token: u32, out: &mut String) -> Result<()> {
        let vocabulary = &self.tokenizer.vocabulary;
        if self.options.skip_special && vocabulary.kind(token)?.is_special() {
            return Ok(());
        }
        self.pending.extend_from_slice(vocabulary.piece(token)?);
        let used = decode_prefix(&self.pending, out);
        self.pending.drain(..used);
        Ok(())
    }

    /// Ends the stream: a character that is still incomplete becomes U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        if !self.pending.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
    }
}

/// Appends the longest prefix of `bytes` that more bytes cannot change, each ill-formed sequence as one U+FFFD, and returns
/// its length.
fn decode_prefix(bytes: &[u8], out: &mut String) -> usize {
    let mut used = 0;
    loop {
        match std::str::from_utf8(&bytes[used..]) {
            Ok(text) => {
                out.push_str(text);
                return bytes.len();
            }
            Err(error) => {
                let valid = error.valid_up_to();
                if let Ok(text) = std::str::from_utf8(&bytes[used..used + valid]) {
                    out.push_str(text);
                }
                used += valid;
                match error.error_len() {
                    None => return used,
                    Some(bad) => {
                        out.push(char::REPLACEMENT_CHARACTER);
                        used += bad;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_cut_of_any_bytes_decodes_as_the_whole_does() {
        let mut state = 1u32;
        for _ in 0..2000 {
            let bytes: Vec<u8> = (0..12)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    // Lead and continuation bytes more often than chance has them.
                    [
                        0x41, 0xe2, 0x82, 0xac, 0xf0, 0x9f, 0x98, 0x80, 0xc3, 0xff, 0xed, 0xa0,
                    ][(state >> 24) as usize % 12]
                })
                .collect();
            let mut out = String::new();
            let mut pending = Vec::new();
            for &byte in &bytes {
                pending.push(byte);
                let used = decode_prefix(&pending, &mut out);
                pending.drain(..used);
                assert!(pending.len() <= 3);
            }
            if !pending.is_empty() {
                out.push(char::REPLACEMENT_CHARACTER);
            }
            assert_eq!(out, String::from_utf8_lossy(&bytes));
        }
    }
}
