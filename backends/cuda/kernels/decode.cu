// Every operation of a decode program, one kernel or two each, for any number of tokens. Parameters are passed as one
// struct, whose twin is in src/decode/params.rs.

#include "attention.cuh"
#include "quantise.cuh"

namespace hoist {

// ---- rows of embeddings ----

struct EmbedParams {
    const u8 *weight;
    float *out;
    const Row *rows;
    u64 row_bytes;
    u32 cols, by_position;
};
static_assert(sizeof(EmbedParams) == 40);

/// A 32-weight block of an embedding row as GGML dequantises it (§1.4).
template <class E> DEVICE void dequantise(const u8 *row, int j, float *out) {
    Block b;
    E::read(row, j, b);
    for (int i = 0; i < 32; i++) {
        int h = i >> 4;
        float w = (float)(i8)(b.w[i >> 2] >> 8 * (i & 3));
        float y = mul(b.s[h], w);
        out[i] = E::MINS ? sub(y, b.m[h]) : y;
    }
}

template <class E> DEVICE void embed(const EmbedParams &p) {
    const Row &row = p.rows[blockIdx.x];
    const u8 *bytes = p.weight + (p.by_position ? row.position : row.token) * p.row_bytes;
    float *out = p.out + (size_t)blockIdx.x * p.cols;
    for (u32 j = threadIdx.x; j < p.cols / 32; j += blockDim.x) dequantise<E>(bytes, j, out + 32 * j);
}

#define EMBED(name, E)                                                                                                 \
    extern "C" __global__ void embed_##name(const __grid_constant__ EmbedParams p) { embed<E>(p); }
EACH_QUANTIZED(EMBED)

/// APR Q8 has one scale for the whole matrix, in the four bytes in front of its codes.
extern "C" __global__ void embed_apr_q8_scaled(const __grid_constant__ EmbedParams p) {
    const Row &row = p.rows[blockIdx.x];
    float scale = f32_of_bits(u32_any(p.weight));
    const u8 *bytes = p.weight + 4 + (p.by_position ? row.position : row.token) * p.row_bytes;
    for (u32 i = threadIdx.x; i < p.cols; i += blockDim.x)
        p.out[(size_t)blockIdx.x * p.cols + i] = mul((float)(i8)bytes[i], scale);
}

struct F32 {
    typedef u32 T;
    DEVICE float widen(u32 x) { return f32_of_bits(x); }
};
struct F16 {
    typedef u16 T;
    DEVICE float widen(u16 x) { return f32_of_f16(x); }
};
struct BF16 {
    typedef u16 T;
    DEVICE float widen(u16 x) { return f32_of_bf16(x); }
};

template <class E> DEVICE void embed_float(const EmbedParams &p) {
    const Row &row = p.rows[blockIdx.x];
    const typename E::T *x = (const typename E::T *)(p.weight + (p.by_position ? row.position : row.token) * p.row_bytes);
    for (u32 i = threadIdx.x; i < p.cols; i += blockDim.x) p.out[(size_t)blockIdx.x * p.cols + i] = E::widen(x[i]);
}

extern "C" __global__ void embed_f32(const __grid_constant__ EmbedParams p) { embed_float<F32>(p); }
extern "C" __global__ void embed_f16(const __grid_constant__ EmbedParams p) { embed_float<F16>(p); }
extern "C" __global__ void embed_bf16(const __grid_constant__ EmbedParams p) { embed_float<BF16>(p); }

// ---- norms ----

struct NormParams {
    const float *x, *weight, *bias;
    float *y;
    u32 n;
    float eps;
};
static_assert(sizeof(NormParams) == 40);

/// One block of 256 threads a vector.
extern "C" __global__ void __launch_bounds__(256) rms_norm(const __grid_constant__ NormParams p) {
    SHARED(float, scratch, [256]);
    const float *x = p.x + (size_t)blockIdx.x * p.n;
    float acc = 0.0f;
    for (u32 i = threadIdx.x; i < p.n; i += 256) acc = fma(x[i], x[i], acc);
    float ss = fold256(acc, scratch);
    float inv = quotient(1.0f, root(add(quotient(ss, (float)p.n), p.eps)));
    for (u32 i = threadIdx.x; i < p.n; i += 256) p.y[(size_t)blockIdx.x * p.n + i] = mul(mul(x[i], inv), p.weight[i]);
}

extern "C" __global__ void __launch_bounds__(256) layer_norm(const __grid_constant__ NormParams p) {
    SHARED(float, scratch, [256]);
    const float *x = p.x + (size_t)blockIdx.x * p.n;
    float acc = 0.0f;
    for (u32 i = threadIdx.x; i < p.n; i += 256) acc = add(acc, x[i]);
    float mean = quotient(fold256(acc, scratch), (float)p.n);
    acc = 0.0f;
    for (u32 i = threadIdx.x; i < p.n; i += 256) {
        float c = sub(x[i], mean);
        acc = fma(c, c, acc);
    }
    float inv = quotient(1.0f, root(add(quotient(fold256(acc, scratch), (float)p.n), p.eps)));
    for (u32 i = threadIdx.x; i < p.n; i += 256)
        p.y[(size_t)blockIdx.x * p.n + i] = fma(mul(sub(x[i], mean), inv), p.weight[i], p.bias[i]);
}

// ---- activations as integers ----

struct QuantiseParams {
    const float *x;
    Segment *out;
    u32 *fault;
    u32 step, cols, segments, vectors;
};
static_assert(sizeof(QuantiseParams) == 40);

/// One warp a segment.
extern "C" __global__ void __launch_bounds__(128) quantise(const __grid_constant__ QuantiseParams p) {
    u32 lane = threadIdx.x & 31;
    u32 at = blockIdx.x * 4 + (threadIdx.x >> 5);
    if (at >= p.segments * p.vectors) return;
    u32 vector = at / p.segments, first = at % p.segments * 256 + lane * 8;
    const float *x = p.x + (size_t)vector * p.cols + first;
    float v[8];
    for (int i = 0; i < 8; i++) v[i] = first < p.cols ? x[i] : 0.0f;
    quantise_segment(v, p.out[at], p.fault, p.step);
}

// ---- float matrices ----

struct FloatMatMulParams {
    const u8 *weight;
    const float *x, *bias;
    float *y;
    const u32 *experts;
    u64 matrix_elements;
    u32 rows, cols, tokens, choices, shared;
};
static_assert(sizeof(FloatMatMulParams) == 72);

/// dot64 (§2): a warp runs four rows, eight threads a row, eight accumulators a thread.
template <class E> DEVICE void float_matmul(const FloatMatMulParams &p) {
    typedef typename E::T T;
    u32 lane = threadIdx.x & 31, part = lane & 7;
    u32 row = (blockIdx.x * 4 + (threadIdx.x >> 5)) * 4 + (lane >> 3);
    bool here = row < p.rows;
    u32 vector = blockIdx.y, matrix = 0;
    if (p.experts) {
        matrix = p.experts[blockIdx.y];
        vector = p.shared ? blockIdx.y / p.choices : blockIdx.y;
    }
    const T *w = (const T *)p.weight + matrix * p.matrix_elements + (size_t)(here ? row : 0) * p.cols;
    const float *x = p.x + (size_t)vector * p.cols;
    float acc[8];
    for (int i = 0; i < 8; i++) acc[i] = 0.0f;
    u32 first = part * 8;
    // Rows are read 16 bytes at a time where they all start at such an address.
    if (p.cols % 8 == 0) {
        for (; first + 8 <= p.cols; first += 64) {
            T v[8];
            for (int i = 0; i < (int)sizeof(v) / 16; i++) ((uint4 *)v)[i] = load_constant((const uint4 *)(w + first) + i);
            float4 low = *(const float4 *)(x + first), high = *(const float4 *)(x + first + 4);
            acc[0] = fma(E::widen(v[0]), low.x, acc[0]), acc[1] = fma(E::widen(v[1]), low.y, acc[1]);
            acc[2] = fma(E::widen(v[2]), low.z, acc[2]), acc[3] = fma(E::widen(v[3]), low.w, acc[3]);
            acc[4] = fma(E::widen(v[4]), high.x, acc[4]), acc[5] = fma(E::widen(v[5]), high.y, acc[5]);
            acc[6] = fma(E::widen(v[6]), high.z, acc[6]), acc[7] = fma(E::widen(v[7]), high.w, acc[7]);
        }
    } else {
        for (; first < p.cols; first += 64)
            for (u32 i = 0; i < 8; i++)
                if (first + i < p.cols) acc[i] = fma(E::widen(w[first + i]), x[first + i], acc[i]);
    }
    for (int h = 4; h > 0; h >>= 1)
        for (int i = 0; i < 8; i++) acc[i] = add(acc[i], shuffle_xor(acc[i], h));
    for (int h = 4; h > 0; h >>= 1)
        for (int i = 0; i < h; i++) acc[i] = add(acc[i], acc[i + h]);
    if (part == 0 && here) {
        float result = acc[0];
        if (p.bias) result = add(result, p.bias[row]);
        p.y[(size_t)blockIdx.y * p.rows + row] = result;
    }
}

/// The same of a transposed matrix, `[in, out]`: one thread an output.
template <class E> DEVICE void float_columns(const FloatMatMulParams &p) {
    u32 row = blockIdx.x * 128 + threadIdx.x;
    if (row >= p.rows) return;
    u32 vector = blockIdx.y, matrix = 0;
    if (p.experts) {
        matrix = p.experts[blockIdx.y];
        vector = p.shared ? blockIdx.y / p.choices : blockIdx.y;
    }
    const typename E::T *w = (const typename E::T *)p.weight + matrix * p.matrix_elements + row;
    const float *x = p.x + (size_t)vector * p.cols;
    float acc[64];
#pragma unroll
    for (int i = 0; i < 64; i++) acc[i] = 0.0f;
    for (u32 first = 0; first < p.cols; first += 64)
#pragma unroll
        for (u32 i = 0; i < 64; i++)
            if (first + i < p.cols) acc[i] = fma(E::widen(w[(size_t)(first + i) * p.rows]), x[first + i], acc[i]);
#pragma unroll
    for (int h = 32; h > 0; h >>= 1)
#pragma unroll
        for (int i = 0; i < h; i++) acc[i] = add(acc[i], acc[i + h]);
    float result = acc[0];
    if (p.bias) result = add(result, p.bias[row]);
    p.y[(size_t)blockIdx.y * p.rows + row] = result;
}

#define FLOAT_MATMUL(name, E)                                                                                          \
    extern "C" __global__ void __launch_bounds__(128) matmul_##name(const __grid_constant__ FloatMatMulParams p) {     \
        float_matmul<E>(p);                                                                                            \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) columns_##name(const __grid_constant__ FloatMatMulParams p) {    \
        float_columns<E>(p);                                                                                           \
    }
