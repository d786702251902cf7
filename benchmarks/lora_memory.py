"""Compare the memory of a LoRA training with three models and with one backbone.

The three models are a, pi and q. The backbone has two adapters. The model has GPT-2's size (124M random fp32
parameters). Each variant takes three steps of 8 sequences of 16 tokens, swaps q at each step, and runs in a fresh
process.

    python benchmarks/lora_memory.py [results/lora_memory.json]
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import dmfast
from dmfast.bench.measure import in_fresh_process
from dmfast.bench.step import RANDOM_GPT2, load
from dmfast.training.report import machine

MB = 1e6


def peak() -> float:
    """Return the largest resident set of this process so far, in MB."""
    status = Path("/proc/self/status").read_text()
    return float(status.split("VmHWM:")[1].split()[0]) * 1024 / MB


def bytes_of(*models: torch.nn.Module) -> float:
    """Return the MB of the parameters, and count shared parameters once."""
    found = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    return sum(found.values()) / MB


def run(kind: str) -> dict[str, float]:
    """Train with ``three`` models or with ``one`` backbone."""
    torch.set_num_threads(1)
    tokenizer = load(RANDOM_GPT2).tokenizer
    before = peak()
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config())
    base = None if kind == "one" else dmfast.LanguageModel(copy.deepcopy(model), tokenizer)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"], r=8, fan_in_fan_out=True))
    feature = dmfast.Scorer(lambda x: (x.tokens < 50).any(1), name="low", on="samples")
    target = dmfast.EBM(base or dmfast.LanguageModel(model, tokenizer).base(), [dmfast.Moment(feature, 0.5)])
    target.lambda_ = [1.0]
    with tempfile.TemporaryDirectory() as folder:
        args = dmfast.DMConfig(
            folder, max_steps=3, per_device_train_batch_size=8, max_new_tokens=16, proposal_criterion="interval",
            proposal_interval=1, save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = dmfast.DMTrainer(model, target, args, processing_class=tokenizer)
        start = time.perf_counter()
        trainer.train()
    assert trainer.proposal is not None and trainer.proposal.swaps == 3
    return {
        "parameters_mb": bytes_of(target.base.model, model, trainer.proposal.snapshot.model),
        "peak_mb": peak(), "peak_without_models_mb": before, "seconds": time.perf_counter() - start,
    }  # fmt: skip


def main() -> None:
    """Run one variant, or run both and print their results."""
    if sys.argv[1:2] == ["--run"]:
        found = run(sys.argv[2])
        print(json.dumps(found))
        return
    code = "from benchmarks.lora_memory import main; main()"
    results = {kind: in_fresh_process(code, "--run", kind) for kind in ("three", "one")}
    for kind, found in results.items():
        print(kind, {name: round(value, 1) for name, value in found.items()})
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
