"""Test pass@k, maj@k, coverage and distinct answers against enumeration of every choice of k samples."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from dmfast.verified import coverage, distinct_at_k, maj_at_k, measure, pass_at_k

RIGHT = torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
CONTEXT = torch.tensor([7] * 5 + [2] * 5 + [9] * 5)
ANSWERS = list("abbacxxyzwrsstt")


def choices(k):
    """Yield for each prompt every choice of k of its samples."""
    for context in (7, 2, 9):
        yield [list(each) for each in itertools.combinations((context == CONTEXT).nonzero()[:, 0].tolist(), k)]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_pass_at_k_and_distinct_at_k_are_those_of_every_choice(k):
    passed, distinct = [], []
    for of_prompt in choices(k):
        passed.append(sum(any(RIGHT[i] for i in each) for each in of_prompt) / len(of_prompt))
        distinct.append(sum(len({ANSWERS[i] for i in each if RIGHT[i]}) for each in of_prompt) / len(of_prompt))
    for found, values in (
        (pass_at_k(RIGHT, CONTEXT, k), passed),
        (distinct_at_k(ANSWERS, RIGHT, CONTEXT, k), distinct),
    ):
        expected = torch.tensor(values, dtype=torch.float64)
        assert found.value == pytest.approx(float(expected.mean()), abs=1e-12)
        assert found.stderr == pytest.approx(float(expected.std() / math.sqrt(3)), abs=1e-12)


def test_pass_at_k_of_many_samples_does_not_overflow():
    right = torch.zeros(10_000, dtype=torch.bool)
    right[:3] = True
    found = pass_at_k(right, torch.zeros(10_000, dtype=torch.int64), 5000)
    assert found.value == pytest.approx(1 - 5000 * 4999 * 4998 / (10_000 * 9999 * 9998), abs=1e-12)
    assert math.isnan(found.stderr)


def test_pass_at_k_of_samples_of_a_policy_is_what_it_estimates():
    s, n, k = 0.2, 4, 3
    values = [
        pass_at_k(torch.tensor(each), torch.zeros(n), k).value * s ** sum(each) * (1 - s) ** (n - sum(each))
        for each in itertools.product((0, 1), repeat=n)
    ]
    assert sum(values) == pytest.approx(1 - (1 - s) ** k, abs=1e-12)


def test_maj_at_k_counts_ties_by_their_part():
    assert maj_at_k(ANSWERS, RIGHT, CONTEXT, 5).value == pytest.approx((0.5 + 0 + 1) / 3)
    first = [(RIGHT[i] * 1.0).item() for i in range(5)]
    found = maj_at_k(ANSWERS[:5], RIGHT[:5], CONTEXT[:5], 1)
    assert found.value == pytest.approx(sum(first) / 5, abs=0.15)
    assert maj_at_k(ANSWERS[:5], RIGHT[:5], CONTEXT[:5], 1).value == found.value  # the draws have a seed


def test_coverage_is_the_share_of_prompts_with_a_right_sample():
    assert coverage(RIGHT, CONTEXT).value == pytest.approx(2 / 3) == pass_at_k(RIGHT, CONTEXT, 5).value


def test_what_gives_no_answer_has_no_vote():
    right, context = torch.tensor([1, 0, 0, 0]), torch.zeros(4, dtype=torch.int64)
    assert maj_at_k(["a", None, None, None], right, context, 4).value == 1
    assert maj_at_k(["a", "b", None, None], right, context, 4).value == 0.5
    assert maj_at_k([None] * 4, right * 0, context, 4).value == 0
    # one sample of four has an answer, and k = 1 asks for that one a quarter of the time
    assert maj_at_k(["a", None, None, None], right, context, 1).value == pytest.approx(0.25, abs=0.1)


def test_all_measures_by_hand():
    """Of two prompts with four samples each, one has 1 right sample, and the other has 3, two of which are the same."""
    right = torch.tensor([1, 0, 0, 0, 1, 1, 1, 0], dtype=torch.bool)
    found = measure(
        right, torch.tensor([5] * 4 + [3] * 4), (1, 2), texts=["a", "b", "a ", "c", "x", " x", "y", "z"],
        answers=["1", "2", "2", None, "7", "7", "7", "8"],
        finished=torch.tensor([1, 1, 0, 0, 1, 1, 1, 1], dtype=torch.bool),
        length=torch.tensor([1, 2, 3, 4, 1, 1, 1, 1]),
    )  # fmt: skip
    by_hand = {
        "pass@1": (1 / 4, 3 / 4), "pass@2": (1 / 2, 1), "coverage": (1, 1), "distinct@2": (1 / 2, 5 / 6 + 1 / 2),
        "length": (2.5, 1), "truncated": (0.5, 0),
    }  # fmt: skip
    assert found.keys() == {*by_hand, "maj@2"}
    for name, (first, second) in by_hand.items():
        assert found[name].value == pytest.approx((first + second) / 2, abs=1e-12), name
        assert found[name].stderr == pytest.approx(abs(first - second) / 2, abs=1e-12), name
    # of the 6 pairs of 1, 2, 2, None, answer 1 wins (1, None) and half of (1, 2) twice; of 7, 7, 7, 8, answer 7 wins 3
    # pairs and half of 3
    assert found["maj@2"].value == pytest.approx((2 / 6 + 4.5 / 6) / 2, abs=0.04)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pass_at_k(RIGHT * 0.5, CONTEXT, 1), "v >= 0.5"),
        (lambda: pass_at_k(RIGHT, CONTEXT, 6), "from 1 to the fewest samples of a prompt, 5, got 6"),
        (lambda: pass_at_k(RIGHT, CONTEXT, 0), "got 0"),
        (lambda: pass_at_k(RIGHT[:3], CONTEXT, 1), r"got \(3,\) and \(15,\)"),
        (lambda: coverage(RIGHT[:0], CONTEXT[:0]), "N >= 1"),
        (lambda: maj_at_k(ANSWERS[1:], RIGHT, CONTEXT, 1), "one for each of 15 samples, got 14"),
        (lambda: distinct_at_k(ANSWERS[1:], RIGHT, CONTEXT, 1), "one for each of 15 samples, got 14"),
        (lambda: distinct_at_k(["a"] * 15, RIGHT, CONTEXT, 5), "'a' of context 7 is right in one sample, not in"),
        (lambda: maj_at_k(["a"] * 15, RIGHT, CONTEXT, 5), "'a' of context 7 is right in one sample, not in another"),
    ],
)
def test_what_can_not_be_measured_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_example_runs(monkeypatch, capsys):
    import verified

    small = ["--steps", "2", "--samples", "4", "--base-samples", "16", "--eval-samples", "8"]
    monkeypatch.setattr("sys.argv", ["verified.py", *small])
    found = verified.main()
    assert json.loads(capsys.readouterr().out[-len(json.dumps(found, indent=1)) - 1 :]) == found
    assert found["base"].keys() == found["policy"].keys() >= {"pass@1", "pass@4", "pass@8"}
    rates = [float(rate) for rate in found["pass rates"].values()]
    assert len(rates) == len(verified.ROWS) and all(0 <= rate <= 1 for rate in rates)
    row = {"field": "sports"}
    assert verified.about_its_field(["He was a footballer .", "He was a poet ."], [row, row])[1] is False
