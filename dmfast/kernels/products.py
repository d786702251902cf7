"""The matrix products between hidden states, head and logits, each in the way that is exact and fast where it runs.

16-bit hidden states and head give fp32 logits: a product sums in fp32, and what leaves it is not rounded, since 16-bit
logits would put log pi off by .1 nats and more. Libraries differ in what they offer for that:

- ``native``: the operands as they are, the result in their dtype.
- ``fp32 output``: the operands as they are, the result in fp32 (CUDA's ``out_dtype``).
- ``widened``: operands in fp32, the head in blocks of its rows, so that no V x D copy of it exists. bf16 operands lose
  nothing where oneDNN multiplies them as bf16 again, by a CPU's own instructions if it has them.

``ways`` chooses, from these measurements: milliseconds of native and widened for 256 rows, D 576, V 50257, one thread.

| CPU, operands | H W^T | dZ W | dZ^T H |
|---|---|---|---|
| with bf16 instructions (Xeon, AMX), bf16 | 35, **48** | 34, **54** | 61, **40** |
| the same, fp16 | 145, **197** | 172, **214** | 291, **187** |
| with AVX2, bf16 | 905, **421** | 11,100, **378** | 1,720, **348** |
| with AVX2, fp16 | 890, **265** | 11,600, **390** | 2,900, **240** |

``native`` rounds the logits, and takes dZ in 16 bits, as the row kernels then write it.

Products of fp32 matrices are IEEE's, whatever torch is set to (``ieee``), unless ``logits_dtype="same"`` is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

_HAS_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype")
_ADDS_IN_FP32 = TorchVersion(torch.__version__) >= "2.11"  # addmm with out_dtype to an fp32 matrix: pytorch#167931
_ONEDNN: Any = getattr(torch.backends.mkldnn, "matmul", None)
# what has the attribute fp32_precision, from torch 2.9 on; ROCm's devices are cuda to torch
_SETTINGS: dict[str, Any] = {"cpu": _ONEDNN, "cuda": torch.backends.cuda.matmul, "xpu": _ONEDNN}
_BLOCK = 4096  # rows of the head that are widened at a time


class Ways(NamedTuple):
    """How the three products are formed: ``native``, ``fp32 output`` or ``widened`` each."""

    logits: str
    d_hidden: str
    d_head: str

    @property
    def takes_16_bits(self) -> bool:
        """Whether the gradient of the logits is multiplied in 16 bits."""
        return self.d_hidden != "widened" or self.d_head != "widened"


def ways(device: torch.device, dtype: torch.dtype, logits_dtype: torch.dtype, parts: bool = False) -> Ways:
    """Return how to multiply hidden states and head of a dtype into logits of a dtype, and back.

    Args:
        device: where they are.
        dtype: of hidden states and head.
        logits_dtype: of the logits.
        parts: whether dH is one of several parts that will be summed, which is not rounded before.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return Ways("native", "native", "native")
    same = logits_dtype == dtype
    if device.type == "cpu":
        native = same and dtype == torch.bfloat16 and _multiplies_bf16()
        back = "widened" if parts or not native else "native"
        return Ways("native" if native else "widened", back, "widened")
    to_fp32 = "fp32 output" if _has_fp32_output(device) else "widened"
    return Ways("native" if same else to_fp32, to_fp32 if parts else "native", to_fp32)


@cache
def _multiplies_bf16() -> bool:
    """Return whether the CPU has instructions that multiply bf16 and add in fp32."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # which of them there are depends on the release
    return any(getattr(torch.cpu, name, bool)() for name in asked)


@cache
def _has_fp32_output(device: torch.device) -> bool:
    """Return whether torch multiplies 16-bit matrices into fp32 on this device."""
    if device.type != "cuda" or torch.version.hip is not None or not _HAS_OUT_DTYPE:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def ieee(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which fp32 matrices are multiplied in fp32, not in TF32 or bf16, whatever torch is set to.

    TF32 keeps 10 bits of an operand, no more than fp16 has.

    Args:
        device: where they are.
    """
    return _fp32_products(device, "ieee")


