"""Draw one quantity of several runs as a piece of SVG that takes the page's colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..estimators import rounded
from .marks import INK, color, dash, ink, letter, mark
from .runs import Run

_FEW = 2  # so many values under pi are read in the table of results, without a picture


@dataclass(frozen=True)
class Plot:
    """Describe a panel.

    Attributes:
        title: the title of the panel.
        note: the text below it, ahead of what says how to read its lines.
        lines: keys of ``Run.series`` that are drawn as lines with bands of one standard error.
        dots: keys of ``Run.series`` that are drawn as dots with error bars.
        ideal: a key of ``Run.ideal``, which is drawn as a dotted line.
        target: the text on that line.
        log: whether the axis is logarithmic, if all values are positive.
        swaps: whether to mark the steps at which q became pi.
        free: whether a value below ``estimators.ZERO`` may be more than noise.
    """

    title: str
    note: str = ""
    lines: tuple[str, ...] = ()
    dots: tuple[str, ...] = ()
    ideal: str = ""
    target: str = "target"
    log: bool = False
    swaps: bool = False
    free: bool = False

    def legend(self, runs: Sequence[Run]) -> str:
        """Return the note, with how to read what is drawn of these runs and nothing that is not."""
        found, dots = ([run.series(key) for run in runs for key in keys] for keys in (self.lines, self.dots))
        under_q, under_pi = (any(x for x, *_ in each) for each in (found, dots))
        parts = [self.note] if self.note else []
        if under_q and under_pi:
            parts += ["line: samples of the steps, from q", "marks: fresh samples from π"]
        elif under_pi:
            parts.append("fresh samples from π")
        of = [
            what
            for what, series in (("band", found), ("bars", dots))
            if any(math.isfinite(e) and e > 0 for *_, error in series for e in error)
        ]
        if of:
            parts.append(f"{' and '.join(of)}: ± one standard error")
        if any(_unknown(run, key) for run in runs for key in self.lines):
            parts.append("gap: unknown, since no sample shows what p differs by")
        if self.swaps and any(h.get("swapped") for run in runs for h in run.steps):
            parts.append("ticks at the bottom: q ← π")
        return "; ".join(parts)


def plots(runs: Sequence[Run]) -> list[Plot]:
    """Return all panels that have a line, or more dots than the table of results, in one of the runs."""
    features = dict.fromkeys(name for run in runs for name in run.features)
    asked = sorted({k for run in runs for k in run.asked})
    panels = [Plot(f"E[{name}]", "", (f"phi/{name}",), (f"eval_phi/{name}",), f"phi/{name}") for name in features]
    panels += [
        Plot("KL(p‖π)", "nats", ("kl_policy",), ("eval_kl_policy",), swaps=True),
        Plot("KL(p‖q)", "nats", ("kl_proposal",), swaps=True),
        Plot("KL(π‖a)", "nats", ("kl_policy_base",), ("eval_kl_policy_base",), "kl_policy_base", "KL(p‖a)"),
        Plot("log Z", "over all sequences so far", ("log_z",)),
        Plot("effective sample size", "sequences of a step", ("ess",)),
        Plot("weights", "standard deviation of A within a step", ("weight_std",), log=True, free=True),
        Plot("gradient variance", "mean of ‖gᵢ − g‖² over the sequences of a step", ("gradient_variance",), log=True,
             free=True),
        Plot("reward", "mean of a step", ("reward",), free=True),
        *(
            Plot(name, "this reward alone, without its weight: mean of a step", (f"rewards/{name}/mean",), free=True)
            for name in dict.fromkeys(name for run in runs for name in run.rewards)
        ),
        Plot("β", "of KL-control", ("beta",), free=True),
        *(Plot(f"Distinct-{n}", dots=(f"eval_distinct_{n}",)) for n in (1, 2, 3)),
        Plot("Self-BLEU-5", dots=("eval_self_bleu_5",)),
        *(Plot(f"pass@{k}", dots=(f"eval_pass@{k}",)) for k in dict.fromkeys(asked[:1] + asked[-1:])),
        Plot("cut off", "share of the answers", dots=("eval_truncated",)),
    ]  # fmt: skip

    def shown(plot: Plot) -> bool:
        return any(run.series(key)[0] for run in runs for key in plot.lines) or any(
            len(run.series(key)[0]) > _FEW for run in runs for key in plot.dots
        )

    return [plot for plot in panels if shown(plot)]


def svg(plot: Plot, runs: Sequence[Run], number: int) -> str:
    """Return the panel as an ``<svg>`` element without outside references.

    Args:
        number: the number of the panel on the page, with which its ids begin.
    """
    return drawn(lambda axis: _over_steps(axis, plot, runs), plot.title, number)


def drawn(draw: Callable[[Any], None], title: str, number: int) -> str:
    """Return what a function draws on an axis as an ``<svg>`` element in the page's colours.

    Args:
        draw: takes matplotlib's axis. It draws the run i in ``ink(i)``, and all else in ``INK``.
        title: what the picture shows, for those who do not see it.
        number: as in ``svg``.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Mapping[str, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "dmfast", "font.size": 9, "axes.edgecolor": INK, "text.color": INK,
        "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
        "axes.spines.right": False, "font.family": "sans-serif", "axes.linewidth": 0.6, "text.parse_math": False,
        "path.simplify": True,
    }  # fmt: skip
    with mpl.rc_context({**mpl.rcParamsDefault, "backend": "agg", **style}):
        figure = Figure(figsize=(4.2, 2.7), constrained_layout=True)
        FigureCanvasSVG(figure)
        axis = figure.add_subplot()
        axis.patch.set_visible(False)
        figure.patch.set_visible(False)
        draw(axis)
        axis.grid(color=INK, alpha=0.12, linewidth=0.5)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return _embedded(out.getvalue(), f"p{number}", title)


