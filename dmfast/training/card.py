"""Write the README.md of a saved model, which says what the model was matched to, and how."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from .. import __version__

#: The arguments of ``DMConfig`` that decide the result of a run.
SETTINGS = (
    "objective", "reward_weights", "baseline", "beta", "alpha", "normalize", "normalize_alpha", "max_return",
    "max_weight", "entropy_coefficient", "temperature", "max_new_tokens", "samples_per_context", "uniform_groups",
    "beta_target_kl", "beta_horizon", "ppo_epochs", "ppo_clip", "on_policy", "partition", "z_floor",
    "z_from_rows", "proposal_criterion", "proposal_interval", "proposal_stderrs", "proposal_best_only",
    "proposal_check_samples", "refit_ess", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "seed",
)  # fmt: skip


def _base_name(trainer: Any) -> str | None:
    """Return the base's name on the hub, or the last part of a local folder, because a local path is private."""
    name = str(getattr(trainer.target.base.model.config, "name_or_path", ""))
    return (Path(name).name if Path(name).exists() else name) or None


def model_card(trainer: Any) -> str:
    """Return Markdown with the target, lambda, the settings and the last evaluation of a ``DMTrainer``."""
    import transformers

    args, base = trainer.args, _base_name(trainer)
    step = trainer.state.global_step if trainer._model_step is None else trainer._model_step
    is_peft = hasattr(trainer.model, "peft_config")
    target, fit = trainer.target.describe(), trainer.target.report
    del target["fit"]
    target["base"] = base
    header = ["---", f"library_name: {'peft' if is_peft else 'transformers'}", "tags: [dmfast, distribution-matching]"]
    if base and "/" in base:
        header.insert(1, f"base_model: {json.dumps(base)}")
    settings = {name: getattr(args, name) for name in SETTINGS}
    if trainer.matcher.settings.own_alpha is None:
        del settings["normalize_alpha"]
    settings |= {"objective": trainer.matcher.settings.name, "eos_token_id": trainer.policy.eos_token_ids}
    lines = [
        *header, "---", "", "# A language model matched to a target distribution", "",
        "Fine-tuned with [dmfast](https://arxiv.org/abs/2206.00761) so that its distribution π comes near to "
        "p(x) = P(x)/Z, where P(x) = a(x) b(x) exp(λ·φ(x)) and a is the base model"
        + (f" `{base}`." if base else "."), "",
        f"dmfast {__version__}, transformers {transformers.__version__}, torch {torch.__version__}; "
        f"{step} optimiser steps of "
        f"{args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer._ranks.size} sequences.", "",
        "## Target", "", "```json", json.dumps(target, indent=1, ensure_ascii=False), "```", "",
        *([] if fit is None else ["How λ was found:", "", "```text", str(fit), "```", ""]),
        "## Settings", "", "| setting | value |", "|---|---|",
        *(f"| {name} | {getattr(value, 'value', value)} |" for name, value in settings.items() if value is not None),
    ]  # fmt: skip
    metrics = _last_evaluation(trainer.state.log_history, step)
    if metrics:
        of = f"The measures are from {args.eval_samples} samples of the model itself."
        lines += ["", f"## Evaluation at step {metrics.pop('step')}", "", of, "", "| what | value |", "|---|---|"]
        lines += [f"| {name.removeprefix('eval_')} | {_with_error(metrics, name)} |" for name in metrics
                  if name.startswith("eval_") and not name.endswith(("_stderr", "_runtime"))]  # fmt: skip
    return "\n".join(lines) + "\n"


def _last_evaluation(history: list[dict[str, Any]], until: int) -> dict[str, Any]:
    """Return what the last evaluation has logged; if there are several eval sets, that of all of them."""
    evaluations = [h for h in history if any(k.endswith("kl_policy_base") and k.startswith("eval_") for k in h)]
    last = max((h["step"] for h in evaluations if h["step"] <= until), default=None)
    return {name: value for h in evaluations if h["step"] == last for name, value in h.items()}


def _with_error(metrics: dict[str, Any], name: str) -> str:
    value, error = metrics[name], metrics.get(f"{name}_stderr", math.nan)
    return f"{value:.4g}" + ("" if math.isnan(error) else f" ± {error:.2g}")
