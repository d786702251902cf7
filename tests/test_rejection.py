"""Test quasi-rejection sampling on all 125 sequences of a tabular model.

Every p_beta, its rate and its distances from p are known there. Standard errors are compared with their spread.
Proposals may have prompts or be mixtures.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tabular import Space, counts, hard_target, kl, one_thread, soft_target, tv  # noqa: F401
from test_targets import word_tokenizer
from trainer_job import gpt2, tokenizer

from dmfast import EBM, Contains, LanguageModel, Scorer
from dmfast.estimators import estimate_log_z
from dmfast.rejection import RejectionCurve, plot_rejection, quasi_rejection_sample, rejection_curve
from dmfast.samples import Samples
from dmfast.sampling import Mixture, Prompted

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")
SPACE = Space()
BASE = SPACE.log_prob(SPACE.table(1))
PROPOSALS = {"base": BASE, "other": SPACE.log_prob(0.7 * SPACE.table(1) + 0.3 * SPACE.table(2))}
TARGETS = {"hard": hard_target(BASE), "soft": soft_target(BASE, SPACE.tokens)}
CASES = [pytest.param(t, q, id=f"{t}-{q}") for t in TARGETS for q in PROPOSALS]


def exact(target, log_q, log_beta):
    """Return the rate, and the distribution of what is accepted, by summing over all sequences."""
    q, score = log_q.exp(), target.log_score.exp()
    joint = q * torch.minimum(torch.ones(()), score / (math.exp(log_beta) * q))
    return float(joint.sum()), joint / joint.sum()


def whole(target, log_q):
    """Return log P/q of a set of samples in which x occurs n_x times, and the q for which this set is exact."""
    n = counts(log_q.exp())
    log_q = (n.double() / n.sum()).log()
    return (target.log_score - log_q).repeat_interleave(n), log_q


@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.5, 0.9, 1.0, 1.5])
@pytest.mark.parametrize(("target", "proposal"), CASES)
def test_every_beta_against_the_sums_over_all_sequences(target, proposal, quantile):
    target = TARGETS[target]
    log_w, log_q = whole(target, PROPOSALS[proposal])
    curve = RejectionCurve(log_w)
    finite = log_w[log_w > -math.inf]
    log_beta = float(finite.quantile(min(quantile, 1.0))) + (quantile - 1.0 if quantile > 1 else 0.0)
    rate, accepted = exact(target, log_q, log_beta)
    found = curve.at(log_beta)
    assert found.acceptance.value == pytest.approx(rate, rel=1e-12)
    assert found.kl.value == pytest.approx(float(kl(target.p, accepted)), abs=1e-12)
    assert found.tvd.value == pytest.approx(float(tv(target.p, accepted)), abs=1e-12)
    assert all(e.stderr >= 0 for e in (found.acceptance, found.kl, found.tvd))
    if log_beta >= curve.largest:
        assert found.kl.value == pytest.approx(0, abs=1e-14) and found.tvd.value == pytest.approx(0, abs=1e-14)
        assert rate == pytest.approx(float(target.z) * math.exp(-log_beta))


@pytest.mark.parametrize("shift", [0.0, 5000.0, -5000.0])
def test_the_scale_of_p_is_beta_s_alone(shift):
    log_w, _ = whole(TARGETS["hard"], BASE)
    for log_beta in (-1.0, 0.5, 3.0):
        plain, found = RejectionCurve(log_w).at(log_beta), RejectionCurve(log_w + shift).at(log_beta + shift)
        for key in ("acceptance", "kl", "tvd"):
            one, other = getattr(plain, key), getattr(found, key)
            assert one.value == pytest.approx(other.value, abs=1e-11)
            assert one.stderr == pytest.approx(other.stderr, abs=1e-11)


@pytest.mark.parametrize(("target", "proposal"), CASES)
def test_beta_for_a_rate_gives_that_rate(target, proposal):
    curve = RejectionCurve(whole(TARGETS[target], PROPOSALS[proposal])[0])
    for share in (1.0, 0.999, 0.8, 0.5, 0.1, 1e-3, 1e-6):
        rate = share * curve.positive
        assert curve.at(curve.log_beta_for(rate)).acceptance.value == pytest.approx(rate, rel=1e-9)
    tied = RejectionCurve(torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, -math.inf]))
    for rate in (5 / 6, 0.7, 0.5, 0.01):
        assert tied.at(tied.log_beta_for(rate)).acceptance.value == pytest.approx(rate, rel=1e-9)


def test_points_go_from_the_proposal_to_the_target():
    curve = RejectionCurve(whole(TARGETS["hard"], BASE)[0])
    points = curve.points(20)
    rates, kls = [p.acceptance.value for p in points], [p.kl.value for p in points]
    assert rates[0] == pytest.approx(curve.positive) and rates[-1] == pytest.approx(1 / 2000)
    assert rates == sorted(rates, reverse=True) and kls[-1] == pytest.approx(0, abs=1e-12)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(kls))


@pytest.mark.parametrize("log_beta", [-1.0, 0.3, 1.2])
def test_standard_errors_are_the_spread_of_repetitions(log_beta):
    generator = torch.Generator().manual_seed(0)
    target, n = TARGETS["hard"], 300
    log_w = target.log_score - BASE
    found = [
        RejectionCurve(log_w[torch.multinomial(BASE.exp(), n, replacement=True, generator=generator)]).at(log_beta)
        for _ in range(800)
    ]
    for key in ("acceptance", "kl", "tvd"):
        values = torch.tensor([getattr(point, key).value for point in found], dtype=torch.float64)
        errors = torch.tensor([getattr(point, key).stderr for point in found], dtype=torch.float64)
        assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.1), key


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: RejectionCurve(torch.tensor([0.0])), "two sequences or more"),
        (lambda: RejectionCurve(torch.tensor([0.0, math.nan])), "NaN"),
        (lambda: RejectionCurve(torch.tensor([-math.inf, -math.inf])), r"P\(x\) = 0 for all 2"),
        (lambda: RejectionCurve(torch.tensor([0.0, -math.inf])).log_beta_for(0.6), "at most 0.5"),
        (lambda: RejectionCurve(torch.zeros(2)).log_beta_for(0.0), "above 0"),
        (lambda: RejectionCurve(torch.zeros(2)).at(math.inf), "log_beta must be finite"),
        (lambda: Mixture([]), "weights"),
        (lambda: Mixture([Tabular(BASE)], [0.0]), "weights must be a positive number for each of 1"),
        (lambda: plot_rejection({}, "x.png"), "curves is empty"),
    ],
)
def test_what_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# --- sampling


class Tabular:
    """Be a distribution over the 125 sequences, as a proposal or a base."""

    tokenizer = word_tokenizer(list("abcde"))

    def __init__(self, log_q):
        self.log_q, self.drawn = log_q, 0

    def sample(self, prompts=None, n=1, *, max_new_tokens, temperature=1.0, seed=None, batch_size=None, first_row=0):
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.log_q.exp(), n, replacement=True, generator=generator)
        self.drawn += n
        tokens = torch.cat([torch.full((n, 1), 5), SPACE.tokens[which]], 1)
        score = torch.ones_like(tokens, dtype=torch.bool)
        score[:, 0] = False
        return Samples(tokens, torch.ones_like(tokens), score, 1, self.log_q[which], torch.zeros(n).long(), temperature,
                       self.tokenizer, 6)  # fmt: skip

    def log_prob(self, samples, *, batch_size=None):
        return self.log_q[which_of(samples)]


def which_of(samples):
    return samples.tokens[:, 1:] @ torch.tensor([25, 5, 1])


def ebm(target):
    """Return ``target`` as an EBM around the tabular base."""
    b = (target.log_score - BASE).exp()
    return EBM(Tabular(BASE), [Scorer(lambda x: b[which_of(x)], on="samples", name="b")])


def assert_drawn_from(samples, p):
    """Assert that Pearson's chi-square, with rare sequences put together, is within 5 of its standard deviations."""
    n = len(samples)
    found = torch.bincount(which_of(samples), minlength=125)
    assert int(found[p == 0].sum()) == 0
    usual = p * n > 5
    expected = torch.cat([p[usual], p[~usual].sum()[None]]) * n
    seen = torch.cat([found[usual], found[~usual].sum()[None]])
    expected, seen = expected[expected > 0], seen[expected > 0]
    freedom = len(expected) - 1
    chi2 = float(((seen - expected) ** 2 / expected).sum())
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom), (chi2, freedom)


