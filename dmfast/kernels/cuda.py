"""Run the compiled CUDA kernels (``csrc/cuda``).

A call returns when its kernels are queued, and the device records faults. ``_C.cuda`` may also be a build of the same
kernels for the host (``scripts/ci/host_cuda.sh``), whose device is the CPU.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..objectives import Terms
from . import extension, faults
from .backend import BackwardOfScores, check_gradient, overwritten
from .batch import Batch, Bonus, SampleRows, Scores
from .form import with_token_weight


class Cuda(BackwardOfScores):
    """The backend ``cuda``."""

    name = "cuda"
    records_faults = True
    forms_weight = True
    in_torch = False

    @property
    def device_type(self) -> str | None:
        """The type of the devices that the kernels were built for; None where the kernels were not built."""
        if extension._C is None or not hasattr(extension._C, "cuda"):
            return None
        return str(extension._C.cuda.device_type)

    def why_not(self, device: torch.device | None, dtype: torch.dtype | None = None) -> str | None:
        """Return None where it can run, else the reason. Without a device it creates no context on any."""
        missing = extension.why_not()
        if missing is not None:
            return missing
        of_build = self.device_type
        if of_build is None:
            return (
                "dmfast was installed without its CUDA kernels (no nvcc at install time, or DMFAST_BUILD=cpu); "
                "reinstall with DMFAST_BUILD=cuda"
            )
        if device is None:
            # without a context the kernels can answer only the questions that need none, for device -1
            here = of_build == "cpu" or torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
            index = -1 if not here else 0 if of_build == "cpu" else torch.cuda.current_device()
            return why_not_on(index)
        if device.type != of_build:
            return f"logits are on {device}, for which backend 'cuda' has no kernel"
        missing = why_not_on(device.index or 0)
        return missing if missing is not None or dtype is None else extension.why_not_dtype(dtype)

    def detail(self) -> str:
        """Return a description of the logits that it takes."""
        return (
            "fp32, bf16 and fp16 logits on NVIDIA GPUs; what rows hold is checked by out.check(), or at once with "
            "DMFAST_SYNC_CHECKS=1"
        )

    def forward(self, batch: Batch, terms: Terms | None, entropy: bool, divide_by: float = 1.0) -> Scores:
        """Return the scores; see ``Backend``."""
        assert extension._C is not None
        assert terms is None or not batch.is_shard
        scores = _queue(extension._C.cuda.forward, batch, terms, entropy, divide_by)
        if batch.is_shard:
            scores.sequences.fill_(math.nan)
        return scores

    def backward(
        self, batch: Batch, lse: Tensor, weight: Tensor, factor: float, dz: Tensor, upstream: Tensor | None = None,
        unless: float | None = None, bonus: Bonus | None = None,
    ) -> None:  # fmt: skip
        """Write the gradient; see ``Backend``."""
        assert extension._C is not None
        check_gradient(batch, dz)
        read = _with_zeros(batch)
        extension._C.cuda.backward(
            extension.batch_struct(read), lse.data_ptr(), weight.data_ptr(), *extension.bonus_pointers(bonus), factor,
            extension.pointer(upstream), math.nan if unless is None else unless,
            *extension.gradient_arguments(dz, batch), _only_stream(dz),
        )  # fmt: skip
        overwritten(batch, dz)

    def forward_backward(
        self, batch: Batch, terms: Terms, entropy: bool, divide_by: float, factor: float, dz: Tensor
    ) -> Scores:
        """Return the scores and write the gradient; see ``Backend``."""
        assert extension._C is not None and not batch.is_shard
        check_gradient(batch, dz)
        gradient = (factor, *extension.gradient_arguments(dz, batch))
        return _queue(extension._C.cuda.forward_backward, batch, terms, entropy, divide_by, *gradient, dz=dz)

    def scale(self, batch: Batch, dz: Tensor, factor: float, upstream: Tensor) -> None:
        """Multiply a gradient; see ``Backend``."""
        assert extension._C is not None
        extension._C.cuda.scale(
            extension.batch_struct(batch), factor, upstream.data_ptr(), *extension.gradient_arguments(dz, batch),
            _only_stream(dz),
        )  # fmt: skip

    def scale_matrix(self, x: Tensor, factor: float, upstream: Tensor) -> None:
        """Multiply a matrix; see ``Backend``."""
        assert extension._C is not None
        if x.numel():
            extension._C.cuda.scale(*extension.matrix_arguments(x, factor, upstream), _only_stream(x))

    def sample(self, rows: SampleRows, uniforms: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return tokens and their log_prob; see ``Backend``."""
        assert extension._C is not None
        tokens, log_prob = extension.make_sample_outputs(rows)
        work = make_workspace(rows.logits, 0)
        first = extension.rows_arguments(rows, uniforms)
        extension._C.cuda.sample(*first, tokens.data_ptr(), log_prob.data_ptr(), work.struct)
        if not rows.logits.shape[0]:
            work.status.fill_(-1)  # no kernel was launched that would have written it
        return tokens, log_prob, work.status


