// Functions of docs/numerics.md, in arithmetic that rounds to nearest even and is never contracted.
#pragma once

#include "primitives.cuh"

namespace hoist {

DEVICE bool is_finite(float x) { return (bits_of(x) & 0x7fffffffu) < 0x7f800000u; }

DEVICE float f32_of_bf16(u16 bits) { return f32_of_bits((u32)bits << 16); }

/// 2^n for -126 <= n <= 127.
DEVICE float power_of_two(int n) { return f32_of_bits((u32)(n + 127) << 23); }

/// e^x (§5); a NaN stays one.
DEVICE float exponential(float x) {
    const float low = -104.0f, high = f32_of_bits(0x42b17217u), round = 12582912.0f;
    x = low > x ? low : x;
    x = high < x ? high : x;
    float rounded = fma(x, f32_of_bits(0x3fb8aa3bu), round);
    float n = sub(rounded, round);
    float r = fma(n, f32_of_bits(0xbf317218u), x);
    r = fma(n, f32_of_bits(0x3102e308u), r);
    float p = f32_of_bits(0x3ab511a9u);
    p = fma(p, r, f32_of_bits(0x3c091d36u));
    p = fma(p, r, f32_of_bits(0x3d2aac7au));
    p = fma(p, r, f32_of_bits(0x3e2aaa48u));
    p = fma(p, r, f32_of_bits(0x3efffffeu));
    float y = add(fma(mul(r, r), p, r), 1.0f);
    int k = (int)(bits_of(rounded) - bits_of(round));
    int half = k >> 1;
    // A NaN has no meaningful k; its powers must only be numbers.
    half = max(-126, min(127, half));
    int rest = max(-126, min(127, k - half));
    return mul(mul(y, power_of_two(half)), power_of_two(rest));
}

/// tanh(x) (§5); a NaN stays one.
DEVICE float tangent(float x) {
    float a = fabsf(x);
    float z = mul(a, a);
    float q = f32_of_bits(0xbbb70d0cu);
    q = fma(q, z, f32_of_bits(0x3ca8380fu));
    q = fma(q, z, f32_of_bits(0xbd5bfd48u));
    q = fma(q, z, f32_of_bits(0x3e08829eu));
    q = fma(q, z, f32_of_bits(0xbeaaaa95u));
    float small = fma(mul(a, z), q, a);
    float large = sub(1.0f, quotient(2.0f, add(exponential(add(a, a)), 1.0f)));
    float t = a < 0.625f ? small : large;
    return copysignf(t, x);
}

/// cap · tanh(x / cap)
DEVICE float soft_capped(float x, float cap) { return mul(cap, tangent(quotient(x, cap))); }

/// x / (1 + e^-x)
DEVICE float silu(float x) { return quotient(x, add(1.0f, exponential(-x))); }

DEVICE float gelu_tanh(float x) {
    const float c0 = f32_of_bits(0x3fcc422au), c1 = f32_of_bits(0x3d922279u);
    float u = mul(x, fma(mul(x, x), c1, c0));
    return quotient(x, add(1.0f, exponential(-u)));
}

/// An i64 sum times 2^e as the contract rounds it: to f32, then once more with the power (§1.3).
DEVICE float scaled_sum(i64 sum, int e) {
    // A double holds every f32 times these powers exactly, so that its conversion is the one second rounding.
    float y = f32_of_i64(sum);
    double power = f64_of_bits((u64)((long long)(e + 1023) << 52));
    return f32_of_product((double)y, power);
}

/// The largest of a block's values; `scratch` has a place for each warp. All threads get it.
DEVICE float block_max(float x, float *scratch) {
    for (int h = 16; h > 0; h >>= 1) {
        float y = shuffle_xor(x, h);
        x = y > x ? y : x;
    }
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = x;
    meet_block();
    x = scratch[0];
    for (int w = 1; w < (int)blockDim.x >> 5; w++) x = scratch[w] > x ? scratch[w] : x;
    meet_block();
    return x;
}

/// Folds 256 accumulators, one a thread (§3); all threads get the sum. `scratch` has 256 places.
DEVICE float fold256(float acc, float *scratch) {
    int t = threadIdx.x;
    scratch[t] = acc;
    meet_block();
    // h = 128, 64 and 32 through shared memory, the rest within a warp.
    if (t < 128) scratch[t] = add(scratch[t], scratch[t + 128]);
    meet_block();
    if (t < 64) scratch[t] = add(scratch[t], scratch[t + 64]);
    meet_block();
    if (t < 32) {
        float x = add(scratch[t], scratch[t + 32]);
        for (int h = 16; h > 0; h >>= 1) x = add(x, shuffle_xor(x, h));
        if (t == 0) scratch[0] = x;
    }
    meet_block();
    float sum = scratch[0];
    meet_block();
    return sum;
}

} // namespace hoist
