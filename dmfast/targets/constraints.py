"""Define constraints on sequences by features phi(x): pointwise constraints b(x) and moments E_p[phi] = value.

A feature is a callable on ``Samples`` that gives (N,) fp64. In the constraints of an ``EBM`` a feature stands for a
pointwise constraint, b(x) = phi(x) >= 0. In a ``Moment`` it stands for a distributional one (arXiv:2012.11635,
section 2).
"""

from __future__ import annotations

import functools
import math
import re
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import BuiltinMethodType, MethodType
from typing import Any, Literal

import torch
from torch import Tensor

from ..samples import Samples
from .identity import of_function

_SHOWN = 200  # characters of a sample in an error


class Feature(ABC):
    """A named function phi(x) that gives a number for each sequence.

    If ``binary`` is True, the number is always 0 or 1.
    """

    name: str
    binary: bool

    @abstractmethod
    def __call__(self, samples: Samples) -> Tensor:
        """Return phi(x), (N,) fp64, finite, on the device of ``samples.log_prob``."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return a description of the feature for JSON."""

    def identity(self) -> dict[str, Any]:
        """Return what the feature's values depend on, in plain values that are the same in every process.

        A run is not resumed if they have changed. A feature of your own adds its arguments to what this returns.
        """
        return {"type": type(self).__name__}

    def of_values(self, values: FeatureValues) -> Tensor:
        """Return phi(x) of the samples of these values, (N,) fp64.

        A feature that is made of others overrides this, so that it takes their values from here.
        """
        return self(values.samples)

    def log_b(self, value: Tensor) -> Tensor:
        """Return log b(x) of a pointwise constraint from phi(x). It is NaN where phi(x) is not allowed as b(x)."""
        return value.log()

    @property
    def at_most_one(self) -> bool:
        """Whether b(x) of a pointwise constraint is known to be 1 or less for every sequence."""
        return self.binary

    @property
    def source(self) -> Feature:
        """The feature that computes the values: this one, or the one that it wraps."""
        return self

    @property
    def key(self) -> Hashable:
        """A key that is equal for features whose values are always the same; by default each feature has its own."""
        return id(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


class FeatureValues:
    """The values of features on some samples, which are kept so that each feature runs once.

    Args:
        samples: N sequences.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        # the feature is kept with its values, so that nothing else can come to have its id
        self._values: dict[Hashable, tuple[Feature, Tensor]] = {}

    def __call__(self, feature: Feature) -> Tensor:
        """Return phi(x) of each sequence, (N,) fp64."""
        source = feature.source
        if source.key not in self._values:
            self._values[source.key] = (source, source.of_values(self))
        return self._values[source.key][1]


def show(samples: Samples, row: int) -> str:
    """Return the text of one sample, quoted and cut, for an error."""
    text = samples[row : row + 1].text[0]
    return f"{text[:_SHOWN]!r}{'...' if len(text) > _SHOWN else ''}"


def scored_tokens(samples: Samples) -> list[list[int]]:
    """Return the generated tokens of each sequence, up to and including EOS."""
    rows = zip(samples.tokens.tolist(), samples.score_mask.tolist(), strict=True)
    return [[token for token, scored in zip(*row, strict=True) if scored] for row in rows]


class Contains(Feature):
    """A feature that is 1 if the continuation contains a word, one of several words or a match of a regex, and else 0.

    Prompt and padding never count. Special tokens, EOS among them, are not part of the text. On tokens they are found
    if a word is, or has, one of them.

    Args:
        word: a word or phrase.
        any_of: several words or phrases, one of which is enough.
        regex: a pattern for ``re.search``, which is used unchanged: ``whole_word`` does not act on it.
        on: "text" searches the decoded continuation. "tokens" searches the generated ids for those of the words (as
            the samples' tokenizer writes them at the start of a text and after a space): a word that the model spells
            with other tokens does not count. It can't be used with ``regex``.
        whole_word: whether a word inside a longer word does not count ("she" is not in "shed").
        ignore_case: whether upper and lower case count alike. On tokens the words are searched as given and in lower
            case, UPPER CASE, Capitalised and Title Case.
        name: the name in logs, reports and errors. Default: derived from the words.

    Raises:
        ValueError: not exactly one of word, any_of and regex is given; a word is blank; the regex does not compile, or
            should search tokens. When called: the tokenizer can't write a word without its unknown token.
    """

    binary = True

    def __init__(
        self,
        word: str | None = None,
        *,
        any_of: Sequence[str] | None = None,
        regex: str | None = None,
        on: Literal["text", "tokens"] = "text",
        whole_word: bool = True,
        ignore_case: bool = True,
        name: str | None = None,
    ) -> None:
        given = [key for key, value in (("word", word), ("any_of", any_of), ("regex", regex)) if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"Contains takes exactly one of word, any_of and regex, got {' and '.join(given) or 'none'}"
            )
        if on not in ("text", "tokens"):
            raise ValueError(f'on must be "text" or "tokens", got {on!r}')
        if regex is not None and on == "tokens":
            raise ValueError('a regex has no tokens: use on="text", or word or any_of')
        if isinstance(any_of, str):
            raise TypeError(f"any_of must be a list of strings, got the string {any_of!r}; pass it as word")
        words = [word] if word is not None else list(any_of or [])
        if regex is None and not words:
            raise ValueError("any_of is empty: pass at least one word")
        for each in words:
            if not isinstance(each, str):
                raise TypeError(f"{given[0]} must be made of strings, got {each!r}")
            if not each.strip():
                raise ValueError(f"{given[0]} holds the blank word {each!r}")
        self.words, self.regex, self.on = words, regex, on
        self.whole_word, self.ignore_case = whole_word, ignore_case
        try:
            pattern = regex if regex is not None else "|".join(self._pattern(each) for each in words)
            self._search = re.compile(pattern, re.IGNORECASE if ignore_case else 0).search
        except re.error as error:
            raise ValueError(f"regex {regex!r} does not compile: {error}") from error
        self.name = self._derived_name() if name is None else name

    def _pattern(self, word: str) -> str:
        # \b would never match beside a word such as "C++", so only an edge that is a letter gets a boundary
        before = r"(?<!\w)" if self.whole_word and re.match(r"\w", word) else ""
        after = r"(?!\w)" if self.whole_word and re.search(r"\w\Z", word) else ""
        return before + re.escape(word) + after

    def _derived_name(self) -> str:
        if self.regex is not None:
            return f"matches /{self.regex}/"
        shown = ", ".join(f'"{word}"' for word in self.words[:3])
        more = f" and {len(self.words) - 3} more" if len(self.words) > 3 else ""
        return f"contains {'any of ' if len(self.words) > 1 else ''}{shown}{more}{self._suffix()}"

    def _suffix(self) -> str:
        return " (tokens)" if self.on == "tokens" else ""

    def __call__(self, samples: Samples) -> Tensor:
        """Return 0 or 1 for each sequence, (N,) fp64."""
        if self.on == "text":
            hits = [self._search(text) is not None for text in samples.text]
        else:
            sought = self._token_sequences(samples.tokenizer)
            hits = [self._in_tokens(ids, sought, samples.tokenizer) for ids in scored_tokens(samples)]
        return torch.tensor(hits, dtype=torch.float64, device=samples.log_prob.device)

    def _token_sequences(self, tokenizer: Any) -> list[list[int]]:
        found: list[list[int]] = []
        unknown = getattr(tokenizer, "unk_token_id", None)
        for word in self.words:
            spellings = [word]
            if self.ignore_case:
                spellings += [word.lower(), word.upper(), word.capitalize(), word.title()]
            spellings = [space + spelling for spelling in dict.fromkeys(spellings) for space in ("", " ")]
            written, cause = [], None
            for text in spellings:
                try:
                    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                except Exception as error:  # the tokenizers library knows no narrower class
                    cause = error
                    continue
                if ids and unknown not in ids:
                    written.append(ids)
            if not written:
                raise ValueError(f'{self.name}: the tokenizer has no tokens for {word!r}; use on="text"') from cause
            found += written
        return found

    def _in_tokens(self, ids: list[int], sought: list[list[int]], tokenizer: Any) -> bool:
        around = 3  # tokens on either side, because a letter can be spread over several byte tokens
        for each in sought:
            for start in range(len(ids) - len(each) + 1):
                end = start + len(each)
                if ids[start:end] != each:
                    continue
                window = ids[max(start - around, 0) : end + around]
                if not self.whole_word or self._is_whole(each, window, tokenizer):
                    return True
        return False

    def _is_whole(self, ids: list[int], window: list[int], tokenizer: Any) -> bool:
        """Return whether a word's tokens are not part of a longer word in the text of the tokens around them."""
        word = tokenizer.decode(ids)
        if word == tokenizer.decode(ids, skip_special_tokens=True):
            return self._search(tokenizer.decode(window, skip_special_tokens=True)) is not None
        # text without special tokens can't show one, and some tokenizers put a space beside it
        return re.search(self._pattern(word.strip()), tokenizer.decode(window)) is not None

    def describe(self) -> dict[str, Any]:
        """Return the arguments of the feature and its name."""
        what: dict[str, Any] = {"regex": self.regex} if self.regex is not None else {"any_of": self.words}
        return {"type": "Contains", "name": self.name, **what, "on": self.on, "whole_word": self.whole_word,
                "ignore_case": self.ignore_case}  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """Return the words in alphabetical order, or the regex, and how they are searched."""
        of_words = {"words": sorted(set(self.words)), "whole_word": self.whole_word}
        what = {"regex": None, **of_words} if self.regex is None else {"regex": self.regex}
        return {**super().identity(), **what, "on": self.on, "ignore_case": self.ignore_case}


@dataclass
class ScorerCounts:
    """The counts of what a scorer has done so far.

    Attributes:
        scored: the number of sequences that its function was called for.
        cached: the number of sequences whose value was known already.
        seconds: the time spent in the scorer, including the reading of texts and cache.
    """

    scored: int = 0
    cached: int = 0
    seconds: float = 0.0


class Scorer(Feature):
    """A feature that is made of a function of your own.

    Args:
        fn: the function. With on="text" it takes the continuations, a list of N strings without special tokens; with
            "tokens", N lists of generated token ids, EOS included; and with "samples", the ``Samples``. It returns N
            numbers as a tensor, array or list.
        batched: whether ``fn`` takes a batch. If False, it takes one string, one list of ids or ``Samples`` of one
            sequence, and returns one number.
        batch_size: the number of sequences in a call of a batched ``fn``. Default: all.
        name: the name in logs, reports and errors. Default: the function's.
        binary: whether ``fn`` always gives 0 or 1, which is checked.
        cache: the number of sequences whose values are kept, by their generated tokens; the least recently used are
            dropped first. ``fn`` is not called again for these sequences, so it must depend on nothing but the tokens.
            0 keeps none.

    Attributes:
        counts: a ``ScorerCounts``; the trainer logs what each step adds.

    Raises:
        TypeError, ValueError: fn is not callable, ``on`` is unknown, batch_size is not positive, cache is negative, or
            there is a cache with on="samples", where ``fn`` sees more than the tokens.
        ValueError: when called, ``fn`` does not return N numbers, or returns NaN, an infinity, or with ``binary`` a
            number other than 0 and 1. The message has the scorer's name and the first offending sample.
        RuntimeError: when called, ``fn`` raised an error, which is the cause of this one.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        on: Literal["text", "tokens", "samples"] = "text",
        batched: bool = True,
        batch_size: int | None = None,
        name: str | None = None,
        binary: bool = False,
        cache: int = 0,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"Scorer takes a function, got {fn!r}")
        if on not in ("text", "tokens", "samples"):
            raise ValueError(f'on must be "text", "tokens" or "samples", got {on!r}')
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size!r}")
        if cache < 0 or (cache and on == "samples"):
            raise ValueError(
                f"cache must be 0 or more, got {cache!r}" if cache < 0 else
                'cache goes by the generated tokens, and with on="samples" a function sees more: use "text" or "tokens"'
            )  # fmt: skip
        self.fn, self.on, self.batched, self.batch_size, self.binary = fn, on, batched, batch_size, binary
        self.cache, self.counts = cache, ScorerCounts()
        self._kept: OrderedDict[tuple[int, ...], float] = OrderedDict()
        self._kept_for: Any = None  # the tokenizer whose ids the cache holds
        self.name = _function_name(fn) if name is None else name

    @property
    def key(self) -> Hashable:
        """The function and the way in which it is called, so that a function that is given twice runs once."""
        # rm.score is a new object each time that it is read, so methods are compared by their object and function
        fn = self.fn if isinstance(self.fn, MethodType | BuiltinMethodType) else id(self.fn)
        return (fn, self.on, self.batched, self.batch_size, self.binary)

    def __call__(self, samples: Samples) -> Tensor:
        """Return the function's values, (N,) fp64 and checked."""
        if len(samples) == 0:
            return samples.log_prob.new_empty(0, dtype=torch.float64)
        start = time.perf_counter()
        values = self._with_cache(samples) if self.cache else self._scored(samples)
        self.counts.seconds += time.perf_counter() - start
        return values

    def _with_cache(self, samples: Samples) -> Tensor:
        """Return the values from the cache, and call ``_scored`` once for each sequence that is not in it."""
        if samples.tokenizer is not self._kept_for:
            self._kept.clear()
            self._kept_for = samples.tokenizer
        keys = [tuple(ids) for ids in scored_tokens(samples)]
        new = {key: row for row, key in reversed(list(enumerate(keys))) if key not in self._kept}
        if new:
            rows = torch.tensor(sorted(new.values()), device=samples.tokens.device)
            values = self._scored(samples if len(rows) == len(samples) else samples[rows])
            self._kept.update(zip([keys[row] for row in rows.tolist()], values.tolist(), strict=True))
        self.counts.cached += len(keys) - len(new)
        for key in keys:
            self._kept.move_to_end(key)
        found = [self._kept[key] for key in keys]
        while len(self._kept) > self.cache:
            self._kept.popitem(last=False)
        return torch.tensor(found, dtype=torch.float64, device=samples.log_prob.device)

    def _scored(self, samples: Samples) -> Tensor:
        inputs: Any = samples
        if self.on != "samples":
            inputs = samples.text if self.on == "text" else scored_tokens(samples)
        step = (self.batch_size or len(samples)) if self.batched else 1
        parts = [
            self._score(inputs[start : start + step], samples[start : start + step])
            for start in range(0, len(samples), step)
        ]
        values = torch.cat(parts).to(samples.log_prob.device)
        self._refuse(~values.isfinite(), values, samples, "a finite number")
        if self.binary:
            self._refuse((values != 0) & (values != 1), values, samples, "0 or 1, since binary=True")
        self.counts.scored += len(samples)
        return values

    def _score(self, part: Any, samples: Samples) -> Tensor:
        n = len(samples)
        try:
            result = self.fn(part if self.batched or self.on == "samples" else part[0])
        except Exception as error:
            where = "sample" if n == 1 else f"batch of {n} samples, the first of them"
            raise RuntimeError(
                f"scorer {self.name!r} raised {type(error).__name__}: {error}; {where}: {show(samples, 0)}"
            ) from error
        if not self.batched:
            result = result.reshape(1) if isinstance(result, Tensor) and result.numel() == 1 else [result]
        expected = f"one number for each of {n} samples, shape ({n},)" if self.batched else "one number (batched=False)"
        expected = f"scorer {self.name!r} must return {expected}"
        try:
            # without a dtype, a list of Python numbers would become fp32
            dtype = None if hasattr(result, "dtype") else torch.float64
            values = torch.as_tensor(result, dtype=dtype).detach()
            if values.is_complex():
                raise TypeError("complex numbers")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{expected}, got {type(result).__name__} {str(result)[:_SHOWN]} ({error}); "
                f"first sample: {show(samples, 0)}"
            ) from error
        if values.shape != (n,):
            raise ValueError(f"{expected}, got shape {tuple(values.shape)}; first sample: {show(samples, 0)}")
        return values.to(torch.float64)

    def _refuse(self, bad: Tensor, values: Tensor, samples: Samples, expected: str) -> None:
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"scorer {self.name!r} must return {expected}, got {values[row].item()} for sample {row} "
                f"({int(bad.sum())} such of {len(samples)}): {show(samples, row)}"
            )

    def describe(self) -> dict[str, Any]:
        """Return the scorer's settings and the function's full name."""
        module, inner = getattr(self.fn, "__module__", None), _function_name(self.fn, full=True)
        return {"type": "Scorer", "name": self.name, "function": f"{module}.{inner}" if module else inner,
                "on": self.on, "batched": self.batched, "batch_size": self.batch_size, "binary": self.binary,
                "cache": self.cache}  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """Return the function's module and name, and what it takes."""
        return {**super().identity(), "on": self.on, **of_function(self.fn)}