FLOAT_MATMUL(f32, F32)
FLOAT_MATMUL(f16, F16)
FLOAT_MATMUL(bf16, BF16)

// ---- rope, keys and values, attention ----

extern "C" __global__ void rope(const __grid_constant__ RopeParams p) { turn(p, blockIdx.x); }

extern "C" __global__ void store_kv_f16(const __grid_constant__ StoreParams p) { store_kv<KvF16>(p, blockIdx.x); }
extern "C" __global__ void store_kv_f32(const __grid_constant__ StoreParams p) { store_kv<KvF32>(p, blockIdx.x); }

/// Query heads of one key/value head that a block takes at once.
constexpr int HEADS = 4;
/// Elements of keys that a thread asks for at once.
constexpr u32 KEY_STEP = 32;

/// Stored numbers of one position's key, element `first` and those after it.
template <class K> struct Keys {
    alignas(16) typename K::T x[KEY_STEP];
    DEVICE void load(Keys &to, const CacheLayer &c, const typename K::T *keys, u32 position, u32 first, bool here) {
#pragma unroll
        for (u32 i = 0; i < KEY_STEP; i += 8) {
            const uint4 *from = (const uint4 *)(keys + key_at(c, position, first + i));
            for (u32 j = 0; j < sizeof(typename K::T) / 2; j++)
                if (here && first + i < c.padded) ((uint4 *)(to.x + i))[j] = from[j];
        }
    }
};

