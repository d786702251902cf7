"""Measure the variance of the gradient with and without the baseline, on the same batches.

    python benchmarks/paper/variance.py --seed 0        # writes results/paper/same_state_seed0.json

In the grid, GDC and GDC++ are measured along their own paths, and each has its own pi and q. Here a run of GDC++ stops
ten times and draws a batch from the current q. Its sequences are weighted with A = u (GDC) and A = u - rho (GDC++).
Nothing else differs, so the difference of the variances is the effect of the baseline.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import grid
import run
import torch
import truth
from transformers import TrainerCallback

from dmfast.diagnostics import gradient_variance
from dmfast.training import DMTrainer, report

STATES, BATCH = 10, 256
OBJECTIVES = {"gdc": "dpg", "gdc++": "gdc++"}


def measure(trainer: DMTrainer, log_z: float, n: int, seed: int) -> dict[str, Any]:
    """Return the variances of gradient and advantage under each objective.

    They come from n sequences of the current q and share one log Z.
    """
    x = trainer.proposal.sample(n=n, max_new_tokens=trainer.args.max_new_tokens, seed=seed)
    log_target, found = trainer.target.log_prob(x), {}
    for method, objective in OBJECTIVES.items():
        with torch.no_grad():
            out = trainer.policy.loss(
                x, objective=objective, log_target=log_target, log_proposal=x.log_prob, log_z=log_z
            )
        gradient = gradient_variance(trainer.policy, x, out.weight)
        found[method] = {
            "gradient_variance": gradient.variance, "gradient_norm": gradient.norm,
            "advantage_variance": float(out.weight.var()),
        }  # fmt: skip
    return found


class _Stops(TrainerCallback):  # type: ignore[misc]
    """Measure every so many steps without disturbing the training. All draws have seeds of their own."""

    def __init__(self, log_z: float, every: int, n: int) -> None:
        self.log_z, self.every, self.n = log_z, every, n
        self.trainer: Any = None
        self.found: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            seed = 2**34 + state.global_step
            at = {
                "step": state.global_step,
                "samples": state.global_step * run.BATCH,
                "swaps": self.trainer.proposal.swaps,
            }
            self.found.append(at | measure(self.trainer, self.log_z, self.n, seed))


def states(task: str, seed: int, learning_rate: float, samples: int, count: int, n: int) -> list[dict[str, Any]]:
    """Return the results of ``measure`` at ``count`` times during the GDC++ run of the grid."""
    changed = run.settings("gdc++", run.BATCH, learning_rate, samples)
    changed |= {"seed": seed, "eval_strategy": "no", "disable_tqdm": True, "sampling_batch_size": 256}
    with tempfile.TemporaryDirectory() as folder:
        trainer = run.prepare(task, "gdc++", changed | {"output_dir": folder})
        log_z = truth.log_z_of(truth.known(task)).value
        stops = _Stops(log_z, changed["max_steps"] // count, n)
        stops.trainer = trainer
        trainer.add_callback(stops)
        torch.manual_seed(seed)
        trainer.train()
    return stops.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", nargs="*", default=grid.STUDIED, help="default: the rare word and the women")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=run.SAMPLES)
    parser.add_argument("--out", type=Path, help="default: results/paper/same_state_seedN.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, rate = time.perf_counter(), grid.tuned(grid.RESULTS / "runs", ["gdc++"])["gdc++"]
    found = {task: states(task, args.seed, rate, args.samples, STATES, BATCH) for task in args.task}
    result = {"seed": args.seed, "learning_rate": rate, "batch": BATCH, "machine": report.machine(), "tasks": found,
              "seconds": time.perf_counter() - start}  # fmt: skip
    whole = args.samples == run.SAMPLES and tuple(args.task) == grid.STUDIED
    if not args.out and not whole:
        parser.error("--out: only what is measured of both tasks, with all sequences, goes among the results")
    out = args.out or grid.RESULTS / f"same_state_seed{args.seed}.json"
    report.write(result, out.parent, out.name)


if __name__ == "__main__":
    main()
