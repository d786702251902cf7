"""Present the losses to autograd: forward scores, and backward writes the gradient of the logits.

The gradient overwrites the logits if the caller asks for that. Under torch.compile ``ops.py`` replaces this module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..objectives import Objective, Terms
from . import check_ops, checks, eager
from .backend import Backend, new_gradient
from .batch import LOSS, Batch, Scores, bonus_of
from .form import denominator, divisor, form_loss, losses, reduce, weighted_of


class Options(NamedTuple):
    """The options of one call of a loss."""

    reduction: str
    divide_by: float  # the sum over sequences is divided by this; under torch.compile 0 stands for their number
    entropy: bool  # whether the entropy is wanted, as a part of the loss or beside it
    inplace: bool  # whether the gradient overwrites the logits
    expected: float | None  # the grad_output that forward folds into the gradient; with None backward writes it


def options_of(
    batch: Batch, reduction: str, num_sequences: float | Tensor | None, entropy: bool, inplace: bool
) -> tuple[Options, Tensor | None]:
    """Return the options of a call, and the tensor that divides its loss if the host does not know the divisor."""
    compiling = torch.compiler.is_compiling()
    if isinstance(num_sequences, Tensor):
        if compiling or num_sequences.device.type != "cpu":
            return Options(reduction, 1.0, entropy, inplace, None), num_sequences
        num_sequences = float(num_sequences.detach())
        checks.check_number("num_sequences", num_sequences)
    if compiling and reduction == "mean" and num_sequences is None:
        return Options(reduction, 0.0, entropy, inplace, None), None  # 0 spares torch.compile a graph for every B
    return Options(reduction, denominator(batch, reduction, num_sequences), entropy, inplace, None), None


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Call ``function.apply``, which torch leaves untyped.

    torch looks at each argument, so the arguments that are not tensors come as one tuple.
    """
    return function.apply(*args)  # type: ignore[no-untyped-call]


