#!/usr/bin/env python3
"""Compiles backends/cuda/kernels/*.cu into backends/cuda/kernels/built, and scans the PTX against the numerics contract.

usage: kernels.py [--check] [NAME …]

Needs the compiler of CUDA 13.0, which `pip install -r scripts/requirements.txt` brings as wheels, and a C++ compiler on
the host for its preprocessor; no GPU and no driver. NVCC names another nvcc.

A file is compiled to PTX for compute_80, or for what a line `// ptx: compute_NN` in it asks for, and to machine code for
sm_90a. PTX of CUDA 13.0 is read by drivers from release 580 on. With --check nothing is written: the outputs must equal
what is committed.

The scan demands `.rn` on every f32 and f64 add, sub, mul, fma, div, sqrt and rcp, but for `fma.rm.f64`, which floors exact
products (`floored_bits` in primitives.cuh), and refuses everything approximate,
flushing to zero, transcendental, a float atomic, or a float multiplication on tensor cores. A fused multiply-add must be
asked for by name (`__fmaf_rn`): contraction is off.
"""

import argparse
import concurrent.futures
import ctypes
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
KERNELS = ROOT / "backends/cuda/kernels"
BUILT = KERNELS / "built"
RELEASE = "13.0"
# Exactness first: no contraction, IEEE division and square root, subnormals kept.
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false"]
MAX_BYTES = 2 << 20
# Compilations of a file before its output counts as another one.
TRIES = 3

ROUNDED = re.compile(r"^(add|sub|mul|mad|fma|div|sqrt|rcp)\.(?!.*(?:[su](?:8|16|32|64)|b(?:16|32|64)|wide|lo|hi)\b)")
FLOOR = "fma.rm.f64"
FORBIDDEN = [
    (re.compile(r"\.approx|\.full\b"), "approximate"),
    (re.compile(r"\.ftz|\.sat\.f"), "flushes to zero or saturates"),
    (re.compile(r"^(ex2|lg2|sin|cos|tanh|rsqrt)\."), "transcendental"),
    (re.compile(r"^(atom|red)\..*\.(f16|f16x2|bf16|bf16x2|f32|f64)\b"), "a float atomic"),
    (re.compile(r"^(mma|wgmma|wmma)\..*\.(f16|bf16|tf32|f32|f64|e4m3|e5m2)\b"), "a float multiplication on tensor cores"),
]


def find_nvcc():
    named = os.environ.get("NVCC")
    wheel = pathlib.Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin/nvcc"
    nvcc = named or (str(wheel) if wheel.exists() else shutil.which("nvcc"))
    if nvcc is None:
        sys.exit("kernels.py: no nvcc; run it with a python that has scripts/requirements.txt, or set NVCC")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    if f"release {RELEASE}" not in version:
        sys.exit(f"kernels.py: `{nvcc}` is not of CUDA {RELEASE}; what is committed was compiled with that")
    return nvcc


def scan(name, ptx):
    """Lines of PTX that break the numerics contract."""
    broken = []
    for number, line in enumerate(ptx.splitlines(), 1):
        code = line.split("//")[0].strip()
        code = re.sub(r"^@!?%p\d+\s+", "", code)
        instruction = code.split()[0].rstrip(";") if code else ""
        reasons = [why for pattern, why in FORBIDDEN if pattern.search(instruction)]
        is_float = re.search(r"\.(f16|f16x2|bf16|bf16x2|f32|f64)$", instruction)
        if is_float and ROUNDED.match(instruction) and ".rn." not in instruction and instruction != FLOOR:
            reasons.append("not rounded to nearest even")
        broken += [f"{name}.ptx:{number}: {why}: {code}" for why in reasons]
    return broken


ADDR_NO_RANDOMIZE = 0x0040000


def fixed_addresses():
    """Lets a child see the same addresses each time, where the system allows it: the compiler's choices depend on them."""
    ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE)


def compile_one(nvcc, source, folder):
    text = source.read_text()
    asked = re.search(r"^// ptx: (compute_\d+a?)$", text, re.M)
    arch = asked.group(1) if asked else "compute_80"
    outputs = [folder / f"{source.stem}.ptx", folder / f"{source.stem}.cubin"]
    targets = [["-ptx", f"-arch={arch}"], ["-cubin", "-gencode=arch=compute_90a,code=sm_90a"]]
    for target, output in zip(targets, outputs):
        # Run in the folder, so that no path of this machine gets into an output.
        command = [nvcc, *FLAGS, *target, "-o", str(output), source.name]
        done = subprocess.run(command, cwd=source.parent, capture_output=True, text=True, preexec_fn=fixed_addresses)
        if done.returncode != 0:
            sys.exit(f"kernels.py: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return outputs


def is_committed(fresh):
    committed = BUILT / fresh.name
    return committed.exists() and committed.read_bytes() == fresh.read_bytes()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare with what is committed")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only kernels/NAME.cu [default: all]")
    arguments = parser.parse_args()
    check = arguments.check
    nvcc = find_nvcc()
    sources = [s for s in sorted(KERNELS.glob("*.cu")) if not arguments.names or s.stem in arguments.names]
    failures = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            built = [f for outputs in pool.map(lambda s: compile_one(nvcc, s, folder), sources) for f in outputs]
        if check:
            # Where addresses could not be fixed, one of a few tries comes out as what is committed.
            for source in sources:
                outputs = [folder / f"{source.stem}{suffix}" for suffix in (".ptx", ".cubin")]
                for _ in range(TRIES):
                    if not all(map(is_committed, outputs)):
                        compile_one(nvcc, source, folder)
        for fresh in built:
            committed = BUILT / fresh.name
            if fresh.suffix == ".ptx":
                failures += scan(fresh.stem, fresh.read_text())
            if b"_INTERNAL_" in fresh.read_bytes():
                failures.append(f"{fresh.name} names a symbol by the folder it was compiled in: make its device data and functions inline")
            if fresh.stat().st_size > MAX_BYTES:
                failures.append(f"{fresh.name} has more than {MAX_BYTES} bytes")
            if check:
                if not is_committed(fresh):
                    failures.append(f"{committed.relative_to(ROOT)} is not what scripts/kernels.py makes of its source")
            else:
                BUILT.mkdir(exist_ok=True)
                shutil.copyfile(fresh, committed)
        left = set() if arguments.names else {f.name for f in BUILT.iterdir()} - {f.name for f in built}
        failures += [f"backends/cuda/kernels/built/{name} has no source" for name in sorted(left)]
    if failures:
        sys.exit("\n".join(failures))
    print(f"{len(sources)} kernel files: {'up to date' if check else 'built'}, and exact")


if __name__ == "__main__":
    main()
