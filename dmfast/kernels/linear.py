"""Compute the losses on hidden states and a head, chunk by chunk through one buffer of logits.

All logits never exist at once. The matrix products are torch's (``products.py``), and the row kernels of a backend run
between them. For each chunk this module computes the logits H W^T, runs the kernel's forward and then its backward,
and adds up dH = dZ W and dW += dZ^T H. The backward writes over the logits, or, where the next product takes 16 bits,
into 16 bits beside them. A chunk holds whole sequences, so log pi and A are known inside it. This takes three products
and computes no logit twice, which is the least that gives all three gradients.

A function of ``Terms`` gets the sequences of a chunk as if they were a call. Chunks are cut between sequences if the
function says ``per_sequence``, between prompts if it says ``whole_contexts``, and otherwise not at all. A fourth
product is needed where the logits must be computed again: if sequences that belong together are longer than the
buffer, as one long sequence may be, or if grad_output is not known before backward. Rows that are not scored are left
out before the first product. A frozen head costs neither its product nor a V x D buffer.

If the vocabulary is cut among ranks (``shards.py``), all ranks have the same chunks. Each rank computes the logits of
its own columns, one exchange completes the rows, and dH, to which every rank contributes, is summed once per call.
torch forms A between forward and backward there, so a known A takes two passes too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..objectives import Objective, OfStep, Terms
from . import check_ops, faults, products
from .autograd import LogProb, Options, apply, copies, from_log_prob, reduced, refuses_double_backward
from .backend import Backend
from .batch import IGNORE, LSE, Batch, Bonus, Origin, Recorded, Scores, bonus_of
from .form import form_loss, weighted_of
from .shards import RowFaults, Shards, sums_of_sequences, whole_rows

_CHUNK_BYTES = 2**27
# Each chunk costs one addition to the gradient of the head. This must be cheap compared with the products, so chunks
# are larger when that gradient is wanted.
_GPU_ROWS, _GPU_BYTES, _GPU_ROWS_WITHOUT_HEAD = 4096, 2**30, 1024
_ALIGNMENT = 64  # in elements; without it a V such as 50257 would leave the rows that products read unaligned


class Chunks(NamedTuple):
    """The scored rows of a call, and how they are cut into chunks."""

    whole: Batch  # the batch of the call; its logits are a stand-in with the right shape, dtype and device
    rows: Tensor | None  # (M,) the numbers of the scored rows; None: all rows are scored
    labels: Tensor  # (M,)
    token_weight: Tensor | None  # (M,)
    starts: Tensor  # (B+1,) the start of each sequence among the M rows
    bounds: list[int]  # the same on the host, which has to wait for a device to read them
    chunk_rows: int
    ways: products.Ways
    narrow: bool  # whether the gradient of fp32 logits is multiplied in 16 bits
    may_cut: list[int] | None  # the sequences, from 0 to B, before which chunks may be cut; None: all

    def groups(self) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
        """Yield i, j and ranges of rows [first, last) for sequences [i, j) that go through the buffer together.

        There are several ranges if these sequences are longer than the buffer.
        """
        starts = self.bounds
        at = list(range(len(starts))) if self.may_cut is None else self.may_cut
        a = 0
        while a < len(at) - 1:
            i, b = at[a], a + 1
            while b < len(at) - 1 and starts[at[b + 1]] - starts[i] <= self.chunk_rows:
                b += 1
            j = at[b]
            first, last = starts[i], starts[j]
            cuts = range(first, max(last, first + 1), self.chunk_rows)
            yield i, j, [(cut, min(cut + self.chunk_rows, last)) for cut in cuts]
            a = b

    def part(self, i: int, j: int, first: int, last: int, logits: Tensor) -> Batch:
        """Return rows [first, last) of sequences [i, j) as a packed batch."""
        starts = (self.starts[i : j + 1] - first).clamp(0, last - first)
        rows = torch.arange(first, last, device=self.labels.device) if self.rows is None else self.rows[first:last]
        whole, token_weight = self.whole, self.token_weight
        return Batch(logits, self.labels[first:last], starts, j - i, 0, whole.scale, whole.softcap, whole.vocab_start,
                     whole.whole_vocab, Origin(whole, rows, i),
                     token_weight=None if token_weight is None else token_weight[first:last])  # fmt: skip


def row_stride(vocab: int) -> int:
    """Return the number of elements that a row of the buffer takes."""
    return -(-vocab // _ALIGNMENT) * _ALIGNMENT


def rows_of_buffer(
    vocab: int, itemsize: int, device: torch.device, chunk_bytes: int | None, wants_head: bool = True
) -> int:
    """Return the number of rows of logits that the buffer holds.

    The default is large enough that the one addition to dW per buffer is cheap compared with the products. A GPU needs
    more rows for that than a CPU, because its products are faster relative to its memory.

    Args:
        vocab: V.
        itemsize: the bytes of a logit, plus those of its gradient if that has memory of its own.
        device: the device of the buffer.
        chunk_bytes: as in ``linear_dm_loss``.
        wants_head: whether the gradient of the head is wanted.
    """
    row = row_stride(vocab) * itemsize
    if chunk_bytes is not None:
        return max(chunk_bytes // row, 1)
    rows = _CHUNK_BYTES // row
    if device.type != "cpu":
        rows = max(rows, min(_GPU_ROWS if wants_head else _GPU_ROWS_WITHOUT_HEAD, _GPU_BYTES // row))
    return max(rows, 1)


def places_to_cut(terms: Terms | None, n: int) -> list[int] | None:
    """Return the numbers from 0 to n before which the loss of n sequences may be cut, or None for all of them.

    Args:
        terms: the terms of the loss. The attribute ``per_sequence`` of a function says that A depends only on the
            sequence's own log pi and on ``at_draw``. ``whole_contexts`` says that A depends on log pi of the sequences
            of the same prompt.
        n: the number of sequences.
    """
    if terms is None or isinstance(terms.objective, Objective):
        return None
    objective = terms.objective
    function = objective.objective if isinstance(objective, OfStep) else objective
    if getattr(function, "per_sequence", False):
        return None
    context_id = terms.context_id
    if context_id is None or not getattr(function, "whole_contexts", False):
        return [0, n]
    contexts = context_id.tolist()
    last = {context: place for place, context in enumerate(contexts)}
    found, end = [0], 0
    for place, context in enumerate(contexts):
        end = max(end, last[context])
        if place == end:
            found.append(place + 1)
    return found


def make_chunks(
    whole: Batch, hidden: Tensor, chunk_bytes: int | None, wanted: tuple[bool, ...], shards: Shards | None = None,
    may_cut: list[int] | None = None,
) -> Chunks:  # fmt: skip
    """Leave out the rows that are not scored, and cut the others into chunks.

    Args:
        whole: the batch of the call.
        hidden: its hidden states.
        chunk_bytes: as in ``linear_dm_loss``.
        wanted: whether the gradients of hidden states, head and bias are wanted.
        shards: the ranks among which the vocabulary is cut, or None.
        may_cut: what ``places_to_cut`` returned.
    """
    scored = whole.labels != IGNORE
    before = torch.cat([scored.new_zeros(1, dtype=torch.int64), scored.cumsum(0)])
    firsts = whole.cu_seqlens
    if firsts is None:
        firsts = torch.arange(whole.n_sequences + 1, device=scored.device) * whole.steps
    rows = None if bool(scored.all()) else scored.nonzero()[:, 0]
    labels = whole.labels if rows is None else whole.labels[rows]
    token_weight = whole.token_weight if rows is None or whole.token_weight is None else whole.token_weight[rows]
    starts = before[firsts]
    ways = products.ways(hidden.device, hidden.dtype, whole.logits.dtype, shards is not None)
    narrow = any(wanted[:2]) and ways.takes_16_bits and whole.logits.dtype != hidden.dtype
    itemsize = whole.logits.itemsize + (hidden.itemsize if narrow else 0)
    vocab = whole.vocab if shards is None else shards.largest
    held = rows_of_buffer(vocab, itemsize, whole.logits.device, chunk_bytes, wanted[1])
    return Chunks(whole, rows, labels, token_weight, starts, starts.tolist(), held, ways, narrow, may_cut)


def _rows(hidden: Tensor, n: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """Return an empty (n, V) buffer with aligned rows."""
    padded = hidden.new_empty(n, row_stride(vocab), dtype=dtype)
    padded[:, vocab:] = 0  # oneDNN's bf16 products on AMX read one element beyond an odd V, and NaN * 0 is NaN
    return padded[:, :vocab]


class _Products:
    """The products with the head, the buffer that they go through, and the gradients that they add up to."""

    def __init__(
        self, chunks: Chunks, hidden: Tensor, head: Tensor, bias: Tensor | None, wanted: tuple[bool, ...],
        shards: Shards | None,
    ) -> None:  # fmt: skip
        self.chunks, self.head, self.bias, self.shards = chunks, head, bias, shards
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        cuts = [cut for *_, found in chunks.groups() for cut in found]
        longest = max((last - first for first, last in cuts), default=0)
        self.one_chunk = len(cuts) == 1
        vocab, dtype = head.shape[0], chunks.whole.logits.dtype
        self.buffer = _rows(hidden, longest, vocab, dtype)
        # The gradient overwrites the logits, unless the next product takes another dtype (backend.check_gradient).
        self.gradient = _rows(hidden, longest, vocab, hidden.dtype) if chunks.narrow else self.buffer
        self.ways = chunks.ways
        self.wants_head = wanted[1]
        # the products fill all of it only if no row is left out
        empty = torch.empty_like if chunks.rows is None else torch.zeros_like
        # The gradient is contiguous whatever the layout of hidden, because scaling needs that and the fake kernels
        # promise it. It is fp32 if it is one of several parts, which are rounded only after they are summed.
        dtype = hidden.dtype if shards is None else torch.promote_types(hidden.dtype, torch.float32)
        self.d_hidden = empty(self.hidden, memory_format=torch.contiguous_format, dtype=dtype) if wanted[0] else None
        self.d_head: Tensor | None = None  # the first chunk makes it, in fp32 if there are several chunks
        self.d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None

    def logits(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return H and H W^T + b of rows [first, last)."""
        rows = self.chunks.rows
        h = self.hidden[first:last] if rows is None else self.hidden.index_select(0, rows[first:last])
        z = self.buffer[: last - first]
        products.multiply(self.ways.logits, h, self.head, self.bias, z)
        return h, z

    def add(self, first: int, last: int, h: Tensor, dz: Tensor) -> None:
        """Add the gradients of rows [first, last)."""
        rows = self.chunks.rows
        if self.d_bias is not None:
            self.d_bias.add_(dz.sum(0, dtype=torch.float32))
        if self.d_hidden is not None:
            dh = self.d_hidden[first:last] if rows is None else torch.empty_like(h, dtype=self.d_hidden.dtype)
            products.multiply_back(self.ways.d_hidden, dz, self.head, dh)
            if rows is not None:
                self.d_hidden.index_copy_(0, rows[first:last], dh)
        if self.wants_head and self.one_chunk:
            way = "native" if self.ways.d_hidden == "native" else self.ways.d_head
            self.d_head = products.only_product(way, dz, h)
        elif self.wants_head:
            first_chunk = self.d_head is None
            if self.d_head is None:
                self.d_head = self.head.new_empty(self.head.shape, dtype=torch.float32)
            products.add_product(self.ways.d_head, self.d_head, dz, h, first_chunk)

    def gradients(self, hidden: Tensor) -> list[Tensor | None]:
        """Return the gradients of hidden states, head and bias, each in the dtype of its tensor."""
        d_hidden = None
        if self.d_hidden is not None:
            if self.shards is not None:
                self.shards.add(self.d_hidden)
            d_hidden = self.d_hidden.to(hidden.dtype).view(hidden.shape)
        d_head = None
        if self.wants_head:
            d_head = self.head.new_zeros(self.head.shape) if self.d_head is None else self.d_head.to(self.head.dtype)
        d_bias = None if self.d_bias is None or self.bias is None else self.d_bias.to(self.bias.dtype)
        return [d_hidden, d_head, d_bias]


