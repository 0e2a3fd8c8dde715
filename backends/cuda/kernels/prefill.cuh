// Products of quantised matrices with many tokens on int8 tensor cores, with the bits of every other path.
//
// A block multiplies ROWS · 16 rows with NT · 8 tokens. Blocks of the same rows are neighbours, so that weights come from memory
// once. Each of its warps has 16 rows and all of the tokens, and one of the
// DEPTH segments that a step of the loop brings; partial sums of i64 merge at the end in any order. Raw weights and packed
// activations come by asynchronous copies, STAGES steps at once; a warp decodes its own rows straight into the fragments of
// the multiplication.
//
// Within a segment (docs/numerics.md §1.3), I = Σ_j c_j · u_j · dot_j. The accumulator of a multiplication starts at the bits
// of 1.5 · 2^23, so that the result, taken as f32, is 1.5 · 2^23 + dot: one fma makes 1.5 · 2^23 + f · dot of it, exact where
// |f · dot| < 2^22, for f one of c_j and u_j, and leaves one integer multiply-add with the other. What the bits of 1.5 · 2^23
// contribute is known beforehand.
#pragma once

#include "decode.cuh"

namespace hoist {

constexpr int PREFILL_WARPS = 8, PREFILL_THREADS = PREFILL_WARPS * 32;
/// Bytes of dynamic shared memory that any of these kernels takes.
constexpr u32 PREFILL_SHARED = 220 << 10;

// ---- packed activations ----
// [tokens / 8][segment] tiles. A token's record: for each pair of blocks and t = 0 … 3, weights 8t … 8t + 7 of the one and of
// the other (what a lane holds of a fragment); then lo, b and a of each block, where u_j · s_j = lo + 128 (b + 4a); m_a; E_a − e_a;
// and u_j · s_j itself. After the records, [pair of blocks][pair of tokens] the u of both tokens for the one block and for the
// other; and of each token what cancels the bits of 1.5 · 2^23 times its u.

constexpr u32 RECORD = 320;
constexpr u32 AT_LO = 256, AT_B = 264, AT_A = 272, AT_SCALE = 280, AT_SUMS = 288;
constexpr u32 AT_FACTORS = 8 * RECORD, AT_STARTS = AT_FACTORS + 256, TILE = AT_STARTS + 32;
static_assert(TILE % 16 == 0);
/// 1.5 · 2^23 as f32, and its bits.
constexpr float MAGIC = 12582912.0f;
constexpr u32 MAGIC_BITS = 0x4b400000u;

// ---- encodings ----
// BYTES of a segment; SLOT: its place in shared memory, a multiple of 16 that spreads rows over the banks; WIDE: scales are aligned
// within a segment and sums need 64 bits; FIRST: what dot is multiplied by as f32; RAISED: what codes lack, which the sums of q
// make good. `prepare`: for four blocks of a row (the lower or upper half of a segment), the factors c and mins of blocks.
// `fragments`: of blocks 2·pair and 2·pair + 1, weights 8t … 8t + 7.

enum First { SCALE, UNIT, NEITHER };

/// What `prepare` finds out.
struct Scales {
    int c[4];
    /// Of K encodings, four mins of 6 bits, and four sub-scales; of others, each min.
    u32 mins, subs;
    int k[4];
    /// Of the whole segment: significand and exponent of its scale and its mins.
    int m, e, mk, ek;
};

/// Eight bytes at any offset from an address that is a multiple of 4.
DEVICE uint2 eight_bytes(const u8 *base, u32 at) {
    const u32 *words = (const u32 *)(base + (at & ~3u));
    u32 a = words[0], b = words[1], c = words[2], by = (at & 3) * 8;
    return make_uint2(funnel_right(a, b, by), funnel_right(b, c, by));
}

/// Subtracts from bytes below 128 what keeps them above −128.
DEVICE u32 centred(u32 w, u32 zero) { return ((w | 0x80808080u) - zero * 0x01010101u) ^ 0x80808080u; }

/// Sub-scales and mins of four blocks from the 12 bytes of Q4_K and Q5_K.
DEVICE void packed_words(const u8 *p, u32 half, u32 &subs, u32 &mins) {
    const u32 *w = (const u32 *)p;
    if (half == 0) {
        subs = w[0] & 0x3f3f3f3f, mins = w[1] & 0x3f3f3f3f;
    } else {
        subs = (w[2] & 0x0f0f0f0f) | (w[0] >> 2 & 0x30303030);
        mins = (w[2] >> 4 & 0x0f0f0f0f) | (w[1] >> 2 & 0x30303030);
    }
}

DEVICE void prepare_packed(const u8 *row, u32 half, Scales &s) {
    packed_words(row + 4, half, s.subs, s.mins);
    for (int i = 0; i < 4; i++) s.c[i] = s.subs >> 8 * i & 255;
    u16 d = u16_at(row), dmin = u16_at(row + 2);
    s.m = significand(d), s.e = exponent_of(d), s.mk = significand(dmin), s.ek = exponent_of(dmin);
}

/// Sub-scale times dot stays below 2^22 with codes from −16 to 15.
struct TiledQ5_K {
    static constexpr int BYTES = 176, SLOT = 224;
    static constexpr bool WIDE = false, MINS = true;
    static constexpr First FIRST = SCALE;
    static constexpr int RAISED = 16;
    DEVICE void prepare(const u8 *row, u32 half, Scales &s) { prepare_packed(row, half, s); }
    DEVICE void fragments(const u8 *row, int pair, int t, uint2 w[2]) {
        uint2 q = *(const uint2 *)(row + 48 + 32 * pair + 8 * t), high = *(const uint2 *)(row + 16 + 8 * t);
        high.x >>= 2 * pair, high.y >>= 2 * pair;
        w[0] = make_uint2(centred((q.x & 0x0f0f0f0f) | (high.x << 4 & 0x10101010), 16),
                          centred((q.y & 0x0f0f0f0f) | (high.y << 4 & 0x10101010), 16));
        w[1] = make_uint2(centred((q.x >> 4 & 0x0f0f0f0f) | (high.x << 3 & 0x10101010), 16),
                          centred((q.y >> 4 & 0x0f0f0f0f) | (high.y << 3 & 0x10101010), 16));
    }
};

/// Scales of blocks of 32 as an encoding reads them, aligned within the segment with the help of the lane that has the other half.
template <class E> DEVICE void prepare_aligned(const u8 *row, u32 half, Scales &s) {
    Block b[4];
    int e = -1000, ek = -1000;
    for (int i = 0; i < 4; i++) {
        E::read(row, 4 * half + i, b[i]);
        e = max(e, b[i].e[0]), ek = max(ek, b[i].ek);
    }
    e = max(e, shuffle_xor(e, 1)), ek = max(ek, shuffle_xor(ek, 1));
    for (int i = 0; i < 4; i++) {
        s.c[i] = (b[i].c[0] * 256) >> min(e - b[i].e[0], 31);
        if (E::MINS) s.k[i] = (b[i].k[0] * 256) >> min(ek - b[i].ek, 31);
    }
    s.m = s.mk = 1, s.e = e - 8, s.ek = ek - 8;
}

/// Nibbles of 16 bytes: byte i holds weight i low and weight i + 16 high.
DEVICE uint2 nibbles_of(const u8 *row, u32 at, int t) {
    uint2 q = eight_bytes(row, at + 8 * (t & 1));
    u32 by = 4 * (t >> 1);
    return make_uint2(q.x >> by & 0x0f0f0f0f, q.y >> by & 0x0f0f0f0f);
}

/// Adds the fifth bits of weights 8t … 8t + 7.
DEVICE void add_fifths(uint2 &w, const u8 *row, u32 at, int t) {
    u32 bits = row[at + t];
    w.x |= fifths(bits), w.y |= fifths(bits >> 4);
}

struct TiledQ4_0 {
    static constexpr int BYTES = 144, SLOT = 160;
    static constexpr bool WIDE = true, MINS = false;
    static constexpr First FIRST = UNIT;
    static constexpr int RAISED = 0;
    DEVICE void prepare(const u8 *row, u32 half, Scales &s) { prepare_aligned<Q4_0>(row, half, s); }
    DEVICE void fragments(const u8 *row, int pair, int t, uint2 w[2]) {
        for (int h = 0; h < 2; h++) {
            uint2 q = nibbles_of(row, 36 * pair + 18 * h + 2, t);
            w[h] = make_uint2(centred(q.x, 8), centred(q.y, 8));
        }
    }
};

struct TiledQ4_1 {
    static constexpr int BYTES = 160, SLOT = 160;
    static constexpr bool WIDE = true, MINS = true;
    static constexpr First FIRST = UNIT;
    static constexpr int RAISED = 0;
    DEVICE void prepare(const u8 *row, u32 half, Scales &s) { prepare_aligned<Q4_1>(row, half, s); }
    DEVICE void fragments(const u8 *row, int pair, int t, uint2 w[2]) {
        for (int h = 0; h < 2; h++) w[h] = nibbles_of(row, 40 * pair + 20 * h + 4, t);
    }
};

struct TiledQ5_0 {
    static constexpr int BYTES = 176, SLOT = 224;
    static constexpr bool WIDE = true, MINS = false;
    static constexpr First FIRST = UNIT;
    static constexpr int RAISED = 0;
    DEVICE void prepare(const u8 *row, u32 half, Scales &s) { prepare_aligned<Q5_0>(row, half, s); }
    DEVICE void fragments(const u8 *row, int pair, int t, uint2 w[2]) {
        for (int h = 0; h < 2; h++) {
            u32 at = 44 * pair + 22 * h;
            uint2 q = nibbles_of(row, at + 6, t);
            add_fifths(q, row, at + 2, t);
            w[h] = make_uint2(centred(q.x, 16), centred(q.y, 16));
        }
    }
};

struct TiledQ5_1 {
    static constexpr int BYTES = 192, SLOT = 224;
    static constexpr bool WIDE = true, MINS = true;
    static constexpr First FIRST = UNIT;
    static constexpr int RAISED = 0;
    DEVICE void prepare(const u8 *row, u32 half, Scales &s) { prepare_aligned<Q5_1>(row, half, s); }
    DEVICE void fragments(const u8 *row, int pair, int t, uint2 w[2]) {
        for (int h = 0; h < 2; h++) {
            u32 at = 48 * pair + 24 * h;
            w[h] = nibbles_of(row, at + 8, t);
            add_fifths(w[h], row, at + 4, t);
        }
    }
};

/// u · dot reaches 2^23, so that it is an integer product.
struct TiledQ8_0 {
    static constexpr int BYTES = 272, SLOT = 288;
    static constexpr bool WIDE = true, MINS = false;
    static constexpr First FIRST = NEITHER;
    static constexpr int RAISED = 0;
    DEVICE void prepare(const u8 *row, u32 half, Scales &s) { prepare_aligned<Q8_0>(row, half, s); }
    DEVICE void fragments(const u8 *row, int pair, int t, uint2 w[2]) {
        for (int h = 0; h < 2; h++) w[h] = eight_bytes(row, 68 * pair + 34 * h + 2 + 8 * t);
    }
};

// ---- the kernel ----

/// Sums of a segment: 32 bits, or 64 where scales are wide.
template <bool WIDE> struct Wider {
    typedef int T;
    typedef u32 Unsigned;
};
template <> struct Wider<true> {
    typedef i64 T;
    typedef u64 Unsigned;
};

struct PrefillParams {
    /// Canonical bytes of the matrix; a multiple of 16.
    const u8 *weight;
    /// E_w of each row.
    const i16 *exponents;
    /// Packed activations, and E_a of each token, of whole tiles.
    const u8 *x;
    const int *vector_exponents;
    const float *bias;
    /// [tokens][rows]
    float *y;
    u32 *fault;
    u64 row_bytes;
    u32 step, rows, segments, tokens;
};
static_assert(sizeof(PrefillParams) == 80);

/// A warp's rows, prepared for a segment. Strides are odd so that rows lie in different banks.
template <class C> struct PreparedRows {
    /// As f32 where dot is multiplied by them first.
    int c[16][9];
    /// Wide mins of blocks; or four mins a word, and four sub-scales.
    int k[16][C::WIDE && C::MINS ? 9 : 4];
    /// Significands of scale and mins, and E_w less their exponents.
    int4 scale[16];
    /// What cancels the bits of 1.5 · 2^23 times c.
    i64 start[16];
};

template <class C, int NT, int ROWS> struct Prefill {
    static constexpr int DEPTH = PREFILL_WARPS / ROWS;
    static constexpr u32 WEIGHTS = PREFILL_WARPS * 16 * C::SLOT, ACTIVATIONS = NT * DEPTH * TILE;
    static constexpr u32 STAGE = WEIGHTS + ACTIVATIONS, ALL_PREPARED = PREFILL_WARPS * sizeof(PreparedRows<C>);
    static constexpr int STAGES = 3 * STAGE + ALL_PREPARED <= PREFILL_SHARED ? 3 : 2;
    static_assert(STAGES * STAGE + ALL_PREPARED <= PREFILL_SHARED);
    static constexpr u32 CHUNKS = C::BYTES / 16;
    static_assert(16 * CHUNKS <= C::SLOT);
    static_assert(DEPTH == 1 || PREFILL_WARPS * 32 * NT * 4 * 8 <= STAGES * STAGE);
    typedef typename Wider<C::WIDE>::T Sum;

    /// Starts the copies of a step's weights and activations.
    DEVICE void fetch(const PrefillParams &p, u8 *stage, u32 step) {
        u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
        u32 first_row = (blockIdx.y * ROWS + warp / DEPTH) * 16, segment = min(step * DEPTH + warp % DEPTH, p.segments - 1);
        u8 *slots = stage + warp * 16 * C::SLOT;
        const u8 *column = p.weight + (size_t)segment * C::BYTES;
#pragma unroll
        for (u32 i = lane; i < 16 * CHUNKS; i += 32) {
            u32 row = i / CHUNKS, chunk = i % CHUNKS;
            const u8 *from = column + min(first_row + row, p.rows - 1) * p.row_bytes;
            copy_16(slots + row * C::SLOT + 16 * chunk, from + 16 * chunk);
        }
        // A tile's segments follow each other. A thread brings the same place of every tile.
        constexpr u32 SPAN = DEPTH * TILE / 16;
        u32 first_tile = blockIdx.x * NT, tiles = min((u32)NT, (p.tokens + 7) / 8 - first_tile);
        u32 here = min((u32)DEPTH, p.segments - step * DEPTH) * (TILE / 16);
        size_t stride = (size_t)p.segments * TILE;
        u8 *to = stage + WEIGHTS + 16 * threadIdx.x;
        const u8 *from = p.x + first_tile * stride + (size_t)step * DEPTH * TILE + 16 * threadIdx.x;
#pragma unroll
        for (u32 i = 0; i < SPAN; i += PREFILL_THREADS) {
            if (i + threadIdx.x < here) {
#pragma unroll
                // Past the last tile, that one again: it is there, and nobody looks at what comes of it.
                for (u32 n = 0; n < NT; n++) copy_16(to + 16 * (n * SPAN + i), from + min(n, tiles - 1) * stride + 16 * i);
            }
        }
    }

    /// Prepares the warp's 16 rows: two lanes a row, four blocks each.
    DEVICE void prepare(const PrefillParams &p, PreparedRows<C> &rows, const u8 *slots, u32 first_row) {
        u32 lane = threadIdx.x & 31, r = lane >> 1, half = lane & 1, row = min(first_row + r, p.rows - 1);
        Scales s;
        C::prepare(slots + r * C::SLOT, half, s);
        i64 sum = 0;
        for (int i = 0; i < 4; i++) rows.c[r][4 * half + i] = C::FIRST == SCALE ? bits_of((float)s.c[i]) : s.c[i];
        if (C::FIRST == UNIT) {
            for (int i = 0; i < 4; i++) sum += s.c[i];
            sum += shuffle_xor(sum, 1);
        }
        if (C::MINS && C::WIDE)
            for (int i = 0; i < 4; i++) rows.k[r][4 * half + i] = s.k[i];
        if (C::MINS && !C::WIDE) rows.k[r][half] = s.mins, rows.k[r][2 + half] = s.subs;
        if (half == 0) {
            int ew = p.exponents[row];
            rows.scale[r] = make_int4(s.m, ew - s.e, C::MINS ? s.mk : 0, C::MINS ? ew - s.ek : 0);
            rows.start[r] = -sum * (i64)MAGIC_BITS;
        }
    }

    /// What dot is multiplied by first, and 1.5 · 2^23 less that many times itself.
    struct Factor {
        float f, k;
    };
    DEVICE Factor factor(float f) { return Factor{f, fma(f, -MAGIC, MAGIC)}; }

    /// Adds one block's product, of 16 rows and 8 tokens, to the sums. Of `first`, two are for rows g and g + 8, or for tokens
    /// 2t and 2t + 1; `u` and `c` likewise.
    DEVICE void block_product(Sum sum[4], const u32 a[4], u32 b0, u32 b1, const Factor first[2], const int u[2], const int c[2]) {
        int start = C::FIRST == NEITHER ? 0 : (int)MAGIC_BITS;
        int d[4] = {start, start, start, start};
        mma_s8(d, a[0], a[1], a[2], a[3], b0, b1);
        for (int i = 0; i < 4; i++) {
            int row = i >> 1, token = i & 1, v, by;
            if (C::FIRST == SCALE) {
                v = bits_of(fma(f32_of_bits(d[i]), first[row].f, first[row].k)), by = u[token];
            } else if (C::FIRST == UNIT) {
                v = bits_of(fma(f32_of_bits(d[i]), first[token].f, first[token].k)), by = c[row];
            } else {
                v = d[i] * u[token], by = c[row];
            }
            // Sums may overflow on the way: they come back when what they start with has cancelled.
            typedef typename Wider<C::WIDE>::Unsigned Unsigned;
            Sum product = C::WIDE ? (Sum)((i64)by * v) : (Sum)((u32)by * (u32)v);
            sum[i] = (Sum)((Unsigned)sum[i] + (Unsigned)product);
        }
    }

    /// Fragments of eight 6-bit numbers, four in each of the lanes t = 0 and 1: once, doubled, and doubled again.
    DEVICE void thrice(u32 a[4], u32 low, u32 high) {
        bool first = (threadIdx.x & 3) < 2;
        a[0] = first ? low : low << 1, a[1] = first ? high : high << 1;
        a[2] = first ? low << 1 : 0, a[3] = first ? high << 1 : 0;
    }

    /// Their products with u · s: k lo + 128 (k b + 2k a + 2k a).
    DEVICE void sums_product(int sum[4], const u32 a[4], u32 lo, u32 b, u32 rest) {
        int low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};
        mma_s8(low, a[0], a[1], a[2], a[3], lo, 0);
        mma_s8(high, a[0], a[1], a[2], a[3], b, rest);
        for (int i = 0; i < 4; i++) sum[i] = low[i] + 128 * high[i];
    }

