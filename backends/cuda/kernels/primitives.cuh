// What kernels need of the machine beside C++: rounding arithmetic, warps, barriers, asynchronous copies. Everything that is
// an intrinsic or an instruction by name stands here and nowhere else, so that the kernels compile as plain C++ too: then
// backends/cuda/emulator/include/emulated.h takes the place of what follows.
#pragma once

#ifndef __CUDACC__
#include "emulated.h"
#else

// A namespace, so that these names hide those of <cmath>.
namespace hoist {

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef short i16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE static __device__ __forceinline__
/// A constant table: `TABLE i8 NAME[3] = {…}`. External, since a name of its own would be made from this file's folder.
#define TABLE extern __device__ const
/// A variable of the block: `SHARED(float, scratch, [256])`; its content is undefined at first.
#define SHARED(type, name, extent) __shared__ type name extent
/// The block's dynamic shared memory: `DYNAMIC_SHARED(float, shared, 16)`.
#define DYNAMIC_SHARED(type, name, alignment) extern __shared__ __align__(alignment) type name[]

// ---- arithmetic that rounds to nearest even and is never contracted ----

DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
DEVICE float sub(float a, float b) { return __fadd_rn(a, -b); }
DEVICE float quotient(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float root(float a) { return __fsqrt_rn(a); }

DEVICE float f32_of_bits(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
DEVICE double f64_of_bits(u64 bits) { return __longlong_as_double((long long)bits); }

/// To nearest even.
DEVICE float f32_of_i64(i64 x) { return __ll2float_rn(x); }
DEVICE float f32_of_u32(u32 x) { return __uint2float_rn(x); }
DEVICE int i32_of_f32(float x) { return __float2int_rn(x); }
/// Exactly.
DEVICE double f64_of_i32(int x) { return __int2double_rn(x); }
DEVICE double f64_of_f32(float x) { return (double)x; }
/// To nearest even.
DEVICE double product_f64(double a, double b) { return __dmul_rn(a, b); }
/// Those of 1.5 · 2^52.
constexpr u64 FLOORED_BITS = 0x4338000000000000ull;
/// The bits of 1.5 · 2^52 plus ⌊a · b⌋, where |a · b| < 2^51: as integers, those of 1.5 · 2^52 plus the floor.
DEVICE u64 floored_bits(double a, double b) { return (u64)__double_as_longlong(__fma_rd(a, b, 6755399441055744.0)); }

/// a · b in f64, then to f32: each to nearest even.
DEVICE float f32_of_product(double a, double b) { return __double2float_rn(__dmul_rn(a, b)); }

/// IEEE binary16 to f32, exactly.
DEVICE float f32_of_f16(u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

/// f32 to IEEE binary16, to nearest even, with gradual underflow.
DEVICE u16 f16_of_f32(float x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// ---- integers ----

/// c plus the product of four pairs of signed bytes.
DEVICE int dot4(int a, int b, int c) {
    int d;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

/// The same of four unsigned bytes and four signed ones.
DEVICE int dot4_unsigned(u32 a, int b, int c) {
    int d;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

/// The low word of (high, low) shifted right by `by` mod 32.
DEVICE u32 funnel_right(u32 low, u32 high, u32 by) { return __funnelshift_r(low, high, by); }
/// The bytes of (b, a) that the nibbles of `selector` name.
DEVICE u32 pick_bytes(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }
DEVICE u32 high_product(u32 a, u32 b) { return __umulhi(a, b); }
DEVICE u32 add_bytes(u32 a, u32 b) { return __vadd4(a, b); }
DEVICE u32 sub_bytes(u32 a, u32 b) { return __vsub4(a, b); }
DEVICE u32 ones_of(u32 x) { return __popc(x); }

/// d += A · B of signed bytes by a warp: A is 16 × 32 (rows), B is 32 × 8 (columns), d is 16 × 8. With g = lane / 4 and
/// t = lane mod 4: a0 and a2 hold row g, a1 and a3 row g + 8, columns 4t … 4t + 3 of the left (a0, a1) and the right half;
/// b0 and b1 hold rows 4t … 4t + 3 of the upper and lower half of column g; d0 and d1 are row g, columns 2t and 2t + 1, d2
/// and d3 the same of row g + 8.
DEVICE void mma_s8(int d[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// The same where the bytes of A are unsigned.
DEVICE void mma_u8_s8(int d[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// The same of signed bytes and half as many columns of A: a0 holds row g, a1 row g + 8, columns 4t … 4t + 3; b0 those rows of B.
DEVICE void mma_s8_half(int d[4], u32 a0, u32 a1, u32 b0) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a0), "r"(a1), "r"(b0));
}

// ---- loads that say where their data may be cached, and atomics ----

/// Of memory that no kernel writes while this one runs.
template <class T> DEVICE T load_constant(const T *from) { return __ldg(from); }
/// Past the first-level cache: of memory that another block has written in this launch.
template <class T> DEVICE T load_shared_cache(const T *from) { return __ldcg(from); }

DEVICE u32 atomic_add(u32 *to, u32 x) { return atomicAdd(to, x); }
DEVICE u64 atomic_add(u64 *to, u64 x) { return atomicAdd(to, x); }
DEVICE u32 atomic_min(u32 *to, u32 x) { return atomicMin(to, x); }
DEVICE u64 atomic_min(u64 *to, u64 x) { return atomicMin(to, x); }

/// A value and the number of who wrote it, as one word that is never seen in part.
DEVICE void store_word(u64 *to, u32 value, u32 number) {
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"((u64)number << 32 | value) : "memory");
}
/// To memory of the host.
DEVICE void store_to_host(u32 *to, u32 x) { asm volatile("st.relaxed.sys.global.b32 [%0], %1;" ::"l"(to), "r"(x) : "memory"); }
/// What this thread and those that it has met have written is seen by the device before what it writes from here on.
DEVICE void fence_device() { __threadfence(); }
/// The same, as the host sees it.
DEVICE void fence_system() { __threadfence_system(); }
DEVICE u32 atomic_exchange(u32 *to, u32 x) { return atomicExch(to, x); }
/// Waits until a word's number is `number`; its value.
DEVICE u32 await_word(const u64 *from, u32 number) {
    u64 word;
    do {
        asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
    } while ((u32)(word >> 32) != number);
    return (u32)word;
}

/// Waits until the numbers of N words are `number`; their values. All are asked for at once.
template <int N> DEVICE void await_words(const u64 *const (&from)[N], u32 number, u32 (&values)[N]) {
    bool all;
    do {
        u64 words[N];
#pragma unroll
        for (int i = 0; i < N; i++)
            asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(words[i]) : "l"(from[i]) : "memory");
        all = true;
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = (u32)words[i], all &= (u32)(words[i] >> 32) == number;
    } while (!all);
}
/// The same of N pairs of neighbouring words.
template <int N> DEVICE void await_pairs(const u64 *const (&from)[N], u32 number, u32 (&values)[N][2]) {
    bool all;
    do {
        u64 words[N][2];
#pragma unroll
        for (int i = 0; i < N; i++)
            asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];"
                         : "=l"(words[i][0]), "=l"(words[i][1])
                         : "l"(from[i])
                         : "memory");
        all = true;
#pragma unroll
        for (int i = 0; i < N; i++)
#pragma unroll
            for (int k = 0; k < 2; k++) values[i][k] = (u32)words[i][k], all &= (u32)(words[i][k] >> 32) == number;
    } while (!all);
}

/// Adds, after everything that this thread and those that it has met have written is seen by the device.
DEVICE void release_add(u32 *to, u32 x) {
    __threadfence();
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}
/// Waits until a counter is `least` or more, and sees what was written before it became so.
DEVICE void await_at_least(const u32 *counter, u32 least) {
    u32 seen;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen < least);
    __threadfence();
}

// ---- warps and blocks ----

/// `threadIdx.x`, read here: what follows from it is not kept in registers from one use to the next.
DEVICE u32 thread_now() {
    u32 t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    return t;
}
/// `blockIdx.x`, likewise.
DEVICE u32 block_now() {
    u32 b;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(b));
    return b;
}
/// `THREADS` threads, whole warps, meet at barrier `id` (1 … 15).
template <int THREADS> DEVICE void meet_threads_at(u32 id) {
    __syncwarp();
    asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}
/// What this thread has done is before whatever those do who meet at barrier `id`, and it goes on; all lanes of the warp take
/// part, and count among the `THREADS` that come there.
template <int THREADS> DEVICE void arrive_threads_at(u32 id) {
    __syncwarp();
    asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}

/// Every lane of the warp takes part.
template <class T> DEVICE T shuffle_xor(T x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
/// Of lane `from`.
template <class T> DEVICE T shuffle(T x, int from) { return __shfl_sync(0xffffffffu, x, from); }
template <class T> DEVICE T shuffle_down(T x, u32 by) { return __shfl_down_sync(0xffffffffu, x, by); }
template <class T> DEVICE T shuffle_up(T x, u32 by) { return __shfl_up_sync(0xffffffffu, x, by); }

/// The largest of the warp's; every lane takes part.
DEVICE u32 largest_of_warp(u32 x) { return __reduce_max_sync(0xffffffffu, x); }

/// All lanes of a warp that are still there.
DEVICE void meet_warp() { __syncwarp(); }
/// What this thread has read and written before is done, as the block sees it, before what follows.
DEVICE void fence_block() { __threadfence_block(); }
/// All threads of the block that are still there.
DEVICE void meet_block() { __syncthreads(); }
/// Meets, and tells whether any thread says yes.
DEVICE bool any_of_block(bool x) { return __syncthreads_or(x) != 0; }
/// The `THREADS` threads, whole warps, that come to barrier `ID` (1 … 15). Lanes that a branch has parted come together
/// first: the barrier counts warps.
template <int ID, int THREADS> DEVICE void meet_threads() {
    __syncwarp();
    asm volatile("barrier.cta.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}

// ---- barriers in shared memory that count arrivals and bytes, and copies that arrive there ----

DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

/// Each phase is complete after `count` arrivals, and when every byte has come that it was told to expect.
DEVICE void barrier_init(u64 *barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
/// Makes initialised barriers known to copies; the block must meet before its other threads use them.
DEVICE void barriers_are_initialised() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(u64 *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
/// Arrives, and adds to the bytes that the phase waits for.
DEVICE void barrier_expect(u64 *barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
/// Waits until the phase of that parity is complete: the one at hand, or the one before it.
DEVICE void barrier_wait(u64 *barrier, u32 parity) {
    u32 done = 0;
    while (!done)
        asm volatile("{\n"
                     ".reg .pred done;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, done;\n"
                     "}"
                     : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
}

/// Copies to shared memory and tells the barrier. Addresses and `bytes` are multiples of 16. What is read goes out of the
/// second-level cache first.
DEVICE void bulk_copy(void *to, const void *from, u32 bytes, u64 *barrier) {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
                 : "memory");
}

/// Brings bytes into the second-level cache. Address and `bytes` are multiples of 16.
DEVICE void prefetch(const void *from, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// ---- copies to shared memory that the thread waits for which started them ----

DEVICE void copy_4(void *to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
DEVICE void copy_16(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
/// Ends a group of copies.
DEVICE void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits for all groups but the `RECENT` last ones.
template <int RECENT> DEVICE void await_copies_but() { asm volatile("cp.async.wait_group %0;" ::"n"(RECENT) : "memory"); }
DEVICE void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- clocks ----

/// Of this multiprocessor.
DEVICE u64 cycles() { return clock64(); }
DEVICE u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

} // namespace hoist
#endif
