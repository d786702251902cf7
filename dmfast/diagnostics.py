"""Measure the diversity of samples, and the variance of gradients and of weights.

The experiments of Korbak et al. 2022 (arXiv:2206.00761) report these measures: Distinct-n within a sample,
Self-BLEU-5 between samples, the variance of the gradient and of the advantage with and without a baseline.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .estimators import Estimate, estimate_moments
from .models import LanguageModel
from .objectives import Objective
from .samples import Samples


def nltk() -> Any:
    """Return the nltk module, which is imported at the first call.

    Raises:
        ImportError: nltk is not installed.
    """
    try:
        import nltk
        import nltk.translate.bleu_score
    except ImportError as error:
        raise ImportError("Distinct-n and Self-BLEU need nltk: pip install 'dmfast[train]'") from error
    return nltk


def words(texts: Sequence[str]) -> list[list[str]]:
    """Split each text into words and runs of punctuation, with nltk's ``wordpunct_tokenize``.

    The paper's code uses ``word_tokenize``, which needs a data file. The two differ in contractions and abbreviations.

    Raises:
        TypeError: ``texts`` is one string.
        ImportError: nltk is not installed.
    """
    if isinstance(texts, str):
        raise TypeError(f"texts must be a list of strings, got the string {texts!r}")
    split = nltk().tokenize.wordpunct_tokenize
    return [split(text) for text in texts]


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return Distinct-n: the different n-grams of words in a text over its number of words, averaged over the texts.

    It falls where a text repeats itself. Li et al. 2016 (arXiv:1510.03055) divide by the number of words, for every n,
    over all texts at once. This function divides within each text, as Korbak et al. do, so that the result does not
    depend on the number of texts. A text of T words has at most (T - n + 1)/T, which is 1 for n = 1. It has 0 if it has
    fewer than n words.

    Args:
        texts: the N texts.
        n: the length of the n-grams, 1 or more.

    Returns:
        A value from 0 to 1.

    Raises:
        ValueError: there is no text, or n is below 1.
        TypeError, ImportError: as ``words``.
    """
    shares = _distinct_shares(texts, n)
    return sum(shares) / len(shares)


def _distinct_shares(texts: Sequence[str], n: int) -> list[float]:
    if n < 1 or not len(texts):
        raise ValueError(f"distinct_n needs n of 1 or more and one or more texts, got n={n} and {len(texts)} texts")
    ngrams = nltk().ngrams
    return [len(set(ngrams(text, n))) / max(len(text), 1) for text in words(texts)]