class _Pass(NamedTuple):
    """The values that all chunks of a call have in common."""

    backend: Backend
    chunks: Chunks
    matrices: _Products
    terms: Terms | None
    entropy: bool
    divide_by: float
    expected: float | None  # if it is given, the gradients of ``expected * total`` are added to ``matrices``
    shards: Shards | None


class _Scored(NamedTuple):
    """A chunk that has been scored."""

    hidden: Tensor
    logits: Tensor
    rows: Tensor  # the block of the rows, over the whole vocabulary
    sequences: Tensor  # log pi and entropy, summed over the rows of the chunk
    recorded: tuple[Recorded, ...]


def _score_chunk(call: _Pass, i: int, j: int, cut: tuple[int, int]) -> _Scored:
    """Score one chunk without terms."""
    if call.shards is not None:
        return _score_shard(call, call.shards, i, j, cut)
    h, z = call.matrices.logits(*cut)
    scores = call.backend.forward(call.chunks.part(i, j, *cut, z), None, call.entropy)
    return _Scored(h, z, scores.rows, scores.sequences, scores.recorded)


def _score_shard(call: _Pass, shards: Shards, i: int, j: int, cut: tuple[int, int]) -> _Scored:
    """Score a chunk of which this rank has some columns.

    A rank that fails still takes part in the exchange, so that the others don't wait for it forever.
    """
    look, shape = not call.backend.records_faults, (3 if call.entropy else 2, cut[1] - cut[0])
    try:
        h, z = call.matrices.logits(*cut)
        batch = call.chunks.part(i, j, *cut, z)
        mine = call.backend.forward(batch, None, call.entropy).rows
    except Exception:
        shards.exchange(None, shape, look=False)
        raise
    rows = whole_rows(shards.exchange(mine, shape, look))
    check = RowFaults(batch._replace(logits=z.new_empty(0, z.shape[-1])), rows)
    if look:
        check()
    assert batch.cu_seqlens is not None
    return _Scored(h, z, rows, sums_of_sequences(rows, batch.cu_seqlens), () if look else faults.read_later(check))


