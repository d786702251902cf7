"""Run training jobs one after the other under DDP or FSDP2, as a rank of several: ``python fsdp_job.py JSON``.

The JSON has ``out``, ``fsdp`` and ``variants``. A variant has a name and the arguments of ``trainer_job.job``, and may
have ``model``, ``resume``, ``stop``, ``fsdp_config``, ``launcher`` (what accelerate launch puts into the environment),
``bare`` (accelerate stays as it is on a CPU), ``verdict`` (the trainer is asked for one at the end), ``differs`` (what
is different on rank 1) and ``refused`` (the job must be refused). ``checks`` names functions of ``fsdp_checks.py``.
Rank r writes its results to ``result-r.json``.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import cpu_fsdp
import peft
import torch
from ending import end
from fsdp_checks import CHECKS
from trainer_job import Gradients, StopAt, gpt2, job, llama, whole

from dmfast import Contains


def hooked():
    """Return a model whose head has a hook, so that all of its logits are formed."""
    model = llama()
    model.lm_head.register_forward_hook(lambda *_: None)
    return model


def with_lora():
    """Return a model with an adapter, of which the base and the proposal are whole copies."""
    return peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


MODELS = {"gpt2": gpt2, "llama": llama, "hooked": hooked, "with_lora": with_lora, "seed 1": lambda: gpt2(seed=1)}


def refused(out, fsdp, name, **options):
    """Return why a job is refused."""
    try:
        run(out, fsdp, name, **options)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


# rank 1 alone gets these
ALONE = {"seed": {"seed": 30}, "lambda": {"lambda_": 1.6}, "prompts": {"prompts": ["w3"]}}


def run(out, fsdp, name, *, model="gpt2", resume=None, stop=None, fsdp_config=None, skip=False, lora=None, bare=False,
        launcher=None, differs=None, verdict=False, **wanted):  # fmt: skip
    """Return a finished job: its parameters, the gradients of its first step, what it logged and warned of."""
    cpu_fsdp.reset(bare)
    torch.distributed.is_initialized() and torch.distributed.barrier()
    os.environ.update(launcher or {})
    if differs and torch.distributed.get_rank() == 1:
        wanted |= ALONE.get(differs, {})
        model = model if differs != "weights" else "seed 1"
    if fsdp and launcher is None:
        wanted |= {"fsdp": True, "fsdp_config": dict(fsdp_config or {})}
    if skip:
        wanted["constraints"] = [Contains("w4")]
    if wanted.get("objective") in ("kl_control", "grpo"):
        wanted["reward"] = Contains("w3")
    gradients = Gradients()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = job(Path(out, name), model=MODELS[model](), lora=lora,
                      callbacks=[gradients, *([StopAt(stop)] if stop else [])], **wanted)  # fmt: skip
        trainer.train(resume_from_checkpoint=resume and str(Path(out, resume)))
        trainer.save_model(str(Path(out, name, "saved")))
    parameters = {n: whole(p.detach()) for n, p in trainer.model.named_parameters()}
    held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in trainer.model.parameters())
    return {
        "parameters": {n: p.flatten().tolist() for n, p in parameters.items()},
        "gradients": {n: g.flatten().tolist() for n, g in (gradients.steps or [{}])[0].items()},
        "held": held / sum(p.numel() for p in parameters.values()),
        "steps": trainer.state.global_step,
        "swaps": trainer.proposal.swaps if trainer.proposal else None,
        "log": [h for h in trainer.state.log_history if "kl_policy" in h],
        "evaluations": [h for h in trainer.state.log_history if "eval_runtime" in h],
        "verdict": trainer.verdict() if verdict else None,
        "said": sorted({str(each.message) for each in said if "dmfast" in str(each.message)}),
    }


def main():
    """Run the jobs that the command line asks for."""
    torch.set_num_threads(1)
    wanted = json.loads(sys.argv[1])
    fsdp = bool(wanted["fsdp"])
    results = {}
    for name, options in wanted["variants"].items():
        results[name] = (refused if options.pop("refused", False) else run)(wanted["out"], fsdp, name, **options)
    for name in wanted.get("checks", ()):
        results[name] = CHECKS[name]()
    Path(wanted["out"], f"result-{torch.distributed.get_rank()}.json").write_text(json.dumps(results))
    end()


if __name__ == "__main__":
    main()