/// One block of 256 threads for each (split, key/value head and group of query heads, token). Where `staged`, all values of the
/// split come to shared memory while keys are multiplied.
template <class K> DEVICE void attention_split(const AttentionParams &p) {
    DYNAMIC_SHARED(float, shared, 16);
    typedef typename K::T T;
    const CacheLayer &c = p.cache;
    u32 t = threadIdx.x, group = p.heads / c.kv_heads, groups = (group + HEADS - 1) / HEADS;
    u32 kv_head = blockIdx.y / groups, head = kv_head * group + blockIdx.y % groups * HEADS;
    u32 n = min((u32)HEADS, group - blockIdx.y % groups * HEADS);
    const Row &row = p.rows[p.first_token + blockIdx.z];
    u32 first = first_visible(p, row.position), last = row.position, base = blockIdx.x * SPLIT;
    if (base > last || base + SPLIT <= first) return;
    const T *keys = keys_of<K>(c, row.sequence, kv_head), *values = keys + (size_t)c.padded * c.positions;
    u32 low = max(first, base), high = min(last, base + SPLIT - 1);
    u32 position = base + t;
    bool visible = position >= first && position <= last;
    Keys<K> now, next;
    Keys<K>::load(now, c, keys, position, 0, visible);
    // Queries, element by element, all heads of one together; the weights, head by head; maxima of warps; values.
    float *q = shared, *w = q + HEADS * c.padded, *scratch = w + HEADS * SPLIT;
    T *stage = (T *)(scratch + 8 * HEADS);
    if (p.staged) {
        const u8 *from = (const u8 *)(values + (size_t)low * c.padded);
        u32 bytes = (high - low + 1) * c.padded * (u32)sizeof(T);
        for (u32 i = 16 * t; i < bytes; i += 16 * SPLIT) copy_16((u8 *)stage + i, from + i);
    }
    for (u32 i = t; i < HEADS * c.padded; i += SPLIT) {
        u32 h = i % HEADS, element = i / HEADS;
        size_t at = ((size_t)(p.first_token + blockIdx.z) * p.heads + head + h) * c.head_dim + element;
        q[i] = h < n && element < c.head_dim ? p.query[at] : 0.0f;
    }
    meet_block();
    float s[HEADS];
    for (int h = 0; h < HEADS; h++) s[h] = 0.0f;
    if (visible) {
#pragma unroll 1
        for (u32 element = 0; element < c.head_dim; element += KEY_STEP) {
            if (element + KEY_STEP < c.head_dim) Keys<K>::load(next, c, keys, position, element + KEY_STEP, true);
#pragma unroll
            for (u32 i = 0; i < KEY_STEP; i++) {
                if (element + i < c.head_dim) {
                    float x = K::widen(now.x[i]);
                    float4 queries = *(const float4 *)(q + (element + i) * HEADS);
                    s[0] = fma(queries.x, x, s[0]), s[1] = fma(queries.y, x, s[1]);
                    s[2] = fma(queries.z, x, s[2]), s[3] = fma(queries.w, x, s[3]);
                }
            }
            now = next;
        }
    }
    float m[HEADS];
    for (int h = 0; h < HEADS; h++) {
        s[h] = mul(s[h], p.scale);
        if (p.capped) s[h] = soft_capped(s[h], p.cap);
        m[h] = visible ? s[h] : -INFINITY;
        for (int half = 16; half > 0; half >>= 1) {
            float other = shuffle_xor(m[h], half);
            m[h] = other > m[h] ? other : m[h];
        }
    }
    if ((t & 31) == 0) *(float4 *)(scratch + (t >> 5) * HEADS) = float4{m[0], m[1], m[2], m[3]};
    meet_block();
    for (u32 i = 0; i < 8; i++) {
        float4 others = *(const float4 *)(scratch + i * HEADS);
        m[0] = others.x > m[0] ? others.x : m[0], m[1] = others.y > m[1] ? others.y : m[1];
        m[2] = others.z > m[2] ? others.z : m[2], m[3] = others.w > m[3] ? others.w : m[3];
    }
    for (int h = 0; h < HEADS; h++) w[h * SPLIT + t] = visible ? exponential(sub(s[h], m[h])) : 0.0f;
    await_copies();
    meet_block();
    size_t sums = ((size_t)blockIdx.z * p.heads + head) * p.splits + blockIdx.x;
    // dot64's order: a lane has two accumulators, 32 apart.
    for (u32 h = t >> 5; h < n; h += 8) {
        const float *x = w + h * SPLIT + (t & 31);
        float even = 0.0f, odd = 0.0f;
        for (int i = 0; i < 4; i++) even = add(even, x[64 * i]), odd = add(odd, x[64 * i + 32]);
        float l = add(even, odd);
        for (int half = 16; half > 0; half >>= 1) l = add(l, shuffle_xor(l, half));
        float most = h == 0 ? m[0] : h == 1 ? m[1] : h == 2 ? m[2] : m[3];
        if ((t & 31) == 0) p.sums[sums + h * p.splits] = make_float2(most, l);
    }
    if (!p.staged) {
        for (u32 i = t; i < n * c.head_dim; i += SPLIT) {
            u32 h = i / c.head_dim, element = i % c.head_dim;
            const T *v = values + (size_t)low * c.padded + element;
            float o = 0.0f;
#pragma unroll 8
            for (u32 x = low; x <= high; x++, v += c.padded) o = fma(w[h * SPLIT + x - base], K::widen(*v), o);
            p.partial[(sums + h * p.splits) * c.head_dim + element] = o;
        }
        return;
    }
    // A thread has two neighbouring elements of a head; elements are padded to a multiple of 8.
    u32 pairs = c.padded / 2;
    for (u32 i = t; i < n * pairs; i += SPLIT) {
        u32 h = i / pairs, element = i % pairs * 2;
        const float *weights = w + h * SPLIT + low - base;
        const T *v = stage + element;
        float o[2] = {0.0f, 0.0f};
        u32 x = 0, count = high - low + 1;
        // Weights are read four at a time where they lie so.
        if ((low & 3) == 0)
#pragma unroll 4
            for (; x + 4 <= count; x += 4) {
                float4 four = *(const float4 *)(weights + x);
                float of_positions[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                for (u32 k = 0; k < 4; k++, v += c.padded) {
                    typename K::Two both = *(const typename K::Two *)v;
                    o[0] = fma(of_positions[k], K::low(both), o[0]), o[1] = fma(of_positions[k], K::high(both), o[1]);
                }
            }
        for (; x < count; x++, v += c.padded) {
            typename K::Two both = *(const typename K::Two *)v;
            o[0] = fma(weights[x], K::low(both), o[0]), o[1] = fma(weights[x], K::high(both), o[1]);
        }
        float *out = p.partial + (sums + h * p.splits) * c.head_dim + element;
        for (u32 k = 0; k < 2; k++)
            if (element + k < c.head_dim) out[k] = o[k];
    }
}

extern "C" __global__ void __launch_bounds__(256) attention_f16(const __grid_constant__ AttentionParams p) {
    attention_split<KvF16>(p);
}
extern "C" __global__ void __launch_bounds__(256) attention_f32(const __grid_constant__ AttentionParams p) {
    attention_split<KvF32>(p);
}

/// One warp for each (query head, token): a block has four heads of a token. A lane takes four elements at a time, 32 apart.
extern "C" __global__ void __launch_bounds__(128) attention_merge(const __grid_constant__ AttentionParams p) {
    u32 head_dim = p.cache.head_dim, lane = threadIdx.x & 31, head = blockIdx.x * 4 + (threadIdx.x >> 5);
    if (head >= p.heads) return;
    size_t at = (size_t)blockIdx.y * p.heads + head;
    const Row &row = p.rows[p.first_token + blockIdx.y];
    u32 first = first_visible(p, row.position) / SPLIT, last = row.position / SPLIT;
    const float2 *sums = p.sums + at * p.splits;
    const float *partial = p.partial + at * p.splits * head_dim;
    float *out = p.out + ((size_t)(p.first_token + blockIdx.y) * p.heads + head) * head_dim;
    float m = -INFINITY;
    for (u32 s = first; s <= last; s++) m = sums[s].x > m ? sums[s].x : m;
    for (u32 element = lane; element < head_dim; element += 128) {
        float l = 0.0f, o[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (u32 s = first; s <= last; s++) {
            float x[4];
            for (u32 i = 0; i < 4; i++)
                x[i] = element + 32 * i < head_dim ? partial[(size_t)s * head_dim + element + 32 * i] : 0.0f;
            float f = exponential(sub(sums[s].x, m));
            l = fma(sums[s].y, f, l);
            for (u32 i = 0; i < 4; i++) o[i] = fma(x[i], f, o[i]);
        }
        float inverse = quotient(1.0f, l);
        for (u32 i = 0; i < 4; i++)
            if (element + 32 * i < head_dim) out[element + 32 * i] = mul(o[i], inverse);
    }
}

// ---- elements ----

struct ElementParams {
    const float *a, *b;
    float *out;
    u64 n;
    float factor;
};
static_assert(sizeof(ElementParams) == 40);

#define ELEMENTS(name, expression)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) name(const __grid_constant__ ElementParams p) {                  \
        for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < p.n; i += (u64)gridDim.x * 256) {                        \
            float a = p.a[i];                                                                                          \
            p.out[i] = expression;                                                                                     \
        }                                                                                                              \
    }
