"""``dmfast demo``: the loop of ``examples/custom_loop.py`` on a real model, with a progress bar, a table and a plot."""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__, kernels
from .models import LanguageModel, Samples

TINY_BIOS = Path(__file__).parent / "data" / "tiny_bios"

# SmolLM2 has not seen our biographies: three of them in the prompt, and a newline ends the fourth.
THREE_SHOTS = (
    "Short biographies of notable people.\n\n"
    "Biography: Albert Brown was a Scottish engineer. He built bridges and taught in Glasgow.\n"
    "Biography: Marie Lefèvre was a French painter. She is known for her landscapes of the Loire.\n"
    "Biography: Giorgio Conti was an Italian composer. He wrote three operas and many songs.\n"
    "Biography:"
)


def about_women(texts: list[str]) -> Tensor:
    """(N,) fp64: 1 where a text has a feminine pronoun."""
    return torch.tensor([bool(re.search(r"\b(she|her)\b", text, re.IGNORECASE)) for text in texts], dtype=torch.float64)


@dataclass(frozen=True)
class Rate:
    """A share with its standard error."""

    value: float
    stderr: float

    @staticmethod
    def of(hits: Tensor) -> Rate:
        """From (N,) of 0 and 1."""
        share = hits.mean().item()
        return Rate(share, math.sqrt(share * (1 - share) / len(hits)))

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.stderr:.3f}"


