"""Run a small recipe as a rank of several, under DDP or FSDP2: ``recipe_job.py JSON`` with ``out`` and ``fsdp``.

The run writes its model and ``log.json`` into ``out``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import cpu_fsdp  # noqa: F401
import torch
from ending import end

from dmfast.training import recipe


def main():
    """Run the recipe."""
    wanted = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    out = Path(wanted["out"])
    train = {
        "output_dir": str(out), "max_steps": 2, "per_device_train_batch_size": 8, "max_new_tokens": 12, "seed": 0,
        "warmup_steps": 0, "proposal_interval": 1, "proposal_criterion": "interval", "save_strategy": "no",
        "max_grad_norm": 0.0,
        "use_cpu": True, "disable_tqdm": True, **({"fsdp": True} if wanted["fsdp"] else {}),
    }  # fmt: skip
    women = {"moment": {"contains": {"any_of": ["she", "her"], "name": "women"}, "value": 0.5}}
    given = {
        "model": "tiny-bios", "constraints": [women], "fit": {"n": 2048, "seed": 0}, "train": train,
        "evaluate": {"samples": 64, "batch_size": 64},
    }  # fmt: skip
    # a recipe is YAML, and JSON is YAML too
    path = Path(f"{out}-{os.environ['RANK']}.json")
    path.write_text(json.dumps(given))
    recipe.run(recipe.read(path))
    end()


if __name__ == "__main__":
    main()
