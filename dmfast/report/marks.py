"""Give each run of a page a letter, a colour, a dash and a mark.

The letter stands at the end of the run's curves and in the heads of tables, so that runs are told apart without their
colours. There are eight colours. A run that shares its colour with an earlier one has another dash.
"""

from __future__ import annotations

from html import escape
from typing import Any

from .runs import Run

COLORS = 8
#: The colour in matplotlib's drawing that is replaced by the page's colour of text and lines. ``ink`` returns the one
#: that is replaced by a run's colour.
INK = "#00fe00"
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1.2)))


def letter(number: int) -> str:
    """Return A for the first run, Z for the 26th and AA for the one after that."""
    before, last = divmod(number, 26)
    return (letter(before - 1) if before else "") + chr(ord("A") + last)


def color(number: int) -> str:
    """Return the page's colour for the run with this number."""
    return f"var(--run{number % COLORS})"


def ink(number: int) -> str:
    """Return what stands for the page's colour of the run with this number while it is drawn."""
    return f"#0000f{number % COLORS}"


def mark(number: int) -> str:
    """Return the run's mark, for matplotlib."""
    return _MARKS[number % len(_MARKS)]


def dash(number: int) -> Any:
    """Return the run's dash, for matplotlib."""
    return _DASHES[(number + number // len(_MARKS)) % len(_DASHES)]


def symbol(number: int) -> str:
    """Return the run's mark on a piece of its line, as an ``<svg>`` element."""
    from matplotlib.markers import MarkerStyle

    shape: Any = MarkerStyle(mark(number))
    (outline, *_) = shape.get_path().transformed(shape.get_transform()).to_polygons()
    points = " ".join(f"{15 + 8 * x:.2f},{6 - 8 * y:.2f}" for x, y in outline)
    pattern = dash(number)
    dashes = "" if pattern == "-" else f' stroke-dasharray="{" ".join(f"{1.6 * each:g}" for each in pattern[1])}"'
    return (
        f'<svg viewBox="0 0 30 12" width="30" height="12" aria-hidden="true" style="color:{color(number)}">'
        f'<line x1="0" y1="6" x2="30" y2="6" stroke="currentColor" stroke-width="1.6"{dashes}></line>'
        f'<polygon points="{points}" fill="currentColor"></polygon></svg>'
    )


def name(number: int, run: Run, runs: int) -> str:
    """Return HTML with the run's name, and ahead of it mark and letter where the page has several runs."""
    return escape(run.name) if runs == 1 else f"{short(number, run)} {escape(run.name)}"


def short(number: int, run: Run) -> str:
    """Return HTML with the run's mark and letter."""
    return f'<span class="run" title="{escape(run.name)}">{symbol(number)} <b>{letter(number)}</b></span>'
