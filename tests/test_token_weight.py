"""Test per-token weights, loss = -(1/B) sum_i A_i sum_t w_it log pi(x_it), of every backend.

The oracle is ``dmfast.eager`` in fp64. Its own weights are compared here with formulas that were written independently.
The weights are for losses that clip each token's ratio, and the gradients are compared with those losses in plain
torch.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from test_kernels import INF, NAN, SPECIAL, bits, check, dtypes, inplaces, make_case, make_terms, run
from test_linear import check as check_linear
from test_linear import make as make_linear
from torch import Tensor

import dmfast
from dmfast import eager
from dmfast.functional import DMLossOutput
from dmfast.objectives import Terms


def own_dpg(terms: Terms) -> Tensor:
    """Weigh as ``dpg`` does, in a function of the user's own."""
    assert terms.log_target_ratio is not None
    return terms.log_target_ratio.exp()


OBJECTIVES = {"gdc++": "gdc++", "dpg": "dpg", "own": own_dpg}
objectives = pytest.mark.parametrize("objective", OBJECTIVES)


def weights_of(tokens: Tensor, seed: int = 0) -> Tensor:
    """Return fp32 weights of both signs. A third of them are 0, and a token that -100 leaves out has NaN."""
    torch.manual_seed(3000 + seed)
    w = torch.randn(tokens.shape) * (torch.rand(tokens.shape) > 0.3)
    return torch.where(tokens == -100, NAN, w)


# --- the oracle ---------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    """At p = (3/4, 1/4) and A = 2 the loss is -2 (3 log 3/4 - log 1/4) with the gradient -2 w (onehot - p)."""
    logits = torch.tensor([[[math.log(3.0), 0.0]] * 2]).double().requires_grad_()
    w = torch.tensor([[3.0, -1.0]], requires_grad=True)
    out = dmfast.dm_loss(logits, torch.tensor([[0, 1]]), objective="reinforce", on_policy=True,
                         reward=torch.tensor([2.0]), token_weight=w, backend="eager")  # fmt: skip
    assert out.weight.item() == 2 and out.log_prob.item() == pytest.approx(math.log(3 / 16))
    assert out.loss.item() == pytest.approx(-2 * (3 * math.log(0.75) - math.log(0.25)))
    out.loss.backward()
    assert logits.grad is not None and logits.grad.flatten().tolist() == pytest.approx([-1.5, 1.5, -1.5, 1.5])
    assert w.grad is None, "a gradient flows through the weights"


@objectives
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_the_oracle_against_a_formula_of_its_own(packed: bool, objective: str) -> None:
    """A is of the plain sums, and the entropy's bonus is not weighted."""
    torch.manual_seed(0)
    z = 2 * torch.randn(3, 4, 9).double()
    z[0, 1, 3:] = -INF
    tokens = torch.randint(3, (3, 4))
    tokens[1, 2] = -100
    w = weights_of(tokens)
    given = {"log_target": torch.tensor([-3.0, -INF, -4.0]).double(), "log_proposal": torch.tensor([-4.0, -5, -4.5]),
             "log_z": 0.2, "entropy_coefficient": 0.3, "num_sequences": 5}  # fmt: skip
    mine, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    shape = (12,) if packed else (3, 4)
    call = {**given, "cu_seqlens": torch.tensor([0, 4, 8, 12]) if packed else None, "objective": OBJECTIVES[objective]}
    logits, tokens_of = mine.reshape(*shape, 9), tokens.reshape(shape)
    out = eager.dm_loss(logits, tokens_of, token_weight=w.reshape(shape), **call)
    plain = eager.dm_loss(logits.detach(), tokens_of, **call)
    assert torch.equal(out.weight, plain.weight) and torch.equal(out.log_prob, plain.log_prob)

    spread = torch.distributions.Categorical(logits=(theirs * 1.0).clamp(min=-1e6))
    scored = (tokens >= 0).double()
    log_prob = spread.log_prob(tokens.clamp(min=0))
    weighted = (torch.where(tokens >= 0, w, 0.0) * log_prob).sum(1)
    loss = -(out.weight * weighted + 0.3 * (spread.entropy() * scored).sum(1)).sum() / 5
    torch.testing.assert_close(out.loss, loss)
    out.loss.backward()
    loss.backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


