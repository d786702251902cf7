"""Compute the method in plain torch: the reference against which the kernels are tested, and the backend ``eager``.

Everything is computed in fp64, whatever the dtype of the logits, on devices that have fp64. The formula of A is in
``objectives.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives import Terms
from .backend import BackwardOfScores, check_gradient, overwritten
from .batch import IGNORE, Batch, Bonus, SampleRows, Scores
from .check_ops import value_checks
from .form import form_loss, scaled
from .fp64 import devices_without_fp64, per_sequence_device, widened


class Scored(NamedTuple):
    """The results of ``score``: values of the rows without gradient, and those of the sequences with gradient."""

    lse: Tensor  # (rows,) log-sum-exp of scale * cap(z)
    label: Tensor  # (rows,) scale * cap(z) of the label; 0 where another shard has it
    row_entropy: Tensor | None  # (rows,)
    log_prob: Tensor  # (B,); for a shard the sum over the labels that it has
    weighted: Tensor  # (B,), sum_t w_t log pi(x_t), or log_prob if there are no token weights
    entropy: Tensor | None  # (B,)

    def sequences(self) -> Tensor:
        """Return the block of the sequences of a pass that only scores; see ``Scores``."""
        log_prob = self.log_prob.detach()
        return torch.stack([log_prob, torch.zeros_like(log_prob) if self.entropy is None else self.entropy.detach()])

    def rows(self) -> Tensor:
        """Return the block of the rows; see ``Scores``."""
        columns = (self.lse, self.label) if self.row_entropy is None else (self.lse, self.label, self.row_entropy)
        return torch.stack([column.to(self.log_prob.device).double() for column in columns])


def score(batch: Batch, entropy: bool = False) -> Scored:
    """Return log pi(x) of each sequence and, where it is wanted, its entropy, both differentiable.

    log pi(x) = sum_t m_t log softmax(scale * cap(z_t))[x_t], and the entropy is sum_t m_t H_t over the same rows.
    """
    checks = value_checks()
    batch = checks.check_logits(batch)
    scored, column = batch.labels != IGNORE, batch.labels - batch.vocab_start
    here = scored & (column >= 0) & (column < batch.vocab)
    y = logits_of(batch)
    log_p = torch.log_softmax(y, dim=-1)
    column = torch.where(here, column, 0)[:, None]
    to = per_sequence_device(y.device)
    token_log_prob = torch.where(here, log_p.gather(-1, column)[:, 0], 0.0).to(to).double()
    token_log_prob = checks.check_labels(token_log_prob, batch)
    row_entropy = None
    if entropy:
        # 0 * -inf must be 0, in the gradient too, so tokens of probability 0 are removed before the multiplication
        p = log_p.exp()
        may = p > 0
        row_entropy = -(torch.where(may, p, 0.0) * torch.where(may, log_p, 0.0)).sum(-1)
        row_entropy = torch.where(scored, row_entropy, 0.0).to(to).double()
    per_sequence = sums_of(batch, to)
    log_prob = per_sequence(token_log_prob)
    return Scored(
        lse=torch.where(scored, torch.logsumexp(y, dim=-1).detach(), 0.0),
        label=torch.where(here, y.detach().gather(-1, column)[:, 0], 0.0),
        row_entropy=None if row_entropy is None else row_entropy.detach(),
        log_prob=log_prob,
        weighted=log_prob if batch.token_weight is None else per_sequence(batch.token_weight * token_log_prob),
        entropy=per_sequence(row_entropy) if row_entropy is not None else None,
    )


def logits_of(batch: Batch) -> Tensor:
    """Return scale * cap(z), (rows, V) fp64, differentiable."""
    z = widened(batch.logits).reshape(batch.n_rows, batch.vocab)
    # rows that are not scored may hold anything, even NaN, and must get a gradient of exactly 0
    z = torch.where((batch.labels != IGNORE)[:, None], z, 0.0)
    if batch.softcap:
        z = batch.softcap * torch.tanh(z / batch.softcap)
    return batch.scale * z


def sequence_of_rows(batch: Batch) -> Tensor:
    """Return the number of the sequence that each row of logits belongs to, (rows,) int64."""
    sequences = torch.arange(batch.n_sequences, device=batch.labels.device)
    if batch.cu_seqlens is None:
        return sequences.repeat_interleave(batch.steps)
    return sequences.repeat_interleave(batch.cu_seqlens.diff(), output_size=batch.n_rows)


def sums_of(batch: Batch, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a differentiable function from values of rows, (rows,) on a device, to their sums by sequence, (B,)."""
    sequence = sequence_of_rows(batch).to(device)

    def sums(values: Tensor) -> Tensor:
        return values.new_zeros(batch.n_sequences).index_add(0, sequence, values)

    return sums


