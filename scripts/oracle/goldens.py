#!/usr/bin/env python3
"""Writes the golden vectors: conformance/golden/*.json, whose README describes them.

Operands are chosen, or searched for, so that a wrong floor, exponent, order or rounding changes the result: ordinary
vectors hide most of them in the last rounding.

    python3 scripts/oracle/goldens.py conformance/golden
"""

import json
import math
import random
import struct
import sys
from pathlib import Path

import reference as ref

CONTRACT = "hoist-num/1-draft"
MAX = ref.f32_from_bits(0x7F7FFFFF)


def f32(x: float) -> float:
    return struct.unpack("<f", struct.pack("<f", x))[0]


def hex32(values) -> str:
    return struct.pack(f"<{len(values)}f", *values).hex()


def hex16(words) -> str:
    return struct.pack(f"<{len(words)}H", *words).hex()


def result(compute):
    """Hex of a result; None where the operation is NonFinite."""
    try:
        return hex32(compute())
    except ref.NonFinite:
        return None


class File:
    """One golden file: named operands and cases."""

    def __init__(self):
        self.f32, self.f16, self.cases = {}, {}, []

    def name32(self, name, values):
        self.f32[name] = hex32(values)
        return values

    def case(self, op, name, **fields):
        self.cases.append({"op": op, "name": name, **fields})

    def write(self, path: Path):
        def table(entries):
            lines = [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items()]
            return "{\n" + ",\n".join(lines) + "\n  }" if lines else "{}"

        cases = ",\n".join("    " + json.dumps(c, separators=(", ", ":")) for c in self.cases)
        path.write_text(
            f'{{\n  "schema": "hoist.goldens/1",\n  "contract": "{CONTRACT}",\n'
            f'  "f32": {table(self.f32)},\n  "f16": {table(self.f16)},\n  "cases": [\n{cases}\n  ]\n}}\n'
        )


def gauss(rng, n, scale=1.0):
    return [f32(rng.gauss(0, 1) * scale) for _ in range(n)]


# ---------------------------------------------------------------- §1.1


def quantise_file() -> File:
    rng, out = random.Random(1), File()

    def case(name, x):
        segments = [
            {**s, "q": struct.pack(f"{len(s['q'])}b", *s["q"]).hex()} for s in ref.quantise(x)
        ]
        out.case("quantise", name, x=hex32(x), segments=segments)

    case("one_block", gauss(rng, 32))
    case("partial_last_segment", gauss(rng, 288))
    case("outliers", [f32(v * (100 if i % 37 == 0 else 1)) for i, v in enumerate(gauss(rng, 256))])
    case("largest_is_negative", [-abs(v) for v in gauss(rng, 64)])
    case("zeros", [0.0] * 31 + [-0.0])
    case("zero_block_among_others", gauss(rng, 32) + [0.0] * 32 + gauss(rng, 32))
    # d0 is exactly 2^-126, the smallest that is no zero segment; then the f32 below it.
    bound = 2032 * 2.0**-126
    case("smallest_segment", [bound] + [f32(bound * rng.random()) for _ in range(31)])
    case("largest_zero_segment", [ref.f32_from_bits(ref.f32_bits(bound) - 1)] + [f32(bound / 2)] * 31)
    case("zero_segment_after_a_small_one", [bound / 64] * 256 + [bound * 3, -bound] * 16)
    case("top", [MAX, -MAX] + [f32(MAX * rng.uniform(-1, 1)) for _ in range(30)] + gauss(rng, 32, 2.0**120))
    # Every multiplier, the block's largest on its bound and one f32 above it. The first block sets d = 2^-10.
    for first in (1, 6, 11):
        x = [f32(2032 * 2.0**-10)] + gauss(rng, 31, 0.1)
        for u in range(first, min(first + 5, 16)):
            on = f32(u * 127 * 2.0**-10)
            for largest in (on, ref.f32_from_bits(ref.f32_bits(on) + 1)):
                x += [largest if rng.random() < 0.5 else -largest] + gauss(rng, 31, 0.02)
        case(f"multipliers_at_their_bounds_from_{first}", x[:256])
        case(f"multipliers_at_their_bounds_from_{first}_tail", x[:32] + x[256:])
    # u · d is a power of two, so that halves stay halves.
    halves = [f32((n + 0.5) * 16 * 2.0**-10) for n in range(-16, 15)]
    case("ties_go_to_the_even_integer", [f32(2032 * 2.0**-10)] + halves)
    # A is 2032 times an 8-bit number: d0 needs no rounding up.
    case("scale_of_eight_bits", [f32(2032 * 201 * 2.0**-9)] + gauss(rng, 31))
    # The two significands for which A · (1 / 2032) rounds up to another scale than A / 2032.
    for bits in (0x3FFE0001, 0x3FFFFC01):
        case(f"scale_next_to_eight_bits_{bits:x}", [ref.f32_from_bits(bits)] + gauss(rng, 31, 0.3))
    # The reciprocal and a division disagree about q.
    found = 0
    while found < 3:
        x = gauss(rng, 32)
        (s,) = ref.quantise(x)
        d = math.ldexp(s["m"], s["e"])
        if any(round(ref.div(v, d * s["u"][0])) != q for v, q in zip(x, s["q"])):
            found += 1
            case(f"reciprocal_matters_{found}", x)
        # Move one element next to a tie.
        i = rng.randrange(1, 32)
        x[i] = f32((rng.randrange(-100, 100) + 0.5) * d * s["u"][0])
        (t,) = ref.quantise(x)
        if any(round(ref.div(v, d * t["u"][0])) != q for v, q in zip(x, t["q"])) and (t["m"], t["e"]) == (s["m"], s["e"]):
            found += 1
            case(f"reciprocal_matters_{found}", x)
    return out


