"""Define what a backend is, and what all backends share.

A backend runs the row kernels on checked batches. ``select`` (``kernels/__init__.py``) chooses one for the logits of a
call, once. No other code asks which device a tensor is on to choose a kernel.
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
        records_faults: whether the device records bad values, which ``out.check()`` reads later. If not, they are
            raised at once.
        forms_weight: whether its kernels form A and report its faults. If not, torch does so in ``form.py``.
        in_torch: whether its forward consists of torch operations on the logits, which autograd follows.
    """

    name: str
    records_faults: bool
    forms_weight: bool
    in_torch: bool

    def why_not(self, device: torch.device | None, dtype: torch.dtype | None = None) -> str | None:
        """Return None if it can run on a device with logits of a dtype, else the reason why not.

        Where device or dtype is None, the answer does not depend on it.
        """
        ...

    def detail(self) -> str:
        """Return a description of the logits that it takes, for ``backends()``."""
        ...

    def forward(self, batch: Batch, terms: Terms | None, entropy: bool, divide_by: float = 1.0) -> Scores:
        """Return the scores of the rows and sequences, in one read of the scored rows.

        Args:
            batch: may be a shard where ``terms`` is None.
            terms: the inputs of the sequences, with an ``Objective``; None to score only.
            entropy: whether the entropy of the rows is wanted. It must be where ``terms`` have a coefficient for it.
            divide_by: the divisor of ``total``.

        Raises:
            ValueError: as ``faults.check_rows`` and ``check_terms``; NaN or +inf in a scored row, a label logit of
                -inf, a weight beyond fp32's range. A backend that records faults does not raise: it returns in
                ``recorded`` the checks that will. Such a sequence has log_prob NaN and weight 0.
        """
        ...

    def backward(
        self, batch: Batch, lse: Tensor, weight: Tensor, factor: float, dz: Tensor, upstream: Tensor | None = None,
        unless: float | None = None, bonus: Bonus | None = None,
    ) -> None:  # fmt: skip
        """Write dz = factor * upstream * (weight * w * d(-log-softmax) - bonus.weight * dH).

        Here w is the token weight of the row, or 1. The kernel reads and writes each logit once.

        Args:
            batch: may be a shard.
            lse: (rows,) fp64, the log-sum-exps over the whole vocabulary.
            weight: (B,) fp64, contiguous.
            factor: a number known to the host.
            dz: the destination; ``check_gradient`` says what it may be.
            upstream: 0-d fp64, on the device of the logits, which reads it there.
            unless: the upstream for which dz holds its gradient already. Then nothing is read or written.
            bonus: the bonus of the entropy. A row has it even where ``weight`` or w is 0.
        """
        ...

    def backward_of(
        self, batch: Batch, scores: Scores, factor: float, dz: Tensor, upstream: Tensor, unless: float | None = None,
        bonus: Bonus | None = None,
    ) -> None:  # fmt: skip
        """Do ``backward`` with the log-sum-exps and the weights of scores that ``forward`` has returned.

        Args:
            batch: the batch of the forward. Its tensors may be copies.
            scores: the scores, with A.
            factor, dz, upstream, unless, bonus: as in ``backward``. ``dz`` has the dtype of the logits.
        """
        ...

    def forward_backward(
        self, batch: Batch, terms: Terms, entropy: bool, divide_by: float, factor: float, dz: Tensor
    ) -> Scores:
        """Return ``forward``'s scores and write the gradient of ``factor`` times the sum of the losses, in one pass.

        It is only called where ``terms.weight_known`` holds. ``check_gradient`` says what ``dz`` may be.

        Raises:
            ValueError: as ``forward``. The CPU finds a weight beyond fp32's range before it touches a row.
        """
        ...

    def scale(self, batch: Batch, dz: Tensor, factor: float, upstream: Tensor) -> None:
        """Multiply dz by factor * upstream on scored rows. The other rows are zero already.

        The device reads ``upstream`` (0-d fp64), and reads no gradient if the product is 1. ``batch`` says where the
        rows lie; its logits are not read.
        """
        ...

    def scale_matrix(self, x: Tensor, factor: float, upstream: Tensor) -> None:
        """Multiply a contiguous tensor by factor * upstream, as ``scale`` does."""
        ...

    def sample(self, rows: SampleRows, uniforms: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return tokens (N,) int64, log_prob (N,) fp64, and a status.

        The status is None where faults are raised at once. Otherwise it is 0-d: the first bad row, or -1 for none. The
        rows are read once. ``uniforms`` (N,) fp64 replaces the generator in tests.

        Raises:
            ValueError: a row is not a distribution. A backend that records faults gives such a row token 0 and
                log_prob NaN instead.
        """
        ...


class BackwardOfScores:
    """A base class with ``backward_of`` for backends whose ``backward`` may take two views of the scores."""

    def backward_of(
        self: Backend, batch: Batch, scores: Scores, factor: float, dz: Tensor, upstream: Tensor,
        unless: float | None = None, bonus: Bonus | None = None,
    ) -> None:  # fmt: skip
        """Write the gradient; see ``Backend``."""
        self.backward(batch, scores.lse, scores.weight, factor, dz, upstream, unless, bonus)


def new_gradient(batch: Batch, inplace: bool) -> Tensor:
    """Return the destination of the gradient of the logits: the logits themselves, or a new contiguous tensor."""
    if inplace:
        return batch.logits.detach()
    return torch.empty_like(batch.logits, memory_format=torch.contiguous_format)


def check_gradient(batch: Batch, dz: Tensor) -> None:
    """Raise where the gradient of a batch can't be written to dz.

    dz may be the logits themselves or a tensor of their shape and dtype. For fp32 logits it may also be bf16 or fp16;
    then the fp32 values are rounded once. A 16-bit gradient in the memory of fp32 logits would be a race on a GPU:
    gradients 2i and 2i + 1 overwrite logit i, which another thread may not have read yet. So every device refuses it.

    Args:
        batch: the batch of the logits.
        dz: the destination.

    Raises:
        TypeError: dz has a dtype that it may not have.
        ValueError: dz has another shape, or it shares the memory of the logits but not their dtype.
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
    """Return the address of a tensor's first element and the address after its last."""
    if x.numel() == 0:
        return 0, 0
    first = x.data_ptr()
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return first, first + (last + 1) * x.element_size()


def overwritten(batch: Batch, dz: Tensor) -> None:
    """Count a gradient in place as a change of the logits, so that PyTorch refuses a second use of their values."""
    if dz.data_ptr() == batch.logits.data_ptr() and dz.numel():
        increment_version(batch.logits)