def gradient(batch: Batch, lse: Tensor, weight: Tensor, bonus: Bonus | None = None) -> Tensor:
    """Return the gradient of the logits, (rows, V) fp64.

    It is weight * w * (softmax - onehot) + bonus.weight * softmax * (log softmax + H), times the derivatives of scale
    and softcap, where w is the row's token weight. The softmax is formed with ``lse``, which for a shard is the
    log-sum-exp over the whole vocabulary.
    """
    with torch.enable_grad():
        z = batch.logits.detach().requires_grad_()
        y = logits_of(batch._replace(logits=z))
        scored, column = batch.labels != IGNORE, batch.labels - batch.vocab_start
        here = scored & (column >= 0) & (column < batch.vocab)
        sequence = sequence_of_rows(batch)
        log_p = y.detach() - lse[:, None]
        p = torch.where(scored[:, None], log_p.exp(), 0.0)
        one_hot = here[:, None] * torch.nn.functional.one_hot(torch.where(here, column, 0), batch.vocab)
        of_row = weight[sequence] if batch.token_weight is None else weight[sequence] * batch.token_weight
        dy = of_row[:, None] * (p - one_hot)
        if bonus is not None:
            of_p = torch.where(p > 0, log_p + bonus.entropy[:, None], 0.0)
            dy = dy + bonus.weight[sequence][:, None] * p * of_p
        (dz,) = torch.autograd.grad(y, z, dy)
    return dz.reshape(batch.n_rows, batch.vocab)


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Return Philox4x32-10 (Salmon et al. 2011) of int64 tensors of 32 bits each, as csrc/random.h computes it."""
    low = 0xFFFFFFFF
    key0, key1 = key
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57  # a product wraps, but its low 64 bits are right
        counter = [(b >> 32 & low) ^ counter[1] ^ key0, b & low, (a >> 32 & low) ^ counter[3] ^ key1, a & low]
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return counter


def uniforms(seed: int, row_ids: Tensor, step: int) -> Tensor:
    """Return uniform numbers (N,) fp64 in [0, 1), multiples of 2^-53.

    Each is a function of the seed, the row id and the step alone.
    """
    low = 0xFFFFFFFF
    steps = torch.full_like(row_ids, step)
    counter = [row_ids & low, row_ids >> 32 & low, steps & low, steps >> 32 & low]
    first, second, *_ = philox(counter, (seed & low, seed >> 32))
    return widened(first << 21 | second >> 11) * 2.0**-53


def draw(rows: SampleRows, uniform: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return tokens and log_prob as ``Backend.sample`` does, by inverting the whole CDF."""
    rows = value_checks().check_sample_rows(rows)
    z = widened(rows.logits)
    if rows.softcap:
        z = rows.softcap * torch.tanh(z / rows.softcap)
    log_p = torch.log_softmax(rows.scale * z, dim=-1)
    if uniform is None:
        ids = torch.arange(z.shape[0], device=z.device) if rows.row_ids is None else rows.row_ids
        uniform = uniforms(rows.seed, ids, rows.step)
    cdf = log_p.exp().cumsum(-1)
    total = cdf[:, -1:].contiguous()
    # right=True passes over tokens of probability 0. If the product rounds up to the total, the minimum gives the last
    # token that has a probability.
    target = uniform[:, None] * total
    tokens = torch.minimum(torch.searchsorted(cdf, target, right=True), torch.searchsorted(cdf, total))
    return tokens[:, 0], log_p.gather(-1, tokens)[:, 0].to(per_sequence_device(z.device)).double()


class Eager(BackwardOfScores):
    """The backend ``eager``. Autograd follows ``score``, and nothing is fused."""

    name = "eager"
    records_faults = False
    forms_weight = False
    in_torch = True

    def why_not(self, device: torch.device | None, dtype: torch.dtype | None = None) -> str | None:
        """Return None: torch runs everywhere."""
        return None

    def detail(self) -> str:
        """Return a description of the logits that it takes."""
        said = "plain torch: other devices, fp64 logits, the oracle of the tests"
        without = devices_without_fp64()
        if without:
            said += f"; {', '.join(without)}, without fp64: rows in fp32, per-sequence values in fp64 on the CPU"
        return said

    def forward(self, batch: Batch, terms: Terms | None, entropy: bool, divide_by: float = 1.0) -> Scores:
        """Return the scores, without gradient; see ``Backend``."""
        with torch.no_grad():
            scored = score(batch, entropy)
            rows = scored.rows()
            if terms is not None:
                return form_loss(batch, rows, scored.log_prob, scored.entropy, terms, divide_by, False)
            sequences = scored.sequences()
            return Scores(rows, sequences.fill_(math.nan) if batch.is_shard else sequences)

    @torch.no_grad()
    def backward(
        self, batch: Batch, lse: Tensor, weight: Tensor, factor: float, dz: Tensor, upstream: Tensor | None = None,
        unless: float | None = None, bonus: Bonus | None = None,
    ) -> None:  # fmt: skip
        """Write the gradient; see ``Backend``."""
        if upstream is not None and unless is not None and float(upstream) == unless:
            return
        check_gradient(batch, dz)
        by = factor if upstream is None else factor * upstream
        bonus = None if bonus is None else bonus._replace(weight=bonus.weight * by)
        dz.copy_(gradient(batch, lse, weight * by, bonus).reshape(dz.shape))
        overwritten(batch, dz)

    def forward_backward(
        self, batch: Batch, terms: Terms, entropy: bool, divide_by: float, factor: float, dz: Tensor
    ) -> Scores:
        """Return the scores and write the gradient; see ``Backend``."""
        scores = self.forward(batch, terms, entropy, divide_by)
        bonus = scores.bonus(terms.entropy_coefficient)
        self.backward(batch, scores.lse, scores.weight, factor, dz, bonus=bonus)
        return scores

    def scale(self, batch: Batch, dz: Tensor, factor: float, upstream: Tensor) -> None:
        """Multiply a gradient; see ``Backend``."""
        self.scale_matrix(dz, factor, upstream)

    @torch.no_grad()
    def scale_matrix(self, x: Tensor, factor: float, upstream: Tensor) -> None:
        """Multiply a tensor; see ``Backend``."""
        x.copy_(scaled(x, (factor * upstream).to(x.device)))

    def sample(self, rows: SampleRows, uniforms: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return tokens and their log_prob; see ``Backend``."""
        return *draw(rows, uniforms), None
