"""Checks in front of every backend. A kernel gets raw pointers, so what is wrong must be found here.

``make_batch`` and ``make_terms`` look at shapes, dtypes and devices only (torch.compile traces them);
``check_rows`` and ``check_terms`` look at the values and run where they are at hand, before anything relies on them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from numbers import Real
from typing import TypeGuard

import torch
from torch import Tensor

from ..objectives import INFINITE_AT_ZERO, OBJECTIVES, Objective, Terms, leave_one_out_baseline, plain_baseline
from .batch import Batch, Draws
from .fp64 import home

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IGNORE = -100


def describe(x: object) -> str:
    """An argument as error messages show it."""
    if isinstance(x, Tensor):
        return f"{x.dtype} {tuple(x.shape)} on {x.device}"
    return f"{type(x).__name__} {x!r}"


def is_integer(x: object) -> bool:
    """Whether x is a tensor of integers; bool is none."""
    return isinstance(x, Tensor) and not (x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool)


def _check_logits(logits: Tensor) -> None:
    if logits.shape[-1] == 0:
        raise ValueError(f"logits has an empty vocabulary: {describe(logits)}")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(
            f"the last dimension of logits must be contiguous, got strides {logits.stride()}; "
            "call .contiguous(), or keep the vocabulary as the last dimension"
        )


def _is_number(x: object) -> TypeGuard[float]:
    """Python's or NumPy's; a bool is none."""
    return isinstance(x, (float, int, Real)) and not isinstance(x, bool)


def _number(x: object) -> float:
    """NaN for what is none."""
    return float(x) if _is_number(x) else math.nan


def _check_scaling(temperature: float, softcap: float | None) -> None:
    # beyond, logits or their gradients leave fp32's range
    if not 1e-12 <= _number(temperature) <= 1e12:
        raise ValueError(f"temperature must be a positive number, from 1e-12 to 1e12, got {temperature!r}")
    # beyond, tanh of what is left of a logit cancels
    if softcap is not None and not 0 < _number(softcap) <= 1e8:
        raise ValueError(f"softcap must be a positive number or None, up to 1e8, which caps nothing; got {softcap!r}")


def make_batch(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> Batch:
    """Checks everything about the logits and their labels that shapes and dtypes tell.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, stride or device, temperature or softcap not positive.
    """
    if not isinstance(logits, Tensor) or logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"logits must be float32, bfloat16, float16 or float64, got {describe(logits)}")
    packed = cu_seqlens is not None
    if logits.dim() != (2 if packed else 3):
        raise ValueError(
            f"logits must be (B, T, V), or packed (N, V) with cu_seqlens; got {describe(logits)} "
            f"with{'' if packed else 'out'} cu_seqlens"
        )
    _check_logits(logits)
    shape = logits.shape[:-1]
    given = (("tokens", tokens),) if mask is None else (("tokens", tokens), ("mask", mask))
    for name, value in given:
        if not isinstance(value, Tensor) or value.dtype.is_floating_point or value.dtype.is_complex:
            raise TypeError(
                f"{name} must be an integer{' or bool' if name == 'mask' else ''} tensor, got {describe(value)}"
            )
        if value.shape != shape:
            raise ValueError(
                f"{name} must have the shape of logits without V, {tuple(shape)}, got {describe(value)}; "
                "logits[:, t] scores tokens[:, t]: use dmfast.shift_labels to align a model's input_ids"
            )
        if value.device != logits.device:
            raise ValueError(f"{name} is on {value.device}, logits on {logits.device}; move it there")
    if tokens.dtype == torch.bool:
        raise TypeError("tokens must be an integer tensor, got bool; did you swap tokens and mask?")
    _check_scaling(temperature, softcap)
    if packed:
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32 or int64, got {describe(cu_seqlens)}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"cu_seqlens must be (B+1,), got {describe(cu_seqlens)}")
        if cu_seqlens.device != logits.device:
            raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, logits on {logits.device}; move it there")
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
    labels = tokens if tokens.dtype is torch.int64 else tokens.to(torch.int64)
    if mask is not None:
        labels = torch.where(mask if mask.dtype == torch.bool else mask != 0, labels, IGNORE)
    return Batch(
        logits=logits,
        labels=labels.reshape(-1).contiguous(),
        cu_seqlens=cu_seqlens,
        n_sequences=cu_seqlens.shape[0] - 1 if cu_seqlens is not None else logits.shape[0],
        steps=0 if packed else logits.shape[1],
        scale=1.0 / float(temperature),
        softcap=float(softcap or 0.0),
    )


# those without a parameter of their own, made once; a dict that a call fills would have torch.compile compile again
_BY_NAME = {name: Objective(name) for name in OBJECTIVES if name not in ("reinforce_p", "kl_control")}


def make_objective(objective: str | Objective | Callable[[Terms], Tensor]) -> Objective | Callable[[Terms], Tensor]:
    """A name becomes an ``Objective``; a function of ``Terms`` stays one."""
    if isinstance(objective, str):
        return _BY_NAME[objective] if objective in _BY_NAME else Objective(objective)
    if isinstance(objective, Objective) or callable(objective):
        return objective
    raise TypeError(
        f"objective must be one of {', '.join(OBJECTIVES)}, a dmfast.Objective or a function of dmfast.Terms, "
        f"got {describe(objective)}"
    )


def make_linear_batch(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, mask: Tensor | None,
    cu_seqlens: Tensor | None, temperature: float, softcap: float | None, chunk_bytes: int | None,
) -> Batch:  # fmt: skip
    """``make_batch`` for hidden states and a head. The logits of the batch are a stand-in for those to come.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or device, a number out of range.
    """
    dims = 2 if cu_seqlens is not None else 3
    if not isinstance(hidden, Tensor) or hidden.dtype not in LOGIT_DTYPES:
        raise TypeError(f"hidden must be float32, bfloat16, float16 or float64, got {describe(hidden)}")
    if hidden.dim() != dims:
        raise ValueError(
            f"hidden must be (B, T, D), or packed (N, D) with cu_seqlens; got {describe(hidden)} "
            f"with{'' if dims == 2 else 'out'} cu_seqlens"
        )
    for name, x, shape in (("weight", weight, "(V, D)"), ("bias", bias, "(V,)")):
        if x is None and name == "bias":
            continue
        if not isinstance(x, Tensor) or x.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype of hidden, {hidden.dtype}, got {describe(x)}; convert one of them, or use "
                "torch.autocast"
            )
        if x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}, hidden on {hidden.device}; move it there")
        wrong = x.dim() != 2 or x.shape[1] != hidden.shape[-1] if name == "weight" else x.shape != weight.shape[:1]
        if wrong:
            raise ValueError(
                f"{name} must be {shape} with hidden's D = {hidden.shape[-1]}, got {describe(x)}; weight is what "
                "nn.Linear(D, V) holds"
            )
    if chunk_bytes is not None and (not isinstance(chunk_bytes, int) or chunk_bytes < 1):
        raise ValueError(f"chunk_bytes must be a positive integer, got {chunk_bytes!r}")
    v = weight.shape[0]
    logits = hidden.detach().new_empty(v).as_strided((*hidden.shape[:-1], v), (*[0] * (dims - 1), 1))
    return make_batch(logits, tokens, mask, cu_seqlens, temperature, softcap)


def _per_sequence(name: str, value: Tensor | float, device: torch.device, to: torch.device, n: int) -> Tensor:
    if isinstance(value, Tensor):
        dtype = value.dtype
        if not dtype.is_floating_point:
            raise TypeError(f"{name} must be a floating-point tensor, got {describe(value)}")
        if dtype not in (torch.float64, torch.float32) and name != "reward":
            raise TypeError(
                f"{name} must be float32 or float64, got {describe(value)}: in 16 bits a log-probability of -1,000 is "
                "off by up to 2 nats; compute it in float32"
            )
        given_on = value.device
        if given_on not in (device, to):
            raise ValueError(f"{name} is on {given_on}, logits on {device}; move it there")
        if value.shape != (n,) and not (name == "log_z" and value.dim() == 0):
            raise ValueError(f"{name} must have one value per sequence, ({n},), got {describe(value)}")
        if value.requires_grad:
            value = value.detach()
        if dtype is torch.float64:
            value = value.resolve_neg()  # itself, but for a view whose memory holds -value
        else:
            value = value.double() if to == device else value.to(to).double()
        return value.contiguous() if value.dim() else value.expand(n).contiguous()
    if name == "log_z" and _is_number(value):
        return torch.full((n,), value, dtype=torch.float64, device=to)
    raise TypeError(f"{name} must be a floating-point tensor, got {describe(value)}")


def make_terms(
    batch: Batch,
    objective: str | Objective | Callable[[Terms], Tensor],
    *,
    on_policy: bool,
    max_weight: float | None,
    context_id: Tensor | None,
    log_proposal: Tensor | None,
    log_target: Tensor | None,
    log_z: Tensor | float | None,
    reward: Tensor | None,
    log_base: Tensor | None,
) -> Terms:
    """The per-sequence inputs in fp64, with what the objective needs and the baseline of this call.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, or an input that the objective lacks.
    """
    objective = make_objective(objective)
    device, n = batch.logits.device, batch.n_sequences
    to = home(device)
    inputs = {
        "log_proposal": log_proposal, "log_target": log_target, "log_z": log_z, "reward": reward, "log_base": log_base,
    }  # fmt: skip
    given = {
        name: None if value is None else _per_sequence(name, value, device, to, n) for name, value in inputs.items()
    }
    if isinstance(objective, Objective):
        missing = [name for name in objective.needs if given[name] is None]
        if missing:
            raise ValueError(f"objective {objective.name!r} needs {' and '.join(missing)}")
        if given["log_proposal"] is None and not on_policy:
            raise ValueError(
                f"objective {objective.name!r} needs log_proposal, the log-probability of each sequence under what it "
                "was sampled from; or on_policy=True where that is the policy itself"
            )
    if on_policy is not True and on_policy is not False:
        raise TypeError(f"on_policy must be True or False, got {on_policy!r}")
    if max_weight is not None and not _number(max_weight) > 0:
        raise ValueError(f"max_weight must be a positive number or None, got {max_weight!r}")
    if context_id is not None and (
        not isinstance(context_id, Tensor) or context_id.dtype.is_floating_point or context_id.shape != (n,)
    ):
        raise ValueError(f"context_id must be an integer tensor ({n},), got {describe(context_id)}")
    bound = math.inf if max_weight is None else float(max_weight)
    baseline = plain_baseline(objective, n, to)
    if isinstance(baseline, Tensor) and baseline.shape != (n,):
        raise ValueError(f"a baseline tensor must be ({n},), got {describe(baseline)}")
    if isinstance(baseline, str):
        terms = Terms(objective, on_policy, bound, **given)
        context_id = None if context_id is None else context_id.to(to)
        baseline = leave_one_out_baseline(terms, context_id, n, to)
    return Terms(objective, on_policy, bound, **given, baseline=baseline)


def check_call(
    batch: Batch,
    reduction: str = "mean",
    num_sequences: float | None = None,
    grad_scale: float | None = None,
    inplace: bool = False,
) -> None:
    """The options of a call.

    Raises:
        ValueError: an unknown reduction, a number out of range, in place on a tensor that can't be overwritten.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    # beyond 1e30 a gradient leaves fp32's range
    for name, value in (("num_sequences", num_sequences), ("grad_scale", grad_scale)):
        if value is not None and not 1e-30 <= _number(value) <= 1e30:
            raise ValueError(f"{name} must be a positive number, from 1e-30 to 1e30, or None; got {value!r}")
    if num_sequences is not None and reduction != "mean":
        raise ValueError(f"num_sequences is what reduction='mean' divides by; got reduction={reduction!r}")
    if inplace and torch.is_grad_enabled() and batch.logits.requires_grad:
        logits = batch.logits
        if logits.is_leaf:
            raise ValueError(
                "inplace=True overwrites logits with their gradient, but logits is a leaf, whose values you still "
                "need; pass what a model returned, or inplace=False"
            )
        base = logits._base
        if base is not None and base.is_leaf and base.requires_grad:
            raise ValueError(
                "inplace=True overwrites logits with their gradient, but logits is a view of a leaf, whose values you "
                "still need; pass what a model returned, or inplace=False"
            )
        # rows may lie in any order but must not share memory: (B,T,V) or its transpose, with gaps
        dims = [(d, s) for d, s in zip(logits.shape, logits.stride(), strict=True) if d > 1]
        reach = 1
        for size, stride in sorted(dims, key=lambda x: x[1]):
            if stride < reach:
                raise ValueError(
                    f"inplace=True needs logits whose elements do not share memory, got strides {logits.stride()} for "
                    f"shape {tuple(logits.shape)} (an expanded tensor?); pass inplace=False or logits.contiguous()"
                )
            reach = stride * (size - 1) + reach


