// Q5_0: f16 scale; u32 of fifth bits; nibbles as in Q4_0.

fn block_codes(b: u32, n: u32) -> u32 {
    let fifth = spread((word_at(b + 2u) >> (4u * n)) & 15u);
    return less(nibbles(word_at(b + 6u + 4u * (n & 3u)), n >> 2u) | (fifth << 4u), 0x10101010u);
}
