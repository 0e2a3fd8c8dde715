// Kernels that are wrong in one way each, beside ones that are right: what the emulated device must find, and must not.

#include "primitives.cuh"

using namespace hoist;

// One thread waits for bytes that nobody sends; the others meet without it.
extern "C" __global__ void waits_for_nobody(u32 *) {
    SHARED(u64, barrier, [1]);
    if (threadIdx.x == 0) barrier_init(barrier, 1);
    meet_block();
    if (threadIdx.x == 0) barrier_wait(barrier, 0);
    meet_block();
}

extern "C" __global__ void writes_at(u32 *to, u64 at) { to[at + threadIdx.x] = 1; }

/// Reverses `n` words; `meets` says whether threads wait for what others write.
extern "C" __global__ void __launch_bounds__(256) reverses(u32 *words, u32 meets) {
    SHARED(u32, scratch, [256]);
    u32 t = threadIdx.x;
    scratch[t] = words[t];
    if (meets) meet_block();
    words[t] = scratch[blockDim.x - 1 - t];
}

extern "C" __global__ void arrives_too_often(u32 *) {
    SHARED(u64, barrier, [1]);
    if (threadIdx.x == 0) {
        barrier_init(barrier, 1);
        barrier_expect(barrier, 16);
        barrier_arrive(barrier);
    }
}

extern "C" __global__ void lanes_part(u32 *words) {
    u32 x = words[threadIdx.x];
    if (threadIdx.x < 16) {
        words[threadIdx.x] = shuffle_xor(x, 1);
    } else {
        words[threadIdx.x] = shuffle_xor(x, 2);
    }
}

/// Copies 1024 words through shared memory by bulk copies, in four slots of 64 words; `waits` says whether a slot's bytes are
/// waited for.
extern "C" __global__ void copies_in_bulk(const u32 *from, u32 *to, u32 waits) {
    SHARED(u64, barriers, [4]);
    DYNAMIC_SHARED(u32, ring, 128);
    u32 t = threadIdx.x;
    if (t == 0)
        for (u32 i = 0; i < 4; i++) barrier_init(barriers + i, 1);
    barriers_are_initialised();
    meet_block();
    u32 parity = 0;
    for (u32 round = 0; round < 4; round++) {
        if (t == 0)
            for (u32 i = 0; i < 4; i++) {
                barrier_expect(barriers + i, 256);
                bulk_copy(ring + 64 * i, from + 256 * round + 64 * i, 256, barriers + i);
            }
        for (u32 i = 0; i < 4; i++) {
            if (waits) barrier_wait(barriers + i, parity);
            to[256 * round + 64 * i + t] = ring[64 * i + t];
        }
        parity ^= 1;
        // What is not waited for must at least have come before the barrier is used again.
        for (u32 i = 0; i < 4; i++) barrier_wait(barriers + i, parity ^ 1);
        meet_block();
    }
}

/// The same, word by word, in two groups; `waits` as above.
extern "C" __global__ void copies_words(const u32 *from, u32 *to, u32 waits) {
    DYNAMIC_SHARED(u32, ring, 128);
    u32 t = threadIdx.x;
    copy_4(ring + t, from + t), end_copies();
    copy_4(ring + blockDim.x + t, from + blockDim.x + t), end_copies();
    if (waits) await_copies_but<1>();
    to[t] = ring[t];
    if (waits) await_copies();
    to[blockDim.x + t] = ring[blockDim.x + t];
    await_copies();
}

/// Blocks of a grid meet `rounds` times; each adds its number to a word in turn.
extern "C" __global__ void grid_meets(u32 *arrived, u32 *word, u32 rounds) {
    for (u32 i = 0; i < rounds; i++) {
        if (threadIdx.x == 0) {
            if (i % gridDim.x == blockIdx.x) *word = *word * 3 + blockIdx.x;
            release_add(arrived, 1);
            await_at_least(arrived, (i + 1) * gridDim.x);
        }
        meet_threads<1, 64>();
    }
}

