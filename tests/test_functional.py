"""Test the functional API.

The tests have numbers that were worked by hand, and hold the oracle to finite differences. They hold the losses inside
PyTorch (autograd, in place, checkpointing, hooks, scaling, autocast, torch.compile) to the oracle or to the plain call.
test_kernels.py tests the arithmetic of the kernels.
"""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import dmfast
from dmfast import Objective, Terms, eager, kernels
from dmfast.functional import DMLossOutput
from dmfast.kernels import check_ops, checks, cuda, extension, ops, use_backend
from dmfast.objectives import OBJECTIVES, PPOClip, leave_one_out

INF = math.inf
LOG4 = math.log(4)
inplaces = pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
# gdc++ takes two phases, and dpg takes one pass.
known = pytest.mark.parametrize("objective", ["gdc++", "dpg"])


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass
class Problem:
    logits: Tensor
    tokens: Tensor
    terms: dict[str, Tensor]

    def loss(self, logits: Tensor, **options: object) -> DMLossOutput:
        return dmfast.dm_loss(logits, self.tokens, **{**self.terms, **options})

    def oracle(self, logits: Tensor, **options: object) -> DMLossOutput:
        return eager.dm_loss(logits, self.tokens, **{**self.terms, **options})

    def gradient(self, **options: object) -> Tensor:
        """Return the oracle's gradient in the logits."""
        logits = self.logits.double().requires_grad_()
        self.oracle(logits, **options).loss.backward()
        assert logits.grad is not None
        return logits.grad


def problem(b: int = 4, t: int = 5, v: int = 37, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    torch.manual_seed(seed)
    logits = 2 * torch.randn(b, t, v)
    tokens = torch.randint(v, (b, t)).masked_fill(torch.rand(b, t) < 0.2, -100)
    log_pi = eager.sequence_log_prob(logits.double(), tokens)
    noise = torch.randn(3, b).double()
    terms = {"log_target": log_pi + noise[0], "log_proposal": log_pi + noise[1] / 2, "log_z": noise[2] / 3}
    return Problem(logits.to(dtype), tokens, terms)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def close(actual: Tensor | None, expected: Tensor | None, rtol: float = 2e-5, atol: float = 1e-7) -> None:
    assert actual is not None and expected is not None
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


# --- numbers by hand ---------------------------------------------------------------------------------------------


def test_uniform_logits() -> None:
    """With V = 4, log pi of two tokens is -2 log 4, their entropy 2 log 4, and each column's gradient 1/4 or -3/4."""
    logits = torch.zeros(1, 3, 4, requires_grad=True)
    tokens = torch.tensor([[2, -100, 0]])
    log_pi = dmfast.sequence_log_prob(logits, tokens)
    assert log_pi.dtype == torch.float64 and log_pi.tolist() == pytest.approx([-2 * LOG4], abs=1e-7)
    log_pi.backward(f64(1.0))
    close(logits.grad, torch.tensor([[[-0.25, -0.25, 0.75, -0.25], [0.0] * 4, [0.75, -0.25, -0.25, -0.25]]]))
    out = dmfast.dm_loss(logits, tokens, log_target=f64(-1.0), log_proposal=f64(-2.0), log_z=0.5, return_entropy=True)
    assert out.entropy is not None and out.entropy.tolist() == pytest.approx([2 * LOG4], abs=1e-6)


def test_gdc_plus_plus_by_hand() -> None:
    """Weights, loss and gradient are those worked out by hand.

    Each of the two sequences has one token with pi = 1/4. The first has P = 0.3, Z = 2 and q = 0.1, so that u = 1.5,
    rho = 2.5 and A = -1. The second has P = 0 and q = 0.5, so that u = 0, rho = 0.5 and A = -0.5.

    The loss is -(1/2)(-1 - 0.5) log(1/4) = -0.75 log 4.
    """
    logits = torch.zeros(2, 1, 4, requires_grad=True)
    inputs = {"log_target": f64(0.3, 0.0).log(), "log_proposal": f64(0.1, 0.5).log(), "log_z": math.log(2)}
    out = dmfast.dm_loss(logits, torch.tensor([[1], [3]]), **inputs)
    assert out.log_prob.tolist() == pytest.approx([-LOG4, -LOG4], abs=1e-7)
    assert out.log_ratio is not None and out.log_ratio.exp().tolist() == pytest.approx([2.5, 0.5], rel=1e-6)
    assert out.log_target_ratio is not None and out.log_target_ratio.exp().tolist() == pytest.approx([1.5, 0.0])
    assert out.weight.tolist() == pytest.approx([-1.0, -0.5], rel=1e-6)
    assert out.loss.dtype == torch.float64 and float(out.loss.detach()) == pytest.approx(-0.75 * LOG4, rel=1e-6)
    assert (int(out.n_clipped), int(out.n_empty), out.scored.tolist()) == (0, 0, [True, True])
    out.loss.backward()
    # The gradient is -(A/2)(onehot - 1/4), which pushes the policy away from both.
    close(logits.grad, torch.tensor([[[-0.125, 0.375, -0.125, -0.125]], [[-0.0625, -0.0625, -0.0625, 0.1875]]]))


# pi = 1/4, q = 1/8, P = 1/3 and Z = 2/3 give p = 1/2, rho = 2, u = 4 and t = pi/p = 1/2. R is 3, and a is 1/5.
BY_HAND = {
    "dpg": ({}, 4.0),
    "gdc++": ({}, 2.0),
    "reverse_kl": ({}, 2 * (math.log(2) - 1)),
    "js": ({}, 2 * math.log(3 / 2)),
    "tv": ({}, 1.0),
    "chi2": ({}, 2 * 3.0),
    "reverse_chi2": ({}, 2 * 2 * 0.5),
    "alpha": ({"alpha": 0.5}, 2 * 2 * (math.sqrt(2) - 1)),
    "reinforce": ({}, 6.0),
    "reinforce_p": ({"log_scale": math.log(0.5)}, 2 * 2 / 3),
    "kl_control": ({"beta": 0.5}, 2 * (3 - 0.5 * math.log(5 / 4))),
}


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_by_hand(name: str, backend: str) -> None:
    parameters, expected = BY_HAND[name]
    logits, tokens = torch.zeros(1, 1, 4), torch.tensor([[1]])
    inputs = {
        "log_target": f64(1 / 3).log(), "log_proposal": f64(1 / 8).log(), "log_z": math.log(2 / 3),
        "reward": f64(3.0), "log_base": f64(0.2).log(),
    }  # fmt: skip

    def weight(on_policy: bool = False, **changes: object) -> float:
        objective = Objective(name, **{**parameters, **changes})  # type: ignore[arg-type]
        with use_backend(backend):
            return float(dmfast.dm_loss(logits, tokens, objective=objective, on_policy=on_policy, **inputs).weight)

    assert weight() == pytest.approx(expected, rel=1e-6)
    if name in dmfast.objectives.TARGET_OBJECTIVES:
        assert weight(normalize=False) == pytest.approx(expected * 2 / 3, rel=1e-6)
    if name != "gdc++":
        assert weight(baseline=0.75) == pytest.approx(expected - 0.75 * 2, rel=1e-6)
        assert weight(baseline=f64(-2.0)) == pytest.approx(expected + 2 * 2, rel=1e-6)
    # On-policy, rho is 1 and pi is what the sampler stored, which is q here, so that u = 4 and t = q/p = 1/4.
    on_policy = {
        "dpg": 4.0, "gdc++": 3.0, "reverse_kl": math.log(4) - 1, "js": math.log(5 / 2), "tv": 0.5, "chi2": 15.0,
        "reverse_chi2": 1.5, "alpha": 2 * (2 - 1), "reinforce": 3.0, "reinforce_p": 2 / 3,
        "kl_control": 3 - 0.5 * math.log(5 / 8),
    }  # fmt: skip
    assert weight(on_policy=True) == pytest.approx(on_policy[name], rel=1e-6)


def test_leave_one_out_by_hand() -> None:
    """With R = 1, 2, 6, 3 in contexts 7, 7, 9, 9 and rho = 1, the baselines are the means of the others."""
    inputs = {"log_proposal": f64(*[-LOG4] * 4), "reward": f64(1, 2, 6, 3), "on_policy": True}
    call = (torch.zeros(4, 1, 4), torch.zeros(4, 1, dtype=torch.int64))
    out = dmfast.dm_loss(*call, objective=Objective("reinforce", baseline="leave_one_out"), **inputs)
    assert out.weight.tolist() == pytest.approx([1 - 11 / 3, 2 - 10 / 3, 6 - 2, 3 - 3])
    context = {"context_id": torch.tensor([7, 7, 9, 9])}
    objective = Objective("reinforce", baseline="leave_one_out_context")
    out = dmfast.dm_loss(*call, objective=objective, **context, **inputs)
    assert out.weight.tolist() == pytest.approx([-1.0, 1.0, 3.0, -3.0])
    assert leave_one_out(f64(1, 2, 6)).tolist() == pytest.approx([4.0, 3.5, 1.5])


def test_temperature_and_softcap_by_hand() -> None:
    """With logits 0 and 3, softcap 6 and temperature 2, cap(3) is 6 tanh(1/2), and log pi is -log(1 + e^(-cap/2))."""
    log_pi = dmfast.sequence_log_prob(torch.tensor([[[0.0, 3.0]]]), torch.tensor([[1]]), temperature=2.0, softcap=6.0)
    assert float(log_pi) == pytest.approx(-math.log1p(math.exp(-3 * math.tanh(0.5))), abs=1e-7)


def test_max_weight_by_hand() -> None:
    """With u = 8, 1 and 0, A is clipped to [-1.5, 1.5].

    A context with Z = 0 has A = 0. It counts in B and in n_empty.
    """
    inputs = {"log_target": f64(8, 1, 0, 0).log(), "log_proposal": f64(1, 1, 1, 1).log(), "log_z": f64(0, 0, 0, -INF)}
    objective = Objective("dpg", baseline=f64(0, 0, 10, 10))
    logits, tokens = torch.zeros(4, 1, 2), torch.zeros(4, 1, dtype=torch.int64)
    out = dmfast.dm_loss(logits, tokens, objective=objective, max_weight=1.5, **inputs)
    assert out.weight.tolist() == pytest.approx([1.5, 1.0, -1.5, 0.0])
    assert int(out.n_clipped) == 2 and int(out.n_empty) == 1
    assert float(out.loss) == pytest.approx(math.log(2) * (1.5 + 1 - 1.5) / 4)


def test_shift_labels_by_hand() -> None:
    """The labels are those worked out by hand.

    Row 0 has a prompt of two tokens that is padded to three on the left. Row 1 has a full prompt and a shorter
    continuation.
    """
    pad = 9
    ids = torch.tensor([[pad, 1, 2, 3, 4, 5], [6, 7, 8, 1, 2, pad]])
    score = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]).bool()
    expected = [[-100, -100, 3, 4, 5, -100], [-100, -100, 1, 2, -100, -100]]
    assert dmfast.shift_labels(ids, score, prompt_len=3).tolist() == expected
    assert dmfast.shift_labels(ids, score.long()).tolist() == expected
    assert dmfast.shift_labels(ids.int(), score).dtype == torch.int64
    assert dmfast.shift_labels(ids, prompt_len=3).tolist() == [[-100, -100, 3, 4, 5, -100], [-100, -100, 1, 2, 9, -100]]
    everything = [[1, 2, 3, 4, 5, -100], [7, 8, 1, 2, 9, -100]]
    assert dmfast.shift_labels(ids).tolist() == everything
    assert dmfast.shift_labels(ids, prompt_len=1).tolist() == everything
    assert dmfast.shift_labels(ids, prompt_len=6).tolist() == [[-100] * 6] * 2
    assert dmfast.shift_labels(ids[:, :1]).tolist() == [[-100]] * 2
    assert dmfast.shift_labels(ids[:, :0]).shape == (2, 0) and dmfast.shift_labels(ids[:0]).shape == (0, 6)
    assert ids.tolist() == [[pad, 1, 2, 3, 4, 5], [6, 7, 8, 1, 2, pad]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3),), TypeError, "input_ids must be an integer tensor"),
        ((torch.ones(2, 3, dtype=torch.bool),), TypeError, "input_ids must be an integer tensor"),
        ((torch.ones(3, dtype=torch.int64),), TypeError, "input_ids must be an integer tensor"),
        ((torch.ones(2, 3).long(), torch.ones(2, 4).long()), ValueError, "mask must be bool or integer of shape"),
        ((torch.ones(2, 3).long(), torch.ones(2, 3)), ValueError, "mask must be bool or integer of shape"),
        ((torch.ones(2, 3).long(), None, 4), ValueError, r"prompt_len must be in \[0, 3\]"),
        ((torch.ones(2, 3).long(), None, -1), ValueError, r"prompt_len must be in \[0, 3\]"),
    ],
)
def test_shift_labels_refuses(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dmfast.shift_labels(*arguments)  # type: ignore[arg-type]


def test_packed_is_the_same_as_padded() -> None:
    p = problem(b=3, t=5)
    p.tokens[1, 3:] = p.tokens[2, 1:] = -100
    rows, kept = p.logits.flatten(0, 1), torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 10])
    packed = (rows[kept], p.tokens.flatten()[kept])
    a = p.loss(p.logits)
    b = dmfast.dm_loss(*packed, cu_seqlens=torch.tensor([0, 5, 8, 9]), **p.terms)
    assert torch.equal(a.log_prob, b.log_prob) and torch.equal(a.loss, b.loss)


