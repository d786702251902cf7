"""Find bad values in tensors and raise errors for them.

``checks.py`` checks shapes, dtypes and devices; this module checks what tensors hold. ``check_*`` look at values and
raise. ``raise_*`` raise for a place that a kernel has found. ``DeviceFaults`` raises what a device has recorded, at the
time when the host reads it.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import objectives
from ..objectives import Objective, Terms
from .batch import IGNORE, MAX_TOKEN_WEIGHT, Batch, Recorded, SampleRows


def check_sample_rows(draws: SampleRows) -> SampleRows:
    """Check rows to sample from, and return them.

    Raises:
        ValueError: a row is not a distribution.
    """
    z = draws.logits
    bad = ~(z < math.inf).all(-1) | (z == -math.inf).all(-1)
    if bool(bad.any()):
        raise_bad_draw(draws, _first(bad))
    return draws


def raise_bad_draw(draws: SampleRows, row: int) -> None:
    """Raise ValueError for a row that is not a distribution."""
    which = "" if draws.row_ids is None else f" (row id {int(draws.row_ids[row])})"
    raise ValueError(
        f"logits hold NaN or +inf, or nothing but -inf, in row {row}{which}: no token can be drawn; the model has "
        "diverged or its input is masked wrongly"
    )


def _first(bad: Tensor) -> int:
    return int(bad.nonzero()[0])


def place(batch: Batch, row: int) -> str:
    """Return the words that name the place of a row of logits by sequence and position."""
    if batch.origin is not None:
        return place(batch.origin.whole, int(batch.origin.rows[row]))
    if batch.cu_seqlens is None:
        return f"(sequence {row // batch.steps}, position {row % batch.steps})"
    starts = batch.cu_seqlens.tolist()
    sequence = max(i for i in range(batch.n_sequences) if starts[i] <= row)
    return f"(sequence {sequence}, position {row - starts[sequence]}; packed row {row})"


_PLAIN = (Tensor, torch.nn.Parameter)
_TRACE = "trace with torch.compile or torch.export"
_PLAIN_TORCH = "take dmfast.kernels.use_backend('eager'), which is plain torch"
_OUTSIDE_VMAP = "call it outside; the first dimension of logits is a batch already"


def check_memory(**inputs: Tensor | None) -> None:
    """Refuse logits (or hidden states and a head) that a kernel can't read, or that a tracer follows.

    A tracer does not see what a kernel does to memory, so its record would be wrong.

    Args:
        inputs: the tensors by the names of the arguments.

    Raises:
        TypeError: an input is a FakeTensor or a DTensor, whose address is 0.
        RuntimeError: the call is inside vmap, grad, jvp or functionalize of torch.func, make_fx, torch.jit.trace or a
            FakeTensorMode, or an input is a dual number of forward-mode AD.
    """
    for argument, x in inputs.items():
        if x is None or type(x) in _PLAIN:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that reading a FakeTensor's address is deprecated
            if x.numel() and not x.data_ptr():
                raise TypeError(
                    f"{argument} is a {type(x).__name__} and has no memory that a kernel could read: pass a local "
                    f"tensor (a DTensor's full_tensor()), {_TRACE}, or {_PLAIN_TORCH}"
                )
    found = watcher(**inputs)
    if found is not None:
        name, instead = found
        raise RuntimeError(
            f"dmfast's kernels can't run within {name}, which does not see what they do to memory: {instead}"
        )


def check_vmap() -> None:
    """Refuse a call of the plain torch functions inside vmap, which can't follow their checks of values.

    Raises:
        RuntimeError: the call is inside vmap.
    """
    if not torch._C._are_functorch_transforms_active():
        return
    stack = torch._C._functorch.get_interpreter_stack() or []
    if any(each.key() == torch._C._functorch.TransformType.Vmap for each in stack):
        raise RuntimeError(f"dmfast's losses can't run within torch.func.vmap, even in plain torch: {_OUTSIDE_VMAP}")


def watcher(**inputs: Tensor | None) -> tuple[str, str] | None:
    """Return the name of a tracer that is active in this thread and what to do instead, or None.

    autograd and torch.compile are not tracers in this sense, since dmfast supports both.
    """
    if torch._C._are_functorch_transforms_active():
        transform = torch._C._functorch.peek_interpreter_stack()
        if transform is not None and transform.key() == torch._C._functorch.TransformType.Vmap:
            return "torch.func.vmap", _OUTSIDE_VMAP
        return "a transform of torch.func (grad, jvp, functionalize)", f"{_TRACE}, or {_PLAIN_TORCH}"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace", f"{_TRACE}, or {_PLAIN_TORCH}"
    if torch._C._len_torch_dispatch_stack():
        keys = torch._C._TorchDispatchModeKey
        for key, name in ((keys.PROXY, "make_fx"), (keys.FAKE, "a FakeTensorMode"), (keys.FUNCTIONAL, "functionalize")):
            if torch._C._get_dispatch_mode(key) is not None:
                return name, _TRACE
    if forward_ad._current_level >= 0:
        for argument, x in inputs.items():
            if x is not None and forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
                return f"forward-mode AD, where {argument} is a dual number", _PLAIN_TORCH
    return None


def check_cu_seqlens(batch: Batch) -> None:
    """Check the starts of packed sequences.

    Raises:
        ValueError: the starts are out of order.
    """
    if batch.cu_seqlens is None:
        return
    starts, n = batch.cu_seqlens.cpu(), batch.n_rows
    if int(starts[0]) != 0 or int(starts[-1]) != n or bool((starts.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens must rise from 0 to N = {n}, the number of packed rows; got {starts[:8].tolist()}"
            f"{'...' if starts.shape[0] > 8 else ''} ending at {int(starts[-1])}"
        )


def check_token_weight(batch: Batch) -> None:
    """Check token weights.

    Raises:
        ValueError: a weight is NaN or infinite, or could take the gradient out of fp32's range. The message names the
            first such place.
    """
    w = batch.token_weight
    if w is None or len(w) == 0:
        return
    low, high = torch.aminmax(w)  # both are NaN if a weight is
    if float(low) >= -MAX_TOKEN_WEIGHT and float(high) <= MAX_TOKEN_WEIGHT:
        return
    row = _first(~(w.abs() <= MAX_TOKEN_WEIGHT))
    raise ValueError(
        f"token_weight holds {float(w[row])} at {place(batch, row)}, a scored position; it must be a number from -1e30 "
        "to 1e30, and 0 leaves the token out of the gradient"
    )


def with_zeros(token_weight: Tensor) -> Tensor:
    """Return token weights with 0 instead of those that ``check_token_weight`` refuses.

    So a fault that a device records affects only its own token.
    """
    return torch.where(token_weight.abs() <= MAX_TOKEN_WEIGHT, token_weight, 0.0)


def check_rows(batch: Batch) -> None:
    """Check token ids, cu_seqlens and token weights.

    Raises:
        ValueError: a value is bad. The message names the first such place.
    """
    check_cu_seqlens(batch)
    check_token_weight(batch)
    if batch.n_rows == 0:
        return
    low, high = torch.aminmax(batch.labels)
    if int(low) >= 0 and int(high) < batch.n_tokens:
        return
    bad = ((batch.labels < 0) & (batch.labels != IGNORE)) | (batch.labels >= batch.n_tokens)
    if bool(bad.any()):
        row = _first(bad)
        raise ValueError(
            f"tokens holds {int(batch.labels[row])} at {place(batch, row)}; a token id must be in "
            f"[0, {batch.n_tokens}), or {IGNORE} for a position that is not scored"
        )


def check_logits(batch: Batch) -> Batch:
    """Do what ``check_rows`` does, check the logits of scored rows, and return the batch.

    This is for backends whose kernels don't check logits.

    Raises:
        ValueError: as ``check_rows``; a logit is NaN or +inf. The message names the first such place.
    """
    check_rows(batch)
    rows = batch.logits.detach().reshape(batch.n_rows, batch.vocab)
    bad = ~(rows < math.inf).all(-1) & (batch.labels != IGNORE)
    if bool(bad.any()):
        raise_bad_row(batch, _first(bad))
    return batch


def check_labels(token_log_prob: Tensor, batch: Batch) -> Tensor:
    """Check the log-probability of every label, (rows,), which is 0 for a row that is not scored, and return it.

    Raises:
        ValueError: one is -inf, or NaN, which a row of -inf alone gives. The message names the first such place.
    """
    never = ~(token_log_prob.detach() > -math.inf)
    if bool(never.any()):
        raise_bad_label(batch, _first(never))
    return token_log_prob


def _check_values(name: str, value: Tensor | None, minus_infinity: str | None, first_sequence: int) -> None:
    """Check per-sequence values. ``minus_infinity`` is None where -inf is allowed, else the advice of the error."""
    if value is None or value.shape[0] == 0:
        return
    if math.isfinite(float(value.sum())):
        return
    bad = ~(value < math.inf) if minus_infinity is None else ~value.isfinite()
    if bool(bad.any()):
        i = _first(bad)
        hint = "" if minus_infinity is None or float(value[i]) != -math.inf else f"; {minus_infinity}"
        raise ValueError(f"{name} holds {float(value[i])} at sequence {first_sequence + i}{hint}")


def _check_left_out(terms: Terms, baseline: Tensor, first_sequence: int) -> None:
    bad = ~baseline.isfinite()
    if not bool(bad.any()):
        return
    returns = objectives.known_returns(terms, baseline.shape[0], baseline.device)
    infinite, victim = ~returns.isfinite(), first_sequence + _first(bad)
    advice = "its log_target is far above its log_proposal, or -inf; drop the sequence, or take a constant baseline"
    if not bool(infinite.any()):  # the infinite return belongs to another part of the call
        raise ValueError(f"the baseline of sequence {victim} averages over a return that is infinite: {advice}")
    culprit = _first(infinite)
    raise ValueError(
        f"the return of sequence {first_sequence + culprit} is {float(returns[culprit])}, over which leave-one-out "
        f"baselines average: {advice}"
    )


def check_terms(terms: Terms, first_sequence: int = 0) -> None:
    """Check the per-sequence inputs of sequences from ``first_sequence`` on.

    Raises:
        ValueError: an input is NaN or +inf, or it is -inf and the objective has no finite weight for that.
    """
    first, objective = first_sequence, terms.objective
    impossible = "a sequence that q can't draw can't have been drawn from it"
    log_target = terms.log_target
    _check_values("log_proposal", terms.log_proposal, impossible, first)
    _check_values("log_target", log_target, None, first)
    _check_values("log_z", terms.log_z, None, first)
    _check_values("reward", terms.reward, "a reward must be finite", first)
    _check_values("log_base", terms.log_base, "the base gives this sequence probability 0; set max_weight or drop it"
                  if terms.max_weight == math.inf else None, first)  # fmt: skip
    baseline = terms.baseline
    if isinstance(baseline, Tensor):
        if isinstance(objective, Objective) and isinstance(objective.baseline, str):
            _check_left_out(terms, baseline, first)
        else:
            _check_values("baseline", baseline, "a baseline must be finite", first)
    if (
        isinstance(objective, Objective)
        and objective.infinite_at_zero
        and terms.max_weight == math.inf
        and log_target is not None
        and bool((log_target == -math.inf).any())
    ):
        raise ValueError(
            f"objective {objective.name!r} is infinite where P(x) = 0, which is so for sequence "
            f"{first + _first(log_target == -math.inf)} (log_target = -inf); set max_weight, or use one of "
            f"{', '.join(_finite_at_zero())}"
        )


def _finite_at_zero() -> list[str]:
    found = []
    for name, kind in objectives.KINDS.items():
        if not kind.infinite_at_zero(0.0):
            found.append(name if not kind.infinite_at_zero(math.inf) else f"{name} with {kind.parameter}=0")
    return found


def check_weights(weight: Tensor, first_sequence: int = 0) -> Tensor:
    """Check the weights of sequences from ``first_sequence`` on, and return them.

    Raises:
        ValueError: a weight is beyond fp32's range, or NaN.
    """
    bad = ~(weight.abs() <= torch.finfo(torch.float32).max)
    if bool(bad.any()):
        raise_weight(_first(bad), weight, first_sequence)
    return weight


def raise_weight(i: int, weight: Tensor, first_sequence: int = 0) -> None:
    """Raise ValueError for a sequence whose weight is beyond fp32's range or NaN."""
    a = float(weight[i])
    if math.isnan(a):
        raise ValueError(f"the weight A of sequence {first_sequence + i} is NaN: the objective has no value there")
    raise ValueError(
        f"the weight A of sequence {first_sequence + i} is {a}, beyond fp32's range: its ratio to the "
        "proposal is out of hand. Check log_proposal and log_z for this sequence, or bound weights with max_weight"
    )


