"""Devices without fp64 (Apple's, Intel's smaller GPUs). There rows go through ``eager`` in fp32, as exact as torch's
fp32 log_softmax, and what belongs to a sequence lives on the CPU, in fp64 as everywhere."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def has_fp64(device: torch.device) -> bool:
    """Return whether tensors of a device may be fp64."""
    if device.type == "xpu" and torch.xpu.device_count():
        return _xpu_has_fp64(device)
    return device.type != "mps"


# as torch.compiler.assume_constant_result does, which would import torch._dynamo
has_fp64._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _xpu_has_fp64(device: torch.device) -> bool:
    return bool(getattr(torch.xpu.get_device_properties(device), "has_fp64", True))


def per_sequence_device(device: torch.device) -> torch.device:
    """Return where the per-sequence values of logits on a device live."""
    return device if device.type == "cpu" or has_fp64(device) else torch.device("cpu")


def widened(x: Tensor) -> Tensor:
    """Return x in fp64, or in fp32 where its device has none."""
    return x.double() if has_fp64(x.device) else x.float()


def devices_without_fp64() -> list[str]:
    """Return the devices here that have no fp64."""
    found = ["mps"] if torch.backends.mps.is_available() else []
    devices = [torch.device("xpu", i) for i in range(torch.xpu.device_count())]
    return found + [str(device) for device in devices if not has_fp64(device)]
