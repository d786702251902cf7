"""Test what only the Triton backend has: selection, how rows are divided, and its launches on the host.

Faults are recorded as CUDA's are, and test_cuda.py tests them. The tests run under the plugin interpreter.py, or on a
device.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_functional import assert_one_graph
from torch._subclasses.fake_tensor import FakeTensorMode

import dmfast
from dmfast import eager, kernels
from dmfast.functional import sample_tokens
from dmfast.kernels import checks, cuda, extension, triton, use_backend
from dmfast.kernels.eager import score

if kernels.backends()["triton"].in_use:
    from test_cuda import (  # noqa: F401
        _asynchronous,
        test_a_fault_is_raised_by_check_and_costs_its_sequence_alone,
        test_a_token_weight_that_may_not_be_costs_its_token_alone,
        test_a_users_objective_is_checked_later_too,
        test_an_input_that_may_not_be_costs_its_sequence_also_where_the_weight_does_not_need_it,
        test_at_once_if_asked,
        test_cu_seqlens_out_of_order,
        test_hidden_states_that_are_not_row_major,
        test_under_compile_a_fault_is_raised_by_check_too,
        test_under_compile_a_fault_of_a_chunk_names_its_sequence,
        test_without_a_loss_a_fault_shows_as_nan,
    )
    from test_functional import _fresh_compiler, test_opcheck  # noqa: F401
    from triton.runtime.interpreter import InterpreterBuilder

    from dmfast.kernels.triton import launch
in_use = pytest.mark.skipif(not kernels.backends()["triton"].in_use, reason="triton is not in use")


def test_importing_dmfast_imports_no_triton(tmp_path: Path) -> None:
    code = "import sys, dmfast; dmfast.backends(); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_forcing_it_where_it_can_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if triton.devices():
        pytest.skip("there is a device")
    with (
        pytest.raises(
            RuntimeError, match=r"'triton' is not available here: (triton is not installed|there is no CUDA)"
        ),
        use_backend("triton"),
    ):
        pass
    assert not dmfast.backends()["triton"].available
    monkeypatch.setattr(kernels, "forced", "triton")
    with pytest.raises(RuntimeError, match="backend 'triton' was forced, but"):
        kernels.select(torch.zeros(1, 1, 3))


def test_which_devices_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA takes its compiled kernels where they are, and else Triton. ROCm and XPU take Triton. The CPU does not."""
    monkeypatch.setattr(kernels, "forced", None)

    # no tensor can be on a device that is not here
    class Logits:
        dtype = torch.float32

        def __init__(self, device: str) -> None:
            self.device = torch.device(device)

    monkeypatch.setattr(triton, "why_not", lambda device=None: None)
    compiled: Any = SimpleNamespace(cuda=SimpleNamespace(device_type="cuda"))
    monkeypatch.setattr(extension, "_C", compiled)
    monkeypatch.setattr(cuda, "why_not_on", lambda device: None)
    assert [kernels.select(Logits(d)).name for d in ("cpu", "cuda", "xpu")] == ["cpu", "cuda", "triton"]  # type: ignore[arg-type]
    monkeypatch.setattr(cuda, "why_not_on", lambda device: "not compiled")
    assert kernels.select(Logits("cuda")).name == "triton"  # type: ignore[arg-type]
    monkeypatch.setattr(triton, "why_not", lambda device=None: "no triton")
    monkeypatch.setattr(kernels, "_warned", set())
    with pytest.warns(UserWarning, match="slow eager backend: .*not compiled; .*no triton"):
        assert kernels.select(Logits("cuda")).name == "eager"  # type: ignore[arg-type]


@in_use
def test_how_rows_are_divided() -> None:
    """Rows have three kinds of shape by their length, and two kinds with a softcap, where a thread has 8 logits."""
    warps = [launch.shape_of(v, 2, cap=False).warps for v in (31, 6143, 6144, 12287, 12288, 50257)]
    assert warps == [1, 1, 4, 4, 8, 8]
    shapes = [launch.shape_of(v, size, cap=True) for size in (4, 2) for v in (50257, 700)]
    assert shapes == [(2, 128, 4), (2, 32, 1), (1, 128, 4), (1, 32, 1)]


@in_use
def test_warps_of_64_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's gfx9 has them. A row has as many threads as elsewhere, in half as many warps, but at least one warp."""
    for v, cap, size in itertools.product((31, 6144, 50257), (False, True), (2, 4)):
        narrow, wide = (launch.shape_of(v, size, cap, warp_size) for warp_size in (32, 64))
        assert wide.threads == 64 * wide.warps == max(narrow.threads, 64) and wide.packs == narrow.packs
    assert [launch.sample_warps(size, 64) for size in (2, 4)] == [2, 4]

    class Driver:
        def get_current_target(self) -> SimpleNamespace:
            return SimpleNamespace(backend="hip", arch="gfx942", warp_size=64)

    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=Driver()))
    monkeypatch.setattr(launch, "_on", lambda device: contextlib.nullcontext())
    launch.warp_size.cache_clear()
    try:
        assert launch.warp_size(torch.device("cuda", 0)) == 64 and launch.warp_size(torch.device("cpu")) == 32
    finally:
        launch.warp_size.cache_clear()


