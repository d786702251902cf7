"""Write the page: settings of the runs, results, plots, samples and machine.

The page has no script and loads nothing from outside."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from datetime import date
from html import escape
from typing import Any

from .. import __version__
from ..estimators import Estimate
from .curves import curves, legend
from .plots import COLORS, color, drawn, plots, svg
from .runs import Run

_SAMPLES = 8
_LIGHT = ("#0072b2", "#d55e00", "#008a66", "#b3478a", "#8a6d00", "#2f7fb8", "#555555", "#a0341f")
_DARK = ("#5ab4f0", "#ff9350", "#35d0a5", "#ec8fc8", "#e8c547", "#9bd0ff", "#c0c0c0", "#ff7f66")
_CSS = """
:root { color-scheme: light dark; --back: #fff; --ink: #1b1f23; --faint: #5c6670; --rule: #d8dde2; --card: #f6f8fa;
  LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --back: #14181c; --ink: #e4e8ec; --faint: #9aa5b0; --rule: #353c44; --card: #1c2228; DARK }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 110rem; padding: 1rem clamp(.75rem, 2.5vw, 2.5rem) 3rem; background: var(--back);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.45rem; margin: .3rem 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
h3 { font-size: .95rem; margin: 0; } p { margin: .3rem 0; } .faint, small { color: var(--faint); font-size: .85rem; }
.runs { list-style: none; padding: 0; margin: .6rem 0; display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; }
.run { white-space: nowrap; } .swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin-right: .45em; vertical-align: -.05em; }
.wide { overflow-x: auto; border: 1px solid var(--rule); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: left; padding: .28rem .7rem; border-top: 1px solid var(--rule); vertical-align: top; }
tr:first-child > * { border-top: 0; }
td { white-space: nowrap; } td details { margin: 0; white-space: normal; max-width: 26rem; } th { font-weight: 600; }
th, td { overflow-wrap: normal; }
tbody th { font-weight: 400; color: var(--faint); position: sticky; left: 0; background: var(--back);
  min-width: 6.5rem; }
