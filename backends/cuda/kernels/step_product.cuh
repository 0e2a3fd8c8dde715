// Products of this block's rows, and what becomes of their results.
#pragma once

#include "step_input.cuh"

namespace hoist {

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

// Each multiplies a lane's segment; all lanes of a warp take part, those that are not `here` with whatever bytes they are
// given, and get 0.

/// Q4_K and Q5_K.
template <bool FIFTHS> DEVICE i64 product_k(const u8 *p, const u8 *codes, const u8 *meta, int ew, int ea, bool here) {
    uint4 head = *(const uint4 *)p;
    u32 sub[2] = {head.y & 0x3f3f3f3f, (head.w & 0x0f0f0f0f) | (head.y >> 2 & 0x30303030)};
    u32 low[2] = {head.z & 0x3f3f3f3f, (head.w >> 4 & 0x0f0f0f0f) | (head.z >> 2 & 0x30303030)};
    uint4 tail = *(const uint4 *)(meta + 64);
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
        for (int x = 0; x < 8; x++) {
            u32 w0 = w[x] & 0x0f0f0f0f, w1 = FIFTHS ? w[x] >> 4 & 0x0f0f0f0f : w[x] & 0xf0f0f0f0;
            if (FIFTHS) {
                w0 |= (high[x] >> 2 * g & 0x01010101) << 4;
                w1 |= (high[x] >> (2 * g + 1) & 0x01010101) << 4;
            }
            d0 = dot4(w0, q0[x], d0), d1 = FIFTHS ? dot4(w1, q1[x], d1) : dot4_unsigned(w1, q1[x], d1);
        }
        // High nibbles were taken where they are, as sixteen times what they mean.
        if (!FIFTHS) d1 >>= 4;
        // Blocks 2g and 2g + 1.
        int by = 16 * (g & 1);
        u32 subs = (g < 2 ? sub[0] : sub[1]) >> by, us = (g < 2 ? tail.x : tail.y) >> by, lows = (g < 2 ? low[0] : low[1]) >> by;
        i += d0 * (byte_of(subs, 0) * byte_of(us, 0)) + d1 * (byte_of(subs, 1) * byte_of(us, 1));
        int2 sums = *(const int2 *)(meta + 8 * g);
        k += sums.x * byte_of(lows, 0) + sums.y * byte_of(lows, 1);
    }
    if (!here) return 0;
    int m = tail.z, shift = ea - (int)tail.w;
    u16 d = head.x, dmin = head.x >> 16;
    return shifted(m * significand(d), i, ew - exponent_of(d) + shift) -
           shifted(m * significand(dmin), k, ew - exponent_of(dmin) + shift);
}

/// The word at byte `at` of a segment that starts at an even address: `base` is that address rounded down to 4, `odd` what
/// was cut off, in bits.
DEVICE u32 word_at(const u32 *base, u32 odd, int at) { return funnel_right(base[at / 4], base[at / 4 + 1], odd); }

DEVICE i64 product_q6_k(const u8 *p, const u8 *codes, const u8 *meta, int ew, int ea, bool here) {
    const u32 *base = (const u32 *)((u64)p & ~3ull);
    u32 odd = ((u64)p & 2) * 8;
    uint4 tail = *(const uint4 *)(meta + 64);
    int i = 0;
#pragma unroll
    for (int x = 0; x < 4; x++) {
        // Blocks 4g … 4g + 3, one half of each.
        int g = x >> 1, h = x & 1;
        int d[4] = {};
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int at = 16 * h + 4 * n;
            u32 a = word_at(base, odd, 64 * g + at), b = word_at(base, odd, 64 * g + 32 + at);
            u32 high = word_at(base, odd, 128 + 32 * g + at);
            const u8 *q = codes + 128 * g + at;
            d[0] = dot4((a & 0x0f0f0f0f) | (high << 4 & 0x30303030), *(const int *)q, d[0]);
            d[1] = dot4((b & 0x0f0f0f0f) | (high << 2 & 0x30303030), *(const int *)(q + 32), d[1]);
            d[2] = dot4((a >> 4 & 0x0f0f0f0f) | (high & 0x30303030), *(const int *)(q + 64), d[2]);
            d[3] = dot4((b >> 4 & 0x0f0f0f0f) | (high >> 2 & 0x30303030), *(const int *)(q + 96), d[3]);
        }
        uint4 sums = *(const uint4 *)(meta + 32 + 16 * g);
        u32 halves[4] = {sums.x, sums.y, sums.z, sums.w};
        u32 subs[2] = {word_at(base, odd, 192 + 8 * g), word_at(base, odd, 196 + 8 * g)};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int sub = (i8)(subs[j >> 1] >> (16 * (j & 1) + 8 * h)), sum = (i16)(halves[j] >> 16 * h);
            i += sub * (d[j] - 32 * sum) * byte_of(g ? tail.y : tail.x, j);
        }
    }
    if (!here) return 0;
    u16 scale = (u16)word_at(base, odd, 208);
    return shifted((int)tail.z * significand(scale), i, ew - exponent_of(scale) + ea - (int)tail.w);
}

