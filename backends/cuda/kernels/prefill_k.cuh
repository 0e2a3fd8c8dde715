// Products of Q4_K and Q6_K matrices with many tokens on int8 tensor cores, with the bits of every other path.
//
// Q4_K: within a segment (docs/numerics.md §1.3), I = Σ_j c_j · Σ_i w_i · (u_j q_i). The number u_j q_i has 12 bits: 16 h + l with h
// in −127 … 127 and l in 0 … 15, and 16 w still is a byte. So two multiplications into one accumulator, 16 w by h and w by l, leave
// one integer multiply-add an output and block of 32, with c_j. J = Σ_j k_j (u_j s_j) is a product of tensor cores too.
//
// Q6_K: scales are of 16 weights, and so are multiplications; c · dot of two halves, then u_j: three integer multiply-adds.
//
// The step of a segment, ⌊m_a · m_w · I · 2^−Δ⌋, is one fused multiply-add of doubles that rounds down at the unit: all numbers in
// it are below 2^51 and exact.
//
// A block multiplies ROWS · 16 rows with COLS · NT · 8 tokens. Each of its warps has 16 rows, NT · 8 tokens and one of the DEPTH
// segments that a step of the loop brings; partial sums of i64 merge at the end in any order. Blocks stay and go from one tile of
// the product to the next, so that the copies for the next one are on their way while the last sums of one are written.
#pragma once

#include "prefill.cuh"

namespace hoist {

// ---- packed activations ----
// [tokens / 8][segment] tiles of eight records.
//
// Folded, for Q4_K. A token's record: for each block and t = 0 … 3, h and then l of elements 8t … 8t + 7 (what a lane holds of two
// fragments).
//
// Halved, for Q6_K. A token's record: for each pair of blocks and t = 0 … 3, elements 4t … 4t + 3 of the four half blocks. After
// the records, [pair of blocks][pair of tokens] the u of both tokens for the one block and for the other.
//
// Between records lie 64 bytes, so that two neighbours are in different banks. In the first of these places are the eight tokens'
// doubles m_a · 2^(e_a − E_a); in the next three, folded, the eight tokens' lo, b and a of each block, where u_j · s_j = lo + 128 (b + 4a).

constexpr u32 FOLDED_RECORD = 576, FOLDED_TILE = 8 * FOLDED_RECORD, FOLDED_SCALES = 512;
constexpr u32 FOLDED_LO = FOLDED_SCALES + FOLDED_RECORD, FOLDED_B = FOLDED_LO + FOLDED_RECORD, FOLDED_A = FOLDED_B + FOLDED_RECORD;
constexpr u32 HALVED_RECORD = 320, HALVED_SCALES = 256, HALVED_FACTORS = 8 * HALVED_RECORD, HALVED_TILE = HALVED_FACTORS + 256;

DEVICE double power_f64(int n) { return f64_of_bits((u64)(n + 1023) << 52); }

/// The doubles of the tokens 2t and 2t + 1.
DEVICE void scales_at(const u8 *scales, u32 t, double token[2]) {
    uint4 x = *(const uint4 *)(scales + 16 * t);
    token[0] = f64_of_bits((u64)x.y << 32 | x.x), token[1] = f64_of_bits((u64)x.w << 32 | x.z);
}

// ---- encodings ----
// BYTES of a segment; ANY_ADDRESS: segments start at even addresses only, so that a row's slot begins at the multiple of 16 before;
// SPREAD, EACH: bytes of a slot, modulo EACH, so that rows lie in different banks; TILE: of packed activations. `segment` adds one
// segment of a warp's rows, SLOT bytes apart, and of its NT · 8 tokens, whose tiles are STRIDE bytes apart. `at`: where in their
// slots the segments of the rows g and g + 8 begin; `unit`: 2^−E_w of both.

struct FoldedQ4_K {
    static constexpr u32 BYTES = 144, SPREAD = 32, EACH = 64, TILE = FOLDED_TILE;
    static constexpr bool ANY_ADDRESS = false;

