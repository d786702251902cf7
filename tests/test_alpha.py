"""Test the objective ``alpha``, A = rho (((p/pi)^(1 - alpha) - 1)/(1 - alpha) - b).

It equals the objectives that are its special cases, to rounding. It is right in 50 digits near alpha = 1, at the
extremes of fp64 and under its bound. Its expected gradient is that of the divergence, by enumeration.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import mpmath
import pytest
import torch
from tabular import Space, Target, hard_target, soft_target
from test_kernels import check_extremes, exact_weight, formula, one

import dmfast
from dmfast import Objective
from dmfast.estimators import estimate
from dmfast.objectives import bounded_returns
from dmfast.proposal import nearer

INF = math.inf
HOW = ("C++", "Python")


def inputs(n: int) -> list[dict[str, torch.Tensor]]:
    """Return ratios from e^-8 to e^8, most of them near 1."""
    found = []
    generator = torch.Generator().manual_seed(5)
    for i in range(n):
        a, b, c, d = (3.0 ** (i % 4 - 2) * torch.randn(4, generator=generator)).tolist()
        found.append(one(log_proposal=-20 + a, log_target=-20 + b, log_z=c, reward=0.0, log_base=-20.0, baseline=d))
    return found


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("alpha", "name", "scale", "shift"),
    [(0.0, "dpg", 1, 1.0), (1.0, "reverse_kl", 1, -1.0), (-1.0, "chi2", 2, 0.0), (2.0, "reverse_chi2", 2, 0.0)],
)
def test_special_cases(how: str, alpha: float, name: str, scale: int, shift: float, on_policy: bool) -> None:
    """A of alpha with baseline b is 1/scale times A of the other objective with baseline scale * b + shift.

    dpg with baseline 1 is gdc++. A of alpha is half of that of chi2 and of reverse_chi2, whose baselines are twice the
    baseline of alpha, so that they are 0 where it has none.
    """
    for terms in inputs(60):
        for b in (0.0, float(terms["baseline"])):
            mine = {**terms, "baseline": torch.tensor([b], dtype=torch.float64)}
            theirs = {**terms, "baseline": torch.tensor([scale * b + shift], dtype=torch.float64)}
            weight = formula(how, Objective("alpha", alpha=alpha), on_policy, -20.0, mine, INF)
            expected = formula(how, Objective(name), on_policy, -20.0, theirs, INF) / scale
            rho = 1.0 if on_policy else math.exp(-20.0 - float(terms["log_proposal"]))
            assert weight == pytest.approx(expected, rel=1e-12, abs=1e-12 * rho * (1 + abs(b)))


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("distance", [1e-2, 1e-6, 1e-10, 1e-15, -1e-10])
def test_no_digits_are_lost_near_one(how: str, distance: float, on_policy: bool) -> None:
    """If the two exponentials differ by 1e-10 of each, a plain difference would be off by 4e-7."""
    objective = Objective("alpha", alpha=1 - distance)
    for terms in inputs(60):
        terms["baseline"].zero_()
        exact, _ = exact_weight(objective, on_policy, -20.0, terms)
        weight = formula(how, objective, on_policy, -20.0, terms, INF)
        # log t is a sum of numbers near 20, and the second term allows for their rounding errors.
        rho = 1.0 if on_policy else math.exp(-20.0 - float(terms["log_proposal"]))
        assert abs(weight - exact) <= 1e-13 * abs(exact) + 4e-14 * rho


@pytest.mark.parametrize(
    ("alpha", "on_policy", "options"),
    [
        (-1.0, False, {}),
        (0.999, False, {"normalize": False}),
        (1 - 1e-10, True, {}),
        (1.0, False, {}),
        (2.0, False, {}),
        (0.5, False, {"max_return": 10.0}),
        (1 - 1e-10, False, {"max_return": 0.25, "normalize_alpha": False, "normalize": False}),
    ],
)
def test_extremes(alpha: float, on_policy: bool, options: dict[str, Any]) -> None:
    """The formula holds for P = 0, Z = 0 and log ratios up to 11,500, with baselines and with max_weight."""
    check_extremes(Objective("alpha", alpha=alpha, **options), on_policy)


@pytest.mark.parametrize("how", HOW)
def test_near_one_a_filter_is_reinforce_with_baseline_one(how: str) -> None:
    """With P = a v and v in {0, 1}, (1 - alpha) A tends to rho (v - 1) as alpha rises to 1.

    That is the weight of reinforce with the reward v and the baseline 1.
    """
    reinforce = Objective("reinforce", baseline=1.0)
    for given, v in itertools.product(inputs(40), (0.0, 1.0)):
        terms = {**given, "reward": torch.tensor([v]).double(), "baseline": torch.ones(1).double()}
        terms["log_target"] = terms["log_base"] + terms["reward"].log()
        expected = formula(how, reinforce, False, -20.0, terms, INF)
        assert expected == pytest.approx(math.exp(-20.0 - float(terms["log_proposal"])) * (v - 1))
        terms["baseline"].zero_()
        rho = math.exp(-20.0 - float(terms["log_proposal"]))
        for distance in (1e-2, 1e-4, 1e-8):
            left_out = Objective("alpha", alpha=1 - distance, normalize_alpha=False)
            divided = formula(how, Objective("alpha", alpha=1 - distance), False, -20.0, terms, INF)
            weight = formula(how, left_out, False, -20.0, terms, INF)
            assert weight == pytest.approx(distance * divided, rel=1e-6, abs=1e-12)
            log_return = distance * (float(terms["log_target"] - terms["log_z"]) + 20) if v else 0.0
            assert abs(weight - expected) <= rho * math.expm1(abs(log_return)) * (1 + 1e-9) + 1e-15


@pytest.mark.parametrize("how", HOW)
def test_where_the_target_is_zero(how: str) -> None:
    """If P = 0, A is -rho (1/(1 - alpha) + b) for alpha below 1, and -inf or the bound from 1 on."""
    terms = one(log_proposal=-21.0, log_target=-INF, log_z=0.5, reward=0.0, log_base=-20.0, baseline=0.75)
    rho = math.exp(1.0)
    for alpha in (-1.0, 0.0, 0.5, 0.999):
        weight = formula(how, Objective("alpha", alpha=alpha), False, -20.0, terms, INF)
        assert weight == pytest.approx(-rho * (1 / (1 - alpha) + 0.75), rel=1e-12)
    for alpha in (1.0, 1 + 1e-10, 2.0):
        assert formula(how, Objective("alpha", alpha=alpha), False, -20.0, terms, INF) == -INF
        assert formula(how, Objective("alpha", alpha=alpha), False, -20.0, terms, 3.0) == -3.0


LOSS = {
    "log_target": torch.tensor([-1.0, -3.0, -INF, 2.0, -1.0]).double(),
    "log_proposal": torch.tensor([-1.5, -1.0, -1.2, -1.0, -1.0]).double(),
    "log_z": torch.tensor([0.2, 0.2, 0.2, 0.2, -INF]).double(),
}


def loss(objective: Objective, backend: str, **options: Any) -> dmfast.functional.DMLossOutput:
    logits = torch.linspace(-1, 1, 20).reshape(5, 1, 4)
    given = {**LOSS, **options}
    return dmfast.dm_loss(logits, torch.zeros(5, 1, dtype=torch.int64), objective=objective, backend=backend, **given)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_p_of_zero_is_refused_from_one_on(backend: str, alpha: float) -> None:
    objective = Objective("alpha", alpha=alpha)
    with pytest.raises(ValueError, match=r"'alpha' is infinite where P\(x\) = 0, .* sequence 2 .*alpha with alpha=0"):
        loss(objective, backend)
    out = loss(objective, backend, max_weight=2.0)
    assert out.weight[2] == -2 and out.weight[4] == 0 and int(out.n_clipped) == int((out.weight.abs() == 2).sum())


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("normalize_alpha", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_max_return(backend: str, normalize_alpha: bool, on_policy: bool) -> None:
    """The weights are those that the formula gives by hand.

    The return is min((p/pi)^(1 - alpha) - 1, M). The factor comes next, and then the baseline. n_clipped counts the
    sequences that max_return bounds and those that max_weight bounds. A sequence whose context has no target counts as
    neither.
    """
    alpha, most, b = 0.25, 0.5, 0.125
    objective = Objective("alpha", alpha=alpha, normalize_alpha=normalize_alpha, max_return=most, baseline=b)
    out = loss(objective, backend, on_policy=on_policy)
    u, rho = out.log_target_ratio.exp(), out.log_ratio.exp()
    gain = (u / rho) ** (1 - alpha) - 1
    bounded = (gain > most).tolist()
    assert bounded == [False, False, False, True, False] and int(out.n_clipped) == 1
    expected = rho * (gain.clamp(max=most) / ((1 - alpha) if normalize_alpha else 1) - b)
    expected[4] = 0
    torch.testing.assert_close(out.weight, expected, rtol=1e-12, atol=0)
    assert bounded_returns(objective, out.log_ratio, out.log_target_ratio).tolist() == bounded
    also = float(out.weight[2].abs()) * 0.9  # this bound holds for the weight where P = 0, and it may bound others too
    both = loss(objective, backend, on_policy=on_policy, max_weight=also)
    over = (out.weight.abs() > also).tolist()
    assert over[2] and int(both.n_clipped) == sum(a or b for a, b in zip(bounded, over, strict=True))
    assert int(loss(Objective("alpha", alpha=alpha), backend).n_clipped) == 0


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_leave_one_out_averages_the_bounded_returns(backend: str) -> None:
    """On-policy, returns are known before the forward. They are those of the objective, with factor and bound."""
    plain = {"alpha": 0.25, "normalize_alpha": False, "max_return": 0.5}
    returns = loss(Objective("alpha", **plain), backend, on_policy=True).weight
    out = loss(Objective("alpha", baseline="leave_one_out", **plain), backend, on_policy=True)
    others = (returns.sum() - returns) / 4
    torch.testing.assert_close(out.weight[:4], (returns - others)[:4], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, INF, "ten", True])
def test_bounds_that_are_none(value: Any) -> None:
    with pytest.raises(ValueError, match="max_return must be a positive finite number or None, got"):
        Objective("alpha", alpha=0.5, max_return=value)


@pytest.mark.parametrize("given", [{"alpha": 1.0}, {"alpha": 2.0}, {}])
def test_max_return_needs_an_alpha_below_one(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="max_return bounds the return of objective 'alpha' with alpha below 1; got"):
        Objective("alpha" if given else "js", max_return=10.0, **given)


SPACE = Space()
BASE, PROPOSAL, POLICY = SPACE.log_prob(SPACE.table(1)), SPACE.log_prob(SPACE.table(2)), SPACE.table(3)
TARGETS = {"hard": hard_target(BASE), "soft": soft_target(BASE, SPACE.tokens)}


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.25, 0.9, 0.999, 1.0, 1.5, 2.0])
def test_the_expected_gradient_is_the_divergence_s(alpha: float, target: str, on_policy: bool, backend: str) -> None:
    """It equals autograd's gradient of D = (1 - sum p^(1-alpha) pi^alpha) / (alpha (1 - alpha)) over all sequences."""
    if alpha >= 1 and target == "hard":
        return
    p = TARGETS[target]
    table = POLICY.clone().requires_grad_()
    log_pi = SPACE.log_prob(table)
    there = p.p > 0
    log_ratio = (p.log_score - p.z.log())[there] - log_pi[there]
    if alpha == 0:
        divergence = (p.p[there] * log_ratio).sum()
    elif alpha == 1:
        divergence = -(log_pi.exp() * log_ratio).sum()
    else:
        mean = (log_pi[there] + (1 - alpha) * log_ratio).exp().sum()
        divergence = (1 - mean) / (alpha * (1 - alpha))
    divergence.backward()

    leaf = POLICY.clone().requires_grad_()
    log_q = log_pi.detach() if on_policy else PROPOSAL
    dtype = torch.float32 if backend == "cpu" else torch.float64
    out = dmfast.dm_loss(
        SPACE.logits(leaf).to(dtype), SPACE.tokens, objective=Objective("alpha", alpha=alpha), log_target=p.log_score,
        log_proposal=log_q, log_z=p.z.log(), on_policy=on_policy, reduction="none", backend=backend,
    )  # fmt: skip
    (out.loss @ log_q.exp()).backward()
    # Where P = 0, A has a factor of 1/(1 - alpha). It cancels in the expectation, but its rounding errors do not.
    tolerance = (2e-6 if backend == "cpu" else 1e-12) * max(1.0, 1 / abs(1 - alpha) if alpha != 1 else 1.0)
    torch.testing.assert_close(leaf.grad, table.grad, rtol=0, atol=tolerance * max(float(table.grad.abs().max()), 1))


