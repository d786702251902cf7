"""Define what ``dm_loss`` returns with every backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..objectives import LOG_PROPOSAL, LOG_TARGET, LOG_Z, Terms
from .batch import CLIPPED, ENTROPY, LABEL, LOG_PROB, LOG_RATIO, LOG_TARGET_RATIO, LSE, WEIGHT, Scores


@dataclass(eq=False, repr=False)  # a frozen dataclass would cost a microsecond a call
class DMLossOutput:
    """The loss and the per-sequence values of which it is made. Only ``loss`` carries a gradient.

    The properties are made when they are read, from one block of results and one of inputs.

    Attributes:
        loss: 0-d fp64, or (B,) with ``reduction="none"``; carries the gradient.
    """

    loss: Tensor
    _scores: Scores
    _terms: Terms
    _shape: tuple[int, ...]  # of the tokens
    _scored: Tensor | None = None  # None: all sequences
    _has_entropy: bool = False

    @property
    def log_prob(self) -> Tensor:
        """(B,) fp64, log pi(x) in nats."""
        return self._scores.sequences.select(0, LOG_PROB)

    @property
    def log_ratio(self) -> Tensor | None:
        """(B,) fp64, log rho = log pi - log q; 0 on-policy. None where log_proposal was not given."""
        terms = self._terms
        return self._scores.sequences.select(0, LOG_RATIO) if terms.given & LOG_PROPOSAL or terms.on_policy else None

    @property
    def log_target_ratio(self) -> Tensor | None:
        """(B,) fp64, log u = log P - log Z - log q; None where log_target or log_z was not given."""
        if not (self._terms.given & LOG_TARGET and self._terms.given & LOG_Z) or self.log_ratio is None:
            return None
        return self._scores.sequences.select(0, LOG_TARGET_RATIO)

    @property
    def weight(self) -> Tensor:
        """(B,) fp64, the weight A."""
        return self._scores.sequences.select(0, WEIGHT)

    @property
    def n_clipped(self) -> Tensor:
        """0-d int64, the number of sequences whose weight max_weight or whose return max_return bounded."""
        return self._scores.sequences.select(0, CLIPPED).sum().to(torch.int64)

    @property
    def entropy(self) -> Tensor | None:
        """(B,) fp64, nats summed over scored tokens; None without ``return_entropy`` or an ``entropy_coefficient``."""
        return self._scores.sequences.select(0, ENTROPY) if self._has_entropy else None

    @property
    def token_log_prob(self) -> Tensor:
        """fp64 in the shape of ``tokens``, log pi of each token given those before it, in nats; 0 if not scored."""
        rows = self._scores.rows
        return (rows.select(0, LABEL) - rows.select(0, LSE)).view(self._shape)

    @property
    def log_proposal(self) -> Tensor | None:
        """(B,) fp64, the input as the loss used it, or None."""
        return self._terms.log_proposal

    @property
    def log_target(self) -> Tensor | None:
        """(B,) fp64, the input as the loss used it, or None."""
        return self._terms.log_target

    @property
    def log_z(self) -> Tensor | None:
        """(B,) fp64, the input as the loss used it, or None."""
        return self._terms.log_z

    @property
    def scored(self) -> Tensor:
        """(B,) bool, sequences whose log pi was computed by this call."""
        return torch.ones_like(self.weight, dtype=torch.bool) if self._scored is None else self._scored

    @property
    def n_empty(self) -> Tensor:
        """0-d int64, the number of sequences whose context has log_z = -inf. Their A is 0, and they count in B."""
        log_z = self.log_z
        if log_z is None:
            return torch.zeros((), dtype=torch.int64, device=self.weight.device)
        return (log_z == -torch.inf).sum()

    def check(self) -> DMLossOutput:
        """Raise the faults that a device has recorded and the host has not read yet, and return self.

        The CPU raises at once, so that nothing is left to raise here.
        """
        for check in self._scores.recorded:
            check()
        return self

    def spread(self, kept: Tensor, terms: Terms) -> DMLossOutput:
        """Return the output of N sequences, of which this output covers those that were kept.

        The others have weight 0. Their log pi is NaN, unless they were drawn from pi, whose log pi the sampler knows.

        Args:
            kept: (N,) bool, whether this output covers a sequence.
            terms: the inputs of all N sequences, with log_proposal.
        """
        log_q = terms.log_proposal
        assert log_q is not None
        rest = terms.with_log_prob(log_q if terms.on_policy else torch.full_like(log_q, math.nan))
        assert rest.log_prob is not None
        nothing = torch.zeros_like(log_q)
        columns = [rest.log_prob, nothing, rest.log_ratio, rest.log_target_ratio, nothing, nothing, nothing]
        sequences = torch.stack([nothing if column is None else column for column in columns])
        sequences[:, kept] = self._scores.sequences
        scores = Scores(self._scores.rows[:, :0], sequences, None, self._scores.recorded)
        return DMLossOutput(self.loss, scores, terms, (0,), kept, self._has_entropy)

    @staticmethod
    def join(outputs: Sequence[DMLossOutput], gather: Callable[[Tensor], Tensor] = lambda x: x) -> DMLossOutput:
        """Return the outputs of the parts of a step as the output of one call, without rows.

        Args:
            outputs: the outputs of calls with the same objective and the same inputs. The loss is that of the first.
            gather: a function that concatenates the values of all ranks along the first dimension.
        """
        first = outputs[0]
        sequences = gather(torch.cat([out._scores.sequences.T for out in outputs])).T
        terms = Terms.join([out._terms for out in outputs], gather)
        scored = gather(torch.cat([out.scored for out in outputs]))
        nothing = sequences.new_empty(2, 0)
        return DMLossOutput(first.loss.detach(), Scores(nothing, sequences), terms, (0,), scored, first._has_entropy)
