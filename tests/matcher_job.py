"""A loop around ``Matcher`` as a script, alone or as a rank of several by torchrun: ``python matcher_job.py OUT``."""

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
from trainer_job import gpt2, tokenizer

from dmfast import EBM, Contains, LanguageModel, Matcher, Moment, OfflineProposal

PROMPTS = ["w1 w2", "w3", "w4 w5 w6", "w7"]
N = 16


class Ranks:
    """Those of torch.distributed."""

    def __init__(self):
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def gather(self, values):
        parts = [torch.empty_like(values) for _ in range(self.size)]
        distributed.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def agree(self, mine):
        return bool(self.gather(torch.tensor([mine]))[0])


def main():
    """Takes four steps of 64 sequences, and writes what came of them on rank 0."""
    torch.set_num_threads(1)
    several = "RANK" in os.environ
    if several:
        distributed.init_process_group("gloo")
    ranks = Ranks() if several else None
    model = gpt2()
    policy = LanguageModel(model, tokenizer())
    target = EBM(LanguageModel(copy.deepcopy(model), tokenizer()), [Moment(Contains("w3", name="w3"), 0.6)])
    target.lambda_ = [1.5]
    matcher = Matcher(policy, target, OfflineProposal(policy, interval=2), "dpg", baseline="leave_one_out",
                      check_samples=64, seed=29, ranks=ranks)  # fmt: skip
    wrapped = DistributedDataParallel(model) if several else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    mine = PROMPTS if ranks is None else PROMPTS[ranks.rank * 2 : ranks.rank * 2 + 2]
    logged = []
    for _ in range(4):
        batch = matcher.draw(mine, N, max_new_tokens=6)
        for part in batch.split(10):
            matcher.loss(part, wrapped).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        logged.append({name: x for name, x in matcher.commit().items() if not name.startswith("seconds_")})
    if ranks is None or ranks.rank == 0:
        parameters = {name: p.flatten().tolist() for name, p in model.named_parameters()}
        partitions = matcher.running.partitions.state_dict()
        result = {"parameters": parameters, "log": logged, "contexts": sorted(partitions["context"].tolist())}
        Path(sys.argv[1]).write_text(json.dumps(result))
    end()


if __name__ == "__main__":
    main()
