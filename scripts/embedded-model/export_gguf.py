#!/usr/bin/env python3
"""Writes the trained model as GGUF and says what quantising costs. Needs numpy and gguf.

    python3 scripts/embedded-model/export_gguf.py model.npz kjv.txt cli/assets/tiny-kjv.gguf

Most matrices become Q4_K; attn_v, ffn_down and the embedding, which is also the output matrix, become Q6_K.
"""

import hashlib
import struct
import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from shape import (
    BOUNDARY, CONTEXT, EPSILON, FFN, HEAD, HEADS, HELD_OUT, HIDDEN, KV_HEADS, LAYERS, ROPE_BASE, VOCAB,
)

BLOCK = 256
SIX_BIT = ("attn_v", "ffn_down", "token_embd")


def half(x):
    return x.astype(np.float16).astype(np.float32)


def divide(a, b):
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)


def quantise_q4_k(weights):
    """Q4_K: 8 runs of 32 weights, each weight = d * scale * q - dmin * minimum with q in 0..15 and 6-bit scales and
    minimums; of some shrunken ranges, the one with the least squared error is taken for each block."""
    runs = weights.reshape(-1, 8, 32)
    low = np.minimum(runs.min(2), 0)
    best_error, best = None, None
    for shrink in np.linspace(0.86, 1.02, 17):
        scale, minimum = (runs.max(2) - low) * shrink / 15, -low * shrink
        d, dmin = half(scale.max(1) / 63), half(minimum.max(1) / 63)
        scales = np.clip(np.rint(divide(scale, d[:, None])), 0, 63)
        minimums = np.clip(np.rint(divide(minimum, dmin[:, None])), 0, 63)
        step = (d[:, None] * scales)[..., None]
        offset = (dmin[:, None] * minimums)[..., None]
        q = np.clip(np.rint(divide(runs + offset, np.broadcast_to(step, runs.shape))), 0, 15)
        error = ((step * q - offset - runs) ** 2).sum((1, 2))
        found = [d, dmin, scales, minimums, q]
        if best is None:
            best_error, best = error, found
            continue
        better = error < best_error
        best_error = np.where(better, error, best_error)
        for old, new in zip(best, found):
            old[better] = new[better]
    d, dmin, scales, minimums, q = best
    s, m, q = scales.astype(np.uint8), minimums.astype(np.uint8), q.astype(np.uint8)
    packed = np.concatenate(
        [
            s[:, :4] | (s[:, 4:] >> 4) << 6,
            m[:, :4] | (m[:, 4:] >> 4) << 6,
            (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4,
        ],
        1,
    )
    nibbles = (q[:, 0::2] | q[:, 1::2] << 4).reshape(-1, 128)
    halves = np.stack([d, dmin], 1).astype("<f2").view(np.uint8)
    return np.concatenate([halves, packed, nibbles], 1)


def quantise_q6_k(weights):
    """Q6_K: 16 runs of 16 weights, each weight = d * scale * q with q in -32..31 and 8-bit scales."""
    runs = weights.reshape(-1, 16, 16)
    scale = np.abs(runs).max(2) / 31
    d = half(scale.max(1) / 127)
    scales = np.clip(np.rint(divide(scale, d[:, None])), 0, 127)
    step = np.broadcast_to((d[:, None] * scales)[..., None], runs.shape)
    q = (np.clip(np.rint(divide(runs, step)), -32, 31) + 32).astype(np.uint8)
    # Two halves of 128 weights, each of four quarters of 32.
    quarters = q.reshape(-1, 2, 4, 32)
    low, high = quarters & 15, quarters >> 4
    ql = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], 2)
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    parts = [ql.reshape(-1, 128), qh.reshape(-1, 64), scales.astype(np.int8).view(np.uint8)]
    return np.concatenate([*parts, d[:, None].astype("<f2").view(np.uint8)], 1)


def gguf_name(name):
    name = name.removesuffix(".weight").replace("layers.", "blk.")
    return name + ".weight"


class Writer(gguf.GGUFWriter):
    def _pack_val(self, val, vtype, add_vtype, sub_type=None):
        """The package refuses empty arrays, which the format allows and an empty list of merges needs."""
        if vtype == gguf.GGUFValueType.ARRAY and len(val) == 0:
            return struct.pack("<IIQ", vtype, sub_type, 0)
        return super()._pack_val(val, vtype, add_vtype, sub_type)