/// 16 × 32 and 32 × 8 signed bytes, row after row, to 16 × 8 sums.
extern "C" __global__ void multiplies(const i8 *a, const i8 *b, int *d) {
    u32 lane = threadIdx.x, g = lane >> 2, t = lane & 3;
    u32 a0 = *(const u32 *)(a + g * 32 + 4 * t), a1 = *(const u32 *)(a + (g + 8) * 32 + 4 * t);
    u32 a2 = *(const u32 *)(a + g * 32 + 16 + 4 * t), a3 = *(const u32 *)(a + (g + 8) * 32 + 16 + 4 * t);
    u32 b0 = 0, b1 = 0;
    for (u32 i = 0; i < 4; i++) {
        b0 |= (u32)(u8)b[(4 * t + i) * 8 + g] << 8 * i;
        b1 |= (u32)(u8)b[(16 + 4 * t + i) * 8 + g] << 8 * i;
    }
    int sums[4] = {1, 2, 3, 4};
    mma_s8(sums, a0, a1, a2, a3, b0, b1);
    d[g * 8 + 2 * t] = sums[0] - 1, d[g * 8 + 2 * t + 1] = sums[1] - 2;
    d[(g + 8) * 8 + 2 * t] = sums[2] - 3, d[(g + 8) * 8 + 2 * t + 1] = sums[3] - 4;
}

/// Every f16 to f32 and back.
extern "C" __global__ void widens(float *out, u32 *back) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = f32_of_f16((u16)i);
    back[i] = f16_of_f32(out[i]);
}
extern "C" __global__ void narrows(const float *in, u32 *out) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = f16_of_f32(in[i]);
}

// ---- orders of accesses to shared memory ----

enum Hand : u32 { NOTHING = 0, BLOCK = 1, NAMED = 2, ARRIVES = 3, WARP_AND_ARRIVAL = 4, ARRIVAL = 5 };

/// A warp writes a word a lane, another one reads them; `how` says what is between.
extern "C" __global__ void hands_over(u32 *out, u32 how) {
    SHARED(u32, words, [32]);
    SHARED(u64, barrier, [1]);
    u32 t = threadIdx.x, lane = t & 31;
    if (t == 0) barrier_init(barrier, 1);
    meet_block();
    if (t < 32) words[lane] = lane;
    if (how == BLOCK) {
        meet_block();
    } else if (how == NAMED) {
        meet_threads_at<64>(3);
    } else if (t < 32) {
        if (how == ARRIVES) arrive_threads_at<64>(3);
        if (how == WARP_AND_ARRIVAL) meet_warp();
        // One lane's arrival says nothing of the others, unless they have met it.
        if (how >= WARP_AND_ARRIVAL && lane == 0) barrier_arrive(barrier);
    } else {
        if (how == ARRIVES) meet_threads_at<64>(3);
        if (how >= WARP_AND_ARRIVAL) barrier_wait(barrier, 0);
    }
    if (t >= 32) out[lane] = words[31 - lane];
}

/// Lanes read what their neighbours write: with nothing between (0), a meeting (1), or a shuffle, which orders nothing (2).
extern "C" __global__ void neighbours(u32 *out, u32 how) {
    SHARED(u32, words, [32]);
    u32 t = threadIdx.x, x = t;
    words[t] = t;
    if (how == 1) meet_warp();
    if (how == 2) x = shuffle_xor(t, 1);
    out[t] = words[t ^ 1] + x;
}

/// A slot is filled, read by a warp, and filled again: after the lanes have met (0), at once (1), or so that the second fill is
/// not waited for before it is read (2). Words that a thread copies itself are read by the neighbour, after (0) or before (3)
/// all have met.
extern "C" __global__ void refills(const u32 *from, u32 *out, u32 how) {
    SHARED(u64, barrier, [1]);
    DYNAMIC_SHARED(u32, slot, 128);
    u32 t = threadIdx.x, sum = 0;
    if (t == 0) barrier_init(barrier, 1);
    barriers_are_initialised();
    meet_block();
    for (u32 round = 0; round < 2; round++) {
        if (t == 0) barrier_expect(barrier, 128), bulk_copy(slot, from + 32 * round, 128, barrier);
        if (round == 0 || how != 2) barrier_wait(barrier, round);
        meet_warp();
        sum += slot[31 - t];
        if (how != 1) meet_warp();
    }
    barrier_wait(barrier, 1);
    copy_4(slot + 32 + t, from + t);
    await_copies();
    if (how != 3) meet_warp();
    out[t] = sum + slot[32 + (t ^ 1)];
}

/// All threads add to a word, and the first one reads it: when all have met, or not.
extern "C" __global__ void counts(u32 *out, u32 meets) {
    SHARED(u32, count, [1]);
    if (threadIdx.x == 0) *count = 0;
    meet_block();
    atomic_add(count, 1);
    if (meets) meet_block();
    if (threadIdx.x == 0) *out = *count;
}
