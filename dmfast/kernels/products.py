"""The matrix products between hidden states, head and logits, each in the way that is exact and fast where it runs.

16-bit hidden states and head give fp32 logits: a product sums in fp32, and what leaves it is not rounded, since 16-bit
logits would put log pi off by .1 nats and more. Libraries differ in what they offer for that:

- ``native``: the operands as they are, the result in their dtype.
- ``fp32 output``: the operands as they are, the result in fp32 (CUDA's ``out_dtype``).
- ``residual``: z = H W^T in 16 bits, then r = H W^T - z, both native; z + r has twice the digits of z.
- ``widened``: operands in fp32, the head in blocks of its rows, so that no V x D copy of it exists.

``ways`` chooses, from these measurements: milliseconds for 256 rows, D 576, V 50257, one thread.

| CPU, operands | H W^T: native, residual, widened | dZ W: native, widened | dZ^T H: native, widened |
|---|---|---|---|
| with bf16 instructions (Xeon, AMX), bf16 | 34, **76**, 179 | **60**, 148 | 53, **105** |
| the same, fp16 | 145, 314, **197** | 172, **214** | 291, **187** |
| with AVX-512 without AMX (EPYC), bf16 | 72, **229**, 412 | **78**, 380 | 99, **345** |
| with AVX2, bf16 | 905, -, **421** | 11,100, **378** | 1,720, **348** |
| with AVX2, fp16 | 890, -, **265** | 11,600, **390** | 2,900, **240** |

dZ^T H is a sum over the chunks of a call in fp32. Where there is one chunk, it leaves the product in 16 bits if the
operands of dZ W are 16-bit too.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

_HAS_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype")
_ADDS_IN_FP32 = TorchVersion(torch.__version__) >= "2.11"  # addmm with out_dtype to an fp32 matrix: pytorch#167931
_BLOCK = 4096  # rows of the head that go through ``residual`` or ``widened`` at a time


class Ways(NamedTuple):
    """How the three products are formed: one of ``native``, ``fp32 output``, ``residual``, ``widened`` each."""

    logits: str
    d_hidden: str
    d_head: str


def ways(device: torch.device, dtype: torch.dtype, logits_dtype: torch.dtype) -> Ways:
    """Return how to multiply hidden states and head of a dtype into logits of a dtype, and back."""
    if dtype not in (torch.bfloat16, torch.float16):
        return Ways("native", "native", "native")
    same = logits_dtype == dtype
    if device.type == "cpu":
        native = dtype == torch.bfloat16 and _multiplies_bf16()
        if native:
            return Ways("native" if same else "residual", "native", "widened")
        return Ways("widened", "widened", "widened")
    to_fp32 = "fp32 output" if _has_fp32_output(device) else "widened"
    return Ways("native" if same else to_fp32, "native", to_fp32)


@cache
def _multiplies_bf16() -> bool:
    """Return whether the CPU has instructions that multiply bf16 and add in fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@cache
def _has_fp32_output(device: torch.device) -> bool:
    """Return whether torch multiplies 16-bit matrices into fp32 on this device."""
    if device.type != "cuda" or torch.version.hip is not None or not _HAS_OUT_DTYPE:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


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
        return
    if way == "fp32 output":
        torch.mm(h, head.t(), out_dtype=torch.float32, out=out)
    elif way == "residual":
        for first in range(0, head.shape[0], _BLOCK):  # so that z stays in the cache
            block, to = head[first : first + _BLOCK].t(), out[:, first : first + _BLOCK]
            z = torch.mm(h, block)
            to.copy_(z)
            to.add_(z.addmm_(h, block, beta=-1))
    else:
        wide, bias32 = h.float(), None if bias is None else bias.float()
        for first in range(0, head.shape[0], _BLOCK):
            part = slice(first, first + _BLOCK)
            block, to = head[part].float().t(), out[:, part]
            if out.dtype != torch.float32:
                to = torch.empty_like(to, dtype=torch.float32)
            if bias32 is None:
                torch.mm(wide, block, out=to)
            else:
                torch.addmm(bias32[part], wide, block, out=to)
            if out.dtype != torch.float32:
                out[:, part] = to
        return
    if bias is not None:
        out.add_(bias)


def multiply_back(way: str, dz: Tensor, head: Tensor, out: Tensor) -> None:
    """Write dH = dZ W.

    Args:
        way: of ``Ways.d_hidden``.
        dz: (R, V).
        head: (V, D).
        out: (R, D), the dtype of the head.
    """
    if way != "widened":
        torch.mm(dz.to(head.dtype), head, out=out)
        return
    total = dz.new_zeros(out.shape, dtype=torch.float32)
    for first in range(0, head.shape[0], _BLOCK):
        total.addmm_(dz[:, first : first + _BLOCK].float(), head[first : first + _BLOCK].float())
    out.copy_(total)


def only_product(way: str, dz: Tensor, h: Tensor) -> Tensor:
    """Return dZ^T H in the dtype of h, rounded once.

    Args:
        way: of ``Ways.d_hidden``.
        dz: (R, V).
        h: (R, D).
    """
    if way == "widened":
        return (dz.t().float() @ h.float()).to(h.dtype)
    return dz.to(h.dtype).t() @ h


def add_product(way: str, total: Tensor, dz: Tensor, h: Tensor, first: bool) -> None:
    """Add dZ^T H to total, or where it is the ``first``, write it there; total is fp32, and nothing is rounded to less.

    From torch 2.8 to 2.10 the product on CUDA is a matrix of its own before it is added.

    Args:
        way: of ``Ways.d_head``.
        total: (V, D) fp32.
        dz: (R, V).
        h: (R, D).
        first: whether what total holds is not to be read.
    """
    beta = 0 if first else 1
    if way != "fp32 output":
        total.addmm_(dz.t().float(), h.float(), beta=beta)
        return
    a = dz.to(h.dtype).t()
    if _ADDS_IN_FP32:
        torch.addmm(total, a, h, out_dtype=torch.float32, beta=beta, out=total)
    elif first:
        torch.mm(a, h, out_dtype=torch.float32, out=total)
    else:
        total.add_(torch.mm(a, h, out_dtype=torch.float32))
