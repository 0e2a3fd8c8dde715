// Q2_0: f16 scale; 64 2-bit codes, lowest first.

fn block_codes(b: u32, n: u32) -> u32 {
    let four = byte_at(b + 2u + n);
    let codes = (four & 3u) | ((four & 12u) << 6u) | ((four & 48u) << 12u) | ((four & 192u) << 18u);
    return less(codes, 0x01010101u);
}
