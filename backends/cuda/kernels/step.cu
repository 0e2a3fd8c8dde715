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
    /// Products before this one.
    u32 ordinal, pad;
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
    /// A barrier for each slot of the ring, and one for all warps to have multiplied.
    u64 *full, *multiplied;
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
constexpr u32 SCRATCH_AT = DESCRIPTORS * sizeof(Phase), MULTIPLIED_AT = SCRATCH_AT + 320 * 4, CURSORS_AT = MULTIPLIED_AT + 16;
constexpr u32 VALUES_AT = CURSORS_AT + WARPS * sizeof(Cursor);
static_assert(VALUES_AT % 16 == 0);

DEVICE Shared lay_out(u8 *base, const StepParams &p) {
    Shared s;
    s.phases = (Phase *)base;
    s.scratch = (float *)(base + SCRATCH_AT);
    s.multiplied = (u64 *)(base + MULTIPLIED_AT);
    s.first_number = (u32 *)(base + MULTIPLIED_AT + 8);
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

// ---- the ring ----

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

// ---- activations ----

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

/// Makes this block's share of the segments of what phase `number` has written, two warps each, and sends them as of the phase
/// behind that. Only warps of the first half do: the others may still write the results of the phase before.
DEVICE void share_segments(const StepParams &p, const Shared &s, const ProductPhase &product, const AttentionPhase &attention,
                           u32 position, u32 number) {
    constexpr u32 PAIRS = WRITERS / 64;
    u32 t = thread_now(), pair = t >> 6, lane = t & 31;
    if (t >= WRITERS) return;
    Range mine = rows_of(product.segments);
    if (mine.count == 0) return;
    Splits splits = splits_of(attention.window, position);
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

/// Brings the segments that were shared as of phase `number` into shared memory. Returns E_a, once all threads have met.
/// `products` is how many products there were before.
DEVICE int shared_input(const StepParams &p, const Shared &s, u32 segments, u32 number, u32 products) {
    // Pairs of words of a thread that are asked for at once.
    constexpr u32 AT_ONCE = 4;
    u32 t = thread_now(), lane = t & 31, all = segments * (SEGMENT_WORDS / 2);
    for (u32 base = 0; base < all; base += AT_ONCE * THREADS) {
        const u64 *from[AT_ONCE];
        u32 pairs[AT_ONCE][2];
        for (u32 k = 0; k < AT_ONCE; k++) from[k] = p.segments + 2 * min(base + k * THREADS + t, all - 1);
        await_pairs(from, number, pairs);
        // Some warp may still multiply by the integers of the phase before.
        if (base == 0 && products) barrier_wait(s.multiplied, (products - 1) & 1);
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

/// Exponents of a run in shared memory: whole pairs, as they are copied.
DEVICE u32 exponents_of(const Run &run) { return run.rows == 0 ? 0 : ((run.first_row + run.rows + 1) & ~1u) - (run.first_row & ~1u); }

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
    exponents += run->first_row & 1;
    while (number < last) {
        while (number >= run->end) {
            sums += run->rows, exponents += exponents_of(*run) - (run->first_row & 1);
            run++, matrix++;
            exponents += run->first_row & 1;
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
    if (lane == 0) {
        barrier_arrive(s.multiplied);
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
        const i16 *from = product.matrix[m].exponents + (run->first_row & ~1u);
        u32 words = exponents_of(*run) / 2;
        for (u32 i = thread_now(); i < words; i += THREADS) copy_4(to + 2 * i, from + 2 * i);
        to += 2 * words;
    }
}

/// Where the exponent of a phase's row is in its quarter.
DEVICE u32 exponent_place(const Run *run, const Place &place) {
    u32 at = 0;
    for (u32 m = 0; m < place.matrix; m++) at += exponents_of(run[m]);
    return at + place.row - (run[place.matrix].first_row & ~1u);
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
    u32 index = phase_now(s), number = number_of(s, index);
    const ProductPhase &product = phase_at(s, index).product;
    // Where it is no attention, nobody looks.
    const AttentionPhase &attention = phase_at(s, index + DESCRIPTORS - 1).attention;
    u32 total = rows_in(s.runs + product.stream, product.matrices);
    bool is_normed = product.prologue == NORM;
    if (!is_normed) share_segments(p, s, product, attention, p.position, number - 1);
    if (total == 0) {
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
    if (is_normed) {
        ea = normed_input(p, s, product, number - 1);
    } else {
        ea = shared_input(p, s, product.segments, number, product.ordinal);
    }
    stamp(p, index, INPUT);
    return ea;
}

/// Writes this block's logits, and sends the best.
DEVICE void finish_logits(const StepParams &p, const Shared &s, u32 index, const ProductPhase &product, int ea) {
    const Run &run = s.runs[product.stream];
    const StepMatrix &matrix = product.matrix[0];
    const i64 *sums = sums_of(p, s, product, index);
    const i16 *exponents = exponents_in(p, s, index) + (run.first_row & 1);
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
        barrier_wait(s.multiplied, product.ordinal & 1);
        stamp(p, index, MULTIPLIED);
        finish_logits(p, s, index, product, ea);
        return;
    }
    u32 t = thread_now();
    if (t < WRITERS) return;
    barrier_wait(s.multiplied, product.ordinal & 1);
    stamp(p, index, MULTIPLIED);
    u32 number = number_of(s, index);
    const Run *runs = s.runs + product.stream;
    const i64 *sums = sums_of(p, s, product, index);
    const i16 *exponents = exponents_in(p, s, index);
    if (product.epilogue == SILU || product.epilogue == GELU) {
        // Both matrices have the same rows, so this block has both results.
        u32 rows = runs->rows;
        for (u32 i = t - WRITERS; i < rows; i += THREADS - WRITERS) {
            u32 row = runs->first_row + i, at = i + (runs->first_row & 1);
            float gate = result_of(p, product.matrix[0], sums[i], exponents[at] + ea, row);
            float up = result_of(p, product.matrix[1], sums[rows + i], exponents[at + exponents_of(*runs)] + ea, row);
            float active = product.epilogue == SILU ? silu(gate) : gelu_tanh(gate);
            send((u64 *)product.matrix[0].out + row, mul(active, up), number);
        }
        return;
    }
    u32 total = rows_in(runs, product.matrices);
    for (u32 i = t - WRITERS; i < total; i += THREADS - WRITERS) {
        Place place = place_of(runs, product.matrices, i);
        const StepMatrix &matrix = product.matrix[place.matrix];
        float y = result_of(p, matrix, sums[i], exponents[exponent_place(runs, place)] + ea, place.row);
        if (product.epilogue == RESIDUAL) s.own[i] = y = add(s.own[i], y);
        send((u64 *)matrix.out + place.row, y, number);
    }
}

// ---- attention ----

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
    if (t == 0) barrier_init(s.multiplied, WARPS);
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
        s.cursors[thread_now() >> 5].phase = i + 1;
        meet_warp();
    }
    if (block_now() == 0 && thread_now() < 32) tell_host(p, number_of(s, p.count - 1));
    meet();
    if (block_now() == 0 && thread_now() == WRITERS) p.times[p.count * 4 + 1] = nanoseconds();
    // The last block to get here counts the token; the others have read the count.
    if (thread_now() == 0 && atomic_add(&p.counters->arrived, 1) == gridDim.x - 1) p.counters->arrived = 0, p.counters->token++;
}

} // namespace hoist
