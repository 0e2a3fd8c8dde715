#!/usr/bin/env python3
"""Writes the tiny Hugging Face folders of make_goldens.py again under GGUF's names, in F32.

    python3 to_gguf.py FOLDER...        # FOLDER/model.safetensors + config.json -> FOLDER.gguf

Values are laid out as llama.cpp's converter lays them out: llama's q and k rows permuted to interleaved pairs, the one that
gemma adds folded into its norm weights, gpt2's Conv1D matrices transposed, experts stacked, llama3's frequency factors as a
tensor. Needs numpy, gguf and safetensors.
"""

import json
import math
import re
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
}

MODEL = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
}

LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}

GEMMA_LAYER = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}

CONV1D = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def interleave(values, heads):
    """Rows of each head from halves to adjacent pairs."""
    rows = values.shape[0] // heads
    pairs = values.reshape(heads, 2, rows // 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def tensors(config, source):
    """(name, values) of every GGUF tensor."""
    kind = config["model_type"]
    gemma = kind.startswith("gemma")
    names = {**LAYER, **(GEMMA_LAYER if gemma else {})}
    experts = {}
    for name, values in source.items():
        bare = re.sub(r"^(model|transformer)\.", "", name)
        stem, suffix = bare.rsplit(".", 1)
        layer = re.match(r"(?:layers|h)\.(\d+)\.(.*)", stem)
        if layer is None:
            out = MODEL[stem]
        else:
            number, stem = int(layer[1]), layer[2]
            expert = re.match(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj", stem)
            if expert is not None:
                experts.setdefault((number, expert[2]), {})[int(expert[1])] = values
                continue
            out = f"blk.{number}.{names[stem]}"
            if stem in CONV1D and suffix == "weight":
                values = values.T
            if kind in ("llama", "mistral") and stem.endswith(("q_proj", "k_proj")):
                key = "num_attention_heads" if stem.endswith("q_proj") else "num_key_value_heads"
                values = interleave(values, config[key])
        if gemma and out.endswith("norm"):
            values = values + np.float32(1)
        yield f"{out}.{suffix}", values
    for (number, part), matrices in experts.items():
        stack = np.stack([matrices[e] for e in range(len(matrices))])
        yield f"blk.{number}.ffn_{part}_exps.weight", stack


def llama3_divisors(rope, head_dim):
    frequencies = rope["rope_theta"] ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for wavelength in 2 * math.pi / frequencies:
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


def add_rope(writer, config, rope, head_dim):
    """Keys of RoPE; returns the tensors that go with them."""
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    context = config["max_position_embeddings"]
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind == "llama3":
        return {"rope_freqs.weight": llama3_divisors(rope, head_dim)}
    elif kind == "longrope":
        original = rope["original_max_position_embeddings"]
        scale = context / original
        attention = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(attention)
        return {
            "rope_factors_long.weight": np.array(rope["long_factor"], dtype=np.float32),
            "rope_factors_short.weight": np.array(rope["short_factor"], dtype=np.float32),
        }
    elif kind != "default":
        raise ValueError(f"unknown RoPE scaling {kind}")
    return {}


def add_sliding_window(writer, config):
    kinds = config.get("layer_types")
    window = config.get("sliding_window")
    uses = config.get("use_sliding_window", True)
    if not window or not uses:
        return
    writer.add_sliding_window(window)
    # gemma's patterns are constants of the architecture; elsewhere all layers slide unless it says otherwise.
    if kinds is not None and not config["model_type"].startswith("gemma"):
        writer.add_sliding_window_pattern([k == "sliding_attention" for k in kinds])


def convert(folder):
    config = json.loads((folder / "config.json").read_text())
    source = load_file(folder / "model.safetensors")
    writer = gguf.GGUFWriter(folder.with_suffix(".gguf"), ARCHITECTURES[config["model_type"]])
    extra = {}
    if config["model_type"] == "gpt2":
        writer.add_block_count(config["n_layer"])
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_feed_forward_length(config["n_inner"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    else:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        head_dim = config.get("head_dim") or hidden // heads
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(hidden)
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(heads)
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_vocab_size(config["vocab_size"])
        if head_dim != hidden // heads:
            writer.add_key_length(head_dim)
            writer.add_value_length(head_dim)
        rope = config["rope_parameters"]
        rope = rope.get("full_attention", rope)
        turned = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        writer.add_rope_dimension_count(turned)
        extra = add_rope(writer, config, rope, turned)
        add_sliding_window(writer, config)
        if config["model_type"] == "gemma2":
            writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
            writer.add_final_logit_softcapping(config["final_logit_softcapping"])
        if config["model_type"] == "qwen3_moe":
            writer.add_expert_count(config["num_local_experts"])
            writer.add_expert_used_count(config["num_experts_per_tok"])
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
            writer.add_expert_weights_norm(config["norm_topk_prob"])
    for name, values in {**dict(tensors(config, source)), **extra}.items():
        writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(folder.with_suffix(".gguf"))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        convert(Path(argument))
