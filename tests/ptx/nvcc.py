"""The PTX of csrc/cuda/loss.cu for sm_80, made once for each state of the sources, in DMFAST_PTX or build/ptx."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from build_backend import find_nvcc  # noqa: E402

FLAGS = ["-std=c++17", "-O3", "-diag-suppress=177", "-arch=sm_80", "-ptx"]  # as setup.py


def loss_ptx() -> str:
    """Raises RuntimeError where there is no nvcc."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("there is no nvcc in CUDA_HOME, on PATH or among the PyPI packages")
    version = subprocess.run([nvcc, "--version"], check=True, capture_output=True).stdout
    key = hashlib.sha256(version + " ".join(FLAGS).encode())
    for source in sorted((ROOT / "csrc").rglob("*")):
        if source.suffix in (".h", ".cuh", ".cu"):
            key.update(source.read_bytes())
    cached = Path(os.environ.get("DMFAST_PTX", ROOT / "build" / "ptx")) / f"loss-{key.hexdigest()[:16]}.ptx"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        made = cached.with_suffix(".tmp")
        subprocess.run([nvcc, *FLAGS, str(ROOT / "csrc/cuda/loss.cu"), "-o", str(made)], check=True)
        made.rename(cached)
    return cached.read_text()
