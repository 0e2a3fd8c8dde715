// IQ4_XS: f16 d; u16 of high bit pairs and 4 bytes of low nibbles of sub-scales; nibbles into a code book.

fn codes_at(b: u32, n: u32) -> u32 {
    let q = n & 7u;
    return iq4_levels(nibbles(word_at(b + 8u + 16u * (n >> 3u) + 4u * (q & 3u)), q >> 2u));
}

fn sub_scale(b: u32, half: u32) -> i32 {
    let j = half >> 1u;
    let low = (byte_at(b + 4u + (j >> 1u)) >> (4u * (j & 1u))) & 15u;
    let high = (half_at(b + 2u) >> (2u * j)) & 3u;
    return i32(low | (high << 4u)) - 32;
}
