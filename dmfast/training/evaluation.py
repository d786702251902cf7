"""Evaluate a model on fresh samples of itself: E_pi[phi], KL(pi||a), KL(p||pi), diversity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diagnostics import diversity
from ..estimators import Estimate, PartitionFunctions, estimate, estimate_moments
from ..models import LanguageModel
from ..samples import Prompt, Samples
from ..seeds import seed_for
from ..targets import EBM, FeatureValues
from ..targets.drawing import batch_within, drawn_in_parts
from ..unseen import unknown, unseen
from .judge import Judge


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The samples and the estimates of an evaluation.

    Attributes:
        samples: the N samples of this rank.
        log_base: (N,) fp64, log a(x), nats.
        features: (N, F + M) fp64, the features of the moments and then the monitored features.
        names: the F + M names of the features.
        missing: the moments whose feature had one value in all samples, and that value. If there is one, KL(p||pi) is
            unknown (NaN).
        estimates: the estimates over all ranks.
    """

    samples: Samples
    log_base: Tensor
    features: Tensor
    names: list[str]
    estimates: dict[str, Estimate]
    missing: dict[str, float]


def evaluate(
    model: LanguageModel,
    target: EBM,
    prompts: Sequence[Prompt] | None = None,
    n: int = 512,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int | None = 0,
    batch_size: int | None = None,
    texts: int = 0,
    rows: Sequence[Mapping[str, Any]] | None = None,
    judge: Judge | None = None,
    whose: str | None = None,
) -> tuple[Samples, dict[str, Estimate]]:
    """Return the samples and the estimates of ``examine``, in one process.

    The sequences are not those that ``EBM.fit`` or ``rejection_curve`` draw with the same seed. By default as many are
    drawn at a time as a memory budget allows. With ``whose``, a name for the model, a line on a terminal says how many
    are drawn.
    """
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature,
                           "seed": None if seed is None else seed_for(seed, "evaluate"),
                           "batch_size": batch_size or batch_within(model, prompts, max_new_tokens)}  # fmt: skip
    progress = False if whose is None else None
    parts = drawn_in_parts(model, prompts, n, progress=progress, what="evaluation", whose=whose or "", **how)
    found = examine(
        model, target, prompts, n, **how, texts=texts, rows=rows, judge=judge, samples=Samples.cat(list(parts))
    )  # fmt: skip
    return found.samples, found.estimates


@torch.no_grad()
def examine(
    model: LanguageModel,
    target: EBM,
    prompts: Sequence[Prompt] | None = None,
    n: int = 512,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int | None = 0,
    batch_size: int | None = None,
    texts: int = 0,
    first_row: int = 0,
    rows: Sequence[Mapping[str, Any]] | None = None,
    judge: Judge | None = None,
    samples: Samples | None = None,
    gather: Callable[[Tensor], Tensor] = lambda x: x,
    gather_texts: Callable[[list[str]], list[str]] = lambda x: x,
) -> Evaluation:
    """Draw ``n`` sequences per prompt from ``model`` and estimate the model's measures from them.

    Args:
        model: pi.
        target: the target. Its moments and monitored features are the phi, and its base is a.
        prompts, max_new_tokens, temperature, seed, batch_size, first_row: as in ``LanguageModel.sample``.
        texts: the number of texts that ``diversity`` is measured on. They are the same ones every time, equally many of
            each context. 0 measures no diversity.
        rows: for each prompt the row of its data set, which scorers see as ``samples.rows``.
        judge: tells right answers from wrong ones. None measures no right answers.
        samples: what these arguments draw, if it is drawn already.
        gather, gather_texts: functions that collect the values of all ranks in distributed training.

    Returns:
        An ``Evaluation``. Its estimates have standard errors: ``phi/<feature>``, ``kl_policy_base`` (KL(pi||a), nats),
        ``kl_policy`` (KL(p||pi), nats; with Z from these samples), ``length`` (scored tokens) and ``finished`` (the
        share that ended in EOS). With ``texts`` they include the values of ``dmfast.diagnostics.diversity``, and with a
        judge those of ``dmfast.verified.measure``, whose standard errors are over prompts.
    """
    if samples is None:
        samples = model.sample(
            prompts, n, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, batch_size=batch_size,
            first_row=first_row,
        )  # fmt: skip
    x = samples.with_rows(rows)
    log_base = target.base.log_prob(x, batch_size=batch_size)
    values = FeatureValues(x)
    scores = target.score(x, log_base, values=values)
    features = torch.cat([scores.features, scores.monitored], 1)
    names = [*target.moment_names, *target.monitor_names]
    columns_of = [*(f"phi/{name}" for name in names), "kl_policy_base", "length", "finished"]
    one_each = torch.stack([x.log_prob - log_base, x.score_mask.sum(1).double(), x.finished.double()], 1)
    columns = gather(torch.cat([features, one_each], 1))
    found = dict(zip(columns_of, estimate_moments(columns, torch.zeros_like(columns[:, 0])), strict=True))
    contexts, log_target, log_prob = gather(x.context_id), gather(scores.log_target), gather(x.log_prob)
    log_z = PartitionFunctions().updated(contexts, log_target, log_prob).log_z(contexts)
    estimates = estimate(log_prob, log_prob, log_target, log_z, z_of=contexts)
    missing = unseen(columns, target.wanted)
    found["kl_policy"] = (unknown(estimates) if missing else estimates).kl_policy
    if judge is not None:
        found |= judge.measured(x, judge.right(values), gather, gather_texts)
    evaluation = Evaluation(x, log_base, features, names, found, missing)
    if texts:
        shown = gather_texts(x[x.across_contexts(texts)].text)
        found |= diversity(shown[:texts])
    return evaluation
