"""Share one backbone between a, pi and q, which are a PEFT model with different adapters.

The model without its adapter is a, with the adapter it is pi, and with a copy of the adapter it is q.

An ``AdapterView`` is a ``LanguageModel`` around the same module. It switches the adapter before each of its forwards
and switches back after it, also after an error, so that the policy's active adapter and its requires_grad are
unchanged. PEFT's own switching changes requires_grad, so the flags are restored one by one here. Nothing of a view has
a gradient, so no backward recomputes anything under an adapter other than the policy's.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .tensors import address, all_tensors

#: The adapter that holds q.
PROPOSAL = "dmfast_proposal"
#: The prefix of the names of an adapter's tensors in ``tensors``.
ADAPTER = "adapter:"

# Layers of these kinds leave the base weights alone, so that the model is the pretrained one while they are off.
_TYPES = ("LORA", "LOHA", "LOKR", "IA3")
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")  # the other initialisations write into the base weights
_WHOLE_BASE = "or give the EBM a base of its own, a copy of the model from before the adapter"


def check(model: nn.Module) -> str:
    """Return the name of the policy's adapter, if the model is the pretrained one while the adapter is off.

    Raises:
        ValueError: the model is not a PEFT model; its adapter can't be switched, or more than the adapter is trained.
    """
    library: Any = sys.modules.get("peft")  # peft is imported wherever there is a PeftModel
    if library is None or not isinstance(model, library.PeftModel):
        hint = ""
        if getattr(model, "_hf_peft_config_loaded", False):
            hint = "; where add_adapter was called on the model itself, take peft.get_peft_model(model, config) instead"
        raise ValueError(f"one backbone needs a peft.PeftModel, got {type(model).__name__}{hint}")
    peft: Any = model
    active = list(peft.active_adapters)
    if len(active) != 1:
        raise ValueError(
            f"one backbone needs one active adapter, the policy; {len(active)} are active ({', '.join(active)}): call "
            "model.set_adapter(name)"
        )
    name = str(active[0])
    check_config(peft.peft_config[name])
    layers = _layers(model)
    if any(getattr(layer, "merged_adapters", None) for layer in layers):
        raise ValueError("the adapter is merged into the base weights, so it can't be switched off: unmerge_adapter()")
    if any(layer.disable_adapters for layer in layers):
        raise ValueError("the adapter is disabled, so the policy would be the base: call model.enable_adapter_layers()")
    own = {address(tensor) for tensor in weights(peft, name).values()}
    others = [n for n, p in peft.named_parameters() if p.requires_grad and address(p) not in own]
    if others:
        raise ValueError(
            f"one backbone needs the adapter {name!r} to be all that is trained, and {len(others)} other parameters "
            f"require a gradient ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}): they would move the "
            f"base too; freeze them, {_WHOLE_BASE}"
        )
    return name


def check_config(config: Any) -> None:
    """Check that a model with an adapter of this ``peft.PeftConfig`` is the pretrained one while the adapter is off.

    Raises:
        ValueError: the model is not the pretrained one then, or is not known to be.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in _TYPES:
        raise ValueError(
            f"one backbone can't be shared through an adapter of type {kind}, only through {', '.join(_TYPES)}, which "
            f"leave the base weights alone; take one of these, {_WHOLE_BASE}"
        )
    refused = {
        "modules_to_save": "trains whole copies of these modules, one more for each adapter",
        "layer_replication": "makes another model of the base",
        "alora_invocation_tokens": "switches itself on within a sequence",
    }
    for field, why in refused.items():
        if getattr(config, field, None):
            raise ValueError(
                f"one backbone can't be shared with {field}={getattr(config, field)!r}, which {why}; leave it out, "
                f"{_WHOLE_BASE}"
            )
    if getattr(config, "bias", "none") != "none":
        raise ValueError(
            f"one backbone can't be shared with bias={config.bias!r}, which trains the base's own biases; take "
            f"bias='none', {_WHOLE_BASE}"
        )
    init = getattr(config, "init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise ValueError(
            f"one backbone can't be shared with init_lora_weights={init!r}, which may change the base weights, so that "
            f"without its adapter the model is not the pretrained one; take True, {_WHOLE_BASE}"
        )


