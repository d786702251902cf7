"""Tables and figures of the paper's experiments, from the JSON of whatever runs are there.

    python benchmarks/paper/report.py        # writes results/paper/tables.md and results/paper/*.png

A figure per task in the form of the paper's (E[phi], KL(p||pi), KL(pi||a), Self-BLEU-5, Distinct-1 against sequences,
mean and standard error over seeds), the claims with their figures, the batch sizes, the variances, the variants.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grid
import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

Result = dict[str, Any]
NAMES = {
    "reinforce": "REINFORCE", "reinforce_p": "REINFORCE-P(x)", "kl_control": "KL-control (sequence-level PPO)",
    "gdc": "GDC", "gdc++": "GDC++", "js": "JS", "tv": "TV", "gdc_mean": "GDC, running mean", "base": "a",
    "gdc_loo": "GDC on-policy, leave-one-out", "gdc++_on_policy": "GDC++ on-policy",
    "gdc++_clip": "GDC++, weights within ±10", "gdc++_fresh": "GDC++, q checked on fresh samples",
}  # fmt: skip
COLORS = dict(zip(grid.MAIN, ("C3", "C1", "C2", "C0", "C4"), strict=True))
MEASURES = (("phi", "E[φ]"), ("kl_exact", "KL(p‖π), nats"), ("kl_policy_base", "KL(π‖a), nats"),
            ("self_bleu_5", "Self-BLEU-5"), ("distinct_1", "Distinct-1"))  # fmt: skip


class Runs:
    """All results of a folder, by part, task, method and batch size; the evaluations of a run begin with the base's."""

    def __init__(self, folder: Path) -> None:
        self.found: dict[tuple[str, str, str, int], dict[int, Result]] = defaultdict(dict)
        for path in sorted(folder.glob("*/*.json")):
            result = json.loads(path.read_text())
            for evaluation in result["evaluations"]:  # JSON has no NaN
                evaluation.update({key: math.nan for key, value in evaluation.items() if value is None})
            part = path.parent.name.replace("quick", "main")
            if part != "tuning":
                self.found[part, result["task"], result["method"], result["batch"]][result["seed"]] = result

    def of(self, part: str, task: str, method: str, batch: int = 256) -> dict[int, Result]:
        """By seed."""
        return self.found.get((part, task, method, batch), {})

    def curve(self, result: Result) -> list[dict[str, Any]]:
        """Its evaluations."""
        before = self.of("base", result["task"], "base").get(result["seed"])
        return [*(before["evaluations"] if before else []), *result["evaluations"]]


def wanted(task: str) -> dict[str, float]:
    """E_p of each feature of a task: the moments' values, 1 for a pointwise constraint."""
    state = json.loads((grid.RESULTS / "targets" / f"{task}.json").read_text())
    moments = dict(zip(state["target"]["moment_names"], state["target"]["moment_values"], strict=True))
    return {name: moments.get(name, 1.0) for name in state["base_rates"]}


