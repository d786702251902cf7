"""Provide the fused losses, as functions of logits or hidden states that any training loop can call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from . import parallel
from .kernels import autograd, checks, faults, linear, ops, products, select
from .kernels.autograd import Options, expected_grad, options_of
from .kernels.backend import Backend
from .kernels.batch import IGNORE, Batch, Scores
from .kernels.result import DMLossOutput
from .kernels.shards import Shards
from .objectives import Objective, Terms

__all__ = [
    "DMLossOutput",
    "dm_loss",
    "linear_dm_loss",
    "linear_sequence_log_prob",
    "sample_tokens",
    "sequence_log_prob",
    "shift_labels",
]

_T = TypeVar("_T")


def shift_labels(input_ids: Tensor, mask: Tensor | None = None, prompt_len: int = 0) -> Tensor:
    """Return labels for a causal model's logits.

    ``labels[:, t]`` is ``input_ids[:, t + 1]`` if that token is scored, and -100 otherwise. The tokens are shifted and
    not the logits, because slicing logits makes autograd copy all of them.

    Args:
        input_ids: (B, T) integer, prompt and continuation.
        mask: (B, T) bool or integer, True on the tokens whose log-probability counts. With None all count.
        prompt_len: the first ``prompt_len`` tokens are never scored.

    Returns:
        (B, T) int64. The last position predicts nothing and is -100.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype or shape, or ``prompt_len`` is out of range.
    """
    if not checks.is_integer(input_ids) or input_ids.dim() != 2:
        raise TypeError(f"input_ids must be an integer tensor (B, T), got {checks.describe(input_ids)}")
    if mask is not None and (mask.shape != input_ids.shape or mask.dtype.is_floating_point):
        raise ValueError(f"mask must be bool or integer of shape {tuple(input_ids.shape)}, got {checks.describe(mask)}")
    if not 0 <= prompt_len <= input_ids.shape[1]:
        raise ValueError(f"prompt_len must be in [0, {input_ids.shape[1]}], got {prompt_len}")
    labels = torch.full(input_ids.shape, IGNORE, dtype=torch.int64, device=input_ids.device)
    labels[:, :-1] = input_ids[:, 1:]
    if mask is not None:
        labels[:, :-1].masked_fill_(mask[:, 1:] == 0, IGNORE)
    if prompt_len > 1:
        labels[:, : prompt_len - 1] = IGNORE
    return labels


def _backend_for(logits: Tensor, name: str | None, **inputs: Tensor | None) -> Backend:
    """Return the backend of a call, and check that its kernels can read the memory of the inputs.

    Args:
        logits: the logits, or a stand-in for those that will be made of the inputs.
        name: the backend that was asked for.
        inputs: hidden states and head by name, where logits are a stand-in.
    """
    compiling = torch.compiler.is_compiling()
    if name is None and logits.is_meta and not compiling:
        raise TypeError(f"{next(iter(inputs), 'logits')} is on the device meta, where it has no values")
    backend = select(logits, name)
    if compiling:
        return backend
    if backend.in_torch:
        faults.check_vmap()
    else:
        faults.check_memory(**(inputs or {"logits": logits}))
    return backend


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
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_sequences: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    grad_scale: float | None = None,
    max_weight: float | None = None,
    entropy_coefficient: float = 0.0,
    inplace: bool = False,
    return_entropy: bool = False,
    backend: str | None = None,
) -> DMLossOutput:
    """Return the fused loss ``-(1/B) sum_i A_i log pi(x_i)``, in which A is a constant (arXiv:2206.00761, sec. 2-3).

    The sequences x are drawn from a proposal q, and
    ``log pi(x) = sum_t mask_t log softmax(cap(z_t) / temperature)[x_t]``.
    With an ``entropy_coefficient`` c the loss is ``-(1/B) sum_i (A_i log pi(x_i) + c H(x_i))``, where
    ``H(x) = sum_t mask_t H(softmax(cap(z_t) / temperature))`` has a gradient.
    With a ``token_weight`` w the loss is ``-(1/B) sum_i A_i sum_t w_it mask_it log pi(x_it)``. This does not change A,
    because log pi(x) and the ratios of which A is made stay plain sums.

    Args:
        logits: (B, T, V), or packed (N, V) with ``cu_seqlens``; float32, bfloat16, float16 (float64 through the eager
            backend); any strides with the last dimension contiguous. ``logits[:, t]`` scores ``tokens[:, t]``. Use
            ``shift_labels`` to align a causal model's input_ids.
        tokens: (B, T) or (N,) integer; -100 = not scored.
        mask: the shape of ``tokens``, bool or integer; False = not scored. Such rows are never read and get gradient 0.
        log_target: (B,) float32 or float64, log P(x) in nats; -inf where P = 0.
        log_proposal: (B,) float32 or float64, log q(x) in nats, under the temperature at which x was sampled. With
            ``on_policy`` it is the sampler's stored log pi and optional. If it is given, the weight is known before
            the forward, and one pass computes everything.
        log_z: float, 0-d or (B,), log Z, one per sequence if contexts differ; -inf for a context whose P are all 0.
            Under torch.compile pass a running log Z as a tensor, since torch compiles again for every value of a float.
        objective: a name of ``objectives.OBJECTIVES`` or ``methods.METHODS``, an ``Objective``, or a function of
            ``Terms`` that returns A, (B,) fp64.
        on_policy: whether x was drawn from the policy itself. Then rho is exactly 1.
        reward: (B,) R(x), for ``reinforce`` and ``kl_control``. It may have any dtype, such as bool for right or wrong.
        log_base: (B,) log a(x) in nats, for ``kl_control``.
        temperature, softcap: those of the policy. Logits become softcap * tanh(logits / softcap) and are then divided
            by the temperature.
        cu_seqlens: (B+1,) int32 or int64, the starts of packed sequences, from 0 to N.
        context_id: (B,) integer, the prompt of each sequence. The baseline ``leave_one_out_context`` uses it, and
            objectives that are functions may (``Terms.context_id``). What is compared within a prompt is compared
            within this call, so that a call needs all sequences of each of its prompts; a ``Matcher`` sees to that.
        token_weight: the shape of ``tokens``, floating-point. It multiplies each token's share of the gradient, so that
            a token's logits get A_i w_it instead of A_i. Any sign is allowed. A weight of 0 removes a token from the
            gradient but not from log pi; ``mask`` removes it from both. No gradient flows through the weights, they
            don't affect the bonus of ``entropy_coefficient``, and their values at positions that are not scored don't
            matter. Weights that depend on the policy's own log pi of each token (off-policy GRPO, DAPO, CISPO) need an
            earlier call that scores. It costs one more read of the logits, or in ``linear_dm_loss`` one more product
            with the head.
        reduction: ``mean`` over sequences, ``sum``, or ``none``, which gives a (B,) loss.
        num_sequences: the divisor of ``mean``: the number of sequences of the whole optimiser step, if this call is one
            microbatch of it. A number, or a 0-d tensor, for whose values torch.compile does not compile again. The
            default is B.
        num_tokens: the number of scored tokens of the whole optimiser step, for an objective that is a function
            (``Terms.n_tokens``). The default is the number in this call.
        grad_scale: the grad_output that backward will bring (a GradScaler's scale, 1 / accumulation steps), if known.
            A gradient that forward writes is multiplied by it before it is rounded, and float16 logits take the
            one-pass form only with it. If another grad_output comes, the result is the same, with one exception: in
            place and in the linear losses, a float16 gradient that overflowed with the announced value stays infinite.
        max_weight: the bound of A, which is clipped to [-max_weight, max_weight].
        entropy_coefficient: c, in loss per nat of a sequence's summed entropy. Every sequence has the bonus, even one
            whose A is 0, and the bonus is not weighted by rho. Its gradient is exact and costs no further read of the
            logits. A negative c makes it a penalty.
        inplace: whether the gradient overwrites the logits. This saves a tensor of their size. The logits are then
            undefined after the call, even after an error in a row. Ignored where no gradient is wanted.
        return_entropy: whether ``out.entropy`` is wanted, the policy's entropy summed over scored tokens, in nats. An
            ``entropy_coefficient`` implies it.
        backend: a name of ``backends()``. The default is the backend for these logits, or the one that ``use_backend``
            forces.

    Returns:
        ``DMLossOutput``; ``out.loss`` carries the gradient of the logits. Per-sequence values are fp64.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or value, an input that the objective
            needs is missing, a scored row holds NaN or +inf, the logit of a label is -inf, or a weight is beyond fp32's
            range.

    Examples:
        Two sequences of two tokens were drawn from q = pi, which is uniform over five tokens. The target has the first
        twice as often as pi, and the second never:

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
    batch = checks.make_batch(logits, tokens, mask, cu_seqlens, temperature, softcap, token_weight=token_weight)
    terms = checks.make_terms(
        batch, objective, on_policy=on_policy, max_weight=max_weight, context_id=context_id,
        log_proposal=log_proposal, log_target=log_target, log_z=log_z, reward=reward, log_base=log_base,
        entropy_coefficient=entropy_coefficient, num_sequences=num_sequences, num_tokens=num_tokens,
    )  # fmt: skip
    return_entropy = return_entropy or terms.entropy_coefficient != 0.0
    checks.check_call(batch, reduction, num_sequences, grad_scale, inplace)
    wants_grad = logits.requires_grad and torch.is_grad_enabled()
    options, divisor = options_of(batch, reduction, num_sequences, return_entropy, inplace and wants_grad)
    if wants_grad and divisor is None and terms.weight_known:
        options = options._replace(expected=expected_grad(True, logits.dtype, reduction, grad_scale))
    chosen = _backend_for(logits, backend)
    run = ops if torch.compiler.is_compiling() and not chosen.in_torch else autograd
    loss, scores = run.loss(chosen, batch, terms, options, wants_grad)
    return _output(loss if divisor is None else loss / divisor, scores, terms, tokens, return_entropy)


def _output(loss: Tensor, scores: Scores, terms: Terms, tokens: Tensor, entropy: bool) -> DMLossOutput:
    return DMLossOutput(loss, scores, terms, tuple(tokens.shape), None, entropy)


def sequence_log_prob(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Return log pi(x) of each sequence, differentiable.

    ``log pi(x) = sum_t mask_t log softmax(cap(z_t) / temperature)[x_t]``.

    Args:
        logits, tokens, mask, temperature, softcap, cu_seqlens, inplace, backend: as in ``dm_loss``.

    Returns:
        (B,) fp64, nats.

    Raises:
        TypeError, ValueError: as ``dm_loss``.
    """
    batch = checks.make_batch(logits, tokens, mask, cu_seqlens, temperature, softcap)
    checks.check_call(batch, inplace=inplace)
    wants_grad = torch.is_grad_enabled() and logits.requires_grad
    chosen = _backend_for(logits, backend)
    run = ops if torch.compiler.is_compiling() and not chosen.in_torch else autograd
    found: autograd.LogProb = run.log_prob(chosen, batch, False, inplace and wants_grad, wants_grad)
    return found[0]


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return hidden states and head in the dtype in which nn.Linear would multiply them here."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if device == "meta":  # torch knows no autocast there, and a fake tensor's device is the one that it stands for
        return tensors
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype.is_floating_point else x for x in tensors)


def plain_logits(hidden: Tensor, head: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return all logits, differentiable, by a product in ``dtype`` whatever autocast says."""
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.nn.functional.linear(hidden.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype))


@torch.no_grad()
def linear_logits(hidden: Tensor, head: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the (N, V) logits that the linear losses make of hidden states, without gradient.

    16-bit hidden states give fp32 logits.

    Args:
        hidden: (N, D).
        head, bias: (V, D) and (V,), in the dtype of hidden.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.new_empty(hidden.shape[0], head.shape[0], dtype=dtype)
    way = products.ways(hidden.device, hidden.dtype, dtype).logits
    with torch.autocast(hidden.device.type, enabled=False), products.ieee(hidden.device):
        products.multiply(way, hidden, head, bias, logits)
    return logits


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
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_sequences: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    grad_scale: float | None = None,
    max_weight: float | None = None,
    entropy_coefficient: float = 0.0,
    return_entropy: bool = False,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | str = "float32",
    group: Any = None,
    vocab_start: int | None = None,
    backend: str | None = None,
) -> DMLossOutput:
    """Return ``dm_loss`` of ``hidden @ weight.T + bias`` without holding all logits at once.

    Whole sequences go through one buffer of logits. Rows that are not scored cost no product. If grad_output is known
    before backward (1, or ``grad_scale``), forward computes all gradients with three products. Otherwise
    (``reduction="none"``, float16 without ``grad_scale``) backward computes the logits again. Forward itself computes
    logits again if sequences that belong together do not fit the buffer (``chunk_bytes``). These are a single sequence;
    for an objective with ``whole_contexts`` the sequences of a prompt; and for a function that has neither that nor
    ``per_sequence`` all sequences. Under torch.compile backward computes the logits again for every function.
    The backend ``eager`` forms all logits. Under torch.compile the call is one op of the graph. Under autocast the
    products run in its dtype, as nn.Linear's do.

    Args:
        hidden: (B, T, D), or packed (N, D) with ``cu_seqlens``; float32, bfloat16, float16 (float64 through the eager
            backend). ``hidden[:, t]`` scores ``tokens[:, t]``. Use ``shift_labels`` to align input_ids.
        weight: (V, D) in hidden's dtype, as nn.Linear holds it. If it needs no gradient, it costs no product for one.
        bias: (V,) in hidden's dtype.
        chunk_bytes: the size of the buffer of logits. A sequence that does not fit goes through it twice. The default
            is 128 MiB. On a GPU it is up to 1 GiB or 4,096 rows, because each buffer costs one addition to weight's
            gradient, or 1,024 rows if weight needs no gradient.
        logits_dtype: with ``"float32"``, 16-bit hidden states give fp32 logits, whose products are summed in fp32 and
            never rounded to 16 bits, which would put log pi off by .1 nats and more. With ``"same"``, the logits have
            the dtype of hidden, as nn.Linear's do, which is faster. fp32 products are formed in fp32 and not in TF32 or
            bf16, whatever torch is set to; with ``"same"`` torch's setting holds. The sampler and the scorer of a
            sequence need the same value.
        group: the process group (or DeviceMesh of one dimension) among whose ranks the vocabulary is cut. ``weight``
            and ``bias`` are this rank's rows, and everything else is the same on all ranks, which is checked. A weight
            that is a DTensor with ``Shard(0)`` needs no ``group``. No rank ever holds V columns. Each chunk
            costs one exchange of 16 bytes per row (24 with the entropy), and each call costs one sum for hidden's
            gradient. An A that is known before the forward takes two passes too. A, loss and hidden's gradient are the
            same on all ranks.
        vocab_start: with ``group``, the first token of this rank's rows. By default the ranks' rows follow one another
            in the order of the ranks. The ranks need not have the same number of rows.
        tokens, mask and all else: as in ``dm_loss``.

    Returns:
        ``DMLossOutput``; ``out.loss`` carries the gradients of hidden, weight (summed in fp32) and bias.

    Raises:
        TypeError, ValueError: as ``dm_loss``; hidden, weight and bias do not fit together; with ``group``, the ranks
            were given different arguments, or their rows do not make up the vocabulary.
        RuntimeError: another rank of ``group`` has failed, or ``group`` is used under torch.compile.
    """
    head, bias, group = parallel.local_head(weight, bias, group, vocab_start)
    hidden, head, bias = cast("tuple[Tensor, Tensor, Tensor | None]", _autocast(hidden, head, bias))

    def check() -> tuple[tuple[Batch, Terms, Options, Tensor | None], dict[str, object]]:
        batch = checks.make_linear_batch(hidden, head, bias, tokens, mask, cu_seqlens, temperature, softcap,
                                         chunk_bytes, logits_dtype, token_weight)  # fmt: skip
        terms = checks.make_terms(
            batch, objective, on_policy=on_policy, max_weight=max_weight, context_id=context_id,
            log_proposal=log_proposal, log_target=log_target, log_z=log_z, reward=reward, log_base=log_base,
            entropy_coefficient=entropy_coefficient, num_sequences=num_sequences, num_tokens=num_tokens, what="hidden",
        )  # fmt: skip
        checks.check_call(batch, reduction, num_sequences, grad_scale)
        wants_entropy = return_entropy or terms.entropy_coefficient != 0.0
        options, divisor = options_of(batch, reduction, num_sequences, wants_entropy, inplace=False)
        if divisor is None:
            # a chunk forms the weight itself, so one pass is possible whether or not the weight depends on pi
            options = options._replace(expected=expected_grad(True, hidden.dtype, reduction, grad_scale))
        if group is None:
            return (batch, terms, options, divisor), {}
        same = _same(batch, hidden, head, bias, chunk_bytes)
        return (batch, terms, options, divisor), same | {
            "log_target, log_proposal, log_z, reward, log_base or baseline": terms.block,
            "objective and options": (
                repr(terms.objective) if isinstance(terms.objective, Objective) else "a function", terms.on_policy,
                terms.max_weight, terms.entropy_coefficient, terms.constants, terms.present, options, divisor is None,
            ),
            **({} if terms.group is None else terms.group.told()),
        }  # fmt: skip

    (batch, terms, options, divisor), shards = _on_all_ranks(check, group, vocab_start, head)
    batch = _of_whole(batch, shards)
    chosen = _backend_for(batch.logits, backend, hidden=hidden, weight=head, bias=bias)
    if chosen.in_torch and shards is None:
        batch = batch._replace(logits=plain_logits(hidden, head, bias, batch.logits.dtype))
        loss, scores = autograd.loss(chosen, batch, terms, options, True)
    elif torch.compiler.is_compiling():
        loss, scores = ops.linear_loss(chosen, hidden, head, bias, batch, terms, options, chunk_bytes)
    else:
        loss, scores = linear.loss(chosen, hidden, head, bias, batch, terms, options, chunk_bytes, shards)
    return _output(loss if divisor is None else loss / divisor, scores, terms, tokens, options.entropy)


def _same(
    batch: Batch, hidden: Tensor, head: Tensor, bias: Tensor | None, chunk_bytes: int | None
) -> dict[str, object]:
    """Return by name the arguments that all ranks of a vocabulary must share, without the per-sequence inputs."""
    grads = torch.is_grad_enabled(), *(x is not None and x.requires_grad for x in (hidden, head, bias))
    starts = batch.labels[:0] if batch.cu_seqlens is None else batch.cu_seqlens
    return {
        "tokens or mask": batch.labels,
        "token_weight": batch.labels[:0] if batch.token_weight is None else batch.token_weight,
        "cu_seqlens": starts,
        "shape or dtype of hidden": (tuple(hidden.shape), hidden.dtype, batch.logits.dtype),
        "temperature or softcap": (batch.scale, batch.softcap),
        "chunk_bytes": chunk_bytes,
        "bias, or wish for gradients": (bias is None, grads),
    }


def _on_all_ranks(
    check: Callable[[], tuple[_T, dict[str, object]]], group: Any, vocab_start: int | None, head: Tensor
) -> tuple[_T, Shards | None]:
    """Return the result of ``check``, and the shards if the vocabulary is cut among ranks."""
    if group is None:
        return check()[0], None
    if torch.compiler.is_compiling():
        raise RuntimeError("a vocabulary that is cut among ranks is not compiled: call the loss outside torch.compile")
    made, shards = parallel.together(group, vocab_start, head, check)
    return made, shards


def _of_whole(batch: Batch, shards: Shards | None) -> Batch:
    """Return the batch, marked as this rank's columns if the vocabulary is cut among ranks."""
    if shards is None:
        return batch
    return batch._replace(vocab_start=shards.start, whole_vocab=shards.vocab)


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
    logits_dtype: torch.dtype | str = "float32",
    group: Any = None,
    vocab_start: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``sequence_log_prob`` of ``hidden @ weight.T + bias``, differentiable, without holding all logits at once.

    Args:
        hidden, weight, bias, tokens, mask, temperature, softcap, cu_seqlens: as in ``linear_dm_loss``.
        chunk_bytes, logits_dtype, group, vocab_start, backend: as in ``linear_dm_loss``.

    Returns:
        (B,) fp64, nats. Its backward computes the logits again.

    Raises:
        TypeError, ValueError: as ``linear_dm_loss``.
    """
    head, bias, group = parallel.local_head(weight, bias, group, vocab_start)
    hidden, head, bias = cast("tuple[Tensor, Tensor, Tensor | None]", _autocast(hidden, head, bias))

    def check() -> tuple[Batch, dict[str, object]]:
        batch = checks.make_linear_batch(hidden, head, bias, tokens, mask, cu_seqlens, temperature, softcap,
                                         chunk_bytes, logits_dtype)  # fmt: skip
        return batch, _same(batch, hidden, head, bias, chunk_bytes)

    batch, shards = _on_all_ranks(check, group, vocab_start, head)
    batch = _of_whole(batch, shards)
    chosen = _backend_for(batch.logits, backend, hidden=hidden, weight=head, bias=bias)
    if chosen.in_torch and shards is None:
        batch = batch._replace(logits=plain_logits(hidden, head, bias, batch.logits.dtype))
        return autograd.log_prob(chosen, batch, False, False, True)[0]
    if torch.compiler.is_compiling():
        return ops.linear_log_prob(chosen, hidden, head, bias, batch, False, chunk_bytes)[0]
    return linear.log_prob(chosen, hidden, head, bias, batch, False, chunk_bytes, shards)[0]


def sample_tokens(
    logits: Tensor,
    *,
    seed: int,
    row_ids: Tensor | None = None,
    step: int = 0,
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a token per row from ``softmax(cap(logits) / temperature)``, with its log-probability, in one read.

    A row's draw depends only on its logits, ``seed``, its row id and ``step``. It depends neither on the number of
    threads nor on how rows are cut into batches. The uniform number has 53 bits and comes from Philox4x32-10.

    Args:
        logits: (N, V); float32, bfloat16, float16 (float64 through the eager backend); any row stride.
        seed: integer in [-2^63, 2^64).
        row_ids: (N,) integer, one for each sequence that is being generated. The default is 0 to N-1.
        step: non-negative integer, the position that is being generated.
        temperature, softcap, backend: as in ``dm_loss``.

    Returns:
        tokens (N,) int64, and log_prob (N,) fp64 in nats, which equals ``sequence_log_prob`` of the tokens. A token
        whose logit is -inf is never drawn, unless a softcap makes it finite.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or value, or a row holds NaN or +inf, or
            only -inf.
    """
    rows = checks.make_sample_rows(logits, seed, row_ids, step, temperature, softcap)
    chosen = _backend_for(logits, backend)
    if torch.compiler.is_compiling() and not chosen.in_torch:
        return ops.draw(rows, chosen)
    tokens, log_prob, status = chosen.sample(rows)
    if status is not None and faults.at_once() and int(status) >= 0:
        faults.raise_bad_draw(rows, int(status))
    return tokens, log_prob
