"""The method in plain torch: the documentation of what dmfast computes, and the oracle that its kernels are tested
against. Exact in fp64: everything is computed in double precision, whatever the dtype of the logits, where the device
has it. ``dmfast.eager`` has the functions of ``dmfast.functional`` under their names and arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import objectives
from ..objectives import Objective, Terms
from . import check_ops, checks
from .batch import Batch, Draws, Scores
from .fp64 import home, wide
from .result import DMLossOutput, denominator, reduce


def _checks() -> ModuleType:
    """Those that look at values."""
    return check_ops if torch.compiler.is_compiling() else checks


def checked(batch: Batch, terms: Terms) -> Batch:
    """The batch, once the values of ``terms`` are checked."""
    if torch.compiler.is_compiling():
        return check_ops.check_terms(batch, terms)
    checks.check_terms(terms)
    return batch


def score(batch: Batch, entropy: bool = False) -> Scores:
    """log pi(x) = sum_t m_t log softmax(scale * cap(z_t))[x_t] for each sequence, with autograd through the logits."""
    values = _checks()
    batch = values.check_logits(batch)
    z = wide(batch.logits).reshape(batch.n_rows, batch.vocab)
    scored = batch.labels != checks.IGNORE
    # rows that are not scored may hold anything, NaN too, and get a gradient of exactly 0
    z = torch.where(scored[:, None], z, 0.0)
    if batch.softcap:
        z = batch.softcap * torch.tanh(z / batch.softcap)
    log_p = torch.log_softmax(batch.scale * z, dim=-1)
    token_log_prob = log_p.gather(-1, batch.labels.clamp(min=0)[:, None])[:, 0]
    to = home(z.device)
    token_log_prob = torch.where(scored, token_log_prob, 0.0).to(to).double()
    token_log_prob = values.check_labels(token_log_prob, batch)
    token_entropy = None
    if entropy:
        p = log_p.detach().exp()
        token_entropy = -torch.where(p > 0, p * log_p.detach(), 0.0).sum(-1)
        token_entropy = torch.where(scored, token_entropy, 0.0).to(to).double()
    sequence = sequence_of_rows(batch).to(to)

    def per_sequence(values: Tensor) -> Tensor:
        return values.new_zeros(batch.n_sequences).index_add(0, sequence, values)

    return Scores(
        lse=torch.logsumexp(batch.scale * z, dim=-1).detach(),
        log_prob=per_sequence(token_log_prob),
        entropy=per_sequence(token_entropy) if token_entropy is not None else None,
    )


def sequence_of_rows(batch: Batch) -> Tensor:
    """(rows,) int64: which sequence each row of logits belongs to."""
    sequences = torch.arange(batch.n_sequences, device=batch.labels.device)
    if batch.cu_seqlens is None:
        return sequences.repeat_interleave(batch.steps)
    return sequences.repeat_interleave(batch.cu_seqlens.diff(), output_size=batch.n_rows)


def loss_from_scores(
    batch: Batch,
    scores: Scores,
    terms: Terms,
    reduction: str,
    divide_by: float,
    check: Callable[[Tensor], Tensor] | None = None,
) -> DMLossOutput:
    """Forms A and the loss from log pi, which carries the gradient. ``check`` refuses weights that fp32 can't hold."""
    log_prob = scores.log_prob
    terms = terms.with_log_prob(log_prob.detach())
    weight = objectives.weigh(terms)  # A: a constant, no gradient flows through it
    checks.check_weight_tensor(weight, batch)
    weight, n_clipped = objectives.clip(weight.detach(), terms.max_weight)
    weight = (check or _checks().check_weights)(weight)
    per_sequence = -torch.where(weight == 0, 0.0, weight * log_prob)
    return DMLossOutput(
        loss=reduce(per_sequence, reduction, divide_by),
        log_prob=log_prob.detach(),
        log_ratio=terms.log_ratio,
        log_target_ratio=terms.log_target_ratio,
        weight=weight,
        n_clipped=n_clipped,
        entropy=scores.entropy,
        log_proposal=terms.log_proposal,
        log_target=terms.log_target,
        log_z=terms.log_z,
    )


def loss(batch: Batch, terms: Terms, reduction: str, divide_by: float, entropy: bool) -> DMLossOutput:
    """The loss of checked arguments, with autograd through the logits."""
    batch = checked(batch, terms)
    return loss_from_scores(batch, score(batch, entropy), terms, reduction, divide_by)


