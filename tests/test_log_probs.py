"""Test that ``dm_loss_from_log_probs`` is ``dm_loss`` of the logits that the log-probabilities came from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dmfast import Objective, dm_loss
from dmfast.log_probs import dm_loss_from_log_probs
from dmfast.methods import METHODS, DrGRPO
from dmfast.objectives import KINDS

INF, NAN = math.inf, math.nan
B, T, V = 6, 5, 7
PARAMETERS = {"alpha": 0.5, "log_scale": -3.0, "beta": 0.1}
OBJECTIVES: dict[str, Any] = {
    **{name: Objective(name, **{p: PARAMETERS[p] for p in (kind.parameter,) if p}) for name, kind in KINDS.items()},  # type: ignore[arg-type]
    "alpha above 1": Objective("alpha", alpha=1.5),
    "bounded alpha": Objective("alpha", alpha=0.999, normalize_alpha=False, max_return=10.0),
    "dpg with a baseline": Objective("dpg", baseline=torch.linspace(0, 1, B)),
    "dpg with the others' mean": Objective("dpg", baseline="leave_one_out_context"),
    "not normalised": Objective("js", normalize=False),
    **METHODS,
    "dr_grpo": DrGRPO(T),
    "a function": lambda terms: (terms.log_ratio - terms.log_target_ratio).tanh() / terms.length,
}  # fmt: skip
ON_POLICY_ALONE = {"grpo", "dapo", "dr_grpo", "maxrl", "dpg with the others' mean"}


def given(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Return logits, tokens, a mask and per-sequence inputs; one sequence has nothing that is scored."""
    torch.manual_seed(seed)
    tokens = torch.randint(V, (B, T))
    mask = torch.rand(B, T) > 0.3
    mask[4] = False
    inputs = {name: torch.randn(B).double() - 9 for name in ("log_target", "log_proposal", "log_base")}
    inputs |= {"reward": torch.rand(B), "context_id": torch.arange(B) // 3, "log_z": torch.tensor(0.2).double()}
    return 2 * torch.randn(B, T, V).double(), tokens, mask, inputs


def both(logits: Tensor, tokens: Tensor, mask: Tensor, **call: Any) -> None:
    """Compare value, gradient and what the output tells with those of ``dm_loss``."""
    theirs, mine = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = dm_loss(theirs, tokens, mask, backend="eager", **call)
    log_probs = mine.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    found = dm_loss_from_log_probs(torch.where(mask, log_probs, NAN), mask, **call)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=1e-12)
    grad = torch.linspace(0.5, 2, B).double() if found.loss.dim() else torch.tensor(3.0).double()
    found.loss.backward(grad)
    expected.loss.backward(grad)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    for name in ("log_prob", "log_ratio", "log_target_ratio", "weight", "token_log_prob", "n_clipped", "n_empty"):
        mine_now, theirs_now = getattr(found, name), getattr(expected, name)
        assert (mine_now is None) == (theirs_now is None)
        if theirs_now is not None:
            torch.testing.assert_close(mine_now, theirs_now, rtol=1e-12, atol=1e-12, msg=name)
    assert found.entropy is None
    assert found.check() is found


@pytest.mark.parametrize(
    ("name", "on_policy"),
    [(name, on) for name in OBJECTIVES for on in (False, True) if on or name not in ON_POLICY_ALONE],
)
def test_every_objective(name: str, on_policy: bool) -> None:
    both(*given()[:3], **given()[3], objective=OBJECTIVES[name], on_policy=on_policy, max_weight=2.0)


@pytest.mark.parametrize("name", ["dpg", "gdc++", "js", "tv", "chi2", "reverse_kl", "reverse_chi2", "bounded alpha"])
def test_what_has_probability_0_under_the_target(name: str) -> None:
    logits, tokens, mask, inputs = given(1)
    inputs["log_target"][:2] = -INF
    inputs["log_z"] = torch.tensor([0.2, 0.2, 0.2, -INF, 0.2, 0.2]).double()
    both(logits, tokens, mask, **inputs, objective=OBJECTIVES[name], max_weight=3.0)


