// What the kernels of decode programs share.
#pragma once

#include "codec.cuh"

namespace hoist {

/// One token of a batch.
struct Row {
    u32 token, sequence, position, wanted;
};
static_assert(sizeof(Row) == 16);

/// A quantised segment of an activation vector (§1.1).
struct Segment {
    i8 q[256];
    /// Sums of q over half blocks.
    i16 s[16];
    u8 u[8];
    int m, e;
};
static_assert(sizeof(Segment) == 304);

/// Reports that a step produced a NaN or infinity; the first step wins.
DEVICE void report(u32 *fault, u32 step) { atomic_min(fault, step); }

} // namespace hoist