    /// Fragments of eight 6-bit numbers, four in each of the lanes t = 0 and 1: once, doubled, and doubled again.
    DEVICE void thrice(u32 a[4], u32 low, u32 high) {
        bool first = (threadIdx.x & 3) < 2;
        a[0] = first ? low : low << 1, a[1] = first ? high : high << 1;
        a[2] = first ? low << 1 : 0, a[3] = first ? high << 1 : 0;
    }

    template <int NT, u32 SLOT, u32 STRIDE>
    DEVICE void segment(const u8 *slots, const u32 at[2], const u8 *tiles, const double unit[2], i64 acc[NT][4]) {
        u32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
        const u8 *row[2] = {slots + g * SLOT + at[0], slots + (g + 8) * SLOT + at[1]};
        int sums[NT][4];
#pragma unroll
        for (int n = 0; n < NT; n++)
            for (int i = 0; i < 4; i++) sums[n][i] = 0;
        const u8 *codes = tiles + g * FOLDED_RECORD + 16 * t;
#pragma unroll 1
        for (int half = 0; half < 2; half++) {
            u32 subs[2];
            for (int r = 0; r < 2; r++) {
                uint4 head = *(const uint4 *)row[r];
                subs[r] = half == 0 ? head.y & 0x3f3f3f3f : (head.w & 0x0f0f0f0f) | (head.y >> 2 & 0x30303030);
            }
#pragma unroll
            for (int which = 0; which < 2; which++) {
                uint2 q[2];
                for (int r = 0; r < 2; r++) q[r] = *(const uint2 *)(row[r] + 16 + 64 * half + 32 * which + 8 * t);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    u32 once[4], more[4];
                    for (int i = 0; i < 4; i++) {
                        u32 x = i < 2 ? q[i].x : q[i - 2].y;
                        if (h == 0) {
                            once[i] = x & 0x0f0f0f0f, more[i] = once[i] << 4;
                        } else {
                            more[i] = x & 0xf0f0f0f0, once[i] = more[i] >> 4;
                        }
                    }
                    int block = 2 * which + h, c[2] = {(int)(subs[0] >> 8 * block & 255), (int)(subs[1] >> 8 * block & 255)};
                    // One multiplication after the other waits for its result: those of three tiles take turns.
                    uint4 b[NT];
                    int d[NT][4];
#pragma unroll
                    for (int n = 0; n < NT + 2; n++) {
                        if (n < NT) {
                            b[n] = *(const uint4 *)(codes + n * STRIDE + 256 * half + 64 * block);
                            for (int i = 0; i < 4; i++) d[n][i] = 0;
                            mma_u8_s8(d[n], more[0], more[1], more[2], more[3], b[n].x, b[n].y);
                        }
                        if (n > 0 && n <= NT) mma_u8_s8(d[n - 1], once[0], once[1], once[2], once[3], b[n - 1].z, b[n - 1].w);
                        if (n > 1)
                            for (int i = 0; i < 4; i++) sums[n - 2][i] += c[i >> 1] * d[n - 2][i];
                    }
                }
            }
        }
        u32 mins[2];
        double scale[2], min_scale[2];
        for (int r = 0; r < 2; r++) {
            uint4 head = *(const uint4 *)row[r];
            scale[r] = product_f64(f64_of_f32(f32_of_f16((u16)head.x)), unit[r]);
            min_scale[r] = product_f64(f64_of_f32(f32_of_f16((u16)(head.x >> 16))), unit[r]);
            mins[r] = t & 1 ? (head.w >> 4 & 0x0f0f0f0f) | (head.z >> 2 & 0x30303030) : head.z & 0x3f3f3f3f;
        }
        u32 k[4];
        thrice(k, mins[0], mins[1]);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const u8 *tile = tiles + n * STRIDE, *sums_of = tile + 8 * g + 4 * (t & 1);
            u32 lo = *(const u32 *)(sums_of + FOLDED_LO), b = *(const u32 *)(sums_of + FOLDED_B), a = *(const u32 *)(sums_of + FOLDED_A);
            int low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};
            mma_s8(low, k[0], k[1], k[2], k[3], t < 2 ? lo : 0, 0);
            mma_s8(high, k[0], k[1], k[2], k[3], t < 2 ? b : a, t < 2 ? a : 0);
            double token[2];
            scales_at(tile + FOLDED_SCALES, t, token);
            for (int i = 0; i < 4; i++) {
                double product = product_f64(f64_of_i32(sums[n][i]), scale[i >> 1]);
                double less = product_f64(f64_of_i32(low[i] + 128 * high[i]), min_scale[i >> 1]);
                // What both bring beside their floors cancels.
                acc[n][i] += (i64)(floored_bits(product, token[i & 1]) - floored_bits(less, token[i & 1]));
            }
        }
    }
};

