"""Write the tables and figures of the paper's experiments from the results that exist.

    python benchmarks/paper/report.py        # writes results/paper/tables.md and results/paper/*.png

There is one figure for each task, in the form of the paper's: E[phi], KL(p||pi), KL(pi||a), Self-BLEU-5 and Distinct-1
against the number of sequences, as mean and standard error over seeds. The tables give the claims with their figures,
the batch sizes, the variances and the variants.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grid
import matplotlib as mpl
import store
import truth

from dmfast.estimators import Estimate

mpl.use("Agg")
import matplotlib.pyplot as plt

Result = dict[str, Any]
NAMES = {
    "reinforce": "REINFORCE", "reinforce_p": "REINFORCE-P(x)", "kl_control": "KL-control (sequence-level PPO)",
    "gdc": "GDC", "gdc++": "GDC++", "js": "JS", "tv": "TV", "gdc_mean": "GDC, running mean", "base": "a",
    "gdc_loo": "GDC on-policy, leave-one-out", "gdc++_on_policy": "GDC++ on-policy",
    "gdc++_clip": "GDC++, weights within ±10", "gdc++_fresh": "GDC++, q checked on fresh samples",
}  # fmt: skip
BATCHES = (64, 128, 256, 512)
NORMAL = 1.959964  # this is the 97.5% quantile of the normal distribution
COLORS = dict(zip(grid.MAIN, ("C3", "C1", "C2", "C0", "C4"), strict=True))
MEASURES = (("phi", "E[φ]"), ("kl_exact", "KL(p‖π), nats"), ("kl_policy_base", "KL(π‖a), nats"),
            ("self_bleu_5", "Self-BLEU-5"), ("distinct_1", "Distinct-1"))  # fmt: skip


class Runs:
    """Hold all results of a folder, by part, task, method and batch size.

    The evaluations of a run begin with the base's. ``tuning`` holds the runs of the tuning by method and learning rate.
    ``failed`` holds the records of the runs that died.
    """

    def __init__(self, folder: Path) -> None:
        self.found: dict[tuple[str, str, str, int], dict[int, Result]] = defaultdict(dict)
        self.tuning: dict[tuple[str, float | None], Result] = {}
        self.failed: dict[str, Result] = {}
        results = store.read(folder)
        for name, result in results.items():
            if name.endswith(grid.FAILED):
                run = name.removesuffix(grid.FAILED)
                self.failed[run] = result | {"again": f"{run}.json" in results}
                continue
            with_best_log_z(result)
            # JSON has no NaN, and has null in its place
            for evaluation in result["evaluations"]:
                evaluation.update({key: math.nan for key, value in evaluation.items() if value is None})
            if "log_prob" in result:
                result["log_prob"] = [math.nan if value is None else value for value in result["log_prob"]]
            part = name.split("/")[0].replace("quick", "main")
            if part == "tuning":
                self.tuning[result["method"], result["settings"]["learning_rate"]] = result
            else:
                self.found[part, result["task"], result["method"], result["batch"]][result["seed"]] = result

    @property
    def done(self) -> int:
        """Return how many runs there are without those of the tuning."""
        return sum(len(by_seed) for by_seed in self.found.values())

    def of(self, part: str, task: str, method: str, batch: int = 256) -> dict[int, Result]:
        """Return the runs by seed."""
        return self.found.get((part, task, method, batch), {})

    def curve(self, result: Result) -> list[dict[str, Any]]:
        """Return the evaluations."""
        before = self.of("base", result["task"], "base").get(result["seed"])
        return [*(before["evaluations"] if before else []), *result["evaluations"]]


@functools.cache
def target(task: str) -> Result:
    """Return what truth.py has written about it."""
    return truth.known(task)


def kl_target_base(task: str) -> Estimate:
    """Return KL(p||a).

    For a pointwise constraint it is -log Z, in whichever way that is known. Otherwise it comes from the samples of a.
    """
    state = target(task)
    log_z = truth.log_z_of(state)
    pointwise = not state["target"]["moment_names"]
    return Estimate(-log_z.value, log_z.stderr) if pointwise else Estimate(**state["base"]["kl_target_base"])


def wanted(task: str) -> dict[str, float]:
    """Return what a task asks of each feature: the value of a moment, or 1 for a pointwise constraint."""
    state = target(task)["target"]
    moments = dict(zip(state["moment_names"], state["moment_values"], strict=True))
    return {name: moments.get(name, 1.0) for name in target(task)["base_rates"]}


def attained(task: str) -> dict[str, float]:
    """Return E_p of each feature. Lambda was fitted on other samples of a, so p only comes near to what was wanted."""
    return {name: mean["value"] for name, mean in target(task)["base"]["target_means"].items()}


def with_best_log_z(result: Result) -> None:
    """Replace KL(p||pi) of a run by the value with all that is now known of log Z.

    It differs by a constant of the task and has a smaller error.
    """
    state = target(result["task"])
    used, best = result.get("log_z", state["log_z"]), truth.log_z_of(state)
    for evaluation in result["evaluations"]:
        if evaluation.get("kl_exact") is not None:
            evaluation["kl_exact"] += used["value"] - best.value
        if evaluation.get("kl_exact_stderr") is not None:
            variance = evaluation["kl_exact_stderr"] ** 2 - used["stderr"] ** 2
            evaluation["kl_exact_stderr"] = math.sqrt(max(variance, 0.0) + best.stderr**2)


def distance(values: Mapping[str, float], result: Result) -> float:
    """Return the mean distance of E_pi[phi] from these values over a task's features, at the end. 0 is best."""
    last = result["evaluations"][-1]
    return sum(abs(last[f"phi/{name}"] - value) for name, value in values.items()) / len(values)


