"""Decide what happens to a setting that differs from the checkpoint from which a run goes on.

Every field that ``DMConfig`` adds stands in one of the tables below, and so do transformers' arguments for the
optimiser. A changed setting holds from here on, or what depends on it starts anew, or the run is refused.
``docs/guide/when-it-goes-wrong.md`` says the same in words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from .. import sharding
from ..adapters import PROPOSAL
from ..estimators import PartitionFunctions
from ..kernels import warn_caller
from ..matcher import Matcher
from ..models import AdapterView, LanguageModel
from ..targets import EBM
from ..targets.rewards import WeightedSum, parts_of
from ..tensors import fingerprint

_ANOTHER_P = "lambda, Z and the proposal of the checkpoint are of the other target"
_START_ANEW = "Set them as they were, or start a new run whose model is the saved one"

#: A change of these is refused, with the reason.
REFUSED = {
    "temperature": _ANOTHER_P,
    "max_new_tokens": _ANOTHER_P,
    "eos_token_id": _ANOTHER_P,
    "the base's weights": _ANOTHER_P,
    "the pointwise constraints": _ANOTHER_P,
    "the moments": _ANOTHER_P,
    "the target's features": _ANOTHER_P,
    "on_policy": "of the checkpoint and this run, one is on-policy and one is not",
    "the adapter": "the same parameters make another model",
    "optim": "the state in the checkpoint is of another optimiser",
    "optim_args": "the state in the checkpoint is of another optimiser",
}  # fmt: skip

_RETURNS, _BATCH = "the running mean of the returns", "a batch that serves more steps"
_BEST, _Z = "the best divergence of earlier swaps", "Z of each context"

#: A change of these holds from here on, and what depends on the old value starts anew.
RENEWED = {
    "objective": (_RETURNS, _BATCH),
    "baseline": (_RETURNS, _BATCH),
    "normalize": (_RETURNS, _BATCH),
    "reward": (_RETURNS, _BATCH),
    "reward_weights": (_RETURNS, _BATCH),
    "the reward's features": (_RETURNS, _BATCH),
    "beta": (_RETURNS, _BATCH),
    "alpha": (_RETURNS, _BATCH, _BEST),
    "normalize_alpha": (_RETURNS, _BATCH),
    "max_return": (_RETURNS, _BATCH),
    "ppo_epochs": (_BATCH,),
    "proposal_criterion": (_BEST,),
    "chat_template_kwargs": (_Z,),
}  # fmt: skip

#: A change of these holds from here on. The names are of parameter groups that the checkpoint's optimiser has as well.
OF_OPTIMIZER = {
    "learning_rate": "initial_lr",
    "weight_decay": "weight_decay",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
}

#: A change of these holds from here on, and nothing depends on the old value.
HONOURED = (
    *OF_OPTIMIZER, "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs",
    "max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps", "samples_per_context", "seed",
    "data_seed", "max_weight", "entropy_coefficient", "beta_target_kl", "beta_horizon", "ppo_clip", "partition",
    "proposal_interval", "proposal_stderrs", "proposal_best_only", "proposal_decay", "proposal_check_samples",
    "z_floor", "z_from_rows", "uniform_groups", "max_redraws", "refit_ess", "refit_samples", "skip_zero_weight",
    "sampler", "sampler_ahead", "sampler_max_lag", "bf16", "fp16", "max_prompt_length",
    "logging_steps", "eval_steps", "save_steps",
)  # fmt: skip

_PLURAL = ("the base's weights", "the pointwise constraints", "the moments")
_LENGTH = 200  # characters of a value in a message

#: These may change without a message, because they change no result.
NOT_COMPARED = (
    "sampling_batch_size", "check_scores", "sampler_options", "proposal_device", "eval_samples", "eval_diversity",
    "eval_pass_k", "eval_threshold", "log_samples", "gather_for_sampling", "gradient_variance_steps", "patience_zero",
)  # fmt: skip

#: The settings that the length of a run in steps depends on, and therefore its schedule.
_OF_LENGTH = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
              "samples_per_context")  # fmt: skip
#: The settings that describe features, of which only those parts are compared that both runs tell.
_FEATURES = ("the target's features", "the reward's features")

_LONGER = ("max_steps", "num_train_epochs")  # no warning, because a run is made longer on purpose

# transformers' schedulers of these kinds have more state than the number of the step
_WITH_STATE = ("reduce_lr_on_plateau", "greedy")


class Run(Protocol):
    """The parts of a trainer from which the settings of its run are read."""

    args: Any
    policy: LanguageModel
    target: EBM
    matcher: Matcher
    brings_optimizer: bool
    is_deepspeed_enabled: Any
    is_fsdp_enabled: Any


def settings_of(run: Run) -> dict[str, Any]:
    """Return what a checkpoint records of a run's settings, as numbers, strings, True, False and None."""
    args, target, reward = run.args, run.target, run.matcher.reward
    found = {name: plain(getattr(args, name)) for name in (*REFUSED, *RENEWED, *HONOURED) if hasattr(args, name)}
    for name in ("logging", "eval", "save"):
        if plain(getattr(args, f"{name}_strategy")) != "steps":
            del found[f"{name}_steps"]
    if run.brings_optimizer:
        for name in (*OF_OPTIMIZER, "optim", "optim_args"):
            found.pop(name, None)
    return found | {
        "objective": run.matcher.settings.name,
        "reward": _name_of(reward),
        "eos_token_id": plain(sorted(run.policy.eos_token_ids)),
        "chat_template_kwargs": plain(dict(run.policy.chat_template_kwargs)),
        "the pointwise constraints": plain(sorted(target.pointwise_names)),
        "the moments": json.dumps(target.wanted),
        "the target's features": plain(target.identity()),
        "the reward's features": plain(features_of(reward)),
        "the base's weights": digest_of_base(run),
        "the adapter": _adapter(run.policy.model),
    }


