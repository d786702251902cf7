"""The compiled CPU kernels (``csrc/cpu``) on checked batches: allocates outputs, passes pointers, raises faults."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..objectives import KINDS, Objective, Terms
from . import checks
from .batch import Batch, Draws, Scores

_C: ModuleType | None
_IMPORT_ERROR: str | None = None
try:
    # after torch, so that the extension runs on the OpenMP that torch has loaded
    from .. import _C  # type: ignore[no-redef]
except ImportError as error:
    _C = None
    _IMPORT_ERROR = str(error)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BAD_ROW, _BAD_LABEL, _BAD_WEIGHT, _UNUSUAL = 1, 2, 3, 4
Status: TypeAlias = "tuple[int, int]"  # which fault, and where


def why_unavailable() -> str | None:
    """None where the compiled kernels are there, else the reason that they are not."""
    if _C is not None:
        return None
    return (
        "dmfast was installed without its compiled kernels (no C++ compiler at install time, or DMFAST_BUILD=none); "
        f"reinstall with g++ and DMFAST_BUILD=cpu to see the error [{_IMPORT_ERROR}]"
    )


def instruction_set() -> str:
    """Which build of the row kernels runs on this machine."""
    assert _C is not None
    return str(_C.instruction_set())


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _strides(x: Tensor, batch: Batch) -> tuple[int, int]:
    return (0, x.stride(0)) if batch.cu_seqlens is not None else (x.stride(0), x.stride(1))


def _batch(batch: Batch) -> object:
    assert _C is not None
    logits = batch.logits
    return _C.Batch(
        DTYPES[logits.dtype], logits.data_ptr(), batch.n_sequences, batch.steps, batch.n_rows, *_strides(logits, batch),
        _pointer(batch.cu_seqlens), batch.labels.data_ptr(), logits.shape[-1], batch.scale, batch.softcap,
        torch.get_num_threads(),
    )  # fmt: skip


def _terms(terms: Terms | None) -> object:
    assert _C is not None
    if terms is None:
        return _C.Terms(0, False, True, 0.0, 0.0, math.inf, 0, 0, 0, 0, 0, 0, 0.0)
    objective, baseline = terms.objective, terms.baseline
    assert isinstance(objective, Objective)
    pointer, constant = (baseline.data_ptr(), 0.0) if isinstance(baseline, Tensor) else (0, baseline or 0.0)
    return _C.Terms(
        KINDS[objective.kind], terms.on_policy, objective.normalize, objective.beta or 0.0, objective.log_scale or 0.0,
        terms.max_weight, _pointer(terms.log_proposal), _pointer(terms.log_target), _pointer(terms.log_z),
        _pointer(terms.reward), _pointer(terms.log_base), pointer, constant,
    )  # fmt: skip


def _outputs(batch: Batch, terms: Terms | None, entropy: bool, divide_by: float) -> tuple[Scores, object]:
    """Empty results and the pointers to them."""
    assert _C is not None
    # the device is said, since with torch.device(...) may name another one for new tensors; empty_like costs half
    lse = torch.empty(batch.n_rows, dtype=torch.float64, device=batch.logits.device)
    log_prob = lse.new_empty(batch.n_sequences)
    like = torch.empty_like
    h = like(log_prob) if entropy else None
    first = (log_prob.data_ptr(), lse.data_ptr(), _pointer(h))
    if terms is None:
        return Scores(lse, log_prob, h), _C.Outputs(*first, 0, 0, 0, 0, 0, 0, divide_by)
    rest = (like(log_prob), like(log_prob), like(log_prob), like(log_prob), lse.new_empty(()),
            lse.new_empty((), dtype=torch.int64))  # fmt: skip
    return Scores(lse, log_prob, h, *rest), _C.Outputs(*first, *[x.data_ptr() for x in rest], divide_by)


def _run(call: Callable[[bool], Status], batch: Batch, terms: Terms | None, scores: Scores) -> None:
    """Calls a kernel, whose argument says whether the values of batch and terms have been checked: it finds out at no
    cost that they are all ordinary, and only if not they are looked at here.
    """
    fault, at = call(False)
    if fault == _UNUSUAL:
        checks.check_rows(batch)
        if terms is not None:
            checks.check_terms(terms)
        fault, at = call(True)
    if fault == _BAD_ROW:
        checks.raise_bad_row(batch, at)
    if fault == _BAD_LABEL:
        checks.raise_bad_label(batch, at)
    if fault == _BAD_WEIGHT:
        assert scores.weight is not None
        checks.raise_weight(at, scores.weight, batch.part_of.first_sequence if batch.part_of else 0)


def forward(batch: Batch, terms: Terms | None, entropy: bool, divide_by: float = 1.0) -> Scores:
    """One read of the scored rows. ``terms=None``: log_prob only. ``total`` is the sum of losses over ``divide_by``.

    Raises:
        ValueError: as ``checks.check_rows`` and ``check_terms``; NaN or +inf in a scored row, a label logit of -inf, a
            weight beyond fp32's range.
    """
    assert _C is not None
    kernel = _C.forward
    scores, outputs = _outputs(batch, terms, entropy, divide_by)
    c_batch, c_terms = _batch(batch), _terms(terms)
    _run(lambda checked: kernel(c_batch, c_terms, outputs, checked), batch, terms, scores)
    return scores


def _empty_gradient(batch: Batch, inplace: bool) -> Tensor:
    if inplace:
        return batch.logits.detach()
    return torch.empty(batch.logits.shape, dtype=batch.logits.dtype, device=batch.logits.device)


def backward(batch: Batch, lse: Tensor, weight: Tensor, factor: float, inplace: bool) -> Tensor:
    """dz = weight * factor * (softmax - onehot) through scale and softcap; -A/B * grad_output of the loss.

    Written over the logits if ``inplace``, else into a new contiguous tensor. Like every write over the logits it
    counts as a change to them, so that a second use of their values raises PyTorch's own error.
    """
    assert _C is not None
    dz = _empty_gradient(batch, inplace)
    weight = weight.contiguous()
    _C.backward(_batch(batch), lse.data_ptr(), weight.data_ptr(), factor, dz.data_ptr(), *_strides(dz, batch))
    if inplace:
        increment_version(batch.logits)
    return dz


def forward_backward(
    batch: Batch, terms: Terms, entropy: bool, divide_by: float, expected: float, inplace: bool
) -> tuple[Scores, Tensor]:
    """``forward`` and ``backward`` in one pass, for ``terms.weight_known``: the gradient of ``expected * total``.

    Raises:
        ValueError: as ``forward``; a weight beyond fp32's range is found before a row is touched.
    """
    assert _C is not None
    kernel = _C.forward_backward
    scores, outputs = _outputs(batch, terms, entropy, divide_by)
    dz = _empty_gradient(batch, inplace)
    c_batch, c_terms, gradient = _batch(batch), _terms(terms), (dz.data_ptr(), *_strides(dz, batch))

    def call(checked: bool) -> Status:
        status: Status = kernel(c_batch, c_terms, outputs, checked, expected / divide_by, *gradient)
        if inplace and status[0] not in (_BAD_WEIGHT, _UNUSUAL):
            increment_version(batch.logits)
        return status

    _run(call, batch, terms, scores)
    return scores, dz


def scale_(batch: Batch, dz: Tensor, factor: float) -> None:
    """dz *= factor on scored rows; the others are zero. ``batch`` says how rows are cut, its logits are not read."""
    assert _C is not None
    _C.scale(_batch(batch), factor, dz.data_ptr(), *_strides(dz, batch))


def sample(draws: Draws, uniforms: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """tokens (N,) int64 and log_prob (N,) fp64, in one read of the rows. ``uniforms`` (N,) fp64 replaces the generator.

    Raises:
        ValueError: a row that is no distribution.
    """
    assert _C is not None
    logits = draws.logits
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    log_prob = torch.empty_like(tokens, dtype=torch.float64)
    bad = _C.sample(
        DTYPES[logits.dtype], logits.data_ptr(), logits.shape[0], logits.stride(0), logits.shape[1], draws.scale,
        draws.softcap, draws.seed, _pointer(draws.row_ids), draws.step, _pointer(uniforms), torch.get_num_threads(),
        tokens.data_ptr(), log_prob.data_ptr(),
    )  # fmt: skip
    if bad >= 0:
        checks.raise_bad_draw(draws, bad)
    return tokens, log_prob


def weigh(terms: Terms, log_prob: float, log_proposal: float, log_target: float, log_z: float, reward: float,
          log_base: float, baseline: float) -> tuple[float, float, float, bool, bool]:  # fmt: skip
    """csrc/objective.h for one sequence: log_ratio, log_target_ratio, weight, clipped, out_of_range."""
    assert _C is not None
    result = _C.weigh(_terms(terms), log_prob, log_proposal, log_target, log_z, reward, log_base, baseline)
    return tuple(result)
