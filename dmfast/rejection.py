"""Draw sequences that nearly follow the target itself, by quasi-rejection sampling.

The method is from Eikema, Kruszewski, Dance, Elsahar, Dymetman 2022, "An approximate sampler for energy-based models
with divergence diagnostics", TMLR, openreview VW4IrC0n0M.

A sequence x ~ q is accepted with probability min(1, P(x)/(beta q(x))). The accepted sequences have the distribution

    p_beta(x) = min(P(x), beta q(x)) / Z_beta,     Z_beta = sum_x min(P(x), beta q(x))

which is p if beta >= P/q everywhere. A larger beta comes nearer to p and accepts fewer sequences. With w = P/q and
v = min(w, beta), all of the following are means over one set of x ~ q, for any beta:

    acceptance rate   mean v / beta
    KL(p||p_beta)     mean[w max(0, log w/beta)] / mean w + log(mean v / mean w)
    TVD(p, p_beta)    mean |w/mean w - v/mean v| / 2
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .estimators import Estimate, _from_influence, _mean
from .samples import Prompt, Samples
from .sampling import Sampler
from .seeds import seed_for
from .targets import EBM


@dataclass(frozen=True)
class RejectionPoint:
    """The acceptance rate and the divergences from p for one beta, with standard errors.

    Attributes:
        log_beta: log beta in nats.
        acceptance: the acceptance rate, in [0, 1].
        kl: KL(p||p_beta) in nats.
        tvd: TVD(p, p_beta), in [0, 1].
    """

    log_beta: float
    acceptance: Estimate
    kl: Estimate
    tvd: Estimate


class RejectionCurve:
    """The trade-off between quality and efficiency of quasi-rejection sampling, for every beta.

    All values come from one set of sequences x ~ q of one context.

    Args:
        log_weight: (N,) log P(x) - log q(x), nats; -inf where P = 0.

    Raises:
        ValueError: the shape is not (N,) with N of 2 or more, a value is NaN or +inf, or P = 0 everywhere.
    """

    def __init__(self, log_weight: Tensor) -> None:
        log_w = log_weight.detach().double().cpu()
        if log_w.dim() != 1 or len(log_w) < 2:
            raise ValueError(f"log_weight must be (N,) with two sequences or more, got {tuple(log_weight.shape)}")
        if not bool((log_w < math.inf).all()):
            raise ValueError("log_weight holds NaN or +inf")
        if not bool((log_w > -math.inf).any()):
            raise ValueError(f"P(x) = 0 for all {len(log_w)} sequences of the proposal: nothing would ever be accepted")
        self.log_weight = log_w

    @property
    def positive(self) -> float:
        """The share of sequences with P > 0, which is the highest possible acceptance rate."""
        return float((self.log_weight > -math.inf).double().mean())

    @property
    def largest(self) -> float:
        """The largest log P/q, nats. At this log beta or above, these samples can't tell p_beta from p."""
        return float(self.log_weight.max())

    def at(self, log_beta: float) -> RejectionPoint:
        """Return the acceptance rate and the divergences at this log beta.

        Raises:
            ValueError: log_beta is not finite.
        """
        if not math.isfinite(log_beta):
            raise ValueError(f"log_beta must be finite, got {log_beta!r}")
        log_w, one = self.log_weight, torch.ones_like(self.log_weight)
        w = (log_w - self.largest).exp()  # only the acceptance rate depends on the scale of w
        accepted = (log_w - log_beta).clamp(max=0).exp()  # v / beta
        # v has the scale of beta where all weights are beyond beta, and the scale of w where all are below it
        v = (log_w.clamp(max=log_beta) - min(self.largest, log_beta)).exp()
        shift = min(self.largest, log_beta) - self.largest
        over = torch.where(w == 0, 0.0, w * (log_w - log_beta).clamp(min=0))
        z, z_beta, excess = w.mean(), v.mean(), over.mean()
        kl = excess / z + z_beta.log() + shift - z.log()
        kl_influence = (over - excess) / z - excess / z**2 * (w - z) + (v - z_beta) / z_beta - (w - z) / z
        gap = w / z - v / z_beta
        tvd = gap.abs().mean() / 2
        sign = gap.sign()
        tvd_influence = (gap.abs() - 2 * tvd - (sign * w).mean() / z**2 * (w - z)
                         + (sign * v).mean() / z_beta**2 * (v - z_beta)) / 2  # fmt: skip
        return RejectionPoint(
            float(log_beta), _mean(accepted, one), _from_influence(kl, kl_influence, one),
            _from_influence(tvd, tvd_influence, one),
        )  # fmt: skip

    def log_beta_for(self, acceptance: float) -> float:
        """Return the log beta at which these samples are accepted at this rate.

        The result is exact, because the rate is piecewise a/beta + b.

        Raises:
            ValueError: the rate is not above 0, or the share of sequences with P > 0 is too small for it.
        """
        if not 0 < acceptance <= self.positive:
            raise ValueError(
                f"acceptance must be above 0 and at most {self.positive:.4g}, the share of sequences with P > 0; "
                f"got {acceptance!r}"
            )
        log_w = self.log_weight[self.log_weight > -math.inf].sort().values
        n, m = len(self.log_weight), len(log_w)
        sums = torch.logcumsumexp(log_w, 0)  # the log of the sum of the weights up to and with each one
        beyond = torch.arange(m - 1, -1, -1, dtype=torch.float64)
        rates = ((sums - log_w).exp() + beyond) / n  # the rates at beta = each weight, which fall
        k = int((rates >= acceptance).sum())  # the number of weights below beta
        if k == 0:  # all are beyond beta, and all are accepted
            return float(log_w[0])
        # beta is above weight k - 1 and not above weight k: acceptance = (sum of k weights / beta + m - k) / n
        return float(sums[k - 1] - math.log(acceptance * n - (m - k)))

    def points(self, n: int = 50) -> list[RejectionPoint]:
        """Return n points at acceptance rates from the highest possible one down to 1/N.

        The rates are equally spaced in their logarithm.
        """
        rates = torch.logspace(math.log10(self.positive), math.log10(1 / len(self.log_weight)), n, dtype=torch.float64)
        return [self.at(self.log_beta_for(min(float(rate), self.positive))) for rate in rates]


