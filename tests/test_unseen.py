"""Test what samples can't know: a moment's feature that none of them shows."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from trainer_job import gpt2, tokenizer

import dmfast
from dmfast import EBM, LanguageModel, Moment, OfflineProposal, Scorer
from dmfast.estimators import Estimate, PartitionFunction, RunningEstimates
from dmfast.metrics import merged
from dmfast.targets import LambdaFit, fit_lambda
from dmfast.training import report
from dmfast.training.callbacks import log_line
from dmfast.training.evaluation import evaluate
from dmfast.unseen import Seen, said, unseen, z_gap

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")


@pytest.mark.parametrize(
    ("columns", "wanted", "found"),
    [
        ([[0.0], [0.0]], {"x": 0.5}, {"x": 0.0}),
        ([[1.0], [1.0]], {"x": 0.5}, {"x": 1.0}),
        ([[0.0], [1.0]], {"x": 0.5}, {}),
        ([[0.0], [0.0]], {"x": 0.04}, {}),  # p has little of x here
        ([[3.0, 0.0], [3.0, 1.0]], {"x": 3.1, "y": 0.5}, {"x": 3.0}),
        ([[0.0]], {}, {}),
    ],
)
def test_a_feature_that_never_varied(columns, wanted, found):
    assert unseen(torch.tensor(columns), wanted) == found


def test_the_window_of_steps():
    seen = Seen({"x": 0.5})
    assert seen.unseen() == {}
    seen.update(torch.tensor([[0.0, 9.0], [0.0, 8.0]]))
    assert seen.unseen() == {"x": 0.0}
    other = Seen({"x": 0.5})
    other.load_state_dict(seen.state_dict())
    other.update(torch.tensor([[1.0, 0.0]]))
    assert other.unseen() == {} and seen.unseen() == {"x": 0.0}
    other.clear()
    assert other.unseen() == {}
    assert (
        said({"x": 0.0, "y": 1.0, "z": 2.5}) == "no sequence had x, every sequence had y, z was 2.5 in every sequence"
    )


def matcher(feature, check_samples=0, partition="running", **options):
    policy, base = (LanguageModel(gpt2(), tokenizer()) for _ in range(2))
    target = EBM(base, [Moment(Scorer(feature, name="women"), 0.5)])
    target.lambda_ = [2.6]
    proposal = OfflineProposal(policy, interval=1, **options)
    return dmfast.Matcher(policy, target, proposal, check_samples=check_samples, partition=partition)


def step(of, rate=0.0):
    batch = of.draw(n=16, max_new_tokens=4)
    of.loss(batch).loss.backward()
    with torch.no_grad():
        for parameter in of.policy.model.parameters():
            parameter.add_(parameter.grad, alpha=-rate)
            parameter.grad = None
    return of.commit()


@pytest.mark.parametrize("check_samples", [0, 16])
def test_no_swap_and_no_certainty_rest_on_sequences_without_the_feature(check_samples):
    """The samples would say KL(p||pi) = 0 ± 0 and ESS 16, although half of p is something else."""
    of, shown = None, [False]
    of = matcher(lambda texts: [float(shown[0] and i % 4 == 0) for i in range(len(texts))], check_samples)
    metrics = step(of, rate=0.5)
    assert metrics["unseen/women"] == 0.0 and metrics["sequences"] == 16
    assert all(math.isnan(metrics[name]) for name in ("kl_policy", "kl_policy_stderr", "kl_proposal", "tvd_policy"))
    line = log_line(1, metrics)
    assert all(math.isnan(metrics[name]) for name in ("z", "log_z", "log_z_stderr", "ess"))
    assert "KL(p‖π) unknown: no sequence had women" in line and "Z unknown  effective sequences unknown" in line
    for _ in range(2):
        with torch.no_grad():
            of.policy.model.transformer.h[0].mlp.c_fc.weight.mul_(1.3)
        metrics = step(of)
        assert metrics["swapped"] == 0
    again = matcher(lambda texts: [0.0] * len(texts), check_samples)
    again.load_state_dict(copy.deepcopy(of.state_dict()))
    assert again._seen.unseen() == again._seen_for_z.unseen() == {"women": 0.0}
    shown[0] = True
    metrics = step(of)
    assert "unseen/women" not in metrics and metrics["kl_policy_stderr"] > 0.05
    assert f"effective sequences {metrics['ess']:.0f} of 16" in log_line(4, metrics)


def test_what_the_estimates_have_forgotten_is_forgotten():
    seen = Seen({"women": 0.5}, decay=0.8)
    seen.update(torch.tensor([[0.0], [1.0]]))
    for _ in range(30):
        seen.update(torch.zeros(16, 1))
        assert seen.unseen() == {}
    state = seen.state_dict()
    seen.update(torch.zeros(16, 1))
    assert seen.unseen() == {"women": 0.0}
    seen.load_state_dict(state)
    assert seen.unseen() == {}
    running = RunningEstimates(0.8)
    for _ in range(40):
        running.take(*torch.zeros(4, 1, dtype=torch.float64))
    assert len(running) == RunningEstimates.kept_steps(0.8) == 31
    assert RunningEstimates.kept_steps(1.0) is None


def test_the_best_divergence_rests_on_no_sequences_without_the_feature():
    m = matcher(lambda texts: [0.0] * len(texts), criterion="interval", best_only=True)
    step(m)
    assert m.proposal.best == math.inf and m.proposal.swaps == 0


def test_who_always_swaps_still_does():
    metrics = step(matcher(lambda texts: [0.0] * len(texts), criterion="interval"))
    assert metrics["swapped"] == 1


def test_an_evaluation_says_what_it_can_t_know():
    of = matcher(lambda texts: [0.0] * len(texts))
    _, after = evaluate(of.policy, of.target, n=8, max_new_tokens=4)
    assert math.isnan(after["kl_policy"].value) and math.isfinite(after["kl_policy_base"].value)
    log = {"before": after, "after": after, "ideal": {}, "target": of.target.describe()}
    rows = dict(zip(*(column._cells for column in report.table(log).columns[:2]), strict=True))
    assert rows["KL(p‖π), nats"] == "unknown: no sequence had women"


def test_z_of_a_fit_and_z_of_the_steps():
    features = torch.tensor([[1.0]] * 67 + [[0.0]] * 933)
    fit = fit_lambda(features, [0.5], context_id=torch.arange(1000) % 2)
    each = [features[i::2, 0].double() * fit.lambda_[0] for i in (0, 1)]
    assert fit.log_z.value == pytest.approx(sum(float(x.exp().mean().log()) for x in each) / 2, abs=1e-12)
    assert LambdaFit.from_dict(fit.as_dict()).log_z == fit.log_z and 0.01 < fit.log_z.stderr < 0.1
    assert math.isnan(LambdaFit.from_dict({k: v for k, v in fit.as_dict().items() if k != "log_z"}).log_z.value)


def test_a_step_without_the_feature_has_no_effective_sample_size():
    """The window since the last swap has the feature. Z rests on all sequences so far, so it is known."""
    shown = [True]
    of = matcher(lambda texts: [float(shown[0] and i % 4 == 0) for i in range(len(texts))], stderrs=1e6)
    z = step(of)["z"]
    shown[0] = False
    metrics = step(of)
    assert "unseen/women" not in metrics and math.isnan(metrics["ess"])
    assert 1 < metrics["z"] < z and metrics["log_z_stderr"] > 0
    line = log_line(2, metrics)
    assert (
        "effective sequences unknown" in line
        and "Z unknown" not in line
        and math.isnan(merged([{"ess": 8.0}, metrics])["ess"])
    )


def test_z_of_a_step_rests_on_the_step_alone_where_it_is_asked_to():
    shown = [True]
    of = matcher(lambda texts: [float(shown[0] and i % 4 == 0) for i in range(len(texts))], partition="step")
    assert step(of)["z"] > 1
    shown[0] = False
    assert math.isnan(step(of)["z"])


def test_an_older_state_does_not_say_what_z_has_seen():
    of = matcher(lambda texts: [0.0] * len(texts))
    step(of)
    state = copy.deepcopy(of.state_dict())
    del state["seen_for_z"]
    of.load_state_dict(state)
    assert step(of)["z"] == pytest.approx(1.0, abs=1e-3)


def test_what_a_line_says_of_constraints_that_were_never_met():
    line = log_line(1, {"kl_policy": math.nan, "kl_policy_stderr": math.nan, "kl_policy_base": -4e-8,
                        "kl_policy_base_stderr": 1e-7, "z": 0.0, "ess": 0.0, "sequences": 8.0})  # fmt: skip
    assert (
        "KL(p‖π) unknown: no sequence met all constraints  KL(π‖a) 0.000 ± 0.000  Z 0.000  effective sequences 0 of 8"
        in line
    )


def z_of(ones, n, weight=148.0):
    found = PartitionFunction()
    log_target = torch.zeros(n, dtype=torch.float64)
    log_target[:ones] = math.log(weight)
    found.update(log_target, torch.zeros_like(log_target))
    return found


@pytest.mark.parametrize(
    ("ones", "n", "far"),
    [
        (0, 100, "below"),  # all weights are equal, so that the error is 0
        (1, 32, "above"),  # the error of 0.8 comes from one sequence
        (2, 300, None),
        (20, 3000, None),
        (24, 1000, "above"),
        (40, 3000, "above"),
    ],
)
def test_whether_two_z_can_both_be_right(ones, n, far):
    """The fit found that a share of 1/149 has the feature, as log Z = 0.69 ± 0.06."""
    gap = z_gap(z_of(ones, n), Estimate(math.log(2), 0.06))
    assert (None if gap is None else "above" if gap > 0 else "below") == far
    assert z_gap(z_of(ones, n), Estimate(math.nan, math.nan)) is None


def test_z_of_no_sequences_is_not_compared():
    assert z_gap(PartitionFunction(), Estimate(0.7, 0.1)) is None


def test_most_honest_samples_agree_with_the_fit():
    """Steps of 48 sequences, and a feature that 7% of the base's have: nearly every first check may swap."""
    draws = torch.rand(300, 192, generator=torch.Generator().manual_seed(0)) < 0.067
    for n in (48, 96, 192):
        gaps = [z_gap(z_of(int(each[:n].sum()), n, 13.9), Estimate(0.624, 0.03)) for each in draws]
        assert sum(gap is not None for gap in gaps) < 0.04 * len(gaps)


