// The kernels' primitives (backends/cuda/kernels/primitives.cuh) in plain C++17: what takes the place of the instructions of
// a GPU when kernels/*.cu are compiled for the emulated device. Threads of a block are fibres; everything here that another
// thread takes part in goes to the scheduler in src/cpp/machine.cpp.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

// ---- the language ----

#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __align__(n) alignas(n)
// Left alone where build.rs looks for the kernels' names.
#ifndef HOIST_LIST_KERNELS
#define __global__
#define __launch_bounds__(...)
#endif

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Built in for every pair of integer types.
#define HOIST_MIN_MAX(A, B, R)                                                                                         \
    static inline R min(A a, B b) { return (R)a < (R)b ? (R)a : (R)b; }                                                \
    static inline R max(A a, B b) { return (R)a < (R)b ? (R)b : (R)a; }
HOIST_MIN_MAX(int, int, int)
HOIST_MIN_MAX(unsigned, unsigned, unsigned)
HOIST_MIN_MAX(int, unsigned, unsigned)
HOIST_MIN_MAX(unsigned, int, unsigned)
HOIST_MIN_MAX(long, long, long)
HOIST_MIN_MAX(unsigned long, unsigned long, unsigned long)
HOIST_MIN_MAX(long, unsigned long, unsigned long)
HOIST_MIN_MAX(unsigned long, long, unsigned long)
HOIST_MIN_MAX(long long, long long, long long)
HOIST_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
HOIST_MIN_MAX(long long, unsigned long long, unsigned long long)
HOIST_MIN_MAX(unsigned long long, long long, unsigned long long)
#undef HOIST_MIN_MAX

// ---- the machine ----

namespace emulator {

struct Index {
    unsigned x, y, z;
};

/// What a thread knows of itself.
struct Position {
    Index thread, block, block_size, grid_size;
};

/// Of the fibre that runs on this thread of the system.
extern thread_local const Position *here __attribute__((tls_model("initial-exec")));

/// Where a kernel waits, for reports.
struct Site {
    const char *file;
    int line;
};

void *shared_variable(size_t bytes, size_t alignment, Site site);
void *dynamic_shared();
/// Every lane of the warp gives `bytes` (32 at most); `all` gets those of all lanes, 32 apart.
const unsigned char *exchange(const void *mine, size_t bytes, const char *what, Site site);
void meet_warp(Site site);
void meet_block(Site site);
bool any_of_block(bool x, Site site);
void meet_threads(int id, int threads, Site site);
void arrive_threads(int id, int threads, Site site);
void barrier_init(unsigned long long *barrier, unsigned count, Site site);
void barrier_arrive(unsigned long long *barrier, unsigned expected_bytes, Site site);
void barrier_wait(unsigned long long *barrier, unsigned parity, Site site);
void bulk_copy(void *to, const void *from, unsigned bytes, unsigned long long *barrier, Site site);
void thread_copy(void *to, const void *from, unsigned bytes, Site site);
void end_copies();
void await_copies(unsigned recent_groups, bool open_group_too);
void counter_changed(const void *counter);
void await_at_least(const unsigned *counter, unsigned least, Site site);
void word_changed();
unsigned await_word(const unsigned long long *word, unsigned number, Site site);
unsigned long long cycles();
unsigned long long nanoseconds();

} // namespace emulator

#define threadIdx (emulator::here->thread)
#define blockIdx (emulator::here->block)
#define blockDim (emulator::here->block_size)
#define gridDim (emulator::here->grid_size)

#define HOIST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define HOIST_HERE (emulator::Site{file, line})