def exact_divergence(alpha: float, target: Target, log_pi: torch.Tensor) -> float:
    """Return D = (1 - sum p^(1-alpha) pi^alpha)/(alpha (1-alpha)) over all sequences, or its limit at 0 or 1."""
    p, pi = target.p, log_pi.exp()
    if alpha == 0:
        return float(torch.xlogy(p, p).sum() - torch.xlogy(p, pi).sum())
    if alpha == 1:
        return float((pi * (log_pi - p.log())).sum())
    return float((1 - (p ** (1 - alpha) * pi**alpha).sum()) / (alpha * (1 - alpha)))


CRITERION = [(a, t) for a in (-1.0, 0.0, 1e-9, 0.25, 0.75, 0.999, 1 - 1e-9, 1.0, 1.5) for t in TARGETS
             if a < 1 or t == "soft"]  # fmt: skip


@pytest.mark.parametrize(("alpha", "target"), CRITERION)
def test_the_divergence_of_pi_and_of_q_by_enumeration(alpha: float, target: str) -> None:
    """If each sequence counts as often as q draws it, the estimates and their paired difference are exact.

    This also holds at the limits 0 and 1 and beside them, where the plain formula is 0/0.
    """
    log_pi, p = SPACE.log_prob(POLICY), TARGETS[target]
    scores = log_pi, PROPOSAL, p.log_score, p.z.log().expand(SPACE.n)
    found = estimate(*scores, sample_weight=PROPOSAL.exp(), alpha=alpha)
    near = {1e-9: 0.0, 1 - 1e-9: 1.0}.get(alpha, alpha) if target == "soft" else alpha
    of_pi, of_q = (exact_divergence(near, p, each) for each in (log_pi, PROPOSAL))
    # Beside its limits the reference is less exact. On the soft target it is the limit, which differs by 1e-9. On the
    # hard target the plain formula has an error of 1e-7 at alpha = 1e-9.
    tolerance = 1e-6 if near != alpha or abs(alpha - 1) < 1e-3 or 0 < alpha < 1e-3 else 1e-11
    assert found.alpha_policy is not None and found.alpha_proposal is not None
    assert found.alpha_policy.value == pytest.approx(of_pi, rel=tolerance)
    assert found.alpha_proposal.value == pytest.approx(of_q, rel=tolerance)
    check = nearer("alpha", *scores, PROPOSAL.exp(), alpha)
    assert check.value == pytest.approx(of_q - of_pi, rel=tolerance * 10)
    assert {"alpha_policy", "alpha_policy_stderr", "alpha_proposal"} <= found.as_dict().keys()
    assert "alpha_policy" not in estimate(*scores).as_dict()


