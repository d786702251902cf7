"""The compiled kernels (``csrc/cpu``, ``csrc/cuda``) on checked batches: allocates outputs, passes pointers, raises
faults. The device of the logits chooses between the two."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import objectives
from ..objectives import KINDS, Objective, Terms
from . import checks, cuda, eager
from .batch import Batch, Draws, Scores
from .result import DMLossOutput

_C: ModuleType | None
_IMPORT_ERROR: str | None = None
try:
    # after torch, so that the extension runs on the OpenMP that torch has loaded
    from .. import _C  # type: ignore[no-redef]
except ImportError as error:
    _C = None
    _IMPORT_ERROR = str(error)

# None where there are no CUDA kernels. Known once: it is asked several times a call.
_CUDA_DEVICE: str | None = None if _C is None or not hasattr(_C, "cuda") else _C.cuda.device_type
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


def cpu_alone() -> bool:
    """Whether the CPU kernels are there and no others (the host build of the CUDA kernels) take logits on the CPU."""
    return _C is not None and _CUDA_DEVICE != "cpu"


def instruction_set() -> str:
    """Which build of the row kernels runs on this machine."""
    assert _C is not None
    return str(_C.instruction_set())


def on_cuda(x: Tensor) -> bool:
    """Whether the CUDA kernels take x."""
    return x.device.type == _CUDA_DEVICE


# What ``use_backend`` or DMFAST_BACKEND forces. A plain global, for all threads: torch.compile guards on it.
forced: str | None = os.environ.get("DMFAST_BACKEND") or None


def on_triton(x: Tensor) -> bool:
    """Whether the Triton kernels take x: forced also where there are compiled ones."""
    return forced == "triton" or (x.device.type != "cpu" and why_not_cuda(x.device.index or 0) is not None)


def records(x: Tensor) -> bool:
    """Whether faults in x are recorded, to be read later."""
    return on_cuda(x) or on_triton(x)


def why_not_cuda(device: int = 0) -> str | None:
    """None where the CUDA kernels can run on that device, else the reason that they can't."""
    if _C is None:
        return why_unavailable()
    if not hasattr(_C, "cuda"):
        return (
            "dmfast was installed without its CUDA kernels (no nvcc at install time, or DMFAST_BUILD=cpu); reinstall "
            "with DMFAST_BUILD=cuda"
        )
    return _why_not_on(device)


# as torch.compiler.assume_constant_result does, which would import torch._dynamo
why_not_cuda._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _why_not_on(device: int) -> str | None:
    """Known once: it is asked at every call."""
    assert _C is not None
    return _C.cuda.why_not(device) or None


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
    # empty_like costs half of empty, and with torch.device(...) does not move it elsewhere
    lse = torch.empty_like(batch.labels, dtype=torch.float64)
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


def _queue(name: str, batch: Batch, terms: Terms | None, entropy: bool, divide_by: float, *gradient: float,
           overwrites: Tensor | None = None) -> Scores:  # fmt: skip
    """Calls a kernel on a CUDA device, which answers later."""
    assert _C is not None
    given, batch = batch, cuda.with_order(batch)
    scores, outputs = _outputs(batch, terms, entropy, divide_by)
    work = cuda.make_workspace(batch.logits, 2 * (batch.n_rows + batch.n_sequences), batch.n_sequences + 1)
    getattr(_C.cuda, name)(_batch(batch), _terms(terms), outputs, *gradient, _C.cuda.Workspace(*work.arguments))
    if overwrites is not None:
        increment_version(overwrites)
    return scores._replace(recorded=cuda.settle(cuda.row_faults(given, terms, scores.log_prob, work.status)))


def _triton_forward(
    batch: Batch, terms: Terms | None, entropy: bool, divide_by: float, factor: float = 1.0, dz: Tensor | None = None
) -> Scores:
    """``forward``, and with ``dz`` (where weights are known) the gradient of ``factor`` times the sum of losses. A is
    formed in torch."""
    from .triton import launch  # triton is imported where it is used

    weights = None
    if dz is not None:
        assert terms is not None
        stand_in = terms.log_proposal  # for log pi, on which a known weight does not depend
        if stand_in is None:
            stand_in = torch.zeros(batch.n_sequences, dtype=torch.float64, device=batch.logits.device)
        weights = cuda.usable(objectives.clipped_weights(terms, stand_in), stand_in, terms) * factor
    scores, faults = launch.score(batch, entropy, weights, dz)
    first = batch.part_of.first_sequence if batch.part_of is not None else 0
    worst = faults.min() if faults.numel() else faults.new_full((), launch.NONE)
    status = torch.where(worst == launch.NONE, -1, worst)
    scores = scores._replace(recorded=cuda.settle(cuda.row_faults(batch, None, scores.log_prob, status)))
    return scores if terms is None else weighed(batch, scores, terms, divide_by, first)