def check_weight_tensor(weight: object, batch: Batch) -> None:
    """What a user's own objective returned.

    Raises:
        TypeError, ValueError: not an fp64 (B,) tensor.
    """
    if not isinstance(weight, Tensor) or weight.dtype != torch.float64 or weight.shape != (batch.n_sequences,):
        raise ValueError(f"an objective must return float64 weights ({batch.n_sequences},), got {describe(weight)}")


def make_draws(
    logits: Tensor, seed: int, row_ids: Tensor | None, step: int, temperature: float, softcap: float | None
) -> Draws:
    """Checks everything about rows to sample from that shapes and dtypes tell.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, stride or device, a number out of range.
    """
    if not isinstance(logits, Tensor) or logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"logits must be float32, bfloat16, float16 or float64, got {describe(logits)}")
    if logits.dim() != 2:
        raise ValueError(f"logits must be (N, V), one row for each token to draw, got {describe(logits)}")
    _check_logits(logits)
    _check_scaling(temperature, softcap)
    for name, value, low, high in (("seed", seed, -(2**63), 2**64), ("step", step, 0, 2**63)):
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value < high:
            raise ValueError(f"{name} must be an integer in [{low}, {high}), got {value!r}")
    if row_ids is not None:
        if not is_integer(row_ids) or row_ids.shape != logits.shape[:1]:
            raise ValueError(f"row_ids must be an integer tensor ({logits.shape[0]},), got {describe(row_ids)}")
        if row_ids.device != logits.device:
            raise ValueError(f"row_ids is on {row_ids.device}, logits on {logits.device}; move it there")
        row_ids = row_ids.to(torch.int64).contiguous()
    return Draws(logits.detach(), seed % 2**64, row_ids, step, 1.0 / float(temperature), float(softcap or 0.0))


