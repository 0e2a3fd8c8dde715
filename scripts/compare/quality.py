#!/usr/bin/env python3
"""Measures what decoding on quantised weights costs: Hoist's and llama.cpp's distance from f32 arithmetic on the same weights.

    python3 scripts/compare/quality.py HOIST MODEL.gguf TEXT... [--out OUT.json] [--scratch FOLDER]

The reference is a copy of the file with every weight decoded to f32, evaluated by Hoist's f32 path with an f32 cache
(which the architecture tests compare with transformers). Windows of `CONTEXT + SCORED` tokens, spread evenly over the
texts; the first CONTEXT positions of a window are not scored. For every scored position: the Kullback-Leibler divergence
of the candidate's distribution over the whole vocabulary from the reference's, whether both name the same most likely
token, and the log-probability of the token that follows. Intervals: percentile bootstrap over blocks of BLOCK neighbouring
positions; ratios are of the same resamples.
"""

import argparse
import hashlib
import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from dequantize_gguf import dequantize
from llama_cpp import Model
from machine import describe, load_average

CONTEXT, SCORED, BLOCK, RESAMPLES = 16, 256, 16, 10_000
THREADS = 1  # changes no figure; one thread waits for nobody on a busy machine


def normalised(logits: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """Logits [vocabulary] less their largest, the logarithm of the sum of their exponentials, and these.

    The arrays stay f32, whose error of about 1e-7 a term is far below the divergences measured; the sum is f64.
    """
    shifted = logits - logits.max()
    exponentials = np.exp(shifted)
    total = exponentials.sum(dtype=np.float64)
    return shifted, float(np.log(total)), exponentials


def hoist_logits(hoist: str, file: str, tokens: list[int], vocabulary: int, scratch: Path, *options: str) -> np.ndarray:
    """[positions, vocabulary]"""
    dump = scratch / "logits.f32"
    command = [hoist, "logits", file, "--tokens", ",".join(map(str, tokens)), "--dump", str(dump), "--chunk", "128",
               "--threads", str(THREADS), "--json", *options]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    logits = np.fromfile(dump, dtype="<f4").reshape(len(tokens), vocabulary)
    dump.unlink()
    return logits


def llama_logits(model: Model, tokens: list[int]):
    """A function of the position, as all positions of one batch."""
    model.reset()
    model.decode(tokens, every=True)
    return model.logits


def interval(values: np.ndarray) -> list[float]:
    return [float(x) for x in np.percentile(values, [2.5, 97.5])]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("hoist")
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--windows", type=int, default=9)
    parser.add_argument("--out")
    parser.add_argument("--scratch", default=tempfile.gettempdir())
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=arguments.scratch))
    f32_file = Path(arguments.scratch) / (Path(arguments.model).stem + ".f32.gguf")
    if not f32_file.exists():
        dequantize(arguments.model, str(f32_file))

    llama = Model(arguments.model, THREADS)
    start = llama.tokenize("")  # the start token, where the file wants one
    length = CONTEXT + SCORED + 1 - len(start)
    windows, texts = [], []
    for path in arguments.texts:
        data = Path(path).read_bytes()
        texts.append({"name": Path(path).name, "blake2b": hashlib.blake2b(data, digest_size=16).hexdigest()})
        tokens = llama.tokenize(data.decode())[len(start) :]
        count = arguments.windows // len(arguments.texts) + (len(texts) <= arguments.windows % len(arguments.texts))
        for k in range(count):
            at = (len(tokens) - length) * k // count
            windows.append(start + tokens[at : at + length])

    names = ["hoist", "llama_cpp"]
    divergence = {name: [] for name in names}
    agrees = {name: [] for name in names}
    surprise = {name: [] for name in ["f32", *names]}
    load = [load_average()]
    for number, window in enumerate(windows):
        inputs = window[:-1]
        reference = hoist_logits(arguments.hoist, str(f32_file), inputs, llama.vocab_size, scratch, "--kv", "f32")
        ours = hoist_logits(arguments.hoist, arguments.model, inputs, llama.vocab_size, scratch)
        theirs = llama_logits(llama, inputs)
        for position in range(CONTEXT, CONTEXT + SCORED):
            target = window[position + 1]
            want, want_sum, exponentials = normalised(reference[position])
            surprise["f32"].append(want_sum - float(want[target]))
            for name, logits in [("hoist", ours[position]), ("llama_cpp", theirs(position))]:
                have, have_sum, _ = normalised(logits)
                mean = float(np.dot(exponentials, want - have)) / float(np.exp(want_sum))
                divergence[name].append(mean - want_sum + have_sum)
                agrees[name].append(int(np.argmax(logits) == np.argmax(reference[position])))
                surprise[name].append(have_sum - float(have[target]))
        so_far = {name: round(float(np.mean(divergence[name])), 6) for name in names}
        print(f"window {number + 1} of {len(windows)}: mean KL so far {so_far}", flush=True)
    load.append(load_average())
    os.rmdir(scratch)

    positions = len(surprise["f32"])
    blocks = np.arange(positions).reshape(-1, BLOCK)
    random = np.random.default_rng(0)
    drawn = random.integers(0, len(blocks), size=(RESAMPLES, len(blocks)))
    resampled = {}
    result = {"schema": "hoist.compare.quality/1", **describe(), "model": Path(arguments.model).name, "texts": texts,
              "windows": len(windows), "positions": positions, "unscored_positions_per_window": CONTEXT,
              "bootstrap": {"resamples": RESAMPLES, "block": BLOCK}, "load_average": load}  # fmt: skip
    for name in names:
        kl = np.array(divergence[name])
        resampled[name] = kl[blocks].mean(axis=1)[drawn].mean(axis=1)
        same = np.array(agrees[name])
        result[name] = {
            "kl_mean": float(kl.mean()),
            "kl_mean_95": interval(resampled[name]),
            "kl_median": float(np.median(kl)),
            "kl_99th": float(np.percentile(kl, 99)),
            "kl_max": float(kl.max()),
            "top1_agreement": float(same.mean()),
            "top1_agreement_95": interval(same[blocks].mean(axis=1)[drawn].mean(axis=1)),
        }
    result["kl_ratio"] = result["hoist"]["kl_mean"] / result["llama_cpp"]["kl_mean"]
    result["kl_ratio_95"] = interval(resampled["hoist"] / resampled["llama_cpp"])
    difference = np.array(agrees["hoist"]) - np.array(agrees["llama_cpp"])
    result["top1_difference_95"] = interval(difference[blocks].mean(axis=1)[drawn].mean(axis=1))
    result["perplexity"] = {name: float(np.exp(np.mean(values))) for name, values in surprise.items()}
    text = json.dumps(result, indent=2)
    if arguments.out:
        Path(arguments.out).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
