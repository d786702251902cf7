"""Test Samples: what parts, joins and moves keep of the sequences, and what is refused as an index."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_models import PROMPTS, TOKENIZERS, WORDS, close, continuation, lm, tokenizers

from dmfast.samples import Samples

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")


@pytest.fixture(scope="module")
def x():
    return lm().sample(PROMPTS, 6, max_new_tokens=8, temperature=1.2, seed=4)


@pytest.mark.parametrize(
    "index",
    [slice(3, 15), slice(None, None, 5), slice(0, 0), torch.arange(24) % 3 == 0, torch.tensor([5, 0, 23, 5])],
    ids=["range", "stride", "empty", "mask", "indices"],
)
def test_some_of_the_samples(x, index):
    part, rows = x[index], torch.arange(24)[index].tolist()
    assert len(x) == 24 and len(part) == len(rows)
    for name in ("tokens", "attention_mask", "score_mask", "log_prob", "context_id"):
        assert getattr(part, name).tolist() == [getattr(x, name)[i].tolist() for i in rows]
    assert (part.prompt_len, part.temperature, part.tokenizer) == (x.prompt_len, x.temperature, x.tokenizer)
    assert part.text == [x.text[i] for i in rows]


@pytest.mark.parametrize(
    ("n", "places"),
    [(0, []), (1, [0]), (2, [0, 12]), (3, [0, 6, 12]), (5, [0, 6, 12, 18, 1]), (6, [0, 6, 12, 18, 1, 13])],
)
def test_the_places_across_contexts(x, n, places):
    assert x.across_contexts(n).tolist() == places  # x has four contexts with six sequences each
    assert sorted(x.across_contexts(100).tolist()) == list(range(24))


@tokenizers
def test_text_has_the_scored_words_only_and_is_made_once(tokenizer):
    class Counting:
        calls = 0

        def __init__(self, inner):
            self.inner = inner

        def batch_decode(self, *args, **kwargs):
            self.calls += 1
            return self.inner.batch_decode(*args, **kwargs)

    policy = lm("llama", tokenizer)
    drawn = policy.sample(PROMPTS, 10, max_new_tokens=8, temperature=1.5, seed=0)
    counting = Counting(drawn.tokenizer)
    drawn = dataclasses.replace(drawn, tokenizer=counting)
    assert counting.calls == 0
    special = set(TOKENIZERS[tokenizer].values())
    expected = []
    for row in drawn.tokens.tolist():
        words = [WORDS[token] for token in continuation(row, drawn.prompt_len)]
        expected.append(" ".join(word for word in words if word not in special))
    assert drawn.text == expected and drawn.text is drawn.text
    assert counting.calls == 1


def test_cat_of_different_widths(x):
    policy = lm()
    parts = [
        policy.sample(None, 5, max_new_tokens=2, temperature=1.2, seed=0),
        x,
        policy.sample(["w1 w2 w3 w4 w5 w6 w7 w0"], 5, max_new_tokens=3, temperature=1.2, seed=1),
        x[:0],
        x[2:3],
    ]
    whole = Samples.cat(parts)
    assert len({part.tokens.shape[1] for part in parts}) > 2
    assert len(whole) == 35 and whole.prompt_len == 8 and whole.tokens.shape[1] == 8 + x.tokens.shape[1] - 5
    rows = [part[i : i + 1] for part in parts for i in range(len(part))]
    for i, row in enumerate(rows):
        for mask in ("attention_mask", "score_mask"):
            kept, was = getattr(whole, mask)[i], getattr(row, mask)[0]
            assert whole.tokens[i][kept > 0].tolist() == row.tokens[0][was > 0].tolist()
        assert whole.score_mask[i, :8].sum() == 0
    assert torch.equal(whole.log_prob, torch.cat([part.log_prob for part in parts]))
    assert torch.equal(whole.context_id, torch.cat([part.context_id for part in parts]))
    assert whole.text == [row.text[0] for row in rows]
    for model in (policy, lm("gpt2 eager attention"), lm("llama")):
        close(model.log_prob(whole).detach(), torch.cat([model.log_prob(part).detach() for part in parts]))
    close(policy.log_prob(whole).detach(), whole.log_prob)


def test_trimmed_samples_lose_only_padding_that_all_of_them_have():
    model = lm()
    x = model.sample([[1, 2, 3, 1, 2], [3], [2, 1]], n=6, max_new_tokens=12, seed=0)
    few = x[x.context_id > 0]
    few = few[few.attention_mask.sum(1).argsort()[:4]]
    cut = few.trimmed()
    assert cut.prompt_len == 2 and cut.tokens.shape[1] < few.tokens.shape[1]
    assert cut.attention_mask.any(0).all()
    assert torch.equal(cut.score_mask.sum(1), few.score_mask.sum(1)) and cut.text == few.text
    torch.testing.assert_close(model.log_prob(cut), few.log_prob, rtol=0, atol=1e-5)
    assert len(few[:0].trimmed()) == 0


def test_cat_refuses_what_has_no_one_temperature(x):
    with pytest.raises(ValueError, match="one temperature"):
        Samples.cat([x, dataclasses.replace(x, temperature=1.0)])
    with pytest.raises(ValueError, match="one or more"):
        Samples.cat([])


@pytest.mark.parametrize("name", ["tokens", "log_prob", "temperature", "prompt_len", "new"])
def test_samples_are_frozen(x, name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(x, name, None)


# --- rows and versions ------------------------------------------------------------------------------------------


def with_rows(x):
    """Return the samples with a version and a row of a data set each, all different."""
    n = len(x)
    return dataclasses.replace(x, version=torch.arange(n) % 5, rows=[{"answer": str(i)} for i in range(n)])


def assert_kept(found, whole, places):
    assert found.version.tolist() == [int(whole.version[i]) for i in places]
    assert list(found.rows) == [whole.rows[i] for i in places]


def test_versions_are_0_and_rows_absent_where_nobody_says():
    drawn = lm().sample(PROMPTS, 2, max_new_tokens=3, seed=0)
    assert drawn.version.tolist() == [0] * 8 and drawn.version.dtype == torch.int64
    assert drawn.rows is None
    assert drawn[:3].rows is None and Samples.cat([drawn, drawn]).rows is None
    old = {f.name: getattr(drawn, f.name) for f in dataclasses.fields(drawn) if f.name not in ("version", "rows")}
    assert Samples(**old).version.tolist() == [0] * 8


@pytest.mark.parametrize(
    "index",
    [slice(3, 15), slice(None, None, 5), slice(0, 0), torch.arange(24) % 3 == 0, torch.tensor([5, 0, -1, 5]),
     [5, 0, -1], [True, False] * 12, [], torch.arange(3, dtype=torch.int32).numpy()],
    ids=["range", "stride", "empty", "mask", "indices", "list", "list of bools", "empty list", "array"],
)  # fmt: skip
def test_a_part_keeps_versions_and_rows(x, index):
    x = with_rows(x)
    places = torch.arange(24)[index].tolist() if not isinstance(index, list) or index else []
    part = x[index]
    assert_kept(part, x, places)
    assert part.tokens.tolist() == [x.tokens[i].tolist() for i in places]


def test_what_moves_samples_keeps_versions_and_rows(x):
    x, everything = with_rows(x), range(24)
    assert_kept(x.to("cpu"), x, everything)
    assert x.to("meta").version.device.type == "meta"
    assert_kept(x.trimmed(), x, everything)
    assert_kept(lm().with_prompt(x, "w1 w2"), x, everything)
    assert_kept(Samples.cat([x[12:], x[:0], x[:12]]), x, [*range(12, 24), *range(12)])


def test_cat_refuses_rows_on_some_parts_only(x):
    whole = with_rows(x)
    with pytest.raises(ValueError, match="rows on all parts or on none"):
        Samples.cat([whole, x[:1]])
    assert len(Samples.cat([whole, x[:0]]).rows) == 24  # a part without sequences lacks no row


# --- what is not an index --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "error", "match"),
    [
        (0, TypeError, r"can't be indexed by 0: write samples\[i : i \+ 1\]"),
        (-1, TypeError, r"samples\[i : i \+ 1\]"),
        (True, TypeError, r"samples\[i : i \+ 1\]"),
        (torch.tensor(3), TypeError, r"samples\[i : i \+ 1\]"),
        (torch.tensor([1, 2]).numpy()[0], TypeError, r"samples\[i : i \+ 1\]"),
        ((0, 1), TypeError, r"can't be indexed by \(0, 1\)"),
        ((slice(2), slice(2)), TypeError, "can't be indexed by"),
        (torch.zeros(24, 2, dtype=torch.bool), TypeError, r"one dimension.*\(24, 2\)"),
        ([[0, 1], [2, 3]], TypeError, r"one dimension.*\(2, 2\)"),
        (torch.tensor([0.0, 1.0]), TypeError, "float32"),
        (torch.zeros(24, dtype=torch.uint8), TypeError, "uint8"),
        ("tokens", TypeError, "an index, got a str"),
        (None, TypeError, "an index, got a NoneType"),
        ([None, 1], TypeError, "an index, got a list"),
        (torch.ones(23, dtype=torch.bool), IndexError, "a mask of 23 does not fit 24 sequences"),
        ([True] * 25, IndexError, "a mask of 25 does not fit 24 sequences"),
        (torch.tensor([0, 24]), IndexError, "from 0 to 24, beyond 24 sequences"),
        ([-25], IndexError, "beyond 24 sequences"),
    ],
)
@pytest.mark.parametrize("rows", [False, True])
def test_what_is_no_index_of_a_batch(x, index, error, match, rows):
    with pytest.raises(error, match=match):
        (with_rows(x) if rows else x)[index]


def test_samples_are_no_iterable_of_single_sequences(x):
    with pytest.raises(TypeError, match="are a batch"):
        list(x)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: {"tokens": x.tokens[0]}, r"tokens must be \(N, T\), got the shape"),
        (lambda x: {"score_mask": x.score_mask[:, 1:]}, "score_mask must be"),
        (lambda x: {"attention_mask": x.attention_mask[:5]}, "attention_mask must be"),
        (lambda x: {"log_prob": x.log_prob[:5]}, r"log_prob must be \(24,\).*\(5,\)"),
        (lambda x: {"context_id": x.context_id[:, None]}, r"context_id must be \(24,\)"),
        (lambda x: {"version": torch.tensor(3)}, r"version must be \(24,\)"),
        (lambda x: {"rows": [{}] * 23}, "one row for each of 24 sequences, got 23"),
    ],
)
def test_parts_that_are_not_those_of_n_sequences(x, change, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(x, **change(x))
