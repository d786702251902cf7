"""Support models whose parameters are sharded by FSDP2 (``torch.distributed.fsdp.fully_shard``).

All ranks take part in every forward of such a model, because each layer gathers its parameters in it. So all ranks have
to run the same number of forwards, unless the parameters were gathered before (``gathered``). FSDP starts its backward
at the values that a forward returns. So a loss that is made of hidden states has to be made within the forward
(``call``). Outside of it every gradient would be silently wrong.

This module uses only public functions of torch. It does nothing to a model that is not sharded.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from . import tensor_parallel

_T = TypeVar("_T")
_BY_TRANSFORMERS = (("fsdp", "tp"), ("dp_replicate", "fsdp"))  # these meshes of its DistributedConfig were tested
NO_ADAPTERS = (
    "adapters (PEFT) were not tried on a model that was loaded with a distributed_config: load it without, and set "
    "fsdp=True in DMConfig, or train the whole model"
)
_METHOD = "dmfast_call"  # FSDP treats the method of this name as a forward

_groups: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
_gathered: WeakSet[nn.Module] = WeakSet()
_inside: WeakSet[nn.Module] = WeakSet()
_kept: WeakSet[nn.Module] = WeakSet()  # the layers of these models stay whole after a forward


def _is_part(module: nn.Module) -> bool:
    """Return whether ``fully_shard`` was called on this module. The call needs FSDP, which is then imported."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_sharded(model: nn.Module) -> bool:
    """Return whether ``fully_shard`` was called on the model."""
    return _is_part(model)


def parts(model: nn.Module) -> list[Any]:
    """Return the modules that ``fully_shard`` was called on, the model first."""
    return [module for module in model.modules() if _is_part(module)]


def is_shard(tensor: Tensor) -> bool:
    """Return whether a tensor is one rank's shard of a larger one."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Tensor:
    """Return the part of a tensor that this rank holds."""
    found: Tensor = tensor.to_local() if is_shard(tensor) else tensor
    return found


def class_of(module: nn.Module) -> type:
    """Return the class that a module had before ``fully_shard`` gave it one of its own."""
    kind = type(module)
    if not _is_part(module):
        return kind
    fsdp: Any = sys.modules["torch.distributed.fsdp"]
    return next(each for each in kind.__mro__ if not issubclass(each, fsdp.FSDPModule))


def is_own_hook(hook: Any) -> bool:
    """Return whether a forward hook is one of FSDP's."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")


def groups_of(model: nn.Module) -> list[Any]:
    """Return the process groups over which a sharded model's parameters are spread, one per dimension of the mesh.

    Raises:
        ValueError: there are several groups, and transformers has not made them.
    """
    if model not in _groups:
        reshard(model)  # a forward may have left all parameters whole
        shard: Any = next(each for each in model.parameters() if is_shard(each))
        mesh = shard.device_mesh
        if mesh.ndim != 1 and mesh.mesh_dim_names not in _BY_TRANSFORMERS:
            raise ValueError(
                f"the parameters of the {class_of(model).__name__} lie on a mesh of {mesh.ndim} dimensions; hybrid "
                "sharding (HSDP) and FSDP with tensor parallelism were tried with models that transformers has sharded "
                "by a DistributedConfig: load it with one, or shard it over one dimension of all processes"
            )
        _groups[model] = mesh.get_all_groups()
    return _groups[model]


def holders(model: nn.Module) -> int:
    """Return how many processes hold parts of a sharded model, or copies of parts."""
    reshard(model)
    shard: Any = next(each for each in model.parameters() if is_shard(each))
    return int(shard.device_mesh.size())


def shares_of_a_step(model: nn.Module) -> int:
    """Return how many parts of a step a sharded model's processes train on together, or 1 for a whole model.

    Processes among which tensor parallelism cuts the model train on the same sequences.
    """
    if not is_sharded(model):
        return 1
    processes = math.prod(int(group.size()) for group in groups_of(model))
    return processes // (tensor_parallel.group_of(model).size() if tensor_parallel.is_cut(model) else 1)


def most(model: nn.Module, mine: int) -> int:
    """Return the largest value of the ranks that hold parts of a model, or this rank's value for a whole model."""
    if is_sharded(model):
        groups = groups_of(model)
    elif tensor_parallel.is_cut(model):
        groups = [tensor_parallel.group_of(model)]
    else:
        return mine
    value = torch.tensor(int(mine), device=local(next(model.parameters())).device)
    for group in groups:
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX, group=group)
    return int(value)


def agree(model: nn.Module, mine: bool) -> bool:
    """Return whether all ranks that hold parts of a model say yes, or this rank's answer for a whole model."""
    return not most(model, not mine)


