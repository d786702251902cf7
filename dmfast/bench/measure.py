"""Measure times and peak memory.

Rivals are interleaved in rotated order, and each has a median with quartiles. Memory is that of a fresh process.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def wall_ms(call: Callable[[], Any]) -> float:
    """Return the milliseconds of a call on the CPU."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def interleaved(
    rivals: Mapping[str, Callable[[], Any]],
    rounds: int,
    before: Callable[[], Any] = lambda: None,
    clock: Callable[[Callable[[], Any]], float] = wall_ms,
) -> dict[str, dict[str, float]]:
    """Return median and quartiles of each rival's milliseconds by ``clock`` over ``rounds`` rounds.

    One more round runs first and does not count. Each round rotates the order by one. ``before`` runs ahead of every
    call and is not timed.
    """
    names = list(rivals)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 1):
        for k in range(len(names)):
            name = names[(i + k) % len(names)]
            before()
            ms = clock(rivals[name])
            if i:
                times[name].append(ms)
    return {name: spread(values) for name, values in times.items()}


PHASES = ("sampling", "scoring by q", "scoring by a", "policy forward", "policy backward", "optimiser")
BOTH, WHOLE = "policy forward + backward", "whole step"


class Phases:
    """Keep the seconds of the phases of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    """Return median and quartiles, which never lie beyond the smallest and the largest value.

    ``statistics.quantiles`` extrapolates beyond them if there are only two values.
    """
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    low, high = max(low, min(values)), min(high, max(values))
    return {"median": round(median, 3), "low": round(low, 3), "high": round(high, 3)}


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {name}")


def extra_memory(call: Callable[[], Any], forget: Callable[[], Any] = lambda: None) -> float:
    """Return the MB by which the resident memory of this process rises at its peak during the call (Linux).

    Call it in a fresh process. A first call is made and forgotten, so that threads, compilers and caches are not
    counted; ``forget`` lets go of what it left, such as gradients.
    """
    call()
    forget()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:  # containers may forbid it: look every millisecond instead
        return _sampled(call)
    before = _status("VmRSS")
    call()
    return round(_status("VmHWM") - before, 1)


def in_fresh_process(code: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Any:
    """Return what a Python process of its own prints in its last line, read as JSON.

    Raises:
        RuntimeError: the process failed; the message has what it said.
    """
    here = Path(__file__).resolve().parents[2]  # first on its path, so that it has this dmfast and no other
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=here, env={**os.environ, **(environment or {})},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(f"a process of the benchmark failed ({' '.join(arguments)}):\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _sampled(call: Callable[[], Any]) -> float:
    before, peak, done = _status("VmRSS"), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _status("VmRSS"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return round(max(peak - before, 0.0), 1)
