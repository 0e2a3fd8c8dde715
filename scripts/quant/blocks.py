"""Random blocks with the scales that break decoders: subnormal, −0, smallest, largest. None is NaN or infinite."""

import numpy as np
from reference import block

# Where f16 scales are within a block.
F16_SCALES = {
    "f16": [0], "q4_0": [0], "q4_1": [0, 2], "q5_0": [0], "q5_1": [0, 2], "q8_0": [0], "q8_1": [0, 2],
    "q2_k": [80, 82], "q3_k": [108], "q4_k": [0, 2], "q5_k": [0, 2], "q6_k": [208], "iq2_xxs": [0], "iq2_xs": [0],
    "iq3_xxs": [0], "iq1_s": [0], "iq4_nl": [0], "iq3_s": [0], "iq2_s": [0], "iq4_xs": [0], "tq1_0": [52],
    "tq2_0": [64], "q1_0": [0], "q2_0": [0], "apr_q4": [0],
}  # fmt: skip

F16_SPECIAL = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x83FF, 0x0400, 0x8400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF]
F32_SPECIAL = [0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x3F800000, 0xBF800000,
               0x7F7FFFFF, 0xFF7FFFFF]  # fmt: skip


def _mixed(rng: np.random.Generator, n: int, bits: int, special: list[int], exponent: int) -> np.ndarray:
    """`n` random finite patterns; each third one or so is special."""
    values = rng.integers(0, 1 << bits, n, dtype=np.uint64)
    values = np.where(values & exponent == exponent, values & ~np.uint64(exponent), values)
    return np.where(rng.random(n) < 0.3, rng.choice(np.array(special, dtype=np.uint64), n), values)


def random_blocks(name: str, n: int, seed: int) -> bytes:
    """`n` blocks of that encoding."""
    rng = np.random.default_rng([seed, *name.encode()])
    _, size = block(name)
    blocks = rng.integers(0, 256, (n, size), dtype=np.uint8)
    for at in F16_SCALES.get(name, []):
        blocks[:, at : at + 2] = _mixed(rng, n, 16, F16_SPECIAL, 0x7C00).astype("<u2").view(np.uint8).reshape(n, 2)
    if name == "bf16":
        blocks[:] = _mixed(rng, n, 16, [x >> 16 for x in F32_SPECIAL], 0x7F80).astype("<u2").view(np.uint8).reshape(n, 2)
    if name in ("f32", "q8_k", "apr_q8"):
        blocks[:, :4] = _mixed(rng, n, 32, F32_SPECIAL, 0x7F800000).astype("<u4").view(np.uint8).reshape(n, 4)
    if name == "iq1_m":
        # One f16 in the top nibbles of four u16, lowest first.
        d = _mixed(rng, n, 16, F16_SPECIAL, 0x7C00).astype(np.uint16)
        for i in range(4):
            blocks[:, 49 + 2 * i] = blocks[:, 49 + 2 * i] & 0x0F | ((d >> (4 * i) & 15) << 4).astype(np.uint8)
    if name == "mxfp4":
        # Every exponent but 255; many at the ends.
        ends = np.array([0, 1, 2, 3, 127, 128, 252, 253, 254], dtype=np.uint8)
        blocks[:, 0] = np.where(rng.random(n) < 0.3, rng.choice(ends, n), rng.integers(0, 255, n, dtype=np.uint8))
    if name == "nvfp4":
        # Every code, those with bit 7 set too; 0x7F is a zero and 0xFF is none.
        special = np.array([0, 1, 7, 8, 0x7E, 0x7F, 0x80, 0xFF], dtype=np.uint8)
        blocks[:, :4] = np.where(rng.random((n, 4)) < 0.3, rng.choice(special, (n, 4)), blocks[:, :4])
    return blocks.tobytes()
