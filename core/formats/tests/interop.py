"""Compares what hoist-formats reads and writes with the packages `gguf` and `safetensors`.

usage: interop.py LIST DIR [WRITTEN...]

LIST is the built example `list`. Files are made in DIR by the Python packages and read by LIST; each WRITTEN file, made
by hoist-formats, is read by both. Exits with 1 at the first difference.
"""

import os
import subprocess
import sys

import gguf
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file


def listed(program, path):
    """Tensors of `path` as LIST sees them: {name: (encoding, shape, nbytes)}"""
    out = subprocess.run([program, path], capture_output=True, text=True)
    if out.returncode != 0:
        sys.exit(f"{path} is refused: {out.stderr}")
    tensors = {}
    for line in out.stdout.splitlines():
        name, encoding, rest = line.split(" ", 2)
        shape, place = rest.split("] shard ")
        shape = [int(d) for d in shape[1:].split(",") if d.strip()]
        offset, nbytes = place.split(" ")[1].split("+")
        tensors[name] = (encoding, shape, int(offset), int(nbytes))
    return tensors


def by_gguf(path):
    return {
        t.name: (t.tensor_type.name.lower(), [int(d) for d in reversed(t.shape)], int(t.data_offset), int(t.n_bytes))
        for t in gguf.GGUFReader(path).tensors
    }


def same(what, ours, theirs):
    if ours != theirs:
        sys.exit(f"{what}: {ours} is not {theirs}")
    print(f"{what}: same")


def write_gguf(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_uint8("k.u8", 255)
    writer.add_int8("k.i8", -128)
    writer.add_uint16("k.u16", 65535)
    writer.add_int16("k.i16", -32768)
    writer.add_uint32("k.u32", 2**32 - 1)
    writer.add_int32("k.i32", -(2**31))
    writer.add_uint64("k.u64", 2**64 - 1)
    writer.add_int64("k.i64", -(2**63))
    writer.add_float32("k.f32", 0.5)
    writer.add_float64("k.f64", 0.1)
    writer.add_bool("k.bool", True)
    writer.add_string("k.string", "grüße")
    writer.add_array("k.strings", ["a", "", "ß"])
    writer.add_array("k.ints", [1, -2, 3])
    writer.add_array("k.floats", [0.5, -1.5])
    writer.add_array("k.bools", [True, False])
    rng = np.random.default_rng(0)
    writer.add_tensor("vector", rng.random(7, dtype=np.float32))
    writer.add_tensor("matrix", rng.random((3, 64), dtype=np.float32))
    writer.add_tensor("cube", rng.random((2, 3, 32), dtype=np.float32).astype(np.float16))
    writer.add_tensor("quantised", gguf.quantize(rng.random((3, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0),
                      raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    program, folder, *written = sys.argv[1:]
    path = os.path.join(folder, "python.gguf")
    write_gguf(path)
    same(path, listed(program, path), by_gguf(path))

    path = os.path.join(folder, "python.safetensors")
    arrays = {
        "f32": np.zeros((4, 8), np.float32), "f16": np.ones(3, np.float16), "f64": np.ones(1, np.float64),
        "i64": np.ones((2, 2, 2), np.int64), "u8": np.ones(5, np.uint8), "bool": np.ones(3, np.bool_),
        "scalar": np.array(1, dtype=np.int32),
    }
    save_file(arrays, path, metadata={"format": "np"})
    same(path, {n: (t[1], t[3]) for n, t in listed(program, path).items()},
         {n: (list(a.shape), a.nbytes) for n, a in arrays.items()})

    for path in written:
        ours = listed(program, path)
        if path.endswith(".gguf"):
            same(path, ours, by_gguf(path))
            fields = gguf.GGUFReader(path).fields
            print(f"  {len(fields)} fields:", {k: f.contents() for k, f in list(fields.items())[:40]})
        else:
            with safe_open(path, framework="np") as f:
                theirs = {name: f.get_slice(name).get_shape() for name in f.keys()}
            same(path, {n: t[1] for n, t in ours.items()}, theirs)


if __name__ == "__main__":
    main()
