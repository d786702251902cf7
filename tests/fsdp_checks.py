"""Check models that ``fully_shard`` has cut, as a rank of two. ``test_fsdp.py`` looks at what each check returns."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace

import peft
import torch
from engine_stand_in import load_spread
from matcher_job import Ranks
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from trainer_job import llama, tokenizer, whole

from dmfast import EBM, Contains, LanguageModel, Matcher, Moment, OfflineProposal, guard, head, sharding


def blocks(model):
    for block in model.model.layers:
        fully_shard(block)


def root_alone(model):
    fully_shard(model)


def head_in_root(model):
    blocks(model)
    fully_shard(model)


def head_apart(model):
    blocks(model)
    fully_shard(model.lm_head)
    fully_shard(model)


def everything_apart(model):
    blocks(model)
    for module in (model.model.norm, model.model.embed_tokens, model.lm_head):
        fully_shard(module)
    fully_shard(model, reshard_after_forward=True)


def tail_together(model):
    """Shard a model as accelerate does."""
    blocks(model)
    fully_shard(model.model.embed_tokens)
    fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    fully_shard(model)


LAYOUTS = [root_alone, head_in_root, head_apart, everything_apart, tail_together]


def sharded(layout=tail_together, **options):
    model = llama()
    layout(model)
    return LanguageModel(model, tokenizer(), **options)


def _drawn(n=8):
    lm = LanguageModel(llama(), tokenizer())
    return lm.sample(["w1 w2", "w3"], n // 2, max_new_tokens=6, seed=3, first_row=8 * distributed.get_rank())


def _losses(lm, x):
    """Yield the loss of the fused head, and losses by log_prob and by logits."""
    inputs = {"log_target": x.log_prob + 1, "log_proposal": x.log_prob, "log_z": torch.zeros_like(x.log_prob)}
    yield "loss", lambda: lm.loss(x, objective="dpg", **inputs).loss
    yield "log_prob", lambda: lm.log_prob(x).mean()
    yield "logits", lambda: lm.logits(x)[0].logsumexp(-1).mean()


def gradients():
    """Return the largest error of a gradient by layout and loss, relative to the parameter's largest entry."""
    x, worst = _drawn(), {}
    plain = LanguageModel(llama(), tokenizer())
    wanted = {}
    for name, loss in _losses(plain, x):
        loss().backward()
        wanted[name] = {n: p.grad.clone() for n, p in plain.model.named_parameters()}
        for gradient in wanted[name].values():
            distributed.all_reduce(gradient)
            gradient.div_(2)
        plain.model.zero_grad()
    for layout in LAYOUTS:
        lm = sharded(layout)
        for name, loss in _losses(lm, x):
            loss().backward()
            errors = []
            for n, p in lm.model.named_parameters():
                found, right = whole(p.grad), wanted[name][n]
                errors.append(float((found - right).abs().max() / right.abs().max()))
            worst[f"{layout.__name__} {name}"] = max(errors)
            lm.model.zero_grad()
        assert lm._head.verified and lm._head.failure is None
    return worst


def sampling():
    """Return whether a sharded model draws what the whole one draws, gathered and in step, and how long draws are."""
    plain, equal = LanguageModel(llama(), tokenizer()), {}
    how = {"n": 2, "max_new_tokens": 8, "seed": 22, "first_row": 2 * distributed.get_rank()}
    wanted = plain.sample(["w3"], **how)
    for layout in LAYOUTS:
        for gather in (True, False):
            lm = sharded(layout, check_scores=gather)
            lm.gather_for_sampling = gather
            for _ in range(2):
                found = lm.sample(["w3"], **how)
                same = found.tokens.equal(wanted.tokens) and found.log_prob.equal(wanted.log_prob)
                equal[f"{layout.__name__} {gather}"] = same
            assert all(sharding.is_shard(p) for p in lm.model.parameters())
    return {"equal": equal, "length": wanted.tokens.shape[1]}


def scoring():
    """Return log_prob where the ranks have 8, 3 and no batches."""
    x, lm, plain = _drawn(), sharded(), LanguageModel(llama(), tokenizer())
    mine = (8, 3)[distributed.get_rank()]
    with torch.no_grad():
        few = lm.log_prob(x[:mine], batch_size=1).equal(plain.log_prob(x[:mine], batch_size=1))
        none = lm.log_prob(x[: (8, 0)[distributed.get_rank()]])
    told = _told(lambda: lm.log_prob(x[:mine], batch_size=1))
    return {"few": few, "none": len(none), "told": told}


def _told(function):
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


class _OnRank1:
    """Replace a function of a module by one that does something else on rank 1."""

    def __init__(self, owner, name, other):
        self.owner, self.name, self.before = owner, name, getattr(owner, name)
        self.other = other if distributed.get_rank() == 1 else self.before

    def __enter__(self):
        setattr(self.owner, self.name, self.other)

    def __exit__(self, *_):
        setattr(self.owner, self.name, self.before)


