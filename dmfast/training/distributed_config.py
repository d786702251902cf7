"""Run ``DMTrainer`` with models that transformers has spread over processes by a ``DistributedConfig``.

Such a model is cut by tensor parallelism, sharded by FSDP2, or both. This module refuses what was not tried with it,
and writes and reads a part of its checkpoints. transformers writes the model of a checkpoint whole, and refuses to
write an optimiser whose states are parts. So each process writes its own parts of optimiser and proposal, and processes
that are spread in the same way read them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import TrainingArguments

from .. import sharding, tensor_parallel
from . import fsdp

_PARTS = "dmfast_parts_{}.pt"
_SIZES = ("dp_replicate_size", "fsdp_size", "tp_size")
_SHARDED = "it is sharded already, or load it without"
_LOCAL = "dmfast_local"  # the key that marks this process's part of a tensor


def is_spread(model: Any) -> bool:
    """Return whether transformers has spread a model over processes as it loaded it."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False)) or tensor_parallel.is_cut(model)


def processes_of(model: Any) -> int:
    """Return the number of consecutive processes that work on the same sequences."""
    return int(model.tp_size) if tensor_parallel.is_cut(model) else 1


def refuse_model(model: Any, base: Any, args: TrainingArguments, peft_config: Any) -> None:
    """Refuse a model that was spread in a way, or together with an option, that was not tried.

    Args:
        model: the policy, or the path that it will be loaded from.
        base: the target's model.
        args: the arguments of the run.
        peft_config: the adapter that is asked for.

    Raises:
        ValueError: the model was spread in such a way, or an argument does not go with it.
        ImportError: a library is older than the version that this was tried with.
    """
    if is_spread(base) and not is_spread(model):
        raise ValueError(
            "the target's base was loaded with a distributed_config, and the policy was not: the processes of the base "
            "run its forwards together, and the policy's would not; load both with the same"
        )
    if not is_spread(model):
        return
    sharding.refuse(model)
    config: Any = getattr(model.config, "distributed_config", None)
    if _sizes(config)[0] > 1 and _sizes(config)[2] > 1:
        raise ValueError(
            f"tensor parallelism together with copies of a sharded model (HSDP), {_named(config)}, was not tried with "
            "DMTrainer: leave dp_replicate_size or tp_size out"
        )
    theirs = getattr(getattr(base, "config", None), "distributed_config", None)
    if is_spread(base) and _sizes(theirs) != _sizes(config):
        raise ValueError(
            f"the target's base was loaded with {_named(theirs)}, and the policy with {_named(config)}: load both with "
            "the same distributed_config, since the same processes run their forwards together"
        )
    for library in (torch, accelerate, transformers):
        floor = fsdp.TRIED[library.__name__]
        if Version(library.__version__) < Version(floor):
            raise ImportError(
                f"a model loaded with a distributed_config was tried with {library.__name__} {floor}, and "
                f"{library.__version__} is installed: update it, or load the model without distributed_config"
            )
    if peft_config is not None:
        raise ValueError(sharding.NO_ADAPTERS)
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("quantised models were not tried with a distributed_config; load the model in bfloat16")
    refused = {
        "gradient_variance_steps": "it differentiates each sequence alone; measure it in one process",
        "proposal_device": "the proposal lies where the policy does",
        "torch_compile": "that was not tried",
        "fsdp": _SHARDED,
        "fp16": "that was not tried; take bf16=True",
    }
    if args.sampler != "model" and _sizes(config)[2] > 1:
        refused["sampler"] = (
            "the processes among which tensor parallelism cuts it need the same sequences, and each would draw its own "
            "from the engine; leave tp_size out, or sampler"
        )
    found = {f"{name}={getattr(args, name)!r}": why for name, why in refused.items() if getattr(args, name)}
    by = fsdp.asked(args)
    if by is not None and not args.fsdp:
        found[by] = _SHARDED
    for what, why in found.items():
        raise ValueError(f"{what} does not run with a model that was loaded with a distributed_config: {why}")
    for name in ("fsdp_cpu_offload", "fsdp_mixed_precision"):
        if getattr(config, name, False):
            raise ValueError(f"{name} of DistributedConfig was not tried with DMTrainer; leave it out")
    if not args.gather_for_sampling and args.check_scores and sharding.is_sharded(model):
        raise ValueError(fsdp.UNCHECKED)


def _sizes(config: Any) -> list[int]:
    """Return the number of copies of a model, of processes that shard each of them, and of processes that cut each."""
    return [int(getattr(config, name, None) or 1) for name in _SIZES]


