"""Train under FSDP2 and under DDP on two CPU processes, and compare parameters, gradients, checkpoints, resumed runs.

fsdp.py            runs all
fsdp.py NAME ...   runs these of ``RUNS``, and no checkpoints
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from engine_stand_in import StandIn  # noqa: E402
from launch import launch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from test_fsdp import launched  # noqa: E402
from trainer_job import llama, tokenizer  # noqa: E402

LORA = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
#: These ways need a run without a check of scores. Without the check, sequences are padded.
UNCHECKED = {"check_scores": False}
#: The settings of each run by name. Each run ends with the bits of DDP, except for those of ROUNDED.
RUNS = {
    "tied head": {},
    "head of its own": {"model": "llama", **UNCHECKED},
    "logits": {"model": "hooked"},
    "gradient accumulation": {
        "model": "llama",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    },
    "gradient checkpointing": {"model": "llama", "gradient_checkpointing": True},
    "clipping": {"max_grad_norm": 0.1},
    "zero weights skipped": {
        "skip": True,
        "objective": "dpg",
        "max_new_tokens": 3,
        "proposal_interval": 100,
        "skip_zero_weight": True,
    },
    "fresh checks": {"proposal_check_samples": 32},
    "prompts": {
        "model": "llama",
        "prompts": ["w1 w2", "w3", "w4 w5 w6", "w7"],
        "samples_per_context": 4,
        "max_steps": 3,
    },
    "on-policy": {"on_policy": True, "objective": "dpg"},
    "PPO": {
        "on_policy": True,
        "objective": "kl_control",
        "beta": 0.1,
        "ppo_epochs": 2,
        "baseline": "leave_one_out",
    },
    "groups": {
        "model": "llama",
        "prompts": ["w1 w2", "w3", "w4 w5 w6", "w7"],
        "samples_per_context": 4,
        "on_policy": True,
        "objective": "grpo",
        "max_steps": 3,
    },
    "KL control": {"objective": "kl_control", "beta": 0.1, "baseline": "mean"},
    "evaluation": {"model": "llama", **EVALUATED},
    "the best model": {
        "model": "llama",
        **EVALUATED,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "kl_policy",
        "greater_is_better": True,
    },
    "LoRA on one backbone": {"lora": LORA, **UNCHECKED},
    "LoRA, checkpointing": {"lora": LORA, "gradient_checkpointing": True},
    "LoRA on copies": {"model": "with_lora"},
    "bf16": {"model": "llama", "bf16": True, "proposal_interval": 100},
}
#: This run draws from q for one of the runs above.
ENGINE = "another engine"
RUNS[ENGINE] = {"model": "llama", "check_scores": False, "save_strategy": "steps", "save_steps": 3}
#: Clipping adds the norm's terms in another order, and FSDP computes in bf16 what autocast leaves in fp32.
ROUNDED = {"clipping": 1e-5, "bf16": 0.1}
#: These variables are set by ``accelerate launch --use_fsdp --fsdp_version 2``.
LAUNCHER = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
#: These are other ways to start one of the runs.
WAYS = {
    "in step": ("head of its own", {"gather_for_sampling": False}),
    "in step, LoRA": ("LoRA on one backbone", {"gather_for_sampling": False}),
    "never resharded": ("head of its own", {"fsdp_config": {"reshard_after_forward": False}}),
    "the root alone": ("head of its own", {"fsdp_config": {"auto_wrap_policy": "NO_WRAP"}}),
    "accelerate launch": ("head of its own", {"launcher": LAUNCHER}),
    "loaded on rank 0": ("head of its own", {"fsdp_config": {"cpu_ram_efficient_loading": True}}),
}
STEPS = {"max_steps": 5, "proposal_criterion": "interval", "proposal_interval": 2, "warmup_steps": 0}
KINDS = {"FULL": "FULL_STATE_DICT", "SHARDED": "SHARDED_STATE_DICT"}


def furthest(found, right):
    """Return the largest difference of two sets of tensors, relative to the largest entry of each tensor."""
    assert found.keys() == right.keys(), found.keys() ^ right.keys()
    return max(
        max(abs(a - b) for a, b in zip(found[name], values, strict=True)) / max(*map(abs, values), 1e-9)
        for name, values in right.items()
    )


def compare(name, found, right):
    """Print how a run differs from DDP's, and fail where it must not differ."""
    assert found["steps"] == right["steps"], name
    assert found["swaps"] == right["swaps"], name
    assert 0.45 < found["held"] < 0.55, (name, found["held"])
    assert len(found["log"]) == len(right["log"]), name
    assert len(found["evaluations"]) == len(right["evaluations"]), name
    if name in ROUNDED:
        error = furthest(found["gradients"], right["gradients"])
        assert error <= ROUNDED[name], (name, error)
        print(f"{name}: gradients of the first step within {error:.1e}", flush=True)
        return
    assert found["gradients"] == right["gradients"], (name, furthest(found["gradients"], right["gradients"]))
    assert found["parameters"] == right["parameters"], (name, furthest(found["parameters"], right["parameters"]))
    for ours, theirs in zip(found["evaluations"], right["evaluations"], strict=True):
        assert all(ours[key] == theirs[key] for key in theirs if key.startswith("eval_kl")), name
    print(f"{name}: parameters, gradients and estimates to the bit", flush=True)


