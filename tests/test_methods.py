"""Test neighbouring methods against what their papers say.

Expectations are exact, over all groups of a small space, and losses are written out token by token in plain torch.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dmfast import Objective, dm_loss, linear_dm_loss
from dmfast.methods import METHODS, DrGRPO, dapo, grpo, gspo, maxrl, trajectory_balance, vargrad, vespo
from dmfast.objectives import leave_one_out

V = 5
THETA = torch.tensor([0.3, -0.2, 0.9, 0.0, -1.1])
LOG_Q = torch.tensor([0.1, 0.4, -0.3, 0.2, 0.6]).double().log_softmax(0)
LOG_TARGET = torch.tensor([-0.4, 1.2, 0.1, -2.0, 0.7]).double()
RIGHT = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0]).double()


def expected_gradient(objective, n: int, log_q: Tensor, **inputs: Tensor) -> Tensor:
    """Return the expectation of a step's gradient in theta, over every group of n sequences of one token from q."""
    groups = torch.tensor(list(itertools.product(range(V), repeat=n)))
    x = groups.flatten()
    theta = THETA.clone().requires_grad_(True)
    out = dm_loss(
        theta.expand(len(x), 1, V), x[:, None], log_proposal=log_q[x], objective=objective, reduction="none",
        context_id=torch.arange(len(groups)).repeat_interleave(n), **{k: v[x] if isinstance(v, Tensor) and v.dim() else
                                                                      v for k, v in inputs.items()},
    )  # fmt: skip
    chance = log_q[groups].sum(1).exp().repeat_interleave(n)
    (out.loss * chance / n).sum().backward()
    return theta.grad.double()


def gradient_of(function) -> Tensor:
    theta = THETA.double().requires_grad_(True)
    function(theta.log_softmax(0)).backward()
    return theta.grad


def test_trajectory_balance_descends_the_square_at_any_proposal():
    found = expected_gradient(trajectory_balance, 1, LOG_Q, log_target=LOG_TARGET, log_z=torch.tensor(0.3))
    expected = gradient_of(lambda log_pi: (LOG_Q.exp() * (log_pi - LOG_TARGET + 0.3) ** 2).sum())
    assert torch.allclose(found, expected, atol=1e-6)


def test_trajectory_balance_on_policy_is_twice_reverse_kl():
    logits, x = torch.randn(6, 1, V), torch.randint(V, (6, 1))
    log_pi = logits[:, 0].double().log_softmax(-1).gather(1, x)[:, 0]
    args = {"log_target": LOG_TARGET[x[:, 0]], "log_z": 0.3, "on_policy": True, "log_proposal": log_pi}
    ours = dm_loss(logits, x, objective=trajectory_balance, **args)
    other = dm_loss(logits, x, objective=Objective("reverse_kl", baseline=-1.0), **args)
    assert torch.allclose(ours.weight, 2 * other.weight, atol=1e-6)


@pytest.mark.parametrize("n", [2, 3])
def test_vargrad_is_the_gradient_of_the_variance_but_for_n(n):
    def variance(log_pi: Tensor) -> Tensor:
        d, q = log_pi - LOG_TARGET, LOG_Q.exp()
        return (q * d**2).sum() - (q * d).sum() ** 2

    found = expected_gradient(vargrad, n, LOG_Q, log_target=LOG_TARGET)
    assert torch.allclose(found, gradient_of(variance) * (n - 1) / n, atol=1e-6)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_maxrl_ascends_the_sum_of_pass_at_k(n):
    log_pi = THETA.double().log_softmax(0)
    found = expected_gradient(maxrl, n, log_pi, reward=RIGHT, on_policy=True)

    def passed(log_pi: Tensor) -> Tensor:
        s = (RIGHT * log_pi.exp()).sum()
        return -sum((1 - (1 - s) ** k) / k for k in range(1, n))

    assert torch.allclose(found, gradient_of(passed), atol=1e-6)