def _score_chunks(
    call: _Pass, i: int, j: int, cuts: list[tuple[int, int]], terms: Terms | None
) -> tuple[Scores, _Scored]:
    """Return the scores of sequences [i, j), whose loss torch forms, and their last chunk."""
    parts = [_score_chunk(call, i, j, cut) for cut in cuts]
    rows = torch.cat([part.rows for part in parts], 1)
    sequences = torch.stack([part.sequences for part in parts]).sum(0)
    recorded = tuple(check for part in parts for check in part.recorded)
    scores = Scores(rows, sequences, None, recorded)
    if terms is not None:
        batch = call.chunks.part(i, j, cuts[0][0], cuts[-1][1], call.matrices.buffer[:0])
        scores = form_loss(batch, rows, scores.log_prob, scores.entropy, terms, call.divide_by,
                           call.backend.records_faults, recorded)  # fmt: skip
    return scores, parts[-1]


def _group(call: _Pass, i: int, j: int, cuts: list[tuple[int, int]]) -> Scores:
    """Return the scores of sequences [i, j) and, with ``expected``, add their gradients to the products."""
    backend, matrices, expected, divide_by = call.backend, call.matrices, call.expected, call.divide_by
    terms = None if call.terms is None else call.terms.cut(i, j)
    coefficient = 0.0 if terms is None else terms.entropy_coefficient
    in_torch = terms is not None and not isinstance(terms.objective, Objective)
    if len(cuts) > 1 or call.shards is not None or in_torch:
        scores, last = _score_chunks(call, i, j, cuts, terms)
        if expected is None:
            return scores
        bonus = scores.bonus(coefficient)
        if len(cuts) > 1:
            _backward_group(call, i, j, cuts, scores.lse, scores.weight, expected / divide_by, bonus)
        else:
            _backward_chunk(call, i, j, cuts[0], last.hidden, last.logits, scores.lse, scores.weight,
                            expected / divide_by, bonus)  # fmt: skip
        return scores
    h, z = matrices.logits(*cuts[0])
    dz = matrices.gradient[: z.shape[0]]
    batch = call.chunks.part(i, j, *cuts[0], z)
    if expected is not None and terms is not None and terms.weight_known:
        scores = backend.forward_backward(batch, terms, call.entropy, divide_by, expected / divide_by, dz)
    else:
        scores = backend.forward(batch, terms, call.entropy, divide_by)
        if expected is not None:
            bonus = scores.bonus(coefficient)
            backend.backward(batch, scores.lse, scores.weight, expected / divide_by, dz, bonus=bonus)
    if expected is not None:
        matrices.add(*cuts[0], h, dz)
    return scores


