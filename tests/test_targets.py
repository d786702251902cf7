"""Test targets.

The tests are about what counts as containing a word, and about scores in which the base runs only where b > 0. lambda
is compared with closed forms and with all 125 sequences of a tabular model. Where no lambda exists, the error must say
so.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tabular import Space, counts, one_thread  # noqa: F401
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import dmfast
from dmfast import EBM, Contains, Moment, Scorer
from dmfast.samples import Samples
from dmfast.seeds import seed_for
from dmfast.targets import Feature, LambdaFit, fit_lambda
from dmfast.training.recipe import TINY_BIOS, load

INF = math.inf
EOS, PAD = "<e>", "<p>"


# --- samples by hand --------------------------------------------------------------------------------------------


def byte_tokenizer(pad=PAD):
    """Return a tokenizer with one token per byte, but for "ing" and " she". Every other word is many tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("i", "n"), ("in", "g"), ("s", "h"), ("sh", "e"), ("Ġ", "she")]
    words = alphabet + ["".join(pair) for pair in merges] + [EOS, PAD]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, pad_token=pad)


def word_tokenizer(words, **special):
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, EOS, PAD])}, **special))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, pad_token=PAD, **special)


def written(texts, prompts=None, tokenizer=None, ended=True):
    """Return samples with these continuations, prompts left-padded, EOS at the end of each and padding after it."""
    tokenizer = tokenizer or byte_tokenizer()
    ids = [[tokenizer(text)["input_ids"] for text in side] for side in (prompts or [""] * len(texts), texts)]
    ids[1] = [row + [tokenizer.eos_token_id] * ended for row in ids[1]]
    width, rest = (max(len(row) for row in side) for side in ids)
    pad = tokenizer.pad_token_id
    rows = zip(*ids, strict=True)
    both = [(width - len(a), a, b, rest - len(b)) for a, b in rows]
    tokens = torch.tensor([[pad] * left + a + b + [pad] * right for left, a, b, right in both], dtype=torch.int64)
    mask = torch.tensor([[0] * left + [1] * len(a + b) + [0] * right for left, a, b, right in both])
    score = torch.tensor([[0] * width + [1] * len(b) + [0] * right for _, _, b, right in both]).bool()
    n = len(texts)
    return Samples(
        tokens, mask, score, width, -torch.arange(n).double(), torch.zeros(n, dtype=torch.int64), 1.0, tokenizer, pad
    )


class Base:
    """Be a base model with a known log a(x) for each text, which keeps a record of what it scored."""

    def __init__(self, log_a=lambda text: -float(len(text)), drawn=None):
        self.log_a, self.drawn = log_a, drawn
        self.scored, self.batch_sizes, self.asked = [], [], []

    def log_prob(self, samples, *, batch_size=None):
        assert not torch.is_grad_enabled()
        self.scored += samples.text
        self.batch_sizes.append(batch_size)
        return torch.tensor([self.log_a(text) for text in samples.text], dtype=torch.float64)

    def sample(self, prompts=None, n=1, **kwargs):
        self.asked.append({"prompts": prompts, "n": n, **kwargs})
        return self.drawn


def of_base(samples, base=None):
    """Return the samples as the base would have drawn them."""
    with torch.no_grad():
        log_prob = (base or Base()).log_prob(samples)
    return dataclasses.replace(samples, log_prob=log_prob)


# --- Contains ---------------------------------------------------------------------------------------------------

CASES = [
    ({"word": "she"}, "and she ran", 1),
    ({"word": "she"}, "she ran", 1),
    ({"word": "she"}, "so said she", 1),
    ({"word": "she"}, "she", 1),
    ({"word": "she"}, "was it (she), or", 1),
    ({"word": "she"}, "a shed", 0),
    ({"word": "she"}, "ashes", 0),
    ({"word": "she"}, "She ran", 1),
    ({"word": "She"}, "and SHE ran", 1),
    ({"word": "she", "ignore_case": False}, "She ran", 0),
    ({"word": "she", "ignore_case": False}, "and she ran", 1),
    ({"word": "she", "whole_word": False}, "a shed", 1),
    ({"word": "she", "whole_word": False}, "bashes", 1),
    ({"word": "she"}, "", 0),
    ({"word": "cross dressing"}, "a cross dressing gown", 1),
    ({"word": "cross dressing"}, "a cross undressing", 0),
    ({"word": "dress"}, "dressing", 0),
    ({"any_of": ["he", "she"]}, "then she ran", 1),
    ({"any_of": ["he", "she"]}, "then they ran", 0),
    ({"any_of": ["he", "she"]}, "and he", 1),
    ({"word": "C++"}, "in C++, fast", 1),
    ({"word": "C++"}, "in C+, fast", 0),
    ({"word": "."}, "the end.", 1),
    ({"word": "."}, "the end", 0),  # the dot is not a wildcard
    ({"word": "é"}, "un é seul", 1),
    ({"word": "caf"}, "un café", 0),  # é is a letter, and is two byte tokens
]


@pytest.mark.parametrize("on", ["text", "tokens"])
@pytest.mark.parametrize("pad", [PAD, EOS])
@pytest.mark.parametrize(("how", "text", "expected"), CASES)
def test_contains(how, text, expected, on, pad):
    """The result does not depend on the prompt, on padding on either side, or on other rows."""
    tokenizer = byte_tokenizer(pad)
    samples = written([text, "x" * 40, text], ["she C++. é he cross dressing caf", "a", ""], tokenizer)
    found = Contains(**how, on=on)(samples)
    assert found.dtype == torch.float64 and found.tolist() == [expected, 0, expected]


@pytest.mark.parametrize("on", ["text", "tokens"])
def test_contains_at_the_seam_and_without_eos(on):
    """A word does not count if half of it is in the prompt, and a special token's own text does not count."""
    samples = written(["e ran", "ran she", "p e"], ["sh", "", ""], ended=False)
    assert Contains("she", on=on)(samples).tolist() == [0, 1, 0]
    assert Contains("e", on=on)(written(["x", "y e"])).tolist() == [0, 1]


def test_contains_tokens_wants_the_tokenizers_own_spelling():
    """The letters s, h, e one by one read "she", but the tokenizer writes it as one token."""
    samples = written(["xyz"])
    samples.tokens[0, :3] = torch.tensor(samples.tokenizer.convert_tokens_to_ids(list("she")))
    assert samples.text == ["she"]
    assert Contains("she", on="text")(samples).tolist() == [1]
    assert Contains("she", on="tokens")(samples).tolist() == [0]


def test_contains_tokens_of_whole_words():
    """Without spaces among the tokens, neighbours are whole words. Words that the tokenizer lacks are refused."""
    samples = written(["a she b", "b b a"], tokenizer=word_tokenizer(["a", "b", "she"]))
    assert Contains("she", on="tokens")(samples).tolist() == [1, 0]
    assert Contains(any_of=["b a"], on="tokens")(samples).tolist() == [0, 1]
    with pytest.raises(ValueError, match="no tokens for 'zebra'"):
        Contains(any_of=["a", "zebra"], on="tokens")(samples)
    unknown = written(["a b"], tokenizer=word_tokenizer(["a", "b", "<u>"], unk_token="<u>"))
    with pytest.raises(ValueError, match="no tokens for 'zebra'"):
        Contains("zebra", on="tokens")(unknown)


