// Q6_K: 128 bytes of low nibbles; 64 of high bit pairs; 16 i8 sub-scales; f16 d.

fn codes_at(b: u32, n: u32) -> u32 {
    let g = n >> 5u;
    let s = (n >> 3u) & 3u;
    let j = 4u * (n & 7u);
    let low = nibbles(word_at(b + 64u * g + 32u * (s & 1u) + j), s >> 1u);
    let high = pairs(word_at(b + 128u + 32u * g + j), s);
    return less(low | (high << 4u), 0x20202020u);
}

fn sub_scale(b: u32, half: u32) -> i32 {
    return i32(byte_at(b + 192u + half) << 24u) >> 24u;
}

fn d_bits(b: u32) -> u32 {
    return half_at(b + 208u);
}

// Slice k: sixteen bytes of nibbles, those of a half block and of the one 64 weights on.
fn slice_halves(k: u32) -> vec2<u32> {
    let half = 8u * (k >> 2u) + (k & 3u);
    return vec2<u32>(half, half + 4u);
}

fn slice_scales(b: u32, k: u32) -> vec4<i32> {
    let halves = slice_halves(k);
    return vec4<i32>(sub_scale(b, halves.x), sub_scale(b, halves.y), 0, 0);
}

fn slice_codes(b: u32, k: u32) -> Codes {
    let words = four_at(b + 16u * k);
    // Bit pairs of block s of a group of four are pair s of its bytes.
    let upper = four_at(b + 128u + 32u * (k >> 2u) + 16u * (k & 1u)) >> vec4<u32>(k & 2u);
    let two = vec4<u32>(0x03030303u);
    let four = vec4<u32>(4u);
    return Codes(
        less_of(nibbles_of(words, 0u) | ((upper & two) << four), 0x20202020u),
        less_of(nibbles_of(words, 1u) | (((upper >> four) & two) << four), 0x20202020u),
    );
}