def _backward_chunk(call: _Pass, i: int, j: int, cut: tuple[int, int], h: Tensor, z: Tensor, lse: Tensor,
                    weight: Tensor, factor: float, bonus: Bonus | None) -> None:  # fmt: skip
    """Add the gradients of the logits in the buffer to the products.

    ``lse`` and the entropies of ``bonus`` belong to the rows of the chunk.
    """
    dz = call.matrices.gradient[: cut[1] - cut[0]]
    call.backend.backward(call.chunks.part(i, j, *cut, z), lse, weight, factor, dz, bonus=bonus)
    call.matrices.add(*cut, h, dz)


def _backward_group(call: _Pass, i: int, j: int, cuts: list[tuple[int, int]], lse: Tensor, weight: Tensor,
                    factor: float, bonus: Bonus | None) -> None:  # fmt: skip
    """Compute the logits again and add their gradients to the products.

    ``lse`` and ``bonus`` belong to the rows of these sequences.
    """
    for first, last in cuts:
        h, z = call.matrices.logits(first, last)
        from_start = first - cuts[0][0]
        part = slice(from_start, from_start + last - first)
        of_part = None if bonus is None else bonus._replace(entropy=bonus.entropy[part])
        _backward_chunk(call, i, j, (first, last), h, z, lse[part], weight, factor, of_part)


