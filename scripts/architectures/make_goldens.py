#!/usr/bin/env python3
"""Writes tiny random models as Hugging Face folders, with the logits that `transformers` computes for them in f32.

    python3 make_goldens.py OUT

makes, for each case, OUT/<case>/{config.json, model.safetensors, golden.json, logits.f32}: `golden.json` holds the tokens,
`logits.f32` is [positions, vocab] in little-endian f32. Needs torch and transformers; the CPU is enough. Weights are drawn
from a generator seeded by the case's name, scaled so that logits depend on the whole context. `to_gguf.py` then writes each
model under GGUF's names.
"""

import hashlib
import json
import math
import shutil
import sys
import traceback
from pathlib import Path

import torch
import transformers

POSITIONS = 40
VOCAB = 128

# Widths are multiples of 32, so that every matrix could be quantised; a head is wider than hidden / heads.
SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def rope(kind="default", theta=10000.0, **more):
    return dict(rope_type=kind, rope_theta=theta, **more)


def small(**changes):
    config = {**SMALL, **changes}
    return {k: v for k, v in config.items() if v is not None}


YARN = dict(factor=4.0, original_max_position_embeddings=64, beta_fast=32.0, beta_slow=1.0)


def long_rope(original, pairs):
    return dict(
        original_max_position_embeddings=original,
        short_factor=[1.0 + 0.05 * j for j in range(pairs)],
        long_factor=[1.5 + 0.75 * j for j in range(pairs)],
    )


GEMMA3_LAYERS = ["sliding_attention"] * 5 + ["full_attention"]