# ---------------------------------------------------------------- §1.2 to §1.4


class Rows:
    """Random blocks of an encoding with chosen scales."""

    def __init__(self, rng, name):
        self.rng, self.coding = rng, ref.ENCODINGS[name]
        self.cols = 768 if self.coding.block == 256 else 640 if self.coding.block == 128 else 576

    def ordinary_scale(self):
        if self.coding.name == "mxfp4":
            return self.rng.randrange(116, 124)
        if self.coding.name == "nvfp4":
            return self.rng.randrange(0x18, 0x48)
        return self.rng.randrange(0x1C00, 0x2C00) | self.rng.choice([0, 0, 0, 0x8000])

    def spread_scale(self):
        """Exponents over the whole range, subnormals and zeros among them."""
        if self.coding.name == "mxfp4":
            return self.rng.choice([140, 138, 133, 131, 107, 104, 101, 70])
        if self.coding.name == "nvfp4":
            return self.rng.randrange(0, 0x7F)
        return self.rng.choice([0, 1, 3, 0x155, 0x8001, 0x83FF, *(self.rng.randrange(0x7C00) for _ in range(12))])

    def subnormal_scale(self):
        if self.coding.name == "mxfp4":
            return self.rng.randrange(0, 3)
        if self.coding.name == "nvfp4":
            return self.rng.randrange(1, 16)
        return self.rng.randrange(1, 0x400) | self.rng.choice([0, 0x8000])

    def smallest_scale(self):
        return {"mxfp4": 98, "nvfp4": 1}.get(self.coding.name, self.rng.randrange(1, 4))

    def zero_scale(self):
        return {"mxfp4": 100}.get(self.coding.name, 0)

    def block(self, scale, minimum=None):
        b = bytearray(self.rng.randbytes(self.coding.nbytes))
        self.coding.set_scales(b, scale())
        if self.coding.name == "nvfp4":
            b[:4] = bytes(scale() for _ in range(4))
        self.coding.set_mins(b, (minimum or scale)())
        return bytes(b)

    def zero_block(self):
        b = bytearray(self.block(self.zero_scale))
        if self.coding.name == "mxfp4":
            b[1:] = bytes(16)
        return bytes(b)

    def row(self, scale, minimum=None, zero_first=False, cols=None):
        blocks = (cols or self.cols) // self.coding.block
        zeros = 256 // self.coding.block if zero_first else 0
        return b"".join(self.zero_block() if i < zeros else self.block(scale, minimum) for i in range(blocks))