def write(tensors, path):
    writer = Writer(path, "llama")
    writer.add_name("Tiny KJV")
    writer.add_description("A byte-level llama trained on the King James Bible, to try Hoist with no download")
    writer.add_license("CC0-1.0")
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_vocab_size(VOCAB)

    # GPT-2's alphabet: printable Latin-1 characters are themselves, the other bytes follow from U+0100.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = iter(range(0x100, 0x200))
    tokens = [chr(b) if b in printable else chr(next(other)) for b in range(256)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, "<|endoftext|>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL])
    # No merges: every byte is a token.
    writer.add_key_value("tokenizer.ggml.merges", [], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING)
    writer.add_bos_token_id(BOUNDARY)
    writer.add_eos_token_id(BOUNDARY)
    writer.add_add_bos_token(True)

    for name, values in tensors.items():
        name = gguf_name(name)
        if values.ndim == 1:
            writer.add_tensor(name, values.astype(np.float32))
            continue
        six = any(part in name for part in SIX_BIT)
        blocks = (quantise_q6_k if six else quantise_q4_k)(values.astype(np.float32))
        raw = blocks.reshape(values.shape[0], -1)
        writer.add_tensor(name, np.ascontiguousarray(raw), raw_dtype=Type.Q6_K if six else Type.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path):
    """The weights of a GGUF file as the package `gguf` decodes them."""
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = values.reshape([int(n) for n in reversed(tensor.shape)]).astype(np.float32)
    return tensors


def norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * weight


def rotate(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack((even * cos - odd * sin, even * sin + odd * cos), -1).reshape(x.shape)


def forward(t, tokens):
    """Logits `[batch, length, vocabulary]` in f32."""
    batch, length = tokens.shape
    angles = np.arange(length)[:, None] * ROPE_BASE ** (-np.arange(0, HEAD, 2) / HEAD)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    mask = np.triu(np.full((length, length), -np.inf, np.float32), 1)
    x = t["token_embd.weight"][tokens]
    for layer in range(LAYERS):

        def weight(name):
            return t[f"blk.{layer}.{name}.weight"]

        def heads(y, count):
            return y.reshape(batch, length, count, HEAD).transpose(0, 2, 1, 3)

        h = norm(x, weight("attn_norm"))
        q = rotate(heads(h @ weight("attn_q").T, HEADS), cos, sin)
        k = rotate(heads(h @ weight("attn_k").T, KV_HEADS), cos, sin).repeat(HEADS // KV_HEADS, 1)
        v = heads(h @ weight("attn_v").T, KV_HEADS).repeat(HEADS // KV_HEADS, 1)
        scores = q @ k.transpose(0, 1, 3, 2) * np.float32(HEAD**-0.5) + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        attention = (scores @ v).transpose(0, 2, 1, 3).reshape(batch, length, HEADS * HEAD)
        x = x + attention @ weight("attn_output").T
        h = norm(x, weight("ffn_norm"))
        gate = h @ weight("ffn_gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ weight("ffn_up").T)) @ weight("ffn_down").T
    return norm(x, t["output_norm.weight"]) @ t["token_embd.weight"].T


def bits_per_byte(tensors, corpus):
    stream = []
    chapters = open(corpus, encoding="ascii").read().split("\n\n")
    for chapter in chapters[HELD_OUT - 1 :: HELD_OUT]:
        stream += [BOUNDARY, *(chapter + "\n").encode()]
    stream = np.array(stream)
    count = (len(stream) - 1) // CONTEXT
    tokens = stream[: count * CONTEXT].reshape(count, CONTEXT)
    targets = stream[1 : count * CONTEXT + 1].reshape(count, CONTEXT)
    total = 0.0
    for at in range(0, count, 8):
        logits = forward(tensors, tokens[at : at + 8]).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, targets[at : at + 8, :, None], -1)[..., 0]
        total += (np.log(np.exp(logits).sum(-1)) - chosen).sum()
    return total / (count * CONTEXT) / np.log(2)


def main():
    trained, corpus, out = sys.argv[1:]
    tensors = dict(np.load(trained))
    write(tensors, out)
    exact = {gguf_name(name): values.astype(np.float32) for name, values in tensors.items()}
    stored = read(out)
    for name, values in exact.items():
        error = np.sqrt(((stored[name] - values) ** 2).mean() / (values**2).mean())
        print(f"{name}: relative rms error {error:.4f}")
    data = open(out, "rb").read()
    print(f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
    print(f"validation: {bits_per_byte(exact, corpus):.4f} bits/byte as trained", flush=True)
    print(f"validation: {bits_per_byte(stored, corpus):.4f} bits/byte in {out}")


if __name__ == "__main__":
    main()
