// What Q4_K and Q5_K start with: f16 d; f16 dmin; 12 bytes of 6-bit sub-scales and mins. Their slices are alike too.

fn packed_at(b: u32, i: u32) -> u32 {
    return byte_at(b + 4u + i);
}

fn sub_scale(b: u32, half: u32) -> i32 {
    let j = half >> 1u;
    if j < 4u {
        return i32(packed_at(b, j) & 63u);
    }
    return i32((packed_at(b, j + 4u) & 15u) | ((packed_at(b, j - 4u) >> 6u) << 4u));
}

fn sub_min(b: u32, half: u32) -> i32 {
    let j = half >> 1u;
    if j < 4u {
        return i32(packed_at(b, j + 4u) & 63u);
    }
    return i32((packed_at(b, j + 4u) >> 4u) | ((packed_at(b, j) >> 6u) << 4u));
}

fn dmin_bits(b: u32) -> u32 {
    return half_at(b + 2u);
}

// Slice k: sixteen bytes of nibbles, those of a half block and of the one 32 weights on.
fn slice_halves(k: u32) -> vec2<u32> {
    let half = 4u * (k >> 1u) + (k & 1u);
    return vec2<u32>(half, half + 2u);
}

// Of sub-scales and mins, those of block j: bytes of three words that hold twelve of six bits.
fn six_bits(head: vec4<u32>, j: u32) -> vec2<u32> {
    let at = 8u * (j & 3u);
    let low = vec2<u32>(head.y >> at, head.z >> at);
    if j < 4u {
        return low & vec2<u32>(63u);
    }
    let both = head.w >> at;
    return vec2<u32>(both & 15u, (both >> 4u) & 15u) | (((low >> vec2<u32>(6u)) & vec2<u32>(3u)) << vec2<u32>(4u));
}

fn slice_scales(b: u32, k: u32) -> vec4<i32> {
    let head = weight_vector(b >> 4u);
    let first = six_bits(head, k & 6u);
    let next = six_bits(head, k | 1u);
    return vec4<i32>(vec4<u32>(first.x, next.x, first.y, next.y));
}
