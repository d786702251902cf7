"""Try models that transformers spreads over processes as it loads them, as a rank of several: ``spread_job.py JSON``.

The JSON has ``out``, ``all`` (whether checks look at all that they can) and ``ways``. A way has a name, ``sizes`` (of a
``DistributedConfig``), ``checks`` (names of the functions below) and ``runs``. A run has a name and the arguments of
``trainer_job.job``, and may have ``model`` (what ``made`` takes), ``whole_base``, ``resume``, ``stop``, ``reward``,
``interrupt`` (the step at which rank 1 gets a SIGINT), ``differs`` (what is different on rank 1) and ``refused`` (the
run must be refused). Rank r compares with the whole model, which it loads beside its parts, and writes what it found to
``result-r.json``.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path

import cpu_spread  # noqa: F401
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from ending import end
from engine_stand_in import load_spread
from exact_body import with_exact_body
from matcher_job import Ranks
from torch import distributed
from trainer_job import Gradients, Kill, StopAt, job, tokenizer, whole
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, utils
from transformers.distributed import DistributedConfig

from dmfast import EBM, Contains, LanguageModel, Matcher, Moment, OfflineProposal, sharding
from dmfast.training.ranks import AccelerateRanks

PROMPTS = ["w1 w2", "w3"]
WANTED = json.loads(sys.argv[1]) if __name__ == "__main__" else {}


def made(tied=False, dtype="float32", seed=0, rows=11):
    """Return a Llama whose vocabulary of 11 is cut 6 and 5. In 16 bits its body is exact."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=24, initializer_range=0.3, bos_token_id=9, eos_token_id=5,
            tie_word_embeddings=tied,
        )
    )  # fmt: skip
    return model if dtype == "float32" else with_exact_body(model).to(getattr(torch, dtype))


def saved(**options):
    """Return the folder of a model, which rank 0 writes once."""
    folder = Path(WANTED["out"], "models", json.dumps(options).replace('"', "") or "plain")
    if distributed.get_rank() == 0 and not folder.exists():
        made(**options).save_pretrained(folder)
    distributed.barrier()
    return str(folder)


def loaded(folder, **options):
    """Return a model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def spread(folder):
    """Return a model of which this rank has its parts."""
    return loaded(folder, distributed_config=DistributedConfig(**WANTED["sizes"]))


def tied():
    """Return what makes a tied model that can be spread: FSDP takes shares of one size only."""
    return {"tied": True} | ({"rows": 12} if "fsdp_size" in WANTED["sizes"] else {})


def place():
    """Return the number of this rank's model. The ranks that share a model have the same sequences."""
    return distributed.get_rank() // WANTED["sizes"].get("tp_size", 1)


def same_on_ranks(tensor):
    """Return whether all ranks hold the same bits."""
    parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, tensor.detach().contiguous())
    return all(torch.equal(part, tensor) for part in parts)


