#!/usr/bin/env python3
"""Continues 20 prompts greedily with Hoist and with llama.cpp, and reports where the texts part and how near a tie it was.

    python3 scripts/compare/greedy_text.py HOIST MODEL.gguf... [--out OUT.json] [--markdown OUT.md]

Both get the prompt's text, tokenise it themselves, and write N tokens, whatever they are. Where they first differ, both
are asked for the logits after the same tokens (prompt and common continuation), fed as one batch: a rounding difference
shows as a gap between the two candidates, in either program, no larger than the programs' difference of logits there.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from llama_cpp import Model
from machine import describe

N = 64
THREADS = 2
PROMPTS = [
    "In the beginning",
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "Water boils at a temperature of",
    "def fibonacci(n):\n",
    "The three primary colours are",
    "To make a good cup of tea, first",
    "The history of the Roman Empire begins",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: What is the largest planet of the solar system?\nA:",
    "Le chat est assis sur",
    "1, 2, 3, 4, 5,",
    "Photosynthesis is the process by which",
    "It was a dark and stormy night;",
    "The quick brown fox",
    "SELECT name, age FROM",
    "My favourite season is autumn because",
    "Die Hauptstadt von Deutschland ist",
    "A computer's memory is made of",
    "“To be, or not to be,” he said — naïvely —",
]


def hoist(program: str, *arguments: str) -> dict:
    done = subprocess.run([program, *arguments, "--threads", str(THREADS), "--json"], check=True, capture_output=True)
    return json.loads(done.stdout)


def greedy(model: Model, tokens: list[int]) -> list[int]:
    model.reset()
    out, pending = [], tokens
    while len(out) < N:
        model.decode(pending)
        out.append(int(np.argmax(model.logits())))
        pending = out[-1:]
    return out


def parting(program: str, file: str, model: Model, tokens: list[int], ours: int, theirs: int, scratch: Path) -> dict:
    """Logits of both programs after `tokens`, whose next token they disagree about."""
    dump = scratch / "logits.f32"
    hoist(program, "logits", file, "--tokens", ",".join(map(str, tokens)), "--dump", str(dump))
    h = np.fromfile(dump, dtype="<f4").reshape(len(tokens), -1)[-1].astype(np.float64)
    dump.unlink()
    model.reset()
    model.decode(tokens)
    c = model.logits().astype(np.float64)
    both = set(np.argsort(-h)[:2].tolist()) == {ours, theirs}
    top = np.argsort(-h)[:10]
    differences = np.abs((h - h[top].mean()) - (c - c[top].mean()))[top]
    return {
        "hoist_token": ours,
        "llama_cpp_token": theirs,
        "candidates_are_hoists_two_best": both,
        "hoist_margin": float(h[ours] - h[theirs]),
        "llama_cpp_margin": float(c[theirs] - c[ours]),
        "gap_between_programs": float(abs((h[ours] - h[theirs]) - (c[ours] - c[theirs]))),
        "top10_mean_difference": float(differences.mean()),
        "top10_standard_deviation_of_hoist": float(h[top].std()),
    }


def compare(program: str, file: str, scratch: Path) -> dict:
    model = Model(file, THREADS)
    rows = []
    for prompt in PROMPTS:
        tokens = model.tokenize(prompt)
        hoist_tokens = hoist(program, "logits", file, "-p", prompt)["tokens"]
        answer = hoist(program, "generate", file, "-p", prompt, "-n", str(N), "--ignore-end")
        ours, theirs = answer["tokens"], greedy(model, tokens)
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
        row = {"prompt": prompt, "prompt_tokens": tokens, "same_prompt_tokens": tokens == hoist_tokens, "parts_at": at}
        if at is not None:
            row |= parting(program, file, model, tokens + ours[:at], ours[at], theirs[at], scratch)
        row |= {"hoist_text": answer["text"], "llama_cpp_text": model.text(theirs)}
        rows.append(row)
        margin = "" if at is None else f", margin {row['hoist_margin']:.4f} / {row['llama_cpp_margin']:.4f}"
        print(f"{Path(file).name}: {prompt!r} parts at {at}{margin}", flush=True)
    model.close()
    parted = [row for row in rows if row["parts_at"] is not None]
    return {
        "model": Path(file).name,
        "prompts": len(rows),
        "same_prompt_tokens": sum(row["same_prompt_tokens"] for row in rows),
        "same_to_the_end": len(rows) - len(parted),
        "median_parting": float(np.median([row["parts_at"] for row in parted])) if parted else None,
        "largest_hoist_margin": max((row["hoist_margin"] for row in parted), default=None),
        "largest_gap_between_programs": max((row["gap_between_programs"] for row in parted), default=None),
        "rows": rows,
    }


def markdown(models: list[dict]) -> str:
    lines = []
    for model in models:
        lines += [
            f"### {model['model']}",
            "",
            f"{model['same_prompt_tokens']} of {model['prompts']} prompts have the same tokens; {model['same_to_the_end']} "
            f"texts are the same for {N} tokens; the others part at token {model['median_parting']} (median).",
            "",
            "| prompt | parts at | margin, Hoist | margin, llama.cpp | mean difference of the ten best logits |",
            "|---|---|---|---|---|",
        ]
        for row in model["rows"]:
            prompt = json.dumps(row["prompt"], ensure_ascii=False)[1:-1].replace("|", "\\|")
            if row["parts_at"] is None:
                lines.append(f"| {prompt} | – | | | |")
            else:
                lines.append(
                    f"| {prompt} | {row['parts_at']} | {row['hoist_margin']:.3f} | {row['llama_cpp_margin']:.3f} "
                    f"| {row['top10_mean_difference']:.3f} |"
                )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("hoist")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--out")
    parser.add_argument("--markdown")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        models = [compare(arguments.hoist, file, Path(scratch)) for file in arguments.models]
    result = {"schema": "hoist.compare.greedy/1", **describe(), "tokens": N, "models": models}
    text = json.dumps(result, indent=1, ensure_ascii=False)
    if arguments.out:
        Path(arguments.out).write_text(text + "\n")
    if arguments.markdown:
        Path(arguments.markdown).write_text(markdown(models))
    print(markdown(models))


if __name__ == "__main__":
    main()
