"""A frozen copy of a model, which shares nothing with it."""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
from torch import Tensor, nn

from . import sharding, tensor_parallel


def frozen_copy(module: nn.Module, device: torch.device | str | None) -> nn.Module:
    """Return a frozen copy, which is made directly on the device.

    Raises:
        ValueError: the model is sharded by FSDP, or it is cut by tensor parallelism and a device is named.
    """
    if sharding.parts(module):
        kind = sharding.class_of(module).__name__
        raise ValueError(
            f"the {kind} is sharded already, and FSDP can't copy it: make the OfflineProposal before fully_shard, and "
            "shard proposal.snapshot.model as the policy; DMTrainer with DMConfig(fsdp=True) does both"
        )
    if device is not None and tensor_parallel.is_cut(module):
        raise ValueError(
            f"device={device!r}: the model is cut by tensor parallelism, and the proposal lies where the model does; "
            "leave device out"
        )
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        if sharding.is_shard(tensor):  # deepcopy asks a shard for memory that it has not got
            moved = tensor.detach().clone()
        elif device is not None and type(tensor) in (nn.Parameter, Tensor):
            moved = tensor.detach().to(device, copy=True)
        else:
            continue
        memo[id(tensor)] = nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved
    for part in module.modules():
        for value in vars(part).values():
            if hasattr(value, "get_group") or hasattr(value, "get_mesh"):
                memo[id(value)] = value  # the ranks, of which there are no copies
    copied = copy.deepcopy(module, memo).requires_grad_(False)
    of_copies = {id(old): new for old, new in zip(module.modules(), copied.modules(), strict=True)}
    for part in copied.modules():
        if isinstance(vars(part).get("forward"), types.FunctionType):
            part.forward = _about(part.forward, of_copies)
    copied.zero_grad(set_to_none=True)
    return copied if device is None else copied.to(device)


def _about(value: Any, copies: dict[int, Any]) -> Any:
    """Return what is about modules in the same form about their copies, by the ids of the modules.

    deepcopy takes a function as it is, and tensor parallelism puts functions in the place of forwards, each of which
    would go on computing with the model that was copied.
    """
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, _about(value.__self__, copies))
    if not isinstance(value, types.FunctionType) or value.__closure__ is None:
        return value
    cells = tuple(types.CellType() for _ in value.__closure__)
    function = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
    function.__kwdefaults__ = value.__kwdefaults__
    function.__qualname__, function.__module__ = value.__qualname__, value.__module__
    copies[id(value)] = function  # which may refer to itself
    for cell, of_value in zip(cells, value.__closure__, strict=True):
        try:
            cell.cell_contents = _about(of_value.cell_contents, copies)
        except ValueError:  # nothing is in it
            continue
    return function
