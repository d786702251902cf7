"""The losses on hidden states and a head, whose logits never exist at once: chunk by chunk into one buffer.

Matrix products are torch's; between them run the row kernels of ``native.py``. A chunk holds whole sequences, so that
log pi, and with it A, is known inside it: logits = H W^T, the kernel's forward, its backward over the logits,
dH = dZ W, dW += dZ^T H. That is three products and no logit is computed twice, the least for which all three gradients
can be had. A sequence longer than the buffer, and a loss whose grad_output is not known before backward, take two
phases, and so a fourth product. Rows that are not scored are packed out before the first product. A frozen head costs
neither its product nor a V x D buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from ..objectives import Terms
from . import checks, native
from .autograd import apply, once
from .batch import Batch, Part, Scores

_CHUNK_BYTES, _GPU_ROWS = 2**27, 4096
_HAS_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype")
_ADDS_IN_FP32 = TorchVersion(torch.__version__) >= "2.11"  # addmm with out_dtype to an fp32 matrix: pytorch#167931


class Job(NamedTuple):
    """Which rows are scored, and how they are cut."""

    whole: Batch  # of the call; its logits are a stand-in with the shape, dtype and device that logits would have
    rows: Tensor | None  # (M,) the scored rows among all; None: all of them
    labels: Tensor  # (M,)
    starts: Tensor  # (B+1,) where each sequence starts among the M
    bounds: list[int]  # the same, read once: on a device the host has to wait for it
    chunk_rows: int

    def groups(self) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
        """Sequences [i, j) that go through the buffer together, and the rows [first, last) of them. Several such where
        one sequence is longer than the buffer."""
        starts = self.bounds
        n, i = len(starts) - 1, 0
        while i < n:
            j = i + 1
            while j < n and starts[j + 1] - starts[i] <= self.chunk_rows:
                j += 1
            first, last = starts[i], starts[j]
            cuts = range(first, max(last, first + 1), self.chunk_rows)
            yield i, j, [(cut, min(cut + self.chunk_rows, last)) for cut in cuts]
            i = j

    def part(self, i: int, j: int, first: int, last: int, logits: Tensor) -> Batch:
        """Rows [first, last) of sequences [i, j) as a packed batch."""
        starts = (self.starts[i : j + 1] - first).clamp(0, last - first)
        rows = torch.arange(first, last, device=self.labels.device) if self.rows is None else self.rows[first:last]
        return Batch(logits, self.labels[first:last], starts, j - i, 0, self.whole.scale, self.whole.softcap,
                     Part(self.whole, rows, i))  # fmt: skip


def rows_of_buffer(vocab: int, itemsize: int, device: torch.device, chunk_bytes: int | None) -> int:
    """How many rows of logits the buffer holds: what was asked for; by default what adding to dW once a buffer is cheap
    beside. On a GPU, whose products outrun its memory, that takes more rows."""
    row = vocab * itemsize
    if chunk_bytes is not None:
        return max(chunk_bytes // row, 1)
    return max(_CHUNK_BYTES // row, 1 if device.type == "cpu" else _GPU_ROWS)


def make_job(whole: Batch, chunk_bytes: int | None) -> Job:
    """Packs out the rows that are not scored."""
    scored = whole.labels != checks.IGNORE
    before = torch.cat([scored.new_zeros(1, dtype=torch.int64), scored.cumsum(0)])
    firsts = whole.cu_seqlens
    if firsts is None:
        firsts = torch.arange(whole.n_sequences + 1, device=scored.device) * whole.steps
    rows = None if bool(scored.all()) else scored.nonzero()[:, 0]
    labels = whole.labels if rows is None else whole.labels[rows]
    starts = before[firsts]
    held = rows_of_buffer(whole.vocab, whole.logits.itemsize, whole.logits.device, chunk_bytes)
    return Job(whole, rows, labels, starts, starts.tolist(), held)


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, or where it is the ``first`` total = a @ b; total in fp32, and nothing rounded to less.

    On CUDA torch multiplies 16-bit operands into fp32 itself. Elsewhere they are widened: a copy of the chunk, no
    larger than twice the buffer, where the product as a matrix of its own would be as large as ``total``. From torch
    2.8 to 2.10 on CUDA there is such a matrix.
    """
    beta = 0 if first else 1  # 0: what total holds is not read
    if a.dtype == torch.float32:
        total.addmm_(a, b, beta=beta)
    elif a.device.type == "cuda" and torch.version.hip is None and _HAS_OUT_DTYPE:
        if _ADDS_IN_FP32:
            torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)
        elif first:
            torch.mm(a, b, out_dtype=torch.float32, out=total)
        else:
            total.add_(torch.mm(a, b, out_dtype=torch.float32))
    else:
        total.addmm_(a.float(), b.float(), beta=beta)


