"""Multiply hidden states, head and logits, each product in the way that is exact and fast on its device.

16-bit hidden states and a 16-bit head give fp32 logits: products sum in fp32 and don't round their result, because
16-bit logits would put log pi off by .1 nats and more. Libraries offer different ways to do that:

- ``native``: the operands are taken as they are, and the result has their dtype.
- ``fp32 output``: the operands are taken as they are, and the result is fp32 (CUDA's ``out_dtype``).
- ``widened``: the operands are converted to fp32, the head in blocks of its rows, so that no V x D copy of it exists.
  bf16 operands lose nothing if oneDNN multiplies them as bf16 again, with a CPU's own instructions if it has them.

``ways`` chooses by CPU and dtype, from the measurements below. Bold figures are of the way that 16-bit hidden states
with fp32 logits take. Unless the table says otherwise, the figures are milliseconds of CPU time of one thread for 1, 8,
64 and 256 rows with D 576 and V 50257 (``benchmarks/products.py``, whose results also have D 2048).

| CPU, operands | product | native | widened |
|---|---|---|---|
| with bf16 instructions (Xeon, AMX), bf16 | H W^T | 9, 10, 16, 32 | **23, 26, 38, 79** |
| | dZ W | **12, 12, 11, 27** | 17, 21, 40, 73 |
| | dZ^T H | 31, 31, 40, 67 | **11, 23, 30, 66** |
| the same, fp16 | H W^T | 10, 15, 35, 102 | **23, 26, 51, 138** |
| | dZ W | 9, 11, 31, 103 | **15, 13, 35, 116** |
| | dZ^T H | 29, 33, 61, 150 | **13, 21, 47, 108** |
| the same held to AVX2, bf16 | H W^T | | **19, 22, 53, 176** |
| | dZ W | | **14, 16, 49, 166** |
| | dZ^T H | | **13, 15, 51, 143** |
| with AVX2, bf16; elapsed ms, 256 rows | H W^T, dZ W, dZ^T H | 905, 11,100, 1,720 | **421, 378, 348** |
| the same, fp16 | H W^T, dZ W, dZ^T H | 890, 11,600, 2,900 | **265, 390, 240** |
| aarch64 and others | | not measured | **not measured** |

``native`` rounds its result. It serves for the logits of ``"same"``, and for a dH that is not one of several parts. It
takes dZ in 16 bits, in which the row kernels then write it. autograd does the same if the logits of a 16-bit head are
widened. On a CPU that was not measured all three products are ``widened``, which is correct everywhere, and
``on_this_cpu`` says so.

Products of fp32 matrices follow IEEE whatever torch is set to (``ieee``), unless ``logits_dtype="same"`` is asked for.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

_HAS_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype")
# before pytorch#167931, addmm with out_dtype could not add to an fp32 matrix
_ADDS_IN_FP32 = TorchVersion(torch.__version__) >= "2.11"
_ONEDNN: Any = getattr(torch.backends.mkldnn, "matmul", None)
# These objects have the attribute fp32_precision from torch 2.9 on. torch calls ROCm's devices cuda.
_SETTINGS: dict[str, Any] = {"cpu": _ONEDNN, "cuda": torch.backends.cuda.matmul, "xpu": _ONEDNN}
_FEW = 8  # up to so many rows, converting the head costs a CPU more than multiplying it in fp32
# The bytes that are widened at a time. On a CPU a block of few rows stays in the second-level cache between conversion
# and product. The blocks for many rows are larger, because their products are faster in larger blocks.
_FEW_BYTES, _CPU_BYTES, _BYTES = 2**19, 2**22, 2**25


class Ways(NamedTuple):
    """The ways in which the three products are formed, each ``native``, ``fp32 output`` or ``widened``."""

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
        device: their device.
        dtype: the dtype of hidden states and head.
        logits_dtype: the dtype of the logits.
        parts: whether dH is one of several parts, which are rounded only after they are summed.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return Ways("native", "native", "native")
    same = logits_dtype == dtype
    if device.type == "cpu":
        native = dtype == torch.bfloat16 and _multiplies_bf16()
        logits, d_hidden = native and same, native and not parts
        return Ways("native" if logits else "widened", "native" if d_hidden else "widened", "widened")
    to_fp32 = "fp32 output" if _has_fp32_output(device) else "widened"
    return Ways("native" if same else to_fp32, to_fp32 if parts else "native", to_fp32)


@cache
def _multiplies_bf16() -> bool:
    """Return whether the CPU has instructions that multiply bf16 and add in fp32."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not every release of torch has both
    return any(getattr(torch.cpu, name, bool)() for name in asked)


