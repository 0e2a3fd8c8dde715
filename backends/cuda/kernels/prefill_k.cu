// Products of matrices of K encodings with many tokens.

#include "prefill_folded.cuh"

namespace hoist {

#define FOLDED(name, NT, ROWS, COLS, DEPTH, STAGES)                                                                    \
    extern "C" __global__ void __launch_bounds__(32 * ROWS * COLS * DEPTH, 1)                                          \
        prefill_q4_k_##name(const __grid_constant__ PrefillParams p) {                                                 \
        Folded<NT, ROWS, COLS, DEPTH, STAGES>::run(p);                                                                 \
    }
/// As many rows and tokens a block as EACH_TILING has.
FOLDED(1_1, 1, 1, 1, 8, 3)
FOLDED(4_2, 4, 2, 1, 4, 2)
FOLDED(8_4, 4, 4, 2, 2, 2)
FOLDED(8_8, 4, 8, 2, 1, 3)

EACH_TILING(q5_k, TiledQ5_K)
EACH_TILING(q6_k, TiledQ6_K)

} // namespace hoist
