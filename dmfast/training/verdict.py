"""Say whether a run came to its target, from measures of the base, of the policy and of p."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ..estimators import Estimate, PartitionFunctions, estimate, estimate_moments, rounded
from ..samples import Samples
from ..targets import EBM
from ..unseen import said
from .report import shown

_LEFT, _KL = 0.1, 0.25  # the share of a moment's way that may be left, and the relative error that KL(pi||a) may have


def constrained(target: EBM) -> list[str]:
    """Return the names of the features that a target constrains, which a verdict is about."""
    return [*target.moment_names, *target.pointwise_names]


def ideal(target: EBM, of_base: Samples, *, fitted: bool = True) -> dict[str, Estimate]:
    """Return the measures of a policy equal to p: E_p[phi] and KL(p||a), from samples of the base.

    ``fitted`` tells whether lambda was fitted on the prompts of the samples. If so, p has what the moments want, and
    the fit may know KL better.
    """
    scores = target.score(of_base, of_base.log_prob)
    log_w = scores.log_target - of_base.log_prob
    # each context has its own Z and all contexts weigh the same, because lambda was fitted so
    log_z = (
        PartitionFunctions().updated(of_base.context_id, scores.log_target, of_base.log_prob).log_z(of_base.context_id)
    )
    log_u = torch.where(log_z == -math.inf, -math.inf, log_w - log_z)
    columns = torch.cat([scores.features, scores.monitored], 1)
    names = [*target.moment_names, *target.monitor_names]
    found = {f"phi/{name}": e for name, e in zip(names, estimate_moments(columns, log_u), strict=True)}
    found |= {f"phi/{name}": Estimate(1.0, 0.0) for name in target.zero_one_names}  # also where no sample has it
    kl = estimate(of_base.log_prob, of_base.log_prob, scores.log_target, log_z, z_of=of_base.context_id).kl_proposal
    if fitted and target.report is not None and target.moment_names:
        if target.report.n >= len(of_base):  # whoever had more samples knows KL better
            kl = target.report.kl
        for name, moment in zip(target.moment_names, target.describe()["moments"], strict=True):
            found[f"phi/{name}"] = Estimate(moment["value"], 0.0)
    return found | {"kl_policy_base": kl}


def verdict(
    before: Mapping[str, Estimate], after: Mapping[str, Estimate], ideal: Mapping[str, Estimate], names: Sequence[str]
) -> str:
    """Say whether a run came to its target, and by which criterion.

    Each feature must have come nine tenths of the way from where it began to where p has it, and KL(pi||a) must be
    within a quarter of KL(p||a). Two standard errors are allowed beyond either. What the samples can't tell is said to
    be unknown: a NaN, with the features that none of them had, and a measure so noisy that a policy which has not moved
    would pass as well.

    Args:
        before, after, ideal: the measures of the policy at the start, of the policy at the end, and of p.
        names: the features that are constrained.
    """
    never = {name: 0.0 for name in names if before[f"phi/{name}"].value == 0}
    why = f"unknown: {said(never) if never else 'no sequence of the base met all constraints'}"
    wrong, right, unknown = [], [], []

    def compare(
        title: str, start: float, now: Estimate, what: str, wanted: Estimate, left: float, hint: str = ""
    ) -> None:
        way, allowed = abs(start - wanted.value), left + 2 * _error_of(now, wanted)
        text = f"{title} is {shown(now)}, {what} {why if math.isnan(wanted.value) else f'{rounded(wanted.value):.4g}'}"
        if math.isnan(now.value) or math.isnan(allowed):  # allowed is NaN where wanted is
            unknown.append(text)
        elif abs(now.value - wanted.value) > allowed:
            wrong.append(f"{text}, which may differ by {allowed:.2g}{hint}")
        elif 0 < way <= allowed:
            unknown.append(f"{text}, and these sequences can't tell it from the start, {rounded(start):.4g}")
        else:
            right.append(text)

    for name in names:
        now, wanted = after[f"phi/{name}"], ideal[f"phi/{name}"]
        start = before[f"phi/{name}"].value
        compare(f"E[{name}]", start, now, "wanted", wanted, _LEFT * abs(start - wanted.value))
    now, wanted = after["kl_policy_base"], ideal["kl_policy_base"]
    hint = " (the policy has moved in ways that nobody asked for)" if now.value > wanted.value else ""
    compare("KL(π‖a)", 0.0, now, "ideal", wanted, _KL * wanted.value, hint)
    criterion = (
        "Criterion: each E has come nine tenths of its way, KL(π‖a) is within a quarter of KL(p‖a), "
        "each give or take two standard errors."
    )
    if wrong:
        return (
            f"The run did not come to its target: {'; '.join([*wrong, *unknown])}. Try more steps, a lower learning "
            f"rate where KL(π‖a) is too large, or more sequences a step. {criterion}"
        )
    if unknown:
        return (
            f"Whether the policy matches the target is unknown: {'; '.join([*unknown, *right])}. Evaluate on more "
            f"sequences. {criterion}"
        )
    return f"The policy matches the target: {'; '.join(right)}. {criterion}"


def _error_of(*estimates: Estimate) -> float:
    """Return the standard error of a difference. An unknown error (NaN) counts as 0."""
    return math.hypot(*(e.stderr for e in estimates if math.isfinite(e.stderr)))
