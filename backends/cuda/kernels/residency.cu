// Making weights resident: pieces of a file to their places, and what is known only once a weight has arrived.
//
// The structs are mirrored in src/tables.rs, which checks their sizes.

#include <cstdint>

#include "primitives.cuh"

using namespace hoist;

// ---------------------------------------------------------------------------------------------------------------------
// Pieces: from a chunk of a file, as it lies in the file, to where weights lie.

enum Kind : uint32_t {
    BYTES = 0,          // `cols` bytes, contiguous
    UNIT_2 = 1,         // rows × cols units of two bytes
    UNIT_4 = 2,         // of four bytes
    WIDEN_F16 = 3,      // f16 to f32
    WIDEN_BF16 = 4,     // bf16 to f32
    ADD_ONE = 0x100,    // one added to the f32 that a UNIT_4 or WIDEN piece yields
};

struct Piece {
    uint64_t from;      // bytes from the source's base
    uint64_t from_row;  // bytes from a unit to the one below it
    uint64_t from_col;  // bytes from a unit to the one right of it
    uint64_t to;        // address
    uint64_t to_row;
    uint64_t to_col;
    uint32_t rows;
    uint32_t cols;
    uint32_t kind;
    uint32_t pad;
};

// Bytes, or units, that a block of threads moves.
constexpr uint32_t BLOCK_BYTES = 1u << 16;
constexpr uint32_t BLOCK_UNITS = 1u << 14;

static __device__ uint32_t load_2(const uint8_t *p) {
    return uint32_t(p[0]) | uint32_t(p[1]) << 8;
}

static __device__ uint32_t load_4(const uint8_t *p) {
    if ((uint64_t(p) & 3) == 0) {
        return *reinterpret_cast<const uint32_t *>(p);
    }
    return load_2(p) | load_2(p + 2) << 16;
}

// Any alignment on either side: whole words of the destination are put together from two words of the source.
static __device__ void move_bytes(const uint8_t *from, uint8_t *to, uint32_t n) {
    uint32_t head = uint32_t(-int64_t(uint64_t(to))) & 15;
    head = head < n ? head : n;
    for (uint32_t i = threadIdx.x; i < head; i += blockDim.x) {
        to[i] = from[i];
    }
    from += head;
    to += head;
    n -= head;
    const uint32_t quads = n / 16;
    const uint32_t shift = uint32_t(uint64_t(from) & 3) * 8;
    if ((uint64_t(from) & 15) == 0) {
        for (uint32_t i = threadIdx.x; i < quads; i += blockDim.x) {
            reinterpret_cast<uint4 *>(to)[i] = reinterpret_cast<const uint4 *>(from)[i];
        }
    } else {
        const uint32_t *words = reinterpret_cast<const uint32_t *>(uint64_t(from) & ~uint64_t(3));
        for (uint32_t i = threadIdx.x; i < quads; i += blockDim.x) {
            const uint32_t *w = words + 4 * i;
            const uint32_t a = w[0], b = w[1], c = w[2], d = w[3];
            // The word after the last is read only where it is needed: it can lie past the source.
            const uint32_t e = shift ? w[4] : 0;
            uint4 v;
            v.x = funnel_right(a, b, shift);
            v.y = funnel_right(b, c, shift);
            v.z = funnel_right(c, d, shift);
            v.w = funnel_right(d, e, shift);
            reinterpret_cast<uint4 *>(to)[i] = v;
        }
    }
    for (uint32_t i = quads * 16 + threadIdx.x; i < n; i += blockDim.x) {
        to[i] = from[i];
    }
}

static __device__ float widen_f16(uint32_t bits) {
    // Exact, subnormals included, without cuda_fp16.h: as hoist-quant's f16_to_f32.
    const uint32_t sign = (bits & 0x8000u) << 16;
    const uint32_t magnitude = bits & 0x7fffu;
    uint32_t value;
    if (magnitude < 0x400) {
        value = bits_of(mul(f32_of_u32(magnitude), f32_of_bits(103u << 23)));
    } else if (magnitude < 0x7c00) {
        value = (magnitude << 13) + (112u << 23);
    } else {
        value = magnitude << 13 | 0x7f800000u;
    }
    return f32_of_bits(sign | value);
}

static __device__ void move_units(const Piece &p, const uint8_t *from, uint64_t begin, uint64_t end) {
    const uint32_t what = p.kind & 0xff;
    const bool add_one = (p.kind & ADD_ONE) != 0;
    for (uint64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
        const uint64_t r = i / p.cols, c = i % p.cols;
        const uint8_t *s = from + r * p.from_row + c * p.from_col;
        const uint64_t d = p.to + r * p.to_row + c * p.to_col;
        if (what == UNIT_2) {
            *reinterpret_cast<uint16_t *>(d) = uint16_t(load_2(s));
            continue;
        }
        uint32_t bits;
        if (what == WIDEN_F16) {
            bits = bits_of(widen_f16(load_2(s)));
        } else if (what == WIDEN_BF16) {
            bits = load_2(s) << 16;
        } else {
            bits = load_4(s);
        }
        if (add_one) {
            bits = bits_of(add(f32_of_bits(bits), 1.0f));
        }
        *reinterpret_cast<uint32_t *>(d) = bits;
    }
}

