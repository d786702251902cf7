"""Test estimators against exact values on all 125 sequences of a tabular model.

The tests hold the expectation under q, the standard errors (against Monte-Carlo repetition), P = 0, scales that
underflow, the running Z and the running window of steps.
"""

from __future__ import annotations

import io
import math

import pytest
import torch
from tabular import (
    Space,
    Target,
    counts,
    hard_target,
    js,
    kl,
    one_thread,  # noqa: F401
    soft_target,
    tv,
)

import dmfast
from dmfast import estimators
from dmfast.estimators import (
    PartitionFunction,
    PartitionFunctions,
    RunningEstimates,
    effective_sample_size,
    estimate,
    estimate_log_z,
    estimate_moments,
)

SPACE = Space()
BASE = SPACE.log_prob(SPACE.table(1, 0.5))
TARGETS = {"hard": hard_target(BASE), "soft": soft_target(BASE, SPACE.tokens)}
COUNTS = counts(SPACE.log_prob(SPACE.table(2, 0.25)).exp())
Q = COUNTS / COUNTS.sum().double()
LOG_Q = Q.log()
LOG_PI = SPACE.log_prob(SPACE.table(3, 0.5))
FEATURES = torch.stack([(SPACE.tokens == 0).any(1), SPACE.tokens.sum(1)], 1).double()


def exact(target):
    p, pi = target.p, LOG_PI.exp()
    return {
        "log_z": float(target.z.log()),
        "kl_policy": float(kl(p, pi)),
        "kl_proposal": float(kl(p, Q)),
        "tvd_policy": float(tv(p, pi)),
        "tvd_proposal": float(tv(p, Q)),
        "js_policy": float(js(p, pi)),
        "js_proposal": float(js(p, Q)),
        "ess": float(1 / (p**2 / Q).sum()),  # this is ess as a fraction of the samples
    }


def values(estimates):
    return {name: e.value for name, e in vars(estimates).items() if e is not None}


def outputs(target, which=slice(None), log_z=None, **kwargs):
    """Return what dm_loss returns for sequences from q."""
    kwargs = {"log_proposal": LOG_Q[which]} | kwargs
    return dmfast.eager.dm_loss(
        SPACE.logits(SPACE.table(3, 0.5))[which],
        SPACE.tokens[which],
        log_target=target.log_score[which],
        log_z=target.z.log() if log_z is None else log_z,
        **kwargs,
    )


def draws(n, generator):
    return torch.multinomial(Q, max(n, 1), replacement=True, generator=generator)[:n]


@pytest.mark.parametrize("how", ["repeated", "weighted"])
@pytest.mark.parametrize("name", TARGETS)
def test_expectation_is_exact(name, how):
    """The mean is the expectation, over 2,000 sequences in proportion to q or over all 125 with sample_weight q."""
    target = TARGETS[name]
    which = torch.arange(SPACE.n).repeat_interleave(COUNTS) if how == "repeated" else torch.arange(SPACE.n)
    weight = None if how == "repeated" else Q
    log_p, log_q = target.log_score[which], LOG_Q[which]
    result = values(estimate(LOG_PI[which], log_q, log_p, target.z.log(), sample_weight=weight))
    n = 2000 if how == "repeated" else float(1 / Q.square().sum())
    result["ess"] /= n
    assert result == pytest.approx(exact(target), rel=1e-11)
    alone = estimate_log_z(log_p - log_q, weight), estimators.effective_sample_size(log_p - log_q, weight)
    assert [e.value for e in alone] == pytest.approx([result["log_z"], result["ess"] * n], rel=1e-12)
    moments = estimators.estimate_moments(FEATURES[which], log_p - log_q, weight)
    assert [m.value for m in moments] == pytest.approx((target.p @ FEATURES).tolist(), rel=1e-12)
    plain = estimators.estimate_moments(FEATURES[which], torch.zeros(len(which)), weight)
    assert [m.value for m in plain] == pytest.approx((Q @ FEATURES).tolist(), rel=1e-12)


