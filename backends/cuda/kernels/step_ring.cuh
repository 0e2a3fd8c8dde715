// The ring in shared memory that weights are streamed through.
#pragma once

#include "step_layout.cuh"

namespace hoist {

/// This block's runs, by all threads; they have met when it returns.
DEVICE void plan_runs(const StepParams &p, const Shared &s) {
    u32 t = thread_now(), lane = t & 31, warp = t >> 5, before = 0, *sums = (u32 *)s.scratch;
    for (u32 base = 0; base < p.stream_count; base += THREADS) {
        u32 i = base + t, pieces = 0;
        Run run = {};
        if (i < p.stream_count) {
            Stream stream = p.streams[i];
            Range rows = rows_of(stream.rows);
            run.first_row = rows.first, run.rows = rows.count;
            run.from = stream.weight + (u64)rows.first * stream.row_bytes;
            run.bytes = rows.count * stream.row_bytes, run.piece = stream.piece_bytes;
            pieces = (run.bytes + run.piece - 1) / run.piece;
        }
        u32 end = pieces;
        for (int by = 1; by < 32; by <<= 1) {
            u32 other = shuffle_up(end, by);
            if (lane >= by) end += other;
        }
        if (lane == 31) sums[warp] = end;
        meet();
        u32 all = 0;
        for (u32 w = 0; w < WARPS; w++) {
            if (w == warp) end += before + all;
            all += sums[w];
        }
        run.begin = end - pieces, run.end = end;
        if (i < p.stream_count) s.runs[i] = run;
        before += all;
        meet();
    }
}

/// A piece of weights: where it is, rounded down and up to multiples of 16 bytes, as bulk copies want it; what is read beside
/// it is the weight's own, or its padding. No bytes behind the last piece.
struct Piece {
    const u8 *from;
    u32 bytes;
};

/// The piece of a number, which no earlier call with this cursor has exceeded.
DEVICE Piece piece_at(const StepParams &p, const Shared &s, u32 number, Cursor &cursor) {
    while (number >= cursor.end && cursor.run + 1 < p.stream_count) cursor.end = s.runs[++cursor.run].end;
    if (number >= cursor.end) return Piece{nullptr, 0};
    const Run &run = s.runs[cursor.run];
    u32 at = (number - run.begin) * run.piece;
    u64 start = (u64)run.from + at, end = start + min(run.piece, run.bytes - at);
    start &= ~15ull, end = (end + 15) & ~15ull;
    return Piece{(const u8 *)start, (u32)(end - start)};
}

/// Asks for a piece into a slot that nobody uses, by one thread.
DEVICE void fill(const Shared &s, const Piece &piece, u32 slot) {
    if (piece.bytes == 0) return;
    barrier_expect(s.full + slot, piece.bytes);
    bulk_copy(s.ring + slot * SLOT, piece.from, piece.bytes, s.full + slot);
}

} // namespace hoist
