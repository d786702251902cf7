"""Train by KL-control (Ziegler et al. 2019, arXiv:1909.08593) on the tiny biography model, in under a minute on a CPU.

    python examples/kl_control.py                  # adapts beta until KL(pi||a) is 0.7 nats
    python examples/kl_control.py --beta 0.5       # keeps beta

The run maximises E_pi[R] - beta KL(pi||a), where R(x) = 1 for a biography about a woman. The optimum is known to be
p(x) = a(x) exp(R(x)/beta)/Z. So the policy is compared with the share of women under p and KL(p||a) at the last beta.
Every batch serves four optimiser steps, under PPO's clipping on whole sequences.
"""

import argparse
import copy
import math
import tempfile

from transformers import AutoModelForCausalLM, AutoTokenizer

import dmfast
from dmfast.shipped import TINY_BIOS

WOMEN = dmfast.Contains(any_of=["she", "her"], name="women")


def optimum(beta: float, rate: float) -> tuple[float, float]:
    """Return the share of women under p = a exp(R/beta)/Z and KL(p||a), where a has the share ``rate``."""
    z = rate * math.exp(1 / beta) + 1 - rate
    share = rate * math.exp(1 / beta) / z
    return share, share / beta - math.log(z)


def main() -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beta", type=float, help="fixed; without it beta is steered")
    parser.add_argument("--target-kl", type=float, default=0.7)
    parser.add_argument("--steps", type=int, default=80, help="optimiser steps, four of them on each batch")
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--learning-rate", type=float, default=1.5e-4)
    parser.add_argument("--samples", type=int, default=4096, help="for the base's rate, a quarter for the evaluation")
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(TINY_BIOS)
    tokenizer = AutoTokenizer.from_pretrained(TINY_BIOS)
    base = dmfast.LanguageModel(copy.deepcopy(model), tokenizer)
    rate = float(WOMEN(base.sample(n=options.samples, max_new_tokens=48, seed=1, batch_size=512)).mean())
    with tempfile.TemporaryDirectory() as folder:
        args = dmfast.DMConfig(
            folder, objective="kl_control", on_policy=True, baseline="mean", ppo_epochs=4, ppo_clip=0.2,
            beta=options.beta or 0.5, beta_target_kl=None if options.beta else options.target_kl, beta_horizon=1000,
            max_steps=options.steps, per_device_train_batch_size=options.batch, learning_rate=options.learning_rate,
            max_new_tokens=48, save_strategy="no", eval_samples=options.samples // 4, logging_steps=4,
            disable_tqdm=True, seed=0,
        )  # fmt: skip
        # the logs compare the policy with the optimum at the first beta
        target = dmfast.EBM(base, [dmfast.Reward(WOMEN, beta=args.beta)])
        trainer = dmfast.DMTrainer(model, target, args, processing_class=tokenizer, reward=WOMEN)
        trainer.train()
        found = trainer.evaluate()
    beta = [h["beta"] for h in trainer.state.log_history if "beta" in h][-1]
    share, kl = optimum(beta, rate)
    name = trainer.feature_names[0]
    women, nats = found[f"eval_phi/{name}"], found["eval_kl_policy_base"]
    print(f"beta {beta:.3f}: E_pi[R] {women:.3f}, KL(pi||a) {nats:.3f} nats")
    print(f"the optimum at this beta: E_p[R] {share:.3f}, KL(p||a) {kl:.3f} nats; the base has E_a[R] {rate:.3f}")
    return found


if __name__ == "__main__":
    main()
