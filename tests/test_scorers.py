"""Test scorers that keep what they know, classifiers against their own pipeline, and rewards against KL-control."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tabular import one_thread  # noqa: F401
from test_targets import Base, byte_tokenizer, word_tokenizer, written
from trainer_job import job
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification, pipeline

import dmfast
from dmfast import EBM, Classifier, Contains, Moment, Reward, Scorer

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")
WORDS = ["good", "bad", "film", "not", "a", "."]
BYTES = byte_tokenizer()
TEXTS = ["a good film .", "bad", "not a bad film", "good good good good", "film", ""]


# --- the cache


class Lengths:
    """Return the number of characters, and keep a record of what was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, inputs):
        self.asked.append(list(inputs))
        return [float(len(each)) for each in inputs]


@pytest.mark.parametrize("on", ["text", "tokens"])
def test_what_is_known_is_not_asked_again(on):
    fn = Lengths()
    scorer = Scorer(fn, on=on, cache=100)
    plain = Scorer(Lengths(), on=on)
    first = written(["ab", "c", "ab", "def"], ["x", "", "yy", ""], BYTES)
    second = written(["c", "ghij", "ab"], tokenizer=BYTES)
    for samples in (first, second):
        found = scorer(samples)
        assert found.dtype == torch.float64 and torch.equal(found, plain(samples))
    assert [len(batch) for batch in fn.asked] == [3, 1]
    assert (scorer.counts.scored, scorer.counts.cached) == (4, 3) and scorer.counts.seconds > 0
    assert (plain.counts.scored, plain.counts.cached) == (7, 0)


def test_the_cache_forgets_what_was_asked_for_longest_ago():
    fn = Lengths()
    scorer = Scorer(fn, on="text", cache=2)
    for text in ("a", "b", "a", "c", "a", "b"):  # "c" takes the place of "b", then "b" takes that of "c"
        scorer(written([text], tokenizer=BYTES))
    assert fn.asked == [["a"], ["b"], ["c"], ["b"]]
    some = written(["aaa", "bb", "aaa", "c", "dddd"], tokenizer=BYTES)
    assert scorer(some).tolist() == [3, 2, 3, 1, 4]


def test_the_same_ids_of_another_tokenizer_are_another_text():
    fn = Lengths()
    scorer = Scorer(fn, cache=10)
    assert float(scorer(written(["x"], tokenizer=word_tokenizer(["x"])))) == 1
    assert float(scorer(written(["yyy"], tokenizer=word_tokenizer(["yyy"])))) == 3


def test_a_value_that_is_refused_is_not_kept():
    values = iter([[math.nan], [2.0]])
    scorer = Scorer(lambda texts: next(values), cache=10)
    with pytest.raises(ValueError, match="finite"):
        scorer(written(["a"]))
    assert scorer(written(["a"])).tolist() == [2.0]


@pytest.mark.parametrize(
    ("more", "match"),
    [({"cache": -1}, "cache must be 0 or more"), ({"cache": 5, "on": "samples"}, "goes by the generated tokens")],
)
def test_a_cache_that_is_refused(more, match):
    with pytest.raises(ValueError, match=match):
        Scorer(len, **more)


def test_the_trainer_logs_what_scorers_did(tmp_path):
    """The logged numbers add up to the scorer's counts. Few sequences of 1 token differ, so the cache knows many."""
    scorer = Scorer(lambda texts: [float("w3" in t) for t in texts], name="w3", cache=1000, binary=True)
    reward = Scorer(lambda texts: [float(len(t)) for t in texts], name="len")
    trainer = job(tmp_path, constraints=[Moment(scorer, 0.6)], max_new_tokens=1, objective="reinforce", reward=reward,
                  on_policy=True)  # fmt: skip
    trainer.train()
    logs = [h for h in trainer.state.log_history if "scorer/w3/scored" in h]
    assert len(logs) == 4 and set(trainer.target.scorers) == {"w3"}
    for name, counts in (("w3", scorer.counts), ("len", reward.counts)):
        for what, value in vars(counts).items():
            assert sum(h[f"scorer/{name}/{what}"] for h in logs) == pytest.approx(value), (name, what)
    assert scorer.counts.scored + scorer.counts.cached == 32 == reward.counts.scored
    assert 0 < scorer.counts.scored <= 11 and reward.counts.cached == 0