def self_bleu(texts: Sequence[str], n: int = 5) -> float:
    """Return Self-BLEU-n: the BLEU-n of each text with all others as its references, averaged over the texts.

    It is high where samples resemble one another. The measure is that of Zhu et al. 2018 (Texygen) on words. Like
    theirs it smooths precisions of 0 by nltk's ``method1``. (The authors' code of 2206.00761 gives nltk strings instead
    of lists of words, which makes it a BLEU of characters. Its figures are higher than these.)

    The result equals nltk's ``sentence_bleu`` text by text, but the n-grams are counted once for all texts. N-grams,
    smoothing and brevity penalty are nltk's. Self-BLEU grows with N, so compare sets of one size.

    Args:
        texts: the N texts, 2 or more.
        n: the length of the longest n-grams; all lengths from 1 to n weigh the same.

    Returns:
        A value from 0 to 1.

    Raises:
        ValueError: there are fewer than two texts, or n is below 1.
        TypeError, ImportError: as ``words``.
    """
    if n < 1 or len(texts) < 2:
        raise ValueError(f"self_bleu needs n of 1 or more and two or more texts, got n={n} and {len(texts)} texts")
    ngrams, bleu = nltk().ngrams, nltk().translate.bleu_score
    split = words(texts)
    counts = [[Counter(ngrams(text, order)) for order in range(1, n + 1)] for text in split]
    # keep the two highest counts of each n-gram in any text, because the highest may be the text's own
    top: defaultdict[Any, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for of_text in counts:
        for grams in of_text:
            for gram, count in grams.items():
                first, second = top[gram]
                top[gram] = (count, first) if count > first else (first, max(second, count))
    lengths = Counter(map(len, split))
    smooth = bleu.SmoothingFunction().method1
    total = 0.0
    for text, of_text in zip(split, counts, strict=True):
        precisions = []
        for grams in of_text:
            matches = 0
            for gram, count in grams.items():
                first, second = top[gram]
                # where the highest count is this text's own, the highest of the others is the second
                matches += min(count, second if count == first else first)
            precisions.append(bleu.Fraction(matches, max(1, sum(grams.values())), _normalize=False))
        if precisions[0].numerator == 0:
            continue  # BLEU is 0
        others = [range(length) for length, many in lengths.items() if many > (length == len(text))]
        penalty = bleu.brevity_penalty(bleu.closest_ref_length(others, len(text)), len(text))
        smoothed = smooth(precisions, references=others, hypothesis=text, hyp_len=len(text))
        total += penalty * math.exp(math.fsum(math.log(p) / n for p in smoothed))
    return total / len(split)


def diversity(texts: Sequence[str]) -> dict[str, Estimate]:
    """Return ``distinct_1`` to ``distinct_3`` with standard errors, and ``self_bleu_5``, whose error is NaN (unknown).

    Args:
        texts: two texts or more.

    Raises:
        ValueError, TypeError, ImportError: as ``self_bleu``.
    """
    found = {}
    for n in (1, 2, 3):
        shares = torch.tensor(_distinct_shares(texts, n), dtype=torch.float64)
        found[f"distinct_{n}"] = estimate_moments(shares[:, None], torch.zeros_like(shares))[0]
    return found | {"self_bleu_5": Estimate(self_bleu(texts, 5), math.nan)}


def weight_statistics(weight: Tensor) -> dict[str, float]:
    """Return mean, standard deviation and mean absolute value of the weights A = rho (r - baseline).

    Args:
        weight: (N,) A, ``DMLossOutput.weight``. It is divided by Z, as everywhere in dmfast; the paper's is not.

    Returns:
        ``weight_mean``, ``weight_std`` (its square is the variance of the advantage), ``weight_abs`` (mean of |A|).
    """
    return {
        "weight_mean": float(weight.mean()),
        "weight_std": float(weight.std(correction=0)),
        "weight_abs": float(weight.abs().mean()),
    }


@dataclass(frozen=True)
class GradientVariance:
    """The spread of the gradients of single sequences.

    Attributes:
        variance: the mean of ||g_i - g||^2, where g_i is the gradient of -A_i log pi(x_i) and g is their mean. It is
            the trace of their covariance, E||G||^2 - ||E G||^2. The gradient of a step of N sequences has a variance of
            about ``variance`` / N.
        norm: ||g||, the norm of the gradient of the step.
        n: N, the number of sequences.
    """

    variance: float
    norm: float
    n: int


def gradient_variance(
    policy: LanguageModel,
    samples: Samples,
    weight: Tensor,
    *,
    entropy_coefficient: float = 0.0,
    reduce: Callable[[Tensor], Tensor] = lambda x: x,
) -> GradientVariance:
    """Compute the variance of the gradient over the sequences of a step exactly, with one backward for each.

    This costs the forwards and backwards of N batches of one sequence, except those of weight 0 where there is no
    entropy bonus, and the memory of two copies of the parameters that are trained. It changes neither ``.grad`` nor the
    random state.

    Args:
        policy: pi, in the state in which the step was taken. Parameters that need no gradient are left out.
        samples: N sequences.
        weight: (N,) the weight A of each sequence, such as ``DMLossOutput.weight``; the weights are constants.
        entropy_coefficient: as in ``dm_loss``: the bonus's gradient is part of each sequence's.
        reduce: returns the sum of a tensor over ranks, in distributed training; N then counts all ranks.

    Raises:
        ValueError: there is no sequence, or no parameter to train; the number of weights is not N, or a weight is not
            finite.
    """
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    if not len(samples) or weight.shape != (len(samples),) or not bool(weight.isfinite().all()):
        raise ValueError(
            "gradient_variance needs one or more sequences and a finite weight for each, got "
            f"{len(samples)} sequences and weights of shape {tuple(weight.shape)}"
        )
    if not parameters:
        raise ValueError("gradient_variance: no parameter of the policy requires a gradient")

    def gradients() -> Iterator[Sequence[Tensor | None]]:
        for i in range(len(weight)) if entropy_coefficient else weight.nonzero()[:, 0].tolist():
            one = slice(i, i + 1)
            with torch.enable_grad():
                # A is a constant, and reinforce on-policy has A = R
                out = policy.loss(samples[one], objective=Objective("reinforce"), on_policy=True, reward=weight[one],
                                  entropy_coefficient=entropy_coefficient,
                                  log_proposal=samples.log_prob[one] if samples.has_log_prob else None)  # fmt: skip
                yield torch.autograd.grad(out.loss, parameters, allow_unused=True)

    return spread(gradients(), parameters, len(samples), reduce)


def spread(
    gradients: Iterable[Sequence[Tensor | None]],
    parameters: Sequence[Tensor],
    n: int,
    reduce: Callable[[Tensor], Tensor] = lambda x: x,
) -> GradientVariance:
    """Return mean and variance of N gradients in one pass, by Welford's method.

    Welford's method subtracts no two large numbers from each other.

    Args:
        gradients: at most n gradients; missing ones, and each None in them, count as 0.
        parameters: the parameters that the gradients belong to.
        n: N on this rank.
        reduce: as in ``gradient_variance``.
    """
    mean = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    squares, seen = torch.zeros((), dtype=torch.float64, device=mean[0].device), 0
    with torch.no_grad():
        for gradient in gradients:
            seen += 1
            for average, each in zip(mean, gradient, strict=True):
                off = -average if each is None else each.to(average.dtype) - average
                average.add_(off / seen)
                squares += _square(off) * (1 - 1 / seen)
        total = int(reduce(torch.tensor(n, device=squares.device)))
        norm = torch.zeros_like(squares)
        for average in mean:
            squares += _square(average) * (seen * (n - seen) / n)  # the n - seen gradients of 0
            mine = average * (seen / n)
            whole = reduce(mine * (n / total))
            squares += _square(mine - whole) * n
            norm += _square(whole)
        return GradientVariance(float(reduce(squares)) / total, math.sqrt(float(norm)), total)


def _square(x: Tensor) -> Tensor:
    """Return the squared norm, 0-d fp64."""
    return (x * x).sum(dtype=torch.float64)
