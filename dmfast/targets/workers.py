"""Run a function of one text in processes of its own, so that a call that hangs, dies or leaks costs one verdict.

A process that misbehaves is ended with the processes that it has started, and another takes its place. Memory that
earlier calls leaked costs no verdict either: if a process that has answered before runs out of memory, the item goes to
a new one. This is not a sandbox: the function has all rights of the user who trains.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, NamedTuple

#: The ways in which a call may end without a value.
TIMED_OUT, RAISED, DIED, OUT_OF_MEMORY, LACKS = "timed_out", "raised", "died", "out_of_memory", "lacks"
_STATM = Path("/proc/self/statm")
_STARTED = "started"
#: The seconds within which a new process must load the function.
_START_LIMIT = 120.0
#: The seconds after which processes are looked at that have said nothing.
_LOOK = 1.0


class Verdict(NamedTuple):
    """The way in which a call ended that gave no value.

    Attributes:
        kind: ``TIMED_OUT``, ``RAISED``, ``DIED``, ``OUT_OF_MEMORY``, or ``LACKS`` if the row lacks a column.
        detail: the error's type and message for ``RAISED``, the name of the column for ``LACKS``, and else empty.
    """

    kind: str
    detail: str = ""


class Row(Mapping[str, Any]):
    """A row that remembers which column was read although the row does not have it."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self._columns, self.missing = dict(columns), ""

    def __getitem__(self, name: str) -> Any:
        if name not in self._columns:
            self.missing = name
        return self._columns[name]

    def __contains__(self, name: object) -> bool:  # asking for a column does not count as reading it
        return name in self._columns

    def get(self, name: str, default: Any = None) -> Any:
        """Return a column, or the default if the row does not have it."""
        return self._columns.get(name, default)

    def is_missing(self, error: KeyError) -> bool:
        """Return whether an error comes from reading a column that the row does not have."""
        return bool(self.missing) and error.args == (self.missing,)

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


Item = tuple[str, Row]


class _Worker:
    """A process, and this end of the pipe to it."""

    def __init__(self, fn: Callable[..., Any], memory_limit: int | None) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self.connection, theirs = context.Pipe()
        # a daemon could not start processes, which functions do that run code
        self.process = context.Process(target=_serve, args=(theirs, fn, memory_limit), daemon=False)
        self.process.start()
        theirs.close()
        self.item: int | None = None
        self.answered = False
        self.deadline = time.monotonic() + _START_LIMIT
        self.started = False

    def end(self) -> None:
        """End the process and those that it has started."""
        if self.started and self.process.pid and hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it and what it has started are gone
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()


