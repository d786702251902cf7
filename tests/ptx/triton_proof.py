"""Compare the PTX that Triton makes of dmfast/kernels/triton with dmfast.eager in fp64. `make ptx` runs it.

machine.py runs the PTX on tiny shapes under the plugin emulated.py, and the errors are those that tests/test_kernels.py
states. This covers what Triton's interpreter (scripts/ci/interpreter.sh) does not: Triton's own compiler with its
arithmetic, alignments, layouts, shuffles and barriers, as launch.py has it run, warps that do not run in step, and the
traffic.
"""

from __future__ import annotations

import math
from typing import Any

import emulated
import pytest
import torch
from test_kernels import SPECIAL, Case, check, check_narrow, make_case, make_terms

import dmfast
from dmfast import eager
from dmfast.functional import sample_tokens
from dmfast.kernels import checks, select
from dmfast.kernels.triton import loss

INF, NAN = math.inf, math.nan
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def started() -> None:
    emulated.launches.clear()


def kernels() -> set[str]:
    """Return the kernels that have run in this test."""
    return {x.name for x in emulated.launches}


SHAPES: list[dict[str, Any]] = [
    dict(v=37, layout="contiguous"),  # V is odd, so every row starts elsewhere in a pack
    dict(v=71, layout="sliced"),  # a new gradient's rows are aligned otherwise
    dict(v=256, layout="transposed"),  # all rows are aligned
    dict(v=1, layout="packed32"),
    dict(v=133, layout="unaligned", softcap=5.0, temperature=0.7),
    dict(v=150, layout="packed_strided", dtype=BF16),
    dict(v=150, layout="batch_strided", dtype=BF16, softcap=30.0),
    dict(v=75, layout="sliced", dtype=FP16, temperature=1.7),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(str(x) for x in s.values()))


def parts(shape: dict[str, Any], **more: Any) -> tuple[Case, dict[str, Any]]:
    """Return a case and what ``check`` takes, with rows that are not scored and weights of 0."""
    rows = {k: shape[k] for k in ("temperature", "softcap") if k in shape}
    case = make_case(shape["layout"], shape.get("dtype", FP32), shape["v"], b=4, t=3, **more)
    return case, {**rows, **make_terms(case, **rows)}


@shapes
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_forward_and_backward(shape: dict[str, Any], inplace: bool) -> None:
    case, options = parts(shape)
    check(case, inplace=inplace, return_entropy=True, **options)
    assert kernels() == {"score_rows", "sum_rows", "write_rows"}


