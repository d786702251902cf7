"""Test benchmarks/alpha: the list of answers, exact measures against samples and by hand, all methods, the grid."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

ALPHA = Path(__file__).parents[1] / "benchmarks" / "alpha"
# There is no source tree if the tests run beside an installed wheel.
if not (ALPHA.parents[1] / "pyproject.toml").exists():
    pytest.skip("no source tree", allow_module_level=True)
sys.path.insert(0, str(ALPHA))
import alpha_grid  # noqa: E402
import alpha_report  # noqa: E402
import exact  # noqa: E402
import language  # noqa: E402
import train_one  # noqa: E402
from language import Pair  # noqa: E402

import dmfast  # noqa: E402
from dmfast.verified import distinct_at_k, pass_at_k  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:P\\(x\\) = 0 for all")


def test_all_answers_are_listed_once():
    found = list(language.answers(2, "12"))
    characters = language.OPERATORS + "12"
    strings = ("".join(s) for n in (0, 2, 4) for s in itertools.product(characters, repeat=n))
    assert sorted(found) == sorted(s for s in strings if re.fullmatch(r"([+*-][12])*", s))
    assert len(list(language.answers())) == 1 + 27 + 27**2 + 27**3


def test_right_answers_are_those_that_python_finds_right():
    right = language.right_answers()
    for first in (1, 7):
        expected: dict[int, list[str]] = {}
        for answer in language.answers(2):
            expected.setdefault(eval(f"{first}{answer}"), []).append(answer)
        for target in range(language.LARGEST + 1):
            short = [answer for answer in right.get(Pair(target, first), []) if len(answer) <= 4]
            assert short == expected.get(target, [])


@pytest.mark.parametrize(
    ("text", "right"), [("+3*4", True), ("*3+3", True), ("+8", True), ("+7", False), ("", False), ("+", False),
                        ("++8", False), ("+0*9+8", False), ("8", False), ("+8+1-1+1-1", False)]
)  # fmt: skip
def test_the_verifier(text, right):
    pair = Pair(15, 7) if text == "+8" else Pair(15, 3) if text != "*3+3" else Pair(15, 4)
    assert language.is_right([text], [pair.row]) == [right]


def test_splits_are_disjoint_pairs_with_enough_right_answers():
    splits = language.splits()
    pairs = [pair for each in splits.values() for pair in each]
    assert {name: len(each) for name, each in splits.items()} == language.SPLITS
    assert len(pairs) == len(set(pairs))
    assert all(len(language.right_answers()[pair]) >= language.LEAST_RIGHT for pair in pairs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a base that has learned nothing. Its EOS is likely, so that answers are short."""
    path = tmp_path_factory.mktemp("base")
    model = language.model(width=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    model.save_pretrained(path)
    language.tokenizer().save_pretrained(path)
    return path


def test_log_probs_are_those_of_dmfast(folder):
    data = train_one.Data(folder)
    pair = language.Pair(9, 8)
    answers = ["", "+1", "*2-7", "+1+1-1", "-8+9"]
    (found,) = exact.log_probs(data.model, data.tokenizer, [pair], {pair: answers})
    policy = dmfast.LanguageModel(data.model, data.tokenizer)
    samples = policy.samples_of([pair.prompt] * len(answers), answers, append_eos=True)
    torch.testing.assert_close(found, policy.log_prob(samples), atol=1e-5, rtol=0)


def test_measures_are_those_of_samples():
    log_pi = torch.tensor([0.08, 0.05, 0.02, 0.01]).double().log()
    log_a = torch.tensor([0.01, 0.05, 0.04, 0.1]).double().log()
    found = exact.measure(log_pi, log_a)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(torch.tensor([0.08, 0.05, 0.02, 0.01, 0.84]), 400 * 64, True, generator=generator)
    right, context = (drawn < 4).double(), torch.arange(400).repeat_interleave(64)
    for k in (1, 4, 16, 64):
        at = exact.KS.index(k)
        of_samples = pass_at_k(right, context, k)
        assert abs(found["pass"][at] - of_samples.value) < 4 * of_samples.stderr + 1e-4
        different = distinct_at_k(drawn.tolist(), right, context, k)
        assert abs(found["distinct"][at] - different.value) < 4 * different.stderr
    p, v = log_a.exp() / 0.2, log_pi.exp() / 0.16
    assert found["kl_target_policy"] == pytest.approx(float((p * (p.log() - log_pi)).sum()))
    assert found["kl_target_right"] == pytest.approx(float((p * (p / v).log()).sum()))
    assert found["kl_right_target"] == pytest.approx(float((v * (v / p).log()).sum()))
    assert found["kl_target_policy"] == pytest.approx(found["kl_target_right"] - math.log(0.16))


def test_measures_of_certainty_are_finite():
    found = exact.measure(torch.tensor([0.0, -800.0]).double(), torch.tensor([-1.0, -2.0]).double())
    assert found["pass"] == [pytest.approx(1)] * len(exact.KS)
    assert found["distinct"] == [pytest.approx(1)] * len(exact.KS)
    assert math.isfinite(found["kl_target_policy"])


@pytest.fixture
def data(folder, monkeypatch):
    """Return data with two easy training prompts. The empty answer is right and has a probability of about 1/15."""
    monkeypatch.setattr(train_one, "PROMPTS", 2)
    monkeypatch.setattr(train_one, "SAMPLES", 8)
    pairs = {"train": [Pair(8, 8), Pair(9, 9)], "validation": [Pair(7, 7)], "test": [Pair(6, 6), Pair(40, 5)]}
    monkeypatch.setattr(language, "splits", lambda: pairs)
    return train_one.Data(folder)


@pytest.mark.parametrize(
    "method", ["alpha=0.5", "gdc++ offline", "gspo", "kl_control", "vargrad", train_one.LIKELIHOOD]
)
def test_a_run_moves_the_policy_and_not_the_base(method, data):
    beta = 0.1 if alpha_grid.has_beta(method) else None
    before = data.measured(data.model)
    found = train_one.run(data, method, 1e-3, 0, beta=beta, steps=3, evaluations=1)
    assert [each["step"] for each in found["curve"]] == [3]
    assert found["end"].keys() == {"train", "validation", "test", "test, rare"}
    assert found["end"] != before == data.measured(data.model)
    assert json.loads(json.dumps(found)) == found


def test_the_base_is_evaluated_alone(data):
    found = train_one.run(data, train_one.BASE, 0.0, 0, steps=0)
    assert found["end"] == data.measured(data.model)
    assert [each["step"] for each in found["curve"]] == [0]


def test_every_prompt_comes_once_before_any_comes_again():
    order = [place for step in train_one.prompt_order(96, 4, seed=1) for place in step]
    assert sorted(order[:96]) == list(range(96)) and len(order) == 128
    assert order != [place for step in train_one.prompt_order(96, 4, seed=2) for place in step]


def result(run, pass_1=0.5, pass_64=0.9):
    """Return the result of a run in the form that train_one.run returns, with the given measures."""
    measures = {"pass": [pass_1, 0.6, 0.7, pass_64, 0.95], "distinct": [1.0] * 5, "kl_target_policy": 1.0,
                "kl_target_right": 0.5, "kl_right_target": 0.5}  # fmt: skip
    every = dict.fromkeys(("train", "validation", "test", "test, rare"), measures)
    return {"method": run.method, "rate": run.rate, "seed": run.seed, "beta": run.beta, "base": "b",
            "curve": [{"step": 600} | every], "end": every}  # fmt: skip


def test_the_grid_chooses_beta_and_then_rates():
    runs = alpha_grid.rates({}, ["vargrad"])
    assert [run.beta for run in runs] == list(alpha_grid.BETAS)
    results = {run.name: result(run, 0.4 if run.beta == 0.2 else 0.3) for run in runs}
    more = [run for run in alpha_grid.rates(results, ["vargrad"]) if run.name not in results]
    assert {(run.rate, run.beta) for run in more} == {(rate, 0.2) for rate in alpha_grid.RATES[1:]}
    best, other = more[0], more[1]
    results |= {best.name: result(best, 0.8, 0.5), other.name: result(other, 0.1, 0.99)}
    assert alpha_grid.chosen(results, "vargrad") == {"pass@1": (best.rate, 0.2), "pass@64": (other.rate, 0.2)}
    seeds = alpha_grid.other_seeds(results, ["vargrad"])
    assert {(run.seed, run.rate) for run in seeds} == {(s, r) for s in (1, 2) for r in (best.rate, other.rate)}


def test_a_run_without_a_baseline_has_the_rate_that_was_chosen_with_it():
    assert alpha_grid.bare({}) == []
    worse, better = (alpha_grid.Run("alpha=0.9", rate, 0) for rate in (2e-4, 1e-4))
    results = {worse.name: result(worse, 0.2), better.name: result(better, 0.4)}
    (run,) = alpha_grid.bare(results)
    assert (run.method, run.rate, run.seed) == ("alpha=0.9 no baseline", 1e-4, 0)
    assert run.name == "seed0/alpha=0.9_no_baseline-lr0.0001.json"


def test_a_failed_beta_does_not_hold_up_the_others():
    first, *others = alpha_grid.rates({}, ["vargrad"])
    results = {run.name: result(run) for run in others} | {first.name_of_failure: {"error": "NaN"}}
    assert len(alpha_grid.rates(results, ["vargrad"])) == 3 + 3
    assert first.beta not in {run.beta for run in alpha_grid.rates(results, ["vargrad"])[3:]}


def test_the_report(tmp_path):
    base, run = alpha_grid.untrained(), alpha_grid.Run("alpha=0", 2e-4, 0)
    for each, pass_1 in ((base, 0.1), (run, 0.5)):
        alpha_grid.write(tmp_path / each.name, result(each, pass_1))
    runs = alpha_report.Runs(tmp_path)
    text = alpha_report.written(runs)
    assert "| alpha=0 | 0.0002 | 0.500 | 0.900 | pass@1, pass@64 |" in text
    assert "| alpha=0 | pass@1 |  |  | 0.500 |  |" in text
    assert alpha_report.at_level([result(base, 0.1)["end"], result(run, 0.5)["end"]], "test", 0.2,
                                 alpha_report.passes(1)) == pytest.approx(0.2)  # fmt: skip
    alpha_report.front(runs, tmp_path / "front.png")
    alpha_report.pass_at_k(runs, tmp_path / "pass_at_k.png")
    other = alpha_grid.Run("alpha=0", 1e-4, 0)
    alpha_grid.write(tmp_path / other.name, result(other) | {"base": "another"})
    with pytest.raises(ValueError, match="2 different bases"):
        alpha_report.Runs(tmp_path)
