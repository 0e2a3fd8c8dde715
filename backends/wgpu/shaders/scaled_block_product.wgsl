// Scales of slices, or their scales and mins, packed.
var<workgroup> factors: array<vec2<i32>, PLACES>;

fn packed(scale: Scale) -> i32 {
    return (scale.m << 8u) | (scale.e + 128);
}

fn unpacked(word: i32) -> Scale {
    return Scale(word >> 8u, (word & 255) - 128);
}

// The products of a slice and its sum for mins. Its scales are aligned to those of the others later.
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
        var sum = vec2<i32>(u * (low + high), 0);
        if HALVES {
            sum = vec2<i32>(u * low, u * high);
        } else if MINS {
            let at = record + AT_SUMS + 2u * k;
            sum.y = bitcast<i32>(work_word(at)) + bitcast<i32>(work_word(at + 1u));
        }
        partials[PLACES * t + place] = sum;
    }
}

// An integer below 2^23 in magnitude in three parts of 8 bits, the highest signed. Times factors below 2^19, those of
// eight blocks add up within 32 bits; so do sixteen half blocks', whose factors are below 2^12.
fn parts_of(x: i32) -> vec3<i32> {
    return vec3<i32>(x & 255, (x >> 8u) & 255, x >> 16u);
}

fn wide(x: i32) -> vec2<u32> {
    return vec2<u32>(bitcast<u32>(x), bitcast<u32>(x >> 31u));
}

fn whole_of(parts: vec3<i32>) -> vec2<u32> {
    let low = add64(wide(parts.x), mul_wide(parts.y, 256));
    return add64(low, mul_wide(parts.z, 65536));
}

// The largest exponents of a segment's scales and mins.
struct Head {
    scale: i32,
    lowest: i32,
}

fn head_at(b: u32) -> Head {
    return Head(-1000, -1000);
}

// Aligns the scales and mins of a segment's slices to its largest ones, in place.
fn align(empty: Head, place: u32, blocks: u32) -> Head {
    var head = empty;
    for (var k = 0u; k < blocks; k++) {
        let factor = factors[place + k];
        head.scale = max(head.scale, unpacked(factor.x).e);
        if HALVES {
            head.scale = max(head.scale, unpacked(factor.y).e);
        } else if MINS {
            head.lowest = max(head.lowest, unpacked(factor.y).e);
        }
    }
    let second_e = select(head.scale, head.lowest, MINS);
    for (var k = 0u; k < blocks; k++) {
        let first = unpacked(factors[place + k].x);
        let next = unpacked(factors[place + k].y);
        factors[place + k] = vec2<i32>(aligned(first.m, head.scale - first.e), aligned(next.m, second_e - next.e));
    }
    return head;
}

// What a segment whose slices' sums start at `place` adds to the sum of vector `t`. `up`: E_w + E_a - e_a.
fn segment_sum(head: Head, t: u32, place: u32, blocks: u32, record: u32, m_a: u32, up: i32) -> vec2<u32> {
    var scaled = vec3<i32>(0);
    var mins = vec3<i32>(0);
    for (var k = 0u; k < blocks; k++) {
        let sum = partials[PLACES * t + place + k];
        let factor = factors[place + k];
        scaled += factor.x * parts_of(sum.x);
        if HALVES {
            scaled += factor.y * parts_of(sum.y);
        } else if MINS {
            mins += factor.y * parts_of(sum.y);
        }
    }
    let term = sar64(mul_small(whole_of(scaled), m_a), u32(min(up + 8 - head.scale, 63)));
    if MINS {
        return sub64(term, sar64(mul_small(whole_of(mins), m_a), u32(min(up + 8 - head.lowest, 63))));
    }
    return term;
}
