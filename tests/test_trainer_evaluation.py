"""Test evaluations of DMTrainer: fresh samples of pi, on the trainer's prompts and on others."""

from __future__ import annotations

import pytest
import torch
from trainer_job import PROMPTS, job
from trainer_tools import (
    one_thread,  # noqa: F401
)

from dmfast import Contains, Moment, Scorer, Verifier
from dmfast.training.judge import Judge
from dmfast.verified import distinct_at_k, maj_at_k, pass_at_k

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:.*from that sample alone")


def test_evaluation_tells_the_truth_of_pi(tmp_path):
    trainer = job(tmp_path, eval_samples=500, eval_strategy="steps", eval_steps=2, learning_rate=0.0, max_steps=2)
    trainer.model.lm_head.weight.data[3] *= 2  # this makes pi differ from a
    trainer.train()
    metrics = next(h for h in trainer.state.log_history if "eval_kl_policy_base" in h)
    x = trainer.policy.sample(n=2_000, max_new_tokens=6, seed=123)
    share = Contains("w3")(x).mean().item()
    gap = x.log_prob - trainer.target.base.log_prob(x)
    for name, value in (("phi/w3", share), ("kl_policy_base", gap.mean().item())):
        error = metrics[f"eval_{name}_stderr"]
        assert 0 < error < 0.05
        assert abs(metrics[f"eval_{name}"] - value) < 5 * error, name
    assert metrics["eval_kl_policy_base"] > 3 * metrics["eval_kl_policy_base_stderr"]
    assert metrics["step"] == 2 and len(trainer.eval_samples) == 500
    assert metrics["eval_length"] == pytest.approx(float(x.score_mask.sum(1).double().mean()), abs=0.2)
    again = trainer.evaluate()
    # evaluations use the same random numbers
    assert again["eval_phi/w3"] == metrics["eval_phi/w3"]


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
    """Their names are in what evaluate returns, in the log, the line and the card. One of them finds the best model."""
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
    assert "evaluation of short  share of w3 0." in printed and "evaluation of long  share of w3 0." in printed
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


QUESTIONS = [{"prompt": "w1", "answer": "w3"}, {"prompt": "w3", "answer": "w4"}, {"prompt": "w2", "answer": "w2"}]


def has_answer(texts, rows):
    return [row["answer"] in text for text, row in zip(texts, rows, strict=True)]


def test_an_evaluation_says_pass_at_k_where_a_verifier_judges(tmp_path, capsys):
    verifier = Verifier(has_answer, truncated="judge", answer=lambda text: text or None)
    settings = {"constraints": [verifier], "prompts": QUESTIONS, "samples_per_context": 8, "eval_samples": 24}
    trainer = job(tmp_path, eval_pass_k=(4, 1, 8, 1), **settings)
    found = trainer.evaluate()
    x = trainer.eval_samples
    right = torch.tensor(has_answer(x.text, x.rows))
    assert 0 < right.sum() < len(right) == 24 and 0 < x.finished.sum() < 24
    for k in (1, 4, 8):
        by_hand = pass_at_k(right, x.context_id, k)
        assert (found[f"eval_pass@{k}"], found[f"eval_pass@{k}_stderr"]) == (by_hand.value, by_hand.stderr)
    pairs = list(zip(right.tolist(), x.text, strict=True))
    assert found["eval_distinct@4"] == distinct_at_k(pairs, right, x.context_id, 4).value
    assert found["eval_maj@4"] == maj_at_k([text or None for text in x.text], right, x.context_id, 4).value
    assert found["eval_coverage"] == found["eval_pass@8"]
    assert found["eval_truncated"] == 1 - found["eval_finished"] and "eval_length_stderr" in found
    assert not {"eval_pass@2", "eval_pass@16", "eval_distinct@1", "eval_maj@1"} & found.keys()
    assert f"pass@1 {found['eval_pass@1']:.3f} ± {found['eval_pass@1_stderr']:.3f}" in capsys.readouterr().out
    assert {f"eval_pass@{k}" for k in (1, 4)} <= job(tmp_path, **settings).evaluate().keys()
    of_one = trainer.evaluate(QUESTIONS[:1])
    # one prompt gives no standard error
    assert "eval_pass@8" in of_one and "eval_pass@8_stderr" not in of_one