def check_draws(draws: Draws) -> Draws:
    """The logits, by value. Returns the draws.

    Raises:
        ValueError: a row that is no distribution.
    """
    z = draws.logits
    bad = ~(z < math.inf).all(-1) | (z == -math.inf).all(-1)
    if bool(bad.any()):
        raise_bad_draw(draws, _first(bad))
    return draws


def raise_bad_draw(draws: Draws, row: int) -> None:
    """Raises:
    ValueError: a row that is no distribution.
    """
    which = "" if draws.row_ids is None else f" (row id {int(draws.row_ids[row])})"
    raise ValueError(
        f"logits hold NaN or +inf, or nothing but -inf, in row {row}{which}: no token can be drawn; the model has "
        "diverged or its input is masked wrongly"
    )


def _first(bad: Tensor) -> int:
    return int(bad.nonzero()[0])


def place(batch: Batch, row: int) -> str:
    """Where a row of logits lies, as (sequence, position)."""
    if batch.part_of is not None:
        return place(batch.part_of.whole, int(batch.part_of.rows[row]))
    if batch.cu_seqlens is None:
        return f"(sequence {row // batch.steps}, position {row % batch.steps})"
    starts = batch.cu_seqlens.tolist()
    sequence = max(i for i in range(batch.n_sequences) if starts[i] <= row)
    return f"(sequence {sequence}, position {row - starts[sequence]}; packed row {row})"


