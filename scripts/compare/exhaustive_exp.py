#!/usr/bin/env python3
"""exp and tanh of the contract over all 2^32 inputs, against numpy in f64: largest error in ULP, and monotonicity.

    exhaustive_exp.py HOIST [PROCESSES]

Runs `hoist op` on chunks of 2^26 consecutive bit patterns and prints one JSON object.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile

import numpy as np

CHUNK = 26
LOW, HIGH = np.float32(-104.0), np.uint32(0x42B17217).view(np.float32)


def ulp(exact: np.ndarray) -> np.ndarray:
    """The distance of f32 numbers near each of these f64 values."""
    exponent = np.frexp(np.maximum(np.abs(exact), 2.0**-126))[1]
    return np.ldexp(1.0, exponent - 24)


def chunk(task: tuple[str, str, int]) -> tuple[str, float, float, float, bool]:
    hoist, name, number = task
    bits = np.arange(number << CHUNK, (number + 1) << CHUNK, dtype=np.uint64).astype(np.uint32)
    x = bits.view(np.float32)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        source, target = os.path.join(folder, "x"), os.path.join(folder, "y")
        x.tofile(source)
        subprocess.run([hoist, "op", name, "--input", source, "--output", target], check=True, capture_output=True)
        y = np.fromfile(target, dtype=np.float32)
    nan = np.isnan(x)
    assert np.isnan(y[nan]).all()
    if nan.all():
        return name, 0.0, np.nan, np.nan, True
    x, y = x[~nan], y[~nan]
    wide = np.clip(x, LOW, HIGH).astype(np.float64) if name == "exp" else x.astype(np.float64)
    exact = np.exp(wide) if name == "exp" else np.tanh(wide)
    error = float(np.max(np.abs(y.astype(np.float64) - exact) / ulp(exact)))
    # Bit patterns of negative numbers run downwards; exp and tanh rise, so along the chunk y falls there.
    steps = np.diff(y)
    rises = bool((steps >= 0).all() if number < 32 else (steps <= 0).all())
    return name, error, float(y[0]), float(y[-1]), rises


def main() -> None:
    hoist = sys.argv[1]
    processes = int(sys.argv[2]) if len(sys.argv) > 2 else os.cpu_count()
    tasks = [(hoist, name, number) for name in ("exp", "tanh") for number in range(1 << (32 - CHUNK))]
    result = {"schema": "hoist.compare.elementary/1", "inputs": 1 << 32}
    with multiprocessing.Pool(processes) as pool:
        done = pool.map(chunk, tasks, chunksize=1)
    np.seterr(all="ignore")
    for name in ("exp", "tanh"):
        mine = [d for d in done if d[0] == name]
        monotonic = all(d[4] for d in mine)
        for half in (mine[:32], mine[32:]):
            ends = [(a[3], b[2]) for a, b in zip(half, half[1:]) if not np.isnan(b[2])]
            rising = half is not mine[32:] and half == mine[:32]
            monotonic &= all((a <= b) if rising else (a >= b) for a, b in ends)
        result[name] = {"max_ulp": round(max(d[1] for d in mine), 4), "monotonic": monotonic}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
