// Attention of one token: a task is a split of a key and value head, for two query heads.
#pragma once

#include "step_product.cuh"

namespace hoist {

/// Query heads of a task.
constexpr u32 PAIR = 2;

/// One element of a head after Rope.
struct Turn {
    u32 first, second;
    float c, s;
    bool turned, is_second;
};

/// What an element's turn takes, before the head is there.
DEVICE Turn turn_of(u32 element, const float *table, u32 n_rot, u32 half_split) {
    Turn turn = {element, element, 1.0f, 0.0f, element < n_rot, false};
    if (!turn.turned) return turn;
    u32 half = n_rot / 2, j = half_split ? (element >= half ? element - half : element) : element / 2;
    turn.is_second = half_split ? element >= half : element & 1;
    turn.first = half_split ? j : 2 * j, turn.second = half_split ? j + half : 2 * j + 1;
    float2 both = load_constant((const float2 *)(table + 2 * j));
    turn.c = both.x, turn.s = both.y;
    return turn;
}

DEVICE float turned(const Turn &turn, const u64 *x, u32 number) {
    const u64 *from[2] = {x + turn.first, x + turn.second};
    float v[2];
    await_values(from, number, v);
    if (!turn.turned) return v[0];
    return turn.is_second ? fma(v[0], turn.s, mul(v[1], turn.c)) : fma(v[0], turn.c, -mul(v[1], turn.s));
}

/// Starts to copy the `chunk`th run of `room` stored values, 16 bytes at a time. Every thread ends a group of copies, if an
/// empty one.
DEVICE void copy_values(const Shared &s, const u16 *values, u32 padded, u32 from, u32 stored, u32 room, u32 chunk) {
    u32 begin = min(from + chunk * room, stored), end = min(begin + room, stored);
    u16 *to = s.values + (chunk & 1) * (VALUES / 4);
    const u16 *v = values + (size_t)begin * padded;
    for (u32 i = thread_now() * 8; i < (end - begin) * padded; i += THREADS * 8)
        copy_16(to + i, v + i);
    end_copies();
}

/// Eight elements of two queries and of a key, one after the other.
DEVICE void dot8(const float *q, u32 element, uint4 k, float &x0, float &x1) {
    u32 words[4] = {k.x, k.y, k.z, k.w};
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        float4 queries = *(const float4 *)(q + (element + i) * PAIR);
        float y0 = f32_of_f16((u16)words[i >> 1]), y1 = f32_of_f16((u16)(words[i >> 1] >> 16));
        x0 = fma(queries.x, y0, x0), x1 = fma(queries.y, y0, x1);
        x0 = fma(queries.z, y1, x0), x1 = fma(queries.w, y1, x1);
    }
}

/// Keys that a thread has read before queries are there, in units of eight elements: half of a head of 128.
constexpr u32 EARLY_KEYS = 8;