# --- the oracle against finite differences ----------------------------------------------------------------------

ROWS = [{}, {"temperature": 0.7}, {"softcap": 3.0}, {"temperature": 1.4, "softcap": 5.0}]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_of_sequence_log_prob(packed: bool, rows: dict[str, float]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5).double()
    tokens = torch.tensor([[1, 4, -100], [0, 3, 2]])
    mask = torch.tensor([[True, True, True], [False, True, True]])
    cu_seqlens = torch.tensor([0, 2, 2, 6]) if packed else None
    if packed:
        logits, tokens, mask = logits.flatten(0, 1), tokens.flatten(), mask.flatten()
    assert torch.autograd.gradcheck(
        lambda z: eager.sequence_log_prob(z, tokens, mask, cu_seqlens=cu_seqlens, **rows), leaf(logits)
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "how", [{"objective": "dpg"}, {"objective": "gdc++", "on_policy": True}, {"objective": "js", "on_policy": True}]
)
def test_gradcheck_of_the_loss_with_known_weights(
    how: dict[str, object], reduction: str, rows: dict[str, float]
) -> None:
    p = problem(b=3, t=2, v=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: p.oracle(z, reduction=reduction, **how, **rows).loss, leaf(p.logits))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_of_the_loss_is_that_of_a_constant_weight(name: str) -> None:
    """It agrees with central differences of -(1/B) sum A log pi, where A keeps its value at these logits."""
    p = problem(b=3, t=2, v=4, dtype=torch.float64)
    p.terms |= {"reward": f64(1.0, -2.0, 0.0), "log_base": p.terms["log_proposal"] + 0.3}
    parameters = {"kl_control": {"beta": 0.3}, "reinforce_p": {"log_scale": -5.0}, "alpha": {"alpha": 0.7}}
    objective = Objective(name, **parameters.get(name, {}))
    gradient = p.gradient(objective=objective)
    weight = p.oracle(p.logits, objective=objective).weight

    def frozen(z: Tensor) -> float:
        return -float((weight * eager.sequence_log_prob(z, p.tokens)).mean())

    for i in range(p.logits.numel()):
        step = torch.zeros(p.logits.numel()).double()
        step[i] = 1e-5
        step = step.view_as(p.logits)
        slope = (frozen(p.logits + step) - frozen(p.logits - step)) / 2e-5
        assert float(gradient.flatten()[i]) == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", ["log_target", "log_proposal", "log_z"])
def test_no_gradient_flows_into_the_weights(name: str) -> None:
    p = problem()
    p.terms[name].requires_grad_()
    for call in (p.loss, p.oracle):
        call(leaf(p.logits)).loss.backward()
        assert p.terms[name].grad is None
    out = p.loss(leaf(p.logits))
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in (out.log_prob, out.weight, out.log_ratio, out.log_target_ratio))


