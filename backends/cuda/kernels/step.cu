// One token through a whole decoder of the llama kind in one launch: a persistent grid, one block a multiprocessor, whose
// producer warp streams every matrix through shared memory by bulk copies and runs ahead across phases, since the addresses
// of weights depend on nothing. Consumer warps multiply, one 256-weight segment a lane. Phases are separated by a barrier
// of the grid; norms and quantisation are repeated by every block, which is cheaper than another barrier.
//
// ptx: compute_90

#include "decode.cuh"

namespace hoist {

constexpr int WARPS = 16, CONSUMERS = WARPS * 32, THREADS = CONSUMERS + 32;
/// Bytes of a slot of the ring: a piece of 32 segments of Q4_K, or of as many as fit of another encoding.
constexpr u32 SLOT = 4640;
/// A quantised activation segment in shared memory: codes, and what goes with them. Odd multiples of 16 bytes, so that lanes
/// that read neighbouring segments use different banks.
constexpr u32 CODES = 272, META = 80;
constexpr u32 SPLIT = 256;
/// Bytes for stored values in shared memory: whole positions, in two halves that take turns.
constexpr u32 VALUES = 32768;
/// Splits that the consumer of attention merges by itself; more are merged by a phase of their own.
constexpr u32 MERGED_SPLITS = 8;

enum Kind : u32 { PRODUCT = 0, ATTENTION = 1 };
enum Prologue : u32 { NORM = 0, PLAIN = 1, MERGE = 2 };
enum Epilogue : u32 { STORE = 0, RESIDUAL = 1, SILU = 2, GELU = 3 };
enum Coding : u32 { CODE_Q4_K = 0, CODE_Q5_K = 1, CODE_Q6_K = 2, CODE_Q8_0 = 3 };

struct StepMatrix {
    const u8 *weight;
    const i16 *exponents;
    const float *bias;
    float *out;
    u32 rows, coding, step, pad;
};

struct ProductPhase {
    const float *input, *norm, *residual;
    u32 prologue, epilogue, matrices, segments;
    /// ceil(2^32 / segments)
    u32 magic;
    float eps;
    u32 quantise_step, pad;
    StepMatrix matrix[3];
};

struct AttentionPhase {
    const float *query, *key, *value, *table;
    float *out;
    u16 *cache;
    u32 kv_heads, head_dim, padded, positions;
    u32 heads, n_rot, half_split, window;
    float scale, cap;
    u32 capped, store_step;
};

struct Phase {
    u32 kind, pad[3];
    union {
        ProductPhase product;
        AttentionPhase attention;
    };
};
static_assert(sizeof(StepMatrix) == 48);
static_assert(sizeof(ProductPhase) == 200);
static_assert(sizeof(AttentionPhase) == 96);
static_assert(sizeof(Phase) == 216);

struct StepParams {
    const Phase *phases;
    const Row *row;
    u32 *arrived, *fault;
    float2 *sums;
    float *partial;
    /// Clock of the first block's multiprocessor at four points of each phase, then nanoseconds at the start and the end.
    u64 *times;
    u32 count, splits, slots, row_limit, segment_limit, pad;
};
static_assert(sizeof(StepParams) == 80);

// ---- shared memory ----

struct Shared {
    u64 *full, *empty;
    Phase *phases;
    float *scratch;
    i64 *sums;
    i16 *exponents;
    u8 *codes, *meta;
    /// Stored values of attention, on their way.
    u16 *values;
    u8 *ring;
};

/// As `shared_bytes` in src/decode/persistent.rs counts it.
DEVICE Shared lay_out(u8 *base, const StepParams &p) {
    Shared s;
    s.full = (u64 *)base, base += p.slots * 8;
    s.empty = (u64 *)base, base += p.slots * 8;
    base = (u8 *)(((u64)base + 15) & ~15ull);
    s.phases = (Phase *)base, base += 2 * 224;
    s.scratch = (float *)base, base += 320 * 4;
    s.sums = (i64 *)base, base += p.row_limit * 8;
    s.exponents = (i16 *)base, base += (p.row_limit * 2 + 15) & ~15u;
    s.codes = base, base += p.segment_limit * CODES;
    s.meta = base, base += p.segment_limit * META;
    s.values = (u16 *)base, base += VALUES;
    base = (u8 *)(((u64)base + 127) & ~127ull);
    s.ring = base;
    return s;
}

/// Waits for all consumer warps of this block.
DEVICE void meet() { meet_threads<1, CONSUMERS>(); }

/// Waits for the consumers of all blocks, the `number`th time (from 1).
DEVICE void meet_grid(u32 *arrived, u32 number) {
    meet();
    if (threadIdx.x == 0) {
        release_add(arrived, 1);
        await_at_least(arrived, number * gridDim.x);
    }
    meet();
}

// ---- what a block does of a phase ----

struct Range {
    u32 first, count;
};

/// The rows of a matrix that this block multiplies.
DEVICE Range rows_of(u32 rows) {
    u32 first = (u32)((u64)rows * blockIdx.x / gridDim.x), last = (u32)((u64)rows * (blockIdx.x + 1) / gridDim.x);
    return Range{first, last - first};
}

DEVICE u32 segment_bytes(u32 coding) {
    return coding == CODE_Q4_K ? 144 : coding == CODE_Q5_K ? 176 : coding == CODE_Q6_K ? 210 : 272;
}

/// Segments of a piece.
DEVICE u32 piece_of(u32 coding) { return coding == CODE_Q4_K ? 32 : coding == CODE_Q5_K ? 26 : coding == CODE_Q6_K ? 21 : 17; }

// ---- the producer ----

DEVICE void produce(const StepParams &p, const Shared &s) {
    u32 slot = 0, parity = 1;
    for (u32 i = 0; i < p.count; i++) {
        const Phase *phase = p.phases + i;
        if (phase->kind != PRODUCT) continue;
        const ProductPhase &product = phase->product;
        for (u32 m = 0; m < product.matrices; m++) {
            const StepMatrix &matrix = product.matrix[m];
            Range rows = rows_of(matrix.rows);
            u32 bytes = segment_bytes(matrix.coding), piece = piece_of(matrix.coding);
            u32 total = rows.count * product.segments;
            const u8 *from = matrix.weight + (u64)rows.first * product.segments * bytes;
            for (u32 at = 0; at < total; at += piece) {
                u64 start = (u64)from + (u64)at * bytes, end = start + min(piece, total - at) * bytes;
                // Bulk copies start and end at multiples of 16; what is read beside the piece is this weight's own, or its
                // padding.
                start &= ~15ull, end = (end + 15) & ~15ull;
                barrier_wait(s.empty + slot, parity);
                barrier_expect(s.full + slot, (u32)(end - start));
                bulk_copy(s.ring + slot * SLOT, (const u8 *)start, (u32)(end - start), s.full + slot);
                if (++slot == p.slots) slot = 0, parity ^= 1;
            }
        }
    }
}

// ---- activations ----

/// The largest of `x` over the consumers; `scratch` has a place for each warp.
DEVICE int consumer_max(int x, int *scratch) {
    for (int h = 16; h > 0; h >>= 1) x = max(x, shuffle_xor(x, h));
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = x;
    meet();
    x = scratch[0];
    for (int w = 1; w < WARPS; w++) x = max(x, scratch[w]);
    return x;
}

/// Quantises a segment (§1.1): a warp, eight elements a lane. Returns e_a.
DEVICE int quantise_segment(const float v[8], u8 *codes, u8 *meta, u32 *fault, u32 step) {
    u32 lane = threadIdx.x & 31, a = 0;
    for (int i = 0; i < 8; i++) a = max(a, bits_of(v[i]) & 0x7fffffffu);
    a = max(a, shuffle_xor(a, 1));
    a = max(a, shuffle_xor(a, 2));
    u32 all = a;
    for (int h = 4; h < 32; h <<= 1) all = max(all, shuffle_xor(all, h));
    if (all >= 0x7f800000u) {
        if (lane == 0) report(fault, step);
        all = a = 0;
    }
    float d0 = quotient(f32_of_bits(all), 2032.0f);
    int m = 0, e = -133, u = 1, sum = 0;
    u32 words[2] = {0, 0};
    if (bits_of(d0) >= 0x00800000u) {
        u32 bits = (bits_of(d0) + 0xffffu) & 0xffff0000u;
        float d = f32_of_bits(bits);
        m = bits >> 16 & 0x7f | 0x80;
        e = (int)(bits >> 23) - 134;
        int below = 0;
        for (int by = 8; by > 0; by >>= 1)
            if (f32_of_bits(a) > mul((float)((below + by) * 127), d)) below += by;
        u = below + 1;
        float r = quotient(1.0f, mul((float)u, d));
        for (int i = 0; i < 8; i++) {
            int q = i32_of_f32(mul(v[i], r));
            sum += q;
            words[i >> 2] |= (u32)(u8)q << 8 * (i & 3);
        }
    }
    *(uint2 *)(codes + lane * 8) = make_uint2(words[0], words[1]);
    sum += shuffle_xor(sum, 1);
    if ((lane & 1) == 0) *(i16 *)(meta + 32 + lane) = sum;
    sum += shuffle_xor(sum, 2);
    if ((lane & 3) == 0) *(int *)(meta + lane) = u * sum, meta[64 + (lane >> 2)] = u;
    if (lane == 0) *(int2 *)(meta + 72) = make_int2(m, e);
    return e;
}

DEVICE void load8(const float *from, float v[8]) {
    float4 low = load_shared_cache((const float4 *)from), high = load_shared_cache((const float4 *)from + 1);
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

/// 1 / rms of the input (§4), by all consumers.
DEVICE float inverse_rms(const float *x, u32 n, float eps, float *scratch) {
    u32 t = threadIdx.x;
    if (t < 256) {
        float acc = 0.0f;
#pragma unroll 8
        for (u32 i = t; i < n; i += 256) {
            float y = load_shared_cache(x + i);
            acc = fma(y, y, acc);
        }
        scratch[t] = acc;
    }
    meet();
    if (t < 32) {
        // h = 128, 64 and 32: a lane has eight accumulators, 32 apart.
        float a[8];
        for (int i = 0; i < 8; i++) a[i] = scratch[t + 32 * i];
        for (int h = 4; h > 0; h >>= 1)
            for (int i = 0; i < h; i++) a[i] = add(a[i], a[i + h]);
        float y = a[0];
        for (int h = 16; h > 0; h >>= 1) y = add(y, shuffle_xor(y, h));
        if (t == 0) scratch[256] = quotient(1.0f, root(add(quotient(y, (float)n), eps)));
    }
    meet();
    return scratch[256];
}

/// Which positions a token sees.
DEVICE u32 first_visible(u32 window, u32 position) { return window && window <= position ? position + 1 - window : 0; }

/// Eight elements of the attention's result, from its splits.
DEVICE void merge8(const StepParams &p, const AttentionPhase &a, u32 first, u32 last, u32 at, float v[8]) {
    u32 head = at / a.head_dim, element = at % a.head_dim;
    const float2 *sums = p.sums + head * p.splits;
    const float *partial = p.partial + (size_t)head * p.splits * a.head_dim + element;
    float m = -INFINITY, l = 0.0f;
    for (u32 s = first; s <= last; s++) {
        float x = load_shared_cache(&sums[s]).x;
        m = x > m ? x : m;
    }
    for (int i = 0; i < 8; i++) v[i] = 0.0f;
    for (u32 s = first; s <= last; s++) {
        float2 sum = load_shared_cache(&sums[s]);
        float f = exponential(sub(sum.x, m)), o[8];
        l = fma(sum.y, f, l);
        load8(partial + (size_t)s * a.head_dim, o);
        for (int i = 0; i < 8; i++) v[i] = fma(o[i], f, v[i]);
    }
    float r = quotient(1.0f, l);
    for (int i = 0; i < 8; i++) v[i] = mul(v[i], r);
}

/// Brings the input of a product into shared memory as integers. Returns E_a.
DEVICE int prepare_input(const StepParams &p, const Shared &s, const ProductPhase &product, const AttentionPhase &attention,
                         u32 position) {
    u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    u32 prologue = product.prologue, first = 0, last = 0;
    float inv = 0.0f;
    if (prologue == NORM) inv = inverse_rms(product.input, product.segments * 256, product.eps, s.scratch);
    if (prologue == MERGE) {
        first = first_visible(attention.window, position) / SPLIT, last = position / SPLIT;
        if (last - first >= MERGED_SPLITS) prologue = PLAIN;
    }
    int e = -133;
    for (u32 segment = warp; segment < product.segments; segment += WARPS) {
        u32 at = segment * 256 + lane * 8;
        float v[8];
        if (prologue == MERGE) {
            merge8(p, attention, first, last, at, v);
        } else {
            load8(product.input + at, v);
        }
        if (prologue == NORM) {
            float g[8];
            load8(product.norm + at, g);
            for (int i = 0; i < 8; i++) v[i] = mul(mul(v[i], inv), g[i]);
        }
        e = max(e, quantise_segment(v, s.codes + segment * CODES, s.meta + segment * META, p.fault, product.quantise_step));
    }
    return consumer_max(e, (int *)s.scratch + 260);
}

// ---- products of segments ----

/// An activation segment's block of 32.
struct Input {
    const u8 *codes, *meta;
    DEVICE void load(const u8 *codes, int j, int q[8]) {
        const int4 *from = (const int4 *)(codes + 32 * j);
        int4 a = from[0], b = from[1];
        q[0] = a.x, q[1] = a.y, q[2] = a.z, q[3] = a.w, q[4] = b.x, q[5] = b.y, q[6] = b.z, q[7] = b.w;
    }
};

DEVICE int byte_of(u32 word, int i) { return word >> 8 * i & 255; }

DEVICE i64 shifted(int scale, int sum, int by) { return ((i64)scale * sum) >> min(by, 63); }

/// Q4_K and Q5_K.
template <bool FIFTHS> DEVICE i64 product_k(const u8 *p, const u8 *codes, const u8 *meta, int ew, int ea) {
    uint4 head = *(const uint4 *)p;
    u32 sub[2] = {head.y & 0x3f3f3f3f, (head.w & 0x0f0f0f0f) | (head.y >> 2 & 0x30303030)};
    u32 low[2] = {head.z & 0x3f3f3f3f, (head.w >> 4 & 0x0f0f0f0f) | (head.z >> 2 & 0x30303030)};
    uint4 tail = *(const uint4 *)(meta + 64);
    u32 u[2] = {tail.x, tail.y};
    u32 high[8];
    if (FIFTHS) {
        uint4 a = *(const uint4 *)(p + 16), b = *(const uint4 *)(p + 32);
        high[0] = a.x, high[1] = a.y, high[2] = a.z, high[3] = a.w, high[4] = b.x, high[5] = b.y, high[6] = b.z, high[7] = b.w;
    }
    int i = 0, k = 0;
#pragma unroll
    for (int g = 0; g < 4; g++) {
        const uint4 *from = (const uint4 *)(p + (FIFTHS ? 48 : 16) + 32 * g);
        uint4 a = from[0], b = from[1];
        u32 w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        int q0[8], q1[8], d0 = 0, d1 = 0;
        Input::load(codes, 2 * g, q0), Input::load(codes, 2 * g + 1, q1);
#pragma unroll
        for (int n = 0; n < 8; n++) {
            u32 w0 = w[n] & 0x0f0f0f0f, w1 = w[n] >> 4 & 0x0f0f0f0f;
            if (FIFTHS) {
                w0 |= (high[n] >> 2 * g & 0x01010101) << 4;
                w1 |= (high[n] >> (2 * g + 1) & 0x01010101) << 4;
            }
            d0 = dot4(w0, q0[n], d0), d1 = dot4(w1, q1[n], d1);
        }
        int j = 2 * g;
        i += d0 * (byte_of(sub[j >> 2], j & 3) * byte_of(u[j >> 2], j & 3));
        j++;
        i += d1 * (byte_of(sub[j >> 2], j & 3) * byte_of(u[j >> 2], j & 3));
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int4 us = *(const int4 *)(meta + 16 * h);
        k += us.x * byte_of(low[h], 0) + us.y * byte_of(low[h], 1) + us.z * byte_of(low[h], 2) + us.w * byte_of(low[h], 3);
    }
    int m = tail.z, shift = ea - (int)tail.w;
    u16 d = head.x, dmin = head.x >> 16;
    return shifted(m * significand(d), i, ew - exponent_of(d) + shift) -
           shifted(m * significand(dmin), k, ew - exponent_of(dmin) + shift);
}

/// The word at byte `at` of a segment that starts at an even address: `base` is that address rounded down to 4, `odd` what
/// was cut off, in bits.
DEVICE u32 word_at(const u32 *base, u32 odd, int at) { return funnel_right(base[at / 4], base[at / 4 + 1], odd); }

DEVICE i64 product_q6_k(const u8 *p, const u8 *codes, const u8 *meta, int ew, int ea) {
    const u32 *base = (const u32 *)((u64)p & ~3ull);
    u32 odd = ((u64)p & 2) * 8;
    uint4 tail = *(const uint4 *)(meta + 64);
    u32 u[2] = {tail.x, tail.y};
    int i = 0;
#pragma unroll
    for (int g = 0; g < 2; g++) {
        // Blocks 4g … 4g + 3, the halves of each in turn.
        int d[4][2] = {};
#pragma unroll
        for (int n = 0; n < 8; n++) {
            u32 a = word_at(base, odd, 64 * g + 4 * n), b = word_at(base, odd, 64 * g + 32 + 4 * n);
            u32 h = word_at(base, odd, 128 + 32 * g + 4 * n);
            const u8 *q = codes + 128 * g + 4 * n;
            d[0][n >> 2] = dot4((a & 0x0f0f0f0f) | (h << 4 & 0x30303030), *(const int *)q, d[0][n >> 2]);
            d[1][n >> 2] = dot4((b & 0x0f0f0f0f) | (h << 2 & 0x30303030), *(const int *)(q + 32), d[1][n >> 2]);
            d[2][n >> 2] = dot4((a >> 4 & 0x0f0f0f0f) | (h & 0x30303030), *(const int *)(q + 64), d[2][n >> 2]);
            d[3][n >> 2] = dot4((b >> 4 & 0x0f0f0f0f) | (h >> 2 & 0x30303030), *(const int *)(q + 96), d[3][n >> 2]);
        }
        uint4 sums = *(const uint4 *)(meta + 32 + 16 * g);
        u32 halves[4] = {sums.x, sums.y, sums.z, sums.w};
        u32 subs[2] = {word_at(base, odd, 192 + 8 * g), word_at(base, odd, 196 + 8 * g)};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int both = 0;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int n = 2 * j + h;
                int sub = (i8)byte_of(subs[n >> 2], n & 3), sum = (i16)(halves[j] >> 16 * h);
                both += sub * (d[j][h] - 32 * sum);
            }
            i += both * byte_of(u[g], j);
        }
    }
    u16 scale = (u16)word_at(base, odd, 208);
    return shifted((int)tail.z * significand(scale), i, ew - exponent_of(scale) + ea - (int)tail.w);
}

