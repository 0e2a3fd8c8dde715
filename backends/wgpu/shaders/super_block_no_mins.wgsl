// Super-blocks without mins.

fn sub_min(b: u32, half: u32) -> i32 {
    return 0;
}

fn dmin_bits(b: u32) -> u32 {
    return 0u;
}
