"""What ``functional.py`` calls under torch.compile: ``ops.py`` on checked batches."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from .. import objectives
from ..objectives import Terms
from . import cuda, native, ops
from .batch import Batch, Draws, Scores, flat
from .result import reduce


def _recorded(batch: Batch, terms: Terms | None, log_prob: Tensor, status: Tensor) -> tuple[cuda.Recorded, ...]:
    if not native.records(batch.logits):
        return ()
    log_prob = log_prob.detach()
    if native.on_cuda(batch.logits) or terms is None:
        return (cuda.row_faults(batch, terms, log_prob, status),)
    made = objectives.clipped_weights(terms, log_prob)
    return (cuda.WeightFaults((cuda.row_faults(batch, None, log_prob, status),), terms, made, 0),)


def score(batch: Batch, entropy: bool, inplace: bool) -> Scores:
    """log_prob (B), differentiable."""
    call = ops._ScoreInPlace.apply if inplace else ops.score
    log_prob, lse, status, h = call(*flat(batch), entropy)  # type: ignore[no-untyped-call]
    return Scores(lse, log_prob, h if entropy else None, recorded=_recorded(batch, None, log_prob, status))


def sample(draws: Draws) -> tuple[Tensor, Tensor]:
    """tokens (N) and their log_prob (N)."""
    seed = draws.seed if draws.seed < 2**63 else draws.seed - 2**64
    drawn = ops.sample(draws.logits, seed, draws.row_ids, draws.step, draws.scale, draws.softcap)
    return cast("tuple[Tensor, Tensor]", drawn)


def dm_loss(
    batch: Batch, terms: Terms, reduction: str, divide_by: float, entropy: bool, inplace: bool, expected: float | None
) -> tuple[Tensor, Scores]:
    """The reduced loss and the per-sequence results. ``expected`` as in ``autograd.expected_grad``."""
    flat_terms = ops.flatten_terms(terms)
    if inplace:
        # known weights too wait for backward here: one mutating op less, one more read of the logits
        results, expected = list(ops._WeighInPlace.apply(*flat(batch), entropy, *flat_terms)), None  # type: ignore[no-untyped-call]
    elif expected is not None:
        *results, _ = ops.score_and_grad(*flat(batch), entropy, *flat_terms, expected, divide_by)
    else:
        results = list(ops.score_and_weigh(*flat(batch), entropy, *flat_terms))
    lse, log_prob, log_ratio, log_target_ratio, weight, loss, n_clipped, status, h = results
    recorded = _recorded(batch, terms, log_prob, status)
    scores = Scores(lse, log_prob, h if entropy else None, log_ratio, log_target_ratio, weight, loss, None, n_clipped,
                    recorded)  # fmt: skip
    return loss if expected is not None else reduce(loss, reduction, divide_by), scores
