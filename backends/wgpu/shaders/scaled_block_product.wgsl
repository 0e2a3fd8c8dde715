// Scales of slices, or their scales and mins, packed.
var<workgroup> factors: array<vec2<i32>, PLACES>;

fn packed(scale: Scale) -> i32 {
    return (scale.m << 8u) | (scale.e + 128);
}

fn unpacked(word: i32) -> Scale {
    return Scale(word >> 8u, (word & 255) - 128);
}

// The products of a slice, whose scales are aligned to those of the others later.
fn slice_sums(b: u32, k: u32, segment: u32, z: u32, place: u32) {
    let codes = slice_codes(b, k);
    var other = 0;
    if HALVES {
        other = packed(scale_of(b, 32u * k + 16u));
    } else if MINS {
        other = packed(min_of(b, 32u * k));
    }
    factors[place] = vec2<i32>(packed(scale_of(b, 32u * k)), other);
    for (var t = 0u; t < TOKENS; t++) {
        let record = vector_at(t, z) + segment * RECORD;
        let q = (record >> 2u) + 2u * k;
        let low = dot16(codes.low, work_vector(q));
        let high = dot16(codes.high, work_vector(q + 1u));
        let u = bitcast<i32>(work_word(record + AT_U + k));
        if HALVES {
            partials[PLACES * t + place] = vec2<i32>(u * low, u * high);
        } else {
            partials[PLACES * t + place] = vec2<i32>(u * (low + high), 0);
        }
    }
}

// What is read of a segment besides its slices: nothing.
struct Head {
    nothing: u32,
}

fn head_at(b: u32) -> Head {
    return Head(0u);
}

// What a segment whose slices' sums start at `place` adds to the sum of vector `t`. `up`: E_w + E_a - e_a.
fn segment_sum(head: Head, t: u32, place: u32, blocks: u32, record: u32, m_a: u32, up: i32) -> vec2<u32> {
    var e_scale = -1000;
    var e_min = -1000;
    for (var k = 0u; k < blocks; k++) {
        let factor = factors[place + k];
        e_scale = max(e_scale, unpacked(factor.x).e);
        if HALVES {
            e_scale = max(e_scale, unpacked(factor.y).e);
        } else if MINS {
            e_min = max(e_min, unpacked(factor.y).e);
        }
    }
    var scaled = vec2<u32>(0u, 0u);
    var mins = vec2<u32>(0u, 0u);
    for (var k = 0u; k < blocks; k++) {
        let sum = partials[PLACES * t + place + k];
        let factor = factors[place + k];
        let s0 = unpacked(factor.x);
        scaled = add64(scaled, mul_wide(aligned(s0.m, e_scale - s0.e), sum.x));
        if HALVES {
            let s1 = unpacked(factor.y);
            scaled = add64(scaled, mul_wide(aligned(s1.m, e_scale - s1.e), sum.y));
        } else if MINS {
            let lowest = unpacked(factor.y);
            let at = record + AT_SUMS + 2u * k;
            let s = bitcast<i32>(work_word(at)) + bitcast<i32>(work_word(at + 1u));
            mins = add64(mins, mul_wide(aligned(lowest.m, e_min - lowest.e), s));
        }
    }
    let term = sar64(mul_small(scaled, m_a), u32(min(up + 8 - e_scale, 63)));
    if MINS {
        return sub64(term, sar64(mul_small(mins, m_a), u32(min(up + 8 - e_min, 63))));
    }
    return term;
}
