"""Check the arguments of a call before any backend sees them. A kernel gets raw pointers and can't check them.

The checks look only at shapes, dtypes and devices, so that torch.compile can trace them. ``faults.py`` checks the
values that tensors hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..methods import METHODS
from ..objectives import (
    BASELINE,
    COLUMNS,
    KINDS,
    LOG_PROPOSAL,
    LOG_Z,
    NO_CONSTANTS,
    OBJECTIVES,
    Group,
    Objective,
    Terms,
    is_number,
    leave_one_out_baseline,
    number_in_graph,
    plain_baseline,
    stacked,
)
from .batch import IGNORE, Batch, SampleRows, logits_to_come
from .fp64 import per_sequence_device

_IGNORED = torch.tensor(IGNORE, device="cpu")
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PER_SEQUENCE = (torch.float32, torch.float64)
#: The bits of ``Terms.given`` that each objective needs.
_NEEDS = {name: sum(1 << COLUMNS.index(each) for each in kind.needs) for name, kind in KINDS.items()}


def describe(x: object) -> str:
    """Return the words by which error messages describe an argument."""
    if isinstance(x, Tensor):
        return f"{x.dtype} {tuple(x.shape)} on {x.device}"
    return f"{type(x).__name__} {x!r}"


def is_integer(x: object) -> bool:
    """Return whether x is a tensor of integers. A bool tensor is not."""
    return isinstance(x, Tensor) and not (x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool)


def _check_logits(logits: Tensor) -> None:
    if logits.shape[-1] == 0:
        raise ValueError(f"logits has an empty vocabulary: {describe(logits)}")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1 and logits.numel():  # NumPy's empty arrays have strides of 0
        raise ValueError(
            f"the last dimension of logits must be contiguous, got strides {logits.stride()}; "
            "call .contiguous(), or keep the vocabulary as the last dimension"
        )


def _number(x: object) -> float:
    """Return x as a float, or NaN if x is not a number."""
    return float(x) if is_number(x) else math.nan


def _check_scaling(temperature: float, softcap: float | None) -> None:
    # outside this range, logits or their gradients leave fp32's range
    if not 1e-12 <= _number(temperature) <= 1e12:
        raise ValueError(f"temperature must be a positive number, from 1e-12 to 1e12, got {temperature!r}")
    # above this, the argument of tanh is so small that its digits cancel
    if softcap is not None and not 0 < _number(softcap) <= 1e8:
        raise ValueError(f"softcap must be a positive number or None, up to 1e8, which caps nothing; got {softcap!r}")


def make_batch(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_start: int = 0,
    whole_vocab: int = 0,
    what: str = "logits",
    token_weight: Tensor | None = None,
) -> Batch:
    """Check the shapes, dtypes and devices of logits and labels, and return them as a batch.

    Args:
        logits, tokens, mask, cu_seqlens, temperature, softcap: as in ``dm_loss``.
        vocab_start, whole_vocab: the place of a shard; see ``Batch``.
        what: the name that messages give to the tensor with which ``tokens`` are aligned.
        token_weight: as in ``dm_loss``.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a shape, stride or device is wrong, or temperature or softcap is out of range.
    """
    if not isinstance(logits, Tensor) or logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"logits must be float32, bfloat16, float16 or float64, got {describe(logits)}")
    if not torch.compiler.is_compiling() and logits.is_neg():
        logits = logits.resolve_neg()  # kernels read the memory of this view, which holds the negated values
    shape, packed = logits.shape, cu_seqlens is not None
    if len(shape) != (2 if packed else 3):
        raise ValueError(
            f"logits must be (B, T, V), or packed (N, V) with cu_seqlens; got {describe(logits)} "
            f"with{'' if packed else 'out'} cu_seqlens"
        )
    _check_logits(logits)
    lead, device = shape[:-1], logits.device
    _check_rows("tokens", tokens, lead, device, what)
    if tokens.dtype is torch.bool:
        raise TypeError("tokens must be an integer tensor, got bool; did you swap tokens and mask?")
    labels = tokens if tokens.dtype is torch.int64 else tokens.to(torch.int64)
    if mask is not None:
        _check_rows("mask", mask, lead, device, what)
        # the constant tensor saves making one in every call, but fake tensors accept no real tensor beside them
        fake = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        ignored = IGNORE if fake else _IGNORED
        labels = torch.where(mask if mask.dtype is torch.bool else mask != 0, labels, ignored)
    if type(temperature) is not float or temperature != 1.0 or softcap is not None:
        _check_scaling(temperature, softcap)
    if not labels.is_contiguous():
        labels = labels.contiguous()
    scale, cap = 1.0 / float(temperature), float(softcap or 0.0)
    of_rows = None if token_weight is None else _token_weight(token_weight, labels.view(-1), logits, what)
    if cu_seqlens is None:
        return Batch(logits, labels, None, shape[0], shape[1], scale, cap, vocab_start, whole_vocab,
                     token_weight=of_rows)  # fmt: skip
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {describe(cu_seqlens)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be (B+1,), got {describe(cu_seqlens)}")
    if cu_seqlens.device != logits.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, {what} on {logits.device}; move it there")
    starts = cu_seqlens.to(torch.int64).contiguous()
    return Batch(logits, labels, starts, starts.shape[0] - 1, 0, scale, cap, vocab_start, whole_vocab,
                 token_weight=of_rows)  # fmt: skip


def _token_weight(value: object, labels: Tensor, logits: Tensor, what: str) -> Tensor:
    """Return the weights as (rows,) fp64 without gradient, on the device of per-sequence values.

    Rows that are not scored get 0, whatever the argument holds there.
    """
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        raise TypeError(
            f"token_weight must be a floating-point tensor, got {describe(value)}; call .float(), or pass it as mask "
            "if what it leaves out is not to count in log pi either"
        )
    shape, to = logits.shape[:-1], per_sequence_device(logits.device)
    if value.shape != shape:
        raise ValueError(
            f"token_weight must have the shape of tokens, {tuple(shape)}, one weight for each, got {describe(value)}"
        )
    if value.device not in (logits.device, to):
        raise ValueError(f"token_weight is on {value.device}, {what} on {logits.device}; move it there")
    weights = value.detach().to(to).to(torch.float64).reshape(-1)
    return torch.where(labels.to(to) == IGNORE, 0.0, weights).contiguous()


def _check_rows(name: str, value: object, shape: torch.Size, device: torch.device, what: str) -> None:
    """Check that a value has one integer, or for the mask one integer or bool, for each row of logits."""
    if not isinstance(value, Tensor) or value.dtype.is_floating_point or value.dtype.is_complex:
        raise TypeError(
            f"{name} must be an integer{' or bool' if name == 'mask' else ''} tensor, got {describe(value)}"
        )
    if value.shape != shape:
        raise ValueError(
            f"{name} must have the shape of {what} without {'V' if what == 'logits' else 'D'}, {tuple(shape)}, got "
            f"{describe(value)}; {what}[:, t] scores tokens[:, t]: use dmfast.shift_labels to align a model's input_ids"
        )
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, {what} on {device}; move it there")


# The objectives without a parameter are made once, here. If calls filled the dict, torch.compile would compile again.
_BY_NAME = {name: Objective(name) for name, kind in KINDS.items() if kind.parameter is None}


def make_objective(objective: str | Objective | Callable[[Terms], Tensor]) -> Objective | Callable[[Terms], Tensor]:
    """Return the ``Objective`` that a name stands for. An ``Objective`` or a function is returned as it is."""
    if isinstance(objective, str):
        if objective in METHODS:
            return METHODS[objective]
        return _BY_NAME[objective] if objective in _BY_NAME else Objective(objective)
    if isinstance(objective, Objective) or callable(objective):
        return objective
    raise TypeError(
        f"objective must be one of {', '.join(OBJECTIVES)}, a dmfast.Objective or a function of dmfast.Terms, "
        f"got {describe(objective)}"
    )


def make_linear_batch(
    hidden: Tensor, head: Tensor, bias: Tensor | None, tokens: Tensor, mask: Tensor | None,
    cu_seqlens: Tensor | None, temperature: float, softcap: float | None, chunk_bytes: int | None,
    logits_dtype: torch.dtype | str, token_weight: Tensor | None = None,
) -> Batch:  # fmt: skip
    """Do what ``make_batch`` does for hidden states and a head. The logits of the batch are a stand-in without values.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a shape or device is wrong, or a number is out of range.
    """
    dims = 2 if cu_seqlens is not None else 3
    if not isinstance(hidden, Tensor) or hidden.dtype not in LOGIT_DTYPES:
        raise TypeError(f"hidden must be float32, bfloat16, float16 or float64, got {describe(hidden)}")
    if hidden.dim() != dims:
        raise ValueError(
            f"hidden must be (B, T, D), or packed (N, D) with cu_seqlens; got {describe(hidden)} "
            f"with{'' if dims == 2 else 'out'} cu_seqlens"
        )
    for name, x, shape in (("weight", head, "(V, D)"), ("bias", bias, "(V,)")):
        if x is None and name == "bias":
            continue
        if not isinstance(x, Tensor) or x.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype of hidden, {hidden.dtype}, got {describe(x)}; convert one of them, or use "
                "torch.autocast"
            )
        if x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}, hidden on {hidden.device}; move it there")
        wrong = x.dim() != 2 or x.shape[1] != hidden.shape[-1] if name == "weight" else x.shape != head.shape[:1]
        if wrong:
            raise ValueError(
                f"{name} must be {shape} with hidden's D = {hidden.shape[-1]}, got {describe(x)}; weight is what "
                "nn.Linear(D, V) holds"
            )
    if chunk_bytes is not None and (not isinstance(chunk_bytes, int) or chunk_bytes < 1):
        raise ValueError(f"chunk_bytes must be a positive integer, got {chunk_bytes!r}")
    v = head.shape[0]
    if v == 0:
        raise ValueError(f"weight has an empty vocabulary: {describe(head)}")
    logits = logits_to_come(hidden.detach(), v, _logits_dtype(logits_dtype, hidden.dtype))
    batch = make_batch(logits, tokens, mask, cu_seqlens, temperature, softcap, what="hidden",
                       token_weight=token_weight)  # fmt: skip
    return batch._replace(as_set=logits_dtype == "same")


def _logits_dtype(wanted: torch.dtype | str, hidden: torch.dtype) -> torch.dtype:
    if wanted == "same":
        return hidden
    if wanted in ("float32", torch.float32):
        return torch.promote_types(hidden, torch.float32)
    raise ValueError(
        "logits_dtype must be 'float32', in which the logits of 16-bit hidden states are not rounded, or 'same', the "
        f"dtype of hidden; got {wanted!r}"
    )


def _per_sequence(name: str, value: Tensor, device: torch.device, to: torch.device, n: int, what: str) -> Tensor:
    """Return a per-sequence argument as (n,) fp32 or fp64, on the device of per-sequence values."""
    dtype = value.dtype
    if dtype is not torch.float64 and dtype is not torch.float32:
        if name == "reward" and not dtype.is_complex and not dtype.is_floating_point:
            value = value.double()  # a reward may be right or wrong, or a count
        elif not dtype.is_floating_point:
            raise TypeError(f"{name} must be a floating-point tensor, got {describe(value)}")
        if name != "reward":
            raise TypeError(
                f"{name} must be float32 or float64, got {describe(value)}: in 16 bits a log-probability of -1,000 is "
                "off by up to 2 nats; compute it in float32"
            )
    given_on = value.device
    if given_on not in (device, to):
        raise ValueError(f"{name} is on {given_on}, {what} on {device}; move it there")
    if value.dim() != 1 or value.shape[0] != n:
        if name == "log_z" and value.dim() == 0:
            value = value.expand(n)
        else:
            raise ValueError(f"{name} must have one value per sequence, ({n},), got {describe(value)}")
    return value if given_on == to else value.to(to)


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
    entropy_coefficient: float = 0.0,
    num_sequences: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    what: str = "logits",
) -> Terms:
    """Check the per-sequence inputs, and return them with the baseline of this call.

    ``what`` is the name that messages give to the tensor that the inputs belong to.

    Raises:
        TypeError, ValueError: a dtype, shape or device is wrong, or an input that the objective needs is missing.
    """
    objective = make_objective(objective)
    device, n = batch.logits.device, batch.n_sequences
    to = per_sequence_device(device)
    columns: list[Tensor] = []
    present, given, constants = 0, 0, NO_CONSTANTS
    for c, value in ((0, log_proposal), (1, log_target), (2, log_z), (3, reward), (4, log_base)):
        if value is None:
            continue
        given |= 1 << c
        if isinstance(value, Tensor):
            present |= 1 << c
            as_it_is = value.dtype in _PER_SEQUENCE and value.shape == (n,) and value.device == to
            column = value if as_it_is else _per_sequence(COLUMNS[c], value, device, to, n, what)
            columns.append(column.detach() if column.requires_grad else column)
        elif c == 2 and is_number(value) and torch.compiler.is_compiling():
            present |= LOG_Z
            columns.append(number_in_graph(value, n, to))
        elif c == 2 and is_number(value):
            constants = (0.0, 0.0, float(value), 0.0, 0.0, 0.0)
        else:
            raise TypeError(f"{COLUMNS[c]} must be a floating-point tensor, got {describe(value)}")
    if on_policy is not True and on_policy is not False:
        raise TypeError(f"on_policy must be True or False, got {on_policy!r}")
    if isinstance(objective, Objective):
        if _NEEDS[objective.name] & ~given:
            missing = [name for name in objective.needs if not given >> COLUMNS.index(name) & 1]
            raise ValueError(f"objective {objective.name!r} needs {' and '.join(missing)}")
        if not given & LOG_PROPOSAL and not on_policy:
            raise ValueError(
                f"objective {objective.name!r} needs log_proposal, the log-probability of each sequence under what it "
                "was sampled from; or on_policy=True where that is the policy itself"
            )
    bound = math.inf
    if max_weight is not None:
        if not _number(max_weight) > 0:
            raise ValueError(f"max_weight must be a positive number or None, got {max_weight!r}")
        bound = float(max_weight)
    if not abs(_number(entropy_coefficient)) <= 1e30:
        raise ValueError(
            "entropy_coefficient must be a number from -1e30 to 1e30, which is 0 where the loss is to have no entropy "
            f"in it; got {entropy_coefficient!r}"
        )
    if context_id is not None and (not is_integer(context_id) or context_id.shape != (n,)):
        raise ValueError(f"context_id must be an integer tensor ({n},), got {describe(context_id)}")
    if isinstance(num_tokens, Tensor):
        if num_tokens.dim() or num_tokens.dtype.is_complex or num_tokens.dtype == torch.bool:
            raise ValueError(f"num_tokens must be a number or a 0-d tensor, got {describe(num_tokens)}")
    elif num_tokens is not None and not 0 <= _number(num_tokens) <= 1e30:
        raise ValueError(
            f"num_tokens must be the number of scored tokens of the step, from 0 to 1e30, or None; got {num_tokens!r}"
        )
    baseline = plain_baseline(objective, n, to)
    if isinstance(baseline, str):
        block = _block(columns, n, to)
        terms = Terms(objective, on_policy, bound, block, present, given, constants)
        context_id = None if context_id is None else context_id.to(to)
        baseline = leave_one_out_baseline(terms, context_id, n, to)
    if isinstance(baseline, Tensor):
        if baseline.shape != (n,):
            raise ValueError(f"a baseline tensor must be ({n},), got {describe(baseline)}")
        columns.append(baseline)
        present, given = present | BASELINE, given | BASELINE
    elif baseline is not None:
        given, constants = given | BASELINE, (*constants[:5], baseline)
    group = None if isinstance(objective, Objective) else _group(batch, context_id, num_sequences, num_tokens, to)
    # the CPU kernels convert the columns themselves
    later = columns and device.type == "cpu" and not torch.compiler.is_compiling()
    return Terms(objective, on_policy, bound, columns if later else _block(columns, n, to), present, given, constants,
                 None, float(entropy_coefficient), group)  # fmt: skip


def _group(
    batch: Batch, context_id: Tensor | None, num_sequences: float | Tensor | None, num_tokens: float | Tensor | None,
    to: torch.device,
) -> Group:  # fmt: skip
    """Return what a function of ``Terms`` may know about the sequences beside their inputs."""
    scored = (batch.labels != IGNORE).to(torch.float64)
    if batch.cu_seqlens is None:
        length = scored.view(batch.n_sequences, batch.steps).sum(1)
    else:
        before = torch.cat([scored.new_zeros(1), scored.cumsum(0)])
        length = before[batch.cu_seqlens].diff()
    tokens, sequences = (x.detach().to(to, torch.float64) if isinstance(x, Tensor) else x
                         for x in (num_tokens, num_sequences))  # fmt: skip
    return Group(length.to(to), length.sum().to(to) if tokens is None else tokens,
                 float(max(batch.n_sequences, 1)) if sequences is None else sequences,
                 None if context_id is None else context_id.to(to))  # fmt: skip


def _block(columns: list[Tensor], n: int, device: torch.device) -> Tensor:
    return stacked(columns) if columns else torch.empty(0, n, dtype=torch.float64, device=device)


def check_call(
    batch: Batch,
    reduction: str = "mean",
    num_sequences: float | Tensor | None = None,
    grad_scale: float | None = None,
    inplace: bool = False,
) -> None:
    """Check the options of a call.

    Raises:
        ValueError: the reduction is unknown, a number is out of range, or ``inplace`` is asked for on logits that can't
            be overwritten.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if isinstance(num_sequences, Tensor):
        if num_sequences.dim() or num_sequences.dtype.is_complex or num_sequences.dtype == torch.bool:
            raise ValueError(f"num_sequences must be a number or a 0-d tensor, got {describe(num_sequences)}")
    elif num_sequences is not None:
        check_number("num_sequences", num_sequences)
    if grad_scale is not None:
        check_number("grad_scale", grad_scale)
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
        if _shares_memory(logits):
            raise ValueError(
                f"inplace=True needs logits whose elements do not share memory, got strides {logits.stride()} for "
                f"shape {tuple(logits.shape)} (an expanded tensor?); pass inplace=False or logits.contiguous()"
            )


