"""Draw what runs come to under a verifier: pass@k over k, and precision against coverage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .marks import INK, dash, ink, mark
from .plots import finite, name_lines
from .runs import Run


@dataclass(frozen=True)
class Curve:
    """Describe a picture.

    Attributes:
        title, note: the title, and the text below it.
        draw: draws it on matplotlib's axis.
    """

    title: str
    note: str
    draw: Callable[[Any], None]


def curves(runs: Sequence[Run]) -> list[Curve]:
    """Return the pictures that have values in one of the runs."""
    of_k = [run for run in runs if run.asked]
    if not of_k:
        return []
    note = "over k, at the end; bars: ± one standard error; thin grey line: before training"
    found = [Curve("pass@k", note, lambda axis: _passes(axis, runs))]
    common = set(of_k[0].asked).intersection(*(run.asked for run in of_k))
    most = max(common, default=1)
    if 1 in common and most > 1:
        note = f"pass@1 over pass@{most}, evaluation by evaluation; open mark: the first, full mark: the last"
        found.append(Curve("precision against coverage", note, lambda axis: _front(axis, runs, most)))
    return found


def _style(number: int) -> dict[str, Any]:
    return {"color": ink(number), "marker": mark(number), "linestyle": dash(number)}


def _passes(axis: Any, runs: Sequence[Run]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    seen: list[dict[int, float]] = []
    for run in runs:
        of_base = {k: estimate.value for k, estimate in run.passed(run.before).items()}
        if of_base and run.passed(run.after) and of_base not in seen:  # runs from one base have it alike
            seen.append(of_base)
            axis.plot(list(of_base), list(of_base.values()), color=INK, linewidth=0.7, alpha=0.75)
    ends = []
    for i, run in enumerate(runs):
        found = run.passed(run.after) or run.passed(run.before)
        values = [each.value for each in found.values()]
        errors = finite([each.stderr for each in found.values()])
        if found:
            axis.errorbar(
                list(found), values, errors, **_style(i), linewidth=1.2, markersize=4.5, capsize=2, elinewidth=0.7
            )
            ends.append((i, list(found)[-1], values[-1]))
    asked = sorted({k for run in runs for k in run.asked})
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(asked))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("k", fontsize=8)
    _name(axis, runs, ends)


def _front(axis: Any, runs: Sequence[Run], most: int) -> None:
    ends, all_x = [], list[float]()
    for i, run in enumerate(runs):
        points = run.front(most)
        if not points:
            continue
        x, y = ([pair[side].value for pair in points] for side in (0, 1))
        all_x += x
        error_x, error_y = (finite([points[-1][side].stderr])[0] for side in (0, 1))
        style = _style(i)
        axis.plot(x, y, color=style["color"], linestyle=style["linestyle"], linewidth=0.9, alpha=0.8)
        if len(points) > 1:
            axis.plot(x[:1], y[:1], color=style["color"], marker=style["marker"], markersize=4.5, fillstyle="none")
        axis.errorbar(
            x[-1:], y[-1:], [error_y], [error_x], color=style["color"], marker=style["marker"], markersize=6,
            linestyle="none", capsize=2, elinewidth=0.7,
        )  # fmt: skip
        ends.append((i, x[-1], y[-1]))
    # a coverage that stays as it is gives the axis no range
    if all_x and max(all_x) - min(all_x) < 0.01:
        axis.set_xlim(min(all_x) - 0.1, max(all_x) + 0.1)
    axis.set_xlim(right=min(axis.get_xlim()[1], 1.02))  # where an error bar alone would go beyond 1
    axis.set_xlabel(f"pass@{most}: coverage", fontsize=8)
    axis.set_ylabel("pass@1: precision", fontsize=8)
    _name(axis, runs, ends)


def _name(axis: Any, runs: Sequence[Run], ends: Sequence[tuple[int, float, float]]) -> None:
    if len(runs) > 1:
        axis.set_xlim(axis.get_xlim())
        axis.set_ylim(axis.get_ylim())
        name_lines(axis, ends)
