#!/usr/bin/env python3
"""Trains the embedded model: a small llama over bytes. Needs PyTorch; takes minutes on one GPU.

    python3 scripts/embedded-model/train.py kjv.txt model.npz [--seconds N] [--smoke]

The last part of the training rounds the weights as the export's encodings will (straight-through gradients), so that
quantising costs little.
"""

import argparse
import json
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from shape import (
    BOUNDARY, CONTEXT, EPSILON, FFN, HEAD, HEADS, HELD_OUT, HIDDEN, KV_HEADS, LAYERS, ROPE_BASE, VOCAB,
)


def load(path):
    """Training and validation chapters as two byte streams with a boundary before each chapter."""
    chapters = open(path, encoding="ascii").read().split("\n\n")
    streams = {False: [], True: []}
    for number, chapter in enumerate(chapters):
        held_out = number % HELD_OUT == HELD_OUT - 1
        streams[held_out] += [BOUNDARY, *(chapter + "\n").encode()]
    return [torch.tensor(streams[held_out], dtype=torch.long) for held_out in (False, True)]


def round_affine(weight):
    """What Q4_K can hold, nearly: 16 steps between the least (at most 0) and the greatest of 32 weights."""
    blocks = weight.reshape(-1, 32)
    low = blocks.amin(1, keepdim=True).clamp(max=0)
    step = ((blocks.amax(1, keepdim=True) - low) / 15).clamp(min=1e-8)
    return (((blocks - low) / step).round().clamp(0, 15) * step + low).reshape(weight.shape)


def round_symmetric(weight):
    """What Q6_K can hold, nearly: 64 steps for 16 weights."""
    blocks = weight.reshape(-1, 16)
    step = (blocks.abs().amax(1, keepdim=True) / 31).clamp(min=1e-8)
    return ((blocks / step).round().clamp(-32, 31) * step).reshape(weight.shape)


class Linear(nn.Module):
    def __init__(self, rows, columns, rounding, std):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns) * std)
        self.rounding = rounding

    def value(self, rounded):
        if not rounded:
            return self.weight
        # Forward sees the rounded weight, backward the exact one.
        return self.weight + (self.rounding(self.weight) - self.weight).detach()

    def forward(self, x, rounded):
        return F.linear(x, self.value(rounded).to(x.dtype))


def norm(x, weight):
    return F.rms_norm(x.float(), (x.shape[-1],), weight, EPSILON).to(x.dtype)


