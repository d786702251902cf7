"""A training loop of your own with dmfast: half of the biographies about women (GDC++, arXiv:2206.00761).

    python examples/custom_loop.py                   # the tiny biography model that dmfast ships, 2 minutes on a CPU
    pip install gguf && python scripts/fetch_smollm2.py    # writes SmolLM2-135M, for
    python examples/custom_loop.py --model ~/.cache/dmfast/smollm2-135m --batch 32 --learning-rate 1e-5 --eval-batch 64

The target is log P(x) = log a(x) + lambda * phi(x): a the pretrained model, phi(x) = 1 for a biography about a woman.
For one binary feature lambda has a closed form, the difference of the two log-odds.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch

import dmfast
from dmfast.estimators import PartitionFunction, effective_sample_size


def train(
    policy: dmfast.LanguageModel,
    feature: Callable[[list[str]], torch.Tensor],
    *,
    base_rate: float,
    prompts: Sequence[str] | None = None,
    target_rate: float = 0.5,
    steps: int = 60,
    batch_size: int = 192,
    max_new_tokens: int = 48,
    learning_rate: float = 1e-4,
    warmup: int = 10,
    interval: int = 5,
    objective: str = "gdc++",
    seed: int = 0,
) -> Iterator[dict[str, float]]:
    """Trains ``policy`` in place; yields the metrics of each step. ``feature``: texts to (N,) of 0 and 1."""
    log_odds = [math.log(rate / (1 - rate)) for rate in (target_rate, base_rate)]
    lam = log_odds[0] - log_odds[1]
    base = policy.around(copy.deepcopy(policy.model).requires_grad_(False))
    proposal = dmfast.OfflineProposal(policy, criterion="kl", interval=interval)
    z = PartitionFunction()
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    policy.model.train()
    for step in range(steps):
        start = time.perf_counter()
        per_prompt = batch_size // len(prompts or [""])
        x = proposal.snapshot.sample(prompts, per_prompt, max_new_tokens=max_new_tokens, seed=seed + step)
        sampled = time.perf_counter()
        phi = feature(x.text).double()
        with torch.no_grad():  # as long as q still is a, log q(x) is log a(x)
            log_base = base.log_prob(x) if proposal.swaps else x.log_prob
        log_target = log_base + lam * phi
        z.update(log_target, x.log_prob)
        scored = time.perf_counter()

        out = policy.loss(  # linear_dm_loss on the hidden states: logits never exist at once
            x, log_target=log_target, log_proposal=x.log_prob, log_z=z.log_z, objective=objective
        )
        optimizer.zero_grad()
        out.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()

        proposal.update(out)
        now = proposal.running.estimates().as_dict()
        swapped = proposal.maybe_update()
        ess = effective_sample_size(log_target - x.log_prob).value
        yield now | {"step": step + 1, "phi/women": phi.mean().item(), "swapped": swapped, "log_z": z.log_z, "ess": ess,
                     "seconds_sampling": sampled - start, "seconds_scoring": scored - sampled,
                     "seconds_policy": time.perf_counter() - scored}  # fmt: skip


if __name__ == "__main__":
    from dmfast.demo import main

    main(train)
