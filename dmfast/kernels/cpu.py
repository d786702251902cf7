"""Run the compiled CPU kernels (``csrc/cpu``). Bad values are raised at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..objectives import Terms
from . import extension, faults, products
from .backend import check_gradient, overwritten
from .batch import Batch, Bonus, SampleRows, Scores
from .form import with_token_weight


class Cpu:
    """The backend ``cpu``."""

    name = "cpu"
    records_faults = False
    forms_weight = True
    in_torch = False

    def why_not(self, device: torch.device | None, dtype: torch.dtype | None = None) -> str | None:
        """Return None where it can run, else the reason."""
        missing = extension.why_not()
        if device is not None and device.type != "cpu":
            return f"logits are on {device}, for which backend 'cpu' has no kernel"
        return missing if missing is not None or dtype is None else extension.why_not_dtype(dtype)

    def detail(self) -> str:
        """Return a description of the logits that it takes."""
        return (
            f"fp32, bf16 and fp16 logits on the CPU; instruction set {instruction_set()}; {products.on_this_cpu()}. "
            "Under torch.compile a gradient in place goes through a functional graph, where AOTAutograd may copy the "
            "logits once, and known weights take two passes"
        )

    def forward(self, batch: Batch, terms: Terms | None, entropy: bool, divide_by: float = 1.0) -> Scores:
        """Return the scores; see ``Backend``."""
        assert extension._C is not None
        assert terms is None or not batch.is_shard
        scores, c_batch, c_terms, outputs = _prepare(batch, terms, entropy, divide_by)
        _run(extension._C.forward, c_batch, c_terms, outputs, batch, terms, scores)
        if batch.is_shard:
            scores.sequences.fill_(math.nan)
        return with_token_weight(batch, terms, scores, divide_by)

    def backward(
        self, batch: Batch, lse: Tensor, weight: Tensor, factor: float, dz: Tensor, upstream: Tensor | None = None,
        unless: float | None = None, bonus: Bonus | None = None,
    ) -> None:  # fmt: skip
        """Write the gradient; see ``Backend``."""
        assert extension._C is not None
        if upstream is not None and unless is not None and float(upstream) == unless:
            return
        check_gradient(batch, dz)
        extension._C.backward(
            extension.batch_struct(batch), lse.data_ptr(), weight.data_ptr(), *extension.bonus_pointers(bonus), factor,
            extension.pointer(upstream), *extension.gradient_arguments(dz, batch),
        )  # fmt: skip
        overwritten(batch, dz)

    def backward_of(
        self, batch: Batch, scores: Scores, factor: float, dz: Tensor, upstream: Tensor, unless: float | None = None,
        bonus: Bonus | None = None,
    ) -> None:  # fmt: skip
        """Write the gradient of what ``forward`` scored; see ``Backend``."""
        assert extension._C is not None
        if unless is not None and float(upstream) == unless:
            return
        c_batch, outputs = scores.kept
        starts = batch.cu_seqlens
        if not c_batch.reads(batch.logits.data_ptr(), batch.tokens.data_ptr(), extension.pointer(starts)):
            c_batch = extension.batch_struct(batch)  # hooks on saved tensors have returned copies
        extension._C.backward_of(
            c_batch, outputs, *extension.bonus_pointers(bonus), factor, upstream.data_ptr(),
            *extension.gradient_arguments(dz, batch),
        )  # fmt: skip
        overwritten(batch, dz)

    def forward_backward(
        self, batch: Batch, terms: Terms, entropy: bool, divide_by: float, factor: float, dz: Tensor
    ) -> Scores:
        """Return the scores and write the gradient; see ``Backend``."""
        assert extension._C is not None and not batch.is_shard
        check_gradient(batch, dz)
        scores, c_batch, c_terms, outputs = _prepare(batch, terms, entropy, divide_by)
        gradient = extension.gradient_arguments(dz, batch)

        def kernel(*arguments: Any) -> tuple[int, int]:
            status: tuple[int, int] = extension._C.forward_backward(*arguments, factor, *gradient)  # type: ignore[union-attr]
            if status[0] not in (extension.BAD_WEIGHT, extension.UNUSUAL):
                overwritten(batch, dz)  # even if one row had a fault, since others are written by then
            return status

        _run(kernel, c_batch, c_terms, outputs, batch, terms, scores)
        return with_token_weight(batch, terms, scores, divide_by)

    def scale(self, batch: Batch, dz: Tensor, factor: float, upstream: Tensor) -> None:
        """Multiply a gradient; see ``Backend``."""
        assert extension._C is not None
        extension._C.scale(
            extension.batch_struct(batch), factor, upstream.data_ptr(), *extension.gradient_arguments(dz, batch)
        )

    def scale_matrix(self, x: Tensor, factor: float, upstream: Tensor) -> None:
        """Multiply a matrix; see ``Backend``."""
        assert extension._C is not None
        if x.numel():
            extension._C.scale(*extension.matrix_arguments(x, factor, upstream))

    def sample(self, rows: SampleRows, uniforms: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return tokens and their log_prob; see ``Backend``."""
        assert extension._C is not None
        tokens, log_prob = extension.make_sample_outputs(rows)
        first = extension.rows_arguments(rows, uniforms)
        bad = extension._C.sample(*first, torch.get_num_threads(), tokens.data_ptr(), log_prob.data_ptr())
        if bad >= 0:
            faults.raise_bad_draw(rows, bad)
        return tokens, log_prob, None


def instruction_set() -> str:
    """Return which build of the row kernels runs on this machine."""
    assert extension._C is not None
    return str(extension._C.instruction_set())


def _prepare(batch: Batch, terms: Terms | None, entropy: bool, divide_by: float) -> tuple[Scores, Any, Any, Any]:
    """Return empty scores, and the batch, terms and outputs as the kernels take them."""
    columns = 0 if terms is None or terms.columns is None else len(terms.columns)
    room = columns * batch.n_sequences
    scores, outputs, memory, used = extension.make_outputs(batch, terms, entropy, divide_by, room)
    c_batch = extension.batch_struct(batch)
    c_terms = extension.terms_struct(terms, (memory, used, batch.n_sequences))
    scores.kept = c_batch, outputs
    return scores, c_batch, c_terms, outputs


def _run(
    kernel: Callable[..., tuple[int, int]], c_batch: Any, c_terms: Any, outputs: Any, batch: Batch,
    terms: Terms | None, scores: Scores,
) -> None:  # fmt: skip
    """Call a kernel, and raise what it finds.

    The last argument of the kernel says whether the values of batch and terms have been checked. The kernel notices
    unusual values at no cost. Only then are they checked here, and the kernel is called again.
    """
    fault, at = kernel(c_batch, c_terms, outputs, False)
    if fault == 0:
        return
    if fault == extension.UNUSUAL:
        faults.check_rows(batch)
        if terms is not None:
            faults.check_terms(terms, batch.first_sequence)
        fault, at = kernel(c_batch, c_terms, outputs, True)
    if fault == extension.BAD_ROW:
        faults.raise_bad_row(batch, at)
    if fault == extension.BAD_LABEL:
        faults.raise_bad_label(batch, at)
    if fault == extension.BAD_WEIGHT:
        faults.raise_weight(at, scores.weight, batch.first_sequence)
