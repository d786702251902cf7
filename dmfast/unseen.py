"""Find out where samples can't tell a divergence from p, because all of them lack a feature that p has.

For example, half of p has a feature and sixteen sequences lack it. All their weights P/q are equal. They then give
KL(p||pi) = 0 with an error of 0, an effective sample size of 16, and a Z without the part of p that they lack. Where a
moment's feature had one value in all sequences, and p has another mean, estimates from them are unknown. No swap of q
may rest on them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .estimators import Estimate, Estimates, PartitionFunction, RunningEstimates

#: The share of p that may lie in sequences that were never seen. A rarer feature matters less than the error of the
#: estimates.
_SHARE = 0.05
#: A smaller gap between two log Z matters less than the error of the estimates.
_GAP = 0.2
#: With fewer effective sequences the standard error of Z says nothing.
_TRUSTED = 10.0


class Seen:
    """The range of each moment's feature over the steps that ``RunningEstimates`` keeps.

    Args:
        wanted: the moments' values by name, in the order of the columns.
        decay: the decay of the estimates. With 1 all steps count, and only the range over all of them is kept.
    """

    def __init__(self, wanted: Mapping[str, float], decay: float = 0.8) -> None:
        self.wanted = dict(wanted)
        self._steps: deque[Tensor] = deque(maxlen=RunningEstimates.kept_steps(decay))  # each (2, F)

    def clear(self) -> None:
        """Forget all steps."""
        self._steps.clear()

    def update(self, features: Tensor) -> None:
        """Take in the features of a step's sequences, (N, F + ...). The first F columns are the moments'."""
        if not len(features) or not self.wanted:
            return
        columns = features[:, : len(self.wanted)].detach().double().cpu()
        self._steps.append(torch.stack([columns.amin(0), columns.amax(0)]))
        if self._steps.maxlen is None:
            low, high = torch.stack(list(self._steps)).unbind(1)
            self._steps = deque([torch.stack([low.amin(0), high.amax(0)])])

    def unseen(self) -> dict[str, float]:
        """Return the moments whose feature never varied and has another mean under p, with the value that was seen."""
        if not self._steps:
            return {}
        low_high = torch.stack(list(self._steps))
        lows, highs = low_high[:, 0].amin(0).tolist(), low_high[:, 1].amax(0).tolist()
        found = {}
        for name, low, high in zip(self.wanted, lows, highs, strict=True):
            if low == high and abs(self.wanted[name] - low) > (_SHARE if low in (0, 1) else 0.0):
                found[name] = low
        return found

    def state_dict(self) -> Tensor | None:
        """Return the ranges of the steps, (steps, 2, F), or None where nothing was taken in."""
        return torch.stack(list(self._steps)) if self._steps else None

    def load_state_dict(self, state: Tensor | None) -> None:
        """Restore the state that ``state_dict`` returned."""
        self._steps.clear()
        self._steps.extend(() if state is None else state.clone())

    def assume_all(self) -> None:
        """Take every feature as seen, because nothing is known of the steps so far."""
        ends = torch.tensor([[-math.inf], [math.inf]], dtype=torch.float64)
        self._steps.append(ends.expand(2, len(self.wanted)).clone())


def unseen(features: Tensor, wanted: Mapping[str, float]) -> dict[str, float]:
    """Return ``Seen.unseen`` for these sequences alone."""
    seen = Seen(wanted)
    seen.update(features)
    return seen.unseen()


def z_gap(steps: PartitionFunction, fit: Estimate, errors: float = 3.0, trusted: float = _TRUSTED) -> float | None:
    """Return log Z of the steps minus that of the fit of lambda if both can't be right, and else None.

    They can't if they differ by more than 0.2 and by more than ``errors`` standard errors of both. While a few
    sequences carry the sum of the weights, the steps' standard error is computed from these few and would explain any
    gap, so it counts only from ``trusted`` effective sequences on. Until then only a Z near the fit's will do, and
    because more sequences bring either the one or the other, a run whose fit is right waits for a few steps at most.

    Args:
        steps: Z of the steps.
        fit: log Z, as the fit found it.
    """
    gap = steps.log_z - fit.value
    own = steps.stderr if steps.ess >= trusted else 0.0
    explained = errors * math.hypot(*(e for e in (own, fit.stderr) if math.isfinite(e)))
    return gap if math.isfinite(gap) and abs(gap) > max(explained, _GAP) else None


def unknown(estimates: Estimates) -> Estimates:
    """Return the estimates with NaN for all divergences."""
    nothing = Estimate(math.nan, math.nan)
    others = ("log_z", "ess")
    divergences = {name: nothing for name, each in vars(estimates).items() if name not in others and each is not None}
    return replace(estimates, **divergences)


def said(missing: Mapping[str, float]) -> str:
    """Return in words, such as "no sequence had women", what ``unseen`` returned for each moment."""
    how = {0.0: "no sequence had {}", 1.0: "every sequence had {}"}
    return ", ".join(
        how.get(value, "{} was " + f"{value:g} in every sequence").format(n) for n, value in missing.items()
    )
