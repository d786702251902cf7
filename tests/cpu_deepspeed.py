"""Lets accelerate run DeepSpeed on a CPU, for tests: without an accelerator it finds no backend for it, and each of the
processes then takes itself for the only one.

It is imported before any Accelerator is made.
"""

from __future__ import annotations

import os

from accelerate.state import PartialState
from accelerate.utils import DistributedType

_prepare, _bare = PartialState._prepare_backend, False


def _with_gloo(self, cpu=False, sagemaker_dp=False, backend=None):
    if not _bare and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true" and not cpu:
        return "gloo", DistributedType.MULTI_GPU
    return _prepare(self, cpu, sagemaker_dp, backend)


os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
PartialState._prepare_backend = _with_gloo


def bare(on):
    """Leave accelerate as it is on a CPU from now on, or no longer."""
    global _bare
    _bare = on
