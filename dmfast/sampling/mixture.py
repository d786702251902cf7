"""Combine several samplers into one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from ..models import Source
from ..samples import Prompt, Samples
from ..seeds import seed_for
from .prompted import one_context
from .protocol import Sampler


class Mixture:
    """A sum of proposals, q(x) = sum_k weight_k q_k(x). It covers whatever one of its parts covers.

    Args:
        parts: proposals for the same target.
        weights: a positive number for each part. They are divided by their sum. Default: equal weights.

    Attributes:
        version: the value of ``Samples.version`` in its draws, whatever the versions of the parts are.

    Raises:
        ValueError: there is no part, or the weights are not as many positive numbers.
    """

    def __init__(self, parts: Sequence[Sampler], weights: Sequence[float] | None = None) -> None:
        weights = [1.0] * len(parts) if weights is None else list(weights)
        if not parts or len(weights) != len(parts) or not all(0 < w < math.inf for w in weights):
            raise ValueError(f"weights must be a positive number for each of {len(parts)} parts, got {weights!r}")
        self.parts = list(parts)
        self.log_weights = torch.tensor(weights, dtype=torch.float64).log()
        self.log_weights -= self.log_weights.logsumexp(0)
        self.version = 0

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Prompt] | None = None, n: int = 1, *, max_new_tokens: int, temperature: float = 1.0,
        seed: int | None = None, batch_size: int | None = None, first_row: int = 0,
    ) -> Samples:  # fmt: skip
        """Draw n independent sequences in random order, with log q of the mixture.

        Args:
            prompts: as in ``Prompted.sample``.
            n: the number of sequences.
            max_new_tokens, temperature, seed, batch_size: as in ``LanguageModel.sample``.
            first_row: the place of the first of them, where they are one process's share of more. How they are shared
                out decides which part draws a sequence. The sequences are independent in any case.
        """
        context = [one_context(prompts)]
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        generator = torch.Generator().manual_seed(seed_for(seed, f"mixture {first_row}"))
        which = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        drawn, rows = [], []
        for k, part in enumerate(self.parts):
            mine = (which == k).nonzero()[:, 0]
            if len(mine):
                drawn.append(part.sample(context, len(mine), max_new_tokens=max_new_tokens, temperature=temperature,
                                         seed=seed_for(seed, f"part {k} of a mixture"), batch_size=batch_size,
                                         first_row=first_row))  # fmt: skip
                rows.append(mine)
        x = Samples.cat(drawn)
        x = x[torch.cat(rows).argsort().to(x.tokens.device)]
        version = torch.full_like(x.version, self.version)
        return replace(x, log_prob=self.log_prob(x, batch_size=batch_size), version=version, has_log_prob=True)

    @torch.no_grad()
    def log_prob(self, samples: Samples, *, batch_size: int | None = None) -> Tensor:
        """Return (N,) fp64, the log of the weighted sum in nats. Every part scores every sequence."""
        each = torch.stack([part.log_prob(samples, batch_size=batch_size).double() for part in self.parts], 1)
        return (each + self.log_weights.to(each.device)).logsumexp(1)

    def load(self, source: Source) -> NoReturn:
        """Refuse to load, because a mixture can't know which of its parts should be replaced.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"a Mixture has no parameters of its own to replace by those of a {type(source).__name__}: call load of "
            "the part that should follow the policy"
        )
