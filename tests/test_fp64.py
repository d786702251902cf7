"""Test devices without fp64: which backend they get and why, and that per-sequence values are on the CPU there.

The tests need no such device.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dmfast
from dmfast import eager, kernels
from dmfast.kernels import faults, fp64, triton

OBJECTIVES = ["gdc++", "dpg", dmfast.Objective("reinforce", baseline="leave_one_out_context")]


@pytest.fixture
def an_xpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretend that there are one Intel GPU without fp64, and Triton."""
    monkeypatch.setattr(kernels, "forced", None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton, "_installed", lambda: None)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _: SimpleNamespace(has_fp64=False))
    fp64._xpu_has_fp64.cache_clear()
    yield
    fp64._xpu_has_fp64.cache_clear()


def arguments(device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    made = {
        "logits": 3 * torch.randn(4, 5, 37), "tokens": torch.randint(37, (4, 5)), "log_target": torch.randn(4) - 20,
        "log_proposal": torch.randn(4) - 20, "reward": torch.randn(4), "context_id": torch.tensor([0, 0, 1, 1]),
    }  # fmt: skip
    return {**{name: x.to(device) for name, x in made.items()}, "log_z": 0.3}


def test_which_backend_it_gets_and_why(an_xpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device with fp64")
    info = dmfast.backends()
    assert not info["triton"].available and "has fp64, which xpu:0 lacks" in info["triton"].detail
    assert "xpu:0, without fp64: rows in fp32, per-sequence values in fp64 on the CPU" in info["eager"].detail
    monkeypatch.setattr(kernels, "_warned", set())
    # torch 2.6 can't fake a tensor on xpu.
    there: Any = SimpleNamespace(device=torch.device("xpu", 0), dtype=torch.float32)
    with pytest.warns(UserWarning, match="slow eager backend: logits are on xpu:0; .*has fp64"):
        assert kernels.select(there).name == "eager"


class _Meta(TorchDispatchMode):
    """Make ``meta`` a device without fp64 that refuses fp64 and mixed devices. Its copies on the CPU are zeros."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            assert kwargs.get("dtype") != torch.float64, "converted where there is no fp64"
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        if function is not torch.ops.aten._to_copy.default:
            assert len({x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()}) <= 1
        made = function(*args, **kwargs)
        for x in tree_leaves(made):
            assert not isinstance(x, Tensor) or (x.device.type, x.dtype) != ("meta", torch.float64), function
        return made


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("on_the_device", [False, True])
def test_no_fp64_on_the_device(on_the_device: bool, objective: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same holds for inputs on the CPU. The host's reads of values are left out, because meta has no values."""
    monkeypatch.setattr(fp64, "has_fp64", lambda device: device.type != "meta")
    call = arguments("meta")
    if not on_the_device:
        names = ("log_target", "log_proposal", "reward")
        call |= {name: torch.zeros(4, dtype=torch.float64) for name in names}
    for name in ("check_rows", "check_logits", "check_labels", "check_terms", "check_weights"):
        monkeypatch.setattr(faults, name, lambda first, *_: first)
    leaf = call.pop("logits").requires_grad_()
    with _Meta():
        out = eager.dm_loss(leaf, **call, objective=objective, softcap=9.0, return_entropy=True)
        out.loss.backward()
    assert out.entropy is not None
    for x in (out.loss, out.log_prob, out.weight, out.entropy):
        assert x.dtype == torch.float64 and x.device.type == "cpu"
    assert leaf.grad is not None and leaf.grad.device.type == "meta" and leaf.grad.dtype == torch.float32


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_it_gives(objective: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands in for such a device. Results have an error of fp32 at most, and bf16 is not summed in bf16."""
    found = []
    for narrow in (False, True):
        if narrow:
            monkeypatch.setattr(fp64, "has_fp64", lambda device: False)
        call = arguments("cpu")
        leaf = call.pop("logits").to(dtype).requires_grad_()
        out = eager.dm_loss(leaf, **call, objective=objective)
        out.loss.backward()
        found.append((out.log_prob, out.weight, out.loss.detach(), leaf.grad))
    assert not torch.equal(found[0][0], found[1][0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if a.dtype != torch.bfloat16 else 2.0**-8, atol=1e-5)
