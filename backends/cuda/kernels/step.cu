// One token through a whole decoder of the llama kind in one launch: a persistent grid, one block a multiprocessor, which
// streams every matrix through a ring in shared memory by bulk copies that run ahead across phases, since the addresses of
// weights depend on nothing. Who has used a piece of weights up asks for the piece that takes its place, and for one far
// behind it to be brought into the second-level cache, so that memory works on while blocks wait for each other. Segments of
// 256 weights are multiplied by one, two or four lanes each.
//
// Phases hand results on as mail: a word of 64 bits has a value and the number of the phase that wrote it, and who needs the
// value waits for that number. No barrier of the grid, no fence: a value is there as soon as it is seen. A mailbox is written
// again a layer later. By then everybody has read it: a block writes in a phase only when it has read that phase's whole
// input, and a block without rows in a phase does not read there, so that along the chain of at least three phases from one
// use of a mailbox to the next, all who read it have written something that all later writers have waited for.
//
// Norms and quantisation are repeated by every block, which is cheaper than another exchange.
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
constexpr u32 SPLIT = 256;
/// Bytes for stored values in shared memory: whole positions, in two halves that take turns.
constexpr u32 VALUES = 32768;
/// Splits that the consumer of attention merges by itself; more are merged by those who made them, in one more exchange.
constexpr u32 MERGED_SPLITS = 4;

enum Kind : u32 { PRODUCT = 0, ATTENTION = 1 };
enum Prologue : u32 { NORM = 0, PLAIN = 1, MERGE = 2 };
enum Epilogue : u32 { STORE = 0, RESIDUAL = 1, SILU = 2, GELU = 3, LOGITS = 4 };
enum Coding : u32 { CODE_Q4_K = 0, CODE_Q5_K = 1, CODE_Q6_K = 2, CODE_Q8_0 = 3 };

struct StepMatrix {
    const u8 *weight;
    const i16 *exponents;
    const float *bias;
    /// Mail, or floats for logits.
    void *out;
    u32 rows, coding, step, pad;
};

struct ProductPhase {
    /// The input: mail, or floats where that is 0.
    const u64 *mail;
    const float *plain, *norm;
    u32 prologue, epilogue, matrices, segments;
    /// ceil(2^32 / segments)
    u32 magic;
    float eps;
    /// Lanes that share a segment, and warps that share a slot: 1, 2 or 4.
    u32 quantise_step, spread;
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
};
static_assert(sizeof(StepMatrix) == 48);
static_assert(sizeof(ProductPhase) == 200);
static_assert(sizeof(AttentionPhase) == 96);
static_assert(sizeof(Phase) == 216);

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

struct StepParams {
    const Phase *phases;
    const Stream *streams;
    const Row *row;
    Counters *counters;
    u32 *fault;
    /// Of attention's splits: a maximum and a sum each; their unfinished results.
    u64 *sums, *partial;
    /// The residual stream as the embedding leaves it.
    const float *embedded;
    /// Clock of the first block's multiprocessor at four points of each phase, then nanoseconds at the start and the end.
    u64 *times;
    u32 count, stream_count, splits, slots, row_limit, segment_limit, width, own_limit;
    /// Pieces that are brought into the second-level cache ahead of the ring.
    u32 ahead, pad;
};
static_assert(sizeof(StepParams) == 112);

// ---- shared memory ----

/// A run of bytes that this block streams, in pieces that are numbered on from run to run.
struct Run {
    const u8 *from;
    u32 bytes, piece;
    /// The first piece's number, and the number behind the last's.
    u32 begin, end;
};

struct Shared {
    /// A barrier for each slot of the ring, and how many of its sharers have used it up.
    u64 *full;
    u32 *used;
    Run *runs;
    Phase *phases;
    float *scratch;
    i64 *sums;
    i16 *exponents;
    /// The residual stream's rows that this block adds to.
    float *own;
    u8 *codes, *meta;
    /// Stored values of attention, on their way; between, a vector that is normed.
    u16 *values;
    u8 *ring;
};

/// As `shared_bytes` in src/decode/persistent.rs counts it.
DEVICE Shared lay_out(u8 *base, const StepParams &p) {
    Shared s;
    s.full = (u64 *)base, base += p.slots * 8;
    s.used = (u32 *)base, base += p.slots * 4;
    s.runs = (Run *)base, base += (p.stream_count * sizeof(Run) + 15) & ~15u;
    s.phases = (Phase *)base, base += 2 * 224;
    s.scratch = (float *)base, base += 320 * 4;
    s.sums = (i64 *)base, base += p.row_limit * 8;
    s.exponents = (i16 *)base, base += p.row_limit * 2;
    s.own = (float *)base, base += p.own_limit * 4;
    s.codes = base, base += p.segment_limit * CODES;
    s.meta = base, base += p.segment_limit * META;
    s.values = (u16 *)base, base += VALUES;
    base = (u8 *)(((u64)base + 127) & ~127ull);
    s.ring = base;
    return s;
}

/// Copies a word to shared memory; `await_copies` waits for this thread's.