def test_what_judges(tmp_path):
    """The target's verifiers judge, or else monitored ones, or else a binary reward. Graded ones need a threshold."""
    half = Verifier(lambda texts, rows: [0.5 if "w3" in text else 0.1 for text in texts], truncated="judge")
    for threshold, share in ((0.5, "eval_phi/w3"), (0.6, None)):
        reward = Moment(Contains("w3", name="w3"), 0.6)
        trainer = job(tmp_path, constraints=[reward, Moment(half, 0.4)], eval_threshold=threshold)
        assert trainer.judge.features == (half,)
        metrics = trainer.evaluate()
        assert metrics["eval_pass@1"] == pytest.approx(metrics[share] if share else 0.0)
    binary = Scorer(lambda texts: [float("w3" in text) for text in texts], binary=True)
    trainer = job(tmp_path, reward=binary, objective="reinforce", on_policy=True)
    metrics = trainer.evaluate()
    assert metrics["eval_pass@1"] == pytest.approx(metrics["eval_phi/w3"])
    assert job(tmp_path, reward=lambda x: x.log_prob, objective="reinforce", on_policy=True).judge is None


def test_measures_of_two_ranks_are_those_of_all_their_samples(tmp_path):
    verifier = Verifier(has_answer, truncated="judge")
    trainer = job(tmp_path, constraints=[verifier], prompts=QUESTIONS, samples_per_context=8, eval_samples=48)
    trainer.evaluate()
    x, judge = trainer.eval_samples, Judge((verifier,), k=(1, 4))
    second = torch.arange(48) % 16 >= 8  # the second rank has the second half of each prompt's samples
    halves = x[~second], x[second]

    # the measures call this for one half, as that rank would
    def gather(values):
        name = next(n for n, each in of_first.items() if each.shape == values.shape and torch.equal(each, values))
        return torch.cat([values, of_second[name]])

    of_first, of_second = (
        {"right": verifier(h).bool(), "context": h.context_id, "finished": h.finished, "length": h.score_mask.sum(1)}
        for h in halves
    )
    found = judge.measured(halves[0], of_first["right"], gather, lambda texts: texts + halves[1].text)
    whole = judge.measured(x, verifier(x).bool(), lambda values: values, lambda texts: texts)
    assert {name: each.value for name, each in found.items()} == pytest.approx(
        {name: each.value for name, each in whole.items()}
    )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"eval_pass_k": [1, 16]}, ValueError, r"\[1, 16\] needs 16 samples of each prompt.* 11 of each of the 3 "
         "prompts of train_dataset: set eval_samples=48 or more"),
        ({"eval_pass_k": []}, ValueError, r"eval_pass_k must hold one or more positive integers.*got \[\]"),
        ({"eval_pass_k": [0]}, ValueError, r"got \[0\]"),
        ({"eval_pass_k": [1, 2.5]}, ValueError, r"got \[1, 2.5\]"),
        ({"eval_pass_k": 4}, ValueError, "got 4"),
        ({"eval_threshold": 0.0}, ValueError, "eval_threshold must be above 0"),
        ({"eval_pass_k": [1], "constraints": [Contains("w3")]}, ValueError, "something that tells right from wrong"),
    ],
)  # fmt: skip
def test_measures_that_can_not_be_had_are_refused(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        job(
            tmp_path,
            **({"constraints": [Verifier(has_answer)], "prompts": QUESTIONS, "samples_per_context": 8} | settings),
        )


def test_other_prompts_need_enough_samples_too(tmp_path):
    trainer = job(
        tmp_path, constraints=[Verifier(has_answer)], prompts=QUESTIONS, samples_per_context=8, eval_pass_k=[8]
    )
    with pytest.raises(ValueError, match=r"needs 8 samples of each prompt.*5 of each of the 7 prompts of eval_dataset"):
        trainer.evaluate([{"prompt": each, "answer": "w3"} for each in PROMPTS])


def test_an_answer_that_is_right_once_and_wrong_once_leaves_maj_out(tmp_path):
    verifier = Verifier(has_answer, truncated="judge", answer=lambda text: "the same")
    trainer = job(tmp_path, constraints=[verifier], prompts=QUESTIONS, samples_per_context=8)
    with pytest.warns(UserWarning, match="maj@k is left out of this evaluation: the answer 'the same' of context"):
        found = trainer.evaluate()
    assert "eval_pass@4" in found and "eval_maj@4" not in found


def right(x):
    """Return whether the answer of the row is in the text."""
    return torch.tensor([float(row["answer"] in text) for row, text in zip(x.rows, x.text, strict=True)])
