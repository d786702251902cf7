"""Define the losses under torch.compile as ``torch.library`` custom ops, with fake kernels and autograd.

A compiled loss has no graph break. Eager mode does not use this module, since ``autograd.py`` and ``linear.py`` cost
less per call. An op gets the contents of ``Batch`` and ``Terms`` as separate arguments, because a schema accepts only
tensors and numbers. The per-sequence inputs are one block, and so are the results, which may not share memory. The op
gets its backend by name. The ``status`` that it returns is what a device has recorded for ``out.check()``, or -1 if
faults are raised at once.

Functional ops have a derivative by ``register_autograd``. The op that overwrites logits with their gradient has none,
since register_autograd refuses ops that mutate their inputs. An ``autograd.Function`` calls it instead.
"""

import math
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from .. import kernels, objectives
from ..objectives import KINDS, Objective, Terms
from . import check_ops, faults, linear
from .autograd import LogProb, Options, copies, from_log_prob
from .backend import Backend, new_gradient
from .batch import (
    LOG_PROB,
    LOSS,
    LSE,
    ONLY_SCORED,
    WEIGHT,
    WITH_TERMS,
    Batch,
    Bonus,
    SampleRows,
    Scores,
    batch_of,
    bonus_of,
    flat,
    logits_to_come,
)
from .form import divisor, reduce, scaled

FourTensors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
FiveTensors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
SevenTensors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
# these flags tell what neither the name nor the parameter of an objective says
_NORMALIZED, _LEFT_OUT, _FACTOR_LEFT_OUT = 1, 2, 4
# dpg and gdc++ have one number; it stands for dpg here, since the baseline of gdc++ comes with the terms
_NAMES = {kind.number: name for name, kind in reversed(KINDS.items())}


def flat_terms(terms: Terms) -> tuple[Any, ...]:
    """Return terms as the arguments of the ops from ``kind`` on."""
    objective = terms.objective
    assert isinstance(objective, Objective)
    flags = (_NORMALIZED if objective.normalize else 0) | (_LEFT_OUT if isinstance(objective.baseline, str) else 0)
    flags |= 0 if objective.normalize_alpha else _FACTOR_LEFT_OUT
    # 0 stands for no bound, because not every compiler can print inf
    bound = terms.max_weight if terms.max_weight < math.inf else 0.0
    max_return = 0.0 if objective.max_return is None else objective.max_return
    scalars = [objective.parameter, bound, terms.entropy_coefficient, *terms.constants, max_return]
    return (objective.kind.number, terms.on_policy, flags, terms.block, terms.present, terms.given, scalars)


def terms_of(kind: int, on_policy: bool, flags: int, block: Tensor, present: int, given: int,
             scalars: list[float]) -> Terms:  # fmt: skip
    """Return the terms whose parts ``flat_terms`` returned."""
    name = _NAMES[kind]
    bound, coefficient, *constants, max_return = scalars[1:]
    parameter = KINDS[name].parameter
    objective = Objective(
        name,
        baseline="leave_one_out" if flags & _LEFT_OUT else None,
        normalize=bool(flags & _NORMALIZED),
        normalize_alpha=not flags & _FACTOR_LEFT_OUT,
        max_return=max_return or None,
        **({} if parameter is None else {parameter: scalars[0]}),
    )
    return Terms(objective, on_policy, bound or math.inf, block, present, given, tuple(constants), None, coefficient)


def _status(scores: Scores, like: Tensor) -> Tensor:
    """Return what a device has recorded about the call, 0-d int64.

    It covers the rows and, if kernels form A, the inputs and weights too.
    """
    checks = [check for check in scores.recorded if isinstance(check, faults.DeviceFaults) and check.status is not None]
    if not checks:
        return torch.full((), -1, dtype=torch.int64, device=like.device)
    found = torch.stack([faults.of_whole(check) for check in checks])
    return torch.where(found < 0, 2**62, found).min().where((found >= 0).any(), -1)


def _apart(scores: Scores) -> tuple[Tensor, Tensor]:
    """Return copies of the blocks of rows and sequences.

    The blocks may share memory, which the results of an op may not.
    """
    return scores.rows.clone(), scores.sequences.clone()