def forward(batch: Batch, terms: Terms | None, entropy: bool, divide_by: float = 1.0) -> Scores:
    """One read of the scored rows. ``terms=None``: log_prob only. ``total`` is the sum of losses over ``divide_by``.

    Raises:
        ValueError: as ``checks.check_rows`` and ``check_terms``; NaN or +inf in a scored row, a label logit of -inf, a
            weight beyond fp32's range. On CUDA ``recorded`` raises them; such a sequence has log_prob NaN, weight 0.
    """
    checks.check_memory(batch.logits)
    if on_triton(batch.logits):
        return _triton_forward(batch, terms, entropy, divide_by)
    assert _C is not None
    if on_cuda(batch.logits):
        return _queue("forward", batch, terms, entropy, divide_by)
    kernel = _C.forward
    scores, outputs = _outputs(batch, terms, entropy, divide_by)
    c_batch, c_terms = _batch(batch), _terms(terms)
    _run(lambda checked: kernel(c_batch, c_terms, outputs, checked), batch, terms, scores)
    return scores


def _empty_gradient(batch: Batch, inplace: bool) -> Tensor:
    if inplace:
        return batch.logits.detach()
    return torch.empty_like(batch.logits, memory_format=torch.contiguous_format)


def backward(
    batch: Batch, lse: Tensor, weight: Tensor, factor: float, inplace: bool, upstream: Tensor | None = None
) -> Tensor:
    """dz = weight * factor * upstream * (softmax - onehot) through scale and softcap; -A/B * grad_output of the loss.

    ``upstream`` (0-d fp64) is read where it lies. Written over the logits if ``inplace``, else into a new contiguous
    tensor. Like every write over the logits it counts as a change to them, so that a second use of their values raises
    PyTorch's own error.
    """
    dz = _empty_gradient(batch, inplace)
    weight = weight.contiguous()
    if on_triton(dz):
        from .triton import launch

        launch.backward(batch, lse, weight * factor * (1.0 if upstream is None else upstream), dz)
        if inplace:
            increment_version(batch.logits)
        return dz
    assert _C is not None
    arguments = (_batch(batch), lse.data_ptr(), weight.data_ptr(), factor, _pointer(upstream), dz.data_ptr(),
                 *_strides(dz, batch))  # fmt: skip
    if on_cuda(dz):
        _C.cuda.backward(*arguments, _C.cuda.Workspace(*cuda.stream_of(dz), 0, 0, 0))
    else:
        _C.backward(*arguments)
    if inplace:
        increment_version(batch.logits)
    return dz


def forward_backward(
    batch: Batch, terms: Terms, entropy: bool, divide_by: float, expected: float, inplace: bool
) -> tuple[Scores, Tensor]:
    """``forward`` and ``backward`` in one pass, for ``terms.weight_known``: the gradient of ``expected * total``.

    Raises:
        ValueError: as ``forward``; on the CPU a weight beyond fp32's range is found before a row is touched.
    """
    checks.check_memory(batch.logits)
    dz = _empty_gradient(batch, inplace)
    if on_triton(dz):
        scores = _triton_forward(batch, terms, entropy, divide_by, expected / divide_by, dz)
        if inplace:
            increment_version(batch.logits)
        return scores, dz
    assert _C is not None
    gradient = (expected / divide_by, dz.data_ptr(), *_strides(dz, batch))
    if on_cuda(dz):
        overwrites = batch.logits if inplace else None
        return _queue("forward_backward", batch, terms, entropy, divide_by, *gradient, overwrites=overwrites), dz
    kernel = _C.forward_backward
    scores, outputs = _outputs(batch, terms, entropy, divide_by)
    c_batch, c_terms = _batch(batch), _terms(terms)

    def call(checked: bool) -> Status:
        status: Status = kernel(c_batch, c_terms, outputs, checked, *gradient)
        if inplace and status[0] not in (_BAD_WEIGHT, _UNUSUAL):
            increment_version(batch.logits)
        return status

    _run(call, batch, terms, scores)
    return scores, dz


def _scale(c_batch: object, dz: Tensor, factor: float, upstream: Tensor, strides: tuple[int, int]) -> None:
    assert _C is not None
    arguments = (c_batch, factor, upstream.data_ptr(), dz.data_ptr(), *strides)
    if on_cuda(dz):
        _C.cuda.scale(*arguments, _C.cuda.Workspace(*cuda.stream_of(dz), 0, 0, 0))
    else:
        _C.scale(*arguments)