class _Products:
    """The products with the head, through one buffer, and the gradients that they add up to."""

    def __init__(self, job: Job, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, ...]) -> None:
        self.job, self.weight, self.bias = job, weight, bias
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        longest = max((last - first for *_, cuts in job.groups() for first, last in cuts), default=0)
        self.buffer = hidden.new_empty(longest, weight.shape[0])
        self.wants_weight = wanted[1]
        # with no row left out the products fill all of it
        empty = torch.empty_like if job.rows is None else torch.zeros_like
        self.d_hidden = empty(self.hidden) if wanted[0] else None
        self.d_weight: Tensor | None = None  # fp32, from the first chunk on
        self.d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None

    def logits(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """H and H W^T + b of rows [first, last)."""
        rows = self.job.rows
        h = self.hidden[first:last] if rows is None else self.hidden.index_select(0, rows[first:last])
        z = self.buffer[: last - first]
        if self.bias is None:
            torch.mm(h, self.weight.t(), out=z)
        else:
            torch.addmm(self.bias, h, self.weight.t(), out=z)
        return h, z

    def add(self, first: int, last: int, h: Tensor, dz: Tensor) -> None:
        """The gradients of rows [first, last)."""
        rows = self.job.rows
        if self.d_hidden is not None:
            if rows is None:
                torch.mm(dz, self.weight, out=self.d_hidden[first:last])
            else:
                self.d_hidden.index_copy_(0, rows[first:last], dz @ self.weight)
        if self.wants_weight:
            first_chunk = self.d_weight is None
            if self.d_weight is None:
                self.d_weight = self.weight.new_empty(self.weight.shape, dtype=torch.float32)
            add_product(self.d_weight, dz.t(), h, first_chunk)
        if self.d_bias is not None:
            self.d_bias.add_(dz.sum(0, dtype=torch.float32))

    def gradients(self, hidden: Tensor) -> list[Tensor | None]:
        """Of hidden states, weight and bias, in their dtypes."""
        d_hidden = None if self.d_hidden is None else self.d_hidden.view(hidden.shape)
        d_weight = None
        if self.wants_weight:
            d_weight = torch.zeros_like(self.weight) if self.d_weight is None else self.d_weight.to(self.weight.dtype)
        d_bias = None if self.d_bias is None or self.bias is None else self.d_bias.to(self.bias.dtype)
        return [d_hidden, d_weight, d_bias]


def _slice(terms: Terms, i: int, j: int) -> Terms:
    def cut(x: Any) -> Any:
        return x[i:j] if isinstance(x, Tensor) else x

    return Terms(terms.objective, terms.on_policy, terms.max_weight, cut(terms.log_proposal), cut(terms.log_target),
                 cut(terms.log_z), cut(terms.reward), cut(terms.log_base), cut(terms.baseline))  # fmt: skip


def _score_long(job: Job, products: _Products, i: int, cuts: list[tuple[int, int]], terms: Terms | None, entropy: bool,
                divide_by: float) -> Scores:  # fmt: skip
    """Scores of sequence i, which is longer than the buffer."""
    parts = [native.forward(job.part(i, i + 1, *cut, products.logits(*cut)[1]), None, entropy) for cut in cuts]
    lse, log_prob = torch.cat([part.lse for part in parts]), torch.stack([part.log_prob for part in parts]).sum(0)
    h = torch.stack([part.entropy for part in parts if part.entropy is not None]).sum(0) if entropy else None
    scores = Scores(lse, log_prob, h, recorded=tuple(check for part in parts for check in part.recorded))
    if terms is None:
        return scores
    return native.weighed(job.part(i, i + 1, 0, 0, products.buffer[:0]), scores, terms, divide_by, i)


def _join(parts: list[Scores], job: Job, terms: Terms | None, entropy: bool) -> Scores:
    if not parts:  # no sequences: what the kernel makes of none
        return native.forward(job.part(0, 0, 0, 0, job.whole.logits.reshape(-1, job.whole.vocab)[:0]), terms, entropy)
    if len(parts) == 1:
        return parts[0]
    fields: list[Any] = []
    for name in Scores._fields:
        values = [getattr(part, name) for part in parts]
        if name == "recorded":
            fields.append(sum(values, ()))
            continue
        one = name in ("total", "n_clipped")
        fields.append(None if values[0] is None else torch.stack(values).sum() if one else torch.cat(values))
    return Scores(*fields)


def _forward(
    job: Job, products: _Products, terms: Terms | None, entropy: bool, divide_by: float, expected: float | None
) -> Scores:
    """Scores and, with ``expected``, the gradients of ``expected * total``, added to products."""
    found = []
    for i, j, cuts in job.groups():
        part_terms = None if terms is None else _slice(terms, i, j)
        if len(cuts) > 1:
            scores = _score_long(job, products, i, cuts, part_terms, entropy, divide_by)
            if expected is not None:
                assert scores.weight is not None
                _backward_group(job, products, i, j, cuts, scores.lse, scores.weight * (expected / divide_by))
        else:
            h, z = products.logits(*cuts[0])
            batch = job.part(i, j, *cuts[0], z)
            if expected is not None and part_terms is not None and part_terms.weight_known:
                scores, _ = native.forward_backward(batch, part_terms, entropy, divide_by, expected, inplace=True)
            else:
                scores = native.forward(batch, part_terms, entropy, divide_by)
                if expected is not None:
                    assert scores.weight is not None
                    native.backward(batch, scores.lse, scores.weight, expected / divide_by, inplace=True)
            if expected is not None:
                products.add(*cuts[0], h, z)
        found.append(scores)
    return _join(found, job, terms, entropy)


def _backward_group(job: Job, products: _Products, i: int, j: int, cuts: list[tuple[int, int]], lse: Tensor,
                    coefficient: Tensor) -> None:  # fmt: skip
    """The second phase: logits again, and their gradient. ``lse`` is of the rows of these sequences."""
    for first, last in cuts:
        h, z = products.logits(first, last)
        from_start = first - cuts[0][0]
        part = lse[from_start : from_start + last - first]
        native.backward(job.part(i, j, first, last, z), part, coefficient, 1.0, inplace=True)
        products.add(first, last, h, z)


class _Linear(torch.autograd.Function):
    """log pi (B) where ``terms`` is None, else the loss. With ``expected`` forward has computed the gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job, terms: Terms | None, reduction: str,
        divide_by: float, entropy: bool, expected: float | None,
    ) -> tuple[Tensor, Scores]:  # fmt: skip
        wanted = ctx.needs_input_grad[:3] if expected is not None else (False, False, False)
        products = _Products(job, hidden, weight, bias, wanted)
        scores = _forward(job, products, terms, entropy, divide_by, expected)
        ctx.gradients = products.gradients(hidden) if expected is not None else None
        ctx.job, ctx.reduction, ctx.divide_by, ctx.expected = job, reduction, divide_by, expected
        ctx.save_for_backward(hidden, weight, bias, scores.lse, scores.weight)
        return _result(scores, reduction), scores

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, lse, a = ctx.saved_tensors
        job: Job = ctx.job
        if ctx.gradients is not None:
            gradients, ctx.gradients = ctx.gradients, None  # given away: a second backward computes its own
            for gradient in gradients:
                if gradient is not None:
                    native.scale_all_(gradient, 1.0 / ctx.expected, grad)
        else:
            coefficient = grad.to(torch.float64) / ctx.divide_by
            coefficient = -coefficient if a is None else a * coefficient
            products = _Products(job, hidden, weight, bias, ctx.needs_input_grad[:3])
            with torch.autocast(hidden.device.type, enabled=False):
                for i, j, cuts in job.groups():
                    rows = lse[job.bounds[i] : job.bounds[j]]
                    _backward_group(job, products, i, j, cuts, rows, coefficient[i:j].contiguous())
            gradients = products.gradients(hidden)
        return (*gradients, None, None, None, None, None, None)


def _result(scores: Scores, reduction: str) -> Tensor:
    """What carries the gradient."""
    if scores.loss is None or scores.total is None:
        return scores.log_prob
    return scores.loss if reduction == "none" else scores.total


def run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, whole: Batch, terms: Terms | None, reduction: str,
    divide_by: float, entropy: bool, expected: float | None, chunk_bytes: int | None,
) -> tuple[Tensor, Scores]:  # fmt: skip
    """The loss, or log pi (B) where ``terms`` is None, with its gradient where one is wanted; and the scores."""
    if native.records(whole.logits):
        checks.check_cu_seqlens(whole)  # the host has to wait for them anyway, to cut rows into chunks
    else:
        checks.check_rows(whole)
        if terms is not None:
            checks.check_terms(terms)
    job = make_job(whole, chunk_bytes)
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            result, scores = apply(_Linear, hidden, weight, bias, job, terms, reduction, divide_by, entropy, expected)
            return result, scores
        with torch.no_grad():
            products = _Products(job, hidden, weight, bias, (False, False, False))
            scores = _forward(job, products, terms, entropy, divide_by, None)
    return _result(scores, reduction), scores
