//! Reading of untrusted headers: a window over the file that grows only by what the file really holds, and a budget for
//! what is made of it.

use std::fmt::Display;

use crate::{Error, Result, Shard};

/// Memory that everything made from one model's headers may take, as estimated while it is made.
///
/// The largest known headers hold about 800,000 strings (a vocabulary of 262,144 with its merges), which are below
/// 48 MiB; with the read window that keeps opening any file, hostile ones included, below 64 MiB.
pub(crate) const HEADER_MEMORY: u64 = 48 << 20;

/// Bytes read at a time.
const WINDOW: u64 = 256 << 10;

/// Memory left for headers.
#[derive(Clone, Debug)]
pub(crate) struct Budget {
    used: u64,
}

impl Budget {
    pub(crate) fn new() -> Self {
        Self { used: 0 }
    }

    /// Accounts for `bytes` about to be allocated.
    pub(crate) fn charge(&mut self, bytes: u64, file: &str, what: impl Display) -> Result<()> {
        let needed = self.used.saturating_add(bytes);
        if needed > HEADER_MEMORY {
            return Err(Error::HeaderTooLarge {
                file: file.into(),
                what: what.to_string(),
                needed,
                limit: HEADER_MEMORY,
            });
        }
        self.used = needed;
        Ok(())
    }

    /// Takes back what was charged for something that is gone.
    pub(crate) fn release(&mut self, bytes: u64) {
        self.used = self.used.saturating_sub(bytes);
    }
}

/// What a `String` of that length costs: its three words and a heap block, of 32 bytes at least and 16-byte granules.
pub(crate) fn string_cost(len: u64) -> u64 {
    24 + if len == 0 {
        0
    } else {
        len.saturating_add(8)
            .checked_next_multiple_of(16)
            .unwrap_or(len)
            .max(32)
    }
}

/// A position in a shard, read through a window.
pub(crate) struct HeaderReader<'a> {
    shard: &'a Shard,
    file: String,
    window: Vec<u8>,
    window_start: u64,
    pos: u64,
}

impl<'a> HeaderReader<'a> {
    pub(crate) fn new(shard: &'a Shard, pos: u64) -> Self {
        Self {
            shard,
            file: shard.name(),
            window: Vec::new(),
            window_start: pos,
            pos,
        }
    }

    pub(crate) fn file(&self) -> &str {
        &self.file
    }

    pub(crate) fn pos(&self) -> u64 {
        self.pos
    }

    pub(crate) fn remaining(&self) -> u64 {
        self.shard.source.len.saturating_sub(self.pos)
    }

    /// The next `n` bytes. The caller has bounded `n` by the budget if the file does not.
    pub(crate) fn take(&mut self, n: u64, what: impl Display) -> Result<&[u8]> {
        if n > self.remaining() {
            return Err(Error::Truncated {
                file: self.file.clone(),
                what: what.to_string(),
                at: self.pos,
                needed: n,
                file_len: self.shard.source.len,
            });
        }
        let mut start = self.pos - self.window_start;
        if start + n > self.window.len() as u64 {
            let len = n.max(WINDOW).min(self.remaining());
            self.window.clear();
            // At most the rest of the file; callers take no more than a window or a charged string at a time.
            self.window.resize(to_usize(len, &self.file)?, 0);
            self.shard.read_at(self.pos, &mut self.window)?;
            self.window_start = self.pos;
            start = 0;
        }
        self.pos += n;
        let start = to_usize(start, &self.file)?;
        Ok(&self.window[start..start + to_usize(n, &self.file)?])
    }

    /// Moves on without reading; the bytes must exist.
    pub(crate) fn skip(&mut self, n: u64, what: impl Display) -> Result<()> {
        if n > self.remaining() {
            return Err(Error::Truncated {
                file: self.file.clone(),
                what: what.to_string(),
                at: self.pos,
                needed: n,
                file_len: self.shard.source.len,
            });
        }
        self.pos += n;
        // `take` subtracts the window's start: a window that was left behind is refilled from `pos`.
        if self.pos > self.window_start + self.window.len() as u64 {
            self.window.clear();
            self.window_start = self.pos;
        }
        Ok(())
    }

    pub(crate) fn array<const N: usize>(&mut self, what: impl Display) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    pub(crate) fn u32(&mut self, what: impl Display) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, what: impl Display) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things of at least `each` bytes: refused at once if the rest of the file cannot hold them.
    pub(crate) fn count(&mut self, each: u64, what: impl Display) -> Result<u64> {
        let at = self.pos;
        let found = self.u64(&what)?;
        let max = self.remaining() / each;
        if found > max {
            return Err(Error::CountTooLarge {
                file: self.file.clone(),
                what: what.to_string(),
                at,
                found,
                max,
            });
        }
        Ok(found)
    }

    /// A string with its length in front of it, as GGUF writes it.
    pub(crate) fn string(&mut self, budget: &mut Budget, what: impl Display) -> Result<String> {
        let len = self.count(1, format_args!("the length of {what}"))?;
        let at = self.pos;
        budget.charge(string_cost(len), &self.file, &what)?;
        let bytes = self.take(len, &what)?;
        match std::str::from_utf8(bytes) {
            Ok(s) => Ok(s.to_owned()),
            Err(_) => Err(Error::NotUtf8 {
                file: self.file.clone(),
                what: what.to_string(),
                at,
            }),
        }
    }
}

/// Narrows a length that fits every machine this runs on.
pub(crate) fn to_usize(n: u64, file: &str) -> Result<usize> {
    usize::try_from(n).map_err(|_| Error::HeaderTooLarge {
        file: file.into(),
        what: "a length".into(),
        needed: n,
        limit: usize::MAX as u64,
    })
}