DEVICE i64 product_q8_0(const u8 *p, const u8 *codes, const u8 *meta, int ew, int ea) {
    uint4 tail = *(const uint4 *)(meta + 64);
    u32 u[2] = {tail.x, tail.y};
    const u32 *base = (const u32 *)p;
    int m[8], e[8], most = -1000;
    i64 dots[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        u16 scale = *(const u16 *)(p + 34 * j);
        m[j] = significand(scale), e[j] = exponent_of(scale);
        most = max(most, e[j]);
        int q[8], d = 0, at = 34 * j + 2;
        Input::load(codes, j, q);
#pragma unroll
        for (int n = 0; n < 8; n++) d = dot4(word_at(base, (at & 2) * 8, at + 4 * n - (at & 2)), q[n], d);
        dots[j] = (i64)d * byte_of(u[j >> 2], j & 3);
    }
    i64 sum = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) sum += dots[j] * ((m[j] * 256) >> min(most - e[j], 31));
    return ((i64)(int)tail.z * sum) >> min(ew - (most - 8) + ea - (int)tail.w, 63);
}

DEVICE i64 product(u32 coding, const u8 *p, const u8 *codes, const u8 *meta, int ew, int ea) {
    switch (coding) {
    case CODE_Q4_K: return product_k<false>(p, codes, meta, ew, ea);
    case CODE_Q5_K: return product_k<true>(p, codes, meta, ew, ea);
    case CODE_Q6_K: return product_q6_k(p, codes, meta, ew, ea);
    default: return product_q8_0(p, codes, meta, ew, ea);
    }
}

