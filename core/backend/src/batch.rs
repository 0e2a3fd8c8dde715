/// A sequence: an independent KV cache, numbered below [`crate::Capacity::max_sequences`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u32);

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
