"""Hold the sequences of an optimiser step, and split them into parts that go through the policy together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .objectives import Objective, Terms
from .running import Running
from .samples import Prompt, Samples


@dataclass(frozen=True)
class Prompts:
    """The prompts from which sequences are drawn.

    Attributes:
        prompts: the prompts in any form that ``LanguageModel.sample`` takes; None for the one empty prompt.
        context_id: an integer for each prompt, the identity of its context over the whole run. None: a digest of the
            prompt's tokens.
        rows: the row of the data set for each prompt, or None.

    Raises:
        TypeError: a context_id is not an integer of 64 bits.
        ValueError: the number of context ids, or of rows, is not the number of prompts.
    """

    prompts: Sequence[Prompt] | None = None
    context_id: Sequence[int] | Tensor | None = None
    rows: Sequence[Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        if self.context_id is not None:
            object.__setattr__(self, "context_id", _integers(self.context_id))
        for name in ("context_id", "rows"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self):
                raise ValueError(f"{name} must have one entry for each of {len(self)} prompts, got {len(given)}")

    def __len__(self) -> int:
        return 1 if self.prompts is None else len(self.prompts)

    def at(self, places: Sequence[int]) -> Prompts:
        """Return some of the prompts."""
        return Prompts(
            None if self.prompts is None else [self.prompts[place] for place in places],
            None if self.context_id is None else torch.as_tensor(self.context_id)[list(places)],
            None if self.rows is None else [self.rows[place] for place in places],
        )  # fmt: skip

    def of(self, samples: Samples) -> Samples:
        """Return the sequences that were drawn from these prompts with the identity and the row of their context."""
        if self.context_id is None:
            identity = _digests(samples)
        else:
            identity = torch.as_tensor(self.context_id, device=samples.context_id.device)[samples.context_id]
        return replace(samples.with_rows(self.rows), context_id=identity)


def _integers(context_id: Any) -> Tensor:
    """Return the identities of contexts as an int64 tensor of one dimension."""
    expected = f"context_id must hold one integer for each prompt, from -2**63 to 2**63 - 1, got {context_id!r:.200}"
    try:
        ids = torch.as_tensor(context_id)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(expected) from error
    if ids.shape == (0,):  # torch makes floats of an empty list
        return ids.to(torch.int64)
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool or ids.dim() != 1:
        raise TypeError(expected)
    return ids.to(torch.int64)


def _digests(samples: Samples) -> Tensor:
    """Return (N,) int64, the digest of the tokens of each sequence's prompt."""
    places: list[int] = samples.context_id.tolist()
    first = {place: row for row, place in reversed(list(enumerate(places)))}
    prompts, seen = samples.tokens[:, : samples.prompt_len], samples.attention_mask[:, : samples.prompt_len].bool()
    found = {}
    for place, row in first.items():
        tokens = ",".join(map(str, prompts[row][seen[row]].tolist()))
        digest = hashlib.blake2b(tokens.encode(), digest_size=8).digest()
        found[place] = int.from_bytes(digest, "big", signed=True)
    return torch.tensor([found[place] for place in places], dtype=torch.int64, device=samples.context_id.device)


