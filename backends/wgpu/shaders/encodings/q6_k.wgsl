// Q6_K: 128 bytes of low nibbles; 64 of high bit pairs; 16 i8 sub-scales; f16 d.

fn codes_at(b: u32, n: u32) -> u32 {
    let g = n >> 5u;
    let s = (n >> 3u) & 3u;
    let j = 4u * (n & 7u);
    let low = nibbles(word_at(b + 64u * g + 32u * (s & 1u) + j), s >> 1u);
    let high = pairs(word_at(b + 128u + 32u * g + j), s);
    return less(low | (high << 4u), 0x20202020u);
}

fn sub_scale(b: u32, half: u32) -> i32 {
    return i32(byte_at(b + 192u + half) << 24u) >> 24u;
}

fn sub_min(b: u32, half: u32) -> i32 {
    return 0;
}

fn d_bits(b: u32) -> u32 {
    return half_at(b + 208u);
}

fn dmin_bits(b: u32) -> u32 {
    return 0u;
}
