"""The processes of a distributed run as ``Matcher`` sees them, through accelerate."""

from __future__ import annotations

from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor


class AccelerateRanks:
    """``dmfast.ranks.Ranks`` over an ``accelerate.Accelerator``: those that draw sequences of their own.

    Under DDP, FSDP and DeepSpeed these are all of its processes. Under tensor parallelism the processes that hold parts
    of one model draw the same sequences, and are one rank together.

    Args:
        accelerator: whose processes take a step together.
        parts: how many processes, one after the other, hold one model together.
    """

    def __init__(self, accelerator: Any, parts: int = 1) -> None:
        self.accelerator, self.parts = accelerator, parts

    @property
    def rank(self) -> int:
        """The number of this process among those that draw."""
        return int(self.accelerator.process_index) // self.parts

    @property
    def size(self) -> int:
        """How many draw sequences of their own."""
        return int(self.accelerator.num_processes) // self.parts

    @property
    def processes(self) -> AccelerateRanks:
        """All processes, each for itself: what has to be the same on all of them is compared between these."""
        return AccelerateRanks(self.accelerator)

    def gather(self, values: Tensor) -> Tensor:
        """Return the (N, ...) of all ranks in their order."""
        if self.size == 1:
            return values
        everything = cast(Tensor, self.accelerator.gather(values.contiguous()))
        each = everything.view(self.size, self.parts, *values.shape)  # the parts of a rank give the same
        return each[:, 0].reshape(self.size * values.shape[0], *values.shape[1:])  # -1 would not do for (N, 0)

    def gather_texts(self, texts: list[str]) -> list[str]:
        """Return the texts of all ranks in their order."""
        if self.size == 1:
            return texts
        of_processes = cast(list[list[str]], gather_object([texts]))
        return [text for each in of_processes[:: self.parts] for text in each]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        return cast(Tensor, self.accelerator.reduce(values, "sum")) / self.parts if self.size > 1 else values

    def agree(self, mine: bool) -> bool:
        """Return the verdict of the first process."""
        everyone = self.processes
        if everyone.size == 1:
            return mine
        return bool(everyone.gather(torch.tensor([mine], device=self.accelerator.device))[0])
