"""Fit lambda again while a run goes on, from the sequences of its steps."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .ranks import Ranks
from .targets import EBM

_COLUMNS = {"features", "log_b", "log_ratio", "context_id"}  # of each step that is kept


class Refit:
    """A collector of the steps' scored sequences, which fits lambda again from them with the weights a/q.

    Args:
        target: the target whose lambda is fitted.
        min_ess: lambda is fitted again while the effective sample size of its fit is below this, so 0 means never.
        samples: the number of sequences that a fit takes.
    """

    def __init__(self, target: EBM, min_ess: float, samples: int) -> None:
        self.target, self.min_ess, self.samples = target, min_ess, samples
        self._pool: list[dict[str, Tensor]] = []

    def take(self, batch: Batch, ranks: Ranks) -> bool:
        """Take in a step. Return whether the target has another lambda now (``EBM.refit``)."""
        report = self.target.report
        if report is None or report.ess >= self.min_ess or not self.target.moment_names:
            return False
        x, width = batch.samples, len(self.target.moment_names)
        log_target, log_q, log_base, features, context = (
            ranks.gather(each) for each in (batch.inputs["log_target"], x.log_prob, batch.log_base,
                                            batch.features[:, :width], x.context_id)
        )  # fmt: skip
        lambda_ = self.target.lambda_.to(features)
        log_b = torch.where(log_target == -torch.inf, -torch.inf, log_target - log_base - features @ lambda_)
        self._pool.append({"features": features, "log_b": log_b, "log_ratio": log_base - log_q, "context_id": context})
        if sum(len(each["context_id"]) for each in self._pool) < self.samples:
            return False
        whole = {name: torch.cat([each[name] for each in self._pool]) for name in self._pool[0]}
        self._pool = []
        try:
            self.target.refit(**whole)
        except ValueError as error:
            warnings.warn(f"lambda could not be fitted again and stays as it is: {error}", stacklevel=3)
        return self.target.report is not report

    def state_dict(self) -> list[dict[str, Tensor]]:
        """Return the sequences that were taken in since the last fit."""
        return self._pool

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            ValueError: the state is not a list of the sequences of steps. Nothing has changed then.
        """
        if not isinstance(state, list) or any(not isinstance(each, dict) or set(each) != _COLUMNS for each in state):
            raise ValueError(
                "the state's pool must be a list with the sequences of each step, as Matcher.state_dict returned it, "
                f"got {state!r:.200}"
            )
        self._pool = list(state)