# --- the kernels, against the oracle ------------------------------------------------------------------------------


@dtypes
@inplaces
@objectives
@pytest.mark.parametrize("layout", ["sliced", "transposed", "packed64"])
def test_layouts_and_objectives(layout: str, objective: str, inplace: bool, dtype: torch.dtype) -> None:
    """gdc++'s weight depends on pi and takes two passes. dpg's takes one, and the user's own goes through log pi."""
    case = make_case(layout, dtype, 1031 if objective == "dpg" else 127)
    bonus = 0.4 * (layout == "sliced")
    check(case, inplace=inplace, objective=OBJECTIVES[objective], max_weight=3.0, entropy_coefficient=bonus,
          token_weight=weights_of(case.tokens), **make_terms(case))  # fmt: skip


@dtypes
@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_another_grad_output(reduction: str, objective: str, dtype: torch.dtype) -> None:
    case = make_case("contiguous", dtype, 300)
    grad = torch.linspace(-1.0, 2.0, 4).double() if reduction == "none" else torch.tensor(0.3).double()
    known = objective == "dpg" and reduction == "sum" and dtype != torch.float16
    check(case, objective=objective, reduction=reduction, grad=grad, roundings=1 + known, softcap=5.0,
          token_weight=weights_of(case.tokens).double(), **make_terms(case, softcap=5.0))  # fmt: skip


@dtypes
@pytest.mark.parametrize("name", SPECIAL)
def test_special_logits(name: str, dtype: torch.dtype) -> None:
    """The gradient is right also where the weight is 0. Such rows get zeros."""
    case = make_case("sliced", dtype, 1300, b=2, t=3, values=SPECIAL[name], unscored="none")
    w = torch.tensor([[0.0, -2.0, 1e-3], [1.0, 0.0, 0.0]])
    for objective in ("gdc++", "dpg"):
        _, dz = run(case, False, None, objective=objective, token_weight=w, **make_terms(case, zeros=False))
        assert bool((dz[w == 0] == 0).all())
        check(case, objective=objective, token_weight=w, **make_terms(case, zeros=False))


@inplaces
@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
def test_weights_of_one_change_no_bit_of_the_gradient(objective: str, inplace: bool) -> None:
    case = make_case("sliced", torch.bfloat16, 300)
    given = {"objective": objective, **make_terms(case)}
    out, dz = run(case, inplace, None, **given)
    ones, dz_of_ones = run(case, inplace, None, token_weight=torch.ones(case.tokens.shape), **given)
    assert torch.equal(bits(dz), bits(dz_of_ones))
    torch.testing.assert_close(ones.loss, out.loss, rtol=1e-14, atol=0)
    assert torch.equal(bits(ones.log_prob), bits(out.log_prob)) and torch.equal(bits(ones.weight), bits(out.weight))


