"""Prepare the parameters of q for an engine: write a folder, make a copy that differs everywhere, sum checksums."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_UNFINISHED = ".being-written"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def write(model: Any, folder: Path) -> None:
    """Write a transformers model as ``save_pretrained`` does, into a folder that is never there incomplete.

    Args:
        model: a model without adapters and wrappers.
        folder: the folder, which is replaced where it exists. Other processes read it, so the files lie in a folder
            beside it until all of them are written.

    Raises:
        OSError: the folder could not be written. An earlier one stays.
    """
    staging = folder.with_name(folder.name + _UNFINISHED)
    shutil.rmtree(staging, ignore_errors=True)
    staging.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _without_generation_config(model), _quietly():
            model.save_pretrained(staging)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(staging, folder)
    except Exception as error:  # safetensors and torch have errors of their own for a full disk
        raise OSError(f"the parameters of q could not be written to {folder}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _without_generation_config(model: Any) -> Iterator[None]:
    """Take the generation config away within the block.

    transformers refuses to save some of those that it loads, and engines are told to ignore it.
    """
    config = getattr(model, "generation_config", None)
    if config is not None:
        model.generation_config = type(config)()
    try:
        yield
    finally:
        if config is not None:
            model.generation_config = config


@contextmanager
def _quietly() -> Iterator[None]:
    """Switch transformers' progress bars off within the block, because a run writes q at every swap."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.no_grad()
def perturbed(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return a copy in which nearly every element of every parameter differs visibly, even in 16 bits.

    The standard deviation of the noise is a tenth of the parameter's root mean square, or .02 where that is 0.
    """
    other = copy.deepcopy(model).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
            scale = float(parameter.double().square().mean().sqrt()) / 10 if parameter.numel() else 0.0
            parameter.add_(noise * (scale or 0.02))
    return other


def checksum(tensor: Tensor) -> int:
    """Return the sum of a tensor's bit patterns modulo 2^64, which depends on no order, layout or zero padding.

    So an engine that fuses, transposes and pads its parameters has the same sum over all of them as the model that it
    was loaded from, in the same dtype.
    """
    bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64))


def checksums(model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Return each parameter's checksum in an engine that computes in ``dtype``. Tied parameters come once."""
    return {
        name: checksum(parameter.to(dtype) if parameter.is_floating_point() else parameter)
        for name, parameter in model.named_parameters()
    }


def total(sums: dict[str, int]) -> int:
    """Return the sum of checksums modulo 2^64."""
    return sum(sums.values()) % 2**64