def test_oracle_and_functional_have_the_same_signatures() -> None:
    import inspect

    for name in ("dm_loss", "sequence_log_prob"):
        assert inspect.signature(getattr(dmfast, name)) == inspect.signature(getattr(eager, name))


# --- autograd -----------------------------------------------------------------------------------------------------


@inplaces
@known
def test_multiplied_loss(objective: str, inplace: bool) -> None:
    p = problem()
    x = leaf(p.logits)
    (2 * p.loss(x * 1, objective=objective, inplace=inplace).loss).backward()
    close(x.grad, 2 * p.gradient(objective=objective))


@known
def test_two_losses_on_one_tensor(objective: str) -> None:
    p = problem()
    x = leaf(p.logits)
    (p.loss(x, objective=objective).loss + 0.5 * p.loss(x, objective="js").loss).backward()
    close(x.grad, p.gradient(objective=objective) + 0.5 * p.gradient(objective="js"))


@known
@pytest.mark.parametrize("other", ["dm_loss", "sequence_log_prob", "torch"])
def test_logits_that_were_overwritten_cannot_be_used_by_another(other: str, objective: str) -> None:
    """PyTorch raises its own error, whichever of the two runs first."""
    p = problem()
    x = leaf(p.logits) * 1
    second = {
        "dm_loss": lambda: p.loss(x).loss,
        "sequence_log_prob": lambda: dmfast.sequence_log_prob(x, p.tokens).sum(),
        "torch": lambda: x.square().sum().double(),
    }[other]()
    first = p.loss(x, objective=objective, inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (first + second).backward()


@known
def test_two_losses_in_place_on_one_tensor(objective: str) -> None:
    p = problem()
    x = leaf(p.logits) * 1
    first = p.loss(x, objective=objective, inplace=True).loss

    def second_loss() -> None:
        (first + p.loss(x, objective="js", inplace=True).loss).backward()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second_loss()


@known
def test_the_producer_of_overwritten_logits_notices(objective: str) -> None:
    """The backward of exp needs its own output, which is overwritten."""
    p = problem()
    x = leaf(p.logits / 4).exp()
    loss = p.loss(x, objective=objective, inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@known
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_retain_graph(reduction: str, objective: str) -> None:
    p = problem()
    x = leaf(p.logits)
    loss = p.loss(x, objective=objective, reduction=reduction).loss.sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    first_bits = first.clone()
    first.zero_()  # what the first backward returned belongs to its caller
    (second,) = torch.autograd.grad(3 * loss, x, retain_graph=True)
    (third,) = torch.autograd.grad(loss, x)
    if objective != "dpg":  # the first gradient of dpg came from one pass, which rounds once more
        assert torch.equal(third, first_bits)
    close(third, first_bits)
    close(second, 3 * third)


@known
@pytest.mark.parametrize("call", ["dm_loss", "sequence_log_prob"])
def test_in_place_a_second_backward_is_refused(call: str, objective: str) -> None:
    p = problem()
    x = leaf(p.logits) * 1
    if call == "dm_loss":
        loss = p.loss(x, objective=objective, inplace=True).loss
    else:
        loss = dmfast.sequence_log_prob(x, p.tokens, inplace=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@inplaces
@known
def test_backward_twice_without_retain_graph_is_refused(objective: str, inplace: bool) -> None:
    p = problem()
    loss = p.loss(leaf(p.logits) * 1, objective=objective, inplace=inplace).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("call", ["gdc++", "dpg", "sequence_log_prob"])
def test_double_backward_is_refused(call: str) -> None:
    p = problem()
    x = leaf(p.logits)
    scoring = call == "sequence_log_prob"
    loss = dmfast.sequence_log_prob(x, p.tokens).sum() if scoring else p.loss(x, objective=call).loss

    def penalise_the_gradient() -> None:
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + gradient.square().sum()).backward()

    with pytest.raises(RuntimeError, match=r"twice|double|second derivative|once_differentiable"):
        penalise_the_gradient()


@known
def test_reduction_none_is_one_loss_per_sequence(objective: str) -> None:
    p = problem()
    x = leaf(p.logits)
    loss = p.loss(x, objective=objective, reduction="none").loss
    assert loss.shape == (4,)
    close(loss.detach(), p.oracle(p.logits, objective=objective, reduction="none").loss)
    (loss * f64(1, 0, -2, 0.5)).sum().backward()
    close(x.grad, p.gradient(objective=objective, reduction="sum") * f64(1, 0, -2, 0.5)[:, None, None])
    x.grad = None
    p.loss(x, objective=objective, reduction="none").loss[1].backward()
    assert x.grad is not None and not x.grad[[0, 2, 3]].any() and bool(x.grad[1].any())


@inplaces
def test_sequence_log_prob_is_differentiable(inplace: bool) -> None:
    p = problem()
    x, y = leaf(p.logits), leaf(p.logits.double())
    grad = f64(1, 0, -2, 0.5)
    dmfast.sequence_log_prob(x * 1, p.tokens, temperature=0.8, softcap=20.0, inplace=inplace).backward(grad)
    eager.sequence_log_prob(y, p.tokens, temperature=0.8, softcap=20.0).backward(grad)
    close(x.grad, y.grad)


class Tied(nn.Module):
    """Use the weight of an embedding as the output head too."""

    def __init__(self, v: int = 37, d: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(v, d)
        self.layer = nn.Linear(d, d)
        self.head = nn.Linear(d, v, bias=True)
        self.head.weight = self.embedding.weight

    def hidden(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.embedding(ids)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))  # type: ignore[no-any-return]


def parameter_gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@inplaces
@known
@pytest.mark.parametrize("way", ["whole", "sliced", "transposed", "packed", "bf16"])
def test_through_a_tied_head(way: str, objective: str, inplace: bool) -> None:
    """The gradients of all weights equal those through the oracle, also in place on views of the head's output."""
    p = problem()
    model = Tied()
    ids = p.tokens.clamp(min=0)
    if way == "bf16":
        model = model.bfloat16()
    options: dict[str, object] = {"objective": objective, **p.terms}

    def logits() -> Tensor:
        if way == "sliced":
            return model(torch.cat([ids, ids[:, :1]], 1))[:, :-1]
        if way == "transposed":
            return model(ids.t()).transpose(0, 1)
        return model(ids).flatten(0, 1) if way == "packed" else model(ids)

    tokens = p.tokens.flatten() if way == "packed" else p.tokens
    if way == "packed":
        options["cu_seqlens"] = torch.arange(5) * 5
    expected = parameter_gradients(model, eager.dm_loss(logits(), tokens, **options).loss)
    actual = parameter_gradients(model, dmfast.dm_loss(logits(), tokens, inplace=inplace, **options).loss)
    for a, b in zip(actual, expected, strict=True):
        close(a, b, *((1e-4, 1e-6) if way != "bf16" else (3e-2, 3e-3 * float(b.abs().max()))))


@inplaces
@known
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, objective: str, inplace: bool) -> None:
    """The body, the head, or head and loss together are checkpointed, which runs them again in backward."""
    p = problem()
    model = Tied()
    ids = p.tokens.clamp(min=0)
    expected = parameter_gradients(model, p.oracle(model(ids), objective=objective).loss)

    def loss(hidden: Tensor) -> Tensor:
        return p.loss(model.head(hidden), objective=objective, inplace=inplace).loss

    def loss_of_logits(logits: Tensor) -> Tensor:
        return p.loss(logits, objective=objective, inplace=inplace).loss

    hidden = model.hidden(ids)
    for attempt in (
        lambda: loss(checkpoint(model.hidden, ids, use_reentrant=False)),
        lambda: loss_of_logits(checkpoint(model.head, hidden, use_reentrant=use_reentrant)),
        lambda: checkpoint(loss, hidden, use_reentrant=use_reentrant),
    ):
        model.zero_grad()
        attempt().backward(retain_graph=True)
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            close(parameter.grad, gradient, 1e-4, 1e-6)


@inplaces
@known
def test_saved_tensor_hooks(objective: str, inplace: bool) -> None:
    p = problem()
    for context in (
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone),
    ):
        x = leaf(p.logits)
        with context:
            loss = p.loss(x * 1, objective=objective, inplace=inplace).loss
        loss.backward()
        close(x.grad, p.gradient(objective=objective))