def activations(out: File) -> dict:
    rng = random.Random(2)
    x = {
        "normal": gauss(rng, 768),
        "outliers": [f32(v * (300 if rng.random() < 0.01 else 1)) for v in gauss(rng, 768)],
        # With zero weights first, every bit that the others keep reaches y.
        "revealing": gauss(rng, 256, 2.0**24) + gauss(rng, 256) + gauss(rng, 256, 2.0**-5),
        "far": gauss(rng, 256, 2.0**70) + gauss(rng, 256) + gauss(rng, 256, 2.0**-40),
        "tiny": gauss(rng, 256, 2.0**-114) + gauss(rng, 256, 2.0**-112) + gauss(rng, 256, 2.0**-125),
        "zero_segment_first": [0.0] * 256 + gauss(rng, 512, 2.0**-20),
        "top": [f32(rng.choice([-1, 1]) * MAX * rng.random()) for _ in range(767)] + [MAX],
        # The first block of each segment adds nothing, whatever its scale.
        "zero_blocks": ([0.0] * 32 + gauss(rng, 224)) * 3,
        "zeros": [0.0] * 256,
    }
    for name, values in x.items():
        out.name32(name, values)
    return x


def is_tie(acc: int, _) -> bool:
    """Halfway between two f32, the even one nearer to 0."""
    if acc == 0:
        return False
    odd = abs(acc) // (abs(acc) & -abs(acc))
    return odd.bit_length() == 25 and odd >> 1 & 1 == 0


def rounds_twice(acc: int, exponent: int) -> bool:
    """Rounding to f32 first and again at the scaling differs from rounding once."""
    return abs(ref.scaled(acc, exponent)) != abs(ref.round32(acc, exponent))