def _shares_memory(x: Tensor) -> bool:
    """Return whether two elements share an address. Rows may lie in any order and with gaps, as in a transpose."""
    if not x.numel():
        return False
    dims = [(d, s) for d, s in zip(x.shape, x.stride(), strict=True) if d > 1]
    if torch.compiler.is_compiling():  # sizes may be symbols, which can't be sorted
        return any(stride == 0 for _, stride in dims)
    reach = 1
    for size, stride in sorted(dims, key=lambda each: each[1]):
        if stride < reach:
            return True
        reach = stride * (size - 1) + reach
    return False


def check_number(name: str, value: object) -> None:
    """Check a factor of the gradient.

    Raises:
        ValueError: the factor could take the gradient out of fp32's range.
    """
    if not 1e-30 <= _number(value) <= 1e30:
        raise ValueError(f"{name} must be a positive number, from 1e-30 to 1e30, or None; got {value!r}")


def check_weight_tensor(weight: object, batch: Batch) -> None:
    """Check the weights that a user's own objective returned.

    Raises:
        ValueError: they are not an fp64 (B,) tensor.
    """
    if not isinstance(weight, Tensor) or weight.dtype != torch.float64 or weight.shape != (batch.n_sequences,):
        raise ValueError(f"an objective must return float64 weights ({batch.n_sequences},), got {describe(weight)}")


def make_sample_rows(
    logits: Tensor, seed: int, row_ids: Tensor | None, step: int, temperature: float, softcap: float | None
) -> SampleRows:
    """Check the arguments of ``sample_tokens``, and return them as rows to sample from.

    Raises:
        TypeError: the logits have the wrong dtype.
        ValueError: a shape, stride or device is wrong, or a number is out of range.
    """
    if not isinstance(logits, Tensor) or logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"logits must be float32, bfloat16, float16 or float64, got {describe(logits)}")
    if not torch.compiler.is_compiling() and logits.is_neg():
        logits = logits.resolve_neg()
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
    return SampleRows(logits.detach(), seed % 2**64, row_ids, step, 1.0 / float(temperature), float(softcap or 0.0))
