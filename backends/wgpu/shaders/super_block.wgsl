// Super-blocks: value = 2^e * m * sub * code - 2^e' * m' * min. One block is one segment.

// What a segment adds to each of TOKENS sums.
fn accumulate(
    b: u32,
    segment: u32,
    blocks: u32,
    e_w: i32,
    x: ptr<function, array<u32, TOKENS>>,
    acc: ptr<function, array<vec2<u32>, TOKENS>>,
) {
    var scaled: array<i32, TOKENS>;
    var mins: array<i32, TOKENS>;
    for (var j = 0u; j < blocks; j++) {
        var codes: array<u32, 8>;
        for (var k = 0u; k < 8u; k++) {
            codes[k] = codes_at(b, 8u * j + k);
        }
        let c0 = sub_scale(b, 2u * j);
        var c1 = c0;
        if HALVES {
            c1 = sub_scale(b, 2u * j + 1u);
        }
        var k0 = 0;
        var k1 = 0;
        if MINS {
            k0 = sub_min(b, 2u * j);
            k1 = k0;
            if HALVES {
                k1 = sub_min(b, 2u * j + 1u);
            }
        }
        for (var t = 0u; t < TOKENS; t++) {
            let at = (*x)[t] + segment * RECORD;
            let q = at + 8u * j;
            var low = 0;
            var high = 0;
            for (var k = 0u; k < 4u; k++) {
                low += dot4I8Packed(codes[k], work[q + k]);
                high += dot4I8Packed(codes[k + 4u], work[q + 4u + k]);
            }
            scaled[t] += bitcast<i32>(work[at + AT_U + j]) * (c0 * low + c1 * high);
            if MINS {
                let sums = at + AT_SUMS + 2u * j;
                mins[t] += k0 * bitcast<i32>(work[sums]) + k1 * bitcast<i32>(work[sums + 1u]);
            }
        }
    }
    let scale = super_scale(b);
    let down = e_w - scale.e;
    var min_scale = Scale(0, 0);
    if MINS {
        min_scale = f16_scale(dmin_bits(b));
    }
    for (var t = 0u; t < TOKENS; t++) {
        let at = (*x)[t] + segment * RECORD;
        let m_a = bitcast<i32>(work[at + AT_M]);
        let below = bitcast<i32>(work[at + AT_SHIFT]);
        let term = sar64(mul_wide(scaled[t], scale.m * m_a), u32(min(down + below, 63)));
        (*acc)[t] = add64((*acc)[t], term);
        if MINS {
            let shift = u32(min(e_w - min_scale.e + below, 63));
            (*acc)[t] = sub64((*acc)[t], sar64(mul_wide(mins[t], min_scale.m * m_a), shift));
        }
    }
}

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
