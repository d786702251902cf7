"""What a backend is, and what all of them share.

A backend runs the row kernels on checked batches. ``select`` (``kernels/__init__.py``) chooses one for the logits of a
call, once; nothing else asks whose tensor it has.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..objectives import Terms
from .batch import Batch, Bonus, SampleRows, Scores


class Backend(Protocol):
    """The row kernels for some devices.

    Attributes:
        name: what ``use_backend`` calls it.
        records_faults: whether what is wrong with values is recorded by the device and read later, by ``out.check()``;
            else it is raised at once.
        forms_weight: whether its kernels form A and tell of its faults; else torch does, in ``form.py``.
        in_torch: whether its forward is torch operations on the logits, through which autograd goes.
    """

    name: str
    records_faults: bool
    forms_weight: bool
    in_torch: bool

    def why_not(self, device: torch.device | None, dtype: torch.dtype | None = None) -> str | None:
        """Return None where it can run on a device with logits of a dtype, else the reason; of None: at all."""
        ...

    def detail(self) -> str:
        """Return what it takes, for ``backends()``."""
        ...

    def forward(self, batch: Batch, terms: Terms | None, entropy: bool, divide_by: float = 1.0) -> Scores:
        """Return the scores of the rows and sequences, in one read of the scored rows.

        Args:
            batch: may be a shard where ``terms`` is None.
            terms: None: only score. Else with an ``Objective``.
            entropy: whether that of the rows is wanted, as it is where ``terms`` have a coefficient for it.
            divide_by: what ``total`` is divided by.

        Raises:
            ValueError: as ``faults.check_rows`` and ``check_terms``; NaN or +inf in a scored row, a label logit of
                -inf, a weight beyond fp32's range. A backend that records faults returns what raises them in
                ``recorded``; such a sequence has log_prob NaN and weight 0.
        """
        ...

    def backward(
        self, batch: Batch, lse: Tensor, weight: Tensor, factor: float, dz: Tensor, upstream: Tensor | None = None,
        unless: float | None = None, bonus: Bonus | None = None,
    ) -> None:  # fmt: skip
        """Write dz = factor * upstream * (weight * w * d(-log-softmax) - bonus.weight * dH), w the token weight of the
        row, else 1: one read and one write per logit.

        Args:
            batch: may be a shard.
            lse: (rows,) fp64, of the whole vocabulary.
            weight: (B,) fp64, contiguous.
            factor: a number known to the host.
            dz: as ``check_gradient`` has it.
            upstream: 0-d fp64, read where it lies.
            unless: the upstream for which dz holds its gradient already; then nothing is read or written.
            bonus: that of the entropy. A row has it also where ``weight`` or w is 0.
        """
        ...

    def backward_of(
        self, batch: Batch, scores: Scores, factor: float, dz: Tensor, upstream: Tensor, unless: float | None = None,
        bonus: Bonus | None = None,
    ) -> None:  # fmt: skip
        """Do ``backward`` with the log-sum-exps and the weights of scores that ``forward`` has returned.

        Args:
            batch: that of the forward; its tensors may be copies.
            scores: with A.
            factor, dz, upstream, unless, bonus: as in ``backward``. ``dz`` has the dtype of the logits.
        """
        ...

    def forward_backward(
        self, batch: Batch, terms: Terms, entropy: bool, divide_by: float, factor: float, dz: Tensor
    ) -> Scores:
        """Return ``forward``'s scores and write the gradient of ``factor`` times the sum of the losses, in one pass.

        Only for ``terms.weight_known``. ``dz`` is as ``check_gradient`` has it.

        Raises:
            ValueError: as ``forward``; on the CPU a weight beyond fp32's range is found before a row is touched.
        """
        ...

    def scale(self, batch: Batch, dz: Tensor, factor: float, upstream: Tensor) -> None:
        """Multiply dz by factor * upstream on scored rows; the others are zero.

        ``upstream`` (0-d fp64) is read where it lies; where the product is 1 nothing else is. ``batch`` says how rows
        are cut; its logits are not read.
        """
        ...

    def scale_matrix(self, x: Tensor, factor: float, upstream: Tensor) -> None:
        """Multiply a contiguous tensor by factor * upstream, as ``scale`` does."""
        ...

    def sample(self, rows: SampleRows, uniforms: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return tokens (N,) int64, log_prob (N,) fp64, and where faults are recorded the first bad row, else -1, 0-d.

        One read of the rows. ``uniforms`` (N,) fp64 replaces the generator, for tests.

        Raises:
            ValueError: a row that is no distribution. A backend that records faults gives such a row token 0 and
                log_prob NaN.
        """
        ...


class BackwardOfScores:
    """The ``backward_of`` of a backend for whose ``backward`` two views are cheap."""

    def backward_of(
        self: Backend, batch: Batch, scores: Scores, factor: float, dz: Tensor, upstream: Tensor,
        unless: float | None = None, bonus: Bonus | None = None,
    ) -> None:  # fmt: skip
        """Write the gradient; see ``Backend``."""
        self.backward(batch, scores.lse, scores.weight, factor, dz, upstream, unless, bonus)


def new_gradient(batch: Batch, inplace: bool) -> Tensor:
    """Return where the gradient of the logits goes: the logits themselves, or a new contiguous tensor."""
    if inplace:
        return batch.logits.detach()
    return torch.empty_like(batch.logits, memory_format=torch.contiguous_format)


def check_gradient(batch: Batch, dz: Tensor) -> None:
    """Raise where the gradient of a batch can't be written to dz.

    It may be the logits themselves or a tensor of their shape and dtype; of fp32 logits also a bf16 or fp16 one, into
    which fp32 values are rounded once. In place of fp32 logits that would be a race on a GPU: gradients 2i and 2i + 1
    overwrite logit i, which another thread may not have read yet. So it is refused on every device.

    Args:
        batch: whose logits the gradient is of.
        dz: where it goes.

    Raises:
        TypeError: dz has another dtype.
        ValueError: dz has another shape, or another dtype than the logits and memory that is theirs.
    """
    z = batch.logits
    if dz.shape != z.shape:
        raise ValueError(f"dz must have the shape of the logits, {tuple(z.shape)}, got {tuple(dz.shape)}")
    if dz.dtype == z.dtype:
        return
    if z.dtype != torch.float32 or dz.dtype not in (torch.bfloat16, torch.float16):
        others = ", torch.bfloat16 or torch.float16" if z.dtype == torch.float32 else ""
        raise TypeError(f"dz must be {z.dtype}{others} for logits of {z.dtype}, got {dz.dtype}")
    (first, end), (first_dz, end_dz) = _span(z), _span(dz)
    if first < end_dz and first_dz < end:
        raise ValueError(
            f"dz ({dz.dtype}) lies in the memory of the logits ({z.dtype}), of which one thread would overwrite what "
            "another has yet to read; pass a tensor of its own, or for a gradient in place the logits themselves"
        )


def _span(x: Tensor) -> tuple[int, int]:
    """Return the first address of a tensor's elements and the one after its last."""
    if x.numel() == 0:
        return 0, 0
    first = x.data_ptr()
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return first, first + (last + 1) * x.element_size()


def overwritten(batch: Batch, dz: Tensor) -> None:
    """Count a gradient in place as a change to the logits, so that a second use of their values is PyTorch's error."""
    if dz.data_ptr() == batch.logits.data_ptr() and dz.numel():
        increment_version(batch.logits)
