"""Answer two questions that the comparison leaves open (docs/alpha.md).

    python benchmarks/alpha/asides.py

alpha = .9 and REINFORCE train on the first 32 or 64 of the 256 prompts of training, at the rate 2e-4: are they more
precise on these prompts? REINFORCE trains at 1e-4 with two more seeds: is it as precise as alpha = .999 there? All else
is as in the comparison, whose runs are the others that are needed. The measures at the end are written to
benchmarks/results/alpha/asides.json. Each of the six runs takes some three minutes on one core.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from alpha_grid import HERE, RESULTS
from train_one import Data, run

#: The method, the rate, the seed and the number of prompts of each run.
RUNS = (
    ("alpha=0.9", 2e-4, 0, 32), ("reinforce", 2e-4, 0, 32), ("alpha=0.9", 2e-4, 0, 64), ("reinforce", 2e-4, 0, 64),
    ("reinforce", 1e-4, 1, 256), ("reinforce", 1e-4, 2, 256),
)  # fmt: skip


def trained(method: str, rate: float, seed: int, prompts: int) -> dict[str, Any]:
    """Train by a method on the first prompts of training, and return the measures at the end."""
    torch.set_num_threads(1)
    data = Data(HERE / "base")
    data.pairs = {**data.pairs, "train": data.pairs["train"][:prompts]}
    before = data.measured(data.model)["train"]
    told = {"method": method, "rate": rate, "seed": seed, "prompts": prompts, "train before": before}
    return told | run(data, method, rate, seed)["end"]


def main() -> None:
    """Do the runs, two at a time, and write their measures."""
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = list(pool.map(trained, *zip(*RUNS, strict=True)))
    (RESULTS / "asides.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for each in found:
        print(*(each[name] for name in ("method", "rate", "seed", "prompts")), each["train"], each["test"], sep="\n ")


if __name__ == "__main__":
    main()
