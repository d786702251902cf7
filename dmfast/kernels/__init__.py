"""Choose which kernels run. ``backends()`` tells which do; ``use_backend()`` or ``DMFAST_BACKEND`` forces one.

Four backends follow one protocol (``backend.py``): ``cpu`` and ``cuda`` are compiled C++ and CUDA C++, ``triton`` is
for GPUs without the compiled kernels, and ``eager`` is plain torch and the reference of the tests. ``select`` returns
the backend for the logits of a call, and each call asks it once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .backend import Backend as Backend
from .cpu import Cpu
from .cuda import Cuda
from .eager import Eager
from .extension import DTYPES
from .triton import Triton

CPU, CUDA, TRITON, EAGER = Cpu(), Cuda(), Triton(), Eager()
BACKENDS: dict[str, Backend] = {each.name: each for each in (CPU, CUDA, TRITON, EAGER)}
# The backend that ``use_backend`` or DMFAST_BACKEND forces, for all threads. It is a plain global because torch.compile
# guards on globals.
forced: str | None = os.environ.get("DMFAST_BACKEND") or None
_warned: set[str] = set()


@dataclass(frozen=True)
class BackendInfo:
    """A description of one backend: whether it can run here, whether it is in use, and for what or why not."""

    name: str
    available: bool
    in_use: bool  # whether the logits that it supports go to it
    detail: str


def backends() -> dict[str, BackendInfo]:
    """Return every backend of dmfast with whether it is in use here, and if not, why.

    Where one is forced, all others say so. The call creates no context on a GPU that the process does not use yet.
    """
    found = _backends()
    if forced is None:
        return found
    said = f"{forced!r} is forced by use_backend or DMFAST_BACKEND"
    if forced not in BACKENDS:
        said += f", and there are only {', '.join(BACKENDS)}: every call raises"
    elif not found[forced].available:
        said += ", which is not available here: every call raises"
    return {
        name: info if info.in_use else replace(info, detail=f"{said}; {info.detail}") for name, info in found.items()
    }


def _backends() -> dict[str, BackendInfo]:
    reasons = {name: backend.why_not(None) for name, backend in BACKENDS.items()}
    if forced is not None:
        in_use = {forced} if reasons.get(forced, "") is None else set()
    else:
        in_use = {name for name, reason in reasons.items() if reason is None} - {EAGER.name}
        if CUDA.name in in_use:
            in_use.discard(TRITON.name)
        in_use = in_use or {EAGER.name}
    return {
        name: BackendInfo(name, reasons[name] is None, name in in_use, reasons[name] or backend.detail())
        for name, backend in BACKENDS.items()
    }


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend within a ``with`` block.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the backend is not available here; the message gives the reason.
    """
    global forced
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(BACKENDS)}")
    reason = BACKENDS[name].why_not(None)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available here: {reason}")
    before, forced = forced, name
    try:
        yield
    finally:
        forced = before


def select(logits: Tensor, name: str | None = None) -> Backend:
    """Return the backend for these logits. A warning, once per reason, says when the slow one is taken.

    Args:
        logits: only their device and dtype matter.
        name: the backend that the caller wants. It takes precedence over what ``use_backend`` forces.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the forced backend can't take these logits.
    """
    wanted, device = forced if name is None else name, logits.device
    if wanted is None and device.type == "cpu" and logits.dtype in DTYPES and CPU_ALONE:
        return CPU  # the search below gives the same answer, but takes a few microseconds more
    return BACKENDS[_choose(wanted, device, logits.dtype)]


def _choose(wanted: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of a backend, which torch.compile treats as a constant."""
    if wanted is not None and wanted not in BACKENDS:
        raise ValueError(f"there is no backend {wanted!r}; there are {', '.join(BACKENDS)}")
    if wanted is not None:
        reason = BACKENDS[wanted].why_not(device, dtype)
        if reason is not None:
            raise RuntimeError(f"backend {wanted!r} was forced, but {reason}")
        return wanted
    reasons = []
    for backend in _candidates(device):
        reason = backend.why_not(device, dtype)
        if reason is None:
            return backend.name
        if reason not in reasons:
            reasons.append(reason)
    _warn_once("; ".join(reasons))
    return EAGER.name


# torch.compile calls the function while it traces, since a graph can't hold its warning. assume_constant_result would
# set the same attribute, but it would import torch._dynamo.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _candidates(device: torch.device) -> tuple[Backend, ...]:
    if device.type in ("cuda", CUDA.device_type):
        return (CUDA, TRITON) if device.type != "cpu" else (CUDA,)
    return (CPU,) if device.type == "cpu" else (TRITON,)


def _cpu_alone() -> bool:
    """Return whether the CPU kernels exist and no host build of the CUDA kernels takes CPU logits instead."""
    return CPU.why_not(None) is None and CUDA.device_type != "cpu"


CPU_ALONE = _cpu_alone()


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warn_caller(f"dmfast runs on its slow eager backend: {reason}")


def warn_caller(message: str) -> None:
    """Warn at the line that called dmfast, however many frames of dmfast and torch lie between."""
    ours = tuple(str(folder) + os.sep for folder in (Path(__file__).parents[1], Path(torch.__file__).parent))
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
