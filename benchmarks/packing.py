"""Measure the benefit of packed sequences over padded ones.

A loss and its gradient run with sequences of several lengths laid end to end, and with the same sequences padded. They
alternate, and the medians are reported. One model has SmolLM2-135M's width and six layers, the other has the size of
tiny-bios. With a file name, the results are written as JSON.

    python benchmarks/packing.py [results/packing.json]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import dmfast
from dmfast.training.report import machine

WIDE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9,
        "num_key_value_heads": 3}  # fmt: skip
TINY = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
#: The model, the number of sequences, and their shortest and longest lengths. Lengths are spread evenly.
CASES = [("wide", WIDE, 16, 8, 64), ("wide", WIDE, 16, 64, 256), ("wide", WIDE, 16, 200, 256),
         ("tiny", TINY, 64, 5, 48)]  # fmt: skip
ROUNDS = 7


def main() -> None:
    """Print and write the medians."""
    found = {}
    for name, sizes, n, shortest, longest in CASES:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, eos_token_id=0, **sizes))
        words = Tokenizer(models.WordLevel({"<e>": 0, "w": 1}, unk_token="w"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>", pad_token="<e>")
        policy = dmfast.LanguageModel(model, tokenizer)
        policy.sample(None, 2, max_new_tokens=2, seed=0)  # this checks whether the model can be packed
        lengths = torch.linspace(shortest, longest, n).long().tolist()
        texts = [torch.randint(1, 4096, (length,)).tolist() for length in lengths]
        x = policy.samples_of(None, texts, append_eos=False, log_prob=torch.full((n,), -1000.0))
        x = replace(x, log_prob=policy.log_prob(x).detach())
        options = {"log_target": x.log_prob, "log_proposal": x.log_prob, "log_z": 0.0}
        times: dict[bool, list[float]] = {True: [], False: []}
        for i in range(ROUNDS + 1):
            for policy.packs, measured in times.items():
                start = time.perf_counter()
                policy.loss(x, **options).loss.backward()
                if i:
                    measured.append(time.perf_counter() - start)
        packed, padded = (statistics.median(times[packs]) for packs in (True, False))
        case = f"{name}, {n} sequences of {shortest} to {longest} tokens"
        found[case] = {"packed_ms": round(packed * 1e3), "padded_ms": round(padded * 1e3)}
        print(f"{case}: packed {packed * 1e3:.0f} ms, padded {padded * 1e3:.0f} ms, {padded / packed:.2f} times")
    if len(sys.argv) > 1:
        report = {"machine": machine(), "rounds": ROUNDS, "median": found}
        Path(sys.argv[1]).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
