"""Run ``dmfast demo``, and the loop of ``examples/custom_loop.py``.

Both evaluate a real model before and after training, and show a table and write a plot.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .estimators import Estimate
from .targets import EBM, Moment, Scorer
from .training import recipe, report
from .training.callbacks import in_words
from .training.evaluation import evaluate
from .training.recipe import TINY_BIOS
from .training.verdict import verdict

RECIPES = Path(__file__).parent / "recipes"

# SmolLM2 was not trained on our biographies, so the prompt shows it three of them, and a newline ends the fourth.
THREE_SHOTS = (
    "Short biographies of notable people.\n\n"
    "Biography: Albert Brown was a Scottish engineer. He built bridges and taught in Glasgow.\n"
    "Biography: Marie Lefèvre was a French painter. She is known for her landscapes of the Loire.\n"
    "Biography: Giorgio Conti was an Italian composer. He wrote three operas and many songs.\n"
    "Biography:"
)


def about_women(texts: list[str]) -> Tensor:
    """Return 1 for each text that has a feminine pronoun and 0 for any other, (N,) fp64."""
    return torch.tensor([bool(re.search(r"\b(she|her)\b", text, re.IGNORECASE)) for text in texts], dtype=torch.float64)


def console() -> Any:
    """Return the console that the commands print to."""
    from rich.console import Console

    return Console(markup=False, highlight=False)  # so that [women] is not read as markup


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``dmfast demo``."""
    parser.add_argument("--steps", type=int, default=80, help="optimiser steps")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the samples that training draws")
    parser.add_argument("--samples", type=int, default=2048, help="fresh samples before and after training")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the model, log.json and the picture")


def demo(args: argparse.Namespace) -> dict[str, Any]:
    """Train with ``DMTrainer`` until half of the biographies are about women, and say whether the run reached that.

    Raises:
        ValueError, OSError, ImportError: as ``recipe.run``; or a number of steps or samples that is not positive.
    """
    for name in ("steps", "samples"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be a positive integer, got {getattr(args, name)}")
    overrides = {"train.max_steps": args.steps, "train.seed": args.seed, "train.output_dir": str(args.out),
                 "evaluate.samples": args.samples}  # fmt: skip
    say = console().print
    return recipe.run(recipe.read(RECIPES / "tiny_bios.yaml", overrides), say=say)


def loop_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line of ``examples/custom_loop.py``."""
    parser = argparse.ArgumentParser(description="half of the biographies about women, with a loop of your own")
    parser.add_argument("--model", default="tiny-bios", help="tiny-bios or a transformers folder")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=192, help="sequences per optimiser step")
    parser.add_argument("--learning-rate", type=float, default=1.5e-4)
    parser.add_argument("--interval", type=int, default=5, help="steps between checks whether q should become pi")
    parser.add_argument("--objective", default="gdc++")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--samples", type=int, default=1024, help="fresh samples before and after")
    parser.add_argument("--eval-batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("custom_loop"))
    return parser


def main(train: Callable[..., Iterator[dict[str, float]]]) -> None:
    """Run ``examples/custom_loop.py`` with its training loop."""
    run_loop(loop_parser().parse_args(), train)


def run_loop(args: argparse.Namespace, train: Callable[..., Iterator[dict[str, float]]]) -> dict[str, Any]:
    """Evaluate, train with the loop ``train``, and evaluate again.

    The results are ``log.json`` and ``report.png`` in ``args.out``.
    """
    say, tiny, start = console().print, args.model == "tiny-bios", time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)  # a folder that can't be made is found before the training
    policy = recipe.load(args.model, stop=None if tiny else "\n")
    base = policy.around(copy.deepcopy(policy.model).requires_grad_(False))
    prompts = None if tiny else [THREE_SHOTS]
    target = EBM(base, [Moment(Scorer(about_women, name="women", binary=True), 0.5)])
    how: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "batch_size": args.eval_batch}
    samples = base.sample(prompts, args.samples, seed=args.seed + 10**6, **how)
    target.fit(samples)
    assert target.report is not None
    say(str(target.report))
    rate = target.report.base[0].value
    before = {"phi/women": target.report.base[0], "kl_policy_base": Estimate(0.0, 0.0)}
    if tiny:  # its rate is known from more samples, and lambda of one binary feature is the difference of log-odds
        rate = json.loads((TINY_BIOS / "base_rates.json").read_text())["features"]["female"]["rate"]
        target.lambda_ = [math.log((1 - rate) / rate)]
    history, training = [], time.perf_counter()
    for metrics in train(
        policy, target, prompts=prompts, steps=args.steps, batch_size=args.batch, max_new_tokens=args.max_new_tokens,
        learning_rate=args.learning_rate, interval=args.interval, objective=args.objective, seed=args.seed,
    ):  # fmt: skip
        history.append(metrics)
        say(f"step {metrics['step']:3.0f}  share of women {metrics['phi/women']:.2f}  KL(p‖π) "
            f"{in_words(metrics['kl_policy'])}  Z {in_words(metrics['z'], '.2f')}  "
            f"effective sequences {in_words(metrics['ess'], '.0f')}"
            + ("  q <- pi" if metrics["swapped"] else ""))  # fmt: skip
    training = time.perf_counter() - training
    x, after = evaluate(policy, target, prompts, args.samples, seed=args.seed + 10**6, **how)
    ideal = {"phi/women": Estimate(0.5, 0.0), "kl_policy_base": Estimate(_two_coins(0.5, rate), 0.0)}
    log: dict[str, Any] = {
        "machine": report.machine(), "args": vars(args), "base_rate": rate, "before": before, "after": after,
        "ideal": ideal, "swaps": sum(h["swapped"] for h in history), "seconds_training": training,
        "seconds_all": time.perf_counter() - start, "samples_before": samples.text[:20],
        "samples_after": x.text[:20], "history": history,
    }  # fmt: skip
    log["verdict"] = verdict(before, after, ideal, ["women"])
    say(report.table(log))
    say(report.samples_table(log["samples_before"][:6], log["samples_after"][:6]))
    swaps = f"{log['swaps']:.0f} swap{'s' * (log['swaps'] != 1)} of q"
    say(f"{swaps}, training {training:.0f} s, all {log['seconds_all']:.0f} s")
    say(log["verdict"])  # before anything is written, because a full disk may take the files
    report.write(log, args.out)
    title = f"{args.objective} on {Path(args.model).name}: women {before['phi/women']} → {after['phi/women']}"
    report.plot(history, args.out / "report.png", title, wanted={"women": 0.5})
    say(f"wrote {args.out}/log.json and {args.out}/report.png")
    return log


def _two_coins(p: float, a: float) -> float:
    """Return the KL between two coins, which is KL(p||a) if p differs from a by one binary feature."""
    return p * math.log(p / a) + (1 - p) * math.log((1 - p) / (1 - a))