def _forward(call: _Pass) -> Scores:
    """Return the scores of all rows of the call, including the rows that are not scored."""
    chunks = call.chunks
    found = [_group(call, i, j, cuts) for i, j, cuts in chunks.groups()]
    if not found:  # without sequences the kernel still makes an empty result of the right shape
        nothing = chunks.whole.logits.reshape(-1, chunks.whole.vocab)[:0]
        found = [call.backend.forward(chunks.part(0, 0, 0, 0, nothing), call.terms, call.entropy)]
    scores = found[0]
    if len(found) > 1:
        rows, sequences = torch.cat([part.rows for part in found], 1), torch.cat([part.sequences for part in found], 1)
        total = None if call.terms is None else torch.stack([cast(Tensor, part.total) for part in found]).sum()
        scores = Scores(rows, sequences, total, tuple(check for part in found for check in part.recorded))
    if chunks.rows is None:
        return scores
    rows = scores.rows.new_zeros(scores.rows.shape[0], chunks.whole.n_rows)
    return scores.replaced(rows=rows.index_copy_(1, chunks.rows, scores.rows))


@contextmanager
def _as_multiplied(hidden: Tensor, batch: Batch) -> Iterator[None]:
    """Set how fp32 products are formed in a call, and switch autograd and autocast off."""
    with (
        torch.no_grad(), torch.autocast(hidden.device.type, enabled=False),
        nullcontext() if batch.as_set else products.ieee(hidden.device),
    ):  # fmt: skip
        yield


