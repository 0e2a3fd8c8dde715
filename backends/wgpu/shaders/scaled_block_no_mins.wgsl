// Blocks without a min.

fn min_bits(b: u32) -> u32 {
    return 0u;
}
