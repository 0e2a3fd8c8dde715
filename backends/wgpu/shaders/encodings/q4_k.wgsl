// Q4_K: f16 d; f16 dmin; 12 bytes of 6-bit sub-scales and mins; 128 of nibbles.

fn codes_at(b: u32, n: u32) -> u32 {
    return nibbles(word_at(b + 16u + 32u * (n >> 4u) + 4u * (n & 7u)), (n >> 3u) & 1u);
}

fn slice_codes(b: u32, k: u32) -> Codes {
    let words = weight_vector((b >> 4u) + 1u + k);
    return Codes(nibbles_of(words, 0u), nibbles_of(words, 1u));
}