// grid: (pieces, blocks of the largest piece); block: 256.
extern "C" __global__ void __launch_bounds__(256) move_pieces(const Piece *pieces, const uint8_t *base) {
    const Piece p = pieces[blockIdx.x];
    const uint8_t *from = base + p.from;
    if (p.kind == BYTES) {
        const uint64_t begin = uint64_t(blockIdx.y) * BLOCK_BYTES;
        if (begin < p.cols) {
            const uint64_t left = p.cols - begin;
            move_bytes(from + begin, reinterpret_cast<uint8_t *>(p.to) + begin, uint32_t(left < BLOCK_BYTES ? left : BLOCK_BYTES));
        }
        return;
    }
    const uint64_t units = uint64_t(p.rows) * p.cols;
    const uint64_t begin = uint64_t(blockIdx.y) * BLOCK_UNITS;
    const uint64_t end = begin + BLOCK_UNITS < units ? begin + BLOCK_UNITS : units;
    move_units(p, from, begin, end);
}

// ---------------------------------------------------------------------------------------------------------------------
// Weights that have arrived: each row's exponent E_w (docs/numerics.md §1.2), and the first NaN or infinity.

enum Scales : uint32_t {
    F16_ONE = 0,    // an f16 at `at`
    F16_TWO = 1,    // f16s at `at` and `at2`
    MXFP4 = 2,      // E8M0 at 0
    NVFP4 = 3,      // four UE4M3 from 0 on
    IQ1_M = 4,      // an f16 in the high nibbles of four u16 from `at` on
    APR_Q8 = 5,     // one f32 in front of each matrix
    FLOAT_4 = 6,    // f32 values
    FLOAT_F16 = 7,
    FLOAT_BF16 = 8,
};

struct Weight {
    uint64_t ptr;
    uint64_t nbytes;
    uint64_t exponents;         // i16 for each row of all matrices; 0: none
    uint64_t rows;              // of all matrices
    uint64_t rows_per_matrix;
    uint64_t row_bytes;
    uint32_t rows_per_item;
    uint32_t block_bytes;
    uint32_t prefix;            // bytes in front of each matrix
    uint32_t scales;
    uint32_t at;
    uint32_t at2;
    int32_t shift;              // added to the largest exponent
    uint32_t pad;
};

struct Item {
    uint32_t weight;
    uint32_t part;
};

// Bytes of a float weight that a block of threads checks.
constexpr uint64_t ITEM_BYTES = 1u << 18;

static __device__ void refuse(unsigned long long *first_bad, uint32_t weight, uint64_t offset) {
    atomic_min(first_bad + weight, static_cast<unsigned long long>(offset));
}

static __device__ uint32_t u16_at(const uint8_t *p) {
    return *reinterpret_cast<const uint16_t *>(p);
}

static __device__ int f16_exponent(uint32_t bits) {
    const int e = int(bits >> 10 & 31);
    return (e > 1 ? e : 1) - 25;
}

// The largest exponent of a block's scales; `bad` is the offset in the block of one that is no number, or stays.
static __device__ int block_exponent(const Weight &w, const uint8_t *block, uint32_t &bad) {
    switch (w.scales) {
    case F16_TWO: {
        const uint32_t a = u16_at(block + w.at), b = u16_at(block + w.at2);
        if ((b & 0x7c00) == 0x7c00) {
            bad = w.at2;
        }
        if ((a & 0x7c00) == 0x7c00) {
            bad = w.at;
        }
        // The shift of an encoding with mins is common to both.
        return max(f16_exponent(a), f16_exponent(b));
    }
    case MXFP4: {
        const int e = block[0];
        if (e == 255) {
            bad = 0;
        }
        return e - 128;
    }
    case NVFP4: {
        int e = -128;
        for (int i = 0; i < 4; i++) {
            const int field = block[i] >> 3 & 15;
            e = max(e, (field > 1 ? field : 1) - 11);
        }
        return e;
    }
    case IQ1_M: {
        uint32_t d = 0;
        for (int i = 0; i < 4; i++) {
            d |= (u16_at(block + w.at + 2 * i) >> 12) << (4 * i);
        }
        if ((d & 0x7c00) == 0x7c00) {
            bad = w.at;
        }
        return f16_exponent(d);
    }
    default: {
        const uint32_t a = u16_at(block + w.at);
        if ((a & 0x7c00) == 0x7c00) {
            bad = w.at;
        }
        return f16_exponent(a);
    }
    }
}