#define DEVICE static inline
#define TABLE static const
#define SHARED(type, name, extent)                                                                                     \
    typedef type name##_in_shared_memory extent;                                                                       \
    name##_in_shared_memory &name = *(name##_in_shared_memory *)emulator::shared_variable(                             \
        sizeof(name##_in_shared_memory), alignof(name##_in_shared_memory), emulator::Site{__FILE__, __LINE__})
#define DYNAMIC_SHARED(type, name, alignment) type *name = (type *)emulator::dynamic_shared()

namespace hoist {

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef short i16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// ---- arithmetic ----

DEVICE float fma(float a, float b, float c) { return std::fma(a, b, c); }
DEVICE float mul(float a, float b) { return a * b; }
DEVICE float add(float a, float b) { return a + b; }
DEVICE float sub(float a, float b) { return a - b; }
DEVICE float quotient(float a, float b) { return a / b; }
DEVICE float root(float a) { return std::sqrt(a); }

template <class To, class From> DEVICE To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}
DEVICE float f32_of_bits(u32 bits) { return bits_as<float>(bits); }
DEVICE u32 bits_of(float x) { return bits_as<u32>(x); }
DEVICE double f64_of_bits(u64 bits) { return bits_as<double>(bits); }

DEVICE float f32_of_i64(i64 x) { return (float)x; }
DEVICE float f32_of_u32(u32 x) { return (float)x; }
/// To nearest even; a NaN becomes 0 and what does not fit the nearest that does, as on the device.
DEVICE int i32_of_f32(float x) {
    if (x != x) return 0;
    if (x >= 2147483648.0f) return 2147483647;
    if (x <= -2147483648.0f) return -2147483647 - 1;
    return (int)std::nearbyint(x);
}
DEVICE double f64_of_i32(int x) { return (double)x; }
DEVICE double f64_of_f32(float x) { return (double)x; }
DEVICE double product_f64(double a, double b) { return a * b; }
/// Those of 1.5 · 2^52.
constexpr u64 FLOORED_BITS = 0x4338000000000000ull;
/// Where the product is not exact, its floor may be another one: the kernels' are.
DEVICE u64 floored_bits(double a, double b) { return bits_as<u64>(6755399441055744.0 + std::floor(a * b)); }
DEVICE float f32_of_product(double a, double b) { return (float)(a * b); }

DEVICE float f32_of_f16(u16 bits) {
    u32 sign = (u32)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    if (exponent == 31) return f32_of_bits(fraction ? 0x7fffffffu : sign | 0x7f800000u);
    float magnitude = exponent == 0 ? (float)fraction * 0x1p-24f : f32_of_bits((exponent + 112) << 23 | fraction << 13);
    return f32_of_bits(sign | bits_of(magnitude));
}

DEVICE u16 f16_of_f32(float x) {
    u32 bits = bits_of(x), magnitude = bits & 0x7fffffffu;
    u16 sign = bits >> 16 & 0x8000;
    if (magnitude > 0x7f800000u) return 0x7fff;
    // 65520 and more round to infinity.
    if (magnitude >= 0x477ff000u) return sign | 0x7c00;
    if (magnitude < 0x38800000u) {
        // Below 2^-14 an f16 counts units of 2^-24: adding 0.5 · 2^24 of them leaves the count, rounded, in the low bits.
        float units = f32_of_bits(magnitude) + 0.5f;
        return sign | (u16)(bits_of(units) - 0x3f000000u);
    }
    u32 rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return sign | (u16)((rounded - (112u << 23)) >> 13);
}

// ---- integers ----

DEVICE int dot4(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (int)(i8)((u32)a >> 8 * i) * (int)(i8)((u32)b >> 8 * i);
    return c;
}
DEVICE int dot4_unsigned(u32 a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (int)(u8)(a >> 8 * i) * (int)(i8)((u32)b >> 8 * i);
    return c;
}
DEVICE u32 funnel_right(u32 low, u32 high, u32 by) { return (u32)(((u64)high << 32 | low) >> (by & 31)); }
DEVICE u32 pick_bytes(u32 a, u32 b, u32 selector) {
    u64 both = (u64)b << 32 | a;
    u32 picked = 0;
    for (int i = 0; i < 4; i++) {
        u32 nibble = selector >> 4 * i & 15;
        u32 byte = (u32)(both >> 8 * (nibble & 7)) & 255;
        // The nibble's top bit asks for eight copies of the byte's sign.
        if (nibble & 8) byte = byte & 0x80 ? 255 : 0;
        picked |= byte << 8 * i;
    }
    return picked;
}
DEVICE u32 high_product(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }
DEVICE u32 add_bytes(u32 a, u32 b) {
    u32 sum = 0;
    for (int i = 0; i < 4; i++) sum |= (u32)(u8)((a >> 8 * i) + (b >> 8 * i)) << 8 * i;
    return sum;
}
DEVICE u32 sub_bytes(u32 a, u32 b) {
    u32 difference = 0;
    for (int i = 0; i < 4; i++) difference |= (u32)(u8)((a >> 8 * i) - (b >> 8 * i)) << 8 * i;
    return difference;
}
DEVICE u32 ones_of(u32 x) { return (u32)__builtin_popcount(x); }

template <class Dot> DEVICE void mma_of_bytes(int d[4], const u32 mine[6], Dot dot, const char *what, emulator::Site site) {
    const unsigned char *all = emulator::exchange(mine, 6 * sizeof *mine, what, site);
    u32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    for (u32 i = 0; i < 4; i++) {
        u32 row = g + (i >> 1) * 8, column = 2 * t + (i & 1);
        int sum = d[i];
        for (u32 k = 0; k < 32; k += 4) {
            u32 a, b;
            // Of the lane that holds row `row`'s columns k … k + 3, and of the one with rows k … k + 3 of the column.
            std::memcpy(&a, all + 32 * ((row & 7) * 4 + (k >> 2 & 3)) + 4 * ((row >> 3) + 2 * (k >> 4)), 4);
            std::memcpy(&b, all + 32 * (column * 4 + (k >> 2 & 3)) + 16 + 4 * (k >> 4), 4);
            sum = dot(a, (int)b, sum);
        }
        d[i] = sum;
    }
}
DEVICE void mma_s8(int d[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, HOIST_SITE) {
    u32 mine[6] = {a0, a1, a2, a3, b0, b1};
    mma_of_bytes(d, mine, [](u32 a, int b, int c) { return dot4((int)a, b, c); }, "mma_s8", HOIST_HERE);
}
DEVICE void mma_u8_s8(int d[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, HOIST_SITE) {
    u32 mine[6] = {a0, a1, a2, a3, b0, b1};
    mma_of_bytes(d, mine, dot4_unsigned, "mma_u8_s8", HOIST_HERE);
}

DEVICE void mma_s8_half(int d[4], u32 a0, u32 a1, u32 b0, HOIST_SITE) {
    // The right half is of zeros.
    u32 mine[6] = {a0, a1, 0, 0, b0, 0};
    mma_of_bytes(d, mine, [](u32 a, int b, int c) { return dot4((int)a, b, c); }, "mma_s8_half", HOIST_HERE);
}

// ---- loads and atomics ----

template <class T> DEVICE T load_constant(const T *from) { return *from; }
template <class T> DEVICE T load_shared_cache(const T *from) { return *from; }

template <class T> DEVICE T atomic_add_any(T *to, T x) {
    T before = __atomic_fetch_add(to, x, __ATOMIC_SEQ_CST);
    emulator::counter_changed(to);
    return before;
}
template <class T> DEVICE T atomic_min_any(T *to, T x) {
    T before = __atomic_load_n(to, __ATOMIC_SEQ_CST);
    while (x < before && !__atomic_compare_exchange_n(to, &before, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return before;
}
DEVICE u32 atomic_add(u32 *to, u32 x) { return atomic_add_any(to, x); }
DEVICE u64 atomic_add(u64 *to, u64 x) { return atomic_add_any(to, x); }
DEVICE u32 atomic_min(u32 *to, u32 x) { return atomic_min_any(to, x); }
DEVICE u64 atomic_min(u64 *to, u64 x) { return atomic_min_any(to, x); }
DEVICE void store_word(u64 *to, u32 value, u32 number) {
    __atomic_store_n(to, (u64)number << 32 | value, __ATOMIC_SEQ_CST);
    emulator::word_changed();
}
DEVICE void store_to_host(u32 *to, u32 x) { __atomic_store_n(to, x, __ATOMIC_SEQ_CST); }
DEVICE void fence_device() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
DEVICE void fence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
DEVICE u32 atomic_exchange(u32 *to, u32 x) { return __atomic_exchange_n(to, x, __ATOMIC_SEQ_CST); }
DEVICE u32 await_word(const u64 *from, u32 number, HOIST_SITE) { return emulator::await_word(from, number, HOIST_HERE); }
template <int N> DEVICE void await_words(const u64 *const (&from)[N], u32 number, u32 (&values)[N], HOIST_SITE) {
    for (int i = 0; i < N; i++) values[i] = emulator::await_word(from[i], number, HOIST_HERE);
}
template <int N> DEVICE void await_pairs(const u64 *const (&from)[N], u32 number, u32 (&values)[N][2], HOIST_SITE) {
    for (int i = 0; i < N; i++)
        for (int k = 0; k < 2; k++) values[i][k] = emulator::await_word(from[i] + k, number, HOIST_HERE);
}
DEVICE void release_add(u32 *to, u32 x) { atomic_add_any(to, x); }
DEVICE void await_at_least(const u32 *counter, u32 least, HOIST_SITE) { emulator::await_at_least(counter, least, HOIST_HERE); }

// ---- warps and blocks ----

template <class T> DEVICE T shuffle_from(T x, u32 lane, const char *what, emulator::Site site) {
    static_assert(sizeof(T) <= 8);
    const unsigned char *all = emulator::exchange(&x, sizeof x, what, site);
    T y;
    std::memcpy(&y, all + 32 * lane, sizeof y);
    return y;
}
template <class T> DEVICE T shuffle_xor(T x, int mask, HOIST_SITE) {
    return shuffle_from(x, ((threadIdx.x & 31) ^ (u32)mask) & 31, "shuffle_xor", HOIST_HERE);
}
template <class T> DEVICE T shuffle(T x, int from, HOIST_SITE) { return shuffle_from(x, (u32)from & 31, "shuffle", HOIST_HERE); }
/// Lanes past the warp's ends yield the caller's own value.
template <class T> DEVICE T shuffle_down(T x, u32 by, HOIST_SITE) {
    u32 lane = threadIdx.x & 31;
    return shuffle_from(x, lane + by < 32 ? lane + by : lane, "shuffle_down", HOIST_HERE);
}
template <class T> DEVICE T shuffle_up(T x, u32 by, HOIST_SITE) {
    u32 lane = threadIdx.x & 31;
    return shuffle_from(x, lane >= by ? lane - by : lane, "shuffle_up", HOIST_HERE);
}

DEVICE u32 largest_of_warp(u32 x, HOIST_SITE) {
    const unsigned char *all = emulator::exchange(&x, sizeof x, "largest_of_warp", HOIST_HERE);
    u32 most = 0;
    for (int lane = 0; lane < 32; lane++) {
        u32 y;
        std::memcpy(&y, all + 32 * lane, sizeof y);
        most = y > most ? y : most;
    }
    return most;
}

DEVICE void meet_warp(HOIST_SITE) { emulator::meet_warp(HOIST_HERE); }
DEVICE void fence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
DEVICE void meet_block(HOIST_SITE) { emulator::meet_block(HOIST_HERE); }
DEVICE bool any_of_block(bool x, HOIST_SITE) { return emulator::any_of_block(x, HOIST_HERE); }
DEVICE u32 thread_now() { return threadIdx.x; }
DEVICE u32 block_now() { return blockIdx.x; }
template <int THREADS> DEVICE void meet_threads_at(u32 id, HOIST_SITE) {
    static_assert(THREADS > 0 && THREADS % 32 == 0);
    emulator::meet_threads((int)id, THREADS, HOIST_HERE);
}
template <int THREADS> DEVICE void arrive_threads_at(u32 id, HOIST_SITE) {
    static_assert(THREADS > 0 && THREADS % 32 == 0);
    emulator::arrive_threads((int)id, THREADS, HOIST_HERE);
}
template <int ID, int THREADS> DEVICE void meet_threads(HOIST_SITE) {
    static_assert(ID > 0 && ID < 16 && THREADS > 0 && THREADS % 32 == 0);
    emulator::meet_threads(ID, THREADS, HOIST_HERE);
}

// ---- barriers in shared memory, and copies ----

DEVICE void barrier_init(u64 *barrier, u32 count, HOIST_SITE) { emulator::barrier_init(barrier, count, HOIST_HERE); }
DEVICE void barriers_are_initialised() {}
DEVICE void barrier_arrive(u64 *barrier, HOIST_SITE) { emulator::barrier_arrive(barrier, 0, HOIST_HERE); }
DEVICE void barrier_expect(u64 *barrier, u32 bytes, HOIST_SITE) { emulator::barrier_arrive(barrier, bytes, HOIST_HERE); }
DEVICE void barrier_wait(u64 *barrier, u32 parity, HOIST_SITE) { emulator::barrier_wait(barrier, parity, HOIST_HERE); }
DEVICE void bulk_copy(void *to, const void *from, u32 bytes, u64 *barrier, HOIST_SITE) {
    emulator::bulk_copy(to, from, bytes, barrier, HOIST_HERE);
}
/// Only speed depends on it.
DEVICE void prefetch(const void *, u32) {}
DEVICE void copy_4(void *to, const void *from, HOIST_SITE) { emulator::thread_copy(to, from, 4, HOIST_HERE); }
DEVICE void copy_16(void *to, const void *from, HOIST_SITE) { emulator::thread_copy(to, from, 16, HOIST_HERE); }
DEVICE void end_copies() { emulator::end_copies(); }
template <int RECENT> DEVICE void await_copies_but() { emulator::await_copies(RECENT, false); }
DEVICE void await_copies() { emulator::await_copies(0, true); }

// ---- clocks ----

DEVICE u64 cycles() { return emulator::cycles(); }
DEVICE u64 nanoseconds() { return emulator::nanoseconds(); }

} // namespace hoist