def _named(config: Any) -> str:
    return f"DistributedConfig({', '.join(f'{n}={k}' for n, k in zip(_SIZES, _sizes(config), strict=True))})"


def save_parts(folder: Path, rank: int, model: Any, optimizer: Any, proposal: Mapping[str, Tensor] | None) -> None:
    """Write this process's parts of optimiser and proposal into a checkpoint.

    Args:
        folder: the checkpoint.
        rank: the number of this process.
        model: the policy, whose config says how it is spread.
        optimizer: the optimiser. Its states are parts, or whole and the same on all processes.
        proposal: q's parameters from ``OfflineProposal.state_dict``.

    Raises:
        ValueError: the optimiser has states that are cut in another way than their parameters.
        OSError, RuntimeError: the parts could not be written.
    """
    state = optimizer.state_dict()
    parameters = _parameters(optimizer)
    states = {
        place: {name: _taken_apart(value, parameters[place], name, optimizer) for name, value in values.items()}
        for place, values in state["state"].items()
    }
    q = None if proposal is None else {name: sharding.local(tensor) for name, tensor in proposal.items()}
    parts = {"sizes": _sizes(model.config.distributed_config), "optimizer": state | {"state": states}, "proposal": q}
    torch.save(parts, folder / _PARTS.format(rank))


def load_parts(folder: Path, rank: int, model: Any) -> dict[str, Any]:
    """Open what ``save_parts`` wrote. A tensor is read from the file when it is used.

    Raises:
        ValueError: the model of the checkpoint was spread in another way.
    """
    path = folder / _PARTS.format(rank)
    found: dict[str, Any] = {}
    if path.is_file():  # mmap: q and the optimiser's states are loaded at different times, and each is read once
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    config = model.config.distributed_config
    if found.get("sizes") != _sizes(config):
        was = "fewer processes" if not found else f"{', '.join(_SIZES)} of {found['sizes']}"
        raise ValueError(
            f"the checkpoint {folder} is of a model that was spread in another way ({was}) than this one, "
            f"{_named(config)}: go on as the run began, or train the saved model anew"
        )
    return found


def load_optimizer(optimizer: Any, parts: Mapping[str, Any]) -> None:
    """Give an optimiser the states that ``load_parts`` returned."""
    state, parameters = parts["optimizer"], _parameters(optimizer)
    states = {
        place: {name: _put_together(value, parameters[place]) for name, value in values.items()}
        for place, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": states})


def proposal_of(parts: Mapping[str, Any], mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return q's tensors from what ``load_parts`` returned, cut as q's present tensors are.

    Args:
        parts: what ``load_parts`` returned.
        mine: q's present tensors by name.

    Raises:
        RuntimeError: the tensors are of another model.
    """
    found = parts["proposal"]
    # an older checkpoint has tied parameters under each of their names, so it may have more names than q
    if not mine.keys() <= found.keys() or any(found[name].shape != sharding.local(mine[name]).shape for name in mine):
        raise RuntimeError("the checkpoint does not hold the parameters of this proposal: it is of another model")
    return {name: _part_of(found[name], of_q) for name, of_q in mine.items()}


def _parameters(optimizer: Any) -> list[Any]:
    """Return an optimiser's parameters in the order in which its state numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _taken_apart(value: Any, parameter: Any, name: str, optimizer: Any) -> Any:
    if not (isinstance(value, Tensor) and sharding.is_shard(value)):
        return value
    if not sharding.is_shard(parameter) or (value.shape, value.placements) != (parameter.shape, parameter.placements):  # type: ignore[attr-defined]
        raise ValueError(
            f"{name} of {type(getattr(optimizer, 'optimizer', optimizer)).__name__} is cut in another way than its "
            "parameter, and can't be written into a checkpoint: take AdamW, or save_only_model=True"
        )
    return {_LOCAL: sharding.local(value)}


def _put_together(value: Any, parameter: Any) -> Any:
    cut = isinstance(value, dict) and _LOCAL in value
    tensor = value[_LOCAL] if cut else value
    if isinstance(tensor, Tensor):
        tensor = tensor.clone()  # or the optimiser would keep the file of an old checkpoint open
    return _part_of(tensor, parameter) if cut else tensor


def _part_of(value: Tensor, like: Any) -> Tensor:
    """Return this process's part as a tensor that is cut as ``like`` is; if ``like`` is whole, return it as it is."""
    if not sharding.is_shard(like):
        return value
    from torch.distributed.tensor import DTensor

    on_device = value.to(sharding.local(like).device)
    part: Tensor = DTensor.from_local(
        on_device, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return part
