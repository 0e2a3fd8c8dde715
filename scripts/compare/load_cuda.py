#!/usr/bin/env python3
"""Loads onto a CUDA device: Hoist beside other loaders of SafeTensors, on one machine, in one run.

usage: load_cuda.py HOIST PEER_LOAD OUT [--samples 5] [--folder /tmp/models] [--peers it,it_buf,…] [--skip-cold]

Writes three models (7 GB SafeTensors, 4.9 GB GGUF, about 1 GB in 20,000 tensors and the same in 300), brings them into the
page cache, and times each loader in a fresh process per sample, loaders taking turns. PEER_LOAD is a script that loads a
SafeTensors file with a named peer and prints one JSON line with `t_load`, seconds from a ready context until every tensor
is owned, and `bytes`. Hoist's figure is the same window, as `hoist load --json` tells it. OUT takes the JSON report.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

PEERS = {
    "it": ("InstantTensor, default", {}),
    "it_buf": ("InstantTensor, buffered", {}),
    "it_mmap": ("InstantTensor, MMAP", {}),
    "fst": ("fastsafetensors, default", {}),
    "fst_buffered": ("fastsafetensors, buffered", {"FASTSAFETENSORS_ODIRECT": "0"}),
    "st_mmap": ("safetensors", {}),
    "runai": ("Run:ai streamer", {}),
}


def llama(folder, layers, hidden, ffn, heads, kv_heads, vocab):
    """A Hugging Face folder of a random llama in bf16."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    head = hidden // heads
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head,
        "vocab_size": vocab, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048,
        "tie_word_embeddings": True, "hidden_act": "silu", "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    # Finite values, different in every tensor.
    base = torch.randint(0, 0x3F00, (max(ffn, vocab) * hidden,), dtype=torch.int16, generator=torch.Generator().manual_seed(1))
    tensors = {}

    def add(name, *shape):
        n = 1
        for d in shape:
            n *= d
        bits = base[:n].clone()
        bits[: min(8, n)] = len(tensors) % 0x3F00
        tensors[name] = bits.view(torch.bfloat16).view(*shape)

    add("model.embed_tokens.weight", vocab, hidden)
    add("model.norm.weight", hidden)
    for i in range(layers):
        p = f"model.layers.{i}."
        for name, rows, cols in [("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", kv_heads * head, hidden),
                                 ("self_attn.v_proj", kv_heads * head, hidden), ("self_attn.o_proj", hidden, hidden),
                                 ("mlp.gate_proj", ffn, hidden), ("mlp.up_proj", ffn, hidden), ("mlp.down_proj", hidden, ffn)]:
            add(p + name + ".weight", rows, cols)
        add(p + "input_layernorm.weight", hidden)
        add(p + "post_attention_layernorm.weight", hidden)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    print(f"{folder}: {len(tensors)} tensors, {sum(t.numel() * 2 for t in tensors.values())} bytes", flush=True)


def warm(path):
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    for _ in range(2):
        for f in files:
            subprocess.run(["dd", f"if={f}", "of=/dev/null", "bs=16M"], check=True, stderr=subprocess.DEVNULL)


def json_of(command, env=None):
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})})
    wall = time.perf_counter() - started
    if done.returncode != 0:
        return {"error": (done.stderr or done.stdout).strip()[-400:]}, wall
    return json.loads(done.stdout.strip().splitlines()[-1] if done.stdout.count("\n{") else done.stdout), wall


def spread(values):
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4), "samples": len(values)}


