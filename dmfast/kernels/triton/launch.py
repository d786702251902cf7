"""Launch the Triton kernels on checked batches."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from ..batch import (
    ENTROPY,
    LABEL,
    LOG_PROB,
    LSE,
    ONLY_SCORED,
    ROW_ENTROPY,
    Batch,
    Bonus,
    SampleRows,
    Scores,
)
from ..faults import with_order, with_zeros
from . import loss, sample

NONE: int = loss.NONE.value
SUMMED = 128  # rows that are added up at a time, with one thread for each


class Shape(NamedTuple):
    """The division of a row among the threads of a program."""

    packs: int  # the packs of 16 bytes that a thread loads at a time
    threads: int
    warps: int


def shape_of(vocab: int, itemsize: int, cap: bool, warp_size: int = 32) -> Shape:
    """Return the shape for rows of a vocabulary. There are three shapes, each compiled once.

    At most a third of a row is loaded at a time, so that few threads idle. With a softcap a thread loads 8 logits at a
    time and a program has 128 threads, because 16 logits or 256 threads would spill registers (``make aot``).
    """
    long = (t for t in ((128,) if cap else (256, 128)) if vocab * itemsize >= 3 * 2 * t * 16)
    threads = next(long, warp_size)
    return Shape(1 if cap and itemsize == 2 else 2, threads, threads // warp_size)


@cache
def warp_size(device: torch.device) -> int:
    """Return the number of threads of a warp: 64 on AMD's gfx9, 32 on other devices and in the interpreter."""
    if device.type == "cpu":
        return 32
    with _on(device):
        return int(driver.active.get_current_target().warp_size)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which Triton launches on a device."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _two(x: float) -> tuple[float, float]:
    """Return an fp64 number as a sum of two fp32 ones, because Triton passes a Python float as fp32."""
    high = torch.tensor(x, dtype=torch.float64, device="cpu").float().item()  # even in a torch.device(...) context
    return high, x - high


def _row_strides(x: Tensor, batch: Batch) -> tuple[int, int, int]:
    """Return the rows of a sequence, and the strides of a sequence and of a row."""
    if batch.cu_seqlens is not None:
        return max(batch.n_rows, 1), 0, x.stride(0)
    return max(batch.steps, 1), x.stride(0), x.stride(1)


def _numbers(batch: Batch, dz: Tensor | None) -> tuple[float, ...]:
    steps, *strides = _row_strides(batch.logits, batch)
    _, *dz_strides = _row_strides(batch.logits if dz is None else dz, batch)
    return (batch.vocab, batch.vocab_start, batch.n_tokens, steps, *strides, *dz_strides, *_two(batch.scale),
            *_two(batch.softcap))  # fmt: skip


