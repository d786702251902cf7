"""Choose the contexts that an optimiser step samples from: prompts of a data set, or the one empty context.

A step of B sequences takes B / n contexts and draws n sequences from each. Transformers' Trainer counts microbatches,
so the loader gives microbatches of rows in which the row of each context comes n times in succession.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..batch import Prompts
from ..models import LanguageModel
from ..targets import pass_rates

# words in the names of columns that a multimodal model would read beside the prompt, and words for the place of such
# data; digits are not part of a word, so that base64 is "base"
_MEDIA = {"image", "images", "pixel", "pixels", "video", "videos", "audio", "audios"}
_PLACES = {
    "url", "urls", "uri", "uris", "path", "paths", "file", "files", "filename", "filenames", "filepath", "data",
    "bytes", "base",
}  # fmt: skip


def holds_media(column: object, value: Any) -> bool:
    """Return whether a column holds images, video or sound, or the inputs that a processor makes of them.

    A name that says nothing else, such as ``images``, or that says where they lie, such as ``image_url``, is enough.
    For another name with such a word the value decides: a string, several strings, a number or None only describes an
    image (``image_caption``, ``num_images``), and anything else belongs to its data (``image_grid_thw``,
    ``pixel_attention_mask``).
    """
    words = {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", str(column))}
    if {"input", "features"} <= words:  # a processor of sound names its inputs so
        return True
    if not words & _MEDIA:
        return False
    if words <= _MEDIA | _PLACES:
        return True
    several = isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)
    return not (value is None or several or isinstance(value, (str, Real)))


def has_columns(first: Any, argument: str) -> bool:
    """Return whether the rows of a data set are mappings, which scorers see, and not prompts alone.

    Raises:
        ValueError: a column of the first row holds images, video or sound.
    """
    if not isinstance(first, Mapping):
        return False
    seen = [name for name, value in first.items() if holds_media(name, value)]
    if seen:
        raise ValueError(
            f"{argument} has the column {seen[0]!r}, which no model would see: dmfast supports text only, without "
            "images, video or sound. Drop the column, or rename it where only a scorer is to see it"
        )
    return True


def prompt_of(row: Any, index: int, argument: str) -> Any:
    """Return the prompt of a row.

    Raises:
        ValueError: the row has no prompt, or a prompt of another type than a string or a list.
    """
    fault = fault_of_row(row)
    if fault is not None:
        raise ValueError(f"row {index} of {argument} {fault}")
    return row["prompt"] if isinstance(row, Mapping) else row


def fault_of_row(row: Any) -> str | None:
    """Return what is wrong with a row as the end of a sentence about it, or None if it has a prompt."""
    if isinstance(row, Mapping) and "prompt" not in row:
        return f"has no column 'prompt', only {', '.join(map(str, row))}"
    prompt = row["prompt"] if isinstance(row, Mapping) else row
    if isinstance(prompt, (str, list)):
        return None
    return f"has a prompt of type {type(prompt).__name__}, and it must be a string or a list of chat messages"


def _too_long_hint(error: Exception, max_prompt_length: int | None) -> str:
    if max_prompt_length is not None or "beyond the model's context" not in str(error):
        return ""
    return "; DMConfig.max_prompt_length leaves out prompts of more tokens"


class Contexts(Dataset[Any]):
    """A data set of prompts that gives each as (row, prompt).

    A prompt is a string, a list of chat messages or a list of token ids.

    Args:
        rows: a sequence of prompts, or of rows with a column ``prompt``, such as a ``datasets.Dataset``. None is the
            one empty context, as ``[""]`` is.
        argument: the name of the argument that brought the rows, for errors.

    Raises:
        TypeError: the rows have no length, such as an ``IterableDataset``, or are several data sets, such as a
            ``DatasetDict``.
        ValueError: there are no rows, a row has no prompt, or the first row has a column of images, video or sound
            (``holds_media``).
    """

    def __init__(self, rows: Any = None, argument: str = "train_dataset") -> None:
        self.argument = argument
        if rows is None:
            rows, self.argument = [""], "the empty context"
        if isinstance(rows, (str, Mapping)) or not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise TypeError(
                f"{argument} must have a length and be indexable (a list of prompts, a datasets.Dataset with the "
                "column 'prompt'; of a DatasetDict one split), or be None for the empty context; got "
                f"{type(rows).__name__}"
            )
        if len(rows) == 0:
            raise ValueError(f"{argument} is empty; pass None for the empty context")
        whole = rows
        if hasattr(rows, "select_columns"):  # a datasets.Dataset, whose rows are read from disk with all their columns
            if "prompt" not in rows.column_names:
                raise ValueError(f"{argument} has no column 'prompt', only {', '.join(rows.column_names)}")
            whole = rows.with_format(None)
            rows = whole.select_columns("prompt")
        self.rows, self._whole = rows, whole
        self._kept: Sequence[int] = range(len(rows))
        self[0]  # this refuses rows without a prompt now rather than in the middle of a run
        self.has_columns = has_columns(whole[0], argument)

    @cached_property
    def digest(self) -> str:
        """A hash of all prompts, which tells data sets apart."""
        found = hashlib.blake2b(digest_size=16)
        for row in self:
            found.update(repr(row).encode())
        return found.hexdigest()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, place: int) -> tuple[int, Any]:
        """Return the number of a row in the data set, and its prompt; ``place`` counts the rows that are kept."""
        index = self._kept[place]
        return index, prompt_of(self.rows[index], index, self.argument)

    def rows_of(self, indices: Sequence[int]) -> list[Mapping[str, Any]] | None:
        """Return the whole rows, which scorers see, or None if the data set is a list of prompts."""
        if not self.has_columns:
            return None
        found = (self._whole[index] for index in indices)
        return [dict(row) if isinstance(row, Mapping) else {"prompt": row} for row in found]

    def whole(self, contexts: Sequence[tuple[Any, ...]]) -> list[Mapping[str, Any]] | None:
        """Return the whole rows of contexts that iteration gave, as ``rows_of`` does."""
        return self.rows_of([index for index, _ in contexts])

    def some(self, seed: int, n: int, without: Collection[int] = ()) -> Prompts:
        """Return up to n prompts at random, of rows that are not in ``without``."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        free = (context for context in map(self.__getitem__, order) if context[0] not in without)
        contexts = list(itertools.islice(free, n))
        return Prompts([prompt for _, prompt in contexts], [row for row, _ in contexts], self.whole(contexts))

    def check_pass_rates(self) -> None:
        """Check that each row has the columns that ``EBM.fit_z`` makes.

        Raises:
            ValueError: as ``pass_rates.read``.
        """
        whole, names = self._whole, [pass_rates.RATE, pass_rates.DRAWN]
        if hasattr(whole, "select_columns"):
            whole = whole.select(self._kept)
            if set(names) <= set(whole.column_names):
                whole = whole.select_columns(names)
            pass_rates.read(whole, self.argument)
        else:
            pass_rates.read(self.rows_of(self._kept), self.argument)

    def check(
        self, policy: LanguageModel, max_new_tokens: int, max_prompt_length: int | None = None, *, warn: bool = True
    ) -> None:
        """Leave out the prompts that are too long, and check that all others can be sampled from.

        Args:
            policy: the model that will sample.
            max_new_tokens: as in ``LanguageModel.sample``.
            max_prompt_length: the most tokens of a prompt. None keeps all prompts.
            warn: whether to warn of the number of prompts that are left out.

        Raises:
            TypeError, ValueError: as ``LanguageModel.check_prompts``, with the name of the argument.
            ValueError: no prompt is left.
        """
        prompts = [prompt for _, prompt in self]
        try:
            lengths = policy.check_prompts(prompts, max_new_tokens, max_prompt_length)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.argument}: {error}{_too_long_hint(error, max_prompt_length)}") from error
        if max_prompt_length is None:
            return
        kept = [row for row, length in zip(self._kept, lengths, strict=True) if length <= max_prompt_length]
        if not kept:
            raise ValueError(
                f"{self.argument} has no prompt of at most max_prompt_length={max_prompt_length} tokens: its "
                f"{len(self)} prompts have from {min(lengths)} to {max(lengths)}"
            )
        if warn and len(kept) < len(self):
            warnings.warn(
                f"{self.argument}: {len(self) - len(kept)} of {len(self)} prompts have more than max_prompt_length="
                f"{max_prompt_length} tokens and are left out; the longest has {max(lengths)}",
                stacklevel=3,
            )
        self._kept = kept
        self.__dict__.pop("digest", None)


