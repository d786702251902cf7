"""Compare one training step of a model in dmfast with the plain one: time by phase, memory, rows projected to V."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import LanguageModel
from .eager_step import EagerStep
from .measure import BOTH, WHOLE, Phases, extra_memory, in_fresh_process, spread
from .noise import calmest
from .report import whole_steps

RANDOM_GPT2 = "random-gpt2"  # 4 layers of 128, V = 50257


def load(name: str) -> LanguageModel:
    """Load a folder, a name of the hub, ``tiny-bios`` or ``random-gpt2``."""
    if name != RANDOM_GPT2:
        from ..training.recipe import load as load_model

        return load_model(name)
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=128, n_head=4, vocab_size=50257))
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 50256, "a": 0}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    return LanguageModel(model, tokenizer)


class DMFastStep(Phases):
    """Take the same step with dmfast as DMTrainer does, phase by phase, where q is no longer a."""

    def __init__(
        self, policy: LanguageModel, proposal: LanguageModel, base: LanguageModel, *,
        feature: Callable[[Tensor], Tensor], lambda_: float, batch: int, length: int, learning_rate: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.policy, self.proposal, self.base = policy, proposal, base
        self.feature, self.lambda_, self.batch, self.length = feature, lambda_, batch, length
        self.optimizer = torch.optim.AdamW(policy.model.parameters(), lr=learning_rate)
        self.scored = 0  # tokens of the last step, each a row projected to V by a and by the policy
        self.seed = 0

    def __call__(self) -> float:
        """Take one step and return its loss."""
        self.seed += 1
        with self.phase("sampling"):
            x = self.proposal.sample(n=self.batch, max_new_tokens=self.length, seed=self.seed)
        with self.phase("scoring by a"), torch.no_grad():
            log_target = self.base.log_prob(x) + self.lambda_ * self.feature(x.tokens[:, x.prompt_len :])
        with self.phase("policy forward"):  # with linear_dm_loss the head's gradient is made here
            out = self.policy.loss(x, log_target=log_target, log_proposal=x.log_prob, log_z=0.0)
        with self.phase("policy backward"):
            out.loss.backward()  # type: ignore[no-untyped-call]
        with self.phase("optimiser"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.scored = int(x.score_mask.sum())
        return float(out.loss.detach())


def make(kind: str, name: str, batch: int, length: int) -> DMFastStep | EagerStep:
    """Return the step ``dmfast`` or ``eager`` on fresh copies of the model, where q is slightly off and so is not a."""
    base = load(name)
    policy, proposal = (LanguageModel(copy.deepcopy(base.model), base.tokenizer) for _ in range(2))
    with torch.no_grad():
        for p in proposal.model.parameters():
            p.mul_(1 + 1e-4)
    for model in (base.model, proposal.model):
        model.requires_grad_(False).eval()
    policy.model.train()

    def feature(tokens: Tensor) -> Tensor:
        return (tokens < base.vocab_size // 1000).any(-1).double()

    if kind == "dmfast":
        return DMFastStep(policy, proposal, base, feature=feature, lambda_=1.0, batch=batch, length=length)
    return EagerStep(
        policy.model, proposal.model, base.model, bos=int(base._encode(None)[0][0, 0]),
        eos=base.eos_token_ids, pad=base.pad_token_id, feature=feature, lambda_=1.0, batch=batch, length=length,
    )  # fmt: skip


def profile(
    name: str, batch: int, length: int, rounds: int, say: Callable[[Any], None] = lambda line: None
) -> dict[str, Any]:
    """Interleave both steps, and return ms of each phase and of the whole, and the peak memory of each.

    Where the rounds disagree about a whole step, all of them are timed again, as ``calmest`` says. ``say`` gets a line
    before each part, since a large model takes minutes.
    """
    say(f"loading {name} for the step of dmfast and the plain step")
    steps = {kind: make(kind, name, batch, length) for kind in ("dmfast", "eager")}
    torch.manual_seed(0)
    say("one step of each that is not timed")
    for step in steps.values():
        step()
    ms = calmest(lambda: _timed(steps, rounds, say), whole_steps, say)
    say("one step of each whose forwards are counted")
    forwards = {kind: _count(step) for kind, step in steps.items()}
    memory = {}
    for kind in steps:
        say(f"the memory of the {kind} step, in a process of its own")
        memory[kind] = _memory(kind, name, batch, length)
    return {
        "model": Path(name).name if Path(name).is_dir() else name,
        "parameters": sum(p.numel() for p in load(name).model.parameters()),
        "batch": batch, "length": length, "threads": torch.get_num_threads(),
        "ms": ms,
        "forwards": forwards,
        "memory_mb": memory,
    }  # fmt: skip


def _timed(
    steps: Mapping[str, DMFastStep | EagerStep], rounds: int, say: Callable[[Any], None]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the spread of each phase in ms, by kind of step, over rounds that take the kinds in changing order."""
    times: dict[str, dict[str, list[float]]] = {kind: {} for kind in steps}
    for i in range(rounds):
        say(f"round {i + 1} of {rounds}: a step of each")
        for kind in sorted(steps, reverse=bool(i % 2)):
            start = time.perf_counter()
            steps[kind]()
            whole = time.perf_counter() - start
            found = steps[kind].seconds
            both = found["policy forward"] + found["policy backward"]
            for phase, seconds in {**found, BOTH: both, WHOLE: whole}.items():
                times[kind].setdefault(phase, []).append(seconds * 1e3)
    return {kind: {phase: spread(values) for phase, values in found.items()} for kind, found in times.items()}


def _count(step: DMFastStep | EagerStep) -> dict[str, dict[str, int]]:
    """Count for q, a and the policy in one step: forwards, tokens that went through, rows projected to V."""
    counts: dict[str, dict[str, int]] = {}
    hooks = []
    for name, which in (("q", step.proposal), ("a", step.base), ("policy", step.policy)):
        found = counts[name] = {"forwards": 0, "tokens": 0, "rows": 0}
        model: Any = which.model if isinstance(which, LanguageModel) else which

        def count(_: Any, args: Any, kwargs: dict[str, Any], out: Any, found: dict[str, int] = found) -> None:
            found["forwards"] += 1
            found["tokens"] += kwargs["input_ids"].numel()
            found["rows"] += out.logits[..., 0].numel()

        hooks.append(model.register_forward_hook(count, with_kwargs=True))
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    if isinstance(step, DMFastStep):  # it applies the head outside the model's forward, to scored rows only
        for name in ("a", "policy"):
            counts[name]["rows"] += step.scored
    return counts


def _memory(kind: str, name: str, batch: int, length: int) -> float:
    """Return the peak of a fresh process over what it has after a first step.

    Gradients count, and the optimiser's state does not.
    """
    code = "from dmfast.bench.step import print_memory; print_memory()"
    where = str(Path(name).expanduser().resolve()) if Path(name).expanduser().exists() else name
    return float(in_fresh_process(code, kind, where, str(batch), str(length), str(torch.get_num_threads())))


def print_memory() -> None:
    """Print what ``_memory`` reads."""
    kind, name, batch, length, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(extra_memory(make(kind, name, int(batch), int(length)))))