def matmul_file() -> File:
    out = File()
    x = activations(out)
    rng = random.Random(3)
    bias = out.name32("bias", gauss(rng, 2))

    def case(name, encoding, cols, rows, of, with_bias=None):
        weights = b"".join(rows)
        y = result(lambda: ref.matmul(encoding, len(rows), cols, weights, x[of][:cols], with_bias and with_bias[: len(rows)]))
        out.case(
            "matmul",
            f"{encoding}/{name}",
            encoding=encoding,
            rows=len(rows),
            cols=cols,
            weights=weights.hex(),
            x=f"@{of}:{cols}",
            bias=f"@bias:{len(rows)}" if with_bias else None,
            y=y,
        )

    for encoding, coding in ref.ENCODINGS.items():
        rows = Rows(random.Random(encoding), encoding)
        full = rows.cols
        short = 512 if full == 768 else full
        count = 2 if encoding in ("q8_0", "q4_k", "q1_0", "nvfp4") else 1
        case("ordinary", encoding, short, [rows.row(rows.ordinary_scale, cols=short) for _ in range(count)], "normal", bias)
        revealing = [rows.row(rows.ordinary_scale, zero_first=True)]
        case("revealing", encoding, full, revealing, "revealing")
        case("spread_scales", encoding, full, [rows.row(rows.spread_scale, zero_first=True)], "revealing")
        case("subnormal_scales", encoding, full, [rows.row(rows.subnormal_scale, zero_first=True)], "revealing")
        if encoding in ("q8_0", "q4_1", "q2_k", "q4_k", "q6_k", "iq1_m", "mxfp4", "nvfp4"):
            case("far_exponents", encoding, full, revealing, "far")
            case("underflow", encoding, short, [rows.row(rows.smallest_scale, cols=short)], "tiny")
        if coding.mins:
            large = lambda: rows.ordinary_scale() + 0x2000 & 0x7FFF  # noqa: E731
            larger_mins = [rows.row(rows.ordinary_scale, large, zero_first=True)]
            case("mins_larger_than_scales", encoding, full, larger_mins, "revealing")

    # The first scale of each segment sets the exponent and adds nothing; the others lose bits to it, of both signs.
    for encoding in ("q4_0", "q4_1", "q5_1", "iq4_nl", "apr_q4"):
        rows = Rows(random.Random(encoding + "/floors"), encoding)
        small = lambda: rows.rng.randrange(0x0400, 0x2400) | rows.rng.choice([0, 0x8000])  # noqa: E731
        blocks = [rows.block(small) if i % 8 else rows.block(lambda: 0x5A00) for i in range(18)]
        case("floors", encoding, 576, [b"".join(blocks)], "zero_blocks")
    # Zero quants under subnormal scales: nothing but those exponents in the row.
    for encoding, quants in (("q8_0", slice(2, 34)), ("q6_k", slice(192, 208))):
        rows = Rows(random.Random(encoding + "/zero_quants"), encoding)
        blocks = [bytearray(rows.block(rows.subnormal_scale)) for _ in range(rows.cols // rows.coding.block)]
        for block in blocks[: 256 // rows.coding.block]:
            block[quants] = bytes(quants.stop - quants.start)
        case("subnormal_scales_only", encoding, rows.cols, [b"".join(blocks)], "revealing")
    # A NaN in UE4M3 counts as 0 with the largest exponent.
    rows = Rows(random.Random("nvfp4/nan"), "nvfp4")
    blocks = [bytearray(rows.block(rows.ordinary_scale)) for _ in range(9)]
    for block in blocks[4:]:
        block[1] = 0x7F
    blocks[:4] = [rows.zero_block() for _ in range(4)]
    case("scale_0x7f", "nvfp4", 576, [b"".join(blocks)], "revealing")

    # What depends on the sum alone, for a few encodings.
    for encoding in ("q8_0", "q4_1", "q6_k", "q4_k"):
        rows = Rows(random.Random(encoding + "/more"), encoding)
        full = rows.cols
        one = [rows.row(rows.ordinary_scale)]
        case("outliers", encoding, full, one, "outliers")
        case("zero_input", encoding, 256, [rows.row(rows.ordinary_scale, cols=256)], "zeros")
        case("zero_segment_first", encoding, full, one, "zero_segment_first")
        case("overflow", encoding, full, one, "top")
        case("top_with_subnormal_scales", encoding, full, [rows.row(lambda: rows.rng.randrange(1, 3))], "top")

    # Searched: ties of the first rounding, and results that two roundings change.
    for encoding in ("q8_0", "q4_0", "iq4_nl"):
        rows = Rows(random.Random(encoding + "/search"), encoding)
        for name, of, scale, wanted in (
            ("tie_to_even_below", "normal", lambda: 0x2400, is_tie),
            ("rounded_twice", "tiny", rows.smallest_scale, rounds_twice),
        ):
            quantised = ref.quantise(x[of][:256])
            for _ in range(2000):
                row = rows.row(scale, cols=256)
                acc, exponent = ref.row_sum(ref.weight_segments(rows.coding, row), quantised)
                if wanted(acc, exponent):
                    break
            else:
                raise SystemExit(f"no row found: {encoding} {name}")
            case(name, encoding, 256, [row], of)

    # APR Q8: one scale for the matrix.
    rng = random.Random(4)
    for name, scale, of in (
        ("ordinary", 0.013, "normal"),
        ("revealing", -0.7, "revealing"),
        ("far_exponents", 1.0, "far"),
        ("underflow", 2.0**-40, "tiny"),
        ("overflow", 2.0**100, "revealing"),
    ):
        cols = 576
        quants = [bytes(256) + rng.randbytes(cols - 256) if of in ("revealing", "far") else rng.randbytes(cols) for _ in range(2)]
        case(name, "apr_q8", cols, [struct.pack("<f", scale) + quants[0]], of)
        out.cases[-1].update(
            rows=2,
            weights=(struct.pack("<f", scale) + b"".join(quants)).hex(),
            bias="@bias:2",
            y=result(lambda: ref.matmul("apr_q8", 2, cols, struct.pack("<f", scale) + b"".join(quants), x[of][:cols], bias)),
        )

    # §2
    for encoding, cols in (("f32", 200), ("f16", 200), ("bf16", 200), ("f32", 1), ("f16", 65)):
        if encoding == "f32":
            data = struct.pack(f"<{2 * cols}f", *gauss(rng, 2 * cols))
        elif encoding == "f16":
            data = struct.pack(f"<{2 * cols}H", *(rng.randrange(0x4400) | rng.choice([0, 0x8000]) for _ in range(2 * cols)))
        else:
            data = struct.pack(f"<{2 * cols}H", *(ref.f32_bits(v) >> 16 for v in gauss(rng, 2 * cols)))
        rows = [data[: len(data) // 2], data[len(data) // 2 :]]
        case(f"{cols}_columns", encoding, cols, rows, "normal", bias)
    cancelling = [f32(v * 2.0 ** rng.randrange(-12, 12)) for v in gauss(rng, 320)]
    case("cancelling", "f32", 320, [struct.pack("<320f", *cancelling)], "outliers")
    case("overflow", "f32", 64, [struct.pack("<64f", *[2.0**100] * 64)], "top")
    return out


def embed_file() -> File:
    out = File()
    for encoding in ref.ENCODINGS:
        rows = Rows(random.Random(encoding + "/embed"), encoding)
        cols = max(rows.coding.block, 64)
        data = rows.row(rows.ordinary_scale, cols=cols) + rows.row(rows.spread_scale, cols=cols)
        negative_zero = {"mxfp4": 0, "nvfp4": 0}.get(encoding, 0x8000)
        data += rows.row(lambda: negative_zero, rows.zero_scale, cols=cols)
        for row in range(3):
            length = len(data) // 3
            one = data[row * length : (row + 1) * length]
            y = ref.embed(encoding, cols, one, 0)
            if any(not math.isfinite(v) for v in y):
                continue
            out.case(
                "embed",
                f"{encoding}/{['ordinary', 'spread_scales', 'negative_zero'][row]}",
                encoding=encoding,
                cols=cols,
                weights=one.hex(),
                y=hex32(y[:: cols // 32]),
                every=cols // 32,
            )
    rng = random.Random(5)
    for encoding, data in (
        ("f32", struct.pack("<4f", 1.5, -0.0, 2.0**-149, MAX)),
        ("f16", struct.pack("<6H", 0x3C01, 0x8000, 1, 0x83FF, 0x7BFF, 0x0400)),
        ("bf16", struct.pack("<4H", 0x3F81, 0x8000, 1, 0xFF7F)),
        ("apr_q8", struct.pack("<f", -0.013) + bytes([0, 1, 127, 128, 129, 255]) + rng.randbytes(26)),
    ):
        width = {"f32": 4, "f16": 2, "bf16": 2}.get(encoding)
        cols = len(data) // width if width else 32
        out.case(
            "embed",
            f"{encoding}/edges",
            encoding=encoding,
            cols=cols,
            weights=data.hex(),
            y=hex32(ref.embed(encoding, cols, data, 0)),
            every=1,
        )
    return out


# ---------------------------------------------------------------- §4


def ops_file() -> File:
    rng, out = random.Random(6), File()

    for name, n, eps, scale in (
        ("1", 1, 1e-6, 1.0),
        *((str(n), n, 1e-6, 1.0) for n in (3, 7, 11, 13, 21, 48)),
        ("64", 64, 1e-5, 3.0),
        ("520", 520, 1e-6, 1.0),
        ("520_outliers", 520, 1e-6, None),
    ):
        eps = f32(eps)
        x = gauss(rng, n, scale or 1.0)
        if scale is None:
            x = [f32(v * (2000 if rng.random() < 0.01 else 1)) for v in x]
        g, b = gauss(rng, n), gauss(rng, n)
        for operand, values in (("x", x), ("gamma", g), ("bias", b)):
            out.name32(f"{operand}_{name}", values)
        common = dict(x=f"@x_{name}:{n}", gamma=f"@gamma_{name}:{n}", eps=hex32([eps]))
        out.case("rms_norm", name, **common, y=result(lambda: ref.rms_norm(x, g, eps)))
        out.case("layer_norm", name, **common, bias=f"@bias_{name}:{n}", y=result(lambda: ref.layer_norm(x, g, b, eps)))
    x, ones = [2.0**70] * 8, [1.0] * 8
    common = dict(x=hex32(x), gamma=hex32(ones), eps=hex32([1.0]))
    out.case("rms_norm", "infinite_sum_of_squares_yields_zero", **common, y=result(lambda: ref.rms_norm(x, ones, 1.0)))
    huge = [MAX] * 8
    common = dict(x=hex32([1.0] * 8), gamma=hex32(huge), eps=hex32([0.0]))
    out.case("rms_norm", "largest_gamma", **common, y=result(lambda: ref.rms_norm([1.0] * 8, huge, 0.0)))
    common = dict(x=hex32([2.0] + [0.0] * 7), gamma=hex32(huge), eps=hex32([0.0]))
    out.case("rms_norm", "overflow", **common, y=result(lambda: ref.rms_norm([2.0] + [0.0] * 7, huge, 0.0)))
    out.case(
        "layer_norm", "overflow", **common, bias=hex32(huge), y=result(lambda: ref.layer_norm([2.0] + [0.0] * 7, huge, huge, 0.0))
    )

    for style in ("interleaved", "half_split"):
        for heads, head_dim, n_rot in ((2, 16, 16), (3, 12, 8), (1, 4, 2)):
            value = gauss(rng, heads * head_dim)
            table = [f32(f(rng.uniform(-3, 3))) for _ in range(n_rot // 2) for f in (math.cos, math.sin)]
            out.case(
                "rope",
                f"{style}/{heads}x{head_dim}_{n_rot}",
                style=style,
                heads=heads,
                n_rot=n_rot,
                value=hex32(value),
                table=hex32(table),
                y=result(lambda: ref.rope(value, table, style, heads, n_rot)),
            )

    edges = [0.0, -0.0, 1.0, 2049 * 2.0**-11, 2051 * 2.0**-11, 2.0**-24, 2.0**-25, 3 * 2.0**-25, -(2.0**-26)]
    edges += [1023.5 * 2.0**-24, 65519.0, -65504.0, 2.0**-149, f32(0.1), 5 * 2.0**-25, f32(-1 / 3)]
    out.case("store_kv", "edges", x=hex32(edges), y=result(lambda: [ref.to_f16(v) for v in edges]))
    values = [f32(v * 2.0 ** rng.randrange(-30, 12)) for v in gauss(rng, 64)]
    out.case("store_kv", "random", x=hex32(values), y=result(lambda: [ref.to_f16(v) for v in values]))
    for name, v in (("rounds_to_infinity", 65520.0), ("negative_too", -70000.0)):
        out.case("store_kv", name, x=hex32([1.0, v]), y=result(lambda: [ref.to_f16(u) for u in (1.0, v)]))

    special = [0.0, -0.0, 1.0, -1.0, 20.0, -20.0, 88.7, -88.8, -104.0, 200.0, -200.0, 2.0**-149, -(2.0**-140), 2.0**70, -(2.0**70)]
    spread = special + [f32(v) for v in gauss(rng, 80, 3.0)] + [f32(rng.uniform(-110, 110)) for _ in range(40)]
    out.case("activation", "silu", kind="silu", x=hex32(spread), y=result(lambda: [ref.silu(v) for v in spread]))
    out.case("activation", "gelu_tanh", kind="gelu_tanh", x=hex32(spread), y=result(lambda: [ref.gelu_tanh(v) for v in spread]))

    a, b = gauss(rng, 24), gauss(rng, 24)
    a += [2.0**-100, -0.0, 0.0, -(2.0**-75)]
    b += [2.0**-49 * 3, 1.0, -1.0, 2.0**-75]
    out.case("mul", "random_and_underflow", a=hex32(a), b=hex32(b), y=result(lambda: ref.finite([ref.mul(p, q) for p, q in zip(a, b)])))
    out.case("add", "random", a=hex32(a), b=hex32(b), y=result(lambda: ref.finite([ref.add(p, q) for p, q in zip(a, b)])))
    big, more = [1.0, 2.0**100], [1.0, 2.0**100]
    out.case("mul", "overflow", a=hex32(big), b=hex32(more), y=result(lambda: ref.finite([ref.mul(p, q) for p, q in zip(big, more)])))
    out.case("add", "overflow", a=hex32([MAX]), b=hex32([2.0**103]), y=result(lambda: ref.finite([ref.add(MAX, 2.0**103)])))
    factor = f32(math.sqrt(640))
    out.case("scale", "random", factor=hex32([factor]), x=hex32(a), y=result(lambda: [ref.mul(v, factor) for v in a]))
    caps = spread[:60] + [f32(v * 30) for v in a]
    for cap in (30.0, f32(0.7)):
        out.case("soft_cap", f"{cap:.1f}", cap=hex32([cap]), x=hex32(caps), y=result(lambda: [ref.capped(v, cap) for v in caps]))

    def router(name, logits, k, normalise):
        experts, weights = ref.router_top_k(logits, k, normalise)
        out.case(
            "router_top_k", name, logits=hex32(logits), k=k, normalise=normalise, experts=experts, weights=hex32(weights)
        )

    for normalise in (False, True):
        tag = "normalised" if normalise else "plain"
        router(f"128_experts/{tag}", gauss(rng, 128, 2.0), 8, normalise)
        router(f"300_experts/{tag}", gauss(rng, 300, 2.0), 6, normalise)
        router(f"ties/{tag}", [1.0, 2.0, 0.5, 2.0, 1.0, 2.0, -3.0, 1.0], 5, normalise)
        router(f"all_of_them/{tag}", gauss(rng, 4), 4, normalise)

    def weighted(name, experts, weights, inputs):
        out.case(
            "weighted_sum",
            name,
            experts=experts,
            weights=hex32(weights),
            inputs=hex32([v for row in inputs for v in row]),
            y=result(lambda: ref.weighted_sum(inputs, experts, weights)),
        )

    weighted("ascending_experts", [17, 3, 99, 4], gauss(rng, 4), [gauss(rng, 16) for _ in range(4)])
    weighted("one_expert_keeps_negative_zero", [5], [0.5], [[-0.0, 1.0, -(2.0**-149), 0.0]])
    weighted("overflow", [1, 0], [2.0, 2.0], [[MAX], [1.0]])
    for name, logits in (("tie", [1.0, 3.0, 2.0, 3.0]), ("zeros", [-1.0, -0.0, 0.0]), ("last", [-3.0, -2.0, -1.0])):
        out.case("arg_max", name, logits=hex32(logits), y=ref.arg_max(logits))
    return out


def attention_file() -> File:
    rng, out = random.Random(7), File()
    kv_heads, head_dim, positions = 2, 3, 780
    width = kv_heads * head_dim

    def halves(scale):
        return [struct.unpack("<H", struct.pack("<e", rng.gauss(0, 1) * scale))[0] for _ in range(positions * width)]

    stored = {"keys": halves(1.0), "values": halves(1.0)}
    for name, words in stored.items():
        out.f16[name] = hex16(words)
    keys, values = (
        [[ref.f16_from_bits(w) for w in words[p * width : (p + 1) * width]] for p in range(positions)]
        for words in stored.values()
    )

    def case(name, n, heads, window=None, soft_cap=None, scale=0.5, size=1.0, query=None):
        query = query or gauss(rng, heads * head_dim, size)
        out.case(
            "attention",
            name,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=hex32([scale]),
            window=window,
            soft_cap=None if soft_cap is None else hex32([soft_cap]),
            keys=f"@keys:{n * width}",
            values=f"@values:{n * width}",
            query=hex32(query),
            y=result(lambda: ref.attention(query, keys[:n], values[:n], heads, kv_heads, head_dim, scale, window, soft_cap)),
        )

    case("first_position", 1, 4)
    case("few", 7, 4, scale=f32(0.3))
    case("one_split_exactly", 256, 2)
    case("one_more_than_a_split", 257, 2)
    case("three_splits", 700, 4, scale=f32(0.3))
    case("four_splits_sharp", 780, 2, size=8.0)
    case("window_across_splits", 600, 2, window=200)
    case("window_from_a_split_edge", 512, 2, window=256)
    case("window_of_one", 300, 2, window=1)
    case("window_of_three", 40, 4, window=3)
    case("window_beyond_the_start", 50, 2, window=64)
    case("soft_cap", 90, 4, soft_cap=2.0, scale=f32(0.7))
    case("soft_cap_and_window", 300, 2, soft_cap=f32(1.7), window=60, scale=f32(0.7))
    case("scores_far_apart", 60, 2, size=200.0)
    case("infinite_scores", 5, 2, query=[MAX, -MAX, MAX] * 2)
    return out


# ---------------------------------------------------------------- §5


def elementary_file() -> File:
    rng, out = random.Random(8), File()
    x = [0.0, -0.0, 1.0, -1.0, 2.0**-149, -104.0, -103.97, -103.5, -105.0, -200.0, -1e30, 88.72, 88.8, 1e30, 200.0]
    x += [ref.H("0x1.62e42ep+6"), ref.H("0x1.62e430p+6"), -87.33655, -87.4, 88.37, 88.376]
    x += [(n + 0.5) * math.log(2) + d for n in range(-150, 128, 6) for d in (-1e-6, 0, 1e-6)]
    x += [rng.uniform(-104, 88.7) for _ in range(200)] + [rng.gauss(0, 1) for _ in range(60)]
    # On and next to the rounding boundary of n.
    x += [rng.choice([-1, 1]) * 2.0 ** rng.uniform(-30, 6) for _ in range(40)]
    x = [f32(v) for v in x]
    out.case("exp", "spread", x=hex32(x), y=hex32([ref.exp(v) for v in x]))
    t = [0.0, -0.0, 0.625, ref.f32_from_bits(ref.f32_bits(0.625) - 1), -0.625, 2.0**-149, -(2.0**-20), 9.0, 10.0, -50.0, 1e30]
    t += [rng.uniform(-0.7, 0.7) for _ in range(120)] + [rng.uniform(-10, 10) for _ in range(80)]
    t = [f32(v) for v in t]
    # Where a polynomial without fma differs.
    while len(t) < 230:
        v = f32(rng.uniform(0.4, 0.625))
        if ref.tanh(v) != ref.tanh(v, lambda a, b, c: ref.add(ref.mul(a, b), c)):
            t.append(v)
    out.case("tanh", "spread", x=hex32(t), y=hex32([ref.tanh(v) for v in t]))
    return out


def main() -> None:
    folder = Path(sys.argv[1])
    for name, build in (
        ("quantise", quantise_file),
        ("matmul", matmul_file),
        ("embed", embed_file),
        ("ops", ops_file),
        ("attention", attention_file),
        ("elementary", elementary_file),
    ):
        build().write(folder / f"{name}.json")


if __name__ == "__main__":
    main()
