// What prefill does beside the products of prefill.cuh, for many tokens at once.

#include "attention.cuh"
#include "prefill_k.cuh"
#include "quantise.cuh"

namespace hoist {

// ---- quantised vectors in tiles ----

/// Where a quantised vector goes. What is null is not wanted.
struct TilesParams {
    /// [tokens / 8][segments] tiles, of each form, and E_a of each token, of whole tiles.
    u8 *plain, *folded, *halved;
    int *plain_exponents, *folded_exponents, *halved_exponents;
};

/// The tiles of a segment of eight tokens, and this token's place in them.
struct Records {
    u8 *plain, *folded, *halved;
    u32 token;

    DEVICE Records of(const TilesParams &p, u32 token, u32 segments, u32 s) {
        size_t at = (size_t)(token >> 3) * segments + s;
        return Records{p.plain ? p.plain + at * TILE : nullptr, p.folded ? p.folded + at * FOLDED_TILE : nullptr,
                       p.halved ? p.halved + at * HALVED_TILE : nullptr, token & 7};
    }
};

/// All of a token's segment but its scale, by a warp; `sum` is that of a block of 32.
DEVICE void write_integers(const Records &to, const Integers &x, int sum) {
    u32 lane = threadIdx.x & 31, j = lane >> 2, t = lane & 3, token = to.token;
    int us = x.u * sum;
    if (to.plain) {
        u8 *record = to.plain + token * RECORD;
        *(uint2 *)(record + 64 * (j >> 1) + 16 * t + 8 * (j & 1)) = make_uint2(x.words[0], x.words[1]);
        int all = t == 0 ? x.u : 0;
        for (int h = 1; h < 32; h <<= 1) all += shuffle_xor(all, h);
        if (t == 0) {
            int high = us >> 7;
            record[AT_LO + j] = us & 127;
            record[AT_B + j] = high & 3;
            record[AT_A + j] = (u8)(high >> 2);
            ((int *)(record + AT_SUMS))[j] = us;
            ((int *)(to.plain + AT_FACTORS))[(j >> 1) * 16 + (token >> 1) * 4 + (j & 1) * 2 + (token & 1)] = x.u;
        }
        if (lane == 0) ((u32 *)(to.plain + AT_STARTS))[token] = 0u - MAGIC_BITS * (u32)all;
    }
    if (to.folded) {
        u8 *record = to.folded + token * FOLDED_RECORD;
        u32 high[2] = {0, 0}, low[2] = {0, 0};
        for (int i = 0; i < 8; i++) {
            int product = x.u * (i8)(x.words[i >> 2] >> 8 * (i & 3));
            high[i >> 2] |= (u32)(product >> 4 & 255) << 8 * (i & 3), low[i >> 2] |= (u32)(product & 15) << 8 * (i & 3);
        }
        *(uint4 *)(record + 16 * lane) = uint4{high[0], high[1], low[0], low[1]};
        if (t == 0) {
            u8 *of_block = to.folded + 8 * token + j;
            of_block[FOLDED_LO] = us & 127, of_block[FOLDED_B] = us >> 7 & 3, of_block[FOLDED_A] = (u8)(us >> 9);
        }
    }
    if (to.halved) {
        u8 *record = to.halved + token * HALVED_RECORD;
        // Elements 8t … 8t + 7 are two fours of one half: those of the lanes 2t and 2t + 1, modulo 4.
        for (u32 i = 0; i < 2; i++)
            *(u32 *)(record + 64 * (j >> 1) + 16 * (2 * (t & 1) + i) + 8 * (j & 1) + 4 * (t >> 1)) = x.words[i];
        if (t == 0) ((int *)(to.halved + HALVED_FACTORS))[(j >> 1) * 16 + (token >> 1) * 4 + (j & 1) * 2 + (token & 1)] = x.u;
    }
}

/// The scale of a token's segment, under the vector's exponent.
DEVICE void write_scale(const Records &to, int m, int e, int largest) {
    double scale = product_f64((double)m, power_f64(e - largest));
    if (to.plain) *(int2 *)(to.plain + to.token * RECORD + AT_SCALE) = make_int2(m, largest - e);
    if (to.folded) *(double *)(to.folded + FOLDED_SCALES + 8 * to.token) = scale;
    if (to.halved) *(double *)(to.halved + HALVED_SCALES + 8 * to.token) = scale;
}

DEVICE void write_exponent(const TilesParams &p, u32 token, int largest) {
    if (p.plain) p.plain_exponents[token] = largest;
    if (p.folded) p.folded_exponents[token] = largest;
    if (p.halved) p.halved_exponents[token] = largest;
}

struct PackParams {
    /// [tokens][segments]
    const Segment *x;
    TilesParams tiles;
    u32 segments, tokens;
};
static_assert(sizeof(PackParams) == 64);

/// Segments that a block packs.
constexpr u32 PACKED_SEGMENTS = 4;

/// A block packs a few segments of eight tokens, one a warp.
extern "C" __global__ void __launch_bounds__(256) pack(const __grid_constant__ PackParams p) {
    u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, j = lane >> 2, token = blockIdx.x * 8 + warp;
    bool here = token < p.tokens;
    const Segment *x = p.x + (size_t)token * p.segments;
    int largest = -133;
    if (here)
        for (u32 s = lane; s < p.segments; s += 32) largest = max(largest, x[s].e);
    for (int h = 16; h > 0; h >>= 1) largest = max(largest, shuffle_xor(largest, h));
    if (blockIdx.y == 0 && lane == 0) write_exponent(p.tiles, token, largest);
    u32 first = blockIdx.y * PACKED_SEGMENTS, end = min(first + PACKED_SEGMENTS, p.segments);
    for (u32 s = first; s < end; s++) {
        // A token that is none: zeros.
        Integers of = {{0, 0}, 0, 1, 0, largest};
        if (here) {
            const Segment &from = x[s];
            uint2 codes = *(const uint2 *)(from.q + 8 * lane);
            of = Integers{{codes.x, codes.y}, from.s[2 * j] + from.s[2 * j + 1], from.u[j], from.m, from.e};
        }
        Records to = Records::of(p.tiles, token, p.segments, s);
        write_integers(to, of, of.sum);
        if (lane == 0) write_scale(to, of.m, of.e, largest);
    }
}

// ---- vectors that only products read, straight to integers ----

struct IntegersParams {
    /// [tokens][segments], where no tile is wanted.
    Segment *out;
    TilesParams tiles;
    u32 *fault;
    u32 step, cols, segments, tokens;
};
static_assert(sizeof(IntegersParams) == 80);

/// Segments of the longest vector.
constexpr u32 MOST_SEGMENTS = 512;

/// Significands and exponents of a vector's segments.
struct SegmentScales {
    int m[MOST_SEGMENTS], e[MOST_SEGMENTS];
};

/// Quantises a token's vector by a block of whole warps: `elements(first, v)` are eight from `first` on, by a lane. Tokens past the
/// last one are zeros.
template <class Elements>
DEVICE void quantise_vector(const IntegersParams &p, u32 token, SegmentScales &scales, Elements elements) {
    u32 warp = threadIdx.x >> 5, warps = blockDim.x >> 5, lane = threadIdx.x & 31;
    bool here = token < p.tokens;
    for (u32 s = warp; s < p.segments; s += warps) {
        u32 first = s * 256 + lane * 8;
        float v[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        if (here && first < p.cols) elements(first, v);
        Integers x = integers_of(v, p.fault, p.step);
        if (p.out) {
            if (here) write_segment(p.out[(size_t)token * p.segments + s], x);
            continue;
        }
        int sum = x.sum + shuffle_xor(x.sum, 2);
        write_integers(Records::of(p.tiles, token, p.segments, s), x, sum);
        if (lane == 0) scales.m[s] = x.m, scales.e[s] = x.e;
    }
    if (p.out) return;
    meet_block();
    int largest = -133;
    for (u32 s = lane; s < p.segments; s += 32) largest = max(largest, scales.e[s]);
    for (int h = 16; h > 0; h >>= 1) largest = max(largest, shuffle_xor(largest, h));
    for (u32 s = threadIdx.x; s < p.segments; s += blockDim.x)
        write_scale(Records::of(p.tiles, token, p.segments, s), scales.m[s], scales.e[s], largest);
    if (threadIdx.x == 0) write_exponent(p.tiles, token, largest);
}

/// Eight numbers at a multiple of 16 bytes.
DEVICE void load_eight(const float *from, float x[8]) {
    float4 low = ((const float4 *)from)[0], high = ((const float4 *)from)[1];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w, x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

struct NormedParams {
    /// [tokens][cols]; where `plus` is not null, their sum is what is normed, and `sum` is where it goes.
    const float *x, *plus;
    float *sum;
    const float *weight;
    IntegersParams to;
    float eps;
};
static_assert(sizeof(NormedParams) == 120);

/// Add, where it is asked for, RmsNorm, then Quantise: a block of 512 threads a token, half of which have the accumulators of the
/// sum.
extern "C" __global__ void __launch_bounds__(512) rms_norm_quantise(const __grid_constant__ NormedParams p) {
    SHARED(float, scratch, [512]);
    SHARED(SegmentScales, scales, );
    u32 token = blockIdx.x, cols = p.to.cols;
    const float *x = p.x + (size_t)token * cols;
    float inv = 0.0f;
    if (token < p.to.tokens) {
        float acc = 0.0f;
        u32 first = threadIdx.x < 256 ? threadIdx.x : cols;
        if (p.plus) {
            const float *plus = p.plus + (size_t)token * cols;
            float *sum = p.sum + (size_t)token * cols;
#pragma unroll 8
            for (u32 i = first; i < cols; i += 256) {
                float y = add(x[i], plus[i]);
                sum[i] = y;
                acc = fma(y, y, acc);
            }
            x = sum;
        } else {
#pragma unroll 8
            for (u32 i = first; i < cols; i += 256) acc = fma(x[i], x[i], acc);
        }
        float ss = fold256(acc, scratch);
        inv = quotient(1.0f, root(add(quotient(ss, (float)cols), p.eps)));
    }
    quantise_vector(p.to, token, scales, [&](u32 first, float v[8]) {
        float of[8], weights[8];
        load_eight(x + first, of), load_eight(p.weight + first, weights);
        for (u32 i = 0; i < 8; i++) v[i] = mul(mul(of[i], inv), weights[i]);
    });
}

struct GatedParams {
    /// [tokens][cols]
    const float *gate, *up;
    IntegersParams to;
};
static_assert(sizeof(GatedParams) == 96);

/// Activation, Mul, then Quantise: a block a token.
#define GATED(name, activation)                                                                                        \
    extern "C" __global__ void __launch_bounds__(1024) name##_quantise(const __grid_constant__ GatedParams p) {         \
        SHARED(SegmentScales, scales, );                                                                               \
        const float *gate = p.gate + (size_t)blockIdx.x * p.to.cols, *up = p.up + (size_t)blockIdx.x * p.to.cols;      \
        quantise_vector(p.to, blockIdx.x, scales, [&](u32 first, float v[8]) {                                         \
            float gates[8], ups[8];                                                                                    \
            load_eight(gate + first, gates), load_eight(up + first, ups);                                              \
            for (u32 i = 0; i < 8; i++) v[i] = mul(activation(gates[i]), ups[i]);                                      \
        });                                                                                                            \
    }
GATED(silu, silu)
GATED(gelu_tanh, gelu_tanh)

struct MergedParams {
    AttentionParams attention;
    IntegersParams to;
};
static_assert(sizeof(MergedParams) == 184);

/// The merge of attention's splits, then Quantise: a block a token. Heads are whole multiples of eight elements.
extern "C" __global__ void __launch_bounds__(256) merge_quantise(const __grid_constant__ MergedParams p) {
    SHARED(SegmentScales, scales, );
    const AttentionParams &a = p.attention;
    u32 head_dim = a.cache.head_dim, token = a.first_token + blockIdx.x;
    u32 first_split = 0, last_split = 0;
    if (token < p.to.tokens) {
        u32 position = a.rows[token].position;
        first_split = first_visible(a, position) / SPLIT, last_split = position / SPLIT;
    }
    quantise_vector(p.to, token, scales, [&](u32 first, float v[8]) {
        u32 head = first / head_dim;
        size_t at = ((size_t)blockIdx.x * a.heads + head) * a.splits;
        const float2 *sums = a.sums + at;
        const float *partial = a.partial + at * head_dim + first % head_dim;
        float m = -INFINITY, l = 0.0f;
        for (u32 s = first_split; s <= last_split; s++) m = sums[s].x > m ? sums[s].x : m;
        for (u32 s = first_split; s <= last_split; s++) {
            const float4 *from = (const float4 *)(partial + (size_t)s * head_dim);
            float4 low = from[0], high = from[1];
            float f = exponential(sub(sums[s].x, m));
            l = fma(sums[s].y, f, l);
            v[0] = fma(low.x, f, v[0]), v[1] = fma(low.y, f, v[1]), v[2] = fma(low.z, f, v[2]), v[3] = fma(low.w, f, v[3]);
            v[4] = fma(high.x, f, v[4]), v[5] = fma(high.y, f, v[5]), v[6] = fma(high.z, f, v[6]), v[7] = fma(high.w, f, v[7]);
        }
        float inverse = quotient(1.0f, l);
        for (u32 i = 0; i < 8; i++) v[i] = mul(v[i], inverse);
    });
}

// ---- attention of many tokens ----

struct TurnedParams {
    RopeParams query, key;
    StoreParams store;
};
static_assert(sizeof(TurnedParams) == 144);

/// Rope of queries and keys, then StoreKv: a block a token.
template <class K> DEVICE void rope_store(const TurnedParams &p) {
    turn(p.query, blockIdx.x);
    turn(p.key, blockIdx.x);
    meet_block();
    store_kv<K>(p.store, blockIdx.x);
}
extern "C" __global__ void __launch_bounds__(256) rope_store_f16(const __grid_constant__ TurnedParams p) { rope_store<KvF16>(p); }
extern "C" __global__ void __launch_bounds__(256) rope_store_f32(const __grid_constant__ TurnedParams p) { rope_store<KvF32>(p); }

/// Rows of a block, each of a token and one of the query heads that share keys: a warp has eight. HEAD: elements of a head, at
/// most, of which a lane has HEAD / 32.
constexpr u32 QUERY_ROWS = 64, WARP_QUERIES = 8;
/// Elements of keys that a step brings for all positions of a split, and values of a step.
constexpr u32 KEY_ELEMENTS = 8, VALUE_ELEMENTS = 2048;

/// Eight stored numbers on their way.
template <class K> struct Eight {
    typename K::T x[8];
    DEVICE void load(Eight &to, const typename K::T *from, bool here) {
        for (int i = 0; i < (int)sizeof(to) / 16; i++)
            ((uint4 *)to.x)[i] = here ? ((const uint4 *)from)[i] : uint4{0, 0, 0, 0};
    }
};

/// One block of 256 threads for each (split, key/value head, as many tokens as have QUERY_ROWS query heads). Keys and values
/// are read once for all rows; each row's sums have the one order of docs/numerics.md §4.
template <class K, u32 HEAD> DEVICE void attention_rows(const AttentionParams &p) {
    DYNAMIC_SHARED(float, shared, 16);
    typedef typename K::T T;
    constexpr u32 PER_LANE = HEAD / 32, VALUE_STEP = VALUE_ELEMENTS / HEAD;
    const CacheLayer &c = p.cache;
    u32 t = threadIdx.x, warp = t >> 5, lane = t & 31;
    u32 group = p.heads / c.kv_heads, kv_head = blockIdx.y, tile = QUERY_ROWS / group;
    u32 begin = p.first_token + blockIdx.z * tile, stop = min(begin + tile, p.first_token + p.tokens);
    u32 base = blockIdx.x * SPLIT;
    // [element][row]; [warp][position][row of the warp]; two stages of keys [element][position] or values [position][element].
    float *queries = shared, *weights = queries + HEAD * QUERY_ROWS + warp * SPLIT * WARP_QUERIES;
    float *stages = queries + HEAD * QUERY_ROWS + QUERY_ROWS * SPLIT;
    // Tokens that follow each other in one sequence; mostly, all.
    for (u32 start = begin, end; start < stop; start = end) {
        u32 sequence = p.rows[start].sequence, position = p.rows[start].position;
        // QUERY_ROWS less the first one that does not follow.
        u32 broken = 0;
        for (u32 i = lane; i < stop - start; i += 32)
            if (p.rows[start + i].sequence != sequence || p.rows[start + i].position != position + i)
                broken = max(broken, QUERY_ROWS - i);
        broken = largest_of_warp(broken);
        end = broken ? start + QUERY_ROWS - broken : stop;
        u32 first = max(first_visible(p, position), base), last = min(position + (end - start) - 1, base + SPLIT - 1);
        if (first > last) continue;
        u32 rows = (end - start) * group;
        // What the tokens before have left in shared memory is done with.
        meet_block();
        {
            // A thread has four elements of one row at a time.
            u32 row = t % QUERY_ROWS, token = start + row / group, head = kv_head * group + row % group;
            const float4 *from = (const float4 *)(p.query + ((size_t)token * p.heads + head) * c.head_dim);
#pragma unroll
            for (u32 i = 0; i < HEAD / 16; i++) {
                u32 element = 4 * (t / QUERY_ROWS) + 16 * i;
                if (element >= c.head_dim) break;
                float4 x = row < rows ? from[element / 4] : float4{0.0f, 0.0f, 0.0f, 0.0f};
                float *q = queries + element * QUERY_ROWS + row;
                q[0] = x.x, q[QUERY_ROWS] = x.y, q[2 * QUERY_ROWS] = x.z, q[3 * QUERY_ROWS] = x.w;
            }
        }
        const T *keys = keys_of<K>(c, sequence, kv_head), *values = keys + (size_t)c.padded * c.positions;
        float s[WARP_QUERIES][8];
#pragma unroll
        for (u32 j = 0; j < WARP_QUERIES; j++)
#pragma unroll
            for (u32 i = 0; i < 8; i++) s[j][i] = 0.0f;
        Eight<K> next;
        bool stored = base + t >= first && base + t <= last;
        Eight<K>::load(next, keys + key_at(c, base + t, 0), stored);
#pragma unroll 1
        for (u32 element = 0, stage = 0; element < c.head_dim; element += KEY_ELEMENTS, stage ^= 1) {
            float *k = stages + stage * (KEY_ELEMENTS * SPLIT);
            for (u32 i = 0; i < KEY_ELEMENTS; i++) k[i * SPLIT + t] = K::widen(next.x[i]);
            meet_block();
            bool more = stored && element + KEY_ELEMENTS < c.head_dim;
            if (more) Eight<K>::load(next, keys + key_at(c, base + t, element + KEY_ELEMENTS), true);
#pragma unroll
            for (u32 n = 0; n < KEY_ELEMENTS; n++) {
                const float *q = queries + (element + n) * QUERY_ROWS + warp * WARP_QUERIES;
                float4 low = *(const float4 *)q, high = *(const float4 *)(q + 4);
                float of_rows[WARP_QUERIES] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
                for (u32 i = 0; i < 8; i++) {
                    float x = k[n * SPLIT + 32 * i + lane];
#pragma unroll
                    for (u32 j = 0; j < WARP_QUERIES; j++) s[j][i] = fma(of_rows[j], x, s[j][i]);
                }
            }
        }
        // Row by row, so that the code is there once: the rows move up, and what a row has become goes to the end.
#pragma unroll 1
        for (u32 j = 0; j < WARP_QUERIES; j++) {
            u32 row = warp * WARP_QUERIES + j, token = start + min(row, rows - 1) / group;
            u32 own_last = position + (token - start), own_first = first_visible(p, own_last);
            float x[8], m = -INFINITY;
            for (u32 i = 0; i < 8; i++) x[i] = mul(s[0][i], p.scale);
            if (p.capped)
                for (u32 i = 0; i < 8; i++) x[i] = soft_capped(x[i], p.cap);
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                u32 at = base + 32 * i + lane;
                if (at >= own_first && at <= own_last && x[i] > m) m = x[i];
            }
            for (int h = 16; h > 0; h >>= 1) {
                float other = shuffle_xor(m, h);
                m = other > m ? other : m;
            }
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                u32 at = base + 32 * i + lane;
                x[i] = at >= own_first && at <= own_last ? exponential(sub(x[i], m)) : 0.0f;
            }
            // dot64's order: a lane has two accumulators, 32 apart.
            float even = 0.0f, odd = 0.0f;
            for (u32 i = 0; i < 8; i += 2) even = add(even, x[i]), odd = add(odd, x[i + 1]);
            float l = add(even, odd);
            for (int h = 16; h > 0; h >>= 1) l = add(l, shuffle_xor(l, h));
            // A split that the row does not see is not looked at when splits merge.
            if (lane == 0 && row < rows) {
                u32 head = kv_head * group + row % group;
                p.sums[((size_t)(token - p.first_token) * p.heads + head) * p.splits + blockIdx.x] = make_float2(m, l);
            }
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
#pragma unroll
                for (u32 k = 0; k + 1 < WARP_QUERIES; k++) s[k][i] = s[k + 1][i];
                s[WARP_QUERIES - 1][i] = x[i];
            }
        }
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            float4 *w = (float4 *)(weights + (32 * i + lane) * WARP_QUERIES);
            w[0] = float4{s[0][i], s[1][i], s[2][i], s[3][i]};
            w[1] = float4{s[4][i], s[5][i], s[6][i], s[7][i]};
        }
        float o[WARP_QUERIES][PER_LANE];
