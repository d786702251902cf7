"""Measure the cost and the benefit of fp32 logits from 16-bit hidden states.

linear_dm_loss and linear_sequence_log_prob run with ``logits_dtype`` "same" and "float32" in alternation, and the
medians are reported. The error of log pi is taken against fp64 on the same 16-bit tensors.

    python benchmarks/head_dtype.py [results/head_dtype.json]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import dmfast
from dmfast import eager
from dmfast.training.report import machine

B, T, D, V, ROUNDS = 2, 256, 576, 50257, 7


def main() -> None:
    """Print and write medians and errors."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for dtype in (torch.bfloat16, torch.float16):
        for spread in (1.9, 5.7):
            torch.manual_seed(0)
            hidden = torch.randn(B, T, D).to(dtype).requires_grad_()
            weight = (torch.randn(V, D) * spread / D**0.5).to(dtype).requires_grad_()
            tokens = torch.randint(V, (B, T))
            with torch.no_grad():
                exact = eager.linear_sequence_log_prob(hidden.double(), weight.double(), tokens)
                errors = {
                    kind: float((dmfast.linear_sequence_log_prob(hidden, weight, tokens, logits_dtype=kind) - exact)
                                .abs().max())
                    for kind in ("same", "float32")
                }  # fmt: skip
            name = f"{str(dtype).removeprefix('torch.')}, logits of spread {spread}"
            found[name] = {f"error of log pi, {kind}, nats": error for kind, error in errors.items()}
            if spread == 1.9:
                found[name] |= times(hidden, weight, tokens, exact)
            for what, value in found[name].items():
                print(f"{name:34} {what:44} {value:.3g}")
    if len(sys.argv) > 1:
        shape = {"B": B, "T": T, "D": D, "V": V, "rounds": ROUNDS, "unit": "ms, median"}
        Path(sys.argv[1]).write_text(
            json.dumps({"machine": machine(), "shape": shape, "found": found}, indent=1) + "\n"
        )


def times(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Return the median milliseconds of scoring, and of the loss with its backward."""

    def loss(kind: str) -> None:
        hidden.grad = weight.grad = None
        dmfast.linear_dm_loss(
            hidden, weight, tokens, log_target=exact, log_proposal=exact, log_z=0.0, max_weight=5.0, logits_dtype=kind
        ).loss.backward()

    def score(kind: str) -> None:
        with torch.no_grad():
            dmfast.linear_sequence_log_prob(hidden, weight, tokens, logits_dtype=kind)

    calls: dict[str, Callable[[], None]] = {}
    for kind in ("same", "float32"):
        calls[f"scoring, {kind}, ms"] = lambda kind=kind: score(kind)  # type: ignore[misc]
        calls[f"loss and backward, {kind}, ms"] = lambda kind=kind: loss(kind)  # type: ignore[misc]
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: round(statistics.median(values), 1) for name, values in taken.items()}


if __name__ == "__main__":
    main()
