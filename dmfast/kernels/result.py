"""What ``dm_loss`` returns, whichever backend ran."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import Batch


@dataclass(eq=False)  # frozen costs a microsecond a call
class DMLossOutput:
    """The loss and the per-sequence scalars that it came from. All but ``loss`` carry no gradient.

    Attributes:
        loss: 0-d fp64, or (B,) with ``reduction="none"``; carries the gradient.
        log_prob: (B,) fp64, log pi(x) in nats.
        log_ratio: (B,) fp64, log rho = log pi - log q; 0 on-policy. None where log_proposal was not given.
        log_target_ratio: (B,) fp64, log u = log P - log Z - log q; None where log_target or log_z was not given.
        weight: (B,) fp64, A.
        n_clipped: 0-d int64, weights that max_weight bounded.
        entropy: (B,) fp64, nats summed over scored tokens, with ``return_entropy``.
        log_proposal, log_target, log_z: (B,) fp64, the inputs as the loss used them, or None.
    """

    loss: Tensor
    log_prob: Tensor
    log_ratio: Tensor | None
    log_target_ratio: Tensor | None
    weight: Tensor
    n_clipped: Tensor
    entropy: Tensor | None
    log_proposal: Tensor | None
    log_target: Tensor | None
    log_z: Tensor | None
    _recorded: tuple[Callable[[], object], ...] = ()
    _scored: Tensor | None = None  # None: all; most calls don't ask, and a tensor costs microseconds

    @property
    def scored(self) -> Tensor:
        """(B,) bool, sequences whose log pi was computed by this call."""
        return torch.ones_like(self.weight, dtype=torch.bool) if self._scored is None else self._scored

    @property
    def n_empty(self) -> Tensor:
        """0-d int64, sequences whose context has log_z = -inf: their A is 0 and they count in B."""
        if self.log_z is None:
            return torch.zeros((), dtype=torch.int64, device=self.weight.device)
        return (self.log_z == -torch.inf).sum()

    def check(self) -> DMLossOutput:
        """Raises what a device has recorded and the host has not read yet. The CPU raises at once."""
        for check in self._recorded:
            check()
        return self


def denominator(batch: Batch, reduction: str, num_sequences: float | None) -> float:
    """What the sum over sequences is divided by."""
    if reduction != "mean":
        return 1.0
    return float(num_sequences) if num_sequences is not None else float(max(batch.n_sequences, 1))


def reduce(per_sequence: Tensor, reduction: str, divide_by: float) -> Tensor:
    """mean | sum | none over (B,) losses."""
    return per_sequence if reduction == "none" else per_sequence.sum() / divide_by
