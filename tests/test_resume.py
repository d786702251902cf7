"""Test what becomes of a setting that differs from the checkpoint's."""

from __future__ import annotations

import dataclasses
import os
import warnings
from functools import partial

import pytest
import torch
from trainer_job import StopAt, digest, gpt2, job, tokenizer
from trainer_tools import (
    one_thread,  # noqa: F401
)
from transformers import GPT2Config, GPT2ForSequenceClassification, TrainingArguments

import dmfast
from dmfast import EBM, Classifier, Contains, Moment, Reward, Scorer, Verifier
from dmfast.targets import Feature
from dmfast.training import resume

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:.*from that sample alone")

W3 = Contains("w3", name="w3")
SAVED = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
KL = {"objective": "kl_control", "beta": 0.3, "reward": Contains("w3"), "on_policy": True, "baseline": "mean"}


def test_every_setting_has_its_place():
    """A setting that is added to DMConfig has to be put into a table of resume.py."""
    own = {f.name for f in dataclasses.fields(dmfast.DMConfig)} - {
        f.name for f in dataclasses.fields(TrainingArguments)
    }
    placed = [*resume.REFUSED, *resume.RENEWED, *resume.HONOURED, *resume.NOT_COMPARED]
    assert own <= set(placed) and len(placed) == len(set(placed))


def test_a_run_that_goes_on_logs_evaluates_and_saves_at_its_own_intervals(tmp_path):
    """transformers would go on with the intervals that the checkpoint recorded."""
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 4,
                "logging_steps": 1}  # fmt: skip
    job(tmp_path, max_steps=2, **settings).train()
    other = job(tmp_path, max_steps=6, **settings | {"save_steps": 3, "eval_steps": 1, "logging_steps": 2})
    with pytest.warns(UserWarning, match=r"logging_steps was 1 and is 2, which holds .*eval_steps.*save_steps was 2"):
        other.train(resume_from_checkpoint=True)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3", "checkpoint-6"]
    history = other.state.log_history
    assert [h["step"] for h in history if "eval_kl_policy_base" in h] == [2, 3, 4, 5, 6]
    assert [h["step"] for h in history if "kl_policy" in h] == [1, 2, 4, 6]


def test_a_changed_learning_rate_holds(tmp_path):
    """Each step's rate is what a run with the new rate has there, and Adam's moments are those of the checkpoint."""
    settings = {"lr_scheduler_type": "linear", "max_steps": 4, "weight_decay": 0.1}
    job(tmp_path, learning_rate=1e-3, callbacks=[StopAt(2)], **settings).train()
    other = job(tmp_path, learning_rate=1e-4, adam_beta2=0.9, **settings)
    with pytest.warns(
        UserWarning, match=r"learning_rate was 0.001 and is 0.0001, which holds .*; adam_beta2 was 0.999"
    ):
        other.train(resume_from_checkpoint=True)
    straight = job(tmp_path / "straight", learning_rate=1e-4, **settings)
    straight.train()
    rates = [[h["learning_rate"] for h in each.state.log_history if "kl_policy" in h] for each in (other, straight)]
    assert rates[0][2:] == rates[1][2:] and rates[0][1] == 10 * rates[1][1]
    assert {group["betas"] for group in other.optimizer.param_groups} == {(0.9, 0.9)}
    assert all(float(state["step"]) == 4 for state in other.optimizer.state.values())
    assert {group["weight_decay"] for group in other.optimizer.param_groups} == {0.1, 0.0}