def forward(
    backend: Backend, hidden: Tensor, head: Tensor, bias: Tensor | None, batch: Batch, terms: Terms | None,
    entropy: bool, divide_by: float, expected: float | None, chunk_bytes: int | None, wanted: tuple[bool, ...],
    shards: Shards | None = None,
) -> tuple[Scores, list[Tensor | None]]:  # fmt: skip
    """Return the scores and the gradients of ``expected * total`` in hidden states, head and bias.

    A gradient is None if it is not ``wanted`` or if there is no ``expected``. With ``shards``, head and bias are this
    rank's rows.
    """
    if backend.records_faults:
        faults.check_cu_seqlens(batch)  # the host has to wait for them anyway, to cut rows into chunks
    else:
        faults.check_rows(batch)
        if terms is not None:
            faults.check_terms(terms)
    wanted = wanted if expected is not None else (False, False, False)
    may_cut = places_to_cut(terms, batch.n_sequences)
    chunks = make_chunks(batch, hidden, chunk_bytes, wanted, shards, may_cut)
    with _as_multiplied(hidden, batch):
        matrices = _Products(chunks, hidden, head, bias, wanted, shards)
        scores = _forward(_Pass(backend, chunks, matrices, terms, entropy, divide_by, expected, shards))
        return scores, matrices.gradients(hidden)


