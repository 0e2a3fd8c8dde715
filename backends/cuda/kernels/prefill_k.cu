// Products of matrices of K encodings with many tokens.

#include "prefill.cuh"

namespace hoist {

EACH_TILING(q4_k, TiledQ4_K)
EACH_TILING(q5_k, TiledQ5_K)
EACH_TILING(q6_k, TiledQ6_K)

} // namespace hoist