#pragma unroll
        for (u32 j = 0; j < WARP_QUERIES; j++)
            for (u32 i = 0; i < PER_LANE; i++) o[j][i] = 0.0f;
        u32 place = 8 * t / HEAD, element = 8 * t % HEAD;
        bool within = element < c.padded;
        Eight<K>::load(next, values + (size_t)(first + place) * c.padded + element, within && first + place <= last);
        // Keys are done with; the weights of a warp are its own.
        meet_block();
#pragma unroll 1
        for (u32 from = first, stage = 0; from <= last; from += VALUE_STEP, stage ^= 1) {
            float *v = stages + stage * VALUE_ELEMENTS;
            for (u32 i = 0; i < 8; i++) v[8 * t + i] = K::widen(next.x[i]);
            meet_block();
            u32 ahead = from + VALUE_STEP + place;
            Eight<K>::load(next, values + (size_t)ahead * c.padded + element, within && ahead <= last);
            // Positions past the last one have no weight and values of zero.
            u32 steps = min(VALUE_STEP, base + SPLIT - from);
#pragma unroll 4
            for (u32 n = 0; n < steps; n++) {
                const float *w = weights + (from - base + n) * WARP_QUERIES;
                float4 low = *(const float4 *)w, high = *(const float4 *)(w + 4);
                float of_rows[WARP_QUERIES] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
                float x[PER_LANE];
                for (u32 i = 0; i < PER_LANE; i++) x[i] = v[n * HEAD + lane * PER_LANE + i];
#pragma unroll
                for (u32 j = 0; j < WARP_QUERIES; j++)
                    for (u32 i = 0; i < PER_LANE; i++) o[j][i] = fma(of_rows[j], x[i], o[j][i]);
            }
        }
#pragma unroll
        for (u32 j = 0; j < WARP_QUERIES; j++) {
            u32 row = warp * WARP_QUERIES + j;
            if (row >= rows) break;
            u32 token = start + row / group - p.first_token, head = kv_head * group + row % group;
            float *out = p.partial + (((size_t)token * p.heads + head) * p.splits + blockIdx.x) * c.head_dim;
            for (u32 i = 0; i < PER_LANE; i++)
                if (lane * PER_LANE + i < c.head_dim) out[lane * PER_LANE + i] = o[j][i];
        }
    }
}

#define ATTENTION_ROWS(name, K, HEAD)                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                               \
        attention_rows_##name##_##HEAD(const __grid_constant__ AttentionParams p) {                                    \
        attention_rows<K, HEAD>(p);                                                                                    \
    }
ATTENTION_ROWS(f16, KvF16, 64)
ATTENTION_ROWS(f16, KvF16, 128)
ATTENTION_ROWS(f32, KvF32, 64)
ATTENTION_ROWS(f32, KvF32, 128)

} // namespace hoist
