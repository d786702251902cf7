"""Report a run by its machine, a plot and tables."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from .. import __version__, kernels
from ..estimators import Estimate, to_show
from ..metrics import logged_features
from ..unseen import said


def machine() -> dict[str, Any]:
    """Return the date, versions, processor, threads and backend that belong to a result."""
    import transformers

    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "date": date.today().isoformat(), "dmfast": __version__, "torch": torch.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(), "cpu": cpu,
        "threads": torch.get_num_threads(), "backend": kernels.backends()["cpu"].detail,
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def write(log: Mapping[str, Any], folder: Path, name: str = "log.json") -> None:
    """Write a run as JSON. On an error the file is as it was, with an earlier run's results if there were any."""
    text = json.dumps(for_json(log), indent=1, ensure_ascii=False)
    beside = folder / f".{name}.new"
    try:
        beside.write_text(text + "\n", encoding="utf-8")
        os.replace(beside, folder / name)
    finally:
        beside.unlink(missing_ok=True)


def for_json(value: Any) -> Any:
    """Return a value for JSON. An estimate becomes its value and stderr, and NaN and infinity become null."""
    if isinstance(value, Estimate):
        return for_json(vars(value))
    if isinstance(value, Mapping):
        return {str(k): for_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [for_json(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def pyplot() -> Any:
    """Return matplotlib's pyplot, set up to work without a screen."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot(
    history: Sequence[Mapping[str, float]], path: Path, title: str, *, wanted: Mapping[str, float] | None = None
) -> None:
    """Plot E[phi] under q, the divergences from p with the swaps of q, log Z and ESS over the steps of a run.

    A band is one standard error. Evaluations add E[phi] under pi as dots with error bars.

    Args:
        history: the logs of the run in order (``trainer.state.log_history``), steps and evaluations.
        wanted: the moments of the target by feature, which are drawn as lines.
    """
    plt = pyplot()
    steps = [h for h in history if "kl_policy" in h]
    evaluations = [h for h in history if "eval_kl_policy_base" in h]
    names = logged_features((steps or [{}])[0])
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), sharex=True, constrained_layout=True)
    x = [h["step"] for h in steps]

    def line(axis: Any, key: str, label: str, color: str) -> None:
        values = torch.tensor([h[key] for h in steps], dtype=torch.float64)
        axis.plot(x, values, color=color, label=label, linewidth=1.3)
        if steps and f"{key}_stderr" in steps[0]:
            error = torch.tensor([h.get(f"{key}_stderr", math.nan) for h in steps], dtype=torch.float64)
            axis.fill_between(x, values - error, values + error, color=color, alpha=0.2, linewidth=0)

    features, divergences, partition, ess = axes.flat
    for i, name in enumerate(names):
        color = f"C{i}"
        line(features, f"phi/{name}", f"{name}, q", color)
        if evaluations:
            features.errorbar(
                [h["step"] for h in evaluations], [h[f"eval_phi/{name}"] for h in evaluations],
                [h[f"eval_phi/{name}_stderr"] for h in evaluations], color=color, fmt="o", markersize=4, capsize=2,
                label=f"{name}, π",
            )  # fmt: skip
        if wanted and name in wanted:
            features.axhline(wanted[name], color=color, linewidth=0.8, linestyle="--", label="target")
    line(divergences, "kl_policy", "KL(p‖π)", "C0")
    line(divergences, "kl_proposal", "KL(p‖q)", "C1")
    line(partition, "log_z", "running", "C0")
    line(ess, "ess", "sequences", "C0")
    titles = ("E[φ]", "divergence from the target p (nats)", "log Z", "effective sample size of a step")
    for axis, name in zip(axes.flat, titles, strict=True):
        for i, h in enumerate(h for h in steps if h["swapped"]):
            axis.axvline(h["step"], color="grey", linewidth=0.6, alpha=0.6, label="q ← π" if i == 0 else None)
        axis.set_title(name, fontsize=10)
        axis.legend(fontsize=8, loc="best")
    ess.set_ylim(bottom=0)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(log: Mapping[str, Any]) -> Any:
    """Return a rich table of the measures before, after and of p, from the log of a run."""
    from rich.table import Table

    table = Table(title="mean ± standard error, on fresh samples of the model itself")
    for column in ("", "before", "after", "target p"):
        table.add_column(column)
    titles = {
        "kl_policy_base": "KL(π‖a), nats",
        "kl_policy": "KL(p‖π), nats",
        "length": "tokens",
        "finished": "ended in EOS",
        "distinct_1": "Distinct-1",
        "distinct_2": "Distinct-2",
        "distinct_3": "Distinct-3",
        "self_bleu_5": "Self-BLEU-5",
        "truncated": "cut off",
    }

    for name, before in log["before"].items():
        title = f"E[{name[4:]}]" if name.startswith("phi/") else titles.get(name, name)
        ideal = log["ideal"].get(name)
        cells = [shown(before), shown(log["after"][name]), "" if ideal is None else shown(ideal)]
        if name == "kl_policy":
            cells[:2] = [_unknown(log, key) or cell for key, cell in zip(("before", "after"), cells[:2], strict=True)]
        table.add_row(title, *cells)
    return table


def shown(found: Estimate) -> str:
    """Return an estimate in words, by the rule of ``to_show``: "unknown" for NaN."""
    if math.isnan(found.value):
        return "unknown"
    found = to_show(found)
    return str(found) if found.stderr else f"{found.value:.4g}"


def _unknown(log: Mapping[str, Any], key: str) -> str | None:
    """Return why KL(p||pi) is unknown, because a feature had one value in all samples, or None if it is known."""
    if not math.isnan(log[key]["kl_policy"].value):
        return None
    target = log.get("target", {})
    pointwise, moments = ([each["name"] for each in target.get(kind, [])] for kind in ("pointwise", "moments"))
    of = {name: log[key][f"phi/{name}"] for name in [*pointwise, *moments]}
    missing = {name: e.value for name, e in of.items() if e.stderr == 0 and (e.value == 0 or name in moments)}
    return f"unknown: {said(missing)}" if missing else None


def samples_table(before: Sequence[str], after: Sequence[str]) -> Any:
    """Return a rich table that shows samples before and after side by side."""
    from rich.table import Table

    table = Table(title="samples before and after", show_lines=True)
    table.add_column("before", ratio=1)
    table.add_column("after", ratio=1)
    for pair in zip(before, after, strict=False):
        table.add_row(*(text.strip() for text in pair))
    return table
