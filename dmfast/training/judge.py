"""Tell the right answers of an evaluation from the wrong ones, and measure pass@k."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..estimators import Estimate
from ..samples import Samples
from ..targets import EBM, Feature, FeatureValues, Verifier
from ..verified import measure


@dataclass(frozen=True)
class Judge:
    """A judge of answers: an answer is right if all features reach a threshold.

    Attributes:
        features: the verifiers, or the binary rewards.
        threshold: the lowest value of a right answer.
        k: the values of k in pass@k and related measures, ascending. None takes 1, 4, 16, ... up to the samples of a
            prompt.
    """

    features: tuple[Feature, ...]
    threshold: float = 0.5
    k: tuple[int, ...] | None = None

    def check(self, samples: int, contexts: int, argument: str) -> None:
        """Check that an evaluation draws enough for the largest k.

        Args:
            samples: ``DMConfig.eval_samples``.
            contexts: the number of prompts in a data set.
            argument: the name of the data set, for errors.

        Raises:
            ValueError: it draws fewer samples of a prompt than the largest k.
        """
        some = min(samples, contexts)
        of_each = math.ceil(samples / some)
        if self.k is not None and self.k[-1] > of_each:
            raise ValueError(
                f"eval_pass_k={list(self.k)} needs {self.k[-1]} samples of each prompt, and eval_samples={samples} are "
                f"{of_each} of each of the {some} prompts of {argument}: set eval_samples={self.k[-1] * some} or more, "
                "give fewer prompts, or ask for a smaller k"
            )

    def right(self, values: FeatureValues) -> Tensor:
        """Return whether each answer is right, (N,) bool."""
        each = torch.stack([values(feature) for feature in self.features])
        return (each >= self.threshold).all(0)

    def measured(
        self, samples: Samples, right: Tensor, gather: Callable[[Tensor], Tensor],
        gather_texts: Callable[[list[str]], list[str]],
    ) -> dict[str, Estimate]:  # fmt: skip
        """Return the measures of ``dmfast.verified.measure`` over the samples of all ranks.

        Args:
            samples: the N samples of this rank, equally many of each prompt.
            right: (N,) bool, whether each of these samples is right.
            gather, gather_texts: functions that put together what the ranks hold.
        """
        texts, finished = gather_texts(samples.text), gather(samples.finished)
        right, contexts = gather(right).cpu(), gather(samples.context_id).cpu()
        n = len(contexts) // len(set(contexts.tolist()))
        k = self.k if self.k is not None else tuple(4**i for i in range(16) if 4**i <= n)
        answering = [each for each in self.features if isinstance(each, Verifier) and each.answer is not None]
        answers = answering[0].answers(texts, finished.tolist()) if len(answering) == 1 else None
        arguments: dict[str, Any] = {
            "texts": texts, "finished": finished.cpu(), "length": gather(samples.score_mask.sum(1)).cpu(),
        }  # fmt: skip
        try:
            return measure(right, contexts, k, answers=answers, **arguments)
        except ValueError as error:
            if answers is None:
                raise
            warnings.warn(f"maj@k is left out of this evaluation: {error}", stacklevel=2)
            return measure(right, contexts, k, **arguments)


def judge_of(
    target: EBM, rewards: Sequence[Feature], *, threshold: float = 0.5, k: Sequence[int] | None = None
) -> Judge | None:
    """Return the judge of an evaluation, or None if nothing tells right from wrong.

    It takes the target's verifiers. If there are none, it takes the rewards that are verifiers or binary.

    Raises:
        ValueError: k is given, and nothing tells right from wrong.
    """
    features: list[Feature] = list(target.verifiers)
    if not features:
        features = [each.source for each in rewards if isinstance(each.source, Verifier) or each.binary]
    if not features:
        if k is not None:
            raise ValueError(
                f"eval_pass_k={list(k)} needs something that tells right from wrong: a Verifier among the target's "
                "constraints or its monitored features, or a reward with binary=True"
            )
        return None
    return Judge(tuple(features), threshold, None if k is None else tuple(k))


def is_over_prompts(name: str) -> bool:
    """Return whether a measure of this name comes from a ``Judge``, whose standard errors are over prompts."""
    return "@" in name or name in ("coverage", "truncated", "length")
