// Encodings of quantised weights as integers (docs/numerics.md §1.2) and as GGML's f32 (§1.4). Layouts are those of the
// block_* structs in ggml, as core/quant describes them.
#pragma once

#include "numerics.cuh"

#include "iq_grids.cuh"

namespace hoist {

/// A block of 32 weights. Values of halves are equal unless the encoding scales 16 weights.
struct Block {
    /// The integer codes, four a word.
    int w[8];
    /// Scale of each half: for super-blocks the contract's c under exponent e; otherwise m and e before they are aligned.
    int c[2], e[2];
    /// Min, likewise; what is subtracted.
    int k[2], ek;
    /// The scales and mins as GGML multiplies them: value = s · w − m.
    float s[2], m[2];
};

DEVICE int significand(u16 f16) {
    int exponent = f16 >> 10 & 31, fraction = f16 & 0x3ff;
    int m = exponent == 0 ? fraction : fraction | 0x400;
    return f16 & 0x8000 ? -m : m;
}

/// max(E, 1) − 25
DEVICE int exponent_of(u16 f16) { return max(f16 >> 10 & 31, 1) - 25; }

DEVICE u16 u16_at(const u8 *p) { return *(const u16 *)p; }
/// From an even address.
DEVICE u32 u32_at(const u8 *p) { return u16_at(p) | (u32)u16_at(p + 2) << 16; }
/// From any address.
DEVICE u32 u32_any(const u8 *p) { return p[0] | (u32)p[1] << 8 | (u32)p[2] << 16 | (u32)p[3] << 24; }

/// Bytes that a code book gives to the four nibbles of `n` (one in each byte).
DEVICE int look_up(u32 n, const i8 *book) {
    return (u8)book[n & 15] | (u32)(u8)book[n >> 8 & 15] << 8 | (u32)(u8)book[n >> 16 & 15] << 16 |
           (u32)(u8)book[n >> 24 & 15] << 24;
}

/// Subtracts `zero` from each byte; no byte leaves its range.
DEVICE int less(u32 w, int zero) { return sub_bytes(w, (u32)zero * 0x01010101u); }

DEVICE void both(Block &b, int c, int e, float s) {
    b.c[0] = b.c[1] = c;
    b.e[0] = b.e[1] = e;
    b.s[0] = b.s[1] = s;
}

DEVICE void f16_scale(Block &b, u16 d) { both(b, significand(d), exponent_of(d), f32_of_f16(d)); }

/// The file adds its min; the contract subtracts.
DEVICE void f16_min(Block &b, u16 m) {
    m ^= 0x8000;
    b.k[0] = b.k[1] = significand(m);
    b.ek = exponent_of(m);
    b.m[0] = b.m[1] = f32_of_f16(m);
}

/// A super-block's scale with integer sub-scales of the halves.
DEVICE void sub_scales(Block &b, u16 d, int shift, int first, int second) {
    int m = significand(d), e = exponent_of(d) + shift;
    float f = mul(f32_of_f16(d), power_of_two(shift));
    b.c[0] = m * first, b.c[1] = m * second;
    b.e[0] = b.e[1] = e;
    b.s[0] = mul(f, (float)first), b.s[1] = mul(f, (float)second);
}

DEVICE void sub_mins(Block &b, u16 d, int first, int second) {
    int m = significand(d);
    float f = f32_of_f16(d);
    b.k[0] = m * first, b.k[1] = m * second;
    b.ek = exponent_of(d);
    b.m[0] = mul(f, (float)first), b.m[1] = mul(f, (float)second);
}

DEVICE void no_min(Block &b) {
    b.k[0] = b.k[1] = b.ek = 0;
    b.m[0] = b.m[1] = 0.0f;
}

/// Nibbles of 16 bytes: byte j holds weight j low and weight j + 16 high.
template <u32 (*LOAD)(const u8 *)> DEVICE void nibbles(Block &b, const u8 *p) {
    for (int i = 0; i < 4; i++) {
        u32 q = LOAD(p + 4 * i);
        b.w[i] = q & 0x0f0f0f0f;
        b.w[4 + i] = q >> 4 & 0x0f0f0f0f;
    }
}

/// Bits 0 … 3 of `bits` as bit 4 of the bytes of a word.
DEVICE u32 fifths(u32 bits) { return ((bits & 15) * 0x00204081u & 0x01010101u) << 4; }

// ---- what an encoding is ----
// BYTES and WEIGHTS of a file block; ALIGNED: scales are aligned within a segment; HALVES; MINS; and `read`: 32-weight block
// `j` of a row.

struct Q4_0 {
    static constexpr int BYTES = 18, WEIGHTS = 32;
    static constexpr bool ALIGNED = true, HALVES = false, MINS = false;
    DEVICE void read(const u8 *row, int j, Block &b) {
        const u8 *p = row + (size_t)j * BYTES;
        f16_scale(b, u16_at(p)), no_min(b);
        nibbles<u32_at>(b, p + 2);
        for (int i = 0; i < 8; i++) b.w[i] = less(b.w[i], 8);
    }
};

struct Q4_1 {
    static constexpr int BYTES = 20, WEIGHTS = 32;
    static constexpr bool ALIGNED = true, HALVES = false, MINS = true;
    DEVICE void read(const u8 *row, int j, Block &b) {
        const u8 *p = row + (size_t)j * BYTES;
        f16_scale(b, u16_at(p)), f16_min(b, u16_at(p + 2));
        nibbles<u32_at>(b, p + 4);
    }
};

struct Q5_0 {
    static constexpr int BYTES = 22, WEIGHTS = 32;
    static constexpr bool ALIGNED = true, HALVES = false, MINS = false;
    DEVICE void read(const u8 *row, int j, Block &b) {
        const u8 *p = row + (size_t)j * BYTES;
        f16_scale(b, u16_at(p)), no_min(b);
        u32 high = u32_at(p + 2);
        nibbles<u32_at>(b, p + 6);
        for (int i = 0; i < 8; i++) b.w[i] = less(b.w[i] | fifths(high >> 4 * i), 16);
    }
};

struct Q5_1 {
    static constexpr int BYTES = 24, WEIGHTS = 32;
    static constexpr bool ALIGNED = true, HALVES = false, MINS = true;
    DEVICE void read(const u8 *row, int j, Block &b) {
        const u8 *p = row + (size_t)j * BYTES;
        f16_scale(b, u16_at(p)), f16_min(b, u16_at(p + 2));
        u32 high = u32_at(p + 4);
        nibbles<u32_at>(b, p + 8);
        for (int i = 0; i < 8; i++) b.w[i] |= fifths(high >> 4 * i);
    }
};

struct Q8_0 {
    static constexpr int BYTES = 34, WEIGHTS = 32;
    static constexpr bool ALIGNED = true, HALVES = false, MINS = false;
    DEVICE void read(const u8 *row, int j, Block &b) {
        const u8 *p = row + (size_t)j * BYTES;
        f16_scale(b, u16_at(p)), no_min(b);
        for (int i = 0; i < 8; i++) b.w[i] = u32_at(p + 2 + 4 * i);
    }
};

/// Two-bit codes of 64 bytes: bits 2s … of byte 32g + i are weight 128g + 32s + i.
template <u32 (*LOAD)(const u8 *)> DEVICE void bit_pairs(Block &b, const u8 *p, int j) {
    for (int i = 0; i < 8; i++) b.w[i] = LOAD(p + 32 * (j >> 2) + 4 * i) >> 2 * (j & 3) & 0x03030303;
}

struct Q2_K {
    static constexpr int BYTES = 84, WEIGHTS = 256;
    static constexpr bool ALIGNED = false, HALVES = true, MINS = true;
    DEVICE void read(const u8 *row, int block, Block &b) {
        const u8 *p = row + (size_t)(block >> 3) * BYTES;
        int j = block & 7, first = p[2 * j], second = p[2 * j + 1];
        sub_scales(b, u16_at(p + 80), 0, first & 15, second & 15);
        sub_mins(b, u16_at(p + 82), first >> 4, second >> 4);
        bit_pairs<u32_at>(b, p + 16, j);
    }
};

struct Q3_K {
    static constexpr int BYTES = 110, WEIGHTS = 256;
    static constexpr bool ALIGNED = false, HALVES = true, MINS = false;
    DEVICE int sub(const u8 *p, int half) {
        int low = p[96 + (half & 7)] >> 4 * (half >> 3) & 15;
        int high = p[104 + (half & 3)] >> 2 * (half >> 2) & 3;
        return (low | high << 4) - 32;
    }
    DEVICE void read(const u8 *row, int block, Block &b) {
        const u8 *p = row + (size_t)(block >> 3) * BYTES;
        int j = block & 7;
        sub_scales(b, u16_at(p + 108), 0, sub(p, 2 * j), sub(p, 2 * j + 1)), no_min(b);
        bit_pairs<u32_at>(b, p + 32, j);
        // A set third bit means that nothing is subtracted.
        for (int i = 0; i < 8; i++) {
            u32 third = u32_at(p + 4 * i) >> j & 0x01010101;
            b.w[i] = less(b.w[i] | third << 2, 4);
        }
    }
};

/// Sub-scale and min `j` of the 12 packed bytes of Q4_K and Q5_K.
DEVICE void packed_subs(const u8 *p, int j, int &sub, int &min) {
    if (j < 4) {
        sub = p[j] & 63, min = p[j + 4] & 63;
    } else {
        sub = (p[j + 4] & 15) | p[j - 4] >> 6 << 4;
        min = p[j + 4] >> 4 | p[j] >> 6 << 4;
    }
}

/// Nibbles of 128 bytes: byte 32g + i holds weight 64g + i low and weight 64g + 32 + i high.
DEVICE void k_nibbles(Block &b, const u8 *p, int j) {
    for (int i = 0; i < 8; i++) b.w[i] = *(const u32 *)(p + 32 * (j >> 1) + 4 * i) >> 4 * (j & 1) & 0x0f0f0f0f;
}

struct Q4_K {
    static constexpr int BYTES = 144, WEIGHTS = 256;
    static constexpr bool ALIGNED = false, HALVES = false, MINS = true;
    DEVICE void read(const u8 *row, int block, Block &b) {
        const u8 *p = row + (size_t)(block >> 3) * BYTES;
        int j = block & 7, sub, min;
        packed_subs(p + 4, j, sub, min);
        sub_scales(b, u16_at(p), 0, sub, sub), sub_mins(b, u16_at(p + 2), min, min);
        k_nibbles(b, p + 16, j);
    }
};

struct Q5_K {
    static constexpr int BYTES = 176, WEIGHTS = 256;
    static constexpr bool ALIGNED = false, HALVES = false, MINS = true;
    DEVICE void read(const u8 *row, int block, Block &b) {
        const u8 *p = row + (size_t)(block >> 3) * BYTES;
        int j = block & 7, sub, min;
        packed_subs(p + 4, j, sub, min);
        sub_scales(b, u16_at(p), 0, sub, sub), sub_mins(b, u16_at(p + 2), min, min);
        k_nibbles(b, p + 48, j);
        for (int i = 0; i < 8; i++) b.w[i] |= (*(const u32 *)(p + 16 + 4 * i) >> j & 0x01010101) << 4;
    }
};

struct Q6_K {
    static constexpr int BYTES = 210, WEIGHTS = 256;
    static constexpr bool ALIGNED = false, HALVES = true, MINS = false;
    DEVICE void read(const u8 *row, int block, Block &b) {
        const u8 *p = row + (size_t)(block >> 3) * BYTES;
        int j = block & 7, g = j >> 2, s = j & 3;
        sub_scales(b, u16_at(p + 208), 0, (i8)p[192 + 2 * j], (i8)p[193 + 2 * j]), no_min(b);
        for (int i = 0; i < 8; i++) {
            u32 low = u32_at(p + 64 * g + 32 * (s & 1) + 4 * i) >> 4 * (s >> 1) & 0x0f0f0f0f;
            u32 high = u32_at(p + 128 + 32 * g + 4 * i) >> 2 * s & 0x03030303;
            b.w[i] = less(low | high << 4, 32);
        }
    }
};

// ---- code books ----

TABLE i8 IQ4_LEVELS[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

struct IQ4_NL {
    static constexpr int BYTES = 18, WEIGHTS = 32;
    static constexpr bool ALIGNED = true, HALVES = false, MINS = false;
    DEVICE void read(const u8 *row, int j, Block &b) {
        const u8 *p = row + (size_t)j * BYTES;
        f16_scale(b, u16_at(p)), no_min(b);
        nibbles<u32_at>(b, p + 2);
        for (int i = 0; i < 8; i++) b.w[i] = look_up(b.w[i], IQ4_LEVELS);
    }
};

struct IQ4_XS {
    static constexpr int BYTES = 136, WEIGHTS = 256;
    static constexpr bool ALIGNED = false, HALVES = false, MINS = false;
    DEVICE void read(const u8 *row, int block, Block &b) {
        const u8 *p = row + (size_t)(block >> 3) * BYTES;
        int j = block & 7;
        int low = p[4 + (j >> 1)] >> 4 * (j & 1) & 15, high = u16_at(p + 2) >> 2 * j & 3;
        int sub = (low | high << 4) - 32;
        sub_scales(b, u16_at(p), 0, sub, sub), no_min(b);
        nibbles<u32_at>(b, p + 8 + 16 * j);
        for (int i = 0; i < 8; i++) b.w[i] = look_up(b.w[i], IQ4_LEVELS);
    }
};

/// Eight levels of two bits each.
DEVICE void grid8(u16 packed, const i8 *levels, int out[2]) {
    u32 w[2] = {0, 0};
    for (int i = 0; i < 8; i++) w[i >> 2] |= (u32)(u8)levels[packed >> 2 * i & 3] << 8 * (i & 3);
    out[0] = w[0], out[1] = w[1];
}

/// Four levels of four bits each.
DEVICE int grid4(u16 packed, const i8 *levels) {
    u32 w = 0;
    for (int i = 0; i < 4; i++) w |= (u32)(u8)levels[packed >> 4 * i & 15] << 8 * i;
    return w;
}

/// Negates the bytes whose bits are set among four.
DEVICE int with_signs(u32 w, u32 bits) {
    u32 ones = (bits & 15) * 0x00204081u & 0x01010101u;
    u32 mask = ones * 255u;
    return add_bytes(w ^ mask, ones);
}

/// Eight sign bits from seven: the eighth makes their number even.
DEVICE u32 even_signs(u32 seven) {
    seven &= 127;
    return seven | (ones_of(seven) & 1) << 7;
}

DEVICE void signed8(int out[2], u32 signs) {
    out[0] = with_signs(out[0], signs);
    out[1] = with_signs(out[1], signs >> 4);
}

struct IQ2_XXS {
    static constexpr int BYTES = 66, WEIGHTS = 256;
    static constexpr bool ALIGNED = false, HALVES = false, MINS = false;
    DEVICE void read(const u8 *row, int block, Block &b) {
        const u8 *p = row + (size_t)(block >> 3) * BYTES, *at = p + 2 + 8 * (block & 7);
        u32 aux = u32_at(at + 4);
        int sub = (int)(aux >> 28) * 2 + 1;
        sub_scales(b, u16_at(p), -3, sub, sub), no_min(b);
        for (int l = 0; l < 4; l++) {
            grid8(IQ2_XXS_GRID[at[l]], IQ2_XXS_LEVELS, b.w + 2 * l);
            signed8(b.w + 2 * l, even_signs(aux >> 7 * l));
        }
    }
};

DEVICE int odd_nibble(const u8 *p, int i) { return (p[i >> 1] >> 4 * (i & 1) & 15) * 2 + 1; }

struct IQ2_XS {
    static constexpr int BYTES = 74, WEIGHTS = 256;
    static constexpr bool ALIGNED = false, HALVES = true, MINS = false;
    DEVICE void read(const u8 *row, int block, Block &b) {
        const u8 *p = row + (size_t)(block >> 3) * BYTES;
        int j = block & 7;
        sub_scales(b, u16_at(p), -3, odd_nibble(p + 66, 2 * j), odd_nibble(p + 66, 2 * j + 1)), no_min(b);
        for (int l = 0; l < 4; l++) {
            u16 q = u16_at(p + 2 + 2 * (4 * j + l));
            grid8(IQ2_XS_GRID[q & 511], IQ2_XS_LEVELS, b.w + 2 * l);
            signed8(b.w + 2 * l, even_signs(q >> 9));
        }
    }
};

struct IQ2_S {
    static constexpr int BYTES = 82, WEIGHTS = 256;
    static constexpr bool ALIGNED = false, HALVES = true, MINS = false;
    DEVICE void read(const u8 *row, int block, Block &b) {
        const u8 *p = row + (size_t)(block >> 3) * BYTES;
        int j = block & 7;
        sub_scales(b, u16_at(p), -3, odd_nibble(p + 74, 2 * j), odd_nibble(p + 74, 2 * j + 1)), no_min(b);
        for (int l = 0; l < 4; l++) {
            int high = p[66 + j] >> 2 * l & 3;
            grid8(IQ2_S_GRID[p[2 + 4 * j + l] | high << 8], IQ2_S_LEVELS, b.w + 2 * l);
            signed8(b.w + 2 * l, p[34 + 4 * j + l]);
        }
    }
};

struct IQ3_XXS {
    static constexpr int BYTES = 98, WEIGHTS = 256;
    static constexpr bool ALIGNED = false, HALVES = false, MINS = false;
    DEVICE void read(const u8 *row, int block, Block &b) {
        const u8 *p = row + (size_t)(block >> 3) * BYTES;
        int j = block & 7;
        u32 aux = u32_at(p + 66 + 4 * j);
        int sub = (int)(aux >> 28) * 2 + 1;
        sub_scales(b, u16_at(p), -2, sub, sub), no_min(b);
        for (int l = 0; l < 4; l++) {
            for (int i = 0; i < 2; i++) b.w[2 * l + i] = grid4(IQ3_XXS_GRID[p[2 + 8 * j + 2 * l + i]], IQ3_XXS_LEVELS);
            signed8(b.w + 2 * l, even_signs(aux >> 7 * l));
        }
    }
};

struct IQ3_S {
    static constexpr int BYTES = 110, WEIGHTS = 256;
    static constexpr bool ALIGNED = false, HALVES = false, MINS = false;
    DEVICE void read(const u8 *row, int block, Block &b) {
        const u8 *p = row + (size_t)(block >> 3) * BYTES;
        int j = block & 7, sub = odd_nibble(p + 106, j);
        sub_scales(b, u16_at(p), 0, sub, sub), no_min(b);
        for (int i = 0; i < 8; i++) {
            int ninth = p[66 + j] >> i & 1;
            b.w[i] = grid4(IQ3_S_GRID[p[2 + 8 * j + i] | ninth << 8], IQ3_S_LEVELS);
        }
        for (int l = 0; l < 4; l++) signed8(b.w + 2 * l, p[74 + 4 * j + l]);
    }
};

/// 8 · grid ± 1
DEVICE void iq1_codes(int index, bool negative, int out[2]) {
    u16 packed = IQ1_S_GRID[index];
    u32 w[2] = {0, 0};
    for (int i = 0; i < 8; i++) {
        int code = 8 * IQ1_S_LEVELS[packed >> 2 * i & 3] + (negative ? -1 : 1);
        w[i >> 2] |= (u32)(u8)code << 8 * (i & 3);
    }
    out[0] = w[0], out[1] = w[1];
}

struct IQ1_S {
    static constexpr int BYTES = 50, WEIGHTS = 256;
    static constexpr bool ALIGNED = false, HALVES = false, MINS = false;
    DEVICE void read(const u8 *row, int block, Block &b) {
        const u8 *p = row + (size_t)(block >> 3) * BYTES;
        int j = block & 7;
        u16 high = u16_at(p + 34 + 2 * j);
        int sub = (high >> 12 & 7) * 2 + 1;
        sub_scales(b, u16_at(p), -3, sub, sub), no_min(b);
        for (int l = 0; l < 4; l++)
            iq1_codes(p[2 + 4 * j + l] | (high >> 3 * l & 7) << 8, high & 0x8000, b.w + 2 * l);
    }
};

struct IQ1_M {
    static constexpr int BYTES = 56, WEIGHTS = 256;
    static constexpr bool ALIGNED = false, HALVES = true, MINS = false;
    DEVICE u16 d(const u8 *p) {
        return u16_at(p + 48) >> 12 | u16_at(p + 50) >> 12 << 4 | u16_at(p + 52) >> 12 << 8 | u16_at(p + 54) >> 12 << 12;
    }
    DEVICE int sub(const u8 *p, int half) { return (u16_at(p + 48 + 2 * (half >> 2)) >> 3 * (half & 3) & 7) * 2 + 1; }
    DEVICE void read(const u8 *row, int block, Block &b) {
        const u8 *p = row + (size_t)(block >> 3) * BYTES;
        int j = block & 7;
        sub_scales(b, d(p), -3, sub(p, 2 * j), sub(p, 2 * j + 1)), no_min(b);
        for (int l = 0; l < 4; l++) {
            int high = p[32 + 2 * j + (l >> 1)] >> 4 * (l & 1) & 15;
            iq1_codes(p[4 * j + l] | (high & 7) << 8, high & 8, b.w + 2 * l);
        }
    }
};

// ---- one, two bits, base-3 digits ----

DEVICE int trit(u8 q, int power) {
    const u8 powers[5] = {1, 3, 9, 27, 81};
    return ((u32)(u8)(q * powers[power]) * 3 >> 8) - 1;
}

struct TQ1_0 {
    static constexpr int BYTES = 54, WEIGHTS = 256;
    static constexpr bool ALIGNED = true, HALVES = false, MINS = false;
    DEVICE int code(const u8 *p, int i) {
        if (i < 160) return trit(p[i & 31], i >> 5);
        if (i < 240) return trit(p[32 + (i - 160 & 15)], i - 160 >> 4);
        return trit(p[48 + (i & 3)], i - 240 >> 2);
    }
    DEVICE void read(const u8 *row, int block, Block &b) {
        const u8 *p = row + (size_t)(block >> 3) * BYTES;
        f16_scale(b, u16_at(p + 52)), no_min(b);
        for (int i = 0; i < 8; i++) {
            u32 w = 0;
            for (int n = 0; n < 4; n++) w |= (u32)(u8)code(p, 32 * (block & 7) + 4 * i + n) << 8 * n;
            b.w[i] = w;
        }
    }
};

struct TQ2_0 {
    static constexpr int BYTES = 66, WEIGHTS = 256;
    static constexpr bool ALIGNED = true, HALVES = false, MINS = false;
    DEVICE void read(const u8 *row, int block, Block &b) {
        const u8 *p = row + (size_t)(block >> 3) * BYTES;
        f16_scale(b, u16_at(p + 64)), no_min(b);
        bit_pairs<u32_at>(b, p, block & 7);
        for (int i = 0; i < 8; i++) b.w[i] = less(b.w[i], 1);
    }
};

struct Q1_0 {
    static constexpr int BYTES = 18, WEIGHTS = 128;
    static constexpr bool ALIGNED = true, HALVES = false, MINS = false;
    DEVICE void read(const u8 *row, int block, Block &b) {
        const u8 *p = row + (size_t)(block >> 2) * BYTES;
        f16_scale(b, u16_at(p)), no_min(b);
        u32 bits = u32_at(p + 2 + 4 * (block & 3));
        for (int i = 0; i < 8; i++) {
            u32 set = (bits >> 4 * i & 15) * 0x00204081u & 0x01010101u;
            b.w[i] = less(set << 1, 1);
        }
    }
};

struct Q2_0 {
    static constexpr int BYTES = 18, WEIGHTS = 64;
    static constexpr bool ALIGNED = true, HALVES = false, MINS = false;
    DEVICE void read(const u8 *row, int block, Block &b) {
        const u8 *p = row + (size_t)(block >> 1) * BYTES;
        f16_scale(b, u16_at(p)), no_min(b);
        for (int i = 0; i < 8; i++) {
            u32 q = p[2 + 8 * (block & 1) + i];
            b.w[i] = less((q & 3) | (q >> 2 & 3) << 8 | (q >> 4 & 3) << 16 | (q >> 6) << 24, 1);
        }
    }
};

// ---- 4-bit floats ----

TABLE i8 E2M1_DOUBLED[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

struct MXFP4 {
    static constexpr int BYTES = 17, WEIGHTS = 32;
    static constexpr bool ALIGNED = true, HALVES = false, MINS = false;
    DEVICE void read(const u8 *row, int j, Block &b) {
        const u8 *p = row + (size_t)j * BYTES;
        int scale = p[0];
        float value = f32_of_bits(scale < 2 ? 0x00200000u << scale : (u32)(scale - 1) << 23);
        both(b, 1, scale - 128, value), no_min(b);
        nibbles<u32_any>(b, p + 1);
        for (int i = 0; i < 8; i++) b.w[i] = look_up(b.w[i], E2M1_DOUBLED);
    }
};

struct NVFP4 {
    static constexpr int BYTES = 36, WEIGHTS = 64;
    static constexpr bool ALIGNED = true, HALVES = true, MINS = false;
    DEVICE void scale(u8 byte, int &m, int &e) {
        int exponent = byte >> 3 & 15, fraction = byte & 7;
        m = byte == 0x7f ? 0 : exponent == 0 ? fraction : fraction | 8;
        e = max(exponent, 1) - 11;
    }
    DEVICE void read(const u8 *row, int block, Block &b) {
        const u8 *p = row + (size_t)(block >> 1) * BYTES;
        no_min(b);
        for (int h = 0; h < 2; h++) {
            int part = 2 * (block & 1) + h;
            scale(p[part], b.c[h], b.e[h]);
            b.s[h] = mul((float)b.c[h], power_of_two(b.e[h]));
            for (int i = 0; i < 2; i++) {
                u32 q = u32_at(p + 4 + 8 * part + 4 * i);
                b.w[4 * h + i] = look_up(q & 0x0f0f0f0f, E2M1_DOUBLED);
                b.w[4 * h + 2 + i] = look_up(q >> 4 & 0x0f0f0f0f, E2M1_DOUBLED);
            }
        }
    }
};

// ---- APR ----

struct APR_Q4 {
    static constexpr int BYTES = 18, WEIGHTS = 32;
    static constexpr bool ALIGNED = true, HALVES = false, MINS = false;
    DEVICE void read(const u8 *row, int j, Block &b) {
        const u8 *p = row + (size_t)j * BYTES;
        f16_scale(b, u16_at(p)), no_min(b);
        // Byte i holds weights 2i and 2i + 1.
        for (int i = 0; i < 8; i++) {
            u32 q = u16_at(p + 2 + 2 * i);
            b.w[i] = less((q & 15) | (q >> 4 & 15) << 8 | (q >> 8 & 15) << 16 | (q >> 12) << 24, 8);
        }
    }
};

/// Codes alone: the matrix's scale stands in front of it.
struct APR_Q8 {
    static constexpr int BYTES = 1, WEIGHTS = 1;
    static constexpr bool ALIGNED = false, HALVES = false, MINS = false;
    DEVICE void read(const u8 *row, int j, Block &b) {
        both(b, 1, 0, 1.0f), no_min(b);
        for (int i = 0; i < 8; i++) b.w[i] = u32_any(row + (size_t)32 * j + 4 * i);
    }
};

} // namespace hoist

#define EACH_QUANTIZED(X)                                                                                              \
    X(q4_0, Q4_0)                                                                                                      \
    X(q4_1, Q4_1)                                                                                                      \
    X(q5_0, Q5_0)                                                                                                      \
    X(q5_1, Q5_1)                                                                                                      \
    X(q8_0, Q8_0)                                                                                                      \
    X(q2_k, Q2_K)                                                                                                      \
    X(q3_k, Q3_K)                                                                                                      \
    X(q4_k, Q4_K)                                                                                                      \
    X(q5_k, Q5_K)                                                                                                      \
    X(q6_k, Q6_K)                                                                                                      \
    X(iq2_xxs, IQ2_XXS)                                                                                                \
    X(iq2_xs, IQ2_XS)                                                                                                  \
    X(iq3_xxs, IQ3_XXS)                                                                                                \
    X(iq1_s, IQ1_S)                                                                                                    \
    X(iq4_nl, IQ4_NL)                                                                                                  \
    X(iq3_s, IQ3_S)                                                                                                    \
    X(iq2_s, IQ2_S)                                                                                                    \
    X(iq4_xs, IQ4_XS)                                                                                                  \
    X(iq1_m, IQ1_M)                                                                                                    \
    X(tq1_0, TQ1_0)                                                                                                    \
    X(tq2_0, TQ2_0)                                                                                                    \
    X(mxfp4, MXFP4)                                                                                                    \
    X(nvfp4, NVFP4)                                                                                                    \
    X(q1_0, Q1_0)                                                                                                      \
    X(q2_0, Q2_0)                                                                                                      \
    X(apr_q4, APR_Q4)                                                                                                  \
    X(apr_q8, APR_Q8)
