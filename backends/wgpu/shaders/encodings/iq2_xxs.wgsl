// IQ2_XXS: f16 d; for each 32 weights four grid indices and a u32 of four sign patterns and a 4-bit scale.

fn codes_at(b: u32, n: u32) -> u32 {
    let at = b + 2u + 8u * (n >> 3u);
    let l = (n >> 1u) & 3u;
    let signs = even_signs(word_at(at + 4u) >> (7u * l));
    return negate(tables[GRID + 2u * byte_at(at + l) + (n & 1u)], four_signs(signs, n));
}

fn sub_scale(b: u32, half: u32) -> i32 {
    return i32(word_at(b + 6u + 8u * (half >> 1u)) >> 28u) * 2 + 1;
}
