// Q5_1: f16 scale; f16 min; fifth bits and nibbles as in Q5_0.

fn block_codes(b: u32, n: u32) -> u32 {
    let fifth = spread((word_at(b + 4u) >> (4u * n)) & 15u);
    return nibbles(word_at(b + 8u + 4u * (n & 3u)), n >> 2u) | (fifth << 4u);
}

fn min_bits(b: u32) -> u32 {
    return half_at(b + 2u);
}
