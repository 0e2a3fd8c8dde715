// Q4_1: f16 scale; f16 min; nibbles as in Q4_0.

fn block_codes(b: u32, n: u32) -> u32 {
    return nibbles(word_at(b + 4u + 4u * (n & 3u)), n >> 2u);
}

fn min_bits(b: u32) -> u32 {
    return half_at(b + 2u);
}

fn slice_codes(b: u32, k: u32) -> Codes {
    let words = four_at(block_of(b, 32u * k) + 4u);
    return Codes(nibbles_of(words, 0u), nibbles_of(words, 1u));
}
