"""Test a vocabulary that is cut in two.

Each backend scores and differentiates its half, with labels that lie in the other one. The halves put together are the
whole.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_kernels import DTYPES, Case, make_case
from torch import Tensor

from dmfast import kernels
from dmfast.kernels import Backend, checks, select
from dmfast.kernels.batch import LABEL, LSE, ROW_ENTROPY, Batch

V, CUT = 301, 130
backends = pytest.mark.parametrize("backend", ["fused", "eager"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])


def backend_of(name: str, logits: Tensor) -> Backend:
    return kernels.EAGER if name == "eager" else select(logits)


def whole_and_halves(case: Case, **rows: Any) -> tuple[Batch, list[Batch]]:
    given = (case.tokens, case.mask, case.cu_seqlens, rows.get("temperature", 1.0), rows.get("softcap"))
    share = torch.randn(case.tokens.shape) if rows else None
    halves = [
        checks.make_batch(case.logits[..., first:last], *given, vocab_start=first, whole_vocab=V, token_weight=share)
        for first, last in ((0, CUT), (CUT, V))
    ]
    return checks.make_batch(case.logits, *given, token_weight=share), halves


@backends
@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "packed64"])
@pytest.mark.parametrize("rows", [{}, {"temperature": 0.7, "softcap": 9.0}], ids=["plain", "capped and weighted"])
def test_two_halves_are_the_whole(backend: str, dtype: torch.dtype, layout: str, rows: dict[str, float]) -> None:
    case = make_case(layout, dtype, V)
    whole, halves = whole_and_halves(case, **rows)
    run = backend_of(backend, case.logits)
    truth = run.forward(whole, None, True)
    found = [run.forward(half, None, True) for half in halves]
    scored = whole.labels != -100
    assert all(bool(part.sequences.isnan().all()) for part in found), "a shard has no log pi of its own"

    lse = torch.logaddexp(found[0].rows[LSE], found[1].rows[LSE])
    labels = sum(part.rows[LABEL] for part in found)
    here = [(whole.labels >= half.vocab_start) & (whole.labels < half.vocab_start + half.vocab) for half in halves]
    assert bool((here[0] ^ here[1])[scored].all()) and bool(here[0].any()) and bool(here[1].any())
    for part, mine in zip(found, here, strict=True):
        assert bool((part.rows[LABEL][~mine] == 0).all()), "the logit of a label that is elsewhere is absent"
    torch.testing.assert_close(lse[scored], truth.rows[LSE][scored], rtol=0, atol=2e-6)
    torch.testing.assert_close(labels, truth.rows[LABEL], rtol=0, atol=1e-9)
    shares = [(part.rows[LSE] - lse).exp() * (part.rows[LSE] - part.rows[ROW_ENTROPY]) for part in found]
    entropy = lse - shares[0] - shares[1]
    torch.testing.assert_close(entropy[scored], truth.rows[ROW_ENTROPY][scored], rtol=0, atol=1e-5)

    weight = torch.randn(whole.n_sequences).double()
    weight[0] = 0.0
    full = torch.full(case.logits.shape, torch.nan, dtype=dtype)
    run.backward(whole, truth.lse, weight, 0.5, full)
    for half in halves:
        dz = torch.full(half.logits.shape, torch.nan, dtype=dtype)
        run.backward(half, truth.lse, weight, 0.5, dz)
        mine = full[..., half.vocab_start : half.vocab_start + half.vocab]
        torch.testing.assert_close(dz, mine, rtol=1e-6 if dtype == torch.float32 else 2.0**-7, atol=1e-9)


@backends
def test_in_place_too(backend: str) -> None:
    case = make_case("contiguous", torch.float32, V, unscored="none")
    case.base.nan_to_num_()
    whole, halves = whole_and_halves(case)
    run = backend_of(backend, case.logits)
    lse, weight = run.forward(whole, None, False).lse, torch.randn(whole.n_sequences).double()
    full = torch.empty_like(case.logits)
    run.backward(whole, lse, weight, 1.0, full)
    for half in halves:
        mine = half._replace(logits=half.logits.clone())
        run.backward(mine, lse, weight, 1.0, mine.logits.detach())
        expected = full[..., half.vocab_start : half.vocab_start + half.vocab]
        torch.testing.assert_close(mine.logits, expected, rtol=1e-6, atol=1e-9)


@backends
def test_labels_are_checked_against_the_whole_vocabulary(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMFAST_SYNC_CHECKS", "1")
    case = make_case("contiguous", torch.float32, V, unscored="none")
    case.tokens[2, 3] = V
    run = backend_of(backend, case.logits)
    for half in whole_and_halves(case)[1]:
        with pytest.raises(ValueError, match=rf"tokens holds {V} at \(sequence 2, position 3\).* in \[0, {V}\)"):
            run.forward(half, None, False)


@backends
def test_a_row_whose_half_holds_nothing(backend: str) -> None:
    """All logits of a half are -inf, which is not a fault if the label is in the other half."""
    case = make_case("contiguous", torch.float32, V, unscored="none")
    case.tokens.clamp_(min=CUT)
    case.base[1, 2, :CUT] = -torch.inf
    whole, halves = whole_and_halves(case)
    run = backend_of(backend, case.logits)
    found = run.forward(halves[0], None, True)
    assert found.rows[ROW_ENTROPY].view(4, 6)[1, 2] == 0 and bool(found.rows[ROW_ENTROPY].isfinite().all())
    assert found.lse.view(4, 6)[1, 2] == -torch.inf and bool(found.lse.isfinite().sum() == 23)
    dz = torch.full(halves[0].logits.shape, torch.nan)
    run.backward(halves[0], run.forward(whole, None, False).lse, torch.ones(4).double(), 1.0, dz)
    assert bool((dz[1, 2] == 0).all()) and bool((dz[1, 1] > 0).all())
