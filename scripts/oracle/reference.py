"""The numerics contract `docs/numerics.md`, a second time: Python integers and exact roundings.

Written from that page alone, to judge the oracle in Rust. An f32 is a Python float that holds one exactly; every
operation below computes the exact result on integers and rounds it once. Weights are not decoded here: the Python package
`gguf` does that, asked for the values that a block has when its scales are 1 (see `Quantized`).
"""

import math
import struct

import gguf
import numpy as np

# ---------------------------------------------------------------- f32 and f16


class NonFinite(Exception):
    """An operation's result is NaN or infinite."""


def f32_bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def f32_from_bits(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def dyadic(x: float) -> tuple[int, int]:
    """A finite float as integer · 2^exponent."""
    m, e = math.frexp(x)
    return int(m * (1 << 53)), e - 53


def round_to(m: int, e: int, precision: int, lowest: int, highest: int) -> float:
    """m · 2^e to the nearest float of that many bits, ties to even; infinity at 2^highest and above."""
    if m == 0:
        return 0.0
    sign, m = (-1.0, -m) if m < 0 else (1.0, m)
    drop = max(m.bit_length() - precision, lowest - e)
    if drop > 0:
        kept, rest = m >> drop, m & ((1 << drop) - 1)
        half = 1 << (drop - 1)
        m, e = kept + (rest > half or (rest == half and kept & 1)), e + drop
    if m.bit_length() + e > highest:
        return sign * math.inf
    return sign * math.ldexp(m, e)


def round32(m: int, e: int) -> float:
    return round_to(m, e, 24, -149, 128)


def is_negative(x: float) -> bool:
    return math.copysign(1.0, x) < 0


def fma(a: float, b: float, c: float) -> float:
    if not (math.isfinite(a) and math.isfinite(b) and math.isfinite(c)):
        return a * b + c
    (ma, ea), (mb, eb), (mc, ec) = dyadic(a), dyadic(b), dyadic(c)
    mp, ep = ma * mb, ea + eb
    e = min(ep, ec)
    total = (mp << (ep - e)) + (mc << (ec - e))
    if total == 0:
        if mp == 0 and mc == 0:
            product_negative = is_negative(a) != is_negative(b)
            return -0.0 if product_negative and is_negative(c) else 0.0
        return 0.0
    y = round32(total, e)
    return -0.0 if y == 0.0 and total < 0 else y


def add(a: float, b: float) -> float:
    return fma(a, 1.0, b)


def sub(a: float, b: float) -> float:
    return fma(b, -1.0, a)


def mul(a: float, b: float) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return a * b
    (ma, ea), (mb, eb) = dyadic(a), dyadic(b)
    y = abs(round32(ma * mb, ea + eb))
    return -y if is_negative(a) != is_negative(b) else y


def div(a: float, b: float) -> float:
    if not math.isfinite(a) or math.isnan(b) or b == 0.0:
        with np.errstate(all="ignore"):
            return float(np.float32(a) / np.float32(b))
    if math.isinf(b):
        y = 0.0
    else:
        (ma, ea), (mb, eb) = dyadic(abs(a)), dyadic(abs(b))
        quotient, rest = divmod(ma << 120, mb)
        # A sticky bit stands for what is left.
        y = round32(quotient << 1 | (rest != 0), ea - eb - 121)
    return -y if is_negative(a) != is_negative(b) else y


def sqrt(x: float) -> float:
    if x <= 0.0 or not math.isfinite(x):
        return x if x == 0.0 or x == math.inf else math.nan
    m, e = dyadic(x)
    m, e = m << 120, e - 120
    if e % 2:
        m, e = m << 1, e - 1
    root = math.isqrt(m)
    return round32(root << 1 | (root * root != m), e // 2 - 1)


def integer(n: int) -> float:
    return round32(n, 0)


def finite(values: list[float]) -> list[float]:
    if not all(math.isfinite(v) for v in values):
        raise NonFinite
    return values


def f16_parts(bits: int) -> tuple[int, int]:
    """An f16 as m · 2^e, subnormals not normalised."""
    field, fraction = bits >> 10 & 31, bits & 1023
    assert field != 31
    m = fraction if field == 0 else fraction + 1024
    return (-m if bits >> 15 else m), max(field, 1) - 25


def f16_from_bits(bits: int) -> float:
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def to_f16(x: float) -> float:
    """StoreKv: the f16 nearest to x, as a float."""
    if not math.isfinite(x):
        raise NonFinite
    m, e = dyadic(x)
    y = round_to(m, e, 11, -24, 16)
    if math.isinf(y):
        raise NonFinite
    return math.copysign(y, x)


# ---------------------------------------------------------------- §1.1 activations


def quantise(x: list[float]) -> list[dict]:
    assert x and len(x) % 32 == 0
    finite(x)
    segments = []
    for start in range(0, len(x), 256):
        segment = x[start : start + 256]
        a = [max(abs(v) for v in segment[j : j + 32]) for j in range(0, len(segment), 32)]
        d0 = div(max(a), 2032.0)
        if d0 < 2.0**-126:
            segments.append({"m": 0, "e": -133, "u": [1] * len(a), "q": [0] * len(segment)})
            continue
        d = f32_from_bits((f32_bits(d0) + 0xFFFF) & 0xFFFF0000)
        fraction, exponent = math.frexp(d)
        m, e = int(fraction * 256), exponent - 8
        assert 128 <= m <= 255 and math.ldexp(m, e) == d
        u = []
        for largest in a:
            n = 1
            while largest > mul(float(n * 127), d):
                n += 1
            assert n <= 16
            u.append(n)
        q = []
        for i, v in enumerate(segment):
            r = div(1.0, mul(float(u[i // 32]), d))
            p = mul(v, r)
            n = round(p)  # Python rounds ties to even
            assert -127 <= n <= 127
            q.append(n)
        segments.append({"m": m, "e": e, "u": u, "q": q})
    return segments


# ---------------------------------------------------------------- §1.2 weights

F16_ONE = 0x3C00


class Quantized:
    """An encoding: where its scales stand in a block, and how to read the rest.

    `products(row)` are the integers `sub-scale · w` of a row, exponent shift taken out: the values `gguf` gives when every
    scale is 1. So nothing of the bit packing is written down twice.
    """

    def __init__(self, name, block, nbytes, kind, scales=(), mins=(), shift=0, part=32, decode=None):
        self.name, self.block, self.nbytes, self.kind = name, block, nbytes, kind
        self.scales, self.mins, self.shift, self.part, self.decode = scales, mins, shift, part, decode

    # -- scale fields

    def get_scales(self, block: bytes) -> list[tuple[int, int]]:
        """Each scale of a block as (m, e)."""
        if self.name == "iq1_m":
            words = struct.unpack("<4H", block[48:56])
            bits = sum((w >> 12) << (4 * i) for i, w in enumerate(words))
            return [f16_parts(bits)]
        if self.name == "mxfp4":
            assert block[0] != 255
            return [(1, block[0] - 128)]
        if self.name == "nvfp4":
            parts = []
            for byte in block[:4]:
                field, fraction = byte >> 3 & 15, byte & 7
                m = 0 if byte == 0x7F else fraction if field == 0 else fraction + 8
                parts.append((m, max(field, 1) - 11))
            return parts
        return [f16_parts(struct.unpack("<H", block[at : at + 2])[0]) for at in self.scales]

    def set_scales(self, block: bytearray, bits: int) -> None:
        """Sets every scale: f16 bits, or the byte of MXFP4 and NVFP4."""
        if self.name == "iq1_m":
            for i in range(4):
                (word,) = struct.unpack_from("<H", block, 48 + 2 * i)
                struct.pack_into("<H", block, 48 + 2 * i, word & 0x0FFF | (bits >> (4 * i) & 15) << 12)
        elif self.name == "mxfp4":
            block[0] = bits
        elif self.name == "nvfp4":
            block[0:4] = bytes([bits]) * 4
        for at in self.scales:
            struct.pack_into("<H", block, at, bits)

    def get_mins(self, block: bytes) -> list[tuple[int, int]]:
        return [f16_parts(struct.unpack("<H", block[at : at + 2])[0]) for at in self.mins]

    def set_mins(self, block: bytearray, bits: int) -> None:
        for at in self.mins:
            struct.pack_into("<H", block, at, bits)

    # -- values

    def values(self, block: bytes) -> list[float]:
        """§1.4: GGML's f32 values of a block."""
        if self.decode:
            (d,) = struct.unpack("<e", block[:2])
            return [mul(d, float(w)) for w in self.decode(block)]
        raw = np.frombuffer(bytes(block), dtype=np.uint8).reshape(1, -1)
        quantization = gguf.GGMLQuantizationType[self.name.upper()]
        return [float(v) for v in gguf.quants.dequantize(raw, quantization).reshape(-1)]

    def products(self, block: bytes) -> list[int]:
        if self.decode:
            return self.decode(block)
        unit = bytearray(block)
        self.set_scales(unit, {"mxfp4": 128, "nvfp4": 0x40}.get(self.name, F16_ONE))
        self.set_mins(unit, 0)
        scaled = [math.ldexp(v, -self.shift) for v in self.values(unit)]
        assert all(v == int(v) for v in scaled)
        return [int(v) for v in scaled]

    def sub_mins(self, block: bytes) -> list[int]:
        """Of super-blocks: the integer that dmin is multiplied with, for each weight."""
        unit = bytearray(block)
        self.set_scales(unit, 0)
        self.set_mins(unit, F16_ONE)
        return [-int(v) for v in self.values(unit)]


def q1_0(b: bytes) -> list[int]:
    return [1 if b[2 + i // 8] >> (i % 8) & 1 else -1 for i in range(128)]


def q2_0(b: bytes) -> list[int]:
    return [(b[2 + i // 4] >> (2 * (i % 4)) & 3) - 1 for i in range(64)]


def apr_q4(b: bytes) -> list[int]:
    return [(b[2 + i // 2] >> (4 * (i % 2)) & 15) - 8 for i in range(32)]


SUPER, ALIGNED, MATRIX = "super-block", "aligned", "matrix"

ENCODINGS = {
    q.name: q
    for q in [
        Quantized("q4_0", 32, 18, ALIGNED, scales=(0,)),
        Quantized("q4_1", 32, 20, ALIGNED, scales=(0,), mins=(2,)),
        Quantized("q5_0", 32, 22, ALIGNED, scales=(0,)),
        Quantized("q5_1", 32, 24, ALIGNED, scales=(0,), mins=(2,)),
        Quantized("q8_0", 32, 34, ALIGNED, scales=(0,)),
        Quantized("iq4_nl", 32, 18, ALIGNED, scales=(0,)),
        Quantized("mxfp4", 32, 17, ALIGNED),
        Quantized("nvfp4", 64, 36, ALIGNED, part=16),
        Quantized("q1_0", 128, 18, ALIGNED, scales=(0,), decode=q1_0),
        Quantized("q2_0", 64, 18, ALIGNED, scales=(0,), decode=q2_0),
        Quantized("apr_q4", 32, 18, ALIGNED, scales=(0,), decode=apr_q4),
        Quantized("q2_k", 256, 84, SUPER, scales=(80,), mins=(82,), part=16),
        Quantized("q3_k", 256, 110, SUPER, scales=(108,), part=16),
        Quantized("q4_k", 256, 144, SUPER, scales=(0,), mins=(2,)),
        Quantized("q5_k", 256, 176, SUPER, scales=(0,), mins=(2,)),
        Quantized("q6_k", 256, 210, SUPER, scales=(208,), part=16),
        Quantized("iq4_xs", 256, 136, SUPER, scales=(0,)),
        Quantized("iq3_s", 256, 110, SUPER, scales=(0,)),
        Quantized("iq3_xxs", 256, 98, SUPER, scales=(0,), shift=-2),
        Quantized("iq2_xxs", 256, 66, SUPER, scales=(0,), shift=-3),
        Quantized("iq2_xs", 256, 74, SUPER, scales=(0,), shift=-3, part=16),
        Quantized("iq2_s", 256, 82, SUPER, scales=(0,), shift=-3, part=16),
        Quantized("iq1_s", 256, 50, SUPER, scales=(0,), shift=-3),
        Quantized("iq1_m", 256, 56, SUPER, shift=-3, part=16),
        Quantized("tq1_0", 256, 54, SUPER, scales=(52,), shift=-8),
        Quantized("tq2_0", 256, 66, SUPER, scales=(64,), shift=-8),
    ]
}


def blocks_of(encoding: Quantized, row: bytes) -> list[bytes]:
    return [row[i : i + encoding.nbytes] for i in range(0, len(row), encoding.nbytes)]


def weight_segments(encoding: Quantized, row: bytes) -> list[dict]:
    """A row as segments: e, e' (or None), and for each weight the integers c · w and k."""
    # One entry for each run of `part` weights: scale, min, c·w without the scale, k without the min.
    runs = []
    for block in blocks_of(encoding, row):
        products = encoding.products(block)
        scales, mins = encoding.get_scales(block), encoding.get_mins(block)
        sub_mins = encoding.sub_mins(block) if encoding.kind == SUPER and mins else [1] * len(products)
        count = len(products) // encoding.part
        for i in range(count):
            span = slice(i * encoding.part, (i + 1) * encoding.part)
            runs.append((scales[i * len(scales) // count], mins[0] if mins else None, products[span], sub_mins[span]))
        check_values(encoding, block, runs[-count:])

    segments = []
    per_segment = 256 // encoding.part
    for start in range(0, len(runs), per_segment):
        group = runs[start : start + per_segment]
        cw, k = [], []
        if encoding.kind == SUPER:
            scale, minimum = group[0][0], group[0][1]
            factor = 256 if encoding.name in ("tq1_0", "tq2_0") else 1  # the shift of −8 is in c
            e, e_min = scale[1] + encoding.shift, minimum and minimum[1]
            for scale, minimum, products, sub_mins in group:
                # `products` came with TQ's 2^8 already: gguf's value times 2^8.
                assert factor == 1 or all(p % factor == 0 for p in products)
                cw += [scale[0] * p for p in products]
                k += [minimum[0] * s if minimum else 0 for s in sub_mins]
        else:
            top = max(scale[1] for scale, *_ in group)
            e = top - 8
            e_min = None
            if group[0][1]:
                top_min = max(minimum[1] for _, minimum, *_ in group)
                e_min = top_min - 8
            for scale, minimum, products, _ in group:
                c = (scale[0] << 8) >> min(top - scale[1], 31)
                cw += [c * p for p in products]
                shifted = ((-minimum[0]) << 8) >> min(top_min - minimum[1], 31) if minimum else 0
                k += [shifted] * len(products)
        segments.append({"e": e, "e_min": e_min, "cw": cw, "k": k})
    return segments


def check_values(encoding: Quantized, block: bytes, runs: list) -> None:
    """The integers, before any alignment, are the values of the block."""
    exact = []
    for (m, e), minimum, products, sub_mins in runs:
        for product, sub_min in zip(products, sub_mins):
            value, exponent = m * product, e + (encoding.shift if encoding.kind == SUPER else 0)
            if minimum:
                k = minimum[0] * sub_min * (1 if encoding.kind == SUPER else -1)
                low = min(exponent, minimum[1])
                value = (value << (exponent - low)) - (k << (minimum[1] - low))
                exponent = low
            exact.append(round32(value, exponent))
    found = encoding.values(block)
    assert exact == found, (encoding.name, [(a, b) for a, b in zip(exact, found) if a != b][:3])


# ---------------------------------------------------------------- §1.3 the sum


def row_sum(weights: list[dict], x: list[dict]) -> tuple[int, int]:
    """acc and E_w + E_a."""
    e_w = max(e for s in weights for e in (s["e"], s["e_min"]) if e is not None)
    e_a = max(s["e"] for s in x)
    acc = 0
    for w, a in zip(weights, x):
        u = [a["u"][i // 32] for i in range(len(a["q"]))]
        i_sum = sum(u * c * q for u, c, q in zip(u, w["cw"], a["q"]))
        j_sum = sum(u * k * q for u, k, q in zip(u, w["k"], a["q"]))
        acc += (a["m"] * i_sum) >> min(e_w - w["e"] + e_a - a["e"], 63)
        if w["e_min"] is not None:
            acc -= (a["m"] * j_sum) >> min(e_w - w["e_min"] + e_a - a["e"], 63)
    assert abs(acc) < 2**62
    return acc, e_w + e_a


def scaled(acc: int, exponent: int) -> float:
    """acc to f32, then times 2^exponent, rounded each time."""
    m, e = dyadic(integer(acc))
    y = round32(m, e + exponent)
    return -0.0 if y == 0.0 and acc < 0 else y


def with_bias(y: list[float], bias: list[float] | None) -> list[float]:
    return finite([add(v, b) for v, b in zip(y, bias)] if bias else y)


def matmul(encoding: str, rows: int, cols: int, weights: bytes, x: list[float], bias=None) -> list[float]:
    """§1.3 or §2, weights in canonical bytes."""
    if encoding in FLOATS:
        matrix = widen(encoding, weights)
        return with_bias([dot64(matrix[r * cols : (r + 1) * cols], x) for r in range(rows)], bias)
    activations = quantise(x)
    if encoding == "apr_q8":
        (scale,) = struct.unpack("<f", weights[:4])
        y = []
        for r in range(rows):
            row = weights[4 + r * cols : 4 + (r + 1) * cols]
            w = [b - 256 if b > 127 else b for b in row]
            segments = [
                {"e": 0, "e_min": None, "cw": w[i : i + 256], "k": [0] * 256} for i in range(0, cols, 256)
            ]
            y.append(mul(scaled(*row_sum(segments, activations)), scale))
        return with_bias(y, bias)
    coding = ENCODINGS[encoding]
    length = cols // coding.block * coding.nbytes
    segments = [weight_segments(coding, weights[r * length : (r + 1) * length]) for r in range(rows)]
    return with_bias([scaled(*row_sum(s, activations)) for s in segments], bias)


def embed(encoding: str, cols: int, weights: bytes, row: int) -> list[float]:
    """§1.4"""
    if encoding in FLOATS:
        return widen(encoding, weights)[row * cols : (row + 1) * cols]
    if encoding == "apr_q8":
        (scale,) = struct.unpack("<f", weights[:4])
        return [mul(float(b - 256 if b > 127 else b), scale) for b in weights[4 + row * cols : 4 + (row + 1) * cols]]
    coding = ENCODINGS[encoding]
    length = cols // coding.block * coding.nbytes
    return [v for block in blocks_of(coding, weights[row * length : (row + 1) * length]) for v in coding.values(block)]


# ---------------------------------------------------------------- §2 and §3

FLOATS = {"f32": 4, "f16": 2, "bf16": 2}


def widen(encoding: str, data: bytes) -> list[float]:
    if encoding == "f32":
        return list(struct.unpack(f"<{len(data) // 4}f", data))
    words = struct.unpack(f"<{len(data) // 2}H", data)
    return [f16_from_bits(w) if encoding == "f16" else f32_from_bits(w << 16) for w in words]


def fold(acc: list[float]) -> float:
    h = len(acc) // 2
    while h:
        for i in range(h):
            acc[i] = add(acc[i], acc[i + h])
        h //= 2
    return acc[0]


def dot64(w: list[float], x: list[float]) -> float:
    acc = [0.0] * 64
    for i, (a, b) in enumerate(zip(w, x, strict=True)):
        acc[i % 64] = fma(a, b, acc[i % 64])
    return fold(acc)


def sum256(x: list[float]) -> float:
    acc = [0.0] * 256
    for i, v in enumerate(x):
        acc[i % 256] = add(acc[i % 256], v)
    return fold(acc)


def squares256(x: list[float]) -> float:
    acc = [0.0] * 256
    for i, v in enumerate(x):
        acc[i % 256] = fma(v, v, acc[i % 256])
    return fold(acc)


# ---------------------------------------------------------------- §5 elementary functions

H = float.fromhex


def exp(x: float) -> float:
    x = max(-104.0, min(x, H("0x1.62e42ep+6")))
    n = sub(fma(x, H("0x1.715476p+0"), 12582912.0), 12582912.0)
    r = fma(n, -H("0x1.62e430p-1"), x)
    r = fma(n, H("0x1.05c610p-29"), r)
    p = H("0x1.6a2352p-10")
    for c in ("0x1.123a6cp-7", "0x1.5558f4p-5", "0x1.555490p-3", "0x1.fffffcp-2"):
        p = fma(p, r, H(c))
    y = add(fma(mul(r, r), p, r), 1.0)
    n = int(n)
    return mul(mul(y, 2.0 ** (n >> 1)), 2.0 ** (n - (n >> 1)))


def tanh(x: float, step=fma) -> float:
    """`step`: what a step of Horner's rule is, fma by the contract."""
    a = abs(x)
    if a < 0.625:
        z = mul(a, a)
        q = H("-0x1.6e1a18p-8")
        for c in ("0x1.50701ep-6", "-0x1.b7fa90p-5", "0x1.11053cp-3", "-0x1.55552ap-2"):
            q = step(q, z, H(c))
        t = fma(mul(a, z), q, a)
    else:
        t = sub(1.0, div(2.0, add(exp(add(a, a)), 1.0)))
    return math.copysign(t, x)


# ---------------------------------------------------------------- §4 operations


def rms_norm(x, gamma, eps):
    inv = div(1.0, sqrt(add(div(squares256(x), float(len(x))), eps)))
    return finite([mul(mul(v, inv), g) for v, g in zip(x, gamma, strict=True)])


def layer_norm(x, gamma, bias, eps):
    n = float(len(x))
    mean = div(sum256(x), n)
    c = [sub(v, mean) for v in x]
    inv = div(1.0, sqrt(add(div(squares256(c), n), eps)))
    return finite([fma(mul(v, inv), g, b) for v, g, b in zip(c, gamma, bias, strict=True)])


def rope(value, table, style, heads, n_rot):
    out = list(value)
    head_dim = len(value) // heads
    for h in range(heads):
        for j in range(n_rot // 2):
            a, b = (2 * j, 2 * j + 1) if style == "interleaved" else (j, j + n_rot // 2)
            a, b = h * head_dim + a, h * head_dim + b
            x0, x1, c, s = value[a], value[b], table[2 * j], table[2 * j + 1]
            out[a] = fma(x0, c, -mul(x1, s))
            out[b] = fma(x0, s, mul(x1, c))
    return finite(out)


def capped(x, cap):
    return mul(cap, tanh(div(x, cap)))


def attention(query, keys, values, heads, kv_heads, head_dim, scale, window=None, soft_cap=None):
    """`keys`, `values`: a list for each position, as stored. The token is the last position."""
    t = len(keys) - 1
    visible = [p for p in range(t + 1) if window is None or p > t - window]
    out = []
    for h in range(heads):
        q = query[h * head_dim : (h + 1) * head_dim]
        at = h // (heads // kv_heads) * head_dim
        scores = {}
        for p in visible:
            s = 0.0
            for i in range(head_dim):
                s = fma(q[i], keys[p][at + i], s)
            s = mul(s, scale)
            scores[p] = s if soft_cap is None else capped(s, soft_cap)
        splits = []
        for split in range(t // 256 + 1):
            inside = [p for p in visible if p // 256 == split]
            if not inside:
                continue
            m = max(scores[p] for p in inside)
            w = [0.0] * 256
            for p in inside:
                w[p % 256] = exp(sub(scores[p], m))
            acc = [0.0] * 64
            for place in range(256):
                acc[place % 64] = add(acc[place % 64], w[place])
            o = [0.0] * head_dim
            for p in inside:
                for i in range(head_dim):
                    o[i] = fma(w[p % 256], values[p][at + i], o[i])
            splits.append((m, fold(acc), o))
        top = max(m for m, _, _ in splits)
        total, merged = 0.0, [0.0] * head_dim
        for m, length, o in splits:
            f = exp(sub(m, top))
            total = fma(length, f, total)
            merged = [fma(part, f, v) for part, v in zip(o, merged)]
        r = div(1.0, total)
        out += [mul(v, r) for v in merged]
    return finite(out)


def silu(x):
    return div(x, add(1.0, exp(-x)))


def gelu_tanh(x):
    u = mul(x, fma(mul(x, x), H("0x1.2444f2p-4"), H("0x1.988454p+0")))
    return div(x, add(1.0, exp(-u)))


def router_top_k(logits, k, normalise):
    m = max(logits)
    p = [exp(sub(v, m)) for v in logits]
    total = sum256(p)
    p = finite([div(v, total) for v in p])
    chosen = sorted(range(len(p)), key=lambda e: (-p[e], e))[:k]
    weights = [p[e] for e in chosen]
    if normalise:
        total = 0.0
        for w in weights:
            total = add(total, w)
        weights = [div(w, total) for w in weights]
    return chosen, finite(weights)


def weighted_sum(inputs, experts, weights):
    order = sorted(range(len(experts)), key=lambda s: experts[s])
    out = []
    for i in range(len(inputs[0])):
        acc = mul(weights[order[0]], inputs[order[0]][i])
        for s in order[1:]:
            acc = fma(weights[s], inputs[s][i], acc)
        out.append(acc)
    return finite(out)


def arg_max(logits):
    return logits.index(max(logits))