@pytest.mark.parametrize("check_samples", [0, 16])
@pytest.mark.parametrize("partition", ["running", "step"])
def test_no_swap_while_z_is_far_from_the_fit_s(check_samples, partition):
    """A quarter of the sequences have the feature, and 7% of the fit's had it."""
    of = matcher(lambda texts: [float(i % 4 == 0) for i in range(len(texts))], check_samples, partition=partition)
    of.proposal.swap = lambda: pytest.fail("q has become pi")
    nearer = Estimate(1.0, 0.0)
    of.target.report = fit_lambda(torch.tensor([[1.0]] * 67 + [[0.0]] * 933), [0.5])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmfast.proposal.nearer", lambda *args, **options: nearer)
        metrics = step(of)
        assert metrics["swapped"] == 0 and 0.5 < metrics["log_z_gap"] < 1
        assert "above the fit's: q stays)" in log_line(1, metrics)
        assert "log_z_gap" not in merged([metrics, {}]) and merged([metrics])["log_z_gap"] == metrics["log_z_gap"]
        del of.proposal.swap
        of.target.report = replace(of.target.report, log_z=Estimate(metrics_log_z(of), 0.1))
        metrics = step(of)
        assert metrics["swapped"] == 1 and "log_z_gap" not in metrics


def metrics_log_z(of):
    return next(iter(of.running.partitions.values())).log_z


def test_z_that_is_far_from_the_fit_s_keeps_no_proposal_that_always_swaps():
    of = matcher(lambda texts: [float(i % 4 == 0) for i in range(len(texts))], criterion="interval")
    of.target.report = fit_lambda(torch.tensor([[1.0]] * 67 + [[0.0]] * 933), [0.5])
    metrics = step(of)
    assert metrics["swapped"] == 1 and "log_z_gap" not in metrics


def test_z_that_is_far_from_the_fit_s_is_said_once():
    of = matcher(lambda texts: [float(i % 4 == 0) for i in range(len(texts))])
    found = fit_lambda(torch.tensor([[1.0]] * 67 + [[0.0]] * 933), [0.5])
    of.target.report = found
    with pytest.warns(UserWarning, match=r"log Z is 1.* after 112 sequences .* fit of lambda found 0.6"):
        assert [step(of)["ess"] > 0 for _ in range(8)] == [True] * 8
    assert found.log_z.value == pytest.approx(0.626, abs=0.01) and isinstance(found.log_z, Estimate)
