"""llama.cpp's C interface, called in the shared library of the Python package `xllamacpp`.

The package's own interface is a server that gives text and timings; comparing needs logits of every position and exact
tokens. The library exports the C functions of `llama.h`. Its parameter structs grow from version to version, so they are
kept opaque here: taken from the library's own defaults, passed back, and changed only in fields whose place `Model` checks.
"""

import ctypes
import importlib.util
import os
from pathlib import Path

import numpy as np

PARAMS_BYTES = 1024  # more than any of the structs; callees read the part they know


class Params(ctypes.Structure):
    """`llama_model_params` or `llama_context_params`, passed on the stack."""

    _fields_ = [("bytes", ctypes.c_uint8 * PARAMS_BYTES)]


class Batch(ctypes.Structure):
    """`llama_batch` of `llama.h`."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    ]


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


@LOG
def quiet(_level, _text, _data):
    """Drops what the library would print."""


def load_library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise SystemExit("the Python package xllamacpp is not installed")
    library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    pointer, i32 = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in [
        ("llama_log_set", None, [LOG, pointer]),
        ("llama_backend_init", None, []),
        ("llama_model_default_params", Params, []),
        ("llama_context_default_params", Params, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, Params]),
        ("llama_model_free", None, [pointer]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", i32, [pointer]),
        ("llama_vocab_is_eog", ctypes.c_bool, [pointer, i32]),
        ("llama_init_from_model", pointer, [pointer, Params]),
        ("llama_free", None, [pointer]),
        ("llama_n_ctx", ctypes.c_uint32, [pointer]),
        ("llama_n_batch", ctypes.c_uint32, [pointer]),
        ("llama_n_ubatch", ctypes.c_uint32, [pointer]),
        ("llama_set_n_threads", None, [pointer, i32, i32]),
        ("llama_n_threads", i32, [pointer]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
        ("llama_batch_get_one", Batch, [pointer, i32]),
        ("llama_decode", i32, [pointer, Batch]),
        ("llama_synchronize", None, [pointer]),
        ("llama_get_logits_ith", pointer, [pointer, i32]),
        ("llama_tokenize", i32, [pointer, ctypes.c_char_p, i32, pointer, i32, ctypes.c_bool, ctypes.c_bool]),
        ("llama_detokenize", i32, [pointer, pointer, i32, pointer, i32, ctypes.c_bool, ctypes.c_bool]),
    ]:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if not os.environ.get("LLAMA_CPP_LOG"):
        library.llama_log_set(quiet, None)
    library.llama_backend_init()
    return library


class Model:
    """A model and one context of `context` positions; `threads` for prompts and decoding alike."""

    def __init__(self, path: str, threads: int, context: int = 1024):
        self.library = load_library()
        self.model = self.library.llama_model_load_from_file(os.fsencode(path), self.library.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self.vocab = self.library.llama_model_get_vocab(self.model)
        self.vocab_size = self.library.llama_vocab_n_tokens(self.vocab)
        params = self.library.llama_context_default_params()
        words = np.frombuffer(params, dtype=np.uint32)
        # n_ctx, n_batch, n_ubatch, n_seq_max, then (n_rs_seq, n_outputs_max, n_outputs_max_per_seq), then two thread counts.
        if words[:4].tolist() != [512, 2048, 512, 1] or words[4:9].tolist() != [0, 0, 1, 4, 4]:
            raise SystemExit(f"this version of llama.cpp has other context parameters: {words[:10].tolist()}")
        words[0:3] = context, context, min(context, 512)
        words[5:7] = context, context
        words[7:9] = threads
        self.context = self.library.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit("llama.cpp cannot make a context")
        self.library.llama_set_n_threads(self.context, threads, threads)
        if self.library.llama_n_threads(self.context) != threads or self.library.llama_n_ctx(self.context) < context:
            raise SystemExit("llama.cpp did not take the context parameters")

    def close(self):
        self.library.llama_free(self.context)
        self.library.llama_model_free(self.model)

    def reset(self):
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def tokenize(self, text: str) -> list[int]:
        """Tokens with the start token where the file asks for one; special tokens in the text are plain text."""
        data = text.encode()
        out = np.empty(len(data) + 8, dtype=np.int32)
        count = self.library.llama_tokenize(self.vocab, data, len(data), out.ctypes.data, out.size, True, False)
        return out[:count].tolist()

    def text(self, tokens: list[int]) -> str:
        ids = np.array(tokens, dtype=np.int32)
        out = ctypes.create_string_buffer(64 * len(tokens) + 64)
        count = self.library.llama_detokenize(self.vocab, ids.ctypes.data, ids.size, out, len(out), False, True)
        return out.raw[:count].decode(errors="replace")

    def decode(self, tokens: list[int], every: bool = False) -> None:
        """Appends tokens to the sequence; logits of the last one, or of `every` one, become readable."""
        ids = np.array(tokens, dtype=np.int32)
        batch = self.library.llama_batch_get_one(ids.ctypes.data, ids.size)
        flags = np.ones(ids.size, dtype=np.int8)
        if every:
            batch.logits = flags.ctypes.data
        status = self.library.llama_decode(self.context, batch)
        if status != 0:
            raise SystemExit(f"llama_decode failed with {status}")
        self.library.llama_synchronize(self.context)

    def logits(self, index: int = -1) -> np.ndarray:
        """[vocab_size], a view that the next `decode` overwrites."""
        at = self.library.llama_get_logits_ith(self.context, index)
        if not at:
            raise SystemExit(f"no logits at {index}")
        return np.ctypeslib.as_array(ctypes.cast(at, ctypes.POINTER(ctypes.c_float)), (self.vocab_size,))

    def is_end(self, token: int) -> bool:
        return self.library.llama_vocab_is_eog(self.vocab, token)