tbody.group th[scope=rowgroup] { color: var(--ink); font-weight: 600; background: var(--card); position: static; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .7rem .8rem .4rem; border: 1px solid var(--rule); border-radius: 6px; }
figure svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.phases { display: grid; grid-template-columns: auto auto 1fr; gap: .35rem .8rem; align-items: center; }
.bar { display: flex; height: 1.1rem; } .bar span { min-width: 1px; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin-bottom: .5rem; }
.marks svg { vertical-align: -.1em; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
.samples section { border: 1px solid var(--rule); border-radius: 6px; padding: .7rem .9rem; }
.samples ol { margin: .4rem 0 0; padding: 0; list-style: none; } .samples li { white-space: pre-wrap; padding: .35rem 0;
  border-top: 1px solid var(--rule); font-size: .9rem; }
details { margin: .8rem 0; } summary { cursor: pointer; }
@media (max-width: 40rem) { body { font-size: 14px; } table { font-size: .8rem; } th, td { padding: .25rem .4rem; }
  tbody th { min-width: 4.5rem; } }
@media print { .wide { overflow: visible; } figure, section { break-inside: avoid; } }
"""
_PHASES = {"sampling": "#4e79a7", "scoring": "#f28e2b", "policy": "#59a14f", "check": "#e15759",
           "gradient_variance": "#b07aa1"}  # fmt: skip
_TITLES = {
    "kl_policy_base": "KL(π‖a), nats", "kl_policy": "KL(p‖π), nats", "distinct_1": "Distinct-1",
    "distinct_2": "Distinct-2", "distinct_3": "Distinct-3", "self_bleu_5": "Self-BLEU-5", "length": "tokens",
    "finished": "ended in EOS", "truncated": "cut off",
}  # fmt: skip


def page(runs: Sequence[Run]) -> str:
    """Return the HTML of one or more runs."""
    colors = ("".join(f"--run{i}: {c};" for i, c in enumerate(each)) for each in (_LIGHT, _DARK))
    css = _CSS.replace("LIGHT", next(colors), 1).replace("DARK", next(colors), 1)
    title = "dmfast: " + (runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
    panels = plots(runs)
    figures = [
        f"<figure><h3>{escape(panel.title)}</h3>{svg(panel, runs, i)}"
        f'<figcaption class="faint">{escape(panel.note)}</figcaption></figure>'
        for i, panel in enumerate(panels)
    ]
    right = [
        f"<figure><h3>{escape(curve.title)}</h3>{drawn(curve.draw, curve.title, len(panels) + i)}"
        f'<figcaption class="faint">{escape(curve.note)}</figcaption></figure>'
        for i, curve in enumerate(curves(runs))
    ]
    if right:
        right = ["<h2>Right answers</h2>", legend(runs), '<div class="plots">', *right, "</div>"]
    names = "".join(f"<li>{_name(i, run)} <small>{escape(str(run.source))}</small></li>" for i, run in enumerate(runs))
    return "\n".join([
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>",
        f'<p class="faint">dmfast {__version__}, {date.today().isoformat()}</p>\n<ul class="runs">{names}</ul>',
        "<h2>Results</h2>", _summary(runs),
        *right, '<h2>Over the steps</h2>\n<div class="plots">', *figures, "</div>",
        _phases(runs), _samples(runs), _machines(runs), "</body>\n</html>\n",
    ])  # fmt: skip


def _name(number: int, run: Run) -> str:
    return f'<span class="run"><span class="swatch" style="background:{color(number)}"></span>{escape(run.name)}</span>'


def _table(runs: Sequence[Run], groups: Sequence[tuple[str, Sequence[tuple[str, Sequence[str]]]]]) -> str:
    """Return a table of groups of rows with a column per run, or without runs one column for all.

    The cells are HTML already."""
    head = "".join(f'<th scope="col">{_name(i, run)}</th>' for i, run in enumerate(runs))
    parts = [f"<thead><tr><td></td>{head}</tr></thead>"] if runs else []
    for title, rows in groups:
        if not rows:
            continue
        parts.append('<tbody class="group">')
        if title:
            parts.append(f'<tr><th scope="rowgroup" colspan="{len(runs) + 1}">{escape(title)}</th></tr>')
        for name, cells in rows:
            shown = "".join(f"<td>{cell}</td>" for cell in cells)
            label = re.sub(r"([._])", r"\1<wbr>", escape(name))
            parts.append(f'<tr><th scope="row">{label}</th>{shown}</tr>')
        parts.append("</tbody>")
    return f'<div class="wide" tabindex="0"><table>{"".join(parts)}</table></div>'


def _estimate(found: Estimate | None) -> str:
    if found is None or not math.isfinite(found.value):
        return "–"
    return str(found) if found.stderr > 0 else f"{found.value:.4g}"  # NaN: not estimated; 0: known


def _plain(value: Any) -> str:
    as_it_is = isinstance(value, str) and value.isprintable() and value.strip()
    text = value if as_it_is else json.dumps(value, ensure_ascii=False)
    if len(text) <= 60:
        return escape(text)
    return f"<details><summary>{escape(text[:24])}…</summary>{escape(text)}</details>"


def _summary(runs: Sequence[Run]) -> str:
    def row(title: str, cell: Callable[[Run], str]) -> tuple[str, list[str]]:
        return title, [cell(run) for run in runs]

    def measured(title: str, of: Sequence[dict[str, Estimate]], name: str) -> tuple[str, list[str]]:
        return title, [_estimate(each.get(name)) for each in of]

    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    value = {name: [_plain(run.settings[name]) if name in run.settings else "–" for run in runs] for name in names}
    differ = [(name, value[name]) for name in names if len(set(value[name])) > 1]
    alike = [(name, value[name]) for name in names if len(set(value[name])) == 1]
    groups: list[tuple[str, Sequence[tuple[str, Sequence[str]]]]] = []
    before, after, ideal = [r.before for r in runs], [r.after for r in runs], [r.ideal for r in runs]
    seen = dict.fromkeys(name for each in (*before, *after) for name in each)
    order = ["phi", *_TITLES]
    for name in sorted(seen, key=lambda name: order.index(key) if (key := name.split("/")[0]) in order else len(order)):
        title = f"E[{name[4:]}]" if name.startswith("phi/") else _TITLES.get(name, name)
        rows = [measured("before", before, name), measured("after", after, name)]
        if any(name in each for each in ideal):
            rows.append(measured("target p", ideal, name))
        groups.append((title, rows))

    def last(run: Run, key: str) -> str:
        values = run.series(key)[1]
        return f"{values[-1]:.4g}" if values else "–"

    groups.append((
        "training",
        [
            row("steps", lambda run: f"{run.steps[-1]['step']:g}"),
            row("swaps of q", lambda run: str(run.swaps)),
            row("KL(p‖π), last", lambda run: last(run, "kl_policy")),
            row("KL(p‖q), last", lambda run: last(run, "kl_proposal")),
            row("ESS, last", lambda run: last(run, "ess")),
            row("seconds", lambda run: "–" if run.seconds is None else f"{run.seconds:.4g}"),
        ],
    ))  # fmt: skip
    groups.append(("settings that differ", differ) if len(runs) > 1 else ("settings", alike))
    found = _table(runs, groups)
    if alike and len(runs) > 1:
        shown = _table((), [("", [(name, cells[:1]) for name, cells in alike])])
        found += f"<details><summary>Settings of all runs ({len(alike)})</summary>{shown}</details>"
    return found


def _phases(runs: Sequence[Run]) -> str:
    """Return the mean seconds of a step as bars of one scale."""
    means = []
    for run in runs:
        found = {name: run.series(f"seconds_{name}")[1] for name in _PHASES}
        # a phase that only some of the steps have counts with its share of the mean step
        means.append({name: sum(values) / len(run.steps) for name, values in found.items() if values})
    longest = max((sum(mean.values()) for mean in means), default=0.0)
    if not longest > 0:
        return ""
    seen = [name for name in _PHASES if any(name in mean for mean in means)]
    key = "".join(
        f'<span><span class="swatch" style="background:{_PHASES[n]}"></span>{n.replace("_", " ")}</span>' for n in seen
    )
    lines = []
    for i, (run, mean) in enumerate(zip(runs, means, strict=True)):
        spans = "".join(
            f'<span style="width:{100 * s / longest:.2f}%;background:{_PHASES[n]}"></span>' for n, s in mean.items()
        )
        lines.append(f'{_name(i, run)}<span>{sum(mean.values()):.3g} s</span><div class="bar">{spans}</div>')
    rows = [(n.replace("_", " "), [f"{mean[n]:.3g}" if n in mean else "–" for mean in means]) for n in seen]
    bars = f'<div class="key">{key}</div><div class="phases">{"".join(lines)}</div>'
    return f"<h2>Seconds a step</h2>{bars}<details><summary>By phase</summary>{_table(runs, [('', rows)])}</details>"


def _samples(runs: Sequence[Run]) -> str:
    def section(title: str, texts: Sequence[str]) -> str:
        items = "".join(f"<li>{escape(text.strip())}</li>" for text in texts[:_SAMPLES])
        return f"<section><h3>{title}</h3><ol>{items}</ol></section>"

    parts = []
    before = [run.samples_before for run in runs if run.samples_before]
    one = len(before) > 0 and all(each == before[0] for each in before)
    if one:
        parts.append(section("before", before[0]))
    for i, run in enumerate(runs):
        if run.samples_before and not one:
            parts.append(section(f"before: {_name(i, run)}", run.samples_before))
        if run.samples_after:
            parts.append(section(f"after: {_name(i, run)}", run.samples_after))
    return f'<h2>Samples</h2><div class="samples">{"".join(parts)}</div>' if parts else ""


def _machines(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.machine))
    if not names:
        return ""
    rows = [(name, [_plain(run.machine[name]) if name in run.machine else "–" for run in runs]) for name in names]
    same = all(len(set(cells)) == 1 for _, cells in rows)
    shown = [(name, cells[:1]) for name, cells in rows] if same else rows
    return f"<h2>Machine</h2>{_table(() if same else runs, [('', shown)])}"


assert len(_LIGHT) == len(_DARK) == COLORS
