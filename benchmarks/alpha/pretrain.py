"""The base: a small transformer that has read right answers to all pairs but those held out, and half learned them.

    python benchmarks/alpha/pretrain.py                  # into benchmarks/results/alpha/base, a few minutes on one core
    python benchmarks/alpha/pretrain.py --steps 60 --out build/alpha_quick/base

A pair comes with the square root of the number of its right answers, and each of these alike. Prints how much of its
probability is right, Z, on prompts of each split.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import exact
import language
import torch
from torch.nn.functional import cross_entropy

OUT = Path(__file__).parents[1] / "results" / "alpha" / "base"
STEPS, BATCH, LEARNING_RATE, WARMUP = 3000, 256, 3e-3, 100


def corpus(ids: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, labels and weights of all right answers to pairs that are not held out."""
    held_out = {*language.splits()["validation"], *language.splits()["test"]}
    known = {pair: right for pair, right in language.right_answers().items() if pair not in held_out}
    rows = [[ids[c] for c in pair.prompt + answer + language.EOS] for pair, right in known.items() for answer in right]
    prompt, width = 5, max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    labels = torch.tensor([[-100] * prompt + row[prompt:] + [-100] * (width - len(row)) for row in rows])
    weights = torch.tensor([len(right) ** -0.5 for right in known.values() for _ in right], dtype=torch.float64)
    return tokens, labels, weights


def train(steps: int, seed: int = 0) -> Any:
    """Return the model after so many steps."""
    model, tokenizer = language.model(seed=seed), language.tokenizer()
    tokens, labels, weights = corpus(tokenizer.get_vocab())
    order = torch.multinomial(
        weights, steps * BATCH, replacement=True, generator=torch.Generator().manual_seed(seed)
    ).view(steps, BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    for step, places in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP, (steps - step) / steps * 1.05)
        logits = model(input_ids=tokens[places]).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[places][:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def described(model: Any) -> str:
    """Return how Z is distributed over the prompts of each split, as text."""
    lines = []
    for name, pairs in language.splits().items():
        z = torch.stack(
            [each.exp().sum() for each in exact.log_probs(model, language.tokenizer(), pairs, language.right_answers())]
        )
        low, median, high = z.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        rare = float(((z > 1e-3) & (z < exact.RARE)).double().mean())
        lines.append(f"{name}: Z {low:.4f} (10%), {median:.3f} (median), {high:.3f} (90%); {rare:.0%} in 1e-3 to .02")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    model = train(options.steps)
    model.save_pretrained(options.out)
    language.tokenizer().save_pretrained(options.out)
    print(f"{options.steps} steps, {time.perf_counter() - start:.0f} s\n{described(model)}")


if __name__ == "__main__":
    main()
