"""What a result must say about where it came from."""

import importlib.metadata
import os
import platform
import subprocess


def output(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def here() -> dict:
    """The commit and the machine."""
    cpu = {}
    for line in output("lscpu").splitlines():
        key, _, value = line.partition(":")
        cpu.setdefault(key.strip(), value.strip())
    flags = cpu.get("Flags", "").split()
    wanted = ["avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni"]
    here = os.path.dirname(os.path.abspath(__file__))
    return {
        "commit": output("git", "-C", here, "rev-parse", "HEAD"),
        "machine": {
            "cpu": cpu.get("Model name"),
            "family_model_stepping": [cpu.get(k) for k in ("CPU family", "Model", "Stepping")],
            "cores": os.cpu_count(),
            "flags": [flag for flag in wanted if flag in flags],
            "flags_missing": [flag for flag in wanted if flag not in flags],
            "l3": cpu.get("L3 cache"),
            "hypervisor": cpu.get("Hypervisor vendor"),
            "kernel": platform.release(),
        },
    }


def describe() -> dict:
    """The same, and what Hoist is compared with."""
    return here() | {"xllamacpp": importlib.metadata.version("xllamacpp")}


def load_average() -> list[float]:
    return [round(x, 2) for x in os.getloadavg()]
