"""Train under DeepSpeed's ZeRO and under DDP on two CPU processes, and compare parameters, gradients and resumed runs.

zero.py            runs all
zero.py NAME ...   runs these of ``RUNS`` and ``LOOPS`` and nothing else
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
JOB = ROOT / "tests" / "deepspeed_job.py"
sys.path.insert(0, str(ROOT / "tests"))  # the root is left out, because its dmfast may lack its kernels

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from trainer_job import tokenizer  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from dmfast import LanguageModel  # noqa: E402

LORA = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
STEPS = {"max_steps": 5, "proposal_criterion": "interval", "proposal_interval": 2}
#: The settings of each run by name, and the stages of ZeRO under which it runs.
RUNS = {
    "tied head, clipping": ({"max_grad_norm": 0.1, "optim": "sgd", "learning_rate": 0.2}, (1, 2, 3)),
    "head of its own": ({"model": "llama", **STEPS}, (2, 3)),
    "accumulation, checkpointing": (
        {
            "model": "llama", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
        },
        (2, 3),
    ),
    "prompts, fresh checks, zero weights skipped": (
        {
            "prompts": ["w1 w2", "w3", "w4 w5 w6", "w7"], "samples_per_context": 4, "skip": True, "objective": "dpg",
            "max_new_tokens": 3, "skip_zero_weight": True, "proposal_check_samples": 32,
        },
        (2, 3),
    ),
    "on-policy, PPO": (
        {"on_policy": True, "objective": "kl_control", "beta": 0.1, "ppo_epochs": 2, "baseline": "leave_one_out"},
        (2, 3),
    ),
    "groups": (
        {
            "model": "llama", "prompts": ["w1 w2", "w3", "w4 w5 w6", "w7"], "samples_per_context": 4, "on_policy": True,
            "objective": "grpo", "max_steps": 3,
        },
        (2, 3),
    ),
    "evaluation, the best model": (
        {
            "model": "llama", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3, "save_strategy": "steps",
            "save_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "kl_policy",
            "greater_is_better": True,
        },
        (2, 3),
    ),
    "LoRA on one backbone": ({"lora": LORA, **STEPS}, (2,)),
    "LoRA on copies": ({"model": "with_lora", **STEPS}, (2, 3)),
    "bf16": ({"model": "llama", "bf16": True, **STEPS}, (2, 3)),
}  # fmt: skip
#: These variables are set by ``accelerate launch --use_deepspeed --zero_stage 3``.
LAUNCHER = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
}
#: These are other ways to start one of the runs.
WAYS = {
    f"accelerate launch, ZeRO-{stage}": (
        "head of its own",
        {"stage": stage, "launcher": LAUNCHER | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}},
    )
    for stage in (2, 3)
}
#: These models are trained by a loop around ``Matcher``, without ``DMTrainer``.
LOOPS = {"a loop, tied head": "gpt2", "a loop, head of its own": "llama"}
#: These sums have another order: ZeRO-2 sums microbatches in buckets, and ZeRO-3 multiplies by another kernel.
ROUNDING = 1e-5
#: DDP keeps fp32 parameters and multiplies in 16 bits, while DeepSpeed keeps 16-bit copies of them.
ROUNDED = {"bf16": 0.1}
#: These runs are also stopped after three steps and resumed.
RESUMED = [
    "head of its own, ZeRO-2", "head of its own, ZeRO-3", "LoRA on one backbone, ZeRO-2", "LoRA on copies, ZeRO-3",
    "bf16, ZeRO-3",
]  # fmt: skip
#: ``deepspeed_job.py`` checks this after a run.
CHECKS = {
    "head of its own, ZeRO-3": "scored", "head of its own, ZeRO-3 stopped": "broken",
    "head of its own, ZeRO-2 stopped": "twice",
}  # fmt: skip
#: These jobs are refused; each entry has a part of the message.
REFUSED = {
    "no accelerator": ({"stage": 2, "use_cpu": False}, "each of them would train alone"),
    "no accelerator, launched": ({"launcher": LAUNCHER, "stage": 3, "use_cpu": False}, "would train alone"),
    "offload": (
        {"stage": 2, "config": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}, "leave offload out",
    ),
    "an optimiser of DeepSpeed's": (
        {"stage": 2, "config": {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}},
        "optimizer of the DeepSpeed config was not tried",
    ),
    "no clipping in the config": (
        {"stage": 2, "config": {"gradient_clipping": None}}, "DeepSpeed then clips by a norm of its own",
    ),
    "no model to save": (
        {"stage": 3, "config": {"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": False}}},
        "save_model would write no model under ZeRO-3",
    ),
    "LoRA on one backbone, ZeRO-3": ({"lora": LORA, "stage": 3}, "LoRA on one backbone does not run under ZeRO-3"),
    "another stage": (
        {"model": "llama", "stage": 2, "resume": f"{RESUMED[1]} stopped/checkpoint-3"}, "is of a run under ZeRO-3 of 2",
    ),
    "DDP's": (
        {"model": "llama", "stage": 2, "resume": "DDP/checkpoint-3"}, "is of a run without DeepSpeed, and this run is",
    ),
    "without DeepSpeed": (
        {"model": "llama", "resume": f"{RESUMED[0]} stopped/checkpoint-3"}, "and this run is without DeepSpeed",
    ),
    "of another model": ({"stage": 2, "resume": f"{RESUMED[0]} stopped/checkpoint-3"}, "RuntimeError"),
}  # fmt: skip


def launched(out, variants):
    """Return the results of the ranks of ``deepspeed_job.py``, a dictionary each."""
    out.mkdir(parents=True, exist_ok=True)
    wanted = {
        "out": str(out),
        "variants": variants,
        "loaded": RESUMED[1] if f"{RESUMED[1]} stopped" in variants else None,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(JOB), json.dumps(wanted)], capture_output=True, text=True, timeout=500,
                          check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [json.loads((out / f"result-{rank}.json").read_text()) for rank in range(2)]


def furthest(found, right):
    """Return the largest difference of two sets of tensors, relative to the largest entry of each tensor."""
    assert found.keys() == right.keys(), found.keys() ^ right.keys()
    return max(
        max(abs(a - b) for a, b in zip(found[name], values, strict=True)) / max(*map(abs, values), 1e-9)
        for name, values in right.items()
    )


def compare(way, name, stage, found, right):
    """Print how a run differs from DDP's, and fail where it must not differ."""
    assert found["steps"] == right["steps"], way
    assert found["swaps"] == right["swaps"], way
    assert (0.45 < found["held"] < 0.55) if stage == 3 else found["held"] == 1, (way, found["held"])
    assert len(found["log"]) == len(right["log"]), way
    assert any("forms all logits" in each for each in found["said"]) == (stage == 3), found["said"]
    errors = {what: furthest(found[what], right[what]) for what in ("gradients", "parameters")}
    if "clipping" in name:
        del errors["gradients"]  # DDP clips the gradients before they are compared
    if name in ROUNDED:
        assert found["q"] == ["torch.bfloat16"], found["q"]
        del errors["parameters"]
    for what, error in errors.items():
        assert error <= ROUNDED.get(name, ROUNDING), (way, what, error)
    for ours, theirs in zip(found["evaluations"], right["evaluations"], strict=True):
        assert all(abs(ours[key] - theirs[key]) < 1e-5 for key in theirs if key.startswith("eval_kl")), way
    print(f"{way}: " + ", ".join(f"{what} {'to the bit' if error == 0 else f'within {error:.0e}'}"
                                 for what, error in errors.items()), flush=True)  # fmt: skip