@pytest.mark.parametrize("whole_word", [True, False])
@pytest.mark.parametrize("make", [byte_tokenizer, lambda: word_tokenizer(["a", "she"])], ids=["bytes", "words"])
def test_contains_tokens_finds_special_tokens(make, whole_word):
    """Special tokens are in no text, but they are tokens of it: EOS, one of the user's own, and one beside a word."""
    tokenizer = make()
    tokenizer.add_tokens(["<call>"], special_tokens=True)
    samples = written(["a <call> she", "she a", "a"], ["<call>", "", ""], tokenizer)
    cut = written(["she <call>", "a a"], tokenizer=tokenizer, ended=False)
    for word, expected, of_cut in (
        ("<call>", [1, 0, 0], [1, 0]), (EOS, [1, 1, 1], [0, 0]), (f"she{EOS}", [1, 0, 0], [0, 0]),
        (PAD, [0, 0, 0], [0, 0]),
    ):  # fmt: skip
        feature = Contains(word, on="tokens", whole_word=whole_word)
        assert feature(samples).tolist() == expected, word
        assert feature(cut).tolist() == of_cut, word
    assert Contains(any_of=["<call>", "she"], on="tokens")(cut).tolist() == [1, 0]
    inside = written(["ashe", "she"], tokenizer=byte_tokenizer())
    assert Contains(f"she{EOS}", on="tokens")(inside).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("regex", "more", "expected"),
    [
        (r"\bs?he\b", {}, [1, 1, 0]),
        ("SHE", {}, [1, 0, 1]),
        ("SHE", {"ignore_case": False}, [0, 0, 0]),
        ("^she", {}, [1, 0, 0]),
    ],
)
def test_contains_regex(regex, more, expected):
    samples = written(["she ran", "and he", "a shed"])
    assert Contains(regex=regex, **more)(samples).tolist() == expected


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ({}, ValueError, "exactly one.*got none"),
        ({"word": "a", "regex": "b"}, ValueError, "got word and regex"),
        ({"word": "a", "any_of": ["b"]}, ValueError, "got word and any_of"),
        ({"any_of": []}, ValueError, "empty"),
        ({"any_of": "she"}, TypeError, "list of strings.*'she'"),
        ({"any_of": ["a", 3]}, TypeError, "3"),
        ({"word": " "}, ValueError, "blank"),
        ({"any_of": ["a", ""]}, ValueError, "any_of holds the blank word ''"),
        ({"regex": "(a"}, ValueError, r"regex '\(a' does not compile"),
        ({"regex": "a", "on": "tokens"}, ValueError, 'on="text"'),
        ({"word": "a", "on": "words"}, ValueError, "'words'"),
    ],
)
def test_contains_refuses(args, error, match):
    with pytest.raises(error, match=match):
        Contains(**args)


# --- Scorer -----------------------------------------------------------------------------------------------------

TEXTS = ["a", "bbb", "", "dd", "ccccc"]
RETURNS = {
    "list": lambda v: v,
    "tuple": tuple,
    "fp32": lambda v: torch.tensor(v, dtype=torch.float32),
    "grad": lambda v: torch.tensor(v, requires_grad=True),
    "int64": lambda v: torch.tensor(v, dtype=torch.int64),
    "numpy": np.array,
    "numpy int": lambda v: np.array(v, dtype=np.int32),
    "numpy scalars": lambda v: [np.float32(x) for x in v],
    "0-d tensors": lambda v: [torch.tensor(x) for x in v],
}


@pytest.mark.parametrize("kind", RETURNS)
@pytest.mark.parametrize("on", ["text", "tokens", "samples"])
@pytest.mark.parametrize(("batched", "batch_size"), [(True, None), (True, 2), (True, 9), (False, None)])
def test_scorer(kind, on, batched, batch_size):
    """The function sees every sequence once and in order, whatever it takes and returns."""
    samples, calls = written(TEXTS, ["p", "qq", "", "she", ""]), []

    def lengths(part):
        if on == "samples":
            assert isinstance(part, Samples)
            texts = part.text
        elif batched:
            texts = part
        else:
            texts = [part]
        if on == "tokens":
            assert all(row[-1] == samples.tokenizer.eos_token_id for row in texts)
            texts = [samples.tokenizer.decode(row, skip_special_tokens=True) for row in texts]
        calls.append(list(texts))
        values = RETURNS[kind]([float(len(text)) for text in texts])
        return values if batched else values[0]

    found = Scorer(lengths, on=on, batched=batched, batch_size=batch_size)(samples)
    assert found.dtype == torch.float64 and not found.requires_grad
    assert found.tolist() == [1, 3, 0, 2, 5]
    assert list(itertools.chain(*calls)) == TEXTS
    assert max(len(call) for call in calls) == min(batch_size or 5 if batched else 1, 5)
    assert Scorer(lengths, on=on, batched=batched)(samples[:0]).shape == (0,)


def test_scorer_keeps_fp64():
    third = 1 / 3 + 1e-12
    for value in ([third], np.array([third]), torch.tensor([third], dtype=torch.float64), [np.float64(third)]):
        assert Scorer(lambda _, value=value: value)(written(["a"])).tolist() == [third]


def raises(_):
    raise KeyError("no such model")


@pytest.mark.parametrize(
    ("fn", "more", "error", "match"),
    [
        (raises, {}, RuntimeError, r"scorer 'raises' raised KeyError: 'no such model'; batch of 5 .* 'a'"),
        (raises, {"batched": False, "name": "mine"}, RuntimeError, "scorer 'mine' raised KeyError.*; sample: 'a'"),
        (lambda t: t.index("bbb"), {"batched": False}, RuntimeError, "sample: 'a'"),
        (lambda t: [1.0], {}, ValueError, r"each of 5 samples, shape \(5,\), got shape \(1,\).*'a'"),
        (lambda t: torch.ones(5, 1), {}, ValueError, r"shape \(5,\), got shape \(5, 1\)"),
        (lambda t: 1.0, {}, ValueError, r"got shape \(\)"),
        (
            lambda t: torch.ones(2),
            {"batched": False},
            ValueError,
            r"one number \(batched=False\), got list.*first sample: 'a'",
        ),
        (lambda t: [1.0], {"batched": False}, ValueError, r"one number \(batched=False\), got shape \(1, 1\)"),
        (lambda t: [1.0] * 3, {"batch_size": 2}, ValueError, r"each of 2 samples.*got shape \(3,\)"),
        (lambda t: None, {}, ValueError, "got NoneType"),
        (lambda t: ["x"] * 5, {}, ValueError, "got list"),
        (lambda t: [1, 2, 3, 4, None], {}, ValueError, "got list.*None"),
        (lambda t: [[1], [1, 2], 3, 4, 5], {}, ValueError, "got list"),
        (lambda t: torch.ones(5, dtype=torch.complex64), {}, ValueError, "complex"),
        (
            lambda t: [math.nan if "b" in x else 1.0 for x in t],
            {},
            ValueError,
            r"got nan for sample 1 \(1 such of 5\): 'bbb'",
        ),
        (
            lambda t: [-INF if len(x) > 1 else 1.0 for x in t],
            {"batch_size": 1},
            ValueError,
            r"got -inf for sample 1 \(3 such",
        ),
        (lambda t: INF if len(t) > 3 else 1, {"batched": False}, ValueError, "got inf for sample 4.*'ccccc'"),
        (
            lambda t: [float(len(x)) for x in t],
            {"binary": True},
            ValueError,
            "0 or 1, since binary=True, got 3.0 for sample 1",
        ),
    ],
)
def test_scorer_refuses(fn, more, error, match):
    with pytest.raises(error, match=match) as caught:
        Scorer(fn, **more)(written(TEXTS))
    if error is RuntimeError:
        assert isinstance(caught.value.__cause__, KeyError | ValueError)


def test_long_samples_are_cut_in_errors():
    with pytest.raises(ValueError) as caught:
        Scorer(lambda texts: [math.nan])(written(["y" * 5000]))
    assert "yyy" in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Scorer("she"), TypeError, "'she'"),
        (lambda: Scorer(len, on="words"), ValueError, "'words'"),
        (lambda: Scorer(len, batch_size=0), ValueError, "batch_size.*0"),
        (lambda: Moment(Contains("a"), math.nan), ValueError, "'contains \"a\"' must be finite, got nan"),
        (lambda: Moment(Scorer(len), INF), ValueError, "inf"),
        (lambda: Moment(Contains("a"), "x"), TypeError, "number, got 'x'"),
        (lambda: Moment(Contains("a"), 1.5), ValueError, r"\[0, 1\].*1.5"),
        (lambda: Moment(Contains("a"), -0.5), ValueError, r"\[0, 1\].*-0.5"),
        (lambda: Moment("she", 0.5), TypeError, r"'she'.*Contains"),
        (lambda: Moment(Contains, 0.5), TypeError, "feature"),
        (lambda: EBM(Base(), []), ValueError, "empty"),
        (lambda: EBM(Base(), Contains("a")), TypeError, "list.*constraints="),
        (lambda: EBM(Base(), "she"), TypeError, "list"),
        (lambda: EBM(Base(), ["she"]), TypeError, r"'she'.*Contains"),
        (lambda: EBM(Base(), [3]), TypeError, "a constraint.*3"),
        (lambda: EBM(Base(), [Contains("a")], monitor=Contains("b")), TypeError, "monitor"),
        (lambda: EBM(Base(), [Contains("a")], batch_size=0), ValueError, "batch_size"),
        (lambda: EBM(torch.nn.Linear(2, 2), [Contains("a")]), TypeError, "LanguageModel.*Linear"),
    ],
)
def test_constructors_refuse(make, error, match):
    with pytest.raises(error, match=match):
        make()


