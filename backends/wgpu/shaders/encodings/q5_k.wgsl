// Q5_K: f16 d; f16 dmin; 12 bytes as in Q4_K; 32 of fifth bits; 128 of nibbles.

fn codes_at(b: u32, n: u32) -> u32 {
    let fifth = bits(word_at(b + 16u + 4u * (n & 7u)), n >> 3u);
    return nibbles(word_at(b + 48u + 32u * (n >> 4u) + 4u * (n & 7u)), (n >> 3u) & 1u) | (fifth << 4u);
}

fn slice_codes(b: u32, k: u32) -> Codes {
    let words = weight_vector((b >> 4u) + 3u + k);
    let fifths = weight_vector((b >> 4u) + 1u + (k & 1u)) >> vec4<u32>(k & 6u);
    let one = vec4<u32>(0x01010101u);
    let four = vec4<u32>(4u);
    return Codes(
        nibbles_of(words, 0u) | ((fifths & one) << four),
        nibbles_of(words, 1u) | (((fifths >> vec4<u32>(1u)) & one) << four),
    );
}
