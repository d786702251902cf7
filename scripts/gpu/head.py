"""Time ``linear_dm_loss``, forward and backward, at D 4096 and V 128256, beside its three products: ``head.py [dry]``.

The sizes are those at which others state their times (docs/gpu.md). At the start of each call the host reads which rows
are scored, so the call cannot be captured. The calls follow each other, and each time contains that wait, as in
training.
"""

from __future__ import annotations

import sys
from typing import Any

import results
import torch
from clock import Clock, Wall, measure, said
from torch import Tensor

import dmfast

DRY = "dry" in sys.argv
DEVICE = "cpu" if DRY else "cuda"
ROWS, VOCAB, DIM = ((64,), 257, 32) if DRY else ((8192, 4096, 1024), 128256, 4096)
# a sequence has this many tokens
STEPS = 8 if DRY else 512


def peak(call: Any) -> float | None:
    """Return the MB that a call allocates at its peak, beyond what was allocated before."""
    if DRY:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def problem(rows: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Return hidden states, head, tokens and terms."""
    torch.manual_seed(0)
    b = rows // STEPS
    hidden = torch.randn(b, STEPS, DIM, device=DEVICE).to(torch.bfloat16).requires_grad_()
    weight = (torch.randn(VOCAB, DIM, device=DEVICE) * 3 / DIM**0.5).to(torch.bfloat16).requires_grad_()
    tokens = torch.randint(VOCAB, (b, STEPS), device=DEVICE)
    with torch.no_grad():
        log_prob = dmfast.linear_sequence_log_prob(hidden, weight, tokens)
    return hidden, weight, tokens, {"log_target": log_prob + 0.3, "log_proposal": log_prob, "log_z": 0.0}


def calls(rows: int) -> dict[str, tuple[Any, bool]]:
    """Return the calls to time, and whether each can be captured in a graph."""
    hidden, weight, tokens, terms = problem(rows)
    h, w = hidden.detach().view(-1, DIM), weight.detach()
    z = torch.empty(rows, VOCAB, dtype=h.dtype, device=DEVICE)
    dh, dw = torch.empty_like(h), torch.empty_like(w)

    def products(i: int) -> None:
        torch.mm(h, w.t(), out=z)
        torch.mm(z, w, out=dh)
        torch.mm(z.t(), h, out=dw)

    def ours(head: Tensor, **options: Any) -> Any:
        def call(i: int) -> None:
            hidden.grad = weight.grad = None
            dmfast.linear_dm_loss(hidden, head, tokens, **terms, **options).loss.backward()  # type: ignore[no-untyped-call]

        return call

    def score(i: int) -> None:
        with torch.no_grad():
            dmfast.linear_sequence_log_prob(hidden, weight, tokens)

    return {
        "roof: its three products": (products, True),
        "linear_dm_loss gdc++": (ours(weight), False),
        # this one has no sum of dW over chunks
        "linear_dm_loss gdc++, one chunk": (ours(weight, chunk_bytes=2**34), False),
        "linear_dm_loss gdc++, logits_dtype same": (ours(weight, logits_dtype="same"), False),
        "linear_dm_loss dpg (known weight)": (ours(weight, objective="dpg"), False),
        "linear_dm_loss gdc++, frozen head": (ours(w), False),
        "linear_sequence_log_prob, no gradient": (score, False),
    }


def main() -> None:
    path, clock, found, failed = results.folder() / "head.json", Wall() if DRY else Clock(), [], []
    for rows in ROWS:
        lines: dict[str, Any] = {}
        found.append({"rows": rows, "vocab": VOCAB, "dim": DIM, "dtype": "bfloat16", "lines": lines})
        for name, (call, captures) in calls(rows).items():
            try:
                lines[name] = measure(clock, call, rounds=1 if DRY else 5, captures=captures, enough=0 if DRY else 60)
                lines[name]["peak_mb"] = peak(call)
            except Exception as error:
                lines[name] = {"failed": said(error)}
                failed.append(f"{rows} rows: {name}: {lines[name]['failed']}")
            results.write(path, found)
            print(rows, name, lines[name], flush=True)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
