"""Test sequences that came from elsewhere: they are laid out and scored as the sampler's own.

With their own log q they train as any sample does, and without it by likelihood only.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from test_models import BOS, EOS, PAD, V, alone, build, check_gradients, close, gradients, lm, same, tok

from dmfast import EBM, Contains, LanguageModel, Matcher, Moment, Objective, OfflineProposal
from dmfast.diagnostics import gradient_variance
from dmfast.rejection import quasi_rejection_sample, rejection_curve
from dmfast.samples import Samples
from dmfast.sampling import Mixture

PROMPTS = [[1, 2, 3], [4], [6, 1]]
UNKNOWN = "samples_of got no log_prob"


def ids_of(x):
    """Return the generated tokens of each sequence, up to and with EOS."""
    return [row[scored].tolist() for row, scored in zip(x.tokens, x.score_mask, strict=True)]


def repeated(prompts, n):
    return [prompt for prompt in prompts for _ in range(n)]


@pytest.mark.parametrize("tokenizer", ["own pad", "pad = eos", "no bos"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_the_sampler_drew_comes_back_as_it_was(tokenizer, temperature):
    policy = lm(tokenizer=tokenizer)
    for prompts in (PROMPTS, None):
        x = policy.sample(prompts, 5, max_new_tokens=8, temperature=temperature, seed=3)
        ended = [ids[-1] == EOS for ids in ids_of(x)]
        assert {True, False} == set(ended) or prompts is None
        given = None if prompts is None else repeated(prompts, 5)
        for completions, append_eos in (
            (ids_of(x), False),
            (ids_of(x), ended),  # the sequences have an EOS already, so nothing is appended
            ([torch.tensor(ids) for ids in ids_of(x)], np.array(ended)),
        ):
            y = policy.samples_of(
                given, completions, append_eos=append_eos, log_prob=x.log_prob, temperature=temperature
            )
            assert same(x, y) and y.has_log_prob
            assert (y.temperature, y.pad_token_id, y.tokenizer) == (temperature, x.pad_token_id, x.tokenizer)
        assert (policy.log_prob(y) - x.log_prob).abs().max() < 1e-4


def test_an_end_that_log_q_does_not_cover_is_not_appended():
    """Log q of a sequence that was cut at max_new_tokens covers its tokens, and no EOS after them."""
    policy = lm()
    x = policy.sample(PROMPTS, 5, max_new_tokens=8, seed=3)
    cut = [i for i, ids in enumerate(ids_of(x)) if ids[-1] != EOS]
    given = repeated(PROMPTS, 5)
    assert 0 < len(cut) < len(x)
    with pytest.raises(ValueError, match=f"completion {cut[0]} .*put token {EOS} after it, which log_prob does not"):
        policy.samples_of(given, ids_of(x), append_eos=True, log_prob=x.log_prob)
    stripped = [[token for token in ids if token != EOS] for ids in ids_of(x)]
    first = next(i for i, ids in enumerate(ids_of(x)) if ids[-1] == EOS)
    flags = [i == first for i in range(len(x))]
    with pytest.raises(ValueError, match=f"completion {first} .*log_prob does not cover.*among the ids"):
        policy.samples_of(given, stripped, append_eos=flags, log_prob=x.log_prob)
    with pytest.raises(ValueError, match=r"completion 0 .*log_prob does not cover"):
        policy.samples_of(["w1"], [[]], append_eos=True, log_prob=[-1.0])
    # Without log q nothing contradicts an EOS that is appended.
    known = policy.samples_of(given, stripped, append_eos=True)
    assert not known.has_log_prob and all(ids[-1] == EOS for ids in ids_of(known))


def test_layout_by_hand():
    policy = lm()
    x = policy.samples_of(
        ["w1 w2", "", "w1 w2"],
        ["w3", "w4 w4 <e>", [8]],
        append_eos=[True, False, False],
        rows=[{"a": i} for i in "xyz"],
    )
    assert x.tokens.tolist() == [[1, 2, 3, EOS, PAD], [PAD, BOS, 4, 4, EOS], [1, 2, 8, PAD, PAD]]
    assert x.attention_mask.tolist() == [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert x.score_mask.int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 0, 0]]
    assert (x.prompt_len, x.context_id.tolist(), x.version.tolist()) == (2, [0, 1, 0], [0, 0, 0])
    assert x.text == ["w3", "w4 w4", "w6"] and [row["a"] for row in x.rows] == ["x", "y", "z"]
    assert x.log_prob.dtype == torch.float64 and x.log_prob.isnan().all() and not x.has_log_prob
    everything = policy.samples_of(None, ["w3", "w3 <e>"], append_eos=True)
    assert everything.tokens.tolist() == [[BOS, 3, EOS]] * 2 and everything.context_id.tolist() == [0, 0]
    other = LanguageModel(build(), tok(), eos_token_id=[EOS, 8])
    assert other.samples_of([[1]], [[2]], append_eos=True).tokens.tolist() == [[1, 2, EOS]]
    assert other.samples_of([[1]], [[2]], append_eos=True, eos_token_id=8).tokens.tolist() == [[1, 2, 8]]
    assert other.samples_of([[1]], [[2, 8]], append_eos=True).tokens.tolist() == [[1, 2, 8]]


def test_they_are_scored_as_each_alone_is():
    policy = lm("llama")
    completions = [[2, 3, EOS], [4, 8, 8, 1], [10, EOS]]
    x = policy.samples_of(PROMPTS, completions, append_eos=False, temperature=1.3)
    found = policy.log_prob(x)
    assert (found - alone(policy.model, x, PROMPTS, 1)).abs().max() < 1e-4
    parts = Samples.cat([x[:1], x[1:]])
    assert not parts.has_log_prob and torch.equal(policy.log_prob(parts), policy.log_prob(x))


def test_by_likelihood_the_gradient_is_that_of_the_mean_log_prob():
    policy = lm()
    completions = [[2, 3, EOS], [4, 8, 8, 1], [10, EOS]]
    x = policy.samples_of(PROMPTS, completions, append_eos=False)
    reward = torch.tensor([1.0, 0.0, 1.0])
    for weight, loss in (
        (torch.ones(3), lambda: policy.loss(x, objective="reinforce", on_policy=True, reward=torch.ones(3)).loss),
        (reward, lambda: policy.loss(x, objective=Objective("reinforce"), on_policy=True, reward=reward).loss),
        (torch.ones(3), lambda: policy.loss(x, objective=lambda terms: torch.ones_like(terms.log_prob)).loss),
    ):
        expected = -(weight * alone(policy.model, x, PROMPTS, 1)).mean()
        expected.backward()
        wanted = gradients(policy.model)
        found = loss()
        found.backward()
        close(found.detach(), expected.detach())
        check_gradients(gradients(policy.model), wanted)
    assert gradient_variance(policy, x, torch.ones(3).double()).variance > 0


def test_with_log_q_they_train_like_any_sample():
    policy, q = lm(), lm("llama")
    x = q.sample(PROMPTS, 4, max_new_tokens=6, seed=1)
    y = policy.samples_of(repeated(PROMPTS, 4), ids_of(x), append_eos=False, log_prob=x.log_prob.tolist())
    for objective in ("gdc++", "dpg", "reverse_kl"):
        found = []
        for samples in (x, y):
            out = policy.loss(samples, objective=objective, log_target=x.log_prob - 0.3, log_z=0.1,
                              log_proposal=samples.log_prob)  # fmt: skip
            out.loss.backward()
            found.append((out.loss.detach(), gradients(policy.model)))
        assert found[0][0] == found[1][0]
        check_gradients(found[0][1], found[1][1])


# --- what needs log q refuses sequences without it ---------------------------------------------------------------


def unknown(policy=None):
    policy = lm() if policy is None else policy
    return policy.samples_of(PROMPTS, [[3, EOS], [2], [4]], append_eos=False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": "gdc++", "log_z": 0.0},
        {"objective": "gdc++", "log_z": 0.0, "on_policy": True},
        {"objective": "dpg", "log_z": 0.0, "log_proposal": "own"},
        {"objective": "reinforce", "reward": 1.0},
        {"objective": "reinforce", "reward": 1.0, "log_proposal": "own", "on_policy": True},
        {"objective": "kl_control", "reward": 1.0, "log_base": -1.0, "on_policy": True},
        {"objective": Objective("tv"), "log_z": 0.0, "on_policy": True},
        {"objective": lambda terms: terms.reward, "reward": 1.0, "on_policy": True},
    ],
    ids=lambda options: " ".join(f"{key}" for key in options),
)
def test_a_loss_that_would_use_log_q_refuses(options):
    policy, x = lm(), unknown()
    given = {name: torch.full((3,), value).double() if isinstance(value, float) else value
             for name, value in options.items()}  # fmt: skip
    if given.get("log_proposal") == "own":
        given["log_proposal"] = x.log_prob
    if given.get("objective") == "kl_control":
        given["objective"] = Objective("kl_control", beta=0.1)
    with pytest.raises(ValueError, match=UNKNOWN):
        policy.loss(x, log_target=torch.zeros(3), **given)
    assert not gradients(policy.model)


def test_log_q_that_was_scored_later_is_log_q():
    policy, q = lm(), lm("llama")
    x = unknown()
    log_q = q.log_prob(x).detach()
    out = policy.loss(x, log_target=log_q, log_proposal=log_q, log_z=0.0)
    known = dataclasses.replace(x, log_prob=log_q, has_log_prob=True)
    assert torch.equal(out.weight, policy.loss(known, log_target=log_q, log_proposal=known.log_prob, log_z=0.0).weight)


class Elsewhere:
    """Draw sequences without saying their log q."""

    version = 0

    def __init__(self, model):
        self.model, self.log_prob, self.load = model, model.log_prob, model.load

    def sample(self, prompts=None, n=1, **options):
        options.pop("first_row", None)
        x = self.model.sample(prompts, n, **options)
        prompts = [[BOS]] * len(x) if prompts is None else repeated(prompts, n)
        return self.model.samples_of(prompts, ids_of(x), append_eos=False, temperature=x.temperature)


def test_fit_steps_and_rejection_refuse():
    base, policy = lm(), lm()
    moment = EBM(base, [Moment(Contains("w3"), 0.4)])
    with pytest.raises(ValueError, match=f"a fit of lambda needs log q.*{UNKNOWN}"):
        moment.fit(unknown(base))
    assert not moment.fitted
    target = EBM(base, [Contains("w3")])
    elsewhere = Elsewhere(lm())
    matcher = Matcher(policy, target, OfflineProposal(policy, sampler=elsewhere))
    with pytest.raises(ValueError, match=f"a step needs log q.*{UNKNOWN}"):
        matcher.draw(PROMPTS, 2, max_new_tokens=3)
    with pytest.raises(ValueError, match=f"rejection curve needs log q.*{UNKNOWN}"):
        rejection_curve(target, elsewhere, 8, max_new_tokens=3)
    with pytest.raises(ValueError, match=f"rejection sampling needs log q.*{UNKNOWN}"):
        quasi_rejection_sample(target, elsewhere, 2, log_beta=0.0, max_new_tokens=3)
    both = Samples.cat([unknown(), lm().sample(PROMPTS, 1, max_new_tokens=2, seed=0)])
    assert both.log_prob.isnan().tolist() == [True] * 3 + [False] * 3 and not both.has_log_prob
    # A mixture scores all sequences itself, so that they have log q.
    mixed = Mixture([elsewhere, base]).sample(None, 16, max_new_tokens=3, seed=0)
    assert mixed.has_log_prob and mixed.log_prob.isfinite().all()
    scores = target.score(unknown())  # the target needs no log q
    assert scores.log_target.shape == (3,)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "completions", "more", "error", "match"),
    [
        (PROMPTS, [[1]], {}, ValueError, "one to one, got 3 prompts and 1 completions"),
        ([], [[1]], {}, ValueError, "prompts is empty"),
        (["w1"], [], {}, ValueError, "completions is empty"),
        (["w1"], "w2", {}, TypeError, "completions must be a list.*'w2'"),
        (["w1"], {"input_ids": [[1]]}, {}, TypeError, "completions must be a list"),
        (["w1"], [3], {}, TypeError, "completion 0 must be a string or a list of token ids, got 3"),
        (["w1"], [[1.5]], {}, TypeError, "completion 0 must be"),
        (["w1", "w1"], [[1], [1, EOS, 2]], {}, ValueError, "completion 1 goes on after its end: token 1 of 3, 5,"),
        (["w1"], ["w2 <e> <e>"], {}, ValueError, "completion 0 goes on after its end: token 1 of 3"),
        (["w1"], [[]], {}, ValueError, "completion 0 has no tokens"),
        (["w1"], [""], {}, ValueError, "completion 0 has no tokens"),
        (
            ["w1"],
            [[V]],
            {},
            ValueError,
            "completion 0 holds token 11, but the model has 11 embeddings: .*of this model",
        ),
        (["w1"], [[-1]], {}, ValueError, "completion 0 holds token -1"),
        ([[V]], [[1]], {}, ValueError, "prompt 0 holds token 11"),
        (["w1"], [[1] * 24], {}, ValueError, "prompt and completion 0 have 25 tokens, .* context of 24"),
        (["w1"], [[1]], {"append_eos": 1}, TypeError, "append_eos must be True, False or one"),
        (["w1"], [[1]], {"append_eos": [True, True]}, TypeError, "each of 1 completions"),
        (["w1"], [[1]], {"eos_token_id": 3}, ValueError, r"one of \[5\], got 3"),
        (["w1"], [[1]], {"eos_token_id": "<e>"}, TypeError, "eos_token_id must be a token id, got '<e>'"),
        (["w1"], [[1]], {"temperature": 0.0}, ValueError, "temperature must be a number, positive and finite, got 0.0"),
        (["w1"], [[1]], {"temperature": "1"}, ValueError, "temperature must be a number, positive and finite, got '1'"),
        (["w1"], [[1]], {"temperature": None}, ValueError, "temperature must be a number, .*got None"),
        (["w1"], [[1]], {"log_prob": [None]}, TypeError, r"log_prob must be a list of 1 numbers.*got \[None\]"),
        (["w1"], [[1]], {"log_prob": "x"}, TypeError, "log_prob must be a list of 1 numbers.*got 'x'"),
        (["w1"], [[1]], {"log_prob": {0: -1.0}}, TypeError, "log_prob must be a list of 1 numbers.*got {0: -1.0}"),
        (["w1"], [[1]], {"log_prob": [[-1.0], [-1.0, -2.0]]}, TypeError, "log_prob must be a list of 1 numbers"),
        (["w1"], [[1]], {"log_prob": np.array([None])}, TypeError, "log_prob must be a list of 1 numbers.*got array"),
        (["w1"], [[1]], {"log_prob": [-1.0, -1.0]}, ValueError, "for each of 1 completions.*got the shape"),
        (["w1"], [[1]], {"log_prob": torch.tensor([[-1.0]])}, ValueError, "for each of 1 completions"),
        (["w1"], [[1]], {"log_prob": torch.tensor([-1.0]).half()}, TypeError, "log_prob must be float32 or float64"),
        (["w1"], [[1]], {"log_prob": [math.nan]}, ValueError, "not above 0, got nan for completion 0"),
        (["w1"], [[1]], {"log_prob": [-math.inf]}, ValueError, "not above 0, got -inf"),
        (["w1"], [[1]], {"log_prob": [0.2]}, ValueError, "not above 0, got 0.2"),
        (["w1", "w1"], [[1], "w2"], {"log_prob": [-1.0, -1.0]}, ValueError, "a text that is tokenized anew may have"),
        (["w1"], [[1]], {"rows": []}, ValueError, "rows must hold one row"),
    ],
)
def test_samples_of_refuses(prompts, completions, more, error, match):
    with pytest.raises(error, match=match):
        lm().samples_of(prompts, completions, **{"append_eos": False, **more})


def test_whether_eos_is_appended_has_to_be_said():
    with pytest.raises(TypeError, match="append_eos"):
        lm().samples_of(["w1"], ["w2"])
    assert lm().samples_of(["w1"], [""], append_eos=True).tokens.tolist() == [[1, EOS]]
    just = lm().samples_of(["w1"], [[1] * 23], append_eos=False)
    assert just.tokens.shape == (1, 24)


# --- context between the tokens that were drawn --------------------------------------------------------------------

TURNS = [[3, 4, EOS, 6, 1, 2, 4, EOS], [2, 6, 1, 6], [4, 1, EOS]]
DRAWN = [
    [True, True, True, False, False, False, True, True],  # a turn of the model, the output of a tool, and another turn
    [True, False, True, False],  # the last token is context
    [False, True, True],  # the first token continues the prompt
]


def with_context(policy, **changed):
    given = {"append_eos": False, "score_mask": DRAWN, "temperature": 0.8, **changed}
    return policy.samples_of(PROMPTS, TURNS, **given)


def by_hand(policy, i):
    """Return log pi of each token of prompt and completion given those before it, from a plain forward."""
    ids = torch.tensor([PROMPTS[i] + TURNS[i]])
    with torch.no_grad():
        log_p = (policy.model(ids).logits[0, :-1] / 0.8).double().log_softmax(-1)
    of_tokens = log_p.gather(-1, ids[0, 1:, None])[:, 0]
    return of_tokens[-len(TURNS[i]) :]


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_context_feeds_the_model_and_is_not_scored(name, packs):
    policy = lm(name)
    policy.packs = packs
    x = with_context(policy, log_prob=[-3.0, -4.0, -5.0])
    n = x.prompt_len
    assert x.score_mask[:, n:].tolist() == [row + [False] * (8 - len(row)) for row in DRAWN]
    assert x.attention_mask[:, n:].sum(1).tolist() == [8, 4, 3] and x.score_mask[:, :n].sum() == 0
    assert x.text == ["w3 w4 w4", "w2 w1", "w1"] and x.log_prob.tolist() == [-3.0, -4.0, -5.0]
    expected = [by_hand(policy, i) for i in range(3)]
    sums = torch.stack([each[torch.tensor(drawn)].sum() for each, drawn in zip(expected, DRAWN, strict=True)])
    close(policy.log_prob(x).detach(), sums)
    each = policy.token_log_prob(x, batch_size=2)
    for i, drawn in enumerate(DRAWN):
        found = each[i, n : n + len(drawn)]
        close(found, torch.where(torch.tensor(drawn), expected[i], 0.0))
    assert each.shape == x.tokens.shape and bool((each[~x.score_mask] == 0).all()) and not each.requires_grad
    both = Samples.cat([x[:1], x[1:]])
    close(policy.log_prob(both[[2, 0]]).detach(), sums[[2, 0]])


@pytest.mark.filterwarnings("ignore:dmfast forms all logits")
def test_a_token_weight_is_of_the_samples_tokens():
    """Its gradient is that of the weighted log pi of the scored tokens, however the logits are made and laid out."""
    policy = lm()
    x = with_context(policy, log_prob=[-3.0, -4.0, -5.0])
    w = torch.randn(x.tokens.shape, generator=torch.Generator().manual_seed(0))
    a = torch.tensor([1.0, -2.0, 0.5])
    known = {"objective": "reinforce", "on_policy": True, "reward": a}

    labels = torch.where(x.score_mask, x.tokens, 0)[:, 1:, None]
    logits = policy.model(x.tokens, attention_mask=x.attention_mask,
                          position_ids=(x.attention_mask.cumsum(1) - 1).clamp(min=0)).logits  # fmt: skip
    log_pi = (logits[:, :-1].double() / 0.8).log_softmax(-1).gather(-1, labels)[..., 0] * x.score_mask[:, 1:]
    loss = -(a * (w[:, 1:] * log_pi).sum(1)).mean()
    loss.backward()
    expected = gradients(policy.model)
    wide = Samples.cat([x, with_context(policy)])[:3]  # the loss trims this padding away
    wide = dataclasses.replace(
        wide, **{name: torch.nn.functional.pad(getattr(wide, name), (2, 3)) for name in ("tokens", "attention_mask",
                                                                                          "score_mask")},
        prompt_len=wide.prompt_len + 2,
    )  # fmt: skip
    for samples, weights in ((x, w), (wide, torch.nn.functional.pad(w, (2, 3), value=7.0))):
        for form in (False, True):
            made = lm()
            made.model.load_state_dict(policy.model.state_dict())
            if form:
                made._head.why_not = lambda model: "a test"
                made._head.read = lambda *_: None
            out = made.loss(samples, token_weight=weights, **known)
            close(out.loss.detach(), loss.detach())
            out.loss.backward()
            check_gradients(gradients(made.model), expected)
    with pytest.raises(
        ValueError, match=r"a weight for each of samples.tokens, \(3, 11\), prompt and padding included"
    ):
        policy.loss(x, token_weight=w[:, 1:], **known)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"score_mask": DRAWN[:2]}, "score_mask must hold bools for each of 3 completions"),
        (
            {"score_mask": [DRAWN[0], [True], DRAWN[2]]},
            "score_mask of completion 1 must be 4 bools, one for each of its",
        ),
        ({"score_mask": [DRAWN[0], [1, 0, 1, 0], DRAWN[2]]}, r"score_mask of completion 1 must be 4 bools.*got \[1, 0"),
        (
            {"score_mask": [DRAWN[0], [False] * 4, DRAWN[2]]},
            "completion 1 has no token that was drawn, by its score_mask",
        ),
        ({"score_mask": [[True] * 8, *DRAWN[1:]]}, "completion 0 goes on after its end.*mark it by score_mask"),
        ({"append_eos": True}, "completion 1 ends in context, by its score_mask, after which append_eos"),
    ],
)
def test_what_a_score_mask_may_not_be(changed, message):
    with pytest.raises(ValueError, match=message):
        with_context(lm(), **changed)


def test_a_score_mask_is_of_token_ids():
    with pytest.raises(ValueError, match="score_mask belongs to the token ids that were drawn"):
        lm().samples_of(None, ["w1"], append_eos=True, score_mask=[[True]])
