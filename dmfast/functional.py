"""The fused losses: functions of logits, to be called from any training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import kernels
from .kernels import checks, compiled, eager, linear, native
from .kernels.autograd import apply, expected_grad, once
from .kernels.batch import Batch, Scores
from .kernels.result import DMLossOutput, denominator
from .objectives import Objective, Terms

__all__ = [
    "dm_loss",
    "linear_dm_loss",
    "linear_sequence_log_prob",
    "sample_tokens",
    "sequence_log_prob",
    "shift_labels",
]


def shift_labels(input_ids: Tensor, mask: Tensor | None = None, prompt_len: int = 0) -> Tensor:
    """Labels for a causal model's logits: ``labels[:, t] = input_ids[:, t + 1]`` where that token is scored, else -100.

    The tokens are shifted and never the logits: slicing logits makes autograd copy all of them.

    Args:
        input_ids: (B, T) integer, prompt and continuation.
        mask: (B, T) bool or integer, True on the tokens whose log-probability counts; None: all.
        prompt_len: the first ``prompt_len`` tokens are never scored.

    Returns:
        (B, T) int64. The last position predicts nothing and is -100.

    Raises:
        TypeError, ValueError: wrong dtype or shape.
    """
    if not checks.is_integer(input_ids) or input_ids.dim() != 2:
        raise TypeError(f"input_ids must be an integer tensor (B, T), got {checks.describe(input_ids)}")
    if mask is not None and (mask.shape != input_ids.shape or mask.dtype.is_floating_point):
        raise ValueError(f"mask must be bool or integer of shape {tuple(input_ids.shape)}, got {checks.describe(mask)}")
    if not 0 <= prompt_len <= input_ids.shape[1]:
        raise ValueError(f"prompt_len must be in [0, {input_ids.shape[1]}], got {prompt_len}")
    labels = torch.full(input_ids.shape, checks.IGNORE, dtype=torch.int64, device=input_ids.device)
    labels[:, :-1] = input_ids[:, 1:]
    if mask is not None:
        labels[:, :-1].masked_fill_(mask[:, 1:] == 0, checks.IGNORE)
    if prompt_len > 1:
        labels[:, : prompt_len - 1] = checks.IGNORE
    return labels


_NOTHING = torch.empty(0)  # in a Batch kept for backward, whose tensors save_for_backward holds and watches


def _save(ctx: Any, batch: Batch, *others: Tensor) -> None:
    """Keeps the batch for backward; tensors that were changed in between raise PyTorch's own error there.

    The logits go in detached: that shares their version, and autograd would refuse to keep some views that changed.
    """
    ctx.batch = Batch(_NOTHING, _NOTHING, None, *batch[3:])
    ctx.save_for_backward(batch.logits.detach(), batch.labels, batch.cu_seqlens, *others)


def _saved(ctx: Any) -> tuple[Batch, tuple[Tensor, ...]]:
    logits, labels, cu_seqlens, *others = ctx.saved_tensors
    return Batch(logits, labels, cu_seqlens, *ctx.batch[3:]), tuple(others)


def _reduced(scores: Scores, reduction: str) -> Tensor:
    assert scores.loss is not None and scores.total is not None
    return scores.loss if reduction == "none" else scores.total


class _SequenceLogProb(torch.autograd.Function):
    """log pi per sequence; backward writes the gradient of the logits, over them if asked."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, batch: Batch, entropy: bool, inplace: bool) -> tuple[Tensor, Scores]:
        scores = native.forward(batch, None, entropy)
        _save(ctx, batch, scores.lse)
        ctx.inplace = inplace
        return scores.log_prob, scores

    @staticmethod
    @once
    def backward(ctx: Any, grad_log_prob: Tensor, _: None) -> tuple[Tensor, None, None, None]:
        batch, (lse,) = _saved(ctx)
        dz = native.backward(batch, lse, -grad_log_prob.to(torch.float64), 1.0, ctx.inplace)
        return dz, None, None, None


