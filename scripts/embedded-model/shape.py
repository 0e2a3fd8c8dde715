"""The embedded model's shape, and which text it is not trained on."""

# 256 bytes, then the token between chapters.
BOUNDARY = 256
VOCAB = 257
HIDDEN = 256  # rows of 256 weights: K-quants need multiples of 256
LAYERS = 4
HEADS = 4
KV_HEADS = 2
HEAD = 64
FFN = 512
CONTEXT = 512
ROPE_BASE = 10_000.0
EPSILON = 1e-5
# Every so many chapters, one is kept for validation.
HELD_OUT = 40
