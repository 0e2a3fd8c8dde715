// Positions, stored keys and values, and what attention takes.
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

struct RopeParams {
    float *value;
    const float *table;
    const Row *rows;
    u32 width, head_dim, n_rot, half_split;
};
static_assert(sizeof(RopeParams) == 40);

/// By the block of a token; a thread turns pairs.
DEVICE void turn(const RopeParams &p, u32 token) {
    const float *table = p.table + (size_t)p.rows[token].position * p.n_rot;
    float *value = p.value + (size_t)token * p.width;
    u32 pairs = p.n_rot / 2;
    for (u32 i = threadIdx.x; i < p.width / p.head_dim * pairs; i += blockDim.x) {
        u32 head = i / pairs, j = i % pairs;
        float *x = value + head * p.head_dim;
        float *a = x + (p.half_split ? j : 2 * j), *b = x + (p.half_split ? j + pairs : 2 * j + 1);
        float x0 = *a, x1 = *b, c = table[2 * j], s = table[2 * j + 1];
        *a = fma(x0, c, -mul(x1, s));
        *b = fma(x0, s, mul(x1, c));
    }
}

struct StoreParams {
    CacheLayer cache;
    const float *key, *value;
    const Row *rows;
    u32 *fault;
    u32 step;
};
static_assert(sizeof(StoreParams) == 64);

/// By the block of a token.
template <class K> DEVICE void store_kv(const StoreParams &p, u32 token) {
    const Row &row = p.rows[token];
    const CacheLayer &c = p.cache;
    u32 width = c.kv_heads * c.head_dim;
    bool finite = true;
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) {
        u32 head = i / c.head_dim, element = i % c.head_dim;
        typename K::T *keys = keys_of<K>(c, row.sequence, head), *values = keys + (size_t)c.padded * c.positions;
        typename K::T k = K::narrow(p.key[(size_t)token * width + i]);
        typename K::T v = K::narrow(p.value[(size_t)token * width + i]);
        // A failed step must leave numbers in the cache.
        if (K::finite(k)) keys[key_at(c, row.position, element)] = k;
        if (K::finite(v)) values[(size_t)row.position * c.padded + element] = v;
        finite = finite && K::finite(k) && K::finite(v);
    }
    if (!finite) report(p.fault, p.step);
}

} // namespace hoist
