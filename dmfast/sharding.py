"""FSDP2 (``torch.distributed.fsdp.fully_shard``): what a model whose parameters are shards needs from dmfast.

Every forward of such a model is one of all ranks, because each layer gathers its parameters there. So all ranks have to
run the same number of forwards, unless the parameters were gathered before (``gathered``). And FSDP starts its backward
at what a forward returns, so a loss that is made of hidden states has to be made within the forward (``call``): outside
of it every gradient would be wrong, without a word.

Only public functions of torch are used. Nothing here does anything to a model that is not sharded.
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
_BY_TRANSFORMERS = (("fsdp", "tp"), ("dp_replicate", "fsdp"))  # the meshes of its DistributedConfig that were tried
NO_ADAPTERS = (
    "adapters (PEFT) were not tried on a model that was loaded with a distributed_config: load it without, and set "
    "fsdp=True in DMConfig, or train the whole model"
)
_METHOD = "dmfast_call"  # the method that FSDP takes for a forward

_groups: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
_gathered: WeakSet[nn.Module] = WeakSet()
_inside: WeakSet[nn.Module] = WeakSet()
_kept: WeakSet[nn.Module] = WeakSet()  # whose layers stay whole after a forward


def _is_part(module: nn.Module) -> bool:
    """Return whether ``fully_shard`` was called on this module. Whoever did that has imported FSDP."""
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
    """Return what this rank holds of a tensor."""
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
    """Return the process groups that a sharded model's parameters are spread over, one for each dimension of the mesh.

    Raises:
        ValueError: there are several, and transformers has not made them.
    """
    if model not in _groups:
        reshard(model)  # a forward may have left all of them whole
        shard: Any = next(each for each in model.parameters() if is_shard(each))
        mesh = shard.device_mesh
        if mesh.ndim != 1 and mesh.mesh_dim_names not in _BY_TRANSFORMERS:
            raise ValueError(
                f"the parameters of the {class_of(model).__name__} lie on a mesh of {mesh.ndim} dimensions; hybrid "
                "sharding (HSDP) and FSDP with tensor parallelism were tried with models that transformers has sharded "
                "so, by a DistributedConfig: load it with one, or shard over all processes alike"
            )
        _groups[model] = mesh.get_all_groups()
    return _groups[model]


def holders(model: nn.Module) -> int:
    """Return how many processes hold parts of a sharded model, or copies of parts."""
    reshard(model)
    shard: Any = next(each for each in model.parameters() if is_shard(each))
    return int(shard.device_mesh.size())


def most(model: nn.Module, mine: int) -> int:
    """Return the largest of what the ranks give that hold parts of a model; of a whole one what this rank gives."""
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
    """Return whether all ranks that hold parts of a model say yes; of a whole one what this rank says."""
    return not most(model, not mine)


def refuse(model: Any) -> None:
    """Refuse a model that transformers has spread over processes in a way that was not tried, or that does not work.

    Raises:
        ValueError: it has an adapter, pipeline or expert parallelism, or a tied head whose shares have several sizes.
    """
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
    """Put the shards in the place of the whole parameters that a forward may have left there."""
    if is_sharded(model) and model not in _gathered:
        for part in parts(model):
            part.reshard()


def keep_whole(model: Any) -> None:
    """Keep the layers of a sharded model whole after each forward from now on, as sampling alone needs it."""
    if not is_sharded(model):
        return
    model.set_reshard_after_forward(False)
    _kept.add(model)


def in_step(model: nn.Module) -> bool:
    """Return whether each forward of the model now is one of all ranks."""
    return is_sharded(model) and model not in _gathered


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Make all parameters whole on every rank within the block, so that ranks may run different numbers of forwards.

    All ranks enter it together. Afterwards each layer but the root and the head, which a backward needs first, gives
    its parameters away after a forward again, as accelerate and transformers have it.
    """
    if not in_step(model):
        yield
        return
    found, changes = parts(model), model not in _kept
    groups_of(model)
    with torch.no_grad():
        call(model, lambda: None)  # FSDP finds its root in a forward, and sets up what the root shares with its parts
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
    """Run a function as one forward of a sharded model, which it runs by ``forward_of``, and return what it returns.

    Parameters of the root are whole within it, and backward starts at its outputs as FSDP needs it.

    Args:
        model: what is sharded, or any other model, of which this only calls the function.
        function: what needs whole parameters.
        outputs: gives of what the function returns the tensors that carry a gradient, one or a tuple of them. Only
            these does FSDP see, whose mixed precision would round all that it sees to 16 bits.
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
    """Return what runs a forward of the model: within ``call`` its method, since the hooks around it have run."""
    forward: Callable[..., Any] = model.forward if model in _inside else model
    return forward


def spread(value: Tensor, target: Any) -> Tensor:
    """Return a whole tensor, which every rank has, as shards like those of the target."""
    from torch.distributed.tensor import distribute_tensor

    whole = value.to(local(target).device, target.dtype)
    shards: Tensor = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    return shards


# ---- DeepSpeed, which DMTrainer alone runs under


def is_engine(module: nn.Module) -> bool:
    """Return whether this is what DeepSpeed puts around a model. Whoever made one has imported DeepSpeed."""
    deepspeed: Any = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(module, deepspeed.DeepSpeedEngine)


def is_cut_by_zero(model: nn.Module) -> bool:
    """Return whether DeepSpeed's ZeRO-3 has cut the model's parameters."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