@shapes
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_known_weight(shape: dict[str, Any], inplace: bool) -> None:
    """grad_output is not the expected one. In place scale_rows corrects the gradient, and otherwise it is made anew."""
    case, options = parts(shape)
    out = check(case, inplace=inplace, objective="dpg", grad_scale=1.0, grad=torch.tensor(0.37).double(), roundings=2,
                return_entropy=True, **options)  # fmt: skip
    assert 0 < out.weight.count_nonzero() < len(out.weight)
    # the logits are needed for this, and in place they are gone
    anew = set() if inplace else {"write_rows"}
    assert kernels() == {"score_rows", "sum_rows", "scale_rows"} | anew


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("known", [False, True], ids=["weight of pi", "known weight"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_gradient_narrower_than_its_logits(dtype: torch.dtype, known: bool, aligned: bool) -> None:
    for layout, v, softcap in (("contiguous", 37, None), ("unaligned", 152, 5.0)):
        check_narrow(make_case(layout, FP32, v, b=2, t=2), dtype, known, aligned, softcap=softcap)


def test_sm_100(monkeypatch: pytest.MonkeyPatch) -> None:
    """sm_100 has other arithmetic: two fp32 in a register, and fp32 with bf16 in one instruction."""
    monkeypatch.setattr(emulated, "arch", 100)
    for shape in SHAPES[1], SHAPES[5]:
        case, options = parts(shape)
        check(case, return_entropy=True, **options)
        check(case, objective="dpg", return_entropy=True, **options)


@pytest.mark.parametrize("name", ["one finite logit", "scattered -inf", "+-1e4", "around -1e4", "rising"])
def test_special_logits(name: str) -> None:
    case, options = parts(dict(v=300, layout="sliced"), values=SPECIAL[name])
    for objective in ("gdc++", "dpg"):
        check(case, inplace=objective == "gdc++", objective=objective, return_entropy=True, **options)


@pytest.mark.parametrize(("v", "softcap"), [(3079, 9.0), (6151, None)])
def test_rows_that_several_warps_have(v: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between barriers the warps run one after the other, in several orders."""
    case = make_case("unaligned", FP32, v, b=1, t=2, unscored="none")
    terms = make_terms(case, softcap=softcap)
    for seed, (inplace, objective) in enumerate(((False, "gdc++"), (True, "gdc++"), (True, "dpg"))):
        monkeypatch.setattr(emulated, "seed", seed)
        check(case, inplace=inplace, objective=objective, softcap=softcap, return_entropy=True, **terms)
    assert all(x.warps > 1 for x in emulated.launches)


def test_traffic() -> None:
    """Forward and backward each read a scored logit once.

    Each warp reads the label's logit, and the few before and after the packs, once more. Rows that are not scored, and
    in backward those of weight 0, are not read at all.
    """
    for v in (37, 3079):
        case = make_case("contiguous", FP32, v, b=2, t=2, unscored="none")
        tokens = case.tokens.clone()
        tokens[1, 1] = -100
        logits = case.base.clone().nan_to_num().requires_grad_()
        emulated.launches.clear()
        out = dmfast.dm_loss(logits, tokens, objective=lambda _: torch.tensor([0.5, 0.0]).double())
        out.loss.backward()
        (score,) = (x for x in emulated.launches if x.name == "score_rows")
        (write,) = (x for x in emulated.launches if x.name == "write_rows")
        for i, row in enumerate(logits.detach().flatten(0, 1)):
            for launch, read in ((score, i < 3), (write, i < 2)):
                reads, writes = launch.traffic(row)
                assert read <= reads <= read * (1 + launch.warps * 7 / v) and writes == 0
            assert write.traffic(logits.grad.flatten(0, 1)[i]) == (0, 1)


def test_no_shape_compiles_anew() -> None:
    """There is one kernel, whatever V, strides and addresses are divisible by, also for a stride beyond 32 bits."""
    compiled = loss.score_rows.device_caches[emulated.arch][0]

    def score(v: int, far: bool = False) -> int:
        case = make_case("unaligned" if v % 2 else "contiguous", FP32, v, b=1, t=3)
        logits, before = case.logits, len(compiled)
        if far:
            logits = logits.as_strided(logits.shape, (2**40, *logits.stride()[1:]))
        truth = eager.sequence_log_prob(logits.double(), case.tokens, case.mask)
        assert (dmfast.sequence_log_prob(logits, case.tokens, case.mask) - truth).abs().max() < 3e-6
        return len(compiled) - before

    score(37)
    assert [score(v) for v in (1, 16, 17, 48, 512)] == [0] * 5
    assert score(33, far=True) == 1


def test_labels_at_an_odd_address() -> None:
    """Triton compiles one kernel for labels at a multiple of 16, and another for others."""
    for first in (0, 1):
        case = make_case("packed64", FP32, 29, unscored="none")
        tokens = torch.cat([torch.zeros(first, dtype=torch.int64), case.tokens])[first:]
        assert tokens.data_ptr() % 16 == 8 * first
        moved = Case(case.base, case.cut, tokens, None, case.cu_seqlens)
        check(moved, return_entropy=True, **make_terms(moved))


def test_a_fault_costs_its_sequence_alone() -> None:
    case = make_case("contiguous", FP32, 37, b=3, t=3, unscored="none")
    case.base[1, 1, 36] = NAN
    case.tokens[2, 0] = 37
    logits = case.base.clone().requires_grad_()
    terms = {"log_proposal": torch.zeros(3), "log_target": torch.zeros(3), "log_z": 0.0}
    out = dmfast.dm_loss(logits, case.tokens, objective="dpg", **terms)
    out.loss.backward()
    assert out.log_prob.isnan().tolist() == [False, True, True] and out.weight.tolist()[1:] == [0, 0]
    assert bool((logits.grad[1:] == 0).all()) and bool(logits.grad[0].any())
    with pytest.raises(ValueError, match="sequence 1, position 1"):
        out.check()


DRAWS = [
    (1030, FP32, dict(softcap=9.0)),  # these rows have two tiles
    (1032, FP32, dict(temperature=0.7)),  # rows of this length are read wide
    (2056, BF16, {}),
    (77, FP16, dict(softcap=30.0)),
]


@pytest.mark.parametrize(("v", "dtype", "rows"), DRAWS)
def test_draws(v: int, dtype: torch.dtype, rows: dict[str, float]) -> None:
    """Draws are those of eager from the same random numbers, and right at both ends of a token's interval."""
    torch.manual_seed(v)
    z = (3 * torch.randn(3, v)).to(dtype)
    z[:, v // 3] = -INF
    ids = torch.tensor([0, 2**40 + 3, 7])
    mine, log_prob = sample_tokens(z, seed=2**64 - 5, row_ids=ids, step=2**33, **rows)
    tokens, truth = eager.sample_tokens(z, seed=2**64 - 5, row_ids=ids, step=2**33, **rows)
    assert torch.equal(mine, tokens) and (log_prob - truth).abs().max() < 1e-6
    draws = checks.make_sample_rows(z[:1].expand(3, v), 0, None, 0, rows.get("temperature", 1.0), rows.get("softcap"))
    x, cap = z[0].double(), rows.get("softcap")
    p = ((x if cap is None else cap * torch.tanh(x / cap)) / rows.get("temperature", 1.0)).softmax(0)
    likely = int(p.argmax())
    given = p[:likely].sum() + p[likely] * torch.tensor([0.01, 0.5, 0.99]).double()
    assert select(draws.logits).sample(draws, given)[0].tolist() == [likely] * 3
    bad = z[:1].clone()
    bad[0, v - 1] = NAN
    assert select(bad).sample(draws._replace(logits=bad), given[:1])[1].isnan().all()