def weights(model: Any, adapter: str) -> dict[str, Tensor]:
    """Return an adapter's parameters under the names that PEFT saves, which lack the adapter's name."""
    from peft import get_peft_model_state_dict

    found: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    # Until peft 0.19 IA3, LoHa and LoKr add the parameters of the other adapters, which keep their names.
    others = model.peft_config.keys() - {adapter}
    return {name: tensor for name, tensor in found.items() if name.rpartition(".")[2] not in others}


def _layers(model: nn.Module) -> list[Any]:
    """Return the modules that switch an adapter: its layers and the wrappers of modules trained beside them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [each for each in model.modules() if isinstance(each, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


@contextmanager
def _same_flags(model: nn.Module) -> Iterator[None]:
    """Restore requires_grad of all parameters, whatever happens within."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


@contextmanager
def switched(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Switch the PEFT model to another adapter, or with None to no adapter, within the block.

    The layers are switched one by one, because PEFT's ``disable_adapter`` visits every module several times, which
    takes 0.1 s for 90 layers.
    """
    layers = [(layer, list(layer.active_adapters)) for layer in _layers(model) if not layer.disable_adapters]
    with _same_flags(model):
        try:
            for layer, _ in layers:
                if adapter is None:
                    layer.enable_adapters(False)
                else:
                    layer.set_adapter(adapter)
            yield
        finally:
            for layer, active in layers:
                if adapter is None:
                    layer.enable_adapters(True)
                else:
                    layer.set_adapter(active)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all tensors that a model computes with, by names that don't depend on the name of its adapter.

    A PEFT model with one active adapter gives the tensors of its base, and those of that adapter with ``ADAPTER``
    before the names that PEFT saves them under. Any other model gives its parameters and buffers.
    """
    library: Any = sys.modules.get("peft")
    if library is None or not isinstance(model, library.PeftModel) or len(model.active_adapters) != 1:
        return all_tensors(model)
    return tensors_under(model, str(model.active_adapters[0]))


def tensors_under(model: Any, adapter: str | None) -> dict[str, Tensor]:
    """Return ``tensors`` of a PEFT model as if this adapter were active, or as if no adapter were if it is None."""
    everything = all_tensors(model)
    of_adapters = {address(tensor) for name in model.peft_config for tensor in weights(model, name).values()}
    found = {name: tensor for name, tensor in everything.items() if address(tensor) not in of_adapters}
    own = {} if adapter is None else weights(model, adapter)
    return found | {ADAPTER + name: tensor for name, tensor in own.items()}


def saved(folder: Path, base: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors that ``save_pretrained`` wrote into a folder of an adapter, named as by ``tensors``.

    Args:
        folder: the folder of the adapter.
        base: the names of the base's tensors. PEFT saves an embedding of the base with an adapter that is on it.
    """
    from peft import load_peft_weights

    found: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
    return {name if name in base else ADAPTER + name: tensor for name, tensor in found.items()}


def add_copy(model: Any) -> str:
    """Add a frozen copy of the active adapter as ``PROPOSAL``, and replace an older copy.

    Returns:
        The name of the active adapter.

    Raises:
        ValueError: as in ``check``. Nothing has changed then.
    """
    name = check(model)
    config = copy.deepcopy(model.peft_config[name])
    config.inference_mode = True
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True
    device = next(model.parameters()).device
    # PEFT draws to initialise the copy, and that must not advance the global random state
    with _same_flags(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        if PROPOSAL in model.peft_config:
            model.delete_adapter(PROPOSAL)
        model.add_adapter(PROPOSAL, config)
        parameters = {p.data_ptr(): p for p in model.parameters()}
        source = weights(model, name)
        for key, value in weights(model, PROPOSAL).items():
            parameter = parameters[value.data_ptr()].requires_grad_(False)
            parameter.data = source[key].clone()  # PEFT may have given it another dtype
    return name
