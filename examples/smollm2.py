"""Train SmolLM2-135M: half of the biographies about women, or every one with the word "known".

    pip install gguf && python scripts/fetch_smollm2.py        # writes the model
    python examples/smollm2.py                                 # a moment: E_p[women] = 0.5; 11% under the base
    python examples/smollm2.py --wish known                    # pointwise: b(x) = 1 if it has the word; 15%

A run takes about 45 minutes on one core of a CPU. dmfast/recipes/smollm2_women.yaml and smollm2_known.yaml are the same
jobs as files, and their runs are in benchmarks/results/.
"""

import argparse
import copy
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import dmfast
from dmfast.demo import THREE_SHOTS

WISHES = {
    "women": dmfast.Moment(dmfast.Contains(any_of=["she", "her"], name="women"), 0.5),
    "known": dmfast.Contains("known"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="~/.cache/dmfast/smollm2-135m", help="a transformers folder")
    parser.add_argument("--wish", choices=WISHES, default="women")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32, help="sequences per optimiser step, a multiple of 4")
    parser.add_argument("--fit-samples", type=int, default=1024, help="of the base, for lambda")
    parser.add_argument("--eval-samples", type=int, default=512)
    parser.add_argument("--out", default="smollm2")
    options = parser.parse_args()

    path = Path(options.model).expanduser()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    newlines = [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]  # a biography is one line
    base = dmfast.LanguageModel(copy.deepcopy(model), tokenizer, eos_token_id=[tokenizer.eos_token_id, *newlines])

    target = dmfast.EBM(base, [WISHES[options.wish]], batch_size=64)
    target.fit(n=options.fit_samples, contexts=[THREE_SHOTS], max_new_tokens=24)
    print(target.report)

    args = dmfast.DMConfig(
        output_dir=options.out, objective="gdc++", max_steps=options.steps, max_new_tokens=24,
        per_device_train_batch_size=options.batch // 4, gradient_accumulation_steps=4, learning_rate=1e-5,
        proposal_interval=5, sampling_batch_size=64, eval_strategy="steps", eval_on_start=True,
        eval_steps=options.steps, eval_samples=options.eval_samples, save_strategy="no",
    )  # fmt: skip
    trainer = dmfast.DMTrainer(model, target, args, train_dataset=[THREE_SHOTS], processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    for text in trainer.eval_samples.text[:6]:
        print(text.strip())


if __name__ == "__main__":
    main()