ELEMENTS(elements_add, add(a, p.b[i]))
ELEMENTS(elements_mul, mul(a, p.b[i]))
ELEMENTS(elements_scale, mul(a, p.factor))
ELEMENTS(elements_soft_cap, soft_capped(a, p.factor))
ELEMENTS(elements_silu, silu(a))
ELEMENTS(elements_gelu_tanh, gelu_tanh(a))

// ---- experts ----

struct RouterParams {
    /// Logits [tokens, n]; become the probabilities.
    float *logits;
    u32 *experts;
    float *weights;
    u32 n, k, normalise;
};
static_assert(sizeof(RouterParams) == 40);

/// One block of 256 threads a token.
extern "C" __global__ void __launch_bounds__(256) router_top_k(const __grid_constant__ RouterParams p) {
    SHARED(float, scratch, [256]);
    SHARED(u32, places, [8]);
    float *x = p.logits + (size_t)blockIdx.x * p.n;
    u32 *experts = p.experts + (size_t)blockIdx.x * p.k;
    float *weights = p.weights + (size_t)blockIdx.x * p.k;
    u32 t = threadIdx.x;
    float m = -INFINITY;
    for (u32 i = t; i < p.n; i += 256) m = x[i] > m ? x[i] : m;
    m = block_max(m, scratch);
    float acc = 0.0f;
    for (u32 i = t; i < p.n; i += 256) {
        float y = exponential(sub(x[i], m));
        x[i] = y;
        acc = add(acc, y);
    }
    float sum = fold256(acc, scratch);
    for (u32 i = t; i < p.n; i += 256) x[i] = quotient(x[i], sum);
    meet_block();
    for (u32 chosen = 0; chosen < p.k; chosen++) {
        // The largest that is not taken, the lowest of equals. Probabilities are not negative; taken ones become so.
        float best = -1.0f;
        u32 place = 0xffffffffu;
        for (u32 i = t; i < p.n; i += 256)
            if (x[i] > best) best = x[i], place = i;
        for (int h = 16; h > 0; h >>= 1) {
            float other = shuffle_xor(best, h);
            u32 there = shuffle_xor(place, h);
            if (other > best || (other == best && there < place)) best = other, place = there;
        }
        if ((t & 31) == 0) scratch[t >> 5] = best, places[t >> 5] = place;
        meet_block();
        if (t == 0) {
            for (int w = 1; w < 8; w++)
                if (scratch[w] > best || (scratch[w] == best && places[w] < place)) best = scratch[w], place = places[w];
            // Nothing but NaN left: any expert will do, since what follows reports it.
            if (place >= p.n) place = chosen, best = x[chosen];
            experts[chosen] = place, weights[chosen] = best, x[place] = -2.0f;
        }
        meet_block();
    }
    if (p.normalise && t == 0) {
        float total = 0.0f;
        for (u32 i = 0; i < p.k; i++) total = add(total, weights[i]);
        for (u32 i = 0; i < p.k; i++) weights[i] = quotient(weights[i], total);
    }
}

