"""Copy models: a frozen copy that shares nothing with the model, and a whole copy of a sharded model."""

from __future__ import annotations

import copy
import types
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import sharding
from .tensors import all_tensors, copy_into, difference


def frozen_copy(module: nn.Module, device: torch.device | str | None) -> nn.Module:
    """Return a frozen copy, which is made directly on ``device``, or on the model's device if that is None.

    Raises:
        ValueError: the model is sharded, and not by transformers as it loaded it; a device is named for the copy of a
            model that is spread over processes.
    """
    by_transformers = getattr(module, "is_distributed_loading_by_transformers", False)
    if device is not None and by_transformers:
        raise ValueError(
            f"device={device!r}: transformers has spread the model over processes as it loaded it, and the proposal "
            "lies where the model does; leave device out"
        )
    if sharding.parts(module) and by_transformers:
        return _sharded_alike(module)
    if sharding.parts(module):
        kind = sharding.class_of(module).__name__
        raise ValueError(
            f"the {kind} is sharded already, and FSDP can't copy it: make the OfflineProposal before fully_shard, and "
            "shard proposal.snapshot.model as the policy; DMTrainer with DMConfig(fsdp=True) does both"
        )
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        if sharding.is_shard(tensor):  # deepcopy fails on a shard, which has no storage of its own
            moved = tensor.detach().clone()
        elif device is not None and type(tensor) in (nn.Parameter, Tensor):
            moved = tensor.detach().to(device, copy=True)
        else:
            continue
        memo[id(tensor)] = nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved
    for part in module.modules():
        for value in vars(part).values():
            if hasattr(value, "get_group") or hasattr(value, "get_mesh"):
                memo[id(value)] = value  # process groups can't be copied
    copied = copy.deepcopy(module, memo).requires_grad_(False)
    of_copies = {id(old): new for old, new in zip(module.modules(), copied.modules(), strict=True)}
    for part in copied.modules():
        if isinstance(vars(part).get("forward"), types.FunctionType):
            part.forward = _about(part.forward, of_copies)
    copied.zero_grad(set_to_none=True)
    return copied if device is None else copied.to(device)


def _about(value: Any, copies: dict[int, Any]) -> Any:
    """Return a function or method that refers to the copies of modules instead of the modules.

    deepcopy does not copy functions. Where a function has replaced a module's forward, as under tensor parallelism, the
    copy's forward would go on computing with the original model.

    Args:
        value: a module's forward, or something that it refers to.
        copies: the copy of each module, by the id of the module.
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
    copies[id(value)] = function  # the function may refer to itself
    for cell, of_value in zip(cells, value.__closure__, strict=True):
        try:
            cell.cell_contents = _about(of_value.cell_contents, copies)
        except ValueError:  # the cell is empty
            continue
    return function


def whole_copy(module: Any, wanted: bool) -> nn.Module | None:
    """Return a whole copy of a sharded model on the CPU in the processes that want one, and None in the others.

    All processes that hold parts of the model call it together. Each gathered tensor is freed before the next is
    gathered.

    Raises:
        ValueError: the model has parts or hooks that its config does not make.
    """
    made, source = _of_config(module), all_tensors(module)
    target = dict([*made.named_parameters(remove_duplicate=False), *made.named_buffers(remove_duplicate=False)])
    if _layout(module) != _layout(made) or _shapes(source) != _shapes(target):
        raise ValueError(
            f"the {sharding.class_of(module).__name__} is sharded, and it has modules, hooks or parameters that its "
            "config does not make, so that no whole copy can be made of it for another engine: leave sampler out, or "
            "train without sharding"
        )
    if wanted:
        if getattr(made.config, "distributed_config", None) is not None:
            made.config.distributed_config = None  # engines read the config that is written for them
        made.to_empty(device="cpu")
        made.tie_weights()
        target = all_tensors(made)
    with torch.no_grad():
        for name, tensor in source.items():
            value: Tensor = tensor.full_tensor() if sharding.is_shard(tensor) else tensor  # type: ignore[attr-defined]
            if wanted:
                target[name].copy_(value)
    return made.requires_grad_(False).eval() if wanted else None


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _of_config(module: Any) -> Any:
    """Return a whole model on the meta device, with the class, config and dtypes of a sharded one."""
    from transformers import initialization

    kind: Any = sharding.class_of(module)
    with torch.device("meta"), initialization.no_tie_weights(), initialization.no_init_weights():
        made: Any = kind(copy.deepcopy(module.config))
    dtypes = {name: tensor.dtype for name, tensor in module.named_parameters(remove_duplicate=False)}
    for name, parameter in made.named_parameters(remove_duplicate=False):
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
    made.generation_config = copy.deepcopy(module.generation_config)
    return made


def _sharded_alike(module: Any) -> nn.Module:
    """Return a copy of a model that transformers has sharded as it loaded it, made of its config in the same way.

    Raises:
        ValueError: the model has parts or hooks that its config does not make.
    """
    kind, made = sharding.class_of(module), _of_config(module)
    made = cast(Any, kind).maybe_distribute_model(made, made.config.distributed_config, module._mesh_manager)
    made.to_empty(device=sharding.local(next(module.parameters())).device)
    made.tie_weights()
    made.requires_grad_(False)
    source, target = all_tensors(module), all_tensors(made)
    if _layout(module) != _layout(made) or difference(source, target) is not None:
        raise ValueError(
            f"the {kind.__name__} is sharded, and it has modules, hooks or parameters that its config does not make, "
            "so that no copy can be made of it for the proposal: load it without distributed_config, and set fsdp=True "
            "in DMConfig"
        )
    copy_into(target, source)
    made.train(module.training)
    return cast(nn.Module, made)


def _layout(model: nn.Module) -> list[tuple[str, type, int]]:
    """Return the name, the class and the number of hooks of each module of a model."""
    return [
        (name, sharding.class_of(each), sum(not sharding.is_own_hook(hook) for hook in _hooks(each)))
        for name, each in model.named_modules()
    ]


def _hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
