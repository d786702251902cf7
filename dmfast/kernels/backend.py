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
        """Write dz = factor * upstream * (weight * d(-log-softmax) - bonus.weight * dH): one read and one write per
        logit.

        Args:
            batch: may be a shard.
            lse: (rows,) fp64, of the whole vocabulary.
            weight: (B,) fp64, contiguous.
            factor: a number known to the host.
            dz: like the logits, or the logits themselves.
            upstream: 0-d fp64, read where it lies.
            unless: the upstream for which dz holds its gradient already; then nothing is read or written.
            bonus: that of the entropy. A row has it also where ``weight`` is 0.
        """
        ...

    def forward_backward(
        self, batch: Batch, terms: Terms, entropy: bool, divide_by: float, factor: float, dz: Tensor
    ) -> Scores:
        """Return ``forward``'s scores and write the gradient of ``factor`` times the sum of the losses, in one pass.

        Only for ``terms.weight_known``.

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


def new_gradient(batch: Batch, inplace: bool) -> Tensor:
    """Return where the gradient of the logits goes: the logits themselves, or a new contiguous tensor."""
    if inplace:
        return batch.logits.detach()
    return torch.empty_like(batch.logits, memory_format=torch.contiguous_format)


def overwritten(batch: Batch, dz: Tensor) -> None:
    """Count a gradient in place as a change to the logits, so that a second use of their values is PyTorch's error."""
    if dz.data_ptr() == batch.logits.data_ptr() and dz.numel():
        increment_version(batch.logits)