def backward(
    backend: Backend, hidden: Tensor, head: Tensor, bias: Tensor | None, batch: Batch, lse: Tensor,
    coefficient: Tensor, chunk_bytes: int | None, wanted: tuple[bool, ...], shards: Shards | None = None,
    bonus: Bonus | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """Return the ``wanted`` gradients of -sum_i (coefficient_i log pi(x_i) + bonus_i H(x_i)).

    log pi is weighted by the token weights of the batch. The logits are computed again; the log-sum-exps and entropies
    of the rows are given.
    """
    chunks = make_chunks(batch, hidden, chunk_bytes, wanted, shards)
    if chunks.rows is not None:
        lse = lse[chunks.rows]
        bonus = None if bonus is None else bonus._replace(entropy=bonus.entropy[chunks.rows])
    with _as_multiplied(hidden, batch):
        matrices = _Products(chunks, hidden, head, bias, wanted, shards)
        call = _Pass(backend, chunks, matrices, None, False, 1.0, None, shards)
        for i, j, cuts in chunks.groups():
            rows = slice(chunks.bounds[i], chunks.bounds[j])
            of_group = None if bonus is None else Bonus(bonus.entropy[rows], bonus.weight[i:j])
            _backward_group(call, i, j, cuts, lse[rows], coefficient[i:j].contiguous(), 1.0, of_group)
        return matrices.gradients(hidden)


class _Linear(torch.autograd.Function):
    """The autograd function of the loss, or of weighted log pi and entropy (B,) if ``terms`` is None.

    With ``expected``, forward computes the gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, backend: Backend, batch: Batch,
        terms: Terms | None, options: Options, chunk_bytes: int | None, shards: Shards | None,
    ) -> LogProb:  # fmt: skip
        scores, gradients = forward(
            backend, hidden, head, bias, batch, terms, options.entropy, options.divide_by, options.expected,
            chunk_bytes, ctx.needs_input_grad[:3], shards,
        )  # fmt: skip
        ctx.gradients = gradients if options.expected is not None else None
        # the batch's logits are a stand-in, which shares no memory with what is saved
        ctx.backend, ctx.batch, ctx.options, ctx.chunk_bytes, ctx.shards = backend, batch, options, chunk_bytes, shards
        ctx.save_for_backward(hidden, head, bias, scores.rows, None if terms is None else scores.weight)
        ctx.coefficient = 0.0 if terms is None else terms.entropy_coefficient
        ctx.set_materialize_grads(False)
        if terms is None:
            return *copies(batch, scores), scores
        return reduced(scores, options.reduction), None, scores

    @staticmethod
    @refuses_double_backward
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        hidden, head, bias, rows, a = ctx.saved_tensors
        grad = rows.new_zeros(ctx.batch.n_sequences) if grad is None else grad  # only the entropy is used
        options: Options = ctx.options
        backend: Backend = ctx.backend
        if ctx.gradients is not None and options.expected is not None:
            gradients, ctx.gradients = ctx.gradients, None  # autograd owns them now; a second backward computes its own
            for gradient in gradients:
                if gradient is not None:
                    backend.scale_matrix(gradient, 1.0 / options.expected, grad)
        else:
            coefficient = grad.to(torch.float64) / options.divide_by
            bonus = None if grad_entropy is None else bonus_of(rows, -grad_entropy)
            if a is not None and ctx.coefficient:
                bonus = bonus_of(rows, (ctx.coefficient * coefficient).expand(a.shape))
            coefficient = -coefficient if a is None else a * coefficient
            gradients = backward(backend, hidden, head, bias, ctx.batch, rows.select(0, LSE), coefficient,
                                 ctx.chunk_bytes, ctx.needs_input_grad[:3], ctx.shards, bonus)  # fmt: skip
        return (*gradients, None, None, None, None, None, None)


def _run(
    backend: Backend, hidden: Tensor, head: Tensor, bias: Tensor | None, batch: Batch, terms: Terms | None,
    options: Options, chunk_bytes: int | None, shards: Shards | None,
) -> LogProb:  # fmt: skip
    inputs = (hidden, head) if bias is None else (hidden, head, bias)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        found: LogProb = apply(_Linear, hidden, head, bias, backend, batch, terms, options, chunk_bytes, shards)
        return found
    scores, _ = forward(backend, hidden, head, bias, batch, terms, options.entropy, options.divide_by, None,
                        chunk_bytes, (False, False, False), shards)  # fmt: skip
    if terms is None:
        return weighted_of(batch, scores), scores.entropy, scores
    return reduced(scores, options.reduction), None, scores


def log_prob(
    backend: Backend, hidden: Tensor, head: Tensor, bias: Tensor | None, batch: Batch, entropy: bool,
    chunk_bytes: int | None, shards: Shards | None = None,
) -> LogProb:  # fmt: skip
    """Return ``weighted_log_prob`` (B,), the entropy (B,) or None, and the scores.

    The first two carry a gradient where one is wanted.
    """
    options = Options("none", 1.0, entropy, False, None)
    return _run(backend, hidden, head, bias, batch, None, options, chunk_bytes, shards)


def loss(
    backend: Backend, hidden: Tensor, head: Tensor, bias: Tensor | None, batch: Batch, terms: Terms, options: Options,
    chunk_bytes: int | None, shards: Shards | None = None,
) -> tuple[Tensor, Scores]:  # fmt: skip
    """Return the reduced loss, with gradient where one is wanted, and the scores."""
    one_pass = options.expected is not None and batch.n_sequences
    if isinstance(terms.objective, Objective) or one_pass:
        found, _, scores = _run(backend, hidden, head, bias, batch, terms, options, chunk_bytes, shards)
        return found, scores
    if not backend.records_faults:
        batch = check_ops.checked(batch, terms)
    given = log_prob(backend, hidden, head, bias, batch, options.entropy, chunk_bytes, shards)
    return from_log_prob(backend, batch, given, terms, options)
