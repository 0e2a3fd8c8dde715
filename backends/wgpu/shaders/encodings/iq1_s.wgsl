// IQ1_S: f16 d; low bits of grid indices; for each 32 weights a u16 of high bits, a 3-bit scale, a sign.

fn codes_at(b: u32, n: u32) -> u32 {
    let l = n >> 1u;
    let qh = half_at(b + 34u + 2u * (l >> 2u));
    let index = byte_at(b + 2u + l) | (((qh >> (3u * (l & 3u))) & 7u) << 8u);
    return offset_eighth(tables[GRID + 2u * index + (n & 1u)], (qh & 0x8000u) != 0u);
}

fn sub_scale(b: u32, half: u32) -> i32 {
    return i32((half_at(b + 34u + 2u * (half >> 1u)) >> 12u) & 7u) * 2 + 1;
}