@pytest.mark.parametrize(
    ("alpha", "target"), [(0.0, "soft"), (0.5, "hard"), (0.9, "hard"), (0.999, "soft"), (0.999, "hard"), (1.0, "soft")]
)
def test_standard_errors_of_the_criterion(alpha: float, target: str) -> None:
    """The standard errors have the right size, as 300 repetitions show.

    Near alpha = 1 they are still small against the difference that they belong to. The plain formula would vary with
    rho/(1 - alpha).
    """
    base, log_q = SPACE.log_prob(SPACE.table(1, 0.5)), SPACE.log_prob(SPACE.table(2, 0.25))
    soft = soft_target(base, SPACE.tokens)
    p = soft if target == "soft" else hard_target(base)
    log_pi = SPACE.log_prob(torch.lerp(SPACE.table_of(log_q.exp()), SPACE.table_of(soft.p), 0.3))
    generator, found = torch.Generator().manual_seed(8), []
    exact = exact_divergence(alpha, p, log_q) - exact_divergence(alpha, p, log_pi)
    for _ in range(300):
        which = torch.multinomial(log_q.exp(), 1000, replacement=True, generator=generator)
        scores = log_pi[which], log_q[which], p.log_score[which], p.z.log().expand(1000)
        check = nearer("alpha", *scores, torch.ones(1000).double(), alpha)
        found.append((check.value - exact) / check.stderr)
    errors = torch.tensor(found)
    assert abs(float(errors.mean())) < 0.25
    assert 0.85 < float(errors.std()) < 1.15
    if target == "soft":
        assert check.stderr < 0.25 * abs(exact)


