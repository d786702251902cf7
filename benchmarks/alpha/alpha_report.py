"""Write the tables and pictures of the comparison from the results of its runs.

python benchmarks/alpha/alpha_report.py          # writes tables.md and two pictures into benchmarks/results/alpha
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import alpha_grid as grid
import matplotlib as mpl
import store
from exact import KS
from train_one import ALPHAS, BARE, BASE, LIKELIHOOD, METHODS

mpl.use("Agg")
import matplotlib.pyplot as plt

Result = dict[str, Any]
ORDER = (BASE, *METHODS, LIKELIHOOD)
DRAWN = tuple(each for each in ORDER if each not in BARE)  # in the pictures
SPLITS = {"train": "prompts of training", "test": "test prompts", "test, rare": "test prompts whose Z is below .02"}
LEVELS = (0.2, 0.25, 0.3, 0.35, 0.4)
T975 = {2: 12.706, 3: 4.303}  # the 97.5% quantile of Student's t for a mean of 2 or 3 values
COLORS = {**{f"alpha={a:g}": plt.get_cmap("viridis")(i / 6) for i, a in enumerate(ALPHAS)}, BASE: "black",
          LIKELIHOOD: "grey", "reinforce": "red", "maxrl": "orange", "gspo": "magenta", "vargrad": "brown",
          "kl_control": "deeppink", "gdc++ offline": "deepskyblue"}  # fmt: skip

MARKERS = dict(zip(DRAWN, "os^vDPX*<>hpdx", strict=False))  # so that colour alone does not tell the methods apart


def label(method: str) -> str:
    """Return the name of a method as the pictures have it."""
    return method.replace("alpha=", "α = ")


def passes(k: int) -> Callable[[Result], float]:
    """Return a function that reads pass@k from the measures of a split."""
    return lambda measures: float(measures["pass"][KS.index(k)])


def distinct(measures: Result) -> float:
    """Return the number of different right answers among 256."""
    return float(measures["distinct"][-1])


COLUMNS: dict[str, tuple[Callable[[Result], float], str]] = {
    **{f"pass@{k}": (passes(k), ".3f") for k in KS},
    "distinct@256": (distinct, ".1f"),
    "KL(p‖π)": (lambda m: float(m["kl_target_policy"]), ".2f"),
    "KL(p‖π_v)": (lambda m: float(m["kl_target_right"]), ".2f"),
    "KL(π_v‖p)": (lambda m: float(m["kl_right_target"]), ".2f"),
}


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean over seeds and its standard error, which is NaN for one seed."""
    kept = list(values)
    error = statistics.stdev(kept) / math.sqrt(len(kept)) if len(kept) > 1 else math.nan
    return statistics.fmean(kept), error


def shown(values: Iterable[float], form: str) -> str:
    """Return the mean of values with its standard error as text."""
    mean, error = mean_and_error(values)
    return f"{mean:{form}}" + ("" if math.isnan(error) else f" ± {error:{form}}")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)) + "\n"


class Runs:
    """The results below a folder."""

    def __init__(self, folder: Path) -> None:
        results = store.read(folder)
        self.failed = sorted(name for name in results if name.endswith(grid.FAILED))
        self.found = {name: result for name, result in results.items() if name not in self.failed}
        bases = {result["base"] for result in self.found.values()}
        if len(bases) > 1:
            raise ValueError(f"{folder} holds runs from {len(bases)} different bases, which can't be compared: {bases}")

    def settings(self, method: str) -> dict[str, tuple[float, float | None]]:
        """Return the best rate and beta of a method for each measure by which they are chosen."""
        return {by: (0.0, None) for by in grid.CHOICES} if method == BASE else grid.chosen(self.found, method)

    def chosen(self, method: str, by: str) -> dict[int, Result]:
        """Return the runs of a method at its chosen rate, by seed."""
        if by not in self.settings(method):
            return {}
        rate, beta = self.settings(method)[by]
        same = (r for r in self.found.values() if (r["method"], r["rate"], r["beta"]) == (method, rate, beta))
        return {result["seed"]: result for result in same}


def setting(rate: float, beta: float | None) -> str:
    """Return a rate and a beta as text."""
    return f"{rate:g}" + ("" if beta is None else f", β = {beta:g}") if rate else ""


def rates_table(runs: Runs) -> str:
    """Return a table with the validation pass@1 and pass@64 of every run by which a rate was chosen."""
    rows = []
    for method in ORDER:
        of_method = [
            result
            for result in runs.found.values()
            if result["method"] == method and result["seed"] == grid.SEEDS[0] and method != BASE
        ]
        best = runs.settings(method)
        for result in sorted(of_method, key=lambda r: (r["beta"] or 0, r["rate"])):
            own = (result["rate"], result["beta"])
            marks = ", ".join(by for by in grid.CHOICES if best.get(by) == own)
            values = [f"{passes(k)(result['end']['validation']):.3f}" for k in (1, 64)]
            rows.append([method, setting(*own), *values, marks])
    return table(("method", "rate", "pass@1", "pass@64", "the best in"), rows)


