"""Evaluations of DMTrainer: fresh samples of pi, on the trainer's prompts and on others."""

from __future__ import annotations

import pytest
import torch
from trainer_job import PROMPTS, job
from trainer_tools import (
    one_thread,  # noqa: F401
)

from dmfast import Contains, Scorer

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:.*from that sample alone")


def test_evaluation_tells_the_truth_of_pi(tmp_path):
    trainer = job(tmp_path, eval_samples=1000, eval_strategy="steps", eval_steps=2, learning_rate=0.0, max_steps=2)
    trainer.model.lm_head.weight.data[3] *= 2  # pi is not a
    trainer.train()
    metrics = next(h for h in trainer.state.log_history if "eval_kl_policy_base" in h)
    x = trainer.policy.sample(n=5_000, max_new_tokens=6, seed=123)
    share = Contains("w3")(x).mean().item()
    gap = x.log_prob - trainer.target.base.log_prob(x)
    for name, value in (("phi/w3", share), ("kl_policy_base", gap.mean().item())):
        error = metrics[f"eval_{name}_stderr"]
        assert 0 < error < 0.05
        assert abs(metrics[f"eval_{name}"] - value) < 5 * error, name
    assert metrics["eval_kl_policy_base"] > 3 * metrics["eval_kl_policy_base_stderr"]
    assert metrics["step"] == 2 and len(trainer.eval_samples) == 1000
    assert metrics["eval_length"] == pytest.approx(float(x.score_mask.sum(1).double().mean()), abs=0.1)
    again = trainer.evaluate()
    assert again["eval_phi/w3"] == metrics["eval_phi/w3"]  # common random numbers


def test_evaluation_on_other_prompts(tmp_path):
    trainer = job(tmp_path, prompts=PROMPTS, samples_per_context=2, eval_samples=6)
    trainer.evaluate(["w1", "w2 w3", "w4"])
    assert trainer.eval_samples.context_id.tolist() == [0, 0, 1, 1, 2, 2]
    trainer.evaluate()
    assert trainer.eval_samples.context_id.tolist() == [0, 1, 2, 3, 4, 5]


def test_predict_has_no_meaning(tmp_path):
    with pytest.raises(NotImplementedError, match=r"use evaluate\(\)"):
        job(tmp_path).predict(None)


def test_several_eval_sets_are_told_apart_by_their_names(tmp_path, capsys):
    """In what evaluate returns, in the log, in the line, in the card; and the best model is found by one of them."""
    sets = {"short": ["w1", "w2"], "long": ["w1 w2 w3", "w4 w5 w6", "w0 w0 w1"]}
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2,
                "load_best_model_at_end": True, "metric_for_best_model": "eval_long_kl_policy_base",
                "greater_is_better": False, "learning_rate": 0.03, "eval_samples": 6}  # fmt: skip
    trainer = job(tmp_path, eval_dataset=sets, **settings)
    trainer.train()
    evaluations = [h for h in trainer.state.log_history if any(k.endswith("kl_policy_base") for k in h)]
    assert [sorted({k.split("_")[1] for k in h if k.startswith("eval_")}) for h in evaluations] == [
        ["short"],
        ["long"],
    ] * 2
    assert trainer.state.best_metric == evaluations[1]["eval_long_kl_policy_base"]
    found = trainer.evaluate()
    assert {"eval_short_phi/w3", "eval_long_phi/w3", "eval_short_runtime", "eval_long_kl_policy_stderr"} <= found.keys()
    assert len(trainer.eval_samples) == 6 and trainer.eval_samples.context_id.unique().tolist() == [0, 1, 2]
    alone = trainer.evaluate(sets["long"], metric_key_prefix="x")
    assert alone["x_phi/w3"] == found["eval_long_phi/w3"] == trainer.evaluate("long")["eval_phi/w3"]
    with pytest.raises(ValueError, match="eval_dataset has the sets short, long, and no 'wide'"):
        trainer.evaluate("wide")
    other = trainer.evaluate({"other": ["w7"]})
    assert "eval_other_kl_policy" in other
    printed = capsys.readouterr().out
    assert "evaluation of short  E_π[w3] 0." in printed and "evaluation of long  E_π[w3] 0." in printed
    trainer.save_model(str(tmp_path / "final"))
    card = (tmp_path / "final" / "README.md").read_text()
    assert "| short_kl_policy_base |" in card and "| long_kl_policy_base |" in card


def test_scorers_see_the_rows_of_an_evaluation(tmp_path):
    rows = [{"prompt": "w1", "answer": "w3"}, {"prompt": "w3", "answer": "w4"}]
    constraint = Scorer(right, on="samples", name="right")
    trainer = job(tmp_path, constraints=[constraint], eval_dataset=rows, prompts=rows, samples_per_context=4)
    found = trainer.evaluate()
    assert found["eval_phi/right"] == pytest.approx(float(right(trainer.eval_samples).mean()))
    assert [row["answer"] for row in trainer.eval_samples.rows] == ["w3"] * 16 + ["w4"] * 16


def right(x):
    """Whether the answer of the row is in the text."""
    return torch.tensor([float(row["answer"] in text) for row, text in zip(x.rows, x.text, strict=True)])
