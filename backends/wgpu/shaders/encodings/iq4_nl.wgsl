// IQ4_NL: f16 scale; nibbles as in Q4_0, each an index into a code book.

fn block_codes(b: u32, n: u32) -> u32 {
    return iq4_levels(nibbles(word_at(b + 2u + 4u * (n & 3u)), n >> 2u));
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
