// BLAKE3 of device memory: one thread hashes a chunk of 1 KiB, one block of threads a subtree of 256 chunks.
//
// Source: the BLAKE3 specification (O'Connor, Aumasson, Neves, Wilcox-O'Hearn), sections 2.1 to 2.4. A tree's levels are
// merged in pairs from the left, and an odd node is carried up, which yields the specification's left-full tree.

#include <cstdint>

#include "primitives.cuh"

using namespace hoist;

struct Subtree {
    uint64_t ptr;       // 16-byte aligned
    uint64_t counter;   // of its first chunk
    uint32_t nbytes;    // at most 256 KiB
    uint32_t whole;     // it is the whole input: its top node is the root
};

constexpr uint32_t CHUNKS = 256;
constexpr uint32_t CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT = 8;

#define IV0 0x6A09E667u
#define IV1 0xBB67AE85u
#define IV2 0x3C6EF372u
#define IV3 0xA54FF53Au
#define IV4 0x510E527Fu
#define IV5 0x9B05688Cu
#define IV6 0x1F83D9ABu
#define IV7 0x5BE0CD19u

#define G(a, b, c, d, x, y)                 \
    a = a + b + (x);                        \
    d = pick_bytes(d ^ a, 0, 0x1032);      \
    c = c + d;                              \
    b = funnel_right(b ^ c, b ^ c, 12);  \
    a = a + b + (y);                        \
    d = pick_bytes(d ^ a, 0, 0x0321);      \
    c = c + d;                              \
    b = funnel_right(b ^ c, b ^ c, 7);

#define ROUND(i0, i1, i2, i3, i4, i5, i6, i7, i8, i9, i10, i11, i12, i13, i14, i15) \
    G(v0, v4, v8, v12, m[i0], m[i1])                                                \
    G(v1, v5, v9, v13, m[i2], m[i3])                                                \
    G(v2, v6, v10, v14, m[i4], m[i5])                                               \
    G(v3, v7, v11, v15, m[i6], m[i7])                                               \
    G(v0, v5, v10, v15, m[i8], m[i9])                                               \
    G(v1, v6, v11, v12, m[i10], m[i11])                                             \
    G(v2, v7, v8, v13, m[i12], m[i13])                                              \
    G(v3, v4, v9, v14, m[i14], m[i15])

static __device__ __forceinline__ void compress(uint32_t (&cv)[8], const uint32_t (&m)[16], uint64_t counter, uint32_t len, uint32_t flags) {
    uint32_t v0 = cv[0], v1 = cv[1], v2 = cv[2], v3 = cv[3], v4 = cv[4], v5 = cv[5], v6 = cv[6], v7 = cv[7];
    uint32_t v8 = IV0, v9 = IV1, v10 = IV2, v11 = IV3;
    uint32_t v12 = uint32_t(counter), v13 = uint32_t(counter >> 32), v14 = len, v15 = flags;
    // The message permutation of the specification, applied round by round.
    ROUND(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
    ROUND(2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
    ROUND(3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1)
    ROUND(10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6)
    ROUND(12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4)
    ROUND(9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7)
    ROUND(11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13)
    cv[0] = v0 ^ v8;
    cv[1] = v1 ^ v9;
    cv[2] = v2 ^ v10;
    cv[3] = v3 ^ v11;
    cv[4] = v4 ^ v12;
    cv[5] = v5 ^ v13;
    cv[6] = v6 ^ v14;
    cv[7] = v7 ^ v15;
}

static __device__ __forceinline__ void set_iv(uint32_t (&cv)[8]) {
    cv[0] = IV0;
    cv[1] = IV1;
    cv[2] = IV2;
    cv[3] = IV3;
    cv[4] = IV4;
    cv[5] = IV5;
    cv[6] = IV6;
    cv[7] = IV7;
}

static __device__ void hash_chunk(uint32_t (&cv)[8], const uint8_t *bytes, uint32_t nbytes, uint64_t counter, uint32_t root) {
    set_iv(cv);
    const uint32_t blocks = nbytes == 0 ? 1 : (nbytes + 63) / 64;
    for (uint32_t block = 0; block < blocks; block++) {
        uint32_t m[16];
        const uint32_t at = block * 64;
        const uint32_t len = min(64u, nbytes - at);
        if (len == 64) {
            const uint4 *from = reinterpret_cast<const uint4 *>(bytes + at);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint4 q = load_constant(from + i);
                m[4 * i] = q.x;
                m[4 * i + 1] = q.y;
                m[4 * i + 2] = q.z;
                m[4 * i + 3] = q.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < 16; i++) {
                uint32_t word = 0;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    if (4 * i + j < int(len)) {
                        word |= uint32_t(bytes[at + 4 * i + j]) << (8 * j);
                    }
                }
                m[i] = word;
            }
        }
        uint32_t flags = block == 0 ? CHUNK_START : 0;
        if (block + 1 == blocks) {
            flags |= CHUNK_END | root;
        }
        compress(cv, m, counter, len, flags);
    }
}