def on_this_cpu() -> str:
    """Return words that say how heads of 16-bit models are multiplied here, and why."""
    if _multiplies_bf16():
        return "a bf16 head is multiplied by the CPU's bf16 instructions, an fp16 head in fp32"
    known = platform.machine().lower() in ("x86_64", "amd64")
    why = "16-bit products are slower" if known else f"no product was measured on {platform.machine() or 'this CPU'}"
    return f"a 16-bit head is multiplied in fp32: {why}"


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
        device: the device of the matrices.
    """
    return _fp32_products(device, "ieee")


def _multiplied_as(x: Tensor, rows: int) -> AbstractContextManager[None]:
    """Return a context in which oneDNN multiplies fp32 copies of x as bf16, if x is bf16 and on a CPU.

    Products of few rows, and all others, are formed in fp32.
    """
    as_bf16 = x.dtype == torch.bfloat16 and x.device.type == "cpu" and rows > _FEW
    return _fp32_products(x.device, "bf16" if as_bf16 else "ieee")


def _in_fp32(x: Tensor, dim: int, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of a dimension of x, each with the fp32 values of x there, for a product of so many rows.

    Each block of values overwrites the one before in a single buffer, since fresh memory for each would cost page
    faults.
    """
    size, of_one = x.shape[dim], 4 * max(x.numel() // max(x.shape[dim], 1), 1)
    most = _BYTES if x.device.type != "cpu" else _FEW_BYTES if rows <= _FEW else _CPU_BYTES
    block = min(max(most // of_one, 1), size)
    widened = x.new_empty([block if i == dim else n for i, n in enumerate(x.shape)], dtype=torch.float32)
    for first in range(0, size, max(block, 1)):
        n = min(block, size - first)
        yield slice(first, first + n), widened.narrow(dim, 0, n).copy_(x.narrow(dim, first, n))


@contextmanager
def _fp32_products(device: torch.device, precision: str) -> Iterator[None]:
    """Set how torch multiplies fp32 matrices on a device, and restore the setting at the end."""
    settings: Any = _SETTINGS.get(device.type)
    if hasattr(settings, "fp32_precision"):
        before = settings.fp32_precision
        settings.fp32_precision = precision
        try:
            yield
        finally:
            # "none" inherits from the settings above it, such as torch.backends.fp32_precision
            settings.fp32_precision = "none"
            if settings.fp32_precision != before:
                settings.fp32_precision = before
    elif precision == "ieee":  # before torch 2.9 all devices share one setting
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
        way: a value of ``Ways.logits``.
        h: (R, D).
        head: (V, D).
        bias: (V,) or None.
        out: (R, V) with contiguous rows.
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
        widened = h.float()
        for part, widened_head in _in_fp32(head, 0, h.shape[0]):
            to = out[:, part] if out.dtype == torch.float32 else torch.empty_like(out[:, part], dtype=torch.float32)
            with _multiplied_as(h, h.shape[0]):
                torch.mm(widened, widened_head.t(), out=to)
            if bias is not None:
                to.add_(bias[part])
            if out.dtype != torch.float32:
                out[:, part] = to


def multiply_back(way: str, dz: Tensor, head: Tensor, out: Tensor) -> None:
    """Write dH = dZ W.

    Args:
        way: a value of ``Ways.d_hidden``.
        dz: (R, V), in the dtype of the head unless the way is ``widened``.
        head: (V, D).
        out: (R, D), in the dtype of the head if the way is ``native``, else in fp32 or the dtype of the head.
    """
    if way == "native":
        torch.mm(dz, head, out=out)
        return
    if way == "fp32 output":
        torch.mm(dz, head, out_dtype=torch.float32, out=out)
        return
    total = dz.new_zeros(out.shape, dtype=torch.float32)
    with _multiplied_as(head, dz.shape[0]):
        for part, widened_head in _in_fp32(head, 0, dz.shape[0]):
            total.addmm_(dz[:, part].float(), widened_head)
    out.copy_(total)


def only_product(way: str, dz: Tensor, h: Tensor) -> Tensor:
    """Return dZ^T H in the dtype of h. The result is rounded once, and there is no V x D matrix in fp32.

    Args:
        way: a value of ``Ways.d_head``, or ``native`` for operands of one dtype.
        dz: (R, V), in the dtype of h unless the way is ``widened``.
        h: (R, D).
    """
    if way != "widened":
        return dz.t() @ h
    (vocab, dim), widened = (dz.shape[1], h.shape[1]), h.float()
    out = h.new_empty(vocab, dim)
    block = min(max((_CPU_BYTES if h.device.type == "cpu" else _BYTES) // (4 * max(dim, len(h), 1)), 1), vocab)
    product = h.new_empty(block, dim, dtype=torch.float32)
    with _multiplied_as(h, h.shape[0]):
        for first in range(0, vocab, max(block, 1)):
            part = dz[:, first : first + block].float()
            out[first : first + block] = torch.mm(part.t(), widened, out=product[: part.shape[1]])
    return out


def add_product(way: str, total: Tensor, dz: Tensor, h: Tensor, first: bool) -> None:
    """Add dZ^T H to ``total``, or write it there if it is the ``first``, without rounding to less than fp32.

    From torch 2.8 to 2.10 the product on CUDA needs a V x D matrix of its own before it is added.

    Args:
        way: a value of ``Ways.d_head``.
        total: (V, D) fp32.
        dz: (R, V), in the dtype of h if the way is ``fp32 output``.
        h: (R, D).
        first: whether ``total`` holds nothing yet that counts.
    """
    beta = 0 if first else 1
    if way != "fp32 output":
        widened = h.float()
        with _multiplied_as(h, h.shape[0]):
            if dz.dtype == torch.float32:
                total.addmm_(dz.t(), widened, beta=beta)
            else:
                for part, widened_dz in _in_fp32(dz, 1, h.shape[0]):
                    total[part].addmm_(widened_dz.t(), widened, beta=beta)
    elif _ADDS_IN_FP32:
        torch.addmm(total, dz.t(), h, out_dtype=torch.float32, beta=beta, out=total)
    elif first:
        torch.mm(dz.t(), h, out_dtype=torch.float32, out=total)
    else:
        total.add_(torch.mm(dz.t(), h, out_dtype=torch.float32))