@pytest.mark.parametrize("call", [
    {"reduction": "sum"}, {"reduction": "none"}, {"num_sequences": 11}, {"num_sequences": torch.tensor(11)},
    {"num_sequences": 9, "num_tokens": 40.0, "objective": "dapo", "on_policy": True}, {"log_z": 0.1},
    {"token_weight": torch.linspace(-1, 2, B * T).view(B, T)}, {"token_weight": torch.zeros(B, T), "objective": "js"},
    {"token_weight": torch.rand(B, T), "objective": "gspo", "reduction": "none"},
], ids="-".join)  # fmt: skip
def test_the_options_of_a_call(call: dict[str, Any]) -> None:
    logits, tokens, mask, inputs = given(2)
    both(logits, tokens, mask, **inputs | call)


def test_packed_sequences_and_integer_masks() -> None:
    logits, tokens, mask, inputs = given(3)
    starts = torch.tensor([0, 4, 4, 11, 20, 21, 30])
    call = {**inputs, "cu_seqlens": starts, "token_weight": torch.rand(B * T)}
    log_probs = logits.log_softmax(-1).gather(-1, tokens[..., None]).flatten().requires_grad_()
    expected = dm_loss(logits.flatten(0, 1), tokens.flatten(), mask.flatten(), backend="eager", **call)
    found = dm_loss_from_log_probs(log_probs, 2 * mask.flatten().int(), **call)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=1e-12)
    found.loss.backward()
    weight = -expected.weight.repeat_interleave(starts.diff()) * call["token_weight"] / B
    torch.testing.assert_close(log_probs.grad, torch.where(mask.flatten(), weight, 0.0))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_log_probabilities_in_fp32_count_as_the_numbers_that_they_are(name: str) -> None:
    """Value and weights are those of the same numbers in fp64. Only the gradient is rounded to fp32."""
    logits, tokens, mask, inputs = given(4)
    rounded = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].float()
    found, grads = [], []
    for log_probs in (rounded.clone().requires_grad_(), rounded.double().requires_grad_()):
        call = {**inputs, "objective": OBJECTIVES[name], "on_policy": name in ON_POLICY_ALONE, "max_weight": 2.0}
        out = dm_loss_from_log_probs(torch.where(mask, log_probs, NAN), mask, **call)
        out.loss.backward()
        assert log_probs.grad is not None and log_probs.grad.dtype == log_probs.dtype
        found.append(torch.cat([out.loss.detach().double().view(1), out.weight, out.log_prob]))
        grads.append(log_probs.grad)
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(*found, rtol=1e-14, atol=0)
    torch.testing.assert_close(grads[0], grads[1].float(), rtol=2e-7, atol=0)


def test_the_gradient_is_the_weight_of_each_token_in_fp32() -> None:
    """Values are right also where a sum over the tokens would lose digits, because it is in fp64."""
    log_probs = torch.full((2, 2000), -9.87654321, requires_grad=True)
    log_q = log_probs.detach().double().sum(1) - 0.25
    out = dm_loss_from_log_probs(log_probs, log_target=log_q + 0.5, log_proposal=log_q, log_z=0.0, objective="gdc++")
    exact = math.exp(0.5) - math.exp(0.25)
    assert out.weight.tolist() == pytest.approx([exact] * 2, rel=1e-11)
    out.loss.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.unique().tolist() == pytest.approx([-exact / 2])


def test_no_gradient_is_asked_for() -> None:
    _, _, _, inputs = given()
    assert not dm_loss_from_log_probs(-torch.rand(B, T), **inputs).loss.requires_grad
    with torch.no_grad():
        assert not dm_loss_from_log_probs(-torch.rand(B, T).requires_grad_(), **inputs).loss.requires_grad


