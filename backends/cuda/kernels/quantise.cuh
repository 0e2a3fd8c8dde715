// Vectors of activations as integers (docs/numerics.md §1.1).
#pragma once

#include "decode.cuh"

namespace hoist {

/// What a lane of a warp has of a quantised segment: eight codes, the sum of sixteen with its neighbour's, its block's u; and the
/// segment's m and e.
struct Integers {
    u32 words[2];
    int sum, u, m, e;
};

/// Quantises a segment by a warp: each lane has eight elements, in order; past the vector's end they are zeros.
DEVICE Integers integers_of(const float v[8], u32 *fault, u32 step) {
    u32 lane = threadIdx.x & 31, a = 0;
    for (int i = 0; i < 8; i++) a = max(a, bits_of(v[i]) & 0x7fffffffu);
    // Bits of magnitudes are in the order of values; NaN and infinity come last.
    a = max(a, shuffle_xor(a, 1));
    a = max(a, shuffle_xor(a, 2));
    u32 all = a;
    for (int h = 4; h < 32; h <<= 1) all = max(all, shuffle_xor(all, h));
    if (all >= 0x7f800000u) {
        if (lane == 0) report(fault, step);
        all = a = 0;
    }
    float d0 = quotient(f32_of_bits(all), 2032.0f);
    Integers x = {{0, 0}, 0, 1, 0, -133};
    if (bits_of(d0) >= 0x00800000u) {
        u32 bits = (bits_of(d0) + 0xffffu) & 0xffff0000u;
        float d = f32_of_bits(bits);
        x.m = bits >> 16 & 0x7f | 0x80;
        x.e = (int)(bits >> 23) - 134;
        // The smallest u with a <= (u · 127) · d, by bisection.
        int below = 0;
        for (int half = 8; half > 0; half >>= 1)
            if (f32_of_bits(a) > mul((float)((below + half) * 127), d)) below += half;
        x.u = below + 1;
        float r = quotient(1.0f, mul((float)x.u, d));
        for (int i = 0; i < 8; i++) {
            int q = i32_of_f32(mul(v[i], r));
            x.sum += q;
            x.words[i >> 2] |= (u32)(u8)q << 8 * (i & 3);
        }
    }
    x.sum += shuffle_xor(x.sum, 1);
    return x;
}

DEVICE void write_segment(Segment &out, const Integers &x) {
    u32 lane = threadIdx.x & 31;
    *(uint2 *)(out.q + lane * 8) = make_uint2(x.words[0], x.words[1]);
    if ((lane & 1) == 0) out.s[lane >> 1] = x.sum;
    if ((lane & 3) == 0) out.u[lane >> 2] = x.u;
    if (lane == 0) out.m = x.m, out.e = x.e;
}

DEVICE void quantise_segment(const float v[8], Segment &out, u32 *fault, u32 step) {
    write_segment(out, integers_of(v, fault, step));
}

} // namespace hoist
