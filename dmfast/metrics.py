"""Compute the metrics that are logged of an optimiser step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .batch import Batch
from .diagnostics import weight_statistics
from .estimators import Estimates, effective_sample_size, estimate_moments
from .kernels.result import DMLossOutput
from .objectives import Objective, PPOClip, bounded_returns
from .proposal import OfflineProposal
from .ranks import Ranks
from .running import Running
from .settings import Settings
from .targets import EBM
from .unseen import unseen


def step_metrics(
    batch: Batch,
    out: DMLossOutput,
    estimates: Estimates,
    *,
    settings: Settings,
    running: Running,
    target: EBM,
    proposal: OfflineProposal[Any] | None,
    swapped: bool,
    ranks: Ranks,
    lag: float = 0.0,
    missing: Mapping[str, float] | None = None,
    z_is_known: bool = True,
    log_z_gap: float | None = None,
) -> dict[str, float]:
    """Return the metrics of a step by name; docs/guide/reading-a-run.md says what each is.

    Args:
        batch: the step on this rank.
        out: the output of the loss for the whole step on all ranks.
        estimates: the estimates of the window since the last swap.
        settings, target, proposal: the settings, target and proposal of the step.
        running: the running values, with this step.
        swapped: whether q became pi after the step.
        ranks: the processes, over which the values of the batch are gathered.
        lag: the number of swaps of q since the step's sequences were drawn, as their mean.
        missing: the moments whose feature had one value in all sequences of the window, and that value.
        z_is_known: whether the sequences that Z rests on show the features of all moments.
        log_z_gap: what ``z_gap`` found where it keeps q from becoming pi.
    """
    gather, inputs, objective = ranks.gather, batch.inputs, batch.objective
    assert out.log_target is not None and out.log_proposal is not None and out.log_z is not None
    finite = out.log_z[out.log_z.isfinite()]
    log_z = float(finite.mean()) if len(finite) else -math.inf
    log_z = log_z if z_is_known else math.nan
    log_u = torch.where(out.log_z == -math.inf, -math.inf, out.log_target - out.log_proposal - out.log_z)
    features = gather(batch.features)
    metrics: dict[str, float] = {}
    means = estimate_moments(features, features.new_zeros(len(features)))
    for name, mean in zip(feature_names(target), means, strict=True):
        metrics |= {f"phi/{name}": mean.value, f"phi/{name}_stderr": mean.stderr}
    # the estimates' log_z and ess are left out, because they are of the window and the logged ones are of the step
    metrics |= {k: v for k, v in estimates.as_dict().items() if not k.startswith(("log_z", "ess"))}
    metrics |= {
        "log_z": log_z,
        "z": math.inf if log_z >= 700 else math.exp(log_z),
        # equal weights say nothing where all sequences of the step lack what p has
        "ess": math.nan if unseen(features, target.wanted) else effective_sample_size(log_u).value,
        "swaps": float(proposal.swaps) if proposal else 0.0,
        "swapped": float(swapped),
        **weight_statistics(out.weight),
        "n_clipped": float(out.n_clipped),
        "n_empty": float((out.log_z == -math.inf).sum()),
        "sequences": float(len(out.log_prob)),
        **{f"unseen/{name}": value for name, value in (missing or {}).items()},
        "length": float(gather(batch.samples.score_mask.sum(1)).double().mean()),
    }
    if proposal is not None and proposal.last_check is not None:
        metrics |= {"proposal_check": proposal.last_check.value, "proposal_check_stderr": proposal.last_check.stderr}
    if proposal is not None and proposal.sampler is not None:
        metrics["lag"] = lag
    if len(running.partitions) == 1 and settings.partition == "running":
        stderr = running.partitions[int(batch.samples.context_id[0])].stderr
        metrics["log_z_stderr"] = stderr if z_is_known else math.nan
    if log_z_gap is not None:
        metrics["log_z_gap"] = log_z_gap
    if out.entropy is not None:
        metrics["entropy"] = float(out.entropy[out.scored].mean())
    if settings.baseline == "mean":
        metrics["baseline"] = running.mean_return
    if "reward" in inputs:
        metrics["reward"] = float(gather(inputs["reward"]).mean())
    for name, values in batch.rewards.items():
        of_all = gather(values)
        metrics |= {
            f"rewards/{name}/mean": float(of_all.mean()),
            f"rewards/{name}/std": float(of_all.std(correction=0)),
        }
    # redrawn sequences were chosen by their rewards, which would bias this mean
    if settings.on_policy and "log_base" in inputs and batch.first is None:
        log_ratio = gather(inputs["log_proposal"] - inputs["log_base"])
        (kl,) = estimate_moments(log_ratio[:, None], torch.zeros_like(log_ratio))
        metrics |= {"kl_policy_base": kl.value, "kl_policy_base_stderr": kl.stderr}
    if settings.refit_ess and target.report is not None:
        named = zip(target.moment_names, target.lambda_.tolist(), strict=True)
        metrics |= {f"lambda/{name}": value for name, value in named} | {"fit_ess": target.report.ess}
    if isinstance(objective, Objective) and objective.beta is not None:
        metrics["beta"] = objective.beta
    if settings.ppo_epochs > 1 and batch.advantage is not None and out.log_ratio is not None:
        clipped = PPOClip(settings.ppo_clip).clipped(out.log_ratio, gather(batch.advantage))
        metrics["clip_fraction"] = float(clipped.double().mean())
    bounded = bounded_returns(objective, out.log_ratio, out.log_target_ratio)
    if bounded is not None:
        metrics["n_clipped_return"] = float(bounded.sum())
    if isinstance(objective, Objective) and objective.name == "reinforce_p":
        metrics["log_scale"] = objective.log_scale or 0.0
    return metrics | batch.gradient | batch.counts | {f"seconds_{what}": took for what, took in batch.seconds.items()}


def feature_names(target: EBM) -> list[str]:
    """Return the names of the columns of ``Batch.features``: the target's moments, then its monitored features."""
    return [*target.moment_names, *target.monitor_names]


def logged_features(keys: Iterable[str]) -> list[str]:
    """Return the names of the features whose means are among the keys of a log, without the means' standard errors."""
    keys = list(keys)
    errors = {f"{key}_stderr" for key in keys}
    return [key[len("phi/") :] for key in keys if key.startswith("phi/") and key not in errors]


#: The beginnings of the names of metrics that vary from step to step.
_VARYING = ("phi/", "scorer/", "weight_", "seconds_", "length", "lag", "ess", "reward", "entropy", "clip_fraction")
_COUNTS = ("n_clipped", "n_clipped_return", "n_empty", "n_uniform", "n_redrawn", "swapped")


def merged(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the metrics of several steps as those of one.

    A metric that varies is the mean of its values, with the standard error of that mean; a count is their sum; and any
    other metric is its last value.
    """
    found: dict[str, float] = {}
    for key in {key: None for metrics in steps for key in metrics}:
        if key.startswith(("unseen/", "log_z_gap")) and key not in steps[-1]:
            continue  # it no longer holds after a later step
        values = [metrics[key] for metrics in steps if key in metrics]
        if key in _COUNTS:
            found[key] = sum(values)
        elif key.startswith("seconds_"):
            found[key] = sum(values) / len(steps)  # a step that lacks some work spends no time on it
        elif key.startswith("phi/") and key.endswith("_stderr") and key.removesuffix("_stderr") in found:
            found[key] = math.hypot(*values) / len(values)  # the steps' sequences are independent
        else:
            found[key] = sum(values) / len(values) if key.startswith(_VARYING) else values[-1]
    return found