def _name_of(reward: Any) -> Any:
    """Return the name of a reward; of several rewards, their names."""
    return plain(list(reward.parts)) if isinstance(reward, WeightedSum) else getattr(reward, "name", None)


def features_of(reward: Any) -> dict[str, Any]:
    """Return what identifies each feature of a reward, by a name for messages."""
    several = isinstance(reward, WeightedSum)
    parts = parts_of(reward).items()
    return {f"the reward {name!r}" if several else "the reward": part.identity() for name, part in parts}


def plain(value: Any) -> Any:
    """Return a mapping or a list as JSON that is the same in every process, and another value as it is."""
    value = getattr(value, "value", value)
    return json.dumps(value, default=_told, sort_keys=True) if isinstance(value, (Mapping, list, tuple)) else value


def _told(value: Any) -> str:
    """Return an object as text that is the same in every process, and so without its address in memory."""
    text = str(value)
    return type(value).__name__ if " at 0x" in text else text


def recorded_in(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a checkpoint's state records. Every state has the moments, also of older versions."""
    recorded, target = dict(state.get("settings", {})), state.get("matcher", state).get("target", {})
    if "moment_values" in target:
        recorded["the moments"] = json.dumps(dict(zip(target["moment_names"], target["moment_values"], strict=True)))
    return recorded


def digest_of_base(run: Run) -> str | None:
    """Return a few numbers of the base's weights, or None where this process does not hold them whole."""
    base: Any = run.target.base
    if run.is_deepspeed_enabled or run.is_fsdp_enabled or sharding.is_sharded(base.model):
        return None
    own = {*getattr(base.model, "peft_config", {}), PROPOSAL} if isinstance(base, AdapterView) else set()
    return fingerprint(p for name, p in base.model.named_parameters() if own.isdisjoint(name.split(".")))


def _adapter(model: Any) -> str | None:
    """Return the settings of an adapter that its parameters do not show, or None if there is no adapter."""
    configs = {name: each for name, each in getattr(model, "peft_config", {}).items() if name != PROPOSAL}
    names = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora")
    found = {name: {key: plain(getattr(each, key, None)) for key in names} for name, each in configs.items()}
    return plain(found) if found else None


def changed(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, by name, as pairs (in the checkpoint, now).

    A name that only one of the two has is not compared.
    """
    both = [name for name in (*REFUSED, *RENEWED, *HONOURED) if name in recorded and name in now]
    unknown = "the base's weights"  # their digest is None if they were sharded
    found = {
        name: (recorded[name], now[name]) for name in both
        if recorded[name] != now[name] and not (name == unknown and None in (recorded[name], now[name]))
    }  # fmt: skip
    if "reward" in found:  # another reward has other features
        found.pop("the reward's features", None)
    for name in found.keys() & _FEATURES:
        if not _differing(*found[name]):
            del found[name]
    return found


def _differing(was: str, now: str) -> dict[tuple[str, str], tuple[Any, Any]]:
    """Return what both of two descriptions of features tell, and tell differently, by feature and part as pairs.

    Args:
        was, now: as ``settings_of`` records them.
    """
    told = [_leaves(json.loads(each), ()) for each in (was, now)]
    pairs = {path: (told[0][path], told[1][path]) for path in told[0] if path in told[1]}
    # NaN is not equal to itself, but its text is
    differing = {path: pair for path, pair in pairs.items() if pair[0] != pair[1] and str(pair[0]) != str(pair[1])}
    return {(path[0], ".".join(path[1:])): pair for path, pair in differing.items()}


def _leaves(value: Any, path: tuple[str, ...]) -> dict[tuple[str, ...], Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {key: leaf for name, each in value.items() for key, leaf in _leaves(each, (*path, name)).items()}


def refuse(
    changes: Mapping[str, tuple[Any, Any]], folder: object, *, deepspeed: bool = False, scheduler: str = "",
    refused: Mapping[str, str] = REFUSED,
) -> None:  # fmt: skip
    """Refuse to go on with settings that do not go with the checkpoint's state.

    Args:
        changes: as ``changed`` returned them.
        folder: the checkpoint, for the message.
        deepspeed: whether DeepSpeed restores the optimiser with its old hyperparameters.
        scheduler: the kind of this run's scheduler.
        refused: the settings whose change is refused, with the reasons.

    Raises:
        ValueError: a change is refused; the message names all of them.
    """
    reasons = {name: refused[name] for name in changes if name in refused}
    if deepspeed:
        reasons |= {name: "DeepSpeed restores the old value" for name in changes if name in OF_OPTIMIZER}
    if any(kind in _WITH_STATE for kind in changes.get("lr_scheduler_type", ())):
        reasons["lr_scheduler_type"] = "the state in the checkpoint is of another kind of scheduler"
    if scheduler in _WITH_STATE and "learning_rate" in changes:
        reasons["learning_rate"] = f"the scheduler {scheduler} goes on from the rate that it had come to"
    if reasons:
        said = "; ".join(f"{_said(name, changes[name])}: {why}" for name, why in reasons.items())
        raise ValueError(f"{folder} can't be resumed from with other settings. {said}. {_START_ANEW}")


def _said(name: str, change: tuple[Any, Any]) -> str:
    if name in _FEATURES:
        return "; ".join(
            f"{feature} had {part}={_shown(*pair)} and has {part}={_shown(*reversed(pair))}"
            for (feature, part), pair in _differing(*change).items()
        )
    was, now = ("were", "are") if name in _PLURAL else ("was", "is")
    return f"{name} {was} {_shown(*change)} and {now} {_shown(*reversed(change))}"


def _shown(value: Any, other: Any) -> str:
    """Return a value for a message. A long value is cut to the part where it begins to differ from another."""
    # a string of JSON is shown as it is
    text, beside = (each if isinstance(each, str) and each[:1] in ("[", "{") else repr(each) for each in (value, other))
    if len(text) <= _LENGTH:
        return text
    alike = next((i for i, pair in enumerate(zip(text, beside, strict=False)) if pair[0] != pair[1]), len(beside))
    start = max(alike - _LENGTH // 2, 0)
    cut = text[start : start + _LENGTH]
    return f"{'...' if start else ''}{cut}{'...' if start + _LENGTH < len(text) else ''}"


def describe(changes: Mapping[str, tuple[Any, Any]], *, steered: bool = False) -> str | None:
    """Return the warning that says which settings changed and what follows, or None if there is nothing to say.

    Args:
        changes: as ``changed`` returned them. None of them is refused.
        steered: whether beta is steered by KL(pi||a), and therefore goes on from the checkpoint's value.
    """
    parts = []
    for name, change in changes.items():
        if name in _LONGER:
            continue
        renewed = RENEWED.get(name, ())
        if name == "beta" and steered:
            parts.append(f"{_said(name, change)}, and the steered value of the checkpoint is kept")
        elif renewed:
            parts.append(f"{_said(name, change)}, which holds from here on, and {' and '.join(renewed)} start anew")
        else:
            parts.append(f"{_said(name, change)}, which holds from here on")
    return "the run goes on with other settings than its checkpoint: " + "; ".join(parts) if parts else None


def renewed(matcher: Mapping[str, Any], changes: Mapping[str, tuple[Any, Any]], *, steered: bool) -> dict[str, Any]:
    """Return a matcher's state in which everything that depends on a changed setting starts anew.

    Args:
        matcher: what ``Matcher.state_dict`` returned.
        changes: as ``changed`` returned them.
        steered: as in ``describe``.
    """
    state = {**matcher, "objective": None}  # describe says what has changed, so that the matcher says it no second time
    gone = {what for name in changes for what in RENEWED.get(name, ())}
    if steered and set(changes) & set(RENEWED) == {"beta"}:
        return state
    if _RETURNS in gone:
        state["running"] = state["running"] | {"returns": (0.0, 0)}
    if _BATCH in gone or not set(_OF_LENGTH[2:]).isdisjoint(changes):  # the batch has the old number of sequences
        state["batch"] = None
    if _BEST in gone and state["proposal"] is not None:
        state["proposal"] = state["proposal"] | {"best": math.inf, "last_check": None}
    return without_z(state) if _Z in gone else state


def without_z(matcher: Mapping[str, Any]) -> dict[str, Any]:
    """Return a matcher's state that knows no Z yet."""
    running = matcher["running"] | {"partitions": PartitionFunctions().state_dict()}
    return {**matcher, "running": running, "drawn_with": None}


def set_hyperparameters(
    optimizer: Any, scheduler: Any, fresh: list[dict[str, Any]], changes: Mapping[str, Any], *, kept: bool = False
) -> None:
    """Give an optimiser and a scheduler that were loaded from a checkpoint the settings of this run.

    Args:
        optimizer, scheduler: as they were loaded.
        fresh: the parameter groups, without their parameters, as this run made them.
        changes: as ``changed`` returned them. Only these settings are set.
        kept: whether the caller passed the optimiser, so that no argument tells its hyperparameters. They stay as they
            were loaded, and a warning says so if the learning rate of the passed optimiser differs.

    Raises:
        ValueError: the learning rate has changed, and the scheduler is of a kind whose rate depends on more than the
            step. Nothing has changed then.
    """
    if kept:
        loaded, given = ([group.get("initial_lr", group["lr"]) for group in groups]
                         for groups in (optimizer.param_groups, fresh))  # fmt: skip
        if loaded != given:
            warn_caller(
                f"the optimiser that was passed has the learning rates {given}, and those of the checkpoint are kept: "
                f"{loaded}; set them in a callback's on_train_begin where you want others"
            )
        return
    keys = {key for name, key in OF_OPTIMIZER.items() if name in changes}
    of_rate = {"learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", *_OF_LENGTH}
    new_rate = not of_rate.isdisjoint(changes)
    if "learning_rate" in changes and not hasattr(scheduler, "lr_lambdas"):
        raise ValueError(
            f"{_said('learning_rate', changes['learning_rate'])}, and a {type(scheduler).__name__} can't be "
            "moved to another rate: set the rate as it was, or start a new run whose model is the saved one"
        )
    for group, made in zip(optimizer.param_groups, fresh, strict=True):
        group.update({key: made[key] for key in keys if key in group and key in made})
    if not (new_rate and hasattr(scheduler, "lr_lambdas")):
        return
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    rates = [base * of_step(scheduler.last_epoch)
             for base, of_step in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]  # fmt: skip
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler._last_lr = rates