def mean_phi(result: Result) -> float:
    """Return E_pi[phi] at the end, as the mean over a task's features."""
    return statistics.fmean(result["evaluations"][-1][f"phi/{name}"] for name in wanted(result["task"]))


def from_wanted(result: Result) -> float:
    """Return ``distance`` from what the task asks for."""
    return distance(wanted(result["task"]), result)


def from_attained(result: Result) -> float:
    """Return ``distance`` from the actual p."""
    return distance(attained(result["task"]), result)


def kl_base_from_target(result: Result) -> float:
    """Return |KL(pi||a) - KL(p||a)| at the end, and NaN for a itself."""
    value: float = result["evaluations"][-1]["kl_policy_base"]
    return math.nan if result["method"] == "base" else abs(value - kl_target_base(result["task"]).value)


def drawn(result: Result) -> int:
    """Return the sequences that training took. Checks of q that draw their own count, and evaluations do not."""
    settings = result["settings"]
    checks = settings["max_steps"] // settings["proposal_interval"]
    return int(result["samples"] + settings.get("proposal_check_samples", 0) * checks)


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Return mean and standard error over seeds. The error is NaN for one seed."""
    kept = list(values)
    if not kept:
        return math.nan, math.nan
    mean = sum(kept) / len(kept)
    variance = sum((v - mean) ** 2 for v in kept) / (len(kept) - 1) if len(kept) > 1 else math.nan
    return mean, math.sqrt(variance / len(kept))


def shown(values: Iterable[float], form: str = ".3f") -> str:
    """Return it as text."""
    mean, error = mean_and_error(values)
    if math.isnan(mean):
        return ""
    return format(mean, form) + ("" if math.isnan(error) else f" ± {error:{form}}")


def student(n: int) -> float:
    """Return the 97.5% quantile of Student's t, for the 95% interval of a mean of n."""
    few = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
    z, v = NORMAL, n - 1  # beyond the table, the expansion by Cornish and Fisher is right to .02
    return few.get(n) or z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v * v) if v else math.nan


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95% interval, which is NaN for one value."""
    mean, error = mean_and_error(values)
    return mean, error * student(len(values)) if len(values) > 1 else math.nan


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[float, float, int]:
    """Return the mean of first - second over the seeds of both, half the width of its 95% interval, and the count."""
    differences = [first[seed] - second[seed] for seed in sorted(first) if seed in second]
    return *interval(differences), len(differences)


def shown_difference(mean: float, half: float, n: int) -> str:
    """Return ``paired`` or ``paired_kl`` as text."""
    return "" if not n else f"{mean:+.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def paired_kl(first: Mapping[int, Result], second: Mapping[int, Result]) -> tuple[float, float, int]:
    """Return ``paired`` for KL(p||pi) at the end.

    The interval includes the error of the exact samples where it is known. All seeds have that error in common, so the
    spread of the seeds does not show it.
    """
    mean, half, n = paired(last(first, "kl_exact"), last(second, "kl_exact"))
    shared = sampling_error(first, second)
    return mean, half if math.isnan(shared) else math.hypot(half, NORMAL * shared), n


def sampling_error(first: Mapping[int, Result], second: Mapping[int, Result]) -> float:
    """Return the standard error that the exact samples give to a difference of KL(p||pi). All runs of a task share it.

    More seeds do not reduce it. It comes from the pairs that have kept log pi of these samples, which seed 0 of the
    main grid has not. It is NaN where no pair has.
    """
    kept = [s for s in first if s in second and first[s].get("log_prob") and second[s].get("log_prob")]
    if not kept:
        return math.nan
    gaps = [[b - a for a, b in zip(first[s]["log_prob"], second[s]["log_prob"], strict=True)] for s in kept]
    return mean_and_error(statistics.fmean(of_sample) for of_sample in zip(*gaps, strict=True))[1]


def shown_estimate(found: Mapping[str, float], digits: int = 3) -> str:
    """Return value and standard error as text."""
    return f"{found['value']:.{digits}f} ± {found['stderr']:.{digits}f}"


def listed(found: Mapping[str, Mapping[str, float]], digits: int) -> str:
    """Return estimates by their names, as text."""
    return ", ".join(f"{name} {shown_estimate(each, digits)}" for name, each in found.items())


def shown_number(value: float, form: str = ".3f") -> str:
    """Return a number as text, and nothing for NaN."""
    return "" if math.isnan(value) else format(value, form)


def over_seeds(curves: Sequence[Sequence[Mapping[str, Any]]], key: str) -> list[tuple[int, float, float]]:
    """Return sequences, mean and error of a measure where all seeds have been evaluated.

    Some seeds may still lack their base.
    """
    everywhere = set.intersection(*({e["samples"] for e in curve} for curve in curves))
    return [
        (at, *mean_and_error(e[key] for curve in curves for e in curve if e["samples"] == at))
        for at in sorted(everywhere)
    ]


def figure(runs: Runs, task: str, path: Path) -> None:
    """Draw one task in the paper's form: the features, then the other measures, with a line for each method."""
    features = attained(task)
    panels = [(f"phi/{name}", f"E[{name}]") for name in features] + list(MEASURES[1:])
    rows = math.ceil(len(panels) / 5)
    columns = math.ceil(len(panels) / rows)
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
            points = over_seeds(curves, key)
            x, means = [at for at, *_ in points], [mean for _, mean, _ in points]
            axis.plot(x, means, color=COLORS[method], label=NAMES[method], linewidth=1.4, marker="o", markersize=2.5)
            if len(curves) > 1:
                low = [m - e for _, m, e in points]
                axis.fill_between(x, low, [m + e for _, m, e in points], color=COLORS[method], alpha=0.2, linewidth=0)
    for (key, title), axis in zip(panels, axes.flat, strict=False):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("sequences", fontsize=8)
        axis.tick_params(labelsize=8)
        if key.startswith("phi/"):
            axis.axhline(features[key[4:]], color="grey", linewidth=0.8, linestyle="--")
        elif key == "kl_exact":
            axis.set_yscale("log")  # a collapsed run lies a thousand times higher than the others
        elif key == "kl_policy_base":
            axis.set_yscale("symlog", linthresh=0.1)
            axis.set_ylim(bottom=0)
            axis.axhline(kl_target_base(task).value, color="grey", linewidth=0.8, linestyle="--")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    drawing.suptitle(f"{task}: mean and standard error over seeds; dashed: the target p", fontsize=11)
    drawing.savefig(path, dpi=90)
    plt.close(drawing)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table without columns that are empty in all rows, and nothing where there are no rows."""
    rows = list(rows)
    if not rows:
        return ""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = ["| " + " | ".join(row[i] for i in kept) + " |\n" for row in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(kept) + "\n")
    return "".join(lines)


def last(results: Mapping[int, Result], key: str | Callable[[Result], float]) -> dict[int, float]:
    """Return a measure at the end of each seed's run."""
    return {s: key(r) if callable(key) else r["evaluations"][-1].get(key, math.nan) for s, r in results.items()}


