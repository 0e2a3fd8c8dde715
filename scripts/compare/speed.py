#!/usr/bin/env python3
"""Tokens a second of Hoist and of llama.cpp, interleaved in one run.

    python3 scripts/compare/speed.py HOIST MODEL.gguf[:PROMPT:DECODE]... [--samples 5] [--cpu-samples 3] [--out OUT.json]

Four contestants take turns, in an order that rotates: Hoist (`bench decode`, a fresh process with one measured run),
Hoist on one thread, the package's server (timings it reports for a completion, no cache of prompts), and llama.cpp in a bare loop over its C
interface with the arg-max as sampler (`llama_cpp.py`), which is what a native program would do. The same numbers of
tokens and threads for all, f16 caches. Each is measured once before, and that is thrown away.
"""

import argparse
import json
import resource
import subprocess
import time
from pathlib import Path

import numpy as np
from llama_cpp import Model
from machine import describe, load_average

THREADS = 2


class Hoist:
    def __init__(self, program: str, file: str, threads: int = THREADS):
        self.command = [program, "bench", "decode", file, "--threads", str(threads), "--runs", "1", "--json"]
        self.bandwidth = []

    def sample(self, prompt: int, decode: int) -> tuple[float, float]:
        done = subprocess.run([*self.command, "-p", str(prompt), "-n", str(decode)], check=True, capture_output=True)
        answer = json.loads(done.stdout)
        self.bandwidth.append(answer["bandwidth_gb_s"])
        return answer["prompt"]["tok_s"]["median"], answer["decode"]["tok_s"]["median"]