struct WeightedSumParams {
    const float *x;
    const u32 *experts;
    const float *weights;
    float *out;
    u32 k, n;
};
static_assert(sizeof(WeightedSumParams) == 40);

/// Blocks of 256 elements of each token; chosen experts in ascending number.
extern "C" __global__ void __launch_bounds__(256) weighted_sum(const __grid_constant__ WeightedSumParams p) {
    u32 i = blockIdx.x * 256 + threadIdx.x, token = blockIdx.y;
    if (i >= p.n) return;
    const u32 *experts = p.experts + (size_t)token * p.k;
    float acc = 0.0f;
    u32 after = 0;
    for (u32 done = 0; done < p.k; done++) {
        u32 slot = 0, expert = 0xffffffffu;
        for (u32 s = 0; s < p.k; s++)
            if (experts[s] >= after && experts[s] < expert) slot = s, expert = experts[s];
        float w = p.weights[(size_t)token * p.k + slot], x = p.x[((size_t)token * p.k + slot) * p.n + i];
        acc = done == 0 ? mul(w, x) : fma(w, x, acc);
        after = expert + 1;
    }
    p.out[(size_t)token * p.n + i] = acc;
}

// ---- the end of a step ----

struct GatherParams {
    u8 *value;
    const u32 *kept;
    u64 token_bytes;
    u32 count;
};
static_assert(sizeof(GatherParams) == 32);