@dataclass(frozen=True)
class SamplingOptions:
    """The arguments of ``LanguageModel.sample`` besides the prompts, n and the seed."""

    max_new_tokens: int
    temperature: float = 1.0
    batch_size: int | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """One optimiser step on this rank: N sequences, drawn and scored. ``Matcher.draw`` makes it.

    Attributes:
        samples: the sequences. Their ``context_id`` is the identity of their context over the run.
        inputs: (N,) fp64 each, the inputs of the loss by name: ``log_target``, ``log_proposal``, ``log_z``, and those
            of ``reward``, ``log_base`` and ``baseline`` that the objective needs.
        features: (N, F + M) fp64, the target's moments and then the features that it monitors.
        log_base: (N,) fp64, log a(x) in nats; NaN where b = 0.
        forwarded: (N,) bool, on the CPU, the sequences that get a forward of the policy.
        objective: the objective of this step.
        pending: the run's state including this step's samples. ``Matcher.commit`` makes it the current one.
        drawn: the prompts and the options with which the sequences were drawn.
        advantage: (N,) fp64, the weights of the log-probabilities where these are fixed when the step is drawn. They
            are r - baseline at the sampling policy where the batch serves several optimiser steps, and A for an
            objective with ``weight_known``.
        epoch: the number of steps that the batch has served before.
        anew: whether lambda has changed, so that all earlier estimates are void.
        whole_contexts: whether the sequences of a context go through the loss together.
        whole: the terms of the whole step, over all ranks, where the objective is a function.
        n_sequences: the number of sequences, on an average rank, over which the step's mean is taken. None: all.
        first: (N,) fp64 each, log q, log P and log Z of the first draws, where some sequences were drawn again.
        rewards: (N,) fp64 each, the rewards by name where there are several.
        seconds: the seconds that sampling, scoring and the policy took, by name.
        counts: what the scorers counted on this rank, by name.
        gradient: the norm and the variance of the gradient, by name, where they were measured.
    """

    samples: Samples
    inputs: dict[str, Tensor]
    features: Tensor
    log_base: Tensor
    forwarded: Tensor
    objective: Objective | Callable[[Terms], Tensor]
    pending: Running
    drawn: tuple[Prompts, SamplingOptions] | None = None
    advantage: Tensor | None = None
    epoch: int = 0
    anew: bool = False
    whole_contexts: bool = False
    whole: Terms | None = None
    n_sequences: float | None = None
    first: tuple[Tensor, Tensor, Tensor] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    gradient: dict[str, float] = field(default_factory=dict)
    rewards: dict[str, Tensor] = field(default_factory=dict)
    _again: Callable[[Batch], Batch] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def split(self, size: int | None = None) -> list[Microbatch]:
        """Return the parts that go through the policy one after the other, each sequence in one of them.

        Sequences of similar length go together, so that a part has little padding. The sequences of a context stay
        together where the objective needs this (``whole_contexts``).

        Args:
            size: the most sequences of a part. Default: all of them.

        Raises:
            TypeError: size is not an integer.
            ValueError: size is not positive, or too small for the sequences of a context that stay together.
        """
        size = len(self) if size is None else size
        if not isinstance(size, int):
            raise TypeError(f"size must be an integer, the most sequences of a part, got {size!r}")
        if size < 1:
            raise ValueError(f"size must be positive, got {size!r}")
        if size >= len(self):
            return [Microbatch(self, torch.arange(len(self)))]
        # places stay on the CPU, so that no part has to wait for the device
        lengths = self.samples.attention_mask.sum(1).cpu()
        if not self.whole_contexts:
            return [Microbatch(self, places) for places in torch.split(lengths.argsort(stable=True), size)]
        contexts: dict[int, list[int]] = {}
        for place in lengths.argsort(stable=True).tolist():
            contexts.setdefault(int(self.samples.context_id[place]), []).append(place)
        parts: list[list[int]] = [[]]
        for places in contexts.values():
            if len(places) > size:
                raise ValueError(
                    f"the objective needs all sequences of a context in one call of the loss, and a context has "
                    f"{len(places)} of them: parts of {size} are too small; split({len(places)}) or more"
                )
            if len(parts[-1]) + len(places) > size:
                parts.append([])
            parts[-1] += sorted(places)
        return [Microbatch(self, torch.tensor(places)) for places in parts]

    def again(self) -> Batch:
        """Return the batch for another optimiser step, after ``Matcher.commit`` of the step before.

        Raises:
            RuntimeError: the batch is not committed, or has served all of the matcher's ``ppo_epochs``.
        """
        assert self._again is not None
        return self._again(self)

    def state_dict(self) -> dict[str, Any]:
        """Return what further steps on the batch need, as numbers and tensors, without the rows of the data set."""
        return {
            "samples": self.samples.state_dict(), "inputs": self.inputs, "features": self.features,
            "log_base": self.log_base, "advantage": self.advantage, "epoch": self.epoch,
            "rewards": self.rewards,
            "beta": self.objective.beta if isinstance(self.objective, Objective) else None,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Microbatch:
    """A part of a batch, whose sequences go through the policy together.

    Attributes:
        batch: the whole step.
        places: (n,) int64, on the CPU, the places of the part's sequences in the batch.
    """

    batch: Batch
    places: Tensor

    def __len__(self) -> int:
        return len(self.places)

    @cached_property
    def samples(self) -> Samples:
        """The part's sequences, without columns that are padding in all of them."""
        return self.batch.samples[self.places].trimmed()

    @property
    def inputs(self) -> dict[str, Tensor]:
        """(n,) fp64 each, the inputs of the loss for the part's sequences, by name."""
        inputs = self.batch.inputs
        if self.batch.advantage is not None:
            kept = {name: inputs[name] for name in ("log_target", "log_proposal", "log_z")}
            inputs = kept | {"reward": self.batch.advantage}
        return {name: value[self.places] for name, value in inputs.items()}
