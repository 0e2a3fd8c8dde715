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
