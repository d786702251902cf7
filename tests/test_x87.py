"""Test that the compiled extension leaves the x87 unit as it finds it.

g++ may use an MMX register as a spare one, and MMX registers are those of the x87 unit. Without an ``emms`` the next
``long double`` of the thread would be NaN, even somewhere else in the process.
"""

import importlib
import platform
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

import dmfast
from dmfast.functional import sample_tokens

pytestmark = pytest.mark.skipif(not dmfast.backends()["cpu"].available, reason="needs the compiled kernels")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has MMX")
def test_machine_code_holds_no_mmx():
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("needs objdump, which binutils brings along with g++")
    extension = importlib.import_module("dmfast._C").__file__
    code = subprocess.run([objdump, "-d", extension], check=True, capture_output=True, text=True).stdout
    assert re.search(r"%xmm[0-7]\b", code)
    assert re.findall(r"^.*%mm[0-7]\b.*$", code, re.MULTILINE) == []


# the machine chooses the instruction set, so scripts/ci/sanitize.sh runs this on an optimised build of the baseline
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("objective", ["dpg", "gdc++"])
@pytest.mark.parametrize("entropy", [False, True], ids=["plain", "entropy"])
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["uncapped", "capped"])
def test_long_double_after_a_call(dtype, objective, entropy, softcap):
    rows = torch.randn(2, 3, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens = torch.tensor([[0, 1, 2], [3, 4, 5]])
    log_q = torch.full((2,), -20.0, dtype=torch.float64)
    for case in (rows, rows.sort().values, rows.sort(descending=True).values):
        logits = case.clone().requires_grad_()
        out = dmfast.dm_loss(
            logits, tokens, objective=objective, log_target=log_q, log_proposal=log_q, log_z=0.0,
            return_entropy=entropy, softcap=softcap, grad_scale=1.0 if objective == "dpg" else None,
        )  # fmt: skip
        assert np.isfinite(np.longdouble(1) / 3)
        out.loss.backward()
        assert np.isfinite(np.longdouble(1) / 3)
        sample_tokens(case[:, 0], seed=0, softcap=softcap)
        assert np.isfinite(np.longdouble(1) / 3)
