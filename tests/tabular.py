"""Know a tabular autoregressive model over every sequence of a small space, in fp64 and without dmfast's code.

All of its probabilities, divergences and their gradients are known exactly. The tests of losses and of estimators share
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Run in one thread. On a busy machine each of thousands of tiny calls would wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Space:
    """Hold all ``symbols ** length`` sequences. A model is a table of logits, one row for each prefix."""

    def __init__(self, length: int = 3, symbols: int = 5) -> None:
        self.tokens = torch.cartesian_prod(*[torch.arange(symbols)] * length)
        self.n = self.tokens.shape[0]
        rows, start, prefix = [], 0, torch.zeros(self.n, dtype=torch.int64)
        for t in range(length):
            rows.append(start + prefix)
            start += symbols**t
            prefix = prefix * symbols + self.tokens[:, t]
        self.rows = torch.stack(rows, 1)
        self.table_shape = (start, symbols)

    def table(self, seed: int, scale: float = 1.0) -> Tensor:
        """Return random logits that fp32 holds exactly, as fp64."""
        generator = torch.Generator().manual_seed(seed)
        return (scale * torch.randn(self.table_shape, generator=generator)).double()

    def logits(self, table: Tensor) -> Tensor:
        """Return the logits of every sequence, (n, length, symbols)."""
        return table[self.rows]

    def log_prob(self, table: Tensor, temperature: float = 1.0, softcap: float | None = None) -> Tensor:
        """Return (n,) log pi of every sequence, differentiable."""
        z = self.logits(table)
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        z = z / temperature
        log_p = z - z.exp().sum(-1, keepdim=True).log()
        return log_p.gather(-1, self.tokens[..., None]).sum((1, 2))

    def table_of(self, p: Tensor) -> Tensor:
        """Return the table whose model is the distribution p > 0."""
        length, (n_rows, symbols) = self.tokens.shape[1], self.table_shape
        mass = torch.zeros(n_rows, symbols, dtype=torch.float64)
        for t in range(length):
            mass.index_put_((self.rows[:, t], self.tokens[:, t]), p, accumulate=True)
        return mass.log()


@dataclass(frozen=True)
class Target:
    """Hold P over a space, with Z and p = P/Z."""

    log_score: Tensor  # log P, -inf where P = 0

    @property
    def z(self) -> Tensor:
        return self.log_score.exp().sum()

    @property
    def p(self) -> Tensor:
        return self.log_score.exp() / self.z


def hard_target(log_base: Tensor, seed: int = 7) -> Target:
    """Return P = a b, where b = 0 on about a third of the sequences and lies in (0, 5) elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    b = 5 * torch.rand(log_base.shape, generator=generator, dtype=torch.float64)
    b[torch.rand(log_base.shape, generator=generator) < 0.35] = 0
    return Target(log_base + b.log())


def soft_target(log_base: Tensor, tokens: Tensor) -> Target:
    """Return P = a exp(lambda . phi) > 0. phi_1: symbol 0 occurs. phi_2: the number of symbols equal to the first."""
    phi = torch.stack([(tokens == 0).any(1), (tokens == tokens[:, :1]).sum(1)], 1).double()
    return Target(log_base + phi @ torch.tensor([1.2, -0.6], dtype=torch.float64))


# these divergences of two vectors of probabilities are differentiable in the second, and p may hold zeros
def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p‖q)."""
    return torch.xlogy(p, p).sum() - torch.xlogy(p, q).sum()


def js(p: Tensor, q: Tensor) -> Tensor:
    """Return JS(p, q) = KL(p‖m)/2 + KL(q‖m)/2, m = (p + q)/2."""
    return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2


def tv(p: Tensor, q: Tensor) -> Tensor:
    """Return TV(p, q) = sum |p - q| / 2."""
    return (p - q).abs().sum() / 2


def counts(p: Tensor, total: int = 2000) -> Tensor:
    """Return how often each sequence stands among ``total``: about total * p, and never 0.

    Under the distribution counts / total an empirical mean is the exact expectation.
    """
    n = (p * total).round().long().clamp(min=1)
    n[n.argmax()] += total - n.sum()
    return n
