// What prefill does beside the products of prefill.cuh, for many tokens at once.

#include "prefill.cuh"

namespace hoist {

// ---- packing quantised vectors into tiles ----

struct PackParams {
    /// [tokens][segments]
    const Segment *x;
    /// [tokens / 8][segments] tiles, and E_a of each token, of whole tiles.
    u8 *tiles;
    int *vector_exponents;
    u32 segments, tokens;
};
static_assert(sizeof(PackParams) == 32);

/// Segments that a block packs.
constexpr u32 PACKED_SEGMENTS = 4;

/// What the kernels of products read of a token's segment; a warp's lanes hold eight codes each, in order, and the sum and u
/// of their block.
DEVICE void write_record(u8 *tile, u32 token, uint2 codes, int sum, int u, int m, int shift) {
    u32 lane = threadIdx.x & 31, j = lane >> 2, t = lane & 3;
    u8 *record = tile + token * RECORD;
    *(uint2 *)(record + 64 * (j >> 1) + 16 * t + 8 * (j & 1)) = codes;
    int us = u * sum, all = t == 0 ? u : 0;
    for (int h = 1; h < 32; h <<= 1) all += shuffle_xor(all, h);
    if (t == 0) {
        int high = us >> 7;
        record[AT_LO + j] = us & 127;
        record[AT_B + j] = high & 3;
        record[AT_A + j] = (u8)(high >> 2);
        ((int *)(record + AT_SUMS))[j] = us;
        ((int *)(tile + AT_FACTORS))[(j >> 1) * 16 + (token >> 1) * 4 + (j & 1) * 2 + (token & 1)] = u;
    }
    if (lane == 0) {
        *(int2 *)(record + AT_SCALE) = make_int2(m, shift);
        ((u32 *)(tile + AT_STARTS))[token] = 0u - MAGIC_BITS * (u32)all;
    }
}

/// A block packs a few segments of eight tokens, one a warp.
extern "C" __global__ void __launch_bounds__(256) pack(const __grid_constant__ PackParams p) {
    u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, token = blockIdx.x * 8 + warp;
    bool here = token < p.tokens;
    const Segment *x = p.x + (size_t)token * p.segments;
    int largest = -133;
    if (here)
        for (u32 s = lane; s < p.segments; s += 32) largest = max(largest, x[s].e);
    for (int h = 16; h > 0; h >>= 1) largest = max(largest, shuffle_xor(largest, h));
    if (blockIdx.y == 0 && lane == 0) p.vector_exponents[token] = largest;
    u32 first = blockIdx.y * PACKED_SEGMENTS, end = min(first + PACKED_SEGMENTS, p.segments);
    for (u32 s = first; s < end; s++) {
        u8 *tile = p.tiles + ((size_t)blockIdx.x * p.segments + s) * TILE;
        if (here) {
            const Segment &from = x[s];
            u32 j = lane >> 2;
            write_record(tile, warp, *(const uint2 *)(from.q + 8 * lane), from.s[2 * j] + from.s[2 * j + 1], from.u[j], from.m,
                         largest - from.e);
        } else {
            // A token that is none: zeros.
            write_record(tile, warp, make_uint2(0, 0), 0, 1, 0, 0);
        }
    }
}

} // namespace hoist
