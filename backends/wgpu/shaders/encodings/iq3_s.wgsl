// IQ3_S: f16 d; low bits of grid indices for 4 weights each; ninth bits; sign bits; 4-bit scales.

fn codes_at(b: u32, n: u32) -> u32 {
    let ninth = (byte_at(b + 66u + (n >> 3u)) >> (n & 7u)) & 1u;
    let index = byte_at(b + 2u + n) | (ninth << 8u);
    return negate(tables[GRID + index], four_signs(byte_at(b + 74u + (n >> 1u)), n));
}

fn sub_scale(b: u32, half: u32) -> i32 {
    return odd_nibble(b + 106u, half >> 1u);
}
