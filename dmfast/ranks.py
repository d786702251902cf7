"""Define what a step needs to know of several processes that take it together. By default there is one process."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """Several processes that take an optimiser step together, each with its share of the sequences.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
    """

    @property
    def rank(self) -> int: ...  # noqa: D102

    @property
    def size(self) -> int: ...  # noqa: D102

    def gather(self, values: Tensor) -> Tensor:
        """Return the (N, ...) of all ranks one after the other in their order, (size * N, ...), on every rank."""

    def agree(self, mine: bool) -> bool:
        """Return on every rank the verdict of rank 0."""


class OneProcess:
    """The ``Ranks`` of a process that trains alone."""

    rank = 0
    size = 1

    def gather(self, values: Tensor) -> Tensor:
        """Return the values as they are."""
        return values

    def agree(self, mine: bool) -> bool:
        """Return this process's verdict."""
        return mine


def share(values: Tensor, ranks: Ranks) -> Tensor:
    """Return the values of this rank's sequences from the values of all ranks, as ``gather`` returned them."""
    n = len(values) // ranks.size
    return values[ranks.rank * n :][:n]
