"""FSDP2 (``torch.distributed.fsdp.fully_shard``): what a model whose parameters are shards needs from dmfast.

Every forward of such a model is one of all ranks, because each layer gathers its parameters there. So all ranks have to
run the same number of forwards, unless the parameters were gathered before (``gathered``). And FSDP starts its backward
at what a forward returns, so a loss that is made of hidden states has to be made within the forward (``call``): outside
of it every gradient would be wrong, without a word.

Only public functions of torch are used. Nothing here does anything to a model that is not sharded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

_T = TypeVar("_T")
_METHOD = "dmfast_call"  # the method that FSDP takes for a forward

_groups: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
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


def group_of(model: nn.Module) -> Any:
    """Return the process group that a sharded model's parameters are spread over.

    Raises:
        ValueError: they are spread over one, and copied over another.
    """
    if model not in _groups:
        reshard(model)  # a forward may have left all of them whole
        shard: Any = next(each for each in model.parameters() if is_shard(each))
        if shard.device_mesh.ndim != 1:
            raise ValueError(
                f"the parameters of the {class_of(model).__name__} lie on a mesh of {shard.device_mesh.ndim} "
                "dimensions; hybrid sharding (HSDP) and FSDP with tensor parallelism were not tried: shard over all "
                "processes alike"
            )
        _groups[model] = shard.device_mesh.get_group()
    return _groups[model]


def most(model: nn.Module, mine: int) -> int:
    """Return the largest of what the ranks give that hold a sharded model; of another model what this one gives."""
    if not is_sharded(model):
        return mine
    value = torch.tensor(int(mine), device=local(next(model.parameters())).device)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX, group=group_of(model))
    return int(value)


def agree(model: nn.Module, mine: bool) -> bool:
    """Return whether all ranks that hold a sharded model say yes; of another model what this rank says."""
    return not most(model, not mine)


def reshard(model: nn.Module) -> None:
    """Put the shards in the place of the whole parameters that a forward may have left there."""
    if is_sharded(model) and model not in _gathered:
        for part in parts(model):
            part.reshard()


def keep_whole(model: Any) -> None:
    """Keep the layers of a sharded model whole after each forward from now on, as sampling alone needs it."""
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
    group_of(model)
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
    group_of(model)
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
