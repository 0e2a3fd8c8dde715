// Stored keys and values, and what attention takes.
#pragma once

#include "decode.cuh"

namespace hoist {

/// Positions whose keys lie together, element after element, so that a warp's loads of one element are contiguous.
constexpr u32 KEY_BLOCK = 64;
/// Positions that share a maximum (§4).
constexpr u32 SPLIT = 256;

struct KvF16 {
    typedef u16 T;
    DEVICE u16 narrow(float x) { return f16_of_f32(x); }
    DEVICE bool finite(u16 x) { return (x & 0x7fff) < 0x7c00; }
    DEVICE float widen(u16 x) { return f32_of_f16(x); }
    /// Two neighbours, the first of them low.
    typedef u32 Two;
    DEVICE float low(u32 both) { return f32_of_f16((u16)both); }
    DEVICE float high(u32 both) { return f32_of_f16((u16)(both >> 16)); }
};
struct KvF32 {
    typedef float T;
    DEVICE float narrow(float x) { return x; }
    DEVICE bool finite(float x) { return is_finite(x); }
    DEVICE float widen(float x) { return x; }
    typedef float2 Two;
    DEVICE float low(float2 both) { return both.x; }
    DEVICE float high(float2 both) { return both.y; }
};

/// A layer's cache: [sequence][kv_head], keys then values of each. Keys: [position / 64][element / 8][position mod 64][8];
/// values: [position][element]. Elements are padded to a multiple of 8.
struct CacheLayer {
    void *base;
    u32 kv_heads, head_dim, padded, positions;
};
static_assert(sizeof(CacheLayer) == 24);

template <class K> DEVICE typename K::T *keys_of(const CacheLayer &c, u32 sequence, u32 head) {
    return (typename K::T *)c.base + ((size_t)sequence * c.kv_heads + head) * 2 * c.padded * c.positions;
}

DEVICE size_t key_at(const CacheLayer &c, u32 position, u32 element) {
    return (((size_t)(position / KEY_BLOCK) * (c.padded / 8) + element / 8) * KEY_BLOCK + position % KEY_BLOCK) * 8 + element % 8;
}

struct AttentionParams {
    CacheLayer cache;
    const float *query;
    float *out;
    const Row *rows;
    /// [token][head][split]: maximum and sum, and [head_dim] weighted values of each.
    float2 *sums;
    float *partial;
    u32 first_token, heads, splits, window;
    float scale, cap;
    u32 capped;
    /// Tokens from the first one on.
    u32 tokens;
    /// Whether there is shared memory for a split's values of one head.
    u32 staged, unused;
};
static_assert(sizeof(AttentionParams) == 104);

/// The first position that a token sees.
DEVICE u32 first_visible(const AttentionParams &p, u32 position) {
    return p.window && p.window <= position ? position + 1 - p.window : 0;
}

} // namespace hoist