# --- classifiers


def classifier(kind="single", labels=("NEGATIVE", "NEUTRAL", "POSITIVE")):
    torch.manual_seed(0)
    names = dict(enumerate(labels))
    config = {"num_labels": len(labels), "id2label": names, "label2id": {n: i for i, n in names.items()}}
    if kind == "gpt2":
        config = GPT2Config(vocab_size=len(WORDS) + 2, n_positions=16, n_embd=16, n_layer=2, n_head=2, pad_token_id=7,
                            initializer_range=0.5, **config)  # fmt: skip
        return GPT2ForSequenceClassification(config)
    problem = {"single": None, "multi": "multi_label_classification", "regression": "regression"}[kind]
    return BertForSequenceClassification(
        BertConfig(vocab_size=len(WORDS) + 2, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                   pad_token_id=7, intermediate_size=16, max_position_embeddings=16, initializer_range=0.5,
                   problem_type=problem, **config)
    )  # fmt: skip


CASES = [("single", ("NEGATIVE", "NEUTRAL", "POSITIVE")), ("multi", ("NEUTRAL", "POSITIVE")), ("single", ("POSITIVE",)),
         ("gpt2", ("NEGATIVE", "POSITIVE"))]  # fmt: skip


@pytest.mark.parametrize(("kind", "labels"), CASES)
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("as_pipeline", [False, True])
def test_a_classifier_says_what_transformers_pipeline_says(kind, labels, batch_size, as_pipeline):
    """The pipeline takes one text at a time, and the classifier padded batches, for each kind of head."""
    model, tokenizer = classifier(kind, labels).eval(), word_tokenizer(WORDS)
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    wanted = [next(each["score"] for each in pipe([text])[0] if each["label"] == "POSITIVE") for text in TEXTS[:-1]]
    given = (pipe,) if as_pipeline else (model.train(), tokenizer)
    samples = written(TEXTS, tokenizer=tokenizer, prompts=["bad"] * 6)

    def found(**more):
        return Classifier(*given, label="POSITIVE", batch_size=batch_size, **more)(samples)

    assert found().tolist()[:-1] == pytest.approx(wanted, abs=1e-6) and 0 < float(found()[-1]) < 1
    torch.testing.assert_close(found(output="log_probability"), found().log())
    middle = sorted(wanted)[2]
    binary = found(output="binary", threshold=middle - 1e-4).tolist()[:-1]
    assert binary == [score > middle - 1e-4 for score in wanted] and sum(binary) == 3
    assert max(wanted) - min(wanted) > 0.02


def test_a_classifier_is_cached_named_and_described():
    model, tokenizer = classifier(), word_tokenizer(WORDS)
    shapes = []
    model.register_forward_pre_hook(lambda *a: shapes.append(a[2]["input_ids"].shape), with_kwargs=True)
    scorer = Classifier(model, tokenizer, label="POSITIVE", batch_size=2, max_length=3)
    samples = written([*TEXTS, *TEXTS], tokenizer=tokenizer)
    values = scorer(samples)
    assert torch.equal(values[:6], values[6:]) and torch.equal(scorer(samples), values)
    assert [shape[0] for shape in shapes] == [2, 2, 2] and max(shape[1] for shape in shapes) == 3
    assert (scorer.counts.scored, scorer.counts.cached) == (6, 18)
    assert scorer.name == "POSITIVE" and not scorer.binary
    assert json.loads(json.dumps(scorer.describe()))["label"] == "POSITIVE"
    assert Classifier(model, tokenizer, label="POSITIVE", output="binary", name="good").binary