def agreement():
    """Return what all ranks do where rank 1 alone finds something."""
    found, x = {}, _drawn()
    draw = {"n": 2, "max_new_tokens": 6, "seed": 1}
    lm = sharded()
    with _OnRank1(guard.Guard, "_whole", lambda *_: None):
        lm.sample(["w3"], **draw)
    found["padded"] = lm._guard.padded
    lm, right = sharded(), LanguageModel._sample

    def wrong_with_cache(self, *args):
        drawn = right(self, *args)
        return replace(drawn, log_prob=drawn.log_prob - 1) if self._guard.cached else drawn

    with _OnRank1(LanguageModel, "_sample", wrong_with_cache):
        lm.sample(["w3"], **draw)
    found["cached"] = lm._guard.cached
    lm = sharded()
    with _OnRank1(guard, "random_draw", lambda *_: "a coin"):
        found["random"] = _told(lambda: lm.sample(["w3"], **draw))
    lm = sharded()
    with _OnRank1(head, "_what_differs", lambda *_: "it is another"):
        lm.log_prob(x).mean().backward()
    found["head"] = lm._head.failure
    return found


def swaps():
    """Return how many collectives q <- pi takes, whether q then is pi, and what a folder loads into shards."""
    model = llama()
    policy = LanguageModel(model, tokenizer())
    proposal = OfflineProposal(policy)
    tail_together(proposal.snapshot.model)
    tail_together(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    # this leaves whole parameters in the root
    policy.log_prob(_drawn()).mean().backward()
    with CommDebugMode() as counted:
        proposal.swap()
    q = {n: whole(p) for n, p in proposal.snapshot.model.named_parameters()}
    pi = {n: whole(p) for n, p in model.named_parameters()}
    with CommDebugMode() as of_gathering:
        whole(model.lm_head.weight)
    with tempfile.TemporaryDirectory() as folder:
        of_rank_0 = [folder]
        distributed.broadcast_object_list(of_rank_0)
        llama(seed=7).save_pretrained(of_rank_0[0])  # only rank 0 writes this
        distributed.barrier()
        policy.load(of_rank_0[0])
        distributed.barrier()
    loaded = all(whole(p).equal(right) for p, right in zip(model.parameters(), llama(seed=7).parameters(), strict=True))
    return {
        "collectives": counted.get_total_counts(), "of a gathering": of_gathering.get_total_counts(),
        "equal": all(q[n].equal(pi[n]) for n in pi), "loaded": loaded,
    }  # fmt: skip


def refusals():
    """Return what is refused, by what is tried."""
    lm, x = sharded(), _drawn()
    base = LanguageModel(llama(), tokenizer())
    target = EBM(base, [Moment(Contains("w3"), 0.6)])
    target.lambda_ = [1.0]
    plain = LanguageModel(copy.deepcopy(base.model), tokenizer())
    hybrid = llama()
    fully_shard(hybrid, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "shards")))
    in_step = sharded()
    in_step.gather_for_sampling = False
    loop = Matcher(lm, target, ranks=Ranks(), on_policy=True)
    return {
        "no ranks": _told(lambda: Matcher(lm, target).draw(["w3"], 4, max_new_tokens=6)),
        "unequal": _told(lambda: loop.draw(["w3", "w1"][: distributed.get_rank() + 1], 4, max_new_tokens=6)),
        "hybrid": _told(lambda: LanguageModel(hybrid, tokenizer()).log_prob(x)),
        "copy": _told(lambda: OfflineProposal(lm)),
        "hidden": _told(lambda: lm.hidden_and_head(x)),
        "variance": _told(Matcher(lm, target).measure_gradient),
        "whole <- shards": _told(lambda: plain.load(lm)),
        "unchecked": _told(lambda: in_step.sample(max_new_tokens=3)),
        "another sampler": _told(lambda: OfflineProposal(lm, sampler=plain)),
    }


def engine():
    """Return what an engine of rank 0 says after it was given the shards of all ranks."""
    lm, x = sharded(), _drawn()
    refusal, scores = load_spread(lm, llama(seed=7), x, Ranks())
    with_adapter = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    fully_shard(with_adapter)
    adapted = LanguageModel(with_adapter, tokenizer())
    return {
        "refusal": refusal, "error": float((scores - lm.log_prob(x)).abs().max()),
        "adapter": _told(lambda: load_spread(adapted, llama(), x, Ranks())),
    }  # fmt: skip


def _loop(around):
    """Return parameters and logs after two steps of a Matcher whose models a function has wrapped."""
    model = llama()
    policy, base = LanguageModel(model, tokenizer()), LanguageModel(llama(), tokenizer())
    target = EBM(base, [Moment(Contains("w3"), 0.6)])
    target.lambda_ = [1.5]
    proposal = OfflineProposal(policy, "interval", 1)
    wrapped = around(model, proposal.snapshot.model, base.model)
    matcher = Matcher(policy, target, proposal, "dpg", baseline="leave_one_out", seed=29, ranks=Ranks())
    optimizer, logged = torch.optim.SGD(model.parameters(), lr=1e-2), []
    for _ in range(2):
        batch = matcher.draw([("w3", "w1 w2")[distributed.get_rank()]], 16, max_new_tokens=6)
        # the batch is one part, because DDP and FSDP add the gradients of several parts in different orders
        matcher.loss(batch, wrapped).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        metrics = matcher.commit()
        logged.append({name: x for name, x in metrics.items() if not name.startswith("seconds_")})
    return {n: whole(p.detach()) for n, p in model.named_parameters()}, logged


def loop():
    """Return whether a loop around Matcher ends under FSDP as under DDP."""

    def shards(model, *others):
        for each in (model, *others):
            tail_together(each)
        return model

    parameters, logged = _loop(shards)
    right, log = _loop(lambda model, *_: DistributedDataParallel(model))
    return {"parameters": all(parameters[n].equal(right[n]) for n in right), "log": logged == log}


CHECKS = {each.__name__: each for each in (gradients, sampling, scoring, agreement, swaps, engine, loop, refusals)}
