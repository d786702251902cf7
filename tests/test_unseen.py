"""Test what samples can't know: a moment's feature that none of them shows."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from trainer_job import gpt2, tokenizer

import dmfast
from dmfast import EBM, LanguageModel, Moment, OfflineProposal, Scorer
from dmfast.estimators import Estimate, RunningEstimates
from dmfast.targets import LambdaFit, fit_lambda
from dmfast.training import report
from dmfast.training.callbacks import log_line
from dmfast.training.evaluation import evaluate
from dmfast.unseen import Seen, said, unseen

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


def matcher(feature, check_samples=0, **options):
    policy, base = (LanguageModel(gpt2(), tokenizer()) for _ in range(2))
    target = EBM(base, [Moment(Scorer(feature, name="women"), 0.5)])
    target.lambda_ = [2.6]
    proposal = OfflineProposal(policy, interval=1, **options)
    return dmfast.Matcher(policy, target, proposal, check_samples=check_samples)


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
    assert "KL(p‖π) unknown: no sequence had women" in line and "ESS unknown" in line
    for _ in range(2):
        with torch.no_grad():
            of.policy.model.transformer.h[0].mlp.c_fc.weight.mul_(1.3)
        metrics = step(of)
        assert metrics["swapped"] == 0
    again = matcher(lambda texts: [0.0] * len(texts), check_samples)
    again.load_state_dict(copy.deepcopy(of.state_dict()))
    assert again._seen.unseen() == {"women": 0.0}
    shown[0] = True
    metrics = step(of)
    assert "unseen/women" not in metrics and metrics["kl_policy_stderr"] > 0.05
    assert f"ESS {metrics['ess']:.0f} of 16" in log_line(4, metrics)


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


def test_z_that_is_far_from_the_fit_s_is_said_once():
    of = matcher(lambda texts: [float(i % 4 == 0) for i in range(len(texts))])
    found = fit_lambda(torch.tensor([[1.0]] * 67 + [[0.0]] * 933), [0.5])
    of.target.report = found
    with pytest.warns(UserWarning, match=r"log Z is 1.* after 112 sequences .* fit of lambda found 0.6"):
        assert [step(of)["ess"] > 0 for _ in range(8)] == [True] * 8
    assert found.log_z.value == pytest.approx(0.626, abs=0.01) and isinstance(found.log_z, Estimate)