def test_what_has_not_changed_is_not_said(tmp_path):
    job(tmp_path, **SAVED).train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*goes on with other settings")
        job(tmp_path, save_strategy="no", max_steps=2, eval_samples=7).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"max_new_tokens": 4}, "max_new_tokens was 6 and is 4: lambda, Z and the proposal"),
        ({"temperature": 2.0}, "temperature was 1.0 and is 2.0: lambda, Z"),
        ({"optim": "sgd", "learning_rate": 1.0}, "optim was 'adamw_torch.*' and is 'sgd': .* of another optimiser"),
        ({"constraints": [Contains("w4", name="w4")]}, r"pointwise constraints were \[\] and are \[\"w4\"\]"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "of another kind of scheduler"),
        ({"base": gpt2(seed=5)}, "the base's weights were '.*' and are '.*': lambda, Z"),
        ({"constraints": [Moment(W3, 0.9)]}, r"the moments were {\"w3\": 0.6} and are {\"w3\": 0.9}: lambda, Z"),
        ({"constraints": [Moment(W3, 0.6, "more")]}, r"the moments were {\"w3\": 0.6} and are {\"more\": 0.6}: lam"),
        (
            {"constraints": [Moment(Contains(any_of=["w3", "w4"], name="w3"), 0.6)]},
            r"the moment 'w3' had words=\['w3'\] and has words=\['w3', 'w4'\]: lambda, Z",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_change_that_the_state_does_not_go_with_is_refused(tmp_path, change, match):
    job(tmp_path, **SAVED).train()
    other = job(tmp_path, **change)
    before = digest(other.model)
    with pytest.raises(
        ValueError, match=f"checkpoint-1 can't be resumed from with other settings. .*{match}.*saved one"
    ):
        other.train(resume_from_checkpoint=True)
    assert digest(other.model) == before and other.matcher.running.steps == 0


def longer(texts, than=3, rows=None):
    return [float(len(text) > than) for text in texts]


def longest(texts, rows=None):
    return [1.0 for _ in texts]


def made():
    """Return a function that can't be told from another one of the same maker."""

    def inside(texts):
        return [1.0 for _ in texts]

    return inside


class Own(Feature):
    name, binary = "own", False

    def __init__(self, power=1):
        self.power = power

    def __call__(self, samples):
        return samples.log_prob.new_ones(len(samples), dtype=torch.float64)

    def describe(self):
        return {}

    def identity(self):
        return {**super().identity(), "power": self.power}


class Caller:
    __name__ = "caller"

    def __call__(self, texts):
        return [1.0 for _ in texts]


def classifier(seed=0, **options):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=1, id2label={0: "NO", 1: "YES"})
    model = GPT2ForSequenceClassification(config)
    return Classifier(model, tokenizer(), name="yes", **{"label": "YES"} | options)


PAIRS = [
    (Contains("a", name="n"), Contains("a", name="n", whole_word=False), "whole_word=True and has whole_word=False"),
    (Contains("a", name="n"), Contains(regex="a", name="n"), "regex=None and has regex='a'"),
    (Contains("a", name="n"), Contains("a", name="n", on="tokens"), "on='text' and has on='tokens'"),
    (Contains("a", name="n"), Scorer(longer, name="n"), "type='Contains' and has type='Scorer'"),
    (Scorer(longer, name="n"), Scorer(longest, name="n"), "function='longer' and has function='longest'"),
    (Scorer(longer, name="n"), Scorer(len, name="n", batched=False), "module='test_resume' and has module='builtins'"),
    (Scorer(Caller(), name="n"), Scorer(longer, name="n"), "function='Caller' and has function='longer'"),
    (Scorer(partial(longer, than=3)), Scorer(partial(longer, than=4)), "arguments.than=3 and has arguments.than=4"),
    (Reward(longer, 0.5), Reward(longer, 0.1), "the constraint 'longer' had beta=0.5 and has beta=0.1"),
    (Reward(longer, 0.5, name="n"), Reward(longest, 0.5, name="n"), "had reward.function='longer' and has"),
    (Verifier(longer), Verifier(longer, truncated="judge"), "truncated='wrong' and has truncated='judge'"),
    (Verifier(longer, workers=1, time_limit=1), Verifier(longer, workers=1, time_limit=2), "time_limit=1 and has"),
    (classifier(), classifier(label="NO"), "label='YES' and has label='NO'"),
    (classifier(), classifier(seed=1), "weights='.*' and has weights="),
    (Own(), Own(2), "the constraint 'own' had power=1 and has power=2"),
    (Moment(Contains("a", name="n"), 1), Moment(Contains("a", name="n"), 0, name="n"), None),
    (Contains(any_of=["a", "b"], name="n"), Contains(any_of=["b", "a", "b"], name="n"), None),
    (Contains(regex="a", name="n"), Contains(regex="a", name="n", whole_word=False), None),
    (Verifier(longer), Verifier(longer, workers=2, batch_size=1, cache=0), None),
    (Scorer(longer), Scorer(longer, batch_size=4, cache=8), None),
    (classifier(), classifier(batch_size=2, threshold=0.9), None),
    (Scorer(lambda texts: texts, name="n"), Scorer(made(), name="n"), None),
    (Scorer(partial(longer, than=made())), Scorer(partial(longer, than=made())), None),
]


