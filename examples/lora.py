"""Train LoRA on one backbone: half of the biographies about women, in the memory of one model.

A run takes about a minute on a CPU.

    python examples/lora.py                        # a, pi and q are the adapter off, on, and a frozen copy of it
    python examples/lora.py --three-models         # the same run with a base and a proposal of their own
    python examples/lora.py --check-samples 1024   # q is checked on fresh samples

The two ways give the same numbers up to rounding. They differ in the memory of the parameters.
"""

import argparse
import copy
import tempfile

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dmfast
from dmfast.shipped import TINY_BIOS

WOMEN = dmfast.Contains(any_of=["she", "her"], name="women")


def megabytes(*models: torch.nn.Module) -> float:
    """Return the size of the parameters in MB. Memory that several models share counts once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    return sum(storages.values()) / 1e6


def main() -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--three-models", action="store_true")
    parser.add_argument("--check-samples", type=int, default=0, help="fresh sequences for each check of q")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--samples", type=int, default=2048, help="for lambda, and half as many for the evaluation")
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(TINY_BIOS)
    tokenizer = AutoTokenizer.from_pretrained(TINY_BIOS)
    base = dmfast.LanguageModel(copy.deepcopy(model), tokenizer) if options.three_models else None
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["c_attn", "c_fc", "c_proj"], r=8, fan_in_fan_out=True)
    model = peft.get_peft_model(model, config)
    base = base or dmfast.LanguageModel(model, tokenizer).base()

    target = dmfast.EBM(base, [dmfast.Moment(WOMEN, 0.5)]).fit(n=options.samples, max_new_tokens=48)
    with tempfile.TemporaryDirectory() as folder:
        args = dmfast.DMConfig(
            folder, max_steps=options.steps, per_device_train_batch_size=options.batch, max_new_tokens=48,
            learning_rate=options.learning_rate, proposal_interval=5, proposal_check_samples=options.check_samples,
            save_strategy="no", eval_samples=options.samples // 2, logging_steps=5, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = dmfast.DMTrainer(model, target, args, processing_class=tokenizer)
        trainer.train()
        found = trainer.evaluate()
    size = megabytes(base.model, model, trainer.proposal.snapshot.model)
    print(f"parameters of a, pi and q: {size:.2f} MB; {trainer.proposal.swaps} swaps of q")
    print(f"E_pi[women] {found['eval_phi/women']:.3f}, KL(pi||a) {found['eval_kl_policy_base']:.3f} nats")
    return found | {"megabytes": size}


if __name__ == "__main__":
    main()
