"""What each encoding decodes to, by code that Hoist does not share.

`gguf.quants` of the Python package `gguf` (0.19.0) decodes most encodings. Those it lacks (Q1_0, Q2_0, Q8_1, Q8_K, and
APR's own Q4 and Q8) are decoded here with numpy, written from the formats' descriptions and independently of the Rust
code; `check_llama_cpp.py` compares the GGML ones with llama.cpp itself.
"""

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize

# Encodings decoded below: weights and bytes of a block. AprQ8's "block" here is a matrix of 64 weights with its scale.
OWN = {
    "q1_0": (128, 18),
    "q2_0": (64, 18),
    "q8_1": (32, 36),
    "q8_k": (256, 292),
    "apr_q4": (32, 18),
    "apr_q8": (64, 68),
}

GGUF = [
    "f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq2_xxs",
    "iq2_xs", "iq3_xxs", "iq1_s", "iq4_nl", "iq3_s", "iq2_s", "iq4_xs", "iq1_m", "tq1_0", "tq2_0", "mxfp4", "nvfp4",
]  # fmt: skip

ENCODINGS = GGUF + list(OWN)


def block(name: str) -> tuple[int, int]:
    """Weights and bytes of a block."""
    if name in OWN:
        return OWN[name]
    return GGML_QUANT_SIZES[ggml_type(name)]


def ggml_type(name: str) -> GGMLQuantizationType:
    """The type that `gguf` knows by that name in some case."""
    return next(t for t in GGMLQuantizationType if t.name.lower() == name)


def dequantize(name: str, data: bytes) -> np.ndarray:
    """Whole blocks to f32."""
    weights, size = block(name)
    blocks = np.frombuffer(data, dtype=np.uint8).reshape(-1, size)
    with np.errstate(all="ignore"):
        if name in OWN:
            values = OWN_DECODERS[name](blocks)
        elif name in ("f32", "f16"):
            # `gguf` reinterprets these by their last dimension.
            values = gguf_dequantize(blocks.reshape(-1), ggml_type(name))
        else:
            # One row of many blocks for each of its groups of 16 rows.
            rows = 16 if len(blocks) % 16 == 0 else 1
            values = gguf_dequantize(blocks.reshape(rows, -1), ggml_type(name))
    assert values.dtype == np.float32, values.dtype
    assert values.size == len(blocks) * weights
    return values.reshape(-1)


def _f16(column: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(column).view("<f2").astype(np.float32)


def _f32(column: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(column).view("<f4")


def _i8(columns: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(columns).view(np.int8).astype(np.float32)


def _q1_0(blocks: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    d = _f16(blocks[:, :2])
    return np.where(bits == 1, d, -d)


def _q2_0(blocks: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").reshape(len(blocks), 64, 2)
    codes = bits[..., 0].astype(np.float32) + 2 * bits[..., 1].astype(np.float32)
    return _f16(blocks[:, :2]) * (codes - 1)


def _q8_1(blocks: np.ndarray) -> np.ndarray:
    return _f16(blocks[:, :2]) * _i8(blocks[:, 4:])


def _q8_k(blocks: np.ndarray) -> np.ndarray:
    return _f32(blocks[:, :4]) * _i8(blocks[:, 4:260])


def _apr_q4(blocks: np.ndarray) -> np.ndarray:
    even, odd = blocks[:, 2:] % 16, blocks[:, 2:] // 16
    codes = np.stack([even, odd], axis=2).reshape(len(blocks), 32).astype(np.float32)
    return (codes - 8) * _f16(blocks[:, :2])


def _apr_q8(blocks: np.ndarray) -> np.ndarray:
    return _i8(blocks[:, 4:]) * _f32(blocks[:, :4])


OWN_DECODERS = {
    "q1_0": _q1_0,
    "q2_0": _q2_0,
    "q8_1": _q8_1,
    "q8_k": _q8_k,
    "apr_q4": _apr_q4,
    "apr_q8": _apr_q8,
}
