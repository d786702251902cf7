"""Run training jobs one after the other under DDP or DeepSpeed, as a rank of two: ``python deepspeed_job.py JSON``.

The JSON has ``out`` and ``variants``. A variant has a name and the arguments of ``trainer_job.job``, and may have
``stage`` (of ZeRO; 0 is DDP), ``config`` (of DeepSpeed, over ``CONFIG``), ``model``, ``resume``, ``stop``, ``launcher``
(what accelerate launch puts into the environment), ``check`` (a function of ``CHECKS``, which runs on the trained
trainer) and ``refused`` (the job must be refused). ``loaded`` names a job whose model is loaded beside such a config.
A variant with ``loop`` has the arguments of ``looped`` instead, and runs no trainer.
Rank r writes its results to ``result-r.json``.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from pathlib import Path

import deepspeed
import peft
import torch
from ending import end
from matcher_job import Ranks
from torch.nn.parallel import DistributedDataParallel
from trainer_job import Gradients, StopAt, gpt2, job, llama, tokenizer
from transformers import LlamaForCausalLM, TrainerCallback

import dmfast
from dmfast import EBM, Contains, LanguageModel, Matcher, Moment, OfflineProposal
from dmfast.training import deepspeed as dmfast_deepspeed

# without this, every new environment would compile DeepSpeed's own all-reduce against torch's headers, for a minute
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

#: The guides of transformers put this into a DeepSpeed config. No parameter is so small that ZeRO-3 keeps it whole.
CONFIG = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "steps_per_print": 2000, "wall_clock_breakdown": False,
    "zero_optimization": {
        "stage": 2, "overlap_comm": True, "contiguous_gradients": True, "reduce_scatter": True,
        "reduce_bucket_size": "auto", "allgather_partitions": True, "allgather_bucket_size": 2e8,
        "sub_group_size": 1e9, "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}  # fmt: skip
ZERO_3 = {"zero_optimization": {"stage": 3}}


def with_lora():
    """Return a model with an adapter, of which the base and the proposal are whole copies."""
    return peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


MODELS = {"gpt2": gpt2, "llama": llama, "with_lora": with_lora}


class EngineGradients(TrainerCallback):
    """Keep the gradients of the first optimiser step from the engine, which takes its step within the last backward."""

    def __init__(self):
        self.steps = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        from deepspeed.utils import safe_get_full_grad

        engine = self.trainer.deepspeed
        step = engine.step

        def noted(*arguments, **options):
            if not self.steps and engine.is_gradient_accumulation_boundary():
                named = [(n, safe_get_full_grad(p)) for n, p in model.named_parameters() if p.requires_grad]
                self.steps.append({n: g.clone() for n, g in named if g is not None})
            return step(*arguments, **options)

        engine.step = noted


def scored(trainer):
    """Return what the trained policy draws and scores on this rank alone, how it is cut, and what others load."""
    rank = torch.distributed.get_rank()
    how = {"n": 2, "max_new_tokens": 3 + 5 * rank, "seed": 22, "first_row": 2 * rank}
    drawn = trainer.policy.sample(["w3"], **how)
    with torch.no_grad():
        again = trainer.policy.log_prob(drawn[: rank + 1], batch_size=1)
        logits, _ = trainer.policy.logits(drawn)
    said = []
    for what in (trainer.policy.log_prob, trainer.policy.logits, trainer.policy.hidden_and_head):
        try:
            what(drawn)
        except ValueError as error:
            said.append(str(error))
    loaded = LlamaForCausalLM.from_pretrained(Path(trainer.args.output_dir, "whole"))
    return {
        "loaded": [p.numel() for p in loaded.parameters()], "length": drawn.tokens.shape[1],
        "tokens": drawn.tokens.tolist(), "log_prob": drawn.log_prob.tolist(),
        "again": again.tolist(), "finite": bool(logits.isfinite().all()), "said": said,
        "held": [p.numel() for p in trainer.model.parameters()],
    }  # fmt: skip


def broken(trainer):
    """Check that an error within a gathering passes through and spoils no training, as the forward still gathers."""
    message = None
    try:
        with dmfast_deepspeed.gathered(trainer.deepspeed):
            raise KeyError("within")
    except KeyError as error:
        message = str(error)
    drawn = trainer.proposal.sample(["w3"], n=4, max_new_tokens=6, seed=3)
    with torch.no_grad():
        logits = trainer.deepspeed(input_ids=drawn.tokens).logits
        return {"message": message, "finite": bool(logits.isfinite().all())}


def loaded(folder):
    """Return how large the parameters are of a model that is loaded once a config with ZeRO-3 exists."""
    dmfast.DMConfig(str(folder / "unused"), use_cpu=True, deepspeed=merged(copy.deepcopy(CONFIG), ZERO_3))
    return [p.numel() for p in LlamaForCausalLM.from_pretrained(folder / "whole").parameters()]


def twice(trainer):
    """Return why a second train() is refused."""
    try:
        trainer.train()
    except ValueError as error:
        return str(error)
    return None


CHECKS = {each.__name__: each for each in (scored, broken, twice)}


def refused(out, name, **options):
    """Return why a job is refused."""
    try:
        run(out, name, **options)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def merged(config, more):
    """Return a config with another's sections over its own. None takes a key out."""
    for name, value in (more or {}).items():
        if isinstance(value, dict) and isinstance(config.get(name), dict):
            merged(config[name], value)
        elif value is None:
            config.pop(name, None)
        else:
            config[name] = value
    return config