def test_under_torch_compile_it_is_the_same() -> None:
    logits, tokens, mask, inputs = given()

    def loss(z: Tensor) -> Tensor:
        log_probs = z.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        return dm_loss_from_log_probs(log_probs, mask, **inputs).loss

    compiled = torch.compile(loss, backend="eager")
    torch.testing.assert_close(compiled(logits), loss(logits), rtol=1e-12, atol=1e-12)


GOOD = torch.full((B, T), -1.0)


def holds(value: float, where: tuple[int, int] = (1, 2)) -> Tensor:
    x = GOOD.clone()
    x[where] = value
    return x


@pytest.mark.parametrize(("change", "message"), [
    ({"token_log_probs": GOOD.bfloat16()}, r"token_log_probs must be float32 or float64, got torch.bfloat16.*\.float"),
    ({"token_log_probs": [[-1.0]]}, "token_log_probs must be float32 or float64, got list"),
    ({"token_log_probs": GOOD[0]}, r"token_log_probs must be \(B, T\), or packed \(N,\).*without cu_seqlens"),
    ({"token_log_probs": GOOD, "cu_seqlens": torch.tensor([0, 3])}, r"token_log_probs must be \(B, T\).* with cu_seq"),
    ({"token_log_probs": GOOD.flatten(), "cu_seqlens": torch.arange(B + 1)}, "cu_seqlens must rise from 0 to N = 30"),
    ({"token_log_probs": holds(NAN)}, r"token_log_probs holds nan at \(sequence 1, position 2\).*diverged"),
    ({"token_log_probs": holds(-INF)}, r"token_log_probs holds -inf at \(sequence 1, position 2\).*probability 0"),
    ({"token_log_probs": holds(INF)}, r"token_log_probs holds inf at \(sequence 1, position 2\)"),
    ({"token_log_probs": GOOD.exp()}, r"token_log_probs holds 0.36.*did you pass probabilities"),
    ({"token_log_probs": -GOOD}, r"token_log_probs holds 1.0 at \(sequence 0, position 0\).*losses"),
    ({"mask": torch.ones(B, T)}, r"mask must be a bool or integer tensor.*token_weight"),
    ({"mask": torch.ones(B, T + 1).bool()}, r"mask must have the shape of token_log_probs, \(6, 5\)"),
    ({"token_weight": torch.ones(B)}, "token_weight must have the shape of tokens"),
    ({"token_weight": holds(NAN)}, r"token_weight holds nan at \(sequence 1, position 2\)"),
    ({"log_target": None}, "objective 'gdc\\+\\+' needs log_target"),
    ({"log_proposal": None}, "needs log_proposal"),
    ({"log_proposal": torch.zeros(B + 1)}, r"log_proposal must have one value per sequence, \(6,\)"),
    ({"log_target": torch.full((B,), NAN)}, "log_target holds nan at sequence 0"),
    ({"log_target": torch.full((B,), 900.0)}, "weight A of sequence 0 is inf.*max_weight"),
    ({"objective": "gdc"}, "unknown objective 'gdc'"),
    ({"objective": lambda terms: terms.reward.float()}, "an objective must return float64 weights"),
    ({"reduction": "avg"}, "reduction must be"),
    ({"num_sequences": 0}, "num_sequences must be a positive number"),
    ({"max_weight": -1}, "max_weight must be a positive number"),
    ({"context_id": torch.zeros(B - 1).int()}, "context_id must be an integer tensor"),
])  # fmt: skip
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    call = {"token_log_probs": GOOD, "mask": None, **given()[3]} | change
    with pytest.raises((TypeError, ValueError), match=message):
        dm_loss_from_log_probs(**call)


def test_rounding_above_0_is_taken_and_padding_may_hold_anything() -> None:
    log_probs = holds(3e-7)
    log_probs[0, 4] = INF
    mask = torch.ones(B, T).bool()
    mask[0, 4] = False
    out = dm_loss_from_log_probs(log_probs, mask, **given()[3])
    assert out.loss.isfinite()
    assert out.token_log_prob[0, 4] == 0
