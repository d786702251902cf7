"""Write the page: verdicts and results, curves, samples, then what is folded: settings, machine, glossary.

The page has no script and loads nothing from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from html import escape

from .. import __version__
from . import results
from .curves import curves
from .marks import name
from .plots import drawn, plots, svg
from .runs import Run
from .style import css
from .texts import samples
from .words import glossary

_PHASES = ("sampling", "scoring", "policy", "check", "gradient_variance")


def page(runs: Sequence[Run]) -> str:
    """Return the HTML of one or more runs."""
    title = "dmfast: " + (runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
    panels = plots(runs)
    over_steps = [_figure(p.title, svg(p, runs, i), p.legend(runs)) for i, p in enumerate(panels)]
    right = [
        _figure(c.title, drawn(c.draw, c.title, len(panels) + i), c.note) for i, c in enumerate(curves(runs))
    ]  # fmt: skip
    return "\n".join([
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>{css()}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>",
        f'<p class="faint">dmfast {__version__}, {date.today().isoformat()}. '
        '<a href="#words">What the words mean</a></p>',
        _names(runs), "<h2>Result</h2>", results.verdicts(runs), results.measures(runs),
        *(["<h2>Right answers</h2>", '<div class="plots">', *right, "</div>"] if right else []),
        "<h2>Over the steps</h2>", '<div class="plots">', *over_steps, "</div>",
        samples(runs), "<h2>Training</h2>", results.training(runs), _phases(runs), results.settings(runs),
        _machines(runs), glossary(), "</body>\n</html>\n",
    ])  # fmt: skip


def _figure(title: str, picture: str, note: str) -> str:
    return f'<figure><h3>{escape(title)}</h3>{picture}<figcaption class="faint">{escape(note)}</figcaption></figure>'


def _names(runs: Sequence[Run]) -> str:
    """Return the list of the runs: name, the file, and the few settings that differ."""
    rows = zip(runs, results.chips(runs), strict=True)
    names = "".join(
        f"<li>{name(i, run, len(runs))} <small>{escape(str(run.source))}</small> {chips}</li>"
        for i, (run, chips) in enumerate(rows)
    )
    return f'<ul class="runs">{names}</ul>'


def _phases(runs: Sequence[Run]) -> str:
    """Return the mean seconds of a step as bars of one scale, in grey patterns that no run has for a colour."""
    means = []
    for run in runs:
        found = {phase: run.series(f"seconds_{phase}")[1] for phase in _PHASES}
        # a phase that only some of the steps have counts with its share of the mean step
        means.append({phase: sum(values) / len(run.steps) for phase, values in found.items() if values})
    longest = max((sum(mean.values()) for mean in means), default=0.0)
    if not longest > 0:
        return ""
    seen = [phase for phase in _PHASES if any(phase in mean for mean in means)]
    key = "".join(
        f'<span><span class="swatch phase{_PHASES.index(p)}"></span>{p.replace("_", " ")}</span>' for p in seen
    )
    lines = []
    for i, (run, mean) in enumerate(zip(runs, means, strict=True)):
        spans = "".join(
            f'<span class="phase{_PHASES.index(p)}" style="width:{100 * s / longest:.2f}%"></span>'
            for p, s in mean.items()
        )
        head = f"<span>{name(i, run, len(runs)) if len(runs) > 1 else 'a step'}</span>"
        lines.append(f'{head}<span>{sum(mean.values()):.3g} s</span><div class="bar">{spans}</div>')
    rows = [(p.replace("_", " "), [f"{mean[p]:.3g}" if p in mean else "–" for mean in means]) for p in seen]
    bars = f'<div class="key">{key}</div><div class="phases">{"".join(lines)}</div>'
    return f"<h3>Seconds a step</h3>{bars}{results.by_run(runs, [('', rows)])}"


def _machines(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.machine))
    if not names:
        return ""
    rows = [
        (each, [results.plain(run.machine[each]) if each in run.machine else "–" for run in runs]) for each in names
    ]
    same = all(len(set(cells)) == 1 for _, cells in rows)
    shown = results.table((), [("", [(each, cells[:1]) for each, cells in rows])]) if same else None
    body = shown or results.by_run(runs, [("", rows)])
    return f"<details><summary><h2>Machine</h2></summary>{body}</details>"
