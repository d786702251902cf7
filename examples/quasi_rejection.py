"""Draw from the target itself by quasi-rejection sampling on the tiny biography model, in under a minute on a CPU.

    python examples/quasi_rejection.py             # writes quasi_rejection.png

Under the target half of the biographies are about women. There are three proposals for it: the base, a policy after a
short training, and their mixture. The picture shows the acceptance rate that each pays for being near to p. Then the
example finds beta for an acceptance rate of one in four, and draws sequences of the distribution that this beta gives.
"""

import argparse
import copy
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import dmfast
from dmfast.rejection import RejectionPoint, plot_rejection, quasi_rejection_sample, rejection_curve
from dmfast.sampling import Mixture
from dmfast.shipped import TINY_BIOS

WOMEN = dmfast.Contains(any_of=["she", "her"], name="women")


def main() -> dict[str, RejectionPoint]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of training")
    parser.add_argument("--fit-samples", type=int, default=4096, help="of the base, for lambda")
    parser.add_argument("--samples", type=int, default=2048, help="of each proposal, for the curves")
    parser.add_argument("--accept", type=int, default=512, help="sequences to draw")
    parser.add_argument("--out", type=Path, default=Path("quasi_rejection.png"))
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(TINY_BIOS)
    tokenizer = AutoTokenizer.from_pretrained(TINY_BIOS)
    base = dmfast.LanguageModel(copy.deepcopy(model), tokenizer)
    target = dmfast.EBM(base, [dmfast.Moment(WOMEN, 0.5)]).fit(n=options.fit_samples, max_new_tokens=48)
    with tempfile.TemporaryDirectory() as folder:
        args = dmfast.DMConfig(
            folder, max_steps=options.steps, per_device_train_batch_size=128, learning_rate=1.5e-4, max_new_tokens=48,
            proposal_interval=5, save_strategy="no", logging_steps=10, disable_tqdm=True,
        )  # fmt: skip
        trainer = dmfast.DMTrainer(model, target, args, processing_class=tokenizer)
        trainer.train()

    proposals = {"base": base, "policy": trainer.policy, "mixture": Mixture([base, trainer.policy])}
    curves = {
        name: rejection_curve(target, proposal, options.samples, max_new_tokens=48)
        for name, proposal in proposals.items()
    }
    plot_rejection(curves, options.out)
    points = {name: curve.at(curve.log_beta_for(0.25)) for name, curve in curves.items()}
    for name, point in points.items():
        print(f"{name}: one in four accepted, KL(p||p_beta) {point.kl} nats, TVD {point.tvd}")
    x, drawn = quasi_rejection_sample(
        target, trainer.policy, options.accept, log_beta=points["policy"].log_beta, max_new_tokens=48
    )
    print(f"{len(x)} of {drawn} accepted; the share of women is {float(WOMEN(x).mean()):.3f}, wanted 0.5")
    return points


if __name__ == "__main__":
    main()
