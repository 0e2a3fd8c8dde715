// Blocks of BLOCK_WEIGHTS with SCALES scales of their own: value = scale * code + the file's min. Those of a segment are
// aligned to the largest exponent among them.

fn aligned(m: i32, down: i32) -> i32 {
    return (m << 8u) >> u32(min(down, 31));
}

fn block_of(b: u32, weight: u32) -> u32 {
    return b + weight / BLOCK_WEIGHTS * BLOCK_BYTES;
}

// The scale of the 16 weights from `weight` on.
fn scale_of(b: u32, weight: u32) -> Scale {
    return scale_at(block_of(b, weight), weight % BLOCK_WEIGHTS / (BLOCK_WEIGHTS / SCALES));
}

fn min_of(b: u32, weight: u32) -> Scale {
    let added = f16_scale(min_bits(block_of(b, weight)));
    return Scale(-added.m, added.e);
}

fn codes_at(b: u32, n: u32) -> u32 {
    return block_codes(block_of(b, 4u * n), n % (BLOCK_WEIGHTS / 4u));
}

fn largest_scale(b: u32, blocks: u32) -> i32 {
    var e = -1000;
    for (var w = 0u; w < 32u * blocks; w += BLOCK_WEIGHTS / SCALES) {
        e = max(e, scale_of(b, w).e);
    }
    return e;
}

fn largest_min(b: u32, blocks: u32) -> i32 {
    var e = -1000;
    for (var w = 0u; w < 32u * blocks; w += BLOCK_WEIGHTS) {
        e = max(e, min_of(b, w).e);
    }
    return e;
}

// What a segment adds to each of TOKENS sums.
fn accumulate(
    b: u32,
    segment: u32,
    blocks: u32,
    e_w: i32,
    x: ptr<function, array<u32, TOKENS>>,
    acc: ptr<function, array<vec2<u32>, TOKENS>>,
) {
    let e_scale = largest_scale(b, blocks);
    var e_min = 0;
    if MINS {
        e_min = largest_min(b, blocks);
    }
    var scaled: array<vec2<u32>, TOKENS>;
    var mins: array<vec2<u32>, TOKENS>;
    for (var j = 0u; j < blocks; j++) {
        var codes: array<u32, 8>;
        for (var k = 0u; k < 8u; k++) {
            codes[k] = codes_at(b, 8u * j + k);
        }
        let s0 = scale_of(b, 32u * j);
        let c0 = aligned(s0.m, e_scale - s0.e);
        var c1 = c0;
        if HALVES {
            let s1 = scale_of(b, 32u * j + 16u);
            c1 = aligned(s1.m, e_scale - s1.e);
        }
        var k0 = 0;
        if MINS {
            let lowest = min_of(b, 32u * j);
            k0 = aligned(lowest.m, e_min - lowest.e);
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
            let u = bitcast<i32>(work[at + AT_U + j]);
            if HALVES {
                scaled[t] = add64(scaled[t], mul_wide(c0 * u, low));
                scaled[t] = add64(scaled[t], mul_wide(c1 * u, high));
            } else {
                scaled[t] = add64(scaled[t], mul_wide(c0 * u, low + high));
            }
            if MINS {
                let sums = at + AT_SUMS + 2u * j;
                let sum = bitcast<i32>(work[sums]) + bitcast<i32>(work[sums + 1u]);
                mins[t] = add64(mins[t], mul_wide(k0, sum));
            }
        }
    }
    for (var t = 0u; t < TOKENS; t++) {
        let at = (*x)[t] + segment * RECORD;
        let m_a = work[at + AT_M];
        let below = bitcast<i32>(work[at + AT_SHIFT]) + e_w + 8;
        let term = sar64(mul_small(scaled[t], m_a), u32(min(below - e_scale, 63)));
        (*acc)[t] = add64((*acc)[t], term);
        if MINS {
            let less_term = sar64(mul_small(mins[t], m_a), u32(min(below - e_min, 63)));
            (*acc)[t] = sub64((*acc)[t], less_term);
        }
    }
}

// The largest exponent of a segment.
fn segment_exponent(b: u32, blocks: u32) -> i32 {
    let e = largest_scale(b, blocks);
    if MINS {
        return max(e, largest_min(b, blocks)) - 8;
    }
    return e - 8;
}

// The value of weight 4n + i of a segment, as GGML computes it.
fn segment_values(b: u32, n: u32) -> vec4<u32> {
    let block = block_of(b, 4u * n);
    let scale = scale_value(block, 4u * n % BLOCK_WEIGHTS / (BLOCK_WEIGHTS / SCALES));
    let codes = codes_at(b, n);
    var y: vec4<u32>;
    for (var i = 0u; i < 4u; i++) {
        y[i] = f_mul(scale, f_from_int(bitcast<i32>(codes << (24u - 8u * i)) >> 24u));
        if MINS {
            y[i] = f_add(y[i], f16_to_f32(min_bits(block)));
        }
    }
    return y;
}
