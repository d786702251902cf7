"""Check the types and the ranges of numbers among the arguments of a run, before anything is made of them."""

from __future__ import annotations

import math
from dataclasses import Field, fields
from inspect import get_annotations
from numbers import Integral, Real
from typing import Any

from transformers import TrainingArguments

_POSITIVE = (
    "max_new_tokens", "max_prompt_length", "temperature", "samples_per_context", "sampling_batch_size", "eval_samples",
    "proposal_interval", "per_device_train_batch_size", "gradient_accumulation_steps",
)  # fmt: skip
_NOT_NEGATIVE = (
    "learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "num_train_epochs", "log_samples",
    "gradient_variance_steps", "proposal_check_samples", "proposal_stderrs", "sampler_ahead", "sampler_max_lag",
)  # fmt: skip
_FINITE = (
    "learning_rate", "weight_decay", "adam_epsilon", "num_train_epochs", "temperature", "proposal_stderrs",
    "warmup_steps",
)  # fmt: skip
_BELOW_ONE = ("adam_beta1", "adam_beta2")
_WORDS = {"int": "an integer", "float": "a number", "bool": "True or False"}
#: ``Settings`` checks these, with messages that say more.
_OF_SETTINGS = ("z_floor", "alpha", "beta", "max_return", "max_redraws")
#: What transformers' Trainer takes as None though its annotation does not say so.
_MAY_BE_NONE = ("max_grad_norm",)


def numbers_of(kind: type[TrainingArguments]) -> dict[str, str]:
    """Return ``int``, ``float`` or ``bool`` for each argument that takes such values, and at most None besides."""
    # Field.type will not do, because HfArgumentParser changes it in place
    annotations = {name: each for base in reversed(kind.__mro__) for name, each in get_annotations(base).items()}
    found = {}
    for name in (argument.name for argument in fields(kind) if argument.init):
        annotation = annotations[name]
        text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
        kinds = {each.strip() for each in text.split("|")} - {"None"}
        if len(kinds) == 1 and kinds <= set(_WORDS):
            found[name] = kinds.pop()
    return found


def check_numbers(args: TrainingArguments) -> None:
    """Check the types of all numbers, and the ranges of those that nothing else checks before lambda is fitted.

    A whole number that came as a float, such as 1e3, becomes an integer where an integer is wanted.

    Raises:
        ValueError: an argument has another type than its annotation says, or is out of range. The message names it.
    """
    kinds = numbers_of(type(args))
    for argument in fields(args):
        if argument.name in kinds and argument.name not in _OF_SETTINGS:
            setattr(args, argument.name, _typed(argument, kinds[argument.name], getattr(args, argument.name)))
    for name in _POSITIVE:
        _refuse(args, name, "positive", lambda value: value > 0)
    for name in _NOT_NEGATIVE:
        _refuse(args, name, "0 or more", lambda value: value >= 0)
    for name in _BELOW_ONE:
        _refuse(args, name, "from 0 to below 1", lambda value: 0 <= value < 1)
    for name in _FINITE:
        _refuse(args, name, "finite", math.isfinite)
    _refuse(args, "seed", "from 0 to 4294967295, which NumPy takes", lambda value: 0 <= value < 2**32)
    of_epochs = "positive, or -1 where num_train_epochs is to count"
    _refuse(args, "max_steps", of_epochs, lambda value: value > 0 or value == -1)


def _typed(argument: Field[Any], kind: str, value: Any) -> Any:
    if value is None and (argument.default is None or argument.name in _MAY_BE_NONE):
        return None
    if kind == "bool":
        right = isinstance(value, bool) or (isinstance(value, Integral) and value in (0, 1))
    elif kind == "int":
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        right = isinstance(value, Integral) and not isinstance(value, bool)
    else:
        right = isinstance(value, Real) and not isinstance(value, bool)
    if not right:
        raise ValueError(f"{argument.name} must be {_WORDS[kind]}, got {value!r}")
    return value


def _refuse(args: TrainingArguments, name: str, words: str, allowed: Any) -> None:
    value = getattr(args, name)
    if value is not None and not allowed(value):
        raise ValueError(f"{name} must be {words}, got {value!r}")