def rare_table(runs: Runs) -> str:
    """Return a table of the test prompts on which the base is rarely right, for every rate of the first seed."""
    measures, rows = {"pass@1": passes(1), "pass@256": passes(256)}, []
    for method in ORDER:
        of_method = {
            result["rate"]: result["end"]["test, rare"]
            for result in runs.found.values()
            if (result["method"], result["seed"]) == (method, grid.SEEDS[0])
            and result["beta"] in (None, runs.settings(method)["pass@1"][1])
            and "test, rare" in result["end"]
        }
        for name, of in measures.items() if method != BASE and of_method else ():
            cells = (f"{of(of_method[rate]):.3f}" if rate in of_method else "" for rate in sorted(grid.RATES))
            rows.append([method, name, *cells])
    return table(("method", "measure", *(f"{rate:g}" for rate in sorted(grid.RATES))), rows)


def end_table(runs: Runs, split: str, by: str) -> str:
    """Return a table with all measures at the end of the runs, on one split, at the rates of one choice."""
    rows = []
    for method in ORDER:
        found = [r["end"][split] for r in runs.chosen(method, by).values() if split in r["end"]]
        if found:
            values = [shown(map(of, found), form) for of, form in COLUMNS.values()]
            rows.append([method, setting(*runs.settings(method)[by]), str(len(found)), *values])
    return table(("method", "rate", "seeds", *COLUMNS), rows)


def at_level(curve: Sequence[Result], split: str, level: float, of: Callable[[Result], float]) -> float:
    """Return a measure where pass@1 first reaches a level, on a line between two evaluations; NaN if it never does."""
    for before, after in itertools.pairwise(curve):
        low, high = (passes(1)(each[split]) for each in (before, after))
        if low < level <= high:
            share = (level - low) / (high - low)
            return (1 - share) * of(before[split]) + share * of(after[split])
    return math.nan


def level_table(runs: Runs, split: str, name: str, of: Callable[[Result], float], form: str) -> str:
    """Return a table with a measure at fixed pass@1, on the way of the runs at the rate of the best pass@1."""
    start = [r["curve"][0] for r in runs.chosen(BASE, "pass@1").values()]
    rows = []
    for method in ORDER:
        found = [] if method == BASE else [r["curve"] for r in runs.chosen(method, "pass@1").values()]
        if found and start:
            values = [[at_level([*start, *curve], split, level, of) for curve in found] for level in LEVELS]
            whole = [shown(row, form) if not any(map(math.isnan, row)) else "" for row in values]
            rows.append([method, *whole])
    return table((f"{name} where pass@1 is", *(f"{level:g}" for level in LEVELS)), rows)


def difference(runs: Runs, first: str, second: str, split: str, of: Callable[[Result], float], form: str) -> str:
    """Return the difference of two methods over the seeds of both, with its 95% interval, as text.

    The text is empty if there is no seed that both have.
    """
    a, b = runs.chosen(first, "pass@1"), runs.chosen(second, "pass@1")
    values = [
        of(a[seed]["end"][split]) - of(b[seed]["end"][split]) for seed in a if seed in b and split in a[seed]["end"]
    ]
    if not values:
        return ""
    mean, error = mean_and_error(values)
    half = error * T975[len(values)] if len(values) in T975 else math.nan
    return f"{mean:+{form}}" + ("" if math.isnan(half) else f" ± {half:{form}}")


def claims(runs: Runs) -> str:
    """Return a table with the differences that the claims are about."""
    pairs = [
        ("alpha=0", "reinforce"), ("alpha=0", "alpha=0.5"), ("alpha=0", "alpha=0.9"), ("alpha=0", "alpha=0.999"),
        ("alpha=0.5", "alpha=0.9"), ("alpha=0.5", "reinforce"), ("alpha=0.75", "alpha=0.5"),
        ("alpha=0.75", "alpha=0.9"), ("alpha=0.75", "reinforce"), ("alpha=0.75", "maxrl"), ("alpha=0.9", "reinforce"),
        ("alpha=0.999", "reinforce"), ("alpha=0", "gdc++ offline"), ("alpha=0", "maxrl"), ("alpha=0", LIKELIHOOD),
    ]  # fmt: skip
    rows = []
    for split in SPLITS:
        for first, second in pairs:
            measures = (passes(1), ".3f"), (passes(256), ".3f"), (distinct, ".1f")
            values = [difference(runs, first, second, split, of, form) for of, form in measures]
            if any(values):
                rows.append([split, f"{first} less {second}", *values])
    return table(("prompts", "difference", "pass@1", "pass@256", "distinct@256"), rows)