def test_no_text_at_all():
    samples = written(["", ""], tokenizer=word_tokenizer(WORDS))
    found = Classifier(classifier(), samples.tokenizer, label="POSITIVE")(samples)
    assert bool(found.isfinite().all())


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda t: Classifier(classifier(), t, label="positive"), ValueError, "'NEGATIVE', 'NEUTRAL', 'POSITIVE'"),
        (lambda t: Classifier(classifier(), label="POSITIVE"), ValueError, "needs the tokenizer"),
        (lambda t: Classifier(classifier("regression", ("A",)), t, label="A"), ValueError, "regression"),
        (lambda t: Classifier(torch.nn.Linear(2, 2), t, label="A"), TypeError, "got Linear"),
        (lambda t: Classifier(classifier(), t, label="POSITIVE", output="logit"), ValueError, "output must be"),
        (lambda t: Classifier(classifier(), t, label="POSITIVE", threshold=0), ValueError, "threshold"),
        (lambda t: Reward(len, 0.0), ValueError, "beta must be positive"),
        (lambda t: Reward(Contains("a"), 1.0, on="text"), TypeError, "has its options already; got on"),
        (lambda t: Reward(3, 1.0), TypeError, "Scorer takes a function"),
    ],
)
def test_what_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make(word_tokenizer(WORDS))


# --- rewards


def test_a_reward_is_the_constraint_exp_r_over_beta():
    texts = ["a", "ab", "abb", ""]
    reward = Reward(lambda texts: [t.count("b") - 1.0 for t in texts], beta=0.25, name="bs")
    target = EBM(Base(), [reward, Contains(regex="a")], monitor=[Contains("ab", name="ab")])
    scores = target.score(written(texts))
    r = [-1.0, 0.0, 1.0]
    assert scores.log_b.tolist() == pytest.approx([4 * x for x in r] + [-math.inf])
    assert scores.log_target.tolist() == pytest.approx([4 * x - len(t) for x, t in zip(r, texts, strict=False)]
                                                       + [-math.inf])  # fmt: skip
    assert scores.monitored[:, 0].tolist() == [*r, -1.0] and target.monitor_names == ["bs", "matches /a/", "ab"]
    assert json.loads(json.dumps(target.describe()))["pointwise"][0]["b"] == "exp(phi/beta)"


@pytest.mark.parametrize("size", [900.0, -900.0])
def test_a_reward_beyond_any_float(size):
    """exp(9000) is beyond fp64, and log P is not."""
    target = EBM(Base(), [Reward(lambda texts: [size] * len(texts), beta=0.1)])
    assert target.log_prob(written(["ab"])).tolist() == [size / 0.1 - 2]


def test_a_reward_is_r_in_a_moment_and_as_reward(tmp_path):
    reward = Reward(lambda texts: [float(len(t.split())) for t in texts], beta=2.0, name="words")
    moment = EBM(Base(), [Moment(reward, 2.0)])
    assert moment.features(written(["a b", "c"])).tolist() == [[2], [1]]
    trainer = job(tmp_path, constraints=[reward], objective="kl_control", beta=2.0, reward=reward, on_policy=True)
    trainer.train()
    logs = [h for h in trainer.state.log_history if "reward" in h]
    assert [h["phi/words"] for h in logs] == [h["reward"] for h in logs] and "scorer/words/scored" in logs[0]


def test_kl_control_s_gradient_points_to_the_reward_s_target():
    """E_pi[R] - beta KL(pi||a) = -beta KL(pi||p) + beta log Z: reverse_kl of p = a exp(R/beta)/Z, times beta."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(16, 3, 5, generator=generator)
    tokens = torch.randint(5, (16, 3), generator=generator)
    r, log_a = torch.randn(16, generator=generator).double(), -3 * torch.rand(16, generator=generator).double()
    beta, log_z, log_pi = 0.4, 0.7, dmfast.sequence_log_prob(logits, tokens)
    log_b = Reward(len, beta).log_b(r)
    common = {"log_proposal": log_pi, "on_policy": True}
    control = dmfast.dm_loss(logits, tokens, reward=r, log_base=log_a,
                             objective=dmfast.Objective("kl_control", beta=beta), **common).weight  # fmt: skip
    reverse = dmfast.dm_loss(logits, tokens, log_target=log_a + log_b, log_z=log_z, objective="reverse_kl",
                             **common).weight  # fmt: skip
    torch.testing.assert_close(control - beta * reverse, torch.full((16,), beta * (1 + log_z)).double())
