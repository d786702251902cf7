"""Find groups, which are the sequences of one prompt, whose values are all equal, and replace their sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .samples import Samples


@dataclass(frozen=True, eq=False)
class Scored:
    """N sequences that were drawn and scored.

    Attributes:
        samples: the sequences. The n sequences of a prompt lie together.
        inputs: (N,) fp64 each, the inputs of the loss by name.
        features: (N, F + M) fp64, as ``Batch.features``.
        log_base: (N,) fp64, log a(x); NaN where b = 0.
        rewards: (N,) fp64 each, the rewards by name if there are several.
    """

    samples: Samples
    inputs: dict[str, Tensor]
    features: Tensor
    log_base: Tensor
    rewards: dict[str, Tensor]

    @property
    def values(self) -> Tensor:
        """The values that the sequences of a prompt are compared by, (N,) fp64: the reward, or else b(x) = P/a."""
        if "reward" in self.inputs:
            return self.inputs["reward"]
        log_target = self.inputs["log_target"]
        return torch.where(log_target == -math.inf, 0.0, (log_target - self.inputs["log_base"]).exp())

    def replaced(self, prompts: Sequence[int], others: Scored, n: int) -> Scored:
        """Return these sequences with those of some prompts replaced by the first ones of others.

        Args:
            prompts: the places of the prompts.
            others: sequences whose first n * len(prompts) are of these prompts, in their order.
            n: sequences of a prompt.
        """
        places = torch.arange(len(self.samples))
        for k, prompt in enumerate(prompts):
            places[prompt * n :][:n] = len(self.samples) + k * n + torch.arange(n)

        def chosen(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.cat([mine, theirs])[places.to(mine.device)]

        return Scored(
            Samples.cat([self.samples, others.samples])[places].trimmed(),
            {name: chosen(value, others.inputs[name]) for name, value in self.inputs.items()},
            chosen(self.features, others.features), chosen(self.log_base, others.log_base),
            {name: chosen(value, others.rewards[name]) for name, value in self.rewards.items()},
        )  # fmt: skip


def are_uniform(context_id: Tensor, values: Tensor) -> Tensor:
    """Return for each of N sequences whether all sequences of its context have the same value, (N,) bool.

    Examples:
        >>> are_uniform(torch.tensor([5, 5, 8, 8]), torch.tensor([1.0, 1.0, 0.0, 1.0]))
        tensor([ True,  True, False, False])
    """
    contexts, place = torch.unique(context_id, return_inverse=True)
    low = values.new_full((len(contexts),), math.inf).scatter_reduce(0, place, values, "amin")
    high = values.new_full((len(contexts),), -math.inf).scatter_reduce(0, place, values, "amax")
    return (low == high)[place]
