"""Train models that transformers distributes while it loads them, and compare them with one process.

Two CPU processes divide or shard a model, and four processes do both or hold copies of shards. Checkpoints and resumed
runs are compared as well.

spread.py            runs all
spread.py NAME ...   runs these of ``WAYS``
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from engine_stand_in import StandIn  # noqa: E402
from test_spread import (  # noqa: E402
    REFUSED_CUT,
    STEPS,
    check_alike,
    check_heads,
    check_loop,
    check_proposal,
    check_refusals,
    check_run,
    launched,
    refused_sharded,
)
from trainer_job import PROMPTS, Gradients, job, llama, tokenizer  # noqa: E402

from dmfast import Contains  # noqa: E402

THREE = STEPS | {"max_steps": 3, "proposal_interval": 1}
PPO = {
    "max_steps": 2, "warmup_steps": 0, "on_policy": True, "objective": "kl_control", "beta": 0.1, "ppo_epochs": 2,
    "baseline": "leave_one_out", "reward": "w3",
}  # fmt: skip
#: The settings of each run by name. Each run ends like that of one process, up to rounding.
RUNS = {
    "at once": THREE | {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "gradient_checkpointing": True,
        "max_grad_norm": 0.1, "proposal_check_samples": 16, "prompts": PROMPTS[:4], "samples_per_context": 8,
    },
    "PPO": PPO,
    "groups": {
        "max_steps": 2, "warmup_steps": 0, "on_policy": True, "objective": "grpo", "reward": "w3",
        "prompts": PROMPTS[:4], "samples_per_context": 8,
    },
    "the best model": THREE | {
        "max_steps": 2,
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "kl_policy", "greater_is_better": False,
    },
    "whole base": THREE | {"max_steps": 2, "whole_base": True},
    "PPO in step": PPO | {"gather_for_sampling": False, "check_scores": False},
}  # fmt: skip
#: This run draws from a q that lies in a server.
ENGINE = "another engine"
RUNS[ENGINE] = THREE | {"max_steps": 2, "sampler_options": {"patience": 0.0, "retries": 1}}
RUNS["the best model, whole base"] = RUNS["the best model"] | {"whole_base": True}
#: The distribution of the model and the checks, by name.
WAYS = {
    "cut": {
        "sizes": {"tp_size": 2}, "checks": ["heads", "alike", "proposal"],
        "runs": ["at once", "PPO", "groups", "the best model", "whole base"],
        "more": {"interrupted": THREE | {"interrupt": 1}},
    },
    "sharded": {
        "sizes": {"fsdp_size": 2}, "checks": ["heads", "proposal"],
        "runs": ["at once", "PPO in step", "groups", "the best model, whole base", ENGINE],
    },
    "cut and sharded": {
        "sizes": {"fsdp_size": 2, "tp_size": 2}, "checks": ["heads", "hooked", "proposal", "loop", "refusals"],
        "runs": ["at once", "PPO in step", "groups", "the best model, whole base"],
    },
    "copies of shards": {
        "sizes": {"dp_replicate_size": 2, "fsdp_size": 2},
        "checks": ["heads", "hooked", "proposal", "loop", "refusals"],
        "runs": ["at once", "PPO in step", "groups", "the best model, whole base", ENGINE],
    },
}  # fmt: skip


def wanted(name, way):
    """Return the task of ``spread_job.py``."""
    whole = RUNS["at once"]
    runs = {each: RUNS[each] for each in way["runs"]} | way.get("more", {})
    runs |= {"stopped": whole | {"stop": 1}, "resumed": whole | {"resume": f"{name}/stopped/checkpoint-1"}}
    return {"sizes": way["sizes"], "checks": way["checks"], "runs": runs}


def alone(folder, name, ranks):
    """Return the trainer and the gradients of one process that takes the sequences of this many ranks."""
    options = {key: value for key, value in RUNS[name].items() if key not in ("whole_base", "reward")}
    options["per_device_train_batch_size"] = ranks * options.get("per_device_train_batch_size", 8)
    gradients = Gradients()
    reward = {"reward": Contains(RUNS[name]["reward"])} if "reward" in RUNS[name] else {}
    trainer = job(Path(folder, name), model=llama(), callbacks=[gradients], **options, **reward)
    trainer.train()
    return trainer, gradients.steps


def refused(sizes):
    """Return what is refused of models that are sharded in these sizes, besides what is refused of all."""
    base = f"the target's base was loaded with DistributedConfig(dp_replicate_size={sizes.get('dp_replicate_size', 1)}"
    cut = REFUSED_CUT if "tp_size" in sizes else {}
    return refused_sharded(sizes["fsdp_size"] * sizes.get("tp_size", 1)) | cut | {"base otherwise": base}


def compare(name, way, found, folder):
    """Print how a run differs from that of one process, and fail where it must not differ."""
    sizes = way["sizes"]
    ranks = sizes.get("fsdp_size", 1) * sizes.get("dp_replicate_size", 1)
    for rank, each in enumerate(found):
        check_heads(each)
        if "hooked" in way["checks"]:
            check_heads({"heads": {"hooked": each["hooked"]}})
        if "alike" in way["checks"]:
            check_alike(each, (6, 5)[rank])
        if "proposal" in way["checks"]:
            check_proposal(each["proposal"], "FSDP" if "fsdp_size" in sizes else "tensor parallelism")
        if "loop" in way["checks"]:
            check_loop(each["loop"], ranks, sizes.get("tp_size", 1))
        if "refusals" in way["checks"]:
            check_refusals(each["refusals"], refused(sizes))
    print(f"{name}: {', '.join(way['checks'])}", flush=True)
    for run in way["runs"]:
        trainer, gradients = alone(folder / name, run, ranks)
        for each in found:
            check_run(each[run], trainer, gradients)
        print(f"{name}, {run}: as one process", flush=True)
    for each in found:
        assert each["resumed"]["parameters"] == each["at once"]["parameters"], name
        assert each["resumed"]["swaps"] == each["at once"]["swaps"] == 3, name
    print(f"{name}: resumed as the unbroken run, to the bit", flush=True)
    for each in found if "interrupted" in way.get("more", {}) else ():
        # the stop was requested in the first step
        assert each["interrupted"]["steps"] == 2, each["interrupted"]["steps"]


def main(names):
    """Run the requested checks."""
    torch.set_num_threads(1)
    ways = {name: WAYS[name] for name in names or WAYS}
    with tempfile.TemporaryDirectory() as folder, StandIn(llama(seed=7), tokenizer()) as server:
        RUNS[ENGINE]["sampler"] = server.url
        for processes in (2, 4):
            some = {
                name: way for name, way in ways.items() if torch.tensor(list(way["sizes"].values())).prod() == processes
            }
            if some:
                jobs = {name: wanted(name, way) for name, way in some.items()}
                found = launched(Path(folder, str(processes)), processes, jobs, everything=processes == 2)
                for name, way in some.items():
                    compare(name, way, [each[name] for each in found], Path(folder, "alone"))


if __name__ == "__main__":
    main(sys.argv[1:])