/// Moves the kept tokens' values to the front, in order; `token_bytes` is a multiple of 4.
extern "C" __global__ void __launch_bounds__(256) keep_tokens(const __grid_constant__ GatherParams p) {
    u32 words = p.token_bytes / 4, i = blockIdx.x * 256 + threadIdx.x;
    if (i >= words) return;
    // A token moves only to an earlier place, so that no place is overwritten before it was read.
    u32 *value = (u32 *)p.value;
    for (u32 t = 0; t < p.count; t++) value[(size_t)t * words + i] = value[(size_t)p.kept[t] * words + i];
}

struct ArgMaxParams {
    const float *logits;
    /// [tokens][parts]: largest value and its lowest place.
    uint2 *parts;
    u32 *out, *fault;
    u32 step, vocab;
};
static_assert(sizeof(ArgMaxParams) == 40);

/// Values in order as unsigned numbers, so that (value, place) can be compared.
DEVICE bool better(float a, u32 at, float b, u32 bt) { return a > b || (a == b && at < bt); }

/// The best of each warp of a block.
struct Bests {
    float values[32];
    u32 places[32];
};

DEVICE void best_of_block(Bests &bests, float &x, u32 &at) {
    float *values = bests.values;
    u32 *places = bests.places;
    for (int h = 16; h > 0; h >>= 1) {
        float y = shuffle_xor(x, h);
        u32 there = shuffle_xor(at, h);
        if (better(y, there, x, at)) x = y, at = there;
    }
    if ((threadIdx.x & 31) == 0) values[threadIdx.x >> 5] = x, places[threadIdx.x >> 5] = at;
    meet_block();
    if (threadIdx.x == 0)
        for (u32 w = 1; w < blockDim.x >> 5; w++)
            if (better(values[w], places[w], x, at)) x = values[w], at = places[w];
}