def eval_contexts(dataset: Any) -> Contexts | dict[str, Contexts]:
    """Return the prompts to evaluate on; of several eval sets, a dictionary of the prompts of each by name.

    Raises:
        TypeError, ValueError: as ``Contexts``; the dictionary is empty.
    """
    if not isinstance(dataset, Mapping):
        return Contexts(dataset, "eval_dataset")
    if not dataset:
        raise ValueError("eval_dataset is an empty dictionary; pass None to evaluate on the prompts of train_dataset")
    return {name: Contexts(rows, f"eval_dataset[{name!r}]") for name, rows in dataset.items()}


def listed(contexts: Contexts | dict[str, Contexts] | None) -> list[Contexts]:
    """Return the prompts to evaluate on as a list of sets, whether there are several sets, one or none."""
    if contexts is None:
        return []
    return list(contexts.values()) if isinstance(contexts, dict) else [contexts]


def check_divides(n: int, per_device: int, accumulation: int) -> int:
    """Return the number of sequences of a step on a rank, n of each context.

    Raises:
        ValueError: the number is not a multiple of n.
    """
    local = per_device * accumulation
    if local % n:
        divisors = [k for k in range(1, local + 1) if local % k == 0]
        near = [*[k for k in divisors if k < n][-1:], *[k for k in divisors if k > n][:1]]
        raise ValueError(
            f"samples_per_context = {n} must divide the sequences that a process takes in an optimiser step, "
            f"per_device_train_batch_size * gradient_accumulation_steps = {per_device} * {accumulation} = {local}: "
            f"take {' or '.join(map(str, near))}"
        )
    return local


