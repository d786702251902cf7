"""Put dmfast's loss into verl: a registered policy loss, and an advantage estimator for objectives with a target.

verl computes advantages in one process and the loss in others, and hands over an advantage for each token and nothing
else. So log u = log P - log Z - log q of a sequence crosses as its advantage, the same number on each of its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, register_adv_est, register_policy_loss

from ..kernels.checks import make_objective
from ..log_probs import dm_loss_from_log_probs
from ..objectives import TARGET_OBJECTIVES, Objective, OfStep, Terms

#: The advantage in a group where no sequence had P > 0, whose Z is unknown; elsewhere log u is at most log n.
_UNSEEN = math.inf


def register(
    objective: str | Objective | Callable[[Terms], Tensor] = "gdc++", *, name: str = "dmfast",
    on_policy: bool = False, max_weight: float | None = None,
) -> None:  # fmt: skip
    """Register a policy loss, and for an objective with a target an advantage estimator, under one name.

    Call it in a module that ``VERL_USE_EXTERNAL_MODULES`` names, so that every process of verl does, and set
    ``actor.policy_loss.loss_mode`` to the name and ``actor.loss_agg_mode`` to ``seq-mean-token-sum``: the loss is
    dmfast's, -(1/B) sum_i A_i log pi(x_i).

    With a target p = a exp(R/beta)/Z, set ``algorithm.adv_estimator`` to the name, too, and
    ``algorithm.use_kl_in_reward=True``, which makes verl's reward of a sequence R - beta (log q - log a). beta is
    ``kl_ctrl.kl_coef``; a is the reference model. Z of a prompt is from its sequences of the step.

    Without a target, R is the advantage of a sequence that an estimator of verl gives, such as ``grpo`` or ``rloo``.

    Args:
        objective: one of ``dmfast.objectives.TARGET_OBJECTIVES``, or ``reinforce``, by name or as an ``Objective``; or
            a function of ``Terms``, which has the advantage as ``reward`` and no other sequences of a prompt.
        name: the name by which verl finds it.
        on_policy: whether the policy drew all sequences itself, with one optimiser step for each batch and no engine.
        max_weight: as in ``dm_loss``.

    Raises:
        ValueError: verl gives no inputs for the objective.
    """
    made = make_objective(objective)
    has_target = isinstance(made, Objective) and made.name in TARGET_OBJECTIVES
    if isinstance(made, Objective):
        if not has_target and made.name != "reinforce":
            raise ValueError(f"verl hands over no inputs for objective {made.name!r}; take reinforce, one of "
                             f"{', '.join(sorted(TARGET_OBJECTIVES))}, or a function of dmfast.Terms")  # fmt: skip
        if isinstance(made.baseline, (str, Tensor)):
            raise ValueError("a baseline must be a number: the loss sees a part of a step. verl's own estimators, "
                             "such as rloo, compare the sequences of a prompt")  # fmt: skip
    elif getattr(made, "least_of_context", 0):
        raise ValueError(
            f"{getattr(made, '__name__', made)} compares the sequences of a prompt, which the loss does not see: take "
            "an estimator of verl's, and a function of Terms that has its advantage as reward"
        )

    def loss(
        old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
        loss_agg_mode: str = "token-mean", config: Any = None, rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
        """Return the loss and metrics, as verl's policy losses do."""
        if loss_agg_mode != "seq-mean-token-sum":
            raise ValueError("dmfast's loss is a mean over sequences of sums over tokens: set "
                             f"actor.loss_agg_mode='seq-mean-token-sum', got {loss_agg_mode!r}")  # fmt: skip
        if rollout_is_weights is not None:
            raise ValueError("dmfast's weights hold the ratio to the engine's log q already: set "
                             "algorithm.rollout_correction.bypass_mode=True, so that old_log_prob is log q, and no "
                             "rollout_is")  # fmt: skip
        mask = response_mask.bool()
        value = _of_sequence(advantages, mask)
        log_q = torch.where(mask, old_log_prob.double(), 0.0).sum(1)
        if has_target:
            unseen = value == _UNSEEN
            inputs: dict[str, Any] = {"log_target": torch.where(unseen, -math.inf, value + log_q),
                                      "log_z": torch.where(unseen, -math.inf, 0.0).double()}  # fmt: skip
        else:
            inputs = {"reward": value}
        info = getattr(config, "global_batch_info", None) or {}
        processes = info.get("dp_size") or 1
        sequences = info.get("global_batch_size") or max(int(mask.any(1).sum()), 1)
        tokens = info.get("batch_num_tokens") or max(int(mask.sum()), 1)
        # a part of a step has no means over prompts: Terms.group_mean says so
        called = made if isinstance(made, Objective) else OfStep(made, _NOTHING, torch.arange(len(mask)))
        out = dm_loss_from_log_probs(
            log_prob, mask, **inputs, log_proposal=log_q, objective=called, on_policy=on_policy, max_weight=max_weight,
            num_sequences=float(sequences) / processes, num_tokens=float(tokens) / processes,
        )  # fmt: skip
        metrics = {f"actor/{name}_weight_abs": out.weight.abs().mean().item()}
        if out.log_ratio is not None:
            metrics[f"actor/{name}_log_ratio"] = out.log_ratio.mean().item()
        return out.loss, metrics

    register_policy_loss(name)(loss)
    ADV_ESTIMATOR_REGISTRY.pop(name, None)  # another of that name would be refused
    if has_target:
        register_adv_est(name)(log_target_ratios)


