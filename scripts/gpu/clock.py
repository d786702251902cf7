"""Measure how long a device takes for the work of a call, without the time in which Python queues it.

On an idle device, a kernel of 200 to 500 microseconds waits 60 to 100 microseconds for Python between the two events
that time it. The calls are therefore captured in a graph. Its replay is queued at once behind a gate, which is a kernel
that spins until everything is queued. Calls that cannot be captured are queued behind the gate one by one. If the host
waits for the device inside a call, the gate would never open. Several calls then follow each other, and the time
contains Python's latency. Each time says how it was taken, and why the better ways were impossible.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

# a call is told which of the calls in a row it is
Call = Callable[[int], Any]
# this many milliseconds of work lie between two events, so that their own cost does not matter
ENOUGH = 2.0
MOST = 64  # at most this many calls follow each other
GATES = (2 * 10**7, 2 * 10**8)  # these cycles are about 10 and 100 ms


class Clock:
    """Time a CUDA device."""

    def capture(self, call: Call, times: int) -> Callable[[], Any]:
        """Return a function that replays so many calls. Raises the errors of capturing them."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(3):
                call(i)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(times):
                call(i)
        return graph.replay

    def gated(self, queued: Callable[[], Any], cycles: int) -> float | None:
        """Return the milliseconds of what is queued behind a gate, or None if it opened before all was queued."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
        start.record()
        queued()
        end.record()
        closed = not start.query()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) if closed else None

    def in_a_row(self, queued: Callable[[], Any]) -> float:
        """Return the milliseconds between two events. They include Python's latency."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        queued()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))


class Wall(Clock):
    """Time a CPU in a dry run, where nothing is queued."""

    def capture(self, call: Call, times: int) -> Callable[[], Any]:
        """Refuse."""
        raise RuntimeError("a CPU has no graphs")

    def gated(self, queued: Callable[[], Any], cycles: int) -> float | None:
        """Return None."""
        return None

    def in_a_row(self, queued: Callable[[], Any]) -> float:
        """Return the milliseconds that the host took."""
        start = time.perf_counter()
        queued()
        return (time.perf_counter() - start) * 1e3


def spread(values: list[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"ms": round(median, 4), "low": round(low, 4), "high": round(high, 4)}


def said(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def measure(clock: Clock, call: Call, rounds: int = 7, captures: bool = True, enough: float = ENOUGH) -> dict[str, Any]:
    """Return median and quartiles of a call in milliseconds, and in ``by`` how they were taken.

    Args:
        clock: the clock of the device.
        call: the call to time. It is called once before, so that the time contains no compilation.
        rounds: the number of times.
        captures: whether the call can be captured. It cannot if the host reads from the device in it.
        enough: the milliseconds between two events. As many calls as needed follow each other.
    """
    for i in range(2):
        call(i)
    rough = clock.in_a_row(lambda: call(2))
    times = max(1, min(MOST, int(enough / max(rough, 1e-3)) + 1))
    why = []

    def all_of_them() -> None:
        for i in range(times):
            call(i)

    queued: Callable[[], Any] = all_of_them
    by = "in a row behind a gate"
    if captures:
        try:
            queued, by = clock.capture(call, times), "graph replay behind a gate"
        except Exception as error:
            why.append(f"no graph: {said(error)}")
    for cycles in GATES:
        found = [clock.gated(queued, cycles)]
        if found[0] is None:
            continue
        while len(found) < rounds and found[-1] is not None:
            found.append(clock.gated(queued, cycles))
        closed = [ms for ms in found if ms is not None]
        if len(closed) == len(found):
            return {**spread([ms / times for ms in closed]), "by": by, "calls": times, **_because(why)}
    why.append("no gate: it opened before all was queued")
    found_open = [clock.in_a_row(queued) for _ in range(rounds)]
    by = by.replace("behind a gate", "with Python's latency")
    return {**spread([ms / times for ms in found_open]), "by": by, "calls": times, **_because(why)}


def _because(why: list[str]) -> dict[str, str]:
    return {"why": "; ".join(why)} if why else {}
