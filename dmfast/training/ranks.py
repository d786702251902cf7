"""The processes of a distributed run as ``Matcher`` sees them, through accelerate."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


class AccelerateRanks:
    """``dmfast.ranks.Ranks`` over an ``accelerate.Accelerator``: those that draw sequences of their own.

    Under DDP, FSDP and DeepSpeed these are all of its processes. Under tensor parallelism they would not be.

    Args:
        accelerator: whose processes take a step together.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator

    @property
    def rank(self) -> int:
        """The number of this process among those that draw."""
        return int(self.accelerator.process_index)

    @property
    def size(self) -> int:
        """The number of processes that draw."""
        return int(self.accelerator.num_processes)

    def gather(self, values: Tensor) -> Tensor:
        """Return the (N, ...) of all ranks in their order."""
        return cast(Tensor, self.accelerator.gather(values.contiguous())) if self.size > 1 else values

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        return cast(Tensor, self.accelerator.reduce(values, "sum")) if self.size > 1 else values

    def agree(self, mine: bool) -> bool:
        """Return the verdict of rank 0."""
        if self.size == 1:
            return mine
        return bool(self.gather(torch.tensor([mine], device=self.accelerator.device))[0])
