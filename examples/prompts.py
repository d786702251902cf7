"""Match a conditional distribution with prompts on the tiny biography model, in a minute or two on a CPU.

    python examples/prompts.py                # prompts in a list
    python examples/prompts.py --dataset      # the same in a datasets.Dataset (pip install datasets)

The wish is that half of the biographies over four prompts are about sports. One lambda for all prompts gives this, but
each prompt has its own Z. If the base has the share r of sports after a prompt, p has the share r e^lambda / Z with
Z = r e^lambda + 1 - r. So a prompt with a larger share under the base has a larger share under p too, and the policy is
compared with p prompt by prompt.
"""

import argparse
import copy
import json
import math
import tempfile
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import dmfast
from dmfast.shipped import TINY_BIOS

WORDS = json.loads((TINY_BIOS / "features.json").read_text(encoding="utf-8"))["topic_sports"]["any_of"]
SPORTS = dmfast.Contains(any_of=WORDS, name="sports")
PROMPTS = ["Mary", "John", "John Smith ( 1880 - 1950 ) was a German", "Mary Smith ( born 1970 ) is an American"]


def shares(model: dmfast.LanguageModel, n: int, seed: int) -> list[float]:
    """Return the share of biographies about sports after each prompt, in n samples of each."""
    x = model.sample(PROMPTS, n, max_new_tokens=48, seed=seed, batch_size=512)
    return [float(SPORTS(x[x.context_id == i]).mean()) for i in range(len(PROMPTS))]


def main() -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", action="store_true", help="give the trainer a datasets.Dataset")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--samples", type=int, default=48, help="n, of each prompt in a step")
    parser.add_argument("--fit-samples", type=int, default=4096, help="of the base, for lambda")
    parser.add_argument("--eval-samples", type=int, default=1024, help="of each prompt, for the table")
    parser.add_argument("--learning-rate", type=float, default=1.5e-4)
    options = parser.parse_args()

    prompts: Any = PROMPTS
    if options.dataset:
        import datasets

        prompts = datasets.Dataset.from_dict({"prompt": PROMPTS, "other columns": ["are not read"] * len(PROMPTS)})
    model = AutoModelForCausalLM.from_pretrained(TINY_BIOS)
    tokenizer = AutoTokenizer.from_pretrained(TINY_BIOS)
    base = dmfast.LanguageModel(copy.deepcopy(model), tokenizer)
    target = dmfast.EBM(base, [dmfast.Moment(SPORTS, 0.5)])
    target.fit(n=options.fit_samples, contexts=PROMPTS, max_new_tokens=48)
    print(target.report)
    with tempfile.TemporaryDirectory() as folder:
        args = dmfast.DMConfig(
            folder, max_steps=options.steps, samples_per_context=options.samples,
            per_device_train_batch_size=options.samples * len(PROMPTS), learning_rate=options.learning_rate,
            max_new_tokens=48, proposal_interval=5, save_strategy="no", logging_steps=10, disable_tqdm=True,
        )  # fmt: skip
        trainer = dmfast.DMTrainer(model, target, args, train_dataset=prompts, processing_class=tokenizer)
        trainer.train()

    weight = math.exp(float(target.lambda_))
    rates, found = (shares(of, options.eval_samples, seed=1) for of in (base, trainer.policy))
    exact = [rate * weight + 1 - rate for rate in rates]
    wanted = [rate * weight / z for rate, z in zip(rates, exact, strict=True)]
    running = [math.exp(trainer.partitions[row].log_z) for row in range(len(PROMPTS))]
    print("share of sports under a, p, pi; Z from the share under a, and as the trainer has it")
    for row in zip(rates, wanted, found, exact, running, PROMPTS, strict=True):
        print("{:8.3f} {:6.3f} {:6.3f}    {:6.3f} {:6.3f}   {}".format(*row))
    return {"base": rates, "target": wanted, "policy": found, "exact": exact, "running": running}


if __name__ == "__main__":
    main()