@pytest.mark.parametrize("above", [-2.5, -1.0, 0.0])
@pytest.mark.parametrize(("target", "proposal"), CASES)
def test_what_is_accepted_is_p_beta(target, proposal, above):
    """The samples are those of p_beta up to the largest P/q, where it is p itself, and come at the known rate."""
    target, log_q = TARGETS[target], PROPOSALS[proposal]
    log_beta = float((target.log_score - log_q).max()) + above
    x, drawn = quasi_rejection_sample(ebm(target), Tabular(log_q), 4000, log_beta=log_beta, max_new_tokens=3,
                                             batch_size=1000)  # fmt: skip
    rate, accepted = exact(target, log_q, log_beta)
    assert_drawn_from(x, accepted)
    if above == 0:
        torch.testing.assert_close(accepted, target.p)
    assert len(x) == 4000 and torch.equal(x.log_prob, log_q[which_of(x)])
    assert abs(4000 / drawn - rate) < 5 * rate * math.sqrt((1 - rate) / 4000)


def test_the_check_of_the_test_sees_a_wrong_distribution():
    x = Tabular(BASE).sample(n=4000, max_new_tokens=3, seed=0)
    assert_drawn_from(x, BASE.exp())
    with pytest.raises(AssertionError):
        assert_drawn_from(x, TARGETS["soft"].p)