class Workers:
    """A group of processes that call ``fn([text], [row])``, each with one item at a time.

    Args:
        fn: a function that can be pickled, such as one at the top of a module. A script that makes ``Workers`` must
            guard what it runs by ``if __name__ == "__main__":``, because each process imports it.
        n: the number of processes. They start with the first call.
        time_limit: the most seconds of one item. None sets no limit.
        memory_limit: the bytes that a process may take beyond what it has once ``fn`` is loaded. None sets no limit.

    Raises:
        TypeError: fn can't be pickled.
        ValueError: there is no way to limit memory on this system.
    """

    def __init__(
        self, fn: Callable[..., Any], n: int, *, time_limit: float | None = None, memory_limit: int | None = None
    ) -> None:
        try:
            pickle.dumps(fn)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                f"workers={n} needs a function that can be pickled, one at the top of a module and no lambda or inner "
                f"function, got {fn!r} ({error})"
            ) from error
        if memory_limit is not None and not _STATM.exists():
            raise ValueError("memory_limit needs Linux, whose processes say what memory they have; leave it None here")
        self.fn, self.n, self.time_limit, self.memory_limit = fn, n, time_limit, memory_limit
        self._workers: list[_Worker] = []
        self._finalizer: Finalize | None = None

    def __call__(self, items: Sequence[Item]) -> list[Any]:
        """Return for each item the value that ``fn`` gave for it alone, or a ``Verdict``.

        Raises:
            RuntimeError: a process can't load the function.
        """
        found: list[Any] = [None] * len(items)
        left = deque(range(len(items)))
        if self._finalizer is None:  # processes that no one ends would be waited for at exit
            self._finalizer = Finalize(self, _end_all, (self._workers,), exitpriority=10)
        try:
            while left or any(worker.item is not None for worker in self._workers):
                while len(self._workers) < min(self.n, len(left) + self._busy()):
                    self._workers.append(_Worker(self.fn, self.memory_limit))
                for worker in list(self._workers):
                    if left and worker.started and worker.item is None:
                        if self._give(worker, left[0], items):
                            left.popleft()
                        else:  # it died while it had nothing to do
                            worker.end()
                            self._workers.remove(worker)
                self._wait(found, left)
        except BaseException:
            self.close()  # the answers to calls that are under way would otherwise go to the next call
            raise
        return found

    def _busy(self) -> int:
        return sum(worker.item is not None for worker in self._workers)

    def _give(self, worker: _Worker, place: int, items: Sequence[Item]) -> bool:
        """Give a worker an item, and return whether the worker lives."""
        if not worker.process.is_alive():
            return False
        worker.item = place
        worker.deadline = time.monotonic() + (float("inf") if self.time_limit is None else self.time_limit)
        text, row = items[place]
        try:
            worker.connection.send((text, row))
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def _wait(self, found: list[Any], left: deque[int]) -> None:
        """Take the answers that have come, and end the processes that are over their time."""
        waited = [worker for worker in self._workers if worker.item is not None or not worker.started]
        if not waited:
            return
        soonest = min(worker.deadline for worker in waited)
        limit = None if soonest == float("inf") else max(soonest - time.monotonic(), 0.0)
        connections: list[Connection] = [worker.connection for worker in waited]
        ready = set(wait(connections, _LOOK if limit is None else min(limit, _LOOK)))
        for worker in waited:
            if worker.connection in ready:
                try:
                    answer = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    self._end(worker, found, Verdict(DIED), left)
                    continue
                if not worker.started:
                    worker.started = answer == _STARTED
                    if not worker.started:
                        raise RuntimeError(f"a worker process can't run the function: {answer}")
                    continue
                assert worker.item is not None
                if isinstance(answer, Verdict) and answer.kind == OUT_OF_MEMORY:
                    self._end(worker, found, answer, left)
                    continue
                found[worker.item], worker.item, worker.answered = answer, None, True
            elif worker.deadline <= time.monotonic():
                self._end(worker, found, Verdict(TIMED_OUT), left)
            elif not worker.process.is_alive() and not worker.connection.poll():
                # a process that it has started may hold its end of the pipe open
                self._end(worker, found, Verdict(DIED), left)

    def _end(self, worker: _Worker, found: list[Any], verdict: Verdict, left: deque[int]) -> None:
        """End a worker, and give its item the verdict, or another chance if earlier items may be to blame."""
        if not worker.started:
            raise RuntimeError(
                f"a worker process {verdict.kind.replace('_', ' ')} before it had loaded the function: a script that "
                'makes workers must guard what it runs by if __name__ == "__main__":, since each worker imports it'
            )
        of_memory = verdict.kind == OUT_OF_MEMORY or (verdict.kind == DIED and self.memory_limit is not None)
        if worker.item is not None and worker.answered and of_memory:
            left.appendleft(worker.item)
        elif worker.item is not None:
            found[worker.item] = verdict
        worker.end()
        self._workers.remove(worker)

    def close(self) -> None:
        """End the processes. A further call starts new ones."""
        _end_all(self._workers)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_workers": [], "_finalizer": None}


def _end_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.end()
    workers.clear()


def _serve(connection: Connection, fn: Callable[..., Any], memory_limit: int | None) -> None:
    """Answer one item after the other in a worker process."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if memory_limit is not None:
        import resource

        used = int(_STATM.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_limit, resource.RLIM_INFINITY))
    connection.send(_STARTED)
    while True:
        try:
            text, row = connection.recv()
        except EOFError:
            return
        try:
            answer: Any = fn([text], [row])
        except MemoryError:
            answer = Verdict(OUT_OF_MEMORY)
        except KeyError as error:
            lacks = row.is_missing(error)
            answer = Verdict(LACKS, row.missing) if lacks else Verdict(RAISED, f"KeyError: {error}")
        except Exception as error:
            answer = Verdict(RAISED, f"{type(error).__name__}: {error}")
        connection.send(answer)


def _end_with_parent() -> None:
    """End this process and those that it has started once the process is gone that started it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
