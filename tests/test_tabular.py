"""Test every objective against the exact gradient of what it is said to minimise.

The space is all 125 sequences of length 3 over 5 symbols. The divergence D is written here as a function of the 125
probabilities pi(x), and autograd differentiates it. dmfast's expected gradient under q is exact too, because the batch
is the whole space and sequence x counts q(x) times. The tests run off-policy and on-policy, with baselines
(leave-one-out by enumerating all pairs), under temperature and softcap, through the compiled kernels (fp32 logits) and
the oracle (fp64).

The loss's gradient is -sum_x q A grad log pi = -sum_x r(x) grad pi(x). So r must be -dD/dpi(x) up to a constant. The
constant is a baseline, because sum_x grad pi(x) = 0.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tabular import (
    Space,
    Target,
    hard_target,
    js,
    kl,
    one_thread,  # noqa: F401
    soft_target,
    tv,
)

import dmfast
from dmfast import Objective
from dmfast.objectives import OBJECTIVES

SPACE = Space()
BASE = SPACE.log_prob(SPACE.table(1))
PROPOSAL = SPACE.log_prob(SPACE.table(2))
POLICY = SPACE.table(3)
REWARD = torch.randn(SPACE.n, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
TARGETS = {"hard": hard_target(BASE), "soft": soft_target(BASE, SPACE.tokens)}
BETA, LOG_SCALE, ALPHA = 0.4, -2.3, 0.3

# each objective minimises this D; below, t = pi/p, and r is -dD/dpi up to a constant
FUNCTIONS = {
    "dpg": lambda pi, p, P: kl(p, pi),  # dD/dpi = -p/pi
    "gdc++": lambda pi, p, P: kl(p, pi),  # D is the same, and the baseline is 1
    "reverse_kl": lambda pi, p, P: kl(pi, p),  # dD/dpi = log t + 1
    # dJS/dpi = log(pi/m)/2 = log(2t/(1+t))/2 = -(softplus(-log t) - log 2)/2; r is twice that, so D = 2 JS
    "js": lambda pi, p, P: 2 * js(p, pi),
    "tv": lambda pi, p, P: tv(p, pi),  # dD/dpi = sign(pi - p)/2 = sign(log t)/2
    "chi2": lambda pi, p, P: ((p - pi) ** 2 / pi).sum(),  # = sum p^2/pi - 1; dD/dpi = -(p/pi)^2
    "reverse_chi2": lambda pi, p, P: ((pi - p) ** 2 / p).sum(),  # = sum pi^2/p - 1; dD/dpi = 2t
    # dD/dpi = -(p/pi)^(1 - alpha) / (1 - alpha)
    "alpha": lambda pi, p, P: (1 - (p ** (1 - ALPHA) * pi**ALPHA).sum()) / (ALPHA * (1 - ALPHA)),
    "reinforce": lambda pi, p, P: -(pi * REWARD).sum(),
    "reinforce_p": lambda pi, p, P: -(pi * P * math.exp(-LOG_SCALE)).sum(),
    # dD/dpi = -R + beta (log pi - log a + 1)
    "kl_control": lambda pi, p, P: -(pi * REWARD).sum() + BETA * kl(pi, BASE.exp()),
}
# A is the gradient of FACTORS[name] times the usual divergence
FACTORS = {"js": 2.0}
PARAMETERS = {"kl_control": {"beta": BETA}, "reinforce_p": {"log_scale": LOG_SCALE}, "alpha": {"alpha": ALPHA}}
INFINITE_AT_ZERO = ("reverse_kl", "reverse_chi2")
MODES = ("off_policy", "on_policy", "on_policy_stored")  # with "stored" a call gets the sampler's log-probabilities
CASES = [
    pytest.param(name, target, id=f"{name}-{target}")
    for name in OBJECTIVES
    for target in TARGETS
    if not (name in INFINITE_AT_ZERO and target == "hard")
]
SOFT_CASES = [pytest.param(name, "soft", id=name) for name in OBJECTIVES]

BACKENDS = {
    "kernel": SimpleNamespace(dm_loss=dmfast.dm_loss, dtype=torch.float32, rtol=2e-6),
    "oracle": SimpleNamespace(dm_loss=dmfast.eager.dm_loss, dtype=torch.float64, rtol=1e-12),
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]


def objective(name, **kwargs):
    return Objective(name, **PARAMETERS.get(name, {}), **kwargs)


def inputs(target: Target, mode: str, log_pi):
    """Return the per-sequence inputs of a call, and q."""
    log_q = PROPOSAL if mode == "off_policy" else log_pi.detach()
    kwargs = {
        "on_policy": mode != "off_policy",
        "log_proposal": None if mode == "on_policy" else log_q,
        "log_target": target.log_score,
        "log_z": target.z.log(),
        "reward": REWARD,
        "log_base": BASE,
    }
    return kwargs, log_q.exp()


def expected_gradient(backend, objective, target, mode, table=POLICY, one_by_one=False, **options):
    """Return the exact expectation under q of the loss's gradient with respect to the table, and the call's output.

    One by one, each sequence is a call of its own with reduction="mean", in one pass where the weight is known.
    """
    table = table.clone().requires_grad_()
    kwargs, q = inputs(target, mode, SPACE.log_prob(table, **options))
    logits = SPACE.logits(table).to(backend.dtype)
    if one_by_one:
        kwargs["log_z"] = kwargs["log_z"].expand(SPACE.n)
        rows = [
            {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()} for i in range(SPACE.n)
        ]
        outs = [
            backend.dm_loss(logits[i : i + 1], SPACE.tokens[i : i + 1], objective=objective, **row, **options)
            for i, row in enumerate(rows)
        ]
        torch.stack([o.loss for o in outs]).dot(q).backward()
        return table.grad, outs
    out = backend.dm_loss(logits, SPACE.tokens, objective=objective, reduction="none", **kwargs, **options)
    (out.loss @ q).backward()
    return table.grad, out


def exact_gradient(name, target, table=POLICY, **options):
    table = table.clone().requires_grad_()
    pi = SPACE.log_prob(table, **options).exp()
    FUNCTIONS[name](pi, target.p, target.log_score.exp()).backward()
    return table.grad


def assert_close(actual, expected, backend, scale=None):
    scale = max(float(expected.abs().max()), scale or 0.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=backend.rtol * scale)


def test_space_is_whole():
    """The reference's own probabilities sum to 1, and a distribution's table gives it back."""
    for log_p in (BASE, PROPOSAL, SPACE.log_prob(POLICY, temperature=1.7, softcap=2.0)):
        assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-14)
    p = TARGETS["soft"].p
    torch.testing.assert_close(SPACE.log_prob(SPACE.table_of(p)).exp(), p, rtol=1e-13, atol=0)
    assert 20 < int((TARGETS["hard"].p == 0).sum()) < 70
    assert all(abs(float(t.z.log())) > 0.1 for t in TARGETS.values())
    assert set(FUNCTIONS) == set(OBJECTIVES)


def test_factors():
    """Compared with the usual normalisation of each divergence, only js has a factor."""
    usual = {"js": js, "tv": tv, "dpg": kl, "reverse_kl": lambda p, pi: kl(pi, p)}
    pi, target = SPACE.log_prob(POLICY).exp(), TARGETS["soft"]
    for name, divergence in usual.items():
        value = float(FUNCTIONS[name](pi, target.p, None))
        assert value == pytest.approx(FACTORS.get(name, 1.0) * float(divergence(target.p, pi)), rel=1e-12)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.7}, {"temperature": 0.6, "softcap": 1.5}],
    ids=["plain", "temperature", "softcap"],
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "target"), CASES)
def test_expected_gradient(backend, name, target, mode, options):
    target = TARGETS[target]
    gradient, out = expected_gradient(backend, objective(name), target, mode, **options)
    assert_close(gradient, exact_gradient(name, target, **options), backend)
    log_pi = SPACE.log_prob(POLICY, **options)
    log_q = PROPOSAL if mode == "off_policy" else log_pi
    tolerance = {"rtol": 0, "atol": 10 * backend.rtol}
    torch.testing.assert_close(out.log_prob, log_pi, **tolerance)
    torch.testing.assert_close(out.log_ratio, log_pi - log_q, **tolerance)
    torch.testing.assert_close(out.log_target_ratio, target.p.log() - log_q, **tolerance)
    torch.testing.assert_close(out.loss, -out.weight * out.log_prob)
    if mode != "off_policy":
        assert bool((out.log_ratio == 0).all())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "target"), SOFT_CASES)
def test_expected_gradient_one_pass(backend, name, target, mode):
    gradient, _ = expected_gradient(backend, objective(name), TARGETS[target], mode, one_by_one=True)
    assert_close(gradient, exact_gradient(name, TARGETS[target]), backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "target"), [c for c in CASES if c.values[0] != "gdc++"])
def test_constant_baseline_changes_no_expectation(backend, name, target, mode):
    target = TARGETS[target]
    exact = exact_gradient(name, target)
    plain = expected_gradient(backend, objective(name), target, mode)[1].weight
    for value in (0.7, -0.7):
        baseline = value if value > 0 else torch.full((SPACE.n,), value, dtype=torch.float64)
        gradient, out = expected_gradient(backend, objective(name, baseline=baseline), target, mode)
        assert_close(gradient, exact, backend, scale=1.0)
        torch.testing.assert_close(out.weight, plain - value * out.log_ratio.exp(), rtol=1e-14, atol=1e-12)


@pytest.mark.parametrize("baseline", [None, 0.7])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "target"), [c for c in CASES if c.values[0] in dmfast.objectives.TARGET_OBJECTIVES])
def test_unnormalised_is_z_times(backend, name, target, mode, baseline):
    target = TARGETS[target]
    baseline = None if name == "gdc++" else baseline
    gradient, out = expected_gradient(
        backend, objective(name, normalize=False, baseline=baseline), target, mode, one_by_one=False
    )
    _, normalised = expected_gradient(backend, objective(name, baseline=baseline), target, mode)
    torch.testing.assert_close(out.weight, target.z * normalised.weight, rtol=1e-11, atol=1e-12)
    assert_close(gradient, target.z * exact_gradient(name, target), backend, scale=1.0)


def test_gdcpp_is_dpg_with_baseline_one(backend):
    """A is (p - pi)/q for each sequence, and it has the paper's baseline Z*pi/q on the paper's scale."""
    target, pi, q = TARGETS["hard"], SPACE.log_prob(POLICY).exp(), PROPOSAL.exp()
    weight = expected_gradient(backend, "gdc++", target, "off_policy")[1].weight
    assert_close(weight, (target.p - pi) / q, backend)
    dpg = expected_gradient(backend, Objective("dpg", baseline=1.0), target, "off_policy")[1].weight
    assert torch.equal(weight, dpg)
    paper = expected_gradient(backend, Objective("gdc++", normalize=False), target, "off_policy")[1].weight
    assert_close(paper, target.log_score.exp() / q - target.z * pi / q, backend)


def test_contexts_have_their_own_z(backend):
    """Two contexts in one batch, each with its policy, target and Z, give the mean of their exact gradients."""
    tables, targets = [POLICY, SPACE.table(11)], [TARGETS["hard"], TARGETS["soft"]]
    leaves = [t.clone().requires_grad_() for t in tables]
    log_z = torch.cat([t.z.log().expand(SPACE.n) for t in targets])
    out = backend.dm_loss(
        torch.cat([SPACE.logits(t) for t in leaves]).to(backend.dtype),
        SPACE.tokens.repeat(2, 1),
        log_target=torch.cat([t.log_score for t in targets]),
        log_proposal=PROPOSAL.repeat(2),
        log_z=log_z,
        objective="js",
        reduction="none",
    )
    (out.loss @ PROPOSAL.exp().repeat(2) / 2).backward()
    for leaf, table, target in zip(leaves, tables, targets, strict=True):
        assert_close(leaf.grad, exact_gradient("js", target, table) / 2, backend)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", MODES)
def test_own_objective(backend, mode, target):
    """A user's function of Terms gives the squared Hellinger distance, r = sqrt(p/pi), so A = sqrt(u rho)."""
    target = TARGETS[target]
    table = POLICY.clone().requires_grad_()
    (SPACE.log_prob(table).exp().sqrt() - target.p.sqrt()).square().sum().backward()

    def hellinger(terms):
        return ((terms.log_target_ratio + terms.log_ratio) / 2).exp()

    gradient, _ = expected_gradient(backend, hellinger, target, mode)
    assert_close(gradient, table.grad, backend)