class Server:
    def __init__(self, file: str, context: int):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = file
        params.n_ctx = context
        params.n_parallel = 1
        params.cpuparams.n_threads = THREADS
        params.cpuparams_batch.n_threads = THREADS
        params.cache_prompt = False
        params.verbosity = 0
        self.server = xllamacpp.Server(params)

    def sample(self, prompt: int, decode: int) -> tuple[float, float]:
        answer = self.server.handle_completions(
            {"prompt": tokens(prompt), "n_predict": decode, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        )
        timings = answer["timings"]
        if timings["prompt_n"] != prompt or timings["predicted_n"] != decode:
            raise SystemExit(f"the server counted {timings['prompt_n']} and {timings['predicted_n']} tokens")
        return timings["prompt_per_second"], timings["predicted_per_second"]


class BareLoop:
    def __init__(self, file: str, context: int):
        self.model = Model(file, THREADS, context)

    def sample(self, prompt: int, decode: int) -> tuple[float, float]:
        self.model.reset()
        begin = time.perf_counter()
        self.model.decode(tokens(prompt))
        middle = time.perf_counter()
        for _ in range(decode):
            self.model.decode([int(np.argmax(self.model.logits()))])
        end = time.perf_counter()
        return prompt / (middle - begin), decode / (end - middle)


def child_seconds(command: list[str]) -> float:
    """Processor time of a process, its start and its work."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime  # without the kernel's part, which is the loading of pages


def hoist_cpu(program: str, file: str, prompt: int, decode: int) -> float:
    """User seconds of one prompt and what follows, without loading and warming up."""
    command = [program, "bench", "decode", file, "--threads", "1", "--json", "-p", str(prompt), "-n", str(decode)]
    return (child_seconds([*command, "--runs", "3"]) - child_seconds([*command, "--runs", "1"])) / 2


def bare_loop_cpu(model: Model, prompt: int, decode: int) -> float:
    model.reset()
    before = resource.getrusage(resource.RUSAGE_SELF)
    model.decode(tokens(prompt))
    for _ in range(decode):
        model.decode([int(np.argmax(model.logits()))])
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime - before.ru_utime


def cpu_time(program: str, file: str, prompt: int, decode: int, samples: int) -> dict:
    model = Model(file, 1, (prompt + decode + 255) // 256 * 256)
    bare_loop_cpu(model, 16, 4)
    rates = {name: {"prompt": [], "decode": []} for name in ("hoist", "llama_cpp_bare_loop")}
    for _ in range(samples):
        for name in rates:
            one = (lambda p, n: hoist_cpu(program, file, p, n)) if name == "hoist" else (lambda p, n: bare_loop_cpu(model, p, n))
            first, both = one(prompt, 1), one(prompt, decode + 1)
            rates[name]["prompt"].append(prompt / first)  # with one token decoded
            rates[name]["decode"].append(decode / max(both - first, 1e-9))
            print(f"{Path(file).name} {name}, one thread's time: prompt {prompt / first:.1f}, decode {rates[name]['decode'][-1]:.1f}", flush=True)
    model.close()
    result = {name: {f"{phase}_tok_per_cpu_s": summary(values) for phase, values in both.items()} for name, both in rates.items()}
    for phase in ("prompt", "decode"):
        result[f"hoist_over_llama_cpp_bare_loop_{phase}"] = round(
            float(np.median(rates["hoist"][phase]) / np.median(rates["llama_cpp_bare_loop"][phase])), 3
        )
    return {"threads": 1, "prompt_tokens": prompt, "decode_tokens": decode, **result}


def tokens(count: int) -> list[int]:
    """Ordinary token ids, none of them special in the models compared."""
    return [1000 + (i * 7919) % 20000 for i in range(count)]


def summary(values: list[float]) -> dict:
    return {
        "median": round(float(np.median(values)), 2),
        "min": round(min(values), 2),
        "max": round(max(values), 2),
        "samples": [round(x, 2) for x in values],
    }


def measure(program: str, argument: str, samples: int, cpu_samples: int) -> dict:
    file, prompt, decode = argument, 128, 128
    if argument.count(":") >= 2:
        file, p, d = argument.rsplit(":", 2)
        prompt, decode = int(p), int(d)
    context = (prompt + decode + 255) // 256 * 256
    contestants = {
        "hoist": Hoist(program, file),
        "hoist_one_thread": Hoist(program, file, threads=1),  # shows what waiting at barriers costs on a busy machine
        "llama_cpp_server": Server(file, context),
        "llama_cpp_bare_loop": BareLoop(file, context),
    }
    names = list(contestants)
    for contestant in contestants.values():
        contestant.sample(min(prompt, 32), 8)
    before = load_average()
    taken = {name: [] for name in names}
    for round_number in range(samples):
        for turn in range(len(names)):
            name = names[(round_number + turn) % len(names)]
            taken[name].append(contestants[name].sample(prompt, decode))
            print(f"{Path(file).name} {name}: prompt {taken[name][-1][0]:.1f}, decode {taken[name][-1][1]:.1f}", flush=True)
    result = {
        "model": Path(file).name,
        "prompt_tokens": prompt,
        "decode_tokens": decode,
        "threads": THREADS,
        "load_average_before": before,
        "load_average_after": load_average(),
        "host_bandwidth_gb_s": summary(contestants["hoist"].bandwidth[1:]),
    }
    for name in names:
        rates = list(zip(*taken[name]))
        result[name] = {"prompt_tok_s": summary(rates[0]), "decode_tok_s": summary(rates[1])}
    for phase in ("prompt_tok_s", "decode_tok_s"):
        for peer in ("llama_cpp_server", "llama_cpp_bare_loop"):
            ratios = [a / b for a, b in zip(result["hoist"][phase]["samples"], result[peer][phase]["samples"])]
            result[f"hoist_over_{peer}_{phase.removesuffix('_tok_s')}"] = {
                "of_medians": round(result["hoist"][phase]["median"] / result[peer][phase]["median"], 3),
                "of_maxima": round(result["hoist"][phase]["max"] / result[peer][phase]["max"], 3),
                "by_round": [round(r, 3) for r in ratios],
            }
    contestants["llama_cpp_bare_loop"].model.close()
    if cpu_samples:
        result["cpu_time"] = cpu_time(program, file, prompt // 2, decode // 2, cpu_samples)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("hoist")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--cpu-samples", type=int, default=3)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    result = {"schema": "hoist.compare.speed/1", **describe(), "models": []}
    for model in arguments.models:
        result["models"].append(measure(arguments.hoist, model, arguments.samples, arguments.cpu_samples))
        if arguments.out:
            Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
