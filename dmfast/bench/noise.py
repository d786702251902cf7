"""Find what was not measured well, and measure it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Times = Mapping[str, Mapping[str, float]]  # median and quartiles in ms, by name
Measured = TypeVar("Measured")
NOISE = 0.5  # quartiles further apart than this share of the median leave a ratio unknown by a factor of 1.5 or more
TRIES = 2


def noisy(ms: Times) -> dict[str, float]:
    """Return what was not measured well, with the distance of its quartiles as a share of its median."""
    apart = {name: (t["high"] - t["low"]) / t["median"] if t["median"] > 0 else 0.0 for name, t in ms.items()}
    return {name: share for name, share in apart.items() if share > NOISE}


def noise(ms: Times) -> str:
    """Return what was not measured well, in words, or "" where the rounds agree."""
    found = sorted(noisy(ms).items(), key=lambda item: -item[1])
    if not found:
        return ""
    said = ", ".join(f"{name} {quartiles(ms[name])} ms" for name, _ in found[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"noisy: half of the rounds lie outside of these ranges, which are wide: {said}{more}"


def quartiles(t: Mapping[str, float], digits: int = 1) -> str:
    """Return the range between the quartiles in words."""
    return f"{t['low']:.{digits}f} – {t['high']:.{digits}f}"


def calmest(
    measure: Callable[[], Measured], times: Callable[[Measured], Times], say: Callable[[Any], None]
) -> Measured:
    """Measure, and again where the rounds disagree, at most ``TRIES`` times. Return the calmest try.

    ``times`` takes from what was measured the times that have to be calm. ``say`` gets a line before each new try.
    """
    found = measure()
    for _ in range(TRIES - 1):
        said = noise(times(found))
        if not said:
            break
        say(f"{said}; measured again")
        found = min(found, measure(), key=lambda each: max(noisy(times(each)).values(), default=0.0))
    return found
