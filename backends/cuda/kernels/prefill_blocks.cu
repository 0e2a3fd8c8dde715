// Products of matrices of encodings with a scale for each 32 weights with many tokens.

#include "prefill.cuh"

namespace hoist {

EACH_TILING(q4_0, TiledQ4_0)
EACH_TILING(q4_1, TiledQ4_1)
EACH_TILING(q5_0, TiledQ5_0)
EACH_TILING(q5_1, TiledQ5_1)
EACH_TILING(q8_0, TiledQ8_0)

} // namespace hoist
