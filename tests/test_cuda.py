"""What only the CUDA backend has: the rule by which it divides rows, faults that it records and the host reads later,
and counters that are 0 again after every call. Runs on a device, or on the host build of scripts/ci/host_cuda.sh.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import dmfast
from dmfast import eager
from dmfast.kernels import cuda, native

pytestmark = pytest.mark.skipif(native.why_not_cuda() is not None, reason=str(native.why_not_cuda()))
INF, NAN = math.inf, math.nan
KIB = 1024


def device() -> str:
    return str(native._C.cuda.device_type)  # type: ignore[union-attr]


@pytest.fixture(autouse=True)
def _asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMFAST_SYNC_CHECKS", "0")


def good(v: int = 37) -> dict[str, Any]:
    torch.manual_seed(0)
    terms = {name: (torch.randn(4).double() - 20).to(device()) for name in ("log_target", "log_proposal", "log_base")}
    return {"logits": torch.randn(4, 5, v, device=device()), "tokens": torch.randint(v, (4, 5), device=device()),
            "log_z": torch.zeros(4).double().to(device()), **terms}  # fmt: skip


@pytest.mark.parametrize(
    ("vocab", "itemsize", "limit", "expected"),
    [
        (31, 2, 227 * KIB, (32, True, 80)),
        (50257, 2, 227 * KIB, (384, True, 100544)),  # two rows a multiprocessor
        (50257, 4, 227 * KIB, (768, True, 201056)),  # one
        (50257, 4, 163 * KIB, (768, False, 159 * KIB)),  # A100: read twice, one row a multiprocessor
        (151936, 2, 227 * KIB, (768, False, 223 * KIB)),
        (50257, 2, 99 * KIB, (768, False, 95 * KIB)),  # RTX
    ],
)
def test_when_a_row_is_kept(vocab: int, itemsize: int, limit: int, expected: tuple[int, bool, int]) -> None:
    plan = native._C.cuda.plan_known(vocab, itemsize, limit)  # type: ignore[union-attr]
    assert plan == expected
    threads, kept, shared = plan
    assert threads % 32 == 0 and shared + 4096 <= limit
    assert not kept or shared >= vocab * itemsize + 16 - itemsize  # wherever the row starts


def test_threads_of_a_row() -> None:
    counts = [native._C.cuda.plan_once(v, 2) for v in (1, 512, 513, 2000, 50257)]  # type: ignore[union-attr]
    assert counts == [32, 32, 64, 128, 256]


@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("bad", ["nan", "inf", "token", "label", "weight", "input"])
def test_a_fault_is_raised_by_check_and_costs_its_sequence_alone(bad: str, inplace: bool, objective: str) -> None:
    call = good()
    whole = dmfast.dm_loss(**call, objective=objective)
    message = {
        "nan": r"NaN or \+inf at \(sequence 2, position 1\)", "inf": r"NaN or \+inf at \(sequence 2, position 1\)",
        "token": r"tokens holds 37 at \(sequence 2, position 1\)", "label": r"at \(sequence 2, position 1\) is -inf",
        "weight": "weight A of sequence 2 is", "input": "log_proposal holds nan at sequence 2",
    }[bad]  # fmt: skip
    if bad in ("nan", "inf"):
        call["logits"][2, 1, 3] = NAN if bad == "nan" else INF
    elif bad == "token":
        call["tokens"][2, 1] = 37
    elif bad == "label":
        call["logits"][2, 1, call["tokens"][2, 1]] = -INF
    elif bad == "weight":
        call["log_target"][2] = 600.0
    else:
        call["log_proposal"][2] = NAN
    leaf = call["logits"].clone().requires_grad_()
    out = dmfast.dm_loss(**{**call, "logits": leaf * 1.0}, objective=objective, inplace=inplace)
    out.loss.backward()
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            out.check()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())
    assert float(out.weight[2]) == 0.0 and bool((leaf.grad[2] == 0).all())
    others = torch.tensor([0, 1, 3])
    assert torch.equal(out.weight[others], whole.weight[others])
    assert bool((leaf.grad[others] != 0).any())
    if bad not in ("weight", "input"):
        assert math.isnan(float(out.log_prob[2]))
    assert torch.equal(out.log_prob[others], whole.log_prob[others])
    dmfast.dm_loss(**good(), objective=objective).check()


def test_a_users_objective_is_checked_later_too() -> None:
    call = {**good(), "objective": lambda t: torch.where(t.log_prob == t.log_prob[1], NAN, 1.0).double()}
    out = dmfast.dm_loss(**call)
    with pytest.raises(ValueError, match="sequence 1 is nan"):
        out.check()
    assert out.weight.tolist() == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("starts", [[0, 9, 3, 20], [0, 7, 14, 21], [1, 7, 14, 20], [0, -5, 8, 20], [0, 3, 400, 20]])
def test_cu_seqlens_out_of_order(starts: list[int]) -> None:
    call = good()
    packed = {"logits": call["logits"].flatten(0, 1), "tokens": call["tokens"].flatten(), "log_z": 0.0,
              "cu_seqlens": torch.tensor(starts, device=device()),
              **{k: call[k][:3] for k in ("log_target", "log_proposal")}}  # fmt: skip
    leaf = packed.pop("logits").clone().requires_grad_()
    for objective in ("gdc++", "dpg"):
        out = dmfast.dm_loss(leaf, **packed, objective=objective)
        (grad,) = torch.autograd.grad(out.loss, leaf)
        assert bool((grad == 0).all())
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to N = 20"):
            out.check()


def test_at_once_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMFAST_SYNC_CHECKS", "1")
    call = good()
    call["logits"][2, 1, 3] = NAN
    for function in (dmfast.dm_loss, lambda logits, tokens, **_: dmfast.sequence_log_prob(logits, tokens)):
        with pytest.raises(ValueError, match=r"sequence 2, position 1"):
            function(**call)
    with pytest.raises(ValueError, match=r"in row 11:"):
        dmfast.sample_tokens(call["logits"].flatten(0, 1), seed=1)


def test_without_a_loss_a_fault_shows_as_nan() -> None:
    call = good()
    call["logits"][2, 1, 3] = NAN
    log_prob = dmfast.sequence_log_prob(call["logits"], call["tokens"])
    assert log_prob.isnan().tolist() == [False, False, True, False]
    tokens, log_prob = dmfast.sample_tokens(call["logits"].flatten(0, 1), seed=1)
    assert log_prob.isnan().nonzero().tolist() == [[11]] and int(tokens[11]) == 0


def test_the_same_three_times_and_counters_are_zero_again() -> None:
    """As when a captured graph is replayed."""
    for objective in ("gdc++", "dpg"):
        found: list[list[Tensor]] = []
        for _ in range(3):
            call = good(1000)
            leaf = call.pop("logits").requires_grad_()
            out = dmfast.dm_loss(leaf, **call, objective=objective, return_entropy=True)
            out.loss.backward()
            tokens, log_prob = dmfast.sample_tokens(leaf[0], seed=3)
            found.append([out.loss.detach(), out.log_prob, out.weight, out.entropy, leaf.grad, tokens, log_prob])  # type: ignore[list-item]
            assert all(bool((counters == 0).all()) for counters in cuda._counters.values())
        assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, found[0], found[2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [33, 4099])
def test_a_row_read_twice_gives_the_bits_of_one_kept(v: int, dtype: torch.dtype, monkeypatch: Any) -> None:
    if device() != "cpu":
        pytest.skip("only the host build can be told how much shared memory there is")
    found = []
    for limit in ("22000", "0"):  # the number of threads is the same
        monkeypatch.setenv("SHIM_SHARED", limit)
        call = good(v)
        leaf = call.pop("logits").to(dtype).requires_grad_()
        out = dmfast.dm_loss(leaf, **call, objective="dpg", grad_scale=1.0)
        out.loss.backward()
        found.append((out.loss.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_cuda_draws_what_the_cpu_draws() -> None:
    """The same uniform numbers and the same inversion: another token only where a boundary lies within rounding."""
    torch.manual_seed(0)
    z = (3 * torch.randn(1000, 700)).to(device())
    arguments = (0, z.data_ptr(), 1000, 700, 700, 1.3, 0.0, 5, 0, 9, 0, 1)
    if device() != "cpu":
        z = z.cpu()
        arguments = (0, z.data_ptr(), *arguments[2:])
    tokens, log_prob = torch.empty(1000, dtype=torch.int64), torch.empty(1000, dtype=torch.float64)
    native._C.sample(*arguments, tokens.data_ptr(), log_prob.data_ptr())  # type: ignore[union-attr]
    mine, mine_log_prob = dmfast.sample_tokens(z.to(device()), seed=5, step=9, temperature=1 / 1.3)
    assert int((mine.cpu() != tokens).sum()) <= 1
    assert float((mine_log_prob.cpu() - log_prob)[mine.cpu() == tokens].abs().max()) < 1e-6
    assert torch.equal(eager.sample_tokens(z, seed=5, step=9, temperature=1 / 1.3)[0], tokens)