def log_target_ratios(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """Return log u = log P - log Z - log q of each sequence on each of its tokens, twice, as verl's estimators do.

    Args:
        token_level_rewards: (N, T), whose sum is R - beta (log q - log a).
        response_mask: (N, T).
        index: (N,), the ``uid`` of each sequence's prompt.
        config: verl's ``AlgoConfig``.

    Raises:
        ValueError: the settings of the KL penalty are not those that log P needs, or the batch has no ``uid``.
    """
    said = getattr(config, "use_kl_in_reward", False), getattr(config, "kl_penalty", None)
    control = getattr(config, "kl_ctrl", None)
    if said != (True, "kl") or control.type != "fixed" or not control.kl_coef > 0:  # type: ignore[union-attr]
        raise ValueError(
            "log P = log a + R/beta needs algorithm.use_kl_in_reward=True, kl_penalty='kl' and a fixed positive "
            f"kl_ctrl.kl_coef, which is beta; got use_kl_in_reward={said[0]!r}, kl_penalty={said[1]!r}, {control!r}"
        )
    if index is None:
        raise ValueError("the estimator needs the uid of each sequence's prompt, over whose sequences Z is a mean")
    mask = response_mask.bool()
    log_w = torch.where(mask, token_level_rewards.double(), 0.0).sum(1) / control.kl_coef  # type: ignore[union-attr]
    places: dict[Any, list[int]] = {}
    for place, uid in enumerate(index):
        places.setdefault(uid, []).append(place)
    log_u = torch.empty_like(log_w)
    for of_prompt in places.values():
        log_z = log_w[of_prompt].logsumexp(0) - math.log(len(of_prompt))
        log_u[of_prompt] = _UNSEEN if log_z == -math.inf else log_w[of_prompt] - log_z
    found = torch.where(mask, log_u[:, None], 0.0).to(token_level_rewards.dtype)
    return found, found.clone()


#: Terms that know neither lengths nor contexts, of a step that is not seen whole.
_NOTHING = Terms.of("reinforce", False, math.inf)  # type: ignore[arg-type]


def _of_sequence(advantages: Tensor, mask: Tensor) -> Tensor:
    """Return the one advantage of each sequence, (B,) fp64; 0 where nothing is scored."""
    first = mask.int().argmax(1, keepdim=True)
    value = torch.where(mask.any(1), advantages.double().gather(1, first)[:, 0], 0.0)
    other = mask & (advantages.double() != value[:, None])
    if bool(other.any()):
        row = int(other.any(1).nonzero()[0])
        raise ValueError(f"the advantages of sequence {row} differ among its tokens, and A is of a whole sequence: "
                         "take an estimator that gives one number, such as grpo or rloo, and not gae")  # fmt: skip
    return value