def test_the_curve_of_a_target_and_a_proposal():
    target, log_q = TARGETS["soft"], PROPOSALS["other"]
    curve = rejection_curve(ebm(target), Tabular(log_q), 20_000, max_new_tokens=3)
    rate, accepted = exact(target, log_q, 0.7)
    found = curve.at(0.7)
    for estimate, wanted in ((found.acceptance, rate), (found.kl, float(kl(target.p, accepted))),
                             (found.tvd, float(tv(target.p, accepted)))):  # fmt: skip
        assert abs(estimate.value - wanted) < 4 * estimate.stderr


def test_too_few_are_accepted():
    with pytest.raises(RuntimeError, match=r"of 2,000 sequences were accepted, 10 are wanted"):
        quasi_rejection_sample(ebm(TARGETS["soft"]), Tabular(BASE), 10, log_beta=50.0, max_new_tokens=3,
                                      batch_size=500, max_draws=2000)  # fmt: skip


def test_a_mixture_draws_from_the_sum_and_knows_it():
    a, b = PROPOSALS["base"], PROPOSALS["other"]
    mixture = Mixture([Tabular(a), Tabular(b)], [3.0, 1.0])
    x = mixture.sample(n=6000, max_new_tokens=3, seed=1)
    q = 0.75 * a.exp() + 0.25 * b.exp()
    assert_drawn_from(x, q)
    # the order is random, so the first half does not come from one part alone
    assert_drawn_from(x[:3000], q)
    torch.testing.assert_close(x.log_prob, q.log()[which_of(x)])
    torch.testing.assert_close(mixture.log_prob(x), x.log_prob)
    assert torch.equal(mixture.sample(n=6000, max_new_tokens=3, seed=1).tokens, x.tokens)


def test_a_mixture_serves_rejection():
    target = TARGETS["hard"]
    mixture = Mixture([Tabular(PROPOSALS["base"]), Tabular(PROPOSALS["other"])])
    q = (PROPOSALS["base"].exp() + PROPOSALS["other"].exp()) / 2
    log_beta = float((target.log_score - q.log()).max())
    x, _ = quasi_rejection_sample(ebm(target), mixture, 3000, log_beta=log_beta, max_new_tokens=3,
                                         batch_size=2000)  # fmt: skip
    assert_drawn_from(x, target.p)


# --- a transformers model


@pytest.fixture(scope="module")
def model():
    return LanguageModel(gpt2(), tokenizer())