def refuses_double_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a backward so that it refuses to be differentiated. Its result would silently be a constant."""

    def refuse(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "dmfast's losses can't be differentiated twice, and backward was called with create_graph=True; "
                "dmfast.eager has the same functions in plain torch"
            )
        return backward(ctx, *grads)

    return refuse


def expected_grad(weight_known: bool, dtype: torch.dtype, reduction: str, grad_scale: float | None) -> float | None:
    """Return the grad_output to fold into a gradient written by forward, or None where that must wait for backward."""
    if not weight_known or reduction == "none":
        return None
    if grad_scale is None and dtype == torch.float16:
        return None  # small gradients would round to 0 without the scaler's factor
    return 1.0 if grad_scale is None else float(grad_scale)


def _save(ctx: Any, batch: Batch, scores: Scores, *call: Any) -> None:
    """Keep a call for backward.

    A tensor that was changed in between is an error. PyTorch raises it for the logits. ``_saved`` raises it for the
    small tensors, which cost less when they lie on the context. A view is saved detached: the detached tensor has the
    same version counter, while autograd would refuse to keep some views that changed.
    """
    logits = batch.logits
    ctx.call = (batch[1:], _versions(batch), scores, scores.version, *call)
    ctx.save_for_backward(logits if logits._base is None else logits.detach())


def _versions(batch: Batch) -> tuple[int, int]:
    """Return how often the tokens and the starts were changed in place, which PyTorch counts."""
    return batch.tokens._version, 0 if batch.cu_seqlens is None else batch.cu_seqlens._version


def _saved(ctx: Any) -> tuple[Any, ...]:
    """Return the batch, the scores and the rest of what ``_save`` has kept."""
    (logits,) = ctx.saved_tensors
    rest, of_inputs, scores, of_scores, *call = ctx.call
    batch, changed = Batch(logits, *rest), None
    if _versions(batch) != of_inputs:
        changed = "tokens or cu_seqlens"
    if scores.version != of_scores:
        changed = "a result, such as out.log_prob or out.weight"
    if changed is not None:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"{changed} of dmfast's loss; change a clone of it, or change it after backward"
        )
    return batch, scores, *call


class _LogProb(torch.autograd.Function):
    """The autograd function of log pi per sequence, weighted by token weights if there are any, and of its entropy."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, call: tuple[Backend, Batch, bool, bool]
    ) -> tuple[Tensor, Tensor | None, Scores]:
        backend, batch, entropy, inplace = call
        scores = backend.forward(batch, None, entropy)
        _save(ctx, batch, scores, backend, inplace)
        ctx.set_materialize_grads(False)
        return *copies(batch, scores), scores

    @staticmethod
    @refuses_double_backward
    def backward(
        ctx: Any, grad_log_prob: Tensor | None, grad_entropy: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        batch, scores, backend, inplace = _saved(ctx)
        dz = new_gradient(batch, inplace)
        given = torch.zeros_like(scores.log_prob) if grad_log_prob is None else -grad_log_prob.to(torch.float64)
        bonus = None if grad_entropy is None else bonus_of(scores.rows, -grad_entropy)
        backend.backward(batch, scores.lse, given.contiguous(), 1.0, dz, bonus=bonus)
        return dz, None


def copies(batch: Batch, scores: Scores) -> tuple[Tensor, Tensor | None]:
    """Return copies of ``weighted_log_prob`` and the entropy.

    The copies may carry a gradient, which the blocks of the scores may not.
    """
    entropy = scores.entropy
    log_prob = weighted_of(batch, scores)
    return log_prob.clone(), None if entropy is None else entropy.clone()


class _Loss(torch.autograd.Function):
    """The autograd function of the loss whose weight the kernels form.

    With ``expected`` the weight is known, and forward has written the gradient. If backward then brings another
    grad_output while the logits still exist, it computes the gradient again. This costs as much as scaling it and is
    exact. A gradient in place is scaled, because its logits are gone.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: tuple[Backend, Batch, Terms, Options]) -> tuple[Tensor, Scores]:
        backend, batch, terms, options = call
        expected = options.expected
        if expected is not None:
            dz = new_gradient(batch, options.inplace)
            factor = expected / options.divide_by
            scores = backend.forward_backward(batch, terms, options.entropy, options.divide_by, factor, dz)
            ctx.dz = None if options.inplace else dz
        else:
            scores = backend.forward(batch, terms, options.entropy, options.divide_by)
        _save(ctx, batch, scores, backend, options, terms.entropy_coefficient)
        return reduced(scores, options.reduction), scores

    @staticmethod
    @refuses_double_backward
    def backward(ctx: Any, grad_loss: Tensor, _: None) -> tuple[Tensor | None, ...]:
        batch, scores, backend, options, coefficient = _saved(ctx)
        inplace, expected, dz = options.inplace, options.expected, None
        if expected is not None:
            if inplace:
                dz = batch.logits.detach()
                backend.scale(batch, dz, 1.0 / expected, grad_loss)
                # a second backward must not use these values again, even where nothing was written
                torch.autograd.graph.increment_version(batch.logits)
                return dz, None
            dz, ctx.dz = ctx.dz, None  # autograd owns it now; with retain_graph a second backward computes its own
        if options.reduction == "none":
            dz = new_gradient(batch, inplace)
            bonus = bonus_of(scores.rows, coefficient * grad_loss) if coefficient else None
            backend.backward(batch, scores.lse, scores.weight * grad_loss.to(torch.float64), 1.0, dz, bonus=bonus)
        else:
            unless = None if dz is None else expected
            dz = new_gradient(batch, inplace) if dz is None else dz
            bonus = scores.bonus(coefficient)
            backend.backward_of(batch, scores, 1.0 / options.divide_by, dz, grad_loss, unless, bonus)
        return dz, None


def reduced(scores: Scores, reduction: str) -> Tensor:
    """Return the loss that a backend has formed."""
    if reduction == "none":
        return scores.sequences.select(0, LOSS).clone()  # the result carries a gradient, which the block may not
    assert scores.total is not None
    return scores.total


LogProb: TypeAlias = tuple[Tensor, "Tensor | None", Scores]


def log_prob(backend: Backend, batch: Batch, entropy: bool, inplace: bool, wants_grad: bool) -> LogProb:
    """Return ``weighted_log_prob`` (B,), the entropy (B,) or None, and the scores.

    The first two carry a gradient where one is wanted.
    """
    if backend.in_torch:
        scored = eager.score(batch, entropy)
        return scored.weighted, scored.entropy, Scores(scored.rows(), scored.sequences())
    if not wants_grad:
        scores = backend.forward(batch, None, entropy)
        return weighted_of(batch, scores), scores.entropy, scores
    found: LogProb = apply(_LogProb, batch.logits, (backend, batch, entropy, inplace))
    return found


def loss(backend: Backend, batch: Batch, terms: Terms, options: Options, wants_grad: bool) -> tuple[Tensor, Scores]:
    """Return the reduced loss, with gradient where one is wanted, and the scores."""
    if not backend.in_torch and isinstance(terms.objective, Objective):
        if wants_grad:
            found: tuple[Tensor, Scores] = apply(_Loss, batch.logits, (backend, batch, terms, options))
            return found
        scores = backend.forward(batch, terms, options.entropy, options.divide_by)
        return reduced(scores, options.reduction), scores
    if not backend.records_faults:
        batch = check_ops.checked(batch, terms)
    given = log_prob(backend, batch, options.entropy, options.inplace, wants_grad)
    return from_log_prob(backend, batch, given, terms, options)


def from_log_prob(
    backend: Backend, batch: Batch, given: LogProb, terms: Terms, options: Options
) -> tuple[Tensor, Scores]:
    """Return the loss made of weighted log pi and entropy, through which its gradient flows, and the scores with A."""
    of_sequences, entropy, scores = given
    by = divisor(batch, options.divide_by)
    scores = form_loss(batch, scores.rows, scores.log_prob, scores.entropy, terms, by, backend.records_faults,
                       scores.recorded, of_sequences.detach())  # fmt: skip
    loss = losses(scores.weight, of_sequences, entropy, terms.entropy_coefficient)
    return reduce(loss, options.reduction, by), scores
