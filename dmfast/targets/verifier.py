"""Filter the target by a verifier: p(x|c) proportional to a(x|c) v(x, c), with v in [0, 1] (arXiv:2512.05962)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels import warn_caller
from ..samples import Samples
from .constraints import Scorer, ScorerCounts, show
from .workers import LACKS, RAISED, Row, Verdict, Workers


@dataclass
class VerifierCounts(ScorerCounts):
    """The counts of what a verifier has done so far.

    Attributes:
        unfinished: the number of sequences that were wrong because they had not ended.
        timed_out, raised, died, out_of_memory: the numbers of calls in a worker that gave no value, so that a
            completion was wrong.
    """

    unfinished: int = 0
    timed_out: int = 0
    raised: int = 0
    died: int = 0
    out_of_memory: int = 0


class Verifier(Scorer):
    """A feature that tells right completions from wrong ones by a function of your own.

    In the constraints of an ``EBM`` it is the pointwise constraint b = v, so that ``EBM(base, [Verifier(fn)])`` is the
    base filtered by the verifier.

    Args:
        fn: ``fn(texts, rows)`` returns for each of N completions a bool, or a number in [0, 1]. ``texts`` are the
            completions without prompt and special tokens. ``rows`` are mappings with the columns of the data set's row,
            ``prompt`` (the prompt's text if the row has no such column) and ``finished`` (whether the completion ended
            by itself).
        truncated: what a completion that did not end is. With "wrong" it is wrong, and ``fn`` does not see it. With
            "judge" ``fn`` judges it like any other.
        batch_size: the number of completions in a call. Default: all. With ``workers`` it is 1.
        workers: the number of processes that call ``fn`` with one item each (see ``Workers``). There a call that takes
            longer than ``time_limit``, raises, dies or takes more than ``memory_limit`` makes its completion wrong. It
            is counted, and does not end the run. With 0 ``fn`` is called in this process, and its errors are raised.
        time_limit: the most seconds of a call in ``workers``.
        memory_limit: the bytes that a worker may take beyond what it has at its start.
        cache: the number of verdicts that are kept, by text and row. A call that timed out, died or ran out of memory
            is not kept. 0 keeps none.
        name: the name in logs, reports and errors. Default: the function's.
        binary: whether ``fn`` always gives 0 or 1, which is checked.
        answer: ``answer(text)`` returns the answer that a completion gives: a string, a number or any other value that
            can be compared and hashed, or None if it gives no answer. maj@k asks whether the commonest of k answers is
            right. Default: maj@k is not measured.

    Attributes:
        counts: a ``VerifierCounts``; the trainer logs what each step adds.

    Raises:
        TypeError, ValueError: fn is not callable, or can't be pickled for ``workers``; ``truncated`` is unknown; a
            number is out of range; or ``time_limit`` or ``memory_limit`` is given without ``workers``.
        ValueError: when called, ``fn`` does not return N numbers from 0 to 1.
        RuntimeError: when called without ``workers``, ``fn`` raised an error. If it has read a column that the row does
            not have, the message names the column. A missing column is an error with ``workers``, too.

    Examples:
        >>> def right(texts, rows):
        ...     return [text.strip() == str(row["answer"]) for text, row in zip(texts, rows)]
        >>> Verifier(right)
        <Verifier right>
    """

    counts: VerifierCounts

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        truncated: Literal["wrong", "judge"] = "wrong",
        batch_size: int | None = None,
        workers: int = 0,
        time_limit: float | None = None,
        memory_limit: int | None = None,
        cache: int = 16_384,
        name: str | None = None,
        binary: bool = False,
        answer: Callable[[str], Hashable] | None = None,
    ) -> None:
        if answer is not None and not callable(answer):
            raise TypeError(f"answer must be a function of a completion's text, or None, got {answer!r}")
        if not isinstance(cache, int) or cache < 0:
            raise ValueError(f"cache must be an integer of 0 or more, got {cache!r}")
        super().__init__(fn, on="samples", batch_size=batch_size, name=name, binary=binary)
        if truncated not in ("wrong", "judge"):
            raise ValueError(f'truncated must be "wrong" or "judge", got {truncated!r}')
        if not isinstance(workers, int) or workers < 0:
            raise ValueError(f"workers must be the number of processes, 0 or more, got {workers!r}")
        for each, limit in (("time_limit", time_limit), ("memory_limit", memory_limit)):
            if limit is not None and not workers:
                raise ValueError(f"{each} needs workers: a call in this process can't be ended from outside")
            if limit is not None and not limit > 0:
                raise ValueError(f"{each} must be positive or None, got {limit!r}")
        if memory_limit is not None and not isinstance(memory_limit, int):
            raise ValueError(f"memory_limit must be an integer, a number of bytes, got {memory_limit!r}")
        if workers and batch_size not in (None, 1):
            raise ValueError(f"workers take one completion at a time, got batch_size={batch_size!r}; leave it None")
        self.truncated, self.workers, self.answer = truncated, workers, answer
        self.time_limit, self.memory_limit = time_limit, memory_limit
        self.cache, self.counts = cache, VerifierCounts()
        self._pool = Workers(fn, workers, time_limit=time_limit, memory_limit=memory_limit) if workers else None
        self._known: OrderedDict[tuple[str, str], float] = OrderedDict()

    @property
    def key(self) -> Any:
        """The identity of the verifier, because another verifier of the same function may judge otherwise."""
        return id(self)

    @property
    def at_most_one(self) -> bool:
        """Whether b(x) is at most 1, which is always True: a verdict is checked to be a number from 0 to 1."""
        return True

    def _with_cache(self, samples: Samples) -> Tensor:  # a verdict is of a text and a row, and not of tokens alone
        return self._scored(samples)

    def _scored(self, samples: Samples) -> Tensor:
        texts, rows = samples.text, rows_of(samples)
        values = torch.zeros(len(samples), dtype=torch.float64)
        keys = {i: (texts[i], _canonical(rows[i])) for i in range(len(samples)) if self._judges(rows[i])}
        self.counts.unfinished += len(samples) - len(keys)
        new: dict[tuple[str, str], int] = {}
        for i, key in keys.items():
            if key not in self._known:
                new.setdefault(key, i)
        places = list(new.values())
        answers = self._judge([(texts[i], rows[i]) for i in places], samples, places)
        judged = dict(zip(new, answers, strict=True))
        for i, key in keys.items():
            value = judged[key] if key in judged else self._known[key]
            values[i] = 0.0 if isinstance(value, Verdict) else value
        self.counts.scored += len(new)
        self.counts.cached += len(keys) - len(new)
        self._remember(keys.values(), judged)
        return values.to(samples.log_prob.device)

    def _judges(self, row: Row) -> bool:
        return row["finished"] or self.truncated == "judge"

    def _remember(self, used: Iterable[tuple[str, str]], judged: Mapping[tuple[str, str], Any]) -> None:
        for key, value in judged.items():
            if isinstance(value, Verdict):
                self._count(value, key[0])
                if value.kind == RAISED:  # the other failures may be the machine's, and may not happen again
                    self._known[key] = 0.0
            else:
                self._known[key] = value
        for key in used:
            if key in self._known:
                self._known.move_to_end(key)
        while len(self._known) > self.cache:
            self._known.popitem(last=False)

    def _count(self, verdict: Verdict, text: str) -> None:
        if not getattr(self.counts, verdict.kind):
            what = verdict.kind.replace("_", " ") + (f" ({verdict.detail})" if verdict.detail else "")
            shown = text[:200]
            warn_caller(f"a call of the verifier {self.name!r} {what}, and its completion counts as wrong: {shown!r}")
        setattr(self.counts, verdict.kind, getattr(self.counts, verdict.kind) + 1)

    def _judge(self, items: list[tuple[str, Row]], samples: Samples, places: list[int]) -> list[Any]:
        """Return a float in [0, 1], or a ``Verdict``, for each text and row."""
        if self._pool is not None:
            answers = self._pool(items)
            for answer, (_, row) in zip(answers, items, strict=True):
                if isinstance(answer, Verdict) and answer.kind == LACKS:
                    raise RuntimeError(self._lacks(answer.detail, row))
            return [
                answer if isinstance(answer, Verdict) else self._checked(answer, samples, [place])[0]
                for answer, place in zip(answers, places, strict=True)
            ]
        found: list[float] = []
        step = self.batch_size or max(len(items), 1)
        for start in range(0, len(items), step):
            part, of = items[start : start + step], places[start : start + step]
            texts, rows = [text for text, _ in part], [row for _, row in part]
            try:
                answer = self.fn(texts, rows)
            except Exception as error:
                raise RuntimeError(self._why(error, rows, samples, of[0])) from error
            found += self._checked(answer, samples, of)
        return found

    def _why(self, error: Exception, rows: Sequence[Row], samples: Samples, place: int) -> str:
        if isinstance(error, KeyError):
            row = next((row for row in rows if row.is_missing(error)), None)
            if row is not None:
                return self._lacks(row.missing, row)
        first = show(samples, place)
        return f"verifier {self.name!r} raised {type(error).__name__}: {error}; first completion: {first}"

    def _lacks(self, column: str, row: Row) -> str:
        return (
            f"verifier {self.name!r} reads the column {column!r}, which the row of a completion does not have; it has "
            f"{', '.join(map(repr, row))}"
        )

    def _checked(self, answer: Any, samples: Samples, places: list[int]) -> list[float]:
        n = len(places)
        expected = f"verifier {self.name!r} must return {n} bools or numbers from 0 to 1, one for each completion"
        try:
            values = torch.as_tensor(answer, dtype=None if hasattr(answer, "dtype") else torch.float64)
            values = values.detach().to("cpu", torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{expected}, got {type(answer).__name__} {answer!s:.200} ({error})") from error
        if values.shape != (n,):
            raise ValueError(f"{expected}, got shape {tuple(values.shape)}; first: {show(samples, places[0])}")
        wrong = ~((values >= 0) & (values <= 1))
        if self.binary:
            wrong |= (values != 0) & (values != 1)
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0, 0])
            allowed = "0 or 1, since binary=True" if self.binary else "a number from 0 to 1"
            raise ValueError(
                f"verifier {self.name!r} must return {allowed}, got {values[i].item()} for {show(samples, places[i])}"
            )
        found: list[float] = values.tolist()
        return found

    def answers(self, texts: Sequence[str], finished: Sequence[bool]) -> list[Hashable] | None:
        """Return the answer of each completion, or None if the verifier has no ``answer``.

        A completion that gives no answer has None in the list.

        Args:
            texts: N completions.
            finished: whether each ended by itself. One that did not gives no answer unless ``truncated`` is "judge".

        Raises:
            RuntimeError: ``answer`` raised.
            TypeError: ``answer`` returned a value that can't be hashed.
        """
        if self.answer is None:
            return None
        found: list[Hashable] = []
        for text, ended in zip(texts, finished, strict=True):
            try:
                each = self.answer(text) if ended or self.truncated == "judge" else None
            except Exception as error:
                why = f"answer of the verifier {self.name!r} raised {type(error).__name__}: {error}; completion: "
                raise RuntimeError(f"{why}{text[:200]!r}") from error
            if not isinstance(each, Hashable):
                raise TypeError(
                    f"answer of the verifier {self.name!r} must return a string, a number, None or another value that "
                    f"can be hashed, got {type(each).__name__} {each!r:.100} for {text[:200]!r}"
                )
            found.append(each)
        return found

    def describe(self) -> dict[str, Any]:
        """Return the verifier's settings and the function's full name."""
        kept = {"name", "function", "batch_size", "binary", "cache"}
        found = {name: value for name, value in super().describe().items() if name in kept}
        return {"type": "Verifier", **found, "truncated": self.truncated, "workers": self.workers,
                "time_limit": self.time_limit, "memory_limit": self.memory_limit}  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """Return the function's module and name, and what can make a completion wrong besides it."""
        return {**super().identity(), "truncated": self.truncated, "time_limit": self.time_limit,
                "memory_limit": self.memory_limit}  # fmt: skip


def rows_of(samples: Samples) -> list[Row]:
    """Return for each sequence the columns of its row, with ``prompt`` and ``finished``."""
    ended = samples.finished.tolist()
    given: Sequence[Mapping[str, Any]] = samples.rows or [{}] * len(samples)
    prompts: dict[tuple[int, ...], str] = {}
    found = []
    for i, row in enumerate(given):
        columns = dict(row)
        if "prompt" not in columns:
            head = slice(0, samples.prompt_len)
            ids = tuple(samples.tokens[i, head][samples.attention_mask[i, head].bool()].tolist())
            if ids not in prompts:
                prompts[ids] = samples.tokenizer.decode(ids, skip_special_tokens=True)
            columns["prompt"] = prompts[ids]
        found.append(Row(columns | {"finished": ended[i]}))
    return found


def _canonical(value: Any) -> str:
    """Return a text that differs for rows that differ."""
    if hasattr(value, "tolist"):  # the repr of a long array leaves out its middle
        value = value.tolist()
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{name!r}: {_canonical(each)}' for name, each in value.items()))}}}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(_canonical, value))})"
    return repr(value)