def _same_alignment(batch: Batch, dz: Tensor) -> bool:
    """Return whether every row of the gradient is aligned as its logits are, so that both take wide accesses.

    16 bytes of one are then one pack or several packs of the other.
    """
    z, fewest = batch.logits, 16 // batch.logits.element_size()
    apart = [(z.data_ptr() // z.element_size() - dz.data_ptr() // dz.element_size()) % fewest]
    for n, a, b in zip(z.shape[:-1], z.stride(), dz.stride(), strict=False):
        apart.append((a - b) % fewest if n > 1 else 0)
    return not any(apart)


def _starts(batch: Batch) -> Tensor:
    if batch.cu_seqlens is not None:
        return batch.cu_seqlens
    return torch.arange(batch.n_sequences + 1, device=batch.labels.device) * batch.steps


def _sequence_of(batch: Batch) -> Tensor:
    """Return the sequence of each row, (rows,) int64. Unlike ``eager.sequence_of_rows`` it does not wait."""
    rows = torch.arange(batch.n_rows, device=batch.labels.device)
    if batch.cu_seqlens is None:
        return rows // max(batch.steps, 1)
    found = torch.searchsorted(batch.cu_seqlens[1:], rows, right=True)
    return found.clamp_(max=batch.n_sequences - 1)  # only cu_seqlens out of order need this; their rows have faults


class _OfRows(NamedTuple):
    """The factors of the rows' gradients. The kernels read those of a row at ``places[row]``."""

    places: Tensor  # (rows,) int64
    weights: Tensor  # fp64
    bonuses: Tensor | None  # fp64


def _of_rows(batch: Batch, weights: Tensor, bonuses: Tensor | None) -> _OfRows:
    """Return the factors of sequences (B,) for their rows. Only token weights make this gather one value per row."""
    sequence_of, w = _sequence_of(batch), batch.token_weight
    if w is None or not batch.n_rows:
        return _OfRows(sequence_of, weights, bonuses)
    return _OfRows(torch.arange(batch.n_rows, device=w.device), weights[sequence_of] * with_zeros(w),
                   None if bonuses is None else bonuses[sequence_of])  # fmt: skip


def _for_logits(batch: Batch, shape: Shape) -> dict[str, int]:
    return {"W": 16 // batch.logits.element_size(), "PACKS": shape.packs}


def _for_gradient(batch: Batch, dz: Tensor, shape: Shape) -> dict[str, int]:
    """Return how the gradient is cut. A gradient narrower than its logits has fewer packs for as many elements."""
    wider = batch.logits.element_size() // dz.element_size()
    return {"DZ_W": 16 // dz.element_size(), "DZ_PACKS": shape.packs // wider, "THREADS": shape.threads}


def _shape(batch: Batch) -> Shape:
    return shape_of(batch.vocab, batch.logits.element_size(), batch.softcap > 0, warp_size(batch.logits.device))


def score(
    batch: Batch, entropy: bool, weights: Tensor | None = None, dz: Tensor | None = None,
    bonuses: Tensor | None = None,
) -> tuple[Scores, Tensor]:  # fmt: skip
    """Return the scores, and the first fault of each sequence, (B,) int64: row * 8 + fault, or NONE.

    With ``weights`` (B,) the gradient of sum_i -weights_i log pi(x_i), with token weights, is written to ``dz``. With
    ``bonuses`` (B,), which need ``entropy``, the gradient of sum_i -bonuses_i H(x_i) is added. The gradient of a
    sequence with a fault is 0.
    """
    given, batch = batch, with_order(batch)
    rows = batch.logits.new_empty(3 if entropy else 2, batch.n_rows, dtype=torch.float64)
    sequences = rows.new_empty(ONLY_SCORED, batch.n_sequences)
    lse, label = rows[LSE], rows[LABEL]
    row_entropy = rows[ROW_ENTROPY] if entropy else lse
    faults = torch.empty_like(sequences[LOG_PROB], dtype=torch.int64)
    to = batch.logits if dz is None else dz
    of_rows = _OfRows(batch.labels, lse, None) if weights is None else _of_rows(batch, weights, bonuses)
    shape = _shape(batch)
    with _on(lse.device):
        if batch.n_rows:
            loss.score_rows[(batch.n_rows,)](
                batch.logits, batch.labels, lse, label, row_entropy, of_rows.places, of_rows.weights,
                lse if of_rows.bonuses is None else of_rows.bonuses, to, *_numbers(batch, dz),
                CAP=batch.softcap > 0, ENTROPY=entropy, WRITE=weights is not None, BONUS=bonuses is not None,
                WIDE=_same_alignment(batch, to),
                **_for_logits(batch, shape), **_for_gradient(batch, to, shape), num_warps=shape.warps,
            )  # fmt: skip
        if batch.n_sequences:
            loss.sum_rows[(batch.n_sequences,)](
                batch.labels, _starts(batch), lse, label, row_entropy, sequences[LOG_PROB], sequences[ENTROPY], faults,
                batch.vocab, batch.vocab_start, batch.n_tokens, ENTROPY=entropy, ROWS=SUMMED,
                num_warps=SUMMED // warp_size(lse.device),
            )  # fmt: skip
    if dz is not None:
        scale(given, dz, torch.where(faults == NONE, 1.0, 0.0).double(), _sequence_of(batch))
    return Scores(rows, sequences), faults


def backward(
    batch: Batch, lse: Tensor, weights: Tensor, dz: Tensor, there: Tensor | None = None, bonus: Bonus | None = None
) -> None:
    """Write dz = weights[sequence] * w[row] * d(-log-softmax), plus the gradient of a bonus.

    Here w are the token weights. Nothing is written if ``there`` (0-d int32) says that dz holds its gradient already.
    """
    if batch.n_rows:
        shape = _shape(batch)
        places, weights, bonuses = _of_rows(batch, weights, None if bonus is None else bonus.weight)
        with _on(dz.device):
            loss.write_rows[(batch.n_rows,)](
                batch.logits, batch.labels, lse, places, weights, lse if bonus is None else bonus.entropy,
                lse if bonuses is None else bonuses, dz, lse if there is None else there, *_numbers(batch, dz),
                MAY_BE_THERE=there is not None, CAP=batch.softcap > 0, BONUS=bonus is not None,
                WIDE=_same_alignment(batch, dz), **_for_gradient(batch, dz, shape), num_warps=shape.warps,
            )  # fmt: skip


def scale(batch: Batch, dz: Tensor, factors: Tensor, sequence_of: Tensor | None = None) -> None:
    """Multiply dz by factors[sequence] in place."""
    if batch.n_rows:
        of_gradient = batch._replace(logits=dz, softcap=0.0)
        shape = _shape(of_gradient)
        steps, *strides = _row_strides(dz, batch)
        with _on(dz.device):
            loss.scale_rows[(batch.n_rows,)](
                _sequence_of(batch) if sequence_of is None else sequence_of, factors, dz, batch.vocab, steps, *strides,
                **_for_gradient(of_gradient, dz, shape), num_warps=shape.warps,
            )  # fmt: skip


def _halves(x: int) -> tuple[int, int]:
    """Return 64 bits as two int32, so that the types of a kernel's arguments never change."""
    words = torch.tensor([x % 2**64 - (2**64 if x % 2**64 >= 2**63 else 0)], device="cpu").view(torch.int32)
    return int(words[0]), int(words[1])


def sample_warps(itemsize: int, warp_size: int = 32) -> int:
    """Return the number of warps with which each thread has 16 bytes of a tile."""
    return sample.TILE * itemsize // 16 // warp_size


def draw(rows: SampleRows, uniforms: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens and log_prob (N,), and the first row that is not a distribution, 0-d, or -1."""
    z = rows.logits
    tokens = torch.empty(z.shape[0], dtype=torch.int64, device=z.device)
    log_prob = torch.empty_like(tokens, dtype=torch.float64)
    if z.shape[0] == 0:
        return tokens, log_prob, torch.full((), -1, device=z.device)
    aligned = (
        z.data_ptr() % 16 == 0 and z.shape[1] % 8 == 0 and (z.shape[0] == 1 or z.stride(0) * z.element_size() % 16 == 0)
    )
    tiles = max(64, 1 << (-(-z.shape[1] // sample.TILE) - 1).bit_length())
    with _on(z.device):
        sample.sample_rows[(z.shape[0],)](
            z, tokens if rows.row_ids is None else rows.row_ids, log_prob if uniforms is None else uniforms, tokens,
            log_prob, z.shape[1], z.stride(0), *_two(rows.scale), *_two(rows.softcap), *_halves(rows.seed),
            *_halves(rows.step), CAP=rows.softcap > 0, IDS=rows.row_ids is not None, GIVEN=uniforms is not None,
            WIDE=aligned, TILES=tiles, SIZE=sample.TILE,
            num_warps=sample_warps(z.element_size(), warp_size(z.device)),
        )  # fmt: skip
    bad = log_prob.isnan()
    return tokens, log_prob, torch.where(bad.any(), bad.int().argmax(), -1)
