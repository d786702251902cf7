"""The loss where it is formed in torch: by backends that leave it to torch, for objectives that are a user's function,
and for sequences that go through a buffer in parts. csrc/cpu/loss.cpp and csrc/cuda/loss.cu form it in their kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import objectives
from ..objectives import Terms
from . import checks, faults
from .batch import LABEL, LOSS, LSE, Batch, Recorded, Scores
from .check_ops import value_checks


def weighted_log_prob(batch: Batch, rows: Tensor, log_prob: Tensor) -> Tensor:
    """Return sum_t w_t log pi(x_t) of each sequence, (B,) without gradient: ``log_prob`` where there are no token
    weights. NaN where log_prob is.

    Args:
        batch: with the labels, starts and token weights of the rows, and any logits.
        rows: their block; see ``Scores``.
        log_prob: (B,) fp64 without gradient.
    """
    w = batch.token_weight
    if w is None:
        return log_prob
    w = faults.usable(w)
    # 0 * -inf = 0
    values = torch.where(w == 0, 0.0, w * (rows.select(0, LABEL) - rows.select(0, LSE)))
    if batch.cu_seqlens is None:
        sums = values.view(batch.n_sequences, batch.steps).sum(1)
    elif len(values):
        starts = faults.with_order(batch).cu_seqlens
        assert starts is not None
        sums = torch.segment_reduce(values, "sum", offsets=starts.to(values.device), initial=0.0)
    else:
        sums = torch.zeros_like(log_prob)
    return torch.where(log_prob.isnan(), log_prob, sums)


def weighted_of(batch: Batch, scores: Scores) -> Tensor:
    """Return ``weighted_log_prob`` of scores, (B,). It reads the rows only where there are token weights."""
    return scores.log_prob if batch.token_weight is None else weighted_log_prob(batch, scores.rows, scores.log_prob)


def with_token_weight(batch: Batch, terms: Terms | None, scores: Scores, divide_by: float) -> Scores:
    """Return scores whose losses a kernel has formed, with those of token weights in their place if there are any."""
    if batch.token_weight is None or terms is None:
        return scores
    weighted = weighted_of(batch, scores)
    loss = losses(scores.weight, weighted, scores.entropy, terms.entropy_coefficient)
    scores.sequences.select(0, LOSS).copy_(loss)
    return scores.replaced(total=loss.sum() / divide_by)


def form_loss(
    batch: Batch, rows: Tensor, log_prob: Tensor, entropy: Tensor | None, terms: Terms, divide_by: float,
    records_faults: bool, recorded: tuple[Recorded, ...] = (), weighted: Tensor | None = None,
) -> Scores:  # fmt: skip
    """Return the scores of sequences whose log pi is known, with their A and their losses.

    Args:
        batch: says where the sequences lie, for errors and for token weights.
        rows: the block of the rows; see ``Scores``.
        log_prob, entropy: (B,) fp64 without gradient; no entropy: 0.
        terms: with an ``Objective`` or a function; entropy must be there where they have a coefficient for it.
        divide_by: what ``total`` is divided by.
        records_faults: whether a fault costs its sequence alone, and is read later.
        recorded: what the pass that made log pi has recorded.
        weighted: (B,) fp64, ``weighted_log_prob`` where it is known.

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
    weighted = weighted_log_prob(batch, rows, log_prob) if weighted is None else weighted
    loss = losses(weight, weighted, entropy, terms.entropy_coefficient)
    nothing = torch.zeros_like(log_prob)
    columns = [log_prob, entropy, terms.log_ratio, terms.log_target_ratio, weight, loss, clipped]
    sequences = torch.stack([nothing if column is None else column for column in columns])
    return Scores(rows, sequences, loss.sum() / divide_by, recorded)


def losses(weight: Tensor, log_prob: Tensor, entropy: Tensor | None = None, coefficient: float = 0.0) -> Tensor:
    """Return -A log pi - coefficient * H of each sequence, (B,); 0 * -inf = 0. The gradient goes to log_prob, which
    is ``weighted_log_prob``, and to entropy. A sequence with a fault of a row, where both are NaN, has loss 0."""
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
