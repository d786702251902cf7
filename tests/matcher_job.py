"""Run a loop around ``Matcher`` alone, or as a rank of several by torchrun: ``python matcher_job.py OUT``."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path

import torch
from ending import end
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from trainer_job import digest, gpt2, tokenizer

from dmfast import EBM, Contains, LanguageModel, Matcher, Moment, OfflineProposal
from dmfast.batch import Prompts
from dmfast.sampling import AsyncSampler

PROMPTS = ["w1 w2", "w3", "w4 w5 w6", "w7"]
N = 16


class Ranks:
    """Talk to the ranks of torch.distributed."""

    def __init__(self):
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def gather(self, values):
        parts = [torch.empty_like(values) for _ in range(self.size)]
        distributed.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def agree(self, mine):
        return bool(self.gather(torch.tensor([mine]))[0])


class Engine:
    """Be a copy of the policy that a thread calls."""

    version = 0

    def sample(self, *args, **options):
        self.model.version = self.version
        return self.model.sample(*args, **options)

    def log_prob(self, samples, *, batch_size=None):
        return self.model.log_prob(samples, batch_size=batch_size)

    def load(self, source):
        self.model = LanguageModel(
            copy.deepcopy(source.model).requires_grad_(False), source.tokenizer, check_scores=False
        )


def trained(ranks, sampler=None):
    """Return the matcher after four steps of 64 sequences, and what was logged."""
    model = gpt2()
    policy = LanguageModel(model, tokenizer())
    target = EBM(LanguageModel(copy.deepcopy(model), tokenizer()), [Moment(Contains("w3", name="w3"), 0.6)])
    target.lambda_ = [1.5]
    matcher = Matcher(policy, target, OfflineProposal(policy, interval=2, sampler=sampler), "dpg",
                      baseline="leave_one_out", check_samples=64, seed=29, ranks=ranks)  # fmt: skip
    wrapped = model if ranks is None else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    mine = PROMPTS if ranks is None else PROMPTS[ranks.rank * 2 : ranks.rank * 2 + 2]
    logged = []
    for k in range(4):
        batch = matcher.draw(mine, N, max_new_tokens=6, next_prompts=[mine] * min(2, 3 - k))
        for part in batch.split(10):
            matcher.loss(part, wrapped).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        logged.append({name: x for name, x in matcher.commit().items() if not name.startswith("seconds_")})
    return matcher, logged


def w3(samples):
    return torch.tensor([float("w3" in text.split()) for text in samples.text]).double()


def others(seed, n, taken):
    """Return up to n of the prompts 100 to 109 that are not taken, the same on all ranks."""
    order = torch.randperm(10, generator=torch.Generator().manual_seed(seed)).tolist()
    found = [place for place in order if 100 + place not in taken][:n]
    return Prompts([f"w0 w{place % 8}" for place in found], [100 + place for place in found])


def grouped(ranks, objective, how):
    """Take two steps of groups, of which the first lies on both ranks, and return what came of them."""
    model = gpt2()
    policy = LanguageModel(model, tokenizer())
    target = EBM(LanguageModel(copy.deepcopy(model), tokenizer()), [Contains("w3")])
    matcher = Matcher(policy, target, None, objective, reward=w3, seed=29, ranks=ranks, uniform_groups=how,
                      other_contexts=others if how == "replace" else None)  # fmt: skip
    wrapped = model if ranks is None else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    prompts, contexts = ["w1 w2", "w3", "w4", "w1 w2", "w5 w1", "w7"], [0, 1, 2, 0, 3, 4]
    mine = slice(0, 6) if ranks is None else slice(3 * ranks.rank, 3 * ranks.rank + 3)
    gather = (lambda x: x) if ranks is None else ranks.gather
    logged, rewards, weights = [], [], []
    for _ in range(2):
        batch = matcher.draw(prompts[mine], 3, max_new_tokens=6, context_id=contexts[mine])
        found = torch.empty(len(batch)).double()
        for part in batch.split(4):
            out = matcher.loss(part, wrapped)
            out.loss.backward()
            found[part.places] = out.weight
        optimizer.step()
        optimizer.zero_grad()
        ids = gather(batch.samples.context_id)
        weights.append(list(zip(ids.tolist(), gather(found).tolist(), strict=True)))
        rewards.append(list(zip(ids.tolist(), gather(batch.inputs["reward"]).tolist(), strict=True)))
        logged.append({name: x for name, x in matcher.commit().items() if not name.startswith("seconds_")})
    digests = gather(torch.stack([p.double().sum() for p in model.parameters()])[None]).tolist()
    return {
        "log": logged, "rewards": rewards, "weights": weights, "parameters": digests,
        "seen": sum(z.n for z in matcher.running.partitions.values()),
    }  # fmt: skip


def without_ranks():
    """Return the error of a loop under DDP whose matcher knows of no other process."""
    model = gpt2()
    policy = LanguageModel(model, tokenizer())
    target = EBM(LanguageModel(copy.deepcopy(model), tokenizer()), [Contains("w3")])
    matcher = Matcher(policy, target, OfflineProposal(policy), seed=29)
    batch = matcher.draw(PROMPTS, 4, max_new_tokens=6)
    try:
        matcher.loss(batch, DistributedDataParallel(model))
    except ValueError as error:
        return str(error)
    return ""


def main():
    """Train, and write what came of it on rank 0."""
    torch.set_num_threads(1)
    several = "RANK" in os.environ
    if several:
        distributed.init_process_group("gloo")
    ranks = Ranks() if several else None
    matcher, logged = trained(ranks)
    model = matcher.policy.model
    alone, lag_0, ahead = (
        trained(ranks, sampler)
        for sampler in (Engine(), AsyncSampler(Engine(), 2, max_lag=0), AsyncSampler(Engine(), 2))
    )
    groups = {
        how: grouped(ranks, objective, how)
        for objective, how in (("dapo", "keep"), ("grpo", "skip"), ("grpo", "redraw"), ("grpo", "replace"))
    }
    refusal = without_ranks() if several else ""  # both ranks make the DDP
    if ranks is None or ranks.rank == 0:
        parameters = {name: p.flatten().tolist() for name, p in model.named_parameters()}
        partitions = matcher.running.partitions.state_dict()
        result = {
            "parameters": parameters, "log": logged, "contexts": sorted(partitions["context"].tolist()),
            "lag 0 is the same": digest(lag_0[0].policy.model) == digest(alone[0].policy.model),
            "log ahead": ahead[1], "groups": groups, "without ranks": refusal,
        }  # fmt: skip
        Path(sys.argv[1]).write_text(json.dumps(result))
    end()


if __name__ == "__main__":
    main()
