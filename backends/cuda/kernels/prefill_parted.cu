// Products of matrices of K encodings with many tokens whose tiles do not come out even: blocks share the last ones out.

#include "prefill_k.cuh"

namespace hoist {

struct PartedParams {
    PrefillParams product;
    Parted parted;
};
static_assert(sizeof(PartedParams) == 104);

/// The largest tiles, shared out where blocks have not as many of them each. All blocks must be there at once.
#define PARTED(name, E)                                                                                                \
    extern "C" __global__ void __launch_bounds__(512, 1) prefill_##name##_parted(const __grid_constant__ PartedParams p) { \
        Staying<E, 4, 8, 2, 1, 3, true>::run(p.product, p.parted);                                                     \
    }
PARTED(q4_k, FoldedQ4_K)
PARTED(q6_k, HalvedQ6_K)

} // namespace hoist