def finite(errors: Sequence[float]) -> list[float]:
    """Return standard errors with 0 for those that are not known."""
    return [error if math.isfinite(error) else 0.0 for error in errors]


def name_lines(axis: Any, ends: Sequence[tuple[int, float, float]]) -> None:
    """Write each run's letter beside the end of its line.

    Letters of lines that end at one height are moved apart.

    Args:
        ends: for each line the number of its run and its last point. The limits of the axis must be final.
    """
    place = axis.transScale + axis.transLimits
    at = [(number, *place.transform((x, y)).tolist()) for number, x, y in ends]
    for column in {round(10 * x) for _, x, _ in at}:
        here = sorted((end for end in at if round(10 * end[1]) == column), key=lambda end: end[2])
        for (number, x, _), y in zip(here, _apart([y for *_, y in here]), strict=True):
            axis.text(
                x + 0.018, y, letter(number), transform=axis.transAxes, color=ink(number), fontsize=8.5,
                fontweight="bold", va="center",
            )  # fmt: skip


def _apart(wanted: Sequence[float]) -> list[float]:
    """Return ascending heights moved apart to the height of a letter: upwards, and down again where the axis ends."""
    letters, top = 0.085, 1.03  # where the axis has height 1
    heights: list[float] = []
    for y in wanted:
        heights.append(max(y, heights[-1] + letters) if heights else y)
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], top)
        top = heights[i] - letters
    return heights


def _unknown(run: Run, key: str) -> bool:
    """Tell whether some steps have logged that the value is not known, beside steps that have one."""
    values = [entry[key] for entry in run.steps if key in entry]
    known = [isinstance(value, (int, float)) and math.isfinite(value) for value in values]
    return any(known) and not all(known)


def _pieces(run: Run, key: str) -> list[tuple[list[float], list[float], list[float]]]:
    """Return ``Run.series`` in pieces, cut where a step in between has logged that the value is not known."""
    unknown = [
        float(entry["step"])
        for entry in ([] if key.startswith("eval_") else run.steps)
        if key in entry and not (isinstance(entry[key], (int, float)) and math.isfinite(entry[key]))
    ]
    pieces: list[tuple[list[float], list[float], list[float]]] = []
    last = -math.inf
    for x, y, error in zip(*run.series(key), strict=True):
        if not pieces or any(last < step < x for step in unknown):
            pieces.append(([], [], []))
        for values, value in zip(pieces[-1], (x, y, error), strict=True):
            values.append(value)
        last = x
    return pieces