/// Where a warp is in the ring: its next piece, that piece's slot and parity.
struct Place {
    u32 next, slot, parity;
};

/// Multiplies this block's rows of a matrix and adds to their sums. `begin` counts the pieces before it.
DEVICE void multiply(const StepParams &p, const Shared &s, const ProductPhase &product_phase, const StepMatrix &matrix, u32 &begin,
                     u32 first_sum, int ea, Place &place) {
    u32 lane = threadIdx.x & 31, coding = matrix.coding;
    u32 bytes = segment_bytes(coding), piece = piece_of(coding), segments = product_phase.segments;
    Range rows = rows_of(matrix.rows);
    u32 total = rows.count * segments, pieces = (total + piece - 1) / piece, end = begin + pieces;
    u64 from = (u64)matrix.weight + (u64)rows.first * segments * bytes;
    for (; place.next < end; place.next += WARPS) {
        u32 at = (place.next - begin) * piece, segment = at + lane;
        bool here = lane < piece && segment < total;
        u32 row = high_product(segment, product_phase.magic);
        if (segments == 1) row = segment;
        u32 column = segment - row * segments;
        barrier_wait(s.full + place.slot, place.parity);
        i64 term = 0;
        if (here) {
            // The copy began at a multiple of 16.
            const u8 *weights = s.ring + place.slot * SLOT + ((from + (u64)at * bytes) & 15) + lane * bytes;
            int ew = s.exponents[first_sum + row];
            term = product(coding, weights, s.codes + column * CODES, s.meta + column * META, ew, ea);
        } else {
            row = 0xffffffffu;
        }
        meet_warp();
        if (lane == 0) barrier_arrive(s.empty + place.slot);
        // Lanes of one row follow each other: the first of them gets their sum.
        for (int by = 1; by < 32; by <<= 1) {
            i64 other = shuffle_down(term, by);
            u32 there = shuffle_down(row, by);
            if (lane + by < 32 && there == row) term += other;
        }
        u32 before = shuffle_up(row, 1);
        if (here && (lane == 0 || before != row)) atomic_add((u64 *)s.sums + first_sum + row, (u64)term);
        place.slot += WARPS;
        if (place.slot >= p.slots) place.slot -= p.slots, place.parity ^= 1;
    }
    begin = end;
}

