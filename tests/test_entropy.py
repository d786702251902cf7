"""Test the entropy bonus, -(c/B) sum_i H(x_i) in the loss and its gradient, of every backend.

The oracle is ``dmfast.eager`` in fp64. Its own bonus is compared here with a formula that was written independently,
with finite differences and with a number that was worked by hand.
"""

from __future__ import annotations

import math

import pytest
import torch
from test_kernels import SMALLEST, SPECIAL, check, dtypes, inplaces, make_case, make_terms, run
from torch import Tensor

import dmfast
from dmfast import eager, kernels
from dmfast.kernels import checks, select
from dmfast.kernels import eager as eager_kernel
from dmfast.kernels.batch import ROW_ENTROPY, Bonus
from dmfast.objectives import Terms

INF = math.inf


def own_dpg(terms: Terms) -> Tensor:
    """Return the weights of ``dpg`` as an objective of the user's own would."""
    assert terms.log_target_ratio is not None
    return terms.log_target_ratio.exp()


def terms_of(*log_target: float) -> dict[str, Tensor | float]:
    """Return inputs of ``dpg`` for which A = P, because log q and log Z are 0."""
    target = torch.tensor(log_target).double()
    return {"log_target": target, "log_proposal": torch.zeros_like(target), "log_z": 0.0, "objective": "dpg"}


# --- the oracle ---------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    """With p = (3/4, 1/4), H is log 4 - (3/4) log 3, and its gradient at z_1 is -p_1 (log p_1 + H) = -(3/16) log 3."""
    logits = torch.tensor([[[math.log(3.0), 0.0]]]).double().requires_grad_()
    h = math.log(4) - 0.75 * math.log(3)
    out = eager.dm_loss(logits, torch.tensor([[0]]), entropy_coefficient=2.0, **terms_of(-INF))
    assert out.weight.item() == 0 and out.loss.item() == pytest.approx(-2 * h)
    assert out.entropy is not None and out.entropy.item() == pytest.approx(h) and not out.entropy.requires_grad
    out.loss.backward()
    at = 2 * 0.1875 * math.log(3)
    assert logits.grad is not None and logits.grad.flatten().tolist() == pytest.approx([at, -at])


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("objective", ["gdc++", "dpg", own_dpg], ids=["gdc++", "dpg", "own"])
def test_the_oracle_against_a_formula_of_its_own(objective: object, softcap: float | None) -> None:
    """Loss and gradient are those of torch's own distribution and autograd, also where some logits are -inf."""
    torch.manual_seed(0)
    z = 2 * torch.randn(3, 4, 9).double()
    z[0, 1, 3:] = z[2, 0, 5] = -INF
    tokens = torch.randint(3, (3, 4))
    tokens[1, 2] = -100
    given = {"log_target": torch.tensor([-3.0, -INF, -4.0]).double(), "log_proposal": torch.tensor([-4.0, -5, -4.5]),
             "log_z": 0.2, "temperature": 0.7, "softcap": softcap, "entropy_coefficient": 0.3}  # fmt: skip
    mine, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    out = eager.dm_loss(mine, tokens, objective=objective, num_sequences=5, **given)  # type: ignore[arg-type]
    y = (theirs if softcap is None else softcap * (theirs / softcap).tanh()) / 0.7
    # The clamp makes every log p finite, so that p log p is 0 where p is 0, and not 0 * -inf.
    spread = torch.distributions.Categorical(logits=y.clamp(min=-1e6))
    scored = (tokens >= 0).double()
    log_prob = (spread.log_prob(tokens.clamp(min=0)) * scored).sum(1)
    loss = -(out.weight * log_prob + 0.3 * (spread.entropy() * scored).sum(1)).sum() / 5
    torch.testing.assert_close(out.loss, loss)
    out.loss.backward()
    loss.backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert bool((mine.grad[z == -INF] == 0).all())  # type: ignore[index]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_oracle_against_finite_differences(reduction: str) -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 3, 5).double().requires_grad_()
    tokens = torch.randint(5, (2, 3))

    def loss(z: Tensor) -> Tensor:  # the weights of dpg are constants, as finite differences need
        return eager.dm_loss(z, tokens, entropy_coefficient=-0.7, softcap=3.0, reduction=reduction,
                             **terms_of(-0.3, 0.4)).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (z,))


# --- the kernels, against the oracle ------------------------------------------------------------------------------


