"""Do one run of a method with a learning rate and a seed, and return its results as numbers for JSON.

All methods see the same prompts in the same order for a seed, with 32 prompts in a step and 16 sequences of each. Each
is dmfast's own method in a ``Matcher``. Only ``likelihood`` draws the sequences from p itself, which is known here. It
shows the best that the other methods can reach in the same number of steps.
"""

from __future__ import annotations

import copy
import hashlib
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import exact
import language
import torch
from language import Pair
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import dmfast
from dmfast.targets import Reward

PROMPTS, SAMPLES, STEPS, WARMUP, EVALUATIONS = 32, 16, 600, 20, 6
ON_THE_WAY = 32  # prompts of each split in an evaluation before the end
ALPHAS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.999)


@dataclass(frozen=True)
class Method:
    """The arguments that a method gives to ``Matcher``.

    Attributes:
        options: options of ``Matcher``.
        rewarded: whether the verifier is its reward.
        beta: whether its target is a exp(v/beta), so that it has the parameter beta.
        proposal: the criterion and the interval of its ``OfflineProposal``, or None on-policy.
    """

    options: dict[str, Any]
    rewarded: bool = False
    beta: bool = False
    proposal: tuple[str, int] | None = None


METHODS: dict[str, Method] = {
    # without the factor 1/(1 - alpha), so that clipping the gradient means the same for all; without a baseline nearly
    # all returns are negative for alpha near 1, and their noise spoils the policy
    **{
        f"alpha={a:g}": Method(
            {
                "objective": "alpha",
                "alpha": a,
                "normalize_alpha": False,
                "baseline": "leave_one_out_context",
            }
        )
        for a in ALPHAS
    },
    "gdc++ offline": Method({"objective": "gdc++"}, proposal=("kl", 5)),
    "reinforce": Method({"objective": "reinforce", "baseline": "leave_one_out_context"}, rewarded=True),
    "maxrl": Method({"objective": "maxrl"}, rewarded=True),
    # its authors take four steps on the sequences of one policy; on-policy nothing would ever be clipped
    "gspo": Method({"objective": "gspo"}, rewarded=True, proposal=("interval", 4)),
    "vargrad": Method({"objective": "vargrad"}, beta=True),
    "kl_control": Method({"objective": "kl_control", "baseline": "leave_one_out_context"}, rewarded=True, beta=True),
}
#: What the baseline does, by one run each without it: at alpha = 0 this is gdc++ on-policy.
BARE = {f"{name} no baseline": name for name in ("alpha=0", "alpha=0.9")}
for bare, whole in BARE.items():
    kept = {name: value for name, value in METHODS[whole].options.items() if name != "baseline"}
    METHODS[bare] = Method(kept)
LIKELIHOOD, BASE = "likelihood", "base"


