"""What goes into a kernel and what comes out: logits with the rows that are scored, per-sequence results."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Part(NamedTuple):
    """Where the rows of a batch come from."""

    whole: Batch
    rows: Tensor  # (rows,) int64: which row of the whole each is
    first_sequence: int


class Batch(NamedTuple):
    """B sequences of logits, checked, in the form that kernels take.

    ``logits`` is (B,T,V) with any batch and time strides, or packed (N,V) with ``cu_seqlens``.
    ``labels`` is (rows,) int64, contiguous, one per row of logits in sequence order; -100 = not scored.
    """

    logits: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None  # (B+1,) int64, contiguous
    n_sequences: int
    steps: int  # T; 0 when packed
    scale: float  # 1 / temperature
    softcap: float  # 0.0: none
    part_of: Part | None = None  # for errors

    @property
    def vocab(self) -> int:
        """V."""
        return self.logits.shape[-1]

    @property
    def n_rows(self) -> int:
        """B * T, or N when packed."""
        return self.labels.shape[0]


def flat(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None, float, float]:
    """What ``batch_of`` makes a batch of: the schemas of custom ops know tensors and numbers only."""
    return batch.logits, batch.labels, batch.cu_seqlens, batch.scale, batch.softcap


def batch_of(logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, scale: float, softcap: float) -> Batch:
    """The batch that is ``flat`` so."""
    packed = cu_seqlens is not None
    n = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else logits.shape[0]
    return Batch(logits, labels, cu_seqlens, n, 0 if packed else logits.shape[1], scale, softcap)


class Draws(NamedTuple):
    """N rows of logits (N,V) to draw a token from each, checked."""

    logits: Tensor
    seed: int  # in [0, 2^64)
    row_ids: Tensor | None  # (N,) int64, contiguous; None: 0, 1, ...
    step: int
    scale: float  # 1 / temperature
    softcap: float  # 0.0: none


class Scores(NamedTuple):
    """What one pass over the logits yields. All fp64; (B,) unless said otherwise."""

    lse: Tensor  # (rows,)
    log_prob: Tensor
    entropy: Tensor | None
    log_ratio: Tensor | None = None  # these are None when only scoring
    log_target_ratio: Tensor | None = None
    weight: Tensor | None = None
    loss: Tensor | None = None  # -A log pi per sequence
    total: Tensor | None = None  # 0-d: the sum of loss in sequence order, divided by what the call says
    n_clipped: Tensor | None = None  # 0-d int64
    recorded: tuple[Callable[[], object], ...] = ()  # each reads what a device recorded about its call, and raises it