@dtypes
@inplaces
@pytest.mark.parametrize("objective", ["gdc++", "dpg", "own"])
@pytest.mark.parametrize("layout", ["sliced", "unaligned", "packed64"])
def test_layouts_and_objectives(layout: str, objective: str, inplace: bool, dtype: torch.dtype) -> None:
    """The kernels are right for each way of getting the weight.

    The weight of gdc++ depends on pi, which takes two passes. The weight of dpg is known, which takes one. An objective
    of the user's own goes through log pi and H.
    """
    case = make_case(layout, dtype, 1031)
    of = own_dpg if objective == "own" else objective
    out = check(case, inplace=inplace, objective=of, entropy_coefficient=0.4, max_weight=3.0, **make_terms(case))
    assert out.entropy is not None


@dtypes
@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_reductions_and_softcap(softcap: float | None, reduction: str, objective: str, dtype: torch.dtype) -> None:
    case = make_case("contiguous", dtype, 700, values=lambda s: 8 * torch.randn(s))
    rows = {"temperature": 0.6, "softcap": softcap}
    grad = torch.linspace(-1.0, 2.0, 4).double() if reduction == "none" else torch.tensor(0.3).double()
    known = objective == "dpg" and reduction == "sum" and dtype != torch.float16
    check(case, objective=objective, reduction=reduction, grad=grad, entropy_coefficient=-1.5, roundings=1 + known,
          **rows, **make_terms(case, **rows))  # fmt: skip


@dtypes
@pytest.mark.parametrize("temperature", [0.3, 1.7])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_logits(name: str, temperature: float, dtype: torch.dtype) -> None:
    """A token with p = 0 adds nothing to H and has no gradient, whether its logit is -inf or far below the others."""
    case = make_case("sliced", dtype, 1300, b=2, t=3, values=SPECIAL[name], unscored="none")
    terms = make_terms(case, zeros=False, temperature=temperature)
    for objective in ("gdc++", "dpg"):
        check(case, temperature=temperature, objective=objective, entropy_coefficient=1.0, **terms)


@dtypes
@pytest.mark.parametrize("coefficient", [1e-30, 1e30])
def test_edges_of_fp32(coefficient: float, dtype: torch.dtype) -> None:
    """A gradient above the range is infinite, and none is NaN. A tiny one keeps the digits that the dtype has."""
    case = make_case("contiguous", dtype, 300, b=2, t=2, unscored="none")
    for softcap in (None, 5.0):
        for objective in ("gdc++", "dpg"):
            _, dz = run(case, False, None, objective=objective, entropy_coefficient=coefficient, softcap=softcap,
                        log_proposal=torch.zeros(2), log_target=torch.full((2,), -INF), log_z=0.0,
                        max_weight=1e-38)  # fmt: skip
            wide = case.logits.double().requires_grad_()
            eager.dm_loss(wide, case.tokens, objective=lambda t: 0 * t.log_prob, entropy_coefficient=coefficient,
                          softcap=softcap).loss.backward()  # fmt: skip
            assert wide.grad is not None
            limit = torch.finfo(dtype).max
            if coefficient > 1:
                inside = wide.grad.abs() < limit * 0.99
                torch.testing.assert_close(dz[inside].double(), wide.grad[inside], rtol=2.0**-7, atol=1e-5 * 1e30)
                assert bool((dz[wide.grad.abs() > 1.01 * limit].isinf()).all()) and not bool(dz.isnan().any())
            else:
                torch.testing.assert_close(dz.double(), wide.grad, rtol=2.0**-7, atol=max(1e-35, SMALLEST[dtype]))


@dtypes
@pytest.mark.parametrize("objective", ["gdc++", "dpg", "own"])
def test_sequences_of_weight_0_have_the_bonus(objective: str, dtype: torch.dtype) -> None:
    """With P = 0 and an empty context A is 0, and the gradient is the entropy's alone."""
    case = make_case("contiguous", dtype, 127, unscored="none")
    of = own_dpg if objective == "own" else objective
    log_z = torch.tensor([-INF, -INF, 0.0, -INF]).double()
    given = {"log_proposal": torch.zeros(4), "log_target": torch.full((4,), -INF), "objective": of,
             "max_weight": 1e-30}  # fmt: skip
    out, dz = run(case, False, None, entropy_coefficient=0.5, log_z=log_z, **given)
    if objective == "dpg":
        assert bool((out.weight == 0).all())
    wide = case.logits.double().requires_grad_()
    expected = eager.dm_loss(wide, case.tokens, objective=lambda t: 0 * t.log_prob, entropy_coefficient=0.5)
    expected.loss.backward()
    torch.testing.assert_close(dz.double(), wide.grad, rtol=2.0**-7, atol=1e-6)
    assert bool((dz.flatten(2).abs().amax(-1) > 0).all())


