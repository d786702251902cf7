"""Test whether a run is rightly said to have come to its target."""

from __future__ import annotations

import math
import re

import pytest
import torch
from trainer_job import WORDS, gpt2, job, llama, tokenizer

from dmfast import EBM, Contains, LanguageModel, Moment, Scorer
from dmfast.estimators import Estimate
from dmfast.training.recipe import load
from dmfast.training.report import table
from dmfast.training.verdict import ideal, verdict

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")


@pytest.mark.parametrize("which", ["binary", "graded", "with a moment"])
def test_the_ideal_of_several_contexts(which):
    """The ideal agrees with all sequences of a small model. Each context has its own Z and weighs the same."""
    prompts, width = ["w1 w2", "w4 w5 w6", "w7"], 2
    base = LanguageModel(gpt2(), tokenizer())
    constraints = {
        "binary": [Contains("w6", name="w6")],
        "graded": [Scorer(lambda texts: [0.05 + ("w6" in text) for text in texts], name="b")],
        "with a moment": [Scorer(lambda texts: [1.0 + 3 * ("w4" in text) for text in texts], name="b"),
                          Moment(Contains("w6", name="w6"), 0.3)],
    }[which]  # fmt: skip
    target = EBM(base, constraints, monitor=[Contains("w1", name="w1")])
    target.fit(n=9000, contexts=prompts, max_new_tokens=width)
    lambda_ = float(target.lambda_[0]) if target.moment_names else 0.0

    def b_of(words):
        if which == "binary":
            return float("w6" in words)
        if which == "graded":
            return 0.05 + ("w6" in words)
        return (1.0 + 3 * ("w4" in words)) * math.exp(lambda_ * ("w6" in words))

    def of_context(prompt):
        """Return E_p[w6], E_p[w1], KL(p||a) and Z as sums over the sequences of up to two tokens."""
        ids = tokenizer()(prompt)["input_ids"]
        with torch.no_grad():
            first = base.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
            rows = torch.tensor([[*ids, token] for token in range(len(WORDS))])
            second = base.model(rows).logits[:, -1].double().softmax(-1)
        a = {(x,): float(first[x]) for x in (5,)}  # <e> ends a sequence
        a |= {(x, y): float(first[x] * second[x, y]) for x in range(len(WORDS)) if x != 5 for y in range(len(WORDS))}
        weights = {x: p * b_of([WORDS[token] for token in x]) for x, p in a.items()}
        z = sum(weights.values())
        share = {word: sum(w for x, w in weights.items() if WORDS.index(word) in x) / z for word in ("w6", "w1")}
        kl = sum(w / z * math.log(w / z / a[x]) for x, w in weights.items() if w)
        return share["w6"], share["w1"], kl, z

    *truth, z = zip(*map(of_context, prompts), strict=True)
    w6, w1, kl = (sum(values) / len(prompts) for values in truth)
    assert max(z) > 1.3 * min(z)
    wanted = ideal(target, base.sample(prompts, 3000, max_new_tokens=width, seed=1))
    found = {"phi/w1": w1, "kl_policy_base": kl} | ({"phi/w6": w6} if which != "graded" else {})
    for name, exact in found.items():
        error = wanted[name].stderr if which != "with a moment" else max(wanted[name].stderr, 0.01)
        assert error < 0.02 and abs(wanted[name].value - exact) < 4 * error + 1e-9, (name, wanted[name], exact)


@pytest.mark.parametrize(
    ("share", "kl", "says"),
    [
        (0.476, 0.7, "matches the target: E\\[women\\] is 0.476 ± 0.01, wanted 0.5; KL"),
        (0.43, 0.7, "did not come to its target: E\\[women\\] is 0.43 ± 0.01, wanted 0.5, which may differ by 0.063. "),
        (0.56, 0.7, "matches"),
        (0.57, 0.7, "did not come"),
        (0.5, 0.91, "matches"),
        (0.5, 0.95, "KL.* is 0.95 ± 0.03, ideal 0.69, which may differ by 0.24 .the policy has moved"),
        (0.5, 0.44, "did not come to its target: KL"),
        (math.nan, 0.7, "is unknown: E\\[women\\] is unknown, wanted 0.5; KL"),
        (0.1, 0.0, "did not come to its target: E.*; KL"),
        (0.5, -7e-8, "KL.* is 0 ± 0.03, ideal 0.69, which may differ"),
    ],
)
def test_the_verdict(share, kl, says):
    before = {"phi/women": Estimate(0.067, 0.003), "kl_policy_base": Estimate(0.0, 0.0)}
    after = {"phi/women": Estimate(share, 0.01), "kl_policy_base": Estimate(kl, 0.03)}
    wanted = {"phi/women": Estimate(0.5, 0.0), "kl_policy_base": Estimate(0.69, 0.02)}
    found = verdict(before, after, wanted, ["women"])
    assert re.search(says, found) and "nine tenths of its way" in found and "two standard errors" in found


