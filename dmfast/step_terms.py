"""Compute what a step's loss gets besides log pi: the terms of the whole step, its baseline, its known weights.

All of it is fixed when the step is drawn, over the sequences of all ranks, so that the gradient does not depend on how
the step is cut into parts. ``Matcher.draw`` puts it into the ``Batch``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .objectives import Group, Objective, Terms, known_returns, leave_one_out_baseline, plain_baseline, weigh
from .ranks import Ranks, share
from .samples import Samples
from .settings import Settings


def terms_of_step(
    settings: Settings, ranks: Ranks, objective: Callable[[Terms], Tensor], x: Samples, inputs: dict[str, Tensor],
    stays: Tensor, n_sequences: float,
) -> Terms:  # fmt: skip
    """Return the terms of the step's sequences on all ranks, for an objective that is a function.

    Args:
        settings, ranks: those of the ``Matcher``.
        objective, x, inputs: the step's objective, its sequences on this rank, and the inputs of their loss.
        stays: (N,) bool, whether each sequence counts in the step's mean.
        n_sequences: the number of sequences that count, as the average over ranks.
    """
    gather, length = ranks.gather, x.score_mask.sum(1).double()
    terms = Terms.of(objective, settings.on_policy, math.inf, **{k: gather(v) for k, v in inputs.items()})
    length = gather(length.to(terms.block.device))
    # tokens and sequences are averages over ranks, because DDP averages the gradients over ranks
    n_tokens = float(length[gather(stays).to(length.device)].sum()) / ranks.size
    group = Group(length, n_tokens, n_sequences, gather(x.context_id))
    return terms.with_group(group)


def leave_one_out(
    settings: Settings, ranks: Ranks, objective: Objective, context_id: Tensor, inputs: dict[str, Tensor]
) -> Tensor:
    """Return the leave-one-out baseline of this rank's sequences, (N,) fp64, over the sequences of all ranks.

    Raises:
        ValueError: the baseline is not finite. The loss sees parts only, and could not name the return.
    """
    gathered = {name: ranks.gather(value) for name, value in inputs.items()}
    contexts = ranks.gather(context_id)
    terms = Terms.of(objective, settings.on_policy, math.inf, **gathered)
    whole, n = leave_one_out_baseline(terms, contexts, len(contexts), contexts.device), len(context_id)
    if not bool(whole.isfinite().all()):
        returns = known_returns(terms, len(contexts), contexts.device)
        rank, place = divmod(int(returns.abs().nan_to_num(math.inf).argmax()), n)
        where = f"sequence {place} of " + ("the batch" if ranks.size == 1 else f"the batch of rank {rank}")
        of_it = {name: float(values[rank * n + place]) for name, values in gathered.items()}
        raise ValueError(
            f"the return of {where} is {float(returns[rank * n + place])}, so that the mean that is the baseline "
            f"{objective.baseline!r} of other sequences is not finite: it has {of_it}. Take a constant baseline or "
            "'mean', with max_weight to bound the weight of such a sequence, or change its reward"
        )
    return share(whole, ranks)


def terms_at_proposal(
    settings: Settings, objective: Objective | Callable[[Terms], Tensor], inputs: dict[str, Tensor]
) -> Terms:
    """Return the terms of this rank's sequences, with log q in the place of log pi."""
    values, log_q = dict(inputs), inputs["log_proposal"]
    baseline: Any = values.pop("baseline", None)
    if baseline is None:
        baseline = plain_baseline(objective, len(log_q), log_q.device)
    return Terms.of(objective, settings.on_policy, math.inf, **values, baseline=baseline, log_prob=log_q)


def to_forward(
    settings: Settings,
    objective: Objective | Callable[[Terms], Tensor],
    inputs: dict[str, Tensor],
    advantage: Tensor | None,
) -> Tensor:
    """Return (N,) bool, on the CPU: the sequences that are not known to have weight 0."""
    everything = torch.ones(len(inputs["log_target"]), dtype=torch.bool)
    if not settings.skip_zero_weight:
        return everything
    if advantage is not None:
        return (advantage != 0).cpu()
    terms = terms_at_proposal(settings, objective, inputs)
    # these terms have log q in place of log pi, but an A that is known now does not depend on log pi
    return (weigh(terms) != 0).cpu() if terms.weight_known else everything