def refuse(model: Any) -> None:
    """Refuse a model that was spread over processes in a way that was not tested or does not work.

    Raises:
        ValueError: the model is sharded by FSDP1; or transformers has spread it, and it has an adapter, pipeline or
            expert parallelism, or a tied head with shares of several sizes.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(each, fsdp.FullyShardedDataParallel) for each in model.modules()):
        raise ValueError(
            "the model is sharded by FSDP1 (FullyShardedDataParallel), and dmfast runs under FSDP2: shard it by "
            "torch.distributed.fsdp.fully_shard, or set fsdp=True in DMConfig"
        )
    tensor_parallel.refuse(model)
    if getattr(model, "is_distributed_loading_by_transformers", False) and hasattr(model, "peft_config"):
        raise ValueError(NO_ADAPTERS)
    if not (is_sharded(model) and getattr(model, "is_distributed_loading_by_transformers", False)):
        return
    reshard(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    weight: Any = head.weight
    rows, mesh = weight.shape[0], weight.device_mesh
    shares = math.prod(mesh.size(k) for k, placement in enumerate(weight.placements) if not placement.is_replicate())
    if rows % shares:
        raise ValueError(
            f"the head of the {class_of(model).__name__} is its embedding, and the {rows} rows do not divide among "
            f"{shares} processes: transformers ties them after it has sharded them, and torch then keeps two copies of "
            "the last rows, of which an optimiser moves one. Pad them, by model.resize_token_embeddings(len(tokenizer),"
            f" pad_to_multiple_of={shares}) of the whole model, or load it without distributed_config and set "
            "fsdp=True in DMConfig"
        )


def reshard(model: nn.Module) -> None:
    """Put the shards back where a forward has left whole parameters."""
    if is_sharded(model) and model not in _gathered:
        for part in parts(model):
            part.reshard()


def keep_whole(model: Any) -> None:
    """Keep the layers of a sharded model whole after each forward from now on, for a model that only samples."""
    if not is_sharded(model):
        return
    model.set_reshard_after_forward(False)
    _kept.add(model)


def in_step(model: nn.Module) -> bool:
    """Return whether all ranks have to take part in each forward of the model now."""
    return is_sharded(model) and model not in _gathered


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Make all parameters whole on every rank within the block, so that ranks may run different numbers of forwards.

    All ranks enter it together. Afterwards each layer frees its whole parameters after a forward again, as accelerate
    and transformers set it. Only the root and the head keep them, because a backward needs these first.
    """
    if not in_step(model):
        yield
        return
    found, changes = parts(model), model not in _kept
    groups_of(model)
    with torch.no_grad():
        call(model, lambda: None)  # FSDP finds its root in a forward, and sets up the state that the root shares
    if changes:
        model.set_reshard_after_forward(False)
    try:
        for part in found:
            part.unshard()
        _gathered.add(model)
        yield
    finally:
        _gathered.discard(model)
        if changes:
            model.set_reshard_after_forward(True)
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            for part in (model, head):
                if part is not None and _is_part(part):
                    part.set_reshard_after_forward(False, recurse=False)
        for part in found:
            part.reshard()


def call(model: Any, function: Callable[[], _T], outputs: Callable[[Any], object] = lambda _: None) -> _T:
    """Run a function as one forward of a sharded model, and return what the function returns.

    The function runs the model itself by ``forward_of``. The root's parameters are whole within it, and backward starts
    at its outputs as FSDP needs it.

    Args:
        model: the sharded model. For any other model the function is only called.
        function: the function that needs whole parameters.
        outputs: a function that takes the returned value and gives its tensors that carry a gradient, one or a tuple.
            FSDP sees only these, because its mixed precision would round everything that it sees to 16 bits.
    """
    if not is_sharded(model) or model in _inside:
        return function()
    groups_of(model)
    if _METHOD not in vars(model):
        from torch.distributed.fsdp import register_fsdp_forward_method

        setattr(model, _METHOD, lambda inner: inner())
        register_fsdp_forward_method(model, _METHOD)
    returned: list[_T] = []

    def run() -> object:
        returned.append(function())
        return outputs(returned[0])

    _inside.add(model)
    try:
        getattr(model, _METHOD)(run)
    finally:
        _inside.discard(model)
    if not torch.is_grad_enabled():
        reshard(model)
    return returned[0]


def forward_of(model: Any) -> Callable[..., Any]:
    """Return the model to call for a forward, or within ``call`` its ``forward``, whose hooks have already run."""
    forward: Callable[..., Any] = model.forward if model in _inside else model
    return forward


def spread(value: Tensor, target: Any) -> Tensor:
    """Return a tensor that every rank has whole as a DTensor that is sharded like the target."""
    from torch.distributed.tensor import distribute_tensor

    whole = value.to(local(target).device, target.dtype)
    shards: Tensor = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    return shards


# ---- DeepSpeed, which DMTrainer alone runs under


def is_engine(module: nn.Module) -> bool:
    """Return whether this is DeepSpeed's engine around a model. Making one needs DeepSpeed, which is then imported."""
    deepspeed: Any = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(module, deepspeed.DeepSpeedEngine)


def is_cut_by_zero(model: nn.Module) -> bool:
    """Return whether DeepSpeed's ZeRO-3 has cut the model's parameters."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
