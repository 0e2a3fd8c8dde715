// Q3_K: 32 bytes of inverted third bits; 64 of 2-bit codes; 12 of 6-bit sub-scales; f16 d.

fn codes_at(b: u32, n: u32) -> u32 {
    let low = pairs(word_at(b + 32u + 32u * (n >> 5u) + 4u * (n & 7u)), (n >> 3u) & 3u);
    let third = bits(word_at(b + 4u * (n & 7u)), n >> 3u);
    return less(low | (third << 2u), 0x04040404u);
}

fn sub_scale(b: u32, half: u32) -> i32 {
    let low = (byte_at(b + 96u + (half & 7u)) >> (4u * (half >> 3u))) & 15u;
    let high = (byte_at(b + 104u + (half & 3u)) >> (2u * (half >> 2u))) & 3u;
    return i32(low | (high << 4u)) - 32;
}

fn d_bits(b: u32) -> u32 {
    return half_at(b + 108u);
}
