"""Outputs of the loss put together: the parts of a step as one, and a part with the sequences that got no forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .kernels.result import DMLossOutput


def whole_step(outputs: Sequence[DMLossOutput], order: Tensor, gather: Callable[[Tensor], Tensor]) -> DMLossOutput:
    """Return the outputs of the parts of a step as the output of one call, without its loss.

    Args:
        outputs: of all parts of this rank.
        order: (N,) int64, the place of each sequence of the step among the sequences of the parts.
        gather: puts the (N, ...) of all ranks together.
    """

    def whole(name: str) -> Tensor | None:
        parts = [getattr(out, name) for out in outputs]
        return None if parts[0] is None else gather(torch.cat(parts)[order])

    names = ("log_prob", "log_ratio", "log_target_ratio", "weight", "log_proposal", "log_target", "log_z")
    values: dict[str, Any] = {name: whole(name) for name in names} | {"_scored": whole("scored")}
    n_clipped = gather(torch.stack([out.n_clipped for out in outputs]).sum()[None]).sum()
    return replace(outputs[0], loss=outputs[0].loss.detach(), n_clipped=n_clipped, entropy=None, _recorded=(), **values)


def with_skipped(out: DMLossOutput, kept: Tensor, inputs: dict[str, Tensor], on_policy: bool) -> DMLossOutput:
    """Return the output for the kept sequences as one for all of them.

    The others have weight 0. Their log pi and their entropy are NaN, but for a log pi that the sampler knows, since it
    drew them from pi itself.

    Args:
        out: of the kept sequences.
        kept: (N,) bool.
        inputs: ``log_target``, ``log_proposal`` and ``log_z`` of all N sequences, (N,) fp64 each.
        on_policy: whether the sequences were drawn from pi itself.
    """

    def spread(values: Tensor, rest: float) -> Tensor:
        return torch.full(kept.shape, rest, dtype=values.dtype, device=values.device).masked_scatter(kept, values)

    log_u = inputs["log_target"] - inputs["log_proposal"] - inputs["log_z"]
    return replace(
        out,
        log_prob=torch.where(kept, spread(out.log_prob, math.nan), inputs["log_proposal"] if on_policy else math.nan),
        log_ratio=None if out.log_ratio is None else spread(out.log_ratio, 0.0 if on_policy else math.nan),
        log_target_ratio=torch.where(inputs["log_z"] == -math.inf, -math.inf, log_u),
        entropy=None if out.entropy is None else spread(out.entropy, math.nan),
        weight=spread(out.weight, 0.0), _scored=kept,
        log_proposal=inputs["log_proposal"], log_target=inputs["log_target"], log_z=inputs["log_z"],
    )  # fmt: skip
