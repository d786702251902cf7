"""Measure each way of ``dmfast.kernels.products`` to multiply hidden states, head and logits, for few and many rows.

``ways`` chooses by these figures.

    python benchmarks/products.py [results/products.json]

Figures are milliseconds of one thread's CPU time. They are the least of five interleaved rounds, since other jobs may
run beside. To hold a CPU to a lesser instruction set, run

    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
        python benchmarks/products.py results/products.json widened

This leaves out the 16-bit products, because torch would still choose them as the CPU's own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

from dmfast.kernels import linear, products
from dmfast.training.report import machine

ROWS, SIZES, ROUNDS = (1, 8, 64, 256), ((576, 50257), (2048, 32000)), 5


def calls_of(h: torch.Tensor, head: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Return what is measured, by product and way."""
    rows, vocab, dtype = h.shape[0], head.shape[0], h.dtype

    def buffer(of: torch.dtype) -> torch.Tensor:
        return (torch.randn(rows, linear.row_stride(vocab)) * 1e-3).to(of)[:, :vocab]

    z, dz, narrow_z, narrow_dz, rest = (buffer(of) for of in (torch.float32, torch.float32, dtype, dtype, dtype))
    dh, dw = torch.empty_like(h), torch.zeros(head.shape)

    def plus_residual() -> None:
        torch.mm(h, head.t(), out=narrow_z)
        torch.addmm(narrow_z, h, head.t(), beta=-1, out=rest)
        torch.add(narrow_z.float(), rest, out=z)

    return {
        "H W^T, native": lambda: products.multiply("native", h, head, None, narrow_z),
        "H W^T, product plus residual": plus_residual,
        "H W^T, widened": lambda: products.multiply("widened", h, head, None, z),
        "dZ W, native": lambda: products.multiply_back("native", narrow_dz, head, dh),
        "dZ W, widened": lambda: products.multiply_back("widened", dz, head, dh),
        "dZ^T H, native": lambda: products.only_product("native", narrow_dz, h),
        "dZ^T H, widened": lambda: products.add_product("widened", dw, dz, h, False),
        "dZ^T H, one chunk, widened": lambda: products.only_product("widened", dz, h),
        "dZ^T H, 16-bit dZ widened": lambda: products.add_product("widened", dw, narrow_dz, h, False),
    }


def measured(dtype: torch.dtype, dim: int, vocab: int, only: str) -> dict[str, dict[str, float]]:
    """Return the least milliseconds by product and rows, of those whose names hold ``only``."""
    head = (torch.randn(vocab, dim) / dim**0.5).to(dtype)
    found: dict[str, dict[str, float]] = {}
    for rows in ROWS:
        calls = calls_of(torch.randn(rows, dim).to(dtype), head)
        calls = {what: call for what, call in calls.items() if only in what}
        taken: dict[str, list[float]] = {what: [] for what in calls}
        for i in range(ROUNDS + 1):
            for what, call in calls.items():
                start = time.process_time()
                call()
                # the first round is slower and does not count, unless a call takes seconds anyway
                if i > 0 or time.process_time() - start > 5:
                    taken[what].append((time.process_time() - start) * 1e3)
        for what, values in taken.items():
            found.setdefault(what, {})[str(rows)] = round(min(values), 1)
    return found


def main() -> None:
    """Print and write the figures."""
    torch.set_num_threads(1)
    only = "widened" if "widened" in sys.argv[2:] else ""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (dim, vocab), dtype in product(SIZES, (torch.bfloat16, torch.float16)):
        name = f"{str(dtype).removeprefix('torch.')}, D {dim}, V {vocab}"
        found[name] = measured(dtype, dim, vocab, only)
        for what, by_rows in found[name].items():
            print(f"{name:30} {what:30}", *(f"{value:9.1f}" for value in by_rows.values()), flush=True)
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        kept = json.loads(path.read_text()) if path.exists() else {}
        unit = "ms of CPU time, least of five"
        kept[torch.backends.cpu.get_cpu_capability()] = {"machine": machine(), "unit": unit, "found": found}
        path.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