def dm_loss(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    log_target: Tensor | None = None,
    log_proposal: Tensor | None = None,
    log_z: Tensor | float | None = None,
    objective: str | Objective | Callable[[Terms], Tensor] = "gdc++",
    on_policy: bool = False,
    reward: Tensor | None = None,
    log_base: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    context_id: Tensor | None = None,
    reduction: str = "mean",
    num_sequences: float | None = None,
    grad_scale: float | None = None,
    max_weight: float | None = None,
    inplace: bool = False,
    return_entropy: bool = False,
) -> DMLossOutput:
    """``dmfast.dm_loss`` in plain torch. ``grad_scale`` and ``inplace`` are accepted and make no difference."""
    batch = checks.make_batch(logits, tokens, mask, cu_seqlens, temperature, softcap)
    terms = checks.make_terms(
        batch, objective, on_policy=on_policy, max_weight=max_weight, context_id=context_id,
        log_proposal=log_proposal, log_target=log_target, log_z=log_z, reward=reward, log_base=log_base,
    )  # fmt: skip
    checks.check_call(batch, reduction, num_sequences, grad_scale, inplace)
    return loss(batch, terms, reduction, denominator(batch, reduction, num_sequences), return_entropy)


def sequence_log_prob(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """``dmfast.sequence_log_prob`` in plain torch. ``inplace`` is accepted and makes no difference."""
    batch = checks.make_batch(logits, tokens, mask, cu_seqlens, temperature, softcap)
    checks.check_call(batch, inplace=inplace)
    return score(batch).log_prob


def linear_dm_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    chunk_bytes: int | None = None,
    **options: Any,
) -> DMLossOutput:
    """``dmfast.linear_dm_loss`` in plain torch, all logits at once. ``chunk_bytes`` makes no difference."""
    return dm_loss(torch.nn.functional.linear(hidden, weight, bias), tokens, mask, **options)


def linear_sequence_log_prob(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    chunk_bytes: int | None = None,
    **options: Any,
) -> Tensor:
    """``dmfast.linear_sequence_log_prob`` in plain torch. ``chunk_bytes`` makes no difference."""
    return sequence_log_prob(torch.nn.functional.linear(hidden, weight, bias), tokens, mask, **options)


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al. 2011) on int64 tensors that hold 32 bits each; the twin of csrc/random.h."""
    low = 0xFFFFFFFF
    key0, key1 = key
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57  # these wrap, and keep the low 64 bits right
        counter = [(b >> 32 & low) ^ counter[1] ^ key0, b & low, (a >> 32 & low) ^ counter[3] ^ key1, a & low]
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return counter


def uniforms(seed: int, row_ids: Tensor, step: int) -> Tensor:
    """(N,) fp64 in [0, 1), multiples of 2^-53, each a function of seed, row id and step alone."""
    low = 0xFFFFFFFF
    steps = torch.full_like(row_ids, step)
    counter = [row_ids & low, row_ids >> 32 & low, steps & low, steps >> 32 & low]
    first, second, *_ = philox(counter, (seed & low, seed >> 32))
    return wide(first << 21 | second >> 11) * 2.0**-53


def draw(draws: Draws, uniform: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``native.sample`` by inversion of the whole CDF."""
    draws = _checks().check_draws(draws)
    z = wide(draws.logits)
    if draws.softcap:
        z = draws.softcap * torch.tanh(z / draws.softcap)
    log_p = torch.log_softmax(draws.scale * z, dim=-1)
    if uniform is None:
        ids = torch.arange(z.shape[0], device=z.device) if draws.row_ids is None else draws.row_ids
        uniform = uniforms(draws.seed, ids, draws.step)
    cdf = log_p.exp().cumsum(-1)
    total = cdf[:, -1:].contiguous()
    # right=True passes over tokens of probability 0; the minimum is the last other one, should the product round up
    target = uniform[:, None] * total
    tokens = torch.minimum(torch.searchsorted(cdf, target, right=True), torch.searchsorted(cdf, total))
    return tokens[:, 0], log_p.gather(-1, tokens)[:, 0].to(home(z.device)).double()


@torch.no_grad()
def sample_tokens(
    logits: Tensor,
    *,
    seed: int,
    row_ids: Tensor | None = None,
    step: int = 0,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``dmfast.sample_tokens`` in plain torch, from the same uniform numbers: the same token, unless the number falls
    within rounding of the boundary between two.
    """
    return draw(checks.make_draws(logits, seed, row_ids, step, temperature, softcap))
