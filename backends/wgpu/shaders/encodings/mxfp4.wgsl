// MXFP4: E8M0 scale, halved because codes are doubled; nibbles as in Q4_0.

fn block_codes(b: u32, n: u32) -> u32 {
    return e2m1(nibbles(word_at(b + 1u + 4u * (n & 3u)), n >> 2u));
}

fn scale_at(b: u32, s: u32) -> Scale {
    return Scale(1, i32(byte_at(b)) - 128);
}

fn scale_value(b: u32, s: u32) -> u32 {
    let byte = byte_at(b);
    return select((byte - 1u) << 23u, 0x00200000u << byte, byte < 2u);
}
