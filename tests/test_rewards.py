"""Test several rewards with weights: training uses their sum, and each is logged by its own name."""

from __future__ import annotations

import pytest
import torch
from test_targets import written
from trainer_job import job
from trainer_tools import (
    one_thread,  # noqa: F401
    run,
)

from dmfast import Contains, Matcher, Scorer
from dmfast.targets import FeatureValues
from dmfast.targets.rewards import WeightedSum, as_reward
from dmfast.training import recipe

TEXTS = ["a", "a b", "b b", ""]


class Counted:
    """Count how often this word is in each text, and how often the feature is called."""

    def __init__(self, word):
        self.word, self.calls = word, 0

    def __call__(self, texts):
        self.calls += 1
        return [float(text.split().count(self.word)) for text in texts]


def scorers():
    return Scorer(Counted("a"), name="a"), Scorer(Counted("b"), name="b")


@pytest.mark.parametrize("weights", [[2, -0.5], (2.0, -0.5), {"b": -0.5, "a": 2}])
@pytest.mark.parametrize("named", [False, True])
def test_the_sum_by_hand(named, weights):
    a, b = scorers()
    found = as_reward({"a": a, "b": b} if named else [a, b], weights)
    assert found(written(TEXTS)).tolist() == [2.0, 1.5, -1.0, 0.0]
    assert as_reward([a, b])(written(TEXTS)).tolist() == [1.0, 2.0, 2.0, 0.0]
    assert found.describe()["parts"]["b"]["weight"] == -0.5


def test_a_reward_that_is_a_feature_too_runs_once():
    a, b = scorers()
    x = written(TEXTS)
    values = FeatureValues(x)
    values(a)
    assert values(WeightedSum({"a": a, "other": b}, [1, 3])).tolist() == [1.0, 4.0, 6.0, 0.0]
    values(b)
    assert a.fn.calls == b.fn.calls == 1


@pytest.mark.parametrize(
    ("reward", "weights", "error", "message"),
    [
        ([], None, ValueError, "reward holds no reward"),
        ({}, None, ValueError, "reward holds no reward"),
        (["a"], None, TypeError, r"reward\[0\] must be .* got 'a'"),
        ({"a": 3}, None, TypeError, r"reward\['a'\] must be .* got 3"),
        ({1: len}, None, TypeError, "strings as the names of its rewards, got 1"),
        ([len, len], None, ValueError, "two of the rewards have the name 'len'.*mapping by name"),
        ([len, abs], [1.0], ValueError, r"one number for each of the 2 rewards len, abs, got 1: \[1.0\]"),
        ([len, abs], {"len": 1}, ValueError, "has no 'abs'"),
        ([len, abs], {"len": 1, "abs": 1, "max": 1}, ValueError, "has 'max'"),
        ([len, abs], 2.0, TypeError, "a list of numbers, or numbers by name, got 2.0"),
        ([len, abs], [1.0, "2"], TypeError, "weight of the reward 'abs' must be a number, got '2'"),
        ([len, abs], [1.0, float("nan")], ValueError, "'abs' must be finite, got nan"),
        (len, [1.0], ValueError, "is for several rewards.* there is one"),
    ],
)
def test_rewards_that_are_none(reward, weights, error, message):
    with pytest.raises(error, match=message):
        as_reward(reward, weights)


def test_a_trainer_takes_their_sum_and_logs_each(tmp_path):
    """The weights are those of REINFORCE with the sum, and the log has the mean of the steps."""
    parts = {"three": Contains("w3"), "five": Scorer(lambda texts: [float(len(t)) for t in texts], name="length")}
    options = {"objective": "reinforce", "on_policy": True, "max_steps": 2, "logging_steps": 2}
    trainer, _, keep = run(tmp_path, reward=parts, reward_weights=[3.0, 0.5], **options)
    (log,) = [h for h in trainer.state.log_history if "rewards/three/mean" in h]
    values = [{name: part(step.samples) for name, part in parts.items()} for step in keep.steps]
    for name in parts:
        means, stds = ([f(each[name]) for each in values] for f in (torch.mean, lambda v: v.std(correction=0)))
        assert log[f"rewards/{name}/mean"] == pytest.approx(float(sum(means) / 2))
        assert log[f"rewards/{name}/std"] == pytest.approx(float(sum(stds) / 2))
    for step, each in zip(keep.steps, values, strict=True):
        assert torch.equal(step.inputs["reward"], 3 * each["three"] + 0.5 * each["five"])
    assert log["reward"] == pytest.approx(3 * log["rewards/three/mean"] + 0.5 * log["rewards/five/mean"])
    assert "scorer/length/scored" in log


def test_a_batch_that_serves_several_steps_keeps_them(tmp_path):
    parts = [Contains("w3", name="three"), Contains("w4", name="four")]
    trainer = job(tmp_path, reward=parts, objective="reinforce", on_policy=True, ppo_epochs=2, max_steps=2)
    matcher = trainer.matcher
    batch = matcher.draw(n=8, max_new_tokens=6)
    for part in batch.split(8):
        matcher.loss(part)
    first = matcher.commit()
    state = matcher.state_dict()
    matcher.load_state_dict(state)
    again = matcher.to_repeat.again()
    matcher.loss(again.split(8)[0])
    second = matcher.commit()
    names = [name for name in first if name.startswith("rewards/")]
    assert len(names) == 4 and [second[name] for name in names] == [first[name] for name in names]


def test_weights_need_rewards(tmp_path):
    with pytest.raises(ValueError, match="is for several rewards, and there is no reward"):
        job(tmp_path, reward_weights=[1.0])
    trainer = job(tmp_path)
    with pytest.raises(ValueError, match="is for several rewards, and there is no reward"):
        Matcher(trainer.policy, trainer.target, reward_weights=[1.0])


def test_a_recipe_names_several(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: tiny-bios\nconstraints: [{contains: {word: amazing}}]\ntrain: {max_steps: 1, reward_weights: [1, 2]}\n"
        "reward: [{contains: {word: she, name: she}}, {contains: {word: he, name: he}}]\n"
    )
    found = recipe.read(path)
    assert [each.name for each in recipe.rewards(found["reward"])] == ["she", "he"]
    path.write_text(path.read_text().replace("word: he,", "words: he,"))
    with pytest.raises(recipe.RecipeError, match="reward 2: contains"):
        recipe.read(path)