/// A row's result, its bias added.
DEVICE float result_of(const StepParams &p, const Shared &s, const StepMatrix &matrix, u32 sum, u32 row, int ea) {
    float y = scaled_sum(s.sums[sum], s.exponents[sum] + ea);
    if (!is_finite(y)) report(p.fault, matrix.step);
    return matrix.bias ? add(y, matrix.bias[row]) : y;
}

/// Points of a phase that are timed: its start, the input is ready, everything is multiplied, its results are written.
enum Point : u32 { START = 0, INPUT = 1, MULTIPLIED = 2, WRITTEN = 3 };

DEVICE void stamp(const StepParams &p, u32 phase, u32 point) {
    if (blockIdx.x == 0 && threadIdx.x == 0) p.times[phase * 4 + point] = cycles();
}

/// E_w of this block's `i`th row of a phase; `first` are the rows before each matrix.
DEVICE i16 exponent_at(const ProductPhase &product, const u32 first[4], u32 i) {
    u32 m = i < first[1] ? 0 : i < first[2] ? 1 : 2;
    const StepMatrix &matrix = product.matrix[m];
    return load_constant(matrix.exponents + rows_of(matrix.rows).first + i - (m == 0 ? 0 : m == 1 ? first[1] : first[2]));
}

DEVICE void run_product(const StepParams &p, const Shared &s, const ProductPhase &product, const AttentionPhase &attention,
                        u32 position, u32 phase, u32 &begin, Place &place) {
    u32 t = threadIdx.x;
    Range rows[3];
    u32 first[4] = {0, 0, 0, 0};
#pragma unroll
    for (u32 m = 0; m < 3; m++) {
        rows[m] = rows_of(m < product.matrices ? product.matrix[m].rows : 0);
        first[m + 1] = first[m] + rows[m].count;
        if (m < product.matrices)
            for (u32 i = t; i < rows[m].count; i += CONSUMERS) s.sums[first[m] + i] = 0;
    }
    // A block has few rows but for the logits: their exponents arrive while the input is prepared.
    u32 total = first[3];
    i16 exponent = t < total ? exponent_at(product, first, t) : 0;
    int ea = prepare_input(p, s, product, attention, position);
    if (t < total) s.exponents[t] = exponent;
    for (u32 i = t + CONSUMERS; i < total; i += CONSUMERS) s.exponents[i] = exponent_at(product, first, i);
    meet();
    stamp(p, phase, INPUT);
#pragma unroll 1
    for (u32 m = 0; m < product.matrices; m++) multiply(p, s, product, product.matrix[m], begin, first[m], ea, place);
    meet();
    stamp(p, phase, MULTIPLIED);
    if (product.epilogue >= SILU) {
        // Both matrices have the same rows, so this block has both results.
        for (u32 i = t; i < rows[0].count; i += CONSUMERS) {
            u32 row = rows[0].first + i;
            float gate = result_of(p, s, product.matrix[0], i, row, ea);
            float up = result_of(p, s, product.matrix[1], first[1] + i, row, ea);
            float active = product.epilogue == SILU ? silu(gate) : gelu_tanh(gate);
            product.matrix[0].out[row] = mul(active, up);
        }
        return;
    }
    for (u32 i = t; i < first[3]; i += CONSUMERS) {
        u32 m = i < first[1] ? 0 : i < first[2] ? 1 : 2;
        const StepMatrix &matrix = product.matrix[m];
        u32 row = rows_of(matrix.rows).first + i - (m == 0 ? 0 : m == 1 ? first[1] : first[2]);
        float y = result_of(p, s, matrix, i, row, ea);
        if (product.epilogue == RESIDUAL) y = add(load_shared_cache(product.residual + row), y);
        matrix.out[row] = y;
    }
}