DEVICE i64 product_q8_0(const u8 *p, const u8 *codes, const u8 *meta, int ew, int ea, bool here) {
    constexpr int BLOCKS = 8;
    uint4 tail = *(const uint4 *)(meta + 64);
    const u32 *base = (const u32 *)p;
    int m[BLOCKS], e[BLOCKS], most = -1000;
    i64 dots[BLOCKS];
#pragma unroll
    for (int j = 0; j < BLOCKS; j++) {
        u16 scale = *(const u16 *)(p + 34 * j);
        m[j] = significand(scale), e[j] = exponent_of(scale);
        most = max(most, e[j]);
        int q[8], d = 0, at = 34 * j + 2;
        Input::load(codes, j, q);
#pragma unroll
        for (int n = 0; n < 8; n++) d = dot4(word_at(base, (at & 2) * 8, at + 4 * n - (at & 2)), q[n], d);
        dots[j] = (i64)d * byte_of(j < 4 ? tail.x : tail.y, j & 3);
    }
    i64 sum = 0;
#pragma unroll
    for (int x = 0; x < BLOCKS; x++) sum += dots[x] * ((m[x] * 256) >> min(most - e[x], 31));
    if (!here) return 0;
    return ((i64)(int)tail.z * sum) >> min(ew - (most - 8) + ea - (int)tail.w, 63);
}

DEVICE i64 product(u32 coding, const u8 *p, const u8 *codes, const u8 *meta, int ew, int ea, bool here) {
    switch (coding) {
    case CODE_Q4_K: return product_k<false>(p, codes, meta, ew, ea, here);
    case CODE_Q5_K: return product_k<true>(p, codes, meta, ew, ea, here);
    case CODE_Q6_K: return product_q6_k(p, codes, meta, ew, ea, here);
    default: return product_q8_0(p, codes, meta, ew, ea, here);
    }
}

/// Sums of a phase's rows: phases take turns with two halves; the logits need both.
DEVICE i64 *sums_of(const StepParams &p, const Shared &s, const ProductPhase &product, u32 phase) {
    return s.sums + (product.epilogue == LOGITS ? 0 : (phase & 1) * (p.row_limit / 2));
}

DEVICE i16 *exponents_in(const StepParams &p, const Shared &s, u32 phase) { return s.exponents + (phase & 3) * p.exponent_limit; }

/// Exponents before a run's first one in the pair that is copied.
DEVICE u32 exponents_before(const Run &run, const StepMatrix &matrix) { return (u32)((u64)(matrix.exponents + run.first_row) >> 1 & 1); }

/// Exponents of a run in shared memory: whole pairs, as they are copied.
DEVICE u32 exponents_of(const Run &run, const StepMatrix &matrix) {
    return run.rows == 0 ? 0 : (exponents_before(run, matrix) + run.rows + 1) & ~1u;
}

/// Tells those of the first half, by a warp of the second, that it has multiplied. There is one more phase if this one is not of
/// the logits.
DEVICE void give_integers_up(const Shared &s, u32 phase) {
    if (phase_at(s, phase).product.epilogue != LOGITS && overwrites(s, phase + 1)) arrive_threads_at<THREADS>(INTEGERS_MEET);
}

