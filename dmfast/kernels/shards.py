"""Put together rows whose vocabulary is cut among the ranks of a group.

A rank's kernel gives the log-sum-exp of its columns, the label's logit if the label is among them, and the entropy if
it is wanted. One exchange per chunk, of two or three fp64 numbers per row, turns them into the values of the whole row.
They have the same bits on every rank, so A has, too. After that, no rank needs anything from another to write the
gradient of its columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import faults
from .batch import IGNORE, LABEL, LSE, ROW_ENTROPY, Batch


class Shards(Protocol):
    """The ranks among which a vocabulary is cut.

    Attributes:
        start: the first token of this rank.
        vocab: the size of the whole vocabulary.
        largest: the largest number of columns of any rank. It sets the size of chunks, so all ranks cut the same ones.
    """

    @property
    def start(self) -> int: ...  # noqa: D102

    @property
    def vocab(self) -> int: ...  # noqa: D102

    @property
    def largest(self) -> int: ...  # noqa: D102

    def exchange(self, mine: Tensor | None, shape: tuple[int, int], look: bool) -> Tensor:
        """Return the values of all S ranks, (S, *shape) fp64, in the order of the ranks.

        Args:
            mine: this rank's values in fp64, or None if this rank has failed.
            shape: the shape of ``mine`` on every rank.
            look: whether to wait for the values, and to raise if another rank has failed.

        Raises:
            RuntimeError: another rank has failed, and ``look`` is set.
        """
        ...

    def add(self, x: Tensor) -> None:
        """Replace x by its sum over the ranks, in place."""
        ...


def whole_rows(parts: Tensor) -> Tensor:
    """Return the block of the whole rows, as ``Scores.rows`` has it, from the blocks of the shards.

    With l_s and H_s the log-sum-exp and the entropy of shard s and w_s = e^(l_s - l), l = log sum_s e^(l_s) and
    H = l - sum_s w_s (l_s - H_s).

    Args:
        parts: (S, K, R) fp64.
    """
    lse_of = parts[:, LSE]
    lse = torch.logsumexp(lse_of, 0)
    columns = [lse, parts[:, LABEL].sum(0)]
    if parts.shape[1] > ROW_ENTROPY:
        share = torch.where(lse_of == -torch.inf, 0.0, (lse_of - lse).exp())
        mean = torch.where(share == 0, 0.0, share * (lse_of - parts[:, ROW_ENTROPY]))
        columns.append(lse - mean.sum(0))
    return torch.stack(columns)


def sums_of_sequences(rows: Tensor, starts: Tensor) -> Tensor:
    """Return log pi and entropy of sequences, (2, B) fp64, from the block of their rows. The sums have a fixed order.

    Args:
        rows: (K, R) fp64.
        starts: (B+1,) int64, the first row of each sequence.
    """
    token_log_prob = rows[LABEL] - rows[LSE]
    entropy = rows[ROW_ENTROPY] if rows.shape[0] > ROW_ENTROPY else torch.zeros_like(token_log_prob)
    values = torch.stack([token_log_prob, entropy], 1)
    if not len(values):
        return values.new_zeros(2, len(starts) - 1)
    return torch.segment_reduce(values, "sum", offsets=starts, initial=0.0).T.contiguous()


@dataclass(frozen=True, eq=False)
class RowFaults:
    """A check that raises the first fault of rows that were put together. Every rank raises the same one."""

    batch: Batch  # packed, without its logits
    rows: Tensor

    def __call__(self) -> None:
        """Wait for the rows and check them.

        Raises:
            ValueError: a row holds NaN or +inf, or the logit of a label is -inf.
        """
        never = ~(self.rows[LABEL] - self.rows[LSE] > -torch.inf) & (self.batch.labels != IGNORE)
        if not bool(never.any()):
            return
        faults.check_rows(self.batch)  # a label that is not a token makes a row NaN too, and has its own message
        row = int(never.nonzero()[0])
        if bool(self.rows[LSE, row].isnan()):
            faults.raise_bad_row(self.batch, row)
        faults.raise_bad_label(self.batch, row)
