"""Take the contexts of the steps from a data set without a length, row after row, pass after pass.

Every rank reads all rows and takes its share of each step. To resume, transformers reads a stream again from its start.
These steps do the same, and a digest of the rows tells whether they are the same rows.
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from ..models import LanguageModel
from .data import check_divides, has_columns, prompt_of

_PEEKED = 16  # the number of first rows by which the ranks compare their streams

#: The identity of a context over the run, its prompt, and the whole row if it has more columns.
Context = tuple[int, Any, Mapping[str, Any] | None]


def is_stream(rows: Any) -> bool:
    """Return whether rows can only be iterated over."""
    if isinstance(rows, (str, Mapping)) or not hasattr(rows, "__iter__"):
        return False
    return isinstance(rows, IterableDataset) or not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__"))


class Stream:
    """A data set that is iterated over: a ``datasets.IterableDataset``, or one of torch.

    A context is known by its row, so that the same row in a later pass has the same Z. If a row comes twice in a step,
    the second is a context of its own.

    Args:
        rows: an iterable of prompts, or of rows with a column ``prompt``. It must give the same ones when it is
            iterated over again. After each pass its ``set_epoch`` is called, if it has one.
        argument: the name of the argument that brought the rows, for errors.

    Attributes:
        first: the first prompts, without those that are too long.
        read: the number of rows that were read for the steps so far, and a digest of these rows.
        too_long: the number of prompts that were left out so far.

    Raises:
        TypeError: the rows can be iterated over only once, as those of a generator.
        ValueError: there are no rows; the first row has no prompt, or a column of images, video or sound.
    """

    def __init__(self, rows: Any, argument: str = "train_dataset") -> None:
        rows = rows.with_format(None) if hasattr(rows, "with_format") else rows
        if iter(rows) is rows:
            raise TypeError(
                f"{argument} can be iterated over only once ({type(rows).__name__}), and a resumed run, or a second "
                "pass, reads it again: give a list, a datasets.IterableDataset.from_generator(...), or a torch "
                "IterableDataset"
            )
        self.argument, self._rows = argument, rows
        self._start()
        peeked = list(itertools.islice(iter(rows), _PEEKED))
        if not peeked:
            raise ValueError(f"{argument} is empty; pass None for the empty context")
        self.first = [prompt_of(row, i, argument) for i, row in enumerate(peeked)]
        self.has_columns = has_columns(peeked[0], argument)
        self._warned = False
        self.read, self.too_long = (0, ""), 0
        self._expected: tuple[int, str] | None = None
        self._policy: LanguageModel | None = None

    @property
    def digest(self) -> str:
        """A hash of the first prompts, by which the ranks compare their data."""
        return hashlib.blake2b(repr(self.first).encode(), digest_size=16).hexdigest()

    def check(self, policy: LanguageModel, max_new_tokens: int, max_prompt_length: int | None = None) -> None:
        """Check the first prompts now, and each later one when it is read, and leave out those that are too long.

        Args:
            policy, max_new_tokens, max_prompt_length: as in ``Contexts.check``.

        Raises:
            TypeError, ValueError: as ``LanguageModel.check_prompts``, with the name of the argument.
        """
        self._policy, self._max_new_tokens, self._longest = policy, max_new_tokens, max_prompt_length
        self.first = [prompt for i, prompt in enumerate(self.first) if self._fits(prompt, i)]

    def whole(self, contexts: Sequence[Context]) -> list[Mapping[str, Any]] | None:
        """Return the whole rows, which scorers see, or None if the stream gives prompts alone."""
        return [row or {} for _, _, row in contexts] if self.has_columns else None

    def expect(self, read: tuple[int, str] | None) -> None:
        """Make the next iteration check the rows of a checkpoint.

        It raises as soon as it has read that many rows and they do not have that digest.
        """
        self._expected = None if read is None else (int(read[0]), str(read[1]))

    def steps(self, contexts: int) -> Iterator[list[Context]]:
        """Yield the contexts of each step, of all ranks, without end.

        Args:
            contexts: the number of contexts in a step, on all ranks together.

        Raises:
            ValueError: all prompts of a whole pass are too long; a prompt can't be sampled from; or the rows are not
                those that were read before.
        """
        self.read, self.too_long = (0, ""), 0
        self._start()
        rows = self._passes()
        while True:
            taken: list[Context] = []
            times: Counter[str] = Counter()
            for prompt, row, written in itertools.islice(rows, contexts):
                taken.append((_identity(written, times[written]), prompt, row))
                times[written] += 1
            yield taken

    def _start(self) -> None:
        if hasattr(self._rows, "set_epoch"):
            self._rows.set_epoch(0)

    def _passes(self) -> Iterator[tuple[Any, Mapping[str, Any] | None, str]]:
        """Yield the prompt, the row and the row as text of all rows that fit, pass after pass.

        The rows that are left out count as read, too. So another number of prompts in a step, or another
        ``max_prompt_length``, does not make the same rows look like others.
        """
        seen = hashlib.blake2b(digest_size=16)
        for number in itertools.count():
            if number and hasattr(self._rows, "set_epoch"):
                self._rows.set_epoch(number)
            kept = -1
            for index, row in enumerate(self._rows):
                prompt = prompt_of(row, index, self.argument)
                columns = dict(row) if self.has_columns and isinstance(row, Mapping) else None
                written = _written(prompt if columns is None or len(columns) == 1 else columns)
                seen.update(written.encode())
                self.read = self.read[0] + 1, seen.hexdigest()
                self._compare()
                if self._fits(prompt, index):
                    kept = index
                    yield prompt, columns, written
                elif number == 0:
                    self.too_long += 1
            if kept < 0:
                raise ValueError(
                    f"{self.argument} gave no prompt of at most max_prompt_length={self._longest} tokens in a pass"
                    if self.too_long
                    else f"{self.argument} gave no rows in pass {number + 1}"
                )

    def _compare(self) -> None:
        if self._expected is not None and self.read[0] == self._expected[0] and self.read != self._expected:
            raise ValueError(
                f"{self.argument} gives other rows than it gave the run of the checkpoint among its first "
                f"{self.read[0]}, so that the run would not go on where it was: let it give the same rows each time (a "
                "shuffle with a seed), or set ignore_data_skip=True, with which it begins anew"
            )

    def _fits(self, prompt: Any, index: int) -> bool:
        if self._policy is None:
            return True
        try:
            (length,) = self._policy.check_prompts([prompt], self._max_new_tokens, self._longest)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.argument}, row {index}: {error}") from error
        if self._longest is None or length <= self._longest:
            return True
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.argument}: row {index} has a prompt of {length} tokens, more than max_prompt_length="
                f"{self._longest}, and is left out, as all others will be; their number is logged as n_too_long",
                stacklevel=2,
            )
        return False


def _written(row: Any) -> str:
    """Return a row as text that tells it from others. The repr of a long array would leave out its middle."""
    if not isinstance(row, Mapping):
        return repr(row)
    whole = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}
    return repr(sorted((str(name), repr(value)) for name, value in whole.items()))


def _identity(written: str, times: int) -> int:
    digest = hashlib.blake2b(f"{times} {written}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


class _Microbatches(IterableDataset[Any]):
    """The microbatches of one rank from the steps of a stream."""

    def __init__(
        self, stream: Stream, n: int, *, per_device: int, accumulation: int, rank: int, world: int, repeats: int
    ) -> None:
        self.stream, self.n, self.per_device, self.repeats = stream, n, per_device, repeats
        self.per_rank, self.rank, self.world = per_device * accumulation // n, rank, world

    def __iter__(self) -> Iterator[list[Context]]:
        for step in self.stream.steps(self.per_rank * self.world):
            mine = step[self.rank * self.per_rank :][: self.per_rank]
            rows = [context for context in mine for _ in range(self.n)]
            for start in list(range(0, len(rows), self.per_device)) * self.repeats:
                yield rows[start : start + self.per_device]


class StreamLoader(DataLoader[Any]):
    """A loader of microbatches as lists of contexts, without end.

    Args:
        stream: the stream that the contexts are read from.
        n: sequences per context.
        per_device, accumulation, rank, world, repeats: as in ``StepSampler``.

    Raises:
        ValueError: the step's sequences on a rank are not a multiple of n.
    """

    def __init__(
        self, stream: Stream, n: int, *, per_device: int, accumulation: int, rank: int = 0, world: int = 1,
        repeats: int = 1,
    ) -> None:  # fmt: skip
        check_divides(n, per_device, accumulation)
        steps = _Microbatches(
            stream, n, per_device=per_device, accumulation=accumulation, rank=rank, world=world, repeats=repeats
        )
        super().__init__(steps, batch_size=None)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing, since the stream counts its passes itself; transformers' Trainer calls this."""
