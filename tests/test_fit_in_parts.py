"""A fit's samples in parts are those of one draw."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from trainer_job import gpt2, tokenizer

from dmfast import EBM, Contains, LanguageModel, Moment
from dmfast.targets import drawing

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")

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


def test_a_fit_stops_once_its_errors_suffice(base, monkeypatch):
    monkeypatch.setattr(drawing, "PART", 100)

    def fitted(**options):
        return EBM(base, [Moment(Contains("w3", name="w3"), 0.6)]).fit(
            n=2000, max_new_tokens=4, batch_size=50, progress=False, **options
        )

    whole, few, never = fitted(), fitted(max_stderr=0.05), fitted(max_stderr=1e-9)
    assert whole.report.n == never.report.n == 2000 and whole.lambda_.tolist() == never.lambda_.tolist()
    assert 100 <= few.report.n < 2000 and few.report.n % 100 == 0
    assert few.report.attained[0].stderr <= 0.05
    first = EBM(base, [Moment(Contains("w3", name="w3"), 0.6)]).fit(n=few.report.n, max_new_tokens=4, batch_size=50)
    assert first.lambda_.tolist() == few.lambda_.tolist()
    with pytest.raises(ValueError, match="max_stderr must be positive, got 0"):
        fitted(max_stderr=0)


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
