"""Form the loss in torch.

This serves backends whose kernels don't form it, objectives that are a user's function, and sequences that go through a
buffer in parts. csrc/cpu/loss.cpp and csrc/cuda/loss.cu form the loss in their kernels.
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
    """Return sum_t w_t log pi(x_t) of each sequence, (B,) without gradient.

    It is ``log_prob`` itself if there are no token weights, and NaN where ``log_prob`` is NaN.

    Args:
        batch: has the labels, starts and token weights of the rows. Its logits are not read.
        rows: the block of the rows; see ``Scores``.
        log_prob: (B,) fp64 without gradient.
    """
    w = batch.token_weight
    if w is None:
        return log_prob
    w = faults.with_zeros(w)
    # 0 * -inf must be 0
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
    """Return scores whose losses a kernel has formed. If there are token weights, the losses are replaced by theirs."""
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
        log_prob, entropy: (B,) fp64 without gradient. An entropy of None counts as 0.
        terms: the inputs, with an ``Objective`` or a function. If they have an entropy coefficient, ``entropy`` must be
            given.
        divide_by: the divisor of ``total``.
        records_faults: whether a fault is read later and affects only its own sequence.
        recorded: the checks of the pass that made log pi.
        weighted: (B,) fp64, ``weighted_log_prob`` if it is known already.

    Raises:
        ValueError: a function did not return an fp64 (B,) tensor, or, if faults are not recorded, a weight is beyond
            fp32's range.
    """
    terms = terms.with_log_prob(log_prob)
    weight = objectives.weigh(terms)
    checks.check_weight_tensor(weight, batch)
    weight = weight.detach()  # A is a constant of the loss
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
    """Return -A log pi - coefficient * H of each sequence, (B,), where 0 * -inf is 0.

    The gradient flows to ``log_prob``, which is the weighted one, and to ``entropy``. Both are NaN for a sequence with
    a fault in a row; its loss is 0.
    """
    loss = -torch.where(weight == 0, 0.0, weight * log_prob)
    if not coefficient:
        return loss
    assert entropy is not None
    return loss - coefficient * torch.where(log_prob.isnan(), 0.0, entropy)


def reduce(per_sequence: Tensor, reduction: str, divide_by: float) -> Tensor:
    """Return (B,) losses as they are for the reduction ``none``, else their sum divided by ``divide_by``, 0-d."""
    return per_sequence if reduction == "none" else per_sequence.sum() / divide_by


def scaled(x: Tensor, by: Tensor) -> Tensor:
    """Return x * by, which is 0 where ``by`` is 0, even if x has overflowed."""
    return torch.where(by == 0, 0.0, x * by)


def denominator(batch: Batch, reduction: str, num_sequences: float | None) -> float:
    """Return the divisor of the sum over sequences."""
    if reduction != "mean":
        return 1.0
    return float(num_sequences) if num_sequences is not None else float(max(batch.n_sequences, 1))


def divisor(batch: Batch, divide_by: float) -> float:
    """Return the divisor of a sum over sequences, where 0 stands for their number.

    The 0 lets torch.compile use one graph for every B.
    """
    return divide_by or denominator(batch, "mean", None)