def targets() -> str:
    """Return what is known of the ten targets before any training."""
    rows = []
    for task in (*grid.GRID, "tuning"):
        state = target(task)
        base = state.get("base", {})
        rates, means = listed(base.get("rates", state["base_rates"]), 4), listed(base.get("target_means", {}), 3)
        goal = ", ".join(f"{value:g}" for value in wanted(task).values())
        of_base = shown_estimate(base["log_z"]) if base else ""
        log_z = shown_estimate(state["log_z"]), of_base, shown_estimate(vars(truth.log_z_of(state)))
        kl = shown_estimate(vars(kl_target_base(task)))
        rows.append((task, f"{base.get('samples', 10_240):,}", rates, goal, means, *log_z, kl))
    header = ("task", "samples of a", "E_a[φ]", "wanted of E_p[φ]", "E_p[φ] as λ was fitted", "log Z of the rejection",
              "of the samples of a", "of both", "KL(p‖a), nats")  # fmt: skip
    return table(header, rows)


def main_table(runs: Runs) -> str:
    """Return the table of all runs of the main grid at their end."""
    rows = []
    for task in grid.GRID:
        for method in ("base", *grid.MAIN):
            results = runs.of("base" if method == "base" else "main", task, method)
            if not results:
                continue
            phi = ", ".join(shown(last(results, f"phi/{name}").values()) for name in wanted(task))
            measures = ("kl_exact", "kl_policy", kl_as_in_the_paper, "kl_policy_base", kl_base_from_target,
                        from_attained, "self_bleu_5", "distinct_1")  # fmt: skip
            cost = "" if method == "base" else f"{drawn(next(iter(results.values()))):,}"
            kl, *others = (shown(last(results, key).values()) for key in measures)
            error = shown_number(mean_and_error(last(results, "kl_exact_stderr").values())[0])
            if method == "base":  # all seeds have the same samples, so this error is their own
                kl = f"{mean_and_error(last(results, 'kl_exact').values())[0]:.3f}"
            length = shown(last(results, "length").values(), ".1f")
            rows.append((task, NAMES[method], str(len(results)), phi, kl, error, *others, length, cost))
    header = ("task", "method", "seeds", "E_π[φ]", "KL(p‖π)", "its standard error from samples of p and log Z",
              "the same by importance weights, x ~ π",
              "x ~ q, running Z, as in the paper", "KL(π‖a)",
              "its distance from KL(p‖a)", "distance of E_π[φ] from E_p[φ]", "Self-BLEU-5", "Distinct-1",
              "tokens of a sequence", "sequences drawn in training")  # fmt: skip
    return table(header, rows)


