use crate::{Capacity, Error, Result};

/// A sequence: an independent KV cache, numbered below [`crate::Capacity::max_sequences`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u32);

impl SequenceId {
    /// Its length, of those that all sequences have.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is no such sequence.
    pub fn length_in(self, lengths: &[u32]) -> Result<u32> {
        lengths
            .get(self.0 as usize)
            .copied()
            .ok_or_else(|| Error::invalid("sequence", format!("below {}", lengths.len()), self.0))
    }

    /// The place of its length, if it can be cut to `length` tokens.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is no such sequence, or if it is shorter.
    pub fn cut_in(self, lengths: &mut [u32], length: u32) -> Result<&mut u32> {
        let held = self.length_in(lengths)?;
        if length > held {
            return Err(Error::invalid(
                format!("length to cut sequence {} to", self.0),
                format!("at most {held}"),
                length,
            ));
        }
        Ok(&mut lengths[self.0 as usize])
    }
}

/// What a token's position should yield.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Want {
    /// Nothing: it only enters the cache.
    Nothing,
    /// The id of the largest logit; the lowest one if several are equal.
    ArgMax,
    /// All logits.
    Logits,
}

/// Tokens to append to one sequence, in order. The first stands at the sequence's length.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// The sequence.
    pub sequence: SequenceId,
    /// Tokens; at least one.
    pub tokens: &'a [u32],
    /// What each token wants; as long as `tokens`.
    pub want: &'a [Want],
}

/// Runs of different sequences, each sequence at most once.
#[derive(Clone, Copy, Debug)]
pub struct TokenBatch<'a> {
    /// The runs; at least one.
    pub runs: &'a [Run<'a>],
}

impl TokenBatch<'_> {
    /// Tokens of all runs.
    pub fn tokens(&self) -> usize {
        self.runs.iter().map(|r| r.tokens.len()).sum()
    }

    /// How many tokens want that.
    pub fn wanting(&self, want: Want) -> usize {
        self.runs
            .iter()
            .flat_map(|r| r.want)
            .filter(|w| **w == want)
            .count()
    }
}

/// Where results go, in the order of runs and of tokens within them.
#[derive(Debug)]
pub struct Outputs<'a> {
    /// One id for each token that wants [`Want::ArgMax`].
    pub argmax: &'a mut [u32],
    /// `vocab` logits for each token that wants [`Want::Logits`].
    pub logits: &'a mut [f32],
}

/// A token of a batch whose arguments have been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenRow {
    /// The token, below the vocabulary.
    pub token: u32,
    /// Its sequence, below the capacity's.
    pub sequence: u32,
    /// Its position in the sequence, below the context.
    pub position: u32,
    /// What it yields.
    pub want: Want,
}

