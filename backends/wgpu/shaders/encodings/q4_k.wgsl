// Q4_K: f16 d; f16 dmin; 12 bytes of 6-bit sub-scales and mins; 128 of nibbles.

fn packed_at(b: u32, i: u32) -> u32 {
    return byte_at(b + 4u + i);
}

fn codes_at(b: u32, n: u32) -> u32 {
    return nibbles(word_at(b + 16u + 32u * (n >> 4u) + 4u * (n & 7u)), (n >> 3u) & 1u);
}

fn sub_scale(b: u32, half: u32) -> i32 {
    let j = half >> 1u;
    if j < 4u {
        return i32(packed_at(b, j) & 63u);
    }
    return i32((packed_at(b, j + 4u) & 15u) | ((packed_at(b, j - 4u) >> 6u) << 4u));
}

fn sub_min(b: u32, half: u32) -> i32 {
    let j = half >> 1u;
    if j < 4u {
        return i32(packed_at(b, j + 4u) & 63u);
    }
    return i32((packed_at(b, j + 4u) >> 4u) | ((packed_at(b, j) >> 6u) << 4u));
}

fn d_bits(b: u32) -> u32 {
    return half_at(b);
}

fn dmin_bits(b: u32) -> u32 {
    return half_at(b + 2u);
}
