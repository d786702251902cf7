"""Tensor parallelism under ``DMTrainer``: what is refused of models that transformers cut as it loaded them, and what a
checkpoint holds of such a run.

transformers writes the model of a checkpoint whole, and refuses to write an optimiser whose states are parts. So each
process writes its own parts of optimiser and proposal, and as many processes read them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import TrainingArguments

from .. import sharding, tensor_parallel
from . import fsdp

_PARTS = "dmfast_parts_{}.pt"
_LOCAL = "dmfast_local"  # marks this process's part of a tensor


def size_of(model: nn.Module) -> int:
    """Return among how many processes the layers of a model are cut."""
    return int(getattr(model, "tp_size", None) or 1) if tensor_parallel.is_cut(model) else 1


def refuse_model(model: Any, base: Any, args: TrainingArguments, peft_config: Any) -> None:
    """Refuse a model that was cut as it was loaded in a way that was not tried, or together with something else.

    Args:
        model: the policy, or where it will be loaded from.
        base: the target's model.
        args: those of the run.
        peft_config: the adapter that is asked for.

    Raises:
        ValueError: it was.
        ImportError: a library is older than those that it was tried with.
    """
    cut = tensor_parallel.is_cut(model)
    if isinstance(base, nn.Module) and tensor_parallel.is_cut(base) and not cut:
        raise ValueError(
            "the target's base was cut by tensor parallelism as it was loaded, and the policy was not: each process "
            "would draw other sequences, which the base's processes must share; load both with one distributed_config"
        )
    if not cut and not getattr(model, "is_distributed_loading_by_transformers", False):
        return
    tensor_parallel.refuse(model)
    config = getattr(model.config, "distributed_config", None)
    sharded = max(getattr(config, "fsdp_size", None) or 1, getattr(config, "dp_replicate_size", None) or 1)
    if not cut:
        raise ValueError(
            "the model was sharded as it was loaded, by distributed_config, and FSDP can't copy it for the proposal: "
            "load it without, and set fsdp=True in DMConfig, by which DMTrainer shards policy, base and proposal alike"
        )
    if sharded > 1:
        raise ValueError(
            f"tensor parallelism together with FSDP or its copies (HSDP), which distributed_config asks for "
            f"(tp_size={size_of(model)}, fsdp_size={config.fsdp_size}, dp_replicate_size={config.dp_replicate_size}), "
            "was not tried with DMTrainer: give tp_size all processes, or load the model without distributed_config "
            "and set fsdp=True in DMConfig"
        )
    for library in (torch, accelerate, transformers):
        floor = fsdp.TRIED[library.__name__]
        if Version(library.__version__) < Version(floor):
            raise ImportError(
                f"tensor parallelism was tried with {library.__name__} {floor}, and {library.__version__} is "
                "installed: update it, or load the model without distributed_config"
            )
    if peft_config is not None or hasattr(model, "peft_config"):
        raise ValueError("adapters (PEFT) were not tried under tensor parallelism; train the whole model, or use FSDP2")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("quantised models were not tried under tensor parallelism; load the model in bfloat16")
    refused = {
        "gradient_variance_steps": "it differentiates each sequence alone; measure it in one process",
        "proposal_device": "the proposal lies where the policy does",
        "torch_compile": "that was not tried",
        "fsdp": "load the model without distributed_config for that",
        "fp16": "that was not tried; take bf16=True",
    }
    for name, why in refused.items():
        if getattr(args, name):
            raise ValueError(f"{name}={getattr(args, name)!r} does not run under tensor parallelism: {why}")


def save_parts(folder: Path, rank: int, processes: int, optimizer: Any, proposal: Mapping[str, Tensor] | None) -> None:
    """Write this process's parts of optimiser and proposal into a checkpoint.

    Args:
        folder: the checkpoint.
        rank, processes: which process this is, and of how many.
        optimizer: its states are parts, or whole and the same on all processes.
        proposal: what ``OfflineProposal.state_dict`` holds of q.

    Raises:
        ValueError: the optimiser has states that are cut in another way than their parameters.
        OSError, RuntimeError: they could not be written.
    """
    state = optimizer.state_dict()
    parameters = _parameters(optimizer)
    states = {
        place: {name: _taken_apart(value, parameters[place], name, optimizer) for name, value in values.items()}
        for place, values in state["state"].items()
    }
    q = None if proposal is None else {name: sharding.local(tensor) for name, tensor in proposal.items()}
    parts = {"processes": processes, "optimizer": state | {"state": states}, "proposal": q}
    torch.save(parts, folder / _PARTS.format(rank))


def load_parts(folder: Path, rank: int, processes: int) -> dict[str, Any]:
    """Read what ``save_parts`` wrote.

    Raises:
        ValueError: another number of processes wrote it.
    """
    path = folder / _PARTS.format(rank)
    parts: dict[str, Any] = {}
    if path.is_file():
        parts = torch.load(path, map_location="cpu", weights_only=True)
    if parts.get("processes") != processes:
        raise ValueError(
            f"the checkpoint {folder} is of a run under tensor parallelism with another number of processes than the "
            f"{processes} of this one: go on with as many, or train the saved model anew"
        )
    return parts


def load_optimizer(optimizer: Any, parts: Mapping[str, Any]) -> None:
    """Give an optimiser the states that ``load_parts`` returned."""
    state, parameters = parts["optimizer"], _parameters(optimizer)
    states = {
        place: {name: _put_together(value, parameters[place]) for name, value in values.items()}
        for place, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": states})


def proposal_of(parts: Mapping[str, Any], mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return q's tensors from what ``load_parts`` returned, in the form of those that it has.

    Raises:
        RuntimeError: they are of another model.
    """
    found = parts["proposal"]
    if found.keys() != mine.keys() or any(found[name].shape != sharding.local(mine[name]).shape for name in found):
        raise RuntimeError("the checkpoint does not hold the parameters of this proposal: it is of another model")
    return {name: _part_of(value, mine[name]) for name, value in found.items()}


def _parameters(optimizer: Any) -> list[Any]:
    """Return an optimiser's parameters in the order of its state's numbers."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _taken_apart(value: Any, parameter: Any, name: str, optimizer: Any) -> Any:
    if not (isinstance(value, Tensor) and sharding.is_shard(value)):
        return value
    if not sharding.is_shard(parameter) or (value.shape, value.placements) != (parameter.shape, parameter.placements):  # type: ignore[attr-defined]
        raise ValueError(
            f"{name} of {type(getattr(optimizer, 'optimizer', optimizer)).__name__} is cut in another way than its "
            "parameter, and was not tried in a checkpoint under tensor parallelism: take AdamW, or save_only_model=True"
        )
    return {_LOCAL: sharding.local(value)}


def _put_together(value: Any, parameter: Any) -> Any:
    return _part_of(value[_LOCAL], parameter) if isinstance(value, dict) and _LOCAL in value else value


def _part_of(value: Tensor, like: Any) -> Tensor:
    """Return this process's part in the form of a tensor that is cut in the same way; of a whole one, as it is."""
    if not sharding.is_shard(like):
        return value
    from torch.distributed.tensor import DTensor

    on_device = value.to(sharding.local(like).device)
    part: Tensor = DTensor.from_local(  # type: ignore[no-untyped-call]
        on_device, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return part
