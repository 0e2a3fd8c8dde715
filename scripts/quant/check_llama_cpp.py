#!/usr/bin/env python3
"""Compares `reference.py`, bit for bit, with llama.cpp's own decoders.

    python3 scripts/quant/check_llama_cpp.py [LIBRARY]

LIBRARY is a shared library that exports `dequantize_row_*` (libggml-base); by default the one in the Python package
`xllamacpp`. Covers the GGML encodings that the package `gguf` lacks, Q1_0, Q2_0 and Q8_K, and all others besides.
"""

import ctypes
import importlib.util
import sys
from pathlib import Path

import numpy as np
from blocks import random_blocks
from reference import ENCODINGS, block, dequantize

BLOCKS = 4096


def default_library() -> str:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        sys.exit("xllamacpp is not installed; give a library")
    return str(next(Path(spec.origin).parent.glob("xllamacpp*.so")))


def symbol(name: str) -> str:
    """`q4_k` is `dequantize_row_q4_K`."""
    return "dequantize_row_" + (name[:-1] + "K" if name.endswith("_k") else name)


def main() -> None:
    library = ctypes.CDLL(sys.argv[1] if len(sys.argv) > 1 else default_library())
    wrong = 0
    for name in ENCODINGS:
        decode = getattr(library, symbol(name), None)
        if decode is None:
            print(f"{name}: not exported")
            continue
        weights, _ = block(name)
        data = random_blocks(name, BLOCKS, 7)
        values = np.empty(BLOCKS * weights, dtype=np.float32)
        decode.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64]
        decode.restype = None
        decode(data, values.ctypes.data, values.size)
        differ = int(np.count_nonzero(values.view(np.uint32) != dequantize(name, data).view(np.uint32)))
        print(f"{name}: {values.size} values, {differ} differ")
        wrong += differ
    sys.exit(wrong != 0)


if __name__ == "__main__":
    main()