def test_the_criterion_stays_where_it_is_infinite() -> None:
    """From alpha = 1 on both divergences are infinite where P = 0. Two samples say nothing of an error."""
    log_pi, p = SPACE.log_prob(POLICY), TARGETS["hard"]
    scores = log_pi, PROPOSAL, p.log_score, p.z.log().expand(SPACE.n)
    for alpha in (1.0, 1.5):
        assert math.isnan(nearer("alpha", *scores, PROPOSAL.exp(), alpha).value)
        assert estimate(*scores, alpha=alpha).alpha_policy.value == INF
    two = [x[:2] for x in (log_pi, PROPOSAL, TARGETS["soft"].log_score, scores[3])]
    assert math.isnan(nearer("alpha", *two, torch.ones(2).double(), 0.5).stderr)


def test_exact_weight_is_itself_right_at_one() -> None:
    """The reference in 50 digits has a limit at alpha = 1 to which its neighbours tend."""
    terms = one(log_proposal=-21.0, log_target=-18.0, log_z=0.5, reward=0.0, log_base=-20.0, baseline=0.75)
    at, near = (exact_weight(Objective("alpha", alpha=a), False, -20.0, terms)[0] for a in (1.0, 1 - 2**-40))
    assert abs(at - near) < 1e-10 * abs(at) and mpmath.isfinite(at)