def named(samples):
    return torch.ones(len(samples))


@pytest.mark.parametrize(
    ("feature", "name"),
    [
        (Contains("amazing"), 'contains "amazing"'),
        (Contains(any_of=["a", "b"]), 'contains any of "a", "b"'),
        (Contains(any_of=list("abcde")), 'contains any of "a", "b", "c" and 2 more'),
        (Contains(regex=r"\d+"), r"matches /\d+/"),
        (Contains("a", on="tokens"), 'contains "a" (tokens)'),
        (Contains("a", name="A"), "A"),
        (Scorer(named), "named"),
        (Scorer(lambda t: t), "scorer"),
        (Scorer(named, name="mine"), "mine"),
        (Moment(named, 2.0), "named"),
        (Moment(Contains("a"), 0.5), 'contains "a"'),
        (Moment(Contains("a"), 0.5, name="half a"), "half a"),
    ],
)
def test_names(feature, name):
    assert feature.name == name and name in repr(feature)
    assert json.loads(json.dumps(feature.describe(), allow_nan=False))["name"] == name


def test_names_are_unique():
    a = Contains("a")
    target = EBM(Base(), [a, Contains("a"), Moment(a, 0.5), Moment(a, 0.0), named], monitor=[a, Contains("c")])
    assert len({*target.moment_names, *target.monitor_names}) == 7
    assert target.moment_names == ['contains "a" #3']
    assert target.monitor_names[:3] == ['contains "a"', 'contains "a" #2', 'not contains "a"']


# --- scores -----------------------------------------------------------------------------------------------------


class Counting(Feature):
    """Be a feature that records what it has seen."""

    binary = False

    def __init__(self, name, fn):
        self.name, self.fn, self.seen = name, fn, []

    def __call__(self, samples):
        self.seen += samples.text
        return torch.tensor([float(self.fn(text)) for text in samples.text], dtype=torch.float64)

    def describe(self):
        return {"name": self.name}


X = ["a", "ab", "abc", "b", "bc", "c", "aabb", ""]


def hybrid(base=None, **more):
    """Return a target: b = [has a] * number of b, phi = (length, has c). It monitors length and the number of a."""
    parts = {
        "has a": Counting("has a", lambda t: "a" in t),
        "bs": Counting("bs", lambda t: t.count("b")),
        "length": Counting("length", len),
        "has c": Counting("has c", lambda t: "c" in t),
        "as": Counting("as", lambda t: t.count("a")),
    }
    constraints = [parts["has a"], Moment(parts["length"], 2.5), parts["bs"], Moment(parts["has c"], 0.25)]
    target = EBM(base or Base(), constraints, monitor=[parts["length"], parts["as"]], **more)
    return target, parts


def test_scores_and_what_is_run_for_them():
    base = Base()
    target, parts = hybrid(base, batch_size=3)
    target.lambda_ = [0.5, -2.0]
    samples = written(X, ["she", "", "aa", "b", "c c c c c", "", "a", "b"])
    scores = target.score(samples)
    assert all(part.seen == X for part in parts.values())
    assert base.scored == ["ab", "abc", "aabb"] and base.batch_sizes == [3]
    expected = [
        -INF if not ("a" in t and "b" in t) else -len(t) + math.log(t.count("b")) + 0.5 * len(t) - 2.0 * ("c" in t)
        for t in X
    ]
    assert scores.log_target.tolist() == pytest.approx(expected)
    assert scores.log_b.exp().tolist() == pytest.approx([("a" in t) * t.count("b") for t in X])
    assert scores.features.tolist() == [[len(t), "c" in t] for t in X]
    assert target.moment_names == ["length", "has c"]
    assert target.monitor_names == ["has a", "bs", "length #2", "as"]
    assert scores.monitored.tolist() == [["a" in t, t.count("b"), len(t), t.count("a")] for t in X]
    positive = torch.tensor([t in base.scored for t in X])
    assert scores.log_base[positive].tolist() == [-2, -3, -4] and bool(scores.log_base[~positive].isnan().all())
    assert {value.dtype for value in vars(scores).values()} == {torch.float64}
    assert torch.equal(target.log_prob(samples), scores.log_target)
    assert torch.equal(target.features(samples), scores.features)
    assert torch.equal(target.log_b(samples), scores.log_b)


def test_a_given_log_base_is_used_and_the_base_is_not_run():
    base = Base()
    target, _ = hybrid(base)
    target.lambda_ = [0.0, 0.0]
    known = torch.arange(8).double()
    # b is 0 there, so that log a does not count
    known[0] = math.nan
    scores = target.score(written(X), log_base=known)
    assert base.scored == [] and scores.log_base[1:].tolist() == known[1:].tolist()
    assert scores.log_target.tolist() == pytest.approx([-INF, 1.0, 2.0, -INF, -INF, -INF, 6 + math.log(2), -INF])
    known[2] = math.nan
    with pytest.raises(ValueError, match=r"log_base is NaN for sample 2.*'abc'"):
        target.score(written(X), log_base=known)
    for shape in [(7,), (8, 1), ()]:
        with pytest.raises(ValueError, match=r"log_base must be \(8,\)"):
            target.score(written(X), log_base=torch.zeros(shape))


@pytest.mark.parametrize("which", [slice(0, 0), slice(3, 6), slice(0, 1), slice(1, 3)])
def test_scores_of_none_or_of_samples_that_all_have_b_0(which):
    base = Base()
    target, _ = hybrid(base)
    target.lambda_ = [0.0, 0.0]
    scores = target.score(written(X)[which])
    kept = [t for t in X[which] if "a" in t and "b" in t]
    assert base.scored == kept and len(base.batch_sizes) == bool(kept)
    assert scores.log_target.isfinite().sum() == len(kept)
    n = len(X[which])
    assert scores.features.shape == (n, 2) and scores.monitored.shape == (n, 4) and scores.log_target.shape == (n,)


def test_pointwise_only_needs_no_fit():
    target = EBM(Base(), [Contains("ab"), lambda samples: [2.0] * len(samples)])
    assert target.fitted and target.lambda_.shape == (0,)
    found = target.log_prob(written(["x ab", "abc", "ab"]))
    assert found.tolist() == pytest.approx([-4 + math.log(2), -INF, -2 + math.log(2)])
    assert target.features(written(["x"])).shape == (1, 0)


def test_moments_only_has_b_of_1():
    target = EBM(Base(), [Moment(Contains("a"), 0.5)])
    assert target.log_b(written(["a", "b"])).tolist() == [0, 0]
    target.lambda_ = torch.tensor([2.0])
    assert target.log_prob(written(["a", "b"])).tolist() == [1, -1]


@pytest.mark.parametrize("method", ["log_b", "score", "log_prob"])
def test_negative_b_shows_the_sample(method):
    target = EBM(Base(), [Scorer(lambda texts: [1.0 - len(t) for t in texts], name="short")])
    with pytest.raises(
        ValueError, match=r"'short'.*b\(x\) >= 0, got -2 for sample 1 \(2 such of 3\): 'bbb'.*exponential"
    ):
        getattr(target, method)(written(["a", "bbb", "dd"]))


