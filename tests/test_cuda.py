"""Test what only the CUDA backend has: the rule by which it divides rows, and faults that the host reads later.

The tests run on a device, or on the host build of scripts/ci/host_cuda.sh.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dmfast
from dmfast import eager, kernels
from dmfast.functional import DMLossOutput, sample_tokens
from dmfast.kernels import cuda, extension, triton

pytestmark = pytest.mark.skipif(kernels.CUDA.why_not(None) is not None, reason=str(kernels.CUDA.why_not(None)))
INF, NAN = math.inf, math.nan
KIB = 1024


def device() -> str:
    if kernels.forced == "triton":  # test_triton.py runs these tests with Triton
        return "cpu" if triton.interpreted() else triton.devices()[0]
    return str(extension._C.cuda.device_type)  # type: ignore[union-attr]


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
        (50257, 2, 227 * KIB, (384, True, 100544)),  # two rows fit on a multiprocessor
        (50257, 4, 227 * KIB, (384, False, 0)),  # only one row would fit
        (50257, 2, 163 * KIB, (384, False, 0)),  # A100
        (37000, 2, 163 * KIB, (384, True, 74016)),
        (151936, 2, 227 * KIB, (384, False, 0)),
        (50257, 2, 99 * KIB, (384, False, 0)),  # RTX
    ],
)
def test_when_a_row_is_kept(vocab: int, itemsize: int, limit: int, expected: tuple[int, bool, int]) -> None:
    plan = extension._C.cuda.plan_known(vocab, itemsize, limit)  # type: ignore[union-attr]
    assert plan == expected
    threads, kept, shared = plan
    assert threads % 32 == 0 and 2 * (shared + 4096) <= limit
    assert not kept or shared >= vocab * itemsize + 16 - itemsize  # the row fits at any alignment of its start


def test_threads_of_a_row() -> None:
    counts = [extension._C.cuda.plan_once(v, 2) for v in (1, 512, 513, 2000, 50257)]  # type: ignore[union-attr]
    assert counts == [32, 32, 64, 128, 256]


@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
@pytest.mark.parametrize("value", [NAN, INF, -1e31])
def test_a_token_weight_that_may_not_be_costs_its_token_alone(value: float, objective: str) -> None:
    call = good()
    call["logits"].requires_grad_()
    found = []
    for bad in (value, 0.0):
        w = torch.ones(4, 5, dtype=torch.float64, device=device())
        w[2, 1] = bad
        out = dmfast.dm_loss(**call, objective=objective, token_weight=w)
        found.append((*torch.autograd.grad(out.loss, call["logits"]), out.loss.detach()))
        if bad == 0.0:
            out.check()
        else:
            for _ in range(2):
                with pytest.raises(
                    ValueError, match=r"token_weight holds .* at \(sequence 2, position 1\), a scored pos"
                ):
                    out.check()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


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


@pytest.mark.parametrize("form", ["one pass", "two phases", "own"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("log_z", INF), ("log_z", NAN), ("log_target", INF), ("log_proposal", NAN), ("log_proposal", -INF),
     ("log_base", -INF)],
)  # fmt: skip
def test_an_input_that_may_not_be_costs_its_sequence_also_where_the_weight_does_not_need_it(
    name: str, value: float, form: str
) -> None:
    """The weight is R = 1 whatever these inputs are. The CPU refuses them."""
    call: dict[str, Any] = {**good(), "reward": torch.ones(4, device=device()), "on_policy": True}
    call[name][2] = value
    call["objective"] = "reinforce" if form != "own" else lambda t: t.reward
    call["reduction"] = "none" if form == "two phases" else "mean"
    leaf = call.pop("logits").requires_grad_()
    out = dmfast.dm_loss(leaf, **call)
    out.loss.sum().backward()
    assert out.weight.tolist() == [1.0, 1.0, 0.0, 1.0] and bool(out.log_prob.isfinite().all())
    assert leaf.grad is not None and bool((leaf.grad[2] == 0).all()) and bool((leaf.grad[3] != 0).any())
    with pytest.raises(ValueError, match=f"{name} holds {value} at sequence 2"):
        out.check()


def test_a_users_objective_is_checked_later_too() -> None:
    call = {**good(), "objective": lambda t: torch.where(t.log_prob == t.log_prob[1], NAN, 1.0).double()}
    out = dmfast.dm_loss(**call)
    with pytest.raises(ValueError, match="sequence 1 is NaN"):
        out.check()
    assert out.weight.tolist() == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("masked", [False, True])
def test_under_compile_a_fault_of_a_chunk_names_its_sequence(masked: bool) -> None:
    """Faults name the right row, although rows are numbered within a chunk after the unscored ones are left out."""
    call = good()
    del call["logits"]
    hidden, weight = torch.randn(4, 5, 8, device=device()), torch.randn(37, 8, device=device())
    hidden[2, 1] = NAN
    mask = torch.ones(4, 5, dtype=torch.bool, device=device())
    mask[0] = not masked

    def step(hidden: Tensor, mask: Tensor, **rest: Any) -> DMLossOutput:
        return dmfast.linear_dm_loss(hidden * 1.0, weight, mask=mask, **rest, chunk_bytes=8 * 64 * 4)

    torch._dynamo.reset()
    out = torch.compile(step, backend="aot_eager", fullgraph=True)(hidden, mask, **call)
    with pytest.raises(ValueError, match=r"NaN or \+inf at \(sequence 2, position 1\)"):
        out.check()


def test_hidden_states_that_are_not_row_major() -> None:
    """Their gradient is laid out row by row, and another grad_output multiplies it in this order."""
    call = good()
    del call["logits"]
    call["tokens"] = call["tokens"].flatten()
    weight, cu_seqlens = torch.randn(37, 8, device=device()), torch.arange(5, device=device()) * 5
    found = []
    for backend in (None, "eager"):
        leaf = torch.linspace(-1, 1, 160, device=device()).view(8, 20).t().detach().requires_grad_()
        out = dmfast.linear_dm_loss(leaf, weight, cu_seqlens=cu_seqlens, backend=backend, **call)
        out.loss.backward(torch.tensor(2.0, dtype=torch.float64, device=device()))
        found.append(leaf.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


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
        sample_tokens(call["logits"].flatten(0, 1), seed=1)


def test_without_a_loss_a_fault_shows_as_nan() -> None:
    call = good()
    call["logits"][2, 1, 3] = NAN
    log_prob = dmfast.sequence_log_prob(call["logits"], call["tokens"])
    assert log_prob.isnan().tolist() == [False, False, True, False]
    tokens, log_prob = sample_tokens(call["logits"].flatten(0, 1), seed=1)
    assert log_prob.isnan().nonzero().tolist() == [[11]] and int(tokens[11]) == 0


def test_the_same_three_times_each_with_counters_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """This is what happens when a captured graph is replayed. No call has another one's counters."""
    made: list[cuda.Workspace] = []
    make = cuda.make_workspace
    monkeypatch.setattr(cuda, "make_workspace", lambda *args: made.append(make(*args)) or made[-1])
    for objective in ("gdc++", "dpg"):
        found: list[list[Tensor]] = []
        for _ in range(3):
            call = good(1000)
            leaf = call.pop("logits").requires_grad_()
            out = dmfast.dm_loss(leaf, **call, objective=objective, return_entropy=True)
            out.loss.backward()
            tokens, log_prob = sample_tokens(leaf[0], seed=3)
            found.append([out.loss.detach(), out.log_prob, out.weight, out.entropy, leaf.grad, tokens, log_prob])  # type: ignore[list-item]
            assert len(made) >= 2
        assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, found[0], found[2]))
    assert len({work.counters.data_ptr() for work in made}) == len(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [33, 4099])
