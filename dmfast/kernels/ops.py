"""The compiled kernels under torch.compile: ``torch.library`` custom ops, no graph break, fake kernels, autograd.

Eager mode does not come here (``functional.py`` calls ``native.py`` from an ``autograd.Function``, which costs less
per call). Functional ops carry their derivative by ``register_autograd``. The op that overwrites logits with their
gradient has none, since register_autograd refuses mutation: ``functional.py`` calls it from an ``autograd.Function``.
Ops take what ``Batch`` and ``Terms`` hold, flattened, because schemas know tensors and numbers only. The ``status``
that they return is what a device has recorded, for ``out.check()``; -1 on the CPU, which raises at once.
"""

import math
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from ..objectives import KINDS, Objective, Terms
from . import native
from .batch import Batch, Draws, Scores, batch_of
from .cuda import RowFaults, WeightFaults

NineTensors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
TenTensors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_KIND_NAMES = {number: name for name, number in KINDS.items()}


def flatten_terms(terms: Terms) -> tuple[Any, ...]:
    """Terms as the arguments of ``score_and_weigh`` from ``kind`` on."""
    objective = terms.objective
    assert isinstance(objective, Objective)
    return (
        KINDS[objective.kind], terms.on_policy, objective.normalize, objective.beta or 0.0,
        objective.log_scale or 0.0, terms.max_weight if terms.max_weight < math.inf else 0.0,
        terms.log_proposal, terms.log_target, terms.log_z, terms.reward, terms.log_base,
        terms.baseline if isinstance(terms.baseline, Tensor) else None,
        0.0 if isinstance(terms.baseline, Tensor) else terms.baseline or 0.0,
    )  # fmt: skip


def _terms(kind: int, on_policy: bool, normalize: bool, beta: float, log_scale: float, max_weight: float,
           log_proposal: Tensor | None, log_target: Tensor | None, log_z: Tensor | None, reward: Tensor | None,
           log_base: Tensor | None, baseline: Tensor | None, constant_baseline: float) -> Terms:  # fmt: skip
    name = _KIND_NAMES[kind]
    objective = Objective(
        name,
        normalize=normalize,
        beta=beta if name == "kl_control" else None,
        log_scale=log_scale if name == "reinforce_p" else None,
    )
    return Terms(
        objective, on_policy, max_weight or math.inf, log_proposal, log_target, log_z, reward, log_base,
        constant_baseline or None if baseline is None else baseline,
    )  # fmt: skip


def _per_sequence(batch: Batch) -> Tensor:
    return batch.logits.new_empty(batch.n_sequences, dtype=torch.float64)


def _per_row(batch: Batch) -> Tensor:
    return batch.logits.new_empty(batch.labels.shape[0], dtype=torch.float64)


def _status(scores: Scores) -> Tensor:
    """0-d int64."""
    for recorded in scores.recorded:
        rows = recorded.rows[0] if isinstance(recorded, WeightFaults) else recorded
        assert isinstance(rows, RowFaults)
        return rows.status
    return torch.full((), -1, dtype=torch.int64, device=scores.lse.device)


def _flat(scores: Scores) -> NineTensors:
    """The results in the order in which the ops return them; an entropy that was not asked for is empty."""
    entropy = scores.lse.new_empty(0) if scores.entropy is None else scores.entropy
    results = (scores.lse, scores.log_prob, scores.log_ratio, scores.log_target_ratio, scores.weight, scores.loss,
               scores.n_clipped, _status(scores), entropy)  # fmt: skip
    return cast(NineTensors, results)