def _that_fit(contexts: int, n: int, local: int, world: int) -> str:
    """Return the numbers with which a step takes no more contexts than there are, each in the place of another.

    Args:
        contexts: the number of rows of the data set.
        n: the number of sequences of each context, which gives a step too many contexts.
        local: the number of sequences of a step on each rank.
        world: the number of ranks.
    """
    more = [k for k in range(n, local + 1) if local % k == 0 and local // k * world <= contexts]
    found = [f"samples_per_context = {k}" for k in more[:1]]
    if contexts >= world:
        found.append(f"per_device_train_batch_size * gradient_accumulation_steps = {n * (contexts // world)}")
    if world > 1 and local // n <= contexts:
        found.append(f"--num_processes {contexts // (local // n)}")
    return ", or ".join(found) or f"--num_processes {contexts} and samples_per_context = {local}"


class StepSampler(Sampler[list[int]]):
    """A sampler that gives microbatches of row indices for one rank.

    Each context of an optimiser step comes ``n`` times in succession, and the rows are cut into microbatches in order.

    Args:
        contexts: the number of rows of the data set.
        n: sequences per context.
        per_device, accumulation: the sequences in a microbatch and the microbatches in an optimiser step.
        rank, world: which of how many ranks this process is. Each takes its share of every step.
        steps: optimiser steps in an epoch. None takes as many as the data set fills. With several ranks the last step
            is filled up from the start of the epoch, so that all ranks have the same number of microbatches.
        shuffle, seed: these give a permutation per epoch, which depends on nothing else.
        repeats: how often each step comes in succession. Above 1, the last step is filled up even with one rank.

    Raises:
        ValueError: the step's sequences on a rank are not a multiple of n; a step takes more contexts than there are.
    """

    def __init__(
        self, contexts: int, n: int, *, per_device: int, accumulation: int, rank: int = 0, world: int = 1,
        steps: int | None = None, shuffle: bool = True, seed: int = 0, repeats: int = 1,
    ) -> None:  # fmt: skip
        local = check_divides(n, per_device, accumulation)
        self.contexts, self.n, self.per_device, self.accumulation = contexts, n, per_device, accumulation
        self.rank, self.world, self.shuffle, self.seed, self.epoch = rank, world, shuffle, seed, 0
        self.per_rank, self.repeats = local // n, repeats  # per_rank counts the contexts of a step
        if steps is None and self.per_rank * world > contexts:
            raise ValueError(
                f"an optimiser step takes {self.per_rank * world} contexts of {n} sequences, and the data set has "
                f"{contexts}: take {_that_fit(contexts, n, local, world)}"
            )
        self.steps = math.ceil(contexts / (self.per_rank * world)) if steps is None else steps
        self.endless = steps is not None

    def set_epoch(self, epoch: int) -> None:
        """Take the permutation of this epoch."""
        self.epoch = epoch

    def contexts_of_step(self, step: int) -> list[int]:
        """Return the rows of this rank's contexts in one optimiser step of a run, each once, without ``repeats``."""
        epoch, place = divmod(step, self.steps)
        return self._step(self._order(epoch), place)[:: self.n]

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.contexts))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.contexts, generator=generator).tolist()

    def _step(self, order: list[int], step: int) -> list[int]:
        """Return the rows of this rank's sequences in one step."""
        first = step * self.per_rank * self.world
        last = first + self.per_rank * self.world
        if not self.endless and self.repeats == 1 and last > len(order):
            last = first + self.world * math.ceil((len(order) - first) / self.world)
        mine = (last - first) // self.world
        first += self.rank * mine
        return [order[i % len(order)] for i in range(first, first + mine) for _ in range(self.n)]

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order(self.epoch)
        for step in range(self.steps):
            rows = self._step(order, step)
            for start in list(range(0, len(rows), self.per_device)) * self.repeats:
                yield rows[start : start + self.per_device]

    def __len__(self) -> int:
        last = len(self._step(list(range(self.contexts)), self.steps - 1))
        return self.repeats * ((self.steps - 1) * self.accumulation + math.ceil(last / self.per_device))


class ContextLoader(DataLoader[Any]):
    """A loader of microbatches as lists of (row, prompt).

    accelerate must not shard this loader, because the sampler has done so.
    """

    def __init__(self, contexts: Contexts, sampler: StepSampler) -> None:
        super().__init__(contexts, batch_sampler=sampler, collate_fn=list)
        self.step_sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch to the sampler. transformers' Trainer calls this at the start of an epoch."""
        self.step_sampler.set_epoch(epoch)


def contexts_of(batches: Sequence[Sequence[tuple[Any, ...]]], n: int) -> list[tuple[Any, ...]]:
    """Return the contexts of a step, each once, from its microbatches."""
    return [row for batch in batches for row in batch][::n]
