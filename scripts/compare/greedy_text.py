#!/usr/bin/env python3
"""Continues 20 prompts greedily with Hoist and with llama.cpp, and reports where the texts part and how near a tie it was.

    python3 scripts/compare/greedy_text.py HOIST MODEL.gguf... [--out OUT.json] [--markdown OUT.md] [--scratch FOLDER]

Both get the prompt's text, tokenise it themselves, and write N tokens, whatever they are. Where they first differ, both
are asked for the logits after the same tokens (prompt and common continuation), and so is f32 arithmetic on the same
weights (see quality.py). With `lead` for the logit of Hoist's token minus that of llama.cpp's, rounding explains a
parting if f32's lead is about as small as the two programs' errors of the lead.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from dequantize_gguf import dequantize
from llama_cpp import Model
from machine import describe

N = 64
THREADS = 1  # the texts do not depend on it, and one thread waits for nobody on a busy machine
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


def last_logits(program: str, file: str, tokens: list[int], scratch: Path, *options: str) -> np.ndarray:
    dump = scratch / "logits.f32"
    hoist(program, "logits", file, "--tokens", ",".join(map(str, tokens)), "--dump", str(dump), "--chunk", "128", *options)
    logits = np.fromfile(dump, dtype="<f4").reshape(len(tokens), -1)[-1].astype(np.float64)
    dump.unlink()
    return logits


def parting(hoist_logits: np.ndarray, llama_logits: np.ndarray, f32: np.ndarray, ours: int, theirs: int) -> dict:
    """What the logits [vocabulary] say where the programs took different tokens."""
    lead = {n: float(x[ours] - x[theirs]) for n, x in [("hoist", hoist_logits), ("llama_cpp", llama_logits), ("f32", f32)]}
    top = np.argsort(-f32)[:10]

    def error(x: np.ndarray) -> float:
        return float((x[top] - f32[top]).std())  # a shift common to all logits changes nothing

    return {
        "hoist_token": ours,
        "llama_cpp_token": theirs,
        "hoist_top2_margin": float(np.diff(np.sort(hoist_logits)[-2:])[0]),
        "llama_cpp_top2_margin": float(np.diff(np.sort(llama_logits)[-2:])[0]),
        "lead": lead,
        "lead_error": {"hoist": abs(lead["hoist"] - lead["f32"]), "llama_cpp": abs(lead["llama_cpp"] - lead["f32"])},
        "f32_takes": {ours: "hoist", theirs: "llama_cpp"}.get(int(top[0]), "neither"),
        "top10_logit_error": {"hoist": error(hoist_logits), "llama_cpp": error(llama_logits)},
    }


def compare(program: str, file: str, f32_file: Path, scratch: Path) -> dict:
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
            common = tokens + ours[:at]
            model.reset()
            model.decode(common)
            row |= parting(
                last_logits(program, file, common, scratch),
                model.logits().astype(np.float64),
                last_logits(program, str(f32_file), common, scratch, "--kv", "f32"),
                ours[at],
                theirs[at],
            )
        row |= {"hoist_text": answer["text"], "llama_cpp_text": model.text(theirs)}
        rows.append(row)
        margin = "" if at is None else f", lead {row['lead']}"
        print(f"{Path(file).name}: {prompt!r} parts at {at}{margin}", flush=True)
    model.close()
    parted = [row for row in rows if row["parts_at"] is not None]
    return {
        "model": Path(file).name,
        "prompts": len(rows),
        "same_prompt_tokens": sum(row["same_prompt_tokens"] for row in rows),
        "same_to_the_end": len(rows) - len(parted),
        "median_parting": float(np.median([row["parts_at"] for row in parted])) if parted else None,
        "largest_hoist_top2_margin": max((row["hoist_top2_margin"] for row in parted), default=None),
        "largest_llama_cpp_top2_margin": max((row["llama_cpp_top2_margin"] for row in parted), default=None),
        "f32_takes": {who: sum(r["f32_takes"] == who for r in parted) for who in ("hoist", "llama_cpp", "neither")},
        "mean_lead_error": {
            who: float(np.mean([r["lead_error"][who] for r in parted])) if parted else None for who in ("hoist", "llama_cpp")
        },
        "rows": rows,
    }


def markdown(models: list[dict]) -> str:
    lines = []
    for model in models:
        lines += [
            f"### {model['model']}",
            "",
            f"{model['same_prompt_tokens']} of {model['prompts']} prompts have the same tokens; {model['same_to_the_end']} "
            f"texts are the same for {N} tokens; the others part at token {model['median_parting']} (median). There f32 "
            f"arithmetic takes Hoist's token {model['f32_takes']['hoist']} times, llama.cpp's "
            f"{model['f32_takes']['llama_cpp']} times.",
            "",
            "| prompt | parts at | lead of Hoist's token: Hoist | f32 | llama.cpp | top-2 margin of Hoist | f32 takes |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in model["rows"]:
            prompt = json.dumps(row["prompt"], ensure_ascii=False)[1:-1].replace("|", "\\|")
            if row["parts_at"] is None:
                lines.append(f"| {prompt} | – | | | | | |")
            else:
                lead = row["lead"]
                lines.append(
                    f"| {prompt} | {row['parts_at']} | {lead['hoist']:.3f} | {lead['f32']:.3f} | {lead['llama_cpp']:.3f} "
                    f"| {row['hoist_top2_margin']:.3f} | {row['f32_takes']} |"
                )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("hoist")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--out")
    parser.add_argument("--markdown")
    parser.add_argument("--scratch", default=tempfile.gettempdir(), help="for f32 copies of the models, which stay")
    arguments = parser.parse_args()
    models = []
    for file in arguments.models:
        f32_file = Path(arguments.scratch) / (Path(file).stem + ".f32.gguf")
        if not f32_file.exists():
            dequantize(file, str(f32_file))
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            models.append(compare(arguments.hoist, file, f32_file, Path(scratch)))
    result = {"schema": "hoist.compare.greedy/1", **describe(), "tokens": N, "models": models}
    text = json.dumps(result, indent=1, ensure_ascii=False)
    if arguments.out:
        Path(arguments.out).write_text(text + "\n")
    if arguments.markdown:
        Path(arguments.markdown).write_text(markdown(models))
    print(markdown(models))


if __name__ == "__main__":
    main()
