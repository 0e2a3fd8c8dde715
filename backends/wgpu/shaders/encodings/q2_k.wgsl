// Q2_K: 16 bytes of sub-scale and min; 64 of 2-bit codes; f16 d; f16 dmin.

fn codes_at(b: u32, n: u32) -> u32 {
    return pairs(word_at(b + 16u + 32u * (n >> 5u) + 4u * (n & 7u)), (n >> 3u) & 3u);
}

fn sub_scale(b: u32, half: u32) -> i32 {
    return i32(byte_at(b + half) & 15u);
}

fn sub_min(b: u32, half: u32) -> i32 {
    return i32(byte_at(b + half) >> 4u);
}

fn d_bits(b: u32) -> u32 {
    return half_at(b + 80u);
}

fn dmin_bits(b: u32) -> u32 {
    return half_at(b + 82u);
}