def _score(batch: Batch, entropy: bool, inplace: bool, wants_grad: bool) -> Scores:
    """Scores whose log_prob carries the gradient, where one is wanted."""
    if torch.compiler.is_compiling():
        return compiled.score(batch, entropy, inplace)
    if not wants_grad:
        return native.forward(batch, None, entropy)
    log_prob, scores = apply(_SequenceLogProb, batch.logits, batch, entropy, inplace)
    return cast(Scores, scores)._replace(log_prob=log_prob)


class _DMLoss(torch.autograd.Function):
    """The loss; backward writes the gradient of the logits, over them if asked.

    With ``expected`` (a grad_output to fold in) the weight is known and the gradient was written by forward.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, batch: Batch, terms: Terms, reduction: str, divide_by: float, entropy: bool,
        inplace: bool, expected: float | None,
    ) -> tuple[Tensor, Scores]:  # fmt: skip
        ctx.dz = None
        if expected is not None:
            scores, dz = native.forward_backward(batch, terms, entropy, divide_by, expected, inplace)
            if not inplace:
                ctx.dz = dz
        else:
            scores = native.forward(batch, terms, entropy, divide_by)
        assert scores.weight is not None and scores.loss is not None
        _save(ctx, batch, scores.lse, scores.weight)
        ctx.inplace, ctx.expected, ctx.divide_by, ctx.reduction = inplace, expected, divide_by, reduction
        return _reduced(scores, reduction), scores

    @staticmethod
    @once
    def backward(ctx: Any, grad_loss: Tensor, _: None) -> tuple[Tensor | None, ...]:
        batch, (lse, weight) = _saved(ctx)
        if ctx.expected is not None and (ctx.inplace or ctx.dz is not None):
            # the gradient is there already, multiplied by the grad_output that was expected
            dz = batch.logits.detach() if ctx.inplace else ctx.dz
            ctx.dz = None  # given away: with retain_graph a second backward computes its own
            native.scale_(batch, dz, 1.0 / ctx.expected, grad_loss)
            if ctx.inplace:
                increment_version(
                    batch.logits
                )  # also where nothing was written: a second backward must not have this again
        elif ctx.reduction == "none":
            dz = native.backward(batch, lse, weight * grad_loss.to(torch.float64), 1.0, ctx.inplace)
        else:
            dz = native.backward(batch, lse, weight, 1.0 / ctx.divide_by, ctx.inplace, grad_loss)
        return dz, None, None, None, None, None, None, None


def _output(loss: Tensor, scores: Scores, terms: Terms) -> DMLossOutput:
    assert scores.weight is not None and scores.n_clipped is not None
    has_proposal = terms.log_proposal is not None or terms.on_policy
    return DMLossOutput(
        loss=loss,
        log_prob=scores.log_prob,
        log_ratio=scores.log_ratio if has_proposal else None,
        log_target_ratio=scores.log_target_ratio if terms.log_target is not None and terms.log_z is not None else None,
        weight=scores.weight,
        n_clipped=scores.n_clipped,
        entropy=scores.entropy,
        log_proposal=terms.log_proposal,
        log_target=terms.log_target,
        log_z=terms.log_z,
        _recorded=scores.recorded,
    )


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
    """The fused distribution-matching loss ``-(1/B) sum_i A_i log pi(x_i)``, A a constant (arXiv:2206.00761, sec. 2-3).

    Sequences x are drawn from a proposal q; ``log pi(x) = sum_t mask_t log softmax(cap(z_t) / temperature)[x_t]``.

    Args:
        logits: (B, T, V), or packed (N, V) with ``cu_seqlens``; float32, bfloat16, float16 (float64 through the eager
            backend); any strides with the last dimension contiguous. ``logits[:, t]`` scores ``tokens[:, t]``: align
            a causal model's input_ids with ``shift_labels``.
        tokens: (B, T) or (N,) integer; -100 = not scored.
        mask: same shape, bool or integer; False = not scored. Such rows are never read and get gradient 0.
        log_target: (B,) float32 or float64, log P(x) in nats; -inf where P = 0.
        log_proposal: (B,) likewise, log q(x), under the temperature that x was sampled at. With ``on_policy`` the
            sampler's stored log pi, optional: with it the weight is known before the forward and one pass does all.
        log_z: float, 0-d or (B,): log Z, one per sequence where contexts differ. -inf for a context whose P are all 0.
            Under torch.compile give a running one as a tensor: torch compiles anew for every value of a float.
        objective: a name of ``dmfast.OBJECTIVES``, an ``Objective``, or a function of ``Terms`` giving A, (B,) fp64.
        on_policy: x was drawn from the policy itself: rho = 1 exactly.
        reward: (B,) R(x), for ``reinforce`` and ``kl_control``.
        log_base: (B,) log a(x), for ``kl_control``.
        temperature, softcap: of the policy: logits become softcap * tanh(logits / softcap), then / temperature.
        cu_seqlens: (B+1,) int32 or int64, where packed sequences start; from 0 to N.
        context_id: (B,) integer, for the baseline ``leave_one_out_context``.
        reduction: ``mean`` over sequences, ``sum``, or ``none``: a (B,) loss.
        num_sequences: what ``mean`` divides by: the sequences of the whole optimiser step, where this call is one
            microbatch of it. Default B.
        grad_scale: the grad_output that backward will bring (a GradScaler's scale, 1 / accumulation steps), if known.
            It changes no result: a gradient written by forward has it folded in before rounding, and float16 logits
            take the one-pass form only with it.
        max_weight: bounds A to [-max_weight, max_weight].
        inplace: the gradient overwrites the logits, which are undefined after the call, also after an error in a row.
            Saves a tensor of their size. Ignored where no gradient is wanted.
        return_entropy: ``out.entropy``, the policy's entropy summed over scored tokens, in nats.

    Returns:
        ``DMLossOutput``; ``out.loss`` carries the gradient of the logits. Per-sequence values are fp64.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value, an input that the objective needs
            and did not get, NaN or +inf in a scored row, a label logit of -inf, a weight beyond fp32's range.

    Examples:
        Two sequences of two tokens from q = pi, uniform over five tokens; the target has the first twice as often as
        pi, the second never:

        >>> logits = torch.zeros(2, 2, 5, requires_grad=True)
        >>> log_q = -2 * torch.tensor([5.0, 5.0]).double().log()
        >>> log_p = log_q + torch.tensor([2.0, 0.0]).log()
        >>> out = dm_loss(logits, torch.tensor([[0, 1], [2, 3]]), log_target=log_p, log_proposal=log_q, log_z=0.0)
        >>> [round(a, 6) for a in out.weight.tolist()]  # u - rho
        [1.0, -1.0]
        >>> out.loss.backward()
        >>> logits.grad[0, 0]  # -(A/2) (onehot - softmax)
        tensor([-0.4000,  0.1000,  0.1000,  0.1000,  0.1000])
    """
    batch = checks.make_batch(logits, tokens, mask, cu_seqlens, temperature, softcap)
    terms = checks.make_terms(
        batch, objective, on_policy=on_policy, max_weight=max_weight, context_id=context_id,
        log_proposal=log_proposal, log_target=log_target, log_z=log_z, reward=reward, log_base=log_base,
    )  # fmt: skip
    checks.check_call(batch, reduction, num_sequences, grad_scale, inplace)
    divide_by = denominator(batch, reduction, num_sequences)
    wants_grad = torch.is_grad_enabled() and logits.requires_grad
    inplace = inplace and wants_grad
    compiling = torch.compiler.is_compiling()
    backend = kernels.select(logits)
    if backend == "eager":
        return eager.loss(batch, terms, reduction, divide_by, return_entropy)
    if not isinstance(terms.objective, Objective):
        if backend == "cpu":
            batch = eager.checked(batch, terms)
        scores = _score(batch, return_entropy, inplace, wants_grad)
        if compiling and backend == "cpu":
            return eager.loss_from_scores(batch, scores, terms, reduction, divide_by)
        return native.loss_from_scores(batch, scores, terms, reduction, divide_by)
    if compiling:
        expected = expected_grad(terms.weight_known, logits.dtype, reduction, grad_scale) if wants_grad else None
        loss, scores = compiled.dm_loss(batch, terms, reduction, divide_by, return_entropy, inplace, expected)
    elif wants_grad:
        expected = expected_grad(terms.weight_known, logits.dtype, reduction, grad_scale)
        loss, scores = apply(_DMLoss, logits, batch, terms, reduction, divide_by, return_entropy, inplace, expected)
    else:
        scores = native.forward(batch, terms, return_entropy, divide_by)
        loss = _reduced(scores, reduction)
    return _output(loss, scores, terms)


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
    """log pi(x) of each sequence, ``sum_t mask_t log softmax(cap(z_t) / temperature)[x_t]``, differentiable.

    Args:
        logits, tokens, mask, temperature, softcap, cu_seqlens, inplace: as in ``dm_loss``.

    Returns:
        (B,) fp64, nats.

    Raises:
        TypeError, ValueError: as ``dm_loss``.
    """
    batch = checks.make_batch(logits, tokens, mask, cu_seqlens, temperature, softcap)
    checks.check_call(batch, inplace=inplace)
    wants_grad = torch.is_grad_enabled() and logits.requires_grad
    if kernels.select(logits) == "eager":
        return eager.score(batch).log_prob
    return _score(batch, entropy=False, inplace=inplace and wants_grad, wants_grad=wants_grad).log_prob


_F = TypeVar("_F", bound=Callable[..., Any])


def _eagerly(function: _F) -> _F:
    """A graph break under torch.compile: how many chunks there are depends on the values of tokens and mask."""
    # torch.compiler.disable at the first call: at import it would load torch._dynamo, and that triton
    return cast(_F, torch._disable_dynamo(function))


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Hidden states and head in the dtype in which nn.Linear would multiply them here."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype.is_floating_point else x for x in tensors)


@_eagerly
def linear_dm_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
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
    return_entropy: bool = False,
    chunk_bytes: int | None = None,
) -> DMLossOutput:
    """``dm_loss`` of ``hidden @ weight.T + bias``, whose logits never exist at once.

    Whole sequences go through one buffer of logits; rows that are not scored cost no product. Where grad_output is
    known before backward (1, or ``grad_scale``), forward computes all gradients with three products; otherwise
    (``reduction="none"``, float16 without ``grad_scale``, an objective of your own) backward computes the logits again.
    The backend ``eager`` forms all logits. Under torch.compile the call is a graph break; under autocast the products
    run in its dtype, as nn.Linear's do.

    Args:
        hidden: (B, T, D), or packed (N, D) with ``cu_seqlens``; float32, bfloat16, float16 (float64 through the eager
            backend). ``hidden[:, t]`` scores ``tokens[:, t]``: align input_ids with ``shift_labels``.
        weight: (V, D), hidden's dtype: an nn.Linear's. One that needs no gradient costs no product for it.
        bias: (V,), hidden's dtype.
        chunk_bytes: size of the buffer of logits. A sequence that does not fit goes through it twice. Default: 128 MiB,
            on a GPU no less than 4,096 rows, so that adding to weight's gradient once a buffer stays cheap.
        tokens, mask and all else: as in ``dm_loss``.

    Returns:
        ``DMLossOutput``; ``out.loss`` carries the gradients of hidden, weight (summed in fp32) and bias.

    Raises:
        TypeError, ValueError: as ``dm_loss``; hidden, weight and bias that do not fit together.
    """
    hidden, weight, bias = cast("tuple[Tensor, Tensor, Tensor | None]", _autocast(hidden, weight, bias))
    batch = checks.make_linear_batch(hidden, weight, bias, tokens, mask, cu_seqlens, temperature, softcap, chunk_bytes)
    terms = checks.make_terms(
        batch, objective, on_policy=on_policy, max_weight=max_weight, context_id=context_id,
        log_proposal=log_proposal, log_target=log_target, log_z=log_z, reward=reward, log_base=log_base,
    )  # fmt: skip
    checks.check_call(batch, reduction, num_sequences, grad_scale)
    divide_by = denominator(batch, reduction, num_sequences)
    backend = kernels.select(batch.logits)
    if backend == "eager":
        logits = torch.nn.functional.linear(hidden, weight, bias)
        return eager.loss(batch._replace(logits=logits), terms, reduction, divide_by, return_entropy)
    if not isinstance(terms.objective, Objective):
        if backend == "cpu":
            checks.check_terms(terms)
        log_prob, scores = linear.run(hidden, weight, bias, batch, None, "none", 1.0, return_entropy, None, chunk_bytes)
        return native.loss_from_scores(batch, scores._replace(log_prob=log_prob), terms, reduction, divide_by)
    # the weight is formed inside a chunk, whether or not it depends on pi
    expected = expected_grad(True, hidden.dtype, reduction, grad_scale)
    loss, scores = linear.run(
        hidden, weight, bias, batch, terms, reduction, divide_by, return_entropy, expected, chunk_bytes
    )
    return _output(loss, scores, terms)


@_eagerly
def linear_sequence_log_prob(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """``sequence_log_prob`` of ``hidden @ weight.T + bias``, whose logits never exist at once; differentiable.

    Args:
        hidden, weight, bias, tokens, mask, temperature, softcap, cu_seqlens, chunk_bytes: as in ``linear_dm_loss``.

    Returns:
        (B,) fp64, nats. Its backward computes the logits again.

    Raises:
        TypeError, ValueError: as ``linear_dm_loss``.
    """
    hidden, weight, bias = cast("tuple[Tensor, Tensor, Tensor | None]", _autocast(hidden, weight, bias))
    batch = checks.make_linear_batch(hidden, weight, bias, tokens, mask, cu_seqlens, temperature, softcap, chunk_bytes)
    if kernels.select(batch.logits) == "eager":
        return eager.score(batch._replace(logits=torch.nn.functional.linear(hidden, weight, bias))).log_prob
    return linear.run(hidden, weight, bias, batch, None, "none", 1.0, False, None, chunk_bytes)[0]


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
    """Draws a token per row from ``softmax(cap(logits) / temperature)``, with its log-probability, in one read.

    A row's draw is a function of its logits, ``seed``, its row id and ``step``, and of nothing else: neither the thread
    count nor how rows are cut into batches matters. The uniform number is Philox4x32-10's, 53 bits.

    Args:
        logits: (N, V); float32, bfloat16, float16 (float64 through the eager backend); any row stride.
        seed: integer in [-2^63, 2^64).
        row_ids: (N,) integer, one per sequence that is being generated. Default: 0 to N-1.
        step: non-negative integer, the position that is being generated.
        temperature, softcap: as in ``dm_loss``.

    Returns:
        tokens (N,) int64, and log_prob (N,) fp64 in nats, what ``sequence_log_prob`` gives for them. A token whose
        logit is -inf is never drawn, unless a softcap makes it finite.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value; a row that holds NaN or +inf, or
            nothing but -inf.
    """
    draws = checks.make_draws(logits, seed, row_ids, step, temperature, softcap)
    if kernels.select(logits) == "eager":
        return eager.draw(draws)
    return compiled.sample(draws) if torch.compiler.is_compiling() else native.sample(draws)
