#!/usr/bin/env python3
"""Writes the grids of GGML's IQ encodings for the oracle: conformance/src/oracle/encoding/grids.bin.

The grids are facts of the file format. The Python package `gguf` (0.19.0) stores each as packed indices into a short
list of levels, two bits each (four for IQ3); these 16-bit entries are written one grid after the other.

    python3 scripts/oracle/grids.py conformance/src/oracle/encoding/grids.bin
"""

import sys

import gguf.quants as quants

GRIDS = [quants.IQ2_XXS, quants.IQ2_XS, quants.IQ2_S, quants.IQ3_XXS, quants.IQ3_S, quants.IQ1_S]


def main() -> None:
    with open(sys.argv[1], "wb") as out:
        for grid in GRIDS:
            entries = bytes.fromhex(grid.grid_hex.decode("ascii"))
            assert len(entries) == 2 * grid.grid_shape[0]
            out.write(entries)


if __name__ == "__main__":
    main()
