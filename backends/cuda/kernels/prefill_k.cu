// Products of matrices of K encodings with many tokens.

#include "prefill_k.cuh"

namespace hoist {

#define STAYING(name, E, tiling, NT, ROWS, COLS, DEPTH, STAGES)                                                        \
    extern "C" __global__ void __launch_bounds__(32 * ROWS * COLS * DEPTH, 1)                                          \
        prefill_##name##_##tiling(const __grid_constant__ PrefillParams p) {                                           \
        Staying<E, NT, ROWS, COLS, DEPTH, STAGES>::run(p);                                                             \
    }
/// As many rows and tokens a block as EACH_TILING has; and few tokens with twice the rows.
#define EACH_STAYING_TILING(name, E)                                                                                   \
    STAYING(name, E, 1_1, 1, 1, 1, 8, 3)                                                                               \
    STAYING(name, E, 1_2, 1, 2, 1, 8, 2)                                                                               \
    STAYING(name, E, 4_2, 4, 2, 1, 4, 2)                                                                               \
    STAYING(name, E, 8_4, 4, 4, 2, 2, 2)                                                                               \
    STAYING(name, E, 8_8, 4, 8, 2, 1, 3)
EACH_STAYING_TILING(q4_k, FoldedQ4_K)
EACH_STAYING_TILING(q6_k, HalvedQ6_K)

EACH_TILING(q5_k, TiledQ5_K)

} // namespace hoist
