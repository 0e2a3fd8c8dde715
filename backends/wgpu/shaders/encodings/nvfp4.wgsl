// NVFP4: four UE4M3 scales for 16 weights each; 8 bytes of nibbles for each.

fn block_codes(b: u32, n: u32) -> u32 {
    let q = n & 3u;
    return e2m1(nibbles(word_at(b + 4u + 8u * (n >> 2u) + 4u * (q & 1u)), q >> 1u));
}

fn scale_at(b: u32, s: u32) -> Scale {
    let byte = byte_at(b + s);
    let exponent = (byte >> 3u) & 15u;
    let fraction = (byte & 7u) | select(8u, 0u, exponent == 0u);
    return Scale(select(i32(fraction), 0, byte == 0x7fu), i32(max(exponent, 1u)) - 11);
}

fn scale_value(b: u32, s: u32) -> u32 {
    let scale = scale_at(b, s);
    return f_from_int_exp(u32(scale.m), scale.e);
}
