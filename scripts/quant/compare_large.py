#!/usr/bin/env python3
"""Makes many random blocks of one encoding and decodes them, for the test `against_gguf` of the crate `hoist-quant`.

    compare_large.py --versions
    compare_large.py ENCODING BLOCKS SEED

Writes to stdout, little-endian: u64 bytes of blocks, the blocks, u64 number of values, the values as f32.
"""

import struct
import sys
from importlib.metadata import version

from blocks import random_blocks
from reference import dequantize


def main() -> None:
    if sys.argv[1:] == ["--versions"]:
        print(f"gguf {version('gguf')}, numpy {version('numpy')}")
        return
    name, n, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    data = random_blocks(name, n, seed)
    values = dequantize(name, data)
    out = sys.stdout.buffer
    out.write(struct.pack("<Q", len(data)))
    out.write(data)
    out.write(struct.pack("<Q", values.size))
    out.write(values.astype("<f4").tobytes())


if __name__ == "__main__":
    main()
