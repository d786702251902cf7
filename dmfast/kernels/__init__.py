"""Which kernels run: ``backends()`` tells, ``use_backend()`` or ``DMFAST_BACKEND`` forces.

One interface, several backends: ``cpu`` and ``cuda`` (compiled C++ and CUDA C++, ``native.py``), ``triton`` (for GPUs
without the compiled ones, ``triton/``) and ``eager`` (plain torch, ``eager.py``, also the oracle of the tests).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import fp64, native, triton

NAMES = ("cpu", "cuda", "triton", "eager")
_warned: set[str] = set()


@dataclass(frozen=True)
class BackendInfo:
    """One backend: whether it can run here, whether it does, for what, and if not why."""

    name: str
    available: bool
    in_use: bool  # taken for the logits that it supports
    detail: str


def backends() -> dict[str, BackendInfo]:
    """Every backend of dmfast, whether it is in use here and if not why. Where one is forced, all others say so."""
    found = _backends()
    if native.forced is None:
        return found
    forced = f"{native.forced!r} is forced by use_backend or DMFAST_BACKEND"
    if native.forced not in NAMES:
        forced += f", and there are only {', '.join(NAMES)}: every call raises"
    elif not found[native.forced].available:
        forced += ", which is not available here: every call raises"
    return {
        name: info if info.in_use else replace(info, detail=f"{forced}; {info.detail}") for name, info in found.items()
    }


def _backends() -> dict[str, BackendInfo]:
    missing = native.why_unavailable()
    use_cpu = missing is None and native.forced in (None, "cpu")
    no_cuda = native.why_not_cuda(torch.cuda.current_device() if torch.cuda.is_initialized() else 0)  # type: ignore[no-untyped-call]
    use_cuda = no_cuda is None and native.forced in (None, "cuda")
    no_triton = triton.why_not()
    use_triton = no_triton is None and (native.forced == "triton" or (native.forced is None and no_cuda is not None))
    devices = "in its interpreter" if triton.interpreted() else "on " + " and ".join(triton.devices())
    narrow = fp64.lacking()
    eager = "plain torch: other devices, fp64 logits, the oracle of the tests"
    if narrow:
        eager += f"; {', '.join(narrow)}, without fp64: rows in fp32, per-sequence values in fp64 on the CPU"
    detail = missing or (
        f"fp32, bf16 and fp16 logits on the CPU; instruction set {native.instruction_set()}. Under torch.compile a "
        "gradient in place goes through a functional graph, where AOTAutograd may copy the logits once, and known "
        "weights take two passes"
    )
    use_eager = not (use_cpu or use_cuda or use_triton) if native.forced is None else native.forced == "eager"
    return {
        "cpu": BackendInfo("cpu", missing is None, use_cpu, detail),
        "cuda": BackendInfo(
            "cuda",
            no_cuda is None,
            use_cuda,
            no_cuda
            or "fp32, bf16 and fp16 logits on NVIDIA GPUs; what rows hold is "
            "checked by out.check(), or at once with DMFAST_SYNC_CHECKS=1",
        ),
        "triton": BackendInfo(
            "triton",
            no_triton is None,
            use_triton,
            no_triton or f"fp32, bf16 and fp16 logits {devices}, where there are no CUDA kernels; checked as by cuda",
        ),
        "eager": BackendInfo("eager", True, use_eager, eager),
    }


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend within a ``with`` block.

    Raises:
        ValueError: no such backend. RuntimeError: not available here, with the reason.
    """
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(NAMES)}")
    info = _backends()[name]
    if not info.available:
        raise RuntimeError(f"backend {name!r} is not available here: {info.detail}")
    before, native.forced = native.forced, name
    try:
        yield
    finally:
        native.forced = before


def _why_not(name: str, logits: Tensor) -> str | None:
    """Why ``name`` can't take these logits; None: it can."""
    device = logits.device
    if name == "cpu":
        missing, fits = native.why_unavailable(), device.type == "cpu"
    elif name == "cuda":
        missing, fits = native.why_not_cuda(device.index or 0), native.on_cuda(logits)
    else:
        missing, fits = triton.why_not(device), True
    if missing is not None:
        return missing if device.type == "cpu" else f"logits are on {device}; {missing}"
    if not fits:
        return f"logits are on {device}, for which backend {name!r} has no kernel"
    if logits.dtype not in native.DTYPES:
        return f"logits are {logits.dtype}; the compiled kernels take float32, bfloat16 and float16"
    return None


def _candidates(logits: Tensor) -> tuple[str, ...]:
    if native.on_cuda(logits) or logits.device.type == "cuda":
        return ("cuda", "triton")
    return ("cpu",) if logits.device.type == "cpu" else ("triton",)


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"dmfast runs on its slow eager backend: {reason}", stacklevel=4)


# called when torch.compile traces, which can't put a warning into a graph; as assume_constant_result would do
_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def select(logits: Tensor) -> str:
    """The backend for these logits. Taking the slow one is said once per reason.

    Raises:
        RuntimeError: the forced backend can't take these logits.
    """
    forced = native.forced
    if forced is None and logits.device.type == "cpu" and logits.dtype in native.DTYPES and native.cpu_alone():
        return "cpu"  # as what follows would say, in more microseconds
    if forced == "eager":
        return forced
    if forced is not None and forced not in NAMES:
        raise ValueError(f"DMFAST_BACKEND: unknown backend {forced!r}; there are {', '.join(NAMES)}")
    reasons = []
    for name in _candidates(logits) if forced is None else (forced,):
        reason = _why_not(name, logits)
        if reason is None:
            return name
        if reason not in reasons:
            reasons.append(reason)
    reason = "; ".join(reasons)
    if forced is not None:
        raise RuntimeError(f"backend {forced!r} was forced, but {reason}")
    _warn_once(reason)
    return "eager"