/// Parts of the vocabulary a row of logits is searched in.
constexpr u32 PARTS = 64;

/// Also checks that every logit is finite.
extern "C" __global__ void __launch_bounds__(256) arg_max_parts(const __grid_constant__ ArgMaxParams p) {
    const float *x = p.logits + (size_t)blockIdx.y * p.vocab;
    float best = -INFINITY;
    u32 at = 0xffffffffu;
    bool finite = true;
    for (u32 i = blockIdx.x * 256 + threadIdx.x; i < p.vocab; i += PARTS * 256) {
        float y = x[i];
        finite = finite && is_finite(y);
        if (y > best) best = y, at = i;
    }
    if (!finite) report(p.fault, p.step);
    SHARED(Bests, bests, );
    best_of_block(bests, best, at);
    if (threadIdx.x == 0) p.parts[blockIdx.y * PARTS + blockIdx.x] = make_uint2(bits_of(best), at);
}

extern "C" __global__ void __launch_bounds__(64) arg_max_all(const __grid_constant__ ArgMaxParams p) {
    uint2 part = p.parts[blockIdx.x * PARTS + threadIdx.x];
    float x = f32_of_bits(part.x);
    u32 at = part.y;
    SHARED(Bests, bests, );
    best_of_block(bests, x, at);
    if (threadIdx.x == 0) p.out[blockIdx.x] = at;
}

} // namespace hoist
