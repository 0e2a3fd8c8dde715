// IQ2_XS: f16 d; for each 8 weights a u16 of a grid index and a sign pattern; 4-bit scales.

fn codes_at(b: u32, n: u32) -> u32 {
    let q = half_at(b + 2u + 2u * (n >> 1u));
    return negate(tables[GRID + 2u * (q & 511u) + (n & 1u)], four_signs(even_signs(q >> 9u), n));
}

fn sub_scale(b: u32, half: u32) -> i32 {
    return odd_nibble(b + 66u, half);
}
