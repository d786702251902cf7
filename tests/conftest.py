"""Share what all tests need.

The examples can be imported by their names. With DMFAST_TEST_DEVICE=cuda, tensors that a test makes without naming a
device are on the device. `make gpu` sets it.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
if device := os.environ.get("DMFAST_TEST_DEVICE"):
    torch.set_default_device(device)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported.

    transformers' Trainer collects in every run, which takes half a second when it visits all of torch and transformers.
    """
    gc.collect()
    gc.freeze()
