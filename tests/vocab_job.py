"""Run ranks of a gloo group that share a vocabulary: ``torchrun --nproc-per-node=2 vocab_job.py``.

Each rank compares its results with one process's. Rank 0 writes what all of them found to the file that the command
line names.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch
from ending import end
from torch import distributed
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import dmfast
from dmfast.kernels.cpu import Cpu

B, T, D = 5, 7, 16


def inputs(vocab, dtype, seed=0, bias=False):
    """Return hidden states, head, tokens and mask, and the inputs of the loss."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, generator=g).to(dtype)
    head = (torch.randn(vocab, D, generator=g) * (3 / D**0.5)).to(dtype)
    tokens = torch.randint(0, vocab, (B, T), generator=g)
    mask = torch.rand(B, T, generator=g) < 0.7
    log_q = -2.5 * mask.sum(1).double()
    given = {
        "log_proposal": log_q, "log_target": log_q + torch.randn(B, generator=g).double(),
        "log_z": torch.randn(B, generator=g).double(),
    }  # fmt: skip
    return hidden, head, tokens, mask, given, torch.randn(vocab, generator=g).to(dtype) if bias else None


def shares(vocab, ranks, uneven):
    """Return where each rank's tokens start and end."""
    if not uneven:
        size = -(-vocab // ranks)
        return [(min(k * size, vocab), min((k + 1) * size, vocab)) for k in range(ranks)]
    cuts = [0, vocab // 5, *(vocab // 2 + k for k in range(ranks - 2)), vocab]
    return list(itertools.pairwise(cuts))


def losses(vocab=41, dtype=torch.float32, uneven=False, bias=False, dtensor=False, frozen=False, log_prob=False,
           packed=False, weighted=False, backend=None, **options):  # fmt: skip
    """Return the errors of this rank against fp64 of one process, and those of one process's own."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    hidden, head, tokens, mask, given, b = inputs(vocab, dtype, bias=bias)
    first, last = shares(vocab, ranks, uneven)[rank]
    if weighted:
        options["token_weight"] = torch.randn(B, T, generator=torch.Generator().manual_seed(1))
    if packed:
        keep = mask.reshape(-1)
        hidden, tokens, mask = hidden.reshape(-1, D)[keep], tokens.reshape(-1)[keep], None
        options["cu_seqlens"] = torch.tensor([0, *inputs(vocab, dtype)[3].sum(1).cumsum(0).tolist()])
    where = {"group": distributed.group.WORLD}
    if uneven:
        where["vocab_start"] = first
    if dtensor:
        mesh, where = init_device_mesh("cpu", (ranks,)), {}

    def run(precise, cut):
        as_dtype = torch.float64 if precise else dtype
        h, w = hidden.to(as_dtype).clone().requires_grad_(), head.to(as_dtype).clone()
        bb = None if b is None else b.to(as_dtype).clone()
        if cut and dtensor:
            w = distribute_tensor(w, mesh, [Shard(0)])
            bb = None if bb is None else distribute_tensor(bb, mesh, [Shard(0)])
        elif cut:
            w, bb = w[first:last].clone(), None if bb is None else bb[first:last].clone()
        w.requires_grad_(not frozen)
        if bb is not None:
            bb.requires_grad_()
        call = {**options, "backend": "eager" if precise else backend, **(where if cut else {})}
        if log_prob:
            lp = dmfast.linear_sequence_log_prob(h, w, tokens, mask, bias=bb, **call)
            out, a, entropy = (lp * torch.arange(1, B + 1)).sum(), lp, None
        else:
            made = dmfast.linear_dm_loss(h, w, tokens, mask, bias=bb, **given, **call).check()
            lp, a, entropy = made.log_prob, made.weight, made.entropy
            out = made.loss if made.loss.dim() == 0 else (made.loss * torch.arange(1, B + 1)).sum()
        out.backward()
        grads = [h.grad, w.grad, None if bb is None else bb.grad]
        grads = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
        return out.detach(), lp.detach(), a.detach(), entropy, grads

    truth, one, cut = run(True, False), run(False, False), run(False, True)
    mine = {"rank": rank, "columns": last - first}
    for name, k in (("loss", 0), ("log_prob", 1), ("entropy", 3)):
        if truth[k] is not None:
            mine[name] = [float((x[k] - truth[k]).abs().max()) for x in (one, cut)]
    for name, k, rows in (("hidden", 0, slice(None)), ("head", 1, slice(first, last)), ("bias", 2, slice(first, last))):
        if truth[4][k] is not None:
            full = truth[4][k]
            scale = full.abs().max()
            mine[name] = [float((x.double() - full[rows]).abs().max() / scale) for x in (one[4][k][rows], cut[4][k])]
    mine["same"] = same_on_ranks(cut[2]) and same_on_ranks(cut[4][0]) and same_on_ranks(cut[0])
    return mine


def same_on_ranks(x):
    """Return whether all ranks hold the same bits."""
    parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, x.contiguous())
    return all(torch.equal(part, x) for part in parts)


def refused(spoil):
    """Return the error of this rank where ``spoil(rank, arguments)`` has changed its arguments."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    hidden, head, tokens, mask, given, _ = inputs(41, torch.float32)
    first, last = shares(41, ranks, uneven=False)[rank]
    call = {
        "hidden": hidden, "weight": head[first:last].clone(), "tokens": tokens, "mask": mask, **given,
        "group": distributed.group.WORLD,
    }  # fmt: skip
    spoil(rank, call)
    try:
        dmfast.linear_dm_loss(**call).check()
    except Exception as error:  # the test compares the message of any error
        return f"{type(error).__name__}: {error}"
    finally:
        Cpu.records_faults = False
    return "nothing was raised"


def nan_in_one(rank, call):
    call["hidden"][2, 3] = 1.0
    call["mask"][:] = True
    if rank == 1:
        call["weight"][4] = torch.nan


def label_of_probability_0(rank, call):
    call["mask"][:] = True
    call["tokens"][:] = 0
    call["bias"] = torch.zeros(len(call["weight"]))
    if rank == 0:
        call["bias"][0] = -torch.inf


def recorded(rank, call):
    """Record what is wrong, as a device does. ``out.check()`` reads it."""
    nan_in_one(rank, call)
    Cpu.records_faults = True


def other_tokens(rank, call):
    call["tokens"][0, 0] = (call["tokens"][0, 0] + rank) % 41
    call["mask"][:] = True


def other_target(rank, call):
    call["log_target"][3] += 1e-15 * rank * call["log_target"][3]
    call["log_target"][4] += rank


def overlap(rank, call):
    call["vocab_start"] = 20 * rank


def wrong_dtype(rank, call):
    if rank == 0:
        call["hidden"] = call["hidden"].double()


def token_too_large(rank, call):
    call["mask"][:] = True
    call["tokens"][1, 2] = 41


def other_temperature(rank, call):
    call["temperature"] = 1.0 + rank


def other_token_weight(rank, call):
    call["token_weight"] = torch.ones(B, T)
    call["token_weight"][1, 2] += rank
    call["mask"][:] = True


def breaks_within(rank, call):
    """Let the kernel of a rank fail once the exchange has begun."""
    if rank == 1:
        real = Cpu.forward

        def broken(*args, **kwargs):
            Cpu.forward = real
            raise MemoryError("no memory for this chunk")

        Cpu.forward = broken


def exchanged(**options):
    """Return how many rows there are, and what this rank exchanges in a call and its backward: name, dtype, shape."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    hidden, head, tokens, mask, given, _ = inputs(41, torch.float32)
    first, last = shares(41, ranks, uneven=False)[rank]
    weight, found = head[first:last].clone().requires_grad_(), []

    def noting(name, real, tensor):
        def call(*args, **kwargs):
            found.append([name, str(tensor(args).dtype), list(tensor(args).shape)])
            return real(*args, **kwargs)

        return call

    real = distributed.all_gather, distributed.all_reduce
    distributed.all_gather = noting("all_gather", real[0], lambda args: args[1])
    distributed.all_reduce = noting("all_reduce", real[1], lambda args: args[0])
    try:
        out = dmfast.linear_dm_loss(
            hidden.requires_grad_(), weight, tokens, mask, **given, group=distributed.group.WORLD, **options
        )
        out.loss.backward()
    finally:
        distributed.all_gather, distributed.all_reduce = real
    return {"rows": int(mask.sum()), "hidden": int(hidden.numel()), "calls": found}


FAULTS = {f.__name__: f for f in (
    nan_in_one, recorded, label_of_probability_0, other_tokens, other_target, overlap, wrong_dtype, token_too_large,
    other_temperature, other_token_weight, breaks_within,
)}  # fmt: skip
CASES = {
    "plain": {},
    "uneven, bias": {"uneven": True, "bias": True, "return_entropy": True},
    "dtensor, bias": {"dtensor": True, "bias": True},
    "long sequences": {"chunk_bytes": 64 * 4 * 3, "return_entropy": True},
    "chunks": {"chunk_bytes": 64 * 4 * 8, "objective": "dpg"},
    # shards of 60 and 241 tokens have rows of 64 and 256 places, of which only one decides how many fit into the buffer
    "chunks, uneven": {"vocab": 301, "uneven": True, "chunk_bytes": 256 * 4 * 4, "max_weight": 1.0},
    "capped": {"softcap": 3.0, "temperature": 0.7, "objective": "js", "bias": True},
    "packed": {"packed": True},
    "frozen": {"frozen": True, "max_weight": 1.5},
    "each": {"reduction": "none"},
    "bonus": {"entropy_coefficient": 0.3, "uneven": True},
    "bonus, long sequences": {"entropy_coefficient": 0.3, "chunk_bytes": 64 * 4 * 3},
    "bonus, own": {"entropy_coefficient": 0.3, "objective": lambda terms: terms.log_target - terms.log_proposal},
    "own objective": {"objective": lambda terms: terms.log_target - terms.log_proposal},
    "token_weight": {"weighted": True, "uneven": True, "bias": True},
    "token_weight, long sequences": {"weighted": True, "chunk_bytes": 64 * 4 * 3, "entropy_coefficient": 0.3},
    "token_weight, own": {"weighted": True, "objective": lambda terms: terms.log_target - terms.log_proposal},
    "log_prob": {"log_prob": True, "uneven": True},
    "bf16": {"dtype": torch.bfloat16, "bias": True, "vocab": 301},
    "bf16 same": {"dtype": torch.bfloat16, "logits_dtype": "same"},
    "fp16": {"dtype": torch.float16, "grad_scale": 1.0},
    "fp16, unscaled": {"dtype": torch.float16},
    "fp64": {"dtype": torch.float64},
    "eager": {"backend": "eager", "return_entropy": True},
}


def main():
    """Run all cases, on all ranks."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    found = {"cases": {name: losses(**case) for name, case in CASES.items()}}
    found["faults"] = {name: refused(spoil) for name, spoil in FAULTS.items()}
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    found["replicated"] = refused(lambda rank, call: call.update(
        weight=distribute_tensor(inputs(41, torch.float32)[1], mesh, [Replicate()]), group=None))  # fmt: skip
    found["exchanged"] = {
        "one chunk": exchanged(),
        "known weight": exchanged(objective="dpg"),
        "entropy": exchanged(return_entropy=True),
        "chunks": exchanged(chunk_bytes=64 * 4 * 8),
    }
    everything = [None] * distributed.get_world_size()
    distributed.all_gather_object(everything, found)
    if distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(everything))
    end()


if __name__ == "__main__":
    main()
