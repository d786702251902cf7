"""linear_dm_loss against the matrix products that it consists of, and sample_tokens against torch: fp32, interleaved,
medians, milliseconds. Writes a JSON if told where.

    python benchmarks/linear.py [results/linear.json]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dmfast
from dmfast.training.report import machine


def measure(rivals: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, float]:
    """Medians in ms, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for i in range(rounds + 1):
        for name, call in rivals.items():
            start = time.perf_counter()
            call(i)
            if i:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def linear(b: int = 32, t: int = 64, d: int = 576, v: int = 50257) -> dict[str, float]:
    """Forward + backward."""
    hidden, tokens = torch.randn(b, t, d, requires_grad=True), torch.randint(0, v, (b, t))
    weight, half = (0.05 * torch.randn(v, d)).requires_grad_(), torch.rand(b, t) < 0.5
    log_q = torch.full((b,), -11.0 * t, dtype=torch.float64)
    terms: dict[str, Any] = {"log_target": log_q, "log_proposal": log_q, "log_z": 0.0, "max_weight": 5.0}
    h, w = hidden.detach().view(-1, d), weight.detach()
    z, dh, dw = torch.empty(b * t, v), torch.empty_like(h), torch.empty_like(w)

    def products(fresh: bool, head: bool = True) -> None:
        logits = torch.mm(h, w.t(), out=None if fresh else z)
        torch.mm(logits, w, out=None if fresh else dh)
        if head:
            torch.mm(logits.t(), h, out=None if fresh else dw)

    def loss(weight: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        hidden.grad = weight.grad = None
        dmfast.linear_dm_loss(hidden, weight, tokens, mask, **terms).loss.backward()

    def eager() -> None:
        hidden.grad = weight.grad = None
        (hidden @ weight.t()).log_softmax(-1).gather(-1, tokens[..., None]).sum().backward()

    return measure(
        {
            "3 products into memory at hand": lambda _: products(fresh=False),
            "3 products, results allocated": lambda _: products(fresh=True),
            "linear_dm_loss": lambda _: loss(weight),
            "2 products into memory at hand": lambda _: products(fresh=False, head=False),
            "linear_dm_loss, frozen head": lambda _: loss(w),
            "linear_dm_loss, half of the rows masked": lambda _: loss(weight, half),
            "eager log_softmax + gather": lambda _: eager(),
        },
        3,
    )


def sampling(n: int = 64, v: int = 50257) -> dict[str, float]:
    """A token per row and its log-probability."""
    z = torch.randn(n, v)
    return measure(
        {
            "read-sum": lambda _: z.sum(),
            "sample_tokens": lambda i: dmfast.sample_tokens(z, seed=i),
            "softmax, multinomial, log_softmax, gather": lambda _: z.log_softmax(-1).gather(
                -1, z.softmax(-1).multinomial(1)
            ),
        },
        30,
    )


def main() -> None:
    """Prints and writes the medians."""
    torch.manual_seed(0)
    report = {"machine": machine(), "unit": "ms, median"}
    for name, run in (("2048 rows, D 576, V 50257", linear), ("(64, 50257)", sampling)):
        report[name] = run()
        for rival, value in report[name].items():
            print(f"{rival:42} {value:9.2f} ms")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
