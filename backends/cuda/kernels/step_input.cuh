// A product's input as integers: of a norm, of the attention's splits, or of a vector.
#pragma once

#include "step_ring.cuh"

namespace hoist {

/// The largest of the warps' `x` over the block; `scratch` has a place for each.
DEVICE int largest_of_block(int x, int *scratch) {
    // Descriptors that this thread has asked for are to be there for all.
    await_copies();
    if ((thread_now() & 31) == 0) scratch[thread_now() >> 5] = x;
    meet();
    int4 all[WARPS / 4];
    for (int w = 0; w < WARPS / 4; w++) all[w] = ((const int4 *)scratch)[w];
    x = max(max(all[0].x, all[0].y), max(all[0].z, all[0].w));
    for (int w = 1; w < WARPS / 4; w++) x = max(x, max(max(all[w].x, all[w].y), max(all[w].z, all[w].w)));
    return x;
}

/// Quantises a segment (§1.1): a warp, eight elements a lane. Returns e_a.
DEVICE int quantise_segment(const float v[8], u8 *codes, u8 *meta, u32 *fault, u32 step) {
    u32 lane = thread_now() & 31, a = 0;
    for (int i = 0; i < 8; i++) a = max(a, bits_of(v[i]) & 0x7fffffffu);
    u32 all = largest_of_warp(a);
    a = max(a, shuffle_xor(a, 1));
    a = max(a, shuffle_xor(a, 2));
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

/// 1 / rms of a vector (§4) of so many segments, from the sums of its columns in `scratch`. Every warp does it, which saves a
/// meeting.
DEVICE float inverse_rms(u32 segments, float eps, const float *scratch) {
    // h = 128, 64 and 32: a lane has eight accumulators, 32 apart.
    float a[8];
    for (int i = 0; i < 8; i++) a[i] = scratch[(thread_now() & 31) + 32 * i];
    for (int h = 4; h > 0; h >>= 1)
        for (int i = 0; i < h; i++) a[i] = add(a[i], a[i + h]);
    float y = a[0];
    for (int h = 16; h > 0; h >>= 1) y = add(y, shuffle_xor(y, h));
    return quotient(1.0f, root(add(quotient(y, (float)(segments * 256)), eps)));
}

/// Which positions a token sees.
DEVICE u32 first_visible(u32 window, u32 position) { return window && window <= position ? position + 1 - window : 0; }

/// The splits of a token's positions.
struct Splits {
    u32 first, count;
};

DEVICE Splits splits_of(u32 window, u32 position) {
    u32 first = first_visible(window, position) / SPLIT;
    return Splits{first, position / SPLIT - first + 1};
}

/// Four elements of the attention's result, from its splits: `MERGED_SPLITS` of them are asked for at once, with what goes
/// with them.
DEVICE void merge4(const StepParams &p, u32 head_dim, Splits splits, u32 element, u32 number, float v[4]) {
    constexpr u32 MOST = MERGED_SPLITS;
    u32 head = element / head_dim, in_head = element - head * head_dim;
    const u64 *sums = p.sums + ((size_t)head * p.splits + splits.first) * 2;
    const u64 *partial = p.partial + ((size_t)head * p.splits + splits.first) * head_dim + in_head;
    float m = -INFINITY, l = 0.0f;
    if (splits.count > MOST) {
        for (u32 base = 0; base < splits.count; base += 2 * MOST) {
            const u64 *from[2 * MOST];
            float pairs[2 * MOST][2];
            for (u32 k = 0; k < 2 * MOST; k++) from[k] = sums + 2 * min(base + k, splits.count - 1);
            await_value_pairs(from, number, pairs);
            for (u32 k = 0; k < 2 * MOST; k++) m = pairs[k][0] > m ? pairs[k][0] : m;
        }
    }
    for (int i = 0; i < 4; i++) v[i] = 0.0f;
    for (u32 base = 0; base < splits.count; base += MOST) {
        // What is past the last split repeats it, and is not used.
        const u64 *from[3 * MOST];
        float pairs[3 * MOST][2];
#pragma unroll
        for (u32 k = 0; k < MOST; k++) {
            u32 split = min(base + k, splits.count - 1);
            from[3 * k] = sums + 2 * split;
            from[3 * k + 1] = partial + (size_t)split * head_dim, from[3 * k + 2] = from[3 * k + 1] + 2;
        }
        await_value_pairs(from, number, pairs);
        if (splits.count <= MOST) {
#pragma unroll
            for (u32 k = 0; k < MOST; k++) m = pairs[3 * k][0] > m ? pairs[3 * k][0] : m;
        }
#pragma unroll
        for (u32 k = 0; k < MOST; k++) {
            float f = exponential(sub(pairs[3 * k][0], m));
            if (base + k >= splits.count) continue;
            l = fma(pairs[3 * k][1], f, l);
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = fma(pairs[3 * k + 1 + i / 2][i % 2], f, v[i]);
        }
    }
    float r = quotient(1.0f, l);
    for (int i = 0; i < 4; i++) v[i] = mul(v[i], r);
}

/// The columns of a norm's input that a thread reads: two neighbouring ones of up to so many segments at once.
constexpr int NORM_SEGMENTS = 8;

/// Brings a vector into shared memory, and the sums of the squares of its columns (§4), by a quarter of the threads: two
/// columns each.
DEVICE void read_columns(const ProductPhase &product, u32 number, float *x, float *sums) {
    u32 column = 2 * thread_now(), last = product.segments - 1;
    float acc[2] = {0.0f, 0.0f};
    for (u32 base = 0; base <= last; base += NORM_SEGMENTS) {
        float v[NORM_SEGMENTS][2];
        const u64 *from[NORM_SEGMENTS];
        for (u32 k = 0; k < NORM_SEGMENTS; k++) from[k] = product.mail + min(base + k, last) * 256 + column;
        await_value_pairs(from, number, v);
        for (u32 k = 0; k < NORM_SEGMENTS; k++) {
            if (base + k > last) continue;
            *(float2 *)(x + (base + k) * 256 + column) = make_float2(v[k][0], v[k][1]);
            acc[0] = fma(v[k][0], v[k][0], acc[0]), acc[1] = fma(v[k][1], v[k][1], acc[1]);
        }
    }
    *(float2 *)(sums + column) = make_float2(acc[0], acc[1]);
}

DEVICE void load8(const float *from, float v[8]) {
    float4 low = ((const float4 *)from)[0], high = ((const float4 *)from)[1];
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

/// The integers of a norm of what phase `number` has written, in shared memory. Returns E_a, once all threads have met.
DEVICE int normed_input(const StepParams &p, const Shared &s, const ProductPhase &product, u32 number) {
    u32 t = thread_now(), warp = t >> 5, lane = t & 31, segments = product.segments;
    float v[8], g[8], *x = (float *)s.values;
    // The norm's weights come closer while the input is awaited, and are here when its sum is.
    if (t == THREADS - 1) prefetch(product.norm, segments * 1024);
    if (t < 128) read_columns(product, number, x, s.scratch);
    meet();
    t = thread_now(), warp = t >> 5, lane = t & 31;
    load8(product.norm + min(warp, segments - 1) * 256 + lane * 8, g);
    float inv = inverse_rms(segments, product.eps, s.scratch);
    int e = -133;
    for (u32 segment = warp; segment < segments; segment += WARPS) {
        u32 at = segment * 256 + lane * 8;
        if (segment >= WARPS) load8(product.norm + at, g);
        load8(x + at, v);
        for (int i = 0; i < 8; i++) v[i] = mul(mul(v[i], inv), g[i]);
        e = max(e, quantise_segment(v, s.codes + segment * CODES, s.meta + segment * META, p.fault, product.quantise_step));
    }
    return largest_of_block(e, (int *)s.scratch + 260);
}

/// Makes this block's share of the segments of what the phase before has written, two warps each, and sends them as of this
/// phase. Only warps of the first half do: the others may still write the results of the phase before.
DEVICE void share_segments(const StepParams &p, const Shared &s) {
    constexpr u32 PAIRS = WRITERS / 64;
    u32 t = thread_now(), pair = t >> 6, lane = t & 31;
    if (t >= WRITERS) return;
    u32 index = phase_now(s), number = number_of(s, index) - 1;
    const ProductPhase &product = phase_at(s, index).product;
    // Where it is no attention, nobody looks.
    const AttentionPhase &attention = phase_at(s, index + DESCRIPTORS - 1).attention;
    Range mine = rows_of(product.segments);
    if (mine.count == 0) return;
    Splits splits = splits_of(attention.window, p.position);
    bool merges = product.prologue == MERGE && splits.count <= MERGED_SPLITS;
    // Between products, where values of attention lie otherwise.
    float *x = (float *)s.values + pair * 512;
    for (u32 i = pair; i < mine.count; i += PAIRS) {
        u32 segment = mine.first + i, at = segment * 256 + (t & 63) * 4;
        float v[8];
        if (merges) {
            merge4(p, attention.head_dim, splits, at, number, v);
        } else {
            const u64 *from[2] = {product.mail + at, product.mail + at + 2};
            float pairs[2][2];
            await_value_pairs(from, number, pairs);
            v[0] = pairs[0][0], v[1] = pairs[0][1], v[2] = pairs[1][0], v[3] = pairs[1][1];
        }
        *(float4 *)(x + (t & 63) * 4) = make_float4(v[0], v[1], v[2], v[3]);
        meet_threads_at<64>(pair + 1);
        if ((t & 32) == 0) {
            load8(x + lane * 8, v);
            u8 *made = (u8 *)(x + 256);
            quantise_segment(v, made, made + 256, p.fault, product.quantise_step);
            meet_warp();
            for (u32 word = lane; word < SEGMENT_WORDS; word += 32)
                store_word(p.segments + segment * SEGMENT_WORDS + word, ((const u32 *)made)[word], number + 1);
        }
        // The other warp may write here again.
        meet_threads_at<64>(pair + 1);
    }
}

/// Whether a phase's integers overwrite those that the phase before may still be multiplied by.
DEVICE bool overwrites(const Shared &s, u32 phase) {
    const Phase &now = phase_at(s, phase);
    return now.kind == PRODUCT && now.product.prologue == PLAIN && phase_at(s, phase + DESCRIPTORS - 1).kind == PRODUCT;
}

/// Waits until all warps have multiplied in the phase before, if this one overwrites the integers: those who write results have
/// waited before they wrote any.
DEVICE void await_multiplied(const Shared &s, u32 phase) {
    if (thread_now() < WRITERS && overwrites(s, phase)) meet_threads_at<THREADS>(INTEGERS_MEET);
}

/// Brings the segments that were shared as of this phase into shared memory. Returns E_a, once all threads have met.
DEVICE int shared_input(const StepParams &p, const Shared &s) {
    u32 phase = phase_now(s), number = number_of(s, phase), segments = phase_at(s, phase).product.segments;
    // Pairs of words of a thread that are asked for at once.
    constexpr u32 AT_ONCE = 4;
    u32 t = thread_now(), lane = t & 31, all = segments * (SEGMENT_WORDS / 2);
    for (u32 base = 0; base < all; base += AT_ONCE * THREADS) {
        const u64 *from[AT_ONCE];
        u32 pairs[AT_ONCE][2];
        for (u32 k = 0; k < AT_ONCE; k++) from[k] = p.segments + 2 * min(base + k * THREADS + t, all - 1);
        await_pairs(from, number, pairs);
        if (base == 0) await_multiplied(s, phase);
#pragma unroll
        for (u32 k = 0; k < AT_ONCE; k++) {
            u32 pair = base + k * THREADS + t;
            if (pair >= all) continue;
            u32 segment = pair / (SEGMENT_WORDS / 2), at = (pair - segment * (SEGMENT_WORDS / 2)) * 8;
            *(uint2 *)(at < 256 ? s.codes + segment * CODES + at : s.meta + segment * META + at - 256) = make_uint2(pairs[k][0], pairs[k][1]);
        }
    }
    // Descriptors that this thread has asked for are to be there for all.
    await_copies();
    meet();
    int e = -133;
    for (u32 segment = lane; segment < segments; segment += 32) e = max(e, *(const int *)(s.meta + segment * META + 76));
    return (int)largest_of_warp((u32)(e + 1024)) - 1024;
}

} // namespace hoist