@inplaces
@known
@pytest.mark.parametrize("announced", [False, True])
def test_grad_scaler_with_fp16_logits(announced: bool, objective: str, inplace: bool) -> None:
    """What fp16 would lose without a scaler is kept, and the gradient is the oracle's, rounded once."""
    p = problem()
    weight = nn.Parameter(p.logits.clone())
    optimiser = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    half = weight.half()
    options = {"objective": objective, "num_sequences": 4000.0}
    scale = scaler.get_scale() if announced else None
    loss = p.loss(half, inplace=inplace, grad_scale=scale, **options).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimiser)
    exact = Problem(p.logits.half(), p.tokens, p.terms).gradient(**options)
    assert float(exact.abs()[exact != 0].min()) < 2.0**-24
    close(weight.grad, exact, 2.0**-11 + 1e-5, 2.0**-25 / 2.0**16)
    scaler.step(optimiser)
    scaler.update()
    assert scaler.get_scale() == 2.0**16 and not torch.equal(weight.detach(), p.logits)


@inplaces
@known
def test_autocast(objective: str, inplace: bool) -> None:
    """Inside a bf16 region the head gives bf16 logits; the loss is what it is outside, and fp64."""
    p = problem()
    model = Tied()
    ids = p.tokens.clamp(min=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids)
        assert logits.dtype == torch.bfloat16
        stored = logits.detach().clone()
        out = p.loss(logits, objective=objective, inplace=inplace)
    truth = p.oracle(stored.double(), objective=objective)
    assert out.loss.dtype == out.log_prob.dtype == torch.float64
    close(out.log_prob, truth.log_prob, 0, 5e-6)
    out.loss.backward()
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        oracle = p.oracle(stored.double(), objective=objective)
    assert torch.equal(oracle.log_prob, truth.log_prob)


@known
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode(context: Callable[[], torch.no_grad], objective: str) -> None:
    """The numbers are the same, there is no graph, and inplace=True does not change the logits, not even leaves."""
    p = problem()
    x = leaf(p.logits)
    with_grad = p.loss(x, objective=objective)
    with context():
        for z in (x, x * 1, p.logits.clone()):
            out = p.loss(z, objective=objective, inplace=True)
            log_pi = dmfast.sequence_log_prob(z, p.tokens, inplace=True)
            assert not out.loss.requires_grad and not log_pi.requires_grad
            assert torch.equal(z, p.logits)
            assert torch.equal(out.loss, with_grad.loss) and torch.equal(out.log_prob, with_grad.log_prob)
            assert torch.equal(out.log_prob, log_pi) and torch.equal(out.weight, with_grad.weight)


@known
def test_logits_that_need_no_gradient(objective: str) -> None:
    """There is no graph, nothing is overwritten, and the loss is a constant in the gradients of other tensors."""
    p = problem()
    z = p.logits.clone()
    out = p.loss(z, objective=objective, inplace=True)
    assert not out.loss.requires_grad and torch.equal(z, p.logits)
    other = torch.ones((), dtype=torch.float64, requires_grad=True)
    (out.loss * other).backward()
    close(other.grad, out.loss)


def test_in_place_needs_memory_of_its_own() -> None:
    p = problem()
    with pytest.raises(ValueError, match="leaf"):
        p.loss(leaf(p.logits), inplace=True)
    with pytest.raises(ValueError, match="leaf"):
        dmfast.sequence_log_prob(leaf(p.logits), p.tokens, inplace=True)
    row = leaf(p.logits[:1]) * 1
    for expanded in (row.expand(4, 5, 37), (row[:, :1] * 1).expand(1, 5, 37)):
        with pytest.raises(ValueError, match="share memory"):
            dmfast.sequence_log_prob(expanded, p.tokens[: len(expanded)], inplace=True)
    windows = (leaf(torch.randn(100)) * 1).as_strided((2, 3, 7), (20, 5, 1))
    with pytest.raises(ValueError, match="share memory"):
        dmfast.sequence_log_prob(windows, torch.zeros(2, 3, dtype=torch.int64), inplace=True)
    assert torch.isfinite(dmfast.sequence_log_prob(row.expand(4, 5, 37), p.tokens)).all()


@pytest.mark.parametrize("view", [lambda x: x[:, :-1], lambda x: x.view(4, 5, 37), lambda x: x.transpose(0, 1)[:5]])
def test_in_place_on_a_view_of_a_leaf_is_refused(view: Callable[[Tensor], Tensor]) -> None:
    """Overwriting this tensor would overwrite a parameter. PyTorch refuses that too."""
    x = leaf(torch.randn(4, 5, 37))
    before = x.detach().clone()
    logits = view(x)
    tokens = torch.zeros(logits.shape[:2], dtype=torch.int64)
    with pytest.raises((ValueError, RuntimeError), match="leaf"):
        dmfast.sequence_log_prob(logits, tokens, inplace=True).sum().backward()
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("cut", [[6], [3, 3], [1, 2, 3], [1] * 6, [4, 0, 2]])
@inplaces
@known
def test_microbatches_add_up(objective: str, inplace: bool, cut: list[int]) -> None:
    """With num_sequences any cut of the step gives the step's gradient and loss."""
    p = problem(b=6)
    whole, parts = leaf(p.logits), leaf(p.logits)
    loss = p.loss(whole, objective=objective).loss
    loss.backward()
    total = 0.0
    pieces = zip(parts.split(cut), p.tokens.split(cut), *(x.split(cut) for x in p.terms.values()), strict=True)
    for z, y, *values in pieces:
        terms = dict(zip(p.terms, values, strict=True))
        out = dmfast.dm_loss(z * 1, y, objective=objective, num_sequences=6, inplace=inplace, **terms)
        out.loss.backward()
        total += float(out.loss)
    assert total == pytest.approx(float(loss), rel=1e-12)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=0)


def test_what_the_output_holds() -> None:
    p = problem()
    out = p.loss(leaf(p.logits))
    assert out.check() is out and out.entropy is None
    assert out.scored.dtype == torch.bool and out.n_clipped.dtype == out.n_empty.dtype == torch.int64
    for name, value in p.terms.items():
        assert torch.equal(getattr(out, name), value)
    single = {k: v.float() for k, v in p.terms.items()}
    assert dmfast.dm_loss(p.logits, p.tokens, **single).weight.dtype == torch.float64
    out = p.loss(p.logits, log_proposal=None, objective=lambda t: torch.ones(4).double())
    assert out.log_ratio is None and out.log_target_ratio is None and out.log_proposal is None


@known
@pytest.mark.parametrize("name", ["tokens", "mask", "cu_seqlens", "log_target", "log_proposal", "log_z", "weight"])
def test_inputs_changed_between_forward_and_backward(name: str, objective: str) -> None:
    """The gradient is right all the same, or there is an error like PyTorch's for a saved tensor."""
    p = problem()
    expected = p.gradient(objective=objective).flatten(0, 1)
    given = {"tokens": p.tokens.flatten(), "cu_seqlens": torch.arange(5) * 5, **p.terms}
    if name == "mask":
        given["mask"] = torch.ones(20, dtype=torch.bool)
    given = {k: v.clone() for k, v in given.items()}
    x = leaf(p.logits.flatten(0, 1))
    out = dmfast.dm_loss(x, objective=objective, **given)  # type: ignore[arg-type]
    (out.weight if name == "weight" else given[name]).zero_()
    error = ""
    try:
        out.loss.backward()
    except RuntimeError as raised:
        error = str(raised)
    if error:
        assert "modified by an inplace operation" in error
    else:
        close(x.grad, expected)


