"""Compute the loss from per-token log-probabilities, for frameworks that hand over nothing else.

``objectives.py`` forms A here as everywhere. For logits and hidden states use ``functional.py``, which reads them fewer
times.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .kernels import BACKENDS, autograd, check_ops, checks, eager, faults
from .kernels.batch import IGNORE, Batch, Scores
from .kernels.fp64 import per_sequence_device
from .kernels.result import DMLossOutput
from .objectives import Objective, Terms

#: A log-probability up to this much above 0 is accepted, because logits minus their log-sum-exp are rounded.
_ROUNDING = 1e-3


def dm_loss_from_log_probs(
    token_log_probs: Tensor,
    mask: Tensor | None = None,
    *,
    log_target: Tensor | None = None,
    log_proposal: Tensor | None = None,
    log_z: Tensor | float | None = None,
    objective: str | Objective | Callable[[Terms], Tensor] = "gdc++",
    on_policy: bool = False,
    reward: Tensor | None = None,
    log_base: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    context_id: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_sequences: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    max_weight: float | None = None,
) -> DMLossOutput:
    """Return ``dm_loss`` from the log-probability of each token, which carries the gradient.

    Use it in a framework that only hands over per-token log-probabilities. It has the objectives, the numerics and the
    result of ``dm_loss``: sums over a sequence are fp64, A is formed in log space, and the gradient of
    ``token_log_probs[i, t]`` is ``-A_i w_it / B``. It does not save the time and the tensor of the size of the logits
    that ``dm_loss`` saves by reading the logits itself. An entropy bonus needs the logits; add your own to the loss.

    Args:
        token_log_probs: (B, T), or packed (N,) with ``cu_seqlens``; float32 or float64, log pi of each token given
            those before it, in nats, under the temperature at which it was drawn.
        mask: the same shape, bool or integer; False = not scored. Such a token has no part in log pi, and its gradient
            is 0 whatever ``token_log_probs`` holds there. With None all are scored.
        cu_seqlens: (B+1,) int32 or int64, the starts of packed sequences, from 0 to N.
        token_weight: as in ``dm_loss``, of the shape of ``token_log_probs``.
        log_target, log_proposal, log_z, objective, on_policy, reward, log_base: as in ``dm_loss``.
        context_id, reduction, num_sequences, num_tokens, max_weight: as in ``dm_loss``.

    Returns:
        ``DMLossOutput``; ``out.loss`` carries the gradient of ``token_log_probs``. Per-sequence values are fp64.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or value, an input that the objective
            needs is missing, a scored log-probability is NaN, infinite or positive, or a weight is beyond fp32's range.

    Examples:
        The last of three tokens is padding. A of the sequence is its reward:

        >>> log_probs = torch.tensor([[-1.0, -2.0, 0.0]], requires_grad=True)
        >>> mask = torch.tensor([[True, True, False]])
        >>> reward = torch.tensor([3.0])
        >>> out = dm_loss_from_log_probs(log_probs, mask, objective="reinforce", on_policy=True, reward=reward)
        >>> out.loss.backward()
        >>> out.log_prob.item(), log_probs.grad.tolist()
        (-3.0, [[-3.0, -3.0, 0.0]])
    """
    batch = _batch(token_log_probs, mask, cu_seqlens, token_weight)
    terms = checks.make_terms(
        batch, objective, on_policy=on_policy, max_weight=max_weight, context_id=context_id,
        log_proposal=log_proposal, log_target=log_target, log_z=log_z, reward=reward, log_base=log_base,
        num_sequences=num_sequences, num_tokens=num_tokens, what="token_log_probs",
    )  # fmt: skip
    checks.check_call(batch, reduction, num_sequences)
    options, divisor = autograd.options_of(batch, reduction, num_sequences, entropy=False, inplace=False)
    batch = check_ops.checked(batch, terms)
    faults.check_cu_seqlens(batch)
    faults.check_token_weight(batch)
    scored = (batch.labels != IGNORE).view(token_log_probs.shape)
    _check_values(token_log_probs, scored, batch)
    to = per_sequence_device(token_log_probs.device)
    # where() lets positions that are not scored hold NaN, and gives them a gradient of 0
    rows = torch.where(scored, token_log_probs, 0.0).reshape(-1).to(to).double()
    per_sequence = eager.sums_of(batch, to)
    log_prob = per_sequence(rows)
    weighted = log_prob if batch.token_weight is None else per_sequence(batch.token_weight * rows)
    # a log-probability equals a logit whose log-sum-exp is 0
    of_rows = torch.stack([torch.zeros_like(rows), rows.detach()])
    of_sequences = torch.stack([log_prob.detach(), torch.zeros_like(log_prob)])
    scores = Scores(of_rows, of_sequences)
    loss, scores = autograd.from_log_prob(BACKENDS["eager"], batch, (weighted, None, scores), terms, options)
    loss = loss if divisor is None else loss / divisor.to(loss.device)
    return DMLossOutput(loss, scores, terms, tuple(token_log_probs.shape))


def _batch(
    token_log_probs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, token_weight: Tensor | None
) -> Batch:
    """Check shapes and dtypes, and return the rows as a batch of a vocabulary of one token."""
    packed = cu_seqlens is not None
    if not isinstance(token_log_probs, Tensor) or token_log_probs.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"token_log_probs must be float32 or float64, got {checks.describe(token_log_probs)}: in 16 bits the "
            "log-probability of a token is off by up to .4%; compute it from logits.float()"
        )
    if token_log_probs.dim() != (1 if packed else 2):
        raise ValueError(
            f"token_log_probs must be (B, T), or packed (N,) with cu_seqlens; got {checks.describe(token_log_probs)} "
            f"with{'' if packed else 'out'} cu_seqlens"
        )
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype.is_floating_point or mask.dtype.is_complex:
            raise TypeError(
                f"mask must be a bool or integer tensor, got {checks.describe(mask)}; write mask > 0, or pass weights "
                "as token_weight"
            )
        if mask.shape != token_log_probs.shape:
            raise ValueError(
                f"mask must have the shape of token_log_probs, {tuple(token_log_probs.shape)}, got "
                f"{checks.describe(mask)}: leave the prompt's tokens out of both, or of neither"
            )
    tokens = torch.zeros(token_log_probs.shape, dtype=torch.int64, device=token_log_probs.device)
    logits = token_log_probs.detach()[..., None].contiguous()
    return checks.make_batch(logits, tokens, mask, cu_seqlens, 1.0, None, what="token_log_probs",
                             token_weight=token_weight)  # fmt: skip


def _check_values(token_log_probs: Tensor, scored: Tensor, batch: Batch) -> None:
    values = token_log_probs.detach()
    good = (values > -torch.inf) & (values <= _ROUNDING) | ~scored
    if bool(good.all()):
        return
    row = int((~good).reshape(-1).nonzero()[0])
    value = float(values.reshape(-1)[row])
    hint = "the model has diverged or its input is masked wrongly"
    if 0 < value < torch.inf:
        hint = "a log-probability is at most 0; did you pass probabilities, or losses, whose sign is the other one?"
    elif value == -torch.inf:
        hint = "the policy gives the sequence probability 0: mask the position"
    raise ValueError(f"token_log_probs holds {value} at {faults.place(batch, row)}, a scored position; {hint}")