def test_maxrl_at_the_base_is_gdc_with_the_z_of_the_group():
    x = torch.tensor([[0], [1], [3], [2]])
    log_a = THETA.double().log_softmax(0)[x[:, 0]]
    log_target = torch.where(RIGHT[x[:, 0]] == 1, log_a, -math.inf)
    logits = THETA.expand(4, 1, V)
    of_target = dm_loss(logits, x, objective=maxrl, log_target=log_target, log_base=log_a, on_policy=True)
    of_reward = dm_loss(logits, x, objective=maxrl, reward=RIGHT[x[:, 0]], on_policy=True)
    gdc = dm_loss(logits, x, log_target=log_target, log_proposal=log_a, log_z=math.log(0.5), on_policy=True)
    assert torch.allclose(of_target.weight, gdc.weight, atol=1e-6)
    assert torch.allclose(of_reward.weight, gdc.weight, atol=1e-6)
    nobody = dm_loss(logits, x, objective=maxrl, reward=torch.zeros(4), on_policy=True)
    assert torch.equal(nobody.weight, torch.zeros(4).double())


# --- against losses that are written out


def batch(seed: int = 0):
    """Return six sequences of two prompts, of several lengths, with a reward and another proposal."""
    g = torch.Generator().manual_seed(seed)
    logits, x = torch.randn(6, 4, V, generator=g), torch.randint(V, (6, 4), generator=g)
    mask = torch.arange(4) < torch.tensor([4, 1, 3, 2, 4, 2])[:, None]
    reward, context = torch.tensor([1.0, 0.0, 0.0, 0.2, 0.9, -1.0]), torch.tensor([3, 3, 8, 8, 3, 8])
    return logits, x, mask, reward, context