def raise_bad_row(batch: Batch, row: int) -> None:
    """Raise ValueError for NaN or +inf among the logits of a scored row."""
    raise ValueError(
        f"logits hold NaN or +inf at {place(batch, row)}, a scored position; the model has diverged or its input is "
        "masked wrongly"
    )


def raise_bad_label(batch: Batch, row: int) -> None:
    """Raise ValueError for a label whose own logit is -inf."""
    raise ValueError(
        f"the logit of token {int(batch.labels[row])} at {place(batch, row)} is -inf: the policy gives the sequence "
        "probability 0. Mask the position, or don't mask this token's logit"
    )


# --- recorded by a device ------------------------------------------------------------------------------------------

_BAD_ROW, _BAD_LABEL = 1, 2  # csrc/batch.h's numbers; for the other faults a check on the host finds the words
_WEIGHT_PLACE = 1 << 59  # csrc/cuda/loss.h


def at_once() -> bool:
    """Return whether every call waits for its kernels and raises what they find, as DMFAST_SYNC_CHECKS=1 asks."""
    return os.environ.get("DMFAST_SYNC_CHECKS", "0") not in ("", "0")


def read_later(check: Recorded) -> tuple[Recorded, ...]:
    """Return the check for ``out.check()`` to run later, or run it now if every call is to wait for its kernels."""
    if not at_once():
        return (check,)
    check()
    return ()


