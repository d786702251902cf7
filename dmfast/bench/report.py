"""What came out, as text, JSON and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]  # what worker.run returns
_BESIDE = ("roof", "scoring")  # what is no rival of the loss
OURS = ("dm_loss", "linear_dm_loss", "sample_tokens", "scoring: sequence_log_prob", "nn.Linear, dm_loss")
_BASELINE = {
    "logits": "eager log_softmax + gather", "head": "nn.Linear, eager log_softmax + gather",
    "sampling": "eager softmax, multinomial, log_softmax, gather",
}  # fmt: skip


def table(result: Result) -> Any:
    """A rich table of one configuration: the slowest last, ratios to eager and to the roofs."""
    from rich.table import Table

    ms, memory = result["ms"], result.get("memory_mb", {})
    base = ms.get(_BASELINE[result["config"]["form"]], {"median": float("nan")})["median"]  # it may not have run
    out = Table(title=result["title"], title_justify="left")
    for column in ("", "ms", "quartiles", "× eager's speed", "extra memory", "gradient's error"):
        out.add_column(column, justify="left" if not column else "right")
    for name, t in sorted(ms.items(), key=lambda item: (not item[0].startswith("roof"), item[1]["median"])):
        error, mb = result["gradient_error"].get(name), memory.get(name)
        out.add_row(
            name, f"{t['median']:.1f}", f"{t['low']:.1f} – {t['high']:.1f}",
            "" if name.startswith(_BESIDE) else f"{base / t['median']:.2f}",
            "" if mb is None else f"{mb:.0f} MB", "" if error is None else f"{error:.1g}",
            style="bold" if name.startswith(OURS) else "dim" if name.startswith("roof") else None,
        )  # fmt: skip
    for name, why in result["not_run"].items():
        out.add_row(name, "not run", why, "", "", "", style="dim")
    return out


def ratios(results: Sequence[Result]) -> list[tuple[str, str, float]]:
    """(what, configuration, ratio) of the figures that dmfast is held to."""
    found = []
    for r in results:
        ms = {name: t["median"] for name, t in r["ms"].items()}

        def add(what: str, over: str, under: str, ms: dict[str, float] = ms, title: str = r["title"]) -> None:
            terms = [ms.get(name) for name in over.split(" & ")], [ms.get(name) for name in under.split(" & ")]
            if None not in terms[0] and None not in terms[1]:
                found.append((what, title, sum(terms[0]) / sum(terms[1])))  # type: ignore[arg-type]

        both = "roof: read-sum & roof: in-place mul_"
        add("dm_loss in place: times eager's speed", "eager log_softmax + gather", "dm_loss gdc++, in place")
        add(
            "dm_loss in place: times compiled eager's speed", "compiled log_softmax + gather", "dm_loss gdc++, in place"
        )
        add("dm_loss in place: times the speed of eager in fp32", "eager, logits in fp32", "dm_loss gdc++, in place")
        add("dm_loss in place over read-sum + mul_", "dm_loss gdc++, in place", both)
        add("known weight in place over mul_", "dm_loss dpg (known weight), in place", "roof: in-place mul_")
        add("dm_loss, fresh gradient: times eager's speed", "eager log_softmax + gather", "dm_loss gdc++")
        add("scoring over read-sum", "scoring: sequence_log_prob", "roof: read-sum")
        add("scoring: times eager's speed", "scoring: eager log_softmax + gather", "scoring: sequence_log_prob")
        add("linear_dm_loss over its three products", "linear_dm_loss gdc++", "roof: its three products")
        add("linear_dm_loss: times eager's speed", "nn.Linear, eager log_softmax + gather", "linear_dm_loss gdc++")
        add("frozen head over two products", "linear_dm_loss, frozen head", "roof: two products")
        add("half masked over none", "linear_dm_loss, half of the rows masked", "linear_dm_loss gdc++")
        add("sample_tokens: times eager's speed", _BASELINE["sampling"], "sample_tokens")
        add("sample_tokens over read-sum", "sample_tokens", "roof: read-sum")
    return found


def chart(results: Sequence[Result], path: Path) -> None:
    """Time of each rival, ours dark, quartiles as whiskers, the roofs as lines; a panel per configuration."""
    from ..training.report import pyplot  # imports transformers, which a table does not need

    plt = pyplot()
    sizes = [sum(not n.startswith(_BESIDE) for n in r["ms"]) for r in results]
    figure, axes = plt.subplots(
        len(results), 1, figsize=(9, 0.32 * sum(sizes) + 1.1 * len(results)), height_ratios=sizes, squeeze=False
    )
    for axis, r in zip(axes[:, 0], results, strict=True):
        bars = {n: t for n, t in r["ms"].items() if not n.startswith(_BESIDE)}
        names = sorted(bars, key=lambda n: -bars[n]["median"])
        for i, name in enumerate(names):
            t = bars[name]
            axis.barh(i, t["median"], color="#1f5fa8" if name.startswith(OURS) else "#b9bec6", height=0.72)
            axis.plot([t["low"], t["high"]], [i, i], color="#30343a", linewidth=1)
            mb = r.get("memory_mb", {}).get(name)
            label = f" {t['median']:.1f} ms" + ("" if mb is None else f", {mb:.0f} MB")
            axis.text(max(t["median"], t["high"]), i, label, va="center", fontsize=8)
        roofs = {n.removeprefix("roof: "): t["median"] for n, t in r["ms"].items() if n.startswith("roof")}
        for (name, value), style in zip(roofs.items(), (":", "--", "-."), strict=False):
            axis.axvline(value, color="#c0392b", linestyle=style, linewidth=1, label=f"{name}: {value:.1f} ms")
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xlim(0, max(t["high"] for t in bars.values()) * 1.22)
        axis.set_title(
            r["title"] + "; forward + backward" * (r["config"]["form"] != "sampling"), fontsize=9, loc="left"
        )
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", labelsize=8)
        axis.legend(fontsize=8, frameon=False, loc="upper right")  # the shortest bars are on top
    axes[-1, 0].set_xlabel("milliseconds, median; whiskers: quartiles", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


_PHASE_COLOURS = ("#1f5fa8", "#5b9bd5", "#a3c9ee", "#e0a458", "#c0602b", "#8d949c")


def step_table(result: Result) -> Any:
    """The two steps, phase by phase."""
    from rich.table import Table

    title = (f"one GDC++ step of {result['model']} ({result['parameters'] / 1e6:.1f}M parameters), {result['batch']} "
             f"sequences of {result['length']} tokens, {result['threads']} threads")  # fmt: skip
    out = Table(title=title, title_justify="left")
    for column in ("", "dmfast, ms", "eager, ms", "ratio"):
        out.add_column(column, justify="left" if not column else "right")
    ours, plain = result["ms"]["dmfast"], result["ms"]["eager"]
    for phase in plain:
        mine, other = ours.get(phase), plain[phase]
        out.add_row(phase, "not needed" if mine is None else f"{mine['median']:.0f}", f"{other['median']:.0f}",
                    "" if mine is None else f"{other['median'] / mine['median']:.2f}",
                    style="bold" if phase == "whole step" else None)  # fmt: skip
    memory = result["memory_mb"]
    out.add_row("peak memory beside the models, MB", f"{memory['dmfast']:.0f}", f"{memory['eager']:.0f}",
                f"{memory['eager'] / memory['dmfast']:.2f}")  # fmt: skip
    for what, key in (("forwards", "forwards"), ("tokens through a model", "tokens"), ("rows projected to V", "rows")):
        counts = [sum(v[key] for v in result["forwards"][kind].values()) for kind in ("dmfast", "eager")]
        out.add_row(what, f"{counts[0]:,}", f"{counts[1]:,}", f"{counts[1] / counts[0]:.2f}")
    return out


def step_chart(result: Result, path: Path) -> None:
    """Both steps as stacked bars."""
    from ..training.report import pyplot  # imports transformers, which a table does not need

    plt = pyplot()
    from .step import PHASES

    figure, axis = plt.subplots(figsize=(9, 2.6))
    for y, kind in enumerate(("eager", "dmfast")):
        left = 0.0
        for phase, colour in zip(PHASES, _PHASE_COLOURS, strict=True):
            t = result["ms"][kind].get(phase)
            if t is None:
                continue
            axis.barh(y, t["median"], left=left, color=colour, height=0.6, label=phase if kind == "eager" else None)
            left += t["median"]
        axis.text(left, y, f" {left:.0f} ms, {result['memory_mb'][kind]:.0f} MB", va="center", fontsize=9)
    axis.set_yticks([0, 1], ["eager", "dmfast"])
    axis.set_xlim(0, axis.get_xlim()[1] * 1.15)
    axis.set_xlabel("milliseconds, medians", fontsize=8)
    axis.set_title(
        f"one GDC++ step: {result['model']}, {result['batch']} sequences of {result['length']} tokens, "
        f"{result['threads']} threads", fontsize=9, loc="left",
    )  # fmt: skip
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.28))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