def load(path: Path) -> LanguageModel:
    """A transformers folder as a ``LanguageModel`` in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not path.is_dir():
        raise SystemExit(f"there is no folder {path}; scripts/fetch_smollm2.py writes one")
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if path == TINY_BIOS:
        return LanguageModel(model, tokenizer)
    newlines = [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]
    return LanguageModel(model, tokenizer, eos_token_id=[tokenizer.eos_token_id, *newlines])


def evaluate(model: LanguageModel, base: LanguageModel, args: argparse.Namespace) -> tuple[Samples, Tensor, Rate]:
    """Fresh samples of the model, whether each is about a woman, and KL(model||a) in nats."""
    prompts = None if args.model == TINY_BIOS else [THREE_SHOTS]
    x = model.sample(
        prompts, args.samples, max_new_tokens=args.max_new_tokens, seed=args.seed + 10**6, batch_size=args.eval_batch
    )
    with torch.no_grad():
        gap = x.log_prob - base.log_prob(x, batch_size=args.eval_batch)
    kl = Rate(gap.mean().item(), gap.std().item() / math.sqrt(len(x)))
    return x, about_women(x.text), kl


def ideal_kl(base_rate: float, target_rate: float = 0.5) -> float:
    """KL(p||a) of the target p: that of two coins, since p differs from a by one binary feature."""
    p, a = target_rate, base_rate
    return p * math.log(p / a) + (1 - p) * math.log((1 - p) / (1 - a))


def plot(history: list[dict[str, float]], base_rate: float, title: str, path: Path) -> None:
    """E[phi] under q, the divergences from p with the swaps of q, Z and ESS over steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    steps = [h["step"] for h in history]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), sharex=True, constrained_layout=True)
    panels: list[tuple[str, list[tuple[str, str, str]], tuple[float, str] | None]] = [
        ("E[φ] under the proposal q", [("feature", "about women", "C0")], (0.5, "target")),
        (
            "divergence from the target p (nats)",
            [("kl_policy", "KL(p‖π)", "C0"), ("kl_proposal", "KL(p‖q)", "C1")],
            None,
        ),
        ("log Z", [("log_z_running", "running", "C0")], (math.log((1 - base_rate) * 2), "from the base rate")),
        ("effective sample size of a step", [("ess_step", "sequences", "C0")], None),
    ]
    for axis, (name, lines, known) in zip(axes.flat, panels, strict=True):
        for key, label, color in lines:
            values = torch.tensor([h[key] for h in history], dtype=torch.float64)
            axis.plot(steps, values, color=color, label=label)
            if f"{key}_stderr" in history[0]:
                error = torch.tensor([h[f"{key}_stderr"] for h in history], dtype=torch.float64)
                axis.fill_between(steps, values - error, values + error, color=color, alpha=0.2, linewidth=0)
        if known is not None:
            axis.axhline(known[0], color="black", linewidth=0.8, linestyle="--", label=known[1])
        for i, h in enumerate(h for h in history if h["swapped"]):
            axis.axvline(h["step"], color="grey", linewidth=0.6, alpha=0.6, label="q ← π" if i == 0 else None)
        axis.set_title(name, fontsize=10)
        axis.legend(fontsize=8, loc="best")
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def machine() -> dict[str, Any]:
    """What a result was taken on: date, versions, processor, threads, backend."""
    import platform

    import transformers

    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "date": date.today().isoformat(), "dmfast": __version__, "torch": torch.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(), "cpu": cpu,
        "threads": torch.get_num_threads(), "backend": kernels.backends()["cpu"].detail,
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def run(args: argparse.Namespace, train: Callable[..., Iterator[dict[str, float]]]) -> dict[str, Any]:
    """Before, training with the loop ``train``, after. Writes ``log.json`` and ``report.png`` into ``args.out``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    tiny = args.model == TINY_BIOS
    policy = load(args.model)
    base = LanguageModel(copy.deepcopy(policy.model).requires_grad_(False), policy.tokenizer)
    base_rate: float | None = args.base_rate
    if base_rate is None and tiny:
        base_rate = json.loads((TINY_BIOS / "base_rates.json").read_text())["features"]["female"]["rate"]
    console.print(f"[bold]dmfast[/bold] {__version__}: half of the biographies about women, {args.objective}, "
                  f"{args.steps} steps of {args.batch} sequences, model {args.model}")  # fmt: skip
    start = time.perf_counter()
    before, women_before, kl_before = evaluate(policy, base, args)
    if base_rate is None:
        base_rate = Rate.of(women_before).value
    if not 0 < base_rate < 1:
        raise SystemExit(f"none or all of {args.samples} samples are about women: no lambda gives the target")

    history: list[dict[str, float]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    training = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=args.steps)
        for metrics in train(
            policy, about_women, base_rate=base_rate, prompts=None if tiny else [THREE_SHOTS], steps=args.steps,
            batch_size=args.batch, max_new_tokens=args.max_new_tokens, learning_rate=args.learning_rate,
            interval=args.interval, objective=args.objective, seed=args.seed,
        ):  # fmt: skip
            history.append(metrics)
            line = (f"women under q {metrics['feature']:.2f}  KL(p‖π) {metrics['kl_policy']:.3f}  "
                    f"Z {math.exp(metrics['log_z_running']):.2f}  ESS {metrics['ess_step']:.0f}")  # fmt: skip
            progress.update(task, advance=1, description=line)
            if not console.is_terminal:
                console.print(f"step {metrics['step']:3.0f}  {line}  {'q <- pi' if metrics['swapped'] else ''}")
    training = time.perf_counter() - training
    after, women_after, kl_after = evaluate(policy, base, args)

    log: dict[str, Any] = {
        "machine": machine(),
        "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if not callable(v)},
        "base_rate": base_rate,
        "before": vars(Rate.of(women_before)),
        "after": vars(Rate.of(women_after)),
        "kl_policy_base": vars(kl_after),
        "ideal_kl": ideal_kl(base_rate),
        "swaps": sum(h["swapped"] for h in history),
        "seconds_training": training,
        "seconds_all": time.perf_counter() - start,
        "samples_before": before.text[:20],
        "samples_after": after.text[:20],
        "history": history,
    }
    _show(console, log, before, after, kl_before)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "log.json").write_text(json.dumps(log, indent=1, ensure_ascii=False) + "\n")
    name = "tiny biographies" if tiny else args.model.name
    plot(history, base_rate, f"{args.objective} on {name}: women {Rate.of(women_before)} → {Rate.of(women_after)}",
         args.out / "report.png")  # fmt: skip
    console.print(f"wrote {args.out}/log.json and {args.out}/report.png")
    return log


def _show(console: Any, log: dict[str, Any], before: Samples, after: Samples, kl_before: Rate) -> None:
    from rich.table import Table

    n = len(before)
    table = Table(title=f"{n:,} samples each, mean ± standard error")
    for column in ("", "before", "after", "target"):
        table.add_column(column)
    table.add_row("share of women", str(Rate(**log["before"])), str(Rate(**log["after"])), "0.500")
    table.add_row("KL(π‖a), nats", str(kl_before), str(Rate(**log["kl_policy_base"])), f"{log['ideal_kl']:.3f}")
    console.print(table)
    samples = Table(title="six samples before and after", show_lines=True)
    samples.add_column("before", ratio=1)
    samples.add_column("after", ratio=1)
    for pair in zip(before.text[:6], after.text[:6], strict=False):
        samples.add_row(*(text.strip() for text in pair))
    console.print(samples)
    console.print(
        f"{log['swaps']} swaps of q, training {log['seconds_training']:.0f} s, all {log['seconds_all']:.0f} s"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``dmfast demo`` and of ``examples/custom_loop.py``."""
    parser.add_argument("--model", type=lambda p: Path(p).expanduser(), default=TINY_BIOS, help="a transformers folder")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=192, help="sequences per optimiser step")
    parser.add_argument("--learning-rate", type=float, default=1.5e-4)
    parser.add_argument("--interval", type=int, default=5, help="steps between checks whether q should become pi")
    parser.add_argument("--objective", default="gdc++")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--base-rate", type=float, help="share of women under the base, if measured already")
    parser.add_argument("--samples", type=int, default=1024, help="fresh samples before and after")
    parser.add_argument("--eval-batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo"))


def main(train: Callable[..., Iterator[dict[str, float]]]) -> None:
    """The command line of ``examples/custom_loop.py``, with the loop that stands there."""
    parser = argparse.ArgumentParser(description="half of the biographies about women, with a loop of your own")
    add_arguments(parser)
    run(parser.parse_args(), train)
