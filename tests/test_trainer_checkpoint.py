"""Test checkpoints of DMTrainer: they resume to the bit, and are whole or not there."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from trainer_job import PROMPTS, StopAt, digest, job
from trainer_tools import (
    here,
    in_process,
    one_thread,  # noqa: F401
)
from transformers import TrainerCallback

from dmfast import Contains, Moment, Scorer
from dmfast.training import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:.*from that sample alone")


@pytest.mark.parametrize(
    "settings",
    [
        {"proposal_interval": 4},  # the run stops between two checks
        {"proposal_interval": 5, "proposal_criterion": "interval"},  # the run stops just after a swap
        # a step takes 3 prompts in 3 microbatches, so the run stops in the middle of an epoch of 7
        {
            "proposal_interval": 4,
            "proposal_criterion": "interval",
            "prompts": PROMPTS,
            "samples_per_context": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 3,
        },
        {"objective": "dpg", "baseline": "mean", "partition": "step"},
    ],
    ids=["in an interval", "after a swap", "prompts", "mean baseline"],
)
def test_resumed_is_as_if_never_stopped(tmp_path, settings):
    settings = {"max_steps": 20, "learning_rate": 2e-3, "per_device_train_batch_size": 32, **settings}
    straight = here(tmp_path / "straight", **settings)
    stopped = here(tmp_path / "stopped", stop=10, **settings)
    assert (stopped["steps"], straight["steps"]) == (10, 20) and stopped["digest"] != straight["digest"]
    # resuming in a process of its own shows that a checkpoint holds all that counts
    resume = in_process if "prompts" in settings else here
    resumed = resume(tmp_path / "stopped", resume=str(tmp_path / "stopped" / "checkpoint-10"), **settings)
    assert resumed["digest"] == straight["digest"]
    assert resumed["swaps"] == straight["swaps"] > 0
    # in text, NaN is the same as NaN
    timeless = [[str({k: v for k, v in sorted(h.items()) if not k.startswith("seconds_")}) for h in run["log"]]
                for run in (resumed, straight)]  # fmt: skip
    assert timeless[0] == timeless[1]


def test_on_policy_resumes_too(tmp_path):
    settings = {"max_steps": 6, "on_policy": True}
    straight = job(tmp_path / "a", **settings)
    straight.train()
    job(tmp_path / "b", callbacks=[StopAt(3)], **settings).train()
    resumed = job(tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert digest(resumed.model) == digest(straight.model)
    offline = job(tmp_path / "b", max_steps=6)
    before = digest(offline.model)
    with pytest.raises(ValueError, match="one is on-policy and one is not"):
        offline.train(resume_from_checkpoint=True)
    assert digest(offline.model) == before


@pytest.mark.parametrize("stop", [3, 4, 6], ids=["within an epoch", "between epochs", "within a later epoch"])
def test_random_scorers_go_on_where_they_stopped(tmp_path, stop):
    """A user's function is the only thing that draws from torch's own random state."""
    settings = {
        "prompts": PROMPTS[:4], "samples_per_context": 8, "max_steps": 8, "num_train_epochs": 2,
        "constraints": [Scorer(lambda texts: torch.rand(len(texts)), name="random")],
    }  # fmt: skip
    straight = job(tmp_path / "a", **settings)
    straight.train()
    job(tmp_path / "b", callbacks=[StopAt(stop)], **settings).train()
    resumed = job(tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert digest(resumed.model) == digest(straight.model)


def test_rotation_and_the_best_model(tmp_path):
    """KL(pi||a) grows by far more than its error, so the first model is the best."""
    trainer = job(
        tmp_path, learning_rate=0.03, max_steps=5, save_strategy="steps", save_steps=1, save_total_limit=2,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="kl_policy_base",
        greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path.parent / "best"))
    card = (tmp_path.parent / "best" / "README.md").read_text()
    # the card is that of the model that was loaded
    assert "1 optimiser steps of 8" in card and "Evaluation at step 1" in card
    best = trainer.state.best_model_checkpoint
    # the first step has learning rate 0, so nothing has moved
    assert best == str(tmp_path / "checkpoint-1")
    kept = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert kept == ["checkpoint-1", "checkpoint-5"]
    assert all(checkpoint.fault(tmp_path / name) is None for name in kept)
    assert json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())["best_model_checkpoint"] == best
    assert digest(trainer.model) == digest(trainer.target.base.model)


@pytest.mark.parametrize("name", ["model.safetensors", "dmfast_state.pt", "optimizer.pt", "dmfast_manifest.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_truncated_checkpoint_is_refused(tmp_path, name, how):
    job(tmp_path, max_steps=3, save_strategy="steps", save_steps=1).train()
    newest, good = tmp_path / "checkpoint-3", tmp_path / "checkpoint-2"
    data = (newest / name).read_bytes()
    (newest / name).unlink()
    if how == "cut":
        (newest / name).write_bytes(data[: len(data) // 2])
    for resume in (True, str(newest)):
        trainer = job(tmp_path, max_steps=5)
        before = digest(trainer.model)
        with pytest.raises(ValueError, match=r"checkpoint-3 can't be resumed from: .*checkpoint-2") as error:
            trainer.train(resume_from_checkpoint=resume)
        assert name in str(error.value) and digest(trainer.model) == before
    trainer = job(tmp_path, max_steps=5)
    trainer.train(resume_from_checkpoint=str(good))
    assert trainer.state.global_step == 5


def test_there_is_nothing_to_resume_from(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        job(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="there is no such folder; no other is whole"):
        job(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


class Fill(TrainerCallback):
    """Be a disk that takes no file of more than ``size`` bytes from a step on."""

    def __init__(self, step, size):
        self.step, self.size = step, size

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("size", [200, 20_000, 60_000])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, size, capsys):
    """200 bytes are too few for the first file, 20,000 for the model's, and 60,000 for the optimiser's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = job(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, callbacks=[Fill(2, size)])
    try:
        with pytest.raises(OSError, match=r"checkpoint-2 could not be written: .*checkpoint-1, is whole"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    resumed = job(tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    straight = job(tmp_path / "straight", max_steps=4)
    straight.train()
    assert digest(resumed.model) == digest(straight.model)


@pytest.mark.parametrize(
    ("settings", "last", "length", "more"),
    [
        ({"prompts": PROMPTS, "samples_per_context": 8}, 4, "max_steps=4", "raise max_steps above 4"),
        ({"prompts": PROMPTS, "samples_per_context": 8}, 3, "max_steps=3", "raise max_steps above 4"),
        ({}, 4, "max_steps=4", "raise max_steps above 4"),
        (
            {"prompts": PROMPTS[:4], "samples_per_context": 8},
            -1,
            "num_train_epochs=1, which is step 4",
            "raise num_train_epochs above 1",
        ),
    ],
    ids=["within a pass", "beyond", "without prompts", "passes"],
)
def test_a_checkpoint_of_the_last_step_trains_nothing_and_says_so(tmp_path, settings, last, length, more):
    straight = job(tmp_path, **settings, max_steps=4, save_strategy="steps", save_steps=4)
    straight.train()
    again = job(tmp_path, **settings, max_steps=last, num_train_epochs=1)
    with pytest.warns(UserWarning, match=f"checkpoint-4 is at step 4, and this run ends at {length}: .*, {more}$"):
        again.train(resume_from_checkpoint="checkpoint-4")
    assert again.state.global_step == 4 and digest(again.model) == digest(straight.model)


def test_advice_is_for_the_command_line_or_for_python(tmp_path):
    job(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    for command, this, newest in (
        (True, "--resume checkpoint-1", "--resume"),
        (False, f"resume_from_checkpoint='{tmp_path}/checkpoint-1'", "resume_from_checkpoint=True"),
    ):
        with pytest.raises(ValueError, match=f"nope can't be resumed from: .*pass {this}$"):
            checkpoint.to_resume("nope", tmp_path, command=command)
        with pytest.raises(ValueError, match=f"^{newest} takes the newest checkpoint, but there is no checkpoint in"):
            checkpoint.to_resume(True, tmp_path / "other", command=command)
        with pytest.warns(UserWarning, match=f"from which {newest} would go on"):
            checkpoint.warn_of_earlier_run(tmp_path, command=command)


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path):
    job(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    (tmp_path / "checkpoint-1" / "stale").write_text("x")
    job(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert not (tmp_path / "checkpoint-1" / "stale").exists()
    assert checkpoint.fault(tmp_path / "checkpoint-1") is None


def test_a_checkpoint_of_another_wish_is_refused(tmp_path):
    job(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    other = job(tmp_path, constraints=[Moment(Contains("w3", name="w3"), 0.9)], lambda_=4.0)
    before = digest(other.model)
    with pytest.raises(ValueError, match=r"checkpoint-1 can't .* the moments were {.w3.: 0.6} and are {.w3.: 0.9}"):
        other.train(resume_from_checkpoint=True)
    assert digest(other.model) == before and other.target.lambda_.tolist() == [4.0]


def test_other_prompts_have_another_z(tmp_path):
    settings = {"samples_per_context": 4, "save_strategy": "steps", "save_steps": 1}
    job(tmp_path, prompts=["w1", "w2"], max_steps=1, **settings).train()
    other = job(tmp_path, prompts=["w1", "w4"], max_steps=2, **settings)
    with pytest.warns(UserWarning, match="on other prompts"):
        other.train(resume_from_checkpoint=True)
    assert [other.matcher.running.partitions[i].n for i in (0, 1)] == [4, 4]


def test_the_policy_of_the_config_holds_after_resuming(tmp_path):
    job(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    other = job(tmp_path, max_steps=2, proposal_decay=0.3)
    with pytest.warns(UserWarning, match="proposal_decay was 0.8 and is 0.3, which holds from here on"):
        other.train(resume_from_checkpoint=True)
    assert other.proposal.running.decay == 0.3


def test_a_move_that_fails_keeps_the_checkpoint_that_was_there(tmp_path, monkeypatch):
    job(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    before = (tmp_path / "checkpoint-1" / "model.safetensors").read_bytes()
    replace = os.replace

    def failing(source, target):
        if Path(target) == tmp_path / "checkpoint-1" and "replaced" not in str(source):
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="could not be written: no"):
        job(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, seed=9).train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").read_bytes() == before
    assert checkpoint.fault(tmp_path / "checkpoint-1") is None


def test_models_alone_can_t_be_resumed_from(tmp_path):
    job(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True).train()
    with pytest.raises(ValueError, match="written with save_only_model=True"):
        job(tmp_path).train(resume_from_checkpoint=True)


def as_before(state):
    """Return the state of a checkpoint as dmfast wrote it before there was a Matcher."""
    matcher = state["matcher"]
    running, batch = matcher["running"], matcher["batch"]
    if batch is not None:
        names = ("tokens", "attention_mask", "score_mask", "prompt_len", "log_prob", "context_id", "temperature",
                 "pad_token_id")  # fmt: skip
        context = batch["samples"]["context_id"]
        samples = {name: batch["samples"][name] for name in names} | {"context_id": torch.zeros_like(context)}
        batch = {name: batch[name] for name in ("features", "inputs", "advantage", "epoch", "beta")}
        batch |= {"samples": samples, "context": context}
    return {
        **{name: matcher[name] for name in ("target", "proposal", "estimates", "q_is_base", "pool")},
        **{name: running[name] for name in ("partitions", "scale", "returns", "zero_steps", "steps", "beta")},
        "contexts": state["contexts"],
        "batch": batch,
    }


def without(state, *keys):
    return {name: value for name, value in state.items() if name not in keys}


PPO = {"objective": "kl_control", "beta": 0.3, "reward": Contains("w3"), "on_policy": True, "ppo_epochs": 3}


@pytest.mark.parametrize("settings", [{}, {"prompts": PROMPTS, "samples_per_context": 4}, PPO],
                         ids=["offline", "prompts", "within a batch"])  # fmt: skip
def test_a_checkpoint_of_the_format_before_resumes(tmp_path, settings):
    settings = {"max_steps": 5, **settings}
    straight = job(tmp_path / "a", **settings)
    straight.train()
    job(tmp_path / "b", callbacks=[StopAt(2)], **settings).train()
    folder = tmp_path / "b" / "checkpoint-2"
    state = torch.load(folder / checkpoint.STATE, weights_only=True)
    assert (state["matcher"]["batch"] is not None) == (settings.get("ppo_epochs") == 3)
    torch.save(as_before(state), folder / checkpoint.STATE)
    checkpoint.write_manifest(folder)
    resumed = job(tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert digest(resumed.model) == digest(straight.model)
    assert str(resumed.partitions.state_dict()) == str(straight.partitions.state_dict())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda state: {"step": 3}, "of no format that this version of dmfast reads.*lacks beta, partitions, scale"),
        (lambda state: without(as_before(state), "estimates"), "of no format .* it lacks estimates$"),
        (lambda state: without(as_before(state), "q_is_base", "batch"), "of no format .* it lacks q_is_base, batch$"),
        (lambda state: state | {"matcher": state["matcher"] | {"format": 7}}, "has the format 7, and .* reads 2"),
    ],
)
def test_a_checkpoint_of_an_unknown_format_is_refused(tmp_path, change, match):
    job(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    state = torch.load(folder / checkpoint.STATE, weights_only=True)
    torch.save(change(state), folder / checkpoint.STATE)
    checkpoint.write_manifest(folder)
    other = job(tmp_path, max_steps=2)
    before = digest(other.model)
    with pytest.raises(ValueError, match=match):
        other.train(resume_from_checkpoint=True)
    assert digest(other.model) == before
