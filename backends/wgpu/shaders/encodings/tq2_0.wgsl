// TQ2_0: 64 bytes of 2-bit codes; f16 d. The one sub-scale is 2^8, under 2^-8.

fn codes_at(b: u32, n: u32) -> u32 {
    return less(pairs(word_at(b + 0u + 32u * (n >> 5u) + 4u * (n & 7u)), (n >> 3u) & 3u), 0x01010101u);
}

fn sub_scale(b: u32, half: u32) -> i32 {
    return 256;
}

fn d_bits(b: u32) -> u32 {
    return half_at(b + 64u);
}