_PLAIN = (Tensor, torch.nn.Parameter)


def check_memory(logits: Tensor) -> None:
    """Of a FakeTensor or a DTensor the address is 0.

    Raises:
        TypeError: logits are one.
    """
    if type(logits) in _PLAIN:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a FakeTensor's address is "deprecated"
        if logits.numel() and not logits.data_ptr():
            raise TypeError(
                f"logits are a {type(logits).__name__} and have no memory that a kernel could read: pass a local "
                "tensor (a DTensor's full_tensor()), trace with torch.compile or torch.export, or take "
                "dmfast.use_backend('eager')"
            )


def check_cu_seqlens(batch: Batch) -> None:
    """Where sequences start, by value.

    Raises:
        ValueError: they are out of order.
    """
    if batch.cu_seqlens is None:
        return
    starts, n = batch.cu_seqlens.cpu(), batch.n_rows
    if int(starts[0]) != 0 or int(starts[-1]) != n or bool((starts.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens must rise from 0 to N = {n}, the number of packed rows; got {starts[:8].tolist()}"
            f"{'...' if starts.shape[0] > 8 else ''} ending at {int(starts[-1])}"
        )


def check_rows(batch: Batch) -> None:
    """Token ids and cu_seqlens, by value.

    Raises:
        ValueError: with the first place.
    """
    check_cu_seqlens(batch)
    if batch.n_rows == 0:
        return
    low, high = torch.aminmax(batch.labels)
    if int(low) >= 0 and int(high) < batch.vocab:
        return
    bad = ((batch.labels < 0) & (batch.labels != IGNORE)) | (batch.labels >= batch.vocab)
    if bool(bad.any()):
        row = _first(bad)
        raise ValueError(
            f"tokens holds {int(batch.labels[row])} at {place(batch, row)}; a token id must be in "
            f"[0, {batch.vocab}), or {IGNORE} for a position that is not scored"
        )


def check_logits(batch: Batch) -> Batch:
    """``check_rows``, and the logits of scored rows by value: for backends whose kernels don't look. Returns the batch.

    Raises:
        ValueError: as ``check_rows``; NaN or +inf, with the first place.
    """
    check_rows(batch)
    rows = batch.logits.detach().reshape(batch.n_rows, batch.vocab)
    bad = ~(rows < math.inf).all(-1) & (batch.labels != IGNORE)
    if bool(bad.any()):
        raise_bad_row(batch, _first(bad))
    return batch


def check_labels(token_log_prob: Tensor, batch: Batch) -> Tensor:
    """The log-probability of every label, (rows,) and 0 where none is scored. Returns it.

    Raises:
        ValueError: -inf, or NaN, which a row of nothing but -inf gives; with the first place.
    """
    never = ~(token_log_prob.detach() > -math.inf)
    if bool(never.any()):
        raise_bad_label(batch, _first(never))
    return token_log_prob


def _check_values(name: str, value: Tensor | None, minus_infinity: str | None, first_sequence: int) -> None:
    """minus_infinity: None where it is allowed, else what to do about it."""
    if value is None or value.shape[0] == 0:
        return
    if math.isfinite(float(value.sum())):
        return
    bad = ~(value < math.inf) if minus_infinity is None else ~value.isfinite()
    if bool(bad.any()):
        i = _first(bad)
        hint = "" if minus_infinity is None or float(value[i]) != -math.inf else f"; {minus_infinity}"
        raise ValueError(f"{name} holds {float(value[i])} at sequence {first_sequence + i}{hint}")


def _check_left_out(baseline: Tensor, first_sequence: int) -> None:
    bad = ~baseline.isfinite()
    if bool(bad.any()):
        raise ValueError(
            f"the baseline of sequence {first_sequence + _first(bad)}, which leaves it out, is "
            f"{float(baseline[_first(bad)])}: the return of another sequence is infinite, whose log_target is -inf or "
            "far above its log_proposal; drop that one, or take a constant baseline"
        )


def check_terms(terms: Terms, first_sequence: int = 0) -> None:
    """The per-sequence inputs of sequences from ``first_sequence`` on, by value.

    Raises:
        ValueError: NaN or +inf, or a -inf that the objective has no finite weight for.
    """
    first = first_sequence
    impossible = "a sequence that q can't draw can't have been drawn from it"
    _check_values("log_proposal", terms.log_proposal, impossible, first)
    _check_values("log_target", terms.log_target, None, first)
    _check_values("log_z", terms.log_z, None, first)
    _check_values("reward", terms.reward, "a reward must be finite", first)
    _check_values("log_base", terms.log_base, "the base gives this sequence probability 0; set max_weight or drop it"
                  if terms.max_weight == math.inf else None, first)  # fmt: skip
    objective = terms.objective
    if isinstance(terms.baseline, Tensor):
        if isinstance(objective, Objective) and isinstance(objective.baseline, str):
            _check_left_out(terms.baseline, first)
        else:
            _check_values("baseline", terms.baseline, "a baseline must be finite", first)
    if (
        isinstance(objective, Objective)
        and objective.name in INFINITE_AT_ZERO
        and terms.max_weight == math.inf
        and terms.log_target is not None
        and bool((terms.log_target == -math.inf).any())
    ):
        allowed = ", ".join(name for name in OBJECTIVES if name not in INFINITE_AT_ZERO)
        raise ValueError(
            f"objective {objective.name!r} is infinite where P(x) = 0, which is so for sequence "
            f"{first + _first(terms.log_target == -math.inf)} (log_target = -inf); set max_weight, or use one of "
            f"{allowed}"
        )


def check_weights(weight: Tensor, first_sequence: int = 0) -> Tensor:
    """Returns the weights, of sequences from ``first_sequence`` on.

    Raises:
        ValueError: a weight beyond fp32's range, or NaN.
    """
    bad = ~(weight.abs() <= torch.finfo(torch.float32).max)
    if bool(bad.any()):
        raise_weight(_first(bad), weight, first_sequence)
    return weight


def raise_weight(i: int, weight: Tensor, first_sequence: int = 0) -> None:
    """Raises:
    ValueError: says which sequence has a weight that no fp32 holds.
    """
    a = float(weight[i])
    if math.isnan(a):
        raise ValueError(f"the weight A of sequence {first_sequence + i} is NaN: the objective has no value there")
    raise ValueError(
        f"the weight A of sequence {first_sequence + i} is {a}, beyond fp32's range: its ratio to the "
        "proposal is out of hand. Check log_proposal and log_z for this sequence, or bound weights with max_weight"
    )


def raise_bad_row(batch: Batch, row: int) -> None:
    """Raises:
    ValueError: NaN or +inf among the logits of a scored row.
    """
    raise ValueError(
        f"logits hold NaN or +inf at {place(batch, row)}, a scored position; the model has diverged or its input is "
        "masked wrongly"
    )


def raise_bad_label(batch: Batch, row: int) -> None:
    """Raises:
    ValueError: the label's own logit is -inf.
    """
    raise ValueError(
        f"the logit of token {int(batch.labels[row])} at {place(batch, row)} is -inf: the policy gives the sequence "
        "probability 0. Mask the position, or don't mask this token's logit"
    )