@torch.no_grad()
def rejection_curve(
    target: EBM,
    proposal: Sampler,
    n: int = 4096,
    *,
    max_new_tokens: int,
    prompt: Prompt | None = None,
    temperature: float = 1.0,
    seed: int | None = 0,
    batch_size: int = 256,
) -> RejectionCurve:
    """Draw n sequences from the proposal, score them and return the curve of all beta.

    Args:
        target: P.
        proposal: q, such as the base, a trained policy, a ``Prompted`` one or a ``Mixture``.
        prompt: the context of the target. Default: the empty context.
        max_new_tokens, temperature, batch_size: as in ``LanguageModel.sample``.
        seed: the seed of the sequences. ``EBM.fit`` and ``evaluate`` draw other sequences with the same seed, so that
            the curve is not measured on the sample that lambda was fitted on. None takes a seed from torch's global
            generator.

    Raises:
        ValueError: as in ``RejectionCurve``, ``LanguageModel.sample`` and ``EBM.score``.
    """
    x = proposal.sample(None if prompt is None else [prompt], n, max_new_tokens=max_new_tokens,
                        temperature=temperature, seed=None if seed is None else seed_for(seed, "rejection_curve"),
                        batch_size=batch_size)  # fmt: skip
    x.check_log_prob("a rejection curve")
    return RejectionCurve(target.score(x, batch_size=batch_size).log_target - x.log_prob)


