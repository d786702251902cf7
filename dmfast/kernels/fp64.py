"""Handle devices without fp64: Apple's and Intel's smaller GPUs.

On these devices ``eager`` computes rows in fp32, as exactly as torch's fp32 log_softmax does. Per-sequence values are
fp64 as everywhere, and live on the CPU.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def has_fp64(device: torch.device) -> bool:
    """Return whether tensors of a device may be fp64."""
    if device.type == "xpu" and torch.xpu.device_count():
        return _xpu_has_fp64(device)
    return device.type != "mps"


# torch.compiler.assume_constant_result sets the same attribute, but it would import torch._dynamo
has_fp64._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _xpu_has_fp64(device: torch.device) -> bool:
    return bool(getattr(torch.xpu.get_device_properties(device), "has_fp64", True))


def per_sequence_device(device: torch.device) -> torch.device:
    """Return the device on which the per-sequence values of logits on a device live."""
    return device if device.type == "cpu" or has_fp64(device) else torch.device("cpu")


def widened(x: Tensor) -> Tensor:
    """Return x in fp64, or in fp32 if its device has no fp64."""
    return x.double() if has_fp64(x.device) else x.float()


def devices_without_fp64() -> list[str]:
    """Return the names of this machine's devices that have no fp64."""
    found = ["mps"] if torch.backends.mps.is_available() else []
    devices = [torch.device("xpu", i) for i in range(torch.xpu.device_count())]
    return found + [str(device) for device in devices if not has_fp64(device)]