def with_order(batch: Batch) -> Batch:
    """Return the batch with cu_seqlens that every kernel can follow safely.

    The host can't see without waiting whether they are in order. If they are not, the returned batch has one long
    sequence in which no label is a token, so that every sequence with rows has a fault.
    """
    starts, n = batch.cu_seqlens, batch.n_rows
    if starts is None or batch.origin is not None:
        return batch
    if batch.n_sequences == 0 and n > 0:
        check_rows(batch)
    ordered = (starts[0] == 0) & (starts[-1] == n) & (starts.diff() >= 0).all()
    instead = torch.zeros_like(starts)
    instead[-1] = n
    return batch._replace(
        cu_seqlens=torch.where(ordered, starts, instead), tokens=torch.where(ordered, batch.labels, batch.n_tokens)
    )


@dataclass(frozen=True, eq=False)
class DeviceFaults:
    """A check that raises the first fault of a call with the CPU's words, when the host may wait for the device.

    It is a class and not a closure, so that a graph of torch.compile can return it.
    """

    batch: Batch  # without its logits
    terms: Terms | None
    log_prob: Tensor
    status: Tensor | None  # 0-d int64, -1 for no fault; None: other checks cover the rows
    made: Tensor | None  # (B,) A before faults were set to 0, if torch made it; otherwise the status covers A

    def __call__(self) -> None:
        """Wait for the device, and raise the first fault that it has recorded."""
        batch, terms = self.batch, self.terms
        code = -1 if self.status is None else int(self.status)
        where, fault = divmod(code, 8)
        check_token_weight(batch)
        if code >= 0:
            if fault == _BAD_ROW:
                raise_bad_row(batch, where)
            if fault == _BAD_LABEL:
                raise_bad_label(batch, where)
            check_rows(batch)
        if terms is not None and (code >= 0 or self.made is not None):
            check_terms(terms, batch.first_sequence)
            made = objectives.bounded_weights(terms, self.log_prob) if self.made is None else self.made
            check_weights(made, batch.first_sequence)
        if code >= 0:
            raise RuntimeError(f"dmfast: the device refused an input or the weight of sequence {where - _WEIGHT_PLACE}")