// ---- attention ----

/// Query heads of a task.
constexpr u32 PAIR = 2;

/// One element of a head after Rope.
DEVICE float turned(const float *x, u32 element, const float *table, u32 n_rot, u32 half_split) {
    if (element >= n_rot) return load_shared_cache(x + element);
    u32 half = n_rot / 2, j = half_split ? element % half : element / 2;
    bool second = half_split ? element >= half : element & 1;
    float x0 = load_shared_cache(x + (half_split ? j : 2 * j)), x1 = load_shared_cache(x + (half_split ? j + half : 2 * j + 1));
    float c = load_constant(table + 2 * j), sn = load_constant(table + 2 * j + 1);
    return second ? fma(x0, sn, mul(x1, c)) : fma(x0, c, -mul(x1, sn));
}

/// Starts to copy the `chunk`th run of `room` stored values, 16 bytes at a time. Every thread ends a group of copies, if an
/// empty one.
DEVICE void copy_values(const Shared &s, const u16 *values, u32 padded, u32 from, u32 stored, u32 room, u32 chunk) {
    u32 begin = min(from + chunk * room, stored), end = min(begin + room, stored);
    u16 *to = s.values + (chunk & 1) * (VALUES / 4);
    const u16 *v = values + (size_t)begin * padded;
    for (u32 i = threadIdx.x * 8; i < (end - begin) * padded; i += CONSUMERS * 8)
        copy_16(to + i, v + i);
    end_copies();
}