def paired_table(runs: Runs) -> str:
    """Return the table of GDC++ against GDC with common random numbers."""
    rows = []
    for task in grid.GRID:
        pair = [runs.of("main", task, method) for method in ("gdc++", "gdc")]
        if not set(pair[0]) & set(pair[1]):
            continue
        others = (
            shown_difference(*paired(*(last(results, key) for results in pair)))
            for key in (mean_phi, from_wanted, from_attained, "kl_policy_base", kl_base_from_target)
        )
        mean, half, n = paired_kl(*pair)
        kl = shown_difference(mean, half, n), shown_number(sampling_error(*pair))
        rows.append((task, str(n), *kl, *others))
    header = ("task", "seeds", "KL(p‖π)", "standard error of it from the shared samples of p",
              "E_π[φ], mean over features", "its distance from what is wanted", "from E_p[φ]", "KL(π‖a)",
              "its distance from KL(p‖a)")  # fmt: skip
    return table(header, rows)


def kl_as_in_the_paper(result: Result) -> float:
    """Return the last estimate of KL(p||pi) from the steps' own samples of q, and NaN for methods without q."""
    values = [v for v in result["history"].get("kl_policy", []) if v is not None]
    return values[-1] if values and result["method"] in ("gdc", "gdc++") else math.nan


