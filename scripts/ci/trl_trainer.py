"""Test ``dmfast.integrations.trl`` against the installed trl.

Objectives of dmfast give the gradients of trl's own losses. Short trainings run with and without a target, and resume.
Refusals come before anything is drawn.
"""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", HF_HUB_DISABLE_PROGRESS_BARS="1")

import torch
import trl
from datasets import Dataset
from refusals import refuses
from trl import GRPOConfig, GRPOTrainer

import dmfast
from dmfast import EBM, Contains, LanguageModel, Moment, Objective
from dmfast.integrations.trl import DMGRPOTrainer
from dmfast.methods import DrGRPO
from dmfast.training.recipe import load

LENGTH = 32


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Return rewards of size 1,000, beside which what trl and dmfast add to a standard deviation vanishes."""
    return [1000.0 * (len(ids) % 5) + 50 * (ids[0] % 7) for ids in completion_ids]


def trainer(
    out: str, objective: Any, *, target: EBM | None = None, beta: float = 0.0, prompts: list[str] | None = None,
    rewards: Any = reward, **settings: Any,
) -> DMGRPOTrainer:  # fmt: skip
    policy = load("tiny-bios")
    rows = Dataset.from_dict({"prompt": prompts or ["<|endoftext|>"] * 64})
    args = GRPOConfig(
        out, **({"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "beta": beta,
             "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": LENGTH, "seed": 3,
             "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "max_steps": 2, "logging_steps": 1,
             "lr_scheduler_type": "constant", "save_strategy": "no", "max_grad_norm": 0.0} | settings),
    )  # fmt: skip
    rewards = None if target is not None else rewards
    return DMGRPOTrainer(policy.model, rewards, args, objective=objective, target=target, train_dataset=rows,
                         processing_class=policy.tokenizer)  # fmt: skip


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


def check_gradients(out: str, name: str, objective: Any, moved: bool = False, **settings: Any) -> None:
    """Compare the gradient of each microbatch with that of trl's own loss on the same completions."""
    t = trainer(out, objective, **settings)
    model = t.model
    model.train()
    t.current_gradient_accumulation_steps = t.args.gradient_accumulation_steps
    batch = [{"prompt": "<|endoftext|>"}] * (t.args.per_device_train_batch_size * t.args.steps_per_generation)
    first = t._prepare_inputs(batch)
    if moved:  # later optimiser steps on the same completions find the policy moved
        assert not t._on_policy
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(5e-4 * torch.randn_like(parameter))
    clipped = 0.0
    for microbatch in (first, *t._buffered_inputs[1:]):
        mine = gradients(model, t._compute_loss(model, microbatch))
        theirs = gradients(model, GRPOTrainer._compute_loss(t, model, microbatch))
        assert float(theirs.norm()) > 0
        error = float((mine - theirs).norm() / theirs.norm())
        assert error < 2e-5, (name, error)
    clipped = sum(t._metrics["train"].get("clip_ratio/region_mean", [0.0]))
    assert (clipped > 0) == moved, (name, clipped)
    print(f"{name}: gradients as trl's, error {error:.1e}", flush=True)


def women() -> EBM:
    policy = load("tiny-bios")
    base = policy.around(copy.deepcopy(policy.model).requires_grad_(False))
    target = EBM(base, [Moment(Contains(any_of=["she", "her"], name="women"), 0.5)])
    target.lambda_ = [2.6]
    return target


def check_target(out: str) -> None:
    """Train to a target, with log q of an earlier policy, and compare a resumed run with an unbroken one."""
    settings = {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "num_generations": 8, "max_steps": 4}
    whole = trainer(f"{out}/a", "gdc++", target=women(), **settings, save_strategy="steps", save_steps=2)
    whole.train()
    logged = whole.state.log_history[0]
    assert 0 <= logged["phi/women"] <= 1 and logged["weight_abs"] > 0 and "entropy" in logged
    assert len(whole.partitions) == 1 and next(iter(whole.partitions.values())).n == 32
    again = trainer(f"{out}/a", "gdc++", target=women(), **settings)
    said: list[str] = []
    logger = logging.getLogger("transformers.trainer")
    logger.addHandler(heard := logging.Handler())
    heard.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    again.train(resume_from_checkpoint=f"{out}/a/checkpoint-2")
    logger.removeHandler(heard)
    assert not [line for line in said if "missing keys" in line], said  # the tied head is in the file by another name
    assert next(iter(again.partitions.values())).n == 32
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    other = women()
    other.lambda_ = [1.5]
    resume = {"resume_from_checkpoint": f"{out}/a/checkpoint-2"}
    for of, changed, message in (
        (other, {}, "lambda was [2.6] and is [1.5]: Z of the checkpoint's prompts is of the other target. Set them as"),
        (women(), {"max_completion_length": 8}, f"max_completion_length was {LENGTH} and is 8: Z of"),
        (women(), {"temperature": 0.5}, "temperature was 1.0 and is 0.5: Z of"),
    ):
        refuses(message, lambda of=of, changed=changed: trainer(
            f"{out}/a", "gdc++", target=of, **settings, **changed).train(**resume))  # fmt: skip
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer(f"{out}/a", "dpg", target=women(), **(settings | {"max_steps": 2})).train(**resume)
    assert any("objective was 'gdc++' and is 'dpg'" in str(w.message) for w in found), [str(w.message) for w in found]
    os.remove(f"{out}/a/checkpoint-2/dmfast_z.safetensors")
    refuses("has no dmfast_z", lambda: again.train(resume_from_checkpoint=f"{out}/a/checkpoint-2"))