@cache
def why_not_on(device: int) -> str | None:
    """Return why the kernels can't run on a device, or None. The answer is cached, since every call asks."""
    assert extension._C is not None
    return extension._C.cuda.why_not(device) or None


def stream_of(x: Tensor) -> tuple[int, int]:
    """Return the index of a tensor's device and the handle of the device's current stream."""
    if x.device.type == "cpu":
        return 0, 0
    stream = torch.cuda.current_stream(x.device)
    return stream.device.index, stream.cuda_stream


def _only_stream(x: Tensor) -> Any:
    """Return a workspace without memory, for a kernel that needs only its stream."""
    assert extension._C is not None
    return extension._C.cuda.Workspace(*stream_of(x), 0, 0, 0)


class Workspace(NamedTuple):
    """The memory of one call.

    The caller keeps it until the kernel is queued. torch's allocator does not reuse it before the kernel has run.
    """

    device: int
    stream: int
    faults: Tensor
    counters: Tensor
    status: Tensor  # 0-d int64

    @property
    def struct(self) -> Any:
        """The workspace in the form that the kernels take."""
        assert extension._C is not None
        pointers = (self.faults.data_ptr(), self.counters.data_ptr(), self.status.data_ptr())
        return extension._C.cuda.Workspace(self.device, self.stream, *pointers)


def make_workspace(x: Tensor, n_sequences: int, n_rows: int = 0) -> Workspace:
    """Return memory on the device of x, for its current stream.

    If there are few rows, there is also memory for the parts into which the kernels may divide each of them.

    The counters are new in every call, which costs a memset of a few KB. Kept counters would be shared by streams and
    by graphs that may be replayed on any stream, and torch.compile's memory pools may take them back.
    """
    assert extension._C is not None
    like: dict[str, Any] = {"device": x.device}
    few = n_rows if n_rows <= extension._C.cuda.few_rows else 0
    return Workspace(
        *stream_of(x),
        torch.empty(n_sequences + few * extension._C.cuda.most_parts * 2, dtype=torch.int64, **like),
        torch.zeros(n_sequences + 1 + few, dtype=torch.int32, **like),
        torch.empty((), dtype=torch.int64, **like),
    )


def _with_zeros(batch: Batch) -> Batch:
    """Return the batch with token weights that a kernel may read. The caller keeps it until the kernel is queued."""
    w = batch.token_weight
    return batch if w is None else batch._replace(token_weight=faults.with_zeros(w))


def _queue(kernel: Any, batch: Batch, terms: Terms | None, entropy: bool, divide_by: float, *gradient: float,
           dz: Tensor | None = None) -> Scores:  # fmt: skip
    """Queue a kernel on the stream of the logits, and return the scores that it will fill."""
    given, batch = batch, _with_zeros(faults.with_order(batch))
    scores, outputs, _, _ = extension.make_outputs(batch, terms, entropy, divide_by)
    work = make_workspace(batch.logits, batch.n_sequences, batch.n_rows)
    kernel(extension.batch_struct(batch), extension.terms_struct(terms), outputs, *gradient, work.struct)
    if dz is not None:
        overwritten(given, dz)
    check = faults.device_faults(given, terms, scores.log_prob, work.status)
    scores = with_token_weight(given, terms, scores, divide_by)
    return scores.replaced(recorded=faults.read_later(check))