    /// One segment of the warp's rows and all tokens.
    DEVICE void segment(const PreparedRows<C> &rows, const u8 *slots, const u8 *tiles, i64 acc[NT][4]) {
        u32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
        const u8 *slot[2] = {slots + g * C::SLOT, slots + (g + 8) * C::SLOT};
        Sum sums[NT][4];
#pragma unroll
        for (int n = 0; n < NT; n++) {
            int2 starts = *(const int2 *)(tiles + n * DEPTH * TILE + AT_STARTS + 8 * t);
            for (int i = 0; i < 4; i++)
                sums[n][i] = C::FIRST == NEITHER ? 0 : C::FIRST == UNIT ? (Sum)rows.start[g + 8 * (i >> 1)] : i & 1 ? starts.y : starts.x;
        }
#pragma unroll 1
        for (int pair = 0; pair < 4; pair++) {
            uint2 w[2][2];
            C::fragments(slot[0], pair, t, w[0]);
            C::fragments(slot[1], pair, t, w[1]);
            u32 a[2][4];
            for (int h = 0; h < 2; h++) a[h][0] = w[0][h].x, a[h][1] = w[1][h].x, a[h][2] = w[0][h].y, a[h][3] = w[1][h].y;
            // Of each block and of both rows.
            int c[2][2];
            Factor of_rows[2][2];
            for (int i = 0; i < 2; i++) {
                c[i][0] = rows.c[g][2 * pair + i], c[i][1] = rows.c[g + 8][2 * pair + i];
                if (C::FIRST == SCALE) of_rows[i][0] = factor(f32_of_bits(c[i][0])), of_rows[i][1] = factor(f32_of_bits(c[i][1]));
            }
            const u8 *codes = tiles + g * RECORD + 64 * pair + 16 * t, *units = tiles + AT_FACTORS + 64 * pair + 16 * t;
#pragma unroll
            for (int n = 0; n < NT; n++) {
                uint4 b = *(const uint4 *)(codes + n * DEPTH * TILE);
                int4 both = *(const int4 *)(units + n * DEPTH * TILE);
                int u[2][2] = {{both.x, both.y}, {both.z, both.w}};
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    Factor of_tokens[2];
                    if (C::FIRST == UNIT) of_tokens[0] = factor((float)u[h][0]), of_tokens[1] = factor((float)u[h][1]);
                    const Factor *first = C::FIRST == SCALE ? of_rows[h] : of_tokens;
                    u32 b0 = h == 0 ? b.x : b.z, b1 = h == 0 ? b.y : b.w;
                    block_product(sums[n], a[h], b0, b1, first, u[h], c[h]);
                }
            }
        }
        int4 scale[2] = {rows.scale[g], rows.scale[g + 8]};
        u32 k[4], raised[4];
        if (C::MINS && !C::WIDE) thrice(k, rows.k[g][t & 1], rows.k[g + 8][t & 1]);
        if (C::RAISED) thrice(raised, rows.k[g][2 + (t & 1)], rows.k[g + 8][2 + (t & 1)]);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const u8 *tile = tiles + n * DEPTH * TILE;
            int2 token[2] = {*(const int2 *)(tile + 2 * t * RECORD + AT_SCALE),
                             *(const int2 *)(tile + (2 * t + 1) * RECORD + AT_SCALE)};
            i64 mins[4];
            if (C::MINS && !C::WIDE) {
                const u8 *record = tile + g * RECORD + 4 * (t & 1);
                u32 lo = *(const u32 *)(record + AT_LO), b = *(const u32 *)(record + AT_B), a = *(const u32 *)(record + AT_A);
                u32 low = t < 2 ? lo : 0, high = t < 2 ? b : a, rest = t < 2 ? a : 0;
                int sum[4];
                sums_product(sum, k, low, high, rest);
                for (int i = 0; i < 4; i++) mins[i] = (i64)(token[i & 1].x * scale[i >> 1].z) * sum[i];
                if (C::RAISED) {
                    sums_product(sum, raised, low, high, rest);
                    for (int i = 0; i < 4; i++) sums[n][i] += C::RAISED * sum[i];
                }
            }
            if (C::MINS && C::WIDE) {
                for (int i = 0; i < 4; i++) {
                    const int *s = (const int *)(tile + (2 * t + (i & 1)) * RECORD + AT_SUMS);
                    i64 sum = 0;
                    for (int j = 0; j < 8; j++) sum += (i64)rows.k[g + 8 * (i >> 1)][j] * s[j];
                    mins[i] = token[i & 1].x * sum;
                }
            }
            for (int i = 0; i < 4; i++) {
                i64 product = C::WIDE ? token[i & 1].x * (i64)sums[n][i] : (i64)(token[i & 1].x * scale[i >> 1].x) * (int)sums[n][i];
                acc[n][i] += product >> min(scale[i >> 1].y + token[i & 1].y, 63);
                if (C::MINS) acc[n][i] -= mins[i] >> min(scale[i >> 1].w + token[i & 1].y, 63);
            }
        }
    }

    DEVICE void run(const PrefillParams &p) {
        DYNAMIC_SHARED(u8, shared, 16);
        u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
        u32 part = warp % DEPTH, first_row = (blockIdx.y * ROWS + warp / DEPTH) * 16;
        u32 steps = (p.segments + DEPTH - 1) / DEPTH;
        PreparedRows<C> &rows = ((PreparedRows<C> *)(shared + STAGES * STAGE))[warp];
        i64 acc[NT][4];
#pragma unroll
        for (int n = 0; n < NT; n++)
            for (int i = 0; i < 4; i++) acc[n][i] = 0;
        for (u32 step = 0; step < STAGES - 1; step++) {
            if (step < steps) fetch(p, shared + step * STAGE, step);
            end_copies();
        }
        u32 slot = 0;
#pragma unroll 1
        for (u32 step = 0; step < steps; step++) {
            await_copies_but<STAGES - 2>();
            // This step's copies of all threads are there, and all have left the place of the step before.
            meet_block();
            u32 ahead = step + STAGES - 1, place = slot == 0 ? STAGES - 1 : slot - 1;
            if (ahead < steps) fetch(p, shared + place * STAGE, ahead);
            // Also where nothing is left to fetch, so that the count of groups stays the same.
            end_copies();
            const u8 *stage = shared + slot * STAGE, *slots = stage + warp * 16 * C::SLOT;
            u32 s = step * DEPTH + part;
            if (s < p.segments) {
                prepare(p, rows, slots, first_row);
                meet_warp();
                segment(rows, slots, stage + WEIGHTS + part * TILE, acc);
            }
            slot = slot + 1 == STAGES ? 0 : slot + 1;
        }
        if (DEPTH > 1) {
            // [group of rows][part][value][lane]
            meet_block();
            i64 *sums = (i64 *)shared + (size_t)warp * (NT * 4 * 32) + lane;
            if (part > 0)
#pragma unroll
                for (int n = 0; n < NT; n++)
                    for (int i = 0; i < 4; i++) sums[(n * 4 + i) * 32] = acc[n][i];
            meet_block();
            if (part > 0) return;
#pragma unroll
            for (int n = 0; n < NT; n++)
                for (int i = 0; i < 4; i++)
                    for (int other = 1; other < DEPTH; other++) acc[n][i] += sums[((other * NT + n) * 4 + i) * 32];
        }
        int ew[2];
        float bias[2] = {0.0f, 0.0f};
        for (int i = 0; i < 2; i++) {
            u32 row = min(first_row + g + 8 * i, p.rows - 1);
            ew[i] = p.exponents[row];
            if (p.bias) bias[i] = p.bias[row];
        }
        bool finite = true;
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32 row = first_row + g + 8 * (i >> 1), token = (blockIdx.x * NT + n) * 8 + 2 * t + (i & 1);
                if (row >= p.rows || token >= p.tokens) continue;
                float result = scaled_sum(acc[n][i], ew[i >> 1] + p.vector_exponents[token]);
                finite = finite && is_finite(result);
                if (p.bias) result = add(result, bias[i >> 1]);
                p.y[(size_t)token * p.rows + row] = result;
            }
        if (!finite) report(p.fault, p.step);
    }
};

/// NT · 8 tokens and ROWS · 16 rows a block.
#define PREFILL(name, C, NT, ROWS)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256, 1)                                                               \
        prefill_##name##_##NT##_##ROWS(const __grid_constant__ PrefillParams p) {                                      \
        Prefill<C, NT, ROWS>::run(p);                                                                                  \
    }
/// For few tokens, for more, and for many with few and with many rows.
#define EACH_TILING(name, C)                                                                                           \
    PREFILL(name, C, 1, 1)                                                                                             \
    PREFILL(name, C, 4, 2)                                                                                             \
    PREFILL(name, C, 8, 4)                                                                                             \
    PREFILL(name, C, 8, 8)

} // namespace hoist