def _blocks(batch: Batch, columns: int, entropy: bool, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return fake rows, sequences and status."""
    rows = like.new_empty((3 if entropy else 2, batch.labels.shape[0]), dtype=torch.float64)
    return rows, rows.new_empty((columns, batch.n_sequences)), like.new_empty((), dtype=torch.int64)


def _differentiable(batch: Batch, scores: Scores, bonus: bool) -> tuple[Tensor, Tensor]:
    """Return weighted log_prob and, with a bonus, the entropy.

    Without a bonus the second tensor is empty, because a graph would otherwise bring a gradient of zeros for it.
    """
    log_prob, entropy = copies(batch, scores)
    return log_prob, entropy if bonus and entropy is not None else log_prob.new_empty(0)


def _fake_differentiable(batch: Batch, rows: Tensor, bonus: bool) -> tuple[Tensor, Tensor]:
    return rows.new_empty(batch.n_sequences), rows.new_empty(batch.n_sequences if bonus else 0)


# An op whose schema changes needs a new name. torch stores compiled graphs under a key that covers only their own code,
# and an old graph calls an op by its name.
@torch.library.custom_op("dmfast::score_v5", mutates_args=())
def score(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, token_weight: Tensor | None, scale: float,
    softcap: float, entropy: bool, backend: str, bonus: bool,
) -> FiveTensors:  # fmt: skip
    """Return weighted log_prob (B,), the entropy (B,) or an empty tensor, rows, sequences and status.

    The entropy is returned with ``bonus`` only, and is then differentiable.
    """
    batch = batch_of(logits, labels, cu_seqlens, token_weight, scale, softcap)
    scores = kernels.BACKENDS[backend].forward(batch, None, entropy)
    return *_differentiable(batch, scores, bonus), *_apart(scores), _status(scores, logits)


@score.register_fake
def _(logits, labels, cu_seqlens, token_weight, scale, softcap, entropy, backend, bonus):  # type: ignore[no-untyped-def]
    batch = batch_of(logits, labels, cu_seqlens, token_weight, scale, softcap)
    rows, sequences, status = _blocks(batch, ONLY_SCORED, entropy, logits)
    return *_fake_differentiable(batch, rows, bonus), rows, sequences, status


@torch.library.custom_op("dmfast::score_and_weigh_v6", mutates_args=())
def score_and_weigh(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, token_weight: Tensor | None, scale: float,
    softcap: float, entropy: bool, backend: str, kind: int, on_policy: bool, flags: int, block: Tensor, present: int,
    given: int, scalars: list[float],
) -> FourTensors:  # fmt: skip
    """Return loss (B), rows, sequences and status."""
    batch = batch_of(logits, labels, cu_seqlens, token_weight, scale, softcap)
    terms = terms_of(kind, on_policy, flags, block, present, given, scalars)
    scores = kernels.BACKENDS[backend].forward(batch, terms, entropy)
    return scores.sequences.select(0, LOSS).clone(), *_apart(scores), _status(scores, logits)


@score_and_weigh.register_fake
def _(logits, labels, cu_seqlens, token_weight, scale, softcap, entropy, *args):  # type: ignore[no-untyped-def]
    batch = batch_of(logits, labels, cu_seqlens, token_weight, scale, softcap)
    rows, sequences, status = _blocks(batch, WITH_TERMS, entropy, logits)
    return rows.new_empty(batch.n_sequences), rows, sequences, status


@torch.library.custom_op("dmfast::score_and_grad_v6", mutates_args=())
def score_and_grad(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, token_weight: Tensor | None, scale: float,
    softcap: float, entropy: bool, backend: str, kind: int, on_policy: bool, flags: int, block: Tensor, present: int,
    given: int, scalars: list[float], expected: float, divide_by: float,
) -> FiveTensors:  # fmt: skip
    """Compute ``score_and_weigh`` and the gradient in one pass, for a weight that does not depend on pi.

    The loss is 0-d, the sum over sequences divided by ``divide_by``, where 0 stands for their number. The last result
    is the gradient of ``expected * loss`` with respect to the logits.
    """
    batch = batch_of(logits, labels, cu_seqlens, token_weight, scale, softcap)
    terms, by = terms_of(kind, on_policy, flags, block, present, given, scalars), divisor(batch, divide_by)
    dz = new_gradient(batch, inplace=False)
    scores = kernels.BACKENDS[backend].forward_backward(batch, terms, entropy, by, expected / by, dz)
    assert scores.total is not None
    return scores.total, *_apart(scores), _status(scores, logits), dz


@score_and_grad.register_fake
def _(logits, labels, cu_seqlens, token_weight, scale, softcap, entropy, *args):  # type: ignore[no-untyped-def]
    batch = batch_of(logits, labels, cu_seqlens, token_weight, scale, softcap)
    rows, sequences, status = _blocks(batch, WITH_TERMS, entropy, logits)
    return rows.new_empty(()), rows, sequences, status, logits.new_empty(logits.shape)


@torch.library.custom_op("dmfast::grad_v5", mutates_args=())
def grad(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, token_weight: Tensor | None, scale: float,
    softcap: float, lse: Tensor, weight: Tensor, backend: str, entropy: Tensor | None, bonus: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the gradient of -sum_i (weight_i log pi(x_i) + bonus_i H(x_i)) with respect to the logits.

    log pi is weighted by the token weights. The result is a new contiguous tensor. ``entropy`` (rows,) and ``bonus``
    (B,) are both given or both None.
    """
    batch = batch_of(logits, labels, cu_seqlens, token_weight, scale, softcap)
    dz = new_gradient(batch, inplace=False)
    kernels.BACKENDS[backend].backward(batch, lse.contiguous(), weight.contiguous(), 1.0, dz,
                                       bonus=_bonus(entropy, bonus))  # fmt: skip
    return dz


def _bonus(entropy: Tensor | None, weight: Tensor | None) -> Bonus | None:
    return None if entropy is None or weight is None else Bonus(entropy.contiguous(), weight.contiguous())


@grad.register_fake
def _(logits, labels, cu_seqlens, token_weight, scale, softcap, lse, weight, backend, entropy, bonus):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


@torch.library.custom_op("dmfast::grad_v5_", mutates_args={"logits"})
def grad_(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, token_weight: Tensor | None, scale: float,
    softcap: float, lse: Tensor, weight: Tensor, backend: str, entropy: Tensor | None, bonus: Tensor | None,
) -> None:  # fmt: skip
    """Compute ``grad`` and write it over the logits. This op is not differentiable."""
    batch = batch_of(logits, labels, cu_seqlens, token_weight, scale, softcap)
    kernels.BACKENDS[backend].backward(batch, lse.contiguous(), weight.contiguous(), 1.0, batch.logits.detach(),
                                       bonus=_bonus(entropy, bonus))  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], rows: Tensor, sequences: Tensor | None) -> None:
    logits, labels, cu_seqlens, token_weight, ctx.scale, ctx.softcap, _, ctx.backend = inputs[:8]
    if sequences is None:
        ctx.bonus = inputs[8]
    else:
        ctx.coefficient = _coefficient(inputs[-1])
    _keep(ctx, [logits, labels, rows], {"cu_seqlens": cu_seqlens, "token_weight": token_weight, "sequences": sequences})


