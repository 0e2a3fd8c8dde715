// AprQ8: one i8 for each weight; the scale of the whole matrix comes last.

fn codes_at(b: u32, n: u32) -> u32 {
    return (word_at(b + 4u * n));
}

fn sub_scale(b: u32, half: u32) -> i32 {
    return 1;
}

fn d_bits(b: u32) -> u32 {
    return 0u;
}
