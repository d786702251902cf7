"""Describe the machine: versions, the device, and the rates beside which all figures are set. ``machine.py [dry]``."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

import results
import torch
from clock import Clock, Wall, measure

DRY = "dry" in sys.argv
PACKAGES = ("triton", "transformers", "numpy", "pytest", "hypothesis", "mpmath", "liger-kernel", "quack-kernels",
            "cut-cross-entropy", "trl", "nvidia-cutlass-dsl")  # fmt: skip
TOOLS = {
    "nvcc": ["nvcc", "--version"], "ncu": ["ncu", "--version"], "compute-sanitizer": ["compute-sanitizer", "--version"],
    "nvidia-smi": ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu",
                   "--format=csv,noheader"],
    "g++": ["g++", "--version"],
}  # fmt: skip


def version(name: str) -> str | None:
    """Return what a tool prints about itself: the line whose number looks most like a version."""
    path = shutil.which(name)
    if path is None:
        return None
    done = subprocess.run([path, *TOOLS[name][1:]], capture_output=True, text=True, timeout=20, check=False)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    numbered = [line for line in lines if "ersion" in line and any(c.isdigit() for c in line)]
    return (numbered or lines or [f"exit {done.returncode}"])[0]


def versions() -> dict[str, Any]:
    """Return the versions of tools, and of packages without importing them."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found | {name: version(name) for name in TOOLS} | {"sources": os.environ.get("DMFAST_GPU_KEY")}


def device() -> dict[str, Any]:
    """Return what torch knows of the device."""
    if DRY:
        return {"name": "dry run on the CPU"}
    p = torch.cuda.get_device_properties(0)
    # torch has these names for them
    asked = {"l2_cache": "L2_cache_size", "shared_memory": "shared_memory_per_block_optin"}
    return {"name": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
            "memory": p.total_memory, "cuda": torch.version.cuda, "devices": torch.cuda.device_count(),
            **{name: getattr(p, attribute, None) for name, attribute in asked.items()}}  # fmt: skip


def rates() -> dict[str, Any]:
    """Return the rates of memory in GB/s and of a bf16 product on random data in TFLOP/s.

    Memory is copied, read, and multiplied in place, in buffers far larger than the cache.
    """
    where, clock = ("cpu", Wall()) if DRY else ("cuda", Clock())
    n, side = (2**16, 64) if DRY else (2**30, 8192)
    a = torch.randn(n, device=where)
    b = torch.empty_like(a)
    found = {}
    for name, call, bytes_ in (("copy", lambda i: b.copy_(a), 8 * n), ("read", lambda i: a.sum(), 4 * n),
                               ("in place", lambda i: b.mul_(1.0), 8 * n)):  # fmt: skip
        timed = measure(clock, call)
        found[name] = {"GB/s": round(bytes_ / timed["ms"] / 1e6, 1), **timed}
    x, y = (torch.randn(side, side, device=where).to(torch.bfloat16) for _ in range(2))
    z = torch.empty_like(x)
    timed = measure(clock, lambda i: torch.mm(x, y, out=z))
    return found | {"bf16 product": {"TFLOP/s": round(2 * side**3 / timed["ms"] / 1e9, 1), **timed}}


def main() -> None:
    path = results.folder() / "machine.json"
    found: dict[str, Any] = {"versions": versions(), "device": device()}
    results.write(path, found)  # this is known even if the rest hangs
    found["rates"] = rates()
    results.write(path, found)
    print(found["device"]["name"])
    for name, rate in found["rates"].items():
        print(
            f"{name}: {rate.get('GB/s', rate.get('TFLOP/s'))} {'GB/s' if 'GB/s' in rate else 'TFLOP/s'}, {rate['by']}"
        )


if __name__ == "__main__":
    main()
