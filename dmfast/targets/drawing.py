"""Draw many samples in parts, within a memory budget and with a line of progress."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..models import LanguageModel
from ..samples import Prompt, Samples
from ..tensor_parallel import from_first

PART = 1024  # samples between two lines of progress, and between two checks of the standard errors
BUDGET = 4 << 30  # bytes for a batch's keys, values and logits


def batch_within(
    model: LanguageModel, prompts: Sequence[Prompt] | None, max_new_tokens: int, budget: int = BUDGET
) -> int:
    """Return how many sequences to draw at a time, 256 at most, for a cache and logits of about ``budget`` bytes.

    The cache counts three times, because each step of sampling makes a longer copy of it.
    """
    config: Any = getattr(getattr(model, "model", None), "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    width = getattr(config, "hidden_size", None)
    if not (layers and heads and width):
        return 256
    of_head = getattr(config, "head_dim", None) or width // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    # a text rarely has more tokens than characters
    longest = max((_length(each) for each in prompts or [""]), default=0)
    size = next(iter(model.model.parameters())).element_size()
    cache = 2 * layers * kept * of_head * size * (longest + max_new_tokens)
    fitting: int = budget // (3 * cache + 32 * model.vocab_size)
    return max(1, min(256, fitting))


def _length(prompt: Prompt) -> int:
    """Return the number of characters of a text or of the messages of a chat, or the number of token ids."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(str(part)) if isinstance(part, Mapping) else 1 for part in prompt)


def drawn_in_parts(
    model: LanguageModel, contexts: Sequence[Prompt] | None, n: int, *, max_new_tokens: int, temperature: float,
    seed: int | None, batch_size: int, progress: bool | None = None, what: str = "lambda", in_rounds: bool = False,
    whose: str = "the base",
) -> Iterator[Samples]:  # fmt: skip
    """Yield n samples of each context in parts of about ``PART`` samples.

    With one context, the parts together are the samples that one call of ``sample`` draws. With several contexts a part
    is some of the contexts with all of their samples, and the same holds. With ``in_rounds`` a part is all of the
    contexts with some of their samples, so that a caller may stop after any part. Those are other samples.

    Args:
        model, contexts, n, max_new_tokens, temperature, batch_size: as in ``LanguageModel.sample``.
        seed: as in ``LanguageModel.sample``. A base of another class that gets no seed draws all samples at once.
        progress: whether a line on stderr says how many are drawn. Default: only if stderr is a terminal.
        what: the purpose of the samples, with which that line begins.
        in_rounds: whether each part has samples of all contexts.
        whose: the model that draws, for that line.
    """
    if seed is None and isinstance(model, LanguageModel):  # one seed for all parts, so that none repeats another
        seed = from_first(model.model, int(torch.randint(2**63 - 1, ())))
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed,
                           "batch_size": batch_size}  # fmt: skip
    several = 1 if contexts is None else len(contexts)
    if seed is None or several * n <= PART:
        yield model.sample(contexts, n, **how)
        return
    shown = sys.stderr.isatty() if progress is None else progress
    done = 0
    if several == 1 or in_rounds:
        each = math.ceil(math.ceil(PART / batch_size) * batch_size / several)
        parts: Iterator[Samples] = (
            model.sample(contexts, min(each, n - first), first_row=first * several, **how)
            for first in range(0, n, each)
        )
    else:
        some, prompts = max(1, PART // n), contexts or []
        parts = (
            _moved(model.sample(prompts[first : first + some], n, first_row=first * n, **how), first)
            for first in range(0, several, some)
        )
    try:
        for part in parts:
            done += len(part)
            if shown:
                total = f"{several * n:,} samples of {whose}"
                print(f"\r{what}: {done:,} of {total}", end="", file=sys.stderr, flush=True)
            yield part
    finally:
        if shown:
            print(file=sys.stderr)


def _moved(samples: Samples, first: int) -> Samples:
    return replace(samples, context_id=samples.context_id + first)
