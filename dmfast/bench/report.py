"""Show what a benchmark found, as tables, lines of text and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .measure import PHASES, WHOLE
from .noise import Times, noise, noisy, quartiles

Result = Mapping[str, Any]  # what worker.run returns
_BESIDE = ("roof", "scoring")  # these do not compute the loss
OURS = ("dm_loss", "linear_dm_loss", "sample_tokens", "scoring: sequence_log_prob", "nn.Linear, dm_loss")
_BASELINE = {
    "logits": "eager log_softmax + gather", "head": "nn.Linear, eager log_softmax + gather",
    "sampling": "eager softmax, multinomial, log_softmax, gather",
}  # fmt: skip


def _rich_table(title: str, columns: Sequence[str]) -> Any:
    """Return a rich table that wraps what is too wide for the terminal and cuts nothing.

    The first column has the names, is the widest, and so is the first to be wrapped.
    """
    from rich import box
    from rich.table import Table

    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        out.add_column(column, justify="left" if not column else "right", overflow="fold")
    return out


def table(result: Result) -> Any:
    """Return a rich table of one configuration: the roofs, then what was timed, the slowest last."""
    from rich.console import Group

    ms, memory = result["ms"], result.get("memory_mb", {})
    base = ms.get(_BASELINE[result["config"]["form"]], {"median": float("nan")})["median"]  # it may not have run
    columns = ["", "ms", "quartiles", "× eager"]
    columns += ["extra MB"] * bool(memory) + ["error"] * bool(result["gradient_error"])
    out = _rich_table(result["title"], columns)
    wild = noisy(ms)
    for name, t in sorted(ms.items(), key=lambda item: (not item[0].startswith("roof"), item[1]["median"])):
        error, mb = result["gradient_error"].get(name), memory.get(name)
        cells = {
            "": name + ": noisy" * (name in wild), "ms": f"{t['median']:.1f}", "quartiles": quartiles(t),
            "× eager": "" if name.startswith(_BESIDE) else f"{base / t['median']:.2f}",
            "extra MB": "" if mb is None else f"{mb:.0f}",
            "error": "" if error is None else f"{error:.1g}",
        }  # fmt: skip
        style = "bold" if name.startswith(OURS) else "dim" if name.startswith("roof") else None
        out.add_row(*(cells[column] for column in columns), style=style)
    lines = ["× eager: times the speed of the plain way; error: of the gradient, relative to the exact one."]
    lines += [f"not run: {name}: {why}" for name, why in result["not_run"].items()]
    lines += [noise(ms)] if wild else []
    return Group(out, *lines)


class Ratio(NamedTuple):
    """Hold a figure that dmfast is held to.

    Attributes:
        what, title: what it is, and of which configuration.
        value: the ratio of the medians.
        low, high: the smallest and the largest ratio of their quartiles.
        noisy: whether one of its times was not measured well.
    """

    what: str
    title: str
    value: float
    low: float
    high: float
    noisy: bool

    def __str__(self) -> str:
        shown = f"{self.value:7.2f} ({self.low:.2f} – {self.high:.2f})"
        return f"{shown}  {self.what}: {self.title}" + ", noisy" * self.noisy


def ratios(results: Sequence[Result]) -> list[Ratio]:
    """Return the figures that dmfast is held to."""
    found = []
    for r in results:
        wild = noisy(r["ms"])

        def add(
            what: str, over: str, under: str, ms: Times = r["ms"], title: str = r["title"], wild: Any = wild
        ) -> None:
            names = [each.split(" & ") for each in (over, under)]
            if not all(name in ms for each in names for name in each):
                return

            def total(side: int, key: str) -> float:
                return sum(ms[name][key] for name in names[side])

            low, value, high = (
                total(0, a) / total(1, b) for a, b in (("low", "high"), ("median", "median"), ("high", "low"))
            )
            found.append(Ratio(what, title, value, low, high, any(name in wild for each in names for name in each)))

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
    """Draw the time of each rival with its quartiles, ours dark, and the roofs as lines; a panel per configuration."""
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


_EAGER = (
    "eager is the same step in plain transformers and torch: generate, log_softmax and gather, and autograd "
    "(dmfast/bench/eager_step.py)."
)
_FORWARD = (
    "dmfast's policy forward makes the gradients of the head and of its input as well: compare the line of forward + "
    "backward. It needs no scoring by q, since the sampler returns log q."
)


def whole_steps(ms: Mapping[str, Times]) -> Times:
    """Return the time of a whole step of each kind, which is what has to be measured well."""
    return {f"{kind}: {WHOLE}": phases[WHOLE] for kind, phases in ms.items()}


def step_table(result: Result) -> Any:
    """Return the two steps, phase by phase: a table of times, one of memory and counts, and what the words mean."""
    from rich.console import Group

    title = (f"one GDC++ step of {result['model']} ({result['parameters'] / 1e6:.1f}M parameters), {result['batch']} "
             f"sequences of {result['length']} tokens, {result['threads']} threads")  # fmt: skip
    times = _rich_table(title, ("", "dmfast, ms", "quartiles", "eager, ms", "quartiles", "× eager"))
    ours, plain = result["ms"]["dmfast"], result["ms"]["eager"]
    for phase in plain:
        mine, other = ours.get(phase), plain[phase]
        own = ("not needed", "") if mine is None else (f"{mine['median']:.0f}", quartiles(mine, 0))
        ratio = "" if mine is None else f"{other['median'] / mine['median']:.2f}"
        style = "bold" if phase == WHOLE else None
        times.add_row(phase, *own, f"{other['median']:.0f}", quartiles(other, 0), ratio, style=style)
    counts = _rich_table("its memory and work", ("", "dmfast", "eager", "eager / dmfast"))
    memory = result["memory_mb"]
    counts.add_row("peak memory beside the models, MB", f"{memory['dmfast']:.0f}", f"{memory['eager']:.0f}",
                   f"{memory['eager'] / memory['dmfast']:.2f}")  # fmt: skip
    for what, key in (("forwards", "forwards"), ("tokens through a model", "tokens"), ("rows projected to V", "rows")):
        both = [sum(v[key] for v in result["forwards"][kind].values()) for kind in ("dmfast", "eager")]
        counts.add_row(what, f"{both[0]:,}", f"{both[1]:,}", f"{both[1] / both[0]:.2f}")
    said = noise(whole_steps(result["ms"]))
    return Group(times, counts, _EAGER, _FORWARD, *([said] if said else []))


_FASTER = {
    "sampling": "docs/engines.md has engines that draw faster, and docs/scale.md samples ahead of the training",
    "scoring by a": "a base in 16 bits scores faster, and docs/scale.md spreads the sequences over devices",
    "policy": "LoRA and 16 bits make it less, and docs/scale.md spreads it over devices",
    "optimiser": "LoRA leaves few parameters to step",
}


def step_advice(result: Result) -> str:
    """Return where most of dmfast's step goes, and what would make that less."""
    ms = {phase: t["median"] for phase, t in result["ms"]["dmfast"].items()}
    parts = {"policy": ms["policy forward"] + ms["policy backward"]}
    parts |= {phase: ms[phase] for phase in ("sampling", "scoring by a", "optimiser")}
    most = max(parts, key=lambda phase: parts[phase])
    return (
        f"What to do with this: {most} takes {100 * parts[most] / sum(parts.values()):.0f}% of dmfast's step; "
        f"{_FASTER[most]}. Try --batch and --length of your run, since the ratio depends on them."
    )


def advice(results: Sequence[Result]) -> str:
    """Return what to do next with the times of the losses."""
    again = " Lines that say noisy are not results: end other programs, and measure them again with --resume."
    return (
        "What to do with this: find the table whose shape (tokens, vocabulary) is nearest to yours. × eager is what "
        "the loss alone would gain; dmfast bench --model NAME tells how much of a whole training step that is. The "
        "guide has the loss in a loop of your own." + again * any(noisy(r["ms"]) for r in results)
    )


def step_chart(result: Result, path: Path) -> None:
    """Draw both steps as stacked bars."""
    from ..training.report import pyplot  # imports transformers, which a table does not need

    plt = pyplot()
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