def after_a_quarter(values: Sequence[Any]) -> Sequence[Any]:
    """Return the logged values of the steps after the first quarter of training."""
    return values[len(values) // 4 :]


def late_mean(result: Result, key: str) -> float:
    """Return the mean of the values that are logged now and then, after the first quarter of training."""
    return mean_and_error(v for v in after_a_quarter(result["history"].get(key, [])) if v is not None)[0]


def shown_ratios(logs: Sequence[float]) -> str:
    """Return logarithms of a ratio, one for each seed, as text.

    It has their geometric mean, its 95% interval and each value.
    """
    centre, half = interval(logs)
    if math.isnan(half):
        return f"{math.exp(centre):.2f} (one seed)"
    each = ", ".join(f"{math.exp(log):.2f}" for log in logs)
    return f"{math.exp(centre):.2f} (95% {math.exp(centre - half):.2f} to {math.exp(centre + half):.2f}; {each})"


def ratio(plain: Mapping[int, Result], better: Mapping[int, Result], key: str, power: int = 1) -> str:
    """Return the ratio of a logged quantity of one run to that of another, after the first quarter of training.

    For each seed it is the geometric mean over its measurements, whose tails are heavy. The measurements of one run are
    not independent, so the interval is over seeds.
    """
    logs = []
    for seed in sorted(plain.keys() & better.keys()):
        histories = [after_a_quarter(results[seed]["history"].get(key, [])) for results in (plain, better)]
        if found := [power * math.log(a / b) for a, b in zip(*histories, strict=False) if a and b]:
            logs.append(statistics.fmean(found))
    return shown_ratios(logs) if logs else ""


def spread(values: Iterable[float], form: str = ".3f", before: str = "") -> str:
    """Return the smallest and largest value as text."""
    kept = sorted(values)
    return f"{before}{kept[0]:{form}} to {kept[-1]:{form}}" if kept else ""


def claims(runs: Runs) -> str:
    """Return each of the paper's claims with its figure."""

    def pairs(first: str, second: str, key: Any) -> dict[str, tuple[dict[int, float], dict[int, float]]]:
        """Return the seeds that both have, for the tasks where both have been run."""
        found = {}
        for task in grid.GRID:
            one, other = (last(runs.of("main", task, method), key) for method in (first, second))
            seeds = one.keys() & other.keys()
            if seeds:
                found[task] = {s: one[s] for s in seeds}, {s: other[s] for s in seeds}
        return found

    def compared(key: Any, better: int = -1) -> str:
        """Compare GDC++ with GDC in a measure that is better if it is smaller (``better=-1``) or larger (+1).

        The result is where GDC++ is at least as good, the mean difference with its 95% interval over tasks, and where a
        task's own interval excludes 0 on either side.
        """
        found = {task: paired(*pair) for task, pair in pairs("gdc++", "gdc", key).items()}
        if key == "kl_exact":
            found = {task: paired_kl(runs.of("main", task, "gdc++"), runs.of("main", task, "gdc")) for task in found}
        others = [task for task, (mean, *_) in found.items() if not better * mean >= 0]
        text = f"{len(found) - len(others)} of {len(found)}" + (f"; not {', '.join(others)}" if others else "")
        if len(found) > 1:
            centre, width = interval([mean for mean, *_ in found.values()])
            text += f"; mean over tasks {centre:+.3f} ± {width:.3f}"
        known = {task: (mean, half) for task, (mean, half, n) in found.items() if n > 1}
        if not known:
            return f"{text}; no interval from one seed"
        won, lost = (sum(sign * mean > half for mean, half in known.values()) for sign in (better, -better))
        return f"{text}; the 95% interval excludes 0 on {won} of {len(known)}, and on {lost} the other way"

    if not pairs("gdc++", "gdc", "kl_exact"):
        return ""
    rows = [
        ("GDC++ at or below GDC in KL(p‖π)", "10 of 10", compared("kl_exact")),
        ("GDC++ at or above GDC in E[φ], the mean of a task's features", "7 of 10", compared(mean_phi, +1)),
        ("… at or nearer to what is wanted of it", "", compared(from_wanted)),
        ("… to E_p[φ]", "", compared(from_attained)),
        ("GDC++ at or below GDC in KL(π‖a)", "10 of 10", compared("kl_policy_base")),
        ("… at or nearer to KL(p‖a)", "", compared(kl_base_from_target)),
    ]
    for task in grid.STUDIED:
        plain, better = (runs.of("main", task, method) for method in ("gdc", "gdc++"))
        cells = [f"{name} {text}" for name, key, power in (("gradient", "gradient_variance", 1),
                 ("advantage", "weight_std", 2)) if (text := ratio(plain, better, key, power))]  # fmt: skip
        rows.append((f"variance of GDC over GDC++ after a quarter, {task}", "above 1; here 2 is asked on the rare word",
                     "; ".join(cells)))  # fmt: skip
    factors = {
        task: sum(one.values()) / sum(other.values())
        for task, (one, other) in pairs("reinforce", "gdc++", "kl_policy_base").items()
    }
    distinct = {}
    for task in grid.GRID:
        after, before = (last(runs.of(part, task, m), "distinct_1")
                         for part, m in (("main", "reinforce"), ("base", "base")))  # fmt: skip
        if seeds := after.keys() & before.keys():
            distinct[task] = [statistics.fmean(of[s] for s in seeds) for of in (after, before)]
    fallen = [after < before for after, before in distinct.values()]
    satisfied = [
        mean_and_error(last(found, mean_phi).values())[0]
        for task in grid.GRID
        if (found := runs.of("main", task, "reinforce")) and not target(task)["target"]["moment_names"]
    ]
    rows += [
        ("REINFORCE satisfies the constraint: E[φ] on the pointwise tasks", "nearly 1", spread(satisfied)),
        ("REINFORCE's KL(π‖a) is twice that of GDC++ or more", "all",
         f"{sum(f >= 2 for f in factors.values())} of {len(factors)}" + spread(factors.values(), ",.0f", "; times ")),
        ("REINFORCE's Distinct-1 falls below the base's", "all", f"{sum(fallen)} of {len(fallen)}"
         + spread((after for after, _ in distinct.values()), ".2f", "; to ")),
    ]  # fmt: skip
    trained = [r for by_seed in runs.found.values() for r in by_seed.values() if r["method"] != "base"]
    everything = [*runs.tuning.values(), *trained]
    finite = sum(r["finite"] for r in everything)
    died = f"; {len(runs.failed)} died, {sum(r['nan'] for r in runs.failed.values())} of them by what is not finite: "
    names = [f"{name} (run again since)" if r["again"] else name for name, r in runs.failed.items()]
    died = died + ", ".join(names) if runs.failed else "; none died"
    rows.append(
        ("no run ends in a NaN", "", f"{finite} of {len(everything)} trainings are finite, the tuning's too{died}")
    )
    return table(("claim", "in the paper", "here"), rows)


def batch_table(runs: Runs) -> str:
    """Return the table of KL(p||pi) at the end over batch sizes, for the same number of sequences."""
    rows = []
    for task in grid.STUDIED:
        for batch in BATCHES:
            part = "main" if batch == 256 else "batch"
            results = [runs.of(part, task, method, batch) for method in ("gdc", "gdc++")]
            if any(results):
                cells = [shown(last(r, key).values()) for key in ("kl_exact", from_wanted) for r in results]
                pair = shown_difference(*paired_kl(*reversed(results)))
                rows.append((task, str(batch), *cells[:2], pair, *cells[2:]))
    header = ("task", "B", "KL(p‖π) GDC", "GDC++", "GDC++ less GDC (95% interval)", "distance of E_π[φ] GDC", "GDC++")
    return table(header, rows)


def variants_table(runs: Runs) -> str:
    """Return the table of the variants beyond the paper, each paired with GDC++."""
    rows = []
    for task in grid.STUDIED:
        reference = runs.of("main", task, "gdc++")
        for method in ("gdc", "gdc++", *grid.VARIANTS):
            results = runs.of("main" if method in grid.MAIN else "variants", task, method)
            if not results:
                continue
            against, error, gap = "", "", ""
            if method != "gdc++":
                against = shown_difference(*paired_kl(results, reference))
                error = shown_number(sampling_error(results, reference))
                gap = shown_difference(*paired(last(results, mean_phi), last(reference, mean_phi)))
            variance = shown((late_mean(r, "gradient_variance") for r in results.values()), ".3g")
            kl, phi, *others = (
                shown(last(results, key).values())
                for key in ("kl_exact", mean_phi, from_wanted, "kl_policy_base", kl_base_from_target)
            )
            cost = f"{drawn(next(iter(results.values()))):,}"
            rows.append((task, NAMES[method], str(len(results)), kl, against, error, phi, gap, *others, variance, cost))
    return table(("task", "", "seeds", "KL(p‖π)", "less that of GDC++ (95% interval)",
                  "standard error of it from the shared samples of p", "E_π[φ]", "less that of GDC++",
                  "its distance from what is wanted", "KL(π‖a)",
                  "its distance from KL(p‖a)", "gradient's variance", "sequences drawn"), rows)  # fmt: skip


def tuning_table(runs: Runs, folder: Path) -> str:
    """Return the table of ``grid.score`` for each method at each learning rate, with the chosen rate."""
    chosen, rows = grid.learning_rates(folder), []
    for method in grid.TUNED:
        cells = []
        for rate in grid.LEARNING_RATES:
            result = runs.tuning.get((method, rate))
            if result is None:
                cells.append("")
                continue
            value, error = grid.score(result)
            text = f"{value:.3f} ± {error:.3f}; {result['evaluations'][-1]['kl_exact']:.2f}"
            cells.append(f"**{text}**" if chosen.get(method) == rate else text)
        rows.append((NAMES[method], *cells))
    return table(
        (
            "method: E[φ] of the REINFORCEs, E[φ] − β KL(π‖a) of KL-control, −KL(p‖π) of the others; KL(p‖π), nats",
            *(f"{rate:g}" for rate in grid.LEARNING_RATES),
        ),
        rows,
    )


def equal_rate_table(runs: Runs, folder: Path) -> str:
    """Return the table of all methods at the learning rate of GDC++, where the tuning has tried it."""
    rate, rows = grid.learning_rates(folder).get("gdc++"), []
    for method in grid.MAIN:
        result = runs.tuning.get((method, rate))
        if result is None:
            continue
        end = result["evaluations"][-1]
        (phi,) = (f"phi/{name}" for name in wanted("tuning"))
        measured = [f"{end[key]:.3f} ± {end[f'{key}_stderr']:.3f}" for key in (phi, "kl_exact", "kl_policy_base")]
        rows.append((NAMES[method], *measured, *(f"{end[key]:.3f}" for key in ("self_bleu_5", "distinct_1"))))
    return table(("method", "E_π[φ]", "KL(p‖π)", "KL(π‖a)", "Self-BLEU-5", "Distinct-1"), rows)


def same_state_table(found: Sequence[Result]) -> str:
    """Return the table of variance.py's results: GDC's weights over GDC++'s, on one batch in each state of a run.

    The states of a run follow from one another, so the intervals are over seeds.
    """
    rows, each = [], ""
    for task in grid.STUDIED:
        runs = [result["tasks"][task] for result in found if task in result["tasks"]]
        runs = [run for run in runs if len(run) == len(runs[0])]
        for key, name in (("gradient_variance", "gradient"), ("advantage_variance", "advantage")):
            logs = [[math.log(at["gdc"][key] / at["gdc++"][key]) for at in run] for run in runs]
            if not logs:
                continue
            states = ", ".join(f"{math.exp(statistics.fmean(of_state)):.2f}" for of_state in zip(*logs, strict=True))
            half = len(logs[0]) // 2
            halves = (shown_ratios([statistics.fmean(part) for part in parts])
                      for parts in ([run[:half] for run in logs], [run[half:] for run in logs]))  # fmt: skip
            rows.append((task, name, states, *halves))
            each = ", ".join(f"{at['samples']:,}" for at in runs[0])
    header = (
        "task",
        "variance of the",
        f"after {each} sequences (mean over seeds)",
        "geometric mean of the first half",
        "of the second",
    )
    return table(header, rows)


def difference_figure(runs: Runs, path: Path) -> None:
    """Draw GDC++ minus GDC over training in the two measures that matter, a panel for each task.

    REINFORCE's scale would hide the difference.
    """
    drawing, axes = plt.subplots(4, 5, figsize=(16, 10.5), constrained_layout=True, sharex=True)
    for column, task in enumerate(grid.GRID):
        pair = [runs.of("main", task, method) for method in ("gdc++", "gdc")]
        seeds = sorted(set(pair[0]) & set(pair[1]))
        for offset, (key, title) in enumerate((("kl_exact", "KL(p‖π)"), ("phi", "E[φ]"))):
            axis = axes[2 * (column // 5) + offset, column % 5]
            axis.set_title(f"{task}: {title}", fontsize=9)
            axis.axhline(0, color="grey", linewidth=0.8, linestyle="--")
            axis.tick_params(labelsize=8)
            if not seeds:
                continue
            names = [f"phi/{name}" for name in wanted(task)] if key == "phi" else [key]
            curves = [
                [{"samples": one["samples"], "gap": statistics.fmean(one[n] - other[n] for n in names)}
                 for one, other in zip(*(results[seed]["evaluations"] for results in pair), strict=True)]
                for seed in seeds
            ]  # fmt: skip
            points = over_seeds(curves, "gap")
            errors = [0 if math.isnan(error) else error for *_, error in points]
            axis.errorbar([at for at, *_ in points], [mean for _, mean, _ in points], errors, color=COLORS["gdc++"],
                          marker="o", markersize=3, capsize=2, linewidth=1.3)  # fmt: skip
    for axis in axes[-1]:
        axis.set_xlabel("sequences", fontsize=8)
    title = (
        "GDC++ less GDC: mean and standard error over seeds of the difference in pairs; each panel has its own scale"
    )
    drawing.suptitle(title, fontsize=11)
    drawing.savefig(path, dpi=90)
    plt.close(drawing)


def study_figure(runs: Runs, path: Path) -> None:
    """Draw the variance of gradient and advantage over training, and the batch sizes, for both tasks of the studies."""
    drawing, axes = plt.subplots(2, 3, figsize=(12, 6.5), constrained_layout=True)
    for row, task in zip(axes, grid.STUDIED, strict=True):
        for method in ("gdc", "gdc++"):
            results = list(runs.of("main", task, method).values())
            for axis, key, power in ((row[0], "gradient_variance", 1), (row[1], "weight_std", 2)):
                histories = [r["history"] for r in results if r["history"].get(key)]
                if not histories:
                    continue
                at = [i for i in range(len(histories[0][key])) if all(h[key][i] is not None for h in histories)]
                points = [mean_and_error(h[key][i] ** power for h in histories) for i in at]
                x = [histories[0]["step"][i] * results[0]["batch"] for i in at]
                axis.plot(x, [mean for mean, _ in points], color=COLORS[method], label=NAMES[method], linewidth=1.3)
                if len(histories) > 1:  # the axis is logarithmic, so an error as large as the mean has no lower end
                    low = [max(mean - error, mean / 10) for mean, error in points]
                    axis.fill_between(x, low, [mean + error for mean, error in points], color=COLORS[method],
                                      alpha=0.2, linewidth=0)  # fmt: skip
            points = []
            for batch in BATCHES:
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
                axis.legend(fontsize=8)
                if axis is not row[2]:
                    axis.set_yscale("log")
                else:
                    axis.set_xscale("log", base=2)
                    axis.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    drawing.suptitle("mean and standard error over seeds; bands end at a tenth of the mean", fontsize=11)
    drawing.savefig(path, dpi=90)
    plt.close(drawing)


MAIN_TABLE = "The main grid at the end of 20,480 sequences"
PAIRED_TABLE = "GDC++ less GDC, in pairs (95% interval over seeds; of KL(p‖π) over the exact samples, too)"
ABOUT = """# The paper's experiments: tables

`python benchmarks/paper/report.py` wrote this page from {done} runs beside the tuning's. "±" is a standard error over
seeds. KL(p‖π) also has the errors of the exact samples and of log Z. These are the same for all runs of a task and have
a column of their own. In a difference of two KL(p‖π), log Z cancels. The interval of such a difference holds the error
over seeds and that of the samples, whose standard error has a column. Each claim has ten intervals of 95%, and none of
them is corrected for their number.
"""


def written(runs: Runs, folder: Path) -> dict[str, str]:
    """Return all tables by their titles."""
    same = [json.loads(path.read_text()) for path in sorted(folder.parent.glob("same_state_seed*.json"))]
    rates = "Learning rates (on the tuning task; chosen: the smallest within a standard error of the best)"
    return {
        "The targets": targets(),
        rates: tuning_table(runs, folder),
        "All methods at GDC++'s learning rate, on the tuning task": equal_rate_table(runs, folder),
        "Claims": claims(runs),
        "Variance of GDC over GDC++ in the same states (95% interval over seeds)": same_state_table(same),
        MAIN_TABLE: main_table(runs),
        PAIRED_TABLE: paired_table(runs),
        "Batch sizes": batch_table(runs),
        "Beyond the paper (JS and TV at rates of their own, the others at that of GDC++)": variants_table(runs),
    }


def page(sections: Mapping[str, str], done: int) -> str:
    """Return the page tables.md."""
    return ABOUT.format(done=done) + "".join(f"\n## {title}\n\n{body}" for title, body in sections.items() if body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=grid.RESULTS / "runs")
    parser.add_argument("--out", type=Path, default=grid.RESULTS)
    parser.add_argument("--quick", action="store_true", help="of grid.py quick: prints its table, too")
    args = parser.parse_args()
    runs = Runs(args.runs)
    args.out.mkdir(parents=True, exist_ok=True)
    sections = written(runs, args.runs)
    if args.quick:
        quarter = "At the end of 5,120 sequences, a quarter of a run"
        sections = {quarter: sections[MAIN_TABLE], PAIRED_TABLE: sections[PAIRED_TABLE]}
        print("\n".join(f"{title}\n\n{body}" for title, body in sections.items()))
    (args.out / "tables.md").write_text(page(sections, runs.done))
    for task in grid.GRID:
        if any(runs.of("main", task, method) for method in grid.MAIN):
            figure(runs, task, args.out / f"{task}.png")
    if runs.found and not args.quick:
        study_figure(runs, args.out / "studies.png")
        difference_figure(runs, args.out / "differences.png")
    print(f"wrote {args.out / 'tables.md'} and its figures from {runs.done} runs")


if __name__ == "__main__":
    main()
