"""What a call on a CUDA device needs beside what ``native.py`` does for every device: its stream, memory for the
counters of blocks, and faults, which the device records and the host reads later.

``_C.cuda`` may also be a build of the same kernels for the host (``scripts/ci/host_cuda.sh``), whose device is the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import objectives
from ..objectives import Terms
from . import checks
from .batch import Batch, Draws

Recorded: TypeAlias = Callable[[], object]  # reads what a device has recorded, and raises it
_BAD_ROW, _BAD_LABEL = 1, 2  # as csrc/batch.h numbers faults; the others say which check to ask
_WEIGHT_PLACE = 1 << 59  # csrc/cuda/loss.h


def synchronous() -> bool:
    """DMFAST_SYNC_CHECKS=1: every call waits for its kernels and raises at once."""
    return os.environ.get("DMFAST_SYNC_CHECKS", "0") not in ("", "0")


def stream_of(x: Tensor) -> tuple[int, int]:
    """Index of the device, and the handle of its current stream."""
    if x.device.type == "cpu":
        return 0, 0
    stream = torch.cuda.current_stream(x.device)
    return stream.device.index, stream.cuda_stream


class Workspace(NamedTuple):
    """Memory of one call. ``native.py`` keeps it until the kernel is queued; torch's allocator, until it has run."""

    device: int
    stream: int
    values: Tensor
    counters: Tensor
    status: Tensor  # 0-d int64

    @property
    def arguments(self) -> tuple[int, int, int, int, int]:
        """For ``_C.cuda.Workspace``."""
        return self.device, self.stream, self.values.data_ptr(), self.counters.data_ptr(), self.status.data_ptr()


def make_workspace(x: Tensor, n_values: int, n_counters: int) -> Workspace:
    """Memory on the device of x, for its current stream.

    Counters too are new at every call, for a memset of a few KB: kept ones would be shared by streams, by graphs that
    may be replayed on any, and with torch.compile's pools of memory, which take back what they gave.
    """
    like: dict[str, Any] = {"device": x.device}
    return Workspace(
        *stream_of(x),
        torch.empty(n_values, dtype=torch.float64, **like),
        torch.zeros(n_counters, dtype=torch.int32, **like),
        torch.empty((), dtype=torch.int64, **like),
    )


def with_order(batch: Batch) -> Batch:
    """The batch with cu_seqlens that no kernel can be led astray by. Where they are out of order, which the host can't
    see without waiting, no label is a token, so that all sequences have a fault."""
    starts, n = batch.cu_seqlens, batch.n_rows
    if starts is None or batch.part_of is not None:
        return batch
    if batch.n_sequences == 0 and n > 0:
        checks.check_rows(batch)
    ordered = (starts[0] == 0) & (starts[-1] == n) & (starts.diff() >= 0).all()
    instead = torch.zeros_like(starts)
    instead[-1] = n
    return batch._replace(
        cu_seqlens=torch.where(ordered, starts, instead), labels=torch.where(ordered, batch.labels, batch.vocab)
    )


@dataclass(frozen=True, eq=False)
class RowFaults:
    """Raises the first fault of a call as the CPU would have, once the host may wait. Not a closure, so that a graph of
    torch.compile can give it back."""

    batch: Batch  # without its logits
    terms: Terms | None
    log_prob: Tensor
    status: Tensor  # 0-d int64, -1: none

    def __call__(self) -> None:
        """Reads on the host."""
        batch, terms, code = self.batch, self.terms, int(self.status)
        if code < 0:
            return
        place, fault = divmod(code, 8)
        if fault == _BAD_ROW:
            checks.raise_bad_row(batch, place)
        if fault == _BAD_LABEL:
            checks.raise_bad_label(batch, place)
        checks.check_rows(batch)
        assert terms is not None
        first = batch.part_of.first_sequence if batch.part_of is not None else 0
        checks.check_terms(terms, first)
        # what scores.weight has 0 for
        checks.check_weights(objectives.clipped_weights(terms, self.log_prob), first)
        raise RuntimeError(f"dmfast: the device refused an input or the weight of sequence {place - _WEIGHT_PLACE}")


def row_faults(batch: Batch, terms: Terms | None, log_prob: Tensor, status: Tensor) -> RowFaults:
    """Does not keep the logits."""
    return RowFaults(batch._replace(logits=batch.logits.new_empty(0, batch.vocab)), terms, log_prob, status)


@dataclass(frozen=True, eq=False)
class WeightFaults:
    """Raises what the rows, the inputs or the weights that torch made of them are at fault for."""

    rows: tuple[Recorded, ...]
    terms: Terms
    weight: Tensor  # (B,) as made
    first_sequence: int

    def __call__(self) -> None:
        """Reads on the host."""
        for rows in self.rows:
            rows()
        checks.check_terms(self.terms, self.first_sequence)
        checks.check_weights(self.weight, self.first_sequence)


def settle_draws(draws: Draws, status: Tensor) -> None:
    """Raises the first row that was no distribution, if the host is to wait for it."""
    if synchronous() and int(status) >= 0:
        checks.raise_bad_draw(draws, int(status))


def settle(check: Recorded) -> tuple[Recorded, ...]:
    """What is left to be read by ``out.check()``."""
    if not synchronous():
        return (check,)
    check()
    return ()


def inputs_ok(terms: Terms) -> Tensor | bool:
    """Which sequences (B,) have per-sequence inputs that ``checks.check_terms`` allows: the twin of csrc/cuda/loss.cu's
    for weights that torch makes. Few operations, since each is a launch."""
    finite = [terms.log_proposal, terms.reward, terms.baseline]
    below_infinity = [terms.log_target, terms.log_z]
    (finite if terms.max_weight == torch.inf else below_infinity).append(terms.log_base)
    ok: Tensor | bool = True
    if given := [x for x in finite if isinstance(x, Tensor)]:
        ok = reduce(torch.add, given).isfinite()  # inf - inf is NaN
    if given := [x for x in below_infinity if isinstance(x, Tensor)]:
        ok = ok & (reduce(torch.maximum, given) < torch.inf)  # NaN stays in a maximum
    return ok


def usable(weight: Tensor, log_prob: Tensor, terms: Terms) -> Tensor:
    """Weights (B) made by torch, 0 where fp32 can't hold them and in sequences with a fault: of a row, whose log_prob
    is NaN, or of an input, on which the weight may not depend."""
    ok = (weight.abs() <= torch.finfo(torch.float32).max) & ~log_prob.isnan() & inputs_ok(terms)
    return torch.where(ok, weight, 0.0)
