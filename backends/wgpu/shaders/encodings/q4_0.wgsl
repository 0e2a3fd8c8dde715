// Q4_0: f16 scale; 16 bytes of nibbles, the low ones first.

fn block_codes(b: u32, n: u32) -> u32 {
    return less(nibbles(word_at(b + 2u + 4u * (n & 3u)), n >> 2u), 0x08080808u);
}

fn slice_codes(b: u32, k: u32) -> Codes {
    let words = four_at(block_of(b, 32u * k) + 2u);
    return Codes(less_of(nibbles_of(words, 0u), 0x08080808u), less_of(nibbles_of(words, 1u), 0x08080808u));
}