def scale_(batch: Batch, dz: Tensor, factor: float, upstream: Tensor) -> None:
    """dz *= factor * upstream on scored rows; the others are zero. ``upstream`` (0-d fp64) is read where it lies, and
    where the product is 1 nothing else is. ``batch`` says how rows are cut, its logits are not read.
    """
    if on_triton(dz):
        from .triton import launch

        launch.scale(batch, dz, (factor * upstream.double()).expand(batch.n_sequences).contiguous())
        return
    _scale(_batch(batch), dz, factor, upstream, _strides(dz, batch))


def scale_all_(x: Tensor, factor: float, upstream: Tensor) -> None:
    """x *= factor * upstream, x contiguous; ``upstream`` as in ``scale_``."""
    if x.numel() == 0:
        return
    v = x.shape[-1]
    n = x.numel() // v
    if on_triton(x):
        rows = Batch(x.view(1, n, v), torch.empty(n, device=x.device), None, 1, n, 1.0, 0.0)
        scale_(rows, x.view(1, n, v), factor, upstream)
        return
    assert _C is not None
    c_batch = _C.Batch(DTYPES[x.dtype], 0, 1, n, n, 0, v, 0, 0, v, 1.0, 0.0, torch.get_num_threads())
    _scale(c_batch, x, factor, upstream, (0, v))


def sample(draws: Draws, uniforms: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """tokens (N,) int64 and log_prob (N,) fp64, in one read of the rows. ``uniforms`` (N,) fp64 replaces the generator.

    Raises:
        ValueError: a row that is no distribution. CUDA raises it under DMFAST_SYNC_CHECKS=1 only; such a row gets token
            0 and log_prob NaN.
    """
    logits = draws.logits
    checks.check_memory(logits)
    if on_triton(logits):
        from .triton import launch

        tokens, log_prob, status = launch.draw(draws, uniforms)
        cuda.settle_draws(draws, status)
        return tokens, log_prob
    assert _C is not None
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    log_prob = torch.empty_like(tokens, dtype=torch.float64)
    first = (
        DTYPES[logits.dtype], logits.data_ptr(), logits.shape[0], logits.stride(0), logits.shape[1], draws.scale,
        draws.softcap, draws.seed, _pointer(draws.row_ids), draws.step, _pointer(uniforms),
    )  # fmt: skip
    if on_cuda(logits):
        work = cuda.make_workspace(logits, 0, 1)
        _C.cuda.sample(*first, tokens.data_ptr(), log_prob.data_ptr(), _C.cuda.Workspace(*work.arguments))
        if logits.shape[0]:
            cuda.settle_draws(draws, work.status)
        return tokens, log_prob
    bad = _C.sample(*first, torch.get_num_threads(), tokens.data_ptr(), log_prob.data_ptr())
    if bad >= 0:
        checks.raise_bad_draw(draws, bad)
    return tokens, log_prob


def loss_from_scores(
    batch: Batch, scores: Scores, terms: Terms, reduction: str, divide_by: float, first_sequence: int = 0
) -> DMLossOutput:
    """``eager.loss_from_scores``, which on CUDA puts off what the host would have to wait for."""
    if not records(batch.logits):
        return eager.loss_from_scores(
            batch, scores, terms, reduction, divide_by, lambda weight: checks.check_weights(weight, first_sequence)
        )
    made: list[Tensor] = []

    def usable(weight: Tensor) -> Tensor:
        made.append(weight)
        return cuda.usable(weight, scores.log_prob.detach(), terms)

    out = eager.loss_from_scores(batch, scores, terms, reduction, divide_by, usable)
    out._recorded = cuda.settle(cuda.WeightFaults(scores.recorded, terms, made[0], first_sequence))
    return out


def weighed(batch: Batch, scores: Scores, terms: Terms, divide_by: float, first_sequence: int = 0) -> Scores:
    """Scores of log pi with what ``forward`` makes of it under ``terms``, here in torch."""
    out = loss_from_scores(batch, scores, terms, "none", 1.0, first_sequence)
    none = torch.zeros_like(scores.log_prob)
    u = none if out.log_target_ratio is None else out.log_target_ratio
    rho = none if out.log_ratio is None else out.log_ratio
    return Scores(
        scores.lse, scores.log_prob, scores.entropy, rho, u, out.weight, out.loss, out.loss.sum() / divide_by,
        out.n_clipped, out._recorded,
    )  # fmt: skip


def weigh(terms: Terms, log_prob: float, log_proposal: float, log_target: float, log_z: float, reward: float,
          log_base: float, baseline: float) -> tuple[float, float, float, bool, bool]:  # fmt: skip
    """csrc/objective.h for one sequence: log_ratio, log_target_ratio, weight, clipped, out_of_range."""
    assert _C is not None
    result = _C.weigh(_terms(terms), log_prob, log_proposal, log_target, log_z, reward, log_base, baseline)
    return tuple(result)
