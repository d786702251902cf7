"""Test sequences of weight 0 in DMTrainer: those that get no forward, and steps without a sequence of the target."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from trainer_job import digest, gpt2, job
from trainer_tools import (
    SKIP,
    Forwards,
    assert_close,
    one_thread,  # noqa: F401
    run,
    said,
)

from dmfast import Contains, Scorer

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:.*from that sample alone")


@pytest.mark.parametrize(("per_device", "accumulation"), [(8, 1), (2, 4)])
def test_sequences_of_known_weight_0_get_no_forward(tmp_path, per_device, accumulation):
    """Nothing else changes: gradients, KL(p||pi) and swaps stay."""
    cut = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
    _, wanted, keep = run(tmp_path / "all", max_steps=2, **SKIP, **cut)
    model = gpt2()
    forwards = Forwards(model)
    trainer, found, _ = run(tmp_path / "some", model=model, max_steps=2, skip_zero_weight=True, **SKIP, **cut)
    for mine, other in zip(found, wanted, strict=True):
        assert_close(mine, other)
    positive = [int((step.inputs["log_target"] > -math.inf).sum()) for step in keep.steps]
    assert 0 < sum(positive) < 16
    assert sum(shape[0] for shape in forwards.shapes) < 16
    if accumulation == 1:
        assert [shape[0] for shape in forwards.shapes] == positive
    for mine, other in zip(trainer.state.log_history, keep.trainer.state.log_history, strict=True):
        for key in ("kl_policy", "tvd_policy", "ess", "log_z", "weight_mean"):
            if key in other:
                assert mine[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
        if "js_policy" in other:
            assert math.isnan(mine["js_policy"]) and not math.isnan(other["js_policy"])


def test_a_step_of_known_weight_0_is_one_sequence_s_forward_and_no_gradient(tmp_path):
    model = gpt2()
    forwards = Forwards(model)
    with pytest.warns(UserWarning, match=r"P\(x\) = 0 for all"):
        _, found, _ = run(tmp_path, model=model, max_steps=2, skip_zero_weight=True, objective="dpg", patience_zero=2,
                          constraints=[Scorer(lambda x: torch.zeros(len(x)), name="never")])  # fmt: skip
    assert [shape[0] for shape in forwards.shapes] == [1, 1]
    assert all(not bool(gradient.any()) for step in found for gradient in step.values())


def test_on_policy_a_return_of_0_is_skipped_and_its_log_pi_is_the_sampler_s(tmp_path):
    model = gpt2()
    forwards = Forwards(model)
    settings = {"objective": "reinforce", "reward": Contains("w4"), "on_policy": True, "max_steps": 2,
                "check_scores": False}  # fmt: skip
    _, wanted, keep = run(tmp_path / "all", **settings)
    trainer, found, _ = run(tmp_path / "some", model=model, skip_zero_weight=True, **settings)
    assert (
        sum(shape[0] for shape in forwards.shapes) == sum(int((s.inputs["reward"] != 0).sum()) for s in keep.steps) < 16
    )
    for mine, other in zip(found, wanted, strict=True):
        assert_close(mine, other)
    for mine, other in zip(trainer.state.log_history, keep.trainer.state.log_history, strict=True):
        for key in {"kl_policy", "tvd_policy", "js_policy"} & other.keys():
            assert mine[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key


def test_skipping_leaves_weights_alone_that_depend_on_the_policy(tmp_path):
    model = gpt2()
    forwards = Forwards(model)
    run(tmp_path, model=model, max_steps=2, skip_zero_weight=True, **(SKIP | {"objective": "gdc++"}))
    assert [shape[0] for shape in forwards.shapes] == [8, 8]


def test_skipping_and_the_criterion_js_are_refused(tmp_path):
    with pytest.raises(ValueError, match="use kl or tvd"):
        job(tmp_path, skip_zero_weight=True, proposal_criterion="js")


def test_steps_without_a_sequence_of_the_target(tmp_path):
    """With P = 0 everywhere there is no NaN, nothing moves, and a warning says how rare the feature is."""
    nothing = Scorer(lambda texts: [0.0] * len(texts), name="nothing")
    trainer = job(tmp_path, constraints=[nothing], max_steps=6, patience_zero=3)
    before = digest(trainer.model)
    with pytest.warns(UserWarning, match=r"P\(x\) = 0 for all 24 sequences of the last 3 steps.*fewer than 0.12"):
        trainer.train()
    assert digest(trainer.model) == before
    logs = [h for h in trainer.state.log_history if "ess" in h]
    assert [(h["ess"], h["z"], h["n_empty"]) for h in logs] == [(0.0, 0.0, 8.0)] * 6
    assert all(h["loss"] == 0 for h in logs)


@pytest.mark.parametrize(("hits", "warned"), [((3,), False), ((), True)])
def test_steps_in_a_row_without_a_sequence_of_the_target(tmp_path, hits, warned):
    calls = []

    def scorer(texts):
        calls.append(len(texts))
        return [float(len(calls) in hits)] * len(texts)

    trainer = job(tmp_path, constraints=[Scorer(scorer)], max_steps=5, patience_zero=3)
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        trainer.train()
    assert said(recorded, "P(x) = 0 for all") == warned
