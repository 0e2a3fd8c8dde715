// Vectors of activations as integers (docs/numerics.md §1.1).
#pragma once

#include "decode.cuh"

namespace hoist {

/// Quantises a segment by a warp: each lane has eight elements, in order; past the vector's end they are zeros.
DEVICE void quantise_segment(const float v[8], Segment &out, u32 *fault, u32 step) {
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
    int m = 0, e = -133, u = 1;
    u32 words[2] = {0, 0};
    int sum = 0;
    if (bits_of(d0) >= 0x00800000u) {
        u32 bits = (bits_of(d0) + 0xffffu) & 0xffff0000u;
        float d = f32_of_bits(bits);
        m = bits >> 16 & 0x7f | 0x80;
        e = (int)(bits >> 23) - 134;
        // The smallest u with a <= (u · 127) · d, by bisection.
        int below = 0;
        for (int half = 8; half > 0; half >>= 1)
            if (f32_of_bits(a) > mul((float)((below + half) * 127), d)) below += half;
        u = below + 1;
        float r = quotient(1.0f, mul((float)u, d));
        for (int i = 0; i < 8; i++) {
            int q = i32_of_f32(mul(v[i], r));
            sum += q;
            words[i >> 2] |= (u32)(u8)q << 8 * (i & 3);
        }
    }
    *(uint2 *)(out.q + lane * 8) = make_uint2(words[0], words[1]);
    sum += shuffle_xor(sum, 1);
    if ((lane & 1) == 0) out.s[lane >> 1] = sum;
    if ((lane & 3) == 0) out.u[lane >> 2] = u;
    if (lane == 0) out.m = m, out.e = e;
}

} // namespace hoist
