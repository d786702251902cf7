"""Test ``examples/ray_sampler.py`` against Ray itself.

Actors draw what q draws. An actor that is killed or slow is replaced by one with q. A short training that samples ahead
equals one that does not, if no batch may lag.
"""

from __future__ import annotations

import copy
import os
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = str(ROOT / "examples")
# the actors import the example too
os.environ["PYTHONPATH"] = os.pathsep.join([EXAMPLES, os.environ.get("PYTHONPATH", "")])
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
sys.path.insert(0, EXAMPLES)

import ray  # noqa: E402
import torch  # noqa: E402
from ray_sampler import RaySampler  # noqa: E402

import dmfast  # noqa: E402
from dmfast.samples import Samples  # noqa: E402
from dmfast.sampling import AsyncSampler, Sampler  # noqa: E402
from dmfast.training.recipe import load  # noqa: E402


def close(x: Samples, y: Samples) -> bool:
    """Return whether two draws are equal up to the rounding of batches of other sizes."""
    return torch.equal(x.tokens, y.tokens) and bool((x.log_prob - y.log_prob).abs().max() < 1e-4)


def check_draws(sampler: RaySampler) -> None:
    """Check draws, loads and losses of actors."""
    policy = load("tiny-bios")
    ahead = AsyncSampler(sampler, pause=0.0)
    proposal = dmfast.OfflineProposal(policy, sampler=ahead)

    def alike(prompts: list[list[int]] | None = None, n: int = 9) -> bool:
        x, y = (q.sample(prompts, n, max_new_tokens=16, seed=3) for q in (proposal, proposal.snapshot))
        same_contexts = torch.equal(x.context_id, y.context_id) and x.version.tolist() == [proposal.version] * len(x)
        return close(x, y) and same_contexts and bool((ahead.log_prob(x) - x.log_prob).abs().max() < 1e-4)

    assert isinstance(sampler, Sampler)
    assert alike() and alike([[5], [6, 7, 8], [9, 10]], 3)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    assert alike()  # pi has moved, and q has not
    proposal.swap()
    assert alike() and proposal.version == 1
    ray.kill(sampler.actors[1])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert alike()
    assert any("the same request was repeated" in str(each.message) for each in said)
    sampler.timeout = 0.01
    found = ""
    try:
        sampler.sample(n=500, max_new_tokens=40, seed=1)
    except TimeoutError as error:
        found = str(error)
    assert "took longer than timeout=0.01 s" in found
    sampler.timeout = 600.0
    assert alike()


def trained(sampler: Sampler) -> torch.Tensor:
    """Return the parameters after four steps."""
    policy = load("tiny-bios")
    target = dmfast.EBM(policy.around(copy.deepcopy(policy.model)), [dmfast.Moment(dmfast.Contains("she"), 0.5)])
    target.lambda_ = [2.0]
    matcher = dmfast.Matcher(policy, target, dmfast.OfflineProposal(policy, "interval", 2, sampler=sampler))
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=1e-2)
    for step in range(4):
        batch = matcher.draw(None, 8, max_new_tokens=16, next_prompts=[None] * min(2, 3 - step))
        matcher.loss(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        matcher.commit()
    return torch.cat([parameter.detach().flatten() for parameter in policy.model.parameters()])


def main() -> None:
    start = time.perf_counter()
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", object_store_memory=200 * 2**20)
    try:
        sampler = RaySampler(load("tiny-bios"), 2)
        check_draws(sampler)
        assert torch.equal(trained(sampler), trained(AsyncSampler(sampler, max_lag=0)))
    finally:
        ray.shutdown()
    print(f"actors of Ray {ray.__version__}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