struct HalvedQ6_K {
    static constexpr u32 BYTES = 210, SPREAD = 16, EACH = 32, TILE = HALVED_TILE;
    static constexpr bool ANY_ADDRESS = true;

    /// Four bytes `by` bits after a place that is a multiple of 4.
    DEVICE u32 word(const u8 *base, u32 by) { return funnel_right(((const u32 *)base)[0], ((const u32 *)base)[1], by); }
    DEVICE int byte_of(u32 word, int i) { return (i8)(word >> 8 * i); }

    template <int NT, u32 SLOT, u32 STRIDE>
    DEVICE void segment(const u8 *slots, const u32 at[2], const u8 *tiles, const double unit[2], i64 acc[NT][4]) {
        u32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
        const u8 *row[2];
        u32 by[2];
        for (int r = 0; r < 2; r++) row[r] = slots + (g + 8 * r) * SLOT + (at[r] & ~3u), by[r] = (at[r] & 2) * 8;
        int sums[NT][4];
#pragma unroll
        for (int n = 0; n < NT; n++)
            for (int i = 0; i < 4; i++) sums[n][i] = 0;
        const u8 *codes = tiles + g * HALVED_RECORD + 16 * t, *factors = tiles + HALVED_FACTORS + 16 * t;
#pragma unroll 1
        for (int group = 0; group < 2; group++) {
            // Of 128 weights: nibbles, [half of 64][half block]; pairs of bits; and eight scales.
            u32 low[2][2][2], high[2][2], scales[2][2];
#pragma unroll
            for (int r = 0; r < 2; r++)
                for (int half = 0; half < 2; half++) {
                    const u8 *from = row[r] + 16 * half + 4 * t;
                    for (int h = 0; h < 2; h++) low[r][h][half] = word(from + 64 * group + 32 * h, by[r]);
                    high[r][half] = word(from + 128 + 32 * group, by[r]);
                    scales[r][half] = word(row[r] + 192 + 8 * group + 4 * half, by[r]);
                }
#pragma unroll
            for (int which = 0; which < 2; which++) {
                u32 a[2][2][2];
                int c[2][2][2];
#pragma unroll
                for (int h = 0; h < 2; h++)
                    for (int half = 0; half < 2; half++)
                        for (int r = 0; r < 2; r++) {
                            u32 nibbles = low[r][h][half] >> 4 * which & 0x0f0f0f0f;
                            u32 bits = high[r][half] >> (4 * which + 2 * h) << 4 & 0x30303030;
                            a[h][half][r] = centred(nibbles | bits, 32);
                            c[h][half][r] = byte_of(scales[r][which], 2 * h + half);
                        }
                // A tile's sums are taken up when the next one's multiplications are on their way.
                int pair = 2 * group + which, d[2 * NT][2][4];
                uint4 b[NT];
#pragma unroll
                for (int n = 0; n < 2 * NT + 1; n++) {
                    if (n < 2 * NT) {
                        int h = n & 1;
                        if (h == 0) b[n >> 1] = *(const uint4 *)(codes + (n >> 1) * STRIDE + 64 * pair);
                        const uint4 &of = b[n >> 1];
                        for (int i = 0; i < 4; i++) d[n][0][i] = d[n][1][i] = 0;
                        mma_s8_half(d[n][0], a[h][0][0], a[h][0][1], h ? of.z : of.x);
                        mma_s8_half(d[n][1], a[h][1][0], a[h][1][1], h ? of.w : of.y);
                    }
                    if (n > 0) {
                        int h = (n - 1) & 1, tile = (n - 1) >> 1;
                        int2 u = *(const int2 *)(factors + tile * STRIDE + 64 * pair + 8 * h);
                        for (int i = 0; i < 4; i++)
                            sums[tile][i] += (i & 1 ? u.y : u.x) * (c[h][0][i >> 1] * d[n - 1][0][i] + c[h][1][i >> 1] * d[n - 1][1][i]);
                    }
                }
            }
        }
        double scale[2];
        for (int r = 0; r < 2; r++) scale[r] = product_f64(f64_of_f32(f32_of_f16(u16_at(row[r] + by[r] / 8 + 208))), unit[r]);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            double token[2];
            scales_at(tiles + n * STRIDE + HALVED_SCALES, t, token);
            for (int i = 0; i < 4; i++) {
                double product = product_f64(f64_of_i32(sums[n][i]), scale[i >> 1]);
                acc[n][i] += (i64)(floored_bits(product, token[i & 1]) - FLOORED_BITS);
            }
        }
    }
};

