"""Compare transformers' continuous batching with dmfast's own loop over tokens.

Both draw from the bundled model, in alternation and at temperature 1, with the log-probability of each token. The
medians of tokens a second are reported, and how far the log q of continuous batching is from a forward of the model.
With a file name, they are written as JSON. It needs a transformers whose ``ContinuousBatchingConfig`` has
``return_logprobs``.

    python benchmarks/continuous_batching.py [results/continuous_batching.json]
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import dmfast
from dmfast.training.report import machine

SHAPES, NEW, ROUNDS = (64, 256), 48, 5


def by_batching(policy: dmfast.LanguageModel, ids: list[int], n: int) -> tuple[list[list[int]], list[float]]:
    """Return the tokens and log q of n sequences that ``generate_batch`` draws."""
    model: Any = policy.model
    drawn = model.generate_batch(
        [ids] * n,
        generation_config=GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=NEW,
            eos_token_id=policy.eos_token_ids, pad_token_id=policy.pad_token_id,
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            return_logprobs=True, num_blocks=512, max_batch_tokens=512
        ),
        warmup=False,
    ).values()  # fmt: skip
    return [list(each.generated_tokens) for each in drawn], [math.fsum(each.logprobs) for each in drawn]


def main() -> None:
    """Print and write the medians."""
    torch.set_num_threads(1)
    policy = dmfast.LanguageModel.from_pretrained("tiny-bios")
    policy.sample(n=2, max_new_tokens=4, seed=0)  # the first call also checks the model's scores
    ids = [int(policy.tokenizer.bos_token_id)]
    found, error = {}, 0.0
    for n in SHAPES:
        speeds: dict[str, list[float]] = {"loop": [], "continuous batching": []}
        for i in range(ROUNDS + 1):
            start = time.perf_counter()
            x = policy.sample([ids], n, max_new_tokens=NEW, seed=i)
            own = int(x.score_mask.sum()) / (time.perf_counter() - start)
            start = time.perf_counter()
            tokens, log_q = by_batching(policy, ids, n)
            theirs = sum(map(len, tokens)) / (time.perf_counter() - start)
            if i:
                speeds["loop"].append(own)
                speeds["continuous batching"].append(theirs)
        drawn = policy.samples_of([ids] * n, tokens, append_eos=False, log_prob=log_q)
        with torch.no_grad():
            error = max(error, float((policy.log_prob(drawn) - drawn.log_prob).abs().max()))
        medians = {name: statistics.median(each) for name, each in speeds.items()}
        ratio = medians["loop"] / medians["continuous batching"]
        found[f"{n} sequences"] = {name: round(each, 1) for name, each in medians.items()} | {"ratio": round(ratio, 1)}
        print(f"{n} sequences: {found[f'{n} sequences']}", flush=True)
    print(f"log q of continuous batching differs from the model's by {error:.1e} nats")
    if len(sys.argv) > 1:
        shape = {"prompt": 1, "new tokens": f"up to {NEW}", "rounds": ROUNDS, "unit": "tokens a second, median",
                 "model": "tiny-bios, fp32", "threads": 1, "transformers": transformers.__version__,
                 "load of the machine, which other jobs shared": round(os.getloadavg()[0], 1)}  # fmt: skip
        result = {"machine": machine(), "shape": shape, **found, "log q differs by, nats": error}
        Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