def run(out, name, *, model="gpt2", stage=0, config=None, resume=None, stop=None, skip=False, lora=None,
        launcher=None, check=None, **wanted):  # fmt: skip
    """Return a finished job: its parameters, the gradients of its first step, what it logged and warned of."""
    zero = stage > 0
    # after a step of learning rate 0, pi would be q, and rounding would decide a swap
    wanted = {"warmup_steps": 0} | wanted
    torch.distributed.is_initialized() and torch.distributed.barrier()
    before = dict(os.environ)
    os.environ.update(launcher or {})
    if zero and launcher is None:
        wanted["deepspeed"] = merged(merged(copy.deepcopy(CONFIG), {"zero_optimization": {"stage": stage}}), config)
    if skip:
        wanted["constraints"] = [Contains("w4")]
    if wanted.get("objective") in ("kl_control", "grpo"):
        wanted["reward"] = Contains("w3")
    gradients = EngineGradients() if zero else Gradients()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer = job(Path(out, name), model=MODELS[model](), lora=lora,
                          callbacks=[gradients, *([StopAt(stop)] if stop else [])], **wanted)  # fmt: skip
            gradients.trainer = trainer
            if check == "scored":
                trainer.evaluate()  # nothing is cut yet
                trainer.save_model(str(Path(out, name, "whole")))
            trainer.train(resume_from_checkpoint=resume and str(Path(out, resume)))
            checked = None if check is None else CHECKS[check](trainer)
            trainer.save_model(str(Path(out, name, "saved")))
    finally:
        os.environ.clear()
        os.environ.update(before)
    with dmfast_deepspeed.gathered(trainer.deepspeed if stage == 3 else None):
        parameters = {n: p.detach().float().clone() for n, p in trainer.model.named_parameters()}
    held = sum(getattr(p, "ds_tensor", p).numel() for p in trainer.model.parameters())
    return {
        "parameters": {n: p.flatten().tolist() for n, p in parameters.items()},
        "gradients": {n: g.float().flatten().tolist() for n, g in (gradients.steps or [{}])[0].items()},
        "held": held / sum(p.numel() for p in parameters.values()),
        "steps": trainer.state.global_step,
        "swaps": trainer.proposal.swaps if trainer.proposal else None,
        "q": sorted({str(p.dtype) for p in trainer.proposal.snapshot.model.parameters()}) if trainer.proposal else None,
        "log": [h for h in trainer.state.log_history if "kl_policy" in h],
        "evaluations": [h for h in trainer.state.log_history if "eval_runtime" in h],
        "said": sorted({str(each.message) for each in said if "dmfast" in str(each.message)}),
        "check": checked,
    }


def looped(*, model, stage=0, parts=2):
    """Return what came of five steps of a loop around ``Matcher``, under DDP or DeepSpeed without ``DMTrainer``."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    ranks, made = Ranks(), MODELS[model]()
    policy = (dmfast_deepspeed.PartitionedModel if stage == 3 else LanguageModel)(made, tokenizer())
    target = EBM(LanguageModel(copy.deepcopy(made), tokenizer()), [Moment(Contains("w3", name="w3"), 0.6)])
    target.lambda_ = [1.5]
    kind = dmfast_deepspeed.PartitionedProposal if stage == 3 else OfflineProposal
    proposal = kind(policy, interval=2, criterion="interval")
    matcher = Matcher(policy, target, proposal, "dpg", seed=29, ranks=ranks)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.02)
    if stage:
        config = {
            "train_micro_batch_size_per_gpu": 8 // parts, "gradient_accumulation_steps": parts,
            "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }  # fmt: skip
        wrapped = deepspeed.initialize(model=made, optimizer=optimizer, config=config)[0]
        dmfast_deepspeed.begin(wrapped, policy, proposal)
    else:
        wrapped = DistributedDataParallel(made)
    log = []
    for _ in range(5):
        batch = matcher.draw([["w1 w2"], ["w3"]][ranks.rank], 8, max_new_tokens=6)
        for part in batch.split(8 // parts):
            loss = matcher.loss(part, wrapped).loss
            if stage:
                wrapped.backward(loss, scale_wrt_gas=False)
                wrapped.step()
            else:
                loss.backward()
        if not stage:
            optimizer.step()
            optimizer.zero_grad()
        log.append(matcher.commit())
    held = sum(getattr(p, "ds_tensor", p).numel() for p in made.parameters())
    with dmfast_deepspeed.gathered(wrapped if stage == 3 else None):
        whole = {n: p.detach().flatten().tolist() for n, p in made.named_parameters()}
    q = {n: p.flatten().tolist() for n, p in proposal.snapshot.model.named_parameters()}
    return {"parameters": whole, "q": q, "swaps": proposal.swaps, "z": [each["z"] for each in log],
            "held": held / sum(map(len, whole.values()))}  # fmt: skip


def main():
    """Run the jobs that the command line asks for."""
    torch.set_num_threads(1)
    wanted = json.loads(sys.argv[1])
    results = {}
    for name, options in wanted["variants"].items():
        print(name, flush=True)  # if a job waits for ever, this tells which one
        if "loop" in options:
            results[name] = looped(**options["loop"])
            continue
        results[name] = (refused if options.pop("refused", False) else run)(wanted["out"], name, **options)
    rank = os.environ["RANK"]
    if wanted.get("loaded"):
        results["loaded"] = loaded(Path(wanted["out"], wanted["loaded"]))
    Path(wanted["out"], f"result-{rank}.json").write_text(json.dumps(results))
    end()


if __name__ == "__main__":
    main()