# name: (class prefix, configuration)
CASES = {
    "llama": ("Llama", small(rope_parameters=rope())),
    "llama-tied-llama3": (
        "Llama",
        small(
            tie_word_embeddings=True,
            rope_parameters=rope(
                "llama3",
                theta=500000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        ),
    ),
    "llama-linear-bias": (
        "Llama",
        small(attention_bias=True, mlp_bias=True, rope_parameters=rope("linear", factor=4.0)),
    ),
    "llama-yarn": ("Llama", small(rope_parameters=rope("yarn", **YARN))),
    "mistral": ("Mistral", small(sliding_window=8, rope_parameters=rope(theta=1000000.0))),
    "qwen2": ("Qwen2", small(head_dim=None, tie_word_embeddings=True, rope_parameters=rope())),
    "qwen2-sliding": (
        "Qwen2",
        small(
            head_dim=None,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
            rope_parameters=rope(),
        ),
    ),
    "qwen3": ("Qwen3", small(rope_parameters=rope(theta=1000000.0))),
    "qwen3-yarn": ("Qwen3", small(tie_word_embeddings=True, rope_parameters=rope("yarn", **YARN))),
    "qwen3moe": (
        "Qwen3Moe",
        small(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            rope_parameters=rope(),
        ),
    ),
    "qwen3moe-ties": (
        "Qwen3Moe",
        small(
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=32,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            rope_parameters=rope(),
        ),
    ),
    "qwen3moe-raw": (
        "Qwen3Moe",
        small(
            num_hidden_layers=1,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            norm_topk_prob=False,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            rope_parameters=rope(),
        ),
    ),
    "gemma2": (
        "Gemma2",
        small(
            num_hidden_layers=3,
            tie_word_embeddings=True,
            query_pre_attn_scalar=16,
            sliding_window=8,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=5.0,
            rope_parameters=rope(),
        ),
    ),
    "gemma2-scalar": (
        "Gemma2",
        small(
            tie_word_embeddings=True,
            query_pre_attn_scalar=24,
            sliding_window=16,
            attn_logit_softcapping=None,
            final_logit_softcapping=5.0,
            rope_parameters=rope(),
        ),
    ),
    "gemma3": (
        "Gemma3",
        small(
            num_hidden_layers=6,
            intermediate_size=32,
            tie_word_embeddings=True,
            query_pre_attn_scalar=16,
            sliding_window=8,
            layer_types=GEMMA3_LAYERS,
            rope_parameters=dict(
                full_attention=rope(theta=1000000.0), sliding_attention=rope(theta=10000.0)
            ),
        ),
    ),
    "gemma3-linear": (
        "Gemma3",
        small(
            num_hidden_layers=6,
            intermediate_size=32,
            tie_word_embeddings=True,
            query_pre_attn_scalar=16,
            sliding_window=8,
            layer_types=GEMMA3_LAYERS,
            rope_parameters=dict(
                full_attention=rope("linear", theta=1000000.0, factor=8.0),
                sliding_attention=rope(theta=10000.0),
            ),
        ),
    ),
    "phi3": ("Phi3", small(head_dim=None, sliding_window=12, rope_parameters=rope())),
    "phi3-longrope-short": (
        "Phi3",
        small(
            head_dim=None,
            hidden_size=64,
            intermediate_size=32,
            num_key_value_heads=4,
            original_max_position_embeddings=64,
            rope_parameters=rope("longrope", partial_rotary_factor=0.75, **long_rope(64, 6)),
        ),
    ),
    "phi3-longrope-long": (
        "Phi3",
        small(
            head_dim=None,
            original_max_position_embeddings=16,
            rope_parameters=rope("longrope", **long_rope(16, 4)),
        ),
    ),
    "gpt2": (
        "GPT2",
        dict(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            n_inner=96,
            layer_norm_epsilon=1e-5,
            activation_function="gelu_new",
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
}

# Transformers leaves these out of a class's own arguments when they are None.
EXPLICIT_NONE = {"gemma2-scalar": ["attn_logit_softcapping"]}


def seed_of(name):
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")


def initialise(model, case, prefix):
    """Fills every parameter so that each layer, each head and each position matters."""
    generator = torch.Generator().manual_seed(seed_of(case))
    gemma = prefix.startswith("Gemma")
    conv1d = prefix == "GPT2"
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            values = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            is_norm = "norm" in name or ".ln_" in name
            if name.endswith("bias"):
                values *= 0.3
            elif is_norm:
                values = values * 0.2 + (0.0 if gemma else 1.0)
            elif "embed_tokens" in name or ".wte" in name:
                # gemma multiplies by √hidden; a tied output should not saturate the soft cap either.
                values *= 0.5 if gemma else 0.7
            elif ".wpe" in name:
                values *= 0.5
            else:
                fan_in = p.shape[0] if conv1d and p.dim() == 2 and "lm_head" not in name else p.shape[-1]
                gain = 1.5 if any(s in name for s in ("q_proj", "k_proj", "qkv", "c_attn")) else 1.0
                values *= gain / math.sqrt(fan_in)
                if name.endswith("mlp.gate.weight"):
                    values *= 2.0
                    if case.endswith("-ties"):
                        values[1::2] = values[0::2]
            p.copy_(values)


def stable_topk(values, k, dim=-1, **_):
    """Top-k that takes the lowest index of equal values; torch leaves that open."""
    assert dim in (-1, values.dim() - 1)
    # Equal rows of a matrix may differ in the last bit of a product: that is no difference here.
    rounded = torch.round(values.double() * 2**18)
    order = torch.sort(rounded, dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.return_types.topk((torch.gather(values, -1, order), order))


def make(case, out):
    prefix, arguments = CASES[case]
    names = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"), "GPT2": ("GPT2Config", "GPT2LMHeadModel")}
    config_class, model_class = names.get(prefix, (prefix + "Config", prefix + "ForCausalLM"))
    arguments = dict(arguments)
    for key in EXPLICIT_NONE.get(case, []):
        arguments[key] = None
    config = getattr(transformers, config_class)(**arguments)
    config._attn_implementation = "eager"
    model = getattr(transformers, model_class)(config).to(torch.float32).eval()
    initialise(model, case, prefix)
    if config.tie_word_embeddings:
        model.tie_weights()

    generator = torch.Generator().manual_seed(seed_of(case) + 1)
    tokens = torch.randint(0, VOCAB, (1, POSITIONS), generator=generator)
    exact_topk = torch.topk
    torch.topk = stable_topk
    try:
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits[0].float()
            # The same tokens after a different beginning: the context must matter at every later position.
            other = tokens.clone()
            other[0, 0] = (other[0, 0] + 1) % VOCAB
            moved = (model(input_ids=other, use_cache=False).logits[0].float() - logits).abs().amax(-1)
    finally:
        torch.topk = exact_topk
    assert torch.isfinite(logits).all()
    assert moved[:4].min() > 1e-4 * logits.abs().max(), f"the context does not matter: {moved}"

    folder = out / case
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "generation_config.json").unlink(missing_ok=True)
    logits.numpy().astype("<f4").tofile(folder / "logits.f32")
    golden = dict(
        tokens=tokens[0].tolist(),
        positions=POSITIONS,
        vocab=VOCAB,
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    (folder / "golden.json").write_text(json.dumps(golden) + "\n")
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(
        f"{case}: {size} bytes, logits within {logits.abs().max():.2f}, std {logits.std():.3f}, "
        f"first token moves the last position by {moved[-1]:.4f}",
        flush=True,
    )


def main():
    out = Path(sys.argv[1])
    chosen = sys.argv[2:] or list(CASES)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    failed = []
    for case in chosen:
        try:
            make(case, out)
        except Exception:  # one case's failure should not cost the others
            traceback.print_exc()
            failed.append(case)
    if failed:
        print("failed:", ", ".join(failed))
        sys.exit(1)


if __name__ == "__main__":
    main()