def check_loss_is_the_models(out: str) -> None:
    """Compare the loss of a microbatch with that of ``LanguageModel.loss`` on samples that are made by hand."""
    target = women()
    t = trainer(out, Objective("dpg", baseline="leave_one_out_context"), target=target, gradient_accumulation_steps=1,
                prompts=["She was", "He", "An old man said", "The"] * 4)  # fmt: skip
    t.current_gradient_accumulation_steps = 1
    t.model.train()
    d = t._prepare_inputs([{"prompt": p} for p in ["She was"] * 4 + ["He"] * 4])
    found = t._compute_loss(t.model, d).detach()
    policy = LanguageModel(t.model, t.processing_class)
    x = policy.samples_of(
        [ids[m.bool()].tolist() for ids, m in zip(d["prompt_ids"], d["prompt_mask"], strict=True)],
        [ids[m.bool()].tolist() for ids, m in zip(d["completion_ids"], d["completion_mask"], strict=True)],
        append_eos=False,
    )  # fmt: skip
    log_q, log_p = policy.log_prob(x), target.score(x).log_target
    log_w = (log_p - log_q).double()
    expected = torch.zeros(())
    digests = d["prompt_ids"].sum(1)
    for one in digests.unique():
        of = digests == one
        u = (log_w[of] - (log_w[of].exp().mean().log())).exp()
        a = u - (u.sum() - u) / (len(u) - 1)
        expected = expected - (a * log_q[of]).sum() / 8
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def check_refusals(out: str) -> None:
    """Check that each of these is refused before anything is drawn."""
    refuses("GRPOConfig(top_p=0.9) has no place", lambda: trainer(out, "reinforce", top_p=0.9))
    refuses("GRPOConfig(entropy_coef=0.1) has no place", lambda: trainer(out, "reinforce", entropy_coef=0.1))
    refuses("'gdc++' needs a target", lambda: trainer(out, "gdc++"))
    refuses("grpo is for completions of the policy itself", lambda: trainer(out, "grpo", num_iterations=2))
    refuses("trl cuts groups", lambda: trainer(out, "vargrad"))
    refuses("GRPOConfig(beta=0.1) must be 0.0 with objective 'reinforce'", lambda: trainer(out, "reinforce", beta=0.1))
    refuses(
        "must be 0.2 with objective 'kl_control'", lambda: trainer(out, Objective("kl_control", beta=0.2), beta=0.1)
    )
    unfitted = women()
    unfitted._lambda = None
    refuses("call target.fit() first", lambda: trainer(out, "gdc++", target=unfitted))
    policy = load("tiny-bios")
    moving = EBM(policy, [Moment(Contains(any_of=["she", "her"], name="women"), 0.5)])
    moving.lambda_ = [2.6]
    refuses(
        "target.base shares parameters with the model that is to be trained",
        lambda: DMGRPOTrainer(
            policy.model, None, GRPOConfig(out, use_cpu=True, bf16=False, report_to="none"), target=moving,
            train_dataset=Dataset.from_dict({"prompt": ["<|endoftext|>"]}), processing_class=policy.tokenizer,
        ),
    )  # fmt: skip
    t = trainer(out, "reinforce")
    t.reward_funcs[0] = lambda completions, **_: [None, *[1.0] * (len(completions) - 1)]
    refuses("no reward function scores completion 0", t.train)


def check_ranks(out: str) -> None:
    """Compare gradients on two processes, among which groups are cut, and train both to the same parameters."""
    split = {"per_device_train_batch_size": 2, "num_generations": 4, "ddp_backend": "gloo"}
    check_gradients(out, "DAPO on two processes", "dapo", loss_type="dapo", **split)
    check_gradients(
        out, "Dr. GRPO on two processes", DrGRPO(LENGTH), loss_type="dr_grpo", scale_rewards="none", **split
    )
    t = trainer(out, Objective("dpg", baseline="leave_one_out_context"), target=women(), **split)
    t.train()
    # the count is of both steps, microbatches and processes
    assert next(iter(t.partitions.values())).n == 2 * 2 * 2 * 2
    mine = torch.cat([p.detach().flatten() for p in t.policy.model.parameters()])
    both = [torch.empty_like(mine) for _ in range(2)]
    torch.distributed.all_gather(both, mine)
    assert torch.equal(*both)


def main(of_ranks: bool) -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as out:
        if of_ranks:
            check_ranks(out)
            torch.distributed.destroy_process_group()
            return
        check_refusals(out)
        check_gradients(out, "GRPO", "grpo", loss_type="grpo")
        check_gradients(out, "GRPO, truncated left out", "grpo", loss_type="grpo", mask_truncated_completions=True)
        check_gradients(out, "DAPO", "dapo", loss_type="dapo")
        check_gradients(out, "Dr. GRPO", DrGRPO(LENGTH), loss_type="dr_grpo", scale_rewards="none")
        clip = {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}
        check_gradients(out, "GSPO on-policy", "gspo", **clip)
        check_gradients(out, "GSPO off-policy", "gspo", **clip, num_iterations=2, moved=True)
        check_loss_is_the_models(out)
        check_target(out)
        kl = trainer(out, Objective("kl_control", beta=0.5, baseline="leave_one_out_context"), beta=0.5)
        kl.train()
        assert kl.state.global_step == 2
        again = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        subprocess.run([*again, __file__, "ranks"], check=True, timeout=300)
    print(f"trl {trl.__version__}, dmfast {dmfast.__version__}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(of_ranks=sys.argv[1:] == ["ranks"])
