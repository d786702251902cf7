"""What the paper shows beside divergences and moments: diversity of samples, variance of gradients and of weights.

The measures are those of the experiments of Korbak et al. 2022 (arXiv:2206.00761): Distinct-n within a sample,
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
    """The library, when it is asked for.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import nltk
        import nltk.translate.bleu_score
    except ImportError as error:
        raise ImportError("Distinct-n and Self-BLEU need nltk: pip install 'dmfast[train]'") from error
    return nltk


def words(texts: Sequence[str]) -> list[list[str]]:
    """Each text as words and runs of punctuation: nltk's ``wordpunct_tokenize``, which needs no data file.

    The paper's code uses ``word_tokenize``, which does; the two differ in contractions and abbreviations.

    Raises:
        TypeError: one string in the place of several. ImportError: no nltk.
    """
    if isinstance(texts, str):
        raise TypeError(f"texts must be a list of strings, got the string {texts!r}")
    split = nltk().tokenize.wordpunct_tokenize
    return [split(text) for text in texts]


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct-n: the number of different n-grams of words in a text over its number of words, mean over the texts.

    It falls where a text repeats itself. Li et al. 2016 (arXiv:1510.03055) divide by the words, for every n, over all
    texts at once; the paper does so within each text, as here: how many texts there are plays no part. At most
    (T - n + 1)/T for a text of T words, which is 1 for n = 1; 0 where it has fewer than n.

    Args:
        texts: N of them. n: 1 or more.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: no text, n below 1. TypeError, ImportError: as ``words``.
    """
    shares = _distinct_shares(texts, n)
    return sum(shares) / len(shares)


def _distinct_shares(texts: Sequence[str], n: int) -> list[float]:
    if n < 1 or not len(texts):
        raise ValueError(f"distinct_n needs n of 1 or more and one or more texts, got n={n} and {len(texts)} texts")
    ngrams = nltk().ngrams
    return [len(set(ngrams(text, n))) / max(len(text), 1) for text in words(texts)]


def self_bleu(texts: Sequence[str], n: int = 5) -> float:
    """Self-BLEU-n: how like the others each text is, BLEU-n with all others as its references, mean over the texts.

    It is high where samples resemble one another. Zhu et al. 2018 (Texygen), on words, with nltk's ``method1`` in the
    place of precisions of 0, as there. (The authors' code of 2206.00761 hands nltk strings in the place of lists of
    words, which makes it a BLEU of characters: its figures are higher than these.)

    The same number as nltk's ``sentence_bleu`` text by text, whose n-grams are counted here once for all of them:
    n-grams, smoothing, brevity penalty are nltk's. It grows with N, so compare sets of one size.

    Args:
        texts: N of them, 2 or more. n: the longest n-grams; all from 1 to n weigh the same.

    Returns:
        From 0 to 1.

    Raises:
        ValueError: fewer than two texts, n below 1. TypeError, ImportError: as ``words``.
    """
    if n < 1 or len(texts) < 2:
        raise ValueError(f"self_bleu needs n of 1 or more and two or more texts, got n={n} and {len(texts)} texts")
    ngrams, bleu = nltk().ngrams, nltk().translate.bleu_score
    split = words(texts)
    counts = [[Counter(ngrams(text, order)) for order in range(1, n + 1)] for text in split]
    # of each n-gram the two highest counts in any text: a text's own may be the highest
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
                # of the others the highest is the second where the first is this text's own
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
    """``distinct_1`` to ``distinct_3`` with standard errors, and ``self_bleu_5``, whose error is NaN: not estimated.

    Args:
        texts: two or more.

    Raises:
        ValueError, TypeError, ImportError: as ``self_bleu``.
    """
    found = {}
    for n in (1, 2, 3):
        shares = torch.tensor(_distinct_shares(texts, n), dtype=torch.float64)
        found[f"distinct_{n}"] = estimate_moments(shares[:, None], torch.zeros_like(shares))[0]
    return found | {"self_bleu_5": Estimate(self_bleu(texts, 5), math.nan)}


def weight_statistics(weight: Tensor) -> dict[str, float]:
    """Of the weights A = rho (r - baseline): mean, standard deviation, mean of |A|.

    Args:
        weight: (N,) A, ``DMLossOutput.weight``. Divided by Z as everywhere in dmfast, where the paper's is not.

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
    """How the gradients of single sequences spread.

    Attributes:
        variance: mean of ||g_i - g||^2, where g_i is the gradient of -A_i log pi(x_i) and g their mean: the trace of
            their covariance, E||G||^2 - ||E G||^2. The gradient of a step of N sequences has about ``variance`` / N.
        norm: ||g||, that of the gradient of the step.
        n: N, the sequences.
    """

    variance: float
    norm: float
    n: int


def gradient_variance(
    policy: LanguageModel,
    samples: Samples,
    weight: Tensor,
    *,
    reduce: Callable[[Tensor], Tensor] = lambda x: x,
) -> GradientVariance:
    """The variance of the gradient over the sequences of a step: exactly, one backward for each of them.

    Costs what the forwards and backwards of N batches of one sequence do, less those of weight 0, and the memory of two
    copies of the parameters that are trained. Nothing changes by it: not ``.grad``, nor the random state.

    Args:
        policy: pi, in the state in which the step was taken. Parameters that need no gradient have no part in it.
        samples: N sequences. weight: (N,) A of each, such as ``DMLossOutput.weight``; constants.
        reduce: in distributed training, the sum of a tensor over ranks; N is then that of all of them.

    Raises:
        ValueError: no sequence, another number of weights, one that is not finite, no parameter to train.
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
        for i in weight.nonzero()[:, 0].tolist():
            one = slice(i, i + 1)
            with torch.enable_grad():
                # A is a constant, and reinforce on-policy has A = R
                out = policy.loss(samples[one], objective=Objective("reinforce"), on_policy=True, reward=weight[one],
                                  log_proposal=samples.log_prob[one])  # fmt: skip
                yield torch.autograd.grad(out.loss, parameters, allow_unused=True)

    return spread(gradients(), parameters, len(samples), reduce)


def spread(
    gradients: Iterable[Sequence[Tensor | None]],
    parameters: Sequence[Tensor],
    n: int,
    reduce: Callable[[Tensor], Tensor] = lambda x: x,
) -> GradientVariance:
    """Mean and variance of N gradients in one pass (Welford's, which subtracts no two large numbers).

    Args:
        gradients: at most n; those that are missing, and each None in them, are 0.
        parameters: what they are the gradients of.
        n: N on this rank. reduce: as in ``gradient_variance``.
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
    """The squared norm, 0-d fp64."""
    return (x * x).sum(dtype=torch.float64)
