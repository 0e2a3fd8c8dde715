// What a step in one launch is told, its shared memory, and how its blocks write to each other.
#pragma once

#include "decode.cuh"

namespace hoist {

constexpr int WARPS = 16, THREADS = WARPS * 32;
/// Bytes of a slot of the ring: a piece of 32 segments of Q4_K, or of as many as fit of another encoding.
constexpr u32 SLOT = 4640;
/// A quantised activation segment in shared memory: codes, and what goes with them. Odd multiples of 16 bytes, so that lanes
/// that read neighbouring segments use different banks.
constexpr u32 CODES = 272, META = 80;
/// Words of a quantised segment's mail: four bytes of codes or of what goes with them each.
constexpr u32 SEGMENT_WORDS = 84;
constexpr u32 SPLIT = 256;
/// Bytes for stored values in shared memory: whole positions, in two halves that take turns.
constexpr u32 VALUES = 32768;
/// Splits that the consumer of attention merges by itself; more are merged by those who made them, in one more exchange.
constexpr u32 MERGED_SPLITS = 4;
/// The threads behind the first half of a block write a phase's results while those before begin the next one.
constexpr u32 WRITERS = THREADS / 2;
/// Descriptors of phases in shared memory: of this one, the one before, and two to come.
constexpr u32 DESCRIPTORS = 4;

enum Kind : u32 { PRODUCT = 0, ATTENTION = 1 };
enum Prologue : u32 { NORM = 0, PLAIN = 1, MERGE = 2 };
enum Epilogue : u32 { STORE = 0, RESIDUAL = 1, SILU = 2, GELU = 3, LOGITS = 4 };
/// The last three only for embeddings.
enum Coding : u32 { CODE_Q4_K = 0, CODE_Q5_K = 1, CODE_Q6_K = 2, CODE_Q8_0 = 3, CODE_F16 = 4, CODE_BF16 = 5, CODE_F32 = 6 };

struct StepMatrix {
    const u8 *weight;
    const i16 *exponents;
    const float *bias;
    /// Mail, or floats for logits.
    void *out;
    u32 rows, coding, step, pad;
};

struct ProductPhase {
    const u64 *mail;
    const float *norm;
    u32 prologue, epilogue, matrices, segments;
    /// ceil(2^32 / segments)
    u32 magic;
    float eps;
    u32 quantise_step;
    /// The first matrix's number among those that are streamed.
    u32 stream;
    u32 pad[2];
    StepMatrix matrix[3];
};

struct AttentionPhase {
    const u64 *query, *key, *value;
    const float *table;
    u64 *out;
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
    u64 end;
};
static_assert(sizeof(StepMatrix) == 48);
static_assert(sizeof(ProductPhase) == 200);
static_assert(sizeof(AttentionPhase) == 96);
static_assert(sizeof(Phase) == 224);

/// A matrix as it is streamed.
struct Stream {
    const u8 *weight;
    u32 rows, row_bytes, piece_bytes, pad;
};
static_assert(sizeof(Stream) == 24);

/// What is kept from one token to the next.
struct Counters {
    u32 arrived, token;
};

/// Where the other parts of shared memory begin: `Places` of src/decode/persistent.rs.
struct Places {
    u32 runs, full, sums, exponents, own, codes, meta, ring, end, pad;
};

/// The best of a block's logits: the value and its row.
constexpr u32 BEST_WORDS = 2;

struct StepParams {
    const Phase *phases;
    const Stream *streams;
    Counters *counters;
    u32 *fault;
    /// Of attention's splits: a maximum and a sum each; their unfinished results.
    u64 *sums, *partial;
    /// Quantised segments; the residual stream, first as the embedding has it; the best of each block's logits.
    u64 *segments, *residual, *bests;
    const u8 *embedding;
    u64 embedding_row_bytes;
    /// The fault word and the best row, in memory of the host, and where the step's number goes when they are there.
    u32 *results, *done;
    /// Clock of the first block's multiprocessor at four points of each phase, then nanoseconds at the start and the end, and
    /// that clock at the start.
    u64 *times;
    u32 count, stream_count, splits, slots, row_limit, exponent_limit, width;
    u32 embedding_coding, token, sequence, position, step;
    Places at;
};
static_assert(sizeof(StepParams) == 200);

// ---- shared memory ----

/// A matrix's rows that this block multiplies: a run of bytes, streamed in pieces that are numbered on from run to run.
struct Run {
    const u8 *from;
    u32 bytes, piece;
    /// The first piece's number, and the number behind the last's.
    u32 begin, end;
    u32 first_row, rows;
};
static_assert(sizeof(Run) == 32);

/// Where a warp has got to in the runs: the one in hand, and the number behind its last piece; and its phase.
struct Cursor {
    u32 run, end, phase, pad;
};

// What lives from phase to phase is in shared memory, not in registers: those that do not suffice would be kept in local
// memory, whose way here is as long as the second-level cache's.
struct Shared {
    /// A warp's place in the runs; the number of the first phase.
    Cursor *cursors;
    u32 *first_number;
    /// A barrier for each slot of the ring.
    u64 *full;
    Run *runs;
    Phase *phases;
    float *scratch;
    /// Of the rows of this phase and of the one before, in halves that take turns.
    i64 *sums;
    /// Of this phase, the one before and the one to come, in quarters that take turns.
    i16 *exponents;
    /// The residual stream's rows that this block adds to.
    float *own;
    u8 *codes, *meta;
    /// Stored values of attention, on their way; between, a vector that is normed or merged.
    u16 *values;
    u8 *ring;
};

/// Where the parts of shared memory begin whose sizes are the same for every program.
constexpr u32 SCRATCH_AT = DESCRIPTORS * sizeof(Phase), NUMBER_AT = SCRATCH_AT + 320 * 4, CURSORS_AT = NUMBER_AT + 16;
constexpr u32 VALUES_AT = CURSORS_AT + WARPS * sizeof(Cursor);
static_assert(VALUES_AT % 16 == 0);

DEVICE Shared lay_out(u8 *base, const StepParams &p) {
    Shared s;
    s.phases = (Phase *)base;
    s.scratch = (float *)(base + SCRATCH_AT);
    s.first_number = (u32 *)(base + NUMBER_AT);
    s.cursors = (Cursor *)(base + CURSORS_AT);
    s.values = (u16 *)(base + VALUES_AT);
    s.runs = (Run *)(base + p.at.runs);
    s.full = (u64 *)(base + p.at.full);
    s.sums = (i64 *)(base + p.at.sums);
    s.exponents = (i16 *)(base + p.at.exponents);
    s.own = (float *)(base + p.at.own);
    s.codes = base + p.at.codes;
    s.meta = base + p.at.meta;
    s.ring = base + p.at.ring;
    return s;
}

DEVICE const Phase &phase_at(const Shared &s, u32 phase) { return s.phases[phase & DESCRIPTORS - 1]; }

/// The warp's phase. It is read anew each time.
DEVICE u32 phase_now(const Shared &s) { return *(const volatile u32 *)&s.cursors[thread_now() >> 5].phase; }

/// A phase's number, which its mail has.
DEVICE u32 number_of(const Shared &s, u32 phase) { return *(const volatile u32 *)s.first_number + phase; }

/// Waits for all threads of this block.
DEVICE void meet() { meet_block(); }

/// Numbers of barriers of a part of the block, behind those of the pairs of warps that make segments: all have multiplied, as
/// those wait for who write results; and as the others do, before they overwrite the integers.
constexpr u32 RESULTS_MEET = 8, INTEGERS_MEET = 9;

// ---- mail ----

/// N values of one phase, all asked for at once.
template <int N> DEVICE void await_values(const u64 *const (&from)[N], u32 number, float (&v)[N]) {
    u32 bits[N];
    await_words(from, number, bits);
    for (int i = 0; i < N; i++) v[i] = f32_of_bits(bits[i]);
}

/// N pairs of neighbouring values, likewise; at multiples of 16 bytes.
template <int N> DEVICE void await_value_pairs(const u64 *const (&from)[N], u32 number, float (&v)[N][2]) {
    u32 bits[N][2];
    await_pairs(from, number, bits);
    for (int i = 0; i < N; i++) v[i][0] = f32_of_bits(bits[i][0]), v[i][1] = f32_of_bits(bits[i][1]);
}

DEVICE void send(u64 *to, float x, u32 number) { store_word(to, bits_of(x), number); }

// ---- what a block does of a phase ----

struct Range {
    u32 first, count;
};

/// The rows of a matrix that this block multiplies; their number times that of blocks is below 2^32.
DEVICE Range rows_of(u32 rows) {
    u32 block = block_now(), first = rows * block / gridDim.x, last = rows * (block + 1) / gridDim.x;
    return Range{first, last - first};
}

DEVICE u32 segment_bytes(u32 coding) {
    return coding == CODE_Q4_K ? 144 : coding == CODE_Q5_K ? 176 : coding == CODE_Q6_K ? 210 : 272;
}

/// Segments of a piece.
DEVICE u32 piece_of(u32 coding) { return coding == CODE_Q4_K ? 32 : coding == CODE_Q5_K ? 26 : coding == CODE_Q6_K ? 21 : 17; }

} // namespace hoist