class Data:
    """The base, its name, the pairs of each split, all their right answers, and log a of these answers."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        weights = torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])
        self.name = hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:12]
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.pairs, self.right = language.splits(), language.right_answers()
        self.log_a = {
            pair: log_a for pairs in self.pairs.values()
            for pair, log_a in zip(pairs, self.log_probs(self.model, pairs), strict=True)
        }  # fmt: skip

    def log_probs(self, model: Any, pairs: list[Pair]) -> list[Tensor]:
        """Return log pi of all right answers of each pair."""
        return exact.log_probs(model, self.tokenizer, pairs, self.right)

    def measured(self, model: Any, prompts: int | None = None) -> dict[str, Any]:
        """Return the means of all measures over each split, and over those of its prompts whose Z is below .02.

        Args:
            model: the policy.
            prompts: the number of prompts of each split, which are its first ones. Default: all.
        """
        found = {}
        for name, whole in self.pairs.items():
            pairs = whole[:prompts]
            each = [
                exact.measure(log_pi, self.log_a[pair])
                for pair, log_pi in zip(pairs, self.log_probs(model, pairs), strict=True)
            ]
            found[name] = exact.mean(each)
            rare = [m for pair, m in zip(pairs, each, strict=True) if self.log_a[pair].exp().sum() < exact.RARE]
            if name == "test" and rare:
                found["test, rare"] = exact.mean(rare)
        return found


def prompt_order(n: int, steps: int, seed: int) -> list[list[int]]:
    """Return the places of the prompts of each step. All prompts come in random order, and then all again."""
    source, places = random.Random(seed), list[int]()
    while len(places) < steps * PROMPTS:
        places += source.sample(range(n), n)
    return [places[i * PROMPTS :][:PROMPTS] for i in range(steps)]


def exact_samples(data: Data, pairs: list[Pair], seed: int) -> tuple[list[str], list[str]]:
    """Return prompts and right answers that are drawn from p."""
    generator = torch.Generator().manual_seed(seed)
    prompts, texts = [], []
    for pair in pairs:
        for i in torch.multinomial(data.log_a[pair].exp(), SAMPLES, replacement=True, generator=generator).tolist():
            prompts.append(pair.prompt)
            texts.append(data.right[pair][i])
    return prompts, texts


def matcher_of(data: Data, policy: dmfast.LanguageModel, name: str, beta: float | None, seed: int) -> dmfast.Matcher:
    """Return the matcher that trains a policy by a method.

    Raises:
        ValueError: the method needs a beta and has none, or the reverse.
    """
    method, options = METHODS[name], dict(METHODS[name].options)
    if method.beta != (beta is not None):
        raise ValueError(f"{name} {'needs a' if method.beta else 'has no'} beta, got {beta!r}")
    base = dmfast.LanguageModel(data.model, data.tokenizer)
    verifier = dmfast.Verifier(language.is_right, binary=True, cache=1_000_000)
    proposal = None if method.proposal is None else dmfast.OfflineProposal(policy, *method.proposal)
    if options["objective"] == "kl_control":
        options["beta"] = beta
    target = dmfast.EBM(base, [verifier if beta is None else Reward(verifier, beta)])
    return dmfast.Matcher(
        policy, target, proposal, reward=verifier if method.rewarded else None, seed=seed, **options
    )  # fmt: skip


def run(
    data: Data, method: str, rate: float, seed: int, *, beta: float | None = None, steps: int = STEPS,
    evaluations: int = EVALUATIONS,
) -> dict[str, Any]:  # fmt: skip
    """Train a policy from the base, and return its evaluations.

    Args:
        data: the task and its base.
        method: a name of ``METHODS``, "likelihood", or "base", which is not trained.
        rate: the learning rate of AdamW, after a warm-up.
        seed: the seed of prompts and sequences.
        beta: the parameter beta of the methods that have one.
        steps: the number of optimiser steps.
        evaluations: the number of evaluations on the first 32 prompts of each split. They are evenly spaced over the
            steps, with the last at the end. At the end all prompts are evaluated, too.
    """
    start, spent = time.perf_counter(), 0.0
    model = copy.deepcopy(data.model)
    policy = dmfast.LanguageModel(model, data.tokenizer)
    matcher = None if method in (LIKELIHOOD, BASE) else matcher_of(data, policy, method, beta, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    curve: list[dict[str, Any]] = []
    train = data.pairs["train"]
    for step, places in enumerate(prompt_order(len(train), steps, seed)):
        pairs = [train[i] for i in places]
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARMUP)
        if matcher is None:
            samples = policy.samples_of(*exact_samples(data, pairs, seed * steps + step), append_eos=True)
            reward = torch.ones(len(samples))
            policy.loss(samples, objective="reinforce", on_policy=True, reward=reward).loss.backward()
        else:
            batch = matcher.draw(
                [pair.prompt for pair in pairs], SAMPLES, max_new_tokens=language.LENGTH, context_id=places,
                rows=[pair.row for pair in pairs],
            )  # fmt: skip
            matcher.loss(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if matcher is not None:
            matcher.commit()
        done = step + 1
        if done == steps or done * evaluations // steps > step * evaluations // steps:
            before = time.perf_counter()
            curve.append({"step": done} | data.measured(model, ON_THE_WAY))
            spent += time.perf_counter() - before
    before = time.perf_counter()
    end = data.measured(model)
    if method == BASE:
        curve.append({"step": 0} | data.measured(model, ON_THE_WAY))
    spent += time.perf_counter() - before
    whole = time.perf_counter() - start
    return {
        "method": method, "rate": rate, "seed": seed, "beta": beta, "steps": steps, "base": data.name,
        "swaps": matcher.proposal.swaps if matcher is not None and matcher.proposal is not None else None,
        "seconds": round(whole, 1), "seconds_evaluations": round(spent, 1), "curve": curve, "end": end,
    }  # fmt: skip
