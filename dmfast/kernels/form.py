"""The loss where it is formed in torch: by backends that leave it to torch, for objectives that are a user's function,
and for sequences that go through a buffer in parts. csrc/cpu/loss.cpp and csrc/cuda/loss.cu form it in their kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import objectives
from ..objectives import Terms
from . import checks, faults
from .batch import Batch, Recorded, Scores
from .check_ops import value_checks


def form_loss(
    batch: Batch, rows: Tensor, log_prob: Tensor, entropy: Tensor | None, terms: Terms, divide_by: float,
    records_faults: bool, recorded: tuple[Recorded, ...] = (),
) -> Scores:  # fmt: skip
    """Return the scores of sequences whose log pi is known, with their A and their losses.

    Args:
        batch: says where the sequences lie, for errors.
        rows: the block of the rows; see ``Scores``.
        log_prob, entropy: (B,) fp64 without gradient; no entropy: 0.
        terms: with an ``Objective`` or a function; entropy must be there where they have a coefficient for it.
        divide_by: what ``total`` is divided by.
        records_faults: whether a fault costs its sequence alone, and is read later.
        recorded: what the pass that made log pi has recorded.

    Raises:
        ValueError: a function returned no fp64 (B,) tensor; where faults are not recorded, a weight beyond fp32's
            range.
    """
    terms = terms.with_log_prob(log_prob)
    weight = objectives.weigh(terms)  # A is a constant: no gradient flows through it
    checks.check_weight_tensor(weight, batch)
    weight = weight.detach()
    bound = terms.max_weight
    clipped = weight.abs() > bound
    bounded = objectives.bounded_returns(terms.objective, terms.log_ratio, terms.log_target_ratio)
    clipped = (clipped if bounded is None else clipped | bounded).double()
    weight = weight.clamp(-bound, bound)
    if records_faults:
        made, weight = weight, faults.zero_where_faulty(weight, log_prob, terms)
        recorded = (*recorded, *faults.read_later(faults.device_faults(batch, terms, log_prob, None, made)))
    else:
        weight = value_checks().check_weights(weight, batch.first_sequence)
    loss = losses(weight, log_prob, entropy, terms.entropy_coefficient)
    nothing = torch.zeros_like(log_prob)
    columns = [log_prob, entropy, terms.log_ratio, terms.log_target_ratio, weight, loss, clipped]
    sequences = torch.stack([nothing if column is None else column for column in columns])
    return Scores(rows, sequences, loss.sum() / divide_by, recorded)


def losses(weight: Tensor, log_prob: Tensor, entropy: Tensor | None = None, coefficient: float = 0.0) -> Tensor:
    """Return -A log pi - coefficient * H of each sequence, (B,); 0 * -inf = 0. The gradient goes to log_prob and
    entropy. A sequence with a fault of a row, where both are NaN, has loss 0."""
    loss = -torch.where(weight == 0, 0.0, weight * log_prob)
    if not coefficient:
        return loss
    assert entropy is not None
    return loss - coefficient * torch.where(log_prob.isnan(), 0.0, entropy)


def reduce(per_sequence: Tensor, reduction: str, divide_by: float) -> Tensor:
    """Return the mean, the sum or nothing of the kind (``none``) of (B,) losses."""
    return per_sequence if reduction == "none" else per_sequence.sum() / divide_by


def scaled(x: Tensor, by: Tensor) -> Tensor:
    """Return x * by, and 0 where ``by`` is 0, also of an x that overflowed."""
    return torch.where(by == 0, 0.0, x * by)


def denominator(batch: Batch, reduction: str, num_sequences: float | None) -> float:
    """Return what the sum over sequences is divided by."""
    if reduction != "mean":
        return 1.0
    return float(num_sequences) if num_sequences is not None else float(max(batch.n_sequences, 1))


def divisor(batch: Batch, divide_by: float) -> float:
    """Return what a sum over sequences is divided by, where 0 stands for their number: no B needs its own graph."""
    return divide_by or denominator(batch, "mean", None)