@pytest.mark.parametrize("z", ["known", "of the sequences", "of each half"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_standard_errors(name, weighted, z):
    """(estimate - exact) / stderr has mean about 0 and deviation about 1 in 150 repetitions of 2,000 sequences."""
    target, generator = TARGETS[name], torch.Generator().manual_seed(5)
    truth, n = exact(target), 2000
    sample_weight = 1 + 2 * torch.rand(n, dtype=torch.float64, generator=generator) if weighted else None
    size = n if sample_weight is None else float(sample_weight.sum() ** 2 / sample_weight.square().sum())
    truth["ess"] *= size
    truth |= {f"moment_{k}": v for k, v in enumerate((target.p @ FEATURES).tolist())}
    scores: dict[str, list[float]] = {key: [] for key in truth}
    for _ in range(150):
        which = draws(n, generator)
        log_p, log_q = target.log_score[which], LOG_Q[which]
        log_z, z_of = target.z.log(), None
        if z != "known":
            z_of = torch.arange(n) % (2 if z == "of each half" else 1)
            g = torch.ones(n) if sample_weight is None else sample_weight
            of_context = [estimate_log_z((log_p - log_q)[z_of == c], g[z_of == c]).value for c in z_of.unique()]
            log_z = torch.tensor(of_context).double()[z_of]
        estimates = estimate(LOG_PI[which], log_q, log_p, log_z, sample_weight=sample_weight, z_of=z_of)
        # Estimates of the alpha divergence are None without alpha.
        found = {key: e for key, e in vars(estimates).items() if e is not None}
        for k, moment in enumerate(estimators.estimate_moments(FEATURES[which], log_p - log_q, sample_weight)):
            found[f"moment_{k}"] = moment
        for key, e in found.items():
            scores[key].append((e.value - truth[key]) / e.stderr)
    for key, all_scores in scores.items():
        standard = torch.tensor(all_scores)
        assert abs(float(standard.mean())) < 0.2, key
        assert 0.8 < float(standard.std()) < 1.2, key


@pytest.mark.parametrize("distance", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("name", TARGETS)
def test_standard_error_of_an_evaluation_near_p_and_far_from_it(name, distance):
    """With x ~ pi and Z from the same sequences, KL(p||pi) varies over 200 repetitions as its standard error states."""
    target, generator = TARGETS[name], torch.Generator().manual_seed(7)
    # Where P = 0, pi has a twentieth of its mass, as a policy near a pointwise target has.
    near = torch.where(target.p > 0, 0.95 * target.p, 0.05 / (target.p == 0).sum().clamp(min=1))
    away = SPACE.log_prob(SPACE.table(11, distance))
    log_pi = (near.log() + away - away.mean()).log_softmax(0)
    truth = float(kl(target.p, log_pi.exp()))
    contexts, found = torch.zeros(2000, dtype=torch.int64), []
    for _ in range(200):
        which = torch.multinomial(log_pi.exp(), 2000, replacement=True, generator=generator)
        x, log_p = log_pi[which], target.log_score[which]
        found.append(estimate(x, x, log_p, estimate_log_z(log_p - x).value, z_of=contexts).kl_policy)
    values = torch.tensor([e.value for e in found]).double()
    stated = torch.tensor([e.stderr for e in found]).double().mean()
    assert float(values.mean()) == pytest.approx(truth, abs=0.2 * float(stated))
    assert float(values.std() / stated) == pytest.approx(1, abs=0.15)


def test_standard_errors_shrink_with_n():
    """With four times the samples, every standard error is half as large."""
    target = TARGETS["hard"]
    once = torch.arange(SPACE.n).repeat_interleave(COUNTS)
    small, large = (estimate(LOG_PI[w], LOG_Q[w], target.log_score[w], target.z.log()) for w in (once, once.repeat(4)))
    for name, e in vars(small).items():
        if e is None:  # estimates of the alpha divergence are None without alpha
            continue
        factor = 2.0 if name == "ess" else 0.5  # ess counts sequences, so it grows with the samples
        assert getattr(large, name).stderr == pytest.approx(factor * e.stderr, rel=1e-3), name


@pytest.mark.parametrize(
    ("weights", "ess"),
    [([2.5] * 8, 8), ([0, 0, 4, 0], 1), ([1, 0, 1, 0, 1, 0], 3), ([1, 3], 1.6), ([7], 1), ([0, 0], 0), ([], 0)],
)
def test_effective_sample_size_known_answers(weights, ess):
    log_w = torch.tensor(weights, dtype=torch.float64).log()
    assert estimators.effective_sample_size(log_w).value == pytest.approx(ess, abs=1e-14)
    assert estimators.effective_sample_size(log_w - 900).value == pytest.approx(ess, abs=1e-11)
    twice = torch.full_like(log_w, 2.0)
    assert estimators.effective_sample_size(log_w, twice).value == pytest.approx(ess, abs=1e-14)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("shift", [-900.0, 900.0])
def test_scale_of_the_score_drops_out(name, shift):
    """P times e^-900 underflows and P times e^900 overflows fp64; log Z moves and nothing else does."""
    target = TARGETS[name]
    there = estimate(LOG_PI, LOG_Q, target.log_score, target.z.log(), sample_weight=Q).as_dict()
    moved = estimate(LOG_PI, LOG_Q, target.log_score + shift, target.z.log() + shift, sample_weight=Q).as_dict()
    assert moved.pop("log_z") == pytest.approx(there.pop("log_z") + shift, rel=1e-12)
    assert moved == pytest.approx(there, rel=1e-9)


def test_zero_scores():
    """Sequences with P = 0 count in every mean; with P = 0 everywhere nothing is known, and nothing raises."""
    log_pi, log_q = torch.tensor([-2.0, -3.0]).double(), torch.tensor([-1.0, -2.0]).double()
    one = estimate(log_pi[:1], log_q[:1], torch.tensor([-1.5]).double(), -0.5)
    two = estimate(log_pi, log_q, torch.tensor([-1.5, -math.inf]).double(), -0.5)
    assert two.log_z.value == pytest.approx(one.log_z.value - math.log(2))
    for name in ("tvd_policy", "tvd_proposal"):
        assert getattr(two, name).value == pytest.approx(getattr(one, name).value / 2)
    assert all(math.isfinite(x) for x in two.as_dict().values())
    for n in (0, 2):
        none = estimate(log_pi[:n], log_q[:n], torch.full((n,), -math.inf).double(), -0.5, alpha=0.5)
        assert none.log_z.value == -math.inf
        assert none.ess.value == 0
        rest = [e.value for name, e in vars(none).items() if name not in ("log_z", "ess")]
        assert all(math.isnan(x) for x in rest)
        assert all(math.isnan(m.value) for m in estimators.estimate_moments(FEATURES[:n], torch.full((n,), -math.inf)))


def test_contexts_with_their_own_z():
    """With log_z of shape (N,), the estimates are the means over contexts of the exact divergences."""
    targets = list(TARGETS.values())
    log_z = torch.cat([t.z.log().expand(SPACE.n) for t in targets])
    found = estimate(
        LOG_PI.repeat(2), LOG_Q.repeat(2), torch.cat([t.log_score for t in targets]), log_z, sample_weight=Q.repeat(2)
    )
    for name in ("kl_policy", "kl_proposal", "tvd_policy", "tvd_proposal", "js_policy", "js_proposal"):
        expected = sum(exact(t)[name] for t in targets) / 2
        assert getattr(found, name).value == pytest.approx(expected, rel=1e-11), name


def test_fp32_input_is_computed_in_fp64():
    target = TARGETS["hard"]
    as_fp32 = [x.float() for x in (LOG_PI, LOG_Q, target.log_score)]
    direct = estimate(*as_fp32, target.z.log())
    assert direct.as_dict() == estimate(*[x.double() for x in as_fp32], target.z.log()).as_dict()


def test_as_dict_and_str():
    found = estimate(LOG_PI, LOG_Q, TARGETS["soft"].log_score, 0.0).as_dict()
    assert set(found) == {name + end for name in exact(TARGETS["soft"]) for end in ("", "_stderr")}
    assert str(estimators.Estimate(1.23456, 0.0321)) == "1.235 ± 0.032"


# --- the running Z ---


@pytest.mark.parametrize("shift", [0.0, -900.0])
@pytest.mark.parametrize("name", TARGETS)
def test_running_z_equals_pooled(name, shift):
    """Z of unequal steps, some with P = 0 throughout, is their log-mean-exp, weighted by sample count."""
    log_target = TARGETS[name].log_score + shift
    generator, z, seen = torch.Generator().manual_seed(6), PartitionFunction(), []
    assert z.log_z == -math.inf
    assert math.isnan(z.stderr)
    zeros = (log_target == -math.inf).nonzero()[:, 0]
    for size in (1, 7, 0, 32, -5, 300, 2):
        which = zeros[:-size] if size < 0 else draws(size, generator)
        seen.append(which)
        z.update(log_target[which], LOG_Q[which])
        # the Z of a step includes its own samples
        pooled = estimate_log_z((log_target - LOG_Q)[torch.cat(seen)])
        assert z.n == len(torch.cat(seen))
        assert z.log_z == pytest.approx(pooled.value, abs=1e-11)
        if z.n > 1 and z.log_z > -math.inf:
            # One divides by n and the other by n - 1.
            assert z.stderr == pytest.approx(pooled.stderr, rel=0.51 / (z.n - 1), abs=1e-12)
    z.reset()
    assert (z.n, z.log_z) == (0, -math.inf)
    z.update(log_target[[3, 4]], LOG_Q[[3, 4]])
    assert z.log_z == pytest.approx(estimate_log_z((log_target - LOG_Q)[[3, 4]]).value, abs=1e-11)


def test_running_z_pools_proposals():
    """q may change between steps, as every q gives Z in expectation. Here each step is the expectation of its q."""
    target, z = TARGETS["hard"], PartitionFunction()
    for q_counts in (COUNTS, counts(LOG_PI.exp(), 500)):
        which = torch.arange(SPACE.n).repeat_interleave(q_counts)
        z.update(target.log_score[which], (q_counts / q_counts.sum().double()).log()[which])
    assert z.n == 2500
    assert z.log_z == pytest.approx(float(target.z.log()), rel=1e-12)


def test_running_z_standard_error():
    target, generator, scores = TARGETS["hard"], torch.Generator().manual_seed(8), []
    for _ in range(300):
        z = PartitionFunction()
        for _ in range(10):
            which = draws(100, generator)
            z.update(target.log_score[which], LOG_Q[which])
        scores.append((z.log_z - float(target.z.log())) / z.stderr)
    scores = torch.tensor(scores)
    assert abs(float(scores.mean())) < 0.2
    assert 0.8 < float(scores.std()) < 1.2


@pytest.mark.parametrize(
    ("log_target", "log_proposal"),
    [
        ([0.0, math.nan], [0.0, 0.0]),
        ([math.inf], [0.0]),
        ([0.0], [-math.inf]),
        ([0.0], [math.nan]),
        ([0.0], [1.0, 2.0]),
    ],
)
def test_running_z_refuses_and_is_unchanged(log_target, log_proposal):
    z = PartitionFunction()
    z.update(TARGETS["hard"].log_score[:9], LOG_Q[:9])
    before = z.state_dict()
    with pytest.raises(ValueError, match="log_target"):
        z.update(torch.tensor(log_target), torch.tensor(log_proposal))
    assert z.state_dict() == before


def saved(state):
    """Return the state as it comes back from a file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_running_z_goes_on_after_a_break():
    """It goes on to the bit, also if the break comes before the first sequence with P > 0."""
    target = TARGETS["hard"]
    order = torch.cat([(target.p == 0).nonzero()[:20, 0], torch.arange(SPACE.n)]).split(10)
    for break_at in (1, 7):
        straight, resumed = PartitionFunction(), PartitionFunction()
        for i, which in enumerate(order):
            if i == break_at:
                state, resumed = saved(resumed.state_dict()), PartitionFunction()
                resumed.update(target.log_score[:3], LOG_Q[:3])  # load_state_dict replaces these samples
                resumed.load_state_dict(state)
            straight.update(target.log_score[which], LOG_Q[which])
            resumed.update(target.log_score[which], LOG_Q[which])
        assert resumed.state_dict() == straight.state_dict()
        assert (resumed.log_z, resumed.stderr) == (straight.log_z, straight.stderr)
    before = straight.state_dict()
    with pytest.raises(KeyError):
        straight.load_state_dict({"log_sum": 0.0})
    assert straight.state_dict() == before


# --- the running window ---


@pytest.mark.parametrize("name", TARGETS)
def test_window_is_exact_and_microbatches_make_one_step(name):
    """The outputs of one step in unequal microbatches give the step's estimates, which are exact under q."""
    target = TARGETS[name]
    which = torch.arange(SPACE.n).repeat_interleave(COUNTS)
    whole, cut = RunningEstimates(), RunningEstimates()
    whole.update(outputs(target, which))
    cut.update(*(outputs(target, part) for part in which.split([700, 1, 1299])))
    assert (len(whole), len(cut)) == (1, 1)
    result = values(whole.estimates())
    assert values(cut.estimates()) == pytest.approx(result, rel=1e-12)
    result["ess"] /= 2000
    assert result == pytest.approx(exact(target), rel=1e-11)


@pytest.mark.parametrize("contexts", [False, True])
def test_window_weighs_recent_steps_more(contexts):
    """A step has the weight decay^age, and each sequence its Z of that step. Steps of no weight are dropped."""
    target, generator = TARGETS["hard"], torch.Generator().manual_seed(9)
    window, steps = RunningEstimates(decay=0.5), []
    for size, log_z in ((20, 0.1), (5, 0.2), (30, 0.3)):
        which = draws(size, generator)
        log_z = torch.full_like(LOG_Q[which], log_z) + contexts * 0.1 * (which % 3)  # noqa: PLW2901
        steps.append((which, log_z))
        window.update(outputs(target, which, log_z=log_z))
    which, log_z = (torch.cat(x) for x in zip(*steps, strict=True))
    weight = torch.cat([torch.full_like(LOG_Q[w], 0.5**age) for (w, _), age in zip(steps, (2, 1, 0), strict=True)])
    expected = estimate(LOG_PI[which], LOG_Q[which], target.log_score[which], log_z, sample_weight=weight)
    assert window.estimates().as_dict() == pytest.approx(expected.as_dict(), rel=1e-12)
    assert torch.equal(window.samples()[-1], weight)
    for _ in range(50):
        window.update(outputs(target, which[:2]))
    assert len(window) <= 11  # 2^-10 < 1/1000
    window.clear()
    assert len(window) == 0
    assert window.estimates().ess.value == 0


def test_window_keeps_contexts_of_steps_apart():
    """With one context per step, and P a factor e^-12 apart, the result is as if both had come in one step."""
    hard, soft = TARGETS["hard"], Target(TARGETS["soft"].log_score - 12)
    which = torch.arange(125).repeat_interleave(COUNTS)
    apart, together = RunningEstimates(1.0), RunningEstimates(1.0)
    apart.update(outputs(hard, which))
    apart.update(outputs(soft, which))
    together.update(outputs(hard, which), outputs(soft, which))
    assert apart.estimates().as_dict() == pytest.approx(together.estimates().as_dict(), rel=1e-12)


def test_window_of_on_policy_steps():
    """Without log_proposal an on-policy step's q is its own log pi."""
    target, window = TARGETS["soft"], RunningEstimates()
    window.update(outputs(target, log_proposal=None, on_policy=True))
    assert torch.equal(window.samples()[0], window.samples()[1])
    one, other = window.estimates(), RunningEstimates()
    other.update(outputs(target, log_proposal=LOG_PI))
    assert one.as_dict() == pytest.approx(other.estimates().as_dict(), rel=1e-12)
    assert one.kl_policy.value == pytest.approx(one.kl_proposal.value, rel=1e-12)


@pytest.mark.parametrize("name", TARGETS)
def test_expectation_is_exact_where_q_is_the_policy(name):
    target, pi = TARGETS[name], LOG_PI.exp()
    found = values(estimate(LOG_PI, LOG_PI, target.log_score, target.z.log(), sample_weight=pi))
    found["ess"] *= float(pi.square().sum())
    wanted = {key: exact(target)[key.replace("proposal", "policy")] for key in found if key != "ess"}
    assert found == pytest.approx(wanted | {"ess": float(1 / (target.p**2 / pi).sum())}, rel=1e-11)


def test_window_refuses_and_is_unchanged():
    window = RunningEstimates()
    window.update(outputs(TARGETS["hard"]))
    no_target = dmfast.eager.dm_loss(
        SPACE.logits(SPACE.table(3)), SPACE.tokens, log_proposal=LOG_Q, objective="reinforce", reward=LOG_Q
    )
    with pytest.raises(ValueError, match="log_target and log_z"):
        window.update(outputs(TARGETS["hard"]), no_target)
    assert len(window) == 1
    for decay in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="decay"):
            RunningEstimates(decay)


def test_window_goes_on_after_a_break():
    target, generator = TARGETS["hard"], torch.Generator().manual_seed(10)
    straight, resumed = RunningEstimates(0.7), RunningEstimates(0.7)
    for i in range(8):
        out = outputs(target, draws(16, generator))
        if i == 4:
            state = resumed.state_dict()
            resumed.clear()  # the state is a copy, so it does not change
            resumed, state = RunningEstimates(), saved(state)
            resumed.load_state_dict(state)
            assert resumed.decay == 0.7
        straight.update(out)
        resumed.update(out)
        assert resumed.estimates() == straight.estimates()
    with pytest.raises(KeyError):
        straight.load_state_dict({"decay": 0.5})
    assert straight.decay == 0.7
    assert resumed.estimates() == straight.estimates()


# --- what may be given


def scores(n=5):
    """Return log pi, log q, log P."""
    return [torch.linspace(-9.0, -7.0, n) + shift for shift in (0.0, 0.3, 0.5)]


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("change", [lambda x: x[:, None], lambda x: x[:1], lambda x: x[0]])
def test_one_value_per_sequence(which, change):
    """These shapes would be broadcast, and averaged over N * N sequences."""
    given = scores()
    given[which] = change(given[which])
    with pytest.raises(ValueError, match=r"log_prob, log_proposal, log_target must all be \(N,\)"):
        estimate(*given, 0.0)


def test_other_shapes():
    x, (log_prob, log_proposal, log_target) = torch.zeros(5), scores()
    for call in (estimate_log_z, effective_sample_size, lambda w, g=None: estimate_moments(torch.ones(5, 2), w, g)):
        with pytest.raises(ValueError, match=r"log_weight must be \(N,\), one value per sequence; got \(5, 1\)"):
            call(x[:, None])
        with pytest.raises(ValueError, match=r"log_weight, sample_weight must all be \(N,\)"):
            call(x, torch.ones(1))
    for features in (torch.ones(5), torch.ones(1, 2), torch.ones(4, 2)):
        with pytest.raises(ValueError, match=r"features must be \(N, F\) with N = 5"):
            estimate_moments(features, x)
    with pytest.raises(ValueError, match=r"log_z must all be \(N,\)"):
        estimate(log_prob, log_proposal, log_target, torch.zeros(1))
    with pytest.raises(ValueError, match=r"z_of must all be \(N,\)"):
        estimate(log_prob, log_proposal, log_target, 0.0, z_of=torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_can_not_be(value):
    for call in (estimate_log_z, effective_sample_size, lambda w, g=None: estimate_moments(torch.ones(5, 2), w, g)):
        with pytest.raises(ValueError, match="log_weight = log P - log q holds NaN or"):
            call(torch.tensor([0.0, value, 0.0, 0.0, 0.0]))
        for weight in (value, 0.0, -1.0):
            with pytest.raises(ValueError, match="sample_weight must be positive and finite"):
                call(torch.zeros(5), torch.tensor([1.0, weight, 1.0, 1.0, 1.0]))
    for which in (1, 2):
        given = scores()
        given[which][3] = value
        with pytest.raises(ValueError, match="log_target holds NaN or"):
            estimate(*given, 0.0)


def test_partition_functions_are_persistent():
    first = PartitionFunctions()
    ids, log_w = torch.tensor([4, 4, 9]), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    second = first.updated(ids, log_w, torch.zeros(3, dtype=torch.float64))
    third = second.updated(ids[:1], log_w[:1], torch.zeros(1, dtype=torch.float64))
    assert (len(first), len(second), second[4].n, third[4].n) == (0, 2, 2, 3)
    assert second.log_z(ids).tolist() == pytest.approx([math.log((math.exp(0.5) + math.exp(-1)) / 2)] * 2 + [2.0])


def test_partition_functions_go_on_to_the_bit():
    """The state has contexts whose P was 0, too. It is in tensors, because a dict for each context loads slowly."""
    ids = torch.tensor([4, 4, 9, 10**12, 0])
    log_w = torch.tensor([0.1, -700.3, 2.0 / 3, -math.inf, 1e3], dtype=torch.float64)
    zero = torch.zeros(5, dtype=torch.float64)
    first = PartitionFunctions().updated(ids, log_w, zero)
    state = first.state_dict()
    assert all(isinstance(column, torch.Tensor) and column.shape == (4,) for column in state.values())
    second = PartitionFunctions()
    second.load_state_dict(state)
    for _ in range(2):
        assert len(second) == 4
        for context in ids.tolist():
            assert second[context].state_dict() == first[context].state_dict()
            assert type(second[context].n) is int
        first, second = (z.updated(ids, log_w.flip(0), zero) for z in (first, second))
    second.load_state_dict(PartitionFunctions().state_dict())
    assert len(second) == 0