/// Multiplies this block's rows of a phase's matrices and adds to their sums.
///
/// A slot's barrier tells only whether the fill before or the one at hand is complete. Within a phase a slot is always the
/// same warp's (slots are a multiple of WARPS), and nobody begins to multiply before all have ended the phase before, so
/// that nobody comes to a fill before the one before it was used up.
DEVICE void multiply(const StepParams &p, const Shared &s, int ea) {
    u32 index = phase_now(s);
    const ProductPhase &phase = phase_at(s, index).product;
    i64 *sums = sums_of(p, s, phase, index);
    const i16 *exponents = exponents_in(p, s, index);
    u32 lane = thread_now() & 31, warp = thread_now() >> 5, segments = phase.segments;
    const Run *run = s.runs + phase.stream, *last_run = run + phase.matrices - 1;
    const StepMatrix *matrix = phase.matrix;
    u32 coding = matrix->coding, bytes = segment_bytes(coding), piece = piece_of(coding), total = run->rows * segments;
    u32 number = run->begin + (warp - run->begin & WARPS - 1), last = last_run->end;
    u32 slot = number % p.slots, parity = number / p.slots & 1, free_slot = 0;
    Cursor cursor = s.cursors[warp];
    Piece next = {nullptr, 0};
    exponents += exponents_before(*run, *matrix);
    while (number < last) {
        while (number >= run->end) {
            sums += run->rows, exponents += exponents_of(*run, *matrix) - exponents_before(*run, *matrix);
            run++, matrix++;
            exponents += exponents_before(*run, *matrix);
            coding = matrix->coding, bytes = segment_bytes(coding), piece = piece_of(coding), total = run->rows * segments;
        }
        // What takes this piece's place.
        next = piece_at(p, s, number + p.slots, cursor);
        u32 at = (number - run->begin) * piece, segment = at + lane;
        bool here = lane < piece && segment < total;
        u32 row = segments == 1 ? segment : high_product(segment, phase.magic);
        u32 column = segment - row * segments;
        // Lanes without a segment go through the motions on the piece's first.
        u32 place = here ? lane : 0;
        if (!here) row = 0xffffffffu, column = 0;
        int ew = here ? exponents[row] : 0;
        barrier_wait(s.full + slot, parity);
        // The copy began at a multiple of 16.
        const u8 *weights = s.ring + slot * SLOT + (((u64)run->from + (u64)at * bytes) & 15) + place * bytes;
        i64 term = product(coding, weights, s.codes + column * CODES, s.meta + column * META, ew, ea, here);
        // Lanes of one row follow each other: the first of them gets their sum.
        for (int by = 1; by < 32; by <<= 1) {
            i64 other = shuffle_down(term, by);
            u32 there = shuffle_down(row, by);
            if (lane + by < 32 && there == row) term += other;
        }
        u32 before = shuffle_up(row, 1);
        if (here && (lane == 0 || before != row)) atomic_add((u64 *)sums + row, (u64)term);
        meet_warp();
        free_slot = slot;
        number += WARPS, slot += WARPS;
        if (slot >= p.slots) slot -= p.slots, parity ^= 1;
        if (lane == 0 && number < last) fill(s, next, free_slot);
    }
    // The last slot is filled again when others know of the sums.
    if (thread_now() >= WRITERS) {
        give_integers_up(s, index);
    } else if (phase.epilogue != LOGITS) {
        arrive_threads_at<THREADS>(RESULTS_MEET);
    }
    // A warp without pieces has read the cursor, and met nowhere since.
    meet_warp();
    if (lane == 0) {
        fill(s, next, free_slot);
        s.cursors[warp].run = cursor.run, s.cursors[warp].end = cursor.end;
    }
}

/// A row of a phase: its matrix, and its number there.
struct Place {
    u32 matrix, row;
};

/// Where this block's `i`th row of a phase is.
DEVICE Place place_of(const Run *run, u32 matrices, u32 i) {
    u32 m = 0;
    while (m + 1 < matrices && i >= run->rows) i -= run->rows, run++, m++;
    return Place{m, run->first_row + i};
}

/// This block's rows of a phase.
DEVICE u32 rows_in(const Run *run, u32 matrices) {
    u32 rows = run->rows;
    for (u32 m = 1; m < matrices; m++) rows += run[m].rows;
    return rows;
}

