// IQ2_S: f16 d; low bits of grid indices; sign bits; high bits of indices; 4-bit scales.

fn codes_at(b: u32, n: u32) -> u32 {
    let l = n >> 1u;
    let high = (byte_at(b + 66u + (l >> 2u)) >> (2u * (l & 3u))) & 3u;
    let index = byte_at(b + 2u + l) | (high << 8u);
    return negate(tables[GRID + 2u * index + (n & 1u)], four_signs(byte_at(b + 34u + l), n));
}

fn sub_scale(b: u32, half: u32) -> i32 {
    return odd_nibble(b + 74u, half);
}