@pytest.mark.parametrize("context", [None, ["w2 w5"]])
def test_a_prompted_proposal_draws_for_the_target_s_context(model, context):
    proposal = Prompted(model, "w1 w2 w3 w4")
    x = proposal.sample(context, n=64, max_new_tokens=6, seed=0)
    head = model._encode(context)[0]
    assert torch.equal(x.tokens[:, : x.prompt_len], head.expand(64, -1)) and x.prompt_len == head.shape[1]
    torch.testing.assert_close(proposal.log_prob(x), x.log_prob, rtol=0, atol=1e-4)
    by_hand = model.sample(["w1 w2 w3 w4"], n=64, max_new_tokens=6, seed=0)
    assert x.text == by_hand.text and torch.equal(x.log_prob, by_hand.log_prob)
    # with_prompt puts sequences under the target's context, where they are what the model itself draws there
    own = model.sample(context, n=64, max_new_tokens=6, seed=0)
    torch.testing.assert_close(model.log_prob(model.with_prompt(own, (context or [""])[0])), own.log_prob,
                               rtol=0, atol=1e-4)  # fmt: skip
    assert float((model.log_prob(x).detach() - x.log_prob).abs().max()) > 0.1


def test_prompts_that_do_not_serve(model):
    with pytest.raises(ValueError, match="one context at a time, got 2"):
        Prompted(model, "w1").sample(["w1", "w2"], n=2, max_new_tokens=3)
    x = model.sample(n=2, max_new_tokens=6, seed=0)
    with pytest.raises(ValueError, match="beyond the model's context of 24"):
        model.with_prompt(x, " ".join(["w1"] * 22))


def test_every_proposal_leads_to_the_same_target(model):
    """E_p[phi] of the accepted sequences and log Z of each curve are the same, whatever proposed the sequences."""
    target = EBM(model, [Contains("w3", name="w3")])
    policy = LanguageModel(gpt2(), tokenizer())
    with torch.no_grad():
        policy.model.transformer.wte.weight[3] *= 1.3  # now the policy draws w3 with another probability than the base
    proposals = {"base": model, "prompted": Prompted(model, "w1 w2"), "policy": policy,
                 "mixture": Mixture([model, Prompted(model, "w1 w2"), policy])}  # fmt: skip
    shares, log_zs = {}, {}
    for name, proposal in proposals.items():
        curve = rejection_curve(target, proposal, 1000, max_new_tokens=4, seed=1, batch_size=1000)
        log_zs[name] = estimate_log_z(curve.log_weight)
        x, _ = quasi_rejection_sample(target, proposal, 200, log_beta=curve.largest, max_new_tokens=4, seed=2,
                                             batch_size=1000)  # fmt: skip
        assert bool(Contains("w3")(x).all())
        shares[name] = float(Contains("w4")(x).mean())
    wanted = model.sample(n=4000, max_new_tokens=4, seed=3)
    wanted = wanted[Contains("w3")(wanted) == 1]
    share = float(Contains("w4")(wanted).mean())
    error = math.sqrt(share * (1 - share) * (1 / len(wanted) + 1 / 200))
    assert 0.1 < share < 0.9
    for name in proposals:
        assert abs(shares[name] - share) < 4 * error, name
        assert abs(log_zs[name].value - log_zs["base"].value) < 4 * math.hypot(
            log_zs[name].stderr, log_zs["base"].stderr
        ), name


def test_the_plot(tmp_path):
    curves = {name: RejectionCurve(whole(TARGETS["soft"], log_q)[0]) for name, log_q in PROPOSALS.items()}
    plot_rejection(curves, tmp_path / "curve.svg")
    drawn = (tmp_path / "curve.svg").read_text()
    assert drawn.count("<!-- base -->") == 2 == drawn.count("<!-- other -->")
    assert "acceptance rate" in drawn


def test_samples_keep_what_they_were_drawn_from(model):
    x = model.sample(["w1", "w2"], n=2, max_new_tokens=4, seed=0)
    moved = model.with_prompt(x, "w5 w6 w7")
    assert torch.equal(moved.log_prob, x.log_prob) and moved.text == x.text and moved.prompt_len == 3
    assert moved.context_id.tolist() == [0] * 4


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    import quasi_rejection

    out = tmp_path / "curve.png"
    small = ["--steps", "1", "--fit-samples", "256", "--samples", "128", "--accept", "32", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["quasi_rejection.py", *small])
    points = quasi_rejection.main()
    assert set(points) == {"base", "policy", "mixture"} and out.read_bytes().startswith(b"\x89PNG")
    assert all(point.acceptance.value == pytest.approx(0.25) for point in points.values())
    assert "32 of" in capsys.readouterr().out