def test_under_another_default_device(tmp_path: Path) -> None:
    """``with torch.device(...)`` says where new tensors go, and not where the logits are.

    A kernel that got the address of a tensor elsewhere would take the process down, so this runs in a process of its
    own.
    """
    code = f"""
import torch, dmfast
assert dmfast.backends()["cpu"].available == {kernels.backends()["cpu"].available}
logits, tokens = torch.randn(2, 3, 7, requires_grad=True), torch.randint(7, (2, 3))
terms = {{"log_target": torch.zeros(2) - 6, "log_proposal": torch.zeros(2) - 6, "log_z": 0.1}}
before = [dmfast.dm_loss(logits, tokens, objective=o, return_entropy=True, **terms).loss for o in ("gdc++", "dpg")]
with torch.device("meta"):
    after = [dmfast.dm_loss(logits, tokens, objective=o, return_entropy=True, **terms).loss for o in ("gdc++", "dpg")]
    sum(after).backward()
    dmfast.sequence_log_prob(logits, tokens).sum().backward()
    dmfast.shift_labels(tokens)
assert all(map(torch.equal, before, after)) and logits.grad.device.type == "cpu"
"""
    # The process does not run in a source tree, whose dmfast may lack the kernels.
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-500:]


@known
def test_threads_of_the_caller(objective: str) -> None:
    """Kernels release the GIL, and calls at the same time do not disturb one another."""

    problems = [problem(b=4, t=20, v=2000, seed=seed) for seed in range(6)]

    def work(p: Problem) -> list[Tensor]:
        x = leaf(p.logits)
        out = p.loss(x * 1, objective=objective, inplace=True)
        out.loss.backward()
        assert x.grad is not None
        return [out.loss.detach(), out.log_prob, x.grad]

    alone = [work(p) for p in problems]
    with ThreadPoolExecutor(3) as pool:
        for found, expected in zip(pool.map(work, problems), alone, strict=True):
            assert all(map(torch.equal, found, expected))


