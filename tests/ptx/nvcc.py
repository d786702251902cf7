"""Compile csrc/cuda to PTX for sm_80, once for each state of the sources, and keep it in DMFAST_PTX or build/ptx."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from cuda_compiler import compiled  # noqa: E402


def ptx(name: str) -> str:
    """Return the PTX of ``loss`` or ``sample``. Raise RuntimeError if there is no nvcc."""
    cache = Path(os.environ.get("DMFAST_PTX", ROOT / "build" / "ptx"))
    return compiled(ROOT, f"csrc/cuda/{name}.cu", "ptx", 80, cache).read_text()