def rotate(x, cos, sin):
    """Rotary positions on neighbouring pairs, the order of GGUF's llama: no permutation at export."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return pairs.flatten(-2).to(x.dtype)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        std = HIDDEN**-0.5
        out = std / math.sqrt(2 * LAYERS)
        self.attn_norm = nn.Parameter(torch.ones(HIDDEN))
        self.ffn_norm = nn.Parameter(torch.ones(HIDDEN))
        self.attn_q = Linear(HEADS * HEAD, HIDDEN, round_affine, std)
        self.attn_k = Linear(KV_HEADS * HEAD, HIDDEN, round_affine, std)
        self.attn_v = Linear(KV_HEADS * HEAD, HIDDEN, round_symmetric, std)
        self.attn_output = Linear(HIDDEN, HEADS * HEAD, round_affine, out)
        self.ffn_gate = Linear(FFN, HIDDEN, round_affine, std)
        self.ffn_up = Linear(FFN, HIDDEN, round_affine, std)
        self.ffn_down = Linear(HIDDEN, FFN, round_symmetric, out * (HIDDEN / FFN) ** 0.5)

    def forward(self, x, cos, sin, rounded, dropout):
        batch, length, _ = x.shape

        def heads(y, count):
            return y.view(batch, length, count, HEAD).transpose(1, 2)

        h = norm(x, self.attn_norm)
        q = rotate(heads(self.attn_q(h, rounded), HEADS), cos, sin)
        k = rotate(heads(self.attn_k(h, rounded), KV_HEADS), cos, sin)
        v = heads(self.attn_v(h, rounded), KV_HEADS)
        repeat = HEADS // KV_HEADS
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attention = attention.transpose(1, 2).reshape(batch, length, HEADS * HEAD)
        x = x + F.dropout(self.attn_output(attention, rounded), dropout)
        h = norm(x, self.ffn_norm)
        h = F.silu(self.ffn_gate(h, rounded)) * self.ffn_up(h, rounded)
        return x + F.dropout(self.ffn_down(h, rounded), dropout)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.token_embd = Linear(VOCAB, HIDDEN, round_symmetric, 0.05)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.output_norm = nn.Parameter(torch.ones(HIDDEN))
        angles = torch.arange(CONTEXT)[:, None] * ROPE_BASE ** (-torch.arange(0, HEAD, 2) / HEAD)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens, targets, rounded, dropout):
        """Mean cross-entropy in nats; the embedding is also the output matrix."""
        length = tokens.shape[1]
        embedding = self.token_embd.value(rounded)
        x = F.dropout(F.embedding(tokens, embedding).bfloat16(), dropout)
        cos, sin = self.cos[:length], self.sin[:length]
        for layer in self.layers:
            x = layer(x, cos, sin, rounded, dropout)
        logits = F.linear(norm(x, self.output_norm), embedding.bfloat16()).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def windows(stream):
    """All of a stream, cut into contexts; what is left over at its end is dropped."""
    count = (len(stream) - 1) // CONTEXT
    return (
        stream[: count * CONTEXT].view(count, CONTEXT),
        stream[1 : count * CONTEXT + 1].view(count, CONTEXT),
    )


@torch.no_grad()
def bits_per_byte(model, stream, rounded):
    tokens, targets = windows(stream)
    total = 0.0
    for at in range(0, len(tokens), 64):
        part = slice(at, at + 64)
        total += model(tokens[part], targets[part], rounded, 0.0).item() * len(tokens[part])
    return total / len(tokens) / math.log(2)


def train(training, validation, dropout, seconds, most_steps, device, seed, report):
    torch.manual_seed(seed)
    model = Model().to(device)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95))
    step_of = torch.compile(model) if device == "cuda" else model
    batch = 128 if device == "cuda" else 2
    offsets = torch.arange(CONTEXT, device=device)

    def step(rounded):
        starts = torch.randint(len(training) - CONTEXT - 1, (batch, 1), device=device)
        tokens, targets = training[starts + offsets], training[starts + offsets + 1]
        optimizer.zero_grad(set_to_none=True)
        loss = step_of(tokens, targets, rounded, dropout)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    # Both variants are compiled, and the speed measured, at a learning rate that changes nothing.
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for rounded in (True, False):
        for _ in range(3):
            step(rounded).item()
    began = time.monotonic()
    for _ in range(20):
        loss = step(False)
    loss.item()
    pace = (time.monotonic() - began) / 20
    optimizer.state.clear()
    steps = max(20, min(most_steps, int(seconds / pace)))
    report(f"dropout {dropout}: {steps} steps of {batch * CONTEXT} bytes at {pace * 1e3:.1f} ms")

    best = (math.inf, None)
    warm_up, rounding_from = min(200, steps // 10), int(steps * 0.7)
    for number in range(steps):
        rounded = number >= rounding_from
        ramp = min(1.0, (number + 1) / warm_up)
        rate = ramp * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * number / steps)))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate
        loss = step(rounded)
        last = number == steps - 1
        if number % 250 == 249 or last:
            validated = bits_per_byte(model, validation, rounded)
            report(
                f"step {number + 1}: training {loss.item() / math.log(2):.4f}, "
                f"validation {validated:.4f} bits/byte{' (rounded)' if rounded else ''}"
            )
            if rounded and validated < best[0]:
                state = {k: v.detach().float().cpu().numpy() for k, v in model.named_parameters()}
                best = (validated, state)
    return best


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus")
    parser.add_argument("out")
    parser.add_argument("--seconds", type=float, default=120, help="of training, for each dropout")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    arguments = parser.parse_args()
    began = time.monotonic()

    def report(line):
        print(f"{time.monotonic() - began:6.1f} s  {line}", flush=True)

    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    training, validation = (stream.to(device) for stream in load(arguments.corpus))
    report(f"{len(training)} training and {len(validation)} validation bytes, {device}")
    best, tried = (math.inf, None), {}
    for dropout in (0.1, 0.2):
        seconds, steps = (1, 20) if arguments.smoke else (arguments.seconds, 6000)
        found = train(training, validation, dropout, seconds, steps, device, 1611, report)
        tried[dropout] = found[0]
        best = min(best, found, key=lambda b: b[0])
        # Each result is saved at once: a later one only replaces it if it is better.
        np.savez(arguments.out, **best[1])
        if arguments.smoke:
            break
    parameters = sum(v.size for v in best[1].values())
    report(json.dumps({"parameters": parameters, "validation": tried, "best": best[0]}))


if __name__ == "__main__":
    main()