@pytest.mark.parametrize(("was", "now", "match"), PAIRS, ids=[f"{i}" for i in range(len(PAIRS))])
def test_what_a_feature_is_made_of_is_compared(was, now, match):
    """What changes its values is refused under the same name, and what can't be told is left out."""
    base = dmfast.LanguageModel(gpt2(), tokenizer())
    recorded, this = ({"the target's features": resume.plain(EBM(base, [each]).identity())} for each in (was, now))
    assert " at 0x" not in str(recorded)
    changes = resume.changed(recorded, this)
    assert bool(changes) == (match is not None)
    if match is not None:
        with pytest.raises(ValueError, match=f"w/checkpoint-1 can't be resumed .*{match}.* lambda, Z and the proposal"):
            resume.refuse(changes, "w/checkpoint-1")


def test_a_checkpoint_without_the_parts_of_its_features_resumes(tmp_path):
    job(tmp_path, **SAVED).train()
    state = torch.load(tmp_path / "checkpoint-1" / "dmfast_state.pt", weights_only=True)
    of_target = {"the moments", "the target's features", "the reward's features"}
    state["settings"] = {name: value for name, value in state["settings"].items() if name not in of_target}
    job(tmp_path, constraints=[Moment(Contains("w4", name="w3"), 0.6)]).load_state_dict(state)
    with pytest.raises(ValueError, match="the moments were"):
        job(tmp_path, constraints=[Moment(W3, 0.7)]).load_state_dict(state)


def test_of_long_values_a_message_shows_where_they_differ():
    words = [f"word {i}" for i in range(1000)]
    said = resume._said("x", (words, [*words[:500], "other"]))
    assert "'word 500'" in said and "'other'" in said and len(said) < 500


def test_an_object_enters_the_settings_without_its_address():
    assert resume.plain({"tools": [made()]}) == resume.plain({"tools": [made()]}) == '{"tools": ["function"]}'


def test_another_objective_starts_the_mean_of_the_returns_anew(tmp_path):
    settings = {"proposal_interval": 9, "max_steps": 2}
    first = job(tmp_path, objective="dpg", baseline="mean", callbacks=[StopAt(1)], **settings)
    first.train()
    assert first.matcher.running.returns[1] == 8
    state, other = first.state_dict(), job(tmp_path, objective="reverse_kl", **settings)
    with pytest.warns(UserWarning, match="objective was 'dpg' and is 'reverse_kl', .* the running mean of the returns"):
        other.load_state_dict(state)
    assert other.matcher.running.returns == (0.0, 0)
    # Z depends on the target alone, so it stays
    assert other.matcher.running.partitions.state_dict()["n"].tolist() == [8]


