"""Hold what a run carries from step to step, and update it from a step's samples."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .estimators import PartitionFunction, PartitionFunctions
from .objectives import AdaptiveBeta


@dataclass
class Running:
    """What is carried from step to step. A step works on a copy, which takes its place at the step's end.

    Attributes:
        lambda_: the target's lambda, which all of this is meant with.
        beta: the coefficient of KL-control where it is steered, or None.
        partitions: log Z of each context, by its identity.
        scale: the running mean of P, whose log is c of ``reinforce_p``.
        returns: the sum and the number of rho*r, for ``baseline="mean"``.
        zero_steps: steps in a row without a sequence of P > 0.
        steps: optimiser steps so far.
    """

    lambda_: list[float]
    beta: AdaptiveBeta | None
    partitions: PartitionFunctions
    scale: PartitionFunction
    returns: tuple[float, int] = (0.0, 0)
    zero_steps: int = 0
    steps: int = 0

    @staticmethod
    def start(lambda_: list[float], beta: AdaptiveBeta | None, steps: int = 0) -> Running:
        """Return what is carried as long as nothing was seen under this lambda."""
        return Running(lambda_, beta, PartitionFunctions(), PartitionFunction(), steps=steps)

    def after(self, context_id: Tensor, log_target: Tensor, log_proposal: Tensor, partition: str) -> Running:
        """Return a copy with one more step, whose samples it has taken in.

        Args:
            context_id, log_target, log_proposal: (N,) of all ranks.
            partition: ``step`` for a Z of these samples alone.
        """
        scale = copy.copy(self.scale)
        scale.update(log_target, torch.zeros_like(log_target))
        partitions = self.partitions_before(partition).updated(context_id, log_target, log_proposal)
        nothing = bool((log_target == -math.inf).all())
        return replace(
            self, partitions=partitions, scale=scale, zero_steps=self.zero_steps + 1 if nothing else 0,
            steps=self.steps + 1, beta=copy.copy(self.beta),
        )  # fmt: skip

    def started(self, context_id: Tensor, rate: Tensor, n: Tensor) -> Running:
        """Return a copy in which contexts that were not seen yet start from pass rates (``EBM.fit_z``)."""
        return replace(self, partitions=self.partitions.started(context_id, rate, n))

    def partitions_before(self, partition: str) -> PartitionFunctions:
        """Return what a step's samples are added to."""
        return PartitionFunctions() if partition == "step" else self.partitions

    @property
    def mean_return(self) -> float:
        """The mean of rho*r over all steps, 0 before the first."""
        total, count = self.returns
        return total / max(count, 1)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that ``load_state_dict`` needs to go on, as numbers, lists and tensors."""
        return {
            "lambda": self.lambda_,
            "beta": None if self.beta is None else self.beta.state_dict(),
            "partitions": self.partitions.state_dict(),
            "scale": self.scale.state_dict(),
            "returns": self.returns,
            "zero_steps": self.zero_steps,
            "steps": self.steps,
        }

    def loaded(self, state: dict[str, Any]) -> Running:
        """Return what ``state_dict`` was taken of. A beta that this run steers goes on from the state's value."""
        partitions, scale, beta = PartitionFunctions(), PartitionFunction(), copy.copy(self.beta)
        partitions.load_state_dict(state["partitions"])
        scale.load_state_dict(state["scale"])
        if beta is not None and state["beta"] is not None:
            beta.load_state_dict(state["beta"])
        total, count = state["returns"]
        return Running(
            list(state["lambda"]), beta, partitions, scale, (float(total), int(count)), int(state["zero_steps"]),
            int(state["steps"]),
        )  # fmt: skip
