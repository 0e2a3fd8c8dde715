// Q5_0: f16 scale; u32 of fifth bits; nibbles as in Q4_0.

fn block_codes(b: u32, n: u32) -> u32 {
    let fifth = spread((word_at(b + 2u) >> (4u * n)) & 15u);
    return less(nibbles(word_at(b + 6u + 4u * (n & 3u)), n >> 2u) | (fifth << 4u), 0x10101010u);
}

fn scale_at(b: u32, s: u32) -> Scale {
    return f16_scale(half_at(b));
}

fn scale_value(b: u32, s: u32) -> u32 {
    return f16_to_f32(half_at(b));
}

fn min_bits(b: u32) -> u32 {
    return 0u;
}
