"""Samples of the target itself, nearly: quasi-rejection sampling (Eikema, Kruszewski, Dance, Elsahar, Dymetman 2022,
"An approximate sampler for energy-based models with divergence diagnostics", TMLR, openreview VW4IrC0n0M).

A sequence x ~ q is accepted with probability min(1, P(x)/(beta q(x))). What is accepted has the distribution

    p_beta(x) = min(P(x), beta q(x)) / Z_beta,     Z_beta = sum_x min(P(x), beta q(x))

which is p where beta >= P/q everywhere. A larger beta is nearer to p and accepts less. With w = P/q, v = min(w, beta),
all of the following are means over one set of x ~ q, whatever beta:

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
    """What one beta gives, each with its standard error.

    Attributes:
        log_beta: nats. acceptance: the rate. kl: KL(p||p_beta), nats. tvd: TVD(p, p_beta), in [0, 1].
    """

    log_beta: float
    acceptance: Estimate
    kl: Estimate
    tvd: Estimate


class RejectionCurve:
    """Quality against efficiency of quasi-rejection sampling, for all beta from one set of x ~ q of one context.

    Args:
        log_weight: (N,) log P(x) - log q(x), nats; -inf where P = 0.

    Raises:
        ValueError: not (N,) with N of 2 or more, NaN or +inf, or P = 0 everywhere.
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
        """The share of sequences with P > 0, which the acceptance rate can't exceed."""
        return float((self.log_weight > -math.inf).double().mean())

    @property
    def largest(self) -> float:
        """max log P/q: from this log beta on these samples can't tell p_beta from p."""
        return float(self.log_weight.max())

    def at(self, log_beta: float) -> RejectionPoint:
        """What this beta gives.

        Raises:
            ValueError: log_beta is not finite.
        """
        if not math.isfinite(log_beta):
            raise ValueError(f"log_beta must be finite, got {log_beta!r}")
        log_w, one = self.log_weight, torch.ones_like(self.log_weight)
        w = (log_w - self.largest).exp()  # their scale drops out of all but the acceptance rate
        accepted = (log_w - log_beta).clamp(max=0).exp()  # v / beta
        # of weights that are all beyond beta, v has the scale of beta; of all below, that of w
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
        """The log beta at which these samples are accepted at this rate: exact, since the rate is piecewise a/beta + b.

        Raises:
            ValueError: a rate that is not above 0, or that P = 0 forbids.
        """
        if not 0 < acceptance <= self.positive:
            raise ValueError(
                f"acceptance must be above 0 and at most {self.positive:.4g}, the share of sequences with P > 0; "
                f"got {acceptance!r}"
            )
        log_w = self.log_weight[self.log_weight > -math.inf].sort().values
        n, m = len(self.log_weight), len(log_w)
        sums = torch.logcumsumexp(log_w, 0)  # log of the weights up to and with each
        beyond = torch.arange(m - 1, -1, -1, dtype=torch.float64)
        rates = ((sums - log_w).exp() + beyond) / n  # at beta = each weight: it falls
        k = int((rates >= acceptance).sum())  # the weights below beta
        if k == 0:  # all are beyond beta, and all are accepted
            return float(log_w[0])
        # beta is above weight k - 1 and not above weight k: acceptance = (sum of k weights / beta + m - k) / n
        return float(sums[k - 1] - math.log(acceptance * n - (m - k)))

    def points(self, n: int = 50) -> list[RejectionPoint]:
        """n points, at acceptance rates from what is possible down to 1/N, in equal steps of their logarithm."""
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
    """Draws n sequences of the proposal, scores them and says what every beta would give.

    Args:
        target: P. proposal: q, such as the base, a trained policy, a ``Prompted`` one or a ``Mixture``.
        prompt: the context of the target. Default: the empty one.
        max_new_tokens, temperature, batch_size: as in ``LanguageModel.sample``.
        seed: of the sequences. ``EBM.fit`` and ``evaluate`` draw others with the same seed, so that the curve is not
            measured on the sample that lambda was fitted on. None: one from torch's global generator.

    Raises:
        ValueError: as ``RejectionCurve``, ``LanguageModel.sample``, ``EBM.score``.
    """
    x = proposal.sample(None if prompt is None else [prompt], n, max_new_tokens=max_new_tokens,
                        temperature=temperature, seed=None if seed is None else seed_for(seed, "rejection_curve"),
                        batch_size=batch_size)  # fmt: skip
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
    """n independent sequences of p_beta (Eikema et al. 2022, algorithm 1).

    Args:
        log_beta: such as ``RejectionCurve.log_beta_for`` gives.
        batch_size: sequences of the proposal that are drawn at a time.
        max_draws: after so many an error says how many were accepted.
        all else: as in ``rejection_curve``.

    Returns:
        n ``Samples``, whose ``log_prob`` is log q, and how many sequences were drawn for them.

    Raises:
        ValueError: n, batch_size or log_beta out of range; as ``LanguageModel.sample`` and ``EBM.score``.
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
        log_rate = target.score(x, batch_size=batch_size).log_target - x.log_prob - log_beta
        uniform = torch.rand(batch_size, generator=generator, dtype=torch.float64)
        taken = (uniform.log() < log_rate.cpu()).nonzero()[:, 0][: n - accepted]
        # those after the last one that was needed were not looked at
        drawn += batch_size if accepted + len(taken) < n else int(taken[-1]) + 1
        accepted += len(taken)
        kept.append(x[taken.to(x.tokens.device)])
    return Samples.cat([part for part in kept if len(part)]), drawn


def plot_rejection(curves: Mapping[str, RejectionCurve], path: str | Path, *, points: int = 50) -> None:
    """TVD(p, p_beta) and KL(p||p_beta) against the acceptance rate, a line with its standard error for each proposal.

    Needs matplotlib (``pip install 'dmfast[train]'``).

    Args:
        curves: by the name that the legend shows. path: of the picture, a .png, .svg or .pdf.

    Raises:
        ValueError: no curve.
    """
    from matplotlib.figure import Figure

    if not curves:
        raise ValueError("curves is empty")
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
