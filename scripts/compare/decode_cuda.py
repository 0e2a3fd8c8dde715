#!/usr/bin/env python3
"""Decoding on a CUDA device: bits beside the CPU reference's, then tokens a second, on random-weight models of real shapes.

usage: decode_cuda.py HOIST OUT [--folder /tmp/models] [--shapes llama-3.2-1b,…] [--encodings q4_k_m] [--runs 5]
                      [--positions 64] [--repeats 1000] [--skip-bits] [--skip-speed] [--batches 1,8,64]
                      [--prompts 512] [--limit 120]

For each model: `hoist compare` with the CPU over batches of 1, 2, 7, 8 and 64 sequences and chunks of 1, 5 and 512 tokens; one
token at a time operation by operation and in one launch, the latter as often as --repeats says for the first model. Then
`hoist bench decode` with a profile for prompts of so many tokens and 128 decoded ones, one sequence and several, both ways.
Every command has a time limit; what fails is told and the rest goes on. OUT takes the JSON report, rewritten after every
command.
"""

import argparse
import itertools
import json
import os
import pathlib
import subprocess
import time


def run(command, limit, environment=None):
    """Exit status, seconds, stdout and the end of stderr."""
    started = time.time()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env={**os.environ, **(environment or {})}
        )
        status, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired:
        status, out, err = "timeout", "", ""
    return status, time.time() - started, out, err[-400:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hoist")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/tmp/models"))
    parser.add_argument("--shapes", default="llama-3.2-1b,qwen2.5-1.5b,llama-3.1-8b,qwen2.5-7b")
    parser.add_argument("--encodings", default="q4_k_m")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--positions", type=int, default=64)
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--prompts", default="512")
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--skip-bits", action="store_true")
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument("--limit", type=float, default=120)
    a = parser.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    report = {"schema": "hoist.compare.decode-cuda/2", "bits": [], "speed": []}

    def keep(part, row):
        report[part].append(row)
        a.out.write_text(json.dumps(report, indent=1))
        print(json.dumps({k: v for k, v in row.items() if k not in ("profile", "model", "backend")}), flush=True)

    ways = {"operations": "0", "one launch": "1"}
    for shape in a.shapes.split(","):
        for encoding in a.encodings.split(","):
            model = a.folder / f"{shape}-{encoding}.gguf"
            if not model.exists():
                run([a.hoist, "synth", shape, str(model), "--encoding", encoding], 600)
            if not a.skip_bits:
                asked = [("one launch", "1", ["--batches", "1,2,7,8,64", "--chunks", "1,5,512"]),
                         ("operations", "0", ["--batches", "1", "--chunks", "1"])]
                if a.repeats > 1 and not report["bits"]:
                    asked.append(("one launch", "1", ["--batches", "1", "--chunks", "1", "--runs", str(a.repeats)]))
                for way, value, more in asked:
                    command = [
                        a.hoist, "compare", str(model), "--backend", "cuda", "--positions", str(a.positions), "--json", *more,
                    ]
                    status, seconds, out, err = run(command, a.limit, {"HOIST_CUDA_ONE_LAUNCH": value})
                    row = {"model": model.name, "way": way, "asked": more, "status": status, "seconds": seconds, "error": err}
                    if out:
                        answer = json.loads(out)
                        row |= {k: answer[k] for k in ("equal", "digest", "cases")}
                    keep("bits", row)
            if a.skip_speed:
                continue
            for prompt, batch, (way, value) in itertools.product(a.prompts.split(","), a.batches.split(","), ways.items()):
                if batch != "1" and value == "1":
                    continue
                command = [
                    a.hoist, "bench", "decode", str(model), "--backend", "cuda", "-p", prompt, "-n", "128",
                    "--runs", str(a.runs), "--batch", batch, "--profile", "--json",
                ]
                status, seconds, out, err = run(command, a.limit, {"HOIST_CUDA_ONE_LAUNCH": value})
                row = {"model": model.name, "way": way, "batch": int(batch), "prompt_tokens": int(prompt), "status": status, "seconds": seconds}
                if status == 0:
                    answer = json.loads(out)
                    row |= {k: answer[k] for k in ("prompt", "decode", "read_gb_s", "bandwidth_gb_s", "bandwidth_share", "profile")}
                    row["backend"] = answer["backend"]
                else:
                    row["error"] = err
                keep("speed", row)
                if status == 0:
                    for phase in row["profile"] or []:
                        print("   ", phase["phase"], phase["count"], phase["micros"], phase["gb_s"], flush=True)


if __name__ == "__main__":
    main()
