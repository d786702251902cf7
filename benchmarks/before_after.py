"""Compare how long the calls of two versions of dmfast take on this machine, and print the ratios.

Each version is imported by a process of its own from a source tree whose extension is built in place
(``DMFAST_BUILD=cpu python setup.py build_ext --inplace``). For each call the processes take turns, one call at a time,
in random order. The table gives the medians in milliseconds, and after divided by before.

    git worktree add /tmp/before COMMIT        # build its extension, and that of this tree
    python benchmarks/before_after.py /tmp/before .
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS, WARM = 25, 2


def calls(threads: int) -> dict[str, Callable[[], Any]]:
    """Return the calls by name. Only arguments that all versions have are given."""
    import torch

    import dmfast

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    found: dict[str, Callable[[], Any]] = {}

    def inputs(b: int, t: int, v: int) -> tuple[Any, dict[str, Any]]:
        log_q = torch.full((b,), -3.0 * t, dtype=torch.float64)
        return torch.randint(0, v, (b, t)), {"log_target": log_q - 0.2, "log_proposal": log_q, "log_z": 0.1}

    def backward(leaves: list[Any], loss: Callable[[], Any]) -> Callable[[], None]:
        def call() -> None:
            for leaf in leaves:
                leaf.grad = None
            loss().backward()

        return call

    for dtype in (torch.float32, torch.bfloat16):
        b, t, v = 8, 32, 50257
        name = f"{str(dtype).removeprefix('torch.')} {b}x{t}x{v}"
        tokens, given = inputs(b, t, v)
        z = (2 * torch.randn(b, t, v)).to(dtype)
        leaf = z.clone().requires_grad_()
        mask = torch.rand(b, t) < 0.8
        for objective in ("gdc++", "dpg"):
            found[f"dm_loss {objective}, {name}"] = backward(
                [leaf],
                lambda z=leaf, x=tokens, m=mask, k=given, o=objective: dmfast.dm_loss(z, x, m, objective=o, **k).loss,
            )
        found[f"sequence_log_prob, no gradient, {name}"] = torch.no_grad()(
            lambda z=z, x=tokens: dmfast.sequence_log_prob(z, x)
        )
        rows = z[:2].view(-1, v)
        found[f"sample_tokens, {str(dtype).removeprefix('torch.')} {len(rows)}x{v}"] = lambda z=rows: (
            dmfast.functional.sample_tokens(z, seed=3)
        )
    b, t, v, d = 8, 32, 32000, 256
    tokens, given = inputs(b, t, v)
    hidden, head = torch.randn(b, t, d).requires_grad_(), (torch.randn(v, d) / 16).requires_grad_()
    found[f"linear_dm_loss gdc++, float32 {b}x{t}x{d}x{v}"] = backward(
        [hidden, head], lambda: dmfast.linear_dm_loss(hidden, head, tokens, **given).loss
    )
    b, t, v = 4, 4, 32
    small, small_given = inputs(b, t, v)
    leaf = torch.randn(b, t, v).requires_grad_()
    found[f"dm_loss gdc++, float32 {b}x{t}x{v}"] = backward(
        [leaf], lambda: dmfast.dm_loss(leaf, small, **small_given).loss
    )
    return found


def serve(threads: int) -> None:
    """Answer each name on standard input with the milliseconds of a call."""
    found = calls(threads)
    print(json.dumps(list(found)), flush=True)
    for line in sys.stdin:
        call = found[json.loads(line)]
        start = time.perf_counter()
        call()
        print((time.perf_counter() - start) * 1e3, flush=True)


class Version:
    """A version of dmfast in a process of its own."""

    def __init__(self, tree: Path, threads: int) -> None:
        command = [sys.executable, "-P", __file__, "--serve", str(threads)]
        environment = os.environ | {"PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        self.names: list[str] = json.loads(self.process.stdout.readline())

    def milliseconds(self, name: str) -> float:
        """Return how long one call takes."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(name), file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?")
    parser.add_argument("after", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", metavar="TEXT", help="the calls whose name has this")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    if args.before is None or args.after is None:
        parser.error("give the source trees of both versions")
    versions = [Version(tree, args.threads) for tree in (args.before, args.after)]
    print(f"| {args.threads} thread{'s' * (args.threads > 1)} | before, ms | after, ms | after / before |")
    print("|---|---|---|---|")
    for name in (name for name in versions[1].names if args.only in name):
        times: tuple[list[float], list[float]] = ([], [])
        repeats = ROUNDS if "x32x" in name or "sample" in name else 20 * ROUNDS
        for i in range(repeats):
            for place in random.sample((0, 1), 2):
                spent = versions[place].milliseconds(name)
                if i >= WARM:
                    times[place].append(spent)
        before, after = map(statistics.median, times)
        print(f"| {name} | {before:.3f} | {after:.3f} | {after / before:.2f} |", flush=True)


if __name__ == "__main__":
    main()
