"""The Triton kernels, for those who have no compiler, and for ROCm and XPU. ``launch.py`` has what ``native.py`` calls;
importing this imports no triton.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import metadata, util

import torch

from ..fp64 import has_fp64, lacking


def interpreted() -> bool:
    """TRITON_INTERPRET=1: Triton's interpreter runs the kernels on CPU tensors, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@cache
def _installed() -> str | None:
    if util.find_spec("triton") is None:
        return "triton is not installed; pip install 'dmfast[triton]'"
    version = metadata.version("triton") if _is_distribution("triton") else ""
    return None if version == "" or _numbers(version) >= (3, 6) else f"triton is {version}, dmfast needs 3.6 or newer"


def _is_distribution(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False  # triton also comes as pytorch-triton-rocm and pytorch-triton-xpu
    return True


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def devices() -> list[str]:
    """The types of the devices here that Triton has kernels for."""
    found = ["cuda"] if torch.cuda.is_available() else []  # ROCm's tensors too
    if any(has_fp64(torch.device("xpu", i)) for i in range(torch.xpu.device_count())):
        found.append("xpu")
    return [*found, "cpu"] if interpreted() else found


def why_not(device: torch.device | None = None) -> str | None:
    """None where the Triton kernels can run (on ``device``, or anywhere here), else the reason that they can't."""
    missing = _installed()
    if missing is not None:
        return missing
    if not devices():
        narrow = [name for name in lacking() if name.startswith("xpu")]
        but = f" and that has fp64, which {', '.join(narrow)} lacks" if narrow else ""
        return f"there is no CUDA, ROCm or XPU device that torch can use{but}"
    if device is None:
        return None
    if device.type not in devices():
        return f"Triton has no kernels for {device.type} tensors"
    return None if has_fp64(device) else f"{device} has no fp64"


# as torch.compiler.assume_constant_result does, which would import torch._dynamo
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]
