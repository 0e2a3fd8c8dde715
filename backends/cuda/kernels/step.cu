// One token through a whole decoder of the llama kind in one launch, from its number to the number of the next: a persistent
// grid, one block a multiprocessor, which streams every matrix through a ring in shared memory by bulk copies that run ahead
// across phases, since the addresses of weights depend on nothing. Who has used a piece of weights up asks for the piece that
// takes its place. A lane multiplies a segment of 256 weights.
//
// Phases hand results on as mail: a word of 64 bits has a value and the number of the phase that wrote it, and who needs the
// value waits for that number. No barrier of the grid, no fence: a value is there as soon as it is seen. A mailbox is written
// again a layer later. By then everybody has read it: a block writes a phase's results only when it has read that phase's
// whole input, and a block without rows in a phase does not read there, so that along the chain of at least three phases from
// one use of a mailbox to the next, all who read it have written something that all later writers have waited for.
//
// A norm and the integers behind it are made by every block for itself, which is cheaper than another exchange. Wide vectors
// are not: every block would read 8 bytes a value of what attention or the gated product has left. There a warp of some block
// makes a segment's integers, and all blocks read those.
//
// ptx: compute_90

#include "step_attention.cuh"

namespace hoist {

// ---- the embedding ----

/// Sends 32 values of the token's row, as GGML dequantises them (§1.4).
template <class E> DEVICE void embed_block(const u8 *row, u32 block, u64 *to, u32 number) {
    Block b;
    E::read(row, block, b);
#pragma unroll
    for (int i = 0; i < 32; i++) {
        float y = mul(b.s[i >> 4], (float)(i8)(b.w[i >> 2] >> 8 * (i & 3)));
        send(to + 32 * block + i, E::MINS ? sub(y, b.m[i >> 4]) : y, number);
    }
}

/// Sends this block's part of the token's row, 32 values a thread.
DEVICE void embed(const StepParams &p, u32 number) {
    Range blocks = rows_of(p.width / 32);
    const u8 *row = p.embedding + p.token * p.embedding_row_bytes;
    u32 coding = p.embedding_coding;
    if (coding < CODE_F16) {
        for (u32 i = thread_now(); i < blocks.count; i += THREADS) {
            u32 block = blocks.first + i;
            switch (coding) {
            case CODE_Q4_K: embed_block<Q4_K>(row, block, p.residual, number); break;
            case CODE_Q5_K: embed_block<Q5_K>(row, block, p.residual, number); break;
            case CODE_Q6_K: embed_block<Q6_K>(row, block, p.residual, number); break;
            default: embed_block<Q8_0>(row, block, p.residual, number);
            }
        }
        return;
    }
    for (u32 i = blocks.first * 32 + thread_now(); i < (blocks.first + blocks.count) * 32; i += THREADS) {
        float x = coding == CODE_F32   ? ((const float *)row)[i]
                  : coding == CODE_F16 ? f32_of_f16(((const u16 *)row)[i])
                                       : f32_of_bf16(((const u16 *)row)[i]);
        send(p.residual + i, x, number);
    }
}

// ---- a step ----

/// Copies the descriptor of a phase to shared memory, by one warp, without waiting for it.
DEVICE void fetch(const StepParams &p, const Shared &s, u32 phase) {
    if (phase >= p.count) return;
    u32 i = 4 * (thread_now() & 31);
    if (i < sizeof(Phase) / 4) copy_16((u32 *)&s.phases[phase & DESCRIPTORS - 1] + i, (const u32 *)(p.phases + phase) + i);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_step(const __grid_constant__ StepParams p) {
    DYNAMIC_SHARED(u8, memory, 128);
    Shared s = lay_out(memory, p);
    u32 t = thread_now();
    u32 warp = t >> 5, lane = t & 31;
    if (block_now() == 0 && t == WRITERS) p.times[p.count * 4] = nanoseconds(), p.times[p.count * 4 + 2] = cycles();
    // Numbers go on from the tokens before this one; 0 is none's, and the embedding has one.
    u32 number = p.counters->token * (p.count + 1) + 1;
    embed(p, number);
    if (t < p.slots) barrier_init(s.full + t, 1);
    barriers_are_initialised();
    if (warp == WARPS - 1) fetch(p, s, 0), fetch(p, s, 1), await_copies();
    plan_runs(p, s);
    if (lane == 0) {
        Cursor cursor = {0, s.runs[0].end, 0, 0};
        for (u32 slot = warp; slot < p.slots; slot += WARPS) fill(s, piece_at(p, s, slot, cursor), slot);
        s.cursors[warp] = cursor;
    }
    meet_warp();
    fetch_exponents(p, s, phase_at(s, 0), 0);
    if (t == 0) *s.first_number = number + 1;
    // Those who write results add to these.
    Range own = rows_of(p.width);
    if (t >= WRITERS)
        for (u32 i = t - WRITERS; i < own.count; i += THREADS - WRITERS)
            s.own[i] = f32_of_bits(await_word(p.residual + own.first + i, number));
    await_copies();
    meet();
#pragma unroll 1
    for (;;) {
        u32 i = phase_now(s);
        if (i == p.count) break;
        stamp(p, i, START);
        // Two ahead, where nobody reads any more: everybody has met since the phase that was there.
        if (thread_now() >> 5 == WARPS - 1) fetch(p, s, i + 2);
        if (i + 1 < p.count) fetch_exponents(p, s, phase_at(s, i + 1), i + 1);
        if (phase_at(s, i).kind == ATTENTION) {
            run_attention(p, s);
            await_copies();
            // What the next phase needs in shared memory is free.
            meet();
        } else {
            int ea = begin_product(p, s);
            if (ea != NO_ROWS) multiply(p, s, ea), finish_product(p, s, ea);
        }
        i = phase_now(s);
        stamp(p, i, WRITTEN);
        meet_warp();
        if ((thread_now() & 31) == 0) s.cursors[thread_now() >> 5].phase = i + 1;
        meet_warp();
    }
    if (block_now() == 0 && thread_now() < 32) tell_host(p, number_of(s, p.count - 1));
    meet();
    if (block_now() == 0 && thread_now() == WRITERS) p.times[p.count * 4 + 1] = nanoseconds();
    // The last block to get here counts the token; the others have read the count.
    if (thread_now() == 0 && atomic_add(&p.counters->arrived, 1) == gridDim.x - 1) p.counters->arrived = 0, p.counters->token++;
}

} // namespace hoist