# _v2: they return more than they did. torch's cache of compiled graphs, which outlives a process, knows an op by name.
@torch.library.custom_op("dmfast::score_v2", mutates_args=())
def score(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, scale: float, softcap: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log_prob (B), lse (rows), status (0-d), entropy (B) or (0)."""
    batch = batch_of(logits, labels, cu_seqlens, scale, softcap)
    scores = native.forward(batch, None, entropy)
    return (
        scores.log_prob,
        scores.lse.clone(),
        _status(scores),
        scores.entropy if scores.entropy is not None else scores.lse.new_empty(0),
    )


@score.register_fake
def _(logits, labels, cu_seqlens, scale, softcap, entropy):  # type: ignore[no-untyped-def]
    batch = batch_of(logits, labels, cu_seqlens, scale, softcap)
    h = _per_sequence(batch) if entropy else _per_row(batch).new_empty(0)
    return _per_sequence(batch), _per_row(batch), logits.new_empty((), dtype=torch.int64), h


@torch.library.custom_op("dmfast::score_and_weigh_v2", mutates_args=())
def score_and_weigh(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, scale: float, softcap: float, entropy: bool,
    kind: int, on_policy: bool, normalize: bool, beta: float, log_scale: float, max_weight: float,
    log_proposal: Tensor | None, log_target: Tensor | None, log_z: Tensor | None, reward: Tensor | None,
    log_base: Tensor | None, baseline: Tensor | None, constant_baseline: float,
) -> NineTensors:  # fmt: skip
    """lse (rows), log_prob, log_ratio, log_target_ratio, weight, loss (B), n_clipped and status (0-d), entropy (B) or
    (0)."""
    batch = batch_of(logits, labels, cu_seqlens, scale, softcap)
    terms = _terms(kind, on_policy, normalize, beta, log_scale, max_weight, log_proposal, log_target, log_z, reward,
                   log_base, baseline, constant_baseline)  # fmt: skip
    return _flat(native.forward(batch, terms, entropy))


@score_and_weigh.register_fake
def _(logits, labels, cu_seqlens, scale, softcap, entropy, *args):  # type: ignore[no-untyped-def]
    batch = batch_of(logits, labels, cu_seqlens, scale, softcap)
    return (
        _per_row(batch),
        *(_per_sequence(batch) for _ in range(5)),
        logits.new_empty((), dtype=torch.int64),
        logits.new_empty((), dtype=torch.int64),
        _per_sequence(batch) if entropy else logits.new_empty(0, dtype=torch.float64),
    )


@torch.library.custom_op("dmfast::score_and_grad_v2", mutates_args=())
def score_and_grad(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, scale: float, softcap: float, entropy: bool,
    kind: int, on_policy: bool, normalize: bool, beta: float, log_scale: float, max_weight: float,
    log_proposal: Tensor | None, log_target: Tensor | None, log_z: Tensor | None, reward: Tensor | None,
    log_base: Tensor | None, baseline: Tensor | None, constant_baseline: float, expected: float, divide_by: float,
) -> TenTensors:  # fmt: skip
    """``score_and_weigh`` for a weight that does not depend on pi. Its loss is 0-d, the sum over sequences divided by
    ``divide_by``; last comes the gradient of ``expected * loss`` in the logits."""
    batch = batch_of(logits, labels, cu_seqlens, scale, softcap)
    terms = _terms(kind, on_policy, normalize, beta, log_scale, max_weight, log_proposal, log_target, log_z, reward,
                   log_base, baseline, constant_baseline)  # fmt: skip
    scores, dz = native.forward_backward(batch, terms, entropy, divide_by, expected, inplace=False)
    assert scores.total is not None
    results = _flat(scores)
    return (*results[:5], scores.total, *results[6:], dz)


@score_and_grad.register_fake
def _(logits, labels, cu_seqlens, scale, softcap, entropy, *args):  # type: ignore[no-untyped-def]
    batch = batch_of(logits, labels, cu_seqlens, scale, softcap)
    return (
        _per_row(batch),
        *(_per_sequence(batch) for _ in range(4)),
        logits.new_empty((), dtype=torch.float64),
        logits.new_empty((), dtype=torch.int64),
        logits.new_empty((), dtype=torch.int64),
        _per_sequence(batch) if entropy else logits.new_empty(0, dtype=torch.float64),
        logits.new_empty(logits.shape),
    )


@torch.library.custom_op("dmfast::grad", mutates_args=())
def grad(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, scale: float, softcap: float, lse: Tensor, weight: Tensor
) -> Tensor:
    """The gradient of -sum_i weight_i log pi(x_i) in the logits, in a new contiguous tensor."""
    batch = batch_of(logits, labels, cu_seqlens, scale, softcap)
    return native.backward(batch, lse, weight, 1.0, inplace=False)


@grad.register_fake
def _(logits, labels, cu_seqlens, scale, softcap, lse, weight):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


@torch.library.custom_op("dmfast::grad_", mutates_args={"logits"})
def grad_(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, scale: float, softcap: float, lse: Tensor, weight: Tensor
) -> None:
    """``grad`` written over the logits. Not differentiable."""
    batch = batch_of(logits, labels, cu_seqlens, scale, softcap)
    native.backward(batch, lse, weight, 1.0, inplace=True)


def _save(ctx: Any, inputs: tuple[Any, ...], lse: Tensor, weight: Tensor | None) -> None:
    logits, labels, cu_seqlens, ctx.scale, ctx.softcap = inputs[:5]
    saved = [logits, labels, lse] + ([weight] if weight is not None else [])
    ctx.has_cu = cu_seqlens is not None
    ctx.save_for_backward(*saved, *([cu_seqlens] if ctx.has_cu else []))


def _score_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _save(ctx, inputs, output[1], None)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _score_backward(ctx: Any, grad_log_prob: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_log_prob is None:
        return (None,) * 6
    logits, labels, lse, *cu = ctx.saved_tensors
    dz = grad(logits, labels, cu[0] if cu else None, ctx.scale, ctx.softcap, lse, -grad_log_prob.to(torch.float64))
    return (dz, *(None,) * 5)


score.register_autograd(_score_backward, setup_context=_score_setup)


def _weigh_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _save(ctx, inputs, output[0], output[4])
    ctx.mark_non_differentiable(*output[:5], *output[6:])
    ctx.set_materialize_grads(False)


def _weigh_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    grad_loss = grads[5]  # (B,): the reduction is torch's
    if grad_loss is None:
        return (None,) * 19
    logits, labels, lse, weight, *cu = ctx.saved_tensors
    dz = grad(logits, labels, cu[0] if cu else None, ctx.scale, ctx.softcap, lse, weight * grad_loss)
    return (dz, *(None,) * 18)


score_and_weigh.register_autograd(_weigh_backward, setup_context=_weigh_setup)


def _one_pass_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.expected = inputs[19]
    ctx.save_for_backward(output[-1])
    ctx.mark_non_differentiable(*output[:5], *output[6:])
    ctx.set_materialize_grads(False)


def _one_pass_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    if grads[5] is None:
        return (None,) * 21
    (dz,) = ctx.saved_tensors
    return (dz * (grads[5] / ctx.expected), *(None,) * 20)


score_and_grad.register_autograd(_one_pass_backward, setup_context=_one_pass_setup)


@torch.library.custom_op("dmfast::sample", mutates_args=())
def sample(
    logits: Tensor, seed: int, row_ids: Tensor | None, step: int, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """tokens (N) and their log_prob (N). A seed of 2^63 and more comes as what int64 holds of it."""
    return native.sample(Draws(logits, seed % 2**64, row_ids, step, scale, softcap))


@sample.register_fake
def _(logits, seed, row_ids, step, scale, softcap):  # type: ignore[no-untyped-def]
    n = logits.shape[0]
    return logits.new_empty(n, dtype=torch.int64), logits.new_empty(n, dtype=torch.float64)


class _ScoreInPlace(torch.autograd.Function):
    """``score`` whose backward overwrites the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, scale: float, softcap: float,
                entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        output = score(logits, labels, cu_seqlens, scale, softcap, entropy)
        _save(ctx, (logits, labels, cu_seqlens, scale, softcap), output[1], None)
        ctx.mark_non_differentiable(*output[1:])
        return cast("tuple[Tensor, Tensor, Tensor, Tensor]", output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        logits, labels, lse, *cu = ctx.saved_tensors
        grad_(logits, labels, cu[0] if cu else None, ctx.scale, ctx.softcap, lse, -grads[0].to(torch.float64))
        return (logits, *(None,) * 5)


class _WeighInPlace(torch.autograd.Function):
    """``score_and_weigh`` whose backward overwrites the logits."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = score_and_weigh(*inputs)
        _save(ctx, inputs, output[0], output[4])
        ctx.mark_non_differentiable(*output[:5], *output[6:])
        return cast("tuple[Tensor, ...]", output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        logits, labels, lse, weight, *cu = ctx.saved_tensors
        grad_(logits, labels, cu[0] if cu else None, ctx.scale, ctx.softcap, lse, weight * grads[5])
        return (logits, *(None,) * 18)
