"""Measure how a policy does under a verifier, from n samples of each prompt: pass@k, maj@k, coverage, distinct answers.

pass@k is the probability that at least one of k samples of a prompt is right, averaged over prompts. Every estimate
here is unbiased for samples of the policy itself, and its standard error is over prompts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from .estimators import Estimate


def pass_at_k(right: Tensor, context_id: Tensor, k: int) -> Estimate:
    """Return the unbiased estimate of pass@k (Chen et al. 2021, arXiv:2107.03374, eq. 1).

    For a prompt with n samples, of which c are right, it is 1 - C(n - c, k)/C(n, k). This is averaged over prompts.

    Args:
        right: (N,) bool, or numbers of which 1 is right and 0 is wrong.
        context_id: (N,) integer, the prompt of each sample.
        k: a positive integer, at most the number of samples of each prompt.

    Returns:
        The mean over prompts with its standard error, which is NaN for one prompt.

    Raises:
        ValueError: a value is not 0 or 1, the shapes do not fit, k is out of range, or there are no samples.

    Examples:
        >>> pass_at_k(torch.tensor([1, 0, 0, 0]), torch.zeros(4, dtype=torch.int64), 2).value
        0.5
    """
    right = _checked(right, context_id)
    _check_k(k, context_id)
    values = []
    for each in _by_context(right, context_id):
        values.append(1 - _none_of(len(each), int(each.sum()), k))
    return _over_prompts(values)


def maj_at_k(answers: Sequence[Hashable], right: Tensor, context_id: Tensor, k: int, *, seed: int = 0) -> Estimate:
    """Return maj@k: how often the commonest answer of k samples is right.

    If several answers are tied, the share of them that is right counts. If a prompt has n > k samples, maj@k is the
    mean over 200 draws of k of them.

    Args:
        answers: N answers of any kind that can be compared, such as the string after "answer:". Equal answers of a
            prompt must be equally right. None means no answer: it has no vote, and k samples without any answer are
            wrong.
        right, context_id, k: as in ``pass_at_k``.
        seed: the seed of the draws.

    Raises:
        ValueError: as ``pass_at_k``. Also if there are more or fewer answers than samples, or an answer of a prompt is
            right in one sample and wrong in another.
    """
    right = _checked(right, context_id)
    _check_k(k, context_id)
    if len(answers) != len(right):
        raise ValueError(f"answers must hold one for each of {len(right)} samples, got {len(answers)}")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for context in _contexts(context_id):
        places = (context_id == context).nonzero()[:, 0].tolist()
        verdict = _verdicts(answers, right, places, context)
        draws = 1 if len(places) == k else 200
        total = 0.0
        for _ in range(draws):
            chosen = torch.randperm(len(places), generator=generator)[:k].tolist()
            counts = Counter(answers[places[i]] for i in chosen if answers[places[i]] is not None)
            if not counts:
                continue
            most = max(counts.values())
            first = [answer for answer, count in counts.items() if count == most]
            total += sum(verdict[answer] for answer in first) / len(first)
        values.append(total / draws)
    return _over_prompts(values)


def coverage(right: Tensor, context_id: Tensor) -> Estimate:
    """Return the share of prompts that have a right sample, which is pass@n of all n samples of each.

    Args:
        right, context_id: as in ``pass_at_k``.
    """
    right = _checked(right, context_id)
    return _over_prompts([float(bool(each.any())) for each in _by_context(right, context_id)])


def distinct_at_k(answers: Sequence[Hashable], right: Tensor, context_id: Tensor, k: int) -> Estimate:
    """Return the expected number of different right answers among k samples of a prompt, without bias.

    An answer that m of n samples give is among k of these samples with the probability 1 - C(n - m, k)/C(n, k).

    Args:
        answers, right, context_id, k: as in ``maj_at_k``.
    """
    right = _checked(right, context_id)
    _check_k(k, context_id)
    if len(answers) != len(right):
        raise ValueError(f"answers must hold one for each of {len(right)} samples, got {len(answers)}")
    values = []
    for context in _contexts(context_id):
        places = (context_id == context).nonzero()[:, 0].tolist()
        verdict = _verdicts(answers, right, places, context)
        counts = Counter(answers[i] for i in places if verdict[answers[i]])
        values.append(sum(1 - _none_of(len(places), m, k) for m in counts.values()))
    return _over_prompts(values)


def measure(
    right: Tensor,
    context_id: Tensor,
    k: Sequence[int],
    *,
    texts: Sequence[str],
    finished: Tensor,
    length: Tensor,
    answers: Sequence[Hashable] | None = None,
) -> dict[str, Estimate]:
    """Return all measures of samples of a policy by name, each with its standard error over prompts.

    Args:
        right: (N,) bool, whether each sample is right.
        context_id: (N,) integer, the prompt of each sample.
        k: the values of k for which pass@k and the other measures of k samples are returned.
        texts: N completions. Right completions that differ beyond white space at their ends are distinct.
        finished: (N,) bool, whether each ended by itself.
        length: (N,) the number of scored tokens of each.
        answers: as in ``maj_at_k``. With None, maj@k is not among the measures.

    Returns:
        ``pass@k`` for each k; ``coverage``, which is pass@n of all n samples of a prompt; for each k above 1
        ``distinct@k``, the number of different right completions among k samples, and with answers ``maj@k``;
        ``length``, the mean of the scored tokens; and ``truncated``, the share that was cut off.

    Raises:
        ValueError: as ``pass_at_k`` and ``maj_at_k``.
    """
    found = {f"pass@{each}": pass_at_k(right, context_id, each) for each in k}
    found["coverage"] = coverage(right, context_id)
    # a text may be right in one sample and, cut off, wrong in another; the pair keeps the two apart
    named = [(bool(each), text.strip()) for each, text in zip(right, texts, strict=True)]
    found |= {f"distinct@{each}": distinct_at_k(named, right, context_id, each) for each in k if each > 1}
    if answers is not None:
        found |= {f"maj@{each}": maj_at_k(answers, right, context_id, each) for each in k if each > 1}
    for name, values in (("length", length), ("truncated", ~finished.bool())):
        found[name] = _over_prompts([float(each.double().mean()) for each in _by_context(values, context_id)])
    return found


def _verdicts(answers: Sequence[Hashable], right: Tensor, places: list[int], context: int) -> dict[Hashable, bool]:
    """Return for each answer of a prompt whether it is right."""
    found: dict[Hashable, bool] = {}
    for i in places:
        if answers[i] is None:
            found[None] = False
        elif found.setdefault(answers[i], bool(right[i])) != bool(right[i]):
            raise ValueError(f"the answer {answers[i]!r} of context {context} is right in one sample, not in another")
    return found


def _none_of(n: int, c: int, k: int) -> float:
    """Return the probability C(n - c, k)/C(n, k) that k of n items hold none of c.

    It is computed as the product of 1 - k/(n - i) over i < c, because the binomials would overflow.
    """
    return 0.0 if n - c < k else math.exp(sum(math.log1p(-k / (n - i)) for i in range(c)))


def _checked(right: Tensor, context_id: Tensor) -> Tensor:
    if right.dim() != 1 or right.shape != context_id.shape or len(right) == 0:
        raise ValueError(
            f"right and context_id must be (N,), one for each of N >= 1 samples, got {tuple(right.shape)} and "
            f"{tuple(context_id.shape)}"
        )
    if bool(((right != 0) & (right != 1)).any()):
        raise ValueError(
            "right must be bool, or hold 0 and 1 only: of a verifier that gives other values take v >= 0.5"
        )
    return right.bool()


def _check_k(k: int, context_id: Tensor) -> None:
    fewest = min(Counter(context_id.tolist()).values())
    if not isinstance(k, int) or not 1 <= k <= fewest:
        raise ValueError(f"k must be an integer from 1 to the fewest samples of a prompt, {fewest}, got {k!r}")


def _contexts(context_id: Tensor) -> list[int]:
    return sorted(set(context_id.tolist()))


def _by_context(right: Tensor, context_id: Tensor) -> list[Tensor]:
    return [right[context_id == context] for context in _contexts(context_id)]


def _over_prompts(values: Sequence[float]) -> Estimate:
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, math.nan)
    spread = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean, math.sqrt(spread / len(values)))
