"""Write a training loop of your own: half of the biographies about women (GDC++, arXiv:2206.00761).

    python examples/custom_loop.py                   # the tiny biography model that dmfast ships, 2 minutes on a CPU
    pip install gguf && python scripts/fetch_smollm2.py    # writes SmolLM2-135M, for
    python examples/custom_loop.py --model ~/.cache/dmfast/smollm2-135m --batch 32 --learning-rate 1e-5 --eval-batch 64

The target is log P(x) = log a(x) + lambda * phi(x). a is the pretrained model, and phi(x) = 1 for texts about women.
``dmfast.demo`` loads the model, finds lambda, calls ``train`` and measures the policy before and after it.
"""

from collections.abc import Iterator, Sequence

import torch

import dmfast


def train(
    policy: dmfast.LanguageModel,
    target: dmfast.EBM,
    *,
    prompts: Sequence[str] | None = None,
    steps: int = 60,
    batch_size: int = 192,
    microbatch: int = 192,
    max_new_tokens: int = 48,
    learning_rate: float = 1e-4,
    warmup: int = 10,
    interval: int = 5,
    objective: str = "gdc++",
    seed: int = 0,
) -> Iterator[dict[str, float]]:
    """Train ``policy`` in place and yield the metrics of each step.

    Args:
        policy: the model that is trained.
        target: the distribution that the policy should become, whose base does not change with the policy.
        prompts: the texts that sequences continue. The default is the empty prompt.
        steps, batch_size: the number of optimiser steps, and of sequences in each.
        microbatch: the number of sequences that go through the policy at a time.
        max_new_tokens: the length at which a sequence without EOS ends.
        learning_rate, warmup: AdamW's learning rate, and the number of steps in which it rises to that.
        interval: the number of steps between checks whether q should become pi.
        objective: one of ``dmfast.objectives.OBJECTIVES``.
        seed: the seed of the sequences that are drawn.
    """
    proposal = dmfast.OfflineProposal(policy, criterion="kl", interval=interval)
    matcher = dmfast.Matcher(policy, target, proposal, objective, seed=seed)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    policy.model.train()
    for step in range(steps):
        batch = matcher.draw(prompts, batch_size // len(prompts or [""]), max_new_tokens=max_new_tokens)
        for part in batch.split(microbatch):  # hidden states go into the fused loss: logits never exist at once
            matcher.loss(part).loss.backward()  # divided by the step's sequences already
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield {"step": step + 1, **matcher.commit()}  # q <- pi if pi is nearer to p


if __name__ == "__main__":
    from dmfast.demo import main

    main(train)
