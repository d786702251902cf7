"""What only the Triton backend has: selection, how rows are divided, its launches on the host. Faults that are recorded
are those of CUDA, and their tests are test_cuda.py's. Runs under the plugin interpreter.py, or on a device.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import dmfast
from dmfast import eager, kernels
from dmfast.kernels import native, triton

if kernels.backends()["triton"].in_use:
    from test_cuda import (  # noqa: F401
        _asynchronous,
        test_a_fault_is_raised_by_check_and_costs_its_sequence_alone,
        test_a_users_objective_is_checked_later_too,
        test_at_once_if_asked,
        test_cu_seqlens_out_of_order,
        test_without_a_loss_a_fault_shows_as_nan,
    )

    from dmfast.kernels.triton import launch
in_use = pytest.mark.skipif(not kernels.backends()["triton"].in_use, reason="triton is not in use")


def test_importing_dmfast_imports_no_triton() -> None:
    code = "import sys, dmfast; dmfast.backends(); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_forcing_it_where_it_can_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if triton.devices():
        pytest.skip("there is a device")
    with (
        pytest.raises(
            RuntimeError, match=r"'triton' is not available here: (triton is not installed|there is no CUDA)"
        ),
        dmfast.use_backend("triton"),
    ):
        pass
    assert not dmfast.backends()["triton"].available
    monkeypatch.setattr(kernels, "_forced", "triton")
    with pytest.raises(RuntimeError, match="backend 'triton' was forced, but"):
        kernels.select(torch.zeros(1, 1, 3))


def test_which_devices_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA tensor takes compiled kernels if there, else Triton; ROCm and XPU take Triton; the CPU does not."""
    monkeypatch.setattr(kernels, "_forced", None)

    class Logits:  # a tensor on a device that is not here
        dtype = torch.float32

        def __init__(self, device: str) -> None:
            self.device = torch.device(device)

    monkeypatch.setattr(triton, "why_not", lambda device=None: None)
    monkeypatch.setattr(native, "on_cuda", lambda x: x.device.type == "cuda")
    monkeypatch.setattr(native, "why_unavailable", lambda: None)
    monkeypatch.setattr(native, "why_not_cuda", lambda device=0: None)
    assert [kernels.select(Logits(d)) for d in ("cpu", "cuda", "xpu")] == ["cpu", "cuda", "triton"]  # type: ignore[arg-type]
    monkeypatch.setattr(native, "why_not_cuda", lambda device=0: "not compiled")
    assert kernels.select(Logits("cuda")) == "triton"  # type: ignore[arg-type]
    monkeypatch.setattr(triton, "why_not", lambda device=None: "no triton")
    monkeypatch.setattr(kernels, "_warned", set())
    with pytest.warns(UserWarning, match="slow eager backend: .*not compiled; .*no triton"):
        assert kernels.select(Logits("cuda")) == "eager"  # type: ignore[arg-type]


@in_use
def test_how_rows_are_divided() -> None:
    """Three kinds by the length of a row."""
    warps = [launch.shape_of(v, 2).warps for v in (31, 6143, 6144, 12287, 12288, 50257)]
    assert warps == [1, 1, 4, 4, 8, 8]


@in_use
def test_the_gradient_of_rows_that_are_aligned_otherwise() -> None:
    """``logits[:, :-1]`` with an odd V, whose new gradient is contiguous, and one where every row is aligned."""
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
        mine, log_prob = dmfast.sample_tokens(z, seed=seed, row_ids=ids, step=step, temperature=0.8)
        tokens, truth = eager.sample_tokens(z, seed=seed, row_ids=ids, step=step, temperature=0.8)
        assert torch.equal(mine, tokens)
        assert float((log_prob - truth).abs().max()) < 1e-6