@torch.no_grad()
def quasi_rejection_sample(
    target: EBM,
    proposal: Sampler,
    n: int,
    *,
    log_beta: float,
    max_new_tokens: int,
    prompt: Prompt | None = None,
    temperature: float = 1.0,
    seed: int | None = 0,
    batch_size: int = 256,
    max_draws: int = 1_000_000,
) -> tuple[Samples, int]:
    """Draw n independent sequences from p_beta (Eikema et al. 2022, algorithm 1).

    Args:
        log_beta: log beta in nats, for example from ``RejectionCurve.log_beta_for``.
        batch_size: the number of sequences that are drawn from the proposal at a time.
        max_draws: the largest number of draws. The error beyond it says how many were accepted.
        all else: as in ``rejection_curve``.

    Returns:
        n ``Samples``, whose ``log_prob`` is log q, and the number of sequences that were drawn for them.

    Raises:
        ValueError: n, batch_size or log_beta is out of range, or as in ``LanguageModel.sample`` and ``EBM.score``.
        RuntimeError: max_draws sequences were not enough.
    """
    if n < 1 or batch_size < 1 or not math.isfinite(log_beta):
        raise ValueError(f"n and batch_size must be positive and log_beta finite, got {n}, {batch_size}, {log_beta}")
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    generator = torch.Generator().manual_seed(seed_for(seed, "acceptance"))
    kept: list[Samples] = []
    drawn = accepted = 0
    while accepted < n:
        if drawn >= max_draws:
            raise RuntimeError(
                f"{accepted} of {drawn:,} sequences were accepted, {n} are wanted: take a smaller log_beta, a proposal "
                "nearer to the target (a trained policy), or a larger max_draws"
            )
        x = proposal.sample(None if prompt is None else [prompt], batch_size, max_new_tokens=max_new_tokens,
                            temperature=temperature, seed=seed_for(seed, f"quasi_rejection_sample {drawn}"),
                            batch_size=batch_size)  # fmt: skip
        x.check_log_prob("rejection sampling")
        log_rate = target.score(x, batch_size=batch_size).log_target - x.log_prob - log_beta
        uniform = torch.rand(batch_size, generator=generator, dtype=torch.float64)
        taken = (uniform.log() < log_rate.cpu()).nonzero()[:, 0][: n - accepted]
        # the sequences after the last one that was needed do not count as draws
        drawn += batch_size if accepted + len(taken) < n else int(taken[-1]) + 1
        accepted += len(taken)
        kept.append(x[taken.to(x.tokens.device)])
    return Samples.cat([part for part in kept if len(part)]), drawn


def plot_rejection(curves: Mapping[str, RejectionCurve], path: str | Path, *, points: int = 50) -> None:
    """Plot TVD(p, p_beta) and KL(p||p_beta) against the acceptance rate.

    Each proposal has a line with its standard error. The plot needs matplotlib (``pip install 'dmfast[train]'``).

    Args:
        curves: the curves by the names that the legend shows.
        path: the path of the picture, a .png, .svg or .pdf.

    Raises:
        ValueError: there is no curve.
    """
    from matplotlib.figure import Figure

    if not curves:
        raise ValueError("curves is empty: pass a RejectionCurve by name")
    figure: Any = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for color, (name, curve) in enumerate(curves.items()):
        found = curve.points(points)
        rates = [point.acceptance.value for point in found]
        for axis, key in zip(axes, ("tvd", "kl"), strict=True):
            values = torch.tensor([getattr(point, key).value for point in found])
            errors = torch.tensor([getattr(point, key).stderr for point in found])
            axis.plot(rates, values, label=name, color=f"C{color}", linewidth=1.5)
            axis.fill_between(rates, values - errors, values + errors, color=f"C{color}", alpha=0.2, linewidth=0)
    for axis, title in zip(axes, ("TVD(p, p_β)", "KL(p‖p_β), nats"), strict=True):
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("acceptance rate")
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8)
    figure.savefig(Path(path), dpi=110)
