"""The compiled CPU kernels (``csrc/cpu``): what is wrong with values is raised at once."""

from __future__ import annotations

import math
from collections.abc import Callable

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
        """Return what it takes."""
        return (
            f"fp32, bf16 and fp16 logits on the CPU; instruction set {instruction_set()}; "
            f"{products.on_this_cpu()}. Under torch.compile a "
            "gradient in place goes through a functional graph, where AOTAutograd may copy the logits once, and known "
            "weights take two passes"
        )

    def forward(self, batch: Batch, terms: Terms | None, entropy: bool, divide_by: float = 1.0) -> Scores:
        """Return the scores; see ``Backend``."""
        assert extension._C is not None
        assert terms is None or not batch.is_shard
        scores, outputs = extension.make_outputs(batch, terms, entropy, divide_by)
        kernel, c_batch, c_terms = extension._C.forward, extension.batch_struct(batch), extension.terms_struct(terms)
        _run(lambda checked: kernel(c_batch, c_terms, outputs, checked), batch, terms, scores)
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

    def forward_backward(
        self, batch: Batch, terms: Terms, entropy: bool, divide_by: float, factor: float, dz: Tensor
    ) -> Scores:
        """Return the scores and write the gradient; see ``Backend``."""
        assert extension._C is not None and not batch.is_shard
        check_gradient(batch, dz)
        scores, outputs = extension.make_outputs(batch, terms, entropy, divide_by)
        kernel, c_batch = extension._C.forward_backward, extension.batch_struct(batch)
        c_terms, gradient = extension.terms_struct(terms), extension.gradient_arguments(dz, batch)

        def call(checked: bool) -> tuple[int, int]:
            status: tuple[int, int] = kernel(c_batch, c_terms, outputs, checked, factor, *gradient)
            if status[0] not in (extension.BAD_WEIGHT, extension.UNUSUAL):
                overwritten(batch, dz)  # also where a row's fault was found among others that are written
            return status

        _run(call, batch, terms, scores)
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


def _run(call: Callable[[bool], tuple[int, int]], batch: Batch, terms: Terms | None, scores: Scores) -> None:
    """Call a kernel, and raise what it finds.

    The argument of ``call`` says whether the values of batch and terms have been checked. The kernel notices unusual
    values at no cost. Only then are they checked here, and the kernel is called again.
    """
    fault, at = call(False)
    if fault == extension.UNUSUAL:
        faults.check_rows(batch)
        if terms is not None:
            faults.check_terms(terms, batch.first_sequence)
        fault, at = call(True)
    if fault == extension.BAD_ROW:
        faults.raise_bad_row(batch, at)
    if fault == extension.BAD_LABEL:
        faults.raise_bad_label(batch, at)
    if fault == extension.BAD_WEIGHT:
        faults.raise_weight(at, scores.weight, batch.first_sequence)
