"""Define the task: reach a number from a given first operand by up to three more operations.

A prompt ``NNN=d`` holds the target, which has three digits, and the first operand. An answer goes on with an operator
of ``+ - *`` and a digit from 1 to 9, up to three times, such as ``+3*4``. It ends with EOS, which is scored. It is
right if the whole expression, read with the usual precedence, has the value of the target. A character is a token. So
all 20,440 answers to a prompt can be listed, and the right ones can be counted.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

EOS = "$"
OPERATORS, DIGITS, OPERATIONS = "+-*", "123456789", 3
LENGTH = 2 * OPERATIONS + 1  # tokens of the longest answer, with EOS
LARGEST = 999
LEAST_RIGHT = 6  # the least number of right answers of a prompt
SPLITS = {"train": 256, "validation": 64, "test": 128}


class Pair(NamedTuple):
    """A target and a first operand."""

    target: int
    first: int

    @property
    def prompt(self) -> str:
        """The prompt as the model reads it."""
        return f"{self.target:03d}={self.first}"

    @property
    def row(self) -> dict[str, Any]:
        """The row of a data set."""
        return {"prompt": self.prompt, "target": self.target, "first": self.first}


def answers(operations: int = OPERATIONS, digits: str = DIGITS) -> Iterator[str]:
    """Yield all answers to a prompt, without EOS."""
    for n in range(operations + 1):
        for parts in itertools.product(OPERATORS, digits, repeat=n):
            yield "".join(parts)


def value(first: int, answer: str) -> int:
    """Return the value of the expression that ``first`` and an answer make together."""
    total, sign, term = 0, 1, first
    for operator, digit in zip(answer[::2], answer[1::2], strict=True):
        if operator == "*":
            term *= int(digit)
        else:
            total, sign, term = total + sign * term, 1 if operator == "+" else -1, int(digit)
    return total + sign * term


def is_answer(text: str) -> bool:
    """Return whether a completion has the form of an answer, whatever its value."""
    return (
        len(text) in range(0, LENGTH, 2)
        and all(c in OPERATORS for c in text[::2])
        and all(c in DIGITS for c in text[1::2])
    )


def is_right(texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Return for each completion whether it is right. This is the verifier of the task."""
    return [
        is_answer(text) and value(row["first"], text) == row["target"] for text, row in zip(texts, rows, strict=True)
    ]


@cache
def right_answers() -> dict[Pair, list[str]]:
    """Return the right answers of every pair whose target has at most three digits."""
    found: dict[Pair, list[str]] = defaultdict(list)
    for first in map(int, DIGITS):
        for answer in answers():
            target = value(first, answer)
            if 0 <= target <= LARGEST:
                found[Pair(target, first)].append(answer)
    return dict(found)


@cache
def splits() -> dict[str, list[Pair]]:
    """Return the pairs of training, validation and test. They are disjoint, and each has enough right answers."""
    able = sorted(pair for pair, right in right_answers().items() if len(right) >= LEAST_RIGHT)
    random.Random(0).shuffle(able)
    rest = iter(able)
    return {name: list(itertools.islice(rest, n)) for name, n in SPLITS.items()}


def tokenizer() -> Any:
    """Return a tokenizer with one token for each character, which puts nothing around a text."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(EOS + "0" + DIGITS + OPERATORS + "=")}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=EOS))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    from tokenizers import decoders

    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, pad_token=EOS, bos_token=EOS, clean_up_tokenization_spaces=False
    )


def model(width: int = 64, seed: int = 0) -> Any:
    """Return a transformer of two layers with random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=len(EOS + "0" + DIGITS + OPERATORS + "="), n_positions=16, n_embd=width, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip
