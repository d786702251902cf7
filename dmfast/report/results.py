"""Write what runs came to: the verdict, measures before and after beside the target, figures of training, settings."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from ..estimators import Estimate, rounded, to_show
from .marks import name, short
from .runs import Run

Rows = Sequence[tuple[str, Sequence[str]]]  # HTML of the head of each row, HTML of its cells
TITLES = {
    "kl_policy_base": "KL(π‖a), nats", "kl_policy": "KL(p‖π), nats", "distinct_1": "Distinct-1",
    "distinct_2": "Distinct-2", "distinct_3": "Distinct-3", "self_bleu_5": "Self-BLEU-5", "length": "tokens",
    "finished": "ended in EOS", "truncated": "cut off",
}  # fmt: skip
_MISSING = "–"
_CHIPS = 4  # so many settings that differ are shown beside the name of a run


def number(value: float) -> str:
    """Return a number with four digits."""
    return f"{value:.4g}"


def estimate(found: Estimate | None) -> str:
    """Return a value with as many digits as its standard error allows, by the rule of ``to_show``."""
    if found is None or not math.isfinite(found.value):
        return _MISSING
    found = to_show(found)
    if not found.stderr:
        return number(found.value)
    digits = 1 - math.floor(math.log10(found.stderr))
    if digits < 0:
        return f"{found.value:.4g} ±\u00a0{found.stderr:.2g}"
    return f"{found.value:.{digits}f} ±\u00a0{found.stderr:.{digits}f}"


def table(head: Sequence[str], groups: Sequence[tuple[str, Rows]]) -> str:
    """Return a table of groups of rows.

    Args:
        head: HTML of the heads of all columns but the first, or nothing.
        groups: a title, or "" for none, and rows.
    """
    columns = "".join(f'<th scope="col">{each}</th>' for each in head)
    parts = [f"<thead><tr><td></td>{columns}</tr></thead>"] if head else []
    for title, rows in groups:
        if not rows:
            continue
        parts.append("<tbody>")
        if title:
            parts.append(f'<tr><th scope="rowgroup" colspan="{len(rows[0][1]) + 1}">{escape(title)}</th></tr>')
        for label, cells in rows:
            parts.append(f'<tr><th scope="row">{label}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
        parts.append("</tbody>")
    return (
        f'<div class="frame"><div class="wide" tabindex="0"><table>{"".join(parts)}</table></div>'
        '<p class="hint faint">The table goes on to the side: scroll it. →</p></div>'
    )


def by_run(runs: Sequence[Run], groups: Sequence[tuple[str, Rows]]) -> str:
    """Return a table with a column per run."""
    return table([short(i, run) for i, run in enumerate(runs)] if len(runs) > 1 else [], groups)


def label(text: str) -> str:
    """Return HTML of a dotted name that may be broken at its dots."""
    return re.sub(r"([._])", r"\1<wbr>", escape(text))


def plain(value: Any) -> str:
    """Return HTML of a setting; a long one is folded."""
    as_it_is = isinstance(value, str) and value.isprintable() and value.strip()
    text = value if as_it_is else json.dumps(value, ensure_ascii=False)
    if len(text) <= 60:
        return escape(text)
    return f"<details><summary>{escape(text[:24])}…</summary>{escape(text)}</details>"


def verdicts(runs: Sequence[Run]) -> str:
    """Return HTML with what each run says of itself."""
    parts, criteria = [], []
    for i, run in enumerate(runs):
        said, _, criterion = run.verdict.partition(" Criterion: ")
        if criterion:
            criteria.append(criterion)
        kind, sign = next((v for start, v in _SAID.items() if said.startswith(start)), ("", ""))
        first, colon, rest = said.partition(": ")
        shown = f"<strong>{sign}{escape(first)}{colon}</strong>{escape(rest)}" if said else f"<strong>{_NONE}</strong>"
        title = f"<h3>{name(i, run, len(runs))}</h3>" if len(runs) > 1 else ""
        parts.append(f'<section class="{kind}">{title}<p>{shown}</p></section>')
    below = "".join(f'<p class="faint">Criterion: {escape(each)}</p>' for each in dict.fromkeys(criteria))
    return f'<div class="verdicts">{"".join(parts)}</div>{below}'


_SAID = {"The policy matches the target": ("yes", "✓ "), "The run did not come to its target": ("no", "✗ "),
         "Whether the policy matches the target is unknown": ("", "? ")}  # fmt: skip
_NONE = (
    "No verdict: the file of this run has none. dmfast train and dmfast demo write one into log.json, "
    "and in Python trainer.verdict() returns one."
)


def measures(runs: Sequence[Run]) -> str:
    """Return a table of what was measured on fresh samples: before, after, and of p. Each run has a row of its own."""
    seen = dict.fromkeys(name for run in runs for each in (run.before, run.after) for name in each)
    if not seen:
        return ""
    order = ["phi", *TITLES]

    def place(key: str) -> int:
        kind = key.partition("/")[0]
        return order.index(kind) if kind in order else len(order)

    groups: list[tuple[str, Rows]] = []
    for key in sorted(seen, key=place):
        title = f"E[{key[4:]}]" if key.startswith("phi/") else TITLES.get(key, key)
        cells = [
            [_measured(found, key) for found in (run.before, run.after, run.ideal)]
            for run in runs
        ]  # fmt: skip
        if len(runs) == 1:
            groups.append(("", [(escape(title), cells[0])]))
        else:
            rows = [(name(i, run, len(runs)), cells[i]) for i, run in enumerate(runs)]
            groups.append((title, [row for row in rows if set(row[1]) != {_MISSING}]))
    if len(runs) == 1:
        groups = [("", [row for _, rows in groups for row in rows])]
    return (
        table(["before", "after", "target p"], groups) + '<p class="faint">On fresh samples; ± one standard error.</p>'
    )


def _measured(found: dict[str, Estimate], key: str) -> str:
    """Return the estimate, and "unknown" for a KL that the samples don't tell."""
    if key.startswith("kl_") and key in found and math.isnan(found[key].value):
        return "unknown"
    return estimate(found.get(key))