def device_faults(
    batch: Batch, terms: Terms | None, log_prob: Tensor, status: Tensor | None, made: Tensor | None = None
) -> DeviceFaults:
    """Return the check that raises the faults of a call. It does not keep the logits."""
    return DeviceFaults(batch._replace(logits=batch.logits.new_empty(0, batch.vocab)), terms, log_prob, status, made)


def of_whole(check: DeviceFaults) -> Tensor:
    """Return the status of a check, 0-d, with the fault's place in the whole call instead of its place in the chunk."""
    status, origin = check.status, check.batch.origin
    assert status is not None
    if origin is None:
        return status
    weight_place = _WEIGHT_PLACE * 8
    if not len(origin.rows):
        return torch.where(status >= weight_place, status + origin.first_sequence * 8, status)
    row = origin.rows[(status // 8).clamp(0, len(origin.rows) - 1)]
    of_row = row * 8 + status % 8
    of_sequence = status + origin.first_sequence * 8
    return torch.where(status < 0, status, torch.where(status >= weight_place, of_sequence, of_row))


def inputs_ok(terms: Terms) -> Tensor | bool:
    """Return which sequences (B,) have per-sequence inputs that ``check_terms`` allows.

    It does for weights that torch makes what the function of the same name in csrc/cuda/loss.cu does. It uses few
    operations, because each is a kernel launch.
    """
    finite: list[Any] = [terms.log_proposal, terms.reward, terms.baseline]
    below_infinity: list[Any] = [terms.log_target, terms.log_z]
    (finite if terms.max_weight == torch.inf else below_infinity).append(terms.log_base)
    ok: Tensor | bool = True
    if given := [x for x in finite if isinstance(x, Tensor)]:
        ok = reduce(torch.add, given).isfinite()  # inf - inf is NaN
    if given := [x for x in below_infinity if isinstance(x, Tensor)]:
        ok = ok & (reduce(torch.maximum, given) < torch.inf)  # a maximum with NaN is NaN
    return ok


def zero_where_faulty(weight: Tensor, log_prob: Tensor, terms: Terms) -> Tensor:
    """Return weights (B,) that torch made, with 0 where fp32 can't hold them and in every sequence with a fault.

    A sequence has a fault if a row of it has one, which makes its log_prob NaN, or if one of its inputs is bad, even an
    input on which the weight does not depend.
    """
    ok = (weight.abs() <= torch.finfo(torch.float32).max) & ~log_prob.isnan() & inputs_ok(terms)
    return torch.where(ok, weight, 0.0)