def test_a_monitored_or_a_moments_score_may_be_negative():
    negative = Scorer(lambda texts: [-1.0 * len(t) for t in texts])
    target = EBM(Base(), [Moment(negative, -2.0)], monitor=[negative])
    target.lambda_ = [1.0]
    assert target.score(written(["a", "bbb"])).monitored.tolist() == [[-1], [-3]]


def test_before_fit_the_error_says_what_to_do():
    base = Base()
    target, parts = hybrid(base)
    assert not target.fitted
    for call in (target.score, target.log_prob):
        with pytest.raises(RuntimeError, match=r"'length', 'has c'.*call fit\(\)"):
            call(written(X))
    with pytest.raises(RuntimeError, match=r"call fit\(\)"):
        _ = target.lambda_
    assert base.scored == [] and parts["as"].seen == []
    assert target.features(written(X)).shape == (8, 2)


@pytest.mark.parametrize("value", [[1.0], [1.0, 2.0, 3.0], 1.0, [[1.0, 2.0]], [math.nan, 1.0], [INF, 1.0]])
def test_lambda_by_hand_is_checked(value):
    target, _ = hybrid()
    target.lambda_ = [0.25, 3]
    with pytest.raises(ValueError, match="2 finite numbers"):
        target.lambda_ = value
    assert target.lambda_.tolist() == [0.25, 3] and target.lambda_.dtype == torch.float64


@pytest.mark.parametrize(("value", "b"), [(1.0, [1, 0, 1]), (0.0, [0, 1, 0]), (1, [1, 0, 1]), (0, [0, 1, 0])])
@pytest.mark.parametrize("feature", [Contains("a"), Scorer(lambda t: ["a" in x for x in t], binary=True, name="A")])
def test_moments_of_0_and_1_are_pointwise(feature, value, b):
    target = EBM(Base(), [Moment(feature, value), Moment(Contains("c"), 0.5)])
    samples = written(["a", "b", "a c"])
    assert target.log_b(samples).exp().tolist() == b
    assert target.moment_names == ['contains "c"'] and len(target.monitor_names) == 1
    assert target.monitor_names[0].startswith("not ") == (value == 0)
    target.lambda_ = [0.0]
    assert target.score(samples).monitored[:, 0].tolist() == b
    alone = EBM(Base(), [Moment(feature, value)]).fit()
    assert alone.fitted and alone.moment_names == []
    said = str(alone.report)
    assert "pointwise" in said and feature.name in said and "no lambda to fit" in said
    assert ("1 - phi" in said) == (value == 0)


def test_a_score_that_is_not_binary_stays_a_moment():
    target = EBM(Base(), [Moment(Scorer(lambda t: [float(len(x)) for x in t], name="length"), 1.0)])
    assert target.moment_names == ["length"]


# --- lambda: known answers --------------------------------------------------------------------------------------


def logit(rate):
    return math.log(rate / (1 - rate))


@pytest.mark.parametrize("wanted", [0.5, 0.001, 0.1, 0.9, 0.999])
@pytest.mark.parametrize("hits", [67, 10, 500, 990])
def test_one_binary_feature_has_a_closed_form(hits, wanted):
    n, rate = 1000, hits / 1000
    found = fit_lambda((torch.arange(n) < hits).double()[:, None], [wanted], names=["f"])
    assert found.converged and found.lambda_ == pytest.approx([logit(wanted) - logit(rate)], abs=1e-8)
    assert found.attained[0].value == pytest.approx(wanted, abs=1e-9)
    assert found.base[0].value == pytest.approx(rate)
    assert found.base[0].stderr == pytest.approx(math.sqrt(rate * (1 - rate) / (n - 1)))
    kl = wanted * math.log(wanted / rate) + (1 - wanted) * math.log((1 - wanted) / (1 - rate))
    assert found.kl.value == pytest.approx(kl, abs=1e-8)
    ess = n / (wanted**2 / rate + (1 - wanted) ** 2 / (1 - rate))
    assert found.ess == pytest.approx(ess, rel=1e-7)
    assert any("effective sample size" in w for w in found.warnings) == (ess < 50)


SPACE = Space()
COUNTS = counts(SPACE.log_prob(SPACE.table(1, 0.5)).exp())
# 2,000 samples have these proportions, so sample means are exact expectations
A = COUNTS / COUNTS.sum().double()
WHICH = torch.arange(SPACE.n).repeat_interleave(COUNTS)
T = SPACE.tokens
PHI = {
    "one": (T == 0).any(1)[:, None].double(),
    "two": torch.stack([(T == 0).any(1), T.sum(1)], 1).double(),
    "correlated": torch.stack([(T == 0).any(1), (T[:, :2] == 0).any(1), (T == 0).sum(1) ** 2, T[:, 2]], 1).double(),
    "scales": torch.stack([1e6 * (T == 0).any(1) + 1e8, 1e-6 * T.sum(1), (T[:, :1] == T).sum(1)], 1).double(),
}
LOG_B = {
    "none": None,
    "hard": torch.where(T[:, 1] == 2, -INF, 0.0).double(),
    "soft": torch.where(T[:, 1] == 2, -INF, (T[:, 0] - 700).double()),
}


@pytest.mark.parametrize("b", LOG_B)
@pytest.mark.parametrize("phi", PHI)
@pytest.mark.parametrize("seed", range(3))
def test_lambda_of_a_tabular_model(phi, b, seed):
    """The exact moments of a target with a known lambda give that lambda back, so all its p(x) are right."""
    generator = torch.Generator().manual_seed(seed)
    features, log_b = PHI[phi], torch.zeros(SPACE.n).double() if LOG_B[b] is None else LOG_B[b]
    spread = features.std(0)
    known = torch.randn(features.shape[1], dtype=torch.float64, generator=generator) / spread
    log_score = A.log() + log_b + features @ known
    p = log_score.softmax(0)
    mu = p @ features
    found = fit_lambda(features[WHICH], mu, log_b=None if LOG_B[b] is None else log_b[WHICH])
    assert found.converged and found.iterations < 30 and found.notes == []
    assert (torch.tensor(found.lambda_, dtype=torch.float64) - known).mul(spread).abs().max() < 1e-6
    again = (A.log() + log_b + features @ torch.tensor(found.lambda_, dtype=torch.float64)).softmax(0)
    assert again.tolist() == pytest.approx(p.tolist(), abs=1e-8)
    assert [e.value for e in found.attained] == pytest.approx(mu.tolist(), rel=1e-9)
    at_0 = (A.log() + log_b).softmax(0) @ features
    assert [e.value for e in found.base] == pytest.approx(at_0.tolist(), rel=1e-9)
    assert found.kl.value == pytest.approx(float((torch.xlogy(p, p) - torch.xlogy(p, A)).sum()), abs=1e-8)
    assert found.ess == pytest.approx(2000 / float((p * p / A).sum()), rel=1e-6)
    assert found.n == 2000 and found.n_positive == int(log_b[WHICH].isfinite().sum())
    assert all(e.stderr > 0 for e in found.attained)