def test_num_sequences_as_a_tensor() -> None:
    p = problem()
    for objective in ("gdc++", "dpg"):
        x, y = leaf(p.logits), leaf(p.logits)
        a = p.loss(x, objective=objective, num_sequences=torch.tensor(9)).loss
        b = p.loss(y, objective=objective, num_sequences=9).loss
        a.backward()
        b.backward()
        assert torch.equal(a, b) and torch.equal(x.grad, y.grad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_sequences must be a number or a 0-d tensor, got"):
        p.loss(p.logits, num_sequences=torch.ones(2))


@pytest.mark.parametrize("how", ["logits", "hidden", "packed", "eager"])
def test_token_log_prob(how: str) -> None:
    """token_log_prob has log pi of each scored token and 0 elsewhere, without gradient. Its sum is log pi(x)."""
    p = problem()
    mask = torch.rand(4, 5) < 0.7
    scored = mask & (p.tokens != -100)
    x = leaf(p.logits)
    given = {"tokens": p.tokens, "mask": mask, **p.terms}
    if how == "hidden":  # the head is the identity, so it gives the logits
        out = dmfast.linear_dm_loss(x, torch.eye(37), **given)  # type: ignore[arg-type]
    elif how == "packed":
        rows = {"tokens": p.tokens.flatten(), "mask": mask.flatten(), "cu_seqlens": torch.arange(5) * 5}
        out = dmfast.dm_loss(x.flatten(0, 1), **{**given, **rows})  # type: ignore[arg-type]
    else:
        out = (eager if how == "eager" else dmfast).dm_loss(x, **given)  # type: ignore[arg-type]
    found = out.token_log_prob
    expected = p.logits.double().log_softmax(-1).gather(-1, p.tokens.clamp(min=0)[..., None])[..., 0]
    assert found.shape == (p.tokens.flatten() if how == "packed" else p.tokens).shape and not found.requires_grad
    close(found.view(4, 5), torch.where(scored, expected, 0.0), rtol=0, atol=1e-5)
    assert bool((found.view(4, 5)[~scored] == 0).all())
    close(found.view(4, 5).sum(1), out.log_prob, rtol=1e-12)


@inplaces
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gradient_that_overflowed_times_zero_is_zero(inplace: bool, dtype: torch.dtype) -> None:
    """The result is that of two passes. An infinite gradient of one pass times 0 would be NaN."""
    p = problem(dtype=dtype)
    x = leaf(p.logits)
    out = p.loss(x * 1, objective="dpg", inplace=inplace, grad_scale=1e30, log_proposal=p.terms["log_target"] - 30)
    (gradient,) = torch.autograd.grad(out.loss, x, torch.zeros((), dtype=torch.float64))
    assert bool((gradient == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_grad_output_than_the_announced_one(dtype: torch.dtype) -> None:
    """A gradient that overflows with the announced grad_output is right with the one that comes."""
    p = problem(dtype=dtype)
    a, b = leaf(p.logits), leaf(p.logits)
    options = {"objective": "dpg", "log_proposal": p.terms["log_target"] - math.log(4)}
    one = p.loss(a, grad_scale=65536.0, **options).loss
    two = p.loss(b, **options).loss
    for loss in (one, two):
        (2.0 * loss).backward()
    assert a.grad is not None and bool(a.grad.isfinite().all())
    close(a.grad, b.grad, rtol=2e-3 if dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize("name", ["dm_loss", "linear_dm_loss", "linear_sequence_log_prob"])
def test_the_warning_of_the_slow_backend_names_the_callers_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning must name the caller's line. That of the linear losses once named one of torch's files."""
    monkeypatch.setattr(kernels, "_warned", set())
    p = problem(dtype=torch.float64)
    terms = {} if name == "linear_sequence_log_prob" else p.terms
    head = () if name == "dm_loss" else (torch.eye(37).double(),)
    with pytest.warns(UserWarning, match="slow eager backend") as caught:
        getattr(dmfast, name)(p.logits, *head, p.tokens, **terms)
    assert [warning.filename for warning in caught] == [__file__]


def test_asking_for_backends_makes_no_context_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that does not use a GPU asks for what is known without a context on one."""
    asked: list[int] = []
    module = SimpleNamespace(device_type="cuda", why_not=lambda device: asked.append(device) or "")
    monkeypatch.setattr(extension, "_C", SimpleNamespace(cuda=module, instruction_set=lambda: "none"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    cuda.why_not_on.cache_clear()
    assert dmfast.backends()["cuda"].available
    with use_backend("cuda"):
        pass
    assert set(asked) == {-1}
    cuda.why_not_on.cache_clear()


# --- objectives of one's own --------------------------------------------------------------------------------------


def own_gdc(terms: Terms) -> Tensor:
    """Return the weights of gdc++ as an objective of the user's own would."""
    assert terms.log_target_ratio is not None and terms.log_ratio is not None
    return terms.log_target_ratio.exp() - terms.log_ratio.exp()


@inplaces
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_objective_of_ones_own(reduction: str, inplace: bool) -> None:
    p = problem()
    options = {"reduction": reduction, "temperature": 0.9, "return_entropy": True, "max_weight": 0.5}
    x, y = leaf(p.logits), leaf(p.logits)
    a = p.loss(x * 1, objective=own_gdc, inplace=inplace, **options)
    b = p.loss(y, objective="gdc++", **options)
    for name in ("loss", "log_prob", "weight", "entropy", "log_ratio", "log_target_ratio"):
        close(getattr(a, name).detach(), getattr(b, name).detach(), 1e-12, 1e-12)
    assert int(a.n_clipped) == int(b.n_clipped) > 0
    grad = f64(1, 2, 3, 4) if reduction == "none" else None
    a.loss.backward(grad)
    b.loss.backward(grad)
    close(x.grad, y.grad, 1e-6, 0)


def test_what_an_objective_of_ones_own_is_given() -> None:
    p = problem()
    seen: list[Terms] = []

    def look(terms: Terms) -> Tensor:
        seen.append(terms)
        return torch.ones(4).double()

    p.loss(leaf(p.logits), objective=look, reward=f64(1, 2, 3, 4)).loss.backward()
    (terms,) = seen
    assert terms.log_prob is not None and not terms.log_prob.requires_grad and terms.log_prob.dtype == torch.float64
    assert terms.reward is not None and terms.reward.tolist() == [1, 2, 3, 4] and terms.log_base is None


@pytest.mark.parametrize("weight", [torch.ones(4), torch.ones(3).double(), torch.ones(4, 1).double(), 1.0])
def test_an_objective_of_ones_own_must_return_weights(weight: object) -> None:
    p = problem()
    with pytest.raises(ValueError, match=r"must return float64 weights \(4,\)"):
        p.loss(p.logits, objective=lambda _: weight)


# --- backends -----------------------------------------------------------------------------------------------------


def test_backends() -> None:
    found = dmfast.backends()
    assert list(found) == ["cpu", "cuda", "triton", "eager"] and all(x.detail for x in found.values())
    assert found["cpu"].in_use and found["eager"].available
    if not found["cuda"].available:
        with pytest.raises(RuntimeError, match=r"'cuda' is not available here: .*"), use_backend("cuda"):
            pass
    with (
        pytest.raises(ValueError, match="unknown backend 'cuda2'; there are cpu, cuda, triton, eager"),
        use_backend("cuda2"),
    ):
        pass


def test_use_backend() -> None:
    """The eager backend gives the oracle's bits. After the block or an error in it, the backend from before is back."""
    p = problem()
    plain = p.loss(p.logits).log_prob
    truth = p.oracle(p.logits)
    assert not torch.equal(plain, truth.log_prob)
    with use_backend("eager"):
        out = p.loss(p.logits)
        assert torch.equal(out.loss, truth.loss) and torch.equal(out.log_prob, truth.log_prob)
        assert torch.equal(dmfast.sequence_log_prob(p.logits, p.tokens), truth.log_prob)
        with use_backend("cpu"):
            assert torch.equal(p.loss(p.logits).log_prob, plain)
        assert torch.equal(p.loss(p.logits).log_prob, truth.log_prob)
    assert torch.equal(p.loss(p.logits).log_prob, plain)
    with pytest.raises(KeyError), use_backend("eager"):
        raise KeyError
    assert torch.equal(p.loss(p.logits).log_prob, plain)


def test_fp64_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such calls go to eager with one warning in all, at the caller's line. If cpu was forced, they are an error."""
    monkeypatch.setattr(kernels, "_warned", set())
    p = problem(dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            out = p.loss(leaf(p.logits))
            dmfast.sequence_log_prob(p.logits, p.tokens)
    (warning,) = caught
    assert "slow eager backend: logits are torch.float64" in str(warning.message) and warning.filename == __file__
    assert torch.equal(out.loss, p.oracle(p.logits).loss)
    out.loss.backward()
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' was forced, but logits are .*float64"):
        p.loss(p.logits)
    with warnings.catch_warnings(), use_backend("eager"):
        warnings.simplefilter("error")
        p.loss(p.logits)


@pytest.mark.parametrize(("forced", "says"), [("cpu", ""), ("eager", ""), ("cuda", "is not available here"),
                                              ("gpu", "there are only cpu, cuda, triton, eager")])  # fmt: skip
def test_backends_where_one_is_forced(monkeypatch: pytest.MonkeyPatch, forced: str, says: str) -> None:
    """DMFAST_BACKEND may name a backend that can't run. Nothing is in use then, and the others say why."""
    if forced == "cuda" and dmfast.backends()["cuda"].available:
        pytest.skip("cuda is available")
    monkeypatch.setattr(kernels, "forced", forced)
    found = dmfast.backends()
    assert [name for name, info in found.items() if info.in_use] == ([] if says else [forced])
    for info in found.values():
        assert info.in_use or info.detail.startswith(f"{forced!r} is forced")
        assert info.in_use or says in info.detail
    if says:
        with pytest.raises((ValueError, RuntimeError), match=forced):
            problem().loss(problem().logits)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager takes over with one warning, and backends() says why."""
    monkeypatch.setattr(extension, "_C", None)
    monkeypatch.setattr(kernels, "CPU_ALONE", False)
    monkeypatch.setattr(kernels, "_warned", set())
    p = problem()
    info = dmfast.backends()["cpu"]
    assert not info.available and "DMFAST_BUILD" in info.detail
    with pytest.warns(UserWarning, match="without its compiled kernels"):
        out = p.loss(p.logits)
    assert torch.equal(out.loss, p.oracle(p.logits).loss)
    with pytest.raises(RuntimeError, match="not available here"), use_backend("cpu"):
        pass


# --- torch.library and torch.compile -----------------------------------------------------------------------------


@pytest.mark.parametrize(("entropy", "packed"), [(False, True), (True, False)])
def test_opcheck(entropy: bool, packed: bool) -> None:
    p = problem(b=3, t=4, v=11)
    logits, tokens, cu_seqlens = p.logits, p.tokens, None
    if packed:
        logits, tokens, cu_seqlens = logits.flatten(0, 1), tokens.flatten(), torch.tensor([0, 4, 4, 12])
    batch = checks.make_batch(logits, tokens, None, cu_seqlens, 0.8, 5.0)
    token_weight = torch.randn(batch.n_rows).double() if packed else None
    rows = (batch.labels, batch.cu_seqlens, token_weight, batch.scale, batch.softcap)
    name = kernels.select(logits).name

    def flat(objective: str, **options: object) -> tuple[object, ...]:
        names = ("context_id", "log_proposal", "log_target", "log_z", "reward", "log_base", "max_weight")
        given = {**dict.fromkeys(names), **p.terms, "on_policy": False, **options}
        return (name, *ops.flat_terms(checks.make_terms(batch, objective, **given)))  # type: ignore[arg-type]

    for requires_grad in (False, True):
        z = logits.clone().requires_grad_(requires_grad)
        bonus = {"entropy_coefficient": 0.7 * entropy}
        torch.library.opcheck(ops.score, (z, *rows, entropy, name, entropy))
        torch.library.opcheck(ops.score_and_weigh, (z, *rows, entropy, *flat("gdc++", max_weight=0.5, **bonus)))
        torch.library.opcheck(ops.score_and_grad, (z, *rows, entropy, *flat("dpg", **bonus), 2.0, 3.0))
    scores = kernels.select(batch.logits).forward(batch, None, True)
    lse, weight = scores.lse, f64(1.0, -0.5, 0.0)
    of_bonus = (scores.rows[2], f64(0.0, 2.0, 0.0)) if entropy else (None, None)
    torch.library.opcheck(ops.grad, (logits, *rows, lse, weight, name, *of_bonus))
    torch.library.opcheck(ops.grad_, (logits.clone(), *rows, lse, weight, name, *of_bonus))
    torch.library.opcheck(check_ops._logits, (logits, *rows))
    torch.library.opcheck(check_ops._draws, (logits.flatten(0, -2), None))
    torch.library.opcheck(check_ops._labels, (lse.clone().requires_grad_(), logits, *rows))
    block = torch.stack([p.terms[name] for name in ("log_proposal", "log_target", "log_z")])
    scalars = [0.0, 0.0, 0.0, *[0.0] * 6]
    torch.library.opcheck(check_ops._terms, (batch.labels, block, 7, 7, scalars, "js", False))
    torch.library.opcheck(check_ops._weight, (weight, 0))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def step(function: Callable[..., Tensor], *arguments: Tensor) -> list[Tensor]:
    """Return the loss and the gradients of the arguments."""
    inputs = [leaf(x) for x in arguments]
    loss = function(*inputs)
    loss.backward()
    return [loss.detach(), *(x.grad for x in inputs if x.grad is not None)]


def same_when_compiled(function: Callable[..., Tensor], *arguments: Tensor, **options: object) -> None:
    expected = step(function, *arguments)
    actual = step(torch.compile(function, fullgraph=True, **options), *arguments)  # type: ignore[call-overload]
    assert len(actual) == len(expected) == 1 + len(arguments)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


TOKEN_WEIGHT = torch.linspace(-1.0, 2.0, 20).view(4, 5)
COMPILED: dict[str, dict[str, object]] = {
    "gdc++": {},
    "gdc++ in place": {"inplace": True},
    "dpg": {"objective": "dpg", "return_entropy": True},
    "dpg in place": {"objective": "dpg", "inplace": True},
    "known on-policy, scaled": {"objective": "js", "on_policy": True, "grad_scale": 4.0, "num_sequences": 9},
    "none": {"reduction": "none", "softcap": 9.0, "token_weight": TOKEN_WEIGHT},
    "own": {"objective": own_gdc, "temperature": 0.7},
    "own in place": {"objective": own_gdc, "inplace": True, "return_entropy": True},
    "bonus": {"entropy_coefficient": 0.4, "reduction": "none"},
    "dpg, bonus": {"objective": "dpg", "entropy_coefficient": 0.4, "token_weight": TOKEN_WEIGHT},
    "own in place, bonus": {
        "objective": own_gdc,
        "inplace": True,
        "entropy_coefficient": 0.4,
        "token_weight": TOKEN_WEIGHT,
    },
    "baseline": {"objective": Objective("reverse_kl", baseline=0.3, normalize=False), "max_weight": 1.0},
    "ppo": {"objective": PPOClip(0.3), "reward": f64(0.3, -1.0, 0.5, 2.0)},
    "leave_one_out": {"objective": Objective("dpg", baseline="leave_one_out")},
    "float log_z": {"log_z": 0.2},
    "alpha": {"objective": Objective("alpha", alpha=0.4, max_return=0.5, baseline=0.1)},
    "alpha, known": {
        "objective": Objective("alpha", alpha=0.4, max_return=0.5, normalize_alpha=False, baseline="leave_one_out"),
        "on_policy": True,
    },
}


def assert_one_graph(name: str, backend: str) -> None:
    """There is no graph break, and loss, gradients and every result are as without torch.compile."""
    p = problem()
    torch.manual_seed(1)
    hidden, weight = torch.randn(4, 5, 8), torch.randn(37, 8)
    mask = torch.rand(4, 5) < 0.8

    def function(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        out = dmfast.dm_loss(hidden @ weight.t(), p.tokens, mask, **{**p.terms, **COMPILED[name]})  # type: ignore[arg-type]
        results = (out.log_prob, out.log_ratio, out.log_target_ratio, out.weight, out.n_clipped, out.n_empty)
        return ((out.loss * torch.arange(1.0, 5.0)).sum() if out.loss.dim() else out.loss, *results)  # type: ignore[return-value]

    found = []
    for call in (function, torch.compile(function, fullgraph=True, backend=backend)):
        h, w = leaf(hidden), leaf(weight)
        loss, *results = call(h, w)
        loss.backward()
        found.append([loss.detach(), h.grad, w.grad, *results])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_loss(name: str) -> None:
    """The ops are opaque to inductor, which differs in how it reuses memory. A few cases show that; each takes g++."""
    by_inductor = name in ("none", "gdc++ in place", "own in place, bonus")
    assert_one_graph(name, "inductor" if by_inductor else "aot_eager")


@pytest.mark.parametrize("name", ["gdc++", "none", "own in place, bonus", "leave_one_out", "alpha, known"])
def test_compiled_loss_on_the_eager_backend(name: str) -> None:
    with use_backend("eager"):
        assert_one_graph(name, "aot_eager")


def test_the_warning_of_the_eager_backend_does_not_break_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_warned", set())
    p = problem()
    compiled = torch.compile(lambda z: p.loss(z).loss, fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="slow eager backend: logits are torch.float64") as caught:
        loss = compiled(leaf(p.logits.double()))
    assert len(caught) == 1
    close(loss, p.loss(leaf(p.logits.double())).loss)


@known
def test_compiled_without_grad_mode(objective: str) -> None:
    p = problem()
    compiled = torch.compile(lambda z: p.loss(z, objective=objective, inplace=True).loss, fullgraph=True)
    x = leaf(p.logits)
    with torch.no_grad():
        loss = compiled(x)
    assert not loss.requires_grad and torch.equal(x, p.logits)
    torch.testing.assert_close(loss, p.loss(p.logits, objective=objective).loss, rtol=1e-12, atol=0)


@inplaces
def test_compiled_sequence_log_prob_packed(inplace: bool) -> None:
    p = problem()
    cu_seqlens = torch.tensor([0, 3, 3, 20])

    def function(x: Tensor) -> Tensor:
        log_pi = dmfast.sequence_log_prob(x * 1, p.tokens.flatten(), cu_seqlens=cu_seqlens, inplace=inplace)
        return (log_pi * f64(1.0, 5.0, -2.0)).sum()

    same_when_compiled(function, p.logits.flatten(0, 1))


@inplaces
def test_compiled_packed_loss(inplace: bool) -> None:
    p = problem(b=3, t=4)
    cu_seqlens = torch.tensor([0, 4, 4, 12], dtype=torch.int32)
    same_when_compiled(
        lambda x: (
            dmfast.dm_loss(
                2 * x, p.tokens.flatten(), cu_seqlens=cu_seqlens, objective="dpg", inplace=inplace, **p.terms
            ).loss
        ),
        p.logits.flatten(0, 1),
    )


@known
def test_compiled_dynamic_shapes(objective: str) -> None:
    """One graph serves all lengths, and other batch sizes are right too."""

    def function(z: Tensor, tokens: Tensor, log_target: Tensor, log_proposal: Tensor, log_z: Tensor) -> Tensor:
        terms = {"log_target": log_target, "log_proposal": log_proposal, "log_z": log_z}
        return dmfast.dm_loss(z, tokens, objective=objective, **terms).loss

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for b, t in ((4, 5), (4, 9), (4, 2), (6, 3)):
        p = problem(b, t)
        x, y = leaf(p.logits), leaf(p.logits)
        for z, call in ((x, function), (y, compiled)):
            call(z, p.tokens, *p.terms.values()).backward()
        torch.testing.assert_close(y.grad, x.grad, rtol=1e-6, atol=1e-8)
        assert b != 4 or torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@known
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiled_in_place_on_a_graph_input(backend: str, objective: str) -> None:
    """With logits from outside the graph, gradients are right, and others that need the overwritten logits fail."""
    p = problem()
    compiled = torch.compile(
        lambda z: p.loss(z, objective=objective, inplace=True).loss, fullgraph=True, backend=backend
    )
    x = leaf(p.logits)
    compiled(x * 1).backward()
    close(x.grad, p.gradient(objective=objective))
    y = leaf(p.logits / 4).exp()  # exp's backward needs y
    loss = compiled(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@known
def test_compiled_in_place_on_a_view_of_a_leaf_leaves_it_alone(objective: str) -> None:
    """It may be refused as without torch.compile, but the leaf must not be overwritten silently."""
    p = problem()
    x = leaf(torch.cat([p.logits, p.logits[:, :1]], 1))
    before = x.detach().clone()
    compiled = torch.compile(
        lambda z: p.loss(z[:, :-1], objective=objective, inplace=True).loss, fullgraph=True, backend="aot_eager"
    )
    with contextlib.suppress(ValueError, RuntimeError):
        compiled(x).backward()
    assert torch.equal(x.detach(), before)


LINEAR: dict[str, dict[str, object]] = {
    "two phases": {"reduction": "none"},
    "one pass": {},
    "known": {"objective": "dpg", "grad_scale": 3.0},
    "own": {"objective": own_gdc},
    "chunks": {"chunk_bytes": 3 * 37 * 4, "return_entropy": True},
    "frozen head": {"frozen": True},
    "two phases, bonus": {"reduction": "none", "entropy_coefficient": 0.4},
    "own, bonus": {"objective": own_gdc, "entropy_coefficient": 0.4},
}


def linear_step(name: str) -> Callable[..., tuple[Tensor, ...]]:
    p = problem()
    mask = torch.rand(4, 5) < 0.8
    options = {k: v for k, v in LINEAR[name].items() if k != "frozen"}

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        out = dmfast.linear_dm_loss(hidden * 1.0, weight, p.tokens, mask, bias=bias, **{**p.terms, **options})  # type: ignore[arg-type]
        log_pi = dmfast.linear_sequence_log_prob(hidden, weight, p.tokens, mask, bias=bias)
        loss = 3.0 * out.loss.sum() + log_pi.sum() / 7
        return loss, out.log_prob, out.weight, out.token_log_prob, *([] if out.entropy is None else [out.entropy])

    return function


@pytest.mark.parametrize("name", LINEAR)
def test_the_losses_on_hidden_states_compile(name: str) -> None:
    """It is one op without a graph break, with the loss, the results and the gradients that are wanted."""
    torch.manual_seed(1)
    inputs = [torch.randn(4, 5, 8), torch.randn(37, 8), torch.randn(37)]
    function, found = linear_step(name), []
    backend = "inductor" if name in ("own", "two phases, bonus") else "aot_eager"
    for call in (function, torch.compile(function, fullgraph=True, backend=backend)):
        leaves = [leaf(x) for x in inputs]
        if name == "frozen head":
            leaves[1] = inputs[1].clone()
        loss, *results = call(*leaves)
        loss.backward()
        found.append([loss.detach(), *results, *[x.grad for x in leaves if x.requires_grad]])
    # a function's weights take three products in a plain call and four in a graph, which round fp32 differently
    rtol = 5e-5 if name.startswith("own") else 1e-6
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("layout", ["row-major", "transposed"])
@pytest.mark.parametrize("name", ["one pass", "two phases"])
def test_hidden_states_of_any_layout_compile(name: str, layout: str) -> None:
    """The gradient must have the strides that the fake kernel announces, and not those of hidden."""
    torch.manual_seed(1)
    p = problem(b=4, t=5)
    x = torch.randn(8, 20) if layout == "transposed" else torch.randn(20, 8)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        hidden = x.t() if layout == "transposed" else x
        options = {**p.terms, **LINEAR[name]}
        return (
            3.0
            * dmfast.linear_dm_loss(
                hidden, weight, p.tokens.flatten(), cu_seqlens=torch.arange(5) * 5, **options
            ).loss.sum()
        )  # type: ignore[arg-type]

    same_when_compiled(function, x, torch.randn(37, 8), backend="inductor")


@pytest.mark.parametrize("objective", ["dpg", own_gdc])
def test_compiled_messages_name_what_the_plain_call_names(objective: object) -> None:
    """The bad values are a constant that is not allowed, and an infinite return behind a leave-one-out baseline."""
    p = problem()
    for backend in ("cpu", "eager"):
        with use_backend(backend):
            compiled = torch.compile(
                lambda z: p.loss(z, objective=objective, log_z=math.inf).loss, fullgraph=True, backend="aot_eager"
            )
            with pytest.raises(ValueError, match="log_z holds inf at sequence 0"):
                compiled(leaf(p.logits))
            torch._dynamo.reset()
    p.terms["log_proposal"][2] = -1e4
    loo = Objective("dpg", baseline="leave_one_out")
    compiled = torch.compile(lambda z: p.loss(z, objective=loo).loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="the return of sequence 2 is inf, over which leave-one-out baselines average"):
        compiled(leaf(p.logits))


def test_a_whole_training_step_compiles() -> None:
    """Backbone, head, loss and in-graph results compile to two graphs at most, over lengths and batch sizes."""
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Embedding(37, 8), torch.nn.Linear(8, 8), torch.nn.Tanh())
    head = torch.nn.Linear(8, 37)

    def function(tokens: Tensor, log_target: Tensor, log_proposal: Tensor, log_z: Tensor) -> Tensor:
        labels = dmfast.shift_labels(tokens)
        terms = {"log_target": log_target, "log_proposal": log_proposal, "log_z": log_z}
        return dmfast.linear_dm_loss(backbone(tokens), head.weight, labels, bias=head.bias, **terms).loss

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for b, t in ((4, 5), (3, 9), (6, 7)):
        tokens = torch.randint(37, (b, t))
        terms = torch.randn(2, b).double() - 3.6 * t
        grads = []
        for call in (function, compiled):
            head.zero_grad()
            backbone.zero_grad()
            call(tokens, terms[0], terms[1], torch.tensor(0.2)).backward()
            grads.append([x.grad.clone() for x in (*backbone.parameters(), *head.parameters())])  # type: ignore[union-attr]
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize(
    ("objective", "inplace", "count"),
    [("gdc++", False, "tensor"), ("gdc++", True, "own"), ("dpg", False, "own"), ("dpg", True, "tensor")],
)
def test_no_graph_for_every_length_and_batch_size(objective: str, inplace: bool, count: str) -> None:
    """A second length in place must not be "unsupported", and a mean over B must not compile anew for every B."""

    def function(z: Tensor, tokens: Tensor, number: Tensor, *terms: Tensor) -> Tensor:
        named = dict(zip(("log_target", "log_proposal", "log_z"), terms, strict=True))
        given = None if count == "own" else number
        return dmfast.dm_loss(z * 1, tokens, objective=objective, inplace=inplace, num_sequences=given, **named).loss  # type: ignore[arg-type]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for b, t in ((4, 5), (4, 9), (6, 5), (3, 11), (7, 2)):
        p = problem(b, t)
        x, y = leaf(p.logits), leaf(p.logits)
        number = torch.tensor(2.0 * b)
        for z, call in ((x, function), (y, compiled)):
            call(z, p.tokens, number, *p.terms.values()).backward()
        torch.testing.assert_close(y.grad, x.grad, rtol=1e-6, atol=1e-8)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("name", ["log_z", "baseline"])
def test_compiled_with_a_number_that_changes_at_every_step(name: str) -> None:
    """A running Z or baseline that is a tensor compiles once."""
    p = problem()

    def function(z: Tensor, value: Tensor) -> Tensor:
        if name == "baseline":
            return p.loss(z, objective=Objective("reverse_kl", baseline=value.expand(4))).loss
        return p.loss(z, log_z=value).loss

    # torch 2.6 has the second name.
    name_of_limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({name_of_limit: 1}):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for value in torch.tensor([1.0, 0.9, 0.8, 0.7], dtype=torch.float64):
            assert float(compiled(leaf(p.logits), value)) == pytest.approx(float(function(p.logits, value)), rel=1e-12)


@pytest.mark.parametrize("name", ["log_z", "baseline", "num_sequences", "grad_scale"])
def test_a_float_that_changes_at_every_step_is_not_compiled_every_time(name: str) -> None:
    """The first value is a constant of the first graph, and a later graph is for any value."""
    p = problem()

    def function(z: Tensor, value: float) -> Tensor:
        if name == "baseline":
            return p.loss(z, objective=Objective("reverse_kl", baseline=value)).loss
        return p.loss(z, **{name: value}).loss

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for value in (2.25, 2.5, 3.25, 1.75, 2.125):
        assert float(compiled(leaf(p.logits), value)) == pytest.approx(float(function(p.logits, value)), rel=1e-12)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("objective", ["gdc++", "dpg", own_gdc])
def test_compiled_errors_are_raised(objective: object, backend: str) -> None:
    """Faults that only values tell are found inside the graph, with their place."""
    with use_backend(backend):
        refuses_what_values_tell(objective)


def refuses_what_values_tell(objective: object) -> None:
    p = problem()
    compiled = torch.compile(
        lambda z, y: dmfast.dm_loss(z, y, objective=objective, **p.terms).loss,  # type: ignore[arg-type]
        fullgraph=True,
        backend="aot_eager",
    )
    tokens, row = p.tokens.clone(), int((p.tokens[2] >= 0).nonzero()[0])
    compiled(leaf(p.logits), tokens)
    tokens[2, row] = 37
    with pytest.raises(ValueError, match=rf"tokens holds 37 at \(sequence 2, position {row}\)"):
        compiled(leaf(p.logits), tokens)
    logits = p.logits.clone()
    logits[2, row, 7] = torch.nan
    with pytest.raises(ValueError, match=rf"NaN or \+inf at \(sequence 2, position {row}\)"):
        compiled(leaf(logits), p.tokens)
    logits = p.logits.clone()
    logits[2, row, p.tokens[2, row]] = -INF
    with pytest.raises(ValueError, match=rf"logit of token \d+ at \(sequence 2, position {row}\) is -inf"):
        compiled(leaf(logits), p.tokens)
    p.terms["log_proposal"][1] = -1e4
    with pytest.raises(ValueError, match="weight A of sequence 1"):
        compiled(leaf(p.logits), p.tokens)
    p.terms["log_target"][3] = INF
    with pytest.raises(ValueError, match="log_target holds inf at sequence 3"):
        compiled(leaf(p.logits), p.tokens)