def test_other_rewards_start_the_mean_of_the_returns_anew(tmp_path):
    several = {**KL, "reward": [Contains("w3"), Contains("w4")]}
    first = job(tmp_path, **several)
    state = first.state_dict()
    assert not first._changes_since(state)
    named = [Contains("w3"), Contains("w5", name='contains "w4"')]
    for changed, said in (
        ({"reward": [Contains("w3"), Contains("w5")]}, "reward was"),
        ({"reward": named}, "the reward 'contains \"w4\"' had words=.'w4'. and has words=.'w5'.,"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights was"),
    ):
        other = job(tmp_path, **{**several, **changed})
        with pytest.warns(UserWarning, match=f"{said} .* the running mean of the returns"):
            other.load_state_dict(state)


def test_a_batch_that_serves_more_steps_is_dropped_with_the_objective_it_was_drawn_for(tmp_path):
    job(tmp_path, ppo_epochs=3, callbacks=[StopAt(1)], **KL).train()
    state = torch.load(tmp_path / "checkpoint-1" / "dmfast_state.pt", weights_only=True)
    for change, kept in (({"ppo_clip": 0.1}, True), ({"beta": 0.5}, False), ({"ppo_epochs": 1}, False)):
        other = job(tmp_path, **(KL | {"ppo_epochs": 3} | change))
        with pytest.warns(UserWarning, match=f"{next(iter(change))} was"):
            other.load_state_dict(state)
        assert (other.matcher.to_repeat is not None) == kept


def test_a_steered_beta_goes_on_from_the_checkpoint(tmp_path):
    settings = KL | {"beta_target_kl": 0.7, "beta_horizon": 100.0}
    first = job(tmp_path, callbacks=[StopAt(2)], **settings)
    first.train()
    other = job(tmp_path, **(settings | {"beta": 0.9}))
    with pytest.warns(UserWarning, match="beta was 0.3 and is 0.9, and the steered value of the checkpoint is kept$"):
        other.load_state_dict(first.state_dict())
    assert other.matcher.running.beta.value == first.matcher.running.beta.value != 0.9
    assert other.matcher.running.returns == first.matcher.running.returns


def test_another_criterion_knows_no_best_divergence(tmp_path):
    first = job(tmp_path, proposal_interval=1, proposal_best_only=True, callbacks=[StopAt(3)])
    first.train()
    other = job(tmp_path, proposal_criterion="tvd", proposal_best_only=True)
    with pytest.warns(UserWarning, match="proposal_criterion was 'kl' and is 'tvd', .* the best divergence"):
        other.load_state_dict(first.state_dict())
    assert other.proposal.best == float("inf")


def test_a_lambda_that_was_given_anew_is_not_taken(tmp_path):
    job(tmp_path, **SAVED).train()
    other = job(tmp_path, lambda_=1.4)
    with pytest.warns(UserWarning, match=r"lambda of 'w3' is kept, \[1.5\], and not what .* was given, \[1.4\]"):
        other.train(resume_from_checkpoint=True)


def test_an_optimiser_that_was_passed_keeps_the_rate_of_the_checkpoint(tmp_path):
    def with_rate(rate, **settings):
        trainer = job(tmp_path, **settings)
        trainer.brings_optimizer, trainer.optimizer = True, torch.optim.SGD(trainer.model.parameters(), lr=rate)
        return trainer

    with_rate(1.0, **SAVED).train()
    other = with_rate(0.5, max_steps=2)
    with pytest.warns(UserWarning, match=r"passed has the learning rates \[0.5\], and .* are kept: \[1.0\]"):
        other.train(resume_from_checkpoint=True)
    assert other.state.global_step == 2


def test_two_runs_in_one_folder(tmp_path):
    job(tmp_path, **(SAVED | {"max_steps": 2, "save_steps": 2})).train()
    with pytest.warns(UserWarning, match="starts anew, and .* has checkpoint-2 of an earlier one"):
        job(tmp_path, **SAVED).train()
    os.utime(tmp_path / "checkpoint-2" / "dmfast_manifest.json", (1, 1))
    with pytest.warns(UserWarning, match=r"goes on from .*checkpoint-2, .* although .*checkpoint-1 was written later"):
        job(tmp_path, max_steps=3).train(resume_from_checkpoint=True)


def test_a_tied_head_is_stored_once_and_not_missed(tmp_path, monkeypatch):
    job(tmp_path, **SAVED).train()
    state = torch.load(tmp_path / "checkpoint-1" / "dmfast_state.pt", weights_only=True)
    of_q = state["matcher"]["proposal"]["model"]
    assert "transformer.wte.weight" in of_q and "lm_head.weight" not in of_q
    other, said = job(tmp_path, max_steps=1), []
    monkeypatch.setattr("transformers.trainer.logger.warning", lambda text, *args: said.append(text))
    other.train(resume_from_checkpoint=True)
    assert not any("missing keys" in text for text in said)
    # states of older versions also have the tied head
    of_q["lm_head.weight"] = of_q["transformer.wte.weight"].clone()
    other.load_state_dict(state)
    assert torch.equal(other.proposal.snapshot.model.lm_head.weight, of_q["transformer.wte.weight"])
    of_q["more"] = of_q["transformer.wte.weight"]
    with pytest.raises(RuntimeError, match="of another model"):
        other.load_state_dict(state)


def test_what_transformers_says_without_a_word(tmp_path):
    with pytest.raises(ValueError, match="fp16=True has no effect on a CPU"):
        job(tmp_path, fp16=True)
    with pytest.warns(UserWarning, match=r"the warm-up takes 4 steps \(warmup_steps=4\) and the run 4"):
        job(tmp_path, warmup_steps=4)


@pytest.mark.parametrize("name", ["max_steps", "num_train_epochs", "per_device_train_batch_size"])
def test_the_first_rate_after_a_resume_is_that_of_the_new_length(name):
    """The schedule came to its end with the old length, and is half-way with the new one."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    fresh = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 8)
    scheduler.last_epoch = 4
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    resume.set_hyperparameters(optimizer, scheduler, fresh, {name: (1, 2)})
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]