@pytest.mark.parametrize("b", LOG_B)
@pytest.mark.parametrize("phi", PHI)
def test_lambda_from_samples_of_another_model(phi, b):
    """With weights a/q they give the lambda, KL(p||a) and means under a b of samples of a, and the ESS of p/q."""
    of_q = counts(SPACE.log_prob(SPACE.table(5, 0.5)).exp())
    q, which = of_q / of_q.sum().double(), torch.arange(SPACE.n).repeat_interleave(of_q)
    features, log_b = PHI[phi], torch.zeros(SPACE.n).double() if LOG_B[b] is None else LOG_B[b]
    known = torch.randn(features.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    known = known / features.std(0)
    p = (A.log() + log_b + features @ known).softmax(0)
    log_ratio = torch.where(log_b == -INF, math.nan, A.log() - q.log())  # a is not known where b = 0
    found = fit_lambda(features[which], p @ features, log_b=log_b[which], log_ratio=log_ratio[which])
    assert (torch.tensor(found.lambda_, dtype=torch.float64) - known).mul(features.std(0)).abs().max() < 1e-6
    assert found.kl.value == pytest.approx(float((torch.xlogy(p, p) - torch.xlogy(p, A)).sum()), abs=1e-8)
    assert found.ess == pytest.approx(2000 / float((p * p / q).sum()), rel=1e-6)
    at_0 = (A.log() + log_b).softmax(0) @ features
    assert [e.value for e in found.base] == pytest.approx(at_0.tolist(), rel=1e-9)
    assert found.source == "q" and "samples of q" in str(found)
    unweighted = fit_lambda(features[which], p @ features, log_b=log_b[which])
    assert (torch.tensor(unweighted.lambda_, dtype=torch.float64) - known).mul(features.std(0)).abs().max() > 0.05


def test_refit_takes_what_rests_on_more_samples():
    """10 of 400 samples of a and half of q's have the feature. The fit from q is better, the way back is not."""
    target = EBM(Base(), [Moment(Contains(regex="a", name="a"), 0.5)])
    with pytest.raises(RuntimeError, match="call fit"):
        target.refit(torch.ones(2, 1), torch.zeros(2), torch.zeros(2))
    samples = of_base(written(["a"] * 10 + ["b"] * 390))
    with pytest.warns(UserWarning, match="few samples"):
        target.fit(samples)
    before = target.report
    has = (torch.arange(400) < 200).double()
    true_rate = 0.03
    log_ratio = torch.where(has == 1, math.log(true_rate / 0.5), math.log((1 - true_rate) / 0.5)).double()
    found = target.refit(has[:, None], torch.zeros(400), log_ratio)
    assert (
        target.report is found and found.source == "q" and found.ess == pytest.approx(400 / (0.25 / 0.5 + 0.25 / 0.5))
    )
    assert found.ess > before.ess
    assert target.lambda_.tolist() == pytest.approx([logit(0.5) - logit(true_rate)])
    assert (found.temperature, found.max_new_tokens) == (before.temperature, before.max_new_tokens)
    worse = target.refit(has[190:390, None], torch.zeros(200), log_ratio[190:390])
    assert worse.ess < 400 and target.report is found
    assert target.lambda_.tolist() == pytest.approx([logit(0.5) - logit(true_rate)])
    other = EBM(Base(), [Moment(Contains(regex="a", name="a"), 0.5)])
    other.load_state_dict(json.loads(json.dumps(target.state_dict())))
    assert other.report.source == "q" and torch.equal(other.lambda_, target.lambda_)
    for log_ratio, match in ((torch.zeros(3), r"log_ratio must be \(2,\)"), (torch.tensor([0.0, INF]), "finite")):
        with pytest.raises(ValueError, match=match):
            fit_lambda(torch.tensor([[0.0], [1.0]]), [0.5], log_ratio=log_ratio)


@pytest.mark.parametrize(("b", "proposal"), [("none", False), ("none", True), ("hard", False), ("mild", True)])
def test_the_stated_error_of_the_divergence_is_what_it_varies_by(b, proposal):
    """150 fits take 1,000 samples each, of a or of another model, with lambda and Z from the same samples."""
    generator = torch.Generator().manual_seed(2)
    log_b = {**LOG_B, "none": torch.zeros(SPACE.n), "mild": 0.7 * T[:, 0]}[b].double()
    q = SPACE.log_prob(SPACE.table(5, 0.5)).exp() if proposal else A
    features = PHI["two"]
    p = (A.log() + log_b + features @ (torch.tensor([1.5, 0.5]) / features.std(0)).double()).softmax(0)
    mu = p @ features
    truth = float((torch.xlogy(p, p) - torch.xlogy(p, A)).sum())
    found = []
    for _ in range(150):
        which = torch.multinomial(q, 1000, replacement=True, generator=generator)
        log_ratio = (A.log() - q.log())[which]
        found.append(fit_lambda(features[which], mu, log_b=log_b[which], log_ratio=log_ratio).kl)
    values, stated = torch.tensor([[e.value, e.stderr] for e in found]).double().unbind(1)
    assert float(values.mean()) == pytest.approx(truth, abs=0.3 * float(stated.mean()))
    assert float(values.std() / stated.mean()) == pytest.approx(1, abs=0.15)


def test_two_independent_features_have_two_closed_forms():
    grid = torch.cartesian_prod(torch.arange(10), torch.arange(20))
    phi = torch.stack([grid[:, 0] < 3, grid[:, 1] < 1], 1).double()
    found = fit_lambda(phi, [0.5, 0.4])
    assert found.lambda_ == pytest.approx([-logit(0.3), logit(0.4) - logit(0.05)], abs=1e-9)


def test_contexts_weigh_the_same_whatever_their_samples():
    """E_p is the mean over contexts of E_{p_c}. It is not that of pooled samples, nor weighted by their number."""
    rates, sizes = [0.1, 0.5, 0.9], [1000, 100, 400]
    phi = torch.cat([(torch.arange(n) < r * n).double() for r, n in zip(rates, sizes, strict=True)])
    ids = torch.cat([torch.full((n,), i) for n, i in zip(sizes, [7, 2, 40], strict=True)])
    shuffled = torch.randperm(len(phi), generator=torch.Generator().manual_seed(0))
    found = fit_lambda(phi[shuffled, None], [0.7], context_id=ids[shuffled])

    def tilted(x):
        return [1 / (1 + math.exp(-(logit(r) + x))) for r in rates]

    (lam,) = found.lambda_
    assert sum(tilted(lam)) / 3 == pytest.approx(0.7, abs=1e-9)
    assert found.contexts == 3 and found.iterations < 10 and found.base[0].value == pytest.approx(0.5)
    kl = [t * math.log(t / r) + (1 - t) * math.log((1 - t) / (1 - r)) for t, r in zip(tilted(lam), rates, strict=True)]
    assert found.kl.value == pytest.approx(sum(kl) / 3, rel=1e-9)
    errors = [math.sqrt(r * (1 - r) / (n - 1)) for r, n in zip(rates, sizes, strict=True)]
    assert found.base[0].stderr == pytest.approx(math.sqrt(sum(e * e for e in errors)) / 3, rel=1e-9)


def test_a_context_where_b_is_always_0_is_left_out_and_told():
    phi = torch.tensor([0.0, 1, 0, 1, 1, 0] * 100)
    ids = torch.arange(3).repeat_interleave(200)
    log_b = torch.where(ids == 1, -INF, 0.0)
    found = fit_lambda(phi[:, None], [0.6], log_b=log_b, context_id=ids)
    without = fit_lambda(phi[ids != 1, None], [0.6], context_id=ids[ids != 1])
    # sums of 600 and of 400 terms round in another order
    assert found.lambda_ == pytest.approx(without.lambda_, rel=1e-12)
    assert (found.kl.value, found.kl.stderr, found.ess) == pytest.approx(
        (without.kl.value, without.kl.stderr, without.ess), rel=1e-12
    )
    assert (found.n, found.n_positive, found.contexts) == (600, 400, 2)
    assert "1 of 3 contexts" in found.notes[0] and without.notes == []


@pytest.mark.parametrize("scale", [0.0, -5000.0, 5000.0])
def test_b_of_any_scale(scale):
    phi = torch.tensor([0.0, 1, 0, 1, 1, 0] * 100)[:, None]
    log_b = torch.arange(600).double() / 600
    plain, scaled = fit_lambda(phi, [0.7], log_b=log_b), fit_lambda(phi, [0.7], log_b=log_b + scale)
    assert scaled.converged and scaled.lambda_ == pytest.approx(plain.lambda_, abs=1e-9)
    assert scaled.kl.value == pytest.approx(plain.kl.value, abs=1e-8)


def test_standard_error_of_an_attained_moment():
    """Over repetitions, the true error of an attained moment is about 1 reported standard error."""
    generator, scores = torch.Generator().manual_seed(3), []
    phi = PHI["two"]
    mu = (A.log() + phi @ torch.tensor([1.0, -0.2], dtype=torch.float64)).softmax(0) @ phi
    for _ in range(200):
        drawn = torch.multinomial(A, 1000, replacement=True, generator=generator)
        found = fit_lambda(phi[drawn], mu)
        truth = (A.log() + phi @ torch.tensor(found.lambda_, dtype=torch.float64)).softmax(0) @ phi
        scores.append(
            [(t - w) / e.stderr for t, w, e in zip(truth.tolist(), found.wanted, found.attained, strict=True)]
        )
    z = torch.tensor(scores)
    assert bool((z.mean(0).abs() < 0.25).all()) and bool(((z.std(0) > 0.8) & (z.std(0) < 1.2)).all()), (
        z.mean(0),
        z.std(0),
    )


# --- lambda: diagnoses ------------------------------------------------------------------------------------------

N = 1200
INDEX = torch.arange(N)
# the topics exclude each other, and each has a quarter
TOPIC = torch.stack([INDEX % 4 == 0, INDEX % 4 == 1, INDEX % 4 == 2], 1).double()
ALL_TOPICS = torch.stack([INDEX % 3 == 0, INDEX % 3 == 1, INDEX % 3 == 2], 1).double()
UNEVEN = torch.stack([INDEX % 10 == 0, INDEX % 10 == 1, INDEX % 10 > 5], 1).double()
COIN = (INDEX % 7 < 3).double()[:, None]
LENGTH = (INDEX % 11).double()[:, None]


def columns(*parts):
    return torch.cat([part if part.dim() == 2 else part[:, None] for part in parts], 1)


@pytest.mark.parametrize(
    ("phi", "mu", "there", "absent"),
    [
        (
            columns(COIN, 0 * COIN),
            [0.5, 0.5],
            ["'f1' = 0.5 can't be reached", "never fires in 1,200", "below 0.0025"],
            ["f0"],
        ),
        (columns(0 * COIN + 1, COIN), [0.5, 0.5], ["'f0' = 0.5", "always fires in 1,200", "above 1"], ["f1"]),
        (columns(COIN, 0 * COIN + 3), [0.5, 2], ["'f1' = 2 is degenerate", "constant", "3 in the first"], ["f0"]),
        (LENGTH, [11], ["'f0' = 11 can't be reached", "outside", "[0, 10]"], []),
        (LENGTH, [-0.1], ["'f0' = -0.1 can't be reached", "[0, 10]"], []),
        (columns(COIN, LENGTH), [0.5, 10], ["'f1' = 10", "edge", "[0, 10]", "infinite lambda"], ["f0", "binary"]),
        (COIN, [1.0], ["'f0' = 1", "infinite lambda", "binary=True"], []),
        (COIN, [0.0], ["'f0' = 0", "infinite lambda", "binary=True"], []),
        (COIN, [1.2], ["'f0' = 1.2 can't be reached", "[0, 1]"], []),
        (columns(COIN, LENGTH, COIN), [0.5, 5, 0.5], ["collinear", "agree: drop one of 'f0', 'f2'"], ["f1"]),
        (columns(COIN, LENGTH, COIN), [0.5, 5, 0.4], ["collinear", "'f0', 'f2' contradict each other"], ["f1"]),
        (columns(COIN, 1 - COIN), [0.5, 0.5], ["'f0' + 'f1' = 1", "drop one of 'f0', 'f1'"], []),
        (columns(COIN, 1 - COIN), [0.5, 0.6], ["'f0' + 'f1' = 1", "give 1.1: 'f0', 'f1' contradict"], []),
        (columns(LENGTH, 2e6 * LENGTH + 5), [5, 1e7 + 5], ["'f0'", "'f1'", "drop one"], []),
        (
            columns(ALL_TOPICS, COIN),
            [0.3, 0.3, 0.4, 0.5],
            ["'f0' + 'f1' + 'f2' = 1", "drop one of 'f0', 'f1', 'f2'"],
            ["f3"],
        ),
        (columns(ALL_TOPICS, COIN), [0.5, 0.5, 0.5, 0.5], ["'f0' + 'f1' + 'f2' = 1", "give 1.5"], ["f3"]),
        (
            columns(COIN, COIN, LENGTH, 2 * LENGTH),
            [0.5, 0.5, 5, 9],
            ["drop one of 'f0', 'f1'", "'f2', 'f3' contradict"],
            [],
        ),
        (TOPIC, [0.5] * 3, ["contradict", "'f0' = 0.5", "'f0' + 'f1' + 'f2' is at most 1;", "give 1.5"], []),
        (columns(TOPIC, COIN, LENGTH), [0.5, 0.5, 0.5, 0.6, 4], ["'f0' + 'f1' + 'f2' is at most 1;"], ["f3", "f4"]),
        (columns(UNEVEN, LENGTH), [0.5, 0.5, 0.5, 4], ["'f0' + 'f1' + 'f2' is at most 1;", "give 1.5"], ["f3"]),
        (columns(COIN, TOPIC), [0.5, 0.7, 0.6, 0.01], ["contradict", "'f1' = 0.7", "'f2' = 0.6"], ["f0"]),
        (TOPIC, [0.3, 0.3, 0.4], ["only an infinite lambda", "'f0' + 'f1' + 'f2' is at most 1;", "give 1"], []),
        (
            columns(COIN, COIN * (INDEX % 2)[:, None]),
            [0.2, 0.4],
            ["contradict", "- 'f0' + 'f1' is at most 0;", "give 0.2"],
            [],
        ),
        # a mean square can't be below the square of the mean
        (columns(LENGTH, LENGTH**2), [5, 24.9], ["contradict", "'f0' = 5", "'f1' = 24.9"], []),
    ],
)
def test_no_lambda_gives_these_moments(phi, mu, there, absent):
    with pytest.raises(ValueError) as caught:
        fit_lambda(phi, mu, names=[f"f{i}" for i in range(phi.shape[1])])
    assert [part for part in there if part not in str(caught.value)] == [], caught.value
    assert [part for part in absent if part in str(caught.value)] == [], caught.value


def test_a_contradiction_is_told_in_whole_numbers():
    """Where Newton's direction has factors such as 0.97, the sum a + b + c is as good a proof."""
    torch.manual_seed(0)
    drawn = torch.randint(0, 4, (10_000,))
    phi = torch.stack([drawn == i for i in range(3)], 1).double()
    with pytest.raises(ValueError, match=r"In 10,000 samples of the base, 'a' \+ 'b' \+ 'c' is at most 1; .* give 1.5"):
        fit_lambda(phi, [0.5] * 3, names=["a", "b", "c"])


@pytest.mark.parametrize(
    ("phi", "mu"),
    [
        (TOPIC, [0.33] * 3),
        (TOPIC, [0.3, 0.3, 0.3999]),
        (ALL_TOPICS[:, :2], [0.5, 0.4999]),
        (columns(COIN, COIN * (INDEX % 2)[:, None]), [0.5, 0.4999]),
        # with a mean of 5, integers from 0 to 10 have a mean square between 25 and 50
        (columns(LENGTH, LENGTH**2), [5, 25.3]),
        (columns(LENGTH, LENGTH**2), [5, 49.9]),
        (columns(COIN, LENGTH), [0.999, 9.99]),
    ],
)
def test_moments_close_to_the_edge_are_found(phi, mu):
    found = fit_lambda(phi, mu)
    assert found.converged
    # the check does without the dual: it takes the weights that lambda gives from the definition
    p = (phi @ torch.tensor(found.lambda_, dtype=torch.float64)).softmax(0)
    assert (p @ phi).tolist() == pytest.approx(mu, rel=1e-7)


@pytest.mark.parametrize("seed", range(60))
def test_reachable_or_not_is_told_right(seed):
    """In random clouds, moments of a random tilt are found. A vertex of the hull and what is beyond it are refused."""
    g = torch.Generator().manual_seed(seed)
    f, n, c = 2 + seed % 4, 30 + 20 * (seed % 30), 1 if seed % 3 else 4
    phi = torch.randn(n, f, generator=g, dtype=torch.float64)
    if seed % 2:
        phi = (phi > 0.5).double()
    ids, direction = torch.arange(n) % c, torch.randn(f, generator=g, dtype=torch.float64)
    parts = [phi[ids == i] for i in range(c)]
    inside = sum((part @ direction).softmax(0) @ part for part in parts) / c
    found = fit_lambda(phi, inside, context_id=ids)
    assert found.converged and found.lambda_ == pytest.approx(direction.tolist(), abs=1e-6)
    vertex = sum(part[(part @ direction).argmax()] for part in parts) / c
    for beyond in (0.0, 1e-9, 0.01, 0.5):
        with pytest.raises(ValueError, match="reached"):
            fit_lambda(phi, vertex + beyond * direction, context_id=ids)


def test_contexts_limit_what_can_be_reached():
    """A feature of the prompt alone can't be moved. One that is fixed in half of the contexts moves only half way."""
    ids = INDEX % 2
    with pytest.raises(ValueError, match=r"'f' = 0.6 is degenerate.*constant within each context"):
        fit_lambda(ids.double()[:, None], [0.6], context_id=ids, names=["f"])
    half = COIN * (ids == 0)[:, None]
    assert fit_lambda(half, [0.45], context_id=ids).converged
    with pytest.raises(ValueError, match=r"0.55 can't be reached.*\[0, 0.5\] on average over contexts"):
        fit_lambda(half, [0.55], context_id=ids)
    assert fit_lambda(half, [0.55]).converged
    sum_of_context = columns(COIN, 3 * ids[:, None] - COIN)
    with pytest.raises(ValueError, match=r"collinear.*'f0' \+ 'f1' = 1.5 \(on average over contexts\).*give 1.4"):
        fit_lambda(sum_of_context, [0.5, 0.9], context_id=ids, names=["f0", "f1"])
    assert fit_lambda(sum_of_context, [0.5, 0.9]).converged


@pytest.mark.parametrize(
    ("phi", "more", "match"),
    [
        (torch.zeros(0, 1), {}, r"\(N, F\).*\(0, 1\)"),
        (torch.zeros(5), {}, r"\(N, F\).*\(5,\)"),
        (torch.zeros(5, 0), {}, r"\(5, 0\)"),
        (COIN, {"wanted": [0.5, 0.5]}, "1 features"),
        (COIN, {"wanted": [math.nan]}, "'f'.*nan"),
        (COIN * math.nan, {}, "'f'.*finite"),
        (COIN, {"names": ["a", "b"]}, "names must be 1"),
        (COIN, {"log_b": torch.zeros(5)}, r"log_b must be \(1200,\)"),
        (COIN, {"log_b": torch.full((N,), INF)}, r"log_b holds"),
        (COIN, {"log_b": torch.full((N,), math.nan)}, r"log_b holds"),
        (COIN, {"log_b": torch.full((N,), -INF)}, r"b\(x\) = 0 for all 1,200"),
        (COIN, {"context_id": torch.zeros(5).long()}, r"context_id must be \(1200,\)"),
    ],
)
def test_fit_lambda_refuses(phi, more, match):
    with pytest.raises(ValueError, match=match):
        fit_lambda(phi, **{"wanted": [0.5], "names": ["f"], **more})


@pytest.mark.parametrize("hits", [1, 9, 10, 1190, 1191, 1199])
def test_rare_features_are_doubted(hits):
    found = fit_lambda(INDEX.lt(hits).double()[:, None], [0.5], names=["f"])
    rare = [w for w in found.warnings if "'f' is" in w]
    assert len(rare) == (min(hits, N - hits) < 10)
    if rare:
        assert f"in only {min(hits, N - hits)} of 1,200" in rare[0] and f"is {int(hits < 600)}" in rare[0]


def test_few_samples_per_context_are_doubted():
    found = fit_lambda(COIN, [0.5], context_id=INDEX // 4)
    assert any("per context" in w for w in found.warnings)
    assert fit_lambda(COIN, [0.5], context_id=INDEX // 200).warnings == []


# --- EBM.fit ----------------------------------------------------------------------------------------------------


def bios(n=400):
    """Return texts, of which a quarter has she and a tenth king. Every second text with king has she."""
    return of_base(written([f"{'she' if i % 4 == 0 else 'he'} {'king' if i % 10 == 0 else 'cook'}" for i in range(n)]))


def test_fit_of_samples_that_are_given():
    base = Base()
    she = Counting("she", lambda t: t.startswith("she"))
    target = EBM(base, [Moment(she, 0.5), Contains("king"), Moment(Contains("queen"), 0)])
    assert target.fit(bios()) is target
    assert len(she.seen) == 400 and base.asked == []
    # half of the texts with king have she already
    assert target.lambda_.tolist() == pytest.approx([0.0], abs=1e-9)
    report = target.report
    assert report.base[0].value == pytest.approx(0.5) and report.n == 400 and report.n_positive == 40
    assert report.pointwise['contains "king"'].value == pytest.approx(0.1)
    assert report.pointwise['not contains "queen"'].value == 1
    assert report.temperature == 1.0
    said = str(report)
    for part in ("she", "0.5", "400 samples", "40 of them", "converged", "queen", "pointwise", "effective"):
        assert part in said, said


def test_fit_warns_once_at_the_callers_line():
    target = EBM(Base(), [Moment(Contains("king"), 0.5)])
    with pytest.warns(UserWarning, match="is 1 in only 4 of 40") as caught:
        target.fit(bios(40))
    assert {w.filename for w in caught} == {__file__}
    assert len([w for w in caught if "in only" in str(w.message)]) == 1
    assert target.fitted and all(str(w.message) in str(target.report) for w in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EBM(Base(), [Moment(Contains("king"), 0.2)]).fit(bios())


@pytest.mark.parametrize(
    ("args", "asked"),
    [
        ({}, {"prompts": None, "n": 10_240, "max_new_tokens": 64, "temperature": 1.0, "batch_size": 256}),
        ({}, {"seed": seed_for(0, "fit")}),
        ({"max_new_tokens": 12}, {"max_new_tokens": 12}),
        ({"n": 7, "contexts": ["a", "b", "c"], "batch_size": 5}, {"prompts": ["a", "b", "c"], "n": 3, "batch_size": 5}),
        ({"temperature": 0.5, "seed": 3}, {"temperature": 0.5, "seed": seed_for(3, "fit")}),
        ({"seed": None}, {"seed": None}),
    ],
)
def test_fit_draws_from_the_base(args, asked):
    base = Base(drawn=bios())
    target = EBM(base, [Moment(Contains("king"), 0.2)]).fit(**args, max_stderr=0)
    asked = {"seed": seed_for(0, "fit"), **asked} if "seed" not in args else asked
    if "contexts" not in args:  # without contexts the samples are drawn in parts
        assert sum(each["n"] for each in base.asked) == 10_240
        asked = {key: value for key, value in asked.items() if key != "n"}
    assert target.report.max_new_tokens == base.asked[0]["max_new_tokens"]
    assert all({key: each[key] for key in asked} == asked for each in base.asked)


def test_fit_uses_the_contexts_of_the_samples():
    samples = bios()
    samples = dataclasses.replace(samples, context_id=(torch.arange(400) % 4 == 0).long())
    target = EBM(Base(), [Moment(Contains("king"), 0.2)]).fit(samples)
    phi = Contains("king")(samples)[:, None]
    assert target.report.contexts == 2
    assert target.lambda_.tolist() == fit_lambda(phi, [0.2], context_id=samples.context_id).lambda_


@pytest.mark.parametrize(
    ("constraints", "args", "match"),
    [
        ([Moment(Contains("king"), 0.2)], {"samples": bios(), "contexts": ["a"]}, "samples or contexts"),
        ([Moment(Contains("king"), 0.2)], {"samples": bios()[:0]}, "samples is empty"),
        ([Moment(Contains("king"), 0.2)], {"n": 0, "max_new_tokens": 3}, "n must be positive, got 0"),
        ([Moment(Contains("zebra"), 0.2)], {"samples": bios()}, "'contains \"zebra\"' = 0.2.*never fires in 400"),
        ([Moment(Contains(regex="she|he"), 0.2)], {"samples": bios()}, "always fires in 400"),
        (
            [Contains("zebra"), Moment(Contains("king"), 0.2)],
            {"samples": bios()},
            "never satisfied.*'contains \"zebra\"' in 0 s",
        ),
        (
            [Contains("king"), Contains("cook"), Moment(Contains("she"), 0.2)],
            {"samples": bios()},
            'never satisfied together.*"king"\' in 40, \'contains "cook"\' in 360 samples',
        ),
        ([Contains("king"), Moment(Contains("cook"), 0.2)], {"samples": bios()}, "never fires in 40 samples.*of 400"),
        (
            [Moment(Contains("king"), 0.2), Moment(Contains("cook"), 0.8)],
            {"samples": bios()},
            "drop one of.*king.*cook",
        ),
        ([Moment(Contains("king"), 0.2), Moment(Contains("cook"), 0.7)], {"samples": bios()}, "king.*cook.*contradict"),
        (
            [Moment(Scorer(lambda t: [len(x) for x in t], name="length"), 99)],
            {"samples": bios()},
            r"'length' = 99 can't.*\[7, 8\]",
        ),
        (
            [Scorer(lambda t: [-1.0] * len(t), name="b"), Moment(Contains("king"), 0.2)],
            {"samples": bios()},
            "'b' must be b",
        ),
        (
            [Moment(Contains("king"), 0.2)],
            {"samples": dataclasses.replace(bios(), log_prob=torch.full((400,), -30.0).double())},
            "must be the base's own.*-30",
        ),
    ],
)
def test_fit_refuses_and_changes_nothing(constraints, args, match):
    target = EBM(Base(drawn=bios()), constraints)
    target.lambda_ = [0.125] * len(target.moment_names)
    with pytest.raises(ValueError, match=match):
        target.fit(**args)
    assert set(target.lambda_.tolist()) == {0.125} and target.report is None


def test_samples_at_another_temperature_are_refused():
    target = EBM(Base(), [Moment(Contains("king"), 0.2)]).fit(bios())
    other = dataclasses.replace(bios(), temperature=0.7)
    with pytest.raises(ValueError, match=r"temperature 1.*0.7.*fit again"):
        target.log_prob(other)
    # nothing is known of the temperature of a lambda that was set by hand
    target.lambda_ = target.lambda_
    assert target.log_prob(other).isfinite().all()


def test_state_dict_and_description():
    def make(word="king"):
        return EBM(
            Base(), [Moment(Contains("she"), 0.5), Moment(Contains(word), 0.3), Contains(regex="h")], monitor=[named]
        )

    target = make().fit(bios())
    state = json.loads(json.dumps(target.state_dict(), allow_nan=False))
    other = make()
    other.load_state_dict(state)
    assert torch.equal(other.lambda_, target.lambda_) and str(other.report) == str(target.report)
    assert isinstance(other.report, LambdaFit) and other.report == target.report
    assert torch.equal(other.log_prob(bios()), target.log_prob(bios()))

    fresh = make()
    fresh.load_state_dict(json.loads(json.dumps(make().state_dict())))
    assert not fresh.fitted and fresh.report is None

    for bad, match in [
        (make("cook").fit(bios()).state_dict(), "cook.*king"),
        ({**state, "lambda": [1.0]}, "2 finite numbers"),
        ({**state, "lambda": [1.0, math.nan]}, "2 finite numbers"),
    ]:
        with pytest.raises(ValueError, match=match):
            other.load_state_dict(bad)
        assert torch.equal(other.lambda_, target.lambda_) and other.report == target.report
    with pytest.raises((KeyError, TypeError)):
        other.load_state_dict({**state, "lambda": [1.0, 2.0], "report": {}})
    assert torch.equal(other.lambda_, target.lambda_)

    for each in (target, make()):
        card = json.loads(json.dumps(each.describe(), allow_nan=False))
        assert [m["name"] for m in card["moments"]] == ['contains "she"', 'contains "king"']
        assert [m["value"] for m in card["moments"]] == [0.5, 0.3]
        assert [p["feature"]["regex"] for p in card["pointwise"]] == ["h"] and card["monitor"][0]["name"] == "named"
        assert [m["lambda"] for m in card["moments"]] == (each.lambda_.tolist() if each.fitted else [None, None])
    assert 'E[contains "she"] = 0.5' in repr(target)


def test_a_report_without_moments_survives_json():
    report = EBM(Base(), [Contains("a")]).fit().report
    again = LambdaFit.from_dict(json.loads(json.dumps(report.as_dict(), allow_nan=False)))
    assert str(again) == str(report) and "no lambda to fit" in str(again)


# --- a real model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    base = load("tiny-bios")
    return base, base.sample(None, 1536, max_new_tokens=48, seed=5, batch_size=512)


def test_base_rates_of_the_tiny_model(tiny):
    """The rates are those that were measured when the model was made, within 4 standard errors."""
    _, samples = tiny
    known = json.loads((TINY_BIOS / "base_rates.json").read_text())["features"]["female"]["rate"]
    for on in ("text", "tokens"):
        rate = Contains(any_of=["she", "her"], on=on)(samples).mean().item()
        assert abs(rate - known) < 4 * math.sqrt(known * (1 - known) / len(samples)), on


def test_fit_of_the_tiny_model(tiny):
    base, samples = tiny
    target = EBM(base, [Moment(Contains(any_of=["she", "her"]), 0.5)], batch_size=64).fit(samples)
    rate = target.report.base[0].value
    assert target.lambda_.tolist() == pytest.approx([-logit(rate)], abs=1e-8)
    few = samples[:100]
    scores = target.score(few)
    assert torch.allclose(scores.log_base, few.log_prob, atol=1e-3, rtol=0)
    assert torch.equal(scores.log_target, scores.log_base + scores.features[:, 0] * target.lambda_)
    assert not scores.log_target.requires_grad
    # while q is a, log q stands for log a
    assert torch.allclose(target.score(few, log_base=few.log_prob).log_target, scores.log_target, atol=1e-3, rtol=0)


def test_hybrid_of_the_tiny_model_scores_the_base_only_where_b_is_positive(tiny, monkeypatch):
    base, samples = tiny
    rows = []
    log_prob = type(base).log_prob
    monkeypatch.setattr(type(base), "log_prob", lambda self, x, **kw: rows.append(len(x)) or log_prob(self, x, **kw))
    target = EBM(base, [Moment(Contains(any_of=["she", "her"]), 0.5), Contains(any_of=["American", "British"])])
    target.fit(samples)
    rows.clear()
    few = samples[:200]
    scores = target.score(few)
    positive = Contains(any_of=["American", "British"])(few) == 1
    assert rows == [int(positive.sum())] and 0 < rows[0] < 100
    assert torch.equal(scores.log_target.isfinite(), positive)
    assert torch.allclose(scores.log_base[positive], few.log_prob[positive], atol=1e-3, rtol=0)


def test_fit_draws_from_a_real_model_and_repeats(tiny):
    base, _ = tiny
    target = EBM(base, [Moment(Contains("was"), 0.5)])
    first = target.fit(n=64, max_new_tokens=8, seed=1).lambda_
    assert target.report.n == 64
    assert torch.equal(target.fit(n=64, max_new_tokens=8, seed=1).lambda_, first)
    assert not torch.equal(target.fit(n=64, max_new_tokens=8, seed=2).lambda_, first)


def test_samples_of_another_model_are_refused(tiny):
    base, _ = tiny
    other = dmfast.LanguageModel(copy.deepcopy(base.model), base.tokenizer)
    with torch.no_grad():
        for p in other.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="must be the base's own"):
        EBM(base, [Moment(Contains("was"), 0.5)]).fit(other.sample(None, 32, max_new_tokens=16, seed=0))


def test_a_target_needs_no_more_than_samples_offer():
    """A user's own generator may return any object with the fields that features read."""
    fake = SimpleNamespace(text=["a b", "b"], log_prob=torch.zeros(2))
    assert Contains("a")(fake).tolist() == [1, 0]
