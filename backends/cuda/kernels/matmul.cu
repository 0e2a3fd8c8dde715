// Products of quantised matrices, of every encoding and for any number of tokens, from canonical bytes.

#include "decode.cuh"

namespace hoist {

// ---- quantised matrices ----

struct MatMulParams {
    /// Canonical bytes of the first matrix, its prefix included.
    const u8 *weight;
    /// E_w of each row of all matrices.
    const i16 *exponents;
    const Segment *x;
    const float *bias;
    float *y;
    /// For experts, the chosen ones: [tokens, choices]; else null.
    const u32 *experts;
    u32 *fault;
    u64 row_bytes, matrix_bytes;
    u32 step, rows, cols, tokens;
    /// Experts a token, and whether all of them read the same vector.
    u32 choices, shared;
};
static_assert(sizeof(MatMulParams) == 96);

/// Tokens that a warp takes at once.
constexpr int TILE = 4;

DEVICE i64 arithmetic_shift(i64 x, int by) { return x >> min(by, 63); }

/// The largest exponent of a vector's segments, by a warp.
DEVICE int vector_exponent(const Segment *x, int segments) {
    int e = -133;
    for (int s = threadIdx.x & 31; s < segments; s += 32) e = max(e, x[s].e);
    for (int h = 16; h > 0; h >>= 1) e = max(e, shuffle_xor(e, h));
    return e;
}

/// One warp a row: eight lanes a segment, one block of 32 each.
template <class E, int N>
DEVICE void multiply(const MatMulParams &p, const u8 *matrix, const i16 *exponents, const Segment *const *x, float *const *y,
                     u32 row) {
    int lane = threadIdx.x & 31, j = lane & 7;
    int blocks = p.cols / 32, segments = (p.cols + 255) / 256;
    const u8 *bytes = matrix + (E::BYTES == 1 ? 4 : 0) + row * p.row_bytes;
    int ew = exponents[row];
    int ea[N];
    i64 acc[N];
    for (int t = 0; t < N; t++) {
        ea[t] = vector_exponent(x[t], segments);
        acc[t] = 0;
    }
    for (int first = 0; first < blocks; first += 32) {
        int at = first + lane;
        bool here = at < blocks;
        Block b;
        if (here) {
            E::read(bytes, at, b);
        } else {
            for (int i = 0; i < 8; i++) b.w[i] = 0;
            both(b, 0, -1000, 0.0f), no_min(b);
            b.ek = -1000;
        }
        int e = b.e[0], ek = b.ek;
        if (E::ALIGNED) {
            e = max(b.e[0], b.e[1]);
            for (int h = 1; h < 8; h <<= 1) {
                e = max(e, shuffle_xor(e, h));
                ek = max(ek, shuffle_xor(ek, h));
            }
            for (int h = 0; h < 2; h++) {
                b.c[h] = (b.c[h] * 256) >> min(e - b.e[h], 31);
                b.k[h] = (b.k[h] * 256) >> min(ek - b.ek, 31);
            }
            e -= 8, ek -= 8;
        }
        int segment = min(at >> 3, segments - 1);
        for (int t = 0; t < N; t++) {
            const Segment &s = x[t][segment];
            const int4 *q = (const int4 *)(s.q + 32 * j);
            int4 low = q[0], high = q[1];
            int d0 = dot4(b.w[0], low.x, 0), d1 = dot4(b.w[4], high.x, 0);
            d0 = dot4(b.w[1], low.y, d0), d1 = dot4(b.w[5], high.y, d1);
            d0 = dot4(b.w[2], low.z, d0), d1 = dot4(b.w[6], high.z, d1);
            d0 = dot4(b.w[3], low.w, d0), d1 = dot4(b.w[7], high.w, d1);
            int u = s.u[j], m = s.m, shift = ea[t] - s.e;
            i64 i = E::HALVES ? ((i64)b.c[0] * d0 + (i64)b.c[1] * d1) * u : (i64)b.c[0] * (d0 + d1) * u;
            if (!here) i = 0;
            for (int h = 1; h < 8; h <<= 1) i += shuffle_xor(i, h);
            i64 term = arithmetic_shift(m * i, ew - e + shift);
            if (E::MINS) {
                i64 k = ((i64)b.k[0] * s.s[2 * j] + (i64)b.k[1] * s.s[2 * j + 1]) * u;
                if (!here) k = 0;
                for (int h = 1; h < 8; h <<= 1) k += shuffle_xor(k, h);
                term -= arithmetic_shift(m * k, ew - ek + shift);
            }
            // A segment past the row's end has sums of zero under an exponent that means nothing.
            if (j == 0 && here) acc[t] += term;
        }
    }
    for (int t = 0; t < N; t++) {
        acc[t] += shuffle_xor(acc[t], 8);
        acc[t] += shuffle_xor(acc[t], 16);
        if (lane == 0) {
            float result = scaled_sum(acc[t], ew + ea[t]);
            if (E::BYTES == 1) result = mul(result, f32_of_bits(u32_any(matrix)));
            if (!is_finite(result)) report(p.fault, p.step);
            if (p.bias) result = add(result, p.bias[row]);
            y[t][row] = result;
        }
    }
}

template <class E, int N>
DEVICE void multiply_tile(const MatMulParams &p, u32 row, u32 token) {
    u32 segments = (p.cols + 255) / 256;
    const Segment *x[N];
    float *y[N];
    for (int t = 0; t < N; t++) {
        x[t] = p.x + (size_t)(token + t) * segments;
        y[t] = p.y + (size_t)(token + t) * p.rows;
    }
    multiply<E, N>(p, p.weight, p.exponents, x, y, row);
}

template <class E> DEVICE void matmul(const MatMulParams &p) {
    u32 row = blockIdx.x * 4 + (threadIdx.x >> 5);
    if (row >= p.rows) return;
    u32 segments = (p.cols + 255) / 256;
    if (p.experts) {
        u32 token = blockIdx.y / p.choices, expert = p.experts[blockIdx.y];
        const Segment *x[1] = {p.x + (size_t)(p.shared ? token : blockIdx.y) * segments};
        float *y[1] = {p.y + (size_t)blockIdx.y * p.rows};
        multiply<E, 1>(p, p.weight + expert * p.matrix_bytes, p.exponents + (size_t)expert * p.rows, x, y, row);
        return;
    }
    u32 end = min(p.tokens, (blockIdx.y + 1) * TILE);
    for (u32 token = blockIdx.y * TILE; token < end;) {
        if (end - token >= TILE) {
            multiply_tile<E, TILE>(p, row, token), token += TILE;
        } else {
            multiply_tile<E, 1>(p, row, token), token += 1;
        }
    }
}

#define MATMUL(name, E)                                                                                                \
    extern "C" __global__ void __launch_bounds__(128) matmul_##name(const __grid_constant__ MatMulParams p) {          \
        matmul<E>(p);                                                                                                  \
    }
EACH_QUANTIZED(MATMUL)

} // namespace hoist
