"""Prepare the parameters of q for an engine: write a folder, make a copy that differs everywhere, sum checksums.

An engine gets the whole model, or an adapter alone where it was started so that it takes adapters.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import adapters
from ..tensors import address

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")  # they tell apart models of one kind
SHARD = "5GB"  # the most that a file of q's parameters takes
_UNFINISHED = ".being-written"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def write(model: Any, folder: Path) -> None:
    """Write a transformers model as ``save_pretrained`` does, into a folder that is never there incomplete.

    A large model takes several files of at most ``SHARD``, with an index.

    Args:
        model: a model without adapters and wrappers.
        folder: the folder, which is replaced where it exists. Other processes read it, so the files lie in a folder
            beside it until all of them are written.

    Raises:
        OSError: the folder could not be written. An earlier one stays.
    """

    def save(staging: Path) -> None:
        with _without_generation_config(model), _quietly():
            model.save_pretrained(staging, max_shard_size=SHARD)

    _write(folder, save)


def write_adapter(model: Any, name: str, folder: Path) -> None:
    """Write one adapter of a PEFT model as PEFT does, into a folder that is never there incomplete.

    Args:
        model: a ``peft.PeftModel``.
        name: the adapter's name, which the files do not hold.
        folder: as in ``write``.

    Raises:
        OSError: as in ``write``.
    """
    from safetensors.torch import save_file

    def save(staging: Path) -> None:
        staging.mkdir()
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in adapters.weights(model, name).items()}
        save_file(tensors, staging / "adapter_model.safetensors", metadata={"format": "pt"})
        model.peft_config[name].save_pretrained(str(staging))

    _write(folder, save)


def _write(folder: Path, save: Callable[[Path], None]) -> None:
    staging = folder.with_name(folder.name + _UNFINISHED)
    shutil.rmtree(staging, ignore_errors=True)
    staging.parent.mkdir(parents=True, exist_ok=True)
    try:
        save(staging)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(staging, folder)
    except Exception as error:  # safetensors and torch have errors of their own for a full disk
        raise OSError(f"the parameters of q could not be written to {folder}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _without_generation_config(model: Any) -> Iterator[None]:
    """Take the generation config away within the block.

    transformers refuses to save some of those that it loads, and engines are told to ignore it.
    """
    config = getattr(model, "generation_config", None)
    if config is not None:
        model.generation_config = type(config)()
    try:
        yield
    finally:
        if config is not None:
            model.generation_config = config


@contextmanager
def _quietly() -> Iterator[None]:
    """Switch transformers' progress bars off within the block, because a run writes q at every swap."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.no_grad()
def perturbed(model: nn.Module, adapter: str | None = None, seed: int = 0) -> nn.Module:
    """Return a copy in which nearly every element of every parameter differs visibly, even in 16 bits.

    The standard deviation of the noise is a tenth of the parameter's root mean square, or .02 where that is 0.

    Args:
        model: the model, which stays as it is.
        adapter: the name of the adapter whose parameters alone differ, and which is active in the copy; None: all do.
        seed: the seed of the noise.
    """
    other: Any = copy.deepcopy(model).requires_grad_(False)
    if adapter is None:
        changed = list(other.parameters())
    else:
        other.set_adapter(adapter)
        other.requires_grad_(False)
        of_adapter = {address(tensor) for tensor in adapters.weights(other, adapter).values()}
        changed = [parameter for parameter in other.parameters() if address(parameter) in of_adapter]
    generator = torch.Generator().manual_seed(seed)
    for parameter in changed:
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
            scale = float(parameter.double().square().mean().sqrt()) / 10 if parameter.numel() else 0.0
            parameter.add_(noise * (scale or 0.02))
    return cast(nn.Module, other)


def checksum(tensor: Tensor) -> int:
    """Return the sum of a tensor's bit patterns modulo 2^64, which depends on no order, layout or zero padding.

    So an engine that fuses, transposes and pads its parameters has the same sum over all of them as the model that it
    was loaded from, in the same dtype.
    """
    bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64))


def checksums(model: nn.Module, dtype: torch.dtype, without: Collection[Any] = ()) -> dict[str, int]:
    """Return each parameter's checksum in an engine that computes in ``dtype``. Tied parameters come once.

    Parameters whose ``address`` is in ``without`` are left out.
    """
    return {
        name: checksum(parameter.to(dtype) if parameter.is_floating_point() else parameter)
        for name, parameter in model.named_parameters()
        if address(parameter) not in without
    }


def checksums_with(model: Any, adapter: str, dtype: torch.dtype) -> dict[str, int]:
    """Return the checksums of the base of a PEFT model and of one of its LoRA adapters, as an engine holds them.

    An engine multiplies the second matrix of each pair by the adapter's scale when it loads the adapter.
    """
    of_adapters = {address(each) for name in model.peft_config for each in adapters.weights(model, name).values()}
    sums = checksums(model, dtype, without=of_adapters)
    for name, layer in _lora_layers(model, adapter):
        for first, second in ((layer.lora_A, layer.lora_B), (layer.lora_embedding_A, layer.lora_embedding_B)):
            if adapter in first:
                a, b = (getattr(each[adapter], "weight", each[adapter]).detach() for each in (first, second))
                sums[f"{name}.a"] = checksum(a.to(dtype))
                sums[f"{name}.b"] = checksum(b.to(dtype) * layer.scaling[adapter])
    return sums


def _lora_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """Yield the layers that have this adapter, by their names."""
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.r:
            yield name, layer


# With these, an adapter computes more than the product of its two matrices.
_BEYOND_LORA = (
    "modules_to_save", "use_dora", "lora_bias", "layer_replication", "alora_invocation_tokens", "target_parameters",
    "trainable_token_indices", "use_qalora", "use_bdlora", "arrow_config",
)  # fmt: skip


def lora_modules(model: nn.Module, adapter: str) -> set[str]:
    """Return the last names of the modules that have this LoRA adapter, such as ``q_proj``."""
    return {name.rpartition(".")[2] for name, _ in _lora_layers(model, adapter)}


def why_not_alone(model: Any, adapter: str, rank: int, modules: Collection[str]) -> str | None:
    """Return why an engine can't take an adapter of a PEFT model beside the base, or None if it can.

    Args:
        model: a ``peft.PeftModel``.
        adapter: the adapter's name.
        rank: the greatest rank that the engine takes.
        modules: the last names of the modules on which the engine takes adapters.
    """
    config = model.peft_config[adapter]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return f"it is of type {kind}, and engines take LORA"
    for name in _BEYOND_LORA:
        if getattr(config, name, None):
            return f"it has {name}={getattr(config, name)!r:.100}"
    if config.bias != "none":
        return f"it has bias={config.bias!r}"
    found, head = 0, model.get_output_embeddings()
    for name, layer in _lora_layers(model, adapter):
        if layer is head or adapter in layer.lora_embedding_A:
            return f"it is on {name}, and dmfast's checks need scores, which vLLM can't give with an adapter there"
        if name.rpartition(".")[2] not in modules:
            return f"it is on {name}, and the engine takes adapters on {', '.join(sorted(modules))} alone"
        found = max(found, int(layer.r[adapter]))
    return f"its rank is {found}, and the engine takes at most {rank} (--max-lora-rank)" if found > rank else None


def total(sums: dict[str, int]) -> int:
    """Return the sum of checksums modulo 2^64."""
    return sum(sums.values()) % 2**64