/// Both halves of a block's threads have the split's positions, and each half has half of the elements, which follow each
/// other: the second half of a sum goes on where the first has ended.
DEVICE void run_attention(const StepParams &p, const Shared &s) {
    u32 index = phase_now(s), number = number_of(s, index), sequence = p.sequence, position = p.position;
    const AttentionPhase &a = phase_at(s, index).attention;
    u32 t = thread_now(), hd = a.head_dim;
    u32 first = first_visible(a.window, position), first_split = first / SPLIT, last_split = position / SPLIT;
    u32 ns = last_split - first_split + 1, group = a.heads / a.kv_heads, pairs = (group + PAIR - 1) / PAIR;
    const float *table = a.table + (size_t)position * a.n_rot;
    // Where activations are between products: queries element by element, weights of each head, sums of half heads, the new
    // key and value.
    float *q = (float *)s.codes, *w = q + PAIR * hd, *halves = w + PAIR * SPLIT, *key = halves + PAIR * SPLIT, *value = key + hd;
    float *scratch = s.scratch;
    u32 upper = t / SPLIT, at_split = t % SPLIT, low = hd / 16, eighths = upper ? hd / 8 - low : low, first_eighth = upper ? low : 0;
    for (u32 task = block_now(); task < a.kv_heads * pairs * ns; task += gridDim.x) {
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
        u32 at = base + at_split;
        bool visible = at >= first && at <= position, is_stored = visible && at != position;
        const uint4 *key_at = (const uint4 *)(keys + (size_t)(at / 64) * a.padded * 64 + at % 64 * 8) + first_eighth * 64;
        uint4 early[EARLY_KEYS];
#pragma unroll
        for (u32 i = 0; i < EARLY_KEYS; i++)
            if (is_stored && i < eighths) early[i] = key_at[i * 64];
        for (u32 i = t; i < 4 * hd; i += THREADS) {
            u32 what = 0, element = i;
            while (element >= hd) element -= hd, what++;
            if (what < PAIR) {
                Turn turn = turn_of(element, table, a.n_rot, a.half_split);
                q[element * PAIR + what] = what < n ? turned(turn, a.query + (size_t)(head + what) * hd, number - 1) : 0.0f;
            } else if (newest) {
                const u64 *mail = (what == PAIR ? a.key : a.value) + (size_t)kv_head * hd;
                Turn turn = turn_of(element, table, what == PAIR ? a.n_rot : 0, a.half_split);
                float x = turned(turn, mail, number - 1);
                u16 half = f16_of_f32(x);
                bool finite = (half & 0x7fff) < 0x7c00;
                if (!finite) report(p.fault, a.store_step);
                if (what == PAIR) {
                    key[element] = f32_of_f16(half);
                    size_t to = ((size_t)(position / 64) * (a.padded / 8) + element / 8) * 512 + position % 64 * 8 + element % 8;
                    if (finite && pair == 0) keys[to] = half;
                } else {
                    value[element] = f32_of_f16(half);
                    if (finite && pair == 0) values[(size_t)position * a.padded + element] = half;
                }
            }
        }
        meet();
        float x0 = 0.0f, x1 = 0.0f;
        for (u32 turn = 0; turn < 2; turn++) {
            if (turn == upper) {
                if (upper) x0 = halves[at_split], x1 = halves[SPLIT + at_split];
                if (is_stored) {
#pragma unroll
                    for (u32 i = 0; i < EARLY_KEYS; i++)
                        if (i < eighths) dot8(q, (first_eighth + i) * 8, early[i], x0, x1);
                    for (u32 i = EARLY_KEYS; i < eighths; i++) dot8(q, (first_eighth + i) * 8, key_at[i * 64], x0, x1);
                } else if (visible) {
                    for (u32 element = first_eighth * 8; element < (first_eighth + eighths) * 8; element++) {
                        x0 = fma(q[element * 2], key[element], x0);
                        x1 = fma(q[element * 2 + 1], key[element], x1);
                    }
                }
                if (!upper) halves[at_split] = x0, halves[SPLIT + at_split] = x1;
            }
            if (turn == 0) meet();
        }
        float m0 = -INFINITY, m1 = -INFINITY;
        if (upper) {
            x0 = mul(x0, a.scale), x1 = mul(x1, a.scale);
            if (a.capped) x0 = soft_capped(x0, a.cap), x1 = soft_capped(x1, a.cap);
            if (visible) m0 = x0, m1 = x1;
            for (int h = 16; h > 0; h >>= 1) {
                float y0 = shuffle_xor(m0, h), y1 = shuffle_xor(m1, h);
                m0 = y0 > m0 ? y0 : m0, m1 = y1 > m1 ? y1 : m1;
            }
            if ((t & 31) == 0) scratch[at_split >> 5] = m0, scratch[8 + (at_split >> 5)] = m1;
        }
        meet();
        float most[16];
        load8(scratch, most), load8(scratch + 8, most + 8);
        m0 = most[0], m1 = most[8];
        for (int i = 1; i < 8; i++) {
            m0 = most[i] > m0 ? most[i] : m0;
            m1 = most[8 + i] > m1 ? most[8 + i] : m1;
        }
        if (upper) {
            w[at_split] = visible ? exponential(sub(x0, m0)) : 0.0f;
            w[SPLIT + at_split] = visible ? exponential(sub(x1, m1)) : 0.0f;
        }
        meet();
        // The last warps sum weights while the first multiply values.
        u32 h = WARPS - 1 - (t >> 5);
        if (h < n) {
            const float *x = w + h * SPLIT + (t & 31);
            float low_sum = 0.0f, high_sum = 0.0f;
            for (int i = 0; i < 4; i++) low_sum = add(low_sum, x[64 * i]), high_sum = add(high_sum, x[64 * i + 32]);
            float l = add(low_sum, high_sum);
            for (int by = 16; by > 0; by >>= 1) l = add(l, shuffle_xor(l, by));
            u64 *sums = p.sums + ((size_t)(head + h) * p.splits + split) * 2;
            if ((t & 31) == 0) send(sums, h ? m1 : m0, number), send(sums + 1, l, number);
        }
        // An element of a head for each thread; a head of more than half as many elements as there are threads has several
        // for a thread.
        float o[PAIR] = {0.0f, 0.0f};
        u32 wide = hd > THREADS / PAIR, which = wide ? 0 : t / hd, element = wide ? t : t - which * hd;
        bool multiplies = wide ? element < hd : which < n;
        for (u32 chunk = 0; chunk < chunks; chunk++) {
            u32 begin = from + chunk * room, stop = min(begin + room, stored);
            // Two groups of copies are under way; the older one is needed.
            await_copies_but<1>();
            meet();
            const u16 *v = s.values + (chunk & 1) * (VALUES / 4) + element;
            if (multiplies) {
                const float *weights = w + which * SPLIT;
                if (wide) {
                    for (u32 x = begin; x < stop; x++, v += a.padded) {
                        float y = f32_of_f16(*v);
                        o[0] = fma(weights[x], y, o[0]), o[1] = fma(weights[SPLIT + x], y, o[1]);
                    }
                } else {
#pragma unroll 16
                    for (u32 x = begin; x < stop; x++, v += a.padded) o[0] = fma(weights[x], f32_of_f16(*v), o[0]);
                }
            }
            if (chunk + 2 < chunks) meet();
            copy_values(s, values + (size_t)base * a.padded, a.padded, from, stored, room, chunk + 2);
        }
        if (multiplies) {
#pragma unroll
            for (u32 i = 0; i < PAIR; i++) {
                u32 head_of_pair = which + i;
                if (head_of_pair >= n || (!wide && i > 0)) continue;
                if (newest) o[i] = fma(w[head_of_pair * SPLIT + stored], value[element], o[i]);
                send(p.partial + ((size_t)(head + head_of_pair) * p.splits + split) * hd + element, o[i], number);
            }
        }
        await_copies();
    }
    if (ns <= MERGED_SPLITS) return;
    // Too many splits for every block to merge them again: warps of all blocks share them.
    for (u32 i = (block_now() + t / 32 * gridDim.x) * 32 + (t & 31); i < a.heads * hd / 4; i += gridDim.x * THREADS) {
        float v[4];
        merge4(p, hd, Splits{first_split, ns}, 4 * i, number, v);
        for (int k = 0; k < 4; k++) send(a.out + 4 * i + k, v[k], number);
    }
}

} // namespace hoist
