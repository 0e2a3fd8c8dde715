// AprQ4: f16 scale; 16 bytes of nibbles: byte j holds weight 2j low and weight 2j + 1 high.

fn block_codes(b: u32, n: u32) -> u32 {
    let four = half_at(b + 2u + 2u * n);
    let codes = (four & 15u) | ((four & 0xf0u) << 4u) | ((four & 0xf00u) << 8u) | ((four & 0xf000u) << 12u);
    return less(codes, 0x08080808u);
}