def training(runs: Sequence[Run]) -> str:
    """Return a table of figures of the training itself."""

    def row(title: str, cell: Callable[[Run], str]) -> tuple[str, list[str]]:
        return title, [cell(run) for run in runs]

    def last(key: str) -> Callable[[Run], str]:
        def cell(run: Run) -> str:
            entry = run.steps[-1]
            if key in entry and not math.isfinite(math.nan if entry[key] is None else entry[key]):
                return "unknown"
            values = run.series(key)[1]
            return number(rounded(values[-1])) if values else _MISSING

        return cell

    rows = [
        row("steps", lambda run: f"{run.steps[-1]['step']:g}"),
        row("seconds", lambda run: _MISSING if run.seconds is None else number(run.seconds)),
        row("swaps of q", lambda run: str(run.swaps)),
        row("KL(p‖π), last step", last("kl_policy")),
        row("KL(p‖q), last step", last("kl_proposal")),
        row("ESS, last step", last("ess")),
    ]
    return by_run(runs, [("", rows)])


def _settings(runs: Sequence[Run]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the settings that differ and those that do not: HTML of the values by name."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    value = {name: [plain(run.settings[name]) if name in run.settings else _MISSING for run in runs] for name in names}
    differ = {name: cells for name, cells in value.items() if len(set(cells)) > 1}
    return differ, {name: cells for name, cells in value.items() if name not in differ}


def chips(runs: Sequence[Run]) -> list[str]:
    """Return for each run HTML of the few settings by which it differs from the others."""
    differ, _ = _settings(runs)
    if len(differ) > _CHIPS:
        return [f'<a class="chip" href="#settings">{len(differ)} settings differ</a>' for _ in runs]
    return [
        " ".join(f'<span class="chip">{label(key)} {cells[i]}</span>' for key, cells in differ.items())
        for i in range(len(runs))
    ]


def settings(runs: Sequence[Run]) -> str:
    """Return the settings, folded: those that differ with a column per run, then the others."""
    differ, alike = _settings(runs)
    if not differ and not alike:
        return ""
    count = f"{len(differ)} differ, {len(alike)} do not" if len(runs) > 1 else str(len(alike))
    parts = [f'<details><summary><h2>Settings</h2> ({count})</summary><div id="settings">']
    if differ:
        parts.append(by_run(runs, [("settings that differ", [(label(key), cells) for key, cells in differ.items()])]))
    if alike:
        title = "settings of all runs" if len(runs) > 1 else ""
        parts.append(table((), [(title, [(label(key), cells[:1]) for key, cells in alike.items()])]))
    return "".join([*parts, "</div></details>"])
