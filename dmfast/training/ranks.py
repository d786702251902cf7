"""Provide the processes of a distributed run to ``Matcher``, through accelerate."""

from __future__ import annotations

from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor


class AccelerateRanks:
    """The ``dmfast.ranks.Ranks`` of an ``accelerate.Accelerator``: the processes that draw sequences of their own.

    Under DDP, FSDP and DeepSpeed these are all of its processes. Under tensor parallelism the processes that hold parts
    of one model draw the same sequences and form one rank together.

    Args:
        accelerator: the accelerator, whose processes take a step together.
        parts: the number of consecutive processes that hold one model together.
    """

    def __init__(self, accelerator: Any, parts: int = 1) -> None:
        self.accelerator, self.parts = accelerator, parts

    @property
    def rank(self) -> int:
        """The number of this process among those that draw."""
        return int(self.accelerator.process_index) // self.parts

    @property
    def size(self) -> int:
        """The number of ranks that draw sequences of their own."""
        return int(self.accelerator.num_processes) // self.parts

    @property
    def processes(self) -> AccelerateRanks:
        """All processes as ranks of their own, to compare what has to be the same on all of them."""
        return AccelerateRanks(self.accelerator)

    def gather(self, values: Tensor) -> Tensor:
        """Return the values (N, ...) of all ranks as one tensor, in the order of the ranks."""
        if self.size == 1:
            return values
        everything = cast(Tensor, self.accelerator.gather(values.contiguous()))
        each = everything.view(self.size, self.parts, *values.shape)  # the processes of a rank have the same values
        return each[:, 0].reshape(self.size * values.shape[0], *values.shape[1:])  # -1 would fail for (N, 0)

    def gather_texts(self, texts: list[str]) -> list[str]:
        """Return the texts of all ranks, in the order of the ranks."""
        if self.size == 1:
            return texts
        of_processes = cast(list[list[str]], gather_object([texts]))
        return [text for each in of_processes[:: self.parts] for text in each]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        return cast(Tensor, self.accelerator.reduce(values, "sum")) / self.parts if self.size > 1 else values

    def agree(self, mine: bool) -> bool:
        """Return the verdict of the first process, on all processes."""
        everyone = self.processes
        if everyone.size == 1:
            return mine
        return bool(everyone.gather(torch.tensor([mine], device=self.accelerator.device))[0])