def satisfaction(task: str, evaluation: Mapping[str, Any]) -> float:
    """Mean distance of E_pi[phi] from what is wanted, over a task's features: 0 is best."""
    values = wanted(task)
    return sum(abs(evaluation[f"phi/{name}"] - value) for name, value in values.items()) / len(values)


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Over seeds; the error is NaN for one."""
    kept = list(values)
    if not kept:
        return math.nan, math.nan
    mean = sum(kept) / len(kept)
    variance = sum((v - mean) ** 2 for v in kept) / (len(kept) - 1) if len(kept) > 1 else math.nan
    return mean, math.sqrt(variance / len(kept))


def shown(values: Iterable[float], form: str = ".3f") -> str:
    """As text."""
    mean, error = mean_and_error(values)
    if math.isnan(mean):
        return ""
    return format(mean, form) + ("" if math.isnan(error) else f" ± {error:{form}}")


# Student's t, 97.5%, for the 95% interval of a mean of n differences
_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[float, float, int]:
    """Mean of first - second over the seeds of both, half the width of its 95% interval, and how many."""
    differences = [first[seed] - second[seed] for seed in first if seed in second]
    mean, error = mean_and_error(differences)
    return mean, error * _T.get(len(differences), 1.96), len(differences)


def figure(runs: Runs, task: str, path: Path) -> None:
    """One task, in the paper's form: features, then the other measures, a line per method."""
    features = wanted(task)
    panels = [(f"phi/{name}", f"E[{name}]") for name in features] + list(MEASURES[1:])
    columns = min(len(panels), 5)
    rows = math.ceil(len(panels) / columns)
    drawing, axes = plt.subplots(
        rows, columns, figsize=(3.3 * columns, 2.9 * rows), constrained_layout=True, squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for method in grid.MAIN:
        results = runs.of("main", task, method)
        curves = [runs.curve(result) for result in results.values()]
        if not curves:
            continue
        for (key, _), axis in zip(panels, axes.flat, strict=False):
            length = min(map(len, curves))
            points = [mean_and_error(curve[i][key] for curve in curves) for i in range(length)]
            x = [e["samples"] for e in curves[0][:length]]
            means = [mean for mean, _ in points]
            axis.plot(x, means, color=COLORS[method], label=NAMES[method], linewidth=1.4, marker="o", markersize=2.5)
            if len(curves) > 1:
                low = [m - e for m, e in points]
                axis.fill_between(x, low, [m + e for m, e in points], color=COLORS[method], alpha=0.2, linewidth=0)
    for (key, title), axis in zip(panels, axes.flat, strict=False):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("sequences", fontsize=8)
        axis.tick_params(labelsize=8)
        if key.startswith("phi/"):
            axis.axhline(features[key[4:]], color="grey", linewidth=0.8, linestyle="--")
        elif key == "kl_exact":
            axis.set_yscale("log")  # what collapses lies a thousand times higher than what does not
        elif key == "kl_policy_base":
            axis.set_yscale("symlog", linthresh=0.1)
            axis.set_ylim(bottom=0)
            target = json.loads((grid.RESULTS / "targets" / f"{task}.json").read_text())
            axis.axhline(target["kl_target_base"]["value"], color="grey", linewidth=0.8, linestyle="--")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    drawing.suptitle(f"{task}: mean and standard error over seeds; dashed: the target p", fontsize=11)
    drawing.savefig(path, dpi=90)
    plt.close(drawing)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; nothing where there are no rows."""
    rows = list(rows)
    if not rows:
        return ""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def last(results: Mapping[int, Result], key: str | Callable[[Result], float]) -> dict[int, float]:
    """A measure at the end of each seed's run."""
    return {seed: key(r) if callable(key) else r["evaluations"][-1][key] for seed, r in results.items()}


def distance(result: Result) -> float:
    """``satisfaction`` at the end."""
    return satisfaction(result["task"], result["evaluations"][-1])


def targets() -> str:
    """What is known of the ten targets before any training."""
    rows = []
    for task in (*grid.GRID, "tuning"):
        state = json.loads((grid.RESULTS / "targets" / f"{task}.json").read_text())
        rates = ", ".join(
            f"{name} {rate['value']:.4f} ± {rate['stderr']:.4f}" for name, rate in state["base_rates"].items()
        )
        goal = ", ".join(f"{value:g}" for value in wanted(task).values())
        z, kl = state["log_z"], state["kl_target_base"]
        rows.append(
            (task, rates, goal, f"{z['value']:.3f} ± {z['stderr']:.3f}", f"{kl['value']:.3f} ± {kl['stderr']:.3f}")
        )
    return table(("task", "E_a[φ]", "E_p[φ]", "log Z", "KL(p‖a), nats"), rows)


def main_table(runs: Runs) -> str:
    """The end of all runs of the main grid."""
    rows = []
    for task in grid.GRID:
        for method in ("base", *grid.MAIN):
            results = runs.of("base" if method == "base" else "main", task, method)
            if not results:
                continue
            phi = ", ".join(shown(last(results, f"phi/{name}").values()) for name in wanted(task))
            rows.append((task, NAMES[method], str(len(results)), phi, *(shown(last(results, key).values()) for key in
                         ("kl_exact", "kl_policy", "kl_policy_base", "self_bleu_5", "distinct_1"))))  # fmt: skip
    header = ("task", "method", "seeds", "E_π[φ]", "KL(p‖π)", "the same by importance weights, x ~ π", "KL(π‖a)",
              "Self-BLEU-5", "Distinct-1")  # fmt: skip
    return table(header, rows)


def paired_table(runs: Runs) -> str:
    """GDC++ against GDC with common random numbers."""
    rows = []
    for task in grid.GRID:
        pair = [runs.of("main", task, method) for method in ("gdc++", "gdc")]
        if not all(pair):
            continue
        cells = []
        for key in ("kl_exact", distance, "kl_policy_base"):
            mean, half, n = paired(*(last(results, key) for results in pair))
            cells.append(f"{mean:+.3f} ± {half:.3f}" if n > 1 else f"{mean:+.3f}")
        rows.append((task, str(n), *cells))
    return table(("task", "seeds", "KL(p‖π)", "distance of E_π[φ] from what is wanted", "KL(π‖a)"), rows)


def late(result: Result, key: str, power: int = 1) -> list[float]:
    """What is logged now and then, raised to a power, after the first quarter of training."""
    values = result["history"].get(key, [])
    return [v**power for v in values[len(values) // 4 :] if v is not None]


def late_variance(result: Result, key: str) -> float:
    """The mean of that."""
    return mean_and_error(late(result, key))[0]


def claims(runs: Runs) -> str:
    """Each of the paper's claims with its figure."""
    compared = [task for task in grid.GRID if runs.of("main", task, "gdc") and runs.of("main", task, "gdc++")]
    if not compared:
        return ""

    def mean_of(task: str, method: str, key: Any) -> float:
        return mean_and_error(last(runs.of("main", task, method), key).values())[0]

    def wins(key: Any) -> list[str]:
        return [task for task in compared if mean_of(task, "gdc++", key) <= mean_of(task, "gdc", key)]

    def listed(tasks: Sequence[str]) -> str:
        others = [task for task in compared if task not in tasks]
        return f"{len(tasks)} of {len(compared)}" + (f"; not {', '.join(others)}" if others else "")

    rows = [
        ("GDC++ at or below GDC in KL(p‖π)", "10 of 10", listed(wins("kl_exact"))),
        ("GDC++ at or nearer than GDC to what is wanted of E[φ]", "7 of 10", listed(wins(distance))),
        ("GDC++ at or below GDC in KL(π‖a)", "10 of 10", listed(wins("kl_policy_base"))),
    ]
    for task in grid.STUDIED:
        cells = []
        for name, key, power in (("gradient", "gradient_variance", 1), ("advantage", "weight_std", 2)):
            plain, better = (
                [v for r in runs.of("main", task, m).values() for v in late(r, key, power)] for m in ("gdc", "gdc++")
            )
            if plain and better:
                of_means, of_medians = (f(plain) / f(better) for f in (statistics.mean, statistics.median))
                cells.append(f"{name} {of_means:.2f} (medians {of_medians:.2f})")
        rows.append((f"variance of GDC over GDC++ after a quarter, {task}", "above 1; here 2 is asked on the rare word",
                     ", ".join(cells)))  # fmt: skip
    both = [task for task in grid.GRID if runs.of("main", task, "reinforce") and runs.of("main", task, "gdc++")]
    doubled = [
        task
        for task in both
        if mean_of(task, "reinforce", "kl_policy_base") >= 2 * mean_of(task, "gdc++", "kl_policy_base")
    ]
    based = [task for task in both if runs.of("base", task, "base")]
    fallen = []
    for task in based:
        before = mean_and_error(last(runs.of("base", task, "base"), "distinct_1").values())[0]
        if mean_of(task, "reinforce", "distinct_1") < before:
            fallen.append(task)
    rows += [
        ("REINFORCE's KL(π‖a) is twice that of GDC++ or more", "all", f"{len(doubled)} of {len(both)}"),
        ("REINFORCE's Distinct-1 falls below the base's", "all", f"{len(fallen)} of {len(based)}"),
    ]
    everything = [result for by_seed in runs.found.values() for result in by_seed.values()]
    lost = [r for r in everything if not r["finite"]]
    rows.append(("no run ends in a NaN", "", f"{len(everything) - len(lost)} of {len(everything)} runs are finite"))
    return table(("claim", "in the paper", "here"), rows)


def batch_table(runs: Runs) -> str:
    """KL(p||pi) at the end over batch sizes, for the same sequences."""
    rows = []
    for task in grid.STUDIED:
        for batch in (64, 128, 256, 512):
            part = "main" if batch == 256 else "batch"
            results = [runs.of(part, task, method, batch) for method in ("gdc", "gdc++")]
            if any(results):
                rows.append(
                    (
                        task,
                        str(batch),
                        *(shown(last(r, key).values()) for key in ("kl_exact", distance) for r in results),
                    )
                )
    return table(("task", "B", "KL(p‖π) GDC", "GDC++", "distance of E_π[φ] GDC", "GDC++"), rows)


def variants_table(runs: Runs) -> str:
    """What goes beyond the paper, against GDC++ in pairs."""
    rows = []
    for task in grid.STUDIED:
        reference = runs.of("main", task, "gdc++")
        for method in ("gdc", "gdc++", *grid.VARIANTS):
            results = runs.of("main" if method in grid.MAIN else "variants", task, method)
            if not results:
                continue
            mean, half, n = paired(last(results, "kl_exact"), last(reference, "kl_exact"))
            against = "" if method == "gdc++" else f"{mean:+.3f} ± {half:.3f}" if n > 1 else f"{mean:+.3f}"
            variance = shown((late_variance(r, "gradient_variance") for r in results.values()), ".3g")
            kl, away, kl_base = (shown(last(results, key).values()) for key in ("kl_exact", distance, "kl_policy_base"))
            rows.append((task, NAMES[method], str(len(results)), kl, against, away, kl_base, variance))
    return table(("task", "", "seeds", "KL(p‖π)", "less that of GDC++ (95% interval)", "distance of E_π[φ]", "KL(π‖a)",
                  "gradient's variance"), rows)  # fmt: skip


def tuning_table(folder: Path) -> str:
    """The aim of each method at each learning rate, and what was chosen."""
    chosen, rows = grid.learning_rates(folder), []
    for method in grid.MAIN:
        cells = []
        for run in grid.tuning():
            path = folder / run.name
            if run.method == method:
                if not path.exists():
                    cells.append("")
                    continue
                result = json.loads(path.read_text())
                value, error = grid.score(result)
                text = f"{value:.3f} ± {error:.3f}; {result['evaluations'][-1]['kl_exact']:.2f}"
                cells.append(f"**{text}**" if chosen.get(method) == run.learning_rate else text)
        rows.append((NAMES[method], *cells))
    return table(("method: its own aim; KL(p‖π), nats", *(f"{rate:g}" for rate in grid.LEARNING_RATES)), rows)


def study_figure(runs: Runs, path: Path) -> None:
    """Variance of gradient and advantage over training, and the batch sizes, for the two tasks of the studies."""
    drawing, axes = plt.subplots(2, 3, figsize=(12, 6.5), constrained_layout=True)
    for row, task in zip(axes, grid.STUDIED, strict=True):
        for method in ("gdc", "gdc++"):
            results = list(runs.of("main", task, method).values())
            for axis, key, power in ((row[0], "gradient_variance", 1), (row[1], "weight_std", 2)):
                histories = [r["history"] for r in results if r["history"].get(key)]
                if not histories:
                    continue
                at = [i for i, v in enumerate(histories[0][key]) if v is not None]
                values = [mean_and_error(h[key][i] ** power for h in histories)[0] for i in at]
                x = [histories[0]["step"][i] * results[0]["batch"] for i in at]
                axis.plot(x, values, color=COLORS[method], label=NAMES[method], linewidth=1.3)
            points = []
            for batch in (64, 128, 256, 512):
                found = runs.of("main" if batch == 256 else "batch", task, method, batch)
                if found:
                    points.append((batch, *mean_and_error(last(found, "kl_exact").values())))
            if points:
                x, means, errors = zip(*points, strict=True)
                row[2].errorbar(x, means, [0 if math.isnan(e) else e for e in errors], color=COLORS[method],
                                label=NAMES[method], marker="o", markersize=3, capsize=2)  # fmt: skip
        for axis, title in zip(
            row, ("variance of the gradient", "variance of the advantage", "KL(p‖π) at the end"), strict=True
        ):
            axis.set_title(f"{task}: {title}", fontsize=10)
            axis.set_xlabel("sequences" if axis is not row[2] else "sequences in a step", fontsize=8)
            if axis.has_data():
                axis.set_yscale("log") if axis is not row[2] else axis.set_xscale("log", base=2)
                axis.legend(fontsize=8)
    drawing.savefig(path, dpi=90)
    plt.close(drawing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=grid.RESULTS / "runs")
    parser.add_argument("--out", type=Path, default=grid.RESULTS)
    parser.add_argument("--quick", action="store_true", help="of grid.py quick: prints its table, too")
    args = parser.parse_args()
    runs = Runs(args.runs)
    args.out.mkdir(parents=True, exist_ok=True)
    done = sum(len(by_seed) for by_seed in runs.found.values())
    sections = {
        "The targets": targets(),
        "Learning rates": tuning_table(args.runs),
        "Claims": claims(runs),
        "The main grid at the end of 20,480 sequences": main_table(runs),
        "GDC++ less GDC, in pairs (95% interval over seeds)": paired_table(runs),
        "Batch sizes": batch_table(runs),
        "Beyond the paper (at the learning rate of GDC++, not tuned for each)": variants_table(runs),
    }
    if args.quick:
        kept = ("The main grid at the end of 20,480 sequences", "GDC++ less GDC, in pairs (95% interval over seeds)")
        sections = {"At the end of 5,120 sequences, a quarter of a run": sections[kept[0]], kept[1]: sections[kept[1]]}
        print("\n".join(f"{title}\n\n{body}" for title, body in sections.items()))
    text = "# The paper's experiments: tables\n\nWritten by `python benchmarks/paper/report.py` from "
    text += f"{done} runs beside the tuning's. Mean ± standard error over seeds.\n"
    for title, body in ((title, body) for title, body in sections.items() if body):
        text += f"\n## {title}\n\n{body}"
    (args.out / "tables.md").write_text(text)
    for task in grid.GRID:
        if any(runs.of("main", task, method) for method in grid.MAIN):
            figure(runs, task, args.out / f"{task}.png")
    if runs.found and not args.quick:
        study_figure(runs, args.out / "studies.png")
    print(f"wrote {args.out / 'tables.md'} and its figures from {done} runs")


if __name__ == "__main__":
    main()
