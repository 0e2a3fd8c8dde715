#!/usr/bin/env python3
"""Writes core/quant/tests/data/vectors.bin: blocks of every encoding and what they decode to.

    python3 scripts/quant/make_vectors.py

Needs numpy and `gguf` 0.19.0. The values come from `reference.py`: from `gguf` where it decodes an encoding, otherwise
from code there that is independent of Hoist's.

The file, little-endian: for each encoding a u8 length and that many bytes of name, u32 bytes of blocks, u32 number of
values; the blocks; the values as f32.
"""

import struct
from pathlib import Path

from blocks import random_blocks
from reference import ENCODINGS, block, dequantize

OUT = Path(__file__).resolve().parents[2] / "core/quant/tests/data/vectors.bin"
VALUES = 1536
SEED = 1


def main() -> None:
    with OUT.open("wb") as out:
        for name in ENCODINGS:
            weights, _ = block(name)
            # Of AprQ8 one matrix, since its scale stands in front of all of it.
            n = 1 if name == "apr_q8" else min(VALUES // weights, 384)
            data = random_blocks(name, n, SEED)
            values = dequantize(name, data)
            out.write(struct.pack("<B", len(name)) + name.encode())
            out.write(struct.pack("<II", len(data), values.size))
            out.write(data)
            out.write(values.astype("<f4").tobytes())
    print(f"{OUT}: {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
