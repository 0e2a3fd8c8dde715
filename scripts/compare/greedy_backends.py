#!/usr/bin/env python3
"""Continues five prompts greedily on two backends, and demands the same tokens of both.

    python3 scripts/compare/greedy_backends.py HOIST MODEL BACKEND BACKEND [-n 64] [--context 256] [--out OUT.json]
        [--encoding q4_1]

MODEL is a file, or the name of a shape (`hoist synth --list`), of which a file with random weights is then written to a
temporary folder. A backend is named as on the command line: cpu, cuda:0, wgpu:0, plugin:PATH. Needs the standard library
only. The exit status is 0 if all tokens are equal, 1 if some differ, 2 if a run failed.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import here

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "The three laws of motion say that",
]


def hoist(program: str, *arguments: str) -> dict:
    done = subprocess.run([program, *arguments, "--json"], capture_output=True, text=True)
    if done.returncode != 0:
        print(f"{' '.join(arguments)}: exit code {done.returncode}: {done.stderr.strip()}", file=sys.stderr)
        sys.exit(2)
    return json.loads(done.stdout)


def sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compare(a: argparse.Namespace, model: str) -> dict:
    rows, devices = [], {}
    for prompt in PROMPTS:
        tokens, seconds, text = {}, {}, {}
        for backend in a.backends:
            started = time.monotonic()
            answer = hoist(
                a.hoist, "generate", model, "-p", prompt, "-n", str(a.n), "--ignore-end",
                "--context", str(a.context), "--backend", backend,
            )  # fmt: skip
            seconds[backend] = round(time.monotonic() - started, 2)
            tokens[backend], text[backend] = answer["tokens"], answer["text"]
            devices[backend] = answer["backend"]
        first, second = (tokens[backend] for backend in a.backends)
        parts_at = next((i for i, (x, y) in enumerate(zip(first, second)) if x != y), None)
        equal = first == second and len(first) == a.n
        row = {"prompt": prompt, "equal": equal, "parts_at": parts_at, "seconds": seconds}
        row |= {"tokens": first, "text": text[a.backends[0]]} if equal else {"tokens": tokens, "text": text}
        rows.append(row)
        print(f"{prompt!r}: {'equal' if equal else f'differs from token {parts_at} on'} {seconds}", flush=True)
    return {
        "schema": "hoist.compare.greedy-backends/1",
        **here(),
        "model": {"file": Path(model).name, "sha256": sha256(model)} if Path(model).is_file() else {"file": model},
        "backends": [devices[backend] for backend in a.backends],
        "tokens": a.n,
        "equal": all(row["equal"] for row in rows),
        "prompts": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hoist")
    parser.add_argument("model")
    parser.add_argument("backends", nargs=2)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--encoding", default="q4_k_m", help="of a shape's matrices")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    if len(set(a.backends)) != 2:
        parser.error("two different backends are compared")
    with tempfile.TemporaryDirectory() as folder:
        model = a.model
        if not Path(model).exists():
            model = str(Path(folder) / f"{a.model}-{a.encoding}.gguf")
            hoist(a.hoist, "synth", a.model, model, "--encoding", a.encoding)
        result = compare(a, model)
    if a.out:
        a.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    sys.exit(0 if result["equal"] else 1)


if __name__ == "__main__":
    main()