/// Starts to copy the row exponents of a phase, two at a time, to this phase's quarter.
DEVICE void fetch_exponents(const StepParams &p, const Shared &s, const Phase &phase, u32 number) {
    if (phase.kind != PRODUCT) return;
    const ProductPhase &product = phase.product;
    i16 *to = exponents_in(p, s, number);
    const Run *run = s.runs + product.stream;
    for (u32 m = 0; m < product.matrices; m++, run++) {
        if (run->rows == 0) continue;
        const StepMatrix &matrix = product.matrix[m];
        const i16 *from = matrix.exponents + run->first_row - exponents_before(*run, matrix);
        u32 words = exponents_of(*run, matrix) / 2;
        for (u32 i = thread_now(); i < words; i += THREADS) copy_4(to + 2 * i, from + 2 * i);
        to += 2 * words;
    }
}

/// Where the exponent of a phase's row is in its quarter.
DEVICE u32 exponent_place(const Run *run, const StepMatrix *matrix, const Place &place) {
    u32 at = 0;
    for (u32 m = 0; m < place.matrix; m++) at += exponents_of(run[m], matrix[m]);
    return at + exponents_before(run[place.matrix], matrix[place.matrix]) + place.row - run[place.matrix].first_row;
}

/// A row's result.
DEVICE float result_of(const StepParams &p, const StepMatrix &matrix, i64 sum, int exponent, u32 row) {
    float y = scaled_sum(sum, exponent);
    if (!is_finite(y)) report(p.fault, matrix.step);
    return matrix.bias ? add(y, load_constant(matrix.bias + row)) : y;
}

/// Points of a phase that are timed: its start, the input is ready, everything is multiplied, its results are written.
enum Point : u32 { START = 0, INPUT = 1, MULTIPLIED = 2, WRITTEN = 3 };

DEVICE void stamp(const StepParams &p, u32 phase, u32 point) {
    if (block_now() == 0 && thread_now() == WRITERS) p.times[phase * 4 + point] = cycles();
}

/// The largest logit so far, and the lowest row that has it.
struct Best {
    float value;
    u32 row;
};

/// A NaN is never better; what reports it is not this.
DEVICE Best better_of(Best a, Best b) { return b.value > a.value || (b.value == a.value && b.row < a.row) ? b : a; }

DEVICE Best best_of_warp(Best best) {
    for (int h = 16; h > 0; h >>= 1) best = better_of(best, Best{shuffle_xor(best.value, h), shuffle_xor(best.row, h)});
    return best;
}

/// Sends the block's best, behind whatever it has to report.
DEVICE void send_best(const StepParams &p, const Shared &s, Best best, u32 number) {
    best = best_of_warp(best);
    float *values = s.scratch;
    u32 *rows = (u32 *)s.scratch + WARPS;
    u32 lane = thread_now() & 31, warp = thread_now() >> 5;
    if (lane == 0) values[warp] = best.value, rows[warp] = best.row;
    meet();
    if (warp != 0) return;
    best = best_of_warp(Best{values[lane % WARPS], rows[lane % WARPS]});
    if (lane != 0) return;
    fence_device();
    u64 *to = p.bests + block_now() * BEST_WORDS;
    store_word(to, bits_of(best.value), number), store_word(to + 1, best.row, number);
}

/// Tells the host the best of all blocks' bests, or what was reported, by a warp of the first block.
DEVICE void tell_host(const StepParams &p, u32 number) {
    u32 lane = thread_now() & 31;
    Best best = {-INFINITY, 0xffffffffu};
    for (u32 block = lane; block < gridDim.x; block += 32) {
        const u64 *from[1] = {p.bests + block * BEST_WORDS};
        u32 words[1][2];
        await_pairs(from, number, words);
        best = better_of(best, Best{f32_of_bits(words[0][0]), words[0][1]});
    }
    meet_warp();
    best = best_of_warp(best);
    if (lane != 0) return;
    fence_device();
    store_to_host(p.results + 1, best.row);
    // The next step finds no fault.
    store_to_host(p.results, atomic_exchange(p.fault, 0xffffffffu));
    fence_system();
    store_to_host(p.done, p.step);
}

/// Brings a product's input into shared memory. Returns E_a; or `NO_ROWS` where this block has none, and nothing more to do.
constexpr int NO_ROWS = 1 << 30;

