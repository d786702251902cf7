"""The checks of ``checks.py`` that look at values, for torch.compile: custom ops, which run when the graph does.

Each returns a copy of a tensor that it has looked at, to be used in its place: an op whose result nobody needs is
dropped.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor

from ..objectives import INFINITE_AT_ZERO, Objective, Terms
from . import checks
from .batch import Batch, Draws, batch_of, flat

# they wait for the device, which a captured CUDA graph can't; torch 2.6 has no way to say so
_OPTIONS: dict[str, Any] = {"mutates_args": ()}
if hasattr(torch.Tag, "cudagraph_unsafe"):
    _OPTIONS["tags"] = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("dmfast::check_logits", **_OPTIONS)
def _logits(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    batch = batch_of(logits, labels, cu_seqlens, scale, softcap)
    checks.check_logits(batch)
    return labels.clone(), labels.new_empty(0) if cu_seqlens is None else cu_seqlens.clone()


@_logits.register_fake
def _(logits, labels, cu_seqlens, scale, softcap):  # type: ignore[no-untyped-def]
    return torch.empty_like(labels), labels.new_empty(0) if cu_seqlens is None else torch.empty_like(cu_seqlens)


@torch.library.custom_op("dmfast::check_terms", **_OPTIONS)
def _terms(
    labels: Tensor, infinite: str, max_weight: float, log_proposal: Tensor | None, log_target: Tensor | None,
    log_z: Tensor | None, reward: Tensor | None, log_base: Tensor | None, baseline: Tensor | None,
) -> Tensor:  # fmt: skip
    objective = Objective(infinite or "dpg")  # all others are checked alike, functions too
    bound = max_weight or math.inf
    checks.check_terms(Terms(objective, False, bound, log_proposal, log_target, log_z, reward, log_base, baseline))
    return labels.clone()


@_terms.register_fake
def _(labels, *args):  # type: ignore[no-untyped-def]
    return torch.empty_like(labels)


@torch.library.custom_op("dmfast::check_labels", **_OPTIONS)
def _labels(
    token_log_prob: Tensor, logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, scale: float, softcap: float
) -> Tensor:
    return checks.check_labels(token_log_prob, batch_of(logits, labels, cu_seqlens, scale, softcap)).clone()


@_labels.register_fake
def _(token_log_prob, *args):  # type: ignore[no-untyped-def]
    return torch.empty_like(token_log_prob)


_labels.register_autograd(lambda ctx, grad: (grad, *(None,) * 5))


@torch.library.custom_op("dmfast::check_draws", **_OPTIONS)
def _draws(logits: Tensor, row_ids: Tensor | None) -> Tensor:
    return checks.check_draws(Draws(logits, 0, row_ids, 0, 1.0, 0.0)).logits.clone()


@_draws.register_fake
def _(logits, row_ids):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits)


@torch.library.custom_op("dmfast::check_weight", **_OPTIONS)
def _weight(weight: Tensor) -> Tensor:
    return checks.check_weights(weight).clone()


@_weight.register_fake
def _(weight):  # type: ignore[no-untyped-def]
    return torch.empty_like(weight)


def check_logits(batch: Batch) -> Batch:
    """``checks.check_logits``."""
    logits, labels, cu_seqlens, scale, softcap = flat(batch)
    labels, starts = _logits(logits.detach(), labels, cu_seqlens, scale, softcap)
    return batch_of(logits, labels, None if cu_seqlens is None else starts, scale, softcap)


def check_terms(batch: Batch, terms: Terms) -> Batch:
    """``checks.check_terms``."""
    name = terms.objective.name if isinstance(terms.objective, Objective) else ""
    bound = terms.max_weight if terms.max_weight < math.inf else 0.0
    labels = _terms(
        batch.labels, name if name in INFINITE_AT_ZERO else "", bound,
        terms.log_proposal, terms.log_target, terms.log_z, terms.reward, terms.log_base,
        terms.baseline if isinstance(terms.baseline, Tensor) else None,
    )  # fmt: skip
    return batch_of(batch.logits, labels, *flat(batch)[2:])


def check_labels(token_log_prob: Tensor, batch: Batch) -> Tensor:
    """``checks.check_labels``."""
    return cast(Tensor, _labels(token_log_prob, batch.logits.detach(), *flat(batch)[1:]))


def check_draws(draws: Draws) -> Draws:
    """``checks.check_draws``."""
    logits = cast(Tensor, _draws(draws.logits, draws.row_ids))
    return Draws(logits, draws.seed, draws.row_ids, draws.step, draws.scale, draws.softcap)


def check_weights(weight: Tensor) -> Tensor:
    """``checks.check_weights``."""
    return cast(Tensor, _weight(weight))
