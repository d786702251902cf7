"""Sample ahead in actors of Ray, with q on other cores, devices or machines, while this process trains.

    pip install '.[ray]'
    python examples/ray_sampler.py                           # tiny-bios, one actor, two batches ahead
    python examples/ray_sampler.py --actors 4 --ahead 4

Half of the biographies are to be about women, as in custom_loop.py. Each actor holds a copy of q and draws its share of
a batch. An actor that dies, or takes too long, is replaced by one with the same q, and the request is repeated.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import torch
from torch import Tensor

import dmfast
from dmfast.demo import loop_parser, run_loop
from dmfast.samples import Prompt, Samples
from dmfast.sampling import AsyncSampler


class Copy:
    """A copy of q that an actor holds."""

    def __init__(self, policy: dmfast.LanguageModel, threads: int) -> None:
        torch.set_num_threads(threads)
        # objects from Ray are read-only memory, and q is written into this model
        self.policy = policy.around(copy.deepcopy(policy.model).requires_grad_(False))

    def sample(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Draw sequences, and return their state."""
        return self.policy.sample(*args, **options).state_dict()

    @torch.no_grad()
    def log_prob(self, samples: dict[str, Any]) -> Tensor:
        """Return log q of sequences."""
        return self.policy.log_prob(Samples(**samples, tokenizer=self.policy.tokenizer))

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Become q."""
        self.policy.model.load_state_dict(tensors)


class RaySampler:
    """A ``dmfast.sampling.Sampler``: actors of Ray that draw from q, each its share.

    Args:
        policy: what they copy.
        actors: how many.
        timeout: seconds for the answer of one.
        threads: of torch in each.
        options: of each actor, such as ``num_gpus=1``.
    """

    def __init__(
        self, policy: dmfast.LanguageModel, actors: int = 1, timeout: float = 600.0, threads: int = 1, **options: Any
    ) -> None:
        self.version, self.timeout, self.threads, self.tokenizer = 0, timeout, threads, policy.tokenizer
        self.kind = ray.remote(Copy).options(**({"num_cpus": 1} | options))
        self.policy, self.q = ray.put(policy), None
        self.actors = [self.kind.remote(self.policy, threads) for _ in range(actors)]

    def sample(
        self, prompts: Sequence[Prompt] | None = None, n: int = 1, *, max_new_tokens: int,
        temperature: float = 1.0, seed: int | None = None, batch_size: int | None = None, first_row: int = 0,
    ) -> Samples:  # fmt: skip
        """Draw n sequences of each prompt; a sequence's random numbers depend on its place and not on its actor."""
        prompts = [""] if prompts is None else list(prompts)
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "batch_size": batch_size}
        of_prompts = len(prompts) > 1  # else the sequences of the one prompt are shared out
        total = len(prompts) if of_prompts else n
        size, calls, first = math.ceil(total / len(self.actors)), [], []
        for actor, start in zip(self.actors, range(0, total, size), strict=False):
            share = (prompts[start : start + size], n) if of_prompts else (prompts, min(size, n - start))
            calls.append(actor.sample.remote(*share, **how, first_row=first_row + start * (n if of_prompts else 1)))
            first.append(start if of_prompts else 0)
        parts = [self._samples(found, start) for found, start in zip(self._get(calls), first, strict=True)]
        return Samples.cat(parts)

    def _samples(self, found: dict[str, Any], first_context: int) -> Samples:
        # arrays from Ray are read-only
        own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in found.items()}
        samples = Samples(**own, tokenizer=self.tokenizer)
        version = torch.full_like(samples.version, self.version)
        return replace(samples, context_id=samples.context_id + first_context, version=version)

    def log_prob(self, samples: Samples, *, batch_size: int | None = None) -> Tensor:
        """Return (N,) fp64, log q(x)."""
        (scores,) = self._get([self.actors[0].log_prob.remote(samples.state_dict())])
        return scores.clone()

    def load(self, source: dmfast.LanguageModel) -> None:
        """Give all actors the parameters of a policy. An actor that fails is replaced by one with the previous q."""
        new = ray.put({name: tensor.cpu() for name, tensor in source.model.state_dict().items()})
        try:
            self._get([actor.load.remote(new) for actor in self.actors])
        except BaseException:
            self._replace(range(len(self.actors)))  # some may hold the new parameters
            raise
        self.q = new

    def _get(self, calls: list[Any]) -> list[Any]:
        """Return the answers of the actors. The first call goes to the first actor.

        Raises:
            ConnectionError, TimeoutError: an actor has died, or takes too long. It is replaced; ask again.
        """
        answers, lost = [], {}
        for place, call in enumerate(calls):
            try:
                answers.append(ray.get(call, timeout=self.timeout))
            except ray.exceptions.GetTimeoutError as error:
                lost[place] = TimeoutError(f"actor {place} took longer than timeout={self.timeout} s: {error}")
            except ray.exceptions.RayActorError as error:
                lost[place] = ConnectionError(f"actor {place} has died: {error}")
        if lost:
            self._replace(lost)
            raise next(iter(lost.values()))
        return answers

    def _replace(self, places: Any) -> None:
        for place in places:
            ray.kill(self.actors[place])
            self.actors[place] = self.kind.remote(self.policy, self.threads)
            if self.q is not None:
                self.actors[place].load.remote(self.q)  # an actor answers its calls in their order


def train(
    policy: dmfast.LanguageModel, target: dmfast.EBM, *, prompts: Sequence[str] | None, steps: int, batch_size: int,
    max_new_tokens: int, learning_rate: float, interval: int, objective: str, seed: int, ahead: int, actors: int,
) -> Iterator[dict[str, float]]:  # fmt: skip
    """Train ``policy`` in place and yield the metrics of each step, as custom_loop.py does."""
    sampler = AsyncSampler(RaySampler(policy, actors), ahead)
    proposal = dmfast.OfflineProposal(policy, criterion="kl", interval=interval, sampler=sampler)
    matcher = dmfast.Matcher(policy, target, proposal, objective, seed=seed)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    policy.model.train()
    for step in range(steps):
        coming = [prompts] * min(ahead, steps - 1 - step)  # of the next steps, which draw from the same here
        batch = matcher.draw(
            prompts, batch_size // len(prompts or [""]), max_new_tokens=max_new_tokens, next_prompts=coming
        )
        matcher.loss(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield {"step": step + 1, **matcher.commit()}


def main() -> None:
    parser = loop_parser()
    parser.add_argument("--ahead", type=int, default=2, help="batches that are drawn ahead")
    parser.add_argument("--actors", type=int, default=1)
    args = parser.parse_args()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # so that Ray leaves CUDA_VISIBLE_DEVICES alone
    ray.init(include_dashboard=False)
    run_loop(args, partial(train, ahead=args.ahead, actors=args.actors))
    ray.shutdown()


if __name__ == "__main__":
    main()