def _function_name(fn: Any, *, full: bool = False) -> str:
    while isinstance(fn, functools.partial):
        fn = fn.func
    name = getattr(fn, "__qualname__" if full else "__name__", None) or type(fn).__name__
    return "scorer" if name == "<lambda>" else str(name)


class Moment:
    """The distributional constraint E_p[feature] = value, which asks for a mean under the target.

    A binary feature with the value 1 (or 0) is a pointwise constraint, b = phi (or 1 - phi), and an ``EBM`` takes it as
    one, because as a moment it would need an infinite lambda.

    Args:
        feature: a ``Feature``, or a callable on ``Samples``.
        value: the wanted mean of the feature under p, in the feature's units.
        name: the name in logs, reports and errors. Default: the feature's.

    Raises:
        TypeError, ValueError: the feature is not callable; the value is not a finite number, or is outside [0, 1] for a
            binary feature.
    """

    def __init__(self, feature: Feature | Callable[[Samples], Any], value: float, name: str | None = None) -> None:
        self.feature = as_feature(feature, "feature")
        self.name = self.feature.name if name is None else name
        try:
            self.value = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"the moment of {self.name!r} must be a number, got {value!r}") from error
        if not math.isfinite(self.value):
            raise ValueError(f"the moment of {self.name!r} must be finite, got {value!r}")
        if self.feature.binary and not 0 <= self.value <= 1:
            raise ValueError(f"{self.name!r} is 0 or 1, so that its mean is in [0, 1]; got value={value!r}")

    @property
    def pointwise(self) -> bool:
        """Whether the moment is a pointwise constraint, because every sequence must have the same value."""
        return self.feature.binary and self.value in (0.0, 1.0)

    def describe(self) -> dict[str, Any]:
        """Return the name, the value and the feature's description."""
        return {"type": "Moment", "name": self.name, "value": self.value, "feature": self.feature.describe()}

    def __repr__(self) -> str:
        return f"<Moment E[{self.name}] = {self.value:g}>"


def as_feature(feature: Any, argument: str) -> Feature:
    """Return a feature as it is, and any other callable as a ``Scorer``, which checks the values that it returns.

    Raises:
        TypeError: ``feature`` is not callable.
    """
    if isinstance(feature, Feature):
        return feature
    if not callable(feature) or isinstance(feature, type):
        raise TypeError(
            f"{argument} must be Contains, Scorer or a function of Samples, got {feature!r}"
            + ("; for a word write Contains(...)" if isinstance(feature, str) else "")
        )
    return Scorer(feature, on="samples", binary=bool(getattr(feature, "binary", False)))