DEVICE int begin_product(const StepParams &p, const Shared &s) {
    if (phase_at(s, phase_now(s)).product.prologue != NORM) share_segments(p, s);
    u32 index = phase_now(s), number = number_of(s, index);
    const ProductPhase &product = phase_at(s, index).product;
    u32 total = rows_in(s.runs + product.stream, product.matrices);
    if (total == 0) {
        await_multiplied(s, index);
        // There are no results that anybody would wait to write.
        if (thread_now() >= WRITERS) give_integers_up(s, index);
        await_copies();
        meet();
        if (product.epilogue == LOGITS) send_best(p, s, Best{-INFINITY, 0xffffffffu}, number);
        return NO_ROWS;
    }
    // Nobody uses any sum any more when all have met.
    if (product.epilogue == LOGITS) meet();
    i64 *sums = sums_of(p, s, product, index);
    for (u32 i = thread_now(); i < total; i += THREADS) sums[i] = 0;
    int ea;
    if (product.prologue == NORM) {
        ea = normed_input(p, s, product, number - 1);
    } else {
        ea = shared_input(p, s);
    }
    stamp(p, index, INPUT);
    return ea;
}

/// Writes this block's logits, and sends the best.
DEVICE void finish_logits(const StepParams &p, const Shared &s, u32 index, const ProductPhase &product, int ea) {
    const Run &run = s.runs[product.stream];
    const StepMatrix &matrix = product.matrix[0];
    const i64 *sums = sums_of(p, s, product, index);
    const i16 *exponents = exponents_in(p, s, index) + exponents_before(run, matrix);
    Best best = {-INFINITY, 0xffffffffu};
    for (u32 i = thread_now(); i < run.rows; i += THREADS) {
        u32 row = run.first_row + i;
        float y = result_of(p, matrix, sums[i], exponents[i] + ea, row);
        ((float *)matrix.out)[row] = y;
        best = better_of(best, Best{y, row});
    }
    send_best(p, s, best, number_of(s, index));
}

/// Writes a product's results when all warps have multiplied, by half of the threads; the others go on.
DEVICE void finish_product(const StepParams &p, const Shared &s, int ea) {
    u32 index = phase_now(s);
    const ProductPhase &product = phase_at(s, index).product;
    if (product.epilogue == LOGITS) {
        meet();
        stamp(p, index, MULTIPLIED);
        finish_logits(p, s, index, product, ea);
        return;
    }
    u32 t = thread_now();
    if (t < WRITERS) return;
    meet_threads_at<THREADS>(RESULTS_MEET);
    stamp(p, index, MULTIPLIED);
    u32 number = number_of(s, index);
    const Run *runs = s.runs + product.stream;
    const i64 *sums = sums_of(p, s, product, index);
    const i16 *exponents = exponents_in(p, s, index);
    if (product.epilogue == SILU || product.epilogue == GELU) {
        // Both matrices have the same rows, so this block has both results.
        u32 rows = runs->rows, up_at = exponents_of(runs[0], product.matrix[0]) + exponents_before(runs[1], product.matrix[1]);
        for (u32 i = t - WRITERS; i < rows; i += THREADS - WRITERS) {
            u32 row = runs->first_row + i, at = i + exponents_before(runs[0], product.matrix[0]);
            float gate = result_of(p, product.matrix[0], sums[i], exponents[at] + ea, row);
            float up = result_of(p, product.matrix[1], sums[rows + i], exponents[up_at + i] + ea, row);
            float active = product.epilogue == SILU ? silu(gate) : gelu_tanh(gate);
            send((u64 *)product.matrix[0].out + row, mul(active, up), number);
        }
        return;
    }
    u32 total = rows_in(runs, product.matrices);
    for (u32 i = t - WRITERS; i < total; i += THREADS - WRITERS) {
        Place place = place_of(runs, product.matrices, i);
        const StepMatrix &matrix = product.matrix[place.matrix];
        float y = result_of(p, matrix, sums[i], exponents[exponent_place(runs, product.matrix, place)] + ea, place.row);
        if (product.epilogue == RESIDUAL) s.own[i] = y = add(s.own[i], y);
        send((u64 *)matrix.out + place.row, y, number);
    }
}

} // namespace hoist
