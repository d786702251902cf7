"""Test how a run of DMTrainer ends early: by Ctrl-C or SIGTERM, in one process and in several, or on a full disk."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time

import pytest
from trainer_job import AtOnce, Kill, digest, job
from trainer_tools import (
    in_process,
    one_thread,  # noqa: F401
)

from dmfast.training import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:.*from that sample alone")


def test_ctrl_c_of_one_process_ends_both(tmp_path):
    """The signal comes to one rank alone, at the end of a step. Both end after the next one, with one checkpoint."""
    result = in_process(tmp_path, processes=2, max_steps=6, interrupt=2, per_device_train_batch_size=4)
    assert result["steps"] == 3
    assert checkpoint.fault(tmp_path / "checkpoint-3") is None


def test_sigterm_of_one_process_ends_both(tmp_path):
    """The signal comes to one rank alone, at the start of step 3. Both end after that step, with one checkpoint."""
    result = in_process(tmp_path, processes=2, max_steps=6, terminate=2, per_device_train_batch_size=4,
                        enable_jit_checkpoint=True)  # fmt: skip
    assert result["steps"] == 3 and [h["step"] for h in result["log"]] == [1, 2, 3]
    assert checkpoint.fault(tmp_path / "checkpoint-3") is None


def test_ctrl_c_ends_after_the_step_and_saves(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = job(tmp_path, callbacks=[Kill(signal.SIGINT, 2)], **settings)
    trainer.train()
    assert trainer.state.global_step == 3
    assert signal.getsignal(signal.SIGINT) == handler
    resumed = job(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    straight = job(tmp_path / "straight", **settings)
    straight.train()
    assert digest(resumed.model) == digest(straight.model)


@pytest.mark.parametrize("eval_steps", [1, 2], ids=["evaluated at that step", "not evaluated"])
def test_ctrl_c_saves_where_only_the_best_is_saved(tmp_path, eval_steps):
    """KL(pi||a) grows by far more than its error, so no evaluation after the first is the best."""
    settings = {
        "learning_rate": 0.03, "max_steps": 5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "eval_strategy": "steps", "eval_steps": eval_steps, "save_strategy": "best",
        "metric_for_best_model": "kl_policy_base", "greater_is_better": False,
    }  # fmt: skip
    trainer = job(tmp_path, callbacks=[Kill(signal.SIGINT, 2)], **settings)
    trainer.train()
    assert trainer.state.global_step == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{eval_steps}", "checkpoint-3"]
    resumed = job(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    straight = job(tmp_path / "straight", **settings)
    straight.train()
    assert digest(resumed.model) == digest(straight.model)
    assert resumed.state.best_metric == straight.state.best_metric


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    again = Kill(signal.SIGINT, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    trainer = job(tmp_path, gradient_accumulation_steps=2, callbacks=[again])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 2 and not list(tmp_path.glob("checkpoint-*"))
    assert signal.getsignal(signal.SIGINT) == handler


def test_sigterm_saves_a_checkpoint_that_resumes(tmp_path):
    """transformers' own just-in-time checkpoint may come in the middle of a step."""
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    handler = signal.getsignal(signal.SIGTERM)

    # transformers waits three seconds between the signal and its checkpoint
    def wait():
        limit = time.monotonic() + 60
        while not trainer._jit.asked and time.monotonic() < limit:
            time.sleep(0.05)

    trainer = job(tmp_path, callbacks=[Kill(signal.SIGTERM, 2, wait)], enable_jit_checkpoint=True, **settings)
    assert signal.getsignal(signal.SIGTERM) == handler
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    assert checkpoint.fault(tmp_path / "checkpoint-2") is None
    resumed = job(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    straight = job(tmp_path / "straight", **settings)
    straight.train()
    assert digest(resumed.model) == digest(straight.model)
    assert resumed.matcher.running.partitions[0].n == straight.matcher.running.partitions[0].n == 48


@pytest.fixture
def no_wait(monkeypatch):
    """Leave out the three seconds that transformers waits between SIGTERM and its checkpoint."""
    monkeypatch.setattr(threading, "Timer", AtOnce)


def test_sigterm_at_the_end_of_a_step_keeps_what_was_logged(tmp_path, no_wait):
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    kill = Kill(signal.SIGTERM, 3, event="on_step_end")
    stopped = job(tmp_path, callbacks=[kill], enable_jit_checkpoint=True, **settings)
    stopped.train()
    assert stopped.state.global_step == 3 and [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]
    resumed = job(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    straight = job(tmp_path / "straight", **settings)
    straight.train()
    assert digest(resumed.model) == digest(straight.model)

    def timeless(trainer):
        return [
            {k: v for k, v in line.items() if not k.startswith("seconds_") and not k.endswith("_runtime")}
            for line in trainer.state.log_history
            if "train_loss" not in line
        ]

    assert timeless(resumed) == timeless(straight)


@pytest.mark.parametrize("size", [0, 20_000])
@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_step_end"])
@pytest.mark.parametrize("saves", [True, False], ids=["after others", "the first"])
def test_sigterm_on_a_full_disk(tmp_path, no_wait, event, size, saves, capsys):
    """Nothing of the checkpoint is left, not even transformers' mark of an unfinished one. Earlier ones are whole."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    kill = Kill(signal.SIGTERM, 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1])), event)
    trainer = job(
        tmp_path, callbacks=[kill], enable_jit_checkpoint=True, save_steps=1,
        save_strategy="steps" if saves else "no", **settings,
    )  # fmt: skip
    kept = [] if not saves else ["checkpoint-1"] if event == "on_step_end" else ["checkpoint-1", "checkpoint-2"]
    wanted = f"the previous one, .*{kept[-1]}, is whole" if kept else "There is no earlier one"
    try:
        with pytest.raises(OSError, match=f"checkpoint-2 could not be written: .*{wanted}"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.iterdir()) == kept
    assert not list(tmp_path.rglob("*incomplete*"))
    if kept:
        resumed = job(tmp_path, **settings)
        resumed.train(resume_from_checkpoint=True)
        straight = job(tmp_path / "straight", **settings)
        straight.train()
        assert digest(resumed.model) == digest(straight.model)
