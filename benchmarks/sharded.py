"""Measure what FSDP2 costs and saves on two CPU processes.

The figures are the bytes of parameters in a process, the time of a loss and its gradient, and the time of sampling
with the model gathered once and in each forward pass. They are medians of the bundled model. With a file name, they are
written as JSON.

    torchrun --standalone --nproc-per-node 2 benchmarks/sharded.py [results/sharded.json]
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dmfast
from dmfast import sharding
from dmfast.training.recipe import TINY_BIOS
from dmfast.training.report import machine

SEQUENCES, NEW, ROUNDS = 64, 48, 7


def policy(*, sharded: bool) -> dmfast.LanguageModel:
    """Return the bundled model, either whole or as the shards of this process."""
    lm = dmfast.LanguageModel.from_pretrained(TINY_BIOS, check_scores=False)
    if sharded:
        for layer in lm.model.transformer.h:
            fully_shard(layer)
        fully_shard(lm.model)
    return lm


def median(call: Callable[[int], object]) -> float:
    """Return the median seconds of a call without the first one. The processes begin together."""
    taken = []
    for i in range(ROUNDS + 1):
        distributed.barrier()
        start = time.perf_counter()
        call(i)
        taken.append(time.perf_counter() - start)
    return round(statistics.median(taken[1:]), 4)


def main() -> None:
    """Print and write the medians of process 0."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    whole, shards = policy(sharded=False), policy(sharded=True)
    samples = whole.sample(None, SEQUENCES, max_new_tokens=NEW, seed=rank)
    options = {"log_target": samples.log_prob, "log_proposal": samples.log_prob, "log_z": 0.0}
    ddp = whole.around(DistributedDataParallel(whole.model))
    found = {
        name: {"megabytes": sum(sharding.local(each).nbytes for each in lm.model.parameters()) / 1e6}
        for name, lm in (("whole", whole), ("FSDP2", shards))
    }
    for name, lm in (("whole", ddp), ("FSDP2", shards)):
        found[name]["loss and gradient, s"] = median(lambda _, lm=lm: lm.loss(samples, **options).loss.backward())

    def draw(lm: dmfast.LanguageModel) -> float:
        return median(lambda i: lm.sample(None, SEQUENCES, max_new_tokens=NEW, seed=2 * i + rank))

    found["whole"]["sampling, s"] = draw(whole)
    found["FSDP2"]["sampling, s"] = draw(shards)
    shards.gather_for_sampling = False
    found["FSDP2"]["sampling, each layer gathered in each forward, s"] = draw(shards)
    if rank == 0:
        print(json.dumps(found, indent=1))
        if len(sys.argv) > 1:
            report = {"machine": machine(), "sequences": SEQUENCES, "new tokens": NEW, "processes": 2, "median": found}
            Path(sys.argv[1]).write_text(json.dumps(report, indent=1) + "\n")
    distributed.barrier()
    distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo threads that DDP keeps may abort an interpreter that ends


if __name__ == "__main__":
    main()