@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
def test_no_coefficient_is_the_same_to_the_bit(objective: str) -> None:
    """A coefficient of 0 takes the path without a bonus, whether the entropy is returned or not."""
    case = make_case("sliced", torch.bfloat16, 1031)
    terms = make_terms(case)
    for options in ({}, {"return_entropy": True}):
        (out, dz), (other, dz0) = (
            run(case, False, None, objective=objective, **options, **more, **terms)
            for more in ({}, {"entropy_coefficient": 0.0})
        )
        assert torch.equal(dz, dz0) and torch.equal(out.loss, other.loss)
        assert (other.entropy is None) == ("return_entropy" not in options)


def test_a_known_weight_s_gradient_is_the_one_of_two_passes() -> None:
    """Forward may fold grad_output in, and backward may write anew or scale in place. The gradient is always right."""
    case = make_case("contiguous", torch.float32, 300)
    terms = make_terms(case)
    for inplace in (False, True):
        for scale, grad in ((None, 1.0), (4.0, 4.0), (4.0, 0.5)):
            g = torch.tensor(grad).double()
            _, dz = run(case, inplace, g, objective="dpg", entropy_coefficient=0.7, grad_scale=scale, **terms)
            _, two = run(case, inplace, g, objective=own_dpg, entropy_coefficient=0.7,
                         **{**terms, "log_z": terms["log_z"].nan_to_num(neginf=1e300)})  # fmt: skip
            torch.testing.assert_close(dz, two, rtol=1e-5, atol=1e-7)


def test_no_gradient_is_wanted() -> None:
    """The value is right without a gradient too, also in a call that autograd does not follow."""
    case = make_case("contiguous", torch.float32, 300)
    for objective in ("gdc++", "dpg", own_dpg):
        options = {**make_terms(case, zeros=False), "objective": objective, "entropy_coefficient": 0.7}
        with torch.no_grad():
            out = dmfast.dm_loss(case.logits, case.tokens, case.mask, **options)
        truth = eager.dm_loss(case.logits.double(), case.tokens, case.mask, **options)
        torch.testing.assert_close(out.loss, truth.loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["fused", "eager"])