def test_a_row_read_twice_gives_the_bits_of_one_kept(v: int, dtype: torch.dtype, monkeypatch: Any) -> None:
    if device() != "cpu":
        pytest.skip("only the host build can be told how much shared memory there is")
    found = []
    for limit in ("22000", "0"):  # both limits give the same number of threads
        monkeypatch.setenv("SHIM_SHARED", limit)
        call = good(v)
        leaf = call.pop("logits").to(dtype).requires_grad_()
        out = dmfast.dm_loss(leaf, **call, objective="dpg", grad_scale=1.0)
        out.loss.backward()
        found.append((out.loss.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_cuda_draws_what_the_cpu_draws() -> None:
    """Uniform numbers and inversion are the same. The token differs only where a boundary lies within rounding."""
    torch.manual_seed(0)
    z = (3 * torch.randn(1000, 700)).to(device())
    arguments = (0, z.data_ptr(), 1000, 700, 700, 1.3, 0.0, 5, 0, 9, 0, 1)
    if device() != "cpu":
        z = z.cpu()
        arguments = (0, z.data_ptr(), *arguments[2:])
    tokens = torch.empty(1000, dtype=torch.int64, device="cpu")
    log_prob = torch.empty(1000, dtype=torch.float64, device="cpu")
    extension._C.sample(*arguments, tokens.data_ptr(), log_prob.data_ptr())  # type: ignore[union-attr]
    mine, mine_log_prob = sample_tokens(z.to(device()), seed=5, step=9, temperature=1 / 1.3)
    assert int((mine.cpu() != tokens).sum()) <= 1
    assert float((mine_log_prob.cpu() - log_prob)[mine.cpu() == tokens].abs().max()) < 1e-6
    assert torch.equal(eager.sample_tokens(z, seed=5, step=9, temperature=1 / 1.3)[0], tokens)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("objective", ["gdc++", "dpg", "own"])
def test_under_compile_a_fault_is_raised_by_check_too(objective: str, inplace: bool) -> None:
    """It compiles without a graph break, and does not ask the runtime again for the devices that there are."""
    call = good()
    call["logits"][2, 1, 3] = NAN
    leaf = call.pop("logits").requires_grad_()
    chosen: Any = (lambda t: torch.ones_like(t.log_prob)) if objective == "own" else objective

    def step(x: Tensor, **rest: Any) -> DMLossOutput:
        return dmfast.dm_loss(x * 1.0, **rest, objective=chosen, inplace=inplace)

    torch._dynamo.reset()
    out = torch.compile(step, backend="aot_eager", fullgraph=True)(leaf, **call)
    out.loss.backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all()) and bool((leaf.grad[2] == 0).all())
    with pytest.raises(ValueError, match=r"NaN or \+inf at \(sequence 2, position 1\)"):
        out.check()


@pytest.mark.parametrize("objective", ["gdc++", "dpg", "own"])
def test_a_fault_in_one_chunk_leaves_the_others_of_its_sequence_without_gradient(objective: str) -> None:
    call = good()
    hidden = torch.randn(4, 5, 8, device=device())
    weight = torch.randn(37, 8, device=device())
    hidden[2, 4] = NAN
    del call["logits"]
    call["objective"] = (lambda t: torch.ones_like(t.log_prob)) if objective == "own" else objective
    hidden.requires_grad_()
    # A chunk has 2 of the 5 rows of a sequence.
    out = dmfast.linear_dm_loss(hidden, weight, **call, chunk_bytes=2 * 64 * 4)
    out.loss.backward()
    assert hidden.grad is not None and bool((hidden.grad[2, :4] == 0).all()) and bool((hidden.grad[1] != 0).any())
    assert float(out.weight[2]) == 0.0 and bool(out.loss.isfinite())
    with pytest.raises(ValueError, match=r"NaN or \+inf at \(sequence 2, position 4\)"):
        out.check()


@pytest.mark.parametrize("starts", [[0, 9, 3, 20], [1, 7, 14, 20], [0, 7, 14, 21]])
def test_cu_seqlens_out_of_order_are_said_at_once_where_the_host_reads_them(starts: list[int]) -> None:
    call = {"hidden": torch.randn(20, 8, device=device()), "weight": torch.randn(37, 8, device=device()),
            "tokens": good()["tokens"].flatten(), "cu_seqlens": torch.tensor(starts, device=device())}  # fmt: skip
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to N = 20"):
        dmfast.linear_sequence_log_prob(**call)


def test_logits_that_were_overwritten_are_changed_also_where_the_call_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMFAST_SYNC_CHECKS", "1")
    call = good()
    call["logits"][2, 1, 3] = NAN
    leaf = call.pop("logits").requires_grad_()
    z = leaf * 1.0
    other = z.square().sum()  # this keeps z for its backward
    with pytest.raises(ValueError, match="sequence 2, position 1"):
        dmfast.dm_loss(z, **call, objective="dpg", inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_thousands_of_losses_are_summed_to_a_few_roundings() -> None:
    """The kernels sum them in an order of their own, which is the same in every call."""
    n = 3001
    terms = {name: torch.randn(n).double().to(device()) for name in ("log_target", "log_proposal")}
    call = {"logits": torch.randn(n, 1, 3, device=device()), "tokens": torch.zeros(n, 1).long().to(device()), **terms,
            "log_z": 0.0, "objective": "dpg"}  # fmt: skip
    losses = dmfast.dm_loss(**call, reduction="none").loss
    found = [float(dmfast.dm_loss(**call, reduction="sum").loss) for _ in range(2)]
    assert found[0] == found[1]
    exact = math.fsum(losses.tolist())
    assert abs(found[0] - exact) <= 1e-14 * float(losses.abs().sum())


host_only = pytest.mark.skipif(kernels.CUDA.device_type != "cpu", reason="only the host build can be told what fails")


@pytest.fixture
def ask_again() -> Iterator[None]:
    cuda.why_not_on.cache_clear()
    yield
    cuda.why_not_on.cache_clear()


@host_only
@pytest.mark.parametrize(
    ("fail", "driver", "message"),
    [
        ("cudaGetDeviceCount:100", "13000", "^compiled, no device$"),
        ("cudaGetDeviceCount:35", "0", "^compiled, no device: there is no NVIDIA driver"),
        ("cudaGetDeviceCount:35", "12040", r"^compiled for CUDA 13.0, but the NVIDIA driver is for CUDA 12.4 at most;"),
        ("cudaGetDeviceCount:999", "13000", "^compiled, but CUDA says: error 999"),
        ("cudaFuncGetAttributes:209", "13000", r"device 0 \(sm_75\) can run: error 209.*DMFAST_CUDA_ARCHS=75"),
    ],
)
def test_why_a_device_has_no_kernels(
    fail: str, driver: str, message: str, monkeypatch: pytest.MonkeyPatch, ask_again: None
) -> None:
    monkeypatch.setenv("SHIM_FAIL", fail)
    monkeypatch.setenv("SHIM_DRIVER", driver)
    monkeypatch.setattr(kernels, "_warned", set())
    info = dmfast.backends()["cuda"]
    assert not info.available and not info.in_use and re.search(message, info.detail)
    with pytest.warns(UserWarning, match="slow eager backend"):
        out = dmfast.dm_loss(**good())
    monkeypatch.delenv("SHIM_FAIL")
    assert dmfast.dm_loss(**good()).loss == out.loss  # this is still eager, because the device is not asked again
    cuda.why_not_on.cache_clear()
    torch.testing.assert_close(dmfast.dm_loss(**good()).loss, out.loss)  # the failure has left no error behind


@host_only
def test_an_error_is_not_kept_for_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIM_FAIL", "cudaFuncSetAttribute:1")
    with pytest.raises(RuntimeError, match="CUDA: error 1 of the shim"):
        dmfast.dm_loss(**{**good(), "logits": good()["logits"].requires_grad_()}, objective="dpg")
    monkeypatch.delenv("SHIM_FAIL")
    dmfast.dm_loss(**good())


@host_only
def test_the_shared_memory_of_a_kernel_is_one_constant() -> None:
    """The shim refuses a second value, because a thread could set it between another thread's setting and launch."""
    for v in (1000, 20, 3000):
        call = good(v)
        call["logits"].requires_grad_()
        dmfast.dm_loss(**call, objective="dpg").loss.backward()


@host_only
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_few_rows_are_scored_in_parts(layout: str, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of a row give what one block gives. A label in the last column, -inf and NaN reach the result."""
    torch.manual_seed(0)
    v = 20011
    z = 3 * torch.randn(8, v)
    z[1, : v // 2] = -INF  # no token of the first part is possible
    z[2, 7000:] = -INF  # no token of the later parts is possible
    tokens = torch.tensor([v - 1, v - 1, 5, -100, 0, 10_000, 9, 5000])
    shape: dict[str, Any] = {"logits": z.view(4, 2, v), "tokens": tokens.view(4, 2)}
    if layout == "packed":
        shape = {"logits": z, "tokens": tokens, "cu_seqlens": torch.tensor([0, 2, 4, 6, 8])}
    terms = {"log_target": torch.randn(4).double() - 20, "log_proposal": torch.randn(4).double() - 20, "log_z": 0.0}
    found = []
    for multiprocessors in ("1", "132"):
        monkeypatch.setenv("SHIM_MULTIPROCESSORS", multiprocessors)
        found.append(dmfast.dm_loss(**shape, **terms, objective="dpg", return_entropy=True, softcap=softcap))
    one, parts = found
    assert not torch.equal(one.log_prob, parts.log_prob), "so that it shows that there are parts"
    assert float((one.log_prob - parts.log_prob).abs().max()) < 1e-6
    assert one.entropy is not None and parts.entropy is not None
    assert float((one.entropy - parts.entropy).abs().max()) < 1e-6
    torch.testing.assert_close(one.loss, parts.loss, rtol=1e-7, atol=0)
    parts.check()
    for where in (3, v - 1):  # these columns lie in the first part and in the last one
        bad = z.clone()
        bad[4, where] = NAN
        shape["logits"] = bad.view_as(shape["logits"])
        out = dmfast.dm_loss(**shape, **terms, objective="dpg", softcap=softcap)
        assert out.log_prob.isnan().tolist() == [False, False, True, False] and float(out.weight[2]) == 0.0
        with pytest.raises(ValueError, match=r"NaN or \+inf at \(sequence 2, position 0"):
            out.check()