def hoist_sample(hoist, model):
    report, wall = json_of([hoist, "load", str(model), "--backend", "cuda", "--no-workspace", "--json"])
    if "error" in report:
        return report
    upload = report["timing"]["upload_ms"] / 1e3
    return {"t_load": upload, "bytes": report["weights"]["bytes"], "gb_s": report["weights"]["bytes"] / upload / 1e9,
            "t_total": report["timing"]["total_ms"] / 1e3, "t_process": wall, "notes": report["notes"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hoist")
    parser.add_argument("peer_load")
    parser.add_argument("out")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--folder", default="/tmp/models")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--skip-cold", action="store_true")
    a = parser.parse_args()
    folder = pathlib.Path(a.folder)
    folder.mkdir(parents=True, exist_ok=True)
    large, gguf, small, few = folder / "large", folder / "llama-8b.gguf", folder / "small", folder / "few"
    t0 = time.perf_counter()
    synth = subprocess.Popen([a.hoist, "synth", "llama-3.1-8b", str(gguf)], stdout=subprocess.DEVNULL)
    llama(large, 16, 4096, 14336, 32, 8, 32000)
    llama(small, 2222, 128, 384, 2, 2, 1024)
    llama(few, 33, 1024, 3072, 16, 16, 1024)
    if synth.wait() != 0:
        sys.exit("hoist synth failed")
    for path in (large, gguf, small, few):
        warm(path)
    print(f"models ready after {time.perf_counter() - t0:.0f} s", flush=True)

    report = {"schema": "hoist.compare.load/1", "models": {}, "loaders": {}, "bench": {}}
    names = ["hoist"] + [p for p in a.peers.split(",") if p]

    def write():
        pathlib.Path(a.out).write_text(json.dumps(report, indent=1) + "\n")

    for name, model in (("gguf", gguf), ("small", small), ("few", few)):
        runs = [hoist_sample(a.hoist, model) for _ in range(a.samples)]
        report["models"][name] = runs
        if any("error" in r for r in runs):
            print(name, runs[-1])
            continue
        print(f"hoist, {name}: {runs[0]['bytes']} bytes, GB/s {spread([r['gb_s'] for r in runs])}, load s {spread([r['t_load'] for r in runs])}, "
              f"process start to resident s {spread([r['t_total'] for r in runs])}, whole process s {spread([r['t_process'] for r in runs])}")
        if name != "few":
            print("   ", runs[-1]["notes"])
    sys.stdout.flush()
    verify, _ = json_of([a.hoist, "load", str(gguf), "--backend", "cuda", "--no-workspace", "--verify", "--json"])
    report["verify"] = verify
    print("verify:", verify.get("verified"), verify.get("timing") or verify)
    for name, model, more in [("gguf", gguf, []), ("large", large, [])] + ([] if a.skip_cold else [("gguf cold", gguf, ["--cold"])]):
        bench, _ = json_of([a.hoist, "bench", "load", str(model), "--backend", "cuda", "--runs", "5", "--json", *more])
        report["bench"][name] = bench
        write()
        keys = ("open_ms", "load", "load_again", "digest", "digest_share_of_load", "ceilings", "share_of_ceiling",
                "host_bytes_beyond_context", "device_bytes_beyond_weights", "still_cached_bytes", "error")
        print("bench", name, {k: bench[k] for k in keys if k in bench})
        print("   ", bench.get("notes"))
        sys.stdout.flush()
    samples = {n: [] for n in names}
    for i in range(a.samples):
        for name in names:
            if name == "hoist":
                one = hoist_sample(a.hoist, large)
            else:
                loader = name.removesuffix("_buffered")
                env = {**PEERS[name][1], "NO_DIGEST": "1" if i else "0"}
                one, _ = json_of([sys.executable, a.peer_load, loader, str(large / "model.safetensors")], env)
                if "error" not in one:
                    one["gb_s"] = one["bytes"] / one["t_load"] / 1e9
            samples[name].append(one)
            report["loaders"] = samples
            write()
    loaders = {}
    print(f"{'SafeTensors, 7 GB, page cache warm':40} {'median':>8} {'min':>8} {'max':>8}  GB/s from a ready context")
    for name in names:
        good = [s["gb_s"] for s in samples[name] if "gb_s" in s]
        title = PEERS[name][0] if name in PEERS else "hoist"
        loaders[name] = {"title": title, "gb_s": spread(good) if good else None, "samples": samples[name]}
        if good:
            s = spread(good)
            print(f"{title:40} {s['median']:8.2f} {s['min']:8.2f} {s['max']:8.2f}")
        else:
            print(f"{title:40} failed: {samples[name][-1].get('error')}")
    report["loaders"] = loaders
    write()


if __name__ == "__main__":
    main()