/// Checks a batch against the contract and lists its tokens, in order.
///
/// `lengths` are the tokens that each sequence holds; `rows` is cleared first and grows to at most the capacity's
/// `max_batch_tokens`. Nothing else is changed.
///
/// # Errors
/// [`Error::InvalidArgument`] for no run, an unknown or repeated sequence, an empty run, too many tokens, or outputs of the
/// wrong size; [`Error::TokenOutOfRange`]; [`Error::ContextExceeded`].
pub fn admit(
    batch: &TokenBatch<'_>,
    out: &Outputs<'_>,
    vocab: u32,
    capacity: &Capacity,
    lengths: &[u32],
    rows: &mut Vec<TokenRow>,
) -> Result<()> {
    rows.clear();
    if batch.runs.is_empty() {
        return Err(Error::invalid("runs of a batch", "at least 1", 0));
    }
    // Counted in u64 before anything is listed: runs may share their tokens' memory.
    let tokens = batch
        .runs
        .iter()
        .map(|r| r.tokens.len() as u64)
        .fold(0, u64::saturating_add);
    if tokens > u64::from(capacity.max_batch_tokens) {
        return Err(Error::invalid(
            "tokens of a batch",
            format!("at most {}", capacity.max_batch_tokens),
            tokens,
        ));
    }
    for run in batch.runs {
        let sequence = run.sequence.0;
        let length = run.sequence.length_in(lengths)?;
        // A run has at least one token, so that every earlier run of this sequence has left a row.
        if rows.iter().any(|row| row.sequence == sequence) {
            return Err(Error::invalid(
                format!("runs of sequence {sequence}"),
                "one",
                "two",
            ));
        }
        if run.tokens.is_empty() {
            return Err(Error::invalid(
                format!("tokens for sequence {sequence}"),
                "at least 1",
                0,
            ));
        }
        if run.want.len() != run.tokens.len() {
            return Err(Error::invalid(
                format!("wants of sequence {sequence}"),
                format!("one for each of {} tokens", run.tokens.len()),
                run.want.len(),
            ));
        }
        let adding = run.tokens.len() as u32;
        if adding > capacity.max_context.saturating_sub(length) {
            return Err(Error::ContextExceeded {
                sequence,
                length,
                adding,
                capacity: capacity.max_context,
            });
        }
        for ((token, want), position) in run.tokens.iter().zip(run.want).zip(length..) {
            if *token >= vocab {
                return Err(Error::TokenOutOfRange { token: *token, vocab });
            }
            rows.push(TokenRow {
                token: *token,
                sequence,
                position,
                want: *want,
            });
        }
    }
    let argmax = batch.wanting(Want::ArgMax);
    if out.argmax.len() != argmax {
        return Err(Error::invalid("places for arg-max ids", argmax, out.argmax.len()));
    }
    let logits = batch.wanting(Want::Logits).checked_mul(vocab as usize);
    if logits != Some(out.logits.len()) {
        return Err(Error::invalid(
            "places for logits",
            format!("{logits:?}"),
            out.logits.len(),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KvDtype;

    fn capacity() -> Capacity {
        Capacity {
            max_context: 4,
            max_sequences: 2,
            max_batch_tokens: 3,
            kv: KvDtype::F16,
        }
    }

    fn run<'a>(sequence: u32, tokens: &'a [u32], want: &'a [Want]) -> Run<'a> {
        Run {
            sequence: SequenceId(sequence),
            tokens,
            want,
        }
    }

    fn admitted(runs: &[Run<'_>], argmax: usize, logits: usize) -> Result<Vec<TokenRow>> {
        let mut rows = Vec::new();
        let out = Outputs {
            argmax: &mut vec![0; argmax],
            logits: &mut vec![0.0; logits],
        };
        admit(&TokenBatch { runs }, &out, 5, &capacity(), &[0, 3], &mut rows)?;
        Ok(rows)
    }

    #[test]
    fn a_sequence_is_cut_to_no_more_than_it_holds() {
        let mut lengths = [0, 3];
        *SequenceId(1).cut_in(&mut lengths, 3).unwrap() = 3;
        *SequenceId(1).cut_in(&mut lengths, 2).unwrap() = 2;
        assert_eq!(SequenceId(1).length_in(&lengths).unwrap(), 2);
        assert!(SequenceId(1).cut_in(&mut lengths, 3).is_err());
        assert!(SequenceId(2).cut_in(&mut lengths, 0).is_err());
        assert!(SequenceId(0).length_in(&[]).is_err());
        assert_eq!(lengths, [0, 2]);
    }

    #[test]
    fn tokens_are_listed_with_their_positions() {
        let wants = [Want::Nothing, Want::ArgMax];
        let rows = admitted(&[run(1, &[4], &[Want::Logits]), run(0, &[2, 3], &wants)], 1, 5).unwrap();
        let listed: Vec<_> = rows
            .iter()
            .map(|r| (r.token, r.sequence, r.position, r.want))
            .collect();
        assert_eq!(
            listed,
            [
                (4, 1, 3, Want::Logits),
                (2, 0, 0, Want::Nothing),
                (3, 0, 1, Want::ArgMax)
            ]
        );
    }

    #[test]
    fn what_the_contract_refuses_is_refused() {
        let none = [Want::Nothing; 4];
        let refused: [(&[Run<'_>], usize, usize); 9] = [
            (&[], 0, 0),
            (&[run(2, &[0], &none[..1])], 0, 0),
            (&[run(0, &[0], &none[..1]), run(0, &[0], &none[..1])], 0, 0),
            (&[run(0, &[], &[])], 0, 0),
            (&[run(0, &[0], &none[..2])], 0, 0),
            (&[run(0, &[0, 1, 2, 3], &none)], 0, 0),
            (&[run(1, &[0, 1], &none[..2])], 0, 0),
            (&[run(0, &[5], &none[..1])], 0, 0),
            (&[run(0, &[0], &[Want::Logits])], 0, 4),
        ];
        for (runs, argmax, logits) in refused {
            assert!(admitted(runs, argmax, logits).is_err(), "{runs:?}");
        }
        assert!(matches!(
            admitted(&[run(1, &[0, 1], &none[..2])], 0, 0),
            Err(Error::ContextExceeded {
                length: 3,
                adding: 2,
                ..
            })
        ));
        assert!(matches!(
            admitted(&[run(0, &[5], &none[..1])], 0, 0),
            Err(Error::TokenOutOfRange { token: 5, vocab: 5 })
        ));
    }
}