// ---- the kernel ----

/// Tiles of a product that its blocks share out step by step, behind those that are a block's own.
struct Parted {
    /// Tiles that blocks have for their own: as many for each.
    u32 own;
    /// The launch's number, other than that of any launch before it with the same `handed`.
    u32 number;
    /// Of each block: its sums of a tile that another one began, [value][thread]; and whether they are there.
    i64 *sums;
    u64 *handed;
};

/// PARTED: what is left when each block has had as many tiles as every other is shared out: steps of those tiles follow each other,
/// and each block takes as many of them. Who has a tile's first step adds what the blocks behind it have of that tile, in any order, since
/// all sums are exact; they hand over what they have of it before anything else, so that nobody waits in a circle.
template <class E, int NT, int ROWS, int COLS, int DEPTH, int STAGES, bool PARTED = false> struct Staying {
    static constexpr int WARPS = ROWS * COLS * DEPTH, THREADS = 32 * WARPS;
    static constexpr u32 BYTES = E::BYTES, TILE = E::TILE;
    /// Of a row: the DEPTH segments of a step follow each other.
    static constexpr u32 CHUNKS = E::ANY_ADDRESS ? (DEPTH * BYTES + 14 + 15) / 16 : DEPTH * BYTES / 16;
    static constexpr u32 SLOT = 16 * CHUNKS + (E::EACH + E::SPREAD - 16 * CHUNKS % E::EACH) % E::EACH;
    static constexpr u32 COPIED = ROWS * 16, WEIGHTS = COPIED * SLOT;
    static constexpr u32 STAGE = WEIGHTS + COLS * NT * DEPTH * TILE;
    /// What partial sums of other segments take, beside the stages.
    static constexpr u32 SUMS = ROWS * COLS * (DEPTH - 1) * NT * 4 * 32 * 8;
    static_assert(STAGES * STAGE + SUMS <= PREFILL_SHARED);
    /// Warps that bring one tile of tokens.
    static constexpr u32 BRINGERS = WARPS / (COLS * NT);
    static_assert(BRINGERS * COLS * NT == WARPS);
    static constexpr u32 WEIGHT_COPIES = (COPIED * CHUNKS + THREADS - 1) / THREADS;
    // Sums of several segments would have to meet in the block first.
    static_assert(!PARTED || DEPTH == 1);

    /// Steps of a tile that a block does at a time, and the steps that it has after those.
    struct Way {
        u32 tile, step, end, next, last;

        /// Before the first.
        DEVICE Way start(const Parted &parted, u32 tiles, u32 steps) {
            u32 shared = (tiles - parted.own) * steps, block = blockIdx.x;
            Way way = {block, 0, steps, shared * block / gridDim.x, shared * (block + 1) / gridDim.x};
            if (block >= parted.own) go_on(way, parted, tiles, steps);
            return way;
        }

        DEVICE void go_on(Way &way, const Parted &parted, u32 tiles, u32 steps) {
            way.step = 0, way.tile += gridDim.x;
            if (way.tile < parted.own) return;
            way.tile = tiles;
            if (way.next == way.last) return;
            u32 before = way.next / steps;
            way.tile = parted.own + before, way.step = way.next - before * steps;
            way.end = min(steps, way.step + (way.last - way.next));
            way.next += way.end - way.step;
        }

        /// The tile after this one.
        DEVICE u32 after(Way &way, const Parted &parted, u32 tiles, u32 steps) {
            go_on(way, parted, tiles, steps);
            return way.tile;
        }
    };

    /// What a thread copies for one tile of the product.
    struct Fetch {
        u32 tile, step;
        /// Where PARTED.
        Way way;
        const u8 *weights, *tokens;
        /// Of the rows that the thread copies of.
        u32 offsets[WEIGHT_COPIES];

        DEVICE void aim(Fetch &f, const PrefillParams &p, u32 token_tiles) {
            u32 first_row = f.tile / token_tiles * ROWS * 16, warp = threadIdx.x >> 5;
            f.weights = p.weight + first_row * p.row_bytes;
#pragma unroll
            for (u32 i = 0; i < WEIGHT_COPIES; i++) {
                u32 row = (i * THREADS + threadIdx.x) / CHUNKS;
                f.offsets[i] = min(row, p.rows - 1 - first_row) * (u32)p.row_bytes;
            }
            // Past the last tile, that one again: it is there, and nobody looks at what comes of it.
            u32 of_eight = min(f.tile % token_tiles * COLS * NT + warp / BRINGERS, (p.tokens + 7) / 8 - 1);
            f.tokens = p.x + (size_t)of_eight * p.segments * TILE + 16 * (warp % BRINGERS * 32 + (threadIdx.x & 31));
        }

        /// One copy of weights.
        DEVICE void copy_weights(const Fetch &f, u8 *stage, u32 i, u32 chunks) {
            u32 at = i * THREADS + threadIdx.x, row = at / CHUNKS, chunk = at % CHUNKS;
            if (COPIED * CHUNKS % THREADS != 0 && i + 1 == WEIGHT_COPIES && at >= COPIED * CHUNKS) return;
            const u8 *from = f.weights + f.offsets[i];
            // A weight's place is whole multiples of 256 bytes, so that what is read beside a segment is there.
            if (E::ANY_ADDRESS) from = (const u8 *)((size_t)from & ~(size_t)15);
            if (chunk < chunks) copy_16(stage + row * SLOT + 16 * chunk, from + 16 * chunk);
        }

        /// Starts the copies of a step, and goes to the next one.
        DEVICE void go(Fetch &f, const PrefillParams &p, u8 *stage, u32 steps, u32 token_tiles) {
            u32 warp = threadIdx.x >> 5, first = warp % BRINGERS * 32 + (threadIdx.x & 31);
            constexpr u32 SPAN = DEPTH * TILE / 16, STEP = BRINGERS * 32;
            u8 *to = stage + WEIGHTS + warp / BRINGERS * (DEPTH * TILE) + 16 * first;
            u32 here = min((u32)DEPTH, p.segments - f.step * DEPTH);
            if (DEPTH == 1 || here == DEPTH) {
#pragma unroll
                for (u32 i = 0; i < WEIGHT_COPIES; i++) copy_weights(f, stage, i, CHUNKS);
#pragma unroll
                for (u32 i = 0; i < SPAN; i += STEP)
                    if (i + STEP <= SPAN || first + i < SPAN) copy_16(to + 16 * i, f.tokens + 16 * i);
            } else {
                u32 chunks = E::ANY_ADDRESS ? (here * BYTES + 14 + 15) / 16 : here * BYTES / 16;
#pragma unroll
                for (u32 i = 0; i < WEIGHT_COPIES; i++) copy_weights(f, stage, i, chunks);
#pragma unroll 1
                for (u32 i = 0; first + i < here * (TILE / 16); i += STEP) copy_16(to + 16 * i, f.tokens + 16 * i);
            }
            f.weights += DEPTH * BYTES, f.tokens += DEPTH * TILE;
            f.step++;
            if (!PARTED && f.step == steps) {
                f.step = 0, f.tile += gridDim.x;
                aim(f, p, token_tiles);
            }
        }

        /// Goes on where a tile's steps are done, where PARTED.
        DEVICE void turn(Fetch &f, const PrefillParams &p, const Parted &parted, u32 tiles, u32 steps, u32 token_tiles) {
            if (f.step != f.way.end) return;
            Way::go_on(f.way, parted, tiles, steps);
            follow(f, p, token_tiles);
        }

        /// Goes to the first of the way's steps.
        DEVICE void follow(Fetch &f, const PrefillParams &p, u32 token_tiles) {
            f.tile = f.way.tile, f.step = f.way.step;
            aim(f, p, token_tiles);
            f.weights += f.step * DEPTH * BYTES, f.tokens += f.step * DEPTH * TILE;
        }
    };

    /// Hands this block's sums over to the one that has begun the tile.
    DEVICE void hand_over(const Parted &parted, const i64 acc[NT][4]) {
        i64 *to = parted.sums + (size_t)blockIdx.x * (NT * 4 * THREADS) + threadIdx.x;
#pragma unroll
        for (int n = 0; n < NT; n++)
            for (int i = 0; i < 4; i++) to[(n * 4 + i) * THREADS] = acc[n][i];
        meet_block();
        if (threadIdx.x != 0) return;
        fence_device();
        store_word(parted.handed + blockIdx.x, 0, parted.number);
    }

    /// Adds what the blocks behind this one have of the tile that ends with step `end` of those that are shared out.
    DEVICE void take_over(const Parted &parted, u32 end, u32 shared, i64 acc[NT][4]) {
        for (u32 block = blockIdx.x + 1; block < gridDim.x && shared * block / gridDim.x < end; block++) {
            // One without steps hands nothing over.
            if (shared * block / gridDim.x == shared * (block + 1) / gridDim.x) continue;
            if (threadIdx.x == 0) {
                await_word(parted.handed + block, parted.number);
                fence_device();
            }
            meet_block();
            const i64 *from = parted.sums + (size_t)block * (NT * 4 * THREADS) + threadIdx.x;
#pragma unroll
            for (int n = 0; n < NT; n++)
                for (int i = 0; i < 4; i++) acc[n][i] += load_shared_cache(from + (n * 4 + i) * THREADS);
        }
    }

    DEVICE void write(const PrefillParams &p, u32 first_row, u32 first_token, const i64 acc[NT][4]) {
        u32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
        bool finite = true;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            u32 row = first_row + g + 8 * r;
            if (row >= p.rows) break;
            int ew = p.exponents[row];
            float bias = p.bias ? p.bias[row] : 0.0f;
#pragma unroll
            for (int i = 0; i < 2 * NT; i++) {
                u32 token = first_token + 8 * (i >> 1) + 2 * t + (i & 1);
                if (token >= p.tokens) continue;
                float result = scaled_sum(acc[i >> 1][2 * r + (i & 1)], ew + p.vector_exponents[token]);
                finite = finite && is_finite(result);
                if (p.bias) result = add(result, bias);
                p.y[(size_t)token * p.rows + row] = result;
            }
        }
        if (!finite) report(p.fault, p.step);
    }

    DEVICE void run(const PrefillParams &p, const Parted &parted = Parted{}) {
        DYNAMIC_SHARED(u8, shared, 16);
        u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2;
        // Warps with the same rows are neighbours.
        u32 group = warp / COLS % ROWS, part = warp / (COLS * ROWS), column = warp % COLS;
        u32 steps = (p.segments + DEPTH - 1) / DEPTH, token_tiles = (p.tokens + 8 * COLS * NT - 1) / (8 * COLS * NT);
        u32 tiles = (p.rows + 16 * ROWS - 1) / (16 * ROWS) * token_tiles;
        u8 *sums = shared + STAGES * STAGE;
        i64 acc[NT][4];
        double unit[2];
        Fetch ahead;
        Way way;
        if (PARTED) {
            way = ahead.way = Way::start(parted, tiles, steps);
            Fetch::follow(ahead, p, token_tiles);
        } else {
            ahead.tile = blockIdx.x, ahead.step = 0;
            Fetch::aim(ahead, p, token_tiles);
        }
        for (u32 stage = 0; stage < STAGES - 1; stage++) {
            if (ahead.tile < tiles) {
                Fetch::go(ahead, p, shared + stage * STAGE, steps, token_tiles);
                if (PARTED) Fetch::turn(ahead, p, parted, tiles, steps, token_tiles);
            }
            end_copies();
        }
        u32 slot = 0;
#pragma unroll 1
        for (u32 tile = PARTED ? way.tile : blockIdx.x; tile < tiles;
             tile = PARTED ? Way::after(way, parted, tiles, steps) : tile + gridDim.x) {
            u32 first_row = (tile / token_tiles * ROWS + group) * 16, first_token = (tile % token_tiles * COLS + column) * 8 * NT;
            // Where rows begin, modulo 16.
            u32 starts[2];
            for (int r = 0; r < 2; r++) {
                u32 row = min(first_row + g + 8 * r, p.rows - 1);
                unit[r] = power_f64(-(int)p.exponents[row]), starts[r] = row * (u32)p.row_bytes;
            }
#pragma unroll
            for (int n = 0; n < NT; n++)
                for (int i = 0; i < 4; i++) acc[n][i] = 0;
            u32 end = PARTED ? way.end : steps;
#pragma unroll 1
            for (u32 step = PARTED ? way.step : 0; step < end; step++) {
                await_copies_but<STAGES - 2>();
                // This step's copies of all threads are there, and all have left the place of the step before.
                meet_block();
                u32 place = slot == 0 ? STAGES - 1 : slot - 1;
                if (ahead.tile < tiles) {
                    Fetch::go(ahead, p, shared + place * STAGE, steps, token_tiles);
                    if (PARTED) Fetch::turn(ahead, p, parted, tiles, steps, token_tiles);
                }
                // Also where nothing is left to fetch, so that the count of groups stays the same.
                end_copies();
                const u8 *stage = shared + slot * STAGE;
                if (DEPTH == 1 || step * DEPTH + part < p.segments) {
                    u32 at[2];
                    for (int r = 0; r < 2; r++)
                        at[r] = (E::ANY_ADDRESS ? (starts[r] + step * DEPTH * BYTES) & 15 : 0) + part * BYTES;
                    E::template segment<NT, SLOT, DEPTH * TILE>(stage + group * 16 * SLOT, at,
                                                                stage + WEIGHTS + (column * NT * DEPTH + part) * TILE, unit, acc);
                }
                slot = slot + 1 == STAGES ? 0 : slot + 1;
            }
            if (DEPTH > 1) {
                // [row group and tokens][part − 1][value][lane]. The loop has met since they were read last.
                i64 *of_warp = (i64 *)sums + (size_t)(group * COLS + column) * (DEPTH - 1) * (NT * 4 * 32) + lane;
                if (part > 0)
#pragma unroll
                    for (int n = 0; n < NT; n++)
                        for (int i = 0; i < 4; i++) of_warp[(((part - 1) * NT + n) * 4 + i) * 32] = acc[n][i];
                meet_block();
                if (part > 0) continue;
#pragma unroll
                for (int n = 0; n < NT; n++)
                    for (int i = 0; i < 4; i++)
                        for (int other = 0; other < DEPTH - 1; other++) acc[n][i] += of_warp[((other * NT + n) * 4 + i) * 32];
            }
            if (PARTED) {
                if (way.step > 0) {
                    hand_over(parted, acc);
                    continue;
                }
                if (way.end < steps) take_over(parted, (tile - parted.own + 1) * steps, (tiles - parted.own) * steps, acc);
            }
            write(p, first_row, first_token, acc);
        }
    }
};

} // namespace hoist
