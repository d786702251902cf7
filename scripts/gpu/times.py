"""Time the four row kernels at 8,192 rows with every backend that runs on the device: ``times.py [dry]``.

The backends are called directly, so that a time is that of the kernel and of the few bytes that it copies in. Gradients
go to a tensor of their own. This moves the same bytes and leaves the logits unchanged for the next call.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import results
import torch
from clock import ENOUGH, Call, Clock, Wall, measure, said
from torch import Tensor

from dmfast import kernels
from dmfast.kernels import checks, extension
from dmfast.kernels.backend import Backend
from dmfast.kernels.batch import Batch
from dmfast.objectives import Terms

DRY = "dry" in sys.argv
DEVICE = "cpu" if DRY else "cuda"
# in a dry run a block has the shared memory that it has on an H200
SHARED = 227 * 1024
# a small draw has this many rows, fewer than a card has multiprocessors
FEW = 8 if DRY else 64


class Shape(NamedTuple):
    """Describe logits."""

    rows: int
    vocab: int
    dtype: str

    @property
    def size(self) -> int:
        """Return the bytes of a logit."""
        return int(getattr(torch, self.dtype).itemsize)


class Line(NamedTuple):
    """Describe what is timed."""

    call: Call
    reads: float  # bytes of each logit, as csrc/cuda/plan.h declares them for a kept row
    writes: float
    kernel: str | None = None  # the name of the kernel, if there is one launch and ncu is to look at it
    rows: int | None = None  # the number of rows, if they are not all


class Problem(NamedTuple):
    """Hold the arguments of the kernels."""

    batch: Batch
    terms: Terms
    gradient: Tensor
    lse: Tensor
    weight: Tensor


def shapes() -> list[Shape]:
    """Return the shapes, with bf16 first, where most is expected."""
    if DRY:
        return [Shape(8, 257, "bfloat16"), Shape(8, 300, "float32")]
    return [Shape(8192, vocab, dtype) for dtype in ("bfloat16", "float32") for vocab in (128256, 50257)]


def problem(shape: Shape) -> Problem:
    """Return sequences of an eighth of the rows each, random and all scored, with weights that are known before."""
    torch.manual_seed(0)
    b = 8
    logits = torch.empty(b, shape.rows // b, shape.vocab, dtype=getattr(torch, shape.dtype), device=DEVICE)
    for sequence in logits:
        sequence.copy_(3 * torch.randn(sequence.shape, device=DEVICE))
    tokens = torch.randint(shape.vocab, logits.shape[:2], device=DEVICE)
    batch = checks.make_batch(logits, tokens, None, None, 1.0, None)
    column = torch.zeros(b, dtype=torch.float64, device=DEVICE)
    terms = checks.make_terms(batch, "dpg", on_policy=False, max_weight=None, context_id=None, log_proposal=column,
                              log_target=column, log_z=0.0, reward=None, log_base=None)  # fmt: skip
    lse = torch.full((shape.rows,), 16.0, dtype=torch.float64, device=DEVICE)
    return Problem(batch, terms, torch.empty_like(logits), lse, torch.ones_like(column))


def in_one_launch(backend: Backend, batch: Batch) -> bool:
    """Return whether one launch scores and writes a known weight.

    Triton's launch always does, and CUDA's does where it keeps the row.
    """
    if backend.name != "cuda":
        return True
    assert extension._C is not None
    limit = SHARED if DEVICE == "cpu" else torch.cuda.get_device_properties(DEVICE).shared_memory_per_block_optin
    return bool(extension._C.cuda.plan_known(batch.vocab, batch.logits.element_size(), limit)[1])


def lines(backend: Backend, p: Problem) -> dict[str, Line]:
    """Return the lines of a backend."""
    batch, terms, dz = p.batch, p.terms, p.gradient
    rows = batch.logits.view(-1, batch.vocab)

    def two_launches(i: int) -> None:
        scores = backend.forward(batch, terms, False)
        backend.backward(batch, scores.lse, p.weight, 1.0, dz)

    def draw(part: Tensor, seed: int) -> Any:
        return backend.sample(checks.make_sample_rows(part, seed, None, 0, 1.0, None))

    # each call takes other rows, so that they come from memory and not from the cache
    def a_few(i: int) -> Any:
        first = i * FEW % (len(rows) - FEW + 1)
        return draw(rows[first : first + FEW], i)

    # two launches are counted as scoring and backward
    known = "score_rows" if in_one_launch(backend, batch) else None
    found = {
        "scoring": Line(lambda i: backend.forward(batch, None, False), 1, 0, "score_rows"),
        "backward": Line(lambda i: backend.backward(batch, p.lse, p.weight, 1.0, dz), 1, 1, "write_rows"),
        "known weight": Line(lambda i: backend.forward_backward(batch, terms, False, 1.0, 1.0, dz), 1, 1, known),
        "sampling": Line(lambda i: draw(rows, i), 1, 0, "sample_rows"),
        "known weight, two launches": Line(two_launches, 2, 1),
        "scoring, with entropy": Line(lambda i: backend.forward(batch, None, True), 1, 0),
        f"sampling, {FEW} rows": Line(a_few, 1, 0, None, FEW),
    }
    if batch.logits.dtype == torch.float32:  # linear_dm_loss requests 16 bits for the next product
        narrow = dz.view(-1).view(torch.bfloat16)[: dz.numel()].view(dz.shape)
        found["backward, 16-bit gradient"] = Line(
            lambda i: backend.backward(batch, p.lse, p.weight, 1.0, narrow), 1, 0.5, "write_rows"
        )
    return found


def roofs(p: Problem) -> dict[str, Line]:
    """Return operations that move the same bytes and do nothing else."""
    z, dz = p.batch.logits, p.gradient
    return {"roof: copy": Line(lambda i: dz.copy_(z), 1, 1), "roof: read": Line(lambda i: z.view(-1).amax(), 1, 0)}


def timed(clock: Clock, shape: Shape, all_lines: Mapping[str, Line]) -> dict[str, Any]:
    """Return each line's time and the bandwidth of its least traffic, or the error that ended it."""
    found: dict[str, Any] = {}
    for name, line in all_lines.items():
        try:
            taken = measure(clock, line.call, rounds=1 if DRY else 7, enough=0 if DRY else ENOUGH)
        except Exception as error:
            found[name] = {"failed": said(error)}
            continue
        logits = (line.rows or shape.rows) * shape.vocab
        least = (line.reads + line.writes) * logits * shape.size
        found[name] = {**taken, "GB/s": round(least / taken["ms"] / 1e6, 1), "reads": line.reads, "writes": line.writes}
    return found


def main() -> None:
    path, clock, failed = results.folder() / "times.json", Wall() if DRY else Clock(), []
    found: list[dict[str, Any]] = []
    # Triton compiles for seconds, so it comes last
    for backend in (kernels.CUDA, kernels.TRITON):
        for shape in shapes():
            title = f"{backend.name} ({shape.rows}, {shape.vocab}) {shape.dtype}"
            why = backend.why_not(torch.device(DEVICE), getattr(torch, shape.dtype))
            entry: dict[str, Any] = {"title": title, "backend": backend.name, **shape._asdict()}
            if why:
                entry["not_run"] = why
            else:
                p = problem(shape)
                first = roofs(p) if backend is kernels.CUDA or kernels.CUDA.why_not(torch.device(DEVICE)) else {}
                entry["lines"] = timed(clock, shape, {**first, **lines(backend, p)})
                failed += [f"{title}: {n}: {x['failed']}" for n, x in entry["lines"].items() if "failed" in x]
                del p
            found.append(entry)
            results.write(path, found)
            print(title, entry.get("not_run") or {n: x.get("ms", x.get("failed")) for n, x in entry["lines"].items()},
                  flush=True)  # fmt: skip
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
