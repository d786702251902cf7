"""Test what DMTrainer logs: the line of a step, the progress bar, TensorBoard, and means between two lines."""

from __future__ import annotations

import math
import os

import pytest
from trainer_job import gpt2, job, tokenizer
from trainer_tools import (
    one_thread,  # noqa: F401
)

from dmfast import EBM, Contains, LanguageModel, Moment, Scorer
from dmfast.training.callbacks import log_line

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:.*from that sample alone")


def test_a_progress_bar_of_the_user_s_own_stays(tmp_path):
    from transformers import ProgressCallback

    class Mine(ProgressCallback):
        pass

    names = [type(c).__name__ for c in job(tmp_path, callbacks=[Mine()], disable_tqdm=False).callback_handler.callbacks]
    assert "Mine" in names and "Progress" in names and "ProgressCallback" not in names


def test_the_progress_bar_shows_the_line(tmp_path, capsys):
    job(tmp_path, max_steps=2, disable_tqdm=False).train()
    printed = capsys.readouterr()
    assert "step    2  share of w3 0." in printed.out + printed.err and "2/2" in printed.err


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "board")
    try:
        job(tmp_path, report_to="tensorboard", max_steps=2, eval_strategy="steps", eval_steps=2).train()
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    board = EventAccumulator(str(next((tmp_path / "board").rglob("events*")).parent))
    board.Reload()
    assert {"train/kl_policy", "train/phi/w3", "train/ess", "eval/phi/w3", "eval/kl_policy_base"} <= set(
        board.Tags()["scalars"]
    )
    assert len(board.Scalars("train/kl_policy")) == 2


def test_the_log_line(tmp_path, capsys):
    job(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1).train()
    step, evaluation, *_ = capsys.readouterr().out.splitlines()
    for part in (
        "step    1",
        "share of w3 0.",
        "KL(p‖π) ",
        " ± ",
        "Z ",
        "effective sequences ",
        "swaps 0",
        "sampling",
        "scoring",
        "policy",
    ):
        assert part in step, step
    assert evaluation.startswith("step    1 evaluation  share of w3 0.") and "KL(π‖a)" in evaluation


def test_log_line_of_logs_that_lack_some():
    assert log_line(3, {"loss": 0.5}) == "step    3  loss 0.5"
    assert "± " not in log_line(1, {"kl_policy": 0.5, "kl_policy_stderr": None})


def test_the_mean_of_a_feature_of_0_and_1_is_called_a_share():
    lm = LanguageModel(gpt2(), tokenizer())
    words = Scorer(lambda texts: [float(len(text.split())) for text in texts], name="words")
    target = EBM(lm, [Contains("w1", name="it"), Moment(words, 2.0)], monitor=[Contains("w2", name="that")])
    logs = {f"phi/{name}": 1.0 for name in ("it", "words", "that")}
    line = log_line(1, logs, target.binary_names)
    assert line.endswith("share of it 1.000  mean of words 1.000  share of that 1.000")


def test_logs_between_two_lines_are_means(tmp_path):
    every = job(tmp_path / "a", max_steps=4)
    every.train()
    second = job(tmp_path / "b", max_steps=4, logging_steps=2)
    second.train()
    one, two = ([h for h in t.state.log_history if "kl_policy" in h] for t in (every, second))
    assert len(two) == 2
    assert two[1]["phi/w3"] == pytest.approx((one[2]["phi/w3"] + one[3]["phi/w3"]) / 2)
    stderrs = [h["phi/w3_stderr"] for h in one]
    assert two[1]["phi/w3_stderr"] == pytest.approx(math.hypot(*stderrs[2:]) / 2) and min(stderrs) > 0
    assert two[1]["log_z"] == one[3]["log_z"] and two[0]["swapped"] == one[0]["swapped"] + one[1]["swapped"]