/// Waits for all threads of this block.
DEVICE void meet() { meet_block(); }

// ---- mail ----

/// Eight neighbouring values of phase `number`. Only the last is waited for at first, so that waiting blocks leave the
/// second-level cache to others.
DEVICE void await8(const u64 *from, u32 number, float v[8]) {
    v[7] = f32_of_bits(await_word(from + 7, number));
    u64 words[8];
    for (int i = 0; i < 8; i += 2) load_words(from + i, words + i);
    for (int i = 0; i < 7; i++)
        v[i] = f32_of_bits((u32)(words[i] >> 32) == number ? (u32)words[i] : await_word(from + i, number));
}

DEVICE float await(const u64 *from, u32 number) { return f32_of_bits(await_word(from, number)); }

DEVICE void send(u64 *to, float x, u32 number) { store_word(to, bits_of(x), number); }

// ---- what a block does of a phase ----

struct Range {
    u32 first, count;
};

/// The rows of a matrix that this block multiplies.
DEVICE Range rows_of(u32 rows) {
    u32 first = (u32)((u64)rows * blockIdx.x / gridDim.x), last = (u32)((u64)rows * (blockIdx.x + 1) / gridDim.x);
    return Range{first, last - first};
}

DEVICE u32 segment_bytes(u32 coding) {
    return coding == CODE_Q4_K ? 144 : coding == CODE_Q5_K ? 176 : coding == CODE_Q6_K ? 210 : 272;
}

/// Segments of a piece.
DEVICE u32 piece_of(u32 coding) { return coding == CODE_Q4_K ? 32 : coding == CODE_Q5_K ? 26 : coding == CODE_Q6_K ? 21 : 17; }

// ---- the ring ----

/// This block's runs, by one warp.
DEVICE void plan_runs(const StepParams &p, const Shared &s) {
    u32 lane = threadIdx.x & 31, begin = 0;
    for (u32 base = 0; base < p.stream_count; base += 32) {
        u32 i = base + lane, pieces = 0;
        Run run = {};
        if (i < p.stream_count) {
            Stream stream = p.streams[i];
            Range rows = rows_of(stream.rows);
            run.from = stream.weight + (u64)rows.first * stream.row_bytes;
            run.bytes = rows.count * stream.row_bytes, run.piece = stream.piece_bytes;
            pieces = (run.bytes + run.piece - 1) / run.piece;
        }
        u32 end = pieces;
        for (int by = 1; by < 32; by <<= 1) {
            u32 before = shuffle_up(end, by);
            if (lane >= by) end += before;
        }
        run.begin = begin + end - pieces, run.end = begin + end;
        if (i < p.stream_count) s.runs[i] = run;
        begin = shuffle(begin + end, 31);
    }
}

/// Where a warp has got to in the runs: for the ring, and for the second-level cache.
struct Cursors {
    u32 copied, fetched;
};

/// The piece of a number, which no earlier call has exceeded; one without bytes behind the last. Bulk copies start and end at
/// multiples of 16; what is read beside the piece is this weight's own, or its padding.
DEVICE void piece_at(const StepParams &p, const Shared &s, u32 number, u32 &run, const u8 *&from, u32 &bytes) {
    while (run < p.stream_count && number >= s.runs[run].end) run++;
    bytes = 0;
    if (run == p.stream_count) return;
    const Run &here = s.runs[run];
    u32 at = (number - here.begin) * here.piece;
    u64 start = (u64)here.from + at, end = start + min(here.piece, here.bytes - at);
    start &= ~15ull, end = (end + 15) & ~15ull;
    from = (const u8 *)start, bytes = (u32)(end - start);
}

/// Asks for a piece into a slot that nobody uses, by one thread.
DEVICE void fill(const StepParams &p, const Shared &s, u32 number, u32 slot, Cursors &cursors) {
    const u8 *from;
    u32 bytes;
    piece_at(p, s, number, cursors.copied, from, bytes);
    if (bytes == 0) return;
    barrier_expect(s.full + slot, bytes);
    bulk_copy(s.ring + slot * SLOT, from, bytes, s.full + slot);
    if (p.ahead == 0 || number + p.ahead < p.slots) return;
    piece_at(p, s, number + p.ahead, cursors.fetched, from, bytes);
    if (bytes) prefetch(from, bytes);
}

// ---- activations ----

/// The largest of `x` over the block; `scratch` has a place for each warp.
DEVICE int largest_of_block(int x, int *scratch) {
    for (int h = 16; h > 0; h >>= 1) x = max(x, shuffle_xor(x, h));
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = x;
    meet();
    x = scratch[0];
    for (int w = 1; w < WARPS; w++) x = max(x, scratch[w]);
    return x;
}

