// IQ4_NL: f16 scale; nibbles as in Q4_0, each an index into a code book.

fn block_codes(b: u32, n: u32) -> u32 {
    return iq4_levels(nibbles(word_at(b + 2u + 4u * (n & 3u)), n >> 2u));
}
