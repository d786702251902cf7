"""Use dmfast's loss in verl, by registering it as a policy loss and an advantage estimator.

    pip install '.[train]' verl

In a run of verl this file is the module that every process imports, and the rest is settings:

    PYTHONPATH=examples VERL_USE_EXTERNAL_MODULES=verl_policy_loss python -m verl.trainer.main_ppo \
        actor_rollout_ref.actor.policy_loss.loss_mode=dmfast actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum \
        algorithm.adv_estimator=dmfast algorithm.use_kl_in_reward=True algorithm.kl_ctrl.kl_coef=0.375 \
        algorithm.rollout_correction.bypass_mode=True actor_rollout_ref.rollout.calculate_log_probs=True ...

That needs GPUs. What runs here on a CPU, in a minute, is a loop that calls verl's own registries in verl's order:

    python examples/verl_policy_loss.py      # a small model that dmfast ships

There is no ``Matcher`` here, because verl itself draws the sequences, scores them and takes the steps.

The reward is 1 for a biography about a woman. With p = a exp(R/beta)/Z and beta = 0.375, half of the biographies are
about women under p.
"""

from __future__ import annotations

import argparse
import copy

import numpy as np
import torch
from torch import Tensor
from verl.trainer.config import AlgoConfig
from verl.trainer.config.algorithm import KLControlConfig
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn, kl_penalty

import dmfast
from dmfast.integrations.verl import register
from dmfast.samples import Samples

register("gdc++", name="dmfast")


def token_log_probs(policy: dmfast.LanguageModel, x: Samples) -> Tensor:
    """Return log pi of each token after the prompt, (N, T), with gradient, as verl's actor makes it."""
    logits = policy.model(input_ids=x.tokens, attention_mask=x.attention_mask).logits[:, x.prompt_len - 1 : -1]
    return logits.log_softmax(-1).gather(-1, x.tokens[:, x.prompt_len :, None])[..., 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="batches, of two optimiser steps each")
    args = parser.parse_args()
    policy = dmfast.LanguageModel.from_pretrained("tiny-bios")
    base = policy.around(copy.deepcopy(policy.model).requires_grad_(False))
    women = dmfast.Contains(any_of=["she", "her"], name="women")
    algorithm = AlgoConfig(use_kl_in_reward=True, kl_penalty="kl", kl_ctrl=KLControlConfig(kl_coef=0.375))
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=3e-4, weight_decay=0.0)
    for step in range(args.steps):
        x = policy.sample(n=96, max_new_tokens=48, seed=step)
        mask = x.score_mask[:, x.prompt_len :].float()
        with torch.no_grad():
            log_q, log_base = token_log_probs(policy, x), token_log_probs(base, x)
        last = mask.sum(1, keepdim=True).long() - 1
        scores = torch.zeros_like(mask).scatter(1, last, women(x).float()[:, None])
        rewards = scores - algorithm.kl_ctrl.kl_coef * kl_penalty(log_q, log_base, "kl") * mask
        advantages, _ = get_adv_estimator_fn("dmfast")(
            token_level_rewards=rewards, response_mask=mask, index=np.zeros(len(x), dtype=object), config=algorithm
        )
        for rows in torch.arange(len(x)).split(48):  # the second step is off-policy
            loss, metrics = get_policy_loss_fn("dmfast")(
                old_log_prob=log_q[rows], log_prob=token_log_probs(policy, x[rows]), advantages=advantages[rows],
                response_mask=mask[rows], loss_agg_mode="seq-mean-token-sum", config=None, rollout_is_weights=None,
            )  # fmt: skip
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1}: women {float(women(x).mean()):.2f}  |A| {metrics['actor/dmfast_weight_abs']:.2f}")
    after = policy.sample(n=1024, max_new_tokens=48, seed=10**6)
    kl = float((after.log_prob - base.log_prob(after)).mean())
    print(f"share of women {float(women(after).mean()):.3f}, wanted 0.5; KL(pi||a) {kl:.2f} nats")


if __name__ == "__main__":
    main()
