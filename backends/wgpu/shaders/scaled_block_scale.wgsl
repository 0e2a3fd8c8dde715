// Blocks that start with their one scale, in f16.

fn scale_at(b: u32, s: u32) -> Scale {
    return f16_scale(half_at(b));
}

fn scale_value(b: u32, s: u32) -> u32 {
    return f16_to_f32(half_at(b));
}
