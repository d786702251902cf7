"""DMFAST_TEST_DEVICE=cuda: tensors that a test makes without naming a device are the device's. `make gpu` sets it."""

from __future__ import annotations

import os

import torch

if device := os.environ.get("DMFAST_TEST_DEVICE"):
    torch.set_default_device(device)
