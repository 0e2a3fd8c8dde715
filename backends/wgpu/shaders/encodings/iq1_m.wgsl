// IQ1_M: low bits of grid indices; nibbles of high bits and a sign; four u16 of 3-bit scales and nibbles of d.

fn codes_at(b: u32, n: u32) -> u32 {
    let l = n >> 1u;
    let qh = (byte_at(b + 32u + (l >> 1u)) >> (4u * (l & 1u))) & 15u;
    let index = byte_at(b + l) | ((qh & 7u) << 8u);
    return offset_eighth(tables[GRID + 2u * index + (n & 1u)], (qh & 8u) != 0u);
}

fn sub_scale(b: u32, half: u32) -> i32 {
    return i32((half_at(b + 48u + 2u * (half >> 2u)) >> (3u * (half & 3u))) & 7u) * 2 + 1;
}

fn d_bits(b: u32) -> u32 {
    return (half_at(b + 48u) >> 12u) | ((half_at(b + 50u) >> 12u) << 4u)
        | ((half_at(b + 52u) >> 12u) << 8u) | ((half_at(b + 54u) >> 12u) << 12u);
}