DEVICE void run_attention(const StepParams &p, const Shared &s, const AttentionPhase &a, u32 sequence, u32 position) {
    u32 t = threadIdx.x, hd = a.head_dim;
    u32 first = first_visible(a.window, position), first_split = first / SPLIT, last_split = position / SPLIT;
    u32 ns = last_split - first_split + 1, group = a.heads / a.kv_heads, pairs = (group + PAIR - 1) / PAIR;
    const float *table = a.table + (size_t)position * a.n_rot;
    // Where activations are between products: queries element by element, weights of each head, the new key and value.
    float *q = (float *)s.codes, *w = q + PAIR * hd, *key = w + PAIR * SPLIT, *value = key + hd, *scratch = s.scratch;
    for (u32 task = blockIdx.x; task < a.kv_heads * pairs * ns; task += gridDim.x) {
        u32 split = first_split + task % ns, kv_head = task / ns / pairs, pair = task / ns % pairs;
        u32 head = kv_head * group + pair * PAIR, n = min(PAIR, group - pair * PAIR), base = split * SPLIT;
        u16 *keys = a.cache + ((size_t)sequence * a.kv_heads + kv_head) * 2 * a.padded * a.positions;
        u16 *values = keys + (size_t)a.padded * a.positions;
        bool newest = split == last_split;
        u32 from = max(first, base) - base, stored = newest ? position - base : SPLIT;
        // Whole positions of a half of the room.
        u32 room = VALUES / 4 / a.padded, chunks = stored > from ? (stored - from + room - 1) / room : 0;
        meet();
        copy_values(s, values + (size_t)base * a.padded, a.padded, from, stored, room, 0);
        copy_values(s, values + (size_t)base * a.padded, a.padded, from, stored, room, 1);
        for (u32 i = t; i < 4 * hd; i += CONSUMERS) {
            u32 what = i / hd, element = i % hd;
            if (what < PAIR) {
                q[element * PAIR + what] =
                    what < n ? turned(a.query + (size_t)(head + what) * hd, element, table, a.n_rot, a.half_split) : 0.0f;
            } else if (newest) {
                float x = what == PAIR ? turned(a.key + (size_t)kv_head * hd, element, table, a.n_rot, a.half_split)
                                       : load_shared_cache(a.value + (size_t)kv_head * hd + element);
                u16 half = f16_of_f32(x);
                bool finite = (half & 0x7fff) < 0x7c00;
                if (!finite) report(p.fault, a.store_step);
                if (what == PAIR) {
                    key[element] = f32_of_f16(half);
                    size_t at = ((size_t)(position / 64) * (a.padded / 8) + element / 8) * 512 + position % 64 * 8 + element % 8;
                    if (finite && pair == 0) keys[at] = half;
                } else {
                    value[element] = f32_of_f16(half);
                    if (finite && pair == 0) values[(size_t)position * a.padded + element] = half;
                }
            }
        }
        meet();
        u32 at = base + t;
        bool visible = t < SPLIT && at >= first && at <= position;
        float x0 = 0.0f, x1 = 0.0f;
        if (visible && at == position) {
            for (u32 element = 0; element < hd; element++) {
                x0 = fma(q[element * 2], key[element], x0);
                x1 = fma(q[element * 2 + 1], key[element], x1);
            }
        } else if (visible) {
            const uint4 *from = (const uint4 *)(keys + (size_t)(at / 64) * a.padded * 64 + at % 64 * 8);
#pragma unroll 8
            for (u32 element = 0; element < hd; element += 8) {
                uint4 k = from[element * 8];
                u32 words[4] = {k.x, k.y, k.z, k.w};
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    float y = f32_of_f16((u16)(words[i >> 1] >> 16 * (i & 1)));
                    float2 queries = *(const float2 *)(q + (element + i) * 2);
                    x0 = fma(queries.x, y, x0), x1 = fma(queries.y, y, x1);
                }
            }
        }
        x0 = mul(x0, a.scale), x1 = mul(x1, a.scale);
        if (a.capped) x0 = soft_capped(x0, a.cap), x1 = soft_capped(x1, a.cap);
        float m0 = visible ? x0 : -INFINITY, m1 = visible ? x1 : -INFINITY;
        for (int h = 16; h > 0; h >>= 1) {
            float y0 = shuffle_xor(m0, h), y1 = shuffle_xor(m1, h);
            m0 = y0 > m0 ? y0 : m0, m1 = y1 > m1 ? y1 : m1;
        }
        if ((t & 31) == 0 && t < SPLIT) scratch[t >> 5] = m0, scratch[8 + (t >> 5)] = m1;
        meet();
        m0 = scratch[0], m1 = scratch[8];
        for (int i = 1; i < 8; i++) {
            m0 = scratch[i] > m0 ? scratch[i] : m0;
            m1 = scratch[8 + i] > m1 ? scratch[8 + i] : m1;
        }
        if (t < SPLIT) {
            w[t] = visible ? exponential(sub(x0, m0)) : 0.0f;
            w[SPLIT + t] = visible ? exponential(sub(x1, m1)) : 0.0f;
        }
        meet();
        if (t >> 5 < n) {
            const float *x = w + (t >> 5) * SPLIT + (t & 31);
            float low = 0.0f, high = 0.0f;
            for (int i = 0; i < 4; i++) low = add(low, x[64 * i]), high = add(high, x[64 * i + 32]);
            float l = add(low, high);
            for (int h = 16; h > 0; h >>= 1) l = add(l, shuffle_xor(l, h));
            if ((t & 31) == 0) p.sums[(size_t)(head + (t >> 5)) * p.splits + split] = make_float2(t >> 5 ? m1 : m0, l);
        }
        float o = 0.0f;
        u32 h = t / hd, element = t % hd;
        const float *weights = w + (h < n ? h : 0) * SPLIT;
        for (u32 chunk = 0; chunk < chunks; chunk++) {
            u32 begin = from + chunk * room, stop = min(begin + room, stored);
            // Two groups of copies are under way; the older one is needed.
            await_copies_but<1>();
            meet();
            const u16 *v = s.values + (chunk & 1) * (VALUES / 4) + element;
            if (h < n) {
#pragma unroll 8
                for (u32 x = begin; x < stop; x++, v += a.padded) o = fma(weights[x], f32_of_f16(*v), o);
            }
            meet();
            copy_values(s, values + (size_t)base * a.padded, a.padded, from, stored, room, chunk + 2);
        }
        if (h < n) {
            if (newest) o = fma(weights[stored], value[element], o);
            p.partial[((size_t)(head + h) * p.splits + split) * hd + element] = o;
        }
        await_copies();
    }
}