def told(function):
    """Return the error that a function raises, or None."""
    try:
        function()
    except (ValueError, RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


# --- checks


def losses(lm, x):
    """Return what has a gradient, by name."""
    given = {"log_target": x.log_prob + 1, "log_proposal": x.log_prob, "log_z": torch.zeros_like(x.log_prob)}
    yield "loss", lambda: lm.loss(x, **given).loss
    yield "log_prob", lambda: lm.log_prob(x).mean()
    yield "logits", lambda: lm.logits(x)[0].logsumexp(-1).mean()
    if lm._head.why_not(lm.model) is None and not sharding.is_sharded(lm.model):
        yield "hidden_and_head", lambda: lm.hidden_and_head(x).logits().logsumexp(-1).mean()


def compared(spoil=lambda model: None, **options):
    """Return draws, values and gradients beside those of the whole model."""
    parts, right = spread(saved(**options)), loaded(saved(**options))
    spoil(parts)
    lm, plain = LanguageModel(parts, tokenizer()), LanguageModel(right, tokenizer())
    how = {"max_new_tokens": 6, "seed": 3, "first_row": 8 * place()}
    x, y = (each.sample(PROMPTS, 4, **how) for each in (lm, plain))
    found = {"drawn": x.tokens.equal(y.tokens), "log q": float((x.log_prob - y.log_prob).abs().max()), "errors": {}}
    wanted = dict(losses(plain, y))
    for name, loss in losses(lm, y):
        mine, theirs = loss(), wanted[name]()
        mine.backward()
        theirs.backward()
        errors = [float((mine - theirs).detach().abs())]
        named = dict(parts.named_parameters())
        for n, q in right.named_parameters():
            gradient = mean_of_ranks(q.grad)
            errors.append(float((whole(named[n].grad) - gradient).abs().max() / gradient.abs().max()))
        found["errors"][name] = max(errors)
        parts.zero_grad()
        right.zero_grad()
    found["verified"], found["why not"] = lm._head.verified, lm._head.failure or lm._head.why_not(parts)
    return found


def mean_of_ranks(gradient):
    """Return what data parallelism makes of the gradients of all ranks."""
    total = gradient.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def heads():
    """Return what ``compared`` says of several heads."""
    found = {"own": compared(), "tied": compared(**tied())}
    if WANTED.get("all"):
        found["hooked"] = hooked()
    return found


def hooked():
    """Compare a model whose logits are formed, because its head has a hook."""
    return compared(lambda model: model.lm_head.register_forward_hook(lambda *_: None))


def alike():
    """Return whether the ranks of one model draw alike without a seed, and score alike to the bit, in 16 bits too."""
    found = {}
    for dtype in ("float32", "bfloat16") if WANTED.get("all") else ("float32",):
        lm = LanguageModel(spread(saved(dtype=dtype)), tokenizer())
        torch.manual_seed(distributed.get_rank())
        x = lm.sample(PROMPTS, 4, max_new_tokens=6)
        found[dtype] = {
            "drawn": same_on_ranks(x.tokens), "scored": same_on_ranks(lm.log_prob(x)),
            "error": float((lm.log_prob(x) - x.log_prob).abs().max()),
            "columns": sharding.local(lm.model.lm_head.weight).shape[0],
        }  # fmt: skip
    return found


def proposal():
    """Return whether q stays while pi moves, and is pi after a swap, and what else a copy goes through."""
    found = {}
    for name, options in (("own", {}), ("tied", tied())) if WANTED.get("all") else (("own", {}),):
        policy = LanguageModel(spread(saved(**options)), tokenizer())
        q = OfflineProposal(policy)
        x = q.sample(PROMPTS, 4, max_new_tokens=6, seed=3)
        with torch.no_grad():
            before = q.snapshot.log_prob(x)
            shrunk(policy.model)
            moved = policy.log_prob(x)
            stays = q.snapshot.log_prob(x).equal(before)
            q.swap()
            swapped = q.snapshot.log_prob(x).equal(moved)
            state = q.state_dict()
            shrunk(policy.model)
            q.swap()
            q.load_state_dict(state)
            back = q.snapshot.log_prob(x).equal(moved)
            policy.load(saved(**options))
            found[name] = {
                "moved": float((moved - before).abs().min()), "stays": stays, "swapped": swapped, "back": back,
                "loaded": policy.log_prob(x).equal(before),
            }  # fmt: skip
    found["device"] = told(lambda: OfflineProposal(policy, device="cpu"))
    if sharding.is_sharded(policy.model):
        refusal, scores = load_spread(policy, loaded(saved(**options | {"seed": 7})), x, Ranks())
        found["engine"] = {"refusal": refusal, "error": float((scores - policy.log_prob(x)).abs().max())}
    else:
        found["engine"] = told(lambda: OfflineProposal(policy, sampler=LanguageModel(loaded(saved()), tokenizer())))
    found["whole <- parts"] = told(lambda: LanguageModel(loaded(saved()), tokenizer()).load(policy))
    spoiled = spread(saved())
    spoiled.model.norm.register_forward_hook(lambda *_: None)
    found["hooked"] = told(lambda: OfflineProposal(LanguageModel(spoiled, tokenizer())))
    return found


@torch.no_grad()
def shrunk(model):
    """Move all parameters."""
    sharding.reshard(model)
    for parameter in model.parameters():
        parameter.mul_(0.9)


def loop():
    """Return how far a loop around Matcher is from that of one process, and what it says without ranks."""
    sharded, parts = "fsdp_size" in WANTED["sizes"], WANTED["sizes"].get("tp_size", 1)
    AcceleratorState._reset_state()
    ranks = AccelerateRanks(Accelerator(cpu=True), parts) if sharded else None
    prompts = [*PROMPTS, "w4", "w2 w3"]
    each = len(prompts) // (ranks.size if ranks else 1)
    mine = prompts[place() * each :][:each] if sharded else prompts
    found, log = stepped(spread, mine, ranks)
    right, right_log = stepped(loaded, prompts, None)
    errors = {n: float((p - right[n]).abs().max()) for n, p in found.items()}
    moved = [float((right[n] - p.detach()).abs().max()) for n, p in loaded(saved()).named_parameters()]
    alone = told(lambda: stepped(spread, mine, None)) if sharded else None
    return {"error": max(errors.values()), "moved": max(moved), "logs": [log, right_log], "alone": alone}


def stepped(made_by, prompts, ranks):
    """Return the parameters and the log of two steps of Matcher."""
    policy, base = (LanguageModel(made_by(saved()), tokenizer()) for _ in range(2))
    target = EBM(base, [Moment(Contains("w3"), 0.6)])
    target.lambda_ = [1.5]
    matcher = Matcher(policy, target, OfflineProposal(policy, "interval", 1), "dpg", baseline="leave_one_out", seed=29,
                      ranks=ranks)  # fmt: skip
    optimizer, log = torch.optim.SGD(policy.model.parameters(), lr=1e-2), []
    for _ in range(2):
        batch = matcher.draw(prompts, 4, max_new_tokens=6)
        matcher.loss(batch, policy.model).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        log.append({name: x for name, x in matcher.commit().items() if name in ("kl_policy", "z", "swapped")})
    sharding.reshard(policy.model)
    return {n: whole(p.detach()) for n, p in policy.model.named_parameters()}, log


def refusals():
    """Return what is refused, by what is tried."""
    found, out = {}, Path(WANTED["out"], "refused")
    alone, model, base = loaded(saved()), spread(saved()), spread(saved())
    config = model.config.distributed_config

    def tried(name, model=model, base=alone, **options):
        found[name] = told(lambda: job(out, model=model, base=base, **options))

    if "fsdp_size" in WANTED["sizes"]:
        tied_unevenly = spread(saved(tied=True))
        found["tied unevenly"] = told(lambda: LanguageModel(tied_unevenly, tokenizer()))
        tried("in step", gather_for_sampling=False)
    for name, value in {
        "gradient_variance_steps": 1, "proposal_device": "cpu", "torch_compile": True, "fp16": True, "fsdp": True,
    }.items():  # fmt: skip
        tried(name, **{name: value})
    if "tp_size" in WANTED["sizes"]:
        tried("sampler", sampler="http://127.0.0.1:9")
    tried("base alone", model=alone, base=base)
    for name in (
        "pp_size", "ep_size", "enable_sequence_parallel", "dp_replicate_size", "fsdp_cpu_offload",
        "fsdp_mixed_precision",
    ):  # fmt: skip
        before = getattr(config, name)
        setattr(config, name, 2)
        tried(name)
        setattr(config, name, before)
    base.config.distributed_config.fsdp_size = 4
    tried("base otherwise", base=base)
    for name in ("hf_quantizer", "peft_config"):
        setattr(model, name, {"some": "thing"})
        tried(name)
        delattr(model, name)
    return found


# --- runs


def run(out, *, model=None, whole_base=False, resume=None, stop=None, reward=None, interrupt=None, differs=None,
        **wanted):  # fmt: skip
    """Return a finished job: its parameters, the gradients of its first step, what it logged and warned of."""
    folder, second = saved(**(model or {})), distributed.get_rank() == 1
    if differs and second:
        wanted |= {"seed": 30}
    if reward:
        wanted["reward"] = Contains(reward)
    gradients = Gradients()
    callbacks = [gradients, *([StopAt(stop)] if stop else [])]
    if interrupt and second:
        callbacks.append(Kill(signal.SIGINT, interrupt, event="on_step_end"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = job(out, model=spread(folder),
                      base=loaded(folder) if whole_base else spread(folder), callbacks=callbacks, **wanted)  # fmt: skip
        trainer.train(resume_from_checkpoint=resume and str(Path(WANTED["out"], resume)))
        trainer.save_model(str(out / "saved"))
    distributed.barrier()
    parameters = {n: whole(p.detach()) for n, p in trainer.model.named_parameters()}
    written = loaded(str(out / "saved")).state_dict()
    return {
        "parameters": {n: p.flatten().tolist() for n, p in parameters.items()},
        "gradients": {n: g.flatten().tolist() for n, g in (gradients.steps or [{}])[0].items()},
        "written": all(p.equal(written[n]) for n, p in parameters.items()),
        "steps": trainer.state.global_step, "swaps": trainer.proposal.swaps if trainer.proposal else None,
        "log": [h for h in trainer.state.log_history if "kl_policy" in h],
        "evaluations": [h for h in trainer.state.log_history if "eval_runtime" in h],
        "said": sorted({str(each.message) for each in said if "dmfast" in str(each.message)}),
    }  # fmt: skip


CHECKS = {each.__name__: each for each in (heads, hooked, alike, proposal, loop, refusals)}


def main():
    """Run what is asked for, on all ranks."""
    torch.set_num_threads(1)
    utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    distributed.init_process_group("gloo")
    found = {}
    for way, wanted in WANTED["ways"].items():
        WANTED["sizes"] = wanted["sizes"]
        found[way] = {name: CHECKS[name]() for name in wanted.get("checks", ())}
        for name, options in wanted.get("runs", {}).items():
            AcceleratorState._reset_state()
            refused = options.pop("refused", False)
            attempt = partial(run, Path(WANTED["out"], way, name), **options)
            found[way][name] = told(attempt) if refused else attempt()
    Path(WANTED["out"], f"result-{os.environ['RANK']}.json").write_text(json.dumps(found))
    end()


if __name__ == "__main__":
    main()