def _over_steps(axis: Any, plot: Plot, runs: Sequence[Run]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    values: list[float] = []
    ends: dict[int, tuple[float, float]] = {}

    def cleaned(y: Sequence[float]) -> list[float]:
        return list(y) if plot.free else [rounded(value) for value in y]

    for i, run in enumerate(runs):
        for key in plot.lines:
            for x, logged, error in _pieces(run, key):
                y = cleaned(logged)
                values += y
                few = "o" if len(x) == 1 else None
                axis.plot(x, y, color=ink(i), linewidth=1.4, linestyle=dash(i), marker=few, markersize=3)
                known = finite(error)
                low, high = ([v + sign * e for v, e in zip(y, known, strict=True)] for sign in (-1, 1))
                if low != high:
                    axis.fill_between(x, low, high, color=ink(i), alpha=0.16, linewidth=0)
                ends[i] = x[-1], y[-1]
        lines = any(run.series(key)[0] for key in plot.lines)
        for key in plot.dots:
            x, logged, error = run.series(key)
            y = cleaned(logged)
            values += y
            if x:
                axis.errorbar(
                    x, y, finite(error), color=ink(i), fmt=mark(i), markersize=4.5, capsize=2.5, linewidth=1, zorder=3
                )
                if not lines:
                    axis.plot(x, y, color=ink(i), linewidth=0.9, linestyle=dash(i), alpha=0.7)
                    ends[i] = x[-1], y[-1]
    _targets(axis, plot, runs)
    if plot.log and min(values) > 0:
        axis.set_yscale("log")
        many = max(values) / min(values) > 300
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0,) if many else (1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("step", fontsize=8)
    for i, run in enumerate(runs if plot.swaps else ()):
        at = [h["step"] for h in run.steps if h.get("swapped")]
        height = [0.012 + 0.045 * i] * len(at)
        axis.plot(
            at, height, "|", color=ink(i), markersize=5, markeredgewidth=1.2, transform=axis.get_xaxis_transform()
        )
    if len(runs) > 1:
        axis.set_xlim(axis.get_xlim())
        axis.set_ylim(axis.get_ylim())
        name_lines(axis, [(i, *end) for i, end in ends.items()])


def _targets(axis: Any, plot: Plot, runs: Sequence[Run]) -> None:
    """Draw what p has: one line where all runs want the same, give or take two standard errors."""
    found = {i: run.ideal[plot.ideal] for i, run in enumerate(runs) if plot.ideal in run.ideal}
    wanted = {i: each.value for i, each in found.items() if math.isfinite(each.value)}
    error = max(finite([found[i].stderr for i in wanted]), default=0.0)
    one = bool(wanted) and max(wanted.values()) - min(wanted.values()) <= 2 * error
    for i, value in [*wanted.items()][: 1 if one else None]:
        line_color = INK if one else ink(i)
        axis.axhline(value, color=line_color, linewidth=1, linestyle=(0, (1, 2.5)))
        axis.annotate(
            plot.target if one else f"{plot.target} {letter(i)}", (0, value), (3, 2), textcoords="offset points",
            xycoords=("axes fraction", "data"), fontsize=7.5, color=line_color,
        )  # fmt: skip


def _embedded(text: str, prefix: str, title: str) -> str:
    """Return matplotlib's document as a part of a page, with ids of its own, the page's colours and no addresses."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text).replace("xlink:href", "href")
    text = re.sub(r"#0000f(\d)", lambda m: color(int(m[1])), text).replace(INK, "currentColor")
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    body = text[text.index(">") + 1 :]
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<svg {box[0]} role="img" aria-label="{label}">{body.strip()}'
