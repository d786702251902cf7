"""Test ``dmfast.integrations.verl`` against the installed verl.

verl's registries, estimators, settings and actor's loss run on a CPU. Its trainers need GPUs and do not run here.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")

import numpy as np
import torch
import verl
from refusals import refuses
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.config import AlgoConfig
from verl.trainer.config.algorithm import KLControlConfig
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn, kl_penalty
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

import dmfast
from dmfast import Objective
from dmfast.integrations.verl import register

B, T, V, BETA = 12, 7, 20, 0.25
MODE = "seq-mean-token-sum"


def actor(mode: str = MODE, name: str = "dmfast", **info: Any) -> ActorConfig:
    return ActorConfig(
        strategy="fsdp", loss_agg_mode=mode, rollout_n=4, ppo_micro_batch_size_per_gpu=4, global_batch_info=info,
        policy_loss=PolicyLossConfig(loss_mode=name), entropy_coeff=0.0,
    )  # fmt: skip


ALGORITHM = AlgoConfig(use_kl_in_reward=True, kl_penalty="kl", kl_ctrl=KLControlConfig(kl_coef=BETA))


class Step:
    """Be a step as verl has it: three prompts of four sequences.

    One sequence has R = -inf, and so have all of the last prompt.
    """

    def __init__(self, on_policy: bool = False) -> None:
        torch.manual_seed(0)
        self.logits = torch.randn(B, T, V).double()
        self.tokens = torch.randint(V, (B, T))
        self.mask = torch.arange(T) < torch.randint(2, T + 1, (B, 1))
        self.log_pi = self.of_tokens(self.logits)
        self.old = self.log_pi + (not on_policy) * 0.1 * torch.randn(B, T).double()
        self.base = self.log_pi + 0.3 * torch.randn(B, T).double()
        self.reward = torch.randn(B).double()
        self.reward[[1, *range(8, 12)]] = -math.inf
        self.uid = np.repeat(np.array(["a", "b", "c"], dtype=object), 4)

    def of_tokens(self, logits: Tensor) -> Tensor:
        """Return log pi of each token."""
        return logits.log_softmax(-1).gather(-1, self.tokens[..., None])[..., 0]

    def token_level(self, reward: Tensor) -> Tensor:
        """Return R on the last token, as verl's reward managers have it."""
        last = self.mask.sum(1, keepdim=True) - 1
        return torch.zeros(B, T).double().scatter(1, last, reward[:, None])

    def gradient(self, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return a loss of the logits and its gradient."""
        z = self.logits.clone().requires_grad_()
        value = loss(z)
        value.backward()
        return value.detach(), z.grad


def check_targets() -> None:
    """Compare loss and gradient with those of ``dm_loss`` on the logits, log P, log Z and log q worked out by hand."""
    for objective in ("dpg", "gdc++", "js", "tv", "chi2", Objective("alpha", alpha=0.5), Objective("js", baseline=0.1)):
        for on_policy in (False, True):
            step = Step(on_policy)
            register(objective, on_policy=on_policy)
            penalty = kl_penalty(step.old, step.base, "kl") * step.mask
            rewards = step.token_level(step.reward) - BETA * penalty
            estimate = get_adv_estimator_fn("dmfast")
            advantages, returns = estimate(rewards, step.mask.double(), index=step.uid, config=ALGORITHM)
            assert torch.equal(advantages, returns) and not bool(advantages.isnan().any())
            policy_loss = get_policy_loss_fn("dmfast")

            def theirs(z: Tensor, call: Any = policy_loss, s: Step = step, a: Tensor = advantages) -> Tensor:
                loss, metrics = call(s.old, s.of_tokens(z), a, s.mask.double(), MODE, actor(), None)
                assert metrics["actor/dmfast_weight_abs"] > 0
                return loss

            log_q = (step.old * step.mask).sum(1)
            log_p = (step.base * step.mask).sum(1) + step.reward / BETA
            log_w = (log_p - log_q).view(3, 4)
            log_z = (log_w.logsumexp(1) - math.log(4)).repeat_interleave(4)

            def mine(z: Tensor, s: Step = step, on: bool = on_policy, o: Any = objective, given: Any = None) -> Tensor:
                return dmfast.dm_loss(z, s.tokens, s.mask, objective=o, on_policy=on, backend="eager", **given).loss

            given = {"log_target": log_p, "log_proposal": log_q, "log_z": log_z}
            expected = step.gradient(lambda z, f=mine, g=given: f(z, given=g))
            torch.testing.assert_close(step.gradient(theirs), expected, rtol=1e-10, atol=1e-12)


def check_own_losses_on_policy() -> None:
    """Compare gradients on-policy with those of verl's own losses, whose ways to take means are functions of Terms."""
    step = Step(on_policy=True)
    reward = torch.randn(B).double()
    ways = {
        "seq-mean-token-sum": "reinforce",
        "seq-mean-token-mean": lambda terms: terms.reward / terms.length,
        "token-mean": lambda terms: terms.reward * terms.n_sequences / terms.n_tokens,
        "seq-mean-token-sum-norm": lambda terms: terms.reward / T,
    }
    for estimator in ("grpo_vectorized", "rloo"):
        estimate = get_adv_estimator_fn(estimator)
        advantages, _ = estimate(step.token_level(reward), step.mask.double(), index=step.uid)
        for mode, objective in ways.items():
            register(objective, on_policy=True)
            found, expected = (
                step.gradient(lambda z, n=name, m=how, a=advantages: get_policy_loss_fn(n)(
                    step.old, step.of_tokens(z), a, step.mask.double(), m, actor(m, n), None)[0])[1]
                for name, how in (("dmfast", MODE), ("vanilla", mode))
            )  # fmt: skip
            # vanilla divides by a length + 1e-8
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def check_actor_loss() -> None:
    """Run the loss of verl's actor on parts of a step, as on two processes. Their mean is that of the whole step."""
    step = Step()
    register("gdc++")
    advantages, _ = get_adv_estimator_fn("dmfast")(
        step.token_level(step.reward) - BETA * (step.old - step.base) * step.mask, step.mask.double(), index=step.uid,
        config=ALGORITHM,
    )  # fmt: skip
    loss = get_policy_loss_fn("dmfast")
    whole = step.gradient(lambda z: loss(step.old, step.of_tokens(z), advantages, step.mask.double(), MODE, actor())[0])
    z, total = step.logits.clone().requires_grad_(), torch.zeros(()).double()
    of_tokens, prompt = step.of_tokens(z), 2
    for rows in torch.arange(B).split(3):
        lengths = step.mask[rows].sum(1).tolist()

        def nested(x: Tensor, rows: Tensor = rows, lengths: list[int] = lengths) -> Tensor:
            return torch.nested.as_nested_tensor([x[r, :n] for r, n in zip(rows, lengths, strict=True)],
                                                 layout=torch.jagged)  # fmt: skip

        # log_probs[t] belongs to token t + 1, over prompt and response
        flat = torch.cat([torch.cat([torch.zeros(prompt - 1).double(), of_tokens[r, :n], torch.zeros(1).double()])
                          for r, n in zip(rows, lengths, strict=True)])  # fmt: skip
        data = TensorDict({
            "prompts": torch.nested.as_nested_tensor([torch.ones(prompt).long()] * 3, layout=torch.jagged),
            "responses": nested(step.tokens), "response_mask": nested(step.mask.long()),
            "old_log_probs": nested(step.old), "advantages": nested(advantages),
        }, batch_size=[3])  # fmt: skip
        tu.assign_non_tensor(data, dp_size=2, batch_num_tokens=int(step.mask.sum()), global_batch_size=B)
        part, metrics = ppo_loss(actor(), {"log_probs": flat}, data)
        assert "actor/dmfast_log_ratio" in metrics
        # DDP averages over two processes
        total = total + part / 2
    total.backward()
    torch.testing.assert_close((total.detach(), z.grad), whole, rtol=1e-10, atol=1e-12)


def check_refusals() -> None:
    step = Step()
    ones = torch.ones(B, T).double()

    def loss(advantages: Tensor = ones, mode: str = MODE, weights: Tensor | None = None) -> object:
        return get_policy_loss_fn("dmfast")(
            step.old, step.log_pi, advantages, step.mask.double(), mode, actor(), weights
        )

    def estimate(**change: Any) -> object:
        call = {"index": step.uid, "config": ALGORITHM} | change
        return get_adv_estimator_fn("dmfast")(ones, step.mask.double(), **call)

    refuses("no inputs for objective 'kl_control'", lambda: register(Objective("kl_control", beta=0.1)))
    refuses("a baseline must be a number", lambda: register(Objective("dpg", baseline="leave_one_out")))
    refuses("grpo compares the sequences of a prompt", lambda: register("grpo"))
    register("gdc++")
    refuses("set actor.loss_agg_mode='seq-mean-token-sum', got 'token-mean'", lambda: loss(mode="token-mean"))
    refuses("bypass_mode=True", lambda: loss(weights=ones))
    refuses("the advantages of sequence 0 differ", lambda: loss(torch.arange(B * T).view(B, T).double()))
    refuses("got use_kl_in_reward=False", lambda: estimate(config=AlgoConfig()))
    adaptive = replace(ALGORITHM, kl_ctrl=KLControlConfig(type="adaptive", kl_coef=BETA))
    refuses("a fixed positive kl_ctrl.kl_coef", lambda: estimate(config=adaptive))
    refuses("needs the uid", lambda: estimate(index=None))
    register(lambda terms: terms.reward - terms.group_mean(terms.reward))
    refuses("takes a mean over the sequences of a prompt", loss)
    register(lambda terms: terms.at_draw(lambda whole: whole.reward - whole.group_mean(whole.reward)))
    refuses("know no lengths and no contexts", loss)


def main() -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)
    check_targets()
    check_own_losses_on_policy()
    check_actor_loss()
    check_refusals()
    print(f"verl {verl.__version__}, dmfast {dmfast.__version__}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