@in_use
def test_the_gradient_of_rows_that_are_aligned_otherwise() -> None:
    """With an odd V the new contiguous gradient of ``logits[:, :-1]`` is aligned otherwise. With V = 40 it is alike."""
    for v, same in ((37, False), (40, True)):
        logits = torch.randn(3, 5, v)
        batch = dmfast.kernels.checks.make_batch(logits[:, :-1], torch.zeros(3, 4).long(), None, None, 1.0, None)
        assert launch._same_alignment(batch, torch.empty(3, 4, v)) is same


@in_use
def test_it_draws_what_eager_draws() -> None:
    torch.manual_seed(0)
    z = 3 * torch.randn(40, 2500)
    ids = torch.arange(40) * 2**31
    for seed, step in ((5, 9), (2**64 - 1, 2**40 + 1)):
        mine, log_prob = sample_tokens(z, seed=seed, row_ids=ids, step=step, temperature=0.8)
        tokens, truth = eager.sample_tokens(z, seed=seed, row_ids=ids, step=step, temperature=0.8)
        assert torch.equal(mine, tokens)
        assert float((log_prob - truth).abs().max()) < 1e-6


@in_use
# a compilation takes seconds, so only these three cases are compiled
@pytest.mark.parametrize("name", ["gdc++", "dpg in place", "own in place"])
def test_under_compile_it_is_one_graph(name: str) -> None:
    assert_one_graph(name, "aot_eager")


@pytest.mark.parametrize("device", ["cuda", "xpu"])
@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
def test_without_a_graph_break_on_devices_that_are_not_here(
    device: str, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors have no data and no gradient, because this torch has autograd for its own devices only."""
    if torch.cuda.is_available() or torch.xpu.is_available():
        pytest.skip("there is a device")
    monkeypatch.setattr(kernels, "forced", None)
    monkeypatch.setattr(triton, "why_not", lambda device=None: None)
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes if "dmfast" in str(node.target))
        return graph

    torch._dynamo.reset()
    with FakeTensorMode():
        logits = torch.empty(4, 5, 37, device=device, dtype=torch.bfloat16)
        tokens = torch.zeros(4, 5, device=device, dtype=torch.int64)
        names = ("log_target", "log_proposal", "log_z")
        terms = {name: torch.zeros(4, dtype=torch.float64, device=device) for name in names}
        assert kernels.select(logits).name == "triton"
        loss = torch.compile(dmfast.dm_loss, backend=look, fullgraph=True)(
            logits, tokens, objective=objective, **terms
        ).loss  # type: ignore[call-overload]
    assert seen == ["dmfast.score_and_weigh_v6.default"] and loss.device.type == device


# docs/gpu.md states these errors of Triton's log pi, in nats against fp64 of the same stored logits: the largest of a
# row of 50,257 logits, and that of the mean over rows, which 1,024 tokens add up. A term has two exp2, one after the
# other: its own and that of a new maximum.
ROW_ERROR, MEAN_ERROR, OF_EXP2 = 2e-7, 1e-7, 2.3


@in_use
@pytest.mark.parametrize(
    ("lean", "dtype", "softcap"),
    [
        (0.0, torch.float32, None), (0.0, torch.bfloat16, None), (0.0, torch.float32, 30.0),
        (2.0**-22, torch.float32, None), (-(2.0**-22), torch.float32, None),
    ],
)  # fmt: skip
def test_its_own_accuracy(
    lean: float, dtype: torch.dtype, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """exp2 is numpy's, or it is off by what PTX allows of ex2.approx, always to the same side."""
    if lean and not triton.interpreted():
        pytest.skip("a device's exp2 is its own")
    if triton.interpreted():
        exact = InterpreterBuilder.create_exp2

        def exp2(self: object, x: object) -> object:
            y = exact(self, x)
            y.data = (y.data * np.float64(1 + lean)).astype(np.float32)
            return y

        monkeypatch.setattr(InterpreterBuilder, "create_exp2", exp2)
    torch.manual_seed(0)
    logits = (3 * torch.randn(1, 8, 50257)).to(dtype)
    batch = checks.make_batch(logits, torch.randint(50257, (1, 8)), None, None, 1.0, softcap)
    truth = score(batch._replace(logits=logits.double()))
    error = kernels.select(batch.logits).forward(batch, None, False).lse - truth.lse
    print(f"{dtype}, softcap {softcap}, lean {lean}: row {float(error.abs().max()):.2e} mean {float(error.mean()):.2e}")
    assert float(error.abs().max()) < ROW_ERROR + OF_EXP2 * abs(lean)
    assert abs(float(error.mean())) < MEAN_ERROR + OF_EXP2 * abs(lean)
