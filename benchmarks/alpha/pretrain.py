"""Train the base: a small transformer that has half learned right answers to all pairs that are not held out.

    python benchmarks/alpha/pretrain.py                  # writes the model into benchmarks/alpha/base

In the first text a pair has a weight of the square root of the number of its right answers, and these answers are
equally frequent. The second text is shorter. In it the prompts with the first operands 3 and 7 have any answers at all,
and only one in 25 stays right. So the base is rarely right on a fifth of the prompts, where coverage up to 256 samples
says something. The script prints Z, the probability that the base gives to right answers, on prompts of each split.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import exact
import language
import torch
from torch.nn.functional import cross_entropy

PROMPT = len("NNN=d")
OUT = Path(__file__).parent / "base"
BATCH, WARMUP = 256, 100
#: The steps and the learning rate of each text.
TEXTS = {"right": (2500, 3e-3), "spoiled": (400, 2e-3)}
SPOILED, KEPT = "37", 0.04  # the spoiled first operands, and the share of their answers that stays right


def encoded(texts: Sequence[str], ids: dict[str, int], width: int) -> torch.Tensor:
    """Return the tokens of texts, with EOS after the end of each."""
    return torch.tensor([[ids[c] for c in text.ljust(width, language.EOS)] for text in texts])


def corpus(ids: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens and the weights of all right answers to pairs that are not held out, with EOS after the end."""
    held_out = {*language.splits()["validation"], *language.splits()["test"]}
    known = {pair: right for pair, right in language.right_answers().items() if pair not in held_out}
    texts = [pair.prompt + answer for pair, right in known.items() for answer in right]
    weights = torch.tensor([len(right) ** -0.5 for right in known.values() for _ in right], dtype=torch.float64)
    return encoded(texts, ids, PROMPT + language.LENGTH), weights


def spoil(
    tokens: torch.Tensor, any_answer: torch.Tensor, digits: list[int], generator: torch.Generator
) -> torch.Tensor:
    """Return a batch in which most prompts with a spoiled first operand have a random one of these answers."""
    places = torch.isin(tokens[:, PROMPT - 1], torch.tensor(digits)) & (
        torch.rand(len(tokens), generator=generator) > KEPT
    )
    tokens = tokens.clone()
    tokens[places, PROMPT:] = any_answer[torch.randint(len(any_answer), (int(places.sum()),), generator=generator)]
    return tokens


def train(scale: float = 1.0, seed: int = 0, model: Any = None, texts: Sequence[str] = tuple(TEXTS)) -> Any:
    """Return the model after all texts.

    Args:
        scale: multiplies the number of steps.
        seed: the seed of the parameters and of the order.
        model: a model that has read the texts before these. Default: a random one.
        texts: the texts to read, which are keys of ``TEXTS``.
    """
    model, ids = language.model(seed=seed) if model is None else model, language.tokenizer().get_vocab()
    tokens, weights = corpus(ids)
    any_answer = encoded(list(language.answers()), ids, language.LENGTH)
    for name in texts:
        steps, rate = math.ceil(TEXTS[name][0] * scale), TEXTS[name][1]
        generator = torch.Generator().manual_seed(seed)
        order = torch.multinomial(weights, steps * BATCH, replacement=True, generator=generator).view(steps, BATCH)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
        for step, places in enumerate(order):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / WARMUP, (steps - step) / steps * 1.05)
            batch = tokens[places]
            if name == "spoiled":
                batch = spoil(batch, any_answer, [ids[c] for c in SPOILED], generator)
            ended = (batch == ids[language.EOS]).cumsum(1)
            scored = (ended == 0) | ((ended == 1) & (batch == ids[language.EOS]))
            scored[:, :PROMPT] = False
            logits = model(input_ids=batch).logits[:, :-1]
            loss = cross_entropy(logits[scored[:, 1:]], batch[:, 1:][scored[:, 1:]])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % 100 == 0:
                print(f"{name}, step {step + 1}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def described(model: Any) -> str:
    """Return how Z is distributed over the prompts of each split, as text."""
    lines = []
    for name, pairs in language.splits().items():
        z = torch.stack(
            [each.exp().sum() for each in exact.log_probs(model, language.tokenizer(), pairs, language.right_answers())]
        )
        low, median, high = z.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=z.dtype)).tolist()
        rare = float(((z > 1e-3) & (z < exact.RARE)).double().mean())
        lines.append(f"{name}: Z {low:.4f} (10%), {median:.3f} (median), {high:.3f} (90%); {rare:.0%} in 1e-3 to .02")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    model = train()
    model.save_pretrained(options.out)
    language.tokenizer().save_pretrained(options.out)
    print(f"{time.perf_counter() - start:.0f} s\n{described(model)}")


if __name__ == "__main__":
    main()