def _keep(ctx: Any, always: list[Tensor], maybe: dict[str, Tensor | None]) -> None:
    """Save tensors of which some may be None; ``_kept`` returns them."""
    ctx.kept = [name for name, x in maybe.items() if x is not None]
    ctx.save_for_backward(*always, *(x for x in maybe.values() if x is not None))


def _kept(ctx: Any, always: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    saved = list(ctx.saved_tensors)
    return saved[:always], dict(zip(ctx.kept, saved[always:], strict=True))


def _coefficient(scalars: list[float]) -> float:
    """Return the entropy coefficient from the scalars of ``flat_terms``."""
    return scalars[2]


def _of_losses(rows: Tensor, sequences: Tensor, given: Tensor, coefficient: float) -> tuple[Tensor, Bonus | None]:
    """Return the weights of log pi and the bonus, from the gradient (B,) of the losses."""
    return sequences.select(0, WEIGHT) * given, bonus_of(rows, coefficient * given) if coefficient else None


def _of_log_prob(rows: Tensor, given: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor, Bonus | None]:
    """Return the weights of log pi and the bonus, from the gradients (B,) of log pi and entropy. One may be None."""
    if of_entropy is None:
        assert given is not None
        return -given.to(torch.float64), None
    bonus = bonus_of(rows, -of_entropy)
    return torch.zeros_like(bonus.weight) if given is None else -given.to(torch.float64), bonus


def _grad_arguments(ctx: Any, given: Tensor | None, of_entropy: Tensor | None, weighs: bool) -> tuple[Any, ...]:
    """Return the arguments of ``grad`` and ``grad_``, from what ``_save`` kept.

    Args:
        ctx: the context of a call of ``score_and_weigh`` if ``weighs``, else of ``score``.
        given: (B,), the gradient of the losses if ``weighs``, else of log pi.
        of_entropy: (B,), the gradient of the entropy unless ``weighs``.
        weighs: whether the call formed A.
    """
    (logits, labels, rows), kept = _kept(ctx, 3)
    if weighs:
        assert given is not None
        weight, bonus = _of_losses(rows, kept["sequences"], given, ctx.coefficient)
    else:
        weight, bonus = _of_log_prob(rows, given, of_entropy if ctx.bonus else None)
    return (logits, labels, kept.get("cu_seqlens"), kept.get("token_weight"), ctx.scale, ctx.softcap,
            rows.select(0, LSE), weight, ctx.backend, *(bonus or (None, None)))  # fmt: skip


def _score_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _save(ctx, inputs, output[2], None)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _score_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    nothing = grads[0] is None and grads[1] is None
    dz = None if nothing else grad(*_grad_arguments(ctx, grads[0], grads[1], False))
    return (dz, *(None,) * 8)


score.register_autograd(_score_backward, setup_context=_score_setup)


def _weigh_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _save(ctx, inputs, output[1], output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _weigh_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    grad_loss = grads[0]  # (B,): the reduction is torch's
    dz = None if grad_loss is None else grad(*_grad_arguments(ctx, grad_loss, None, True))
    return (dz, *(None,) * 14)


score_and_weigh.register_autograd(_weigh_backward, setup_context=_weigh_setup)


def _one_pass_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.expected = inputs[15]
    ctx.save_for_backward(output[-1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _one_pass_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    if grads[0] is None:
        return (None,) * 17
    (dz,) = ctx.saved_tensors
    return (scaled(dz, grads[0] / ctx.expected).to(dz.dtype), *(None,) * 16)


score_and_grad.register_autograd(_one_pass_backward, setup_context=_one_pass_setup)


@torch.library.custom_op("dmfast::sample_v3", mutates_args=())
def sample(
    logits: Tensor, seed: int, row_ids: Tensor | None, step: int, scale: float, softcap: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Return tokens (N,) and their log_prob (N,). A seed of 2^63 or more is passed as the int64 with the same bits."""
    rows = SampleRows(logits, seed % 2**64, row_ids, step, scale, softcap)
    tokens, log_prob, status = kernels.BACKENDS[backend].sample(rows)
    if status is not None and faults.at_once() and int(status) >= 0:
        faults.raise_bad_draw(rows, int(status))
    return tokens, log_prob


@sample.register_fake
def _(logits, seed, row_ids, step, scale, softcap, backend):  # type: ignore[no-untyped-def]
    n = logits.shape[0]
    return logits.new_empty(n, dtype=torch.int64), logits.new_empty(n, dtype=torch.float64)


class _ScoreInPlace(torch.autograd.Function):
    """The autograd function of ``score`` whose backward overwrites the logits."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = score(*inputs)
        _save(ctx, inputs, output[2], None)
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        return cast("tuple[Tensor, ...]", output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        arguments = _grad_arguments(ctx, grads[0], grads[1], False)
        grad_(*arguments)
        return (arguments[0], *(None,) * 8)


class _WeighInPlace(torch.autograd.Function):
    """The autograd function of ``score_and_weigh`` whose backward overwrites the logits."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = score_and_weigh(*inputs)
        _save(ctx, inputs, output[1], output[2])
        ctx.mark_non_differentiable(*output[1:])
        return cast("tuple[Tensor, ...]", output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        arguments = _grad_arguments(ctx, grads[0], None, True)
        grad_(*arguments)
        return (arguments[0], *(None,) * 14)


# --- hidden states and a head -----------------------------------------------------------------------------------------


def _linear_batch(hidden: Tensor, head: Tensor, labels: Tensor, cu_seqlens: Tensor | None,
                  token_weight: Tensor | None, scale: float, softcap: float,
                  logits_dtype: torch.dtype | None) -> Batch:  # fmt: skip
    """Return the batch of a linear loss, whose logits are a stand-in.

    A dtype of None stands for the dtype of hidden, with products as torch is set (``as_set``).
    """
    logits = logits_to_come(hidden, head.shape[0], logits_dtype or hidden.dtype)
    return batch_of(logits, labels, cu_seqlens, token_weight, scale, softcap)._replace(as_set=logits_dtype is None)


def _or_empty(gradients: list[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


# An op does not see requires_grad, so bits 0, 1 and 2 say whether the gradients of hidden, head and bias are wanted.
def _wanted(bits: int) -> tuple[bool, ...]:
    return bool(bits & 1), bool(bits & 2), bool(bits & 4)


@torch.library.custom_op("dmfast::linear_score_v6", mutates_args=())
def linear_score(
    hidden: Tensor, head: Tensor, bias: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None,
    token_weight: Tensor | None, scale: float, softcap: float, logits_dtype: torch.dtype | None, entropy: bool,
    chunk_bytes: int, backend: str, wanted: int,
    bonus: bool,
) -> FiveTensors:  # fmt: skip
    """Return what ``score`` returns. A ``chunk_bytes`` of 0 stands for the default."""
    batch = _linear_batch(hidden, head, labels, cu_seqlens, token_weight, scale, softcap, logits_dtype)
    scores, _ = linear.forward(kernels.BACKENDS[backend], hidden, head, bias, batch, None, entropy, 1.0, None,
                               chunk_bytes or None, (False,) * 3)  # fmt: skip
    return *_differentiable(batch, scores, bonus), *_apart(scores), _status(scores, hidden)


@linear_score.register_fake
def _(hidden, head, bias, labels, cu_seqlens, token_weight, scale, softcap, logits_dtype, entropy, *args):  # type: ignore[no-untyped-def]
    batch = _linear_batch(hidden, head, labels, cu_seqlens, token_weight, scale, softcap, logits_dtype)
    rows, sequences, status = _blocks(batch, ONLY_SCORED, entropy, hidden)
    return *_fake_differentiable(batch, rows, args[-1]), rows, sequences, status


@torch.library.custom_op("dmfast::linear_weigh_v7", mutates_args=())
def linear_weigh(
    hidden: Tensor, head: Tensor, bias: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None,
    token_weight: Tensor | None, scale: float, softcap: float, logits_dtype: torch.dtype | None, entropy: bool,
    chunk_bytes: int, backend: str, wanted: int,
    kind: int, on_policy: bool, flags: int, block: Tensor, present: int, given: int, scalars: list[float],
) -> FourTensors:  # fmt: skip
    """Return loss (B), rows, sequences and status."""
    batch = _linear_batch(hidden, head, labels, cu_seqlens, token_weight, scale, softcap, logits_dtype)
    terms = terms_of(kind, on_policy, flags, block, present, given, scalars)
    scores, _ = linear.forward(kernels.BACKENDS[backend], hidden, head, bias, batch, terms, entropy, 1.0, None,
                               chunk_bytes or None, (False,) * 3)  # fmt: skip
    return scores.sequences.select(0, LOSS).clone(), *_apart(scores), _status(scores, hidden)


@linear_weigh.register_fake
def _(hidden, head, bias, labels, cu_seqlens, token_weight, scale, softcap, logits_dtype, entropy, *args):  # type: ignore[no-untyped-def]
    batch = _linear_batch(hidden, head, labels, cu_seqlens, token_weight, scale, softcap, logits_dtype)
    rows, sequences, status = _blocks(batch, WITH_TERMS, entropy, hidden)
    return rows.new_empty(batch.n_sequences), rows, sequences, status


@torch.library.custom_op("dmfast::linear_weigh_and_grad_v7", mutates_args=())
def linear_weigh_and_grad(
    hidden: Tensor, head: Tensor, bias: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None,
    token_weight: Tensor | None, scale: float, softcap: float, logits_dtype: torch.dtype | None, entropy: bool,
    chunk_bytes: int, backend: str, wanted: int,
    kind: int, on_policy: bool, flags: int, block: Tensor, present: int, given: int, scalars: list[float],
    expected: float, divide_by: float,
) -> SevenTensors:  # fmt: skip
    """Return loss (0-d), rows, sequences, status and the gradients of ``expected * loss`` in hidden, head and bias."""
    batch = _linear_batch(hidden, head, labels, cu_seqlens, token_weight, scale, softcap, logits_dtype)
    terms = terms_of(kind, on_policy, flags, block, present, given, scalars)
    scores, gradients = linear.forward(
        kernels.BACKENDS[backend], hidden, head, bias, batch, terms, entropy, divisor(batch, divide_by), expected,
        chunk_bytes or None, _wanted(wanted),
    )  # fmt: skip
    assert scores.total is not None
    d_hidden, d_head, d_bias = _or_empty(gradients, hidden)
    return scores.total, *_apart(scores), _status(scores, hidden), d_hidden, d_head, d_bias


@linear_weigh_and_grad.register_fake
def _(hidden, head, bias, labels, cu_seqlens, token_weight, scale, softcap, logits_dtype, entropy, *args):  # type: ignore[no-untyped-def]
    batch = _linear_batch(hidden, head, labels, cu_seqlens, token_weight, scale, softcap, logits_dtype)
    rows, sequences, status = _blocks(batch, WITH_TERMS, entropy, hidden)
    gradients = _fake_gradients(hidden, head, bias, args[2])
    return rows.new_empty(()), rows, sequences, status, *gradients


def _fake_gradients(hidden: Tensor, head: Tensor, bias: Tensor | None, wanted: int) -> tuple[Tensor, ...]:
    pairs = zip((hidden, head, bias), _wanted(wanted), strict=True)
    return tuple(x.new_empty(x.shape) if want and x is not None else hidden.new_empty(0) for x, want in pairs)


@torch.library.custom_op("dmfast::linear_grad_v6", mutates_args=())
def linear_grad(
    hidden: Tensor, head: Tensor, bias: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None,
    token_weight: Tensor | None, scale: float, softcap: float, logits_dtype: torch.dtype | None, chunk_bytes: int,
    backend: str, wanted: int, lse: Tensor, coefficient: Tensor, entropy: Tensor | None, bonus: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of -sum_i (coefficient_i log pi(x_i) + bonus_i H(x_i)) in hidden, head and bias.

    A gradient that is not wanted is empty. ``entropy`` (rows,) and ``bonus`` (B,) are both given or both None.
    """
    batch = _linear_batch(hidden, head, labels, cu_seqlens, token_weight, scale, softcap, logits_dtype)
    gradients = linear.backward(kernels.BACKENDS[backend], hidden, head, bias, batch, lse.contiguous(), coefficient,
                                chunk_bytes or None, _wanted(wanted), bonus=_bonus(entropy, bonus))  # fmt: skip
    return cast("tuple[Tensor, Tensor, Tensor]", _or_empty(gradients, hidden))


@linear_grad.register_fake
def _(hidden, head, bias, *args):  # type: ignore[no-untyped-def]
    return _fake_gradients(hidden, head, bias, args[8])


@torch.library.custom_op("dmfast::scale_v3_", mutates_args={"x"})
def scale_(x: Tensor, by: Tensor, backend: str) -> None:
    """Multiply a matrix in place, so that a gradient of V x D is not copied. A factor of 1 reads nothing."""
    kernels.BACKENDS[backend].scale_matrix(x, 1.0, by)


def _linear_save(ctx: Any, inputs: tuple[Any, ...], rows: Tensor, sequences: Tensor | None) -> None:
    hidden, head, bias, labels, cu_seqlens, token_weight, ctx.scale, ctx.softcap, ctx.logits_dtype = inputs[:9]
    ctx.chunk_bytes, ctx.backend, ctx.wanted = inputs[10:13]
    if sequences is None:
        ctx.bonus = inputs[13]
    else:
        ctx.coefficient = _coefficient(inputs[-1])
    maybe = {"bias": bias, "cu_seqlens": cu_seqlens, "token_weight": token_weight, "sequences": sequences}
    _keep(ctx, [hidden, head, labels, rows], maybe)


def _linear_backward(ctx: Any, given: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
    (hidden, head, labels, rows), kept = _kept(ctx, 4)
    if "sequences" in kept:
        assert given is not None
        coefficient, bonus = _of_losses(rows, kept["sequences"], given, ctx.coefficient)
    else:
        coefficient, bonus = _of_log_prob(rows, given, of_entropy if ctx.bonus else None)
    gradients = linear_grad(hidden, head, kept.get("bias"), labels, kept.get("cu_seqlens"), kept.get("token_weight"),
                            ctx.scale, ctx.softcap, ctx.logits_dtype, ctx.chunk_bytes, ctx.backend, ctx.wanted,
                            rows.select(0, LSE), coefficient, *(bonus or (None, None)))  # fmt: skip
    return _only_wanted(gradients, ctx.wanted)


def _only_wanted(gradients: tuple[Tensor, ...], wanted: int) -> tuple[Tensor | None, ...]:
    return tuple(x if want else None for x, want in zip(gradients, _wanted(wanted), strict=True))


def _linear_score_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _linear_save(ctx, inputs, output[2], None)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _linear_score_backward(ctx: Any, given: Tensor | None, of_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = given is None and of_entropy is None
    gradients = (None,) * 3 if nothing else _linear_backward(ctx, given, of_entropy)
    return (*gradients, *(None,) * 11)


linear_score.register_autograd(_linear_score_backward, setup_context=_linear_score_setup)


def _linear_weigh_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _linear_save(ctx, inputs, output[1], output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _linear_weigh_backward(ctx: Any, given: Tensor | None, *_: Any) -> tuple[Any, ...]:
    gradients = (None,) * 3 if given is None else _linear_backward(ctx, given, None)
    return (*gradients, *(None,) * 17)


linear_weigh.register_autograd(_linear_weigh_backward, setup_context=_linear_weigh_setup)


class _LinearOnePass(torch.autograd.Function):
    """The autograd function of ``linear_weigh_and_grad``, whose backward scales the gradients in place."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        total, rows, sequences, status, *gradients = linear_weigh_and_grad(*inputs)
        ctx.backend, ctx.wanted, ctx.expected = inputs[11], inputs[12], inputs[20]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(rows, sequences, status)
        return total, rows, sequences, status

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gradients, by = ctx.saved_tensors, grads[0] / ctx.expected
        for gradient, want in zip(gradients, _wanted(ctx.wanted), strict=True):
            if want:
                scale_(gradient, by, ctx.backend)
        return (*_only_wanted(gradients, ctx.wanted), *(None,) * 19)


# --- what functional.py calls -----------------------------------------------------------------------------------------


def _scores(
    backend: Backend, batch: Batch, terms: Terms | None, rows: Tensor, sequences: Tensor, status: Tensor
) -> Scores:
    """Return the results of an op as the backend would have returned them, with the device's recorded faults."""
    if not backend.records_faults:
        return Scores(rows, sequences)
    log_prob = sequences.select(0, LOG_PROB)
    # if torch forms A, the status of the kernels covers only the rows
    made = None if terms is None or backend.forms_weight else objectives.bounded_weights(terms, log_prob)
    return Scores(rows, sequences, None, (faults.device_faults(batch, terms, log_prob, status, made),))


def log_prob(
    backend: Backend, batch: Batch, entropy: bool, inplace: bool, wants_grad: bool, bonus: bool = False
) -> LogProb:
    """Return ``weighted_log_prob`` (B,) and, with ``bonus``, the entropy (B,), differentiable; the scores."""
    call = _ScoreInPlace.apply if inplace else score
    given, of_sequences, *blocks = call(*flat(batch), entropy, backend.name, bonus)  # type: ignore[no-untyped-call]
    return given, of_sequences if bonus else None, _scores(backend, batch, None, *blocks)


def loss(backend: Backend, batch: Batch, terms: Terms, options: Options, wants_grad: bool) -> tuple[Tensor, Scores]:
    """Return the reduced loss, differentiable, and the scores."""
    if not isinstance(terms.objective, Objective):
        if not backend.records_faults:
            batch = check_ops.checked(batch, terms)
        bonus = terms.entropy_coefficient != 0.0
        given = log_prob(backend, batch, options.entropy, options.inplace, wants_grad, bonus)
        return from_log_prob(backend, batch, given, terms, options)
    arguments = (*flat(batch), options.entropy, backend.name, *flat_terms(terms))
    if options.inplace:
        # even known weights wait for backward here, which saves one mutating op and costs one more read of the logits
        found, rows, sequences, status = _WeighInPlace.apply(*arguments)  # type: ignore[no-untyped-call]
    elif options.expected is not None and batch.logits.dtype != torch.float16:  # scaling may overflow in fp16
        result, rows, sequences, status, _ = score_and_grad(*arguments, options.expected, options.divide_by)
        return result, _scores(backend, batch, terms, rows, sequences, status)
    else:
        found, rows, sequences, status = score_and_weigh(*arguments)
    loss = reduce(found, options.reduction, divisor(batch, options.divide_by))
    return loss, _scores(backend, batch, terms, rows, sequences, status)


def _linear_arguments(
    backend: Backend, hidden: Tensor, head: Tensor, bias: Tensor | None, batch: Batch, entropy: bool,
    chunk_bytes: int | None,
) -> tuple[Any, ...]:  # fmt: skip
    needs = [x is not None and x.requires_grad for x in (hidden, head, bias)]
    wanted = sum(1 << i for i, need in enumerate(needs) if need) if torch.is_grad_enabled() else 0
    dtype = None if batch.as_set else batch.logits.dtype
    return (hidden, head, bias, *flat(batch)[1:], dtype, entropy, chunk_bytes or 0, backend.name, wanted)


def linear_log_prob(
    backend: Backend, hidden: Tensor, head: Tensor, bias: Tensor | None, batch: Batch, entropy: bool,
    chunk_bytes: int | None, bonus: bool = False,
) -> LogProb:  # fmt: skip
    """Return ``weighted_log_prob`` (B,) and, with ``bonus``, the entropy (B,), differentiable; the scores."""
    arguments = _linear_arguments(backend, hidden, head, bias, batch, entropy, chunk_bytes)
    given, of_sequences, *blocks = linear_score(*arguments, bonus)
    return given, of_sequences if bonus else None, _scores(backend, batch, None, *blocks)


def linear_loss(
    backend: Backend, hidden: Tensor, head: Tensor, bias: Tensor | None, batch: Batch, terms: Terms, options: Options,
    chunk_bytes: int | None,
) -> tuple[Tensor, Scores]:  # fmt: skip
    """Return the reduced loss, differentiable, and the scores."""
    if not isinstance(terms.objective, Objective):
        if not backend.records_faults:
            batch = check_ops.checked(batch, terms)
        bonus = terms.entropy_coefficient != 0.0
        given = linear_log_prob(backend, hidden, head, bias, batch, options.entropy, chunk_bytes, bonus)
        return from_log_prob(backend, batch, given, terms, options)
    arguments = _linear_arguments(backend, hidden, head, bias, batch, options.entropy, chunk_bytes)
    if options.expected is not None and arguments[-1]:
        found, rows, sequences, status = _LinearOnePass.apply(  # type: ignore[no-untyped-call]
            *arguments, *flat_terms(terms), options.expected, options.divide_by
        )
        return found, _scores(backend, batch, terms, rows, sequences, status)
    found, rows, sequences, status = linear_weigh(*arguments, *flat_terms(terms))
    loss = reduce(found, options.reduction, divisor(batch, options.divide_by))
    return loss, _scores(backend, batch, terms, rows, sequences, status)


def draw(rows: SampleRows, backend: Backend) -> tuple[Tensor, Tensor]:
    """Return tokens (N,) and their log_prob (N,)."""
    seed = rows.seed if rows.seed < 2**63 else rows.seed - 2**64
    drawn = sample(rows.logits, seed, rows.row_ids, rows.step, rows.scale, rows.softcap, backend.name)
    return cast("tuple[Tensor, Tensor]", drawn)