/// Merges the splits of all heads where there are too many for every block to do it again.
DEVICE void run_merge(const StepParams &p, const AttentionPhase &a, u32 position) {
    u32 first = first_visible(a.window, position) / SPLIT, last = position / SPLIT;
    u32 eighths = a.heads * a.head_dim / 8;
    for (u32 i = blockIdx.x * CONSUMERS + threadIdx.x; i < eighths; i += gridDim.x * CONSUMERS) {
        float v[8];
        merge8(p, a, first, last, i * 8, v);
        *(float4 *)(a.out + i * 8) = make_float4(v[0], v[1], v[2], v[3]);
        *(float4 *)(a.out + i * 8 + 4) = make_float4(v[4], v[5], v[6], v[7]);
    }
}

// ---- a step ----

/// Copies the descriptor of a phase to shared memory, 54 words by one warp, without waiting for them.
DEVICE void fetch(const StepParams &p, const Shared &s, u32 phase) {
    if (phase >= p.count) return;
    const u32 *from = (const u32 *)(p.phases + phase);
    u32 *to = (u32 *)((u8 *)s.phases + (phase & 1) * 224);
    for (u32 i = threadIdx.x & 31; i < sizeof(Phase) / 4; i += 32) copy_4(to + i, from + i);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_step(const __grid_constant__ StepParams p) {
    DYNAMIC_SHARED(u8, memory, 128);
    Shared s = lay_out(memory, p);
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < p.slots; i++) barrier_init(s.full + i, 1), barrier_init(s.empty + i, 1);
        barriers_are_initialised();
    }
    if (threadIdx.x >> 5 == 1) fetch(p, s, 0), await_copies();
    meet_block();
    if (threadIdx.x >= CONSUMERS) {
        if (threadIdx.x == CONSUMERS) produce(p, s);
        return;
    }
    u32 warp = threadIdx.x >> 5;
    Place place = {warp, warp, 0};
    while (place.slot >= p.slots) place.slot -= p.slots, place.parity ^= 1;
    if (blockIdx.x == 0 && threadIdx.x == 0) p.times[p.count * 4] = nanoseconds();
    u32 begin = 0, meetings = 0;
    u32 sequence = p.row->sequence, position = p.row->position;
    /// The last attention, which the product after it may have to merge.
    SHARED(AttentionPhase, kept, );
    for (u32 i = 0; i < p.count; i++) {
        stamp(p, i, START);
        // The next descriptor arrives while this phase runs; the phase before last is done with its place.
        if (warp == WARPS - 1) fetch(p, s, i + 1);
        const Phase &phase = *(const Phase *)((u8 *)s.phases + (i & 1) * 224);
        if (phase.kind == ATTENTION) {
            if (threadIdx.x < sizeof(AttentionPhase) / 4) ((u32 *)&kept)[threadIdx.x] = ((const u32 *)&phase.attention)[threadIdx.x];
            run_attention(p, s, phase.attention, sequence, position);
            u32 splits = position / SPLIT - first_visible(phase.attention.window, position) / SPLIT;
            if (splits >= MERGED_SPLITS) {
                meet_grid(p.arrived, ++meetings);
                run_merge(p, phase.attention, position);
            }
        } else {
            run_product(p, s, phase.product, kept, position, i, begin, place);
        }
        stamp(p, i, WRITTEN);
        await_copies();
        if (i + 1 < p.count) meet_grid(p.arrived, ++meetings);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) p.times[p.count * 4 + 1] = nanoseconds();
    // The last block to get here leaves the counter as it was found. No block waits any more.
    if (threadIdx.x == 0) {
        u32 all = (meetings + 1) * gridDim.x;
        if (atomic_add(p.arrived, 1) == all - 1) *p.arrived = 0;
    }
}

} // namespace hoist
