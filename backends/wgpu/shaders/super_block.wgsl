// Super-blocks: value = 2^e * m * sub * code - 2^e' * m' * min. One block is one segment.

// The largest exponent of a segment.
fn segment_exponent(b: u32, blocks: u32) -> i32 {
    let e = super_scale(b).e;
    if MINS {
        return max(e, f16_scale(dmin_bits(b)).e);
    }
    return e;
}

// The value of weight 4n + i of a segment, as GGML computes it.
fn segment_values(b: u32, n: u32) -> vec4<u32> {
    let half = n >> 2u;
    let d = f_mul(f16_to_f32(d_bits(b)), f_exp2(EXPONENT_SHIFT));
    let scale = f_mul(d, f_from_int(sub_scale(b, half)));
    let codes = codes_at(b, n);
    var y: vec4<u32>;
    for (var i = 0u; i < 4u; i++) {
        y[i] = f_mul(scale, f_from_int(bitcast<i32>(codes << (24u - 8u * i)) >> 24u));
        if MINS {
            let lowest = f_mul(f16_to_f32(dmin_bits(b)), f_from_int(sub_min(b, half)));
            y[i] = f_sub(y[i], lowest);
        }
    }
    return y;
}