def resumes(folder, found):
    """Compare resumed runs with unbroken ones, and saved models with those in memory."""
    for way in RESUMED:
        right, resumed = found[way], found[f"{way} resumed"]
        assert resumed["parameters"] == right["parameters"], way
        assert resumed["swaps"] == right["swaps"] == 2, way
        assert resumed["log"][-1]["z"] == right["log"][-1]["z"], way
        print(f"{way}, resumed: as the unbroken run, to the bit", flush=True)
    for way in RESUMED[:2]:
        saved = load_file(folder / way / "saved" / "model.safetensors")
        for key, values in found[way]["parameters"].items():
            assert saved[key].flatten().tolist() == values, (way, key)


def gathers(folder, ranks):
    """Compare what a policy under ZeRO-3 draws and scores, on each rank alone, with the model that it saved."""
    way = RESUMED[1]
    lm = LanguageModel(AutoModelForCausalLM.from_pretrained(folder / way / "saved"), tokenizer())
    for rank, found in enumerate(each[way]["check"] for each in ranks):
        drawn = lm.sample(["w3"], n=2, max_new_tokens=3 + 5 * rank, seed=22, first_row=2 * rank)
        assert found["tokens"] == drawn.tokens.tolist()
        assert torch.allclose(torch.tensor(found["log_prob"]).double(), drawn.log_prob, atol=1e-5)
        assert torch.allclose(torch.tensor(found["again"]).double(), drawn.log_prob[: rank + 1], atol=1e-5)
        assert found["finite"]
        assert not any(found["held"])
        assert all(found["loaded"])
        assert [each.partition(" ")[0] for each in found["said"]] == ["log_prob", "logits", "hidden_and_head:"]
    for found in ranks:
        assert all(found["loaded"])
        assert found[f"{RESUMED[1]} stopped"]["check"] == {"message": "'within'", "finite": True}
        assert "a trainer under DeepSpeed trains once" in found[f"{RESUMED[0]} stopped"]["check"]
    print("ZeRO-3: ranks that end at different lengths draw what the saved model draws", flush=True)


