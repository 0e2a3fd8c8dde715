// IQ3_XXS: f16 d; grid indices for 4 weights each; for each 32 weights a u32 as in IQ2_XXS.

fn codes_at(b: u32, n: u32) -> u32 {
    let signs = even_signs(word_at(b + 66u + 4u * (n >> 3u)) >> (7u * ((n >> 1u) & 3u)));
    return negate(tables[GRID + byte_at(b + 2u + n)], four_signs(signs, n));
}

fn sub_scale(b: u32, half: u32) -> i32 {
    return i32(word_at(b + 66u + 4u * (half >> 1u)) >> 28u) * 2 + 1;
}
