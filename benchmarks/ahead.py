"""Measure the benefit of sampling ahead.

The same training runs twice with q in a process of its own. In one run each batch is drawn when it is needed, in the
other run batches are drawn ahead. The model is tiny-bios, and each of the two processes has one thread. With a file
name, the results are written as JSON.

    python benchmarks/ahead.py [results/ahead.json] [--seeds 0 1 2] [--steps 60]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import dmfast
from dmfast.demo import about_women
from dmfast.sampling import AsyncSampler, ProcessSampler
from dmfast.training.evaluation import evaluate
from dmfast.training.recipe import TINY_BIOS, load
from dmfast.training.report import machine

AHEAD, BATCH, LENGTH, RATE, WARMUP, INTERVAL, FRESH = 2, 192, 48, 1.5e-4, 10, 5, 4096


def trained(engine: ProcessSampler, ahead: bool, seed: int, steps: int) -> dict[str, Any]:
    """Train once, and return the results."""
    policy = load("tiny-bios")
    base = policy.around(copy.deepcopy(policy.model).requires_grad_(False))
    target = dmfast.EBM(base, [dmfast.Moment(dmfast.Scorer(about_women, name="women", binary=True), 0.5)])
    rate = json.loads((TINY_BIOS / "base_rates.json").read_text())["features"]["female"]["rate"]
    target.lambda_ = [math.log((1 - rate) / rate)]
    sampler: Any = AsyncSampler(engine, AHEAD) if ahead else engine
    proposal = dmfast.OfflineProposal(policy, interval=INTERVAL, sampler=sampler)
    matcher = dmfast.Matcher(policy, target, proposal, seed=seed)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    policy.model.train()
    log, start, cpu = [], time.perf_counter(), time.process_time()
    for step in range(steps):
        batch = matcher.draw(None, BATCH, max_new_tokens=LENGTH, next_prompts=[None] * min(AHEAD, steps - 1 - step))
        matcher.loss(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        log.append(matcher.commit())
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    _, found = evaluate(policy, target, None, FRESH, seed=10**6, max_new_tokens=LENGTH, batch_size=256)
    measured = {name: found[name] for name in ("phi/women", "kl_policy", "kl_policy_base")}
    return {
        "seconds": round(seconds, 2),
        "seconds waiting for samples": round(sum(each["seconds_sampling"] for each in log), 2),
        "cpu seconds of the training process": round(cpu, 2),
        "swaps": int(log[-1]["swaps"]),
        "steps of an older q": sum(each["lag"] > 0 for each in log),
        "mean ess": round(statistics.mean(each["ess"] for each in log), 1),
        **{name: [round(each.value, 4), round(each.stderr, 4)] for name, each in measured.items()},
    }


def main() -> None:
    """Train each seed in both ways, one after the other, and print and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    engine, runs = ProcessSampler(load("tiny-bios"), threads=1), []
    for seed in args.seeds:
        for ahead in (False, True):
            runs.append({"ahead": ahead, "seed": seed, **trained(engine, ahead, seed, args.steps)})
            print(runs[-1], flush=True)
            if args.out:
                shape = {"model": "tiny-bios", "steps": args.steps, "sequences": BATCH, "ahead": AHEAD, "unit": "s"}
                args.out.write_text(json.dumps({"machine": machine(), "shape": shape, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
