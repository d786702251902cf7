"""Draw one quantity of several runs as a piece of SVG that takes the page's colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .runs import Run

#: Placeholders for the page's colours in matplotlib's drawing: one for text and lines of the plot, then one per run.
INK = "#00fe00"
COLORS = 8


@dataclass(frozen=True)
class Plot:
    """Describe a panel.

    Attributes:
        title: the title of the panel.
        note: the text below it.
        lines: keys of ``Run.series`` that are drawn as lines.
        dots: keys of ``Run.series`` that are drawn as dots with error bars.
        ideal: a key of ``Run.ideal``, which is drawn as a dashed line.
        log: whether the axis is logarithmic, if all values are positive.
        swaps: whether to mark the steps at which q became pi.
    """

    title: str
    note: str = ""
    lines: tuple[str, ...] = ()
    dots: tuple[str, ...] = ()
    ideal: str = ""
    log: bool = False
    swaps: bool = False


def plots(runs: Sequence[Run]) -> list[Plot]:
    """Return all panels that have values in one of the runs."""
    features = dict.fromkeys(name for run in runs for name in run.features)
    asked = sorted({k for run in runs for k in run.asked})
    under = "line: under q; dots: under π, in evaluations; dashed: the target"
    panels = [Plot(f"E[{name}]", under, (f"phi/{name}",), (f"eval_phi/{name}",), f"phi/{name}") for name in features]
    panels += [
        Plot("KL(p‖π)", "nats; ticks: q ← π", ("kl_policy",), ("eval_kl_policy",), swaps=True),
        Plot("KL(p‖q)", "nats; ticks: q ← π", ("kl_proposal",), swaps=True),
        Plot("KL(π‖a)", "nats; dashed: KL(p‖a)", ("kl_policy_base",), ("eval_kl_policy_base",), "kl_policy_base"),
        Plot("log Z", "over all sequences so far", ("log_z",)),
        Plot("effective sample size", "sequences of a step", ("ess",)),
        Plot("weights", "standard deviation of A", ("weight_std",), log=True),
        Plot("gradient variance", "mean of ‖gᵢ − g‖² over the sequences of a step", ("gradient_variance",), log=True),
        Plot("reward", "mean of a step", ("reward",)),
        *(
            Plot(name, "this reward alone, without its weight: mean of a step", (f"rewards/{name}/mean",))
            for name in dict.fromkeys(name for run in runs for name in run.rewards)
        ),
        Plot("β", "of KL-control", ("beta",)),
        *(Plot(f"Distinct-{n}", "of evaluations", dots=(f"eval_distinct_{n}",)) for n in (1, 2, 3)),
        Plot("Self-BLEU-5", "of evaluations", dots=("eval_self_bleu_5",)),
        *(Plot(f"pass@{k}", "of evaluations", dots=(f"eval_pass@{k}",)) for k in dict.fromkeys(asked[:1] + asked[-1:])),
        Plot("cut off", "share of the answers of evaluations", dots=("eval_truncated",)),
    ]
    return [p for p in panels if any(run.series(key)[0] for run in runs for key in (*p.lines, *p.dots))]


def color(number: int) -> str:
    """Return the page's colour for the run with this number."""
    return f"var(--run{number % COLORS})"


def svg(plot: Plot, runs: Sequence[Run], number: int) -> str:
    """Return the panel as an ``<svg>`` element without outside references.

    Args:
        number: the number of the panel on the page, with which its ids begin.
    """
    return drawn(lambda axis: _over_steps(axis, plot, runs), plot.title, number)


def drawn(draw: Callable[[Any], None], title: str, number: int) -> str:
    """Return what a function draws on an axis as an ``<svg>`` element in the page's colours.

    Args:
        draw: takes matplotlib's axis. It draws the run i in ``ink(i)``, and what is of no run in ``INK``.
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


def ink(number: int) -> str:
    """Return what stands for the page's colour of the run with this number while it is drawn."""
    return f"#0000f{number % COLORS}"


def finite(errors: Sequence[float]) -> list[float]:
    """Return standard errors with 0 for those that are not known."""
    return [error if math.isfinite(error) else 0.0 for error in errors]


def _over_steps(axis: Any, plot: Plot, runs: Sequence[Run]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    values: list[float] = []
    for i, run in enumerate(runs):
        dash = ("-", (0, (4, 1.5)), (0, (1, 1)))[i // COLORS % 3]
        for key in plot.lines:
            x, y, error = run.series(key)
            values += y
            few = "o" if len(x) == 1 else None
            axis.plot(x, y, color=ink(i), linewidth=1.2, linestyle=dash, marker=few, markersize=3)
            known = finite(error)
            low, high = ([v + sign * e for v, e in zip(y, known, strict=True)] for sign in (-1, 1))
            if low != high:
                axis.fill_between(x, low, high, color=ink(i), alpha=0.13, linewidth=0)
        for key in plot.dots:
            x, y, error = run.series(key)
            values += y
            if x:
                axis.errorbar(x, y, finite(error), color=ink(i), fmt="o", markersize=3.5, capsize=2, linewidth=1)
                if not plot.lines or not any(run.series(each)[0] for each in plot.lines):
                    axis.plot(x, y, color=ink(i), linewidth=0.7, alpha=0.6)
        ideal = run.ideal.get(plot.ideal)
        if ideal is not None and math.isfinite(ideal.value):
            axis.axhline(ideal.value, color=ink(i), linewidth=0.9, linestyle="--")
        if plot.swaps:
            at = [h["step"] for h in run.steps if h.get("swapped")]
            height = [0.012 + 0.045 * (i % COLORS)] * len(at)
            axis.plot(at, height, "|", color=ink(i), markersize=4, transform=axis.get_xaxis_transform())
    if plot.log and min(values) > 0:
        axis.set_yscale("log")
        many = max(values) / min(values) > 300
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0,) if many else (1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("step", fontsize=8)


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