def _multiplied_as(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """Have oneDNN multiply fp32 matrices that hold values of a dtype as bf16 if they are; others, and those on another
    device, in fp32."""
    return _fp32_products(device, "bf16" if dtype == torch.bfloat16 and device.type == "cpu" else "ieee")


@contextmanager
def _fp32_products(device: torch.device, precision: str) -> Iterator[None]:
    """Set how torch multiplies fp32 matrices on a device, and then what was set before."""
    settings: Any = _SETTINGS.get(device.type)
    if hasattr(settings, "fp32_precision"):
        before = settings.fp32_precision
        settings.fp32_precision = precision
        try:
            yield
        finally:
            settings.fp32_precision = "none"  # as what is above it, such as torch.backends.fp32_precision
            if settings.fp32_precision != before:
                settings.fp32_precision = before
    elif precision == "ieee":  # before torch 2.9 there is one setting for all devices
        old = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(old)
    else:
        yield


def multiply(way: str, h: Tensor, head: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write the logits H W^T + b.

    Args:
        way: of ``Ways.logits``.
        h: (R, D).
        head: (V, D).
        bias: (V,) or None.
        out: (R, V), rows contiguous.
    """
    if way == "native":
        if bias is None:
            torch.mm(h, head.t(), out=out)
        else:
            torch.addmm(bias, h, head.t(), out=out)
    elif way == "fp32 output":
        torch.mm(h, head.t(), out_dtype=torch.float32, out=out)
        if bias is not None:
            out.add_(bias)
    else:
        wide = h.float()
        for first in range(0, head.shape[0], _BLOCK):
            part = slice(first, first + _BLOCK)
            to = out[:, part] if out.dtype == torch.float32 else torch.empty_like(out[:, part], dtype=torch.float32)
            with _multiplied_as(h.dtype, h.device):
                torch.mm(wide, head[part].float().t(), out=to)
            if bias is not None:
                to.add_(bias[part])
            if out.dtype != torch.float32:
                out[:, part] = to


def multiply_back(way: str, dz: Tensor, head: Tensor, out: Tensor) -> None:
    """Write dH = dZ W.

    Args:
        way: of ``Ways.d_hidden``.
        dz: (R, V); the dtype of the head where it is not ``widened``.
        head: (V, D).
        out: (R, D), the dtype of the head where it is ``native``, else fp32 or that of the head.
    """
    if way == "native":
        torch.mm(dz, head, out=out)
        return
    if way == "fp32 output":
        torch.mm(dz, head, out_dtype=torch.float32, out=out)
        return
    total = dz.new_zeros(out.shape, dtype=torch.float32)
    with _multiplied_as(head.dtype, head.device):
        for first in range(0, head.shape[0], _BLOCK):
            total.addmm_(dz[:, first : first + _BLOCK].float(), head[first : first + _BLOCK].float())
    out.copy_(total)


def only_product(dz: Tensor, h: Tensor) -> Tensor:
    """Return dZ^T H of operands of one dtype in that dtype, rounded once.

    Args:
        dz: (R, V).
        h: (R, D).
    """
    return dz.t() @ h


def add_product(way: str, total: Tensor, dz: Tensor, h: Tensor, first: bool) -> None:
    """Add dZ^T H to total, or where it is the ``first``, write it there; total is fp32, and nothing is rounded to less.

    From torch 2.8 to 2.10 the product on CUDA is a matrix of its own before it is added.

    Args:
        way: of ``Ways.d_head``.
        total: (V, D) fp32.
        dz: (R, V); the dtype of h where it is ``fp32 output``.
        h: (R, D).
        first: whether what total holds is not to be read.
    """
    beta = 0 if first else 1
    if way != "fp32 output":
        with _multiplied_as(h.dtype, h.device):
            total.addmm_(dz.t().float(), h.float(), beta=beta)
    elif _ADDS_IN_FP32:
        torch.addmm(total, dz.t(), h, out_dtype=torch.float32, beta=beta, out=total)
    elif first:
        torch.mm(dz.t(), h, out_dtype=torch.float32, out=total)
    else:
        total.add_(torch.mm(dz.t(), h, out_dtype=torch.float32))
