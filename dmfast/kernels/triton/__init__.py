"""The Triton kernels, for those who have no compiler, and for ROCm and XPU. ``launch.py`` has what ``native.py`` calls;
importing this imports no triton.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import metadata, util

import torch


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
    """The device types that there are tensors of here and that Triton has kernels for."""
    found = [name for name in ("cuda", "xpu") if getattr(torch, name).is_available()]  # ROCm's tensors are cuda's
    return [*found, "cpu"] if interpreted() else found


@cache
def _fp64(device: torch.device) -> bool:
    """Whether a device has fp64, which Intel's smaller GPUs have not."""
    return device.type != "xpu" or bool(getattr(torch.xpu.get_device_properties(device), "has_fp64", True))


def why_not(device: torch.device | None = None) -> str | None:
    """None where the Triton kernels can run (on ``device``, or anywhere here), else the reason that they can't."""
    missing = _installed()
    if missing is not None:
        return missing
    if not devices():
        return "there is no CUDA, ROCm or XPU device that torch can use"
    if device is None:
        return None
    if device.type not in devices():
        return f"Triton has no kernels for {device.type} tensors"
    return None if _fp64(device) else f"{device} has no fp64"
