// What a slice of a segment adds to the sums of products and of mins: both stay below 2^31 over a whole segment.
fn slice_sums(b: u32, k: u32, segment: u32, z: u32, place: u32) {
    let codes = slice_codes(b, k);
    let halves = slice_halves(k);
    let scales = slice_scales(b, k);
    for (var t = 0u; t < TOKENS; t++) {
        let record = vector_at(t, z) + segment * RECORD;
        let q = record >> 2u;
        let low = dot16(codes.low, work_vector(q + halves.x));
        let high = dot16(codes.high, work_vector(q + halves.y));
        let u_low = bitcast<i32>(work_word(record + AT_U + (halves.x >> 1u)));
        let u_high = bitcast<i32>(work_word(record + AT_U + (halves.y >> 1u)));
        var sum = vec2<i32>(u_low * (scales.x * low) + u_high * (scales.y * high), 0);
        if MINS {
            let s_low = bitcast<i32>(work_word(record + AT_SUMS + halves.x));
            let s_high = bitcast<i32>(work_word(record + AT_SUMS + halves.y));
            sum.y = scales.z * s_low + scales.w * s_high;
        }
        partials[PLACES * t + place] = sum;
    }
}

// What is read of a segment besides its slices.
struct Head {
    scale: Scale,
    lowest: Scale,
}

fn head_at(b: u32) -> Head {
    var head = Head(super_scale(b), Scale(0, 0));
    if MINS {
        head.lowest = f16_scale(dmin_bits(b));
    }
    return head;
}

fn align(head: Head, place: u32, blocks: u32) -> Head {
    return head;
}

// What a segment whose slices' sums start at `place` adds to the sum of vector `t`. `up`: E_w + E_a - e_a.
fn segment_sum(head: Head, t: u32, place: u32, blocks: u32, record: u32, m_a: u32, up: i32) -> vec2<u32> {
    var sum = vec2<i32>(0, 0);
    for (var k = 0u; k < 8u; k++) {
        sum += partials[PLACES * t + place + k];
    }
    let m = bitcast<i32>(m_a);
    let term = sar64(mul_wide(sum.x, head.scale.m * m), u32(min(up - head.scale.e, 63)));
    if MINS {
        let less_term = sar64(mul_wide(sum.y, head.lowest.m * m), u32(min(up - head.lowest.e, 63)));
        return sub64(term, less_term);
    }
    return term;
}