@pytest.mark.parametrize(
    ("share", "kl", "says"),
    [
        (
            (0.47, 0.09),
            (0.44, 0.17),
            "is unknown: KL.* is 0.44 ± 0.17, ideal 0.138, and these sequences",
        ),
        (
            (0.25, 0.22),
            (0.14, 0.01),
            "is unknown: E.* is 0.25 ± 0.22, wanted 0.5, and .* the start, 0.067; KL",
        ),
        ((0.47, 0.02), (0.16, 0.02), "matches"),
        ((0.25, 0.22), (0.5, 0.05), "did not come to its target: KL"),
    ],
)
def test_samples_that_would_pass_a_policy_that_has_not_moved_say_nothing(share, kl, says):
    before = {"phi/women": Estimate(0.067, 0.003), "kl_policy_base": Estimate(0.0, 0.0)}
    after = {"phi/women": Estimate(*share), "kl_policy_base": Estimate(*kl)}
    wanted = {"phi/women": Estimate(0.5, 0.0), "kl_policy_base": Estimate(0.138, 0.0)}
    assert re.search(says, verdict(before, after, wanted, ["women"]))
    there = {"phi/women": Estimate(0.5, 0.0), "kl_policy_base": Estimate(0.0, 0.0)}
    assert verdict(there, there, there, ["women"]).startswith("The policy matches")


@pytest.mark.parametrize(("now", "says"), [(0.0, "did not come to its target"), (1.0, "matches the target is unknown")])
def test_a_verdict_on_what_no_sample_shows(now, says):
    """Where no sequence of the base has a 0/1 constraint, p's mean of it is known to be 1, and KL(p||a) is unknown."""
    name, nothing = 'contains "zzzz"', Estimate(math.nan, math.nan)
    others = {"phi/half": Estimate(0.5, 0.0), "kl_policy": nothing}
    before = {f"phi/{name}": Estimate(0.0, 0.0), "kl_policy_base": Estimate(0.0, 0.0), **others}
    after = {f"phi/{name}": Estimate(now, 0.0), "kl_policy_base": Estimate(-1.454e-06, 9.6e-07), **others}
    target = EBM(load("tiny-bios"), [Contains("zzzz"), Scorer(lambda texts: [0.5] * len(texts), name="half")])
    x = target.base.sample(n=2, max_new_tokens=2, seed=0)
    wanted = ideal(target, x)
    assert wanted[f"phi/{name}"] == Estimate(1.0, 0.0) and math.isnan(wanted["phi/half"].value)
    found = verdict(before, after, wanted, [name])
    assert says in found and "nan" not in found
    assert f"E[{name}] is {now:g}, wanted 1" in found
    assert f"KL(π‖a) is 0, ideal unknown: no sequence had {name}" in found
    log = {"before": before, "after": after, "ideal": wanted, "target": target.describe()}
    rows = dict(zip(*(column._cells for column in table(log).columns[:2]), strict=True))
    assert rows["KL(p‖π), nats"] == f"unknown: no sequence had {name}" and rows["KL(π‖a), nats"] == "0"
    assert list(table(log).columns[3]._cells) == ["1", "unknown", "unknown", ""]


def test_a_trainer_says_its_verdict(tmp_path):
    """A policy that was made equal to p matches it, and the base does not, alone or by the sets of an evaluation."""
    start = llama()
    with torch.no_grad():
        out = start(torch.tensor([[9]]), output_hidden_states=True)  # the empty context is the token <s>
    hidden, a = out.hidden_states[-1][0, -1], float(out.logits[0, -1].softmax(-1)[3])
    settings = {"base": start, "lambda_": math.log(0.6 / 0.4) - math.log(a / (1 - a)), "max_new_tokens": 1,
                "eval_samples": 2000}  # fmt: skip
    tilted = llama()
    tilted.lm_head.weight.data[3] += settings["lambda_"] * hidden / hidden.square().sum()
    trainer = job(tmp_path, model=tilted, **settings)
    before, state = [p.clone() for p in trainer.model.parameters()], torch.get_rng_state()
    found = trainer.verdict()
    share = re.match(r"The policy matches the target: E\[w3\] is (0\.\d+) ± 0\.01\d*, wanted ", found)
    assert float(share[1]) == pytest.approx(0.6, abs=0.04)
    assert "Criterion: " in found
    assert all(map(torch.equal, before, trainer.model.parameters())) and torch.equal(state, torch.get_rng_state())
    trainer = job(tmp_path, model=llama(), eval_dataset={"one": ["w1"], "two": ["w2", "w4 w1"]}, **settings)
    lines = trainer.verdict().split("\n")
    assert len(lines) == 2 and all(map(re.match, ["one: The run did not come", "two: The run did not come"], lines))
    assert trainer.verdict("two") == lines[1].removeprefix("two: ")
    with pytest.raises(ValueError, match="eval_dataset has the sets one, two, and no 'three'"):
        trainer.verdict("three")


def test_a_verdict_on_other_prompts_has_what_p_has_there(tmp_path):
    """Lambda is fitted on prompts where w3 is rare. On another prompt p has another share, and no policy the wanted."""
    trainer = job(tmp_path, prompts=["w7 w1", "w2 w0"], eval_samples=4000, max_new_tokens=2, samples_per_context=4)
    trainer.target.fit(n=4000, contexts=["w7 w1", "w2 w0"], max_new_tokens=2)
    x = trainer.target.base.sample(["w6 w5"], 4000, max_new_tokens=2, seed=1)
    wanted, of_fit = ideal(trainer.target, x, fitted=False), ideal(trainer.target, x)
    assert (
        of_fit["phi/w3"] == Estimate(0.6, 0.0) and abs(wanted["phi/w3"].value - 0.6) > 5 * wanted["phi/w3"].stderr > 0
    )
    assert "wanted 0.6" in trainer.verdict()
    said = re.search(r"E\[w3\] is .*, wanted ([\d.]+)", trainer.verdict(["w6 w5"]))
    assert float(said[1].rstrip(".")) == pytest.approx(wanted["phi/w3"].value, abs=6 * wanted["phi/w3"].stderr)
