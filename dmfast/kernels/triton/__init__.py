"""The Triton kernels, for those who have no compiler, and for ROCm and XPU: the backend ``triton``. A is formed in
torch between its launches (``launch.py``). Importing this imports no triton.
"""

from __future__ import annotations

import math
import os
from functools import cache
from importlib import metadata, util

import torch
from torch import Tensor

from ... import objectives
from ...objectives import Terms
from .. import faults
from ..backend import BackwardOfScores, check_gradient, overwritten
from ..batch import Batch, Bonus, SampleRows, Scores
from ..extension import why_not_dtype
from ..form import form_loss
from ..fp64 import devices_without_fp64, has_fp64


def interpreted() -> bool:
    """Return whether TRITON_INTERPRET=1: Triton's interpreter runs the kernels on CPU tensors, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@cache
def _installed() -> str | None:
    if util.find_spec("triton") is None:
        return "triton is not installed; pip install 'dmfast[triton]'"
    version = metadata.version("triton") if _is_distribution("triton") else ""
    return None if version == "" or _numbers(version) >= (3, 6) else f"triton is {version}, dmfast needs 3.6 or newer"


def _is_distribution(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False  # triton also comes as pytorch-triton-rocm and pytorch-triton-xpu
    return True


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def devices() -> list[str]:
    """Return the types of the devices here that Triton has kernels for."""
    found = ["cuda"] if torch.cuda.is_available() else []  # ROCm's tensors too
    if any(has_fp64(torch.device("xpu", i)) for i in range(torch.xpu.device_count())):
        found.append("xpu")
    return [*found, "cpu"] if interpreted() else found


def why_not(device: torch.device | None = None) -> str | None:
    """Return None where the Triton kernels can run (on ``device``, or anywhere here), else the reason."""
    missing = _installed()
    if missing is not None:
        return missing
    if not devices():
        without = [name for name in devices_without_fp64() if name.startswith("xpu")]
        but = f" and that has fp64, which {', '.join(without)} lacks" if without else ""
        return f"there is no CUDA, ROCm or XPU device that torch can use{but}"
    if device is None:
        return None
    if device.type not in devices():
        return f"Triton has no kernels for {device.type} tensors"
    return None if has_fp64(device) else f"{device} has no fp64"


class Triton(BackwardOfScores):
    """The backend ``triton``."""

    name = "triton"
    records_faults = True
    forms_weight = False
    in_torch = False

    def why_not(self, device: torch.device | None, dtype: torch.dtype | None = None) -> str | None:
        """Return None where it can run, else the reason."""
        missing = why_not(device)
        if missing is not None:
            return missing if device is None else f"logits are on {device}; {missing}"
        return None if dtype is None else why_not_dtype(dtype)

    def detail(self) -> str:
        """Return what it takes."""
        where = "in its interpreter" if interpreted() else "on " + " and ".join(devices())
        return f"fp32, bf16 and fp16 logits {where}, where there are no CUDA kernels; checked as by cuda"

    def forward(self, batch: Batch, terms: Terms | None, entropy: bool, divide_by: float = 1.0) -> Scores:
        """Return the scores; see ``Backend``."""
        return self._forward(batch, terms, entropy, divide_by, None, None)

    def _forward(
        self, batch: Batch, terms: Terms | None, entropy: bool, divide_by: float, weights: Tensor | None,
        dz: Tensor | None, bonuses: Tensor | None = None,
    ) -> Scores:  # fmt: skip
        """Return ``forward``'s scores and, with ``dz``, write the gradient of the sum of -weights log pi - bonuses H
        there."""
        from . import launch  # triton is imported where it is used

        if dz is not None:
            check_gradient(batch, dz)
        scores, fault = launch.score(batch, entropy, weights, dz, bonuses)
        if dz is not None:
            overwritten(batch, dz)
        worst = fault.min() if fault.numel() else fault.new_full((), launch.NONE)
        status = torch.where(worst == launch.NONE, -1, worst)
        check = faults.device_faults(batch, None, scores.log_prob, status)
        scores = scores.replaced(recorded=faults.read_later(check))
        if terms is not None:
            return form_loss(batch, scores.rows, scores.log_prob, scores.entropy, terms, divide_by, True,
                             scores.recorded)  # fmt: skip
        if batch.is_shard:
            scores.sequences.fill_(math.nan)
        return scores

    def backward(
        self, batch: Batch, lse: Tensor, weight: Tensor, factor: float, dz: Tensor, upstream: Tensor | None = None,
        unless: float | None = None, bonus: Bonus | None = None,
    ) -> None:  # fmt: skip
        """Write the gradient; see ``Backend``."""
        from . import launch

        check_gradient(batch, dz)
        there = None if upstream is None or unless is None else (upstream == unless).to(torch.int32)
        given = 1.0 if upstream is None else upstream
        if bonus is not None:
            bonus = Bonus(bonus.entropy, bonus.weight * factor * given)
        launch.backward(batch, lse, weight * factor * given, dz, there, bonus)
        overwritten(batch, dz)

    def forward_backward(
        self, batch: Batch, terms: Terms, entropy: bool, divide_by: float, factor: float, dz: Tensor
    ) -> Scores:
        """Return the scores and write the gradient; see ``Backend``."""
        stand_in = terms.log_proposal  # for log pi, on which a known weight does not depend
        if stand_in is None:
            stand_in = torch.zeros(batch.n_sequences, dtype=torch.float64, device=batch.logits.device)
        known = objectives.bounded_weights(terms, stand_in)
        weights = faults.zero_where_faulty(known, stand_in, terms) * factor
        coefficient = terms.entropy_coefficient
        bonuses = torch.full_like(weights, coefficient * factor) if coefficient else None
        return self._forward(batch, terms, entropy, divide_by, weights, dz, bonuses)

    def scale(self, batch: Batch, dz: Tensor, factor: float, upstream: Tensor) -> None:
        """Multiply a gradient; see ``Backend``."""
        from . import launch

        launch.scale(batch, dz, (factor * upstream.double()).expand(batch.n_sequences).contiguous())

    def scale_matrix(self, x: Tensor, factor: float, upstream: Tensor) -> None:
        """Multiply a matrix; see ``Backend``."""
        if x.numel() == 0:
            return
        v = x.shape[-1]
        n = x.numel() // v
        rows = x.view(1, n, v)
        self.scale(Batch(rows, torch.empty(n, device=x.device), None, 1, n, 1.0, 0.0), rows, factor, upstream)

    def sample(self, rows: SampleRows, uniforms: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return tokens and their log_prob; see ``Backend``."""
        from . import launch

        return launch.draw(rows, uniforms)
