"""Measure what a call costs beyond its kernel.

dm_loss runs forward and backward on logits that are so small that the kernel takes no time. It is compared with a bare
autograd.Function on the same tensor, and with one that calls the kernels on arguments that were checked and converted
before. The calls alternate in random order, and the medians are given in microseconds. With a file name, they are
written as JSON.

    python benchmarks/overhead.py [results/overhead.json]
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dmfast
from dmfast.kernels import CPU
from dmfast.kernels.batch import Batch
from dmfast.kernels.checks import make_batch, make_terms
from dmfast.objectives import Terms
from dmfast.training.report import machine


class Bare(torch.autograd.Function):
    """Do the least that an autograd.Function can do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Return one number."""
        ctx.save_for_backward(x)
        return x.new_zeros((), dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> torch.Tensor:
        """Return a gradient."""
        return torch.empty_like(ctx.saved_tensors[0])


class Floor(torch.autograd.Function):
    """Call the kernels of dm_loss alone, without checks and conversions, and return only the loss."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, batch: Batch, terms: Terms) -> torch.Tensor:
        """Return the loss."""
        scores = CPU.forward(batch, terms, False, batch.n_sequences)
        ctx.save_for_backward(z)
        ctx.batch, ctx.scores = batch, scores
        return scores.total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the gradient of the loss."""
        dz = torch.empty_like(ctx.saved_tensors[0])
        CPU.backward_of(ctx.batch, ctx.scores, 1.0 / ctx.batch.n_sequences, dz, grad)
        return dz, None, None


def main() -> None:
    """Print and write the medians."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    b, t, v, rounds = 4, 4, 32, 3000
    z = torch.randn(b, t, v, requires_grad=True)
    x = torch.randint(0, v, (b, t))
    mask = torch.ones(b, t, dtype=torch.bool)
    log_target, log_proposal = torch.full((b,), -14.0), torch.full((b,), -14.2)
    args = {"log_target": log_target, "log_proposal": log_proposal, "log_z": 0.1}
    args64 = {"log_target": log_target.double(), "log_proposal": log_proposal.double(), "log_z": 0.1}
    batch = make_batch(z, x, mask, None, 1.0, None)
    nothing = dict.fromkeys(("max_weight", "context_id", "reward", "log_base"))
    terms = make_terms(batch, "gdc++", on_policy=False, **args, **nothing)
    rivals: dict[str, Callable[[], torch.Tensor]] = {
        "bare autograd.Function": lambda: Bare.apply(z),
        "the kernels alone": lambda: Floor.apply(z, batch, terms),
        "dm_loss gdc++": lambda: dmfast.dm_loss(z, x, mask, **args).loss,
        "dm_loss gdc++, fp64 (B) inputs": lambda: dmfast.dm_loss(z, x, **args64).loss,
        "dm_loss dpg (one pass)": lambda: dmfast.dm_loss(z, x, mask, objective="dpg", **args).loss,
        "sequence_log_prob": lambda: dmfast.sequence_log_prob(z, x, mask).sum(),
        "eager log_softmax + gather": lambda: -z.log_softmax(-1).gather(-1, x[..., None]).sum(),
    }
    times: dict[str, list[float]] = {name: [] for name in rivals}
    order = list(rivals)
    for i in range(rounds):
        random.shuffle(order)  # a call is faster after one that has run much of the same code
        for name in order:
            call = rivals[name]
            z.grad = None
            start = time.perf_counter()
            call().backward()
            if i >= rounds // 10:
                times[name].append((time.perf_counter() - start) * 1e6)
    result = {name: round(statistics.median(values), 1) for name, values in times.items()}
    for name, value in result.items():
        bare = result["bare autograd.Function"]
        print(f"{name:34} {value:7.1f} us  (+{value - bare:.1f}; {value / bare:.2f} bare Functions)")
    if len(sys.argv) > 1:
        shape = {"B": b, "T": t, "V": v, "rounds": rounds, "unit": "us, median of forward + backward"}
        report = {"machine": machine(), "shape": shape, "median": result}
        Path(sys.argv[1]).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
