"""List the tensors of a model by name, compare those of two models, and copy one model's into the other's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import sharding


def all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, also those that a state_dict leaves out, and nothing else.

    A sharded model is sharded again first, so its tensors are shards even after a forward that gathered them.
    """
    sharding.reshard(module)
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def address(tensor: Tensor) -> int:
    """Return the address of a tensor's values, or of this rank's part of a shard.

    The address of a shard is that of its memory, which differs between shards even if they are empty.
    """
    return sharding.local(tensor).untyped_storage().data_ptr() if sharding.is_shard(tensor) else tensor.data_ptr()


def without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, with only the first name of memory that has several names, as tied embeddings have."""
    found: dict[str, Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in tensors.items():
        one = (address(tensor), tuple(tensor.shape), tensor.dtype)
        if tensor.is_meta or not tensor.numel() or one not in seen:
            seen.add(one)
            found[name] = tensor
    return found


def fingerprint(tensors: Iterable[Tensor]) -> str | None:
    """Return a few numbers of tensors, or None where this process does not hold them whole."""
    there = list(tensors)
    if any(each.is_meta or sharding.is_shard(each) for each in there):
        return None
    sums = torch.stack([each.detach().flatten()[:8].double().sum().cpu() for each in there])
    weights = torch.arange(1, len(sums) + 1, dtype=torch.float64)
    return f"{len(sums)} tensors, {float(sums.sum()):.5g}, {float((weights * sums).sum()):.5g}"


def difference(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> str | None:
    """Return how names or shapes of two models' tensors differ, or None if they do not."""
    for what, names in (("lacks", target.keys() - source.keys()), ("has also", source.keys() - target.keys())):
        if names:
            some = sorted(names)
            return f"the source {what} {', '.join(some[:3])}{f' and {len(some) - 3} more' if len(some) > 3 else ''}"
    for name, tensor in target.items():
        if source[name].shape != tensor.shape:
            return f"{name} is {tuple(source[name].shape)} in the source, and {tuple(tensor.shape)} here"
        if sharding.is_shard(source[name]) and not _cut_alike(source[name], tensor):
            return f"{name} is sharded in the source, and in another way or not at all here"
    return None


def _cut_alike(source: Any, target: Any) -> bool:
    """Return whether two tensors are cut into the same shards on the same ranks, so that a copy gathers nothing."""
    return (
        sharding.is_shard(target)
        and source.device_mesh == target.device_mesh
        and tuple(source.placements) == tuple(target.placements)
    )


@torch.no_grad()
def copy_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy the values of all tensors, in the device and dtype that each target has.

    Each rank copies its own shards. If a source is whole and its target is sharded, each rank copies the part that
    belongs to its shard.

    Raises:
        RuntimeError: the names or shapes differ, or the tensors are sharded in different ways. Nothing is changed.
    """
    differs = difference(source, target)
    if differs is not None:
        raise RuntimeError(f"the parameters do not fit: {differs}")
    for name, tensor in target.items():
        value = source[name]
        if sharding.is_shard(tensor) and not sharding.is_shard(value):
            value = sharding.spread(value, tensor)
        tensor.copy_(value)
