// TQ1_0: 48 bytes of five and 4 bytes of four base-3 digits; f16 d. The one sub-scale is 2^8, under 2^-8.

fn codes_at(b: u32, n: u32) -> u32 {
    var i = 4u * n;
    var at = b + (i & 31u);
    var digit = i >> 5u;
    if i >= 240u {
        at = b + 48u;
        digit = (i - 240u) >> 2u;
    } else if i >= 160u {
        at = b + 32u + (i & 15u);
        digit = (i - 160u) >> 4u;
    }
    var power = 1u;
    for (var k = 0u; k < digit; k++) {
        power *= 3u;
    }
    let word = word_at(at);
    var out = 0u;
    for (var k = 0u; k < 4u; k++) {
        let fraction = (((word >> (8u * k)) & 255u) * power) & 255u;
        out |= ((fraction * 3u) >> 8u) << (8u * k);
    }
    return less(out, 0x01010101u);
}

fn sub_scale(b: u32, half: u32) -> i32 {
    return 256;
}

fn d_bits(b: u32) -> u32 {
    return half_at(b + 52u);
}
