"""The tensors of a model by name: all of them, whether those of two models fit, a copy of one's into the other's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, also those that a state_dict leaves out, and not what else a state_dict holds."""
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def difference(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> str | None:
    """Return how names or shapes of two models' tensors differ; None: they do not."""
    for what, names in (("lacks", target.keys() - source.keys()), ("has also", source.keys() - target.keys())):
        if names:
            some = sorted(names)
            return f"the source {what} {', '.join(some[:3])}{f' and {len(some) - 3} more' if len(some) > 3 else ''}"
    for name, tensor in target.items():
        if source[name].shape != tensor.shape:
            return f"{name} is {tuple(source[name].shape)} in the source, and {tuple(tensor.shape)} here"
    return None


@torch.no_grad()
def copy_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy the values of all tensors, to the device and dtype that each of the targets has.

    Raises:
        RuntimeError: names or shapes differ; nothing is changed.
    """
    differs = difference(source, target)
    if differs is not None:
        raise RuntimeError(f"the parameters do not fit: {differs}")
    for name, tensor in target.items():
        tensor.copy_(source[name])