PAIRS = Space(length=2)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("reinforce", "on_policy"),
        ("reinforce", "off_policy"),
        ("reinforce_p", "off_policy"),
        ("dpg", "off_policy"),
        ("dpg", "on_policy_stored"),
        ("reverse_kl", "on_policy_stored"),
        ("js", "on_policy_stored"),
        ("kl_control", "on_policy_stored"),
    ],
)
def test_leave_one_out_is_unbiased(backend, name, mode):
    """All 625 pairs of the 25 sequences of length 2 give the exact expectation of the gradient of a step with B = 2.

    ``leave_one_out`` takes a call for each pair, and either order of a pair is the same call. ``leave_one_out_context``
    takes one call, in which each pair is a context.
    """
    policy, base, log_q = PAIRS.table(21), PAIRS.log_prob(PAIRS.table(22)), PAIRS.log_prob(PAIRS.table(23))
    target, reward = soft_target(base, PAIRS.tokens), REWARD[: PAIRS.n]
    if mode != "off_policy":
        log_q = PAIRS.log_prob(policy)
    first, second = torch.cartesian_prod(torch.arange(PAIRS.n), torch.arange(PAIRS.n)).unbind(1)
    pair_probability = (log_q[first] + log_q[second]).exp()
    per_sequence = {"log_target": target.log_score, "reward": reward, "log_base": base}
    if mode != "on_policy":
        per_sequence["log_proposal"] = log_q
    common = {"log_z": float(target.z.log()), "on_policy": mode != "off_policy"}

    def call(table, which, baseline, normalize=True, **kwargs):
        return backend.dm_loss(
            PAIRS.logits(table)[which].to(backend.dtype),
            PAIRS.tokens[which],
            objective=objective(name, baseline=baseline, normalize=normalize),
            **{k: v[which] for k, v in per_sequence.items()},
            **common,
            **kwargs,
        )

    def gradient(loss_of):
        table = policy.clone().requires_grad_()
        loss_of(table).backward()
        return table.grad

    everything = torch.arange(PAIRS.n)
    plain = gradient(lambda table: call(table, everything, None, reduction="none").loss @ log_q.exp())
    which = torch.stack([first, second], 1)
    in_contexts = gradient(
        lambda table: call(
            table,
            which.reshape(-1),
            "leave_one_out_context",
            context_id=torch.arange(len(first)).repeat_interleave(2),
            reduction="none",
        ).loss.reshape(-1, 2).mean(1) @ pair_probability
    )  # fmt: skip
    ordered, twice = first <= second, torch.where(first < second, 2.0, 1.0)
    in_calls = gradient(
        lambda table: torch.stack([call(table, pair, "leave_one_out").loss for pair in which[ordered]]).dot(
            (twice * pair_probability)[ordered]
        )
    )
    assert_close(in_contexts, plain, backend, scale=1.0)
    assert_close(in_calls, plain, backend, scale=1.0)
    weights = [call(policy, which[7], b).weight for b in (None, "leave_one_out")]  # the baseline changes something
    assert not torch.allclose(weights[0], weights[1], rtol=1e-3)
    if name == "dpg":
        unnormalised = call(policy, which[7], "leave_one_out", normalize=False).weight
        torch.testing.assert_close(unnormalised, target.z * weights[1], rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("dpg", "on_policy")]
    + [(n, m) for n in ("reverse_kl", "js", "tv", "chi2", "reverse_chi2", "alpha", "kl_control") for m in MODES[:2]],
)
def test_leave_one_out_is_refused_where_returns_are_unknown(backend, name, mode):
    """r is known before the forward only for dpg off-policy and for rewards that do not depend on pi."""
    with pytest.raises(ValueError, match=r"leave_one_out.*known before the forward"):
        expected_gradient(backend, objective(name, baseline="leave_one_out"), TARGETS["soft"], mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", sorted(dmfast.objectives.TARGET_OBJECTIVES - {"tv"}))  # tv has a kink at pi = p
def test_stationary_at_the_optimum(backend, name, mode):
    """At pi = p the expected gradient is 0. Each weight is 0 for gdc++, and where r = f(t) with f(1) = 0."""
    target = TARGETS["soft"]
    table = SPACE.table_of(target.p)
    gradient, out = expected_gradient(backend, objective(name), target, mode, table=table)
    assert_close(gradient, torch.zeros_like(gradient), backend, scale=1.0)
    if name not in ("dpg", "reverse_kl"):  # these have r = 1 and r = -1 at pi = p
        assert_close(out.weight, torch.zeros_like(out.weight), backend, scale=10 * float(out.log_ratio.exp().max()))


@pytest.mark.parametrize("mode", MODES)
def test_variance_of_gdcpp_below_dpg(backend, mode):
    """Near the optimum the exact variance of a one-sequence gradient, sum_x q |A g - mean|^2, is smaller with gdc++."""
    target = TARGETS["soft"]
    for distance, factor in ((0.3, 0.5), (0.03, 0.01)):
        table = SPACE.table_of(target.p) + distance * SPACE.table(31)
        jacobian = torch.autograd.functional.jacobian(SPACE.log_prob, table).reshape(SPACE.n, -1)
        log_q = PROPOSAL if mode == "off_policy" else SPACE.log_prob(table)
        variance = {}
        for name in ("dpg", "gdc++"):
            weight = expected_gradient(backend, name, target, mode, table=table)[1].weight
            terms = weight[:, None] * jacobian
            mean = log_q.exp() @ terms
            variance[name] = float(log_q.exp() @ (terms - mean).square().sum(1))
        assert variance["gdc++"] < factor * variance["dpg"]


@pytest.mark.parametrize("baseline", [None, 0.7])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_limit_where_the_target_is_zero(backend, name, mode, baseline):
    """A at P = 0 is the limit of A along P -> 0 under a fixed Z. Infinite ones grow, and max_weight bounds them."""
    kwargs, _ = inputs(TARGETS["hard"], mode, SPACE.log_prob(POLICY))
    value = objective(name, baseline=None if name == "gdc++" else baseline)

    def weights(log_target, **more):
        tensor = torch.full((SPACE.n,), log_target, dtype=torch.float64)
        logits = SPACE.logits(POLICY).to(backend.dtype)
        return backend.dm_loss(logits, SPACE.tokens, objective=value, **{**kwargs, "log_target": tensor}, **more)

    if name in INFINITE_AT_ZERO:
        far = [weights(x).weight for x in (-20.0, -40.0, -60.0)]
        assert bool((far[1] < far[0]).all() and (far[2] < far[1]).all() and (far[2] < 0).all())
        with pytest.raises(ValueError, match=r"infinite where P\(x\) = 0.*gdc\+\+"):
            weights(-math.inf)
        out = weights(-math.inf, max_weight=5.0)
        assert bool((out.weight == -5).all())
        assert int(out.n_clipped) == SPACE.n
        return
    out = weights(-math.inf)
    assert bool(out.weight.isfinite().all())
    for log_target in (-60.0, -600.0):
        torch.testing.assert_close(weights(log_target).weight, out.weight, rtol=0, atol=1e-15 * 1e3)
    assert bool((out.log_target_ratio == -math.inf).all())
