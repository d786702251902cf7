"""Test another lambda while DMTrainer runs: set by hand, of a checkpoint, or fitted again from the steps' samples."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from trainer_job import StopAt, digest, job
from trainer_tools import (
    Keep,
    one_thread,  # noqa: F401
    run,
)

from dmfast import Contains, Moment
from dmfast.targets import fit_lambda

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:.*from that sample alone")


def test_lambda_is_the_checkpoint_s(tmp_path):
    straight = job(tmp_path / "a")
    straight.train()
    job(tmp_path / "b", callbacks=[StopAt(2)]).train()
    resumed = job(tmp_path / "b", lambda_=1.4)  # another fit of the same wish may find this lambda
    resumed.train(resume_from_checkpoint=True)
    assert resumed.target.lambda_.tolist() == [1.5]
    assert resumed.matcher.running.partitions[0].n == 32
    assert digest(resumed.model) == digest(straight.model)


def test_another_lambda_starts_z_anew(tmp_path):
    trainer, _, keep = run(tmp_path, max_steps=2)
    trainer.target.lambda_ = [-3.0]
    trainer.train()
    step = keep.steps[2]
    log_w = step.inputs["log_target"] - step.samples.log_prob
    assert step.inputs["log_z"].tolist() == pytest.approx([float(log_w.logsumexp(0)) - math.log(8)] * 8)
    assert trainer.matcher.running.partitions[0].n == 16


REFIT = {"constraints": [Moment(Contains("w4", name="four"), 0.3)], "lambda_": 0.0, "refit_ess": 1e9,
         "refit_samples": 16, "proposal_criterion": "interval", "max_steps": 6}  # fmt: skip


def poorly_fitted(out, **settings):
    """Return a job whose lambda rests on 6 samples."""
    trainer = job(out, **{**REFIT, **settings})
    x = trainer.target.base.sample(n=200, max_new_tokens=6, seed=5)
    has = Contains("w4")(x)
    some = torch.cat([(has == 1).nonzero()[:1], (has == 0).nonzero()[:5]])[:, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.target.fit(x[some])
    trainer.matcher.running.lambda_ = trainer.target.lambda_.tolist()
    return trainer


def test_lambda_is_fitted_again_from_the_samples_of_the_steps(tmp_path):
    """The new lambda is what fit_lambda gives for the samples, with the weights a/q by hand. Then Z starts anew."""
    keep = Keep()
    trainer = keep.trainer = poorly_fitted(tmp_path, callbacks=[keep])
    first = trainer.target.lambda_.tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    logged = [h for h in trainer.state.log_history if "fit_ess" in h]
    seen, ess = first, logged[0]["fit_ess"]
    for start in (0, 2, 4):
        steps = keep.steps[start : start + 2]
        assert [h["lambda/four"] for h in logged[start : start + 2]] == pytest.approx([seen[0]] * 2)
        log_ratio = torch.cat([trainer.target.base.log_prob(s.samples) - s.samples.log_prob for s in steps])
        phi = torch.cat([Contains("w4")(s.samples) for s in steps])
        found = fit_lambda(phi[:, None], [0.3], log_ratio=log_ratio)
        if found.ess > ess:
            seen, ess = found.lambda_, found.ess
            if start < 4:
                following = keep.steps[start + 2]
                log_w = following.inputs["log_target"] - following.samples.log_prob
                wanted = float(log_w.logsumexp(0)) - math.log(8)
                assert following.inputs["log_z"].tolist() == pytest.approx([wanted] * 8)
    assert seen != first
    assert trainer.target.lambda_.tolist() == pytest.approx(seen, abs=1e-3)


def test_fitting_again_resumes(tmp_path):
    # with this seed lambda is fitted both before the break and after it
    save = {"save_strategy": "steps", "save_steps": 1, "seed": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = poorly_fitted(tmp_path / "whole", **save)
        whole.train()
        broken = poorly_fitted(tmp_path / "broken", callbacks=[StopAt(3)], **save)
        broken.train()
        resumed = job(tmp_path / "broken", **REFIT, **save)
        resumed.train(resume_from_checkpoint=True)
    assert digest(resumed.model) == digest(whole.model)
    assert resumed.target.lambda_.tolist() == whole.target.lambda_.tolist() != broken.target.lambda_.tolist()
