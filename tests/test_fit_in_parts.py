"""Test that a fit's samples in parts are those of one draw, and that a fit stops once its errors suffice."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from trainer_job import gpt2, tokenizer

from dmfast import EBM, Contains, LanguageModel, Moment, Scorer
from dmfast.targets import drawing, ebm
from dmfast.training import evaluation
from dmfast.training.evaluation import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")

PROMPTS = ["w1", "w2", "w4", "w6"]
HOW = {"max_new_tokens": 4, "temperature": 1.0, "batch_size": 64}


@pytest.fixture(scope="module")
def base():
    return LanguageModel(gpt2(), tokenizer())


@pytest.mark.parametrize("contexts", [None, ["w1 w2"], ["w1", "w2", "w4", "w0", "w6"]], ids=["empty", "one", "several"])
def test_parts_are_one_draw(base, contexts, monkeypatch, capsys):
    monkeypatch.setattr(drawing, "PART", 100)
    parts = list(drawing.drawn_in_parts(base, contexts, 70 if contexts and len(contexts) > 1 else 300, seed=3,
                                        progress=True, **HOW))  # fmt: skip
    whole = base.sample(contexts, sum(map(len, parts)) // (len(contexts) if contexts else 1), seed=3, **HOW)
    assert len(parts) >= 3
    width = max(part.tokens.shape[1] for part in parts)
    assert width == whole.tokens.shape[1]
    assert [text for part in parts for text in part.text] == whole.text
    assert torch.equal(torch.cat([part.context_id for part in parts]), whole.context_id)
    torch.testing.assert_close(torch.cat([part.log_prob for part in parts]), whole.log_prob, rtol=0, atol=1e-5)
    assert re.search(f"lambda: {len(whole)} of {len(whole)} samples of the base", capsys.readouterr().err)


@pytest.mark.parametrize("contexts", [None, PROMPTS], ids=["empty", "several"])
def test_an_evaluation_draws_within_the_budget_and_says_how_far_it_is(base, contexts, monkeypatch, capsys):
    target, n = EBM(base, [Contains("w3")]), 400 // (len(contexts) if contexts else 1)
    how = {"max_new_tokens": 4, "seed": 3}
    whole, found = evaluate(base, target, contexts, n, batch_size=400, **how)
    assert capsys.readouterr().err == ""
    drawn, sample = [], LanguageModel.sample
    monkeypatch.setattr(drawing, "PART", 100)
    monkeypatch.setattr(evaluation, "batch_within", lambda *args: drawing.batch_within(*args, budget=400_000))
    monkeypatch.setattr(
        LanguageModel, "sample", lambda *args, **how: drawn.append(how["batch_size"]) or sample(*args, **how)
    )
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    parts, same = evaluate(base, target, contexts, n, whose="the policy", **how)
    assert len(drawn) >= 4 and set(drawn) != {256} and max(drawn) < 256
    assert "evaluation: 400 of 400 samples of the policy" in capsys.readouterr().err
    assert parts.text == whole.text and parts.context_id.tolist() == whole.context_id.tolist()
    assert {k: pytest.approx(e.value, nan_ok=True) for k, e in found.items()} == {k: e.value for k, e in same.items()}


def test_without_a_seed_parts_take_torchs(base, monkeypatch):
    monkeypatch.setattr(drawing, "PART", 100)
    torch.manual_seed(5)
    parts = list(drawing.drawn_in_parts(base, None, 300, seed=None, **HOW))
    torch.manual_seed(5)
    assert [text for part in parts for text in part.text] == base.sample(None, 300, seed=None, **HOW).text
    assert len(parts) == 3


def test_a_fit_stops_once_its_errors_suffice(base, monkeypatch):
    monkeypatch.setattr(drawing, "PART", 100)

    def fitted(**options):
        return EBM(base, [Moment(Contains("w3", name="w3"), 0.6)]).fit(
            n=800, max_new_tokens=4, batch_size=100, progress=False, **options
        )

    whole, few, never = fitted(), fitted(max_stderr=0.08), fitted(max_stderr=1e-9)
    assert whole.report.n == never.report.n == 800 and whole.lambda_.tolist() == never.lambda_.tolist()
    assert 100 <= few.report.n < 800 and few.report.n % 100 == 0
    assert few.report.attained[0].stderr <= 0.08
    first = EBM(base, [Moment(Contains("w3", name="w3"), 0.6)]).fit(n=few.report.n, max_new_tokens=4, batch_size=100)
    assert first.lambda_.tolist() == few.lambda_.tolist()
    assert fitted(max_stderr=0).lambda_.tolist() == whole.lambda_.tolist()
    assert not whole.report.notes
    assert f"note: drawing stopped at {few.report.n} of 800 samples, whose" in str(few.report)
    with pytest.raises(ValueError, match="max_stderr must not be negative, got -1"):
        fitted(max_stderr=-1)


def test_by_default_a_fit_stops_with_enough_effective_samples(base, monkeypatch):
    monkeypatch.setattr(drawing, "PART", 100)
    monkeypatch.setattr(ebm, "_ENOUGH", 250.0)

    def fitted(n=800, **options):
        words = Moment(Contains(any_of=["w3", "w5", "w7", "w8"], name="words"), 0.5)
        return EBM(base, [words]).fit(n=n, max_new_tokens=4, batch_size=100, progress=False, **options).report

    few = fitted()
    assert 300 <= few.n < 800 and few.ess >= 250
    assert fitted(max_stderr=0).n == 800
    # prompts with few samples each are not drawn in rounds
    assert fitted(n=1000, contexts=PROMPTS).n == 1000
    assert fitted(n=1100, contexts=PROMPTS).n < 1100


def test_a_round_has_samples_of_every_context(base, monkeypatch):
    monkeypatch.setattr(drawing, "PART", 100)
    rounds = list(drawing.drawn_in_parts(base, PROMPTS, 70, seed=3, in_rounds=True, **HOW))
    assert [len(part) for part in rounds] == [4 * 32, 4 * 32, 4 * 6]
    for first, part in zip((0, 32, 64), rounds, strict=True):
        again = base.sample(PROMPTS, len(part) // 4, seed=3, first_row=4 * first, **HOW)
        assert part.text == again.text and torch.equal(part.context_id, again.context_id)
    assert rounds[0].text != rounds[1].text


def test_a_fit_with_several_prompts_stops_once_its_errors_suffice(base, monkeypatch):
    monkeypatch.setattr(drawing, "PART", 100)
    seen = []

    def has_its_word(samples):
        seen.append(len(samples))
        return torch.tensor([row["word"] in text.split() for text, row in zip(samples.text, samples.rows, strict=True)])

    def fitted(**options):
        seen.clear()
        return EBM(base, [Moment(Scorer(has_its_word, name="word", binary=True, on="samples"), 0.6)]).fit(
            n=800, contexts=PROMPTS, rows=[{"word": f"w{i}"} for i in range(4)], max_new_tokens=4, batch_size=100,
            progress=False, **options,
        )  # fmt: skip

    few = fitted(max_stderr=0.08).report
    assert few.contexts == 4 and few.n in (200, 300, 400, 500) and few.attained[0].stderr <= 0.08
    assert sum(seen) == few.n  # the checks score each part, and the fit takes their scores
    assert fitted(max_stderr=1e-9).report.n == 800


def test_a_fit_goes_on_while_a_prompt_has_shown_nothing(base, monkeypatch):
    monkeypatch.setattr(drawing, "PART", 100)

    def but_after(prompt):
        b = Scorer(lambda samples: samples.context_id != prompt, name="b", binary=True, on="samples")
        return EBM(base, [b, Moment(Contains(any_of=["w3", "w5", "w7", "w8"], name="words"), 0.3)]).fit(
            n=800, contexts=PROMPTS, max_new_tokens=4, batch_size=100, max_stderr=0.1, progress=False
        )

    assert but_after(9).report.n < 800
    silent = but_after(3).report
    assert silent.n == 800 and silent.contexts == 3


def test_a_batch_fits_into_its_budget():
    def model(**config):
        of = SimpleNamespace(config=SimpleNamespace(**config), parameters=lambda: iter([torch.zeros(1)]))
        return SimpleNamespace(model=of, vocab_size=49152)

    smollm2 = model(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_size=576)
    assert drawing.batch_within(smollm2, ["x" * 100], 64) == (4 << 30) // (3 * 2 * 30 * 192 * 4 * 164 + 32 * 49152)
    chat = [{"role": "user", "content": "x" * 100}]
    assert drawing.batch_within(smollm2, [chat], 64) <= drawing.batch_within(smollm2, ["x" * 100], 64)
    assert drawing.batch_within(smollm2, None, 64, budget=1) == 1
    assert drawing.batch_within(smollm2, None, 8) == 256 == drawing.batch_within(model(), None, 64)