static __device__ void finish_rows(const Weight &w, uint32_t weight, uint64_t first, unsigned long long *first_bad) {
    const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const uint64_t last = min(first + w.rows_per_item, w.rows);
    const uint64_t matrix_bytes = w.rows_per_matrix * w.row_bytes + w.prefix;
    for (uint64_t row = first + warp; row < last; row += warps) {
        const uint64_t matrix = row / w.rows_per_matrix;
        const uint64_t start = matrix * matrix_bytes + w.prefix + (row % w.rows_per_matrix) * w.row_bytes;
        int e = w.scales == APR_Q8 ? 0 : -32768;
        if (w.scales == APR_Q8) {
            if (row % w.rows_per_matrix == 0 && lane == 0) {
                const uint32_t bits = load_4(reinterpret_cast<const uint8_t *>(w.ptr + matrix * matrix_bytes));
                if ((bits & 0x7f800000u) == 0x7f800000u) {
                    refuse(first_bad, weight, matrix * matrix_bytes);
                }
            }
        } else {
            for (uint64_t at = uint64_t(lane) * w.block_bytes; at < w.row_bytes; at += 32ull * w.block_bytes) {
                uint32_t bad = ~0u;
                e = max(e, block_exponent(w, reinterpret_cast<const uint8_t *>(w.ptr + start + at), bad));
                if (bad != ~0u) {
                    refuse(first_bad, weight, start + at + bad);
                }
            }
            for (int h = 16; h > 0; h >>= 1) {
                e = max(e, shuffle_xor(e, h));
            }
            e += w.shift;
        }
        if (lane == 0 && w.exponents != 0) {
            reinterpret_cast<int16_t *>(w.exponents)[row] = int16_t(e);
        }
    }
}

static __device__ bool special_4(uint32_t bits) {
    return (bits & 0x7f800000u) == 0x7f800000u;
}

static __device__ bool special_2(uint32_t word, uint32_t mask) {
    return (word & mask) == mask || (word >> 16 & mask) == mask;
}

static __device__ void check_floats(const Weight &w, uint32_t weight, uint64_t begin, unsigned long long *first_bad) {
    const uint64_t end = min(begin + ITEM_BYTES, w.nbytes);
    const uint32_t mask = w.scales == FLOAT_F16 ? 0x7c00u : 0x7f80u;
    const uint32_t width = w.scales == FLOAT_4 ? 4 : 2;
    const uint8_t *base = reinterpret_cast<const uint8_t *>(w.ptr);
    bool hit = false;
    for (uint64_t at = begin + 16ull * threadIdx.x; at + 16 <= end; at += 16ull * blockDim.x) {
        const uint4 v = *reinterpret_cast<const uint4 *>(base + at);
        const bool any = width == 4 ? special_4(v.x) || special_4(v.y) || special_4(v.z) || special_4(v.w)
                                    : special_2(v.x, mask) || special_2(v.y, mask) || special_2(v.z, mask) || special_2(v.w, mask);
        hit = hit || any;
    }
    // What a whole 16 bytes do not cover, and the place of a hit: value by value.
    const uint64_t tail = begin + (end - begin) / 16 * 16;
    const bool all = any_of_block(hit);
    for (uint64_t at = (all ? begin : tail) + uint64_t(threadIdx.x) * width; at < end; at += uint64_t(blockDim.x) * width) {
        const uint32_t bits = width == 4 ? *reinterpret_cast<const uint32_t *>(base + at) : u16_at(base + at);
        const bool bad = width == 4 ? special_4(bits) : (bits & mask) == mask;
        if (bad) {
            refuse(first_bad, weight, at);
        }
    }
}

// grid: items; block: 256. `first_bad` has an entry for each weight, all ones at first.
extern "C" __global__ void __launch_bounds__(256)
finish_weights(const Item *items, const Weight *weights, unsigned long long *first_bad) {
    const Item item = items[blockIdx.x];
    const Weight w = weights[item.weight];
    if (w.scales >= FLOAT_4) {
        check_floats(w, item.weight, item.part * ITEM_BYTES, first_bad);
    } else {
        finish_rows(w, item.weight, uint64_t(item.part) * w.rows_per_item, first_bad);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Measuring.

/// Reads `units` of 16 bytes. All are zero, but the compiler cannot know.
extern "C" __global__ void __launch_bounds__(512) read_all(uint4 *from, uint64_t units) {
    uint4 all = make_uint4(0, 0, 0, 0);
    uint64_t step = (uint64_t)gridDim.x * blockDim.x;
#pragma unroll 4
    for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < units; i += step) {
        uint4 x = from[i];
        all.x |= x.x, all.y |= x.y, all.z |= x.z, all.w |= x.w;
    }
    if (all.x | all.y | all.z | all.w) from[0] = all;
}