def trains_as_ddp(folder, names):
    """Compare every run with DDP's."""
    ways = {name: RUNS[of] | more for name, (of, more) in WAYS.items() if of in names}
    with StandIn(llama(seed=7), tokenizer()) as server:
        RUNS[ENGINE]["sampler"] = server.url
        under_fsdp = launched(folder / "fsdp", {name: RUNS[name] for name in names} | ways)[0]
        under_ddp = launched(folder / "ddp", {name: RUNS[name] for name in names}, under_fsdp=False)[0]
    for name in names:
        compare(name, under_fsdp[name], under_ddp[name])
    for name in ways:
        compare(name, under_fsdp[name], under_ddp[WAYS[name][0]])


def resumes(folder):
    """Compare resumed runs with unbroken ones, and saved models with those in memory."""
    runs = {}
    for kind, state_dict_type in KINDS.items():
        for what, more in (("", {"model": "llama"}), (" LoRA", {"lora": LORA})):
            name, options = kind + what, STEPS | more | {"fsdp_config": {"state_dict_type": state_dict_type}}
            runs |= {name: options, f"{name} stopped": options | {"stop": 3}}
            runs[f"{name} resumed"] = options | {"resume": f"{name} stopped/checkpoint-3"}
    plain = STEPS | {"model": "llama", "stop": 3}
    launched(folder / "ddp", {"plain": plain}, under_fsdp=False)
    runs["of DDP"] = plain | {"resume": "../ddp/plain/checkpoint-3", "refused": True}
    runs["of another model"] = STEPS | {"resume": "FULL stopped/checkpoint-3", "refused": True}
    with StandIn(llama(seed=7), tokenizer()) as server:
        options = STEPS | {"model": "llama", "sampler": server.url, "check_scores": False}
        runs |= {"engine": options, "engine stopped": options | {"stop": 3}}
        runs["engine resumed"] = options | {"resume": "engine stopped/checkpoint-3"}
        found = launched(folder / "fsdp", runs)[0]
    assert "is of a run without sharding, and this run is under FSDP" in found["of DDP"], found["of DDP"]
    assert "does not hold the parameters of this proposal" in found["of another model"], found["of another model"]
    for name in [name for name in runs if name.endswith("resumed")]:
        right = found[name.removesuffix(" resumed")]
        assert found[name]["parameters"] == right["parameters"], name
        assert found[name]["swaps"] == right["swaps"] == 2, name
        print(f"{name}: as the unbroken run, to the bit", flush=True)
    for name in ("FULL", "SHARDED"):
        saved = load_file(folder / "fsdp" / name / "saved" / "model.safetensors")
        for key, values in found[name]["parameters"].items():
            assert saved[key].flatten().tolist() == values, (name, key)
    other = launched(
        folder / "ddp",
        {"of FSDP": plain | {"resume": "../fsdp/FULL stopped/checkpoint-3", "refused": True}},
        under_fsdp=False,
    )[0]
    assert "is of a run under FSDP, and this run is without sharding" in other["of FSDP"], other["of FSDP"]


def resumes_on_other_ranks(folder):
    """Compare runs that two processes began and three processes ended with runs of two processes."""
    whole, three = {}, {}
    for kind, state_dict_type in KINDS.items():
        options = STEPS | {"model": "llama", "fsdp_config": {"state_dict_type": state_dict_type}}
        of_two = options | {"per_device_train_batch_size": 12}
        whole |= {kind: of_two, f"{kind} stopped": of_two | {"stop": 3}}
        three[kind] = options | {"per_device_train_batch_size": 8, "resume": f"{kind} stopped/checkpoint-3"}
    right, found = launched(folder, whole)[0], launched(folder, three, processes=3)[0]
    for kind in KINDS:
        error = furthest(found[kind]["parameters"], right[kind]["parameters"])
        assert error < 1e-5, (kind, error)
        print(f"{kind}, two processes and then three: parameters within {error:.1e}", flush=True)


def recipes(folder):
    """Compare a recipe with ``fsdp: true`` with the same recipe under DDP."""
    folder.mkdir()
    found = {}
    for name in ("ddp", "fsdp"):
        wanted = json.dumps({"out": str(folder / name), "fsdp": name == "fsdp"})
        done = launch(ROOT / "tests" / "recipe_job.py", wanted, processes=2)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        log = json.loads((folder / name / "log.json").read_text())
        found[name] = load_file(folder / name / "model.safetensors"), log["after"]
    (right, wanted), (here, after) = found["ddp"], found["fsdp"]
    assert all(right[key].equal(here[key]) for key in right)  # FSDP also writes a tied head under its own name
    assert after == wanted, (after, wanted)
    print("a recipe: model and evaluation to the bit", flush=True)


def main(names):
    """Run the requested checks."""
    with tempfile.TemporaryDirectory() as folder:
        trains_as_ddp(Path(folder, "runs"), names or list(RUNS))
        if not names:
            recipes(Path(folder, "recipes"))
            resumes(Path(folder, "resumed"))
            resumes_on_other_ranks(Path(folder, "other"))


if __name__ == "__main__":
    main(sys.argv[1:])