def token_log_prob(logits: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    return logits.double().log_softmax(-1).gather(-1, x[..., None])[..., 0] * mask


def means(reward: Tensor, context: Tensor) -> Tensor:
    return torch.stack([reward[context == each].mean() for each in context])


def standardised(reward: Tensor, context: Tensor) -> Tensor:
    found = torch.empty(len(reward)).double()
    for each in context.unique():
        of = reward[context == each].double()
        found[context == each] = (of - of.mean()) / (of.std() + 1e-6)
    return found


@pytest.mark.parametrize("name", ["grpo", "dapo", "Dr. GRPO"])
def test_on_policy_methods_are_their_token_losses(name):
    logits, x, mask, reward, context = batch()
    logits.requires_grad_(True)
    log_pi = token_log_prob(logits, x, mask)
    ratio = (log_pi - log_pi.detach()).exp() * mask
    value = standardised(reward, context)[:, None]
    length = mask.sum(1).double()
    objective, loss = {
        "grpo": (grpo, -((ratio * value).sum(1) / length).mean()),
        "dapo": (dapo, -(ratio * value).sum() / length.sum()),
        "Dr. GRPO": (
            DrGRPO(16),
            -(
                ratio
                * torch.stack([r - reward[context == c].mean() for r, c in zip(reward, context, strict=True)])[:, None]
            ).sum()
            / (6 * 16),
        ),
    }[name]
    (expected,) = torch.autograd.grad(loss, logits)
    dm_loss(logits, x, mask, objective=objective, reward=reward, on_policy=True, context_id=context).loss.backward()
    assert torch.allclose(logits.grad, expected, atol=1e-6) and float(expected.abs().max()) > 1e-3


@pytest.mark.parametrize("shift", [1e-4, 2e-2, 1.5])
def test_gspo_and_vespo_are_their_formulas(shift):
    logits, x, mask, reward, context = batch()
    log_pi = token_log_prob(logits, x, mask).sum(1)
    log_rho = shift * torch.tensor([1.0, -1.0, 2.0, -3.0, 0.5, 0.0]).double()
    args = {"log_proposal": log_pi - log_rho, "reward": reward, "context_id": context}
    value, length = standardised(reward, context), mask.sum(1).double()
    s = (log_rho / length).exp()
    clipped = ((value > 0) & (s > 1 + 4e-4)) | ((value < 0) & (s < 1 - 3e-4))
    found = dm_loss(logits, x, mask, objective=gspo, **args).weight
    assert torch.allclose(found, torch.where(clipped, 0.0, s * value / length), atol=1e-5)
    assert bool(clipped.any()) == (shift > 1e-3)
    rho = log_rho.exp()
    f = torch.where(value >= 0, rho**2 * (3 * (1 - rho)).exp(), rho**3 * (2 * (1 - rho)).exp())
    assert torch.allclose(dm_loss(logits, x, mask, objective=vespo, **args).weight, f * value, atol=1e-5)


def test_vespo_at_ratios_beyond_numbers_is_zero():
    logits, x, mask, reward, context = batch()
    log_pi = token_log_prob(logits, x, mask).sum(1)
    far = torch.tensor([5000.0, -5000.0, 800.0, -800.0, 0.0, 0.0]).double()
    found = dm_loss(logits, x, mask, objective=vespo, log_proposal=log_pi - far, reward=reward, context_id=context)
    assert bool(found.weight.isfinite().all()) and torch.equal(found.weight[:4], torch.zeros(4).double())


@pytest.mark.parametrize("chunk_bytes", [1, None])
@pytest.mark.parametrize("objective", [vargrad, gspo, dapo])
def test_groups_are_whole_in_the_linear_loss_however_it_is_cut(objective, chunk_bytes):
    g = torch.Generator().manual_seed(1)
    _, x, mask, reward, context = batch()
    hidden, weight = torch.randn(6, 4, 8, generator=g), torch.randn(V, 8, generator=g)
    args = {"objective": objective, "reward": reward, "context_id": context, "on_policy": objective is dapo,
            "log_proposal": torch.linspace(-9, -2, 6), "log_target": torch.linspace(-3, -5, 6)}  # fmt: skip
    grads = []
    for linear in (True, False):
        h, w = hidden.clone().requires_grad_(True), weight.clone().requires_grad_(True)
        if linear:
            out = linear_dm_loss(h, w, x, mask, chunk_bytes=chunk_bytes, **args)
        else:
            out = dm_loss(h @ w.T, x, mask, **args)
        out.loss.backward()
        grads.append((out.weight, h.grad, w.grad))
    for ours, other in zip(*grads, strict=True):
        assert torch.allclose(ours, other, atol=1e-5)


def test_a_sequence_of_a_chunk_is_named_in_the_whole_call():
    _, x, mask, _, context = batch()
    hidden, log_target = torch.randn(6, 4, 8), torch.zeros(6)
    log_target[5] = -math.inf
    with pytest.raises(ValueError, match=r"-inf for sequence 5, where P = 0"):
        linear_dm_loss(hidden, torch.randn(V, 8), x, mask, objective=vargrad, log_target=log_target,
                       log_proposal=torch.zeros(6), context_id=context.sort().values, chunk_bytes=1)  # fmt: skip


def test_packed_sequences_have_the_lengths_of_padded_ones():
    logits, x, mask, reward, context = batch()
    args = {"objective": grpo, "reward": reward, "on_policy": True, "context_id": context}
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    packed = dm_loss(logits[mask], x[mask], cu_seqlens=starts, **args)
    assert torch.allclose(packed.weight, dm_loss(logits, x, mask, **args).weight)


def test_group_means():
    seen = {}

    def look(terms):
        seen["mean"], seen["others"] = terms.group_mean(terms.reward), terms.group_mean(terms.reward, True)
        seen["terms"] = terms
        return torch.zeros_like(terms.reward)

    logits, x, mask, reward, context = batch()
    dm_loss(logits, x, mask, objective=look, reward=reward, on_policy=True, context_id=context, num_tokens=50)
    for i in range(6):
        of = reward[context == context[i]].double()
        assert float(seen["mean"][i]) == pytest.approx(float(of.mean()))
        assert float(seen["others"][i]) == pytest.approx(float((of.sum() - reward[i].double()) / 2))
    assert seen["terms"].length.tolist() == [4, 1, 3, 2, 4, 2] and seen["terms"].n_tokens == 50
    assert torch.equal(seen["terms"].context_id, context)
    dm_loss(logits, x, mask, objective=look, reward=reward, on_policy=True)
    assert torch.allclose(seen["others"], leave_one_out(reward.double())) and float(seen["terms"].n_tokens) == 16


class _Largest(TorchDispatchMode):
    """Note the size of the largest tensor that an operator returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, Tensor):
                self.numbers = max(self.numbers, each.numel())
        return out


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_means_over_the_groups_of_a_large_step_compare_no_pairs(leave_one_out):
    """With a number for each pair of sequences, a step of 4,096 that was cut into parts took minutes."""
    n = 600
    context, reward = torch.arange(n) % 75, torch.rand(n, dtype=torch.float64)
    logits = torch.zeros(n, 1, 3)
    found = {}

    def look(terms):
        with _Largest() as seen:
            found["mean"], found["size"] = terms.group_mean(terms.reward, leave_one_out), terms.group_size()
        found["numbers"] = seen.numbers
        return torch.zeros_like(terms.reward)

    dm_loss(logits, torch.zeros(n, 1, dtype=torch.int64), objective=look, reward=reward, on_policy=True,
            context_id=context)  # fmt: skip
    assert found["numbers"] <= 2 * n
    assert found["size"].tolist() == [8.0] * n
    sums = torch.stack([reward[context == c].sum() for c in context])
    wanted = (sums - reward) / 7 if leave_one_out else sums / 8
    torch.testing.assert_close(found["mean"], wanted, rtol=1e-13, atol=0)


def test_a_step_without_a_scored_token_has_weights_of_dapo():
    logits = torch.zeros(2, 2, 5, requires_grad=True)
    out = dm_loss(logits, torch.full((2, 2), -100), objective="dapo", on_policy=True, reward=torch.tensor([0.0, 1.0]))
    out.loss.backward()
    assert bool(out.weight.isfinite().all()) and not bool(logits.grad.any())


def test_an_infinite_value_stays_in_its_group():
    def look(terms):
        seen.append(terms.group_mean(terms.log_target))
        return torch.zeros_like(terms.log_target)

    seen: list[Tensor] = []
    logits, x, mask, _, context = batch()
    log_target = torch.tensor([-math.inf, -1.0, -2.0, -3.0, -1.0, -4.0])
    dm_loss(logits, x, mask, objective=look, log_target=log_target, on_policy=True, context_id=context)
    assert bool(seen[0][context == 3].isinf().all()) and seen[0][context == 8].tolist() == [-3.0] * 3


@pytest.mark.parametrize(
    ("objective", "change", "message"),
    [
        (trajectory_balance, {"log_target": torch.tensor([-1.0, -math.inf, 0, 0, 0, 0])}, "-inf for sequence 1"),
        (vargrad, {"log_target": torch.tensor([-1.0, 0, 0, -math.inf, 0, 0])}, "-inf for sequence 3"),
        (trajectory_balance, {"log_z": None}, "needs log_z"),
        (grpo, {"on_policy": False}, "set on_policy=True"),
        (maxrl, {"on_policy": False}, "set on_policy=True"),
        (grpo, {"reward": None}, "grpo needs reward"),
        (maxrl, {"reward": None}, "needs log_base"),
        (gspo, {"log_proposal": None, "on_policy": False}, "needs log_proposal"),
        (vespo, {"context_id": torch.tensor([0, 0, 1, 1, 1, 2])}, "sequence 5 .* is alone"),
        (grpo, {"num_tokens": -1.0}, "num_tokens must be the number of scored tokens of the step, from 0 to 1e30"),
        (dapo, {"num_tokens": math.inf}, "num_tokens must be the number of scored tokens of the step, from 0 to 1e30"),
        (dapo, {"num_tokens": torch.tensor([5.0])}, "num_tokens must be a number or a 0-d tensor"),
    ],
)
def test_what_a_method_lacks_is_named(objective, change, message):
    logits, x, mask, reward, context = batch()
    args = {"reward": reward, "context_id": context, "on_policy": True, "log_proposal": torch.linspace(-9, -2, 6),
            "log_target": torch.linspace(-3, -5, 6), "log_z": 0.0}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        dm_loss(logits, x, mask, objective=objective, **args | change)


def test_names_are_taken_for_the_functions():
    logits, x, mask, reward, context = batch()
    args = {"reward": reward, "context_id": context, "on_policy": True, "log_proposal": torch.linspace(-9, -2, 6),
            "log_target": torch.linspace(-3, -5, 6), "log_z": 0.0}  # fmt: skip
    for name, function in METHODS.items():
        found, expected = (dm_loss(logits, x, mask, objective=each, **args).weight for each in (name, function))
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="max_length must be positive"):
        DrGRPO(0)