@dtypes
def test_halves_of_a_vocabulary(backend: str, dtype: torch.dtype) -> None:
    """A shard's gradient is its part of the whole gradient, and is made from log-sum-exp and H of the whole."""
    v, cut = 301, 130
    case = make_case("contiguous", dtype, v)
    given = (case.tokens, case.mask, None, 0.7, 9.0)
    whole = checks.make_batch(case.logits, *given)
    run_on = kernels.EAGER if backend == "eager" else select(case.logits)
    truth = run_on.forward(whole, None, True)
    weight = torch.tensor([0.0, 1.0, -0.5, 0.0]).double()
    bonus = Bonus(truth.rows[ROW_ENTROPY], torch.tensor([0.5, 0.0, -1.0, 0.0]).double())
    full = torch.full(case.logits.shape, torch.nan, dtype=dtype)
    run_on.backward(whole, truth.lse, weight, 0.5, full, bonus=bonus)
    assert bool((full[3] == 0).all()) and bool((full[0] != 0).any())
    for first, last in ((0, cut), (cut, v)):
        half = checks.make_batch(case.logits[..., first:last], *given, vocab_start=first, whole_vocab=v)
        dz = torch.full(half.logits.shape, torch.nan, dtype=dtype)
        run_on.backward(half, truth.lse, weight, 0.5, dz, bonus=bonus)
        tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
        torch.testing.assert_close(dz, full[..., first:last], rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_narrow_gradients(softcap: float | None, dtype: torch.dtype) -> None:
    """The gradient of fp32 logits in 16 bits is right by two passes and by one."""
    case = make_case("sliced", torch.float32, 1031)
    batch, given = case.batch(softcap=softcap), make_terms(case)
    needed = {"on_policy": False, "max_weight": None, "entropy_coefficient": 0.7}
    terms = checks.make_terms(batch, "dpg", **given, **needed)
    run_on = select(case.logits)
    dz = torch.full((2, *case.logits.shape), torch.nan, dtype=dtype)
    scores = run_on.forward_backward(batch, terms, True, 1.0, 0.5, dz[0])
    bonus = scores.bonus(0.7)
    assert bonus is not None
    run_on.backward(batch, scores.lse, scores.weight, 0.5, dz[1], bonus=bonus)
    wide = batch._replace(logits=case.logits.double())
    exact = eager_kernel.gradient(wide, scores.lse, 0.5 * scores.weight, bonus._replace(weight=0.5 * bonus.weight))
    for found in dz:
        torch.testing.assert_close(found.double(), exact.reshape(found.shape), rtol=2.0**-8, atol=2e-6)


# --- hidden states and a head -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [3, 1000])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("objective", ["gdc++", "dpg", "own"])
def test_linear(objective: str, reduction: str, rows: int) -> None:
    """All three gradients are right in one buffer and in several, also of sequences that are longer than a buffer."""
    torch.manual_seed(0)
    tokens, mask = torch.randint(53, (4, 6)), torch.rand(4, 6) > 0.3
    mask[1] = False
    of = own_dpg if objective == "own" else objective
    target = torch.tensor([-9.0, -INF, -8.0, -9.5]).double()
    options = {"objective": of, "reduction": reduction, "entropy_coefficient": 0.6, "softcap": 4.0, "log_z": 0.1,
               "log_target": target, "log_proposal": torch.full((4,), -9.0)}  # fmt: skip
    inputs = [torch.randn(4, 6, 8), torch.randn(53, 8), torch.randn(53)]
    found = []
    for f, dtype, more in ((dmfast.linear_dm_loss, torch.float32, {"chunk_bytes": rows * 64 * 4}),
                           (eager.linear_dm_loss, torch.float64, {})):  # fmt: skip
        h, w, b = (x.to(dtype, copy=True).requires_grad_() for x in inputs)
        out = f(h, w, tokens, mask, bias=b, **options, **more)  # type: ignore[arg-type]
        out.loss.backward(torch.linspace(-1.0, 2.0, 4).double() if reduction == "none" else None)
        found.append([out.loss.detach(), out.entropy, *(x.grad.double() for x in (h, w, b))])  # type: ignore[union-attr]
    for mine, truth in zip(*found, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-6)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, INF, 1e31, "0.1", None, True])
def test_a_coefficient_that_is_no_number(bad: object) -> None:
    logits, tokens = torch.zeros(1, 1, 3), torch.zeros(1, 1).long()
    for call in (lambda **o: dmfast.dm_loss(logits, tokens, **o),
                 lambda **o: dmfast.linear_dm_loss(torch.zeros(1, 1, 2), torch.zeros(3, 2), tokens, **o)):  # fmt: skip
        with pytest.raises(ValueError, match="entropy_coefficient must be a number from -1e30 to 1e30"):
            call(entropy_coefficient=bad, **terms_of(0.0))


# --- faults that a device records ---------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
def test_a_fault_of_a_row_costs_its_sequence_and_one_of_a_weight_its_weight(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bonus of a sequence whose weight fp32 can't hold stays, in one pass or in two."""
    monkeypatch.setenv("DMFAST_SYNC_CHECKS", "0")
    if not select(torch.zeros(1, 1, 3)).records_faults:
        pytest.skip("the CPU raises at once")
    case = make_case("contiguous", torch.float32, 127, unscored="none")
    terms = make_terms(case, zeros=False)
    terms["log_target"][3] = terms["log_proposal"][3] + 200.0
    case.base[1, 2, 5] = math.nan
    leaf = case.base.clone().requires_grad_()
    out = dmfast.dm_loss(leaf, case.tokens, objective=objective, entropy_coefficient=0.5, **terms)
    out.loss.backward()
    assert out.entropy is not None and leaf.grad is not None and bool(leaf.grad.isfinite().all())
    assert bool(out.entropy.isnan().tolist() == [False, True, False, False])
    assert out.weight[1] == out.weight[3] == 0 and bool((leaf.grad[1] == 0).all())
    wide = case.base.double().nan_to_num(0.0).requires_grad_()
    weight = out.weight
    kept = [0, 2, 3]
    truth = eager.dm_loss(wide[kept], case.tokens[kept], objective=lambda _: weight[kept], entropy_coefficient=0.5,
                          num_sequences=4)  # fmt: skip
    truth.loss.backward()
    assert wide.grad is not None
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(out.loss, truth.loss, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"NaN or \+inf at \(sequence 1, position 2\)"):
        out.check()