def inversions(runs: Runs, split: str, of: Callable[[Result], float]) -> str:
    """Return as text the number of pairs of alphas of which the larger one has the larger mean."""
    means = [
        statistics.fmean(map(of, found))
        for a in ALPHAS
        if (found := [r["end"][split] for r in runs.chosen(f"alpha={a:g}", "pass@1").values() if split in r["end"]])
    ]  # fmt: skip
    pairs = [(i, j) for j in range(len(means)) for i in range(j)]
    return f"{sum(means[j] > means[i] for i, j in pairs)} of {len(pairs)}"


def front_table(runs: Runs) -> str:
    """Return a table that shows how the measures change with alpha."""
    measures = {"pass@1": passes(1), "pass@16": passes(16), "pass@256": passes(256), "distinct@256": distinct}
    rows = [[split, *(inversions(runs, split, of) for of in measures.values())] for split in SPLITS]
    return table(("pairs of α of which the larger has more", *measures), rows)


def front(runs: Runs, path: Path) -> None:
    """Draw coverage against precision: the way of each run at the rate of the best pass@1, and its end."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 9), constrained_layout=True)
    start = [r["curve"][0] for r in runs.chosen(BASE, "pass@1").values()]
    for row, split in zip(axes, ("train", "test"), strict=True):
        for axis, (name, of) in zip(row, {"pass@256": passes(256), "distinct@256": distinct}.items(), strict=True):
            for method in DRAWN:
                found = [[*start, *r["curve"]] if method != BASE else start
                         for r in runs.chosen(method, "pass@1").values()]  # fmt: skip
                if not found:
                    continue
                x, y = (
                    [statistics.fmean(g(curve[i][split]) for curve in found) for i in range(len(found[0]))]
                    for g in (passes(1), of)
                )
                dashed = "-" if method.startswith("alpha") else "--"
                axis.plot(x, y, dashed, color=COLORS[method], linewidth=1, alpha=0.7)
                axis.plot(x[-1], y[-1], MARKERS[method], color=COLORS[method], label=label(method))
            axis.set(xlabel="pass@1", ylabel=name, title=f"{split}: 32 prompts, from the base to the end")
    # inside a panel it would hide a mark
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=7)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def pass_at_k(runs: Runs, path: Path) -> None:
    """Draw pass@k over k."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
    for axis, split in zip(axes, SPLITS, strict=True):
        for method in DRAWN:
            found = [r["end"][split]["pass"] for r in runs.chosen(method, "pass@1").values() if split in r["end"]]
            if found:
                means = [statistics.fmean(column) for column in zip(*found, strict=True)]
                line = ("-" if method.startswith("alpha") else "--") + MARKERS[method]
                axis.plot(KS, means, line, color=COLORS[method], label=label(method), markersize=4)
        axis.set(xscale="log", xlabel="k", ylabel="pass@k", title=SPLITS[split])
        axis.set_xticks(KS, [str(k) for k in KS])
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


ABOUT = """# Precision and coverage of the α-divergences: tables

`python benchmarks/alpha/alpha_report.py` wrote this page from {done} runs of {of}. Figures with ± are means over
seeds with their standard errors. A rate is chosen with seed {seed} on the validation prompts. Every measure is exact
for a policy. [docs/alpha.md](../../../docs/alpha.md) says what was asked and what came out.
"""


def written(runs: Runs) -> str:
    """Return the text of tables.md."""
    plan = {each.name for stage in grid.STAGES for each in stage(runs.found)}
    parts = [ABOUT.format(done=len(runs.found), of=max(len(plan), len(runs.found)), seed=grid.SEEDS[0])]
    if runs.failed:
        parts.append(f"{len(runs.failed)} runs failed: {', '.join(runs.failed)}.\n")
    parts.append("## Rates (validation prompts, first seed)\n\n" + rates_table(runs))
    words = SPLITS["test, rare"]
    parts.append(f"## The same rates on the {words} (first seed)\n\n" + rare_table(runs))
    for by in grid.CHOICES:
        for split, words in SPLITS.items():
            parts.append(f"## At the end, at the rates of the best {by}: {words}\n\n" + end_table(runs, split, by))
    parts.append("## How the measures go with α\n\n" + front_table(runs))
    parts.append("## Differences at the rates of the best pass@1 (95% interval over seeds)\n\n" + claims(runs))
    for split in ("train", "test"):
        words = f"## At fixed pass@1, on the way: {SPLITS[split]}\n\n"
        measures = {"pass@256": (passes(256), ".3f"), "distinct@256": (distinct, ".1f")}
        tables = (level_table(runs, split, name, of, form) for name, (of, form) in measures.items())
        parts.append(words + "\n".join(tables))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=grid.RESULTS / "runs")
    parser.add_argument("--out", type=Path, default=grid.RESULTS)
    options = parser.parse_args()
    runs = Runs(options.runs)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "tables.md").write_text(written(runs), encoding="utf-8")
    front(runs, options.out / "front.png")
    pass_at_k(runs, options.out / "pass_at_k.png")
    print(f"wrote {options.out / 'tables.md'} and its pictures from {len(runs.found)} runs")


if __name__ == "__main__":
    main()
