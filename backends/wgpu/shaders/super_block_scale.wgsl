// Super-blocks that start with their scale.

fn d_bits(b: u32) -> u32 {
    return half_at(b);
}