/// Quantises a segment (§1.1): a warp, eight elements a lane. Returns e_a.
DEVICE int quantise_segment(const float v[8], u8 *codes, u8 *meta, u32 *fault, u32 step) {
    u32 lane = threadIdx.x & 31, a = 0;
    for (int i = 0; i < 8; i++) a = max(a, bits_of(v[i]) & 0x7fffffffu);
    a = max(a, shuffle_xor(a, 1));
    a = max(a, shuffle_xor(a, 2));
    u32 all = a;
    for (int h = 4; h < 32; h <<= 1) all = max(all, shuffle_xor(all, h));
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

DEVICE void load8(const float *from, float v[8]) {
    float4 low = load_shared_cache((const float4 *)from), high = load_shared_cache((const float4 *)from + 1);
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

/// 1 / rms of a vector in shared memory (§4), by all threads.
DEVICE float inverse_rms(const float *x, u32 segments, float eps, float *scratch) {
    u32 t = threadIdx.x;
    if (t < 256) {
        float acc = 0.0f;
#pragma unroll 8
        for (u32 j = 0; j < segments; j++) acc = fma(x[j * 256 + t], x[j * 256 + t], acc);
        scratch[t] = acc;
    }
    meet();
    // h = 128, 64 and 32: a lane has eight accumulators, 32 apart. Every warp does it, which saves a meeting.
    float a[8];
    for (int i = 0; i < 8; i++) a[i] = scratch[(t & 31) + 32 * i];
    for (int h = 4; h > 0; h >>= 1)
        for (int i = 0; i < h; i++) a[i] = add(a[i], a[i + h]);
    float y = a[0];
    for (int h = 16; h > 0; h >>= 1) y = add(y, shuffle_xor(y, h));
    return quotient(1.0f, root(add(quotient(y, (float)(segments * 256)), eps)));
}

/// Which positions a token sees.
DEVICE u32 first_visible(u32 window, u32 position) { return window && window <= position ? position + 1 - window : 0; }

/// Eight elements of the attention's result, from its splits. `MOST` of them are read before any is used.
template <u32 MOST> DEVICE void merge8(const StepParams &p, const AttentionPhase &a, u32 first, u32 last, u32 at, u32 number, float v[8]) {
    u32 head = at / a.head_dim, element = at % a.head_dim;
    const u64 *sums = p.sums + (size_t)head * p.splits * 2;
    const u64 *partial = p.partial + (size_t)head * p.splits * a.head_dim + element;
    float o[MOST][8], most[MOST], sum[MOST], m = -INFINITY, l = 0.0f;
    for (u32 from = first; from <= last; from += MOST) {
        // With more than MOST splits, this finds their maximum; sums and results are read below.
#pragma unroll
        for (u32 k = 0; k < MOST; k++) {
            if (from + k > last) continue;
            u32 s = from + k;
            if (last - first < MOST) await8(partial + (size_t)s * a.head_dim, number, o[k]), sum[k] = await(sums + s * 2 + 1, number);
            most[k] = await(sums + s * 2, number);
            m = most[k] > m ? most[k] : m;
        }
    }
    for (int i = 0; i < 8; i++) v[i] = 0.0f;
    for (u32 from = first; from <= last; from += MOST) {
#pragma unroll
        for (u32 k = 0; k < MOST; k++) {
            if (from + k > last) continue;
            u32 s = from + k;
            if (last - first >= MOST) {
                await8(partial + (size_t)s * a.head_dim, number, o[k]);
                sum[k] = await(sums + s * 2 + 1, number), most[k] = await(sums + s * 2, number);
            }
            float f = exponential(sub(most[k], m));
            l = fma(sum[k], f, l);
            for (int i = 0; i < 8; i++) v[i] = fma(o[k][i], f, v[i]);
        }
    }
    float r = quotient(1.0f, l);
    for (int i = 0; i < 8; i++) v[i] = mul(v[i], r);
}

/// Eight elements of a product's input.
DEVICE void input8(const ProductPhase &product, u32 at, u32 number, float v[8]) {
    if (product.mail) {
        await8(product.mail + at, number, v);
    } else {
        load8(product.plain + at, v);
    }
}

/// Brings the input of a product, which phase `number` has written, into shared memory as integers. Returns E_a, once all
/// threads have met.
DEVICE int prepare_input(const StepParams &p, const Shared &s, const ProductPhase &product, const AttentionPhase &attention,
                         u32 position, u32 number) {
    u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int e = -133;
    float v[8];
    if (product.prologue == NORM) {
        float g[8], *x = (float *)s.values;
        if (warp < product.segments) load8(product.norm + warp * 256 + lane * 8, g);
        for (u32 segment = warp; segment < product.segments; segment += WARPS) {
            u32 at = segment * 256 + lane * 8;
            input8(product, at, number, v);
            *(float4 *)(x + at) = make_float4(v[0], v[1], v[2], v[3]);
            *(float4 *)(x + at + 4) = make_float4(v[4], v[5], v[6], v[7]);
        }
        meet();
        float inv = inverse_rms(x, product.segments, product.eps, s.scratch);
        for (u32 segment = warp; segment < product.segments; segment += WARPS) {
            u32 at = segment * 256 + lane * 8;
            if (segment >= WARPS) load8(product.norm + at, g);
            for (int i = 0; i < 8; i++) v[i] = mul(mul(x[at + i], inv), g[i]);
            e = max(e, quantise_segment(v, s.codes + segment * CODES, s.meta + segment * META, p.fault, product.quantise_step));
        }
        return largest_of_block(e, (int *)s.scratch + 260);
    }
    u32 first = first_visible(attention.window, position) / SPLIT, last = position / SPLIT;
    bool merge = product.prologue == MERGE && last - first < MERGED_SPLITS;
    for (u32 segment = warp; segment < product.segments; segment += WARPS) {
        u32 at = segment * 256 + lane * 8;
        if (merge) {
            merge8<MERGED_SPLITS>(p, attention, first, last, at, number, v);
        } else {
            input8(product, at, number, v);
        }
        e = max(e, quantise_segment(v, s.codes + segment * CODES, s.meta + segment * META, p.fault, product.quantise_step));
    }
    return largest_of_block(e, (int *)s.scratch + 260);
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

/// Adds what the SPREAD lanes of a segment have each.
template <int SPREAD, class T> DEVICE T together(T x) {
    for (int h = 1; h < SPREAD; h <<= 1) x += shuffle_xor(x, h);
    return x;
}

// Each multiplies lane `part`'s share of a segment; all lanes of a warp take part, those that are not `here` with whatever
// bytes they are given, and get 0.

/// Q4_K and Q5_K.
template <bool FIFTHS, int SPREAD>
DEVICE i64 product_k(const u8 *p, const u8 *codes, const u8 *meta, int ew, int ea, int part, bool here) {
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
    for (int n = 0; n < 4 / SPREAD; n++) {
        int g = SPREAD == 1 ? n : part * (4 / SPREAD) + n;
        const uint4 *from = (const uint4 *)(p + (FIFTHS ? 48 : 16) + 32 * g);
        uint4 a = from[0], b = from[1];
        u32 w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        int q0[8], q1[8], d0 = 0, d1 = 0;
        Input::load(codes, 2 * g, q0), Input::load(codes, 2 * g + 1, q1);
#pragma unroll
        for (int x = 0; x < 8; x++) {
            u32 w0 = w[x] & 0x0f0f0f0f, w1 = w[x] >> 4 & 0x0f0f0f0f;
            if (FIFTHS) {
                w0 |= (high[x] >> 2 * g & 0x01010101) << 4;
                w1 |= (high[x] >> (2 * g + 1) & 0x01010101) << 4;
            }
            d0 = dot4(w0, q0[x], d0), d1 = dot4(w1, q1[x], d1);
        }
        // Blocks 2g and 2g + 1.
        int by = 16 * (g & 1);
        u32 subs = (g < 2 ? sub[0] : sub[1]) >> by, us = (g < 2 ? tail.x : tail.y) >> by, lows = (g < 2 ? low[0] : low[1]) >> by;
        i += d0 * (byte_of(subs, 0) * byte_of(us, 0)) + d1 * (byte_of(subs, 1) * byte_of(us, 1));
        int2 sums = *(const int2 *)(meta + 8 * g);
        k += sums.x * byte_of(lows, 0) + sums.y * byte_of(lows, 1);
    }
    i = together<SPREAD>(i), k = together<SPREAD>(k);
    if (!here) return 0;
    int m = tail.z, shift = ea - (int)tail.w;
    u16 d = head.x, dmin = head.x >> 16;
    return shifted(m * significand(d), i, ew - exponent_of(d) + shift) -
           shifted(m * significand(dmin), k, ew - exponent_of(dmin) + shift);
}

/// The word at byte `at` of a segment that starts at an even address: `base` is that address rounded down to 4, `odd` what
/// was cut off, in bits.
DEVICE u32 word_at(const u32 *base, u32 odd, int at) { return funnel_right(base[at / 4], base[at / 4 + 1], odd); }

template <int SPREAD>
DEVICE i64 product_q6_k(const u8 *p, const u8 *codes, const u8 *meta, int ew, int ea, int part, bool here) {
    const u32 *base = (const u32 *)((u64)p & ~3ull);
    u32 odd = ((u64)p & 2) * 8;
    uint4 tail = *(const uint4 *)(meta + 64);
    int i = 0;
#pragma unroll
    for (int x = 0; x < 4 / SPREAD; x++) {
        // Blocks 4g … 4g + 3, one half of each.
        int place = SPREAD == 1 ? x : part * (4 / SPREAD) + x, g = place >> 1, h = place & 1;
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
    i = together<SPREAD>(i);
    if (!here) return 0;
    u16 scale = (u16)word_at(base, odd, 208);
    return shifted((int)tail.z * significand(scale), i, ew - exponent_of(scale) + ea - (int)tail.w);
}

template <int SPREAD>
DEVICE i64 product_q8_0(const u8 *p, const u8 *codes, const u8 *meta, int ew, int ea, int part, bool here) {
    constexpr int BLOCKS = 8 / SPREAD;
    uint4 tail = *(const uint4 *)(meta + 64);
    const u32 *base = (const u32 *)p;
    int m[BLOCKS], e[BLOCKS], most = -1000;
    i64 dots[BLOCKS];
#pragma unroll
    for (int x = 0; x < BLOCKS; x++) {
        int j = SPREAD == 1 ? x : part * BLOCKS + x;
        u16 scale = *(const u16 *)(p + 34 * j);
        m[x] = significand(scale), e[x] = exponent_of(scale);
        most = max(most, e[x]);
        int q[8], d = 0, at = 34 * j + 2;
        Input::load(codes, j, q);
#pragma unroll
        for (int n = 0; n < 8; n++) d = dot4(word_at(base, (at & 2) * 8, at + 4 * n - (at & 2)), q[n], d);
        dots[x] = (i64)d * byte_of(j < 4 ? tail.x : tail.y, j & 3);
    }
    for (int h = 1; h < SPREAD; h <<= 1) most = max(most, shuffle_xor(most, h));
    i64 sum = 0;
#pragma unroll
    for (int x = 0; x < BLOCKS; x++) sum += dots[x] * ((m[x] * 256) >> min(most - e[x], 31));
    sum = together<SPREAD>(sum);
    if (!here) return 0;
    return ((i64)(int)tail.z * sum) >> min(ew - (most - 8) + ea - (int)tail.w, 63);
}

template <int SPREAD>
DEVICE i64 product(u32 coding, const u8 *p, const u8 *codes, const u8 *meta, int ew, int ea, int part, bool here) {
    switch (coding) {
    case CODE_Q4_K: return product_k<false, SPREAD>(p, codes, meta, ew, ea, part, here);
    case CODE_Q5_K: return product_k<true, SPREAD>(p, codes, meta, ew, ea, part, here);
    case CODE_Q6_K: return product_q6_k<SPREAD>(p, codes, meta, ew, ea, part, here);
    default: return product_q8_0<SPREAD>(p, codes, meta, ew, ea, part, here);
    }
}

/// Multiplies this block's rows of a matrix and adds to their sums; `begin` counts the pieces before it. SPREAD warps share a
/// slot, and as many lanes a segment.
///
/// A slot's barrier tells only whether the fill before or the one at hand is complete. Within a phase a slot is always the
/// same warps' (slots are a multiple of WARPS), and phases end with a meeting, so nobody comes to a fill before the one before
/// it was used up.
template <int SPREAD>
DEVICE void multiply(const StepParams &p, const Shared &s, const ProductPhase &product_phase, const StepMatrix &matrix, u32 begin,
                     u32 first_sum, int ea, Cursors &cursors) {
    constexpr u32 GROUPS = WARPS / SPREAD;
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, coding = matrix.coding;
    u32 bytes = segment_bytes(coding), piece = piece_of(coding), segments = product_phase.segments;
    Range rows = rows_of(matrix.rows);
    u32 total = rows.count * segments, end = begin + (total + piece - 1) / piece;
    u64 from = (u64)matrix.weight + (u64)rows.first * segments * bytes;
    u32 part = lane % SPREAD, local = warp / GROUPS * (32 / SPREAD) + lane / SPREAD;
    u32 number = begin + (warp % GROUPS - begin) % GROUPS;
    u32 slot = number % p.slots, parity = number / p.slots & 1;
    for (; number < end; number += GROUPS) {
        u32 at = (number - begin) * piece, segment = at + local;
        bool here = local < piece && segment < total;
        u32 row = segments == 1 ? segment : high_product(segment, product_phase.magic);
        u32 column = segment - row * segments;
        // Lanes without a segment go through the motions on the piece's first.
        u32 place = here ? local : 0;
        if (!here) row = 0xffffffffu, column = 0;
        int ew = here ? s.exponents[first_sum + row] : 0;
        barrier_wait(s.full + slot, parity);
        // The copy began at a multiple of 16.
        const u8 *weights = s.ring + slot * SLOT + ((from + (u64)at * bytes) & 15) + place * bytes;
        i64 term = product<SPREAD>(coding, weights, s.codes + column * CODES, s.meta + column * META, ew, ea, part, here);
        meet_warp();
        if (lane == 0) {
            bool last = true;
            if (SPREAD > 1) {
                fence_block();
                last = atomic_add(s.used + slot, 1) == SPREAD - 1;
                fence_block();
            }
            if (last) s.used[slot] = 0, fill(p, s, number + p.slots, slot, cursors);
        }
        if (part != 0) term = 0;
        // Lanes of one row follow each other: the first of them gets their sum.
        for (int by = SPREAD; by < 32; by <<= 1) {
            i64 other = shuffle_down(term, by);
            u32 there = shuffle_down(row, by);
            if (lane + by < 32 && there == row) term += other;
        }
        u32 before = shuffle_up(row, 1);
        if (here && (lane == 0 || before != row)) atomic_add((u64 *)s.sums + first_sum + row, (u64)term);
        slot += GROUPS;
        if (slot >= p.slots) slot -= p.slots, parity ^= 1;
    }
}

/// A row's result, its bias added.
DEVICE float result_of(const StepParams &p, const Shared &s, const StepMatrix &matrix, u32 sum, u32 row, int ea) {
    float y = scaled_sum(s.sums[sum], s.exponents[sum] + ea);
    if (!is_finite(y)) report(p.fault, matrix.step);
    return matrix.bias ? add(y, matrix.bias[row]) : y;
}

/// Points of a phase that are timed: its start, the input is ready, everything is multiplied, its results are written.
enum Point : u32 { START = 0, INPUT = 1, MULTIPLIED = 2, WRITTEN = 3 };

DEVICE void stamp(const StepParams &p, u32 phase, u32 point) {
    if (blockIdx.x == 0 && threadIdx.x == 0) p.times[phase * 4 + point] = cycles();
}

/// E_w of this block's `i`th row of a phase; `first` are the rows before each matrix.
DEVICE i16 exponent_at(const ProductPhase &product, const u32 first[4], u32 i) {
    u32 m = i < first[1] ? 0 : i < first[2] ? 1 : 2;
    const StepMatrix &matrix = product.matrix[m];
    return load_constant(matrix.exponents + rows_of(matrix.rows).first + i - (m == 0 ? 0 : m == 1 ? first[1] : first[2]));
}

/// Phase `number`, counted on from token to token; the one before it wrote its input.
DEVICE void run_product(const StepParams &p, const Shared &s, const ProductPhase &product, const AttentionPhase &attention,
                        u32 position, u32 phase, u32 number, u32 &begin, Cursors &cursors) {
    u32 t = threadIdx.x;
    Range rows[3];
    u32 first[4] = {0, 0, 0, 0};
#pragma unroll
    for (u32 m = 0; m < 3; m++) {
        rows[m] = rows_of(m < product.matrices ? product.matrix[m].rows : 0);
        first[m + 1] = first[m] + rows[m].count;
    }
    u32 total = first[3];
    if (total == 0) return;
    // Exponents and biases are there by the time they are needed; a block has few rows but for the logits.
    for (u32 i = t; i < total; i += THREADS) s.sums[i] = 0, s.exponents[i] = exponent_at(product, first, i);
    int ea = prepare_input(p, s, product, attention, position, number - 1);
    stamp(p, phase, INPUT);
#pragma unroll 1
    for (u32 m = 0; m < product.matrices; m++) {
        const StepMatrix &matrix = product.matrix[m];
        switch (product.spread) {
        case 1: multiply<1>(p, s, product, matrix, begin, first[m], ea, cursors); break;
        case 2: multiply<2>(p, s, product, matrix, begin, first[m], ea, cursors); break;
        default: multiply<4>(p, s, product, matrix, begin, first[m], ea, cursors);
        }
        u32 piece = piece_of(matrix.coding);
        begin += (rows[m].count * product.segments + piece - 1) / piece;
    }
    meet();
    stamp(p, phase, MULTIPLIED);
    if (product.epilogue == SILU || product.epilogue == GELU) {
        // Both matrices have the same rows, so this block has both results.
        for (u32 i = t; i < rows[0].count; i += THREADS) {
            u32 row = rows[0].first + i;
            float gate = result_of(p, s, product.matrix[0], i, row, ea);
            float up = result_of(p, s, product.matrix[1], first[1] + i, row, ea);
            float active = product.epilogue == SILU ? silu(gate) : gelu_tanh(gate);
            send((u64 *)product.matrix[0].out + row, mul(active, up), number);
        }
        return;
    }
    for (u32 i = t; i < total; i += THREADS) {
        u32 m = i < first[1] ? 0 : i < first[2] ? 1 : 2;
        const StepMatrix &matrix = product.matrix[m];
        u32 row = rows_of(matrix.rows).first + i - (m == 0 ? 0 : m == 1 ? first[1] : first[2]);
        float y = result_of(p, s, matrix, i, row, ea);
        if (product.epilogue == LOGITS) {
            ((float *)matrix.out)[row] = y;
            continue;
        }
        if (product.epilogue == RESIDUAL) s.own[i] = y = add(s.own[i], y);
        send((u64 *)matrix.out + row, y, number);
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
    u32 half = n_rot / 2, j = half_split ? element % half : element / 2;
    turn.is_second = half_split ? element >= half : element & 1;
    turn.first = half_split ? j : 2 * j, turn.second = half_split ? j + half : 2 * j + 1;
    turn.c = load_constant(table + 2 * j), turn.s = load_constant(table + 2 * j + 1);
    return turn;
}

DEVICE float turned(const Turn &turn, const u64 *x, u32 number) {
    float x0 = await(x + turn.first, number);
    if (!turn.turned) return x0;
    float x1 = await(x + turn.second, number);
    return turn.is_second ? fma(x0, turn.s, mul(x1, turn.c)) : fma(x0, turn.c, -mul(x1, turn.s));
}

/// Starts to copy the `chunk`th run of `room` stored values, 16 bytes at a time. Every thread ends a group of copies, if an
/// empty one.
DEVICE void copy_values(const Shared &s, const u16 *values, u32 padded, u32 from, u32 stored, u32 room, u32 chunk) {
    u32 begin = min(from + chunk * room, stored), end = min(begin + room, stored);
    u16 *to = s.values + (chunk & 1) * (VALUES / 4);
    const u16 *v = values + (size_t)begin * padded;
    for (u32 i = threadIdx.x * 8; i < (end - begin) * padded; i += THREADS * 8)
        copy_16(to + i, v + i);
    end_copies();
}

/// Eight elements of two queries and of a key, one after the other.
DEVICE void dot8(const float *q, u32 element, uint4 k, float &x0, float &x1) {
    u32 words[4] = {k.x, k.y, k.z, k.w};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float y = f32_of_f16((u16)(words[i >> 1] >> 16 * (i & 1)));
        float2 queries = *(const float2 *)(q + (element + i) * 2);
        x0 = fma(queries.x, y, x0), x1 = fma(queries.y, y, x1);
    }
}

/// Keys that a thread has read before queries are there, in units of eight elements.
constexpr u32 EARLY_KEYS = 4;

DEVICE void run_attention(const StepParams &p, const Shared &s, const AttentionPhase &a, u32 sequence, u32 position, u32 number) {
    u32 t = threadIdx.x, hd = a.head_dim;
    u32 first = first_visible(a.window, position), first_split = first / SPLIT, last_split = position / SPLIT;
    u32 ns = last_split - first_split + 1, group = a.heads / a.kv_heads, pairs = (group + PAIR - 1) / PAIR;
    const float *table = a.table + (size_t)position * a.n_rot;
    // Where activations are between products: queries element by element, weights of each position, the new key and value.
    float *q = (float *)s.codes, *w = q + PAIR * hd, *key = w + PAIR * SPLIT, *value = key + hd, *scratch = s.scratch;
    for (u32 task = blockIdx.x; task < a.kv_heads * pairs * ns; task += gridDim.x) {
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
        u32 at = base + t;
        bool visible = t < SPLIT && at >= first && at <= position, is_stored = visible && at != position;
        const uint4 *key_at = (const uint4 *)(keys + (size_t)(at / 64) * a.padded * 64 + at % 64 * 8);
        uint4 early[EARLY_KEYS];
#pragma unroll
        for (u32 i = 0; i < EARLY_KEYS; i++)
            if (is_stored && i * 8 < hd) early[i] = key_at[i * 64];
        for (u32 i = t; i < 4 * hd; i += THREADS) {
            u32 what = i / hd, element = i % hd;
            if (what < PAIR) {
                Turn turn = turn_of(element, table, a.n_rot, a.half_split);
                q[element * PAIR + what] = what < n ? turned(turn, a.query + (size_t)(head + what) * hd, number - 1) : 0.0f;
            } else if (newest) {
                const u64 *mail = (what == PAIR ? a.key : a.value) + (size_t)kv_head * hd;
                float x = what == PAIR ? turned(turn_of(element, table, a.n_rot, a.half_split), mail, number - 1)
                                       : await(mail + element, number - 1);
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
        if (is_stored) {
#pragma unroll
            for (u32 i = 0; i < EARLY_KEYS; i++)
                if (i * 8 < hd) dot8(q, i * 8, early[i], x0, x1);
#pragma unroll 4
            for (u32 i = EARLY_KEYS; i < hd / 8; i++) dot8(q, i * 8, key_at[i * 64], x0, x1);
        } else if (visible) {
            for (u32 element = 0; element < hd; element++) {
                x0 = fma(q[element * 2], key[element], x0);
                x1 = fma(q[element * 2 + 1], key[element], x1);
            }
        }
        x0 = mul(x0, a.scale), x1 = mul(x1, a.scale);
        if (a.capped) x0 = soft_capped(x0, a.cap), x1 = soft_capped(x1, a.cap);
        float m0 = visible ? x0 : -INFINITY, m1 = visible ? x1 : -INFINITY;
        for (int h = 16; h > 0; h >>= 1) {
            float y0 = shuffle_xor(m0, h), y1 = shuffle_xor(m1, h);
            m0 = y0 > m0 ? y0 : m0, m1 = y1 > m1 ? y1 : m1;
        }
        if ((t & 31) == 0 && t < SPLIT) scratch[t >> 5] = m0, scratch[8 + (t >> 5)] = m1;
        meet();
        m0 = scratch[0], m1 = scratch[8];
        for (int i = 1; i < 8; i++) {
            m0 = scratch[i] > m0 ? scratch[i] : m0;
            m1 = scratch[8 + i] > m1 ? scratch[8 + i] : m1;
        }
        // Both heads' weights of a position side by side.
        if (t < SPLIT) {
            float w0 = visible ? exponential(sub(x0, m0)) : 0.0f, w1 = visible ? exponential(sub(x1, m1)) : 0.0f;
            *(float2 *)(w + t * 2) = make_float2(w0, w1);
        }
        meet();
        // The last warps sum weights while the first multiply values.
        u32 h = WARPS - 1 - (t >> 5);
        if (h < n) {
            const float *x = w + (t & 31) * 2 + h;
            float low = 0.0f, high = 0.0f;
            for (int i = 0; i < 4; i++) low = add(low, x[128 * i]), high = add(high, x[128 * i + 64]);
            float l = add(low, high);
            for (int by = 16; by > 0; by >>= 1) l = add(l, shuffle_xor(l, by));
            u64 *sums = p.sums + ((size_t)(head + h) * p.splits + split) * 2;
            if ((t & 31) == 0) send(sums, h ? m1 : m0, number), send(sums + 1, l, number);
        }
        // Two neighbouring elements of both heads.
        float o[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        u32 element = 2 * t;
        for (u32 chunk = 0; chunk < chunks; chunk++) {
            u32 begin = from + chunk * room, stop = min(begin + room, stored);
            // Two groups of copies are under way; the older one is needed.
            await_copies_but<1>();
            meet();
            const u16 *v = s.values + (chunk & 1) * (VALUES / 4) + element;
            if (element < hd) {
#pragma unroll 8
                for (u32 x = begin; x < stop; x++, v += a.padded) {
                    u32 both = *(const u32 *)v;
                    float v0 = f32_of_f16((u16)both), v1 = f32_of_f16((u16)(both >> 16));
                    float2 weights = *(const float2 *)(w + x * 2);
                    o[0] = fma(weights.x, v0, o[0]), o[1] = fma(weights.x, v1, o[1]);
                    o[2] = fma(weights.y, v0, o[2]), o[3] = fma(weights.y, v1, o[3]);
                }
            }
            if (chunk + 2 < chunks) meet();
            copy_values(s, values + (size_t)base * a.padded, a.padded, from, stored, room, chunk + 2);
        }
        if (element < hd) {
#pragma unroll
            for (u32 i = 0; i < 2 * PAIR; i++) {
                u32 which = i / 2;
                if (newest) o[i] = fma(w[stored * 2 + which], value[element + i % 2], o[i]);
                if (which < n) send(p.partial + ((size_t)(head + which) * p.splits + split) * hd + element + i % 2, o[i], number);
            }
        }
        await_copies();
    }
    if (ns <= MERGED_SPLITS) return;
    // Too many splits for every block to merge them again.
    for (u32 i = blockIdx.x * THREADS + t; i < a.heads * hd / 8; i += gridDim.x * THREADS) {
        float v[8];
        merge8<2>(p, a, first_split, last_split, i * 8, number, v);
        for (int n = 0; n < 8; n++) send(a.out + i * 8 + n, v[n], number);
    }
}

// ---- a step ----

/// Copies the descriptor of a phase to shared memory, 54 words by one warp, without waiting for them.
DEVICE void fetch(const StepParams &p, const Shared &s, u32 phase) {
    if (phase >= p.count) return;
    const u32 *from = (const u32 *)(p.phases + phase);
    u32 *to = (u32 *)((u8 *)s.phases + (phase & 1) * 224);
    for (u32 i = threadIdx.x & 31; i < sizeof(Phase) / 4; i += 32) copy_4(to + i, from + i);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_step(const __grid_constant__ StepParams p) {
    DYNAMIC_SHARED(u8, memory, 128);
    Shared s = lay_out(memory, p);
    u32 t = threadIdx.x;
    u32 warp = t >> 5, lane = t & 31;
    if (t == 0) {
        for (u32 i = 0; i < p.slots; i++) barrier_init(s.full + i, 1), s.used[i] = 0;
        barriers_are_initialised();
    }
    if (warp == 1) plan_runs(p, s);
    if (warp == 2) fetch(p, s, 0), await_copies();
    meet();
    Cursors cursors = {0, 0};
    if (lane == 0)
        for (u32 slot = warp; slot < p.slots; slot += WARPS) fill(p, s, slot, slot, cursors);
    if (blockIdx.x == 0 && t == 0) p.times[p.count * 4] = nanoseconds();
    Range own = rows_of(p.width);
    for (u32 i = t; i < own.count; i += THREADS) s.own[i] = p.embedded[own.first + i];
    u32 begin = 0, sequence = p.row->sequence, position = p.row->position;
    // Phases are numbered on from the tokens before this one; 0 is no phase.
    u32 number = p.counters->token * p.count;
    /// The last attention, which the product after it may have to merge.
    SHARED(AttentionPhase, kept, );
    for (u32 i = 0; i < p.count; i++) {
        number++;
        stamp(p, i, START);
        // The next descriptor arrives while this phase runs; the phase before last is done with its place.
        if (warp == WARPS - 1) fetch(p, s, i + 1);
        const Phase &phase = *(const Phase *)((u8 *)s.phases + (i & 1) * 224);
        if (phase.kind == ATTENTION) {
            if (t < sizeof(AttentionPhase) / 4) ((u32 *)&kept)[t] = ((const u32 *)&phase.attention)[t];
            run_attention(p, s, phase.attention, sequence, position, number);
        } else {
            run_product(p, s, phase.product, kept, position, i, number, begin, cursors);
        }
        stamp(p, i, WRITTEN);
        await_copies();
        // What the next phase needs in shared memory is there, and what this one used is free.
        meet();
    }
    if (blockIdx.x == 0 && t == 0) p.times[p.count * 4 + 1] = nanoseconds();
    // The last block to get here counts the token; the others have read the count.
    if (t == 0 && atomic_add(&p.counters->arrived, 1) == gridDim.x - 1) p.counters->arrived = 0, p.counters->token++;
}

} // namespace hoist
