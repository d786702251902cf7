"""Measure the benefit of computing a prompt once for all sequences that continue it.

``LanguageModel.sample`` runs with and without sharing in alternation, and the medians are reported. With a file name,
they are written as JSON.

    python benchmarks/shared_prompts.py [results/shared_prompts.json]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import dmfast
from dmfast.training.report import machine

PROMPT, N, NEW, ROUNDS = 512, 16, 32, 5


def main() -> None:
    """Print and write the medians."""
    torch.manual_seed(0)
    # this is the shape of SmolLM2-135M with a third of its layers
    config = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=10,
                         num_attention_heads=9, num_key_value_heads=3, eos_token_id=0)  # fmt: skip
    words = Tokenizer(models.WordLevel({"<e>": 0, "w": 1}, unk_token="w"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>", pad_token="<e>")
    policy = dmfast.LanguageModel(LlamaForCausalLM(config), tokenizer, check_scores=False)
    prompt = torch.randint(1, 49152, (PROMPT,)).tolist()
    times: dict[bool, list[float]] = {True: [], False: []}
    for i in range(ROUNDS + 1):
        for shares, measured in times.items():
            policy._shares_prompts = shares
            start = time.perf_counter()
            policy.sample([prompt], N, max_new_tokens=NEW, seed=i)
            if i:
                measured.append(time.perf_counter() - start)
    once, each = (statistics.median(times[shares]) for shares in (True, False))
    print(f"once {once:.2f} s, for each sequence {each:.2f} s, {each / once:.2f} times")
    if len(sys.argv) > 1:
        shape = {"prompt": PROMPT, "n": N, "new tokens": NEW, "rounds": ROUNDS, "unit": "s, median",
                 "model": "SmolLM2-135M's shape, 10 of its 30 layers, fp32"}  # fmt: skip
        found = {"machine": machine(), "shape": shape, "once": round(once, 3), "for each sequence": round(each, 3)}
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
