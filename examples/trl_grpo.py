"""Train with trl's GRPOTrainer and dmfast's loss: half of the biographies are to be about women.

    pip install '.[trl]'
    python examples/trl_grpo.py              # a small model that dmfast ships, about a minute on a CPU
    python examples/trl_grpo.py --steps 20 --objective dapo    # a reward instead of a target: trl's own DAPO gradient

trl draws the completions and runs the loop. With ``gdc++`` the model goes to the target, where the share is one half
and all else is as likely as before. A method such as ``dapo`` maximises the reward instead, and every biography is
about a woman in the end.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

from datasets import Dataset
from trl import GRPOConfig

import dmfast
from dmfast.integrations.trl import DMGRPOTrainer
from dmfast.objectives import TARGET_OBJECTIVES


def women(completions: list[str], **_: Any) -> list[float]:
    """Return 1 for each completion about a woman: the reward of ``dapo``."""
    return [float(bool({"she", "her"} & set(text.lower().split()))) for text in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="optimiser steps")
    parser.add_argument(
        "--objective", default="gdc++", help="gdc++ and the like: the target; dapo and the like: a reward"
    )
    parser.add_argument("--batch-size", type=int, default=96, help="completions of a step")
    args = parser.parse_args()

    policy = dmfast.LanguageModel.from_pretrained("tiny-bios")  # or a folder, or a name on the hub
    base = policy.around(copy.deepcopy(policy.model).requires_grad_(False))
    about_women = dmfast.Moment(dmfast.Contains(any_of=["she", "her"], name="women"), 0.5)
    target = None
    if args.objective in TARGET_OBJECTIVES:
        target = dmfast.EBM(base, [about_women]).fit(n=4096, max_new_tokens=48)
        print(target.report)
    config = GRPOConfig(
        "dmfast_output/trl", max_steps=args.steps, learning_rate=5e-4, per_device_train_batch_size=args.batch_size,
        num_generations=args.batch_size, max_completion_length=48, bf16=False, gradient_checkpointing=False,
        logging_steps=10, save_strategy="no", report_to="none",
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": [policy.tokenizer.bos_token] * 1024})
    trainer = DMGRPOTrainer(
        policy.model, women if target is None else None, config, objective=args.objective, target=target,
        train_dataset=prompts, processing_class=policy.tokenizer,
    )  # fmt: skip
    trainer.train()
    after = policy.sample(n=1024, max_new_tokens=48, seed=1)
    print(f"share of women {float(about_women.feature(after).mean()):.3f}, wanted 0.5; "
          f"KL(pi||a) {float((after.log_prob - base.log_prob(after)).mean()):.2f} nats")  # fmt: skip


if __name__ == "__main__":
    main()
