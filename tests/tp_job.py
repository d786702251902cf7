"""Models that transformers' tensor parallelism has cut, as a rank of two: ``torchrun --nproc-per-node=2 tp_job.py OUT``.

Each rank compares with the whole model, which it loads beside its part, and rank 0 writes what all of them found.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path

import torch
from ending import end
from torch import distributed
from trainer_job import WORDS, tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, utils
from transformers.distributed import DistributedConfig

from dmfast import LanguageModel, OfflineProposal

PROMPTS = ["w1 w2", "w3"]


def made(tied=False, dtype=torch.float32, seed=0):
    """A Llama whose vocabulary of 11 is cut 6 and 5."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=24, initializer_range=0.3, bos_token_id=9, eos_token_id=5,
            tie_word_embeddings=tied,
        )
    ).to(dtype)  # fmt: skip


def saved(name, **options):
    """The folder of a model, which rank 0 writes."""
    folder = Path(FOLDER, name)
    if distributed.get_rank() == 0:
        made(**options).save_pretrained(folder)
    distributed.barrier()
    return str(folder)


def cut(folder, **options):
    """A model as the ranks hold it."""
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2, **options))


def of_both(tensor):
    """All of a tensor, of which this rank may have a part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def same_on_ranks(tensor):
    """Whether all ranks hold the same bits."""
    parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, tensor.detach().contiguous())
    return all(torch.equal(part, tensor) for part in parts)


def told(function):
    """The error of a function."""
    try:
        function()
    except Exception as error:  # whichever it is, the test compares it
        return f"{type(error).__name__}: {error}"
    return None


def losses(lm, x):
    """What has a gradient, by name."""
    given = {"log_target": x.log_prob + 1, "log_proposal": x.log_prob, "log_z": torch.zeros_like(x.log_prob)}
    yield "loss", lambda: lm.loss(x, **given).loss
    yield "log_prob", lambda: lm.log_prob(x).mean()
    yield "logits", lambda: lm.logits(x)[0].logsumexp(-1).mean()
    if lm._head.failure is None:
        yield "hidden_and_head", lambda: lm.hidden_and_head(x).logits().float().logsumexp(-1).mean()


def compared(folder, spoil=lambda model: None, **options):
    """Draws, values and gradients beside those of the whole model."""
    parts, whole = cut(folder, **options), AutoModelForCausalLM.from_pretrained(folder)
    spoil(parts)
    ours, right = LanguageModel(parts, tokenizer()), LanguageModel(whole, tokenizer())
    x, y = (lm.sample(PROMPTS, 4, max_new_tokens=6, seed=3) for lm in (ours, right))
    found = {"drawn": x.tokens.equal(y.tokens), "log q": float((x.log_prob - y.log_prob).abs().max()), "errors": {}}
    torch.manual_seed(distributed.get_rank())
    found["unseeded"] = same_on_ranks(ours.sample(max_new_tokens=6, n=8).tokens)
    wanted = dict(losses(right, y))
    for name, loss in losses(ours, y):
        mine, theirs = loss(), wanted[name]()
        mine.backward()
        theirs.backward()
        errors = [float((mine - theirs).abs())]
        for (n, p), q in zip(parts.named_parameters(), whole.parameters(), strict=True):
            assert p.grad is not None, n
            errors.append(float((of_both(p.grad) - q.grad).abs().max() / q.grad.abs().max()))
        found["errors"][name] = max(errors)
        parts.zero_grad()
        whole.zero_grad()
    found["same"] = same_on_ranks(ours.log_prob(x))
    found["fused"] = ours._head.verified
    found["why not"] = ours._head.why_not(parts)
    found["columns"] = of_local(parts.lm_head.weight).shape[0]
    return found


def of_local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def proposal(folder):
    """Whether q stays while pi moves, what a swap costs, and whether q then is pi."""
    policy = LanguageModel(cut(folder), tokenizer())
    q = OfflineProposal(policy)
    x = q.sample(PROMPTS, 4, max_new_tokens=6, seed=3)
    before = q.snapshot.log_prob(x)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(0.9)
        moved = policy.log_prob(x)
        stays = q.snapshot.log_prob(x).equal(before)
        q.swap()
        swapped = q.snapshot.log_prob(x).equal(moved)
    state = q.state_dict()
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(0.9)
    q.swap()
    q.load_state_dict(state)
    return {
        "moved": float((moved - before).abs().min()), "stays": stays, "swapped": swapped,
        "loaded": q.snapshot.log_prob(x).equal(moved), "device": told(lambda: OfflineProposal(policy, device="cpu")),
    }  # fmt: skip


def main():
    """Run all checks, on all ranks."""
    global FOLDER
    torch.set_num_threads(1)
    utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    distributed.init_process_group("gloo")
    folders = [tempfile.mkdtemp()]
    distributed.broadcast_object_list(folders)
    FOLDER = folders[0]
    plain = saved("plain")
    found = {
        "own head": compared(plain), "tied": compared(saved("tied", tied=True)),
        "proposal": proposal(plain),
    }
    everything = [None] * distributed.get_world_size()
    distributed.all_gather_object(everything, found)
    if distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(everything))
    end()


if __name__ == "__main__":
    main()