def loops(names, ranks):
    """Compare loops around ``Matcher`` under DeepSpeed with the same loop under DDP."""
    for name in names:
        right = ranks[0][name]
        for stage in (2, 3):
            way = f"{name}, ZeRO-{stage}"
            for found in (each[way] for each in ranks):
                assert found["swaps"] == right["swaps"] == 2, way
                assert 0.45 < found["held"] < 0.55 if stage == 3 else found["held"] == 1, (way, found["held"])
                assert all(abs(a - b) < 1e-5 for a, b in zip(found["z"], right["z"], strict=True)), way
                errors = {what: furthest(found[what], right[what]) for what in ("parameters", "q")}
                assert max(errors.values()) <= ROUNDING, (way, errors)
            print(f"{way}: within {max(errors.values()):.0e}", flush=True)


def main(names):
    """Run the requested checks in one launch, because a launch takes longer than a run."""
    own = [name for name in LOOPS if not names or name in names]
    jobs = {name: RUNS[name][0] for name in names or RUNS if name not in LOOPS}
    ways = {f"{name}, ZeRO-{stage}": (name, {"stage": stage}) for name in jobs for stage in RUNS[name][1]}
    ways |= {way: (name, more) for way, (name, more) in WAYS.items() if name in jobs}
    jobs |= {way: RUNS[name][0] | more for way, (name, more) in ways.items()}
    if not names:
        for way in RESUMED:
            jobs[f"{way} stopped"] = jobs[way] | {"stop": 3}
            jobs[f"{way} resumed"] = jobs[way] | {"resume": f"{way} stopped/checkpoint-3"}
        jobs["DDP"] = STEPS | {"model": "llama", "stop": 3}
        jobs |= {f"refused: {what}": STEPS | options | {"refused": True} for what, (options, _) in REFUSED.items()}
        jobs |= {way: jobs[way] | {"check": check} for way, check in CHECKS.items()}
    for name in own:
        jobs[name] = {"loop": {"model": LOOPS[name]}}
        jobs |= {f"{name}, ZeRO-{stage}": {"loop": {"model": LOOPS[name], "stage": stage}} for stage in (2, 3)}
    with tempfile.TemporaryDirectory() as out:
        ranks = launched(Path(out), jobs)
        found = ranks[0]
        for way, (name, more) in ways.items():
            compare(way, name, more["stage"], found[way], found[name])
        loops(own, ranks)
        if not names:
            resumes(Path(out), found)
            gathers(Path(out), ranks)
            for what, (_, message) in REFUSED.items():
                for each in ranks:
                    assert message in str(each[f"refused: {what}"]), (what, each[f"refused: {what}"])


if __name__ == "__main__":
    main(sys.argv[1:])
