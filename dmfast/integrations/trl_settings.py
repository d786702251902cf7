"""Say which settings of trl's ``GRPOConfig`` dmfast's loss has a place for, and which a checkpoint depends on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..kernels import warn_caller
from ..objectives import Objective, Terms
from ..training import resume

_Z, _SETTINGS = "dmfast_z.safetensors", "dmfast_settings.json"
_ANOTHER_P = "Z of the checkpoint's prompts is of the other target"
_REFUSED = {
    **dict.fromkeys(resume.REFUSED, _ANOTHER_P), "lambda": _ANOTHER_P, "max_completion_length": _ANOTHER_P,
}  # fmt: skip

#: The values that a setting may have, the first of which the message names. Others would be ignored, or would have the
#: model draw from another distribution than the one that is scored.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "top_k": (0, None, -1), "top_p": (1.0, None), "min_p": (None, 0.0), "repetition_penalty": (1.0, None),
    "generation_kwargs": (None, {}), "entropy_coef": (0.0,), "use_adaptive_entropy": (False,),
    "top_entropy_quantile": (1.0,), "off_policy_mask_threshold": (None,),
    "multi_objective_aggregation": ("sum_then_normalize",), "cast_lm_head_to_fp32": (False,),
}  # fmt: skip


def no_reward(completions: list[Any], **_: Any) -> list[float]:
    """Return 0 for each completion: the reward function of a run that has a target alone."""
    return [0.0] * len(completions)


def draws_from_policy(args: Any) -> bool:
    """Return whether the policy is that of the optimiser step when it draws the step's completions."""
    every = args.steps_per_generation * args.num_iterations
    return args.gradient_accumulation_steps % every == 0 and not args.use_vllm


def check(args: Any, objective: Objective | Callable[[Terms], Tensor], has_target: bool, has_reward: bool) -> None:
    """Check the settings of a run.

    Raises:
        ValueError: a setting would be ignored, or the objective lacks what it needs.
    """
    for setting, allowed in _ALLOWED.items():
        value = getattr(args, setting)
        if value not in allowed:
            raise ValueError(
                f"GRPOConfig({setting}={value!r}) has no place in dmfast's loss, where what is sampled is what is "
                f"scored and nothing is added: leave it at {allowed[0]!r}"
            )
    name = objective.name if isinstance(objective, Objective) else getattr(objective, "__name__", repr(objective))
    if "log_target" in getattr(objective, "needs", ()) and not has_target:
        raise ValueError(f"objective {name!r} needs a target: DMGRPOTrainer(target=dmfast.EBM(...))")
    if "reward" in getattr(objective, "needs", ()) and not has_reward:
        raise ValueError(f"objective {name!r} needs a reward: DMGRPOTrainer(model, reward_funcs)")
    if getattr(objective, "whole_contexts", False):
        raise ValueError(f"{name} compares log pi within a group, and trl cuts groups; take another objective")
    if getattr(objective, "only_on_policy", False) and not draws_from_policy(args):
        raise ValueError(
            f"{name} is for completions of the policy itself: set num_iterations=1 and a steps_per_generation that "
            "divides gradient_accumulation_steps, without vLLM. Off-policy its method clips each token, which the "
            "weight of a sequence can't do; gspo is for that"
        )
    beta = 0.0 if has_target else getattr(objective, "beta", None) or 0.0
    if args.beta != beta:
        raise ValueError(
            f"GRPOConfig(beta={args.beta}) must be {beta} with objective {name!r}"
            + (" and a target" if has_target else "")
            + ": dmfast's KL penalty is Objective('kl_control', beta=...), with the same number in both places"
        )


def _settings_of(trainer: Any) -> dict[str, Any]:
    """Return the settings that the policy and Z of a run with a target depend on, as numbers, strings and lists."""
    args, target, objective = trainer.args, trainer.target, trainer.objective
    return {
        "objective": objective.name if isinstance(objective, Objective) else resume.plain({"function": objective}),
        "temperature": args.temperature,
        "max_completion_length": args.max_completion_length,
        "lambda": target.lambda_.tolist(),
        "eos_token_id": resume.plain(sorted(trainer.policy.eos_token_ids)),
        "the pointwise constraints": resume.plain(sorted(target.pointwise_names)),
        "the moments": json.dumps(target.wanted),
        "the target's features": resume.plain(target.identity()),
        "the base's weights": resume.digest_of_base(trainer),
    }


def save(trainer: Any, folder: Path) -> None:
    """Write Z of the prompts and the settings that it depends on into a checkpoint."""
    save_file(trainer.partitions.state_dict(), folder / _Z)
    (folder / _SETTINGS).write_text(json.dumps(_settings_of(trainer), indent=1) + "\n", encoding="utf-8")


def load(trainer: Any, folder: Path) -> None:
    """Go on with Z of a checkpoint. A checkpoint of an older version has no settings, and is not compared.

    Raises:
        ValueError: the checkpoint has no Z, or is of another target, temperature or length. Nothing has changed then.
    """
    if not (folder / _Z).is_file():
        raise ValueError(f"{folder} has no {_Z}: it is of a run without a target")
    if (folder / _SETTINGS).is_file():
        was, now = json.loads((folder / _SETTINGS).read_text(encoding="utf-8")), _settings_of(trainer)
        changes = resume.changed(was, now)
        own = [name for name in ("lambda", "max_completion_length") if name in was and was[name] != now[name]]
        changes |= {name: (was[name], now[name]) for name in own}
        resume.refuse(changes, folder, refused=_REFUSED)
        if "objective" in changes:
            warn_caller(
                "the run goes on with another objective than its checkpoint: objective was {!r} and is {!r}, which "
                "holds from here on".format(*changes["objective"])
            )
    trainer.partitions.load_state_dict(load_file(folder / _Z))
