"""The checks of ``faults.py`` under torch.compile: custom ops, which run when the graph does.

Each returns a copy of a tensor that it has looked at, to be used in its place: an op whose result nobody needs is
dropped.
"""

import math
import sys
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from ..objectives import KINDS, Objective, Terms
from . import faults
from .batch import Batch, SampleRows, batch_of, flat

# they wait for the device, which a captured CUDA graph can't; torch 2.6 has no way to say so
_OPTIONS: dict[str, Any] = {"mutates_args": ()}
if hasattr(torch.Tag, "cudagraph_unsafe"):
    _OPTIONS["tags"] = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("dmfast::check_logits_v2", **_OPTIONS)
def _logits(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, token_weight: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    batch = batch_of(logits, labels, cu_seqlens, token_weight, scale, softcap)
    faults.check_logits(batch)
    return labels.clone(), labels.new_empty(0) if cu_seqlens is None else cu_seqlens.clone()


@_logits.register_fake
def _(logits, labels, cu_seqlens, token_weight, scale, softcap):  # type: ignore[no-untyped-def]
    return torch.empty_like(labels), labels.new_empty(0) if cu_seqlens is None else torch.empty_like(cu_seqlens)


@torch.library.custom_op("dmfast::check_terms_v3", **_OPTIONS)
def _terms(
    labels: Tensor, block: Tensor, present: int, given: int, scalars: list[float], name: str, left_out: bool
) -> Tensor:
    # a user's function is checked as dpg is; what is wrong with a parameter was refused when the objective was made
    parameter = KINDS[name].parameter
    baseline = "leave_one_out" if left_out else None
    objective = Objective(name, baseline=baseline, **({} if parameter is None else {parameter: scalars[0]}))  # type: ignore[arg-type]
    bound = scalars[1] or math.inf
    faults.check_terms(Terms(objective, bool(scalars[2]), bound, block, present, given, tuple(scalars[3:])))
    return labels.clone()


@_terms.register_fake
def _(labels, *args):  # type: ignore[no-untyped-def]
    return torch.empty_like(labels)


@torch.library.custom_op("dmfast::check_labels_v2", **_OPTIONS)
def _labels(
    token_log_prob: Tensor, logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, token_weight: Tensor | None,
    scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    batch = batch_of(logits, labels, cu_seqlens, token_weight, scale, softcap)
    return faults.check_labels(token_log_prob, batch).clone()


@_labels.register_fake
def _(token_log_prob, *args):  # type: ignore[no-untyped-def]
    return torch.empty_like(token_log_prob)


_labels.register_autograd(lambda ctx, grad: (grad, *(None,) * 6))


@torch.library.custom_op("dmfast::check_sample_rows", **_OPTIONS)
def _draws(logits: Tensor, row_ids: Tensor | None) -> Tensor:
    return faults.check_sample_rows(SampleRows(logits, 0, row_ids, 0, 1.0, 0.0)).logits.clone()


@_draws.register_fake
def _(logits, row_ids):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits)


@torch.library.custom_op("dmfast::check_weight_v2", **_OPTIONS)
def _weight(weight: Tensor, first_sequence: int) -> Tensor:
    return faults.check_weights(weight, first_sequence).clone()


@_weight.register_fake
def _(weight, first_sequence):  # type: ignore[no-untyped-def]
    return torch.empty_like(weight)


def value_checks() -> ModuleType:
    """Return the checks that look at values: ``faults``, or under torch.compile the functions of this module."""
    return sys.modules[__name__] if torch.compiler.is_compiling() else faults


def checked(batch: Batch, terms: Terms) -> Batch:
    """Return the batch, once the values of the terms are checked."""
    if torch.compiler.is_compiling():
        return check_terms(batch, terms)
    faults.check_terms(terms)
    return batch


def check_logits(batch: Batch) -> Batch:
    """Do what ``faults.check_logits`` does."""
    labels, starts = _logits(batch.logits.detach(), *flat(batch)[1:])
    return batch._replace(tokens=labels, cu_seqlens=None if batch.cu_seqlens is None else starts)


def check_terms(batch: Batch, terms: Terms) -> Batch:
    """Do what ``faults.check_terms`` does, and return the batch."""
    objective = terms.objective
    bound = terms.max_weight if terms.max_weight < math.inf else 0.0
    name, parameter, left_out = "dpg", 0.0, False
    if isinstance(objective, Objective):
        name, parameter, left_out = objective.name, objective.parameter, isinstance(objective.baseline, str)
    scalars = [parameter, bound, float(terms.on_policy), *terms.constants]
    labels = _terms(batch.labels, terms.block, terms.present, terms.given, scalars, name, left_out)
    return batch._replace(tokens=labels)


def check_labels(token_log_prob: Tensor, batch: Batch) -> Tensor:
    """Do what ``faults.check_labels`` does."""
    return cast(Tensor, _labels(token_log_prob, batch.logits.detach(), *flat(batch)[1:]))


def check_sample_rows(rows: SampleRows) -> SampleRows:
    """Do what ``faults.check_sample_rows`` does."""
    logits = cast(Tensor, _draws(rows.logits, rows.row_ids))
    return SampleRows(logits, rows.seed, rows.row_ids, rows.step, rows.scale, rows.softcap)


def check_weights(weight: Tensor, first_sequence: int = 0) -> Tensor:
    """Do what ``faults.check_weights`` does."""
    return cast(Tensor, _weight(weight, first_sequence))
