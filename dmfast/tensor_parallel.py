"""Support models whose layers are cut among ranks by transformers' tensor parallelism.

``from_pretrained(..., distributed_config=DistributedConfig(tp_size=2))`` loads such a model. Its ranks work on the same
sequences, and all of them take part in each forward. Hidden states, and the logits that the model returns, are whole
and the same on each rank, while the parameters are DTensors. So each rank draws and scores the same by itself, and only
what is random has to come from one of them (``from_first``).

The functions here leave a model that is not cut as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_LIBRARY = "transformers.distributed.tensor_parallel"


def is_cut(model: Any) -> bool:
    """Return whether transformers has cut the layers of a model among ranks."""
    return (getattr(model, "tp_size", None) or 1) > 1


def mesh_of(model: Any) -> Any:
    """Return the DeviceMesh of one dimension over which a model is cut."""
    meshes = (parameter.device_mesh for parameter in model.parameters() if hasattr(parameter, "device_mesh"))
    mesh: Any = next(meshes)
    return mesh if mesh.ndim == 1 else mesh["tp"]


def group_of(model: Any) -> Any:
    """Return the process group over which a model is cut."""
    return mesh_of(model).get_group()


def cuts_vocabulary(head: Any) -> bool:
    """Return whether transformers' tensor parallelism has cut the rows of a head, which FSDP may have sharded besides.

    This does not tell whether its forward gives whole logits. ``HeadProbe`` compares them.
    """
    forward, weight = vars(head).get("forward"), head.weight
    return (
        getattr(forward, "__module__", None) == _LIBRARY
        and hasattr(weight, "device_mesh")
        and (weight.device_mesh.ndim == 1 or weight.device_mesh.mesh_dim_names[-1] == "tp")
        and weight.placements[-1].is_shard(0)
        and (head.bias is None or getattr(head.bias, "placements", None) == weight.placements)
    )


def from_first(model: Any, number: int) -> int:
    """Return the ``number`` of the first rank of a model's group, or this rank's if the model is not cut."""
    if not is_cut(model):
        return number
    group = group_of(model)
    value = torch.tensor(number, device=_local(next(model.parameters())).device)
    torch.distributed.broadcast(value, group=group, group_src=0)
    return int(value)


def _local(tensor: Any) -> Tensor:
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


def refuse(model: nn.Module) -> None:
    """Refuse a model that was loaded with a kind of parallelism that dmfast was not tested with.

    Raises:
        ValueError: the model has pipeline, expert or sequence parallelism.
    """
    config: Any = getattr(getattr(model, "config", None), "distributed_config", None)
    for name, what in (("pp_size", "pipeline"), ("ep_size", "expert")):
        size = getattr(config, name, None) or 1
        if size > 1:
            raise ValueError(
                f"the model was loaded with DistributedConfig({name}={size}), and dmfast does not run under {what} "
                "parallelism: leave it out, and cut the model by tp_size, or shard it by fsdp=True of DMConfig"
            )
    if getattr(config, "enable_sequence_parallel", False):
        raise ValueError(
            "the model was loaded with DistributedConfig(enable_sequence_parallel=True), and dmfast does not run under "
            "sequence parallelism: leave it out"
        )