@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
def test_without_gradient_and_backward_twice(objective: str) -> None:
    case = make_case("contiguous", torch.float32, 37)
    given = {"objective": objective, "token_weight": weights_of(case.tokens), **make_terms(case)}
    leaf = case.logits.clone().requires_grad_()
    out = dmfast.dm_loss(leaf, case.tokens, case.mask, **given)
    first, second = (torch.autograd.grad(out.loss, leaf, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-9)
    with torch.no_grad():
        loss = dmfast.dm_loss(leaf, case.tokens, case.mask, **given).loss
    torch.testing.assert_close(loss, out.loss.detach(), rtol=1e-14, atol=0)


def test_no_sequences_and_empty_ones() -> None:
    logits = torch.randn(4, 7, requires_grad=True)
    given = {"objective": "reinforce", "on_policy": True}
    w = torch.tensor([0.0, 1.0, 0.0, 2.0])
    out = dmfast.dm_loss(logits, torch.tensor([0, 1, 2, 3]), cu_seqlens=torch.tensor([0, 0, 4, 4]), **given,
                         reward=torch.ones(3), token_weight=w, reduction="none")  # fmt: skip
    expected = -(out.token_log_prob * w).sum()
    torch.testing.assert_close(out.loss, torch.stack([torch.zeros(()), expected, torch.zeros(())]).double())
    for shape, starts in (((0, 3), None), ((0,), torch.tensor([0]))):
        none = dmfast.dm_loss(torch.empty(*shape, 7), torch.zeros(shape).long(), cu_seqlens=starts, **given,
                              reward=torch.ones(0), token_weight=torch.ones(shape))  # fmt: skip
        assert none.loss == 0


# --- hidden states and a head -------------------------------------------------------------------------------------


@objectives
@pytest.mark.parametrize("rows", [3, 13, 1000])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_linear(layout: str, rows: int, objective: str) -> None:
    """Sequences may come in parts, several in a chunk, or all at once, with and without a bias."""
    case = make_linear(layout, bias=rows != 13)
    check_linear(case, rows, objective=OBJECTIVES[objective], max_weight=5.0, token_weight=weights_of(case.tokens),
                 softcap=5.0 if rows == 3 else None, entropy_coefficient=0.3 * (rows == 13))  # fmt: skip


def test_linear_in_16_bits_and_each_loss() -> None:
    case = make_linear(dtype=torch.bfloat16)
    grad = torch.linspace(-1.0, 2.0, 5).double()
    check_linear(case, 7, grad, reduction="none", token_weight=weights_of(case.tokens), max_weight=5.0)


@pytest.mark.parametrize("objective", ["dpg", "own"])
def test_linear_under_compile(objective: str) -> None:
    case = make_linear()
    token_weight = weights_of(case.tokens)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return dmfast.linear_dm_loss(h, w, case.tokens, case.mask, objective=OBJECTIVES[objective],
                                     token_weight=token_weight, **case.terms).loss  # fmt: skip

    found = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        h, w, _ = case.inputs(False)
        value = call(h, w)
        value.backward()
        found.append([value.detach(), h.grad, w.grad])  # type: ignore[union-attr]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# --- what is wrong ------------------------------------------------------------------------------------------------


def call(**changed: object) -> DMLossOutput:
    torch.manual_seed(0)
    given: dict[str, object] = {
        "logits": torch.randn(2, 3, 5, requires_grad=True), "tokens": torch.ones(2, 3).long(), "reward": torch.ones(2),
        "objective": "reinforce", "on_policy": True, "token_weight": torch.ones(2, 3),
    }  # fmt: skip
    return dmfast.dm_loss(**{**given, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.ones(2), ValueError, r"token_weight must have the shape of tokens, \(2, 3\), one weight for each, got"),
        (torch.ones(2, 3, 1), ValueError, r"the shape of tokens, \(2, 3\), one weight for each, got torch.float32 \(2"),
        (torch.ones(2, 3, dtype=torch.bool), TypeError, r"must be a floating-point tensor, got torch.bool .* as mask"),
        (2.0, TypeError, "token_weight must be a floating-point tensor, got float 2.0"),
        (torch.ones(2, 3, device="meta"), ValueError, "token_weight is on meta, logits on .*; move it there"),
    ],
)
def test_what_it_must_be(weight: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(token_weight=weight)
    with pytest.raises(error, match=message.replace("logits", "hidden")):
        dmfast.linear_dm_loss(torch.ones(2, 3, 4), torch.ones(5, 4), torch.ones(2, 3).long(), reward=torch.ones(2),
                              objective="reinforce", on_policy=True, token_weight=weight)  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize("backend", [None, "eager"], ids=["kernels", "eager"])
@pytest.mark.parametrize("value", [NAN, INF, -(2.0**100)])
def test_values_that_may_not_be(value: float, backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors name the place, and only scored tokens have them."""
    monkeypatch.setenv("DMFAST_SYNC_CHECKS", "1")
    w = torch.ones(2, 3)
    w[1, 2] = value
    message = (
        rf"token_weight holds {re.escape(str(value))} at \(sequence 1, position 2\), a scored position; it must be"
    )
    inputs = {"log_target": torch.zeros(2), "log_proposal": torch.zeros(2), "log_z": 0.0}
    for objective in ("reinforce", own_dpg):
        with pytest.raises(ValueError, match=message):
            call(
                token_weight=w, backend=backend, **({} if objective == "reinforce" else {**inputs, "on_policy": False})
            )
        with pytest.raises(ValueError, match=message):
            dmfast.linear_dm_loss(torch.ones(2, 3, 4), torch.ones(5, 4), torch.ones(2, 3).long(), objective="dpg",
                                  token_weight=w, backend=backend, **inputs)  # fmt: skip
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[1, 2] = False
    masked = call(token_weight=w, backend=backend, mask=mask)
    torch.testing.assert_close(masked.loss, call(mask=mask, backend=backend).loss)


# --- what it is for: losses that clip each token's ratio, off-policy ------------------------------------------------


def off_policy() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return logits, tokens (padded), which of them count, log q of each token, and an advantage of each sequence."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(6, 8, 11).double()
    tokens = torch.randint(11, (6, 8))
    scored = torch.arange(8) < torch.tensor([8, 3, 5, 8, 1, 6])[:, None]
    log_pi = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    log_q = log_pi + 0.4 * torch.randn(6, 8).double()
    return logits, tokens, scored, log_q, torch.randn(6).double()


def grpo(ratio: Tensor, advantage: Tensor, log_pi: Tensor, scored: Tensor) -> Tensor:
    """Return the mean over sequences of the mean over tokens of min(r A, clip(r) A), r within .2 of 1."""
    surrogate = torch.minimum(ratio * advantage[:, None], ratio.clamp(0.8, 1.2) * advantage[:, None])
    return -((surrogate * scored).sum(1) / scored.sum(1)).mean()


def dapo(ratio: Tensor, advantage: Tensor, log_pi: Tensor, scored: Tensor) -> Tensor:
    """Return the mean over all tokens, clipped below at .8 and above at 1.28."""
    surrogate = torch.minimum(ratio * advantage[:, None], ratio.clamp(0.8, 1.28) * advantage[:, None])
    return -(surrogate * scored).sum() / scored.sum()


def cispo(ratio: Tensor, advantage: Tensor, log_pi: Tensor, scored: Tensor) -> Tensor:
    """Return the mean over all tokens of clip(r) A log pi, the clipped ratio a constant."""
    return -(ratio.detach().clamp(max=1.3) * advantage[:, None] * log_pi * scored).sum() / scored.sum()


def within(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Return where min(r A, clip(r) A) has a gradient."""
    return torch.where(advantage[:, None] > 0, ratio <= high, ratio >= low)


@pytest.mark.parametrize("backend", [None, "eager"], ids=["kernels", "eager"])
@pytest.mark.parametrize("theirs", [grpo, dapo, cispo])
def test_losses_that_clip_each_token(theirs: object, backend: str | None) -> None:
    """The first call scores, and the second has the weights that were made of its log pi."""
    logits, tokens, scored, log_q, advantage = off_policy()
    leaf = logits.clone().requires_grad_()
    log_pi = leaf.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    (expected,) = torch.autograd.grad(theirs((log_pi - log_q).exp(), advantage, log_pi, scored), leaf)  # type: ignore[operator]

    mine = (logits if backend else logits.float()).clone().requires_grad_()
    known = {"objective": "reinforce", "on_policy": True, "reward": advantage, "backend": backend}
    ratio = (dmfast.dm_loss(mine.detach(), tokens, scored, **known).token_log_prob - log_q).exp()
    if theirs is grpo:
        w, count = ratio * within(ratio, advantage, 0.8, 1.2) / scored.sum(1, keepdim=True), None
    elif theirs is dapo:
        w, count = ratio * within(ratio, advantage, 0.8, 1.28), int(scored.sum())
    else:
        w, count = ratio.clamp(max=1.3), int(scored.sum())
    assert 0.1 < float((w == 0)[scored].double().mean()) < 0.6 or theirs is cispo, "too few tokens are clipped, or all"
    dmfast.dm_loss(mine, tokens, scored, token_weight=w, num_sequences=count, **known).loss.backward()
    assert mine.grad is not None
    torch.testing.assert_close(mine.grad.double(), expected, rtol=1e-12 if backend else 1e-4, atol=1e-7)