// Merges `count` nodes into one, level by level. Node i of the first level is thread i's `cv` and stands in `nodes` too.
static __device__ void reduce(uint32_t (&cv)[8], uint32_t (*nodes)[9], uint32_t count, uint32_t whole) {
    const uint32_t i = threadIdx.x;
    while (count > 1) {
        meet_block();
        const uint32_t pairs = count / 2;
        const bool carried = (count & 1) != 0 && i == pairs;
        if (i < pairs) {
            uint32_t m[16];
            for (int j = 0; j < 8; j++) {
                m[j] = nodes[2 * i][j];
                m[8 + j] = nodes[2 * i + 1][j];
            }
            set_iv(cv);
            compress(cv, m, 0, 64, PARENT | (whole && count == 2 ? ROOT : 0));
        } else if (carried) {
            for (int j = 0; j < 8; j++) {
                cv[j] = nodes[2 * i][j];
            }
        }
        meet_block();
        if (i < pairs || carried) {
            for (int j = 0; j < 8; j++) {
                nodes[i][j] = cv[j];
            }
        }
        count = pairs + (count & 1);
    }
}

// grid: subtrees; block: 256. `out` takes 32 bytes for each: a chaining value, or the hash of a whole input.
extern "C" __global__ void __launch_bounds__(256) hash_subtrees(const Subtree *subtrees, uint32_t *out) {
    SHARED(uint32_t, nodes, [CHUNKS][9]);  // 9: no two threads of a warp on one bank
    const Subtree s = subtrees[blockIdx.x];
    const uint32_t count = s.nbytes == 0 ? 1 : (s.nbytes + 1023) / 1024;
    const uint32_t i = threadIdx.x;
    uint32_t cv[8];
    if (i < count) {
        const uint32_t at = i * 1024;
        const uint32_t len = min(1024u, s.nbytes - at);
        hash_chunk(cv, reinterpret_cast<const uint8_t *>(s.ptr) + at, len, s.counter + i, s.whole && count == 1 ? ROOT : 0);
        for (int j = 0; j < 8; j++) {
            nodes[i][j] = cv[j];
        }
    }
    reduce(cv, nodes, count, s.whole);
    if (i == 0) {
        for (int j = 0; j < 8; j++) {
            out[8 * uint64_t(blockIdx.x) + j] = cv[j];
        }
    }
}

// Neighbouring nodes of one tree, at most 256.
struct Group {
    uint32_t first;
    uint32_t count;
    uint32_t whole;  // they are all of the tree's, and more than one or a root already
    uint32_t pad;
};

// grid: groups; block: 256.
extern "C" __global__ void __launch_bounds__(256) merge_nodes(const Group *groups, const uint32_t *in, uint32_t *out) {
    SHARED(uint32_t, nodes, [CHUNKS][9]);
    const Group g = groups[blockIdx.x];
    const uint32_t i = threadIdx.x;
    uint32_t cv[8];
    if (i < g.count) {
        for (int j = 0; j < 8; j++) {
            cv[j] = in[8 * (uint64_t(g.first) + i) + j];
            nodes[i][j] = cv[j];
        }
    }
    reduce(cv, nodes, g.count, g.whole);
    if (i == 0) {
        for (int j = 0; j < 8; j++) {
            out[8 * uint64_t(blockIdx.x) + j] = cv[j];
        }
    }
}
