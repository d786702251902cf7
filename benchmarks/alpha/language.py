"""The task: reach a number with a first operand that is given, by up to three more operations.

A prompt ``NNN=d`` holds the target, three digits, and the first operand. An answer goes on from there with up to three
times an operator of ``+ - *`` and a digit from 1 to 9, such as ``+3*4``, and EOS, which is scored. It is right if the
whole, read with the usual precedence, has the value of the target. A character is a token. So all answers to a prompt
can be listed, 20,440 of them, and what is right can be counted.
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
LEAST_RIGHT = 6  # right answers that a prompt must have
SPLITS = {"train": 256, "validation": 64, "test": 128}


class Pair(NamedTuple):
    """A target and a first operand."""

    target: int
    first: int

    @property
    def prompt(self) -> str:
        """As the model reads it."""
        return f"{self.target:03d}={self.first}"

    @property
    def row(self) -> dict[str, Any]:
        """As a data set has it."""
        return {"prompt": self.prompt, "target": self.target, "first": self.first}


def answers(operations: int = OPERATIONS, digits: str = DIGITS) -> Iterator[str]:
    """All answers to a prompt, without EOS."""
    for n in range(operations + 1):
        for parts in itertools.product(OPERATORS, digits, repeat=n):
            yield "".join(parts)


def value(first: int, answer: str) -> int:
    """What ``first`` and an answer come to."""
    total, sign, term = 0, 1, first
    for operator, digit in zip(answer[::2], answer[1::2], strict=True):
        if operator == "*":
            term *= int(digit)
        else:
            total, sign, term = total + sign * term, 1 if operator == "+" else -1, int(digit)
    return total + sign * term


def is_answer(text: str) -> bool:
    """Whether a completion has the form of an answer, whatever its value."""
    return (
        len(text) in range(0, LENGTH, 2)
        and all(c in OPERATORS for c in text[::2])
        and all(c in DIGITS for c in text[1::2])
    )


def is_right(texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """The verifier."""
    return [
        is_answer(text) and value(row["first"], text) == row["target"] for text, row in zip(texts, rows, strict=True)
    ]


@cache
def right_answers() -> dict[Pair, list[str]]:
    """The right answers of every pair whose target has three digits at most."""
    found: dict[Pair, list[str]] = defaultdict(list)
    for first in map(int, DIGITS):
        for answer in answers():
            target = value(first, answer)
            if 0 <= target <= LARGEST:
                found[Pair(target, first)].append(answer)
    return dict(found)


@cache
def splits() -> dict[str, list[Pair]]:
    """The pairs of training, validation and test: disjoint, each with enough right answers."""
    able = sorted(pair for pair, right in right_answers().items() if len(right) >= LEAST_RIGHT)
    random.Random(0).shuffle(able)
    rest = iter(able)
    return {name: list(itertools.islice(rest, n)) for name, n in SPLITS.items()}


def tokenizer() -> Any:
    """One token for each character; nothing is put around a text."""
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
    """A transformer of two layers, random."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=len(EOS + "0" + DIGITS + OPERATORS + "="), n_positions=16, n_embd=width, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip
